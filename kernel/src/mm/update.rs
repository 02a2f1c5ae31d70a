//! Changes of single page-table entries, pins and roots: what `mmu_update`, `update_va_mapping`, `mmuext_op` and a guest's
//! own write to a page table mean. They all come through here.

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::{DomId, Mfn};

use super::frames::Owner;
use super::mutants::Mutant;
use super::page_info::{Event, Failure, Refusal};
use super::page_kind::{Kind, Level};
use super::pte::{Pte, PteFlags};
use super::tlb_debt::TlbDebt;
use super::validate::{EntryRef, MapRights, Pager, Stop, Unfinished, is_hypervisor_slot};
use crate::hypercall::Budget;
use crate::page_ref::{L4, PageRef, Writable};
use crate::platform::Platform;
use crate::sync;

/// How an entry is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// As given.
    Plain,
    /// Keeping the accessed and dirty bits that the processor has set.
    PreserveAccessedDirty,
    /// Only if the entry is this now. For L1 entries and data: no other table can be written by its guest.
    IfEqual(Pte),
}

/// An entry was written.
#[must_use]
#[derive(Debug)]
pub struct Updated {
    /// What is owed before the guest runs again: an entry above L1 changed, and processors cache those too.
    pub debt: TlbDebt,
    /// A table that the old entry referred to is not fully torn down yet.
    pub unfinished: Option<Unfinished>,
}

impl Updated {
    const PLAIN: Updated = Updated { debt: TlbDebt::NONE, unfinished: None };
}

/// How often an exchange of an entry is tried against the processor's accessed and dirty bits.
const REPLACE_ATTEMPTS: u32 = 4;

/// An L1 entry that is in no table, with its references. Dropping it gives them back.
#[must_use = "an entry that is not put anywhere gives its references back at once"]
pub struct TakenEntry<'a> {
    pte: Pte,
    refs: EntryRef<'a>,
}

impl TakenEntry<'_> {
    /// An entry that maps nothing.
    pub const EMPTY: TakenEntry<'static> = TakenEntry { pte: Pte::EMPTY, refs: EntryRef::Nothing };
}

/// Why an entry was not written. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotUpdated {
    /// Refused, or out of budget.
    Stop(Stop),
    /// [`Store::IfEqual`] found this instead.
    Differs(Pte),
}

impl<T: Into<Stop>> From<T> for NotUpdated {
    fn from(stop: T) -> NotUpdated {
        NotUpdated::Stop(stop.into())
    }
}

impl<'a, P: Platform> Pager<'a, P> {
    /// Writes `new` to word `index` of `table`, a frame of `table_owner`: as an entry, if the frame is a page table, or as
    /// data, if it is not. Frames in L1 entries are `frame_owner`'s.
    #[expect(clippy::too_many_arguments, reason = "each is one field of the request")]
    pub fn update_entry(
        &self,
        table: &PageRef<'_>,
        index: usize,
        new: Pte,
        store: Store,
        frame_owner: DomId,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<Updated, NotUpdated> {
        let mfn = table.mfn();
        let Some(word) = self.platform.frame(mfn).get(index) else { return Err(Failure::Invalid.into()) };
        if !self.lock_table(mfn) {
            return self.write_data(table, word, new, store);
        }
        let owner = DomId::new(table.owner_number());
        let kind = self.memory.type_word(mfn).map_or(Kind::None, |w| w.kind());
        let result = match kind.level() {
            Some(Level::L1) => self.set_l1(word, new, store, owner, frame_owner, rights),
            Some(_) if frame_owner != owner => Err(Failure::Invalid.into()),
            Some(level) => self.set_upper(mfn, word, index, level, new, store, owner, rights, budget),
            None if kind == Kind::Writable => {
                write(word, new, store).map(|_| Updated::PLAIN).map_err(NotUpdated::Differs)
            }
            None => Err(Failure::Invalid.into()),
        };
        self.memory.sure_step(mfn, Event::Unlock);
        result
    }

    /// As [`Pager::update_entry`], but only for an L1 table: `update_va_mapping`, and a guest's own write to an L1 table.
    pub fn update_l1(
        &self,
        table: &PageRef<'_>,
        index: usize,
        new: Pte,
        store: Store,
        frame_owner: DomId,
        rights: &impl MapRights,
    ) -> Result<(), NotUpdated> {
        let mfn = table.mfn();
        let Some(word) = self.platform.frame(mfn).get(index) else { return Err(Failure::Invalid.into()) };
        if !self.lock_table(mfn) {
            return Err(Failure::Invalid.into());
        }
        let owner = DomId::new(table.owner_number());
        let result = if self.memory.type_word(mfn).is_some_and(|w| w.kind() == Kind::L1) {
            self.set_l1(word, new, store, owner, frame_owner, rights)
        } else {
            Err(Failure::Invalid.into())
        };
        self.memory.sure_step(mfn, Event::Unlock);
        result.map(|Updated { debt, .. }| self.pay(debt))
    }

    /// Takes an entry out of an L1 table, with the references it holds: the entry is empty then. Translations through it may
    /// be left in TLBs.
    pub fn take_l1(&self, table: &PageRef<'_>, index: usize) -> Result<TakenEntry<'a>, Failure> {
        let word = self.platform.frame(table.mfn()).get(index).ok_or(Failure::Invalid)?;
        self.with_l1(table.mfn(), || {
            let pte = Pte::from_bits(word.swap(0, Ordering::SeqCst));
            Ok(TakenEntry { pte, refs: EntryRef::from_pte(self.memory, pte) })
        })
    }

    /// Puts an entry taken out of an L1 table of the same owner in the place of one that `matches`; that one's references are
    /// given back. On `Err` those of `entry` are.
    pub fn replace_l1(
        &self,
        table: &PageRef<'_>,
        index: usize,
        entry: TakenEntry<'a>,
        matches: impl Fn(Pte) -> bool,
    ) -> Result<(), Failure> {
        let word = self.platform.frame(table.mfn()).get(index).ok_or(Failure::Invalid)?;
        self.with_l1(table.mfn(), || {
            // The processor sets accessed and dirty bits at any time, each once.
            for _ in 0..REPLACE_ATTEMPTS {
                let old = Pte::from_bits(word.load(Ordering::Acquire));
                if !matches(old) {
                    break;
                }
                if write(word, entry.pte, Store::IfEqual(old)).is_ok() {
                    entry.refs.into_pte();
                    drop(EntryRef::from_pte(self.memory, old));
                    return Ok(());
                }
            }
            Err(Failure::Invalid)
        })
    }

    /// Works on an L1 table in force, locked.
    fn with_l1<T>(&self, mfn: Mfn, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        if !self.lock_table(mfn) {
            return Err(Failure::Invalid);
        }
        let is_l1 = self.memory.type_word(mfn).is_some_and(|w| w.kind() == Kind::L1);
        let result = if is_l1 { work() } else { Err(Failure::Invalid) };
        self.memory.sure_step(mfn, Event::Unlock);
        result
    }

    /// Keeps others from changing entries of this frame. False when it has no kind in force.
    fn lock_table(&self, mfn: Mfn) -> bool {
        loop {
            match self.memory.type_step(mfn, Event::Lock) {
                Ok(_) => return true,
                Err(Refusal::Wait) => sync::relax(),
                Err(_) => return false,
            }
        }
    }

    fn write_data(
        &self,
        table: &PageRef<'_>,
        word: &AtomicU64,
        new: Pte,
        store: Store,
    ) -> Result<Updated, NotUpdated> {
        let page = self.memory.get_any_page(table.mfn()).ok_or(Failure::Invalid)?;
        let (page, debt) = page.typed::<Writable>().map_err(|_| Failure::Invalid)?;
        self.pay(debt);
        let result = write(word, new, store).map(|_| Updated::PLAIN).map_err(NotUpdated::Differs);
        drop(page);
        result
    }

    fn set_l1(
        &self,
        word: &AtomicU64,
        new: Pte,
        store: Store,
        table_owner: DomId,
        frame_owner: DomId,
        rights: &impl MapRights,
    ) -> Result<Updated, NotUpdated> {
        let old = expected(word, store);
        let adjusted = self.adjust(new, Level::L1);
        if new.is_present() && old.differs_harmlessly(adjusted) && new.check(Level::L1, true).is_ok() {
            write(word, adjusted, store).map_err(NotUpdated::Differs)?;
            return Ok(Updated::PLAIN);
        }
        let (refs, stored) = if new.is_present() {
            self.acquire_l1(new, table_owner, frame_owner, rights)?
        } else {
            (EntryRef::Nothing, new)
        };
        let old = write(word, stored, store).map_err(NotUpdated::Differs)?;
        refs.into_pte();
        let gone = EntryRef::from_pte(self.memory, old);
        if self.memory.mutants().has(Mutant::LeakedReference) {
            gone.into_pte();
        } else {
            drop(gone);
        }
        Ok(Updated::PLAIN)
    }

    #[expect(clippy::too_many_arguments, reason = "one internal function with one caller")]
    fn set_upper(
        &self,
        table: Mfn,
        word: &AtomicU64,
        index: usize,
        level: Level,
        new: Pte,
        store: Store,
        owner: DomId,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<Updated, NotUpdated> {
        if is_hypervisor_slot(level, index) || matches!(store, Store::IfEqual(_)) {
            return Err(Failure::Invalid.into());
        }
        let old = expected(word, store);
        let stored = match level.child() {
            Some(child) if new.is_present() => {
                new.check(level, false).map_err(|_| Failure::Invalid)?;
                let adjusted = new.adjusted(level);
                if old.differs_harmlessly(adjusted) {
                    write(word, adjusted, store).map_err(NotUpdated::Differs)?;
                    return Ok(Updated {
                        debt: TlbDebt::of_tables(owner, self.memory.clock()),
                        unfinished: None,
                    });
                }
                self.acquire_table(new, table, level, child, owner, rights, budget)?
            }
            _ => new,
        };
        let gone = write(word, stored, store).map_err(NotUpdated::Differs)?;
        let debt = TlbDebt::of_tables(owner, self.memory.clock());
        // While the lock is held: the table still has its linear entries counted.
        let unfinished = self.put_entry(gone, table, level, budget).err();
        Ok(Updated { debt, unfinished })
    }

    /// The L1 table that translates `va` under `root`, and the index of the entry in it. `None` where a level is missing.
    ///
    /// `root` is held by the vCPU that runs here. Nothing is locked and no references are taken: this is a walk like the
    /// processor's own ([`tlb_clock`](super::tlb_clock)), and nothing in it flushes. By the time the caller looks, the frame may not be that
    /// table any more: it checks that it is an L1 table of the domain it means.
    pub fn find_l1(&self, root: Mfn, va: u64) -> Option<(Mfn, usize)> {
        let mut table = root;
        for level in [Level::L4, Level::L3, Level::L2] {
            if self.memory.owner(table) == Owner::NotRam {
                return None;
            }
            let pte =
                Pte::from_bits(self.platform.frame(table).get(level.index(va))?.load(Ordering::Relaxed));
            if !pte.is_present() || pte.flags().contains(PteFlags::PAT_OR_LARGE) {
                return None;
            }
            table = pte.mfn();
        }
        Some((table, Level::L1.index(va)))
    }

    // ── pins and roots ──

    /// Makes a table of `owner` stay one until it is unpinned.
    pub fn pin(
        &self,
        mfn: Mfn,
        level: Level,
        owner: DomId,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<(), Stop> {
        let page = self.memory.get_page(mfn, owner).ok_or(Failure::Invalid)?;
        self.get_type(mfn, level.kind(), rights, budget)?;
        if self.memory.type_step(mfn, Event::Pin).is_err() {
            // Pinned before: so this reference is not the last, and giving it back is constant work.
            self.memory.put_type_parking(mfn);
            return Err(Failure::Invalid.into());
        }
        page.into_pte();
        Ok(())
    }

    /// Takes a pin back. The table goes if nothing else refers to it.
    pub fn unpin(&self, mfn: Mfn, owner: DomId, budget: &mut Budget) -> Result<Option<Unfinished>, Failure> {
        let page = self.memory.get_page(mfn, owner).ok_or(Failure::Invalid)?;
        self.memory.type_step(mfn, Event::Unpin).map_err(|_| Failure::Invalid)?;
        let unfinished = self.release_stored(mfn, budget).err();
        drop(page);
        Ok(unfinished)
    }

    /// Replaces a root that a vCPU holds: takes the new one's references before it gives the old one's back. Loading it is
    /// the caller's, between the two if the old root is in force here: `load` is called with the new root.
    pub fn replace_root(
        &self,
        slot: &mut Option<Mfn>,
        new: Option<Mfn>,
        owner: DomId,
        load: impl FnOnce(),
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<Option<Unfinished>, Stop> {
        if *slot == new {
            load();
            return Ok(None);
        }
        let taken = match new {
            Some(mfn) => Some(self.get_typed::<L4>(mfn, owner, rights, budget)?.into_pte()),
            None => None,
        };
        let old = core::mem::replace(slot, taken);
        load();
        Ok(old.and_then(|old| self.release_stored(old, budget).err()))
    }
}

/// What the entry is expected to hold when it is written.
fn expected(word: &AtomicU64, store: Store) -> Pte {
    match store {
        Store::IfEqual(old) => old,
        _ => Pte::from_bits(word.load(Ordering::Relaxed)),
    }
}

/// Writes an entry, before everything that looks where it may be cached (`tlb_clock` and its models), and returns what it held; `Err` is what it holds instead of what [`Store::IfEqual`] expected.
fn write(word: &AtomicU64, new: Pte, store: Store) -> Result<Pte, Pte> {
    let bits = match store {
        Store::Plain => Ok(word.swap(new.bits(), Ordering::SeqCst)),
        Store::PreserveAccessedDirty => {
            let keep = PteFlags::ACCESSED.union(PteFlags::DIRTY).bits();
            word.fetch_update(Ordering::SeqCst, Ordering::Acquire, |old| Some(new.bits() | old & keep))
        }
        Store::IfEqual(old) => {
            word.compare_exchange(old.bits(), new.bits(), Ordering::SeqCst, Ordering::Acquire)
        }
    };
    bits.map(Pte::from_bits).map_err(Pte::from_bits)
}

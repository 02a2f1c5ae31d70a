//! Making a frame a page table, and unmaking it, in steps that can stop anywhere.
//!
//! Both walk the entries in order, up or down, and keep in the record how many entries hold references. Recursion goes as
//! deep as page tables do (four levels). An operation that runs out of budget leaves each table on its way *parked*; see
//! [`page_info`](super::page_info) for why that is safe whoever comes next.

use core::sync::atomic::Ordering;

use hypercall_abi::{DomId, Mfn};

use super::frames::{Memory, Owner};
use super::mutants::Mutant;
use super::page_info::{ENTRIES, Event, Failure, Refusal, Work};
use super::page_kind::{Kind, Level};
use super::pte::{Pte, PteFlags};
use super::tlb_debt::TlbDebt;
use crate::hypercall::{Budget, Preempted};
use crate::page_ref::{FrameKind, PageRef, TypedRef, Writable};
use crate::platform::Platform;
use crate::sync;
use crate::trap::descriptor;

/// First L4 slot that is the hypervisor's.
pub const FIRST_HYPERVISOR_SLOT: usize = 256;
/// First L4 slot behind them.
pub const END_HYPERVISOR_SLOTS: usize = 272;

/// L1 entries that one step of a budget pays for.
const L1_ENTRIES_PER_STEP: u32 = 64;

/// Why an operation on page tables did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest asked for what it may not have.
    Failed(Failure),
    /// The budget is spent. What was done is kept; the same operation goes on from there.
    Preempted,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failed(failure)
    }
}

impl From<Preempted> for Stop {
    fn from(_: Preempted) -> Stop {
        Stop::Preempted
    }
}

/// Giving a table back ran out of budget: the frame is parked and finishes when somebody helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "somebody should finish what was left"]
pub struct Unfinished(pub Mfn);

/// What mappings of memory that is not the domain's own RAM depend on.
pub trait MapRights {
    /// Whether `domain` may map this frame, which is no RAM.
    fn may_map_io(&self, domain: DomId, mfn: Mfn) -> bool;
    /// Whether `domain` may choose cache attributes.
    fn may_choose_caching(&self, domain: DomId) -> bool;
}

/// Which child that a parked table names is helped first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    /// It names none.
    Nothing,
    /// One of a level below.
    Below,
    /// That, or a linear table of its own level.
    BelowOrLinear,
}

impl Follow {
    fn if_any(self, child: bool) -> Follow {
        if child { self } else { Follow::Nothing }
    }
}

/// Page-table work on one machine: the accounting together with the memory it speaks of.
pub struct Pager<'a, P: Platform> {
    /// The accounting.
    pub memory: &'a Memory,
    /// The machine.
    pub platform: &'a P,
}

impl<P: Platform> Clone for Pager<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<P: Platform> Copy for Pager<'_, P> {}

/// The references of an L1 entry: to a frame, with or without the right to write it. Dropping it gives them back.
pub(super) enum EntryRef<'a> {
    /// Not present, or memory that is not counted.
    Nothing,
    /// A read-only mapping.
    Reads(PageRef<'a>),
    /// A writable mapping.
    Writes(TypedRef<'a, Writable>),
}

impl<'a> EntryRef<'a> {
    /// The references stay with the entry that was just written.
    pub(super) fn into_pte(self) {
        match self {
            EntryRef::Nothing => {}
            EntryRef::Reads(page) => {
                page.into_pte();
            }
            EntryRef::Writes(page) => {
                page.into_pte();
            }
        }
    }

    /// The references of an entry that has just left its table.
    pub(super) fn from_pte(memory: &'a Memory, pte: Pte) -> EntryRef<'a> {
        if !pte.is_present() || memory.owner(pte.mfn()) == Owner::NotRam {
            EntryRef::Nothing
        } else if pte.is_writable() {
            EntryRef::Writes(TypedRef::from_pte(memory, pte.mfn()))
        } else {
            EntryRef::Reads(PageRef::from_pte(memory, pte.mfn()))
        }
    }
}

impl<'a, P: Platform> Pager<'a, P> {
    /// Pays a flush.
    pub fn pay(&self, debt: TlbDebt) {
        self.memory.settle(debt, self.platform);
    }

    /// The entry as it goes into a table of this machine.
    pub(super) fn adjust(&self, pte: Pte, level: Level) -> Pte {
        let pte = pte.adjusted(level);
        if pte.is_present() && !self.platform.has_no_execute() {
            pte.without(PteFlags::NO_EXECUTE)
        } else {
            pte
        }
    }

    // ── typed references ──

    /// Takes a general and a type reference to a frame of `owner`, checking its content if it is the first.
    pub fn get_typed<K: FrameKind>(
        &self,
        mfn: Mfn,
        owner: DomId,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<TypedRef<'a, K>, Stop> {
        let page = self.memory.get_page(mfn, owner).ok_or(Failure::Invalid)?;
        self.get_type(mfn, K::KIND, rights, budget)?;
        Ok(TypedRef::from_pte(self.memory, page.into_pte()))
    }

    /// Gives such a reference back, tearing a table down if it was the last.
    pub fn release<K: FrameKind>(
        &self,
        page: TypedRef<'a, K>,
        budget: &mut Budget,
    ) -> Result<(), Unfinished> {
        self.release_stored(page.into_pte(), budget)
    }

    /// Gives back a general and a type reference that were stored somewhere with `into_pte`, and are there no more.
    pub fn release_stored(&self, mfn: Mfn, budget: &mut Budget) -> Result<(), Unfinished> {
        let result = self.put_type(mfn, false, budget);
        self.memory.put_general(mfn);
        result.map_err(|Preempted| Unfinished(mfn))
    }

    /// Takes a type reference. The caller holds a general one, which stays its own.
    pub(super) fn get_type(
        &self,
        mfn: Mfn,
        kind: Kind,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<(), Stop> {
        loop {
            let effects = match self.memory.type_step(mfn, Event::Get(kind)) {
                Ok(effects) => effects,
                Err(Refusal::Wait) => {
                    sync::relax();
                    continue;
                }
                Err(_) => return Err(Failure::Invalid.into()),
            };
            if let Some((_, stamp)) = effects.retyped {
                // Before anybody relies on the new kind: another CPU could still write the frame while it is checked.
                self.pay(self.memory.owed_since(stamp));
            }
            match effects.work {
                None => return Ok(()),
                Some(Work::Up { progress, .. }) => {
                    return self.validate(mfn, kind, progress, effects.resumed, rights, budget);
                }
                Some(Work::Down { progress, child, failure, .. }) => {
                    self.empty(
                        mfn,
                        kind,
                        progress,
                        Follow::BelowOrLinear.if_any(child),
                        effects.resumed,
                        budget,
                    )?;
                    if let Some(failure) = failure {
                        return Err(failure.into());
                    }
                }
            }
        }
    }

    /// Gives a type reference back. On `Err` the frame is parked, holding a reference of its own: the caller's type
    /// reference is gone all the same.
    pub(super) fn put_type(&self, mfn: Mfn, linear: bool, budget: &mut Budget) -> Result<(), Preempted> {
        let effects = self.memory.put_type_step(mfn, linear);
        match effects.work {
            Some(Work::Down { kind, progress, child, .. }) => {
                self.empty(mfn, kind, progress, Follow::BelowOrLinear.if_any(child), effects.resumed, budget)
            }
            _ => Ok(()),
        }
    }

    /// Goes on emptying a parked table, if `mfn` still is one, whosever it is by now. Nothing depends on it but progress.
    pub fn help(&self, mfn: Mfn, budget: &mut Budget) -> Result<(), Unfinished> {
        self.take_over(mfn, Event::Help, Follow::BelowOrLinear, budget)
    }

    /// Helps the table that a parked one of `level` names as its child, unless that would go on deeper than tables are
    /// nested. The name is a hint: a guest can have made any other table of that frame meanwhile, and of the one that names
    /// in turn, so that following them all would exhaust the stack. A table that is not helped stays parked until
    /// somebody needs it.
    fn help_child(
        &self,
        mfn: Mfn,
        level: Level,
        follow: Follow,
        budget: &mut Budget,
    ) -> Result<(), Unfinished> {
        match self.memory.type_word(mfn).and_then(|word| word.kind().level()) {
            Some(below) if below < level => self.help(mfn, budget),
            // A linear table, which has no linear entries itself.
            Some(same) if same == level && follow == Follow::BelowOrLinear => {
                self.take_over(mfn, Event::Help, Follow::Below, budget)
            }
            _ => Ok(()),
        }
    }

    /// Empties a table that is parked in either direction: for teardown.
    pub(super) fn abandon(&self, mfn: Mfn, budget: &mut Budget) -> Result<(), Unfinished> {
        self.take_over(mfn, Event::Abandon, Follow::BelowOrLinear, budget)
    }

    fn take_over(
        &self,
        mfn: Mfn,
        event: Event,
        follow: Follow,
        budget: &mut Budget,
    ) -> Result<(), Unfinished> {
        let Some(page) = self.memory.get_any_page(mfn) else { return Ok(()) };
        let Ok(effects) = self.memory.type_step(mfn, event) else { return Ok(()) };
        if let Some(Work::Down { kind, progress, child, .. }) = effects.work {
            let done = self.empty(mfn, kind, progress, follow.if_any(child), effects.resumed, budget);
            drop(page);
            return done.map_err(|Preempted| Unfinished(mfn));
        }
        Ok(())
    }

    // ── up ──

    fn validate(
        &self,
        mfn: Mfn,
        kind: Kind,
        from: u16,
        resumed: bool,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<(), Stop> {
        let outcome = match kind.level() {
            Some(level) => self.check_entries(mfn, level, from, rights, budget),
            None => self.check_descriptors(mfn).map_err(|failure| (0, failure.into())),
        };
        match outcome {
            Ok(()) => {
                if kind == Kind::L4 {
                    self.platform.fill_hypervisor_slots(mfn);
                }
                self.memory.sure_step(mfn, Event::Done);
                if resumed {
                    self.memory.put_general(mfn);
                }
                Ok(())
            }
            Err((progress, Stop::Preempted)) => {
                self.park(mfn, progress, false, resumed);
                Err(Stop::Preempted)
            }
            Err((progress, Stop::Failed(failure))) => {
                self.memory.sure_step(mfn, Event::Fail { progress, failure });
                self.empty(mfn, kind, progress, Follow::Nothing, resumed, budget)?;
                Err(failure.into())
            }
        }
    }

    /// Takes references for the entries from `from` up. An error says how many entries hold theirs.
    fn check_entries(
        &self,
        mfn: Mfn,
        level: Level,
        from: u16,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<(), (u16, Stop)> {
        let owner = DomId::new(self.memory.owner_number(mfn));
        let mut unpaid = 0;
        let words = self.platform.frame(mfn);
        let rest = words.get(usize::from(from)..).unwrap_or_default();
        for (offset, word) in rest.iter().enumerate() {
            let pte = Pte::from_bits(word.load(Ordering::Relaxed));
            if !pte.is_present() {
                continue;
            }
            // Below 512.
            let index = from.wrapping_add(offset as u16);
            if is_hypervisor_slot(level, usize::from(index)) {
                continue;
            }
            if level == Level::L1
                && let Some(adjusted) = self.acquire_plain(pte, owner)
            {
                if adjusted != pte {
                    word.store(adjusted.bits(), Ordering::Relaxed);
                }
                unpaid += 1;
                if unpaid % L1_ENTRIES_PER_STEP == 0 && budget.step().is_err() && index + 1 < ENTRIES {
                    return Err((index + 1, Stop::Preempted));
                }
                continue;
            }
            let adjusted = match level.child() {
                None => self.acquire_l1(pte, owner, owner, rights).map(|(refs, adjusted)| {
                    refs.into_pte();
                    adjusted
                }),
                Some(child) => self.acquire_table(pte, mfn, level, child, owner, rights, budget),
            }
            .map_err(|stop| (index, stop))?;
            if adjusted != pte {
                word.store(adjusted.bits(), Ordering::Relaxed);
            }
            unpaid += 1;
            if (level != Level::L1 || unpaid % L1_ENTRIES_PER_STEP == 0)
                && budget.step().is_err()
                && index + 1 < ENTRIES
            {
                return Err((index + 1, Stop::Preempted));
            }
        }
        Ok(())
    }

    /// What nearly all L1 entries are: a present, writable mapping of plain memory of `owner`'s, without a choice of caching. Takes its
    /// references and returns it as it is to be stored; `None`, and nothing held, for every other.
    #[inline(always)]
    fn acquire_plain(&self, pte: Pte, owner: DomId) -> Option<Pte> {
        if !pte.is_writable()
            || pte.flags().intersects(PteFlags::CACHE)
            || pte.check(Level::L1, false).is_err()
        {
            return None;
        }
        let pte = self.adjust(pte, Level::L1);
        self.memory.get_plain_writable(pte.mfn(), owner).then_some(pte)
    }

    /// Gives back what an entry as by [`Pager::acquire_plain`] holds; false, and nothing done, for every other.
    #[inline(always)]
    fn put_plain(&self, pte: Pte) -> bool {
        // A writable entry leads to RAM in use as writable, or to memory that is not counted and has no word of this kind.
        pte.is_writable() && self.memory.put_plain_writable(pte.mfn())
    }

    /// Checks a present L1 entry for a table of `table_owner`, naming a frame as one of `frame_owner`'s, and takes the
    /// references it needs. Returns them with the entry as it is to be stored.
    pub(super) fn acquire_l1(
        &self,
        pte: Pte,
        table_owner: DomId,
        frame_owner: DomId,
        rights: &impl MapRights,
    ) -> Result<(EntryRef<'a>, Pte), Stop> {
        if pte.check(Level::L1, false).is_err() {
            pte.check(Level::L1, rights.may_choose_caching(table_owner)).map_err(|_| Failure::Invalid)?;
        }
        let pte = self.adjust(pte, Level::L1);
        let mfn = pte.mfn();
        let owner = self.memory.owner(mfn);
        if owner == Owner::NotRam {
            return self.acquire_io(pte, table_owner, frame_owner, rights);
        }
        let page = self.memory.get_page(mfn, frame_owner).ok_or(Failure::Busy)?;
        let refs = if pte.is_writable() && !self.memory.mutants().has(Mutant::SkippedTypeCheck) {
            match page.typed::<Writable>() {
                Ok((typed, debt)) => {
                    // A former table that becomes writable: stale translations *through* it must go.
                    self.pay(debt);
                    EntryRef::Writes(typed)
                }
                Err((_, Refusal::Wait)) => return Err(Failure::Busy.into()),
                Err(_) => return Err(Failure::Busy.into()),
            }
        } else {
            EntryRef::Reads(page)
        };
        if pte.flags().intersects(PteFlags::CACHE) && matches!(owner, Owner::Hypervisor(_)) {
            return Err(Failure::Access.into());
        }
        Ok((refs, pte))
    }

    /// Device memory is not counted. Cacheable mappings of it are turned uncacheable.
    fn acquire_io(
        &self,
        pte: Pte,
        table_owner: DomId,
        frame_owner: DomId,
        rights: &impl MapRights,
    ) -> Result<(EntryRef<'a>, Pte), Stop> {
        let asker = if frame_owner == DomId::IO { table_owner } else { frame_owner };
        if !rights.may_map_io(asker, pte.mfn()) || !rights.may_map_io(table_owner, pte.mfn()) {
            // The all-ones frame number is what guests write for "no frame".
            let none = pte.bits() & super::pte::FRAME_MASK == super::pte::FRAME_MASK;
            return Err(if none { Failure::Invalid } else { Failure::Permission }.into());
        }
        let cache = pte.flags().intersection(PteFlags::CACHE);
        let stored = if cache == PteFlags::empty() {
            pte.with(PteFlags::NO_CACHE.union(PteFlags::WRITE_THROUGH))
        } else if cache == PteFlags::WRITE_THROUGH {
            pte.with(PteFlags::NO_CACHE)
        } else if cache == PteFlags::WRITE_THROUGH.union(PteFlags::PAT_OR_LARGE) {
            pte.with(PteFlags::NO_CACHE).without(PteFlags::PAT_OR_LARGE)
        } else {
            pte
        };
        Ok((EntryRef::Nothing, stored))
    }

    /// Checks a present entry of an L2, L3 or L4 table and takes its references: to a table one level down, or to another
    /// table of the same level as a linear page table. The caller works on `table` or holds its lock.
    #[expect(clippy::too_many_arguments, reason = "one internal function with two callers")]
    pub(super) fn acquire_table(
        &self,
        pte: Pte,
        table: Mfn,
        level: Level,
        child: Kind,
        owner: DomId,
        rights: &impl MapRights,
        budget: &mut Budget,
    ) -> Result<Pte, Stop> {
        pte.check(level, false).map_err(|_| Failure::Invalid)?;
        let mfn = pte.mfn();
        if mfn == table {
            // A table that maps itself gives read access only, and needs no count: it goes with the table.
            return if pte.is_writable() {
                Err(Failure::Invalid.into())
            } else {
                Ok(self.adjust(pte, level))
            };
        }
        let page = self.memory.get_page(mfn, owner).ok_or(Failure::Invalid)?;
        match self.get_type(mfn, child, rights, budget) {
            Ok(()) => {}
            Err(Stop::Failed(Failure::Invalid)) if !pte.is_writable() => {
                self.acquire_linear(mfn, table, level)?
            }
            Err(stop) => return Err(stop),
        }
        page.into_pte();
        Ok(self.adjust(pte, level))
    }

    /// Takes a type reference to another table of the same level, already in use. No chains: a table with linear entries is
    /// not itself the target of one, so references cannot form a cycle that would keep tables alive for ever.
    fn acquire_linear(&self, mfn: Mfn, table: Mfn, level: Level) -> Result<(), Stop> {
        self.memory.type_step(table, Event::LinearEntryAdded).map_err(|_| Failure::Invalid)?;
        if self.memory.type_step(mfn, Event::GetLinear(level.kind())).is_err() {
            self.memory.sure_step(table, Event::LinearEntryGone);
            return Err(Failure::Invalid.into());
        }
        Ok(())
    }

    fn check_descriptors(&self, mfn: Mfn) -> Result<(), Failure> {
        for word in self.platform.frame(mfn) {
            let raw = word.load(Ordering::Relaxed);
            let safe = descriptor::sanitise(raw).ok_or(Failure::Invalid)?;
            if safe != raw {
                word.store(safe, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    // ── down ──

    /// Gives back the references of the entries below `progress`.
    fn empty(
        &self,
        mfn: Mfn,
        kind: Kind,
        progress: u16,
        child: Follow,
        resumed: bool,
        budget: &mut Budget,
    ) -> Result<(), Preempted> {
        if let Some(level) = kind.level() {
            let words = self.platform.frame(mfn);
            let entry = |index: u16| {
                words
                    .get(usize::from(index))
                    .map_or(Pte::EMPTY, |w| Pte::from_bits(w.load(Ordering::Relaxed)))
            };
            if child != Follow::Nothing
                && self.help_child(entry(progress).mfn(), level, child, budget).is_err()
            {
                self.park(mfn, progress, true, resumed);
                return Err(Preempted);
            }
            let mut unpaid = 0;
            let below = words.get(..usize::from(progress)).unwrap_or_default();
            for (index, word) in below.iter().enumerate().rev() {
                let pte = Pte::from_bits(word.load(Ordering::Relaxed));
                if !pte.is_present() || is_hypervisor_slot(level, index) {
                    continue;
                }
                let progress = index as u16;
                let plain = level == Level::L1 && self.put_plain(pte);
                if !plain && self.put_entry(pte, mfn, level, budget).is_err() {
                    self.park(mfn, progress, true, resumed);
                    return Err(Preempted);
                }
                unpaid += 1;
                if (level != Level::L1 || unpaid % L1_ENTRIES_PER_STEP == 0)
                    && budget.step().is_err()
                    && progress > 0
                {
                    self.park(mfn, progress, false, resumed);
                    return Err(Preempted);
                }
            }
            if level == Level::L4 {
                for word in words.iter().take(END_HYPERVISOR_SLOTS).skip(FIRST_HYPERVISOR_SLOT) {
                    word.store(0, Ordering::Relaxed);
                }
            }
        }
        self.memory.sure_step(mfn, Event::Emptied { stamp: self.memory.clock().now() });
        if resumed {
            self.memory.put_general(mfn);
        }
        Ok(())
    }

    /// Gives back the references of one entry that is no longer in force in `table`. On `Err` its table is left parked.
    pub(super) fn put_entry(
        &self,
        pte: Pte,
        table: Mfn,
        level: Level,
        budget: &mut Budget,
    ) -> Result<(), Unfinished> {
        if !pte.is_present() {
            return Ok(());
        }
        if level == Level::L1 {
            drop(EntryRef::from_pte(self.memory, pte));
            return Ok(());
        }
        let mfn = pte.mfn();
        if mfn == table {
            return Ok(());
        }
        // The kind cannot change while the entry's reference is counted.
        let linear = self.memory.type_word(mfn).is_some_and(|word| word.kind() == level.kind());
        if linear {
            self.memory.sure_step(table, Event::LinearEntryGone);
        }
        let result = self.put_type(mfn, linear, budget);
        self.memory.put_general(mfn);
        result.map_err(|Preempted| Unfinished(mfn))
    }

    /// Leaves the work for later. The record gets a general reference of its own, unless it was parked before and still
    /// has it.
    fn park(&self, mfn: Mfn, progress: u16, child: bool, resumed: bool) {
        if !resumed {
            self.memory.keep_general(mfn);
        }
        self.memory.sure_step(mfn, Event::Park { progress, child });
    }
}

/// Whether an entry is the hypervisor's, not the guest's.
pub(super) fn is_hypervisor_slot(level: Level, index: usize) -> bool {
    level == Level::L4 && (FIRST_HYPERVISOR_SLOT..END_HYPERVISOR_SLOTS).contains(&index)
}

impl Memory {
    /// Gives a type reference back as far as constant work can: a table whose last reference this was is left parked.
    pub(crate) fn put_type_parking(&self, mfn: Mfn) {
        let effects = self.put_type_step(mfn, false);
        if let Some(Work::Down { progress, child, .. }) = effects.work {
            self.keep_general(mfn);
            self.sure_step(mfn, Event::Park { progress, child });
        }
    }

    #[inline(always)]
    fn put_type_step(&self, mfn: Mfn, linear: bool) -> super::page_info::Effects {
        loop {
            match self.type_step_of_known(mfn, Event::Put { linear, stamp: self.clock().now() }) {
                Ok(effects) => return effects,
                Err(Refusal::Wait) => sync::relax(),
                Err(why) => panic!("frame {mfn:?}: put refused: {why:?}, {:?}", self.type_word(mfn)),
            }
        }
    }
}

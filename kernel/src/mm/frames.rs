//! All frames of RAM: their records, who owns them, and which are free.
//!
//! A frame is in one of these places, and its links belong to that place:
//!
//! ```text
//!   free lists ──allocate──▶ (a caller's hands) ──assign──▶ on the list of its owner, ALLOCATED
//!       ▲                                                        │ release: ALLOCATED goes
//!       │                                                        ▼
//!       │                                            on the list, kept by others' references
//!       │                                                        │ the last general reference goes
//!       │                                                        ▼
//!       └──── drained: TLB debt paid, off the list ◀──── on the list, in quarantine
//! ```
//!
//! Teardown of a dying owner has a shorter way for frames that nobody else refers to: they leave the list at once and are freed
//! when the debt of all that were taken together is paid.
//!
//! * The general count of a free or quarantined frame is zero, so nobody can get a reference to it.
//! * ALLOCATED stands for one general reference: the owner's, whether it maps the frame or not.
//! * A frame is charged to its owner until it is drained: giving memory back while keeping it mapped gains nothing.
//! * Free frames are unowned. DIRTY says that somebody has used a frame: it is scrubbed before the next owner sees it. So
//!   is all RAM at boot: firmware and loader leave things in what they say is free. Idle CPUs do that ahead of time.
//! * What one domain did with a frame comes before what the next one does: `models` shows which orders of accesses that takes.
//! * Dropping a reference is constant work and takes no lock: the quarantine is a chain that anybody may push to, linked
//!   through the type words, which nobody can step while there is no reference. Draining it is done in bounded portions.

use core::ops::Range;

use arrayvec::ArrayVec;
use hypercall_abi::memory::E820Entry;
use hypercall_abi::{DomId, Mfn};

use super::firmware_ram::{FirmwareRam, Full};
use super::m2p::{self, M2p};
use super::mutants::{Mutant, Mutants};
use super::page_info::{Effects, Event, Refusal, Stamp, TypeWord, step, step_of_known};
use super::tlb_clock::TlbClock;
use super::tlb_debt::TlbDebt;
use crate::page_ref::PageRef;
use crate::platform::Platform;
use crate::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{RankedMutex, rank};

/// Largest order of a block the allocator keeps: 4 MiB.
pub const MAX_ORDER: u32 = 10;
const ORDERS: usize = MAX_ORDER as usize + 1;

const NIL: u32 = u32::MAX;

/// Frames that teardown takes and scrubs together, and frames among which it looks for page tables: each as much as one step of a budget
/// may be (`conf-bounds`).
const SIFTED: usize = 24;
const SEARCHED: usize = 256;
/// Frames that an idle CPU scrubs before it looks whether it is wanted; a power of two.
const SCRUBBED_IDLY: u64 = 16;
/// Frames that nobody has had yet and that come to the free lists together; a power of two.
const BROUGHT_IN: u64 = 64;
/// Frames that teardown has taken and not yet freed.
pub(super) type Retired = ArrayVec<Mfn, SIFTED>;

const ALLOCATED: u32 = 1 << 31;
const COUNT: u32 = ALLOCATED - 1;

const OWNER_MASK: u32 = 0xffff;
const RAM: u32 = 1 << 16;
const HYPERVISOR_PAGE: u32 = 1 << 17;
const DIRTY: u32 = 1 << 18;
const QUARANTINED: u32 = 1 << 19;
const FREE_HEAD: u32 = 1 << 20;
/// On its owner's second list: the owner's teardown has done its part, the rest is with those who refer to it.
const GIVEN_UP: u32 = 1 << 21;
const ORDER_SHIFT: u32 = 24;
/// Owner number of frames that no domain owns (DOMID_INVALID).
const NOBODY: u32 = 0x7ff4;

/// What is kept about each frame: 24 bytes.
#[repr(C)]
pub struct FrameRecord {
    /// See [`TypeWord`].
    word: AtomicU64,
    /// General references, with ALLOCATED as the top bit.
    count: AtomicU32,
    /// Owner's number and flags. Written only while the count is zero, or (DIRTY) by nobody who could disagree.
    owner: AtomicU32,
    /// Links of the list the frame is in: free or its owner's. Protected by that list's lock.
    next: AtomicU32,
    prev: AtomicU32,
}

#[cfg(not(all(loom, test)))]
const _: () = assert!(size_of::<FrameRecord>() == 24);

impl FrameRecord {
    /// The record of a frame that is not RAM: nothing can be done with it.
    pub fn new() -> FrameRecord {
        FrameRecord {
            word: AtomicU64::new(TypeWord::NEW.bits()),
            count: AtomicU32::new(0),
            owner: AtomicU32::new(NOBODY),
            next: AtomicU32::new(NIL),
            prev: AtomicU32::new(NIL),
        }
    }

    fn flags(&self) -> u32 {
        self.owner.load(Ordering::Acquire)
    }

    fn set_owner(&self, owner: u32, flags: u32) {
        let keep = self.flags() & (RAM | DIRTY);
        self.owner.store(keep | flags | owner, Ordering::Release);
    }
}

impl Default for FrameRecord {
    fn default() -> Self {
        FrameRecord::new()
    }
}

/// All that the hypervisor knows about RAM.
pub struct Memory {
    records: &'static [FrameRecord],
    m2p: M2p,
    clock: TlbClock,
    free: RankedMutex<FreeLists, { rank::FREE_FRAMES }>,
    /// Chain of frames without references whose TLB debt may still be unpaid. Anybody pushes; who holds the lock of the
    /// free lists pops.
    quarantine: AtomicU32,
    quarantined: AtomicUsize,
    /// Frames that are free and not on the free lists: nobody has had them since power-on. Changed under the lock of those.
    unused: AtomicUsize,
    machine_map: spin::Once<&'static [E820Entry]>,
    m2p_frame: spin::Once<Mfn>,
    mutants: Mutants,
}

struct FreeLists {
    heads: [u32; ORDERS],
    frames: usize,
    firmware_ram: FirmwareRam,
    /// Frames that idle CPUs have taken out of `firmware_ram` and not yet put on the lists.
    being_scrubbed: usize,
}

/// Who owns a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// No RAM: a device, or nothing at all.
    NotRam,
    /// Free, in quarantine, or the hypervisor's alone.
    Nobody,
    /// A domain's memory.
    Domain(DomId),
    /// The hypervisor's, shared with a domain (shared_info, grant frames).
    Hypervisor(DomId),
}

impl Memory {
    /// Knows `records.len()` frames, none of them RAM yet. `m2p` is the table that guests can read.
    pub fn new(records: &'static [FrameRecord], m2p: &'static [core::sync::atomic::AtomicU64]) -> Memory {
        Memory {
            records,
            m2p: M2p::new(m2p),
            clock: TlbClock::new(),
            free: RankedMutex::new(FreeLists {
                heads: [NIL; ORDERS],
                frames: 0,
                firmware_ram: FirmwareRam::default(),
                being_scrubbed: 0,
            }),
            quarantine: AtomicU32::new(NIL),
            quarantined: AtomicUsize::new(0),
            unused: AtomicUsize::new(0),
            machine_map: spin::Once::new(),
            m2p_frame: spin::Once::new(),
            mutants: Mutants::default(),
        }
    }

    /// Notes the firmware's memory map, which dom0 may ask for. The first call counts.
    pub fn set_machine_map(&self, map: &'static [E820Entry]) {
        self.machine_map.call_once(|| map);
    }

    /// The firmware's memory map; empty until it is set.
    pub fn machine_map(&self) -> &'static [E820Entry] {
        self.machine_map.get().copied().unwrap_or_default()
    }

    /// Notes the `count` contiguous frames, declared as RAM, that hold the machine-to-physical table. From then on they are pages
    /// of `DOMID_XEN` that can be mapped for reading. The first call counts.
    pub fn set_m2p_frames(&self, first: Mfn, count: u64) {
        self.m2p_frame.call_once(|| {
            for mfn in (first.get()..first.get().saturating_add(count)).map(Mfn::new) {
                let record = self.record(mfn);
                record.set_owner(u32::from(DomId::XEN.get()), HYPERVISOR_PAGE);
                record.word.store(TypeWord::READ_ONLY_PAGE.bits(), Ordering::Release);
                record.count.store(ALLOCATED | 1, Ordering::Release);
            }
            first
        });
    }

    /// See [`Memory::set_m2p_frames`].
    pub fn m2p_frame(&self) -> Option<Mfn> {
        self.m2p_frame.get().copied()
    }

    /// Declares frames as RAM. Boot does this for all RAM of the memory map, its own included, before any domain exists:
    /// what is not declared counts as device memory.
    pub fn declare_ram(&self, first: Mfn, count: u64) {
        for mfn in first.get()..first.get().saturating_add(count) {
            if let Some(record) = self.records.get(mfn as usize) {
                record.owner.fetch_or(RAM, Ordering::Release);
            }
        }
    }

    /// Makes declared RAM free, to be scrubbed before its first owner sees it: firmware and loader have written to some of it.
    ///
    /// Each frame may be given once.
    pub fn add_free(&self, first: Mfn, count: u64) {
        let end = first.get().saturating_add(count).min(self.records.len() as u64);
        let frames = first.get()..end;
        let count = end.saturating_sub(first.get()) as usize;
        let mut free = self.free.lock();
        match free.firmware_ram.add(frames.clone()) {
            Ok(()) => _ = self.unused.fetch_add(count, Ordering::Relaxed),
            Err(Full) => self.insert_dirty(&mut free, frames),
        }
    }

    /// Puts frames on the free lists, to be scrubbed when they are given out.
    fn insert_dirty(&self, free: &mut FreeLists, frames: Range<u64>) {
        for mfn in frames.clone() {
            self.record(Mfn::new(mfn)).owner.fetch_or(DIRTY, Ordering::Release);
        }
        self.insert_range(free, frames.start, frames.end - frames.start);
    }

    /// Scrubs a few frames that nobody has had yet and puts them on the free lists: for a CPU that has nothing else to do. False if there
    /// are none.
    pub fn scrub_idly<P: Platform>(&self, platform: &P) -> bool {
        if self.unused.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut free = self.free.lock();
        let Some(frames) = free.firmware_ram.take_some(SCRUBBED_IDLY, u64::MAX) else { return false };
        let count = (frames.end - frames.start) as usize;
        free.being_scrubbed += count;
        drop(free);
        for mfn in frames.clone() {
            platform.zero_frame(Mfn::new(mfn));
        }
        let mut free = self.free.lock();
        self.insert_range(&mut free, frames.start, count as u64);
        free.being_scrubbed -= count;
        self.unused.fetch_sub(count, Ordering::Relaxed);
        true
    }

    /// Whether another CPU has free frames that it puts on the free lists in a moment.
    pub(super) fn others_scrub(&self) -> bool {
        self.free.lock().being_scrubbed > 0
    }

    /// The machine-to-physical table.
    pub fn m2p(&self) -> &M2p {
        &self.m2p
    }

    /// The bug that a test has put in, none in an image.
    pub fn mutants(&self) -> &Mutants {
        &self.mutants
    }

    /// What is owed for a right that left the tables at `stamp`.
    pub fn owed_since(&self, stamp: Stamp) -> TlbDebt {
        if self.mutants.has(Mutant::MissedFlush) { TlbDebt::NONE } else { TlbDebt::since(stamp, &self.clock) }
    }

    /// The clock of complete TLB flushes.
    pub fn clock(&self) -> &TlbClock {
        &self.clock
    }

    /// One more than the highest frame number there is a record of.
    pub fn max_frame(&self) -> u64 {
        self.records.len() as u64
    }

    /// Frames that can be given out: free, or waiting in quarantine for their TLB debt.
    pub fn free_frames(&self) -> usize {
        let free = self.free.lock();
        free.frames + self.unused.load(Ordering::Relaxed) + self.quarantined.load(Ordering::Acquire)
    }

    /// Who owns `mfn`. Without a reference to the frame the answer may be out of date at once.
    #[inline(always)]
    pub fn owner(&self, mfn: Mfn) -> Owner {
        let Some(record) = self.records.get(mfn.get() as usize) else { return Owner::NotRam };
        let flags = record.flags();
        if flags & RAM == 0 {
            Owner::NotRam
        } else if flags & OWNER_MASK == NOBODY {
            Owner::Nobody
        } else if flags & HYPERVISOR_PAGE != 0 {
            Owner::Hypervisor(DomId::new((flags & OWNER_MASK) as u16))
        } else {
            Owner::Domain(DomId::new((flags & OWNER_MASK) as u16))
        }
    }

    /// The type word of `mfn`, for queries and reports.
    pub fn type_word(&self, mfn: Mfn) -> Option<TypeWord> {
        let record = self.records.get(mfn.get() as usize)?;
        Some(TypeWord::from_bits(record.word.load(Ordering::Acquire)))
    }

    /// General references of `mfn`, the allocation's own included, for queries and reports.
    pub fn general_count(&self, mfn: Mfn) -> u32 {
        self.records.get(mfn.get() as usize).map_or(0, |r| r.count.load(Ordering::Acquire) & COUNT)
    }

    /// Whether the allocation itself still holds a reference to `mfn`.
    pub fn is_allocated(&self, mfn: Mfn) -> bool {
        self.records.get(mfn.get() as usize).is_some_and(|r| r.count.load(Ordering::Acquire) & ALLOCATED != 0)
    }

    // ── general references ──

    /// Takes a general reference to a frame that `owner` owns. `None` when it is not a frame of RAM, not that domain's, or
    /// about to be freed.
    #[inline(always)]
    pub fn get_page(&self, mfn: Mfn, owner: DomId) -> Option<PageRef<'_>> {
        let page = self.get_any_page(mfn)?;
        (page.owner_number() == owner.get()).then_some(page)
    }

    /// Takes a general reference to a frame of any owner.
    pub fn get_any_page(&self, mfn: Mfn) -> Option<PageRef<'_>> {
        self.get_general(mfn).then(|| PageRef::from_count(self, mfn))
    }

    /// Takes back the reference that [`PageRef::into_pte`] stored somewhere, where it is no more.
    pub fn take_back(&self, mfn: Mfn) -> PageRef<'_> {
        PageRef::from_pte(self, mfn)
    }

    #[inline(always)]
    fn get_general(&self, mfn: Mfn) -> bool {
        let Some(record) = self.records.get(mfn.get() as usize) else { return false };
        record
            .count
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                // The top two counts stay free for references that a record takes for itself while it is parked.
                (count & COUNT != 0 && count & COUNT < COUNT - 2).then(|| count + 1)
            })
            .is_ok()
    }

    /// Takes the general reference that a record holds for itself while it is parked. The caller holds one already.
    pub(super) fn keep_general(&self, mfn: Mfn) {
        let before = self.record(mfn).count.fetch_add(1, Ordering::AcqRel);
        assert!(before & COUNT != 0 && before & COUNT < COUNT - 1, "frame {mfn:?}: no reference to keep");
    }

    /// Gives a general reference back: constant work. The last one sends the frame to the quarantine.
    #[inline(always)]
    pub(crate) fn put_general(&self, mfn: Mfn) {
        self.put_general_of(mfn, self.record(mfn));
    }

    #[inline(always)]
    fn put_general_of(&self, mfn: Mfn, record: &FrameRecord) {
        let before = record.count.fetch_sub(1, Ordering::AcqRel);
        assert!(before & COUNT != 0, "frame {mfn:?}: reference given back twice");
        if before & COUNT == 1 {
            assert!(before & ALLOCATED == 0, "frame {mfn:?}: the allocation's reference was given away");
            self.quarantine(mfn, record);
        }
    }

    pub(crate) fn owner_number(&self, mfn: Mfn) -> u16 {
        (self.record(mfn).flags() & OWNER_MASK) as u16
    }

    fn record(&self, mfn: Mfn) -> &FrameRecord {
        // A frame number that is held as a reference was once checked.
        self.records.get(mfn.get() as usize).expect("reference to a frame without a record")
    }

    // ── type words ──

    /// One atomic step of the type word of `mfn`.
    pub(crate) fn type_step(&self, mfn: Mfn, event: Event) -> Result<Effects, Refusal> {
        self.step_by(mfn, |word| step(word, event))
    }

    /// As [`Memory::type_step`], for callers that always have the same event and are called for each entry of a table.
    #[inline(always)]
    pub(crate) fn type_step_of_known(&self, mfn: Mfn, event: Event) -> Result<Effects, Refusal> {
        self.step_by(mfn, |word| step_of_known(word, event))
    }

    #[inline(always)]
    fn step_by(
        &self,
        mfn: Mfn,
        step: impl Fn(TypeWord) -> Result<(TypeWord, Effects), Refusal>,
    ) -> Result<Effects, Refusal> {
        let record = self.record(mfn);
        let mut word = record.word.load(Ordering::Acquire);
        loop {
            let (next, effects) = step(TypeWord::from_bits(word))?;
            match record.word.compare_exchange_weak(word, next.bits(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(effects),
                Err(now) => word = now,
            }
        }
    }

    /// A step that can only fail if the accounting is wrong: then the host stops, since isolation is no longer sure.
    pub(crate) fn sure_step(&self, mfn: Mfn, event: Event) -> Effects {
        match self.type_step(mfn, event) {
            Ok(effects) => effects,
            Err(why) => panic!("frame {mfn:?}: {event:?} refused: {why:?}, {:?}", self.type_word(mfn)),
        }
    }

    // ── both references of an entry that maps plain memory writable ──
    //
    // What each entry of an L1 table costs when it is checked and when it goes is mostly this, so both are written out here for the
    // common case. They are the same exchanges, in the same order, as by `PageRef` and `TypedRef`.

    /// Takes a general reference to a frame of `owner` and a type reference as a writable page, if it is plain memory that was never, or
    /// last, such a page. False when it is anything else: nothing is held then, and the long way says why.
    #[inline(always)]
    pub(super) fn get_plain_writable(&self, mfn: Mfn, owner: DomId) -> bool {
        let Some(record) = self.records.get(mfn.get() as usize) else { return false };
        let mut count = record.count.load(Ordering::Relaxed);
        loop {
            // As in `get_general`.
            if count & COUNT == 0 || count & COUNT >= COUNT - 2 {
                return false;
            }
            match record.count.compare_exchange_weak(count, count + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => count = now,
            }
        }
        if record.flags() & (OWNER_MASK | RAM | HYPERVISOR_PAGE) == u32::from(owner.get()) | RAM {
            let mut word = record.word.load(Ordering::Acquire);
            while let Some(next) = TypeWord::from_bits(word).plainly_writable() {
                match record.word.compare_exchange_weak(
                    word,
                    next.bits(),
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => return true,
                    Err(now) => word = now,
                }
            }
        }
        self.put_general(mfn);
        false
    }

    /// Gives back what [`Memory::get_plain_writable`] took, or the long way for such an entry. False when the frame's word is anything but
    /// that of a page in use as writable: nothing has changed then.
    #[inline(always)]
    pub(super) fn put_plain_writable(&self, mfn: Mfn) -> bool {
        let Some(record) = self.records.get(mfn.get() as usize) else { return false };
        if record.flags() & RAM == 0 {
            return false;
        }
        let mut word = record.word.load(Ordering::Acquire);
        loop {
            let Some(next) = TypeWord::from_bits(word).plainly_less_writable(self.clock.now()) else {
                return false;
            };
            match record.word.compare_exchange_weak(word, next.bits(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        self.put_general_of(mfn, record);
        true
    }

    // ── quarantine ──

    #[inline(never)]
    fn quarantine(&self, mfn: Mfn, record: &FrameRecord) {
        self.sure_step(mfn, Event::Retire { stamp: self.clock.now() });
        self.m2p.set(mfn, m2p::INVALID);
        record.owner.fetch_or(QUARANTINED | DIRTY, Ordering::AcqRel);
        self.quarantined.fetch_add(1, Ordering::AcqRel);
        let stamp = record.word.load(Ordering::Relaxed);
        let mut head = self.quarantine.load(Ordering::Acquire);
        loop {
            record.word.store(stamp | u64::from(head), Ordering::Relaxed);
            match self.quarantine.compare_exchange_weak(
                head,
                mfn.get() as u32,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Whether a frame waits in quarantine.
    #[inline]
    pub fn has_quarantined(&self) -> bool {
        self.quarantine.load(Ordering::Acquire) != NIL
    }

    /// Takes frames out of quarantine, as many as `drained` has room for, after paying what they owe.
    pub(super) fn pop_quarantined<P: Platform, const MOST: usize>(
        &self,
        platform: &P,
        drained: &mut ArrayVec<Drained, MOST>,
    ) {
        if self.quarantine.load(Ordering::Acquire) == NIL {
            return;
        }
        let mut debt = TlbDebt::NONE;
        {
            // Under the lock only one CPU pops, so the head cannot be popped and pushed again between load and exchange.
            let _one_at_a_time = self.free.lock();
            let mut head = self.quarantine.load(Ordering::Acquire);
            while head != NIL && !drained.is_full() {
                let mfn = Mfn::new(u64::from(head));
                let record = self.record(mfn);
                let word = record.word.load(Ordering::Acquire);
                match self.quarantine.compare_exchange_weak(
                    head,
                    word as u32,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => {
                        debt.merge(self.owed_since(TypeWord::from_bits(word).stamp()));
                        let flags = record.flags();
                        let owner =
                            (flags & HYPERVISOR_PAGE == 0).then(|| DomId::new((flags & OWNER_MASK) as u16));
                        drained.push(Drained { mfn, owner });
                        head = word as u32;
                    }
                    Err(now) => head = now,
                }
            }
        }
        // Without the lock: another CPU that waits for it could not answer a flush.
        self.settle(debt, platform);
    }

    /// Puts drained frames of one owner on the free lists. `pages` is the list of the owner, if there is one.
    pub(super) fn free_drained(&self, frames: &[Drained], mut pages: Option<&mut PageList>) {
        for frame in frames {
            let record = self.record(frame.mfn);
            if let Some(pages) = &mut pages {
                pages.remove(self, frame.mfn);
                pages.discharge(1);
            }
            record.set_owner(NOBODY, 0);
            record.word.store(TypeWord::NEW.bits(), Ordering::Release);
        }
        let mut free = self.free.lock();
        self.insert_frames(&mut free, frames, |frame| frame.mfn);
        self.quarantined.fetch_sub(frames.len(), Ordering::AcqRel);
    }

    // ── teardown of a dying owner ──

    /// Goes on with the frames of a dying domain, a bounded number of them. First it looks for page tables, for they refer to other
    /// frames; when they are gone, it takes the frames that only the owner refers to: they go to `retired`, which is empty before, and
    /// are no longer the owner's, but still charged to it. For the caller to pay the debt of, to scrub, and to free. What others refer to is given
    /// up by the owner, and freed when the last of them lets go.
    pub(super) fn sift(&self, pages: &mut PageList, retired: &mut Retired) -> Sifted {
        for _ in 0..SEARCHED {
            let Some(mfn) = pages.searched() else { break };
            let record = self.record(mfn);
            if self.is_table_at_work(record) {
                return Sifted::Table(mfn);
            }
            pages.search_on(record);
        }
        if pages.searched().is_some() {
            return Sifted::More;
        }
        for _ in 0..SIFTED {
            let Some(mfn) = pages.first() else { return Sifted::End };
            let record = self.record(mfn);
            // As in `steal`: without references nobody can come to have one.
            if record.count.compare_exchange(ALLOCATED | 1, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                pages.pop_first(self, record);
                self.m2p.set(mfn, m2p::INVALID);
                record.word.store(TypeWord::NEW.bits(), Ordering::Release);
                record.set_owner(NOBODY, DIRTY);
                retired.push(mfn);
                continue;
            }
            // Made one since: by who rules over the domain.
            if self.is_table_at_work(record) {
                return Sifted::Table(mfn);
            }
            pages.give_up(self, mfn);
            // One that is in quarantine already has nothing to release.
            if let Some(page) = self.get_any_page(mfn) {
                self.release(&page);
            }
        }
        Sifted::More
    }

    /// Whether a frame is a page table that refers to others without anybody else's doing: it is pinned or parked.
    fn is_table_at_work(&self, record: &FrameRecord) -> bool {
        let word = TypeWord::from_bits(record.word.load(Ordering::Acquire));
        word.is_pinned() || word.is_parked()
    }

    /// Scrubs what [`Memory::sift`] has taken from a domain. No translation to it is left.
    pub(super) fn scrub_retired<P: Platform>(&self, retired: &[Mfn], platform: &P) {
        for mfn in retired {
            platform.zero_frame(*mfn);
            self.record(*mfn).owner.fetch_and(!DIRTY, Ordering::AcqRel);
        }
    }

    /// Frees what [`Memory::sift`] has taken from a domain, whose list is `pages`. No translation to it is left.
    pub(super) fn free_retired(&self, retired: &[Mfn], pages: &mut PageList) {
        pages.discharge(retired.len() as u64);
        let mut free = self.free.lock();
        self.insert_frames(&mut free, retired, |mfn| *mfn);
    }

    /// Pays a debt.
    pub fn settle<P: Platform>(&self, debt: TlbDebt, platform: &P) {
        debt.pay(platform, &self.clock);
    }

    /// How many frames wait in quarantine.
    pub fn quarantined(&self) -> usize {
        self.quarantined.load(Ordering::Acquire)
    }

    // ── allocation ──

    /// Takes 2^order frames, aligned to their size, scrubbed if anybody has used them. They have no owner and no
    /// references: the caller assigns them or gives them back.
    pub fn allocate<P: Platform>(&self, order: u32, platform: &P) -> Option<Mfn> {
        self.allocate_below(order, u64::MAX, platform)
    }

    /// As [`Memory::allocate`], from frames below `limit`.
    pub fn allocate_below<P: Platform>(&self, order: u32, limit: u64, platform: &P) -> Option<Mfn> {
        let first = self.take_block(order, limit)?;
        for mfn in (u64::from(first)..u64::from(first) + (1 << order)).map(Mfn::new) {
            let record = self.record(mfn);
            if record.flags() & DIRTY != 0 {
                platform.zero_frame(mfn);
                record.owner.fetch_and(!DIRTY, Ordering::AcqRel);
            }
        }
        Some(Mfn::new(u64::from(first)))
    }

    /// Gives 2^order frames back that were never assigned since [`Memory::allocate`] or whose private use has ended.
    pub fn give_back(&self, first: Mfn, order: u32) {
        for mfn in (first.get()..first.get() + (1 << order)).map(Mfn::new) {
            let record = self.record(mfn);
            assert!(record.count.load(Ordering::Acquire) == 0, "frame {mfn:?} is in use");
            record.owner.fetch_or(DIRTY, Ordering::AcqRel);
        }
        let mut free = self.free.lock();
        self.insert_block(&mut free, first.get() as u32, order);
    }

    /// Makes an allocated frame the memory of a domain: on its list, with one reference. The domain was charged before.
    pub fn assign(&self, mfn: Mfn, domain: DomId, pages: &mut PageList) {
        let record = self.record(mfn);
        record.set_owner(u32::from(domain.get()), 0);
        record.word.store(TypeWord::NEW.bits(), Ordering::Release);
        pages.push(self, mfn);
        record.count.store(ALLOCATED | 1, Ordering::Release);
    }

    /// Makes an allocated frame a page of the hypervisor that `domain` may map, writable even: shared_info, grant frames.
    pub fn assign_hypervisor_page(&self, mfn: Mfn, domain: DomId) {
        let record = self.record(mfn);
        record.set_owner(u32::from(domain.get()), HYPERVISOR_PAGE);
        record.word.store(TypeWord::HYPERVISOR_PAGE.bits(), Ordering::Release);
        record.count.store(ALLOCATED | 1, Ordering::Release);
    }

    /// Ends the hypervisor's own use of such a page; it goes when the last mapping does.
    pub fn release_hypervisor_page(&self, mfn: Mfn) {
        let record = self.record(mfn);
        if record.flags() & HYPERVISOR_PAGE == 0
            || record.count.fetch_and(!ALLOCATED, Ordering::AcqRel) & ALLOCATED == 0
        {
            return;
        }
        self.sure_step(mfn, Event::Put { linear: false, stamp: self.clock.now() });
        self.put_general(mfn);
    }

    /// Keeps everybody from getting a reference to such a page, if nobody has one now. False otherwise: nothing has changed.
    pub fn withdraw_hypervisor_page(&self, mfn: Mfn) -> bool {
        let record = self.record(mfn);
        record.flags() & HYPERVISOR_PAGE != 0
            && record.count.compare_exchange(ALLOCATED | 1, 0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Takes [`Memory::withdraw_hypervisor_page`] back.
    pub fn restore_hypervisor_page(&self, mfn: Mfn) {
        let record = self.record(mfn);
        debug_assert!(record.flags() & HYPERVISOR_PAGE != 0 && record.count.load(Ordering::Relaxed) == 0);
        record.count.store(ALLOCATED | 1, Ordering::Release);
    }

    /// Ends the hypervisor's own use of a withdrawn page: it is free when no translation to it can be left.
    pub fn retire_hypervisor_page(&self, mfn: Mfn) {
        let record = self.record(mfn);
        debug_assert!(record.flags() & HYPERVISOR_PAGE != 0 && record.count.load(Ordering::Relaxed) == 0);
        self.sure_step(mfn, Event::Put { linear: false, stamp: self.clock.now() });
        self.quarantine(mfn, record);
    }

    /// Gives the owner's own reference back: the frame is freed when the last other reference goes. `page` keeps it until
    /// then. False when that was done before, or the frame is a page of the hypervisor.
    pub fn release(&self, page: &PageRef<'_>) -> bool {
        let record = self.record(page.mfn());
        if record.flags() & HYPERVISOR_PAGE != 0
            || record.count.fetch_and(!ALLOCATED, Ordering::AcqRel) & ALLOCATED == 0
        {
            return false;
        }
        self.put_general(page.mfn());
        true
    }

    /// Takes a frame away from its owner if the allocation's reference and the caller's are the only ones. The frame is
    /// then in the caller's hands, unowned, still charged, and as dirty as its owner left it; the debt is for translations
    /// that may be left. Fails with the reference given back when anybody else refers to it.
    pub fn steal(&self, page: PageRef<'_>, pages: &mut PageList) -> Option<(Mfn, TlbDebt)> {
        let mfn = page.mfn();
        let record = self.record(mfn);
        if record.flags() & HYPERVISOR_PAGE != 0
            || record.count.compare_exchange(ALLOCATED | 2, 0, Ordering::AcqRel, Ordering::Acquire).is_err()
        {
            return None;
        }
        page.forget();
        pages.remove(self, mfn);
        self.sure_step(mfn, Event::Retire { stamp: self.clock.now() });
        record.set_owner(NOBODY, DIRTY);
        // Read-only mappings leave no trace of when they went: assume just now.
        Some((mfn, TlbDebt::everywhere()))
    }

    // ── the buddy lists ──

    fn take_block(&self, order: u32, limit: u64) -> Option<u32> {
        if order > MAX_ORDER {
            return None;
        }
        let mut free = self.free.lock();
        loop {
            let have = (order..=MAX_ORDER)
                .find_map(|have| self.first_below(&free, have, order, limit).map(|mfn| (have, mfn)));
            if let Some((have, mfn)) = have {
                self.unlink_block(&mut free, mfn, have);
                // Give the upper halves back until the block is as small as asked for.
                for split in (order..have).rev() {
                    self.link_block(&mut free, mfn + (1 << split), split);
                }
                free.frames -= 1 << order;
                return Some(mfn);
            }
            let block = free.firmware_ram.take_block(BROUGHT_IN.max(1 << order), limit);
            let unused = block.or_else(|| free.firmware_ram.take_some(BROUGHT_IN, limit))?;
            self.unused.fetch_sub((unused.end - unused.start) as usize, Ordering::Relaxed);
            self.insert_dirty(&mut free, unused);
        }
    }

    /// A block of order `have` whose first 2^order frames are below `limit`. The search is cut after 64 blocks.
    fn first_below(&self, free: &FreeLists, have: u32, order: u32, limit: u64) -> Option<u32> {
        let mut mfn = *free.heads.get(have as usize)?;
        for _ in 0..64 {
            if mfn == NIL {
                return None;
            }
            if u64::from(mfn) + (1 << order) <= limit {
                return Some(mfn);
            }
            mfn = self.record(Mfn::new(u64::from(mfn))).next.load(Ordering::Relaxed);
        }
        None
    }

    fn insert_block(&self, free: &mut FreeLists, mut mfn: u32, mut order: u32) {
        free.frames += 1 << order;
        while order < MAX_ORDER {
            let buddy = mfn ^ 1 << order;
            let Some(record) = self.records.get(buddy as usize) else { break };
            if record.flags() & (FREE_HEAD | 31 << ORDER_SHIFT) != FREE_HEAD | order << ORDER_SHIFT {
                break;
            }
            self.unlink_block(free, buddy, order);
            mfn &= !(1 << order);
            order += 1;
        }
        self.link_block(free, mfn, order);
    }

    /// Inserts frames; those that lie behind each other, up or down, as blocks.
    fn insert_frames<T>(&self, free: &mut FreeLists, frames: &[T], mfn: impl Fn(&T) -> Mfn) {
        let mfn = |frame: &T| mfn(frame).get();
        for run in frames.chunk_by(|a, b| mfn(a).abs_diff(mfn(b)) == 1) {
            // They are all different, so a run goes one way.
            let ends = run.first().map(mfn).zip(run.last().map(mfn));
            let Some((one, other)) = ends else { continue };
            self.insert_range(free, one.min(other), run.len() as u64);
        }
    }

    /// Inserts frames that lie behind each other, in blocks as large as alignment allows.
    fn insert_range(&self, free: &mut FreeLists, mut mfn: u64, count: u64) {
        let end = mfn.saturating_add(count);
        while mfn < end {
            let order = (mfn | 1 << MAX_ORDER).trailing_zeros().min((end - mfn).ilog2());
            self.insert_block(free, mfn as u32, order);
            mfn += 1 << order;
        }
    }

    fn link_block(&self, free: &mut FreeLists, mfn: u32, order: u32) {
        let record = self.record(Mfn::new(u64::from(mfn)));
        record.set_owner(NOBODY, FREE_HEAD | order << ORDER_SHIFT);
        if let Some(head) = free.heads.get_mut(order as usize) {
            link(self, Mfn::new(u64::from(mfn)), head);
        }
    }

    fn unlink_block(&self, free: &mut FreeLists, mfn: u32, order: u32) {
        let record = self.record(Mfn::new(u64::from(mfn)));
        record.set_owner(NOBODY, 0);
        if let Some(head) = free.heads.get_mut(order as usize) {
            self.unlink(record, head);
        }
    }

    fn unlink(&self, record: &FrameRecord, head: &mut u32) {
        let next = record.next.swap(NIL, Ordering::Relaxed);
        let prev = record.prev.swap(NIL, Ordering::Relaxed);
        if prev == NIL {
            *head = next;
        } else {
            self.record(Mfn::new(u64::from(prev))).next.store(next, Ordering::Relaxed);
        }
        if next != NIL {
            self.record(Mfn::new(u64::from(next))).prev.store(prev, Ordering::Relaxed);
        }
    }
}

/// How [`Memory::sift`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sifted {
    /// There may be more frames.
    More,
    /// This one, which is the next still, is a page table that is pinned or parked: that must end first.
    Table(Mfn),
    /// There are no more that the owner holds.
    End,
}

/// A frame on its way from quarantine to the free lists: no translation to it is left anywhere.
#[must_use = "the frame is lost if it is not freed"]
#[derive(Debug)]
pub(super) struct Drained {
    mfn: Mfn,
    /// Whose list it is on.
    pub(super) owner: Option<DomId>,
}

/// The frames of one domain, and how many it may have.
///
/// The list is threaded through the frame records: walking it never looks at frames of others.
#[derive(Debug)]
pub struct PageList {
    head: u32,
    /// Frames that the owner's teardown is done with.
    given_up: u32,
    search: Search,
    charged: u64,
    max: u64,
    closed: bool,
}

/// How far the owner's teardown has looked for page tables.
#[derive(Clone, Copy, Debug)]
enum Search {
    NotBegun,
    /// This frame of the list is next; NIL when there are no more.
    At(u32),
}

/// The domain may not have that many frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverLimit;

impl PageList {
    /// No frames, `max_pages` allowed.
    pub const fn new(max_pages: u64) -> PageList {
        PageList {
            head: NIL,
            given_up: NIL,
            search: Search::NotBegun,
            charged: 0,
            max: max_pages,
            closed: false,
        }
    }

    /// Frames charged to the domain: those it has, and those it gave up while something still refers to them.
    pub const fn total(&self) -> u64 {
        self.charged
    }

    /// Most frames it may have.
    pub const fn max_pages(&self) -> u64 {
        self.max
    }

    /// Sets the most frames it may have; what it has already stays.
    pub fn set_max_pages(&mut self, max: u64) {
        self.max = max;
    }

    /// No more frames from now on: the domain is dying.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Charges frames that are about to be assigned.
    pub fn charge(&mut self, frames: u64) -> Result<(), OverLimit> {
        match self.charged.checked_add(frames) {
            Some(total) if total <= self.max && !self.closed => {
                self.charged = total;
                Ok(())
            }
            _ => Err(OverLimit),
        }
    }

    /// Takes a charge back: for frames that were not assigned after all, or are free again.
    pub fn discharge(&mut self, frames: u64) {
        self.charged = self.charged.saturating_sub(frames);
    }

    /// The first frame that teardown is not done with.
    fn first(&self) -> Option<Mfn> {
        (self.head != NIL).then(|| Mfn::new(u64::from(self.head)))
    }

    /// The frame that teardown looks at next in its search for page tables; `None` when it has looked at all. The list is closed by then.
    fn searched(&mut self) -> Option<Mfn> {
        let at = match self.search {
            Search::NotBegun => self.head,
            Search::At(mfn) => mfn,
        };
        self.search = Search::At(at);
        (at != NIL).then(|| Mfn::new(u64::from(at)))
    }

    /// The frame of `record`, which is next in the search, was looked at, or leaves the list.
    fn search_on(&mut self, record: &FrameRecord) {
        self.search = Search::At(record.next.load(Ordering::Relaxed));
    }

    /// Teardown has done its part with a frame of the list.
    fn give_up(&mut self, memory: &Memory, mfn: Mfn) {
        self.remove(memory, mfn);
        // Others may send it into quarantine meanwhile, and note that in the same word.
        memory.record(mfn).owner.fetch_or(GIVEN_UP, Ordering::AcqRel);
        link(memory, mfn, &mut self.given_up);
    }

    /// Takes off the first frame, whose record this is. Nothing is searched any more.
    fn pop_first(&mut self, memory: &Memory, record: &FrameRecord) {
        memory.unlink(record, &mut self.head);
    }

    fn push(&mut self, memory: &Memory, mfn: Mfn) {
        link(memory, mfn, &mut self.head);
    }

    fn remove(&mut self, memory: &Memory, mfn: Mfn) {
        let record = memory.record(mfn);
        if record.flags() & GIVEN_UP != 0 {
            return memory.unlink(record, &mut self.given_up);
        }
        if matches!(self.search, Search::At(next) if u64::from(next) == mfn.get()) {
            self.search_on(record);
        }
        memory.unlink(record, &mut self.head);
    }
}

/// Puts a frame at the front of a list.
fn link(memory: &Memory, mfn: Mfn, head: &mut u32) {
    let record = memory.record(mfn);
    record.prev.store(NIL, Ordering::Relaxed);
    record.next.store(*head, Ordering::Relaxed);
    if *head != NIL {
        memory.record(Mfn::new(u64::from(*head))).prev.store(mfn.get() as u32, Ordering::Relaxed);
    }
    *head = mfn.get() as u32;
}

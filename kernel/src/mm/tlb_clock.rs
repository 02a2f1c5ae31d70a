//! Who has dropped stale translations, since when, and how processors ask each other to.
//!
//! One counter, the *TLB clock*, goes on with each complete flush of any processor, and each processor notes the reading of its
//! own last one. A processor flushes in this order: take the next reading; drop all translations of guests; note the
//! reading. Whoever takes a right out of a table reads the clock *after* that: the **stamp** of the right. So:
//!
//! > A processor whose noted reading is above a stamp holds no translation that gives the stamped right: its flush began
//! > after the reading, hence after the change.
//!
//! No entry of a guest is global, so each load of a page-table root is a complete flush too, and counts.
//!
//! **Where a translation can be.** Each processor also says whose address space it has loaded: a domain's, nobody's (it is
//! idle on the hypervisor's own tables), or, for the moment of a change, *any*. It says so before it loads, and says that it has
//! left only after it has loaded something else. Who changes a table first and looks then, either sees the
//! domain there, or the processor loads the root later and walks the changed table. Tables of a domain are walked only in
//! its own address spaces; a frame can be mapped by several domains.
//!
//! **Asking.** A request is a reading to be reached, raised by maximum, so requests of several processors merge; then an
//! interrupt. The answer is the noted reading itself: whatever the other flushes for, the asker sees it. A processor that
//! cannot take the interrupt, because it waits in ring 0 for a lock, a table, or for its own request, answers in
//! the loop in which it waits (`sync::relax`). Nothing else waits without bound with a guest's address space loaded, so
//! each request is answered, whatever locks the asker holds.
//!
//! **Walks by ring 0.** While a processor has a domain's address space loaded and does not flush, no frame that its tables lead to
//! can change its kind or its owner, for that waits for this very flush: reading tables without references (`find_l1`) is as
//! safe as the processor's own walk.
//!
//! Stamps in frames' records have 26 bits. They are taken for the latest reading that ends in them: later than the
//! true one if the clock has wrapped meanwhile, which costs a flush that was not needed, and never misses one.

use hypercall_abi::DomId;

use super::page_info::Stamp;
use crate::platform::{CpuId, CpuSet, Platform, TlbFlush};
use crate::sync;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Processors there is room for.
const MAX_CPUS: usize = if cfg!(all(loom, test)) { 2 } else { crate::x86::layout::MAX_CPUS };
/// No guest's address space is loaded.
const IDLE: u32 = u32::MAX;
/// Somebody's is.
const ANY: u32 = u32::MAX - 1;

/// What the protocol asks of the processor it runs on: of a [`Platform`], or of a model of one in tests.
pub trait LocalTlb {
    /// Which one it is.
    fn this_cpu(&self) -> CpuId;
    /// Drops translations of it.
    fn flush_tlb(&self, what: TlbFlush);
    /// Makes others call [`TlbClock::answer`].
    fn request_flush(&self, cpus: CpuSet);
}

impl<P: Platform> LocalTlb for P {
    fn this_cpu(&self) -> CpuId {
        Platform::this_cpu(self)
    }
    fn flush_tlb(&self, what: TlbFlush) {
        Platform::flush_tlb(self, what);
    }
    fn request_flush(&self, cpus: CpuSet) {
        Platform::request_flush(self, cpus);
    }
}

/// What one processor says of its translations, alone on a cache line.
#[repr(align(64))]
struct CpuTlb {
    /// Reading at its last complete flush. It alone writes it.
    flushed: AtomicU64,
    /// Reading that others want it to reach.
    wanted: AtomicU64,
    /// Number of the domain whose address space it has loaded, [`IDLE`] or [`ANY`]. It alone writes it.
    space: AtomicU32,
}

/// The clock of complete flushes, and how far each processor has come.
pub struct TlbClock {
    now: AtomicU64,
    cpus: [CpuTlb; MAX_CPUS],
    /// How many of them there are.
    count: AtomicU32,
}

impl TlbClock {
    /// A clock at zero, and one processor of which nothing is known.
    pub fn new() -> TlbClock {
        let cpus = core::array::from_fn(|cpu| CpuTlb {
            flushed: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            space: AtomicU32::new(if cpu == 0 { ANY } else { IDLE }),
        });
        TlbClock { now: AtomicU64::new(0), cpus, count: AtomicU32::new(1) }
    }

    /// Says that processors 0 to `count` - 1 are up. The new ones have no guest's address space.
    pub fn set_cpus(&self, count: u32) {
        self.count.store(count.clamp(1, MAX_CPUS as u32), Ordering::SeqCst);
    }

    /// The stamp of a right that was taken out of a table just now.
    pub fn now(&self) -> Stamp {
        Stamp::new(self.reading() as u32)
    }

    /// The reading now.
    pub(super) fn reading(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// The reading that a stamp stands for, or a later one.
    pub(super) fn at(&self, stamp: Stamp) -> u64 {
        let now = self.reading();
        now - u64::from(Stamp::new(now as u32).since(stamp)).min(now)
    }

    // A number from the platform; the mask only spares the bounds check.
    fn cpu(&self, cpu: CpuId) -> &CpuTlb {
        &self.cpus[cpu.0 as usize % MAX_CPUS]
    }

    /// Notes a complete flush of this processor, which `flush` does.
    pub fn flush(&self, this: CpuId, flush: impl FnOnce()) {
        let reading = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        flush();
        self.cpu(this).flushed.store(reading, Ordering::SeqCst);
    }

    /// This processor changes to an address space of `domain`, or with `None` to the hypervisor's own, by `load`.
    pub fn enter(&self, this: CpuId, domain: Option<DomId>, load: impl FnOnce()) {
        let space = &self.cpu(this).space;
        let next = domain.map_or(IDLE, |domain| u32::from(domain.get()));
        let before = space.load(Ordering::Relaxed);
        if before == next {
            return self.flush(this, load);
        }
        space.store(if before == IDLE { next } else { ANY }, Ordering::SeqCst);
        self.flush(this, load);
        space.store(next, Ordering::SeqCst);
    }

    /// The processors that may hold translations older than the end of reading `since`: of `domain`'s address spaces, or
    /// of any.
    pub(super) fn late(&self, since: u64, domain: Option<DomId>) -> CpuSet {
        let mut late = CpuSet::default();
        for cpu in (0..self.count.load(Ordering::SeqCst)).map(CpuId) {
            let here = self.cpu(cpu);
            let space = here.space.load(Ordering::SeqCst);
            let can_be_here = match domain {
                _ if space == IDLE => false,
                Some(domain) => space == ANY || space == u32::from(domain.get()),
                None => true,
            };
            if can_be_here && here.flushed.load(Ordering::SeqCst) <= since {
                late = late.with(cpu);
            }
        }
        late
    }

    /// Waits until no processor holds a translation of `domain`'s address spaces (`None`: of any) that is older than the end of
    /// reading `since`.
    pub(super) fn settle(&self, tlb: &impl LocalTlb, since: u64, domain: Option<DomId>) {
        self.flush_on(tlb, self.late(since, domain), since);
    }

    /// Drops what processors of `cpus` may hold of `domain`: guests' own flushes. Of other processors than this
    /// one all of it is dropped, whatever was asked.
    pub fn flush_guest(&self, tlb: &impl LocalTlb, domain: DomId, cpus: CpuSet, what: TlbFlush) {
        let this = tlb.this_cpu();
        let since = self.reading();
        let mut late = self.late(since, Some(domain)).and(cpus);
        if let TlbFlush::Page(_) = what
            && cpus.contains(this)
        {
            tlb.flush_tlb(what);
            late = late.without(this);
        }
        self.flush_on(tlb, late, since);
    }

    fn flush_on(&self, tlb: &impl LocalTlb, cpus: CpuSet, since: u64) {
        let this = tlb.this_cpu();
        if cpus.contains(this) {
            self.flush(this, || tlb.flush_tlb(TlbFlush::All));
        }
        let others = cpus.without(this);
        if others != CpuSet::default() {
            self.shoot_down(tlb, this, others, since);
        }
    }

    #[cold]
    fn shoot_down(&self, tlb: &impl LocalTlb, this: CpuId, others: CpuSet, since: u64) {
        for cpu in others.iter() {
            self.cpu(cpu).wanted.fetch_max(since + 1, Ordering::SeqCst);
        }
        tlb.request_flush(others);
        for cpu in others.iter() {
            while self.cpu(cpu).flushed.load(Ordering::SeqCst) <= since {
                self.answer(tlb, this);
                sync::relax();
            }
        }
    }

    /// Does what other processors have asked this one for, if anything.
    pub fn answer(&self, tlb: &impl LocalTlb, this: CpuId) {
        let here = self.cpu(this);
        if here.wanted.load(Ordering::SeqCst) > here.flushed.load(Ordering::Relaxed) {
            self.flush(this, || tlb.flush_tlb(TlbFlush::All));
        }
    }
}

impl Default for TlbClock {
    fn default() -> Self {
        TlbClock::new()
    }
}

/// The protocol under every order of accesses that the memory model allows (`cargo xtask test --filter loom`).
#[cfg(all(loom, test))]
mod models {
    use super::*;
    use crate::mm::TlbDebt;
    use crate::sync::atomic::model::needed;
    use alloc::string::String;
    use alloc::vec::Vec;
    use loom::sync::Arc;
    use loom::thread;
    use std::cell::Cell;

    const DOMAIN: DomId = DomId::new(1);

    /// What two processors share: the clock, one entry of a page table, and which of two frames is somebody else's.
    struct World {
        clock: TlbClock,
        entry: AtomicU32,
        given_away: [AtomicU32; 2],
        interrupt: AtomicU32,
        over: AtomicU32,
    }

    /// A processor whose TLB holds one translation.
    struct Cpu<'a> {
        number: u32,
        cached: Cell<Option<u32>>,
        world: &'a World,
    }

    impl LocalTlb for Cpu<'_> {
        fn this_cpu(&self) -> CpuId {
            CpuId(self.number)
        }
        fn flush_tlb(&self, _what: TlbFlush) {
            self.cached.set(None);
        }
        fn request_flush(&self, _cpus: CpuSet) {
            self.world.interrupt.store(1, Ordering::SeqCst);
        }
    }

    impl Cpu<'_> {
        /// The guest uses the page: by the TLB, or by a walk.
        fn touch(&self) {
            let frame = self.cached.get().unwrap_or_else(|| self.world.entry.load(Ordering::SeqCst));
            self.cached.set(Some(frame));
            let bad = self.world.given_away[frame as usize].load(Ordering::SeqCst);
            assert_eq!(bad, 0, "a frame of somebody else is used");
        }
        fn take_interrupt(&self) {
            if self.world.interrupt.load(Ordering::SeqCst) != 0 {
                self.world.clock.answer(self, CpuId(self.number));
            }
        }
        fn enter(&self, domain: Option<DomId>) {
            self.world.clock.enter(CpuId(self.number), domain, || self.cached.set(None));
        }
    }

    /// One processor takes frame 0 out of the table and gives it away when it may; `life` is what the other one does.
    fn give_away(life: fn(&Cpu<'_>)) {
        let world = Arc::new(World {
            clock: TlbClock::new(),
            entry: AtomicU32::new(0),
            given_away: [AtomicU32::new(0), AtomicU32::new(0)],
            interrupt: AtomicU32::new(0),
            over: AtomicU32::new(0),
        });
        world.clock.set_cpus(2);
        world.clock.enter(CpuId(0), None, || {});
        world.clock.enter(CpuId(1), Some(DOMAIN), || {});
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                let cpu = Cpu { number: 1, cached: Cell::new(None), world: &world };
                life(&cpu);
                // It has left, or goes on answering.
                while world.over.load(Ordering::Acquire) == 0 {
                    cpu.take_interrupt();
                    thread::yield_now();
                }
            })
        };
        let cpu = Cpu { number: 0, cached: Cell::new(None), world: &world };
        // As `mm::update` writes an entry.
        world.entry.swap(1, Ordering::SeqCst);
        TlbDebt::since(world.clock.now(), &world.clock).pay(&cpu, &world.clock);
        world.given_away[0].store(1, Ordering::SeqCst);
        world.over.store(1, Ordering::Release);
        other.join().unwrap();
    }

    fn needed_for(model: fn()) -> Vec<String> {
        needed("tlb_clock.rs", include_str!("tlb_clock.rs"), model)
    }

    #[test]
    fn one_that_runs_the_domain_is_asked_and_answers() {
        let needed = needed_for(|| {
            give_away(|cpu| {
                cpu.touch();
                cpu.take_interrupt();
                cpu.touch();
            });
        });
        // Flushes, requests and answers are exchanges, each of which orders all before and after it: none is needed alone.
        assert!(needed.is_empty(), "{needed:#?}");
    }

    #[test]
    fn one_that_comes_to_the_domain_walks_the_new_table() {
        let needed = needed_for(|| {
            give_away(|cpu| {
                cpu.enter(None);
                cpu.enter(Some(DOMAIN));
                cpu.touch();
            });
        });
        // The change of the table against the look at who has it loaded. `space` on the other side is followed by the flush, an
        // exchange.
        assert_eq!(needed, ["world.entry.swap(1, Ordering::SeqCst);"]);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::mm::TlbDebt;
    use alloc::vec::Vec;
    use core::hint;
    use core::sync::atomic::AtomicBool;
    use std::cell::Cell;
    use std::thread;

    const DOMAIN: DomId = DomId::new(1);
    const OTHER: DomId = DomId::new(2);

    /// A processor whose TLB holds one translation. Interrupts are flags that it looks at now and then.
    struct Model<'a> {
        cpu: CpuId,
        cached: Cell<Option<usize>>,
        flushes: Cell<u32>,
        interrupts: &'a [AtomicBool],
    }

    impl LocalTlb for Model<'_> {
        fn this_cpu(&self) -> CpuId {
            self.cpu
        }
        fn flush_tlb(&self, _what: TlbFlush) {
            self.cached.set(None);
            self.flushes.set(self.flushes.get() + 1);
        }
        fn request_flush(&self, cpus: CpuSet) {
            for cpu in cpus.iter() {
                self.interrupts[cpu.0 as usize].store(true, Ordering::SeqCst);
            }
        }
    }

    fn models(interrupts: &[AtomicBool]) -> Vec<Model<'_>> {
        (0..interrupts.len() as u32)
            .map(|n| Model { cpu: CpuId(n), cached: Cell::new(None), flushes: Cell::new(0), interrupts })
            .collect()
    }

    fn flags(count: usize) -> Vec<AtomicBool> {
        (0..count).map(|_| AtomicBool::new(false)).collect()
    }

    fn clock(cpus: u32) -> TlbClock {
        let clock = TlbClock::new();
        clock.set_cpus(cpus);
        for cpu in (0..cpus).map(CpuId) {
            clock.enter(cpu, None, || {});
        }
        clock
    }

    #[test]
    fn only_processors_that_may_still_have_it_are_late() {
        let clock = clock(4);
        clock.enter(CpuId(1), Some(DOMAIN), || {});
        clock.enter(CpuId(2), Some(OTHER), || {});
        let since = clock.reading();
        let late = |domain| clock.late(since, domain);
        assert_eq!(
            late(Some(DOMAIN)),
            CpuSet::one(CpuId(1)),
            "tables are walked in their domain's spaces only"
        );
        assert_eq!(late(None), CpuSet::one(CpuId(1)).with(CpuId(2)), "the others idle");
        clock.enter(CpuId(3), Some(DOMAIN), || {});
        clock.enter(CpuId(1), Some(DOMAIN), || {});
        assert_eq!(
            late(Some(DOMAIN)),
            CpuSet::default(),
            "one came after the change, one has switched since"
        );
        clock.enter(CpuId(2), None, || {});
        assert_eq!(late(None), CpuSet::default());
    }

    #[test]
    fn while_an_address_space_is_being_loaded_it_counts_as_any() {
        let clock = clock(2);
        clock.enter(CpuId(1), Some(DOMAIN), || {});
        let since = clock.reading();
        for next in [Some(OTHER), None, Some(DOMAIN)] {
            clock.enter(CpuId(1), next, || {
                for domain in [DOMAIN, OTHER].into_iter().filter(|d| Some(*d) != next || *d == DOMAIN) {
                    let here = clock.late(clock.reading(), Some(domain)).contains(CpuId(1));
                    assert!(here || next == Some(DOMAIN) && domain == OTHER, "{next:?} {domain:?}");
                }
            });
        }
        assert!(clock.late(since, None).is_empty());
    }

    #[test]
    fn a_stamp_from_before_the_wrap_is_taken_for_a_later_one() {
        let clock = clock(1);
        clock.enter(CpuId(0), Some(DOMAIN), || {});
        let stamp = clock.now();
        let at = clock.reading();
        assert!(TlbDebt::since(stamp, &clock).is_owed_and_forgiven());
        clock.flush(CpuId(0), || {});
        assert!(!TlbDebt::since(stamp, &clock).is_owed());
        // As if a multiple of the stamp's range had passed.
        clock.now.store(at + (3 << 26), Ordering::SeqCst);
        clock.cpu(CpuId(0)).flushed.store(at + (3 << 26), Ordering::SeqCst);
        assert_eq!(clock.at(stamp), at + (3 << 26));
        assert!(TlbDebt::since(stamp, &clock).is_owed_and_forgiven(), "not sure: so it is flushed");
    }

    #[test]
    fn a_frame_is_given_away_only_when_no_processor_translates_to_it() {
        const FRAMES: usize = 4;
        const ROUNDS: usize = 5_000;
        let clock = clock(3);
        let interrupts = flags(3);
        // The page table: one entry, the frame it maps. Frames that are somebody else's now.
        let entry = AtomicU32::new(0);
        let given_away: [AtomicBool; FRAMES] = [const { AtomicBool::new(false) }; FRAMES];
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for (n, model) in models(&interrupts).into_iter().enumerate() {
                let (clock, interrupts, entry, given_away, stop) =
                    (&clock, &interrupts, &entry, &given_away, &stop);
                scope.spawn(move || {
                    if n == 0 {
                        // Unmaps, waits, gives away, takes back.
                        for round in 0..ROUNDS {
                            let frame = entry.swap(((round + 1) % FRAMES) as u32, Ordering::SeqCst) as usize;
                            TlbDebt::since(clock.now(), clock).pay(&model, clock);
                            given_away[frame].store(true, Ordering::SeqCst);
                            // Long enough to be caught by whoever goes on using it.
                            for _ in 0..500 {
                                hint::spin_loop();
                            }
                            if round.is_multiple_of(64) {
                                thread::yield_now();
                            }
                            given_away[frame].store(false, Ordering::SeqCst);
                        }
                        stop.store(true, Ordering::SeqCst);
                        return;
                    }
                    let mut turns = 0u32;
                    while !stop.load(Ordering::SeqCst) {
                        turns += 1;
                        if turns.is_multiple_of(500) {
                            let next = [None, Some(DOMAIN), Some(OTHER)][(turns / 500) as usize % 3];
                            clock.enter(model.cpu, next, || model.cached.set(None));
                        }
                        if clock.cpu(model.cpu).space.load(Ordering::Relaxed) != IDLE {
                            // A use of the page: a walk if the TLB has nothing.
                            let frame = model.cached.get().unwrap_or(entry.load(Ordering::SeqCst) as usize);
                            model.cached.set(Some(frame));
                            let bad = given_away[frame].load(Ordering::SeqCst);
                            assert!(!bad, "processor {n} uses frame {frame} of somebody else");
                        }
                        if turns.is_multiple_of(50) && interrupts[n].swap(false, Ordering::SeqCst) {
                            clock.answer(&model, model.cpu);
                        }
                    }
                    clock.enter(model.cpu, None, || model.cached.set(None));
                });
            }
        });
    }

    #[test]
    fn two_that_ask_each_other_answer_in_their_waits() {
        let clock = clock(2);
        let interrupts = flags(2);
        thread::scope(|scope| {
            for model in models(&interrupts) {
                let clock = &clock;
                scope.spawn(move || {
                    for _ in 0..2_000 {
                        clock.enter(model.cpu, Some(DOMAIN), || {});
                        TlbDebt::everywhere().pay(&model, clock);
                        TlbDebt::of_tables(DOMAIN, clock).pay(&model, clock);
                    }
                    clock.enter(model.cpu, None, || {});
                });
            }
        });
    }
}

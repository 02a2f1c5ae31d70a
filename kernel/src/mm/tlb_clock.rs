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

use core::hint;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hypercall_abi::DomId;

use super::page_info::Stamp;
use crate::platform::{CpuId, CpuSet, Platform, TlbFlush};
use crate::x86::layout::MAX_CPUS;

/// No guest's address space is loaded.
const IDLE: u32 = u32::MAX;
/// Somebody's is.
const ANY: u32 = u32::MAX - 1;

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
    pub const fn new() -> TlbClock {
        let mut cpus = [const {
            CpuTlb { flushed: AtomicU64::new(0), wanted: AtomicU64::new(0), space: AtomicU32::new(IDLE) }
        }; MAX_CPUS];
        cpus[0].space = AtomicU32::new(ANY);
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
    pub(super) fn settle<P: Platform>(&self, platform: &P, since: u64, domain: Option<DomId>) {
        self.flush_on(platform, self.late(since, domain), since);
    }

    /// Drops what processors of `cpus` may hold of `domain`: guests' own flushes. Of other processors than this
    /// one all of it is dropped, whatever was asked.
    pub fn flush_guest<P: Platform>(&self, platform: &P, domain: DomId, cpus: CpuSet, what: TlbFlush) {
        let this = platform.this_cpu();
        let since = self.reading();
        let mut late = self.late(since, Some(domain)).and(cpus);
        if let TlbFlush::Page(_) = what
            && cpus.contains(this)
        {
            platform.flush_tlb(what);
            late = late.without(this);
        }
        self.flush_on(platform, late, since);
    }

    fn flush_on<P: Platform>(&self, platform: &P, cpus: CpuSet, since: u64) {
        let this = platform.this_cpu();
        if cpus.contains(this) {
            self.flush(this, || platform.flush_tlb(TlbFlush::All));
        }
        let others = cpus.without(this);
        if others != CpuSet::default() {
            self.shoot_down(platform, this, others, since);
        }
    }

    #[cold]
    fn shoot_down<P: Platform>(&self, platform: &P, this: CpuId, others: CpuSet, since: u64) {
        for cpu in others.iter() {
            self.cpu(cpu).wanted.fetch_max(since + 1, Ordering::SeqCst);
        }
        platform.request_flush(others);
        for cpu in others.iter() {
            while self.cpu(cpu).flushed.load(Ordering::SeqCst) <= since {
                self.answer(platform, this);
                hint::spin_loop();
            }
        }
    }

    /// Does what other processors have asked this one for, if anything.
    pub fn answer<P: Platform>(&self, platform: &P, this: CpuId) {
        let here = self.cpu(this);
        if here.wanted.load(Ordering::SeqCst) > here.flushed.load(Ordering::Relaxed) {
            self.flush(this, || platform.flush_tlb(TlbFlush::All));
        }
    }
}

impl Default for TlbClock {
    fn default() -> Self {
        TlbClock::new()
    }
}

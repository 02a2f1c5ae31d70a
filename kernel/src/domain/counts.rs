//! What a vCPU did, counted.

use core::sync::atomic::{AtomicU64, Ordering};

/// A count that only one CPU at a time changes, the one that runs the vCPU, and anybody reads. So it needs no locked instruction:
/// a null hypercall costs two instructions more for it.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Nothing yet.
    pub const fn new() -> Count {
        Count(AtomicU64::new(0))
    }

    /// Counts `more`. Only for the CPU that runs the vCPU.
    #[inline]
    pub fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a vCPU did since its domain was made.
#[derive(Debug, Default)]
pub struct Counts {
    /// Hypercalls that came to an end; one that is preempted and executed again counts once, a multicall counts as one.
    pub hypercalls: Count,
    /// Exceptions of its instructions: those that were put right for it, and those it was told of.
    pub faults: Count,
    /// Events that it sent.
    pub events_sent: Count,
    /// Upcalls that it got: one may stand for many events.
    pub upcalls: Count,
    /// Elements of grant operations.
    pub grant_operations: Count,
    /// Times that it was put on a CPU.
    pub switches: Count,
    /// Of these, on another CPU than before.
    pub moves: Count,
}

impl Counts {
    /// Nothing yet.
    pub const fn new() -> Counts {
        Counts {
            hypercalls: Count::new(),
            faults: Count::new(),
            events_sent: Count::new(),
            upcalls: Count::new(),
            grant_operations: Count::new(),
            switches: Count::new(),
            moves: Count::new(),
        }
    }
}

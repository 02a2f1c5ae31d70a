//! Scheduling: which vCPU a CPU runs next.
//!
//! Proportional share by virtual run time: each vCPU's clock advances by the time it ran, divided by its weight, and the one
//! whose clock is furthest behind runs next. One that slept is moved up to at most [`WAKE_BONUS_NS`] behind the others, so
//! that it is served soon but cannot save up time. The policy ([`FairQueue`]) is pure; [`RunQueue`] joins it to vCPUs.
#![forbid(unsafe_code)]

mod cap;
mod fair;
pub mod policy;
#[cfg(test)]
mod simulation;
mod switch;

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

pub use cap::Cap;
pub use fair::FairQueue;
pub use policy::{SLICE_NS, WAKE_BONUS_NS};

use crate::domain::VcpuRef;

/// Weight of a vCPU that nobody weighted.
pub const DEFAULT_WEIGHT: u32 = 256;

/// What the scheduler keeps per vCPU.
pub struct Entity {
    /// Virtual run time in nanoseconds at the default weight.
    pub virtual_ns: AtomicU64,
    /// Share relative to others, 1 to 65535.
    pub weight: AtomicU32,
    /// Whether it is in a run queue; changed under that queue's lock only.
    pub queued: AtomicBool,
    /// When it was last put on a CPU, in nanoseconds since boot.
    pub since_ns: AtomicU64,
}

impl Entity {
    /// A vCPU that never ran.
    pub const fn new() -> Entity {
        Entity {
            virtual_ns: AtomicU64::new(0),
            weight: AtomicU32::new(DEFAULT_WEIGHT),
            queued: AtomicBool::new(false),
            since_ns: AtomicU64::new(0),
        }
    }

    /// Advances its clock by `ran_ns` nanoseconds of running.
    pub fn charge(&self, ran_ns: u64) {
        let weight = u64::from(self.weight.load(Ordering::Relaxed).max(1));
        let virtual_ns = ran_ns.saturating_mul(u64::from(DEFAULT_WEIGHT)) / weight;
        self.virtual_ns.fetch_add(virtual_ns, Ordering::Relaxed);
    }
}

impl Default for Entity {
    fn default() -> Self {
        Entity::new()
    }
}

/// The vCPUs that wait for one CPU.
pub struct RunQueue {
    fair: FairQueue<VcpuRef>,
}

impl RunQueue {
    /// Nobody waits.
    pub const fn new() -> RunQueue {
        RunQueue { fair: FairQueue::new() }
    }

    /// Makes room for `total` vCPUs, so that queueing never allocates.
    pub fn reserve(&mut self, total: usize) {
        self.fair.reserve(total);
    }

    /// Queues a vCPU unless it is queued already; `woken` moves a sleeper up.
    pub fn push(&mut self, vcpu: VcpuRef, woken: bool) {
        if vcpu.sched.queued.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut at = vcpu.sched.virtual_ns.load(Ordering::Relaxed);
        if woken {
            at = at.max(self.fair.clock().saturating_sub(WAKE_BONUS_NS));
            vcpu.sched.virtual_ns.store(at, Ordering::Relaxed);
        }
        self.fair.push(at, vcpu);
    }

    /// Takes the next vCPU that may run; those that may not any more leave the queue.
    fn pop(&mut self) -> Option<VcpuRef> {
        while let Some((_, vcpu)) = self.fair.pop() {
            vcpu.sched.queued.store(false, Ordering::Relaxed);
            if vcpu.runnable() && vcpu.domain().may_run() {
                return Some(vcpu);
            }
        }
        None
    }

    /// Takes the next vCPU that may run and marks it as running, under this one lock.
    pub fn pop_and_mark(&mut self) -> Option<VcpuRef> {
        let vcpu = self.pop()?;
        vcpu.running.store(true, Ordering::Release);
        Some(vcpu)
    }

    /// Whether a waiting vCPU is behind `virtual_ns`, and so should run instead.
    pub fn preempts(&self, virtual_ns: u64) -> bool {
        self.fair.first().is_some_and(|first| first < virtual_ns)
    }

    /// Virtual time of whoever is next.
    pub fn first(&self) -> Option<u64> {
        self.fair.first()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.fair.first().is_none()
    }
}

impl Default for RunQueue {
    fn default() -> Self {
        RunQueue::new()
    }
}

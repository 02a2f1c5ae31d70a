//! Scheduling: which vCPU a CPU runs next.
//!
//! Proportional share by virtual run time: each vCPU's clock advances by the time it ran, divided by its weight, and the one
//! whose clock is furthest behind runs next. One that slept is moved up to at most [`WAKE_BONUS_NS`] behind the others, so
//! that it is served soon but cannot save up time. The policy ([`FairQueue`]) is pure; [`RunQueue`] joins it to vCPUs.
#![forbid(unsafe_code)]

mod cap;
mod claims;
mod fair;
mod guarantee;
pub mod policy;
mod shared;
#[cfg(test)]
mod simulation;
mod switch;
pub mod wakeup;

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

pub use cap::{Cap, DomainCap};
pub use claims::Claims;
pub use fair::FairQueue;
pub use guarantee::{DomainGuarantee, Guarantee};
use policy::Affinity;
pub use policy::{SLICE_NS, WAKE_BONUS_NS};
pub use shared::{Published, Sharing};

use crate::domain::{Vcpu, VcpuRef};
use crate::platform::{CpuId, CpuSet};

/// Weight of a vCPU that nobody weighted.
pub const DEFAULT_WEIGHT: u32 = 256;

/// Virtual time that `ran_ns` nanoseconds of running are at this weight. A weight of 0 counts as 1.
fn virtual_time(ran_ns: u64, weight: u32) -> u64 {
    ran_ns.saturating_mul(u64::from(DEFAULT_WEIGHT)) / u64::from(weight.max(1))
}

/// No CPU's number.
pub const NO_CPU: u32 = u32::MAX;

/// What the scheduler keeps per vCPU.
pub struct Entity {
    /// Virtual run time in nanoseconds at the default weight.
    pub virtual_ns: AtomicU64,
    /// Share relative to others, 1 to 65535.
    pub weight: AtomicU32,
    /// The weight that running time is charged at. It follows `weight` where time has been charged, so that what ran before a change
    /// counts at the weight of that time. Written by the CPU that runs the vCPU.
    charged_weight: AtomicU32,
    /// Whether it is in a run queue; changed under that queue's lock only.
    pub queued: AtomicBool,
    /// Until when its running time is charged, in nanoseconds since boot.
    pub since_ns: AtomicU64,
    /// When it was last put on a CPU, in nanoseconds since boot.
    pub put_on_ns: AtomicU64,
    /// The CPU it was put on last, for which its time record was written; [`NO_CPU`] for none.
    pub last_cpu: AtomicU32,
    /// It gave up the rest of its slice.
    pub yields: AtomicBool,
    /// CPUs it may run on, a bit each (hard affinity).
    pub hard: AtomicU64,
    /// CPUs that it should run on when it has the choice (soft affinity).
    pub soft: AtomicU64,
    /// The CPU that it asked to be kept on (`SCHEDOP_pin_override`) plus one, 0 for none. It goes before both.
    pub pinned: AtomicU32,
    /// The CPU that it holds for itself under the policy `null` plus one, 0 for none.
    claimed: AtomicU32,
}

impl Entity {
    /// A vCPU that never ran.
    pub const fn new() -> Entity {
        Entity {
            virtual_ns: AtomicU64::new(0),
            weight: AtomicU32::new(DEFAULT_WEIGHT),
            charged_weight: AtomicU32::new(DEFAULT_WEIGHT),
            queued: AtomicBool::new(false),
            since_ns: AtomicU64::new(0),
            put_on_ns: AtomicU64::new(0),
            last_cpu: AtomicU32::new(NO_CPU),
            yields: AtomicBool::new(false),
            hard: AtomicU64::new(u64::MAX),
            soft: AtomicU64::new(u64::MAX),
            pinned: AtomicU32::new(0),
            claimed: AtomicU32::new(0),
        }
    }

    /// Where it may run and where it should.
    pub fn affinity(&self) -> Affinity {
        let set = |set: &AtomicU64| CpuSet(set.load(Ordering::Relaxed));
        if let Some(cpu) = self.pinned.load(Ordering::Relaxed).checked_sub(1) {
            return Affinity { hard: CpuSet::one(CpuId(cpu)), soft: CpuSet::ALL };
        }
        Affinity { hard: set(&self.hard), soft: set(&self.soft) }
    }

    /// Advances its clock by `ran_ns` nanoseconds of running, at the weight that it had.
    pub fn charge(&self, ran_ns: u64) {
        let weight = self.charged_weight.load(Ordering::Relaxed);
        self.virtual_ns.fetch_add(virtual_time(ran_ns, weight), Ordering::Relaxed);
        self.take_weight();
    }

    /// Charges at the weight that was set last from now on.
    pub fn take_weight(&self) {
        self.charged_weight.store(self.weight.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// The weight that it is charged at.
    pub fn charged_weight(&self) -> u32 {
        self.charged_weight.load(Ordering::Relaxed)
    }

    /// The CPU that it holds for itself, if it does.
    pub fn claimed(&self) -> Option<CpuId> {
        self.claimed.load(Ordering::SeqCst).checked_sub(1).map(CpuId)
    }

    /// It holds this CPU, or none, from now on; returns the one before.
    pub fn set_claimed(&self, cpu: Option<CpuId>) -> Option<CpuId> {
        let word = cpu.map_or(0, |cpu| cpu.0 + 1);
        self.claimed.swap(word, Ordering::SeqCst).checked_sub(1).map(CpuId)
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

    /// Queues a vCPU unless it is queued already, at its standing.
    pub fn push(&mut self, standing: u64, vcpu: VcpuRef) {
        // Changed under the lock only: no exchange is needed.
        let queued = &vcpu.sched.queued;
        if !queued.load(Ordering::Relaxed) {
            queued.store(true, Ordering::Relaxed);
            self.fair.push(standing, vcpu);
        }
    }

    /// Takes the next vCPU that may run; those that may not any more leave the queue.
    fn pop(&mut self) -> Option<VcpuRef> {
        while let Some((_, vcpu)) = self.fair.pop() {
            let it: &Vcpu = &vcpu;
            it.sched.queued.store(false, Ordering::Relaxed);
            if it.runnable() && vcpu.domain().may_run() {
                return Some(vcpu);
            }
        }
        None
    }

    /// Takes the next vCPU that may run and marks it as running, under this one lock.
    pub fn pop_and_mark(&mut self) -> Option<VcpuRef> {
        let vcpu = self.pop()?;
        wakeup::start_running(&vcpu.running);
        Some(vcpu)
    }

    /// Standing of the next vCPU that may run; those before it that may not leave the queue.
    pub fn first_runnable(&mut self) -> Option<u64> {
        while let Some((at, vcpu)) = self.fair.peek() {
            if vcpu.runnable() && vcpu.domain().may_run() {
                return Some(at);
            }
            vcpu.sched.queued.store(false, Ordering::Relaxed);
            self.fair.pop();
        }
        None
    }

    /// Takes the next vCPU that may run on another CPU, marked as running there.
    pub fn hand_over(&mut self, to: CpuId) -> Option<VcpuRef> {
        let may =
            |vcpu: &VcpuRef| vcpu.runnable() && vcpu.domain().may_run() && vcpu.sched.affinity().allows(to);
        let (_, vcpu) = self.fair.pop_where(may)?;
        vcpu.sched.queued.store(false, Ordering::Relaxed);
        vcpu.cpu.store(to.0, Ordering::SeqCst);
        wakeup::start_running(&vcpu.running);
        Some(vcpu)
    }

    /// Takes a vCPU out, wherever in the queue it is; tells whether it was there.
    pub fn remove(&mut self, vcpu: &VcpuRef) -> bool {
        let there = vcpu.sched.queued.load(Ordering::Relaxed)
            && self.fair.pop_where(|other| other.same(vcpu)).is_some();
        if there {
            vcpu.sched.queued.store(false, Ordering::Relaxed);
        }
        there
    }

    /// Where the next vCPU may run.
    pub fn first_affinity(&self) -> Option<Affinity> {
        self.fair.peek().map(|(_, vcpu)| vcpu.sched.affinity())
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.fair.len()
    }

    /// Standing of whoever is next.
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

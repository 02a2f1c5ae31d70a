//! The policy that a machine uses, and what each CPU shows of itself for it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::policy::{Affinity, Arrival, Fair, Null, Policy, Preempt, SHORTEST_RUN_NS, View};
use super::{DEFAULT_WEIGHT, Entity, RunQueue, virtual_time};
use crate::platform::CpuId;

/// Nobody.
const NONE: u64 = u64::MAX;

/// A CPU's [`View`] for others. Each word is true by itself; together they are a hint.
pub struct Published {
    /// Standing of the vCPU that runs, as of `since`; `NONE` when idle.
    running: AtomicU64,
    since: AtomicU64,
    /// When it was put on.
    put_on: AtomicU64,
    weight: AtomicU32,
    /// See [`View::clock`]; written by this CPU.
    clock: AtomicU64,
    /// Of the queue; written under its lock.
    first: AtomicU64,
    waiting: AtomicU32,
}

impl Published {
    /// An idle CPU.
    pub const fn new() -> Published {
        Published {
            running: AtomicU64::new(NONE),
            since: AtomicU64::new(0),
            put_on: AtomicU64::new(0),
            weight: AtomicU32::new(DEFAULT_WEIGHT),
            clock: AtomicU64::new(0),
            first: AtomicU64::new(NONE),
            waiting: AtomicU32::new(0),
        }
    }

    /// What it shows at `now`.
    pub fn view(&self, now: u64) -> View {
        let some = |value| Some(value).filter(|value| *value != NONE);
        let ran = now.saturating_sub(self.since.load(Ordering::Relaxed));
        let ran = virtual_time(ran, self.weight.load(Ordering::Relaxed));
        View {
            running: some(self.running.load(Ordering::SeqCst)).map(|at| View::advanced(at, ran)),
            first: some(self.first.load(Ordering::SeqCst)),
            clock: self.clock.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::SeqCst),
        }
    }

    /// What somebody who comes to wait at `now` competes with: the standing of the vCPU that runs, and for how long it has run. `None` when
    /// none does, or what it ran since it was charged is too much to be left out: a choice has to charge it first.
    pub fn competitor(&self, now: u64) -> Option<(u64, u64)> {
        let uncharged = now.saturating_sub(self.since.load(Ordering::Relaxed));
        let running = self.view(now).running.filter(|_| uncharged < SHORTEST_RUN_NS)?;
        Some((running, now.saturating_sub(self.put_on.load(Ordering::Relaxed))))
    }

    /// This vCPU runs here at a standing, charged until `now`; `None`: nobody does.
    pub fn runs(&self, running: Option<(&Entity, u64)>, now: u64) {
        let at = running.map_or(NONE, |(entity, at)| {
            self.since.store(now, Ordering::Relaxed);
            self.put_on.store(entity.put_on_ns.load(Ordering::Relaxed), Ordering::Relaxed);
            self.weight.store(entity.charged_weight(), Ordering::Relaxed);
            let first = Some(self.first.load(Ordering::SeqCst)).filter(|first| *first != NONE);
            let clock = View::clock_after(self.clock.load(Ordering::Relaxed), Some(at), first);
            self.clock.store(clock, Ordering::Relaxed);
            at
        });
        self.running.store(at, Ordering::SeqCst);
    }

    /// Who waits here. The caller holds the queue's lock.
    pub fn waits(&self, queue: &RunQueue) {
        self.first.store(queue.first().unwrap_or(NONE), Ordering::SeqCst);
        self.waiting.store(queue.len() as u32, Ordering::SeqCst);
    }

    /// Whether anybody waits here.
    pub fn has_waiting(&self) -> bool {
        self.first.load(Ordering::SeqCst) != NONE
    }
}

impl Default for Published {
    fn default() -> Self {
        Published::new()
    }
}

/// The policy of a machine, chosen once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Proportional share.
    #[default]
    Fair,
    /// Each vCPU keeps its CPU.
    Null,
}

impl Policy for Sharing {
    fn place(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        virtual_ns: u64,
        last: CpuId,
        affinity: Affinity,
    ) -> CpuId {
        match self {
            Sharing::Fair => Fair.place(cpus, virtual_ns, last, affinity),
            Sharing::Null => Null.place(cpus, virtual_ns, last, affinity),
        }
    }

    fn join(&self, virtual_ns: u64, queue: View, arrival: Arrival) -> u64 {
        match self {
            Sharing::Fair => Fair.join(virtual_ns, queue, arrival),
            Sharing::Null => Null.join(virtual_ns, queue, arrival),
        }
    }

    fn standing(&self, virtual_ns: u64, guaranteed: bool, ran_ns: u64) -> u64 {
        match self {
            Sharing::Fair => Fair.standing(virtual_ns, guaranteed, ran_ns),
            Sharing::Null => Null.standing(virtual_ns, guaranteed, ran_ns),
        }
    }

    fn preempts(&self, waiting: u64, running: u64, ran_ns: u64) -> Preempt {
        match self {
            Sharing::Fair => Fair.preempts(waiting, running, ran_ns),
            Sharing::Null => Null.preempts(waiting, running, ran_ns),
        }
    }

    fn slice_ns(&self) -> Option<u64> {
        match self {
            Sharing::Fair => Fair.slice_ns(),
            Sharing::Null => Null.slice_ns(),
        }
    }

    fn help(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        here: CpuId,
        own: Option<u64>,
    ) -> Option<CpuId> {
        match self {
            Sharing::Fair => Fair.help(cpus, here, own),
            Sharing::Null => Null.help(cpus, here, own),
        }
    }

    fn call_for_help(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        here: CpuId,
        first: u64,
        affinity: Affinity,
    ) -> Option<CpuId> {
        match self {
            Sharing::Fair => Fair.call_for_help(cpus, here, first, affinity),
            Sharing::Null => Null.call_for_help(cpus, here, first, affinity),
        }
    }
}

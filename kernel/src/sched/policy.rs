//! The scheduler's decisions, as pure functions of what CPUs show of themselves.
//!
//! Nothing here takes a lock, reads a clock or knows a vCPU: the caller (the hypervisor's CPUs, or the simulation of this
//! module's tests) keeps the queues and does as it is told. Times are nanoseconds; *virtual* times are nanoseconds of running
//! at the default weight. What vCPUs are compared by is their *standing*: their virtual time, unless they go before all others.
//!
//! Virtual times of all CPUs are comparable: a CPU whose next vCPU is ahead of one that waits elsewhere takes that one
//! instead ([`Policy::help`]), so three equal spinners on two CPUs get two thirds of a CPU each. Pinning and weights that one
//! CPU cannot satisfy drive virtual times apart for good; therefore a vCPU that joins a queue is brought to within bounds of
//! those that it competes with there ([`Policy::join`]).

use crate::platform::{CpuId, CpuSet};

/// Longest time a vCPU runs while another waits for its CPU.
pub const SLICE_NS: u64 = 10_000_000;
/// Shortest time a vCPU runs before one that woke takes its CPU away.
pub const SHORTEST_RUN_NS: u64 = 500_000;
/// How far behind its competitors a vCPU that slept may start: it is served soon and cannot save up more. Less than a slice, and one
/// that wants hardly more than it is due loses what it did not use while it happened to sleep longer.
pub const WAKE_BONUS_NS: u64 = SLICE_NS;
/// How far behind its new competitors a vCPU that comes from another CPU may be: of many that come, each goes before them for as
/// long.
pub const CLAIM_NS: u64 = 20_000_000;
/// How far ahead of its new competitors a vCPU may be, so that no debt from elsewhere starves it.
pub const LIMIT_NS: u64 = 100_000_000;
/// Standings up to this one are of those that have guaranteed time.
const LAST_GUARANTEED: u64 = 1;
/// How far behind one that waits elsewhere must be to be worth moving: less would move vCPUs at each switch.
pub const STEAL_NS: u64 = 5_000_000;

/// What a CPU shows of itself to others: hints, true a moment ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Standing of the vCPU that runs there, with what it has run until this moment; `None` for an idle CPU.
    pub running: Option<u64>,
    /// Standing of the vCPU that is next there.
    pub first: Option<u64>,
    /// The largest that the smallest virtual time there ever was; it never steps back ([`View::clock_after`]).
    pub clock: u64,
    /// How many wait there.
    pub waiting: u32,
}

impl View {
    /// Virtual time that a newcomer is measured against. Not the smallest that is there: each of many that come at once would be
    /// placed behind the one before, and the last would run until it has caught up with the first.
    fn floor(&self) -> u64 {
        Self::clock_after(self.clock, self.running, self.first)
    }

    /// The same, as a newcomer is measured: nobody competes with it on a CPU that idles, or runs somebody with guaranteed time, but those
    /// who wait elsewhere and may be fetched from there. Its clock stands still, theirs have gone on.
    #[must_use]
    pub fn among(self, all: impl Iterator<Item = View>) -> View {
        let contested = self.waiting != 0 || self.running.is_some_and(|standing| standing > LAST_GUARANTEED);
        if contested {
            return self;
        }
        View { clock: all.map(|view| view.floor()).fold(self.clock, u64::max), ..self }
    }

    /// The clock of a CPU where `running` runs and `first` waits. Who has guaranteed time does not count: its standing is no virtual
    /// time, and beside it the clock would stand still while the others' goes on.
    pub fn clock_after(clock: u64, running: Option<u64>, first: Option<u64>) -> u64 {
        let compete = |standing: &u64| *standing > LAST_GUARANTEED;
        running.into_iter().chain(first).filter(compete).min().map_or(clock, |least| clock.max(least))
    }

    /// What one that runs at `standing` is at, having run for `virtual_ns` since: guaranteed time advances nothing.
    pub fn advanced(standing: u64, virtual_ns: u64) -> u64 {
        if standing > LAST_GUARANTEED { standing.saturating_add(virtual_ns) } else { standing }
    }

    fn idle(&self) -> bool {
        self.running.is_none() && self.waiting == 0
    }
}

/// Where a vCPU may run, and where it would rather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// It runs nowhere else.
    pub hard: CpuSet,
    /// Preferred among these when there is a choice.
    pub soft: CpuSet,
}

impl Affinity {
    /// Anywhere.
    pub const ANY: Affinity = Affinity { hard: CpuSet::ALL, soft: CpuSet::ALL };

    /// Whether it may run on `cpu`.
    pub const fn allows(&self, cpu: CpuId) -> bool {
        self.hard.contains(cpu)
    }

    const fn prefers(&self, cpu: CpuId) -> bool {
        self.hard.contains(cpu) && self.soft.contains(cpu)
    }
}

/// How a vCPU comes to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It slept.
    Woken,
    /// It waited for another CPU.
    Moved,
}

/// What to do with the running vCPU when another waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preempt {
    /// It goes on until its slice ends.
    No,
    /// It runs this much longer.
    In(u64),
    /// It is put off.
    Now,
}

/// A way of sharing CPUs. `cpus` lists all CPUs that are up.
pub trait Policy {
    /// The CPU in whose queue a vCPU at `virtual_ns` that may run again waits; it ran on `last` before.
    fn place(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        virtual_ns: u64,
        last: CpuId,
        affinity: Affinity,
    ) -> CpuId;

    /// The virtual time at which a vCPU that stands at `virtual_ns` joins a queue. One that is put off by the CPU that it
    /// ran on keeps its own.
    fn join(&self, virtual_ns: u64, queue: View, arrival: Arrival) -> u64;

    /// What a vCPU at `virtual_ns` is compared by, if guaranteed time of its domain is left or not
    /// ([`Guarantee`](super::Guarantee)). `ran_ns` is how long it has run now; 0 for one that waits.
    fn standing(&self, virtual_ns: u64, guaranteed: bool, ran_ns: u64) -> u64;

    /// Whether one that waits at the standing `waiting` takes the CPU from one at `running` that ran for `ran_ns`.
    fn preempts(&self, waiting: u64, running: u64, ran_ns: u64) -> Preempt;

    /// How long a vCPU runs while others wait; `None` until it stops by itself.
    fn slice_ns(&self) -> Option<u64>;

    /// The CPU from which `here` takes the next vCPU rather than run its own, whose standing is `own` (`None`: nobody).
    fn help(&self, cpus: impl Iterator<Item = (CpuId, View)>, here: CpuId, own: Option<u64>)
    -> Option<CpuId>;

    /// The CPU that should be told to look around ([`Policy::help`]) because a vCPU at the standing `first` waits at `here`.
    fn call_for_help(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        here: CpuId,
        first: u64,
        affinity: Affinity,
    ) -> Option<CpuId>;
}

/// Proportional share by virtual run time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fair;

impl Policy for Fair {
    /// An idle CPU first (the last one used, a preferred one, any), else the one whose vCPU is furthest ahead.
    fn place(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        virtual_ns: u64,
        last: CpuId,
        affinity: Affinity,
    ) -> CpuId {
        // Larger is better; the first of equals is kept.
        let rank = |cpu: CpuId, view: &View| {
            let ahead = view.running.map_or(0, |running| running.saturating_sub(virtual_ns).min(LIMIT_NS));
            // A CPU that others wait for serves those first: each counts as a slice.
            let score =
                ahead.cast_signed().saturating_sub_unsigned(u64::from(view.waiting).saturating_mul(SLICE_NS));
            (view.idle(), affinity.prefers(cpu), view.idle() && cpu == last, score, cpu == last)
        };
        let mut best = None;
        for (cpu, view) in cpus.filter(|(cpu, _)| affinity.allows(*cpu)) {
            let rank = rank(cpu, &view);
            if best.is_none_or(|(_, other)| rank > other) {
                best = Some((cpu, rank));
            }
        }
        best.map_or(last, |(cpu, _)| cpu)
    }

    fn join(&self, virtual_ns: u64, queue: View, arrival: Arrival) -> u64 {
        let floor = queue.floor();
        let behind = match arrival {
            Arrival::Woken => WAKE_BONUS_NS,
            Arrival::Moved => CLAIM_NS,
        };
        virtual_ns.clamp(floor.saturating_sub(behind), floor.saturating_add(LIMIT_NS))
    }

    /// Those with guaranteed time first, in turn.
    fn standing(&self, virtual_ns: u64, guaranteed: bool, ran_ns: u64) -> u64 {
        if !guaranteed {
            virtual_ns.max(LAST_GUARANTEED + 1)
        } else if ran_ns < SLICE_NS {
            0
        } else {
            LAST_GUARANTEED
        }
    }

    fn preempts(&self, waiting: u64, running: u64, ran_ns: u64) -> Preempt {
        if waiting >= running {
            Preempt::No
        } else if ran_ns >= SHORTEST_RUN_NS {
            Preempt::Now
        } else {
            Preempt::In(SHORTEST_RUN_NS - ran_ns)
        }
    }

    fn slice_ns(&self) -> Option<u64> {
        Some(SLICE_NS)
    }

    fn help(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        here: CpuId,
        own: Option<u64>,
    ) -> Option<CpuId> {
        let worth = |first: u64| own.is_none_or(|own| first.saturating_add(STEAL_NS) < own);
        // One that was placed on an idle CPU runs there in a moment: it was put there for a reason.
        cpus.filter(|(cpu, view)| *cpu != here && !(view.running.is_none() && view.waiting <= 1))
            .filter_map(|(cpu, view)| view.first.filter(|first| worth(*first)).map(|first| (first, cpu)))
            .min()
            .map(|(_, cpu)| cpu)
    }

    fn call_for_help(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        here: CpuId,
        first: u64,
        affinity: Affinity,
    ) -> Option<CpuId> {
        let ahead = |view: &View| match view.running {
            None if view.waiting == 0 => Some(u64::MAX),
            None => None,
            Some(running) => Some(running).filter(|at| first.saturating_add(STEAL_NS) < *at),
        };
        cpus.filter(|(cpu, _)| *cpu != here && affinity.allows(*cpu))
            .filter_map(|(cpu, view)| ahead(&view).map(|at| (at, affinity.prefers(cpu), cpu)))
            .max()
            .map(|(_, _, cpu)| cpu)
    }
}

/// Each vCPU stays on one CPU and runs until it stops by itself: for machines with a CPU for each vCPU. vCPUs that share a
/// CPU all the same take turns when the one before blocks or yields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

impl Policy for Null {
    /// The CPU it had, while it may stay there; else the least used.
    fn place(
        &self,
        cpus: impl Iterator<Item = (CpuId, View)>,
        _virtual_ns: u64,
        last: CpuId,
        affinity: Affinity,
    ) -> CpuId {
        if affinity.allows(last) {
            return last;
        }
        cpus.filter(|(cpu, _)| affinity.allows(*cpu))
            .min_by_key(|(cpu, view)| (view.waiting + u32::from(view.running.is_some()), *cpu))
            .map_or(last, |(cpu, _)| cpu)
    }

    fn join(&self, virtual_ns: u64, _queue: View, _arrival: Arrival) -> u64 {
        virtual_ns
    }

    fn standing(&self, virtual_ns: u64, _guaranteed: bool, _ran_ns: u64) -> u64 {
        virtual_ns
    }

    fn preempts(&self, _waiting: u64, _running: u64, _ran_ns: u64) -> Preempt {
        Preempt::No
    }

    fn slice_ns(&self) -> Option<u64> {
        None
    }

    fn help(
        &self,
        _cpus: impl Iterator<Item = (CpuId, View)>,
        _here: CpuId,
        _own: Option<u64>,
    ) -> Option<CpuId> {
        None
    }

    fn call_for_help(
        &self,
        _cpus: impl Iterator<Item = (CpuId, View)>,
        _here: CpuId,
        _first: u64,
        _affinity: Affinity,
    ) -> Option<CpuId> {
        None
    }
}

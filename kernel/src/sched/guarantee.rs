//! Guaranteed time: so much of a CPU a domain gets before all others, whatever their number.
//!
//! Shares alone bound nothing: beside 64 that spin, one more is due a 65th of the CPU, and once it has used up what it is served in
//! advance, it waits for a slice of each. A guarantee is a bucket of running time, filled at its rate; what is drawn from it does not
//! advance the virtual clock, and as long as there is something in it, its domain goes before those that have none
//! ([`Policy::standing`](super::policy::Policy::standing)). What it needs beyond that it competes for by its weight.
//!
//! [`Guarantee`] is the policy, pure; [`DomainGuarantee`] is one for all CPUs.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::policy::{SHORTEST_RUN_NS, SLICE_NS};

/// The bucket holds the guaranteed part of so long a time.
const WINDOW_NS: u64 = 100_000_000;

/// A bucket of guaranteed running time. What is in it is told by when it is full again, so that it is one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guarantee {
    /// Percent of one CPU, 0 to 100; 0 for none.
    pub percent: u32,
    /// When it is full, in nanoseconds since boot.
    pub full_at_ns: u64,
}

impl Guarantee {
    fn size_ns(self) -> u64 {
        WINDOW_NS / 100 * u64::from(self.percent)
    }

    /// What is left at `now_ns`.
    pub fn left(self, now_ns: u64) -> u64 {
        let missing = self.full_at_ns.saturating_sub(now_ns) / 100 * u64::from(self.percent);
        self.size_ns().saturating_sub(missing)
    }

    /// Whether its domain goes before others at `now_ns`: with less left it would be put off at once.
    pub fn holds(self, now_ns: u64) -> bool {
        self.left(now_ns) >= SHORTEST_RUN_NS
    }

    /// Takes `ran_ns` of running that ended now out of it, as far as there is so much; returns the rest.
    #[must_use]
    pub fn draw(&mut self, ran_ns: u64, now_ns: u64) -> u64 {
        if self.percent == 0 {
            return ran_ns;
        }
        let drawn = ran_ns.min(self.left(now_ns));
        let time = (drawn * 100).div_ceil(u64::from(self.percent));
        self.full_at_ns = self.full_at_ns.max(now_ns).saturating_add(time);
        ran_ns - drawn
    }

    /// When there is enough in it to go before others for a slice, or as long as it ever can.
    pub fn again_ns(self, now_ns: u64) -> u64 {
        let missing = SLICE_NS.min(self.size_ns()).saturating_sub(self.left(now_ns));
        now_ns.saturating_add((missing * 100).div_ceil(u64::from(self.percent.max(1))))
    }
}

/// The guarantee of a domain, shared by the CPUs that run its vCPUs.
pub struct DomainGuarantee {
    percent: AtomicU32,
    full_at_ns: AtomicU64,
    /// When its vCPUs that wait by their weight go before others again; 0 when none does.
    due_ns: AtomicU64,
}

impl DomainGuarantee {
    /// None.
    pub const fn new() -> DomainGuarantee {
        DomainGuarantee {
            percent: AtomicU32::new(0),
            full_at_ns: AtomicU64::new(0),
            due_ns: AtomicU64::new(0),
        }
    }

    fn get(&self) -> Guarantee {
        Guarantee {
            percent: self.percent.load(Ordering::Relaxed),
            full_at_ns: self.full_at_ns.load(Ordering::Relaxed),
        }
    }

    /// Guarantees `percent` of one CPU, 100 at most; 0 for nothing.
    pub fn set(&self, percent: u32) {
        self.percent.store(percent.min(100), Ordering::Relaxed);
    }

    /// See [`Guarantee::holds`].
    pub fn holds(&self, now_ns: u64) -> bool {
        let guarantee = self.get();
        guarantee.percent != 0 && guarantee.holds(now_ns)
    }

    /// What is left at `now_ns`; `None` when its domain does not go before others.
    pub fn left(&self, now_ns: u64) -> Option<u64> {
        let guarantee = self.get();
        if guarantee.percent == 0 {
            return None;
        }
        Some(guarantee.left(now_ns)).filter(|left| *left >= SHORTEST_RUN_NS)
    }

    /// See [`Guarantee::draw`].
    pub fn draw(&self, ran_ns: u64, now_ns: u64) -> u64 {
        let percent = self.percent.load(Ordering::Relaxed);
        if percent == 0 {
            return ran_ns;
        }
        let mut rest = ran_ns;
        let drawn = |full_at_ns| {
            let mut guarantee = Guarantee { percent, full_at_ns };
            rest = guarantee.draw(ran_ns, now_ns);
            Some(guarantee.full_at_ns)
        };
        // The closure always gives a value.
        let _ = self.full_at_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, drawn);
        rest
    }

    /// One of its vCPUs waits by its weight from now on. True when the caller has to arm the domain's timer for when that ends.
    pub fn waits(&self, now_ns: u64) -> bool {
        let guarantee = self.get();
        if guarantee.percent == 0 {
            return false;
        }
        self.due_ns.store(guarantee.again_ns(now_ns).max(1), Ordering::SeqCst);
        true
    }

    /// When a wait by weight ends, in nanoseconds since boot.
    pub fn due_ns(&self) -> Option<u64> {
        Some(self.due_ns.load(Ordering::SeqCst)).filter(|at| *at != 0)
    }

    /// Whether such a wait is over at `now_ns`; the caller queues the domain's vCPUs anew.
    pub fn take_due(&self, now_ns: u64) -> bool {
        let due = |at: u64| (at != 0 && at <= now_ns).then_some(0);
        self.due_ns.fetch_update(Ordering::SeqCst, Ordering::SeqCst, due).is_ok()
    }
}

impl Default for DomainGuarantee {
    fn default() -> Self {
        DomainGuarantee::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn no_more_than_the_guaranteed_part_is_free() {
        for (percent, step) in [(50, MS), (25, 10 * MS), (100, MS / 3)] {
            let mut guarantee = Guarantee { percent, full_at_ns: 0 };
            let mut charged = 0;
            let steps = 10_000 * MS / step;
            for round in 1..=steps {
                charged += guarantee.draw(step, 1_000 * MS + round * step);
            }
            let ran = steps * step;
            // The bucket was full at first.
            let free = ran / 100 * u64::from(percent) + WINDOW_NS / 100 * u64::from(percent);
            assert!(
                (ran - charged).abs_diff(free.min(ran)) <= 2 * step,
                "{percent} %: {charged} of {ran} charged"
            );
        }
    }

    #[test]
    fn it_is_used_up_and_comes_back() {
        let mut guarantee = Guarantee { percent: 50, full_at_ns: 0 };
        let now = 1_000 * MS;
        assert!(guarantee.holds(now) && guarantee.left(now) == 50 * MS);
        assert_eq!(guarantee.draw(40 * MS, now), 0);
        assert_eq!(guarantee.draw(30 * MS, now), 20 * MS);
        assert!(!guarantee.holds(now) && guarantee.left(now) == 0);
        let again = guarantee.again_ns(now);
        assert_eq!(again, now + 20 * MS);
        assert!(guarantee.holds(again) && guarantee.left(again) == SLICE_NS);
        assert_eq!(guarantee.left(now + 100 * MS), 50 * MS);
        assert_eq!(guarantee.left(u64::MAX), 50 * MS);
    }

    #[test]
    fn a_domain_without_one_pays_for_everything() {
        let none = DomainGuarantee::new();
        assert!(!none.holds(5) && none.left(5).is_none() && !none.waits(5) && none.due_ns().is_none());
        assert_eq!(none.draw(7, 5), 7);
        let some = DomainGuarantee::new();
        some.set(1_000);
        assert_eq!((some.draw(150 * MS, 1_000 * MS), some.holds(1_000 * MS)), (50 * MS, false));
        assert!(some.waits(1_000 * MS) && !some.take_due(1_005 * MS) && some.take_due(1_010 * MS));
        assert!(!some.take_due(u64::MAX) && some.due_ns().is_none());
    }
}

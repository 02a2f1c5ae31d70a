//! Caps: at most so much of a CPU, however idle the machine is.
//!
//! [`Cap`] is the policy, pure. [`DomainCap`] is one for all CPUs: whoever charges the last of the bucket makes the domain wait, and
//! the timer of its first vCPU ends that ([`Hypervisor::end_cap_wait`](crate::hypervisor::Hypervisor::end_cap_wait)). A vCPU that waits
//! for its cap counts as runnable: the time is stolen from it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::sync::{RankedMutex, rank};

/// Time a domain may run in one go after it waited for its cap: shorter would switch at each moment.
const QUANTUM_NS: u64 = 5_000_000;
/// Unused time that a domain may save up, in nanoseconds of its capped rate.
const WINDOW_NS: u64 = 30_000_000;

/// What is left of a domain's capped time: a bucket that fills at the cap's rate. All its vCPUs draw from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cap {
    /// Percent of one CPU; 0 for no cap.
    percent: u32,
    /// Nanoseconds that may be run; below zero, what was run too much.
    left_ns: i64,
    /// When it was filled last.
    filled_ns: u64,
    /// Since when it is this cap: what was run before is not counted.
    set_ns: u64,
}

impl Cap {
    /// No cap.
    pub const NONE: Cap = Cap { percent: 0, left_ns: 0, filled_ns: 0, set_ns: 0 };

    /// At most `percent` of one CPU from now on (150: one and a half); 0 lifts the cap.
    pub fn set(&mut self, percent: u32, now_ns: u64) {
        let left_ns = Self::scaled(QUANTUM_NS, percent);
        *self = Cap { percent, left_ns, filled_ns: now_ns, set_ns: now_ns };
    }

    /// Percent of one CPU; 0 for no cap.
    pub const fn percent(&self) -> u32 {
        self.percent
    }

    /// Counts `ran_ns` of running that ended now.
    pub fn charge(&mut self, ran_ns: u64, now_ns: u64) {
        if self.percent != 0 {
            self.fill(now_ns);
            let ran_ns = ran_ns.min(now_ns.saturating_sub(self.set_ns));
            self.left_ns = self.left_ns.saturating_sub(i64::try_from(ran_ns).unwrap_or(i64::MAX));
        }
    }

    /// How long the domain may run now: `None` without a cap, `Some(0)` when it has to wait until [`Cap::again`].
    pub fn allowed(&mut self, now_ns: u64) -> Option<u64> {
        if self.percent == 0 {
            return None;
        }
        self.fill(now_ns);
        Some(u64::try_from(self.left_ns).unwrap_or(0))
    }

    /// When a domain that has to wait may run for a while again.
    pub fn again(&mut self, now_ns: u64) -> u64 {
        self.fill(now_ns);
        let missing =
            Self::scaled(QUANTUM_NS, self.percent.min(100)).saturating_sub(self.left_ns).max(0) as u64;
        now_ns.saturating_add((missing.saturating_mul(100)).div_ceil(u64::from(self.percent.max(1))))
    }

    fn fill(&mut self, now_ns: u64) {
        let passed = now_ns.saturating_sub(self.filled_ns);
        self.filled_ns = self.filled_ns.max(now_ns);
        let most = Self::scaled(WINDOW_NS, self.percent);
        self.left_ns = self.left_ns.saturating_add(Self::scaled(passed, self.percent)).min(most);
    }

    fn scaled(ns: u64, percent: u32) -> i64 {
        i64::try_from(u128::from(ns) * u128::from(percent) / 100).unwrap_or(i64::MAX)
    }
}

/// Shortest time that a capped vCPU is given: less goes into the switch.
const SHORTEST_SHARE_NS: u64 = 50_000;

/// The cap of a domain, shared by the CPUs that run its vCPUs.
pub struct DomainCap {
    cap: RankedMutex<Cap, { rank::CAP }>,
    /// The cap's percentage, for those who only ask whether there is one. Changed under the lock.
    percent: AtomicU32,
    /// When the domain may run again, in nanoseconds since boot; 0 when it may now. Changed under the lock.
    waits_until_ns: AtomicU64,
}

impl DomainCap {
    /// No cap.
    pub const fn new() -> DomainCap {
        DomainCap {
            cap: RankedMutex::new(Cap::NONE),
            percent: AtomicU32::new(0),
            waits_until_ns: AtomicU64::new(0),
        }
    }

    /// Percent of one CPU; 0 for no cap.
    pub fn percent(&self) -> u32 {
        self.percent.load(Ordering::Relaxed)
    }

    /// Whether the domain has used up what it may.
    pub fn waits(&self) -> bool {
        self.waits_until_ns.load(Ordering::SeqCst) != 0
    }

    /// When its wait ends, in nanoseconds since boot, if it waits.
    pub fn waits_until_ns(&self) -> Option<u64> {
        Some(self.waits_until_ns.load(Ordering::SeqCst)).filter(|at| *at != 0)
    }

    /// Changes the cap, or lifts it (0). A wait ends: the caller wakes the domain.
    pub fn set(&self, percent: u32, now_ns: u64) {
        let mut cap = self.cap.lock();
        cap.set(percent, now_ns);
        self.percent.store(percent, Ordering::Relaxed);
        self.waits_until_ns.store(0, Ordering::SeqCst);
    }

    /// Counts `ran_ns` of running that ended now. True when the domain has to wait from now on: the caller arms its timer.
    pub fn charge(&self, ran_ns: u64, now_ns: u64) -> bool {
        if self.percent() == 0 {
            return false;
        }
        let mut cap = self.cap.lock();
        cap.charge(ran_ns, now_ns);
        if self.waits() || cap.allowed(now_ns) != Some(0) {
            return false;
        }
        self.waits_until_ns.store(cap.again(now_ns).max(1), Ordering::SeqCst);
        true
    }

    /// How long one of `running` vCPUs of the domain may run from now on; `None` without a cap.
    pub fn share(&self, running: usize, now_ns: u64) -> Option<u64> {
        if self.percent() == 0 {
            return None;
        }
        let allowed = self.cap.lock().allowed(now_ns)?;
        Some((allowed / (running.max(1) as u64)).max(SHORTEST_SHARE_NS))
    }

    /// Ends a wait that is over at `now_ns`. True when it is: the caller wakes the domain. What other CPUs still charged after it
    /// began makes it longer.
    pub fn end_wait(&self, now_ns: u64) -> bool {
        if self.waits_until_ns().is_none_or(|until| until > now_ns) {
            return false;
        }
        let mut cap = self.cap.lock();
        let until = match cap.allowed(now_ns) {
            Some(0) => cap.again(now_ns),
            _ => 0,
        };
        self.waits_until_ns.store(until, Ordering::SeqCst);
        until == 0
    }
}

impl Default for DomainCap {
    fn default() -> Self {
        DomainCap::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_waits_once_and_until_all_debts_are_paid() {
        let cap = DomainCap::new();
        assert!(!cap.charge(u64::MAX, 5));
        cap.set(50, 0);
        // Two vCPUs share what there is.
        assert_eq!((cap.share(1, 0), cap.share(2, 0)), (Some(2_500_000), Some(1_250_000)));
        assert!(!cap.charge(1_000_000, 1_000_000) && cap.charge(6_000_000, 4_000_000));
        let until = cap.waits_until_ns().unwrap();
        assert!(cap.waits() && !cap.end_wait(until - 1));
        // The other vCPU ran on for a while.
        assert!(!cap.charge(8_000_000, until));
        assert!(!cap.end_wait(until) && cap.waits());
        let later = cap.waits_until_ns().unwrap();
        assert!(later >= until + 15_000_000, "{later}");
        assert!(cap.end_wait(later) && !cap.waits() && !cap.end_wait(later));
        assert!(cap.charge(1_000_000_000, later));
        cap.set(0, later);
        assert!(!cap.waits() && cap.share(1, later).is_none());
    }

    /// Runs greedily for `total_ns`, `step_ns` at a time, and returns how long it ran.
    fn greedy(percent: u32, step_ns: u64, total_ns: u64) -> u64 {
        let mut cap = Cap::NONE;
        cap.set(percent, 0);
        let (mut now, mut ran) = (0, 0);
        while now < total_ns {
            match cap.allowed(now) {
                Some(0) => now = cap.again(now).max(now + 1),
                _ => {
                    now += step_ns;
                    ran += step_ns;
                    cap.charge(step_ns, now);
                }
            }
        }
        ran
    }

    #[test]
    fn long_run_share_is_the_cap() {
        for percent in [1, 10, 25, 50, 75, 99] {
            for step in [100_000, 1_000_000, 10_000_000] {
                let total = 20_000_000_000;
                let (ran, due) = (greedy(percent, step, total), total / 100 * u64::from(percent));
                assert!(
                    ran.abs_diff(due) * 50 <= due,
                    "{percent} % in steps of {step}: ran {ran}, due {due}"
                );
            }
        }
    }

    #[test]
    fn sleep_saves_up_one_window_at_most() {
        let mut cap = Cap::NONE;
        cap.set(50, 0);
        assert_eq!(cap.allowed(3_600_000_000_000), Some(15_000_000));
    }

    #[test]
    fn no_cap_never_waits() {
        let mut cap = Cap::NONE;
        cap.charge(u64::MAX, u64::MAX);
        assert_eq!(cap.allowed(u64::MAX), None);
    }

    #[test]
    fn time_that_steps_back_gives_nothing() {
        let mut cap = Cap::NONE;
        cap.set(100, 900_000_000);
        cap.charge(50_000_000, 1_000_000_000);
        assert_eq!(cap.allowed(0), Some(0));
        assert_eq!(cap.allowed(1_000_000_000), Some(0));
    }

    #[test]
    fn what_ran_before_the_cap_is_not_counted() {
        let mut cap = Cap::NONE;
        cap.set(50, 100_000_000_000);
        cap.charge(100_000_000_000, 100_000_000_000 + 1_000_000);
        assert_eq!(cap.allowed(100_000_000_000 + 1_000_000), Some(2_500_000 + 500_000 - 1_000_000));
    }

    #[test]
    fn several_vcpus_share_a_cap_above_one_cpu() {
        let mut cap = Cap::NONE;
        cap.set(150, 0);
        // Three vCPUs run 10 ms each in the same 10 ms.
        for _ in 0..3 {
            cap.charge(10_000_000, 10_000_000);
        }
        assert_eq!(cap.allowed(10_000_000), Some(0));
        assert!(cap.again(10_000_000) > 10_000_000);
    }
}

//! Caps: at most so much of a CPU, however idle the machine is.

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
}

impl Cap {
    /// No cap.
    pub const NONE: Cap = Cap { percent: 0, left_ns: 0, filled_ns: 0 };

    /// At most `percent` of one CPU from now on (150: one and a half); 0 lifts the cap.
    pub fn set(&mut self, percent: u32, now_ns: u64) {
        let left_ns = Self::scaled(QUANTUM_NS, percent);
        *self = Cap { percent, left_ns, filled_ns: now_ns };
    }

    /// Percent of one CPU; 0 for no cap.
    pub const fn percent(&self) -> u32 {
        self.percent
    }

    /// Counts `ran_ns` of running that ended now.
    pub fn charge(&mut self, ran_ns: u64, now_ns: u64) {
        if self.percent != 0 {
            self.fill(now_ns);
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

#[cfg(test)]
mod tests {
    use super::*;

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
        cap.set(100, 1_000_000_000);
        cap.charge(50_000_000, 1_000_000_000);
        assert_eq!(cap.allowed(0), Some(0));
        assert_eq!(cap.allowed(1_000_000_000), Some(0));
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

//! What to do with a domain that has ended.

use core::fmt;
use hypercall_abi::sched::ShutdownReason;
use serde::Deserialize;

/// A run that ends sooner than this is a quick one, and a crash in it a failure to start.
const QUICK_NS: u64 = 10_000_000_000;
/// So many failures in a row, and the domain is not started again.
const MAX_FAILED: u32 = 3;
/// Shortest time between two starts. It doubles with each quick run behind another, up to the longest.
const SHORTEST_PAUSE_NS: u64 = 1_000_000_000;
const LONGEST_PAUSE_NS: u64 = 32_000_000_000;

/// What may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Give its memory back; its console's log stays.
    Destroy,
    /// The same, and build it anew.
    Restart,
    /// Leave it as it is, to be looked at, until `destroy`.
    Preserve,
}

impl Action {
    /// The action of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "destroy" => Some(Self::Destroy),
            "restart" => Some(Self::Restart),
            "preserve" => Some(Self::Preserve),
            _ => None,
        }
    }
}

/// What a description says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// After a crash, also one that a watchdog made.
    pub on_crash: Action,
    /// After it powered itself off.
    pub on_poweroff: Action,
    /// When it asked for a reboot.
    pub on_reboot: Action,
}

impl Default for Policy {
    fn default() -> Self {
        Self { on_crash: Action::Destroy, on_poweroff: Action::Destroy, on_reboot: Action::Restart }
    }
}

impl Policy {
    /// The same for a domain that is run once: what would be restarted is destroyed.
    #[must_use]
    pub fn without_restarts(self) -> Self {
        let once = |action| if action == Action::Restart { Action::Destroy } else { action };
        Self {
            on_crash: once(self.on_crash),
            on_poweroff: once(self.on_poweroff),
            on_reboot: once(self.on_reboot),
        }
    }
}

/// How a domain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending(pub u32);

impl Ending {
    /// The reason it gave, if it is a known one.
    #[must_use]
    pub fn reason(self) -> Option<ShutdownReason> {
        ShutdownReason::from_number(u64::from(self.0))
    }

    /// In one word, for programs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self.reason() {
            Some(ShutdownReason::Poweroff) => "poweroff",
            Some(ShutdownReason::Reboot) => "reboot",
            Some(ShutdownReason::Suspend) => "suspend",
            Some(ShutdownReason::Crash) => "crash",
            Some(ShutdownReason::Watchdog) => "watchdog",
            _ => "unknown",
        }
    }

    /// Whether it powered itself off.
    #[must_use]
    pub fn is_poweroff(self) -> bool {
        self.reason() == Some(ShutdownReason::Poweroff)
    }

    /// Whether it ended as it wanted.
    #[must_use]
    pub fn is_clean(self) -> bool {
        matches!(
            self.reason(),
            Some(ShutdownReason::Poweroff | ShutdownReason::Reboot | ShutdownReason::Suspend)
        )
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason() {
            Some(ShutdownReason::Poweroff) => f.pad("powered off"),
            Some(ShutdownReason::Reboot) => f.pad("rebooted"),
            Some(ShutdownReason::Suspend) => f.pad("suspended"),
            Some(ShutdownReason::Crash) => f.pad("crashed"),
            Some(ShutdownReason::Watchdog) => f.pad("stopped by its watchdog"),
            _ => write!(f, "ended with the unknown reason {}", self.0),
        }
    }
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// [`Action::Destroy`].
    Destroy,
    /// [`Action::Restart`], but not before this system time.
    Restart {
        /// ns.
        not_before_ns: u64,
    },
    /// [`Action::Preserve`].
    Preserve,
    /// It should be restarted but keeps failing at once: destroy it.
    GiveUp,
}

impl Decision {
    /// In one word, for programs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Destroy => "destroy",
            Self::Restart { .. } => "restart",
            Self::Preserve => "preserve",
            Self::GiveUp => "give-up",
        }
    }
}

/// Remembers how a domain's runs went.
#[derive(Clone, Debug, Default)]
pub struct Supervisor {
    /// Quick runs in a row.
    quick: u32,
    /// How many of them, from the last one back, were failures.
    failed: u32,
}

impl Supervisor {
    /// A run that began at `started_ns` has ended at `now_ns`.
    ///
    /// A guest that ends as it wants, however soon, does what it wants to do, and is started as often as it asks; but the sooner, the later.
    pub fn ended(&mut self, policy: &Policy, ending: Ending, started_ns: u64, now_ns: u64) -> Decision {
        let action = match ending.reason() {
            Some(ShutdownReason::Poweroff) => policy.on_poweroff,
            Some(ShutdownReason::Reboot) => policy.on_reboot,
            // Nothing here saves domains: who suspended itself waits to be looked at.
            Some(ShutdownReason::Suspend) => Action::Preserve,
            _ => policy.on_crash,
        };
        let quick = now_ns.saturating_sub(started_ns) < QUICK_NS;
        self.quick = if quick { self.quick.saturating_add(1) } else { 0 };
        self.failed = if quick && !ending.is_clean() { self.failed.saturating_add(1) } else { 0 };
        match action {
            Action::Destroy => Decision::Destroy,
            Action::Preserve => Decision::Preserve,
            Action::Restart if self.failed >= MAX_FAILED => Decision::GiveUp,
            Action::Restart => {
                let doubled = SHORTEST_PAUSE_NS.checked_shl(self.quick.saturating_sub(1)).unwrap_or(u64::MAX);
                Decision::Restart { not_before_ns: started_ns.saturating_add(doubled.min(LONGEST_PAUSE_NS)) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Decision, Ending, Policy, QUICK_NS, SHORTEST_PAUSE_NS as S, Supervisor};
    use alloc::vec::Vec;

    const CRASH: Ending = Ending(3);

    #[test]
    fn each_ending_has_its_action() {
        let policy = Policy { on_crash: Action::Preserve, ..Policy::default() };
        for (reason, decision) in [
            (0, Decision::Destroy),
            (1, Decision::Restart { not_before_ns: S }),
            (2, Decision::Preserve),
            (3, Decision::Preserve),
            (4, Decision::Preserve),
            (77, Decision::Preserve),
        ] {
            assert_eq!(Supervisor::default().ended(&policy, Ending(reason), 0, 1), decision, "{reason}");
        }
    }

    #[test]
    fn a_domain_that_keeps_crashing_is_given_up() {
        let mut supervisor = Supervisor::default();
        let policy = Policy { on_crash: Action::Restart, ..Policy::default() };
        let mut crash = |started_ns, now_ns| supervisor.ended(&policy, CRASH, started_ns, now_ns);
        let after = |ns| Decision::Restart { not_before_ns: ns };
        assert_eq!(crash(0, 1), after(S));
        assert_eq!(crash(S, S + 1), after(3 * S));
        // One good run, and the count begins anew.
        assert_eq!(crash(3 * S, 3 * S + QUICK_NS), after(4 * S));
        assert_eq!(crash(0, 1), after(S));
        assert_eq!(crash(S, 2 * S), after(3 * S));
        assert_eq!(crash(3 * S, 3 * S), Decision::GiveUp);
        // What is created again is started again.
        assert_eq!(Supervisor::default().ended(&policy, CRASH, 0, 1), after(S));
    }

    #[test]
    fn one_that_reboots_all_the_time_is_started_ever_later() {
        let mut supervisor = Supervisor::default();
        let pauses: Vec<u64> = (0..100)
            .map(|at| match supervisor.ended(&Policy::default(), Ending(1), at, at + 1) {
                Decision::Restart { not_before_ns } => (not_before_ns - at) / S,
                decision => panic!("{decision:?}"),
            })
            .collect();
        assert_eq!(pauses[..7], [1, 2, 4, 8, 16, 32, 32]);
        assert_eq!(pauses[99], 32);
        // A crash in between is the first of its row.
        let policy = Policy { on_crash: Action::Restart, ..Policy::default() };
        for ending in [CRASH, CRASH, Ending(1), CRASH, CRASH] {
            let decision = supervisor.ended(&policy, ending, 0, 1);
            assert_eq!(decision, Decision::Restart { not_before_ns: 32 * S });
        }
        assert_eq!(supervisor.ended(&policy, CRASH, 0, 1), Decision::GiveUp);
    }
}

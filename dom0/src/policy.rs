//! What to do with a domain that has ended.

use alloc::collections::VecDeque;
use core::fmt;
use hypercall_abi::sched::ShutdownReason;
use serde::Deserialize;

/// A run that ends sooner than this counts as a failure to start.
const QUICK_NS: u64 = 10_000_000_000;
/// So many of them in a row, and the domain is not started again.
const MAX_QUICK: usize = 3;

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
    /// [`Action::Restart`].
    Restart,
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
            Self::Restart => "restart",
            Self::Preserve => "preserve",
            Self::GiveUp => "give-up",
        }
    }
}

/// Remembers how a domain's runs went.
#[derive(Clone, Debug, Default)]
pub struct Supervisor {
    quick: VecDeque<u64>,
}

impl Supervisor {
    /// A run that began at `started_ns` has ended at `now_ns`.
    pub fn ended(&mut self, policy: &Policy, ending: Ending, started_ns: u64, now_ns: u64) -> Decision {
        let action = match ending.reason() {
            Some(ShutdownReason::Poweroff) => policy.on_poweroff,
            Some(ShutdownReason::Reboot) => policy.on_reboot,
            // Nothing here saves domains: who suspended itself waits to be looked at.
            Some(ShutdownReason::Suspend) => Action::Preserve,
            _ => policy.on_crash,
        };
        if ending.is_clean() || now_ns.saturating_sub(started_ns) >= QUICK_NS {
            self.quick.clear();
        } else {
            self.quick.push_back(now_ns);
        }
        match action {
            Action::Destroy => Decision::Destroy,
            Action::Preserve => Decision::Preserve,
            Action::Restart if self.quick.len() >= MAX_QUICK => Decision::GiveUp,
            Action::Restart => Decision::Restart,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Decision, Ending, Policy, QUICK_NS, Supervisor};

    const CRASH: Ending = Ending(3);

    #[test]
    fn each_ending_has_its_action() {
        let mut supervisor = Supervisor::default();
        let policy = Policy { on_crash: Action::Preserve, ..Policy::default() };
        for (reason, decision) in [
            (0, Decision::Destroy),
            (1, Decision::Restart),
            (2, Decision::Preserve),
            (3, Decision::Preserve),
            (4, Decision::Preserve),
            (77, Decision::Preserve),
        ] {
            assert_eq!(supervisor.ended(&policy, Ending(reason), 0, 1), decision, "{reason}");
        }
    }

    #[test]
    fn a_domain_that_keeps_crashing_is_given_up() {
        let mut supervisor = Supervisor::default();
        let policy = Policy { on_crash: Action::Restart, ..Policy::default() };
        assert_eq!(supervisor.ended(&policy, CRASH, 0, 1), Decision::Restart);
        assert_eq!(supervisor.ended(&policy, CRASH, 1, 2), Decision::Restart);
        // One good run, and the count begins anew.
        assert_eq!(supervisor.ended(&policy, CRASH, 2, 2 + QUICK_NS), Decision::Restart);
        assert_eq!(supervisor.ended(&policy, CRASH, 0, 1), Decision::Restart);
        assert_eq!(supervisor.ended(&policy, CRASH, 1, 2), Decision::Restart);
        assert_eq!(supervisor.ended(&policy, CRASH, 2, 3), Decision::GiveUp);
        // A guest that reboots all the time does what it wants to do.
        for at in 0..100 {
            assert_eq!(supervisor.ended(&policy, Ending(1), at, at + 1), Decision::Restart);
        }
    }
}

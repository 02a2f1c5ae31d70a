//! Where a vCPU's time went: running, runnable (stolen), blocked, offline.

/// State of a vCPU, with the numbers of the ABI's `RUNSTATE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RunStateKind {
    /// On a CPU.
    Running = 0,
    /// Waits for a CPU.
    Runnable = 1,
    /// Waits for an event.
    Blocked = 2,
    /// Down or paused.
    Offline = 3,
}

/// Time spent in each state, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct RunState {
    /// The state now.
    pub state: RunStateKind,
    /// When it was entered, in nanoseconds since boot.
    pub entered_ns: u64,
    /// Time spent in each state up to `entered_ns`.
    pub times_ns: [u64; 4],
}

impl RunState {
    /// Offline since boot.
    pub const fn new() -> RunState {
        RunState { state: RunStateKind::Offline, entered_ns: 0, times_ns: [0; 4] }
    }

    /// Enters `state` at `now_ns`.
    pub fn change(&mut self, state: RunStateKind, now_ns: u64) {
        self.times_ns[self.state as usize] += now_ns.saturating_sub(self.entered_ns);
        self.state = state;
        self.entered_ns = self.entered_ns.max(now_ns);
    }

    /// Times up to `now_ns`, the running state's included.
    pub fn times_at(&self, now_ns: u64) -> [u64; 4] {
        let mut times = self.times_ns;
        times[self.state as usize] += now_ns.saturating_sub(self.entered_ns);
        times
    }
}

impl Default for RunState {
    fn default() -> Self {
        RunState::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_add_up_to_the_age() {
        let mut r = RunState::new();
        r.change(RunStateKind::Runnable, 10);
        r.change(RunStateKind::Running, 25);
        r.change(RunStateKind::Blocked, 100);
        assert_eq!(r.times_at(130), [75, 15, 30, 10]);
        assert_eq!(r.times_at(130).iter().sum::<u64>(), 130);
    }
}

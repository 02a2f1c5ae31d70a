//! The local APIC's timer as one that fires once: by its own counter, or at a value of the time-stamp counter (Intel SDM 3,
//! 11.5.4 and 11.5.4.1).
//!
//! The rules of the second, the *TSC deadline*:
//! - The mode is bits 17 and 18 of the LVT entry. A write of the register IA32_TSC_DEADLINE in another mode is lost; so is a write of the
//!   initial count in this one. Changing the mode disarms the timer.
//! - In xAPIC mode the entry is memory, and a later WRMSR may overtake the store: an MFENCE goes between. In x2APIC mode both are
//!   registers, and the processor keeps their order.
//! - A deadline that has passed fires at once. 0 disarms; the register reads 0 after it has fired.
//!
//! It needs a TSC that runs while the processor sleeps, so it is used only where the TSC is marked invariant.

use super::clock::ticks_in;

/// Mode bits of the LVT entry: at a deadline.
const MODE_DEADLINE: u32 = 2 << 17;

/// The registers behind the timer.
pub trait TimerRegisters {
    /// Writes the entry of the local vector table: vector and mode.
    fn write_entry(&mut self, value: u32);
    /// Writes the initial count: starts the counter, 0 stops it.
    fn write_count(&mut self, value: u32);
    /// Writes IA32_TSC_DEADLINE.
    fn write_deadline(&mut self, value: u64);
    /// Completes all stores before all that follows (MFENCE).
    fn fence(&mut self);
    /// The processor's time-stamp counter.
    fn tsc(&self) -> u64;
}

/// How the timer of all processors is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// Its own counter.
    Count {
        /// Ticks of it per second.
        hz: u64,
    },
    /// At a value of the time-stamp counter.
    Deadline {
        /// Ticks of that per second.
        tsc_hz: u64,
    },
}

impl Timer {
    /// The deadline where the processor has it and the TSC goes on in its sleep, the counter elsewhere.
    #[must_use]
    pub fn choose(has_deadline: bool, tsc_is_invariant: bool, tsc_hz: u64, hz: u64) -> Timer {
        if has_deadline && tsc_is_invariant { Timer::Deadline { tsc_hz } } else { Timer::Count { hz } }
    }

    /// Readies the timer of this processor, disarmed.
    pub fn start(self, registers: &mut impl TimerRegisters, vector: u8) {
        // From whatever mode it was in: its count is stopped in the mode in which that is not lost.
        registers.write_entry(u32::from(vector));
        registers.write_count(0);
        if let Timer::Deadline { .. } = self {
            registers.write_entry(MODE_DEADLINE | u32::from(vector));
            registers.fence();
            registers.write_deadline(0);
        }
    }

    /// Fires in `ns` nanoseconds, never before; sooner when that is further off than it can count, and the caller sets it again. None
    /// disarms it.
    pub fn set(self, registers: &mut impl TimerRegisters, ns: Option<u64>) {
        match self {
            Timer::Count { hz } => {
                let count = ns.map_or(0, |ns| ticks_in(ns, hz).clamp(1, u64::from(u32::MAX)));
                registers.write_count(count as u32);
            }
            Timer::Deadline { tsc_hz } => {
                // Never 0, which would disarm it; near the end of the counter's range it is as far as it goes.
                let at = ns.map_or(0, |ns| registers.tsc().saturating_add(ticks_in(ns, tsc_hz)).max(1));
                registers.write_deadline(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTOR: u8 = 0xfa;

    /// One processor's timer, with one APIC tick for each four of the TSC.
    #[derive(Default)]
    struct Sim {
        x2apic: bool,
        tsc: u64,
        entry: u32,
        /// An entry that was stored to memory and has not arrived.
        stored: Option<u32>,
        /// TSC at which the counter reaches 0.
        count_at: Option<u64>,
        deadline: u64,
        fired: u32,
    }

    impl Sim {
        fn arrive(&mut self, entry: u32) {
            if entry >> 17 & 3 != self.entry >> 17 & 3 {
                self.count_at = None;
                self.deadline = 0;
            }
            self.entry = entry;
        }
        fn is_deadline(&self) -> bool {
            self.entry >> 17 & 3 == 2
        }
        /// Time passes; the store of an entry arrives at last.
        fn run(&mut self, ticks: u64) -> u32 {
            if let Some(entry) = self.stored.take() {
                self.arrive(entry);
            }
            self.tsc += ticks;
            let due = |at: u64| at <= self.tsc;
            let fires = self.count_at.is_some_and(due) || self.deadline != 0 && due(self.deadline);
            if fires {
                assert_eq!(self.entry & 0x1_00ff, u32::from(VECTOR), "masked, or another vector");
                (self.count_at, self.deadline) = (None, 0);
            }
            self.fired += u32::from(fires);
            u32::from(fires)
        }
    }

    impl TimerRegisters for Sim {
        fn write_entry(&mut self, value: u32) {
            if self.x2apic {
                self.arrive(value);
            } else {
                // Stores to one device stay in order among themselves.
                if let Some(entry) = self.stored.replace(value) {
                    self.arrive(entry);
                }
            }
        }
        fn write_count(&mut self, value: u32) {
            if let Some(entry) = self.stored.take() {
                self.arrive(entry);
            }
            if !self.is_deadline() {
                self.count_at = (value != 0).then(|| self.tsc + 4 * u64::from(value));
            }
        }
        fn write_deadline(&mut self, value: u64) {
            // The store before has not arrived yet.
            if self.is_deadline() {
                self.deadline = value;
            }
        }
        fn fence(&mut self) {
            if let Some(entry) = self.stored.take() {
                self.arrive(entry);
            }
        }
        fn tsc(&self) -> u64 {
            self.tsc
        }
    }

    /// Each kind of timer in each mode of the APIC, at 2 GHz, left over from firmware as a periodic one that counts.
    fn each(check: impl Fn(Timer, &mut Sim)) {
        for timer in [Timer::Count { hz: 500_000_000 }, Timer::Deadline { tsc_hz: 2_000_000_000 }] {
            for x2apic in [false, true] {
                for left in [VECTOR.into(), 1 << 17 | 0x20, MODE_DEADLINE | 0x20] {
                    let mut sim = Sim { x2apic, tsc: 1 << 40, entry: left, ..Sim::default() };
                    match left == MODE_DEADLINE | 0x20 {
                        true => sim.deadline = sim.tsc + 3,
                        false => sim.count_at = Some(sim.tsc + 3),
                    }
                    timer.start(&mut sim, VECTOR);
                    assert_eq!(sim.run(1_000), 0, "what firmware armed is disarmed");
                    check(timer, &mut sim);
                }
            }
        }
    }

    #[test]
    fn it_fires_once_and_not_early() {
        each(|timer, sim| {
            for ns in [1, 2, 3, 1_000, 999_999_999] {
                timer.set(sim, Some(ns));
                assert_eq!(sim.run(2 * ns - 1), 0, "{timer:?}: early for {ns} ns");
                assert_eq!(sim.run(4), 1, "{timer:?}: {ns} ns");
                assert_eq!(sim.run(u64::from(u32::MAX) * 8), 0, "{timer:?}: again");
            }
        });
    }

    #[test]
    fn what_is_due_fires_at_once() {
        each(|timer, sim| {
            timer.set(sim, Some(0));
            assert_eq!(sim.run(4), 1, "{timer:?}");
        });
    }

    #[test]
    fn a_later_deadline_replaces_an_earlier_one_and_none_disarms() {
        each(|timer, sim| {
            timer.set(sim, Some(100));
            timer.set(sim, Some(1_000));
            assert_eq!(sim.run(1_000), 0, "{timer:?}");
            assert_eq!(sim.run(1_004), 1, "{timer:?}");
            timer.set(sim, Some(100));
            timer.set(sim, None);
            assert_eq!(sim.run(1_000_000), 0, "{timer:?}");
        });
    }

    #[test]
    fn what_is_too_far_off_fires_sooner_or_never_early() {
        each(|timer, sim| {
            timer.set(sim, Some(u64::MAX));
            let end = u64::from(u32::MAX) * 4;
            assert_eq!(sim.run(end - 4), 0, "{timer:?}");
            assert_eq!(
                sim.run(8),
                u32::from(timer != Timer::Deadline { tsc_hz: 2_000_000_000 }),
                "{timer:?}"
            );
        });
    }

    #[test]
    fn without_the_fence_the_first_deadline_would_be_lost() {
        struct NoFence(Sim);
        impl TimerRegisters for NoFence {
            fn write_entry(&mut self, value: u32) {
                self.0.write_entry(value);
            }
            fn write_count(&mut self, value: u32) {
                self.0.write_count(value);
            }
            fn write_deadline(&mut self, value: u64) {
                self.0.write_deadline(value);
            }
            fn fence(&mut self) {}
            fn tsc(&self) -> u64 {
                self.0.tsc()
            }
        }
        let timer = Timer::Deadline { tsc_hz: 2_000_000_000 };
        let fires = |sim: &mut NoFence| {
            timer.start(sim, VECTOR);
            timer.set(sim, Some(100));
            sim.0.run(1_000)
        };
        assert_eq!(fires(&mut NoFence(Sim::default())), 0, "the model shows what the fence is for");
        assert_eq!(fires(&mut NoFence(Sim { x2apic: true, ..Sim::default() })), 1);
    }

    #[test]
    fn the_deadline_is_for_a_tsc_that_never_stops() {
        let count = Timer::Count { hz: 7 };
        assert_eq!(Timer::choose(true, true, 9, 7), Timer::Deadline { tsc_hz: 9 });
        for (has, invariant) in [(true, false), (false, true), (false, false)] {
            assert_eq!(Timer::choose(has, invariant, 9, 7), count);
        }
    }
}

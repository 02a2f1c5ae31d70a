//! Counters that tell the time: which there are, how fast they are, which of them is the clock. Pure; `arch` reads the registers.

use super::clock::PM_TIMER_HZ;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Ticks per second of the PC's interval timer (8254).
pub const PIT_HZ: u64 = 1_193_182;
/// Longest period that a HPET may have (IA-PC HPET 1.0a, 2.3.4), in femtoseconds; and the shortest that is no nonsense.
const HPET_PERIODS: core::ops::RangeInclusive<u64> = 100_000..=100_000_000;
/// Frequencies of a time-stamp counter that are no nonsense.
const TSC_FREQUENCIES: core::ops::RangeInclusive<u64> = 10_000_000..=50_000_000_000;
/// Two references that are this far apart contradict each other.
const CONTRADICTION_PPM: u64 = 1_000;

/// A counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The processors' time-stamp counters.
    Tsc,
    /// The high-precision event timer.
    Hpet,
    /// ACPI's power-management timer.
    PmTimer,
    /// Channel 2 of the interval timer: to calibrate with, never a clock.
    Pit,
}

impl core::fmt::Display for Source {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Source::Tsc => "TSC",
            Source::Hpet => "HPET",
            Source::PmTimer => "ACPI PM timer",
            Source::Pit => "PIT",
        })
    }
}

/// A counter whose frequency is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Which one.
    pub source: Source,
    /// Its ticks per second.
    pub hz: u64,
    /// How many bits it counts before it wraps, at most 32.
    pub bits: u32,
}

impl Reference {
    /// The HPET by its capabilities register; `None` when what it says of itself cannot be.
    #[must_use]
    pub fn hpet(capabilities: u64) -> Option<Reference> {
        let period_fs = capabilities >> 32;
        // Bits 0-7: revision, never 0. Ones everywhere: there is nothing.
        if capabilities & 0xff == 0 || capabilities == u64::MAX || !HPET_PERIODS.contains(&period_fs) {
            return None;
        }
        // Only the lower half is read, also of one that counts 64 bits: two reads of halves could tear.
        Some(Reference { source: Source::Hpet, hz: 1_000_000_000_000_000 / period_fs, bits: 32 })
    }

    /// The power-management timer.
    #[must_use]
    pub fn pm_timer(wide: bool) -> Reference {
        Reference { source: Source::PmTimer, hz: PM_TIMER_HZ, bits: if wide { 32 } else { 24 } }
    }

    /// The interval timer.
    #[must_use]
    pub fn pit() -> Reference {
        Reference { source: Source::Pit, hz: PIT_HZ, bits: 16 }
    }

    /// The largest value before it wraps.
    #[must_use]
    pub fn mask(self) -> u64 {
        (1u64 << self.bits.min(63)) - 1
    }

    /// Nanoseconds until it has wrapped half way round: to be read once in that time.
    #[must_use]
    pub fn half_wrap_ns(self) -> u64 {
        (u128::from(self.mask() / 2) * 1_000_000_000 / u128::from(self.hz.max(1))) as u64
    }

    /// Ticks between two readings less than a wrap apart.
    #[must_use]
    pub fn elapsed(self, from: u64, to: u64) -> u64 {
        to.wrapping_sub(from) & self.mask()
    }
}

/// The moment of a tick of a reference, as the time-stamp counter saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The reference after the tick.
    pub reference: u64,
    /// The time-stamp counter before the tick, and after it: the nearer, the better the sample.
    pub before: u64,
    /// See `before`.
    pub after: u64,
    /// The local APIC's timer, in ticks since it was started.
    pub local: u32,
}

impl Sample {
    /// For how many ticks of the time-stamp counter the moment is not known.
    #[must_use]
    pub fn width(self) -> u64 {
        self.after.saturating_sub(self.before)
    }
}

/// A frequency that was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// By what.
    pub by: Reference,
    /// Ticks of the time-stamp counter per second.
    pub hz: u64,
    /// Ticks of the local APIC's timer per second.
    pub local_hz: u64,
    /// How long it took.
    pub ns: u64,
    /// How wrong `hz` may be, in parts per million.
    pub error_ppm: u64,
}

/// What two samples say; `None` when they say nothing, or nonsense.
#[must_use]
pub fn measure(by: Reference, from: Sample, to: Sample) -> Option<Measurement> {
    let ticks = by.elapsed(from.reference, to.reference);
    if ticks == 0 || from.after > to.before || from.before > from.after || to.before > to.after {
        return None;
    }
    let per_second =
        |count: u64| u64::try_from(u128::from(count) * u128::from(by.hz) / u128::from(ticks)).ok();
    let counted = to.after - from.after;
    let hz = per_second(counted).filter(|hz| TSC_FREQUENCIES.contains(hz))?;
    // The edges of two ticks, each somewhere in its sample.
    let error_ppm = (from.width() + to.width()).saturating_mul(1_000_000) / counted.max(1);
    let ns = u64::try_from(u128::from(ticks) * 1_000_000_000 / u128::from(by.hz.max(1))).ok()?;
    let local_hz = per_second(u64::from(to.local.checked_sub(from.local)?))?;
    Some(Measurement { by, hz, local_hz, ns, error_ppm })
}

/// Which of two measurements of one counter to believe, and whether they contradict each other. The power-management timer's
/// frequency is fixed; a HPET's is what firmware made it say.
#[must_use]
pub fn believe(first: Measurement, second: Option<Measurement>) -> (Measurement, bool) {
    let Some(second) = second else { return (first, false) };
    let apart = u128::from(first.hz.abs_diff(second.hz)) * 1_000_000 / u128::from(first.hz.max(1));
    if apart <= u128::from(CONTRADICTION_PPM + first.error_ppm + second.error_ppm) {
        return (first, false);
    }
    (if second.by.source == Source::PmTimer { second } else { first }, true)
}

/// A counter of few bits as one of 64 that never steps back, whichever CPU reads it.
///
/// It is read at least once in a wrap. The last value that was noted is loaded *before* the counter is read, so the counter is at
/// or behind it, by less than a wrap. `models` shows which orders of the accesses that takes.
pub struct Extended {
    noted: AtomicU64,
    mask: u64,
}

impl Extended {
    /// From the reading `now` on.
    #[must_use]
    pub fn new(mask: u64, now: u64) -> Extended {
        Extended { noted: AtomicU64::new(now & mask), mask }
    }

    /// The value now; `read` reads the counter.
    pub fn now(&self, read: impl FnOnce() -> u64) -> u64 {
        let noted = self.noted.load(Ordering::Acquire);
        let ahead = read().wrapping_sub(noted) & self.mask;
        let now = noted.wrapping_add(ahead);
        // Not each time: the word is all CPUs'.
        if ahead > self.mask / 8 {
            self.noted.fetch_max(now, Ordering::AcqRel);
        }
        now
    }
}

/// What is known of the time-stamp counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFacts {
    /// The processor says that they run at one rate in all states (CPUID 0x80000007, EDX bit 8).
    pub invariant: bool,
    /// There is a hypervisor below us (CPUID 1, ECX bit 31).
    pub virtual_machine: bool,
    /// Those of all processors run alike.
    pub agree: bool,
}

/// Why a clock was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The operator said so.
    Wanted,
    /// It is the best there is.
    Best,
    /// What the operator wants is not there.
    WantedIsMissing,
    /// The TSC is not marked invariant, as in virtual machines that may be moved to another host; while they are not, it is.
    VirtualMachine,
    /// The TSC may change its rate.
    TscMayChange,
    /// Those of two processors do not run alike.
    TscsDiffer,
    /// There is nothing else.
    NothingElse,
}

/// Which counter is the clock: what the operator wants if it is there, the TSC if it can be trusted, the HPET, the PM timer.
#[must_use]
pub fn choose(wanted: Option<Source>, tsc: TscFacts, hpet: bool, pm_timer: bool) -> (Source, Reason) {
    let there = |source| match source {
        Source::Tsc => true,
        Source::Hpet => hpet,
        Source::PmTimer => pm_timer,
        Source::Pit => false,
    };
    let missing = match wanted {
        Some(source) if there(source) => return (source, Reason::Wanted),
        Some(_) => true,
        None => false,
    };
    let because = |reason| if missing { Reason::WantedIsMissing } else { reason };
    let reason = match tsc {
        TscFacts { agree: false, .. } => Reason::TscsDiffer,
        TscFacts { invariant: true, .. } => return (Source::Tsc, because(Reason::Best)),
        TscFacts { virtual_machine: true, .. } => return (Source::Tsc, because(Reason::VirtualMachine)),
        _ => Reason::TscMayChange,
    };
    match [Source::Hpet, Source::PmTimer].into_iter().find(|source| there(*source)) {
        Some(source) => (source, because(reason)),
        None => (Source::Tsc, because(Reason::NothingElse)),
    }
}

/// How one processor's time-stamp counter differs from the boot processor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skew {
    /// By nothing that can be seen.
    None,
    /// By so many ticks, known to so many.
    Offset {
        /// Theirs minus ours, modulo 2^64.
        ticks: u64,
        /// Half the shortest way there and back.
        within: u64,
    },
    /// By different amounts: they do not run at one rate, or were written in between.
    Unsteady,
}

/// Readings of the other's counter, each between two of ours.
///
/// Each exchange bounds the difference from both sides; all of them together bound it best, and contradict each other when there is no
/// one difference. Its middle is wrong by half the shortest round trip at most, and no message between the two processors is
/// faster than that: so nobody sees time step back by it.
#[derive(Clone, Copy, Debug)]
pub struct Exchanges {
    /// The difference lies between these.
    low: i64,
    high: i64,
}

impl Exchanges {
    /// Nothing is known.
    #[must_use]
    pub const fn new() -> Exchanges {
        Exchanges { low: i64::MIN, high: i64::MAX }
    }

    /// We read `before`, then the other read `theirs`, then we read `after`.
    pub fn add(&mut self, before: u64, theirs: u64, after: u64) {
        self.low = self.low.max(theirs.wrapping_sub(after) as i64);
        self.high = self.high.min(theirs.wrapping_sub(before) as i64);
    }

    /// What they show.
    #[must_use]
    pub fn skew(self) -> Skew {
        if self.low > self.high {
            return Skew::Unsteady;
        }
        if (self.low..=self.high).contains(&0) {
            return Skew::None;
        }
        let within = self.high.abs_diff(self.low) / 2;
        Skew::Offset { ticks: (self.low as u64).wrapping_add(within), within }
    }
}

impl Default for Exchanges {
    fn default() -> Self {
        Exchanges::new()
    }
}

/// [`Extended`] under every order of accesses that the memory model allows (`cargo xtask test --filter loom`).
#[cfg(all(loom, test))]
mod models {
    use super::*;
    use crate::sync::atomic::model::needed;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn no_reader_of_a_narrow_counter_sees_it_step_back() {
        let needed = needed("clocksource.rs", include_str!("clocksource.rs"), || {
            // Three bits, about to wrap; each note counts (`mask / 8` is 0).
            let world = Arc::new((AtomicU64::new(6), Extended::new(7, 6)));
            let other = {
                let world = world.clone();
                thread::spawn(move || {
                    // Time goes on, and this one sees it first.
                    for tick in 7..10 {
                        world.0.store(tick & 7, Ordering::Relaxed);
                        assert_eq!(world.1.now(|| world.0.load(Ordering::Relaxed)), tick);
                    }
                })
            };
            let mut last = 6;
            for _ in 0..2 {
                let now = world.1.now(|| world.0.load(Ordering::Relaxed));
                assert!((last..10).contains(&now), "{now} after {last}");
                last = now;
            }
            other.join().unwrap();
        });
        // Whoever sees a note sees the tick that it is of.
        assert_eq!(
            needed,
            [
                "let noted = self.noted.load(Ordering::Acquire);",
                "self.noted.fetch_max(now, Ordering::AcqRel);"
            ]
        );
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const HPET: Reference = Reference { source: Source::Hpet, hz: 100_000_000, bits: 32 };
    const PM: Reference = Reference { source: Source::PmTimer, hz: PM_TIMER_HZ, bits: 24 };

    #[test]
    fn a_hpet_that_says_nonsense_is_none() {
        let capabilities = |period: u64| period << 32 | 0x8086_a201;
        assert_eq!(Reference::hpet(capabilities(10_000_000)), Some(HPET), "QEMU's");
        assert_eq!(Reference::hpet(capabilities(69_841_279)).map(|r| r.hz), Some(14_318_179));
        for bad in [0, 1, 99_999, 100_000_001, u64::from(u32::MAX)] {
            assert_eq!(Reference::hpet(capabilities(bad)), None, "a period of {bad} fs");
        }
        assert_eq!(Reference::hpet(u64::MAX), None, "nobody answers");
        assert_eq!(Reference::hpet(10_000_000 << 32), None, "revision 0");
    }

    #[test]
    fn frequencies_are_measured_over_a_wrap() {
        let from = Sample { reference: 0xff_fff0, before: 990, after: 1_000, local: 5 };
        // 35796 ticks are 10.00015 ms.
        let to = Sample {
            reference: (0xff_fff0 + 35_796) & 0xff_ffff,
            before: 25_000_990,
            after: 25_001_000,
            local: 10_000_005,
        };
        let m = measure(PM, from, to).unwrap();
        assert!(m.hz.abs_diff(2_499_961_587) < 1_000, "{m:?}");
        assert!(m.local_hz.abs_diff(999_984_635) < 1_000, "{m:?}");
        assert_eq!((m.ns / 1000, m.error_ppm), (10_000, 0));
        let wide = Sample { before: to.after - 25_000, ..to };
        assert_eq!(measure(PM, from, wide).map(|m| m.error_ppm), Some(1_000), "it does not know better");
    }

    #[test]
    fn absurd_measurements_are_none() {
        let from = Sample { reference: 0, before: 0, after: 0, local: 0 };
        let to = Sample { reference: 1_000_000, before: 30_000_000, after: 30_000_000, local: 1_000_000 };
        assert!(measure(HPET, from, to).is_some());
        assert_eq!(measure(HPET, from, Sample { reference: 0, ..to }), None, "the reference stands still");
        assert_eq!(measure(HPET, from, Sample { before: 1, after: 1, ..to }), None, "the TSC nearly does");
        assert_eq!(measure(HPET, from, Sample { before: 1 << 50, after: 1 << 50, ..to }), None, "it races");
        assert_eq!(
            measure(HPET, Sample { before: 1 << 40, after: 1 << 40, ..from }, to),
            None,
            "it steps back"
        );
        assert_eq!(measure(HPET, Sample { local: 2_000_000, ..from }, to), None, "the APIC's steps back");
        assert_eq!(measure(HPET, from, Sample { before: 9, after: 3, ..to }), None);
        let edge = Sample { reference: u64::MAX, before: u64::MAX, after: u64::MAX, local: u32::MAX };
        let _ = (measure(HPET, edge, edge), measure(HPET, from, edge), measure(PM, edge, to));
    }

    #[test]
    fn of_two_that_contradict_the_fixed_one_is_believed() {
        let m = |by, hz, error_ppm| Measurement { by, hz, local_hz: 1, ns: 1, error_ppm };
        let hpet = m(HPET, 2_500_000_000, 100);
        assert_eq!(believe(hpet, None), (hpet, false));
        assert_eq!(believe(hpet, Some(m(PM, 2_502_000_000, 100))), (hpet, false), "800 ppm");
        let pm = m(PM, 2_510_000_000, 100);
        assert_eq!(believe(hpet, Some(pm)), (pm, true));
    }

    #[test]
    fn a_narrow_counter_becomes_a_wide_one_over_many_wraps() {
        let counter = Extended::new(0xff_ffff, 0x1_00ff_0000);
        let mut time = 0x00ff_0000u64;
        for step in (0..10_000u64).map(|n| n * 7_919 % 0xf0_0000) {
            time += step;
            assert_eq!(counter.now(|| time & 0xff_ffff), time);
        }
        assert!(time > 1 << 34);
    }

    #[test]
    fn the_clock_is_the_best_that_can_be_trusted() {
        let tsc = |invariant, virtual_machine, agree| TscFacts { invariant, virtual_machine, agree };
        let good = tsc(true, false, true);
        let plain = tsc(false, false, true);
        for (wanted, facts, hpet, pm, want) in [
            (None, good, true, true, (Source::Tsc, Reason::Best)),
            (None, plain, true, true, (Source::Hpet, Reason::TscMayChange)),
            (None, plain, false, true, (Source::PmTimer, Reason::TscMayChange)),
            (None, plain, false, false, (Source::Tsc, Reason::NothingElse)),
            (None, tsc(false, true, true), true, true, (Source::Tsc, Reason::VirtualMachine)),
            (None, tsc(true, true, false), true, true, (Source::Hpet, Reason::TscsDiffer)),
            (Some(Source::PmTimer), good, true, true, (Source::PmTimer, Reason::Wanted)),
            (Some(Source::Tsc), plain, true, true, (Source::Tsc, Reason::Wanted)),
            (Some(Source::Hpet), good, false, true, (Source::Tsc, Reason::WantedIsMissing)),
            (Some(Source::Hpet), plain, false, true, (Source::PmTimer, Reason::WantedIsMissing)),
            (Some(Source::Pit), good, true, true, (Source::Tsc, Reason::WantedIsMissing)),
        ] {
            assert_eq!(choose(wanted, facts, hpet, pm), want, "{wanted:?} {facts:?} {hpet} {pm}");
        }
    }

    /// Exchanges with a processor whose counter is `offset` ahead and runs at `rate` millionths of ours, over ways of
    /// changing length.
    fn exchange(offset: u64, rate: u64) -> Skew {
        let mut exchanges = Exchanges::new();
        let mut now = 1_000_000u64;
        for round in 0..64u64 {
            let there = 100 + round * 37 % 251;
            let back = 100 + round * 101 % 307;
            let at = now + there;
            let theirs = offset.wrapping_add((u128::from(at) * u128::from(rate) / 1_000_000) as u64);
            exchanges.add(now, theirs, at + back);
            now = at + back + 10_000;
        }
        exchanges.skew()
    }

    #[test]
    fn offsets_are_found_and_unsteady_counters_too() {
        assert_eq!(exchange(0, 1_000_000), Skew::None);
        assert_eq!(exchange(60, 1_000_000), Skew::None, "less than a message takes");
        for offset in [5_000u64, 1 << 40, 5_000u64.wrapping_neg()] {
            let Skew::Offset { ticks, within } = exchange(offset, 1_000_000) else { panic!("{offset}") };
            let wrong = (ticks.wrapping_sub(offset) as i64).unsigned_abs();
            assert!(wrong <= within && within <= 150, "{offset}: wrong by {wrong} of {within}");
        }
        assert_eq!(exchange(0, 1_010_000), Skew::Unsteady, "one percent faster");
        assert_eq!(exchange(1 << 33, 990_000), Skew::Unsteady);
    }
}

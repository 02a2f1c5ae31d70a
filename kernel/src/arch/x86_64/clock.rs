//! Time: which counter tells it, and how fast that runs. The decisions are `hv::x86::clocksource`'s.
//!
//! The time-stamp counter is measured while boot does its work, against a counter of known frequency. If it can be trusted it is the clock, of
//! the hypervisor and of guests: one scale, one origin, and for each processor what its counter is off by. Otherwise a *platform
//! counter* is the clock, the same for all processors; then RDTSC of guests traps, and shows them its nanoseconds.

use super::cpu::Features;
use super::{apic, hpet, percpu, pit};
use arrayvec::ArrayVec;
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hv::platform::{CpuId, TimeScale};
use hv::x86::acpi::{AcpiInfo, Power};
use hv::x86::apic_timer::Timer;
use hv::x86::clock::{CmosTime, Scale};
use hv::x86::clocksource::{self, Extended, Measurement, Reason, Reference, Sample, Source, TscFacts};
use hv::x86::layout::MAX_CPUS;
use spin::Once;
use x86_64::instructions::port::Port;

/// A measurement goes on until it is as good as this, or has taken as long as that.
const GOOD_PPM: u64 = 200;
const PATIENCE_NS: u64 = 50_000_000;
/// It takes this long at least.
const LEAST_NS: u64 = 4_000_000;
/// One that took longer is made anew: the machine was busy, and narrow counters have wrapped.
const STALE_NS: u64 = 1_000_000_000;
/// How often it is made anew.
const TRIES: u32 = 3;
/// Readings of a counter in which it has to move, if it counts.
const MOVES_WITHIN: u32 = 1_000_000;
/// Ticks looked at for one sample: the one seen best counts.
const EDGES: u32 = 4;

static EPOCH: AtomicU64 = AtomicU64::new(0);
static CLOCK: Once<Clock> = Once::new();
static PLATFORM: Once<PlatformClock> = Once::new();
/// The clock is another counter than the TSC: the same as whether `PLATFORM` is there, in one byte.
static EMULATES_TSC: AtomicBool = AtomicBool::new(false);
/// The time is more than the TSC since [`EPOCH`] by [`SCALE`]: another counter is the clock, or processors' TSCs differ.
static IS_SPECIAL: AtomicBool = AtomicBool::new(false);
/// The TSC's scale in one word: `mul`, and above it `shift`. 0, by which all times are 0, before calibration.
static SCALE: AtomicU64 = AtomicU64::new(0);
/// What the processors' counters are ahead of the first one's, modulo 2^64.
static OFFSETS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// The TSC's measures.
struct Clock {
    scale: Scale,
    hz: u64,
    wallclock_ns: u64,
}

/// A counter that is the clock in place of the TSC.
struct PlatformClock {
    reference: Reference,
    port: u16,
    counter: Extended,
    scale: Scale,
    /// Reading and time at which it became the clock.
    since: u64,
    since_ns: u64,
}

impl PlatformClock {
    fn now_ns(&self) -> u64 {
        let count = self.counter.now(|| read(self.reference.source, self.port));
        self.since_ns.saturating_add(self.scale.ns(count.saturating_sub(self.since)))
    }
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor.
    unsafe { _rdtsc() }
}

/// The time-stamp counter, read after everything before it in the program.
pub fn tsc_ordered() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor.
    unsafe { core::arch::x86_64::_mm_lfence() };
    tsc()
}

fn pm_timer(port: u16) -> u64 {
    // SAFETY: the FADT names this port as the PM timer's; reading it has no effect.
    u64::from(unsafe { Port::<u32>::new(port).read() })
}

fn read(source: Source, port: u16) -> u64 {
    match source {
        Source::Tsc => tsc(),
        Source::Hpet => hpet::count(),
        Source::PmTimer => pm_timer(port),
        Source::Pit => pit::count(),
    }
}

/// Waits for ticks of a counter. `None` if it does not count.
fn sample(reference: Reference, port: u16) -> Option<Sample> {
    let mut best: Option<Sample> = None;
    for _ in 0..EDGES {
        let mut before = tsc_ordered();
        let first = read(reference.source, port);
        let mut edge = None;
        for _ in 0..MOVES_WITHIN {
            let start = tsc_ordered();
            let (now, local) = (read(reference.source, port), apic::counted());
            if now != first {
                edge =
                    Some(Sample { reference: now & reference.mask(), before, after: tsc_ordered(), local });
                break;
            }
            before = start;
        }
        let edge = edge?;
        if best.is_none_or(|best| edge.width() < best.width()) {
            best = Some(edge);
        }
    }
    best
}

/// A calibration under way.
pub struct Calibration {
    port: u16,
    hpet: Option<Reference>,
    pm_timer: Option<Reference>,
    started: ArrayVec<(Reference, Sample), 2>,
}

/// Starts counting. The local APIC must be on.
pub fn start_calibration(acpi: &AcpiInfo) -> Calibration {
    EPOCH.store(tsc(), Ordering::Relaxed);
    let port = acpi.power.pm_timer;
    let pm_timer = (port != 0).then(|| Reference::pm_timer(acpi.power.pm_timer_32));
    let mut calibration =
        Calibration { port, hpet: acpi.hpet.and_then(hpet::start), pm_timer, started: ArrayVec::new() };
    calibration.begin([calibration.hpet, calibration.pm_timer].into_iter().flatten());
    // What does not count is no clock either.
    let counts = |source| calibration.started.iter().any(|(reference, _)| reference.source == source);
    let (hpet, pm_timer) = (counts(Source::Hpet), counts(Source::PmTimer));
    calibration.hpet = calibration.hpet.filter(|_| hpet);
    calibration.pm_timer = calibration.pm_timer.filter(|_| pm_timer);
    calibration
}

impl Calibration {
    fn begin(&mut self, references: impl Iterator<Item = Reference>) {
        self.started.clear();
        apic::start_counting();
        for reference in references.take(2) {
            if reference.source == Source::Pit {
                pit::start();
            }
            if let Some(sample) = sample(reference, self.port) {
                self.started.push((reference, sample));
            }
        }
    }

    /// Goes on until there is a good measurement by each counter that was begun with, or a bad one and no patience.
    fn measure(&self) -> ArrayVec<Measurement, 2> {
        loop {
            let mut all = ArrayVec::new();
            for (reference, from) in &self.started {
                let to = sample(*reference, self.port);
                all.extend(to.and_then(|to| clocksource::measure(*reference, *from, to)));
            }
            let good = |m: &Measurement| -> bool {
                m.error_ppm <= GOOD_PPM && m.ns >= LEAST_NS || m.ns >= PATIENCE_NS
            };
            // The interval timer ends after 55 ms and stands still.
            if all.first().is_none_or(good) {
                return all;
            }
        }
    }
}

/// Ends it: from here on there is time. Waits only for what a measurement takes that boot's own work has not taken. `wanted` is what to
/// measure with, if it is there.
///
/// # Panics
/// When no counter of the machine can be made sense of.
pub fn finish_calibration(
    started: Calibration,
    wanted: Option<Source>,
    power: &Power,
    features: &Features,
) -> PlatformCounters {
    let mut calibration = started;
    let (hpet, pm_timer) = (calibration.hpet, calibration.pm_timer);
    let chosen =
        [hpet, pm_timer, Some(Reference::pit())].into_iter().flatten().find(|r| Some(r.source) == wanted);
    if wanted.is_some() && chosen.is_none() {
        log::warn!("calibrate=: there is no such counter");
    }
    let mut result = None;
    for attempt in 0..TRIES {
        if let Some(chosen) = chosen {
            calibration.begin([chosen].into_iter());
        } else if attempt > 0 {
            calibration.begin([hpet, pm_timer].into_iter().flatten());
        }
        let all = calibration.measure();
        if let Some(first) = all.first().copied().filter(|m| m.ns < STALE_NS) {
            result = Some(clocksource::believe(first, all.get(1).copied()));
            if first.error_ppm <= GOOD_PPM {
                break;
            }
        }
    }
    if result.is_none() {
        log::warn!("neither HPET nor ACPI PM timer measures the TSC: it is measured with the PIT");
        calibration.begin([Reference::pit()].into_iter());
        result = calibration.measure().first().map(|m| (*m, false));
    }
    let (m, contradicted) = result.expect("no counter of this machine can be made sense of");
    if contradicted {
        log::warn!("HPET and ACPI PM timer contradict each other: the PM timer is believed");
    }
    let timer =
        Timer::choose(features.tsc_deadline, features.invariant_tsc, m.hz, m.local_hz / apic::TIMER_DIVISOR);
    apic::use_timer(timer);
    let scale = Scale::of_frequency(m.hz);
    let since_epoch = scale.ns(tsc().wrapping_sub(EPOCH.load(Ordering::Relaxed)));
    let wallclock_ns = (cmos_seconds(power.century) * 1_000_000_000).saturating_sub(since_epoch);
    CLOCK.call_once(|| Clock { scale, hz: m.hz, wallclock_ns });
    SCALE.store(u64::from(scale.mul) | u64::from(scale.shift as u8) << 32, Ordering::Release);
    log::info!(
        "TSC {} kHz, APIC timer {} kHz{}: by the {} at {} kHz in {} us, within {} ppm",
        m.hz / 1000,
        m.local_hz / 1000,
        if matches!(timer, Timer::Deadline { .. }) { " (used by TSC deadline)" } else { "" },
        m.by.source,
        m.by.hz / 1000,
        m.ns / 1000,
        m.error_ppm
    );
    PlatformCounters { hpet, pm_timer, port: calibration.port }
}

/// Counters that can be the clock in place of the TSC.
pub struct PlatformCounters {
    hpet: Option<Reference>,
    pm_timer: Option<Reference>,
    port: u16,
}

impl PlatformCounters {
    /// Whether there is one that may be used, if the operator wants `wanted`.
    pub fn may_be_clock(&self, wanted: Option<Source>) -> bool {
        wanted != Some(Source::Tsc) && (self.hpet.is_some() || self.pm_timer.is_some())
    }
}

/// Chooses the clock. Once, when all processors' counters have been compared and before any runs guests.
pub fn choose(counters: &PlatformCounters, wanted: Option<Source>, facts: TscFacts) {
    let (source, reason) =
        clocksource::choose(wanted, facts, counters.hpet.is_some(), counters.pm_timer.is_some());
    let why = match reason {
        Reason::Wanted => "as the command line says",
        Reason::Best => "marked invariant",
        Reason::WantedIsMissing => "what the command line says is not there",
        Reason::VirtualMachine => "not marked invariant, as in a virtual machine that may be moved",
        Reason::TscMayChange => "the TSC is not marked invariant",
        Reason::TscsDiffer => "the processors' TSCs do not run alike",
        Reason::NothingElse => "not marked invariant, and there is nothing else",
    };
    match reason {
        Reason::WantedIsMissing | Reason::TscsDiffer | Reason::NothingElse => {
            log::warn!("clock: {source}, {why}")
        }
        _ => log::info!("clock: {source}, {why}"),
    }
    let reference = match source {
        Source::Hpet => counters.hpet,
        Source::PmTimer => counters.pm_timer,
        _ => None,
    };
    let Some(reference) = reference else { return };
    let now = read(source, counters.port);
    let counter = Extended::new(reference.mask(), now);
    PLATFORM.call_once(|| PlatformClock {
        reference,
        port: counters.port,
        since: counter.now(|| now),
        since_ns: now_ns(),
        counter,
        scale: Scale::of_frequency(reference.hz),
    });
    EMULATES_TSC.store(true, Ordering::SeqCst);
    IS_SPECIAL.store(true, Ordering::SeqCst);
    log::info!(
        "clock: {source} at {} kHz, {} bits; guests' TSC is emulated, at 1000000 kHz",
        reference.hz / 1000,
        reference.bits
    );
}

/// The platform counter that is the clock, if it is not the TSC.
fn platform() -> Option<&'static PlatformClock> {
    if EMULATES_TSC.load(Ordering::Relaxed) { PLATFORM.get() } else { None }
}

/// Whether guests' RDTSC traps.
pub fn emulates_tsc() -> bool {
    EMULATES_TSC.load(Ordering::Relaxed)
}

/// The time by which somebody has to look at the clock, lest it wraps unseen; `None` for the TSC.
pub fn look_before_ns() -> Option<u64> {
    platform().map(|clock| clock.now_ns().saturating_add(clock.reference.half_wrap_ns()))
}

fn clock() -> &'static Clock {
    CLOCK.get().expect("calibrated before the first guest")
}

/// Ticks of the TSC per second.
pub fn hz() -> u64 {
    clock().hz
}

/// What the counter of this processor is ahead of the first one's.
fn offset() -> u64 {
    // SAFETY: null on the boot stack, else this CPU's own data.
    unsafe { percpu::this().as_ref() }.map_or(0, |info| info.tsc_offset)
}

/// Says by how much a processor's counter is ahead of the first one's, modulo 2^64. Before it runs guests.
pub fn set_offset(cpu: CpuId, ticks: u64) {
    if let Some(offset) = OFFSETS.get(cpu.0 as usize) {
        offset.store(ticks, Ordering::SeqCst);
        IS_SPECIAL.fetch_or(ticks != 0, Ordering::SeqCst);
    }
}

/// What [`set_offset`] was told of a processor.
pub fn offset_of(cpu: CpuId) -> u64 {
    OFFSETS.get(cpu.0 as usize).map_or(0, |offset| offset.load(Ordering::SeqCst))
}

/// Where time begins, in ticks of a guest's TSC on this processor.
pub fn epoch() -> u64 {
    if emulates_tsc() { 0 } else { EPOCH.load(Ordering::Relaxed).wrapping_add(offset()) }
}

/// The TSC as a guest on this processor is shown it.
pub fn guest_tsc() -> u64 {
    match platform() {
        Some(clock) => clock.now_ns(),
        None => tsc(),
    }
}

/// Nanoseconds since boot; 0 before calibration.
#[inline]
pub fn now_ns() -> u64 {
    if IS_SPECIAL.load(Ordering::Relaxed) { special_now_ns() } else { scaled(tsc()) }
}

#[cold]
fn special_now_ns() -> u64 {
    match platform() {
        Some(clock) => clock.now_ns(),
        None => scaled(tsc().wrapping_sub(offset())),
    }
}

/// When the first processor's counter is at `tsc`, in nanoseconds since boot.
#[inline]
fn scaled(tsc: u64) -> u64 {
    let scale = SCALE.load(Ordering::Relaxed);
    let scale = Scale { mul: scale as u32, shift: (scale >> 32) as i8 };
    scale.ns(tsc.saturating_sub(EPOCH.load(Ordering::Relaxed)))
}

/// The scale for guests.
pub fn scale() -> TimeScale {
    let scale = if emulates_tsc() { Scale::of_frequency(1_000_000_000) } else { clock().scale };
    TimeScale { mul: scale.mul, shift: scale.shift }
}

/// Nanoseconds from 1970 to boot.
pub fn boot_wallclock_ns() -> u64 {
    clock().wallclock_ns
}

fn cmos(register: u8) -> u8 {
    // SAFETY: the CMOS index and data ports; interrupts are off and boot is alone. Bit 7 keeps NMI as it is: on.
    unsafe {
        Port::<u8>::new(0x70).write(register);
        Port::<u8>::new(0x71).read()
    }
}

/// Seconds since 1970 by the CMOS clock.
fn cmos_seconds(century: u8) -> u64 {
    let sample = || {
        let raw = [0, 2, 4, 7, 8, 9].map(cmos);
        (raw, (century != 0).then(|| cmos(century & 0x7f)))
    };
    // Registers change during an update (status A bit 7): take a pair of equal samples outside of one.
    for _ in 0..1000 {
        if cmos(10) & 0x80 != 0 {
            continue;
        }
        let (first, second) = (sample(), sample());
        if first == second {
            return CmosTime::decode(first.0, first.1, cmos(11)).seconds_since_1970();
        }
    }
    0
}

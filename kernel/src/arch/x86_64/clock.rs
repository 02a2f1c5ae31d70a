//! Time: the TSC, calibrated once against the ACPI power-management timer while boot does its work.

use super::apic;
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};
use hv::platform::TimeScale;
use hv::x86::acpi::Power;
use hv::x86::clock::{CmosTime, Scale, frequency, pm_elapsed};
use spin::Once;
use x86_64::instructions::port::Port;

/// PM-timer ticks that calibration takes at least: 4 ms, an error of at most one tick in 14318.
const CALIBRATION_TICKS: u32 = 14_318;

static EPOCH: AtomicU64 = AtomicU64::new(0);
static CLOCK: Once<Clock> = Once::new();

struct Clock {
    scale: Scale,
    hz: u64,
    wallclock_ns: u64,
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

fn pm_timer(port: u16) -> u32 {
    // SAFETY: the FADT names this port as the PM timer's; reading it has no effect.
    unsafe { Port::<u32>::new(port).read() }
}

/// A calibration under way.
pub struct Calibration {
    port: u16,
    wide: bool,
    pm: u32,
    tsc: u64,
}

/// Waits for the next tick of the PM timer: both counters are read at a tick's edge, not somewhere in it.
fn at_tick(port: u16) -> (u32, u64, u32) {
    let first = pm_timer(port);
    loop {
        let now = pm_timer(port);
        let (tsc, local) = (tsc(), apic::counted());
        if now != first {
            return (now, tsc, local);
        }
    }
}

/// Starts counting. The local APIC must be on.
pub fn start_calibration(power: &Power) -> Calibration {
    EPOCH.store(tsc(), Ordering::Relaxed);
    assert!(power.pm_timer != 0, "ACPI names no PM timer: nothing to calibrate the clock with");
    apic::start_counting();
    let (pm, tsc, _) = at_tick(power.pm_timer);
    Calibration { port: power.pm_timer, wide: power.pm_timer_32, pm, tsc }
}

/// Ends it: from here on there is time. Waits only for what is left of 4 ms since the start.
pub fn finish_calibration(started: Calibration, power: &Power) {
    let (elapsed, now, local) = loop {
        let (pm, now, local) = at_tick(started.port);
        let elapsed = pm_elapsed(started.pm, pm, started.wide);
        if elapsed >= CALIBRATION_TICKS {
            break (elapsed, now, local);
        }
    };
    let hz = frequency(now.wrapping_sub(started.tsc), elapsed);
    apic::set_frequency(frequency(u64::from(local), elapsed));
    let scale = Scale::of_frequency(hz);
    let since_epoch = scale.ns(tsc().wrapping_sub(EPOCH.load(Ordering::Relaxed)));
    let wallclock_ns = (cmos_seconds(power.century) * 1_000_000_000).saturating_sub(since_epoch);
    CLOCK.call_once(|| Clock { scale, hz, wallclock_ns });
}

fn clock() -> &'static Clock {
    CLOCK.get().expect("calibrated before the first guest")
}

/// Ticks of the TSC per second.
pub fn hz() -> u64 {
    clock().hz
}

/// TSC at which time begins.
pub fn epoch() -> u64 {
    EPOCH.load(Ordering::Relaxed)
}

/// Nanoseconds since boot; 0 before calibration.
pub fn now_ns() -> u64 {
    at(tsc())
}

/// Nanoseconds since boot at TSC value `tsc`.
pub fn at(tsc: u64) -> u64 {
    CLOCK.get().map_or(0, |clock| clock.scale.ns(tsc.saturating_sub(EPOCH.load(Ordering::Relaxed))))
}

/// The scale for guests.
pub fn scale() -> TimeScale {
    let scale = clock().scale;
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

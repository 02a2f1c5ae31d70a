//! How the machine stops: off by ACPI S5, or reset.

use super::epitaph;
use core::sync::atomic::{AtomicBool, Ordering};
use hv::x86::acpi::Power;
use x86_64::instructions::port::Port;

/// SLP_EN in the PM1 control registers.
const SLEEP_ENABLE: u16 = 1 << 13;

static STAY: AtomicBool = AtomicBool::new(false);

/// Makes a reset stop the host instead, so that its last words can be read.
pub fn never_reset() {
    STAY.store(true, Ordering::Relaxed);
}

/// Switches the machine off. Stops where firmware names no way to do so.
pub fn off(power: &Power) -> ! {
    if let Some((a, b)) = power.s5 {
        for (port, kind) in [(power.pm1a_control, a), (power.pm1b_control, b)] {
            if port != 0 {
                // SAFETY: ports that the FADT names; entering S5 ends everything, which is the purpose.
                unsafe { Port::<u16>::new(port).write(u16::from(kind) << 10 | SLEEP_ENABLE) };
            }
        }
    }
    if power.s5.is_none() {
        log::warn!("firmware does not say how to switch the machine off: it is stopped");
    }
    epitaph::stop()
}

/// Resets the machine: by the FADT's register, the chipset's, the keyboard controller's.
pub fn reset(power: &Power) -> ! {
    if STAY.load(Ordering::Relaxed) {
        log::info!("stopped, as noreboot asks");
        epitaph::stop();
    }
    for (port, value) in power.reset.into_iter().chain([(0xcf9, 0x06), (0x64, 0xfe)]) {
        // SAFETY: ways to reset a PC; the first that works ends everything, which is the purpose.
        unsafe { Port::<u8>::new(port).write(value) };
    }
    epitaph::stop()
}

//! The high-precision event timer, of which only the main counter is used (IA-PC HPET 1.0a, chapter 2).

use super::paging;
use hv::x86::acpi::MAX_IOAPICS;
use hv::x86::clocksource::Reference;
use hv::x86::layout::{self, PAGE_SIZE};
use spin::Once;

/// Page of the registers: behind the local APIC's and the I/O APICs'.
const WINDOW: u64 = layout::DEVICES + (1 + MAX_IOAPICS as u64) * PAGE_SIZE;

const CAPABILITIES: u64 = 0;
const CONFIGURATION: u64 = 0x10;
const COUNTER: u64 = 0xf0;
/// Configuration of timer 0; the others follow, 32 bytes apart.
const TIMERS: u64 = 0x100;

/// Configuration: the counter counts; interrupts take the place of the old timers'.
const ENABLE: u32 = 1;
const LEGACY: u32 = 2;
/// Configuration of a timer: it interrupts.
const INTERRUPTS: u32 = 4;

/// Address of the registers, once they are mapped and good.
static REGISTERS: Once<u64> = Once::new();

fn read(at: u64) -> u32 {
    // SAFETY: `at` lies in the page that `map` has mapped, uncached; reading a register has no effect.
    unsafe { (at as *const u32).read_volatile() }
}

fn write(at: u64, value: u32) {
    // SAFETY: as for `read`; with no interrupts on, the registers touch nothing outside the chip.
    unsafe { (at as *mut u32).write_volatile(value) }
}

/// Maps the registers at a machine address. Once, while booting.
pub fn map(space: &mut paging::Space<'_>, address: u64) {
    space.map(WINDOW, address & !(PAGE_SIZE - 1), PAGE_SIZE, paging::DEVICE);
}

/// Starts the counter of the chip at `address`, which [`map`] was told, with no interrupts. `None` if it is not one or does not say how
/// fast it is.
pub fn start(address: u64) -> Option<Reference> {
    let at = WINDOW + address % PAGE_SIZE;
    let capabilities = u64::from(read(at + CAPABILITIES + 4)) << 32 | u64::from(read(at + CAPABILITIES));
    let reference = Reference::hpet(capabilities)?;
    let configuration = read(at + CONFIGURATION);
    write(at + CONFIGURATION, configuration & !(ENABLE | LEGACY));
    // Timers there are, minus one, in bits 8 to 12; as many as there is room for in 1 KiB.
    for timer in 0..=(capabilities >> 8 & 0x1f).min(23) {
        let timer = at + TIMERS + timer * 32;
        write(timer, read(timer) & !INTERRUPTS);
    }
    write(at + CONFIGURATION, configuration & !LEGACY | ENABLE);
    REGISTERS.call_once(|| at);
    Some(reference)
}

/// The lower half of the counter; 0 without a chip.
pub fn count() -> u64 {
    REGISTERS.get().map_or(0, |at| u64::from(read(at + COUNTER)))
}

//! I/O APICs: which pin raises which vector where. Pins are global system interrupts; pin `n` raises vector
//! [`FIRST_VECTOR`]` + n`.
//!
//! A level-triggered pin is shut when it fires, before the local APIC's end of interrupt, and opened when the domain says
//! that it has handled it: a driver that never answers cannot storm the host.

use super::paging;
use alloc::vec::Vec;
use hv::sync::PlainMutex;
use hv::x86::acpi::{AcpiInfo, IoApic};
use hv::x86::layout::{self, PAGE_SIZE};
use spin::Once;

/// Vector of pin 0.
pub const FIRST_VECTOR: u8 = 0x40;
/// Pins there are vectors for: those below 0x80, which guests may raise themselves.
pub const MAX_PINS: u32 = 0x80 - FIRST_VECTOR as u32;

const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const ACTIVE_LOW: u32 = 1 << 13;

#[derive(Clone, Copy)]
struct Pin {
    level: bool,
    active_low: bool,
    /// Whoever owns the pin wants it open.
    open: bool,
    /// Fired, level-triggered, and not ended yet.
    in_service: bool,
    /// APIC id of the processor that it interrupts.
    target: u8,
}

struct State {
    chips: Vec<(IoApic, u32, u64)>,
    pins: Vec<Pin>,
}

static STATE: Once<PlainMutex<State>> = Once::new();

/// Registers of chip `index` in the device window; the local APIC has the first page.
fn window(index: usize) -> u64 {
    layout::DEVICES + (1 + index as u64) * PAGE_SIZE
}

/// Maps the chips. Once, while booting.
pub fn map(space: &mut paging::Space<'_>, acpi: &AcpiInfo) {
    for (index, chip) in acpi.ioapics.iter().enumerate() {
        space.map(window(index), chip.address & !0xfff, PAGE_SIZE, paging::DEVICE);
    }
}

fn access(chip: u64, register: u32, value: Option<u32>) -> u32 {
    let (select, data) = (chip as *mut u32, (chip + 0x10) as *mut u32);
    // SAFETY: the chip's page is mapped uncached by `map`; its two registers touch no memory. Under the lock of `STATE`.
    unsafe {
        select.write_volatile(register);
        match value {
            Some(value) => data.write_volatile(value),
            None => return data.read_volatile(),
        }
    }
    0
}

/// Reads the chips, shuts all pins, and notes how each is triggered. Interrupts go to the processor `target` at first.
pub fn init(acpi: &AcpiInfo, target: u8) {
    let mut chips = Vec::new();
    let mut pins = Vec::new();
    for (index, chip) in acpi.ioapics.iter().enumerate() {
        // Offset of the page in which the chip's registers lie, which need not begin it.
        let at = window(index) + (chip.address & 0xfff);
        let count = (access(at, 1, None) >> 16 & 0xff) + 1;
        let end = chip.gsi_base.saturating_add(count).min(MAX_PINS);
        while (pins.len() as u32) < end {
            // ISA interrupts are edge-triggered and active high, PCI's level-triggered and active low.
            let isa = pins.len() < 16;
            pins.push(Pin { level: !isa, active_low: !isa, open: false, in_service: false, target });
        }
        chips.push((*chip, count, at));
    }
    for entry in &acpi.overrides {
        if let Some(pin) = usize::try_from(entry.gsi).ok().and_then(|gsi| pins.get_mut(gsi)) {
            (pin.level, pin.active_low) = (entry.level, entry.active_low);
        }
    }
    let mut state = State { chips, pins };
    for pin in 0..state.pins.len() {
        state.program(pin);
    }
    STATE.call_once(|| PlainMutex::new(state));
}

impl State {
    /// The registers of the chip that has a pin, and the lower register of the pin's redirection entry.
    fn entry(&self, gsi: u32) -> Option<(u64, u32)> {
        self.chips.iter().find_map(|(chip, count, at)| {
            let offset = gsi.checked_sub(chip.gsi_base).filter(|offset| offset < count)?;
            Some((*at, 0x10 + offset * 2))
        })
    }

    /// Writes the redirection entry of a pin.
    fn program(&mut self, number: usize) {
        let Some(pin) = self.pins.get(number).copied() else { return };
        let gsi = number as u32;
        let Some((at, register)) = self.entry(gsi) else { return };
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let low = (u32::from(FIRST_VECTOR) + gsi)
            | flag(pin.level, LEVEL)
            | flag(pin.active_low, ACTIVE_LOW)
            | flag(!pin.open || pin.in_service, MASKED);
        access(at, register + 1, Some(u32::from(pin.target) << 24));
        access(at, register, Some(low));
    }

    /// Writes where a pin's interrupts go. One store to a register of its own: whoever fires meanwhile goes to one processor or to
    /// the other, at the same vector. The end of a level-triggered one that is under way is told by the vector alone.
    fn aim(&mut self, number: usize) {
        let Some(pin) = self.pins.get(number) else { return };
        if let Some((at, register)) = self.entry(number as u32) {
            access(at, register + 1, Some(u32::from(pin.target) << 24));
        }
    }
}

fn with_pin<R>(number: u32, act: impl FnOnce(&mut Pin) -> (R, bool)) -> Option<R> {
    let mut state = STATE.get()?.lock();
    let index = usize::try_from(number).ok()?;
    let (result, program) = act(state.pins.get_mut(index)?);
    if program {
        state.program(index);
    }
    Some(result)
}

/// How many pins there are.
pub fn pins() -> u32 {
    STATE.get().map_or(0, |state| state.lock().pins.len() as u32)
}

/// Opens or shuts a pin.
pub fn mask(number: u32, masked: bool) {
    with_pin(number, |pin| {
        let changed = pin.open == masked;
        pin.open = !masked;
        ((), changed)
    });
}

/// Sends a pin's interrupts to the processor with this APIC id.
pub fn route(number: u32, target: u8) {
    let Some(mut state) = STATE.get().map(PlainMutex::lock) else { return };
    let index = number as usize;
    if let Some(pin) = state.pins.get_mut(index).filter(|pin| pin.target != target) {
        pin.target = target;
        state.aim(index);
    }
}

/// Sets how a pin is triggered. An interrupt that is in service ends: what the device still wants, it says anew.
pub fn configure(number: u32, level: bool, active_low: bool) {
    with_pin(number, |pin| {
        *pin = Pin { level, active_low, in_service: false, ..*pin };
        ((), true)
    });
}

/// Whether a pin is level-triggered.
pub fn is_level(number: u32) -> bool {
    with_pin(number, |pin| (pin.level, false)).unwrap_or(false)
}

/// A pin fired: shuts it until [`end`] if it is level-triggered.
pub fn begin(number: u32) {
    with_pin(number, |pin| {
        pin.in_service = pin.level;
        ((), pin.level)
    });
}

/// The interrupt of a pin was handled.
pub fn end(number: u32) {
    with_pin(number, |pin| {
        let was = core::mem::replace(&mut pin.in_service, false);
        ((), was)
    });
}

//! Slots whose functions come and go while the machine runs: PCI Express' native hot-plug (Base Specification 4.0, 6.7 and 7.5.3).
//!
//! Whoever wants to pull a card out presses the slot's button; software lets go of the card and takes the power away. Cards that are put in
//! are not brought up: firmware has given their registers no places.

use crate::{Address, BUSES, Config, Function};
use alloc::vec::Vec;

/// The capability of PCI Express.
const EXPRESS: u8 = 0x10;
/// Of its first register: what kind of port it is, and whether there is a slot.
const PORT_TYPE: u32 = 0xf << 20;
const ROOT_PORT: u32 = 4 << 20;
const DOWNSTREAM_PORT: u32 = 6 << 20;
const HAS_SLOT: u32 = 1 << 24;

/// Registers of a slot, behind the capability.
const SLOT_CAPABILITIES: u8 = 0x14;
const SLOT_CONTROL: u8 = 0x18;
const SLOT_STATUS: u8 = 0x1a;
/// The slot's cards come and go.
const HOT_PLUG: u32 = 1 << 6;
/// Control: the power indicator is off; the slot has no power.
const INDICATOR_OFF: u16 = 3 << 8;
const POWER_OFF: u16 = 1 << 10;
/// Status: the button was pressed, a card came or went; there is one.
const BUTTON: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const PRESENT: u16 = 1 << 6;

/// A slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    port: Address,
    /// Its port's capability.
    at: u8,
}

/// What has happened at a slot since it was last asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotEvents {
    /// Its button was pressed: where there is a card, it is wanted out.
    pub button: bool,
    /// There is a card.
    pub present: bool,
}

/// The slots that there are.
pub fn slots<C: Config>(config: &C) -> Vec<Slot> {
    let slot = |function: &Function| {
        let at = function.is_bridge().then(|| function.capability(config, EXPRESS)).flatten()?;
        // The registers of a slot are inside of what is read here.
        let at = at.checked_add(SLOT_STATUS).map(|_| at)?;
        let head = config.read(function.address, at);
        let port = matches!(head & PORT_TYPE, ROOT_PORT | DOWNSTREAM_PORT) && head & HAS_SLOT != 0;
        let hot = config.read(function.address, at + SLOT_CAPABILITIES) & HOT_PLUG != 0;
        (port && hot).then_some(Slot { port: function.address, at })
    };
    crate::functions(config).iter().filter_map(slot).collect()
}

impl Slot {
    /// Where its port is.
    #[must_use]
    pub fn port(&self) -> Address {
        self.port
    }

    fn status<C: Config>(&self, config: &C) -> u16 {
        (config.read(self.port, self.at + SLOT_CONTROL) >> 16) as u16
    }

    /// What has happened, told once.
    pub fn take_events<C: Config>(&self, config: &C) -> SlotEvents {
        let status = self.status(config);
        let events = status & (BUTTON | PRESENCE_CHANGED);
        if events != 0 {
            // A 1 clears: only what was seen.
            config.write16(self.port, self.at + SLOT_STATUS, events);
        }
        SlotEvents { button: events & BUTTON != 0, present: status & PRESENT != 0 }
    }

    /// Takes the power away: the card may be pulled out. Nobody may use it any more.
    pub fn power_off<C: Config>(&self, config: &C) {
        let now = config.read(self.port, self.at + SLOT_CONTROL) as u16;
        config.write16(self.port, self.at + SLOT_CONTROL, now | INDICATOR_OFF | POWER_OFF);
    }

    /// The number of the bus behind it.
    pub fn bus<C: Config>(&self, config: &C) -> u8 {
        (config.read(self.port, BUSES) >> 8) as u8
    }
}

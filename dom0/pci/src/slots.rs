//! Slots whose functions come and go while the machine runs: PCI Express' native hot-plug (Base Specification 4.0, 6.7 and 7.5.3).
//!
//! Whoever wants to pull a card out presses the slot's button; software lets go of the card and takes the power away. A card that is put in
//! gets power, and its registers get places among the addresses that firmware has set aside for what is behind the port (the bridge's
//! windows: PCI-to-PCI Bridge Architecture Specification 1.2, 3.2.5).

use crate::{Address, BAR, BUSES, Bar, Command, Config, Function};
use alloc::vec::Vec;
use core::ops::Range;

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
/// Control: the power indicator is on, or off; the slot has no power.
const INDICATOR_ON: u16 = 1 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
const POWER_OFF: u16 = 1 << 10;
/// Status: the button was pressed, a card came or went; there is one.
const BUTTON: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const PRESENT: u16 = 1 << 6;

/// Registers of a bridge: the first and the last MiB of memory behind it, and of memory that may be read ahead, with its upper halves.
const MEMORY_WINDOW: u8 = 0x20;
const AHEAD_WINDOW: u8 = 0x24;
const AHEAD_FIRST: u8 = 0x28;
const AHEAD_LAST: u8 = 0x2c;
const MIB: u64 = 1 << 20;
/// A base address register: it has 64 bits; its memory may be read ahead.
const WIDE: u32 = 1 << 2;
const AHEAD: u32 = 1 << 3;

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
    /// A card came or went.
    pub changed: bool,
    /// There is a card.
    pub present: bool,
}

/// The addresses behind a bridge have no room for a function's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

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
        SlotEvents {
            button: events & BUTTON != 0,
            changed: events & PRESENCE_CHANGED != 0,
            present: status & PRESENT != 0,
        }
    }

    /// Whether its card has power.
    pub fn has_power<C: Config>(&self, config: &C) -> bool {
        config.read(self.port, self.at + SLOT_CONTROL) as u16 & POWER_OFF == 0
    }

    /// Gives its card power. The card answers a moment later: 100 ms at the least (6.6.1).
    pub fn power_on<C: Config>(&self, config: &C) {
        let now = config.read(self.port, self.at + SLOT_CONTROL) as u16;
        let on = now & !(INDICATOR_OFF | POWER_OFF) | INDICATOR_ON;
        config.write16(self.port, self.at + SLOT_CONTROL, on);
    }

    /// The functions of its card. None while it does not answer.
    pub fn functions<C: Config>(&self, config: &C) -> Vec<Function> {
        let bus = self.bus(config);
        if bus == 0 {
            // Firmware has not numbered it.
            return Vec::new();
        }
        // A link leads to one device.
        let at = |number| Function::at(config, Address::new(bus, 0, number));
        let Some(first) = at(0) else { return Vec::new() };
        let others = if first.has_more() { 1..8 } else { 1..1 };
        core::iter::once(first).chain(others.filter_map(at)).collect()
    }

    /// Gives the memory registers of a card that was put in their places; ports get none. No function of it may answer at addresses
    /// before, and none is allowed to here.
    ///
    /// # Errors
    /// [`NoRoom`]: the card cannot be used.
    pub fn place<C: Config>(&self, config: &C, functions: &[Function]) -> Result<(), NoRoom> {
        let (mut plain, mut ahead) = self.windows(config);
        let mut wanted = Vec::new();
        for function in functions {
            // It answers nowhere while its registers are moved.
            function.allow(config, Command::empty(), Command::IO | Command::MEMORY | Command::BUS_MASTER);
            for index in 0..6 {
                if let Some(Bar::Memory { bytes, .. }) = function.bar(config, index) {
                    wanted.push((bytes, function.address, BAR + 4 * index));
                }
            }
        }
        // Each at a multiple of its size, which is a power of two: the largest first leaves no gaps.
        wanted.sort_by_key(|(bytes, ..)| core::cmp::Reverse(*bytes));
        for (bytes, at, offset) in wanted {
            let kind = config.read(at, offset);
            let fits = |window: &Range<u64>| kind & WIDE != 0 || window.end <= 1 << 32;
            let mut address = None;
            if kind & AHEAD != 0 && fits(&ahead) {
                address = take(&mut ahead, bytes);
            }
            // Memory that may be read ahead need not be.
            let address = address.or_else(|| take(&mut plain, bytes)).ok_or(NoRoom)?;
            config.write(at, offset, address as u32);
            if kind & WIDE != 0 {
                config.write(at, offset + 4, (address >> 32) as u32);
            }
        }
        let port = Function::at(config, self.port).ok_or(NoRoom)?;
        port.allow(config, Command::MEMORY | Command::BUS_MASTER, Command::empty());
        Ok(())
    }

    /// The addresses of memory behind its port, and of memory there that may be read ahead; either may be empty.
    fn windows<C: Config>(&self, config: &C) -> (Range<u64>, Range<u64>) {
        let range = |window: u32, first: u32, last: u32| {
            let base = u64::from(first) << 32 | u64::from(window & 0xfff0) << 16;
            let limit = u64::from(last) << 32 | u64::from(window & 0xfff0_0000);
            // A window whose end is before its start is closed.
            if limit < base { 0..0 } else { base..limit.saturating_add(MIB) }
        };
        let plain = range(config.read(self.port, MEMORY_WINDOW), 0, 0);
        let window = config.read(self.port, AHEAD_WINDOW);
        let is_wide = window & 0xf == 1;
        let upper = |offset| if is_wide { config.read(self.port, offset) } else { 0 };
        (plain, range(window, upper(AHEAD_FIRST), upper(AHEAD_LAST)))
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

/// So many bytes of a window, a power of two, at a multiple of it.
fn take(window: &mut Range<u64>, bytes: u64) -> Option<u64> {
    let start = window.start.checked_next_multiple_of(bytes)?;
    // Nothing lies at address 0: that is what a register without a place says.
    let end = start.checked_add(bytes).filter(|end| start != 0 && *end <= window.end)?;
    window.start = end;
    Some(start)
}

//! PCI functions: what there is, where their registers are, and their message interrupts.
//!
//! Over two small traits, [`Config`] and [`Registers`], so that everything here runs in host tests; guest-sdk's ports and mappings
//! implement them on a machine. Offsets and bits are those of the PCI Local Bus Specification 3.0 (6.1 the header, 6.2.5 base
//! addresses, 6.8 MSI and MSI-X).
//!
//! ```ignore
//! let config = ConfigPorts::open()?;
//! let function = pci::functions(&config).find(|function| function.id() == (0x8086, 0x10d3));
//! let msix = Msix::find(&config, function)?;
//! let table = msix.table(hardware::Registers::map(...)?);
//! table.set(0, message.store()?);          // again after the port was moved to another vCPU
//! msix.enable(&config, true);
//! ```
//!
//! A function that masters the bus can reach all memory of the machine ([`guest_sdk::hardware`]).
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod interrupts;
mod slots;
#[cfg(test)]
mod tests;

pub use interrupts::{Msi, Msix, MsixTable};
pub use slots::{NoRoom, Slot, SlotEvents, slots};

use alloc::vec::Vec;
use core::fmt;
use guest_sdk::hardware::{self, ConfigPorts};

/// PCI configuration space.
pub trait Config {
    /// Reads the 32 bits at byte `offset`, a multiple of 4 below 256; all ones where there is no function.
    fn read(&self, at: Address, offset: u8) -> u32;
    /// Writes them.
    fn write(&self, at: Address, offset: u8, value: u32);
    /// Writes the 16 bits at byte `offset`, a multiple of 2 below 256: registers that a hypervisor watches are written alone.
    fn write16(&self, at: Address, offset: u8, value: u16);
}

/// Registers of a device in memory. A field is accessed in its own width.
pub trait Registers {
    /// Reads the 32 bits at byte `offset`, a multiple of 4 inside.
    fn read(&self, offset: u64) -> u32;
    /// Writes them.
    fn write(&self, offset: u64, value: u32);
    /// Reads the 16 bits at byte `offset`, a multiple of 2 inside.
    fn read16(&self, offset: u64) -> u16;
    /// Writes them.
    fn write16(&self, offset: u64, value: u16);
    /// Reads the byte at `offset`.
    fn read8(&self, offset: u64) -> u8;
    /// Writes it.
    fn write8(&self, offset: u64, value: u8);
}

impl Config for ConfigPorts {
    fn read(&self, at: Address, offset: u8) -> u32 {
        ConfigPorts::read(self, at.selector(offset))
    }
    fn write(&self, at: Address, offset: u8, value: u32) {
        ConfigPorts::write(self, at.selector(offset), value);
    }
    fn write16(&self, at: Address, offset: u8, value: u16) {
        ConfigPorts::write16(self, at.selector(offset), offset & 2 != 0, value);
    }
}

impl Registers for hardware::Registers {
    fn read(&self, offset: u64) -> u32 {
        hardware::Registers::read(self, offset)
    }
    fn write(&self, offset: u64, value: u32) {
        hardware::Registers::write(self, offset, value);
    }
    fn read16(&self, offset: u64) -> u16 {
        hardware::Registers::read16(self, offset)
    }
    fn write16(&self, offset: u64, value: u16) {
        hardware::Registers::write16(self, offset, value);
    }
    fn read8(&self, offset: u64) -> u8 {
        hardware::Registers::read8(self, offset)
    }
    fn write8(&self, offset: u64, value: u8) {
        hardware::Registers::write8(self, offset, value);
    }
}

/// Where a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    bus: u8,
    device: u8,
    function: u8,
}

impl Address {
    /// Bus, device 0 to 31, function 0 to 7; higher bits are cut off.
    #[must_use]
    pub const fn new(bus: u8, device: u8, function: u8) -> Address {
        Address { bus, device: device & 31, function: function & 7 }
    }

    /// Its bus, and its device and function as one byte: how hypercalls name it.
    #[must_use]
    pub const fn numbers(self) -> (u8, u8) {
        (self.bus, self.device << 3 | self.function)
    }

    /// What selects a register of it at the address port.
    const fn selector(self, offset: u8) -> u32 {
        1 << 31
            | (self.bus as u32) << 16
            | (self.device as u32) << 11
            | (self.function as u32) << 8
            | (offset & 0xfc) as u32
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

bitflags::bitflags! {
    /// What a function may do (the command register).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Command: u16 {
        /// Answer at its I/O ports.
        const IO = 1 << 0;
        /// Answer at its memory addresses.
        const MEMORY = 1 << 1;
        /// Read and write memory itself; message interrupts are such writes.
        const BUS_MASTER = 1 << 2;
        /// Keep its interrupt line still.
        const NO_LINE = 1 << 10;
    }
}

const ID: u8 = 0x00;
const COMMAND: u8 = 0x04;
const CLASS: u8 = 0x08;
const HEADER: u8 = 0x0c;
const BAR: u8 = 0x10;
const BUSES: u8 = 0x18;
const CAPABILITIES: u8 = 0x34;
const INTERRUPT: u8 = 0x3c;
/// In the upper half of the command register: there is a list of capabilities.
const HAS_CAPABILITIES: u32 = 1 << 20;
/// As many capabilities as fit behind the header.
const MAX_CAPABILITIES: usize = 48;

/// A function that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where.
    pub address: Address,
    id: u32,
    class: u32,
    header: u8,
}

/// A base address register that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// I/O ports.
    Ports {
        /// The first.
        first: u16,
        /// How many.
        count: u32,
    },
    /// Memory.
    Memory {
        /// Its machine address.
        address: u64,
        /// Its size in bytes.
        bytes: u64,
    },
}

impl Function {
    /// The function at `address`, if there is one.
    pub fn at<C: Config>(config: &C, address: Address) -> Option<Function> {
        let id = config.read(address, ID);
        // No vendor has the number 0xffff, and a function without a vendor is none.
        if matches!(id & 0xffff, 0xffff | 0) {
            return None;
        }
        let class = config.read(address, CLASS) >> 8;
        Some(Function { address, id, class, header: (config.read(address, HEADER) >> 16) as u8 })
    }

    /// Vendor and device.
    #[must_use]
    pub const fn id(&self) -> (u16, u16) {
        (self.id as u16, (self.id >> 16) as u16)
    }

    /// Base class, subclass and programming interface, 8 bits each.
    #[must_use]
    pub const fn class(&self) -> u32 {
        self.class
    }

    fn is_bridge(&self) -> bool {
        self.header & 0x7f == 1
    }

    fn has_more(&self) -> bool {
        self.header & 0x80 != 0
    }

    /// Which of the four lines it uses, 1 to 4; 0 for none.
    pub fn line<C: Config>(&self, config: &C) -> u8 {
        (config.read(self.address, INTERRUPT) >> 8) as u8
    }

    /// Says what it may do; the rest stays as it is.
    pub fn allow<C: Config>(&self, config: &C, may: Command, may_not: Command) {
        let now = Command::from_bits_retain(config.read(self.address, COMMAND) as u16);
        // The upper half has status bits that a 1 clears.
        config.write(self.address, COMMAND, u32::from(((now - may_not) | may).bits()));
    }

    /// Base address register `index`, 0 to 5. `None` when it is not in use, or is the upper half of the one before.
    ///
    /// To see its size, all ones are written and the old value restored; the function does not answer meanwhile.
    pub fn bar<C: Config>(&self, config: &C, index: u8) -> Option<Bar> {
        if index >= if self.is_bridge() { 2 } else { 6 } {
            return None;
        }
        let mut at = 0;
        while at < index {
            at += if config.read(self.address, BAR + 4 * at) & 7 == 4 { 2 } else { 1 };
        }
        if at != index {
            return None;
        }
        let offset = BAR + 4 * index;
        let low = config.read(self.address, offset);
        let command = config.read(self.address, COMMAND) & 0xffff;
        let quiet = command & !u32::from((Command::IO | Command::MEMORY).bits());
        config.write(self.address, COMMAND, quiet);
        let measure = |offset: u8, old: u32| {
            config.write(self.address, offset, u32::MAX);
            let mask = config.read(self.address, offset);
            config.write(self.address, offset, old);
            mask
        };
        let mask = measure(offset, low);
        let bar = if low & 1 != 0 {
            let count = (!(mask | 0xffff_0000) | 3).wrapping_add(1) & 0xffff;
            (mask & 0xfffc != 0).then_some(Bar::Ports { first: (low & 0xfffc) as u16, count })
        } else {
            let is_wide = low & 6 == 4 && index < 5;
            let (high, high_mask) = if is_wide {
                let high = config.read(self.address, offset + 4);
                (high, measure(offset + 4, high))
            } else {
                (0, u32::MAX)
            };
            let mask = u64::from(high_mask) << 32 | u64::from(mask & !15);
            let address = u64::from(high) << 32 | u64::from(low & !15);
            (mask as u32 != 0 || is_wide && high_mask != 0)
                .then_some(Bar::Memory { address, bytes: (!mask).wrapping_add(1) })
        };
        config.write(self.address, COMMAND, command);
        bar
    }

    /// Its capabilities: id, and offset in configuration space.
    pub fn capabilities<C: Config>(&self, config: &C) -> impl Iterator<Item = (u8, u8)> {
        let has = config.read(self.address, COMMAND) & HAS_CAPABILITIES != 0;
        let mut next = if has { config.read(self.address, CAPABILITIES) as u8 & 0xfc } else { 0 };
        // A list that runs in a circle ends, too.
        (0..MAX_CAPABILITIES).map_while(move |_| {
            let at = next;
            if at < 0x40 {
                return None;
            }
            let head = config.read(self.address, at);
            next = (head >> 8) as u8 & 0xfc;
            Some((head as u8, at))
        })
    }

    /// Offset of the capability `id`.
    fn capability<C: Config>(&self, config: &C, id: u8) -> Option<u8> {
        self.capabilities(config).find(|(found, _)| *found == id).map(|(_, at)| at)
    }
}

/// All functions that can be reached from bus 0, in the order in which they are found.
pub fn functions<C: Config>(config: &C) -> Vec<Function> {
    let mut found = Vec::new();
    let mut buses = Vec::from([0u8]);
    let mut seen = 0;
    while let Some(&bus) = buses.get(seen) {
        seen += 1;
        for device in 0..32 {
            let Some(first) = Function::at(config, Address::new(bus, device, 0)) else { continue };
            let others = if first.has_more() { 1..8 } else { 1..1 };
            let others = others.filter_map(|number| Function::at(config, Address::new(bus, device, number)));
            for function in core::iter::once(first).chain(others) {
                if function.is_bridge() {
                    let behind = (config.read(function.address, BUSES) >> 8) as u8;
                    // Firmware has numbered them; a bridge that leads back leads nowhere.
                    if behind != 0 && !buses.contains(&behind) {
                        buses.push(behind);
                    }
                }
                found.push(function);
            }
        }
    }
    found
}

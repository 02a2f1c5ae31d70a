//! Message interrupts: the capability MSI, one store for the whole function, and MSI-X, a table of them.

use super::{Bar, Config, Function, Registers};
use guest_sdk::hardware::Store;

const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;

/// In the first word of the MSI capability.
const MSI_ENABLE: u32 = 1 << 16;
/// How many of its messages are in use, as a power of two.
const MSI_COUNT: u32 = 7 << 20;
const MSI_WIDE: u32 = 1 << 23;
const MSI_MASKS: u32 = 1 << 24;

/// In the first word of the MSI-X capability.
const MSIX_MASKED: u32 = 1 << 30;
const MSIX_ENABLE: u32 = 1 << 31;
/// Bytes of an entry of the table.
const ENTRY: u64 = 16;
/// In the last word of an entry.
const ENTRY_MASKED: u32 = 1;

/// The capability MSI of a function. One message of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    function: Function,
    at: u8,
}

impl Msi {
    /// That of `function`, if it has it.
    pub fn find<C: Config>(config: &C, function: Function) -> Option<Msi> {
        function.capability(config, MSI).map(|at| Msi { function, at })
    }

    fn change<C: Config>(&self, config: &C, clear: u32, set: u32) -> u32 {
        let head = config.read(self.function.address, self.at) & !clear | set;
        config.write(self.function.address, self.at, head);
        head
    }

    /// Sets what it stores, and lets it.
    ///
    /// False, and it is off, when the address is above 4 GiB and the function has no room for it.
    pub fn enable<C: Config>(&self, config: &C, store: Store) -> bool {
        // Off meanwhile: address and data are in different words.
        let head = self.change(config, MSI_ENABLE | MSI_COUNT, 0);
        let is_wide = head & MSI_WIDE != 0;
        let (low, high) = (store.address as u32, (store.address >> 32) as u32);
        if high != 0 && !is_wide {
            return false;
        }
        let write = |offset: u8, value: u32| config.write(self.function.address, self.at + offset, value);
        write(4, low);
        let (data, mask) = if is_wide { (12, 16) } else { (8, 12) };
        if is_wide {
            write(8, high);
        }
        let rest = config.read(self.function.address, self.at + data) & 0xffff_0000;
        write(data, rest | store.data & 0xffff);
        if head & MSI_MASKS != 0 {
            write(mask, !1);
        }
        self.change(config, 0, MSI_ENABLE);
        true
    }

    /// Turns it off: the function uses its line again.
    pub fn disable<C: Config>(&self, config: &C) {
        self.change(config, MSI_ENABLE, 0);
    }
}

/// The capability MSI-X of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    function: Function,
    at: u8,
    entries: u16,
    bar: u8,
    offset: u32,
}

impl Msix {
    /// That of `function`, if it has it.
    pub fn find<C: Config>(config: &C, function: Function) -> Option<Msix> {
        let at = function.capability(config, MSIX)?;
        let head = config.read(function.address, at);
        let table = config.read(function.address, at + 4);
        let entries = (head >> 16 & 0x7ff) as u16 + 1;
        Some(Msix { function, at, entries, bar: (table & 7) as u8, offset: table & !7 })
    }

    /// How many messages it has.
    #[must_use]
    pub const fn entries(&self) -> u16 {
        self.entries
    }

    /// Machine address where the memory begins that the table is somewhere in: how Xen wants to be told of it.
    pub fn base<C: Config>(&self, config: &C) -> Option<u64> {
        match self.function.bar(config, self.bar)? {
            Bar::Memory { address, .. } => Some(address),
            Bar::Ports { .. } => None,
        }
    }

    /// Machine address of the table, and its size in bytes: what to map for [`Msix::table`]. `None` when the function says nonsense.
    pub fn place<C: Config>(&self, config: &C) -> Option<(u64, u64)> {
        let Bar::Memory { address, bytes } = self.function.bar(config, self.bar)? else { return None };
        let size = u64::from(self.entries) * ENTRY;
        let end = u64::from(self.offset).checked_add(size)?;
        (end <= bytes).then_some((address.checked_add(u64::from(self.offset))?, size))
    }

    /// The table in its registers, which begin with it. All entries are masked.
    pub fn table<R: Registers>(&self, registers: R) -> MsixTable<R> {
        let table = MsixTable { registers, entries: self.entries };
        for index in 0..self.entries {
            table.mask(index, true);
        }
        table
    }

    /// Turns it on, or off: then the function uses its line.
    pub fn enable<C: Config>(&self, config: &C, on: bool) {
        let head = config.read(self.function.address, self.at) & !(MSIX_MASKED | MSIX_ENABLE);
        let head = head | if on { MSIX_ENABLE } else { 0 };
        // Its half alone: Xen, where it keeps the table itself, lets nothing else of the capability be written.
        config.write16(self.function.address, self.at + 2, (head >> 16) as u16);
    }
}

/// The messages of a function, each with its store.
#[derive(Debug)]
pub struct MsixTable<R> {
    registers: R,
    entries: u16,
}

impl<R: Registers> MsixTable<R> {
    fn entry(&self, index: u16) -> u64 {
        assert!(index < self.entries, "message {index} of {}", self.entries);
        u64::from(index) * ENTRY
    }

    /// Sets what message `index` stores, and lets it.
    ///
    /// # Panics
    /// When there is no such message.
    pub fn set(&self, index: u16, store: Store) {
        let at = self.entry(index);
        // An entry is changed while it is masked; what it should have stored meanwhile, it stores then.
        self.mask(index, true);
        self.registers.write(at, store.address as u32);
        self.registers.write(at + 4, (store.address >> 32) as u32);
        self.registers.write(at + 8, store.data);
        self.mask(index, false);
    }

    /// Holds message `index` back, or lets it.
    ///
    /// # Panics
    /// As [`MsixTable::set`].
    pub fn mask(&self, index: u16, masked: bool) {
        let at = self.entry(index) + 12;
        let control = self.registers.read(at) & !ENTRY_MASKED;
        self.registers.write(at, control | if masked { ENTRY_MASKED } else { 0 });
    }
}

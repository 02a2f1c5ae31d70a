//! Hardware, for a domain that was given some: PCI configuration space, registers in memory, interrupts.
//!
//! Nothing here leads to Rust's own memory: registers are mapped from machine addresses that are no RAM, which the hypervisor
//! checks. But a device that masters the bus reads and writes any memory of the machine if it is told so: what a driver writes
//! into its registers is for the driver to answer for.

use hypercall_abi::physdev::{
    MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MSI, PhysdevEoi, PhysdevMapPirq, PhysdevPciDeviceAdd, PhysdevSetIopl,
    PhysdevSetupGsi, PhysdevUnmapPirq,
};
use hypercall_abi::subops::PhysdevOp;
use hypercall_abi::{DomId, Errno, MachAddr, Mfn, PAGE_SIZE};
use spin::Mutex;

use crate::control;
use crate::events::{Channel, Events};
use crate::hypercall::stub;
use crate::memory::{self, Access, OutOfMemory, Page, Range, Shared};

/// Level of I/O privilege at which a guest's kernel may use ports.
const KERNEL: u32 = 1;
/// Page-table bits of memory that no cache may keep: write-through and cache-disable.
const UNCACHED: u64 = 1 << 3 | 1 << 4;

fn physdev<T>(operation: PhysdevOp, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: each caller pairs the command with its own struct, which lives through the call and has no pointers in it.
    unsafe { stub::physdev_op(u64::from(operation.number()), (&raw mut *argument) as u64) }.map(drop)
}

/// Ports side by side, for a device that has its registers there. Those of a bus master are as this module says.
#[derive(Debug)]
pub struct Ports {
    first: u16,
    count: u16,
}

impl Ports {
    /// Lets this vCPU's kernel use `count` ports from `first` on that the domain was given.
    ///
    /// # Errors
    /// `EINVAL` for ports beyond the last; without the right to the ports, their use faults.
    pub fn open(first: u16, count: u16) -> Result<Ports, Errno> {
        first.checked_add(count.saturating_sub(1)).ok_or(Errno::EINVAL)?;
        physdev(PhysdevOp::SetIopl, &mut PhysdevSetIopl { iopl: KERNEL })?;
        Ok(Ports { first, count })
    }

    fn port(&self, at: u16) -> u16 {
        assert!(at < self.count, "port {at} of {}", self.count);
        self.first + at
    }

    /// Reads a byte from the port `at` places behind the first.
    ///
    /// # Panics
    /// When it is not one of them.
    #[must_use]
    pub fn read(&self, at: u16) -> u8 {
        let value: u8;
        // SAFETY: a port that the domain was given, of a device whose driver answers for it; no memory of Rust's is behind it.
        unsafe {
            core::arch::asm!("in al, dx", out("al") value, in("dx") self.port(at), options(nostack, preserves_flags));
        }
        value
    }

    /// Writes a byte to it.
    ///
    /// # Panics
    /// As [`Ports::read`].
    pub fn write(&self, at: u16, value: u8) {
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("out dx, al", in("al") value, in("dx") self.port(at), options(nostack, preserves_flags));
        }
    }
}

/// The two ports behind which PCI configuration space is (mechanism 1 of the PCI specification).
#[derive(Debug)]
pub struct ConfigPorts(());

/// The address register is one for all.
static CONFIG: Mutex<()> = Mutex::new(());

impl ConfigPorts {
    const ADDRESS: u16 = 0xcf8;
    const DATA: u16 = 0xcfc;

    /// Opens them: lets this vCPU's kernel use the ports that the domain was given.
    ///
    /// # Errors
    /// None that is known; without the right to the ports, their use faults.
    pub fn open() -> Result<ConfigPorts, Errno> {
        physdev(PhysdevOp::SetIopl, &mut PhysdevSetIopl { iopl: KERNEL })?;
        Ok(ConfigPorts(()))
    }

    /// Reads the register that `selector`, as the address port takes it, selects.
    #[must_use]
    pub fn read(&self, selector: u32) -> u32 {
        let _one = CONFIG.lock();
        let value: u32;
        // SAFETY: reads of configuration space have no effect on memory.
        unsafe {
            core::arch::asm!("out dx, eax", "mov edx, {data:e}", "in eax, dx", data = in(reg) u32::from(Self::DATA),
                inout("eax") selector => value, inout("edx") u32::from(Self::ADDRESS) => _, options(nostack));
        }
        value
    }

    /// Writes it.
    pub fn write(&self, selector: u32, value: u32) {
        let _one = CONFIG.lock();
        // SAFETY: not by itself an effect on memory; the module says who answers for what a device does then.
        unsafe {
            core::arch::asm!("out dx, eax", "mov edx, {data:e}", "mov eax, {value:e}", "out dx, eax",
                data = in(reg) u32::from(Self::DATA), value = in(reg) value,
                inout("eax") selector => _, inout("edx") u32::from(Self::ADDRESS) => _, options(nostack));
        }
    }

    /// Writes the lower or the upper half of it alone.
    pub fn write16(&self, selector: u32, upper: bool, value: u16) {
        let _one = CONFIG.lock();
        let data = Self::DATA + if upper { 2 } else { 0 };
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("out dx, eax", "mov edx, {data:e}", "mov eax, {value:e}", "out dx, ax",
                data = in(reg) u32::from(data), value = in(reg) u32::from(value),
                inout("eax") selector => _, inout("edx") u32::from(Self::ADDRESS) => _, options(nostack));
        }
    }
}

/// Registers of a device, mapped uncached until dropped.
#[derive(Debug)]
pub struct Registers {
    range: Range,
    offset: u64,
    bytes: u64,
}

impl Registers {
    /// Maps `bytes` bytes from machine address `address` on.
    ///
    /// # Errors
    /// `EPERM`, `EINVAL` what is not for this domain; `ENOMEM`.
    pub fn map(address: u64, bytes: u64) -> Result<Registers, Errno> {
        let page = PAGE_SIZE as u64;
        let offset = address % page;
        let pages = offset.checked_add(bytes).ok_or(Errno::EINVAL)?.div_ceil(page);
        let range = Range::new(pages)?;
        for index in 0..pages {
            let entry =
                Mfn::new(address / page + index).address().get() | Access::ReadWrite.bits() | UNCACHED;
            // SAFETY: a fresh range without Rust objects, seen by volatile accesses only.
            unsafe { memory::set_leaf(range.address(index), entry)? };
        }
        Ok(Registers { range, offset, bytes })
    }

    fn place<T>(&self, offset: u64) -> *mut T {
        let width = size_of::<T>() as u64;
        let fits = offset.checked_add(width).is_some_and(|end| end <= self.bytes);
        assert!(
            fits && (self.offset + offset).is_multiple_of(width),
            "register {offset:#x} of {:#x} bytes",
            self.bytes
        );
        (self.range.start() + self.offset + offset) as *mut T
    }

    /// Reads 32 bits at byte `offset`.
    ///
    /// # Panics
    /// When they are not inside, or not aligned.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        // SAFETY: inside the mapping, aligned; volatile, so the access is as it stands here.
        unsafe { self.place::<u32>(offset).read_volatile() }
    }

    /// Writes 32 bits at byte `offset`.
    ///
    /// # Panics
    /// As [`Registers::read`].
    pub fn write(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { self.place::<u32>(offset).write_volatile(value) };
    }

    /// Reads 16 bits at byte `offset`.
    ///
    /// # Panics
    /// As [`Registers::read`].
    #[must_use]
    pub fn read16(&self, offset: u64) -> u16 {
        // SAFETY: as above.
        unsafe { self.place::<u16>(offset).read_volatile() }
    }

    /// Writes 16 bits at byte `offset`.
    ///
    /// # Panics
    /// As [`Registers::read`].
    pub fn write16(&self, offset: u64, value: u16) {
        // SAFETY: as above.
        unsafe { self.place::<u16>(offset).write_volatile(value) };
    }

    /// Reads the byte at `offset`.
    ///
    /// # Panics
    /// As [`Registers::read`].
    #[must_use]
    pub fn read8(&self, offset: u64) -> u8 {
        // SAFETY: as above.
        unsafe { self.place::<u8>(offset).read_volatile() }
    }

    /// Writes the byte at `offset`.
    ///
    /// # Panics
    /// As [`Registers::read`].
    pub fn write8(&self, offset: u64, value: u8) {
        // SAFETY: as above.
        unsafe { self.place::<u8>(offset).write_volatile(value) };
    }
}

/// A page of this domain's that a device reads and writes, zeroed when made; freed when dropped.
///
/// Whoever drops it answers for the device: it has to have been told that the page is none of its business any more.
#[derive(Debug)]
pub struct DmaPage {
    machine: MachAddr,
    shared: Shared,
}

impl DmaPage {
    /// A zeroed page.
    ///
    /// # Errors
    /// When the domain has none left.
    pub fn new() -> Result<DmaPage, OutOfMemory> {
        let page = Page::new()?;
        // A page keeps its frame for as long as it is this domain's.
        let machine = page.mfn().address();
        // SAFETY: leaked, so no reference leads to it, and mapped as heap until it is freed.
        let shared = unsafe { Shared::new(page.leak(), PAGE_SIZE) };
        Ok(DmaPage { machine, shared })
    }

    /// Where it is in the machine: what a device is told.
    #[must_use]
    pub fn machine_address(&self) -> MachAddr {
        self.machine
    }
}

impl Drop for DmaPage {
    fn drop(&mut self) {
        // SAFETY: `new` leaked it, and nobody else knows its address.
        drop(unsafe { Page::from_leaked(self.shared.address()) });
    }
}

crate::ring::shared_by_field!(DmaPage);

/// A message interrupt of this domain, given back when dropped. Its port ([`Events::bind_pirq`]) should be closed first.
#[derive(Debug)]
pub struct Message(u32);

/// The store by which a device raises it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Machine address.
    pub address: u64,
    /// The value.
    pub data: u32,
}

impl Message {
    /// Takes one.
    ///
    /// # Errors
    /// As [`control::allocate_message`].
    pub fn allocate() -> Result<Message, Errno> {
        control::allocate_message().map(|message| Message(message.pirq))
    }

    /// Its number.
    #[must_use]
    pub fn pirq(&self) -> u32 {
        self.0
    }

    /// Takes one for entry `entry` of a function's MSI-X table, as Xen gives them: it writes the table itself, as soon as the message is
    /// bound to a port. The function is `devfn` (device in the upper five bits) on `bus`; `base` is where the memory begins that
    /// its table is in. MSI-X is left to the caller to turn on, by its half of the capability's first word alone.
    ///
    /// # Errors
    /// `ENODEV` no such function, `EEXIST` this entry has one, `ENOSPC`; `EINVAL` from a hypervisor that hands out stores instead
    /// ([`Message::allocate`]).
    pub fn for_entry(bus: u8, devfn: u8, entry: u16, base: u64) -> Result<Message, Errno> {
        // Without an IOMMU Xen knows no function before it is told. Those that it knows, it refuses.
        let mut add = PhysdevPciDeviceAdd { bus, devfn, ..PhysdevPciDeviceAdd::default() };
        let _ = physdev(PhysdevOp::PciDeviceAdd, &mut add);
        let mut map = PhysdevMapPirq {
            domid: DomId::SELF,
            kind: MAP_PIRQ_TYPE_MSI,
            index: -1,
            pirq: -1,
            bus: i32::from(bus),
            devfn: i32::from(devfn),
            entry_nr: i32::from(entry),
            table_base: base,
            ..PhysdevMapPirq::default()
        };
        physdev(PhysdevOp::MapPirq, &mut map)?;
        u32::try_from(map.pirq).map(Message).map_err(|_| Errno::EINVAL)
    }

    /// What its device has to write: to be asked again after [`Channel::bind_vcpu`].
    ///
    /// # Errors
    /// `ENOSYS` or `EACCES` on Xen, which writes the table itself.
    pub fn store(&self) -> Result<Store, Errno> {
        control::interrupt_info(self.0).map(|info| Store { address: info.address, data: info.data })
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        let pirq = i32::try_from(self.0).unwrap_or(-1);
        // It is ours: it cannot fail.
        let _ = physdev(PhysdevOp::UnmapPirq, &mut PhysdevUnmapPirq { domid: DomId::SELF, pad0: 0, pirq });
    }
}

/// An interrupt pin, bound while this lives.
#[derive(Debug)]
pub struct Line {
    gsi: u32,
    /// Fires with each interrupt.
    pub channel: Channel,
}

impl Line {
    /// Binds a global interrupt as PCI's lines are: level-triggered, active low. How it is triggered is said once in the life of the
    /// host; it stays if somebody said it before.
    ///
    /// # Errors
    /// `EPERM`, `EINVAL` when it is not for this domain, `EEXIST`, `EBUSY` when it is bound.
    pub fn bind(events: &Events, gsi: u32) -> Result<Line, Errno> {
        let index = i32::try_from(gsi).map_err(|_| Errno::EINVAL)?;
        let mut setup =
            PhysdevSetupGsi { gsi: index, triggering: 1, polarity: 1, ..PhysdevSetupGsi::default() };
        match physdev(PhysdevOp::SetupGsi, &mut setup) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
        let mut map = PhysdevMapPirq {
            domid: DomId::SELF,
            kind: MAP_PIRQ_TYPE_GSI,
            index,
            pirq: index,
            ..Default::default()
        };
        physdev(PhysdevOp::MapPirq, &mut map)?;
        Ok(Line { gsi, channel: events.bind_pirq(gsi)? })
    }

    /// Says that what the device wanted has been done: from here on it can interrupt again.
    ///
    /// # Errors
    /// None that is known.
    pub fn end(&self) -> Result<(), Errno> {
        physdev(PhysdevOp::Eoi, &mut PhysdevEoi { irq: self.gsi })
    }
}

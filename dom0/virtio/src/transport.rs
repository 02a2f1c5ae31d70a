//! The PCI transport (4.1): where a device's registers are, how it is brought up, told and reset.

use crate::queue::{MOST, Queue};
use crate::{Error, Fault, Kind, Platform, kind};
use core::fmt;
use guest_sdk::hardware::Store;
use pci::{Bar, Command, Config as _, Function, Msix, MsixTable, Registers};

/// A capability of the vendor's own.
const VENDOR_SPECIFIC: u8 = 0x09;
/// What such capabilities are of (4.1.4): 1 the common registers, 2 those to be told by, 3 the register of causes, 4 the device's own.
const NOTIFY: u8 = 2;
const KINDS: usize = 5;

/// Registers of the common part (4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub const QUEUE_DESCRIPTORS: u64 = 32;
    pub const QUEUE_AVAILABLE: u64 = 40;
    pub const QUEUE_USED: u64 = 48;
    pub const BYTES: u64 = 56;
}

bitflags::bitflags! {
    /// How far the driver has come, and what the device says about it (2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u8 {
        /// It has been seen.
        const ACKNOWLEDGE = 1;
        /// There is a driver for it.
        const DRIVER = 2;
        /// It is in use.
        const DRIVER_OK = 4;
        /// Both agree on features.
        const FEATURES_OK = 8;
        /// The device cannot go on without a reset.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }
}

/// Features of every kind of device (6).
pub mod feature {
    /// Tables of descriptors.
    pub const INDIRECT: u64 = 1 << 28;
    /// Being told by index.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// The modern form.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device's addresses are the platform's, which may translate them: to be accepted if offered. Here they are machine addresses.
    pub const PLATFORM_ADDRESSES: u64 = 1 << 33;
}

/// No message at all.
const NO_VECTOR: u16 = 0xffff;
/// How often a reset is looked after before it is given up: each look leaves the guest, which takes microseconds.
const RESET_LOOKS: u32 = 100_000;

/// By what a device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// Its line: who hears it has to read [`Transport::cause`].
    Line,
    /// So many entries of its table, at least one: the first for changes of its configuration, the others for its queues one by one; the
    /// last is shared by all for which there is none.
    Messages(u16),
}

impl Vectors {
    fn config(self) -> u16 {
        if self == Self::Line { NO_VECTOR } else { 0 }
    }

    fn queue(self, number: u16) -> u16 {
        match self {
            Self::Line => NO_VECTOR,
            Self::Messages(count) => number.saturating_add(1).min(count.saturating_sub(1)),
        }
    }
}

/// Registers at their place in a base address.
#[derive(Clone, Copy)]
struct Place {
    address: u64,
    bytes: u64,
}

/// A device: its registers, and nothing of what it does.
pub struct Transport<P: Platform> {
    platform: P,
    function: Function,
    common: P::Registers,
    notify: P::Registers,
    notify_bytes: u64,
    notify_multiplier: u32,
    isr: P::Registers,
    device: Option<(P::Registers, u64)>,
    msix: Option<Msix>,
    table: Option<MsixTable<P::Registers>>,
}

impl<P: Platform> fmt::Debug for Transport<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("function", &self.function).finish_non_exhaustive()
    }
}

/// Where a queue is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    number: u16,
    offset: u64,
}

impl<P: Platform> Transport<P> {
    /// Finds and maps the registers of a device, and resets it.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Refused`], [`Error::Reset`].
    pub fn open(platform: P, function: Function) -> Result<Self, Error> {
        let config = platform.config();
        // Memory only: it is to reach none of ours before it has been reset.
        function.allow(config, Command::MEMORY, Command::BUS_MASTER);
        let mut places = [None; KINDS];
        let mut notify_multiplier = 0;
        for (id, at) in function.capabilities(config) {
            if id != VENDOR_SPECIFIC {
                continue;
            }
            let head = config.read(function.address, at);
            let (length, what) = ((head >> 16) as u8, (head >> 24) as u8);
            let needed = if what == NOTIFY { 20 } else { 16 };
            // The first of a kind that can be used is the one to use.
            let Some(place @ None) = places.get_mut(usize::from(what)) else { continue };
            if length < needed || u32::from(at) + u32::from(needed) > 256 {
                continue;
            }
            let bar = config.read(function.address, at + 4) as u8;
            let offset = u64::from(config.read(function.address, at + 8));
            let bytes = u64::from(config.read(function.address, at + 12));
            let Some(Bar::Memory { address, bytes: all }) = function.bar(config, bar) else { continue };
            let Some(address) = address.checked_add(offset).filter(|_| offset + bytes <= all) else {
                continue;
            };
            if address == offset {
                // Firmware gave it no address.
                continue;
            }
            if what == NOTIFY {
                notify_multiplier = config.read(function.address, at + 16);
            }
            *place = Some(Place { address, bytes });
        }
        let [_, common, notify, isr, device] = places;
        let map = |place: Option<Place>, least: u64, what: &'static str| {
            let place = place.filter(|place| place.bytes >= least && place.address % least.min(4) == 0);
            let place = place.ok_or(Error::Missing(what))?;
            platform
                .map(place.address, place.bytes)
                .map(|mapped| (mapped, place.bytes))
                .map_err(Error::Refused)
        };
        let (common, _) = map(common, common::BYTES, "common registers")?;
        let (notify, notify_bytes) = map(notify, 2, "registers to be told by")?;
        let (isr, _) = map(isr, 1, "register of causes")?;
        let device = device.map(|place| map(Some(place), 4, "registers of its own")).transpose()?;
        let msix = Msix::find(config, function);
        let transport = Self {
            platform,
            function,
            common,
            notify,
            notify_bytes,
            notify_multiplier,
            isr,
            device,
            msix,
            table: None,
        };
        transport.reset()?;
        Ok(transport)
    }

    /// The machine below.
    #[must_use]
    pub fn platform(&self) -> &P {
        &self.platform
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> pci::Address {
        self.function.address
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        kind(&self.function).unwrap_or(Kind::Other(0))
    }

    /// Its table of interrupt messages, if it has one.
    #[must_use]
    pub fn msix(&self) -> Option<Msix> {
        self.msix
    }

    /// Maps its table of messages, all masked, for a driver that fills it itself with [`Transport::set_message`].
    ///
    /// # Errors
    /// [`Error::Messages`] when it has none, [`Error::Refused`].
    pub fn map_messages(&mut self) -> Result<(), Error> {
        let msix = self.msix.ok_or(Error::Messages)?;
        let (address, bytes) = msix.place(self.platform.config()).ok_or(Error::Messages)?;
        self.table = Some(msix.table(self.platform.map(address, bytes).map_err(Error::Refused)?));
        Ok(())
    }

    /// Says what message `entry` stores, first or anew.
    ///
    /// # Errors
    /// [`Error::Messages`] when there is no such entry, or the table is not mapped.
    pub fn set_message(&self, entry: u16, store: Store) -> Result<(), Error> {
        let has = self.msix.is_some_and(|msix| entry < msix.entries());
        let table = self.table.as_ref().filter(|_| has).ok_or(Error::Messages)?;
        table.set(entry, store);
        Ok(())
    }

    /// Cuts it off from memory, and resets it.
    ///
    /// # Errors
    /// [`Error::Reset`]: it is still cut off.
    pub(crate) fn reset(&self) -> Result<(), Error> {
        // Whatever becomes of the reset, it reaches no memory from here on: reading back waits for what is on its way.
        self.function.allow(self.platform.config(), Command::empty(), Command::BUS_MASTER);
        self.platform.config().read(self.function.address, 0);
        self.common.write8(common::STATUS, 0);
        for _ in 0..RESET_LOOKS {
            match self.common.read8(common::STATUS) {
                0 => return Ok(()),
                // There is no such device any more: it will never say anything else.
                0xff => break,
                _ => {}
            }
        }
        Err(Error::Reset)
    }

    /// How it is.
    ///
    /// # Errors
    /// When it cannot be used any more.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        match self.common.read8(common::STATUS) {
            0xff => Err(Fault::Gone),
            status if status & Status::NEEDS_RESET.bits() != 0 => Err(Fault::NeedsReset),
            // Somebody has reset it: it knows nothing of its queues any more.
            status if status & Status::DRIVER_OK.bits() == 0 => Err(Fault::NeedsReset),
            _ => Ok(()),
        }
    }

    fn set_status(&self, status: Status) {
        self.common.write8(common::STATUS, status.bits());
    }

    /// Begins to bring it up: agrees on features, those of `wanted` that it offers, and on the modern form. Returns them.
    ///
    /// # Errors
    /// [`Error::Features`].
    pub(crate) fn agree(&self, vectors: Vectors, wanted: u64) -> Result<u64, Error> {
        let (on, off) = match vectors {
            Vectors::Line => (Command::empty(), Command::NO_LINE),
            Vectors::Messages(_) => (Command::NO_LINE, Command::empty()),
        };
        self.function.allow(self.platform.config(), on, off);
        if let Some(msix) = self.msix {
            msix.enable(self.platform.config(), vectors != Vectors::Line);
        }
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        let offered = (0..2).fold(0, |offered, half| {
            self.common.write(common::DEVICE_FEATURE_SELECT, half);
            offered | u64::from(self.common.read(common::DEVICE_FEATURE)) << (32 * half)
        });
        let needed = feature::VERSION_1 | offered & feature::PLATFORM_ADDRESSES;
        let agreed = offered & wanted | needed;
        for half in 0..2 {
            self.common.write(common::DRIVER_FEATURE_SELECT, half);
            self.common.write(common::DRIVER_FEATURE, (agreed >> (32 * half)) as u32);
        }
        let ready = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
        self.set_status(ready);
        let kept = Status::from_bits_retain(self.common.read8(common::STATUS));
        if offered & feature::VERSION_1 == 0 || !kept.contains(Status::FEATURES_OK) {
            self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FAILED);
            return Err(Error::Features);
        }
        self.common.write16(common::CONFIG_VECTOR, vectors.config());
        if self.common.read16(common::CONFIG_VECTOR) != vectors.config() {
            return Err(Error::Messages);
        }
        Ok(agreed)
    }

    /// How many queues it has.
    pub(crate) fn queues(&self) -> u16 {
        self.common.read16(common::QUEUES)
    }

    /// How many descriptors a queue of ours has: a power of two, at most what the device can do; 0 when it has no such queue.
    pub(crate) fn queue_size(&self, number: u16) -> u16 {
        if number >= self.queues() {
            return 0;
        }
        self.common.write16(common::QUEUE_SELECT, number);
        let most = self.common.read16(common::QUEUE_SIZE).min(MOST);
        if most == 0 { 0 } else { 1 << most.ilog2() }
    }

    /// Makes a queue of at least 2 descriptors, in memory of its own; the device does not know it before [`Transport::set_queue`].
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Memory`].
    pub(crate) fn make_queue(&self, number: u16, agreed: u64) -> Result<Queue<P::Page>, Error> {
        let size = self.queue_size(number);
        if size < 2 {
            return Err(Error::Queue(number));
        }
        let page = || self.page();
        Ok(Queue::new([page()?, page()?, page()?], size, agreed & feature::EVENT_INDEX != 0))
    }

    /// A zeroed page of its platform's.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub(crate) fn page(&self) -> Result<P::Page, Error> {
        self.platform.page().ok_or(Error::Memory)
    }

    /// Tells the device where a queue is, and returns where the device is told of it.
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Messages`].
    pub(crate) fn set_queue(
        &self,
        number: u16,
        queue: &Queue<P::Page>,
        vectors: Vectors,
    ) -> Result<Doorbell, Error> {
        if self.queue_size(number) < queue.size() {
            return Err(Error::Queue(number));
        }
        self.common.write16(common::QUEUE_SIZE, queue.size());
        self.common.write16(common::QUEUE_VECTOR, vectors.queue(number));
        if self.common.read16(common::QUEUE_VECTOR) != vectors.queue(number) {
            return Err(Error::Messages);
        }
        let places = [common::QUEUE_DESCRIPTORS, common::QUEUE_AVAILABLE, common::QUEUE_USED];
        for (register, place) in places.into_iter().zip(queue.places()) {
            self.common.write(register, place as u32);
            self.common.write(register + 4, (place >> 32) as u32);
        }
        let offset = u64::from(self.common.read16(common::QUEUE_NOTIFY_OFFSET));
        let offset = offset * u64::from(self.notify_multiplier);
        if offset % 2 != 0 || offset + 2 > self.notify_bytes {
            return Err(Error::Queue(number));
        }
        self.common.write16(common::QUEUE_ENABLE, 1);
        Ok(Doorbell { number, offset })
    }

    /// Ends bringing it up: from here on it works, and reaches memory.
    pub(crate) fn go(&self) {
        self.function.allow(self.platform.config(), Command::BUS_MASTER, Command::empty());
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK);
    }

    /// Tells the device that something is in a queue.
    pub(crate) fn ring(&self, doorbell: Doorbell) {
        self.notify.write16(doorbell.offset, doorbell.number);
    }

    /// Why it interrupts by its line, which this ends: bit 0 for queues, bit 1 for its configuration; 0 when it was not this device.
    pub fn cause(&self) -> u8 {
        self.isr.read8(0)
    }

    /// Reads the registers of its own kind, all of one moment.
    pub(crate) fn own<T>(&self, read: impl Fn(&Own<'_, P::Registers>) -> T) -> T {
        let own = Own { registers: self.device.as_ref().map(|(registers, bytes)| (registers, *bytes)) };
        let mut value = None;
        // They change once in a blue moon; a device that says that they always do is not waited for.
        for _ in 0..16 {
            let before = self.common.read8(common::GENERATION);
            value = Some(read(&own));
            if self.common.read8(common::GENERATION) == before {
                break;
            }
        }
        value.unwrap_or_else(|| read(&own))
    }
}

impl<P: Platform> Drop for Transport<P> {
    /// Cuts it off from memory: whoever owns pages that it knows drops them after this.
    fn drop(&mut self) {
        let _ = self.reset();
    }
}

/// Registers of a device's own kind, each read in its width; zeros where it has none.
pub(crate) struct Own<'a, R> {
    registers: Option<(&'a R, u64)>,
}

impl<R: Registers> Own<'_, R> {
    fn at(&self, at: u64, bytes: u64) -> Option<&R> {
        self.registers.filter(|(_, all)| at + bytes <= *all).map(|(registers, _)| registers)
    }
    pub(crate) fn u8(&self, at: u64) -> u8 {
        self.at(at, 1).map_or(0, |registers| registers.read8(at))
    }
    pub(crate) fn u16(&self, at: u64) -> u16 {
        self.at(at, 2).map_or(0, |registers| registers.read16(at))
    }
    pub(crate) fn u32(&self, at: u64) -> u32 {
        self.at(at, 4).map_or(0, |registers| registers.read(at))
    }
    pub(crate) fn u64(&self, at: u64) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }
}

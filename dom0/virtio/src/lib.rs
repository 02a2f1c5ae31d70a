//! Drivers for virtio devices on PCI, as values: requests in, completions out, no waiting of their own.
//!
//! | I want to… | go to |
//! |---|---|
//! | see which devices there are | [`find`] |
//! | bring one up | [`Transport`]: registers, features, messages |
//! | read and write a disk | [`Block`] |
//! | send and receive frames | [`Net`] |
//! | talk to the host through a console's ports | [`Console`] |
//! | know whether a device still works | [`Device`], which each of them has |
//! | know what goes over a queue | [`queue`] |
//! | put a machine, or a model of one, below | [`Platform`] |
//!
//! ```ignore
//! for (function, kind) in virtio::find(platform.config()) {
//!     let transport = Transport::open(platform, function)?;      // found, mapped, reset
//!     transport.set_message(0, store)?;                             // as many as there are, or none: its line
//!     let mut disk: Block<_, Tag> = Block::start(transport, Vectors::Messages(2))?;
//!     let request = Request { action: Action::Read, sector: 0, segments: &[Segment::of(&page, 0, 4096)] };
//!     disk.submit(&request, tag)?;                                  // several at a time
//!     disk.kick();                                                  // told once, for all of them
//!     // ... its event channel fires ...
//!     while let Some((tag, result)) = disk.completion() { /* the memory that `tag` owns is ours again */ }
//! }
//! ```
//!
//! Written after *Virtual I/O Device (VIRTIO) Version 1.2* (OASIS): 2.7 split virtqueues, 4.1 the PCI transport, 5.1 network, 5.2
//! block, 5.3 console. Legacy devices are not driven.
//!
//! **Memory.** A device reads and writes the machine's memory by machine address ([`Segment`]). Whatever must not be used otherwise while
//! it may do so is owned by the *tag* of a request: the driver keeps the tag until the device has answered, or can reach no memory
//! any more. All that a driver shares with its device lies in [`DmaPage`]s, no part of it across the end of a page: pages that
//! are next to each other here need not be so in the machine.
//!
//! **Trust.** A device is believed about nothing that would hurt: descriptors are kept in own memory beside the shared one, an id in
//! the used ring has to be that of a request under way, a length at most what was offered. What breaks that rule, and a device that
//! asks for a reset, ends in [`Fault`]: the device is cut off from memory (bus mastering off), reset, what was under way is
//! given back as failed, and the device is started again, a few times. What it does with memory that it was given is
//! beyond this: it masters the bus.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;

pub mod block;
pub mod console;
pub mod device;
pub mod net;
pub mod queue;
pub mod transport;

pub use block::{Action, Block, Geometry, IoError, Request};
pub use console::Console;
pub use device::Device;
pub use net::Net;
pub use transport::{Transport, Vectors};

use alloc::vec::Vec;
use core::fmt;
use guest_sdk::ring::SharedPage;
use hypercall_abi::Errno;
use pci::{Config, Function, Registers};

/// A page (4096 bytes) that a device reads and writes, too.
pub trait DmaPage: SharedPage {
    /// Where it is in the machine.
    fn machine_address(&self) -> u64;
}

/// What drivers need of a machine.
pub trait Platform {
    /// Its configuration space.
    type Config: Config;
    /// Registers of a device.
    type Registers: Registers;
    /// Memory that a device can reach.
    type Page: DmaPage;

    /// Its configuration space.
    fn config(&self) -> &Self::Config;

    /// Maps registers: `bytes` bytes from machine address `address` on.
    ///
    /// # Errors
    /// The hypervisor's.
    fn map(&self, address: u64, bytes: u64) -> Result<Self::Registers, Errno>;

    /// A zeroed page; none when memory has run out.
    fn page(&self) -> Option<Self::Page>;
}

impl<P: Platform> Platform for &P {
    type Config = P::Config;
    type Registers = P::Registers;
    type Page = P::Page;

    fn config(&self) -> &Self::Config {
        (**self).config()
    }
    fn map(&self, address: u64, bytes: u64) -> Result<Self::Registers, Errno> {
        (**self).map(address, bytes)
    }
    fn page(&self) -> Option<Self::Page> {
        (**self).page()
    }
}

impl DmaPage for guest_sdk::hardware::DmaPage {
    fn machine_address(&self) -> u64 {
        guest_sdk::hardware::DmaPage::machine_address(self).get()
    }
}

impl<T: DmaPage> DmaPage for alloc::sync::Arc<T>
where
    alloc::sync::Arc<T>: SharedPage,
{
    fn machine_address(&self) -> u64 {
        (**self).machine_address()
    }
}

/// A piece of the machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins: a machine address.
    pub address: u64,
    /// How long it is.
    pub bytes: u32,
}

impl Segment {
    /// `bytes` bytes of a page from `offset` on, as far as the page goes.
    #[must_use]
    pub fn of<P: DmaPage>(page: &P, offset: u16, bytes: u16) -> Segment {
        let offset = u32::from(offset).min(4096);
        Segment {
            address: page.machine_address() + u64::from(offset),
            bytes: u32::from(bytes).min(4096 - offset),
        }
    }
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network card.
    Net,
    /// A disk.
    Block,
    /// A console.
    Console,
    /// Another device, by its number (chapter 5).
    Other(u16),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net => f.write_str("network card"),
            Self::Block => f.write_str("disk"),
            Self::Console => f.write_str("console"),
            Self::Other(number) => write!(f, "virtio device of type {number}"),
        }
    }
}

/// The vendor of all of them (4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ids of modern devices are their type behind this.
const FIRST_MODERN: u16 = 0x1040;
const LAST_MODERN: u16 = 0x107f;

/// What a function is, when it is a virtio device that speaks the modern form. Those that speak both have old ids.
#[must_use]
pub fn kind(function: &Function) -> Option<Kind> {
    let (vendor, device) = function.id();
    if vendor != VENDOR {
        return None;
    }
    let number = match device {
        // Transitional ones: 4.1.2.
        0x1000 => 1,
        0x1001 => 2,
        0x1003 => 3,
        FIRST_MODERN..=LAST_MODERN => device - FIRST_MODERN,
        _ => return None,
    };
    Some(match number {
        1 => Kind::Net,
        2 => Kind::Block,
        3 => Kind::Console,
        number => Kind::Other(number),
    })
}

/// All virtio devices, in the order of their places.
pub fn find<C: Config>(config: &C) -> Vec<(Function, Kind)> {
    let functions = pci::functions(config).into_iter();
    functions.filter_map(|function| Some((function, kind(&function)?))).collect()
}

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It does not have what a modern device has: the text says what is missing.
    Missing(&'static str),
    /// It does not come out of its reset.
    Reset,
    /// It does not take the features that it offers.
    Features,
    /// It does not have queue so and so, or cannot use it.
    Queue(u16),
    /// It cannot use its interrupt messages.
    Messages,
    /// There is no memory left.
    Memory,
    /// Its registers cannot be mapped.
    Refused(Errno),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(what) => write!(f, "it has no {what}: is it a modern device (disable-legacy=on)?"),
            Self::Reset => f.write_str("it does not come out of its reset"),
            Self::Features => f.write_str("it does not take the features that it offers"),
            Self::Queue(number) => write!(f, "it has no queue {number} that can be used"),
            Self::Messages => f.write_str("it cannot use its interrupt messages"),
            Self::Memory => f.write_str("there is no memory left for it"),
            Self::Refused(errno) => write!(f, "its registers cannot be mapped: {errno}"),
        }
    }
}

impl core::error::Error for Error {}

/// What a device did wrong while it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It says that it needs a reset.
    NeedsReset,
    /// It answers no more: its registers read as all ones.
    Gone,
    /// It says that more requests are done than were under way.
    Index(u16),
    /// It says that a request is done that is not under way: its id.
    Id(u32),
    /// It says that it has written more than it was given room for.
    Length {
        /// So much.
        said: u32,
        /// Of so much.
        room: u32,
    },
    /// A message of its own is longer or shorter than it may be, or names what there is not.
    Message,
    /// It has not answered a request for a long time.
    Silent,
    /// Nothing: somebody wants it to begin anew.
    Asked,
    /// Nothing: it is taken out of the machine.
    Removed,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsReset => f.write_str("it asks for a reset"),
            Self::Gone => f.write_str("it does not answer any more"),
            Self::Index(count) => {
                write!(f, "it says that {count} requests are done, more than were under way")
            }
            Self::Id(id) => write!(f, "it says that request {id} is done, which was not under way"),
            Self::Length { said, room } => write!(f, "it says that it wrote {said} bytes where {room} were"),
            Self::Message => f.write_str("it sends messages that make no sense"),
            Self::Silent => f.write_str("it has not answered a request for too long"),
            Self::Asked => f.write_str("a reset was asked for"),
            Self::Removed => f.write_str("it is taken out of the machine"),
        }
    }
}

impl core::error::Error for Fault {}

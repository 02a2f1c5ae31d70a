//! The machine's own devices: found at start, brought up, shown by the shell, and used by back ends.
//!
//! | I want to… | go to |
//! |---|---|
//! | use a disk | [`storage`] by its name, then [`Storage`]: `read`, `write`, `flush`; jobs of back ends |
//! | use a network card | [`card`], then [`NetDevice`]: `frame`, `send` |
//! | talk to somebody on the host | [`port`] by its name, then [`Port`]: `attend`, `read`, `write` |
//! | see what there is | [`all`] |
//! | know how a device is driven | the package `virtio` |

mod console;
mod disk;
mod hotplug;
mod machine;
mod net;
pub mod shell;

pub use console::{ConsoleDevice, Port};
pub use disk::{Device as DiskDevice, Storage};
pub use net::NetDevice;

use crate::say;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use guest_sdk::events::Events;
use machine::{Machine, machine};
use pci::Function;
use spin::Mutex;
use virtio::{Kind, Platform as _, Transport};

/// A device that is used.
#[derive(Clone)]
pub enum Device {
    /// A disk.
    Disk(Arc<DiskDevice>),
    /// A network card.
    Net(Arc<NetDevice>),
    /// A console.
    Console(Arc<ConsoleDevice>),
}

impl Device {
    /// Where it is.
    fn place(&self) -> pci::Address {
        match self {
            Device::Disk(disk) => disk.place(),
            Device::Net(card) => card.place(),
            Device::Console(console) => console.place(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Device::Disk(disk) => disk.name(),
            Device::Net(card) => card.name(),
            Device::Console(console) => console.name(),
        }
    }
}

static DEVICES: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// Who else has names: disks and cards that were taken out, as long as somebody uses them, and what could not be brought up.
static GONE: Mutex<Vec<Gone>> = Mutex::new(Vec::new());

/// One that is not used, and has a name.
enum Gone {
    /// Taken out.
    Disk(Weak<DiskDevice>),
    Net(Weak<NetDevice>),
    /// Not brought up: others are called as if it had been, as long as nothing else is in its place.
    Failed(pci::Address, String),
}

impl Gone {
    /// Whether its name is free for what is at `place`.
    fn is_forgotten(&self, place: pci::Address) -> bool {
        match self {
            Gone::Disk(disk) => disk.strong_count() == 0,
            Gone::Net(card) => card.strong_count() == 0,
            Gone::Failed(at, _) => *at == place,
        }
    }

    fn is_called(&self, name: &str) -> bool {
        match self {
            Gone::Disk(disk) => disk.upgrade().is_some_and(|disk| disk.name() == name),
            Gone::Net(card) => card.upgrade().is_some_and(|card| card.name() == name),
            Gone::Failed(_, its) => its == name,
        }
    }
}

/// Finds the machine's devices and brings them up; says what came of each.
pub fn start(events: &Events) {
    let machine = match machine() {
        Ok(machine) => machine,
        Err(errno) => return say!("dom0: no devices: its ports are not for us ({errno})"),
    };
    for (function, kind) in virtio::find(machine.config()) {
        bring_up(machine, function, &kind, events);
    }
    hotplug::start(machine, events);
}

/// Brings a device up; says what came of it.
fn bring_up(machine: &'static Machine, function: Function, kind: &Kind, events: &Events) {
    let kind_name = match kind {
        Kind::Block => "vd",
        Kind::Net => "net",
        Kind::Console => "console",
        Kind::Other(_) => return,
    };
    let name = free_name(kind_name, function.address);
    let started = Transport::open(machine, function).and_then(|transport| match kind {
        Kind::Block => {
            let disk = DiskDevice::start(&name, transport, events)?;
            Ok(Some((format!("disk {name}: {}", disk.about()), Device::Disk(disk))))
        }
        Kind::Net => {
            let card = NetDevice::start(&name, transport, events)?;
            Ok(Some((format!("network card {name}: {}", card.about()), Device::Net(card))))
        }
        Kind::Console => {
            let console = ConsoleDevice::start(&name, transport, events)?;
            Ok(Some((format!("{name}: {}", console.about()), Device::Console(console))))
        }
        Kind::Other(_) => Ok(None),
    });
    match started {
        Ok(Some((line, device))) => {
            say!("{line}");
            DEVICES.lock().push(device);
        }
        Ok(None) => {}
        Err(error) => {
            say!("{kind} at {} is not used: {error}", function.address);
            GONE.lock().push(Gone::Failed(function.address, name));
        }
    }
}

/// The first name of its kind that no device has, for the one at `place`.
fn free_name(kind: &str, place: pci::Address) -> String {
    let devices = all();
    let mut gone = GONE.lock();
    gone.retain(|gone| !gone.is_forgotten(place));
    let is_taken = |name: &str| {
        devices.iter().any(|device| device.name() == name) || gone.iter().any(|gone| gone.is_called(name))
    };
    let mut number = 0;
    loop {
        let name = name(kind, number);
        if number == u8::MAX || !is_taken(&name) {
            return name;
        }
        number += 1;
    }
}

/// The name of a device of its kind: disks have letters, as long as there are some.
fn name(kind: &str, number: u8) -> String {
    match number {
        0..26 if kind == "vd" => format!("{kind}{}", char::from(b'a' + number)),
        _ => format!("{kind}{number}"),
    }
}

/// All devices that are used.
pub fn all() -> Vec<Device> {
    DEVICES.lock().clone()
}

/// A disk, by its name, for one user.
///
/// # Errors
/// What to say.
pub fn storage(wanted: &str) -> Result<Storage, String> {
    let devices = all();
    let disks = devices.iter().filter_map(|device| match device {
        Device::Disk(disk) => Some(disk),
        _ => None,
    });
    let mut names = Vec::new();
    for disk in disks {
        if disk.name() == wanted {
            return Ok(Storage::new(disk));
        }
        names.push(disk.name());
    }
    let there = if names.is_empty() { "none".to_string() } else { names.join(", ") };
    Err(format!("the machine has no disk {wanted}: there is {there}"))
}

/// All network cards, in order.
pub fn cards() -> Vec<Arc<NetDevice>> {
    let cards = all().into_iter().filter_map(|device| match device {
        Device::Net(card) => Some(card),
        _ => None,
    });
    cards.collect()
}

/// A network card, by its name.
///
/// # Errors
/// What to say.
pub fn card(wanted: &str) -> Result<Arc<NetDevice>, String> {
    let devices = all();
    let mut cards = devices.into_iter().filter_map(|device| match device {
        Device::Net(card) => Some(card),
        _ => None,
    });
    cards
        .find(|card| card.name() == wanted)
        .ok_or_else(|| format!("the machine has no network card {wanted}"))
}

/// The port `name` of the machine's first console, if it has one; it may not be there yet, or ever.
pub fn port(name: &str) -> Option<Port> {
    all().into_iter().find_map(|device| match device {
        Device::Console(console) => Some(Port::new(&console, name)),
        _ => None,
    })
}

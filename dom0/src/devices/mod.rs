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
use alloc::sync::Arc;
use alloc::vec::Vec;
use guest_sdk::events::Events;
use machine::machine;
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
}

static DEVICES: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// Finds the machine's devices and brings them up; says what came of each.
pub fn start(events: &Events) {
    let machine = match machine() {
        Ok(machine) => machine,
        Err(errno) => return say!("dom0: no devices: its ports are not for us ({errno})"),
    };
    let mut numbers = [0u8; 3];
    let mut next = |kind: usize, name_of: &str| {
        let number =
            numbers.get_mut(kind).map_or(0, |number| core::mem::replace(number, number.saturating_add(1)));
        name(name_of, number)
    };
    for (function, kind) in virtio::find(machine.config()) {
        let at = function.address;
        let open = || Transport::open(machine, function);
        let started = match kind {
            Kind::Block => {
                let name = next(0, "vd");
                let started = open().and_then(|transport| DiskDevice::start(&name, transport, events));
                started.map(|disk| (format!("disk {name}: {}", disk.about()), Device::Disk(disk)))
            }
            Kind::Net => {
                let name = next(1, "net");
                let started = open().and_then(|transport| NetDevice::start(&name, transport, events));
                started.map(|card| (format!("network card {name}: {}", card.about()), Device::Net(card)))
            }
            Kind::Console => {
                let name = next(2, "console");
                let started = open().and_then(|transport| ConsoleDevice::start(&name, transport, events));
                started.map(|console| (format!("{name}: {}", console.about()), Device::Console(console)))
            }
            Kind::Other(_) => continue,
        };
        match started {
            Ok((line, device)) => {
                say!("{line}");
                DEVICES.lock().push(device);
            }
            Err(error) => say!("{kind} at {at} is not used: {error}"),
        }
    }
    hotplug::start(machine);
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

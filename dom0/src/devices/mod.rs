//! The machine's own devices: found at start, brought up, shown by the shell, and used by back ends.
//!
//! | I want to… | go to |
//! |---|---|
//! | use a disk | [`storage`] by its name, then [`Storage`]: `read`, `write`, `flush`; jobs of back ends |
//! | see what there is | [`all`] |
//! | know how a device is driven | the package `virtio` |

mod disk;
mod machine;
pub mod shell;

pub use disk::{Device as DiskDevice, Storage};

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
}

static DEVICES: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// Finds the machine's devices and brings them up; says what came of each.
pub fn start(events: &Events) {
    let machine = match machine() {
        Ok(machine) => machine,
        Err(errno) => return say!("dom0: no devices: its ports are not for us ({errno})"),
    };
    let mut disks = 0u8;
    for (function, kind) in virtio::find(machine.config()) {
        let at = function.address;
        let started = match kind {
            Kind::Block => {
                let name = name("vd", disks);
                disks = disks.saturating_add(1);
                let started = Transport::open(machine, function)
                    .and_then(|transport| DiskDevice::start(&name, transport, events));
                started.map(|disk| (format!("disk {name}: {}", disk.about()), Device::Disk(disk)))
            }
            _ => continue,
        };
        match started {
            Ok((line, device)) => {
                say!("{line}");
                DEVICES.lock().push(device);
            }
            Err(error) => say!("{kind} at {at} is not used: {error}"),
        }
    }
}

/// The name of a device of its kind: `a` to `z`, then numbers.
fn name(kind: &str, number: u8) -> String {
    match number {
        0..26 => format!("{kind}{}", char::from(b'a' + number)),
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
    let disks = devices.iter().map(|Device::Disk(disk)| disk);
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

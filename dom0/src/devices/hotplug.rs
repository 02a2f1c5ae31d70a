//! Slots whose cards are taken out while the machine runs.
//!
//! A slot is looked at once a second. When its card is wanted out, what is driven there is let go of, whoever uses it: who does gets errors
//! from then on, as from a disk that has died. Then the slot loses its power. A card that is gone without having asked is let go of, too.

use super::machine::Machine;
use super::{DEVICES, Device};
use crate::say;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::{executor, time};
use pci::Slot;
use virtio::Platform as _;

const BEAT: Duration = Duration::from_secs(1);

/// Looks after the slots, if there are any.
pub fn start(machine: &'static Machine) {
    let slots = pci::slots(machine.config());
    if !slots.is_empty() {
        executor::spawn(watch(machine, slots));
    }
}

async fn watch(machine: &'static Machine, slots: Vec<Slot>) {
    let mut beat = time::Ticker::every(BEAT);
    loop {
        beat.tick().await;
        for slot in &slots {
            let events = slot.take_events(machine.config());
            let bus = slot.bus(machine.config());
            if events.present && !events.button || !let_go(bus) {
                continue;
            }
            if events.present {
                slot.power_off(machine.config());
                say!("slot {}: its card may be taken out", slot.port());
            }
        }
    }
}

/// Lets go of the devices of a bus. False when there is one that cannot be let go of: the console by which programs speak with dom0.
fn let_go(bus: u8) -> bool {
    let mut devices = DEVICES.lock();
    let there = |device: &Device| device.place().numbers().0 == bus;
    if devices.iter().any(|device| there(device) && matches!(device, Device::Console(_))) {
        return false;
    }
    let gone: Vec<Device> = devices.extract_if(.., |device| there(device)).collect();
    drop(devices);
    for device in gone {
        match device {
            Device::Disk(disk) => disk.remove(),
            Device::Net(card) => card.remove(),
            Device::Console(_) => {}
        }
    }
    true
}

//! Slots whose cards come and go while the machine runs.
//!
//! A slot is looked at once a second. When its card is wanted out, what is driven there is let go of, whoever uses it: who does gets errors
//! from then on, as from a disk that has died. Then the slot loses its power. A card that is gone without having asked is let go of, too.
//! One that is put in gets power and addresses, and is brought up as those that were there from the start.

use super::machine::Machine;
use super::{DEVICES, Device, GONE, Gone};
use crate::say;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::events::Events;
use guest_sdk::{executor, time};
use pci::Slot;
use virtio::Platform as _;

const BEAT: Duration = Duration::from_secs(1);
/// How long a card that got power may take until it answers: so often it is looked, after so long a time.
const LOOKS: u32 = 10;
const SETTLING: Duration = Duration::from_millis(100);

/// Looks after the slots, if there are any.
pub fn start(machine: &'static Machine, events: &Events) {
    let slots = pci::slots(machine.config());
    for slot in &slots {
        // What came before the cards were looked for.
        let _ = slot.take_events(machine.config());
    }
    if !slots.is_empty() {
        executor::spawn(watch(machine, slots, events.clone()));
    }
}

async fn watch(machine: &'static Machine, slots: Vec<Slot>, events: Events) {
    let mut beat = time::Ticker::every(BEAT);
    loop {
        beat.tick().await;
        for slot in &slots {
            look(machine, slot, &events).await;
        }
    }
}

/// Does what a slot wants.
async fn look(machine: &'static Machine, slot: &Slot, ports: &Events) {
    let config = machine.config();
    let events = slot.take_events(config);
    let bus = slot.bus(config);
    let driven = is_driven(bus);
    if !events.present {
        if driven {
            let_go(bus);
        }
    } else if events.changed {
        // Put in; and if something is driven there, that has gone before.
        if !driven || let_go(bus) {
            put_in(machine, slot, ports).await;
        }
    } else if events.button {
        if !driven && !slot.has_power(config) {
            put_in(machine, slot, ports).await;
        } else if let_go(bus) {
            slot.power_off(config);
            say!("slot {}: its card may be taken out", slot.port());
        }
    }
}

/// Brings up what a slot's card has.
async fn put_in(machine: &'static Machine, slot: &Slot, ports: &Events) {
    let config = machine.config();
    slot.power_on(config);
    let mut functions = Vec::new();
    for _ in 0..LOOKS {
        time::after(SETTLING).await;
        functions = slot.functions(config);
        if !functions.is_empty() {
            break;
        }
    }
    if functions.is_empty() {
        return say!("slot {}: its card does not answer", slot.port());
    }
    if slot.place(config, &functions).is_err() {
        return say!("slot {}: no addresses are left for its card", slot.port());
    }
    for function in functions {
        if let Some(kind) = virtio::kind(&function) {
            super::bring_up(machine, function, &kind, ports);
        }
    }
}

/// Whether a device of a bus is driven.
fn is_driven(bus: u8) -> bool {
    DEVICES.lock().iter().any(|device| device.place().numbers().0 == bus)
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
            Device::Disk(disk) => {
                GONE.lock().push(Gone::Disk(Arc::downgrade(&disk)));
                disk.remove();
            }
            Device::Net(card) => {
                GONE.lock().push(Gone::Net(Arc::downgrade(&card)));
                card.remove();
            }
            Device::Console(_) => {}
        }
    }
    true
}

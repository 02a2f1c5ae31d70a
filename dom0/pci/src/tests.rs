//! A bus in memory: functions whose base addresses and capabilities answer as a device's do.

use super::*;
use guest_sdk::hardware::Store;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::vec;

/// The words of a function, and which bits of each can be written.
#[derive(Clone)]
struct Fake {
    words: [u32; 64],
    writable: [u32; 64],
}

#[derive(Default)]
struct Bus {
    functions: RefCell<BTreeMap<Address, Fake>>,
    writes: RefCell<Vec<(u8, u32)>>,
}

impl Config for Bus {
    fn read(&self, at: Address, offset: u8) -> u32 {
        self.functions.borrow().get(&at).map_or(u32::MAX, |fake| fake.words[usize::from(offset) / 4])
    }
    fn write(&self, at: Address, offset: u8, value: u32) {
        self.writes.borrow_mut().push((offset, value));
        if let Some(fake) = self.functions.borrow_mut().get_mut(&at) {
            let index = usize::from(offset) / 4;
            let writable = fake.writable[index];
            fake.words[index] = fake.words[index] & !writable | value & writable;
        }
    }
    fn write16(&self, at: Address, offset: u8, value: u16) {
        let shift = if offset & 2 != 0 { 16 } else { 0 };
        let others = self.read(at, offset) & !(0xffff << shift);
        self.write(at, offset & !3, others | u32::from(value) << shift);
    }
}

impl Bus {
    fn with(functions: &[(Address, Fake)]) -> Bus {
        Bus { functions: RefCell::new(functions.iter().cloned().collect()), ..Bus::default() }
    }
    fn word(&self, at: Address, offset: u8) -> u32 {
        self.read(at, offset)
    }
}

fn fake(id: u32, header: u8) -> Fake {
    let mut fake = Fake { words: [0; 64], writable: [0; 64] };
    fake.words[0] = id;
    fake.words[2] = 0x02_00_00_03;
    fake.words[3] = u32::from(header) << 16;
    fake.writable[1] = 0xffff;
    fake
}

const NET: Address = Address::new(0, 3, 0);

#[test]
fn functions_are_found_behind_bridges_too() {
    let mut bridge = fake(0x1234_8086, 1);
    bridge.words[6] = 0x02_02_01_00 & 0xff00 | 7 << 8;
    let mut back = fake(0x1234_8086, 1);
    back.words[6] = 0;
    let at = |bus, device, function| Address::new(bus, device, function);
    let bus = Bus::with(&[
        (at(0, 0, 0), fake(0x29c0_8086, 0)),
        (at(0, 2, 0), fake(0x1000_1b36, 0x80)),
        (at(0, 2, 5), fake(0x1001_1b36, 0x80)),
        (at(0, 4, 3), fake(0x9999_8086, 0)), // No function 0: nobody looks at the others.
        (at(0, 31, 0), bridge),
        (at(7, 1, 0), fake(0x10d3_8086, 0)),
        (at(7, 2, 0), back),
        (at(9, 1, 0), fake(0x10d3_8086, 0)), // No bridge leads there.
    ]);
    let found: Vec<Address> = functions(&bus).iter().map(|function| function.address).collect();
    assert_eq!(found, [at(0, 0, 0), at(0, 2, 0), at(0, 2, 5), at(0, 31, 0), at(7, 1, 0), at(7, 2, 0)]);
    let function = Function::at(&bus, at(7, 1, 0)).unwrap();
    assert_eq!((function.id(), function.class()), ((0x8086, 0x10d3), 0x02_0000));
    assert_eq!(std::format!("{}", function.address), "07:01.0");
    assert_eq!(at(7, 1, 0).selector(0x13), 0x8007_0810);
}

#[test]
fn base_addresses_are_measured_and_left_as_they_were() {
    let mut card = fake(0x10d3_8086, 0);
    card.words[1] = 7;
    // 128 KiB of memory; 32 ports; 16 KiB above 4 GiB, in two words; one that is not in use.
    for (index, word, writable) in [
        (4, 0xfeb0_0000, 0xfffe_0000),
        (5, 0xc041, 0xffff_ffe0),
        (6, 0x8000_000c, 0xffff_c000),
        (7, 0x0000_0012, 0xffff_ffff),
        (8, 0, 0),
    ] {
        card.words[index] = word;
        card.writable[index] = writable;
    }
    let bus = Bus::with(&[(NET, card.clone())]);
    let function = Function::at(&bus, NET).unwrap();
    assert_eq!(function.bar(&bus, 0), Some(Bar::Memory { address: 0xfeb0_0000, bytes: 0x2_0000 }));
    assert_eq!(function.bar(&bus, 1), Some(Bar::Ports { first: 0xc040, count: 32 }));
    assert_eq!(function.bar(&bus, 2), Some(Bar::Memory { address: 0x12_8000_0000, bytes: 0x4000 }));
    assert_eq!(function.bar(&bus, 3), None, "the upper half of the one before");
    assert_eq!(function.bar(&bus, 4), None);
    assert_eq!(function.bar(&bus, 6), None);
    assert_eq!(bus.functions.borrow()[&NET].words, card.words);
    // Each time it was silent while it was measured.
    assert!(bus.writes.borrow().contains(&(4, 4)));
    function.allow(&bus, Command::BUS_MASTER, Command::IO);
    assert_eq!(bus.word(NET, 4), 6);
}

/// A function with MSI-X at 0x70 behind another capability, and MSI at 0x50.
fn with_capabilities(wide: bool) -> Fake {
    let mut card = fake(0x10d3_8086, 0);
    card.words[1] = 1 << 20;
    card.words[13] = 0x40;
    card.words[16] = 0x5001;
    card.words[20] = 0x7005 | if wide { 1 << 23 | 1 << 24 } else { 0 };
    card.writable[20] = 0x0071_0000;
    card.writable[21..26].fill(u32::MAX);
    card.words[28] = 0x4011 | 4 << 16;
    card.writable[28] = 0xc000_0000;
    card.words[29] = 3 | 0x1000;
    card.words[7] = 0xfebd_0000;
    card.writable[7] = 0xffff_c000;
    card
}

#[test]
fn a_list_of_capabilities_that_runs_in_a_circle_ends() {
    let bus = Bus::with(&[(NET, with_capabilities(false))]);
    let function = Function::at(&bus, NET).unwrap();
    let ids: Vec<u8> = function.capabilities(&bus).map(|(id, _)| id).collect();
    assert_eq!(ids.len(), MAX_CAPABILITIES);
    assert_eq!(ids[..4], [1, 5, 0x11, 1]);
    bus.functions.borrow_mut().get_mut(&NET).unwrap().words[1] = 0;
    assert_eq!(function.capabilities(&bus).count(), 0, "it says that it has none");
}

#[test]
fn msi_is_off_while_it_changes() {
    let store = Store { address: 0xfee0_2000, data: 0x81 };
    for wide in [false, true] {
        let bus = Bus::with(&[(NET, with_capabilities(wide))]);
        let msi = Msi::find(&bus, Function::at(&bus, NET).unwrap()).unwrap();
        assert!(msi.enable(&bus, store));
        let data = if wide { 0x5c } else { 0x58 };
        assert_eq!((bus.word(NET, 0x54), bus.word(NET, data)), (0xfee0_2000, 0x81));
        assert_eq!(bus.word(NET, 0x50) & 0x0071_0000, 1 << 16, "on, with one message");
        if wide {
            assert_eq!(bus.word(NET, 0x60), !1, "the first is not masked");
        }
        let writes = bus.writes.borrow().clone();
        assert!(writes.first().unwrap().1 & 1 << 16 == 0 && writes.last().unwrap().1 & 1 << 16 != 0);
        assert_eq!(msi.enable(&bus, Store { address: 1 << 33, data: 0 }), wide, "it has no room");
        msi.disable(&bus);
        assert_eq!(bus.word(NET, 0x50) & 1 << 16, 0);
    }
}

struct Table {
    words: RefCell<Vec<u32>>,
    writes: RefCell<Vec<(u64, u32)>>,
}

impl Registers for &Table {
    fn read(&self, offset: u64) -> u32 {
        self.words.borrow()[offset as usize / 4]
    }
    fn write(&self, offset: u64, value: u32) {
        self.writes.borrow_mut().push((offset, value));
        self.words.borrow_mut()[offset as usize / 4] = value;
    }
    fn read16(&self, _: u64) -> u16 {
        unreachable!("a table has words")
    }
    fn write16(&self, _: u64, _: u16) {
        unreachable!("a table has words")
    }
    fn read8(&self, _: u64) -> u8 {
        unreachable!("a table has words")
    }
    fn write8(&self, _: u64, _: u8) {
        unreachable!("a table has words")
    }
}

#[test]
fn an_entry_is_masked_while_it_changes() {
    let bus = Bus::with(&[(NET, with_capabilities(false))]);
    let msix = Msix::find(&bus, Function::at(&bus, NET).unwrap()).unwrap();
    assert_eq!((msix.entries(), msix.place(&bus)), (5, Some((0xfebd_1000, 80))));
    assert_eq!(msix.base(&bus), Some(0xfebd_0000));
    let memory = Table { words: RefCell::new(vec![0xff00; 20]), writes: RefCell::default() };
    let table = msix.table(&memory);
    for index in 0..5 {
        assert_eq!(memory.words.borrow()[index * 4 + 3], 0xff01, "masked; reserved bits stay");
    }
    memory.writes.borrow_mut().clear();
    table.set(2, Store { address: 0x1_fee0_3000, data: 0x99 });
    let writes = [(44, 0xff01), (32, 0xfee0_3000), (36, 1), (40, 0x99), (44, 0xff00)];
    assert_eq!(*memory.writes.borrow(), writes);
    msix.enable(&bus, true);
    assert_eq!(bus.word(NET, 0x70) >> 30, 2, "on, and not masked as a whole");
    msix.enable(&bus, false);
    assert_eq!(bus.word(NET, 0x70) >> 30, 0);
}

#[test]
fn a_table_outside_its_base_address_is_refused() {
    let mut card = with_capabilities(false);
    card.words[29] = 3 | 0x3fc0;
    let bus = Bus::with(&[(NET, card)]);
    let msix = Msix::find(&bus, Function::at(&bus, NET).unwrap()).unwrap();
    assert_eq!(msix.place(&bus), None);
}

#[test]
#[should_panic(expected = "message 5 of 5")]
fn there_is_no_sixth_of_five() {
    let bus = Bus::with(&[(NET, with_capabilities(false))]);
    let memory = Table { words: RefCell::new(vec![0; 20]), writes: RefCell::default() };
    Msix::find(&bus, Function::at(&bus, NET).unwrap()).unwrap().table(&memory).mask(5, true);
}

#[test]
fn a_slot_tells_once_that_its_card_is_wanted_out_and_loses_its_power() {
    let at = |bus, device, function| Address::new(bus, device, function);
    let port = |kind: u32, slot_capabilities: u32| {
        let mut port = fake(0x000c_1b36, 1);
        (port.words[1], port.words[6], port.words[13]) = (1 << 20, 5 << 8, 0x40);
        port.words[16] = 0x10 | kind << 20;
        port.words[21] = slot_capabilities;
        // Present, and its button was pressed; what status says is cleared by a 1.
        port.words[22] = (1 << 6 | 1) << 16 | 0x100;
        port.writable[22] = 0xffff;
        port
    };
    let bus = Bus::with(&[
        (at(0, 1, 0), port(0x14, 1 << 6)),
        (at(0, 2, 0), port(0x14, 0)),      // Its card stays.
        (at(0, 3, 0), port(0x04, 1 << 6)), // No slot.
        (at(0, 4, 0), port(0x15, 1 << 6)), // An upstream port.
    ]);
    let found = slots(&bus);
    assert_eq!(found.iter().map(Slot::port).collect::<Vec<_>>(), [at(0, 1, 0)]);
    let slot = found[0];
    assert_eq!(slot.bus(&bus), 5);
    assert_eq!(slot.take_events(&bus), SlotEvents { button: true, changed: false, present: true });
    let (offset, cleared) = *bus.writes.borrow().last().unwrap();
    assert_eq!((offset, cleared >> 16), (0x58, 1), "of status only what was seen is cleared");
    bus.functions.borrow_mut().get_mut(&at(0, 1, 0)).unwrap().words[22] &= 0x0040_ffff;
    assert_eq!(slot.take_events(&bus), SlotEvents { button: false, changed: false, present: true });
    slot.power_off(&bus);
    assert_eq!(bus.word(at(0, 1, 0), 0x58) as u16, 0x700);
}

/// The bus behind a port at 00:01.0 with windows of memory and of memory that may be read ahead, and a card there.
fn with_windows(plain: u32, ahead: [u32; 3], card: Fake) -> (Bus, Slot) {
    let mut port = fake(0x000c_1b36, 1);
    (port.words[1], port.words[6], port.words[13]) = (1 << 20, 5 << 8, 0x40);
    (port.words[16], port.words[21]) = (0x10 | 0x14 << 20, 1 << 6);
    (port.words[8], port.words[9], port.words[10], port.words[11]) = (plain, ahead[0], ahead[1], ahead[2]);
    // No card so far: no power.
    port.words[22] = 0x700;
    port.writable[22] = 0xffff;
    let bus = Bus::with(&[(Address::new(0, 1, 0), port), (Address::new(5, 0, 0), card)]);
    let slot = slots(&bus)[0];
    (bus, slot)
}

/// A card as it comes: 4 KiB of memory, 16 KiB of memory with 64 bits that may be read ahead, 32 ports.
fn put_in() -> Fake {
    let mut card = fake(0x1042_1af4, 0);
    for (index, word, writable) in
        [(5, 0, 0xffff_f000), (8, 0xc, 0xffff_c000), (9, 0, u32::MAX), (4, 1, 0xffff_ffe0)]
    {
        (card.words[index], card.writable[index]) = (word, writable);
    }
    card
}

#[test]
fn a_card_that_is_put_in_gets_power_and_places_behind_its_port() {
    const CARD: Address = Address::new(5, 0, 0);
    let read_ahead = [0x0011_0001, 0x8, 0x8];
    let (bus, slot) = with_windows(0xfe90_fe80, read_ahead, put_in());
    assert!(!slot.has_power(&bus));
    slot.power_on(&bus);
    assert!(slot.has_power(&bus));
    assert_eq!(bus.word(Address::new(0, 1, 0), 0x58) as u16, 0x100, "its light is on");
    let functions = slot.functions(&bus);
    assert_eq!(functions.len(), 1);
    bus.writes.borrow_mut().clear();
    assert_eq!(slot.place(&bus, &functions), Ok(()));
    let bar = |index| functions[0].bar(&bus, index);
    assert_eq!(bar(1), Some(Bar::Memory { address: 0xfe80_0000, bytes: 0x1000 }));
    assert_eq!(bar(4), Some(Bar::Memory { address: 0x8_0000_0000, bytes: 0x4000 }));
    assert_eq!(bar(0), Some(Bar::Ports { first: 0, count: 32 }), "ports get no place");
    assert_eq!(bus.word(CARD, 4) & 7, 0, "it answers nowhere and reaches nothing");
    assert_eq!(bus.word(Address::new(0, 1, 0), 4) & 6, 6, "its port lets it through");
}

#[test]
fn places_are_inside_the_windows_or_refused() {
    let closed = [0x0001_fff1, 0, 0];
    // All in the one window, the larger first, each at a multiple of its size.
    let (bus, slot) = with_windows(0xfe80_fe80, closed, put_in());
    let functions = slot.functions(&bus);
    assert_eq!(slot.place(&bus, &functions), Ok(()));
    let bar = |index| functions[0].bar(&bus, index);
    assert_eq!(bar(4), Some(Bar::Memory { address: 0xfe80_0000, bytes: 0x4000 }));
    assert_eq!(bar(1), Some(Bar::Memory { address: 0xfe80_4000, bytes: 0x1000 }));
    // A register of 32 bits gets nothing above 4 GiB, one that may not be read ahead nothing in the other window.
    for (word, room) in [(0x8, false), (0x4, false), (0xc, true)] {
        let mut card = put_in();
        (card.words[5], card.writable[5]) = (0, 0);
        card.words[8] = word;
        let (bus, slot) = with_windows(0x0000_fff0, [0x0011_0001, 8, 8], card);
        assert_eq!(slot.place(&bus, &slot.functions(&bus)).is_ok(), room, "{word:#x}");
    }
    // Larger than the window.
    let mut card = put_in();
    card.writable[5] = 0xffe0_0000;
    let (bus, slot) = with_windows(0xfe80_fe80, closed, card);
    assert_eq!(slot.place(&bus, &slot.functions(&bus)), Err(NoRoom));
    // Closed windows, and one that begins at address 0.
    for plain in [0x0000_fff0, 0x0000_0000] {
        let mut card = put_in();
        card.writable[5] = 0xfff0_0000;
        let (bus, slot) = with_windows(plain, closed, card);
        assert_eq!(slot.place(&bus, &slot.functions(&bus)), Err(NoRoom));
    }
}

//! A network card against a model of its device.

mod model;

use guest_sdk::ring::SharedPage as _;
use model::{EVENT_INDEX, Machine, Page};
use std::rc::Rc;
use virtio::net::{About, Checksum, Gso, HEADER, Offloads, Rejected};
use virtio::{Fault, Net, Platform as _, Segment, Transport, Vectors};

const CHECKSUM: u64 = 1 << 0;
const GUEST_CHECKSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const STATUS: u64 = 1 << 16;
const ALL: u64 = CHECKSUM | GUEST_CHECKSUM | MTU | MAC | HOST_TSO4 | HOST_TSO6 | STATUS | EVENT_INDEX;
const ADDRESS: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const EVERYTHING: Offloads = Offloads { send_checksum: true, receive_checksum: true, send_segments: true };

type Card = Net<Machine, (u32, Rc<Page>)>;

fn own(mtu: u16) -> Vec<u8> {
    let mut own = ADDRESS.to_vec();
    own.extend([1, 0, 0, 0]);
    own.extend(mtu.to_le_bytes());
    own
}

fn start(machine: &Machine, offloads: Offloads, buffers: u16) -> Card {
    let transport = Transport::open(machine.clone(), machine.function()).unwrap();
    Net::start(transport, Vectors::Messages(3), offloads, buffers).unwrap()
}

fn frame(machine: &Machine, bytes: u16, fill: u8) -> (Rc<Page>, Segment) {
    let page = machine.page().unwrap();
    page.write_bytes(0, &vec![fill; bytes.into()]);
    let segment = Segment::of(&page, 0, bytes);
    (Rc::new(page), segment)
}

fn send(card: &mut Card, about: About, bytes: u16, number: u32) -> Result<(), Rejected> {
    let (page, segment) = frame(card.device().transport().platform(), bytes, number as u8);
    card.send(about, &[segment], (number, page)).map_err(|(why, _)| why)
}

/// The device puts a frame into the next buffer.
fn arrive(machine: &Machine, header: [u8; 12], frame: &[u8]) {
    let chain = machine.pop(0).expect("a buffer");
    assert!(chain.read.is_empty());
    machine.scatter(&chain.write, &[&header[..], frame].concat());
    machine.push(0, chain.head.into(), (12 + frame.len()) as u32);
}

#[test]
fn a_card_says_what_it_is() {
    let machine = Machine::new(1, ALL, &[256, 256], &own(1400));
    let mut card = start(&machine, EVERYTHING, 8);
    assert_eq!((card.mac(), card.mtu(), card.link_up(), card.offloads()), (ADDRESS, 1400, true, EVERYTHING));
    machine.device(|device| {
        let vectors: Vec<u16> = device.queues.iter().map(|queue| queue.vector).collect();
        assert_eq!((device.config_vector, vectors), (0, vec![1, 2]));
        device.set_own(6, &[0, 0]);
    });
    assert!(card.changed() && !card.link_up() && !card.changed());
    // What nobody asked for is not agreed on; an MTU that makes no sense is not believed.
    let machine = Machine::new(1, ALL & !MAC, &[256, 256], &own(9));
    let card = start(&machine, Offloads::default(), 8);
    assert_eq!((card.mtu(), card.offloads()), (1500, Offloads::default()));
    assert_eq!(card.mac()[0] & 3, 2, "an address of nobody's");
    drop(card);
    assert!(!machine.masters_bus());
    assert_eq!(machine.pages(), 0);
}

#[test]
fn frames_leave_as_they_were_given() {
    for features in [ALL, ALL & !EVENT_INDEX] {
        let machine = Machine::new(1, features, &[16, 16], &own(1500));
        let mut card = start(&machine, EVERYTHING, 4);
        for round in 0..50u32 {
            let about = About {
                checksum: Checksum::Blank { start: 34, offset: 16 },
                gso: (round % 2 == 0).then_some(Gso { ipv6: round % 4 == 0, payload: 1448, headers: 66 }),
            };
            send(&mut card, about, 200, round).unwrap();
            let (one, first) = frame(&machine, 60, 1);
            let (_two, second) = frame(&machine, 40, 2);
            card.send(About::default(), &[first, second], (1000 + round, one)).unwrap();
            card.kick();
            let chain = machine.pop(1).unwrap();
            let bytes = machine.gather(&chain.read);
            assert_eq!(bytes[12..], [round as u8; 200]);
            let gso =
                if round % 2 == 0 { [if round % 4 == 0 { 4 } else { 1 }, 66, 0, 168, 5] } else { [0; 5] };
            assert_eq!(bytes[..10], [&[1][..], &gso, &[34, 0, 16, 0]].concat());
            assert!(chain.write.is_empty());
            let plain = machine.pop(1).unwrap();
            let bytes = machine.gather(&plain.read);
            assert_eq!(bytes[..12], [0; 12]);
            assert_eq!((bytes.len(), bytes[12], bytes[12 + 60]), (112, 1, 2));
            assert!(card.sent().is_none(), "it has not left");
            machine.push(1, plain.head.into(), 0);
            machine.push(1, chain.head.into(), 0);
            assert_eq!(card.sent().unwrap().0, 1000 + round);
            assert_eq!(card.sent().unwrap().0, round);
        }
        assert_eq!((card.counters().sent, card.counters().sent_bytes), (100, 50 * 300));
    }
}

#[test]
fn frames_that_cannot_be_sent_are_refused() {
    let machine = Machine::new(1, ALL, &[4, 4], &own(1500));
    let mut card = start(&machine, Offloads { send_checksum: true, ..Default::default() }, 4);
    let plain = About::default();
    assert_eq!(send(&mut card, plain, 13, 0), Err(Rejected::Shape), "shorter than a header");
    assert_eq!(send(&mut card, plain, 1519, 0), Err(Rejected::Shape), "longer than the card takes");
    let behind = About { checksum: Checksum::Blank { start: 90, offset: 9 }, gso: None };
    assert_eq!(send(&mut card, behind, 100, 0), Err(Rejected::Shape), "a checksum behind the frame");
    let gso = About {
        checksum: Checksum::Blank { start: 34, offset: 16 },
        gso: Some(Gso { ipv6: false, payload: 1448, headers: 66 }),
    };
    assert_eq!(send(&mut card, gso, 100, 0), Err(Rejected::Shape), "not agreed on");
    assert_eq!(send(&mut card, plain, 1518, 0), Ok(()));
    assert_eq!(send(&mut card, plain, 60, 1), Ok(()));
    assert_eq!(send(&mut card, plain, 60, 2), Err(Rejected::Full));
    card.kick();
    let chain = machine.pop(1).unwrap();
    machine.push(1, chain.head.into(), 0);
    assert_eq!(card.sent().unwrap().0, 0);
    assert_eq!(send(&mut card, plain, 60, 2), Ok(()));
    assert_eq!(card.stop().len(), 2);
}

#[test]
fn frames_come_in_and_their_pages_go_back() {
    for features in [ALL, ALL & !EVENT_INDEX] {
        let machine = Machine::new(1, features, &[8, 8], &own(1500));
        let mut card = start(&machine, EVERYTHING, 4);
        for round in 0..40usize {
            let bytes = vec![round as u8; 60 + round * 30];
            arrive(&machine, [0; 12], &bytes);
            let frame = card.received().unwrap();
            let mut found = vec![0; frame.bytes];
            frame.page.read_bytes(HEADER, &mut found);
            assert_eq!((found, frame.about), (bytes, About::default()));
            assert!(card.received().is_none());
            card.post(frame.page).unwrap();
            card.kick();
        }
        // With all its pages lent it takes no more than it has descriptors.
        for _ in 0..4 {
            card.post(machine.page().unwrap()).unwrap();
        }
        assert!(card.post(machine.page().unwrap()).is_err());
        // What the card says of a checksum, as far as it makes sense.
        for (header, checksum) in [
            ([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0], Checksum::Blank { start: 34, offset: 16 }),
            ([1, 0, 0, 0, 0, 0, 99, 0, 16, 0, 1, 0], Checksum::There),
            ([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], Checksum::Right),
        ] {
            arrive(&machine, header, &[7; 100]);
            assert_eq!(card.received().unwrap().about.checksum, checksum);
        }
        // One that is shorter than a header is none; its page is lent again.
        arrive(&machine, [0; 12], &[0; 13]);
        assert!(card.received().is_none());
        assert_eq!((card.counters().bad, card.counters().received), (1, 43));
    }
}

#[test]
fn a_card_that_says_nonsense_starts_again_with_all_its_pages() {
    for queue in 0..2 {
        let machine = Machine::new(1, ALL, &[8, 8], &own(1500));
        let mut card = start(&machine, EVERYTHING, 4);
        send(&mut card, About::default(), 60, 5).unwrap();
        card.kick();
        machine.push(queue, 7, 0);
        if queue == 0 {
            assert!(card.received().is_none());
        }
        assert_eq!(card.sent().unwrap().0, 5, "it comes back, sent or not");
        assert_eq!(card.device_mut().take_fault(), Some(Fault::Id(7)));
        assert_eq!(card.device().revivals(), 1);
        for number in 0..4 {
            arrive(&machine, [0; 12], &[number; 60]);
        }
        assert!(machine.pop(0).is_none(), "it has four pages, as before");
        assert_eq!(core::iter::from_fn(|| card.received()).count(), 4);
        send(&mut card, About::default(), 60, 6).unwrap();
        card.kick();
        let chain = machine.pop(1).unwrap();
        machine.push(1, chain.head.into(), 0);
        assert_eq!(card.sent().unwrap().0, 6);
        // A frame longer than its buffer.
        drop(card);
    }
    let machine = Machine::new(1, ALL, &[8, 8], &own(1500));
    let mut card = start(&machine, EVERYTHING, 4);
    let chain = machine.pop(0).unwrap();
    let room = chain.write.iter().map(|(_, bytes)| bytes).sum::<u32>();
    assert!(room >= 12 + 1518);
    machine.push(0, chain.head.into(), 5000);
    assert!(card.received().is_none());
    assert_eq!(card.device_mut().take_fault(), Some(Fault::Length { said: 5000, room }));
    machine.device(|device| device.never_resets = true);
    machine.device(|device| device.status |= 0x40);
    card.changed();
    assert!(card.device().is_broken() && !machine.masters_bus());
    assert_eq!(send(&mut card, About::default(), 60, 5), Err(Rejected::Broken));
    assert!(card.post(machine.page().unwrap()).is_err());
}

#[test]
fn it_is_told_of_what_was_asked_for() {
    for features in [ALL, ALL & !EVENT_INDEX] {
        let machine = Machine::new(1, features, &[8, 8], &own(1500));
        let mut card = start(&machine, EVERYTHING, 4);
        assert!(!card.listen(false));
        let old = machine.device(|device| device.queues[0].used_index);
        arrive(&machine, [0; 12], &[1; 60]);
        assert!(machine.wants_interrupt(0, old), "a frame came");
        assert!(card.listen(false));
        send(&mut card, About::default(), 60, 5).unwrap();
        card.kick();
        assert!(card.received().is_some());
        if features & EVENT_INDEX == 0 {
            let chain = machine.pop(1).unwrap();
            machine.push(1, chain.head.into(), 0);
            assert!(!machine.wants_interrupt(1, 0), "nobody waits for frames to leave");
            assert!(card.listen(true));
        }
    }
}

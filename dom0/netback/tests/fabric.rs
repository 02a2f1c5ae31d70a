//! Guests behind a router, and the network outside: what a guest says arrives there in the router's name, answers and forwarded ports lead
//! back, and a guest on a bridge is there itself.

mod memory;

use guest_sdk::net::{Checksum, Offload, Receive, Transmit};
use guest_sdk::ring::SharedPage;
use guest_sdk::ring::host::HostPages;
use hypercall_abi::DomId;
use memory::{Granted, Host};
use netback::fabric::{Fabric, Outcome, SwitchId, Wire, WireId};
use netback::network::{Arrived, Carried, Features, Unfinished};
use netswitch::{
    EthernetAddress, Forward, Gateway, Ipv4Address, Ipv4Cidr, Outside, Place as Uplink, Port, PortId,
    Transport,
};
use std::cell::RefCell;
use std::rc::Rc;

const CARD: EthernetAddress = EthernetAddress([2, 0, 0, 0, 9, 9]);
const ROUTER: EthernetAddress = EthernetAddress([2, 0, 0, 0, 9, 1]);
const FAR: EthernetAddress = EthernetAddress([2, 0, 0, 0, 8, 8]);
const OWN: Ipv4Address = Ipv4Address::new(192, 168, 1, 9);
const GATEWAY: Ipv4Address = Ipv4Address::new(192, 168, 1, 1);
const SERVER: Ipv4Address = Ipv4Address::new(203, 0, 113, 5);

/// Frames, and what the card has to finish in each.
type Sent = Vec<(Vec<u8>, Unfinished)>;

/// A card of the machine's that notes what it was given.
struct Cable {
    sent: Rc<RefCell<Sent>>,
    takes: Features,
    flushed: Rc<RefCell<usize>>,
}

impl Wire for Cable {
    fn address(&self) -> EthernetAddress {
        CARD
    }
    fn takes(&self) -> Features {
        self.takes
    }
    fn send(&mut self, frame: &[u8], unfinished: Unfinished) {
        self.sent.borrow_mut().push((frame.to_vec(), unfinished));
    }
    /// Long frames, by a page of its own.
    fn carry(&mut self, frame: &mut dyn Carried, unfinished: Unfinished) -> bool {
        let (page, mut bytes) = (HostPages::new(1, 0), vec![0; frame.bytes()]);
        let carried = frame.write(&page);
        if carried {
            page.read_bytes(0, &mut bytes);
            self.send(&bytes, unfinished);
        }
        carried
    }
    fn flush(&mut self) {
        *self.flushed.borrow_mut() += 1;
    }
}

struct Guest {
    switch: SwitchId,
    port: PortId,
    mac: EthernetAddress,
    transmit: Transmit<Granted, Granted>,
    receive: Receive<Granted, Granted>,
}

struct World {
    fabric: Fabric<Granted, Cable>,
    host: Host,
    guests: Vec<Guest>,
    wire: WireId,
    sent: Rc<RefCell<Sent>>,
    flushed: Rc<RefCell<usize>>,
    lan: SwitchId,
    bridge: SwitchId,
    now: u64,
}

impl World {
    fn new(takes: Features) -> Self {
        let (sent, flushed) = (Rc::default(), Rc::default());
        let mut fabric = Fabric::new();
        let wire = fabric.add_wire(Cable { sent: Rc::clone(&sent), takes, flushed: Rc::clone(&flushed) });
        let (bridge, lan) = (fabric.add_switch(), fabric.add_switch());
        fabric.bridge(bridge, wire).unwrap();
        let outside = Outside { address: Ipv4Cidr::new(OWN, 24), gateway: Some(GATEWAY), dns: None };
        let inside = Ipv4Cidr::new(Ipv4Address::new(10, 77, 0, 1), 24);
        let gateway = Gateway::new(inside, ROUTER, CARD, Uplink::Fixed(outside), 0);
        fabric.add_gateway(gateway, (lan, ROUTER), Some((bridge, CARD))).unwrap();
        let host = Host::new();
        Self { fabric, host, guests: Vec::new(), wire, sent, flushed, lan, bridge, now: 0 }
    }

    fn guest(&mut self, switch: SwitchId) -> usize {
        let domain = self.guests.len() as u16 + 1;
        let mac = EthernetAddress([2, 0, 0, 0, 0, domain as u8]);
        let network = self.fabric.network_mut(switch).unwrap();
        let port = network.attach(Port::guest(mac)).unwrap();
        let rings = [Granted::new(8, 1), Granted::new(9, 1)];
        let (transmit_pages, receive_pages) = (Granted::new(100, 64), Granted::new(1000, 64));
        self.host.grant(domain, &transmit_pages, false);
        self.host.grant(domain, &receive_pages, true);
        let transmit = Transmit::new(rings[0].clone(), transmit_pages);
        let receive = Receive::new(rings[1].clone(), receive_pages, false).unwrap();
        let [one, two] = rings;
        let features = Features { scatter_gather: true, ..Features::default() };
        network.connect(port, DomId::new(domain), [(one, two)], features);
        self.guests.push(Guest { switch, port, mac, transmit, receive });
        self.guests.len() - 1
    }

    /// Sends a frame of a guest's.
    fn send(&mut self, guest: usize, frame: &[u8], offload: Offload) {
        let Guest { switch, port, transmit, .. } = &mut self.guests[guest];
        assert_eq!(transmit.push_with(frame, offload), Ok(true));
        let _ = transmit.publish();
        let turn = self.fabric.turn(self.now, *switch, *port, 0, &mut self.host, &mut Outcome::default());
        assert!(!turn.closed);
        assert_eq!(self.fabric.network_mut(*switch).unwrap().take_fault(*port), None);
    }

    fn arrive(&mut self, frame: &[u8]) -> usize {
        // Somewhere in a page, as a card puts it there.
        let page = HostPages::new(1, 0);
        page.write_bytes(12, frame);
        let arrived = Arrived { page: &page, at: 12, bytes: frame.len(), blank: false, validated: false };
        let mut outcome = Outcome::default();
        self.fabric.arrived(self.now, self.wire, [arrived], &mut self.host, &mut outcome);
        outcome.notify.len()
    }

    fn got(&mut self, guest: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut frame = vec![0; 65536];
        while let Some(received) = self.guests[guest].receive.copy(&mut frame).unwrap() {
            assert_ne!(received.checksum, Checksum::Blank);
            frames.push(frame[..received.bytes].to_vec());
        }
        let _ = self.guests[guest].receive.publish();
        frames
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        self.sent.borrow_mut().drain(..).map(|(frame, _)| frame).collect()
    }

    /// The router asks for its gateway; it answers.
    fn meet(&mut self) {
        let sent = self.sent();
        let question = sent.iter().find(|frame| frame[12..14] == [8, 6]).expect("a question");
        assert_eq!((&question[6..12], &question[38..42]), (&CARD.0[..], &GATEWAY.octets()[..]));
        let mut answer = Vec::from(CARD.0);
        answer.extend(FAR.0);
        answer.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        answer.extend(FAR.0);
        answer.extend(GATEWAY.octets());
        answer.extend(CARD.0);
        answer.extend(OWN.octets());
        self.arrive(&answer);
    }
}

/// A packet of UDP or TCP whose checksum is there.
fn packet(
    macs: (EthernetAddress, EthernetAddress),
    from: (Ipv4Address, u16),
    to: (Ipv4Address, u16),
    protocol: u8,
    payload: usize,
) -> Vec<u8> {
    let header = if protocol == 6 { 20 } else { 8 };
    let mut frame = Vec::from(macs.1.0);
    frame.extend(macs.0.0);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + header + payload as u16).to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    frame.extend(from.0.octets());
    frame.extend(to.0.octets());
    let sum =
        frame[14..34].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend(from.1.to_be_bytes());
    frame.extend(to.1.to_be_bytes());
    match protocol {
        6 => frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 4, 0, 0, 0, 0, 0]),
        _ => {
            frame.extend((8 + payload as u16).to_be_bytes());
            frame.extend([0, 0]);
        }
    }
    frame.extend((0..payload).map(|at| at as u8));
    netswitch::complete_checksum(&mut frame);
    frame
}

/// Both ends of a packet, and whether its checksums are right.
fn ends(frame: &[u8]) -> ((Ipv4Address, u16), (Ipv4Address, u16)) {
    let address = |at: usize| Ipv4Address::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let mut right = frame.to_vec();
    netswitch::complete_checksum(&mut right);
    assert_eq!(right, frame, "its checksum is right");
    ((address(26), port(34)), (address(30), port(36)))
}

#[test]
fn a_guest_reaches_the_outside_and_answers_come_back() {
    let mut world = World::new(Features::default());
    let guest = world.guest(world.lan);
    let mac = world.guests[guest].mac;
    let ip = world.fabric.gateway_mut(world.lan).unwrap().router_mut().lease(mac, None).unwrap();
    let question = packet((mac, ROUTER), (ip, 5000), (SERVER, 53), 17, 100);
    world.send(guest, &question, Offload::NOTHING);
    world.meet();
    let sent = world.sent();
    assert_eq!(sent.len(), 1, "what waited for the neighbour");
    assert_eq!((&sent[0][..6], &sent[0][6..12]), (&FAR.0[..], &CARD.0[..]));
    let ((from, port), to) = ends(&sent[0]);
    assert_eq!((from, to), (OWN, (SERVER, 53)));
    let flushes = *world.flushed.borrow();
    assert!(flushes > 0, "the card was told");
    let answer = packet((FAR, CARD), (SERVER, 53), (OWN, port), 17, 300);
    assert_eq!(world.arrive(&answer), 1);
    assert_eq!(*world.flushed.borrow(), flushes, "not when there is nothing for it");
    let got = world.got(guest);
    assert_eq!(got.len(), 1);
    assert_eq!(ends(&got[0]), ((SERVER, 53), (ip, 5000)));
    // What nobody asked for goes nowhere.
    world.arrive(&packet((FAR, CARD), (SERVER, 53), (OWN, port ^ 1), 17, 10));
    assert!(world.got(guest).is_empty());
    assert_eq!(world.fabric.gateway(world.lan).unwrap().router().drops().unasked, 1);
    // Who speaks in another's name is not passed on.
    world.send(guest, &packet((mac, ROUTER), (SERVER, 1), (SERVER, 53), 17, 10), Offload::NOTHING);
    assert!(world.sent().is_empty());
}

#[test]
fn a_forwarded_port_leads_to_a_guest() {
    let mut world = World::new(Features::default());
    let guest = world.guest(world.lan);
    let mac = world.guests[guest].mac;
    let router = world.fabric.gateway_mut(world.lan).unwrap().router_mut();
    let ip = router.lease(mac, None).unwrap();
    router.forward(Forward { transport: Transport::Tcp, outside: 8080, to: ip, port: 80 }).unwrap();
    world.arrive(&packet((FAR, CARD), (SERVER, 4000), (OWN, 8080), 6, 0));
    let got = world.got(guest);
    assert_eq!(ends(&got[0]), ((SERVER, 4000), (ip, 80)));
    // Its answer has no checksum: the router makes it.
    let mut answer = packet((mac, ROUTER), (ip, 80), (SERVER, 4000), 6, 500);
    answer[50..52].fill(0);
    world.send(guest, &answer, Offload { checksum_blank: true, segment: None });
    world.meet();
    let sent = world.sent();
    assert_eq!(ends(&sent[0]), ((OWN, 8080), (SERVER, 4000)));
    // Several segments of an answer in one.
    let large = packet((mac, ROUTER), (ip, 80), (SERVER, 4000), 6, 4000);
    world.send(guest, &large, Offload { checksum_blank: true, segment: Some(1460) });
    let sent = world.sent();
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 1134]);
    assert!(sent.iter().all(|frame| ends(frame) == ((OWN, 8080), (SERVER, 4000))));
}

#[test]
fn a_guest_on_the_bridge_is_outside_itself() {
    for blank_checksums in [false, true] {
        let takes = Features { scatter_gather: true, blank_checksums, segments: blank_checksums };
        let mut world = World::new(takes);
        let (one, two) = (world.guest(world.bridge), world.guest(world.bridge));
        let (mac, own) = (world.guests[one].mac, (Ipv4Address::new(192, 168, 1, 77), 80));
        let to_server = packet((mac, FAR), own, (SERVER, 4000), 6, 3000);
        world.send(one, &to_server, Offload { checksum_blank: true, segment: Some(1000) });
        let sent: Vec<_> = world.sent.borrow_mut().drain(..).collect();
        if blank_checksums {
            assert_eq!(sent.len(), 1, "the card cuts it");
            assert_eq!(sent[0].1.segment, Some(1000));
        } else {
            assert_eq!(sent.len(), 3);
            assert!(
                sent.iter().all(|(frame, unfinished)| unfinished.segment.is_none() && ends(frame).0 == own)
            );
        }
        // What comes for one is not the other's, and the router takes what is for the card's own address.
        let answer = packet((FAR, mac), (SERVER, 4000), own, 6, 10);
        world.arrive(&answer);
        assert_eq!((world.got(one), world.got(two).len()), (vec![answer], 0));
        let mut spoofed = to_server.clone();
        spoofed[6..12].copy_from_slice(&world.guests[two].mac.0);
        world.send(one, &spoofed, Offload::NOTHING);
        assert!(world.sent().is_empty());
    }
}

#[test]
fn switches_come_and_go() {
    let mut world = World::new(Features::default());
    let other = world.fabric.add_switch();
    assert!(world.fabric.network(other).is_some() && world.fabric.gateway(other).is_none());
    world.fabric.remove_switch(other);
    assert!(world.fabric.network(other).is_none());
    assert_eq!(world.fabric.add_switch(), other);
    for kept in [world.lan, world.bridge] {
        world.fabric.remove_switch(kept);
        assert!(world.fabric.network(kept).is_some(), "a router is there");
    }
    // Time passes for routers.
    let (_, next) = world.fabric.poll(0, &mut world.host);
    assert!(next > 0 && next < u64::MAX);
}

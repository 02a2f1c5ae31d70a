use super::{Checksum, Drops, ForwardError, LeaseError, Outside, Router, Side, WAITING};
use crate::nat::{Forward, Transport};
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, Icmpv4Message,
    Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Address, Ipv4Cidr, Ipv4Packet, Ipv4Repr, UdpPacket,
};

const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
const OUTSIDE_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 2]);
const CARD: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 0x10]);
const OTHER_CARD: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 0x11]);
const HOST: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 0x20]);
const OWN: Ipv4Address = Ipv4Address::new(203, 0, 113, 7);
const ROUTER: Ipv4Address = Ipv4Address::new(203, 0, 113, 1);
const DNS: Ipv4Address = Ipv4Address::new(198, 51, 100, 53);
const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);
const FAR: Ipv4Address = Ipv4Address::new(198, 51, 100, 9);

const OUTSIDE: Outside = Outside { address: Ipv4Cidr::new(OWN, 24), gateway: Some(ROUTER), dns: Some(DNS) };

fn router() -> Router {
    let mut router = Router::new(Ipv4Cidr::new(GATEWAY, 24), MAC, OUTSIDE_MAC);
    assert_eq!(router.lease(CARD, None), Ok(GUEST));
    router.set_outside(Some(OUTSIDE));
    router
}

fn send(router: &mut Router, side: Side, frame: &[u8]) -> Vec<(Side, Vec<u8>)> {
    let mut got = Vec::new();
    let mut frame = frame.to_vec();
    router
        .handle(0, side, &mut frame, Checksum::Complete, &mut |side, frame| got.push((side, frame.to_vec())));
    got
}

fn arp(
    operation: ArpOperation,
    from: (EthernetAddress, Ipv4Address),
    to: (EthernetAddress, Ipv4Address),
) -> Vec<u8> {
    let message = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: from.0,
        source_protocol_addr: from.1,
        target_hardware_addr: to.0,
        target_protocol_addr: to.1,
    };
    let to = if operation == ArpOperation::Request { EthernetAddress::BROADCAST } else { to.0 };
    super::arp(to, &message, from.0)
}

fn udp(
    macs: (EthernetAddress, EthernetAddress),
    from: (Ipv4Address, u16),
    to: (Ipv4Address, u16),
    hop_limit: u8,
    payload: &[u8],
) -> Vec<u8> {
    let header = Ipv4Repr {
        src_addr: from.0,
        dst_addr: to.0,
        next_header: IpProtocol::Udp,
        payload_len: 8 + payload.len(),
        hop_limit,
    };
    let mut frame = super::ipv4(macs.1, macs.0, &header);
    frame[42..].copy_from_slice(payload);
    let mut packet = UdpPacket::new_unchecked(&mut frame[34..]);
    packet.set_src_port(from.1);
    packet.set_dst_port(to.1);
    packet.set_len(8 + payload.len() as u16);
    packet.fill_checksum(&from.0.into(), &to.0.into());
    frame
}

fn ping(macs: (EthernetAddress, EthernetAddress), from: Ipv4Address, to: Ipv4Address) -> Vec<u8> {
    let message = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 2, data: b"abc" };
    let header = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmp,
        payload_len: message.buffer_len(),
        hop_limit: 64,
    };
    let mut frame = super::ipv4(macs.1, macs.0, &header);
    message.emit(&mut Icmpv4Packet::new_unchecked(&mut frame[34..]), &ChecksumCapabilities::default());
    frame
}

/// The router as a neighbour outside knows it, after one packet of the guest.
fn connected() -> Router {
    let mut router = router();
    let asked = send(&mut router, Side::Inside, &udp((CARD, MAC), (GUEST, 5), (FAR, 6), 64, b"one"));
    let [(Side::Outside, question)] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!(question, &arp(ArpOperation::Request, (OUTSIDE_MAC, OWN), (EthernetAddress([0; 6]), ROUTER)));
    let answer = arp(ArpOperation::Reply, (HOST, ROUTER), (OUTSIDE_MAC, OWN));
    let waited = send(&mut router, Side::Outside, &answer);
    assert_eq!(waited, [(Side::Outside, udp((OUTSIDE_MAC, HOST), (OWN, 5), (FAR, 6), 63, b"one"))]);
    router
}

#[test]
fn a_guest_reaches_the_outside_and_is_answered() {
    let mut router = connected();
    let mut padded = udp((CARD, MAC), (GUEST, 5), (FAR, 6), 64, b"two");
    padded.resize(60, 0xee);
    let sent = send(&mut router, Side::Inside, &padded);
    assert_eq!(sent, [(Side::Outside, udp((OUTSIDE_MAC, HOST), (OWN, 5), (FAR, 6), 63, b"two"))]);
    let answer = send(&mut router, Side::Outside, &udp((HOST, OUTSIDE_MAC), (FAR, 6), (OWN, 5), 9, b"three"));
    assert_eq!(answer, [(Side::Inside, udp((MAC, CARD), (FAR, 6), (GUEST, 5), 8, b"three"))]);
    assert_eq!((router.drops(), router.flows()), (Drops::default(), 1));
}

#[test]
fn a_blank_checksum_is_filled_in() {
    let mut router = connected();
    let mut blank = udp((CARD, MAC), (GUEST, 5), (FAR, 6), 64, b"two");
    blank[40..42].copy_from_slice(&[0x12, 0x34]);
    let mut got = Vec::new();
    router.handle(0, Side::Inside, &mut blank, Checksum::Blank, &mut |_, frame| got = frame.to_vec());
    assert_eq!(got, udp((OUTSIDE_MAC, HOST), (OWN, 5), (FAR, 6), 63, b"two"));
}

#[test]
fn nobody_inside_speaks_as_another() {
    let mut router = connected();
    assert_eq!(router.lease(OTHER_CARD, None), Ok(Ipv4Address::new(10, 0, 0, 3)));
    for frame in [
        udp((OTHER_CARD, MAC), (GUEST, 5), (FAR, 6), 64, b"x"),
        udp((CARD, MAC), (FAR, 5), (FAR, 6), 64, b"x"),
        udp((HOST, MAC), (Ipv4Address::new(10, 0, 0, 9), 5), (FAR, 6), 64, b"x"),
        arp(ArpOperation::Request, (OTHER_CARD, GUEST), (EthernetAddress([0; 6]), GATEWAY)),
    ] {
        assert!(send(&mut router, Side::Inside, &frame).is_empty());
    }
    assert_eq!(router.drops(), Drops { spoofed: 4, ..Drops::default() });
    // A source inside, from outside.
    let frame = udp((HOST, OUTSIDE_MAC), (GUEST, 6), (OWN, 5), 64, b"x");
    assert!(send(&mut router, Side::Outside, &frame).is_empty());
}

#[test]
fn it_answers_for_its_own_addresses_only() {
    let mut router = router();
    let nobody = EthernetAddress([0; 6]);
    let question = arp(ArpOperation::Request, (CARD, GUEST), (nobody, GATEWAY));
    let answer = arp(ArpOperation::Reply, (MAC, GATEWAY), (CARD, GUEST));
    assert_eq!(send(&mut router, Side::Inside, &question), [(Side::Inside, answer)]);
    let question = arp(ArpOperation::Request, (HOST, ROUTER), (nobody, OWN));
    let answer = arp(ArpOperation::Reply, (OUTSIDE_MAC, OWN), (HOST, ROUTER));
    assert_eq!(send(&mut router, Side::Outside, &question), [(Side::Outside, answer)]);
    for (side, frame) in [
        (Side::Inside, arp(ArpOperation::Request, (CARD, GUEST), (nobody, FAR))),
        (Side::Outside, arp(ArpOperation::Request, (HOST, ROUTER), (nobody, GUEST))),
        // Not asked for: nothing is learnt.
        (Side::Outside, arp(ArpOperation::Reply, (HOST, FAR), (OUTSIDE_MAC, OWN))),
    ] {
        assert!(send(&mut router, side, &frame).is_empty());
    }
    assert!(router.neighbours.is_empty());
    for (side, macs, from, to) in
        [(Side::Inside, (CARD, MAC), GUEST, GATEWAY), (Side::Outside, (HOST, OUTSIDE_MAC), ROUTER, OWN)]
    {
        let answers = send(&mut router, side, &ping(macs, from, to));
        let [(back, frame)] = &answers[..] else { panic!("{answers:?}") };
        let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        assert_eq!((*back, ip.src_addr(), ip.dst_addr()), (side, to, from));
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert_eq!(
            (icmp.msg_type(), icmp.data(), icmp.verify_checksum()),
            (Icmpv4Message::EchoReply, &b"abc"[..], true)
        );
    }
}

#[test]
fn names_are_asked_for_at_the_gateway() {
    let mut router = connected();
    let sent = send(&mut router, Side::Inside, &udp((CARD, MAC), (GUEST, 9), (GATEWAY, 53), 64, b"?"));
    assert_eq!(sent, [(Side::Outside, udp((OUTSIDE_MAC, HOST), (OWN, 9), (DNS, 53), 63, b"?"))]);
    let back = send(&mut router, Side::Outside, &udp((HOST, OUTSIDE_MAC), (DNS, 53), (OWN, 9), 64, b"!"));
    assert_eq!(back, [(Side::Inside, udp((MAC, CARD), (GATEWAY, 53), (GUEST, 9), 63, b"!"))]);
    router.set_outside(Some(Outside { dns: None, ..OUTSIDE }));
    for port in [53, 54] {
        assert!(
            send(&mut router, Side::Inside, &udp((CARD, MAC), (GUEST, 9), (GATEWAY, port), 64, b"?"))
                .is_empty()
        );
    }
    assert_eq!(router.drops().unserved, 2);
}

#[test]
fn a_guest_is_told_why_its_packet_goes_nowhere() {
    let mut router = router();
    let error = |router: &mut Router, frame: &[u8]| {
        let answers = send(router, Side::Inside, frame);
        let [(Side::Inside, answer)] = &answers[..] else { return None };
        let ip = Ipv4Packet::new_checked(&answer[14..]).unwrap();
        assert_eq!((ip.src_addr(), ip.dst_addr(), ip.verify_checksum()), (GATEWAY, GUEST, true));
        assert!(ip.payload().len() <= 556);
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert!(icmp.verify_checksum());
        Some(icmp.msg_type())
    };
    let long = vec![7; 1400];
    let last_hop = udp((CARD, MAC), (GUEST, 5), (FAR, 6), 1, &long);
    assert_eq!(error(&mut router, &last_hop), Some(Icmpv4Message::TimeExceeded));
    router.set_outside(None);
    let any = udp((CARD, MAC), (GUEST, 5), (FAR, 6), 64, &long);
    assert_eq!(error(&mut router, &any), Some(Icmpv4Message::DstUnreachable));
    assert_eq!(error(&mut router, &ping((CARD, MAC), GUEST, FAR)), Some(Icmpv4Message::DstUnreachable));
    let mut quiet = ping((CARD, MAC), GUEST, FAR);
    quiet[34] = 3;
    assert_eq!(error(&mut router, &quiet), None, "an error about an error");
}

#[test]
fn what_waits_for_a_neighbour_is_bounded() {
    let mut router = router();
    let mut questions = 0;
    // As many as the guest may have connections.
    for host in 10..60 {
        for port in 1..=WAITING as u16 + 3 {
            let to = (Ipv4Address::new(203, 0, 113, host), port);
            questions +=
                send(&mut router, Side::Inside, &udp((CARD, MAC), (GUEST, port), to, 64, b"x")).len();
        }
    }
    assert_eq!((questions, router.neighbours.len()), (50, 50));
    assert!(router.neighbours.values().all(|neighbour| neighbour.waiting.len() <= WAITING));
    let mut asked = 0;
    for second in 1..=4u64 {
        router.poll(second * 1_000_000_000, &mut |side, frame| {
            assert_eq!((side, frame.len()), (Side::Outside, 42));
            asked += 1;
        });
    }
    assert_eq!((router.neighbours.len(), asked), (0, questions * 2));
    assert_eq!(router.drops().unreachable, (questions * (WAITING + 3)) as u64);
}

fn dhcp(card: EthernetAddress, kind: DhcpMessageType, change: impl FnOnce(&mut DhcpRepr)) -> Vec<u8> {
    let mut message = DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234,
        secs: 0,
        client_hardware_address: card,
        client_ip: Ipv4Address::UNSPECIFIED,
        your_ip: Ipv4Address::UNSPECIFIED,
        server_ip: Ipv4Address::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: false,
        requested_ip: None,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    change(&mut message);
    let mut payload = vec![0; message.buffer_len()];
    message.emit(&mut DhcpPacket::new_unchecked(&mut payload[..])).unwrap();
    let from = (message.client_ip, 68);
    udp((card, EthernetAddress::BROADCAST), from, (Ipv4Address::BROADCAST, 67), 64, &payload)
}

#[test]
fn a_card_is_given_its_address_and_no_other() {
    let mut router = router();
    type Answer = (EthernetAddress, Ipv4Address, DhcpMessageType, Ipv4Address);
    let mut ask = |card, kind, change: &dyn Fn(&mut DhcpRepr)| -> Option<Answer> {
        let answers = send(&mut router, Side::Inside, &dhcp(card, kind, change));
        let (_, frame) = answers.first()?;
        let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        let udp = UdpPacket::new_checked(ip.payload()).unwrap();
        assert!(udp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
        let packet = DhcpPacket::new_checked(udp.payload()).unwrap();
        let answer = DhcpRepr::parse(&packet).unwrap();
        assert_eq!((answer.transaction_id, answer.server_identifier), (0x1234, Some(GATEWAY)));
        if answer.message_type != DhcpMessageType::Nak {
            assert_eq!(
                (answer.router, answer.subnet_mask),
                (Some(GATEWAY), Some(Ipv4Address::new(255, 255, 255, 0)))
            );
            assert_eq!(answer.dns_servers.unwrap().first(), Some(&GATEWAY));
        }
        let to = EthernetAddress::from_bytes(&frame[..6]);
        Some((to, ip.dst_addr(), answer.message_type, answer.your_ip))
    };
    use DhcpMessageType::{Ack, Decline, Discover, Inform, Nak, Offer, Request};
    let everybody = (EthernetAddress::BROADCAST, Ipv4Address::BROADCAST);
    assert_eq!(ask(CARD, Discover, &|_| {}), Some((CARD, GUEST, Offer, GUEST)));
    assert_eq!(ask(CARD, Discover, &|m| m.broadcast = true), Some((everybody.0, everybody.1, Offer, GUEST)));
    assert_eq!(ask(CARD, Request, &|m| m.requested_ip = Some(GUEST)), Some((CARD, GUEST, Ack, GUEST)));
    assert_eq!(ask(CARD, Request, &|m| m.client_ip = GUEST), Some((CARD, GUEST, Ack, GUEST)), "renewed");
    let none = Ipv4Address::UNSPECIFIED;
    assert_eq!(
        ask(CARD, Request, &|m| m.requested_ip = Some(FAR)),
        Some((everybody.0, everybody.1, Nak, none))
    );
    assert_eq!(ask(CARD, Request, &|m| m.server_identifier = Some(FAR)), None, "another server's");
    assert_eq!(ask(CARD, Inform, &|m| m.client_ip = GUEST), Some((CARD, GUEST, Ack, none)));
    assert_eq!(ask(CARD, Decline, &|m| m.requested_ip = Some(GUEST)), None);
    assert_eq!(ask(OTHER_CARD, Discover, &|_| {}), None, "a card that nobody announced");
    assert_eq!(ask(CARD, Discover, &|m| m.client_hardware_address = OTHER_CARD), None);
    assert_eq!(router.drops(), Drops { spoofed: 2, ..Drops::default() });
}

#[test]
fn addresses_are_given_once_and_fit_the_network() {
    let mut router = Router::new(Ipv4Cidr::new(Ipv4Address::new(10, 0, 0, 2), 29), MAC, OUTSIDE_MAC);
    let card = |number| EthernetAddress([6, 0, 0, 0, 0, number]);
    let last = |address: Ipv4Address| address.octets()[3];
    assert_eq!(router.lease(card(1), None).map(last), Ok(1));
    assert_eq!(router.lease(card(1), None), Err(LeaseError::Known));
    for edge in [0, 2, 7, 8] {
        assert_eq!(
            router.lease(card(2), Some(Ipv4Address::new(10, 0, 0, edge))),
            Err(LeaseError::OutOfRange)
        );
    }
    assert_eq!(router.lease(card(2), Some(Ipv4Address::new(10, 0, 0, 1))), Err(LeaseError::Taken));
    assert_eq!(router.lease(card(2), Some(Ipv4Address::new(10, 0, 0, 4))).map(last), Ok(4));
    let rest: Vec<_> = (3..8).map(|number| router.lease(card(number), None).map(last)).collect();
    assert_eq!(rest, [Ok(3), Ok(5), Ok(6), Err(LeaseError::Exhausted), Err(LeaseError::Exhausted)]);
    router.release(card(2));
    assert_eq!(router.lease(card(7), None).map(last), Ok(4));
}

#[test]
fn what_leads_to_a_card_goes_with_it() {
    let mut router = connected();
    let forward = Forward { transport: Transport::Udp, outside: 8080, to: GUEST, port: 80 };
    assert_eq!(router.forward(forward), Ok(()));
    assert_eq!(router.forward(forward), Err(ForwardError::Taken(forward)));
    assert_eq!(router.forwards(), [forward]);
    let nobody = Forward { to: FAR, outside: 1, ..forward };
    assert_eq!(router.forward(nobody), Err(ForwardError::NoCard), "nobody's address");
    let asked = udp((HOST, OUTSIDE_MAC), (FAR, 1), (OWN, 8080), 64, b"get");
    assert_eq!(
        send(&mut router, Side::Outside, &asked),
        [(Side::Inside, udp((MAC, CARD), (FAR, 1), (GUEST, 80), 63, b"get"))]
    );
    router.release(CARD);
    assert!(send(&mut router, Side::Outside, &asked).is_empty());
    assert_eq!((router.flows(), router.drops().unasked), (0, 1));
}

proptest! {
    #[test]
    fn no_frame_panics(
        side in prop_oneof![Just(Side::Inside), Just(Side::Outside)],
        frame in prop::collection::vec(any::<u8>(), 0..200),
        shape in 0..6u8,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        blank in any::<bool>(),
    ) {
        let mut frame = match shape {
            0 => frame,
            1 => udp((CARD, MAC), (GUEST, 5), (FAR, 6), 64, &frame),
            2 => udp((HOST, OUTSIDE_MAC), (FAR, 6), (OWN, 5), 64, &frame),
            3 => dhcp(CARD, DhcpMessageType::Request, |_| {}),
            4 => arp(ArpOperation::Request, (CARD, GUEST), (HOST, GATEWAY)),
            _ => ping((CARD, MAC), GUEST, GATEWAY),
        };
        for (at, value) in flips {
            if !frame.is_empty() {
                let at = at.index(frame.len());
                frame[at] = value;
            }
        }
        let checksum = if blank { Checksum::Blank } else { Checksum::Complete };
        let mut router = connected();
        router.handle(0, side, &mut frame, checksum, &mut |_, frame| assert!(frame.len() >= 14));
    }
}

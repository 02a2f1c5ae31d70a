use super::{
    FLOWS_EACH, Forward, ICMP, Nat, Refused, SECOND_NS, TCP_ESTABLISHED, TCP_TRANSITORY, Transport, UDP,
    adjusted,
};
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpPacket,
    UdpPacket,
};

const OWN: Ipv4Address = Ipv4Address::new(203, 0, 113, 7);
const A: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);
const B: Ipv4Address = Ipv4Address::new(10, 0, 0, 3);
const PEER: Ipv4Address = Ipv4Address::new(198, 51, 100, 9);
const DNS: Ipv4Address = Ipv4Address::new(198, 51, 100, 53);
const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);

type End = (Ipv4Address, u16);

fn ip(source: Ipv4Address, destination: Ipv4Address, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let header = Ipv4Repr {
        src_addr: source,
        dst_addr: destination,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; 20 + payload.len()];
    header.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
    bytes[20..].copy_from_slice(payload);
    bytes
}

/// Flags of TCP.
const SYN: u8 = 2;
const RST: u8 = 4;
const FIN: u8 = 1;
const ACK: u8 = 16;

fn tcp(from: End, to: End, flags: u8) -> Vec<u8> {
    let mut bytes = vec![0; 27];
    bytes[12] = 0x50;
    bytes[13] = flags;
    bytes[20..].copy_from_slice(b"payload");
    let mut packet = TcpPacket::new_unchecked(&mut bytes[..]);
    packet.set_src_port(from.1);
    packet.set_dst_port(to.1);
    packet.fill_checksum(&from.0.into(), &to.0.into());
    ip(from.0, to.0, IpProtocol::Tcp, &bytes)
}

fn udp(from: End, to: End, checksum: bool) -> Vec<u8> {
    let mut bytes = vec![0; 13];
    bytes[8..].copy_from_slice(b"datum");
    let mut packet = UdpPacket::new_unchecked(&mut bytes[..]);
    packet.set_src_port(from.1);
    packet.set_dst_port(to.1);
    packet.set_len(13);
    if checksum {
        packet.fill_checksum(&from.0.into(), &to.0.into());
    }
    ip(from.0, to.0, IpProtocol::Udp, &bytes)
}

fn icmp(from: Ipv4Address, to: Ipv4Address, message: &Icmpv4Repr) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
    ip(from, to, IpProtocol::Icmp, &bytes)
}

fn ping(from: Ipv4Address, to: Ipv4Address, ident: u16) -> Vec<u8> {
    icmp(from, to, &Icmpv4Repr::EchoRequest { ident, seq_no: 3, data: b"ping" })
}

fn pong(from: Ipv4Address, to: Ipv4Address, ident: u16) -> Vec<u8> {
    icmp(from, to, &Icmpv4Repr::EchoReply { ident, seq_no: 3, data: b"ping" })
}

fn out(nat: &mut Nat, now_s: u64, packet: &[u8]) -> Result<Vec<u8>, Refused> {
    let mut packet = packet.to_vec();
    let real = |_, shown: End| if shown == (GATEWAY, 53) { (DNS, 53) } else { shown };
    nat.outwards(now_s * SECOND_NS, &mut packet, OWN, real).map(|()| packet)
}

fn into(nat: &mut Nat, now_s: u64, packet: &[u8]) -> Result<(Ipv4Address, Vec<u8>), Refused> {
    let mut packet = packet.to_vec();
    nat.inwards(now_s * SECOND_NS, &mut packet, OWN).map(|guest| (guest, packet))
}

#[test]
fn a_flow_goes_out_and_comes_back() {
    let mut nat = Nat::default();
    let server = (PEER, 80);
    // The very bytes that the new ends would have sent, checksums included.
    assert_eq!(out(&mut nat, 0, &tcp((A, 5000), server, SYN)), Ok(tcp((OWN, 5000), server, SYN)));
    assert_eq!(
        into(&mut nat, 0, &tcp(server, (OWN, 5000), SYN | ACK)),
        Ok((A, tcp(server, (A, 5000), SYN | ACK)))
    );
    for checksum in [true, false] {
        assert_eq!(
            out(&mut nat, 0, &udp((A, 5000), server, checksum)),
            Ok(udp((OWN, 5000), server, checksum))
        );
        assert_eq!(
            into(&mut nat, 0, &udp(server, (OWN, 5000), checksum)),
            Ok((A, udp(server, (A, 5000), checksum)))
        );
    }
    assert_eq!(out(&mut nat, 0, &ping(A, PEER, 9)), Ok(ping(OWN, PEER, 9)));
    assert_eq!(into(&mut nat, 0, &pong(PEER, OWN, 9)), Ok((A, pong(PEER, A, 9))));
    assert_eq!(nat.len(), 3);
}

#[test]
fn two_guests_with_one_port_are_told_apart() {
    let mut nat = Nat::default();
    let server = (PEER, 80);
    out(&mut nat, 0, &tcp((A, 5000), server, SYN)).unwrap();
    let second = out(&mut nat, 0, &tcp((B, 5000), server, SYN)).unwrap();
    let port = TcpPacket::new_unchecked(&second[20..]).src_port();
    assert_ne!(port, 5000);
    assert_eq!(second, tcp((OWN, port), server, SYN));
    assert_eq!(into(&mut nat, 0, &tcp(server, (OWN, port), ACK)), Ok((B, tcp(server, (B, 5000), ACK))));
    assert_eq!(into(&mut nat, 0, &tcp(server, (OWN, 5000), ACK)).unwrap().0, A);
    // To another server it has its own.
    assert_eq!(out(&mut nat, 0, &tcp((B, 5000), (PEER, 81), SYN)), Ok(tcp((OWN, 5000), (PEER, 81), SYN)));
    out(&mut nat, 0, &ping(A, PEER, 1)).unwrap();
    let second = out(&mut nat, 0, &ping(B, PEER, 1)).unwrap();
    let ident = Icmpv4Packet::new_unchecked(&second[20..]).echo_ident();
    assert_eq!(into(&mut nat, 0, &pong(PEER, OWN, ident)), Ok((B, pong(PEER, B, 1))));
}

#[test]
fn nothing_comes_in_unasked() {
    let mut nat = Nat::default();
    out(&mut nat, 0, &udp((A, 5000), (PEER, 80), true)).unwrap();
    for packet in [
        udp((PEER, 81), (OWN, 5000), true),
        udp((DNS, 80), (OWN, 5000), true),
        udp((PEER, 80), (OWN, 5001), true),
        tcp((PEER, 80), (OWN, 5000), SYN),
        pong(PEER, OWN, 5000),
        ping(PEER, OWN, 5000),
        ping(PEER, OWN, 0),
    ] {
        assert_eq!(into(&mut nat, 0, &packet), Err(Refused::Unasked));
    }
    assert_eq!(out(&mut nat, 0, &pong(A, PEER, 4)), Err(Refused::Unasked), "an answer to nothing");
    assert_eq!(out(&mut nat, 0, &tcp((A, 1), (PEER, 1), RST)), Err(Refused::Unasked));
    let mut fragment = udp((A, 5000), (PEER, 80), true);
    fragment[6] = 0x20;
    assert_eq!(out(&mut nat, 0, &fragment), Err(Refused::Fragment));
    assert_eq!(out(&mut nat, 0, &ip(A, PEER, IpProtocol::from(47), b"GRE")), Err(Refused::Protocol));
    assert_eq!(nat.len(), 1);
}

#[test]
fn a_forwarded_port_leads_to_its_guest() {
    let mut nat = Nat::default();
    let forward = Forward { transport: Transport::Tcp, outside: 8080, to: A, port: 80 };
    assert_eq!(nat.forward(forward), Ok(()));
    assert_eq!(nat.forward(Forward { to: B, ..forward }), Err(forward), "one port, one guest");
    let client = (PEER, 40000);
    assert_eq!(into(&mut nat, 0, &tcp(client, (OWN, 8080), SYN)), Ok((A, tcp(client, (A, 80), SYN))));
    assert_eq!(out(&mut nat, 0, &tcp((A, 80), client, SYN | ACK)), Ok(tcp((OWN, 8080), client, SYN | ACK)));
    assert_eq!(into(&mut nat, 0, &udp(client, (OWN, 8080), true)), Err(Refused::Unasked));
    // Nobody else goes out by it.
    let other = out(&mut nat, 0, &tcp((B, 8080), (DNS, 1), SYN)).unwrap();
    assert_ne!(TcpPacket::new_unchecked(&other[20..]).src_port(), 8080);
    nat.forget(A);
    assert_eq!(into(&mut nat, 0, &tcp(client, (OWN, 8080), ACK)), Err(Refused::Unasked));
    assert_eq!(nat.len(), 1);
}

#[test]
fn names_are_asked_for_elsewhere_than_the_guest_thinks() {
    let mut nat = Nat::default();
    let asked = out(&mut nat, 0, &udp((A, 6000), (GATEWAY, 53), true));
    assert_eq!(asked, Ok(udp((OWN, 6000), (DNS, 53), true)));
    let answer = into(&mut nat, 0, &udp((DNS, 53), (OWN, 6000), true));
    assert_eq!(answer, Ok((A, udp((GATEWAY, 53), (A, 6000), true))));
    // The same server by its own name from the same port is another flow.
    let direct = out(&mut nat, 0, &udp((A, 6000), (DNS, 53), true)).unwrap();
    let port = UdpPacket::new_unchecked(&direct[20..]).src_port();
    assert_ne!(port, 6000);
    assert_eq!(
        into(&mut nat, 0, &udp((DNS, 53), (OWN, port), true)).unwrap().1,
        udp((DNS, 53), (A, 6000), true)
    );
}

#[test]
fn errors_find_the_packet_that_they_are_about() {
    let unreachable = |about: &[u8]| {
        let ip = Ipv4Packet::new_checked(about).unwrap();
        let header = Ipv4Repr::parse(&ip, &ChecksumCapabilities::default()).unwrap();
        let reason = Icmpv4DstUnreachable::PortUnreachable;
        (header, reason)
    };
    let error = |from, to, about: &[u8]| {
        let (header, reason) = unreachable(about);
        icmp(from, to, &Icmpv4Repr::DstUnreachable { reason, header, data: &about[20..] })
    };
    let mut nat = Nat::default();
    out(&mut nat, 0, &udp((A, 6000), (GATEWAY, 53), true)).unwrap();
    out(&mut nat, 0, &tcp((A, 5000), (PEER, 80), SYN)).unwrap();
    out(&mut nat, 0, &tcp((B, 5000), (PEER, 80), SYN)).unwrap();
    let second = out(&mut nat, 0, &tcp((B, 5000), (PEER, 80), SYN)).unwrap();
    let port = TcpPacket::new_unchecked(&second[20..]).src_port();
    out(&mut nat, 0, &ping(A, PEER, 7)).unwrap();
    for (sent, guest, ends) in [
        (tcp((OWN, 5000), (PEER, 80), SYN), A, [5000, 80]),
        (tcp((OWN, port), (PEER, 80), SYN), B, [5000, 80]),
    ] {
        let (to, got) = into(&mut nat, 0, &error(PEER, OWN, &sent)).unwrap();
        assert_eq!(to, guest);
        check(&got, PEER, guest);
        let inner = &got[28..];
        assert_eq!(Ipv4Packet::new_unchecked(inner).src_addr(), guest);
        assert!(Ipv4Packet::new_unchecked(inner).verify_checksum());
        let tcp = TcpPacket::new_unchecked(&inner[20..]);
        assert_eq!([tcp.src_port(), tcp.dst_port()], ends);
    }
    let (_, got) = into(&mut nat, 0, &error(PEER, OWN, &ping(OWN, PEER, 7))).unwrap();
    assert_eq!(&got[28..], &ping(A, PEER, 7)[..]);
    // And about one that came in.
    let told = out(&mut nat, 0, &error(A, PEER, &tcp((PEER, 80), (A, 5000), ACK))).unwrap();
    check(&told, OWN, PEER);
    let inner = Ipv4Packet::new_unchecked(&told[28..]);
    assert_eq!((inner.src_addr(), inner.dst_addr(), inner.verify_checksum()), (PEER, OWN, true));
    // About nothing that was sent.
    for about in [tcp((OWN, 5001), (PEER, 80), SYN), tcp((A, 5000), (PEER, 80), SYN)] {
        assert_eq!(into(&mut nat, 0, &error(PEER, OWN, &about)), Err(Refused::Unasked));
    }
    // Cut, or lying about the length of the inner header.
    let whole = error(PEER, OWN, &tcp((OWN, 5000), (PEER, 80), SYN));
    for length in 0..whole.len() {
        assert!(into(&mut nat, 0, &whole[..length]).is_err());
    }
    let mut lying = whole;
    lying[28] = 0x4f;
    assert!(into(&mut nat, 0, &lying).is_err());
}

/// An ICMP packet between these, all checksums right.
fn check(packet: &[u8], from: Ipv4Address, to: Ipv4Address) {
    let ip = Ipv4Packet::new_checked(packet).unwrap();
    assert_eq!((ip.src_addr(), ip.dst_addr()), (from, to));
    assert!(ip.verify_checksum() && Icmpv4Packet::new_checked(ip.payload()).unwrap().verify_checksum());
}

#[test]
fn flows_are_forgotten_when_their_time_is_over() {
    let server = (PEER, 80);
    let lives = |packets: &[(bool, Vec<u8>)], seconds: u64| {
        let mut nat = Nat::default();
        for (outwards, packet) in packets {
            if *outwards {
                out(&mut nat, 10, packet).unwrap();
            } else {
                into(&mut nat, 10, packet).unwrap();
            }
        }
        nat.expire((10 + seconds) * SECOND_NS - 1);
        assert_eq!((nat.len(), nat.each.len(), nat.by_outside.len()), (1, 1, 1));
        nat.expire((10 + seconds) * SECOND_NS);
        assert_eq!((nat.len(), nat.each.len(), nat.by_outside.len()), (0, 0, 0));
    };
    let to = |flags| (true, tcp((A, 1), server, flags));
    let from = |flags| (false, tcp(server, (OWN, 1), flags));
    lives(&[to(SYN)], TCP_TRANSITORY);
    lives(&[to(SYN), to(ACK)], TCP_TRANSITORY);
    lives(&[to(SYN), from(SYN | ACK), to(ACK)], TCP_ESTABLISHED);
    lives(&[to(SYN), from(SYN | ACK), to(ACK | FIN), from(ACK)], TCP_TRANSITORY);
    lives(&[to(SYN), from(SYN | ACK), from(RST)], TCP_TRANSITORY);
    lives(&[(true, udp((A, 1), server, true))], UDP);
    lives(&[(true, ping(A, PEER, 1))], ICMP);
}

#[test]
fn one_guest_takes_no_more_than_its_share() {
    let mut nat = Nat::default();
    let mut made = 0;
    for port in 1..=2 * FLOWS_EACH as u16 {
        made += u32::from(out(&mut nat, 0, &udp((A, port), (PEER, 1), true)).is_ok());
    }
    assert_eq!(made, FLOWS_EACH);
    assert!(out(&mut nat, 0, &udp((B, 1), (PEER, 1), true)).is_ok());
    assert_eq!(out(&mut nat, UDP - 1, &udp((A, 9999), (PEER, 1), true)), Err(Refused::Full));
    assert!(out(&mut nat, UDP, &udp((A, 9999), (PEER, 1), true)).is_ok(), "the old ones are over");
    assert_eq!(nat.len(), 1);
}

#[test]
fn adjusting_is_computing_anew() {
    // RFC 1624's example.
    assert_eq!(adjusted(0xdd2f, &[(0x5555, 0x3285)]), 0x0000);
}

proptest! {
    #[test]
    fn no_packet_panics_or_goes_out_in_its_own_name(
        mut packet in prop::collection::vec(any::<u8>(), 0..120),
        shape in 0..4u8,
        flip in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        match shape {
            0 => {}
            1 => packet = tcp((A, 5), (PEER, 6), value),
            2 => packet = udp((A, 5), (PEER, 6), true),
            _ => packet = ping(A, PEER, 5),
        }
        if !packet.is_empty() {
            let at = flip.index(packet.len());
            packet[at] = value;
        }
        let mut nat = Nat::default();
        let mut copy = packet.clone();
        if nat.outwards(0, &mut copy, OWN, |_, shown| shown).is_ok() {
            let ip = Ipv4Packet::new_checked(&copy[..]).unwrap();
            prop_assert_eq!(ip.src_addr(), OWN);
            prop_assert_eq!(copy.len(), packet.len());
        }
        let _ = nat.inwards(0, &mut packet, OWN);
    }

    #[test]
    fn whatever_flows_there_are_each_comes_back_to_its_guest(
        sends in prop::collection::vec((0..4u8, 0..4u16, 0..3u16, 0..3u8), 1..200)
    ) {
        let mut nat = Nat::default();
        for (guest, port, remote, kind) in sends {
            let inside = (Ipv4Address::new(10, 0, 0, guest + 2), port);
            let remote = (PEER, remote);
            let (sent, answer): (_, fn(End, End) -> Vec<u8>) = match kind {
                0 => (tcp(inside, remote, ACK), |from, to| tcp(from, to, ACK)),
                1 => (udp(inside, remote, true), |from, to| udp(from, to, true)),
                _ => (ping(inside.0, remote.0, inside.1), |from, to| pong(from.0, to.0, to.1)),
            };
            let sent = out(&mut nat, 0, &sent).unwrap();
            let port = match kind {
                0 => TcpPacket::new_unchecked(&sent[20..]).src_port(),
                1 => UdpPacket::new_unchecked(&sent[20..]).src_port(),
                _ => Icmpv4Packet::new_unchecked(&sent[20..]).echo_ident(),
            };
            prop_assert_ne!(port, 0);
            let back = into(&mut nat, 0, &answer(remote, (OWN, port)));
            prop_assert_eq!(back, Ok((inside.0, answer(remote, inside))));
        }
    }
}

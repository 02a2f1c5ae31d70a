use super::{AGEING_NS, AttachError, LEARNT, Port, PortId, Reason, Switch};
use crate::filter::{Action, Filter};
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;
use smoltcp::wire::EthernetAddress;

fn mac(last: u8) -> EthernetAddress {
    EthernetAddress([2, 0, 0, 0, 0, last])
}

const ALL: EthernetAddress = EthernetAddress::BROADCAST;

fn frame(to: EthernetAddress, from: EthernetAddress) -> Vec<u8> {
    let mut frame = Vec::from(to.0);
    frame.extend(from.0);
    frame.extend([0x88, 0xb5, 1, 2, 3]);
    frame
}

fn send(switch: &mut Switch, from: PortId, frame: &[u8]) -> Result<Vec<PortId>, Reason> {
    let mut got = Vec::new();
    switch.forward(0, from, frame, frame.len(), |port| got.push(port)).map(|()| got)
}

/// Ports with the addresses 1, 2 and 3, and a trunk.
fn three() -> (Switch, [PortId; 4]) {
    let mut switch = Switch::new();
    let ports = [Port::guest(mac(1)), Port::guest(mac(2)), Port::guest(mac(3)), Port::trunk()]
        .map(|p| switch.attach(p).unwrap());
    (switch, ports)
}

#[test]
fn a_frame_goes_where_its_address_is() {
    let (mut switch, [a, b, c, trunk]) = three();
    assert_eq!(send(&mut switch, a, &frame(mac(2), mac(1))), Ok(vec![b]));
    assert_eq!(send(&mut switch, a, &frame(ALL, mac(1))), Ok(vec![b, c, trunk]));
    assert_eq!(send(&mut switch, trunk, &frame(mac(3), mac(77))), Ok(vec![c]));
    assert_eq!(send(&mut switch, a, &frame(mac(1), mac(1))), Err(Reason::NoPort), "to itself");
    let counters = switch.counters(a).unwrap();
    assert_eq!((counters.sent_frames, counters.sent_bytes, counters.dropped), (2, 34, [0, 0, 0, 1]));
    assert_eq!(
        (switch.counters(c).unwrap().received_frames, switch.counters(c).unwrap().received_bytes),
        (2, 34)
    );
}

#[test]
fn what_is_for_an_unknown_address_is_no_guests_business() {
    let (mut switch, [a, .., trunk]) = three();
    assert_eq!(send(&mut switch, a, &frame(mac(99), mac(1))), Ok(vec![trunk]));
    assert_eq!(
        send(&mut switch, trunk, &frame(mac(99), mac(98))),
        Err(Reason::NoPort),
        "only where it came from"
    );
    let other = switch.attach(Port::trunk()).unwrap();
    assert_eq!(send(&mut switch, trunk, &frame(mac(99), mac(98))), Ok(vec![other]));
    // It is learnt, and moves.
    assert_eq!(send(&mut switch, a, &frame(mac(98), mac(1))), Ok(vec![trunk]));
    send(&mut switch, other, &frame(mac(1), mac(98))).unwrap();
    assert_eq!(send(&mut switch, a, &frame(mac(98), mac(1))), Ok(vec![other]));
    switch.detach(other).unwrap();
    assert_eq!(send(&mut switch, a, &frame(mac(98), mac(1))), Ok(vec![trunk]), "forgotten with its trunk");
}

#[test]
fn nobody_speaks_as_somebody_else() {
    let (mut switch, [a, b, _, trunk]) = three();
    for source in [mac(2), mac(9), ALL, EthernetAddress([1, 0, 0, 0, 0, 1])] {
        assert_eq!(send(&mut switch, a, &frame(ALL, source)), Err(Reason::Spoofed), "{source}");
    }
    assert_eq!(
        send(&mut switch, trunk, &frame(ALL, mac(2))),
        Err(Reason::Spoofed),
        "a guest's, from outside"
    );
    assert_eq!(send(&mut switch, a, &frame(mac(2), mac(1))), Ok(vec![b]), "it has not moved");
    assert_eq!(switch.counters(a).unwrap().dropped, [0, 4, 0, 0]);
    assert_eq!(send(&mut switch, a, &frame(mac(2), mac(1))[..13]), Err(Reason::Malformed));
}

#[test]
fn bridges_keep_their_own_protocols() {
    let (mut switch, [a, ..]) = three();
    for last in 0..16 {
        let group = EthernetAddress([1, 0x80, 0xc2, 0, 0, last]);
        assert_eq!(send(&mut switch, a, &frame(group, mac(1))), Err(Reason::NoPort));
    }
    let other = EthernetAddress([1, 0x80, 0xc2, 0, 0, 16]);
    assert_eq!(send(&mut switch, a, &frame(other, mac(1))).unwrap().len(), 3);
}

#[test]
fn addresses_are_of_one_port_and_of_one_station() {
    let (mut switch, [a, ..]) = three();
    assert_eq!(switch.attach(Port::guest(mac(1))), Err(AttachError::Taken(a)));
    for bad in [ALL, EthernetAddress([0; 6]), EthernetAddress([3, 0, 0, 0, 0, 1])] {
        assert_eq!(switch.attach(Port::guest(bad)), Err(AttachError::NotUnicast));
    }
    switch.detach(a).unwrap();
    assert_eq!(switch.detach(a), None);
    let again = switch.attach(Port::guest(mac(1))).unwrap();
    assert_ne!(again, a);
    assert_eq!(
        (switch.counters(a), switch.set_filter(a, Filter::default())),
        (None, false),
        "the old number"
    );
    assert_eq!(send(&mut switch, a, &frame(ALL, mac(1))), Err(Reason::NoPort));
}

#[test]
fn a_guests_address_is_not_learnt_before_it_comes() {
    let (mut switch, [a, .., trunk]) = three();
    send(&mut switch, trunk, &frame(mac(1), mac(50))).unwrap();
    let late = switch.attach(Port::guest(mac(50))).unwrap();
    assert_eq!(switch.learnt, 0);
    assert_eq!(send(&mut switch, a, &frame(mac(50), mac(1))), Ok(vec![late]));
}

#[test]
fn filters_and_isolation_hold_both_ways() {
    let (mut switch, [a, b, c, trunk]) = three();
    let closed = Filter { otherwise_in: Action::Deny, ..Filter::default() };
    assert!(switch.set_filter(b, closed));
    assert_eq!(send(&mut switch, a, &frame(mac(2), mac(1))), Err(Reason::Filtered));
    assert_eq!(send(&mut switch, a, &frame(ALL, mac(1))), Ok(vec![c, trunk]));
    assert_eq!(switch.counters(b).unwrap().refused, 2);
    assert!(send(&mut switch, b, &frame(mac(1), mac(2))).is_ok());
    let one = switch.attach(Port { isolated: true, ..Port::guest(mac(4)) }).unwrap();
    let two = switch.attach(Port { isolated: true, ..Port::guest(mac(5)) }).unwrap();
    assert_eq!(send(&mut switch, one, &frame(mac(5), mac(4))), Err(Reason::NoPort));
    assert_eq!(send(&mut switch, one, &frame(ALL, mac(4))), Ok(vec![a, c, trunk]));
    assert_eq!(send(&mut switch, a, &frame(mac(5), mac(1))), Ok(vec![two]));
}

#[test]
fn what_is_learnt_is_bounded_and_ages() {
    let (mut switch, [a, .., trunk]) = three();
    for number in 0..LEARNT as u32 * 2 {
        let [_, high, middle, low] = number.to_be_bytes();
        let source = EthernetAddress([6, 0, 0, high, middle, low]);
        switch.forward(u64::from(number), trunk, &frame(mac(1), source), 17, |_| {}).unwrap();
    }
    assert_eq!((switch.learnt, switch.stations.len()), (LEARNT, LEARNT + 3));
    let late = AGEING_NS + LEARNT as u64 - 1;
    switch.forward(late, trunk, &frame(mac(1), EthernetAddress([8; 6])), 17, |_| {}).unwrap();
    assert_eq!(switch.learnt, 1, "the last of the old");
    assert_eq!(send(&mut switch, a, &frame(EthernetAddress([6, 0, 0, 0, 0, 0]), mac(1))), Ok(vec![trunk]));
}

proptest! {
    /// Whatever is sent: nobody gets a frame twice, or its own, or one that is for another guest.
    #[test]
    fn frames_reach_whom_they_are_for(
        sends in prop::collection::vec((0..6usize, 0..8u8, 0..8u8, any::<bool>()), 1..200)
    ) {
        let (mut switch, [a, b, c, trunk]) = three();
        let ports = [a, b, c, trunk, switch.attach(Port::trunk()).unwrap()];
        let mut sent = 0;
        for (from, to, source, broadcast) in sends {
            let from = ports[from % ports.len()];
            let to = if broadcast { ALL } else { mac(to) };
            let frame = frame(to, mac(source));
            let Ok(got) = send(&mut switch, from, &frame) else { continue };
            sent += got.len() as u64;
            prop_assert!(!got.is_empty() && !got.contains(&from));
            let mut once = got.clone();
            once.dedup();
            prop_assert_eq!(once.len(), got.len());
            if !broadcast {
                for (index, guest) in [a, b, c].into_iter().enumerate() {
                    prop_assert_eq!(got.contains(&guest), to == mac(index as u8 + 1));
                }
            }
            for (index, guest) in [a, b, c].into_iter().enumerate() {
                prop_assert!(mac(source) != mac(index as u8 + 1) || from == guest);
            }
        }
        let received: u64 = ports.iter().map(|port| switch.counters(*port).unwrap().received_frames).sum();
        prop_assert_eq!(received, sent);
    }
}

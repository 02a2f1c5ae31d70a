use super::{
    Arrived, Beyond, Carried, FRAMES, Features, Missed, Network, STAGING_BYTES, Turn, Unfinished, WHOLE,
};
use crate::{Closed, Fault};
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use guest_sdk::copy::{Copier, Copy, Place};
use guest_sdk::ring::host::HostPages;
use guest_sdk::ring::{Front, SharedPage};
use hashbrown::HashMap;
use hypercall_abi::io::netif::{
    Extra, GSO_TYPE_TCPV4, NR_SLOTS_MIN, NetifExtraInfo, NetifRxRequest, NetifRxResponse, NetifTxRequest,
    NetifTxResponse, RSP_ERROR, RSP_NULL, RSP_OKAY, RxFlags, TxFlags,
};
use hypercall_abi::{DomId, GrantRef, PAGE_SIZE};
use netswitch::{Checksum, EthernetAddress, HEAD, Port, PortId};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

/// A frame, the flags of its first page, and the bytes of payload of the segments that it is to be cut into.
type Large = (Vec<u8>, RxFlags, Option<u16>);

/// Guests' pages, by guest and grant; some for reading only.
struct Host {
    pages: HashMap<(u16, u32), (Vec<u8>, bool)>,
    staging: Vec<u8>,
    calls: usize,
    /// Guests whose pages are mapped.
    at_hand: Vec<u16>,
    /// What the sender writes over its page once its head was read.
    later: Option<((u16, u32), Vec<u8>)>,
}

impl Copier for Host {
    fn copy(&mut self, copies: &mut [Copy]) {
        self.calls += 1;
        for copy in copies {
            let bytes = usize::from(copy.bytes);
            let from = match copy.from {
                Place::Granted { domain, gref, offset } => {
                    assert!(usize::from(offset) + bytes <= PAGE_SIZE, "{copy:?}");
                    let page = self.pages.get(&(domain.get(), gref.get()));
                    page.map(|(page, _)| page[offset.into()..usize::from(offset) + bytes].to_vec())
                }
                Place::Staging(at) => {
                    assert!(at % PAGE_SIZE + bytes <= PAGE_SIZE, "{copy:?}");
                    Some(self.staging[at..at + bytes].to_vec())
                }
            };
            let Some(from) = from else { continue };
            match copy.to {
                Place::Granted { domain, gref, offset } => {
                    assert!(usize::from(offset) + bytes <= PAGE_SIZE, "{copy:?}");
                    match self.pages.get_mut(&(domain.get(), gref.get())) {
                        Some((page, true)) => {
                            page[offset.into()..usize::from(offset) + bytes].copy_from_slice(&from)
                        }
                        _ => continue,
                    }
                }
                Place::Staging(at) => {
                    assert!(at % PAGE_SIZE + bytes <= PAGE_SIZE, "{copy:?}");
                    self.staging[at..at + bytes].copy_from_slice(&from);
                }
            }
            copy.done = true;
        }
        if let Some((page, bytes)) = self.later.take() {
            self.pages.get_mut(&page).unwrap().0[..bytes.len()].copy_from_slice(&bytes);
        }
    }

    fn copy_at_hand(&mut self, copy: &Copy) -> bool {
        let at_hand = |place| match place {
            Place::Granted { domain, .. } => self.at_hand.contains(&domain.get()),
            Place::Staging(_) => true,
        };
        if !at_hand(copy.from) || !at_hand(copy.to) {
            return false;
        }
        let (mut copies, calls) = ([*copy], self.calls);
        self.copy(&mut copies);
        self.calls = calls;
        copies[0].done
    }

    fn bring_at_hand(&mut self, page: &dyn SharedPage, at: usize, to: Place, bytes: usize) -> bool {
        let Place::Granted { domain, gref, offset } = to else { panic!("{to:?}") };
        match self.pages.get_mut(&(domain.get(), gref.get())) {
            Some((to, true)) if self.at_hand.contains(&domain.get()) => {
                page.read_bytes(at, &mut to[offset.into()..][..bytes]);
                true
            }
            _ => false,
        }
    }

    fn fetch_at_hand(&mut self, from: Place, page: &dyn SharedPage, at: usize, bytes: usize) -> bool {
        let Place::Granted { domain, gref, offset } = from else { panic!("{from:?}") };
        match self.pages.get(&(domain.get(), gref.get())) {
            Some((from, _)) if self.at_hand.contains(&domain.get()) => {
                page.write_bytes(at, &from[offset.into()..][..bytes]);
                true
            }
            _ => false,
        }
    }

    fn staging(&mut self) -> &mut [u8] {
        &mut self.staging
    }
}

struct Guest {
    domain: u16,
    port: PortId,
    transmit: Front<HostPages, NetifTxRequest, NetifTxResponse>,
    receive: Front<HostPages, NetifRxRequest, NetifRxResponse>,
    grants: u32,
}

struct World {
    network: Network<HostPages>,
    host: Host,
    guests: Vec<Guest>,
    local: Vec<(PortId, Vec<u8>, Unfinished)>,
}

fn mac(last: u16) -> EthernetAddress {
    EthernetAddress([2, 0, 0, 0, 0, last as u8])
}

const ALL: EthernetAddress = EthernetAddress::BROADCAST;

/// Behind dom0's own ports.
fn nobody(_: PortId, _: &mut [u8], _: Unfinished) {}

/// A frame of so many bytes whose content tells where a byte belongs.
fn frame(to: EthernetAddress, from: EthernetAddress, bytes: usize) -> Vec<u8> {
    let mut frame = Vec::from(to.0);
    frame.extend(from.0);
    frame.extend([0x88, 0xb5]);
    frame.extend((14..bytes).map(|at| (at ^ at >> 8) as u8));
    frame
}

impl World {
    fn new(features: &[Features]) -> Self {
        let host = Host {
            pages: HashMap::new(),
            staging: vec![0; STAGING_BYTES],
            calls: 0,
            at_hand: Vec::new(),
            later: None,
        };
        let mut world = Self { network: Network::new(), host, guests: Vec::new(), local: Vec::new() };
        for (number, features) in (1..).zip(features) {
            let port = world.network.attach(Port::guest(mac(number))).unwrap();
            let rings = [HostPages::new(1, 0), HostPages::new(1, 0)];
            let [transmit, receive] = rings.clone();
            let guest = Guest {
                domain: number,
                port,
                transmit: Front::new(transmit),
                receive: Front::new(receive),
                grants: 0,
            };
            let [transmit, receive] = rings;
            world.network.connect(port, DomId::new(number), [(transmit, receive)], *features);
            world.guests.push(guest);
        }
        world
    }

    /// A guest comes with other rings.
    fn reconnect(
        &mut self,
        guest: usize,
        queues: impl IntoIterator<Item = (HostPages, HostPages)>,
        features: Features,
    ) {
        let Guest { port, domain, .. } = self.guests[guest];
        assert_eq!(self.network.disconnect(port), Turn::default());
        self.network.connect(port, DomId::new(domain), queues, features);
    }

    fn page(&mut self, guest: usize, content: &[u8], writable: bool) -> GrantRef {
        let guest = &mut self.guests[guest];
        guest.grants += 1;
        let mut page = content.to_vec();
        page.resize(PAGE_SIZE, 0xcc);
        self.host.pages.insert((guest.domain, guest.grants), (page, writable));
        GrantRef::new(guest.grants)
    }

    /// Puts up pages to receive into.
    fn put_up(&mut self, guest: usize, pages: usize) {
        for _ in 0..pages {
            let gref = self.page(guest, &[], true);
            let id = gref.get() as u16;
            self.guests[guest].receive.push(NetifRxRequest { id, pad: 0, gref }).unwrap();
        }
        let _ = self.guests[guest].receive.publish();
    }

    /// Sends a frame, cut into pieces of these lengths and a last one.
    fn send(&mut self, guest: usize, frame: &[u8], cuts: &[usize], flags: TxFlags) {
        let mut rest = frame;
        let mut pieces = Vec::new();
        for cut in cuts {
            let (piece, left) = rest.split_at(*cut);
            pieces.push(piece);
            rest = left;
        }
        pieces.push(rest);
        for (index, piece) in pieces.iter().enumerate() {
            let offset = if piece.len() + 40 <= PAGE_SIZE { 40 } else { 0 };
            let mut content = vec![0xee; offset];
            content.extend(*piece);
            let gref = self.page(guest, &content, false);
            let more = if index + 1 < pieces.len() { TxFlags::MORE_DATA } else { TxFlags::empty() };
            let flags = if index == 0 { flags | more } else { more };
            let size = if index == 0 { frame.len() } else { piece.len() } as u16;
            let request = NetifTxRequest {
                gref,
                offset: offset as u16,
                flags: flags.bits(),
                id: gref.get() as u16,
                size,
            };
            self.guests[guest].transmit.push(request).unwrap();
        }
        let _ = self.guests[guest].transmit.publish();
    }

    fn turn(&mut self, guest: usize) -> Result<Turn, Closed> {
        let (local, port) = (&mut self.local, self.guests[guest].port);
        let turn = self.network.turn(
            0,
            port,
            0,
            &mut self.host,
            &mut |port: PortId, frame: &mut [u8], unfinished: Unfinished| {
                local.push((port, frame.to_vec(), unfinished));
            },
        );
        if turn.closed { Err(Closed) } else { Ok(turn) }
    }

    /// Frames that a guest got, with the flags of the first page.
    fn got(&mut self, guest: usize) -> Vec<Result<(Vec<u8>, RxFlags), i16>> {
        self.got_large(guest)
            .into_iter()
            .map(|got| {
                got.map(|(frame, flags, segment)| {
                    assert_eq!(segment, None);
                    (frame, flags)
                })
            })
            .collect()
    }

    /// The same, with the bytes of payload of the segments that they are to be cut into.
    fn got_large(&mut self, guest: usize) -> Vec<Result<Large, i16>> {
        let (mut frames, mut frame) = (Vec::new(), None::<Large>);
        let mut last = 0;
        while let Some(response) = self.guests[guest].receive.pop().unwrap() {
            assert!(response.id > last, "in the order of the requests");
            last = response.id;
            if response.status < 0 {
                frames.push(Err(response.status));
                continue;
            }
            let (page, _) = &self.host.pages[&(self.guests[guest].domain, response.id.into())];
            let flags = RxFlags::from_bits(response.flags).unwrap();
            let new = frame.is_none();
            let more = flags.contains(RxFlags::MORE_DATA);
            let (bytes, _, segment) =
                frame.get_or_insert((Vec::new(), flags - RxFlags::MORE_DATA - RxFlags::EXTRA_INFO, None));
            bytes.extend(&page[response.offset.into()..][..response.status as usize]);
            assert!(
                page[response.status as usize..].iter().all(|byte| *byte == 0xcc),
                "and no byte behind it"
            );
            if flags.contains(RxFlags::EXTRA_INFO) {
                assert!(new, "only the first page of a frame");
                let extra = self.guests[guest].receive.pop().unwrap().unwrap();
                let extra = NetifExtraInfo::read_from_bytes(extra.as_bytes()).unwrap();
                let Some(Extra::Gso { size, kind: GSO_TYPE_TCPV4 }) = extra.extra() else {
                    panic!("{extra:?}")
                };
                assert!(!extra.more());
                *segment = Some(size);
                // Its slot had a page, too.
                last += 1;
            }
            if !more {
                frames.extend(frame.take().map(Ok));
            }
        }
        assert!(frame.is_none());
        frames
    }

    /// Answers to what a guest has sent.
    fn answers(&mut self, guest: usize) -> Vec<i16> {
        core::iter::from_fn(|| self.guests[guest].transmit.pop().unwrap())
            .map(|answer| answer.status)
            .collect()
    }

    fn missed(&self, guest: usize) -> Missed {
        self.network.missed(self.guests[guest].port)
    }
}

const PLAIN: Features = Features { scatter_gather: false, blank_checksums: false, segments: false };
const FULL: Features = Features { scatter_gather: true, blank_checksums: true, segments: false };
const LARGE: Features = Features { segments: true, ..FULL };
const DONE: Unfinished = Unfinished { checksum: Checksum::Complete, segment: None };

fn plain(frame: Vec<u8>) -> Result<(Vec<u8>, RxFlags), i16> {
    Ok((frame, RxFlags::empty()))
}

#[test]
fn a_frame_goes_from_ring_to_ring_in_two_calls() {
    let mut world = World::new(&[PLAIN, PLAIN, PLAIN]);
    world.put_up(1, 8);
    world.put_up(2, 8);
    let frames: Vec<_> = [14, 60, 78, 79, 1514].map(|bytes| frame(mac(2), mac(1), bytes)).into();
    for frame in &frames {
        world.send(0, frame, &[], TxFlags::empty());
    }
    world.send(0, &frame(ALL, mac(1), 100), &[], TxFlags::DATA_VALIDATED);
    let turn = world.turn(0).unwrap();
    assert_eq!((turn.more, turn.notify.len(), world.host.calls), (false, 3, 2));
    assert_eq!(world.answers(0), [RSP_OKAY; 6]);
    let broadcast = Ok((frame(ALL, mac(1), 100), RxFlags::DATA_VALIDATED));
    let expected: Vec<_> = frames.into_iter().map(plain).chain([broadcast.clone()]).collect();
    assert_eq!(world.got(1), expected);
    assert_eq!(world.got(2), [broadcast]);
    assert_eq!(world.turn(0), Ok(Turn::default()), "nothing more");
}

#[test]
fn frames_between_pages_at_hand_take_no_call() {
    let mut world = World::new(&[PLAIN, FULL]);
    world.host.at_hand = vec![1, 2];
    world.put_up(1, 8);
    let frames = [14, 60, 79, 1514, WHOLE].map(|bytes| frame(mac(2), mac(1), bytes));
    let blank = TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED;
    for (number, frame) in frames.iter().enumerate() {
        world.send(0, frame, &[], if number == 1 { blank } else { TxFlags::empty() });
    }
    let turn = world.turn(0).unwrap();
    assert_eq!((turn.more, turn.notify.len(), world.host.calls), (false, 2, 0));
    assert_eq!(world.answers(0), [RSP_OKAY; 5]);
    let flags =
        |number| if number == 1 { RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED } else { RxFlags::empty() };
    let expected: Vec<_> = (0..).zip(frames).map(|(number, frame)| Ok((frame, flags(number)))).collect();
    assert_eq!(world.got(1), expected);
    let count = |guest: usize| world.network.switch().counters(world.guests[guest].port).unwrap();
    assert_eq!((count(0).sent_frames, count(1).received_frames), (5, 5), "each is counted once");
    assert_eq!(world.turn(0), Ok(Turn::default()), "nothing more");
}

#[test]
fn frames_that_go_the_long_way_keep_their_place() {
    // What is at hand: nothing, the sender's pages, the receivers', all.
    for at_hand in [vec![], vec![1], vec![2, 3], vec![1, 2, 3]] {
        let mut world = World::new(&[PLAIN, FULL, PLAIN]);
        world.host.at_hand = at_hand;
        world.put_up(1, 64);
        world.put_up(2, 64);
        let (mut second, mut third) = (Vec::new(), Vec::new());
        for round in 0..5 {
            // Short; in pieces; too long for the short way; for all; for somebody else; for nobody; short.
            for (to, bytes, cuts) in [
                (mac(2), 60, &[][..]),
                (mac(2), 70, &[20]),
                (mac(2), WHOLE + 1, &[]),
                (ALL, 61, &[]),
                (mac(3), 62, &[]),
                (mac(9), 63, &[]),
                (mac(2), 64, &[]),
            ] {
                let frame = frame(to, mac(1), bytes + round);
                world.send(0, &frame, cuts, TxFlags::empty());
                if to == mac(2) || to == ALL {
                    second.push(plain(frame.clone()));
                }
                if to == mac(3) || to == ALL {
                    third.push(plain(frame));
                }
            }
            // Rounds begin with each kind once.
            if round == 2 {
                world.send(0, &frame(mac(3), mac(1), 99), &[30], TxFlags::empty());
                third.push(plain(frame(mac(3), mac(1), 99)));
            }
            while world.turn(0).unwrap().more {}
        }
        assert_eq!(world.got(1), second, "{:?}", world.host.at_hand);
        assert_eq!(world.got(2), third, "{:?}", world.host.at_hand);
        assert!(world.answers(0).iter().all(|answer| *answer == RSP_OKAY));
        let sent = world.network.switch().counters(world.guests[0].port).unwrap();
        assert_eq!((sent.sent_frames, sent.dropped), (31, [0, 0, 0, 5]));
    }
}

#[test]
fn the_short_way_ends_where_there_is_no_room_and_at_bad_pages() {
    let mut world = World::new(&[PLAIN, PLAIN]);
    world.host.at_hand = vec![1, 2];
    world.put_up(1, 2);
    let frames: Vec<_> = (60..65).map(|bytes| frame(mac(2), mac(1), bytes)).collect();
    frames.iter().for_each(|frame| world.send(0, frame, &[], TxFlags::empty()));
    assert!(world.turn(0).unwrap().until_ns.is_some(), "three wait");
    assert_eq!(world.answers(0), [RSP_OKAY; 2]);
    world.put_up(1, 1);
    world.turn(1).unwrap();
    // What waits was sent first.
    let last = frame(mac(2), mac(1), 65);
    world.send(0, &last, &[], TxFlags::empty());
    world.put_up(1, 3);
    world.turn(0).unwrap();
    world.turn(1).unwrap();
    let expected: Vec<_> = frames.into_iter().chain([last]).map(plain).collect();
    assert_eq!(world.got(1), expected);
    assert_eq!(world.answers(0), [RSP_OKAY; 4]);
    // A page that cannot be written to: its guest misses the frame, and whose fault it is becomes known.
    let gref = world.page(1, &[], false);
    world.guests[1].receive.push(NetifRxRequest { id: gref.get() as u16, pad: 0, gref }).unwrap();
    let _ = world.guests[1].receive.publish();
    world.put_up(1, 1);
    world.send(0, &frame(mac(2), mac(1), 70), &[], TxFlags::empty());
    world.send(0, &frame(mac(2), mac(1), 71), &[], TxFlags::empty());
    world.turn(0).unwrap();
    assert_eq!(world.got(1), [Err(RSP_ERROR), plain(frame(mac(2), mac(1), 71))]);
    assert_eq!(world.answers(0), [RSP_OKAY; 2]);
    assert_eq!(world.missed(1).failed, 1);
    assert_eq!(world.network.take_fault(world.guests[1].port), Some(Fault::Grant));
    // A page that cannot be read: the sender's.
    world.put_up(1, 2);
    world.send(0, &frame(mac(2), mac(1), 72), &[], TxFlags::empty());
    let gref = world.guests[0].grants;
    world.host.pages.remove(&(1, gref));
    world.send(0, &frame(mac(2), mac(1), 73), &[], TxFlags::empty());
    world.turn(0).unwrap();
    assert_eq!(world.answers(0), [RSP_ERROR, RSP_OKAY]);
    assert_eq!(world.got(1), [plain(frame(mac(2), mac(1), 73))]);
}

#[test]
fn pieces_are_put_together_and_spread_over_pages() {
    let mut world = World::new(&[PLAIN, FULL, PLAIN]);
    world.put_up(1, 64);
    world.put_up(2, 64);
    for (bytes, cuts) in [
        (200, &[20, 30][..]),
        (100, &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (4096, &[100]),
        (4097, &[4000]),
        (9000, &[4096, 4096]),
        (65535, &[4096; 15]),
    ] {
        let sent = frame(mac(2), mac(1), bytes);
        world.send(0, &sent, cuts, TxFlags::empty());
        world.turn(0).unwrap();
        assert_eq!(world.got(1), [plain(sent)], "{bytes}");
        assert!(world.answers(0).iter().all(|status| *status == RSP_OKAY));
    }
    // Who takes no frames of several pages does not get any.
    world.send(0, &frame(mac(3), mac(1), 4097), &[4000], TxFlags::empty());
    world.turn(0).unwrap();
    assert_eq!((world.got(2), world.missed(2)), (vec![], Missed { too_long: 1, ..Missed::default() }));
}

/// A UDP packet whose checksum is left blank, and the same with it.
fn blank() -> (Vec<u8>, Vec<u8>) {
    let mut blank = frame(mac(2), mac(1), 14);
    blank[12..14].copy_from_slice(&[8, 0]);
    blank.extend([0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    blank.extend([0, 5, 0, 6, 0, 13, 0, 0, b'd', b'a', b't', b'u', b'm']);
    let mut whole = blank.clone();
    netswitch::complete_checksum(&mut whole);
    assert_ne!(blank, whole);
    (blank, whole)
}

#[test]
fn checksums_are_left_to_whom_can_do_without() {
    let (blank, whole) = blank();
    for (features, flags, expected) in [
        (FULL, RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED, &blank),
        (PLAIN, RxFlags::DATA_VALIDATED, &whole),
    ] {
        let mut world = World::new(&[FULL, features]);
        world.put_up(1, 1);
        world.send(0, &blank, &[20], TxFlags::CSUM_BLANK);
        world.turn(0).unwrap();
        assert_eq!(world.got(1), [Ok((expected.clone(), flags))]);
    }
}

#[test]
fn what_was_decided_on_is_what_arrives() {
    // By the hypervisor, and by copies of our own.
    let ways = [(vec![], 3000), (vec![1, 2], 1514), (vec![1, 2], 60), (vec![1], 1514)];
    let ways = ways
        .into_iter()
        .flat_map(|(at_hand, bytes)| [(at_hand.clone(), bytes, false), (at_hand, bytes, true)]);
    for (at_hand, bytes, leads_out) in ways {
        let mut world = World::new(&[PLAIN, PLAIN, PLAIN]);
        if leads_out {
            world.network.attach(Port::trunk()).unwrap();
        }
        world.host.at_hand = at_hand;
        world.put_up(1, 1);
        let sent = frame(mac(2), mac(1), bytes);
        world.send(0, &sent, &[], TxFlags::empty());
        let mut page = vec![0; 40];
        // In another's name, to another, once it was looked at.
        page.extend(frame(mac(3), mac(2), HEAD.min(bytes)));
        world.host.later = Some(((1, world.guests[0].grants), page));
        world.turn(0).unwrap();
        let got = world.got(1);
        let Ok((got, _)) = &got[0] else { panic!("{got:?}") };
        assert_eq!(got[..], sent[..]);
    }
}

/// A card of the machine's: a page for each frame.
#[derive(Default)]
struct Machine {
    /// It has pages of its own.
    pages: bool,
    carried: Vec<Vec<u8>>,
    taken: Vec<Vec<u8>>,
}

impl Beyond for Machine {
    fn take(&mut self, _: PortId, frame: &mut [u8], unfinished: Unfinished) {
        assert_eq!(unfinished, DONE);
        self.taken.push(frame.to_vec());
    }
    fn carry(&mut self, _: PortId, unfinished: Unfinished, frame: &mut dyn Carried) -> bool {
        assert_eq!(unfinished, DONE);
        let (page, mut bytes) = (HostPages::new(1, 0xdddd_dddd), vec![0; frame.bytes()]);
        let carried = self.pages && frame.write(&page);
        if carried {
            page.read_bytes(0, &mut bytes);
            let head = frame.head();
            assert_eq!(head, &bytes[..head.len()]);
            self.carried.push(bytes);
        }
        carried
    }
}

#[test]
fn frames_reach_a_card_of_the_machines_in_one_copy_or_whole() {
    for (at_hand, pages) in [(vec![1], true), (vec![], true), (vec![1], false)] {
        let mut world = World::new(&[PLAIN]);
        let trunk = world.network.attach(Port::trunk()).unwrap();
        let port = world.guests[0].port;
        world.host.at_hand = at_hand.clone();
        let frames = [60, 257, 1514, WHOLE].map(|bytes| frame(mac(9), mac(1), bytes));
        frames.iter().for_each(|frame| world.send(0, frame, &[], TxFlags::empty()));
        // One that is not checked as it says, to somebody who does not take that.
        world.send(0, &frames[1], &[], TxFlags::CSUM_BLANK);
        let mut machine = Machine { pages, ..Machine::default() };
        let turn = world.network.turn(0, port, 0, &mut world.host, &mut machine);
        assert!(!turn.closed);
        assert_eq!(world.answers(0), [RSP_OKAY; 5]);
        let short = pages && !at_hand.is_empty();
        let (carried, taken) = frames.split_at(if short { 4 } else { 0 });
        assert_eq!(machine.carried, carried);
        assert_eq!(machine.taken, [taken, &frames[1..2]].concat());
        assert_eq!(
            world.host.calls,
            usize::from(at_hand.is_empty()),
            "calls only for pages that are not at hand"
        );
        let counters = world.network.switch().counters(trunk).unwrap();
        assert_eq!(counters.received_frames, 5, "each is counted once");
    }
}

#[test]
fn frames_from_a_card_of_the_machines_arrive_in_one_copy_or_whole() {
    for at_hand in [vec![1], vec![], vec![2]] {
        let mut world = World::new(&[PLAIN, FULL]);
        let trunk = world.network.attach(Port::trunk()).unwrap();
        world.host.at_hand = at_hand.clone();
        (0..2).for_each(|guest| world.put_up(guest, 8));
        let sent: Vec<(u16, Vec<u8>)> = [(1, 60), (2, 300), (1, 1514), (1, WHOLE), (2, 257)]
            .map(|(to, bytes)| (to, frame(mac(to), mac(9), bytes)))
            .into();
        let pages: Vec<HostPages> = sent.iter().map(|_| HostPages::new(1, 0)).collect();
        let arrived: Vec<Arrived<'_>> = pages
            .iter()
            .zip(&sent)
            .map(|(page, (_, frame))| {
                page.write_bytes(12, frame);
                Arrived { page, at: 12, bytes: frame.len(), blank: false, validated: true }
            })
            .collect();
        let too_long = Arrived { bytes: WHOLE + 1, ..arrived[0] };
        let frames = arrived.into_iter().chain([too_long]);
        let turn = world.network.arrive(0, trunk, frames, &mut world.host, &mut nobody);
        assert_eq!(turn.notify.len(), 2);
        for guest in 0..2 {
            let own = sent.iter().filter(|(to, _)| usize::from(*to) == guest + 1);
            let expected: Vec<_> =
                own.map(|(_, frame)| Ok((frame.clone(), RxFlags::DATA_VALIDATED))).collect();
            assert_eq!(world.got(guest), expected, "{at_hand:?}");
        }
    }
    // A checksum that is left out is left out for who takes that, and made for who does not.
    for (features, flags) in
        [(FULL, RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED), (PLAIN, RxFlags::DATA_VALIDATED)]
    {
        let mut world = World::new(&[features]);
        let trunk = world.network.attach(Port::trunk()).unwrap();
        world.host.at_hand = vec![1];
        world.put_up(0, 1);
        let (page, sent) = (HostPages::new(1, 0), frame(mac(1), mac(9), 600));
        page.write_bytes(0, &sent);
        let arrived = Arrived { page: &page, at: 0, bytes: 600, blank: true, validated: false };
        world.network.arrive(0, trunk, [arrived], &mut world.host, &mut nobody);
        assert_eq!(world.got(0), [Ok((sent, flags))]);
    }
}

#[test]
fn who_has_no_room_misses_frames_and_nobody_else() {
    let mut world = World::new(&[PLAIN, PLAIN, PLAIN]);
    world.put_up(1, 1);
    world.put_up(2, 3);
    for _ in 0..3 {
        world.send(0, &frame(ALL, mac(1), 60), &[], TxFlags::empty());
    }
    world.turn(0).unwrap();
    assert_eq!((world.got(1).len(), world.got(2).len()), (1, 3));
    assert_eq!((world.missed(1).no_room, world.missed(2).no_room), (2, 0));
    assert_eq!(world.answers(0), [RSP_OKAY; 3]);
    world.put_up(1, 1);
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    world.turn(0).unwrap();
    assert_eq!(world.got(1).len(), 1);
}

#[test]
fn bad_pages_are_their_owners_fault() {
    let mut world = World::new(&[PLAIN, PLAIN, PLAIN]);
    let readonly = world.page(1, &[], false);
    world.guests[1]
        .receive
        .push(NetifRxRequest { id: readonly.get() as u16, pad: 0, gref: readonly })
        .unwrap();
    world.put_up(1, 2);
    world.put_up(2, 3);
    let sent = frame(ALL, mac(1), 3000);
    // The second one's last piece is not granted: its head tells nothing of that.
    for frames in 0..3 {
        world.send(0, &sent, &[2500], TxFlags::empty());
        if frames == 1 {
            let last = world.guests[0].grants;
            world.host.pages.remove(&(1, last));
        }
    }
    world.turn(0).unwrap();
    assert_eq!(world.answers(0), [RSP_OKAY, RSP_OKAY, RSP_ERROR, RSP_ERROR, RSP_OKAY, RSP_OKAY]);
    assert_eq!(world.got(1), [Err(RSP_ERROR), Err(RSP_ERROR), plain(sent.clone())]);
    assert_eq!(world.got(2), [plain(sent.clone()), Err(RSP_ERROR), plain(sent)]);
    let faults = [0, 1, 2].map(|guest| world.network.take_fault(world.guests[guest].port));
    assert_eq!(faults, [Some(Fault::Grant), Some(Fault::Grant), None]);
    assert_eq!(world.network.take_fault(world.guests[0].port), None, "once");
}

#[test]
fn packets_that_are_none_are_refused() {
    let mut world = World::new(&[PLAIN, PLAIN]);
    world.put_up(1, 8);
    let gref = world.page(0, &frame(mac(2), mac(1), 100), false);
    let request =
        |offset, size, flags: TxFlags| NetifTxRequest { gref, offset, flags: flags.bits(), id: 7, size };
    let more = TxFlags::MORE_DATA;
    let extra = |more| {
        let extra = NetifExtraInfo::new(Extra::Gso { size: 1448, kind: GSO_TYPE_TCPV4 }, more);
        let mut slot = NetifTxRequest::default();
        slot.as_mut_bytes()[..8].copy_from_slice(extra.as_bytes());
        slot
    };
    let many = |count: usize| {
        let mut all = vec![request(0, 100, more); count - 1];
        all[0].size = 2000;
        all.push(request(0, 1, TxFlags::empty()));
        all
    };
    let mut told = Vec::new();
    for (fault, packet) in [
        (Fault::Shape, vec![request(0, 13, TxFlags::empty())]),
        (Fault::Shape, vec![request(0, 0, TxFlags::empty())]),
        (Fault::Shape, vec![request(4000, 97, TxFlags::empty())]),
        (Fault::Shape, vec![request(65535, 65535, TxFlags::empty())]),
        (Fault::Shape, vec![request(0, 100, more), request(0, 100, TxFlags::empty())]),
        (Fault::Shape, vec![request(0, 100, more), request(0, 0, TxFlags::empty())]),
        (Fault::Shape, vec![request(0, 100, more), request(4090, 50, TxFlags::empty())]),
        (Fault::Shape, vec![request(0, 5000, more), request(0, 50, TxFlags::empty())]),
        (Fault::Shape, many(NR_SLOTS_MIN + 1)),
        (Fault::Segments, vec![request(0, 100, TxFlags::EXTRA_INFO), extra(false)]),
        (
            Fault::Extra,
            vec![
                request(0, 100, TxFlags::EXTRA_INFO | more),
                extra(true),
                extra(false),
                request(0, 50, TxFlags::empty()),
            ],
        ),
    ] {
        for slot in &packet {
            world.guests[0].transmit.push(*slot).unwrap();
        }
        let _ = world.guests[0].transmit.publish();
        world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
        assert!(world.turn(0).is_ok());
        let answers = world.answers(0);
        assert_eq!(answers.len(), packet.len() + 1, "{packet:?}");
        assert_eq!((answers[0], answers.last()), (RSP_ERROR, Some(&RSP_OKAY)), "{packet:?}");
        assert!(answers[1..packet.len()].iter().all(|status| [RSP_ERROR, RSP_NULL].contains(status)));
        assert_eq!(world.got(1), [plain(frame(mac(2), mac(1), 60))], "the next one is not concerned");
        world.put_up(1, 1);
        // Only the first of all is told.
        told.push((world.network.take_fault(world.guests[0].port), fault));
    }
    assert!(told[0].0 == Some(told[0].1) && told[1..].iter().all(|(told, _)| told.is_none()));
}

#[test]
fn a_broken_ring_ends_the_connection() {
    // A packet that goes on behind what was shown.
    let mut world = World::new(&[PLAIN, PLAIN]);
    world.put_up(1, 1);
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    let gref = world.page(0, &[], false);
    let flags = TxFlags::MORE_DATA.bits();
    world.guests[0].transmit.push(NetifTxRequest { gref, offset: 0, flags, id: 1, size: 100 }).unwrap();
    let _ = world.guests[0].transmit.publish();
    assert_eq!(world.turn(0), Err(Closed));
    assert_eq!(world.got(1).len(), 1, "what came before has gone");
    // A packet that never ends.
    let mut world = World::new(&[PLAIN]);
    for _ in 0..200 {
        world.guests[0].transmit.push(NetifTxRequest { gref, offset: 0, flags, id: 1, size: 100 }).unwrap();
    }
    let _ = world.guests[0].transmit.publish();
    assert_eq!(world.turn(0), Err(Closed));
    // An index that claims more than there is, in either ring.
    for receiving in [false, true] {
        let mut world = World::new(&[PLAIN, PLAIN]);
        let rings = [HostPages::new(1, 0), HostPages::new(1, 0)];
        rings[usize::from(receiving)].word(0).store(257, Ordering::Relaxed);
        let [transmit, receive] = rings;
        world.reconnect(1, [(transmit, receive)], PLAIN);
        world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
        assert!(world.turn(0).is_ok(), "not the sender's fault");
        assert_eq!(world.turn(1), Err(Closed));
        // It waited for a page if no index was wrong where it goes; it does not wait for who has gone.
        let _ = world.network.disconnect(world.guests[1].port);
        assert_eq!(world.answers(0), [RSP_OKAY]);
    }
}

#[test]
fn a_turn_has_an_end() {
    let mut world = World::new(&[PLAIN, PLAIN]);
    world.put_up(1, 200);
    for _ in 0..FRAMES + 1 {
        world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    }
    assert!(world.turn(0).unwrap().more);
    assert_eq!(world.got(1).len(), FRAMES);
    assert!(!world.turn(0).unwrap().more);
    assert_eq!(world.got(1).len(), 1);
    assert!(!world.network.prepare_to_wait(world.guests[0].port, 0));
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    assert!(world.network.prepare_to_wait(world.guests[0].port, 0));
}

#[test]
fn ports_of_dom0_get_whole_frames_and_send_some() {
    let mut world = World::new(&[FULL, PLAIN]);
    let trunk = world.network.attach(Port::trunk()).unwrap();
    let other = world.network.attach(Port::trunk()).unwrap();
    world.put_up(0, 4);
    world.put_up(1, 4);
    let (blank, whole) = blank();
    let outward = |frame: &[u8]| [&mac(9).0, &frame[6..]].concat();
    for blank_checksums in [true, false] {
        for port in [trunk, other] {
            world.network.set_local(port, Features { blank_checksums, ..PLAIN });
        }
        let sent = [1514, WHOLE + 1, 60000].map(|bytes| frame(mac(9), mac(1), bytes));
        for sent in &sent {
            let cuts = vec![4000; sent.len() / 4001];
            world.send(0, sent, &cuts, TxFlags::empty());
        }
        world.send(0, &outward(&blank), &[], TxFlags::CSUM_BLANK);
        world.turn(0).unwrap();
        let last = if blank_checksums {
            (outward(&blank), Unfinished { checksum: Checksum::Blank, ..DONE })
        } else {
            (outward(&whole), DONE)
        };
        let expected: Vec<_> = sent
            .map(|frame| (frame, DONE))
            .into_iter()
            .chain([last])
            .flat_map(|(frame, unfinished)| [trunk, other].map(|port| (port, frame.clone(), unfinished)))
            .collect();
        let local = core::mem::take(&mut world.local);
        let shape = |all: &[(PortId, Vec<u8>, Unfinished)]| -> Vec<_> {
            all.iter().map(|(port, frame, unfinished)| (*port, frame.len(), *unfinished)).collect()
        };
        assert_eq!(shape(&local), shape(&expected), "in order, and as they are taken");
        assert!(local == expected);
        assert!(world.answers(0).iter().all(|status| *status == RSP_OKAY));
    }
    // For one who wants a checksum and one who does not care, it is filled in.
    for port in [trunk, other] {
        world.network.set_local(port, FULL);
    }
    let to_all = |frame: &[u8]| [&ALL.0, &frame[6..]].concat();
    world.send(0, &to_all(&blank), &[], TxFlags::CSUM_BLANK);
    world.turn(0).unwrap();
    assert_eq!(world.got(1), [Ok((to_all(&whole), RxFlags::DATA_VALIDATED))]);
    assert_eq!(world.local[0], (trunk, to_all(&whole), DONE));
    // From dom0.
    let mut local = Vec::new();
    let sent = frame(ALL, mac(9), 1514);
    let turn = world.network.send(
        0,
        trunk,
        &[&sent, &sent],
        &mut world.host,
        &mut |port: PortId, frame: &mut [u8], _: Unfinished| local.push((port, frame.to_vec())),
    );
    assert_eq!(world.got(0), [plain(sent.clone()), plain(sent.clone())]);
    assert_eq!(world.got(1), [plain(sent.clone()), plain(sent.clone())]);
    assert_eq!(local, [(other, sent.clone()), (other, sent.clone())]);
    // The other one has not asked since its last frame.
    assert_eq!(turn.notify, [(world.guests[0].port, 0)]);
    // A page that cannot be written to is its guest's fault.
    let readonly = world.page(1, &[], false);
    let request = NetifRxRequest { id: readonly.get() as u16, pad: 0, gref: readonly };
    while world.guests[1].receive.free() > 250 {
        world.guests[1].receive.push(request).unwrap();
    }
    let _ = world.guests[1].receive.publish();
    let sent = vec![sent; 4];
    world.network.send(0, trunk, &sent, &mut world.host, &mut nobody);
    assert_eq!(world.network.take_fault(world.guests[1].port), Some(Fault::Grant));
}

/// A packet of TCP with so many bytes of payload, its checksum blank.
fn tcp(to: EthernetAddress, from: EthernetAddress, port: u16, payload: usize) -> Vec<u8> {
    let mut frame = frame(to, from, 54 + payload);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 7, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[16..18].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    frame[34..54].copy_from_slice(&[0, 0, 0, 80, 0, 0, 0, 9, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    frame[34..36].copy_from_slice(&port.to_be_bytes());
    frame
}

impl World {
    /// Sends a frame to be cut into segments of `size`.
    fn send_large(&mut self, guest: usize, frame: &[u8], size: u16, kind: u8) {
        let mut slots = Vec::new();
        for (index, piece) in frame.chunks(PAGE_SIZE).enumerate() {
            let gref = self.page(guest, piece, false);
            let first = index == 0;
            let mut flags = if first { TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK } else { TxFlags::empty() };
            if (index + 1) * PAGE_SIZE < frame.len() {
                flags |= TxFlags::MORE_DATA;
            }
            let bytes = if first { frame.len() } else { piece.len() } as u16;
            slots.push(NetifTxRequest { gref, offset: 0, flags: flags.bits(), id: 1, size: bytes });
            if first {
                let extra = NetifExtraInfo::new(Extra::Gso { size, kind }, false);
                let mut slot = NetifTxRequest::default();
                slot.as_mut_bytes()[..8].copy_from_slice(extra.as_bytes());
                slots.push(slot);
            }
        }
        slots.into_iter().for_each(|slot| self.guests[guest].transmit.push(slot).unwrap());
        let _ = self.guests[guest].transmit.publish();
    }
}

#[test]
fn large_frames_go_whole_to_who_takes_them_and_cut_to_others() {
    let mut world = World::new(&[LARGE, LARGE, FULL, PLAIN]);
    let trunk = world.network.attach(Port::trunk()).unwrap();
    (1..4).for_each(|guest| world.put_up(guest, 120));
    for payload in [1461, 2000, 5000, 14600, 65481] {
        for guest in [2, 3, 4, 9] {
            let sent = tcp(mac(guest), mac(1), 1000, payload);
            let small = tcp(mac(guest), mac(1), 1001, 10);
            world.send(0, &small, &[], TxFlags::CSUM_BLANK);
            world.send_large(0, &sent, 1460, GSO_TYPE_TCPV4);
            world.send(0, &small, &[], TxFlags::CSUM_BLANK);
            world.turn(0).unwrap();
            assert!(world.answers(0).iter().all(|status| [RSP_OKAY, RSP_NULL].contains(status)));
            let flags = RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED;
            if guest == 2 {
                let expected = [(small.clone(), None), (sent, Some(1460)), (small, None)];
                let expected = expected.map(|(frame, segment)| Ok((frame, flags, segment)));
                assert!(world.got_large(1) == expected, "{payload}");
                let free = world.guests[1].receive.free() as usize;
                world.put_up(1, free - 136);
                continue;
            }
            let got: Vec<Vec<u8>> = if guest == 9 {
                let local = core::mem::take(&mut world.local);
                assert!(local.iter().all(|(port, _, unfinished)| (*port, *unfinished) == (trunk, DONE)));
                local.into_iter().map(|(_, frame, _)| frame).collect()
            } else {
                let got = world.got(usize::from(guest) - 1);
                world.put_up(usize::from(guest) - 1, got.len());
                got.into_iter().map(|got| got.unwrap().0).collect()
            };
            assert_eq!(got.len(), 2 + payload.div_ceil(1460), "{payload} to {guest}");
            let (first, last) = (got.first().unwrap(), got.last().unwrap());
            assert!(first[54..] == small[54..] && last[54..] == small[54..], "they are around it");
            let stream: Vec<u8> =
                got[1..got.len() - 1].iter().flat_map(|segment| &segment[54..]).copied().collect();
            assert!(stream == sent[54..], "{payload} to {guest}");
            for segment in &got[1..got.len() - 1] {
                let mut right = segment.clone();
                netswitch::complete_checksum(&mut right);
                assert!(&right == segment, "its checksum is there");
            }
        }
    }
    // Whoever sends it, dom0 takes it whole at a port that does.
    world.network.set_local(trunk, LARGE);
    let sent = tcp(mac(9), mac(1), 1000, 9000);
    world.send_large(0, &sent, 1000, GSO_TYPE_TCPV4);
    world.turn(0).unwrap();
    assert!(world.local == [(trunk, sent, Unfinished { checksum: Checksum::Blank, segment: Some(1000) })]);
}

#[test]
fn segments_that_cannot_be_are_refused() {
    let mut world = World::new(&[LARGE, FULL, LARGE]);
    world.put_up(1, 200);
    world.put_up(2, 200);
    let right = tcp(mac(2), mac(1), 1000, 5000);
    let changed = |at: usize, value: u8| {
        let mut frame = right.clone();
        frame[at] = value;
        frame
    };
    for (frame, size, kind, fault) in [
        (right.clone(), 0, GSO_TYPE_TCPV4, Fault::Extra),
        (right.clone(), 1460, 2, Fault::Extra),
        (right.clone(), 1460, 77, Fault::Extra),
        (right.clone(), 10, GSO_TYPE_TCPV4, Fault::Segments),
        (changed(23, 17), 1460, GSO_TYPE_TCPV4, Fault::Segments),
        (changed(12, 0x86), 1460, GSO_TYPE_TCPV4, Fault::Segments),
        (changed(17, 9), 1460, GSO_TYPE_TCPV4, Fault::Segments),
        (changed(46, 0xf0), 1460, GSO_TYPE_TCPV4, Fault::Segments),
    ] {
        let accepted = fault == Fault::Segments && frame[46] == 0xf0;
        for guest in [2, 3] {
            let mut frame = frame.clone();
            frame[5] = guest;
            world.send_large(0, &frame, size, kind);
        }
        world.turn(0).unwrap();
        let answers = world.answers(0);
        if accepted {
            // Options that fill the header: it is a segment all the same.
            assert!(answers.iter().all(|status| *status >= 0), "{fault:?}");
            assert!(!world.got(1).is_empty() && !world.got_large(2).is_empty());
            continue;
        }
        assert!(answers.iter().all(|status| [RSP_ERROR, RSP_NULL].contains(status)), "{answers:?}");
        assert!(world.got(1).is_empty() && world.got_large(2).is_empty(), "nobody gets it");
    }
    // Larger than the frame: it is a usual packet, and nobody is told of segments.
    world.put_up(1, 20);
    world.send_large(0, &right, 60000, GSO_TYPE_TCPV4);
    world.turn(0).unwrap();
    assert_eq!(world.got(1), [Ok((right, RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED))]);
}

#[test]
fn flows_are_spread_over_queues_and_keep_their_order() {
    let mut world = World::new(&[FULL, FULL]);
    let port = world.guests[1].port;
    let rings: Vec<_> = (0..3).map(|_| [HostPages::new(1, 0), HostPages::new(1, 0)]).collect();
    let mut fronts: Vec<Front<_, NetifRxRequest, NetifRxResponse>> =
        rings.iter().map(|[_, receive]| Front::new(receive.clone())).collect();
    let mut senders: Vec<Front<_, NetifTxRequest, NetifTxResponse>> =
        rings.iter().map(|[transmit, _]| Front::new(transmit.clone())).collect();
    let queues = rings.into_iter().map(|[transmit, receive]| (transmit, receive));
    world.reconnect(1, queues, FULL);
    for front in &mut fronts {
        for _ in 0..100 {
            let gref = world.page(1, &[], true);
            front.push(NetifRxRequest { id: gref.get() as u16, pad: 0, gref }).unwrap();
        }
        let _ = front.publish();
    }
    for number in 0..60u16 {
        let mut frame = tcp(mac(2), mac(1), 2000 + number % 12, 100);
        frame[54] = number as u8;
        world.send(0, &frame, &[], TxFlags::empty());
    }
    let turn = world.turn(0).unwrap();
    let mut seen = HashMap::<[u8; 2], (usize, u8)>::new();
    for (queue, front) in fronts.iter_mut().enumerate() {
        let mut count = 0;
        while let Some(response) = front.pop().unwrap() {
            count += 1;
            let page = &world.host.pages[&(2, response.id.into())].0;
            let (flow, number) = ([page[34], page[35]], page[54]);
            let (home, last) = *seen.entry(flow).or_insert((queue, number));
            assert!(home == queue && last <= number, "a flow has one queue, and its order");
            seen.insert(flow, (queue, number));
        }
        assert!(count > 0, "queue {queue} has some");
        assert!(turn.notify.contains(&(port, queue)));
    }
    assert_eq!(seen.len(), 12);
    // Each queue sends for itself.
    world.put_up(0, 3);
    for (queue, sender) in senders.iter_mut().enumerate() {
        let gref = world.page(1, &frame(mac(1), mac(2), 60 + queue), false);
        sender.push(NetifTxRequest { gref, offset: 0, flags: 0, id: 5, size: 60 + queue as u16 }).unwrap();
        let _ = sender.publish();
        assert!(world.network.prepare_to_wait(port, queue));
        let turn = world.network.turn(0, port, queue, &mut world.host, &mut nobody);
        assert!(!turn.closed && turn.notify.contains(&(port, queue)));
        assert_eq!(world.got(0), [plain(frame(mac(1), mac(2), 60 + queue))]);
    }
    assert_eq!(world.network.turn(0, port, 3, &mut world.host, &mut nobody), Turn::default());
}

#[test]
fn a_hostile_queue_ends_its_own_connection_only() {
    for (queue, receiving) in [(0, false), (1, false), (2, true)] {
        let mut world = World::new(&[FULL, FULL, FULL]);
        let port = world.guests[1].port;
        let rings: Vec<_> = (0..3).map(|_| (HostPages::new(1, 0), HostPages::new(1, 0))).collect();
        let broken = if receiving { &rings[queue].1 } else { &rings[queue].0 };
        broken.word(0).store(257, Ordering::Relaxed);
        world.reconnect(1, rings, FULL);
        world.put_up(2, 100);
        // To each of its queues, and to somebody else.
        for number in 0..40u16 {
            world.send(0, &tcp(mac(2), mac(1), 2000 + number, 100), &[], TxFlags::empty());
            world.send(0, &tcp(mac(3), mac(1), 2000 + number, 100), &[], TxFlags::empty());
        }
        let mut told = Vec::new();
        while {
            let turn = world.turn(0).expect("it did nothing wrong");
            told.extend(turn.broken);
            turn.more
        } {}
        assert_eq!(told, if receiving { vec![port] } else { vec![] });
        assert_eq!(world.got(2).len(), 40, "the other one gets all");
        let turn = world.network.turn(0, port, queue, &mut world.host, &mut nobody);
        assert!(turn.closed);
        // All that waited for its other queues is answered.
        let _ = world.network.disconnect(port);
        assert_eq!(world.answers(0), [RSP_OKAY; 80]);
        world.send(0, &frame(mac(3), mac(1), 60), &[], TxFlags::empty());
        world.turn(0).expect("it did nothing wrong");
        assert_eq!(world.got(2).len(), 1);
    }
}

#[test]
fn who_breaks_a_ring_that_others_send_to_is_told_of_at_once() {
    let mut world = World::new(&[PLAIN, PLAIN, PLAIN]);
    let (port, rings) = (world.guests[1].port, [HostPages::new(1, 0), HostPages::new(1, 0)]);
    rings[1].word(0).store(257, Ordering::Relaxed);
    let [transmit, receive] = rings;
    world.reconnect(1, [(transmit, receive)], PLAIN);
    world.put_up(2, 4);
    for _ in 0..2 {
        world.send(0, &frame(ALL, mac(1), 60), &[], TxFlags::empty());
    }
    let turn = world.turn(0).unwrap();
    assert_eq!(turn.broken, [port], "once");
    assert_eq!(world.got(2).len(), 2, "nobody else is concerned");
}

#[test]
fn who_leaves_is_no_longer_reached() {
    let mut world = World::new(&[PLAIN, PLAIN]);
    world.put_up(1, 2);
    let port = world.guests[1].port;
    assert_eq!(world.network.disconnect(port), Turn::default());
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    world.turn(0).unwrap();
    // Its port is there, and leads to dom0 now, which knows it not.
    assert_eq!((world.local.len(), world.answers(0)), (1, vec![RSP_OKAY]));
    assert_eq!(world.network.detach(port), Turn::default());
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    world.turn(0).unwrap();
    assert_eq!((world.local.len(), world.answers(0)), (1, vec![RSP_OKAY]));
    assert_eq!(world.turn(1), Ok(Turn::default()));
}

proptest! {
    /// Whatever a guest writes into its rings, nobody panics, every request that was taken is answered, and a guest that behaves
    /// gets whole frames only.
    #[test]
    fn a_hostile_front_end_hurts_itself_only(
        slots in prop::collection::vec((0..6u32, 0..5000u16, 0..16u16, 0..3000u16), 0..120),
        raw in prop::collection::vec(any::<[u8; 12]>(), 0..20),
        index in prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)],
    ) {
        let mut world = World::new(&[PLAIN, FULL]);
        world.put_up(1, 100);
        for _ in 0..4 {
            world.page(0, &frame(mac(2), mac(1), 3000), false);
        }
        let mut pushed = 0;
        for (gref, offset, flags, size) in slots {
            let request = NetifTxRequest { gref: GrantRef::new(gref), offset, flags, id: 1, size };
            pushed += usize::from(world.guests[0].transmit.push(request).is_ok());
        }
        for bytes in raw {
            let request = NetifTxRequest::read_from_bytes(&bytes).unwrap();
            pushed += usize::from(world.guests[0].transmit.push(request).is_ok());
        }
        let _ = world.guests[0].transmit.publish();
        if let Some(index) = index {
            let [transmit, receive] = [HostPages::new(1, 0), HostPages::new(1, 0)];
            transmit.word(0).store(index, Ordering::Relaxed);
            world.reconnect(0, [(transmit, receive)], PLAIN);
        }
        let mut closed = false;
        for _ in 0..20 {
            match world.turn(0) {
                Ok(turn) if !turn.more => break,
                Ok(_) => {}
                Err(Closed) => {
                    closed = true;
                    break;
                }
            }
        }
        if !closed && index.is_none() {
            prop_assert_eq!(world.answers(0).len(), pushed);
        }
        for got in world.got(1).into_iter().flatten() {
            prop_assert!(got.0.starts_with(&mac(2).0) || got.0.first().is_some_and(|first| first & 1 == 1));
            prop_assert_eq!(&got.0[6..12], &mac(1).0);
        }
    }
}

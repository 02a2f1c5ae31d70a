use super::{FRAMES, Features, LOCAL, Missed, Network, STAGING_BYTES, Turn};
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
use netswitch::{Checksum, EthernetAddress, Port, PortId};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

/// Guests' pages, by guest and grant; some for reading only.
struct Host {
    pages: HashMap<(u16, u32), (Vec<u8>, bool)>,
    staging: Vec<u8>,
    calls: usize,
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
    local: Vec<(PortId, Vec<u8>, Checksum)>,
}

fn mac(last: u16) -> EthernetAddress {
    EthernetAddress([2, 0, 0, 0, 0, last as u8])
}

const ALL: EthernetAddress = EthernetAddress::BROADCAST;

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
        let host = Host { pages: HashMap::new(), staging: vec![0; STAGING_BYTES], calls: 0, later: None };
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
            world.network.connect(port, DomId::new(number), transmit, receive, *features);
            world.guests.push(guest);
        }
        world
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
        let local = &mut self.local;
        self.network.turn(0, self.guests[guest].port, &mut self.host, &mut |port, frame, checksum| {
            local.push((port, frame.to_vec(), checksum));
        })
    }

    /// Frames that a guest got, with the flags of the first page.
    fn got(&mut self, guest: usize) -> Vec<Result<(Vec<u8>, RxFlags), i16>> {
        let (mut frames, mut frame) = (Vec::new(), None::<(Vec<u8>, RxFlags)>);
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
            let (bytes, _) = frame.get_or_insert((Vec::new(), flags - RxFlags::MORE_DATA));
            bytes.extend(&page[response.offset.into()..][..response.status as usize]);
            assert!(
                page[response.status as usize..].iter().all(|byte| *byte == 0xcc),
                "and no byte behind it"
            );
            if !flags.contains(RxFlags::MORE_DATA) {
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

const PLAIN: Features = Features { scatter_gather: false, blank_checksums: false };
const FULL: Features = Features { scatter_gather: true, blank_checksums: true };

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
    for (features, flags, expected) in
        [(FULL, RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED, &blank), (PLAIN, RxFlags::empty(), &whole)]
    {
        let mut world = World::new(&[FULL, features]);
        world.put_up(1, 1);
        world.send(0, &blank, &[20], TxFlags::CSUM_BLANK);
        world.turn(0).unwrap();
        assert_eq!(world.got(1), [Ok((expected.clone(), flags))]);
    }
}

#[test]
fn what_was_decided_on_is_what_arrives() {
    let mut world = World::new(&[PLAIN, PLAIN, PLAIN]);
    world.put_up(1, 1);
    let sent = frame(mac(2), mac(1), 1000);
    world.send(0, &sent, &[], TxFlags::empty());
    let mut page = vec![0; 40];
    // In another's name, to another, once it was looked at.
    page.extend(frame(mac(3), mac(2), 100));
    world.host.later = Some(((1, world.guests[0].grants), page));
    world.turn(0).unwrap();
    let got = world.got(1);
    let Ok((got, _)) = &got[0] else { panic!("{got:?}") };
    assert_eq!(got[..netswitch::HEAD], sent[..netswitch::HEAD]);
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
    let sent = frame(ALL, mac(1), 1000);
    // The second one's last piece is not granted.
    for frames in 0..3 {
        world.send(0, &sent, &[500], TxFlags::empty());
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
        (Fault::Extra, vec![request(0, 100, TxFlags::EXTRA_INFO), extra(false)]),
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
        let port = world.guests[1].port;
        world.network.connect(port, DomId::new(2), transmit, receive, PLAIN);
        world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
        assert!(world.turn(0).is_ok(), "not the sender's fault");
        assert_eq!(world.answers(0), [RSP_OKAY]);
        assert_eq!(world.turn(1), Err(Closed));
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
    assert!(!world.network.prepare_to_wait(world.guests[0].port));
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    assert!(world.network.prepare_to_wait(world.guests[0].port));
}

#[test]
fn ports_of_dom0_get_whole_frames_and_send_some() {
    let mut world = World::new(&[FULL, PLAIN]);
    let trunk = world.network.attach(Port::trunk()).unwrap();
    let other = world.network.attach(Port::trunk()).unwrap();
    world.put_up(0, 4);
    world.put_up(1, 4);
    let (blank, whole) = blank();
    world.send(0, &frame(mac(9), mac(1), 1514), &[700], TxFlags::empty());
    world.send(0, &frame(mac(9), mac(1), LOCAL + 1), &[700], TxFlags::empty());
    let mut outward = blank.clone();
    outward[..6].copy_from_slice(&mac(9).0);
    world.send(0, &outward, &[], TxFlags::CSUM_BLANK);
    world.turn(0).unwrap();
    let expected: Vec<_> = [(frame(mac(9), mac(1), 1514), Checksum::Complete), (outward, Checksum::Blank)]
        .into_iter()
        .flat_map(|(frame, checksum)| [trunk, other].map(|port| (port, frame.clone(), checksum)))
        .collect();
    assert_eq!(world.local, expected);
    assert_eq!(world.network.missed(trunk).too_long, 1);
    // For one who wants a checksum and one who does not care, it is filled in.
    let mut all = blank;
    all[..6].copy_from_slice(&ALL.0);
    let mut all_whole = whole;
    all_whole[..6].copy_from_slice(&ALL.0);
    world.local.clear();
    world.send(0, &all, &[], TxFlags::CSUM_BLANK);
    world.turn(0).unwrap();
    assert_eq!(world.got(1), [plain(all_whole.clone())]);
    assert_eq!(world.local[0], (trunk, all_whole, Checksum::Complete));
    // From dom0.
    let (mut notify, mut local) = (Vec::new(), Vec::new());
    let sent = frame(ALL, mac(9), 1514);
    world.network.send(0, trunk, &sent, &mut world.host, &mut notify, &mut |port, frame, _| {
        local.push((port, frame.to_vec()))
    });
    assert_eq!(world.got(0), [Ok((sent.clone(), RxFlags::DATA_VALIDATED))]);
    assert_eq!(world.got(1), [Ok((sent.clone(), RxFlags::DATA_VALIDATED))]);
    assert_eq!(local, [(other, sent.clone())]);
    // The other one has not asked since its last frame.
    assert_eq!(notify, [world.guests[0].port]);
    // A page that cannot be written to is its guest's fault.
    let readonly = world.page(1, &[], false);
    let request = NetifRxRequest { id: readonly.get() as u16, pad: 0, gref: readonly };
    while world.guests[1].receive.free() > 252 {
        world.guests[1].receive.push(request).unwrap();
    }
    let _ = world.guests[1].receive.publish();
    for _ in 0..4 {
        world.network.send(0, trunk, &sent, &mut world.host, &mut notify, &mut |_, _, _| {});
    }
    assert_eq!(world.network.take_fault(world.guests[1].port), Some(Fault::Grant));
}

#[test]
fn who_leaves_is_no_longer_reached() {
    let mut world = World::new(&[PLAIN, PLAIN]);
    world.put_up(1, 2);
    let port = world.guests[1].port;
    world.network.disconnect(port);
    world.send(0, &frame(mac(2), mac(1), 60), &[], TxFlags::empty());
    world.turn(0).unwrap();
    // Its port is there, and leads to dom0 now, which knows it not.
    assert_eq!((world.local.len(), world.answers(0)), (1, vec![RSP_OKAY]));
    world.network.detach(port);
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
            world.network.connect(world.guests[0].port, DomId::new(1), transmit, receive, PLAIN);
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

//! The front end of cards, as guests have it, against the back end, as dom0 has it, over memory of this process; and against back ends
//! that break the rules.

mod memory;

use guest_sdk::net::{Broken, Checksum, Offload, Receive, Received, Transmit};
use guest_sdk::ring::{Back, SharedPage};
use hypercall_abi::io::netif::{
    NR_SLOTS_MIN, NetifExtraInfo, NetifRxRequest, NetifRxResponse, NetifTxRequest, NetifTxResponse,
    RSP_ERROR, RSP_OKAY, RxFlags, TxFlags,
};
use hypercall_abi::io::ring::RingHeader;
use hypercall_abi::{DomId, PAGE_SIZE};
use memory::{Granted, Host};
use netback::Fault;
use netback::network::{Features, Network, PATIENCE_NS, Unfinished, WAITING_SLOTS};
use netswitch::{EthernetAddress, Port, PortId};
use proptest::prelude::*;
use std::sync::atomic::Ordering;

struct Guest {
    domain: u16,
    port: PortId,
    transmit: Transmit<Granted, Granted>,
    receive: Receive<Granted, Granted>,
    receive_pages: Granted,
    scratch: Vec<u8>,
}

impl Guest {
    /// Takes a frame; `shown` where it is, or else copied.
    fn take(&mut self, shown: bool) -> Option<Vec<u8>> {
        if shown {
            let work = |frame: &[u8], checksum| {
                assert_eq!(checksum, Checksum::Unknown);
                frame.to_vec()
            };
            return self.receive.show(&mut self.scratch, work).unwrap().ok();
        }
        let mut frame = vec![0xee; 0x10000];
        let received = self.receive.copy(&mut frame).unwrap()?;
        assert!(frame[received.bytes..].iter().all(|byte| *byte == 0xee));
        frame.truncate(received.bytes);
        Some(frame)
    }
}

impl Guest {
    /// Takes a frame, whatever it is; false when there is none.
    fn take_any(&mut self) -> bool {
        self.receive.copy(&mut []).unwrap().is_some()
    }
}

struct World {
    network: Network<Granted>,
    host: Host,
    guests: Vec<Guest>,
    now: u64,
    /// When the last turn wants another one.
    until: Option<u64>,
}

const FEATURES: Features = Features { scatter_gather: true, blank_checksums: false, segments: false };

impl World {
    /// Guests with so many pages to send from, and to receive into.
    fn new(pages: &[(u32, u32)]) -> Self {
        Self::with(pages, FEATURES)
    }

    /// The same, which take what is said.
    fn with(pages: &[(u32, u32)], features: Features) -> Self {
        let mut world =
            Self { network: Network::new(), host: Host::new(), guests: Vec::new(), now: 0, until: None };
        for (domain, &(transmit_pages, receive_pages)) in (1..).zip(pages) {
            let port = world.network.attach(Port::guest(mac(domain))).unwrap();
            let rings = [Granted::new(8, 1), Granted::new(9, 1)];
            let transmit_pages = Granted::new(100, transmit_pages);
            let receive_pages = Granted::new(1000, receive_pages);
            world.host.grant(domain, &transmit_pages, false);
            world.host.grant(domain, &receive_pages, true);
            let guest = Guest {
                domain,
                port,
                transmit: Transmit::new(rings[0].clone(), transmit_pages),
                receive: Receive::new(rings[1].clone(), receive_pages.clone(), features.segments).unwrap(),
                receive_pages,
                scratch: Vec::new(),
            };
            let [transmit, receive] = rings;
            world.network.connect(port, DomId::new(domain), [(transmit, receive)], features);
            world.guests.push(guest);
        }
        world
    }

    /// Turns of a guest's card until it has nothing more; which guests are to be notified.
    fn turn(&mut self, guest: usize) -> Vec<usize> {
        let port = self.guests[guest].port;
        let mut notify = Vec::new();
        loop {
            let turn = self.network.turn(self.now, port, 0, &mut self.host, &mut nobody);
            assert!(!turn.closed && turn.broken.is_empty());
            self.until = turn.until_ns;
            notify.extend(turn.notify.into_iter().map(|(port, _)| port));
            if !turn.more && !self.network.prepare_to_wait(port, 0) {
                assert_eq!(self.network.take_fault(port), None, "the front end obeys the rules");
                return (0..self.guests.len()).filter(|g| notify.contains(&self.guests[*g].port)).collect();
            }
        }
    }
}

fn mac(last: u16) -> EthernetAddress {
    EthernetAddress([2, 0, 0, 0, 0, last as u8])
}

/// Behind dom0's own ports.
fn nobody(_: PortId, _: &mut [u8], _: Unfinished) {}

/// A frame whose bytes tell where they belong.
fn frame(to: u16, from: u16, bytes: usize, number: u32) -> Vec<u8> {
    let mut frame = Vec::from(mac(to).0);
    frame.extend(mac(from).0);
    frame.extend([0x88, 0xb5]);
    frame.extend(number.to_le_bytes());
    frame.extend((18..bytes.max(18)).map(|at| (at ^ at >> 8 ^ number as usize) as u8));
    frame.truncate(bytes);
    frame
}

#[test]
fn frames_of_all_sizes_arrive() {
    for (transmit_pages, receive_pages) in [(18, 18), (64, 128), (256, 256), (300, 300)] {
        let mut world = World::new(&[(transmit_pages, receive_pages); 2]);
        let edges = [14, 15, 60, 1514, 4095, 4096, 4097, 8191, 8192, 8193, 65534, 65535];
        let mut sent = 0;
        for (number, bytes) in (0..).zip(edges.into_iter().chain((14..0xffff).step_by(991))) {
            let frame = frame(2, 1, bytes, number);
            world.guests[1].receive_pages.held.set(number % 3 == 0);
            assert_eq!(world.guests[0].transmit.push(&frame), Ok(true), "{bytes}");
            let _ = world.guests[0].transmit.publish();
            world.turn(0);
            assert_eq!(world.guests[1].take(number % 2 == 0), Some(frame), "{bytes}");
            assert_eq!(world.guests[1].take(true), None);
            let _ = world.guests[1].receive.publish();
            sent += 1;
        }
        assert_eq!(world.guests[0].transmit.counts(), (sent, 0));
        assert_eq!(world.guests[1].receive.counts(), (sent, 0, 0));
        assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true), "all pages are back");
    }
}

#[test]
fn frames_that_cannot_be_are_not_sent() {
    let mut world = World::new(&[(18, 18)]);
    let transmit = &mut world.guests[0].transmit;
    assert_eq!(transmit.push(&[]), Ok(false));
    assert_eq!(transmit.push(&[0; 0x10000]), Ok(false));
    assert!(!transmit.publish(), "nothing is there to be seen");
    assert_eq!(transmit.longest(), 0xffff);
    assert_eq!(Transmit::new(Granted::new(0, 1), Granted::new(1, 3)).longest(), 3 * PAGE_SIZE);
}

#[test]
fn what_is_written_in_place_is_sent() {
    let mut world = World::new(&[(18, 18), (18, 18)]);
    for (number, bytes) in (0..).zip([14, 1514, 4096, 4097, 30000]) {
        let frame = frame(2, 1, bytes, number);
        let mut scratch = vec![0xaa; 9];
        let (result, sent) = world.guests[0].transmit.fill(bytes, &mut scratch, |to| {
            to.copy_from_slice(&frame);
            (to.len(), Some(Offload::NOTHING))
        });
        assert_eq!((result, sent), (bytes, Ok(true)));
        let _ = world.guests[0].transmit.publish();
        world.turn(0);
        assert_eq!(world.guests[1].take(true), Some(frame));
        let _ = world.guests[1].receive.publish();
    }
}

/// A packet of TCP without its checksum.
fn tcp(to: u16, from: u16, payload: usize, number: u32) -> Vec<u8> {
    let mut frame = frame(to, from, 54 + payload, number);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 7, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[16..18].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    frame[34..54].copy_from_slice(&[0, 7, 0, 80, 0, 0, 0, 9, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    frame
}

#[test]
fn large_frames_go_whole_or_in_segments_and_no_slot_is_lost() {
    for segments in [true, false] {
        let features = Features { blank_checksums: true, segments, ..FEATURES };
        let mut world = World::with(&[(256, 256); 2], features);
        let offload = Offload { checksum_blank: true, segment: Some(1460) };
        let (mut sent, mut got, mut stream) = (0, 0, Vec::new());
        let mut expected = Vec::new();
        for round in 0..60 {
            // Small ones take two slots and one page each: slots run out first.
            let payload = [2000, 20000, 65000][round % 3];
            let most = if round % 3 == 0 { 40 } else { 3 };
            for _ in 0..most {
                let frame = tcp(2, 1, payload, sent);
                if !world.guests[0].transmit.push_with(&frame, offload).unwrap() {
                    break;
                }
                expected.extend_from_slice(&frame[54..]);
                sent += 1;
            }
            let _ = world.guests[0].transmit.publish();
            world.turn(0);
            let mut frame = vec![0; 0x10000];
            while let Some(received) = world.guests[1].receive.copy(&mut frame).unwrap() {
                assert_eq!(received.segment, segments.then_some(1460));
                assert_eq!(received.checksum, if segments { Checksum::Blank } else { Checksum::Validated });
                assert!(segments || received.bytes <= 1514);
                stream.extend_from_slice(&frame[54..received.bytes]);
                got += 1;
            }
            let _ = world.guests[1].receive.publish();
            assert!(stream == expected, "round {round}");
            stream.clear();
            expected.clear();
        }
        assert_eq!(world.guests[0].transmit.counts(), (sent.into(), 0));
        assert_eq!(world.guests[1].receive.counts(), (got, 0, 0));
        assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true), "all pages and slots are back");
        assert!(got >= u64::from(sent), "{got} of {sent}");
    }
}

#[test]
fn slots_run_out_before_pages_do() {
    let mut world = World::with(&[(256, 18), (18, 256)], Features { blank_checksums: true, ..FEATURES });
    let offload = Offload { checksum_blank: true, segment: Some(1000) };
    for _ in 0..3 {
        let mut pushed = 0;
        while world.guests[0].transmit.push_with(&tcp(2, 1, 2000, 1), offload).unwrap() {
            pushed += 1;
        }
        assert_eq!(pushed, 128, "two of 256 slots each");
        let transmit = &mut world.guests[0].transmit;
        let _ = transmit.publish();
        assert!(!transmit.prepare_to_wait(2000), "no answer yet");
        assert!(world.turn(0).contains(&0), "it waits for room");
        assert!(world.guests[0].transmit.prepare_to_wait(2000));
        while world.guests[1].take_any() {}
        let _ = world.guests[1].receive.publish();
    }
}

#[test]
fn a_full_ring_takes_no_more_and_loses_nothing() {
    for pages in [18, 64, 256] {
        let mut world = World::new(&[(pages, 18), (18, 256)]);
        let (mut sent, mut got) = (0, 0);
        for round in 0..40 {
            let mut pushed = 0;
            while world.guests[0].transmit.push(&frame(2, 1, 200, sent)).unwrap() {
                sent += 1;
                pushed += 1;
            }
            // A slot is kept for what a large frame says beside its pages.
            assert_eq!(pushed, pages.min(255), "in round {round}");
            let transmit = &mut world.guests[0].transmit;
            assert!(transmit.publish(), "the back end sleeps");
            assert!(!transmit.prepare_to_wait(200), "no answer yet");
            assert_eq!(world.turn(0), [0, 1], "one waits for room, the other for frames");
            assert!(world.guests[0].transmit.prepare_to_wait(200), "there is room");
            while let Some(bytes) = world.guests[1].take(got % 2 == 0) {
                assert_eq!(bytes, frame(2, 1, 200, got));
                got += 1;
            }
            assert_eq!(got, sent);
            let _ = world.guests[1].receive.publish();
            assert!(!world.guests[1].receive.prepare_to_wait());
        }
    }
}

#[test]
fn a_back_end_at_work_is_not_notified_and_notifies_once() {
    let mut world = World::new(&[(64, 18), (18, 128)]);
    let front = |world: &mut World, frames| {
        for number in 0..frames {
            assert_eq!(world.guests[0].transmit.push(&frame(2, 1, 60, number)), Ok(true));
        }
        world.guests[0].transmit.publish()
    };
    assert!(front(&mut world, 8), "it sleeps");
    assert!(!front(&mut world, 8), "it has been told");
    // Nobody has said that it waits, but rings begin with asking for the first of everything.
    assert_eq!(world.turn(0), [0, 1]);
    assert!(front(&mut world, 8));
    assert_eq!(world.turn(0), [], "neither of the guests waits");
    while world.guests[1].take(false).is_some() {}
    assert!(!world.guests[1].receive.prepare_to_wait());
    assert!(front(&mut world, 20));
    assert_eq!(world.turn(0), [1], "the sender does not want to know");
    assert!(world.guests[1].receive.prepare_to_wait(), "frames are there: no sleep");
}

#[test]
fn pages_that_cannot_be_used_are_counted_and_used_again() {
    let mut world = World::new(&[(18, 18), (18, 18)]);
    let send = |world: &mut World, bytes, number| {
        let frame = frame(2, 1, bytes, number);
        assert_eq!(world.guests[0].transmit.push(&frame), Ok(true));
        let _ = world.guests[0].transmit.publish();
        let port = world.guests[0].port;
        let _ = world.network.turn(0, port, 0, &mut world.host, &mut nobody);
        let _ = world.network.prepare_to_wait(port, 0);
        frame
    };
    // Pages to receive into are lost: each fails, is put up again, and has room for a frame when it is back.
    let lost: Vec<_> =
        world.host.granted.extract_if(|(domain, gref), _| *domain == 2 && *gref >= 1000).collect();
    assert_eq!(lost.len(), 18);
    for number in 0..50 {
        send(&mut world, 5000, number);
        assert_eq!(world.guests[1].take(number % 2 == 0), None);
        let _ = world.guests[1].receive.publish();
    }
    assert_eq!(world.guests[1].receive.counts(), (0, 100, 0));
    world.host.granted.extend(lost);
    let sent = send(&mut world, 0xffff, 1);
    assert_eq!(world.guests[1].take(true), Some(sent));
    let _ = world.guests[1].receive.publish();
    // The same with pages to send from.
    let lost: Vec<_> =
        world.host.granted.extract_if(|(domain, gref), _| *domain == 1 && *gref < 1000).collect();
    for number in 0..50 {
        send(&mut world, 5000, number);
        assert_eq!(world.guests[1].take(true), None);
    }
    world.host.granted.extend(lost);
    assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true), "all pages are back");
    assert_eq!(world.guests[0].transmit.counts(), (101, 100));
    let sent = send(&mut world, 0xffff, 2);
    assert_eq!(world.guests[1].take(true), Some(sent));
}

/// A card whose back end is this test.
struct Hostile {
    transmit: Transmit<Granted, Granted>,
    receive: Receive<Granted, Granted>,
    transmit_ring: Granted,
    receive_ring: Granted,
    transmit_back: Back<Granted, NetifTxRequest, NetifTxResponse>,
    receive_back: Back<Granted, NetifRxRequest, NetifRxResponse>,
    pages: u32,
}

impl Hostile {
    fn new(pages: u32) -> Self {
        let (transmit_ring, receive_ring) = (Granted::new(8, 1), Granted::new(9, 1));
        Self {
            transmit: Transmit::new(transmit_ring.clone(), Granted::new(100, pages)),
            receive: Receive::new(receive_ring.clone(), Granted::new(1000, pages), false).unwrap(),
            transmit_back: Back::new(transmit_ring.clone()),
            receive_back: Back::new(receive_ring.clone()),
            transmit_ring,
            receive_ring,
            pages,
        }
    }

    fn put_up(&mut self) -> NetifRxRequest {
        let _ = self.receive.publish();
        self.receive_back.pop().unwrap().expect("a page")
    }

    /// Fills the next page with so many bytes.
    fn fill(&mut self, offset: u16, status: i16, flags: RxFlags) {
        let id = self.put_up().id;
        self.receive_back.push(NetifRxResponse { id, offset, flags: flags.bits(), status });
    }

    fn extra(&mut self, more: bool) {
        let _ = self.put_up();
        let extra = NetifExtraInfo { kind: 1, flags: u8::from(more), u: [0xffff; 3] };
        self.receive_back.push(zerocopy::transmute!(extra));
    }

    fn receive(&mut self) -> Result<Option<Received>, Broken> {
        let _ = self.receive_back.publish();
        self.receive.copy(&mut [0; 0x10000])
    }
}

#[test]
fn wild_indexes_break_the_ring() {
    for wild in [65, 66, 257, 1 << 31, u32::MAX] {
        let mut card = Hostile::new(64);
        card.receive_ring.word(RingHeader::RSP_PROD).store(wild, Ordering::Relaxed);
        assert_eq!(card.receive.look(), Err(Broken), "{wild}");
        assert!(card.receive.prepare_to_wait(), "not slept on");
        assert_eq!(card.transmit.push(&[0; 60]), Ok(true));
        let _ = card.transmit.publish();
        card.transmit_ring.word(RingHeader::RSP_PROD).store(wild, Ordering::Relaxed);
        assert!(card.transmit.prepare_to_wait(0xffff) || card.transmit.room(60) == Ok(true));
        while let Ok(true) = card.transmit.push(&[0; 60]) {}
        assert_eq!(card.transmit.push(&[0; 60]), Err(Broken), "{wild}");
    }
}

#[test]
fn answers_to_what_was_not_asked_break_the_ring() {
    // A page that there is not, one that was not put up, one twice.
    for wrong in [[64, 64], [0xffff, 0xffff], [7, 7]] {
        let mut card = Hostile::new(64);
        for id in wrong {
            let _ = card.put_up();
            card.receive_back.push(NetifRxResponse { id, offset: 0, flags: 4, status: 60 });
        }
        assert_eq!(card.receive(), Err(Broken), "{wrong:?}");
        let mut card = Hostile::new(64);
        for _ in 0..64 {
            assert_eq!(card.transmit.push(&[0; 60]), Ok(true));
        }
        let _ = card.transmit.publish();
        for id in wrong {
            let _ = card.transmit_back.pop().unwrap().unwrap();
            card.transmit_back.push(NetifTxResponse { id, status: RSP_OKAY });
        }
        let _ = card.transmit_back.publish();
        assert_eq!(card.transmit.room(60), Err(Broken), "{wrong:?}");
    }
}

#[test]
fn what_is_no_frame_is_dropped_and_its_pages_are_put_up_again() {
    let more = RxFlags::MORE_DATA;
    let none = RxFlags::empty();
    type Case = (&'static str, fn(&mut Hostile), u64, u64);
    let cases: [Case; 9] = [
        ("beyond its page", |card| card.fill(4000, 97, RxFlags::empty()), 0, 1),
        ("an offset beyond its page", |card| card.fill(5000, 1, RxFlags::empty()), 0, 1),
        ("no bytes", |card| card.fill(0, 0, RxFlags::empty()), 0, 1),
        ("an error", |card| card.fill(0, RSP_ERROR, RxFlags::empty()), 1, 0),
        ("any error", |card| card.fill(0, i16::MIN, RxFlags::empty()), 1, 0),
        (
            "an error in the middle",
            |card| {
                card.fill(0, 4096, RxFlags::MORE_DATA);
                card.fill(0, RSP_ERROR, RxFlags::MORE_DATA);
                card.fill(0, 4096, RxFlags::empty());
            },
            1,
            0,
        ),
        (
            "too many pieces",
            |card| {
                (0..40).for_each(|_| card.fill(0, 1, RxFlags::MORE_DATA));
                card.fill(0, 1, RxFlags::empty());
            },
            0,
            1,
        ),
        (
            "too many bytes",
            |card| {
                (0..NR_SLOTS_MIN - 1).for_each(|_| card.fill(0, 4096, RxFlags::MORE_DATA));
                card.fill(0, 4096, RxFlags::empty());
            },
            0,
            1,
        ),
        (
            "more said about it than was asked for",
            |card| {
                card.fill(0, 60, RxFlags::EXTRA_INFO | RxFlags::MORE_DATA);
                card.extra(true);
                card.extra(false);
                card.fill(0, 60, RxFlags::empty());
            },
            0,
            1,
        ),
    ];
    for (what, bring, errors, malformed) in cases {
        let mut card = Hostile::new(64);
        for round in 1..=20 {
            bring(&mut card);
            assert_eq!(card.receive(), Ok(None), "{what}");
            assert_eq!(card.receive.counts(), (round - 1, errors * round, malformed * round), "{what}");
            // A frame in two parts that come one after the other.
            card.fill(7, 4000, more);
            assert_eq!(card.receive(), Ok(None), "{what}");
            card.fill(4095, 1, none);
            let expected = Received { bytes: 4001, checksum: Checksum::Unknown, segment: None };
            assert_eq!(card.receive(), Ok(Some(expected)), "{what}");
        }
    }
}

#[test]
fn what_is_known_of_checksums_is_told() {
    let mut card = Hostile::new(18);
    for (flags, checksum) in [
        (RxFlags::empty(), Checksum::Unknown),
        (RxFlags::DATA_VALIDATED, Checksum::Validated),
        (RxFlags::DATA_VALIDATED | RxFlags::CSUM_BLANK, Checksum::Blank),
        (RxFlags::CSUM_BLANK, Checksum::Blank),
    ] {
        card.fill(0, 60, flags | RxFlags::MORE_DATA);
        card.fill(0, 60, RxFlags::empty());
        assert_eq!(card.receive(), Ok(Some(Received { bytes: 120, checksum, segment: None })));
    }
}

#[test]
fn requests_of_a_frame_say_what_they_have_to() {
    let mut card = Hostile::new(18);
    assert_eq!(card.transmit.push(&[1; 9000]), Ok(true));
    let _ = card.transmit.publish();
    let requests: Vec<_> = std::iter::from_fn(|| card.transmit_back.pop().unwrap()).collect();
    let sizes: Vec<_> = requests.iter().map(|request| (request.size, request.flags)).collect();
    let more = TxFlags::MORE_DATA.bits();
    assert_eq!(sizes, [(9000, more), (4096, more), (808, 0)], "the first has the length of the frame");
    let grants: Vec<_> = requests.iter().map(|request| request.gref.get() - 100).collect();
    assert_eq!(grants, requests.iter().map(|request| request.id.into()).collect::<Vec<u32>>());
}

#[test]
fn what_is_sent_faster_than_it_is_taken_waits_in_its_senders_ring() {
    for (pages, segments) in [(18, false), (18, true), (64, false), (256, false)] {
        let features = Features { blank_checksums: true, segments, ..FEATURES };
        let mut world = World::with(&[(256, 18), (18, pages)], features);
        let offload = Offload { checksum_blank: true, segment: Some(1460) };
        let mut expected = Vec::new();
        // Large ones, and small ones that must stay behind them: 120 slots, fewer than those that may wait.
        for number in 0..6 {
            let large = tcp(2, 1, 65000, number);
            assert_eq!(world.guests[0].transmit.push_with(&large, offload), Ok(true));
            let small = tcp(2, 1, 10 + number as usize, number);
            assert_eq!(world.guests[0].transmit.push(&small), Ok(true));
            expected.extend_from_slice(&large[54..]);
            expected.extend_from_slice(&small[54..]);
        }
        let _ = world.guests[0].transmit.publish();
        world.turn(0);
        assert_eq!(world.until, Some(PATIENCE_NS), "some of it waits");
        assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true));
        let (mut stream, mut rounds) = (Vec::new(), 0);
        let mut frame = vec![0; 0x10000];
        while stream.len() < expected.len() {
            rounds += 1;
            while let Some(received) = world.guests[1].receive.copy(&mut frame).unwrap() {
                stream.extend_from_slice(&frame[54..received.bytes]);
            }
            if stream.len() < expected.len() {
                assert!(!world.guests[1].receive.prepare_to_wait());
                assert!(world.guests[1].receive.publish(), "the back end waits for pages");
                assert!(world.turn(1).contains(&1), "frames have come");
            }
        }
        assert!(stream == expected, "nothing is lost, and nothing overtakes");
        assert!(rounds > 1, "it did not fit");
        assert_eq!(world.network.missed(world.guests[1].port).no_room, 0);
        // All answers have come, once each.
        world.turn(0);
        assert_eq!(world.until, None);
        assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true));
        assert_eq!(world.guests[0].transmit.counts(), (12, 0));
        let all = core::iter::repeat_with(|| world.guests[0].transmit.push(&[1; 60]).unwrap());
        assert_eq!(all.take_while(|there| *there).count(), 255, "all pages are back");
    }
}

#[test]
fn a_slow_receiver_keeps_nobody_from_reaching_others() {
    let mut world = World::new(&[(256, 18), (18, 18), (18, 256)]);
    let send = |world: &mut World, to, count| {
        for number in 0..count {
            assert_eq!(world.guests[0].transmit.push(&frame(to, 1, 200, number)), Ok(true));
        }
        let _ = world.guests[0].transmit.publish();
        world.turn(0);
    };
    // One takes nothing: 18 frames fill its pages, and as many wait as may.
    send(&mut world, 2, 200);
    let missed = |world: &World| world.network.missed(world.guests[1].port).no_room;
    assert_eq!(missed(&world), 200 - 18 - WAITING_SLOTS as u64);
    let free = (255 - WAITING_SLOTS) as u32;
    world.now = PATIENCE_NS / 2;
    // The other one gets what it is sent, in all the slots that are left.
    for _ in 0..3 {
        send(&mut world, 3, free);
        assert_eq!((0..).take_while(|_| world.guests[2].take(false).is_some()).count(), free as usize);
        let _ = world.guests[2].receive.publish();
    }
    assert_eq!(world.guests[0].transmit.push(&[1; 14]), Ok(true));
    assert_eq!(world.until, Some(PATIENCE_NS), "when to give up");
    // The time is over: everything that waits is lost, and answered.
    world.now = PATIENCE_NS;
    world.turn(0);
    assert_eq!((missed(&world), world.until), (200 - 18, None));
    assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true));
    // Nothing waits for it any more...
    send(&mut world, 2, 50);
    assert_eq!((missed(&world), world.until), (250 - 18, None));
    // ...until it has put up pages again and used them up.
    while world.guests[1].take_any() {}
    let _ = world.guests[1].receive.publish();
    send(&mut world, 2, 20);
    assert_eq!((missed(&world), world.until), (250 - 18, Some(2 * PATIENCE_NS)));
    while world.guests[1].take_any() {}
    assert!(world.guests[1].receive.publish());
    world.turn(1);
    assert_eq!((0..).take_while(|_| world.guests[1].take_any()).count(), 2);
}

#[test]
fn what_waits_ends_with_either_end() {
    for sender_leaves in [true, false] {
        let mut world = World::new(&[(64, 18), (18, 18)]);
        for number in 0..40 {
            assert_eq!(world.guests[0].transmit.push(&frame(2, 1, 5000, number)), Ok(true));
            if !world.guests[0].transmit.room(5000).unwrap() {
                break;
            }
        }
        let _ = world.guests[0].transmit.publish();
        world.turn(0);
        assert!(world.until.is_some());
        assert!(!world.guests[0].transmit.prepare_to_wait(0xffff));
        let leaves = world.guests[usize::from(!sender_leaves)].port;
        let turn = world.network.disconnect(leaves);
        let first = (0..).take_while(|_| world.guests[1].take_any()).count();
        let _ = world.guests[1].receive.publish();
        if sender_leaves {
            assert_eq!(turn.notify, []);
            // It comes back with other rings: what waited by the old ones is not answered in them.
            let rings = (Granted::new(8, 1), Granted::new(9, 1));
            let mut transmit = Transmit::new(rings.0.clone(), Granted::new(100, 64));
            world.network.connect(leaves, DomId::new(1), [rings], FEATURES);
            world.turn(1);
            assert!(!world.guests[1].take_any(), "nothing of what waited comes after its {first}");
            assert_eq!(transmit.room(0xffff), Ok(true));
        } else {
            assert_eq!(turn.notify, [(world.guests[0].port, 0)], "it waited for room");
            assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true));
        }
        world.now = 2 * PATIENCE_NS;
        world.turn(0);
        assert_eq!(world.until, None);
    }
}

#[test]
fn what_is_taken_back_while_it_waits_is_its_senders_fault() {
    let features = Features { blank_checksums: true, ..FEATURES };
    let mut world = World::with(&[(256, 18), (18, 18)], features);
    let offload = Offload { checksum_blank: true, segment: Some(1460) };
    for number in 0..3 {
        assert_eq!(world.guests[0].transmit.push_with(&tcp(2, 1, 65000, number), offload), Ok(true));
    }
    let _ = world.guests[0].transmit.publish();
    world.turn(0);
    world.host.granted.retain(|(domain, gref), _| *domain != 1 || *gref >= 1000);
    while world.guests[1].take_any() {}
    let _ = world.guests[1].receive.publish();
    let port = world.guests[1].port;
    let turn = world.network.turn(0, port, 0, &mut world.host, &mut nobody);
    assert!(!turn.closed && turn.notify.iter().all(|(notified, _)| *notified != port), "nothing came");
    assert_eq!(world.network.take_fault(world.guests[0].port), Some(Fault::Grant));
    assert_eq!(world.network.take_fault(port), None);
    assert_eq!(world.guests[0].transmit.room(0xffff), Ok(true));
    let all = core::iter::repeat_with(|| world.guests[0].transmit.push(&[1; 60]).unwrap());
    assert_eq!(all.take_while(|there| *there).count(), 255, "all pages are back");
}

#[derive(Clone, Debug)]
enum Step {
    Send { guest: usize, bytes: usize },
    Show { guest: usize },
    Turn { guest: usize },
    Take { guest: usize, frames: usize, shown: bool },
    Hold { guest: usize, held: bool },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let guest = 0..3usize;
    let bytes = prop_oneof![4 => 18..1515usize, 1 => 18..9000usize, 1 => 18..0x10000usize];
    let step = prop_oneof![
        4 => (guest.clone(), bytes).prop_map(|(guest, bytes)| Step::Send { guest, bytes }),
        2 => guest.clone().prop_map(|guest| Step::Show { guest }),
        2 => guest.clone().prop_map(|guest| Step::Turn { guest }),
        2 => (guest.clone(), 0..40usize, any::<bool>())
            .prop_map(|(guest, frames, shown)| Step::Take { guest, frames, shown }),
        1 => (guest, any::<bool>()).prop_map(|(guest, held)| Step::Hold { guest, held }),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever guests do, and whenever: each frame that was sent arrives whole and in order, or the back end says that it was missed.
    #[test]
    fn frames_arrive_in_order_or_are_missed(steps in steps()) {
        let mut world = World::new(&[(18, 18), (40, 64), (256, 200)]);
        let mut sent: Vec<Vec<(usize, u32)>> = vec![Vec::new(); 3];
        let mut got: Vec<Vec<u32>> = vec![Vec::new(); 3];
        let take = |world: &mut World, got: &mut Vec<Vec<u32>>, to: usize, shown| {
            let Some(bytes) = world.guests[to].take(shown) else { return false };
            let number = u32::from_le_bytes(*bytes[14..].first_chunk().unwrap());
            let from = u16::from(bytes[11]);
            assert_eq!(bytes, frame(to as u16 + 1, from, bytes.len(), number));
            got[to].push(number);
            true
        };
        let mut number = 0;
        for step in steps {
            match step {
                Step::Send { guest, bytes } => {
                    let to = (guest + 1) % 3;
                    number += 1;
                    let bytes = frame(to as u16 + 1, guest as u16 + 1, bytes, number);
                    if world.guests[guest].transmit.push(&bytes).unwrap() {
                        sent[to].push((guest, number));
                    }
                }
                Step::Show { guest } => {
                    let _ = world.guests[guest].transmit.publish();
                    let _ = world.guests[guest].receive.publish();
                }
                Step::Turn { guest } => drop(world.turn(guest)),
                Step::Take { guest, frames, shown } => {
                    for _ in 0..frames {
                        if !take(&mut world, &mut got, guest, shown) {
                            break;
                        }
                    }
                }
                Step::Hold { guest, held } => world.guests[guest].receive_pages.held.set(held),
            }
        }
        // Until nothing comes although all pages are put up: what waits has come, too.
        let mut came = true;
        while core::mem::take(&mut came) {
            for guest in &mut world.guests {
                let _ = guest.transmit.publish();
                let _ = guest.receive.publish();
            }
            for guest in 0..3 {
                world.turn(guest);
            }
            for guest in 0..3 {
                while take(&mut world, &mut got, guest, true) {
                    came = true;
                }
            }
        }
        for guest in 0..3 {
            let missed = world.network.missed(world.guests[guest].port);
            prop_assert_eq!(got[guest].len() as u64 + missed.no_room, sent[guest].len() as u64);
            prop_assert_eq!((missed.too_long, missed.failed), (0, 0));
            prop_assert!(got[guest].is_sorted());
            prop_assert!(got[guest].iter().all(|number| sent[guest].iter().any(|(_, sent)| sent == number)));
            let longest = world.guests[guest].transmit.longest();
            prop_assert_eq!(world.guests[guest].transmit.room(longest), Ok(true));
            prop_assert_eq!(world.guests[guest].transmit.counts().1, 0);
            prop_assert_eq!(world.guests[guest].domain as usize, guest + 1);
        }
    }

    /// Whatever a back end answers, in its order or not: the ring breaks, or every page is put up, or holds a part of a frame.
    #[test]
    fn no_answer_loses_a_page(
        answers in prop::collection::vec(
            (prop_oneof![20 => Just(None), 1 => (0..30u16).prop_map(Some)], 0..5000u16, 0..32u16,
             prop_oneof![8 => 0..4097i16, 1 => any::<i16>()], any::<bool>()), 0..300),
    ) {
        let mut card = Hostile::new(24);
        let (mut taken, mut in_order) = (0, true);
        for (id, offset, flags, status, look) in answers {
            let offset = if status > 0 && flags & 1 == 0 { offset.min(4096 - status.min(4096) as u16) } else { offset };
            let _ = card.receive.publish();
            let Some(request) = card.receive_back.pop().unwrap() else { break };
            let id = id.unwrap_or(request.id);
            in_order &= id == request.id;
            card.receive_back.push(NetifRxResponse { id, offset, flags, status });
            if !look {
                continue;
            }
            match card.receive() {
                Ok(received) => taken += u64::from(received.is_some()),
                Err(Broken) => return Ok(()),
            }
        }
        loop {
            match card.receive() {
                Ok(Some(_)) => taken += 1,
                Ok(None) => break,
                Err(Broken) => return Ok(()),
            }
        }
        prop_assert_eq!(card.receive.counts().0, taken);
        // What the back end has now, and what the frame has that has not ended.
        let _ = card.receive.publish();
        let (mut there, mut count) = (std::collections::HashSet::new(), 0);
        while let Some(request) = card.receive_back.pop().unwrap() {
            count += 1;
            // A page that was answered out of order is put up twice: the back end has not looked at the first time yet.
            prop_assert!((there.insert(request.id) || !in_order) && request.id < 24);
            prop_assert_eq!(request.gref.get(), 1000 + u32::from(request.id));
        }
        prop_assert!(count <= card.pages as usize && count + NR_SLOTS_MIN >= card.pages as usize);
    }
}

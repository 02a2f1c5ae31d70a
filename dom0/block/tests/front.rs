//! A front end against the back end, on the host: honest ones get their data, hostile ones an error or a closed connection.

mod harness;

use blkback::disk::{Action, DiskError};
use blkback::memory::{BadDisk, MemoryDisk};
use blkback::queue::Closed;
use blkback::request::{Fault, MAX_INDIRECT_SEGMENTS};
use harness::{DEVICE, Host, Late, SECTOR, allocate, indirect, pattern, rw, segment};
use hypercall_abi::io::blkif::{BlkifOp, BlkifRequest, BlkifSegment, RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY};
use proptest::prelude::*;

fn ram(sectors: u64) -> MemoryDisk<[u8; 0]> {
    MemoryDisk::ram(sectors * SECTOR as u64, allocate).expect("memory")
}

const READ: u8 = BlkifOp::Read.number() as u8;
const WRITE: u8 = BlkifOp::Write.number() as u8;
const BARRIER: u8 = BlkifOp::WriteBarrier.number() as u8;
const FLUSH: u8 = BlkifOp::FlushDiskcache.number() as u8;

#[test]
fn what_is_written_is_read_again() {
    for persistent in [false, true] {
        let mut host = Host::new(1, persistent, ram(64));
        let (from, to) = (host.grant(true), host.grant(true));
        host.fill(from, 7);
        assert_eq!(host.ask(&rw(WRITE, 1, 5, &[segment(from, 0, 7)])), (1, RSP_OKAY));
        assert_eq!(host.ask(&rw(READ, 2, 5, &[segment(to, 0, 7)])), (2, RSP_OKAY));
        assert_eq!(host.bytes(to), pattern(7));
        // Parts of pages, in another order.
        assert_eq!(host.ask(&rw(READ, 3, 5, &[segment(to, 4, 7), segment(to, 0, 3)])), (3, RSP_OKAY));
        assert_eq!(host.bytes(to)[..4 * SECTOR], pattern(7)[4 * SECTOR..]);
        assert_eq!(host.mapped(), if persistent { 2 } else { 0 });
        let hypercalls = host.hypercalls();
        assert_eq!(host.ask(&rw(READ, 4, 5, &[segment(to, 0, 7)])), (4, RSP_OKAY));
        assert_eq!(
            host.hypercalls() - hypercalls,
            if persistent { 0 } else { 2 },
            "one to map, one to unmap"
        );
        host.close();
    }
}

#[test]
fn indirect_requests_carry_many_segments() {
    for persistent in [false, true] {
        let mut host = Host::new(2, persistent, ram(1024));
        let list = host.grant(true);
        let pages: Vec<u32> = (0..MAX_INDIRECT_SEGMENTS).map(|_| host.grant(true)).collect();
        let segments: Vec<BlkifSegment> = pages.iter().map(|&page| segment(page, 0, 7)).collect();
        for (number, &page) in pages.iter().enumerate() {
            host.fill(page, number as u8);
        }
        host.put_segments(list, &segments);
        assert_eq!(host.ask(&indirect(WRITE, 1, 3, list, segments.len() as u16)), (1, RSP_OKAY));
        pages.iter().for_each(|&page| host.fill(page, 99));
        assert_eq!(host.ask(&indirect(READ, 2, 3, list, segments.len() as u16)), (2, RSP_OKAY));
        for (number, &page) in pages.iter().enumerate() {
            assert_eq!(host.bytes(page), pattern(number as u8));
        }
        let (hypercalls, mapped) = (host.hypercalls(), host.mapped());
        assert_eq!(mapped, if persistent { pages.len() + 1 } else { 0 });
        assert_eq!(host.ask(&indirect(READ, 3, 3, list, segments.len() as u16)), (3, RSP_OKAY));
        // Non-persistent: the list, then all pages, and all of them away again.
        assert_eq!(host.hypercalls() - hypercalls, if persistent { 0 } else { 3 });
        host.close();
    }
}

#[test]
fn a_batch_costs_one_notification_and_two_hypercalls() {
    let mut host = Host::new(4, false, ram(1024));
    let pages: Vec<u32> = (0..20).map(|_| host.grant(true)).collect();
    let before = host.hypercalls();
    for (id, &page) in (0..).zip(&pages) {
        host.push(&rw(READ, id, id * 8, &[segment(page, 0, 7)]));
    }
    let turn = host.turn().expect("an honest front");
    assert_eq!((turn.notify, turn.more, turn.fault), (1, false, None));
    assert_eq!(host.answers().len(), 20);
    assert_eq!(host.hypercalls() - before, 2);
    host.close();
}

#[test]
fn bad_requests_are_answered_and_told_once() {
    let mut host = Host::new(1, true, ram(64));
    let (page, readonly) = (host.grant(true), host.grant(false));
    let good = [segment(page, 0, 7)];
    let list = host.grant(true);
    host.put_segments(list, &[segment(page, 5, 4)]);
    let with = |change: fn(&mut BlkifRequest)| {
        let mut request = rw(READ, 9, 0, &[segment(page, 0, 7)]);
        change(&mut request);
        request
    };
    let cases = [
        ("a page that was never granted", rw(READ, 9, 0, &[segment(4711, 0, 7)]), RSP_ERROR),
        ("one of them", rw(READ, 9, 0, &[segment(page, 0, 7), segment(4711, 0, 7)]), RSP_ERROR),
        ("reading into what may not be written", rw(READ, 9, 0, &[segment(readonly, 0, 7)]), RSP_ERROR),
        ("one sector too far", rw(READ, 9, 57, &good), RSP_ERROR),
        ("far beyond the end", rw(WRITE, 9, 1 << 40, &good), RSP_ERROR),
        ("a sum that overflows", rw(WRITE, 9, u64::MAX - 3, &good), RSP_ERROR),
        ("a segment that ends before it begins", rw(READ, 9, 0, &[segment(page, 4, 3)]), RSP_ERROR),
        ("a segment beyond its page", rw(READ, 9, 0, &[segment(page, 0, 8)]), RSP_ERROR),
        ("no segments", rw(READ, 9, 0, &[]), RSP_ERROR),
        ("too many", with(|request| request.nr_segments = 12), RSP_ERROR),
        ("another device", with(|request| request.handle = 3), RSP_ERROR),
        ("an operation that is none", with(|request| request.operation = 77), RSP_EOPNOTSUPP),
        ("the reserved one", with(|request| request.operation = 4), RSP_EOPNOTSUPP),
        ("indirect segments in a page that is not granted", indirect(READ, 9, 0, 4711, 3), RSP_ERROR),
        ("too many indirect ones", indirect(READ, 9, 0, list, 65), RSP_ERROR),
        ("bad indirect ones", indirect(READ, 9, 0, list, 1), RSP_ERROR),
        ("an indirect flush", indirect(FLUSH, 9, 0, list, 1), RSP_EOPNOTSUPP),
    ];
    let mut faults = 0;
    for (about, request, status) in cases {
        host.push(&request);
        let turn = host.turn().expect("the ring is good");
        faults += usize::from(turn.fault.is_some());
        assert_eq!(host.answers(), [(9, status)], "{about}");
        // And nobody is the worse for it.
        host.fill(page, 3);
        assert_eq!(host.ask(&rw(WRITE, 1, 8, &good)), (1, RSP_OKAY), "{about}");
    }
    assert_eq!(faults, 1, "told once");
    host.close();
}

#[test]
fn only_readable_disks_are_not_written() {
    let base: Vec<u8> = (0..64 * SECTOR).map(|at| (at / SECTOR) as u8).collect();
    let mut host = Host::new(1, false, MemoryDisk::image(base.clone()).expect("whole sectors"));
    let page = host.grant(true);
    assert_eq!(host.ask(&rw(READ, 1, 8, &[segment(page, 0, 7)])), (1, RSP_OKAY));
    assert_eq!(host.bytes(page), base[8 * SECTOR..16 * SECTOR]);
    host.push(&rw(WRITE, 2, 8, &[segment(page, 0, 7)]));
    assert_eq!(host.turn().unwrap().fault, Some(Fault::ReadOnly));
    assert_eq!(host.answers(), [(2, RSP_ERROR)]);
    assert_eq!(host.ask(&harness::discard(3, 0, 8)), (3, RSP_EOPNOTSUPP));
    assert_eq!(host.ask(&rw(FLUSH, 4, 0, &[])), (4, RSP_OKAY));
    host.close();
}

#[test]
fn overlays_share_a_base_and_keep_their_own() {
    let base: &'static [u8] = Vec::leak((0..60 * SECTOR).map(|at| (at / SECTOR) as u8 + 1).collect());
    let overlay = || MemoryDisk::overlay(base, 100 * SECTOR as u64, allocate).expect("whole sectors");
    let (mut one, mut other) = (Host::new(1, false, overlay()), Host::new(1, false, overlay()));
    let page = one.grant(true);
    assert_eq!(other.grant(true), page);
    one.fill(page, 200);
    // Not whole chunks: what is around them comes from the base.
    assert_eq!(one.ask(&rw(WRITE, 1, 55, &[segment(page, 0, 6)])), (1, RSP_OKAY));
    assert_eq!(one.ask(&rw(READ, 2, 54, &[segment(page, 0, 7)])), (2, RSP_OKAY));
    assert_eq!(one.bytes(page)[..SECTOR], [55; SECTOR]);
    assert_eq!(one.bytes(page)[SECTOR..], pattern(200)[..7 * SECTOR]);
    assert_eq!(other.ask(&rw(READ, 3, 56, &[segment(page, 0, 7)])), (3, RSP_OKAY));
    assert_eq!(other.bytes(page)[3 * SECTOR..4 * SECTOR], [60; SECTOR]);
    assert_eq!(other.bytes(page)[4 * SECTOR..], [0; 4 * SECTOR], "behind the base");
    // Forgotten whole, it is the base again.
    assert_eq!(one.ask(&harness::discard(4, 48, 16)), (4, RSP_OKAY));
    assert_eq!(one.ask(&rw(READ, 5, 52, &[segment(page, 0, 7)])), (5, RSP_OKAY));
    assert_eq!(one.bytes(page)[4 * SECTOR..5 * SECTOR], [57; SECTOR]);
    one.close();
    other.close();
}

#[test]
fn bad_sizes_are_named() {
    assert_eq!(MemoryDisk::image([0u8; 0]).err(), Some(BadDisk::Empty));
    assert_eq!(MemoryDisk::image([0u8; 700]).err(), Some(BadDisk::Size(700)));
    assert_eq!(MemoryDisk::overlay([0u8; 1024], 512, allocate).err(), Some(BadDisk::Base(1024)));
    assert_eq!(MemoryDisk::ram(1 << 20, |_| None).err(), Some(BadDisk::Memory(1 << 20)));
    let mut disk = ram(64);
    assert_eq!(disk.resize(512).err(), Some(BadDisk::Base(64 * 512)));
    assert_eq!(disk.resize(1 << 20), Ok(()));
}

#[test]
fn a_disk_without_room_says_so() {
    let mut host = Host::new(1, false, MemoryDisk::overlay([], 1 << 20, |_| None).expect("a size"));
    let page = host.grant(true);
    assert_eq!(host.ask(&rw(WRITE, 1, 0, &[segment(page, 0, 7)])), (1, RSP_ERROR));
    assert_eq!(host.ask(&rw(READ, 2, 0, &[segment(page, 0, 7)])), (2, RSP_OKAY));
    host.close();
}

#[test]
fn a_flush_waits_for_all_before_it_and_all_behind_wait_for_it() {
    let mut host = Host::new(1, true, Late::new(ram(64)));
    let page = host.grant(true);
    let piece = [segment(page, 0, 7)];
    for (id, operation) in [(1, WRITE), (2, WRITE), (3, FLUSH), (4, WRITE)] {
        host.push(&rw(operation, id, 8, if operation == FLUSH { &[] } else { &piece }));
    }
    host.turn().unwrap();
    assert_eq!(host.disk().actions(), [Action::Write, Action::Write]);
    host.disk().finish(1, Ok(()));
    host.turn().unwrap();
    assert_eq!(host.answers(), [(2, RSP_OKAY)], "in the order in which they end");
    assert!(!host.prepare_to_wait(), "what is behind the flush has to wait");
    host.disk().finish(0, Ok(()));
    host.turn().unwrap();
    assert_eq!(host.disk().actions(), [Action::Flush]);
    assert_eq!(host.answers(), [(1, RSP_OKAY)]);
    host.disk().finish(0, Ok(()));
    host.turn().unwrap();
    assert_eq!((host.answers(), host.disk().actions()), (vec![(3, RSP_OKAY)], vec![Action::Write]));
    host.disk().finish(0, Err(DiskError::Failed));
    host.turn().unwrap();
    assert_eq!(host.answers(), [(4, RSP_ERROR)]);
    host.close();
}

#[test]
fn a_barrier_flushes_writes_and_flushes() {
    for fail_at in 0..=3 {
        let mut host = Host::new(1, false, Late::new(ram(64)));
        let page = host.grant(true);
        let piece = [segment(page, 0, 7)];
        host.push(&rw(BARRIER, 1, 8, &piece));
        host.push(&rw(READ, 2, 8, &piece));
        host.turn().unwrap();
        for (number, action) in [Action::Flush, Action::Write, Action::Flush].into_iter().enumerate() {
            if number > fail_at {
                break;
            }
            assert_eq!(host.disk().actions(), [action]);
            let result = if number == fail_at { Err(DiskError::Failed) } else { Ok(()) };
            host.disk().finish(0, result);
            host.turn().unwrap();
        }
        assert_eq!(host.answers(), [(1, if fail_at < 3 { RSP_ERROR } else { RSP_OKAY })]);
        assert_eq!(host.disk().actions(), [Action::Read]);
        host.disk().finish(0, Ok(()));
        host.turn().unwrap();
        assert_eq!(host.answers(), [(2, RSP_OKAY)]);
        host.close();
    }
}

#[test]
fn an_ordered_request_that_ends_at_once_lets_the_others_on() {
    let mut host = Host::new(1, true, ram(64));
    let page = host.grant(true);
    for id in 0..8 {
        let (operation, segments) =
            if id % 2 == 0 { (BARRIER, vec![segment(page, 0, 7)]) } else { (FLUSH, vec![]) };
        host.push(&rw(operation, id, 8, &segments));
    }
    let mut turns = 0;
    while host.turn().unwrap().more {
        turns += 1;
        assert!(turns < 20);
    }
    let ids: Vec<u64> = host.answers().into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, (0..8).collect::<Vec<u64>>());
    host.close();
}

#[test]
fn closing_half_way_unmaps_what_the_disk_does_not_hold() {
    let mut host = Host::new(1, true, Late::new(ram(64)));
    let pages: Vec<u32> = (0..4).map(|_| host.grant(true)).collect();
    host.push(&rw(READ, 1, 0, &[segment(pages[0], 0, 7)]));
    host.push(&rw(BARRIER, 2, 0, &[segment(pages[1], 0, 7)]));
    host.push(&rw(READ, 3, 0, &[segment(pages[2], 0, 7)]));
    host.turn().unwrap();
    assert_eq!(host.mapped(), 2);
    let (mut disk, live) = host.close_while_busy();
    assert_eq!(live(), 1, "the one the disk reads into");
    disk.finish(0, Ok(()));
    drop(disk);
    assert_eq!(live(), 0);
}

#[test]
fn the_answer_comes_after_the_pages_are_unmapped() {
    let mut host = Host::new(1, false, ram(64));
    let page = host.grant(true);
    host.check_unmapped_at_publish();
    assert_eq!(host.ask(&rw(READ, 1, 0, &[segment(page, 0, 7), segment(page, 0, 7)])), (1, RSP_OKAY));
    host.close();
}

#[test]
fn a_broken_ring_closes_the_connection() {
    for wild in [33, 1000, 1 << 31, u32::MAX] {
        let mut host = Host::new(1, true, ram(64));
        let page = host.grant(true);
        assert_eq!(host.ask(&rw(READ, 1, 0, &[segment(page, 0, 7)])), (1, RSP_OKAY));
        host.jump(wild);
        assert_eq!(host.turn(), Err(Closed), "{wild}");
        assert_eq!(host.mapped(), 1);
        host.close();
    }
}

#[test]
fn what_changes_after_it_was_read_changes_nothing() {
    let mut host = Host::new(1, true, Late::new(ram(64)));
    let (page, list) = (host.grant(true), host.grant(true));
    host.put_segments(list, &[segment(page, 0, 7)]);
    host.push(&indirect(READ, 1, 8, list, 1));
    host.push(&rw(READ, 2, 16, &[segment(page, 0, 7)]));
    host.turn().unwrap();
    // Both requests and the list of segments become nonsense.
    host.put_segments(list, &[segment(4711, 7, 0)]);
    host.overwrite_slots(0xff);
    for place in [8, 16] {
        let jobs = host.disk().jobs();
        assert_eq!((jobs[0].sector, jobs[0].pieces.len(), jobs[0].pieces[0].bytes), (place, 1, 4096));
        host.disk().finish(0, Ok(()));
        host.turn().unwrap();
    }
    assert_eq!(host.answers(), [(1, RSP_OKAY), (2, RSP_OKAY)]);
    host.close();
}

#[test]
fn one_turn_takes_a_bounded_number() {
    let mut host = Host::new(8, true, ram(64));
    let page = host.grant(true);
    for id in 0..100 {
        host.push(&rw(READ, id, 0, &[segment(page, 0, 7)]));
    }
    let mut sizes = Vec::new();
    loop {
        let turn = host.turn().unwrap();
        sizes.push(host.answers().len());
        if !turn.more {
            break;
        }
    }
    assert_eq!(sizes, [32, 32, 32, 4]);
    host.close();
}

#[test]
fn growing_is_seen_by_the_next_request() {
    let mut host = Host::new(1, true, ram(64));
    let page = host.grant(true);
    assert_eq!(host.ask(&rw(READ, 1, 64, &[segment(page, 0, 7)])), (1, RSP_ERROR));
    host.disk().resize(72 * SECTOR as u64).unwrap();
    assert_eq!(host.ask(&rw(READ, 2, 64, &[segment(page, 0, 7)])), (2, RSP_OKAY));
    assert_eq!(host.bytes(page), [0; 4096]);
    host.close();
}

/// What a random front end does.
#[derive(Clone, Debug)]
enum Step {
    /// An honest transfer: write?, ordered?, sector, pages.
    Transfer(bool, bool, u64, Vec<(usize, u8, u8)>),
    Indirect(bool, u64, Vec<(usize, u8, u8)>),
    Flush,
    Discard(u64, u64),
    /// Any bytes at all.
    Raw(Vec<u8>),
    Turn,
    /// Let the disk do some of its work: which, and whether it fails.
    Finish(usize, bool),
    /// A granted page becomes something else.
    Fill(usize, u8),
    /// A grant ends.
    Revoke(usize),
    Jump(u32),
}

fn places() -> impl Strategy<Value = Vec<(usize, u8, u8)>> {
    prop::collection::vec((0usize..12, 0u8..9, 0u8..9), 0..11)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sector = prop_oneof![8 => 0u64..80, 1 => any::<u64>(), 1 => (u64::MAX - 100)..u64::MAX];
    let step = prop_oneof![
        6 => (any::<bool>(), prop::bool::weighted(0.2), sector.clone(), places()).prop_map(|(w, o, s, p)| Step::Transfer(w, o, s, p)),
        3 => (any::<bool>(), sector.clone(), places()).prop_map(|(w, s, p)| Step::Indirect(w, s, p)),
        1 => Just(Step::Flush),
        1 => (sector, 0u64..80).prop_map(|(s, n)| Step::Discard(s, n)),
        3 => prop::collection::vec(any::<u8>(), 112).prop_map(Step::Raw),
        5 => Just(Step::Turn),
        6 => (0usize..4, prop::bool::weighted(0.1)).prop_map(|(n, f)| Step::Finish(n, f)),
        1 => (0usize..12, any::<u8>()).prop_map(|(n, b)| Step::Fill(n, b)),
        1 => (0usize..12).prop_map(Step::Revoke),
        1 => prop_oneof![any::<u32>(), 0u32..70].prop_map(Step::Jump),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a front end does: no panic; each request that was seen is answered at most once, and all of them unless the
    /// ring was broken; nothing stays mapped.
    #[test]
    fn hostile_fronts_get_errors_or_are_closed(steps in steps(), persistent: bool, pages in prop_oneof![Just(1usize), Just(2)]) {
        let mut host = Host::new(pages, persistent, Late::new(ram(64)));
        let grants: Vec<u32> = (0..12).map(|number| host.grant(number != 11)).collect();
        let list = host.grant(true);
        let mut asked = std::collections::BTreeSet::new();
        let (mut id, mut faults, mut broken, mut honest) = (0u64, 0, false, true);
        let segments = |places: &[(usize, u8, u8)]| -> Vec<BlkifSegment> {
            places.iter().map(|&(page, first, last)| segment(grants[page], first, last)).collect()
        };
        for step in steps {
            id += 1;
            let request = match step {
                Step::Transfer(write, ordered, sector, places) => {
                    let operation = match (write, ordered) { (true, true) => BARRIER, (true, false) => WRITE, _ => READ };
                    Some(rw(operation, id, sector, &segments(&places)))
                }
                Step::Indirect(write, sector, places) => {
                    host.put_segments(list, &segments(&places));
                    Some(indirect(if write { WRITE } else { READ }, id, sector, list, places.len() as u16))
                }
                Step::Flush => Some(rw(FLUSH, id, 0, &[])),
                Step::Discard(sector, sectors) => Some(harness::discard(id, sector, sectors)),
                Step::Raw(bytes) => Some(harness::raw(id, &bytes)),
                Step::Turn => {
                    match host.turn() {
                        Ok(turn) => faults += usize::from(turn.fault.is_some()),
                        Err(Closed) => { broken = true; break; }
                    }
                    None
                }
                Step::Finish(number, fails) => {
                    host.disk().finish(number, if fails { Err(DiskError::Failed) } else { Ok(()) });
                    None
                }
                Step::Fill(page, with) => { host.fill(grants[page], with); None }
                Step::Revoke(page) => { host.revoke(grants[page]); None }
                Step::Jump(by) => { host.jump(by); honest = false; None }
            };
            if let Some(request) = request && host.try_push(&request) {
                asked.insert(id);
            }
            if honest {
                for (id, _) in host.answers() {
                    prop_assert!(asked.remove(&id), "an answer to what was not asked: {id}");
                }
            }
        }
        prop_assert!(faults <= 1);
        if !broken && honest {
            // All that was asked is answered in the end.
            for _ in 0..500 {
                prop_assert!(host.turn().is_ok());
                host.disk().finish(0, Ok(()));
                for (id, _) in host.answers() {
                    prop_assert!(asked.remove(&id));
                }
            }
            prop_assert!(asked.is_empty(), "never answered: {asked:?}");
        }
        let (disk, live) = host.close_while_busy();
        drop(disk);
        prop_assert_eq!(live(), 0);
    }

    /// An honest front end reads what it wrote, by any mix of requests.
    #[test]
    fn honest_fronts_read_what_they_wrote(
        steps in prop::collection::vec((any::<bool>(), any::<bool>(), 0u64..120, prop::collection::vec((0u8..8, 0u8..8), 1..8), any::<u8>()), 1..40),
        persistent: bool,
    ) {
        let mut host = Host::new(1, persistent, ram(128));
        let grants: Vec<u32> = (0..8).map(|_| host.grant(true)).collect();
        let list = host.grant(true);
        let mut model = vec![0u8; 128 * SECTOR];
        for (id, (write, by_list, sector, places, with)) in (1u64..).zip(steps) {
            let pieces: Vec<(u32, u8, u8)> = places.iter().zip(&grants)
                .map(|(&(a, b), &grant)| (grant, a.min(b), a.max(b))).collect();
            let segments: Vec<BlkifSegment> = pieces.iter().map(|&(grant, first, last)| segment(grant, first, last)).collect();
            let sectors: u64 = pieces.iter().map(|&(_, first, last)| u64::from(last - first) + 1).sum();
            for (&(grant, ..), at) in pieces.iter().zip(0u8..) {
                host.fill(grant, with.wrapping_add(at));
            }
            let operation = if write { WRITE } else { READ };
            let request = if by_list {
                host.put_segments(list, &segments);
                indirect(operation, id, sector, list, segments.len() as u16)
            } else {
                rw(operation, id, sector, &segments)
            };
            let fits = sector + sectors <= 128;
            prop_assert_eq!(host.ask(&request), (id, if fits { RSP_OKAY } else { RSP_ERROR }));
            if !fits {
                continue;
            }
            let mut at = sector as usize * SECTOR;
            for &(grant, first, last) in &pieces {
                let (start, end) = (usize::from(first) * SECTOR, (usize::from(last) + 1) * SECTOR);
                let bytes = &host.bytes(grant)[start..end];
                let there = &mut model[at..at + end - start];
                if write { there.copy_from_slice(bytes) } else { prop_assert_eq!(&there[..], bytes) }
                at += end - start;
            }
        }
        host.close();
    }
}

#[test]
fn the_device_number_is_the_handle() {
    assert_eq!(rw(READ, 1, 0, &[]).handle, DEVICE as u16);
}

#[test]
fn a_disk_is_given_back_when_it_has_done_all_and_is_flushed() {
    let mut host = Host::new(1, true, Late::new(ram(64)));
    let page = host.grant(true);
    host.push(&rw(WRITE, 1, 0, &[segment(page, 0, 7)]));
    host.push(&rw(WRITE, 2, 8, &[segment(page, 0, 7)]));
    host.push(&rw(FLUSH, 3, 0, &[]));
    host.turn().expect("an honest front");
    assert!(!host.finish());
    host.push(&rw(WRITE, 4, 16, &[segment(page, 0, 7)]));
    host.disk().finish(0, Ok(()));
    assert!(!host.finish());
    assert_eq!(host.disk().actions(), [Action::Write], "nothing new, and the flush not before its time");
    host.disk().finish(0, Err(DiskError::Failed));
    assert!(!host.finish());
    assert_eq!(host.disk().actions(), [Action::Flush]);
    assert!(!host.finish());
    assert_eq!(host.disk().actions(), [Action::Flush], "once");
    host.disk().finish(0, Ok(()));
    assert!(host.finish());
    host.close();
}

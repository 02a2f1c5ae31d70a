//! A disk against a model of its device: good ones, and bad ones.

mod model;

use guest_sdk::ring::SharedPage as _;
use model::{Chain, EVENT_INDEX, INDIRECT, Machine, Page};
use std::rc::Rc;
use virtio::block::{MOST_REQUESTS, Rejected, Trim, Unflushed};
use virtio::{
    Action, Block, DmaPage as _, Error, Fault, IoError, Platform as _, Request, Segment, Transport, Vectors,
};

const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLOCK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const ALL: u64 = SEG_MAX | BLOCK_SIZE | FLUSH | DISCARD | WRITE_ZEROES | INDIRECT | EVENT_INDEX;

const SECTORS: u64 = 256;

/// The tag of a request owns its memory.
type Tag = (u32, Vec<Rc<Page>>);
type Disk = Block<Machine, Tag>;

fn own() -> Vec<u8> {
    let mut own = vec![0; 60];
    own[..8].copy_from_slice(&SECTORS.to_le_bytes());
    own[8..12].copy_from_slice(&8192u32.to_le_bytes());
    own[12..16].copy_from_slice(&100u32.to_le_bytes());
    own[20..24].copy_from_slice(&4096u32.to_le_bytes());
    for (at, value) in [(36, 64u32), (40, 1), (44, 8), (48, 32), (52, 1)] {
        own[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    own
}

fn machine(features: u64) -> Machine {
    Machine::new(2, features, &[256], &own())
}

fn start(machine: &Machine) -> Result<Disk, Error> {
    Block::start(Transport::open(machine.clone(), machine.function())?, Vectors::Messages(2))
}

fn pages(machine: &Machine, count: usize) -> Vec<Rc<Page>> {
    (0..count).map(|_| Rc::new(machine.page().unwrap())).collect()
}

fn whole(pages: &[Rc<Page>]) -> Vec<Segment> {
    pages.iter().map(|page| Segment { address: page.machine_address(), bytes: 4096 }).collect()
}

fn submit(disk: &mut Disk, action: Action, sector: u64, tag: Tag) -> Result<(), Rejected> {
    let segments = whole(&tag.1);
    disk.submit(&Request { action, sector, segments: &segments }, tag).map_err(|(rejected, _)| rejected)
}

/// What the device makes of a request.
fn serve(machine: &Machine, content: &mut [u8], chain: &Chain) -> u32 {
    let mut read = machine.gather(&chain.read);
    let data = read.split_off(16);
    let kind = u32::from_le_bytes(read[..4].try_into().unwrap());
    let at = u64::from_le_bytes(read[8..16].try_into().unwrap()) as usize * 512;
    let (status, pieces) = chain.write.split_last().unwrap();
    let mut written = 1;
    match kind {
        0 => {
            let bytes = pieces.iter().map(|(_, bytes)| *bytes as usize).sum::<usize>();
            machine.scatter(pieces, &content[at..at + bytes]);
            written += bytes as u32;
        }
        1 => content[at..at + data.len()].copy_from_slice(&data),
        4 => assert!(data.is_empty()),
        11 | 13 => {
            let at = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize * 512;
            let bytes = u32::from_le_bytes(data[8..12].try_into().unwrap()) as usize * 512;
            content[at..at + bytes].fill(if kind == 11 { 0xdd } else { 0 });
        }
        kind => panic!("request {kind}"),
    }
    assert_eq!(status.1, 1);
    machine.write_memory(status.0, &[0]);
    written
}

fn serve_all(machine: &Machine, content: &mut [u8]) {
    while let Some(chain) = machine.pop(0) {
        let written = serve(machine, content, &chain);
        machine.push(0, chain.head.into(), written);
    }
}

fn content() -> Vec<u8> {
    (0..SECTORS as usize * 512).map(|at| (at / 512 * 7 + at % 251) as u8).collect()
}

#[test]
fn a_disk_says_what_it_is() {
    let machine = machine(ALL);
    assert_eq!(virtio::find(&machine)[0].1, virtio::Kind::Block);
    let disk = start(&machine).unwrap();
    let geometry = disk.geometry();
    assert_eq!((geometry.sectors, geometry.readonly, geometry.flush), (SECTORS, false, true));
    assert_eq!(geometry.discard, Some(Trim { sectors: 64, alignment: 8 }));
    assert_eq!((geometry.write_zeroes, geometry.physical_sector), (Some(32), 4096));
    assert_eq!((geometry.segments, geometry.requests), (100, MOST_REQUESTS));
    machine.device(|device| {
        assert_eq!((device.status, device.config_vector, device.queues[0].vector), (15, 0, 1));
        assert!(device.msix_on && device.queues[0].size == 256);
    });
    drop(disk);
    assert!(!machine.masters_bus(), "nothing of it is left to the device");
    assert_eq!(machine.device(|device| device.status), 0);
    assert_eq!(machine.pages(), 0);
    // One that has nothing but what it must have.
    let plain = Machine::new(2, READ_ONLY, &[8], &own()[..8]);
    let disk = start(&plain).unwrap();
    let geometry = disk.geometry();
    assert_eq!((geometry.readonly, geometry.flush, geometry.discard), (true, false, None));
    assert_eq!((geometry.segments, geometry.requests, geometry.physical_sector), (1, 2, 512));
}

#[test]
fn what_was_written_is_read_and_many_are_under_way() {
    for features in [ALL, ALL & !INDIRECT, ALL & !EVENT_INDEX, SEG_MAX | FLUSH] {
        let machine = machine(features);
        let mut disk = start(&machine).unwrap();
        let mut content = content();
        let before = content.clone();
        let mut random = 1u32;
        for round in 0..40u32 {
            let mut expected = Vec::new();
            for number in 0..6u32 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let count = 1 + (random >> 20) as usize % 4;
                let sector = u64::from(random >> 8) % (SECTORS - 8 * count as u64);
                let tag = (round * 6 + number, pages(&machine, count));
                expected.push((tag.0, sector, count));
                submit(&mut disk, Action::Read, sector, tag).unwrap();
            }
            disk.kick();
            assert_eq!(disk.under_way(), 6);
            // The device takes all, and is done in another order.
            let mut chains: Vec<Chain> = std::iter::from_fn(|| machine.pop(0)).collect();
            assert_eq!(chains.len(), 6);
            assert!(chains.iter().all(|chain| chain.indirect == (features & INDIRECT != 0)));
            chains.rotate_left(round as usize % 6);
            chains.swap(0, 3);
            for chain in &chains {
                let written = serve(&machine, &mut content, chain);
                machine.push(0, chain.head.into(), written);
            }
            while let Some(((number, pages), result)) = disk.completion() {
                assert_eq!(result, Ok(()));
                let at = expected.iter().position(|(tag, _, _)| *tag == number).unwrap();
                let (_, sector, count) = expected.remove(at);
                for (index, page) in pages.iter().enumerate().take(count) {
                    let mut bytes = vec![0; 4096];
                    page.read_bytes(0, &mut bytes);
                    let at = sector as usize * 512 + index * 4096;
                    assert_eq!(bytes, content[at..at + 4096]);
                }
            }
            assert!(expected.is_empty() && disk.under_way() == 0);
        }
        assert_eq!(content, before);
        // A write of parts of pages, and back.
        let page = pages(&machine, 2);
        page[0].write_bytes(1024, &[0xab; 512]);
        page[1].write_bytes(512, &[0xcd; 1024]);
        let segments = [Segment::of(&*page[0], 1024, 512), Segment::of(&*page[1], 512, 1024)];
        let request = Request { action: Action::Write, sector: 17, segments: &segments };
        disk.submit(&request, (0, page)).unwrap();
        disk.submit(&Request { action: Action::Flush, sector: 0, segments: &[] }, (1, Vec::new())).unwrap();
        disk.kick();
        serve_all(&machine, &mut content);
        assert_eq!(disk.completion().unwrap().0.0, 0);
        assert_eq!(disk.completion().unwrap().0.0, 1);
        assert!(disk.completion().is_none());
        assert_eq!(&content[17 * 512..18 * 512], &[0xab; 512]);
        assert_eq!(&content[18 * 512..20 * 512], &[0xcd; 1024]);
        let counters = *disk.counters();
        assert_eq!((counters.requests, counters.errors, counters.sectors_written), (242, 0, 3));
        assert!(disk.device_mut().take_fault().is_none() && disk.stop().is_empty());
    }
}

#[test]
fn sectors_are_forgotten_and_made_zeros() {
    let machine = machine(ALL);
    let mut disk = start(&machine).unwrap();
    let mut content = content();
    submit(&mut disk, Action::Discard { sectors: 8 }, 16, (0, vec![])).unwrap();
    submit(&mut disk, Action::WriteZeroes { sectors: 2, unmap: true }, 30, (1, vec![])).unwrap();
    let long = Action::Discard { sectors: 65 };
    assert_eq!(submit(&mut disk, long, 0, (2, vec![])), Err(Rejected::Shape));
    let behind = Action::WriteZeroes { sectors: 2, unmap: false };
    assert_eq!(submit(&mut disk, behind, SECTORS - 1, (2, vec![])), Err(Rejected::Range));
    disk.kick();
    serve_all(&machine, &mut content);
    assert!(content[16 * 512..24 * 512].iter().all(|byte| *byte == 0xdd));
    assert!(content[30 * 512..32 * 512].iter().all(|byte| *byte == 0));
    assert_eq!((disk.completion().unwrap().1, disk.completion().unwrap().1), (Ok(()), Ok(())));
}

#[test]
fn what_the_disk_cannot_do_is_refused_before_it_is_asked() {
    let machine = machine(ALL | SIZE_MAX);
    let mut disk = start(&machine).unwrap();
    let page = machine.page().unwrap();
    let segment = Segment::of(&page, 0, 512);
    let check =
        |sector, segments: &[Segment]| disk.check(&Request { action: Action::Read, sector, segments });
    assert_eq!(check(0, &[segment]), Ok(()));
    assert_eq!(check(SECTORS - 1, &[segment]), Ok(()));
    assert_eq!(check(SECTORS, &[segment]), Err(Rejected::Range));
    assert_eq!(check(u64::MAX, &[segment]), Err(Rejected::Range));
    assert_eq!(check(0, &[]), Err(Rejected::Shape));
    assert_eq!(check(0, &[Segment { bytes: 511, ..segment }]), Err(Rejected::Shape));
    assert_eq!(check(0, &[segment, Segment { bytes: 0, ..segment }]), Err(Rejected::Shape));
    assert_eq!(
        check(0, &[Segment { bytes: 8704, ..segment }]),
        Err(Rejected::Shape),
        "longer than a segment may be"
    );
    assert_eq!(Segment::of(&page, 4000, 512).bytes, 96, "no further than its page");
    // More pieces than the device takes; side by side they are fewer.
    let apart: Vec<Segment> = (0..101).map(|n| Segment { address: n * 0x2000, bytes: 512 }).collect();
    let request = Request { action: Action::Read, sector: 0, segments: &apart };
    assert_eq!(disk.submit(&request, (0, vec![])).map_err(|(why, _)| why), Err(Rejected::Shape));
    let together: Vec<Segment> =
        (0..101).map(|n| Segment { address: 0x4000 + n * 512, bytes: 512 }).collect();
    let request = Request { action: Action::Read, sector: 0, segments: &together };
    disk.submit(&request, (0, vec![])).unwrap();
    disk.kick();
    let chain = machine.pop(0).unwrap();
    // 50.5 KiB in pieces of 8 KiB at most, and the status.
    assert_eq!(chain.write.len(), 7 + 1);
    assert!(chain.write.iter().all(|(_, bytes)| *bytes <= 8192));

    let read_only = Machine::new(2, ALL | READ_ONLY, &[256], &own());
    let mut disk = start(&read_only).unwrap();
    assert_eq!((disk.geometry().discard, disk.geometry().write_zeroes), (None, None));
    let tag = || (0, pages(&read_only, 1));
    assert_eq!(submit(&mut disk, Action::Write, 0, tag()), Err(Rejected::ReadOnly));
    assert_eq!(submit(&mut disk, Action::Read, 0, tag()), Ok(()));
    let plain = Machine::new(2, 0, &[256], &own());
    let mut disk = start(&plain).unwrap();
    assert_eq!(submit(&mut disk, Action::Flush, 0, (0, vec![])), Err(Rejected::Unsupported));
}

#[test]
fn a_full_disk_has_room_again_after_a_completion() {
    for (features, room) in [(ALL, MOST_REQUESTS), (SEG_MAX, MOST_REQUESTS)] {
        let machine = machine(features);
        let mut disk = start(&machine).unwrap();
        let mut content = content();
        for number in 0..room as u32 {
            submit(&mut disk, Action::Read, 0, (number, pages(&machine, 1))).unwrap();
        }
        assert_eq!(submit(&mut disk, Action::Read, 0, (99, pages(&machine, 1))), Err(Rejected::Full));
        disk.kick();
        let chain = machine.pop(0).unwrap();
        let written = serve(&machine, &mut content, &chain);
        machine.push(0, chain.head.into(), written);
        assert_eq!(disk.completion().unwrap().0.0, 0);
        submit(&mut disk, Action::Read, 0, (99, pages(&machine, 1))).unwrap();
        assert_eq!(submit(&mut disk, Action::Read, 0, (100, pages(&machine, 1))), Err(Rejected::Full));
        assert_eq!(disk.stop().len(), room, "what was under way comes back");
        assert!(!machine.masters_bus());
    }
}

#[test]
fn errors_are_those_of_their_requests() {
    let machine = machine(ALL);
    let mut disk = start(&machine).unwrap();
    for (status, result) in
        [(0, Ok(())), (1, Err(IoError::Failed)), (2, Err(IoError::Unsupported)), (77, Err(IoError::Failed))]
    {
        submit(&mut disk, Action::Read, 0, (0, pages(&machine, 1))).unwrap();
        disk.kick();
        let chain = machine.pop(0).unwrap();
        machine.write_memory(chain.write.last().unwrap().0, &[status]);
        machine.push(0, chain.head.into(), 1);
        assert_eq!(disk.completion().unwrap().1, result, "status {status}");
    }
    // It says that it is done, and has not said how.
    submit(&mut disk, Action::Read, 0, (0, pages(&machine, 1))).unwrap();
    disk.kick();
    let chain = machine.pop(0).unwrap();
    machine.push(0, chain.head.into(), 0);
    assert_eq!(disk.completion().unwrap().1, Err(IoError::Failed));
    assert_eq!(disk.counters().errors, 4);
    assert!(disk.device_mut().take_fault().is_none());
}

/// Has the device say nonsense while two requests are under way, and sees that both come back and the disk goes on.
fn nonsense(name: &str, fault: Fault, say: impl Fn(&Machine, &Chain, &Chain)) {
    for features in [ALL, SEG_MAX] {
        let machine = machine(features);
        let mut disk = start(&machine).unwrap();
        let mut content = content();
        for number in 0..2 {
            submit(&mut disk, Action::Read, 8, (number, pages(&machine, 1))).unwrap();
        }
        disk.kick();
        let chains = (machine.pop(0).unwrap(), machine.pop(0).unwrap());
        say(&machine, &chains.0, &chains.1);
        let mut back = Vec::new();
        while let Some(((number, _), result)) = disk.completion() {
            back.push((number, result.is_ok()));
        }
        back.sort_unstable();
        assert_eq!(back.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1], "{name}");
        assert!(back.iter().any(|(_, good)| !good), "{name}: {back:?}");
        assert_eq!(disk.device_mut().take_fault(), Some(fault), "{name}");
        assert_eq!(disk.device_mut().take_fault(), None);
        assert!(!disk.device().is_broken() && disk.device().revivals() == 1);
        // It was reset once more than at the start, and works.
        assert_eq!(machine.device(|device| (device.resets, device.status)), (2, 15));
        submit(&mut disk, Action::Read, 8, (7, pages(&machine, 1))).unwrap();
        disk.kick();
        serve_all(&machine, &mut content);
        let ((number, pages), result) = disk.completion().unwrap();
        assert_eq!((number, result), (7, Ok(())));
        let mut bytes = [0; 4096];
        pages[0].read_bytes(0, &mut bytes);
        assert_eq!(bytes, content[4096..8192]);
    }
}

#[test]
fn nonsense_in_the_used_ring_is_survived() {
    nonsense("an id out of range", Fault::Id(256), |machine, _, _| machine.push(0, 256, 1));
    nonsense("an id that is no number", Fault::Id(u32::MAX), |machine, _, _| machine.push(0, u32::MAX, 1));
    nonsense("an id whose lower half is one", Fault::Id(0x1_0000), |machine, _, _| {
        machine.push(0, 0x1_0000, 1);
    });
    nonsense("an id that is not under way", Fault::Id(200), |machine, _, _| machine.push(0, 200, 1));
    nonsense("one id twice", Fault::Id(0), |machine, first, _| {
        assert_eq!(first.head, 0);
        machine.write_memory(first.write.last().unwrap().0, &[0]);
        machine.push(0, first.head.into(), 4097);
        machine.push(0, first.head.into(), 4097);
    });
    nonsense("too long", Fault::Length { said: 4098, room: 4097 }, |machine, first, _| {
        machine.push(0, first.head.into(), 4098);
    });
    nonsense("an index too far", Fault::Index(3), |machine, _, _| machine.set_used_index(0, 3));
    nonsense("an index that goes back", Fault::Index(u16::MAX), |machine, _, _| {
        machine.set_used_index(0, u16::MAX);
    });
}

#[test]
fn random_nonsense_harms_nobody() {
    let mut random = 12345u32;
    let mut next = move || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        random >> 8
    };
    for round in 0..200 {
        let machine = machine(if round % 2 == 0 { ALL } else { SEG_MAX | FLUSH });
        let mut disk = start(&machine).unwrap();
        let (mut taken, mut back) = (0, 0);
        for _ in 0..60 {
            let tag = (0, pages(&machine, 1 + next() as usize % 3));
            taken += u32::from(submit(&mut disk, Action::Read, u64::from(next()) % 200, tag).is_ok());
            disk.kick();
            if machine.masters_bus() {
                match next() % 4 {
                    0 => while machine.pop(0).is_some() {},
                    1 => machine.push(0, next() % 300, next() % 5000),
                    2 => machine.set_used_index(0, next() as u16),
                    _ => {}
                }
            }
            while disk.completion().is_some() {
                back += 1;
            }
        }
        back += disk.stop().len() as u32;
        assert_eq!(taken, back, "each request comes back once");
        assert_eq!(machine.pages(), 0);
    }
}

#[test]
fn a_device_that_asks_for_a_reset_gets_it_and_one_that_does_so_for_ever_is_given_up() {
    let machine = machine(ALL);
    let mut disk = start(&machine).unwrap();
    assert!(!disk.changed(), "it is well");
    for round in 1..=8 {
        submit(&mut disk, Action::Read, 0, (1, pages(&machine, 1))).unwrap();
        disk.kick();
        machine.device(|device| device.status |= 0x40);
        assert!(!disk.changed());
        assert_eq!(disk.device_mut().take_fault(), Some(Fault::NeedsReset));
        assert_eq!(disk.completion().unwrap().1, Err(IoError::Reset));
        assert_eq!((disk.device().is_broken(), disk.device().revivals()), (false, round));
    }
    machine.device(|device| device.status |= 0x40);
    disk.changed();
    assert!(disk.device().is_broken() && !machine.masters_bus());
    assert_eq!(submit(&mut disk, Action::Read, 0, (1, vec![])), Err(Rejected::Broken));
    assert!(disk.completion().is_none() && !disk.listen());
}

#[test]
fn a_device_that_goes_away_is_cut_off() {
    let machine = machine(ALL);
    let mut disk = start(&machine).unwrap();
    submit(&mut disk, Action::Read, 0, (1, pages(&machine, 1))).unwrap();
    disk.kick();
    machine.device(|device| device.gone = true);
    disk.changed();
    assert_eq!(disk.device_mut().take_fault(), Some(Fault::Gone));
    assert_eq!(disk.completion().unwrap().1, Err(IoError::Reset));
    assert!(disk.device().is_broken() && !machine.masters_bus());
}

#[test]
fn a_device_that_does_not_answer_is_reset_in_time() {
    let machine = machine(ALL);
    let (mut disk, mut content) = (start(&machine).unwrap(), content());
    for _ in 0..10 {
        disk.tick(2);
    }
    assert_eq!(disk.device_mut().take_fault(), None, "nothing was asked");
    submit(&mut disk, Action::Read, 0, (1, pages(&machine, 1))).unwrap();
    disk.kick();
    disk.tick(2);
    submit(&mut disk, Action::Read, 8, (2, pages(&machine, 1))).unwrap();
    disk.kick();
    disk.tick(2);
    assert_eq!((disk.device_mut().take_fault(), disk.under_way()), (None, 2));
    disk.tick(2);
    assert_eq!((disk.device_mut().take_fault(), disk.under_way()), (Some(Fault::Silent), 0));
    let back: Vec<_> = std::iter::from_fn(|| disk.completion()).collect();
    assert_eq!(
        back.iter().map(|(tag, result)| (tag.0, *result)).collect::<Vec<_>>(),
        [(1, Err(IoError::Reset)), (2, Err(IoError::Reset))]
    );
    // It is used on, and one that answers has all the time in the world.
    for round in 0..10 {
        submit(&mut disk, Action::Read, 0, (round, pages(&machine, 1))).unwrap();
        disk.kick();
        disk.tick(2);
        disk.tick(2);
        serve_all(&machine, &mut content);
        assert_eq!(disk.completion().unwrap().1, Ok(()));
    }
    assert_eq!((disk.device_mut().take_fault(), disk.device().revivals()), (None, 1));
    disk.restart();
    assert_eq!(
        (disk.device_mut().take_fault(), disk.device().revivals(), disk.device().is_broken()),
        (Some(Fault::Asked), 2, false)
    );
}

#[test]
fn a_flush_after_a_reset_does_not_hide_what_the_reset_lost() {
    let (mut user, mut other) = (Unflushed::default(), Unflushed::default());
    let flush = |user: &mut Unflushed, revivals| {
        let mut covered = Unflushed::default();
        user.begin(&mut covered);
        covered.is_durable(revivals)
    };
    assert!(flush(&mut user, 0) && flush(&mut user, 3), "nothing was written");
    user.wrote(0);
    assert!(flush(&mut user, 0));
    user.wrote(0);
    user.wrote(1);
    other.wrote(1);
    assert!(!flush(&mut user, 1), "the first write was before the reset");
    assert!(flush(&mut user, 1), "it is told once");
    assert!(flush(&mut other, 1), "others have lost nothing");
    // What is written while a flush is under way is for the next.
    user.wrote(1);
    let mut covered = Unflushed::default();
    user.begin(&mut covered);
    user.wrote(1);
    // It had to wait for room: what was written meanwhile may be covered, too, what is older stays so.
    user.begin(&mut covered);
    user.wrote(2);
    assert!(covered.is_durable(1) && !covered.is_durable(2));
    assert!(flush(&mut user, 2));
}

#[test]
fn a_disk_grows_while_it_runs() {
    let machine = machine(ALL);
    let mut disk = start(&machine).unwrap();
    machine.device(|device| device.set_own(0, &1000u64.to_le_bytes()));
    assert!(disk.changed());
    assert_eq!(disk.geometry().sectors, 1000);
    assert!(!disk.changed());
}

#[test]
fn a_device_is_told_and_tells_no_more_than_needed() {
    for features in [ALL, ALL & !EVENT_INDEX] {
        let machine = machine(features);
        let mut disk = start(&machine).unwrap();
        let mut content = content();
        for _ in 0..3 {
            submit(&mut disk, Action::Read, 0, (0, pages(&machine, 1))).unwrap();
        }
        disk.kick();
        disk.kick();
        assert_eq!(machine.device(|device| device.queues[0].kicks), 1, "three requests, told once");
        submit(&mut disk, Action::Read, 0, (0, pages(&machine, 1))).unwrap();
        disk.kick();
        // It has not looked since it was told, and says by its index that it needs to be told of none but the first.
        let kicks = if features & EVENT_INDEX != 0 { 1 } else { 2 };
        assert_eq!(machine.device(|device| device.queues[0].kicks), kicks);
        assert!(!disk.listen());
        let old = machine.device(|device| device.queues[0].used_index);
        serve_all(&machine, &mut content);
        assert!(machine.wants_interrupt(0, old));
        assert!(disk.listen(), "some are done already");
        while disk.completion().is_some() {}
        assert!(!disk.listen());
        submit(&mut disk, Action::Read, 0, (0, pages(&machine, 1))).unwrap();
        disk.kick();
        assert_eq!(machine.device(|device| device.queues[0].kicks), kicks + 1, "it has looked");
    }
}

#[test]
fn devices_that_cannot_be_used_are_told_apart() {
    let all = |change: &dyn Fn(&Machine)| {
        let machine = machine(ALL);
        change(&machine);
        let error = start(&machine).err();
        assert!(!machine.masters_bus());
        assert_eq!(machine.pages(), 0);
        error
    };
    assert_eq!(all(&|machine| machine.without_capability(0x50)), Some(Error::Missing("common registers")));
    assert_eq!(all(&|machine| machine.without_capability(0x60)), Some(Error::Missing("register of causes")));
    assert_eq!(
        all(&|machine| machine.without_capability(0x80)),
        Some(Error::Missing("registers to be told by"))
    );
    assert_eq!(
        all(&|machine| machine.device(|device| device.refuses_features = true)),
        Some(Error::Features)
    );
    assert_eq!(
        all(&|machine| machine.device(|device| device.features &= !model::VERSION_1)),
        Some(Error::Features)
    );
    assert_eq!(all(&|machine| machine.device(|device| device.queues.clear())), Some(Error::Queue(0)));
    assert_eq!(
        all(&|machine| machine.device(|device| device.queues[0].size = 0)),
        None,
        "a reset gives it back"
    );
    assert_eq!(all(&|machine| machine.device(|device| device.vectors = 1)), Some(Error::Messages));
    assert_eq!(all(&|machine| machine.device(|device| device.gone = true)), Some(Error::Reset));
    assert_eq!(
        all(&|machine| machine.device(|device| (device.never_resets, device.status) = (true, 1))),
        Some(Error::Reset)
    );
    assert_eq!(all(&|machine| machine.limit_pages(2)), Some(Error::Memory));
    assert_eq!(all(&|machine| machine.limit_pages(20)), Some(Error::Memory));
    let machine = machine(ALL);
    machine.device(|device| device.id = 0x1000_8086);
    assert!(virtio::find(&machine).is_empty());
}

#[test]
fn messages_are_written_into_its_table() {
    let machine = machine(ALL);
    let mut transport = Transport::open(machine.clone(), machine.function()).unwrap();
    let store = guest_sdk::hardware::Store { address: 0xfee0_1000, data: 0x99 };
    assert_eq!(transport.set_message(1, store), Err(Error::Messages), "not mapped");
    transport.map_messages().unwrap();
    assert_eq!(machine.device(|device| device.table[7]), 1, "masked");
    transport.set_message(1, store).unwrap();
    assert_eq!(machine.device(|device| device.table[4..8].to_vec()), [0xfee0_1000, 0, 0x99, 0]);
    assert_eq!(transport.set_message(4, store), Err(Error::Messages), "it has four");
    // By its line, without them.
    let disk: Disk = Block::start(transport, Vectors::Line).unwrap();
    machine.device(|device| {
        assert!(!device.msix_on && device.config_vector == 0xffff);
        device.isr = 3;
    });
    assert_eq!((disk.device().transport().cause(), disk.device().transport().cause()), (3, 0));
}

#[test]
fn a_disk_that_is_taken_out_gives_all_back_and_is_not_started_again() {
    let machine = machine(ALL);
    let mut disk = start(&machine).unwrap();
    for number in 0..3 {
        submit(&mut disk, Action::Write, 0, (number, pages(&machine, 1))).unwrap();
    }
    disk.kick();
    disk.remove();
    assert!(disk.device().is_broken() && !machine.masters_bus());
    assert_eq!((disk.device_mut().take_fault(), disk.device().revivals()), (Some(Fault::Removed), 0));
    let back: Vec<_> = core::iter::from_fn(|| disk.completion()).map(|(_, result)| result).collect();
    assert_eq!(back, [Err(IoError::Reset); 3]);
    disk.remove();
    assert_eq!(disk.device_mut().take_fault(), None, "told once");
    let refused = submit(&mut disk, Action::Read, 0, (9, pages(&machine, 1)));
    assert_eq!(refused, Err(Rejected::Broken));
}

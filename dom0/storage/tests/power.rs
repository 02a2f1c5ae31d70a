//! The whole way of a guest's request, ring, back end, copy-on-write file, file system, over a disk whose power fails: what a flush was
//! answered for is there afterwards.

#[path = "../../block/tests/harness/mod.rs"]
mod harness;
mod model;

use blkback::disk::{Disk, Properties};
use blkback::memory::MemoryDisk;
use fastrand::Rng;
use harness::{Host, Mapped, SECTOR, own_page, rw, segment};
use hypercall_abi::io::blkif::{BlkifOp, RSP_ERROR, RSP_OKAY};
use model::{Device, Pumped, Sector, wait};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use storage::blocks::Blocks;
use storage::extents::{Extents, Window};
use storage::overlay::{Header, Overlay, TABLE_SECTOR, table_bytes};
use storage::volume::{BadFile, Volume};

const READ: u8 = BlkifOp::Read.number() as u8;
const WRITE: u8 = BlkifOp::Write.number() as u8;
const BARRIER: u8 = BlkifOp::WriteBarrier.number() as u8;
const FLUSH: u8 = BlkifOp::FlushDiskcache.number() as u8;

/// Sectors of the device, and of the guest's disk.
const DEVICE: usize = 4096;
const SECTORS: u64 = 96;
const BASE_SECTORS: u64 = 90;

type Whole = Window<Mapped, Pumped>;

/// Content of a sector that says which write it is from.
fn content(sector: u64, version: u64) -> Sector {
    let mut bytes = [0; SECTOR];
    for (at, word) in bytes.chunks_mut(8).enumerate() {
        let value = (sector << 32 | version).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64;
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn base_content(sector: u64) -> Sector {
    if sector < BASE_SECTORS { content(sector, 0) } else { [0; SECTOR] }
}

/// A device with a file system in sectors 64 and up, which has files that it does not lie in one piece beside.
fn made(seed: u64) -> Vec<Sector> {
    let device = Device::new(vec![[0; SECTOR]; DEVICE], seed);
    wait(async {
        let mut blocks = Blocks::new(volume_disk(&device), own_page).expect("pages");
        hadris_fat::async_::format(&mut blocks, &hadris_fat::FatOptions::new()).await.expect("a file system");
        let mut volume = Volume::mount(blocks.into_disk(), own_page).await.expect("mounts");
        // Every second cluster becomes free, so that what comes next lies in pieces.
        for number in 0..40 {
            volume.create(&format!("fill{number}"), 2048).await.expect("a file");
        }
        for number in (0..40).step_by(2) {
            volume.remove(&format!("fill{number}")).await.expect("removes");
        }
        drop(volume);
        // Anew, so that the first free place is looked for.
        let mut volume = Volume::mount(volume_disk(&device), own_page).await.expect("mounts");
        let base = volume.create("base.img", BASE_SECTORS * SECTOR as u64).await.expect("a file");
        let file =
            volume.create("A long name.cow", HEADER.file_sectors() * SECTOR as u64).await.expect("a file");
        assert!(base.pieces() > 1 && file.pieces() > 0, "{base:?}");
        let mut blocks = Blocks::new(Window::new(volume_disk(&device), base), own_page).expect("pages");
        for sector in 0..BASE_SECTORS {
            blocks.write(sector, &base_content(sector)).await.expect("writes");
        }
        let mut blocks = Blocks::new(Window::new(volume_disk(&device), file), own_page).expect("pages");
        blocks.write(0, &HEADER.encode()).await.expect("writes");
        blocks.make_durable().await.expect("flushes");
    });
    device.disk.power_failure()
}

const HEADER: Header = Header { sectors: SECTORS, room: 8 * SECTORS, base_sectors: BASE_SECTORS, base: 1 };

fn volume_disk(device: &Device) -> Whole {
    let extents = Extents::one(64, DEVICE as u64 - 64, DEVICE as u64).expect("inside");
    Window::new(device.port(), extents)
}

type Cow = Overlay<Mapped, Window<Mapped, Whole>, Window<Mapped, Whole>>;

/// Opens the disk as a reboot does.
fn open(device: &Device) -> Cow {
    wait(async {
        let mut volume = Volume::mount(volume_disk(device), own_page).await.expect("mounts");
        let base = volume.find("base.img").await.expect("the base");
        let file = volume.find("a LONG name.COW").await.expect("the file, in any case");
        let mut blocks =
            Blocks::new(Window::new(volume_disk(device), file.clone()), own_page).expect("pages");
        let mut first = [0; SECTOR];
        blocks.read(0, &mut first).await.expect("reads");
        let header = Header::decode(&first, file.sectors()).expect("a header").expect("it was made");
        assert_eq!(Header { sectors: SECTORS, ..header }, HEADER);
        let mut table = vec![0; table_bytes(&header)];
        blocks.read(TABLE_SECTOR, &mut table).await.expect("reads");
        let base = Window::new(volume_disk(device), base);
        Overlay::new(base, blocks.into_disk(), header, &table, own_page).expect("pages")
    })
}

/// What may be read: what was flushed last, and all that was written since.
struct Reference(Vec<Vec<Sector>>);

impl Reference {
    fn new(first: impl Fn(u64) -> Sector) -> Self {
        Self((0..SECTORS).map(|sector| vec![first(sector)]).collect())
    }

    fn newest(&self, sector: u64) -> Sector {
        *self.0[sector as usize].last().expect("never empty")
    }

    fn flushed(&mut self) {
        for versions in &mut self.0 {
            versions.drain(..versions.len() - 1);
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        sector: u64,
        sectors: u64,
        barrier: bool,
    },
    Flush,
    Read {
        sector: u64,
        sectors: u64,
    },
    /// Several writes and then a flush on their way at once.
    Burst(Vec<u64>),
    /// The same, and after so many turns power fails.
    PowerFailure {
        places: Vec<u64>,
        turns: u8,
    },
    /// The back end goes away and comes back.
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    let range =
        || (0..SECTORS, 1..9u64).prop_map(|(sector, sectors)| (sector.min(SECTORS - sectors), sectors));
    prop_oneof![
        6 => (range(), prop::bool::weighted(0.1))
            .prop_map(|((sector, sectors), barrier)| Step::Write { sector, sectors, barrier }),
        2 => Just(Step::Flush),
        3 => range().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        2 => prop::collection::vec(0..SECTORS, 1..12).prop_map(Step::Burst),
        2 => (prop::collection::vec(0..SECTORS, 0..12), 0..12u8)
            .prop_map(|(places, turns)| Step::PowerFailure { places, turns }),
        1 => Just(Step::Reconnect),
    ]
}

/// A guest with one page for each request on its way.
struct Guest<D: Disk<Mapped>> {
    host: Host<D>,
    pages: Vec<u32>,
}

impl<D: Disk<Mapped>> Guest<D> {
    fn new(disk: D) -> Self {
        let mut host = Host::new(1, true, disk);
        let pages = (0..16).map(|_| host.grant(true)).collect();
        Self { host, pages }
    }

    /// Lets the back end work until so many requests are answered.
    fn answers(&mut self, count: usize) -> BTreeMap<u64, i16> {
        let mut answers = BTreeMap::new();
        for _ in 0..100_000 {
            self.host.turn().expect("an honest front");
            answers.extend(self.host.answers());
            if answers.len() == count {
                return answers;
            }
        }
        panic!("no answer: {answers:?} of {count}");
    }

    fn write(&mut self, id: u64, page: usize, sector: u64, all: &[Sector], operation: u8) {
        let bytes: Vec<u8> = all.iter().flatten().copied().collect();
        self.host.put(self.pages[page], &bytes);
        let segments = [segment(self.pages[page], 0, all.len() as u8 - 1)];
        self.host.push(&rw(operation, id, sector, &segments));
    }

    /// Asks for writes of a sector each, and for a flush behind them, without waiting for answers. Returns the number of writes: of sectors
    /// that are written twice at once anything may become.
    fn write_and_flush(&mut self, places: &[u64], version: &mut u64, reference: &mut Reference) -> usize {
        let places: BTreeSet<u64> = places.iter().copied().collect();
        for (number, &sector) in places.iter().enumerate() {
            *version += 1;
            let content = content(sector, *version);
            self.write(10 + number as u64, number, sector, &[content], WRITE);
            reference.0[sector as usize].push(content);
        }
        self.host.push(&rw(FLUSH, 2, 0, &[]));
        places.len()
    }

    fn read(&mut self, sector: u64, sectors: u64) -> Vec<Sector> {
        let segments = [segment(self.pages[15], 0, sectors as u8 - 1)];
        self.host.push(&rw(READ, 77, sector, &segments));
        assert_eq!(self.answers(1)[&77], RSP_OKAY);
        let bytes = self.host.bytes(self.pages[15]);
        let sectors = bytes.chunks(SECTOR).take(sectors as usize);
        sectors.map(|bytes| bytes.try_into().expect("a sector")).collect()
    }
}

fn run(steps: &[Step], seed: u64) {
    let mut device = Device::new(made(seed), seed);
    let mut guest = Guest::new(open(&device));
    let mut reference = Reference::new(base_content);
    let mut version = 0;
    for step in steps {
        match step {
            Step::Write { sector, sectors, barrier } => {
                version += 1;
                let all: Vec<Sector> = (*sector..sector + sectors).map(|at| content(at, version)).collect();
                guest.write(1, 0, *sector, &all, if *barrier { BARRIER } else { WRITE });
                assert_eq!(guest.answers(1)[&1], RSP_OKAY);
                for (at, content) in (*sector..).zip(all) {
                    reference.0[at as usize].push(content);
                }
                if *barrier {
                    reference.flushed();
                }
            }
            Step::Flush => {
                guest.host.push(&rw(FLUSH, 2, 0, &[]));
                assert_eq!(guest.answers(1)[&2], RSP_OKAY);
                reference.flushed();
            }
            Step::Read { sector, sectors } => {
                for (at, found) in (*sector..).zip(guest.read(*sector, *sectors)) {
                    assert!(found == reference.newest(at), "sector {at}");
                }
            }
            Step::Burst(places) => {
                let writes = guest.write_and_flush(places, &mut version, &mut reference);
                let answers = guest.answers(writes + 1);
                assert!(answers.values().all(|&status| status == RSP_OKAY));
                reference.flushed();
            }
            Step::PowerFailure { places, turns } => {
                guest.write_and_flush(places, &mut version, &mut reference);
                for _ in 0..*turns {
                    guest.host.turn().expect("an honest front");
                    if guest.host.answers().contains(&(2, RSP_OKAY)) {
                        reference.flushed();
                    }
                }
                device = Device::new(device.disk.power_failure(), seed ^ version);
                guest = Guest::new(open(&device));
                for at in 0..SECTORS {
                    let found = guest.read(at, 1)[0];
                    let versions = &reference.0[at as usize];
                    let count = versions.len();
                    assert!(versions.contains(&found), "sector {at} is none of the {count} that it may be");
                    reference.0[at as usize] = vec![found];
                }
            }
            Step::Reconnect => {
                let (disk, _) = guest.host.close_while_busy();
                guest = Guest::new(disk);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 100, ..ProptestConfig::default() })]

    #[test]
    fn what_was_flushed_survives(steps in prop::collection::vec(step(), 1..60), seed: u64) {
        run(&steps, seed);
    }
}

#[test]
fn a_flush_of_nothing_new_is_one_flush() {
    let device = Device::new(made(5), 5);
    let mut guest = Guest::new(open(&device));
    let flushes = |guest: &mut Guest<Cow>| {
        let before = device.disk.flushes();
        guest.host.push(&rw(FLUSH, 2, 0, &[]));
        guest.answers(1);
        device.disk.flushes() - before
    };
    guest.write(1, 0, 7, &[content(7, 1)], WRITE);
    guest.answers(1);
    assert_eq!(flushes(&mut guest), 2, "the sector, then its bit");
    guest.write(1, 0, 7, &[content(7, 2)], WRITE);
    guest.answers(1);
    assert_eq!(flushes(&mut guest), 1);
}

#[test]
fn a_device_that_fails_is_an_error_and_a_flush_that_fails_is_tried_again() {
    let device = Device::new(made(5), 5);
    let mut guest = Guest::new(open(&device));
    guest.write(1, 0, 7, &[content(7, 1)], WRITE);
    assert_eq!(guest.answers(1)[&1], RSP_OKAY);
    device.disk.fail_after(Some(0));
    guest.write(1, 0, 8, &[content(8, 1)], WRITE);
    assert_eq!(guest.answers(1)[&1], RSP_ERROR);
    guest.host.push(&rw(FLUSH, 2, 0, &[]));
    assert_eq!(guest.answers(1)[&2], RSP_ERROR, "the bit of sector 7 cannot be written");
    device.disk.fail_after(None);
    guest.host.push(&rw(FLUSH, 2, 0, &[]));
    assert_eq!(guest.answers(1)[&2], RSP_OKAY);
    let device = Device::new(device.disk.power_failure(), 6);
    let mut guest = Guest::new(open(&device));
    assert!(guest.read(7, 1)[0] == content(7, 1));
    assert!(guest.read(8, 1)[0] == base_content(8));
}

/// Has the disk grow as dom0 does: the file, its header, then what is open.
async fn grow(device: &Device, disk: &mut Cow, sectors: u64) -> Result<(), BadFile> {
    let header = disk.header().grown(sectors).expect("there is room");
    let mut volume = Volume::mount(volume_disk(device), own_page).await?;
    let extents = volume.grow("A long name.cow", header.file_sectors() * SECTOR as u64).await?;
    let mut blocks = Blocks::new(Window::new(volume_disk(device), extents.clone()), own_page).expect("pages");
    blocks.write(0, &header.encode()).await.expect("writes");
    blocks.make_durable().await.expect("flushes");
    disk.file_mut().extend(extents).expect("what it had is where it was");
    disk.grow(header).expect("its file has grown");
    Ok(())
}

#[test]
fn a_disk_grows_while_it_is_used_and_keeps_what_it_had() {
    const LARGE: u64 = 6 * SECTORS;
    let device = Device::new(made(5), 5);
    let mut guest = Guest::new(open(&device));
    for at in [0, 7, SECTORS - 1] {
        guest.write(1, 0, at, &[content(at, 1)], WRITE);
        assert_eq!(guest.answers(1)[&1], RSP_OKAY);
    }
    guest.host.push(&rw(READ, 3, SECTORS, &[segment(guest.pages[15], 0, 0)]));
    assert_eq!(guest.answers(1)[&3], RSP_ERROR, "beyond its end");
    let (mut disk, _) = guest.host.close_while_busy();
    wait(grow(&device, &mut disk, LARGE)).expect("there are so many free");
    let mut guest = Guest::new(disk);
    assert!(guest.read(SECTORS, 1)[0] == [0; SECTOR], "what is new is zeros");
    guest.write(1, 0, LARGE - 2, &[content(1, 9), content(2, 9)], WRITE);
    assert_eq!(guest.answers(1)[&1], RSP_OKAY);
    guest.host.push(&rw(FLUSH, 2, 0, &[]));
    assert_eq!(guest.answers(1)[&2], RSP_OKAY);
    let device = Device::new(device.disk.power_failure(), 6);
    let mut guest = Guest::new(open(&device));
    assert_eq!(guest.host.disk().properties().sectors, LARGE);
    assert!(guest.read(LARGE - 2, 2) == [content(1, 9), content(2, 9)]);
    for at in [0, 7, SECTORS - 1] {
        assert!(guest.read(at, 1)[0] == content(at, 1), "sector {at}");
    }
    assert!(guest.read(8, 1)[0] == base_content(8));
}

#[test]
fn two_overlays_of_one_base_do_not_meet() {
    let device = Device::new(made(5), 5);
    let base = MemoryDisk::image(vec![3; 8 * SECTOR]).expect("a disk");
    let header = Header { sectors: 16, room: 16, base_sectors: 8, base: 0 };
    let part = |at| {
        let extents = Extents::one(at, header.file_sectors(), DEVICE as u64).expect("inside");
        Window::new(device.port(), extents)
    };
    let overlay = |at, base| Overlay::new(base, part(at), header, &[0; SECTOR], own_page).expect("pages");
    let again = MemoryDisk::image(vec![3; 8 * SECTOR]).expect("a disk");
    let (mut one, mut two) = (Guest::new(overlay(3000, base)), Guest::new(overlay(3500, again)));
    let Properties { sectors, readonly, .. } = one.host.disk().properties();
    assert_eq!((sectors, readonly), (16, false));
    one.write(1, 0, 6, &[content(6, 1), content(7, 1), content(8, 1)], WRITE);
    one.answers(1);
    assert!(one.read(5, 5) == [[3; SECTOR], content(6, 1), content(7, 1), content(8, 1), [0; SECTOR]]);
    assert!(two.read(5, 5) == [[3; SECTOR], [3; SECTOR], [3; SECTOR], [0; SECTOR], [0; SECTOR]]);
}

#[test]
fn a_file_that_finds_no_room_to_grow_stays_as_it_was() {
    let device = Device::new(made(5), 5);
    wait(async {
        let mut volume = Volume::mount(volume_disk(&device), own_page).await.expect("mounts");
        let before = volume.find("base.img").await.expect("it is there");
        let full = volume.grow("base.img", 64 << 20).await.expect_err("more than the device has");
        assert!(matches!(full, BadFile::Full { .. }), "{full:?}");
        assert_eq!(volume.grow("base.img", 1 << 32).await, Err(BadFile::Large(1 << 32)));
        assert_eq!(volume.grow("base.img", SECTOR as u64).await.as_ref(), Ok(&before), "it never shrinks");
        assert!(matches!(volume.grow("none.img", 512).await, Err(BadFile::NotFound(_))));
        drop(volume);
        let mut volume = Volume::mount(volume_disk(&device), own_page).await.expect("mounts");
        assert_eq!(volume.find("base.img").await, Ok(before.clone()));
        // What it had taken is free again: another can have it.
        let grown = volume.grow("base.img", 512 << 10).await.expect("so much is free");
        assert_eq!((grown.sectors(), grown.begins_with(&before)), (1024, true));
        let mut blocks = Blocks::new(Window::new(volume_disk(&device), grown), own_page).expect("pages");
        let mut found = [1; SECTOR];
        for sector in [0, BASE_SECTORS - 1, BASE_SECTORS, 1023] {
            blocks.read(sector, &mut found).await.expect("reads");
            assert!(found == base_content(sector), "sector {sector}");
        }
    });
}

#[test]
fn files_that_cannot_be_disks_say_why() {
    let device = Device::new(made(5), 5);
    wait(async {
        let mut volume = Volume::mount(volume_disk(&device), own_page).await.expect("mounts");
        let long = volume.find("missing.img").await.expect_err("none of this name");
        let BadFile::NotFound(names) = long else { panic!("{long:?}") };
        assert!(names.contains(&"fill1".to_string()), "{names:?}");
        assert!(matches!(volume.find("fill1/x").await, Err(BadFile::NoFile | BadFile::NotFound(_))));
        assert_eq!(volume.find("").await, Err(BadFile::NoFile), "the root");
        for (bytes, error) in [(0, BadFile::Empty), (1000, BadFile::Size(1000))] {
            assert_eq!(volume.create("odd", bytes).await, Err(error));
            assert!(matches!(volume.find("odd").await, Err(BadFile::NotFound(_))), "nothing is left");
        }
        let full = volume.create("large.img", 64 << 20).await.expect_err("too large");
        assert!(matches!(full, BadFile::Full { wanted, .. } if wanted == 64 << 20), "{full:?}");
        assert_eq!(volume.create("huge.img", 1 << 32).await, Err(BadFile::Large(1 << 32)));
        assert!(volume.create("a/b", 512).await.is_err());
        assert!(volume.create("base.img", 512).await.is_err(), "it is there already");
        assert_eq!(volume.find("base.img").await.expect("unharmed").sectors(), BASE_SECTORS);
    });
    let nothing = Device::new(vec![[0; SECTOR]; 64], 1).port();
    let mounted = wait(Volume::mount(nothing, own_page));
    assert_eq!(mounted.err(), Some(BadFile::NoFileSystem));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever is on a device: an answer, and nothing outside of it.
    #[test]
    fn damaged_file_systems_and_tables_harm_nobody(seed: u64, changes in 1..40u64) {
        let mut image = made(5);
        let mut random = Rng::with_seed(seed);
        for _ in 0..changes {
            // Mostly where what matters is: the table, the boot sector, the FAT, the directory.
            let sector = [0, 64, 65, 66, 68, 72, 80, 90][random.usize(..8)] + random.u64(..4);
            image[sector as usize][random.usize(..512)] = random.u8(..);
        }
        let table = &mut image[0];
        (table[510], table[511]) = (0x55, 0xaa);
        let device = Device::new(image, seed);
        wait(async {
            let mut blocks = Blocks::new(device.port(), own_page).expect("pages");
            for partition in storage::partitions::read(&mut blocks).await.unwrap_or_default() {
                assert!(partition.extents.runs().all(|(at, sectors)| at + sectors <= DEVICE as u64));
            }
            let Ok(mut volume) = Volume::mount(volume_disk(&device), own_page).await else { return };
            for name in ["base.img", "A long name.cow", "fill1", "none"] {
                if let Ok(extents) = volume.find(name).await {
                    assert!(extents.runs().all(|(at, sectors)| at + sectors <= DEVICE as u64 - 64));
                }
            }
            let _ = volume.create("new.img", 4096).await;
        });
    }
}

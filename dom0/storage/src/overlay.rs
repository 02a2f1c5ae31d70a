//! A disk that keeps what is written to it in a file of its own, over a base that is only read and that others may share.
//!
//! The file has a header, a bit for each sector, and room for every sector at its place:
//!
//! ```text
//! 0        header: what the disk is, and which base it belongs to
//! 8        one bit for each sector that the disk may have: it is in this file, not in the base
//! data     the sectors, from a multiple of 8 on
//! ```
//! So a write is one write, at its place, with nothing copied, and never lacks room. The price is a file as large as the disk.
//!
//! A disk grows at its end: the file gets longer, then its header says so. Sectors stay where they are, so there are bits from the
//! beginning for as many as there ever may be ([`GROWTH`] times those that it is made with, or more); those beyond its end are zeros on the disk.
//!
//! **What a flush promises.** A bit on the disk means that its sector is on the disk: after a failure of power a sector reads as it was
//! before its last write or as after it, never as what happened to lie in the file. So bits are only written behind a flush of the
//! sectors they speak of: a flush makes durable (1) all sectors that were written, (2) the bits of those, as they were when (1)
//! began, with a flush behind. If there are no new bits, (1) is all. A bit that is torn off by a failure is a sector whose flush was
//! not answered. Bits are never cleared.

use crate::extents::fail;
use crate::joint::Joint;
use crate::{NewPage, SECTOR, zero};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use blkback::disk::{Action, Disk, DiskError, Done, GuestPage, Job, Piece, Properties};
use core::fmt;
use core::task::{Context, Poll, Waker};
use hypercall_abi::PAGE_SIZE;

/// The first sector of the bits.
const TABLE: u64 = 8;
/// Bits in a sector of the table.
const BITS: u64 = SECTOR as u64 * 8;
/// Pages that bits are written from at once.
const PAGES: usize = 8;
const MAGIC: [u8; 8] = *b"XNLTHCOW";
const VERSION: u32 = 2;
/// The version whose headers do not say how many bits there are: they are those up to the data.
const WITHOUT_ROOM: u32 = 1;
/// So many times larger than it was made may a disk become.
pub const GROWTH: u64 = 8;
/// Largest disk, in sectors: its table takes 32 MiB of memory.
const MOST_SECTORS: u64 = 1 << 28;

/// Owners of jobs below: a part of a job in the base, a part in the file, a flush of sectors, bits, a flush of bits.
const IN_BASE: u32 = 0;
const IN_FILE: u32 = 1;
const SETTLE: u32 = 2;
const TELL: u32 = 3;
const SEAL: u32 = 4;

/// What a file says of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Sectors that it may have at most: there are bits for them.
    pub room: u64,
    /// Sectors of its base.
    pub base_sectors: u64,
    /// What the base is called, as a number ([`name_number`]).
    pub base: u64,
}

/// Why a file is none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadOverlay {
    /// It begins with something else.
    NotOne,
    /// It was made by something newer.
    Version(u32),
    /// Its header is damaged.
    Damaged,
    /// It was made over another base, or the base has another size.
    Base,
    /// It is shorter than it says.
    Short,
    /// The disk is smaller than its base, or too large.
    Size,
    /// It is to have more sectors than there are bits for: so many.
    Room(u64),
}

impl fmt::Display for BadOverlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOne => f.write_str("it is not a copy-on-write file: it begins with something else"),
            Self::Version(version) => {
                write!(f, "it is a copy-on-write file of version {version}: {VERSION} is known")
            }
            Self::Damaged => f.write_str("its header is damaged"),
            Self::Base => f.write_str("it was made over another base, or its base has changed its size"),
            Self::Short => f.write_str("it is shorter than its header says"),
            Self::Size => f.write_str("a disk is as large as its base or larger, and has at most 128 GiB"),
            Self::Room(sectors) => {
                write!(f, "it has room for a disk of {} bytes at most", sectors * SECTOR as u64)
            }
        }
    }
}

/// A name as a number (FNV-1a), to know it again.
#[must_use]
pub fn name_number(name: &str) -> u64 {
    checksum(name.as_bytes())
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Header {
    /// For a new disk, with room to grow.
    #[must_use]
    pub fn new(sectors: u64, base_sectors: u64, base: u64) -> Self {
        // As many as have bits before the data begins.
        let room = sectors.saturating_mul(GROWTH).checked_next_multiple_of(8 * BITS);
        let room = room.unwrap_or(MOST_SECTORS).min(MOST_SECTORS).max(sectors);
        Self { sectors, room, base_sectors, base }
    }

    /// The same disk, larger.
    ///
    /// # Errors
    /// [`BadOverlay::Room`], [`BadOverlay::Size`].
    pub fn grown(&self, sectors: u64) -> Result<Self, BadOverlay> {
        if sectors > self.room {
            return Err(BadOverlay::Room(self.room));
        }
        let grown = Self { sectors, ..*self };
        grown.check()?;
        Ok(grown)
    }

    /// Sectors of all bits.
    #[must_use]
    pub fn table_sectors(&self) -> u64 {
        self.room.div_ceil(BITS)
    }

    /// The first sector of the data.
    fn data(&self) -> u64 {
        (TABLE + self.table_sectors()).next_multiple_of(8)
    }

    /// Sectors that the file has.
    #[must_use]
    pub fn file_sectors(&self) -> u64 {
        self.data() + self.sectors
    }

    /// Whether a disk may be so.
    ///
    /// # Errors
    /// [`BadOverlay::Size`].
    pub fn check(&self) -> Result<(), BadOverlay> {
        let fits = self.sectors > 0 && self.sectors <= self.room && self.base_sectors <= self.sectors;
        if fits && self.room <= MOST_SECTORS { Ok(()) } else { Err(BadOverlay::Size) }
    }

    /// The first sector of the file.
    #[must_use]
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            if let Some(to) = bytes.get_mut(at..at + part.len()) {
                to.copy_from_slice(part);
            }
            at += part.len();
        };
        put(&MAGIC);
        put(&u64::from(VERSION).to_le_bytes());
        for number in [self.sectors, self.base_sectors, self.base, self.room] {
            put(&number.to_le_bytes());
        }
        let sum = checksum(bytes.get(..48).unwrap_or(&[]));
        if let Some(to) = bytes.get_mut(48..56) {
            to.copy_from_slice(&sum.to_le_bytes());
        }
        bytes
    }

    /// Reads the first sector of a file of `file_sectors`; `None` when it is all zeros: the file was being made when its making ended.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8; SECTOR], file_sectors: u64) -> Result<Option<Self>, BadOverlay> {
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let number = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(bytes.get(at..at + 8).unwrap_or(&[0; 8]));
            u64::from_le_bytes(value)
        };
        if bytes.get(..8) != Some(&MAGIC) {
            return Err(BadOverlay::NotOne);
        }
        let sealed = |bytes_of: usize| number(bytes_of) == checksum(bytes.get(..bytes_of).unwrap_or(&[]));
        let (sectors, base_sectors, base) = (number(16), number(24), number(32));
        let room = match number(8) as u32 {
            VERSION if sealed(48) => number(40),
            // Its data begins at a multiple of 8, and what lies between is zeros.
            WITHOUT_ROOM if sealed(40) && sectors <= MOST_SECTORS => {
                let data = (TABLE + sectors.div_ceil(BITS)).next_multiple_of(8);
                ((data - TABLE) * BITS).min(MOST_SECTORS.max(sectors))
            }
            VERSION | WITHOUT_ROOM => return Err(BadOverlay::Damaged),
            version => return Err(BadOverlay::Version(version)),
        };
        let header = Self { sectors, room, base_sectors, base };
        header.check()?;
        if header.file_sectors() > file_sectors {
            return Err(BadOverlay::Short);
        }
        Ok(Some(header))
    }
}

/// Which sectors are in the file, and which of that is not on the disk.
#[derive(Debug)]
struct Table {
    words: Vec<u64>,
    /// Sectors of the table that differ from the disk's, in order, each once.
    stale: Vec<u32>,
    is_stale: Vec<bool>,
}

const WORDS: usize = SECTOR / 8;

impl Table {
    fn new(bytes: &[u8]) -> Self {
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        let words: Vec<u64> = bytes.chunks(8).map(word).collect();
        let sectors = words.len().div_ceil(WORDS);
        Self { words, stale: Vec::new(), is_stale: alloc::vec![false; sectors] }
    }

    /// Has bits for so many sectors; those that are new are not in the file.
    fn grow(&mut self, sectors: u64) {
        let count = sectors.div_ceil(BITS) as usize;
        if count > self.is_stale.len() {
            self.words.resize(count * WORDS, 0);
            self.is_stale.resize(count, false);
        }
    }

    fn has(&self, sector: u64) -> bool {
        self.words.get((sector / 64) as usize).is_some_and(|word| word & 1 << (sector % 64) != 0)
    }

    /// How many sectors from one on, `most` at most, are where it is.
    fn run(&self, sector: u64, most: u64) -> (bool, u64) {
        let has = self.has(sector);
        let mut count = 1;
        while count < most {
            let at = sector + count;
            let word = self.words.get((at / 64) as usize).copied().unwrap_or(0);
            let word = if has { !word } else { word } >> (at % 64);
            let same = u64::from(word.trailing_zeros()).min(64 - at % 64);
            count += same;
            if word != 0 {
                break;
            }
        }
        (has, count.min(most))
    }

    fn set(&mut self, sector: u64, sectors: u64) {
        let mut at = sector;
        let end = sector + sectors;
        while at < end {
            let now = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - now)) << (at % 64);
            if let Some(word) = self.words.get_mut((at / 64) as usize)
                && *word & mask != mask
            {
                *word |= mask;
                self.mark((at / BITS) as u32);
            }
            at += now;
        }
    }

    fn mark(&mut self, number: u32) {
        if let Some(stale) = self.is_stale.get_mut(number as usize)
            && !core::mem::replace(stale, true)
        {
            self.stale.push(number);
        }
    }

    /// The sectors that are to be written, as they are; they count as written.
    fn take(&mut self) -> VecDeque<(u32, Vec<u8>)> {
        let mut stale = core::mem::take(&mut self.stale);
        stale.sort_unstable();
        for &number in &stale {
            if let Some(flag) = self.is_stale.get_mut(number as usize) {
                *flag = false;
            }
        }
        let bytes = |number: u32| {
            let words = self.words.iter().skip(number as usize * WORDS).take(WORDS);
            let mut bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
            bytes.resize(SECTOR, 0);
            bytes
        };
        stale.iter().map(|&number| (number, bytes(number))).collect()
    }
}

/// Flushes that are answered together.
struct Flushing<P> {
    jobs: Vec<Job<P>>,
    /// Sectors of the table that are still to be written.
    bits: VecDeque<(u32, Vec<u8>)>,
    /// All of them, should it fail.
    taken: Vec<u32>,
    /// Jobs below that are not done.
    open: u32,
    sealed: bool,
    result: Result<(), DiskError>,
}

/// Such a disk: `base` below, `file` for what is written.
pub struct Overlay<P, B, F> {
    base: B,
    file: F,
    header: Header,
    table: Table,
    joint: Joint<P>,
    /// Flushes that came while others were under way.
    waiting: Vec<Job<P>>,
    flushing: Option<Flushing<P>>,
    /// Pages that bits are written from.
    pages: Vec<P>,
    ready: VecDeque<Done<P>>,
    waker: Option<Waker>,
}

impl<P, B, F> fmt::Debug for Overlay<P, B, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Bytes of the table of a disk as far as it has sectors now, as they are read from its file from sector [`TABLE_SECTOR`] on.
#[must_use]
pub fn table_bytes(header: &Header) -> usize {
    header.sectors.div_ceil(BITS) as usize * SECTOR
}

/// Where a file has its table.
pub const TABLE_SECTOR: u64 = TABLE;

impl<P: GuestPage, B: Disk<P>, F: Disk<P>> Overlay<P, B, F> {
    /// A disk with this header and table in `file`.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] when there is no memory for the pages that it needs.
    pub fn new(
        base: B,
        file: F,
        header: Header,
        table: &[u8],
        new_page: NewPage<P>,
    ) -> Result<Self, DiskError> {
        let mut pages = Vec::with_capacity(PAGES);
        for _ in 0..PAGES {
            pages.push(new_page().ok_or(DiskError::NoSpace)?);
        }
        Ok(Self {
            base,
            file,
            header,
            table: Table::new(table),
            joint: Joint::default(),
            waiting: Vec::new(),
            flushing: None,
            pages,
            ready: VecDeque::new(),
            waker: None,
        })
    }

    /// What its file says of it.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The disk behind it that is written to.
    pub fn file_mut(&mut self) -> &mut F {
        &mut self.file
    }

    /// Has it grow as its file has: `header` says how large it is ([`Header::grown`]), and is on the disk.
    ///
    /// # Errors
    /// [`BadOverlay::Short`] when its file has not grown, [`BadOverlay::Size`] when it would become smaller.
    pub fn grow(&mut self, header: Header) -> Result<(), BadOverlay> {
        if header.sectors < self.header.sectors || header.room != self.header.room {
            return Err(BadOverlay::Size);
        }
        if self.file.properties().sectors < header.file_sectors() {
            return Err(BadOverlay::Short);
        }
        self.table.grow(header.sectors);
        self.header = header;
        Ok(())
    }

    fn read(&mut self, job: Job<P>) {
        let sectors = job.pieces.iter().map(|piece| u64::from(piece.bytes)).sum::<u64>() / SECTOR as u64;
        let (sector, data) = (job.sector, self.header.data());
        let number = self.joint.begin(job);
        let (has, all) = self.table.run(sector, sectors);
        if has && all == sectors {
            let whole = self.joint.whole(number, IN_FILE, data + sector);
            self.below(whole);
        } else if !has && all == sectors && sector + sectors <= self.header.base_sectors {
            let whole = self.joint.whole(number, IN_BASE, sector);
            self.below(whole);
        } else {
            let mut skip = 0;
            while skip < sectors {
                let at = sector + skip;
                let (has, run) = self.table.run(at, sectors - skip);
                let in_base = self.header.base_sectors.saturating_sub(at);
                let now = if has || in_base == 0 { run } else { run.min(in_base) };
                if has {
                    let part = self.joint.part(number, IN_FILE, data + at, skip, now);
                    self.below(part);
                } else if in_base > 0 {
                    let part = self.joint.part(number, IN_BASE, at, skip, now);
                    self.below(part);
                } else {
                    self.joint.pages(number, skip, now, zero);
                }
                skip += now;
            }
        }
        let done = self.joint.finish(number);
        self.ready.extend(done);
    }

    /// Hands a job to where its owner says.
    fn below(&mut self, job: Option<Job<P>>) {
        let Some(job) = job else { return };
        let done = if job.owner.0 == IN_BASE { self.base.submit(job) } else { self.file.submit(job) };
        if let Some(done) = done {
            self.landed(done);
        }
    }

    /// Something that was done below.
    fn landed(&mut self, done: Done<P>) {
        let (kind, number) = done.job.owner;
        match kind {
            IN_BASE | IN_FILE => {
                if let Some(done) = self.joint.land(done) {
                    self.over(done);
                }
            }
            _ => {
                if let Some(flushing) = &mut self.flushing {
                    flushing.open -= 1;
                    flushing.result = flushing.result.and(done.result);
                }
                let _ = number;
                self.step(kind);
            }
        }
    }

    /// A job of the front end is done.
    fn over(&mut self, done: Done<P>) {
        if done.job.action == Action::Write && done.result.is_ok() {
            let bytes = done.job.pieces.iter().map(|piece| u64::from(piece.bytes)).sum::<u64>();
            self.table.set(done.job.sector, bytes / SECTOR as u64);
        }
        self.ready.push_back(done);
    }

    /// Begins to flush for all that wait for it, if nobody flushes.
    fn begin_flush(&mut self) {
        if self.flushing.is_some() || self.waiting.is_empty() {
            return;
        }
        let bits = self.table.take();
        self.flushing = Some(Flushing {
            jobs: core::mem::take(&mut self.waiting),
            taken: bits.iter().map(|(number, _)| *number).collect(),
            bits,
            open: 1,
            sealed: false,
            result: Ok(()),
        });
        self.below(Some(flush(SETTLE)));
    }

    /// What follows when a job of a flush is done.
    fn step(&mut self, kind: u32) {
        let Some(flushing) = &mut self.flushing else { return };
        if flushing.open > 0 {
            return;
        }
        if flushing.result.is_ok() && !flushing.bits.is_empty() {
            return self.tell();
        }
        if flushing.result.is_ok() && kind == TELL && !flushing.sealed {
            flushing.sealed = true;
            flushing.open = 1;
            return self.below(Some(flush(SEAL)));
        }
        let Some(flushing) = self.flushing.take() else { return };
        if flushing.result.is_err() {
            // Whatever is on the disk, it has to be written again.
            flushing.taken.iter().for_each(|&number| self.table.mark(number));
        }
        let done = flushing.jobs.into_iter().map(|job| Done { job, result: flushing.result });
        self.ready.extend(done);
        self.begin_flush();
    }

    /// Writes some of the bits: a job for each run of sectors of the table, from pages that no job has.
    fn tell(&mut self) {
        let mut jobs: Vec<Job<P>> = Vec::new();
        {
            let Some(flushing) = &mut self.flushing else { return };
            let mut places = self
                .pages
                .iter()
                .flat_map(|page| (0..PAGE_SIZE).step_by(SECTOR).map(move |offset| (page, offset)));
            while !flushing.bits.is_empty()
                && let Some((page, offset)) = places.next()
                && let Some((number, bytes)) = flushing.bits.pop_front()
            {
                page.write_bytes(offset, &bytes);
                let sector = TABLE + u64::from(number);
                let piece = Piece { page: page.clone(), offset: offset as u16, bytes: SECTOR as u16 };
                match jobs.last_mut() {
                    Some(job) if job.sector + job.pieces.len() as u64 == sector => job.pieces.push(piece),
                    _ => jobs.push(Job {
                        owner: (TELL, 0),
                        action: Action::Write,
                        sector,
                        pieces: Vec::from([piece]),
                    }),
                }
            }
            // One for this loop: what is done at once shall not go on before all are handed on.
            flushing.open = jobs.len() as u32 + 1;
        }
        for job in jobs {
            self.below(Some(job));
        }
        if let Some(flushing) = &mut self.flushing {
            flushing.open -= 1;
        }
        self.step(TELL);
    }
}

fn flush<P>(kind: u32) -> Job<P> {
    Job { owner: (kind, 0), action: Action::Flush, sector: 0, pieces: Vec::new() }
}

impl<P: GuestPage, B: Disk<P>, F: Disk<P>> Disk<P> for Overlay<P, B, F> {
    fn properties(&self) -> Properties {
        let file = self.file.properties();
        Properties {
            sectors: self.header.sectors,
            readonly: file.readonly,
            discard_granularity: None,
            physical_sector: file.physical_sector,
        }
    }

    fn submit(&mut self, job: Job<P>) -> Option<Done<P>> {
        let owner = job.owner;
        match job.action {
            Action::Read => self.read(job),
            Action::Write => {
                let sector = self.header.data() + job.sector;
                let number = self.joint.begin(job);
                let whole = self.joint.whole(number, IN_FILE, sector);
                self.below(whole);
                if let Some(done) = self.joint.finish(number) {
                    self.over(done);
                }
            }
            Action::Flush => {
                self.waiting.push(job);
                self.begin_flush();
            }
            Action::Discard { .. } => {
                let number = self.joint.begin(job);
                let done = fail(&mut self.joint, number, DiskError::Unsupported);
                self.ready.extend(done);
            }
        }
        let own = self.ready.iter().position(|done| done.job.owner == owner);
        let done = own.and_then(|own| self.ready.remove(own));
        // What others wait for is found by them.
        if !self.ready.is_empty()
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
        done
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<P>> {
        loop {
            if let Some(done) = self.ready.pop_front() {
                return Poll::Ready(done);
            }
            let mut any = false;
            while let Poll::Ready(done) = self.base.poll_done(context) {
                self.landed(done);
                any = true;
            }
            while let Poll::Ready(done) = self.file.poll_done(context) {
                self.landed(done);
                any = true;
            }
            if !any {
                match &self.waker {
                    Some(waker) if waker.will_wake(context.waker()) => {}
                    _ => self.waker = Some(context.waker().clone()),
                }
                return Poll::Pending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BadOverlay, Header, SECTOR, Table};
    use std::vec::Vec;

    const HEADER: Header = Header { sectors: 10_000, room: 10_000, base_sectors: 9_999, base: 7 };

    #[test]
    fn a_header_is_read_as_it_was_written_or_refused() {
        let bytes = HEADER.encode();
        let whole = HEADER.file_sectors();
        assert_eq!(whole, 16 + 10_000, "3 sectors of bits, data from a multiple of 8 on");
        assert_eq!(Header::decode(&bytes, whole), Ok(Some(HEADER)));
        assert_eq!(Header::decode(&bytes, whole - 1), Err(BadOverlay::Short));
        assert_eq!(Header::decode(&[0; SECTOR], whole), Ok(None));
        for at in 0..56 {
            let mut bytes = bytes;
            bytes[at] ^= 0x10;
            assert!(Header::decode(&bytes, whole).is_err(), "byte {at}");
        }
        for (sectors, base_sectors) in [(0, 0), (9, 10), (u64::MAX, 1), ((1 << 28) + 1, 0)] {
            let bytes = Header { sectors, room: sectors, base_sectors, base: 0 }.encode();
            assert_eq!(Header::decode(&bytes, u64::MAX), Err(BadOverlay::Size));
        }
        let bytes = Header { room: HEADER.sectors - 1, ..HEADER }.encode();
        assert_eq!(Header::decode(&bytes, u64::MAX), Err(BadOverlay::Size));
    }

    /// As the first version wrote it.
    fn without_room(sectors: u64, base_sectors: u64, base: u64) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        bytes[..8].copy_from_slice(&super::MAGIC);
        for (to, number) in bytes[8..40].chunks_mut(8).zip([1, sectors, base_sectors, base]) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        let sum = super::checksum(&bytes[..40]);
        bytes[40..48].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_of_the_first_version_has_the_room_that_its_file_has() {
        let old = Header::decode(&without_room(10_000, 9_999, 7), 16 + 10_000).unwrap().unwrap();
        assert_eq!(old, Header { room: 8 * super::BITS, ..HEADER });
        assert_eq!(old.file_sectors(), HEADER.file_sectors(), "its data is where it was");
        assert_eq!(Header::decode(&old.encode(), 16 + 10_000), Ok(Some(old)));
        let grown = old.grown(30_000).unwrap();
        assert_eq!(grown.file_sectors() - grown.sectors, old.file_sectors() - old.sectors);
        assert_eq!(old.grown(8 * super::BITS + 1), Err(BadOverlay::Room(8 * super::BITS)));
    }

    #[test]
    fn a_disk_grows_without_moving() {
        let new = Header::new(10_000, 9_999, 7);
        assert_eq!((new.room, new.file_sectors()), (98_304, 32 + 10_000));
        let grown = new.grown(98_304).unwrap();
        assert_eq!(grown.file_sectors() - new.file_sectors(), 88_304);
        assert_eq!(new.grown(98_305), Err(BadOverlay::Room(98_304)));
        assert_eq!(new.grown(9_998), Err(BadOverlay::Size), "smaller than its base");
        let large = Header::new(super::MOST_SECTORS, 0, 7);
        assert_eq!(large.room, super::MOST_SECTORS);
    }

    #[test]
    fn runs_of_sectors_are_as_if_counted() {
        let mut table = Table::new(&[0; 2 * SECTOR]);
        let mut model = std::vec![false; 2 * SECTOR * 8];
        for (sector, sectors) in [(3, 1), (60, 10), (127, 1), (128, 64), (4090, 12), (7000, 1), (8191, 1)] {
            table.set(sector, sectors);
            model[sector as usize..(sector + sectors) as usize].fill(true);
        }
        for sector in 0..model.len() {
            let has = model[sector];
            for most in [1, 2, 7, 64, 65, 300, 5000] {
                let end = (sector + most).min(model.len());
                let run = model[sector..end].iter().take_while(|&&other| other == has).count();
                let (found, count) = table.run(sector as u64, (end - sector) as u64);
                assert_eq!((found, count), (has, run as u64), "{sector}, {most} at most");
            }
        }
    }

    #[test]
    fn a_table_that_grows_keeps_its_bits() {
        let mut table = Table::new(&[0; SECTOR]);
        table.set(4000, 96);
        assert_eq!(table.take().len(), 1);
        table.grow(2 * super::BITS + 1);
        assert!(table.has(4095) && !table.has(4096));
        assert_eq!(table.run(4090, 1000), (true, 6));
        table.set(4096, 2);
        table.set(2 * super::BITS, 1);
        let taken: Vec<u32> = table.take().iter().map(|(number, _)| *number).collect();
        assert_eq!(taken, [1, 2]);
    }

    #[test]
    fn only_new_bits_are_written() {
        let mut table = Table::new(&[0; 3 * SECTOR]);
        table.set(9000, 1);
        table.set(4095, 2);
        let taken: Vec<u32> = table.take().iter().map(|(number, _)| *number).collect();
        assert_eq!(taken, [0, 1, 2]);
        assert!(table.take().is_empty());
        table.set(4095, 2);
        assert!(table.take().is_empty(), "they are there already");
        table.set(4000, 1);
        let taken = table.take();
        assert_eq!((taken.len(), taken[0].0, taken[0].1[500], taken[0].1[511]), (1, 0, 1, 0x80));
    }
}

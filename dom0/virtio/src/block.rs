//! Disks (5.2): requests of many segments, several at a time.

use crate::queue::{DESCRIPTOR, Queue};
use crate::transport::{Doorbell, Transport, Vectors, feature};
use crate::{Device, DmaPage, Error, Fault, Platform, Segment};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;
use guest_sdk::ring::SharedPage as _;

/// Bytes of a sector, whatever the disk's own blocks are.
pub const SECTOR: u64 = 512;

/// Features of disks (5.2.3).
const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLOCK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const WANTED: u64 = SIZE_MAX
    | SEG_MAX
    | READ_ONLY
    | BLOCK_SIZE
    | FLUSH
    | TOPOLOGY
    | DISCARD
    | WRITE_ZEROES
    | feature::INDIRECT
    | feature::EVENT_INDEX;

/// Kinds of requests (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const DO_FLUSH: u32 = 4;
const DO_DISCARD: u32 = 11;
const DO_WRITE_ZEROES: u32 = 13;
/// Of a request for zeros: the sectors need not keep their place on the medium.
const UNMAP: u32 = 1;

/// The byte in which a device says how a request went.
const STATUS_OK: u8 = 0;
const STATUS_UNSUPPORTED: u8 = 2;
/// What is there before the device has written it.
const STATUS_NONE: u8 = 0xff;

/// Requests under way at most.
pub const MOST_REQUESTS: usize = 64;
/// What a request has of a page: two share one.
const SLOT: usize = 2048;
/// In a slot: the request's head, the range of a discard, the byte for its status, and its table of descriptors.
const HEAD: usize = 0;
const RANGE: usize = 16;
const STATUS: usize = 32;
const TABLE: usize = 48;
const HEAD_BYTES: u32 = 16;
/// Segments of a request at most: its table has head and status in it, too.
pub const MOST_SEGMENTS: usize = (SLOT - TABLE) / DESCRIPTOR - 2;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// From disk to memory.
    Read,
    /// From memory to disk.
    Write,
    /// All writes that were completed before it was submitted are durable when it completes.
    Flush,
    /// The content of so many sectors may be forgotten.
    Discard {
        /// How many.
        sectors: u32,
    },
    /// So many sectors become zeros.
    WriteZeroes {
        /// How many.
        sectors: u32,
        /// They need not keep their place on the medium.
        unmap: bool,
    },
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What.
    pub action: Action,
    /// The first sector (of 512 bytes).
    pub sector: u64,
    /// Where the data is, of reads and writes: whole sectors together, at most [`Geometry::segments`] pieces once those that are side by
    /// side in the machine are counted as one.
    pub segments: &'a [Segment],
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// As many as can be are under way: after the next completion there is room.
    Full,
    /// The disk does not do this.
    Unsupported,
    /// It is only to be read.
    ReadOnly,
    /// It is not on the disk.
    Range,
    /// Its segments are none, too many, too long, or no whole sectors.
    Shape,
    /// The disk is broken for good.
    Broken,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "as many requests as can be are under way",
            Self::Unsupported => "the disk does not do this",
            Self::ReadOnly => "the disk is only to be read",
            Self::Range => "the disk is not that large",
            Self::Shape => "the memory for it has no shape that the disk can use",
            Self::Broken => "the disk is broken",
        })
    }
}

impl core::error::Error for Rejected {}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// The device could not do it.
    Failed,
    /// The device does not do such things.
    Unsupported,
    /// The device broke while it was under way: whether a write reached the disk is not known.
    Reset,
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed => "the disk could not do it",
            Self::Unsupported => "the disk does not do this",
            Self::Reset => "the disk was reset meanwhile",
        })
    }
}

impl core::error::Error for IoError {}

/// What sectors may be forgotten, or made zeros, at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    /// How many at most.
    pub sectors: u32,
    /// A multiple of so many is worth it.
    pub alignment: u32,
}

/// What a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// It is only to be read.
    pub readonly: bool,
    /// It has a cache, and [`Action::Flush`] empties it. Without, what was written is durable.
    pub flush: bool,
    /// [`Action::Discard`], if there is.
    pub discard: Option<Trim>,
    /// [`Action::WriteZeroes`], if there is: sectors at most.
    pub write_zeroes: Option<u32>,
    /// Bytes of its own blocks, a multiple of 512.
    pub physical_sector: u32,
    /// Segments of a request at most.
    pub segments: usize,
    /// Bytes of a segment at most.
    pub segment_bytes: u32,
    /// Requests under way at most.
    pub requests: usize,
}

/// A request's place: half a page for what the device is told of it, and who asked.
struct Slot<T> {
    tag: Option<T>,
    /// Sectors that it reads, and that it writes.
    sectors: [u64; 2],
    /// The [`Block::tick`] before it was submitted.
    tick: u32,
}

/// What one user of a disk has written and not had flushed, as far as a flush has to know it.
///
/// A device that is reset may lose what it had not made durable, and its next flush succeeds all the same. So a user's flush fails when a
/// write before it was completed before a reset: then it is the user who has to write again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unflushed {
    /// How often the device had been reset when the first of these writes was completed.
    first: Option<u32>,
}

impl Unflushed {
    /// A write was completed by a device that has been reset so often ([`Counters::revivals`]).
    pub fn wrote(&mut self, revivals: u32) {
        self.first.get_or_insert(revivals);
    }

    /// A flush begins: what it covers, together with what it covers already, is taken out.
    pub fn begin(&mut self, covered: &mut Unflushed) {
        // What is covered already is older.
        covered.first = covered.first.or(self.first.take());
    }

    /// Whether a flush that was completed by a device that has been reset so often made durable what it covers.
    #[must_use]
    pub fn is_durable(self, revivals: u32) -> bool {
        self.first.is_none_or(|first| first == revivals)
    }
}

/// What went over a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests that were completed.
    pub requests: u64,
    /// Of these, failed.
    pub errors: u64,
    /// Sectors read.
    pub sectors_read: u64,
    /// Sectors written.
    pub sectors_written: u64,
    /// Times that the device was told of requests.
    pub kicks: u64,
}

/// A disk. `T` is what a request is known by; it owns the request's memory.
pub struct Block<P: Platform, T> {
    // Dropped first: it cuts the device off from the memory behind it.
    device: Device<P>,
    geometry: Geometry,
    queue: Queue<P::Page>,
    doorbell: Doorbell,
    pages: Vec<P::Page>,
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    /// The slot of a chain, by its number in the queue.
    owners: Vec<u16>,
    /// What a reset gave back.
    returned: VecDeque<(T, Result<(), IoError>)>,
    /// Segments of the request that is being submitted.
    read: Vec<Segment>,
    write: Vec<Segment>,
    tick: u32,
    counters: Counters,
}

impl<P: Platform, T> fmt::Debug for Block<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl<P: Platform, T> Block<P, T> {
    /// Brings a disk up.
    ///
    /// # Errors
    /// When it cannot be used; it can reach no memory then.
    pub fn start(transport: Transport<P>, vectors: Vectors) -> Result<Self, Error> {
        let device = Device::start(transport, vectors, WANTED)?;
        let queue = device.make_queue(0)?;
        let doorbell = device.set_queue(0, &queue)?;
        let geometry = Self::geometry_of(&device, &queue);
        let pages = (0..geometry.requests.div_ceil(4096 / SLOT)).map(|_| device.transport().page());
        let pages = pages.collect::<Result<Vec<_>, Error>>()?;
        let owners = alloc::vec![0; usize::from(queue.size())];
        device.transport().go();
        Ok(Self {
            slots: (0..geometry.requests).map(|_| Slot { tag: None, sectors: [0; 2], tick: 0 }).collect(),
            free: (0..geometry.requests as u16).rev().collect(),
            device,
            geometry,
            queue,
            doorbell,
            pages,
            owners,
            returned: VecDeque::new(),
            read: Vec::new(),
            write: Vec::new(),
            tick: 0,
            counters: Counters::default(),
        })
    }

    fn geometry_of(device: &Device<P>, queue: &Queue<P::Page>) -> Geometry {
        let has = |feature: u64| device.has(feature);
        let writable = !has(READ_ONLY);
        let size = usize::from(queue.size());
        let (chain, requests) = if has(feature::INDIRECT) {
            (size.min(MOST_SEGMENTS + 2), size)
        } else {
            // Head, status, and a segment at least each.
            (size, size / 3)
        };
        device.transport().own(|own| {
            let segments = if has(SEG_MAX) { own.u32(12).max(1) as usize } else { 1 };
            let physical = if has(BLOCK_SIZE) { own.u32(20) } else { 512 };
            let physical = physical.checked_shl(if has(TOPOLOGY) { own.u8(24).into() } else { 0 });
            let physical = physical.filter(|bytes| bytes.is_power_of_two() && *bytes >= 512);
            let discard = Trim { sectors: own.u32(36), alignment: own.u32(44).max(1) };
            let zeroes = own.u32(48);
            Geometry {
                sectors: own.u64(0).min(u64::MAX / SECTOR),
                readonly: has(READ_ONLY),
                flush: has(FLUSH),
                discard: Some(discard)
                    .filter(|trim| writable && has(DISCARD) && trim.sectors > 0 && own.u32(40) > 0),
                write_zeroes: Some(zeroes)
                    .filter(|zeroes| writable && has(WRITE_ZEROES) && *zeroes > 0 && own.u32(52) > 0),
                physical_sector: physical.unwrap_or(512),
                segments: segments.min(chain.saturating_sub(2)).min(MOST_SEGMENTS),
                segment_bytes: if has(SIZE_MAX) { own.u32(8).max(512) } else { 1 << 20 },
                requests: requests.clamp(1, MOST_REQUESTS),
            }
        })
    }

    /// What the disk is.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What it has as any device.
    #[must_use]
    pub fn device(&self) -> &Device<P> {
        &self.device
    }

    /// The same, to take its fault.
    pub fn device_mut(&mut self) -> &mut Device<P> {
        &mut self.device
    }

    /// What went over it.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many requests are under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether the disk would take this, if it had room.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, request: &Request<'_>) -> Result<(), Rejected> {
        self.judge(request).map(drop)
    }

    /// As [`Block::check`]; how many sectors it reads or writes.
    fn judge(&self, request: &Request<'_>) -> Result<u64, Rejected> {
        let geometry = &self.geometry;
        if self.device.is_broken() {
            return Err(Rejected::Broken);
        }
        let writes = !matches!(request.action, Action::Read | Action::Flush);
        if writes && geometry.readonly {
            return Err(Rejected::ReadOnly);
        }
        let sectors = match request.action {
            Action::Read | Action::Write => {
                let (mut bytes, mut misshapen) = (0, false);
                for segment in request.segments {
                    bytes += u64::from(segment.bytes);
                    misshapen |= segment.bytes == 0 || segment.bytes > geometry.segment_bytes;
                }
                if bytes == 0 || !bytes.is_multiple_of(SECTOR) || misshapen {
                    return Err(Rejected::Shape);
                }
                bytes / SECTOR
            }
            Action::Flush => return if geometry.flush { Ok(0) } else { Err(Rejected::Unsupported) },
            Action::Discard { sectors } => match geometry.discard {
                Some(trim) if sectors > 0 && sectors <= trim.sectors => u64::from(sectors),
                Some(_) => return Err(Rejected::Shape),
                None => return Err(Rejected::Unsupported),
            },
            Action::WriteZeroes { sectors, .. } => match geometry.write_zeroes {
                Some(most) if sectors > 0 && sectors <= most => u64::from(sectors),
                Some(_) => return Err(Rejected::Shape),
                None => return Err(Rejected::Unsupported),
            },
        };
        match request.sector.checked_add(sectors) {
            Some(end) if end <= geometry.sectors => Ok(sectors),
            _ => Err(Rejected::Range),
        }
    }

    /// Takes a request; the device is told of it by [`Block::kick`]. Its memory is the device's until `tag` comes back from
    /// [`Block::completion`].
    ///
    /// # Errors
    /// Why not, and the tag.
    pub fn submit(&mut self, request: &Request<'_>, tag: T) -> Result<(), (Rejected, T)> {
        let sectors = match self.judge(request) {
            Ok(sectors) => sectors,
            Err(rejected) => return Err((rejected, tag)),
        };
        let Some(slot) = self.free.last().copied() else { return Err((Rejected::Full, tag)) };
        match self.enter(request, slot) {
            Ok(head) => {
                self.free.pop();
                if let (Some(owner), Some(slot_of)) =
                    (self.owners.get_mut(usize::from(head)), self.slots.get_mut(usize::from(slot)))
                {
                    *owner = slot;
                    slot_of.tag = Some(tag);
                    slot_of.tick = self.tick;
                    slot_of.sectors = match request.action {
                        Action::Read => [sectors, 0],
                        Action::Write => [0, sectors],
                        _ => [0; 2],
                    };
                }
                Ok(())
            }
            Err(rejected) => Err((rejected, tag)),
        }
    }

    /// Writes what the device is told of a request, and queues it.
    fn enter(&mut self, request: &Request<'_>, slot: u16) -> Result<u16, Rejected> {
        let (page, at) = place(&self.pages, slot).ok_or(Rejected::Broken)?;
        let here = |offset: usize, bytes: u32| Segment {
            address: page.machine_address() + (at + offset) as u64,
            bytes,
        };
        let (kind, range) = match request.action {
            Action::Read => (IN, None),
            Action::Write => (OUT, None),
            Action::Flush => (DO_FLUSH, None),
            Action::Discard { sectors } => (DO_DISCARD, Some((sectors, 0))),
            Action::WriteZeroes { sectors, unmap } => {
                (DO_WRITE_ZEROES, Some((sectors, if unmap { UNMAP } else { 0 })))
            }
        };
        let sector = if matches!(kind, IN | OUT) { request.sector } else { 0 };
        store(page, at + HEAD, [kind, 0, sector as u32, (sector >> 32) as u32]);
        page.word(at + STATUS).store(STATUS_NONE.into(), Ordering::Relaxed);
        self.read.clear();
        self.write.clear();
        self.read.push(here(HEAD, HEAD_BYTES));
        if let Some((sectors, flags)) = range {
            let sector = request.sector;
            store(page, at + RANGE, [sector as u32, (sector >> 32) as u32, sectors, flags]);
            self.read.push(here(RANGE, 16));
        }
        let data = if request.action == Action::Read { &mut self.write } else { &mut self.read };
        let before = data.len();
        if matches!(kind, IN | OUT) {
            request.segments.iter().for_each(|segment| {
                join(data, before, *segment, self.geometry.segment_bytes);
            });
        }
        if data.len() - before > self.geometry.segments {
            return Err(Rejected::Shape);
        }
        self.write.push(here(STATUS, 1));
        let head = if self.device.has(feature::INDIRECT) {
            self.queue.add_indirect(page, at + TABLE, &self.read, &self.write)
        } else {
            self.queue.add(&self.read, &self.write)
        };
        head.ok_or(Rejected::Full)
    }

    /// Tells the device of all that was submitted, if it has to be told.
    pub fn kick(&mut self) {
        if self.queue.show() {
            self.counters.kicks += 1;
            self.device.transport().ring(self.doorbell);
        }
    }

    /// The next request that is done. When there is none, [`Block::listen`] before waiting for an interrupt.
    pub fn completion(&mut self) -> Option<(T, Result<(), IoError>)> {
        loop {
            if let Some(returned) = self.returned.pop_front() {
                return Some(returned);
            }
            if self.device.is_broken() {
                return None;
            }
            match self.queue.take() {
                Ok(None) => return None,
                Ok(Some((head, _))) => {
                    let slot = self.owners.get(usize::from(head)).copied()?;
                    let tag = self.slots.get_mut(usize::from(slot)).and_then(|slot| slot.tag.take());
                    let (Some(tag), Some((page, at))) = (tag, place(&self.pages, slot)) else {
                        // A number under way has an owner: the queue has seen to that.
                        continue;
                    };
                    self.free.push(slot);
                    let result = match page.word(at + STATUS).load(Ordering::Relaxed) as u8 {
                        STATUS_OK => Ok(()),
                        STATUS_UNSUPPORTED => Err(IoError::Unsupported),
                        _ => Err(IoError::Failed),
                    };
                    self.count(slot, result.is_ok());
                    return Some((tag, result));
                }
                Err(fault) => self.fail(fault),
            }
        }
    }

    fn count(&mut self, slot: u16, done: bool) {
        let counters = &mut self.counters;
        counters.requests += 1;
        if !done {
            counters.errors += 1;
        } else if let Some(slot) = self.slots.get(usize::from(slot)) {
            counters.sectors_read += slot.sectors[0];
            counters.sectors_written += slot.sectors[1];
        }
    }

    /// Asks for an interrupt at the next completion; true when one is there already.
    #[must_use]
    pub fn listen(&mut self) -> bool {
        !self.returned.is_empty() || !self.device.is_broken() && self.queue.listen()
    }

    /// Looks at what an interrupt for changes of its configuration is about: whether the device is well, and how large the disk is. True when
    /// its size has changed.
    pub fn changed(&mut self) -> bool {
        if self.device.is_broken() {
            return false;
        }
        if let Err(fault) = self.device.transport().check() {
            self.fail(fault);
            return false;
        }
        let sectors = self.device.transport().own(|own| own.u64(0)).min(u64::MAX / SECTOR);
        core::mem::replace(&mut self.geometry.sectors, sectors) != sectors
    }

    /// Some time has passed: called at a regular beat. A device that has not answered a request after `most` of them is reset, and what was
    /// under way comes back.
    pub fn tick(&mut self, most: u32) {
        self.tick = self.tick.wrapping_add(1);
        let now = self.tick;
        let late = |slot: &Slot<T>| slot.tag.is_some() && now.wrapping_sub(slot.tick) > most;
        if !self.device.is_broken() && self.slots.iter().any(late) {
            self.fail(Fault::Silent);
        }
    }

    /// Resets the device and starts it again, as after a fault.
    pub fn restart(&mut self) {
        if !self.device.is_broken() {
            self.fail(Fault::Asked);
        }
    }

    /// Its device is taken out of the machine: it is broken for good, and what was under way comes back.
    pub fn remove(&mut self) {
        if !self.device.is_broken() {
            self.fail(Fault::Removed);
        }
    }

    /// Ends it after a fault, gives back what was under way, and starts it again.
    fn fail(&mut self, fault: Fault) {
        self.device.cut_off(fault);
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if let Some(tag) = slot.tag.take() {
                self.returned.push_back((tag, Err(IoError::Reset)));
                self.free.push(number as u16);
                self.counters.requests += 1;
                self.counters.errors += 1;
            }
        }
        if !self.device.is_broken() && self.revive().is_err() {
            self.device.give_up();
        }
    }

    fn revive(&mut self) -> Result<(), Error> {
        self.device.start_again()?;
        self.doorbell = self.device.renew_queue(0, &mut self.queue)?;
        self.geometry.sectors = Self::geometry_of(&self.device, &self.queue).sectors;
        self.device.transport().go();
        Ok(())
    }

    /// Ends the use of the disk: it can reach no memory any more. What was under way comes back.
    pub fn stop(mut self) -> Vec<T> {
        let _ = self.device.transport().reset();
        self.slots.iter_mut().filter_map(|slot| slot.tag.take()).collect()
    }
}

fn place<P>(pages: &[P], slot: u16) -> Option<(&P, usize)> {
    let per_page = 4096 / SLOT;
    Some((pages.get(usize::from(slot) / per_page)?, usize::from(slot) % per_page * SLOT))
}

fn store<P: DmaPage>(page: &P, at: usize, words: [u32; 4]) {
    for (word, at) in words.into_iter().zip((at..).step_by(4)) {
        page.word(at).store(word, Ordering::Relaxed);
    }
}

/// Adds a segment, or makes the last one longer, of those from `first` on, when this goes on where that ends.
fn join(segments: &mut Vec<Segment>, first: usize, segment: Segment, most: u32) {
    if segments.len() > first
        && let Some(last) = segments.last_mut()
        && last.address + u64::from(last.bytes) == segment.address
        && last.bytes.checked_add(segment.bytes).is_some_and(|bytes| bytes <= most)
    {
        last.bytes += segment.bytes;
        return;
    }
    segments.push(segment);
}

//! A split virtqueue (2.7): the driver's half.
//!
//! Three pages: descriptors, the ring of what is *available* to the device, the ring of what it has *used*. All that decisions
//! rest on is kept in own memory; the shared pages are written, and of the used ring each word is read once and judged on the copy.
//!
//! Order: descriptors and ring entries are written before the available index (release), the used index is read before the used ring
//! (acquire), and where each side says when it wants to be told, a full fence lies between saying and looking.

use crate::{DmaPage, Fault, Segment};
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use zerocopy::{Immutable, IntoBytes};

/// Most descriptors of a queue: as many as make each of its three parts fit in a page.
pub const MOST: u16 = 256;

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;
/// Another descriptor follows.
const NEXT: u16 = 1;
/// The device writes it; otherwise it reads it.
const WRITE: u16 = 2;
/// It is of a table of descriptors.
const INDIRECT: u16 = 4;

/// A descriptor as the device reads it (2.7.5).
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR);

impl Descriptor {
    fn of(segment: Segment, flags: u16, next: u16) -> Self {
        Self { address: segment.address, bytes: segment.bytes, flags, next }
    }
}

/// In the word of flags and index: nobody needs to be told.
const QUIET: u32 = 1;
/// Where the entries of a ring begin, behind flags and index.
const RING: usize = 4;
/// Bytes of an entry of the used ring.
const USED: usize = 8;

/// A chain of descriptors by its first.
#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    /// Descriptors of the queue's own in it; 0 when it is not under way.
    length: u16,
    /// Bytes that the device may write.
    room: u32,
}

/// A queue, and the pages it lies in.
#[derive(Debug)]
pub struct Queue<P> {
    descriptors: P,
    available: P,
    used: P,
    size: u16,
    /// Both sides say by index when they want to be told (`VIRTIO_F_EVENT_IDX`).
    event_idx: bool,
    /// The descriptor behind each, in a chain or in the list of free ones.
    next: Vec<u16>,
    first_free: u16,
    free: u16,
    chains: Vec<Chain>,
    under_way: u16,
    /// Where the next chain goes in the available ring.
    available_index: u16,
    /// What of it the device has been shown.
    shown: u16,
    /// Where the next used chain is expected.
    used_index: u16,
    quiet: bool,
    /// A table that is being made; kept for its memory.
    table: Vec<Descriptor>,
}

impl<P: DmaPage> Queue<P> {
    /// An empty queue of `size` descriptors, a power of two of at most [`MOST`], in three zeroed pages.
    pub(crate) fn new(pages: [P; 3], size: u16, event_idx: bool) -> Self {
        let [descriptors, available, used] = pages;
        let mut queue = Self {
            descriptors,
            available,
            used,
            size: size.min(MOST),
            event_idx,
            next: Vec::new(),
            first_free: 0,
            free: 0,
            chains: Vec::new(),
            under_way: 0,
            available_index: 0,
            shown: 0,
            used_index: 0,
            quiet: false,
            table: Vec::new(),
        };
        queue.clear(event_idx);
        queue
    }

    /// Makes it as it was when it was new. The device does not know it any more.
    pub(crate) fn clear(&mut self, event_idx: bool) {
        let size = self.size;
        self.event_idx = event_idx;
        self.next = (1..=size).collect();
        (self.first_free, self.free) = (0, size);
        self.chains = alloc::vec![Chain::default(); usize::from(size)];
        self.under_way = 0;
        (self.available_index, self.shown, self.used_index) = (0, 0, 0);
        self.quiet = false;
        for page in [&self.available, &self.used] {
            (0..page.size()).step_by(4).for_each(|at| page.word(at).store(0, Ordering::Relaxed));
        }
    }

    /// How many descriptors it has.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many descriptors are free.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// How many chains are under way.
    #[must_use]
    pub fn under_way(&self) -> u16 {
        self.under_way
    }

    /// Machine addresses of its parts: descriptors, available ring, used ring.
    pub(crate) fn places(&self) -> [u64; 3] {
        [&self.descriptors, &self.available, &self.used].map(P::machine_address)
    }

    /// Writes a descriptor of the queue's own.
    fn describe(&self, number: u16, descriptor: Descriptor) {
        self.descriptors.write_bytes(usize::from(number) * DESCRIPTOR, descriptor.as_bytes());
    }

    /// Queues a chain: the device reads the first segments, then writes the others. Returns the number by which it comes back, or none
    /// when it has no room, or there is no segment at all. The device is shown it by [`Queue::show`].
    pub fn add(&mut self, read: &[Segment], write: &[Segment]) -> Option<u16> {
        let length = u16::try_from(read.len() + write.len()).ok()?;
        if length == 0 || length > self.free {
            return None;
        }
        let head = self.first_free;
        let mut at = head;
        let mut left = length;
        let room = write.iter().fold(0, |room: u32, segment| room.saturating_add(segment.bytes));
        let read = read.iter().map(|segment| (segment, 0));
        for (segment, flags) in read.chain(write.iter().map(|segment| (segment, WRITE))) {
            left -= 1;
            let next = *self.next.get(usize::from(at))?;
            let (flags, link) = if left > 0 { (flags | NEXT, next) } else { (flags, 0) };
            self.describe(at, Descriptor::of(*segment, flags, link));
            at = next;
        }
        self.enter(head, at, Chain { length, room })
    }

    /// Queues a chain that lies in a table of `P`'s: its descriptors are written from byte `offset` on, where nothing else is and as many
    /// fit. The device has to know `VIRTIO_F_INDIRECT_DESC`.
    pub fn add_indirect(
        &mut self,
        table: &P,
        offset: usize,
        read: &[Segment],
        write: &[Segment],
    ) -> Option<u16> {
        let length = u16::try_from(read.len() + write.len()).ok()?;
        if length == 0 || self.free == 0 || length > self.size {
            return None;
        }
        let room = write.iter().fold(0, |room: u32, segment| room.saturating_add(segment.bytes));
        self.table.clear();
        let mut number = 0;
        for (segments, flags) in [(read, NEXT), (write, NEXT | WRITE)] {
            for segment in segments {
                number += 1;
                self.table.push(Descriptor::of(*segment, flags, number));
            }
        }
        if let Some(last) = self.table.last_mut() {
            (last.flags, last.next) = (last.flags & !NEXT, 0);
        }
        let bytes = self.table.as_bytes();
        table.write_bytes(offset, bytes);
        let table = Segment { address: table.machine_address() + offset as u64, bytes: bytes.len() as u32 };
        let head = self.first_free;
        let next = *self.next.get(usize::from(head))?;
        self.describe(head, Descriptor::of(table, INDIRECT, 0));
        self.enter(head, next, Chain { length: 1, room })
    }

    fn enter(&mut self, head: u16, first_free: u16, chain: Chain) -> Option<u16> {
        *self.chains.get_mut(usize::from(head))? = chain;
        self.first_free = first_free;
        self.free -= chain.length;
        self.under_way += 1;
        // Two entries a word. The other one is of an earlier chain, or of none yet: only this side writes here.
        let slot = usize::from(self.available_index & (self.size - 1));
        let word = self.available.word(RING + slot / 2 * 4);
        let shift = slot % 2 * 16;
        let others = word.load(Ordering::Relaxed) & !(0xffff << shift);
        word.store(others | u32::from(head) << shift, Ordering::Relaxed);
        self.available_index = self.available_index.wrapping_add(1);
        Some(head)
    }

    /// Shows the device what was queued; true when it wants to be told.
    #[must_use]
    pub fn show(&mut self) -> bool {
        let (old, new) = (self.shown, self.available_index);
        if old == new {
            return false;
        }
        self.shown = new;
        self.write_available(Ordering::Release);
        // Between showing and looking at what the other side wants.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = RING + usize::from(self.size) * USED;
            let event = self.used.word(at).load(Ordering::Relaxed) as u16;
            // The index that it waits for has just been passed (2.7.10.1).
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.word(0).load(Ordering::Relaxed) & QUIET == 0
        }
    }

    fn write_available(&self, order: Ordering) {
        let flags = if self.quiet && !self.event_idx { QUIET } else { 0 };
        self.available.word(0).store(u32::from(self.shown) << 16 | flags, order);
    }

    /// The next chain that the device has used: its number, and how many bytes it says it has written.
    ///
    /// # Errors
    /// What makes no sense: the queue is not to be used any more, before it is cleared.
    pub fn take(&mut self) -> Result<Option<(u16, u32)>, Fault> {
        let index = (self.used.word(0).load(Ordering::Acquire) >> 16) as u16;
        let count = index.wrapping_sub(self.used_index);
        if count == 0 {
            return Ok(None);
        }
        if count > self.under_way {
            return Err(Fault::Index(count));
        }
        let at = RING + usize::from(self.used_index & (self.size - 1)) * USED;
        let id = self.used.word(at).load(Ordering::Relaxed);
        let said = self.used.word(at + 4).load(Ordering::Relaxed);
        let head = u16::try_from(id).map_err(|_| Fault::Id(id))?;
        let chain = self.chains.get_mut(usize::from(head)).filter(|chain| chain.length > 0);
        let Chain { length, room } = core::mem::take(chain.ok_or(Fault::Id(id))?);
        self.used_index = self.used_index.wrapping_add(1);
        self.under_way -= 1;
        // Its descriptors go before the free ones, in their own order.
        let mut last = head;
        for _ in 1..length {
            last = *self.next.get(usize::from(last)).ok_or(Fault::Id(id))?;
        }
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.first_free;
        }
        self.first_free = head;
        self.free += length;
        if said > room {
            return Err(Fault::Length { said, room });
        }
        Ok(Some((head, said)))
    }

    /// Asks to be told when the next chain has been used; true when one has been already: then nobody may come to tell.
    #[must_use]
    pub fn listen(&mut self) -> bool {
        if self.event_idx {
            // Behind the last of the available ring: 2 bytes, and 2 that are nobody's.
            let at = RING + usize::from(self.size) * 2;
            self.available.word(at).store(self.used_index.into(), Ordering::Relaxed);
        } else if self.quiet {
            self.quiet = false;
            self.write_available(Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        (self.used.word(0).load(Ordering::Relaxed) >> 16) as u16 != self.used_index
    }

    /// Does not need to be told until [`Queue::listen`].
    pub fn ignore(&mut self) {
        // With indices there is nothing to do: it has told of the one that was asked for, and will not tell of the next.
        if !self.event_idx && !self.quiet {
            self.quiet = true;
            self.write_available(Ordering::Relaxed);
        }
    }
}

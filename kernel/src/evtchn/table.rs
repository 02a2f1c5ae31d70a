//! The ports of a domain, in frames taken when first needed, and what the FIFO form keeps beside them.

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::evtchn::{
    EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_MAX_QUEUES, EVTCHN_FIFO_NR_CHANNELS, EvtchnFifoControlBlock,
};
use hypercall_abi::shared_info::EVTCHN_2L_NR_CHANNELS;
use hypercall_abi::{Mfn, Port, VcpuId};

use super::fifo::{Control, Half};
use super::{Entry, Error, PortState, Queue};
use crate::domain::MAX_VCPUS;
use crate::platform::{FrameWords, Platform};

/// Ports in a frame, one word each.
const PER_FRAME: u32 = 512;
/// Ports become valid in groups of this size, as on Xen: what is not valid is `EINVAL`, what is valid and unused is closed.
pub(super) const GROUP: u32 = 64;
/// Groups of the largest table.
const GROUPS: usize = (EVTCHN_FIFO_NR_CHANNELS / GROUP) as usize;
/// Event words in a page of the guest's event array.
const WORDS_PER_PAGE: u32 = 1024;
/// Most pages of an event array.
const ARRAY_PAGES: usize = (EVTCHN_FIFO_NR_CHANNELS / WORDS_PER_PAGE) as usize;

/// Words of the index frame: frames of ports (those behind the two-level form's), pages of the event array, control blocks.
const INDEX_PORTS: usize = 0;
const INDEX_ARRAY: usize = (EVTCHN_FIFO_NR_CHANNELS / PER_FRAME) as usize;
const INDEX_CONTROL: usize = INDEX_ARRAY + ARRAY_PAGES;
const _: () = assert!(INDEX_CONTROL + MAX_VCPUS as usize <= 512);
// The tails of all queues fill one frame.
const _: () = assert!(MAX_VCPUS as usize * EVTCHN_FIFO_MAX_QUEUES * 4 <= 4096);
const _: () = assert!(size_of::<EvtchnFifoControlBlock>() == Control::<AtomicU64>::WORDS * 8);
/// Marks a word of the index frame that is in use; the rest of it is a machine address, a multiple of 8.
const PRESENT: u64 = 1;

/// The event channels of a domain.
///
/// Two words of bits say for each group of 64 ports whether a free one is in it and whether a taken one is, so that looking
/// for either reads at most one group. Words of ports are written only under the table's lock.
pub struct PortTable {
    /// Frames of the ports that the two-level form has.
    frames: [Option<Mfn>; PortTable::SMALL_FRAMES],
    /// Where the frames of further ports are, and the guest's pages of the FIFO form. Kept once taken.
    index: Option<Mfn>,
    /// In the FIFO form: the last port of each queue, 32 bits each.
    tails: Option<Mfn>,
    /// Pages of the event array that the guest gave.
    array_pages: u32,
    /// Bit set: all ports of that group are taken.
    full: [u64; GROUPS / 64],
    /// Bit set: some port of that group is taken, port 0 not counted.
    used: [u64; GROUPS / 64],
    /// Ports from here on do not exist yet.
    valid: u32,
    /// Ports from here on the domain may not have (`max_evtchn_port`).
    limit: u32,
    /// Ports taken, port 0 not counted.
    active: u32,
    /// Where a preempted search for a free port goes on.
    pub(super) search_from: u32,
    /// Where a preempted reset goes on; 0 when none is under way.
    pub(super) reset_from: u32,
}

/// What a group has to offer to somebody who wants a port.
pub(super) enum Offer {
    /// This one.
    Port(Port),
    /// All free ports of the group ending here are in queues still: the guest has to take them out.
    Busy(u32),
}

impl PortTable {
    /// Frames for the ports of the two-level form.
    pub const SMALL_FRAMES: usize = (EVTCHN_2L_NR_CHANNELS / PER_FRAME) as usize;

    /// No ports taken but port 0, which nobody gets.
    pub const fn new() -> PortTable {
        PortTable {
            frames: [None; PortTable::SMALL_FRAMES],
            index: None,
            tails: None,
            array_pages: 0,
            full: [0; GROUPS / 64],
            used: [0; GROUPS / 64],
            valid: GROUP,
            limit: EVTCHN_FIFO_NR_CHANNELS,
            active: 0,
            search_from: 0,
            reset_from: 0,
        }
    }

    /// How many ports are taken.
    pub fn active(&self) -> u32 {
        self.active
    }

    /// Lets the domain have ports up to `highest`. Those beyond that it has stay.
    pub fn set_highest(&mut self, highest: u32) {
        self.limit = highest.saturating_add(1);
    }

    /// Whether the guest chose the FIFO form.
    pub fn is_fifo(&self) -> bool {
        self.tails.is_some()
    }

    /// Ports from here on cannot be had, in the present form.
    fn end(&self) -> u32 {
        self.limit.min(if self.is_fifo() { EVTCHN_FIFO_NR_CHANNELS } else { EVTCHN_2L_NR_CHANNELS })
    }

    // ── frames ──

    fn index_word<'p, P: Platform>(&self, platform: &'p P, at: usize) -> Option<&'p AtomicU64> {
        platform.frame(self.index?).get(at)
    }

    /// The frame in word `at` of the index, and the byte offset in it.
    fn indexed<P: Platform>(&self, platform: &P, at: usize) -> Option<(Mfn, usize)> {
        let word = self.index_word(platform, at)?.load(Ordering::Relaxed);
        (word & PRESENT != 0).then(|| (Mfn::new(word >> 12), (word & 0xff8) as usize))
    }

    fn set_indexed<P: Platform>(&self, platform: &P, at: usize, frame: Mfn, offset: usize) {
        if let Some(word) = self.index_word(platform, at) {
            word.store(frame.get() << 12 | offset as u64 & 0xff8 | PRESENT, Ordering::Relaxed);
        }
    }

    /// Forgets what word `at` of the index names.
    fn take_indexed<P: Platform>(&self, platform: &P, at: usize) -> Option<Mfn> {
        let old = self.index_word(platform, at)?.swap(0, Ordering::Relaxed);
        (old & PRESENT != 0).then(|| Mfn::new(old >> 12))
    }

    fn words<'p, P: Platform>(&self, platform: &'p P, port: u32) -> Option<&'p FrameWords> {
        let number = (port / PER_FRAME) as usize;
        let frame = match self.frames.get(number) {
            Some(frame) => *frame,
            None if number < INDEX_ARRAY => {
                self.indexed(platform, INDEX_PORTS + number).map(|(frame, _)| frame)
            }
            None => None,
        };
        frame.map(|mfn| platform.frame(mfn))
    }

    /// Whether `port` lies in a frame that the table does not have yet.
    pub fn lacks_frame<P: Platform>(&self, platform: &P, port: Port) -> bool {
        self.words(platform, port.get()).is_none()
    }

    /// Gives the table the zeroed frame that holds `port`.
    pub fn add_frame<P: Platform>(&mut self, platform: &P, port: Port, mfn: Mfn) {
        let number = (port.get() / PER_FRAME) as usize;
        match self.frames.get_mut(number) {
            Some(slot) => *slot = Some(mfn),
            None => self.set_indexed(platform, INDEX_PORTS + number, mfn, 0),
        }
    }

    /// Takes a frame of its own out of a table without taken ports, whose guest's pages have been let go of.
    pub fn take_frame<P: Platform>(&mut self, platform: &P) -> Option<Mfn> {
        debug_assert!(self.active == 0, "a port table is taken down with ports in it");
        if let Some(frame) = self.frames.iter_mut().find_map(Option::take).or_else(|| self.tails.take()) {
            return Some(frame);
        }
        (INDEX_PORTS..INDEX_ARRAY)
            .find_map(|at| self.take_indexed(platform, at))
            .or_else(|| self.index.take())
    }

    /// How many frames the table has.
    pub fn frame_count<P: Platform>(&self, platform: &P) -> usize {
        // Most domains have no index, and its words are many.
        let far = self.index.map_or(0, |index| {
            let words = platform.frame(index).get(INDEX_PORTS..INDEX_ARRAY).unwrap_or_default();
            words.iter().filter(|word| word.load(Ordering::Relaxed) & PRESENT != 0).count()
        });
        self.frames.iter().chain([&self.index, &self.tails]).flatten().count() + far
    }

    // ── ports ──

    fn word<'p, P: Platform>(&self, platform: &'p P, port: u32) -> Option<&'p AtomicU64> {
        self.words(platform, port)?.get((port % PER_FRAME) as usize)
    }

    #[inline(always)]
    fn entry<P: Platform>(&self, platform: &P, port: u32) -> Entry {
        let Some(word) = self.word(platform, port) else { return Entry::FREE };
        Entry::from_word(word.load(Ordering::Relaxed))
    }

    /// The port numbered `port`. [`Error::BadPort`] when there is none yet.
    #[inline(always)]
    pub fn get<P: Platform>(&self, platform: &P, port: Port) -> Result<Entry, Error> {
        match port.get() {
            0 => Ok(Entry { state: PortState::Reserved, ..Entry::FREE }),
            number if number < self.valid => Ok(self.entry(platform, number)),
            _ => Err(Error::BadPort),
        }
    }

    fn group(number: u32) -> (usize, u64) {
        ((number / GROUP / 64) as usize, 1 << (number / GROUP % 64))
    }

    /// Whether some port of the group of `number` is free, or taken; port 0 counts as neither.
    fn any<P: Platform>(&self, platform: &P, number: u32, free: bool) -> bool {
        let first = number / GROUP * GROUP;
        (first.max(1)..first + GROUP)
            .any(|port| (self.entry(platform, port).state == PortState::Free) == free)
    }

    /// Stores a port, whose frame is there, and keeps the books of taken ports. Its last queue stays what it was, and so does a
    /// held event.
    pub fn set<P: Platform>(&mut self, platform: &P, port: Port, entry: Entry) {
        let number = port.get();
        let Some(word) = self.word(platform, number) else {
            debug_assert!(false, "port {number} has no frame");
            return;
        };
        let old = Entry::from_word(word.load(Ordering::Relaxed));
        word.store(Entry { last: old.last, held: old.held, ..entry }.to_word(), Ordering::Relaxed);
        let (index, bit) = PortTable::group(number);
        match (old.state != PortState::Free, entry.state != PortState::Free) {
            (false, true) => {
                self.active += 1;
                self.valid = self.valid.max((number / GROUP + 1) * GROUP);
                let full = !self.any(platform, number, true);
                let (Some(used), Some(fulls)) = (self.used.get_mut(index), self.full.get_mut(index)) else {
                    return;
                };
                *used |= bit;
                *fulls |= if full { bit } else { 0 };
            }
            (true, false) => {
                self.active -= 1;
                let empty = !self.any(platform, number, false);
                let (Some(used), Some(fulls)) = (self.used.get_mut(index), self.full.get_mut(index)) else {
                    return;
                };
                *fulls &= !bit;
                *used &= if empty { !bit } else { u64::MAX };
            }
            _ => {}
        }
    }

    /// The lowest group from that of `from` on whose bit in `groups` is not `without`.
    fn first_group(groups: &[u64; GROUPS / 64], from: u32, without: bool) -> Option<u32> {
        let first = from / GROUP;
        let mut mask = u64::MAX << (first % 64);
        for (index, bits) in groups.iter().enumerate().skip((first / 64) as usize) {
            let found = if without { !bits } else { *bits } & mask;
            if found != 0 {
                return Some(index as u32 * 64 + found.trailing_zeros());
            }
            mask = u64::MAX;
        }
        None
    }

    /// A free port of the lowest group with free ones from that of `from` on, or word that the guest has to clean up first:
    /// a port that was closed while its event was in a queue cannot be given to anybody before the guest took it out.
    ///
    /// [`Error::NoFreePort`] when all are taken.
    pub(super) fn offer<P: Platform>(&self, platform: &P, from: u32) -> Result<Offer, Error> {
        let group = PortTable::first_group(&self.full, from, true).ok_or(Error::NoFreePort)?;
        let (first, end) = ((group * GROUP).max(1), (group + 1) * GROUP);
        for port in first..end.min(self.end()) {
            if self.entry(platform, port).state == PortState::Free
                && self
                    .event_word(platform, Port::new(port))
                    .is_none_or(|word| word.read() & super::fifo::LINKED == 0)
            {
                return Ok(Offer::Port(Port::new(port)));
            }
        }
        if end >= self.end() { Err(Error::NoFreePort) } else { Ok(Offer::Busy(end)) }
    }

    /// The first taken port from `from` on, port 0 not counted.
    pub fn first_taken<P: Platform>(&self, platform: &P, from: u32) -> Option<Port> {
        let taken = |port: &u32| self.entry(platform, *port).state != PortState::Free;
        let mut from = from.max(1);
        loop {
            let group = PortTable::first_group(&self.used, from, false)?;
            let first = from.max(group * GROUP);
            if let Some(port) = (first..(group + 1) * GROUP).find(taken) {
                return Some(Port::new(port));
            }
            // All of this group's taken ports lie before `from`: that is the first group only.
            from = (group + 1) * GROUP;
        }
    }

    // ── the FIFO form ──

    /// Whether there is an index frame.
    pub(super) fn has_index(&self) -> bool {
        self.index.is_some()
    }

    /// Turns to the FIFO form, with an event array that has no pages. Both are zeroed frames; an index is given only to a table
    /// that has none.
    pub(super) fn begin_fifo(&mut self, index: Option<Mfn>, tails: Mfn) {
        debug_assert!(!self.is_fifo() && self.has_index() == index.is_none());
        self.index = self.index.or(index);
        self.tails = Some(tails);
        self.array_pages = 0;
    }

    /// Turns back to the two-level form. Every page of the guest goes to `release`, and the frame of tails comes back.
    pub(super) fn end_fifo<P: Platform>(&mut self, platform: &P, release: impl FnMut(Mfn)) -> Option<Mfn> {
        let pages = INDEX_ARRAY..INDEX_CONTROL + MAX_VCPUS as usize;
        pages.filter_map(|at| self.take_indexed(platform, at)).for_each(release);
        self.array_pages = 0;
        self.tails.take()
    }

    /// Adds a page of the guest to an event array that is not complete; the reference to it is the table's from here on. Returns
    /// the ports whose words are in it.
    pub(super) fn add_array_page<P: Platform>(
        &mut self,
        platform: &P,
        page: Mfn,
    ) -> impl Iterator<Item = u32> + use<P> {
        let first = self.array_pages * WORDS_PER_PAGE;
        self.set_indexed(platform, INDEX_ARRAY + self.array_pages as usize, page, 0);
        self.array_pages += 1;
        first.max(1)..(first + WORDS_PER_PAGE).min(self.valid)
    }

    /// Whether the event array has all the pages it can have.
    pub(super) fn array_is_complete(&self) -> bool {
        self.array_pages as usize >= ARRAY_PAGES
    }

    /// Gives a vCPU, which has none, its control block; the reference to the page is the table's from here on.
    pub(super) fn set_control<P: Platform>(&self, platform: &P, vcpu: VcpuId, page: Mfn, offset: usize) {
        self.set_indexed(platform, INDEX_CONTROL + vcpu.get() as usize, page, offset);
    }

    /// The control block of a vCPU, once the guest gave it one.
    pub(super) fn control<'p, P: Platform>(
        &self,
        platform: &'p P,
        vcpu: VcpuId,
    ) -> Option<Control<'p, AtomicU64>> {
        let (frame, offset) = self.indexed(platform, INDEX_CONTROL + vcpu.get() as usize)?;
        Control::new(platform.frame(frame).get(offset / 8..)?)
    }

    /// The event word of a port. `None` in the two-level form, and while the event array does not reach there.
    pub(super) fn event_word<'p, P: Platform>(
        &self,
        platform: &'p P,
        port: Port,
    ) -> Option<Half<'p, AtomicU64>> {
        let page = port.get() / WORDS_PER_PAGE;
        if !self.is_fifo() || page >= self.array_pages {
            return None;
        }
        let (frame, _) = self.indexed(platform, INDEX_ARRAY + page as usize)?;
        let at = (port.get() % WORDS_PER_PAGE) as usize;
        platform.frame(frame).get(at / 2).map(|word| Half::new(word, at))
    }

    fn tail_word<'p, P: Platform>(&self, platform: &'p P, queue: Queue) -> Option<Half<'p, AtomicU64>> {
        let at = queue.vcpu.get() as usize * EVTCHN_FIFO_MAX_QUEUES + usize::from(queue.priority);
        platform.frame(self.tails?).get(at / 2).map(|word| Half::new(word, at))
    }

    /// Makes `port` the tail of `queue`, where it is about to be put. Returns the tail before it, `None` for an empty queue.
    pub(super) fn move_to_tail<P: Platform>(&self, platform: &P, port: Port, queue: Queue) -> Option<Port> {
        let word = self.word(platform, port.get())?;
        let entry = Entry::from_word(word.load(Ordering::Relaxed));
        // It was the tail of a queue, and is in none any more: that queue is empty.
        if let Some(tail) = self.tail_word(platform, entry.last)
            && tail.read() == port.get()
        {
            tail.clear(EVTCHN_FIFO_LINK_MASK);
        }
        if entry.last != queue {
            word.store(Entry { last: queue, ..entry }.to_word(), Ordering::Relaxed);
        }
        let tail = self.tail_word(platform, queue)?;
        let old = tail.clear(EVTCHN_FIFO_LINK_MASK);
        tail.set(port.get() & EVTCHN_FIFO_LINK_MASK);
        (old != 0).then(|| Port::new(old))
    }

    /// Notes that an event of `port` waits for its word to come into being.
    pub(super) fn hold<P: Platform>(&self, platform: &P, port: Port, held: bool) {
        let Some(word) = self.word(platform, port.get()) else { return };
        let entry = Entry::from_word(word.load(Ordering::Relaxed));
        word.store(Entry { held, ..entry }.to_word(), Ordering::Relaxed);
    }
}

impl Default for PortTable {
    fn default() -> Self {
        PortTable::new()
    }
}

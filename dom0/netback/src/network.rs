//! Cards, the switch between them, and ports of dom0's own.
//!
//! A turn of a queue takes what its guest has sent and brings it where it goes, with two calls of the hypervisor: one that reads, one
//! that writes. A guest whose pages are not what it says misses the frame; others get it.
//!
//! A frame for one guest that has no room waits, unanswered, in its sender's ring, and what comes behind it for the same queue, too: so
//! whoever sends faster than its receiver takes is slowed down, and nothing is kept in dom0 but heads. Who has put up no pages for
//! [`PATIENCE_NS`] loses all that waits for it, and until it puts up some nothing waits any more. No more than [`WAITING_SLOTS`] of a ring
//! wait at a time: the others are there for frames to others. Frames for several, and those of dom0's own, do not wait.
//!
//! Most frames are in one page, and for one guest that has room and takes them as they are, or for a card of the machine's. As long as
//! pages are at hand, mapped for good, such frames are brought one by one, on the short way ([`Network::relay`]); the first that is
//! otherwise goes the long way, and all that come behind it in that turn.
//!
//! What a receiver does not take as it is (segments to be cut, a checksum to be filled in, and it is too long to have been read whole) is
//! put together in a workshop, a frame at a time, with calls of its own.

mod own;
mod short;
mod waiting;

pub use own::Arrived;
use waiting::Waiting;

use crate::receive::Receive;
use crate::transmit::{Frame, Transmit};
use crate::{Closed, Fault};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::ops::Range;
use guest_sdk::copy::{Copier, Copy, Place};
use guest_sdk::ring::SharedPage;
use hypercall_abi::io::netif::{NetifRxRequest, RxFlags};
use hypercall_abi::{DomId, GrantRef, PAGE_SIZE};
use netswitch::{
    AttachError, Checksum, Filter, MOST_SEGMENTS, Port, PortId, SEGMENT_HEAD, Segments, Switch, flow_hash,
};

/// Frames of a turn.
pub const FRAMES: usize = 64;
/// Requests that a turn looks at.
const REQUESTS: usize = 4 * FRAMES;
/// The longest frame that is read whole; of longer ones, the head.
pub const WHOLE: usize = 2048;
/// Slots of a ring whose frames may wait for receivers: half of it.
pub const WAITING_SLOTS: usize = 128;
/// What is kept of a frame that waits, so that its guest cannot change it: all headers, by which it was decided where it goes. The rest is
/// read when it is brought.
const KEPT: usize = 192;
/// How long a frame waits for its receiver to put up pages: longer than a guest that runs needs, shorter than a sender gives up after.
pub const PATIENCE_NS: u64 = 300_000_000;
/// Most queues of a card.
pub const QUEUES: usize = 4;
/// Where frames are put together: the longest one, cut into the most segments.
const WORKSHOP: usize = FRAMES * WHOLE;
const WORKSHOP_BYTES: usize = (0xffff + MOST_SEGMENTS * SEGMENT_HEAD).next_multiple_of(PAGE_SIZE);
/// What nobody looks at.
const NOWHERE: usize = WORKSHOP + WORKSHOP_BYTES;
/// Bytes of the staging area: for each frame of a turn, its head or all of it; the workshop; and for what nobody looks at.
pub const STAGING_BYTES: usize = NOWHERE + PAGE_SIZE;

/// What both ends of a card have agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// The guest takes frames of several pages.
    pub scatter_gather: bool,
    /// The guest takes frames whose checksum is not filled in.
    pub blank_checksums: bool,
    /// The guest takes packets of TCP over IPv4 that are to be cut into segments.
    pub segments: bool,
}

impl Features {
    /// Segments to be cut come in several pages and without checksums.
    fn consistent(self) -> Self {
        Self { segments: self.segments && self.scatter_gather && self.blank_checksums, ..self }
    }
}

/// What is counted of a card beside what the switch counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// Frames for which the guest had put up no pages.
    pub no_room: u64,
    /// Frames that were too long for what it takes, or for dom0.
    pub too_long: u64,
    /// Frames that could not be copied, from it or to it.
    pub failed: u64,
}

struct Queue<M> {
    transmit: Transmit<M>,
    receive: Receive<M>,
    /// Frames that it is to get once it has room, in order.
    waiting: VecDeque<Box<Waiting>>,
    /// It let frames wait in vain, and has put up nothing since.
    stalled: bool,
    /// Slots of its own ring whose frames wait for others.
    held: usize,
}

struct Card<M> {
    domain: DomId,
    queues: Vec<Queue<M>>,
    features: Features,
    /// The guest broke a ring that others' frames go to.
    broken: bool,
}

/// What is behind a port of the switch.
struct Slot<M> {
    port: PortId,
    card: Option<Card<M>>,
    /// What dom0 takes, when there is no card.
    local: Features,
    missed: Missed,
}

/// What a turn has led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// There may be more to send.
    pub more: bool,
    /// The card's guest broke a ring: nothing that it says counts any more. What it had sent before has gone.
    pub closed: bool,
    /// Frames of this queue's wait for others, at most until then, ns: a turn is due.
    pub until_ns: Option<u64>,
    /// Queues whose guests want to be notified.
    pub notify: Vec<(PortId, usize)>,
    /// Cards whose guests broke a ring that frames went to: their next turn fails.
    pub broken: Vec<PortId>,
}

/// What is left to do to a frame that comes to dom0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Its checksum.
    pub checksum: Checksum,
    /// It is to be cut into segments of so many bytes of payload.
    pub segment: Option<u16>,
}

/// What is behind dom0's own ports.
pub trait Beyond {
    /// Takes a frame that was read whole.
    fn take(&mut self, to: PortId, frame: &mut [u8], unfinished: Unfinished);

    /// Takes a frame from where it is; false when it wants it read whole.
    fn carry(&mut self, _to: PortId, _unfinished: Unfinished, _frame: &mut dyn Carried) -> bool {
        false
    }
}

impl<F: FnMut(PortId, &mut [u8], Unfinished)> Beyond for F {
    fn take(&mut self, to: PortId, frame: &mut [u8], unfinished: Unfinished) {
        self(to, frame, unfinished);
    }
}

/// A frame that is still where its sender has it.
pub trait Carried {
    /// Its bytes.
    fn bytes(&self) -> usize;

    /// Its first bytes, [`HEAD`](netswitch::HEAD) at least: those by which it was decided where it goes.
    fn head(&mut self) -> &[u8];

    /// Writes it to the beginning of a page, its head as it was read; false when not all of it is at hand.
    fn write(&mut self, page: &dyn SharedPage) -> bool;
}

/// Who takes frames for dom0's own ports.
pub type Local<'a> = &'a mut dyn Beyond;

/// One copy of a frame, to one queue.
struct Delivery {
    /// Whose frame it is, unless it is dom0's.
    sender: Option<DomId>,
    frame: usize,
    to: (PortId, usize),
    bytes: u16,
    slots: Range<usize>,
    copies: Range<usize>,
    flags: RxFlags,
    segment: Option<u16>,
}

/// A frame as it is brought to somebody: its first bytes are in the staging area.
#[derive(Clone, Copy)]
struct Parcel {
    at: usize,
    staged: usize,
    bytes: u16,
    blank: bool,
    validated: bool,
    segment: Option<u16>,
    /// Of its flow.
    hash: u32,
}

impl Parcel {
    /// A frame that was read, as far as it is, to a place in the staging area.
    fn of(frame: &Frame, at: usize) -> Self {
        Self {
            at,
            staged: staged(frame),
            bytes: frame.bytes,
            blank: frame.checksum_blank,
            validated: frame.validated,
            segment: frame.segment,
            hash: 0,
        }
    }

    /// A frame that is all in the staging area, with its checksum.
    fn complete(at: usize, bytes: u16) -> Self {
        Self { at, staged: bytes.into(), bytes, blank: false, validated: false, segment: None, hash: 0 }
    }

    /// What its receiver is told of its checksum.
    fn flags(&self) -> RxFlags {
        if self.blank {
            RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED
        } else if self.validated {
            RxFlags::DATA_VALIDATED
        } else {
            RxFlags::empty()
        }
    }
}

/// Whose turn it is.
#[derive(Clone, Copy)]
struct Sender {
    queue: (PortId, usize),
    domain: DomId,
}

/// How the short way ended.
enum Relayed {
    /// With nothing left to take; `more`: or what may be there is for another turn.
    All { more: bool },
    /// With a frame that has to go the long way; `decided`: it was read, and has been brought as far as it goes.
    Left { decided: bool },
}

/// What has become of a frame for one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passed {
    /// It is on its way, or can never be.
    Done,
    /// There was no room for it, or for the segments from this one on.
    Left(usize),
}

/// Whether slots were taken for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reserved {
    Yes,
    /// There are not enough now.
    NoRoom,
    /// There never will be.
    Never,
}

/// A frame that is put together for those who do not take it as it is.
struct Job {
    sender: DomId,
    index: usize,
    /// How it can be cut, if it can.
    segments: Option<Segments>,
    parcel: Parcel,
}

impl Job {
    /// Of the frame, or of a segment of it: where it is in the workshop, bytes of its headers, and what of the frame is behind them.
    fn layout(&self, cut: Option<Segments>, at: usize) -> (usize, usize, Range<usize>) {
        let Some(cut) = cut else {
            return (WORKSHOP, self.parcel.staged, self.parcel.staged..self.parcel.bytes.into());
        };
        let (headers, payload) = (cut.headers(), cut.payload(at));
        (WORKSHOP + payload.start - headers + at * headers, headers, payload)
    }

    /// Gives the frame or a segment its headers and its checksum.
    fn finish(&self, cut: Option<Segments>, at: usize, copier: &mut impl Copier) -> Option<Parcel> {
        let (start, headers, payload) = self.layout(cut, at);
        let bytes = headers + payload.len();
        let (heads, workshop) = copier.staging().split_at_mut_checked(WORKSHOP)?;
        let head = heads.get(self.parcel.at..self.parcel.at + self.parcel.staged)?;
        let made = workshop.get_mut(start - WORKSHOP..)?.get_mut(..bytes)?;
        match cut {
            Some(cut) => cut.write_headers(head, at, made),
            None => made.iter_mut().zip(head).for_each(|(to, from)| *to = *from),
        }
        // Whoever takes segments to be cut makes their checksums, too.
        let segment = self.parcel.segment.filter(|_| cut.is_none());
        if self.parcel.blank && segment.is_none() {
            netswitch::complete_checksum(made);
        }
        Some(Parcel {
            at: start,
            staged: bytes,
            // Not longer than what it is made of.
            bytes: bytes as u16,
            blank: segment.is_some(),
            validated: self.parcel.blank || self.parcel.validated,
            segment,
            hash: self.parcel.hash,
        })
    }
}

/// A switch with what is behind its ports.
pub struct Network<M> {
    switch: Switch,
    slots: Vec<Option<Slot<M>>>,
    /// Some card has, or had, several queues: only then is it asked of which flow a frame is.
    several: bool,
    /// It has, or had, a port with the network outside behind it: frames may be for a card of the machine's.
    leads_out: bool,
    /// Queues that got something which they have not been shown.
    touched: Vec<(PortId, usize)>,
    /// Cards that turned out to be broken in this turn.
    broken: Vec<PortId>,
    /// When the first of all frames that wait has waited long enough, or earlier.
    expires_ns: u64,
    // Kept for their memory.
    frames: Vec<Frame>,
    copies: Vec<Copy>,
    pages: Vec<NetifRxRequest>,
    deliveries: Vec<Delivery>,
    ports: Vec<PortId>,
    notify: Vec<(PortId, usize)>,
}

impl<M: SharedPage> Default for Network<M> {
    fn default() -> Self {
        Self::new()
    }
}

/// Copies of a part of a frame to other places, one for each piece and page that it touches.
///
/// `to` tells where a byte of the frame goes, and how many may follow it there.
fn part(
    domain: DomId,
    frame: &Frame,
    range: Range<usize>,
    to: impl Fn(usize) -> (Place, usize),
    copies: &mut Vec<Copy>,
) {
    let mut piece_start = 0;
    for piece in &frame.pieces {
        let piece_end = piece_start + usize::from(piece.bytes);
        let mut at = range.start.max(piece_start);
        let end = range.end.min(piece_end);
        while at < end {
            let (place, room) = to(at);
            let bytes = (end - at).min(room);
            let offset = piece.offset + (at - piece_start) as u16;
            let from = Place::Granted { domain, gref: piece.gref, offset };
            copies.push(Copy { from, to: place, bytes: bytes as u16, done: false });
            at += bytes;
        }
        piece_start = piece_end;
    }
}

/// A byte of the staging area, and how many follow it in its page.
fn staging(at: usize) -> (Place, usize) {
    (Place::Staging(at), PAGE_SIZE - at % PAGE_SIZE)
}

/// Where a byte of a frame goes in a guest's pages, and how many follow it there.
fn place(domain: DomId, slots: &[NetifRxRequest], large: bool, at: usize) -> (Place, usize) {
    let page = at / PAGE_SIZE;
    // The slot behind the first is no page then. There are pages for all of the frame.
    let slot = slots.get(if page > 0 && large { page + 1 } else { page });
    let gref = slot.map_or(GrantRef::new(0), |slot| slot.gref);
    (Place::Granted { domain, gref, offset: (at % PAGE_SIZE) as u16 }, PAGE_SIZE - at % PAGE_SIZE)
}

fn all_done(copies: &[Copy]) -> bool {
    copies.iter().all(|copy| copy.done)
}

impl<M: SharedPage> Network<M> {
    /// A network without ports.
    #[must_use]
    pub fn new() -> Self {
        Self {
            switch: Switch::new(),
            slots: Vec::new(),
            several: false,
            leads_out: false,
            touched: Vec::new(),
            broken: Vec::new(),
            expires_ns: u64::MAX,
            frames: Vec::new(),
            copies: Vec::new(),
            pages: Vec::new(),
            deliveries: Vec::new(),
            ports: Vec::new(),
            notify: Vec::new(),
        }
    }

    /// Adds a port, without a card: nothing reaches it, or dom0 does.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(&mut self, port: Port) -> Result<PortId, AttachError> {
        let trunk = port.address.is_none();
        let port = self.switch.attach(port)?;
        self.leads_out |= trunk;
        if self.slots.len() <= port.index() {
            self.slots.resize_with(port.index() + 1, || None);
        }
        let slot = Slot { port, card: None, local: Features::default(), missed: Missed::default() };
        if let Some(place) = self.slots.get_mut(port.index()) {
            *place = Some(slot);
        }
        Ok(port)
    }

    /// Takes a port away, with its card; whom to notify, as by [`disconnect`](Self::disconnect).
    pub fn detach(&mut self, port: PortId) -> Turn {
        let turn = self.disconnect(port);
        if let Some(place) = self
            .slots
            .get_mut(port.index())
            .filter(|place| place.as_ref().is_some_and(|slot| slot.port == port))
        {
            *place = None;
        }
        self.switch.detach(port);
        turn
    }

    fn slot(&self, port: PortId) -> Option<&Slot<M>> {
        self.slots.get(port.index())?.as_ref().filter(|slot| slot.port == port)
    }

    fn slot_mut(&mut self, port: PortId) -> Option<&mut Slot<M>> {
        self.slots.get_mut(port.index())?.as_mut().filter(|slot| slot.port == port)
    }

    fn card(&self, port: PortId) -> Option<&Card<M>> {
        self.slot(port)?.card.as_ref()
    }

    fn card_mut(&mut self, port: PortId) -> Option<&mut Card<M>> {
        self.slot_mut(port)?.card.as_mut()
    }

    fn queue_mut(&mut self, (port, queue): (PortId, usize)) -> Option<&mut Queue<M>> {
        self.card_mut(port)?.queues.get_mut(queue)
    }

    /// The switch, for its counters.
    #[must_use]
    pub fn switch(&self) -> &Switch {
        &self.switch
    }

    /// Changes what a port may send and get; false when there is no such port.
    pub fn set_filter(&mut self, port: PortId, filter: Filter) -> bool {
        self.switch.set_filter(port, filter)
    }

    /// Says what dom0 takes at a port without a card: nothing but usual frames, unless this says so.
    pub fn set_local(&mut self, port: PortId, takes: Features) {
        if let Some(slot) = self.slot_mut(port) {
            slot.local = takes.consistent();
        }
    }

    /// Puts a guest's card behind a port that has none: its queues, each a ring to send and one to receive, and what it takes.
    pub fn connect(
        &mut self,
        port: PortId,
        domain: DomId,
        queues: impl IntoIterator<Item = (M, M)>,
        features: Features,
    ) {
        let queues = queues.into_iter().map(|(transmit, receive)| Queue {
            transmit: Transmit::new(transmit),
            receive: Receive::new(receive),
            waiting: VecDeque::new(),
            stalled: false,
            held: 0,
        });
        let queues: Vec<Queue<M>> = queues.collect();
        self.several |= queues.len() > 1;
        let card = Card { domain, queues, features: features.consistent(), broken: false };
        if let Some(slot) = self.slot_mut(port).filter(|slot| slot.card.is_none()) {
            slot.card = Some(card);
        }
    }

    /// Lets go of a card's rings. What waited for it is lost, and what it had sent; who sent what was lost is notified.
    #[must_use = "whoever has sent to it sleeps if it is not notified"]
    pub fn disconnect(&mut self, port: PortId) -> Turn {
        let mut turn = Turn::default();
        let Some(card) = self.slot_mut(port).and_then(|slot| slot.card.take()) else { return turn };
        for waiting in card.queues.into_iter().flat_map(|queue| queue.waiting) {
            self.answer(waiting.from, waiting.frame);
        }
        for card in self.slots.iter_mut().flatten().filter_map(|slot| slot.card.as_mut()) {
            for queue in &mut card.queues {
                queue.waiting.retain(|waiting| waiting.from.0 != port);
            }
        }
        self.publish(&mut turn);
        turn
    }

    /// Frames that a card's guest missed.
    #[must_use]
    pub fn missed(&self, port: PortId) -> Missed {
        self.slot(port).map_or_else(Missed::default, |slot| slot.missed)
    }

    /// Something that a card's guest did wrong, once for each ring.
    pub fn take_fault(&mut self, port: PortId) -> Option<Fault> {
        let queues = &mut self.card_mut(port)?.queues;
        queues.iter_mut().find_map(|queue| queue.transmit.take_fault().or_else(|| queue.receive.take_fault()))
    }

    /// Asks to be notified of what a queue sends; true when there is something already.
    #[must_use = "nobody is notified of what is there already"]
    pub fn prepare_to_wait(&self, port: PortId, queue: usize) -> bool {
        let queue = self.card(port).and_then(|card| card.queues.get(queue));
        queue.is_some_and(|queue| queue.transmit.prepare_to_wait())
    }

    /// Takes what a queue has sent and brings it where it goes; frames for ports without a card go to `local`.
    pub fn turn(
        &mut self,
        now_ns: u64,
        port: PortId,
        queue: usize,
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> Turn {
        self.bring_waiting(now_ns, (port, queue), copier);
        let mut frames = core::mem::take(&mut self.frames);
        let mut taken = Ok(false);
        if let Some(domain) = self.card(port).map(|card| card.domain) {
            let sender = Sender { queue: (port, queue), domain };
            let mut limit = REQUESTS;
            taken = match self.relay(now_ns, sender, &mut limit, &mut frames, copier, &mut *local) {
                Ok(Relayed::All { more }) => Ok(more),
                Ok(Relayed::Left { decided }) => {
                    let first = usize::from(decided);
                    let taken = self.take(port, queue, &mut limit, &mut frames);
                    self.read(domain, first, &mut frames, copier);
                    for index in first..frames.len() {
                        self.decide(now_ns, sender, index, &mut frames, copier, &mut *local);
                    }
                    self.bring(&mut frames, copier);
                    if let Some(Queue { transmit, .. }) = self.queue_mut((port, queue)) {
                        for frame in &frames {
                            if let Some(fault) = frame.failed {
                                transmit.blame(fault);
                            }
                            transmit.answer(frame, frame.failed.is_none());
                        }
                    }
                    taken
                }
                Err(closed) => Err(closed),
            };
        }
        self.touch((port, queue));
        frames.clear();
        self.frames = frames;
        let mut turn = Turn::default();
        self.publish(&mut turn);
        (turn.more, turn.closed) = (taken == Ok(true), taken.is_err());
        turn.until_ns = self.until_ns((port, queue));
        turn
    }

    /// Brings what waits for a queue, if it has room now, and takes nothing of what it has sent.
    pub fn refill(&mut self, now_ns: u64, port: PortId, queue: usize, copier: &mut impl Copier) -> Turn {
        self.bring_waiting(now_ns, (port, queue), copier);
        let mut turn = Turn { until_ns: self.until_ns((port, queue)), ..Turn::default() };
        self.publish(&mut turn);
        turn
    }

    /// Takes frames of a queue for the long way; whether there may be more.
    fn take(
        &mut self,
        port: PortId,
        queue: usize,
        limit: &mut usize,
        frames: &mut Vec<Frame>,
    ) -> Result<bool, Closed> {
        let Some(queue) = self.queue_mut((port, queue)) else { return Ok(false) };
        while frames.len() < FRAMES {
            frames.push(Frame::default());
            let there = match frames.last_mut() {
                Some(frame) => queue.transmit.next(limit, frame),
                None => Ok(false),
            };
            if there != Ok(true) {
                frames.pop();
                return there.map(|_| *limit == 0);
            }
        }
        Ok(true)
    }

    /// Reads each frame from one on, or its head, into the staging area.
    fn read(&mut self, domain: DomId, first: usize, frames: &mut [Frame], copier: &mut impl Copier) {
        if frames.len() == first {
            return;
        }
        self.copies.clear();
        for (index, frame) in frames.iter().enumerate().skip(first) {
            part(domain, frame, 0..staged(frame), |at| staging(index * WHOLE + at), &mut self.copies);
        }
        copier.copy(&mut self.copies);
        for copy in &self.copies {
            if let (false, Place::Staging(at)) = (copy.done, copy.to)
                && let Some(frame) = frames.get_mut(at / WHOLE)
            {
                frame.failed = Some(Fault::Grant);
            }
        }
        self.copies.clear();
    }

    /// Finds out where a frame goes, and puts down the copies that this takes. dom0's own ports get it at once.
    fn decide(
        &mut self,
        now_ns: u64,
        from: Sender,
        index: usize,
        frames: &mut [Frame],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) {
        let Sender { queue: (port, _), domain: sender } = from;
        let Some(frame) = frames.get_mut(index).filter(|frame| frame.failed.is_none()) else { return };
        let (slot, bytes, staged) = (index * WHOLE, usize::from(frame.bytes), staged(frame));
        let head = copier.staging().get(slot..slot + staged).unwrap_or_default();
        let segments = match frame.segment.map(|size| Segments::of(head, bytes, size)) {
            None => None,
            // One segment is a usual packet.
            Some(Some(segments)) if segments.count() == 1 => {
                frame.segment = None;
                None
            }
            Some(Some(segments)) => Some(segments),
            Some(None) => {
                frame.failed = Some(Fault::Segments);
                return;
            }
        };
        let parcel = Parcel::of(frame, slot);
        self.route(now_ns, port, head, bytes);
        let job = Job { sender, index, segments, parcel };
        self.deliver(now_ns, from, job, frames, copier, local);
    }

    /// Finds out to which ports a frame goes.
    fn route(&mut self, now_ns: u64, from: PortId, head: &[u8], bytes: usize) {
        let Self { switch, ports, .. } = self;
        ports.clear();
        // Whose frame goes nowhere is told by the switch's counters.
        let _ = switch.forward(now_ns, from, head, bytes, |to| ports.push(to));
    }

    /// Brings a frame on its way to the ports to which it goes.
    fn deliver(
        &mut self,
        now_ns: u64,
        from: Sender,
        job: Job,
        frames: &mut [Frame],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) {
        let Job { sender, index, mut parcel, .. } = job;
        let (slot, bytes) = (parcel.at, usize::from(parcel.bytes));
        let ports = core::mem::take(&mut self.ports);
        let whole = parcel.staged == bytes;
        let head = copier.staging().get(slot..slot + parcel.staged).unwrap_or_default();
        if self.several && ports.iter().any(|to| self.card(*to).is_some_and(|card| card.queues.len() > 1)) {
            parcel.hash = flow_hash(head);
        }
        if whole
            && parcel.blank
            && parcel.segment.is_none()
            && ports.iter().any(|to| !self.takes(*to).blank_checksums)
            && let Some(frame) = copier.staging().get_mut(slot..slot + bytes)
        {
            netswitch::complete_checksum(frame);
            (parcel.blank, parcel.validated) = (false, true);
        }
        let job = Job { parcel, ..job };
        if let [to] = *ports.as_slice()
            && let Some(to) = self.queue_of(&parcel, to)
        {
            // What waits was sent first.
            let waits = self.queue_mut(to).is_some_and(|queue| !queue.waiting.is_empty());
            let passed = if waits { Passed::Left(0) } else { self.pass(&job, 0, to, frames, copier) };
            if let Passed::Left(next) = passed {
                self.hold(now_ns, from.queue, to, &job, next, frames, copier);
            }
        } else {
            let mut work = false;
            for to in &ports {
                if !self.fits(&parcel, *to) {
                    work = true;
                } else if self.card(*to).is_some() {
                    let frame = frames.get(index).map(|frame| (sender, frame));
                    self.reserve_or_miss(index, &parcel, *to, Some(sender), frame);
                } else if let Some(frame) = copier.staging().get_mut(slot..slot + bytes) {
                    give(local, *to, frame, unfinished(&parcel), ports.len() == 1);
                }
            }
            if work {
                // What waits comes first: it was sent first, and the workshop has room for one frame.
                self.bring(frames, copier);
                self.make(&job, &ports, frames, copier, local);
            }
        }
        self.ports = ports;
    }

    /// The queue that a frame goes to, if a guest is behind the port.
    fn queue_of(&self, parcel: &Parcel, to: PortId) -> Option<(PortId, usize)> {
        self.card(to).map(|card| (to, parcel.hash as usize % card.queues.len().max(1)))
    }

    /// Brings a frame, from a segment of it on, to the one guest that gets it, as that takes it and as far as it has room.
    fn pass(
        &mut self,
        job: &Job,
        next: usize,
        to: (PortId, usize),
        frames: &mut [Frame],
        copier: &mut impl Copier,
    ) -> Passed {
        let Job { sender, index, parcel, .. } = job;
        if self.fits(parcel, to.0) {
            let frame = frames.get(*index).map(|frame| (*sender, frame));
            return match self.reserve(*index, parcel, to, Some(*sender), frame) {
                Reserved::NoRoom => Passed::Left(next),
                Reserved::Yes | Reserved::Never => Passed::Done,
            };
        }
        let cut = job.segments.filter(|_| !self.takes(to.0).segments);
        let (count, bytes) = match cut {
            Some(cut) => (cut.count(), cut.bytes(0)),
            None => (1, parcel.bytes.into()),
        };
        // Nothing is made for which there is no room.
        let Some(queue) = self.queue_mut(to) else { return Passed::Done };
        let large = parcel.segment.is_some() && cut.is_none();
        let room = match queue.receive.room(bytes, large, count - next) {
            Ok(0) => return Passed::Left(next),
            Ok(room) => room,
            // Its next turn tells.
            Err(Closed) => {
                self.broke(to.0);
                return Passed::Done;
            }
        };
        // The workshop has room for one frame.
        self.bring(frames, copier);
        let some = next..next + room;
        if !self.fetch(job, cut, some.clone(), frames, copier) {
            if let Some(frame) = frames.get_mut(*index) {
                frame.failed = Some(Fault::Grant);
            }
            return Passed::Done;
        }
        for at in some {
            if let Some(made) = job.finish(cut, at, copier) {
                self.reserve(*index, &made, to, Some(*sender), None);
            }
        }
        self.bring(frames, copier);
        let failed = frames.get(*index).is_none_or(|frame| frame.failed.is_some());
        if failed || next + room == count { Passed::Done } else { Passed::Left(next + room) }
    }

    fn touch(&mut self, queue: (PortId, usize)) {
        if !self.touched.contains(&queue) {
            self.touched.push(queue);
        }
    }

    /// What whoever is behind a port takes.
    fn takes(&self, port: PortId) -> Features {
        self.slot(port).map_or_else(Features::default, |slot| {
            slot.card.as_ref().map_or(slot.local, |card| card.features)
        })
    }

    /// Whether somebody takes a frame as it is.
    fn fits(&self, parcel: &Parcel, to: PortId) -> bool {
        let (takes, guest) = match self.slot(to) {
            Some(Slot { card: Some(card), .. }) => (card.features, true),
            Some(Slot { local, .. }) => (*local, false),
            None => (Features::default(), false),
        };
        (!parcel.blank || takes.blank_checksums)
            && (parcel.segment.is_none() || takes.segments)
            && (guest || parcel.staged == parcel.bytes.into())
    }

    /// Brings a frame to several who do not take it as it is: put together in the workshop, whole or in segments, with its checksum.
    fn make(
        &mut self,
        job: &Job,
        ports: &[PortId],
        frames: &mut [Frame],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) {
        let parcel = &job.parcel;
        // Those who get it in one piece, then those who get segments.
        for cut in core::iter::once(None).chain(job.segments.map(Some)) {
            let wants = |network: &Self, to: PortId| {
                !network.fits(parcel, to)
                    && (job.segments.is_some() && !network.takes(to).segments) == cut.is_some()
            };
            if !ports.iter().any(|to| wants(self, *to)) {
                continue;
            }
            let count = cut.map_or(1, |cut| cut.count());
            if !self.fetch(job, cut, 0..count, frames, copier) {
                if let Some(frame) = frames.get_mut(job.index) {
                    frame.failed = Some(Fault::Grant);
                }
                return;
            }
            for at in 0..count {
                let Some(parcel) = job.finish(cut, at, copier) else { continue };
                for to in ports.iter().filter(|to| wants(self, **to)).copied().collect::<Vec<_>>() {
                    let made = parcel.at..parcel.at + parcel.staged;
                    if self.card(to).is_some() {
                        self.reserve_or_miss(job.index, &parcel, to, Some(job.sender), None);
                    } else if let Some(frame) = copier.staging().get_mut(made) {
                        give(local, to, frame, unfinished(&parcel), ports.len() == 1);
                    }
                }
            }
            self.bring(frames, copier);
        }
    }

    /// Reads what is behind the head of a frame into the workshop, for some of its segments; false when it cannot be read.
    fn fetch(
        &mut self,
        job: &Job,
        cut: Option<Segments>,
        some: Range<usize>,
        frames: &[Frame],
        copier: &mut impl Copier,
    ) -> bool {
        let Some(frame) = frames.get(job.index) else { return false };
        for at in some {
            let (start, headers, payload) = job.layout(cut, at);
            let to = |byte: usize| staging(start + headers + byte - payload.start);
            part(job.sender, frame, payload.clone(), to, &mut self.copies);
        }
        copier.copy(&mut self.copies);
        let read = all_done(&self.copies);
        self.copies.clear();
        read
    }

    /// As [`reserve`](Self::reserve), for one of several receivers: who has no room misses it.
    fn reserve_or_miss(
        &mut self,
        index: usize,
        parcel: &Parcel,
        to: PortId,
        sender: Option<DomId>,
        rest: Option<(DomId, &Frame)>,
    ) {
        if let Some(to) = self.queue_of(parcel, to)
            && self.reserve(index, parcel, to, sender, rest) == Reserved::NoRoom
        {
            self.miss(to.0, None, 0);
        }
    }

    /// Takes slots of a card's guest for a frame and puts down the copies into its pages: from the staging area, and what is not there
    /// from its sender.
    fn reserve(
        &mut self,
        index: usize,
        parcel: &Parcel,
        to: (PortId, usize),
        sender: Option<DomId>,
        rest: Option<(DomId, &Frame)>,
    ) -> Reserved {
        let Some(slot) = self.slots.get_mut(to.0.index()).and_then(Option::as_mut) else {
            return Reserved::Never;
        };
        let Slot { card: Some(card), missed, .. } = slot else { return Reserved::Never };
        if usize::from(parcel.bytes) > PAGE_SIZE && !card.features.scatter_gather {
            missed.too_long += 1;
            return Reserved::Never;
        }
        let Some(queue) = card.queues.get_mut(to.1) else { return Reserved::Never };
        let (first, start) = (self.pages.len(), self.copies.len());
        match queue.receive.take(parcel.bytes, parcel.segment.is_some(), &mut self.pages) {
            Ok(true) => queue.stalled = false,
            Ok(false) => return Reserved::NoRoom,
            Err(Closed) => {
                self.broke(to.0);
                return Reserved::Never;
            }
        }
        let slots = self.pages.get(first..).unwrap_or_default();
        let to_guest = |at: usize| place(card.domain, slots, parcel.segment.is_some(), at);
        let mut at = 0;
        while at < parcel.staged {
            let ((from, here), (to, there)) = (staging(parcel.at + at), to_guest(at));
            let bytes = (parcel.staged - at).min(here).min(there);
            self.copies.push(Copy { from, to, bytes: bytes as u16, done: false });
            at += bytes;
        }
        if let Some((domain, frame)) = rest {
            part(domain, frame, parcel.staged..parcel.bytes.into(), to_guest, &mut self.copies);
        }
        self.deliveries.push(Delivery {
            sender,
            frame: index,
            to,
            bytes: parcel.bytes,
            slots: first..self.pages.len(),
            copies: start..self.copies.len(),
            flags: parcel.flags(),
            segment: parcel.segment,
        });
        Reserved::Yes
    }

    /// A guest has broken a ring that others' frames go to.
    fn broke(&mut self, port: PortId) {
        if self.card_mut(port).is_some_and(|card| !core::mem::replace(&mut card.broken, true)) {
            self.broken.push(port);
        }
    }

    /// Has everything copied that was put down, and shows receivers what they got.
    fn bring(&mut self, frames: &mut [Frame], copier: &mut impl Copier) {
        if self.deliveries.is_empty() {
            return;
        }
        copier.copy(&mut self.copies);
        let deliveries = core::mem::take(&mut self.deliveries);
        for delivery in &deliveries {
            let slots = self.pages.get(delivery.slots.clone()).unwrap_or_default();
            let done = all_done(self.copies.get(delivery.copies.clone()).unwrap_or_default());
            let Some(slot) = self.slots.get_mut(delivery.to.0.index()).and_then(Option::as_mut) else {
                continue;
            };
            let Slot { card: Some(card), missed, .. } = slot else { continue };
            let Some(queue) = card.queues.get_mut(delivery.to.1) else { continue };
            if done {
                queue.receive.fill(slots, delivery.bytes, delivery.flags, delivery.segment);
            } else {
                missed.failed += 1;
                let frame = frames.get_mut(delivery.frame);
                let readable = match (&frame, delivery.sender) {
                    (Some(frame), Some(domain)) => readable(domain, frame, copier),
                    _ => true,
                };
                queue.receive.refuse(slots, readable);
                if let (Some(frame), false) = (frame, readable) {
                    frame.failed = Some(Fault::Grant);
                }
            }
            self.touch(delivery.to);
        }
        self.deliveries = deliveries;
        self.deliveries.clear();
        self.copies.clear();
        self.pages.clear();
    }

    /// Takes the memory of a turn that was dealt with.
    pub(crate) fn reuse(&mut self, turn: Turn) {
        self.notify = turn.notify;
        self.notify.clear();
    }

    /// Shows everybody concerned what there is.
    fn publish(&mut self, turn: &mut Turn) {
        if turn.notify.capacity() == 0 {
            turn.notify = core::mem::take(&mut self.notify);
        }
        let mut touched = core::mem::take(&mut self.touched);
        for to in touched.drain(..) {
            // Both, whatever the first says.
            let wanted = |queue: &mut Queue<M>| queue.receive.publish() | queue.transmit.publish();
            if self.queue_mut(to).is_some_and(wanted) {
                turn.notify.push(to);
            }
        }
        self.touched = touched;
        turn.broken.append(&mut self.broken);
    }
}

/// Bytes of a frame that are read at first.
fn staged(frame: &Frame) -> usize {
    let bytes = usize::from(frame.bytes);
    if bytes <= WHOLE { bytes } else { SEGMENT_HEAD }
}

fn unfinished(parcel: &Parcel) -> Unfinished {
    let checksum = if parcel.blank { Checksum::Blank } else { Checksum::Complete };
    Unfinished { checksum, segment: parcel.segment }
}

/// Gives a frame to one of dom0's ports. Others still get it, unless it is `alone`, so what dom0 does to it is done to a copy then.
fn give(local: Local<'_>, to: PortId, frame: &mut [u8], unfinished: Unfinished, alone: bool) {
    if alone {
        local.take(to, frame, unfinished);
    } else {
        local.take(to, &mut Vec::from(&*frame), unfinished);
    }
}

/// Whether all pages of a frame can be read, to know whose fault a failed copy is.
fn readable(domain: DomId, frame: &Frame, copier: &mut impl Copier) -> bool {
    let copies = frame.pieces.iter().map(|piece| Copy {
        from: Place::Granted { domain, gref: piece.gref, offset: piece.offset },
        to: Place::Staging(NOWHERE),
        bytes: 1,
        done: false,
    });
    let mut copies: Vec<Copy> = copies.collect();
    copier.copy(&mut copies);
    all_done(&copies)
}

#[cfg(test)]
mod tests;

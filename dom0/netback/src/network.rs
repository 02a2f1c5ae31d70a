//! Cards, the switch between them, and ports of dom0's own.
//!
//! A turn of a queue takes what its guest has sent and brings it where it goes, with two calls of the hypervisor: one that reads, one
//! that writes. A guest that has no room, or whose pages are not what it says, misses the frame; others get it.
//!
//! What a receiver does not take as it is (segments to be cut, a checksum to be filled in, and it is too long to have been read whole) is
//! put together in a workshop, a frame at a time, with calls of its own.

use crate::receive::Receive;
use crate::transmit::{Frame, Transmit};
use crate::{Closed, Fault};
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

/// Its checksum is there, and it is as long as it is.
const FINISHED: Unfinished = Unfinished { checksum: Checksum::Complete, segment: None };

/// A frame for one of dom0's own ports.
pub type Local<'a> = &'a mut dyn FnMut(PortId, &mut [u8], Unfinished);

/// One copy of a frame, to one queue.
struct Delivery {
    frame: usize,
    to: (PortId, usize),
    bytes: u16,
    slots: Range<usize>,
    copies: Range<usize>,
    flags: RxFlags,
    segment: Option<u16>,
}

/// A frame as it is brought to somebody: its first bytes are in the staging area.
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

/// A frame that is put together for those who do not take it as it is.
struct Job<'a> {
    port: PortId,
    index: usize,
    /// How it can be cut, if it can.
    segments: Option<Segments>,
    parcel: Parcel,
    ports: &'a [PortId],
}

impl Job<'_> {
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
    /// Queues that got something which they have not been shown.
    touched: Vec<(PortId, usize)>,
    /// Cards that turned out to be broken in this turn.
    broken: Vec<PortId>,
    // Kept for their memory.
    frames: Vec<Frame>,
    copies: Vec<Copy>,
    pages: Vec<NetifRxRequest>,
    deliveries: Vec<Delivery>,
    ports: Vec<PortId>,
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
            touched: Vec::new(),
            broken: Vec::new(),
            frames: Vec::new(),
            copies: Vec::new(),
            pages: Vec::new(),
            deliveries: Vec::new(),
            ports: Vec::new(),
        }
    }

    /// Adds a port, without a card: nothing reaches it, or dom0 does.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(&mut self, port: Port) -> Result<PortId, AttachError> {
        let port = self.switch.attach(port)?;
        if self.slots.len() <= port.index() {
            self.slots.resize_with(port.index() + 1, || None);
        }
        let slot = Slot { port, card: None, local: Features::default(), missed: Missed::default() };
        if let Some(place) = self.slots.get_mut(port.index()) {
            *place = Some(slot);
        }
        Ok(port)
    }

    /// Takes a port away, with its card.
    pub fn detach(&mut self, port: PortId) {
        if let Some(place) = self
            .slots
            .get_mut(port.index())
            .filter(|place| place.as_ref().is_some_and(|slot| slot.port == port))
        {
            *place = None;
        }
        self.switch.detach(port);
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

    /// Puts a guest's card behind a port: its queues, each a ring to send and one to receive, and what it takes.
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
        });
        let card = Card { domain, queues: queues.collect(), features: features.consistent(), broken: false };
        if let Some(slot) = self.slot_mut(port) {
            slot.card = Some(card);
        }
    }

    /// Lets go of a card's rings.
    pub fn disconnect(&mut self, port: PortId) {
        if let Some(slot) = self.slot_mut(port) {
            slot.card = None;
        }
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
        let mut frames = core::mem::take(&mut self.frames);
        let taken = self.take(port, queue, &mut frames);
        if !frames.is_empty() {
            self.read(port, &mut frames, copier);
            for index in 0..frames.len() {
                self.decide(now_ns, port, index, &mut frames, copier, &mut *local);
            }
            self.bring(port, &mut frames, copier);
            if let Some(Queue { transmit, .. }) = self.queue_mut((port, queue)) {
                for frame in &frames {
                    if let Some(fault) = frame.failed {
                        transmit.blame(fault);
                    }
                    transmit.answer(frame, frame.failed.is_none());
                }
            }
        }
        frames.clear();
        self.frames = frames;
        let mut turn = Turn::default();
        if self.queue_mut((port, queue)).is_some_and(|queue| queue.transmit.publish()) {
            turn.notify.push((port, queue));
        }
        self.publish(&mut turn);
        (turn.more, turn.closed) = (taken == Ok(true), taken.is_err());
        turn
    }

    /// Takes frames of a queue; whether there may be more.
    fn take(&mut self, port: PortId, queue: usize, frames: &mut Vec<Frame>) -> Result<bool, Closed> {
        let Some(card) = self.card_mut(port) else { return Ok(false) };
        if card.broken {
            return Err(Closed);
        }
        let Some(queue) = card.queues.get_mut(queue) else { return Ok(false) };
        let mut limit = REQUESTS;
        while frames.len() < FRAMES {
            match queue.transmit.next(&mut limit)? {
                Some(frame) => frames.push(frame),
                None => return Ok(limit == 0),
            }
        }
        Ok(true)
    }

    /// Reads each frame, or its head, into the staging area.
    fn read(&mut self, port: PortId, frames: &mut [Frame], copier: &mut impl Copier) {
        let Some(domain) = self.card(port).map(|card| card.domain) else { return };
        self.copies.clear();
        for (index, frame) in frames.iter().enumerate() {
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
        port: PortId,
        index: usize,
        frames: &mut [Frame],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) {
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
        let mut ports = core::mem::take(&mut self.ports);
        ports.clear();
        // Whose frame goes nowhere is told by the switch's counters.
        let _ = self.switch.forward(now_ns, port, head, bytes, |to| ports.push(to));
        let whole = staged == bytes;
        let mut parcel = Parcel {
            at: slot,
            staged,
            bytes: frame.bytes,
            blank: frame.checksum_blank,
            validated: frame.validated,
            segment: frame.segment,
            hash: 0,
        };
        if ports.iter().any(|to| self.card(*to).is_some_and(|card| card.queues.len() > 1)) {
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
        let alone = ports.len() == 1;
        let mut work = false;
        for to in &ports {
            if !self.fits(&parcel, *to) {
                work = true;
            } else if self.card(*to).is_some() {
                self.reserve(index, &parcel, *to, frames.get(index).map(|frame| (port, frame)));
            } else if let Some(frame) = copier.staging().get_mut(slot..slot + bytes) {
                give(local, *to, frame, unfinished(&parcel), alone);
            }
        }
        if work {
            // What waits comes first: it was sent first, and the workshop has room for one frame.
            self.bring(port, frames, copier);
            self.make(&Job { port, index, segments, parcel, ports: &ports }, frames, copier, local);
        }
        self.ports = ports;
    }

    /// What whoever is behind a port takes.
    fn takes(&self, port: PortId) -> Features {
        self.slot(port).map_or_else(Features::default, |slot| {
            slot.card.as_ref().map_or(slot.local, |card| card.features)
        })
    }

    /// Whether somebody takes a frame as it is.
    fn fits(&self, parcel: &Parcel, to: PortId) -> bool {
        let takes = self.takes(to);
        (!parcel.blank || takes.blank_checksums)
            && (parcel.segment.is_none() || takes.segments)
            && (self.card(to).is_some() || parcel.staged == parcel.bytes.into())
    }

    /// Brings a frame to those who do not take it as it is: put together in the workshop, whole or in segments, with its checksum.
    fn make(&mut self, job: &Job<'_>, frames: &mut [Frame], copier: &mut impl Copier, local: Local<'_>) {
        let Some(domain) = self.card(job.port).map(|card| card.domain) else { return };
        let parcel = &job.parcel;
        // Those who get it in one piece, then those who get segments.
        for cut in core::iter::once(None).chain(job.segments.map(Some)) {
            let wants = |network: &Self, to: PortId| {
                !network.fits(parcel, to)
                    && (job.segments.is_some() && !network.takes(to).segments) == cut.is_some()
            };
            if !job.ports.iter().any(|to| wants(self, *to)) {
                continue;
            }
            if !self.fetch(domain, job, cut, frames, copier) {
                if let Some(frame) = frames.get_mut(job.index) {
                    frame.failed = Some(Fault::Grant);
                }
                return;
            }
            for at in 0..cut.map_or(1, |cut| cut.count()) {
                let Some(parcel) = job.finish(cut, at, copier) else { continue };
                for to in job.ports.iter().filter(|to| wants(self, **to)).copied().collect::<Vec<_>>() {
                    let made = parcel.at..parcel.at + parcel.staged;
                    if self.card(to).is_some() {
                        self.reserve(job.index, &parcel, to, None);
                    } else if let Some(frame) = copier.staging().get_mut(made) {
                        give(local, to, frame, unfinished(&parcel), job.ports.len() == 1);
                    }
                }
            }
            self.bring(job.port, frames, copier);
        }
    }

    /// Reads what is behind the head of a frame into the workshop; false when it cannot be read.
    fn fetch(
        &mut self,
        domain: DomId,
        job: &Job<'_>,
        cut: Option<Segments>,
        frames: &[Frame],
        copier: &mut impl Copier,
    ) -> bool {
        let Some(frame) = frames.get(job.index) else { return false };
        for at in 0..cut.map_or(1, |cut| cut.count()) {
            let (start, headers, payload) = job.layout(cut, at);
            let to = |byte: usize| staging(start + headers + byte - payload.start);
            part(domain, frame, payload.clone(), to, &mut self.copies);
        }
        copier.copy(&mut self.copies);
        let read = all_done(&self.copies);
        self.copies.clear();
        read
    }

    /// Takes slots of a card's guest for a frame and puts down the copies into its pages: from the staging area, and what is not there
    /// from its sender.
    fn reserve(&mut self, index: usize, parcel: &Parcel, to: PortId, rest: Option<(PortId, &Frame)>) {
        let sender = rest.and_then(|(port, frame)| Some((self.card(port)?.domain, frame)));
        let Some(slot) = self.slots.get_mut(to.index()).and_then(Option::as_mut) else { return };
        let Slot { card: Some(card), missed, .. } = slot else { return };
        if usize::from(parcel.bytes) > PAGE_SIZE && !card.features.scatter_gather {
            missed.too_long += 1;
            return;
        }
        let count = card.queues.len().max(1);
        let number = parcel.hash as usize % count;
        let Some(queue) = card.queues.get_mut(number) else { return };
        let (first, start) = (self.pages.len(), self.copies.len());
        match queue.receive.take(parcel.bytes, parcel.segment.is_some(), &mut self.pages) {
            Ok(true) => {}
            Ok(false) => {
                missed.no_room += 1;
                return;
            }
            Err(Closed) => {
                if !core::mem::replace(&mut card.broken, true) {
                    self.broken.push(to);
                }
                return;
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
        if let Some((domain, frame)) = sender {
            part(domain, frame, parcel.staged..parcel.bytes.into(), to_guest, &mut self.copies);
        }
        let flags = if parcel.blank {
            RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED
        } else if parcel.validated {
            RxFlags::DATA_VALIDATED
        } else {
            RxFlags::empty()
        };
        self.deliveries.push(Delivery {
            frame: index,
            to: (to, number),
            bytes: parcel.bytes,
            slots: first..self.pages.len(),
            copies: start..self.copies.len(),
            flags,
            segment: parcel.segment,
        });
    }

    /// Has everything copied that was put down, and shows receivers what they got.
    fn bring(&mut self, port: PortId, frames: &mut [Frame], copier: &mut impl Copier) {
        if self.deliveries.is_empty() {
            return;
        }
        copier.copy(&mut self.copies);
        let source = self.card(port).map(|card| card.domain);
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
                let readable = match (&frame, source) {
                    (Some(frame), Some(domain)) => readable(domain, frame, copier),
                    _ => true,
                };
                queue.receive.refuse(slots, readable);
                if let (Some(frame), false) = (frame, readable) {
                    frame.failed = Some(Fault::Grant);
                }
            }
            if !self.touched.contains(&delivery.to) {
                self.touched.push(delivery.to);
            }
        }
        self.deliveries = deliveries;
        self.deliveries.clear();
        self.copies.clear();
        self.pages.clear();
    }

    /// Frames of dom0's own, from one of its ports. Those that are longer than [`WHOLE`] are not sent.
    pub fn send<F: AsRef<[u8]>>(
        &mut self,
        now_ns: u64,
        port: PortId,
        frames: &[F],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> Turn {
        for frames in frames.chunks(FRAMES) {
            for (index, frame) in frames.iter().enumerate() {
                self.send_one(now_ns, port, index, frame.as_ref(), copier, &mut *local);
            }
            self.bring(port, &mut [], copier);
        }
        let mut turn = Turn::default();
        self.publish(&mut turn);
        turn
    }

    fn send_one(
        &mut self,
        now_ns: u64,
        port: PortId,
        index: usize,
        frame: &[u8],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) {
        let at = index * WHOLE;
        let place = copier.staging().get_mut(at..at + frame.len()).filter(|place| place.len() <= WHOLE);
        let Some(place) = place else { return };
        place.copy_from_slice(frame);
        let mut ports = core::mem::take(&mut self.ports);
        ports.clear();
        let _ = self.switch.forward(now_ns, port, frame, frame.len(), |to| ports.push(to));
        let several = ports.iter().any(|to| self.card(*to).is_some_and(|card| card.queues.len() > 1));
        let parcel = Parcel {
            at,
            staged: frame.len(),
            // At most 2048.
            bytes: frame.len() as u16,
            blank: false,
            validated: false,
            segment: None,
            hash: if several { flow_hash(frame) } else { 0 },
        };
        let alone = ports.len() == 1;
        for to in &ports {
            if self.card(*to).is_some() {
                self.reserve(index, &parcel, *to, None);
            } else if let Some(frame) = copier.staging().get_mut(at..at + frame.len()) {
                give(local, *to, frame, FINISHED, alone);
            }
        }
        self.ports = ports;
    }

    /// Shows everybody concerned what there is.
    fn publish(&mut self, turn: &mut Turn) {
        let mut touched = core::mem::take(&mut self.touched);
        for to in touched.drain(..) {
            if self.queue_mut(to).is_some_and(|queue| queue.receive.publish()) && !turn.notify.contains(&to) {
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
        local(to, frame, unfinished);
    } else {
        local(to, &mut Vec::from(&*frame), unfinished);
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

//! The short way: one by one, without lists, by copies that are at hand.
//!
//! Where a card of the machine's is on the switch, the head of a frame is read first. When it turns out to be for that card, or for one guest,
//! the rest goes in one copy from where it is to where it belongs. Whoever gets it gets the head that was read, so that nobody gets another
//! one than was decided on. Between guests alone, two copies cost less than a head and the rest of so short a frame.

use super::{
    Card, Carried, FRAMES, Job, Local, Network, Parcel, Queue, Relayed, Sender, Slot, WHOLE, unfinished,
};
use crate::transmit::Frame;
use crate::{Closed, Fault};
use alloc::vec::Vec;
use core::ops::Range;
use guest_sdk::copy::{Copier, Copy, Place};
use guest_sdk::ring::SharedPage;
use hypercall_abi::{DomId, GrantRef};
use netswitch::{HEAD, PortId};

/// Frames of up to so many bytes are read whole at once: a second copy would cost more.
const SHORT: usize = 256;
/// Of longer ones, so many bytes: all that is asked of a head, for whoever finishes a checksum as well.
const FIRST: usize = 128;
const _: () = assert!(FIRST >= HEAD + 20 && FIRST <= SHORT);

/// How much of a frame of `bytes` is read at first.
pub(super) const fn first(bytes: usize) -> usize {
    if bytes <= SHORT { bytes } else { FIRST }
}

/// Where a frame is, in one page.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// A guest's.
    Guest { domain: DomId, gref: GrantRef, offset: u16 },
    /// One of ours, from this byte on.
    Own { page: &'a dyn SharedPage, at: usize },
}

impl Source<'_> {
    /// The copy of a range of the frame, when a guest has it.
    #[inline(always)]
    fn copy(&self, range: &Range<usize>, to: Place) -> Option<Copy> {
        let Self::Guest { domain, gref, offset } = *self else { return None };
        // In a page, as the whole frame is.
        let offset = offset.checked_add(range.start as u16)?;
        let from = Place::Granted { domain, gref, offset };
        Some(Copy { from, to, bytes: range.len() as u16, done: false })
    }

    /// Copies a range of the frame, if that is at hand.
    // A call and its arguments would cost as much as what a short frame needs.
    #[inline(always)]
    pub(super) fn bring(&self, range: Range<usize>, to: Place, copier: &mut impl Copier) -> bool {
        match (*self, to) {
            (Self::Guest { .. }, _) => self.copy(&range, to).is_some_and(|copy| copier.copy_at_hand(&copy)),
            (Self::Own { page, at }, Place::Staging(staging)) => {
                let to = copier.staging().get_mut(staging..staging + range.len());
                to.map(|to| page.read_bytes(at + range.start, to)).is_some()
            }
            (Self::Own { page, at }, _) => copier.bring_at_hand(page, at + range.start, to, range.len()),
        }
    }

    /// Reads what was not read of a frame to behind its head in the staging area; false when it cannot be read.
    pub(super) fn read_rest(&self, parcel: &Parcel, copier: &mut impl Copier) -> bool {
        let rest = parcel.staged..parcel.bytes.into();
        let to = Place::Staging(parcel.at + rest.start);
        rest.is_empty()
            || self.bring(rest.clone(), to, copier)
            || self.copy(&rest, to).is_some_and(|copy| {
                let mut copies = [copy];
                copier.copy(&mut copies);
                copies.iter().all(|copy| copy.done)
            })
    }
}

/// A frame whose head is in the staging area.
struct Underway<'a, C> {
    copier: &'a mut C,
    source: &'a Source<'a>,
    parcel: &'a Parcel,
}

impl<C: Copier> Carried for Underway<'_, C> {
    fn bytes(&self) -> usize {
        self.parcel.bytes.into()
    }

    fn head(&mut self) -> &[u8] {
        let Parcel { at, staged, .. } = *self.parcel;
        self.copier.staging().get(at..at + staged).unwrap_or_default()
    }

    fn write(&mut self, page: &dyn SharedPage) -> bool {
        page.write_bytes(0, self.head());
        let rest = self.parcel.staged..self.bytes();
        match (*self.source, self.source.copy(&rest, Place::Staging(0))) {
            _ if rest.is_empty() => true,
            (_, Some(copy)) => self.copier.fetch_at_hand(copy.from, page, rest.start, rest.len()),
            // From one card of the machine's to another, which no switch has.
            (..) => false,
        }
    }
}

impl<M: SharedPage> Network<M> {
    /// Takes frames of a queue and brings each at once, by copies that are at hand, to the one who gets it. Ends with the first frame that has
    /// to go the long way, which is then the only one of `frames`.
    pub(super) fn relay(
        &mut self,
        now_ns: u64,
        from: Sender,
        limit: &mut usize,
        frames: &mut Vec<Frame>,
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> Result<Relayed, Closed> {
        // Where it stays: it is large.
        frames.push(Frame::default());
        let leads_out = self.leads_out;
        for _ in 0..FRAMES {
            let card = self.card_mut(from.queue.0);
            if card.as_ref().is_some_and(|card| card.broken) {
                frames.clear();
                return Err(Closed);
            }
            let queue = card.and_then(|card| card.queues.get_mut(from.queue.1));
            let (Some(queue), Some(frame)) = (queue, frames.first_mut()) else {
                frames.clear();
                return Ok(Relayed::All { more: false });
            };
            let there = queue.transmit.next(limit, frame);
            if there != Ok(true) {
                frames.clear();
                return there.map(|_| Relayed::All { more: *limit == 0 });
            }
            let [piece] = *frame.pieces.as_slice() else { return Ok(Relayed::Left { decided: false }) };
            let bytes = usize::from(frame.bytes);
            let source = Source::Guest { domain: from.domain, gref: piece.gref, offset: piece.offset };
            let staged = if leads_out { first(bytes) } else { bytes };
            if bytes > WHOLE || frame.segment.is_some() || !source.bring(0..staged, Place::Staging(0), copier)
            {
                return Ok(Relayed::Left { decided: false });
            }
            let mut parcel = Parcel { staged, ..Parcel::of(frame, 0) };
            let head = copier.staging().get(..parcel.staged).unwrap_or_default();
            self.route(now_ns, from.queue.0, head, bytes);
            if let [to] = *self.ports.as_slice()
                && self.hand_over(&parcel, to, &source, copier, &mut *local)
            {
                self.sent(from, frames);
                continue;
            }
            if !source.read_rest(&parcel, copier) {
                frames.iter_mut().for_each(|frame| frame.failed = Some(Fault::Grant));
                return Ok(Relayed::Left { decided: true });
            }
            parcel.staged = bytes;
            let job = Job { sender: from.domain, index: 0, segments: None, parcel };
            self.deliver(now_ns, from, job, frames, copier, &mut *local);
            // What dom0 has taken itself needs no copies: the next one may be like it.
            if self.deliveries.is_empty() && frames.iter().all(|frame| frame.failed.is_none()) {
                self.sent(from, frames);
                continue;
            }
            self.bring(frames, copier);
            return Ok(Relayed::Left { decided: true });
        }
        frames.clear();
        Ok(Relayed::All { more: true })
    }

    /// Answers the frame that has gone. One that was taken out to wait has left nothing to be answered.
    fn sent(&mut self, from: Sender, frames: &mut [Frame]) {
        if let (Some(Queue { transmit, .. }), Some(frame)) = (self.queue_mut(from.queue), frames.first_mut())
        {
            transmit.answer(frame, true);
            frame.clear();
        }
    }

    /// Brings a frame whose head was read, all of `parcel.staged`, to the one who gets it, if that takes it as it is, has room, and all copies
    /// are at hand.
    #[inline(always)]
    pub(super) fn hand_over(
        &mut self,
        parcel: &Parcel,
        to: PortId,
        source: &Source<'_>,
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> bool {
        let slot = self.slots.get_mut(to.index()).and_then(Option::as_mut).filter(|slot| slot.port == to);
        let card = match slot {
            Some(Slot { card: Some(card), .. }) => card,
            Some(Slot { local: takes, .. }) => {
                let fits = !parcel.blank || takes.blank_checksums;
                return fits && local.carry(to, unfinished(parcel), &mut Underway { copier, source, parcel });
            }
            None => return false,
        };
        let Card { domain, queues, features, .. } = card;
        // By which of several queues it goes is found out on the long way.
        let [queue] = queues.as_mut_slice() else { return false };
        // What waits was sent first.
        if parcel.blank && !features.blank_checksums || !queue.waiting.is_empty() {
            return false;
        }
        if queue.receive.take(parcel.bytes, false, &mut self.pages) != Ok(true) {
            return false;
        }
        let gref = self.pages.first().map_or(GrantRef::new(0), |slot| slot.gref);
        let place = |offset: usize| Place::Granted { domain: *domain, gref, offset: offset as u16 };
        let from = Place::Staging(parcel.at);
        let head = Copy { from, to: place(0), bytes: parcel.staged as u16, done: false };
        let rest = parcel.staged..parcel.bytes.into();
        let done = copier.copy_at_hand(&head)
            && (rest.is_empty() || source.bring(rest.clone(), place(rest.start), copier));
        if !done {
            // Its page is there for us to write to, whatever is in it.
            queue.receive.put_back(&mut self.pages);
            return false;
        }
        queue.receive.fill(&self.pages, parcel.bytes, parcel.flags(), None);
        queue.stalled = false;
        self.pages.clear();
        self.touch((to, 0));
        true
    }
}

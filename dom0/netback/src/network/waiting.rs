//! Frames that wait in their senders' rings for receivers that have no room.

use super::{FRAMES, Job, KEPT, Network, PATIENCE_NS, Parcel, Passed, Queue, Slot, WAITING_SLOTS, WHOLE};
use crate::transmit::Frame;
use alloc::boxed::Box;
use alloc::vec::Vec;
use arrayvec::ArrayVec;
use guest_sdk::copy::Copier;
use guest_sdk::ring::SharedPage;
use netswitch::{PortId, Segments};

/// A frame that waits in its sender's ring.
pub(super) struct Waiting {
    /// The queue that it was sent by.
    pub(super) from: (PortId, usize),
    pub(super) frame: Frame,
    /// Its first bytes.
    head: ArrayVec<u8, KEPT>,
    parcel: Parcel,
    segments: Option<Segments>,
    /// The first segment that has not been brought.
    next: usize,
    until_ns: u64,
}

impl<M: SharedPage> Network<M> {
    /// When something is to be done about frames of a queue's that wait.
    pub(super) fn until_ns(&mut self, from: (PortId, usize)) -> Option<u64> {
        let expires_ns = self.expires_ns;
        self.queue_mut(from).filter(|queue| queue.held > 0).map(|_| expires_ns)
    }

    /// Leaves a frame in its sender's ring until its receiver has room, unless it would be in vain, or too much waits already.
    #[expect(clippy::too_many_arguments, reason = "all that there is to know of a frame")]
    pub(super) fn hold(
        &mut self,
        now_ns: u64,
        from: (PortId, usize),
        to: (PortId, usize),
        job: &Job,
        next: usize,
        frames: &mut [Frame],
        copier: &mut impl Copier,
    ) {
        let Some(frame) = frames.get_mut(job.index) else { return };
        let slots = frame.slots();
        let parcel = Parcel { staged: job.parcel.staged.min(KEPT), ..job.parcel };
        let mut head = ArrayVec::new();
        let kept = copier.staging().get(parcel.at..parcel.at + parcel.staged).unwrap_or_default();
        // There is room for all of it.
        let _ = head.try_extend_from_slice(kept);
        let there = self.queue_mut(to).is_some_and(|queue| !queue.stalled);
        let held = self.queue_mut(from).map(|queue| &mut queue.held);
        match held.filter(|held| there && **held + slots <= WAITING_SLOTS) {
            Some(held) => *held += slots,
            None => {
                self.miss(to.0, job.segments, next);
                return;
            }
        }
        let until_ns = now_ns.saturating_add(PATIENCE_NS);
        self.expires_ns = self.expires_ns.min(until_ns);
        // What is left in its place has nothing to be answered.
        let frame = core::mem::take(frame);
        let waiting = Waiting { from, frame, head, parcel, segments: job.segments, next, until_ns };
        if let Some(queue) = self.queue_mut(to) {
            queue.waiting.push_back(Box::new(waiting));
        }
    }

    /// Counts what a guest has missed for want of room: a frame, or its segments from one on.
    pub(super) fn miss(&mut self, to: PortId, segments: Option<Segments>, next: usize) {
        let cut = segments.filter(|_| !self.takes(to).segments);
        if let Some(slot) = self.slot_mut(to) {
            slot.missed.no_room += cut.map_or(1, |cut| cut.count() - next) as u64;
        }
    }

    /// Brings what waits for a queue as far as it has room, in order; what has waited too long, for whomever, is lost.
    pub(super) fn bring_waiting(&mut self, now_ns: u64, to: (PortId, usize), copier: &mut impl Copier) {
        if now_ns >= self.expires_ns {
            self.expire(now_ns);
        }
        loop {
            // A turn's frames at a time: that many heads fit. Of those no more than there are pages for, if each takes one.
            let mut some: Vec<Box<Waiting>> = match self.queue_mut(to) {
                Some(Queue { waiting, receive, .. }) if !waiting.is_empty() => {
                    let most = waiting.len().min(FRAMES);
                    // Who has broken its ring is told by the first.
                    let most = receive.room(1, false, most).unwrap_or(1);
                    waiting.drain(..most).collect()
                }
                _ => return,
            };
            if some.is_empty() {
                return;
            }
            let mut frames: Vec<Frame> =
                some.iter_mut().map(|waiting| core::mem::take(&mut waiting.frame)).collect();
            let mut left = None;
            for (index, waiting) in some.iter_mut().enumerate() {
                // Its sender is there, or it would not wait.
                let Some(sender) = self.card(waiting.from.0).map(|card| card.domain) else { continue };
                waiting.parcel.at = index * WHOLE;
                let place = copier.staging().get_mut(index * WHOLE..index * WHOLE + waiting.head.len());
                if let Some(place) = place {
                    place.copy_from_slice(&waiting.head);
                }
                let job = Job { sender, index, segments: waiting.segments, parcel: waiting.parcel };
                if let Passed::Left(next) = self.pass(&job, waiting.next, to, &mut frames, copier) {
                    waiting.next = next;
                    left = Some(index);
                    break;
                }
            }
            self.bring(&mut frames, copier);
            let (all, left) = (left.is_none(), left.unwrap_or(some.len()));
            let mut rest: Vec<Box<Waiting>> = Vec::new();
            for (index, (mut waiting, frame)) in some.into_iter().zip(frames).enumerate() {
                if index < left {
                    self.answer(waiting.from, frame);
                } else {
                    waiting.frame = frame;
                    rest.push(waiting);
                }
            }
            if let Some(queue) = self.queue_mut(to) {
                rest.into_iter().rev().for_each(|waiting| queue.waiting.push_front(waiting));
            }
            if !all {
                return;
            }
        }
    }

    /// Gives up what has waited too long, and what waits behind it.
    fn expire(&mut self, now_ns: u64) {
        let mut given_up = Vec::new();
        let mut next = u64::MAX;
        for slot in self.slots.iter_mut().flatten() {
            let Slot { port, card: Some(card), .. } = slot else { continue };
            for queue in &mut card.queues {
                match queue.waiting.front() {
                    Some(first) if first.until_ns <= now_ns => {
                        queue.stalled = true;
                        given_up.extend(queue.waiting.drain(..).map(|waiting| (*port, waiting)));
                    }
                    Some(first) => next = next.min(first.until_ns),
                    None => {}
                }
            }
        }
        self.expires_ns = next;
        for (to, waiting) in given_up {
            let Waiting { from, frame, segments, next, .. } = *waiting;
            self.miss(to, segments, next);
            self.answer(from, frame);
        }
    }

    /// Answers a frame that has waited.
    pub(super) fn answer(&mut self, from: (PortId, usize), frame: Frame) {
        let Some(queue) = self.queue_mut(from) else { return };
        queue.held -= frame.slots();
        if let Some(fault) = frame.failed {
            queue.transmit.blame(fault);
        }
        queue.transmit.answer(&frame, frame.failed.is_none());
        self.touch(from);
    }
}

//! Cards, the switch between them, and ports of dom0's own.
//!
//! A turn of a card takes what its guest has sent and brings it where it goes, with two calls of the hypervisor: one that reads the heads,
//! one that copies everything. A guest that has no room, or whose pages are not what it says, misses the frame; others get it.

use crate::receive::Receive;
use crate::transmit::{Frame, Transmit};
use crate::{Closed, Fault};
use alloc::vec::Vec;
use core::ops::Range;
use guest_sdk::copy::{Copier, Copy, Place};
use guest_sdk::ring::SharedPage;
use hashbrown::HashMap;
use hypercall_abi::io::netif::{NetifRxRequest, RxFlags};
use hypercall_abi::{DomId, PAGE_SIZE};
use netswitch::{AttachError, Checksum, Filter, HEAD, Port, PortId, Switch};

/// Frames of a turn.
pub const FRAMES: usize = 32;
/// Requests that a turn looks at.
const REQUESTS: usize = 4 * FRAMES;
/// The longest frame that goes through dom0's memory: for its own ports, or to have its checksum filled in.
pub const LOCAL: usize = 2048;
/// Bytes of the staging area: for each frame of a turn, its head or all of it.
pub const STAGING: usize = FRAMES * LOCAL;
/// Bytes of it in all: the rest is for what nobody looks at.
pub const STAGING_BYTES: usize = STAGING + PAGE_SIZE;

/// What both ends of a card have agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// The guest takes frames of several pages.
    pub scatter_gather: bool,
    /// The guest takes frames whose checksum is not filled in.
    pub blank_checksums: bool,
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

struct Card<M> {
    domain: DomId,
    transmit: Transmit<M>,
    receive: Receive<M>,
    features: Features,
    /// The guest broke the ring that others' frames go to.
    broken: bool,
}

/// What a turn has led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// There may be more to send.
    pub more: bool,
    /// Cards whose guests want to be notified.
    pub notify: Vec<PortId>,
}

/// A frame for one of dom0's own ports.
pub type Local<'a> = &'a mut dyn FnMut(PortId, &mut [u8], Checksum);

/// One copy of a frame, to one card.
struct Delivery {
    frame: usize,
    to: PortId,
    pages: Range<usize>,
    copies: Range<usize>,
    flags: RxFlags,
}

/// A switch with what is behind its ports.
pub struct Network<M> {
    switch: Switch,
    cards: HashMap<PortId, Card<M>>,
    missed: HashMap<PortId, Missed>,
    /// Cards that got something which they have not been shown.
    touched: Vec<PortId>,
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

/// Copies of a part of a frame to another place, one for each piece and page that it touches.
///
/// `to` tells where a byte of the frame goes; a copy ends where its page does.
fn part(
    domain: DomId,
    frame: &Frame,
    range: Range<usize>,
    to: impl Fn(usize) -> Place,
    copies: &mut Vec<Copy>,
) {
    let mut piece_start = 0;
    for piece in &frame.pieces {
        let piece_end = piece_start + usize::from(piece.bytes);
        let mut at = range.start.max(piece_start);
        while at < range.end.min(piece_end) {
            let page_end = (at / PAGE_SIZE + 1) * PAGE_SIZE;
            let end = range.end.min(piece_end).min(page_end);
            let offset = piece.offset + (at - piece_start) as u16;
            copies.push(Copy {
                from: Place::Granted { domain, gref: piece.gref, offset },
                to: to(at),
                bytes: (end - at) as u16,
                done: false,
            });
            at = end;
        }
        piece_start = piece_end;
    }
}

/// Where a byte of a frame goes in a guest's pages.
fn place(domain: DomId, pages: &[NetifRxRequest], at: usize) -> Place {
    // There are pages for all of the frame.
    let gref = pages.get(at / PAGE_SIZE).map_or(hypercall_abi::GrantRef::new(0), |page| page.gref);
    Place::Granted { domain, gref, offset: (at % PAGE_SIZE) as u16 }
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
            cards: HashMap::new(),
            missed: HashMap::new(),
            touched: Vec::new(),
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
        self.switch.attach(port)
    }

    /// Takes a port away, with its card.
    pub fn detach(&mut self, port: PortId) {
        self.disconnect(port);
        self.missed.remove(&port);
        self.switch.detach(port);
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

    /// Puts a guest's card behind a port: its rings, and what it takes.
    pub fn connect(&mut self, port: PortId, domain: DomId, transmit: M, receive: M, features: Features) {
        let card = Card {
            domain,
            transmit: Transmit::new(transmit),
            receive: Receive::new(receive),
            features,
            broken: false,
        };
        self.cards.insert(port, card);
    }

    /// Lets go of a card's rings.
    pub fn disconnect(&mut self, port: PortId) {
        self.cards.remove(&port);
    }

    /// Frames that a card's guest missed.
    #[must_use]
    pub fn missed(&self, port: PortId) -> Missed {
        self.missed.get(&port).copied().unwrap_or_default()
    }

    /// The first thing that a card's guest did wrong, once.
    pub fn take_fault(&mut self, port: PortId) -> Option<Fault> {
        let card = self.cards.get_mut(&port)?;
        card.transmit.take_fault().or_else(|| card.receive.take_fault())
    }

    /// Asks to be notified of what a card sends; true when there is something already.
    #[must_use = "nobody is notified of what is there already"]
    pub fn prepare_to_wait(&self, port: PortId) -> bool {
        self.cards.get(&port).is_some_and(|card| card.transmit.prepare_to_wait())
    }

    /// Takes what a card has sent and brings it where it goes; frames for ports without a card go to `local`.
    ///
    /// # Errors
    /// [`Closed`]: the card's guest broke a ring. What it had sent before has gone.
    pub fn turn(
        &mut self,
        now_ns: u64,
        port: PortId,
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> Result<Turn, Closed> {
        let Some(card) = self.cards.get_mut(&port) else { return Ok(Turn::default()) };
        if card.broken {
            return Err(Closed);
        }
        let mut frames = core::mem::take(&mut self.frames);
        let mut limit = REQUESTS;
        let mut taken = Ok(());
        while frames.len() < FRAMES {
            match card.transmit.next(&mut limit) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(closed) => {
                    taken = Err(closed);
                    break;
                }
            }
        }
        let more = frames.len() == FRAMES || limit == 0;
        if !frames.is_empty() {
            self.read_heads(port, &mut frames, copier);
            self.decide(now_ns, port, &frames, copier, local);
            self.bring(port, &frames, copier);
        }
        frames.clear();
        self.frames = frames;
        let mut notify = Vec::new();
        self.publish(port, &mut notify);
        taken.map(|()| Turn { more, notify })
    }

    /// Reads the head of each frame into the staging area.
    fn read_heads(&mut self, port: PortId, frames: &mut [Frame], copier: &mut impl Copier) {
        let Some(card) = self.cards.get(&port) else { return };
        self.copies.clear();
        for (index, frame) in frames.iter().enumerate() {
            let head = usize::from(frame.bytes).min(HEAD);
            part(card.domain, frame, 0..head, |at| Place::Staging(index * LOCAL + at), &mut self.copies);
        }
        copier.copy(&mut self.copies);
        for copy in &self.copies {
            if let (false, Place::Staging(at)) = (copy.done, copy.to)
                && let Some(frame) = frames.get_mut(at / LOCAL)
            {
                frame.unreadable = true;
                // A head of zeroes: no station has that source, so it goes nowhere.
                let slot = at / LOCAL * LOCAL;
                copier.staging().get_mut(slot..slot + HEAD).into_iter().for_each(|head| head.fill(0));
            }
        }
    }

    /// Finds out where each frame goes, and puts down the copies that this takes. Frames for dom0 are brought at once.
    fn decide(
        &mut self,
        now_ns: u64,
        port: PortId,
        frames: &[Frame],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) {
        self.copies.clear();
        self.pages.clear();
        self.deliveries.clear();
        for (index, frame) in frames.iter().enumerate() {
            let slot = index * LOCAL;
            let bytes = usize::from(frame.bytes);
            let mut ports = core::mem::take(&mut self.ports);
            ports.clear();
            let head = copier.staging().get(slot..slot + bytes.min(HEAD)).unwrap_or_default();
            // Whose frame goes nowhere is told by the switch's counters.
            let _ = self.switch.forward(now_ns, port, head, bytes, |to| ports.push(to));
            let complete = frame.checksum_blank && ports.iter().any(|to| self.wants_checksum(*to));
            let whole = (complete || ports.iter().any(|to| !self.cards.contains_key(to)))
                && bytes <= LOCAL
                && self.fetch(port, frame, slot, copier);
            let mut blank = frame.checksum_blank;
            if let (true, Some(all)) = (whole && complete, copier.staging().get_mut(slot..slot + bytes)) {
                netswitch::complete_checksum(all);
                blank = false;
            }
            for to in &ports {
                if self.cards.contains_key(to) {
                    self.reserve(port, *to, index, frame, whole, blank);
                } else if let (true, Some(all)) = (whole, copier.staging().get(slot..slot + bytes)) {
                    let checksum = if blank { Checksum::Blank } else { Checksum::Complete };
                    local(*to, &mut Vec::from(all), checksum);
                } else {
                    self.missed.entry(*to).or_default().too_long += 1;
                }
            }
            self.ports = ports;
        }
    }

    /// Whether a card's guest takes no frames without checksums.
    fn wants_checksum(&self, port: PortId) -> bool {
        self.cards.get(&port).is_some_and(|card| !card.features.blank_checksums)
    }

    /// Reads what is behind the head of a frame, too; false when it cannot be read.
    fn fetch(&mut self, port: PortId, frame: &Frame, slot: usize, copier: &mut impl Copier) -> bool {
        let Some(card) = self.cards.get(&port) else { return false };
        let mut copies = Vec::new();
        part(card.domain, frame, HEAD..usize::from(frame.bytes), |at| Place::Staging(slot + at), &mut copies);
        copier.copy(&mut copies);
        all_done(&copies)
    }

    /// Takes pages of a card's guest for a frame and puts down the copies into them: of its head from the staging area, of the rest
    /// from there or from its sender.
    fn reserve(&mut self, from: PortId, to: PortId, index: usize, frame: &Frame, whole: bool, blank: bool) {
        let Some(domain) = self.cards.get(&from).map(|card| card.domain) else { return };
        let Some(card) = self.cards.get_mut(&to) else { return };
        let missed = self.missed.entry(to).or_default();
        let too_long = usize::from(frame.bytes) > PAGE_SIZE && !card.features.scatter_gather;
        if too_long || blank && !card.features.blank_checksums {
            missed.too_long += 1;
            return;
        }
        let first = self.pages.len();
        match card.receive.take(frame.bytes, &mut self.pages) {
            Ok(true) => {}
            Ok(false) => {
                missed.no_room += 1;
                return;
            }
            Err(Closed) => {
                card.broken = true;
                return;
            }
        }
        let (start, slot, bytes) = (self.copies.len(), index * LOCAL, usize::from(frame.bytes));
        let pages = self.pages.get(first..).unwrap_or_default();
        let staged = if whole { bytes } else { bytes.min(HEAD) };
        // In a slot of the staging area, and in a guest's page, a part of this length is in one piece.
        self.copies.push(Copy {
            from: Place::Staging(slot),
            to: place(card.domain, pages, 0),
            bytes: staged as u16,
            done: false,
        });
        part(domain, frame, staged..bytes, |at| place(card.domain, pages, at), &mut self.copies);
        let mut flags = RxFlags::empty();
        if blank {
            flags |= RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED;
        } else if frame.validated {
            flags |= RxFlags::DATA_VALIDATED;
        }
        let (pages, copies) = (first..self.pages.len(), start..self.copies.len());
        self.deliveries.push(Delivery { frame: index, to, pages, copies, flags });
    }

    /// Has everything copied, shows receivers what they got, and answers the sender.
    fn bring(&mut self, port: PortId, frames: &[Frame], copier: &mut impl Copier) {
        copier.copy(&mut self.copies);
        let mut unreadable = [false; FRAMES];
        for delivery in &self.deliveries {
            let Some(frame) = frames.get(delivery.frame) else { continue };
            let pages = self.pages.get(delivery.pages.clone()).unwrap_or_default();
            let copies = self.copies.get(delivery.copies.clone()).unwrap_or_default();
            let done = all_done(copies);
            let source = self.cards.get(&port).map(|card| card.domain);
            let readable = done || source.is_none_or(|domain| readable(domain, frame, copier));
            let Some(card) = self.cards.get_mut(&delivery.to) else { continue };
            match (done, readable) {
                (true, _) => card.receive.fill(pages, frame.bytes, delivery.flags),
                (false, true) => card.receive.refuse(pages, true),
                (false, false) => {
                    card.receive.refuse(pages, false);
                    unreadable[delivery.frame % FRAMES] = true;
                }
            }
            if !done {
                self.missed.entry(delivery.to).or_default().failed += 1;
            }
            if !self.touched.contains(&delivery.to) {
                self.touched.push(delivery.to);
            }
        }
        let Some(card) = self.cards.get_mut(&port) else { return };
        for (frame, unreadable) in frames.iter().zip(unreadable) {
            let sent = !unreadable && !frame.unreadable;
            if !sent {
                card.transmit.blame(Fault::Grant);
            }
            card.transmit.answer(frame, sent);
        }
    }

    /// A frame of dom0's own, from one of its ports; cards whose guests want to be notified are added to `notify`.
    pub fn send(
        &mut self,
        now_ns: u64,
        port: PortId,
        frame: &[u8],
        copier: &mut impl Copier,
        notify: &mut Vec<PortId>,
        local: Local<'_>,
    ) {
        let Some(slot) = copier.staging().get_mut(..frame.len()).filter(|slot| slot.len() <= LOCAL) else {
            return;
        };
        slot.copy_from_slice(frame);
        let mut ports = core::mem::take(&mut self.ports);
        ports.clear();
        let _ = self.switch.forward(now_ns, port, frame, frame.len(), |to| ports.push(to));
        self.copies.clear();
        self.pages.clear();
        self.deliveries.clear();
        // At most 2048.
        let whole = Frame::of_ours(frame.len() as u16);
        for to in &ports {
            if self.cards.contains_key(to) {
                self.reserve(*to, *to, 0, &whole, true, false);
            } else {
                local(*to, &mut Vec::from(frame), Checksum::Complete);
            }
        }
        self.ports = ports;
        self.bring(port, core::slice::from_ref(&whole), copier);
        self.publish(port, notify);
    }

    /// Shows everybody concerned what there is; who wants to hear of it is added to `notify`.
    fn publish(&mut self, port: PortId, notify: &mut Vec<PortId>) {
        if let Some(card) = self.cards.get_mut(&port)
            && card.transmit.publish()
        {
            notify.push(port);
        }
        for to in self.touched.drain(..) {
            if let Some(card) = self.cards.get_mut(&to)
                && card.receive.publish()
                && !notify.contains(&to)
            {
                notify.push(to);
            }
        }
    }
}

/// Whether all pages of a frame can be read, to know whose fault a failed copy is.
fn readable(domain: DomId, frame: &Frame, copier: &mut impl Copier) -> bool {
    let copies = frame.pieces.iter().map(|piece| Copy {
        from: Place::Granted { domain, gref: piece.gref, offset: piece.offset },
        to: Place::Staging(STAGING),
        bytes: 1,
        done: false,
    });
    let mut copies: Vec<Copy> = copies.collect();
    copier.copy(&mut copies);
    all_done(&copies)
}

#[cfg(test)]
mod tests;

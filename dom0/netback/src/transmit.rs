//! What a guest sends: frames from requests.

use crate::{Closed, Fault};
use arrayvec::ArrayVec;
use guest_sdk::ring::{Back, SharedPage};
use hypercall_abi::io::netif::{
    Extra, GSO_TYPE_TCPV4, NR_SLOTS_MIN, NetifExtraInfo, NetifTxRequest, NetifTxResponse, RSP_ERROR,
    RSP_NULL, RSP_OKAY, TxFlags,
};
use hypercall_abi::{GrantRef, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of the shortest frame: one that has an Ethernet header.
const SHORTEST: u16 = 14;
/// Slots of a packet beyond which it is none. Linux allows some more than are agreed on, and drops the packet.
const ABSURD: usize = 4 * NR_SLOTS_MIN;

/// A part of a frame, in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The page.
    pub gref: GrantRef,
    /// First byte in it.
    pub offset: u16,
    /// Bytes, not 0.
    pub bytes: u16,
}

/// A frame that a guest wants to send.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Its pieces, in order.
    pub pieces: ArrayVec<Piece, NR_SLOTS_MIN>,
    /// Bytes of all of them.
    pub bytes: u16,
    /// Its transport checksum is left to us.
    pub checksum_blank: bool,
    /// Its transport checksum is right.
    pub validated: bool,
    /// It is to be cut into segments of TCP over IPv4 with so many bytes of payload, not 0; its checksum is blank.
    pub segment: Option<u16>,
    /// It could not be read, or it is not what it says.
    pub(crate) failed: Option<Fault>,
    ids: ArrayVec<u16, NR_SLOTS_MIN>,
    extras: usize,
}

impl Frame {
    /// As a new one.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.ids.clear();
        (self.bytes, self.checksum_blank, self.validated) = (0, false, false);
        (self.segment, self.failed, self.extras) = (None, None, 0);
    }

    /// Slots of the ring that are its.
    pub(crate) fn slots(&self) -> usize {
        self.ids.len() + self.extras
    }
}

/// The ring of what a guest sends.
pub struct Transmit<M> {
    ring: Back<M, NetifTxRequest, NetifTxResponse>,
    unpublished: bool,
    fault: Option<Fault>,
    faulty: bool,
}

impl<M: SharedPage> Transmit<M> {
    /// Takes over a ring.
    pub fn new(page: M) -> Self {
        Self { ring: Back::new(page), unpublished: false, fault: None, faulty: false }
    }

    /// Takes the next frame into `frame`, an empty one; bad ones before it are answered. False when there is none; at most `limit`
    /// requests are looked at.
    ///
    /// # Errors
    /// [`Closed`]: an index is out of range, or a packet is not all there.
    pub fn next(&mut self, limit: &mut usize, frame: &mut Frame) -> Result<bool, Closed> {
        while *limit > 0 {
            let Some(first) = self.ring.pop()? else { return Ok(false) };
            *limit -= 1;
            match self.collect(first, frame, limit)? {
                None => return Ok(true),
                Some(fault) => {
                    self.blame(fault);
                    self.respond(frame, RSP_ERROR);
                    frame.clear();
                }
            }
        }
        Ok(false)
    }

    /// Takes all slots of a packet whose first request is there; what is wrong with it, if anything is.
    fn collect(
        &mut self,
        first: NetifTxRequest,
        frame: &mut Frame,
        limit: &mut usize,
    ) -> Result<Option<Fault>, Closed> {
        let mut fault = None;
        let flags = TxFlags::from_bits_retain(first.flags);
        let mut more = flags.contains(TxFlags::EXTRA_INFO);
        while more {
            let slot = self.within(frame.extras, limit)?;
            frame.extras += 1;
            let extra = slot.as_bytes().first_chunk::<{ size_of::<NetifExtraInfo>() }>();
            let extra = extra.and_then(|bytes| NetifExtraInfo::read_from_bytes(bytes).ok());
            match extra.and_then(|extra| extra.extra()) {
                // Of two, Linux' back end takes the second; nobody sends two.
                Some(Extra::Gso { size, kind: GSO_TYPE_TCPV4 }) if frame.segment.is_none() => {
                    frame.segment = Some(size);
                }
                _ => fault = Some(Fault::Extra),
            }
            more = extra.is_some_and(|extra| extra.more());
        }
        let answer = NetifTxResponse { id: first.id, status: RSP_ERROR };
        frame.ids.push(first.id);
        // The first request's own bytes are those that the others do not have.
        frame.pieces.push(Piece { gref: first.gref, offset: first.offset, bytes: first.size });
        let mut rest = first.size;
        let mut more = flags.contains(TxFlags::MORE_DATA);
        // Those that a frame has no room for are answered at once, and the others with it: in order all the same.
        let mut slots = 1;
        while more {
            let request = self.within(frame.extras + slots, limit)?;
            slots += 1;
            match rest.checked_sub(request.size) {
                Some(left) if request.size > 0 => rest = left,
                _ => fault = fault.or(Some(Fault::Shape)),
            }
            let piece = Piece { gref: request.gref, offset: request.offset, bytes: request.size };
            if frame.pieces.try_push(piece).is_err() || frame.ids.try_push(request.id).is_err() {
                if slots == NR_SLOTS_MIN + 1 {
                    self.respond(frame, RSP_ERROR);
                    self.blame(Fault::Shape);
                }
                self.ring.push(NetifTxResponse { id: request.id, ..answer });
            }
            more = TxFlags::from_bits_retain(request.flags).contains(TxFlags::MORE_DATA);
        }
        if slots > NR_SLOTS_MIN {
            // It was answered.
            (frame.extras, frame.pieces) = (0, ArrayVec::new());
            frame.ids.clear();
            return Ok(Some(Fault::Shape));
        }
        if let Some(piece) = frame.pieces.first_mut() {
            piece.bytes = rest;
        }
        let inside = |piece: &Piece| {
            piece.bytes > 0 && usize::from(piece.offset) + usize::from(piece.bytes) <= PAGE_SIZE
        };
        if first.size < SHORTEST || !frame.pieces.iter().all(inside) {
            fault = fault.or(Some(Fault::Shape));
        }
        frame.bytes = first.size;
        // Segments get theirs when they are made, and some front ends say nothing about it.
        frame.checksum_blank = flags.contains(TxFlags::CSUM_BLANK) || frame.segment.is_some();
        frame.validated = flags.contains(TxFlags::DATA_VALIDATED);
        Ok(fault)
    }

    /// A slot that has to be there, because the one before it said so. A front end shows whole packets only; and one packet takes no more
    /// slots than the ring has, so this ends.
    fn within(&mut self, before: usize, limit: &mut usize) -> Result<NetifTxRequest, Closed> {
        *limit = limit.saturating_sub(1);
        if before >= ABSURD {
            return Err(Closed);
        }
        self.ring.pop()?.ok_or(Closed)
    }

    /// Answers a frame.
    pub fn answer(&mut self, frame: &Frame, sent: bool) {
        self.respond(frame, if sent { RSP_OKAY } else { RSP_ERROR });
    }

    fn respond(&mut self, frame: &Frame, status: i16) {
        for (index, id) in frame.ids.iter().enumerate() {
            self.ring.push(NetifTxResponse { id: *id, status });
            if index == 0 {
                for _ in 0..frame.extras {
                    self.ring.push(NetifTxResponse { id: 0, status: RSP_NULL });
                }
            }
        }
        self.unpublished = true;
    }

    /// Notes that the front end did something wrong.
    pub fn blame(&mut self, fault: Fault) {
        if !core::mem::replace(&mut self.faulty, true) {
            self.fault = Some(fault);
        }
    }

    /// The first thing that was wrong, once.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.fault.take()
    }

    /// Shows the answers; true when the front end wants to hear of them.
    #[must_use = "the front end sleeps if it is not notified"]
    pub fn publish(&mut self) -> bool {
        core::mem::take(&mut self.unpublished) && self.ring.publish()
    }

    /// Asks to be notified of the next request; true when there is one already.
    #[must_use = "nobody is notified of what is there already"]
    pub fn prepare_to_wait(&self) -> bool {
        self.ring.prepare_to_wait()
    }
}

//! What a guest sends: frames from requests.

use crate::{Closed, Fault};
use alloc::vec::Vec;
use guest_sdk::ring::{Back, SharedPage};
use hypercall_abi::io::netif::{
    NR_SLOTS_MIN, NetifExtraInfo, NetifTxRequest, NetifTxResponse, RSP_ERROR, RSP_NULL, RSP_OKAY, TxFlags,
};
use hypercall_abi::{GrantRef, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of the shortest frame: one that has an Ethernet header.
const SHORTEST: u16 = 14;

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its pieces, in order.
    pub pieces: Vec<Piece>,
    /// Bytes of all of them.
    pub bytes: u16,
    /// Its transport checksum is left to us.
    pub checksum_blank: bool,
    /// Its transport checksum is right.
    pub validated: bool,
    /// Its head could not be read.
    pub(crate) unreadable: bool,
    slots: Slots,
}

impl Frame {
    /// One that no guest has sent.
    pub(crate) fn of_ours(bytes: u16) -> Self {
        Self {
            pieces: Vec::new(),
            bytes,
            checksum_blank: false,
            validated: true,
            unreadable: false,
            slots: Slots::default(),
        }
    }
}

/// The slots of a frame, to be answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Slots {
    ids: Vec<u16>,
    /// Slots behind the first that were no requests.
    extras: usize,
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

    /// The next frame; bad ones before it are answered. At most `limit` requests are looked at.
    ///
    /// # Errors
    /// [`Closed`]: an index is out of range, or a packet is not all there.
    pub fn next(&mut self, limit: &mut usize) -> Result<Option<Frame>, Closed> {
        while *limit > 0 {
            let Some(first) = self.ring.pop()? else { return Ok(None) };
            *limit -= 1;
            let (slots, shape) = self.collect(first, limit)?;
            match shape {
                Ok(frame) => return Ok(Some(Frame { slots, ..frame })),
                Err(fault) => {
                    self.blame(fault);
                    self.respond(&slots, RSP_ERROR);
                }
            }
        }
        Ok(None)
    }

    /// Takes all slots of a packet whose first request is there.
    fn collect(
        &mut self,
        first: NetifTxRequest,
        limit: &mut usize,
    ) -> Result<(Slots, Result<Frame, Fault>), Closed> {
        let mut slots = Slots { ids: Vec::from([first.id]), extras: 0 };
        let mut fault = None;
        let flags = TxFlags::from_bits_retain(first.flags);
        let mut more = flags.contains(TxFlags::EXTRA_INFO);
        while more {
            let extra = self.within(&slots, limit)?;
            slots.extras += 1;
            // Nothing that an extra slot could say has been offered.
            fault = Some(Fault::Extra);
            let bytes = extra.as_bytes().first_chunk::<{ size_of::<NetifExtraInfo>() }>();
            more =
                bytes.and_then(|bytes| NetifExtraInfo::read_from_bytes(bytes).ok()).is_some_and(|e| e.more());
        }
        let mut pieces = Vec::new();
        let mut rest = u32::from(first.size);
        let mut more = flags.contains(TxFlags::MORE_DATA);
        while more {
            let request = self.within(&slots, limit)?;
            slots.ids.push(request.id);
            match rest.checked_sub(u32::from(request.size)) {
                Some(left) if request.size > 0 => rest = left,
                _ => fault = fault.or(Some(Fault::Shape)),
            }
            pieces.push(Piece { gref: request.gref, offset: request.offset, bytes: request.size });
            more = TxFlags::from_bits_retain(request.flags).contains(TxFlags::MORE_DATA);
        }
        // The first request's own bytes are those that the others do not have.
        pieces.insert(0, Piece { gref: first.gref, offset: first.offset, bytes: rest as u16 });
        let inside = |piece: &Piece| {
            piece.bytes > 0 && usize::from(piece.offset) + usize::from(piece.bytes) <= PAGE_SIZE
        };
        if first.size < SHORTEST || pieces.len() > NR_SLOTS_MIN || !pieces.iter().all(inside) {
            fault = fault.or(Some(Fault::Shape));
        }
        let frame = Frame {
            pieces,
            bytes: first.size,
            checksum_blank: flags.contains(TxFlags::CSUM_BLANK),
            validated: flags.contains(TxFlags::DATA_VALIDATED),
            unreadable: false,
            slots: Slots::default(),
        };
        Ok((slots, fault.map_or(Ok(frame), Err)))
    }

    /// A slot that has to be there, because the one before it said so. A front end shows whole packets only; and one packet takes no more
    /// slots than the ring has, so this ends.
    fn within(&mut self, slots: &Slots, limit: &mut usize) -> Result<NetifTxRequest, Closed> {
        *limit = limit.saturating_sub(1);
        // Linux allows some more than are agreed on, and drops the packet; beyond that it is no packet at all.
        if slots.ids.len() + slots.extras > 4 * NR_SLOTS_MIN {
            return Err(Closed);
        }
        self.ring.pop()?.ok_or(Closed)
    }

    /// Answers a frame.
    pub fn answer(&mut self, frame: &Frame, sent: bool) {
        self.respond(&frame.slots, if sent { RSP_OKAY } else { RSP_ERROR });
    }

    fn respond(&mut self, slots: &Slots, status: i16) {
        for (index, id) in slots.ids.iter().enumerate() {
            self.ring.push(NetifTxResponse { id: *id, status });
            if index == 0 {
                for _ in 0..slots.extras {
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

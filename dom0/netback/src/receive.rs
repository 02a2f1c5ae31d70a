//! What a guest gets: pages that it has put up, filled.
//!
//! Responses are in the order of the requests: Linux' front end counts on that. So what is taken is answered, filled or not.

use crate::{Closed, Fault};
use alloc::vec::Vec;
use guest_sdk::ring::{Back, SharedPage};
use hypercall_abi::PAGE_SIZE;
use hypercall_abi::io::netif::{
    Extra, GSO_TYPE_TCPV4, NetifExtraInfo, NetifRxRequest, NetifRxResponse, RSP_ERROR, RxFlags,
};
use zerocopy::transmute;

/// The ring of what a guest gets.
pub struct Receive<M> {
    ring: Back<M, NetifRxRequest, NetifRxResponse>,
    /// Taken from the ring for a frame for which there were not enough.
    spare: Vec<NetifRxRequest>,
    unpublished: bool,
    fault: Option<Fault>,
    faulty: bool,
}

impl<M: SharedPage> Receive<M> {
    /// Takes over a ring.
    pub fn new(page: M) -> Self {
        Self { ring: Back::new(page), spare: Vec::new(), unpublished: false, fault: None, faulty: false }
    }

    /// Takes slots for a frame of `bytes`, one for each page, and one more if it is a `large` one; none at all when there are not enough.
    /// Then the guest says when it puts up more.
    ///
    /// # Errors
    /// [`Closed`]: an index is out of range.
    pub fn take(&mut self, bytes: u16, large: bool, slots: &mut Vec<NetifRxRequest>) -> Result<bool, Closed> {
        let wanted = wanted(bytes.into(), large);
        // Most frames.
        if wanted == 1
            && self.spare.is_empty()
            && let Some(request) = self.ring.pop()?
        {
            slots.push(request);
            return Ok(true);
        }
        if self.gather(wanted)? < wanted {
            return Ok(false);
        }
        slots.extend(self.spare.drain(..wanted));
        Ok(true)
    }

    /// Puts back slots that were taken last, for none of which there was an answer.
    pub fn put_back(&mut self, slots: &mut Vec<NetifRxRequest>) {
        self.spare.splice(0..0, slots.drain(..));
    }

    /// For how many frames of `bytes` there are slots, up to `most`; as [`take`](Self::take) would take them.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn room(&mut self, bytes: usize, large: bool, most: usize) -> Result<usize, Closed> {
        let each = wanted(bytes, large);
        Ok(self.gather(each * most)? / each)
    }

    /// Has so many slots at hand, or as many as there are.
    fn gather(&mut self, wanted: usize) -> Result<usize, Closed> {
        let mut asked = false;
        while self.spare.len() < wanted {
            match self.ring.pop()? {
                Some(request) => {
                    self.spare.push(request);
                    asked = false;
                }
                // The guest may have put up some until it was asked; it is not believed twice.
                None if !asked && self.ring.prepare_to_wait() => asked = true,
                None => break,
            }
        }
        Ok(self.spare.len().min(wanted))
    }

    /// Shows the guest a frame of `bytes` in what was taken for it: pages, and behind the first the slot of a large frame, which says
    /// how it is to be cut.
    pub fn fill(&mut self, slots: &[NetifRxRequest], bytes: u16, flags: RxFlags, segment: Option<u16>) {
        let mut left = usize::from(bytes);
        let mut first = if segment.is_some() { flags | RxFlags::EXTRA_INFO } else { flags };
        for (index, slot) in slots.iter().enumerate() {
            if let (1, Some(size)) = (index, segment) {
                let extra = NetifExtraInfo::new(Extra::Gso { size, kind: GSO_TYPE_TCPV4 }, false);
                self.ring.push(transmute!(extra));
                continue;
            }
            let here = left.min(PAGE_SIZE);
            left -= here;
            let more = if left > 0 { RxFlags::MORE_DATA } else { RxFlags::empty() };
            self.ring.push(NetifRxResponse {
                id: slot.id,
                offset: 0,
                flags: (core::mem::take(&mut first) | more).bits(),
                // At most 4096.
                status: here as i16,
            });
        }
        self.unpublished = true;
    }

    /// Tells the guest that pages were not filled; with `blame`, because they cannot be written to.
    pub fn refuse(&mut self, pages: &[NetifRxRequest], blame: bool) {
        for page in pages {
            self.ring.push(NetifRxResponse { id: page.id, offset: 0, flags: 0, status: RSP_ERROR });
        }
        self.unpublished = true;
        if blame && !core::mem::replace(&mut self.faulty, true) {
            self.fault = Some(Fault::Grant);
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
}

/// Slots of a frame of `bytes`.
fn wanted(bytes: usize, large: bool) -> usize {
    bytes.div_ceil(PAGE_SIZE).max(1) + usize::from(large)
}

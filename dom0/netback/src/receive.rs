//! What a guest gets: pages that it has put up, filled.
//!
//! Responses are in the order of the requests: Linux' front end counts on that. So what is taken is answered, filled or not.

use crate::{Closed, Fault};
use alloc::vec::Vec;
use guest_sdk::ring::{Back, SharedPage};
use hypercall_abi::PAGE_SIZE;
use hypercall_abi::io::netif::{NetifRxRequest, NetifRxResponse, RSP_ERROR, RxFlags};

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

    /// Takes pages for a frame of `bytes`; none at all when there are not enough.
    ///
    /// # Errors
    /// [`Closed`]: an index is out of range.
    pub fn take(&mut self, bytes: u16, pages: &mut Vec<NetifRxRequest>) -> Result<bool, Closed> {
        let wanted = usize::from(bytes).div_ceil(PAGE_SIZE);
        while self.spare.len() < wanted {
            match self.ring.pop()? {
                Some(request) => self.spare.push(request),
                None => return Ok(false),
            }
        }
        pages.extend(self.spare.drain(..wanted));
        Ok(true)
    }

    /// Shows the guest a frame of `bytes` in `pages`.
    pub fn fill(&mut self, pages: &[NetifRxRequest], bytes: u16, flags: RxFlags) {
        let mut left = usize::from(bytes);
        for (index, page) in pages.iter().enumerate() {
            let here = left.min(PAGE_SIZE);
            left -= here;
            let first = if index == 0 { flags } else { RxFlags::empty() };
            let more = if index + 1 < pages.len() { RxFlags::MORE_DATA } else { RxFlags::empty() };
            self.ring.push(NetifRxResponse {
                id: page.id,
                offset: 0,
                flags: (first | more).bits(),
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

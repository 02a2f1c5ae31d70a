//! Request and response rings (public/io/ring.h), as arithmetic on indices.
//!
//! A ring page starts with four free-running u32 indices ([`RingHeader`]) and goes on with slots at [`SLOTS_OFFSET`], each as
//! large as the larger of request and response; a response takes the slot of a request that was consumed.
//!
//! The front end owns `req_prod` and `rsp_event`, the back end `rsp_prod` and `req_event`. Producing: store the slots, release
//! barrier, store the index, *full* barrier, load the peer's event index, and notify if [`must_notify`]. Consuming: load the
//! index, acquire barrier, copy slots out; when all is consumed, store one's event index as consumed + 1, full barrier, and
//! look at the producer's index once more before sleeping.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where the slots begin.
pub const SLOTS_OFFSET: usize = 64;

/// The head of a ring page.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RingHeader {
    /// Requests produced; front end.
    pub req_prod: u32,
    /// Notify the back end when this request is produced; back end.
    pub req_event: u32,
    /// Responses produced; back end.
    pub rsp_prod: u32,
    /// Notify the front end when this response is produced; front end.
    pub rsp_event: u32,
    /// For some protocols' own use.
    pub private: [u8; 4],
    /// Padding.
    pub pad: [u8; 44],
}

impl RingHeader {
    /// A new ring: nothing produced, both sides want to hear of the first. The front end stores it before it tells anybody.
    pub const INITIAL: Self =
        RingHeader { req_prod: 0, req_event: 1, rsp_prod: 0, rsp_event: 1, private: [0; 4], pad: [0; 44] };

    /// Offset of `req_prod` in the page.
    pub const REQ_PROD: usize = core::mem::offset_of!(Self, req_prod);
    /// Offset of `req_event`.
    pub const REQ_EVENT: usize = core::mem::offset_of!(Self, req_event);
    /// Offset of `rsp_prod`.
    pub const RSP_PROD: usize = core::mem::offset_of!(Self, rsp_prod);
    /// Offset of `rsp_event`.
    pub const RSP_EVENT: usize = core::mem::offset_of!(Self, rsp_event);
}

/// Slots of a ring of `bytes` with slots of `slot` bytes: the largest power of two that fits, 0 when none does.
#[must_use]
pub const fn slots(bytes: usize, slot: usize) -> u32 {
    if slot == 0 || bytes < SLOTS_OFFSET + slot {
        return 0;
    }
    let fit = (bytes - SLOTS_OFFSET) / slot;
    if fit > 1 << 31 { 1 << 31 } else { 1 << fit.ilog2() }
}

/// Offset in the ring of the slot of an index; `slots` must be a power of two.
#[must_use]
pub const fn slot_offset(index: u32, slots: u32, slot: usize) -> usize {
    SLOTS_OFFSET + (index & slots.wrapping_sub(1)) as usize * slot
}

/// Whether going from `old` to `new` produced the item that the peer's `event` asks to hear of.
#[must_use]
pub const fn must_notify(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// The peer's index claims more than a ring can hold: stop talking to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

/// Indices that the front end keeps for itself; what it reads back from the page it does not trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontIndices {
    slots: u32,
    req_prod: u32,
    rsp_cons: u32,
}

impl FrontIndices {
    /// A new ring's; `slots` as from [`slots`].
    #[must_use]
    pub const fn new(slots: u32) -> Self {
        Self::attach(slots, 0)
    }

    /// Those of a ring that is in use, with every request before `index` answered.
    #[must_use]
    pub const fn attach(slots: u32, index: u32) -> Self {
        FrontIndices { slots, req_prod: index, rsp_cons: index }
    }

    /// Requests that wait for their responses.
    #[must_use]
    pub const fn outstanding(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Slots that a request can be put into.
    #[must_use]
    pub const fn free(&self) -> u32 {
        self.slots.wrapping_sub(self.outstanding())
    }

    /// The index of the next request, taken; `None` when the ring is full.
    pub const fn next_request(&mut self) -> Option<u32> {
        if self.free() == 0 {
            return None;
        }
        let index = self.req_prod;
        self.req_prod = index.wrapping_add(1);
        Some(index)
    }

    /// What to store as `req_prod`.
    #[must_use]
    pub const fn req_prod(&self) -> u32 {
        self.req_prod
    }

    /// The index of the next response to consume, given the back end's `rsp_prod`.
    ///
    /// # Errors
    /// [`Overflow`] when the back end claims to have answered more than was asked.
    pub const fn next_response(&mut self, rsp_prod: u32) -> Result<Option<u32>, Overflow> {
        let waiting = rsp_prod.wrapping_sub(self.rsp_cons);
        if waiting > self.outstanding() {
            return Err(Overflow);
        }
        if waiting == 0 {
            return Ok(None);
        }
        let index = self.rsp_cons;
        self.rsp_cons = index.wrapping_add(1);
        Ok(Some(index))
    }

    /// What to store as `rsp_event` before sleeping.
    #[must_use]
    pub const fn rsp_event(&self) -> u32 {
        self.rsp_cons.wrapping_add(1)
    }
}

/// Indices that the back end keeps for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackIndices {
    slots: u32,
    rsp_prod: u32,
    req_cons: u32,
}

impl BackIndices {
    /// A ring's, from its first `rsp_prod` on (not 0 when a restarted back end takes over).
    #[must_use]
    pub const fn new(slots: u32, rsp_prod: u32) -> Self {
        BackIndices { slots, rsp_prod, req_cons: rsp_prod }
    }

    /// The index of the next request to consume, given the front end's `req_prod`.
    ///
    /// # Errors
    /// [`Overflow`] when the front end claims to have asked more than the ring holds.
    pub const fn next_request(&mut self, req_prod: u32) -> Result<Option<u32>, Overflow> {
        if req_prod.wrapping_sub(self.rsp_prod) > self.slots {
            return Err(Overflow);
        }
        let waiting = req_prod.wrapping_sub(self.req_cons);
        if waiting > self.slots {
            // The producer's index went back behind what was consumed.
            return Err(Overflow);
        }
        if waiting == 0 {
            return Ok(None);
        }
        let index = self.req_cons;
        self.req_cons = index.wrapping_add(1);
        Ok(Some(index))
    }

    /// Requests consumed and not answered yet.
    #[must_use]
    pub const fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// The index for the next response, taken; `None` when every request is answered already.
    pub const fn next_response(&mut self) -> Option<u32> {
        if self.unanswered() == 0 {
            return None;
        }
        let index = self.rsp_prod;
        self.rsp_prod = index.wrapping_add(1);
        Some(index)
    }

    /// What to store as `rsp_prod`.
    #[must_use]
    pub const fn rsp_prod(&self) -> u32 {
        self.rsp_prod
    }

    /// What to store as `req_event` before sleeping.
    #[must_use]
    pub const fn req_event(&self) -> u32 {
        self.req_cons.wrapping_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_a_power_of_two() {
        assert_eq!(slots(4096, 112), 32);
        assert_eq!(slots(4096, 12), 256);
        assert_eq!(slots(4096, 8), 256);
        assert_eq!(slots(64, 8), 0);
        assert_eq!(slots(4096, 0), 0);
        assert_eq!(slot_offset(33, 32, 112), 64 + 112);
    }

    #[test]
    fn both_ends_meet_across_the_wrap_of_indices() {
        let start = u32::MAX - 5;
        let mut front = FrontIndices::attach(4, start);
        let mut back = BackIndices::new(4, start);
        for round in 0..16 {
            let asked: u32 = (0..=round % 4).map(|_| front.next_request().unwrap()).count() as u32;
            for _ in 0..asked {
                assert!(back.next_request(front.req_prod()).unwrap().is_some());
            }
            assert_eq!(back.next_request(front.req_prod()), Ok(None));
            for _ in 0..asked {
                let index = back.next_response().unwrap();
                assert_eq!(front.next_response(back.rsp_prod()), Ok(Some(index)));
            }
            assert_eq!(back.next_response(), None);
            assert_eq!(front.free(), 4);
        }
    }

    #[test]
    fn a_full_ring_takes_no_request() {
        let mut front = FrontIndices::new(2);
        assert!(front.next_request().is_some() && front.next_request().is_some());
        assert_eq!(front.next_request(), None);
    }

    #[test]
    fn lying_indices_are_seen() {
        let mut front = FrontIndices::new(8);
        front.next_request();
        assert_eq!(front.next_response(2), Err(Overflow));
        assert_eq!(front.next_response(u32::MAX), Err(Overflow));
        let mut back = BackIndices::new(8, 0);
        assert_eq!(back.next_request(9), Err(Overflow));
        assert_eq!(back.next_request(3), Ok(Some(0)));
        assert_eq!(back.next_request(3), Ok(Some(1)));
        assert_eq!(back.next_request(1), Err(Overflow), "an index that goes back");
    }

    #[test]
    fn notify_exactly_when_the_event_was_passed() {
        assert!(must_notify(0, 1, 1));
        assert!(!must_notify(1, 2, 1));
        assert!(must_notify(0, 5, 3));
        assert!(!must_notify(0, 5, 6));
        assert!(must_notify(u32::MAX, 1, 0));
        assert!(!must_notify(3, 3, 3));
    }
}

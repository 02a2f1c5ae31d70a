//! Xen's request and response rings (public io/ring.h), generic over the memory they lie in, so that both ends meet in a
//! host test.
//!
//! One page, or several side by side: four indexes, then a power-of-two number of slots shared by requests and responses. Only the front moves
//! `req_prod`, only the back `rsp_prod`; each says in its `*_event` from which index on it wants to be notified. The other
//! side's indexes are claims: an index that is out of range is an error, never an out-of-bounds access.
//!
//! Order: a slot is written before its producer index (release); the index is read before the slot (acquire); and a side
//! that goes to sleep writes its event index, then looks at the producer index once more (both with a full fence between).

#[cfg(any(test, feature = "host-pages"))]
pub mod host;

use crate::memory::Shared;
use alloc::sync::Arc;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU32, Ordering, fence};
use hypercall_abi::io::ring::{
    BackIndices, FrontIndices, Overflow, RingHeader, must_notify, slot_offset, slots,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A page that another domain may write at any time.
pub trait SharedPage {
    /// Bytes in it.
    fn size(&self) -> usize;

    /// Copies bytes out, as they are now.
    ///
    /// # Panics
    /// When `offset..offset + to.len()` is not inside.
    fn read_bytes(&self, offset: usize, to: &mut [u8]);

    /// Copies bytes in.
    ///
    /// # Panics
    /// When `offset..offset + from.len()` is not inside.
    fn write_bytes(&self, offset: usize, from: &[u8]);

    /// A word of the page as an atomic.
    ///
    /// # Panics
    /// When `offset` is no multiple of 4 or not inside.
    fn word(&self, offset: usize) -> &AtomicU32;

    /// The memory that it is, if it is nothing but that: then bytes go from one to another without a stop.
    fn memory(&self) -> Option<&Shared> {
        None
    }
}

/// Copies bytes of one page into another, as they are now.
///
/// # Panics
/// When `bytes` from either offset on are not inside.
pub fn copy_between(from: &dyn SharedPage, at: usize, to: &dyn SharedPage, to_at: usize, bytes: usize) {
    if let (Some(from), Some(to)) = (from.memory(), to.memory()) {
        return from.copy_to(at, to, to_at, bytes);
    }
    let mut between = [0; 256];
    for done in (0..bytes).step_by(between.len()) {
        let part = &mut between[..(bytes - done).min(256)];
        from.read_bytes(at + done, part);
        to.write_bytes(to_at + done, part);
    }
}

/// The functions of a [`SharedPage`] that is one through another: `$page`, of the value `$of`.
macro_rules! shared_through {
    ($of:ident, $page:expr) => {
        fn size(&$of) -> usize {
            $crate::ring::SharedPage::size($page)
        }
        fn read_bytes(&$of, offset: usize, to: &mut [u8]) {
            $crate::ring::SharedPage::read_bytes($page, offset, to);
        }
        fn write_bytes(&$of, offset: usize, from: &[u8]) {
            $crate::ring::SharedPage::write_bytes($page, offset, from);
        }
        fn word(&$of, offset: usize) -> &::core::sync::atomic::AtomicU32 {
            $crate::ring::SharedPage::word($page, offset)
        }
        fn memory(&$of) -> Option<&$crate::memory::Shared> {
            $crate::ring::SharedPage::memory($page)
        }
    };
}
pub(crate) use shared_through;

/// Makes a type a [`SharedPage`] through its field `shared`: values that differ in what their end gives back.
macro_rules! shared_by_field {
    ($type:ty) => {
        impl $crate::ring::SharedPage for $type {
            $crate::ring::shared_through!(self, &self.shared);
        }
    };
}
pub(crate) use shared_by_field;

impl<T: SharedPage + ?Sized> SharedPage for &T {
    shared_through!(self, &**self);
}

impl<T: SharedPage + ?Sized> SharedPage for Arc<T> {
    shared_through!(self, &**self);
}

const REQ_PROD: usize = RingHeader::REQ_PROD;
const REQ_EVENT: usize = RingHeader::REQ_EVENT;
const RSP_PROD: usize = RingHeader::RSP_PROD;
const RSP_EVENT: usize = RingHeader::RSP_EVENT;

/// The other side's index makes no sense: it claims more entries than the ring has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt;

impl core::fmt::Display for Corrupt {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("the other end of the ring wrote an index that is out of range")
    }
}

impl core::error::Error for Corrupt {}

impl From<Overflow> for Corrupt {
    fn from(_: Overflow) -> Corrupt {
        Corrupt
    }
}

/// What goes through a ring: plain bytes, any of which are valid.
pub trait Entry: FromBytes + IntoBytes + Immutable {}
impl<T: FromBytes + IntoBytes + Immutable> Entry for T {}

/// Bytes of a slot: the larger of request and response.
const fn slot_size<Q, R>() -> usize {
    let (request, response) = (size_of::<Q>(), size_of::<R>());
    if request > response { request } else { response }
}

/// The end that sends requests.
#[derive(Debug)]
pub struct Front<M, Q, R> {
    page: M,
    slots: u32,
    indices: FrontIndices,
    // What of the requests the other end has been shown.
    published: u32,
    entries: PhantomData<fn(Q) -> R>,
}

impl<M: SharedPage, Q: Entry, R: Entry> Front<M, Q, R> {
    /// Makes an empty ring of the page.
    pub fn new(page: M) -> Self {
        page.write_bytes(0, RingHeader::INITIAL.as_bytes());
        fence(Ordering::Release);
        let slots = slots(page.size(), slot_size::<Q, R>());
        Self { page, slots, indices: FrontIndices::new(slots), published: 0, entries: PhantomData }
    }

    /// How many requests fit before the first response is taken.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.slots
    }

    /// How many more requests fit.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.indices.free()
    }

    /// Puts a request into the ring, unseen until [`publish`](Self::publish); gives it back when the ring is full.
    ///
    /// # Errors
    /// The request, when there is no slot.
    pub fn push(&mut self, request: Q) -> Result<(), Q> {
        let Some(index) = self.indices.next_request() else { return Err(request) };
        self.page.write_bytes(slot_offset(index, self.slots, slot_size::<Q, R>()), request.as_bytes());
        Ok(())
    }

    /// Shows what was pushed to the other end; true when it wants to be notified.
    #[must_use = "the other end sleeps if it is not notified"]
    pub fn publish(&mut self) -> bool {
        let new = self.indices.req_prod();
        let old = core::mem::replace(&mut self.published, new);
        publish(&self.page, REQ_PROD, REQ_EVENT, old, new)
    }

    /// Takes a response.
    ///
    /// # Errors
    /// [`Corrupt`] when the back claims more responses than it was shown requests.
    pub fn pop(&mut self) -> Result<Option<R>, Corrupt> {
        let claimed = self.page.word(RSP_PROD).load(Ordering::Acquire);
        // Seen from the next one on, so that a claim that went back is a huge one.
        let consumed = self.indices.rsp_event().wrapping_sub(1);
        if claimed.wrapping_sub(consumed) > self.published.wrapping_sub(consumed) {
            return Err(Corrupt);
        }
        let Some(index) = self.indices.next_response(claimed)? else { return Ok(None) };
        let mut response = R::new_zeroed();
        read(&self.page, slot_offset(index, self.slots, slot_size::<Q, R>()), &mut response);
        Ok(Some(response))
    }

    /// Asks for a notification at the next response; true when one is there already, so that sleeping would be wrong.
    pub fn prepare_to_wait(&self) -> bool {
        prepare_to_wait(&self.page, RSP_PROD, RSP_EVENT, self.indices.rsp_event())
    }

    /// As [`prepare_to_wait`](Self::prepare_to_wait), but for several responses, at most those that are to come: nothing is said before
    /// they all are there.
    pub fn prepare_to_wait_for(&self, responses: u32) -> bool {
        let next = self.indices.rsp_event();
        let consumed = next.wrapping_sub(1);
        let wanted = responses.min(self.published.wrapping_sub(consumed)).max(1);
        self.page.word(RSP_EVENT).store(consumed.wrapping_add(wanted), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // An index that makes no sense is a huge number: the next response tells.
        self.page.word(RSP_PROD).load(Ordering::Acquire).wrapping_sub(consumed) >= wanted
    }

    /// The memory that it lies in.
    pub fn page(&self) -> &M {
        &self.page
    }

    /// Ends the ring and gives its page back.
    pub fn into_page(self) -> M {
        self.page
    }
}

/// The end that answers requests.
#[derive(Debug)]
pub struct Back<M, Q, R> {
    page: M,
    slots: u32,
    indices: BackIndices,
    published: u32,
    entries: PhantomData<fn(Q) -> R>,
}

impl<M: SharedPage, Q: Entry, R: Entry> Back<M, Q, R> {
    /// Joins a ring that the front has made.
    pub fn new(page: M) -> Self {
        let slots = slots(page.size(), slot_size::<Q, R>());
        // A back that starts anew goes on where the responses ended.
        let produced = page.word(RSP_PROD).load(Ordering::Acquire);
        let indices = BackIndices::new(slots, produced);
        Self { page, slots, indices, published: produced, entries: PhantomData }
    }

    /// How many requests fit before the first response is given.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.slots
    }

    /// Takes a request, copied out of the page.
    ///
    /// # Errors
    /// [`Corrupt`] when the front claims more requests than the ring has room for, or takes back what was seen.
    pub fn pop(&mut self) -> Result<Option<Q>, Corrupt> {
        let claimed = self.page.word(REQ_PROD).load(Ordering::Acquire);
        let Some(index) = self.indices.next_request(claimed)? else { return Ok(None) };
        let mut request = Q::new_zeroed();
        read(&self.page, slot_offset(index, self.slots, slot_size::<Q, R>()), &mut request);
        Ok(Some(request))
    }

    /// Answers a request, unseen until [`publish`](Self::publish). Answers may come in any order.
    ///
    /// # Panics
    /// When there are more responses than requests were taken: a bug of this end.
    pub fn push(&mut self, response: R) {
        let Some(index) = self.indices.next_response() else { panic!("a response without a request") };
        self.page.write_bytes(slot_offset(index, self.slots, slot_size::<Q, R>()), response.as_bytes());
    }

    /// Shows the responses to the other end; true when it wants to be notified.
    #[must_use = "the other end sleeps if it is not notified"]
    pub fn publish(&mut self) -> bool {
        let new = self.indices.rsp_prod();
        let old = core::mem::replace(&mut self.published, new);
        publish(&self.page, RSP_PROD, RSP_EVENT, old, new)
    }

    /// Asks for a notification at the next request; true when one is there already, so that sleeping would be wrong.
    pub fn prepare_to_wait(&self) -> bool {
        prepare_to_wait(&self.page, REQ_PROD, REQ_EVENT, self.indices.req_event())
    }
}

fn publish(page: &impl SharedPage, prod: usize, event: usize, old: u32, new: u32) -> bool {
    page.word(prod).store(new, Ordering::Release);
    fence(Ordering::SeqCst);
    let wanted = page.word(event).load(Ordering::Relaxed);
    must_notify(old, new, wanted)
}

/// `next` is the index that the event is wanted for: the one behind the next item.
fn prepare_to_wait(page: &impl SharedPage, prod: usize, event: usize, next: u32) -> bool {
    page.word(event).store(next, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    page.word(prod).load(Ordering::Acquire) != next.wrapping_sub(1)
}

fn read<T: Entry>(page: &impl SharedPage, offset: usize, to: &mut T) {
    // Entry is FromBytes and IntoBytes: any bytes will do, and there is no padding.
    page.read_bytes(offset, to.as_mut_bytes());
}

#[cfg(test)]
mod tests {
    use super::host::HostPages;
    use super::{Back, Corrupt, Front, REQ_PROD, RSP_PROD, SharedPage, copy_between};
    use crate::memory::Shared;
    use alloc::vec::Vec;
    use core::sync::atomic::Ordering;

    /// What pages hold before anybody writes to them.
    const FILL: u32 = 0xa5a5_a5a5;

    #[test]
    fn both_ends_meet_and_notify_only_sleepers() {
        let page = HostPages::new(1, FILL);
        let mut front: Front<_, [u32; 3], u64> = Front::new(&page);
        let mut back: Back<_, [u32; 3], u64> = Back::new(&page);
        assert_eq!(front.capacity(), 256);
        // Both wait: the first publish of each notifies.
        assert!(!back.prepare_to_wait() && !front.prepare_to_wait());
        let mut sent = 0u32;
        let mut answered = 0u64;
        for round in 0..1000u32 {
            let mut pushed = 0;
            while pushed <= round % 300 && front.push([sent, !sent, sent ^ 7]).is_ok() {
                sent += 1;
                pushed += 1;
            }
            assert_eq!(pushed, (round % 300 + 1).min(256));
            assert!(front.publish(), "the back sleeps");
            assert!(!front.publish(), "nothing new");
            while let Some([a, b, c]) = back.pop().expect("an honest front") {
                assert_eq!((b, c), (!a, a ^ 7));
                back.push(u64::from(a) << 32 | u64::from(c));
            }
            assert!(!back.prepare_to_wait());
            assert!(back.publish(), "the front sleeps");
            while let Some(response) = front.pop().expect("an honest back") {
                assert_eq!(response >> 32, answered);
                answered += 1;
            }
            assert!(!front.prepare_to_wait());
        }
        assert_eq!(u64::from(sent), answered);
    }

    #[test]
    fn a_sleeper_that_looks_again_sees_what_came_between() {
        let page = HostPages::new(1, FILL);
        let mut front: Front<_, u64, u64> = Front::new(&page);
        let mut back: Back<_, u64, u64> = Back::new(&page);
        assert_eq!(back.pop(), Ok(None));
        front.push(1).expect("room");
        // The back has not said yet that it sleeps, but its event index from the start of the ring asks for this one.
        assert!(front.publish());
        assert!(back.prepare_to_wait(), "a request is there: no sleep");
        assert_eq!(back.pop(), Ok(Some(1)));
        // A back at work is not disturbed: it asked for the first request only.
        front.push(2).expect("room");
        assert!(!front.publish());
        assert_eq!(back.pop(), Ok(Some(2)));
        assert!(!back.prepare_to_wait(), "nothing is there: it may sleep");
        front.push(3).expect("room");
        assert!(front.publish(), "it sleeps");
    }

    #[test]
    fn a_ring_may_have_several_pages_and_answers_any_order() {
        for (pages, capacity) in [(1, 32), (2, 64), (4, 128), (16, 512)] {
            let page = HostPages::new(pages, FILL);
            let mut front: Front<_, [u64; 14], [u64; 2]> = Front::new(&page);
            let mut back: Back<_, [u64; 14], [u64; 2]> = Back::new(&page);
            assert_eq!((front.capacity(), back.capacity()), (capacity, capacity));
            for round in 0..5u64 {
                for id in 0..u64::from(capacity) {
                    front.push([id ^ round; 14]).expect("room");
                }
                assert!(front.push([0; 14]).is_err(), "full");
                let _ = front.publish();
                let mut taken: Vec<u64> = Vec::new();
                while let Some(request) = back.pop().expect("an honest front") {
                    assert!(request.iter().all(|word| *word == request[0]));
                    taken.push(request[0]);
                }
                taken.sort_by_key(|id| id.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                taken.iter().for_each(|id| back.push([*id, !*id]));
                let _ = back.publish();
                let mut answered = Vec::new();
                while let Some([id, check]) = front.pop().expect("an honest back") {
                    assert_eq!(check, !id);
                    answered.push(id);
                }
                assert_eq!(answered, taken);
            }
        }
    }

    #[test]
    fn a_front_may_wait_for_several_responses() {
        let page = HostPages::new(1, FILL);
        let mut front: Front<_, u64, u64> = Front::new(&page);
        let mut back: Back<_, u64, u64> = Back::new(&page);
        for id in 0..6 {
            front.push(id).expect("room");
        }
        let _ = front.publish();
        let answer = |back: &mut Back<_, u64, u64>, count: usize| {
            for _ in 0..count {
                let id = back.pop().expect("an honest front").expect("a request");
                back.push(id);
            }
            back.publish()
        };
        assert!(!front.prepare_to_wait_for(4));
        assert!(!answer(&mut back, 3), "one too few");
        assert!(!front.prepare_to_wait_for(4), "three are not enough to stay awake");
        assert!(answer(&mut back, 1));
        assert!(front.prepare_to_wait_for(4), "they are there");
        assert!(!front.prepare_to_wait_for(100), "no more than will come");
        assert!(!answer(&mut back, 1));
        assert!(answer(&mut back, 1), "that was the last one");
        page.word(RSP_PROD).store(u32::MAX, Ordering::Relaxed);
        assert!(front.prepare_to_wait_for(1), "a wild index is looked at, not slept on");
        assert_eq!(front.pop(), Err(Corrupt));
    }

    #[test]
    fn an_index_that_goes_back_is_an_error() {
        let page = HostPages::new(1, FILL);
        let mut front: Front<_, u64, u64> = Front::new(&page);
        let mut back: Back<_, u64, u64> = Back::new(&page);
        for id in 0..3 {
            front.push(id).expect("room");
        }
        let _ = front.publish();
        assert_eq!((back.pop(), back.pop()), (Ok(Some(0)), Ok(Some(1))));
        page.word(REQ_PROD).store(1, Ordering::Relaxed);
        assert_eq!(back.pop(), Err(Corrupt));
        // What was pushed and not shown cannot have been answered.
        front.push(3).expect("room");
        page.word(RSP_PROD).store(4, Ordering::Relaxed);
        assert_eq!(front.pop(), Err(Corrupt));
    }

    #[test]
    fn wild_indexes_are_errors() {
        let page = HostPages::new(1, FILL);
        let mut front: Front<_, u64, u64> = Front::new(&page);
        let mut back: Back<_, u64, u64> = Back::new(&page);
        page.word(REQ_PROD).store(front.capacity() + 1, Ordering::Relaxed);
        assert_eq!(back.pop(), Err(Corrupt));
        page.word(REQ_PROD).store(u32::MAX, Ordering::Relaxed);
        assert_eq!(back.pop(), Err(Corrupt));
        page.word(RSP_PROD).store(1, Ordering::Relaxed);
        assert_eq!(front.pop(), Err(Corrupt));
    }

    #[test]
    fn bytes_go_from_page_to_page_whatever_pages_are() {
        const BYTES: usize = 700;
        let content: Vec<u8> = (0..BYTES).map(|at| (at ^ at >> 8) as u8).collect();
        let (mut one, mut two) = (alloc::vec![0u8; 1024], alloc::vec![0u8; 1024]);
        // SAFETY: as long as the vectors, which are not used until these are.
        let (from, to) = unsafe {
            (Shared::new(one.as_mut_ptr() as u64, 1024), Shared::new(two.as_mut_ptr() as u64, 1024))
        };
        let (host, other) = (HostPages::new(1, FILL), HostPages::new(1, FILL));
        let pages: [&dyn SharedPage; 4] = [&from, &to, &host, &other];
        for (number, source) in pages.into_iter().enumerate() {
            for (_, dest) in pages.into_iter().enumerate().filter(|(other, _)| *other != number) {
                source.write_bytes(5, &content);
                dest.write_bytes(0, &[0xee; 1024]);
                copy_between(source, 5, dest, 9, BYTES);
                let mut got = [0; 1024];
                dest.read_bytes(0, &mut got);
                assert_eq!((&got[..9], &got[9 + BYTES..]), (&[0xee; 9][..], &[0xee; 1024 - 9 - BYTES][..]));
                assert_eq!(got[9..9 + BYTES], content);
            }
        }
        // Within one, the ranges may overlap.
        for (at, to_at) in [(5, 9), (9, 5), (7, 7)] {
            from.write_bytes(at, &content);
            copy_between(&from, at, &from, to_at, BYTES);
            let mut got = [0; BYTES];
            from.read_bytes(to_at, &mut got);
            assert_eq!(got[..], content);
        }
    }

    #[test]
    #[should_panic(expected = "700 bytes at 400 of 1024")]
    fn nothing_is_copied_behind_the_end_of_a_page() {
        let mut memory = alloc::vec![0u8; 2048];
        let at = memory.as_mut_ptr() as u64;
        // SAFETY: both are in the vector, which is not used until they are.
        let (one, two) = unsafe { (Shared::new(at, 1024), Shared::new(at + 1024, 1024)) };
        copy_between(&one, 0, &two, 400, 700);
    }
}

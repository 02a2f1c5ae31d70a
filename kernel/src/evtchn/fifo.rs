//! The FIFO protocol between the hypervisor, which raises events, and a guest, which takes them.
//!
//! ```text
//!   port p:   event word             pages of the guest: PENDING | MASKED | LINKED | BUSY | ... | LINK
//!   vCPU:     ready, one bit a queue control block, in a page of the guest
//!             head[q]                first port of queue q
//!             tail[q]                last port of queue q: the hypervisor's own, the guest never sees it
//!             upcall_pending         vcpu_info, as in the two-level form
//! ```
//!
//! A queue is a list through the LINK fields; 0 ends it. The hypervisor appends, the guest takes from the front
//! (public/event_channel.h):
//!
//! | raise p on queue q (one at a time for a domain) | guest |
//! |---|---|
//! | 1. set PENDING of p; MASKED or LINKED: done | 1. clear upcall_pending |
//! | 2. set LINKED of p; was it set: done | 2. exchange ready with 0 |
//! | 3. add p to LINK of the tail; was the tail LINKED: done | 3. p is the next of the front queue, or head[q] |
//! | 4. take LINK of the tail back, head[q] = p | 4. clear LINKED and LINK of p at once: LINK is the next |
//! | 5. set bit q of ready; was it set: done | 5. PENDING and not MASKED: clear PENDING, handle the event |
//! | 6. set upcall_pending; was it set: done | 6. LINK was 0: queue q is done, else to 3 |
//! | 7. wake and interrupt the vCPU | |
//!
//! Each step is one atomic read-modify-write, all sequentially consistent. Where a raise stops early, the guest has still to
//! come by:
//! - at 1 by MASKED: it will unmask, and look (or have [`unmask`] do it);
//! - at 1 or 2 by LINKED: the guest clears LINKED before it reads PENDING, which was set before;
//! - at 3: the guest clears LINKED of the tail and reads LINK in the same access, so it finds p there;
//! - at 5 and 6: as in the two-level form, what was stored before is seen when the level above has been cleared.
//!
//! At 4 the tail was not LINKED any more: the guest took the last event of the queue, read LINK as 0, and comes back only for a
//! bit of ready. That is why step 3 may be a plain OR, without the compare-and-exchange that a concurrent writer would call
//! for: LINK of a tail is 0 as long as the guest keeps to the protocol, and nobody reads LINK of a word that is not LINKED.
//! The BUSY bit, by which a hypervisor may keep a guest from unmasking while it retries, is never needed nor set.
//!
//! The guest may write anything to these words at any time. No access here waits for a value or follows a link, so it can only
//! lose its own events by that.
//!
//! Generic over the word, so that tests run the very same code in every interleaving (`interleavings`), and under every order that the
//! memory model allows (`models`).

use hypercall_abi::Port;
use hypercall_abi::evtchn::{
    EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_LINKED, EVTCHN_FIFO_MASKED, EVTCHN_FIFO_MAX_QUEUES,
    EVTCHN_FIFO_PENDING,
};

use super::two_level::Word;

/// Bit of an event word: an event waits.
pub const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;
/// The guest wants no event of this port.
pub const MASKED: u32 = 1 << EVTCHN_FIFO_MASKED;
/// The port is in a queue.
pub const LINKED: u32 = 1 << EVTCHN_FIFO_LINKED;

/// A 32-bit word that is one half of a 64-bit one. The other half may be anybody's: it is never changed.
pub struct Half<'a, W> {
    word: &'a W,
    shift: u32,
}

impl<W> Clone for Half<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Half<'_, W> {}

impl<'a, W: Word> Half<'a, W> {
    /// The lower half (`index` even) or the upper one.
    pub fn new(word: &'a W, index: usize) -> Self {
        Half { word, shift: (index as u32 & 1) * 32 }
    }
    /// Sets bits; returns the value before.
    #[cfg_attr(all(loom, test), track_caller)]
    pub fn set(self, bits: u32) -> u32 {
        (self.word.set_bits(u64::from(bits) << self.shift) >> self.shift) as u32
    }
    /// Clears bits; returns the value before.
    #[cfg_attr(all(loom, test), track_caller)]
    pub fn clear(self, bits: u32) -> u32 {
        (self.word.clear_bits(u64::from(bits) << self.shift) >> self.shift) as u32
    }
    /// Reads it.
    #[cfg_attr(all(loom, test), track_caller)]
    pub fn read(self) -> u32 {
        (self.word.read() >> self.shift) as u32
    }
    /// Stores `value` in one access. What others store at the same time is mixed with it bit by bit.
    #[cfg_attr(all(loom, test), track_caller)]
    fn write(self, value: u32) {
        self.word.flip_bits(u64::from(self.read() ^ value) << self.shift);
    }
}

/// The control block of a vCPU, as words.
pub struct Control<'a, W> {
    words: &'a [W],
}

impl<W> Clone for Control<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Control<'_, W> {}

impl<'a, W: Word> Control<'a, W> {
    /// Words of a control block: ready and a reserved half, then the heads by two.
    pub const WORDS: usize = 1 + EVTCHN_FIFO_MAX_QUEUES / 2;

    /// The block in `words`; `None` when there are fewer than [`Control::WORDS`].
    pub fn new(words: &'a [W]) -> Option<Self> {
        Some(Control { words: words.get(..Self::WORDS)? })
    }

    fn ready(self) -> Option<Half<'a, W>> {
        self.words.first().map(|word| Half::new(word, 0))
    }

    fn head(self, priority: u8) -> Option<Half<'a, W>> {
        let index = usize::from(priority);
        self.words.get(1 + index / 2).map(|word| Half::new(word, index))
    }
}

/// What is to be done about an event that was raised or unmasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    /// It was not pending before: pollers want to know.
    pub new: bool,
    /// It is LINKED now and must be put in its queue ([`enqueue`]).
    pub queue: bool,
}

/// Makes a port pending, and claims its place in a queue (steps 1 and 2).
pub fn raise<W: Word>(word: Half<'_, W>) -> Raised {
    let old = word.set(PENDING);
    Raised { new: old & PENDING == 0, queue: claim(word, old) }
}

/// Clears the mask of a port, and claims a place for what was held back.
pub fn unmask<W: Word>(word: Half<'_, W>) -> Raised {
    let old = word.clear(MASKED);
    Raised { new: false, queue: old & PENDING != 0 && claim(word, old & !MASKED) }
}

fn claim<W: Word>(word: Half<'_, W>, old: u32) -> bool {
    if old & (MASKED | LINKED) != 0 {
        return false;
    }
    if old & EVTCHN_FIFO_LINK_MASK != 0 {
        // Left there by a guest that cleared only LINKED; the last of a queue links to nothing.
        word.clear(EVTCHN_FIFO_LINK_MASK);
    }
    word.set(LINKED) & LINKED == 0
}

/// Appends `port`, whose word is claimed, to queue `priority` of a vCPU (steps 3 to 6). `tail` is the word of the port that
/// was appended before it, if that can be in the queue still. True when the vCPU must be woken.
pub fn enqueue<W: Word>(
    port: Port,
    priority: u8,
    tail: Option<Half<'_, W>>,
    control: Control<'_, W>,
    upcall: &W,
) -> bool {
    let link = port.get() & EVTCHN_FIFO_LINK_MASK;
    if let Some(tail) = tail {
        if tail.set(link) & LINKED != 0 {
            return false;
        }
        tail.clear(EVTCHN_FIFO_LINK_MASK);
    }
    let (Some(head), Some(ready)) = (control.head(priority), control.ready()) else { return false };
    head.write(link);
    let bit = 1u32 << (priority & 15);
    ready.set(bit) & bit == 0 && upcall.set_bits(1) & 1 == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Guest {
        words: [AtomicU64; 8],
        control: [AtomicU64; 9],
        upcall: AtomicU64,
    }

    impl Guest {
        fn word(&self, port: u32) -> Half<'_, AtomicU64> {
            Half::new(&self.words[port as usize / 2], port as usize)
        }
        fn control(&self) -> Control<'_, AtomicU64> {
            Control::new(&self.control).unwrap()
        }
        fn enqueue(&self, port: u32, priority: u8, tail: Option<u32>) -> bool {
            let tail = tail.map(|port| self.word(port));
            enqueue(Port::new(port), priority, tail, self.control(), &self.upcall)
        }
    }

    #[test]
    fn an_event_is_linked_once_and_its_neighbour_stays() {
        let guest = Guest::default();
        guest.words[1].store(0x1234_5678, Ordering::SeqCst);
        assert_eq!(raise(guest.word(3)), Raised { new: true, queue: true });
        assert_eq!(raise(guest.word(3)), Raised { new: false, queue: false });
        assert_eq!(guest.words[1].load(Ordering::SeqCst), u64::from(PENDING | LINKED) << 32 | 0x1234_5678);
    }

    #[test]
    fn a_masked_event_waits_for_unmask() {
        let guest = Guest::default();
        guest.word(2).set(MASKED);
        assert_eq!(raise(guest.word(2)), Raised { new: true, queue: false });
        assert_eq!(unmask(guest.word(2)), Raised { new: false, queue: true });
        assert_eq!(guest.word(2).read(), PENDING | LINKED);
        assert_eq!(unmask(guest.word(2)), Raised { new: false, queue: false }, "it is in the queue already");
        assert_eq!(unmask(guest.word(4)), Raised { new: false, queue: false }, "nothing was held back");
    }

    #[test]
    fn a_second_event_follows_the_first() {
        let guest = Guest::default();
        raise(guest.word(2));
        assert!(guest.enqueue(2, 7, None));
        raise(guest.word(5));
        assert!(!guest.enqueue(5, 7, Some(2)), "the first was announced");
        assert_eq!(guest.word(2).read(), PENDING | LINKED | 5);
        assert_eq!(guest.control[4].load(Ordering::SeqCst), 2 << 32, "head of queue 7");
        assert_eq!(guest.control[0].load(Ordering::SeqCst), 1 << 7);
        // The guest takes both, and the next begins the queue anew.
        guest.control[0].store(0, Ordering::SeqCst);
        guest.upcall.store(0, Ordering::SeqCst);
        for port in [2, 5] {
            guest.word(port).clear(LINKED | PENDING | EVTCHN_FIFO_LINK_MASK);
        }
        raise(guest.word(9));
        assert!(guest.enqueue(9, 7, Some(5)));
        assert_eq!(guest.word(5).read(), 0, "the link to it was taken back");
        assert_eq!(guest.control[4].load(Ordering::SeqCst), 9 << 32);
    }

    #[test]
    fn a_link_that_was_left_behind_is_not_followed() {
        let guest = Guest::default();
        guest.word(2).set(0x1_ffff);
        assert!(raise(guest.word(2)).queue);
        assert_eq!(guest.word(2).read(), PENDING | LINKED);
    }

    #[test]
    fn queues_do_not_touch_each_other() {
        let guest = Guest::default();
        for priority in 0..16 {
            raise(guest.word(u32::from(priority)));
            assert_eq!(guest.enqueue(u32::from(priority) + 100, priority, None), priority == 0, "one upcall");
        }
        assert_eq!(guest.control[0].load(Ordering::SeqCst), 0xffff);
        for (index, word) in guest.control[1..].iter().enumerate() {
            let first = 100 + 2 * index as u64;
            assert_eq!(word.load(Ordering::SeqCst), first | (first + 1) << 32);
        }
    }
}

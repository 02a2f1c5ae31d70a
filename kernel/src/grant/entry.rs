//! The shared entry: guest-writable memory that both sides change.
//!
//! Version 1 is one word:
//!
//! ```text
//!   63            32 31       16 15         0
//!   ┌───────────────┬───────────┬────────────┐
//!   │ frame         │ domain    │ flags      │    public/grant_table.h, grant_entry_v1
//!   └───────────────┴───────────┴────────────┘
//! ```
//!
//! The granter writes domain and frame, then the flags. To revoke it exchanges the flags against 0, expecting them without
//! READING and WRITING. The hypervisor sets these two with a compare-and-exchange of the *whole* word: what it then uses,
//! frame and domain, is what was there at that instant. Xen exchanges half of the word and reads the frame afterwards, so a
//! frame that changes in between is used; here it makes the exchange fail. The guest may change the word faster than the
//! exchange can follow, so it is tried [`ATTEMPTS`] times at most.
//!
//! Version 2 is two words, and the marks are in a status word elsewhere:
//!
//! ```text
//!   63       48 47       32 31       16 15         0
//!   ┌──────────┬───────────┬───────────┬────────────┐
//!   │ length   │ first byte│ domain    │ flags      │    grant_entry_v2: full_page, sub_page
//!   ├──────────┴───────────┴───────────┴────────────┤    (transitive: bits 32-47 the domain stood for,
//!   │ frame                                         │     low half of the second word its entry)
//!   └───────────────────────────────────────────────┘
//! ```
//!
//! No exchange can cover that. The two sides are like Dekker's: the granter clears the flags and then, after a full barrier,
//! looks at the status; the hypervisor sets the marks and then, after a full barrier, reads the entry, which is what it
//! judges and uses. One of the two sees the other. A granter that keeps to this finds READING set before the frame that is
//! used can be any other than the one it granted; one that does not only fools itself, for the frame must be its own.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use hypercall_abi::grant::{
    GTF_ACCEPT_TRANSFER, GTF_PERMIT_ACCESS, GTF_TRANSFER_COMMITTED, GTF_TRANSFER_COMPLETED, GTF_TRANSITIVE,
    GrantFlags,
};
use hypercall_abi::{DomId, GrantRef, Mfn, PAGE_SIZE};

use super::Error;
use super::table::{Pins, Reach};

/// How often an exchange is tried against a guest that keeps changing the word.
pub const ATTEMPTS: u32 = 5;

/// What an entry shall be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To map the frame, as a whole.
    Map,
    /// To copy from or to what of it is granted.
    Copy,
}

/// What an entry stands for, read while the marks were set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// A frame, or a part of it.
    Frame(Mfn, Reach),
    /// Another domain's entry.
    Transitive(DomId, GrantRef),
}

/// A word that the guest writes, too: core's atomic, or loom's in a model. As there, but for the names.
pub trait Word {
    /// Loads it.
    #[cfg_attr(all(loom, test), track_caller)]
    fn read(&self, order: Ordering) -> u64;
    /// Stores into it.
    #[cfg_attr(all(loom, test), track_caller)]
    fn write(&self, value: u64, order: Ordering);
    /// Stores into it; returns the value before.
    #[cfg_attr(all(loom, test), track_caller)]
    fn exchange(&self, value: u64, order: Ordering) -> u64;
    /// Sets bits.
    #[cfg_attr(all(loom, test), track_caller)]
    fn set_bits(&self, bits: u64, order: Ordering);
    /// Clears bits.
    #[cfg_attr(all(loom, test), track_caller)]
    fn clear_bits(&self, bits: u64, order: Ordering);
    /// Stores `next` if it is `seen`; with Acquire otherwise, when it is what it returns as an error.
    #[cfg_attr(all(loom, test), track_caller)]
    fn replace(&self, seen: u64, next: u64, order: Ordering) -> Result<u64, u64>;
    /// Orders what came before against what comes after.
    #[cfg_attr(all(loom, test), track_caller)]
    fn barrier();
}

macro_rules! word {
    ($word:ty, $fence:path) => {
        impl Word for $word {
            fn read(&self, order: Ordering) -> u64 {
                self.load(order)
            }
            fn write(&self, value: u64, order: Ordering) {
                self.store(value, order);
            }
            fn exchange(&self, value: u64, order: Ordering) -> u64 {
                self.swap(value, order)
            }
            fn set_bits(&self, bits: u64, order: Ordering) {
                self.fetch_or(bits, order);
            }
            fn clear_bits(&self, bits: u64, order: Ordering) {
                self.fetch_and(!bits, order);
            }
            fn replace(&self, seen: u64, next: u64, order: Ordering) -> Result<u64, u64> {
                self.compare_exchange(seen, next, order, Ordering::Acquire)
            }
            fn barrier() {
                $fence(Ordering::SeqCst);
            }
        }
    };
}
word!(AtomicU64, fence);
#[cfg(all(loom, test))]
word!(crate::sync::atomic::AtomicU64, crate::sync::atomic::fence);

/// The status word of an entry of version 2.
#[derive(Debug)]
pub struct Status<'a, W = AtomicU64> {
    word: &'a W,
    shift: u32,
}

impl<W> Clone for Status<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for Status<'_, W> {}

impl<'a, W: Word> Status<'a, W> {
    /// The 16 bits at place `index`, below 4, of a word.
    pub fn new(word: &'a W, index: u32) -> Status<'a, W> {
        Status { word, shift: index % 4 * 16 }
    }
    /// What it says.
    pub fn get(self) -> GrantFlags {
        GrantFlags::from_bits_retain((self.word.read(Ordering::Acquire) >> self.shift) as u16)
    }
    fn add(self, marks: GrantFlags) {
        // The one who marks has a barrier behind it.
        self.word.set_bits(u64::from(marks.bits()) << self.shift, Ordering::AcqRel);
    }
    fn remove(self, marks: GrantFlags) {
        self.word.clear_bits(u64::from(marks.bits()) << self.shift, Ordering::AcqRel);
    }
    /// Makes it say `marks` and nothing else.
    pub fn set(self, marks: GrantFlags) {
        self.remove(GrantFlags::all());
        self.add(marks);
    }
}

/// A shared entry, where it is.
#[derive(Debug)]
pub enum Entry<'a, W = AtomicU64> {
    /// Of version 1.
    V1(&'a W),
    /// Of version 2.
    V2 {
        /// The entry.
        words: [&'a W; 2],
        /// Its marks.
        status: Status<'a, W>,
    },
}

impl<W> Clone for Entry<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for Entry<'_, W> {}

/// The first 32 bits of an entry, the same in both versions.
#[derive(Clone, Copy)]
struct Header(u64);

impl Header {
    fn flags(self) -> GrantFlags {
        GrantFlags::from_bits_retain(self.0 as u16)
    }
    fn domain(self) -> DomId {
        DomId::new((self.0 >> 16) as u16)
    }

    /// Whether a use may be marked. `first` says that nobody uses the entry yet: then it must be a grant for `user`; in use,
    /// that was checked before and the guest may have changed it since, which is its own loss. Writing is refused if the
    /// entry is read-only now.
    fn allows(self, first: bool, user: DomId, readonly: bool, purpose: Purpose, v2: bool) -> bool {
        let flags = self.flags();
        if first {
            let kind = flags.kind();
            let whole = purpose == Purpose::Copy || !flags.contains(GrantFlags::SUB_PAGE);
            let through = v2 && kind == GTF_TRANSITIVE && purpose == Purpose::Copy;
            if !(kind == GTF_PERMIT_ACCESS && whole || through) || self.domain() != user {
                return false;
            }
        }
        readonly || !flags.contains(GrantFlags::READONLY)
    }
}

/// The words of an entry that gives `peer` access to `frame`, whichever version. `None` when version 1 cannot hold the number
/// of the frame.
pub fn permit(frame: Mfn, peer: DomId, readonly: bool) -> Option<(u64, u64)> {
    u32::try_from(frame.get()).ok()?;
    let flags = GTF_PERMIT_ACCESS | if readonly { GrantFlags::READONLY.bits() } else { 0 };
    Some((u64::from(peer.get()) << 16 | u64::from(flags), frame.get()))
}

impl<W: Word> Entry<'_, W> {
    /// Stores flags and domain, as the low half of a word, and a frame. The flags come last, or with the rest.
    pub fn store(&self, header: u64, frame: u64) {
        match self {
            Entry::V1(word) => word.write(frame << 32 | header & 0xffff_ffff, Ordering::Release),
            Entry::V2 { words, .. } => {
                words[1].write(frame, Ordering::Relaxed);
                words[0].write(header, Ordering::Release);
            }
        }
    }

    /// Flags and domain in the low half of a word with what else is there, and the frame.
    pub fn load(&self) -> (u64, u64) {
        match self {
            Entry::V1(word) => {
                let word = word.read(Ordering::Acquire);
                (word & 0xffff_ffff, word >> 32)
            }
            Entry::V2 { words, .. } => {
                let header = words[0].read(Ordering::Acquire);
                (header, words[1].read(Ordering::Acquire))
            }
        }
    }

    /// Whether it stands for an entry of another domain just now.
    pub fn is_transitive(&self) -> bool {
        matches!(self, Entry::V2 { .. })
            && GrantFlags::from_bits_retain(self.load().0 as u16).kind() == GTF_TRANSITIVE
    }

    /// Marks the entry as read, or read and written, by `user`, and says what it stands for. `held` are the uses that it has
    /// already: without any it must be a grant for that purpose. A refusal leaves the marks that `held` needs and no others.
    pub fn mark(&self, held: Pins, user: DomId, readonly: bool, purpose: Purpose) -> Result<Granted, Error> {
        let first = held.is_none();
        let marks =
            if readonly { GrantFlags::READING } else { GrantFlags::READING.union(GrantFlags::WRITING) };
        match self {
            Entry::V1(word) => {
                let mut seen = word.read(Ordering::Acquire);
                for _ in 0..ATTEMPTS {
                    if !Header(seen).allows(first, user, readonly, purpose, false) {
                        return Err(Error::Refused);
                    }
                    let next = seen | u64::from(marks.bits());
                    match word.replace(seen, next, Ordering::AcqRel) {
                        Ok(_) => return Ok(Granted::Frame(Mfn::new(seen >> 32), Reach::Page)),
                        Err(now) => seen = now,
                    }
                }
                Err(Error::Refused)
            }
            Entry::V2 { words, status } => {
                let allows = |word| Header(word).allows(first, user, readonly, purpose, true);
                if !allows(words[0].read(Ordering::Acquire)) {
                    return Err(Error::Refused);
                }
                status.add(marks);
                W::barrier();
                let (word, frame) = self.load();
                if !allows(word) {
                    status.remove(marks.difference(marks_of(held)));
                    return Err(Error::Refused);
                }
                let flags = Header(word).flags();
                Ok(if flags.kind() == GTF_TRANSITIVE {
                    Granted::Transitive(DomId::new((word >> 32) as u16), GrantRef::new(frame as u32))
                } else if flags.contains(GrantFlags::SUB_PAGE) {
                    let start = (word >> 32 & 0xffff).min(PAGE_SIZE as u64) as u16;
                    let end = ((word >> 32 & 0xffff) + (word >> 48)).min(PAGE_SIZE as u64) as u16;
                    Granted::Frame(Mfn::new(frame), Reach::Part { start, end })
                } else {
                    Granted::Frame(Mfn::new(frame), Reach::Page)
                })
            }
        }
    }

    /// Takes marks back. Release: what was done to the frame comes before the granter can see it free.
    pub fn unmark(&self, marks: GrantFlags) {
        match self {
            _ if marks.is_empty() => {}
            Entry::V1(word) => {
                word.clear_bits(u64::from(marks.bits()), Ordering::AcqRel);
            }
            Entry::V2 { status, .. } => status.remove(marks),
        }
    }

    /// Exchanges two entries that nobody uses, and their marks.
    pub fn swap(&self, other: &Entry<'_, W>) {
        let exchange = |a: &W, b: &W| {
            let moved = a.read(Ordering::Acquire);
            a.write(b.exchange(moved, Ordering::AcqRel), Ordering::Release);
        };
        match (self, other) {
            (Entry::V1(a), Entry::V1(b)) => exchange(a, b),
            (Entry::V2 { words: a, status: x }, Entry::V2 { words: b, status: y }) => {
                let moved = x.get();
                x.set(y.get());
                y.set(moved);
                for (a, b) in a.iter().zip(b) {
                    exchange(a, b);
                }
            }
            _ => debug_assert!(false, "one table has one version"),
        }
    }

    /// Begins a transfer by `giver` into this entry, which must wait for one: from now on its owner has to wait for the end.
    /// Returns the number by which the owner wants to know the frame.
    pub fn commit_transfer(&self, giver: DomId) -> Result<u64, Error> {
        let (word, frame) = match self {
            Entry::V1(word) => (*word, None),
            Entry::V2 { words, .. } => (words[0], Some(words[1])),
        };
        let mut seen = word.read(Ordering::Acquire);
        for _ in 0..ATTEMPTS {
            let header = Header(seen);
            if header.flags().bits() != GTF_ACCEPT_TRANSFER || header.domain() != giver {
                return Err(Error::Refused);
            }
            let next = seen | u64::from(GTF_TRANSFER_COMMITTED);
            match word.replace(seen, next, Ordering::AcqRel) {
                Ok(_) => return Ok(frame.map_or(seen >> 32, |frame| frame.read(Ordering::Acquire))),
                Err(now) => seen = now,
            }
        }
        Err(Error::Refused)
    }

    /// Ends a transfer that was committed: whoever sees COMPLETED sees the frame.
    pub fn complete_transfer(&self, giver: DomId, frame: Mfn) {
        const DONE: u16 = GTF_ACCEPT_TRANSFER | GTF_TRANSFER_COMMITTED | GTF_TRANSFER_COMPLETED;
        // What it was committed with, whatever the guest has made of it since.
        self.store(u64::from(giver.get()) << 16 | u64::from(DONE), frame.get());
    }
}

/// The marks that these uses need.
pub fn marks_of(pins: Pins) -> GrantFlags {
    if pins.is_none() {
        GrantFlags::empty()
    } else if pins.writes() {
        GrantFlags::READING | GrantFlags::WRITING
    } else {
        GrantFlags::READING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: DomId = DomId::new(5);
    const MARKS: GrantFlags = GrantFlags::READING.union(GrantFlags::WRITING);

    /// An entry of either version with what a guest wrote, over memory of its own.
    fn with(v2: bool, header: u64, frame: u64, test: impl FnOnce(&Entry<'_>)) {
        let words = [const { AtomicU64::new(0) }; 3];
        let [a, b, c] = &words;
        let entry = if v2 { Entry::V2 { words: [a, b], status: Status::new(c, 2) } } else { Entry::V1(a) };
        entry.store(header, frame);
        test(&entry);
        assert_eq!(c.load(Ordering::SeqCst) & !(0xffff << 32), 0, "other entries' status");
    }

    fn header(flags: GrantFlags) -> u64 {
        5 << 16 | u64::from(flags.bits())
    }

    fn marks(entry: &Entry<'_>) -> GrantFlags {
        match entry {
            Entry::V1(_) => GrantFlags::from_bits_retain(entry.load().0 as u16) & MARKS,
            Entry::V2 { status, .. } => status.get(),
        }
    }

    #[test]
    fn marks_come_and_go_and_leave_the_rest() {
        for v2 in [false, true] {
            with(v2, header(GrantFlags::PERMIT_ACCESS | GrantFlags::PCD), 77, |entry| {
                let before = entry.load();
                let granted = entry.mark(Pins::default(), PEER, false, Purpose::Map);
                assert_eq!(granted, Ok(Granted::Frame(Mfn::new(77), Reach::Page)));
                assert_eq!(marks(entry), MARKS);
                entry.unmark(GrantFlags::WRITING);
                assert_eq!(marks(entry), GrantFlags::READING);
                entry.unmark(MARKS);
                assert_eq!((entry.load(), marks(entry)), (before, GrantFlags::empty()));
            });
        }
    }

    #[test]
    fn what_was_not_granted_is_refused() {
        let access = GrantFlags::PERMIT_ACCESS;
        let cases = [
            (access, 6, true),
            (GrantFlags::ACCEPT_TRANSFER, 5, true),
            (GrantFlags::TRANSITIVE, 5, true),
            (GrantFlags::empty(), 5, true),
            (access | GrantFlags::SUB_PAGE, 5, true),
            (access | GrantFlags::READONLY, 5, false),
        ];
        for (v2, (flags, user, readonly)) in [false, true].into_iter().flat_map(|v| cases.map(|c| (v, c))) {
            with(v2, header(flags), 77, |entry| {
                let before = entry.load();
                let result = entry.mark(Pins::default(), DomId::new(user), readonly, Purpose::Map);
                assert_eq!(result, Err(Error::Refused), "{flags:?}");
                assert_eq!((entry.load(), marks(entry)), (before, GrantFlags::empty()), "no mark is left");
            });
        }
        for v2 in [false, true] {
            with(v2, header(access | GrantFlags::READONLY), 77, |entry| {
                assert!(entry.mark(Pins::default(), PEER, true, Purpose::Map).is_ok());
            });
            // Only version 2 knows entries that stand for others'.
            with(v2, 9 << 32 | header(GrantFlags::TRANSITIVE), 0xdead_0000_0012, |entry| {
                let expected = Ok(Granted::Transitive(DomId::new(9), GrantRef::new(0x12)));
                let expected = if v2 { expected } else { Err(Error::Refused) };
                assert_eq!(entry.mark(Pins::default(), PEER, true, Purpose::Copy), expected);
                assert_eq!(entry.is_transitive(), v2);
            });
        }
    }

    #[test]
    fn parts_are_cut_at_the_end_of_the_page() {
        let header = header(GrantFlags::PERMIT_ACCESS | GrantFlags::SUB_PAGE);
        for (first, length, start, end) in
            [(8, 16, 8, 24), (4000, 200, 4000, 4096), (5000, 1, 4096, 4096), (0xffff, 0xffff, 4096, 4096)]
        {
            with(true, length << 48 | first << 32 | header, 1, |entry| {
                let granted = entry.mark(Pins::default(), PEER, true, Purpose::Copy);
                assert_eq!(granted, Ok(Granted::Frame(Mfn::new(1), Reach::Part { start, end })));
            });
        }
        // Version 1 has no parts: what else says so is for copies not looked at.
        with(false, header, 1, |entry| {
            let granted = entry.mark(Pins::default(), PEER, true, Purpose::Copy);
            assert_eq!(granted, Ok(Granted::Frame(Mfn::new(1), Reach::Page)));
        });
    }

    #[test]
    fn an_entry_in_use_may_say_anything_but_read_only() {
        for v2 in [false, true] {
            with(v2, header(GrantFlags::READONLY), 77, |entry| {
                assert!(entry.mark(Pins::HOST_READ, PEER, true, Purpose::Map).is_ok());
                assert_eq!(entry.mark(Pins::HOST_READ, PEER, false, Purpose::Map), Err(Error::Refused));
                assert_eq!(marks(entry), GrantFlags::READING);
            });
        }
    }

    #[test]
    fn transfers_are_committed_once() {
        for v2 in [false, true] {
            with(v2, header(GrantFlags::ACCEPT_TRANSFER), 0x40, |entry| {
                assert_eq!(entry.commit_transfer(DomId::new(6)), Err(Error::Refused));
                assert_eq!(entry.commit_transfer(PEER), Ok(0x40));
                assert_eq!(entry.commit_transfer(PEER), Err(Error::Refused));
                entry.complete_transfer(PEER, Mfn::new(99));
                assert_eq!(entry.load(), (5 << 16 | 0xe, 99));
            });
            with(v2, header(GrantFlags::ACCEPT_TRANSFER | GrantFlags::PCD), 0x40, |entry| {
                assert_eq!(entry.commit_transfer(PEER), Err(Error::Refused), "the flags are exactly these");
            });
        }
    }

    #[test]
    fn entries_and_marks_swap() {
        let words = [const { AtomicU64::new(0) }; 5];
        let [a, b, c, d, s] = &words;
        let first = Entry::V2 { words: [a, b], status: Status::new(s, 0) };
        let second = Entry::V2 { words: [c, d], status: Status::new(s, 3) };
        first.store(11, 12);
        second.store(21, 22);
        Status::new(s, 3).set(GrantFlags::WRITING);
        first.swap(&second);
        assert_eq!((first.load(), second.load()), ((21, 22), (11, 12)));
        assert_eq!((marks(&first), marks(&second)), (GrantFlags::WRITING, GrantFlags::empty()));
    }
}

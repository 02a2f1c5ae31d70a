//! The shared entry, version 1: one word of guest-writable memory that both sides change.
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
//! frame that changes in between is used; here it makes the exchange fail.
//!
//! The guest may change the word faster than the exchange can follow, so it is tried [`ATTEMPTS`] times at most.

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::grant::{GTF_PERMIT_ACCESS, GTF_TYPE_MASK, GrantFlags};
use hypercall_abi::{DomId, Mfn};

use super::Error;

/// How often an exchange is tried against a guest that keeps changing the word.
pub const ATTEMPTS: u32 = 5;

/// What an entry says, read at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// From its word.
    pub const fn from_word(word: u64) -> Entry {
        Entry(word)
    }
    /// An entry that gives `peer` access to `frame`. `None` when the frame's number has more than 32 bits.
    pub fn permit(frame: Mfn, peer: DomId, readonly: bool) -> Option<Entry> {
        let frame = u32::try_from(frame.get()).ok()?;
        let mut flags = GTF_PERMIT_ACCESS;
        if readonly {
            flags |= GrantFlags::READONLY.bits();
        }
        Some(Entry(u64::from(frame) << 32 | u64::from(peer.get()) << 16 | u64::from(flags)))
    }
    /// Its word.
    pub const fn word(self) -> u64 {
        self.0
    }
    /// The flags.
    pub const fn flags(self) -> GrantFlags {
        GrantFlags::from_bits_retain(self.0 as u16)
    }
    /// The domain it is for.
    pub const fn domain(self) -> DomId {
        DomId::new((self.0 >> 16) as u16)
    }
    /// The frame.
    pub const fn frame(self) -> Mfn {
        Mfn::new(self.0 >> 32)
    }
}

/// Marks an entry as read, or read and written.
///
/// `first` says that nobody uses it yet: then it must be a grant of access for `domain`; in use, that was checked before and
/// the guest may have changed it since, which is its own loss. `mapping` refuses entries for parts of a page. Writing is
/// refused if the entry is read-only now.
pub fn mark(
    word: &AtomicU64,
    first: bool,
    domain: DomId,
    readonly: bool,
    mapping: bool,
) -> Result<Entry, Error> {
    let mut seen = word.load(Ordering::Acquire);
    for _ in 0..ATTEMPTS {
        let entry = Entry(seen);
        let flags = entry.flags();
        if first {
            let sub_page = mapping && flags.contains(GrantFlags::SUB_PAGE);
            if flags.bits() & GTF_TYPE_MASK != GTF_PERMIT_ACCESS || sub_page || entry.domain() != domain {
                return Err(Error::Refused);
            }
        }
        let mut new = flags.union(GrantFlags::READING);
        if !readonly {
            if flags.contains(GrantFlags::READONLY) {
                return Err(Error::Refused);
            }
            new = new.union(GrantFlags::WRITING);
        }
        let next = seen & !0xffff | u64::from(new.bits());
        match word.compare_exchange(seen, next, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Ok(entry),
            Err(now) => seen = now,
        }
    }
    Err(Error::Refused)
}

/// Takes marks back. Release: what was done to the frame comes before the granter can see it free.
pub fn unmark(word: &AtomicU64, marks: GrantFlags) {
    if !marks.is_empty() {
        word.fetch_and(!u64::from(marks.bits()), Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: GrantFlags) -> AtomicU64 {
        AtomicU64::new(77 << 32 | 5 << 16 | u64::from(flags.bits()))
    }

    #[test]
    fn marks_come_and_go_and_leave_the_rest() {
        let word = entry(GrantFlags::PERMIT_ACCESS | GrantFlags::PCD);
        let before = word.load(Ordering::SeqCst);
        let entry = mark(&word, true, DomId::new(5), false, true).unwrap();
        assert_eq!((entry.frame(), entry.domain()), (Mfn::new(77), DomId::new(5)));
        let marks = GrantFlags::READING | GrantFlags::WRITING;
        assert_eq!(word.load(Ordering::SeqCst), before | u64::from(marks.bits()));
        unmark(&word, marks);
        assert_eq!(word.load(Ordering::SeqCst), before);
    }

    #[test]
    fn what_was_not_granted_is_refused() {
        let access = GrantFlags::PERMIT_ACCESS;
        let cases = [
            (access, 6, true, true),
            (GrantFlags::ACCEPT_TRANSFER, 5, true, true),
            (GrantFlags::empty(), 5, true, true),
            (access | GrantFlags::SUB_PAGE, 5, true, true),
            (access | GrantFlags::READONLY, 5, false, true),
        ];
        for (flags, domain, readonly, mapping) in cases {
            let word = entry(flags);
            let before = word.load(Ordering::SeqCst);
            assert_eq!(
                mark(&word, true, DomId::new(domain), readonly, mapping),
                Err(Error::Refused),
                "{flags:?}"
            );
            assert_eq!(word.load(Ordering::SeqCst), before, "a refusal leaves no mark");
        }
        assert!(mark(&entry(access | GrantFlags::READONLY), true, DomId::new(5), true, true).is_ok());
    }

    #[test]
    fn seeds_read_back() {
        let seed = Entry::permit(Mfn::new(0x1234), DomId::new(3), true).unwrap();
        assert_eq!((seed.frame(), seed.domain()), (Mfn::new(0x1234), DomId::new(3)));
        assert_eq!(seed.flags(), GrantFlags::PERMIT_ACCESS | GrantFlags::READONLY);
        assert_eq!(Entry::permit(Mfn::new(1 << 32), DomId::new(3), true), None);
    }
}

//! TLB flushes that are owed.
//!
//! A processor may go on using a translation until it is told to forget it. So a right that a table no longer gives is only
//! gone after a flush. Two things must wait for that: a frame that was writable (or a page table) becoming something else,
//! and a frame getting a new owner. Both know *since when* the old right is out of the tables: its type word holds a
//! reading of the TLB clock. Processors that have flushed since owe nothing (see [`tlb_clock`](super::tlb_clock)).

use hypercall_abi::DomId;

use super::page_info::Stamp;
use super::tlb_clock::{LocalTlb, TlbClock};

/// A flush that must happen before the caller's change counts.
///
/// It can be merged with others and must be [paid](TlbDebt::pay); dropping it unpaid is a bug that debug builds find.
#[must_use = "a TLB flush that is owed must be paid before the frame is used anew or the hypercall returns"]
#[derive(Debug)]
pub struct TlbDebt {
    owed: Option<Owed>,
}

#[derive(Clone, Copy, Debug)]
struct Owed {
    /// Reading of the clock when the right was gone from the tables; `u64::MAX` for the moment at which it is paid.
    since: u64,
    /// Whose address spaces can still have it; `None` for anybody's.
    domain: Option<DomId>,
}

impl TlbDebt {
    /// Nothing owed.
    pub const NONE: TlbDebt = TlbDebt { owed: None };

    /// A complete flush is owed by every processor that runs guests.
    pub const fn everywhere() -> TlbDebt {
        TlbDebt { owed: Some(Owed { since: u64::MAX, domain: None }) }
    }

    /// A page table of `domain` was changed just now: owed by the processors that have been in its address spaces since
    /// before.
    pub fn of_tables(domain: DomId, clock: &TlbClock) -> TlbDebt {
        TlbDebt { owed: Some(Owed { since: clock.reading(), domain: Some(domain) }) }
    }

    /// For a right that left the tables at `stamp`. Nothing if every processor has flushed since.
    pub fn since(stamp: Stamp, clock: &TlbClock) -> TlbDebt {
        let since = clock.at(stamp);
        if clock.late(since, None).is_empty() {
            TlbDebt::NONE
        } else {
            TlbDebt { owed: Some(Owed { since, domain: None }) }
        }
    }

    /// Whether anything is owed.
    pub const fn is_owed(&self) -> bool {
        self.owed.is_some()
    }

    /// Whether anything was owed, which nobody pays.
    #[cfg(test)]
    pub fn is_owed_and_forgiven(mut self) -> bool {
        self.owed.take().is_some()
    }

    /// Takes over another debt.
    pub fn merge(&mut self, mut other: TlbDebt) {
        self.owed = match (self.owed, other.owed.take()) {
            (Some(a), Some(b)) => Some(Owed {
                since: a.since.max(b.since),
                domain: if a.domain == b.domain { a.domain } else { None },
            }),
            (a, b) => a.or(b),
        };
    }

    /// Flushes what is owed, and waits until it is done.
    pub fn pay(mut self, tlb: &impl LocalTlb, clock: &TlbClock) {
        if let Some(owed) = self.owed.take() {
            clock.settle(tlb, owed.since.min(clock.reading()), owed.domain);
        }
    }
}

impl Drop for TlbDebt {
    fn drop(&mut self) {
        debug_assert!(!self.is_owed(), "a TLB debt was dropped unpaid");
    }
}

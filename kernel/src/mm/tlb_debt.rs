//! TLB flushes that are owed.
//!
//! A processor may go on using a translation until it is told to forget it. So a right that a table no longer gives is only
//! gone after a flush. Two things must wait for that: a frame that was writable (or a page table) becoming something else,
//! and a frame getting a new owner. Both know *since when* the old right is out of the tables: its type word holds the
//! reading of a clock that counts complete flushes. If the clock went on meanwhile, nothing is owed.

use core::sync::atomic::{AtomicU32, Ordering};

use super::page_info::Stamp;
use crate::platform::{CpuSet, Platform, TlbFlush};

/// A flush that must happen before the caller's change counts.
///
/// It can be merged with others and must be [paid](TlbDebt::pay); dropping it unpaid is a bug that debug builds find.
#[must_use = "a TLB flush that is owed must be paid before the frame is used anew or the hypercall returns"]
#[derive(Debug)]
pub struct TlbDebt {
    cpus: CpuSet,
}

impl TlbDebt {
    /// Nothing owed.
    pub const NONE: TlbDebt = TlbDebt { cpus: CpuSet(0) };

    /// A complete flush on every processor is owed.
    pub const fn everywhere() -> TlbDebt {
        TlbDebt { cpus: CpuSet::ALL }
    }

    /// Whether anything is owed.
    pub const fn is_owed(&self) -> bool {
        self.cpus.0 != 0
    }

    /// Takes over another debt.
    pub fn merge(&mut self, mut other: TlbDebt) {
        self.cpus.0 |= other.cpus.0;
        other.cpus = CpuSet(0);
    }

    /// Flushes what is owed.
    pub fn pay<P: Platform>(mut self, platform: &P, clock: &TlbClock) {
        if self.is_owed() {
            platform.flush_tlb(self.cpus, TlbFlush::All);
            if self.cpus == CpuSet::ALL {
                clock.flushed_everywhere();
            }
            self.cpus = CpuSet(0);
        }
    }
}

impl Drop for TlbDebt {
    fn drop(&mut self) {
        debug_assert!(!self.is_owed(), "a TLB debt was dropped unpaid");
    }
}

/// Counts flushes that dropped all translations of all processors.
///
/// Two readings that differ prove that such a flush lies between them; equal ones prove nothing (the count wraps), and then
/// a flush is owed. Whoever stamps a frame has taken the right out of the table *before* it reads the clock.
#[derive(Debug, Default)]
pub struct TlbClock(AtomicU32);

impl TlbClock {
    /// A clock at zero.
    pub const fn new() -> TlbClock {
        TlbClock(AtomicU32::new(0))
    }

    /// The reading now.
    pub fn now(&self) -> Stamp {
        Stamp::new(self.0.load(Ordering::SeqCst))
    }

    /// All processors have dropped all translations since the last reading.
    pub fn flushed_everywhere(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// What is owed for a right that left the tables at `stamp`.
    pub fn owed_since(&self, stamp: Stamp) -> TlbDebt {
        if self.now() == stamp { TlbDebt::everywhere() } else { TlbDebt::NONE }
    }
}

//! Bugs put in by hand, for the test that shows that the reference model objects to each. Compiled out of every image:
//! without the feature `mutants` nothing can be chosen and every question is answered by a constant.

#[cfg(feature = "mutants")]
use core::sync::atomic::{AtomicU8, Ordering};

/// A known way to get the accounting wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutant {
    /// A writable mapping does not ask whether the frame is a page table.
    SkippedTypeCheck = 1,
    /// A frame that changes its kind or its owner owes no flush.
    MissedFlush = 2,
    /// An entry that is replaced keeps its references.
    LeakedReference = 3,
}

/// The bug that is in, if any.
#[derive(Default)]
pub struct Mutants {
    #[cfg(feature = "mutants")]
    chosen: AtomicU8,
}

impl Mutants {
    /// Puts a bug in, or takes it out.
    #[cfg(feature = "mutants")]
    pub fn choose(&self, mutant: Option<Mutant>) {
        self.chosen.store(mutant.map_or(0, |m| m as u8), Ordering::Relaxed);
    }

    #[cfg(feature = "mutants")]
    pub(super) fn has(&self, mutant: Mutant) -> bool {
        self.chosen.load(Ordering::Relaxed) == mutant as u8
    }

    #[cfg(not(feature = "mutants"))]
    pub(super) const fn has(&self, _mutant: Mutant) -> bool {
        false
    }
}

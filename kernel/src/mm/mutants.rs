//! Bugs put in by hand, for the test that shows that the reference model objects to each. Compiled out of every image:
//! without the feature `mutants` these are constants.

/// A known way to get the accounting wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A writable mapping does not ask whether the frame is a page table.
    SkippedTypeCheck,
    /// A frame that changes its kind or its owner owes no flush.
    MissedFlush,
    /// An entry that is replaced keeps its references.
    LeakedReference,
}

#[cfg(feature = "mutants")]
mod chosen {
    use core::cell::Cell;

    std::thread_local! {
        static MUTANT: Cell<Option<super::Mutant>> = const { Cell::new(None) };
    }

    /// Chooses the bug of this thread.
    pub fn choose(mutant: Option<super::Mutant>) {
        MUTANT.set(mutant);
    }

    pub(in crate::mm) fn is(mutant: super::Mutant) -> bool {
        MUTANT.get() == Some(mutant)
    }
}

#[cfg(not(feature = "mutants"))]
mod chosen {
    pub(in crate::mm) const fn is(_mutant: super::Mutant) -> bool {
        false
    }
}

#[cfg(feature = "mutants")]
pub use chosen::choose;

pub(super) fn skips_type_check() -> bool {
    chosen::is(Mutant::SkippedTypeCheck)
}
pub(super) fn misses_flush() -> bool {
    chosen::is(Mutant::MissedFlush)
}
pub(super) fn leaks_reference() -> bool {
    chosen::is(Mutant::LeakedReference)
}

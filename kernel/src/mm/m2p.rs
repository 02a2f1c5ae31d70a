//! The machine-to-physical table: for each frame the number by which its owner knows it.
//!
//! Guests read it at 0xffff_8000_0000_0000. It is a service to them and nothing here relies on it: an owner may enter
//! any number for its frames.

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::Mfn;

/// Entry of a frame that nobody owns.
pub const INVALID: u64 = u64::MAX;

/// The table, one word per frame.
pub struct M2p {
    words: &'static [AtomicU64],
}

impl M2p {
    /// Over the words that guests can read; they are all set to [`INVALID`].
    pub fn new(words: &'static [AtomicU64]) -> M2p {
        for word in words {
            word.store(INVALID, Ordering::Relaxed);
        }
        M2p { words }
    }

    /// Enters the number by which the owner knows `mfn`. Frames beyond the table are ignored.
    pub fn set(&self, mfn: Mfn, pfn: u64) {
        if let Some(word) = self.words.get(mfn.get() as usize) {
            word.store(pfn, Ordering::Relaxed);
        }
    }

    /// The entry of `mfn`, [`INVALID`] beyond the table.
    pub fn get(&self, mfn: Mfn) -> u64 {
        self.words.get(mfn.get() as usize).map_or(INVALID, |word| word.load(Ordering::Relaxed))
    }
}

//! The domain as a value.

use core::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Everything this domain owns, handed out once.
#[non_exhaustive]
pub struct Domain {}

impl Domain {
    /// The domain, the first time somebody asks.
    pub fn take() -> Option<Domain> {
        if TAKEN.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(Domain {})
    }
}

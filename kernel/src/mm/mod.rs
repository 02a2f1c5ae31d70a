//! Frames, their owners and types, page tables.
#![forbid(unsafe_code)]

use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Frames, their owners and types, and the free ones.
pub struct Memory {}

/// The frames a domain owns.
pub struct PageList {
    max: u64,
}

impl PageList {
    /// No frames yet, at most `max`.
    pub fn new(max: u64) -> PageList {
        PageList { max }
    }
    /// Most frames the domain may own.
    pub fn max(&self) -> u64 {
        self.max
    }
}

/// How far a domain's teardown has come.
pub struct Teardown {}

impl Teardown {
    /// Not begun.
    pub const fn new() -> Teardown {
        Teardown {}
    }
}

impl Default for Teardown {
    fn default() -> Self {
        Teardown::new()
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Gives some quarantined frames back to the free ones, their TLB debt paid; a bounded number at a time.
    pub fn drain_quarantine(&self) {}
}

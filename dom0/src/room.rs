//! dom0's own memory: whether there is enough left for something new.
//!
//! An allocation that fails ends dom0, and the machine with it. So what would take memory for long is asked for beforehand, and refused
//! while less than a reserve is left: the more it draws after it, the sooner. What runs already goes on
//! from the reserve. Destroying and detaching take nothing, and so there is a way back.

use alloc::format;
use alloc::string::String;
use guest_sdk::memory;

use crate::units::{Bytes, PAGE};

const MIB: u64 = 1 << 20;

/// Something new that takes memory of dom0's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum New {
    /// A domain, with its rings, nodes and log.
    Domain,
    /// A device of a domain.
    Device,
    /// The content of a disk, of so many bytes.
    Content(u64),
    /// A front end that wants to connect, with its rings and the pages that are kept mapped for it.
    Connection,
    /// What a domain wants to have kept in xenstore.
    Node,
}

impl New {
    /// What must be left beside what it takes itself, in bytes.
    const fn reserve(self) -> u64 {
        match self {
            Self::Domain => 8 * MIB,
            Self::Device => 7 * MIB,
            Self::Content(_) => 6 * MIB,
            Self::Connection => 5 * MIB,
            Self::Node => 4 * MIB,
        }
    }

    const fn wanted(self) -> u64 {
        match self {
            Self::Content(bytes) => self.reserve().saturating_add(bytes),
            Self::Domain | Self::Device | Self::Connection | Self::Node => self.reserve(),
        }
    }
}

/// Bytes of dom0's memory that nothing is kept in.
fn left() -> u64 {
    let usage = memory::usage();
    usage.unmapped.saturating_add(usage.heap_free)
}

/// Whether there is room for something.
pub fn is_for(new: New) -> bool {
    left() >= new.wanted()
}

/// The same, for whom it has to be explained to.
///
/// # Errors
/// What to say.
pub fn check(new: New) -> Result<(), String> {
    if is_for(new) { Ok(()) } else { Err(refusal(left(), new)) }
}

fn refusal(left: u64, new: New) -> String {
    format!(
        "dom0 has {} of its own memory left, and keeps {} for what runs already: destroy a domain or detach a disk of kind ram, or start \
         the machine with more for dom0 (`dom0_mem=`)",
        Bytes::of_pages(left / PAGE),
        Bytes::of_pages(new.reserve() / PAGE),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_draws_more_after_it_is_refused_sooner() {
        let order = [New::Domain, New::Device, New::Content(0), New::Connection, New::Node];
        assert!(order.windows(2).all(|pair| pair[0].reserve() > pair[1].reserve()));
        assert_eq!(New::Content(MIB).wanted(), 7 * MIB);
        assert_eq!(New::Content(u64::MAX).wanted(), u64::MAX);
        let text = refusal(5 * MIB, New::Domain);
        assert!(text.starts_with("dom0 has 5 MiB of its own memory left, and keeps 8 MiB"), "{text}");
    }
}

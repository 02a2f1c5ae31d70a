//! How a domain ends, and how it hears that it should.
//!
//! The toolstack's wish stands in the domain's own xenstore node `control/shutdown` (docs/misc/xenstore-paths of Xen): [`requested`]
//! waits for one. What is in the console ring gets a moment to go out before a domain ends.

use crate::hypercall::stub;
use crate::ring::SharedPage;
use crate::xenstore::{SharedStore, Signal, StoreError};
use alloc::string::String;
use hypercall_abi::sched::{SchedShutdown, ShutdownReason};
use hypercall_abi::subops::SchedOp;

const NODE: &str = "control/shutdown";

fn end(reason: ShutdownReason) -> ! {
    crate::console::flush();
    let argument = SchedShutdown { reason: reason as u32 };
    loop {
        // SAFETY: the command's own argument, alive through the call.
        let _ =
            unsafe { stub::sched_op(u64::from(SchedOp::Shutdown.number()), (&raw const argument) as u64) };
    }
}

/// Powers the domain off.
pub fn poweroff() -> ! {
    end(ShutdownReason::Poweroff)
}

/// Asks for the domain to be started again.
pub fn reboot() -> ! {
    end(ShutdownReason::Reboot)
}

/// Ends the domain as crashed.
pub fn crash() -> ! {
    end(ShutdownReason::Crash)
}

/// What a toolstack asks of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// To end for good.
    Poweroff,
    /// To end, and be started again.
    Reboot,
    /// To stop for good; domains treat it as [`Poweroff`](Self::Poweroff).
    Halt,
    /// To let itself be suspended: saved, or moved to another machine.
    Suspend,
    /// Something else, in its own words.
    Other(String),
}

impl From<String> for Request {
    fn from(word: String) -> Self {
        match word.as_str() {
            "poweroff" => Self::Poweroff,
            "reboot" => Self::Reboot,
            "halt" => Self::Halt,
            "suspend" => Self::Suspend,
            _ => Self::Other(word),
        }
    }
}

/// Waits until the toolstack asks this domain for something, and empties the node: that says that it was heard. A request that was
/// made before this is awaited is found as well.
///
/// # Errors
/// [`StoreError`].
pub async fn requested<M: SharedPage, S: Signal>(store: &SharedStore<M, S>) -> Result<Request, StoreError> {
    let mut wishes = store.watch(NODE).await?;
    loop {
        // The first event only says that the watch is there.
        wishes.event().await?;
        if let Some(word) = store.read(NODE).await?
            && !word.is_empty()
        {
            store.write(NODE, "").await?;
            return Ok(word.into());
        }
    }
}

//! How a domain ends. What is in the console ring gets a moment to go out first.

use crate::hypercall::stub;
use hypercall_abi::sched::{SchedShutdown, ShutdownReason};
use hypercall_abi::subops::SchedOp;

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

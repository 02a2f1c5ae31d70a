//! How a domain ends.

use crate::hypercall;

fn end(reason: u32) -> ! {
    crate::console::flush();
    loop {
        // SAFETY: SCHEDOP_shutdown reads one u32.
        unsafe { hypercall::raw(29, [2, (&raw const reason) as u64, 0, 0, 0]) };
    }
}

/// Powers the domain off.
pub fn poweroff() -> ! {
    end(0)
}

/// Asks for the domain to be started again.
pub fn reboot() -> ! {
    end(1)
}

/// Ends the domain as crashed.
pub fn crash() -> ! {
    end(3)
}

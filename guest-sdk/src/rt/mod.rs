//! The runtime: what runs before `main` and beneath it. Nearly all of this crate's assembly and unsafe code is here.

#[doc(hidden)]
pub mod bytes;
#[doc(hidden)]
pub mod heap;
mod image;
#[doc(hidden)]
pub mod panic;
#[doc(hidden)]
pub mod start;
pub mod trap;

use core::fmt::Debug;

/// Whether this library is in the middle of nothing: none of its locks is held.
pub(crate) fn is_intact() -> bool {
    heap::is_intact()
        && crate::console::is_intact()
        && crate::memory::is_intact()
        && crate::grants::is_intact()
        && crate::events::is_intact()
        && crate::executor::is_intact()
}

/// What `main` may return.
pub trait Outcome {
    /// Ends the domain accordingly.
    fn end(self) -> !;
}

impl Outcome for () {
    fn end(self) -> ! {
        crate::shutdown::poweroff()
    }
}

impl<E: Debug> Outcome for Result<(), E> {
    fn end(self) -> ! {
        match self {
            Ok(()) => crate::shutdown::poweroff(),
            Err(error) => {
                crate::println!("main failed: {error:?}");
                crate::shutdown::crash()
            }
        }
    }
}

/// Ends the domain as the result of `main` says. `#[entry]` calls it.
#[doc(hidden)]
pub fn finish(outcome: impl Outcome) -> ! {
    outcome.end()
}

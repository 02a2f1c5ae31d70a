//! The console ring of a domain (public/io/console.h).
//!
//! Two byte rings with free-running indices, as in [`xenstore`](super::xenstore): a writer stores bytes, then its index (release),
//! then notifies; a reader loads the index (acquire), copies bytes, stores its own index (release) and notifies.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The page that a domain shares with the console's back end; the guest's output is `out`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct XenconsInterface {
    /// Input for the guest.
    pub input: [u8; 1024],
    /// Output of the guest.
    pub out: [u8; 2048],
    /// Bytes of input consumed; guest.
    pub in_cons: u32,
    /// Bytes of input produced; back end.
    pub in_prod: u32,
    /// Bytes of output consumed; back end.
    pub out_cons: u32,
    /// Bytes of output produced; guest.
    pub out_prod: u32,
}

//! Bytes of guests, copied by the hypervisor.

use hypercall_abi::{DomId, GrantRef};

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a page that a guest has granted.
    Granted {
        /// The guest.
        domain: DomId,
        /// The page.
        gref: GrantRef,
        /// First byte in it.
        offset: u16,
    },
    /// In our own staging area, from this byte on; within one page of it.
    Staging(usize),
}

/// A copy within one page on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// From here.
    pub from: Place,
    /// To here.
    pub to: Place,
    /// So many bytes.
    pub bytes: u16,
    /// OUT: it was done.
    pub done: bool,
}

/// Who copies.
pub trait Copier {
    /// Does all copies, in order and in as few hypercalls as can be, and says which were done. One that fails may have copied a part.
    fn copy(&mut self, copies: &mut [Copy]);

    /// The staging area: [`STAGING_BYTES`](crate::network::STAGING_BYTES). Nobody else looks at it between two copies.
    fn staging(&mut self) -> &mut [u8];
}

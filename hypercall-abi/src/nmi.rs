//! Virtual NMIs: the arguments of `nmi_op` (public/nmi.h).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

bitflags! {
    /// Bits of [`ArchSharedInfo::nmi_reason`](crate::shared_info::ArchSharedInfo::nmi_reason): why vCPU 0 got an NMI.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct NmiReason: u64 {
        /// I/O check.
        const IO_ERROR = 1 << 0;
        /// PCI system error.
        const PCI_SERR = 1 << 1;
        /// None of the others.
        const UNKNOWN = 1 << 2;
    }
}

/// IN of `XENNMI_register_callback`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NmiCallback {
    /// The entry point.
    pub handler_address: u64,
    /// Unused since Xen 3.
    pub pad: u64,
}

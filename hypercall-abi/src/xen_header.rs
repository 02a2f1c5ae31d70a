//! The heads of Xen's own control calls (public/domctl.h, sysctl.h), which a caller may make of any hypervisor of its kind: they
//! are refused by what stands in them. Our control interface is in `control` (feature `control`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::DomId;

/// Version in a `domctl` of Xen 4.17.
pub const XEN_DOMCTL_INTERFACE_VERSION: u32 = 0x15;
/// Version in a `sysctl` of Xen 4.17.
pub const XEN_SYSCTL_INTERFACE_VERSION: u32 = 0x15;
/// Bytes of a whole `domctl`.
pub const DOMCTL_SIZE: usize = 144;
/// Bytes of a whole `sysctl`.
pub const SYSCTL_SIZE: usize = 136;
/// Bytes of the argument of xenoprof's `init`.
pub const XENOPROF_INIT_SIZE: usize = 72;
/// Command of `domctl`: makes a domain.
pub const DOMCTL_CREATEDOMAIN: u32 = 1;
/// Command of `domctl`: describes a domain, or the next one.
pub const DOMCTL_GETDOMAININFO: u32 = 5;
/// Command of `domctl`: shadow page tables and logging of writes.
pub const DOMCTL_SHADOW_OP: u32 = 10;

/// How the argument of a `domctl`, `sysctl`, `platform_op` or `mca` begins (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct XenControlHeader {
    /// Which command.
    pub cmd: u32,
    /// The version of the interface; another one gets `-EACCES`.
    pub interface_version: u32,
    /// Of a `domctl`: whom it is about.
    pub domid: DomId,
    /// Padding.
    pub pad: [u16; 3],
}

//! Commands of `platform_op` (public/platform.h), and the one struct that sets the wall clock.
//!
//! The argument is a [`PlatformHeader`] with the command's struct behind it, in 136 bytes together.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version in [`PlatformHeader`]; another one gets `-EACCES`.
pub const XENPF_INTERFACE_VERSION: u32 = 0x0300_0001;
/// Version in the argument of `mca`; another one gets `-EACCES`.
pub const XEN_MCA_INTERFACE_VERSION: u32 = 0x01ec_c003;
/// Bytes of the whole argument of `mca`.
pub const MCA_OP_SIZE: usize = 152;
/// Bytes of the whole argument.
pub const PLATFORM_OP_SIZE: usize = 136;

pub use crate::subops::PlatformOp;

/// The head of the argument (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PlatformHeader {
    /// Number of a [`PlatformOp`].
    pub cmd: u32,
    /// [`XENPF_INTERFACE_VERSION`].
    pub interface_version: u32,
}

/// IN of `settime64`: it was this time at that system time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Settime64 {
    /// Unix time, seconds.
    pub secs: u64,
    /// Nanoseconds, below 10^9.
    pub nsecs: u32,
    /// Zero.
    pub mbz: u32,
    /// System time, ns.
    pub system_time: u64,
}

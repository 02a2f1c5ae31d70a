//! Payloads of the commands that grant and revoke hardware.
//!
//! A domain can pass on only what it has itself (`-EPERM`). Revoking does not undo what is mapped or bound already.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::payload;
use crate::Mfn;

/// Grants or revokes an interrupt. Errors: `-ENOSPC` too many separate ranges.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IrqPermission {
    /// IN: the global interrupt.
    pub irq: u32,
    /// IN: 1 grants, 0 revokes.
    pub allow: u32,
}

/// Grants or revokes I/O ports. Errors: `-EINVAL` `first` above `last`, `-ENOSPC` too many separate ranges.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IoportPermission {
    /// IN: the first.
    pub first: u16,
    /// IN: the last.
    pub last: u16,
    /// IN: 1 grants, 0 revokes.
    pub allow: u32,
}

/// Grants or revokes machine frames that are not RAM; RAM in the range stays out of reach, for it is never mapped by this right.
/// Errors: `-EINVAL` `first` above `last`, `-ENOSPC` too many separate ranges.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IomemPermission {
    /// IN: the first.
    pub first: Mfn,
    /// IN: the last.
    pub last: Mfn,
    /// IN: 1 grants, 0 revokes.
    pub allow: u32,
    /// Zero.
    pub pad0: u32,
}

payload! { IrqPermission IoportPermission IomemPermission }

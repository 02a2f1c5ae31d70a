//! Payloads of the commands that grant and revoke hardware, and of those by which a domain uses what it was granted.
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

/// Limits how many message interrupts the domain may have at a time. Those beyond that it has stay. A caller can give as many as it
/// may have itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MessagePermission {
    /// IN: how many.
    pub max: u32,
    /// Zero.
    pub pad0: u32,
}

/// Takes a message interrupt (MSI, MSI-X) for the caller itself; takes no control verb. It is bound to a port by
/// `EVTCHNOP_bind_pirq`, needs no end, and is given back by `PHYSDEVOP_unmap_pirq`, or with the domain.
///
/// The caller writes `address` and `data` into its device. They name the CPU on which vCPU 0 is; who moves the port to another vCPU
/// asks again by [`InterruptInfo`] and writes again. Until then, and whenever the vCPU has moved since, the interrupt arrives all
/// the same, by way of another CPU.
///
/// Errors: `-EINVAL` another domain than the caller, `-EPERM` it may not have one more, `-ENOSPC` none is left.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AllocateMessage {
    /// OUT: its number.
    pub pirq: u32,
    /// OUT: the value to be written.
    pub data: u32,
    /// OUT: the machine address to be written to.
    pub address: u64,
}

/// Where an interrupt of the caller's goes; takes no control verb.
///
/// Errors: `-EINVAL` another domain than the caller, a pin that it has no right to, a message that is not its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InterruptInfo {
    /// IN: its number.
    pub pirq: u32,
    /// OUT: as in [`AllocateMessage`]; 0 for a pin.
    pub data: u32,
    /// OUT: as in [`AllocateMessage`]; 0 for a pin.
    pub address: u64,
    /// OUT: how many have arrived since the message was taken, or since the host was started.
    pub arrived: u64,
    /// OUT: the CPU that it is sent to.
    pub cpu: u32,
    /// OUT: the CPU at which the latest one arrived; meaningless before the first.
    pub seen_on: u32,
}

payload! { IrqPermission IoportPermission IomemPermission MessagePermission AllocateMessage InterruptInfo }

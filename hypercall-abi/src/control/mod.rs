//! The control interface: how a domain with control verbs builds, watches and ends other domains (feature `control`).
//!
//! Hypercall 36 (`domctl`) with rdi = address of a [`ControlOp`]. The layout is this project's own, not Xen's domctl; a change
//! that is not compatible changes [`INTERFACE_VERSION`]. Building a guest: [`CreateDomain`], [`SetMaxPages`], `populate_physmap`
//! for the new domain, its contents through foreign mappings, `mmu_update` and pins with its domid, [`HypercallPage`],
//! [`GrantSeed`], [`SetVcpuContext`], then [`Unpause`].
//!
//! Errors of every command: `-EACCES` wrong version, `-ENOSYS` unknown command, `-EPERM` the caller lacks the verb for that
//! domain, `-ESRCH` no such domain, `-EFAULT` bad address. Commands add their own. On success
//! the call returns 0 and the hypervisor has written the payload back where the command has OUT fields.

mod commands;
mod domain;
mod host;
mod rights;

pub use commands::Command;
pub use domain::{
    CreateDomain, CreateFlags, Destroy, DomainInfo, DomainState, GetVcpuContext, GrantSeed, HypercallPage,
    ListDomains, PageKind, PageType, PageTypes, Pause, SetAffinity, SetCap, SetMaxPages, SetVcpuContext,
    SetWeight, Unpause, VcpuInfo, VcpuState,
};
pub use host::{Capabilities, CpuInfo, LONGEST_IS_HYPERCALL, PhysInfo, ReadLog, SetLogLevel, Version};
pub use rights::{
    AllocateMessage, InterruptInfo, IomemPermission, IoportPermission, IrqPermission, MessagePermission,
};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::DomId;

/// Version of this interface; the upper half tells it from Xen's domctl versions.
pub const INTERFACE_VERSION: u32 = 0x584c_0001;

/// Bytes for a command's payload.
pub const PAYLOAD_SIZE: usize = 128;

/// The argument of the control hypercall: a header and the payload of one command.
///
/// The hypervisor copies it in once, decides on the copy, and copies back whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControlOp {
    /// IN: [`INTERFACE_VERSION`].
    pub interface_version: u32,
    /// IN: number of a [`Command`].
    pub cmd: u32,
    /// IN: the domain that the command is about; ignored by commands about the host. OUT for [`CreateDomain`].
    pub domid: DomId,
    /// Zero.
    pub pad: [u16; 3],
    /// The command's payload struct, padded with zeros.
    pub payload: [u8; PAYLOAD_SIZE],
}

/// The payload of one command.
pub trait Payload: FromBytes + IntoBytes + Immutable + KnownLayout {
    /// Which command it belongs to.
    const COMMAND: Command;
}

impl ControlOp {
    /// A call of `T`'s command about `domid`.
    #[must_use]
    pub fn new<T: Payload>(domid: DomId, payload: &T) -> Self {
        let mut op = Self::new_zeroed();
        op.interface_version = INTERFACE_VERSION;
        op.cmd = T::COMMAND.number();
        op.domid = domid;
        op.encode(payload);
        op
    }

    /// The command, or `None` for a number that nobody defined. Does not look at the version.
    #[must_use]
    pub const fn command(&self) -> Option<Command> {
        Command::from_number(self.cmd as u64)
    }

    /// Whether the header has this interface's version.
    #[must_use]
    pub const fn version_matches(&self) -> bool {
        self.interface_version == INTERFACE_VERSION
    }

    /// Reads the payload as `T`; `None` when the header names another command.
    #[must_use]
    pub fn decode<T: Payload>(&self) -> Option<T> {
        if self.cmd != T::COMMAND.number() {
            return None;
        }
        T::read_from_prefix(&self.payload).ok().map(|(payload, _)| payload)
    }

    /// Stores a payload; the header stays.
    pub fn encode<T: Payload>(&mut self, payload: &T) {
        const { assert!(size_of::<T>() <= PAYLOAD_SIZE, "a payload must fit") };
        let written = payload.write_to_prefix(&mut self.payload);
        debug_assert!(written.is_ok(), "the size was checked at compile time");
    }
}

macro_rules! payload {
    ($($name:ident)*) => {
        $(impl $crate::control::Payload for $name {
            const COMMAND: $crate::control::Command = $crate::control::Command::$name;
        })*
    };
}
use payload;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_survive_the_envelope() {
        let create = CreateDomain {
            max_vcpus: 3,
            max_pages: 0x1_0000_0001,
            handle: [7; 16],
            ..CreateDomain::default()
        };
        let op = ControlOp::new(DomId::INVALID, &create);
        assert!(op.version_matches());
        assert_eq!(op.command(), Some(Command::CreateDomain));
        assert_eq!(op.decode::<CreateDomain>(), Some(create));
        assert_eq!(op.decode::<SetMaxPages>(), None);
    }

    #[test]
    fn a_foreign_version_is_seen() {
        let mut op = ControlOp::new(DomId::ZERO, &Pause::default());
        op.interface_version = 0x15;
        assert!(!op.version_matches());
        op.cmd = 0xffff_ffff;
        assert_eq!(op.command(), None);
    }
}

//! Hardware-virtualized domains: the arguments of `hvm_op` (public/hvm/hvm_op.h) and `dm_op` (public/hvm/dm_op.h) as far as a PV
//! domain's call is looked at. None of these does anything to a PV domain.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, Gfn, GuestHandle, MachAddr};

/// One more than the highest parameter.
pub const HVM_NR_PARAMS: u32 = 39;
/// Highest event number of [`Xentrace`].
pub const XENTRACE_MAX_EVENT: u16 = 0xfff;
/// Most bytes of a trace record.
pub const XENTRACE_MAX_EXTRA: u16 = 28;
/// Most buffers of a `dm_op`.
pub const DM_OP_MAX_BUFFERS: u32 = 2;

/// Argument of `set_param` and `get_param`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HvmParam {
    /// IN: whose.
    pub domid: DomId,
    /// Padding.
    pub pad: u16,
    /// IN: which, below [`HVM_NR_PARAMS`].
    pub index: u32,
    /// Set: IN. Get: OUT.
    pub value: u64,
}

/// Argument of `pagetable_dying` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PagetableDying {
    /// Whose.
    pub domid: DomId,
    /// Padding.
    pub pad: [u16; 3],
    /// The top table.
    pub gpa: MachAddr,
}

/// Argument of `xentrace` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Xentrace {
    /// Number of the event, up to [`XENTRACE_MAX_EVENT`].
    pub event: u16,
    /// Bytes in `extra` that count, up to [`XENTRACE_MAX_EXTRA`].
    pub extra_bytes: u16,
    /// What is recorded.
    pub extra: [u8; XENTRACE_MAX_EXTRA as usize],
}

/// Argument of `get_mem_type`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetMemType {
    /// IN: whose.
    pub domid: DomId,
    /// OUT.
    pub mem_type: u16,
    /// Padding.
    pub pad: [u16; 2],
    /// IN: which page.
    pub pfn: Gfn,
}

/// A buffer of a `dm_op` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmOpBuffer {
    /// The buffer.
    pub buffer: GuestHandle<u8>,
    /// Its size in bytes.
    pub size: u64,
}

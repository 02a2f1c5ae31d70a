//! Grant tables: entries, and the arguments of `grant_table_op` (public/grant_table.h).
//!
//! An entry is written by its domain and read by the hypervisor, which sets the in-use bits. To grant: store `domid` and
//! `frame`, then `flags` (release). To revoke: compare-and-swap `flags`, seen without [`GrantFlags::READING`] and
//! [`GrantFlags::WRITING`], to 0; in version 2 those two are in the status word, to be looked at after a full barrier. The
//! hypervisor pins with a compare-and-swap over flags and domid together, so a change in between is noticed.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, GrantRef, GuestHandle, MachAddr, Mfn};

/// Entries at the start of a table that survive a change of version and that a builder may fill.
pub const GNTTAB_NR_RESERVED_ENTRIES: u32 = 8;
/// The console ring's entry.
pub const GNTTAB_RESERVED_CONSOLE: GrantRef = GrantRef::new(0);
/// The xenstore ring's entry.
pub const GNTTAB_RESERVED_XENSTORE: GrantRef = GrantRef::new(1);

bitflags! {
    /// Flags of an entry. The two lowest bits are the [type](GrantFlags::kind).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct GrantFlags: u16 {
        /// Type: the named domain may map or copy.
        const PERMIT_ACCESS = 1;
        /// Type: the named domain may give a frame into this slot.
        const ACCEPT_TRANSFER = 2;
        /// Type (version 2): stands for an entry of another domain.
        const TRANSITIVE = 3;
        /// Reading only.
        const READONLY = 1 << 2;
        /// Mapped or copied from now (hypervisor).
        const READING = 1 << 3;
        /// Mapped writable or copied to now (hypervisor).
        const WRITING = 1 << 4;
        /// Write-through.
        const PWT = 1 << 5;
        /// Not cached.
        const PCD = 1 << 6;
        /// Attribute-table bit.
        const PAT = 1 << 7;
        /// Version 2: only a part of the page.
        const SUB_PAGE = 1 << 8;
        /// The rest, kept as it is.
        const _ = !0;
    }
}

/// Type bits: not in use.
pub const GTF_INVALID: u16 = 0;
/// Type bits: the named domain may map or copy.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// Type bits: the named domain may give a frame.
pub const GTF_ACCEPT_TRANSFER: u16 = 2;
/// Type bits: stands for an entry of another domain.
pub const GTF_TRANSITIVE: u16 = 3;
/// Mask of the type.
pub const GTF_TYPE_MASK: u16 = 3;
/// Transfer entries: a giver is at it; the owner must wait.
pub const GTF_TRANSFER_COMMITTED: u16 = 1 << 2;
/// Transfer entries: `frame` holds the machine frame given.
pub const GTF_TRANSFER_COMPLETED: u16 = 1 << 3;

impl GrantFlags {
    /// The type: `GTF_INVALID`, `GTF_PERMIT_ACCESS`, `GTF_ACCEPT_TRANSFER` or `GTF_TRANSITIVE`.
    #[must_use]
    pub const fn kind(self) -> u16 {
        self.bits() & GTF_TYPE_MASK
    }
}

/// An entry of version 1, 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GrantEntryV1 {
    /// [`GrantFlags`].
    pub flags: u16,
    /// Who is granted.
    pub domid: DomId,
    /// The frame.
    pub frame: u32,
}

/// The head of an entry of version 2.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GrantEntryHeader {
    /// [`GrantFlags`].
    pub flags: u16,
    /// Who is granted.
    pub domid: DomId,
}

/// An entry of version 2, 16 bytes: a whole page or a part of one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GrantEntryV2 {
    /// The head.
    pub hdr: GrantEntryHeader,
    /// First byte, with [`GrantFlags::SUB_PAGE`]; transitive: the domain stood for.
    pub page_off: u16,
    /// Bytes, with [`GrantFlags::SUB_PAGE`].
    pub length: u16,
    /// The frame; transitive: the entry stood for, in the low half.
    pub frame: u64,
}

bitflags! {
    /// Flags of [`GnttabMapGrantRef`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct MapFlags: u32 {
        /// For devices.
        const DEVICE_MAP = 1 << 0;
        /// For the CPU.
        const HOST_MAP = 1 << 1;
        /// Read only.
        const READONLY = 1 << 2;
        /// Also for guest user mode.
        const APPLICATION_MAP = 1 << 3;
        /// `host_addr` is the machine address of a page-table entry.
        const CONTAINS_PTE = 1 << 4;
        /// Values of the entry's bits that are free for the guest (upper 16 bits of the word).
        const GUEST_AVAIL = 0xffff << 16;
    }
}

/// Argument of `map_grant_ref`, a list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabMapGrantRef {
    /// IN: virtual address of the page, or machine address of its entry.
    pub host_addr: u64,
    /// IN: [`MapFlags`].
    pub flags: u32,
    /// IN: whose entry: which.
    pub gref: GrantRef,
    /// IN: whose.
    pub dom: DomId,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// OUT: names the mapping.
    pub handle: u32,
    /// OUT: the machine address.
    pub dev_bus_addr: MachAddr,
}

/// Argument of `unmap_grant_ref`, a list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabUnmapGrantRef {
    /// IN: as mapped; 0 leaves the CPU's mapping.
    pub host_addr: u64,
    /// IN: as given back; 0 leaves the device's mapping.
    pub dev_bus_addr: MachAddr,
    /// IN: the mapping.
    pub handle: u32,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad0: u16,
}

/// Argument of `setup_table`, exactly one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabSetupTable {
    /// IN: whose.
    pub dom: DomId,
    /// Padding.
    pub pad0: u16,
    /// IN: frames the table shall have.
    pub nr_frames: u32,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad1: [u16; 3],
    /// OUT: the frames.
    pub frame_list: GuestHandle<Mfn>,
}

/// Argument of `dump_table`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabDumpTable {
    /// IN: whose.
    pub dom: DomId,
    /// OUT: `GNTST_*`.
    pub status: i16,
}

/// Argument of `transfer`, a list: a frame given to a domain that has an entry for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabTransfer {
    /// IN: the frame.
    pub mfn: Mfn,
    /// IN: to whom.
    pub domid: DomId,
    /// Padding.
    pub pad0: u16,
    /// IN: into which entry.
    pub gref: GrantRef,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad1: [u16; 3],
}

/// Flag of [`GnttabCopy`]: the source is an entry, not a frame.
pub const GNTCOPY_SOURCE_GREF: u16 = 1 << 0;
/// Flag of [`GnttabCopy`]: the destination is an entry, not a frame.
pub const GNTCOPY_DEST_GREF: u16 = 1 << 1;

/// One side of a copy (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabCopyPtr {
    /// A machine frame, or a grant reference in the low half (the upper half is not looked at).
    pub u: u64,
    /// Whose.
    pub domid: DomId,
    /// First byte in the page.
    pub offset: u16,
    /// Padding.
    pub pad0: u32,
}

impl GnttabCopyPtr {
    /// A place in a granted page.
    #[must_use]
    pub const fn granted(gref: GrantRef, domid: DomId, offset: u16) -> Self {
        GnttabCopyPtr { u: gref.get() as u64, domid, offset, pad0: 0 }
    }

    /// A place in a frame of the caller's own.
    #[must_use]
    pub const fn own(mfn: Mfn, offset: u16) -> Self {
        GnttabCopyPtr { u: mfn.get(), domid: DomId::SELF, offset, pad0: 0 }
    }

    /// The entry, when the flags say that it is one.
    #[must_use]
    pub const fn gref(&self) -> GrantRef {
        GrantRef::new(self.u as u32)
    }

    /// The frame, otherwise.
    #[must_use]
    pub const fn mfn(&self) -> Mfn {
        Mfn::new(self.u)
    }
}

/// Argument of `copy`, a list. Neither side may cross the end of its page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabCopy {
    /// IN: from.
    pub source: GnttabCopyPtr,
    /// IN: to.
    pub dest: GnttabCopyPtr,
    /// IN: bytes.
    pub len: u16,
    /// IN: `GNTCOPY_*`.
    pub flags: u16,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad0: u16,
}

/// Argument of `query_size`, exactly one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabQuerySize {
    /// IN: whose.
    pub dom: DomId,
    /// Padding.
    pub pad0: u16,
    /// OUT: frames it has.
    pub nr_frames: u32,
    /// OUT: frames it may have.
    pub max_nr_frames: u32,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad1: u16,
}

/// Argument of `unmap_and_replace`, a list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabUnmapAndReplace {
    /// IN: as mapped.
    pub host_addr: u64,
    /// IN: virtual address whose mapping moves there; its own entry becomes empty.
    pub new_addr: u64,
    /// IN: the mapping.
    pub handle: u32,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad0: u16,
}

/// Argument of `set_version` (IN/OUT).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabSetVersion {
    /// 1 or 2; OUT: what it is now.
    pub version: u32,
}

/// Argument of `get_status_frames`, exactly one; version 2 only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabGetStatusFrames {
    /// IN: frames wanted.
    pub nr_frames: u32,
    /// IN: whose.
    pub dom: DomId,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// OUT: the frames.
    pub frame_list: GuestHandle<u64>,
}

/// Argument of `get_version`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabGetVersion {
    /// IN: whose.
    pub dom: DomId,
    /// Padding.
    pub pad: u16,
    /// OUT: 1 or 2.
    pub version: u32,
}

/// Argument of `swap_grant_ref`, a list; neither entry may be in use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabSwapGrantRef {
    /// IN: one.
    pub ref_a: GrantRef,
    /// IN: the other.
    pub ref_b: GrantRef,
    /// OUT: `GNTST_*`.
    pub status: i16,
    /// Padding.
    pub pad0: u16,
}

/// Operation of [`GnttabCacheFlush`]: write back.
pub const GNTTAB_CACHE_CLEAN: u32 = 1 << 0;
/// Drop.
pub const GNTTAB_CACHE_INVAL: u32 = 1 << 1;
/// The range is named by an entry, not by an address.
pub const GNTTAB_CACHE_SOURCE_GREF: u32 = 1 << 31;

/// Argument of `cache_flush` (IN), a list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GnttabCacheFlush {
    /// A machine address, or a grant reference in the low half.
    pub a: u64,
    /// First byte.
    pub offset: u16,
    /// Bytes.
    pub length: u16,
    /// `GNTTAB_CACHE_*`.
    pub op: u32,
}

/// Status of a grant operation: done.
pub const GNTST_OKAY: i16 = 0;
/// Something else went wrong.
pub const GNTST_GENERAL_ERROR: i16 = -1;
/// No such domain.
pub const GNTST_BAD_DOMAIN: i16 = -2;
/// No such entry, or not one for this.
pub const GNTST_BAD_GNTREF: i16 = -3;
/// No such mapping, or not one for this.
pub const GNTST_BAD_HANDLE: i16 = -4;
/// Nothing can be mapped at this address.
pub const GNTST_BAD_VIRT_ADDR: i16 = -5;
/// Not the address that the mapping has for devices.
pub const GNTST_BAD_DEV_ADDR: i16 = -6;
/// No room in the I/O page tables.
pub const GNTST_NO_DEVICE_SPACE: i16 = -7;
/// Not granted.
pub const GNTST_PERMISSION_DENIED: i16 = -8;
/// Not a frame for this.
pub const GNTST_BAD_PAGE: i16 = -9;
/// A copy crosses the end of a page or of what was granted.
pub const GNTST_BAD_COPY_ARG: i16 = -10;
/// The receiver cannot hold a frame with so large a number.
pub const GNTST_ADDRESS_TOO_BIG: i16 = -11;
/// Try again.
pub const GNTST_EAGAIN: i16 = -12;
/// The caller's limit of mappings or frames is reached.
pub const GNTST_NO_SPACE: i16 = -13;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_the_low_bits() {
        assert_eq!((GrantFlags::PERMIT_ACCESS | GrantFlags::READONLY).kind(), GTF_PERMIT_ACCESS);
        assert_eq!(GrantFlags::from_bits_retain(0xfff8).kind(), GTF_INVALID);
        assert_eq!(GrantFlags::TRANSITIVE.kind(), GTF_TRANSITIVE);
    }

    #[test]
    fn copy_sides_ignore_the_upper_half_of_a_reference() {
        let side = GnttabCopyPtr { u: 0xdead_0000_0000_0005, ..Default::default() };
        assert_eq!(side.gref(), GrantRef::new(5));
    }
}

//! Block devices (public/io/blkif.h), with the layout of 64-bit guests ("x86_64-abi").

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::GrantRef;

/// Segments in one request.
pub const MAX_SEGMENTS_PER_REQUEST: usize = 11;
/// Pages of segments in one indirect request.
pub const MAX_INDIRECT_PAGES_PER_REQUEST: usize = 8;
/// Bytes of a sector in this protocol, whatever the device's own.
pub const SECTOR_SIZE: usize = 512;
/// Bytes of a slot in the ring: the largest request.
pub const SLOT_SIZE: usize = size_of::<BlkifRequest>();

crate::subops::command_enum! {
    /// What a request asks for.
    BlkifOp, "BLKIF_OP_" {
        /// Reads sectors.
        Read = 0, "READ";
        /// Writes sectors.
        Write = 1, "WRITE";
        /// Writes sectors after everything before and before everything after; optional.
        WriteBarrier = 2, "WRITE_BARRIER";
        /// Makes what was written durable; optional.
        FlushDiskcache = 3, "FLUSH_DISKCACHE";
        /// Nobody's.
        Reserved1 = 4, "RESERVED_1";
        /// Forgets sectors; optional.
        Discard = 5, "DISCARD";
        /// Reads or writes with the segments in pages of their own; optional.
        Indirect = 6, "INDIRECT";
    }
}

/// A piece of a granted page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BlkifSegment {
    /// The page.
    pub gref: GrantRef,
    /// First sector in it.
    pub first_sect: u8,
    /// Last sector in it, at most 7.
    pub last_sect: u8,
    /// Padding.
    pub pad0: u16,
}

/// A request for reading, writing or flushing. Written by the front end; the back end copies it out and trusts nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BlkifRequest {
    /// Number of a [`BlkifOp`].
    pub operation: u8,
    /// Segments in use.
    pub nr_segments: u8,
    /// The device.
    pub handle: u16,
    /// Padding.
    pub pad0: u32,
    /// Given back in the response.
    pub id: u64,
    /// First sector on the device.
    pub sector_number: u64,
    /// The segments.
    pub seg: [BlkifSegment; MAX_SEGMENTS_PER_REQUEST],
}

/// Flag of [`BlkifRequestDiscard`]: nobody shall find the data again.
pub const DISCARD_SECURE: u8 = 1 << 0;

/// A request for forgetting sectors.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BlkifRequestDiscard {
    /// [`BlkifOp::Discard`].
    pub operation: u8,
    /// [`DISCARD_SECURE`] or 0.
    pub flag: u8,
    /// The device.
    pub handle: u16,
    /// Padding.
    pub pad0: u32,
    /// Given back in the response.
    pub id: u64,
    /// First sector.
    pub sector_number: u64,
    /// How many.
    pub nr_sectors: u64,
}

/// A request whose segments are in pages of their own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BlkifRequestIndirect {
    /// [`BlkifOp::Indirect`].
    pub operation: u8,
    /// [`BlkifOp::Read`] or [`BlkifOp::Write`].
    pub indirect_op: u8,
    /// Segments in those pages.
    pub nr_segments: u16,
    /// Padding.
    pub pad0: u32,
    /// Given back in the response.
    pub id: u64,
    /// First sector on the device.
    pub sector_number: u64,
    /// The device.
    pub handle: u16,
    /// Padding.
    pub pad1: u16,
    /// The pages.
    pub indirect_grefs: [GrantRef; MAX_INDIRECT_PAGES_PER_REQUEST],
    /// Padding.
    pub pad2: u32,
}

/// A response.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BlkifResponse {
    /// The request's.
    pub id: u64,
    /// The request's.
    pub operation: u8,
    /// Padding.
    pub pad0: u8,
    /// `RSP_*`.
    pub status: i16,
    /// Padding.
    pub pad1: u32,
}

/// Done.
pub const RSP_OKAY: i16 = 0;
/// Failed.
pub const RSP_ERROR: i16 = -1;
/// Not offered.
pub const RSP_EOPNOTSUPP: i16 = -2;

/// Bit of the back end's `info` node: a CD.
pub const VDISK_CDROM: u32 = 1;
/// Removable.
pub const VDISK_REMOVABLE: u32 = 2;
/// Read only.
pub const VDISK_READONLY: u32 = 4;

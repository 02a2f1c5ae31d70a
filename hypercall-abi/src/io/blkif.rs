//! Block devices (public/io/blkif.h), with the layout of 64-bit guests ("x86_64-abi").
//!
//! Responses come in any order and name their requests by `id`. A request's segments may each be any run of sectors of a page
//! ([`BlkifSegment::sectors`]). An *indirect* request puts them into pages of [`SEGMENTS_PER_INDIRECT_PAGE`], up to as many as the
//! back end's [`keys::MAX_INDIRECT_SEGMENTS`] says. With *persistent* grants on both sides ([`keys::PERSISTENT`]) the back end
//! keeps pages mapped, and the front end uses the same references again and again without revoking them. Optional operations
//! that a back end does not have are answered [`RSP_EOPNOTSUPP`]; a flush has no segments, or, in older front ends, writes one first.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::GrantRef;

/// Names of nodes in xenstore; the back end's unless said otherwise.
pub mod keys {
    /// Size of the device, in sectors of [`SECTOR_SIZE`](super::SECTOR_SIZE).
    pub const SECTORS: &str = "sectors";
    /// Bytes of the device's own sector: requests are multiples of it.
    pub const SECTOR_SIZE: &str = "sector-size";
    /// Bytes of its physical sector.
    pub const PHYSICAL_SECTOR_SIZE: &str = "physical-sector-size";
    /// `VDISK_*` bits.
    pub const INFO: &str = "info";
    /// [`WriteBarrier`](super::BlkifOp::WriteBarrier) is there.
    pub const BARRIER: &str = "feature-barrier";
    /// [`FlushDiskcache`](super::BlkifOp::FlushDiskcache) is there.
    pub const FLUSH_CACHE: &str = "feature-flush-cache";
    /// [`Discard`](super::BlkifOp::Discard) is there.
    pub const DISCARD: &str = "feature-discard";
    /// Bytes that are forgotten at least together.
    pub const DISCARD_GRANULARITY: &str = "discard-granularity";
    /// Bytes by which the first such unit is shifted.
    pub const DISCARD_ALIGNMENT: &str = "discard-alignment";
    /// [`DISCARD_SECURE`](super::DISCARD_SECURE) is obeyed.
    pub const DISCARD_SECURE: &str = "discard-secure";
    /// Grants may stay mapped; both sides.
    pub const PERSISTENT: &str = "feature-persistent";
    /// Most segments of an indirect request.
    pub const MAX_INDIRECT_SEGMENTS: &str = "feature-max-indirect-segments";
    /// Most pages of the ring, as a power of two.
    pub const MAX_RING_PAGE_ORDER: &str = "max-ring-page-order";
    /// Pages of the ring; front end.
    pub const RING_PAGE_ORDER: &str = "ring-page-order";
    /// Most rings.
    pub const MAX_QUEUES: &str = "multi-queue-max-queues";
    /// Rings in use; front end.
    pub const NUM_QUEUES: &str = "multi-queue-num-queues";
    /// `x86_64-abi`, [`ABI`](super::ABI): the layout of the ring; front end.
    pub const PROTOCOL: &str = "protocol";
}

/// The layout of the ring of 64-bit guests.
pub const ABI: &str = "x86_64-abi";

/// Segments in one request.
pub const MAX_SEGMENTS_PER_REQUEST: usize = 11;
/// Pages of segments in one indirect request.
pub const MAX_INDIRECT_PAGES_PER_REQUEST: usize = 8;
/// Segments in one page of an indirect request.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = crate::PAGE_SIZE / size_of::<BlkifSegment>();
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

impl BlkifSegment {
    /// How many sectors it is; `None` when they are no part of a page: the request is bad.
    #[must_use]
    pub const fn sectors(&self) -> Option<u32> {
        if self.first_sect > self.last_sect || self.last_sect as usize >= crate::PAGE_SIZE / SECTOR_SIZE {
            return None;
        }
        Some((self.last_sect - self.first_sect) as u32 + 1)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_runs_of_a_page() {
        let sectors =
            |first_sect, last_sect| BlkifSegment { first_sect, last_sect, ..Default::default() }.sectors();
        assert_eq!((sectors(0, 7), sectors(3, 3), sectors(2, 4)), (Some(8), Some(1), Some(3)));
        assert_eq!((sectors(4, 3), sectors(0, 8), sectors(255, 255)), (None, None, None));
    }

    #[test]
    fn a_page_holds_whole_segments() {
        assert_eq!(SEGMENTS_PER_INDIRECT_PAGE, 512);
        assert_eq!(MAX_INDIRECT_PAGES_PER_REQUEST * SEGMENTS_PER_INDIRECT_PAGE, 4096);
    }
}

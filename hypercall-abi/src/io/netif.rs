//! Network devices (public/io/netif.h): a ring for each direction.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::GrantRef;

/// Largest packet.
pub const MAX_TX_SIZE: usize = 0xffff;
/// Bytes of a slot in the ring of what the guest sends.
pub const TX_SLOT_SIZE: usize = size_of::<NetifTxRequest>();
/// Bytes of a slot in the ring of what it receives.
pub const RX_SLOT_SIZE: usize = size_of::<NetifRxResponse>();

bitflags! {
    /// Flags of [`NetifTxRequest`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct TxFlags: u16 {
        /// The checksum is to be filled in.
        const CSUM_BLANK = 1 << 0;
        /// The checksum was checked.
        const DATA_VALIDATED = 1 << 1;
        /// The packet goes on in the next request.
        const MORE_DATA = 1 << 2;
        /// A [`NetifExtraInfo`] follows in the next slot.
        const EXTRA_INFO = 1 << 3;
    }
}

bitflags! {
    /// Flags of [`NetifRxResponse`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RxFlags: u16 {
        /// The checksum was checked.
        const DATA_VALIDATED = 1 << 0;
        /// The checksum is not filled in.
        const CSUM_BLANK = 1 << 1;
        /// The packet goes on in the next response.
        const MORE_DATA = 1 << 2;
        /// A [`NetifExtraInfo`] follows in the next slot.
        const EXTRA_INFO = 1 << 3;
        /// Old form of segmentation.
        const GSO_PREFIX = 1 << 4;
    }
}

/// A piece of a packet to send. The first request of a packet has the whole packet's size, the others their own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NetifTxRequest {
    /// The page.
    pub gref: GrantRef,
    /// First byte in it.
    pub offset: u16,
    /// [`TxFlags`].
    pub flags: u16,
    /// Given back in the response.
    pub id: u16,
    /// Bytes.
    pub size: u16,
}

/// The answer to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NetifTxResponse {
    /// The request's.
    pub id: u16,
    /// `RSP_*`.
    pub status: i16,
}

/// A page to receive into.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NetifRxRequest {
    /// Given back in the response.
    pub id: u16,
    /// Padding.
    pub pad: u16,
    /// The page.
    pub gref: GrantRef,
}

/// A piece of a received packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NetifRxResponse {
    /// The request's.
    pub id: u16,
    /// First byte in the page.
    pub offset: u16,
    /// [`RxFlags`].
    pub flags: u16,
    /// Bytes, or `RSP_*` below 0.
    pub status: i16,
}

/// More about a packet, in a slot of its own; its content depends on the type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NetifExtraInfo {
    /// `EXTRA_TYPE_*`.
    pub kind: u8,
    /// [`EXTRA_FLAG_MORE`] or 0.
    pub flags: u8,
    /// Segmentation: size of a segment, kind, features. Multicast: the address.
    pub u: [u16; 3],
}

/// Segmentation.
pub const EXTRA_TYPE_GSO: u8 = 1;
/// Wants a multicast address.
pub const EXTRA_TYPE_MCAST_ADD: u8 = 2;
/// No longer wants it.
pub const EXTRA_TYPE_MCAST_DEL: u8 = 3;
/// Hash of the packet.
pub const EXTRA_TYPE_HASH: u8 = 4;
/// Another one follows.
pub const EXTRA_FLAG_MORE: u8 = 1 << 0;
/// Segments of TCP over IPv4.
pub const GSO_TYPE_TCPV4: u8 = 1;
/// Segments of TCP over IPv6.
pub const GSO_TYPE_TCPV6: u8 = 2;

/// Dropped.
pub const RSP_DROPPED: i16 = -2;
/// Failed.
pub const RSP_ERROR: i16 = -1;
/// Done.
pub const RSP_OKAY: i16 = 0;
/// The slot was a [`NetifExtraInfo`].
pub const RSP_NULL: i16 = 1;

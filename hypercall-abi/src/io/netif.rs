//! Network devices (public/io/netif.h): a ring for each direction, and one for control.
//!
//! A packet is one or more slots: the first request to send says the whole packet's size, every piece but the last has
//! `MORE_DATA`. Behind the *first* slot, when it has `EXTRA_INFO`, come slots that are [`NetifExtraInfo`] instead, as long as each
//! has [`EXTRA_FLAG_MORE`]; in the ring of what is sent each is answered with [`RSP_NULL`]. A packet takes up to
//! [`NR_SLOTS_MIN`] slots everywhere; more only where the other side said so.
//!
//! Queues: a back end writes [`keys::MAX_QUEUES`], a front end that wants several writes [`keys::NUM_QUEUES`] and puts the nodes of
//! each ring (`tx-ring-ref`, `rx-ring-ref`, `event-channel` or `event-channel-tx` and `event-channel-rx`) under `queue-N`.
//! The control ring, for steering by hash, has [`CONTROL_SLOT_SIZE`] slots in one page; requests are answered in order.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::GrantRef;

/// Names of nodes in xenstore, the same in both halves' directories unless said otherwise.
pub mod keys {
    /// Packets of several slots are understood.
    pub const SG: &str = "feature-sg";
    /// Segmentation of TCP over IPv4 is understood.
    pub const GSO_TCPV4: &str = "feature-gso-tcpv4";
    /// Segmentation of TCP over IPv6 is understood.
    pub const GSO_TCPV6: &str = "feature-gso-tcpv6";
    /// Checksums of TCP and UDP over IPv4 must be there.
    pub const NO_CSUM_OFFLOAD: &str = "feature-no-csum-offload";
    /// Checksums of TCP and UDP over IPv6 may be left out.
    pub const IPV6_CSUM_OFFLOAD: &str = "feature-ipv6-csum-offload";
    /// The front end notifies of each request to receive into.
    pub const RX_NOTIFY: &str = "feature-rx-notify";
    /// The front end receives by copies; back ends know no other way.
    pub const RX_COPY: &str = "request-rx-copy";
    /// A port for each direction.
    pub const SPLIT_EVENT_CHANNELS: &str = "feature-split-event-channels";
    /// The back end filters multicast by the addresses that it is told.
    pub const MULTICAST_CONTROL: &str = "feature-multicast-control";
    /// The front end wants that.
    pub const REQUEST_MULTICAST_CONTROL: &str = "request-multicast-control";
    /// Most queues; back end.
    pub const MAX_QUEUES: &str = "multi-queue-max-queues";
    /// Queues in use; front end.
    pub const NUM_QUEUES: &str = "multi-queue-num-queues";
    /// The back end serves a control ring.
    pub const CTRL_RING: &str = "feature-ctrl-ring";
    /// The control ring's page; front end.
    pub const CTRL_RING_REF: &str = "ctrl-ring-ref";
    /// Its port; front end.
    pub const CTRL_CHANNEL: &str = "event-channel-ctrl";
}

/// Slots of a packet that every back end takes.
pub const NR_SLOTS_MIN: usize = 18;
/// Largest packet.
pub const MAX_TX_SIZE: usize = 0xffff;
/// Bytes of a slot in the ring of what the guest sends.
pub const TX_SLOT_SIZE: usize = size_of::<NetifTxRequest>();
/// Bytes of a slot in the ring of what it receives.
pub const RX_SLOT_SIZE: usize = size_of::<NetifRxResponse>();
/// Bytes of a slot in the control ring.
pub const CONTROL_SLOT_SIZE: usize = size_of::<ControlRequest>();

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
    /// What the type says: see [`Extra`].
    pub u: [u16; 3],
}

/// What a [`NetifExtraInfo`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// The packet is to be cut into segments of so many bytes of payload, or was put together from such.
    Gso {
        /// Bytes of payload in a segment, not 0.
        size: u16,
        /// [`GSO_TYPE_TCPV4`] or [`GSO_TYPE_TCPV6`].
        kind: u8,
    },
    /// Send packets to this multicast address to the front end.
    McastAdd([u8; 6]),
    /// No longer.
    McastDel([u8; 6]),
    /// The packet's hash.
    Hash {
        /// Number of a bit of [`HashTypes`]: what the hash is over.
        kind: u8,
        /// `HASH_ALGORITHM_*`.
        algorithm: u8,
        /// The hash.
        value: [u8; 4],
    },
}

impl NetifExtraInfo {
    /// A slot that says it; `more` when another one follows.
    #[must_use]
    pub fn new(extra: Extra, more: bool) -> Self {
        let (kind, bytes) = match extra {
            Extra::Gso { size, kind } => {
                let [low, high] = size.to_le_bytes();
                (EXTRA_TYPE_GSO, [low, high, kind, 0, 0, 0])
            }
            Extra::McastAdd(address) => (EXTRA_TYPE_MCAST_ADD, address),
            Extra::McastDel(address) => (EXTRA_TYPE_MCAST_DEL, address),
            Extra::Hash { kind, algorithm, value: [a, b, c, d] } => {
                (EXTRA_TYPE_HASH, [kind, algorithm, a, b, c, d])
            }
        };
        NetifExtraInfo { kind, flags: u8::from(more) * EXTRA_FLAG_MORE, u: zerocopy::transmute!(bytes) }
    }

    /// What it says; `None` for a type of nobody, a segment size of 0, and segments of nobody's protocol: the packet is bad.
    #[must_use]
    pub fn extra(&self) -> Option<Extra> {
        let bytes: [u8; 6] = zerocopy::transmute!(self.u);
        let [a, b, c, d, e, f] = bytes;
        match self.kind {
            EXTRA_TYPE_GSO => {
                let size = u16::from_le_bytes([a, b]);
                (size != 0 && matches!(c, GSO_TYPE_TCPV4 | GSO_TYPE_TCPV6))
                    .then_some(Extra::Gso { size, kind: c })
            }
            EXTRA_TYPE_MCAST_ADD => Some(Extra::McastAdd(bytes)),
            EXTRA_TYPE_MCAST_DEL => Some(Extra::McastDel(bytes)),
            EXTRA_TYPE_HASH => Some(Extra::Hash { kind: a, algorithm: b, value: [c, d, e, f] }),
            _ => None,
        }
    }

    /// Whether another one follows.
    #[must_use]
    pub const fn more(&self) -> bool {
        self.flags & EXTRA_FLAG_MORE != 0
    }
}

bitflags! {
    /// What a hash is over: a bit for each kind of packet.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct HashTypes: u32 {
        /// Addresses of IPv4.
        const IPV4 = 1 << 0;
        /// Addresses and ports of TCP over IPv4.
        const IPV4_TCP = 1 << 1;
        /// Addresses of IPv6.
        const IPV6 = 1 << 2;
        /// Addresses and ports of TCP over IPv6.
        const IPV6_TCP = 1 << 3;
    }
}

/// No hash.
pub const HASH_ALGORITHM_NONE: u32 = 0;
/// Toeplitz.
pub const HASH_ALGORITHM_TOEPLITZ: u32 = 1;

crate::subops::command_enum! {
    /// Types of control messages.
    ControlType, "XEN_NETIF_CTRL_TYPE_" {
        /// None: refused.
        Invalid = 0, "INVALID";
        /// Which [`HashTypes`] the back end can do.
        GetHashFlags = 1, "GET_HASH_FLAGS";
        /// Which it shall do.
        SetHashFlags = 2, "SET_HASH_FLAGS";
        /// The key: a granted page and its length in bytes.
        SetHashKey = 3, "SET_HASH_KEY";
        /// Most entries of the table from hash to queue.
        GetHashMappingSize = 4, "GET_HASH_MAPPING_SIZE";
        /// How many entries it shall have.
        SetHashMappingSize = 5, "SET_HASH_MAPPING_SIZE";
        /// Entries: a granted page, how many, and the first one's index.
        SetHashMapping = 6, "SET_HASH_MAPPING";
        /// `HASH_ALGORITHM_*`.
        SetHashAlgorithm = 7, "SET_HASH_ALGORITHM";
        /// How many pages of a queue may stay mapped.
        GetGrefMappingSize = 8, "GET_GREF_MAPPING_SIZE";
        /// Maps pages for good: a queue, a granted page of [`ControlGref`], how many.
        AddGrefMapping = 9, "ADD_GREF_MAPPING";
        /// Unmaps them.
        DelGrefMapping = 10, "DEL_GREF_MAPPING";
    }
}

/// A request in the control ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControlRequest {
    /// Given back in the response.
    pub id: u16,
    /// Number of a [`ControlType`].
    pub kind: u16,
    /// What the type says; unused words are 0.
    pub data: [u32; 3],
}

/// The answer to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControlResponse {
    /// The request's.
    pub id: u16,
    /// The request's.
    pub kind: u16,
    /// `CTRL_STATUS_*`.
    pub status: u32,
    /// What was asked for.
    pub data: u32,
}

/// A page to keep mapped, in a list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControlGref {
    /// IN: the page.
    pub gref: GrantRef,
    /// IN: [`CTRL_GREF_READONLY`] or 0.
    pub flags: u16,
    /// OUT: `CTRL_STATUS_*`.
    pub status: u16,
}

/// Flag of [`ControlGref`]: the back end may only read it.
pub const CTRL_GREF_READONLY: u16 = 1 << 0;
/// Done.
pub const CTRL_STATUS_SUCCESS: u32 = 0;
/// Not offered.
pub const CTRL_STATUS_NOT_SUPPORTED: u32 = 1;
/// A value that cannot be.
pub const CTRL_STATUS_INVALID_PARAMETER: u32 = 2;
/// Too much for the back end.
pub const CTRL_STATUS_BUFFER_OVERFLOW: u32 = 3;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extras_round_trip() {
        for extra in [
            Extra::Gso { size: 1448, kind: GSO_TYPE_TCPV4 },
            Extra::Gso { size: 1, kind: GSO_TYPE_TCPV6 },
            Extra::McastAdd([1, 2, 3, 4, 5, 6]),
            Extra::McastDel([0x33, 0x33, 0, 0, 0, 1]),
            Extra::Hash { kind: 1, algorithm: 1, value: [9, 8, 7, 6] },
        ] {
            assert_eq!(NetifExtraInfo::new(extra, false).extra(), Some(extra));
            assert!(NetifExtraInfo::new(extra, true).more() && !NetifExtraInfo::new(extra, false).more());
        }
    }

    #[test]
    fn bad_extras_are_none() {
        let gso = NetifExtraInfo::new(Extra::Gso { size: 0, kind: GSO_TYPE_TCPV4 }, false);
        assert_eq!(gso.extra(), None, "a segment without bytes");
        let gso = NetifExtraInfo::new(Extra::Gso { size: 9, kind: 0 }, false);
        assert_eq!(gso.extra(), None, "segments of no protocol");
        for kind in [0, 5, 255] {
            assert_eq!(NetifExtraInfo { kind, flags: 0, u: [1; 3] }.extra(), None);
        }
    }
}

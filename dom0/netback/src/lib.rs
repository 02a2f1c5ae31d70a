//! The back end of network cards (public/io/netif.h) as a value: frames go from ring to ring through a switch, no I/O of its own.
//!
//! | I want to… | go to |
//! |---|---|
//! | take frames from a ring, checked | [`transmit`] |
//! | put frames into a ring | [`receive`] |
//! | keep pages of a guest's mapped | [`control`] |
//! | have bytes of guests copied | [`guest_sdk::copy`] |
//! | see it whole: cards, the switch between them, dom0's own ports | [`network`] |
//! | let guests out: routers, and cards of the machine's | [`fabric`] |
//!
//! A usual frame is read once and written once for each receiver: an operation of the hypervisor costs more than its copy. Of a long one
//! only the head is read, to decide where it goes, and the receiver gets that head, so that nobody gets another one than was decided on;
//! the rest is copied from the sender's pages into the receiver's. Who does not take what another sends (a packet to be cut into segments,
//! one without its checksum) gets it as it takes it.
//!
//! A front end is hostile until shown otherwise: a request is copied out of the ring once and decided on the copy. A bad frame is
//! answered with an error; a bad ring ends the connection. Who has no room for a frame gets it a little later, or not at all: nobody but its
//! sender waits, and that with a part of its ring.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod control;
pub mod fabric;
pub mod network;
pub mod receive;
pub mod transmit;

/// The front end broke a ring: nothing that it says counts any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl From<guest_sdk::ring::Corrupt> for Closed {
    fn from(_: guest_sdk::ring::Corrupt) -> Self {
        Self
    }
}

impl core::fmt::Display for Closed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("its ring has an index out of range, or ends within a packet")
    }
}

impl core::error::Error for Closed {}

/// What a front end did wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A packet of no bytes, of more slots than were agreed on, or whose pieces are not in their pages.
    Shape,
    /// Something beside the packet that was not agreed on.
    Extra,
    /// A page that is not granted so.
    Grant,
    /// A packet to be cut into segments that is no TCP over IPv4, or would be too many.
    Segments,
}

impl core::fmt::Display for Fault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Shape => "a packet whose pieces make no frame",
            Self::Extra => "a packet that asks for what was not offered",
            Self::Grant => "a page that it has not granted",
            Self::Segments => "a packet that cannot be cut into the segments that it says",
        })
    }
}

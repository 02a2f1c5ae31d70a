//! The software switch of a control domain: which port a frame goes to, and whether it may.
//!
//! Frames are somebody else's bytes and stay in somebody else's memory. Here is what is decided about them, as values without
//! I/O:
//!
//! | I want to… | go to |
//! |---|---|
//! | know where a frame goes | [`Switch`] |
//! | say what a port may send and get | [`Filter`] |
//! | limit how much it sends | [`Bucket`] |
//! | let guests reach the outside through one address, with DHCP and DNS | [`Router`] |
//! | get that address | [`Uplink`] |
//! | have both in one | [`Gateway`] |
//!
//! What a guest can make these keep is bounded: addresses learnt, connections in all and for each guest.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod filter;
mod frame;
mod gateway;
mod nat;
mod rate;
mod router;
mod segment;
mod switch;
mod uplink;

pub use filter::{Action, Direction, Filter, Protocol, Rule, RuleError};
pub use frame::{HEAD, checksum_place, complete_checksum};
pub use gateway::{Gateway, Place};
pub use nat::{Connection, Forward, Transport};
pub use rate::Bucket;
pub use router::{Checksum, Drops, ForwardError, LeaseError, Outside, Router, Side};
pub use segment::{MOST_SEGMENTS, SEGMENT_HEAD, Segments, flow_hash};
pub use smoltcp::wire::{EthernetAddress, Ipv4Address, Ipv4Cidr};
pub use switch::{AttachError, Counters, Port, PortId, Reason, Switch};
pub use uplink::Uplink;

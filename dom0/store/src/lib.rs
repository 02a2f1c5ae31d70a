//! xenstore: the tree of small values through which domains and their control domain find each other.
//!
//! This is the whole service as a value (Xen's docs/misc/xenstore.txt, public/io/xs_wire.h): [`Store::request`] takes a
//! message, [`Store::next_output`] gives what is to be sent. It does no I/O and issues no hypercall; whoever has rings and
//! sockets moves the bytes, with [`wire::Decoder`] to find the messages in them.
//!
//! The cost of a request does not depend on how many domains there are: nodes are in a tree of persistent maps, so that a
//! transaction's snapshot is one reference; watches are found by the path of what changed; each domain knows the nodes
//! that end with it.
//!
//! Every byte of a request is somebody else's. A client can hurt itself only: what it can make the store keep is bounded
//! by its [`Quota`].
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod error;
mod path;
mod permissions;
mod quota;
mod store;
pub mod trace;
mod transaction;
mod tree;
mod watches;
pub mod wire;

pub use error::Error;
pub use path::Path;
pub use permissions::{Access, Permission};
pub use quota::{Quota, Usage};
pub use store::{Action, ClientId, NewNode, Store};

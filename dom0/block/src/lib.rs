//! The back end of block devices (public/io/blkif.h) as a value: requests in, responses out, no I/O of its own.
//!
//! | I want to… | go to |
//! |---|---|
//! | know what a request may say | [`request`]: decoded from a copy, checked, nothing done yet |
//! | see a front end's pages mapped and kept | [`grants`] |
//! | put something else below | [`disk`]: the trait; [`memory`]: disks in memory |
//! | follow a ring from request to response | [`queue`] |
//! | see it whole | [`backend`] |
//!
//! A front end is hostile until shown otherwise. Its ring and its pages may change at any moment: a request is copied out once and
//! decided on the copy, and so is a list of indirect segments; what it claims about a ring's indices is checked against what the ring
//! can hold. A bad request is answered with an error. A bad ring ends the connection ([`queue::Closed`]).
//! Neither says more than once what was wrong ([`request::Fault`]).
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod backend;
pub mod disk;
pub mod grants;
pub mod memory;
pub mod queue;
pub mod request;

pub use backend::{Backend, Turn};

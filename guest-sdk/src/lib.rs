//! Write 64-bit Xen PV guests in safe Rust: for Xenolith and for Xen itself.
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! use guest_sdk::{Domain, entry, println};
//!
//! #[entry]
//! fn main(domain: Domain) {
//!     println!("Hello from domain {}", domain.id());
//! }
//! ```
#![no_std]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod block;
pub mod compartment;
pub mod console;
#[cfg(feature = "control")]
pub mod control;
pub mod copy;
mod domain;
pub mod events;
pub mod executor;
pub mod grants;
#[cfg(feature = "control")]
pub mod hardware;
pub mod hypercall;
mod logger;
pub mod memory;
pub mod net;
pub mod ring;
pub mod rt;
pub mod shutdown;
pub mod sync;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod time;
pub mod user;
pub mod vcpu;
#[cfg(feature = "control")]
pub mod xen_control;
pub mod xenbus;
pub mod xenstore;

pub use domain::{CommandLine, Domain, id};
pub use guest_sdk_macros::entry;
pub use hypercall_abi as abi;
pub use log;

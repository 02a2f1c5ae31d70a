//! Builds 64-bit PV domains from ELF kernels with Xen notes.
//!
//! One builder for all who build domains: the hypervisor for the initial domain, the initial domain for the others.
//! [`Kernel::parse`] checks an image, [`Layout::plan`] says where everything
//! goes, [`Builder`] fills the memory page by page through a [`BuildTarget`], and [`Built`] has the first vCPU's state.

#![no_std]
#![forbid(unsafe_code)]

mod build;
mod error;
mod image;
mod layout;
mod notes;
mod tables;

pub use build::{BuildTarget, Builder, Built, Parameters};
pub use error::{ImageError, Quote};
pub use image::{Kernel, Role, Segment, elf_end};
pub use layout::{Extent, Layout, LayoutError, ModulePlace, RingPages};
pub use notes::{Notes, OFFERED_FEATURES};

/// Bytes in a page of the x86 architecture.
pub(crate) const PAGE_SIZE: u64 = hypercall_abi::PAGE_SIZE as u64;

/// The page border at or below `address`.
pub(crate) const fn page_down(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

/// The page border at or above `address`, if there is one below 2^64.
pub(crate) fn page_up(address: u64) -> Option<u64> {
    address.checked_next_multiple_of(PAGE_SIZE)
}

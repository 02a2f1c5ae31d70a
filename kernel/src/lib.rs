//! Xenolith's hypervisor: policy as safe code over the seam [`platform::Platform`], mechanism in `arch`.
//!
//! A tour from reset to idle: `arch::x86_64::boot` reaches long mode and fills the machine's description; `main.rs` makes the
//! one [`hypervisor::Hypervisor`], builds dom0 ([`build_dom`]) and calls [`Hypervisor::prepare_resume`]. From then on every
//! entry (hypercall, exception, interrupt) comes through `arch::x86_64::entry`, does its work and ends in `prepare_resume`,
//! which fires timers, chooses the vCPU to run, delivers its events, or idles. `docs/book/src/tour.md` has it function by
//! function, and walks through a hypercall, a page-table update and an event.
//!
//! [`Hypervisor::prepare_resume`]: hypervisor::Hypervisor::prepare_resume
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod access;
pub mod build_dom;
pub mod cmdline;
pub mod domain;
pub mod evtchn;
pub mod grant;
pub mod hypercall;
pub mod hypervisor;
pub mod log;
pub mod mm;
pub mod page_ref;
pub mod platform;
pub mod sched;
pub mod symbols;
pub mod sync;
pub mod time;
pub mod trap;
pub mod watchdog;
pub mod x86;

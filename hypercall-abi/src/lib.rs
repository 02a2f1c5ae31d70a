//! Xen's 64-bit PV ABI: the contract between the hypervisor and its guests.
//!
//! Hypercalls take their number in rax and up to six arguments in rdi, rsi, rdx, r10, r8 and r9; the result is in rax, an error
//! as the negative of an [`Errno`]. rcx and r11 are lost by SYSCALL; all other registers are kept. A pointer argument is a
//! virtual address of the caller ([`GuestHandle`]).
//!
//! Layouts and numbers are those of Xen's public headers; `layout.rs` asserts every size and offset, and `tests/abi-layout`
//! compares them with the C headers. `IN` marks what the caller fills in, `OUT` what the hypervisor does.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod errno;
mod frames;
mod handle;
mod ids;

pub use errno::Errno;
pub use frames::{Gfn, MachAddr, Mfn, PAGE_SHIFT, PAGE_SIZE, Pfn, VirtAddr};
pub use handle::GuestHandle;
pub use ids::{DomId, GrantRef, Port, VcpuId, Virq};

mod hypercalls;
mod layout;
pub mod subops;
pub mod table;

pub use hypercalls::{HYPERCALL_PAGE_STUBS, HYPERCALL_STUB_SIZE, Hypercall};
pub use table::Caller;

pub mod callback;
pub mod constant_answers;
#[cfg(feature = "control")]
pub mod control;
pub mod elfnote;
pub mod evtchn;
pub mod grant;
pub mod hvm;
pub mod io;
pub mod memory;
pub mod mmu;
pub mod nmi;
pub mod physdev;
pub mod platform;
pub mod sched;
pub mod segment;
pub mod shared_info;
pub mod start_info;
pub mod time;
pub mod vcpu;
pub mod version;
#[cfg(feature = "control")]
pub mod xen_control;
pub mod xen_header;

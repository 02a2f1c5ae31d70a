//! Hypercalls: from the saved registers of a vCPU to an answer in rax.
//!
//! Each hypercall is a function `(&Hypervisor<P>, &mut Current, args) -> HcResult` in a file of its own that reads: decode
//! (copy the arguments in, once), check (change nothing), act (cannot fail on arguments). Long ones do one unit, store their
//! progress where a restart finds it, and ask their [`Budget`]; out of budget they return [`Exit::Preempted`] with the
//! arguments to go on with, and the guest's SYSCALL instruction is executed again.
#![forbid(unsafe_code)]

mod administration;
mod budget;
mod console_io;
mod dispatch;
mod domctl;
pub mod event_channel_op;
#[cfg(test)]
mod fuzz;
pub mod grant_table_op;
mod guest_memory;
mod hvm;
mod iret;
pub mod memory_op;
mod memory_resource;
pub mod mmu_update;
pub mod mmuext_op;
mod multicall;
mod page;
mod physdev_op;
mod registers;
mod sched_op;
mod segments;
mod set_timer_op;
#[cfg(test)]
pub(crate) mod tests;
mod traps;
pub mod update_va_mapping;
mod vcpu_op;
mod xen_version;

pub use budget::{Budget, Preempted};
pub use dispatch::{dispatch, hypercall};
pub use page::write_hypercall_page;

use crate::domain::DomainError;
use hypercall_abi::Errno;

/// Arguments of a hypercall as the guest passed them: rdi, rsi, rdx, r10, r8, r9.
pub type Args = [u64; 6];

/// How a hypercall ends other than with a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An error number for the guest.
    Errno(Errno),
    /// Stopped between two steps: to be executed again with these arguments.
    Preempted(Args),
    /// The registers were replaced (iret): rax is not a result.
    RegistersReplaced,
    /// The domain's state is past repair: crash it.
    Crash(&'static str),
}

impl From<Errno> for Exit {
    fn from(errno: Errno) -> Exit {
        Exit::Errno(errno)
    }
}

impl From<DomainError> for Errno {
    fn from(error: DomainError) -> Errno {
        match error {
            DomainError::Invalid => Errno::EINVAL,
            DomainError::Exists => Errno::EEXIST,
            DomainError::NoneFree => Errno::ENOSPC,
            DomainError::NoNumber => Errno::ENFILE,
            DomainError::NoCpu => Errno::ENOSPC,
            DomainError::NoMemory => Errno::ENOMEM,
            DomainError::Busy => Errno::EBUSY,
            DomainError::NotAllowed => Errno::EPERM,
            DomainError::TooOften => Errno::EOVERFLOW,
            DomainError::BadPlace => Errno::ENXIO,
        }
    }
}

impl From<DomainError> for Exit {
    fn from(error: DomainError) -> Exit {
        Exit::Errno(error.into())
    }
}

/// The result of a hypercall: what rax gets, or how else it ends.
pub type HcResult = Result<u64, Exit>;

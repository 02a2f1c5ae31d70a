//! What can be wrong with a request about a domain or a vCPU.

use core::fmt;

/// Why a request about a domain was refused. Each is the caller's fault but [`DomainError::NoMemory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainError {
    /// An argument is out of range, or names what is not the domain's.
    Invalid,
    /// It is there already.
    Exists,
    /// All of its kind are taken.
    NoneFree,
    /// All domain numbers are taken.
    NoNumber,
    /// Fewer CPUs are free than it has vCPUs, each of which is to have one for itself.
    NoCpu,
    /// The machine has no memory for the records of it.
    NoMemory,
    /// The vCPU runs now.
    Busy,
    /// The caller lacks the right.
    NotAllowed,
    /// A count is at its end.
    TooOften,
    /// A structure is misaligned or crosses a page.
    BadPlace,
}

impl fmt::Display for DomainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DomainError::Invalid => "an argument is out of range",
            DomainError::Exists => "it exists already",
            DomainError::NoneFree => "all of its kind are taken",
            DomainError::NoNumber => "all domain numbers are taken",
            DomainError::NoCpu => "fewer CPUs are free than it has vCPUs, and with sched=null each has one",
            DomainError::NoMemory => "out of memory",
            DomainError::Busy => "the vCPU is running",
            DomainError::NotAllowed => "not allowed",
            DomainError::TooOften => "it was done too often",
            DomainError::BadPlace => "misaligned, or across a page",
        })
    }
}

//! Event channels: numbered one-bit signals between domains, and from the hypervisor and devices to domains.
//!
//! # Model
//! Each domain has a table of *ports* ([`PortTable`]). A port is free, or bound to one source of events: a port of another
//! domain, a virtual interrupt, another vCPU of the same domain, an interrupt pin. An event is one bit, *pending*, in memory
//! that the hypervisor shares with the guest; events of one port that come before the guest looks are one event.
//!
//! # Invariants
//! 1. Peers are symmetric: port `p` of `A` is [`PortState::Interdomain`] to port `q` of `B` exactly if `q` of `B` is to `p`
//!    of `A`. Both change under both table locks.
//! 2. A virtual interrupt of a vCPU is bound to at most one port, and `Vcpu::virq_port` names it; a pin is bound to at most
//!    one port of one domain, and [`IrqTable`] names it.
//! 3. A dying domain gets no new ports, and has none when its teardown is done; whoever was connected to one of them is
//!    *unbound* again, and its sends are dropped without an error.
//! 4. Ports live in whole frames taken when first needed, at most [`PortTable::FRAMES`] per domain. Nothing a guest asks for
//!    here moves or rehashes anything, and finding a free port is constant work.
//!
//! # Locks
//! Each table is behind its domain's `events` lock. Two are taken together, in the order of the domains' numbers, only to bind
//! or to close a pair. A send takes one after the other and never holds both: it reads the local port, lets go, and checks in
//! the peer's table that the two are still connected. If they are not, the channel was closed in between, and an event
//! that was sent to a closed channel is dropped: nobody can tell this from a close that came first.
//!
//! Delivery happens under the lock of the receiving table, so that a close cannot clear the pending bit of a port *before* an
//! event for its former user sets it.
#![forbid(unsafe_code)]

mod fifo;
#[cfg(test)]
mod interleavings;
mod irq;
#[cfg(all(loom, test))]
mod models;
mod ops;
mod port;
mod table;
#[cfg(test)]
pub(crate) mod tests;
pub mod two_level;

pub use irq::{IrqInfo, IrqStatus, IrqTable, PirqEoiMap};
pub use ops::Progress;
pub use port::{Entry, PortState, Queue};
pub use table::PortTable;

use hypercall_abi::Virq;

/// Why an operation on event channels is refused; nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The domain that was named does not exist.
    NoDomain,
    /// The vCPU that was named does not exist.
    NoVcpu,
    /// No such port, or in no state for this.
    BadPort,
    /// No such virtual interrupt or pin, or not for that vCPU.
    BadSource,
    /// The virtual interrupt or pin is bound to a port already.
    AlreadyBound,
    /// Another domain listens to the pin, or the hypervisor itself.
    PinInUse,
    /// The caller lacks the right.
    NotPermitted,
    /// All ports are taken.
    NoFreePort,
    /// No frame left for the port table.
    NoMemory,
    /// The domain is dying.
    Dying,
    /// A reset is under way already.
    ResetUnderWay,
    /// Ports were opened while a reset closed them.
    NotAllClosed,
    /// The domain has the two-level form.
    NotFifo,
    /// The domain has the two-level form, which knows no priorities.
    NoPriorities,
    /// The port is not open.
    NotOpen,
    /// No such priority.
    BadPriority,
    /// The page is not the domain's to write, or what is to lie in it does not fit there, or is somewhere else already.
    BadPage,
    /// The budget ended: ask again.
    Unfinished,
}

/// Whether a virtual interrupt belongs to the domain rather than to one vCPU: bound through vCPU 0 only (public/xen.h).
pub const fn is_global(virq: Virq) -> bool {
    !matches!(virq, Virq::TIMER | Virq::DEBUG | Virq::XENOPROF | Virq::XENPMU)
}

//! Frames, their owners and types, and page tables: what keeps domains apart.
//!
//! # The theory
//!
//! Guests own real page tables: the processor walks the very frames that a guest filled. So a guest may fill them with
//! whatever it likes, but never change them behind our back. Everything follows from five rules.
//!
//! 1. **Two counts.** Each frame has a *general count*: while it is above zero the frame keeps its owner. And it has a
//!    *kind* with a *type count*: while that is above zero the frame keeps its kind. The kinds that matter exclude each
//!    other: L1 to L4 page table, page of descriptors, writable. A frame that is mapped writable is *Writable*, so it is no
//!    page table; a page table can be mapped, but only read-only.
//! 2. **Who holds references.** A present L1 entry holds a general reference to the frame it maps, and if it allows writes
//!    a Writable reference. A present L2, L3 or L4 entry holds a general reference and a type reference to the table one
//!    level down. A pin, a vCPU's root, a GDT frame, a grant mapping hold theirs. Nothing else does: the counts of a frame
//!    can be computed from what refers to it, and the tests in `tests/model` do.
//! 3. **Entries are checked when the table becomes one.** The first reference of a table kind walks all 512 entries and
//!    takes the references they stand for; from then on every change of an entry goes through [`update`], which takes the
//!    references of the new entry before it gives up those of the old. When the last reference goes, the entries give
//!    theirs back. Writes by the guest itself fault (the table is mapped read-only) and come through the same door.
//! 4. **Stale translations count as rights.** A processor may use a translation until it is flushed. So a frame that
//!    changes its kind, or goes to another owner, waits for a flush after the last entry that allowed the old use has gone
//!    ([`tlb_debt`]).
//! 5. **Every walk can stop.** Tables are trees of up to 2^27 entries. A walk stops between two entries with its progress
//!    in the record of each table on its way ([`page_info`]), and the restarted hypercall, or anybody else, goes on there.
//!
//! The writable count is of L1 entries with WRITABLE, whatever the entries above allow: counting more exactly would mean
//! recounting whole tables when an upper entry changes. Rights of upper entries only ever restrict.
//!
//! *Linear* tables: an L4 entry may refer, read-only, to an L4 table (its own or another one) in place of an L3 table, and
//! likewise at L3 and L2. The guest then sees its tables as if they were data. A table's reference to itself is not
//! counted (it could never go), one to another table is a type reference like others. Cycles of those would keep tables
//! alive for ever, so a table that has linear entries is not itself the target of any.
//!
//! # Where things are
//!
//! * [`page_kind`], [`page_info`]: kinds, and the type word as a pure state machine.
//! * [`frames`]: all records, who owns what, what is free; quarantine and scrubbing.
//! * `firmware_ram`: what nobody has had since power-on.
//! * [`pte`]: bits a guest may set, and what it reads back.
//! * [`validate`]: tables becoming tables and ceasing to be. [`update`]: changes of single entries, pins, roots.
//! * [`tlb_debt`]: flushes owed. [`m2p`]: the table guests read.
//! * [`domain_memory`]: the hypervisor's doors: reservations, teardown.
//! * [`page_ref`](crate::page_ref): references as values.
#![forbid(unsafe_code)]

pub mod domain_memory;
mod firmware_ram;
pub mod frames;
pub mod m2p;
#[cfg(all(loom, test))]
mod models;
pub mod mutants;
pub mod page_info;
pub mod page_kind;
pub mod pte;
pub mod tlb_clock;
pub mod tlb_debt;
pub mod update;
pub mod validate;

#[cfg(test)]
mod tests;

pub use domain_memory::{AllocationError, Teardown};
pub use frames::{FrameRecord, MAX_ORDER, Memory, OverLimit, Owner, PageList};
pub use page_info::{Event, Failure, Refusal, Stamp, TypeWord};
pub use page_kind::{Kind, Level};
pub use pte::{Pte, PteFlags};
pub use tlb_clock::TlbClock;
pub use tlb_debt::TlbDebt;
pub use update::{Store, TakenEntry, Updated};
pub use validate::{MapRights, Pager, Stop, Unfinished};

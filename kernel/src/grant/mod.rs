//! Grant tables: one domain lets another use a frame, and takes it back when nobody uses it any more.
//!
//! # Model
//! A domain (the *granter*) writes entries into frames that it shares with the hypervisor: who may use which frame, and how
//! ([`entry`]). Another domain (the *user*) names the entry to have the frame mapped into its page tables, or copied. The
//! hypervisor keeps, for each entry, an *active entry* that the guest cannot see: how often the frame is in use now, in
//! four counts (by processors and by devices, reading and writing), by whom, and which frame that is. For each mapping the
//! user gets a *handle*, an index in its table of mappings.
//!
//! # Invariants
//! 1. The active entry, not the shared one, says which frame is in use: the guest may change the shared one at any time.
//! 2. While the counts of an active entry are not all zero it holds one general reference to its frame, so the frame keeps its
//!    owner, and the shared entry has READING set, and WRITING if a writing count is not zero (as far as the guest leaves
//!    these alone).
//! 3. A mapping in a page table holds the references of that page-table entry, as every entry does (`mm`): the guest may
//!    overwrite it by other means, and the counts of the frame stay right. A mapping for devices holds references of its own.
//! 4. The counts of all active entries are the mappings in all tables of handles, plus what copies, mappings and unmappings
//!    under way hold.
//! 5. READING and WRITING are taken back only after the TLB debt of the mapping is paid: a granter that sees an entry unused
//!    can rely on the frame being its own again. The frame of a mapping removed by other means than an unmapping stays marked
//!    until the user dies.
//! 6. A dying domain maps nothing, and nothing of it is mapped or copied; what others have mapped of it stays until they
//!    unmap it, and its active entries with it.
//! 7. An entry of a part of a page, or one that stands for another's entry, is never mapped. A copy through the latter holds both
//!    entries, each for the domain that may use it: no third one.
//! 8. A status frame goes back to the free frames only if nobody refers to it, and when no TLB can know it.
//!
//! # Memory
//! Everything lives in whole frames taken when first needed: a directory, up to [`MAX_FRAMES`] shared frames with two frames
//! of active entries each, for version 2 a status frame for each 8 of them, and up to [`MAX_MAPTRACK_FRAMES`] frames of handles.
//!
//! # Locks
//! A table is behind its domain's `grants` lock. **No two tables are locked together, and with one locked nobody waits for a TLB
//! flush or allocates** (docs/design/0042): who maps or unmaps first makes the handle his (*busy*: to everybody else it is
//! no handle), then counts the use in the granter's active entry, and works on frame and page table with nothing
//! locked. The counts hold the frame, the frame its owner, and a domain with entries in use stays registered.
#![forbid(unsafe_code)]

mod cache;
mod copy;
pub mod entry;
#[cfg(all(loom, test))]
mod models;
mod ops;
mod size;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod transfer;
mod version;

pub use cache::{FLUSH_SEARCH_UNIT, FlushRefused};
pub use copy::Copier;
pub use ops::{HostPte, Unmapping};
pub use table::{GrantTable, MAX_FRAMES, MAX_MAPPINGS, MAX_MAPTRACK_FRAMES, MAX_STATUS_FRAMES, Version};
pub use version::VersionRefused;

/// Frames of a grant table that the guest can map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// Those of the entries.
    Shared,
    /// Those of the marks of use, in version 2.
    Status,
}

/// Why an operation on grants is refused; nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No such entry, or flags that ask for nothing.
    BadReference,
    /// No such domain, or it is dying.
    BadDomain,
    /// No such mapping.
    BadHandle,
    /// The entry, the frame or the page-table entry does not allow it.
    Refused,
    /// Not the address that the mapping has for devices.
    BadDeviceAddress,
    /// The caller may not name that domain or frame.
    NotPermitted,
    /// The frame is not the granter's.
    BadPage,
    /// A copy crosses the end of a page.
    BadCopy,
    /// No handle is left, or no memory for one.
    NoSpace,
    /// The entry is in use.
    InUse,
}

/// What a domain's grants use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Frames of the shared table.
    pub table_frames: u32,
    /// Grants of others that it has mapped.
    pub mappings: u32,
    /// All frames of the hypervisor that serve its grants.
    pub frames: u32,
}

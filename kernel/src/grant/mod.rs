//! Grant tables.
#![forbid(unsafe_code)]

use hypercall_abi::{DomId, Errno, GrantRef, Mfn};

use crate::domain::Domain;
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// What a domain's grants use.
pub struct Usage {
    /// Frames of the shared table.
    pub table_frames: u32,
    /// Grants of others that it has mapped.
    pub mappings: u32,
    /// All frames of the hypervisor that serve its grants.
    pub frames: u32,
}

impl<P: Platform> Hypervisor<P> {
    /// What a domain's grants use.
    pub fn grant_usage(&self, _domain: &Domain) -> Usage {
        Usage { table_frames: 0, mappings: 0, frames: 0 }
    }
    /// Fills a reserved entry of a new domain's table.
    pub fn grant_seed(&self, _: &Domain, _: GrantRef, _: Mfn, _: DomId, _: bool) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// Ends all grants of a dying domain.
    pub fn tear_down_grants(&self, _: &Domain, _: &mut Budget) -> Result<(), Preempted> {
        Ok(())
    }
}

/// Grant table and mappings of a domain.
#[derive(Default)]
pub struct GrantTable {}

impl GrantTable {
    /// No grants.
    pub const fn new() -> GrantTable {
        GrantTable {}
    }
}

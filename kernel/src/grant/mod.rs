//! Grant tables.
#![forbid(unsafe_code)]

/// Grant table and mappings of a domain.
#[derive(Default)]
pub struct GrantTable {}

impl GrantTable {
    /// No grants.
    pub const fn new() -> GrantTable {
        GrantTable {}
    }
}

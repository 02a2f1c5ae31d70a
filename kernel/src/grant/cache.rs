//! `cache_flush`: writing back what caches hold of a frame, for devices that do not look into them.

use hypercall_abi::grant::{GNTTAB_CACHE_CLEAN, GNTTAB_CACHE_INVAL, GnttabCacheFlush};
use hypercall_abi::{DomId, GrantRef, Mfn, PAGE_SIZE};

use super::table::ACTIVE_PER_FRAME;
use crate::domain::Domain;
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::mm::Owner;
use crate::platform::Platform;

/// Why nothing is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushRefused {
    /// The range leaves the page, the operation is not known, there is no such frame, or it is another domain's that has
    /// not granted it.
    Invalid,
    /// No domain owns the frame.
    NotOwned,
    /// To drop what caches hold without writing it back.
    Unsupported,
    /// Told to go on where nothing was begun.
    NotBegun,
}

impl<P: Platform> Hypervisor<P> {
    /// One operation of the list. `from` is the entry of the owner at which a preempted search for the caller's grant goes on;
    /// it is a multiple of [`FLUSH_SEARCH_UNIT`].
    pub fn grant_cache_flush(
        &self,
        caller: &Domain,
        op: &GnttabCacheFlush,
        from: &mut u32,
        budget: &mut Budget,
    ) -> Result<Result<(), Preempted>, FlushRefused> {
        let (offset, length) = (usize::from(op.offset), usize::from(op.length));
        if offset >= PAGE_SIZE
            || offset + length > PAGE_SIZE
            || op.op & !(GNTTAB_CACHE_INVAL | GNTTAB_CACHE_CLEAN) != 0
        {
            return Err(FlushRefused::Invalid);
        }
        if length == 0 || op.op == 0 {
            return if *from == 0 { Ok(Ok(())) } else { Err(FlushRefused::NotBegun) };
        }
        let mfn = Mfn::new(op.a >> 12);
        if mfn.get() >= self.mm.max_frame() {
            return Err(FlushRefused::Invalid);
        }
        let (Owner::Domain(owner) | Owner::Hypervisor(owner)) = self.mm.owner(mfn) else {
            return Err(FlushRefused::NotOwned);
        };
        let Some(page) = self.mm.get_page(mfn, owner) else { return Err(FlushRefused::NotOwned) };
        if owner != caller.id {
            match self.find_grant(owner, caller.id, mfn, from, budget) {
                Err(Preempted) => return Ok(Err(Preempted)),
                Ok(false) => return Err(FlushRefused::Invalid),
                Ok(true) => {}
            }
        }
        if op.op & GNTTAB_CACHE_CLEAN == 0 {
            return Err(FlushRefused::Unsupported);
        }
        self.platform.flush_cache_lines(page.mfn(), offset, length);
        Ok(Ok(()))
    }

    /// Whether `user` uses `frame` by some entry of `owner`. A step for each [`FLUSH_SEARCH_UNIT`] entries.
    fn find_grant(
        &self,
        owner: DomId,
        user: DomId,
        frame: Mfn,
        from: &mut u32,
        budget: &mut Budget,
    ) -> Result<bool, Preempted> {
        let Some(owner) = self.domains.get(owner) else { return Ok(false) };
        loop {
            let table = owner.grants.lock();
            if *from >= table.entries() {
                return Ok(false);
            }
            let found = (*from..from.saturating_add(FLUSH_SEARCH_UNIT)).any(|gref| {
                table
                    .active(&self.platform, GrantRef::new(gref))
                    .is_ok_and(|a| !a.pins.is_none() && a.user == user && a.frame == frame)
            });
            drop(table);
            if found {
                return Ok(true);
            }
            *from = from.saturating_add(FLUSH_SEARCH_UNIT);
            budget.step()?;
        }
    }
}

/// Entries that a search looks at in one step.
pub const FLUSH_SEARCH_UNIT: u32 = ACTIVE_PER_FRAME;

//! The table itself: how large it is, its frames as a resource, and what is done to entries that nobody uses.

use arrayvec::ArrayVec;
use hypercall_abi::grant::GNTTAB_NR_RESERVED_ENTRIES;
use hypercall_abi::{DomId, GrantRef, Mfn};

use super::table::{Missing, SHARED_PER_STATUS, StatusFrames};
use super::{Error, Frames, Usage, entry};
use crate::domain::{Domain, Life};
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

impl<P: Platform> Hypervisor<P> {
    /// Makes the table of a domain at least `frames` frames large, one step for each; what was added before memory or the
    /// budget ran out stays. `None` when there is no memory, or the domain is dying.
    pub fn grow_grant_table(
        &self,
        domain: &Domain,
        frames: u32,
        budget: &mut Budget,
    ) -> Option<Result<(), Preempted>> {
        let frames = frames.min(domain.grants.lock().limit(Frames::Shared));
        loop {
            if self.finish_version_change(domain, budget).is_err() {
                return Some(Err(Preempted));
            }
            let missing = {
                let table = domain.grants.lock();
                let Some(missing) = table.missing(frames) else { return Some(Ok(())) };
                if table.closed || domain.life() != Life::Alive {
                    return None;
                }
                missing
            };
            if !self.supply(domain, missing, |table| {
                table.change.is_none() && table.missing(frames) == Some(missing)
            }) {
                return None;
            }
            if budget.step() == Err(Preempted) {
                return Some(Err(Preempted));
            }
        }
    }

    /// Allocates what is missing, with nothing locked, and adds it if it is `wanted` still. False when there is no memory.
    pub(super) fn supply(
        &self,
        domain: &Domain,
        missing: Missing,
        wanted: impl Fn(&super::GrantTable) -> bool,
    ) -> bool {
        let count = if missing == Missing::SharedFrame { 3 } else { 1 };
        let mut taken: ArrayVec<Mfn, 3> = ArrayVec::new();
        while taken.len() < count
            && let Some(mfn) = self.allocate_frames(0, u64::MAX)
        {
            taken.push(mfn);
        }
        let complete = taken.len() == count;
        if complete {
            let mut table = domain.grants.lock();
            if !table.closed && wanted(&table) {
                match (missing, taken.as_slice()) {
                    (Missing::Directory, [directory]) => table.set_directory(*directory),
                    (Missing::StatusFrame, [status]) => {
                        table.add_status_frame(&self.platform, *status);
                        if table.status == StatusFrames::Shared {
                            self.mm.assign_hypervisor_page(*status, domain.id);
                        }
                    }
                    (Missing::SharedFrame, [first, second, shared]) => {
                        self.mm.assign_hypervisor_page(*shared, domain.id);
                        table.add_frame(&self.platform, *shared, [*first, *second]);
                    }
                    _ => debug_assert!(false, "as many frames as are missing"),
                }
                taken.clear();
            }
        }
        for mfn in taken {
            self.mm.give_back(mfn, 0);
        }
        complete
    }

    /// Makes a domain's table so large that it has `count` frames of a kind (`XENMEM_acquire_resource`).
    /// [`Error::BadReference`] beyond [`GrantTable::limit`](super::GrantTable::limit), or for status frames while version 1 is in
    /// force; [`Error::NoSpace`] without memory, or when the domain is dying.
    pub fn grow_grant_frames(
        &self,
        domain: &Domain,
        kind: Frames,
        count: u32,
        budget: &mut Budget,
    ) -> Result<Result<(), Preempted>, Error> {
        let shared = {
            let table = domain.grants.lock();
            if count > table.limit(kind) {
                return Err(Error::BadReference);
            }
            match kind {
                Frames::Shared => count,
                Frames::Status if table.version() != super::Version::V2 => return Err(Error::BadReference),
                Frames::Status if count <= table.status_frames() => return Ok(Ok(())),
                // As many shared frames as these serve, as Xen.
                Frames::Status => (count * SHARED_PER_STATUS).min(table.limit(Frames::Shared)),
            }
        };
        self.grow_grant_table(domain, shared, budget).ok_or(Error::NoSpace)
    }

    /// Frame `index` of a kind, which the domain may map. `None` when the table is not that large.
    pub fn grant_frame(&self, domain: &Domain, kind: Frames, index: u32) -> Option<Mfn> {
        let table = domain.grants.lock();
        match kind {
            Frames::Shared => table.shared_frame(&self.platform, index),
            Frames::Status => table.status_frame(&self.platform, index),
        }
    }

    /// What a domain's grants use.
    pub fn grant_usage(&self, domain: &Domain) -> Usage {
        let table = domain.grants.lock();
        Usage { table_frames: table.frames(), mappings: table.mappings(), frames: table.frame_count() }
    }

    /// Fills a reserved entry of a new domain's table: `peer` may use `frame`. For the control interface, which grants the
    /// console and the xenstore page before the domain runs. [`Error::InUse`] when somebody uses the entry.
    pub fn grant_seed(
        &self,
        domain: &Domain,
        gref: GrantRef,
        frame: Mfn,
        peer: DomId,
        readonly: bool,
    ) -> Result<(), Error> {
        if gref.get() >= GNTTAB_NR_RESERVED_ENTRIES {
            return Err(Error::BadReference);
        }
        let (header, number) = entry::permit(frame, peer, readonly).ok_or(Error::BadPage)?;
        match self.grow_grant_table(domain, 1, &mut Budget::unlimited()) {
            Some(Ok(())) => {}
            _ => return Err(Error::NoSpace),
        }
        let table = domain.grants.lock();
        if !table.active(&self.platform, gref)?.pins.is_none() {
            return Err(Error::InUse);
        }
        table.shared(&self.platform, gref).ok_or(Error::BadReference)?.store(header, number);
        Ok(())
    }

    /// Exchanges two entries that nobody uses.
    pub fn grant_swap(&self, domain: &Domain, a: GrantRef, b: GrantRef) -> Result<(), Error> {
        let table = domain.grants.lock();
        if a.get() >= table.entries() || b.get() >= table.entries() {
            return Err(Error::BadReference);
        }
        if a == b || table.frames() == 0 {
            return Ok(());
        }
        for gref in [a, b] {
            if !table.active(&self.platform, gref)?.pins.is_none() {
                return Err(Error::InUse);
            }
        }
        let first = table.shared(&self.platform, a).ok_or(Error::BadReference)?;
        let second = table.shared(&self.platform, b).ok_or(Error::BadReference)?;
        first.swap(&second);
        Ok(())
    }
}

//! What the rest of the hypervisor asks of memory: frames for a domain, and everything back when it dies.

use core::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use hypercall_abi::{DomId, Mfn};

use super::frames::{Drained, Memory, Retired, Sifted};
use super::page_info::Event;
use super::validate::{MapRights, Pager, Unfinished};
use crate::domain::{Domain, VcpuState};
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::sync;

/// Quarantined frames drained at a time.
const DRAIN_PORTION: usize = 32;

/// Why a domain gets no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocationError {
    /// It may not have so many, or it is dying.
    OverLimit,
    /// There are none.
    OutOfMemory,
}

/// How far a domain's teardown has come, which is preempted often. The rest of the progress is in its list of frames.
#[derive(Debug, Default)]
pub struct Teardown {
    /// It has no port and no interrupt any more, and gets none.
    pub ports: bool,
    vcpus: usize,
}

impl Teardown {
    /// Not begun.
    pub const fn new() -> Teardown {
        Teardown { ports: false, vcpus: 0 }
    }
}

impl<P: Platform> MapRights for Hypervisor<P> {
    fn may_map_io(&self, domain: DomId, mfn: Mfn) -> bool {
        self.domains.get(domain).is_some_and(|d| d.rights.lock().iomem.contains(mfn.get(), mfn.get()))
    }
    fn may_choose_caching(&self, domain: DomId) -> bool {
        self.domains.get(domain).is_some_and(|d| {
            let rights = d.rights.lock();
            !rights.iomem.is_empty() || !rights.ports.is_empty()
        })
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Page-table work on this machine.
    pub fn pager(&self) -> Pager<'_, P> {
        Pager { memory: &self.mm, platform: &self.platform }
    }

    /// Gives some quarantined frames back to the free ones, their TLB debt paid; a bounded number at a time. Returns whether
    /// there were any. The caller holds no lock of rank `REGISTRY` or above.
    #[inline]
    pub fn drain_quarantine(&self) -> bool {
        self.mm.has_quarantined() && self.drain_portion()
    }

    #[inline(never)]
    fn drain_portion(&self) -> bool {
        let mut drained = ArrayVec::<Drained, DRAIN_PORTION>::new();
        self.mm.pop_quarantined(&self.platform, &mut drained);
        // Frames of one domain mostly come together.
        for frames in drained.chunk_by(|a, b| a.owner == b.owner) {
            // A domain stays registered while frames are charged to it.
            match frames.first().and_then(|frame| frame.owner).and_then(|owner| self.domains.get(owner)) {
                Some(owner) => self.mm.free_drained(frames, Some(&mut *owner.pages.lock())),
                None => self.mm.free_drained(frames, None),
            }
        }
        !drained.is_empty()
    }

    /// Takes 2^order scrubbed frames that nobody owns, below frame `limit`. What waits in quarantine is used when nothing
    /// else is left.
    pub fn allocate_frames(&self, order: u32, limit: u64) -> Option<Mfn> {
        loop {
            if let Some(mfn) = self.mm.allocate_below(order, limit, &self.platform) {
                return Some(mfn);
            }
            if !self.drain_quarantine() {
                if !self.mm.others_scrub() {
                    return None;
                }
                sync::relax();
            }
        }
    }

    /// Gives a domain 2^order frames, aligned to their size and scrubbed. Returns the first.
    pub fn give_frames(&self, domain: &Domain, order: u32, limit: u64) -> Result<Mfn, AllocationError> {
        let frames = 1u64.checked_shl(order).ok_or(AllocationError::OverLimit)?;
        domain.pages.lock().charge(frames).map_err(|_| AllocationError::OverLimit)?;
        let Some(first) = self.allocate_frames(order, limit) else {
            domain.pages.lock().discharge(frames);
            return Err(AllocationError::OutOfMemory);
        };
        self.assign_frames(domain, first, order);
        Ok(first)
    }

    /// Makes 2^order allocated and charged frames a domain's.
    pub fn assign_frames(&self, domain: &Domain, first: Mfn, order: u32) {
        let mut pages = domain.pages.lock();
        for n in 0..1 << order {
            self.mm.assign(Mfn::new(first.get() + n), domain.id, &mut pages);
        }
    }

    /// A zeroed page of the hypervisor's own that `domain` may map: shared_info, grant frames. It is not charged to the domain.
    /// It goes with [`Memory::release_hypervisor_page`].
    pub fn allocate_hypervisor_page(&self, domain: DomId) -> Option<Mfn> {
        let mfn = self.allocate_frames(0, u64::MAX)?;
        self.mm.assign_hypervisor_page(mfn, domain);
        Some(mfn)
    }

    // ── teardown ──

    /// Gives back what a vCPU that will not run again holds: roots and descriptor frames.
    pub fn release_vcpu_memory(&self, state: &mut VcpuState, budget: &mut Budget) -> Result<(), Preempted> {
        let pager = self.pager();
        for slot in [&mut state.kernel_root, &mut state.user_root] {
            if let Some(root) = slot.take()
                && let Err(Unfinished(mfn)) = pager.release_stored(root, budget)
            {
                state.unfinished = Some(mfn);
                return Err(Preempted);
            }
        }
        for slot in state.gdt.frames.iter_mut().chain(&mut state.ldt.frames) {
            if let Some(mfn) = slot.take() {
                // Descriptor pages have no entries to give back: constant work.
                let _done = pager.release_stored(mfn, budget);
            }
        }
        state.gdt.entries = 0;
        state.ldt.entries = 0;
        Ok(())
    }

    /// Takes all memory away from a dying domain whose vCPUs are all off and whose grant mappings are gone. Afterwards its
    /// `pages.total()` is what others still refer to; as long as that is not zero, the domain must stay registered.
    pub fn teardown_memory(&self, domain: &Domain, budget: &mut Budget) -> Result<(), Preempted> {
        let mut progress = domain.teardown.lock();
        domain.pages.lock().close();
        while let Some(vcpu) = domain.vcpus.get(progress.vcpus) {
            if let Some(state) = vcpu.parked.lock().as_deref_mut() {
                self.release_vcpu_memory(state, budget)?;
            }
            // Not told by the frame: it may be one of the hypervisor's that the domain can write (its grant table).
            if vcpu.info_registered.swap(false, Ordering::AcqRel)
                && let Some((mfn, _)) = vcpu.info_location()
            {
                let _done = self.pager().release_stored(mfn, budget);
            }
            progress.vcpus += 1;
        }
        loop {
            let mut retired = Retired::new();
            let sifted = self.mm.sift(&mut domain.pages.lock(), &mut retired);
            if !retired.is_empty() {
                // Others may have mapped them until a moment ago. Without a lock: another CPU could not answer a flush.
                self.mm.settle(self.mm.owed_since(self.mm.clock().now()), &self.platform);
                // Behind the flush: until then the old owner's translations could write.
                self.mm.scrub_retired(&retired, &self.platform);
                self.mm.free_retired(&retired, &mut domain.pages.lock());
            }
            match sifted {
                Sifted::More => {}
                Sifted::Table(mfn) => self.end_table(domain, mfn, budget)?,
                Sifted::End => break,
            }
            budget.step()?;
        }
        while self.drain_quarantine() {
            budget.step()?;
        }
        Ok(())
    }

    /// Makes a page table of a dying domain let go of what it refers to: it is pinned no more, and nothing is left of an operation
    /// that was preempted.
    fn end_table(&self, domain: &Domain, mfn: Mfn, budget: &mut Budget) -> Result<(), Preempted> {
        let pager = self.pager();
        // Who parked it may have finished meanwhile, and it may be free.
        let Some(_page) = self.mm.get_page(mfn, domain.id) else { return Ok(()) };
        if self.mm.type_step(mfn, Event::Unpin).is_ok() && pager.release_stored(mfn, budget).is_err() {
            return Err(Preempted);
        }
        pager.abandon(mfn, budget).map_err(|_| Preempted)
    }

    /// Finishes tearing down the table that a hypercall of this vCPU left unfinished. Every hypercall on page tables does
    /// this first.
    pub fn finish_pending(&self, pending: &mut Option<Mfn>, budget: &mut Budget) -> Result<(), Preempted> {
        let Some(mfn) = *pending else { return Ok(()) };
        match self.pager().help(mfn, budget) {
            Ok(()) => {
                *pending = None;
                Ok(())
            }
            Err(Unfinished(_)) => Err(Preempted),
        }
    }

    /// Whether all frames are accounted for: for tests and the log. Frames that can be given out.
    pub fn free_frames(&self) -> usize {
        self.mm.free_frames()
    }
}

impl Memory {
    /// Whether a frame is pinned as a page table, for queries and tests.
    pub fn is_pinned(&self, mfn: Mfn) -> bool {
        self.type_word(mfn).is_some_and(|word| word.is_pinned())
    }
}

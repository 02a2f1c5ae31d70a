//! Making and unmaking domains.
//!
//! A domain is destroyed in stages, each of them preemptible and done again from where it stopped: its vCPUs leave their
//! CPUs, their references go (roots, descriptor tables), then its event channels, its grants, and its memory. What others
//! still map stays theirs; the domain's number is free when the last of its frames is.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use hypercall_abi::{DomId, Errno};

use super::{Domain, DomainConfig, Life, VcpuRef};
use crate::access::Rights;
use crate::evtchn::Progress;
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Most vCPUs a domain may have.
pub const MAX_VCPUS: u32 = 64;

/// What the creator of a domain says about it.
pub struct NewDomain {
    /// Its number, or `None` for any.
    pub id: Option<DomId>,
    /// 16 bytes of the creator's choice.
    pub handle: [u8; 16],
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Most frames it may own.
    pub max_pages: u64,
    /// Rights beyond its own resources.
    pub rights: Rights,
}

impl<P: Platform> Hypervisor<P> {
    /// Makes a domain: no memory, no context, paused once.
    ///
    /// `EINVAL` vCPUs out of range, `EEXIST` number taken, `ENFILE` no number left, `ENOMEM` no frame for shared_info.
    pub fn create_domain(&self, new: NewDomain) -> Result<Arc<Domain>, Errno> {
        if new.vcpus == 0 || new.vcpus > MAX_VCPUS {
            return Err(Errno::EINVAL);
        }
        let id = match new.id {
            Some(id) if id >= DomId::FIRST_RESERVED => return Err(Errno::EINVAL),
            Some(id) if self.domains.get(id).is_some() => return Err(Errno::EEXIST),
            Some(id) => id,
            None => self.domains.free_id().ok_or(Errno::ENFILE)?,
        };
        let shared_info = self.allocate_hypervisor_page(id).ok_or(Errno::ENOMEM)?;
        let domain = Arc::new(Domain::new(
            DomainConfig {
                id,
                handle: new.handle,
                vcpus: new.vcpus,
                max_pages: new.max_pages,
                rights: new.rights,
                shared_info,
            },
            &self.platform,
        ));
        if !self.domains.insert(domain.clone()) {
            self.mm.release_hypervisor_page(shared_info);
            return Err(Errno::EEXIST);
        }
        self.reserve_vcpus(self.domains.vcpu_total());
        self.place_vcpu_infos(&domain);
        self.update_wallclock(&domain);
        Ok(domain)
    }

    /// Pauses a domain: its vCPUs leave their CPUs at the next chance and stay off until as many unpauses came.
    pub fn pause_domain(&self, domain: &Domain) {
        domain.pauses.fetch_add(1, Ordering::AcqRel);
        self.stop_domain(domain);
    }

    /// Ends one pause. `EINVAL` when it is not paused.
    pub fn unpause_domain(&self, domain: &Arc<Domain>) -> Result<(), Errno> {
        domain
            .pauses
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
            .map_err(|_| Errno::EINVAL)?;
        self.wake_domain(domain);
        Ok(())
    }

    /// Destroys a domain as far as the budget goes. Call again until `Ok`.
    pub fn destroy_domain(&self, domain: &Arc<Domain>, budget: &mut Budget) -> Result<(), Preempted> {
        domain.set_life(Life::Dying);
        domain.pages.lock().close();
        self.stop_domain(domain);
        for vcpu in &domain.vcpus {
            if vcpu.running.load(Ordering::Acquire) {
                // It leaves its CPU at that CPU's next chance; on this one that is when the caller's hypercall ends.
                return Err(Preempted);
            }
        }
        for watchdog in &domain.watchdogs {
            watchdog.store(0, Ordering::Release);
        }
        for vcpu in &domain.vcpus {
            vcpu.timers.stop_all();
            if let Some(vcpu) = VcpuRef::new(domain, vcpu.id) {
                self.arm_timers(&vcpu);
            }
        }
        if self.tear_down_ports(domain, budget) == Progress::Preempted {
            return Err(Preempted);
        }
        self.tear_down_grants(domain, budget)?;
        self.teardown_memory(domain, budget)?;
        if domain.life() != Life::Dead {
            domain.set_life(Life::Dead);
            self.mm.release_hypervisor_page(domain.shared_info);
        }
        self.drain_quarantine();
        self.forget_if_empty(domain);
        Ok(())
    }

    /// Takes a dead domain out of the table once none of its frames is left, and nobody uses an entry of its grant table.
    ///
    /// The second does not follow from the first: a domain may grant its shared_info or a frame of its grant table, which
    /// are not counted as its own. Its users find the active entry through the domain's number.
    pub fn forget_if_empty(&self, domain: &Arc<Domain>) {
        let granted = domain.grants.lock().used();
        if domain.life() == Life::Dead && granted == 0 && domain.pages.lock().total() == 0 {
            self.domains.remove(domain.id);
        }
    }
}

//! Making and unmaking domains.
//!
//! A domain is destroyed in stages, each of them preemptible and done again from where it stopped: its vCPUs leave their
//! CPUs, their references go (roots, descriptor tables), then its event channels, its grants, and its memory. What others
//! still map stays theirs; the domain's number is free when the last of its frames is.

use super::DomainError;
use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use hypercall_abi::DomId;

use super::{Counts, Domain, DomainConfig, Life, Vcpu, VcpuRef, VcpuState};
use crate::access::Rights;
use crate::evtchn::Progress;
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::{CpuSet, Platform};
use crate::sched::Sharing;
use crate::sync;

/// Most vCPUs a domain may have.
pub const MAX_VCPUS: u32 = 64;

/// Bytes that one vCPU or domain takes at most in queues and tables, and in gaps between allocations.
const HEAP_OVERHEAD: usize = 256;
/// Bytes of heap that domains do not get: for temporary copies, and for gaps too small to be used.
const HEAP_RESERVE: usize = 128 * 1024;

/// Rounds of waiting for another CPU to leave a vCPU: longer than an interrupt and the end of a hypercall take.
const OFF_ROUNDS: u32 = 10_000;

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
    /// `EINVAL` vCPUs out of range, `EEXIST` number taken, `ENFILE` no number left, `ENOMEM` no frame for shared_info or no
    /// room in the heap, `ENOSPC` fewer free CPUs than vCPUs under the policy `null`.
    pub fn create_domain(&self, new: NewDomain) -> Result<Arc<Domain>, DomainError> {
        if new.vcpus == 0 || new.vcpus > MAX_VCPUS {
            return Err(DomainError::Invalid);
        }
        let id = match new.id {
            Some(id) if id >= DomId::FIRST_RESERVED => return Err(DomainError::Invalid),
            Some(id) if self.domains.get(id).is_some() => return Err(DomainError::Exists),
            Some(id) => id,
            None => self.domains.free_id().ok_or(DomainError::NoNumber)?,
        };
        if !self.heap_has_room(new.vcpus as usize) {
            return Err(DomainError::NoMemory);
        }
        let claimed = self.claim_cpus(new.vcpus)?;
        let Some(shared_info) = self.allocate_hypervisor_page(id) else {
            self.claims.give_back(claimed);
            return Err(DomainError::NoMemory);
        };
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
        for (vcpu, cpu) in domain.vcpus.iter().zip(claimed.iter()) {
            vcpu.cpu.store(cpu.0, Ordering::SeqCst);
            vcpu.sched.set_claimed(Some(cpu));
        }
        if !self.domains.insert(domain.clone()) {
            self.claims.give_back(claimed);
            self.mm.release_hypervisor_page(shared_info);
            return Err(DomainError::Exists);
        }
        self.reserve_vcpus(self.domains.vcpu_total());
        self.place_vcpu_infos(&domain);
        self.update_wallclock(&domain);
        Ok(domain)
    }

    /// Under the policy `null`: takes a CPU for each of `vcpus`.
    fn claim_cpus(&self, vcpus: u32) -> Result<CpuSet, DomainError> {
        match self.policy {
            Sharing::Fair => Ok(CpuSet::default()),
            Sharing::Null => self.claims.take(vcpus, self.online()).ok_or(DomainError::NoCpu),
        }
    }

    /// Whether a domain of `vcpus` vCPUs fits in the heap. Asked beforehand: an allocation that fails stops the host.
    fn heap_has_room(&self, vcpus: usize) -> bool {
        let per_vcpu = size_of::<Vcpu>()
            + size_of::<VcpuState>()
            + size_of::<Counts>()
            + self.platform.vector_state_size()
            + HEAP_OVERHEAD;
        // Queues and the table of domains may be copied to a place twice as large.
        let tables = (self.domains.vcpu_total() + vcpus) * self.cpus.len() * HEAP_OVERHEAD
            + self.domains.len() * HEAP_OVERHEAD;
        let need = size_of::<Domain>() + vcpus * per_vcpu + tables + HEAP_RESERVE;
        let (used, size) = self.platform.heap_usage();
        size.saturating_sub(used) >= need as u64
    }

    /// Pauses a domain: its vCPUs leave their CPUs at the next chance ([`Hypervisor::wait_until_off`] waits for that) and stay off
    /// until as many unpauses came. `EOVERFLOW` when it is paused as often as can be counted.
    pub fn pause_domain(&self, domain: &Domain) -> Result<(), DomainError> {
        domain
            .pauses
            .fetch_update(Ordering::SeqCst, Ordering::Acquire, |n| n.checked_add(1))
            .map_err(|_| DomainError::TooOften)?;
        self.stop_domain(domain);
        Ok(())
    }

    /// Ends one pause. `EINVAL` when it is not paused.
    pub fn unpause_domain(&self, domain: &Arc<Domain>) -> Result<(), DomainError> {
        domain
            .pauses
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
            .map_err(|_| DomainError::Invalid)?;
        self.wake_domain(domain);
        Ok(())
    }

    /// Waits for the vCPUs of a domain that may not run to leave their CPUs, which have been told. False if they take too long: one
    /// on this CPU leaves it only when the caller's hypercall ends, and so does one that waits in its own hypercall for the caller.
    pub fn wait_until_off(&self, domain: &Domain) -> bool {
        let on = |vcpu: &Vcpu| vcpu.running.load(Ordering::SeqCst);
        let here = self.platform.this_cpu().0;
        for vcpu in &domain.vcpus {
            let mut rounds = 0;
            // One that was let go again meanwhile is not waited for.
            while on(vcpu) && !(vcpu.runnable() && domain.is_on()) {
                if rounds == OFF_ROUNDS || vcpu.cpu.load(Ordering::SeqCst) == here {
                    return false;
                }
                rounds += 1;
                sync::relax();
            }
        }
        true
    }

    /// Destroys a domain as far as the budget goes. Call again until `Ok`.
    pub fn destroy_domain(&self, domain: &Arc<Domain>, budget: &mut Budget) -> Result<(), Preempted> {
        domain.set_life(Life::Dying);
        self.domains.forget_end(domain.id);
        domain.pages.lock().close();
        self.stop_domain(domain);
        if !self.wait_until_off(domain) {
            return Err(Preempted);
        }
        for watchdog in &domain.watchdogs {
            watchdog.store(0, Ordering::Release);
        }
        domain.cap.set(0, self.platform.now_ns());
        for vcpu in &domain.vcpus {
            if let Some(cpu) = vcpu.sched.set_claimed(None) {
                self.claims.give_back(CpuSet::one(cpu));
            }
            vcpu.timers.stop_all();
            if let Some(vcpu) = VcpuRef::new(domain, vcpu.id) {
                self.arm_timers(&vcpu);
            }
        }
        if !domain.teardown.lock().ports {
            if self.tear_down_ports(domain, budget) == Progress::Preempted {
                return Err(Preempted);
            }
            domain.teardown.lock().ports = true;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evtchn::tests::hypervisor;

    fn new(vcpus: u32) -> NewDomain {
        NewDomain { id: None, handle: [0; 16], vcpus, max_pages: 16, rights: Rights::none() }
    }

    #[test]
    fn a_domain_that_does_not_fit_in_the_heap_is_refused() {
        let hv = hypervisor(64);
        let (_, size) = hv.platform.heap_usage();
        let free = hv.mm.free_frames();
        hv.platform.heap_used.store(size - 300_000, Ordering::Relaxed);
        assert_eq!(hv.create_domain(new(MAX_VCPUS)).err(), Some(DomainError::NoMemory));
        assert_eq!(hv.mm.free_frames(), free);
        assert!(hv.create_domain(new(1)).is_ok());
        hv.platform.heap_used.store(size, Ordering::Relaxed);
        assert_eq!(hv.create_domain(new(1)).err(), Some(DomainError::NoMemory));
    }

    #[test]
    fn pauses_are_counted_and_do_not_wrap() {
        let hv = hypervisor(64);
        let domain = hv.create_domain(new(1)).unwrap();
        domain.pauses.store(u32::MAX, Ordering::Release);
        assert_eq!(hv.pause_domain(&domain), Err(DomainError::TooOften));
        assert_eq!(hv.unpause_domain(&domain), Ok(()));
        assert!(!domain.may_run());
    }
}

//! What hypercalls ask of vCPUs: areas, NMIs, watchdogs, rights.

use super::DomainError;
use core::sync::atomic::Ordering;

use hypercall_abi::{Mfn, VirtAddr};

use super::{Current, Domain, Vcpu, VcpuRef};
use crate::access::Verbs;
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
use crate::page_ref::{TypedRef, Writable};
use crate::platform::{CpuId, Platform};

/// Bytes of vcpu_info.
const VCPU_INFO_SIZE: u32 = 64;
/// How many vCPUs have their vcpu_info in shared_info.
const INFOS_IN_SHARED_INFO: u32 = 32;
/// `evtchn_upcall_mask` = 1 in the first word of a vcpu_info.
const UPCALL_MASK: u64 = 1 << 8;

impl<P: Platform> Hypervisor<P> {
    /// `EPERM` unless the caller holds all of `verbs`.
    pub fn require(&self, current: &Current, verbs: Verbs) -> Result<(), DomainError> {
        if current.domain().rights.lock().verbs.contains(verbs) {
            Ok(())
        } else {
            Err(DomainError::NotAllowed)
        }
    }

    /// Whether a guest may name this address as the beginning of something of its own. What lies behind it shows when it is
    /// accessed.
    pub fn guest_address_ok(&self, address: u64) -> bool {
        let address = VirtAddr::new(address);
        address.is_canonical() && !address.is_hypervisor()
    }

    /// Puts the vcpu_info of the first vCPUs into shared_info, where they are until registered elsewhere. Upcalls are masked in
    /// all that shared_info has room for, as every builder of Xen leaves them.
    pub fn place_vcpu_infos(&self, domain: &Domain) {
        for vcpu in domain.vcpus.iter().take(INFOS_IN_SHARED_INFO as usize) {
            vcpu.set_info_location(domain.shared_info, (vcpu.id.get() * VCPU_INFO_SIZE) as usize);
        }
        let words = self.platform.frame(domain.shared_info);
        for info in 0..INFOS_IN_SHARED_INFO {
            words[(info * VCPU_INFO_SIZE / 8) as usize].fetch_or(UPCALL_MASK, Ordering::AcqRel);
        }
    }

    /// Moves a vCPU's vcpu_info to the guest's page `mfn`, keeping its contents. Afterwards every event counts as new. The vCPU
    /// is the caller's, or down.
    ///
    /// `ENXIO` misaligned or across a page; `EINVAL` registered before, or no page of its own.
    pub fn register_vcpu_info(&self, vcpu: &VcpuRef, mfn: Mfn, offset: u32) -> Result<(), DomainError> {
        self.vcpu_info_place_ok(vcpu, offset)?;
        // The reference stays with the vCPU until the domain is torn down.
        let page: TypedRef<'_, Writable> = self
            .pager()
            .get_typed(mfn, vcpu.domain().id, self, &mut Budget::unlimited())
            .map_err(|_| DomainError::Invalid)?;
        // Events are delivered under this lock: none falls between the places.
        let events = vcpu.domain().events.lock();
        if vcpu.info_registered.swap(true, Ordering::AcqRel) {
            return Err(DomainError::Invalid);
        }
        let page = page.into_pte();
        let old: [u64; 8] = core::array::from_fn(|i| {
            vcpu.info_word(&self.platform, i).map_or(0, |w| w.load(Ordering::Acquire))
        });
        let new = self.platform.frame(page);
        for (i, word) in old.iter().enumerate() {
            new[offset as usize / 8 + i]
                .store(if vcpu.info_location().is_some() { *word } else { 0 }, Ordering::Release);
        }
        if vcpu.info_location().is_none() {
            new[offset as usize / 8].fetch_or(0x100, Ordering::AcqRel);
        }
        vcpu.set_info_location(page, offset as usize);
        // As on Xen: whatever the guest did to the old place meanwhile, it looks at everything once.
        if let [Some(first), Some(selectors)] = [0, 1].map(|i| vcpu.info_word(&self.platform, i)) {
            selectors.store(u64::MAX, Ordering::Release);
            first.fetch_or(1, Ordering::AcqRel);
        }
        drop(events);
        self.update_vcpu_time(vcpu);
        // Another CPU's counter may be ahead of this one's: the record is written again where the vCPU is put on.
        vcpu.sched.last_cpu.store(crate::sched::NO_CPU, Ordering::Relaxed);
        self.unblock(vcpu);
        Ok(())
    }

    /// Whether a vcpu_info may come to lie at `offset` of a page. `ENXIO` misaligned or across the end; `EINVAL` registered
    /// before.
    pub fn vcpu_info_place_ok(&self, vcpu: &VcpuRef, offset: u32) -> Result<(), DomainError> {
        if !offset.is_multiple_of(8) || offset > 4096 - VCPU_INFO_SIZE {
            return Err(DomainError::BadPlace);
        }
        if vcpu.info_registered.load(Ordering::Acquire) {
            return Err(DomainError::Invalid);
        }
        Ok(())
    }

    /// Sends a non-maskable interrupt to a vCPU: it wakes if it sleeps, and takes it before its next instruction. One that is
    /// down takes it when it comes up.
    pub fn send_nmi(&self, vcpu: &VcpuRef) {
        if !vcpu.nmi_pending.swap(true, Ordering::AcqRel) {
            self.notify(vcpu);
        }
    }

    /// Arms, moves or stops one of a domain's two watchdogs; `id` 0 takes a free one and returns its number. `timeout` is in
    /// seconds; 0 stops one that is armed.
    ///
    /// `EINVAL` no such watchdog, `ENOSPC` both taken.
    pub fn set_watchdog(
        &self,
        current: &Current,
        id: u32,
        timeout: u32,
    ) -> Result<u64, crate::hypercall::Exit> {
        let domain = current.domain();
        let end = || self.platform.now_ns().max(1) + u64::from(timeout) * 1_000_000_000;
        if id == 0 {
            // A timeout of 0 fires at once, as on Xen.
            for (i, watchdog) in domain.watchdogs.iter().enumerate() {
                if watchdog.compare_exchange(0, end(), Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    self.arm_timers(&self.watchdog_keeper(current));
                    return Ok(i as u64 + 1);
                }
            }
            return Err(DomainError::NoneFree.into());
        }
        let watchdog = domain.watchdogs.get(id as usize - 1).ok_or(DomainError::Invalid)?;
        if watchdog.load(Ordering::Acquire) == 0 {
            return Err(DomainError::Invalid.into());
        }
        watchdog.store(if timeout == 0 { 0 } else { end() }, Ordering::Release);
        self.arm_timers(&self.watchdog_keeper(current));
        Ok(0)
    }

    /// Keeps a vCPU on one CPU until it asks to be let go (`None`).
    ///
    /// `EINVAL` no such CPU, or not kept anywhere; `EBUSY` kept already, or it holds another CPU for itself (`sched=null`).
    pub fn pin_override(&self, vcpu: &VcpuRef, cpu: Option<CpuId>) -> Result<(), DomainError> {
        let exchange = |from, to| {
            vcpu.sched.pinned.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).map(drop)
        };
        let Some(cpu) = cpu else {
            let now = vcpu.sched.pinned.load(Ordering::Acquire);
            return if now == 0 {
                Err(DomainError::Invalid)
            } else {
                exchange(now, 0).map_err(|_| DomainError::Invalid)
            };
        };
        if cpu.0 >= self.platform.cpu_count() {
            return Err(DomainError::Invalid);
        }
        if vcpu.sched.claimed().is_some_and(|claimed| claimed != cpu) {
            return Err(DomainError::Busy);
        }
        exchange(0, cpu.0 + 1).map_err(|_| DomainError::Busy)?;
        // It moves there at its CPU's next choice.
        self.interrupt_vcpu(vcpu);
        Ok(())
    }

    /// The vCPU whose timer entry carries the domain's watchdogs: the first.
    fn watchdog_keeper(&self, current: &Current) -> VcpuRef {
        VcpuRef::new(current.domain(), hypercall_abi::VcpuId::new(0)).unwrap_or_else(|| current.vcpu.clone())
    }
}

impl Vcpu {
    /// When its timer entry is due: its own timers, and on the first vCPU the domain's too, its watchdogs and the end of a wait for
    /// its cap.
    pub fn earliest_deadline(&self, domain: &Domain) -> Option<u64> {
        let watchdogs = domain
            .watchdogs
            .iter()
            .filter(|_| self.id.get() == 0)
            .map(|w| w.load(Ordering::Acquire))
            .filter(|t| *t != 0);
        let cap = domain.cap.waits_until_ns().filter(|_| self.id.get() == 0);
        let guarantee = domain.guarantee.due_ns().filter(|_| self.id.get() == 0);
        watchdogs.chain(cap).chain(guarantee).chain(self.timers.earliest()).min()
    }
}

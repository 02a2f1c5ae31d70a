//! `update_va_mapping`: the L1 entry that maps an address of the caller (public/xen.h).

use core::sync::atomic::Ordering;

use hypercall_abi::mmu::{UVMF_ALL, UVMF_FLUSHTYPE_MASK, UVMF_INVLPG, UVMF_TLB_FLUSH};
use hypercall_abi::{DomId, Errno, VcpuId, VirtAddr};

use super::mmu_update::{frame_owner, require_right_over};
use super::{Args, HcResult};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::mm::update::NotUpdated;
use crate::mm::{Pte, Stop, Store};
use crate::page_ref::PageRef;
use crate::platform::{CpuId, CpuSet, Platform, TlbFlush};

/// `update_va_mapping(va, entry, flags)`.
///
/// `EINVAL` no L1 table maps the address, or the entry may not be; `EBUSY` as for `mmu_update`; `EFAULT` the bitmap of vCPUs.
pub fn update_va_mapping<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [va, entry, flags, ..] = args;
    let owner = current.domain().id;
    update(hv, current, va, entry, flags, owner)
}

/// `update_va_mapping_otherdomain(va, entry, flags, domid)`: the frame is another domain's. `ESRCH`, `EPERM` the domain.
pub fn update_va_mapping_otherdomain<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
) -> HcResult {
    let [va, entry, flags, domid, ..] = args;
    let owner = frame_owner(hv, current, DomId::new(domid as u16))?;
    require_right_over(current, owner)?;
    update(hv, current, va, entry, flags, owner)
}

fn update<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    va: u64,
    entry: u64,
    flags: u64,
    frame_owner: DomId,
) -> HcResult {
    let (table, index) = hv.own_l1(current, va).ok_or(Errno::EINVAL)?;
    match hv.pager().update_l1(&table, index, Pte::from_bits(entry), Store::Plain, frame_owner, hv) {
        Ok(()) => {}
        Err(NotUpdated::Stop(Stop::Failed(failure))) => return Err(Errno::from(failure).into()),
        // An L1 entry is never long work, and nothing was compared.
        Err(_) => return Err(Errno::EINVAL.into()),
    }
    let what = match flags & UVMF_FLUSHTYPE_MASK {
        UVMF_TLB_FLUSH => TlbFlush::All,
        UVMF_INVLPG => TlbFlush::Page(va),
        _ => return Ok(0),
    };
    let cpus = match flags & !UVMF_FLUSHTYPE_MASK {
        0 => CpuSet::one(hv.platform.this_cpu()),
        UVMF_ALL => CpuSet::ALL,
        bitmap => hv.cpus_of_mask(current, bitmap)?,
    };
    hv.mm.clock().flush_guest(&hv.platform, current.domain().id, cpus, what);
    Ok(0)
}

impl<P: Platform> Hypervisor<P> {
    /// The L1 table of the running vCPU's domain that maps `va` under its kernel's tables, and the index of the entry.
    fn own_l1(&self, current: &Current, va: u64) -> Option<(PageRef<'_>, usize)> {
        let address = VirtAddr::new(va);
        if !address.is_canonical() || address.is_hypervisor() {
            return None;
        }
        let (table, index) = self.pager().find_l1(current.state.current_root()?, va)?;
        Some((self.mm.get_page(table, current.domain().id)?, index))
    }

    /// The processors on which the vCPUs in the guest's bitmap at `bitmap` ran last. One that is put on another meanwhile
    /// loads its tables there, which is a flush.
    pub(super) fn cpus_of_mask(&self, current: &Current, bitmap: u64) -> Result<CpuSet, Errno> {
        let vcpus = &current.domain().vcpus;
        let mut set = CpuSet::default();
        for word in 0..vcpus.len().div_ceil(64) as u64 {
            let bits: u64 = self.read_guest_item(bitmap, word)?;
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                let id = VcpuId::new((word * 64 + bit) as u32);
                if let Some(vcpu) = vcpus.get(id.get() as usize) {
                    set = set.with(CpuId(vcpu.cpu.load(Ordering::SeqCst)));
                }
            }
        }
        Ok(set)
    }
}

//! Xen's own control interface (feature `control`), as Xen 4.17 has it: what [`control`](crate::control) is on Xenolith.
//!
//! Populating, foreign mappings, pins, ports for others and shutdown from outside go by hypercalls that both have, and are in
//! [`control`](crate::control).

use crate::control::Foreign;
use crate::hypercall::stub;
use crate::memory::Access;
use crate::ring::SharedPage;
use alloc::vec::Vec;
use core::mem::offset_of;
use core::sync::atomic::Ordering;
use hypercall_abi::grant::{GNTTAB_NR_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GrantEntryV1};
use hypercall_abi::memory::{
    AcquireResource, XENMEM_RESOURCE_GRANT_TABLE, XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED,
};
use hypercall_abi::shared_info::{LEGACY_MAX_VCPUS, SharedInfo};
use hypercall_abi::subops::MemoryOp;
use hypercall_abi::vcpu::{VcpuGuestContext, VcpuInfo};
use hypercall_abi::xen_control::{
    CreateDomain, DestroyDomain, Domctl, DomctlPayload, GetCpuInfo, GetDomainInfo, GetDomainInfoList,
    GetVcpuInfo, HypercallInit, MaxMem, MaxVcpus, PauseDomain, PhysInfo, ReadConsole, SchedId, SchedulerOp,
    Sysctl, SysctlPayload, UnpauseDomain, VcpuContext,
};
use hypercall_abi::{DomId, Errno, GrantRef, GuestHandle, Mfn, PAGE_SIZE};

pub use hypercall_abi::xen_control as abi;

/// Issues a command about a domain; its answers are in `payload`, and the header's domain is returned.
///
/// # Errors
/// As the command says.
///
/// # Safety
/// Handles in the payload lead to live memory as long as the payload says.
pub unsafe fn domctl<T: DomctlPayload>(domain: DomId, payload: &mut T) -> Result<DomId, Errno> {
    let mut call = Domctl::new(domain, payload);
    // SAFETY: one Domctl, alive through the call; its pointers are the caller's.
    unsafe { stub::domctl((&raw mut call) as u64)? };
    if let Some(answer) = call.decode::<T>() {
        *payload = answer;
    }
    Ok(call.domain)
}

/// Issues a command about the host; its answers are in `payload`.
///
/// # Errors
/// As the command says.
///
/// # Safety
/// Handles in the payload lead to live memory as long as the payload says.
pub unsafe fn sysctl<T: SysctlPayload>(payload: &mut T) -> Result<(), Errno> {
    let mut call = Sysctl::new(payload);
    // SAFETY: one Sysctl, alive through the call; its pointers are the caller's.
    unsafe { stub::sysctl((&raw mut call) as u64)? };
    if let Some(answer) = call.decode::<T>() {
        *payload = answer;
    }
    Ok(())
}

/// Issues a command about a domain, without pointers.
fn plain<T: DomctlPayload>(domain: DomId, mut payload: T) -> Result<T, Errno> {
    // SAFETY: the callers in this module pass payloads without handles.
    unsafe { domctl(domain, &mut payload)? };
    Ok(payload)
}

/// Makes a paused domain without memory and gives it its vCPUs, all down; returns its number.
///
/// # Errors
/// As [`CreateDomain`] and [`MaxVcpus`] say. Nothing is left of the domain then.
pub fn create_domain(request: CreateDomain) -> Result<DomId, Errno> {
    let mut payload = request;
    // SAFETY: no handles.
    let domain = unsafe { domctl(DomId::ZERO, &mut payload)? };
    if let Err(error) = plain(domain, MaxVcpus { max: request.max_vcpus }) {
        // It is ours and empty: this cannot fail.
        let _ = destroy(domain);
        return Err(error);
    }
    Ok(domain)
}

/// Tears a domain down. It is gone when [`domain_info`] says so, which takes as long as others refer to its pages.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` for the caller itself.
pub fn destroy(domain: DomId) -> Result<(), Errno> {
    plain(domain, DestroyDomain {}).map(drop)
}

/// Stops a domain's vCPUs.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` for the caller itself.
pub fn pause(domain: DomId) -> Result<(), Errno> {
    plain(domain, PauseDomain {}).map(drop)
}

/// Takes one pause back.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` when there is none.
pub fn unpause(domain: DomId) -> Result<(), Errno> {
    plain(domain, UnpauseDomain {}).map(drop)
}

/// Limits a domain's memory, in pages.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn set_max_pages(domain: DomId, max_pages: u64) -> Result<(), Errno> {
    // What does not fit is more than any machine has.
    let max_memkb = max_pages.saturating_mul(PAGE_SIZE as u64 / 1024);
    plain(domain, MaxMem { max_memkb }).map(drop)
}

/// Fills a frame of the domain with hypercall stubs.
///
/// # Errors
/// As [`HypercallInit`] says.
pub fn hypercall_page(domain: DomId, mfn: Mfn) -> Result<(), Errno> {
    plain(domain, HypercallInit { gmfn: mfn.get() }).map(drop)
}

/// Sets the whole state of a vCPU.
///
/// # Errors
/// As [`VcpuContext`] says.
pub fn set_vcpu_context(domain: DomId, vcpu: u32, context: &VcpuGuestContext) -> Result<(), Errno> {
    let ctxt = GuestHandle::new((&raw const *context) as u64);
    // SAFETY: the context lives through the call and is only read.
    unsafe { domctl(domain, &mut VcpuContext { vcpu, pad0: 0, ctxt }) }.map(drop)
}

/// The scheduler that there is, if it is one with weights and caps.
fn credit_scheduler() -> Result<u32, Errno> {
    let mut payload = SchedId::default();
    // SAFETY: no handles.
    unsafe { sysctl(&mut payload)? };
    match payload.sched_id {
        id @ (abi::SCHEDULER_CREDIT | abi::SCHEDULER_CREDIT2) => Ok(id),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

/// A domain's weight, and its cap in percent of one CPU, 0 for none.
///
/// # Errors
/// `EOPNOTSUPP` under a scheduler without; `ESRCH`, `EPERM`.
pub fn scheduling(domain: DomId) -> Result<(u16, u16), Errno> {
    let cmd = abi::SCHEDOP_GETINFO;
    let info = plain(domain, SchedulerOp { sched_id: credit_scheduler()?, cmd, ..SchedulerOp::default() })?;
    Ok((info.weight, info.cap))
}

/// Sets both.
///
/// # Errors
/// As [`scheduling`]; `EINVAL` a cap above what the domain's vCPUs can use.
pub fn set_scheduling(domain: DomId, weight: u16, cap: u16) -> Result<(), Errno> {
    let (sched_id, cmd) = (credit_scheduler()?, abi::SCHEDOP_PUTINFO);
    plain(domain, SchedulerOp { sched_id, cmd, weight, cap, ..SchedulerOp::default() }).map(drop)
}

/// How long each CPU has idled, ns.
///
/// # Errors
/// `EPERM`.
pub fn idle_ns() -> Result<Vec<u64>, Errno> {
    let mut list = [0; 64];
    let info = GuestHandle::new(list.as_mut_ptr() as u64);
    let mut request = GetCpuInfo { max_cpus: list.len() as u32, info, ..GetCpuInfo::default() };
    // SAFETY: room for `max_cpus` numbers, alive through the call.
    unsafe { sysctl(&mut request)? };
    Ok(list.into_iter().take(request.nr_cpus as usize).collect())
}

/// State of one vCPU.
///
/// # Errors
/// As [`GetVcpuInfo`] says.
pub fn vcpu_info(domain: DomId, vcpu: u32) -> Result<GetVcpuInfo, Errno> {
    plain(domain, GetVcpuInfo { vcpu, ..GetVcpuInfo::default() })
}

/// State of one domain.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn domain_info(domain: DomId) -> Result<GetDomainInfo, Errno> {
    // Xen answers for the next domain when there is none of that number.
    let info = plain(domain, GetDomainInfo::default())?;
    if info.domain == domain { Ok(info) } else { Err(Errno::ESRCH) }
}

/// State of all domains, in the order of their numbers.
///
/// # Errors
/// `EPERM`.
pub fn list_domains() -> Result<Vec<GetDomainInfo>, Errno> {
    const AT_ONCE: usize = 32;
    let mut all: Vec<GetDomainInfo> = Vec::new();
    loop {
        let mut list = [GetDomainInfo::default(); AT_ONCE];
        let mut request = GetDomainInfoList {
            first_domain: all.last().map_or(DomId::ZERO, |last| DomId::new(last.domain.get() + 1)),
            max_domains: AT_ONCE as u32,
            buffer: GuestHandle::new(list.as_mut_ptr() as u64),
            ..GetDomainInfoList::default()
        };
        // SAFETY: room for `max_domains` entries, alive through the call; any bytes are valid in them.
        unsafe { sysctl(&mut request)? };
        let count = (request.num_domains as usize).min(AT_ONCE);
        all.extend(list.into_iter().take(count));
        if count < AT_ONCE {
            return Ok(all);
        }
    }
}

/// Facts about the machine.
///
/// # Errors
/// `EPERM`; `EACCES` or `ENOSYS` on a hypervisor with another control interface.
pub fn phys_info() -> Result<PhysInfo, Errno> {
    let mut info = PhysInfo::default();
    // SAFETY: no handles.
    unsafe { sysctl(&mut info)? };
    Ok(info)
}

/// Reads the hypervisor's log from byte `index` on, counted modulo 2³². Gives the bytes read and the next index; bytes that the
/// log has forgotten are skipped, so the next index can be more than `index` plus the bytes read.
///
/// # Errors
/// `EPERM`.
pub fn read_log(index: u32, buffer: &mut [u8]) -> Result<(usize, u32), Errno> {
    let mut request = ReadConsole {
        incremental: 1,
        index,
        buffer: GuestHandle::new(buffer.as_mut_ptr() as u64),
        count: u32::try_from(buffer.len()).unwrap_or(u32::MAX),
        ..ReadConsole::default()
    };
    // SAFETY: as many bytes of room as it says, alive through the call.
    unsafe { sysctl(&mut request)? };
    Ok(((request.count as usize).min(buffer.len()), request.index))
}

/// Masks the upcalls of a new domain's vCPUs, as every kernel expects to find them: Xen leaves the shared page zeroed and this to
/// the builder.
///
/// # Errors
/// What mapping the shared page gives.
pub fn mask_upcalls(domain: DomId, shared_info: Mfn) -> Result<(), Errno> {
    let page = Foreign::map(domain, &[shared_info], Access::ReadWrite)?;
    for vcpu in 0..LEGACY_MAX_VCPUS {
        let at = offset_of!(SharedInfo, vcpu_info) + vcpu * size_of::<VcpuInfo>();
        page.write_bytes(at + offset_of!(VcpuInfo, evtchn_upcall_mask), &[1]);
    }
    Ok(())
}

/// The first frame of a domain's grant table, which is made if it is not there yet.
fn grant_frame(domain: DomId) -> Result<Mfn, Errno> {
    let mut frame = Mfn::new(0);
    let request = AcquireResource {
        domid: domain,
        kind: XENMEM_RESOURCE_GRANT_TABLE,
        id: XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED,
        nr_frames: 1,
        frame_list: GuestHandle::new((&raw mut frame) as u64),
        ..AcquireResource::default()
    };
    let operation = u64::from(MemoryOp::AcquireResource.number());
    // SAFETY: the command's own argument with room for one frame number, both alive through the call.
    unsafe { stub::memory_op(operation, (&raw const request) as u64)? };
    Ok(frame)
}

/// Fills one of the reserved grant entries of a domain that is being built.
///
/// # Errors
/// `EINVAL` not a reserved entry, or a frame that version 1 has no room for; else what mapping the table gives.
pub fn grant_seed(domain: DomId, gref: GrantRef, peer: DomId, frame: Mfn) -> Result<(), Errno> {
    if gref.get() >= GNTTAB_NR_RESERVED_ENTRIES {
        return Err(Errno::EINVAL);
    }
    let frame = u32::try_from(frame.get()).map_err(|_| Errno::EINVAL)?;
    let table = Foreign::map(domain, &[grant_frame(domain)?], Access::ReadWrite)?;
    let entry = gref.get() as usize * size_of::<GrantEntryV1>();
    // Flags and peer share the first word. It comes last: from then on the entry counts.
    table.word(entry + 4).store(frame, Ordering::Relaxed);
    let first = u32::from(GTF_PERMIT_ACCESS) | u32::from(peer.get()) << 16;
    table.word(entry).store(first, Ordering::Release);
    Ok(())
}

//! The control interface (feature `control`): for the domain that builds and watches others.
//!
//! Commands of Xenolith's own interface, and the hypercalls about other domains that Xen has too: [`populate`], [`Foreign`],
//! [`pin_table_for`], [`alloc_unbound_for`], [`connect`], [`remote_shutdown`]. What Xen has in place of the commands is in
//! [`xen_control`](crate::xen_control).
//!
//! [`op`] issues any command; the functions beside it are what a toolstack needs to build a domain: create, populate, map its
//! frames ([`Foreign`]), pin its page tables, set its vCPU's context, unpause.

use crate::events::Channel;
use crate::grants::{GrantError, Grants, Mapping};
use crate::hypercall::stub;
use crate::memory::{self, Access, Range, Shared};
use crate::ring::SharedPage;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall_abi::control::{
    AllocateMessage, ControlOp, CpuInfo, CreateDomain, Destroy, DomainInfo, GetVcpuContext, GrantSeed,
    HypercallPage, InterruptInfo, ListDomains, MessagePermission, Pause, Payload, PhysInfo, ReadLog,
    SetAffinity, SetCap, SetLogLevel, SetMaxPages, SetVcpuContext, SetWeight, Unpause, VcpuInfo, Version,
};
use hypercall_abi::evtchn::EvtchnAllocUnbound;
use hypercall_abi::memory::MemoryReservation;
use hypercall_abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use hypercall_abi::sched::{SchedRemoteShutdown, ShutdownReason};
use hypercall_abi::subops::{EvtchnOp, MemoryOp, MmuextCmd, SchedOp};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, GrantRef, GuestHandle, MachAddr, Mfn, PAGE_SIZE, Port};

pub use hypercall_abi::control as abi;

/// Issues a command that carries no pointer, or one whose pointers the caller vouches for; its answers are in `payload`.
///
/// # Errors
/// As the command says.
///
/// # Safety
/// Handles in the payload lead to live memory as long as the payload says.
pub unsafe fn op<T: Payload>(domain: DomId, payload: &mut T) -> Result<DomId, Errno> {
    let mut operation = ControlOp::new(domain, payload);
    // SAFETY: one ControlOp, alive through the call; its pointers are the caller's.
    unsafe { stub::domctl((&raw mut operation) as u64)? };
    if let Some(answer) = operation.decode::<T>() {
        *payload = answer;
    }
    Ok(operation.domid)
}

/// Issues a command without pointers.
fn plain<T: Payload>(domain: DomId, mut payload: T) -> Result<T, Errno> {
    // SAFETY: the callers in this module pass payloads without handles.
    unsafe { op(domain, &mut payload)? };
    Ok(payload)
}

/// What the hypervisor's control interface can do.
///
/// # Errors
/// `ENOSYS` or `EACCES` on a hypervisor with another control interface.
pub fn version() -> Result<Version, Errno> {
    plain(DomId::SELF, Version::default())
}

/// Makes an empty, paused domain; the answer holds its number and its shared page.
///
/// # Errors
/// As [`CreateDomain`] says.
pub fn create_domain(wanted: DomId, request: CreateDomain) -> Result<CreateDomain, Errno> {
    let mut payload = request;
    // SAFETY: no handles.
    let domain = unsafe { op(wanted, &mut payload)? };
    payload.domid = domain;
    Ok(payload)
}

/// Tears a domain down, one bounded step; true when it is gone. Call again until then.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn destroy_step(domain: DomId) -> Result<bool, Errno> {
    match plain(domain, Destroy::default()) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Stops a domain's vCPUs.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` for the caller itself.
pub fn pause(domain: DomId) -> Result<(), Errno> {
    plain(domain, Pause::default()).map(drop)
}

/// Takes one pause back.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` when there is none.
pub fn unpause(domain: DomId) -> Result<(), Errno> {
    plain(domain, Unpause::default()).map(drop)
}

/// Limits a domain's memory, in pages.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn set_max_pages(domain: DomId, max_pages: u64) -> Result<(), Errno> {
    plain(domain, SetMaxPages { max_pages }).map(drop)
}

/// Says on which CPUs a vCPU may run (`hard`) and should (`soft`), a bit each. Returns what holds then; with 0 for `hard`
/// nothing changes.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` no such vCPU or no such CPU.
pub fn set_affinity(domain: DomId, vcpu: u32, hard: u64, soft: u64) -> Result<(u64, u64), Errno> {
    let answer = plain(domain, SetAffinity { vcpu, pad0: 0, hard, soft })?;
    Ok((answer.hard, answer.soft))
}

/// Sets a domain's share of CPU time against the others', 1 to 65535; the default is 256.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` out of range.
pub fn set_weight(domain: DomId, weight: u32) -> Result<(), Errno> {
    plain(domain, SetWeight { weight, pad0: 0 }).map(drop)
}

/// Sets the most CPU time that a domain gets, in percent of one CPU; 0 lifts the cap.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL` out of range.
pub fn set_cap(domain: DomId, percent: u32) -> Result<(), Errno> {
    plain(domain, SetCap { percent, pad0: 0 }).map(drop)
}

/// What a CPU did.
///
/// # Errors
/// `ENOENT` when there is no such CPU, `EPERM`.
pub fn cpu_info(cpu: u32) -> Result<CpuInfo, Errno> {
    plain(DomId::SELF, CpuInfo { cpu, ..CpuInfo::default() })
}

/// Takes a message interrupt for this domain; [`crate::hardware::Message`] gives it back by itself.
///
/// # Errors
/// `EPERM` without the right to one more, `ENOSPC`; `EACCES` on another hypervisor.
pub fn allocate_message() -> Result<AllocateMessage, Errno> {
    plain(DomId::SELF, AllocateMessage::default())
}

/// Where an interrupt of this domain's goes.
///
/// # Errors
/// `EINVAL` when it is not this domain's.
pub fn interrupt_info(pirq: u32) -> Result<InterruptInfo, Errno> {
    plain(DomId::SELF, InterruptInfo { pirq, ..InterruptInfo::default() })
}

/// Lets a domain have up to `max` message interrupts.
///
/// # Errors
/// `EPERM` for more than this domain may have, `ESRCH`.
pub fn set_message_limit(domain: DomId, max: u32) -> Result<(), Errno> {
    plain(domain, MessagePermission { max, pad0: 0 }).map(drop)
}

/// Fills a frame of the domain with hypercall stubs.
///
/// # Errors
/// `EINVAL` when the frame is not a writable one of the domain.
pub fn hypercall_page(domain: DomId, mfn: Mfn) -> Result<(), Errno> {
    plain(domain, HypercallPage { mfn }).map(drop)
}

/// Fills one of the reserved grant entries of a domain that is being built.
///
/// # Errors
/// As [`GrantSeed`] says.
pub fn grant_seed(domain: DomId, gref: GrantRef, peer: DomId, mfn: Mfn) -> Result<(), Errno> {
    plain(domain, GrantSeed { gref, peer, readonly: 0, mfn }).map(drop)
}

/// Sets the whole state of a vCPU of a paused domain.
///
/// # Errors
/// As [`SetVcpuContext`] says.
pub fn set_vcpu_context(domain: DomId, vcpu: u32, context: &VcpuGuestContext) -> Result<(), Errno> {
    let handle = GuestHandle::new((&raw const *context) as u64);
    // SAFETY: the context lives through the call and is only read.
    unsafe { op(domain, &mut SetVcpuContext { vcpu, pad0: 0, context: handle }) }.map(drop)
}

/// Reads the whole state of a vCPU of a paused domain.
///
/// # Errors
/// As [`GetVcpuContext`] says.
pub fn get_vcpu_context(domain: DomId, vcpu: u32, context: &mut VcpuGuestContext) -> Result<(), Errno> {
    let handle = GuestHandle::new((&raw mut *context) as u64);
    // SAFETY: the context lives through the call, and any bytes are valid in it.
    unsafe { op(domain, &mut GetVcpuContext { vcpu, pad0: 0, context: handle }) }.map(drop)
}

/// State of one domain.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn domain_info(domain: DomId) -> Result<DomainInfo, Errno> {
    plain(domain, DomainInfo::default())
}

/// State of one vCPU.
///
/// # Errors
/// `ENOENT` when there is no such vCPU, `ESRCH`, `EPERM`.
pub fn vcpu_info(domain: DomId, vcpu: u32) -> Result<VcpuInfo, Errno> {
    plain(domain, VcpuInfo { vcpu, ..VcpuInfo::default() })
}

/// State of all domains, in the order of their numbers.
///
/// # Errors
/// `EPERM`.
pub fn list_domains() -> Result<Vec<DomainInfo>, Errno> {
    list(0)
}

/// State of all domains that have shut down and that nobody destroys yet.
///
/// # Errors
/// `EPERM`.
pub fn list_ended() -> Result<Vec<DomainInfo>, Errno> {
    list(1)
}

fn list(only_ended: u16) -> Result<Vec<DomainInfo>, Errno> {
    const AT_ONCE: usize = 8;
    let mut all: Vec<DomainInfo> = Vec::new();
    loop {
        let first = match all.last() {
            Some(last) => DomId::new(last.domid.get() + 1),
            None => DomId::ZERO,
        };
        let mut list = [DomainInfo::default(); AT_ONCE];
        let mut request = ListDomains {
            first,
            only_ended,
            max: AT_ONCE as u32,
            buffer: GuestHandle::new(list.as_mut_ptr() as u64),
            ..ListDomains::default()
        };
        // SAFETY: room for `max` entries, alive through the call; any bytes are valid in them.
        unsafe { op(DomId::SELF, &mut request)? };
        if request.count == 0 {
            return Ok(all);
        }
        all.extend(list.into_iter().take(request.count as usize));
    }
}

/// Facts about the machine and the hypervisor.
///
/// # Errors
/// `EPERM`.
pub fn phys_info() -> Result<PhysInfo, Errno> {
    plain(DomId::SELF, PhysInfo::default())
}

/// Reads the hypervisor's log from byte `index` on. Gives the bytes read, the next index and how many bytes were lost.
///
/// # Errors
/// `EPERM`; `ENOSYS` on a hypervisor that keeps no log.
pub fn read_log(index: u64, buffer: &mut [u8]) -> Result<(usize, u64, u64), Errno> {
    let mut request = ReadLog {
        index,
        buffer: GuestHandle::new(buffer.as_mut_ptr() as u64),
        len: u32::try_from(buffer.len()).unwrap_or(u32::MAX),
        ..ReadLog::default()
    };
    // SAFETY: as many bytes of room as it says, alive through the call.
    unsafe { op(DomId::SELF, &mut request)? };
    Ok(((request.copied as usize).min(buffer.len()), request.index, request.skipped))
}

/// Sets how much the hypervisor logs: 0 nothing to 5 everything. Gives the level before.
///
/// # Errors
/// `EINVAL` above 5; `EPERM`.
pub fn set_log_level(level: u32) -> Result<u32, Errno> {
    plain(DomId::SELF, SetLogLevel { level, ..SetLogLevel::default() }).map(|answer| answer.level)
}

/// Ends another domain with a reason, as if it had shut down itself.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn remote_shutdown(domain: DomId, reason: ShutdownReason) -> Result<(), Errno> {
    let argument = SchedRemoteShutdown { domain_id: domain, pad0: 0, reason: reason.number() };
    // SAFETY: the command's own argument, alive through the call.
    unsafe { stub::sched_op(u64::from(SchedOp::RemoteShutdown.number()), (&raw const argument) as u64) }
        .map(drop)
}

/// Makes a port of `domain` that `remote` may connect to.
///
/// # Errors
/// `ESRCH`, `EPERM`, `ENOSPC`.
pub fn alloc_unbound_for(domain: DomId, remote: DomId) -> Result<Port, Errno> {
    let mut argument = EvtchnAllocUnbound { dom: domain, remote_dom: remote, port: Port::new(0) };
    // SAFETY: the command's own argument, alive through the call.
    unsafe {
        stub::event_channel_op(u64::from(EvtchnOp::AllocUnbound.number()), (&raw mut argument) as u64)?;
    }
    Ok(argument.port)
}

/// Connects to a port of another domain, as [`Events::bind_interdomain`](crate::events::Events::bind_interdomain) does.
///
/// # Errors
/// `EINVAL`, `ESRCH`.
pub fn connect(remote: DomId, port: Port) -> Result<Channel, Errno> {
    crate::events::Events::new().bind_interdomain(remote, port)
}

/// Maps a page that a domain grants to this one, writable.
///
/// # Errors
/// As [`Grants::map`](crate::grants::Grants::map).
pub fn map_granted(domain: DomId, grant: GrantRef) -> Result<Mapping, GrantError> {
    Grants::new().map(domain, &[grant], Access::ReadWrite)
}

/// Maps pages that a domain grants to this one, writable and side by side.
///
/// # Errors
/// As [`Grants::map`](crate::grants::Grants::map).
pub fn map_granted_pages(domain: DomId, grants: &[GrantRef]) -> Result<Mapping, GrantError> {
    Grants::new().map(domain, grants, Access::ReadWrite)
}

/// Gives pages to a domain one by one: see [`populate_blocks`].
///
/// # Errors
/// As there.
pub fn populate(domain: DomId, frames: &mut [u64]) -> Result<(), (usize, Errno)> {
    populate_blocks(domain, 0, frames)
}

/// Gives pages to a domain, 2^`order` that lie behind each other for each of `frames`: it holds the first guest frame number of each
/// block, and on success the first machine frame.
///
/// # Errors
/// `ENOMEM` with the number of blocks that there were, when memory or the domain's limit ran out; `ESRCH`, `EPERM`.
pub fn populate_blocks(domain: DomId, order: u32, frames: &mut [u64]) -> Result<(), (usize, Errno)> {
    let mut request = MemoryReservation {
        extent_start: GuestHandle::new(frames.as_mut_ptr() as u64),
        nr_extents: frames.len() as u64,
        extent_order: order,
        mem_flags: 0,
        domid: domain,
        pad0: [0; 3],
    };
    // SAFETY: the list is as long as it says, alive through the call.
    let done =
        unsafe { stub::memory_op(u64::from(MemoryOp::PopulatePhysmap.number()), (&raw mut request) as u64) };
    match done {
        Ok(done) if done as usize == frames.len() => Ok(()),
        Ok(done) => Err((done as usize, Errno::ENOMEM)),
        Err(error) => Err((0, error)),
    }
}

/// Stores page-table entries of another domain, each checked as its own would be.
///
/// # Errors
/// The first refusal, with the number of entries stored before it.
///
/// # Safety
/// The entries are in tables of `domain`, which is not this one.
pub unsafe fn mmu_update_for(domain: DomId, requests: &[MmuUpdate]) -> Result<(), (usize, Errno)> {
    // The domain whose tables they are is in the upper half, plus one; the one whose frames they map in the lower.
    let who = u64::from(domain.get()) | (u64::from(domain.get()) + 1) << 16;
    let mut done = 0u32;
    // SAFETY: as many requests as it says; the tables are not ours.
    unsafe { stub::mmu_update(requests.as_ptr() as u64, requests.len() as u64, (&raw mut done) as u64, who) }
        .map(drop)
        .map_err(|error| (done as usize, error))
}

/// Notes guest frame numbers of another domain's machine frames in the machine-to-physical table.
///
/// # Errors
/// `EINVAL` for a frame that is not the domain's, `EPERM`, `ESRCH`.
pub fn set_m2p(domain: DomId, frames: &[(Mfn, u64)]) -> Result<(), Errno> {
    let requests: Vec<MmuUpdate> = frames
        .iter()
        .map(|&(mfn, pfn)| MmuUpdate::new(MmuCommand::MachphysUpdate, mfn.address(), pfn))
        .collect();
    let who = u64::from(domain.get());
    // SAFETY: as many requests as it says; they touch no page table.
    unsafe { stub::mmu_update(requests.as_ptr() as u64, requests.len() as u64, 0, who) }.map(drop)
}

/// Pins a frame of another domain as a page table of `level` 1 to 4, which checks it and all below it.
///
/// # Errors
/// `EINVAL` when it is no right table or `level` is none.
pub fn pin_table_for(domain: DomId, level: u32, frame: Mfn) -> Result<(), Errno> {
    let command = match level {
        1 => MmuextCmd::PinL1Table,
        2 => MmuextCmd::PinL2Table,
        3 => MmuextCmd::PinL3Table,
        4 => MmuextCmd::PinL4Table,
        _ => return Err(Errno::EINVAL),
    };
    let operation = MmuextOp::new(command, frame.get(), 0);
    // SAFETY: one operation, alive through the call, about a frame that is not ours.
    unsafe { stub::mmuext_op((&raw const operation) as u64, 1, 0, u64::from(domain.get())) }.map(drop)
}

/// Frames of another domain, mapped here side by side until dropped.
#[derive(Debug)]
pub struct Foreign {
    range: Range,
    shared: Shared,
    ended: AtomicBool,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.unmap() {
            self.range.set_empty();
        }
    }
}

impl Foreign {
    /// Ends the mapping while somebody still has it: one who panicked in a [compartment](crate::compartment). The addresses stay reserved as
    /// long as this value lives, so whoever uses the frames by it afterwards faults.
    pub fn end(&self) {
        self.unmap();
    }

    /// Ends the mapping, if it has not ended; true when nothing is mapped afterwards.
    fn unmap(&self) -> bool {
        if self.ended.load(Ordering::Acquire) {
            return true;
        }
        let places = (0..self.range.pages()).map(|index| memory::leaf_address(self.range.address(index)));
        let requests: Option<Vec<MmuUpdate>> = places
            .map(|place| Some(MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place?), 0)))
            .collect();
        let Some(requests) = requests else { return false };
        // SAFETY: as many requests as it says; they end the mappings of a range that nobody uses any more, or who does is to fault.
        let ended = unsafe {
            stub::mmu_update(requests.as_ptr() as u64, requests.len() as u64, 0, u64::from(DomId::SELF.get()))
        };
        // mmu_update leaves stale translations of level-1 entries to its caller.
        memory::flush_tlb();
        self.ended.store(ended.is_ok(), Ordering::Release);
        ended.is_ok()
    }

    /// Maps frames of `domain`.
    ///
    /// # Errors
    /// `EINVAL` for a frame that is not the domain's or is in use as a table and wanted writable; `ESRCH`, `EPERM`, `ENOMEM`.
    pub fn map(domain: DomId, frames: &[Mfn], access: Access) -> Result<Foreign, Errno> {
        let range = Range::new(frames.len() as u64)?;
        let mut requests = Vec::with_capacity(frames.len());
        for (index, frame) in frames.iter().enumerate() {
            let place = memory::leaf_address(range.address(index as u64)).ok_or(Errno::EFAULT)?;
            let entry = frame.address().get() | access.bits();
            requests.push(MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place), entry));
        }
        // SAFETY: as many requests as it says; the entries are those of a fresh range, which is used as shared memory only.
        // If one is refused, dropping the range ends those before it.
        unsafe {
            stub::mmu_update(requests.as_ptr() as u64, requests.len() as u64, 0, u64::from(domain.get()))?;
        }
        // SAFETY: mapped, for as long as the range lives.
        let shared = unsafe { Shared::new(range.start(), frames.len() * PAGE_SIZE) };
        Ok(Foreign { range, shared, ended: AtomicBool::new(false) })
    }

    /// Where the first frame is mapped.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.range.start()
    }

    /// Fills bytes.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn fill(&self, offset: usize, bytes: usize, value: u8) {
        let chunk = [value; 256];
        let mut at = 0;
        while at < bytes {
            let now = (bytes - at).min(chunk.len());
            self.shared.write_bytes(offset + at, chunk.get(..now).unwrap_or(&[]));
            at += now;
        }
    }
}

crate::ring::shared_by_field!(Foreign);

//! Typed wrappers, by family, for what the rest of the SDK does not already offer as values.

use super::{issue, issue_on, stub};
use alloc::vec::Vec;
use hypercall_abi::callback::CallbackRegister;
use hypercall_abi::memory::{
    E820Entry, MachphysMapping, MemoryDomain, MemoryExchange, MemoryMap, MemoryReservation,
};
use hypercall_abi::mmu::{MmuUpdate, MmuextOp, MulticallEntry};
use hypercall_abi::nmi::NmiCallback;
use hypercall_abi::physdev::PhysdevSetIopl;
use hypercall_abi::sched::{SchedPoll, SchedWatchdog};
use hypercall_abi::subops::{
    ConsoleIoOp, MemoryOp, NmiOp, SchedOp, SegmentBase, VcpuOp, VersionOp, VmAssist, VmAssistCmd,
};
use hypercall_abi::subops::{callback, physdev, sched, vcpu, version, xenmem};
use hypercall_abi::table::TypedOperation;
use hypercall_abi::vcpu::{RunstateInfo, TrapInfo, VcpuSetPeriodicTimer, VcpuSetSingleshotTimer};
use hypercall_abi::version::{CompileInfo, FeatureInfo, Features, PlatformParameters};
use hypercall_abi::{DomId, Errno, GuestHandle, MachAddr, Mfn, Port};
use zerocopy::{FromBytes, FromZeros};

fn at<T>(argument: &mut T) -> u64 {
    (&raw mut *argument) as u64
}

// ── xen_version ──

fn version_op<T: FromBytes>(operation: VersionOp) -> Result<T, Errno> {
    let mut answer = T::new_zeroed();
    // SAFETY: the callers below name the type that the hypervisor writes; any bytes are valid in it.
    unsafe { stub::xen_version(u64::from(operation.number()), at(&mut answer))? };
    Ok(answer)
}

/// The hypervisor's version: major and minor.
///
/// # Errors
/// None that a hypervisor gives.
pub fn version() -> Result<(u16, u16), Errno> {
    // SAFETY: no pointer.
    let number = unsafe { stub::xen_version(u64::from(VersionOp::Version.number()), 0)? };
    Ok(((number >> 16) as u16, number as u16))
}

/// The text after the version, up to its zero.
///
/// # Errors
/// `EFAULT` only.
pub fn extra_version() -> Result<[u8; 16], Errno> {
    version_op(VersionOp::Extraversion)
}

/// Compiler, builder and date; emptied for unprivileged domains by some hypervisors.
///
/// # Errors
/// `EFAULT` only.
pub fn compile_info() -> Result<CompileInfo, Errno> {
    version_op(VersionOp::CompileInfo)
}

/// Where the hypervisor's range of addresses begins.
///
/// # Errors
/// `EFAULT` only.
pub fn platform_parameters() -> Result<PlatformParameters, Errno> {
    version_op(VersionOp::PlatformParameters)
}

/// What a guest may rely on.
///
/// # Errors
/// `EFAULT` only.
pub fn features() -> Result<Features, Errno> {
    let mut info = FeatureInfo::default();
    // SAFETY: the command's own argument, alive through the call.
    unsafe { issue::<version::GetFeatures>(&mut info)? };
    Ok(Features::from_bits_retain(info.submap))
}

/// The 16 bytes that tools name the domain by.
///
/// # Errors
/// `EFAULT` only.
pub fn domain_handle() -> Result<[u8; 16], Errno> {
    version_op(VersionOp::GuestHandle)
}

// ── sched_op ──

/// Lets others run.
pub fn yield_now() {
    // SAFETY: no pointer.
    let _ = unsafe { stub::sched_op(u64::from(SchedOp::Yield.number()), 0) };
}

/// Sleeps until one of `ports` is pending or system time reaches `deadline_ns` (0: no limit). Events stay masked.
///
/// # Errors
/// `EINVAL` for more than 128 ports or one that cannot exist.
pub fn poll(ports: &[Port], deadline_ns: u64) -> Result<(), Errno> {
    let mut argument = SchedPoll {
        ports: GuestHandle::new(ports.as_ptr() as u64),
        nr_ports: u32::try_from(ports.len()).unwrap_or(u32::MAX),
        pad0: 0,
        timeout: deadline_ns,
    };
    // SAFETY: the command's own argument and a live list of ports.
    unsafe { issue::<sched::Poll>(&mut argument) }.map(drop)
}

/// Arms (`id` 0), pokes or, with `seconds` 0, disarms a watchdog that ends the domain. Gives the watchdog's number when new.
///
/// # Errors
/// `ENOSPC` when all are in use, `EINVAL` for a number that is none.
pub fn watchdog(id: u32, seconds: u32) -> Result<u32, Errno> {
    let mut argument = SchedWatchdog { id, timeout: seconds };
    // SAFETY: the command's own argument.
    unsafe { issue::<sched::Watchdog>(&mut argument) }.map(|id| id as u32)
}

// ── vcpu_op, timers ──

/// Whether a vCPU is up.
///
/// # Errors
/// `ENOENT` past the last one.
pub fn vcpu_is_up(vcpu: u32) -> Result<bool, Errno> {
    // SAFETY: no pointer.
    unsafe { stub::vcpu_op(u64::from(VcpuOp::IsUp.number()), u64::from(vcpu), 0) }.map(|up| up != 0)
}

/// Times that a vCPU of this domain has spent in each state.
///
/// # Errors
/// `ENOENT` past the last one.
pub fn runstate(vcpu: u32) -> Result<RunstateInfo, Errno> {
    let mut answer = RunstateInfo::new_zeroed();
    // SAFETY: the command's own argument.
    unsafe { issue_on::<vcpu::GetRunstateInfo>(vcpu, &mut answer)? };
    Ok(answer)
}

/// Starts the vCPU's periodic timer, which raises the timer interrupt.
///
/// # Errors
/// `EINVAL` below a millisecond.
pub fn set_periodic_timer(vcpu: u32, period_ns: u64) -> Result<(), Errno> {
    let mut argument = VcpuSetPeriodicTimer { period_ns };
    // SAFETY: the command's own argument.
    unsafe { issue_on::<vcpu::SetPeriodicTimer>(vcpu, &mut argument) }.map(drop)
}

/// Stops it.
///
/// # Errors
/// `ENOENT` past the last vCPU.
pub fn stop_periodic_timer(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: no pointer.
    unsafe { stub::vcpu_op(u64::from(VcpuOp::StopPeriodicTimer.number()), u64::from(vcpu), 0) }.map(drop)
}

/// Sets the vCPU's one-shot timer, which [`crate::time`] uses too.
///
/// # Errors
/// `ETIME` for a time that has passed when `only_future`.
pub fn set_singleshot_timer(vcpu: u32, deadline_ns: u64, only_future: bool) -> Result<(), Errno> {
    let mut argument =
        VcpuSetSingleshotTimer { timeout_abs_ns: deadline_ns, flags: u32::from(only_future), pad0: 0 };
    // SAFETY: the command's own argument.
    unsafe { issue_on::<vcpu::SetSingleshotTimer>(vcpu, &mut argument) }.map(drop)
}

// ── memory_op ──

fn query<O: TypedOperation<Argument = MemoryDomain>>(domain: DomId) -> Result<u64, Errno> {
    let mut argument = MemoryDomain { domid: domain };
    // SAFETY: the command's own argument.
    unsafe { issue::<O>(&mut argument) }
}

/// Pages that a domain has.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn current_reservation(domain: DomId) -> Result<u64, Errno> {
    query::<xenmem::CurrentReservation>(domain)
}

/// Pages that a domain may have.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn maximum_reservation(domain: DomId) -> Result<u64, Errno> {
    query::<xenmem::MaximumReservation>(domain)
}

/// The highest machine frame number, plus one.
///
/// # Errors
/// None that a hypervisor gives.
pub fn maximum_ram_page() -> Result<u64, Errno> {
    // SAFETY: no pointer.
    unsafe { stub::memory_op(u64::from(MemoryOp::MaximumRamPage.number()), 0) }
}

/// Where the machine-to-physical table is mapped.
///
/// # Errors
/// `EFAULT` only.
pub fn machphys_mapping() -> Result<MachphysMapping, Errno> {
    let mut answer = MachphysMapping::default();
    // SAFETY: the command's own argument.
    unsafe { issue::<xenmem::MachphysMapping>(&mut answer)? };
    Ok(answer)
}

/// The domain's memory map; `ENOSYS` when nobody has set one.
///
/// # Errors
/// `ENOSYS`.
pub fn memory_map() -> Result<Vec<E820Entry>, Errno> {
    let mut list = alloc::vec![E820Entry::default(); 128];
    let mut argument =
        MemoryMap { nr_entries: 128, pad0: 0, buffer: GuestHandle::new(list.as_mut_ptr() as u64) };
    // SAFETY: the command's own argument, with room for as many entries as it says.
    unsafe { issue::<xenmem::MemoryMap>(&mut argument)? };
    list.truncate(argument.nr_entries as usize);
    Ok(list)
}

/// `increase_reservation`, `decrease_reservation` or `populate_physmap`; gives the number of extents done.
///
/// # Errors
/// As the hypervisor says.
///
/// # Safety
/// The list in `request` is as long as it says, and frames that go away are not Rust's.
pub unsafe fn reservation(operation: MemoryOp, request: &mut MemoryReservation) -> Result<u64, Errno> {
    // SAFETY: the caller's.
    unsafe { stub::memory_op(u64::from(operation.number()), at(request)) }
}

/// Exchanges frames for others.
///
/// # Errors
/// As the hypervisor says; `nr_exchanged` tells how far it got.
///
/// # Safety
/// The lists are as long as they say, and frames that go away are not Rust's.
pub unsafe fn exchange(request: &mut MemoryExchange) -> Result<(), Errno> {
    // SAFETY: the caller's.
    unsafe { issue::<xenmem::Exchange>(request) }.map(drop)
}

// ── page tables ──

/// Stores page-table or machine-to-physical entries. `who` is as in the ABI: the frames' owner, and in the upper half, plus
/// one, the tables' owner.
///
/// # Errors
/// The first refusal, with the number of requests done before it.
///
/// # Safety
/// Rust's memory stays as Rust expects it.
pub unsafe fn mmu_update(requests: &[MmuUpdate], who: u32) -> Result<(), (u32, Errno)> {
    let mut done = 0u32;
    let list = requests.as_ptr() as u64;
    // SAFETY: as many requests as it says; the rest is the caller's.
    unsafe { stub::mmu_update(list, requests.len() as u64, at(&mut done), u64::from(who)) }
        .map(drop)
        .map_err(|error| (done, error))
}

/// Pins, unpins, switches roots, flushes, sets the LDT.
///
/// # Errors
/// The first refusal, with the number of operations done before it.
///
/// # Safety
/// Rust's memory stays as Rust expects it.
pub unsafe fn mmuext_op(operations: &[MmuextOp], who: DomId) -> Result<(), (u32, Errno)> {
    let mut done = 0u32;
    let list = operations.as_ptr() as u64;
    // SAFETY: as many operations as it says; the rest is the caller's.
    unsafe { stub::mmuext_op(list, operations.len() as u64, at(&mut done), u64::from(who.get())) }
        .map(drop)
        .map_err(|error| (done, error))
}

/// Stores the entry that maps an address; `flags` is a `UVMF_*`.
///
/// # Errors
/// As the hypervisor says.
///
/// # Safety
/// Rust's memory stays as Rust expects it.
pub unsafe fn update_va_mapping(address: u64, entry: u64, flags: u64) -> Result<(), Errno> {
    // SAFETY: the caller's.
    unsafe { stub::update_va_mapping(address, entry, flags) }.map(drop)
}

/// Runs a list of hypercalls; each has its result in its entry.
///
/// # Errors
/// When the list as such is refused.
///
/// # Safety
/// Each call is as its own rules want it.
pub unsafe fn multicall(entries: &mut [MulticallEntry]) -> Result<(), Errno> {
    // SAFETY: as many entries as it says; the rest is the caller's.
    unsafe { stub::multicall(entries.as_mut_ptr() as u64, entries.len() as u64) }.map(drop)
}

// ── CPU state ──

/// Loads entries into the trap table; the list ends with an entry whose address is 0.
///
/// # Errors
/// `EINVAL` for a list without end.
///
/// # Safety
/// The handlers are fit to be entered by the vectors they are for.
pub unsafe fn set_trap_table(entries: &[TrapInfo]) -> Result<(), Errno> {
    if entries.last().is_none_or(|last| last.address != 0) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: the list has an end; the rest is the caller's.
    unsafe { stub::set_trap_table(entries.as_ptr() as u64) }.map(drop)
}

/// Puts back the runtime's own trap table, for tests that changed it.
///
/// # Errors
/// As the hypervisor says.
pub fn restore_trap_table() -> Result<(), Errno> {
    crate::rt::start::register_traps()
}

/// Puts back the runtime's own callbacks.
///
/// # Errors
/// As the hypervisor says.
pub fn restore_callbacks() -> Result<(), Errno> {
    crate::rt::start::register_callbacks()
}

/// Registers an entry point.
///
/// # Errors
/// `ENOSYS` for a kind that is not there, `EINVAL` for an address that is not canonical.
///
/// # Safety
/// The address is fit to be entered so.
pub unsafe fn register_callback(argument: &mut CallbackRegister) -> Result<(), Errno> {
    // SAFETY: the command's own argument; the rest is the caller's.
    unsafe { issue::<callback::Register>(argument) }.map(drop)
}

/// Replaces the descriptor table by read-only frames with `entries` entries.
///
/// # Errors
/// `EINVAL` for too many entries or frames with descriptors that no guest may have.
///
/// # Safety
/// The selectors in use stay what they are.
pub unsafe fn set_gdt(frames: &[Mfn], entries: usize) -> Result<(), Errno> {
    if frames.len() < entries.div_ceil(512) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: the list is long enough for the entries; the rest is the caller's.
    unsafe { stub::set_gdt(frames.as_ptr() as u64, entries as u64) }.map(drop)
}

/// Writes one descriptor at a machine address.
///
/// # Errors
/// `EINVAL`.
///
/// # Safety
/// The frame is not Rust's, or Rust expects the change.
pub unsafe fn update_descriptor(address: MachAddr, descriptor: u64) -> Result<(), Errno> {
    // SAFETY: the caller's.
    unsafe { stub::update_descriptor(address.get(), descriptor) }.map(drop)
}

/// Sets the guest's view of CR0.TS: while set, vector instructions raise #NM. Safe Rust may be compiled to such.
///
/// # Errors
/// None that a hypervisor gives.
///
/// # Safety
/// Cleared before Rust code that may use vector registers runs.
pub unsafe fn fpu_taskswitch(set: bool) -> Result<(), Errno> {
    // SAFETY: no pointer; the rest is the caller's.
    unsafe { stub::fpu_taskswitch(u64::from(set)) }.map(drop)
}

/// Writes a debug register.
///
/// # Errors
/// `EINVAL` for a register that is none or a breakpoint in the hypervisor's range.
pub fn set_debugreg(register: u32, value: u64) -> Result<(), Errno> {
    // SAFETY: no pointer; a breakpoint that hits is reported as an exception.
    unsafe { stub::set_debugreg(u64::from(register), value) }.map(drop)
}

/// Reads a debug register.
///
/// # Errors
/// `EINVAL` for a register that is none.
pub fn get_debugreg(register: u32) -> Result<u64, Errno> {
    // SAFETY: no pointer.
    unsafe { stub::get_debugreg(u64::from(register)) }
}

/// Sets a segment base or the user GS selector; the SDK uses neither FS nor GS.
///
/// # Errors
/// `EINVAL` for a base that is not canonical.
pub fn set_segment_base(which: SegmentBase, base: u64) -> Result<(), Errno> {
    // SAFETY: no pointer; nothing of Rust's is reached through FS or GS.
    unsafe { stub::set_segment_base(u64::from(which.number()), base) }.map(drop)
}

/// Turns an assist on or off.
///
/// # Errors
/// `ENOSYS` or `EINVAL` for one that is not there.
pub fn vm_assist(command: VmAssistCmd, assist: VmAssist) -> Result<(), Errno> {
    // SAFETY: no pointer.
    unsafe { stub::vm_assist(u64::from(command.number()), u64::from(assist.number())) }.map(drop)
}

/// Registers or unregisters the NMI callback.
///
/// # Errors
/// `EINVAL`.
///
/// # Safety
/// The address is fit to be entered by an NMI.
pub unsafe fn nmi_op(operation: NmiOp, argument: &mut NmiCallback) -> Result<(), Errno> {
    // SAFETY: the command's own argument; the rest is the caller's.
    unsafe { stub::nmi_op(u64::from(operation.number()), at(argument)) }.map(drop)
}

// ── the rest ──

/// Sets the vCPU's I/O privilege level, which decides what is emulated.
///
/// # Errors
/// `EINVAL` above 3.
pub fn set_iopl(level: u32) -> Result<(), Errno> {
    let mut argument = PhysdevSetIopl { iopl: level };
    // SAFETY: the command's own argument.
    unsafe { issue::<physdev::SetIopl>(&mut argument) }.map(drop)
}

/// Writes to the hypervisor's console.
///
/// # Errors
/// `EPERM` for a domain without the right.
pub fn console_write(text: &[u8]) -> Result<(), Errno> {
    let command = u64::from(ConsoleIoOp::Write.number());
    // SAFETY: the hypervisor reads as many bytes of a live slice.
    unsafe { stub::console_io(command, text.len() as u64, text.as_ptr() as u64) }.map(drop)
}

//! More vCPUs than the first.
//!
//! The runtime is made for one vCPU: its console, its heap and its executor belong to the first. What runs on another one is a
//! function that lives by atomics, raw hypercalls ([`crate::hypercall`]) and this module. Its events are masked for ever; it
//! waits by polling ports ([`crate::hypercall::poll`]). Exceptions at listed instructions are mended as on the first vCPU,
//! others are printed and end the domain.
//!
//! ```ignore
//! extern "C" fn count(id: u32) {
//!     loop { ROUNDS[id as usize].fetch_add(1, Ordering::Relaxed); }
//! }
//! // SAFETY: it uses an atomic.
//! unsafe { vcpu::start(1, count)? };
//! ```

use crate::hypercall::{issue_on, stub};
use crate::memory::{self, Page};
use crate::rt::{start, trap};
use alloc::boxed::Box;
use core::sync::atomic::{Ordering, fence};
use hypercall_abi::segment::{FLAT_KERNEL_CS, FLAT_KERNEL_SS};
use hypercall_abi::shared_info::LEGACY_MAX_VCPUS;
use hypercall_abi::subops::{VcpuOp, vcpu as operations};
use hypercall_abi::vcpu::{TrapInfo, VcpuContextFlags, VcpuGuestContext, VcpuInfo, VcpuRegisterVcpuInfo};
use hypercall_abi::{Errno, PAGE_SIZE};
use spin::Once;

/// Bytes of the stack of a vCPU that [`start`] starts.
pub const STACK_SIZE: usize = 16 * 1024;
/// Most vCPUs that this module has room for: as many as hypervisors give a PV guest of ours.
pub const MAX: u32 = 64;

/// The page with the `vcpu_info` of vCPUs that shared_info has no room for, by number.
static INFOS: Once<u64> = Once::new();

fn infos() -> Result<u64, Errno> {
    // The hypervisor keeps the page for as long as the domain lives.
    const { assert!(MAX as usize * size_of::<VcpuInfo>() <= PAGE_SIZE) };
    INFOS.try_call_once(|| Ok(Page::new()?.leak())).copied()
}

/// Tells the hypervisor where the `vcpu_info` of a vCPU is that has none in shared_info. Without, it cannot be started.
///
/// # Errors
/// `EINVAL` when it is registered already, `ENOENT` when there is no such vCPU; no memory.
pub fn register_info(id: u32) -> Result<(), Errno> {
    let page = infos()?;
    let mut place = VcpuRegisterVcpuInfo {
        mfn: memory::translate(page).ok_or(Errno::EFAULT)?.get(),
        offset: id % MAX * size_of::<VcpuInfo>() as u32,
        rsvd: 0,
    };
    // SAFETY: the page is leaked: nobody else uses it again.
    unsafe { issue_on::<operations::RegisterVcpuInfo>(id, &mut place) }.map(drop)
}

/// The `vcpu_info` of a vCPU: in shared_info, or where [`register_info`] has put it; null if it has none.
#[must_use]
pub fn info(id: u32) -> *mut VcpuInfo {
    if (id as usize) < LEGACY_MAX_VCPUS {
        // SAFETY: the index is below the length of the array; a place in the mapped page is computed.
        return unsafe { (&raw mut (*start::shared_info()).vcpu_info).cast::<VcpuInfo>().add(id as usize) };
    }
    match INFOS.get() {
        // SAFETY: inside the page.
        Some(page) if id < MAX => unsafe { (*page as *mut VcpuInfo).add(id as usize) },
        _ => core::ptr::null_mut(),
    }
}

/// System time as a vCPU's own clock record tells it, in nanoseconds; for the vCPU that this runs on.
#[must_use]
pub fn now_ns(id: u32) -> u64 {
    let info = info(id);
    if info.is_null() {
        return 0;
    }
    loop {
        // SAFETY: the record stays mapped; the hypervisor writes it, so only a copy counts that has the same even version before
        // and after.
        let record = unsafe { (&raw const (*info).time).read_volatile() };
        fence(Ordering::SeqCst);
        let tsc = crate::time::tsc();
        fence(Ordering::SeqCst);
        // SAFETY: as above.
        let version = unsafe { (&raw const (*info).time.version).read_volatile() };
        if version & 1 == 0 && version == record.version {
            return record.system_time_at(tsc);
        }
    }
}

/// Registers with which a vCPU begins at `entry` in the guest's kernel mode: on the stack that ends at `stack_end`, with the
/// runtime's exception handlers and the page tables in force.
#[must_use]
pub fn context(entry: u64, stack_end: u64, argument: u64) -> Box<VcpuGuestContext> {
    let mut context = Box::new(VcpuGuestContext::ZERO);
    context.flags = VcpuContextFlags::IN_KERNEL.bits();
    // FXSAVE image: x87 control word and MXCSR as after a reset of the FPU.
    context.fpu_ctxt[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    context.fpu_ctxt[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    context.user_regs.rip = entry;
    // At a function's first instruction rsp is 8 below a multiple of 16.
    context.user_regs.rsp = (stack_end & !15) - 8;
    context.user_regs.rdi = argument;
    context.user_regs.cs = FLAT_KERNEL_CS;
    context.user_regs.ss = FLAT_KERNEL_SS;
    context.user_regs.rflags = 0x200;
    context.kernel_ss = u64::from(FLAT_KERNEL_SS);
    context.kernel_sp = stack_end & !15;
    // CR0: protection and paging, as on the first vCPU.
    context.ctrlreg[0] = 1 << 31 | 1;
    context.ctrlreg[3] = memory::root().address().get();
    for (vector, address, privilege) in trap::vectors() {
        context.trap_ctxt[usize::from(vector)] = TrapInfo {
            vector,
            flags: privilege | TrapInfo::MASK_EVENTS,
            cs: FLAT_KERNEL_CS,
            pad0: 0,
            address,
        };
    }
    context
}

/// Gives a vCPU that is down its first registers.
///
/// # Errors
/// `EEXIST` when it has some already, `EINVAL` when it has no `vcpu_info`, `ENOENT` when there is no such vCPU.
///
/// # Safety
/// What the vCPU does when it is up is sound: see [`start`].
pub unsafe fn initialise(id: u32, context: &mut VcpuGuestContext) -> Result<(), Errno> {
    // SAFETY: the caller's.
    unsafe { issue_on::<operations::Initialise>(id, context) }.map(drop)
}

fn command(operation: VcpuOp, id: u32) -> Result<u64, Errno> {
    // SAFETY: the operations below take no argument and change no memory.
    unsafe { stub::vcpu_op(u64::from(operation.number()), u64::from(id), 0) }
}

/// Lets a vCPU run from where it is.
///
/// # Errors
/// `EINVAL` when it has no registers yet, `ENOENT` when there is no such vCPU.
pub fn up(id: u32) -> Result<(), Errno> {
    command(VcpuOp::Up, id).map(drop)
}

/// Stops a vCPU until [`up`]. One that stops itself goes on behind this call. If none is left, the domain powers off.
///
/// # Errors
/// `ENOENT` when there is no such vCPU.
pub fn down(id: u32) -> Result<(), Errno> {
    command(VcpuOp::Down, id).map(drop)
}

/// Whether a vCPU is up.
///
/// # Errors
/// `ENOENT` when there is no such vCPU.
pub fn is_up(id: u32) -> Result<bool, Errno> {
    crate::hypercall::vcpu_is_up(id)
}

/// Starts a vCPU that was never up, on a stack of its own, with `run`. When `run` returns, the vCPU is down for good.
///
/// # Errors
/// `EEXIST` when it was started before, `ENOENT` when there is no such vCPU, `EINVAL` from [`MAX`] on; no memory.
///
/// # Safety
/// `run` uses nothing that belongs to the first vCPU: no heap, no console, no events, no memory that is not shared by atomics.
pub unsafe fn start(id: u32, run: extern "C" fn(u32)) -> Result<(), Errno> {
    if id >= MAX {
        return Err(Errno::EINVAL);
    }
    if id as usize >= LEGACY_MAX_VCPUS {
        register_info(id)?;
    }
    // SAFETY: the caller's.
    unsafe { initialise(id, &mut at(id, run))? };
    up(id)
}

/// Registers with which vCPU `id` begins with `run`, on a new stack; when `run` returns, the vCPU is down for good.
#[must_use]
pub fn at(id: u32, run: extern "C" fn(u32)) -> Box<VcpuGuestContext> {
    // Kept for ever: nobody can tell when the vCPU has left it.
    let stack = alloc::vec![0u64; STACK_SIZE / 8].leak();
    let end = stack.as_mut_ptr_range().end as u64;
    let mut context = context(begin as *const () as u64, end, run as *const () as u64);
    context.user_regs.rsi = u64::from(id);
    context
}

extern "C" fn begin(run: extern "C" fn(u32), id: u64) -> ! {
    run(id as u32);
    loop {
        // It exists: this is it.
        let _ = down(id as u32);
    }
}

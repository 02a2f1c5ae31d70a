//! From the first instruction to `main`.

use crate::console;
use crate::hypercall::stub;
use crate::memory;
use crate::rt::trap::{self, TrapFrame};
use crate::rt::{heap, panic};
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::callback::{CALLBACKF_MASK_EVENTS, CallbackRegister};
use hypercall_abi::segment::FLAT_KERNEL_CS;
use hypercall_abi::shared_info::{LEGACY_MAX_VCPUS, SharedInfo};
use hypercall_abi::start_info::{StartFlags, StartInfo};
use hypercall_abi::subops::{CallbackOp, CallbackType};
use hypercall_abi::vcpu::TrapInfo;
use hypercall_abi::{Errno, VirtAddr};
use spin::Once;

unsafe extern "C" {
    fn __guest_main() -> !;
    static __image_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __stack_guard: u8;
    static __image_end: u8;
    static __shared_info: u8;
}

static START_PAGE: Once<StartPage> = Once::new();

/// The start-info page.
pub(crate) struct StartPage(u64);

impl StartPage {
    /// What the builder wrote; nobody changes it while the domain runs.
    pub(crate) fn get(&self) -> &'static StartInfo {
        // SAFETY: the builder's page, mapped from the start and never unmapped, in no memory that Rust hands out.
        unsafe { &*(self.0 as *const StartInfo) }
    }

    /// Where it is mapped.
    pub(crate) fn address(&self) -> u64 {
        self.0
    }
}

/// What the builder wrote for this domain; `None` before the runtime is up.
#[must_use]
pub fn start_info() -> Option<&'static StartInfo> {
    START_PAGE.get().map(StartPage::get)
}

/// The page shared with the hypervisor.
pub(crate) fn shared_info() -> *mut SharedInfo {
    (&raw const __shared_info) as *mut SharedInfo
}

static MASKED_AT_START: AtomicU32 = AtomicU32::new(0);

/// Which `vcpu_info` of the shared page had `evtchn_upcall_mask` set when this domain began, a bit for each vCPU, also those that
/// it does not have. The runtime opens and closes the mask of vCPU 0 afterwards, so this is kept for tests.
#[must_use]
pub fn upcalls_masked_at_start() -> u32 {
    MASKED_AT_START.load(Ordering::Relaxed)
}

/// Notes the masks as they are.
fn note_upcall_masks() {
    let masked = (0..LEGACY_MAX_VCPUS).filter(|vcpu| {
        // SAFETY: shared_info is mapped, and the index is below the length of its array.
        unsafe { (&raw const (*shared_info()).vcpu_info[*vcpu].evtchn_upcall_mask).read_volatile() == 1 }
    });
    MASKED_AT_START.store(masked.fold(0, |bits, vcpu| bits | 1 << vcpu), Ordering::Relaxed);
}

/// Whether this is the first domain, whose console is the hypervisor's.
pub(crate) fn is_first_domain() -> bool {
    start_info().is_some_and(|info| info.flags().contains(StartFlags::INITDOMAIN))
}

/// Prints what happened and ends the domain.
pub(crate) fn fatal(frame: &TrapFrame) -> ! {
    let mut out = console::Emergency;
    let _ = writeln!(out, "\nguest exception {}: {}", frame.vector, trap::name(frame.vector));
    if frame.vector == 14 {
        let _ = writeln!(out, "  {}", PageFault { address: fault_address(), error: frame.error });
    }
    let _ = writeln!(out, "{frame}");
    panic::backtrace(&mut out, frame.rbp);
    crate::shutdown::crash()
}

struct PageFault {
    address: u64,
    error: u64,
}

impl core::fmt::Display for PageFault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let what = match self.error {
            error if error & 16 != 0 => "executing",
            error if error & 2 != 0 => "writing",
            _ => "reading",
        };
        let page =
            if self.error & 1 != 0 { "which the page does not allow" } else { "where nothing is mapped" };
        write!(f, "{what} address {:#x}, {page}", self.address)
    }
}

/// The address of the last page fault.
#[must_use]
pub fn fault_address() -> u64 {
    // SAFETY: shared_info is mapped; the hypervisor wrote the field before it delivered the fault.
    unsafe { (&raw const (*shared_info()).vcpu_info[0].arch.cr2).read_volatile() }
}

pub(crate) fn register_callbacks() -> Result<(), Errno> {
    let kinds = [CallbackType::Event, CallbackType::Failsafe, CallbackType::Syscall];
    for (kind, address) in kinds.into_iter().zip(trap::callbacks()) {
        let argument = CallbackRegister {
            kind: kind.number() as u16,
            flags: CALLBACKF_MASK_EVENTS,
            pad0: 0,
            address: VirtAddr::new(address),
        };
        // SAFETY: the addresses are the entry stubs.
        unsafe { stub::callback_op(u64::from(CallbackOp::Register.number()), (&raw const argument) as u64)? };
    }
    Ok(())
}

/// Registers the entry stubs in the trap table.
pub(crate) fn register_traps() -> Result<(), Errno> {
    let mut table = [TrapInfo::default(); 32];
    for (slot, (vector, address, privilege)) in table.iter_mut().zip(trap::vectors()) {
        *slot = TrapInfo {
            vector,
            flags: privilege | TrapInfo::MASK_EVENTS,
            cs: FLAT_KERNEL_CS,
            pad0: 0,
            address,
        };
    }
    // SAFETY: the list is shorter than the array, so it ends with an empty entry; the addresses are the stubs.
    unsafe { stub::set_trap_table(table.as_ptr() as u64) }.map(drop)
}

fn set_up(boot_stack: u64) -> Result<(), Errno> {
    register_traps()?;
    register_callbacks()?;
    let page = START_PAGE.get().ok_or(Errno::EINVAL)?;
    let address = |symbol: *const u8| symbol as u64;
    let image = (address(&raw const __image_start), address(&raw const __image_end));
    let (text_end, rodata_end) = (address(&raw const __text_end), address(&raw const __rodata_end));
    // The page for it lies in the image, so its tables exist.
    // SAFETY: the linker script keeps this page free for it.
    unsafe {
        memory::set_leaf(
            address(&raw const __shared_info),
            page.get().shared_info | memory::Access::ReadWrite.bits(),
        )?;
    }
    note_upcall_masks();
    let (start, bytes) = memory::init(page, image, boot_stack);
    // SAFETY: mapped by the builder and behind everything it has laid out.
    unsafe { heap::init(start, bytes) };
    crate::events::init();
    console::init();
    crate::logger::init();
    memory::protect(
        (image.0, text_end),
        (text_end, rodata_end),
        (rodata_end, image.1),
        address(&raw const __stack_guard),
    )
}

/// Sets the domain up and calls `main`.
///
/// # Safety
/// Called once, by the first instructions, with the address of start_info and the boot stack's top.
pub unsafe extern "C" fn start(start_info: u64, boot_stack: u64) -> ! {
    START_PAGE.call_once(|| StartPage(start_info));
    if let Err(error) = set_up(boot_stack) {
        let _ = writeln!(console::Emergency, "guest-sdk: cannot start: the hypervisor answers {error}");
        crate::shutdown::crash()
    }
    // SAFETY: `#[entry]` defines it; everything is set up.
    unsafe { __guest_main() }
}

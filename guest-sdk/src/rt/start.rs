//! From the first instruction to `main`.
use crate::console::Emergency;
use crate::hypercall;
use crate::rt::trap::{self, TrapFrame};
use core::fmt::Write;

unsafe extern "C" {
    fn __guest_main() -> !;
}

/// Prints what happened and ends the domain.
pub(crate) fn fatal(frame: &TrapFrame) -> ! {
    let mut out = Emergency;
    let _ = writeln!(out, "\nguest exception {}: {}", frame.vector, trap::name(frame.vector));
    let _ = writeln!(out, "{frame}");
    crate::rt::panic::backtrace(&mut out, frame.rbp);
    crate::shutdown::crash()
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TrapInfo {
    vector: u8,
    flags: u8,
    cs: u16,
    address: u64,
}

/// # Safety
/// Called once, by the first instructions.
pub unsafe extern "C" fn start(start_info: u64, boot_stack: u64) -> ! {
    let mut table = [TrapInfo { vector: 0, flags: 0, cs: 0, address: 0 }; 32];
    for (slot, (vector, address, privilege)) in table.iter_mut().zip(trap::vectors()) {
        *slot = TrapInfo { vector, flags: privilege | 4, cs: 0xe033, address };
    }
    // SAFETY: the table is complete and its addresses are stubs.
    unsafe { hypercall::raw(0, [table.as_ptr() as u64, 0, 0, 0, 0]) };
    let _ = (start_info, boot_stack);
    // SAFETY: once, with the machine ready.
    unsafe { __guest_main() }
}

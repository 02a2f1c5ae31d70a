//! Hypercalls.
use core::arch::asm;
/// Number of the iret hypercall, for the stubs.
pub(crate) const IRET: u32 = 23;

/// Issues a hypercall.
///
/// # Safety
/// The arguments are what this hypercall expects: pointers lead to live memory of the right size, and what the call
/// changes (page tables, descriptor tables, callbacks) leaves Rust's own memory as Rust expects it.
#[inline]
pub unsafe fn raw(number: u32, arguments: [u64; 5]) -> i64 {
    let [a, b, c, d, e] = arguments;
    let result;
    // SAFETY: the caller vouches for the arguments. SYSCALL destroys rcx and r11; Xen may destroy argument registers. The
    // block may use the stack (no `nostack`): an upcall frame can be pushed at rsp.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") u64::from(number) => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

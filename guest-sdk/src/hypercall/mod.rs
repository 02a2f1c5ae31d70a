//! Hypercalls: raw stubs made from the ABI's table ([`stub`]), and typed wrappers for what the rest
//! of the SDK does not offer as values.
//!
//! Wrappers give `Result<_, Errno>`. Those that can take memory from under Rust (page tables, grant mappings, callbacks,
//! descriptor tables) are unsafe; the rest of the SDK puts safe values over them.

mod typed;

pub use typed::*;

use core::arch::asm;
use hypercall_abi::{Errno, Hypercall};

/// Number of the iret hypercall, for the entry stubs.
pub(crate) const IRET: u32 = Hypercall::Iret.number() as u32;

/// Issues a hypercall by number and gives back rax.
///
/// # Safety
/// The arguments are what this hypercall expects: pointers lead to live memory of the right size, and what the call
/// changes (page tables, descriptor tables, callbacks) leaves Rust's memory as Rust expects it.
#[inline]
pub unsafe fn raw(number: u64, arguments: [u64; 5]) -> u64 {
    let [a, b, c, d, e] = arguments;
    let result;
    // SAFETY: the caller vouches for the arguments. SYSCALL destroys rcx and r11, and a hypervisor may leave anything in
    // argument registers. No `nostack`: an upcall frame can be pushed at rsp.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
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

macro_rules! make_stubs {
    ($(($number:literal, $variant:ident, $name:ident, $caller:ident, ($($argument:ident),*), $answer:tt, $doc:literal, $facts:tt);)*) => {
        /// One function per row of the ABI's table, arguments as registers.
        ///
        /// # Safety
        /// All of them as [`raw`].
        #[allow(clippy::missing_safety_doc, reason = "said once for all of them")]
        pub mod stub {
            use super::{raw, Errno, Hypercall};
            $(
                #[doc = $doc]
                ///
                /// # Errors
                /// As the hypervisor says.
                #[inline]
                pub unsafe fn $name($($argument: u64),*) -> Result<u64, Errno> {
                    #[allow(unused_mut, reason = "for calls without arguments")]
                    let mut registers = [0u64; 5];
                    let mut _given = [$($argument),*].into_iter();
                    for (register, _value) in registers.iter_mut().zip(_given) {
                        let _value: u64 = _value;
                        *register = _value;
                    }
                    // SAFETY: the caller's.
                    Errno::check(unsafe { raw(Hypercall::$variant.number(), registers) })
                }
            )*
        }
    };
}

hypercall_abi::for_each_hypercall!(make_stubs);

/// Copies memory that others may write, in assembly, so that the compiler assumes nothing about it.
///
/// # Safety
/// `from` readable and `to` writable for `bytes`; no overlap.
#[inline]
pub(crate) unsafe fn copy_volatile(to: *mut u8, from: *const u8, bytes: usize) {
    // SAFETY: the caller's.
    unsafe { crate::rt::bytes::copy(to, from, bytes) };
}

//! Hypercalls: raw stubs made from the ABI's table ([`stub`]), and typed wrappers for what the rest
//! of the SDK does not offer as values.
//!
//! Wrappers give `Result<_, Errno>`. Those that can take memory from under Rust (page tables, grant mappings, callbacks,
//! descriptor tables) are unsafe; the rest of the SDK puts safe values over them.

mod typed;

pub use typed::*;

use core::arch::asm;
use hypercall_abi::table::TypedOperation;
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

/// Issues an operation of a hypercall that takes `(command, argument)`, by its type: number and argument are those of the table.
///
/// # Errors
/// As the table says for the operation.
///
/// # Safety
/// What the argument leads to, if it holds addresses, is alive and as large as it says; what the operation changes leaves
/// Rust's memory as Rust expects it.
pub unsafe fn issue<O: TypedOperation>(argument: &mut O::Argument) -> Result<u64, Errno> {
    const { assert!(O::CALL.arguments().len() == 2, "a hypercall of another form") };
    let address = (&raw mut *argument) as u64;
    // SAFETY: the argument is the operation's own and alive; the rest is the caller's.
    Errno::check(unsafe { raw(O::CALL.number(), [u64::from(O::COMMAND), address, 0, 0, 0]) })
}

/// Issues an operation of `vcpu_op` on a vCPU of this domain.
///
/// # Errors
/// As the table says for the operation.
///
/// # Safety
/// As for [`issue`].
pub unsafe fn issue_on<O: TypedOperation>(vcpu: u32, argument: &mut O::Argument) -> Result<u64, Errno> {
    const { assert!(matches!(O::CALL, Hypercall::VcpuOp), "a hypercall of another form") };
    let address = (&raw mut *argument) as u64;
    // SAFETY: as for `issue`.
    Errno::check(unsafe { raw(O::CALL.number(), [u64::from(O::COMMAND), u64::from(vcpu), address, 0, 0]) })
}

/// Issues an operation of `grant_table_op` on a list; each element has its own status afterwards.
///
/// # Errors
/// As the table says for the hypercall; the list as such was refused.
///
/// # Safety
/// As for [`issue`], for each element.
pub unsafe fn issue_list<O: TypedOperation>(list: &mut [O::Argument]) -> Result<u64, Errno> {
    const { assert!(matches!(O::CALL, Hypercall::GrantTableOp), "a hypercall of another form") };
    let arguments = [u64::from(O::COMMAND), list.as_mut_ptr() as u64, list.len() as u64, 0, 0];
    // SAFETY: as for `issue`, and the list is as long as it says.
    Errno::check(unsafe { raw(O::CALL.number(), arguments) })
}

/// Copies memory that others may write, in assembly, so that the compiler assumes nothing about it.
///
/// # Safety
/// `from` readable and `to` writable for `bytes`; no overlap.
#[inline]
pub(crate) unsafe fn copy_volatile(to: *mut u8, from: *const u8, bytes: usize) {
    if bytes >= crate::rt::bytes::WIDE_FROM && crate::rt::bytes::has_wide() {
        // SAFETY: the caller's, and the processor has the registers.
        return unsafe { crate::rt::bytes::copy_wide(to, from, bytes) };
    }
    // SAFETY: the caller's.
    unsafe { crate::rt::bytes::copy(to, from, bytes) };
}

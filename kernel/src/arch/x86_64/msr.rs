//! Model-specific registers that guests own or that set up the entry.

use core::arch::{asm, global_asm};
use x86_64::registers::model_specific::Msr;

/// Base of FS.
pub const FS_BASE: u32 = 0xc000_0100;
/// Base of GS in force.
pub const GS_BASE: u32 = 0xc000_0101;
/// The other base of GS, which SWAPGS brings in.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Selectors of SYSCALL and SYSRET.
pub const STAR: u32 = 0xc000_0081;
/// 64-bit SYSCALL target.
pub const LSTAR: u32 = 0xc000_0082;
/// 32-bit SYSCALL target.
pub const CSTAR: u32 = 0xc000_0083;
/// Flags that SYSCALL clears.
pub const SFMASK: u32 = 0xc000_0084;
/// Code selector of SYSENTER; 0, as after reset, makes it fault.
pub const SYSENTER_CS: u32 = 0x174;
/// Stack pointer of SYSENTER.
pub const SYSENTER_ESP: u32 = 0x175;
/// Target of SYSENTER.
pub const SYSENTER_EIP: u32 = 0x176;
/// What RDTSCP and RDPID give beside the time stamp.
pub const TSC_AUX: u32 = 0xc000_0103;
/// TSC at which the local APIC's timer fires.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// Local APIC base and mode.
pub const APIC_BASE: u32 = 0x1b;

global_asm!(
    include_str!("macros.s"),
    r#"
    .pushsection .text.try_read_msr, "ax", @progbits
    .balign 16
    .globl try_read_msr
try_read_msr:                           /* (number, where to) -> 0, or 1 after a fault */
    mov ecx, edi
try_read_msr_at:
    rdmsr
    mov [rsi], eax
    mov [rsi + 4], edx
    xor eax, eax
    ret
try_read_msr_fault:
    mov eax, 1
    ret
    FIXUP try_read_msr_at, try_read_msr_fault
    .popsection
    "#
);

unsafe extern "C" {
    fn try_read_msr(number: u32, value: *mut u64) -> u32;
}

/// Reads a register that the processor may not have.
pub fn try_read(msr: u32) -> Option<u64> {
    let mut value = 0;
    // SAFETY: writes only `value`; reading a register has no effect on memory, and a missing one is a fault that is mended.
    (unsafe { try_read_msr(msr, &raw mut value) } == 0).then_some(value)
}

/// Reads a register that the processor has.
pub fn read(msr: u32) -> u64 {
    // SAFETY: the constants of this module exist on every x86-64 processor, and reading them has no effect.
    unsafe { Msr::new(msr).read() }
}

/// Writes a register that the processor has.
///
/// # Safety
/// The value is legal for the register, and its effect is what the caller's own contract allows.
pub unsafe fn write(msr: u32, value: u64) {
    // SAFETY: the caller's contract.
    unsafe { Msr::new(msr).write(value) }
}

/// The base of FS; `fast` says that CR4.FSGSBASE is on.
pub fn fs_base(fast: bool) -> u64 {
    if !fast {
        return read(FS_BASE);
    }
    let value;
    // SAFETY: CR4.FSGSBASE is on, says the caller; otherwise this is #UD, reported and fatal, but harmless to memory.
    unsafe { asm!("rdfsbase {}", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The base of GS in force; `fast` says that CR4.FSGSBASE is on.
pub fn gs_base(fast: bool) -> u64 {
    if !fast {
        return read(GS_BASE);
    }
    let value;
    // SAFETY: CR4.FSGSBASE is on, says the caller; otherwise this is #UD, reported and fatal, but harmless to memory.
    unsafe { asm!("rdgsbase {}", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

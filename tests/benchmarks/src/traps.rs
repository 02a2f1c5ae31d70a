//! Entries of the guest and the way back, with handlers of a few instructions: those of guest-sdk do more than is to be measured.

use crate::stopwatch;
use conformance::{call, callback};
use core::arch::global_asm;
use guest_sdk::abi::callback::{CALLBACKF_MASK_EVENTS, CallbackRegister};
use guest_sdk::abi::segment::FLAT_KERNEL_CS;
use guest_sdk::abi::subops::{CallbackOp, CallbackType};
use guest_sdk::abi::vcpu::TrapInfo;
use guest_sdk::abi::{Hypercall, VirtAddr};
use guest_sdk::testkit::{Stop, check};
use guest_sdk::user;

const ROUNDS: u64 = 1000;
/// A vector that is nobody's.
const SOFT: u8 = 0x21;
const INVALID_OPCODE: u8 = 6;
const PAGE_FAULT: u8 = 14;

// Handlers find rcx, r11 and, for a page fault, an error code below the frame, and return by HYPERCALL_iret.
// Loops: rdi is how often.
global_asm!(
    ".pushsection .text.traps, \"ax\"",
    ".macro return_by_iret flags",
    "push \\flags",
    "push rcx",
    "push r11",
    "push rax",
    "mov eax, 23",
    "syscall",
    ".endm",
    "__on_soft:",
    "pop rcx",
    "pop r11",
    "return_by_iret 0",
    "__on_invalid_opcode:",
    "pop rcx",
    "pop r11",
    "add qword ptr [rsp], 2",
    "return_by_iret 0",
    "__on_page_fault:",
    "pop rcx",
    "pop r11",
    "add rsp, 8",
    "add qword ptr [rsp], 2",
    "return_by_iret 0",
    // VGCF_in_syscall: the way back may be a SYSRET.
    "__on_syscall:",
    "pop rcx",
    "pop r11",
    "return_by_iret 0x100",
    ".macro loop_of name, instruction:vararg",
    "\\name:",
    "mov rsi, 0x700000000000",
    "2:",
    "\\instruction",
    "dec rdi",
    "jnz 2b",
    "ret",
    ".endm",
    "loop_of __loop_nothing",
    "loop_of __loop_soft, int 0x21",
    "loop_of __loop_invalid_opcode, ud2",
    // Two bytes long.
    "loop_of __loop_page_fault, mov eax, [rsi]",
    "loop_of __loop_control_register, mov rax, cr0",
    "__user_syscalls:",
    "syscall",
    "dec rbx",
    "jnz __user_syscalls",
    "int3",
    "__user_nothing:",
    "dec rbx",
    "jnz __user_nothing",
    "int3",
    ".popsection",
);

unsafe extern "C" {
    static __on_soft: u8;
    static __on_invalid_opcode: u8;
    static __on_page_fault: u8;
    static __on_syscall: u8;
    static __user_syscalls: u8;
    static __user_nothing: u8;
    fn __loop_nothing(rounds: u64);
    fn __loop_soft(rounds: u64);
    fn __loop_invalid_opcode(rounds: u64);
    fn __loop_page_fault(rounds: u64);
    fn __loop_control_register(rounds: u64);
}

/// Runs one of the loops of user code to its end; ticks that it took.
fn in_user_mode(code: *const u8) -> Result<u64, Stop> {
    let mut registers = user::registers(code as u64, 0);
    registers.rbx = ROUNDS;
    let start = stopwatch::ticks();
    // SAFETY: the loops touch no memory.
    let back = unsafe { user::run_in_kernel_space(&registers)? };
    let ticks = stopwatch::ticks() - start;
    check!(back.vector == 3 && back.rbx == 0, "user code came back by vector {}", back.vector);
    Ok(ticks)
}

/// System calls of user code.
///
/// # Errors
/// The hypervisor's.
pub fn system_calls() -> Result<(), Stop> {
    // What is loaded for the first time is loaded.
    in_user_mode(&raw const __user_nothing)?;
    let without = in_user_mode(&raw const __user_nothing)?;
    let mut register = CallbackRegister {
        kind: CallbackType::Syscall.number() as u16,
        flags: CALLBACKF_MASK_EVENTS,
        pad0: 0,
        address: VirtAddr::new((&raw const __on_syscall) as u64),
    };
    callback(CallbackOp::Register, &mut register)?;
    in_user_mode(&raw const __user_syscalls)?;
    let with = in_user_mode(&raw const __user_syscalls)?;
    stopwatch::row("system call of user code and back", with.saturating_sub(without), ROUNDS);
    Ok(())
}

/// Exceptions of the kernel. Those of guest-sdk have no handlers afterwards.
///
/// # Errors
/// The hypervisor's.
pub fn exceptions() -> Result<(), Stop> {
    stopwatch::rounds("emulated read of CR0", ROUNDS, __loop_control_register, __loop_nothing);
    let entry = |vector, handler: *const u8| TrapInfo {
        vector,
        // For an INT of ring 3, where the kernel is.
        flags: 3,
        cs: FLAT_KERNEL_CS,
        pad0: 0,
        address: handler as u64,
    };
    let table = [
        entry(SOFT, &raw const __on_soft),
        entry(INVALID_OPCODE, &raw const __on_invalid_opcode),
        entry(PAGE_FAULT, &raw const __on_page_fault),
        TrapInfo::default(),
    ];
    call(Hypercall::SetTrapTable, [table.as_ptr() as u64, 0, 0, 0, 0])?;
    stopwatch::rounds("INT of the kernel, and iret", ROUNDS, __loop_soft, __loop_nothing);
    stopwatch::rounds("#UD of the kernel, and iret", ROUNDS, __loop_invalid_opcode, __loop_nothing);
    stopwatch::rounds("#PF of the kernel, and iret", ROUNDS, __loop_page_fault, __loop_nothing);
    Ok(())
}

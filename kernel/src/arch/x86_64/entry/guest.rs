//! From ring 3 into ring 0 and back: the registers go straight into the state of the vCPU that runs.
//!
//! TSS.RSP0 and the SYSCALL stub of each CPU point at the end of that state's `regs`, so the processor and the stubs push
//! where the registers are kept, and nothing is copied at a vCPU switch. Then `rsp` moves to the CPU's stack, which is empty
//! whenever a guest runs.
//!
//! Review list for what TCG does not show:
//! - SYSCALL arrives with the guest's `rsp`: the stub stores it and touches no stack before it has its own. NMI, #MC and #DB
//!   have interrupt stacks, so they may come in between (`mov ss` then SYSCALL raises #DB at the stub's first instruction).
//! - SFMASK clears IF, DF, TF, AC and NT on SYSCALL; an interrupt gate leaves DF, AC: hence CLD and CLAC on every path.
//! - SYSENTER clears IF and nothing else: its stub loads clean flags. A single step (TF) raises #DB in it, which ring 0
//!   swallows.
//! - SYSRET with a non-canonical RIP faults in ring 0 on Intel processors, with the guest's stack pointer: it is used only
//!   when `hv::x86::exit::may_sysret` says so.
//! - IRET to the guest may fault (selectors, RIP): the frame it read is kept, see `iret_fault`.
//! - GS is never used by ring 0, so no SWAPGS happens on entry or exit, and NMI cannot meet a wrong one.

use crate::arch::x86_64::percpu::{CpuInfo, INFO_OFFSET};
use crate::arch::x86_64::tables::{GUEST_CODE, GUEST_CODE32, GUEST_DATA};
use core::arch::global_asm;
use core::mem::offset_of;
use hv::domain::{ENTRY_IRET_FAULT, ENTRY_SYSCALL, ENTRY_SYSCALL32, ENTRY_SYSENTER, GuestRegs, VcpuState};
use hv::x86::layout::{CPU_BLOCK_SIZE, IMAGE, MAX_CPUS};

// The entry code pushes upwards to `cpu_stack` and expects the processor not to realign.
const _: () = assert!(offset_of!(VcpuState, regs) == 0);
const _: () = assert!(offset_of!(VcpuState, cpu_stack) == size_of::<GuestRegs>());
const _: () = assert!(size_of::<GuestRegs>() == 176 && size_of::<GuestRegs>().is_multiple_of(16));
const _: () = assert!(align_of::<VcpuState>() >= 16);
const _: () = assert!(offset_of!(GuestRegs, rip) == 136 && offset_of!(GuestRegs, vector) == 120);

/// Bytes between the stubs of two CPUs.
pub const STUB_STRIDE: u64 = 192;
/// Offset of the stub for SYSCALL from 32-bit code among a CPU's three.
pub const STUB_32: u64 = 64;
/// Offset of the SYSENTER stub.
pub const STUB_SYSENTER: u64 = 128;

/// What a CPU's SYSCALL stub reads and writes, alone on a cache line.
#[repr(C, align(64))]
pub struct StubSlot {
    /// The guest's stack pointer, between two instructions.
    scratch: u64,
    /// End of the registers of the vCPU that runs: where the stub's pushes begin.
    pub regs_end: u64,
}

unsafe extern "C" {
    /// SYSCALL and SYSENTER stubs, three for each CPU.
    pub static syscall_stubs: u8;
    /// One slot for each CPU.
    pub static mut stub_slots: [StubSlot; MAX_CPUS];
}

global_asm!(
    include_str!("../macros.s"),
    r#"
    .pushsection .entry.text, "ax", @progbits
    .macro SYSCALL_STUB slot, selector, entry
    mov [rip + stub_slots + \slot * 64], rsp
    mov rsp, [rip + stub_slots + \slot * 64 + 8]
    push {data}
    push qword ptr [rip + stub_slots + \slot * 64]
    push r11
    push \selector
    push rcx
    push 0
    push \entry
    jmp guest_save
    .endm

    /* SYSENTER saves nothing: where the guest was, its kernel knows. The flags are its own but for IF, which was on. */
    .macro SYSENTER_STUB slot
    mov rsp, [rip + stub_slots + \slot * 64 + 8]
    push {data}
    push 0
    pushfq
    or qword ptr [rsp], 0x200
    push 3
    push 0
    push 0
    push {sysenter}
    push 2
    popfq
    jmp guest_save
    .endm

    .balign 64
    .globl syscall_stubs
syscall_stubs:
    .set slot, 0
    .rept {cpus}
    .balign 64
    SYSCALL_STUB slot, {code}, {syscall}
    .balign 64
    SYSCALL_STUB slot, {code32}, {syscall32}
    .balign 64
    SYSENTER_STUB slot
    .set slot, slot + 1
    .endr

    /* rsp: the `vector` word of the running vCPU's registers, what is above it filled. */
    .balign 64
    .globl guest_save
guest_save:
    SAVE_GENERAL
    cld
    CLEAR_AC
    mov rdi, rsp
guest_saved:
    mov rsp, [rdi + {cpu_stack}]
    xor ebp, ebp
    call {guest}
    /* rax: the state to resume, which may be another vCPU's. */
    .globl resume_guest
resume_guest:
    cmp byte ptr [rax + {sysret_ok}], 0
    mov rsp, rax
    jne 2f
    RESTORE_GENERAL
    add rsp, 16
    .globl iret_to_guest
iret_to_guest:
    iretq
2:  RESTORE_GENERAL
    mov rcx, [rsp + 16]
    mov r11, [rsp + 32]
    mov rsp, [rsp + 40]
    sysretq

    /*
     * IRET faulted, and the processor pushed its frame below the one that IRET read, which starts 8 bytes off a multiple
     * of 16: ss at -16 from it, then rsp, rflags, cs, rip, the error code and the stub's vector at -64. All general
     * registers hold the guest's values already. Turn it into an entry from the guest with that frame.
     */
    .balign 16
iret_fault:
    push rax
    mov rax, [rsp + 16]
    mov [rsp + 64], rax
    mov rax, [rsp + 8]
    or rax, {iret_fault_entry}
    mov [rsp + 56], rax
    pop rax
    lea rsp, [rsp + 48]
    jmp guest_save

    /* #DB has an interrupt stack: move the frame of a guest to where the others put theirs. */
    .balign 16
debug_entry:
    SAVE_GENERAL
    cld
    CLEAR_AC
    test byte ptr [rsp + 144], 3
    jnz 4f
    /* As in vector_entry: a selector like ring 0's is believed only with an address of the image. */
    mov eax, [rsp + 140]
    cmp eax, {image}
    je 3f
4:  mov rax, rsp
    and rax, -{block}
    mov rdi, [rax + {current}]
    mov rbx, rdi
    mov rsi, rsp
    mov ecx, 22
    rep movsq
    mov rdi, rbx
    jmp guest_saved
3:  mov rdi, rsp
    call {debug}
    RESTORE_GENERAL
    add rsp, 16
    iretq
    .popsection

    .pushsection .bss.stub_slots, "aw", @nobits
    .balign 64
    .globl stub_slots
stub_slots:
    .skip 64 * {cpus}
    .popsection
    "#,
    data = const GUEST_DATA,
    code = const GUEST_CODE,
    code32 = const GUEST_CODE32,
    syscall = const ENTRY_SYSCALL,
    syscall32 = const ENTRY_SYSCALL32,
    sysenter = const ENTRY_SYSENTER,
    iret_fault_entry = const ENTRY_IRET_FAULT,
    image = const IMAGE >> 32,
    block = const CPU_BLOCK_SIZE,
    cpus = const MAX_CPUS,
    cpu_stack = const offset_of!(VcpuState, cpu_stack),
    sysret_ok = const offset_of!(VcpuState, sysret_ok),
    current = const INFO_OFFSET as usize + offset_of!(CpuInfo, current),
    guest = sym super::guest_entry,
    debug = sym super::ring0_debug,
);

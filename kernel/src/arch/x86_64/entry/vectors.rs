//! Exceptions and interrupts: 256 stubs that make all frames alike, then one path for ring 3 and one for ring 0.

use super::Frame;
use core::arch::global_asm;

global_asm!(
    include_str!("../macros.s"),
    r#"
    /* A handler on a stack of its own that returns where it came from; the frame is 22 words, so rsp is aligned. */
    .macro OWN_STACK name, function
    .balign 16
\name:
    SAVE_GENERAL
    cld
    CLEAR_AC
    mov rdi, rsp
    call \function
    RESTORE_GENERAL
    add rsp, 16
    iretq
    .endm

    .pushsection .entry.text, "ax", @progbits
    .balign 16
    .globl vector_stubs
vector_stubs:
    .set vector, 0
    .rept 256
    .balign {stub_size}
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
    push vector
    .else
    push 0
    push vector
    .endif
    .if vector == 1
    jmp debug_entry
    .elseif vector == 2
    jmp nmi_entry
    .elseif vector == 8
    jmp double_fault_entry
    .elseif vector == 18
    jmp machine_check_entry
    .else
    jmp vector_entry
    .endif
    .set vector, vector + 1
    .endr

    .balign 16
vector_entry:
    test byte ptr [rsp + 24], 3
    jnz guest_save

    /*
     * From ring 0, says the selector. First the one place where the stack is not a CPU's: the IRET that returns to a guest.
     * Any other entry onto the registers of a vCPU came from it after all: QEMU's TCG lets 32-bit guest code IRET into
     * virtual-8086 mode, in long mode and with selectors of its choice.
     */
    push rax
    lea rax, [rip + iret_to_guest]
    cmp [rsp + 24], rax
    je 2f
    mov rax, rsp
    shr rax, 32
    cmp eax, {cpu_blocks}
    pop rax
    jne guest_save
    jmp 3f
2:  pop rax
    jmp iret_fault
3:
    SAVE_GENERAL
    cld
    CLEAR_AC
    mov rdi, rsp
    call {ring0}
    RESTORE_GENERAL
    add rsp, 16
    iretq

    OWN_STACK nmi_entry, {nmi}
    OWN_STACK machine_check_entry, {machine_check}
    OWN_STACK double_fault_entry, {double_fault}
    .popsection
    "#,
    cpu_blocks = const hv::x86::layout::CPU_BLOCKS >> 32,
    stub_size = const crate::arch::x86_64::tables::STUB_SIZE,
    ring0 = sym super::ring0_entry,
    nmi = sym super::nmi_entry,
    machine_check = sym super::machine_check_entry,
    double_fault = sym super::double_fault_entry,
);
const _: () = assert!(size_of::<Frame>() == 22 * 8);

//! Exceptions and interrupts: 256 stubs that make all frames alike, then one path for ring 3 and one for ring 0.

use super::Frame;
use core::arch::global_asm;

global_asm!(
    r#"
    .macro SAVE_GENERAL
    push rdi
    push rsi
    push rdx
    push rcx
    push rax
    push r8
    push r9
    push r10
    push r11
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    .endm

    .macro RESTORE_GENERAL
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    .endm

    /* Access to guest pages off. The site is listed: without SMAP, boot turns it into a NOP. */
    .macro CLEAR_AC
777:
    clac
    .pushsection .smap_sites, "a", @progbits
    .quad 777b
    .popsection
    .endm

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

    /* From ring 0. First the one place where the stack is not a CPU's: the IRET that returns to a guest. */
    push rax
    lea rax, [rip + iret_to_guest]
    cmp [rsp + 24], rax
    pop rax
    je iret_fault
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
    stub_size = const crate::arch::x86_64::tables::STUB_SIZE,
    ring0 = sym super::ring0_entry,
    nmi = sym super::nmi_entry,
    machine_check = sym super::machine_check_entry,
    double_fault = sym super::double_fault_entry,
);
const _: () = assert!(size_of::<Frame>() == 22 * 8);

//! Assembly macros; this module comes before all others, because the assembler reads them in that order.

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

    /* The instruction at the label may fault; then execution goes on at `to`. */
    .macro FIXUP at, to
    .pushsection .fixups, "a", @progbits
    .balign 8
    .quad \at, \to
    .popsection
    .endm

    .macro ALLOW_GUEST_PAGES
778:
    stac
    .pushsection .smap_sites, "a", @progbits
    .quad 778b
    .popsection
    .endm
    "#
);

/* Macros of our assembly. Each global_asm! that needs them includes this file; the assembler sees them once, whichever comes first. */
.ifndef MACROS_INCLUDED
.set MACROS_INCLUDED, 1

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

    /* In 32-bit code with paging off: long mode under the tables at \root, caches on. Changes eax, ecx, edx, ebx, edi. */
    .macro ENTER_LONG_MODE root
    mov eax, cr4
    or eax, 0x20                        /* PAE */
    mov cr4, eax
    mov eax, offset \root
    mov cr3, eax
    mov eax, 0x80000001
    cpuid
    mov edi, edx
    shr edi, 9                          /* NX (bit 20) to where NXE is (bit 11) */
    and edi, 0x800
    mov ecx, 0xc0000080                 /* EFER: SCE, LME, and NXE where there is NX */
    rdmsr
    or eax, 0x101
    or eax, edi
    wrmsr
    mov eax, cr0
    and eax, 0x9fffffff                 /* caches on */
    or eax, 0x80010023                  /* PG, WP, NE, MP, PE */
    mov cr0, eax
    .endm

    .macro ALLOW_GUEST_PAGES
778:
    stac
    .pushsection .smap_sites, "a", @progbits
    .quad 778b
    .popsection
    .endm
.endif

//! The first instructions: PVH entry in 32-bit protected mode, early page tables, long mode, and a call of Rust.
//!
//! The loader starts us as Xen's public header `arch-x86/hvm/start_info.h` says: paging off, flat segments, `ebx` the
//! machine address of the start info. The early tables show the first 4 GiB at their own address and at the direct map's,
//! and the image at its link address, all writable and executable; `boot::start` replaces them within its first steps.

use core::arch::global_asm;
use hv::x86::layout;

/// Link address minus load address of the image, as in hypervisor.ld.
const DELTA: u64 = layout::IMAGE - 0x20_0000;

global_asm!(
    include_str!("../macros.s"),
    r#"
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                      /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_entry - {delta}
    .popsection

    .pushsection .boot.text, "ax", @progbits
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    mov esp, offset boot_stack_top - {delta}
    mov esi, ebx

    /* Four tables of 2 MiB pages: the first 4 GiB. */
    mov edi, offset boot_l2_low - {delta}
    mov eax, 0x83                       /* present, writable, large */
    mov ecx, 2048
2:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 2b

    mov edi, offset boot_l3_low - {delta}
    mov eax, offset boot_l2_low - {delta} + 3
    mov ecx, 4
3:  mov [edi], eax
    add eax, 0x1000
    add edi, 8
    dec ecx
    jnz 3b

    /* The image: 32 MiB from its load address. */
    mov edi, offset boot_l2_image - {delta}
    mov eax, 0x200083
    mov ecx, 16
4:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 4b

    mov eax, offset boot_l2_image - {delta} + 3
    mov [boot_l3_image - {delta} + {image_l3} * 8], eax
    mov eax, offset boot_l3_low - {delta} + 3
    mov [boot_l4 - {delta}], eax
    mov [boot_l4 - {delta} + {direct_l4} * 8], eax
    mov eax, offset boot_l3_image - {delta} + 3
    mov [boot_l4 - {delta} + {image_l4} * 8], eax

    ENTER_LONG_MODE boot_l4 - {delta}
    lgdt [boot_gdt_pointer - {delta}]
    push 8
    mov eax, offset boot_long_mode - {delta}
    push eax
    retf

    .code64
boot_long_mode:
    movabs rax, offset boot_high
    jmp rax
boot_high:
    movabs rsp, offset boot_stack_top
    xor eax, eax
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov edi, esi
    xor ebp, ebp
    call {start}
    ud2
    .popsection

    .pushsection .rodata.boot, "a", @progbits
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff
boot_gdt_pointer:
    .word 15
    .quad boot_gdt - {delta}
    .popsection

    .pushsection .bss.boot, "aw", @nobits
    .balign 4096
    .globl boot_l4
boot_l4:        .skip 4096
boot_l3_low:    .skip 4096
boot_l3_image:  .skip 4096
boot_l2_image:  .skip 4096
boot_l2_low:    .skip 4 * 4096
boot_stack:     .skip 32768
    .globl boot_stack_top
boot_stack_top:
    .popsection
    "#,
    delta = const DELTA,
    image_l4 = const (layout::IMAGE >> 39) & 511,
    image_l3 = const (layout::IMAGE >> 30) & 511,
    direct_l4 = const (layout::DIRECT_MAP >> 39) & 511,
    start = sym super::start,
);

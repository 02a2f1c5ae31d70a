//! What only a guest image may hold: ELF notes, the first instruction, the panic handler, the heap, and the functions
//! that compiled code calls by name. `#[entry]` puts it into the program; in this library it would shadow the host's.

/// Expands to everything a guest image needs once. `#[entry]` calls it; nobody else does.
#[doc(hidden)]
#[macro_export]
macro_rules! __runtime {
    () => {
        // The hypervisor's loader reads these notes (public header elfnote.h). Types: 6 GUEST_OS, 7 GUEST_VERSION,
        // 5 XEN_VERSION, 8 LOADER, 10 FEATURES, 9 PAE_MODE, 3 VIRT_BASE, 4 PADDR_OFFSET, 1 ENTRY, 2 HYPERCALL_PAGE,
        // 12 HV_START_LOW, 13 L1_MFN_VALID (mask, value).
        ::core::arch::global_asm!(
            ".macro guest_note kind, width:vararg",
            "    .balign 4",
            "    .long 4, 8880f - 8879f, \\kind",
            "    .asciz \"Xen\"",
            "8879: \\width",
            "8880: .balign 4",
            ".endm",
            ".pushsection .note.Xen, \"aR\", @note",
            "guest_note 6, .asciz \"guest-sdk\"",
            "guest_note 7, .asciz \"0.1\"",
            "guest_note 5, .asciz \"xen-3.0\"",
            "guest_note 8, .asciz \"generic\"",
            "guest_note 10, .asciz \"!writable_page_tables|pae_pgdir_above_4gb\"",
            "guest_note 9, .asciz \"yes\"",
            "guest_note 3, .quad __image_start",
            "guest_note 4, .quad __image_start",
            "guest_note 1, .quad guest_start",
            "guest_note 2, .quad guest_hypercall_page",
            "guest_note 12, .quad 0xffff800000000000",
            "guest_note 13, .quad 1, 1",
            ".popsection",
            ".purgem guest_note",
            // The hypervisor fills this page before the first instruction.
            ".pushsection .text.hypercall_page, \"axR\", @progbits",
            ".balign 4096",
            ".globl guest_hypercall_page",
            "guest_hypercall_page:",
            ".skip 4096, 0xcc",
            ".popsection",
        );

        /// The first instruction: rsi holds the address of start_info, rsp the top of the boot stack.
        #[doc(hidden)]
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn guest_start() -> ! {
            ::core::arch::naked_asm!(
                "cld",
                "mov rdi, rsi",
                "mov rsi, rsp",
                "lea rsp, [rip + __stack_top]",
                "xor ebp, ebp",
                "call {start}",
                "ud2",
                start = sym $crate::rt::start::start,
            )
        }

        #[panic_handler]
        fn guest_panic(info: &::core::panic::PanicInfo<'_>) -> ! {
            $crate::rt::panic::report(info)
        }

        #[global_allocator]
        static GUEST_HEAP: $crate::rt::heap::GuestHeap = $crate::rt::heap::GuestHeap;

        /// # Safety
        /// As C's memcpy.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
            // SAFETY: the same contract.
            unsafe { $crate::rt::bytes::copy(to, from, bytes) }
        }

        /// # Safety
        /// As C's memmove.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
            // SAFETY: the same contract.
            unsafe { $crate::rt::bytes::copy_overlapping(to, from, bytes) }
        }

        /// # Safety
        /// As C's memset.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
            // SAFETY: the same contract.
            unsafe { $crate::rt::bytes::fill(to, value as u8, bytes) }
        }

        /// # Safety
        /// As C's memcmp.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
            // SAFETY: the same contract.
            unsafe { $crate::rt::bytes::compare(a, b, bytes) }
        }

        /// # Safety
        /// As BSD's bcmp.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
            // SAFETY: the same contract.
            unsafe { $crate::rt::bytes::compare(a, b, bytes) }
        }

        /// # Safety
        /// As C's strlen.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn strlen(text: *const u8) -> usize {
            // SAFETY: the same contract.
            unsafe { $crate::rt::bytes::length(text) }
        }

        // Precompiled core refers to the unwinder; with panic = "abort" nothing ever calls it.
        #[unsafe(no_mangle)]
        extern "C" fn _Unwind_Resume() -> ! {
            $crate::rt::panic::unreachable_unwind()
        }
        #[unsafe(no_mangle)]
        extern "C" fn rust_eh_personality() -> ! {
            $crate::rt::panic::unreachable_unwind()
        }
    };
}

//! ELF notes by which a kernel says how it wants to be started (public/elfnote.h). Their owner is the name "Xen".

/// The owner's name in a note, without its zero.
pub const OWNER: &[u8] = b"Xen";

crate::subops::command_enum! {
    /// Types of the notes; numbers are 4 or 8 bytes, or decimal and hexadecimal text in old kernels.
    ElfNote, "XEN_ELFNOTE_" {
        /// Text for tools.
        Info = 0, "INFO";
        /// Number: virtual address of the first instruction.
        Entry = 1, "ENTRY";
        /// Number: virtual address of the page to fill with hypercall stubs.
        HypercallPage = 2, "HYPERCALL_PAGE";
        /// Number: virtual address of guest frame 0.
        VirtBase = 3, "VIRT_BASE";
        /// Number: what to take from the segments' physical addresses.
        PaddrOffset = 4, "PADDR_OFFSET";
        /// Text: the interface, "xen-3.0".
        XenVersion = 5, "XEN_VERSION";
        /// Text: the operating system.
        GuestOs = 6, "GUEST_OS";
        /// Text: its version.
        GuestVersion = 7, "GUEST_VERSION";
        /// Text: "generic".
        Loader = 8, "LOADER";
        /// Text: "yes" for kernels with more than 32 bits of physical address.
        PaeMode = 9, "PAE_MODE";
        /// Text: features wanted or, with `!`, needed, between `|`.
        Features = 10, "FEATURES";
        /// Text: whether a symbol table is wanted.
        BsdSymtab = 11, "BSD_SYMTAB";
        /// Number: lowest address that the hypervisor may use.
        HvStartLow = 12, "HV_START_LOW";
        /// Pairs of numbers: mask and value of an L1 entry that holds a valid frame.
        L1MfnValid = 13, "L1_MFN_VALID";
        /// Number: 1 when the kernel copes with a suspend that did not happen.
        SuspendCancel = 14, "SUSPEND_CANCEL";
        /// Number: virtual address wanted for the physical-to-machine list.
        InitP2m = 15, "INIT_P2M";
        /// Number: 1 when the module need not be mapped.
        ModStartPfn = 16, "MOD_START_PFN";
        /// Number: bits by [`Features`](crate::version::Features) that the kernel supports.
        SupportedFeatures = 17, "SUPPORTED_FEATURES";
        /// Number: physical address of the entry without paging (PVH).
        Phys32Entry = 18, "PHYS32_ENTRY";
    }
}

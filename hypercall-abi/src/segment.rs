//! Selectors of the hypervisor's own descriptors, and what bounds the guest's (public/arch-x86/xen-x86_64.h).

/// Flat 32-bit code for ring 3.
pub const FLAT_RING3_CS32: u16 = 0xe023;
/// Flat 64-bit code for ring 3.
pub const FLAT_RING3_CS64: u16 = 0xe033;
/// Flat 32-bit data for ring 3.
pub const FLAT_RING3_DS32: u16 = 0xe02b;
/// 64-bit data: the null selector.
pub const FLAT_RING3_DS64: u16 = 0;
/// Flat stack for 32-bit code.
pub const FLAT_RING3_SS32: u16 = 0xe02b;
/// Flat stack for 64-bit code.
pub const FLAT_RING3_SS64: u16 = 0xe02b;

/// Code selector of a 64-bit guest kernel.
pub const FLAT_KERNEL_CS: u16 = FLAT_RING3_CS64;
/// Data selector of a 64-bit guest kernel.
pub const FLAT_KERNEL_DS: u16 = FLAT_RING3_DS64;
/// Stack selector of a 64-bit guest kernel.
pub const FLAT_KERNEL_SS: u16 = FLAT_RING3_SS64;
/// Code selector of 64-bit guest user mode.
pub const FLAT_USER_CS: u16 = FLAT_RING3_CS64;
/// Data selector of 64-bit guest user mode.
pub const FLAT_USER_DS: u16 = FLAT_RING3_DS64;
/// Stack selector of 64-bit guest user mode.
pub const FLAT_USER_SS: u16 = FLAT_RING3_SS64;

/// First page of the descriptor table that is the hypervisor's: a guest gives at most this many frames.
pub const FIRST_RESERVED_GDT_PAGE: usize = 14;
/// First byte of it.
pub const FIRST_RESERVED_GDT_BYTE: usize = FIRST_RESERVED_GDT_PAGE * 4096;
/// First entry of it: a guest gives at most this many entries.
pub const FIRST_RESERVED_GDT_ENTRY: usize = FIRST_RESERVED_GDT_BYTE / 8;

/// First address that is the hypervisor's in every address space.
pub const HYPERVISOR_VIRT_START: u64 = 0xffff_8000_0000_0000;
/// First address after it.
pub const HYPERVISOR_VIRT_END: u64 = 0xffff_8800_0000_0000;
/// The machine-to-physical table, one u64 per machine frame, readable by guests.
pub const MACH2PHYS_VIRT_START: u64 = 0xffff_8000_0000_0000;
/// End of the space kept for it.
pub const MACH2PHYS_VIRT_END: u64 = 0xffff_8040_0000_0000;

/// Bytes that, put before an instruction (`ud2` and "xen"), make the hypervisor emulate it; used with CPUID.
pub const EMULATE_PREFIX: [u8; 5] = [0x0f, 0x0b, 0x78, 0x65, 0x6e];

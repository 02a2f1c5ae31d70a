//! The hypervisor's address space: L4 slots 256 to 271, the same in every page table.
//!
//! ```text
//! ffff8000_00000000  slot 256  machine-to-physical table: readable by guests, written through its alias
//! ffff8080_00000000  257-259   unused
//! ffff8200_00000000  slot 260  descriptor windows, 128 KiB for each CPU: the guest's GDT (14 pages), our GDT page,
//!                              one empty page, the guest's LDT (16 pages)
//! ffff8280_00000000  slot 261  writable alias of the machine-to-physical table
//! ffff82c0_00000000            CPU blocks, 128 KiB for each CPU: stacks with guard pages, per-CPU data
//! ffff82c8_00000000            device registers, uncached: local APIC, I/O APICs
//! ffff82d0_40000000            the image: text RX, read-only data R, data RW; nothing writable is executable
//! ffff82e0_00000000            frame table
//! ffff8300_00000000  262-271   direct map of RAM, no-execute; the image's text and read-only data are read-only there
//! ffff8800_00000000            guests
//! ```

/// First address that is the hypervisor's.
pub const HYPERVISOR_START: u64 = 0xffff_8000_0000_0000;
/// One past the last address that is the hypervisor's.
pub const HYPERVISOR_END: u64 = 0xffff_8800_0000_0000;
/// First L4 slot that is the hypervisor's.
pub const FIRST_SLOT: usize = 256;
/// One past the last L4 slot that is the hypervisor's.
pub const END_SLOT: usize = 272;

/// Machine-to-physical table as guests read it.
pub const M2P: u64 = 0xffff_8000_0000_0000;
/// Bytes of address space set aside for it.
pub const M2P_SIZE: u64 = 0x40_0000_0000;
/// The same frames, writable by the hypervisor.
pub const M2P_ALIAS: u64 = 0xffff_8280_0000_0000;
/// Descriptor windows.
pub const DESCRIPTOR_WINDOWS: u64 = 0xffff_8200_0000_0000;
/// Bytes between the windows of two CPUs.
pub const DESCRIPTOR_WINDOW_SIZE: u64 = 0x2_0000;
/// Page of the window that holds the hypervisor's own descriptors.
pub const OWN_GDT_PAGE: u64 = 14;
/// First page of the window that shows the guest's LDT.
pub const LDT_PAGE: u64 = 16;
/// CPU blocks.
pub const CPU_BLOCKS: u64 = 0xffff_82c0_0000_0000;
/// Bytes of a CPU block, and its alignment.
pub const CPU_BLOCK_SIZE: u64 = 0x2_0000;
/// Device registers.
pub const DEVICES: u64 = 0xffff_82c8_0000_0000;
/// The image.
pub const IMAGE: u64 = 0xffff_82d0_4000_0000;
/// Frame table.
pub const FRAME_TABLE: u64 = 0xffff_82e0_0000_0000;
/// Bytes of address space set aside for it.
pub const FRAME_TABLE_SIZE: u64 = 0x20_0000_0000;
/// Direct map of RAM.
pub const DIRECT_MAP: u64 = 0xffff_8300_0000_0000;
/// Bytes of RAM that the direct map can show.
pub const DIRECT_MAP_SIZE: u64 = 0x500_0000_0000;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// CPUs there are stubs and windows for.
pub const MAX_CPUS: usize = 64;

/// Offsets inside a CPU block: each stack is above a page that is not mapped.
///
/// ```text
/// 00000 guard   01000-02fff NMI      03000 guard   04000-05fff #MC
/// 06000 guard   07000-08fff #DB      09000 guard   0a000-0afff #DF
/// 0b000-0ffff guard                  10000-1ffff the CPU's stack, per-CPU data at its top
/// ```
///
/// The CPU's stack is large because values of several KiB (a vCPU's context, a page) pass over it while domains are made;
/// there is one for each CPU, none for each vCPU.
pub mod cpu_block {
    /// Mapped ranges: first and one past the last offset of each stack.
    pub const STACKS: [(u64, u64); 5] =
        [(0x1000, 0x3000), (0x4000, 0x6000), (0x7000, 0x9000), (0xa000, 0xb000), (0x1_0000, 0x2_0000)];
    /// Whether an address lies in a page of a CPU block that is never mapped: a stack ran over.
    #[must_use]
    pub fn is_guard(address: u64) -> bool {
        let end = super::CPU_BLOCKS + super::MAX_CPUS as u64 * super::CPU_BLOCK_SIZE;
        let offset = address % super::CPU_BLOCK_SIZE;
        (super::CPU_BLOCKS..end).contains(&address)
            && !STACKS.iter().any(|(start, end)| (*start..*end).contains(&offset))
    }
    /// Top of the NMI stack.
    pub const NMI_TOP: u64 = 0x3000;
    /// Top of the machine-check stack.
    pub const MACHINE_CHECK_TOP: u64 = 0x6000;
    /// Top of the debug-exception stack.
    pub const DEBUG_TOP: u64 = 0x9000;
    /// Top of the double-fault stack.
    pub const DOUBLE_FAULT_TOP: u64 = 0xb000;
}

/// Whether a guest may name `len` bytes at `va`: canonical, and no byte in the hypervisor's range.
#[must_use]
pub fn is_guest_range(va: u64, len: u64) -> bool {
    const LOW_END: u64 = 0x0000_8000_0000_0000;
    match va.checked_add(len) {
        Some(end) => end <= LOW_END || va >= HYPERVISOR_END,
        // Ends exactly at the top of the address space.
        None => va >= HYPERVISOR_END && va.wrapping_add(len) == 0,
    }
}

/// Whether the processor accepts `va` as an address.
#[must_use]
pub fn is_canonical(va: u64) -> bool {
    matches!(va >> 47, 0 | 0x1_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_guest_range_touches_the_hypervisor() {
        for (va, len, want) in [
            (0, 1, true),
            (0x7fff_ffff_ffff, 1, true),
            (0x7fff_ffff_ffff, 2, false),
            (0x8000_0000_0000, 1, false),
            (HYPERVISOR_START - 1, 1, false),
            (HYPERVISOR_START, 1, false),
            (HYPERVISOR_END - 1, 1, false),
            (HYPERVISOR_END - 1, 2, false),
            (HYPERVISOR_END, 8, true),
            (u64::MAX, 1, true),
            (u64::MAX, 2, false),
            (0x1000, u64::MAX, false),
            (HYPERVISOR_END, u64::MAX, false),
        ] {
            assert_eq!(is_guest_range(va, len), want, "{va:#x} + {len:#x}");
        }
    }

    #[test]
    fn regions_are_in_order_and_apart() {
        let regions = [
            (M2P, M2P_SIZE),
            (DESCRIPTOR_WINDOWS, MAX_CPUS as u64 * DESCRIPTOR_WINDOW_SIZE),
            (M2P_ALIAS, M2P_SIZE),
            (CPU_BLOCKS, MAX_CPUS as u64 * CPU_BLOCK_SIZE),
            (DEVICES, 0x10_0000),
            (IMAGE, 0x200_0000),
            (FRAME_TABLE, FRAME_TABLE_SIZE),
            (DIRECT_MAP, DIRECT_MAP_SIZE),
            (HYPERVISOR_END, 0),
        ];
        for pair in regions.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn a_guard_page_lies_below_each_stack() {
        let mut below = 0;
        for (start, end) in cpu_block::STACKS {
            assert!(start >= below + PAGE_SIZE && end > start);
            below = end;
        }
        assert_eq!(below, CPU_BLOCK_SIZE);
        assert!(cpu_block::is_guard(CPU_BLOCKS) && cpu_block::is_guard(CPU_BLOCKS + CPU_BLOCK_SIZE + 0xffff));
        assert!(!cpu_block::is_guard(CPU_BLOCKS + 0x1000) && !cpu_block::is_guard(CPU_BLOCKS - 1));
    }
}

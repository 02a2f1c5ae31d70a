//! Page-table updates: the arguments of `mmu_update`, `update_va_mapping` and `mmuext_op` (public/xen.h).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{MachAddr, Mfn};

/// Bit of an operation count that marks a preempted call going on; the guest sees it in the registers of a restarted call only.
pub const MMU_UPDATE_PREEMPTED: u64 = 1 << 31;

/// One request of `mmu_update` (IN). Requests are carried out in order; the first error stops, with the number done reported.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MmuUpdate {
    /// Machine address of an 8-byte entry, or of a frame; the low two bits are an [`MmuCommand`].
    pub ptr: u64,
    /// The new entry, or the frame number to note.
    pub val: u64,
}

impl MmuUpdate {
    /// Bits of [`ptr`](Self::ptr) that are the command.
    pub const COMMAND_MASK: u64 = 3;

    /// A request.
    #[must_use]
    pub const fn new(command: MmuCommand, address: MachAddr, value: u64) -> Self {
        MmuUpdate { ptr: address.get() & !Self::COMMAND_MASK | command as u64, val: value }
    }

    /// What is asked for; all four values of the two bits mean something.
    #[must_use]
    pub const fn command(&self) -> MmuCommand {
        match self.ptr & Self::COMMAND_MASK {
            0 => MmuCommand::NormalPtUpdate,
            1 => MmuCommand::MachphysUpdate,
            2 => MmuCommand::PtUpdatePreserveAd,
            _ => MmuCommand::PtUpdateNoTranslate,
        }
    }

    /// The address without the command; it may still be misaligned by 4.
    #[must_use]
    pub const fn address(&self) -> MachAddr {
        MachAddr::new(self.ptr & !Self::COMMAND_MASK)
    }
}

pub use crate::subops::MmuCommand;

/// One operation of `mmuext_op` (IN). Which of the two arguments a command takes is said at the accessors.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MmuextOp {
    /// Number of an [`MmuextCmd`](crate::subops::MmuextCmd).
    pub cmd: u32,
    /// Padding.
    pub pad0: u32,
    /// A machine frame, or a virtual address.
    pub arg1: u64,
    /// A count, a pointer to a vCPU mask, or a machine frame.
    pub arg2: u64,
}

impl MmuextOp {
    /// An operation.
    #[must_use]
    pub const fn new(command: crate::subops::MmuextCmd, arg1: u64, arg2: u64) -> Self {
        MmuextOp { cmd: command.number(), pad0: 0, arg1, arg2 }
    }

    /// First argument of pin, unpin, the base pointers, clear and copy (destination).
    #[must_use]
    pub const fn mfn(&self) -> Mfn {
        Mfn::new(self.arg1)
    }

    /// First argument of the invalidations and of `SET_LDT`.
    #[must_use]
    pub const fn linear_addr(&self) -> u64 {
        self.arg1
    }

    /// Second argument of `SET_LDT`: entries; the upper half is not looked at.
    #[must_use]
    pub const fn nr_ents(&self) -> u32 {
        self.arg2 as u32
    }

    /// Second argument of the `_MULTI` flushes: where the guest's bitmap of vCPUs is.
    #[must_use]
    pub const fn vcpumask(&self) -> crate::GuestHandle<u64> {
        crate::GuestHandle::new(self.arg2)
    }

    /// Second argument of copy: the source.
    #[must_use]
    pub const fn src_mfn(&self) -> Mfn {
        Mfn::new(self.arg2)
    }
}

/// Flush that goes with `update_va_mapping`: none.
pub const UVMF_NONE: u64 = 0;
/// All translations.
pub const UVMF_TLB_FLUSH: u64 = 1;
/// The one address.
pub const UVMF_INVLPG: u64 = 2;
/// Mask of those.
pub const UVMF_FLUSHTYPE_MASK: u64 = 3;
/// On the vCPUs of a bitmap, whose address takes the bits above the mask of flags.
pub const UVMF_MULTI: u64 = 0;
/// On this CPU: `UVMF_MULTI` without a bitmap.
pub const UVMF_LOCAL: u64 = 0;
/// On all the domain's vCPUs.
pub const UVMF_ALL: u64 = 1 << 2;

bitflags! {
    /// Bits of a page-table entry that are not the frame.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PteFlags: u64 {
        /// Present.
        const PRESENT = 1 << 0;
        /// Writable.
        const WRITABLE = 1 << 1;
        /// Reachable from ring 3; the hypervisor sets it in a PV guest's entries.
        const USER = 1 << 2;
        /// Write-through.
        const WRITE_THROUGH = 1 << 3;
        /// Not cached.
        const CACHE_DISABLE = 1 << 4;
        /// Set by the CPU on use.
        const ACCESSED = 1 << 5;
        /// Set by the CPU on a store.
        const DIRTY = 1 << 6;
        /// Attribute-table bit in an L1 entry, 2 MiB or 1 GiB page in an L2 or L3 entry.
        const PAT_OR_LARGE = 1 << 7;
        /// Global: survives a switch of page tables.
        const GLOBAL = 1 << 8;
        /// Free for the guest.
        const AVAIL0 = 1 << 9;
        /// Free for the guest.
        const AVAIL1 = 1 << 10;
        /// Free for the guest.
        const AVAIL2 = 1 << 11;
        /// Free for the guest, upper field.
        const AVAIL_HIGH = 0x7ff << 52;
        /// Not executable.
        const NO_EXECUTE = 1 << 63;
    }
}

/// Mask of the frame in a page-table entry, as an address: bits 12 to 51.
pub const PTE_FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Entries in a page table.
pub const PTES_PER_TABLE: usize = 512;

/// First L4 slot that is the hypervisor's.
pub const FIRST_HYPERVISOR_L4_SLOT: usize = 256;
/// First L4 slot after it.
pub const END_HYPERVISOR_L4_SLOT: usize = 272;

/// The entry for a frame and flags; bits of the frame that do not fit are lost.
#[must_use]
pub const fn pte(frame: Mfn, flags: PteFlags) -> u64 {
    frame.get() << 12 & PTE_FRAME_MASK | flags.bits()
}

/// The frame of an entry.
#[must_use]
pub const fn pte_frame(entry: u64) -> Mfn {
    Mfn::new((entry & PTE_FRAME_MASK) >> 12)
}

/// A page table root in CR3 form.
#[must_use]
pub const fn frame_to_cr3(frame: Mfn) -> u64 {
    frame.get() << 12
}

/// The frame of a root in CR3 form.
#[must_use]
pub const fn cr3_to_frame(cr3: u64) -> Mfn {
    Mfn::new(cr3 >> 12)
}

/// One call of `multicall` (IN but for `result`). Errors of a call do not stop the list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MulticallEntry {
    /// The hypercall.
    pub op: u64,
    /// OUT: its result.
    pub result: u64,
    /// Its arguments in register order.
    pub args: [u64; 6],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_carry_command_and_address() {
        for command in [
            MmuCommand::NormalPtUpdate,
            MmuCommand::MachphysUpdate,
            MmuCommand::PtUpdatePreserveAd,
            MmuCommand::PtUpdateNoTranslate,
        ] {
            let request = MmuUpdate::new(command, MachAddr::new(0x1238), 7);
            assert_eq!((request.command(), request.address()), (command, MachAddr::new(0x1238)));
        }
    }

    #[test]
    fn entries_round_trip() {
        let entry = pte(Mfn::new(0xff_ffff_ffff), PteFlags::PRESENT | PteFlags::NO_EXECUTE);
        assert_eq!(pte_frame(entry), Mfn::new(0xff_ffff_ffff));
        assert_eq!(entry & !PTE_FRAME_MASK, 1 | 1 << 63);
    }
}

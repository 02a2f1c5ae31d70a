//! Page tables: the commands of `mmuext_op` and `mmu_update`.

use super::operations;

operations! {
    /// Commands of `mmu_update`, in the low bits of [`MmuUpdate::ptr`](crate::mmu::MmuUpdate::ptr).
    MmuCommand of MmuUpdate, "MMU_", 3 bits, else ENOSYS {
        /// Stores an entry, checked.
        NormalPtUpdate = 0, "NORMAL_PT_UPDATE", Guest, [Handled], {};
        /// Stores a frame's number in the machine-to-physical table.
        MachphysUpdate = 1, "MACHPHYS_UPDATE", Guest, [Handled], {};
        /// Stores an entry, keeping the accessed and dirty bits set by the CPU meanwhile.
        PtUpdatePreserveAd = 2, "PT_UPDATE_PRESERVE_AD", Guest, [Handled], {};
        /// Stores an entry without translation; for a PV guest the same as the first.
        PtUpdateNoTranslate = 3, "PT_UPDATE_NO_TRANSLATE", Guest, [Handled], {};
    }
}

operations! {
    /// Commands of `mmuext_op`, in [`MmuextOp::command`](crate::mmu::MmuextOp).
    MmuextCmd of MmuextOp, "MMUEXT_", 32 bits, else ENOSYS {
        /// Makes a frame an L1 table and keeps it one.
        PinL1Table = 0, "PIN_L1_TABLE", Guest, [Handled], {};
        /// Makes a frame an L2 table and keeps it one.
        PinL2Table = 1, "PIN_L2_TABLE", Guest, [Handled], {};
        /// Makes a frame an L3 table and keeps it one.
        PinL3Table = 2, "PIN_L3_TABLE", Guest, [Handled], {};
        /// Makes a frame an L4 table and keeps it one.
        PinL4Table = 3, "PIN_L4_TABLE", Guest, [Handled], {};
        /// Ends the keeping; other uses may hold the type on.
        UnpinTable = 4, "UNPIN_TABLE", Guest, [Handled], {};
        /// Switches the kernel's page tables.
        NewBaseptr = 5, "NEW_BASEPTR", Guest, [Handled], {};
        /// Flushes this CPU's translations.
        TlbFlushLocal = 6, "TLB_FLUSH_LOCAL", Guest, [Handled], {};
        /// Flushes one address on this CPU.
        InvlpgLocal = 7, "INVLPG_LOCAL", Guest, [Handled], {};
        /// Flushes the translations of the vCPUs in a mask.
        TlbFlushMulti = 8, "TLB_FLUSH_MULTI", Guest, [Handled], {};
        /// Flushes one address for the vCPUs in a mask.
        InvlpgMulti = 9, "INVLPG_MULTI", Guest, [Handled], {};
        /// Flushes the translations of all the domain's vCPUs.
        TlbFlushAll = 10, "TLB_FLUSH_ALL", Guest, [Handled], {};
        /// Flushes one address for all the domain's vCPUs.
        InvlpgAll = 11, "INVLPG_ALL", Guest, [Handled], {};
        /// Writes back and drops this CPU's caches.
        FlushCache = 12, "FLUSH_CACHE", Guest, [Handled], {};
        /// Sets the local descriptor table by virtual address.
        SetLdt = 13, "SET_LDT", Guest, [Handled], {};
        /// Switches the page tables of guest user mode; frame 0 means none.
        NewUserBaseptr = 15, "NEW_USER_BASEPTR", Guest, [Handled], {};
        /// Zeroes a frame.
        ClearPage = 16, "CLEAR_PAGE", Guest, [Handled], {};
        /// Copies a frame.
        CopyPage = 17, "COPY_PAGE", Guest, [Handled], {};
        /// Writes back and drops all CPUs' caches.
        FlushCacheGlobal = 18, "FLUSH_CACHE_GLOBAL", Guest, [Handled], {};
        /// Marks a 2 MiB range as one page, gone from Xen.
        MarkSuper = 19, "MARK_SUPER", Guest, [Refused EOPNOTSUPP], {};
        /// Unmarks such a range, gone from Xen.
        UnmarkSuper = 20, "UNMARK_SUPER", Guest, [Refused EOPNOTSUPP], {};
    }
}

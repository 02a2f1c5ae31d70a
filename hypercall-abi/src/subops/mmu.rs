//! Page tables: the commands of `mmuext_op` and `mmu_update`.

use super::operations;

operations! {
    /// Commands of `mmu_update`, in the low bits of [`MmuUpdate::ptr`](crate::mmu::MmuUpdate::ptr).
    MmuCommand of MmuUpdate, "MMU_", 3 bits, else ENOSYS {
        /// Stores an entry, checked.
        NormalPtUpdate = 0, "NORMAL_PT_UPDATE", Guest, [Handled], {
            [value "machine address of the entry; the new entry"]
            [errors
                EINVAL "the address is in no frame of the tables' owner, the frame is neither a page table nor writable, the entry has bits that a guest may not set, or it points at what its level may not";
                EBUSY "an L1 entry maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "frames or tables of another domain over which the caller has no control, or an L1 entry for device memory that the domain has no right to";
            ]
            [rules
                "A frame that is no page table is written as data, under a writable reference.";
            ]
        };
        /// Stores a frame's number in the machine-to-physical table.
        MachphysUpdate = 1, "MACHPHYS_UPDATE", Guest, [Handled], {
            [value "machine address of the frame; its new number in the machine-to-physical table"]
            [errors
                EINVAL "the frame is not the owner's";
                EPERM "the tables' owner is not the caller, or the frames' owner is another domain over which it has no control";
            ]
        };
        /// Stores an entry, keeping the accessed and dirty bits set by the CPU meanwhile.
        PtUpdatePreserveAd = 2, "PT_UPDATE_PRESERVE_AD", Guest, [Handled], {
            [value "machine address of the entry; the new entry"]
            [errors
                EINVAL "the address is in no frame of the tables' owner, the frame is neither a page table nor writable, the entry has bits that a guest may not set, or it points at what its level may not";
                EBUSY "an L1 entry maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "frames or tables of another domain over which the caller has no control, or an L1 entry for device memory that the domain has no right to";
            ]
            [rules
                "Accessed and dirty bits that the processor sets between the look and the store are kept.";
            ]
        };
        /// Stores an entry without translation; for a PV guest the same as the first.
        PtUpdateNoTranslate = 3, "PT_UPDATE_NO_TRANSLATE", Guest, [Handled], {
            [value "machine address of the entry; the new entry"]
            [errors
                EINVAL "the address is in no frame of the tables' owner, the frame is neither a page table nor writable, the entry has bits that a guest may not set, or it points at what its level may not";
                EBUSY "an L1 entry maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "frames or tables of another domain over which the caller has no control, or an L1 entry for device memory that the domain has no right to";
            ]
        };
    }
}

operations! {
    /// Commands of `mmuext_op`, in [`MmuextOp::command`](crate::mmu::MmuextOp).
    MmuextCmd of MmuextOp, "MMUEXT_", 32 bits, else ENOSYS {
        /// Makes a frame an L1 table and keeps it one.
        PinL1Table = 0, "PIN_L1_TABLE", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EINVAL "the frame is not the domain's, is pinned already, is in use as something else, or is no legal table of that level";
                EBUSY "an L1 entry below maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry below asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "an L1 entry below is for device memory that the domain has no right to";
            ]
            [rules
                "The whole tree below is validated. It is long work that goes on where it stopped when the call is executed again.";
            ]
        };
        /// Makes a frame an L2 table and keeps it one.
        PinL2Table = 1, "PIN_L2_TABLE", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EINVAL "the frame is not the domain's, is pinned already, is in use as something else, or is no legal table of that level";
                EBUSY "an L1 entry below maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry below asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "an L1 entry below is for device memory that the domain has no right to";
            ]
            [rules
                "The whole tree below is validated. It is long work that goes on where it stopped when the call is executed again.";
            ]
        };
        /// Makes a frame an L3 table and keeps it one.
        PinL3Table = 2, "PIN_L3_TABLE", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EINVAL "the frame is not the domain's, is pinned already, is in use as something else, or is no legal table of that level";
                EBUSY "an L1 entry below maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry below asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "an L1 entry below is for device memory that the domain has no right to";
            ]
            [rules
                "The whole tree below is validated. It is long work that goes on where it stopped when the call is executed again.";
            ]
        };
        /// Makes a frame an L4 table and keeps it one.
        PinL4Table = 3, "PIN_L4_TABLE", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EINVAL "the frame is not the domain's, is pinned already, is in use as something else, or is no legal table of that level";
                EBUSY "an L1 entry below maps a frame that is not the owner's, or that cannot be writable while it is something else";
                EACCES "an L1 entry below asks for another caching of a frame that the hypervisor shares with the guest";
                EPERM "an L1 entry below is for device memory that the domain has no right to";
            ]
            [rules
                "The whole tree below is validated. It is long work that goes on where it stopped when the call is executed again.";
            ]
        };
        /// Ends the keeping; other uses may hold the type on.
        UnpinTable = 4, "UNPIN_TABLE", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EINVAL "the frame is not the domain's, or is not pinned";
            ]
        };
        /// Switches the kernel's page tables.
        NewBaseptr = 5, "NEW_BASEPTR", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EPERM "for another domain";
                EINVAL "the frame is not the caller's, or is no legal L4 table";
            ]
            [rules
                "The LDT is taken away with the old tables and comes back page by page. Translations of the old tables are gone on this processor.";
            ]
        };
        /// Flushes this CPU's translations.
        TlbFlushLocal = 6, "TLB_FLUSH_LOCAL", Guest, [Handled], {
            [errors
                EPERM "for another domain";
            ]
        };
        /// Flushes one address on this CPU.
        InvlpgLocal = 7, "INVLPG_LOCAL", Guest, [Handled], {
            [value "arg1: the address"]
            [errors
                EPERM "for another domain";
            ]
        };
        /// Flushes the translations of the vCPUs in a mask.
        TlbFlushMulti = 8, "TLB_FLUSH_MULTI", Guest, [Handled], {
            [value "arg2: address of a bitmap of vCPUs"]
            [errors
                EPERM "for another domain";
                EINVAL "the bitmap cannot be read";
            ]
            [rules
                "When the call returns, no processor that runs one of them uses an older translation.";
            ]
        };
        /// Flushes one address for the vCPUs in a mask.
        InvlpgMulti = 9, "INVLPG_MULTI", Guest, [Handled], {
            [value "arg1: the address; arg2: address of a bitmap of vCPUs"]
            [errors
                EPERM "for another domain";
                EINVAL "the bitmap cannot be read";
            ]
            [rules
                "As for the flush of all; an address in the hypervisor's range does nothing.";
            ]
        };
        /// Flushes the translations of all the domain's vCPUs.
        TlbFlushAll = 10, "TLB_FLUSH_ALL", Guest, [Handled], {
            [errors
                EPERM "for another domain";
            ]
            [rules
                "When the call returns, no processor uses an older translation of this domain.";
            ]
        };
        /// Flushes one address for all the domain's vCPUs.
        InvlpgAll = 11, "INVLPG_ALL", Guest, [Handled], {
            [value "arg1: the address"]
            [errors
                EPERM "for another domain";
            ]
            [rules
                "As for the flush of all; an address in the hypervisor's range does nothing.";
            ]
        };
        /// Writes back and drops this CPU's caches.
        FlushCache = 12, "FLUSH_CACHE", Guest, [Handled], {
            [errors
                EPERM "for another domain";
                EACCES "the domain has no device that could see the difference";
            ]
        };
        /// Sets the local descriptor table by virtual address.
        SetLdt = 13, "SET_LDT", Guest, [Handled], {
            [value "arg1: the address, page-aligned; arg2: how many descriptors, 0 for none"]
            [errors
                EPERM "for another domain";
                EINVAL "more than 8192 descriptors, or an address that is misaligned or not the guest's";
            ]
            [rules
                "Pages are faulted in when a descriptor is used, each checked then; a page that holds a bad descriptor is not, and the fault is the guest's.";
            ]
        };
        /// Switches the page tables of guest user mode; frame 0 means none.
        NewUserBaseptr = 15, "NEW_USER_BASEPTR", Guest, [Handled], {
            [value "arg1: the frame, 0 for none"]
            [errors
                EPERM "for another domain";
                EINVAL "the frame is not the caller's, or is no legal L4 table";
            ]
            [rules
                "In force from the next return to guest user mode.";
            ]
        };
        /// Zeroes a frame.
        ClearPage = 16, "CLEAR_PAGE", Guest, [Handled], {
            [value "arg1: the frame"]
            [errors
                EINVAL "the frame is not the domain's, or cannot be written now";
            ]
        };
        /// Copies a frame.
        CopyPage = 17, "COPY_PAGE", Guest, [Handled], {
            [value "arg1: the frame to write; arg2: the frame to read"]
            [errors
                EINVAL "a frame is not the domain's, or the one to write cannot be written now";
            ]
        };
        /// Writes back and drops all CPUs' caches.
        FlushCacheGlobal = 18, "FLUSH_CACHE_GLOBAL", Guest, [Handled], {
            [errors
                EPERM "for another domain";
                EINVAL "the domain has no device that could see the difference";
            ]
        };
        /// Marks a 2 MiB range as one page, gone from Xen.
        MarkSuper = 19, "MARK_SUPER", Guest, [Refused EOPNOTSUPP], {};
        /// Unmarks such a range, gone from Xen.
        UnmarkSuper = 20, "UNMARK_SUPER", Guest, [Refused EOPNOTSUPP], {};
    }
}

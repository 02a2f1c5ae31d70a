//! Memory: the commands of `memory_op`.

use super::operations;

operations! {
    /// Commands of `memory_op`; the argument structs are in [`memory`](crate::memory).
    ///
    /// Bits from [`MEMOP_EXTENT_SHIFT`](crate::memory::MEMOP_EXTENT_SHIFT) up of a guest's command are the extent to start at;
    /// take them off first.
    MemoryOp of MemoryOp as xenmem, "XENMEM_", 6 bits, else ENOSYS {
        /// Allocates frames without a place in the physical map.
        IncreaseReservation = 0, "increase_reservation", Guest, [Handled], {
            [takes In memory::MemoryReservation]
            [returns "how many extents were done"]
            [rules
                "What stops the call shows as a number too small, not as an error: the argument, the domain, an extent above 2 MiB without control verbs, no memory, or a list that cannot be read or written.";
                "The frames are zeroed. Their numbers go to the list, unless it is null.";
            ]
        };
        /// Gives frames back.
        DecreaseReservation = 1, "decrease_reservation", Guest, [Handled], {
            [takes In memory::MemoryReservation]
            [returns "how many extents were done"]
            [rules
                "What stops the call shows as a number too small, not as an error: the argument, the domain, an extent above 2 MiB without control verbs, no memory, or a list that cannot be read or written.";
                "A frame that is mapped or a page table still goes away when its last use ends. No processor translates to it when it gets another owner.";
            ]
        };
        /// The highest machine frame number, plus one.
        MaximumRamPage = 2, "maximum_ram_page", Guest, [Handled], {
            [returns "the highest machine frame number, plus one"]
            [errors
                EINVAL "a start above 0 in the command";
            ]
        };
        /// Frames a domain has.
        CurrentReservation = 3, "current_reservation", Guest, [Handled], {
            [takes In memory::MemoryDomain]
            [returns "frames that the domain has"]
            [errors
                EINVAL "a start above 0 in the command";
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
            ]
        };
        /// Frames a domain may have.
        MaximumReservation = 4, "maximum_reservation", Guest, [Handled], {
            [takes In memory::MemoryDomain]
            [returns "frames that it may have, at most 2^32 - 1"]
            [errors
                EINVAL "a start above 0 in the command";
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
            ]
        };
        /// Frames that hold the machine-to-physical table.
        MachphysMfnList = 5, "machphys_mfn_list", Guest, [Handled], {
            [takes InOut memory::MachphysMfnList]
            [errors
                EOPNOTSUPP "the table is not in 2 MiB extents of its own";
            ]
        };
        /// Allocates frames and enters them into the physical map.
        PopulatePhysmap = 6, "populate_physmap", Guest, [Handled], {
            [takes In memory::MemoryReservation]
            [returns "how many extents were done"]
            [rules
                "What stops the call shows as a number too small, not as an error: the argument, the domain, an extent above 2 MiB without control verbs, no memory, or a list that cannot be read or written.";
                "The list holds guest frame numbers, which are entered into the machine-to-physical table, and is overwritten with machine frame numbers.";
            ]
        };
        /// Places a page at a guest frame number (translated guests).
        AddToPhysmap = 7, "add_to_physmap", Guest, [Handled], {
            [takes In memory::AddToPhysmap]
            [errors
                EDOM "a start above 65535 in the command";
                ENOSYS "a frame of another guest's";
                ESRCH "there is no such domain";
                EACCES "the guest has no physical map but its own";
            ]
        };
        /// The domain's own memory map.
        MemoryMap = 9, "memory_map", Guest, [Handled], {
            [takes InOut memory::MemoryMap]
            [errors
                ENOSYS "the caller has rights over the machine, and so no map of its own";
            ]
        };
        /// The machine's memory map.
        MachineMemoryMap = 10, "machine_memory_map", Guest, [Handled], {
            [takes InOut memory::MemoryMap]
            [errors
                EPERM "the caller has no rights over the machine";
                EINVAL "the buffer has too little room";
            ]
        };
        /// Exchanges frames for others of another size or place.
        Exchange = 11, "exchange", Guest, [Handled], {
            [takes InOut memory::MemoryExchange]
            [errors
                EINVAL "a start above 0 in the command, sides that differ in domain or size, more done than there is, or a frame that is not the domain's or in use";
                EPERM "an extent above 2 MiB without control verbs, or another domain over which the caller has no control";
                ESRCH "there is no such domain";
                ENOMEM "there is no memory of that form";
            ]
            [rules
                "In chunks of the larger extent, each done or not; `nr_exchanged` says how far it came, also after an error.";
            ]
        };
        /// Where the machine-to-physical table is mapped.
        MachphysMapping = 12, "machphys_mapping", Guest, [Handled], {
            [takes Out memory::MachphysMapping]
        };
        /// Sets another domain's memory map.
        SetMemoryMap = 13, "set_memory_map", Guest, [Handled], {
            [errors
                EINVAL "more entries than a domain's map has";
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
            ]
        };
        /// The highest guest frame number in use.
        MaximumGpfn = 14, "maximum_gpfn", Guest, [Handled], {
            [takes In memory::MemoryDomain]
            [returns "`max_pfn` of its shared page, less one"]
            [errors
                EINVAL "a start above 0 in the command";
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
            ]
        };
        /// Takes a page out of the physical map (translated guests).
        RemoveFromPhysmap = 15, "remove_from_physmap", Guest, [Handled], {
            [takes In memory::RemoveFromPhysmap]
            [errors
                EINVAL "a start above 0 in the command";
                ESRCH "there is no such domain";
                EACCES "the guest has no physical map but its own";
            ]
        };
        /// Populate-on-demand target, set.
        SetPodTarget = 16, "set_pod_target", Guest, [Handled], {
            [errors
                ESRCH "there is no such domain";
                EINVAL "the guest has no physical map but its own";
            ]
        };
        /// Populate-on-demand target, read.
        GetPodTarget = 17, "get_pod_target", Guest, [Handled], {
            [errors
                ESRCH "there is no such domain";
                EINVAL "the guest has no physical map but its own";
            ]
        };
        /// Frames saved by sharing.
        GetSharingFreedPages = 18, "get_sharing_freed_pages", Guest, [Handled], {};
        /// Frames that are shared.
        GetSharingSharedPages = 19, "get_sharing_shared_pages", Guest, [Handled], {};
        /// Guest paging by a tool.
        PagingOp = 20, "paging_op", Guest, [Refused ENOSYS], {};
        /// Page access rights set by a tool.
        AccessOp = 21, "access_op", Guest, [Handled], {
            [errors
                ESRCH "there is no such domain";
                EPERM "the caller itself";
                EINVAL "another guest: none has a physical map but its own";
            ]
        };
        /// Page sharing by a tool.
        SharingOp = 22, "sharing_op", Guest, [Refused ENOSYS], {};
        /// A list of `add_to_physmap`.
        AddToPhysmapBatch = 23, "add_to_physmap_batch", Guest, [Handled], {
            [takes In memory::AddToPhysmapBatch]
            [errors
                EDOM "a start above 65535 in the command";
                EOPNOTSUPP "a range";
                ESRCH "there is no such domain";
                EACCES "the guest has no physical map but its own";
            ]
        };
        /// Sets frames aside for a domain to be built.
        ClaimPages = 24, "claim_pages", Guest, [Handled], {
            [errors
                EINVAL "a start above 0 in the command, a list, an order, flags, or no such domain";
                EPERM "the caller has no control verbs";
                ENOSYS "a claim of more than nothing: frames are taken when they are given";
            ]
        };
        /// `machphys_mfn_list` for 32-bit guests.
        MachphysCompatMfnList = 25, "machphys_compat_mfn_list", Guest, [Refused EOPNOTSUPP], {};
        /// The domain's virtual NUMA layout.
        GetVnumainfo = 26, "get_vnumainfo", Guest, [Handled], {
            [errors
                EINVAL "a start above 0 in the command, or padding that is not 0";
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
                EOPNOTSUPP "the domain has no virtual NUMA layout";
            ]
        };
        /// Memory reserved for devices.
        ReservedDeviceMemoryMap = 27, "reserved_device_memory_map", Guest, [Handled], {
            [errors
                EINVAL "a start above 0 in the command, or flags of nobody";
            ]
        };
        /// Lists frames of another domain's resource, for mapping.
        AcquireResource = 28, "acquire_resource", Guest, [Handled], {
            [errors
                EINVAL "padding that is not 0, frames past the last number or past what the resource has, or an identifier of nobody";
                ESRCH "there is no such domain, or it is named by `DOMID_SELF`";
                EPERM "the caller itself, or it has no control verbs";
                EOPNOTSUPP "a resource of another kind than the grant table's";
            ]
        };
    }
}

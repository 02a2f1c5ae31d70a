//! Memory: the commands of `memory_op`.

use super::operations;

operations! {
    /// Commands of `memory_op`; the argument structs are in [`memory`](crate::memory).
    ///
    /// Bits from [`MEMOP_EXTENT_SHIFT`](crate::memory::MEMOP_EXTENT_SHIFT) up of a guest's command are the extent to start at;
    /// take them off first.
    MemoryOp of MemoryOp, "XENMEM_", 6 bits, else ENOSYS {
        /// Allocates frames without a place in the physical map.
        IncreaseReservation = 0, "increase_reservation", Guest, [Handled], {};
        /// Gives frames back.
        DecreaseReservation = 1, "decrease_reservation", Guest, [Handled], {};
        /// The highest machine frame number, plus one.
        MaximumRamPage = 2, "maximum_ram_page", Guest, [Handled], {};
        /// Frames a domain has.
        CurrentReservation = 3, "current_reservation", Guest, [Handled], {};
        /// Frames a domain may have.
        MaximumReservation = 4, "maximum_reservation", Guest, [Handled], {};
        /// Frames that hold the machine-to-physical table.
        MachphysMfnList = 5, "machphys_mfn_list", Guest, [Handled], {};
        /// Allocates frames and enters them into the physical map.
        PopulatePhysmap = 6, "populate_physmap", Guest, [Handled], {};
        /// Places a page at a guest frame number (translated guests).
        AddToPhysmap = 7, "add_to_physmap", Guest, [Handled], {};
        /// The domain's own memory map.
        MemoryMap = 9, "memory_map", Guest, [Handled], {};
        /// The machine's memory map.
        MachineMemoryMap = 10, "machine_memory_map", Guest, [Handled], {};
        /// Exchanges frames for others of another size or place.
        Exchange = 11, "exchange", Guest, [Handled], {};
        /// Where the machine-to-physical table is mapped.
        MachphysMapping = 12, "machphys_mapping", Guest, [Handled], {};
        /// Sets another domain's memory map.
        SetMemoryMap = 13, "set_memory_map", Guest, [Refused ENOSYS], {};
        /// The highest guest frame number in use.
        MaximumGpfn = 14, "maximum_gpfn", Guest, [Handled], {};
        /// Takes a page out of the physical map (translated guests).
        RemoveFromPhysmap = 15, "remove_from_physmap", Guest, [Handled], {};
        /// Populate-on-demand target, set.
        SetPodTarget = 16, "set_pod_target", Guest, [Refused ENOSYS], {};
        /// Populate-on-demand target, read.
        GetPodTarget = 17, "get_pod_target", Guest, [Refused ENOSYS], {};
        /// Frames saved by sharing.
        GetSharingFreedPages = 18, "get_sharing_freed_pages", Guest, [Refused ENOSYS], {};
        /// Frames that are shared.
        GetSharingSharedPages = 19, "get_sharing_shared_pages", Guest, [Refused ENOSYS], {};
        /// Guest paging by a tool.
        PagingOp = 20, "paging_op", Guest, [Refused ENOSYS], {};
        /// Page access rights set by a tool.
        AccessOp = 21, "access_op", Guest, [Refused ENOSYS], {};
        /// Page sharing by a tool.
        SharingOp = 22, "sharing_op", Guest, [Refused ENOSYS], {};
        /// A list of `add_to_physmap`.
        AddToPhysmapBatch = 23, "add_to_physmap_batch", Guest, [Handled], {};
        /// Sets frames aside for a domain to be built.
        ClaimPages = 24, "claim_pages", Guest, [Refused ENOSYS], {};
        /// `machphys_mfn_list` for 32-bit guests.
        MachphysCompatMfnList = 25, "machphys_compat_mfn_list", Guest, [Handled], {};
        /// The domain's virtual NUMA layout.
        GetVnumainfo = 26, "get_vnumainfo", Guest, [Handled], {};
        /// Memory reserved for devices.
        ReservedDeviceMemoryMap = 27, "reserved_device_memory_map", Guest, [Refused ENOSYS], {};
        /// Lists frames of another domain's resource, for mapping.
        AcquireResource = 28, "acquire_resource", Guest, [Refused ENOSYS], {};
    }
}

//! Command numbers inside the hypercalls that take one: the same idea as the table of hypercalls, one list per family.
//!
//! Every enum has `from_number(u64)` (a full register or a widened field; bits past the known numbers make it `None`, which
//! becomes `-ENOSYS`, so no truncation hides a caller's mistake), `number()` and `name()` as in Xen's header.

/// Defines a command enum with `from_number`, `number`, `name` and `ALL`.
macro_rules! command_enum {
    (
        $(#[$attribute:meta])*
        $enum:ident, $prefix:literal {
            $($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $enum {
            $($(#[$doc])* $variant = $number,)*
        }

        impl $enum {
            /// All commands, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The command of a number, or `None` when nobody defined it.
            #[must_use]
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// The name in Xen's public header.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($prefix, $name),)*
                }
            }
        }
    };
}
pub(crate) use command_enum;

command_enum! {
    /// Commands of `mmuext_op`, in [`MmuextOp::command`](crate::mmu::MmuextOp).
    MmuextCmd, "MMUEXT_" {
        /// Makes a frame an L1 table and keeps it one.
        PinL1Table = 0, "PIN_L1_TABLE";
        /// Makes a frame an L2 table and keeps it one.
        PinL2Table = 1, "PIN_L2_TABLE";
        /// Makes a frame an L3 table and keeps it one.
        PinL3Table = 2, "PIN_L3_TABLE";
        /// Makes a frame an L4 table and keeps it one.
        PinL4Table = 3, "PIN_L4_TABLE";
        /// Ends the keeping; other uses may hold the type on.
        UnpinTable = 4, "UNPIN_TABLE";
        /// Switches the kernel's page tables.
        NewBaseptr = 5, "NEW_BASEPTR";
        /// Flushes this CPU's translations.
        TlbFlushLocal = 6, "TLB_FLUSH_LOCAL";
        /// Flushes one address on this CPU.
        InvlpgLocal = 7, "INVLPG_LOCAL";
        /// Flushes the translations of the vCPUs in a mask.
        TlbFlushMulti = 8, "TLB_FLUSH_MULTI";
        /// Flushes one address for the vCPUs in a mask.
        InvlpgMulti = 9, "INVLPG_MULTI";
        /// Flushes the translations of all the domain's vCPUs.
        TlbFlushAll = 10, "TLB_FLUSH_ALL";
        /// Flushes one address for all the domain's vCPUs.
        InvlpgAll = 11, "INVLPG_ALL";
        /// Writes back and drops this CPU's caches.
        FlushCache = 12, "FLUSH_CACHE";
        /// Sets the local descriptor table by virtual address.
        SetLdt = 13, "SET_LDT";
        /// Switches the page tables of guest user mode; frame 0 means none.
        NewUserBaseptr = 15, "NEW_USER_BASEPTR";
        /// Zeroes a frame.
        ClearPage = 16, "CLEAR_PAGE";
        /// Copies a frame.
        CopyPage = 17, "COPY_PAGE";
        /// Writes back and drops all CPUs' caches.
        FlushCacheGlobal = 18, "FLUSH_CACHE_GLOBAL";
        /// Marks a 2 MiB range as one page, gone from Xen.
        MarkSuper = 19, "MARK_SUPER";
        /// Unmarks such a range, gone from Xen.
        UnmarkSuper = 20, "UNMARK_SUPER";
    }
}

command_enum! {
    /// Commands of `event_channel_op`; the argument structs are in [`evtchn`](crate::evtchn).
    EvtchnOp, "EVTCHNOP_" {
        /// Connects a new local port to a remote unbound one.
        BindInterdomain = 0, "bind_interdomain";
        /// Binds a virtual interrupt to a new port.
        BindVirq = 1, "bind_virq";
        /// Binds a physical interrupt to a new port.
        BindPirq = 2, "bind_pirq";
        /// Closes a port.
        Close = 3, "close";
        /// Signals the other end of a port.
        Send = 4, "send";
        /// Tells what a port is bound to.
        Status = 5, "status";
        /// Makes a port that a named domain may connect to.
        AllocUnbound = 6, "alloc_unbound";
        /// Makes a port that interrupts one of the domain's own vCPUs.
        BindIpi = 7, "bind_ipi";
        /// Moves a port to another vCPU.
        BindVcpu = 8, "bind_vcpu";
        /// Unmasks a port and delivers what is pending.
        Unmask = 9, "unmask";
        /// Closes all ports of a domain.
        Reset = 10, "reset";
        /// Switches to the FIFO layout.
        InitControl = 11, "init_control";
        /// Adds a frame to the FIFO's event array.
        ExpandArray = 12, "expand_array";
        /// Sets a FIFO event's priority.
        SetPriority = 13, "set_priority";
        /// A preempted `reset` going on; hypervisor-internal.
        ResetCont = 14, "reset_cont";
    }
}

command_enum! {
    /// Commands of `grant_table_op`; the argument structs are in [`grant`](crate::grant).
    GnttabOp, "GNTTABOP_" {
        /// Maps granted frames.
        MapGrantRef = 0, "map_grant_ref";
        /// Ends such mappings.
        UnmapGrantRef = 1, "unmap_grant_ref";
        /// Sizes the table and lists its frames.
        SetupTable = 2, "setup_table";
        /// Prints a table on the hypervisor's console.
        DumpTable = 3, "dump_table";
        /// Gives frames away.
        Transfer = 4, "transfer";
        /// Copies between own and granted frames.
        Copy = 5, "copy";
        /// Tells the table's size and limit.
        QuerySize = 6, "query_size";
        /// Ends a mapping and moves another one into its place.
        UnmapAndReplace = 7, "unmap_and_replace";
        /// Chooses the entry layout.
        SetVersion = 8, "set_version";
        /// Lists the frames of version 2's status words.
        GetStatusFrames = 9, "get_status_frames";
        /// Tells the entry layout.
        GetVersion = 10, "get_version";
        /// Exchanges two entries.
        SwapGrantRef = 11, "swap_grant_ref";
        /// Cleans or invalidates caches of a granted range.
        CacheFlush = 12, "cache_flush";
    }
}

command_enum! {
    /// Commands of `memory_op`; the argument structs are in [`memory`](crate::memory).
    ///
    /// Bits from [`MEMOP_EXTENT_SHIFT`](crate::memory::MEMOP_EXTENT_SHIFT) up of a guest's command are the extent to start at;
    /// take them off first.
    MemoryOp, "XENMEM_" {
        /// Allocates frames without a place in the physical map.
        IncreaseReservation = 0, "increase_reservation";
        /// Gives frames back.
        DecreaseReservation = 1, "decrease_reservation";
        /// The highest machine frame number, plus one.
        MaximumRamPage = 2, "maximum_ram_page";
        /// Frames a domain has.
        CurrentReservation = 3, "current_reservation";
        /// Frames a domain may have.
        MaximumReservation = 4, "maximum_reservation";
        /// Frames that hold the machine-to-physical table.
        MachphysMfnList = 5, "machphys_mfn_list";
        /// Allocates frames and enters them into the physical map.
        PopulatePhysmap = 6, "populate_physmap";
        /// Places a page at a guest frame number (translated guests).
        AddToPhysmap = 7, "add_to_physmap";
        /// The domain's own memory map.
        MemoryMap = 9, "memory_map";
        /// The machine's memory map.
        MachineMemoryMap = 10, "machine_memory_map";
        /// Exchanges frames for others of another size or place.
        Exchange = 11, "exchange";
        /// Where the machine-to-physical table is mapped.
        MachphysMapping = 12, "machphys_mapping";
        /// Sets another domain's memory map.
        SetMemoryMap = 13, "set_memory_map";
        /// The highest guest frame number in use.
        MaximumGpfn = 14, "maximum_gpfn";
        /// Takes a page out of the physical map (translated guests).
        RemoveFromPhysmap = 15, "remove_from_physmap";
        /// Populate-on-demand target, set.
        SetPodTarget = 16, "set_pod_target";
        /// Populate-on-demand target, read.
        GetPodTarget = 17, "get_pod_target";
        /// Frames saved by sharing.
        GetSharingFreedPages = 18, "get_sharing_freed_pages";
        /// Frames that are shared.
        GetSharingSharedPages = 19, "get_sharing_shared_pages";
        /// Guest paging by a tool.
        PagingOp = 20, "paging_op";
        /// Page access rights set by a tool.
        AccessOp = 21, "access_op";
        /// Page sharing by a tool.
        SharingOp = 22, "sharing_op";
        /// A list of `add_to_physmap`.
        AddToPhysmapBatch = 23, "add_to_physmap_batch";
        /// Sets frames aside for a domain to be built.
        ClaimPages = 24, "claim_pages";
        /// `machphys_mfn_list` for 32-bit guests.
        MachphysCompatMfnList = 25, "machphys_compat_mfn_list";
        /// The domain's virtual NUMA layout.
        GetVnumainfo = 26, "get_vnumainfo";
        /// Memory reserved for devices.
        ReservedDeviceMemoryMap = 27, "reserved_device_memory_map";
        /// Lists frames of another domain's resource, for mapping.
        AcquireResource = 28, "acquire_resource";
    }
}

command_enum! {
    /// Commands of `sched_op`; the argument structs are in [`sched`](crate::sched).
    SchedOp, "SCHEDOP_" {
        /// Lets others run.
        Yield = 0, "yield";
        /// Unmasks upcalls and sleeps until one is pending.
        Block = 1, "block";
        /// Ends the domain with a reason.
        Shutdown = 2, "shutdown";
        /// Sleeps until a listed port is pending or a time has come.
        Poll = 3, "poll";
        /// Ends another domain with a reason.
        RemoteShutdown = 4, "remote_shutdown";
        /// Records a reason without ending anything.
        ShutdownCode = 5, "shutdown_code";
        /// Arms, pokes or disarms a watchdog.
        Watchdog = 6, "watchdog";
        /// Pins the vCPU to a CPU for a while.
        PinOverride = 7, "pin_override";
    }
}

command_enum! {
    /// Commands of `vcpu_op`; the argument structs are in [`vcpu`](crate::vcpu).
    VcpuOp, "VCPUOP_" {
        /// Gives a vCPU its first register state.
        Initialise = 0, "initialise";
        /// Starts an initialised vCPU.
        Up = 1, "up";
        /// Stops a vCPU.
        Down = 2, "down";
        /// 1 when the vCPU is up, 0 when down, `-ENOENT` past the last.
        IsUp = 3, "is_up";
        /// Times spent running, runnable, blocked and offline.
        GetRunstateInfo = 4, "get_runstate_info";
        /// Registers an area that the hypervisor keeps those times in.
        RegisterRunstateMemoryArea = 5, "register_runstate_memory_area";
        /// Starts the periodic timer.
        SetPeriodicTimer = 6, "set_periodic_timer";
        /// Stops the periodic timer.
        StopPeriodicTimer = 7, "stop_periodic_timer";
        /// Sets the one-shot timer.
        SetSingleshotTimer = 8, "set_singleshot_timer";
        /// Stops the one-shot timer.
        StopSingleshotTimer = 9, "stop_singleshot_timer";
        /// Moves `vcpu_info` to a place of the guest's choice.
        RegisterVcpuInfo = 10, "register_vcpu_info";
        /// Raises the vCPU's NMI.
        SendNmi = 11, "send_nmi";
        /// The physical identity of a pinned vCPU.
        GetPhysid = 12, "get_physid";
        /// Registers a copy of the vCPU's time record, also readable from guest user mode.
        RegisterVcpuTimeMemoryArea = 13, "register_vcpu_time_memory_area";
    }
}

command_enum! {
    /// Commands of `physdev_op`; the argument structs are in [`physdev`](crate::physdev).
    PhysdevOp, "PHYSDEVOP_" {
        /// Unmasks an interrupt, only in the old form of the call.
        IrqUnmaskNotify = 4, "IRQ_UNMASK_NOTIFY";
        /// Whether an interrupt needs an end-of-interrupt call.
        IrqStatusQuery = 5, "irq_status_query";
        /// Sets the vCPU's virtual I/O privilege level.
        SetIopl = 6, "set_iopl";
        /// Sets the vCPU's port bitmap.
        SetIobitmap = 7, "set_iobitmap";
        /// Reads an I/O APIC register.
        ApicRead = 8, "apic_read";
        /// Writes an I/O APIC register.
        ApicWrite = 9, "apic_write";
        /// Allocates a vector for an interrupt.
        AllocIrqVector = 10, "alloc_irq_vector";
        /// Frees such a vector; does nothing in Xen.
        FreeIrqVector = 11, "free_irq_vector";
        /// Ends an interrupt.
        Eoi = 12, "eoi";
        /// Maps a machine interrupt to a physical-interrupt number.
        MapPirq = 13, "map_pirq";
        /// Ends such a mapping.
        UnmapPirq = 14, "unmap_pirq";
        /// Reports a PCI function, short form.
        ManagePciAdd = 15, "manage_pci_add";
        /// Reports that a PCI function went away.
        ManagePciRemove = 16, "manage_pci_remove";
        /// Registers a bitmap of interrupts needing an end, which also stops masking them.
        PirqEoiGmfnV1 = 17, "pirq_eoi_gmfn_v1";
        /// Restores message interrupts after sleep.
        RestoreMsi = 19, "restore_msi";
        /// Reports a PCI function with its kind.
        ManagePciAddExt = 20, "manage_pci_add_ext";
        /// Sets trigger and polarity of a global interrupt.
        SetupGsi = 21, "setup_gsi";
        /// Allocates a physical-interrupt number.
        GetFreePirq = 23, "get_free_pirq";
        /// Tells whether PCI configuration space is reserved in the memory map.
        PciMmcfgReserved = 24, "pci_mmcfg_reserved";
        /// Reports a PCI function by segment.
        PciDeviceAdd = 25, "pci_device_add";
        /// Reports that such a function went away.
        PciDeviceRemove = 26, "pci_device_remove";
        /// Restores message interrupts, by segment.
        RestoreMsiExt = 27, "restore_msi_ext";
        /// Registers a bitmap of interrupts needing an end.
        PirqEoiGmfnV2 = 28, "pirq_eoi_gmfn_v2";
        /// Debug-port reset notices.
        DbgpOp = 29, "dbgp_op";
        /// Prepares a device for MSI-X.
        PrepareMsix = 30, "prepare_msix";
        /// Undoes that.
        ReleaseMsix = 31, "release_msix";
    }
}

command_enum! {
    /// Commands of `callback_op`.
    CallbackOp, "CALLBACKOP_" {
        /// Registers an entry point.
        Register = 0, "register";
        /// Unregisters it.
        Unregister = 1, "unregister";
    }
}

command_enum! {
    /// Which entry point a `callback_op` is about.
    CallbackType, "CALLBACKTYPE_" {
        /// Event upcalls.
        Event = 0, "event";
        /// The guest state could not be restored (bad selector).
        Failsafe = 1, "failsafe";
        /// SYSCALL from 64-bit guest user mode.
        Syscall = 2, "syscall";
        /// SYSENTER, the number before interface 0x00030207; refused on 64 bit.
        SysenterDeprecated = 3, "sysenter_deprecated";
        /// Virtual NMI.
        Nmi = 4, "nmi";
        /// SYSENTER from guest user mode.
        Sysenter = 5, "sysenter";
        /// SYSCALL from 32-bit guest user mode.
        Syscall32 = 7, "syscall32";
    }
}

command_enum! {
    /// Commands of `xen_version`; the results are in [`version`](crate::version).
    VersionOp, "XENVER_" {
        /// Returns major << 16 | minor.
        Version = 0, "version";
        /// The text after the numbers.
        Extraversion = 1, "extraversion";
        /// Compiler, builder and date.
        CompileInfo = 2, "compile_info";
        /// Guest kinds it can run.
        Capabilities = 3, "capabilities";
        /// Source revision.
        Changeset = 4, "changeset";
        /// Where the hypervisor's address range begins.
        PlatformParameters = 5, "platform_parameters";
        /// Feature bits, 32 per submap.
        GetFeatures = 6, "get_features";
        /// Returns the page size.
        Pagesize = 7, "pagesize";
        /// The domain's 16-byte handle.
        GuestHandle = 8, "guest_handle";
        /// The hypervisor's command line, privileged.
        Commandline = 9, "commandline";
        /// The build identifier.
        BuildId = 10, "build_id";
    }
}

command_enum! {
    /// Commands of `console_io(command, count, buffer)`: the hypervisor's own console, for domains with the right (`-EPERM`).
    ///
    /// Such a domain learns of input by [`Virq::CONSOLE`](crate::Virq::CONSOLE); others print through the ring in
    /// [`io::console`](crate::io::console).
    ConsoleIoOp, "CONSOLEIO_" {
        /// Prints `count` bytes; returns 0.
        Write = 0, "write";
        /// Gives up to `count` bytes that came in, without waiting; returns how many.
        Read = 1, "read";
    }
}

command_enum! {
    /// Commands of `nmi_op`.
    NmiOp, "XENNMI_" {
        /// Registers the callback, vCPU 0 only.
        RegisterCallback = 0, "register_callback";
        /// Unregisters it.
        UnregisterCallback = 1, "unregister_callback";
    }
}

command_enum! {
    /// Commands of `vm_assist`.
    VmAssistCmd, "VMASST_CMD_" {
        /// Turns an assist on.
        Enable = 0, "enable";
        /// Turns it off.
        Disable = 1, "disable";
    }
}

command_enum! {
    /// Assists of `vm_assist`.
    VmAssist, "VMASST_TYPE_" {
        /// 32-bit segment limits of 4 GiB.
        FourGbSegments = 0, "4gb_segments";
        /// Vector 15 when that assist was used.
        FourGbSegmentsNotify = 1, "4gb_segments_notify";
        /// Stores to the guest's page tables trap and are carried out, checked.
        WritablePagetables = 2, "writable_pagetables";
        /// 32-bit page-directory pointers above 4 GiB.
        PaeExtendedCr3 = 3, "pae_extended_cr3";
        /// The flags image of trap frames holds the virtual I/O privilege level, and iret sets it.
        ArchitecturalIopl = 4, "architectural_iopl";
        /// Runstate areas carry an update bit.
        RunstateUpdateFlag = 5, "runstate_update_flag";
        /// Guest user mode cannot see the machine-to-physical table.
        M2pStrict = 32, "m2p_strict";
    }
}

command_enum! {
    /// What `set_segment_base` sets.
    SegmentBase, "SEGBASE_" {
        /// The FS base.
        Fs = 0, "FS";
        /// The GS base of guest user mode.
        GsUser = 1, "GS_USER";
        /// The GS base of the guest kernel.
        GsKernel = 2, "GS_KERNEL";
        /// The GS selector of guest user mode.
        GsUserSel = 3, "GS_USER_SEL";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! round_trip {
        ($($enum:ident)*) => {
            $(
                for &command in $enum::ALL {
                    assert_eq!($enum::from_number(u64::from(command.number())), Some(command));
                    assert_eq!($enum::from_number(u64::from(command.number()) | 1 << 32), None);
                }
            )*
        };
    }

    #[test]
    fn numbers_round_trip_and_high_bits_are_refused() {
        round_trip!(MmuextCmd EvtchnOp GnttabOp MemoryOp SchedOp VcpuOp PhysdevOp CallbackOp CallbackType VersionOp);
        round_trip!(ConsoleIoOp NmiOp VmAssistCmd VmAssist SegmentBase);
    }

    #[test]
    fn names_carry_the_prefix_of_the_header() {
        assert_eq!(MmuextCmd::NewUserBaseptr.name(), "MMUEXT_NEW_USER_BASEPTR");
        assert_eq!(VmAssist::FourGbSegments.name(), "VMASST_TYPE_4gb_segments");
    }
}

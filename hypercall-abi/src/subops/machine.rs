//! Calls about the machine, and calls for other kinds of guests: families of which an unprivileged 64-bit PV guest gets refusals.

use super::operations;

operations! {
    /// Commands of `platform_op`, in [`PlatformHeader::cmd`](crate::platform::PlatformHeader::cmd).
    PlatformOp of PlatformOp, "XENPF_", 32 bits, else ENOSYS {
        /// Sets the wall clock, 32 bits of seconds.
        Settime32 = 17, "settime32", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Sets a memory-type range.
        AddMemtype = 31, "add_memtype", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Frees it.
        DelMemtype = 32, "del_memtype", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Reads it.
        ReadMemtype = 33, "read_memtype", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Loads microcode.
        MicrocodeUpdate = 35, "microcode_update", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Notes a quirk of the machine.
        PlatformQuirk = 39, "platform_quirk", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// A CPU's family, model and stepping.
        GetCpuVersion = 48, "get_cpu_version", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// A call of the firmware.
        EfiRuntimeCall = 49, "efi_runtime_call", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Facts that the firmware left.
        FirmwareInfo = 50, "firmware_info", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Sends the machine to sleep.
        EnterAcpiSleep = 51, "enter_acpi_sleep", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Notes a CPU's new frequency.
        ChangeFreq = 52, "change_freq", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Idle times.
        Getidletime = 53, "getidletime", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Tells a CPU's power states.
        SetProcessorPminfo = 54, "set_processor_pminfo", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Facts about a CPU.
        GetCpuinfo = 55, "get_cpuinfo", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Brings a CPU up.
        CpuOnline = 56, "cpu_online", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Takes a CPU down.
        CpuOffline = 57, "cpu_offline", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// A CPU was added.
        CpuHotadd = 58, "cpu_hotadd", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Memory was added.
        MemHotadd = 59, "mem_hotadd", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Parks cores.
        CoreParking = 60, "core_parking", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Reads and writes model registers.
        ResourceOp = 61, "resource_op", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// Sets the wall clock.
        Settime64 = 62, "settime64", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
        /// A symbol of the hypervisor.
        GetSymbol = 63, "get_symbol", Hardware, [LeftOut ENOSYS "the control interface is another (design record 0005)"], {};
    }
}

operations! {
    /// Commands of `xsm_op` under the FLASK security module (public/xsm/flask_op.h), in the first word of its argument.
    FlaskOp of XsmOp, "FLASK_", 32 bits, else ENOSYS {
        /// Loads a policy.
        Load = 1, "LOAD", Control, [Refused ENOSYS], {};
        /// Whether the policy is enforced.
        Getenforce = 2, "GETENFORCE", Control, [Refused ENOSYS], {};
        /// Turns enforcing on or off.
        Setenforce = 3, "SETENFORCE", Control, [Refused ENOSYS], {};
        /// The number of a security context.
        ContextToSid = 4, "CONTEXT_TO_SID", Control, [Refused ENOSYS], {};
        /// The security context of a number.
        SidToContext = 5, "SID_TO_CONTEXT", Control, [Refused ENOSYS], {};
        /// What one context may do to another.
        Access = 6, "ACCESS", Control, [Refused ENOSYS], {};
        /// The context of what a context makes.
        Create = 7, "CREATE", Control, [Refused ENOSYS], {};
        /// The context to relabel to.
        Relabel = 8, "RELABEL", Control, [Refused ENOSYS], {};
        /// Contexts of a user, gone.
        User = 9, "USER", Control, [Refused ENOSYS], {};
        /// The newest policy version that is understood.
        Policyvers = 10, "POLICYVERS", Control, [Refused ENOSYS], {};
        /// Reads a switch of the policy.
        Getbool = 11, "GETBOOL", Control, [Refused ENOSYS], {};
        /// Sets a switch of the policy.
        Setbool = 12, "SETBOOL", Control, [Refused ENOSYS], {};
        /// Puts set switches into force.
        Commitbools = 13, "COMMITBOOLS", Control, [Refused ENOSYS], {};
        /// Whether the policy has levels.
        Mls = 14, "MLS", Control, [Refused ENOSYS], {};
        /// Turns the module off, gone.
        Disable = 15, "DISABLE", Control, [Refused ENOSYS], {};
        /// Reads how large the cache of decisions may be.
        GetavcThreshold = 16, "GETAVC_THRESHOLD", Control, [Refused ENOSYS], {};
        /// Sets it.
        SetavcThreshold = 17, "SETAVC_THRESHOLD", Control, [Refused ENOSYS], {};
        /// How full the cache is.
        AvcHashstats = 18, "AVC_HASHSTATS", Control, [Refused ENOSYS], {};
        /// How often it was asked.
        AvcCachestats = 19, "AVC_CACHESTATS", Control, [Refused ENOSYS], {};
        /// The context of a member of a shared object.
        Member = 20, "MEMBER", Control, [Refused ENOSYS], {};
        /// Gives a context to an interrupt, port range, memory range or device.
        AddOcontext = 21, "ADD_OCONTEXT", Control, [Refused ENOSYS], {};
        /// Takes it away.
        DelOcontext = 22, "DEL_OCONTEXT", Control, [Refused ENOSYS], {};
        /// The context at the other end of an event channel.
        GetPeerSid = 23, "GET_PEER_SID", Control, [Refused ENOSYS], {};
        /// Changes the context of a domain.
        RelabelDomain = 24, "RELABEL_DOMAIN", Control, [Refused ENOSYS], {};
        /// Gives a context to a device-tree node.
        DevicetreeLabel = 25, "DEVICETREE_LABEL", Control, [Refused ENOSYS], {};
    }
}

operations! {
    /// Commands of `xenoprof_op` (public/xenoprof.h).
    XenoprofOp of XenoprofOp, "XENOPROF_", 32 bits, else EINVAL {
        /// What the processor can sample, and who leads.
        Init = 0, "init", Hardware, [Handled], {};
        /// Empties the list of domains that sample themselves.
        ResetActiveList = 1, "reset_active_list", Hardware, [Refused EPERM], {};
        /// Empties the list of domains that are sampled from outside.
        ResetPassiveList = 2, "reset_passive_list", Hardware, [Refused EPERM], {};
        /// Enters a domain into the first list.
        SetActive = 3, "set_active", Hardware, [Refused EPERM], {};
        /// Enters a domain into the second list.
        SetPassive = 4, "set_passive", Hardware, [Refused EPERM], {};
        /// Takes the processor's counters.
        ReserveCounters = 5, "reserve_counters", Hardware, [Refused EPERM], {};
        /// Sets a counter up.
        Counter = 6, "counter", Hardware, [Refused EPERM], {};
        /// Loads the counters.
        SetupEvents = 7, "setup_events", Hardware, [Refused EPERM], {};
        /// Lets samples raise the virtual interrupt.
        EnableVirq = 8, "enable_virq", Hardware, [Refused EPERM], {};
        /// Starts sampling.
        Start = 9, "start", Hardware, [Refused EPERM], {};
        /// Stops sampling.
        Stop = 10, "stop", Hardware, [Refused EPERM], {};
        /// Stops the virtual interrupt.
        DisableVirq = 11, "disable_virq", Hardware, [Refused EPERM], {};
        /// Gives the counters back.
        ReleaseCounters = 12, "release_counters", Hardware, [Refused EPERM], {};
        /// Ends the session.
        Shutdown = 13, "shutdown", Hardware, [Refused EPERM], {};
        /// Maps the sample buffer.
        GetBuffer = 14, "get_buffer", Hardware, [LeftOut ENODEV "nothing samples into it"], {};
        /// How deep call chains are recorded.
        SetBacktrace = 15, "set_backtrace", Hardware, [Refused EPERM], {};
        /// What instruction-based sampling offers.
        GetIbsCaps = 16, "get_ibs_caps", Hardware, [Refused EPERM], {};
        /// Sets instruction-based sampling up.
        IbsCounter = 17, "ibs_counter", Hardware, [Refused EPERM], {};
    }
}

operations! {
    /// Commands of `hvm_op` (public/hvm/hvm_op.h): for hardware-virtualized domains and those that serve them.
    HvmOp of HvmOp, "HVMOP_", 64 bits, else ENOSYS {
        /// Sets a parameter of a domain.
        SetParam = 0, "set_param", Guest, [Handled], {
            [takes In hvm::HvmParam]
            [errors
                EFAULT "the argument cannot be read";
                EINVAL "there is no such parameter, or the domain is not hardware-virtualized: none is";
                ESRCH "there is no such domain";
            ]
        };
        /// Reads a parameter of a domain.
        GetParam = 1, "get_param", Guest, [Handled], {
            [takes In hvm::HvmParam]
            [errors
                EFAULT "the argument cannot be read";
                EINVAL "there is no such parameter, or the domain is not hardware-virtualized: none is";
                ESRCH "there is no such domain";
            ]
        };
        /// Flushes translations of a domain's vCPUs.
        FlushTlbs = 5, "flush_tlbs", Guest, [Refused EINVAL], {};
        /// A page table of a shadowed guest goes away.
        PagetableDying = 9, "pagetable_dying", Guest, [Handled], {
            [takes In hvm::PagetableDying]
            [errors
                EFAULT "the argument cannot be read";
                ESRCH "there is no such domain";
                EOPNOTSUPP "another domain";
                EINVAL "the caller itself: it is not hardware-virtualized";
            ]
        };
        /// System time for a hardware-virtualized guest.
        GetTime = 10, "get_time", Guest, [Handled], {
            [value "address of 8 bytes: system time in ns"]
            [errors
                EFAULT "the answer cannot be written";
            ]
        };
        /// Writes a record to the trace buffer.
        Xentrace = 11, "xentrace", Guest, [Handled], {
            [takes In hvm::Xentrace]
            [errors
                EFAULT "the argument cannot be read";
                EINVAL "more bytes than a record holds, or an event above the guests' own";
            ]
            [rules
                "Nobody keeps a trace: a good record is dropped.";
            ]
        };
        /// What a frame of a guest is.
        GetMemType = 15, "get_mem_type", Guest, [Handled], {
            [takes In hvm::GetMemType]
            [errors
                EFAULT "the argument cannot be read";
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
                EINVAL "the domain is not hardware-virtualized: none is";
            ]
        };
        /// Sets a vCPU's vector for events.
        SetEvtchnUpcallVector = 23, "set_evtchn_upcall_vector", Guest, [Refused EINVAL], {};
        /// Sends an event to who monitors the domain.
        GuestRequestVmEvent = 24, "guest_request_vm_event", Guest, [Handled], {
            [value "null"]
            [errors
                EINVAL "an argument that is not null";
            ]
        };
        /// Alternative physical maps.
        Altp2m = 25, "altp2m", Guest, [Refused EOPNOTSUPP], {};
    }
}

operations! {
    /// Commands of `kexec_op` (public/kexec.h).
    KexecOp of KexecOp, "KEXEC_CMD_", 64 bits, else ENOSYS {
        /// Starts the loaded kernel.
        Kexec = 0, "kexec", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
        /// Loads a kernel, the old form.
        LoadV1 = 1, "kexec_load_v1", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
        /// Unloads it, the old form.
        UnloadV1 = 2, "kexec_unload_v1", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
        /// Where a reserved range lies.
        GetRange = 3, "kexec_get_range", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
        /// Loads a kernel.
        Load = 4, "kexec_load", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
        /// Unloads it.
        Unload = 5, "kexec_unload", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
        /// Whether one is loaded.
        Status = 6, "kexec_status", Hardware, [LeftOut ENOSYS "there is no other kernel to start"], {};
    }
}

operations! {
    /// Commands of `argo_op` (public/argo.h).
    ArgoOp of ArgoOp, "XEN_ARGO_OP_", 32 bits, else ENOSYS {
        /// Registers a ring to receive in.
        RegisterRing = 1, "register_ring", Guest, [Refused ENOSYS], {};
        /// Takes it back.
        UnregisterRing = 2, "unregister_ring", Guest, [Refused ENOSYS], {};
        /// Sends a message to a ring.
        Sendv = 3, "sendv", Guest, [Refused ENOSYS], {};
        /// Asks for notice of room in rings.
        Notify = 4, "notify", Guest, [Refused ENOSYS], {};
    }
}

operations! {
    /// Commands of `xenpmu_op` (public/pmu.h).
    XenpmuOp of XenpmuOp, "XENPMU_", 32 bits, else EOPNOTSUPP {
        /// Reads what may be sampled.
        ModeGet = 0, "mode_get", Guest, [Refused EOPNOTSUPP], {};
        /// Sets what may be sampled.
        ModeSet = 1, "mode_set", Guest, [Refused EOPNOTSUPP], {};
        /// Reads which features are on.
        FeatureGet = 2, "feature_get", Guest, [Refused EOPNOTSUPP], {};
        /// Turns features on.
        FeatureSet = 3, "feature_set", Guest, [Refused EOPNOTSUPP], {};
        /// Registers the frame that counters are shared in.
        Init = 4, "init", Guest, [Refused EOPNOTSUPP], {};
        /// Takes it back.
        Finish = 5, "finish", Guest, [Refused EOPNOTSUPP], {};
        /// Loads the vCPU's interrupt entry for counters.
        LvtpcSet = 6, "lvtpc_set", Guest, [Refused EOPNOTSUPP], {};
        /// Loads the cached counters into the processor.
        Flush = 7, "flush", Guest, [Refused EOPNOTSUPP], {};
    }
}

operations! {
    /// Commands of `dm_op` (public/hvm/dm_op.h), in the first word of its first buffer: for device models of hardware-virtualized domains.
    DmOp of DmOp, "XEN_DMOP_", 32 bits, else EINVAL {
        /// Makes a server of emulated accesses.
        CreateIoreqServer = 1, "create_ioreq_server", Control, [Refused EINVAL], {};
        /// Tells its frames and port.
        GetIoreqServerInfo = 2, "get_ioreq_server_info", Control, [Refused EINVAL], {};
        /// Sends a range of ports, memory or devices to a server.
        MapIoRangeToIoreqServer = 3, "map_io_range_to_ioreq_server", Control, [Refused EINVAL], {};
        /// Takes the range back.
        UnmapIoRangeFromIoreqServer = 4, "unmap_io_range_from_ioreq_server", Control, [Refused EINVAL], {};
        /// Turns a server on or off.
        SetIoreqServerState = 5, "set_ioreq_server_state", Control, [Refused EINVAL], {};
        /// Removes a server.
        DestroyIoreqServer = 6, "destroy_ioreq_server", Control, [Refused EINVAL], {};
        /// Which frames of a range were written.
        TrackDirtyVram = 7, "track_dirty_vram", Control, [Refused EINVAL], {};
        /// Sets a PCI interrupt line.
        SetPciIntxLevel = 8, "set_pci_intx_level", Control, [Refused EINVAL], {};
        /// Sets an ISA interrupt line.
        SetIsaIrqLevel = 9, "set_isa_irq_level", Control, [Refused EINVAL], {};
        /// Routes a PCI interrupt link.
        SetPciLinkRoute = 10, "set_pci_link_route", Control, [Refused EINVAL], {};
        /// Tells which frames the caller wrote.
        ModifiedMemory = 11, "modified_memory", Control, [Refused EINVAL], {};
        /// Changes what frames are.
        SetMemType = 12, "set_mem_type", Control, [Refused EINVAL], {};
        /// Raises an event in a vCPU.
        InjectEvent = 13, "inject_event", Control, [Refused EINVAL], {};
        /// Raises a message interrupt.
        InjectMsi = 14, "inject_msi", Control, [Refused EINVAL], {};
        /// Sends accesses to frames of a kind to a server.
        MapMemTypeToIoreqServer = 15, "map_mem_type_to_ioreq_server", Control, [Refused EINVAL], {};
        /// Shuts the domain down.
        RemoteShutdown = 16, "remote_shutdown", Control, [Refused EINVAL], {};
        /// Moves frames in the physical map.
        RelocateMemory = 17, "relocate_memory", Control, [Refused EINVAL], {};
        /// Sets the caching of a range.
        PinMemoryCacheattr = 18, "pin_memory_cacheattr", Control, [Refused EINVAL], {};
        /// Sets an interrupt line.
        SetIrqLevel = 19, "set_irq_level", Control, [Refused EINVAL], {};
        /// How many vCPUs the domain has.
        NrVcpus = 20, "nr_vcpus", Control, [Refused EINVAL], {};
    }
}

operations! {
    /// Commands of `hypfs_op` (public/hypfs.h).
    HypfsOp of HypfsOp, "XEN_HYPFS_OP_", 32 bits, else ENOSYS {
        /// The version of the interface.
        GetVersion = 0, "get_version", Control, [LeftOut ENOSYS "there is no tree of parameters"], {};
        /// Reads an entry.
        Read = 1, "read", Control, [LeftOut ENOSYS "there is no tree of parameters"], {};
        /// Writes an entry.
        WriteContents = 2, "write_contents", Control, [LeftOut ENOSYS "there is no tree of parameters"], {};
    }
}

operations! {
    /// Commands of `mca` (public/arch-x86/xen-mca.h), in the first word of its argument.
    McaOp of Arch0, "XEN_MC_", 32 bits, else EINVAL {
        /// Takes a record of a machine check.
        Fetch = 1, "fetch", Hardware, [LeftOut ENOSYS "machine checks are not recorded: the first one ends the host"], {};
        /// Tells a domain of a machine check, gone.
        Notifydomain = 2, "notifydomain", Hardware, [Refused EINVAL], {};
        /// What processors there are.
        Physcpuinfo = 3, "physcpuinfo", Hardware, [LeftOut ENOSYS "machine checks are not recorded: the first one ends the host"], {};
        /// Writes registers before a test of machine checks.
        Msrinject = 4, "msrinject", Hardware, [LeftOut ENOSYS "machine checks are not recorded: the first one ends the host"], {};
        /// Raises a machine check.
        Mceinject = 5, "mceinject", Hardware, [LeftOut ENOSYS "machine checks are not recorded: the first one ends the host"], {};
        /// Raises a machine check on chosen processors.
        InjectV2 = 6, "inject_v2", Hardware, [LeftOut ENOSYS "machine checks are not recorded: the first one ends the host"], {};
    }
}

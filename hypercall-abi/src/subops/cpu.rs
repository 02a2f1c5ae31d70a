//! Virtual processors: the commands of `vcpu_op`, `sched_op`, `callback_op` and `nmi_op`, and what the other calls about them
//! choose from.

use super::operations;

operations! {
    /// Commands of `sched_op`; the argument structs are in [`sched`](crate::sched).
    SchedOp of SchedOp as sched, "SCHEDOP_", 32 bits, else ENOSYS {
        /// Lets others run.
        Yield = 0, "yield", Guest, [Handled], {};
        /// Unmasks upcalls and sleeps until one is pending.
        Block = 1, "block", Guest, [Handled], {
            [rules
                "Unmasks upcalls and then looks for pending ones: an event that comes between the two ends the sleep at once.";
            ]
        };
        /// Ends the domain with a reason.
        Shutdown = 2, "shutdown", Guest, [Handled], {
            [takes In sched::SchedShutdown]
            [rules
                "Does not return, but for reason suspend, when the domain is resumed.";
            ]
        };
        /// Sleeps until a listed port is pending or a time has come.
        Poll = 3, "poll", Guest, [Handled], {
            [takes In sched::SchedPoll]
            [errors
                EINVAL "more than 128 ports, or a port that does not exist";
            ]
            [rules
                "The vCPU counts as polling before the pending bits are looked at, so that no event is slept through. Upcalls stay as masked as they are.";
            ]
        };
        /// Ends another domain with a reason.
        RemoteShutdown = 4, "remote_shutdown", Guest, [Handled], {
            [takes In sched::SchedRemoteShutdown]
            [errors
                ESRCH "there is no such domain";
                EPERM "the caller has no control over it";
            ]
        };
        /// Records a reason without ending anything.
        ShutdownCode = 5, "shutdown_code", Guest, [Handled], {
            [takes In sched::SchedShutdown]
        };
        /// Arms, pokes or disarms a watchdog.
        Watchdog = 6, "watchdog", Guest, [Handled], {
            [takes In sched::SchedWatchdog]
            [returns "the number of a new watchdog, from 1; otherwise 0"]
            [errors
                EINVAL "a number above 2, one that is not armed, or a new watchdog without time";
                ENOSPC "both are armed";
            ]
        };
        /// Pins the vCPU to a CPU for a while.
        PinOverride = 7, "pin_override", Guest, [Handled], {
            [takes In sched::SchedPinOverride]
            [errors
                EPERM "the caller has no rights over hardware";
                EINVAL "it has, and names no processor, or lets go of a vCPU that is not held";
                EBUSY "the vCPU is held already";
            ]
        };
    }
}

operations! {
    /// Commands of `vcpu_op`; the argument structs are in [`vcpu`](crate::vcpu).
    VcpuOp of VcpuOp as vcpu, "VCPUOP_", 32 bits, else ENOSYS {
        /// Gives a vCPU its first register state.
        Initialise = 0, "initialise", Guest, [Handled], {
            [takes In vcpu::VcpuGuestContext]
            [errors
                EINVAL "the vCPU has no `vcpu_info` yet, a base pointer is no legal L4 table, or the descriptor table is refused";
                EEXIST "it was initialised before";
                EBUSY "its state is in use";
            ]
        };
        /// Starts an initialised vCPU.
        Up = 1, "up", Guest, [Handled], {
            [errors
                EINVAL "it was not initialised";
            ]
        };
        /// Stops a vCPU.
        Down = 2, "down", Guest, [Handled], {
            [rules
                "The last vCPU that goes down shuts the domain down, as with reason poweroff.";
                "The call returns on another vCPU when the target may still finish its current instructions; one that takes itself down does not run on.";
            ]
        };
        /// 1 when the vCPU is up, 0 when down, `-ENOENT` past the last.
        IsUp = 3, "is_up", Guest, [Handled], {
            [returns "1 up, 0 down"]
        };
        /// Times spent running, runnable, blocked and offline.
        GetRunstateInfo = 4, "get_runstate_info", Guest, [Handled], {
            [takes Out vcpu::RunstateInfo]
        };
        /// Registers an area that the hypervisor keeps those times in.
        RegisterRunstateMemoryArea = 5, "register_runstate_memory_area", Guest, [Handled], {
            [takes In vcpu::VcpuRegisterRunstateMemoryArea]
            [errors
                EFAULT "the area is not in the guest's range of addresses";
            ]
            [rules
                "Written in the address space that is in force when the vCPU is put on a processor; an area that is not mapped then is skipped.";
                "With the assist `runstate_update_flag`, the top bit of `state_entry_time` is set before the area is written and cleared after: who reads it sees the bit, or the same value before and after.";
            ]
        };
        /// Starts the periodic timer.
        SetPeriodicTimer = 6, "set_periodic_timer", Guest, [Handled], {
            [takes In vcpu::VcpuSetPeriodicTimer]
            [errors
                EINVAL "a period below 1 ms or above 2^55 ns";
            ]
        };
        /// Stops the periodic timer.
        StopPeriodicTimer = 7, "stop_periodic_timer", Guest, [Handled], {};
        /// Sets the one-shot timer.
        SetSingleshotTimer = 8, "set_singleshot_timer", Guest, [Handled], {
            [takes In vcpu::VcpuSetSingleshotTimer]
            [errors
                EINVAL "for another vCPU than the one that calls";
            ]
            [rules
                "Times of the past fire at once.";
            ]
        };
        /// Stops the one-shot timer.
        StopSingleshotTimer = 9, "stop_singleshot_timer", Guest, [Handled], {
            [errors
                EINVAL "for another vCPU than the one that calls";
            ]
        };
        /// Moves `vcpu_info` to a place of the guest's choice.
        RegisterVcpuInfo = 10, "register_vcpu_info", Guest, [Handled], {
            [takes In vcpu::VcpuRegisterVcpuInfo]
            [errors
                ENXIO "a place that is misaligned or crosses the end of the page";
                EINVAL "it is registered already, or the frame is not a writable one of the domain's";
            ]
            [rules
                "The contents move along. Events that are raised meanwhile are not lost: afterwards every selector bit is set and an upcall is pending.";
            ]
        };
        /// Raises the vCPU's NMI.
        SendNmi = 11, "send_nmi", Guest, [Handled], {
            [errors
                EINVAL "the argument is not null";
            ]
        };
        /// The physical identity of a pinned vCPU.
        GetPhysid = 12, "get_physid", Guest, [Handled], {
            [takes Out vcpu::VcpuGetPhysid]
            [errors
                EINVAL "the caller has no rights over hardware, or the vCPU is not pinned to one processor";
            ]
        };
        /// Registers a copy of the vCPU's time record, also readable from guest user mode.
        RegisterVcpuTimeMemoryArea = 13, "register_vcpu_time_memory_area", Guest, [Handled], {
            [takes In vcpu::VcpuRegisterTimeMemoryArea]
            [errors
                EFAULT "the area is not in the guest's range of addresses";
            ]
            [rules
                "A reader takes `version`, then the fields, then `version` again: odd or changed means to start anew.";
            ]
        };
    }
}

operations! {
    /// Commands of `callback_op`.
    CallbackOp of CallbackOp as callback, "CALLBACKOP_", 32 bits, else ENOSYS {
        /// Registers an entry point.
        Register = 0, "register", Guest, [Handled], {
            [takes In callback::CallbackRegister]
            [errors
                EINVAL "an address that is not canonical";
                ENOSYS "a type of nobody, or an old one";
            ]
            [rules
                "In force for the next entry of the kind.";
            ]
        };
        /// Unregisters it.
        Unregister = 1, "unregister", Guest, [Handled], {
            [takes In callback::CallbackUnregister]
            [errors
                ENOSYS "a type of nobody, or an old one";
                EINVAL "any type but the NMI";
            ]
        };
    }
}

operations! {
    /// Which entry point a `callback_op` is about.
    CallbackType of CallbackOp, "CALLBACKTYPE_", 16 bits, else ENOSYS {
        /// Event upcalls.
        Event = 0, "event", Guest, [Handled], {};
        /// The guest state could not be restored (bad selector).
        Failsafe = 1, "failsafe", Guest, [Handled], {};
        /// SYSCALL from 64-bit guest user mode.
        Syscall = 2, "syscall", Guest, [Handled], {};
        /// SYSENTER, the number before interface 0x00030207; refused on 64 bit.
        SysenterDeprecated = 3, "sysenter_deprecated", Guest, [Refused ENOSYS], {};
        /// Virtual NMI.
        Nmi = 4, "nmi", Guest, [Handled], {};
        /// SYSENTER from guest user mode.
        Sysenter = 5, "sysenter", Guest, [Handled], {};
        /// SYSCALL from 32-bit guest user mode.
        Syscall32 = 7, "syscall32", Guest, [Handled], {};
    }
}

operations! {
    /// Commands of `nmi_op`.
    NmiOp of NmiOp as nmi, "XENNMI_", 32 bits, else ENOSYS {
        /// Registers the callback, vCPU 0 only.
        RegisterCallback = 0, "register_callback", Guest, [Handled], {
            [takes In nmi::NmiCallback]
            [errors
                EINVAL "an address that is not canonical";
            ]
            [rules
                "For the vCPU that calls.";
            ]
        };
        /// Unregisters it.
        UnregisterCallback = 1, "unregister_callback", Guest, [Handled], {};
    }
}

operations! {
    /// Commands of `vm_assist`.
    VmAssistCmd of VmAssist, "VMASST_CMD_", 32 bits, else ENOSYS {
        /// Turns an assist on.
        Enable = 0, "enable", Guest, [Handled], {};
        /// Turns it off.
        Disable = 1, "disable", Guest, [Handled], {};
    }
}

operations! {
    /// Assists of `vm_assist`.
    VmAssist of VmAssist, "VMASST_TYPE_", 32 bits, else EINVAL {
        /// 32-bit segment limits of 4 GiB.
        FourGbSegments = 0, "4gb_segments", Guest, [Handled], {};
        /// Vector 15 when that assist was used.
        FourGbSegmentsNotify = 1, "4gb_segments_notify", Guest, [Handled], {};
        /// Stores to the guest's page tables trap and are carried out, checked.
        WritablePagetables = 2, "writable_pagetables", Guest, [Handled], {};
        /// 32-bit page-directory pointers above 4 GiB.
        PaeExtendedCr3 = 3, "pae_extended_cr3", Guest, [Handled], {};
        /// The flags image of trap frames holds the virtual I/O privilege level, and iret sets it.
        ArchitecturalIopl = 4, "architectural_iopl", Guest, [Handled], {};
        /// Runstate areas carry an update bit.
        RunstateUpdateFlag = 5, "runstate_update_flag", Guest, [Handled], {};
        /// Guest user mode cannot see the machine-to-physical table.
        M2pStrict = 32, "m2p_strict", Guest, [LeftOut EINVAL "it needs page tables without the machine-to-physical window for guest user mode, and no 64-bit kernel is known to ask for it"], {};
    }
}

operations! {
    /// What `set_segment_base` sets.
    SegmentBase of SetSegmentBase, "SEGBASE_", 32 bits, else EINVAL {
        /// The FS base.
        Fs = 0, "FS", Guest, [Handled], {};
        /// The GS base of guest user mode.
        GsUser = 1, "GS_USER", Guest, [Handled], {};
        /// The GS base of the guest kernel.
        GsKernel = 2, "GS_KERNEL", Guest, [Handled], {};
        /// The GS selector of guest user mode.
        GsUserSel = 3, "GS_USER_SEL", Guest, [Handled], {};
    }
}

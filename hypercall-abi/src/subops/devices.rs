//! Interrupts, ports and the console: the commands of `physdev_op` and `console_io`.

use super::operations;

operations! {
    /// Commands of `physdev_op`; the argument structs are in [`physdev`](crate::physdev).
    PhysdevOp of PhysdevOp as physdev, "PHYSDEVOP_", 32 bits, else ENOSYS {
        /// Unmasks an interrupt, only in the old form of the call.
        IrqUnmaskNotify = 4, "IRQ_UNMASK_NOTIFY", Guest, [Handled], {};
        /// Whether an interrupt needs an end-of-interrupt call.
        IrqStatusQuery = 5, "irq_status_query", Guest, [Handled], {
            [takes InOut physdev::PhysdevIrqStatusQuery]
            [errors
                EINVAL "there is no such interrupt, or it is not the domain's";
            ]
        };
        /// Sets the vCPU's virtual I/O privilege level.
        SetIopl = 6, "set_iopl", Guest, [Handled], {
            [takes In physdev::PhysdevSetIopl]
            [errors
                EINVAL "above 3";
            ]
            [rules
                "For the vCPU that calls. Levels decide what is emulated and which ports trap; ring 3 never gets the processor's own.";
            ]
        };
        /// Sets the vCPU's port bitmap.
        SetIobitmap = 7, "set_iobitmap", Guest, [Handled], {
            [takes In physdev::PhysdevSetIobitmap]
            [errors
                EINVAL "more than 65536 ports, or a bitmap that is not in the guest's range of addresses";
            ]
            [rules
                "Read when guest user mode uses a port; a part of it that is not mapped then denies.";
            ]
        };
        /// Reads an I/O APIC register.
        ApicRead = 8, "apic_read", Guest, [Handled], {
            [takes InOut physdev::PhysdevApic]
            [errors
                EPERM "the caller has no control verbs";
                EINVAL "it has; interrupt controllers are the hypervisor's";
            ]
        };
        /// Writes an I/O APIC register.
        ApicWrite = 9, "apic_write", Guest, [Handled], {
            [takes In physdev::PhysdevApic]
            [errors
                EPERM "the caller has no control verbs";
                EINVAL "it has; interrupt controllers are the hypervisor's";
            ]
        };
        /// Allocates a vector for an interrupt.
        AllocIrqVector = 10, "alloc_irq_vector", Guest, [Handled], {
            [takes InOut physdev::PhysdevIrq]
            [errors
                EPERM "the caller has no control verbs";
            ]
        };
        /// Frees such a vector; does nothing in Xen.
        FreeIrqVector = 11, "free_irq_vector", Guest, [Refused ENOSYS], {};
        /// Ends an interrupt.
        Eoi = 12, "eoi", Guest, [Handled], {
            [takes In physdev::PhysdevEoi]
            [errors
                EINVAL "there is no such interrupt, or it is not bound by the domain";
            ]
            [rules
                "Ends the service of the interrupt, and unmasks its port as `EVTCHNOP_unmask` does where a bitmap of such interrupts is registered.";
            ]
        };
        /// Maps a machine interrupt to a physical-interrupt number.
        MapPirq = 13, "map_pirq", Guest, [Handled], {
            [takes InOut physdev::PhysdevMapPirq]
            [errors
                ESRCH "there is no such domain";
                EPERM "the caller has no control verbs, or no right to the interrupt";
                EINVAL "another domain, a kind other than a global interrupt, one that does not exist, or a number other than its own";
            ]
        };
        /// Ends such a mapping.
        UnmapPirq = 14, "unmap_pirq", Guest, [Handled], {
            [takes In physdev::PhysdevUnmapPirq]
            [errors
                ESRCH "there is no such domain";
                EPERM "the caller has no control verbs, or no right to the interrupt";
                EINVAL "another domain, or an interrupt that does not exist";
            ]
        };
        /// Reports a PCI function, short form.
        ManagePciAdd = 15, "manage_pci_add", Guest, [Handled], {
            [takes In physdev::PhysdevManagePci]
            [errors
                EPERM "the caller has no control verbs";
                ENOSYS "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Reports that a PCI function went away.
        ManagePciRemove = 16, "manage_pci_remove", Guest, [Handled], {
            [takes In physdev::PhysdevManagePci]
            [errors
                EPERM "the caller has no control verbs";
                ENODEV "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Registers a bitmap of interrupts needing an end, which also stops masking them.
        PirqEoiGmfnV1 = 17, "pirq_eoi_gmfn_v1", Guest, [Handled], {
            [takes In physdev::PhysdevPirqEoiGmfn]
            [errors
                EINVAL "the frame is not a writable one of the domain's";
                EBUSY "the domain has registered one";
            ]
            [rules
                "When the domain binds an interrupt, its bit is set if each one needs an end (those triggered by a level), and cleared if not.";
                "From then on an end also unmasks the port.";
            ]
        };
        /// Restores message interrupts after sleep.
        RestoreMsi = 19, "restore_msi", Guest, [Handled], {
            [errors
                ENODEV "the hypervisor knows no PCI devices";
            ]
        };
        /// Reports a PCI function with its kind.
        ManagePciAddExt = 20, "manage_pci_add_ext", Guest, [Handled], {
            [errors
                EINVAL "a device that is neither an extended nor a virtual function, nor a plain one";
                EPERM "the caller has no control verbs";
                ENOSYS "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Sets trigger and polarity of a global interrupt.
        SetupGsi = 21, "setup_gsi", Guest, [Handled], {
            [takes In physdev::PhysdevSetupGsi]
            [errors
                EINVAL "there is no such interrupt";
                EPERM "the caller has no control verbs, or no right to the interrupt";
                EEXIST "it was set up before, or is bound";
            ]
        };
        /// Allocates a physical-interrupt number.
        GetFreePirq = 23, "get_free_pirq", Guest, [Handled], {
            [takes InOut physdev::PhysdevGetFreePirq]
            [errors
                ENOSPC "no number is free";
            ]
        };
        /// Tells whether PCI configuration space is reserved in the memory map.
        PciMmcfgReserved = 24, "pci_mmcfg_reserved", Guest, [Handled], {
            [takes In physdev::PhysdevPciMmcfgReserved]
            [errors
                EPERM "the caller has no control verbs";
                ENODEV "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Reports a PCI function by segment.
        PciDeviceAdd = 25, "pci_device_add", Guest, [Handled], {
            [takes In physdev::PhysdevPciDeviceAdd]
            [errors
                EPERM "the caller has no control verbs";
                ENOSYS "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Reports that such a function went away.
        PciDeviceRemove = 26, "pci_device_remove", Guest, [Handled], {
            [takes In physdev::PhysdevPciDevice]
            [errors
                EPERM "the caller has no control verbs";
                ENODEV "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Restores message interrupts, by segment.
        RestoreMsiExt = 27, "restore_msi_ext", Guest, [Handled], {
            [takes In physdev::PhysdevPciDevice]
            [errors
                ENODEV "the hypervisor knows no PCI devices";
            ]
        };
        /// Registers a bitmap of interrupts needing an end.
        PirqEoiGmfnV2 = 28, "pirq_eoi_gmfn_v2", Guest, [Handled], {
            [takes In physdev::PhysdevPirqEoiGmfn]
            [errors
                EINVAL "the frame is not a writable one of the domain's";
                EBUSY "the domain has registered one";
            ]
            [rules
                "When the domain binds an interrupt, its bit is set if each one needs an end (those triggered by a level), and cleared if not.";
            ]
        };
        /// Debug-port reset notices.
        DbgpOp = 29, "dbgp_op", Guest, [Handled], {
            [errors
                EPERM "the caller has no rights over hardware";
            ]
        };
        /// Prepares a device for MSI-X.
        PrepareMsix = 30, "prepare_msix", Guest, [Handled], {
            [takes In physdev::PhysdevPciDevice]
            [errors
                EPERM "the caller has no control verbs";
                ENODEV "it has; the hypervisor knows no PCI devices";
            ]
        };
        /// Undoes that.
        ReleaseMsix = 31, "release_msix", Guest, [Handled], {
            [takes In physdev::PhysdevPciDevice]
            [errors
                EPERM "the caller has no control verbs";
                ENODEV "it has; the hypervisor knows no PCI devices";
            ]
        };
    }
}

operations! {
    /// Commands of `console_io(command, count, buffer)`: the hypervisor's own console, for domains with the right (`-EPERM`).
    ///
    /// Such a domain learns of input by [`Virq::CONSOLE`](crate::Virq::CONSOLE); others print through the ring in
    /// [`io::console`](crate::io::console).
    ConsoleIoOp of ConsoleIo, "CONSOLEIO_", 32 bits, else ENOSYS {
        /// Prints `count` bytes; returns 0.
        Write = 0, "write", Guest, [Handled], {
            [value "count bytes at buffer"]
        };
        /// Gives up to `count` bytes that came in, without waiting; returns how many.
        Read = 1, "read", Guest, [Handled], {
            [value "room for count bytes at buffer"]
            [returns "how many bytes there were"]
            [errors
                E2BIG "room for 2 GiB or more";
            ]
        };
    }
}

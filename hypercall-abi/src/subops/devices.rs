//! Interrupts, ports and the console: the commands of `physdev_op` and `console_io`.

use super::operations;

operations! {
    /// Commands of `physdev_op`; the argument structs are in [`physdev`](crate::physdev).
    PhysdevOp of PhysdevOp, "PHYSDEVOP_", 32 bits, else ENOSYS {
        /// Unmasks an interrupt, only in the old form of the call.
        IrqUnmaskNotify = 4, "IRQ_UNMASK_NOTIFY", Guest, [Handled], {};
        /// Whether an interrupt needs an end-of-interrupt call.
        IrqStatusQuery = 5, "irq_status_query", Guest, [Handled], {};
        /// Sets the vCPU's virtual I/O privilege level.
        SetIopl = 6, "set_iopl", Guest, [Handled], {};
        /// Sets the vCPU's port bitmap.
        SetIobitmap = 7, "set_iobitmap", Guest, [Handled], {};
        /// Reads an I/O APIC register.
        ApicRead = 8, "apic_read", Guest, [Handled], {};
        /// Writes an I/O APIC register.
        ApicWrite = 9, "apic_write", Guest, [Handled], {};
        /// Allocates a vector for an interrupt.
        AllocIrqVector = 10, "alloc_irq_vector", Guest, [Handled], {};
        /// Frees such a vector; does nothing in Xen.
        FreeIrqVector = 11, "free_irq_vector", Guest, [Handled], {};
        /// Ends an interrupt.
        Eoi = 12, "eoi", Guest, [Handled], {};
        /// Maps a machine interrupt to a physical-interrupt number.
        MapPirq = 13, "map_pirq", Guest, [Handled], {};
        /// Ends such a mapping.
        UnmapPirq = 14, "unmap_pirq", Guest, [Handled], {};
        /// Reports a PCI function, short form.
        ManagePciAdd = 15, "manage_pci_add", Guest, [Handled], {};
        /// Reports that a PCI function went away.
        ManagePciRemove = 16, "manage_pci_remove", Guest, [Handled], {};
        /// Registers a bitmap of interrupts needing an end, which also stops masking them.
        PirqEoiGmfnV1 = 17, "pirq_eoi_gmfn_v1", Guest, [Handled], {};
        /// Restores message interrupts after sleep.
        RestoreMsi = 19, "restore_msi", Guest, [Handled], {};
        /// Reports a PCI function with its kind.
        ManagePciAddExt = 20, "manage_pci_add_ext", Guest, [Handled], {};
        /// Sets trigger and polarity of a global interrupt.
        SetupGsi = 21, "setup_gsi", Guest, [Handled], {};
        /// Allocates a physical-interrupt number.
        GetFreePirq = 23, "get_free_pirq", Guest, [Handled], {};
        /// Tells whether PCI configuration space is reserved in the memory map.
        PciMmcfgReserved = 24, "pci_mmcfg_reserved", Guest, [Handled], {};
        /// Reports a PCI function by segment.
        PciDeviceAdd = 25, "pci_device_add", Guest, [Handled], {};
        /// Reports that such a function went away.
        PciDeviceRemove = 26, "pci_device_remove", Guest, [Handled], {};
        /// Restores message interrupts, by segment.
        RestoreMsiExt = 27, "restore_msi_ext", Guest, [Handled], {};
        /// Registers a bitmap of interrupts needing an end.
        PirqEoiGmfnV2 = 28, "pirq_eoi_gmfn_v2", Guest, [Handled], {};
        /// Debug-port reset notices.
        DbgpOp = 29, "dbgp_op", Guest, [Handled], {};
        /// Prepares a device for MSI-X.
        PrepareMsix = 30, "prepare_msix", Guest, [Handled], {};
        /// Undoes that.
        ReleaseMsix = 31, "release_msix", Guest, [Handled], {};
    }
}

operations! {
    /// Commands of `console_io(command, count, buffer)`: the hypervisor's own console, for domains with the right (`-EPERM`).
    ///
    /// Such a domain learns of input by [`Virq::CONSOLE`](crate::Virq::CONSOLE); others print through the ring in
    /// [`io::console`](crate::io::console).
    ConsoleIoOp of ConsoleIo, "CONSOLEIO_", 32 bits, else ENOSYS {
        /// Prints `count` bytes; returns 0.
        Write = 0, "write", Guest, [Handled], {};
        /// Gives up to `count` bytes that came in, without waiting; returns how many.
        Read = 1, "read", Guest, [Handled], {};
    }
}

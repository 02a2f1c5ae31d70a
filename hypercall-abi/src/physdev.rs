//! Interrupts and PCI devices: the arguments of `physdev_op` (public/physdev.h). For domains with rights over hardware, but for
//! `set_iopl` and `set_iobitmap`, which are any vCPU's own.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, Gfn, GuestHandle};

/// Argument of `eoi` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevEoi {
    /// The physical interrupt.
    pub irq: u32,
}

/// Argument of `pirq_eoi_gmfn_v1` and `_v2` (IN): a page that gets one bit for each interrupt that needs an end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevPirqEoiGmfn {
    /// The page.
    pub gmfn: Gfn,
}

/// Flag of [`PhysdevIrqStatusQuery`]: the interrupt needs an `eoi` call.
pub const XENIRQSTAT_NEEDS_EOI: u32 = 1 << 0;
/// Flag of [`PhysdevIrqStatusQuery`]: several domains share it.
pub const XENIRQSTAT_SHARED: u32 = 1 << 1;

/// Argument of `irq_status_query`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevIrqStatusQuery {
    /// IN: the physical interrupt.
    pub irq: u32,
    /// OUT: `XENIRQSTAT_*`.
    pub flags: u32,
}

/// Argument of `set_iopl` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevSetIopl {
    /// The level: guest kernels count as 1, user mode as 3.
    pub iopl: u32,
}

/// Argument of `set_iobitmap` (IN): a clear bit lets guest user mode at the port, as far as the domain may itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevSetIobitmap {
    /// The bitmap, looked at when a port is used.
    pub bitmap: GuestHandle<u8>,
    /// Ports in it, at most 65536.
    pub nr_ports: u32,
    /// Padding.
    pub pad0: u32,
}

/// Argument of `apic_read` and `apic_write`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevApic {
    /// IN: machine address of the I/O APIC.
    pub apic_physbase: u64,
    /// IN: the register.
    pub reg: u32,
    /// Read: OUT. Write: IN.
    pub value: u32,
}

/// Argument of `alloc_irq_vector`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevIrq {
    /// IN: the interrupt.
    pub irq: u32,
    /// OUT.
    pub vector: u32,
}

/// Kind of a mapping: message interrupt, segment 0.
pub const MAP_PIRQ_TYPE_MSI: i32 = 0;
/// Global interrupt.
pub const MAP_PIRQ_TYPE_GSI: i32 = 1;
/// Unknown.
pub const MAP_PIRQ_TYPE_UNKNOWN: i32 = 2;
/// Message interrupt with the segment in `bus`.
pub const MAP_PIRQ_TYPE_MSI_SEG: i32 = 3;
/// Several message interrupts.
pub const MAP_PIRQ_TYPE_MULTI_MSI: i32 = 4;

/// Argument of `map_pirq`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevMapPirq {
    /// IN: for whom.
    pub domid: DomId,
    /// Padding.
    pub pad0: u16,
    /// IN: `MAP_PIRQ_TYPE_*`.
    pub kind: i32,
    /// IN: the interrupt.
    pub index: i32,
    /// IN: the number wanted, below 0 for any; OUT: the number got.
    pub pirq: i32,
    /// IN: bus, with the segment in the upper half for some kinds.
    pub bus: i32,
    /// IN: device and function.
    pub devfn: i32,
    /// IN: MSI-X entry, or how many; OUT: how many could be.
    pub entry_nr: i32,
    /// Padding.
    pub pad1: u32,
    /// IN: machine address of the MSI-X table, 0 for MSI.
    pub table_base: u64,
}

/// Argument of `unmap_pirq` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevUnmapPirq {
    /// For whom.
    pub domid: DomId,
    /// Padding.
    pub pad0: u16,
    /// Which.
    pub pirq: i32,
}

/// Argument of `manage_pci_add`, `manage_pci_remove` and `restore_msi` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevManagePci {
    /// Bus.
    pub bus: u8,
    /// Device and function.
    pub devfn: u8,
}

/// Argument of `manage_pci_add_ext` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevManagePciExt {
    /// Bus.
    pub bus: u8,
    /// Device and function.
    pub devfn: u8,
    /// Padding.
    pub pad0: u16,
    /// 1 for an extended function.
    pub is_extfn: u32,
    /// 1 for a virtual function.
    pub is_virtfn: u32,
    /// The physical function of a virtual one.
    pub physfn: PhysdevManagePci,
    /// Padding.
    pub pad1: u16,
}

/// Argument of `dbgp_op` (IN): the debug port of a host controller is reset, or was.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevDbgpOp {
    /// 1 before, 2 after.
    pub op: u8,
    /// What the controller is behind: 1 PCI.
    pub bus: u8,
    /// The controller.
    pub device: PhysdevPciDevice,
}

/// Bytes of the argument of the old form of the call.
pub const PHYSDEV_OP_SIZE: usize = 24;

/// Argument of `setup_gsi` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevSetupGsi {
    /// The global interrupt.
    pub gsi: i32,
    /// 0 edge, 1 level.
    pub triggering: u8,
    /// 0 active high, 1 active low.
    pub polarity: u8,
    /// Padding.
    pub pad0: u16,
}

/// Argument of `get_free_pirq`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevGetFreePirq {
    /// IN: `MAP_PIRQ_TYPE_MSI` or `_GSI`.
    pub kind: i32,
    /// OUT.
    pub pirq: u32,
}

/// Flag of [`PhysdevPciMmcfgReserved`]: the range is reserved in the firmware's map.
pub const XEN_PCI_MMCFG_RESERVED: u32 = 1;

/// Argument of `pci_mmcfg_reserved` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevPciMmcfgReserved {
    /// Machine address of the configuration space.
    pub address: u64,
    /// Segment.
    pub segment: u16,
    /// First bus.
    pub start_bus: u8,
    /// Last bus.
    pub end_bus: u8,
    /// [`XEN_PCI_MMCFG_RESERVED`] or 0.
    pub flags: u32,
}

/// Flag of [`PhysdevPciDeviceAdd`]: an extended function.
pub const XEN_PCI_DEV_EXTFN: u32 = 1;
/// A virtual function of `physfn`.
pub const XEN_PCI_DEV_VIRTFN: u32 = 2;
/// A proximity number follows the struct.
pub const XEN_PCI_DEV_PXM: u32 = 4;

/// Argument of `pci_device_add` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevPciDeviceAdd {
    /// Segment.
    pub seg: u16,
    /// Bus.
    pub bus: u8,
    /// Device and function.
    pub devfn: u8,
    /// `XEN_PCI_DEV_*`.
    pub flags: u32,
    /// The physical function of a virtual one.
    pub physfn: PhysdevManagePci,
    /// Padding.
    pub pad0: u16,
}

/// Argument of `pci_device_remove`, `restore_msi_ext`, `prepare_msix` and `release_msix` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysdevPciDevice {
    /// Segment.
    pub seg: u16,
    /// Bus.
    pub bus: u8,
    /// Device and function.
    pub devfn: u8,
}

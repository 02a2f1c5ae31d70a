//! Reservations and memory maps: the arguments of `memory_op` (public/memory.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, Gfn, GuestHandle, Mfn};

/// Bits of a `memory_op` command from here up are the extent to go on with.
pub const MEMOP_EXTENT_SHIFT: u32 = 6;
/// Bits of a `memory_op` command that are the command.
pub const MEMOP_CMD_MASK: u64 = (1 << MEMOP_EXTENT_SHIFT) - 1;

/// Mask of [`MemoryReservation::mem_flags`]: the machine addresses wanted fit into this many bits; 0 for any.
pub const XENMEMF_ADDRESS_BITS_MASK: u32 = 0xff;
/// Flag: populate on demand.
pub const XENMEMF_POPULATE_ON_DEMAND: u32 = 1 << 16;
/// Flag: only from the node named in bits 8 to 15 (plus one).
pub const XENMEMF_EXACT_NODE_REQUEST: u32 = 1 << 17;
/// Flag: that node is a virtual one.
pub const XENMEMF_VNODE: u32 = 1 << 18;

/// Argument of `increase_reservation`, `decrease_reservation`, `populate_physmap` and `claim_pages`.
///
/// The call returns how many extents were done, fewer than asked when memory or the domain's limit ran out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryReservation {
    /// List of frames. Increase: OUT machine frames. Decrease: IN machine frames. Populate: IN guest frames, OUT machine frames.
    pub extent_start: GuestHandle<u64>,
    /// Length of the list.
    pub nr_extents: u64,
    /// Each extent is 2^this frames, aligned so.
    pub extent_order: u32,
    /// `XENMEMF_*`.
    pub mem_flags: u32,
    /// Whose.
    pub domid: DomId,
    /// Padding.
    pub pad0: [u16; 3],
}

/// Argument of `exchange`: frames given back for others.
///
/// Both sides must be of the same domain and the same number of frames, and their lists must not overlap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryExchange {
    /// IN: machine frames given back.
    pub input: MemoryReservation,
    /// IN: guest frames to populate; OUT: the machine frames put there.
    pub output: MemoryReservation,
    /// IN: 0. OUT: input extents done.
    pub nr_exchanged: u64,
}

/// Argument of the queries about one domain: `current_reservation`, `maximum_reservation`, `maximum_gpfn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryDomain {
    /// Whose.
    pub domid: DomId,
}

/// Argument of `machphys_mfn_list`: the frames behind the machine-to-physical table, one for each 2 MiB of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MachphysMfnList {
    /// IN: room in the list.
    pub max_extents: u32,
    /// Padding.
    pub pad0: u32,
    /// IN: the list.
    pub extent_start: GuestHandle<Mfn>,
    /// OUT: entries filled.
    pub nr_extents: u32,
    /// Padding.
    pub pad1: u32,
}

/// OUT of `machphys_mapping`: where the machine-to-physical table can be read.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MachphysMapping {
    /// First address.
    pub v_start: u64,
    /// First address after it.
    pub v_end: u64,
    /// Largest frame that can be looked up.
    pub max_mfn: u64,
}

/// Argument of `memory_map` and `machine_memory_map`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryMap {
    /// IN: room in the buffer, in entries; OUT: entries stored.
    pub nr_entries: u32,
    /// Padding.
    pub pad0: u32,
    /// IN: the buffer.
    pub buffer: GuestHandle<E820Entry>,
}

/// Argument of `set_memory_map`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ForeignMemoryMap {
    /// Whose.
    pub domid: DomId,
    /// Padding.
    pub pad0: [u16; 3],
    /// The map, IN.
    pub map: MemoryMap,
}

/// A range in a memory map, 20 bytes, in the form of the BIOS call E820.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct E820Entry {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// `E820_*`.
    pub kind: u32,
}

/// Ordinary memory.
pub const E820_RAM: u32 = 1;
/// Not to be used.
pub const E820_RESERVED: u32 = 2;
/// ACPI tables; memory once read.
pub const E820_ACPI: u32 = 3;
/// ACPI non-volatile storage.
pub const E820_NVS: u32 = 4;
/// Memory with errors.
pub const E820_UNUSABLE: u32 = 5;
/// Most entries a map may have.
pub const E820_MAX: usize = 1024;

/// Source of `add_to_physmap`: the shared page.
pub const XENMAPSPACE_SHARED_INFO: u32 = 0;
/// A page of the grant table.
pub const XENMAPSPACE_GRANT_TABLE: u32 = 1;
/// A guest frame.
pub const XENMAPSPACE_GMFN: u32 = 2;
/// A range of guest frames.
pub const XENMAPSPACE_GMFN_RANGE: u32 = 3;
/// A frame of another domain.
pub const XENMAPSPACE_GMFN_FOREIGN: u32 = 4;
/// Flag in the index of a grant-table page: the status frames.
pub const XENMAPIDX_GRANT_TABLE_STATUS: u64 = 0x8000_0000;

/// Argument of `add_to_physmap` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AddToPhysmap {
    /// Whose map.
    pub domid: DomId,
    /// Pages, for a range.
    pub size: u16,
    /// `XENMAPSPACE_*`.
    pub space: u32,
    /// Which page of that space.
    pub idx: u64,
    /// Where it appears.
    pub gpfn: Gfn,
}

/// Argument of `add_to_physmap_batch`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AddToPhysmapBatch {
    /// IN: whose map.
    pub domid: DomId,
    /// IN: `XENMAPSPACE_*`.
    pub space: u16,
    /// IN: pages.
    pub size: u16,
    /// IN: the other domain for foreign frames, else 0.
    pub foreign_domid: DomId,
    /// IN: which pages.
    pub idxs: GuestHandle<u64>,
    /// IN: where they appear.
    pub gpfns: GuestHandle<Gfn>,
    /// OUT: an error each.
    pub errs: GuestHandle<i32>,
}

/// Argument of `remove_from_physmap` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RemoveFromPhysmap {
    /// Whose map.
    pub domid: DomId,
    /// Padding.
    pub pad0: [u16; 3],
    /// Which page.
    pub gpfn: Gfn,
}

/// Argument of `set_pod_target` and `get_pod_target`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PodTarget {
    /// IN: pages wanted.
    pub target_pages: u64,
    /// OUT: pages the domain has.
    pub tot_pages: u64,
    /// OUT: of these, waiting.
    pub pod_cache_pages: u64,
    /// OUT: places not populated yet.
    pub pod_entries: u64,
    /// IN: whose.
    pub domid: DomId,
    /// Padding.
    pub pad0: [u16; 3],
}

/// Argument of `access_op`, of which only the domain is looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AccessOpArgument {
    /// IN: what to do.
    pub op: u8,
    /// IN: the rights.
    pub access: u8,
    /// IN: whose pages; not the caller's own.
    pub domid: DomId,
    /// IN: how many pages.
    pub nr: u32,
    /// IN: the first.
    pub pfn: u64,
    /// IN: a list of pages.
    pub pfn_list: u64,
    /// IN: a list of rights.
    pub access_list: u64,
}

/// Argument of `get_vnumainfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VnumaTopologyInfo {
    /// IN: whose.
    pub domid: DomId,
    /// IN: 0.
    pub pad: u16,
    /// IN: room for nodes; OUT: nodes.
    pub nr_vnodes: u32,
    /// IN: room for vCPUs; OUT: vCPUs.
    pub nr_vcpus: u32,
    /// IN: room for ranges; OUT: ranges.
    pub nr_vmemranges: u32,
    /// OUT: distances between nodes.
    pub vdistance: GuestHandle<u32>,
    /// OUT: the node of each vCPU.
    pub vcpu_to_vnode: GuestHandle<u32>,
    /// OUT: ranges.
    pub vmemrange: GuestHandle<u64>,
}

/// Flag of [`ReservedDeviceMemoryMap`]: of all devices, not of one.
pub const XENMEM_RDM_ALL: u32 = 1;

/// An entry of the list of `reserved_device_memory_map`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReservedDeviceMemory {
    /// The first page.
    pub start_pfn: u64,
    /// How many.
    pub nr_pages: u64,
}

/// Argument of `reserved_device_memory_map`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReservedDeviceMemoryMap {
    /// IN: [`XENMEM_RDM_ALL`] or 0.
    pub flags: u32,
    /// IN: room in the list, OUT: entries there are.
    pub nr_entries: u32,
    /// OUT: the list.
    pub buffer: GuestHandle<ReservedDeviceMemory>,
    /// IN: which device.
    pub device: crate::physdev::PhysdevPciDevice,
    /// Padding.
    pub pad0: u32,
}

/// Resource of `acquire_resource`: pages of an I/O server.
pub const XENMEM_RESOURCE_IOREQ_SERVER: u16 = 0;
/// Frames of a grant table; the id tells which.
pub const XENMEM_RESOURCE_GRANT_TABLE: u16 = 1;
/// Trace buffers.
pub const XENMEM_RESOURCE_VMTRACE_BUF: u16 = 2;
/// Id: the table.
pub const XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED: u32 = 0;
/// Id: the status words.
pub const XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS: u32 = 1;

/// Argument of `acquire_resource`: frames of another domain's resource, which a PV caller may then map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AcquireResource {
    /// IN: whose.
    pub domid: DomId,
    /// IN: `XENMEM_RESOURCE_*`.
    pub kind: u16,
    /// IN: which one of that kind.
    pub id: u32,
    /// IN: frames wanted; 0 with a null list asks for the size, OUT.
    pub nr_frames: u32,
    /// IN: 0.
    pub pad: u32,
    /// IN: the first frame wanted.
    pub frame: u64,
    /// OUT: machine frames.
    pub frame_list: GuestHandle<Mfn>,
}

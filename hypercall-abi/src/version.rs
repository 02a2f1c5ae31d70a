//! What the hypervisor says about itself: the results of `xen_version` (public/version.h, features.h).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of the text of `extraversion`.
pub const EXTRAVERSION_LEN: usize = 16;
/// Length of the text of `capabilities`.
pub const CAPABILITIES_LEN: usize = 1024;
/// Length of the text of `changeset`.
pub const CHANGESET_LEN: usize = 64;
/// Length of the text of `commandline`.
pub const COMMANDLINE_LEN: usize = 1024;

/// Submaps of 32 features each that `get_features` answers for; beyond: `-EINVAL`.
pub const XENFEAT_NR_SUBMAPS: u32 = 1;

/// What `XENVER_version` returns.
#[must_use]
pub const fn version(major: u16, minor: u16) -> u32 {
    (major as u32) << 16 | minor as u32
}

/// OUT of `compile_info`: texts ended by zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CompileInfo {
    /// The compiler.
    pub compiler: [u8; 64],
    /// Who compiled.
    pub compile_by: [u8; 16],
    /// Where.
    pub compile_domain: [u8; 32],
    /// When.
    pub compile_date: [u8; 32],
}

/// OUT of `platform_parameters`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PlatformParameters {
    /// Where the hypervisor's range of addresses begins.
    pub virt_start: u64,
}

/// Argument of `get_features`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FeatureInfo {
    /// IN: which 32 features.
    pub submap_idx: u32,
    /// OUT: [`Features`] for submap 0.
    pub submap: u32,
}

/// Head of the argument of `build_id`: as many bytes of room follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BuildIdHeader {
    /// IN: bytes of room.
    pub len: u32,
}

bitflags! {
    /// Features of submap 0: what a guest may rely on, and, in a kernel's notes, what it needs or supports.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u32 {
        /// Page tables need not be read-only.
        const WRITABLE_PAGE_TABLES = 1 << 0;
        /// Descriptor tables need not be read-only.
        const WRITABLE_DESCRIPTOR_TABLES = 1 << 1;
        /// The hypervisor translates frame numbers.
        const AUTO_TRANSLATED_PHYSMAP = 1 << 2;
        /// The guest kernel runs in ring 0.
        const SUPERVISOR_MODE_KERNEL = 1 << 3;
        /// 32-bit page directories may be above 4 GiB.
        const PAE_PGDIR_ABOVE_4GB = 1 << 4;
        /// [`PtUpdatePreserveAd`](crate::mmu::MmuCommand::PtUpdatePreserveAd) is there.
        const MMU_PT_UPDATE_PRESERVE_AD = 1 << 5;
        /// The clear and copy operations of `mmuext_op` are there.
        const HIGHMEM_ASSIST = 1 << 6;
        /// Grant mappings set the entry's free bits as asked.
        const GNTTAB_MAP_AVAIL_BITS = 1 << 7;
        /// Upcalls by vector, not for PV.
        const HVM_CALLBACK_VECTOR = 1 << 8;
        /// The clock of [`time`](crate::time) is safe for HVM.
        const HVM_SAFE_PVCLOCK = 1 << 9;
        /// Physical interrupts for HVM.
        const HVM_PIRQS = 1 << 10;
        /// The kernel can be the first domain; the domain is the first.
        const DOM0 = 1 << 11;
        /// Grant mappings also appear at their machine address; not used any more.
        const GRANT_MAP_IDENTITY = 1 << 12;
        /// Memory calls take a virtual node.
        const MEMORY_OP_VNODE_SUPPORTED = 1 << 13;
        /// Arm only.
        const ARM_SMCCC_SUPPORTED = 1 << 14;
        /// Linux: the ACPI root may be anywhere.
        const LINUX_RSDP_UNRESTRICTED = 1 << 15;
        /// Guest frame numbers are not machine frame numbers.
        const NOT_DIRECT_MAPPED = 1 << 16;
        /// A hypercall's frame numbers are machine frame numbers.
        const DIRECT_MAPPED = 1 << 17;
    }
}

impl Features {
    /// The name in a kernel's feature note, without a leading `!`; `None` for a name that nobody defined.
    #[must_use]
    pub fn from_note_name(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"writable_page_tables" => Self::WRITABLE_PAGE_TABLES,
            b"writable_descriptor_tables" => Self::WRITABLE_DESCRIPTOR_TABLES,
            b"auto_translated_physmap" => Self::AUTO_TRANSLATED_PHYSMAP,
            b"supervisor_mode_kernel" => Self::SUPERVISOR_MODE_KERNEL,
            b"pae_pgdir_above_4gb" => Self::PAE_PGDIR_ABOVE_4GB,
            b"dom0" => Self::DOM0,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_puts_major_high() {
        assert_eq!(version(4, 17), 0x0004_0011);
    }

    #[test]
    fn note_names() {
        assert_eq!(Features::from_note_name(b"pae_pgdir_above_4gb"), Some(Features::PAE_PGDIR_ABOVE_4GB));
        assert_eq!(Features::from_note_name(b"pae_pgdir"), None);
    }
}

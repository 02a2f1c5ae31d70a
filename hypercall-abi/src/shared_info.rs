//! The page that a domain shares with the hypervisor (public/xen.h `shared_info`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Mfn;
use crate::vcpu::VcpuInfo;

/// vCPUs that have their record in the shared page; later ones must register one.
pub const LEGACY_MAX_VCPUS: usize = 32;

/// Ports of the two-level layout: one bit each in 64 words of 64 bits.
pub const EVTCHN_2L_NR_CHANNELS: u32 = 64 * 64;

/// x86's part of the shared page: written by the guest for those who save or migrate it, never trusted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ArchSharedInfo {
    /// Entries in the physical-to-machine table.
    pub max_pfn: u64,
    /// Root of its three-level list; all ones when the list is too short for it.
    pub pfn_to_mfn_frame_list_list: Mfn,
    /// Why the last virtual NMI came: bits of [`NmiReason`](crate::nmi::NmiReason), set by the hypervisor.
    pub nmi_reason: u64,
    /// CR3 of the address space in which `p2m_vaddr` holds; 0 when there is no linear table.
    pub p2m_cr3: u64,
    /// Virtual address of the linear table.
    pub p2m_vaddr: u64,
    /// Odd while the guest changes the table's mappings; incremented before and after.
    pub p2m_generation: u64,
}

/// The shared page's contents; the rest of the page is zero.
///
/// `vcpu_info` and the event words follow the protocol at [`VcpuInfo`]. Pending bits are set by the hypervisor and cleared by
/// the guest, mask bits are the guest's, both with locked operations. The wall clock is a sequence lock on `wc_version` like
/// the one of [`VcpuTimeInfo`](crate::vcpu::VcpuTimeInfo): Unix time is `wc_sec` plus the system time.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SharedInfo {
    /// The first vCPUs' records.
    pub vcpu_info: [VcpuInfo; LEGACY_MAX_VCPUS],
    /// One bit per port: something happened.
    pub evtchn_pending: [u64; 64],
    /// One bit per port: do not interrupt for it.
    pub evtchn_mask: [u64; 64],
    /// Odd while the wall clock is being written.
    pub wc_version: u32,
    /// Unix time at system time 0: seconds, low half.
    pub wc_sec: u32,
    /// Nanoseconds.
    pub wc_nsec: u32,
    /// Seconds, high half.
    pub wc_sec_hi: u32,
    /// x86's own part.
    pub arch: ArchSharedInfo,
}

//! The parts of Xen's own control interface (public domctl.h and sysctl.h) that a domain builder takes (feature `control`).
//!
//! Hypercall 36 (`domctl`) is about one domain, hypercall 35 (`sysctl`) about the host; rdi holds the address of a [`Domctl`] or
//! a [`Sysctl`]: a header and the payload of one command. Xen promises nothing about these across its releases, so both
//! headers carry a version; the one here is Xen 4.17's. [`control`](crate::control) is this project's own interface behind
//! number 36, which [`INTERFACE_VERSION`] tells apart.
//!
//! Building a 64-bit PV guest: [`CreateDomain`], [`MaxVcpus`], [`MaxMem`], `populate_physmap` for the new domain, its contents
//! through foreign mappings, [`HypercallInit`], `acquire_resource` for its grant table, pins with its domid,
//! [`VcpuContext`], [`UnpauseDomain`].
//!
//! Errors of every command: `-EACCES` wrong version, `-ENOSYS` unknown command, `-EPERM` no control domain, `-ESRCH` no such
//! domain, `-EFAULT` bad address. Commands add their own.

use bitflags::bitflags;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::subops::command_enum;
use crate::vcpu::VcpuGuestContext;
use crate::{DomId, GuestHandle};

/// Version of both headers (`XEN_DOMCTL_INTERFACE_VERSION`, `XEN_SYSCTL_INTERFACE_VERSION`): Xen 4.17.
pub const INTERFACE_VERSION: u32 = 0x15;

/// Bytes for a command's payload.
pub const PAYLOAD_SIZE: usize = 128;

command_enum! {
    /// Commands about a domain.
    DomctlCmd, "XEN_DOMCTL_" {
        /// Makes a paused, empty domain.
        CreateDomain = 1, "createdomain";
        /// Tears a domain down.
        DestroyDomain = 2, "destroydomain";
        /// Stops a domain's vCPUs.
        PauseDomain = 3, "pausedomain";
        /// Lets them go on.
        UnpauseDomain = 4, "unpausedomain";
        /// State of one domain.
        GetDomainInfo = 5, "getdomaininfo";
        /// Limits a domain's memory.
        MaxMem = 11, "max_mem";
        /// Sets a vCPU's whole state.
        SetVcpuContext = 12, "setvcpucontext";
        /// State of one vCPU.
        GetVcpuInfo = 14, "getvcpuinfo";
        /// Makes the vCPUs.
        MaxVcpus = 15, "max_vcpus";
        /// Reads or sets what the scheduler keeps of a domain.
        SchedulerOp = 16, "scheduler_op";
        /// Fills one of the domain's frames with hypercall stubs.
        HypercallInit = 22, "hypercall_init";
    }
}

command_enum! {
    /// Commands about the host.
    SysctlCmd, "XEN_SYSCTL_" {
        /// Reads the hypervisor's log.
        ReadConsole = 1, "readconsole";
        /// Facts about the machine.
        PhysInfo = 3, "physinfo";
        /// Which scheduler there is.
        SchedId = 4, "sched_id";
        /// How long CPUs have idled.
        GetCpuInfo = 8, "getcpuinfo";
        /// State of many domains.
        GetDomainInfoList = 6, "getdomaininfolist";
    }
}

/// The argument of `domctl`.
///
/// Xen copies it in, acts, and copies it back when the command has OUT fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Domctl {
    /// IN: number of a [`DomctlCmd`].
    pub cmd: u32,
    /// IN: [`INTERFACE_VERSION`].
    pub interface_version: u32,
    /// IN: the domain that the command is about. OUT for [`CreateDomain`] and [`GetDomainInfo`].
    pub domain: DomId,
    /// Zero.
    pub pad: [u16; 3],
    /// The command's payload struct, padded with zeros.
    pub payload: [u8; PAYLOAD_SIZE],
}

/// The argument of `sysctl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Sysctl {
    /// IN: number of a [`SysctlCmd`].
    pub cmd: u32,
    /// IN: [`INTERFACE_VERSION`].
    pub interface_version: u32,
    /// The command's payload struct, padded with zeros.
    pub payload: [u8; PAYLOAD_SIZE],
}

/// The payload of one command of `domctl`.
pub trait DomctlPayload: FromBytes + IntoBytes + Immutable + KnownLayout {
    /// Which command it belongs to.
    const COMMAND: DomctlCmd;
}

/// The payload of one command of `sysctl`.
pub trait SysctlPayload: FromBytes + IntoBytes + Immutable + KnownLayout {
    /// Which command it belongs to.
    const COMMAND: SysctlCmd;
}

fn encode<T: IntoBytes + Immutable>(payload: &T, to: &mut [u8; PAYLOAD_SIZE]) {
    const { assert!(size_of::<T>() <= PAYLOAD_SIZE, "a payload must fit") };
    let written = payload.write_to_prefix(to);
    debug_assert!(written.is_ok(), "the size was checked at compile time");
}

fn decode<T: FromBytes>(from: &[u8; PAYLOAD_SIZE]) -> Option<T> {
    T::read_from_prefix(from).ok().map(|(payload, _)| payload)
}

impl Domctl {
    /// A call of `T`'s command about `domain`.
    #[must_use]
    pub fn new<T: DomctlPayload>(domain: DomId, payload: &T) -> Self {
        let mut call = Self::new_zeroed();
        call.cmd = T::COMMAND.number();
        call.interface_version = INTERFACE_VERSION;
        call.domain = domain;
        encode(payload, &mut call.payload);
        call
    }

    /// Reads the payload as `T`; `None` when the header names another command.
    #[must_use]
    pub fn decode<T: DomctlPayload>(&self) -> Option<T> {
        (self.cmd == T::COMMAND.number()).then(|| decode(&self.payload))?
    }
}

impl Sysctl {
    /// A call of `T`'s command.
    #[must_use]
    pub fn new<T: SysctlPayload>(payload: &T) -> Self {
        let mut call = Self::new_zeroed();
        call.cmd = T::COMMAND.number();
        call.interface_version = INTERFACE_VERSION;
        encode(payload, &mut call.payload);
        call
    }

    /// Reads the payload as `T`; `None` when the header names another command.
    #[must_use]
    pub fn decode<T: SysctlPayload>(&self) -> Option<T> {
        (self.cmd == T::COMMAND.number()).then(|| decode(&self.payload))?
    }
}

/// Grant tables up to version 2, in [`CreateDomain::grant_opts`]: what `XEN_DOMCTL_GRANT_version(2)` gives.
pub const GRANT_VERSION_2: u32 = 2;

/// Makes a domain: paused, without memory but for its shared page, and without vCPUs ([`MaxVcpus`] makes them). The header's
/// `domain` is the number wanted, 0 for any; OUT, the number it got.
///
/// Errors: `-EEXIST` the number is taken, `-EINVAL` unknown flags, no vCPU or more than 8192, grant limits out of range,
/// `-ENOMEM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateDomain {
    /// IN: security label; 0.
    pub ssidref: u32,
    /// IN: a name for tools, usually a UUID; need not be unique.
    pub handle: [u8; 16],
    /// IN: `XEN_DOMCTL_CDF_*`; 0 is a PV domain without devices.
    pub flags: u32,
    /// IN: 0 unless the flags ask for an IOMMU.
    pub iommu_opts: u32,
    /// IN: vCPUs, from 1.
    pub max_vcpus: u32,
    /// IN: highest port it may have.
    pub max_evtchn_port: u32,
    /// IN: frames its grant table may have; negative for the default.
    pub max_grant_frames: i32,
    /// IN: frames for grants it has mapped; negative for the default.
    pub max_maptrack_frames: i32,
    /// IN: highest version of grant tables, 1 or [`GRANT_VERSION_2`].
    pub grant_opts: u32,
    /// IN: bytes of trace buffer for each vCPU; PV domains have none.
    pub vmtrace_size: u32,
    /// IN: which CPU pool; 0 is the first.
    pub cpupool_id: u32,
    /// IN: its devices and MSRs.
    pub arch: ArchDomainConfig,
}

/// The part of a domain's configuration that x86 has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ArchDomainConfig {
    /// `XEN_X86_EMU_*`; 0 for a PV domain.
    pub emulation_flags: u32,
    /// `XEN_X86_MSR_RELAXED` or 0.
    pub misc_flags: u32,
}

macro_rules! without_payload {
    ($($(#[$doc:meta])* $name:ident)*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            pub struct $name {}
        )*
    };
}

without_payload! {
    /// Tears the domain down: its vCPUs stop for good, its memory and channels go. Xen restarts the call by itself until that
    /// is done; the domain is gone when nobody refers to its pages any more. Errors: `-EINVAL` the caller's own domain.
    DestroyDomain
    /// Stops the domain's vCPUs. Counts. Errors: `-EINVAL` the caller's own domain.
    PauseDomain
    /// Takes one pause back. Errors: `-EINVAL` there is none.
    UnpauseDomain
}

bitflags! {
    /// State of a domain, in the low half of [`GetDomainInfo::flags`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DomainFlags: u32 {
        /// Torn down, but something of it is still referred to.
        const DYING = 1 << 0;
        /// It is no PV guest.
        const HVM_GUEST = 1 << 1;
        /// It shut down; the reason is in the upper half.
        const SHUTDOWN = 1 << 2;
        /// Paused by the control interface.
        const PAUSED = 1 << 3;
        /// All its vCPUs wait.
        const BLOCKED = 1 << 4;
        /// One of its vCPUs is on a CPU.
        const RUNNING = 1 << 5;
        /// A debugger has it.
        const DEBUGGED = 1 << 6;
        /// It serves xenstore.
        const XS_DOMAIN = 1 << 7;
        /// Its pages are mapped by hardware.
        const HAP = 1 << 8;
    }
}

/// Where the reason of a shutdown begins in [`GetDomainInfo::flags`].
pub const SHUTDOWN_SHIFT: u32 = 16;
/// The bits of that reason, shifted down.
pub const SHUTDOWN_MASK: u32 = 255;
/// [`GetDomainInfo::max_vcpu_id`] of a domain without vCPUs.
pub const INVALID_MAX_VCPU_ID: u32 = !0;

/// State of one domain (OUT): of the header's, or of the next one that exists; the header's `domain` tells which.
///
/// Errors: `-ESRCH` there is none from that number on, `-EINVAL` the number is a reserved one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetDomainInfo {
    /// Its number.
    pub domain: DomId,
    /// Zero.
    pub pad1: u16,
    /// [`DomainFlags`]; from bit [`SHUTDOWN_SHIFT`] on, why it shut down.
    pub flags: u32,
    /// Frames it has.
    pub tot_pages: u64,
    /// Frames it may have.
    pub max_pages: u64,
    /// Frames promised to it by a claim.
    pub outstanding_pages: u64,
    /// Frames it shares.
    pub shr_pages: u64,
    /// Frames paged out.
    pub paged_pages: u64,
    /// Machine frame of its shared page, for a PV domain.
    pub shared_info_frame: u64,
    /// CPU time of all its vCPUs, ns.
    pub cpu_time: u64,
    /// vCPUs that are up.
    pub nr_online_vcpus: u32,
    /// Highest number of a vCPU, or [`INVALID_MAX_VCPU_ID`].
    pub max_vcpu_id: u32,
    /// Security label.
    pub ssidref: u32,
    /// The name it was created with.
    pub handle: [u8; 16],
    /// CPU pool.
    pub cpupool: u32,
    /// Bits of a guest-physical address.
    pub gpaddr_bits: u8,
    /// Zero.
    pub pad2: [u8; 7],
    /// Its devices and MSRs.
    pub arch_config: ArchDomainConfig,
}

impl GetDomainInfo {
    /// Why it shut down; meaningless unless [`DomainFlags::SHUTDOWN`] is set.
    #[must_use]
    pub const fn shutdown_reason(&self) -> u32 {
        (self.flags >> SHUTDOWN_SHIFT) & SHUTDOWN_MASK
    }
}

/// Limits the domain's memory. A limit below what it has takes nothing away.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MaxMem {
    /// IN: KiB; rounded down to whole pages.
    pub max_memkb: u64,
}

/// Sets the whole state of a vCPU, which comes up when the state's flags say online.
///
/// Errors: `-EINVAL` no such vCPU, the caller's own domain, a state that no guest may be in, a root that is no L4 table;
/// `-EOPNOTSUPP` other roots or tables than it has already; `-ENOMEM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuContext {
    /// IN: which.
    pub vcpu: u32,
    /// Zero.
    pub pad0: u32,
    /// IN: the state; null takes the vCPU back to its state before the first.
    pub ctxt: GuestHandle<VcpuGuestContext>,
}

/// State of one vCPU. Errors: `-EINVAL` no such vCPU, `-ESRCH` it was never made.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetVcpuInfo {
    /// IN: which.
    pub vcpu: u32,
    /// OUT: 1 when it is up.
    pub online: u8,
    /// OUT: 1 when it waits.
    pub blocked: u8,
    /// OUT: 1 when it is on a CPU.
    pub running: u8,
    /// Zero.
    pub pad0: u8,
    /// OUT: CPU time, ns.
    pub cpu_time: u64,
    /// OUT: the CPU it is or was last on.
    pub cpu: u32,
    /// Zero.
    pub pad1: u32,
}

/// [`SchedId::sched_id`] of the credit scheduler.
pub const SCHEDULER_CREDIT: u32 = 5;
/// Of the second one.
pub const SCHEDULER_CREDIT2: u32 = 6;
/// [`SchedulerOp::cmd`] that sets.
pub const SCHEDOP_PUTINFO: u32 = 0;
/// The one that reads.
pub const SCHEDOP_GETINFO: u32 = 1;

/// What the credit schedulers keep of a domain. Errors: `-EINVAL` another scheduler, a weight or cap out of range; `-EOPNOTSUPP`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedulerOp {
    /// IN: the scheduler meant.
    pub sched_id: u32,
    /// IN: [`SCHEDOP_PUTINFO`] or [`SCHEDOP_GETINFO`].
    pub cmd: u32,
    /// IN/OUT: share against others; 0 changes nothing.
    pub weight: u16,
    /// IN/OUT: percent of one CPU at most; 0 for no cap.
    pub cap: u16,
    /// Room of other schedulers.
    pub pad0: [u32; 3],
}

/// Which scheduler there is (OUT).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedId {
    /// Its number.
    pub sched_id: u32,
}

/// How long CPUs have idled.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetCpuInfo {
    /// IN: room in the list.
    pub max_cpus: u32,
    /// Zero.
    pub pad0: u32,
    /// IN: the list: nanoseconds for each CPU.
    pub info: GuestHandle<u64>,
    /// OUT: entries filled.
    pub nr_cpus: u32,
    /// Zero.
    pub pad1: u32,
}

/// Makes the domain's vCPUs, down. Errors: `-EINVAL` another number than the domain was created with, the caller's own domain;
/// `-ENOMEM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MaxVcpus {
    /// IN: how many.
    pub max: u32,
}

/// Fills a frame of the domain with hypercall stubs. Errors: `-EINVAL` not a frame of its own, `-EPERM` not a writable one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HypercallInit {
    /// IN: which; for a PV domain, a machine frame.
    pub gmfn: u64,
}

/// Reads the hypervisor's log.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReadConsole {
    /// IN: not 0 forgets everything afterwards.
    pub clear: u8,
    /// IN: not 0 starts at `index`, 0 at the oldest byte.
    pub incremental: u8,
    /// Zero.
    pub pad0: u8,
    /// Zero.
    pub pad1: u8,
    /// IN: first byte wanted, counted modulo 2³²; OUT: the byte after the last one given.
    pub index: u32,
    /// IN: where they go.
    pub buffer: GuestHandle<u8>,
    /// IN: room there; OUT: bytes given.
    pub count: u32,
    /// Zero.
    pub pad2: u32,
}

/// Facts about the machine (OUT).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysInfo {
    /// Hardware threads of a core.
    pub threads_per_core: u32,
    /// Cores of a socket.
    pub cores_per_socket: u32,
    /// CPUs that are up.
    pub nr_cpus: u32,
    /// Highest number that a CPU can have.
    pub max_cpu_id: u32,
    /// NUMA nodes that are up.
    pub nr_nodes: u32,
    /// Highest number that a node can have.
    pub max_node_id: u32,
    /// Frequency of the processor, kHz.
    pub cpu_khz: u32,
    /// `XEN_SYSCTL_PHYSCAP_*`.
    pub capabilities: u32,
    /// The same for x86.
    pub arch_capabilities: u32,
    /// Zero.
    pub pad: u32,
    /// Frames of RAM.
    pub total_pages: u64,
    /// Of these, free.
    pub free_pages: u64,
    /// Of these, waiting to be cleaned.
    pub scrub_pages: u64,
    /// Of these, promised by claims.
    pub outstanding_pages: u64,
    /// Highest machine frame.
    pub max_mfn: u64,
    /// Feature words of the processor.
    pub hw_cap: [u32; 8],
}

/// States of domains in the order of their numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetDomainInfoList {
    /// IN: the first number of interest.
    pub first_domain: DomId,
    /// Zero.
    pub pad0: u16,
    /// IN: room in the list.
    pub max_domains: u32,
    /// IN: the list.
    pub buffer: GuestHandle<GetDomainInfo>,
    /// OUT: entries filled; fewer than `max_domains` means that there are no more.
    pub num_domains: u32,
    /// Zero.
    pub pad1: u32,
}

macro_rules! payloads {
    ($trait:ident, $enum:ident: $($name:ident = $command:ident)*) => {
        $(impl $trait for $name {
            const COMMAND: $enum = $enum::$command;
        })*
    };
}

payloads! { DomctlPayload, DomctlCmd:
    CreateDomain = CreateDomain DestroyDomain = DestroyDomain PauseDomain = PauseDomain UnpauseDomain = UnpauseDomain
    GetDomainInfo = GetDomainInfo MaxMem = MaxMem VcpuContext = SetVcpuContext GetVcpuInfo = GetVcpuInfo
    MaxVcpus = MaxVcpus SchedulerOp = SchedulerOp HypercallInit = HypercallInit
}
payloads! { SysctlPayload, SysctlCmd:
    ReadConsole = ReadConsole PhysInfo = PhysInfo SchedId = SchedId GetCpuInfo = GetCpuInfo GetDomainInfoList = GetDomainInfoList
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_survive_the_envelope() {
        let create =
            CreateDomain { max_vcpus: 3, handle: [7; 16], max_grant_frames: -1, ..CreateDomain::default() };
        let call = Domctl::new(DomId::ZERO, &create);
        assert_eq!((call.cmd, call.interface_version), (1, 0x15));
        assert_eq!(call.decode::<CreateDomain>(), Some(create));
        assert_eq!(call.decode::<MaxMem>(), None);
        let info = PhysInfo { free_pages: 1 << 40, ..PhysInfo::default() };
        assert_eq!(Sysctl::new(&info).decode::<PhysInfo>(), Some(info));
        assert!(Sysctl::new(&info).decode::<ReadConsole>().is_none());
    }

    #[test]
    fn the_reason_of_a_shutdown_is_in_the_upper_half() {
        let flags = DomainFlags::SHUTDOWN | DomainFlags::PAUSED;
        let info = GetDomainInfo { flags: flags.bits() | 3 << 16, ..GetDomainInfo::default() };
        assert_eq!(info.shutdown_reason(), 3);
        assert_eq!(DomainFlags::from_bits_truncate(info.flags & 0xffff), flags);
    }
}

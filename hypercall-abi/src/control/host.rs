//! Payloads of the commands about the hypervisor and the machine.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::payload;
use crate::GuestHandle;

bitflags! {
    /// What the control interface can do beyond the first version, in [`Version::capabilities`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Capabilities: u64 {
        /// [`ReadLog`](super::ReadLog) answers.
        const LOG = 1 << 0;
        /// [`PageTypes`](super::PageTypes) answers.
        const PAGE_TYPES = 1 << 1;
        /// [`SetWeight`](super::SetWeight) has an effect.
        const WEIGHTS = 1 << 2;
        /// [`SetAffinity`](super::SetAffinity) answers.
        const AFFINITY = 1 << 3;
        /// [`SetCap`](super::SetCap) has an effect, and vCPUs and CPUs are accounted for: the words of
        /// [`VcpuInfo`](super::VcpuInfo) behind `cpu`, those of [`DomainInfo`](super::DomainInfo) from `cap` on, and
        /// [`CpuInfo`](super::CpuInfo).
        const ACCOUNTING = 1 << 4;
        /// [`AllocateMessage`](super::AllocateMessage) and [`InterruptInfo`](super::InterruptInfo) answer.
        const MESSAGES = 1 << 5;
    }
}

/// What the hypervisor can do (OUT). Answers whatever version the header asks with, so that a tool can tell what is wrong.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Version {
    /// The version that it speaks.
    pub interface_version: u32,
    /// Zero.
    pub pad0: u32,
    /// [`Capabilities`].
    pub capabilities: u64,
}

/// Facts about the machine and the hypervisor (OUT).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PhysInfo {
    /// Frames of RAM.
    pub total_pages: u64,
    /// Of these, free for any domain.
    pub free_pages: u64,
    /// Of these, given back but not yet cleaned for reuse.
    pub scrub_pending_pages: u64,
    /// Frames that the hypervisor holds itself: image, tables, stacks, heap.
    pub hypervisor_pages: u64,
    /// Bytes in use of its heap.
    pub heap_used: u64,
    /// Bytes of its heap.
    pub heap_size: u64,
    /// Time since it started, ns.
    pub uptime_ns: u64,
    /// CPUs that are up.
    pub cpus: u32,
    /// Frequency of the time-stamp counter, kHz.
    pub cpu_khz: u32,
    /// Domains that exist.
    pub domains: u32,
    /// What the longest entry was: an exception vector, or a hypercall number with [`LONGEST_IS_HYPERCALL`].
    pub longest_what: u32,
    /// The longest that ring 0 worked for one entry from a guest, in TSC ticks, since the last call of this command: the
    /// longest that nothing else could run on that CPU.
    pub longest_ticks: u64,
    /// Device interrupts since the start that nobody was given or listened to: counted and dropped.
    pub dropped_interrupts: u64,
}

/// Flag of [`PhysInfo::longest_what`].
pub const LONGEST_IS_HYPERCALL: u32 = 1 << 16;

/// What a CPU did since boot. Errors: `-ENOENT` no such CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CpuInfo {
    /// IN: which, from 0.
    pub cpu: u32,
    /// OUT: vCPUs that wait for it now.
    pub waiting: u32,
    /// OUT: time that it idled, ns.
    pub idle_ns: u64,
    /// OUT: time that guests had it, ns, with what the hypervisor did for them.
    pub busy_ns: u64,
    /// OUT: times that it put a vCPU on.
    pub switches: u64,
    /// OUT: timer interrupts that it took.
    pub timer_interrupts: u64,
}

/// Reads the hypervisor's log from a position on.
///
/// Positions count the bytes ever logged. What is older than the log's memory is skipped, so a reader that keeps `index` from
/// call to call sees every byte once, and can tell how many it missed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReadLog {
    /// IN: first byte wanted; OUT: the byte after the last one given.
    pub index: u64,
    /// IN: where they go.
    pub buffer: GuestHandle<u8>,
    /// IN: room there.
    pub len: u32,
    /// OUT: bytes given.
    pub copied: u32,
    /// OUT: bytes between the `index` asked for and the first one given, lost.
    pub skipped: u64,
}

/// Sets how much the hypervisor logs. Errors: `-EINVAL` a level above 5.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetLogLevel {
    /// IN: 0 nothing, 1 errors, 2 warnings, 3 information, 4 debug, 5 trace. OUT: the level before.
    pub level: u32,
    /// Zero.
    pub pad0: u32,
}

payload! { Version PhysInfo CpuInfo ReadLog SetLogLevel }

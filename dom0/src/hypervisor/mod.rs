//! The hypervisor below: Xenolith or Xen, found out once and behind one trait from then on.
//!
//! What both do by the same hypercalls (giving memory, foreign mappings, pins, ports, ends from outside) is in
//! [`machine`](crate::machine) and [`guests`](crate::guests); this is the rest, where their control interfaces differ.

mod xen;
mod xenolith;

use crate::policy::Ending;
use crate::toolstack::Limits;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, GrantRef, Mfn};
use serde::Serialize;
use spin::Once;

/// A hypervisor's control interface. Errors are the hypervisor's unless something else is said.
pub trait Hypervisor: Sync {
    /// Its name, version and interface, for people.
    fn about(&self) -> String;

    /// Makes a paused domain without memory; returns its number and the frame of its shared page.
    ///
    /// # Errors
    /// `ENOMEM`, `EINVAL` for a number of vCPUs that it does not make, or limits beyond its own.
    fn create_domain(
        &self,
        handle: [u8; 16],
        vcpus: u32,
        max_pages: u64,
        limits: Limits,
    ) -> Result<(DomId, Mfn), Errno>;

    /// Whether pages that are given to a domain are zeroes.
    fn gives_blank_pages(&self) -> bool;

    /// Fills a frame of a domain under construction with hypercall stubs.
    ///
    /// # Errors
    /// When the frame is not a writable one of the domain.
    fn hypercall_page(&self, domain: DomId, frame: Mfn) -> Result<(), Errno>;

    /// Lets `peer` map a frame of a domain under construction through a reserved grant.
    ///
    /// # Errors
    /// `EINVAL` when the grant is no reserved one.
    fn grant_seed(&self, domain: DomId, grant: GrantRef, peer: DomId, frame: Mfn) -> Result<(), Errno>;

    /// Sets a vCPU's whole state and marks it as up.
    ///
    /// # Errors
    /// `EINVAL` for a state that no guest may be in.
    fn set_vcpu(&self, domain: DomId, vcpu: u32, context: &VcpuGuestContext) -> Result<(), Errno>;

    /// Tears a domain down as far as one call goes; true when it is gone.
    ///
    /// # Errors
    /// `ESRCH` when there is no such domain.
    fn destroy_step(&self, domain: DomId) -> Result<bool, Errno>;

    /// Stops a domain's vCPUs; counts.
    ///
    /// # Errors
    /// `ESRCH`.
    fn pause(&self, domain: DomId) -> Result<(), Errno>;

    /// Takes one pause back.
    ///
    /// # Errors
    /// `ESRCH`, `EINVAL` when there is none.
    fn unpause(&self, domain: DomId) -> Result<(), Errno>;

    /// State of a domain.
    ///
    /// # Errors
    /// `ESRCH`.
    fn domain(&self, domain: DomId) -> Result<DomainInfo, Errno>;

    /// State of all domains, in the order of their numbers.
    ///
    /// # Errors
    /// None that a control domain gets.
    fn domains(&self) -> Result<Vec<DomainInfo>, Errno>;

    /// Domains that have ended and exist still, and how they did.
    ///
    /// # Errors
    /// None that a control domain gets.
    fn ended(&self) -> Result<Vec<(DomId, Ending)>, Errno> {
        Ok(self.domains()?.iter().filter_map(|info| Some((info.domain, info.ending?))).collect())
    }

    /// State of a domain's vCPU.
    ///
    /// # Errors
    /// `ENOENT` when it has no such vCPU, `ESRCH`.
    fn vcpu(&self, domain: DomId, vcpu: u32) -> Result<VcpuInfo, Errno>;

    /// Facts about the machine.
    ///
    /// # Errors
    /// None that a control domain gets.
    fn host(&self) -> Result<HostInfo, Errno>;

    /// Lets a vCPU run on the CPUs `hard` only, a bit each, and rather on those in `soft`; 0 for `hard` changes nothing. Returns
    /// both as they are then.
    ///
    /// # Errors
    /// `ENOENT` no such vCPU, `EINVAL` none of the CPUs is up, `EBUSY` none is free where each vCPU has one for itself;
    /// [`Refusal::NotOffered`] when that is not said here.
    fn affinity(&self, domain: DomId, vcpu: u32, hard: u64, soft: u64) -> Result<(u64, u64), Refusal>;

    /// A domain's share of the CPUs.
    ///
    /// # Errors
    /// `ESRCH`; [`Refusal::NotOffered`] under a scheduler without shares.
    fn share(&self, domain: DomId) -> Result<Share, Refusal>;

    /// Changes it.
    ///
    /// # Errors
    /// `ESRCH`, `EINVAL` out of range; [`Refusal::NotOffered`].
    fn set_share(&self, domain: DomId, share: Share) -> Result<(), Refusal>;

    /// Time that each CPU idled, ns.
    ///
    /// # Errors
    /// None that a control domain gets.
    fn idle_ns(&self) -> Result<Vec<u64>, Errno>;

    /// Reads the hypervisor's log from position `index` on; positions count the bytes ever logged.
    ///
    /// # Errors
    /// None that a control domain gets.
    fn read_log(&self, index: u64, buffer: &mut [u8]) -> Result<LogPart, Errno>;

    /// Sets how much the hypervisor logs, 0 nothing to 5 everything.
    ///
    /// # Errors
    /// [`Refusal::NotOffered`] when it cannot be changed while it runs.
    fn set_log_level(&self, level: u32) -> Result<(), Refusal>;
}

/// Why a hypervisor did not do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It said no.
    Errno(Errno),
    /// It has no such function; the text says what there is instead.
    NotOffered(&'static str),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno) => write!(f, "the hypervisor answers {errno}"),
            Self::NotOffered(instead) => f.write_str(instead),
        }
    }
}

/// State of a domain. The parts are read one after another, so they may be of slightly different moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Its number.
    pub domain: DomId,
    /// The name it was created with, cut, padded with zeros.
    pub handle: [u8; 16],
    /// It is being torn down, or is dead and still referred to.
    pub dying: bool,
    /// How it ended, if it has.
    pub ending: Option<Ending>,
    /// The control interface has paused it.
    pub paused: bool,
    /// One of its vCPUs is on a CPU.
    pub running: bool,
    /// All its vCPUs wait.
    pub blocked: bool,
    /// vCPUs it may have.
    pub vcpus: u32,
    /// Frames it has.
    pub pages: u64,
    /// CPU time of all its vCPUs, ns.
    pub cpu_time_ns: u64,
    /// More, if the hypervisor tells.
    pub usage: Option<DomainUsage>,
}

/// What a domain used, all its vCPUs together, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DomainUsage {
    /// Its share of CPU time against others.
    pub weight: u32,
    /// The most CPU time it gets, in percent of one CPU; 0 for no cap.
    pub cap_percent: u32,
    /// Time that its vCPUs wanted to run and did not, ns.
    pub stolen_ns: u64,
    /// Hypercalls.
    pub hypercalls: u64,
    /// Exceptions.
    pub faults: u64,
    /// Upcalls.
    pub upcalls: u64,
    /// Memory that it may have.
    pub max_memory_bytes: u64,
    /// Frames of its grant table.
    pub grant_frames: u32,
    /// Grants of others that it has mapped.
    pub grant_mappings: u32,
    /// Ports in use.
    pub ports: u32,
    /// Memory of the hypervisor's for it.
    pub hypervisor_bytes: u64,
}

/// What a vCPU used since its domain was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VcpuUsage {
    /// Time that it wanted to run and did not, ns (`RUNSTATE_runnable`): stolen, as guests call it.
    pub runnable_ns: u64,
    /// Time that it waited for events, ns (`RUNSTATE_blocked`).
    pub blocked_ns: u64,
    /// Time that it was down or paused, ns (`RUNSTATE_offline`).
    pub offline_ns: u64,
    /// Hypercalls.
    pub hypercalls: u64,
    /// Exceptions.
    pub faults: u64,
    /// Events that it sent.
    pub events_sent: u64,
    /// Upcalls that it got.
    pub upcalls: u64,
    /// Elements of its grant operations.
    pub grant_operations: u64,
    /// Times that it was put on a CPU.
    pub switches: u64,
    /// Of these, on another CPU than before.
    pub moves: u64,
}

/// A domain's share of the CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Against others.
    pub weight: u32,
    /// The most it gets, in percent of one CPU; 0 for no cap.
    pub cap_percent: u32,
}

/// State of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuInfo {
    /// It is up.
    pub online: bool,
    /// It is on a CPU.
    pub running: bool,
    /// It waits.
    pub blocked: bool,
    /// CPU time, ns.
    pub cpu_time_ns: u64,
    /// The CPU it is or was last on.
    pub cpu: u32,
    /// More, if the hypervisor tells.
    pub usage: Option<VcpuUsage>,
}

/// Facts about the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostInfo {
    /// Frames of RAM.
    pub total_pages: u64,
    /// Of these, free for any domain, or soon: given back but not yet cleaned.
    pub free_pages: u64,
    /// CPUs that are up.
    pub cpus: u32,
    /// Their frequency, kHz.
    pub cpu_khz: u32,
    /// Domains that exist.
    pub domains: u32,
    /// What the hypervisor uses itself, if it tells.
    pub own: Option<OwnUse>,
}

/// What a hypervisor uses itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnUse {
    /// Frames.
    pub pages: u64,
    /// Bytes in use of its heap.
    pub heap_used: u64,
    /// Bytes of its heap.
    pub heap_size: u64,
    /// Time since it started, ns.
    pub uptime_ns: u64,
    /// Device interrupts that nobody was given or listened to.
    pub dropped_interrupts: u64,
}

/// A piece of the hypervisor's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPart {
    /// Bytes put into the buffer; 0 at the end.
    pub bytes: usize,
    /// Position behind them.
    pub next: u64,
    /// Bytes that were asked for and are forgotten.
    pub lost: u64,
}

/// The hypervisor below.
///
/// The first call asks; a hypervisor with neither interface counts as Xenolith, whose refusals name the version it wants.
pub fn get() -> &'static dyn Hypervisor {
    static FOUND: Once<&'static dyn Hypervisor> = Once::new();
    *FOUND.call_once(|| {
        if guest_sdk::control::version().is_err() && guest_sdk::xen_control::phys_info().is_ok() {
            &xen::Xen
        } else {
            &xenolith::Xenolith
        }
    })
}

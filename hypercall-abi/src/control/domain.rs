//! Payloads of the commands about a domain.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::payload;
use crate::vcpu::VcpuGuestContext;
use crate::{DomId, GrantRef, GuestHandle, Mfn};

bitflags! {
    /// Flags of [`CreateDomain`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct CreateFlags: u32 {
        /// The domain may use the control interface on others.
        const CONTROL = 1 << 0;
        /// Grants may be made in version 2.
        const GRANT_V2 = 1 << 1;
    }
}

/// Makes a domain: paused, without memory but for its shared page, its vCPUs down. The header's `domid` is the number wanted,
/// or [`DomId::INVALID`] for any; OUT, the number it got.
///
/// Errors: `-EEXIST` the number is taken, `-EINVAL` unknown flags, no vCPU or more than the limit, more grants than there can be,
/// `-ENOMEM`, `-ENOSPC` fewer free CPUs than vCPUs under `sched=null`, where each has one for itself, `-ENFILE` no free number,
/// `-EPERM` flags that the caller itself lacks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CreateDomain {
    /// IN: [`CreateFlags`].
    pub flags: u32,
    /// IN: vCPUs, from 1.
    pub max_vcpus: u32,
    /// IN: frames it may have.
    pub max_pages: u64,
    /// IN: a name for tools, usually a UUID; need not be unique.
    pub handle: [u8; 16],
    /// IN: shared frames its grant table may have, up to 64; 0 for 64.
    pub max_grant_frames: u32,
    /// IN: grants of others it may have mapped at a time, up to 262144; 0 for that many.
    pub max_maptrack: u32,
    /// IN: the highest port it may have (`max_evtchn_port` of Xen's interface); 0 for as many as the form in use has.
    pub max_port: u32,
    /// OUT: its number, also in the header.
    pub domid: DomId,
    /// Zero.
    pub pad0: u16,
    /// OUT: machine frame of its shared page.
    pub shared_info: Mfn,
}

/// Starts to tear down the domain: its vCPUs stop for good, its memory and channels go step by step. No answer but 0 when all
/// is done or `-EAGAIN` when more is to do: call again, also to wait for grants that others still have mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Destroy {
    /// Zero.
    pub pad: u64,
}

/// Stops the domain's vCPUs; they have left their CPUs when the call returns. Counts: as many [`Unpause`] let them go.
///
/// Two callers that pause each other do not wait for ever: a call that waits is executed again, and whoever is paused first goes first.
///
/// Errors: `-EINVAL` the caller's own domain, or `waits` neither 0 nor 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Pause {
    /// IN: zero. The hypervisor writes 1 while the call is executed again to wait: the pause is counted then.
    pub waits: u64,
}

/// Takes one pause of the control interface back. Errors: `-EINVAL` there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Unpause {
    /// Zero.
    pub pad: u64,
}

/// Limits the domain's memory. A limit below what it has takes nothing away.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetMaxPages {
    /// IN: frames.
    pub max_pages: u64,
}

/// Fills a frame of the domain with hypercall stubs. Errors: `-EINVAL` not a writable frame of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HypercallPage {
    /// IN: which.
    pub mfn: Mfn,
}

/// Sets the whole state of a vCPU. The domain must be paused; the vCPU comes up when the state's flags say online.
///
/// Errors: `-EBUSY` not paused, `-ENOENT` no such vCPU, `-EINVAL` a state that no guest may be in, a root that is no L4 table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetVcpuContext {
    /// IN: which.
    pub vcpu: u32,
    /// Zero.
    pub pad0: u32,
    /// IN: the state; null takes the vCPU back to its state before the first.
    pub context: GuestHandle<VcpuGuestContext>,
}

/// Reads the whole state of a vCPU, as [`SetVcpuContext`] takes it. The domain must be paused.
///
/// Errors: `-EBUSY` not paused, `-ENOENT` no such vCPU, `-ENODATA` it never had a state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetVcpuContext {
    /// IN: which.
    pub vcpu: u32,
    /// Zero.
    pub pad0: u32,
    /// IN: where the state goes.
    pub context: GuestHandle<VcpuGuestContext>,
}

bitflags! {
    /// State of a domain, in [`DomainInfo::state`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DomainState: u32 {
        /// It is being torn down.
        const DYING = 1 << 0;
        /// Torn down, but something of it is still referred to.
        const DEAD = 1 << 1;
        /// It shut down; the reason is in `shutdown_reason`.
        const SHUTDOWN = 1 << 2;
        /// Paused by the control interface.
        const PAUSED = 1 << 3;
        /// One of its vCPUs is on a CPU.
        const RUNNING = 1 << 4;
        /// All its vCPUs wait.
        const BLOCKED = 1 << 5;
        /// It has control verbs.
        const CONTROL = 1 << 6;
    }
}

/// State of one domain (OUT). Also the element of [`ListDomains`].
///
/// The numbers are read one after another without stopping the domain, so they may be of slightly different moments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DomainInfo {
    /// Its number.
    pub domid: DomId,
    /// Zero.
    pub pad0: u16,
    /// [`DomainState`].
    pub state: u32,
    /// Number of a [`ShutdownReason`](crate::sched::ShutdownReason), when shut down.
    pub shutdown_reason: u32,
    /// vCPUs it may have.
    pub max_vcpus: u32,
    /// vCPUs that are up.
    pub online_vcpus: u32,
    /// Share of CPU time.
    pub weight: u32,
    /// Frames it has.
    pub tot_pages: u64,
    /// Frames it may have.
    pub max_pages: u64,
    /// CPU time of all its vCPUs, ns.
    pub cpu_time_ns: u64,
    /// Machine frame of its shared page.
    pub shared_info: Mfn,
    /// The name it was created with.
    pub handle: [u8; 16],
    /// Frames of its grant table.
    pub grant_frames: u32,
    /// Grants of others that it has mapped.
    pub grant_mappings: u32,
    /// Ports in use.
    pub ports: u32,
    /// Hypervisor frames charged to it.
    pub hypervisor_pages: u32,
    /// The most CPU time it gets, in percent of one CPU; 0 for no cap.
    pub cap: u32,
    /// Zero.
    pub pad1: u32,
    /// Time that its vCPUs wanted to run and did not, ns: waiting for a CPU or for the cap.
    pub runnable_ns: u64,
    /// Hypercalls of all its vCPUs, as [`VcpuInfo`] counts them; so are the two that follow.
    pub hypercalls: u64,
    /// Exceptions.
    pub faults: u64,
    /// Upcalls.
    pub upcalls: u64,
}

/// States of domains in the order of their numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ListDomains {
    /// IN: the first number of interest.
    pub first: DomId,
    /// IN: 1 for those only that have shut down and that nobody destroys yet, else 0.
    pub only_ended: u16,
    /// IN: room in the list.
    pub max: u32,
    /// IN: the list.
    pub buffer: GuestHandle<DomainInfo>,
    /// OUT: entries filled. 0 means that there are no more; after fewer than `max`, which is as many as one call tells of, there may be
    /// more behind the last.
    pub count: u32,
    /// Zero.
    pub pad1: u32,
}

bitflags! {
    /// State of a vCPU, in [`VcpuInfo::state`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VcpuState: u32 {
        /// It is up.
        const ONLINE = 1 << 0;
        /// It is on a CPU.
        const RUNNING = 1 << 1;
        /// It waits.
        const BLOCKED = 1 << 2;
        /// Paused, alone or with its domain.
        const PAUSED = 1 << 3;
    }
}

/// State of one vCPU. Times are since its domain was made, counts too. Errors: `-ENOENT` no such vCPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuInfo {
    /// IN: which.
    pub vcpu: u32,
    /// OUT: [`VcpuState`].
    pub state: u32,
    /// OUT: CPU time, ns.
    pub cpu_time_ns: u64,
    /// OUT: the CPU it is or was last on.
    pub cpu: u32,
    /// Zero.
    pub pad0: u32,
    /// OUT: time that it wanted to run and did not, ns (`RUNSTATE_runnable`): waiting for a CPU or for its domain's cap. This is
    /// what guests call stolen.
    pub runnable_ns: u64,
    /// OUT: time that it waited for events, ns (`RUNSTATE_blocked`).
    pub blocked_ns: u64,
    /// OUT: time that it was down or paused, ns (`RUNSTATE_offline`).
    pub offline_ns: u64,
    /// OUT: hypercalls. One that is preempted and executed again counts once; a multicall counts as one.
    pub hypercalls: u64,
    /// OUT: exceptions of its instructions, whether put right for it or handed to it.
    pub faults: u64,
    /// OUT: events that it sent.
    pub events_sent: u64,
    /// OUT: upcalls that it got; one may stand for many events.
    pub upcalls: u64,
    /// OUT: elements of its grant operations.
    pub grant_operations: u64,
    /// OUT: times that it was put on a CPU.
    pub switches: u64,
    /// OUT: of these, on another CPU than the time before.
    pub moves: u64,
}

/// What the frames of a domain are used as, for those who save it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PageTypes {
    /// IN: machine frames; OUT: a [`PageType`] in place of each.
    pub frames: GuestHandle<u64>,
    /// IN: length of the list; at most 1024 or `-E2BIG`.
    pub count: u32,
    /// Zero.
    pub pad0: u32,
}

/// One answer of [`PageTypes`]: the kind in the low byte, flags above.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PageType(u64);

/// The kind in a [`PageType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    /// Ordinary memory.
    Plain = 0,
    /// L1 table.
    L1 = 1,
    /// L2 table.
    L2 = 2,
    /// L3 table.
    L3 = 3,
    /// L4 table.
    L4 = 4,
    /// Segment descriptors.
    Descriptors = 5,
    /// Not a frame of this domain.
    Foreign = 15,
}

impl PageType {
    const PINNED: u64 = 1 << 8;

    /// A kind, and whether a pin keeps it.
    #[must_use]
    pub const fn new(kind: PageKind, pinned: bool) -> Self {
        PageType(kind as u64 | if pinned { Self::PINNED } else { 0 })
    }

    /// The word in the list.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The kind; `None` for a byte that nobody defined.
    #[must_use]
    pub const fn kind(self) -> Option<PageKind> {
        match self.0 & 0xff {
            0 => Some(PageKind::Plain),
            1 => Some(PageKind::L1),
            2 => Some(PageKind::L2),
            3 => Some(PageKind::L3),
            4 => Some(PageKind::L4),
            5 => Some(PageKind::Descriptors),
            15 => Some(PageKind::Foreign),
            _ => None,
        }
    }

    /// Whether a pin keeps the kind.
    #[must_use]
    pub const fn is_pinned(self) -> bool {
        self.0 & Self::PINNED != 0
    }
}

/// Fills one of the first [`GNTTAB_NR_RESERVED_ENTRIES`](crate::grant::GNTTAB_NR_RESERVED_ENTRIES) grant entries, so that a peer
/// can map a ring before the domain runs.
///
/// Errors: `-EINVAL` not a reserved entry, not a frame of the domain, `-EBUSY` the entry is in use, `-ESRCH` no such peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GrantSeed {
    /// IN: which entry.
    pub gref: GrantRef,
    /// IN: who may map it.
    pub peer: DomId,
    /// IN: 1 for reading only, 0 for writing too.
    pub readonly: u16,
    /// IN: the frame.
    pub mfn: Mfn,
}

/// Sets the domain's share of CPU time against the others'. Errors: `-EINVAL` 0 or above 65535.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetWeight {
    /// IN: the default is 256.
    pub weight: u32,
    /// Zero.
    pub pad0: u32,
}

/// Sets the most CPU time that the domain gets, all its vCPUs together, however idle the machine is. It holds for any 100 ms, give or
/// take 10 ms. Errors: `-EINVAL` above 6400.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetCap {
    /// IN: in percent of one CPU: 150 is one and a half. 0 lifts the cap.
    pub percent: u32,
    /// Zero.
    pub pad0: u32,
}

/// Says on which CPUs a vCPU may run, and on which of them it should. It moves at once, even the caller's own vCPU.
///
/// Errors: `-EINVAL` no such vCPU, or none of the CPUs in `hard` is up; `-EBUSY` under `sched=null`, none of them is free.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SetAffinity {
    /// IN: which vCPU.
    pub vcpu: u32,
    /// Zero.
    pub pad0: u32,
    /// IN: the CPUs that it may run on, a bit each; 0 changes nothing. OUT: what holds then.
    pub hard: u64,
    /// IN: the CPUs that it should run on when it has the choice; of no effect outside `hard`. OUT: what holds then.
    pub soft: u64,
}

payload! {
    CreateDomain Destroy Pause Unpause SetMaxPages HypercallPage SetVcpuContext GetVcpuContext DomainInfo ListDomains VcpuInfo
    PageTypes GrantSeed SetWeight SetCap SetAffinity
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_types_round_trip() {
        for kind in [
            PageKind::Plain,
            PageKind::L1,
            PageKind::L2,
            PageKind::L3,
            PageKind::L4,
            PageKind::Descriptors,
            PageKind::Foreign,
        ] {
            for pinned in [false, true] {
                let word = PageType::new(kind, pinned);
                assert_eq!((word.kind(), word.is_pinned()), (Some(kind), pinned));
            }
        }
    }
}

//! Domains, their virtual CPUs, and the table of all domains.
#![forbid(unsafe_code)]

mod context;
mod counts;
mod crash;
mod error;
mod id_set;
mod lifecycle;
mod registry;
mod regs;
mod vcpu;
mod vcpu_services;

use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use hypercall_abi::memory::E820Entry;
use hypercall_abi::{DomId, Mfn, VcpuId};

pub use counts::{Count, Counts};
pub use crash::reason;
pub use error::DomainError;
pub use lifecycle::{MAX_VCPUS, NewDomain};
pub use registry::Registry;
pub use regs::*;
pub use vcpu::*;

use crate::access::{Rights, Verbs};
use crate::platform::Platform;
use crate::sync::{RankedMutex, rank};

/// Where a domain is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Life {
    /// Usable.
    Alive = 0,
    /// Being torn down: no new reference to its frames, ports or grants.
    Dying = 1,
    /// Torn down; only its number is still taken.
    Dead = 2,
}

/// Most entries of a memory map that is set for a domain. Fewer than Xen keeps: the room is there from the start, so that no
/// guest's call takes from the heap.
pub const MEMORY_MAP_ENTRIES: usize = 128;
/// A memory map that is set for a domain.
pub type DomainMemoryMap = arrayvec::ArrayVec<E820Entry, MEMORY_MAP_ENTRIES>;

/// A domain: an isolated guest with its memory, vCPUs, event channels and grants.
pub struct Domain {
    /// Its number.
    pub id: DomId,
    /// 16 bytes that the toolstack chose (a UUID).
    pub handle: [u8; 16],
    /// What it may do beside using its own resources.
    pub rights: RankedMutex<Rights, { rank::RIGHTS }>,
    /// Its virtual CPUs; the length is fixed at creation.
    pub vcpus: Box<[Vcpu]>,
    /// The frames it owns.
    pub pages: RankedMutex<crate::mm::PageList, { rank::PAGE_LIST }>,
    /// Its shared_info frame: the hypervisor's, shared with the domain.
    pub shared_info: Mfn,
    /// Event channels.
    pub events: RankedMutex<crate::evtchn::PortTable, { rank::EVENTS }>,
    /// Grant table and mappings.
    pub grants: RankedMutex<crate::grant::GrantTable, { rank::GRANTS }>,
    /// The memory map that somebody set for it; empty when nobody did.
    pub memory_map: RankedMutex<DomainMemoryMap, { rank::MEMORY_MAP }>,
    /// Index of PCI configuration space, as the domain set it.
    pub pci_index: AtomicU32,
    /// Index of the CMOS RAM, as the domain set it.
    pub cmos_index: AtomicU8,
    /// `vm_assist` types that are on, a bit each.
    pub vm_assist: AtomicU32,
    /// Times it was paused by the control interface; it runs only at 0.
    pub pauses: AtomicU32,
    /// At most so much of the CPUs.
    pub cap: crate::sched::DomainCap,
    /// CPU time that it gets before all others.
    pub guarantee: crate::sched::DomainGuarantee,
    /// Whether it shut down, and why (`shutdown_reason` is valid then).
    pub is_shut_down: AtomicBool,
    /// Reason given to `sched_op(shutdown)`.
    pub shutdown_reason: AtomicU32,
    /// Reason that a shutdown takes instead of its own, plus one (`SCHEDOP_shutdown_code`); 0 for none.
    shutdown_code: AtomicU32,
    /// Ends of the two watchdogs in nanoseconds since boot, 0 for off.
    pub watchdogs: [AtomicU64; 2],
    /// Where it wants to be told which of its interrupts need an end (`evtchn/irq.rs`).
    pub pirq_eoi: crate::evtchn::PirqEoiMap,
    life: AtomicU8,
    /// Test builds: whether everything it asks gets the same answer.
    #[cfg(any(feature = "constant-answers", test))]
    pub(crate) constant: crate::trap::constant_answers::Switch,
    /// Progress of its teardown (`Hypervisor::destroy_domain`).
    pub teardown: RankedMutex<crate::mm::Teardown, { rank::TEARDOWN }>,
}

/// What a new domain is made from.
pub struct DomainConfig {
    /// Its number.
    pub id: DomId,
    /// Chosen by the toolstack.
    pub handle: [u8; 16],
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// Most frames it may own.
    pub max_pages: u64,
    /// Rights beyond its own resources.
    pub rights: Rights,
    /// Frame for its shared_info.
    pub shared_info: Mfn,
}

impl Domain {
    /// A domain without memory, all vCPUs down, paused once.
    pub fn new<P: Platform>(config: DomainConfig, platform: &P) -> Domain {
        Domain {
            id: config.id,
            handle: config.handle,
            rights: RankedMutex::new(config.rights),
            vcpus: (0..config.vcpus).map(|i| Vcpu::new(VcpuId::new(i), platform)).collect(),
            pages: RankedMutex::new(crate::mm::PageList::new(config.max_pages)),
            shared_info: config.shared_info,
            events: RankedMutex::new(crate::evtchn::PortTable::new()),
            grants: RankedMutex::new(crate::grant::GrantTable::new()),
            memory_map: RankedMutex::new(DomainMemoryMap::new_const()),
            vm_assist: AtomicU32::new(0),
            pci_index: AtomicU32::new(0),
            cmos_index: AtomicU8::new(0),
            pauses: AtomicU32::new(1),
            cap: crate::sched::DomainCap::new(),
            guarantee: crate::sched::DomainGuarantee::new(),
            is_shut_down: AtomicBool::new(false),
            shutdown_reason: AtomicU32::new(0),
            shutdown_code: AtomicU32::new(0),
            watchdogs: [const { AtomicU64::new(0) }; 2],
            pirq_eoi: crate::evtchn::PirqEoiMap::default(),
            life: AtomicU8::new(Life::Alive as u8),
            #[cfg(any(feature = "constant-answers", test))]
            constant: Default::default(),
            teardown: RankedMutex::new(crate::mm::Teardown::new()),
        }
    }

    /// Whether it is the one that drives the machine: dom0.
    pub fn is_hardware_domain(&self) -> bool {
        self.rights.lock().verbs.contains(Verbs::PLATFORM)
    }

    /// Where it is in its life.
    pub fn life(&self) -> Life {
        match self.life.load(Ordering::SeqCst) {
            0 => Life::Alive,
            1 => Life::Dying,
            _ => Life::Dead,
        }
    }

    /// Moves it on in its life. It never goes back: an earlier stage than the present one is ignored.
    pub fn set_life(&self, life: Life) {
        self.life.fetch_max(life as u8, Ordering::SeqCst);
    }

    /// Sets the reason that its shutdown will have, whatever reason comes with it. The first call counts.
    pub fn set_shutdown_code(&self, reason: u32) {
        let _ = self.shutdown_code.compare_exchange(0, reason + 1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The reason set before, or this one.
    pub fn shutdown_code_or(&self, reason: u32) -> u32 {
        self.shutdown_code.load(Ordering::Acquire).checked_sub(1).unwrap_or(reason)
    }

    /// Whether its vCPUs may run now.
    pub fn may_run(&self) -> bool {
        self.is_on() && !self.cap.waits()
    }

    /// Whether its vCPUs may run at all; they may still have to wait for its cap.
    pub fn is_on(&self) -> bool {
        self.pauses.load(Ordering::SeqCst) == 0
            && !self.is_shut_down.load(Ordering::SeqCst)
            && self.life() == Life::Alive
    }
}

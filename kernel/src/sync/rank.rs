//! The lock order, lowest first. A lock may be taken only above all locks held.

/// Progress of a domain's teardown.
pub const TEARDOWN: u8 = 10;
/// State of a vCPU that is not running.
pub const VCPU_PARKED: u8 = 15;
/// Grant table of a domain; never two at once.
pub const GRANTS: u8 = 20;
/// Event channels of a domain.
pub const EVENTS: u8 = 30;
/// The second port table of a pair.
pub const EVENTS_SECOND: u8 = 31;
/// What a domain may do.
pub const RIGHTS: u8 = 40;
/// The memory map that was set for a domain.
pub const MEMORY_MAP: u8 = 45;
/// Table of all domains.
pub const REGISTRY: u8 = 50;
/// List of the frames a domain owns.
pub const PAGE_LIST: u8 = 60;
/// Free frames.
pub const FREE_FRAMES: u8 = 61;
/// The CPUs that vCPUs hold for themselves (`sched=null`).
pub const CLAIMS: u8 = 63;
/// An index port and its data port, which are used together.
pub const INDEXED_PORTS: u8 = 64;
/// Interrupt pins and who listens.
pub const IRQS: u8 = 65;
/// Timers of a CPU.
pub const TIMERS: u8 = 70;
/// Periodic timer of a vCPU.
pub const PERIODIC: u8 = 72;
/// Run queue of a CPU.
pub const RUN_QUEUE: u8 = 75;
/// Run-state accounting of a vCPU.
pub const RUNSTATE: u8 = 80;
/// What is left of a domain's cap.
pub const CAP: u8 = 85;
/// Console and log.
pub const CONSOLE: u8 = 90;

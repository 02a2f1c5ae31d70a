//! Scheduling: the arguments of `sched_op` (public/sched.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, GuestHandle, Port};

/// Argument of `shutdown` and `shutdown_code` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedShutdown {
    /// Number of a [`ShutdownReason`].
    pub reason: u32,
}

crate::subops::command_enum! {
    /// Why a domain shut down; the control domain decides what follows.
    ShutdownReason, "SHUTDOWN_" {
        /// It is done.
        Poweroff = 0, "poweroff";
        /// Start it anew.
        Reboot = 1, "reboot";
        /// Save it; the call returns 0 in the restored domain, 1 when nothing came of it.
        Suspend = 2, "suspend";
        /// It failed.
        Crash = 3, "crash";
        /// Its watchdog ran out.
        Watchdog = 4, "watchdog";
        /// Start it anew in place.
        SoftReset = 5, "soft_reset";
    }
}

/// Argument of `poll` (IN): sleeps until one of the ports is pending or the time has come. Upcalls stay as masked as they are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedPoll {
    /// The ports.
    pub ports: GuestHandle<Port>,
    /// How many.
    pub nr_ports: u32,
    /// Padding.
    pub pad0: u32,
    /// System time in ns; 0 for no limit.
    pub timeout: u64,
}

/// Most ports of a [`SchedPoll`].
pub const POLL_MAX_PORTS: u32 = 128;

/// Argument of `remote_shutdown` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedRemoteShutdown {
    /// Which domain.
    pub domain_id: DomId,
    /// Padding.
    pub pad0: u16,
    /// Number of a [`ShutdownReason`].
    pub reason: u32,
}

/// Argument of `watchdog` (IN): id 0 arms a new one, whose id (from 1) the call returns; otherwise pokes that one, or disarms it
/// with timeout 0. When one runs out the domain shuts down.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedWatchdog {
    /// Which.
    pub id: u32,
    /// Seconds from now.
    pub timeout: u32,
}

/// Argument of `pin_override` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SchedPinOverride {
    /// The CPU, or -1 to undo.
    pub pcpu: i32,
}

//! Names of things: domains, vCPUs, ports, grants, virtual interrupts.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        pub struct $name($inner);

        impl $name {
            /// Takes any number; whether it names anything is for the receiver to find out.
            pub const fn new(number: $inner) -> $name {
                $name(number)
            }
            /// The number.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A domain's number, or one of the special names from [`DomId::FIRST_RESERVED`] up (public/xen.h `domid_t`).
    DomId(u16)
}
id! {
    /// A vCPU's number in its domain.
    VcpuId(u32)
}
id! {
    /// An event channel port of a domain (public/event_channel.h `evtchn_port_t`).
    Port(u32)
}
id! {
    /// An index in a domain's grant table (public/grant_table.h `grant_ref_t`).
    GrantRef(u32)
}
id! {
    /// A virtual interrupt (public/xen.h `VIRQ_*`).
    Virq(u32)
}

impl DomId {
    /// The first domain.
    pub const ZERO: DomId = DomId(0);
    /// The first number that no real domain has.
    pub const FIRST_RESERVED: DomId = DomId(0x7ff0);
    /// The caller.
    pub const SELF: DomId = DomId(0x7ff0);
    /// Owner of machine memory that is not RAM.
    pub const IO: DomId = DomId(0x7ff1);
    /// Owner of the hypervisor's own memory.
    pub const XEN: DomId = DomId(0x7ff2);
    /// Owner of copy-on-write memory.
    pub const COW: DomId = DomId(0x7ff3);
    /// No domain.
    pub const INVALID: DomId = DomId(0x7ff4);
    /// The idle domain.
    pub const IDLE: DomId = DomId(0x7fff);
}

impl Virq {
    /// Timer of a vCPU.
    pub const TIMER: Virq = Virq(0);
    /// Debug request.
    pub const DEBUG: Virq = Virq(1);
    /// Input at the hypervisor's console (global).
    pub const CONSOLE: Virq = Virq(2);
    /// A domain shut down (global).
    pub const DOM_EXC: Virq = Virq(3);
    /// Trace buffer (global).
    pub const TBUF: Virq = Virq(4);
    /// Debugger (global).
    pub const DEBUGGER: Virq = Virq(6);
    /// Profiling.
    pub const XENOPROF: Virq = Virq(7);
    /// Console ring (global).
    pub const CON_RING: Virq = Virq(8);
    /// Physical CPU state (global).
    pub const PCPU_STATE: Virq = Virq(9);
    /// Memory events (global).
    pub const MEM_EVENT: Virq = Virq(10);
    /// Argo.
    pub const ARGO: Virq = Virq(11);
    /// Memory is low (global).
    pub const ENOMEM: Virq = Virq(12);
    /// Performance counters.
    pub const XENPMU: Virq = Virq(13);
    /// How many there are (`NR_VIRQS`).
    pub const COUNT: u32 = 24;
}

//! Event channels: the arguments of `event_channel_op` (public/event_channel.h). How bits are raised and seen is at
//! [`VcpuInfo`](crate::vcpu::VcpuInfo).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, Gfn, Port};

/// Argument of `alloc_unbound`: a port of `dom` that `remote_dom` may connect to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnAllocUnbound {
    /// IN: whose port.
    pub dom: DomId,
    /// IN: who may connect.
    pub remote_dom: DomId,
    /// OUT.
    pub port: Port,
}

/// Argument of `bind_interdomain`. The new port is pending at once, since the other side may have signalled before.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnBindInterdomain {
    /// IN: the other domain.
    pub remote_dom: DomId,
    /// Padding.
    pub pad0: u16,
    /// IN: its unbound port.
    pub remote_port: Port,
    /// OUT.
    pub local_port: Port,
}

/// Argument of `bind_virq`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnBindVirq {
    /// IN: the number of a [`Virq`](crate::Virq).
    pub virq: u32,
    /// IN: which vCPU.
    pub vcpu: u32,
    /// OUT.
    pub port: Port,
}

/// Flag of [`EvtchnBindPirq`]: others may share the interrupt.
pub const BIND_PIRQ_WILL_SHARE: u32 = 1;

/// Argument of `bind_pirq`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnBindPirq {
    /// IN: the physical interrupt.
    pub pirq: u32,
    /// IN: [`BIND_PIRQ_WILL_SHARE`] or 0.
    pub flags: u32,
    /// OUT.
    pub port: Port,
}

/// Argument of `bind_ipi`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnBindIpi {
    /// IN: which vCPU it interrupts.
    pub vcpu: u32,
    /// OUT.
    pub port: Port,
}

/// Argument of `close` (IN). The other end of an interdomain channel becomes unbound again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnClose {
    /// Which.
    pub port: Port,
}

/// Argument of `send` (IN). A send over an unbound port is lost without an error.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnSend {
    /// Which.
    pub port: Port,
}

/// Status of a port: not in use.
pub const EVTCHNSTAT_CLOSED: u32 = 0;
/// Waiting for a named domain.
pub const EVTCHNSTAT_UNBOUND: u32 = 1;
/// Connected.
pub const EVTCHNSTAT_INTERDOMAIN: u32 = 2;
/// A physical interrupt.
pub const EVTCHNSTAT_PIRQ: u32 = 3;
/// A virtual interrupt.
pub const EVTCHNSTAT_VIRQ: u32 = 4;
/// For the domain's own vCPUs.
pub const EVTCHNSTAT_IPI: u32 = 5;

/// Argument of `status`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnStatus {
    /// IN: whose port.
    pub dom: DomId,
    /// Padding.
    pub pad0: u16,
    /// IN: which.
    pub port: Port,
    /// OUT: `EVTCHNSTAT_*`.
    pub status: u32,
    /// OUT: the vCPU it interrupts.
    pub vcpu: u32,
    /// OUT: unbound and interdomain: the other domain in the low half. Physical and virtual interrupt: its number.
    pub u0: u32,
    /// OUT: interdomain: the other port.
    pub u1: u32,
}

impl EvtchnStatus {
    /// Notes the other domain of an unbound or connected port, and its port.
    pub const fn set_remote(&mut self, domain: DomId, port: Port) {
        self.u0 = domain.get() as u32;
        self.u1 = port.get();
    }

    /// The other domain.
    #[must_use]
    pub const fn remote_domain(&self) -> DomId {
        DomId::new(self.u0 as u16)
    }

    /// The other port.
    #[must_use]
    pub const fn remote_port(&self) -> Port {
        Port::new(self.u1)
    }
}

/// Argument of `bind_vcpu` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnBindVcpu {
    /// Which.
    pub port: Port,
    /// The vCPU it shall interrupt.
    pub vcpu: u32,
}

/// Argument of `unmask` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnUnmask {
    /// Which.
    pub port: Port,
}

/// Argument of `reset` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnReset {
    /// Whose ports.
    pub dom: DomId,
}

/// Argument of `init_control`: the FIFO's control block of a vCPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnInitControl {
    /// IN: its frame.
    pub control_gfn: Gfn,
    /// IN: offset in it, a multiple of 8.
    pub offset: u32,
    /// IN: the vCPU.
    pub vcpu: u32,
    /// OUT: bits of a link field.
    pub link_bits: u8,
    /// Padding.
    pub pad: [u8; 7],
}

/// Argument of `expand_array` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnExpandArray {
    /// The frame added.
    pub array_gfn: Gfn,
}

/// Argument of `set_priority` (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnSetPriority {
    /// Which.
    pub port: Port,
    /// 0 (first) to 15.
    pub priority: u32,
}

/// The first of the priorities.
pub const EVTCHN_FIFO_PRIORITY_MAX: u32 = 0;
/// Priority of a new event.
pub const EVTCHN_FIFO_PRIORITY_DEFAULT: u32 = 7;
/// The last of the priorities.
pub const EVTCHN_FIFO_PRIORITY_MIN: u32 = 15;
/// Queues, one for each priority.
pub const EVTCHN_FIFO_MAX_QUEUES: usize = 16;
/// Bit of an event word: pending.
pub const EVTCHN_FIFO_PENDING: u32 = 31;
/// Masked.
pub const EVTCHN_FIFO_MASKED: u32 = 30;
/// In a queue.
pub const EVTCHN_FIFO_LINKED: u32 = 29;
/// Being changed by the hypervisor.
pub const EVTCHN_FIFO_BUSY: u32 = 28;
/// Bits of the link to the next event.
pub const EVTCHN_FIFO_LINK_BITS: u32 = 17;
/// Mask of the link.
pub const EVTCHN_FIFO_LINK_MASK: u32 = (1 << EVTCHN_FIFO_LINK_BITS) - 1;
/// Most ports of the FIFO layout.
pub const EVTCHN_FIFO_NR_CHANNELS: u32 = 1 << EVTCHN_FIFO_LINK_BITS;

/// A vCPU's FIFO control block, in guest memory: written by the hypervisor when a queue gets its first event, by the guest
/// when it has emptied one; both with locked operations on `ready`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EvtchnFifoControlBlock {
    /// One bit for each queue that is not empty.
    pub ready: u32,
    /// Unused.
    pub rsvd: u32,
    /// The first event of each queue.
    pub head: [u32; EVTCHN_FIFO_MAX_QUEUES],
}

//! What a port is bound to, and its form in memory: one word.

use hypercall_abi::evtchn::{EVTCHN_FIFO_LINK_BITS, EVTCHN_FIFO_MAX_QUEUES, EVTCHN_FIFO_PRIORITY_DEFAULT};
use hypercall_abi::{DomId, Port, VcpuId, Virq};

use crate::domain::MAX_VCPUS;

/// What a port is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Nothing: free to be taken.
    Free,
    /// Nothing, and never will be: port 0.
    Reserved,
    /// Waits for `remote` to connect.
    Unbound {
        /// The only domain that may connect.
        remote: DomId,
    },
    /// Connected to a port of a domain, which may be the same domain.
    Interdomain {
        /// The peer.
        remote: DomId,
        /// Its port.
        port: Port,
    },
    /// A device's interrupts.
    Pirq {
        /// The number of the source, below [`PIRQS`](crate::access::PIRQS).
        number: u32,
    },
    /// A virtual interrupt.
    Virq {
        /// Which.
        virq: Virq,
    },
    /// Signals between the domain's own vCPUs.
    Ipi,
}

/// A FIFO queue: one of the sixteen of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Whose.
    pub vcpu: VcpuId,
    /// Which: 0 is looked at first, 15 last.
    pub priority: u8,
}

impl Queue {
    /// Where a port's events go that nobody prioritised, on vCPU 0.
    pub const DEFAULT: Queue = Queue { vcpu: VcpuId::new(0), priority: EVTCHN_FIFO_PRIORITY_DEFAULT as u8 };
}

/// A port: its state, the queue that its events go to, and what the FIFO form remembers of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is bound to.
    pub state: PortState,
    /// Who is told, and in the FIFO form how urgently.
    pub queue: Queue,
    /// The queue in which its latest event was put. It stays when the port is closed: the event may be in the queue still, or be
    /// what that queue remembers as its tail.
    pub last: Queue,
    /// An event came while the guest's event array did not reach to this port. It stays when the port is closed, as on Xen.
    pub held: bool,
}

const _: () = assert!(MAX_VCPUS <= 1 << 8);
const _: () = assert!(EVTCHN_FIFO_LINK_BITS == 17 && EVTCHN_FIFO_MAX_QUEUES == 16);

const VALUE_MASK: u64 = (1 << 17) - 1;
const DOMAIN_SHIFT: u32 = 17;
const QUEUE_SHIFT: u32 = 33;
const LAST_SHIFT: u32 = 45;
const QUEUE_MASK: u64 = (1 << 12) - 1;
const HELD: u64 = 1 << 57;
const KIND_SHIFT: u32 = 61;

/// 12 bits, 0 for [`Queue::DEFAULT`].
fn pack(queue: Queue) -> u64 {
    u64::from(queue.vcpu.get() & 0xff) << 4 | u64::from((queue.priority ^ Queue::DEFAULT.priority) & 15)
}

fn unpack(bits: u64) -> Queue {
    Queue {
        vcpu: VcpuId::new((bits >> 4 & 0xff) as u32),
        priority: (bits & 15) as u8 ^ Queue::DEFAULT.priority,
    }
}

impl Entry {
    /// A free port that never had an event. Its word is 0, as a fresh frame has it.
    pub const FREE: Entry =
        Entry { state: PortState::Free, queue: Queue::DEFAULT, last: Queue::DEFAULT, held: false };

    /// A port in `state` whose events go to `vcpu` at the default priority.
    pub const fn new(state: PortState, vcpu: VcpuId) -> Entry {
        Entry { state, queue: Queue { vcpu, ..Queue::DEFAULT }, ..Entry::FREE }
    }

    /// Whether it is bound to anything.
    pub const fn is_open(&self) -> bool {
        !matches!(self.state, PortState::Free | PortState::Reserved)
    }

    /// Who is told.
    pub const fn vcpu(&self) -> VcpuId {
        self.queue.vcpu
    }

    /// The word: bits 0-16 port, pin or virtual interrupt; 17-32 domain; 33-44 queue and 45-56 last queue, both as priority
    /// (exclusive-or the default one) and vCPU; 57 held; 61-63 kind.
    pub fn to_word(self) -> u64 {
        let (kind, domain, value) = match self.state {
            PortState::Free => (0, 0, 0),
            PortState::Reserved => (1, 0, 0),
            PortState::Unbound { remote } => (2, remote.get(), 0),
            PortState::Interdomain { remote, port } => (3, remote.get(), port.get()),
            PortState::Pirq { number } => (4, 0, number),
            PortState::Virq { virq } => (5, 0, virq.get()),
            PortState::Ipi => (6, 0, 0),
        };
        let held = if self.held { HELD } else { 0 };
        kind << KIND_SHIFT
            | held
            | pack(self.last) << LAST_SHIFT
            | pack(self.queue) << QUEUE_SHIFT
            | u64::from(domain) << DOMAIN_SHIFT
            | u64::from(value) & VALUE_MASK
    }

    /// Reads a word that [`Entry::to_word`] made. Inlined: hardly anybody looks at all of it.
    #[inline(always)]
    pub fn from_word(word: u64) -> Entry {
        let remote = DomId::new((word >> DOMAIN_SHIFT) as u16);
        let value = (word & VALUE_MASK) as u32;
        let state = match word >> KIND_SHIFT {
            0 => PortState::Free,
            2 => PortState::Unbound { remote },
            3 => PortState::Interdomain { remote, port: Port::new(value) },
            4 => PortState::Pirq { number: value },
            5 => PortState::Virq { virq: Virq::new(value) },
            6 => PortState::Ipi,
            _ => PortState::Reserved,
        };
        Entry {
            state,
            queue: unpack(word >> QUEUE_SHIFT & QUEUE_MASK),
            last: unpack(word >> LAST_SHIFT & QUEUE_MASK),
            held: word & HELD != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = PortState> {
        prop_oneof![
            Just(PortState::Free),
            Just(PortState::Reserved),
            any::<u16>().prop_map(|d| PortState::Unbound { remote: DomId::new(d) }),
            (any::<u16>(), 0u32..1 << 17)
                .prop_map(|(d, p)| PortState::Interdomain { remote: DomId::new(d), port: Port::new(p) }),
            (0u32..1 << 17).prop_map(|number| PortState::Pirq { number }),
            (0u32..24).prop_map(|v| PortState::Virq { virq: Virq::new(v) }),
            Just(PortState::Ipi),
        ]
    }

    fn queue() -> impl Strategy<Value = Queue> {
        (0..MAX_VCPUS, 0u8..16).prop_map(|(vcpu, priority)| Queue { vcpu: VcpuId::new(vcpu), priority })
    }

    proptest! {
        #[test]
        fn words_keep_everything(state in state(), queue in queue(), last in queue(), held in any::<bool>()) {
            let entry = Entry { state, queue, last, held };
            prop_assert_eq!(Entry::from_word(entry.to_word()), entry);
        }
    }

    #[test]
    fn a_fresh_frame_is_all_free() {
        assert_eq!(Entry::from_word(0), Entry::FREE);
        assert_eq!(Entry::FREE.to_word(), 0);
    }
}

//! What a port is bound to, and its form in memory: one word.

use hypercall_abi::{DomId, Port, VcpuId, Virq};

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
    /// An interrupt pin.
    Pirq {
        /// The pin, a global system interrupt.
        pin: u32,
    },
    /// A virtual interrupt.
    Virq {
        /// Which.
        virq: Virq,
    },
    /// Signals between the domain's own vCPUs.
    Ipi,
}

/// A port: its state and the vCPU that its events go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is bound to.
    pub state: PortState,
    /// Who is told.
    pub vcpu: VcpuId,
}

const KIND_SHIFT: u32 = 61;
const VCPU_SHIFT: u32 = 48;
const VCPU_MASK: u64 = (1 << 13) - 1;
const DOMAIN_SHIFT: u32 = 32;

impl Entry {
    /// A free port. Its word is 0, as a fresh frame has it.
    pub const FREE: Entry = Entry { state: PortState::Free, vcpu: VcpuId::new(0) };

    /// A port in `state` whose events go to `vcpu`.
    pub const fn new(state: PortState, vcpu: VcpuId) -> Entry {
        Entry { state, vcpu }
    }

    /// The word: bits 0-31 port, pin or virtual interrupt; 32-47 domain; 48-60 vCPU; 61-63 kind.
    pub fn to_word(self) -> u64 {
        let (kind, domain, value) = match self.state {
            PortState::Free => (0, 0, 0),
            PortState::Reserved => (1, 0, 0),
            PortState::Unbound { remote } => (2, remote.get(), 0),
            PortState::Interdomain { remote, port } => (3, remote.get(), port.get()),
            PortState::Pirq { pin } => (4, 0, pin),
            PortState::Virq { virq } => (5, 0, virq.get()),
            PortState::Ipi => (6, 0, 0),
        };
        kind << KIND_SHIFT
            | (u64::from(self.vcpu.get()) & VCPU_MASK) << VCPU_SHIFT
            | u64::from(domain) << DOMAIN_SHIFT
            | u64::from(value)
    }

    /// Reads a word that [`Entry::to_word`] made.
    pub fn from_word(word: u64) -> Entry {
        let remote = DomId::new((word >> DOMAIN_SHIFT) as u16);
        let value = word as u32;
        let state = match word >> KIND_SHIFT {
            0 => PortState::Free,
            2 => PortState::Unbound { remote },
            3 => PortState::Interdomain { remote, port: Port::new(value) },
            4 => PortState::Pirq { pin: value },
            5 => PortState::Virq { virq: Virq::new(value) },
            6 => PortState::Ipi,
            _ => PortState::Reserved,
        };
        Entry { state, vcpu: VcpuId::new((word >> VCPU_SHIFT & VCPU_MASK) as u32) }
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
            any::<(u16, u32)>()
                .prop_map(|(d, p)| PortState::Interdomain { remote: DomId::new(d), port: Port::new(p) }),
            any::<u32>().prop_map(|pin| PortState::Pirq { pin }),
            any::<u32>().prop_map(|v| PortState::Virq { virq: Virq::new(v) }),
            Just(PortState::Ipi),
        ]
    }

    proptest! {
        #[test]
        fn words_keep_everything(state in state(), vcpu in 0u32..8192) {
            let entry = Entry::new(state, VcpuId::new(vcpu));
            prop_assert_eq!(Entry::from_word(entry.to_word()), entry);
        }
    }

    #[test]
    fn a_fresh_frame_is_all_free() {
        assert_eq!(Entry::from_word(0), Entry::FREE);
        assert_eq!(Entry::FREE.to_word(), 0);
    }
}

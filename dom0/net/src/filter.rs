//! What a port may send and get: rules in order, the first that fits decides.
//!
//! Rules look at one packet at a time. Where a packet does not show what a rule asks about (a fragment without ports, a protocol that
//! is hidden behind an extension header), a rule that allows does not fit and one that denies does.

use crate::frame::Facts;
use alloc::vec::Vec;
use core::ops::RangeInclusive;
use smoltcp::wire::{EthernetProtocol, IpProtocol, Ipv4Cidr};

/// As the port's guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What it gets.
    In,
    /// What it sends.
    Out,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It passes.
    Allow,
    /// It is dropped.
    Deny,
}

/// A kind of packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Any of Ethernet.
    Any,
    /// ARP.
    Arp,
    /// Any of IPv4.
    Ipv4,
    /// Any of IPv6.
    Ipv6,
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// UDP over IPv4 or IPv6.
    Udp,
    /// ICMP of IPv4 or IPv6.
    Icmp,
}

/// A rule; what is `None` fits everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For packets that the guest gets, or sends.
    pub direction: Direction,
    /// What becomes of them.
    pub action: Action,
    /// Their kind.
    pub protocol: Protocol,
    /// IPv4 addresses of the other side.
    pub peer: Option<Ipv4Cidr>,
    /// TCP or UDP ports of the destination.
    pub ports: Option<RangeInclusive<u16>>,
}

/// How well a rule fits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fit {
    No,
    /// The packet does not show it.
    Hidden,
    Yes,
}

impl Rule {
    fn fits(&self, facts: &Facts) -> Fit {
        let transport = |v4, v6| match facts.transport {
            Some(protocol) if protocol == v4 || protocol == v6 => Fit::Yes,
            // Of a chain of headers, only the first is looked at.
            Some(
                IpProtocol::HopByHop | IpProtocol::Ipv6Route | IpProtocol::Ipv6Frag | IpProtocol::Ipv6Opts,
            ) => Fit::Hidden,
            _ => Fit::No,
        };
        let protocol = |wanted| if facts.protocol == wanted { Fit::Yes } else { Fit::No };
        let kind = match self.protocol {
            Protocol::Any => Fit::Yes,
            Protocol::Arp => protocol(EthernetProtocol::Arp),
            Protocol::Ipv4 => protocol(EthernetProtocol::Ipv4),
            Protocol::Ipv6 => protocol(EthernetProtocol::Ipv6),
            Protocol::Tcp => transport(IpProtocol::Tcp, IpProtocol::Tcp),
            Protocol::Udp => transport(IpProtocol::Udp, IpProtocol::Udp),
            Protocol::Icmp => transport(IpProtocol::Icmp, IpProtocol::Icmpv6),
        };
        let peer = match (&self.peer, facts.addresses) {
            (None, _) => Fit::Yes,
            (Some(_), None) => Fit::No,
            (Some(network), Some((source, destination))) => {
                let peer = if self.direction == Direction::In { source } else { destination };
                if network.contains_addr(&peer.into()) { Fit::Yes } else { Fit::No }
            }
        };
        let ports = match (&self.ports, facts.ports) {
            (None, _) => Fit::Yes,
            (Some(ports), Some((_, destination))) => {
                if ports.contains(&destination) {
                    Fit::Yes
                } else {
                    Fit::No
                }
            }
            // A fragment, or headers that are not looked through; anything else has no ports.
            (Some(_), None) => match (facts.transport, kind) {
                (Some(IpProtocol::Tcp | IpProtocol::Udp), _) | (_, Fit::Hidden) => Fit::Hidden,
                _ => Fit::No,
            },
        };
        let all = [kind, peer, ports];
        if all.contains(&Fit::No) {
            Fit::No
        } else if all.contains(&Fit::Hidden) {
            Fit::Hidden
        } else {
            Fit::Yes
        }
    }
}

/// Rules in order, and what becomes of packets that none of them fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The rules; the first that fits decides.
    pub rules: Vec<Rule>,
    /// For packets of this direction that no rule fits.
    pub otherwise_in: Action,
    /// For packets that the guest sends.
    pub otherwise_out: Action,
}

impl Default for Filter {
    /// Everything passes.
    fn default() -> Self {
        Self { rules: Vec::new(), otherwise_in: Action::Allow, otherwise_out: Action::Allow }
    }
}

impl Filter {
    /// Whether everything passes, so that there is nothing to look at.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.rules.is_empty() && self.otherwise_in == Action::Allow && self.otherwise_out == Action::Allow
    }

    /// Whether a frame passes, told by its head ([`HEAD`](crate::HEAD) bytes are enough). A malformed one does not.
    #[must_use]
    pub fn passes(&self, direction: Direction, head: &[u8]) -> bool {
        let Some(facts) = Facts::of(head) else { return false };
        let decided = self.rules.iter().filter(|rule| rule.direction == direction).find(|rule| {
            match rule.fits(&facts) {
                Fit::Yes => true,
                Fit::Hidden => rule.action == Action::Deny,
                Fit::No => false,
            }
        });
        let otherwise = if direction == Direction::In { self.otherwise_in } else { self.otherwise_out };
        decided.map_or(otherwise, |rule| rule.action) == Action::Allow
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Direction, Filter, Protocol, Rule};
    use alloc::vec;
    use alloc::vec::Vec;
    use smoltcp::wire::Ipv4Cidr;

    fn ipv4(protocol: u8, fragment: u16, options: usize, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45 + options as u8, 0, 0, 60, 0, 0]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, protocol, 0, 0, 10, 0, 0, 1, 192, 168, 7, 9]);
        frame.extend(vec![1; options * 4]);
        frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        frame
    }

    fn ipv6(next: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 4, next, 64]);
        frame.extend([7; 32]);
        frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        frame
    }

    fn rule(action: Action, protocol: Protocol) -> Rule {
        Rule { direction: Direction::Out, action, protocol, peer: None, ports: None }
    }

    fn only(rule: Rule) -> Filter {
        let otherwise = if rule.action == Action::Allow { Action::Deny } else { Action::Allow };
        Filter { rules: vec![rule], otherwise_in: otherwise, otherwise_out: otherwise }
    }

    #[test]
    fn rules_fit_what_they_say() {
        let web = Rule { ports: Some(80..=81), ..rule(Action::Allow, Protocol::Tcp) };
        let filter = only(web.clone());
        for options in [0, 10] {
            assert!(filter.passes(Direction::Out, &ipv4(6, 0x4000, options, [1000, 80])));
            assert!(!filter.passes(Direction::Out, &ipv4(6, 0, options, [80, 82])));
        }
        assert!(!filter.passes(Direction::Out, &ipv4(17, 0, 0, [1000, 80])), "UDP");
        assert!(!filter.passes(Direction::In, &ipv4(6, 0, 0, [1000, 80])), "the other direction");
        assert!(filter.passes(Direction::Out, &ipv6(6, [5, 81])));
        let peer: Ipv4Cidr = "192.168.7.0/24".parse().unwrap();
        let to = |peer| only(Rule { peer: Some(peer), ..web.clone() });
        assert!(to(peer).passes(Direction::Out, &ipv4(6, 0, 0, [1, 80])));
        assert!(!to("10.0.0.0/8".parse().unwrap()).passes(Direction::Out, &ipv4(6, 0, 0, [1, 80])));
        assert!(!to(peer).passes(Direction::Out, &ipv6(6, [1, 80])));
        let from = Rule { direction: Direction::In, peer: "10.0.0.0/8".parse().ok(), ..web };
        assert!(only(from).passes(Direction::In, &ipv4(6, 0, 0, [1, 80])));
    }

    #[test]
    fn what_is_hidden_is_not_allowed_and_is_denied() {
        let fragment = ipv4(6, 1, 0, [1000, 80]);
        let extension = ipv6(0, [0, 0]);
        for action in [Action::Allow, Action::Deny] {
            let tcp = only(rule(action, Protocol::Tcp));
            let web = only(Rule { ports: Some(80..=80), ..rule(action, Protocol::Tcp) });
            assert!(!web.passes(Direction::Out, &fragment), "{action:?}");
            assert_eq!(tcp.passes(Direction::Out, &fragment), action == Action::Allow, "it is TCP");
            for filter in [&tcp, &web] {
                assert!(!filter.passes(Direction::Out, &extension), "{action:?}");
            }
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let mut filter = only(rule(Action::Deny, Protocol::Udp));
        filter.rules.insert(0, Rule { ports: Some(53..=53), ..rule(Action::Allow, Protocol::Udp) });
        assert!(filter.passes(Direction::Out, &ipv4(17, 0, 0, [9, 53])));
        assert!(!filter.passes(Direction::Out, &ipv4(17, 0, 0, [9, 54])));
        assert!(filter.passes(Direction::Out, &ipv4(1, 0, 0, [9, 54])), "ICMP");
    }

    #[test]
    fn no_cut_frame_passes_or_panics() {
        for whole in [ipv4(6, 0, 3, [1, 2]), ipv6(17, [1, 2])] {
            for length in 0..whole.len() {
                let passes = Filter::default().passes(Direction::Out, &whole[..length]);
                assert_eq!(
                    passes,
                    length >= whole.len() - 4,
                    "{length}: ports may be missing, headers may not"
                );
            }
        }
        let mut lying = ipv4(6, 0, 0, [1, 2]);
        lying[14] = 0x44;
        assert!(!Filter::default().passes(Direction::Out, &lying), "a header of 16 bytes");
    }
}

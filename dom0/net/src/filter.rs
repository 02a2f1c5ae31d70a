//! What a port may send and get: rules in order, the first that fits decides.
//!
//! Rules look at one packet at a time. Where a packet does not show what a rule asks about (a fragment without ports, a protocol that
//! is hidden behind an extension header), a rule that allows does not fit and one that denies does.

use crate::frame::Facts;
use alloc::vec::Vec;
use core::fmt;
use core::ops::RangeInclusive;
use core::str::FromStr;
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

/// Why a text is no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleError;

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "write allow or deny, in or out, and what it is about: arp, ipv4, ipv6, icmp, tcp or udp, a port or ports behind those two, \
             and `with` an address or network; as in \"deny out tcp 25\" or \"allow in udp 53-60 with 10.0.0.0/8\"",
        )
    }
}

impl core::error::Error for RuleError {}

impl FromStr for Rule {
    type Err = RuleError;

    /// `allow|deny in|out [arp|ipv4|ipv6|icmp|tcp [PORT[-PORT]]|udp [PORT[-PORT]]] [with ADDRESS[/PREFIX]]`.
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let mut words = text.split_ascii_whitespace().peekable();
        let action = match words.next() {
            Some("allow") => Action::Allow,
            Some("deny") => Action::Deny,
            _ => return Err(RuleError),
        };
        let direction = match words.next() {
            Some("in") => Direction::In,
            Some("out") => Direction::Out,
            _ => return Err(RuleError),
        };
        let protocol = words.next_if(|word| *word != "with").unwrap_or("any");
        let protocol = match protocol {
            "any" => Protocol::Any,
            "arp" => Protocol::Arp,
            "ipv4" => Protocol::Ipv4,
            "ipv6" => Protocol::Ipv6,
            "icmp" => Protocol::Icmp,
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(RuleError),
        };
        let mut ports = None;
        if matches!(protocol, Protocol::Tcp | Protocol::Udp)
            && let Some(word) = words.next_if(|word| *word != "with")
        {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            let port = |text: &str| text.parse::<u16>().map_err(|_| RuleError);
            let range = port(first)?..=port(last)?;
            if range.is_empty() {
                return Err(RuleError);
            }
            ports = Some(range);
        }
        let peer = match words.next() {
            None => None,
            Some("with") => {
                let word = words.next().ok_or(RuleError)?;
                let network = word.parse().ok();
                let host = || word.parse().ok().map(|address| Ipv4Cidr::new(address, 32));
                Some(network.or_else(host).ok_or(RuleError)?)
            }
            Some(_) => return Err(RuleError),
        };
        if words.next().is_some() {
            return Err(RuleError);
        }
        Ok(Self { direction, action, protocol, peer, ports })
    }
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
    fn rules_are_written_in_words() {
        let rule = |action, direction, protocol, ports, peer: Option<&str>| Rule {
            direction,
            action,
            protocol,
            ports,
            peer: peer.map(|peer| peer.parse().unwrap()),
        };
        for (text, expected) in [
            ("deny out tcp 25", rule(Action::Deny, Direction::Out, Protocol::Tcp, Some(25..=25), None)),
            ("allow in", rule(Action::Allow, Direction::In, Protocol::Any, None, None)),
            (
                "allow in udp 53-60 with 10.0.0.0/8",
                rule(Action::Allow, Direction::In, Protocol::Udp, Some(53..=60), Some("10.0.0.0/8")),
            ),
            (
                "deny out with 10.1.2.3",
                rule(Action::Deny, Direction::Out, Protocol::Any, None, Some("10.1.2.3/32")),
            ),
            (
                " deny  in tcp with 1.0.0.0/8",
                rule(Action::Deny, Direction::In, Protocol::Tcp, None, Some("1.0.0.0/8")),
            ),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in [
            "",
            "allow",
            "permit in",
            "allow tcp",
            "allow in sctp",
            "allow in icmp 8",
            "allow in tcp 9-8",
            "deny in tcp 70000",
            "deny in tcp x",
            "deny in with",
            "deny in with 1.2.3",
            "deny in tcp 1 2",
            "deny in with 1.2.3.4 more",
        ] {
            assert_eq!(text.parse::<Rule>(), Err(super::RuleError), "{text}");
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

//! What a description says about network cards.
//!
//! ```toml
//! [[card]]
//! switch = "lan"             # cards of one switch reach each other; a switch is there as long as it has cards
//! mac = "00:16:3e:00:00:01"  # made from the guest's name if it is not said
//! isolated = true            # isolated cards do not reach each other, only those that are not
//! rate = "10M"               # bytes a second that it may send, in the long run
//! ip = "10.77.0.10"          # the address that its switch's router gives it, if it has one; any if it is not said
//! forward = ["8080 -> 80"]   # ports of the router's address outside that lead to the guest: TCP, or UDP as in "udp/53 -> 53"
//! rules = ["deny out tcp 25"] # what it may not send or get; the first one that fits decides
//! ```
//! In the shell the same is one word: `lan`, `lan:mac=00:16:3e:00:00:01`, `lan:isolated:rate=10M`, `lan:forward=8080->80`. Rules are set
//! by `card rules`.

use crate::switches;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;
use netswitch::{EthernetAddress, Filter, Ipv4Address, Rule, Transport};
use serde::Deserialize;

/// Most cards of a domain.
const MOST: usize = 16;
/// Keys of a `[[card]]`.
pub const KEYS: &[&str] = &["switch", "mac", "isolated", "rate", "ip", "forward", "rules"];
/// The first three bytes of addresses that Xen's guests have.
const XEN: [u8; 3] = [0x00, 0x16, 0x3e];

/// A port of the outside that leads to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortForward {
    /// TCP or UDP.
    pub transport: Transport,
    /// The port of the router's address outside.
    pub outside: u16,
    /// The guest's port.
    pub inside: u16,
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} -> {}", self.transport, self.outside, self.inside)
    }
}

impl FromStr for PortForward {
    type Err = String;

    /// `[tcp/|udp/]PORT -> PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let because = || format!("card: forward {text:?}: write \"8080 -> 80\", or \"udp/53 -> 53\" for UDP");
        let (outside, inside) = text.split_once("->").ok_or_else(because)?;
        let (transport, outside) = match outside.trim().split_once('/') {
            None => (Transport::Tcp, outside),
            Some(("tcp", port)) => (Transport::Tcp, port),
            Some(("udp", port)) => (Transport::Udp, port),
            Some(_) => return Err(because()),
        };
        let port = |text: &str| text.trim().parse().ok().filter(|port: &u16| *port != 0).ok_or_else(because);
        Ok(Self { transport, outside: port(outside)?, inside: port(inside)? })
    }
}

/// A card of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardSpec {
    /// The switch that it is on.
    pub switch: String,
    /// Its address, if somebody has said it.
    pub mac: Option<EthernetAddress>,
    /// It does not reach others that are isolated.
    pub isolated: bool,
    /// Bytes a second that it may send.
    pub rate: Option<u64>,
    /// The address that a router gives it, if somebody has said it.
    pub ip: Option<Ipv4Address>,
    /// Ports of the outside that lead to it.
    pub forwards: Vec<PortForward>,
    /// What it may send and get.
    pub filter: Filter,
}

/// A `[[card]]` as it is written.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    switch: Option<String>,
    mac: Option<String>,
    isolated: Option<bool>,
    rate: Option<String>,
    ip: Option<String>,
    #[serde(default)]
    forward: Vec<String>,
    #[serde(default)]
    rules: Vec<String>,
}

impl CardSpec {
    /// Judges what was written.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn new(raw: Raw) -> Result<Self, String> {
        let switch = raw.switch.ok_or("card: the key `switch` is missing, as in switch = \"lan\"")?;
        let mut card = Self::on(&switch)?;
        card.mac = raw.mac.as_deref().map(parse_mac).transpose()?;
        card.isolated = raw.isolated.unwrap_or(false);
        card.rate = raw.rate.as_deref().map(parse_rate).transpose()?;
        card.ip = raw.ip.as_deref().map(parse_ip).transpose()?;
        raw.forward.iter().try_for_each(|forward| card.forward(forward.parse()?))?;
        card.filter = parse_rules(&raw.rules)?;
        Ok(card)
    }

    /// Makes another port lead to the guest.
    fn forward(&mut self, forward: PortForward) -> Result<(), String> {
        let key = |forward: &PortForward| (forward.transport, forward.outside);
        if self.forwards.iter().any(|other| key(other) == key(&forward)) {
            return Err(format!("card: {} port {} is forwarded twice", forward.transport, forward.outside));
        }
        self.forwards.push(forward);
        Ok(())
    }

    /// Reads the form of one word.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn parse(word: &str) -> Result<Self, String> {
        let (switch, mut rest) = word.split_once(':').unwrap_or((word, ""));
        let mut card = Self::on(switch)?;
        while !rest.is_empty() {
            let (item, left) = match rest.strip_prefix("mac=") {
                // It has colons of its own.
                Some(mac) if mac.len() > 17 => rest.split_at_checked(21).unwrap_or((rest, "")),
                Some(_) => (rest, ""),
                None => rest.split_once(':').map_or((rest, ""), |(item, left)| (item, left)),
            };
            rest = left.strip_prefix(':').unwrap_or(left);
            match item.split_once('=') {
                Some(("mac", mac)) => card.mac = Some(parse_mac(mac)?),
                Some(("rate", rate)) => card.rate = Some(parse_rate(rate)?),
                Some(("ip", ip)) => card.ip = Some(parse_ip(ip)?),
                Some(("forward", forward)) => card.forward(forward.parse()?)?,
                None if item == "isolated" => card.isolated = true,
                _ => {
                    return Err(format!(
                        "{word:?} is no card: write SWITCH, and :mac=ADDRESS, :isolated, :rate=BYTES, :ip=ADDRESS or \
                         :forward=PORT->PORT behind it"
                    ));
                }
            }
        }
        Ok(card)
    }

    fn on(switch: &str) -> Result<Self, String> {
        switches::check_name(switch).map_err(|error| format!("card: {error}"))?;
        Ok(Self::on_switch(switch))
    }

    /// A card on a switch, about which nothing else is said.
    #[must_use]
    pub fn on_switch(switch: &str) -> Self {
        Self {
            switch: switch.to_string(),
            mac: None,
            isolated: false,
            rate: None,
            ip: None,
            forwards: Vec::new(),
            filter: Filter::default(),
        }
    }

    /// The card's address: the one that was said, or one that a guest of this name always gets for its card of this number.
    #[must_use]
    pub fn address(&self, guest: &str, number: u32) -> EthernetAddress {
        self.mac.unwrap_or_else(|| {
            // FNV-1a: enough to tell names apart, and the same in every run.
            let bytes = guest.bytes().chain(number.to_le_bytes());
            let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            });
            let [a, b, c, d, e, f, ..] = hash.to_le_bytes();
            let [first, second, third] = XEN;
            EthernetAddress([first, second, third, (a ^ d) & 0x7f, b ^ e, c ^ f])
        })
    }
}

/// An address as descriptions and guests write it.
#[must_use]
pub fn mac_text(address: EthernetAddress) -> String {
    let bytes: Vec<String> = address.0.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

fn parse_mac(text: &str) -> Result<EthernetAddress, String> {
    let because = || format!("card: {text:?} is no MAC address: write it as in 00:16:3e:00:00:01");
    let mut bytes = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(because)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| because())?;
    }
    let address = EthernetAddress(bytes);
    if parts.next().is_some() {
        return Err(because());
    }
    if !address.is_unicast() || bytes == [0; 6] {
        return Err(format!(
            "card: {text} is no card's address: its first byte is even, and it is not all zero"
        ));
    }
    Ok(address)
}

fn parse_ip(text: &str) -> Result<Ipv4Address, String> {
    text.parse().map_err(|_| format!("card: {text:?} is no IPv4 address: write it as in 10.77.0.10"))
}

/// Reads rules, in order.
///
/// # Errors
/// Which is none, and what to write.
pub fn parse_rules(rules: &[impl AsRef<str>]) -> Result<Filter, String> {
    let parse =
        |rule: &str| rule.parse::<Rule>().map_err(|error| format!("card: {rule:?} is no rule: {error}"));
    let rules = rules.iter().map(|rule| parse(rule.as_ref())).collect::<Result<_, _>>()?;
    Ok(Filter { rules, ..Filter::default() })
}

fn parse_rate(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shown = || format!("card: rate {text:?}: write bytes a second, as in \"10M\"");
    let number: u64 = digits.parse().ok().filter(|number| *number > 0).ok_or_else(shown)?;
    let shift = match text.get(digits.len()..) {
        Some("") => 0,
        Some("K") => 10,
        Some("M") => 20,
        Some("G") => 30,
        _ => return Err(shown()),
    };
    number.checked_mul(1 << shift).ok_or_else(shown)
}

/// Adds a card to others of the same domain.
///
/// # Errors
/// When there is one of that address, or too many.
pub fn add(cards: &mut Vec<CardSpec>, card: CardSpec) -> Result<(), String> {
    if let Some(mac) = card.mac.filter(|mac| cards.iter().any(|other| other.mac == Some(*mac))) {
        return Err(format!("card: there are two with the address {}", mac_text(mac)));
    }
    for other in cards.iter().filter(|other| other.switch == card.switch) {
        let key = |forward: &PortForward| (forward.transport, forward.outside);
        if let Some(twice) =
            card.forwards.iter().find(|new| other.forwards.iter().any(|old| key(old) == key(new)))
        {
            return Err(format!("card: {} port {} is forwarded twice", twice.transport, twice.outside));
        }
    }
    if cards.len() >= MOST {
        return Err(format!("card: a domain has {MOST} at most"));
    }
    cards.push(card);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CardSpec, MOST, PortForward, add, parse_rules};
    use alloc::string::ToString;
    use alloc::vec::Vec;
    use netswitch::{EthernetAddress, Filter, Transport};

    const MAC: EthernetAddress = EthernetAddress([0, 0x16, 0x3e, 0, 0, 0xa1]);

    #[test]
    fn a_card_is_one_word() {
        let card = |mac, isolated, rate| CardSpec {
            switch: "lan".to_string(),
            mac,
            isolated,
            rate,
            ip: None,
            forwards: Vec::new(),
            filter: Filter::default(),
        };
        for (word, expected) in [
            ("lan", card(None, false, None)),
            ("lan:isolated", card(None, true, None)),
            ("lan:mac=00:16:3e:00:00:A1", card(Some(MAC), false, None)),
            ("lan:mac=00-16-3e-00-00-a1:isolated", card(Some(MAC), true, None)),
            ("lan:rate=10M:mac=00:16:3e:00:00:a1:isolated", card(Some(MAC), true, Some(10 << 20))),
        ] {
            assert_eq!(CardSpec::parse(word), Ok(expected), "{word}");
        }
        for (word, message) in [
            ("", "card: \"\" is no name of a switch"),
            ("my lan", "card: \"my lan\" is no name"),
            ("lan:fast", "\"lan:fast\" is no card: write SWITCH"),
            ("lan:mac=1", "card: \"1\" is no MAC address"),
            ("lan:mac=00:16:3e:00:00:0x", "card: \"00:16:3e:00:00:0x\" is no MAC address"),
            ("lan:mac=00:16:3e:00:00:01:02", "\"lan:mac=00:16:3e:00:00:01:02\" is no card"),
            ("lan:mac=01:16:3e:00:00:01", "card: 01:16:3e:00:00:01 is no card's address"),
            ("lan:mac=00:00:00:00:00:00", "card: 00:00:00:00:00:00 is no card's"),
            ("lan:rate=0", "card: rate \"0\""),
            ("lan:rate=1T", "card: rate \"1T\""),
            ("lan:rate=99999999999G", "card: rate \"99999999999G\""),
            ("lan:ip=10.0.0", "card: \"10.0.0\" is no IPv4 address"),
            ("lan:forward=80", "card: forward \"80\": write"),
            ("lan:forward=80->0", "card: forward \"80->0\": write"),
            ("lan:forward=70000->80", "card: forward \"70000->80\": write"),
            ("lan:forward=sctp/80->80", "card: forward \"sctp/80->80\": write"),
            ("lan:forward=80->80:forward=80->81", "card: tcp port 80 is forwarded twice"),
        ] {
            let error = CardSpec::parse(word).unwrap_err();
            assert!(error.starts_with(message), "{word}: {error}");
        }
    }

    #[test]
    fn ports_lead_to_a_guest() {
        let card = CardSpec::parse("lan:ip=10.77.0.9:forward=8080->80:forward=udp/53->5353").unwrap();
        let forward = |transport, outside, inside| PortForward { transport, outside, inside };
        assert_eq!(card.forwards, [forward(Transport::Tcp, 8080, 80), forward(Transport::Udp, 53, 5353)]);
        assert_eq!(card.ip, "10.77.0.9".parse().ok());
        assert_eq!(" tcp/1 -> 2 ".parse(), Ok(forward(Transport::Tcp, 1, 2)));
        assert_eq!(card.forwards[0].to_string(), "tcp/8080 -> 80");
        // Twice in one domain, on one switch.
        let mut cards = Vec::from([card]);
        let error = add(&mut cards, CardSpec::parse("lan:forward=8080->81").unwrap()).unwrap_err();
        assert_eq!(error, "card: tcp port 8080 is forwarded twice");
        add(&mut cards, CardSpec::parse("other:forward=8080->81").unwrap()).unwrap();
        add(&mut cards, CardSpec::parse("lan:forward=udp/8080->81").unwrap()).unwrap();
    }

    #[test]
    fn rules_are_read_in_order() {
        let filter = parse_rules(&["deny out tcp 25", "allow in"]).unwrap();
        assert_eq!(filter.rules.len(), 2);
        let error = parse_rules(&["deny out tcp 25", "drop all"]).unwrap_err();
        assert!(error.starts_with("card: \"drop all\" is no rule: write allow or deny"), "{error}");
    }

    #[test]
    fn a_guests_card_keeps_its_address() {
        let card = CardSpec::parse("lan").unwrap();
        let address = card.address("web", 0);
        assert!(address.is_unicast() && address == card.address("web", 0));
        assert!(address != card.address("web", 1) && address != card.address("db", 0));
        assert_eq!(CardSpec { mac: Some(MAC), ..card }.address("web", 0), MAC);
    }

    #[test]
    fn no_two_cards_of_a_domain_are_one() {
        let mut cards = Vec::new();
        let card = CardSpec::parse("lan:mac=00:16:3e:00:00:a1").unwrap();
        add(&mut cards, card.clone()).unwrap();
        assert!(add(&mut cards, card).unwrap_err().contains("two with the address 00:16:3e:00:00:a1"));
        for _ in 1..MOST {
            add(&mut cards, CardSpec::parse("lan").unwrap()).unwrap();
        }
        assert!(add(&mut cards, CardSpec::parse("lan").unwrap()).unwrap_err().contains("16 at most"));
    }
}

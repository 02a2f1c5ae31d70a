//! What `etc/network.toml` says about switches.
//!
//! ```toml
//! [[switch]]
//! name = "lan"
//! kind = "nat"               # or "bridge": its cards are on the network outside; or "internal": they reach each other only
//! address = "10.77.0.1/24"   # nat: the router's own address among the guests, and their network
//! device = "net0"            # nat and bridge: the machine's network card; the first one if it is not said
//! uplink = "dhcp"            # nat: the router's address outside, as in "192.168.1.9/24"; then gateway and dns are addresses, too
//! ```
//! A switch that is not described is internal, and there as long as it has cards.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use netswitch::{Ipv4Address, Ipv4Cidr, Outside};
use serde::Deserialize;

/// A switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchSpec {
    /// As descriptions of guests call it.
    pub name: String,
    /// What it leads to.
    pub kind: Kind,
    /// The machine's card that it uses; the first one if nobody has said.
    pub device: Option<String>,
}

/// What a switch leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing but its own cards.
    Internal,
    /// The network outside: its cards are part of that.
    Bridge,
    /// The network outside, behind a router.
    Nat {
        /// The router's address among the guests.
        inside: Ipv4Cidr,
        /// Its place outside; by DHCP if nobody has said.
        outside: Option<Outside>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    switch: Vec<RawSwitch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSwitch {
    name: String,
    kind: String,
    address: Option<String>,
    device: Option<String>,
    uplink: Option<String>,
    gateway: Option<String>,
    dns: Option<String>,
}

/// Whether a switch may be called so.
///
/// # Errors
/// What to say.
pub fn check_name(name: &str) -> Result<(), String> {
    let right = !name.is_empty()
        && name.len() <= 32
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if right {
        Ok(())
    } else {
        Err(format!("{name:?} is no name of a switch: letters, digits, - and _, up to 32"))
    }
}

impl RawSwitch {
    fn judge(self) -> Result<SwitchSpec, String> {
        let name = self.name;
        check_name(&name)?;
        let address = |key: &str, text: &Option<String>| {
            text.as_deref()
                .map(|text| {
                    let why =
                        || format!("switch {name}: {key} {text:?} is no IPv4 address, as in 192.168.1.1");
                    text.parse::<Ipv4Address>().map_err(|_| why())
                })
                .transpose()
        };
        let network = |key: &str, text: &str| {
            let why = |_| {
                format!("switch {name}: {key} {text:?} is no address with its network, as in 10.77.0.1/24")
            };
            text.parse::<Ipv4Cidr>().map_err(why)
        };
        let nat_only = [
            ("address", &self.address),
            ("uplink", &self.uplink),
            ("gateway", &self.gateway),
            ("dns", &self.dns),
        ];
        let extra = nat_only.iter().find(|(_, value)| value.is_some()).map(|(key, _)| *key);
        let refuse = |key: &str, kind: &str| {
            Err(format!("switch {name}: `{key}` says nothing of a switch of kind {kind}"))
        };
        let kind = match (self.kind.as_str(), extra) {
            ("internal", None) if self.device.is_none() => Kind::Internal,
            ("internal", extra) => return refuse(extra.unwrap_or("device"), "internal"),
            ("bridge", None) => Kind::Bridge,
            ("bridge", Some(extra)) => return refuse(extra, "bridge"),
            ("nat", _) => {
                let wanted =
                    || format!("switch {name}: `address` is missing, as in address = \"10.77.0.1/24\"");
                let inside = network("address", &self.address.ok_or_else(wanted)?)?;
                let at_edge =
                    [Some(inside.network().address()), inside.broadcast()].contains(&Some(inside.address()));
                if !(8..=30).contains(&inside.prefix_len()) || at_edge {
                    return Err(format!(
                        "switch {name}: {inside} is no router's address: it needs a network of /8 to /30, and neither its first nor its \
                         last address"
                    ));
                }
                let (gateway, dns) = (address("gateway", &self.gateway)?, address("dns", &self.dns)?);
                let outside = match self.uplink.as_deref() {
                    None | Some("dhcp") if gateway.is_none() && dns.is_none() => None,
                    None | Some("dhcp") => {
                        return Err(format!(
                            "switch {name}: gateway and dns come by DHCP, unless uplink is an address"
                        ));
                    }
                    Some(text) => Some(Outside { address: network("uplink", text)?, gateway, dns }),
                };
                Kind::Nat { inside, outside }
            }
            (kind, _) => return Err(format!("switch {name}: {kind:?} is no kind: internal, bridge or nat")),
        };
        Ok(SwitchSpec { name, kind, device: self.device })
    }
}

/// Reads the description of the switches.
///
/// # Errors
/// What is wrong, and what to do.
pub fn parse(bytes: &[u8]) -> Result<Vec<SwitchSpec>, String> {
    let text = core::str::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_string())?;
    let raw: Raw = toml::from_str(text).map_err(|error| {
        let line =
            error.span().map(|span| 1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count());
        let message = error.message().lines().collect::<Vec<_>>().join(": ");
        line.map_or(message.clone(), |line| format!("line {line}: {message}"))
    })?;
    let mut switches: Vec<SwitchSpec> = Vec::new();
    for raw in raw.switch {
        let new = raw.judge()?;
        if switches.iter().any(|other| other.name == new.name) {
            return Err(format!("there are two switches {}", new.name));
        }
        if let Some(other) = switches.iter().find(|other| other.conflicts(&new)) {
            return Err(format!("switches {} and {}: {}", other.name, new.name, other.conflict(&new)));
        }
        switches.push(new);
    }
    Ok(switches)
}

impl SwitchSpec {
    /// Whether two cannot be there at the same time.
    fn conflicts(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Bridge, Kind::Bridge) => self.device == other.device,
            (Kind::Nat { inside: one, .. }, Kind::Nat { inside: two, .. }) => {
                one.network().contains_subnet(&two.network()) || two.network().contains_subnet(&one.network())
            }
            _ => false,
        }
    }

    fn conflict(&self, _: &Self) -> &'static str {
        if self.kind == Kind::Bridge {
            "a network card is on one bridge only"
        } else {
            "their networks overlap"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, SwitchSpec, parse};
    use alloc::string::ToString;
    use netswitch::Outside;

    #[test]
    fn switches_are_described() {
        let text = "[[switch]]\nname='lan'\nkind='nat'\naddress='10.77.0.1/24'\n\
                    [[switch]]\nname='out'\nkind='bridge'\ndevice='net1'\n\
                    [[switch]]\nname='quiet'\nkind='internal'\n\
                    [[switch]]\nname='fixed'\nkind='nat'\naddress='10.78.0.1/24'\nuplink='192.168.1.9/24'\ngateway='192.168.1.1'\n";
        let switch = |name: &str, kind, device: Option<&str>| SwitchSpec {
            name: name.to_string(),
            kind,
            device: device.map(ToString::to_string),
        };
        let outside = Outside {
            address: "192.168.1.9/24".parse().unwrap(),
            gateway: "192.168.1.1".parse().ok(),
            dns: None,
        };
        let nat = |inside: &str, outside| Kind::Nat { inside: inside.parse().unwrap(), outside };
        let expected = [
            switch("lan", nat("10.77.0.1/24", None), None),
            switch("out", Kind::Bridge, Some("net1")),
            switch("quiet", Kind::Internal, None),
            switch("fixed", nat("10.78.0.1/24", Some(outside)), None),
        ];
        assert_eq!(parse(text.as_bytes()).as_deref(), Ok(&expected[..]));
        assert_eq!(parse(b"").as_deref(), Ok(&[][..]));
    }

    #[test]
    fn mistakes_are_explained() {
        let lan = "[[switch]]\nname='lan'\nkind='nat'\naddress='10.77.0.1/24'\n";
        for (text, message) in [
            ("[[switch]]\nname='lan'\n", "line 1: missing field `kind`"),
            ("[[switch]]\nname='lan'\nkind='nat'\ncolour='red'\n", "line 4: unknown field `colour`"),
            ("[[switch]]\nname='my lan'\nkind='nat'\n", "\"my lan\" is no name of a switch"),
            (
                "[[switch]]\nname='lan'\nkind='hub'\n",
                "switch lan: \"hub\" is no kind: internal, bridge or nat",
            ),
            ("[[switch]]\nname='lan'\nkind='nat'\n", "switch lan: `address` is missing"),
            (&lan.replace("/24", ""), "switch lan: address \"10.77.0.1\" is no address with its network"),
            (&lan.replace(".1/24", ".0/24"), "switch lan: 10.77.0.0/24 is no router's address"),
            (&lan.replace(".1/24", ".255/24"), "switch lan: 10.77.0.255/24 is no router's address"),
            (&lan.replace("/24", "/31"), "switch lan: 10.77.0.1/31 is no router's address"),
            (&lan.replace("nat", "bridge"), "switch lan: `address` says nothing of a switch of kind bridge"),
            ("[[switch]]\nname='a'\nkind='internal'\ndevice='net0'\n", "switch a: `device` says nothing"),
            (&(lan.to_string() + "gateway='1.2.3.4'\n"), "switch lan: gateway and dns come by DHCP"),
            (
                &(lan.to_string() + "uplink='1.2.3.4/8'\ndns='x'\n"),
                "switch lan: dns \"x\" is no IPv4 address",
            ),
            (&lan.repeat(2), "there are two switches lan"),
            (
                &(lan.to_string() + &lan.replace("lan", "two").replace("/24", "/16")),
                "switches lan and two: their networks overlap",
            ),
            (
                "[[switch]]\nname='a'\nkind='bridge'\n[[switch]]\nname='b'\nkind='bridge'\n",
                "switches a and b: a network card is on one bridge only",
            ),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
        }
        assert_eq!(parse(b"\xff").unwrap_err(), "it is not UTF-8 text");
    }
}

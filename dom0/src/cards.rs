//! What a description says about network cards.
//!
//! ```toml
//! [[card]]
//! switch = "lan"             # cards of one switch reach each other; a switch is there as long as it has cards
//! mac = "00:16:3e:00:00:01"  # made from the guest's name if it is not said
//! isolated = true            # isolated cards do not reach each other, only those that are not
//! rate = "10M"               # bytes a second that it may send, in the long run
//! ```
//! In the shell the same is one word: `lan`, `lan:mac=00:16:3e:00:00:01`, `lan:isolated:rate=10M`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use netswitch::EthernetAddress;
use serde::Deserialize;

/// Most cards of a domain.
const MOST: usize = 16;
/// Keys of a `[[card]]`.
pub const KEYS: &[&str] = &["switch", "mac", "isolated", "rate"];
/// The first three bytes of addresses that Xen's guests have.
const XEN: [u8; 3] = [0x00, 0x16, 0x3e];

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
}

/// A `[[card]]` as it is written.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    switch: Option<String>,
    mac: Option<String>,
    isolated: Option<bool>,
    rate: Option<String>,
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
        Ok(card)
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
                None if item == "isolated" => card.isolated = true,
                _ => {
                    return Err(format!(
                        "{word:?} is no card: write SWITCH, and :mac=ADDRESS, :isolated or :rate=BYTES behind it"
                    ));
                }
            }
        }
        Ok(card)
    }

    fn on(switch: &str) -> Result<Self, String> {
        let right = !switch.is_empty()
            && switch.len() <= 32
            && switch.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        if !right {
            return Err(format!(
                "card: {switch:?} is no name of a switch: letters, digits, - and _, up to 32"
            ));
        }
        Ok(Self { switch: switch.to_string(), mac: None, isolated: false, rate: None })
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
        return Err(format!("card: there are two with the address {mac}"));
    }
    if cards.len() >= MOST {
        return Err(format!("card: a domain has {MOST} at most"));
    }
    cards.push(card);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CardSpec, MOST, add};
    use alloc::string::ToString;
    use alloc::vec::Vec;
    use netswitch::EthernetAddress;

    const MAC: EthernetAddress = EthernetAddress([0, 0x16, 0x3e, 0, 0, 0xa1]);

    #[test]
    fn a_card_is_one_word() {
        let card = |mac, isolated, rate| CardSpec { switch: "lan".to_string(), mac, isolated, rate };
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
        ] {
            let error = CardSpec::parse(word).unwrap_err();
            assert!(error.starts_with(message), "{word}: {error}");
        }
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
        assert!(add(&mut cards, card).unwrap_err().contains("two with the address 00-16-3e-00-00-a1"));
        for _ in 1..MOST {
            add(&mut cards, CardSpec::parse("lan").unwrap()).unwrap();
        }
        assert!(add(&mut cards, CardSpec::parse("lan").unwrap()).unwrap_err().contains("16 at most"));
    }
}

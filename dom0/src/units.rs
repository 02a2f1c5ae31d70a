//! Numbers with units, as people write and read them.

use alloc::format;
use alloc::string::String;
use core::fmt;

/// Bytes in a page.
pub const PAGE: u64 = hypercall_abi::PAGE_SIZE as u64;

/// An amount of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(u64);

/// Why a text is no amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadSize {
    /// Not a whole number with one of the units.
    Syntax,
    /// Not a whole number of pages.
    NotPages,
    /// More than 64 bits can say.
    TooLarge,
}

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Syntax => "write a whole number and a unit: \"512K\", \"16M\" or \"1G\"",
            Self::NotPages => "memory comes in pages: make it a multiple of 4K",
            Self::TooLarge => "that is more than 64-bit addresses can reach",
        })
    }
}

impl Bytes {
    /// Reads "512K", "16M", "1G"; the unit is needed.
    ///
    /// # Errors
    /// [`BadSize`].
    pub fn parse(text: &str) -> Result<Self, BadSize> {
        let shift = match text.as_bytes().last() {
            Some(b'K' | b'k') => 10,
            Some(b'M' | b'm') => 20,
            Some(b'G' | b'g') => 30,
            _ => return Err(BadSize::Syntax),
        };
        // The unit is one ASCII letter.
        let digits = text.get(..text.len() - 1).unwrap_or("");
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(BadSize::Syntax);
        }
        let number: u64 = digits.parse().map_err(|_| BadSize::TooLarge)?;
        let bytes = number.checked_mul(1 << shift).ok_or(BadSize::TooLarge)?;
        if bytes.is_multiple_of(PAGE) { Ok(Self(bytes)) } else { Err(BadSize::NotPages) }
    }

    /// As many bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// As many pages.
    #[must_use]
    pub const fn of_pages(pages: u64) -> Self {
        Self(pages.saturating_mul(PAGE))
    }

    /// Whole pages in it.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.0 / PAGE
    }
}

impl fmt::Display for Bytes {
    /// The largest unit that leaves no more than one decimal behind: `512 KiB`, `127.9 MiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = if self.0 < 1 << 20 {
            format!("{} KiB", self.0 >> 10)
        } else {
            let (unit, shift) = if self.0 < 10 << 30 { ("MiB", 20) } else { ("GiB", 30) };
            let tenths = (u128::from(self.0) * 10) >> shift;
            match (tenths / 10, tenths % 10) {
                (whole, 0) => format!("{whole} {unit}"),
                (whole, tenth) => format!("{whole}.{tenth} {unit}"),
            }
        };
        f.pad(&text)
    }
}

/// A time span as `12.3s`, `4m05s` or `2h03m`.
#[must_use]
pub fn seconds(ns: u64) -> String {
    let tenths = ns / 100_000_000;
    match tenths / 10 {
        s @ 0..=99 => format!("{s}.{}s", tenths % 10),
        s @ 100..=5999 => format!("{}m{:02}s", s / 60, s % 60),
        s => format!("{}h{:02}m", s / 3600, s / 60 % 60),
    }
}

/// A time span as `12.3 ms`.
#[must_use]
pub fn millis(ns: u64) -> String {
    format!("{}.{} ms", ns / 1_000_000, ns / 100_000 % 10)
}

/// `"no guests"`, `"1 guest"`, `"2 guests"`.
#[must_use]
pub fn count(number: usize, thing: &str) -> String {
    match number {
        0 => format!("no {thing}s"),
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}

/// A set of CPUs as a list of numbers and ranges names it, as in `0,2-3`: a bit each.
///
/// # Errors
/// What is wrong with the list, for people.
pub fn cpu_set(list: &str) -> Result<u64, String> {
    let number = |text: &str| {
        let number: u32 = text.parse().map_err(|_| format!("{text:?} is no CPU number"))?;
        if number < 64 {
            Ok(number)
        } else {
            Err(format!("there are no more than 64 CPUs: {number} is too large"))
        }
    };
    let mut set = 0;
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{part}: the smaller number comes first"));
        }
        set |= u64::MAX >> (63 - (last - first)) << first;
    }
    Ok(set)
}

/// The set of the first `count` CPUs.
#[must_use]
pub fn cpu_bits(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The other way round: the CPUs of a set that are below `count`.
pub fn cpu_list(set: u64, count: u32) -> String {
    let there = |cpu: u32| cpu < count.min(64) && set >> cpu & 1 != 0;
    let mut list = String::new();
    let mut cpu = 0;
    while cpu < 64 {
        if there(cpu) {
            let mut last = cpu;
            while there(last + 1) {
                last += 1;
            }
            let comma = if list.is_empty() { "" } else { "," };
            list += &if last > cpu { format!("{comma}{cpu}-{last}") } else { format!("{comma}{cpu}") };
            cpu = last;
        }
        cpu += 1;
    }
    list
}

#[cfg(test)]
mod tests {
    use super::{BadSize, Bytes, count, cpu_list, cpu_set, millis, seconds};
    use alloc::string::ToString;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(Bytes::parse("4M").map(Bytes::pages), Ok(1024));
        assert_eq!(Bytes::parse("512k").map(Bytes::pages), Ok(128));
        for (text, error) in [
            ("", BadSize::Syntax),
            ("M", BadSize::Syntax),
            ("12", BadSize::Syntax),
            ("-4M", BadSize::Syntax),
            ("+4M", BadSize::Syntax),
            ("4.5M", BadSize::Syntax),
            ("4 M", BadSize::Syntax),
            ("5K", BadSize::NotPages),
            ("99999999999999999999G", BadSize::TooLarge),
            ("18446744073709551615K", BadSize::TooLarge),
        ] {
            assert_eq!(Bytes::parse(text), Err(error), "{text}");
        }
        for (pages, text) in
            [(1, "4 KiB"), (128, "512 KiB"), (256, "1 MiB"), (300, "1.1 MiB"), (1 << 22, "16 GiB")]
        {
            assert_eq!(Bytes::of_pages(pages).to_string(), text);
        }
        assert_eq!(alloc::format!("{:>9}", Bytes::of_pages(256)), "    1 MiB");
        assert_eq!(Bytes::of_pages(u64::MAX).pages(), u64::MAX / 4096);
    }

    #[test]
    fn times_and_counts() {
        assert_eq!(seconds(1_234_000_000), "1.2s");
        assert_eq!(seconds(245_000_000_000), "4m05s");
        assert_eq!(seconds(7_380_000_000_000), "2h03m");
        assert_eq!((millis(99_999).as_str(), millis(12_345_678).as_str()), ("0.0 ms", "12.3 ms"));
        assert_eq!((count(0, "guest").as_str(), count(1, "guest").as_str()), ("no guests", "1 guest"));
        assert_eq!(count(2, "guest"), "2 guests");
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(cpu_set("0,2-3"), Ok(0b1101));
        assert_eq!(cpu_set("0-63"), Ok(u64::MAX));
        assert_eq!(cpu_list(0b1101, 64), "0,2-3");
        assert_eq!(cpu_list(u64::MAX, 4), "0-3");
        assert_eq!(cpu_list(u64::MAX, 64), "0-63");
        assert_eq!(cpu_list(0, 4), "");
        for bad in ["", "x", "64", "3-1", "1-", "1,,2"] {
            assert!(cpu_set(bad).is_err(), "{bad:?}");
        }
    }
}

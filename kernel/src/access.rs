//! May this domain do that? One question, one place.
//!
//! Rights are sets that each domain has; no code asks whether a domain is dom0.
#![forbid(unsafe_code)]

use arrayvec::ArrayVec;

bitflags::bitflags! {
    /// What a domain may do to others and to the machine.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Verbs: u32 {
        /// Create, build, pause, destroy and inspect other domains, and map their memory.
        const CONTROL = 1 << 0;
        /// Stop the machine by shutting down (the hardware domain).
        const HARDWARE = 1 << 1;
        /// Write to and read from the hypervisor's console.
        const CONSOLE = 1 << 2;
        /// Read the machine's memory map and load firmware tables.
        const PLATFORM = 1 << 3;
    }
}

/// An inclusive range of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First.
    pub first: u64,
    /// Last.
    pub last: u64,
}

/// Most separate ranges of one kind that a domain may hold.
pub const MAX_RANGES: usize = 16;

/// A small set of inclusive ranges.
#[derive(Clone, Debug, Default)]
pub struct RangeSet(ArrayVec<Range, MAX_RANGES>);

impl RangeSet {
    /// The empty set.
    pub fn new() -> RangeSet {
        RangeSet::default()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of `first..=last` is in the set.
    pub fn contains(&self, first: u64, last: u64) -> bool {
        first <= last && self.0.iter().any(|r| r.first <= first && last <= r.last)
    }

    /// Adds a range, merging what touches it. Returns false when there is no room.
    pub fn insert(&mut self, first: u64, last: u64) -> bool {
        let mut merged = Range { first, last };
        let mut rest: ArrayVec<Range, MAX_RANGES> = ArrayVec::new();
        for r in &self.0 {
            if r.last.saturating_add(1) < merged.first || merged.last.saturating_add(1) < r.first {
                rest.push(*r);
            } else {
                merged = Range { first: merged.first.min(r.first), last: merged.last.max(r.last) };
            }
        }
        if rest.try_push(merged).is_err() {
            return false;
        }
        self.0 = rest;
        true
    }

    /// Takes a range out. Returns false, changing nothing, when the pieces left would not fit.
    pub fn remove(&mut self, first: u64, last: u64) -> bool {
        let mut rest: ArrayVec<Range, MAX_RANGES> = ArrayVec::new();
        for r in &self.0 {
            if r.first < first
                && rest.try_push(Range { first: r.first, last: r.last.min(first - 1) }).is_err()
            {
                return false;
            }
            if r.last > last && rest.try_push(Range { first: r.first.max(last + 1), last: r.last }).is_err() {
                return false;
            }
        }
        self.0 = rest;
        true
    }
}

/// Numbers of physical interrupts that a domain can have: those of pins, and behind them such as it asks for.
pub const PIRQS: u32 = 512;

/// A set of such numbers.
#[derive(Clone, Debug, Default)]
pub struct PirqSet([u64; PIRQS as usize / 64]);

impl PirqSet {
    /// Whether `pirq` is in it.
    pub fn contains(&self, pirq: u32) -> bool {
        self.0.get(pirq as usize / 64).is_some_and(|word| word >> (pirq % 64) & 1 != 0)
    }

    /// Puts `pirq` in; numbers past the last stay out.
    pub fn insert(&mut self, pirq: u32) {
        if let Some(word) = self.0.get_mut(pirq as usize / 64) {
            *word |= 1 << (pirq % 64);
        }
    }

    /// Takes `pirq` out. Whether it was in.
    pub fn remove(&mut self, pirq: u32) -> bool {
        let had = self.contains(pirq);
        if let Some(word) = self.0.get_mut(pirq as usize / 64) {
            *word &= !(1 << (pirq % 64));
        }
        had
    }
}

/// Everything a domain may do beside using its own resources.
#[derive(Clone, Debug, Default)]
pub struct Rights {
    /// Verbs of the control interface and the machine.
    pub verbs: Verbs,
    /// I/O ports.
    pub ports: RangeSet,
    /// Interrupt pins.
    pub irqs: RangeSet,
    /// How many message interrupts it may have at a time.
    pub messages: u32,
    /// Numbers of physical interrupts that it has mapped or reserved.
    pub pirqs: PirqSet,
    /// Machine frames that are not RAM.
    pub iomem: RangeSet,
}

impl Rights {
    /// No rights.
    pub fn none() -> Rights {
        Rights::default()
    }

    /// All verbs, messages, and every port, pin and I/O frame up to the given limits; what the hypervisor drives itself is taken out
    /// by the caller.
    pub fn all(pins: u32) -> Rights {
        let mut rights = Rights { verbs: Verbs::all(), messages: PIRQS, ..Rights::default() };
        rights.ports.insert(0, 0xffff);
        rights.irqs.insert(0, u64::from(pins.max(1)) - 1);
        rights.iomem.insert(0, (1 << 40) - 1);
        rights
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_and_split() {
        let mut set = RangeSet::new();
        assert!(set.insert(10, 20));
        assert!(set.insert(21, 30));
        assert!(set.contains(10, 30));
        assert!(set.remove(15, 16));
        assert!(set.contains(10, 14) && set.contains(17, 30) && !set.contains(14, 15));
        assert!(!set.contains(5, 4));
    }

    #[test]
    fn a_full_set_refuses_and_stays() {
        let mut set = RangeSet::new();
        for i in 0..MAX_RANGES as u64 {
            assert!(set.insert(i * 10, i * 10 + 5));
        }
        assert!(!set.insert(1000, 1001));
        assert!(!set.remove(2, 3));
        assert!(set.contains(0, 5));
    }
}

//! What a frame is used as: the kinds that exclude each other.

/// The use of a frame, as far as safety depends on it.
///
/// A frame has one kind at a time. It changes only while its type count is zero, so a frame is never a page table and
/// writable at once. Having any kind is compatible with any number of read-only mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Never used, or scrubbed and given out again.
    None = 0,
    /// Page table whose entries map frames.
    L1 = 1,
    /// Page table of L1 tables.
    L2 = 2,
    /// Page table of L2 tables.
    L3 = 3,
    /// Root page table.
    L4 = 4,
    /// Page of a GDT or LDT, every descriptor checked.
    SegDesc = 5,
    /// Mapped writable, or written by the hypervisor for its owner.
    Writable = 6,
    /// Shared copy-on-write between domains: reserved for cloning, never writable.
    Shared = 7,
}

impl Kind {
    pub(super) const fn from_bits(bits: u64) -> Kind {
        match bits & 7 {
            0 => Kind::None,
            1 => Kind::L1,
            2 => Kind::L2,
            3 => Kind::L3,
            4 => Kind::L4,
            5 => Kind::SegDesc,
            6 => Kind::Writable,
            _ => Kind::Shared,
        }
    }

    /// The level of the page table, `None` for what is no page table.
    pub const fn level(self) -> Option<Level> {
        match self {
            Kind::L1 => Some(Level::L1),
            Kind::L2 => Some(Level::L2),
            Kind::L3 => Some(Level::L3),
            Kind::L4 => Some(Level::L4),
            _ => None,
        }
    }

    /// Whether it is a page table.
    pub const fn is_table(self) -> bool {
        self.level().is_some()
    }

    /// Whether the content must be checked before the first reference of this kind counts.
    pub const fn needs_validation(self) -> bool {
        self.is_table() || matches!(self, Kind::SegDesc)
    }
}

/// Level of a page table, 1 next to the data and 4 at the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// Entries map frames.
    L1 = 1,
    /// Entries map 2 MiB through L1 tables.
    L2 = 2,
    /// Entries map 1 GiB through L2 tables.
    L3 = 3,
    /// Entries map 512 GiB through L3 tables.
    L4 = 4,
}

impl Level {
    /// The kind of a frame that is a table of this level.
    pub const fn kind(self) -> Kind {
        match self {
            Level::L1 => Kind::L1,
            Level::L2 => Kind::L2,
            Level::L3 => Kind::L3,
            Level::L4 => Kind::L4,
        }
    }

    /// The kind that entries of this level refer to; `None` for L1, whose entries map frames of any kind.
    pub const fn child(self) -> Option<Kind> {
        match self {
            Level::L1 => None,
            Level::L2 => Some(Kind::L1),
            Level::L3 => Some(Kind::L2),
            Level::L4 => Some(Kind::L3),
        }
    }

    /// Index of the entry that translates `va` at this level.
    pub const fn index(self, va: u64) -> usize {
        ((va >> (12 + 9 * (self as u8 as u64 - 1))) & 511) as usize
    }

    /// Level 1 to 4 by number.
    pub const fn from_number(number: u64) -> Option<Level> {
        match number {
            1 => Some(Level::L1),
            2 => Some(Level::L2),
            3 => Some(Level::L3),
            4 => Some(Level::L4),
            _ => None,
        }
    }
}

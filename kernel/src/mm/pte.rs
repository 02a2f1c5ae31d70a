//! Page-table entries as guests write them: what bits they may set, and what they read back.
//!
//! As in Xen 4.17, with two differences that docs/design/0010-page-types.md records: GLOBAL is dropped from every entry
//! (then a load of CR3 is a full flush), and bits 53 and 54 are dropped too: they are kept for the hypervisor's dirty log.

use hypercall_abi::Mfn;

use super::page_kind::Level;

bitflags::bitflags! {
    /// The bits of an entry beside the frame number.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PteFlags: u64 {
        /// The entry translates.
        const PRESENT = 1 << 0;
        /// Writes are allowed, as far as the entries above allow them too.
        const WRITABLE = 1 << 1;
        /// Ring 3 may use it. Guest kernels run in ring 3: forced on in present entries.
        const USER = 1 << 2;
        /// Cache attribute, bit 0.
        const WRITE_THROUGH = 1 << 3;
        /// Cache attribute, bit 1.
        const NO_CACHE = 1 << 4;
        /// Set by the processor.
        const ACCESSED = 1 << 5;
        /// Set by the processor (L1 entries).
        const DIRTY = 1 << 6;
        /// In L1 entries cache attribute, bit 2; in L2 and L3 entries a large page, which PV guests may not have.
        const PAT_OR_LARGE = 1 << 7;
        /// Survives a load of CR3.
        const GLOBAL = 1 << 8;
        /// Free for software: the guest's.
        const SOFTWARE_LOW = 7 << 9;
        /// The guest wrote the entry without USER: its kernel's page. Visible to the guest.
        const GUEST_KERNEL = 1 << 52;
        /// Kept for the hypervisor's dirty log: reads as zero.
        const HYPERVISOR_SOFTWARE = 3 << 53;
        /// Free for software: the guest's.
        const SOFTWARE_HIGH = 0xff << 55;
        /// Instructions may not be fetched.
        const NO_EXECUTE = 1 << 63;
    }
}

impl PteFlags {
    /// The three bits that select caching through the PAT.
    pub const CACHE: PteFlags =
        PteFlags::WRITE_THROUGH.union(PteFlags::NO_CACHE).union(PteFlags::PAT_OR_LARGE);
    /// What a guest may set in an entry of any level.
    const ALLOWED: PteFlags = PteFlags::PRESENT
        .union(PteFlags::WRITABLE)
        .union(PteFlags::USER)
        .union(PteFlags::ACCESSED)
        .union(PteFlags::DIRTY)
        .union(PteFlags::SOFTWARE_LOW)
        .union(PteFlags::GUEST_KERNEL)
        .union(PteFlags::HYPERVISOR_SOFTWARE)
        .union(PteFlags::SOFTWARE_HIGH)
        .union(PteFlags::NO_EXECUTE);
    /// What may change in a present entry without a new look at what it refers to: nothing here gives a right to memory that
    /// the references taken do not already cover. (WRITABLE does: it is not in the set. Nor are cache attributes.)
    const HARMLESS: PteFlags = PteFlags::USER
        .union(PteFlags::ACCESSED)
        .union(PteFlags::DIRTY)
        .union(PteFlags::GLOBAL)
        .union(PteFlags::SOFTWARE_LOW)
        .union(PteFlags::GUEST_KERNEL)
        .union(PteFlags::HYPERVISOR_SOFTWARE)
        .union(PteFlags::SOFTWARE_HIGH)
        .union(PteFlags::NO_EXECUTE);
}

/// Bits of the frame number in an entry.
pub const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;

/// One page-table entry.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pte(u64);

/// A guest set bits that no entry of this level may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadFlags;

impl Pte {
    /// The entry that maps nothing.
    pub const EMPTY: Pte = Pte(0);

    /// From its word.
    pub const fn from_bits(bits: u64) -> Pte {
        Pte(bits)
    }
    /// An entry for a frame.
    pub const fn new(mfn: Mfn, flags: PteFlags) -> Pte {
        Pte(mfn.get() << 12 & FRAME_MASK | flags.bits())
    }
    /// Its word.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// The frame.
    pub const fn mfn(self) -> Mfn {
        Mfn::new((self.0 & FRAME_MASK) >> 12)
    }
    /// The other bits.
    pub const fn flags(self) -> PteFlags {
        PteFlags::from_bits_retain(self.0 & !FRAME_MASK)
    }
    /// Whether it translates.
    pub const fn is_present(self) -> bool {
        self.0 & PteFlags::PRESENT.bits() != 0
    }
    /// Whether it allows writes.
    pub const fn is_writable(self) -> bool {
        self.0 & PteFlags::WRITABLE.bits() != 0
    }
    /// Adds flags.
    pub const fn with(self, flags: PteFlags) -> Pte {
        Pte(self.0 | flags.bits())
    }
    /// Takes flags out.
    pub const fn without(self, flags: PteFlags) -> Pte {
        Pte(self.0 & !flags.bits())
    }

    /// Checks the bits of a present entry a guest wrote at `level`. `may_cache` says whether the domain may choose caching
    /// (only with a right to memory that is not RAM).
    pub fn check(self, level: Level, may_cache: bool) -> Result<(), BadFlags> {
        let allowed = match level {
            Level::L1 if may_cache => PteFlags::ALLOWED.union(PteFlags::GLOBAL).union(PteFlags::CACHE),
            Level::L1 => PteFlags::ALLOWED.union(PteFlags::GLOBAL),
            _ => PteFlags::ALLOWED,
        };
        if allowed.contains(self.flags()) { Ok(()) } else { Err(BadFlags) }
    }

    /// The entry as it goes into the table: what the hypervisor adds and takes out. Entries that are not present stay as
    /// they are, every bit of them the guest's.
    pub fn adjusted(self, level: Level) -> Pte {
        if !self.is_present() {
            return self;
        }
        let clean = self.without(PteFlags::HYPERVISOR_SOFTWARE.union(PteFlags::GLOBAL));
        match level {
            Level::L1 if self.flags().contains(PteFlags::USER) => clean,
            Level::L1 => clean.with(PteFlags::USER.union(PteFlags::GUEST_KERNEL)),
            Level::L2 | Level::L3 => clean.with(PteFlags::USER),
            Level::L4 => clean.with(PteFlags::USER.union(PteFlags::ACCESSED)),
        }
    }

    /// Whether an entry may replace this one without new references: both present, and only harmless bits differ.
    pub const fn differs_harmlessly(self, new: Pte) -> bool {
        self.is_present() && (self.0 ^ new.0) & !PteFlags::HARMLESS.bits() == 0
    }
}

impl core::fmt::Debug for Pte {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_bits() {
        let p = Pte::new(Mfn::new(5), PteFlags::PRESENT);
        for level in [Level::L2, Level::L3, Level::L4] {
            for bad in [PteFlags::PAT_OR_LARGE, PteFlags::GLOBAL, PteFlags::NO_CACHE, PteFlags::WRITE_THROUGH]
            {
                assert_eq!(p.with(bad).check(level, true), Err(BadFlags), "{bad:?} at {level:?}");
            }
        }
        assert_eq!(p.with(PteFlags::GLOBAL).check(Level::L1, false), Ok(()));
        assert_eq!(p.with(PteFlags::NO_CACHE).check(Level::L1, false), Err(BadFlags));
        assert_eq!(p.with(PteFlags::CACHE).check(Level::L1, true), Ok(()));
    }

    #[test]
    fn what_guests_read_back() {
        let p = Pte::new(Mfn::new(5), PteFlags::PRESENT.union(PteFlags::GLOBAL));
        assert_eq!(p.adjusted(Level::L1).bits(), 0x0010_0000_0000_5005);
        assert_eq!(p.with(PteFlags::USER).adjusted(Level::L1).bits(), 0x5005);
        assert_eq!(Pte::from_bits(0x5003).adjusted(Level::L3).bits(), 0x5007);
        assert_eq!(Pte::from_bits(0x5003).adjusted(Level::L4).bits(), 0x5027);
        assert_eq!(Pte::from_bits(0xfff0_0000_0000_5f00).adjusted(Level::L1).bits(), 0xfff0_0000_0000_5f00);
    }

    #[test]
    fn rights_are_never_harmless() {
        let p = Pte::new(Mfn::new(5), PteFlags::PRESENT);
        assert!(p.differs_harmlessly(p.with(PteFlags::NO_EXECUTE.union(PteFlags::ACCESSED))));
        assert!(!p.differs_harmlessly(p.with(PteFlags::WRITABLE)));
        assert!(!p.differs_harmlessly(p.with(PteFlags::NO_CACHE)));
        assert!(!p.differs_harmlessly(Pte::new(Mfn::new(6), PteFlags::PRESENT)));
        assert!(!Pte::EMPTY.differs_harmlessly(Pte::EMPTY));
    }
}

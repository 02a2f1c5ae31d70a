//! Frame numbers and addresses: machine, pseudo-physical, virtual.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits of an address within a page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        pub struct $name(u64);

        impl $name {
            /// Takes any number; nothing is checked.
            pub const fn new(number: u64) -> $name {
                $name(number)
            }
            /// The number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

number! {
    /// A machine frame number: a page of the real machine.
    Mfn
}
number! {
    /// A pseudo-physical frame number: a page as the guest counts its own memory, from 0.
    Pfn
}
number! {
    /// A frame number in the form hypercalls take from a guest; for PV guests it is an [`Mfn`].
    Gfn
}
number! {
    /// A machine address in bytes.
    MachAddr
}
number! {
    /// A virtual address of a guest.
    VirtAddr
}

impl Mfn {
    /// No frame (`INVALID_MFN`).
    pub const INVALID: Mfn = Mfn(u64::MAX);

    /// The address of its first byte; bits that do not fit are lost.
    pub const fn address(self) -> MachAddr {
        MachAddr(self.0 << PAGE_SHIFT)
    }
    /// The frame `n` further on, `None` past the end of numbers.
    pub const fn checked_add(self, n: u64) -> Option<Mfn> {
        match self.0.checked_add(n) {
            Some(number) => Some(Mfn(number)),
            None => None,
        }
    }
}

impl Pfn {
    /// No frame: what the machine-to-physical table says of a frame without one.
    pub const INVALID: Pfn = Pfn(u64::MAX);
}

impl MachAddr {
    /// The frame it lies in.
    pub const fn frame(self) -> Mfn {
        Mfn(self.0 >> PAGE_SHIFT)
    }
    /// Byte offset in its frame.
    pub const fn offset(self) -> usize {
        (self.0 & 0xfff) as usize
    }
}

impl VirtAddr {
    /// Whether bits 63 to 47 are all equal.
    pub const fn is_canonical(self) -> bool {
        let top = self.0 >> 47;
        top == 0 || top == 0x1_ffff
    }
    /// Whether it lies where the hypervisor lives in every address space, L4 slots 256 to 271.
    pub const fn is_hypervisor(self) -> bool {
        self.0 >> 43 == 0xffff_8000_0000_0000 >> 43
    }
    /// Byte offset in its page.
    pub const fn offset(self) -> usize {
        (self.0 & 0xfff) as usize
    }
    /// Index in the page table of `level` (1 to 4).
    pub const fn table_index(self, level: u32) -> usize {
        (self.0 >> (12 + 9 * (level - 1)) & 511) as usize
    }
}

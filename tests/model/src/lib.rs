//! The page-type machine (`hv::mm`) against an independent reference model, on a simulated machine.
//!
//! * [`world`]: the real hypervisor core with a few domains, and a TLB that remembers all it ever could.
//! * [`check`]: invariants, computed from nothing but the tables themselves and what the test holds.
//! * [`reference`]: what each operation should do, in the simplest words: no preemption, no counts kept by hand where they
//!   can be looked up, a failed operation put back by copying the state.
//!
//! A test runs the same operations in two worlds, one that never stops and one that is preempted after every step, and in
//! the reference model; after each operation all three must agree.
#![forbid(unsafe_code)]

pub mod check;
pub mod reference;
pub mod world;

use hv::mm::Level;
use hypercall_abi::Mfn;

/// Slots of tables that operations touch; the rest stay empty. One is the hypervisor's in an L4 table.
pub const SLOTS: [usize; 8] = [0, 1, 63, 255, 256, 300, 510, 511];

/// Number of domains. The first may map the others' frames.
pub const DOMAINS: u16 = 3;

/// An operation, with frames named by their place in a domain's list, so that a shorter run still means something.
#[derive(Clone, Debug)]
pub enum Op {
    /// Give the domain a frame.
    Allocate { dom: u8 },
    /// The domain gives a frame back.
    Free { dom: u8, frame: u8 },
    /// The guest stores a word through a writable mapping.
    Write { dom: u8, frame: u8, slot: u8, entry: Entry },
    /// Write an entry, as `mmu_update` does.
    Update { dom: u8, table: u8, slot: u8, entry: Entry, store: Way },
    /// Map a frame of another domain.
    Foreign { dom: u8, table: u8, slot: u8, entry: Entry },
    /// Pin a frame as a table, of the level its place suggests or another.
    Pin { dom: u8, frame: u8, level: u8, as_other: bool },
    /// Take a pin back.
    Unpin { dom: u8, frame: u8 },
    /// Load a root.
    Root { dom: u8, which: bool, frame: Option<u8> },
    /// Something else takes a reference: a grant mapping, a descriptor table.
    Hold { dom: u8, frame: u8, how: Hold },
    /// And gives it back.
    Release { index: u8 },
    /// Exchange a frame for another.
    Exchange { dom: u8, frame: u8 },
    /// Give a frame to another domain, with what is in it.
    Transfer { dom: u8, frame: u8, to: u8 },
    /// The guest flushes.
    Flush,
    /// The domain dies, and is built anew when nothing refers to its memory any more.
    Kill { dom: u8 },
}

/// How an entry is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Plainly.
    Plain,
    /// Keeping accessed and dirty bits.
    Preserve,
    /// Compare-and-exchange against what is there.
    Same,
    /// Compare-and-exchange against something else.
    Other,
}

/// A reference that is not in a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Read-only.
    Reads,
    /// Writable.
    Writes,
    /// As a page of descriptors.
    Descriptors,
}

/// An entry to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Which frame of the domain.
    pub frame: u8,
    /// Which bits.
    pub bits: u8,
}

impl Entry {
    /// The word for a frame.
    pub fn word(&self, mfn: Mfn) -> u64 {
        const NX: u64 = 1 << 63;
        let bits = match self.bits % 16 {
            0 => return 0,
            1 => return mfn.get() << 12 | 0xe06,
            2..=4 => 0x1,
            5..=8 => 0x7,
            9 | 10 => 0x3,
            11 => 0x63 | NX,
            12 => 0x21 | 0x200,
            13 => 0x101,
            14 => 0x81,
            _ => 1 << 53 | 1 << 58 | 5,
        };
        mfn.get() << 12 | bits
    }
}

/// The level that operations prefer for a frame at this place in its domain's list.
pub fn preferred(place: usize) -> Option<Level> {
    match place % 24 {
        0..=7 => None,
        8..=13 => Some(Level::L1),
        14..=17 => Some(Level::L2),
        18..=20 => Some(Level::L3),
        _ => Some(Level::L4),
    }
}

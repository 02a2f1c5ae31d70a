//! The ports of a domain, in frames taken when first needed.

use hypercall_abi::{Mfn, Port};

use super::{Entry, Error, PortState};
use crate::platform::{FrameWords, Platform};

/// Ports of the two-level form: as many as 64 selector bits times 64 pending bits name.
pub const PORTS: u32 = 4096;
/// Ports in a frame, one word each.
const PER_FRAME: u32 = 512;
/// Ports become valid in groups of this size, as on Xen: what is not valid is `EINVAL`, what is valid and unused is closed.
const GROUP: u32 = 64;

/// The event channels of a domain.
///
/// Which ports are taken is a bitmap beside the frames, with one summary word over it, so that the lowest free port is found in
/// two steps. Words of ports are written only under the table's lock.
pub struct PortTable {
    frames: [Option<Mfn>; PortTable::FRAMES],
    /// Bit set: port taken.
    taken: [u64; (PORTS / 64) as usize],
    /// Bit set: all 64 ports of that word of `taken` are taken.
    full: u64,
    /// Ports from here on do not exist yet.
    valid: u32,
    /// Ports taken, port 0 not counted.
    active: u32,
    /// Where a preempted reset goes on; 0 when none is under way.
    pub(super) reset_from: u32,
}

impl PortTable {
    /// Most frames of a table.
    pub const FRAMES: usize = (PORTS / PER_FRAME) as usize;

    /// No ports taken but port 0, which nobody gets.
    pub const fn new() -> PortTable {
        let mut taken = [0; (PORTS / 64) as usize];
        taken[0] = 1;
        PortTable {
            frames: [None; PortTable::FRAMES],
            taken,
            full: 0,
            valid: GROUP,
            active: 0,
            reset_from: 0,
        }
    }

    /// How many ports are taken.
    pub fn active(&self) -> u32 {
        self.active
    }

    /// How many frames hold ports.
    pub fn frame_count(&self) -> usize {
        self.frames.iter().flatten().count()
    }

    fn words<'p, P: Platform>(&self, platform: &'p P, port: Port) -> Option<&'p FrameWords> {
        let frame = self.frames.get((port.get() / PER_FRAME) as usize)?;
        frame.map(|mfn| platform.frame(mfn))
    }

    /// The port numbered `port`. [`Error::BadPort`] when there is none yet.
    pub fn get<P: Platform>(&self, platform: &P, port: Port) -> Result<Entry, Error> {
        if port.get() >= self.valid {
            return Err(Error::BadPort);
        }
        if port.get() == 0 {
            return Ok(Entry::new(PortState::Reserved, Entry::FREE.vcpu));
        }
        let Some(words) = self.words(platform, port) else { return Ok(Entry::FREE) };
        let word = words.get((port.get() % PER_FRAME) as usize).ok_or(Error::BadPort)?;
        Ok(Entry::from_word(word.load(core::sync::atomic::Ordering::Relaxed)))
    }

    /// The lowest free port. [`Error::NoFreePort`] when all are taken.
    pub fn lowest_free(&self) -> Result<Port, Error> {
        let word = (!self.full).trailing_zeros();
        let bits = self.taken.get(word as usize).ok_or(Error::NoFreePort)?;
        Ok(Port::new(word * 64 + (!bits).trailing_zeros()))
    }

    /// Whether `port` lies in a frame that the table does not have yet.
    pub fn lacks_frame(&self, port: Port) -> bool {
        self.frames.get((port.get() / PER_FRAME) as usize).is_some_and(Option::is_none)
    }

    /// Gives the table the zeroed frame that holds `port`.
    pub fn add_frame(&mut self, port: Port, mfn: Mfn) {
        if let Some(slot) = self.frames.get_mut((port.get() / PER_FRAME) as usize) {
            *slot = Some(mfn);
        }
    }

    /// Takes a frame out of a table without taken ports.
    pub fn take_frame(&mut self) -> Option<Mfn> {
        debug_assert!(self.active == 0, "a port table is taken down with ports in it");
        self.frames.iter_mut().find_map(Option::take)
    }

    /// Stores a port, whose frame is there, and keeps the books of taken ports.
    pub fn set<P: Platform>(&mut self, platform: &P, port: Port, entry: Entry) {
        let number = port.get();
        let Some(word) = self.words(platform, port).and_then(|w| w.get((number % PER_FRAME) as usize)) else {
            debug_assert!(false, "port {number} has no frame");
            return;
        };
        word.store(entry.to_word(), core::sync::atomic::Ordering::Relaxed);
        let Some(taken) = self.taken.get_mut((number / 64) as usize) else { return };
        let bit = 1 << (number % 64);
        match (*taken & bit != 0, entry.state != PortState::Free) {
            (false, true) => self.active += 1,
            (true, false) => self.active -= 1,
            _ => {}
        }
        if entry.state == PortState::Free {
            *taken &= !bit;
        } else {
            *taken |= bit;
            self.valid = self.valid.max((number / GROUP + 1) * GROUP);
        }
        if *taken == u64::MAX {
            self.full |= 1 << (number / 64);
        } else {
            self.full &= !(1 << (number / 64));
        }
    }

    /// The first taken port from `from` on, port 0 not counted.
    pub fn first_taken(&self, from: u32) -> Option<Port> {
        let from = from.max(1);
        let mut mask = u64::MAX << (from % 64);
        for (index, taken) in self.taken.iter().enumerate().skip((from / 64) as usize) {
            let bits = taken & mask & if index == 0 { !1 } else { u64::MAX };
            if bits != 0 {
                return Some(Port::new(index as u32 * 64 + bits.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }
}

impl Default for PortTable {
    fn default() -> Self {
        PortTable::new()
    }
}

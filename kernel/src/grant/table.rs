//! The frames of a grant table: shared entries, active entries, handles.

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::grant::MapFlags;
use hypercall_abi::{DomId, GrantRef, Mfn};

use super::Error;
use crate::platform::Platform;

/// Most shared frames of a table, as Xen's default.
pub const MAX_FRAMES: u32 = 64;
/// Most frames of handles: as many mappings as Xen's default allows.
pub const MAX_MAPTRACK_FRAMES: u32 = 512;

/// Shared entries of version 1 in a frame, one word each.
pub const ENTRIES_PER_FRAME: u32 = 512;
/// Active entries in a frame, two words each.
const ACTIVE_PER_FRAME: u32 = 256;
/// Handles in a frame, one word each.
const HANDLES_PER_FRAME: u32 = 512;
/// First slot of the frames of active entries in the directory; those of shared frames begin at 0.
const ACTIVE_SLOT: u32 = MAX_FRAMES;

const NO_HANDLE: u32 = u32::MAX;

/// Counts of use of one entry, 8 bits each: processors writing and reading, devices writing and reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins(u32);

impl Pins {
    /// One processor mapping, or copy, that writes.
    pub const HOST_WRITE: Pins = Pins(1);
    /// One that reads.
    pub const HOST_READ: Pins = Pins(1 << 8);
    /// One device mapping that writes.
    pub const DEVICE_WRITE: Pins = Pins(1 << 16);
    /// One that reads.
    pub const DEVICE_READ: Pins = Pins(1 << 24);
    const WRITERS: u32 = 0xff | 0xff << 16;

    /// What a mapping with these flags counts as.
    pub fn of(flags: MapFlags) -> Pins {
        let (host, device) = if flags.contains(MapFlags::READONLY) {
            (Pins::HOST_READ, Pins::DEVICE_READ)
        } else {
            (Pins::HOST_WRITE, Pins::DEVICE_WRITE)
        };
        let host = if flags.contains(MapFlags::HOST_MAP) { host.0 } else { 0 };
        let device = if flags.contains(MapFlags::DEVICE_MAP) { device.0 } else { 0 };
        Pins(host | device)
    }
    /// Whether nobody uses the entry.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
    /// Whether somebody may write.
    pub const fn writes(self) -> bool {
        self.0 & Pins::WRITERS != 0
    }
    /// With `more` added. `None` when one of the counts concerned has reached 128, Xen's limit: so none can overflow.
    pub const fn plus(self, more: Pins) -> Option<Pins> {
        if self.0 & (more.0 << 7) != 0 { None } else { Some(Pins(self.0 + more.0)) }
    }
    /// With `less`, which was added before, taken away.
    pub const fn minus(self, less: Pins) -> Pins {
        Pins(self.0.wrapping_sub(less.0))
    }
    /// Number of uses.
    pub const fn total(self) -> u32 {
        let [a, b, c, d] = self.0.to_le_bytes();
        a as u32 + b as u32 + c as u32 + d as u32
    }
}

/// What the hypervisor keeps about an entry in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// How often it is in use.
    pub pins: Pins,
    /// By whom.
    pub user: DomId,
    /// The frame; meaningless when nobody uses it.
    pub frame: Mfn,
}

/// What a handle names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Whose entry.
    pub granter: DomId,
    /// Which.
    pub gref: GrantRef,
    /// How it is mapped still.
    pub flags: MapFlags,
}

const IN_USE: u64 = 1 << 63;

impl Mapping {
    /// bits 0-31 entry, 32-47 granter, 48-55 flags, 63 set. A free handle has the next free one in bits 0-31.
    fn to_word(self) -> u64 {
        IN_USE
            | u64::from(self.flags.bits() & 0xff) << 48
            | u64::from(self.granter.get()) << 32
            | u64::from(self.gref.get())
    }
    fn from_word(word: u64) -> Option<Mapping> {
        (word & IN_USE != 0).then(|| Mapping {
            granter: DomId::new((word >> 32) as u16),
            gref: GrantRef::new(word as u32),
            flags: MapFlags::from_bits_retain((word >> 48) as u32 & 0xff),
        })
    }
}

/// Grant table and mappings of a domain.
pub struct GrantTable {
    /// Slots 0 to 63: shared frames; 64 to 191: frames of active entries.
    directory: Option<Mfn>,
    frames: u32,
    /// Active entries in use.
    used: u32,
    /// The domain has died: the frames go when the last entry falls out of use.
    pub(super) closed: bool,
    /// One slot for each frame of handles.
    maptrack: Option<Mfn>,
    maptrack_frames: u32,
    free_handle: u32,
    mappings: u32,
    /// Handle at which a preempted teardown goes on.
    pub(super) teardown_at: u32,
}

impl GrantTable {
    /// No entries and no mappings.
    pub const fn new() -> GrantTable {
        GrantTable {
            directory: None,
            frames: 0,
            used: 0,
            closed: false,
            maptrack: None,
            maptrack_frames: 0,
            free_handle: NO_HANDLE,
            mappings: 0,
            teardown_at: 0,
        }
    }

    /// Shared frames.
    pub fn frames(&self) -> u32 {
        self.frames
    }
    /// Active entries in use.
    pub fn used(&self) -> u32 {
        self.used
    }
    /// Mappings of others' grants.
    pub fn mappings(&self) -> u32 {
        self.mappings
    }
    /// Frames of the hypervisor behind all this.
    pub fn frame_count(&self) -> u32 {
        3 * self.frames
            + self.maptrack_frames
            + u32::from(self.directory.is_some())
            + u32::from(self.maptrack.is_some())
    }
    /// Entries that a reference can name. A table that nobody used yet counts as one empty frame.
    pub fn entries(&self) -> u32 {
        self.frames.max(1) * ENTRIES_PER_FRAME
    }

    fn slot<P: Platform>(platform: &P, directory: Option<Mfn>, slot: u32) -> Option<&AtomicU64> {
        platform.frame(directory?).get(slot as usize)
    }

    fn frame_at<P: Platform>(platform: &P, directory: Option<Mfn>, slot: u32) -> Option<Mfn> {
        let mfn = GrantTable::slot(platform, directory, slot)?.load(Ordering::Relaxed);
        (mfn != 0).then(|| Mfn::new(mfn))
    }

    fn word<P: Platform>(platform: &P, directory: Option<Mfn>, slot: u32, index: u32) -> Option<&AtomicU64> {
        platform.frame(GrantTable::frame_at(platform, directory, slot)?).get(index as usize)
    }

    // ── entries ──

    /// The directory's frame is needed before the first grant.
    pub(super) fn needs_directory(&self) -> bool {
        self.directory.is_none()
    }
    pub(super) fn set_directory(&mut self, mfn: Mfn) {
        self.directory = Some(mfn);
    }

    /// Adds a zeroed shared frame and its two frames of active entries; the directory is there.
    pub(super) fn add_frame<P: Platform>(&mut self, platform: &P, shared: Mfn, active: [Mfn; 2]) {
        let slots = [self.frames, ACTIVE_SLOT + 2 * self.frames, ACTIVE_SLOT + 2 * self.frames + 1];
        for (slot, mfn) in slots.into_iter().zip([shared, active[0], active[1]]) {
            if let Some(word) = GrantTable::slot(platform, self.directory, slot) {
                word.store(mfn.get(), Ordering::Relaxed);
            }
        }
        self.frames += 1;
    }

    /// Takes the last shared frame and its frames of active entries out of a table that nobody uses.
    pub(super) fn take_frame<P: Platform>(&mut self, platform: &P) -> Option<(Mfn, [Mfn; 2])> {
        let last = self.frames.checked_sub(1)?;
        let active = [ACTIVE_SLOT + 2 * last, ACTIVE_SLOT + 2 * last + 1];
        let [first, second] = active.map(|slot| GrantTable::frame_at(platform, self.directory, slot));
        let shared = self.shared_frame(platform, last);
        self.frames = last;
        Some((shared?, [first?, second?]))
    }

    pub(super) fn take_directory(&mut self) -> Option<Mfn> {
        self.directory.take()
    }

    /// Shared frame number `index`.
    pub fn shared_frame<P: Platform>(&self, platform: &P, index: u32) -> Option<Mfn> {
        if index >= self.frames {
            return None;
        }
        GrantTable::frame_at(platform, self.directory, index)
    }

    /// The shared entry. `None` when its frame is not there.
    pub fn shared<'p, P: Platform>(&self, platform: &'p P, gref: GrantRef) -> Option<&'p AtomicU64> {
        let frame = gref.get() / ENTRIES_PER_FRAME;
        if frame >= self.frames {
            return None;
        }
        GrantTable::word(platform, self.directory, frame, gref.get() % ENTRIES_PER_FRAME)
    }

    fn active_words<'p, P: Platform>(&self, platform: &'p P, gref: GrantRef) -> Option<[&'p AtomicU64; 2]> {
        if gref.get() / ENTRIES_PER_FRAME >= self.frames {
            return None;
        }
        let slot = ACTIVE_SLOT + gref.get() / ACTIVE_PER_FRAME;
        let index = gref.get() % ACTIVE_PER_FRAME * 2;
        Some([
            GrantTable::word(platform, self.directory, slot, index)?,
            GrantTable::word(platform, self.directory, slot, index + 1)?,
        ])
    }

    /// The active entry. [`Error::BadReference`] when there is none.
    pub fn active<P: Platform>(&self, platform: &P, gref: GrantRef) -> Result<Active, Error> {
        let [pins, frame] = self.active_words(platform, gref).ok_or(Error::BadReference)?;
        let word = pins.load(Ordering::Relaxed);
        Ok(Active {
            pins: Pins(word as u32),
            user: DomId::new((word >> 32) as u16),
            frame: Mfn::new(frame.load(Ordering::Relaxed)),
        })
    }

    /// Stores an active entry and keeps the count of those in use.
    pub(super) fn set_active<P: Platform>(&mut self, platform: &P, gref: GrantRef, active: Active) {
        let Some([pins, frame]) = self.active_words(platform, gref) else { return };
        let before = Pins(pins.load(Ordering::Relaxed) as u32);
        match (before.is_none(), active.pins.is_none()) {
            (true, false) => self.used += 1,
            (false, true) => self.used -= 1,
            _ => {}
        }
        pins.store(u64::from(active.user.get()) << 32 | u64::from(active.pins.0), Ordering::Relaxed);
        frame.store(active.frame.get(), Ordering::Relaxed);
    }

    // ── handles ──

    /// Whether the next handle needs a frame first, and whether the directory of those frames is missing too.
    /// [`Error::NoSpace`] when there can be no more.
    pub(super) fn maptrack_needs(&self) -> Result<(bool, bool), Error> {
        if self.free_handle != NO_HANDLE {
            return Ok((false, false));
        }
        if self.maptrack_frames >= MAX_MAPTRACK_FRAMES {
            return Err(Error::NoSpace);
        }
        Ok((true, self.maptrack.is_none()))
    }

    pub(super) fn set_maptrack_directory(&mut self, mfn: Mfn) {
        self.maptrack = Some(mfn);
    }

    /// Adds a frame of handles, all free.
    pub(super) fn add_maptrack_frame<P: Platform>(&mut self, platform: &P, mfn: Mfn) {
        let first = self.maptrack_frames * HANDLES_PER_FRAME;
        for (word, next) in platform.frame(mfn).iter().zip(first + 1..) {
            let last = next == first + HANDLES_PER_FRAME;
            word.store(u64::from(if last { self.free_handle } else { next }), Ordering::Relaxed);
        }
        if let Some(slot) = GrantTable::slot(platform, self.maptrack, self.maptrack_frames) {
            slot.store(mfn.get(), Ordering::Relaxed);
        }
        self.free_handle = first;
        self.maptrack_frames += 1;
    }

    fn handle_word<'p, P: Platform>(&self, platform: &'p P, handle: u32) -> Option<&'p AtomicU64> {
        let frame = handle / HANDLES_PER_FRAME;
        if frame >= self.maptrack_frames {
            return None;
        }
        GrantTable::word(platform, self.maptrack, frame, handle % HANDLES_PER_FRAME)
    }

    /// Takes a free handle for `mapping`; [`GrantTable::maptrack_needs`] said that there is one.
    pub(super) fn take_handle<P: Platform>(&mut self, platform: &P, mapping: Mapping) -> Result<u32, Error> {
        let handle = self.free_handle;
        let word = self.handle_word(platform, handle).ok_or(Error::NoSpace)?;
        self.free_handle = word.swap(mapping.to_word(), Ordering::Relaxed) as u32;
        self.mappings += 1;
        Ok(handle)
    }

    /// What a handle names. [`Error::BadHandle`] when it is not in use.
    pub fn mapping<P: Platform>(&self, platform: &P, handle: u32) -> Result<Mapping, Error> {
        let word = self.handle_word(platform, handle).ok_or(Error::BadHandle)?;
        Mapping::from_word(word.load(Ordering::Relaxed)).ok_or(Error::BadHandle)
    }

    /// Stores what is left of a mapping; one that is mapped in no way any more is freed.
    pub(super) fn set_mapping<P: Platform>(&mut self, platform: &P, handle: u32, mapping: Mapping) {
        let Some(word) = self.handle_word(platform, handle) else { return };
        if mapping.flags.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
            word.store(mapping.to_word(), Ordering::Relaxed);
        } else {
            word.store(u64::from(self.free_handle), Ordering::Relaxed);
            self.free_handle = handle;
            self.mappings -= 1;
        }
    }

    /// How many handles exist, in use or not.
    pub(super) fn handles(&self) -> u32 {
        self.maptrack_frames * HANDLES_PER_FRAME
    }

    /// Takes the last frame of handles, or in the end their directory, out of a table without mappings.
    pub(super) fn take_maptrack_frame<P: Platform>(&mut self, platform: &P) -> Option<Mfn> {
        self.free_handle = NO_HANDLE;
        let Some(last) = self.maptrack_frames.checked_sub(1) else { return self.maptrack.take() };
        self.maptrack_frames = last;
        GrantTable::frame_at(platform, self.maptrack, last)
    }
}

impl Default for GrantTable {
    fn default() -> Self {
        GrantTable::new()
    }
}

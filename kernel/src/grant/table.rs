//! The frames of a grant table: shared entries, their status words, active entries, handles.

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::grant::{GNTTAB_NR_RESERVED_ENTRIES, MapFlags};
use hypercall_abi::{DomId, GrantRef, Mfn};

use super::entry::{Entry, Status};
use super::{Error, Frames};
use crate::platform::Platform;

/// Most shared frames of a table, as Xen's default.
pub const MAX_FRAMES: u32 = 64;
/// Most frames of handles: as many mappings as Xen's default allows.
pub const MAX_MAPTRACK_FRAMES: u32 = 512;

/// Active entries in a frame, two words each.
pub(super) const ACTIVE_PER_FRAME: u32 = 256;
/// Status words in a frame, 16 bits each.
const STATUS_PER_FRAME: u32 = 2048;
/// Shared frames whose entries of version 2 one status frame serves.
pub(super) const SHARED_PER_STATUS: u32 = STATUS_PER_FRAME / Version::V2.entries_per_frame();
/// Most status frames of a table.
pub const MAX_STATUS_FRAMES: u32 = MAX_FRAMES / SHARED_PER_STATUS;
/// Handles in a frame, one word each.
const HANDLES_PER_FRAME: u32 = 512;
/// Most mappings of others' grants at a time.
pub const MAX_MAPPINGS: u32 = MAX_MAPTRACK_FRAMES * HANDLES_PER_FRAME;
/// First slot of the frames of active entries in the directory; those of shared frames begin at 0.
const ACTIVE_SLOT: u32 = MAX_FRAMES;
/// First slot of the status frames.
const STATUS_SLOT: u32 = ACTIVE_SLOT + 2 * MAX_FRAMES;

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

/// The layout of a table's shared entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 8 bytes each, with the marks of use among the flags.
    V1,
    /// 16 bytes each, with the marks of use in status frames.
    V2,
}

impl Version {
    /// The version of this number.
    pub const fn from_number(number: u32) -> Option<Version> {
        match number {
            1 => Some(Version::V1),
            2 => Some(Version::V2),
            _ => None,
        }
    }
    /// Its number.
    pub const fn number(self) -> u32 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }
    /// Entries in a shared frame.
    pub const fn entries_per_frame(self) -> u32 {
        match self {
            Version::V1 => 512,
            Version::V2 => 256,
        }
    }
}

/// What of its frame an entry in use gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All.
    Page,
    /// The bytes from `start` to before `end`, both at most 4096. Such an entry is never mapped.
    Part {
        /// First byte.
        start: u16,
        /// The byte after the last.
        end: u16,
    },
    /// Nothing of its own: each use also has the entry that this one stood for when the use began.
    Through,
}

/// What the hypervisor keeps about an entry in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// How often it is in use.
    pub pins: Pins,
    /// By whom.
    pub user: DomId,
    /// The frame; meaningless when nobody uses it, or with [`Reach::Through`].
    pub frame: Mfn,
    /// What of it.
    pub reach: Reach,
}

const FRAME_BITS: u32 = 40;
const OFFSET_MASK: u64 = 0x1fff;

impl Active {
    /// Word 0: bits 0-31 pins, 32-47 user, 48-49 how it reaches, 50-62 end of the part. Word 1: bits 0-39 frame, 40-52
    /// start of the part.
    fn to_words(self) -> [u64; 2] {
        let (kind, start, end) = match self.reach {
            Reach::Page => (0, 0, 0),
            Reach::Part { start, end } => (1, u64::from(start), u64::from(end)),
            Reach::Through => (2, 0, 0),
        };
        [
            (end & OFFSET_MASK) << 50
                | kind << 48
                | u64::from(self.user.get()) << 32
                | u64::from(self.pins.0),
            (start & OFFSET_MASK) << FRAME_BITS | self.frame.get() & ((1 << FRAME_BITS) - 1),
        ]
    }
    fn from_words([low, high]: [u64; 2]) -> Active {
        let reach = match low >> 48 & 3 {
            0 => Reach::Page,
            1 => Reach::Part {
                start: (high >> FRAME_BITS & OFFSET_MASK) as u16,
                end: (low >> 50 & OFFSET_MASK) as u16,
            },
            _ => Reach::Through,
        };
        Active {
            pins: Pins(low as u32),
            user: DomId::new((low >> 32) as u16),
            frame: Mfn::new(high & ((1 << FRAME_BITS) - 1)),
            reach,
        }
    }
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
/// Somebody maps or unmaps by this handle right now: to everybody else it is no handle.
const BUSY: u64 = 1 << 62;

impl Mapping {
    /// bits 0-31 entry, 32-47 granter, 48-55 flags, 62 busy, 63 set. A free handle has the next free one in bits 0-31.
    fn to_word(self) -> u64 {
        IN_USE
            | u64::from(self.flags.bits() & 0xff) << 48
            | u64::from(self.granter.get()) << 32
            | u64::from(self.gref.get())
    }
    fn from_word(word: u64) -> Option<Mapping> {
        (word & (IN_USE | BUSY) == IN_USE).then(|| Mapping {
            granter: DomId::new((word >> 32) as u16),
            gref: GrantRef::new(word as u32),
            flags: MapFlags::from_bits_retain((word >> 48) as u32 & 0xff),
        })
    }
}

/// What a table lacks to be larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// The frame that lists the others.
    Directory,
    /// A status frame.
    StatusFrame,
    /// A shared frame and two frames of active entries.
    SharedFrame,
}

/// Whose the status frames of a table are at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatusFrames {
    /// Taken for version 2, which is not in force yet: the guest cannot reach them.
    Prepared,
    /// Shared with the guest.
    Shared,
    /// Version 2 is about to end: nobody can get a reference to them any more.
    Withdrawn,
}

/// A change of version that has been decided and is carried out in steps. The entries beyond the reserved ones are as good as
/// gone: nobody uses them, and nobody gets to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub to: Version,
    /// Shared frames from this one on are clean.
    pub clean_from: u32,
}

/// Grant table and mappings of a domain.
pub struct GrantTable {
    /// Most shared frames it may have, 1 to [`MAX_FRAMES`].
    max_frames: u32,
    /// Most mappings at a time, up to [`MAX_MAPPINGS`].
    max_mappings: u32,
    /// Slots 0 to 63: shared frames; 64 to 191: frames of active entries; 192 to 199: status frames.
    directory: Option<Mfn>,
    frames: u32,
    version: Version,
    pub(super) change: Option<Change>,
    status_frames: u32,
    pub(super) status: StatusFrames,
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
            max_frames: MAX_FRAMES,
            max_mappings: MAX_MAPPINGS,
            directory: None,
            frames: 0,
            version: Version::V1,
            change: None,
            status_frames: 0,
            status: StatusFrames::Prepared,
            used: 0,
            closed: false,
            maptrack: None,
            maptrack_frames: 0,
            free_handle: NO_HANDLE,
            mappings: 0,
            teardown_at: 0,
        }
    }

    /// Limits a table that has no handles and no more frames than that. Both are within what a table can have, and `frames` is not 0.
    pub fn set_limits(&mut self, frames: u32, mappings: u32) {
        debug_assert!(self.frames <= frames && self.maptrack.is_none(), "limits come first");
        self.max_frames = frames.clamp(1, MAX_FRAMES);
        self.max_mappings = mappings.min(MAX_MAPPINGS);
    }
    /// Most frames of this kind that it may have.
    pub fn limit(&self, kind: Frames) -> u32 {
        match kind {
            Frames::Shared => self.max_frames,
            Frames::Status => self.max_frames.div_ceil(SHARED_PER_STATUS),
        }
    }
    /// Shared frames.
    pub fn frames(&self) -> u32 {
        self.frames
    }
    /// The version in force.
    pub fn version(&self) -> Version {
        self.version
    }
    /// Status frames that the guest can have: none in version 1.
    pub fn status_frames(&self) -> u32 {
        match self.version {
            Version::V1 => 0,
            Version::V2 => self.status_frames,
        }
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
            + self.status_frames
            + self.maptrack_frames
            + u32::from(self.directory.is_some())
            + u32::from(self.maptrack.is_some())
    }
    /// Entries that a reference can name. A table that nobody used yet counts as one empty frame.
    pub fn entries(&self) -> u32 {
        self.frames.max(1) * self.version.entries_per_frame()
    }

    /// Whether `gref` is an entry that nobody may begin to use because a change of version is about to wipe it out.
    pub(super) fn is_vanishing(&self, gref: GrantRef) -> bool {
        self.change.is_some() && gref.get() >= GNTTAB_NR_RESERVED_ENTRIES
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

    /// What a table of `frames` shared frames lacks first, if this one is smaller.
    pub(super) fn missing(&self, frames: u32) -> Option<Missing> {
        // With the status frames of the shared frame that comes next.
        let next = if frames > self.frames { self.frames + 1 } else { self.frames };
        if self.version == Version::V2 && self.needs_status_frame(next) {
            Some(Missing::StatusFrame)
        } else if frames <= self.frames {
            None
        } else if self.directory.is_none() {
            Some(Missing::Directory)
        } else {
            Some(Missing::SharedFrame)
        }
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

    /// Whether version 2 of a table with this many shared frames needs one status frame more.
    pub(super) fn needs_status_frame(&self, shared: u32) -> bool {
        self.status_frames < shared.div_ceil(SHARED_PER_STATUS)
    }

    /// Adds a zeroed status frame; the directory is there, and room for it.
    pub(super) fn add_status_frame<P: Platform>(&mut self, platform: &P, mfn: Mfn) {
        if let Some(word) = GrantTable::slot(platform, self.directory, STATUS_SLOT + self.status_frames) {
            word.store(mfn.get(), Ordering::Relaxed);
            self.status_frames += 1;
        }
    }

    /// Status frame `index`, whoever can reach it now.
    pub(super) fn status_frame_at<P: Platform>(&self, platform: &P, index: u32) -> Option<Mfn> {
        if index >= self.status_frames {
            return None;
        }
        GrantTable::frame_at(platform, self.directory, STATUS_SLOT + index)
    }

    /// Takes the last status frame out of the table.
    pub(super) fn take_status_frame<P: Platform>(&mut self, platform: &P) -> Option<Mfn> {
        let last = self.status_frames.checked_sub(1)?;
        let mfn = self.status_frame_at(platform, last);
        self.status_frames = last;
        mfn
    }

    /// Makes `version` the one in force. Entries and status frames are as it has them.
    pub(super) fn set_version(&mut self, version: Version) {
        self.version = version;
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

    /// Status frame number `index`. `None` in version 1.
    pub fn status_frame<P: Platform>(&self, platform: &P, index: u32) -> Option<Mfn> {
        if index >= self.status_frames() {
            return None;
        }
        self.status_frame_at(platform, index)
    }

    /// The shared entry, in the layout of the version in force. `None` when its frame is not there.
    pub fn shared<'p, P: Platform>(&self, platform: &'p P, gref: GrantRef) -> Option<Entry<'p>> {
        self.entry_as(platform, gref, self.version)
    }

    /// The shared entry in the layout of `version`.
    pub(super) fn entry_as<'p, P: Platform>(
        &self,
        platform: &'p P,
        gref: GrantRef,
        version: Version,
    ) -> Option<Entry<'p>> {
        let per_frame = version.entries_per_frame();
        let (frame, index) = (gref.get() / per_frame, gref.get() % per_frame);
        if frame >= self.frames {
            return None;
        }
        let word = |index| GrantTable::word(platform, self.directory, frame, index);
        match version {
            Version::V1 => Some(Entry::V1(word(index)?)),
            Version::V2 => {
                let slot = STATUS_SLOT + gref.get() / STATUS_PER_FRAME;
                let at = gref.get() % STATUS_PER_FRAME;
                let status = GrantTable::word(platform, self.directory, slot, at / 4)?;
                Some(Entry::V2 {
                    words: [word(2 * index)?, word(2 * index + 1)?],
                    status: Status::new(status, at % 4),
                })
            }
        }
    }

    fn active_words<'p, P: Platform>(&self, platform: &'p P, gref: GrantRef) -> Option<[&'p AtomicU64; 2]> {
        // As many as version 1 has, the larger number.
        if gref.get() / Version::V1.entries_per_frame() >= self.frames {
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
        let words = self.active_words(platform, gref).ok_or(Error::BadReference)?;
        Ok(Active::from_words(words.map(|word| word.load(Ordering::Relaxed))))
    }

    /// Stores an active entry and keeps the count of those in use.
    pub(super) fn set_active<P: Platform>(&mut self, platform: &P, gref: GrantRef, active: Active) {
        let Some(words) = self.active_words(platform, gref) else { return };
        let before = Pins(words[0].load(Ordering::Relaxed) as u32);
        match (before.is_none(), active.pins.is_none()) {
            (true, false) => self.used += 1,
            (false, true) => self.used -= 1,
            _ => {}
        }
        for (word, value) in words.into_iter().zip(active.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Whether an entry beyond the reserved ones is in use.
    pub(super) fn uses_beyond_reserved<P: Platform>(&self, platform: &P) -> bool {
        let reserved = (0..GNTTAB_NR_RESERVED_ENTRIES)
            .filter(|n| self.active(platform, GrantRef::new(*n)).is_ok_and(|a| !a.pins.is_none()))
            .count();
        self.used as usize > reserved
    }

    // ── handles ──

    /// Whether there are as many handles as there may be, all in use.
    pub(super) fn is_out_of_handles(&self) -> bool {
        self.free_handle == NO_HANDLE && self.handles() >= self.max_mappings
    }

    /// Adds a zeroed frame: as the directory of the frames of handles if there is none yet, else with free handles.
    pub(super) fn add_maptrack_frame<P: Platform>(&mut self, platform: &P, mfn: Mfn) {
        if self.maptrack.is_none() {
            self.maptrack = Some(mfn);
            return;
        }
        let first = self.maptrack_frames * HANDLES_PER_FRAME;
        // Behind the last that may be used the words are zeros: handles that are in no use.
        let end = (first + HANDLES_PER_FRAME).min(self.max_mappings);
        for (word, next) in platform.frame(mfn).iter().zip(first + 1..=end) {
            let last = next == end;
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

    /// Takes a free handle for `mapping`, busy until [`GrantTable::set_mapping`] says how it ended. `None` when a frame of
    /// handles is needed first.
    pub(super) fn take_handle<P: Platform>(&mut self, platform: &P, mapping: Mapping) -> Option<u32> {
        let handle = self.free_handle;
        let word = self.handle_word(platform, handle)?;
        self.free_handle = word.swap(mapping.to_word() | BUSY, Ordering::Relaxed) as u32;
        self.mappings += 1;
        Some(handle)
    }

    /// What a handle names. [`Error::BadHandle`] when it is not in use, or busy.
    pub fn mapping<P: Platform>(&self, platform: &P, handle: u32) -> Result<Mapping, Error> {
        let word = self.handle_word(platform, handle).ok_or(Error::BadHandle)?;
        Mapping::from_word(word.load(Ordering::Relaxed)).ok_or(Error::BadHandle)
    }

    /// As [`GrantTable::mapping`], and makes the handle the caller's alone until [`GrantTable::set_mapping`].
    pub(super) fn claim_mapping<P: Platform>(&mut self, platform: &P, handle: u32) -> Result<Mapping, Error> {
        let mapping = self.mapping(platform, handle)?;
        if let Some(word) = self.handle_word(platform, handle) {
            word.fetch_or(BUSY, Ordering::Relaxed);
        }
        Ok(mapping)
    }

    /// Stores what is left of a mapping and ends the claim on it; one that is mapped in no way any more is freed.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn active_entries_keep_what_they_are_told() {
        for reach in [
            Reach::Page,
            Reach::Through,
            Reach::Part { start: 4096, end: 4096 },
            Reach::Part { start: 1, end: 9 },
        ] {
            let active = Active {
                pins: Pins::DEVICE_WRITE.plus(Pins::HOST_READ).unwrap(),
                user: DomId::new(0x7fef),
                frame: Mfn::new((1 << FRAME_BITS) - 1),
                reach,
            };
            assert_eq!(Active::from_words(active.to_words()), active);
        }
        assert_eq!(Active::from_words([0, 0]).reach, Reach::Page);
    }

    #[test]
    fn a_busy_handle_names_nothing() {
        let mapping =
            Mapping { granter: DomId::new(3), gref: GrantRef::new(u32::MAX), flags: MapFlags::HOST_MAP };
        assert_eq!(Mapping::from_word(mapping.to_word()), Some(mapping));
        assert_eq!(Mapping::from_word(mapping.to_word() | BUSY), None);
        assert_eq!(Mapping::from_word(7), None);
    }
}

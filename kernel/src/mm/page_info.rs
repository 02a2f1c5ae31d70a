//! The type word of a frame and its state machine, as a pure function.
//!
//! ```text
//!                  get (kind that needs no check)
//!          ┌───────────────────────────────────────────────┐   get, put (not the last),
//!          │                                               ▼   pin, unpin, lock, unlock
//!       ┌──────┐      last put (kind without entries)   ┌──────┐ ─┐
//!       │ Idle │ ◀───────────────────────────────────── │ Live │  │
//!       │ n=0  │                                        │ n>0  │ ◀┘
//!       └──────┘                                        └──────┘
//!        │    ▲                                        done ▲ │ last put
//!    get │    │ emptied                                     │ │ (page table)
//!        ▼    │                fail                         │ ▼
//!   ┌────────────┐ ─────────────────────────────────▶ ┌──────────────┐
//!   │ Working up │                                    │ Working down │
//!   └────────────┘ (done leads to Live,               └──────────────┘
//!        │     ▲    emptied to Idle)                     │       ▲
//!   park │     │ get of the same kind               park │       │ get of the same kind,
//!        ▼     │                                         ▼       │ help, abandon
//!   ┌─────────────────────────────────────────────────────────────────┐
//!   │ Parked: progress and direction are in the word, n = 1           │
//!   └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! *Working* is a lock: one CPU is checking the entries of the table (up) or giving them back (down), and nobody else gets
//! a reference meanwhile. Entries below `progress` hold their references, the others hold none. *Parked* is what a
//! preempted operation leaves behind. It needs nobody: the record itself holds one type reference (the count is 1) and one
//! general reference, so the frame can neither change kind nor be freed. Whoever comes next with an interest in the
//! table, the restarted hypercall or another one, takes the work over exactly where it stopped.
//!
//! Compare with `PGT_partial` in Xen, where the interrupted parent keeps part of the child's references and the bookkeeping
//! of who holds what was broken more than once (XSA-240, 287, 299): here an interrupted operation hands its references to
//! the child's record and keeps only a hint (`child`), which is allowed to be out of date.

use core::fmt;

use super::page_kind::Kind;

const COUNT_MASK: u64 = (1 << 23) - 1;
const FAILURE_SHIFT: u32 = 23;
const FAILURE_MASK: u64 = 7;
const KIND_SHIFT: u32 = 26;
const KIND_MASK: u64 = 15;
const VALIDATED: u64 = 1 << 30;
const WORKING: u64 = 1 << 31;
const PARKED: u64 = 1 << 32;
const DOWN: u64 = 1 << 33;
const PINNED: u64 = 1 << 34;
const LOCKED: u64 = 1 << 35;
const CHILD: u64 = 1 << 36;
const STAMP_SHIFT: u32 = 38;
const STAMP_MASK: u64 = (1 << 26) - 1;
const LINEAR_SHIFT: u32 = 38;
const LINEAR_MASK: u64 = 0xffff;
const PROGRESS_SHIFT: u32 = 54;
const PROGRESS_MASK: u64 = 1023;

/// Entries of a page table.
pub const ENTRIES: u16 = 512;

/// The type word: kind, type count and what else is atomic with them.
///
/// | bits | meaning |
/// |---|---|
/// | 0-22 | type count |
/// | 23-25 | why validation failed (working or parked, down), 0 for a demotion that nobody failed |
/// | 26-29 | kind |
/// | 30 | validated: references may be taken |
/// | 31 | working: somebody is checking or emptying the table |
/// | 32 | parked: progress is stored, nobody works |
/// | 33 | the work is emptying |
/// | 34 | pinned |
/// | 35 | locked for an entry update |
/// | 36 | the entry at `progress` may refer to a parked table (a hint) |
/// | 38-63 | idle: TLB clock when the last reference went |
/// | 38-53 | not idle: linear entries (positive) or uses as a linear table (negative) |
/// | 54-63 | working or parked: how many entries hold references |
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct TypeWord(u64);

/// Reading of the TLB clock (see [`super::tlb_debt`]) at which a frame lost its last reference of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u32);

impl Stamp {
    /// The clock runs modulo 2^26.
    pub const fn new(clock: u32) -> Stamp {
        Stamp(clock & STAMP_MASK as u32)
    }
    /// How far the clock went from `earlier` to this, modulo 2^26.
    pub const fn since(self, earlier: Stamp) -> u32 {
        self.0.wrapping_sub(earlier.0) & STAMP_MASK as u32
    }
}

/// Why the content of a frame was refused; kept in the record when the clean-up is preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Failure {
    /// An entry has bits a guest may not set, or refers to what it may not.
    Invalid = 1,
    /// A mapped frame is not the domain's, or cannot be had as needed.
    Busy = 2,
    /// Memory outside RAM for which the domain has no right.
    Permission = 3,
    /// Caching that the frame does not allow.
    Access = 4,
}

impl Failure {
    const fn from_bits(bits: u64) -> Option<Failure> {
        match bits {
            1 => Some(Failure::Invalid),
            2 => Some(Failure::Busy),
            3 => Some(Failure::Permission),
            4 => Some(Failure::Access),
            _ => None,
        }
    }
}

/// Work on the entries of a table, owned by whoever was given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Check entries from `progress` up.
    Up {
        /// The kind to check for.
        kind: Kind,
        /// First entry without reference.
        progress: u16,
    },
    /// Give back the references of entries below `progress`.
    Down {
        /// What the table was.
        kind: Kind,
        /// Entries below hold references.
        progress: u16,
        /// Whether entry `progress` may refer to a table that is parked: help it first.
        child: bool,
        /// Set when this undoes a failed validation.
        failure: Option<Failure>,
    },
}

/// What happens to a frame's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Take one reference of this kind.
    Get(Kind),
    /// Take one reference to a table of this kind that is in use already, for a linear entry in another table.
    GetLinear(Kind),
    /// Give one reference back.
    Put {
        /// Whether it was a linear one.
        linear: bool,
        /// TLB clock now.
        stamp: Stamp,
    },
    /// All entries were found good.
    Done,
    /// An entry was found bad; `progress` entries hold references, which the worker now gives back.
    Fail {
        /// Entries below hold references.
        progress: u16,
        /// Why.
        failure: Failure,
    },
    /// The worker has to stop here.
    Park {
        /// Entries below hold references.
        progress: u16,
        /// Whether the entry at `progress` may refer to a parked table.
        child: bool,
    },
    /// The last entry gave its reference back.
    Emptied {
        /// TLB clock now.
        stamp: Stamp,
    },
    /// Go on emptying, if that is what was interrupted; else nothing.
    Help,
    /// Empty what is parked, in whatever direction it was going: the domain is dying.
    Abandon,
    /// Make a reference survive the last use.
    Pin,
    /// Take that back.
    Unpin,
    /// Keep others from updating entries of this table.
    Lock,
    /// Let them.
    Unlock,
    /// One linear entry more in this table.
    LinearEntryAdded,
    /// One less.
    LinearEntryGone,
    /// The frame leaves its owner: forget the kind.
    Retire {
        /// TLB clock now.
        stamp: Stamp,
    },
}

/// What the caller has to do after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effects {
    /// Kind the frame had before, and since when it is free of it: stale translations may allow what the new kind forbids.
    pub retyped: Option<(Kind, Stamp)>,
    /// Work that the caller now owns.
    pub work: Option<Work>,
    /// The work was parked before: the record's general reference is the caller's now, to be kept while parked again and
    /// dropped when done.
    pub resumed: bool,
}

const NOTHING: Effects = Effects { retyped: None, work: None, resumed: false };

/// Why a step is refused; the word stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The frame is in use as this.
    WrongKind(Kind),
    /// More references than can be counted.
    Overflow,
    /// Another CPU works on it: try again.
    Wait,
    /// Not in a state for this.
    NotLive,
    /// Pinned already.
    Pinned,
    /// Not pinned.
    NotPinned,
    /// A table with linear entries is no linear table, nor the other way round.
    LinearChain,
    /// The accounting is wrong: going on could break isolation.
    Broken,
}

impl TypeWord {
    /// The word of a frame that nobody ever used.
    pub const NEW: TypeWord = TypeWord(0);

    /// The word of a page that the hypervisor writes and shares with a guest: writable for ever, hence never a table.
    pub const HYPERVISOR_PAGE: TypeWord = TypeWord((Kind::Writable as u64) << KIND_SHIFT | VALIDATED | 1);

    /// The word of a page that the hypervisor lets guests read: in use as what no guest may write, for ever.
    pub const READ_ONLY_PAGE: TypeWord = TypeWord((Kind::SegDesc as u64) << KIND_SHIFT | VALIDATED | 1);

    /// From and to memory.
    pub const fn from_bits(bits: u64) -> TypeWord {
        TypeWord(bits)
    }
    /// See [`TypeWord::from_bits`].
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// Number of type references.
    pub const fn count(self) -> u32 {
        (self.0 & COUNT_MASK) as u32
    }
    /// The kind; with a count of zero the one it had last.
    pub const fn kind(self) -> Kind {
        Kind::from_bits(self.0 >> KIND_SHIFT & KIND_MASK)
    }
    /// Whether references of the kind are in force.
    pub const fn is_live(self) -> bool {
        self.0 & VALIDATED != 0 && self.count() > 0
    }
    /// Whether nobody uses the frame as anything.
    pub const fn is_idle(self) -> bool {
        self.count() == 0 && self.0 & (WORKING | PARKED) == 0
    }
    /// Whether preempted work waits in the word.
    pub const fn is_parked(self) -> bool {
        self.0 & PARKED != 0
    }
    /// Whether a CPU checks or empties the table now.
    pub const fn is_working(self) -> bool {
        self.0 & WORKING != 0
    }
    /// Whether a pin holds it.
    pub const fn is_pinned(self) -> bool {
        self.0 & PINNED != 0
    }
    /// Whether an entry update is under way.
    pub const fn is_locked(self) -> bool {
        self.0 & LOCKED != 0
    }
    /// Whether preempted work names a child (see CHILD above).
    pub const fn has_child(self) -> bool {
        self.0 & CHILD != 0
    }
    /// Linear entries in this table (positive), or uses of it by other tables' linear entries (negative).
    pub const fn linear(self) -> i16 {
        (self.0 >> LINEAR_SHIFT & LINEAR_MASK) as u16 as i16
    }
    /// When it became idle.
    pub const fn stamp(self) -> Stamp {
        Stamp((self.0 >> STAMP_SHIFT & STAMP_MASK) as u32)
    }
    /// Entries that hold references, while parked.
    pub const fn progress(self) -> u16 {
        (self.0 >> PROGRESS_SHIFT & PROGRESS_MASK) as u16
    }

    /// The word after [`Event::Get`] of [`Kind::Writable`], if that is all there is to it: no debt, and nobody at work.
    #[inline]
    pub(super) fn plainly_writable(self) -> Option<TypeWord> {
        const LIVE: u64 = (Kind::Writable as u64) << KIND_SHIFT | VALIDATED;
        if self.0 == TypeWord::NEW.0 || self.is_idle() && self.kind() == Kind::Writable {
            return Some(TypeWord(LIVE | 1));
        }
        let plain = self.0 & !COUNT_MASK == LIVE && (1..COUNT_MASK).contains(&(self.0 & COUNT_MASK));
        plain.then_some(TypeWord(self.0 + 1))
    }

    /// The word after [`Event::Put`] of a [`Kind::Writable`] that is not locked, `None` for any other word.
    #[inline]
    pub(super) fn plainly_less_writable(self, stamp: Stamp) -> Option<TypeWord> {
        const LIVE: u64 = (Kind::Writable as u64) << KIND_SHIFT | VALIDATED;
        match self.0.checked_sub(LIVE)? {
            1 => Some(TypeWord::idle(Kind::Writable, stamp)),
            2..=COUNT_MASK => Some(TypeWord(self.0 - 1)),
            _ => None,
        }
    }

    const fn idle(kind: Kind, stamp: Stamp) -> TypeWord {
        TypeWord((kind as u64) << KIND_SHIFT | (stamp.0 as u64) << STAMP_SHIFT)
    }
    const fn with_progress(self, progress: u16) -> TypeWord {
        TypeWord(self.0 & !(PROGRESS_MASK << PROGRESS_SHIFT) | (progress as u64) << PROGRESS_SHIFT)
    }
    const fn with_linear(self, linear: i16) -> TypeWord {
        TypeWord(self.0 & !(LINEAR_MASK << LINEAR_SHIFT) | (linear as u16 as u64) << LINEAR_SHIFT)
    }
    const fn with_failure(self, failure: Failure) -> TypeWord {
        TypeWord(self.0 & !(FAILURE_MASK << FAILURE_SHIFT) | (failure as u64) << FAILURE_SHIFT)
    }
    const fn set(self, bits: u64) -> TypeWord {
        TypeWord(self.0 | bits)
    }
    const fn clear(self, bits: u64) -> TypeWord {
        TypeWord(self.0 & !bits)
    }
    const fn is_down(self) -> bool {
        self.0 & DOWN != 0
    }

    fn work(self) -> Work {
        if self.is_down() {
            Work::Down {
                kind: self.kind(),
                progress: self.progress(),
                child: self.0 & CHILD != 0,
                failure: Failure::from_bits(self.0 >> FAILURE_SHIFT & FAILURE_MASK),
            }
        } else {
            Work::Up { kind: self.kind(), progress: self.progress() }
        }
    }

    /// Takes over parked work.
    fn resume(self) -> (TypeWord, Effects) {
        (self.clear(PARKED).set(WORKING), Effects { work: Some(self.work()), resumed: true, ..NOTHING })
    }
}

impl fmt::Debug for TypeWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} x{}", self.kind(), self.count())?;
        for (bit, name) in [
            (VALIDATED, " validated"),
            (WORKING, " working"),
            (PARKED, " parked"),
            (DOWN, " down"),
            (PINNED, " pinned"),
            (LOCKED, " locked"),
        ] {
            if self.0 & bit != 0 {
                f.write_str(name)?;
            }
        }
        if !self.is_idle() && self.linear() != 0 {
            write!(f, " linear {}", self.linear())?;
        }
        if self.0 & (WORKING | PARKED) != 0 {
            write!(f, " at {}", self.progress())?;
        }
        Ok(())
    }
}

/// One step of the state machine: the next word and what the caller owes, or why not.
pub fn step(word: TypeWord, event: Event) -> Result<(TypeWord, Effects), Refusal> {
    step_of_known(word, event)
}

/// [`step`] for callers that always have the same event and are called for each entry of a table: what is left of it there is that
/// event's part.
#[inline(always)]
pub fn step_of_known(word: TypeWord, event: Event) -> Result<(TypeWord, Effects), Refusal> {
    let plain = |next: TypeWord| Ok((next, NOTHING));
    match event {
        Event::Get(kind) => get(word, kind),
        Event::GetLinear(kind) => {
            if !word.is_live() || word.kind() != kind {
                return Err(Refusal::WrongKind(word.kind()));
            }
            let linear = word.linear();
            if linear > 0 {
                return Err(Refusal::LinearChain);
            }
            if linear == i16::MIN || u64::from(word.count()) == COUNT_MASK {
                return Err(Refusal::Overflow);
            }
            plain(TypeWord(word.0 + 1).with_linear(linear - 1))
        }
        Event::Put { linear, stamp } => put(word, linear, stamp),
        Event::Done => {
            if !word.is_working() || word.is_down() {
                return Err(Refusal::Broken);
            }
            plain(word.clear(WORKING | CHILD).with_progress(0).set(VALIDATED))
        }
        Event::Fail { progress, failure } => {
            if !word.is_working() || word.is_down() {
                return Err(Refusal::Broken);
            }
            plain(word.set(DOWN).with_progress(progress).with_failure(failure))
        }
        Event::Park { progress, child } => {
            if !word.is_working() || progress > ENTRIES {
                return Err(Refusal::Broken);
            }
            let next = word.clear(WORKING | CHILD).set(PARKED).with_progress(progress);
            plain(if child { next.set(CHILD) } else { next })
        }
        Event::Emptied { stamp } => {
            if !word.is_working() || !word.is_down() || word.linear() != 0 {
                return Err(Refusal::Broken);
            }
            plain(TypeWord::idle(word.kind(), stamp))
        }
        Event::Help => {
            if word.is_parked() && word.is_down() {
                return Ok(word.resume());
            }
            plain(word)
        }
        Event::Abandon => {
            if !word.is_parked() {
                return plain(word);
            }
            Ok(word.set(DOWN).resume())
        }
        Event::Pin => {
            if !word.is_live() || !word.kind().is_table() {
                return Err(Refusal::NotLive);
            }
            if word.is_pinned() {
                return Err(Refusal::Pinned);
            }
            plain(word.set(PINNED))
        }
        Event::Unpin => {
            if !word.is_pinned() {
                return Err(Refusal::NotPinned);
            }
            plain(word.clear(PINNED))
        }
        Event::Lock => {
            if !word.is_live() {
                return Err(Refusal::NotLive);
            }
            if word.is_locked() {
                return Err(Refusal::Wait);
            }
            if u64::from(word.count()) == COUNT_MASK {
                return Err(Refusal::Overflow);
            }
            plain(TypeWord(word.0 + 1).set(LOCKED))
        }
        Event::Unlock => {
            if !word.is_locked() || word.count() < 2 {
                return Err(Refusal::Broken);
            }
            plain(TypeWord(word.0 - 1).clear(LOCKED))
        }
        Event::LinearEntryAdded => {
            let linear = word.linear();
            if word.is_idle() || word.is_parked() {
                return Err(Refusal::Broken);
            }
            if linear < 0 {
                return Err(Refusal::LinearChain);
            }
            if linear == i16::MAX {
                return Err(Refusal::Overflow);
            }
            plain(word.with_linear(linear + 1))
        }
        Event::LinearEntryGone => {
            let linear = word.linear();
            if word.is_idle() || linear <= 0 {
                return Err(Refusal::Broken);
            }
            plain(word.with_linear(linear - 1))
        }
        Event::Retire { stamp } => {
            if !word.is_idle() {
                return Err(Refusal::Broken);
            }
            plain(TypeWord::idle(Kind::None, stamp))
        }
    }
}

#[inline(always)]
fn get(word: TypeWord, kind: Kind) -> Result<(TypeWord, Effects), Refusal> {
    if word.is_idle() {
        let was = word.kind();
        let retyped = (was != kind && was != Kind::None).then(|| (was, word.stamp()));
        let next = TypeWord((kind as u64) << KIND_SHIFT | 1);
        return Ok(if kind.needs_validation() {
            let next = next.set(WORKING);
            (next, Effects { retyped, work: Some(next.work()), resumed: false })
        } else {
            (next.set(VALIDATED), Effects { retyped, ..NOTHING })
        });
    }
    if word.kind() != kind {
        return Err(Refusal::WrongKind(word.kind()));
    }
    if word.is_parked() {
        return Ok(word.resume());
    }
    if word.is_working() {
        return Err(Refusal::Wait);
    }
    if u64::from(word.count()) == COUNT_MASK {
        return Err(Refusal::Overflow);
    }
    Ok((TypeWord(word.0 + 1), NOTHING))
}

#[inline(always)]
fn put(word: TypeWord, linear: bool, stamp: Stamp) -> Result<(TypeWord, Effects), Refusal> {
    if !word.is_live() {
        return Err(Refusal::Broken);
    }
    if word.is_locked() && word.count() == 2 {
        // Only the update's own reference would be left, and giving that back must never be the last.
        return Err(Refusal::Wait);
    }
    let mut word = word;
    if linear {
        if word.linear() >= 0 {
            return Err(Refusal::Broken);
        }
        word = word.with_linear(word.linear() + 1);
    }
    if word.count() > 1 {
        return Ok((TypeWord(word.0 - 1), NOTHING));
    }
    if word.is_pinned() {
        return Err(Refusal::Broken);
    }
    if !word.kind().is_table() {
        return Ok((TypeWord::idle(word.kind(), stamp), NOTHING));
    }
    let next = word.clear(VALIDATED).set(WORKING | DOWN).with_progress(ENTRIES);
    Ok((next, Effects { work: Some(next.work()), ..NOTHING }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Stamp = Stamp::new(7);

    fn run(events: &[Event]) -> Result<TypeWord, (usize, Refusal)> {
        let mut word = TypeWord::NEW;
        for (i, e) in events.iter().enumerate() {
            word = step(word, *e).map_err(|r| (i, r))?.0;
        }
        Ok(word)
    }

    #[test]
    fn writable_and_table_exclude_each_other() {
        assert_eq!(
            run(&[Event::Get(Kind::Writable), Event::Get(Kind::L1)]),
            Err((1, Refusal::WrongKind(Kind::Writable)))
        );
        let word = run(&[Event::Get(Kind::L1), Event::Done]).expect("an empty table validates");
        assert_eq!(step(word, Event::Get(Kind::Writable)), Err(Refusal::WrongKind(Kind::L1)));
    }

    #[test]
    fn a_change_of_kind_names_the_old_one() {
        let word =
            run(&[Event::Get(Kind::Writable), Event::Put { linear: false, stamp: S }]).expect("counts");
        let (_, effects) = step(word, Event::Get(Kind::L1)).expect("idle");
        assert_eq!(effects.retyped, Some((Kind::Writable, S)));
        let (_, effects) = step(TypeWord::NEW, Event::Get(Kind::L1)).expect("new");
        assert_eq!(effects.retyped, None);
    }

    #[test]
    fn parked_work_is_taken_over_where_it_stopped() {
        let word = run(&[Event::Get(Kind::L2), Event::Park { progress: 17, child: false }]).expect("parks");
        assert!(word.is_parked() && !word.is_live());
        assert_eq!(step(word, Event::Get(Kind::L1)), Err(Refusal::WrongKind(Kind::L2)));
        let (word, effects) = step(word, Event::Get(Kind::L2)).expect("resumes");
        assert!(effects.resumed);
        assert_eq!(effects.work, Some(Work::Up { kind: Kind::L2, progress: 17 }));
        assert_eq!(step(word, Event::Get(Kind::L2)), Err(Refusal::Wait));
    }

    #[test]
    fn a_failure_survives_parking() {
        let word = run(&[
            Event::Get(Kind::L3),
            Event::Fail { progress: 3, failure: Failure::Busy },
            Event::Park { progress: 2, child: true },
        ])
        .expect("parks");
        let (word, effects) = step(word, Event::Help).expect("helps");
        assert_eq!(
            effects.work,
            Some(Work::Down { kind: Kind::L3, progress: 2, child: true, failure: Some(Failure::Busy) })
        );
        let (word, _) = step(word, Event::Emptied { stamp: S }).expect("empties");
        assert!(word.is_idle());
        assert_eq!(word.kind(), Kind::L3);
    }

    #[test]
    fn linear_tables_do_not_chain() {
        let live = run(&[Event::Get(Kind::L4), Event::Done]).expect("validates");
        let (used, _) = step(live, Event::GetLinear(Kind::L4)).expect("first use");
        assert_eq!(step(used, Event::LinearEntryAdded), Err(Refusal::LinearChain));
        let (has, _) = step(live, Event::LinearEntryAdded).expect("first entry");
        assert_eq!(step(has, Event::GetLinear(Kind::L4)), Err(Refusal::LinearChain));
        let (back, _) = step(used, Event::Put { linear: true, stamp: S }).expect("returns");
        assert_eq!(back, live);
    }

    #[test]
    fn the_short_ways_go_where_the_long_one_does() {
        let put = Event::Put { linear: false, stamp: S };
        let mut words = alloc::vec![TypeWord::NEW, TypeWord::HYPERVISOR_PAGE, TypeWord::READ_ONLY_PAGE];
        for kind in [Kind::Writable, Kind::L1, Kind::L4, Kind::SegDesc] {
            words.push(TypeWord::idle(kind, S));
            for count in [0, 1, 2, 3, COUNT_MASK - 1, COUNT_MASK] {
                for flags in [0, WORKING, PARKED, DOWN, PINNED, LOCKED, CHILD, 1 << LINEAR_SHIFT] {
                    for live in [0, VALIDATED] {
                        words.push(TypeWord((kind as u64) << KIND_SHIFT | count | flags | live));
                    }
                }
            }
        }
        let (mut taken, mut given) = (0, 0);
        for word in words {
            if let Some(next) = word.plainly_writable() {
                taken += 1;
                assert_eq!(step(word, Event::Get(Kind::Writable)), Ok((next, NOTHING)), "{word:?}");
            }
            if let Some(next) = word.plainly_less_writable(S) {
                given += 1;
                assert_eq!(step(word, put), Ok((next, NOTHING)), "{word:?}");
            }
        }
        assert!(taken > 4 && given > 4, "{taken} {given}");
    }

    #[test]
    fn counts_do_not_wrap() {
        let full = TypeWord(((Kind::Writable as u64) << KIND_SHIFT) | VALIDATED | COUNT_MASK);
        assert_eq!(step(full, Event::Get(Kind::Writable)), Err(Refusal::Overflow));
        assert_eq!(step(full, Event::Lock), Err(Refusal::Overflow));
    }

    #[test]
    fn the_lock_is_never_the_last_reference() {
        let word = run(&[Event::Get(Kind::L1), Event::Done, Event::Lock]).expect("locks");
        assert_eq!(step(word, Event::Put { linear: false, stamp: S }), Err(Refusal::Wait));
        assert_eq!(step(word, Event::Lock), Err(Refusal::Wait));
        let (word, _) = step(word, Event::Unlock).expect("unlocks");
        assert_eq!((word.count(), word.is_locked()), (1, false));
    }

    #[test]
    fn a_pin_is_not_counted_twice() {
        let word = run(&[Event::Get(Kind::L1), Event::Done, Event::Pin]).expect("pins");
        assert_eq!(step(word, Event::Pin), Err(Refusal::Pinned));
        assert_eq!(step(word, Event::Put { linear: false, stamp: S }), Err(Refusal::Broken));
        let (word, _) = step(word, Event::Unpin).expect("unpins");
        assert_eq!(step(word, Event::Unpin), Err(Refusal::NotPinned));
    }
}

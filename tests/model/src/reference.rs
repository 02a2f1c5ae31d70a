//! What each operation should do, in the simplest words.
//!
//! The whole state is one vector that is copied before an operation which may fail half-way, and put back if it does.
//! There is no preemption, no flushing, no list: only who owns what, what is used as what, and what the words are.

use hv::mm::{Failure, Store};
use hypercall_abi::{DomId, Mfn};

use crate::world::{Outcome, Step};
use crate::{Hold, SLOTS};

const PRESENT: u64 = 1;
const RW: u64 = 2;
const USER: u64 = 4;
const A_D: u64 = 0x60;
const GLOBAL: u64 = 0x100;
const LARGE: u64 = 0x80;
const KERNEL: u64 = 1 << 52;
const LOG: u64 = 3 << 53;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What a frame is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A page table of this level.
    Table(u8),
    /// Descriptors.
    Descriptors,
    /// Written.
    Data,
}

/// A frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its owner.
    pub owner: Option<u16>,
    /// All references.
    pub refs: u32,
    /// References as what `used` says; it means something only above 0.
    pub typed: u32,
    /// See `typed`.
    pub used: Use,
    /// Checked, so that others may refer to it.
    ready: bool,
    /// Pinned.
    pub pinned: bool,
    /// The owner's own reference is not given back yet.
    given: bool,
    /// Linear entries in it, or (negative) to it.
    linear: i32,
    /// The words at [`SLOTS`].
    pub words: [u64; SLOTS.len()],
}

/// The state.
#[derive(Clone)]
pub struct Reference {
    /// All frames.
    pub frames: Vec<Frame>,
    holds: Vec<(usize, Hold)>,
    roots: Vec<[Option<usize>; 2]>,
    ids: Vec<u16>,
}

type Answer = Result<(), Failure>;
const BAD: Answer = Err(Failure::Invalid);

impl Reference {
    /// `frames` free frames, and domains with these numbers.
    pub fn new(frames: u64, ids: Vec<u16>) -> Reference {
        let free = Frame {
            owner: None,
            refs: 0,
            typed: 0,
            used: Use::Data,
            ready: false,
            pinned: false,
            given: false,
            linear: 0,
            words: [0; SLOTS.len()],
        };
        Reference {
            frames: vec![free; frames as usize],
            holds: Vec::new(),
            roots: vec![[None; 2]; ids.len()],
            ids,
        }
    }

    /// What `step` should do. Which frame an allocation gives is the world's choice: `gave`.
    pub fn apply(&mut self, step: &Step, gave: Option<Mfn>) -> Outcome {
        let before = self.clone();
        let result = self.act(step, gave);
        if let Outcome::Failed(_) | Outcome::Differs = result {
            // Entries that were found good before the bad one stay as the hypervisor writes them.
            let words: Vec<_> = self.frames.iter().map(|f| f.words).collect();
            *self = before;
            for (frame, words) in self.frames.iter_mut().zip(words) {
                frame.words = words;
            }
        }
        result
    }

    fn act(&mut self, step: &Step, gave: Option<Mfn>) -> Outcome {
        let answer = match *step {
            Step::Allocate { dom } => {
                let Some(mfn) = gave else { return Outcome::None };
                self.give(mfn, self.ids[dom]);
                return Outcome::Gave(mfn);
            }
            Step::Free { owner, mfn } => {
                if self.owned(mfn, owner).is_none() {
                    return Outcome::None;
                }
                self.take_given(index(mfn));
                Ok(())
            }
            Step::Write { mfn, slot, word } => {
                let frame = &mut self.frames[index(mfn)];
                if frame.typed == 0 || frame.used != Use::Data {
                    return Outcome::None;
                }
                frame.words[place(slot)] = word;
                Ok(())
            }
            Step::Update { tables, frames, mfn, slot, word, store } => {
                return self.update(tables, frames, mfn, slot, word, store);
            }
            Step::Pin { owner, mfn, level } => self.pin(owner, mfn, level as u8),
            Step::Unpin { owner, mfn } => match self.owned(mfn, owner) {
                Some(f) if self.frames[f].pinned => {
                    self.frames[f].pinned = false;
                    self.drop_typed(f);
                    Ok(())
                }
                _ => BAD,
            },
            Step::Root { dom, which, mfn } => self.root(dom, which, mfn),
            Step::Hold { owner, mfn, how } => match self.owned(mfn, owner) {
                None => BAD,
                Some(f) => {
                    let taken = match how {
                        Hold::Reads => Ok(()),
                        Hold::Writes => self.take(f, Use::Data),
                        Hold::Descriptors => self.take(f, Use::Descriptors),
                    };
                    if taken.is_ok() {
                        self.frames[f].refs += 1;
                        self.holds.push((f, how));
                    }
                    taken
                }
            },
            Step::Release { index } => {
                let (f, how) = self.holds.swap_remove(index);
                match how {
                    Hold::Reads => self.drop_plain(f),
                    _ => self.drop_typed(f),
                }
                Ok(())
            }
            Step::Exchange { dom, mfn } => {
                let owner = DomId::new(self.ids[dom]);
                let Some(f) = self.owned(mfn, owner) else { return Outcome::None };
                let unused = self.frames[f].given && self.frames[f].refs == 1;
                match gave {
                    Some(fresh) if unused => {
                        self.take_given(f);
                        self.give(fresh, owner.get());
                        return Outcome::Gave(fresh);
                    }
                    _ if unused => return Outcome::None,
                    _ => BAD,
                }
            }
            Step::Transfer { dom, mfn, to } => {
                let Some(f) = self.owned(mfn, DomId::new(self.ids[dom])) else { return Outcome::None };
                if !(self.frames[f].given && self.frames[f].refs == 1) {
                    return Outcome::Failed(Failure::Invalid);
                }
                let words = self.frames[f].words;
                self.take_given(f);
                let Some(mfn) = gave else { return Outcome::None };
                self.give(mfn, self.ids[to]);
                self.frames[f].words = words;
                return Outcome::Gave(mfn);
            }
            Step::Flush => Ok(()),
            Step::Kill { dom } => {
                for root in std::mem::take(&mut self.roots[dom]).into_iter().flatten() {
                    self.drop_typed(root);
                }
                for f in 0..self.frames.len() {
                    if self.frames[f].owner == Some(self.ids[dom]) && self.frames[f].pinned {
                        self.frames[f].pinned = false;
                        self.drop_typed(f);
                    }
                }
                for f in 0..self.frames.len() {
                    if self.frames[f].owner == Some(self.ids[dom]) && self.frames[f].given {
                        self.take_given(f);
                    }
                }
                Ok(())
            }
            Step::Rebirth { .. } => Ok(()),
        };
        match answer {
            Ok(()) => Outcome::Done,
            Err(failure) => Outcome::Failed(failure),
        }
    }

    fn give(&mut self, mfn: Mfn, owner: u16) {
        let frame = &mut self.frames[index(mfn)];
        assert_eq!(frame.refs, 0, "{mfn:?} is given out in use");
        frame.owner = Some(owner);
        frame.refs = 1;
        frame.given = true;
        frame.words = [0; SLOTS.len()];
    }

    fn take_given(&mut self, f: usize) {
        if self.frames[f].given {
            self.frames[f].given = false;
            self.drop_plain(f);
        }
    }

    fn owned(&self, mfn: Mfn, owner: DomId) -> Option<usize> {
        let f = index(mfn);
        (self.frames.get(f)?.owner == Some(owner.get())).then_some(f)
    }

    // ── references ──

    fn drop_plain(&mut self, f: usize) {
        self.frames[f].refs -= 1;
        if self.frames[f].refs == 0 {
            self.frames[f].owner = None;
        }
    }

    /// Gives back a reference as what the frame is used as, together with a plain one.
    fn drop_typed(&mut self, f: usize) {
        self.frames[f].typed -= 1;
        if self.frames[f].typed == 0 {
            self.unmake(f, SLOTS.len());
        }
        self.drop_plain(f);
    }

    /// The entries of what was a table, the first `n` of those that count, give their references back.
    fn unmake(&mut self, f: usize, n: usize) {
        self.frames[f].ready = false;
        let Use::Table(level) = self.frames[f].used else { return };
        for s in 0..n {
            if is_ours(level, s) {
                continue;
            }
            self.drop_entry(f, level, self.frames[f].words[s]);
        }
        if level == 4 {
            self.frames[f].words[place(256)] = 0;
        }
    }

    fn drop_entry(&mut self, table: usize, level: u8, word: u64) {
        if word & PRESENT == 0 {
            return;
        }
        let f = target(word);
        if level == 1 {
            if word & RW != 0 { self.drop_typed(f) } else { self.drop_plain(f) }
        } else if f != table {
            if self.frames[f].used == Use::Table(level) {
                self.frames[f].linear += 1;
                self.frames[table].linear -= 1;
            }
            self.drop_typed(f);
        }
    }

    /// Takes a reference as `wanted`; a table's entries are checked if it is the first.
    fn take(&mut self, f: usize, wanted: Use) -> Answer {
        if self.frames[f].typed > 0 {
            if self.frames[f].used != wanted {
                return BAD;
            }
            self.frames[f].typed += 1;
            return Ok(());
        }
        self.frames[f].used = wanted;
        self.frames[f].typed = 1;
        match wanted {
            Use::Data => {}
            Use::Descriptors => {
                for s in 0..SLOTS.len() {
                    match hv::trap::descriptor::sanitise(self.frames[f].words[s]) {
                        Some(safe) => self.frames[f].words[s] = safe,
                        None => return BAD,
                    }
                }
            }
            Use::Table(level) => {
                for s in 0..SLOTS.len() {
                    let word = self.frames[f].words[s];
                    if is_ours(level, s) || word & PRESENT == 0 {
                        continue;
                    }
                    let owner = self.frames[f].owner;
                    let adjusted = self.take_entry(f, level, word, owner);
                    match adjusted {
                        Ok(adjusted) => self.frames[f].words[s] = adjusted,
                        Err(failure) => {
                            if level == 4 {
                                self.frames[f].words[place(256)] = 0;
                            }
                            return Err(failure);
                        }
                    }
                }
            }
        }
        self.frames[f].ready = true;
        Ok(())
    }

    /// Checks a present entry for a table and takes its references. Returns the word to store.
    fn take_entry(&mut self, table: usize, level: u8, word: u64, owner: Option<u16>) -> Result<u64, Failure> {
        if word & LARGE != 0 || level > 1 && word & GLOBAL != 0 {
            return Err(Failure::Invalid);
        }
        let f = target(word);
        let mine = self.frames[f].owner == owner;
        if level == 1 {
            if !mine {
                return Err(Failure::Busy);
            }
            if word & RW != 0 {
                self.take(f, Use::Data).map_err(|_| Failure::Busy)?;
            }
            self.frames[f].refs += 1;
            return Ok(adjusted(level, word));
        }
        if f == table {
            return if word & RW == 0 { Ok(adjusted(level, word)) } else { Err(Failure::Invalid) };
        }
        if !mine {
            return Err(Failure::Invalid);
        }
        let linear = self.frames[f].typed > 0 && self.frames[f].used == Use::Table(level);
        if linear {
            let chains = self.frames[f].linear > 0 || self.frames[table].linear < 0;
            if word & RW != 0 || !self.frames[f].ready || chains {
                return Err(Failure::Invalid);
            }
            self.frames[f].typed += 1;
            self.frames[f].linear -= 1;
            self.frames[table].linear += 1;
        } else {
            self.take(f, Use::Table(level - 1))?;
        }
        self.frames[f].refs += 1;
        Ok(adjusted(level, word))
    }

    // ── operations ──

    fn pin(&mut self, owner: DomId, mfn: Mfn, level: u8) -> Answer {
        let Some(f) = self.owned(mfn, owner) else { return BAD };
        self.take(f, Use::Table(level))?;
        if self.frames[f].pinned {
            self.frames[f].typed -= 1;
            return BAD;
        }
        self.frames[f].pinned = true;
        self.frames[f].refs += 1;
        Ok(())
    }

    fn root(&mut self, dom: usize, which: usize, mfn: Option<Mfn>) -> Answer {
        let old = self.roots[dom][which];
        let new = mfn.map(index);
        if old == new {
            return Ok(());
        }
        if let Some(mfn) = mfn {
            let Some(f) = self.owned(mfn, DomId::new(self.ids[dom])) else { return BAD };
            self.take(f, Use::Table(4))?;
            self.frames[f].refs += 1;
        }
        self.roots[dom][which] = new;
        if let Some(old) = old {
            self.drop_typed(old);
        }
        Ok(())
    }

    fn update(
        &mut self,
        tables: DomId,
        frames: DomId,
        mfn: Mfn,
        slot: usize,
        word: u64,
        store: Store,
    ) -> Outcome {
        let Some(f) = self.owned(mfn, tables) else { return Outcome::Failed(Failure::Invalid) };
        let s = place(slot);
        let old = self.frames[f].words[s];
        let matches = match store {
            Store::IfEqual(expected) => expected.bits() == old,
            _ => true,
        };
        // Accessed and dirty bits that are kept.
        let kept = if store == Store::PreserveAccessedDirty { old & A_D } else { 0 };
        let level = match (self.frames[f].typed, self.frames[f].used) {
            (0, _) | (_, Use::Data) => {
                if !matches {
                    return Outcome::Differs;
                }
                self.frames[f].words[s] = word | kept;
                return Outcome::Done;
            }
            (_, Use::Descriptors) => return Outcome::Failed(Failure::Invalid),
            (_, Use::Table(level)) => level,
        };
        let exchange = matches!(store, Store::IfEqual(_));
        if level > 1 && (frames != tables || exchange) || is_ours(level, s) {
            return Outcome::Failed(Failure::Invalid);
        }
        let stored = if word & PRESENT == 0 {
            word
        } else {
            match self.take_entry(f, level, word, Some(frames.get())) {
                Ok(stored) => stored,
                // An entry that only changes harmless bits is never a new mapping: whose frame it is does not matter then.
                Err(failure) => {
                    let harmless = A_D | USER | 0xe00 | KERNEL | LOG | 0xff << 55 | 1 << 63;
                    let same = old & PRESENT != 0 && (old ^ adjusted(level, word)) & !harmless == 0;
                    let flags_good = word & LARGE == 0 && (level == 1 || word & GLOBAL == 0);
                    // What the entry had compared with: for a compare-and-exchange what it was expected to be.
                    if !(same && flags_good && matches) {
                        return Outcome::Failed(failure);
                    }
                    self.frames[f].words[s] = adjusted(level, word) | kept;
                    return Outcome::Done;
                }
            }
        };
        if !matches {
            return Outcome::Differs;
        }
        self.frames[f].words[s] = stored | kept;
        self.drop_entry(f, level, old);
        Outcome::Done
    }
}

fn index(mfn: Mfn) -> usize {
    mfn.get() as usize
}

fn target(word: u64) -> usize {
    ((word & ADDRESS) >> 12) as usize
}

fn place(slot: usize) -> usize {
    SLOTS.iter().position(|s| *s == slot).expect("a slot of the test")
}

fn is_ours(level: u8, s: usize) -> bool {
    level == 4 && (256..272).contains(&SLOTS[s])
}

/// The word the hypervisor stores for a present entry.
fn adjusted(level: u8, word: u64) -> u64 {
    let word = word & !(GLOBAL | LOG);
    match level {
        1 if word & USER == 0 => word | USER | KERNEL,
        1 => word,
        4 => word | USER | 0x20,
        _ => word | USER,
    }
}

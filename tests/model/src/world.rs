//! The real core with a few domains, a model TLB, and a record of every reference the test itself holds.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv::access::Rights;
use hv::domain::{Domain, DomainConfig};
use hv::hypercall::Budget;
use hv::hypervisor::Hypervisor;
use hv::mm::mutants::Mutant;
use hv::mm::update::NotUpdated;
use hv::mm::{
    Failure, FrameRecord, Kind, Level, MapRights, Memory, Owner, Pte, Stop, Store, TlbDebt, Unfinished,
};
use hv::page_ref::{SegDesc, Writable};
use hv::platform::sim::SimMachine;
use hv::platform::{Platform, TlbFlush};
use hypercall_abi::{DomId, Mfn};

use crate::{DOMAINS, Entry, Hold, Op, SLOTS, Way, preferred};

/// Frames of the machine.
pub const FRAMES: u64 = 96;
/// Frames a domain may have.
pub const MAX_PAGES: u64 = 30;
/// Frames a domain is born with.
const BORN_WITH: usize = 24;

/// What a cached translation allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reading the frame.
    Read,
    /// Writing it.
    Write,
    /// Walking through it as a page table.
    Table,
}

/// All translations that a processor could have cached since the last flush: everything that any table in force said.
#[derive(Default)]
pub struct Tlb {
    cached: HashSet<(u64, Access)>,
}

impl Tlb {
    /// Forgets everything, and caches at once what the tables say now.
    fn flush(&mut self, hv: &Hypervisor<SimMachine>) {
        self.cached.clear();
        self.learn(hv);
    }

    /// Caches what the tables say.
    fn learn(&mut self, hv: &Hypervisor<SimMachine>) {
        for table in (0..FRAMES).map(Mfn::new) {
            let Some(word) = hv.mm.type_word(table) else { continue };
            let Some(level) = word.kind().level() else { continue };
            if !word.is_live() || hv.mm.general_count(table) == 0 {
                continue;
            }
            for pte in entries(hv, table, level).filter(|p| p.is_present()) {
                if hv.mm.owner(pte.mfn()) != Owner::NotRam {
                    let access = match level {
                        Level::L1 if pte.is_writable() => Access::Write,
                        Level::L1 => Access::Read,
                        _ => Access::Table,
                    };
                    self.cached.insert((pte.mfn().get(), access));
                }
            }
        }
    }

    /// Whether a translation to this frame may be cached.
    pub fn reaches(&self, mfn: Mfn) -> bool {
        [Access::Read, Access::Write, Access::Table].iter().any(|a| self.cached.contains(&(mfn.get(), *a)))
    }

    /// All that is cached.
    pub fn cached(&self) -> impl Iterator<Item = (Mfn, Access)> + '_ {
        self.cached.iter().map(|(mfn, access)| (Mfn::new(*mfn), *access))
    }
}

/// The guest's entries of a table; no others are ever written.
pub fn entries<'a>(
    hv: &'a Hypervisor<SimMachine>,
    table: Mfn,
    level: Level,
) -> impl Iterator<Item = Pte> + 'a {
    SLOTS
        .iter()
        .filter(move |slot| level != Level::L4 || !(256..272).contains(*slot))
        .map(move |slot| Pte::from_bits(hv.platform.frame(table)[*slot].load(Ordering::Relaxed)))
}

/// A domain of the test.
pub struct Dom {
    /// Its number.
    pub id: DomId,
    /// The real one.
    pub domain: Arc<Domain>,
    /// Frames it was given and has not given back, in the order in which operations name them.
    pub frames: Vec<Mfn>,
    /// Roots of its one vCPU.
    pub roots: [Option<Mfn>; 2],
    /// Frames it has pinned.
    pub pins: HashSet<u64>,
    /// Whether it is dying, until nothing refers to its memory.
    pub dying: bool,
}

/// No domain of the test may map devices.
pub struct NoDevices;

impl MapRights for NoDevices {
    fn may_map_io(&self, _: DomId, _: Mfn) -> bool {
        false
    }
    fn may_choose_caching(&self, _: DomId) -> bool {
        false
    }
}

/// An operation with everything named: the same for the worlds and the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// See [`Op`]; frames, domains (by index) and words are final.
    Allocate {
        dom: usize,
    },
    Free {
        owner: DomId,
        mfn: Mfn,
    },
    Write {
        mfn: Mfn,
        slot: usize,
        word: u64,
    },
    Update {
        tables: DomId,
        frames: DomId,
        mfn: Mfn,
        slot: usize,
        word: u64,
        store: Store,
    },
    Pin {
        owner: DomId,
        mfn: Mfn,
        level: Level,
    },
    Unpin {
        owner: DomId,
        mfn: Mfn,
    },
    Root {
        dom: usize,
        which: usize,
        mfn: Option<Mfn>,
    },
    Hold {
        owner: DomId,
        mfn: Mfn,
        how: Hold,
    },
    Release {
        index: usize,
    },
    Exchange {
        dom: usize,
        mfn: Mfn,
    },
    Transfer {
        dom: usize,
        mfn: Mfn,
        to: usize,
    },
    Flush,
    Kill {
        dom: usize,
    },
    Rebirth {
        dom: usize,
    },
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// Done, and this is the frame that was given.
    Gave(Mfn),
    /// Nothing to give.
    None,
    /// Refused.
    Failed(Failure),
    /// A compare-and-exchange found something else.
    Differs,
}

/// The core, its domains, and what the test holds.
pub struct World {
    /// The real thing.
    pub hv: Arc<Hypervisor<SimMachine>>,
    /// The domains, by index.
    pub doms: Vec<Dom>,
    /// References outside page tables.
    pub holds: Vec<(Mfn, Hold)>,
    tlb: Arc<Mutex<Tlb>>,
    /// Steps an operation may do before it is preempted.
    steps: u32,
    /// How often something was preempted.
    pub preemptions: u64,
    /// Whether an operation that is preempted is never gone on with: the guest does something else.
    pub hasty: bool,
}

impl World {
    /// A machine with `DOMAINS` domains. Operations are preempted after `steps` steps (`u32::MAX`: never).
    pub fn new(steps: u32) -> World {
        World::with_bug(steps, None)
    }

    /// As [`World::new`], with a bug put into the core.
    pub fn with_bug(steps: u32, bug: Option<Mutant>) -> World {
        let records: &'static [FrameRecord] =
            Box::leak((0..FRAMES).map(|_| FrameRecord::new()).collect::<Vec<_>>().into_boxed_slice());
        let m2p: &'static [AtomicU64] =
            Box::leak((0..FRAMES).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().into_boxed_slice());
        let memory = Memory::new(records, m2p);
        memory.declare_ram(Mfn::new(0), FRAMES);
        memory.add_free(Mfn::new(0), FRAMES);
        memory.mutants().choose(bug);
        let hv = Arc::new(Hypervisor::new(SimMachine::new(FRAMES as usize), memory));
        let tlb = Arc::new(Mutex::new(Tlb::default()));
        let (weak, cache) = (Arc::downgrade(&hv), tlb.clone());
        hv.platform.on_flush(Box::new(move |what| {
            if let (TlbFlush::All, Some(hv)) = (what, weak.upgrade()) {
                lock(&cache).flush(&hv);
            }
        }));
        let mut world =
            World { hv, doms: Vec::new(), holds: Vec::new(), tlb, steps, preemptions: 0, hasty: false };
        for index in 0..DOMAINS {
            let dom = world.bear(DomId::new(index + 1));
            world.doms.push(dom);
        }
        for index in 0..usize::from(DOMAINS) {
            for _ in 0..BORN_WITH {
                world.apply(&Step::Allocate { dom: index });
            }
        }
        world
    }

    fn bear(&self, id: DomId) -> Dom {
        let domain = Arc::new(Domain::new(
            DomainConfig {
                id,
                handle: [0; 16],
                vcpus: 1,
                max_pages: MAX_PAGES,
                rights: Rights::none(),
                shared_info: Mfn::new(0),
            },
            &self.hv.platform,
        ));
        assert!(self.hv.domains.insert(domain.clone()), "the number is free");
        Dom { id, domain, frames: Vec::new(), roots: [None; 2], pins: HashSet::new(), dying: false }
    }

    /// The model TLB.
    pub fn tlb(&self) -> MutexGuard<'_, Tlb> {
        lock(&self.tlb)
    }

    fn budget(&self) -> Budget {
        if self.steps == u32::MAX { Budget::unlimited() } else { Budget::new(self.steps) }
    }

    /// Runs an operation again until it is not preempted any more.
    fn until_done<T>(
        &mut self,
        mut op: impl FnMut(&Self, &mut Budget) -> Result<T, Stop>,
    ) -> Result<T, Failure> {
        for _ in 0..100_000 {
            match op(self, &mut self.budget()) {
                Ok(value) => return Ok(value),
                Err(Stop::Failed(failure)) => return Err(failure),
                Err(Stop::Preempted) => self.preemptions += 1,
            }
            if self.hasty {
                return Err(Failure::Busy);
            }
        }
        panic!("an operation never ends");
    }

    fn finish(&mut self, left: Option<Unfinished>) {
        let Some(Unfinished(mfn)) = left else { return };
        self.preemptions += 1;
        if self.hasty {
            return;
        }
        let done = self.until_done(|w, budget| w.hv.pager().help(mfn, budget).map_err(|_| Stop::Preempted));
        assert_eq!(done, Ok(()));
    }

    // ── naming ──

    fn live(&self, dom: u8) -> Option<usize> {
        let index = usize::from(dom) % self.doms.len();
        (!self.doms[index].dying).then_some(index)
    }

    fn frame(&self, dom: usize, place: u8) -> Option<Mfn> {
        let frames = &self.doms[dom].frames;
        (!frames.is_empty()).then(|| frames[usize::from(place) % frames.len()])
    }

    /// A frame for an entry of the table at `place`: mostly one of the level below.
    fn entry_frame(&self, dom: usize, place: usize, entry: &Entry) -> Option<Mfn> {
        let frames = &self.doms[dom].frames;
        if entry.frame >= 200 {
            return self.frame(dom, entry.frame);
        }
        let wanted = match preferred(place) {
            Some(Level::L4) => Some(Level::L3),
            Some(Level::L3) => Some(Level::L2),
            Some(Level::L2) => Some(Level::L1),
            _ => None,
        };
        let fitting: Vec<Mfn> =
            (0..frames.len()).filter(|p| preferred(*p) == wanted).map(|p| frames[p]).collect();
        (!fitting.is_empty()).then(|| fitting[usize::from(entry.frame) % fitting.len()])
    }

    /// Gives an operation its names here and now. `None` when it means nothing.
    pub fn name(&self, op: &Op) -> Option<Step> {
        let slot_of = |slot: u8| SLOTS[usize::from(slot) % SLOTS.len()];
        Some(match op {
            Op::Allocate { dom } => Step::Allocate { dom: self.live(*dom)? },
            Op::Free { dom, frame } => {
                let dom = self.live(*dom)?;
                Step::Free { owner: self.doms[dom].id, mfn: self.frame(dom, *frame)? }
            }
            Op::Write { dom, frame, slot, entry } => {
                let dom = self.live(*dom)?;
                let place = usize::from(*frame) % self.doms[dom].frames.len().max(1);
                let mfn = self.frame(dom, *frame)?;
                let word = entry.word(self.entry_frame(dom, place, entry)?);
                Step::Write { mfn, slot: slot_of(*slot), word }
            }
            Op::Update { dom, table, slot, entry, store } => {
                let dom = self.live(*dom)?;
                let place = usize::from(*table) % self.doms[dom].frames.len().max(1);
                let mfn = self.frame(dom, *table)?;
                let id = self.doms[dom].id;
                let slot = slot_of(*slot);
                let word = entry.word(self.entry_frame(dom, place, entry)?);
                let now = self.hv.platform.frame(mfn)[slot].load(Ordering::Relaxed);
                let store = match store {
                    Way::Plain => Store::Plain,
                    Way::Preserve => Store::PreserveAccessedDirty,
                    Way::Same => Store::IfEqual(Pte::from_bits(now)),
                    Way::Other => Store::IfEqual(Pte::from_bits(now ^ 0x400)),
                };
                Step::Update { tables: id, frames: id, mfn, slot, word, store }
            }
            Op::Foreign { dom, table, slot, entry } => {
                let other = self.live(*dom).filter(|d| *d != 0)?;
                self.live(0)?;
                let mfn = self.frame(0, *table)?;
                let word = entry.word(self.frame(other, entry.frame)?);
                let (tables, frames) = (self.doms[0].id, self.doms[other].id);
                Step::Update { tables, frames, mfn, slot: slot_of(*slot), word, store: Store::Plain }
            }
            Op::Pin { dom, frame, level, as_other } => {
                let dom = self.live(*dom)?;
                let place = usize::from(*frame) % self.doms[dom].frames.len().max(1);
                let mfn = self.frame(dom, *frame)?;
                let other = Level::from_number(u64::from(level % 4) + 1)?;
                let level = if *level < 64 { other } else { preferred(place).unwrap_or(other) };
                let owner = if *as_other { (dom + 1) % self.doms.len() } else { dom };
                Step::Pin { owner: self.doms[owner].id, mfn, level }
            }
            Op::Unpin { dom, frame } => {
                let dom = self.live(*dom)?;
                // Mostly one that is pinned.
                let pinned: Vec<Mfn> =
                    self.doms[dom].frames.iter().copied().filter(|m| self.hv.mm.is_pinned(*m)).collect();
                let mfn = if pinned.is_empty() || *frame >= 200 {
                    self.frame(dom, *frame)?
                } else {
                    pinned[usize::from(*frame) % pinned.len()]
                };
                Step::Unpin { owner: self.doms[dom].id, mfn }
            }
            Op::Root { dom, which, frame } => {
                let dom = self.live(*dom)?;
                let mfn = match frame {
                    None => None,
                    Some(frame) => {
                        let roots: Vec<Mfn> = (0..self.doms[dom].frames.len())
                            .filter(|p| preferred(*p) == Some(Level::L4) || *frame >= 200)
                            .map(|p| self.doms[dom].frames[p])
                            .collect();
                        Some(*roots.get(usize::from(*frame) % roots.len().max(1))?)
                    }
                };
                Step::Root { dom, which: usize::from(*which), mfn }
            }
            Op::Hold { dom, frame, how } => {
                let dom = self.live(*dom)?;
                Step::Hold { owner: self.doms[dom].id, mfn: self.frame(dom, *frame)?, how: *how }
            }
            Op::Release { index } => {
                if self.holds.is_empty() {
                    return None;
                }
                Step::Release { index: usize::from(*index) % self.holds.len() }
            }
            Op::Exchange { dom, frame } => {
                let dom = self.live(*dom)?;
                Step::Exchange { dom, mfn: self.frame(dom, *frame)? }
            }
            Op::Transfer { dom, frame, to } => {
                let dom = self.live(*dom)?;
                Step::Transfer { dom, mfn: self.frame(dom, *frame)?, to: self.live(*to)? }
            }
            Op::Flush => Step::Flush,
            Op::Kill { dom } => match self.live(*dom) {
                Some(dom) => Step::Kill { dom },
                None => {
                    let dom = usize::from(*dom) % self.doms.len();
                    if self.doms[dom].domain.pages.lock().total() != 0 {
                        return None;
                    }
                    Step::Rebirth { dom }
                }
            },
        })
    }

    // ── doing ──

    /// Does an operation to its end, and lets the TLB see the result.
    pub fn apply(&mut self, step: &Step) -> Outcome {
        let outcome = self.act(step);
        while self.hv.drain_quarantine() {}
        lock(&self.tlb).learn(&self.hv);
        outcome
    }

    fn act(&mut self, step: &Step) -> Outcome {
        let result = match *step {
            Step::Allocate { dom } => {
                let Ok(mfn) = self.hv.give_frames(&self.doms[dom].domain.clone(), 0, u64::MAX) else {
                    return Outcome::None;
                };
                self.must_be_fresh(mfn);
                self.doms[dom].frames.push(mfn);
                return Outcome::Gave(mfn);
            }
            Step::Free { owner, mfn } => {
                let Some(page) = self.hv.mm.get_page(mfn, owner) else { return Outcome::None };
                self.hv.mm.release(&page);
                drop(page);
                for dom in &mut self.doms {
                    dom.frames.retain(|m| *m != mfn);
                }
                Ok(())
            }
            Step::Write { mfn, slot, word } => {
                // A guest can store where some table lets it.
                let writable =
                    self.hv.mm.type_word(mfn).is_some_and(|w| w.is_live() && w.kind() == Kind::Writable);
                if !writable {
                    return Outcome::None;
                }
                self.hv.platform.frame(mfn)[slot].store(word, Ordering::Relaxed);
                Ok(())
            }
            Step::Update { tables, frames, mfn, slot, word, store } => {
                return self.update(tables, frames, mfn, slot, Pte::from_bits(word), store);
            }
            Step::Pin { owner, mfn, level } => {
                let result =
                    self.until_done(|w, budget| w.hv.pager().pin(mfn, level, owner, &NoDevices, budget));
                if result.is_ok() {
                    self.dom_of(owner).pins.insert(mfn.get());
                }
                result
            }
            Step::Unpin { owner, mfn } => {
                let mut budget = self.budget();
                let result = self.hv.pager().unpin(mfn, owner, &mut budget);
                if let Ok(left) = result {
                    self.dom_of(owner).pins.remove(&mfn.get());
                    self.finish(left);
                }
                result.map(|_| ())
            }
            Step::Root { dom, which, mfn } => {
                let owner = self.doms[dom].id;
                let old = self.doms[dom].roots[which];
                let result = self.until_done(|w, budget| {
                    let mut slot = old;
                    let left = w.hv.pager().replace_root(&mut slot, mfn, owner, || (), &NoDevices, budget)?;
                    Ok(left)
                });
                result.map(|left| {
                    self.doms[dom].roots[which] = mfn;
                    self.finish(left);
                })
            }
            Step::Hold { owner, mfn, how } => self.hold(owner, mfn, how),
            Step::Release { index } => {
                let (mfn, how) = self.holds.swap_remove(index);
                self.release(mfn, how);
                Ok(())
            }
            Step::Exchange { dom, mfn } => return self.exchange(dom, mfn),
            Step::Transfer { dom, mfn, to } => return self.transfer(dom, mfn, to),
            Step::Flush => {
                self.hv.mm.settle(TlbDebt::everywhere(), &self.hv.platform);
                Ok(())
            }
            Step::Kill { dom } => {
                self.kill(dom);
                Ok(())
            }
            Step::Rebirth { dom } => {
                let id = self.doms[dom].id;
                self.hv.domains.remove(id);
                self.doms[dom] = self.bear(id);
                Ok(())
            }
        };
        match result {
            Ok(()) => Outcome::Done,
            Err(failure) => Outcome::Failed(failure),
        }
    }

    fn dom_of(&mut self, id: DomId) -> &mut Dom {
        self.doms.iter_mut().find(|d| d.id == id).expect("a domain of the test")
    }

    fn must_be_fresh(&self, mfn: Mfn) {
        assert!(!self.tlb().reaches(mfn), "{mfn:?} is given out while a translation to it may be cached");
        let clean = self.hv.platform.frame(mfn).iter().all(|w| w.load(Ordering::Relaxed) == 0);
        assert!(clean, "{mfn:?} is given out with its last owner's data");
    }

    fn update(
        &mut self,
        tables: DomId,
        frames: DomId,
        mfn: Mfn,
        slot: usize,
        new: Pte,
        store: Store,
    ) -> Outcome {
        let mut differs = false;
        let result = self.until_done(|w, budget| {
            let Some(table) = w.hv.mm.get_page(mfn, tables) else { return Err(Failure::Invalid.into()) };
            match w.hv.pager().update_entry(&table, slot, new, store, frames, &NoDevices, budget) {
                Ok(updated) => {
                    w.hv.pager().pay(updated.debt);
                    Ok(updated.unfinished)
                }
                Err(NotUpdated::Stop(stop)) => Err(stop),
                Err(NotUpdated::Differs(_)) => {
                    differs = true;
                    Ok(None)
                }
            }
        });
        match result {
            Ok(_) if differs => Outcome::Differs,
            Ok(left) => {
                self.finish(left);
                Outcome::Done
            }
            Err(failure) => Outcome::Failed(failure),
        }
    }

    fn hold(&mut self, owner: DomId, mfn: Mfn, how: Hold) -> Result<(), Failure> {
        self.until_done(|w, budget| {
            match how {
                Hold::Reads => {
                    w.hv.mm.get_page(mfn, owner).ok_or(Failure::Invalid)?.into_pte();
                }
                Hold::Writes => {
                    w.hv.pager().get_typed::<Writable>(mfn, owner, &NoDevices, budget)?.into_pte();
                }
                Hold::Descriptors => {
                    w.hv.pager().get_typed::<SegDesc>(mfn, owner, &NoDevices, budget)?.into_pte();
                }
            }
            Ok(())
        })?;
        self.holds.push((mfn, how));
        Ok(())
    }

    fn release(&mut self, mfn: Mfn, how: Hold) {
        match how {
            Hold::Reads => drop(self.hv.mm.take_back(mfn)),
            Hold::Writes | Hold::Descriptors => {
                let done = self.hv.pager().release_stored(mfn, &mut Budget::new(1));
                assert!(done.is_ok(), "constant work");
            }
        }
    }

    fn exchange(&mut self, dom: usize, mfn: Mfn) -> Outcome {
        let domain = self.doms[dom].domain.clone();
        let Some(page) = self.hv.mm.get_page(mfn, domain.id) else { return Outcome::None };
        let Some(fresh) = self.hv.allocate_frames(0, u64::MAX) else { return Outcome::None };
        let stolen = self.hv.mm.steal(page, &mut domain.pages.lock());
        let Some((old, debt)) = stolen else {
            self.hv.mm.give_back(fresh, 0);
            return Outcome::Failed(Failure::Invalid);
        };
        self.hv.pager().pay(debt);
        self.hv.mm.give_back(old, 0);
        self.must_be_fresh(fresh);
        self.hv.assign_frames(&domain, fresh, 0);
        for frame in &mut self.doms[dom].frames {
            if *frame == old {
                *frame = fresh;
            }
        }
        Outcome::Gave(fresh)
    }

    /// What `grant_transfer` does with the frame; a receiver that may have no more loses it to nobody.
    fn transfer(&mut self, dom: usize, mfn: Mfn, to: usize) -> Outcome {
        let (giver, receiver) = (self.doms[dom].domain.clone(), self.doms[to].domain.clone());
        let Some(page) = self.hv.mm.get_page(mfn, giver.id) else { return Outcome::None };
        let stolen = {
            let mut pages = giver.pages.lock();
            let stolen = self.hv.mm.steal(page, &mut pages);
            pages.discharge(u64::from(stolen.is_some()));
            stolen
        };
        let Some((mfn, debt)) = stolen else { return Outcome::Failed(Failure::Invalid) };
        self.hv.pager().pay(debt);
        assert!(!self.tlb().reaches(mfn), "{mfn:?} changes hands while a translation to it may be cached");
        self.doms[dom].frames.retain(|frame| *frame != mfn);
        let mut pages = receiver.pages.lock();
        if pages.charge(1).is_err() {
            drop(pages);
            self.hv.mm.give_back(mfn, 0);
            return Outcome::None;
        }
        self.hv.mm.assign(mfn, receiver.id, &mut pages);
        drop(pages);
        self.doms[to].frames.push(mfn);
        Outcome::Gave(mfn)
    }

    fn kill(&mut self, dom: usize) {
        let hasty = std::mem::replace(&mut self.hasty, false);
        for which in 0..2 {
            if let Some(root) = self.doms[dom].roots[which].take() {
                let mut budget = self.budget();
                let left = self.hv.pager().release_stored(root, &mut budget).err();
                self.finish(left);
            }
        }
        let domain = self.doms[dom].domain.clone();
        let done =
            self.until_done(|w, budget| w.hv.teardown_memory(&domain, budget).map_err(|_| Stop::Preempted));
        assert_eq!(done, Ok(()));
        self.doms[dom].dying = true;
        self.doms[dom].frames.clear();
        self.doms[dom].pins.clear();
        self.hasty = hasty;
    }

    /// Everything dies and everything comes back.
    pub fn end(&mut self) {
        for (mfn, how) in std::mem::take(&mut self.holds) {
            self.release(mfn, how);
        }
        for dom in 0..self.doms.len() {
            if !self.doms[dom].dying {
                self.apply(&Step::Kill { dom });
            }
        }
        while self.hv.drain_quarantine() {}
        for dom in &self.doms {
            assert_eq!(dom.domain.pages.lock().total(), 0, "d{} keeps frames", dom.id);
        }
        assert_eq!(self.hv.free_frames() as u64, FRAMES, "frames are lost");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Invariants, from the tables themselves.
//!
//! Nothing here asks the core how many references there are: every table in force is read, every entry is counted for
//! what it refers to, the test's own references are added, and the records must say the same.

use std::sync::atomic::Ordering;

use hv::mm::{Kind, Level, Owner, Pte};
use hv::platform::Platform;
use hv::platform::sim::LEFT_BY_FIRMWARE;
use hypercall_abi::Mfn;

use crate::world::{Access, FRAMES, World};
use crate::{Hold, SLOTS};

/// References to one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    general: u32,
    typed: u32,
    linear: i32,
}

/// Checks everything. The error says what is wrong.
pub fn check(world: &World) -> Result<(), String> {
    counts(world)?;
    translations(world)
}

/// Entries that hold references: all of a table in force, those below the progress of a parked one.
fn counted_entries(world: &World, table: Mfn) -> Option<(Level, Vec<Pte>)> {
    let word = world.hv.mm.type_word(table)?;
    let level = word.kind().level()?;
    let entries = if word.is_live() {
        512
    } else if word.is_parked() {
        usize::from(word.progress())
    } else {
        return None;
    };
    let slots = SLOTS.iter().filter(|s| **s < entries && (level != Level::L4 || !(256..272).contains(*s)));
    let frame = world.hv.platform.frame(table);
    let ptes = slots.map(|s| Pte::from_bits(frame[*s].load(Ordering::Relaxed)));
    Some((level, ptes.filter(|p| p.is_present()).collect()))
}

fn counts(world: &World) -> Result<(), String> {
    let mm = &world.hv.mm;
    let mut expected = vec![Count::default(); FRAMES as usize];
    let mut refer = |mfn: Mfn, typed: bool| {
        let count = &mut expected[mfn.get() as usize];
        count.general += 1;
        count.typed += u32::from(typed);
    };
    for dom in &world.doms {
        dom.frames.iter().for_each(|m| refer(*m, false));
        dom.pins.iter().for_each(|m| refer(Mfn::new(*m), true));
        dom.roots.iter().flatten().for_each(|m| refer(*m, true));
    }
    for (mfn, how) in &world.holds {
        refer(*mfn, *how != Hold::Reads);
    }
    for table in (0..FRAMES).map(Mfn::new) {
        let word = mm.type_word(table).unwrap_or(hv::mm::TypeWord::NEW);
        if mm.general_count(table) == 0 {
            continue;
        }
        if word.is_working() || word.is_locked() {
            return Err(format!("{table:?} is being worked on between operations: {word:?}"));
        }
        if word.is_parked() {
            // The record's own.
            expected[table.get() as usize].general += 1;
            expected[table.get() as usize].typed += 1;
        }
        let Some((level, ptes)) = counted_entries(world, table) else { continue };
        for pte in ptes {
            let mfn = pte.mfn();
            legal(world, table, level, pte)?;
            if mm.owner(mfn) == Owner::NotRam || level != Level::L1 && mfn == table {
                continue;
            }
            let typed = level != Level::L1 || pte.is_writable();
            expected[mfn.get() as usize].general += 1;
            expected[mfn.get() as usize].typed += u32::from(typed);
            if level != Level::L1 && mm.type_word(mfn).is_some_and(|w| w.kind() == level.kind()) {
                expected[mfn.get() as usize].linear -= 1;
                expected[table.get() as usize].linear += 1;
            }
        }
    }
    for (mfn, expected) in (0..FRAMES).map(Mfn::new).zip(expected) {
        let word = mm.type_word(mfn).unwrap_or(hv::mm::TypeWord::NEW);
        let general = mm.general_count(mfn);
        let found = if general == 0 {
            Count::default()
        } else {
            let linear = if word.is_idle() { 0 } else { i32::from(word.linear()) };
            Count { general, typed: word.count(), linear }
        };
        if found != expected {
            return Err(format!("{mfn:?} ({word:?}) has {found:?}, what refers to it makes {expected:?}"));
        }
    }
    let charged: u64 = world.doms.iter().map(|d| d.domain.pages.lock().total()).sum();
    if world.hv.free_frames() as u64 + charged != FRAMES {
        return Err(format!("{} free and {charged} charged of {FRAMES} frames", world.hv.free_frames()));
    }
    Ok(())
}

/// Whether an entry that is in force may be.
fn legal(world: &World, table: Mfn, level: Level, pte: Pte) -> Result<(), String> {
    let bad = |what: &str| Err(format!("{level:?} table {table:?} has {pte:?}: {what}"));
    const USER: u64 = 1 << 2;
    const CACHE_OR_LARGE: u64 = 1 << 3 | 1 << 4 | 1 << 7;
    const GLOBAL: u64 = 1 << 8;
    const DIRTY_LOG: u64 = 3 << 53;
    if pte.bits() & USER == 0 {
        return bad("no USER bit");
    }
    if pte.bits() & (CACHE_OR_LARGE | GLOBAL | DIRTY_LOG) != 0 {
        return bad("bits that no guest may set");
    }
    let mm = &world.hv.mm;
    let Some(target) = mm.type_word(pte.mfn()) else { return bad("no RAM") };
    if mm.general_count(pte.mfn()) == 0 {
        return bad("a free frame");
    }
    let (mine, its) = (mm.owner(table), mm.owner(pte.mfn()));
    let first = Owner::Domain(world.doms[0].id);
    if mine != its && (level != Level::L1 || mine != first) {
        return bad("another domain's frame");
    }
    if level == Level::L1 {
        if pte.is_writable() && !(target.is_live() && target.kind() == Kind::Writable) {
            return bad("writable mapping of what is not Writable");
        }
        return Ok(());
    }
    let child = match level {
        Level::L4 => Kind::L3,
        Level::L3 => Kind::L2,
        _ => Kind::L1,
    };
    if target.kind() == level.kind() {
        if pte.is_writable() {
            return bad("writable linear entry");
        }
        return Ok(());
    }
    if target.kind() != child || !(target.is_live() || target.is_parked()) {
        return bad("not a table of the level below");
    }
    Ok(())
}

/// No processor may still be able to do what the records say nobody can.
fn translations(world: &World) -> Result<(), String> {
    let mm = &world.hv.mm;
    for (mfn, access) in world.tlb().cached() {
        if mm.owner(mfn) == Owner::Nobody {
            return Err(format!("{mfn:?} is free, and a translation ({access:?}) may be cached"));
        }
        let Some(word) = mm.type_word(mfn) else { continue };
        if word.is_idle() {
            continue;
        }
        let table = word.kind().is_table() || word.kind() == Kind::SegDesc;
        if access == Access::Write && table {
            return Err(format!("{mfn:?} is {word:?}, and a writable translation may be cached"));
        }
        if access == Access::Table && word.kind() == Kind::Writable {
            return Err(format!("{mfn:?} is writable, and may still be walked as a page table"));
        }
    }
    Ok(())
}

/// Two worlds that did the same must look the same, whatever stopped where.
pub fn same(a: &World, b: &World) -> Result<(), String> {
    for mfn in (0..FRAMES).map(Mfn::new) {
        let view = |w: &World| {
            let word = w.hv.mm.type_word(mfn).unwrap_or(hv::mm::TypeWord::NEW);
            let general = w.hv.mm.general_count(mfn);
            let word = if word.is_idle() || general == 0 { None } else { Some(word) };
            (w.hv.mm.owner(mfn), general, word)
        };
        if view(a) != view(b) {
            return Err(format!("{mfn:?}: {:?} without preemption, {:?} with", view(a), view(b)));
        }
        let (x, y) = (a.hv.platform.frame(mfn), b.hv.platform.frame(mfn));
        for slot in SLOTS {
            if x[slot].load(Ordering::Relaxed) != y[slot].load(Ordering::Relaxed) {
                return Err(format!("{mfn:?}: word {slot} differs when preempted"));
            }
        }
    }
    Ok(())
}

/// Nothing but [`SLOTS`] was ever written, and nobody has what the firmware left.
pub fn nothing_else_written(world: &World) -> Result<(), String> {
    for mfn in (0..FRAMES).map(Mfn::new) {
        let unused = world.hv.mm.owner(mfn) == Owner::Nobody;
        for (slot, word) in world.hv.platform.frame(mfn).iter().enumerate() {
            let word = word.load(Ordering::Relaxed);
            if !SLOTS.contains(&slot) && word != 0 && !(unused && word == LEFT_BY_FIRMWARE) {
                return Err(format!("{mfn:?}: word {slot} was written"));
            }
        }
    }
    Ok(())
}

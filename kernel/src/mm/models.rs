//! Reference counts, type counts and the quarantine of frames under every order of accesses that the memory model allows
//! (`cargo xtask test --filter loom`). What is listed in each model are the accesses without whose order it does not hold.
//!
//! A frame's content is a word of its own here: what one domain wrote must be there, or gone, when the next one looks.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use arrayvec::ArrayVec;
use hypercall_abi::{DomId, Mfn};
use loom::sync::Arc;
use loom::thread;

use super::frames::{Drained, PageList, Retired, Sifted};
use super::page_info::Event;
use super::page_kind::Kind;
use super::{FrameRecord, Memory};
use crate::page_ref::Writable;
use crate::platform::sim::SimMachine;
use crate::sync::atomic::model::needed;
use crate::sync::atomic::{AtomicU32, Ordering};

const OLD: DomId = DomId::new(1);
const NEW: DomId = DomId::new(2);
const FRAME: Mfn = Mfn::new(1);
const OTHER: Mfn = Mfn::new(2);

/// A few frames, and what is written in the first.
struct World {
    memory: Memory,
    machine: SimMachine,
    content: AtomicU32,
}

impl World {
    /// The frames `owned` are the memory of a domain, with the owner's reference only.
    fn new(domain: DomId, owned: &[Mfn]) -> Arc<World> {
        World::with_list(domain, owned).0
    }

    /// As [`World::new`], with the list that the frames are on.
    fn with_list(domain: DomId, owned: &[Mfn]) -> (Arc<World>, PageList) {
        let records: &'static [FrameRecord] = Box::leak((0..4).map(|_| FrameRecord::new()).collect());
        let m2p = Box::leak((0..4).map(|_| core::sync::atomic::AtomicU64::new(0)).collect());
        let memory = Memory::new(records, m2p);
        memory.declare_ram(Mfn::new(0), 4);
        let mut pages = PageList::new(4);
        for mfn in owned {
            memory.assign(*mfn, domain, &mut pages);
        }
        (Arc::new(World { memory, machine: SimMachine::new(4), content: AtomicU32::new(0) }), pages)
    }

    /// Takes at most `MOST` frames out of quarantine; how many there were.
    fn pop<const MOST: usize>(&self) -> usize {
        let mut drained = ArrayVec::<Drained, MOST>::new();
        self.memory.pop_quarantined(&self.machine, &mut drained);
        drained.len()
    }
}

fn needed_for(model: fn()) -> Vec<String> {
    needed("frames.rs", include_str!("frames.rs"), model)
}

#[test]
fn who_gets_a_frame_that_is_being_given_away_finds_its_new_owner() {
    let needed = needed_for(|| {
        let world = World::new(OLD, &[]);
        let giver = {
            let world = world.clone();
            thread::spawn(move || {
                // Scrubbed; then it is the new owner's.
                world.content.store(1, Ordering::Relaxed);
                world.memory.assign(FRAME, NEW, &mut PageList::new(4));
            })
        };
        if let Some(page) = world.memory.get_any_page(FRAME) {
            assert_eq!(page.owner_number(), NEW.get(), "a reference to a frame of nobody's");
            assert_eq!(world.content.load(Ordering::Relaxed), 1, "it is not scrubbed");
            drop(page);
        }
        giver.join().unwrap();
    });
    assert_eq!(
        needed,
        [
            ".fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {",
            "record.count.store(ALLOCATED | 1, Ordering::Release);",
        ]
    );
}

#[test]
fn the_last_of_two_references_frees_the_frame_after_all_that_was_done_by_both() {
    let needed = needed_for(|| {
        let world = World::new(OLD, &[FRAME]);
        let [first, second] = [(); 2].map(|()| world.memory.get_any_page(FRAME).unwrap().into_pte());
        assert!(world.memory.release(&world.memory.get_any_page(FRAME).unwrap()));
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                world.content.store(1, Ordering::Relaxed);
                drop(world.memory.take_back(first));
            })
        };
        drop(world.memory.take_back(second));
        // Whoever finds it free may use it anew.
        if world.pop::<1>() == 1 {
            assert_eq!(world.content.load(Ordering::Relaxed), 1, "the other one writes to it still");
            assert_eq!(world.pop::<1>(), 0, "it was freed twice");
            other.join().unwrap();
        } else {
            other.join().unwrap();
            assert_eq!(world.pop::<1>(), 1, "it was freed by nobody");
        }
    });
    assert_eq!(needed, ["let before = record.count.fetch_sub(1, Ordering::AcqRel);"]);
}

#[test]
fn a_table_is_checked_as_the_last_writer_left_it() {
    let needed = needed_for(|| {
        let world = World::new(OLD, &[FRAME]);
        let page = world.memory.get_any_page(FRAME).unwrap();
        let Ok((writable, _)) = page.typed::<Writable>() else { panic!("a fresh frame can be written") };
        let mfn = writable.into_pte();
        let writer = {
            let world = world.clone();
            thread::spawn(move || {
                world.content.store(1, Ordering::Relaxed);
                drop(crate::page_ref::TypedRef::<Writable>::from_pte(&world.memory, mfn));
            })
        };
        let page = world.memory.get_any_page(FRAME).unwrap();
        if world.memory.type_step(FRAME, Event::Get(Kind::L1)).is_ok() {
            assert_eq!(world.content.load(Ordering::Relaxed), 1, "an entry is written after the check");
        }
        writer.join().unwrap();
        drop(page);
    });
    // The load before it is only a guess.
    assert_eq!(
        needed,
        ["match record.word.compare_exchange_weak(word, next.bits(), Ordering::AcqRel, Ordering::Acquire) {"]
    );
}

#[test]
fn a_table_is_checked_as_the_last_writer_left_it_by_the_short_way() {
    let needed = needed_for(|| {
        let world = World::new(OLD, &[FRAME]);
        assert!(world.memory.get_plain_writable(FRAME, OLD));
        let writer = {
            let world = world.clone();
            thread::spawn(move || {
                world.content.store(1, Ordering::Relaxed);
                assert!(world.memory.put_plain_writable(FRAME));
            })
        };
        let page = world.memory.get_any_page(FRAME).unwrap();
        if world.memory.type_step(FRAME, Event::Get(Kind::L1)).is_ok() {
            assert_eq!(world.content.load(Ordering::Relaxed), 1, "an entry is written after the check");
        }
        writer.join().unwrap();
        drop(page);
    });
    // By who gives the page back. Who takes it as a table has loaded the word with order before it exchanges it.
    let exchange =
        "match record.word.compare_exchange_weak(word, next.bits(), Ordering::AcqRel, Ordering::Acquire) {";
    assert_eq!(needed, [exchange]);
}

#[test]
fn each_frame_leaves_the_quarantine_once() {
    let needed = needed_for(|| {
        let world = World::new(OLD, &[FRAME, OTHER]);
        for mfn in [FRAME, OTHER] {
            let page = world.memory.get_any_page(mfn).unwrap();
            assert!(world.memory.release(&page));
            let _ = page.into_pte();
        }
        let other = {
            let world = world.clone();
            thread::spawn(move || drop(world.memory.take_back(FRAME)))
        };
        drop(world.memory.take_back(OTHER));
        let popped = world.pop::<2>();
        assert!(popped > 0, "the one that was put there just now is not there");
        other.join().unwrap();
        assert_eq!(popped + world.pop::<3>(), 2, "one is lost, or came out twice");
    });
    // The chain's words are published by the exchange of its head.
    assert!(needed.iter().any(|line| line.contains("compare_exchange_weak")), "{needed:#?}");
}

#[test]
fn teardown_takes_a_frame_after_all_that_was_done_by_who_let_go_of_it() {
    let needed = needed_for(|| {
        let (world, mut pages) = World::with_list(OLD, &[FRAME]);
        let mfn = world.memory.get_any_page(FRAME).unwrap().into_pte();
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                world.content.store(1, Ordering::Relaxed);
                drop(world.memory.take_back(mfn));
                world.memory.get_any_page(FRAME).is_some_and(|page| page.owner_number() != OLD.get())
            })
        };
        let mut retired = Retired::new();
        // Once as a frame that it has not seen, once more as one that it has.
        assert_eq!(world.memory.sift(&mut pages, &mut retired), Sifted::End);
        if retired.is_empty() {
            assert!(!other.join().unwrap());
            assert_eq!(world.pop::<2>(), 1, "given up by both, and free for nobody");
        } else {
            assert_eq!(world.content.load(Ordering::Relaxed), 1, "the other one writes to it still");
            assert!(world.memory.get_any_page(FRAME).is_none(), "a reference to a frame that was taken");
            assert!(!other.join().unwrap(), "a reference to a frame of nobody's");
            assert_eq!(world.pop::<1>(), 0, "taken and freed");
        }
    });
    assert_eq!(
        needed,
        [
            "let before = record.count.fetch_sub(1, Ordering::AcqRel);",
            "if record.count.compare_exchange(ALLOCATED | 1, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {",
        ]
    );
}

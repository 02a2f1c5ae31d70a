//! The granter's and the hypervisor's accesses to an entry under every order that the memory model allows
//! (`cargo xtask test --filter loom`). What is listed in each model are the accesses without whose order it does not hold.
//!
//! The granter is a guest that keeps to the protocol (public/grant_table.h): to take an entry back it exchanges the flags against 0, expecting
//! them without READING and WRITING, or with version 2 clears them and then, behind a full barrier, looks at the status.

use alloc::string::String;
use alloc::vec::Vec;

use hypercall_abi::grant::{
    GTF_ACCEPT_TRANSFER, GTF_PERMIT_ACCESS, GTF_TRANSFER_COMPLETED, GTF_TRANSITIVE, GrantFlags,
};
use hypercall_abi::{DomId, GrantRef, Mfn};
use loom::sync::Arc;
use loom::thread;

use super::entry::{Entry, Granted, Purpose, Status};
use super::table::{Pins, Reach};
use crate::sync::atomic::model::needed;
use crate::sync::atomic::{AtomicU64, Ordering, fence};

const USER: DomId = DomId::new(5);
const MARKS: GrantFlags = GrantFlags::READING.union(GrantFlags::WRITING);
const OLD: u64 = 10;
const NEW: u64 = 20;

/// An entry, and what is in the frame that it grants.
struct World {
    words: [AtomicU64; 3],
    content: AtomicU64,
    v2: bool,
}

fn header(flags: u16) -> u64 {
    u64::from(USER.get()) << 16 | u64::from(flags)
}

impl World {
    fn new(v2: bool, header: u64, frame: u64) -> Arc<World> {
        let first = if v2 { header } else { frame << 32 | header };
        let words = [first, frame, 0].map(AtomicU64::new);
        Arc::new(World { words, content: AtomicU64::new(0), v2 })
    }

    fn entry(&self) -> Entry<'_, AtomicU64> {
        let [a, b, c] = &self.words;
        if self.v2 { Entry::V2 { words: [a, b], status: Status::new(c, 1) } } else { Entry::V1(a) }
    }

    /// The granter takes the entry back, if nobody uses it.
    fn revoke(&self) -> bool {
        let [word, _, status] = &self.words;
        if !self.v2 {
            let old = word.load(Ordering::Acquire);
            return old & u64::from(MARKS.bits()) == 0
                && word.compare_exchange(old, old & !0xffff, Ordering::SeqCst, Ordering::Relaxed).is_ok();
        }
        let old = word.load(Ordering::Relaxed);
        word.store(old & !0xffff, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        status.load(Ordering::Acquire) & u64::from(MARKS.bits()) << 16 == 0
    }

    /// The hypervisor maps or copies for the user; what it found there.
    fn mark(&self, purpose: Purpose) -> Option<Granted> {
        self.entry().mark(Pins::default(), USER, false, purpose).ok()
    }
}

/// Lets the hypervisor do one thing and the granter another, then checks what came of both.
fn beside<A: 'static, B>(
    world: &Arc<World>,
    hypervisor: fn(&World) -> A,
    granter: impl FnOnce(&World) -> B,
) -> (A, B) {
    let there = Arc::clone(world);
    let hypervisor = thread::spawn(move || hypervisor(&there));
    let granter = granter(world);
    (hypervisor.join().unwrap(), granter)
}

fn entry(model: fn()) -> Vec<String> {
    needed("grant/entry.rs", include_str!("entry.rs"), model)
}

/// A use ends before the granter has the frame back, or does not begin.
fn used_or_taken_back(v2: bool) {
    let world = World::new(v2, header(GTF_PERMIT_ACCESS), OLD);
    let (used, seen) = beside(
        &world,
        |world| {
            let granted = world.mark(Purpose::Map);
            if granted.is_some() {
                assert_eq!(granted, Some(Granted::Frame(Mfn::new(OLD), Reach::Page)));
                world.content.store(1, Ordering::Relaxed);
                world.entry().unmark(MARKS);
            }
            granted.is_some()
        },
        |world| world.revoke().then(|| world.content.load(Ordering::Relaxed)),
    );
    if let Some(seen) = seen {
        assert_eq!(seen, u64::from(used), "the frame was written when it was the granter's own again");
    }
}

#[test]
fn a_frame_taken_back_is_used_no_more() {
    let needed = entry(|| used_or_taken_back(false));
    assert_eq!(needed, ["word.clear_bits(u64::from(marks.bits()), Ordering::AcqRel);"]);
}

#[test]
fn a_frame_of_version_2_taken_back_is_used_no_more() {
    let needed = entry(|| used_or_taken_back(true));
    assert_eq!(
        needed,
        ["self.word.clear_bits(u64::from(marks.bits()) << self.shift, Ordering::AcqRel);", "W::barrier();"]
    );
}

/// What the granter wrote before it granted is there for who was granted.
fn granted_with_its_content(v2: bool) {
    let world = World::new(v2, 0, OLD);
    let (seen, ()) = beside(
        &world,
        |world| {
            let granted = world.mark(Purpose::Map)?;
            assert_eq!(granted, Granted::Frame(Mfn::new(NEW), Reach::Page));
            Some(world.content.load(Ordering::Relaxed))
        },
        |world| {
            world.content.store(1, Ordering::Relaxed);
            // dom0's builder grants so, in the name of new domains.
            world.entry().store(header(GTF_PERMIT_ACCESS), NEW);
        },
    );
    assert_ne!(seen, Some(0), "the frame came before what is in it");
}

#[test]
fn a_frame_is_granted_with_what_is_in_it() {
    let needed = entry(|| granted_with_its_content(false));
    // Of the two with which it is marked each makes up for the other.
    assert_eq!(
        needed,
        ["Entry::V1(word) => word.write(frame << 32 | header & 0xffff_ffff, Ordering::Release),"]
    );
}

#[test]
fn a_frame_of_version_2_is_granted_with_what_is_in_it() {
    let needed = entry(|| granted_with_its_content(true));
    assert_eq!(needed, ["words[0].write(header, Ordering::Release);"]);
}

#[test]
fn an_entry_that_stands_for_anothers_is_seen_whole() {
    let needed = entry(|| {
        let stands = header(GTF_TRANSITIVE);
        let world = World::new(true, OLD << 32 | stands, OLD);
        let (seen, ()) = beside(
            &world,
            |world| world.mark(Purpose::Copy),
            |world| {
                if world.revoke() {
                    world.entry().store(NEW << 32 | header(GTF_TRANSITIVE), NEW);
                }
            },
        );
        if let Some(Granted::Transitive(domain, gref)) = seen {
            assert_eq!(
                u64::from(domain.get()),
                u64::from(gref.get()),
                "half of the one and half of the other"
            );
            assert!(gref == GrantRef::new(OLD as u32) || gref == GrantRef::new(NEW as u32));
        }
    });
    assert_eq!(
        needed,
        [
            "words[0].write(header, Ordering::Release);",
            "let header = words[0].read(Ordering::Acquire);",
            "W::barrier();"
        ]
    );
}

/// A frame that is given away comes with its number and its content.
fn transferred(v2: bool) {
    let world = World::new(v2, header(GTF_ACCEPT_TRANSFER), OLD);
    // The granter of such an entry is the one who gets.
    let getter = Arc::clone(&world);
    let getter = thread::spawn(move || {
        let (flags, frame) = getter.entry().load();
        (flags as u16 & GTF_TRANSFER_COMPLETED == GTF_TRANSFER_COMPLETED)
            .then(|| (frame, getter.content.load(Ordering::Relaxed)))
    });
    assert_eq!(world.entry().commit_transfer(USER).ok(), Some(OLD));
    world.content.store(1, Ordering::Relaxed);
    world.entry().complete_transfer(USER, Mfn::new(NEW));
    let seen = getter.join().unwrap();
    assert!(seen.is_none_or(|seen| seen == (NEW, 1)), "{seen:?}");
}

#[test]
fn a_frame_given_away_is_all_there() {
    let needed = entry(|| transferred(false));
    assert_eq!(
        needed,
        [
            "Entry::V1(word) => word.write(frame << 32 | header & 0xffff_ffff, Ordering::Release),",
            "let word = word.read(Ordering::Acquire);"
        ]
    );
}

#[test]
fn a_frame_of_version_2_given_away_is_all_there() {
    let needed = entry(|| transferred(true));
    assert_eq!(
        needed,
        ["words[0].write(header, Ordering::Release);", "let header = words[0].read(Ordering::Acquire);"]
    );
}

//! Preemption inside one table: how far each step goes, and that a late failure undoes all of it.

use std::sync::atomic::Ordering;

use hv::hypercall::Budget;
use hv::mm::{Failure, Kind, Level, Stop, Unfinished};
use hv::platform::Platform;
use hypercall_abi::Mfn;
use model::check;
use model::world::{NoDevices, World};

/// Fills an L1 table with read-only mappings of one frame, as an allocated but unused frame can be filled.
fn full_table(world: &World, table: Mfn, mapped: Mfn) {
    for word in world.hv.platform.frame(table) {
        word.store(mapped.get() << 12 | 5, Ordering::Relaxed);
    }
}

#[test]
fn a_full_l1_table_takes_eight_steps_each_way() {
    let world = World::new(u32::MAX);
    let (id, frames) = (world.doms[0].id, world.doms[0].frames.clone());
    full_table(&world, frames[8], frames[0]);
    let pager = world.hv.pager();
    let mut stops = 0;
    while let Err(stop) = pager.pin(frames[8], Level::L1, id, &NoDevices, &mut Budget::new(1)) {
        assert_eq!(stop, Stop::Preempted);
        stops += 1;
        let word = world.hv.mm.type_word(frames[8]).expect("a frame");
        assert_eq!(world.hv.mm.general_count(frames[0]), 1 + u32::from(word.progress()));
    }
    assert_eq!(stops, 7);
    assert_eq!(world.hv.mm.general_count(frames[0]), 513);
    let mut left = pager.unpin(frames[8], id, &mut Budget::new(1)).expect("it is pinned");
    let mut stops = 0;
    while let Some(Unfinished(mfn)) = left {
        stops += 1;
        left = pager.help(mfn, &mut Budget::new(1)).err();
    }
    assert_eq!(stops, 7);
    assert_eq!(world.hv.mm.general_count(frames[0]), 1);
}

#[test]
fn a_bad_last_entry_undoes_all_others() {
    for steps in [1, 3, u32::MAX] {
        let world = World::new(steps);
        let (id, frames) = (world.doms[0].id, world.doms[0].frames.clone());
        full_table(&world, frames[8], frames[0]);
        // The table itself, writable.
        world.hv.platform.frame(frames[8])[511].store(frames[8].get() << 12 | 7, Ordering::Relaxed);
        let pager = world.hv.pager();
        let failure = loop {
            match pager.pin(frames[8], Level::L1, id, &NoDevices, &mut Budget::new(steps)) {
                Err(Stop::Preempted) => continue,
                Err(Stop::Failed(failure)) => break failure,
                Ok(()) => panic!("a page table is mapped writable"),
            }
        };
        assert_eq!(failure, Failure::Busy, "the same error however often it was stopped");
        assert_eq!(world.hv.mm.general_count(frames[0]), 1);
        assert_eq!(check::check(&world), Ok(()));
    }
}

#[test]
fn a_dropped_reference_to_a_table_parks_it_for_the_next() {
    let world = World::new(u32::MAX);
    let (id, frames) = (world.doms[0].id, world.doms[0].frames.clone());
    full_table(&world, frames[8], frames[0]);
    let pager = world.hv.pager();
    let table = pager
        .get_typed::<hv::page_ref::L1>(frames[8], id, &NoDevices, &mut Budget::unlimited())
        .expect("a good table");
    assert_eq!(world.hv.mm.general_count(frames[0]), 513);
    drop(table);
    assert!(world.hv.mm.type_word(frames[8]).is_some_and(|w| w.is_parked()));
    assert_eq!(world.hv.mm.general_count(frames[0]), 513, "dropping is constant work");
    pager
        .pin(frames[8], Level::L1, id, &NoDevices, &mut Budget::unlimited())
        .expect("whoever comes next finishes");
    assert!(world.hv.mm.type_word(frames[8]).is_some_and(|w| w.is_live() && w.kind() == Kind::L1));
    assert_eq!(world.hv.mm.general_count(frames[0]), 513);
}

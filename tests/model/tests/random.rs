//! Random operations against the reference model, with and without preemption.

use std::sync::atomic::Ordering;

use hv::mm::mutants::Mutant;
use hv::platform::Platform;
use hypercall_abi::Mfn;
use model::reference::{Reference, Use};
use model::world::{FRAMES, Outcome, Step, World};
use model::{DOMAINS, Entry, Hold, Op, SLOTS, Way, check};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

fn entry() -> impl Strategy<Value = Entry> {
    (any::<u8>(), any::<u8>()).prop_map(|(frame, bits)| Entry { frame, bits })
}

fn op() -> impl Strategy<Value = Op> {
    let dom = any::<u8>();
    let frame = any::<u8>();
    let slot = any::<u8>();
    let way = prop_oneof![
        4 => Just(Way::Plain),
        1 => Just(Way::Preserve),
        1 => Just(Way::Same),
        1 => Just(Way::Other)
    ];
    let hold = prop_oneof![Just(Hold::Reads), Just(Hold::Writes), Just(Hold::Descriptors)];
    prop_oneof![
        4 => any::<u8>().prop_map(|dom| Op::Allocate { dom }),
        2 => (dom, frame).prop_map(|(dom, frame)| Op::Free { dom, frame }),
        6 => (dom, frame, slot, entry()).prop_map(|(dom, frame, slot, entry)| Op::Write { dom, frame, slot, entry }),
        40 => (dom, frame, slot, entry(), way)
            .prop_map(|(dom, table, slot, entry, store)| Op::Update { dom, table, slot, entry, store }),
        4 => (dom, frame, slot, entry()).prop_map(|(dom, table, slot, entry)| Op::Foreign { dom, table, slot, entry }),
        14 => (dom, frame, any::<u8>(), prop::bool::weighted(0.05))
            .prop_map(|(dom, frame, level, as_other)| Op::Pin { dom, frame, level, as_other }),
        10 => (dom, frame).prop_map(|(dom, frame)| Op::Unpin { dom, frame }),
        6 => (dom, any::<bool>(), prop::option::weighted(0.8, any::<u8>()))
            .prop_map(|(dom, which, frame)| Op::Root { dom, which, frame }),
        4 => (dom, frame, hold).prop_map(|(dom, frame, how)| Op::Hold { dom, frame, how }),
        4 => any::<u8>().prop_map(|index| Op::Release { index }),
        2 => (dom, frame).prop_map(|(dom, frame)| Op::Exchange { dom, frame }),
        2 => (dom, frame, dom).prop_map(|(dom, frame, to)| Op::Transfer { dom, frame, to }),
        2 => Just(Op::Flush),
        1 => dom.prop_map(|dom| Op::Kill { dom }),
    ]
}

/// Whether the world's frames are what the reference says.
fn agrees(world: &World, reference: &Reference) -> Result<(), String> {
    for (mfn, frame) in (0..FRAMES).map(Mfn::new).zip(&reference.frames) {
        let word = world.hv.mm.type_word(mfn).expect("a frame of the machine");
        let refs = world.hv.mm.general_count(mfn);
        if refs != frame.refs {
            return Err(format!("{mfn:?} has {refs} references, the reference says {frame:?}"));
        }
        if refs == 0 {
            continue;
        }
        let used = match word.kind() {
            k if k.is_table() => Use::Table(k as u8),
            hv::mm::Kind::SegDesc => Use::Descriptors,
            _ => Use::Data,
        };
        let same = word.count() == frame.typed
            && word.is_pinned() == frame.pinned
            && (word.count() == 0 || used == frame.used)
            && word.is_live() == (frame.typed > 0);
        if !same {
            return Err(format!("{mfn:?} is {word:?}, the reference says {frame:?}"));
        }
        for (slot, expected) in SLOTS.iter().zip(frame.words) {
            let found = world.hv.platform.frame(mfn)[*slot].load(Ordering::Relaxed);
            if found != expected {
                return Err(format!("{mfn:?} word {slot} is {found:#x}, the reference says {expected:#x}"));
            }
        }
    }
    Ok(())
}

/// What a run did, so that the test can tell that it was not all refusals.
#[derive(Default, Debug)]
struct Tally {
    operations: u64,
    done: u64,
    tables: u64,
    preemptions: u64,
}

/// Runs operations in a world that is never stopped, in one that is stopped after each step, and in the reference.
fn run(ops: &[Op], bug: Option<Mutant>, tally: &mut Tally) -> Result<(), String> {
    let mut free = World::with_bug(u32::MAX, bug);
    let mut stopped = World::with_bug(1, bug);
    let mut reference = Reference::new(FRAMES, (1..=DOMAINS).collect());
    for dom in 0..usize::from(DOMAINS) {
        for mfn in free.doms[dom].frames.clone() {
            reference.apply(&Step::Allocate { dom }, Some(mfn));
        }
    }
    for op in ops {
        let Some(step) = free.name(op) else { continue };
        let outcome = free.apply(&step);
        check::check(&free).map_err(|e| format!("after {step:?}: {e}"))?;
        let again = stopped.apply(&step);
        check::check(&stopped).map_err(|e| format!("after {step:?}, preempted: {e}"))?;
        if outcome != again {
            return Err(format!("{step:?}: {outcome:?} without preemption, {again:?} with"));
        }
        check::same(&free, &stopped).map_err(|e| format!("after {step:?}: {e}"))?;
        let gave = if let Outcome::Gave(mfn) = outcome { Some(mfn) } else { None };
        let expected = reference.apply(&step, gave);
        if outcome != expected {
            return Err(format!("{step:?}: {outcome:?}, the reference says {expected:?}"));
        }
        agrees(&free, &reference).map_err(|e| format!("after {step:?}: {e}"))?;
        tally.operations += 1;
        tally.done += u64::from(matches!(outcome, Outcome::Done | Outcome::Gave(_)));
        tally.tables +=
            u64::from(outcome == Outcome::Done && matches!(step, Step::Pin { .. } | Step::Root { .. }));
    }
    tally.preemptions += stopped.preemptions;
    check::nothing_else_written(&free)?;
    free.end();
    stopped.end();
    Ok(())
}

/// At least this many operations in the default run.
const OPERATIONS: u64 = 200_000;
/// In one case.
const LENGTH: usize = 800;

#[test]
fn random_operations_agree_with_the_reference() {
    // A third of the operations name what is not there.
    let cases = OPERATIONS / LENGTH as u64 * 9 / 4;
    let mut runner = TestRunner::new(Config {
        cases: cases as u32,
        max_shrink_iters: 5_000,
        failure_persistence: None,
        ..Config::default()
    });
    let tally = std::cell::RefCell::new(Tally::default());
    let ops = prop::collection::vec(op(), LENGTH / 2..=LENGTH * 3 / 2);
    let result =
        runner.run(&ops, |ops| run(&ops, None, &mut tally.borrow_mut()).map_err(TestCaseError::fail));
    if let Err(error) = result {
        panic!("{error}");
    }
    let tally = tally.into_inner();
    println!("{tally:?}");
    assert!(tally.operations >= OPERATIONS, "{tally:?}");
    assert!(tally.done * 4 > tally.operations, "too few operations succeed: {tally:?}");
    assert!(tally.tables * 100 > tally.operations, "too few tables are made: {tally:?}");
    assert!(tally.preemptions * 20 > tally.operations, "too little is preempted: {tally:?}");
}

/// Guests that never go on with what was preempted, but do something else: every table on the way stays parked.
#[test]
fn abandoned_work_harms_nobody() {
    let mut runner = TestRunner::new(Config { cases: 60, failure_persistence: None, ..Config::default() });
    let result = runner.run(&prop::collection::vec(op(), LENGTH), |ops| {
        let mut world = World::new(1);
        world.hasty = true;
        for step in ops.iter() {
            let Some(step) = world.name(step) else { continue };
            world.apply(&step);
            check::check(&world).map_err(|e| TestCaseError::fail(format!("after {step:?}: {e}")))?;
        }
        world.end();
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Puts a bug into the core and expects somebody to object: the invariants, the reference, or an assertion.
fn is_caught(mutant: Mutant) {
    let mut runner = TestRunner::deterministic();
    let ops = prop::collection::vec(op(), LENGTH);
    let caught = (0..20).any(|_| {
        let ops = ops.new_tree(&mut runner).expect("operations can be made").current();
        let result = std::panic::catch_unwind(|| run(&ops, Some(mutant), &mut Tally::default()));
        assert_eq!(run(&ops, None, &mut Tally::default()), Ok(()), "without the bug nobody objects");
        !matches!(result, Ok(Ok(())))
    });
    assert!(caught, "nobody objects to {mutant:?}");
}

#[test]
fn a_skipped_type_check_is_caught() {
    is_caught(Mutant::SkippedTypeCheck);
}

#[test]
fn a_missed_flush_is_caught() {
    is_caught(Mutant::MissedFlush);
}

#[test]
fn a_leaked_reference_is_caught() {
    is_caught(Mutant::LeakedReference);
}

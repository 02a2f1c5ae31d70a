//! The two-level protocol under every interleaving of two CPUs.
//!
//! Every access to the shared words is sequentially consistent, so an execution is an order of accesses and nothing else; with two CPUs
//! and a few accesses each, all orders can be run. Two threads run the code itself, one access at a time, and after each
//! access a schedule says who does the next; schedules are enumerated depth first. (loom would do the same with weaker
//! orderings too, but takes `SeqCst` accesses for weaker than they are.)

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

use super::two_level::{PortWords, Raised, VcpuWords, Word, raise, unmask};

/// Lets one of two threads do one access at a time.
struct Scheduler {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    turn: usize,
    done: [bool; 2],
    /// Whether to change over after each access at which there was a choice.
    choices: Vec<bool>,
    next: usize,
}

impl Scheduler {
    fn access<R>(&self, me: usize, act: impl FnOnce() -> R) -> R {
        let state = self.state.lock().unwrap();
        let mut state = self.changed.wait_while(state, |s| s.turn != me).unwrap();
        let result = act();
        if !state.done[1 - me] {
            if state.next == state.choices.len() {
                state.choices.push(false);
            }
            if state.choices[state.next] {
                state.turn = 1 - me;
            }
            state.next += 1;
        }
        self.changed.notify_all();
        result
    }

    fn finish(&self, me: usize) {
        let mut state = self.state.lock().unwrap();
        state.done[me] = true;
        state.turn = 1 - me;
        self.changed.notify_all();
    }
}

std::thread_local! {
    static SCHEDULED: RefCell<Option<(Arc<Scheduler>, usize)>> = const { RefCell::new(None) };
}

/// A word whose accesses are scheduled while two threads run.
#[derive(Default)]
struct Shared(AtomicU64);

impl Shared {
    fn access(&self, act: impl FnOnce(&AtomicU64) -> u64) -> u64 {
        let scheduled = SCHEDULED.with_borrow(Clone::clone);
        match scheduled {
            Some((scheduler, me)) => scheduler.access(me, || act(&self.0)),
            None => act(&self.0),
        }
    }
    fn exchange(&self, value: u64) -> u64 {
        self.access(|w| w.swap(value, Ordering::SeqCst))
    }
}

impl Word for Shared {
    fn set_bits(&self, bits: u64) -> u64 {
        self.access(|w| w.set_bits(bits))
    }
    fn clear_bits(&self, bits: u64) -> u64 {
        self.access(|w| w.clear_bits(bits))
    }
    fn read(&self) -> u64 {
        self.access(Word::read)
    }
}

const PORT: u64 = 1 << 3;
const SELECTOR: u64 = 1;
const BLOCKED: u64 = 1;

#[derive(Default)]
struct World {
    pending: Shared,
    mask: Shared,
    selector: Shared,
    upcall: Shared,
    /// The vCPU's reasons not to run.
    blocked: Shared,
    /// How often the guest took the event.
    seen: AtomicU32,
}

impl World {
    fn masked() -> World {
        let world = World::default();
        world.mask.set_bits(PORT);
        world
    }
    fn port(&self) -> PortWords<'_, Shared> {
        PortWords { pending: &self.pending, mask: &self.mask, bit: PORT, selector_bit: SELECTOR }
    }
    fn vcpu(&self) -> Option<VcpuWords<'_, Shared>> {
        Some(VcpuWords { selector: &self.selector, upcall: &self.upcall })
    }
    /// What the hypervisor does to raise an event.
    fn raise(&self) {
        match raise(self.port(), self.vcpu()) {
            Raised::Notify => {
                self.blocked.clear_bits(BLOCKED);
            }
            // Pollers are woken even when the port is masked.
            Raised::Quiet if self.mask.read() != 0 && self.blocked.read() & BLOCKED != 0 => {
                self.blocked.clear_bits(BLOCKED);
            }
            _ => {}
        }
    }
    /// One upcall as a guest handles it.
    fn upcall(&self) {
        if self.upcall.exchange(0) == 0 || self.selector.exchange(0) & SELECTOR == 0 {
            return;
        }
        let mask = self.mask.read();
        if self.pending.clear_bits(PORT & !mask) & PORT & !mask != 0 {
            self.seen.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn seen(&self) -> u32 {
        self.seen.load(Ordering::SeqCst)
    }
}

/// Runs `left` and `right` at once in every order of their accesses, and `check` after each.
fn explore(make: fn() -> World, left: fn(&World), right: fn(&World), check: fn(&World)) {
    let orders = explore_from(0, make, [left, right], check) + explore_from(1, make, [left, right], check);
    assert!(orders > 4, "only {orders} orders: the two did not run at once");
}

/// All orders that begin with an access of thread `first`; how many there are.
fn explore_from(first: usize, make: fn() -> World, run: [fn(&World); 2], check: fn(&World)) -> u32 {
    let mut choices = Vec::new();
    let mut orders = 0;
    loop {
        let state = State { turn: first, done: [false; 2], choices: core::mem::take(&mut choices), next: 0 };
        let scheduler = Arc::new(Scheduler { state: Mutex::new(state), changed: Condvar::new() });
        let world = make();
        thread::scope(|scope| {
            for (me, run) in run.into_iter().enumerate() {
                let (scheduler, world) = (scheduler.clone(), &world);
                scope.spawn(move || {
                    SCHEDULED.set(Some((scheduler.clone(), me)));
                    run(world);
                    SCHEDULED.set(None);
                    scheduler.finish(me);
                });
            }
        });
        check(&world);
        orders += 1;
        choices = core::mem::take(&mut scheduler.state.lock().unwrap().choices);
        // The next schedule: the last choice that was not to change over becomes one to change over.
        while choices.last() == Some(&true) {
            choices.pop();
        }
        let Some(last) = choices.last_mut() else { return orders };
        *last = true;
    }
}

#[test]
fn an_upcall_takes_every_event_or_another_follows() {
    let raise_twice = |world: &World| {
        world.raise();
        world.raise();
    };
    explore(World::default, raise_twice, World::upcall, |world| {
        world.upcall();
        assert!((1..=2).contains(&world.seen()), "seen {} times", world.seen());
        assert_eq!(world.pending.read(), 0, "an event was left behind");
    });
}

#[test]
fn two_raisers_announce_together() {
    explore(World::default, World::raise, World::raise, |world| {
        world.upcall();
        assert_eq!((world.seen(), world.pending.read()), (1, 0));
    });
}

#[test]
fn a_raise_and_an_unmask_do_not_miss_each_other() {
    let unmask = |world: &World| {
        unmask(world.port(), world.vcpu());
    };
    explore(World::masked, World::raise, unmask, |world| {
        world.upcall();
        assert_eq!(world.seen(), 1, "unmasked and pending, but no upcall");
    });
}

#[test]
fn a_guest_that_unmasks_by_itself_and_looks_misses_nothing() {
    let unmask = |world: &World| {
        world.mask.clear_bits(PORT);
        if world.pending.read() & PORT != 0 {
            world.seen.fetch_add(1, Ordering::SeqCst);
        }
    };
    explore(World::masked, World::raise, unmask, |world| {
        world.upcall();
        assert_ne!(world.seen(), 0);
    });
}

#[test]
fn a_vcpu_that_blocks_is_woken_or_sees_the_event() {
    let block = |world: &World| {
        world.blocked.set_bits(BLOCKED);
        if world.upcall.read() != 0 {
            world.blocked.clear_bits(BLOCKED);
        }
    };
    explore(World::default, World::raise, block, |world| {
        assert_eq!(world.blocked.read(), 0, "asleep with an event pending");
    });
}

#[test]
fn a_vcpu_that_polls_is_woken_or_sees_the_event() {
    let poll = |world: &World| {
        world.blocked.set_bits(BLOCKED);
        if world.pending.read() & PORT != 0 {
            world.blocked.clear_bits(BLOCKED);
        }
    };
    explore(World::masked, World::raise, poll, |world| {
        assert_eq!(world.blocked.read(), 0, "polls a pending port for ever");
    });
}

//! Both protocols under every interleaving of two CPUs.
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

use hypercall_abi::Port;

use super::fifo::{self, Control, Half};
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
    fn flip_bits(&self, bits: u64) {
        self.access(|w| w.fetch_xor(bits, Ordering::SeqCst));
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
fn explore<W: Sync>(make: fn() -> W, left: fn(&W), right: fn(&W), check: fn(&W)) {
    let orders = explore_from(0, make, [left, right], check) + explore_from(1, make, [left, right], check);
    assert!(orders > 4, "only {orders} orders: the two did not run at once");
}

/// All orders that begin with an access of thread `first`; how many there are.
fn explore_from<W: Sync>(first: usize, make: fn() -> W, run: [fn(&W); 2], check: fn(&W)) -> u32 {
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

// ── the FIFO form ──

/// Two ports on one queue of one vCPU. What the hypervisor does to them is done under the table's lock, one after the other; so
/// the guest is the only other party.
#[derive(Default)]
struct Fifo {
    /// Event words of ports 1 and 2, in words of their own.
    words: [Shared; 3],
    control: [Shared; 9],
    upcall: Shared,
    blocked: Shared,
    /// The hypervisor's tail of the queue.
    tail: AtomicU32,
    /// The guest's place in the queue, between two events.
    head: AtomicU32,
    seen: [AtomicU32; 3],
}

const PRIORITY: u8 = 7;
const LINK: u32 = hypercall_abi::evtchn::EVTCHN_FIFO_LINK_MASK;

impl Fifo {
    fn word(&self, port: u32) -> Half<'_, Shared> {
        // Even index: the lower half, whatever the port.
        Half::new(&self.words[port as usize], 0)
    }
    fn append(&self, port: u32) {
        // As `PortTable::move_to_tail`.
        let tail = match self.tail.swap(port, Ordering::SeqCst) {
            0 => None,
            tail if tail == port => None,
            tail => Some(self.word(tail)),
        };
        let control = Control::new(&self.control).unwrap();
        if fifo::enqueue(Port::new(port), PRIORITY, tail, control, &self.upcall) {
            self.blocked.clear_bits(BLOCKED);
        }
    }
    fn raise(&self, port: u32) {
        if fifo::raise(self.word(port)).queue {
            self.append(port);
        }
    }
    fn unmask(&self, port: u32) {
        if fifo::unmask(self.word(port)).queue {
            self.append(port);
        }
    }
    /// One upcall as a guest handles it.
    fn upcall(&self) {
        if self.upcall.exchange(0) == 0 {
            return;
        }
        if self.control[0].exchange(0) >> PRIORITY & 1 == 0 {
            return;
        }
        loop {
            let mut port = self.head.load(Ordering::SeqCst);
            if port == 0 {
                port = (self.control[1 + PRIORITY as usize / 2].read() >> 32) as u32;
            }
            let old = self.word(port).clear(fifo::LINKED | LINK);
            self.head.store(old & LINK, Ordering::SeqCst);
            let now = self.word(port).read();
            if now & fifo::PENDING != 0 && now & fifo::MASKED == 0 {
                self.word(port).clear(fifo::PENDING);
                self.seen[port as usize].fetch_add(1, Ordering::SeqCst);
            }
            if old & LINK == 0 {
                return;
            }
        }
    }
    fn seen(&self, port: usize) -> u32 {
        self.seen[port].load(Ordering::SeqCst)
    }
    /// Both were seen, nothing is left, and one more event of each comes through.
    fn check_both(&self) {
        self.upcall();
        for port in [1, 2] {
            assert_ne!(self.seen(port as usize), 0, "port {port}");
            assert_eq!(self.word(port).read(), 0, "port {port}");
            let before = self.seen(port as usize);
            self.raise(port);
            self.upcall();
            assert_eq!(self.seen(port as usize), before + 1, "port {port} afterwards");
        }
    }
}

#[test]
fn fifo_an_upcall_takes_every_event_or_another_follows() {
    let raise_twice = |world: &Fifo| {
        world.raise(1);
        world.raise(1);
    };
    explore(Fifo::default, raise_twice, Fifo::upcall, |world| {
        world.upcall();
        assert!((1..=2).contains(&world.seen(1)), "seen {} times", world.seen(1));
        assert_eq!(world.word(1).read(), 0, "an event was left behind");
    });
}

#[test]
fn fifo_a_second_port_is_linked_or_announced() {
    let make = || {
        let world = Fifo::default();
        world.raise(1);
        world
    };
    explore(make, |world| world.raise(2), Fifo::upcall, Fifo::check_both);
}

#[test]
fn fifo_two_ports_in_a_row() {
    let both = |world: &Fifo| {
        world.raise(1);
        world.raise(2);
    };
    explore(Fifo::default, both, Fifo::upcall, Fifo::check_both);
}

#[test]
fn fifo_a_tail_that_comes_back_follows_the_other() {
    // Port 1 was the last of the queue; then port 2 is, and port 1 comes again while the guest takes them.
    let make = || {
        let world = Fifo::default();
        world.raise(1);
        world.upcall();
        world.raise(2);
        world
    };
    explore(make, |world| world.raise(1), Fifo::upcall, Fifo::check_both);
}

#[test]
fn fifo_a_guest_that_masks_and_has_it_unmasked_misses_nothing() {
    let mask = |world: &Fifo| {
        world.word(1).set(fifo::MASKED);
        world.upcall();
    };
    explore(
        Fifo::default,
        |world| world.raise(1),
        mask,
        |world| {
            // The hypercall, under the lock and so after the raise.
            world.unmask(1);
            world.upcall();
            assert_ne!(world.seen(1), 0);
            assert_eq!(world.word(1).read(), 0);
        },
    );
}

#[test]
fn fifo_a_guest_that_unmasks_by_itself_and_looks_misses_nothing() {
    let make = || {
        let world = Fifo::default();
        world.word(1).set(fifo::MASKED);
        world
    };
    let unmask = |world: &Fifo| {
        world.word(1).clear(fifo::MASKED);
        if world.word(1).read() & fifo::PENDING != 0 {
            // What came while it was masked is in no queue.
            world.seen[1].fetch_add(1, Ordering::SeqCst);
        }
    };
    explore(
        make,
        |world| world.raise(1),
        unmask,
        |world| {
            world.upcall();
            assert_ne!(world.seen(1), 0);
        },
    );
}

#[test]
fn fifo_a_vcpu_that_blocks_is_woken_or_sees_the_event() {
    let block = |world: &Fifo| {
        world.blocked.set_bits(BLOCKED);
        if world.upcall.read() != 0 {
            world.blocked.clear_bits(BLOCKED);
        }
    };
    explore(
        Fifo::default,
        |world| world.raise(1),
        block,
        |world| {
            assert_eq!(world.blocked.read(), 0, "asleep with an event pending");
        },
    );
}

#[test]
fn fifo_what_a_hostile_guest_writes_ends_every_raise() {
    // Words full of everything, set at any moment: each raise ends, and touches no word but those of its two ports.
    let raise_both = |world: &Fifo| {
        world.raise(1);
        world.raise(2);
    };
    let make = || {
        let world = Fifo::default();
        world.words[0].set_bits(0xdead << 32);
        world
    };
    let scribble = |world: &Fifo| {
        world.words[1].exchange(u64::MAX);
        world.words[1].exchange(0);
    };
    explore(make, raise_both, scribble, |world| {
        assert_eq!(world.words[0].read(), 0xdead << 32);
        assert!(world.control[5..].iter().all(|word| word.read() == 0), "another queue's head");
    });
}

//! Both protocols under every order of accesses that the memory model allows (`cargo xtask test --filter loom`).
//!
//! `interleavings` runs longer stories, in every order of accesses but each seen by all at once. Here loads may return what is old,
//! and each access is weakened in turn: what is listed are those without whose order an event, or what it announces, is lost.

use alloc::string::String;
use alloc::vec::Vec;

use hypercall_abi::Port;
use loom::sync::Arc;
use loom::thread;

use super::fifo::{self, Control, Half};
use super::two_level::{PortWords, Raised, VcpuWords, Word, raise, unmask};
use crate::sync::atomic::model::needed;
use crate::sync::atomic::{AtomicU64, Ordering};

const PORT: u64 = 1 << 3;
const SELECTOR: u64 = 1;
const BLOCKED: u64 = 1;

/// One port of one vCPU, and what its events are about.
struct World {
    pending: AtomicU64,
    mask: AtomicU64,
    selector: AtomicU64,
    upcall: AtomicU64,
    blocked: AtomicU64,
    /// What the sender wrote before it sent: a request in a ring.
    ring: AtomicU64,
    /// The guest took the event.
    seen: AtomicU64,
}

impl World {
    fn new(mask: u64) -> Arc<World> {
        let word = AtomicU64::new;
        Arc::new(World {
            pending: word(0),
            mask: word(mask),
            selector: word(0),
            upcall: word(0),
            blocked: word(0),
            ring: word(0),
            seen: word(0),
        })
    }
    fn port(&self) -> PortWords<'_, AtomicU64> {
        PortWords { pending: &self.pending, mask: &self.mask, bit: PORT, selector_bit: SELECTOR }
    }
    fn vcpu(&self) -> Option<VcpuWords<'_, AtomicU64>> {
        Some(VcpuWords { selector: &self.selector, upcall: &self.upcall })
    }
    /// A request, and its event; as `ops::deliver` wakes.
    fn send(&self) {
        self.ring.store(1, Ordering::Relaxed);
        match raise(self.port(), self.vcpu()) {
            Raised::Notify => {
                self.blocked.clear_bits(BLOCKED);
            }
            Raised::Quiet if self.blocked.read() & BLOCKED != 0 && self.mask.read() & PORT != 0 => {
                self.blocked.clear_bits(BLOCKED);
            }
            _ => {}
        }
    }
    /// The guest handles the event: the request is there.
    fn take(&self) {
        assert_eq!(self.ring.load(Ordering::Relaxed), 1, "an event came before what it is about");
        self.seen.store(1, Ordering::Relaxed);
    }
    /// One upcall.
    fn upcall(&self) {
        if self.upcall.swap(0, Ordering::SeqCst) == 0
            || self.selector.swap(0, Ordering::SeqCst) & SELECTOR == 0
        {
            return;
        }
        let open = PORT & !self.mask.read();
        if open != 0 && self.pending.clear_bits(open) & open != 0 {
            self.take();
        }
    }
    fn check_seen(&self) {
        self.upcall();
        assert_eq!(self.seen.load(Ordering::Relaxed), 1, "the event is lost");
    }
}

/// Lets one CPU send and another do `other`, then checks.
fn beside(mask: u64, other: fn(&World), check: fn(&World)) {
    let world = World::new(mask);
    let sender = {
        let world = world.clone();
        thread::spawn(move || world.send())
    };
    other(&world);
    sender.join().unwrap();
    check(&world);
}

fn two_level(model: fn()) -> Vec<String> {
    needed("two_level.rs", include_str!("two_level.rs"), model)
}

#[test]
fn an_upcall_takes_the_event_or_another_follows() {
    let needed = two_level(|| beside(0, World::upcall, World::check_seen));
    // Each step orders all before and after it, so the next one makes up for it; without any, an event comes before its request.
    assert!(needed.is_empty(), "{needed:#?}");
}

#[test]
fn a_raise_and_an_unmask_do_not_miss_each_other() {
    let needed = two_level(|| {
        beside(
            PORT,
            |world| {
                unmask(world.port(), world.vcpu());
            },
            World::check_seen,
        );
    });
    // Store, then load, on both sides.
    assert_eq!(
        needed,
        [
            "if port.pending.set_bits(port.bit) & port.bit != 0 {",
            "if port.mask.clear_bits(port.bit) & port.bit == 0 || port.pending.read() & port.bit == 0 {"
        ]
    );
}

#[test]
fn a_vcpu_that_blocks_is_woken_or_sees_the_event() {
    let needed = two_level(|| {
        beside(
            0,
            |world| {
                world.blocked.set_bits(BLOCKED);
                if world.upcall.read() != 0 {
                    world.blocked.clear_bits(BLOCKED);
                }
            },
            |world| assert_eq!(world.blocked.read(), 0, "asleep with an event pending"),
        );
    });
    assert!(needed.is_empty(), "{needed:#?}");
}

#[test]
fn a_vcpu_that_polls_is_woken_or_sees_the_event() {
    let needed = two_level(|| {
        beside(
            PORT,
            |world| {
                world.blocked.set_bits(BLOCKED);
                if world.pending.read() & PORT != 0 {
                    world.blocked.clear_bits(BLOCKED);
                }
            },
            |world| assert_eq!(world.blocked.read(), 0, "polls a pending port for ever"),
        );
    });
    assert_eq!(needed, ["if port.pending.set_bits(port.bit) & port.bit != 0 {"]);
}

// ── the FIFO form ──

const PRIORITY: u8 = 7;
const LINK: u32 = hypercall_abi::evtchn::EVTCHN_FIFO_LINK_MASK;

/// Ports 1 and 2 on one queue; port 1 is in it. Raises are done under the table's lock, so there is one sender.
struct Fifo {
    words: [AtomicU64; 3],
    control: [AtomicU64; 9],
    upcall: AtomicU64,
    rings: [AtomicU64; 3],
    seen: [AtomicU64; 3],
}

impl Fifo {
    fn new() -> Arc<Fifo> {
        fn words<const N: usize>() -> [AtomicU64; N] {
            core::array::from_fn(|_| AtomicU64::new(0))
        }
        Arc::new(Fifo {
            words: words(),
            control: words(),
            upcall: AtomicU64::new(0),
            rings: words(),
            seen: words(),
        })
    }
    fn word(&self, port: u32) -> Half<'_, AtomicU64> {
        Half::new(&self.words[port as usize], 0)
    }
    fn send(&self, port: u32, tail: Option<u32>) {
        self.rings[port as usize].store(1, Ordering::Relaxed);
        if fifo::raise(self.word(port)).queue {
            let control = Control::new(&self.control).unwrap();
            let tail = tail.map(|tail| self.word(tail));
            fifo::enqueue(Port::new(port), PRIORITY, tail, control, &self.upcall);
        }
    }
    /// One upcall, with the place in the queue that the guest keeps.
    fn upcall(&self, head: &mut u32) {
        if self.upcall.swap(0, Ordering::SeqCst) == 0
            || self.control[0].swap(0, Ordering::SeqCst) >> PRIORITY & 1 == 0
        {
            return;
        }
        for _ in 0..3 {
            let port = match *head {
                0 => (self.control[1 + PRIORITY as usize / 2].read() >> 32) as u32,
                port => port,
            };
            assert!((1..=2).contains(&port), "the head of the queue is {port}");
            let old = self.word(port).clear(fifo::LINKED | LINK);
            *head = old & LINK;
            if self.word(port).read() & fifo::PENDING != 0 {
                self.word(port).clear(fifo::PENDING);
                let there = self.rings[port as usize].load(Ordering::Relaxed);
                assert_eq!(there, 1, "an event came before what it is about");
                self.seen[port as usize].store(1, Ordering::Relaxed);
            }
            if *head == 0 {
                return;
            }
        }
    }
}

#[test]
fn fifo_a_second_port_is_linked_or_announced() {
    let needed = needed("fifo.rs", include_str!("fifo.rs"), || {
        let world = Fifo::new();
        world.send(1, None);
        let sender = {
            let world = world.clone();
            thread::spawn(move || world.send(2, Some(1)))
        };
        let mut head = 0;
        world.upcall(&mut head);
        sender.join().unwrap();
        world.upcall(&mut head);
        for port in [1, 2] {
            let seen = world.seen[port as usize].load(Ordering::Relaxed);
            assert_eq!(seen, 1, "port {port} is lost");
            assert_eq!(world.word(port).read(), 0, "port {port}");
        }
    });
    // As in the two-level form.
    assert!(needed.is_empty(), "{needed:#?}");
}

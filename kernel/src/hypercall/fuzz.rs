//! Hostile guests: random hypercalls from two domains that know each other's frames. Whatever they ask for, nothing panics,
//! every call comes to an end, and when both are destroyed all memory is back.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use fastrand::Rng;
use hypercall_abi::{DomId, GrantRef, Hypercall, Mfn};

use super::{Args, Budget, Exit, dispatch};
use crate::domain::Current;
use crate::evtchn::tests::hypervisor;
use crate::grant::tests::{DATA, Guest};
use crate::hypervisor::Hypervisor;
use crate::mm::{Pte, Store};
use crate::page_ref::L4;
use crate::platform::Platform;
use crate::platform::sim::SimMachine;

type Hv = Hypervisor<SimMachine>;

/// Frames of the machine: few enough that random numbers name the right ones.
const FRAMES: usize = 192;
/// Worlds, and calls in each.
const WORLDS: u64 = 28;
const CALLS: usize = 4000;
/// Half of the calls: those that count references.
const ACCOUNTING: [Hypercall; 5] = [
    Hypercall::MmuUpdate,
    Hypercall::MmuextOp,
    Hypercall::GrantTableOp,
    Hypercall::EventChannelOp,
    Hypercall::MemoryOp,
];
/// Times a call may be preempted before it counts as one that never ends.
const MOST_STOPS: usize = 5000;

/// A run can be repeated from its seed.
struct Random(Rng);

impl Random {
    fn next(&mut self) -> u64 {
        self.0.u64(..)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }
    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.0.usize(..items.len())]
    }

    /// A number as guests pass them: small ones, frames, entries, addresses of pages and entries, domains, the ends of ranges.
    fn value(&mut self, frames: &[Mfn]) -> u64 {
        let frame = if self.below(4) == 0 { self.below(FRAMES as u64 + 8) } else { self.of(frames).get() };
        match self.below(14) {
            0..3 => self.below(12),
            3 => self.below(700),
            4 => frame,
            5 => frame << 12 | self.of(&[0, 1, 2, 3]) | self.below(512) << 3,
            6 => frame << 12 | self.of(&[0, 1, 3, 5, 7, 0x67, 0x87, 0x107, 0x8000_0000_0000_0007]),
            7 => self.below(DATA as u64 + 2) << 12 | self.below(64) << 3,
            8 => (256 + self.below(8)) << 12,
            9 => {
                u64::from(self.of(&[DomId::SELF, DomId::IO, DomId::XEN, DomId::new(1), DomId::new(3)]).get())
            }
            10 => self.below(4) << 32 | self.below(16),
            11 => self.of(&[
                u64::MAX,
                u64::MAX - 7,
                1 << 63,
                1 << 31,
                0xffff_ffff,
                0x8000_0000,
                0x7fff_ffff_ffff,
                0x7fff_ffff_f000,
                0x8000_0000_0000,
                0xffff_8000_0000_0000,
                0xffff_87ff_ffff_fff8,
                0xffff_8800_0000_0000,
            ]),
            12 => self.next(),
            // A grant entry.
            _ => frame << 32 | self.of(&[1, 3]) << 16 | self.below(32),
        }
    }
}

/// A guest that runs as far as hypercalls know: its vCPU's state is here, not parked.
struct Hostile {
    current: Current,
    /// What it began with: L4 to L1, and the data pages that the L1 table maps from address 0 up.
    tables: [Mfn; 4],
    data: [Mfn; DATA],
}

impl Hostile {
    fn start(hv: &Hv, guest: &Guest) -> Hostile {
        let mut current = guest.current(hv, 64);
        let root = current.state.kernel_root.expect("a guest has page tables");
        let first = |table: Mfn, index: usize| {
            Pte::from_bits(hv.platform.frame(table)[index].load(Ordering::Relaxed)).mfn()
        };
        let (l3, l2) = (first(root, 0), first(first(root, 0), 0));
        let l1 = first(l2, 0);
        let vcpu = current.vcpu.clone();
        let mut state = vcpu.parked.lock().take().expect("nobody runs it");
        let held = hv.pager().get_typed::<L4>(root, guest.domain.id, hv, &mut Budget::unlimited());
        state.kernel_root = Some(held.map_err(|_| ()).expect("pinned").into_pte());
        vcpu.initialised.store(true, Ordering::Release);
        current.state = state;
        Hostile { current, tables: [root, l3, l2, l1], data: core::array::from_fn(|i| first(l1, i)) }
    }

    /// It goes on, whatever the last call did to it: sometimes with its first tables and pages again, as far as it may.
    fn revive(&mut self, hv: &Hv, random: &mut Random) {
        let current = &mut self.current;
        let owner = current.domain().id;
        current.domain().is_shut_down.store(false, Ordering::Release);
        current.vcpu.blocked.store(0, Ordering::Release);
        current.state.kernel_mode = true;
        let mut unlimited = Budget::unlimited();
        if random.below(3) == 0 {
            let home = Some(self.tables[0]);
            let _refused = hv.pager().replace_root(
                &mut current.state.kernel_root,
                home,
                owner,
                || (),
                hv,
                &mut unlimited,
            );
            let links = self.tables.windows(2).map(|pair| (pair[0], 0, pair[1]));
            let pages = self.data.iter().enumerate().map(|(i, mfn)| (self.tables[3], i, *mfn));
            for (table, index, to) in links.chain(pages) {
                let Some(table) = hv.mm.get_page(table, owner) else { continue };
                let new = Pte::from_bits(to.get() << 12 | 7);
                if let Ok(done) =
                    hv.pager().update_entry(&table, index, new, Store::Plain, owner, hv, &mut unlimited)
                {
                    hv.pager().pay(done.debt);
                }
            }
        }
        if let Some(root) = current.state.kernel_root {
            hv.platform.load_root(root);
        }
    }
}

/// Words of an argument of `call`, with something sensible in each field now and then.
fn argument(call: Hypercall, random: &mut Random, frames: &[Mfn]) -> Vec<u64> {
    let slot = |random: &mut Random| (256 + random.below(8)) << 12;
    let peer = |random: &mut Random| random.of(&[1, 3, 0x7ff0]);
    let mut words = Vec::new();
    for _ in 0..5 {
        let frame = random.of(frames).get();
        match call {
            Hypercall::MmuUpdate => {
                let command = random.of(&[0, 0, 0, 1, 2]);
                words.push(random.of(frames).get() << 12 | random.below(6) << 3 | command);
                words.push(if random.below(4) == 0 { 0 } else { frame << 12 | random.of(&[5, 7, 7, 0x67]) });
            }
            Hypercall::MmuextOp => words.extend([random.below(20), frame, random.of(frames).get()]),
            Hypercall::GrantTableOp if random.below(3) == 0 => {
                let side = |random: &mut Random| {
                    let gref = random.below(8);
                    [random.of(&[gref, frame]), peer(random) | random.below(4096) << 16]
                };
                words.extend(side(random));
                words.extend(side(random));
                words.push(random.below(4097) | random.below(4) << 16);
            }
            Hypercall::GrantTableOp if random.below(4) == 0 => {
                // A version; a transfer.
                words.extend([random.of(&[1, 2, frame]), peer(random) | random.below(8) << 32, 0]);
            }
            Hypercall::GrantTableOp if random.below(2) == 0 => {
                words.extend([slot(random), random.of(&[0, frame << 12]), random.below(8)]);
            }
            Hypercall::GrantTableOp => {
                words.extend([slot(random), random.below(24) | random.below(8) << 32, peer(random), 0]);
            }
            Hypercall::EventChannelOp => {
                words.push(peer(random) | peer(random) << 16 | random.below(12) << 32);
                words.push(random.below(12));
            }
            Hypercall::MemoryOp => {
                // Lists of frames lie in the last data page.
                words.extend([(DATA as u64 - 1) << 12, random.below(5), random.below(2), 0x7ff0]);
            }
            _ => words.push(random.value(frames)),
        }
    }
    words
}

fn one_call(hv: &Hv, guest: &mut Hostile, random: &mut Random, frames: &[Mfn], call: Hypercall) {
    let current = &mut guest.current;
    // Arguments in memory where most pointers will point: of this call, and words of all kinds.
    for page in 0..DATA as u64 {
        let words = if random.below(4) == 0 { Vec::new() } else { argument(call, random, frames) };
        let noise = random.below(6);
        let noise = (0..noise).map(|_| random.value(frames)).collect::<Vec<_>>();
        for (word, value) in words.iter().chain(&noise).enumerate() {
            let _unmapped = hv.write_guest(page << 12 | (word as u64) << 3, value);
        }
    }
    if let Some(entry) =
        current.domain().grants.lock().shared(&hv.platform, GrantRef::new(random.below(8) as u32))
    {
        // For this domain or another; whole, read-only, a part, for a transfer, another's.
        let header = random.of(&[1, 3]) << 16 | random.of(&[1, 1, 5, 2, 3, 0x101]);
        let place = random.of(&[0, 8 << 32 | 16 << 48, 3 << 32]);
        let frame = if random.below(4) == 0 { random.below(10) } else { random.of(frames).get() };
        entry.store(header | place, frame);
    }
    let mut args: Args = core::array::from_fn(|_| random.value(frames));
    // Commands are small, lists short, mostly.
    if random.below(8) != 0 {
        let (list, own) = (random.below(DATA as u64) << 12, u64::from(DomId::SELF.get()));
        match call {
            Hypercall::MmuUpdate | Hypercall::MmuextOp => {
                args[..4].copy_from_slice(&[list, random.below(6), 0, own])
            }
            Hypercall::Multicall => args[..2].copy_from_slice(&[list, random.below(6)]),
            Hypercall::UpdateVaMapping => args[0] = random.below(300) << 12,
            Hypercall::GrantTableOp => args[..3].copy_from_slice(&[random.below(13), list, random.below(4)]),
            _ => args[..2].copy_from_slice(&[random.below(34), list]),
        }
    }
    current.state.regs.rsp = random.below(4) << 12;
    for _ in 0..MOST_STOPS {
        current.state.budget = hv.entry_budget();
        match dispatch(hv, current, call.number(), args) {
            Err(Exit::Preempted(again)) => args = again,
            _ => return,
        }
    }
    panic!("{call:?} {args:x?} never ends");
}

fn world(seed: u64) {
    let random = &mut Random(Rng::with_seed(seed));
    let hv = hypervisor(FRAMES);
    hv.steps_per_entry.store(random.of(&[1, 3, 64]), Ordering::Relaxed);
    let free = hv.mm.free_frames();
    let guests = [Guest::new(&hv, 3), Guest::new(&hv, 1)];
    for guest in &guests {
        hv.unpause_domain(&guest.domain).unwrap();
    }
    let mut hostile = guests.each_ref().map(|guest| Hostile::start(&hv, guest));
    let calls: Vec<Hypercall> = (0..64).filter_map(Hypercall::from_number).collect();
    for _ in 0..CALLS {
        let guest = &mut hostile[random.below(2) as usize];
        guest.revive(&hv, random);
        let mine = guest.current.domain().id;
        let frames: Vec<Mfn> =
            (0..FRAMES as u64).map(Mfn::new).filter(|m| hv.mm.get_page(*m, mine).is_some()).collect();
        if frames.is_empty() {
            continue;
        }
        let call = if random.below(2) == 0 { random.of(&calls) } else { random.of(&ACCOUNTING) };
        one_call(&hv, guest, random, &frames, call);
        hv.drain_quarantine();
    }
    for guest in hostile {
        let Current { vcpu, state } = guest.current;
        *vcpu.parked.lock() = Some(state);
    }
    hv.platform.load_idle_root();
    let order = if random.below(2) == 0 { [0, 1, 0] } else { [1, 0, 1] };
    for index in order {
        let stops = (0..MOST_STOPS)
            .take_while(|_| hv.destroy_domain(&guests[index].domain, &mut Budget::new(3)).is_err());
        assert!(stops.count() < MOST_STOPS, "teardown never ends");
    }
    while hv.drain_quarantine() {}
    for guest in &guests {
        assert_eq!(hv.destroy_domain(&guest.domain, &mut Budget::unlimited()), Ok(()));
        assert_eq!(guest.domain.pages.lock().total(), 0);
    }
    assert!(hv.domains.is_empty());
    assert_eq!(hv.mm.free_frames(), free, "seed {seed}: frames are missing");
    for mfn in (0..FRAMES as u64).map(Mfn::new) {
        assert_eq!(hv.mm.general_count(mfn), 0, "{mfn:?}");
        assert!(!hv.mm.type_word(mfn).is_some_and(|w| w.is_pinned() || w.is_parked()), "{mfn:?}");
    }
}

#[test]
fn hostile_guests_break_nothing() {
    match std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => world(seed),
        None => (0..WORLDS).for_each(|seed| {
            let repeat = Note(seed);
            world(seed);
            core::mem::forget(repeat);
        }),
    }
}

/// Says how to repeat a run that panics.
struct Note(u64);

impl Drop for Note {
    fn drop(&mut self) {
        std::eprintln!("repeat with FUZZ_SEED={}", self.0);
    }
}

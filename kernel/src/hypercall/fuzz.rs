//! Hostile guests: random hypercalls from two domains that know each other's frames. Whatever they ask for, nothing panics,
//! every call comes to an end, and when both are destroyed all memory is back.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use hypercall_abi::{DomId, Hypercall, Mfn};

use super::{Args, Exit, dispatch};
use crate::domain::Current;
use crate::evtchn::tests::hypervisor;
use crate::grant::tests::{DATA, Guest};
use crate::hypervisor::Hypervisor;
use crate::page_ref::L4;
use crate::platform::Platform;
use crate::platform::sim::SimMachine;

type Hv = Hypervisor<SimMachine>;

/// Frames of the machine: few enough that random numbers name the right ones.
const FRAMES: usize = 192;
/// Worlds, and calls in each.
const WORLDS: u64 = 24;
const CALLS: usize = 4000;
/// Times a call may be preempted before it counts as one that never ends.
const MOST_STOPS: usize = 5000;

/// SplitMix64: a run can be repeated from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
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
fn start(hv: &Hv, guest: &Guest) -> Current {
    let mut current = guest.current(hv, 64);
    let vcpu = current.vcpu.clone();
    let mut state = vcpu.parked.lock().take().expect("nobody runs it");
    let root = current.state.kernel_root.expect("a guest has page tables");
    let held = hv.pager().get_typed::<L4>(root, guest.domain.id, hv, &mut super::Budget::unlimited());
    state.kernel_root = Some(held.map_err(|_| ()).expect("pinned").into_pte());
    vcpu.initialised.store(true, Ordering::Release);
    current.state = state;
    current
}

/// What the guest's scheduler and its handlers would do: it goes on, whatever the call did to it.
fn revive(hv: &Hv, current: &mut Current) {
    let domain = current.domain();
    domain.is_shut_down.store(false, Ordering::Release);
    current.vcpu.blocked.store(0, Ordering::Release);
    current.state.kernel_mode = true;
    if let Some(root) = current.state.kernel_root {
        hv.platform.load_root(root);
    }
}

fn one_call(hv: &Hv, current: &mut Current, random: &mut Random, frames: &[Mfn], calls: &[Hypercall]) {
    let call = random.of(calls);
    // Arguments in memory: words of all kinds where most pointers will point.
    for page in 0..DATA as u64 {
        for word in 0..random.below(12) {
            let value = random.value(frames);
            let _ = hv.write_guest(page << 12 | word << 3, &value);
        }
    }
    let mut args: Args = core::array::from_fn(|_| random.value(frames));
    // Commands are small, lists short, mostly.
    if random.below(8) != 0 {
        args[0] = match call {
            Hypercall::MmuUpdate | Hypercall::MmuextOp | Hypercall::Multicall => random.below(4) << 12,
            Hypercall::UpdateVaMapping => random.below(300) << 12,
            _ => random.below(34),
        };
        args[1] = match call {
            Hypercall::MmuUpdate | Hypercall::MmuextOp | Hypercall::Multicall => random.below(6),
            Hypercall::UpdateVaMapping => random.value(frames),
            _ => random.below(4) << 12,
        };
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
    let random = &mut Random(seed);
    let hv = hypervisor(FRAMES);
    hv.steps_per_entry.store(random.of(&[1, 3, 64]), Ordering::Relaxed);
    let free = hv.mm.free_frames();
    let guests = [Guest::new(&hv, 3), Guest::new(&hv, 1)];
    for guest in &guests {
        hv.unpause_domain(&guest.domain).unwrap();
    }
    let mut currents = guests.each_ref().map(|guest| start(&hv, guest));
    let calls: Vec<Hypercall> = (0..64).filter_map(Hypercall::from_number).collect();
    for _ in 0..CALLS {
        let current = &mut currents[random.below(2) as usize];
        revive(&hv, current);
        let mine = current.domain().id;
        let frames: Vec<Mfn> =
            (0..FRAMES as u64).map(Mfn::new).filter(|m| hv.mm.get_page(*m, mine).is_some()).collect();
        if frames.is_empty() {
            continue;
        }
        one_call(&hv, current, random, &frames, &calls);
        hv.drain_quarantine();
    }
    for current in currents {
        let Current { vcpu, state } = current;
        *vcpu.parked.lock() = Some(state);
    }
    hv.platform.load_idle_root();
    let order = if random.below(2) == 0 { [0, 1, 0] } else { [1, 0, 1] };
    for index in order {
        let stops = (0..MOST_STOPS)
            .take_while(|_| hv.destroy_domain(&guests[index].domain, &mut super::Budget::new(3)).is_err());
        assert!(stops.count() < MOST_STOPS, "teardown never ends");
    }
    while hv.drain_quarantine() {}
    for guest in &guests {
        assert_eq!(hv.destroy_domain(&guest.domain, &mut super::Budget::unlimited()), Ok(()));
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

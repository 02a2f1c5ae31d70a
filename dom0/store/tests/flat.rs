//! What a domain costs does not depend on how many there are: counted in allocations and comparisons, which are the same on
//! every machine.

mod harness;

use harness::Harness;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::MessageType as M;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNT: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

struct Counting;

// SAFETY: everything is the system's allocator's; the counter allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set((COUNT.get().0 + 1, COUNT.get().1 + layout.size() as u64));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations, and their bytes, while a domain comes, is described in a transaction as a toolstack does, watched, and used.
fn cost_of(h: &mut Harness, number: u16) -> (u64, u64) {
    let before = COUNT.get();
    let guest = h.add(number);
    let control = h.control;
    h.text(control, M::Watch, &format!("/local/domain/{number}/control\0t{number}\0")).unwrap();
    let id = h.start(control);
    for name in [
        "name",
        "domid",
        "memory/target",
        "console/port",
        "console/ring-ref",
        "store/port",
        "control/shutdown",
        "vm",
    ] {
        let path = format!("/local/domain/{number}/{name}");
        h.ask(control, M::Write, id, format!("{path}\0value").as_bytes()).unwrap();
        h.ask(control, M::SetPerms, id, format!("{path}\0n0\0b{number}\0").as_bytes()).unwrap();
    }
    h.end(control, id, true).unwrap();
    h.text(guest, M::Watch, "control\0x\0").unwrap();
    h.text(guest, M::Write, "data/y\0z").unwrap();
    h.text(control, M::Write, &format!("/local/domain/{number}/control/shutdown\0poweroff")).unwrap();
    assert_eq!(h.take_events(guest).len(), 2);
    h.take_events(control);
    let after = COUNT.get();
    (after.0 - before.0, after.1 - before.1)
}

/// The median of seven: tables grow by doubling, which one domain pays for many.
fn median_cost(h: &mut Harness, first: u16) -> (u64, u64) {
    let mut costs: Vec<_> = (first..first + 7).map(|number| cost_of(h, number)).collect();
    costs.sort_unstable();
    costs[3]
}

#[test]
fn the_thousandth_domain_costs_as_the_first() {
    let mut h = Harness::new();
    let first = median_cost(&mut h, 1);
    for number in 8..993 {
        cost_of(&mut h, number);
    }
    let last = median_cost(&mut h, 993);
    println!("allocations and bytes: the 4th domain {first:?}, the 996th {last:?}");
    // One level of one map has grown from 1 to 1000 entries: copying the way to a node takes 10 entries there, not 1.
    assert!(last.0 * 100 <= first.0 * 110 && last.1 * 100 <= first.1 * 130, "{first:?} {last:?}");
    let end = |h: &mut Harness, number: u16| {
        let before = COUNT.get();
        h.store.remove_domain(DomId::new(number), 0);
        COUNT.get().0 - before.0
    };
    let many = end(&mut h, 500);
    (8..993).filter(|number| *number != 500).for_each(|number| h.store.remove_domain(DomId::new(number), 0));
    let few = end(&mut h, 3);
    assert!(many <= few + 20, "{many} {few}");
}

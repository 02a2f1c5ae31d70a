//! A domain with all the vCPUs that it can have: they run, interrupt each other, keep time, and come and go.
//!
//! It needs [`VCPUS`] vCPUs (`dom0_max_vcpus=64`); how many processors the machine has does not matter.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{call, clock_skew, evtchn, pending, take_pending};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use guest_sdk::abi::evtchn::{EvtchnBindIpi, EvtchnBindVirq, EvtchnClose, EvtchnSend};
use guest_sdk::abi::subops::{EvtchnOp, VcpuOp};
use guest_sdk::abi::{Errno, Hypercall, Port, Virq};
use guest_sdk::hypercall::{poll, runstate, set_singleshot_timer, stop_periodic_timer};
use guest_sdk::testkit::{self, Random, Stop, Verdict, cases, check, check_eq};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry, println, vcpu};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            from_the_33rd_on_the_vcpu_info_comes_first,
            there_are_no_more_than_there_are,
            all_of_them_run,
            an_interrupt_goes_round_all,
            each_has_a_timer,
            clocks_of_all_never_step_back,
            down_and_up_under_load,
        ],
    )
}

const MS: u64 = 1_000_000;
/// vCPUs of the domain.
const VCPUS: usize = 64;
/// The first vCPU that has no place in shared_info.
const OUTSIDE: u32 = 32;

/// What vCPUs 1 to 63 are to do.
static ORDER: AtomicU32 = AtomicU32::new(REST);
const REST: u32 = 0;
const COUNT: u32 = 1;
const FORWARD: u32 = 2;
const CLOCK: u32 = 3;
const TIMER: u32 = 4;

/// Which order each carries out.
static AT: [AtomicU32; VCPUS] = [const { AtomicU32::new(u32::MAX) }; VCPUS];
/// Rounds that each has made of what it was told to do.
static ROUNDS: [AtomicU64; VCPUS] = [const { AtomicU64::new(0) }; VCPUS];
/// The port that each is signalled by.
static PORTS: [AtomicU32; VCPUS] = [const { AtomicU32::new(0) }; VCPUS];
/// What went wrong, as each saw it; 0 for nothing.
static WRONG: [AtomicU64; VCPUS] = [const { AtomicU64::new(0) }; VCPUS];
/// The latest time that anybody has seen.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// The life of vCPUs 1 to 63.
extern "C" fn member(id: u32) {
    let me = id as usize;
    loop {
        let order = ORDER.load(Ordering::SeqCst);
        AT[me].store(order, Ordering::SeqCst);
        let done = match order {
            COUNT => true,
            FORWARD => {
                forward(id);
                false
            }
            CLOCK => {
                watch_clock(id);
                true
            }
            TIMER => timer(id),
            _ => {
                let _ = poll(&[], vcpu::now_ns(id) + 5 * MS);
                false
            }
        };
        if done {
            ROUNDS[me].fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Waits for its port and signals the next vCPU's.
fn forward(id: u32) {
    let me = id as usize;
    let port = Port::new(PORTS[me].load(Ordering::SeqCst));
    let _ = poll(&[port], vcpu::now_ns(id) + 100 * MS);
    if take_pending(port) {
        // First: whoever has the interrupt next may find the count complete.
        ROUNDS[me].fetch_add(1, Ordering::SeqCst);
        let port = Port::new(PORTS[(me + 1) % VCPUS].load(Ordering::SeqCst));
        let _ = evtchn(EvtchnOp::Send, &mut EvtchnSend { port });
    }
}

/// Looks whether the time is at least what anybody has seen before.
fn watch_clock(id: u32) {
    let before = LATEST.load(Ordering::SeqCst);
    let now = vcpu::now_ns(id);
    LATEST.fetch_max(now, Ordering::SeqCst);
    if now + clock_skew() < before {
        WRONG[id as usize].fetch_max(before - now, Ordering::SeqCst);
    }
}

/// Sets its timer and sleeps until it comes: neither early nor never.
fn timer(id: u32) -> bool {
    let port = Port::new(PORTS[id as usize].load(Ordering::SeqCst));
    let due = vcpu::now_ns(id) + (3 + u64::from(id) % 7) * MS;
    if set_singleshot_timer(id, due, false).is_err() {
        WRONG[id as usize].store(1, Ordering::SeqCst);
        return false;
    }
    // Longer than 64 that take turns can be away. A poll may end for nothing: an event for another port in its first moment ends it.
    let end = due + 20_000 * MS;
    let wrong = loop {
        let _ = poll(&[port], end);
        let now = vcpu::now_ns(id);
        match take_pending(port) {
            true if now + clock_skew() < due => break 2,
            true => return true,
            false if now > end => break 3,
            false => {}
        }
    };
    WRONG[id as usize].store(wrong, Ordering::SeqCst);
    true
}

/// Lets the others run until the condition holds, thirty seconds at most.
fn wait(what: &str, done: impl Fn() -> bool) -> Result<(), Stop> {
    let start = now_ns();
    while !done() {
        if now_ns().saturating_sub(start) > 30_000 * MS {
            ORDER.store(REST, Ordering::SeqCst);
            return testkit::fail(format_args!("{what}: not within thirty seconds"));
        }
        call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// Gives the others an order, and waits until each has taken it up.
fn order(order: u32) -> Result<(), Stop> {
    ORDER.store(order, Ordering::SeqCst);
    let late = || (1..VCPUS).filter(|id| AT[*id].load(Ordering::SeqCst) != order);
    wait("the order", || late().next().is_none()).inspect_err(|_| {
        for id in late() {
            let state = runstate(id as u32).map(|info| (info.state, info.state_entry_time));
            println!(
                "vCPU {id}: order {order}, at {}; {state:?} at {}",
                AT[id].load(Ordering::SeqCst),
                now_ns()
            );
        }
    })
}

fn rounds() -> [u64; VCPUS] {
    core::array::from_fn(|id| ROUNDS[id].load(Ordering::SeqCst))
}

/// Waits until each of the others has made `count` rounds more.
fn rounds_of_each(count: u64) -> Result<(), Stop> {
    let before = rounds();
    wait("rounds of each", || {
        rounds().iter().zip(&before).skip(1).all(|(now, before)| *now >= before + count)
    })
}

/// Who saw something wrong, and what.
fn wrong() -> Option<(usize, u64)> {
    let all: [u64; VCPUS] = core::array::from_fn(|id| WRONG[id].swap(0, Ordering::SeqCst));
    all.into_iter().enumerate().find(|(_, wrong)| *wrong != 0)
}

fn command(operation: VcpuOp, id: u64) -> Result<u64, Errno> {
    call(Hypercall::VcpuOp, [operation.number().into(), id, 0, 0, 0])
}

fn from_the_33rd_on_the_vcpu_info_comes_first(_: &mut Domain) -> Verdict {
    // The 32nd has its place in shared_info.
    let inside = OUTSIDE - 1;
    // SAFETY: a member lives by atomics and hypercalls.
    check_eq!(unsafe { vcpu::initialise(inside, &mut vcpu::at(inside, member)) }, Ok(()));
    check_eq!(vcpu::up(inside), Ok(()));
    wait("vCPU 31", || runs(inside))?;
    let mut registers = vcpu::at(OUTSIDE, member);
    // SAFETY: as above.
    let mut initialise = || unsafe { vcpu::initialise(OUTSIDE, &mut registers) };
    check_eq!(initialise(), Err(Errno::EINVAL), "without a vcpu_info");
    check_eq!(vcpu::up(OUTSIDE), Err(Errno::EINVAL), "not initialised");
    check_eq!(vcpu::is_up(OUTSIDE), Ok(false));
    check_eq!(vcpu::register_info(OUTSIDE), Ok(()));
    check_eq!(vcpu::register_info(OUTSIDE), Err(Errno::EINVAL), "registered twice");
    check_eq!(vcpu::up(OUTSIDE), Err(Errno::EINVAL), "registered, but not initialised");
    check_eq!(initialise(), Ok(()));
    check_eq!(initialise(), Err(Errno::EEXIST));
    check!(!runs(OUTSIDE), "it is not up yet");
    check_eq!(vcpu::up(OUTSIDE), Ok(()));
    wait("vCPU 32", || runs(OUTSIDE))?;
    // Its clock record is in the new place.
    check!(vcpu::now_ns(OUTSIDE) > 0);
    Ok(())
}

/// Whether a vCPU has begun.
fn runs(id: u32) -> bool {
    AT[id as usize].load(Ordering::SeqCst) != u32::MAX
}

fn there_are_no_more_than_there_are(_: &mut Domain) -> Verdict {
    for id in [VCPUS as u64, VCPUS as u64 + 1, 8192, u64::from(u32::MAX)] {
        check_eq!(command(VcpuOp::IsUp, id), Err(Errno::ENOENT), "{id}");
        check_eq!(command(VcpuOp::Up, id), Err(Errno::ENOENT), "{id}");
        let mut bind = EvtchnBindIpi { vcpu: id as u32, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindIpi, &mut bind), Err(Errno::ENOENT), "{id}");
    }
    let last = VCPUS as u32 - 1;
    check_eq!(vcpu::is_up(last), Ok(runs(last)));
    Ok(())
}

/// Starts all that have not been started.
fn gather() -> Verdict {
    for id in (1..VCPUS as u32).filter(|id| !runs(*id)) {
        // SAFETY: a member lives by atomics and hypercalls.
        check_eq!(unsafe { vcpu::start(id, member) }, Ok(()), "vCPU {id} (dom0_max_vcpus=64)");
    }
    wait("all of them", || (1..VCPUS as u32).all(runs))
}

fn all_of_them_run(_: &mut Domain) -> Verdict {
    gather()?;
    order(COUNT)?;
    rounds_of_each(1)?;
    for id in 1..VCPUS as u32 {
        let info = runstate(id)?;
        check!(info.time[0] > 0, "vCPU {id}: {info:?}");
    }
    order(REST)
}

fn an_interrupt_goes_round_all(_: &mut Domain) -> Verdict {
    gather()?;
    for (id, port) in PORTS.iter().enumerate() {
        let mut bind = EvtchnBindIpi { vcpu: id as u32, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindIpi, &mut bind), Ok(0));
        port.store(bind.port.get(), Ordering::SeqCst);
    }
    let own = Port::new(PORTS[0].load(Ordering::SeqCst));
    let first = Port::new(PORTS[1].load(Ordering::SeqCst));
    order(FORWARD)?;
    let before = rounds();
    for _ in 0..20 {
        check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: first }), Ok(0));
        wait("its return", || pending(own))?;
        check!(take_pending(own));
    }
    // Each has passed it on each time: not one was left out.
    let passed = rounds();
    order(REST)?;
    for id in 1..VCPUS {
        check_eq!(passed[id] - before[id], 20, "vCPU {id}");
    }
    close_ports()
}

fn close_ports() -> Verdict {
    for port in &PORTS {
        let port = Port::new(port.swap(0, Ordering::SeqCst));
        if port.get() != 0 {
            check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
        }
    }
    Ok(())
}

fn each_has_a_timer(_: &mut Domain) -> Verdict {
    gather()?;
    wrong();
    // The runtime has the timer of vCPU 0.
    for (id, port) in PORTS.iter().enumerate().skip(1) {
        let mut bind = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: id as u32, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindVirq, &mut bind), Ok(0), "vCPU {id}");
        // Every vCPU begins with a tick of 10 ms.
        check_eq!(stop_periodic_timer(id as u32), Ok(()));
        port.store(bind.port.get(), Ordering::SeqCst);
    }
    // A tick may have been under way on another processor.
    let start = now_ns();
    wait("the last ticks", || now_ns().saturating_sub(start) > 50 * MS)?;
    for port in &PORTS[1..] {
        take_pending(Port::new(port.load(Ordering::SeqCst)));
    }
    order(TIMER)?;
    rounds_of_each(5)?;
    order(REST)?;
    check_eq!(wrong(), None, "(1: refused, 2: early, 3: never)");
    close_ports()
}

fn clocks_of_all_never_step_back(_: &mut Domain) -> Verdict {
    gather()?;
    wrong();
    order(CLOCK)?;
    rounds_of_each(100)?;
    order(REST)?;
    check_eq!(wrong(), None, "nanoseconds back");
    Ok(())
}

fn down_and_up_under_load(_: &mut Domain) -> Verdict {
    gather()?;
    order(COUNT)?;
    let mut random = Random::with_seed(1);
    for round in 0..100 {
        let id = random.usize(1..VCPUS);
        check_eq!(vcpu::down(id as u32), Ok(()));
        check_eq!(vcpu::is_up(id as u32), Ok(false));
        // It may run for a moment yet, on another processor.
        wait("its rest", || runstate(id as u32).is_ok_and(|info| info.state != 0))?;
        let stands = ROUNDS[id].load(Ordering::SeqCst);
        let start = now_ns();
        wait("two milliseconds", || now_ns().saturating_sub(start) > 2 * MS)?;
        check_eq!(ROUNDS[id].load(Ordering::SeqCst), stands, "vCPU {id} is down, round {round}");
        check_eq!(vcpu::up(id as u32), Ok(()));
        // Every tenth has to show that it goes on.
        if round % 10 == 0 {
            wait("its return", || ROUNDS[id].load(Ordering::SeqCst) > stands)?;
        }
    }
    rounds_of_each(1)?;
    order(REST)
}

//! The scheduler, measured: shares, caps, latencies and the price of switching, with domains that this guest, booted as dom0, makes
//! itself.
//!
//! Cases are chosen by the scenarios `sched-*` in tests/scenarios, for each needs its own machine. Where a case wants
//! `-icount shift=0`, a nanosecond is an instruction: then the work that the cells count is exact, and so is what is lost.
#![no_std]
#![no_main]

extern crate alloc;

mod cell;

use alloc::vec::Vec;
use cell::{Cell, DATA, Deed, UNIT};
use core::time::Duration;
use guest_sdk::abi::control::{ControlOp, CreateDomain, CreateFlags, Pause};
use guest_sdk::abi::{DomId, Errno};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, skip};
use guest_sdk::time::{now_ns, sleep};
use guest_sdk::{Domain, control, entry, println};
use zerocopy::IntoBytes;

const MS: u64 = 1_000_000;
/// The scheduler's slice (`sched::policy::SLICE_NS`).
const SLICE_NS: u64 = 10 * MS;
/// Shortest time a vCPU runs before one that woke takes its CPU (`sched::policy::SHORTEST_RUN_NS`), and the longest entry of any
/// guest (docs/design/0004) under `-icount shift=0`: together the longest that a wake-up may take.
const WAKE_BOUND_NS: u64 = MS / 2 + MS / 5;
/// Within which dom0 answers, whatever the others do.
const ANSWER_NS: u64 = 100 * MS;

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            price_of_a_null_hypercall,
            weights_are_shares,
            sleepers_get_their_weight,
            weights_change_at_run_time,
            caps_hold,
            caps_hold_for_several_vcpus,
            switching_costs_little,
            one_who_wakes_is_served_at_once,
            hostile_domains_take_no_more_than_their_share,
            hostile_domains_on_several_cpus,
            sixty_four_vcpus_storm,
            weights_on_several_cpus,
            weights_beyond_a_cpu_on_several_cpus,
            sleepers_on_several_cpus,
            sleepers_due_nearly_what_they_want,
            alone_without_a_tick,
            idle_cpus_hardly_wake,
            soft_affinity_is_preferred,
            pause_waits_until_they_are_off,
            domains_that_pause_each_other,
            each_keeps_its_cpu
        ],
    )
}

fn wait_ms(ms: u64) {
    sleep(Duration::from_millis(ms));
}

/// Waits until a cell works, with its tick stopped, and what came before that is over.
fn settled(cell: &Cell) -> Verdict {
    let until = now_ns() + 10_000 * MS;
    while cell.work() == 0 {
        check!(now_ns() < until, "it does not begin");
        wait_ms(10);
    }
    wait_ms(100);
    Ok(())
}

/// Whether a nanosecond is an instruction.
fn counts_instructions() -> Result<bool, Errno> {
    Ok((999_000..=1_001_000).contains(&control::phys_info()?.cpu_khz))
}

fn wants_icount() -> Result<(), Stop> {
    if counts_instructions()? { Ok(()) } else { skip("needs -icount shift=0") }
}

fn wants_cpus(count: u32) -> Result<(), Stop> {
    let there = control::phys_info()?.cpus;
    if there >= count { Ok(()) } else { skip(alloc::format!("needs {count} CPUs, there are {there}")) }
}

/// Checks that `part` of `whole` is `due` of `total`, within `percent`.
fn check_share(what: &str, part: u64, whole: u64, due: u64, total: u64, percent: u64) -> Verdict {
    let (part, due) = (u128::from(part) * u128::from(total), u128::from(whole) * u128::from(due));
    let millis = part * 1000 / due.max(1);
    println!("{what}: {}.{:03} of what is due", millis / 1000, millis % 1000);
    check!(
        part.abs_diff(due) * 100 <= due * u128::from(percent),
        "{what}: not within {percent} % of its due"
    );
    Ok(())
}

/// Instructions (under `-icount shift=0`) of the cheapest hypercall, from the guest's side.
fn price_of_a_null_hypercall(_: &mut Domain) -> Verdict {
    const ROUNDS: u64 = 1000;
    // SAFETY: every processor has the counter.
    let tsc = || unsafe { core::arch::x86_64::_rdtsc() };
    let before = tsc();
    for _ in 0..ROUNDS {
        // SAFETY: number 63 is nobody's: ENOSYS, nothing else.
        let _ = unsafe { guest_sdk::hypercall::raw(63, [0; 5]) };
    }
    let each = (tsc() - before) / ROUNDS;
    println!("null hypercall: {each} ticks, with the guest's own loop");
    if counts_instructions()? {
        check!(each < 500, "{each} instructions");
    }
    Ok(())
}

/// Runs cells for `ms`, and checks that each got `due` parts of what all got, by the hypervisor's account and by its own count, and
/// that none went without for a second.
///
/// On several CPUs the count says little: there QEMU lets one CPU execute at a time, some milliseconds long, and a nanosecond is an
/// instruction of one of them. How long each ran, in emulated time, is true all the same.
fn shares(cells: &[Cell], due: &[u64], ms: u64, percent: u64) -> Verdict {
    const WINDOW_MS: u64 = 1_000;
    let exact = control::phys_info()?.cpus == 1;
    let read = |cell: &Cell| -> Result<(u64, u64), Errno> { Ok((cell.work(), cell.ran_ns()?)) };
    let before = cells.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let mut last: Vec<u64> = before.iter().map(|(work, _)| *work).collect();
    for window in 0..ms / WINDOW_MS {
        wait_ms(WINDOW_MS);
        for ((index, cell), last) in cells.iter().enumerate().zip(&mut last) {
            let work = cell.work();
            check!(work > *last, "cell {index} did nothing for {WINDOW_MS} ms, after {window} of these");
            *last = work;
        }
    }
    let after = cells.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let got: Vec<_> = before.iter().zip(&after).map(|(b, a)| (a.0 - b.0, a.1 - b.1)).collect();
    let total: u64 = due.iter().sum();
    let work: u64 = got.iter().map(|got| got.0).sum();
    let ran: u64 = got.iter().map(|got| got.1).sum();
    for (index, ((its_work, its_ran), due)) in got.iter().zip(due).enumerate() {
        check_share(&alloc::format!("cell {index}, run time"), *its_ran, ran, *due, total, percent)?;
        if exact {
            check_share(&alloc::format!("cell {index}, work"), *its_work, work, *due, total, percent)?;
        }
    }
    Ok(())
}

fn weights_are_shares(_: &mut Domain) -> Verdict {
    wants_icount()?;
    let cells =
        (1..=8).map(|weight| Cell::weighted(64 * weight, Deed::Spin)).collect::<Result<Vec<_>, _>>()?;
    cells.iter().try_for_each(Cell::start)?;
    wait_ms(100);
    shares(&cells, &[1, 2, 3, 4, 5, 6, 7, 8], 60_000, 2)
}

fn sleepers_get_their_weight(_: &mut Domain) -> Verdict {
    wants_icount()?;
    // The light half sleeps half of the time, which is more than its weight leaves it.
    let deed = |weight| if weight <= 4 { Deed::Doze } else { Deed::Spin };
    let cells =
        (1..=8).map(|weight| Cell::weighted(64 * weight, deed(weight))).collect::<Result<Vec<_>, _>>()?;
    cells.iter().try_for_each(Cell::start)?;
    wait_ms(100);
    shares(&cells, &[1, 2, 3, 4, 5, 6, 7, 8], 60_000, 2)
}

/// What domains of one vCPU get by weight on `cpus` CPUs, in millionths of a CPU each: by weight, but nobody more than one CPU, and
/// what that leaves goes to the others by weight.
fn ideal(weights: &[u32], cpus: u64) -> Vec<u64> {
    const CPU: u64 = 1_000_000;
    let mut full = alloc::vec![false; weights.len()];
    loop {
        let left = (cpus - full.iter().filter(|full| **full).count() as u64) * CPU;
        let rest: u64 =
            weights.iter().zip(&full).filter(|(_, full)| !**full).map(|(w, _)| u64::from(*w)).sum();
        let due = |(weight, full): (&u32, &bool)| {
            if *full { CPU } else { left * u64::from(*weight) / rest }
        };
        let all: Vec<u64> = weights.iter().zip(&full).map(due).collect();
        if all.iter().all(|due| *due <= CPU) {
            return all;
        }
        full = all.iter().map(|due| *due >= CPU).collect();
    }
}

/// Cells of these weights run on all CPUs for half a minute, the first `sleepers` of them sleeping half of the time. Each gets what is
/// due to it within `percent`.
fn shares_of_all_cpus(weights: &[u32], sleepers: usize, percent: u64) -> Verdict {
    let cpus = control::phys_info()?.cpus;
    let deed = |cell| if cell < sleepers { Deed::Doze } else { Deed::Spin };
    let cells = weights
        .iter()
        .enumerate()
        .map(|(cell, weight)| Cell::weighted(64 * weight, deed(cell)))
        .collect::<Result<Vec<_>, _>>()?;
    cells.iter().try_for_each(Cell::start)?;
    wait_ms(500);
    let (idle, start) = (idle_ns(cpus)?, now_ns());
    shares(&cells, &ideal(weights, cpus.into()), 30_000, percent)?;
    let (idle, span) = (idle_ns(cpus)? - idle, (now_ns() - start) * u64::from(cpus));
    println!("{cpus} CPUs idled for {} parts in 100000", idle * 100_000 / span);
    check!(idle * 100 <= span, "CPUs idled for {} ms while somebody waited", idle / MS);
    Ok(())
}

/// Time that all CPUs idled together.
fn idle_ns(cpus: u32) -> Result<u64, Errno> {
    (0..cpus).map(|cpu| Ok(control::cpu_info(cpu)?.idle_ns)).sum()
}

fn weights_on_several_cpus(_: &mut Domain) -> Verdict {
    wants_cpus(4)?;
    wants_icount()?;
    // Nobody is due more than a CPU: 8 parts of 36 of 4 CPUs.
    shares_of_all_cpus(&[1, 2, 3, 4, 5, 6, 7, 8], 0, 2)
}

fn weights_beyond_a_cpu_on_several_cpus(_: &mut Domain) -> Verdict {
    wants_cpus(4)?;
    wants_icount()?;
    // The last two get a CPU each, the others two by weight.
    shares_of_all_cpus(&[1, 1, 1, 2, 2, 4, 16, 16], 0, 2)
}

fn sleepers_on_several_cpus(_: &mut Domain) -> Verdict {
    wants_cpus(4)?;
    wants_icount()?;
    // The light half wants half a CPU each, which is more than its weight leaves it.
    shares_of_all_cpus(&[1, 1, 2, 2, 7, 7, 8, 8], 4, 3)
}

fn sleepers_due_nearly_what_they_want(_: &mut Domain) -> Verdict {
    wants_cpus(4)?;
    wants_icount()?;
    // Half a CPU each, and 0.44 are due.
    shares_of_all_cpus(&[4, 4, 4, 4, 5, 5, 5, 5], 4, 5)
}

fn weights_change_at_run_time(_: &mut Domain) -> Verdict {
    wants_icount()?;
    let [a, b] = [Cell::weighted(256, Deed::Spin)?, Cell::weighted(256, Deed::Spin)?];
    a.start()?;
    // Alone for a long time: that it counts at the weight of that time shows in what it gets later.
    wait_ms(5_000);
    control::set_weight(a.id, 1)?;
    control::set_weight(a.id, 64)?;
    b.start()?;
    wait_ms(1_000);
    let cells = [a, b];
    shares(&cells, &[1, 4], 20_000, 2)?;
    control::set_weight(cells[0].id, 768)?;
    wait_ms(1_000);
    shares(&cells, &[3, 1], 20_000, 2)?;
    for weight in [0, 65536] {
        check_eq!(control::set_weight(cells[0].id, weight), Err(Errno::EINVAL));
    }
    check_eq!(control::domain_info(cells[0].id)?.weight, 768);
    Ok(())
}

/// Checks that a domain runs for `percent` of a CPU over 5 s, and at no time in 100 ms more than 10 ms above it.
fn held(cell: &Cell, percent: u64, what: &str) -> Verdict {
    wait_ms(200);
    let (start, start_ns) = (cell.ran_ns()?, now_ns());
    let (mut before, mut before_ns) = (start, start_ns);
    for _ in 0..50 {
        wait_ms(100);
        let (ran, now) = (cell.ran_ns()?, now_ns());
        let most = (now - before_ns) * percent / 100 + 10 * MS;
        check!(
            ran - before <= most,
            "{what}: {} us in {} us",
            (ran - before) / 1000,
            (now - before_ns) / 1000
        );
        (before, before_ns) = (ran, now);
    }
    check_share(what, before - start, before_ns - start_ns, percent, 100, 2)
}

fn caps_hold(_: &mut Domain) -> Verdict {
    wants_icount()?;
    let capped = Cell::new(1, Deed::Spin)?;
    capped.start()?;
    // It has run alone for a while: the cap counts from when it is set.
    wait_ms(3_000);
    for percent in [5, 20, 50, 90] {
        control::set_cap(capped.id, percent)?;
        check_eq!(control::domain_info(capped.id)?.cap, percent);
        held(&capped, percent.into(), &alloc::format!("{percent} % on an idle machine"))?;
    }
    let other = Cell::new(1, Deed::Spin)?;
    other.start()?;
    control::set_cap(capped.id, 20)?;
    held(&capped, 20, "20 % beside a spinner")?;
    // It waits for its cap as it waits for a CPU: the guest sees stolen time.
    let before = capped.vcpu(0)?;
    wait_ms(1_000);
    let after = capped.vcpu(0)?;
    check_share("stolen", after.runnable_ns - before.runnable_ns, 1_000 * MS, 80, 100, 3)?;
    check_eq!(after.offline_ns, before.offline_ns, "offline time");
    control::set_cap(capped.id, 0)?;
    wait_ms(1_000);
    shares(&[capped, other], &[1, 1], 5_000, 2)?;
    check_eq!(control::set_cap(DomId::ZERO, 6401), Err(Errno::EINVAL));
    Ok(())
}

fn caps_hold_for_several_vcpus(_: &mut Domain) -> Verdict {
    wants_cpus(2)?;
    let capped = Cell::new(4, Deed::Spin)?;
    capped.start()?;
    for percent in [150, 60] {
        control::set_cap(capped.id, percent)?;
        wait_ms(200);
        let (ran, start) = (capped.ran_ns()?, now_ns());
        wait_ms(5_000);
        let (ran, span) = (capped.ran_ns()? - ran, now_ns() - start);
        check_share(&alloc::format!("{percent} % of four vCPUs"), ran, span, percent.into(), 100, 3)?;
    }
    Ok(())
}

/// 128 domains that spin: what is not their work is the hypervisor's, and dom0's few wake-ups.
fn switching_costs_little(_: &mut Domain) -> Verdict {
    const CELLS: usize = 128;
    wants_icount()?;
    let cells = (0..CELLS).map(|_| Cell::new(1, Deed::Spin)).collect::<Result<Vec<_>, _>>()?;
    cells.iter().try_for_each(Cell::start)?;
    // Each has begun.
    wait_ms(2_000);
    let work = || cells.iter().map(Cell::work).sum::<u64>();
    let (switches, done, start) = (control::cpu_info(0)?.switches, work(), now_ns());
    wait_ms(20 * CELLS as u64 * SLICE_NS / MS);
    let (done, span) = (work() - done, now_ns() - start);
    let switches = control::cpu_info(0)?.switches - switches;
    let lost = span - done * UNIT;
    println!(
        "{CELLS} spinning domains: {switches} switches in {} ms, {} instructions each, {} parts in 100000 lost",
        span / MS,
        lost / switches,
        lost * 100_000 / span
    );
    check!(switches as usize >= 19 * CELLS, "slices are longer than said");
    check!(lost * 50 <= span, "{lost} of {span} instructions lost");
    let all: Vec<_> = cells.iter().map(Cell::work).collect();
    let (least, most) = (all.iter().min().copied().unwrap_or(0), all.iter().max().copied().unwrap_or(0));
    check!((most - least) * UNIT <= 2 * SLICE_NS, "from {least} to {most} units: somebody starves");
    Ok(())
}

/// How late this vCPU runs after each of `count` wake-ups: the mean and the worst, ns.
fn lateness(count: u64) -> (u64, u64) {
    let (mut sum, mut worst) = (0, 0);
    for round in 0..count {
        // Not in step with slices.
        let until = now_ns() + 3 * MS + round * 37_003 % (2 * MS);
        while now_ns() < until {
            guest_sdk::events::sleep_until(Some(until));
        }
        let late = now_ns() - until;
        (sum, worst) = (sum + late, worst.max(late));
    }
    (sum / count, worst)
}

fn one_who_wakes_is_served_at_once(_: &mut Domain) -> Verdict {
    wants_icount()?;
    let cells = (0..16).map(|_| Cell::new(1, Deed::Spin)).collect::<Result<Vec<_>, _>>()?;
    cells.iter().try_for_each(Cell::start)?;
    wait_ms(1_000);
    let (mean, worst) = lateness(1_000);
    println!("wake-up beside 16 spinners: {mean} ns late in the mean, {worst} ns at worst");
    check!(worst <= WAKE_BOUND_NS, "{worst} ns late, the bound is {WAKE_BOUND_NS}");
    Ok(())
}

/// Calls that many vCPUs may make at once without end: harmless ones, yields, flushes of all TLBs, timers, polls of nothing, bad
/// ones.
const STORM: &[(u64, u64, u64)] = &[
    // xen_version, a short and a long answer.
    (17, 0, 0),
    (17, 6, DATA),
    // mmuext_op: the data page holds zeros, which is no command for this caller.
    (26, DATA, 1),
    // set_timer_op in the past.
    (15, 1, 0),
    // sched_op: yield.
    (29, 0, 0),
    // vcpu_op: is_up of vCPU 0.
    (24, 3, 0),
    // update_va_mapping of nothing, with a flush of the whole TLB on all CPUs.
    (14, 0x7000, 0),
    // multicall of eight empty entries: set_trap_table(0).
    (13, DATA, 8),
    // Nobody's number.
    (63, 0, 0),
];

/// Two well-behaved spinners beside hostile domains: each domain has the same weight, so each gets as much.
fn hostile(cpus: u64, storm_vcpus: u32, ms: u64) -> Verdict {
    let good = [Cell::new(1, Deed::Spin)?, Cell::new(1, Deed::Spin)?];
    let masked = Cell::new(1, Deed::Spin)?;
    let fault = Cell::new(1, Deed::Fault)?;
    let storm = Cell::new(storm_vcpus, Deed::Storm(STORM))?;
    for cell in good.iter().chain([&masked, &fault, &storm]) {
        cell.start()?;
    }
    wait_ms(200);
    let vcpus = u64::from(storm_vcpus) + 4;
    let before = good.iter().map(Cell::ran_ns).collect::<Result<Vec<_>, _>>()?;
    let start = now_ns();
    let mut worst = 0;
    while now_ns() - start < ms * MS {
        worst = worst.max(lateness(10).1);
    }
    let span = now_ns() - start;
    println!("dom0 beside hostile domains: {} us late at worst", worst / 1000);
    check!(worst <= ANSWER_NS, "dom0 ran {} ms after its wake-up", worst / MS);
    for (cell, before) in good.iter().zip(before) {
        let ran = cell.ran_ns()? - before;
        let due = span * cpus.min(vcpus) / vcpus;
        check_share("a good neighbour", ran, due, 1, 1, 1000)?;
        // dom0's own share, and what the last slices make uneven.
        check!(
            (ran + SLICE_NS) * 100 >= due * 95,
            "a good neighbour ran {} ms of {} ms due",
            ran / MS,
            due / MS
        );
    }
    for (what, cell) in [("masked", &masked), ("fault", &fault), ("storm", &storm)] {
        let info = control::domain_info(cell.id)?;
        println!("{what}: {} units, {} hypercalls, {} faults", cell.work(), info.hypercalls, info.faults);
        check!(cell.work() > 0 && info.shutdown_reason == 0, "{what} did nothing");
    }
    // They go on meanwhile, on other CPUs: what has been counted is asked for last.
    let (faulted, called) = (fault.work(), storm.work());
    check!(control::domain_info(fault.id)?.faults >= faulted, "faults are counted");
    check!(control::domain_info(storm.id)?.hypercalls >= called, "hypercalls are counted");
    for vcpu in 0..storm_vcpus {
        check!(storm.work_of(vcpu) > 0, "vCPU {vcpu} of the storm starves");
    }
    Ok(())
}

fn hostile_domains_take_no_more_than_their_share(_: &mut Domain) -> Verdict {
    wants_icount()?;
    hostile(1, 8, 3_000)
}

fn hostile_domains_on_several_cpus(_: &mut Domain) -> Verdict {
    wants_cpus(2)?;
    wants_icount()?;
    hostile(control::phys_info()?.cpus.into(), 16, 3_000)
}

/// As many vCPUs as a domain can have, on as many CPUs as there are.
fn sixty_four_vcpus_storm(_: &mut Domain) -> Verdict {
    wants_icount()?;
    hostile(control::phys_info()?.cpus.into(), 64, 3_000)
}

fn alone_without_a_tick(domain: &mut Domain) -> Verdict {
    wants_cpus(2)?;
    let here = control::vcpu_info(domain.id(), 0)?.cpu;
    let cell = Cell::new(1, Deed::Spin)?;
    let there = u64::MAX << 1 & !(1 << here) | u64::from(here != 0);
    control::set_affinity(cell.id, 0, there, there)?;
    cell.start()?;
    settled(&cell)?;
    // A CPU that has kicked another looks a second later whether it came.
    wait_ms(1_000);
    let (vcpu, work) = (cell.vcpu(0)?, cell.work());
    check!(vcpu.cpu != here, "it has its own CPU");
    let before = control::cpu_info(vcpu.cpu)?;
    wait_ms(2_000);
    let after = control::cpu_info(vcpu.cpu)?;
    check!(cell.work() > work, "it ran");
    check_eq!(cell.vcpu(0)?.switches, vcpu.switches, "it was never put off");
    check_eq!(after.timer_interrupts, before.timer_interrupts, "timer interrupts of a CPU with one vCPU");
    check_eq!(after.idle_ns, before.idle_ns, "idle time");
    // The counter counts: with two there is a slice.
    let other = Cell::new(1, Deed::Spin)?;
    for cell in [&cell, &other] {
        control::set_affinity(cell.id, 0, 1 << vcpu.cpu, u64::MAX)?;
    }
    other.start()?;
    wait_ms(2_000);
    check!(
        control::cpu_info(vcpu.cpu)?.timer_interrupts > after.timer_interrupts + 20,
        "slices end by the timer"
    );
    Ok(())
}

/// The watchdog's looks are all that wakes a machine that has nothing to do: after 2, 4, 8, ... seconds.
fn idle_cpus_hardly_wake(domain: &mut Domain) -> Verdict {
    wants_icount()?;
    let own = control::vcpu_info(domain.id(), 0)?.cpu;
    let cpus = control::phys_info()?.cpus;
    let wakes = |cpu| control::cpu_info(cpu).map(|info| info.timer_interrupts);
    let before = (0..cpus).map(wakes).collect::<Result<Vec<_>, _>>()?;
    wait_ms(30_000);
    let after = (0..cpus).map(wakes).collect::<Result<Vec<_>, _>>()?;
    for (cpu, (before, after)) in (0..cpus).zip(before.iter().zip(&after)) {
        println!("CPU {cpu}: {} timer interrupts in 30 s", after - before);
    }
    for (cpu, (before, after)) in (0..cpus).zip(before.iter().zip(&after)) {
        // The sleep's own end comes on one of them.
        check!(after - before <= 5 + u64::from(cpu == own), "CPU {cpu} woke {} times", after - before);
    }
    check!(after[own as usize] > before[own as usize], "timer interrupts are not counted");
    Ok(())
}

fn soft_affinity_is_preferred(domain: &mut Domain) -> Verdict {
    wants_cpus(4)?;
    // The others are idle.
    control::set_affinity(domain.id(), 0, 1, u64::MAX)?;
    for cpu in [2, 1, 3] {
        let cell = Cell::new(1, Deed::Spin)?;
        control::set_affinity(cell.id, 0, u64::MAX, 1 << cpu)?;
        cell.start()?;
        wait_ms(50);
        check_eq!(cell.vcpu(0)?.cpu, cpu, "all but one are idle");
    }
    // It is a wish: with hard affinity elsewhere it does not count.
    let cell = Cell::new(1, Deed::Spin)?;
    control::set_affinity(cell.id, 0, 0b0010, 0b0100)?;
    cell.start()?;
    wait_ms(50);
    check_eq!(cell.vcpu(0)?.cpu, 1);
    control::set_affinity(domain.id(), 0, u64::MAX, u64::MAX)?;
    Ok(())
}

fn pause_waits_until_they_are_off(_: &mut Domain) -> Verdict {
    wants_cpus(2)?;
    let cell = Cell::new(2, Deed::Spin)?;
    cell.start()?;
    wait_ms(10);
    for round in 0..500 {
        control::pause(cell.id)?;
        let first = [cell.work_of(0), cell.work_of(1)];
        let running = control::domain_info(cell.id)?.state;
        let until = now_ns() + 50_000;
        while now_ns() < until {
            core::hint::spin_loop();
        }
        check_eq!([cell.work_of(0), cell.work_of(1)], first, "round {round}: it works while it is paused");
        check_eq!(running & guest_sdk::abi::control::DomainState::RUNNING.bits(), 0, "round {round}");
        control::unpause(cell.id)?;
        // However slow the machine is, both go on before they are paused again.
        let until = now_ns() + 2_000 * MS;
        while cell.work_of(0) == first[0] || cell.work_of(1) == first[1] {
            check!(now_ns() < until, "round {round}: it does not run again");
            core::hint::spin_loop();
        }
    }
    Ok(())
}

/// Two domains with the right to pause others pause each other all the time, and try to pause themselves.
fn domains_that_pause_each_other(_: &mut Domain) -> Verdict {
    const ROUNDS: u64 = 300;
    const PAUSE: &[(u64, u64, u64)] = &[(36, DATA, 0)];
    wants_cpus(2)?;
    let make = || Cell::with_flags(2, Deed::Storm(PAUSE), CreateFlags::CONTROL);
    // What is made once and kept is there after this.
    drop(make()?);
    let free = control::phys_info()?.free_pages;
    let cells = [make()?, make()?];
    for (index, cell) in cells.iter().enumerate() {
        cell.put_data(0, ControlOp::new(cells[1 - index].id, &Pause::default()).as_bytes());
        cell.put_data(1, ControlOp::new(cell.id, &Pause::default()).as_bytes());
    }
    cells.iter().try_for_each(Cell::start)?;
    let mut worst = 0;
    for _ in 0..ROUNDS {
        worst = worst.max(lateness(1).1);
        for cell in &cells {
            // About as often as it was paused: the other may go on with that meanwhile.
            for _ in 0..16 {
                if control::unpause(cell.id).is_err() {
                    break;
                }
            }
        }
    }
    // Pauses are counted: who was faster at first keeps the other paused.
    let mut done = [0, 0];
    for (index, cell) in cells.iter().enumerate() {
        let (pauses, refused) = (cell.work_of(0), cell.work_of(1));
        println!("domain {index}: {pauses} times it paused the other, {refused} times itself");
        done = [done[0] + pauses, done[1] + refused];
        check_eq!(control::domain_info(cell.id)?.shutdown_reason, 0);
    }
    check!(done[0] >= ROUNDS && done[1] >= ROUNDS, "they got nowhere: {done:?}");
    println!("dom0 meanwhile: {} us late at worst", worst / 1000);
    drop(cells);
    check_eq!(control::phys_info()?.free_pages, free, "free frames");
    Ok(())
}

/// With `sched=null`: three cells beside dom0 on four CPUs.
fn each_keeps_its_cpu(domain: &mut Domain) -> Verdict {
    wants_cpus(4)?;
    let request = |max_vcpus| CreateDomain { max_vcpus, max_pages: 16, ..CreateDomain::default() };
    let refused = |vcpus| control::create_domain(DomId::INVALID, request(vcpus)).err();
    check_eq!(refused(4), Some(Errno::ENOSPC), "four vCPUs for three CPUs");
    let mut cells = (0..3).map(|_| Cell::new(1, Deed::Spin)).collect::<Result<Vec<_>, _>>()?;
    check_eq!(refused(1), Some(Errno::ENOSPC), "all CPUs are taken");
    cells.iter().try_for_each(Cell::start)?;
    cells.iter().try_for_each(settled)?;
    let own = control::vcpu_info(domain.id(), 0)?.cpu;
    let mut used = 1u64 << own;
    let before = cells.iter().map(|cell| cell.vcpu(0)).collect::<Result<Vec<_>, _>>()?;
    for vcpu in &before {
        check!(used & 1 << vcpu.cpu == 0, "two on CPU {}", vcpu.cpu);
        used |= 1 << vcpu.cpu;
    }
    let ticks = before.iter().map(|v| control::cpu_info(v.cpu)).collect::<Result<Vec<_>, _>>()?;
    wait_ms(1_000);
    for ((cell, before), cpu) in cells.iter().zip(&before).zip(&ticks) {
        let vcpu = cell.vcpu(0)?;
        check_eq!((vcpu.cpu, vcpu.switches, vcpu.moves), (before.cpu, before.switches, before.moves));
        check!(vcpu.cpu_time_ns > before.cpu_time_ns && vcpu.runnable_ns == before.runnable_ns, "it waited");
        check_eq!(control::cpu_info(vcpu.cpu)?.timer_interrupts, cpu.timer_interrupts, "ticks");
    }
    // No CPU but its own and free ones.
    let (first, second) = (before[0].cpu, before[1].cpu);
    check_eq!(control::set_affinity(cells[0].id, 0, 1 << second, u64::MAX), Err(Errno::EBUSY));
    check_eq!(cells[0].vcpu(0)?.cpu, first);
    cells.remove(1);
    check_eq!(control::set_affinity(cells[0].id, 0, 1 << second, u64::MAX).map(|set| set.0), Ok(1 << second));
    wait_ms(100);
    let (vcpu, work) = (cells[0].vcpu(0)?, cells[0].work());
    check_eq!(vcpu.cpu, second, "it moved to the free one");
    let another = Cell::new(1, Deed::Spin)?;
    another.start()?;
    settled(&another)?;
    check_eq!(another.vcpu(0)?.cpu, first, "where it was is free");
    check!(another.work() > 0 && cells[0].work() > work, "both run");
    Ok(())
}

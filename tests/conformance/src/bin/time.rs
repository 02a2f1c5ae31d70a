//! Clocks, timers, scheduling operations, and what interrupts a long hypercall.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::{
    NOWHERE, SELF, at, call, evtchn, is_privileged, only_on, pending, sched, shared, take_pending, vcpu,
};
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::abi::evtchn::{EvtchnBindIpi, EvtchnBindVirq, EvtchnSend, EvtchnUnmask};
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate};
use guest_sdk::abi::sched::{SchedPinOverride, SchedPoll, SchedRemoteShutdown, SchedShutdown, SchedWatchdog};
use guest_sdk::abi::subops::{EvtchnOp, SchedOp, VcpuOp};
use guest_sdk::abi::vcpu::{
    RunstateInfo, VCPU_SSHOTTMR_FUTURE, VcpuRegisterRunstateMemoryArea, VcpuRegisterTimeMemoryArea,
    VcpuSetPeriodicTimer, VcpuSetSingleshotTimer, VcpuTimeInfo,
};
use guest_sdk::abi::{DomId, Errno, GuestHandle, Hypercall, MachAddr, Port, Virq};
use guest_sdk::memory::Page;
use guest_sdk::testkit::{self, Verdict, cases, check, check_eq, try_read};
use guest_sdk::time::{now_ns, wall_clock};
use guest_sdk::{Domain, control, entry, xen_control};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            periodic_timer_runs_from_the_start,
            system_time_goes_on,
            wall_clock_is_set,
            timer_fires_in_time,
            timer_in_the_past_fires_at_once,
            timer_can_be_stopped,
            singleshot_fires,
            singleshot_in_the_past,
            singleshot_beyond_a_signed_clock_is_in_the_past,
            huge_timeouts_come_after_100_ms,
            singleshot_can_be_stopped,
            singleshot_refused,
            singleshot_of_another_vcpu_is_not_stopped,
            periodic_fires,
            periodic_comes_at_once_when_a_period_has_passed,
            periodic_does_not_wake_a_sleeper,
            periodic_refused,
            poll_ends_by_port,
            poll_ends_by_time,
            poll_of_one_port_is_not_ended_by_another,
            poll_of_several_ports_is_ended_by_any,
            poll_is_ended_by_an_upcall_to_take,
            poll_of_128_ports,
            poll_beyond_a_signed_clock_is_in_the_past,
            poll_refused,
            poll_of_a_closed_port_is_refused,
            poll_list_in_the_hypervisor_is_refused,
            block_is_ended_by_the_timer,
            yield_returns,
            shutdown_code_does_not_shut_down,
            remote_shutdown_refused,
            watchdog_is_armed_and_disarmed,
            watchdog_refused,
            pin_override,
            sched_unknown,
            runstate_is_told,
            runstate_area_is_written,
            runstate_area_with_the_update_flag,
            runstate_area_that_is_not_mapped,
            runstate_refused,
            areas_in_the_hypervisor_are_refused,
            time_area_is_written,
            time_area_null_takes_it_back,
            physid_needs_a_pin,
            vcpu_unknown,
            long_call_is_interrupted,
            long_multicall_is_interrupted,
        ],
    )
}

/// The timer's port, once it is bound.
static KNOWN: AtomicU64 = AtomicU64::new(0);

fn bind_timer() -> Result<Port, Errno> {
    let mut argument = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindVirq, &mut argument)?;
    Ok(argument.port)
}

/// The port of the timer's interrupt: this program's, not the SDK's. The beat that a vCPU is born with is stopped.
fn timer_port() -> Result<Port, Errno> {
    let known = KNOWN.load(Ordering::Relaxed);
    if known != 0 {
        return Ok(Port::new(known as u32));
    }
    let port = bind_timer()?;
    stop_periodic()?;
    take_pending(port);
    KNOWN.store(u64::from(port.get()), Ordering::Relaxed);
    Ok(port)
}

fn stop_periodic() -> Result<u64, Errno> {
    call(Hypercall::VcpuOp, [VcpuOp::StopPeriodicTimer.number().into(), 0, 0, 0, 0])
}

/// Sleeps until the port is pending, true, or the time has come, false. Leaves the port pending.
fn poll(port: Port, deadline: u64) -> Result<bool, Errno> {
    let mut list = [port];
    while !pending(port) && now_ns() < deadline {
        let ports = GuestHandle::new(list.as_mut_ptr() as u64);
        sched(SchedOp::Poll, &mut SchedPoll { ports, nr_ports: 1, pad0: 0, timeout: deadline })?;
    }
    Ok(pending(port))
}

const MS: u64 = 1_000_000;

fn set_timer(deadline: u64) -> Result<u64, Errno> {
    call(Hypercall::SetTimerOp, [deadline, 0, 0, 0, 0])
}

fn periodic_timer_runs_from_the_start(_: &mut Domain) -> Verdict {
    // vCPUs are born with a beat of 10 ms, which kernels stop first of all.
    if KNOWN.load(Ordering::Relaxed) != 0 {
        return testkit::skip("an earlier case has stopped it");
    }
    let port = bind_timer()?;
    KNOWN.store(u64::from(port.get()), Ordering::Relaxed);
    let start = now_ns();
    let mut beats = 0;
    while beats < 10 && now_ns() - start < 5000 * MS {
        // Awake all the time: the beat stops while the vCPU sleeps.
        beats += u64::from(take_pending(port));
    }
    let took = now_ns() - start;
    check_eq!(call(Hypercall::VcpuOp, [7, 0, 0, 0, 0]), Ok(0));
    // One each 10 ms; the first may be due at once, and a vCPU that had to wait for its CPU gets those that it missed at once.
    check_eq!(beats, 10);
    check!(took > 20 * MS, "ten beats in {took} ns");
    take_pending(port);
    check!(!poll(port, now_ns() + 40 * MS)?, "it goes on when it was stopped");
    Ok(())
}

fn system_time_goes_on(_: &mut Domain) -> Verdict {
    let mut last = now_ns();
    let start = last;
    let mut steps = 0;
    while last - start < 20 * MS {
        let now = now_ns();
        check!(now >= last, "back from {last} to {now}");
        steps += u32::from(now > last);
        last = now;
    }
    check!(steps > 100, "{steps} steps in 20 ms");
    // It is the clock that timers go by.
    let deadline = now_ns() + 5 * MS;
    let port = timer_port()?;
    take_pending(port);
    check_eq!(set_timer(deadline), Ok(0));
    check!(poll(port, deadline + 1000 * MS)? && now_ns() + 60_000 >= deadline);
    Ok(())
}

fn wall_clock_is_set(_: &mut Domain) -> Verdict {
    let (wall, system) = (wall_clock(), now_ns());
    // After 2020 and before 2100.
    check!((1_577_000_000..4_100_000_000).contains(&wall.as_secs()), "{} s", wall.as_secs());
    let port = timer_port()?;
    take_pending(port);
    check_eq!(set_timer(system + 30 * MS), Ok(0));
    check!(poll(port, system + 1000 * MS)?);
    let (wall, system) = ((wall_clock() - wall).as_nanos() as u64, now_ns() - system);
    check!(wall.abs_diff(system) < 5 * MS, "the wall clock went on by {wall}, system time by {system} ns");
    Ok(())
}

fn timer_fires_in_time(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    for delay in [1, 5, 30] {
        take_pending(port);
        let deadline = now_ns() + delay * MS;
        check_eq!(set_timer(deadline), Ok(0));
        check!(poll(port, deadline + 1000 * MS)?, "it never came");
        let now = now_ns();
        // Xen rounds down to a slop of 50 us.
        check!(now + 60_000 >= deadline, "{} ns early", deadline - now);
        check!(now < deadline + 500 * MS, "{} ns late", now - deadline);
    }
    Ok(())
}

fn timer_in_the_past_fires_at_once(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    take_pending(port);
    let start = now_ns();
    check_eq!(set_timer(1), Ok(0));
    check!(poll(port, start + 1000 * MS)?);
    check!(now_ns() - start < 500 * MS);
    Ok(())
}

fn timer_can_be_stopped(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    take_pending(port);
    check_eq!(set_timer(now_ns() + MS), Ok(0));
    check!(poll(port, now_ns() + 1000 * MS)?, "it does not come when it is not stopped");
    take_pending(port);
    check_eq!(set_timer(now_ns() + 100 * MS), Ok(0));
    check_eq!(set_timer(0), Ok(0));
    check!(!poll(port, now_ns() + 120 * MS)?, "it came");
    Ok(())
}

fn singleshot(timeout_abs_ns: u64, flags: u32) -> Result<u64, Errno> {
    vcpu(VcpuOp::SetSingleshotTimer, 0, &mut VcpuSetSingleshotTimer { timeout_abs_ns, flags, pad0: 0 })
}

fn singleshot_fires(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    for flags in [0, VCPU_SSHOTTMR_FUTURE] {
        take_pending(port);
        let deadline = now_ns() + 5 * MS;
        check_eq!(singleshot(deadline, flags), Ok(0));
        check!(poll(port, deadline + 1000 * MS)?);
        check!(now_ns() + 60_000 >= deadline);
        take_pending(port);
        check!(!poll(port, now_ns() + 15 * MS)?, "twice");
    }
    Ok(())
}

fn singleshot_in_the_past(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    take_pending(port);
    // Xen does not look at the flag any more: the event comes at once, either way.
    for flags in [0, VCPU_SSHOTTMR_FUTURE] {
        take_pending(port);
        check_eq!(singleshot(1, flags), Ok(0));
        check!(pending(port), "flags {flags}");
    }
    Ok(())
}

fn singleshot_beyond_a_signed_clock_is_in_the_past(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    for timeout in [1 << 63, u64::MAX] {
        take_pending(port);
        check_eq!(singleshot(timeout, 0), Ok(0));
        check!(poll(port, now_ns() + 500 * MS)?, "{timeout:#x}");
    }
    take_pending(port);
    check_eq!(singleshot((1 << 63) - 1, 0), Ok(0));
    check!(!poll(port, now_ns() + 20 * MS)?, "in 292 years");
    check_eq!(set_timer(0), Ok(0));
    Ok(())
}

fn huge_timeouts_come_after_100_ms(_: &mut Domain) -> Verdict {
    // Guests compute them from wrapped clocks, or mean "never".
    let port = timer_port()?;
    for timeout in [u64::MAX, 1 << 63, now_ns() + (1 << 51)] {
        take_pending(port);
        let start = now_ns();
        check_eq!(set_timer(timeout), Ok(0));
        check!(poll(port, start + 1000 * MS)?, "{timeout:#x}");
        let took = now_ns() - start;
        check!((99 * MS..500 * MS).contains(&took), "{timeout:#x} took {took} ns");
    }
    Ok(())
}

fn singleshot_can_be_stopped(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    take_pending(port);
    check_eq!(singleshot(now_ns() + MS, 0), Ok(0));
    check!(poll(port, now_ns() + 1000 * MS)?, "it does not come when it is not stopped");
    take_pending(port);
    check_eq!(singleshot(now_ns() + 100 * MS, 0), Ok(0));
    check_eq!(call(Hypercall::VcpuOp, [9, 0, 0, 0, 0]), Ok(0));
    check!(!poll(port, now_ns() + 120 * MS)?, "it came");
    Ok(())
}

fn singleshot_refused(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::VcpuOp, [8, 0, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    let mut timer = VcpuSetSingleshotTimer { timeout_abs_ns: 1, flags: 0, pad0: 0 };
    check_eq!(vcpu(VcpuOp::SetSingleshotTimer, 4000, &mut timer), Err(Errno::ENOENT));
    if vcpu(VcpuOp::IsUp, 1, &mut 0u64).is_ok() {
        check_eq!(vcpu(VcpuOp::SetSingleshotTimer, 1, &mut timer), Err(Errno::EINVAL), "another vCPU's");
    }
    Ok(())
}

fn singleshot_of_another_vcpu_is_not_stopped(_: &mut Domain) -> Verdict {
    let second = if vcpu(VcpuOp::IsUp, 1, &mut 0u64).is_ok() { Errno::EINVAL } else { Errno::ENOENT };
    let port = timer_port()?;
    take_pending(port);
    let deadline = now_ns() + 5 * MS;
    check_eq!(singleshot(deadline, 0), Ok(0));
    check_eq!(call(Hypercall::VcpuOp, [9, 1, 0, 0, 0]), Err(second));
    check_eq!(call(Hypercall::VcpuOp, [9, 4000, 0, 0, 0]), Err(Errno::ENOENT));
    check!(poll(port, deadline + 1000 * MS)?, "its own goes on");
    Ok(())
}

fn periodic(period_ns: u64) -> Result<u64, Errno> {
    vcpu(VcpuOp::SetPeriodicTimer, 0, &mut VcpuSetPeriodicTimer { period_ns })
}

fn periodic_fires(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    take_pending(port);
    check_eq!(periodic(10 * MS), Ok(0));
    let start = now_ns();
    let mut beats = 0u64;
    while now_ns() - start < 300 * MS {
        beats += u64::from(take_pending(port));
    }
    check_eq!(call(Hypercall::VcpuOp, [7, 0, 0, 0, 0]), Ok(0));
    take_pending(port);
    check!(!poll(port, now_ns() + 40 * MS)?, "it goes on when it was stopped");
    // A busy machine may lose some.
    check!((6..=31).contains(&beats), "{beats} beats in 300 ms, one each 10 ms");
    Ok(())
}

fn periodic_comes_at_once_when_a_period_has_passed(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    check_eq!(stop_periodic(), Ok(0));
    let start = now_ns();
    while now_ns() - start < 20 * MS {}
    take_pending(port);
    check_eq!(periodic(15 * MS), Ok(0));
    check!(take_pending(port), "the latest beat is long ago");
    check_eq!(periodic(500 * MS), Ok(0));
    check!(!pending(port), "the latest beat was right now");
    check_eq!(stop_periodic(), Ok(0));
    take_pending(port);
    Ok(())
}

fn periodic_does_not_wake_a_sleeper(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    check_eq!(periodic(5 * MS), Ok(0));
    take_pending(port);
    let start = now_ns();
    check!(poll(port, start + 60 * MS)?, "one beat when it wakes up");
    let took = now_ns() - start;
    check_eq!(stop_periodic(), Ok(0));
    check!(took > 58 * MS, "woken after {took} ns");
    take_pending(port);
    Ok(())
}

fn periodic_refused(_: &mut Domain) -> Verdict {
    check_eq!(periodic(999_999), Err(Errno::EINVAL), "shorter than a millisecond");
    check_eq!(periodic(u64::MAX), Err(Errno::EINVAL), "too long");
    check_eq!(call(Hypercall::VcpuOp, [6, 0, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::VcpuOp, [7, 4000, 0, 0, 0]), Err(Errno::ENOENT));
    Ok(())
}

fn ipi() -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

fn poll_ends_by_port(_: &mut Domain) -> Verdict {
    let port = ipi()?;
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port }), Ok(0));
    let start = now_ns();
    let mut list = [timer_port()?, port];
    take_pending(list[0]);
    let ports = GuestHandle::new(list.as_mut_ptr() as u64);
    let mut argument = SchedPoll { ports, nr_ports: 2, pad0: 0, timeout: start + 2000 * MS };
    check_eq!(sched(SchedOp::Poll, &mut argument), Ok(0));
    check!(now_ns() - start < 1000 * MS, "a port was pending");
    check!(take_pending(port));
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn poll_ends_by_time(_: &mut Domain) -> Verdict {
    let port = ipi()?;
    let mut list = [port];
    let ports = GuestHandle::new(list.as_mut_ptr() as u64);
    for delay in [2, 20] {
        let deadline = now_ns() + delay * MS;
        let mut argument = SchedPoll { ports, nr_ports: 1, pad0: 0, timeout: deadline };
        check_eq!(sched(SchedOp::Poll, &mut argument), Ok(0));
        let now = now_ns();
        check!(now + 60_000 >= deadline, "{} ns early", deadline - now);
        check!(now < deadline + 500 * MS, "{} ns late", now - deadline);
    }
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

/// Far more than any poll that is ended early takes, even where the machine is shared.
const PATIENCE: u64 = 400 * MS;
/// What a poll that the timer ends takes.
const ENDED_EARLY: core::ops::Range<u64> = 4 * MS..PATIENCE - 50 * MS;

/// Polls these ports for `patience` while the timer, whose own port is among them or not, fires after 5 ms; how long it took.
fn poll_with_timer(list: &mut [Port], patience: u64) -> Result<u64, testkit::Stop> {
    let timer = timer_port()?;
    take_pending(timer);
    let start = now_ns();
    check_eq!(set_timer(start + 5 * MS), Ok(0));
    let ports = GuestHandle::new(list.as_mut_ptr() as u64);
    let mut argument = SchedPoll { ports, nr_ports: list.len() as u32, pad0: 0, timeout: start + patience };
    check_eq!(sched(SchedOp::Poll, &mut argument), Ok(0));
    let took = now_ns() - start;
    check!(take_pending(timer), "the timer fired");
    Ok(took)
}

fn poll_of_one_port_is_not_ended_by_another(_: &mut Domain) -> Verdict {
    let port = ipi()?;
    let took = poll_with_timer(&mut [port], 40 * MS)?;
    check!(took > 39 * MS, "it took {took} ns");
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn poll_of_several_ports_is_ended_by_any(_: &mut Domain) -> Verdict {
    // Even by one that is not in the list: callers look for themselves.
    let (one, two) = (ipi()?, ipi()?);
    let took = poll_with_timer(&mut [one, two], PATIENCE)?;
    check!(ENDED_EARLY.contains(&took), "it took {took} ns");
    let timer = timer_port()?;
    let took = poll_with_timer(&mut [timer], PATIENCE)?;
    check!(ENDED_EARLY.contains(&took), "its own port: it took {took} ns");
    for port in [one, two] {
        evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    }
    Ok(())
}

fn poll_is_ended_by_an_upcall_to_take(_: &mut Domain) -> Verdict {
    // An event that is not masked wakes the vCPU, whatever it polls, even while upcalls are masked.
    let (port, timer) = (ipi()?, timer_port()?);
    guest_sdk::events::turn();
    check_eq!(evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port: timer }), Ok(0));
    let took = poll_with_timer(&mut [port], PATIENCE);
    // SAFETY: bits of the shared page; the port is masked again, as the other cases want it.
    unsafe {
        let word = (&raw mut (*shared()).evtchn_mask).cast::<u64>().add(timer.get() as usize / 64);
        AtomicU64::from_ptr(word).fetch_or(1 << (timer.get() % 64), Ordering::SeqCst);
    }
    guest_sdk::events::turn();
    let took = took?;
    check!(ENDED_EARLY.contains(&took), "it took {took} ns");
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn poll_of_128_ports(_: &mut Domain) -> Verdict {
    let poll_all = |list: &mut [Port; 128], timeout: u64| {
        let ports = GuestHandle::new(list.as_mut_ptr() as u64);
        sched(SchedOp::Poll, &mut SchedPoll { ports, nr_ports: 128, pad0: 0, timeout })
    };
    let (port, other) = (ipi()?, ipi()?);
    let start = now_ns();
    check_eq!(poll_all(&mut [port; 128], start + 10 * MS), Ok(0));
    check!(now_ns() - start > 9 * MS);
    // The last of them counts as the first.
    let mut list = [port; 128];
    list[127] = other;
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: other }), Ok(0));
    let start = now_ns();
    check_eq!(poll_all(&mut list, start + 2000 * MS), Ok(0));
    check!(now_ns() - start < 1000 * MS);
    take_pending(other);
    for port in [port, other] {
        evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    }
    Ok(())
}

fn poll_beyond_a_signed_clock_is_in_the_past(_: &mut Domain) -> Verdict {
    let port = ipi()?;
    let mut list = [port];
    let ports = GuestHandle::new(list.as_mut_ptr() as u64);
    for timeout in [1, 1 << 63, u64::MAX] {
        let start = now_ns();
        let mut argument = SchedPoll { ports, nr_ports: 1, pad0: 0, timeout };
        check_eq!(sched(SchedOp::Poll, &mut argument), Ok(0));
        check!(now_ns() - start < 500 * MS, "{timeout:#x}");
    }
    // And one in the future is waited for.
    let start = now_ns();
    let mut argument = SchedPoll { ports, nr_ports: 1, pad0: 0, timeout: start + 5 * MS };
    check_eq!(sched(SchedOp::Poll, &mut argument), Ok(0));
    check!(now_ns() - start > 4 * MS);
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn poll_of_a_closed_port_is_refused(_: &mut Domain) -> Verdict {
    let port = ipi()?;
    let start = now_ns();
    check!(!poll(port, start + 2 * MS)?);
    check!(now_ns() - start > MS, "an open one is waited for");
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    check_eq!(poll(port, now_ns() + 20 * MS), Err(Errno::EINVAL), "closed");
    check_eq!(poll(Port::new(0), now_ns() + 20 * MS), Err(Errno::EINVAL), "nobody's");
    Ok(())
}

fn poll_list_in_the_hypervisor_is_refused(_: &mut Domain) -> Verdict {
    let port = ipi()?;
    for place in [0xffff_8000_0000_0000, 0xffff_87ff_ffff_fffc, 0x0000_8000_0000_0000] {
        let mut argument =
            SchedPoll { ports: GuestHandle::new(place), nr_ports: 2, pad0: 0, timeout: now_ns() + 5 * MS };
        check_eq!(sched(SchedOp::Poll, &mut argument), Err(Errno::EFAULT), "{place:#x}");
    }
    let start = now_ns();
    check!(!poll(port, start + 2 * MS)?);
    check!(now_ns() - start > MS, "the next one sleeps");
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn poll_refused(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::SchedOp, [3, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    let mut list = [4096u32; 200];
    let ports = GuestHandle::new(at(&mut list));
    let mut argument = SchedPoll { ports, nr_ports: 1, pad0: 0, timeout: 1 };
    check_eq!(sched(SchedOp::Poll, &mut argument), Err(Errno::EINVAL), "no such port");
    argument.nr_ports = 129;
    check_eq!(sched(SchedOp::Poll, &mut argument), Err(Errno::EINVAL), "too many");
    let mut argument = SchedPoll { ports: GuestHandle::new(NOWHERE), nr_ports: 1, pad0: 0, timeout: 1 };
    check_eq!(sched(SchedOp::Poll, &mut argument), Err(Errno::EFAULT), "the list");
    Ok(())
}

fn block_is_ended_by_the_timer(_: &mut Domain) -> Verdict {
    let port = timer_port()?;
    take_pending(port);
    check_eq!(evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port }), Ok(0));
    testkit::window();
    guest_sdk::events::turn();
    let before = testkit::upcalls();
    let deadline = now_ns() + 10 * MS;
    check_eq!(set_timer(deadline), Ok(0));
    // Clears the mask, sleeps, and the upcall masks again.
    check_eq!(call(Hypercall::SchedOp, [1, 0, 0, 0, 0]), Ok(0));
    let now = now_ns();
    check_eq!(testkit::upcalls(), before + 1);
    check!(now + 60_000 >= deadline, "{} ns early", deadline - now);
    // SAFETY: bits of the shared page; the port is masked again, as the other cases want it.
    unsafe {
        let word = (&raw mut (*shared()).evtchn_mask).cast::<u64>().add(port.get() as usize / 64);
        AtomicU64::from_ptr(word).fetch_or(1 << (port.get() % 64), Ordering::SeqCst);
        (&raw mut (*shared()).vcpu_info[0].evtchn_upcall_mask).write_volatile(1);
    }
    guest_sdk::events::turn();
    Ok(())
}

fn yield_returns(_: &mut Domain) -> Verdict {
    for _ in 0..100 {
        check_eq!(call(Hypercall::SchedOp, [0, 0, 0, 0, 0]), Ok(0));
    }
    // Alone, it goes on running: it is not asleep in between.
    let before = runstate()?;
    for _ in 0..100 {
        check_eq!(call(Hypercall::SchedOp, [0, NOWHERE, 0, 0, 0]), Ok(0), "the argument is not looked at");
    }
    let after = runstate()?;
    check!(after.time[0] > before.time[0]);
    check_eq!(after.time[2], before.time[2], "blocked");
    Ok(())
}

fn shutdown_code_does_not_shut_down(_: &mut Domain) -> Verdict {
    // Refused for reasons that nobody defined; and the domain is still there.
    check_eq!(call(Hypercall::SchedOp, [5, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::SchedOp, [2, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT), "shutdown itself");
    let mut argument = SchedShutdown { reason: 0 };
    check_eq!(sched(SchedOp::ShutdownCode, &mut argument), Ok(0));
    Ok(())
}

fn remote_shutdown_refused(_: &mut Domain) -> Verdict {
    let mut nobody = SchedRemoteShutdown { domain_id: DomId::new(1234), pad0: 0, reason: 0 };
    check_eq!(sched(SchedOp::RemoteShutdown, &mut nobody), Err(Errno::ESRCH));
    // No name stands for a domain here, not even the caller's.
    for domain_id in [DomId::SELF, DomId::IO, DomId::XEN] {
        nobody.domain_id = domain_id;
        check_eq!(sched(SchedOp::RemoteShutdown, &mut nobody), Err(Errno::ESRCH), "{domain_id:?}");
    }
    if !is_privileged() {
        nobody.domain_id = DomId::ZERO;
        check_eq!(sched(SchedOp::RemoteShutdown, &mut nobody), Err(Errno::EPERM), "dom0");
    }
    check_eq!(call(Hypercall::SchedOp, [4, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn watchdog(id: u32, timeout: u32) -> Result<u64, Errno> {
    sched(SchedOp::Watchdog, &mut SchedWatchdog { id, timeout })
}

fn watchdog_is_armed_and_disarmed(_: &mut Domain) -> Verdict {
    let first = watchdog(0, 100)?;
    check_eq!(first, 1);
    check_eq!(watchdog(0, 100), Ok(2), "a second one");
    // In 32 bits: Xen returns it without its sign.
    let third = watchdog(0, 100).unwrap_or_else(|error| error.to_ret());
    check_eq!(third as u32, Errno::ENOSPC.to_ret() as u32, "there are two");
    check_eq!(watchdog(1, 200), Ok(0), "poked");
    check_eq!(watchdog(1, 0), Ok(0), "disarmed");
    check_eq!(watchdog(2, 0), Ok(0));
    check_eq!(watchdog(0, 100), Ok(1), "free again");
    check_eq!(watchdog(1, 0), Ok(0));
    Ok(())
}

fn watchdog_refused(_: &mut Domain) -> Verdict {
    check_eq!(watchdog(3, 100), Err(Errno::EINVAL), "there are two");
    check_eq!(watchdog(1, 100), Err(Errno::EINVAL), "not armed");
    check_eq!(call(Hypercall::SchedOp, [6, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn pin_override(_: &mut Domain) -> Verdict {
    let pin = |pcpu: i32| sched(SchedOp::PinOverride, &mut SchedPinOverride { pcpu });
    let bad = |at: u64| call(Hypercall::SchedOp, [SchedOp::PinOverride.number().into(), at, 0, 0, 0]);
    if !is_privileged() {
        for answer in [pin(0), pin(-1), pin(4000), bad(NOWHERE)] {
            check_eq!(answer, Err(Errno::EPERM), "before anything else");
        }
        return Ok(());
    }
    check_eq!(bad(NOWHERE), Err(Errno::EFAULT));
    check_eq!(pin(4000), Err(Errno::EINVAL), "no such CPU");
    check_eq!(pin(i32::MAX), Err(Errno::EINVAL), "no such CPU");
    check_eq!(pin(-1), Err(Errno::EINVAL), "it is not pinned");
    check_eq!(pin(0), Ok(0));
    check_eq!(pin(0), Err(Errno::EBUSY), "it is pinned");
    check_eq!(pin(i32::MIN), Ok(0), "any negative number lets go");
    check_eq!(pin(-1), Err(Errno::EINVAL));
    Ok(())
}

fn sched_unknown(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::SchedOp, [0, 0, 0, 0, 0]), Ok(0));
    for command in [8, 9, 1000] {
        check_eq!(call(Hypercall::SchedOp, [command, 0, 0, 0, 0]), Err(Errno::ENOSYS), "command {command}");
    }
    Ok(())
}

fn runstate() -> Result<RunstateInfo, Errno> {
    let mut info = RunstateInfo::default();
    vcpu(VcpuOp::GetRunstateInfo, 0, &mut info)?;
    Ok(info)
}

fn runstate_is_told(_: &mut Domain) -> Verdict {
    let before = runstate()?;
    check_eq!(before.state, 0, "who asks is running");
    check!(before.state_entry_time <= now_ns());
    // Asleep for a while, then busy for a while: both are seen.
    let port = ipi()?;
    let start = now_ns();
    check!(!poll(port, start + 20 * MS)?);
    let asleep = runstate()?;
    let slept = asleep.time[2] - before.time[2];
    check!(slept > 15 * MS && slept <= now_ns() - start, "{slept} ns blocked of 20 ms");
    let start = now_ns();
    while now_ns() - start < 20 * MS {}
    let busy = runstate()?;
    let ran = busy.time[0] - asleep.time[0];
    check!(ran > 10 * MS, "{ran} ns running of 20 ms");
    check_eq!(busy.time[3], before.time[3], "never offline");
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn runstate_area_is_written(_: &mut Domain) -> Verdict {
    static AREA: [AtomicU64; 6] = [const { AtomicU64::new(u64::MAX) }; 6];
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new((&raw const AREA) as u64) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0));
    let read = |at: usize| AREA[at].load(Ordering::Relaxed);
    check_eq!(read(0) as u32, 0, "running");
    let blocked = read(4);
    let port = ipi()?;
    // A machine that stalls may let the time of one poll pass without sleep.
    for _ in 0..20 {
        check!(!poll(port, now_ns() + 10 * MS)?);
        if read(4) - blocked > 5 * MS {
            break;
        }
    }
    check!(read(4) - blocked > 5 * MS, "written at a switch");
    check!(read(1) & !(1 << 63) <= now_ns());
    // Null takes it back.
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new(0) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0));
    let frozen = read(4);
    check!(!poll(port, now_ns() + 10 * MS)?);
    check_eq!(read(4), frozen);
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

const RUNSTATE_UPDATE_ASSIST: u64 = 5;

fn runstate_area_with_the_update_flag(_: &mut Domain) -> Verdict {
    static AREA: [AtomicU64; 6] = [const { AtomicU64::new(u64::MAX) }; 6];
    check_eq!(call(Hypercall::VmAssist, [0, RUNSTATE_UPDATE_ASSIST, 0, 0, 0]), Ok(0));
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new((&raw const AREA) as u64) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0));
    let port = ipi()?;
    let before = now_ns();
    check!(!poll(port, before + 5 * MS)?);
    let entered = AREA[1].load(Ordering::SeqCst);
    check_eq!(entered >> 63, 0, "nobody writes it now");
    check!((before..=now_ns()).contains(&entered), "{entered} is when it ran again");
    check_eq!(AREA[0].load(Ordering::SeqCst) as u32, 0, "running");
    check_eq!(call(Hypercall::VmAssist, [1, RUNSTATE_UPDATE_ASSIST, 0, 0, 0]), Ok(0));
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new(0) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0));
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn runstate_area_that_is_not_mapped(_: &mut Domain) -> Verdict {
    // Accepted: it may be mapped later. Until then records are lost, and nothing else happens.
    let port = ipi()?;
    // The last ends where no address is.
    for place in [NOWHERE, NOWHERE + 4093, 0x7fff_ffff_fff8] {
        let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new(place) };
        check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0), "{place:#x}");
        check!(!poll(port, now_ns() + 2 * MS)?);
    }
    static AREA: [AtomicU64; 6] = [const { AtomicU64::new(u64::MAX) }; 6];
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new((&raw const AREA) as u64) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0));
    check!(AREA[2].load(Ordering::SeqCst) != u64::MAX, "a better one is written at once");
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new(0) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut argument), Ok(0));
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

fn areas_in_the_hypervisor_are_refused(_: &mut Domain) -> Verdict {
    let before = runstate()?;
    for place in [0xffff_8000_0000_0000, 0xffff_87ff_ffff_fff0, 0x0000_8000_0000_0000] {
        let addr = GuestHandle::new(place);
        let mut area = VcpuRegisterRunstateMemoryArea { addr };
        check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut area), Err(Errno::EFAULT), "{place:#x}");
        let mut area = VcpuRegisterTimeMemoryArea { addr: GuestHandle::new(place) };
        check_eq!(vcpu(VcpuOp::RegisterVcpuTimeMemoryArea, 0, &mut area), Err(Errno::EFAULT), "{place:#x}");
    }
    check!(runstate()?.time[0] > before.time[0], "accounting goes on");
    Ok(())
}

fn runstate_refused(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::VcpuOp, [4, 0, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::VcpuOp, [5, 0, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::VcpuOp, [13, 0, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::VcpuOp, [4, 4000, 0, 0, 0]), Err(Errno::ENOENT));
    Ok(())
}

fn time_area_is_written(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let mut argument = VcpuRegisterTimeMemoryArea { addr: GuestHandle::new(page.address()) };
    check_eq!(vcpu(VcpuOp::RegisterVcpuTimeMemoryArea, 0, &mut argument), Ok(0));
    // SAFETY: the page is this case's; the hypervisor writes it while the vCPU is off.
    let copy = unsafe { (page.address() as *const VcpuTimeInfo).read_volatile() };
    // SAFETY: the shared page.
    let original = unsafe { (&raw const (*shared()).vcpu_info[0].time).read_volatile() };
    check_eq!(copy.version & 1, 0);
    check!(copy.tsc_to_system_mul == original.tsc_to_system_mul && copy.tsc_shift == original.tsc_shift);
    check!(copy.tsc_to_system_mul != 0);
    check!(copy.system_time <= now_ns());
    let mut argument = VcpuRegisterTimeMemoryArea { addr: GuestHandle::new(0) };
    check_eq!(vcpu(VcpuOp::RegisterVcpuTimeMemoryArea, 0, &mut argument), Ok(0));
    Ok(())
}

fn time_area_null_takes_it_back(_: &mut Domain) -> Verdict {
    let mut page = Page::new()?;
    let mut argument = VcpuRegisterTimeMemoryArea { addr: GuestHandle::new(page.address()) };
    check_eq!(vcpu(VcpuOp::RegisterVcpuTimeMemoryArea, 0, &mut argument), Ok(0));
    check!(try_read(page.address())? != 0, "written at once");
    let mut argument = VcpuRegisterTimeMemoryArea { addr: GuestHandle::new(0) };
    check_eq!(vcpu(VcpuOp::RegisterVcpuTimeMemoryArea, 0, &mut argument), Ok(0));
    page.bytes_mut().fill(0xee);
    let port = ipi()?;
    check!(!poll(port, now_ns() + 5 * MS)?);
    for index in 0..4 {
        check_eq!(try_read(page.address() + index * 8), Ok(0xeeee_eeee_eeee_eeee));
    }
    evtchn(EvtchnOp::Close, &mut EvtchnSend { port })?;
    Ok(())
}

/// Lets vCPU 0 of the first domain run on these CPUs only. Each hypervisor has a call of its own for that.
fn affinity(cpus: u64) -> Verdict {
    if conformance::is_xenolith() {
        control::set_affinity(DomId::ZERO, 0, cpus, u64::MAX)?;
        return Ok(());
    }
    // XEN_DOMCTL_setvcpuaffinity (9) of interface 0x15: vCPU 0 and the flag for hard affinity, a bitmap and its bits.
    let mut operation = [0u64; 18];
    let header = [9 | 0x15 << 32, 0, 1 << 32, (&raw const cpus) as u64, 64];
    operation[..5].copy_from_slice(&header);
    check_eq!(call(Hypercall::Domctl, [at(&mut operation), 0, 0, 0, 0]), Ok(0));
    Ok(())
}

fn physid_needs_a_pin(_: &mut Domain) -> Verdict {
    let mut id = u64::MAX;
    check_eq!(vcpu(VcpuOp::GetPhysid, 4000, &mut id), Err(Errno::ENOENT));
    if !is_privileged() {
        // It is for who drives the host's processors (their power states, say).
        check_eq!(vcpu(VcpuOp::GetPhysid, 0, &mut id), Err(Errno::EINVAL));
        check_eq!(id, u64::MAX, "nothing is told");
        return Ok(());
    }
    affinity(1)?;
    check_eq!(vcpu(VcpuOp::GetPhysid, 0, &mut id), Ok(0));
    // APIC id and ACPI id of the first processor.
    check_eq!(id, 0);
    check_eq!(
        call(Hypercall::VcpuOp, [VcpuOp::GetPhysid.number().into(), 0, NOWHERE, 0, 0]),
        Err(Errno::EFAULT)
    );
    affinity(u64::MAX)?;
    let cpus = if conformance::is_xenolith() {
        control::phys_info()?.cpus
    } else {
        xen_control::phys_info()?.nr_cpus
    };
    id = u64::MAX;
    let answer = vcpu(VcpuOp::GetPhysid, 0, &mut id);
    // With one CPU every vCPU is pinned to it.
    check_eq!((answer, id), if cpus == 1 { (Ok(0), 0) } else { (Err(Errno::EINVAL), u64::MAX) });
    Ok(())
}

fn vcpu_unknown(_: &mut Domain) -> Verdict {
    check_eq!(vcpu(VcpuOp::IsUp, 0, &mut 0u64), Ok(1));
    for command in [14, 1000] {
        check_eq!(call(Hypercall::VcpuOp, [command, 0, 0, 0, 0]), Err(Errno::ENOSYS), "command {command}");
    }
    Ok(())
}

static INTERRUPTED_AT: AtomicU64 = AtomicU64::new(0);

/// Notes when it came, and returns with events masked.
#[unsafe(naked)]
unsafe extern "C" fn note_upcall() {
    core::arch::naked_asm!(
        "pop rcx",
        "pop r11",
        "and dword ptr [rsp + 16], ~0x200",
        "push 0",
        "push rcx",
        "push r11",
        "push rax",
        "push rdx",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov [rip + {at}], rax",
        "pop rdx",
        "mov eax, 23",
        "syscall",
        "ud2",
        at = sym INTERRUPTED_AT,
    )
}

fn tsc() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: reads a counter.
    unsafe { core::arch::asm!("rdtsc", out("rax") low, out("rdx") high, options(nomem, nostack)) };
    high << 32 | low
}

/// Makes a call with events on and a timer that fires in the middle of it, again and again until it was seen to.
fn interrupted(number: u64, arguments: [u64; 5]) -> Verdict {
    let port = timer_port()?;
    let own = note_upcall as *const () as u64;
    check_eq!(call(Hypercall::SetCallbacks, [own, own, own, 0, 0]), Ok(0));
    check_eq!(evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port }), Ok(0));
    // How long it takes undisturbed.
    let start = now_ns();
    check_eq!(conformance::raw(number, arguments), Ok(0));
    let whole = now_ns() - start;
    // SAFETY: a byte of the shared page.
    let mask = unsafe { &raw mut (*shared()).vcpu_info[0].evtchn_upcall_mask };
    let mut inside = false;
    for round in 1..=20 {
        guest_sdk::events::turn();
        take_pending(port);
        INTERRUPTED_AT.store(0, Ordering::Relaxed);
        check_eq!(set_timer(now_ns() + whole * round / 24 + 50_000), Ok(0));
        let before = tsc();
        // SAFETY: the stub returns masked; no Rust state depends on the mask.
        unsafe { mask.write_volatile(0) };
        let answer = conformance::raw(number, arguments);
        // SAFETY: as above.
        unsafe { mask.write_volatile(1) };
        let after = tsc();
        check_eq!(answer, Ok(0));
        let at = INTERRUPTED_AT.load(Ordering::Relaxed);
        if at != 0
            && (after - before) > 0
            && at - before > (after - before) / 50
            && after - at > (after - before) / 50
        {
            inside = true;
            break;
        }
    }
    check_eq!(set_timer(0), Ok(0));
    guest_sdk::events::turn();
    take_pending(port);
    check!(inside, "in 20 rounds no event came in the middle of a call of {whole} ns");
    Ok(())
}

fn long_call_is_interrupted(_: &mut Domain) -> Verdict {
    const COUNT: u64 = 60_000;
    let page = Page::new()?;
    let place = page.mfn().address().get();
    let mut list: Vec<MmuUpdate> = (0..COUNT)
        .map(|n| MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place + n % 512 * 8), n))
        .collect();
    let mut done = 0u32;
    interrupted(Hypercall::MmuUpdate.number(), [list.as_mut_ptr() as u64, COUNT, at(&mut done), SELF, 0])?;
    check_eq!(u64::from(done), COUNT);
    for index in 0..512 {
        let last = (COUNT - 1 - index) / 512 * 512 + index;
        check_eq!(try_read(page.address() + index * 8), Ok(last), "word {index}");
    }
    Ok(())
}

fn long_multicall_is_interrupted(_: &mut Domain) -> Verdict {
    only_on(
        true,
        "Xen checks for events between calls too, but is too fast here to be caught at it every time",
    )?;
    let call = guest_sdk::abi::mmu::MulticallEntry { op: 17, result: 0xdead, args: [0; 6] };
    let mut list = alloc::vec![call; 60_000];
    interrupted(Hypercall::Multicall.number(), [list.as_mut_ptr() as u64, 60_000, 0, 0, 0])?;
    check_eq!(list.iter().position(|entry| entry.result != 0x0004_0011), None);
    Ok(())
}

//! A second vCPU: brought up, interrupted, stopped, and given its share of the one CPU.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, TablePage, at, call, callback, evtchn, pending, shared, take_pending, vcpu};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use guest_sdk::abi::callback::CallbackRegister;
use guest_sdk::abi::evtchn::{EvtchnBindIpi, EvtchnBindVirq, EvtchnClose, EvtchnSend};
use guest_sdk::abi::sched::{SchedPinOverride, SchedPoll};
use guest_sdk::abi::segment::{FLAT_KERNEL_CS, FLAT_KERNEL_SS};
use guest_sdk::abi::subops::{CallbackOp, CallbackType, EvtchnOp, SchedOp, VcpuOp};
use guest_sdk::abi::vcpu::{
    RunstateInfo, VcpuContextFlags, VcpuGuestContext, VcpuInfo, VcpuRegisterRunstateMemoryArea,
    VcpuRegisterVcpuInfo, VcpuSetPeriodicTimer,
};
use guest_sdk::abi::{Errno, GuestHandle, Hypercall, Mfn, Port, Virq, VirtAddr};
use guest_sdk::memory::{self, Page};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, probe, skip};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            up_before_initialise_is_refused,
            initialise_refused,
            initialise_wants_canonical_addresses,
            initialise_wants_tables_that_may_be,
            second_vcpu_runs,
            initialise_twice_is_refused,
            interrupts_between_vcpus,
            two_that_spin_share_the_cpu,
            the_wait_for_the_cpu_is_stolen_time,
            ticks_of_another_vcpu,
            ticks_set_and_stopped_while_it_sleeps,
            an_nmi_reaches_another_vcpu,
            an_nmi_wakes_a_vcpu_that_polls,
            nmi_refused,
            runstate_area_of_another_vcpu,
            vcpu_info_of_a_running_vcpu_stays,
            yield_lets_the_other_run,
            failsafe_callback_tells_of_a_lost_selector,
            down_and_up_again,
            vcpu_info_moves,
            vcpu_info_refused,
        ],
    )
}

const MS: u64 = 1_000_000;

/// What vCPU 1 is to do.
static ORDER: AtomicU32 = AtomicU32::new(WAIT);
const WAIT: u32 = 0;
const SPIN: u32 = 1;
const ECHO: u32 = 2;
const STOP: u32 = 3;
/// Bind itself to CPU 0, and let go of it.
const PIN: u32 = 4;
const UNPIN: u32 = 5;

static BORN: AtomicU64 = AtomicU64::new(0);
static SPUN: AtomicU64 = AtomicU64::new(0);
static ECHOED: AtomicU64 = AtomicU64::new(0);
/// The port that vCPU 1 waits for, and the one that it signals.
static PORTS: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];

#[repr(C, align(16))]
struct Stack([u64; 2048]);

static mut STACK: Stack = Stack([0; 2048]);

/// The life of vCPU 1. Its events are masked throughout, so it sleeps by polling.
extern "C" fn second(argument: u64) -> ! {
    BORN.store(argument, Ordering::SeqCst);
    loop {
        match ORDER.load(Ordering::SeqCst) {
            SPIN => {
                SPUN.fetch_add(1, Ordering::Relaxed);
            }
            ECHO => {
                let mut port = Port::new(PORTS[0].load(Ordering::SeqCst));
                let ports = GuestHandle::new(at(&mut port));
                let mut argument = SchedPoll { ports, nr_ports: 1, pad0: 0, timeout: 0 };
                let _ = conformance::sched(SchedOp::Poll, &mut argument);
                if take_pending(port) {
                    ECHOED.fetch_add(1, Ordering::SeqCst);
                    let port = Port::new(PORTS[1].load(Ordering::SeqCst));
                    let _ = evtchn(EvtchnOp::Send, &mut EvtchnSend { port });
                }
            }
            STOP => {
                ORDER.store(WAIT, Ordering::SeqCst);
                let _ = call(Hypercall::VcpuOp, [VcpuOp::Down.number().into(), 1, 0, 0, 0]);
            }
            order @ (PIN | UNPIN) => {
                let _ = pin(order == PIN);
                ORDER.store(WAIT, Ordering::SeqCst);
            }
            _ => {
                let _ = call(Hypercall::SchedOp, [0, 0, 0, 0, 0]);
            }
        }
    }
}

/// Binds the calling vCPU to CPU 0, or lets go of it.
fn pin(bind: bool) -> Result<u64, Errno> {
    conformance::sched(SchedOp::PinOverride, &mut SchedPinOverride { pcpu: if bind { 0 } else { -1 } })
}

/// Has both vCPUs take turns on one CPU while `work` runs.
///
/// # Errors
/// `work`'s, and a skip where they run at once and the domain may not pin them.
fn on_one_cpu(work: impl FnOnce() -> Verdict) -> Verdict {
    if conformance::is_privileged() {
        let other = |order: u32| {
            ORDER.store(order, Ordering::SeqCst);
            wait("its pin", || ORDER.load(Ordering::SeqCst) == WAIT)
        };
        check_eq!(pin(true), Ok(0));
        let result = other(PIN).and_then(|()| work());
        let freed = other(UNPIN);
        check_eq!(pin(false), Ok(0));
        return result.and(freed);
    }
    ORDER.store(SPIN, Ordering::SeqCst);
    let turn = SPUN.load(Ordering::Relaxed);
    wait("its first turn", || SPUN.load(Ordering::Relaxed) > turn)?;
    let (own, other, start) = (running(0)?, running(1)?, now_ns());
    while now_ns() - start < 100 * MS {}
    let (both, passed) = (running(0)? - own + running(1)? - other, now_ns() - start);
    ORDER.store(WAIT, Ordering::SeqCst);
    if both > passed + passed / 4 {
        return skip("the vCPUs have a CPU each, and an unprivileged domain cannot pin them to one");
    }
    work()
}

fn context() -> alloc::boxed::Box<VcpuGuestContext> {
    let mut context = alloc::boxed::Box::new(VcpuGuestContext::ZERO);
    context.flags = VcpuContextFlags::IN_KERNEL.bits();
    // The standard control words: an image of zeros would unmask every exception.
    context.fpu_ctxt[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    context.fpu_ctxt[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    context.user_regs.rip = second as *const () as u64;
    // At a function's first instruction rsp is 8 below a multiple of 16.
    context.user_regs.rsp = (&raw const STACK) as u64 + size_of::<Stack>() as u64 - 8;
    context.user_regs.rdi = 0x1234;
    context.user_regs.cs = FLAT_KERNEL_CS;
    context.user_regs.ss = FLAT_KERNEL_SS;
    context.user_regs.rflags = 0x200;
    context.trap_ctxt[2].vector = 2;
    context.trap_ctxt[2].cs = FLAT_KERNEL_CS;
    context.trap_ctxt[2].address = own_nmi as *const () as u64;
    context.kernel_ss = u64::from(FLAT_KERNEL_SS);
    context.kernel_sp = context.user_regs.rsp;
    context.ctrlreg[0] = 1 << 31 | 1;
    context.ctrlreg[3] = memory::root().address().get();
    context
}

static NMIS: AtomicU64 = AtomicU64::new(0);

conformance::counting_handler! {
    /// Counts and returns.
    own_nmi: NMIS
}

fn initialise(id: u64, context: &mut VcpuGuestContext) -> Result<u64, Errno> {
    vcpu(VcpuOp::Initialise, id, context)
}

fn operation(command: VcpuOp, id: u64) -> Result<u64, Errno> {
    call(Hypercall::VcpuOp, [command.number().into(), id, 0, 0, 0])
}

/// Lets the other vCPU run until the condition holds, two seconds at most.
fn wait(what: &str, done: impl Fn() -> bool) -> Result<(), Stop> {
    let start = now_ns();
    while !done() {
        if now_ns().saturating_sub(start) > 2000 * MS {
            return testkit::fail(format_args!("{what}: not within two seconds"));
        }
        call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
    }
    Ok(())
}

fn up_before_initialise_is_refused(_: &mut Domain) -> Verdict {
    check_eq!(operation(VcpuOp::IsUp, 0), Ok(1));
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(0), "(the domain needs two vCPUs: dom0_max_vcpus=2)");
    check_eq!(operation(VcpuOp::Up, 1), Err(Errno::EINVAL));
    check_eq!(operation(VcpuOp::IsUp, 2), Err(Errno::ENOENT));
    check_eq!(operation(VcpuOp::Up, 2), Err(Errno::ENOENT));
    check_eq!(operation(VcpuOp::Up, u64::from(u32::MAX)), Err(Errno::ENOENT));
    Ok(())
}

fn initialise_refused(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::VcpuOp, [0, 1, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(initialise(2, &mut context()), Err(Errno::ENOENT));
    check_eq!(initialise(0, &mut context()), Err(Errno::EEXIST));
    // A root that is no page table of this domain.
    let page = Page::new()?;
    let mut bad = context();
    bad.ctrlreg[3] = page.mfn().address().get();
    check_eq!(initialise(1, &mut bad), Err(Errno::EINVAL));
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(0));
    check_eq!(operation(VcpuOp::Up, 1), Err(Errno::EINVAL), "still not initialised");
    Ok(())
}

/// What to spoil in a context, and how.
type Change = (&'static str, fn(&mut VcpuGuestContext));

/// Each change to a good context is refused, and the vCPU is not initialised after it.
fn each_refused(changes: &[Change]) -> Verdict {
    for (what, change) in changes {
        let mut bad = context();
        change(&mut bad);
        check_eq!(initialise(1, &mut bad), Err(Errno::EINVAL), "{what}");
        check_eq!(operation(VcpuOp::Up, 1), Err(Errno::EINVAL), "initialised in spite of {what}");
    }
    Ok(())
}

/// An address that no pointer may have.
const BENT: u64 = 0x0000_8000_0000_0000;

fn initialise_wants_canonical_addresses(_: &mut Domain) -> Verdict {
    each_refused(&[
        ("rip", |c| c.user_regs.rip = BENT),
        ("rsp", |c| c.user_regs.rsp = BENT),
        ("kernel_sp", |c| c.kernel_sp = BENT),
        ("the event callback", |c| c.event_callback_eip = BENT),
        ("the failsafe callback", |c| c.failsafe_callback_eip = BENT),
        ("the syscall callback", |c| c.syscall_callback_eip = BENT),
        ("fs_base", |c| c.fs_base = BENT),
        ("gs_base_kernel", |c| c.gs_base_kernel = BENT),
        ("gs_base_user", |c| c.gs_base_user = !BENT),
        ("a trap handler", |c| c.trap_ctxt[255].address = BENT),
    ])
}

fn initialise_wants_tables_that_may_be(_: &mut Domain) -> Verdict {
    each_refused(&[
        ("an LDT that is not aligned", |c| (c.ldt_base, c.ldt_ents) = (0x1008, 1)),
        ("an LDT of 8193 entries", |c| (c.ldt_base, c.ldt_ents) = (0x1000, 8193)),
        ("an LDT in the hypervisor", |c| (c.ldt_base, c.ldt_ents) = (0xffff_8000_0000_0000, 1)),
        ("no LDT, in the hypervisor", |c| c.ldt_base = 0xffff_8000_0000_0000),
        ("a GDT of 7169 entries", |c| c.gdt_ents = 14 * 512 + 1),
        ("a GDT frame that does not exist", |c| {
            (c.gdt_frames[0], c.gdt_ents) = (Mfn::new(0xff_ffff_ffff), 1)
        }),
        ("a root that does not exist", |c| c.ctrlreg[3] = 0xff_ffff_ffff << 12),
        ("a user root that does not exist", |c| c.ctrlreg[1] = 0xff_ffff_ffff << 12),
        ("user mode without page tables", |c| c.flags = 0),
    ])
}

fn second_vcpu_runs(_: &mut Domain) -> Verdict {
    check_eq!(initialise(1, &mut context()), Ok(0));
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(0), "initialised is not up");
    // SAFETY: a byte of the shared page.
    unsafe { (&raw mut (*shared()).vcpu_info[1].evtchn_upcall_mask).write_volatile(1) };
    check_eq!(operation(VcpuOp::Up, 1), Ok(0));
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(1));
    wait("its first store", || BORN.load(Ordering::SeqCst) == 0x1234)
}

fn initialise_twice_is_refused(_: &mut Domain) -> Verdict {
    check_eq!(initialise(1, &mut context()), Err(Errno::EEXIST));
    let mut bad = context();
    bad.user_regs.rip = BENT;
    check_eq!(initialise(1, &mut bad), Err(Errno::EEXIST), "whatever the context is");
    check_eq!(call(Hypercall::VcpuOp, [0, 1, NOWHERE, 0, 0]), Err(Errno::EFAULT), "if it can be read");
    check_eq!(operation(VcpuOp::Up, 1), Ok(0), "up already");
    Ok(())
}

fn bind_ipi(vcpu: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

fn interrupts_between_vcpus(_: &mut Domain) -> Verdict {
    let (there, back) = (bind_ipi(1)?, bind_ipi(0)?);
    PORTS[0].store(there.get(), Ordering::SeqCst);
    PORTS[1].store(back.get(), Ordering::SeqCst);
    ECHOED.store(0, Ordering::SeqCst);
    ORDER.store(ECHO, Ordering::SeqCst);
    for round in 1..=100 {
        check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: there }), Ok(0));
        wait("the echo", || pending(back))?;
        check!(take_pending(back));
        check_eq!(ECHOED.load(Ordering::SeqCst), round);
    }
    // The other has no order but to wait for the port: it is asleep.
    let mut info = RunstateInfo::default();
    wait("its sleep", || {
        let mut info = RunstateInfo::default();
        vcpu(VcpuOp::GetRunstateInfo, 1, &mut info).is_ok() && info.state == 2
    })?;
    check_eq!(vcpu(VcpuOp::GetRunstateInfo, 1, &mut info), Ok(0));
    check!(info.time[2] > 0 && info.time[0] > 0, "{info:?}");
    ORDER.store(WAIT, Ordering::SeqCst);
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: there }), Ok(0));
    wait("the last echo", || pending(back))?;
    take_pending(back);
    for port in [there, back] {
        check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    }
    Ok(())
}

fn running(id: u64) -> Result<u64, Errno> {
    let mut info = RunstateInfo::default();
    vcpu(VcpuOp::GetRunstateInfo, id, &mut info)?;
    Ok(info.time[0])
}

fn two_that_spin_share_the_cpu(_: &mut Domain) -> Verdict {
    on_one_cpu(share_the_cpu)
}

fn share_the_cpu() -> Verdict {
    ORDER.store(SPIN, Ordering::SeqCst);
    wait("its first turn", || SPUN.load(Ordering::Relaxed) > 0)?;
    let (own, other, spun) = (running(0)?, running(1)?, SPUN.load(Ordering::Relaxed));
    let start = now_ns();
    // Neither sleeps nor yields: only the timer of the hypervisor takes the CPU away.
    while now_ns() - start < 1500 * MS {}
    let (own, other) = (running(0)? - own, running(1)? - other);
    let spun = SPUN.load(Ordering::Relaxed) - spun;
    ORDER.store(WAIT, Ordering::SeqCst);
    check!(spun > 1000, "{spun} rounds");
    let share = own * 1000 / (own + other);
    check!((420..=580).contains(&share), "{share} of 1000 for who measures ({own} and {other} ns)");
    Ok(())
}

fn the_wait_for_the_cpu_is_stolen_time(_: &mut Domain) -> Verdict {
    on_one_cpu(wait_is_stolen_time)
}

fn wait_is_stolen_time() -> Verdict {
    let states = |id: u64| -> Result<RunstateInfo, Errno> {
        let mut info = RunstateInfo::default();
        vcpu(VcpuOp::GetRunstateInfo, id, &mut info)?;
        Ok(info)
    };
    ORDER.store(SPIN, Ordering::SeqCst);
    let turn = SPUN.load(Ordering::Relaxed);
    wait("its first turn", || SPUN.load(Ordering::Relaxed) > turn)?;
    let (own, other, start) = (states(0)?, states(1)?, now_ns());
    while now_ns() - start < 500 * MS {}
    let (after, after_other) = (states(0)?, states(1)?);
    ORDER.store(WAIT, Ordering::SeqCst);
    let passed: u64 = (0..4).map(|state| after.time[state] - own.time[state]).sum();
    check!(passed.abs_diff(500 * MS) < 100 * MS, "{passed} ns accounted for of 500 ms");
    check_eq!(after.time[2], own.time[2], "blocked");
    // On one CPU: while the other ran, this one waited.
    let (stolen, ran) = (after.time[1] - own.time[1], after_other.time[0] - other.time[0]);
    check!(
        ran > 100 * MS && stolen.abs_diff(ran) < 60 * MS,
        "{stolen} ns stolen while the other ran {ran} ns"
    );
    Ok(())
}

fn ticks_of_another_vcpu(_: &mut Domain) -> Verdict {
    let mut bind = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: 1, port: Port::new(0) };
    check_eq!(evtchn(EvtchnOp::BindVirq, &mut bind), Ok(0));
    ORDER.store(SPIN, Ordering::SeqCst);
    check_eq!(vcpu(VcpuOp::SetPeriodicTimer, 1, &mut VcpuSetPeriodicTimer { period_ns: 5 * MS }), Ok(0));
    take_pending(bind.port);
    for _ in 0..3 {
        wait("a tick", || take_pending(bind.port))?;
    }
    check_eq!(operation(VcpuOp::StopPeriodicTimer, 1), Ok(0));
    take_pending(bind.port);
    let start = now_ns();
    while now_ns() - start < 50 * MS {
        call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
    }
    check!(!pending(bind.port), "it goes on when it was stopped");
    ORDER.store(WAIT, Ordering::SeqCst);
    check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port: bind.port }), Ok(0));
    Ok(())
}

fn ticks_set_and_stopped_while_it_sleeps(_: &mut Domain) -> Verdict {
    let mut bind = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: 1, port: Port::new(0) };
    check_eq!(evtchn(EvtchnOp::BindVirq, &mut bind), Ok(0));
    let pause = || -> Verdict {
        let start = now_ns();
        while now_ns() - start < 30 * MS {
            call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
        }
        Ok(())
    };
    ORDER.store(WAIT, Ordering::SeqCst);
    pause()?;
    check_eq!(vcpu(VcpuOp::SetPeriodicTimer, 1, &mut VcpuSetPeriodicTimer { period_ns: 5 * MS }), Ok(0));
    // One that is set begins at once. The vCPU is woken, and when it sleeps again it has stopped.
    wait("a tick while it sleeps", || take_pending(bind.port))?;
    ORDER.store(SPIN, Ordering::SeqCst);
    for _ in 0..3 {
        wait("a tick", || take_pending(bind.port))?;
    }
    ORDER.store(WAIT, Ordering::SeqCst);
    pause()?;
    check_eq!(operation(VcpuOp::StopPeriodicTimer, 1), Ok(0));
    take_pending(bind.port);
    ORDER.store(SPIN, Ordering::SeqCst);
    pause()?;
    check!(!pending(bind.port), "it goes on when it was stopped");
    ORDER.store(WAIT, Ordering::SeqCst);
    check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port: bind.port }), Ok(0));
    Ok(())
}

fn an_nmi_reaches_another_vcpu(_: &mut Domain) -> Verdict {
    ORDER.store(SPIN, Ordering::SeqCst);
    for _ in 0..3 {
        let before = NMIS.load(Ordering::SeqCst);
        check_eq!(operation(VcpuOp::SendNmi, 1), Ok(0));
        wait("its handler", || NMIS.load(Ordering::SeqCst) > before)?;
        check_eq!(NMIS.load(Ordering::SeqCst), before + 1, "one each");
    }
    let spun = SPUN.load(Ordering::Relaxed);
    wait("it goes on", || SPUN.load(Ordering::Relaxed) > spun)?;
    ORDER.store(WAIT, Ordering::SeqCst);
    Ok(())
}

fn an_nmi_wakes_a_vcpu_that_polls(_: &mut Domain) -> Verdict {
    let (there, back) = (bind_ipi(1)?, bind_ipi(0)?);
    PORTS[0].store(there.get(), Ordering::SeqCst);
    PORTS[1].store(back.get(), Ordering::SeqCst);
    ORDER.store(ECHO, Ordering::SeqCst);
    wait("its sleep", || {
        let mut info = RunstateInfo::default();
        vcpu(VcpuOp::GetRunstateInfo, 1, &mut info).is_ok() && info.state == 2
    })?;
    let before = NMIS.load(Ordering::SeqCst);
    check_eq!(operation(VcpuOp::SendNmi, 1), Ok(0));
    wait("its handler", || NMIS.load(Ordering::SeqCst) == before + 1)?;
    ORDER.store(WAIT, Ordering::SeqCst);
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: there }), Ok(0));
    wait("the echo", || pending(back))?;
    take_pending(back);
    for port in [there, back] {
        check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    }
    Ok(())
}

fn nmi_refused(_: &mut Domain) -> Verdict {
    let before = NMIS.load(Ordering::SeqCst);
    check_eq!(call(Hypercall::VcpuOp, [11, 1, 8, 0, 0]), Err(Errno::EINVAL), "it has no argument");
    check_eq!(operation(VcpuOp::SendNmi, 4000), Err(Errno::ENOENT));
    let start = now_ns();
    while now_ns() - start < 30 * MS {
        call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
    }
    check_eq!(NMIS.load(Ordering::SeqCst), before);
    Ok(())
}

fn runstate_area_of_another_vcpu(_: &mut Domain) -> Verdict {
    // The area is written at changes of state: alone on its CPU, a vCPU that yields has none.
    on_one_cpu(runstate_area_is_kept)
}

fn runstate_area_is_kept() -> Verdict {
    static AREA: [AtomicU64; 6] = [const { AtomicU64::new(u64::MAX) }; 6];
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new((&raw const AREA) as u64) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 1, &mut argument), Ok(0));
    let ran = AREA[2].load(Ordering::SeqCst);
    check!(ran != u64::MAX, "written at once, by whoever asks");
    check!((AREA[0].load(Ordering::SeqCst) as u32) < 4, "with a state");
    wait("its next turn", || AREA[2].load(Ordering::SeqCst) > ran)?;
    let mut argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new(0) };
    check_eq!(vcpu(VcpuOp::RegisterRunstateMemoryArea, 1, &mut argument), Ok(0));
    Ok(())
}

fn vcpu_info_of_a_running_vcpu_stays(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(1));
    check_eq!(register(1, page.mfn(), 4), Err(Errno::ENXIO), "misaligned");
    check_eq!(register(1, page.mfn(), 0), Err(Errno::EINVAL), "it is up");
    let port = bind_ipi(1)?;
    check_eq!(evtchn(EvtchnOp::Unmask, &mut EvtchnSend { port }), Ok(0));
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port }), Ok(0));
    // SAFETY: the shared page.
    let selector = unsafe { (&raw const (*shared()).vcpu_info[1].evtchn_pending_sel).read_volatile() };
    check!(selector >> (port.get() / 64) & 1 == 1, "where it was: {selector:#x}");
    check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    // SAFETY: as above. The upcall that was announced is taken back, so that polls of vCPU 1 sleep again.
    unsafe {
        (&raw mut (*shared()).vcpu_info[1].evtchn_upcall_pending).write_volatile(0);
        (&raw mut (*shared()).vcpu_info[1].evtchn_pending_sel).write_volatile(0);
    }
    Ok(())
}

fn yield_lets_the_other_run(_: &mut Domain) -> Verdict {
    ORDER.store(SPIN, Ordering::SeqCst);
    let before = SPUN.load(Ordering::Relaxed);
    wait("a turn of the other", || SPUN.load(Ordering::Relaxed) > before)?;
    ORDER.store(WAIT, Ordering::SeqCst);
    Ok(())
}

static LOST: AtomicU64 = AtomicU64::new(0);

/// Notes the selector that FS had, and goes on: rcx, r11, ds, es, fs, gs, then the frame as usual.
#[unsafe(naked)]
unsafe extern "C" fn own_failsafe() {
    core::arch::naked_asm!(
        "mov rcx, [rsp + 32]",
        "mov [rip + {lost}], rcx",
        "pop rcx",
        "pop r11",
        "add rsp, 32",
        "push 0",
        "push rcx",
        "push r11",
        "push rax",
        "mov eax, 23",
        "syscall",
        "ud2",
        lost = sym LOST,
    )
}

fn failsafe_callback_tells_of_a_lost_selector(_: &mut Domain) -> Verdict {
    on_one_cpu(lose_a_selector)
}

fn lose_a_selector() -> Verdict {
    // A segment is loaded, its descriptor taken away, and the vCPU switched off and on again: it cannot be loaded any more.
    let table = TablePage::new(&[(3, 0x00cf_f300_0000_ffff)])?;
    let mut frames = [table.mfn()];
    let mut entry = CallbackRegister {
        kind: CallbackType::Failsafe.number() as u16,
        flags: 1,
        pad0: 0,
        address: VirtAddr::new(own_failsafe as *const () as u64),
    };
    check_eq!(callback(CallbackOp::Register, &mut entry), Ok(0));
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Ok(0));
    LOST.store(0, Ordering::SeqCst);
    probe!("mov fs, {s:e}"; s = in(reg) 0x1bu64)?;
    check_eq!(call(Hypercall::UpdateDescriptor, [table.place(3), 0, 0, 0, 0]), Ok(0));
    ORDER.store(SPIN, Ordering::SeqCst);
    let before = SPUN.load(Ordering::Relaxed);
    let turned = wait("a turn of the other", || SPUN.load(Ordering::Relaxed) > before);
    ORDER.store(WAIT, Ordering::SeqCst);
    let now: u64;
    probe!("mov eax, fs", "mov {v}, rax"; v = out(reg) now)?;
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 0, 0, 0, 0]), Ok(0));
    turned?;
    check_eq!(LOST.load(Ordering::SeqCst) & 0xffff, 0x1b, "the selector in the frame");
    check_eq!(now & 0xffff, 0, "FS after it");
    Ok(())
}

fn down_and_up_again(_: &mut Domain) -> Verdict {
    ORDER.store(STOP, Ordering::SeqCst);
    wait("its end", || operation(VcpuOp::IsUp, 1) == Ok(0))?;
    let mut info = RunstateInfo::default();
    wait("offline", || {
        let mut info = RunstateInfo::default();
        vcpu(VcpuOp::GetRunstateInfo, 1, &mut info).is_ok() && info.state == 3
    })?;
    check_eq!(vcpu(VcpuOp::GetRunstateInfo, 1, &mut info), Ok(0));
    check_eq!(info.state, 3, "offline");
    // It goes on where it stopped.
    ORDER.store(SPIN, Ordering::SeqCst);
    let before = SPUN.load(Ordering::Relaxed);
    check_eq!(operation(VcpuOp::Up, 1), Ok(0));
    wait("its next turn", || SPUN.load(Ordering::Relaxed) > before)?;
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(1));
    // Another vCPU can stop it, too.
    check_eq!(operation(VcpuOp::Down, 1), Ok(0));
    check_eq!(operation(VcpuOp::IsUp, 1), Ok(0));
    // On a CPU of its own it is told, not waited for.
    let start = now_ns();
    while now_ns() - start < 5 * MS {}
    let stopped = SPUN.load(Ordering::Relaxed);
    let start = now_ns();
    while now_ns() - start < 50 * MS {}
    check_eq!(SPUN.load(Ordering::Relaxed), stopped, "it runs while it is down");
    ORDER.store(WAIT, Ordering::SeqCst);
    check_eq!(operation(VcpuOp::Down, 4000), Err(Errno::ENOENT));
    Ok(())
}

fn register(id: u64, frame: Mfn, offset: u32) -> Result<u64, Errno> {
    vcpu(VcpuOp::RegisterVcpuInfo, id, &mut VcpuRegisterVcpuInfo { mfn: frame.get(), offset, rsvd: 0 })
}

fn vcpu_info_moves(_: &mut Domain) -> Verdict {
    // Kept for ever: the hypervisor writes it from now on.
    let page = Page::new()?;
    let (frame, address) = (page.mfn(), page.leak());
    // Crossing the end, or behind it.
    check_eq!(register(1, frame, 4096 - 63), Err(Errno::ENXIO));
    check_eq!(register(1, frame, 4096), Err(Errno::ENXIO));
    check_eq!(register(1, frame, 128), Ok(0));
    check_eq!(register(1, frame, 192), Err(Errno::EINVAL), "once only");
    // Events of vCPU 1 are told there now, and not in the shared page.
    let info = (address + 128) as *const VcpuInfo;
    let port = bind_ipi(1)?;
    // SAFETY: the selector of the shared page, cleared to see whether it is used.
    unsafe { (&raw mut (*shared()).vcpu_info[1].evtchn_pending_sel).write_volatile(0) };
    check_eq!(evtchn(EvtchnOp::Unmask, &mut EvtchnSend { port }), Ok(0));
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port }), Ok(0));
    // SAFETY: both are mapped.
    let (new, old) = unsafe {
        (
            (&raw const (*info).evtchn_pending_sel).read_volatile(),
            (&raw const (*shared()).vcpu_info[1].evtchn_pending_sel).read_volatile(),
        )
    };
    check!(pending(port));
    check!(new >> (port.get() / 64) & 1 == 1, "selector at the new place {new:#x}");
    check_eq!(old, 0, "selector in the shared page");
    check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    Ok(())
}

fn vcpu_info_refused(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::VcpuOp, [10, 0, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(register(4000, memory::root(), 0), Err(Errno::ENOENT));
    // A page table cannot be written to.
    check_eq!(register(0, memory::root(), 0), Err(Errno::EINVAL));
    check_eq!(register(0, Mfn::new(0xff_ffff_ffff), 0), Err(Errno::EINVAL));
    Ok(())
}

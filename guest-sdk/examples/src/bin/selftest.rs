//! Tests the SDK itself where it runs: the same verdicts on Xenolith and on Xen, as first domain or as any other.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use guest_sdk::abi::{DomId, Errno, GrantRef, Pfn, Port, Virq};
use guest_sdk::memory::{self, Access, Page, Region};
use guest_sdk::ring::SharedPage;
use guest_sdk::testkit::*;
use guest_sdk::user::{Exit, Space, exit_of};
use guest_sdk::{Domain, entry, events, executor, hypercall, time};

#[entry]
fn main(domain: Domain) {
    run(
        domain,
        &cases![
            // Nobody has slept before.
            a_first_sleep_that_is_interrupted_ends,
            frames_round_trip,
            heap_grows_and_comes_back,
            image_is_protected,
            memory_functions_are_right,
            probes_report_exceptions,
            handlers_are_asked,
            an_event_is_noted_once,
            an_upcall_comes_in_a_window,
            an_event_before_the_block_ends_it,
            polls_end_by_event_and_by_time,
            a_closed_port_is_silent,
            many_ports_and_priorities,
            time_goes_on,
            tasks_wake_by_event_and_time,
            grants_end_only_when_unmapped,
            a_wrong_grant_is_refused,
            many_grants_grow_the_table,
            the_window_is_reused,
            regions_show_what_was_asked,
            hypercalls_keep_registers,
            user_code_returns,
            user_code_is_interrupted,
            user_code_is_confined,
            spaces_give_everything_back,
            typed_calls_answer,
        ],
    );
}

/// An event that is pending and stays so ends the first poll at once. What is slept then needs the timer, whose port nobody has needed yet.
fn a_first_sleep_that_is_interrupted_ends(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    mask(&channel);
    channel.notify()?;
    let start = time::now_ns();
    executor::block_on(time::after(Duration::from_millis(20)));
    check!(time::now_ns() - start >= 20_000_000);
    Ok(())
}

fn frames_round_trip(_: &mut Domain) -> Verdict {
    for pfn in (0..memory::pages()).step_by(7) {
        let Some(mfn) = memory::pfn_to_mfn(Pfn::new(pfn)) else { continue };
        check_eq!(memory::mfn_to_pfn(mfn), Some(Pfn::new(pfn)));
    }
    check_eq!(memory::pfn_to_mfn(Pfn::new(memory::pages())), None);
    // Frames of others are not ours, wherever the table ends.
    check_eq!(memory::mfn_to_pfn(guest_sdk::abi::Mfn::new(1 << 38)), None);
    Ok(())
}

fn heap_grows_and_comes_back(_: &mut Domain) -> Verdict {
    let before = memory::usage();
    // Past what is mapped now, if there is more; else most of what there is.
    let wanted =
        if before.unmapped > 8 << 20 { before.heap_free + (4 << 20) } else { before.heap_free / 2 } as usize;
    fill(wanted)?;
    // Growing has taken pages for tables; the second time there is nothing to grow.
    let before = memory::usage();
    fill(wanted)?;
    check_eq!(memory::usage(), before);
    // More than the domain has is an error, not a crash.
    let mut huge: Vec<u8> = Vec::new();
    check!(huge.try_reserve_exact(memory::usage().total as usize + 1).is_err());
    Ok(())
}

/// Fills `wanted` bytes of heap, checks that all of them keep their value, and frees them.
fn fill(wanted: usize) -> Verdict {
    let mut blocks = Vec::new();
    let mut total = 0;
    while total < wanted {
        let size = (64 << 10) + total % 4096;
        let mut block: Vec<u8> = Vec::new();
        if block.try_reserve_exact(size).is_err() {
            break;
        }
        block.resize(size, blocks.len() as u8);
        total += size;
        blocks.push(block);
    }
    check!(total > wanted / 2, "{total} of {wanted} bytes");
    for (tag, block) in blocks.iter().enumerate() {
        check!(block.iter().all(|&byte| byte == tag as u8), "block {tag} was overwritten");
    }
    Ok(())
}

fn image_is_protected(_: &mut Domain) -> Verdict {
    let text = main as *const () as u64 & !7;
    // SAFETY: must fault.
    expect_vector(unsafe { try_write(text, 0) }, 14, 3)?;
    check_eq!(fault_address(), text);
    let constant = "a constant of the program".as_ptr() as u64 & !7;
    // SAFETY: must fault.
    expect_vector(unsafe { try_write(constant, 0) }, 14, 3)?;
    // Nothing is mapped at 0, nor far away.
    expect_vector(try_read(0), 14, 0)?;
    expect_vector(try_read(0x1234_5678_9abc_0000), 13, 0)?;
    Ok(())
}

fn memory_functions_are_right(_: &mut Domain) -> Verdict {
    let source: Vec<u8> = (0..200u8).collect();
    for shift in 0..9 {
        let mut moved = source.clone();
        moved.copy_within(0..150, shift);
        check!(moved.get(shift..shift + 150) == source.get(..150), "upward by {shift}");
        let mut moved = source.clone();
        moved.copy_within(shift..150, 0);
        check!(moved.get(..150 - shift) == source.get(shift..150), "downward by {shift}");
    }
    Ok(())
}

fn probes_report_exceptions(_: &mut Domain) -> Verdict {
    expect_vector(probe!("ud2"), 6, 0)?;
    expect_vector(probe!("int3"), 3, 0)?;
    expect_vector(probe!("int 0x20"), 32, 0)?;
    expect_vector(probe!("div {zero}"; zero = in(reg) 0u64, inout("rdx") 1u64 => _), 0, 0)?;
    expect_vector(probe!("mov {value}, [{at}]"; value = out(reg) _, at = in(reg) 16u64), 14, 0)?;
    let cr0: u64;
    probe!("mov {value}, cr0"; value = out(reg) cr0)?;
    check_eq!(cr0 & 0x8000_0001, 0x8000_0001, "paging and protection in cr0");
    Ok(())
}

static ASKED: AtomicU32 = AtomicU32::new(0);

fn handlers_are_asked(_: &mut Domain) -> Verdict {
    fn skip_it(frame: &mut TrapFrame) -> bool {
        ASKED.fetch_add(1, Ordering::Relaxed);
        frame.rip += 2;
        true
    }
    set_handler(6, Some(skip_it));
    // SAFETY: the handler skips it. Not a listed instruction.
    unsafe { core::arch::asm!("ud2") };
    set_handler(6, None);
    check_eq!(ASKED.load(Ordering::Relaxed), 1);
    Ok(())
}

fn an_event_is_noted_once(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    check!(!channel.poll());
    channel.notify()?;
    channel.notify()?;
    check!(channel.poll());
    check!(!channel.poll());
    Ok(())
}

fn many_ports_and_priorities(domain: &mut Domain) -> Verdict {
    let mut channels = Vec::new();
    for _ in 0..1500 {
        // Unprivileged domains on Xen have 1023.
        let Ok(channel) = domain.events.bind_ipi() else { break };
        channels.push(channel);
    }
    check!(channels.len() > 900, "{} ports", channels.len());
    let urgent = channels[0].set_priority(0);
    check!(matches!(urgent, Ok(()) | Err(Errno::ENOSYS)), "{urgent:?}");
    for step in [1, 3, 7] {
        for channel in channels.iter().step_by(step).rev() {
            channel.notify()?;
        }
        for (index, channel) in channels.iter().enumerate() {
            check_eq!(channel.poll(), index % step == 0, "port {}", channel.port());
        }
    }
    Ok(())
}

fn an_upcall_comes_in_a_window(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    channel.poll();
    check_eq!(window(), 0, "upcalls with nothing pending");
    let before = upcalls();
    channel.notify()?;
    check_eq!(upcalls(), before, "upcalls while masked");
    check_eq!(window(), 1);
    check!(channel.poll());
    check_eq!(window(), 0, "upcalls after it was taken");
    Ok(())
}

fn an_event_before_the_block_ends_it(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    for _ in 0..100 {
        // The look that finds nothing, then the event, then the sleep: it must end without any other event.
        check!(!channel.poll());
        channel.notify()?;
        events::sleep_until(None);
        check!(channel.poll());
    }
    Ok(())
}

fn polls_end_by_event_and_by_time(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    let start = time::now();
    check!(!channel.wait_timeout(Duration::from_millis(20)));
    check!(time::now() - start >= Duration::from_millis(20));
    channel.notify()?;
    hypercall::poll(&[channel.port()], 0)?;
    check!(channel.poll());
    let start = time::now_ns();
    hypercall::poll(&[channel.port()], start + 10_000_000)?;
    check!(time::now_ns() >= start + 10_000_000, "the poll ended early");
    expect_errno(hypercall::poll(&[Port::new(1 << 20)], 1), Errno::EINVAL)
}

fn a_closed_port_is_silent(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    let port = channel.port();
    channel.notify()?;
    drop(channel);
    check_eq!(events::status(DomId::SELF, port)?.status, 0, "status of a closed port");
    // In the FIFO form the number is not given out again before the event has left its queue.
    events::turn();
    let again = domain.events.bind_ipi()?;
    check_eq!(again.port(), port);
    check!(!again.poll(), "the old owner's event");
    expect_errno(domain.events.bind_virq(Virq::new(24)).map(drop), Errno::EINVAL)
}

fn time_goes_on(_: &mut Domain) -> Verdict {
    let mut last = time::now_ns();
    for _ in 0..10_000 {
        let now = time::now_ns();
        check!(now >= last, "back from {last} to {now}");
        last = now;
    }
    let (start, wall) = (time::now(), time::wall_clock());
    time::sleep(Duration::from_millis(30));
    let slept = time::now() - start;
    check!(slept >= Duration::from_millis(30), "slept {slept:?}");
    let walked = time::wall_clock().saturating_sub(wall);
    check!(walked >= Duration::from_millis(29), "the wall clock moved {walked:?}");
    // After this was written, and before it is forgotten.
    check!((1_700_000_000..5_000_000_000).contains(&wall.as_secs()), "Unix time {wall:?}");
    Ok(())
}

fn tasks_wake_by_event_and_time(domain: &mut Domain) -> Verdict {
    let mut listener = domain.events.alloc_unbound(domain.id())?;
    let caller = domain.events.bind_interdomain(domain.id(), listener.port())?;
    let heard = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&heard);
    executor::spawn(async move {
        loop {
            listener.fired().await;
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let result = executor::block_on(async {
        for call in 1..=20u32 {
            caller.notify()?;
            time::after(Duration::from_millis(if call % 2 == 0 { 0 } else { 2 })).await;
            executor::yield_now().await;
        }
        time::after(Duration::from_millis(5)).await;
        Ok::<(), Errno>(())
    });
    result?;
    check_eq!(heard.load(Ordering::Relaxed), 20);
    let mut silent = domain.events.bind_ipi()?;
    check!(!executor::block_on(silent.fired_within(Duration::from_millis(5))), "nobody called");
    silent.notify()?;
    check!(executor::block_on(silent.fired_within(Duration::from_secs(5))), "the call was not heard");
    Ok(())
}

fn grants_end_only_when_unmapped(domain: &mut Domain) -> Verdict {
    let grant = domain.grants.grant_new(domain.id(), Access::ReadWrite)?;
    let mapping = domain.grants.map(domain.id(), &[grant.reference()], Access::ReadWrite)?;
    grant.write_bytes(100, b"there");
    let mut bytes = [0; 5];
    mapping.read_bytes(100, &mut bytes);
    check_eq!(&bytes, b"there");
    mapping.word(200).store(7, Ordering::Relaxed);
    check_eq!(grant.word(200).load(Ordering::Relaxed), 7);
    check!(grant.in_use());
    let Err(grant) = grant.end() else { return fail("the grant ended while it was mapped") };
    let address = mapping.address();
    drop(mapping);
    expect_vector(try_read(address), 14, 0)?;
    let Ok(page) = grant.end() else { return fail("the grant does not end") };
    check_eq!(page.bytes().get(100..105), Some(&b"there"[..]));
    Ok(())
}

fn a_wrong_grant_is_refused(domain: &mut Domain) -> Verdict {
    let grant = domain.grants.grant_new(domain.id(), Access::Read)?;
    check!(domain.grants.map(domain.id(), &[grant.reference()], Access::ReadWrite).is_err(), "writable");
    let absent = GrantRef::new(grant.reference().get() + 1);
    check!(domain.grants.map(domain.id(), &[grant.reference(), absent], Access::Read).is_err(), "one of two");
    check!(!grant.in_use(), "the good half of a refused list is still mapped");
    check!(
        domain.grants.map(DomId::new(0x7000), &[grant.reference()], Access::Read).is_err(),
        "no such domain"
    );
    let other = domain.grants.grant_new(DomId::new(0x7000), Access::Read)?;
    check!(domain.grants.map(domain.id(), &[other.reference()], Access::Read).is_err(), "meant for another");
    Ok(())
}

fn many_grants_grow_the_table(domain: &mut Domain) -> Verdict {
    if memory::usage().heap_free + memory::usage().unmapped < 3 << 20 {
        return skip("needs 3 MiB");
    }
    let grants = (0..600)
        .map(|_| domain.grants.grant_new(domain.id(), Access::Read))
        .collect::<Result<Vec<_>, _>>()?;
    let last = grants.last().ok_or("no grants")?;
    check!(last.reference().get() >= 600);
    last.write_bytes(0, b"last");
    let mapping = domain.grants.map(domain.id(), &[last.reference()], Access::Read)?;
    let mut bytes = [0; 4];
    mapping.read_bytes(0, &mut bytes);
    check_eq!(&bytes, b"last");
    Ok(())
}

fn the_window_is_reused(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let mut seen = Vec::new();
    for _ in 0..64 {
        let range = memory::Range::new(3)?;
        // SAFETY: read-only, and nobody writes the page meanwhile.
        unsafe { range.map(1, page.mfn(), Access::Read)? };
        check_eq!(try_read(range.address(1)), Ok(0));
        expect_vector(try_read(range.address(0)), 14, 0)?;
        seen.push(range.start());
    }
    seen.sort_unstable();
    seen.dedup();
    check!(seen.len() <= 2, "{} places for one range at a time", seen.len());
    Ok(())
}

fn regions_show_what_was_asked(_: &mut Domain) -> Verdict {
    let pages = (0..3).map(|_| Page::new()).collect::<Result<Vec<_>, _>>()?;
    let mut region = Region::new(600, pages)?;
    for slot in 0..600 {
        region.map(slot, slot % 3, if slot % 2 == 0 { Access::ReadWrite } else { Access::Read });
    }
    let changed = region.commit()?;
    check_eq!(changed, 600);
    region.write(0, 16, 5)?;
    check_eq!(region.read(3, 16), Ok(5));
    expect_vector(region.write(3, 16, 6), 14, 3)?;
    region.unmap(3);
    check_eq!(region.read(3, 16), Ok(5), "before the commit");
    region.commit()?;
    expect_vector(region.read(3, 16), 14, 0)
}

/// Registers after a hypercall that were given patterns before it: rbx, rbp, r9, r12 to r15.
fn registers_after(number: u64, arguments: [u64; 5]) -> (u64, [u64; 7]) {
    let mut kept = [0u64; 7];
    let result: u64;
    let [a, b, c, d, e] = arguments;
    // SAFETY: the callers give requests that Rust does not notice; rbx and rbp are put back.
    unsafe {
        core::arch::asm!(
            "push rbx",
            "push rbp",
            "push {out}",
            "mov rbx, 0x1001",
            "mov rbp, 0x1002",
            "mov r12, 0x1004",
            "mov r13, 0x1005",
            "mov r14, 0x1006",
            "mov r15, 0x1007",
            "syscall",
            "pop rcx",
            "mov [rcx], rbx",
            "mov [rcx + 8], rbp",
            "mov [rcx + 16], r9",
            "mov [rcx + 24], r12",
            "mov [rcx + 32], r13",
            "mov [rcx + 40], r14",
            "mov [rcx + 48], r15",
            "pop rbp",
            "pop rbx",
            out = in(reg) kept.as_mut_ptr(),
            inlateout("rax") number => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
            inlateout("r9") 0x1003u64 => _,
            lateout("rcx") _, lateout("r11") _, lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
        );
    }
    (result, kept)
}

fn hypercalls_keep_registers(_: &mut Domain) -> Verdict {
    const KEPT: [u64; 7] = [0x1001, 0x1002, 0x1003, 0x1004, 0x1005, 0x1006, 0x1007];
    check_eq!(registers_after(17, [0; 5]).1, KEPT, "after xen_version");
    check_eq!(registers_after(63, [0; 5]).1, KEPT, "after a number that is none");
    check_eq!(registers_after(29, [0; 5]).1, KEPT, "after a yield");
    // Long enough to be preempted and continued, where the hypervisor does so by count.
    let range = memory::Range::new(1)?;
    let place = memory::leaf_address(range.start()).ok_or("no table")?;
    let requests = alloc::vec![[place, 0u64]; 2000];
    let (result, kept) =
        registers_after(1, [requests.as_ptr() as u64, 2000, 0, u64::from(DomId::SELF.get()), 0]);
    check_eq!((result, kept), (0, KEPT), "after mmu_update with 2000 requests");
    Ok(())
}

extern "C" fn double(value: u64) -> u64 {
    value * 2
}

extern "C" fn count_up(value: u64) -> u64 {
    let mut count = 0;
    while core::hint::black_box(count) < value {
        count += 1;
    }
    count
}

fn user_code_returns(_: &mut Domain) -> Verdict {
    // SAFETY: the function touches nothing.
    check_eq!(unsafe { user::call(double, 21) }, Ok(42));
    Ok(())
}

fn user_code_is_interrupted(domain: &mut Domain) -> Verdict {
    let channel = domain.events.bind_ipi()?;
    channel.notify()?;
    // SAFETY: the function touches nothing.
    check_eq!(unsafe { user::call(count_up, 1000) }, Ok(1000));
    check!(channel.poll());
    Ok(())
}

/// Code for a space of its own: leaves 7 on its stack, makes a system call, then one with 8, then reads the kernel.
const CONFINED: &[u8] = &[
    0xb8, 7, 0, 0, 0, // mov eax, 7
    0x48, 0x89, 0x44, 0x24, 0xf8, // mov [rsp - 8], rax
    0x0f, 0x05, // syscall
    0x48, 0xff, 0xc0, // inc rax
    0x0f, 0x05, // syscall
    0x48, 0x8b, 0x07, // mov rax, [rdi]
];
const CODE: u64 = 0x10_000;
const STACK: u64 = 0x7fff_0000_0000;

fn confined() -> Result<Space, Stop> {
    let mut space = Space::new()?;
    let mut code = Page::new()?;
    code.bytes_mut()[..CONFINED.len()].copy_from_slice(CONFINED);
    space.map(CODE, code, Access::ReadExecute)?;
    space.map(STACK, Page::new()?, Access::ReadWrite)?;
    Ok(space)
}

/// Runs user code up to something of its own doing: an upcall (Xen ticks from the start) is taken, and the code goes on.
fn run_past_upcalls(space: &user::Space, registers: &TrapFrame) -> Result<TrapFrame, Errno> {
    let mut frame = user::run(space, registers)?;
    while exit_of(&frame) == Exit::Upcall {
        guest_sdk::events::turn();
        frame = user::run(space, &frame)?;
    }
    Ok(frame)
}

fn user_code_is_confined(_: &mut Domain) -> Verdict {
    let mut space = confined()?;
    expect_errno(space.map(CODE, Page::new()?, Access::Read), Errno::EINVAL)?;
    let secret = 42u64;
    let mut frame = user::registers(CODE, STACK + 4096);
    frame.rdi = (&raw const secret) as u64;
    for call in [7, 8] {
        frame = run_past_upcalls(&space, &frame)?;
        check_eq!((exit_of(&frame), frame.rax), (Exit::SystemCall, call));
    }
    frame = run_past_upcalls(&space, &frame)?;
    let Exit::Exception(exception) = exit_of(&frame) else { return fail("it could read the kernel") };
    check_eq!((exception.vector, exception.error), (14, 4));
    check_eq!(fault_address(), (&raw const secret) as u64);
    check_eq!(space.page(STACK).map(|page| page.bytes()[4088]), Some(7));
    // Its own code is not writable either, and its stack not executable.
    let mut write = user::registers(CODE + 5, CODE + 64);
    write.rax = 1;
    let back = run_past_upcalls(&space, &write)?;
    check!(
        matches!(exit_of(&back), Exit::Exception(exception) if (exception.vector, exception.error) == (14, 7))
    );
    let back = run_past_upcalls(&space, &user::registers(STACK, STACK + 64))?;
    check!(
        matches!(exit_of(&back), Exit::Exception(exception) if exception.vector == 14 && exception.error & 16 != 0)
    );
    Ok(())
}

fn spaces_give_everything_back(_: &mut Domain) -> Verdict {
    drop(confined()?);
    let before = memory::usage();
    for _ in 0..20 {
        let space = confined()?;
        user::run(&space, &user::registers(CODE, STACK + 4096))?;
    }
    check_eq!(memory::usage(), before);
    Ok(())
}

fn typed_calls_answer(domain: &mut Domain) -> Verdict {
    check!(hypercall::version()? >= (4, 0));
    check!(hypercall::vcpu_is_up(0)?);
    expect_errno(hypercall::vcpu_is_up(1000), Errno::ENOENT)?;
    check_eq!(hypercall::current_reservation(DomId::SELF)?, memory::pages());
    check_eq!(hypercall::platform_parameters()?.virt_start, 0xffff_8000_0000_0000);
    check_eq!(hypercall::runstate(0)?.state, 0, "the state of a vCPU that asks");
    hypercall::set_debugreg(0, 0x1000)?;
    check_eq!(hypercall::get_debugreg(0), Ok(0x1000));
    hypercall::set_debugreg(0, 0)?;
    hypercall::restore_trap_table()?;
    hypercall::restore_callbacks()?;
    write!(domain.console, "").map_err(|_| "the console takes no text")?;
    Ok(())
}

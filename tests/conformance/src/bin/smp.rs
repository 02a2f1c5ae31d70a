//! Several vCPUs at once: their interrupts, their clocks, and translations that one takes away while others use them.
//!
//! The machine and the domain need [`VCPUS`] processors; with fewer processors the cases hold too, but vCPUs take turns.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use conformance::{
    at, call, clock_skew, evtchn, hypervisor_frame, mmuext, pending, protect, pte, shared, take_pending,
    update, vcpu,
};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use guest_sdk::abi::evtchn::{EvtchnBindIpi, EvtchnClose, EvtchnSend};
use guest_sdk::abi::mmu::{MmuCommand, UVMF_ALL, UVMF_TLB_FLUSH};
use guest_sdk::abi::sched::SchedPoll;
use guest_sdk::abi::segment::{FLAT_KERNEL_CS, FLAT_KERNEL_SS};
use guest_sdk::abi::subops::{EvtchnOp, MmuextCmd, SchedOp, VcpuOp};
use guest_sdk::abi::vcpu::{RunstateInfo, VcpuContextFlags, VcpuGuestContext};
use guest_sdk::abi::{Errno, GuestHandle, Hypercall, Mfn, Port};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            all_vcpus_run,
            an_interrupt_goes_round,
            clocks_of_all_vcpus_never_step_back,
            a_flush_reaches_all_vcpus,
            a_page_that_becomes_a_table_is_written_by_nobody,
            a_table_that_leaves_its_parent_is_used_by_nobody,
            down_and_up_while_the_others_run,
        ],
    )
}

const MS: u64 = 1_000_000;
/// vCPUs of the domain (`dom0_max_vcpus=4`).
const VCPUS: usize = 4;

/// What vCPUs 1 to 3 are to do.
static ORDER: AtomicU32 = AtomicU32::new(REST);
const REST: u32 = 0;
const COUNT: u32 = 1;
const FORWARD: u32 = 2;
const CLOCK: u32 = 3;
const READ: u32 = 4;
const WRITE: u32 = 5;
const STOP: u32 = 6;

/// Rounds that each has made of what it was told to do.
static ROUNDS: [AtomicU64; VCPUS] = [const { AtomicU64::new(0) }; VCPUS];
/// What went wrong, as each saw it; 0 for nothing.
static WRONG: [AtomicU64; VCPUS] = [const { AtomicU64::new(0) }; VCPUS];
/// Which order each carries out.
static AT: [AtomicU32; VCPUS] = [const { AtomicU32::new(u32::MAX) }; VCPUS];
/// The port that each is signalled by.
static PORTS: [AtomicU32; VCPUS] = [const { AtomicU32::new(0) }; VCPUS];
/// The word that they read or write.
static TARGET: AtomicU64 = AtomicU64::new(0);
/// The latest time that anybody has seen.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// A page-table entry that no hypervisor accepts.
static BAD_ENTRY: AtomicU64 = AtomicU64::new(0);
/// What the page holds when it is used for something else.
const POISON: u64 = 0xdead_dead_dead_dead;

#[repr(C, align(16))]
struct Stack([u64; 2048]);
static mut STACKS: [Stack; VCPUS] = [const { Stack([0; 2048]) }; VCPUS];

/// The life of vCPUs 1 to 3. Their events are masked throughout.
extern "C" fn helper(id: usize) -> ! {
    loop {
        let order = ORDER.load(Ordering::SeqCst);
        AT[id].store(order, Ordering::SeqCst);
        match order {
            COUNT => {}
            FORWARD => forward(id),
            CLOCK => watch_clock(id),
            READ => {
                let value = touch(TARGET.load(Ordering::SeqCst), None);
                if value == Some(POISON) {
                    WRONG[id].fetch_add(1, Ordering::SeqCst);
                }
            }
            WRITE => {
                touch(TARGET.load(Ordering::SeqCst), Some(BAD_ENTRY.load(Ordering::SeqCst)));
            }
            STOP if id == VCPUS - 1 => {
                let _ = call(Hypercall::VcpuOp, [VcpuOp::Down.number().into(), id as u64, 0, 0, 0]);
                continue;
            }
            _ => {
                let _ = call(Hypercall::SchedOp, [0, 0, 0, 0, 0]);
                continue;
            }
        }
        ROUNDS[id].fetch_add(1, Ordering::SeqCst);
    }
}

/// Waits for its port and signals the next vCPU's.
fn forward(id: usize) {
    let mut port = Port::new(PORTS[id].load(Ordering::SeqCst));
    let timeout = clock(id) + 100 * MS;
    let mut argument = SchedPoll { ports: GuestHandle::new(at(&mut port)), nr_ports: 1, pad0: 0, timeout };
    let _ = conformance::sched(SchedOp::Poll, &mut argument);
    if take_pending(port) {
        let port = Port::new(PORTS[(id + 1) % VCPUS].load(Ordering::SeqCst));
        let _ = evtchn(EvtchnOp::Send, &mut EvtchnSend { port });
    }
}

/// System time as this vCPU's own record tells it.
fn clock(id: usize) -> u64 {
    // SAFETY: the shared page stays mapped; only a copy with the same even version before and after counts.
    let record = unsafe { &raw const (*shared()).vcpu_info[id].time };
    loop {
        // SAFETY: as above.
        let copy = unsafe { record.read_volatile() };
        fence(Ordering::SeqCst);
        // SAFETY: rdtsc reads a counter.
        let tsc = unsafe {
            core::arch::x86_64::_mm_lfence();
            core::arch::x86_64::_rdtsc()
        };
        fence(Ordering::SeqCst);
        // SAFETY: as above.
        let version = unsafe { (&raw const (*record).version).read_volatile() };
        if version & 1 == 0 && version == copy.version {
            return copy.system_time_at(tsc);
        }
    }
}

/// Looks whether the time is at least what anybody has seen before.
fn watch_clock(id: usize) {
    let before = LATEST.load(Ordering::SeqCst);
    let now = clock(id);
    LATEST.fetch_max(now, Ordering::SeqCst);
    if now + clock_skew() < before {
        WRONG[id].fetch_max(before - now, Ordering::SeqCst);
    }
}

/// Reads the word at `address`, or writes it; `None` if it is not mapped so.
fn touch(address: u64, value: Option<u64>) -> Option<u64> {
    let (mut faulted, mut read) = (0u64, 0u64);
    // SAFETY: a page fault ends at the label that r11 names, with 1 in rax; see `on_fault`. The cases answer for the page.
    unsafe {
        match value {
            None => core::arch::asm!("lea r11, [rip + 2f]", "mov rcx, [{a}]", "2:", a = in(reg) address,
                out("rcx") read, out("r11") _, inout("rax") faulted, options(nostack)),
            Some(value) => {
                core::arch::asm!("lea r11, [rip + 2f]", "mov [{a}], rcx", "2:", a = in(reg) address,
                in("rcx") value, out("r11") _, inout("rax") faulted, options(nostack))
            }
        }
    }
    (faulted == 0).then_some(read)
}

/// The page-fault handler of vCPUs 1 to 3: goes on where r11 says, with 1 in rax. Frame: rcx, r11, error code, rip, cs,
/// flags, rsp, ss; `iret` takes rax, r11, rcx and its own flags before rip.
#[unsafe(naked)]
unsafe extern "C" fn on_fault() {
    core::arch::naked_asm!(
        "pop rcx",
        "pop r11",
        "add rsp, 8",
        "mov [rsp], r11",
        "push 0",
        "push rcx",
        "push r11",
        "push 1",
        "mov eax, 23",
        "syscall",
        "ud2",
    )
}

fn context(id: usize) -> Box<VcpuGuestContext> {
    let mut context = Box::new(VcpuGuestContext::ZERO);
    context.flags = VcpuContextFlags::IN_KERNEL.bits();
    context.fpu_ctxt[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    context.fpu_ctxt[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    context.user_regs.rip = helper as *const () as u64;
    // At a function's first instruction rsp is 8 below a multiple of 16.
    context.user_regs.rsp = (&raw const STACKS) as u64 + (size_of::<Stack>() * (id + 1)) as u64 - 8;
    context.user_regs.rdi = id as u64;
    context.user_regs.cs = FLAT_KERNEL_CS;
    context.user_regs.ss = FLAT_KERNEL_SS;
    context.user_regs.rflags = 0x200;
    context.kernel_ss = u64::from(FLAT_KERNEL_SS);
    context.kernel_sp = context.user_regs.rsp;
    context.ctrlreg[0] = 1 << 31 | 1;
    context.ctrlreg[3] = memory::root().address().get();
    let fault = &mut context.trap_ctxt[14];
    (fault.vector, fault.cs, fault.address) = (14, FLAT_KERNEL_CS, on_fault as *const () as u64);
    context
}

/// Lets the others run until the condition holds, ten seconds at most.
fn wait(what: &str, done: impl Fn() -> bool) -> Result<(), Stop> {
    let start = now_ns();
    while !done() {
        if now_ns().saturating_sub(start) > 10_000 * MS {
            ORDER.store(REST, Ordering::SeqCst);
            return testkit::fail(format_args!("{what}: not within ten seconds"));
        }
        call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// Gives the others an order, and waits until each has taken it up.
fn order(order: u32) -> Result<(), Stop> {
    ORDER.store(order, Ordering::SeqCst);
    wait("the order", || AT[1..].iter().all(|at| at.load(Ordering::SeqCst) == order))
}

fn rounds() -> [u64; VCPUS] {
    core::array::from_fn(|id| ROUNDS[id].load(Ordering::SeqCst))
}

/// Whether each of the others has made more rounds than `before`.
fn all_moved(before: &[u64; VCPUS]) -> bool {
    rounds().iter().zip(before).skip(1).all(|(now, before)| now > before)
}

fn wrong() -> u64 {
    WRONG.iter().map(|wrong| wrong.swap(0, Ordering::SeqCst)).sum()
}

fn all_vcpus_run(_: &mut Domain) -> Verdict {
    for id in 1..VCPUS {
        check_eq!(vcpu(VcpuOp::Initialise, id as u64, &mut *context(id)), Ok(0), "(dom0_max_vcpus=4)");
        check_eq!(call(Hypercall::VcpuOp, [VcpuOp::Up.number().into(), id as u64, 0, 0, 0]), Ok(0));
    }
    order(COUNT)?;
    let before = rounds();
    wait("a round of each", || all_moved(&before))?;
    for id in 1..VCPUS {
        let mut info = RunstateInfo::default();
        check_eq!(vcpu(VcpuOp::GetRunstateInfo, id as u64, &mut info), Ok(0));
        check!(info.time[0] > 0, "vCPU {id}: {info:?}");
    }
    order(REST)
}

fn an_interrupt_goes_round(_: &mut Domain) -> Verdict {
    for (id, port) in PORTS.iter().enumerate() {
        let mut bind = EvtchnBindIpi { vcpu: id as u32, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindIpi, &mut bind), Ok(0));
        port.store(bind.port.get(), Ordering::SeqCst);
    }
    let own = Port::new(PORTS[0].load(Ordering::SeqCst));
    let first = Port::new(PORTS[1].load(Ordering::SeqCst));
    order(FORWARD)?;
    for _ in 0..200 {
        check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: first }), Ok(0));
        wait("its return", || pending(own))?;
        check!(take_pending(own));
    }
    order(REST)?;
    for port in &PORTS {
        let port = Port::new(port.load(Ordering::SeqCst));
        check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    }
    Ok(())
}

fn clocks_of_all_vcpus_never_step_back(_: &mut Domain) -> Verdict {
    wrong();
    order(CLOCK)?;
    let before = rounds();
    let end = now_ns() + 1000 * MS;
    while now_ns() < end {
        watch_clock(0);
        // Yields move vCPUs about.
        call(Hypercall::SchedOp, [0, 0, 0, 0, 0])?;
    }
    wait("a round of each", || all_moved(&before))?;
    order(REST)?;
    let back = wrong();
    check_eq!(back, 0, "nanoseconds back");
    Ok(())
}

fn map(address: u64, page: &Page, bits: u64, flags: u64) -> Result<u64, Errno> {
    let entry = pte(page.mfn().get(), bits | 1 << 63);
    call(Hypercall::UpdateVaMapping, [address, entry, flags, 0, 0])
}

fn write(page: &Page, value: u64) {
    // SAFETY: the page's own mapping, writable now; nobody has a reference to it.
    unsafe { (page.address() as *mut u64).write_volatile(value) };
}

fn a_flush_reaches_all_vcpus(_: &mut Domain) -> Verdict {
    let pages = [Page::new()?, Page::new()?];
    let range = Range::new(1)?;
    wrong();
    write(&pages[0], 1);
    check_eq!(map(range.start(), &pages[0], 0x61, UVMF_TLB_FLUSH | UVMF_ALL), Ok(0));
    TARGET.store(range.start(), Ordering::SeqCst);
    order(READ)?;
    let before = rounds();
    for round in 0..100usize {
        let (old, new) = (&pages[round % 2], &pages[(round + 1) % 2]);
        write(new, 1);
        check_eq!(map(range.start(), new, 0x61, UVMF_TLB_FLUSH | UVMF_ALL), Ok(0));
        // Whoever still reads the old page reads this.
        write(old, POISON);
        if round % 20 == 0 {
            let now = rounds();
            wait("a round of each", || all_moved(&now))?;
        }
    }
    wait("a round of each", || all_moved(&before))?;
    order(REST)?;
    check_eq!(wrong(), 0, "reads of a page that was not mapped any more");
    range.unmap(0)?;
    Ok(())
}

fn a_page_that_becomes_a_table_is_written_by_nobody(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let range = Range::new(1)?;
    TARGET.store(range.start(), Ordering::SeqCst);
    BAD_ENTRY.store(pte(hypervisor_frame()?, 0x67), Ordering::SeqCst);
    order(WRITE)?;
    let (mut seen, mut tables) = (0, 0);
    for round in 0..60 {
        check_eq!(map(range.start(), &page, 0x63, UVMF_TLB_FLUSH | UVMF_ALL), Ok(0));
        if round % 10 == 0 {
            let before = rounds();
            wait("a write of each", || all_moved(&before))?;
        }
        // In some rounds they rest meanwhile, each with its stale translation, so that nothing spoils the page before it is a table.
        let rest = round % 10 == 0;
        if rest {
            order(REST)?;
        }
        // Nobody is told to flush: the hypervisor has to, before it trusts the page as a table.
        check_eq!(call(Hypercall::UpdateVaMapping, [range.start(), 0, 0, 0, 0]), Ok(0));
        write(&page, 0);
        check_eq!(protect(&page, false), Ok(()));
        let pinned = mmuext(MmuextCmd::PinL1Table, page.mfn().get(), 0);
        if pinned.is_ok() {
            tables += 1;
            if rest {
                let before = rounds();
                order(WRITE)?;
                wait("a write of each", || all_moved(&before))?;
            }
            for _ in 0..200 {
                // SAFETY: the page's own mapping, which only this function uses, for reading.
                seen |= unsafe { (page.address() as *const u64).read_volatile() };
            }
            check_eq!(mmuext(MmuextCmd::UnpinTable, page.mfn().get(), 0), Ok(0));
        }
        check!(pinned.is_ok() || !rest, "while all rest, round {round}");
        check_eq!(protect(&page, true), Ok(()));
        // A late write between the clearing and the check is seen by the check: no table, which is as good.
        check_eq!(seen, 0, "in a table, round {round}");
    }
    order(REST)?;
    check!(tables >= 6, "{tables} tables");
    Ok(())
}

fn a_table_that_leaves_its_parent_is_used_by_nobody(_: &mut Domain) -> Verdict {
    // Two tables that map the same address to two pages; the L2 entry goes from one to the other. That is the hypervisor's to flush.
    let pages = [Page::new()?, Page::new()?];
    let range = Range::new(1)?;
    // SAFETY: a page of our own at a range of our own; this makes the table of the range exist.
    unsafe { range.map(0, pages[0].mfn(), Access::Read)? };
    let address = range.start();
    let leaf = memory::leaf_address(address).ok_or(Stop::Error("no table maps the range".into()))?;
    let first = leaf & !0xfff;
    let index = address >> 12 & 511;
    let parent = parent_entry(address)?;
    // A copy of the table with another page in its place.
    let copy = Page::new()?;
    let window = Range::new(1)?;
    // SAFETY: the table that is in force, for reading.
    unsafe { window.map(0, Mfn::new(first >> 12), Access::Read)? };
    for word in 0..512u64 {
        // SAFETY: inside the window and inside the page.
        unsafe {
            let value = ((window.start() + word * 8) as *const u64).read_volatile();
            ((copy.address() + word * 8) as *mut u64).write_volatile(value);
        }
    }
    let other = pte(pages[1].mfn().get(), 0x61 | 1 << 63);
    // SAFETY: inside the page.
    unsafe { ((copy.address() + index * 8) as *mut u64).write_volatile(other) };
    protect(&copy, false)?;
    let tables = [first >> 12, copy.mfn().get()];
    wrong();
    write(&pages[0], 1);
    write(&pages[1], 1);
    TARGET.store(address, Ordering::SeqCst);
    order(READ)?;
    for round in 0..100usize {
        let (old, new) = (&pages[round % 2], &pages[(round + 1) % 2]);
        write(new, 1);
        let table = tables[(round + 1) % 2];
        check_eq!(update(MmuCommand::NormalPtUpdate, parent, pte(table, 0x67)), Ok(0));
        write(old, POISON);
        if round % 20 == 0 {
            let now = rounds();
            wait("a round of each", || all_moved(&now))?;
        }
    }
    order(REST)?;
    let stale = wrong();
    check_eq!(update(MmuCommand::NormalPtUpdate, parent, pte(tables[0], 0x67)), Ok(0));
    protect(&copy, true)?;
    check_eq!(stale, 0, "reads through a table that was not in force any more");
    Ok(())
}

/// Machine address of the L2 entry that leads to the table of `address`.
fn parent_entry(address: u64) -> Result<u64, Stop> {
    let mut table = memory::root();
    for level in [3u64, 2] {
        let window = Range::new(1)?;
        // SAFETY: a table in force, for reading.
        unsafe { window.map(0, table, Access::Read)? };
        let index = address >> (12 + 9 * level) & 511;
        // SAFETY: inside the window.
        let entry = unsafe { ((window.start() + index * 8) as *const u64).read_volatile() };
        table = Mfn::new(entry >> 12 & 0xff_ffff_ffff);
        window.unmap(0)?;
    }
    Ok(table.address().get() + (address >> 21 & 511) * 8)
}

fn down_and_up_while_the_others_run(_: &mut Domain) -> Verdict {
    let last = VCPUS - 1;
    for _ in 0..20 {
        ORDER.store(STOP, Ordering::SeqCst);
        wait("its end", || {
            call(Hypercall::VcpuOp, [VcpuOp::IsUp.number().into(), last as u64, 0, 0, 0]) == Ok(0)
        })?;
        ORDER.store(COUNT, Ordering::SeqCst);
        let before = ROUNDS[last].load(Ordering::SeqCst);
        check_eq!(call(Hypercall::VcpuOp, [VcpuOp::Up.number().into(), last as u64, 0, 0, 0]), Ok(0));
        wait("its return", || ROUNDS[last].load(Ordering::SeqCst) > before)?;
    }
    order(REST)?;
    Ok(())
}

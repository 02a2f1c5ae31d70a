//! Starting the other processors, one after the other (Intel SDM 3, 9.4; MADT: ACPI 5.2.12).
//!
//! INIT makes a processor wait; a start-up interrupt makes it execute a page below 1 MiB in real mode. The page is copied from
//! `ap_start`, and leads over 32-bit protected mode and the early page tables of boot to [`on_boot_stack`]. All of them would use the
//! one boot stack: a processor takes the *ticket* first, which the boot processor puts there once for each start. One
//! that finds none (it was given up, and wakes late) halts for good.
//!
//! A processor is left out, with a line in the log, if it does not answer in time, or if it lacks a feature that the boot
//! processor has. Its time-stamp counter is compared with the boot processor's (`clocksource::Exchanges`). If it is off by one
//! amount, that is taken into account; if it does not run alike, another counter has to be the clock, and where there is none the
//! processor is left out: so that time never steps back, wherever a vCPU goes.

use super::super::{apic, clock, context, cpu, entry, fpu, percpu};
use super::{CpuMemory, machine};
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use hv::domain::Cpu;
use hv::platform::{CpuId, Platform};
use hv::x86::clocksource::{Exchanges, Skew};
use hv::x86::layout::{self, MAX_CPUS, PAGE_SIZE};
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::PhysFrame;

/// Link address minus load address of the image, as in hypervisor.ld.
const DELTA: u64 = layout::IMAGE - super::IMAGE_MACHINE;

/// How long a processor may take for its first instructions, and for all of its start: a thousand times what it needs.
const PATIENCE_NS: u64 = 2_000_000_000;
/// Time between INIT and the start-up interrupt.
const INIT_NS: u64 = 10_000_000;
/// Time between the two start-up interrupts; old processors need the second.
const AGAIN_NS: u64 = 200_000;
/// Comparisons of two time-stamp counters.
const TSC_ROUNDS: u64 = 64;

global_asm!(
    include_str!("../macros.s"),
    r#"
    .pushsection .rodata.ap_start, "a", @progbits
    .code16
    .globl ap_start
ap_start:
    cli
    cld
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16      /* lgdt cs:[...], with a base of 32 bits */
    .word ap_gdt_pointer - ap_start
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                        /* jmp 0x10:ap_start32, with an offset of 32 bits */
    .long ap_start32 - {delta}
    .word 0x10
    .balign 4
ap_gdt_pointer:
    .word 31
    .long ap_gdt - {delta}
    .globl ap_start_end
ap_start_end:

    .balign 8
ap_gdt:
    .quad 0
    .quad 0x00af9b000000ffff                /* 64-bit code */
    .quad 0x00cf9b000000ffff                /* 32-bit code */
    .quad 0x00cf93000000ffff                /* data */
    .popsection

    .pushsection .boot.text, "ax", @progbits
    .code32
ap_start32:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor ecx, ecx
    xchg [ap_ticket - {delta}], ecx
    test ecx, ecx
    jz 9f
    mov esp, offset boot_stack_top - {delta}
    ENTER_LONG_MODE boot_l4 - {delta}
    push 8
    mov eax, offset ap_long_mode - {delta}
    push eax
    retf
9:  hlt
    jmp 9b

    .code64
ap_long_mode:
    movabs rax, offset ap_high
    jmp rax
ap_high:
    movabs rsp, offset boot_stack_top
    xor eax, eax
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    xor ebp, ebp
    call {start}
    ud2
    .popsection

    .pushsection .bss.ap_ticket, "aw", @nobits
    .balign 4
    .globl ap_ticket
ap_ticket: .skip 4
    .popsection
    "#,
    delta = const DELTA,
    start = sym on_boot_stack,
);

unsafe extern "C" {
    static ap_start: u8;
    static ap_start_end: u8;
    static ap_ticket: AtomicU32;
}

/// Hardware ids of the processors that are up, by number.
static APIC_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(u32::MAX) }; MAX_CPUS];
/// How many are up.
static ONLINE: AtomicU32 = AtomicU32::new(1);
/// Number of the one that is being started.
static STARTING: AtomicU32 = AtomicU32::new(0);
/// What it says: see below.
static ANSWER: AtomicU32 = AtomicU32::new(0);
/// Everything is there that a processor needs to run guests.
static GO: AtomicBool = AtomicBool::new(false);

/// It is under way.
const RUNNING: u32 = 1;
/// It is set up and waits for guests.
const READY: u32 = 2;
/// It has other features than the boot processor.
const DIFFERENT: u32 = 3;

/// A round of comparing counters: odd when the boot processor asks, even when the other has answered.
static ROUND: AtomicU64 = AtomicU64::new(0);
static THEIR_TSC: AtomicU64 = AtomicU64::new(0);

/// How many processors are up, numbered from 0.
pub fn online() -> u32 {
    ONLINE.load(Ordering::Relaxed)
}

/// Hardware id of a processor that is up.
pub fn apic_id(cpu: CpuId) -> Option<u32> {
    if cpu.0 >= online() {
        return None;
    }
    APIC_IDS.get(cpu.0 as usize).map(|id| id.load(Ordering::Relaxed))
}

/// The number that firmware's tables give to the processor with this APIC id.
pub fn acpi_id(apic_id: u32) -> Option<u32> {
    machine().acpi.cpus.iter().find(|cpu| cpu.apic_id == apic_id).map(|cpu| cpu.acpi_id)
}

/// Frame of RAM below 640 KiB for the first instructions. Boot keeps the first MiB out of the free memory.
fn low_page() -> Option<u64> {
    let taken = |frame: u64| {
        machine().module.is_some_and(|module| {
            (module.start >> 12..(module.start + module.len).div_ceil(PAGE_SIZE)).contains(&frame)
        })
    };
    (1..0xa0).find(|frame| machine().is_ram(*frame) && !taken(*frame))
}

/// Starts the other processors, until `limit` are up. Once, when time is known and before policy asks how many there are.
/// Whether the time-stamp counters of all that are up run alike; they do if `must_agree`.
pub fn start_others(limit: u32, must_agree: bool) -> bool {
    let mut agree = true;
    let own = apic::id();
    APIC_IDS[0].store(own, Ordering::Relaxed);
    let others = machine().acpi.cpus.iter().map(|cpu| cpu.apic_id).filter(|id| *id != own);
    if limit <= 1 || others.clone().next().is_none() {
        return agree;
    }
    let Some(page) = low_page() else {
        log::warn!("no RAM below 640 KiB: the other processors cannot be started");
        return agree;
    };
    let code = &raw const ap_start;
    // SAFETY: the assembly above puts both symbols around its instructions.
    let len = unsafe { (&raw const ap_start_end).offset_from_unsigned(code) };
    // SAFETY: a frame of RAM that nobody uses, shown by the direct map, and longer than the code.
    unsafe { core::ptr::copy_nonoverlapping(code, (layout::DIRECT_MAP + page * PAGE_SIZE) as *mut u8, len) };
    for id in others {
        let number = online();
        if number >= limit || number as usize >= machine().cpus.len() {
            log::info!("processor with APIC id {id} is not used");
            continue;
        }
        match start(number, id, page, must_agree) {
            Ok(skew) => {
                match skew {
                    Skew::None => {}
                    Skew::Offset { ticks, within } => {
                        let ticks = ticks as i64;
                        log::warn!(
                            "CPU {number}: its TSC is {ticks} ticks ahead of the first one's, within {within}"
                        );
                    }
                    Skew::Unsteady => {
                        log::warn!("CPU {number}: its TSC does not run as the first one's does");
                        agree = false;
                    }
                }
                APIC_IDS[number as usize].store(id, Ordering::Relaxed);
                ONLINE.store(number + 1, Ordering::Relaxed);
            }
            Err(Failed::Silent) => log::warn!("processor with APIC id {id} does not answer: it is left out"),
            Err(Failed::Different) => {
                log::warn!("processor with APIC id {id} lacks features of the first: it is left out");
            }
            Err(Failed::OutOfTime) => {
                log::warn!(
                    "the TSC of the processor with APIC id {id} does not run as the first one's, and is the only clock: it is left out"
                );
            }
            Err(Failed::Stuck) => {
                log::warn!("processor with APIC id {id} got stuck: no more are started");
                break;
            }
        }
    }
    log::info!("{} processors", online());
    agree
}

enum Failed {
    /// It never began. It is in INIT.
    Silent,
    /// It began and did not finish: it may still use what it was given.
    Stuck,
    Different,
    /// Its counter does not run as the boot processor's.
    OutOfTime,
}

/// Waits until `done`, at most `ns` nanoseconds; whether it is.
fn wait(ns: u64, done: impl Fn() -> bool) -> bool {
    let end = clock::now_ns() + ns;
    while !done() {
        if clock::now_ns() >= end {
            return done();
        }
        core::hint::spin_loop();
    }
    true
}

fn start(number: u32, id: u32, page: u64, must_agree: bool) -> Result<Skew, Failed> {
    // SAFETY: a word of the image that is accessed as an atomic only.
    let ticket = unsafe { &ap_ticket };
    STARTING.store(number, Ordering::Relaxed);
    ANSWER.store(0, Ordering::Relaxed);
    ticket.store(1, Ordering::SeqCst);
    apic::send_init(id);
    wait(INIT_NS, || false);
    apic::send_startup(id, page as u8);
    if !wait(AGAIN_NS, || ticket.load(Ordering::SeqCst) == 0) {
        apic::send_startup(id, page as u8);
    }
    if !wait(PATIENCE_NS, || ticket.load(Ordering::SeqCst) == 0) && ticket.swap(0, Ordering::SeqCst) != 0 {
        apic::send_init(id);
        return Err(Failed::Silent);
    }
    if !wait(PATIENCE_NS, || ANSWER.load(Ordering::SeqCst) >= RUNNING) {
        return Err(Failed::Stuck);
    }
    if ANSWER.load(Ordering::SeqCst) == DIFFERENT {
        return Err(Failed::Different);
    }
    let skew = compare_counters().ok_or(Failed::Stuck)?;
    if skew == Skew::Unsteady && must_agree {
        apic::send_init(id);
        return Err(Failed::OutOfTime);
    }
    if let Skew::Offset { ticks, .. } = skew {
        clock::set_offset(CpuId(number), ticks);
    }
    if wait(PATIENCE_NS, || ANSWER.load(Ordering::SeqCst) == READY) { Ok(skew) } else { Err(Failed::Stuck) }
}

/// Asks the other processor for its counter many times. `None` if it stopped answering.
fn compare_counters() -> Option<Skew> {
    let first = ROUND.load(Ordering::SeqCst);
    let mut exchanges = Exchanges::new();
    for round in 0..TSC_ROUNDS {
        let asked = first + 2 * round + 1;
        let before = clock::tsc_ordered();
        ROUND.store(asked, Ordering::SeqCst);
        if !wait(PATIENCE_NS, || ROUND.load(Ordering::SeqCst) == asked + 1) {
            return None;
        }
        let theirs = THEIR_TSC.load(Ordering::SeqCst);
        let after = clock::tsc_ordered();
        exchanges.add(before, theirs, after);
    }
    Some(exchanges.skew())
}

/// The other side of [`compare_counters`].
fn tell_counter() {
    let first = ROUND.load(Ordering::SeqCst);
    for round in 0..TSC_ROUNDS {
        let asked = first + 2 * round + 1;
        while ROUND.load(Ordering::SeqCst) != asked {
            core::hint::spin_loop();
        }
        THEIR_TSC.store(clock::tsc_ordered(), Ordering::SeqCst);
        ROUND.store(asked + 1, Ordering::SeqCst);
    }
}

/// Lets all processors run guests.
pub fn go() {
    GO.store(true, Ordering::SeqCst);
    for cpu in (1..online()).map(CpuId) {
        crate::hypervisor().platform.kick(cpu);
    }
}

/// Called by the assembly on the boot stack, with the early page tables.
extern "C" fn on_boot_stack() -> ! {
    let number = STARTING.load(Ordering::Relaxed) as usize;
    let root = PhysFrame::containing_address(PhysAddr::new(machine().root));
    // SAFETY: the hypervisor's tables show the image, this stack (part of the image's data), and the direct map.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
    cpu::set_control_registers(&machine().features);
    // SAFETY: the block was mapped by `make_cpu`; `on_cpu_stack` never returns to this stack.
    unsafe {
        core::arch::asm!("mov rsp, {stack}", "xor ebp, ebp", "call {next}", "ud2",
            stack = in(reg) percpu::block(number) + percpu::INFO_OFFSET, next = sym on_cpu_stack, in("rdi") number,
            options(noreturn))
    }
}

/// On the processor's own stack.
extern "C" fn on_cpu_stack(number: usize) -> ! {
    let memory: &CpuMemory = &machine().cpus[number];
    // SAFETY: the stack pointer lies in this CPU's own block, whose memory `make_cpu` mapped and zeroed for it.
    unsafe { super::prepare_info(memory) };
    apic::init_secondary();
    context::init_syscall();
    fpu::init();
    // SAFETY: this CPU's data, of which no reference exists.
    unsafe { (*percpu::this()).apic_id = apic::id() };
    if cpu::Features::detect() != machine().features {
        ANSWER.store(DIFFERENT, Ordering::SeqCst);
        super::super::epitaph::stop();
    }
    ANSWER.store(RUNNING, Ordering::SeqCst);
    tell_counter();
    ANSWER.store(READY, Ordering::SeqCst);
    while !GO.load(Ordering::SeqCst) {
        super::super::machine::Machine.wait_for_interrupt();
    }
    // SAFETY: this CPU's data, of which no reference exists.
    unsafe { (*percpu::this()).tsc_offset = clock::offset_of(CpuId(number as u32)) };
    entry::run_guests(Cpu::new(CpuId(number as u32)))
}

//! Last words: why the host stopped, with registers, control registers and a backtrace by frame pointers.
//!
//! Nothing here takes a lock or allocates: the host may have died holding any of them.

use super::boot::smp;
use super::entry::Frame;
use super::{apic, clock, percpu, serial};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use hv::platform::CpuId;
use hv::watchdog::Stuck;
use hv::x86::layout;
use x86_64::instructions::port::Port;
use x86_64::registers::control::{Cr0, Cr2, Cr3, Cr4};

/// Exit code told to QEMU's isa-debug-exit device.
const EXIT_PANIC: u32 = 0x20;
/// Exit code when what we were given cannot be booted.
const EXIT_REFUSED: u32 = 0x21;
/// How long a CPU that is asked to report itself may take: a thousand times what its lines need on the wire.
const SPEAK_NS: u64 = 5_000_000_000;
/// Frames of a backtrace.
const DEPTH: usize = 24;

/// Number of the CPU that reports, plus one; 0 while none does.
static DYING: AtomicU32 = AtomicU32::new(0);
/// Number of the CPU that is to report itself at its next NMI, plus one; it puts 0 back when it has.
static SPEAK: AtomicU32 = AtomicU32::new(0);
/// The other CPUs are to stop where they are.
static STOP: AtomicBool = AtomicBool::new(false);
static DEBUG_EXIT_PORT: AtomicU16 = AtomicU16::new(0);

/// Sets the port of QEMU's isa-debug-exit device, as the command line names it.
pub fn set_debug_exit(port: u16) {
    DEBUG_EXIT_PORT.store(port, Ordering::Relaxed);
}

/// Writes an exit code to the debug-exit device, if there is one.
pub fn debug_exit(code: u32) {
    let port = DEBUG_EXIT_PORT.load(Ordering::Relaxed);
    if port != 0 {
        // SAFETY: the operator named this port on the command line as that of the exit device.
        unsafe { Port::<u32>::new(port).write(code) };
    }
}

struct Serial;
impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        serial::write_unlocked(text.as_bytes());
        Ok(())
    }
}

/// Stops this CPU for good.
pub fn stop() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// Stops all other CPUs, wherever they are.
pub fn stop_others() {
    STOP.store(true, Ordering::SeqCst);
    apic::send_nmi_to_others();
}

/// Whether a non-maskable interrupt means that this CPU is to stop.
pub fn is_stopping() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// The others are stopped first: nobody goes on with a broken hypervisor.
fn begin() {
    claim();
    stop_others();
}

/// Only one report: a fault while reporting stops at once, another CPU stops silently.
fn claim() {
    let me = cpu() as u32 + 1;
    match DYING.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(other) if other != me => stop(),
        Err(_) => {
            serial::write_unlocked(b"\n(XL) fault while reporting\n");
            debug_exit(EXIT_PANIC);
            stop();
        }
    }
}

/// The guest in which this CPU was when it entered ring 0, if any.
fn guest() {
    // SAFETY: null or this CPU's data, which lives for ever.
    if let Some(info) = unsafe { percpu::this().as_ref() } {
        // SAFETY: null, or the state of the vCPU that runs here, which this CPU owns.
        if let Some(state) = unsafe { info.current.as_ref() } {
            let r = &state.regs;
            let _ = writeln!(
                Serial,
                "(XL) CPU {} entered from a guest, vector {:#x}: cs:rip {:04x}:{:016x} ss:rsp {:04x}:{:016x} rax {:016x}",
                info.number, r.vector, r.cs, r.rip, r.ss, r.rsp, r.rax
            );
        }
    }
}

fn end() -> ! {
    guest();
    let _ = writeln!(Serial, "(XL) ****************************************");
    let _ = writeln!(Serial, "(XL) The host is stopped.");
    debug_exit(EXIT_PANIC);
    stop()
}

/// Says why nothing can be started, and stops. This is for mistakes of the operator (no dom0, or one that cannot run): where
/// in our code they were noticed would only hide what to mend.
pub fn refuse(why: fmt::Arguments<'_>) -> ! {
    let _ = writeln!(Serial, "(XL) error: {why}");
    let _ = writeln!(Serial, "(XL) The host is stopped.");
    debug_exit(EXIT_REFUSED);
    stop()
}

/// Reports a Rust panic.
pub fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    begin();
    let _ = writeln!(Serial, "\n(XL) ****************************************");
    match info.location() {
        Some(at) => {
            let _ = writeln!(
                Serial,
                "(XL) Panic on CPU {} at {}:{}: {}",
                cpu(),
                at.file(),
                at.line(),
                info.message()
            );
        }
        None => {
            let _ = writeln!(Serial, "(XL) Panic on CPU {}: {}", cpu(), info.message());
        }
    }
    backtrace(None, frame_pointer());
    end()
}

#[inline(always)]
fn frame_pointer() -> u64 {
    let rbp: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags)) };
    rbp
}

/// Reports processors that are stuck, each in its own words if a non-maskable interrupt can make it speak.
pub fn stuck(who: Stuck) -> ! {
    // The others go on for the moment: one of them may hold what a stuck one waits for, and says so itself.
    claim();
    let _ = writeln!(Serial, "\n(XL) ****************************************");
    for cpu in who.silent.iter() {
        let _ = writeln!(
            Serial,
            "(XL) Watchdog: CPU {} is stuck in ring 0, without a sign of life for {} s",
            cpu.0, who.seconds
        );
        ask(cpu);
    }
    for cpu in who.waiting.iter() {
        let _ =
            writeln!(Serial, "(XL) Watchdog: CPU {} has waited for another one for {} s", cpu.0, who.seconds);
        ask(cpu);
    }
    stop_others();
    end()
}

/// Lets a CPU report itself.
fn ask(who: CpuId) {
    if who.0 as usize == cpu() {
        return backtrace(None, frame_pointer());
    }
    let Some(apic_id) = smp::apic_id(who) else { return };
    SPEAK.store(who.0 + 1, Ordering::SeqCst);
    apic::send_nmi(apic_id);
    let end = clock::now_ns() + SPEAK_NS;
    while SPEAK.load(Ordering::SeqCst) != 0 {
        if clock::now_ns() >= end {
            let _ = writeln!(Serial, "(XL) CPU {} does not take a non-maskable interrupt either", who.0);
            return;
        }
        core::hint::spin_loop();
    }
}

/// At a non-maskable interrupt: if this CPU is asked to report itself, it does, and stops.
pub fn speak_if_asked(frame: &Frame) {
    if SPEAK.load(Ordering::SeqCst) != cpu() as u32 + 1 {
        return;
    }
    registers(2, frame);
    if frame.cs & 3 == 0 {
        stack(frame.rsp);
        backtrace(Some(frame.rip), frame.rbp);
        guest();
    } else {
        let _ = writeln!(Serial, "(XL) It runs a guest");
    }
    SPEAK.store(0, Ordering::SeqCst);
    stop()
}

/// Reports an exception of ring 0 that nothing mends.
pub fn exception(vector: u64, frame: &Frame) -> ! {
    begin();
    let _ = writeln!(Serial, "\n(XL) ****************************************");
    let _ = writeln!(
        Serial,
        "(XL) Exception {vector} ({}) in ring {} on CPU {}, error code {:#x}",
        name(vector),
        frame.cs & 3,
        cpu(),
        frame.error_code
    );
    registers(vector, frame);
    if matches!(vector, 8 | 14) && layout::cpu_block::is_guard(Cr2::read_raw()) {
        let _ = writeln!(Serial, "(XL) cr2 is in a guard page: a stack of ring 0 has overflowed");
    }
    stack(frame.rsp);
    backtrace(Some(frame.rip), frame.rbp);
    end()
}

fn registers(vector: u64, f: &Frame) {
    let _ = writeln!(Serial, "(XL) cs:rip {:04x}:{:016x}  rflags {:016x}", f.cs, f.rip, f.rflags);
    let _ = writeln!(Serial, "(XL) ss:rsp {:04x}:{:016x}", f.ss, f.rsp);
    for row in [
        [("rax", f.rax), ("rbx", f.rbx), ("rcx", f.rcx), ("rdx", f.rdx)],
        [("rsi", f.rsi), ("rdi", f.rdi), ("rbp", f.rbp), ("r8 ", f.r8)],
        [("r9 ", f.r9), ("r10", f.r10), ("r11", f.r11), ("r12", f.r12)],
        [("r13", f.r13), ("r14", f.r14), ("r15", f.r15), ("cr2", Cr2::read_raw())],
        [
            ("cr0", Cr0::read_raw()),
            ("cr3", Cr3::read().0.start_address().as_u64()),
            ("cr4", Cr4::read_raw()),
            ("vec", vector),
        ],
    ] {
        let _ = Serial.write_str("(XL)");
        for (name, value) in row {
            let _ = write!(Serial, " {name} {value:016x}");
        }
        let _ = Serial.write_str("\n");
    }
}

/// The words at the top of the stack, if that is one of ours.
fn stack(rsp: u64) {
    if rsp >> 32 != layout::CPU_BLOCKS >> 32 || !rsp.is_multiple_of(8) || layout::cpu_block::is_guard(rsp) {
        return;
    }
    let _ = Serial.write_str("(XL) Stack:");
    // Up to the end of the page at most: what follows may be a guard page.
    for at in (rsp..(rsp | 0xfff)).step_by(8).take(16) {
        // SAFETY: a mapped page of a CPU block, which only this CPU uses.
        let _ = write!(Serial, " {:016x}", unsafe { *(at as *const u64) });
    }
    let _ = Serial.write_str("\n");
}

/// Call sites from `rip` on, following frame pointers as long as they go up inside one stack of ring 0.
fn backtrace(rip: Option<u64>, mut rbp: u64) {
    let _ = writeln!(Serial, "(XL) Call trace:");
    if let Some(rip) = rip {
        site(rip);
    }
    for _ in 0..DEPTH {
        let on_cpu_stack = rbp >> 32 == layout::CPU_BLOCKS >> 32;
        let in_image = (layout::IMAGE..layout::IMAGE + 0x200_0000).contains(&rbp);
        if !(on_cpu_stack || in_image) || !rbp.is_multiple_of(8) {
            break;
        }
        // SAFETY: a frame pointer on a stack of ring 0 (or the boot stack in the image), which are mapped; at worst this is
        // a guard page, and the fault ends the report.
        let [next, site_rip] = unsafe { *(rbp as *const [u64; 2]) };
        if site_rip == 0 {
            break;
        }
        site(site_rip);
        if next <= rbp {
            break;
        }
        rbp = next;
    }
}

unsafe extern "C" {
    static __symbols_start: u8;
    static __symbols_end: u8;
}

fn site(rip: u64) {
    let (start, end) = (&raw const __symbols_start, &raw const __symbols_end);
    // SAFETY: the linker script puts both symbols around one block of read-only data.
    let blob = unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    let _ = match hv::symbols::resolve(blob, layout::IMAGE, rip) {
        Some((name, offset)) => writeln!(Serial, "(XL)   [{rip:016x}] {name}+{offset:#x}"),
        None => writeln!(Serial, "(XL)   [{rip:016x}]"),
    };
}

fn cpu() -> usize {
    let info = percpu::this();
    // SAFETY: null or this CPU's data, which lives for ever.
    unsafe { info.as_ref() }.map_or(0, |info| info.number)
}

fn name(vector: u64) -> &'static str {
    const NAMES: [&str; 22] = [
        "divide error",
        "debug",
        "NMI",
        "breakpoint",
        "overflow",
        "bound range",
        "invalid opcode",
        "device not available",
        "double fault",
        "coprocessor overrun",
        "invalid TSS",
        "segment not present",
        "stack fault",
        "general protection",
        "page fault",
        "reserved",
        "x87 error",
        "alignment check",
        "machine check",
        "SIMD error",
        "virtualization",
        "control protection",
    ];
    usize::try_from(vector).ok().and_then(|v| NAMES.get(v)).copied().unwrap_or("interrupt")
}

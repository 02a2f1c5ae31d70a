//! The local APIC: end of interrupt, one-shot timer, interrupts between processors. Registers as in Intel's SDM, volume 3,
//! chapter 11; in x2APIC mode the same registers are MSRs.
//!
//! The mode is the one firmware left: xAPIC on nearly every machine with fewer than 255 processors.

use super::{msr, paging};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use hv::x86::apic_timer::{Timer, TimerRegisters};
use hv::x86::layout;
use x86_64::registers::model_specific::Msr;

/// Timer of this CPU.
pub const VECTOR_TIMER: u8 = 0xfa;
/// Another CPU wants this one to look at its work.
pub const VECTOR_KICK: u8 = 0xfb;
/// Another CPU wants this one to drop translations.
pub const VECTOR_FLUSH: u8 = 0xfc;
/// The APIC withdrew an interrupt; no end of interrupt.
pub const VECTOR_SPURIOUS: u8 = 0xff;

const ID: u32 = 0x20;
const TASK_PRIORITY: u32 = 0x80;
const EOI: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const REQUESTED: u32 = 0x200;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;

const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const LEVEL_ASSERT: u32 = 1 << 14;
const ALL_OTHERS: u32 = 3 << 18;

const MASKED: u32 = 1 << 16;
/// Timer input divided by 1, for calibration; and by 16, else: at 1 GHz it counts a minute instead of four seconds, and what an idle
/// machine waits for is further off than those.
const DIVIDE_BY_1: u32 = 0xb;
const DIVIDE_BY_16: u32 = 3;
/// What the timer's input is divided by when it is used.
pub const TIMER_DIVISOR: u64 = 16;

/// The boot processor's APIC is on.
static READY: AtomicBool = AtomicBool::new(false);
static X2APIC: AtomicBool = AtomicBool::new(false);
/// How the timers are used: by deadline or by count, and ticks per second of what they count.
static BY_DEADLINE: AtomicBool = AtomicBool::new(false);
static TIMER_HZ: AtomicU64 = AtomicU64::new(1_000_000_000);

/// Where the registers are mapped (xAPIC).
const WINDOW: u64 = layout::DEVICES;

fn read(register: u32) -> u32 {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: in x2APIC mode each register read here is an MSR.
        return unsafe { Msr::new(0x800 + (register >> 4)).read() } as u32;
    }
    // SAFETY: the page is mapped uncached by `map`, and reads of APIC registers used here have no effect.
    unsafe { ((WINDOW + u64::from(register)) as *const u32).read_volatile() }
}

fn write(register: u32, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: as for `read`; values are legal for their registers.
        return unsafe { Msr::new(0x800 + (register >> 4)).write(u64::from(value)) };
    }
    // SAFETY: the page is mapped uncached by `map`; APIC registers touch no memory.
    unsafe { ((WINDOW + u64::from(register)) as *mut u32).write_volatile(value) }
}

/// Maps the registers, unless they are MSRs. Once, while booting.
pub fn map(space: &mut paging::Space<'_>, machine: u64) {
    let base = msr::read(msr::APIC_BASE);
    X2APIC.store(base & 1 << 10 != 0, Ordering::Relaxed);
    if base & 1 << 10 == 0 {
        space.map(WINDOW, machine & !0xfff, 4096, paging::DEVICE);
    }
}

/// Turns this CPU's APIC on, all local sources masked.
pub fn init() {
    write(TASK_PRIORITY, 0);
    for source in [LVT_TIMER, LVT_LINT0, LVT_ERROR] {
        write(source, MASKED | u32::from(VECTOR_TIMER));
    }
    // LINT1 carries NMI on the boot processor.
    write(LVT_LINT1, 4 << 8);
    write(DIVIDE, DIVIDE_BY_1);
    write(SPURIOUS, 1 << 8 | u32::from(VECTOR_SPURIOUS));
    READY.store(true, Ordering::Relaxed);
}

/// As [`init`], on a processor that was started, and its timer ready.
pub fn init_secondary() {
    let base = msr::read(msr::APIC_BASE);
    if X2APIC.load(Ordering::Relaxed) && base & 1 << 10 == 0 {
        // SAFETY: from xAPIC mode, in which INIT leaves it, to the one the boot processor is in.
        unsafe { msr::write(msr::APIC_BASE, base | 1 << 11 | 1 << 10) };
    }
    init();
    // The one NMI line leads to the boot processor.
    write(LVT_LINT1, MASKED | 4 << 8);
    write(DIVIDE, DIVIDE_BY_16);
    timer().start(&mut Registers, VECTOR_TIMER);
}

/// Hardware id of this CPU's APIC.
pub fn id() -> u32 {
    let id = read(ID);
    if X2APIC.load(Ordering::Relaxed) { id } else { id >> 24 }
}

/// Ends the interrupt in service.
pub fn end_of_interrupt() {
    write(EOI, 0);
}

/// Lets the timer count down from its largest value without an interrupt, for calibration.
pub fn start_counting() {
    write(LVT_TIMER, MASKED);
    write(INITIAL_COUNT, u32::MAX);
}

/// Ticks since [`start_counting`].
pub fn counted() -> u32 {
    u32::MAX - read(CURRENT_COUNT)
}

/// The registers of this CPU's timer.
struct Registers;

impl TimerRegisters for Registers {
    fn write_entry(&mut self, value: u32) {
        write(LVT_TIMER, value);
    }
    fn write_count(&mut self, value: u32) {
        write(INITIAL_COUNT, value);
    }
    fn write_deadline(&mut self, value: u64) {
        // SAFETY: only with a timer by deadline, which only processors with this register get; any value is legal.
        unsafe { msr::write(msr::TSC_DEADLINE, value) };
    }
    fn fence(&mut self) {
        // SAFETY: fences have no effect on memory.
        unsafe { core::arch::asm!("mfence", options(nostack, preserves_flags)) };
    }
    fn tsc(&self) -> u64 {
        super::clock::tsc()
    }
}

fn timer() -> Timer {
    let hz = TIMER_HZ.load(Ordering::Relaxed);
    if BY_DEADLINE.load(Ordering::Relaxed) { Timer::Deadline { tsc_hz: hz } } else { Timer::Count { hz } }
}

/// Uses all CPUs' timers in this way from now on, and readies this one's. Once, while booting.
pub fn use_timer(timer: Timer) {
    let (by_deadline, hz) = match timer {
        Timer::Count { hz } => (false, hz),
        Timer::Deadline { tsc_hz } => (true, tsc_hz),
    };
    BY_DEADLINE.store(by_deadline, Ordering::Relaxed);
    TIMER_HZ.store(hz.max(1), Ordering::Relaxed);
    write(DIVIDE, DIVIDE_BY_16);
    self::timer().start(&mut Registers, VECTOR_TIMER);
}

/// Fires the timer in `ns` nanoseconds from now, or sooner when that is further off than it can count; None stops it.
pub fn set_timer(ns: Option<u64>) {
    timer().set(&mut Registers, ns);
}

/// Words of 32 vectors that may be in use, a bit each: our own at the top, pins from 0x40 to 0x7f.
static WORDS_IN_USE: AtomicU32 = AtomicU32::new(1 << 7 | 1 << 3 | 1 << 2);

/// Whether an interrupt waits that this CPU has not taken: the timer, a kick, or a device.
pub fn is_pending() -> bool {
    let words = WORDS_IN_USE.load(Ordering::Relaxed);
    // 16 bytes apart.
    (2u32..8).rev().filter(|word| words >> word & 1 != 0).any(|word| read(REQUESTED + word * 0x10) != 0)
}

/// A device may use this vector from now on.
pub fn watch(vector: u8) {
    let bit = 1 << (vector / 32);
    if WORDS_IN_USE.load(Ordering::Relaxed) & bit == 0 {
        WORDS_IN_USE.fetch_or(bit, Ordering::Relaxed);
    }
}

/// An APIC id as devices and I/O APICs name it, in 8 bits of which all set are everybody. `None` for one that is too large.
pub fn device_destination(apic_id: u32) -> Option<u8> {
    u8::try_from(apic_id).ok().filter(|id| *id != u8::MAX)
}

/// Sends an interrupt to the processor with this APIC id.
pub fn send(apic_id: u32, vector: u8) {
    command(apic_id, u32::from(vector));
}

/// Makes a processor wait for [`send_startup`].
pub fn send_init(apic_id: u32) {
    command(apic_id, LEVEL_ASSERT | INIT);
}

/// Makes a processor that waits execute page `page` of memory in real mode.
pub fn send_startup(apic_id: u32, page: u8) {
    command(apic_id, LEVEL_ASSERT | STARTUP | u32::from(page));
}

/// Interrupts the processor with this APIC id, whatever it does.
pub fn send_nmi(apic_id: u32) {
    command(apic_id, LEVEL_ASSERT | NMI);
}

/// Interrupts all other processors, whatever they do. Nothing if this one's APIC is not on yet.
pub fn send_nmi_to_others() {
    if READY.load(Ordering::Relaxed) {
        command(0, ALL_OTHERS | LEVEL_ASSERT | NMI);
    }
}

fn command(apic_id: u32, what: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // WRMSR to the APIC does not wait for stores before it (SDM 3, 11.12.3), which are what the interrupt is about.
        // SAFETY: fences have no effect on memory.
        unsafe { core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags)) };
        // SAFETY: commands of this module: an interrupt at a vector that has an entry, NMI, or the start of a processor.
        return unsafe { Msr::new(0x830).write(u64::from(apic_id) << 32 | u64::from(what)) };
    }
    while read(COMMAND) & 1 << 12 != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND, what);
}

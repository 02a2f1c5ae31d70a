//! Measuring: ticks of the time-stamp counter per operation, without what the guest itself spends around it.
//!
//! Under `-icount shift=0` the counter runs at 1 GHz and a tick is an instruction, so that what is measured is exact and the same in
//! each run; elsewhere it is what the machine makes of it.

use alloc::vec::Vec;
use core::arch::global_asm;
use guest_sdk::testkit::Stop;
use guest_sdk::{hypercall, println};

/// How often each measurement is made; its median counts.
const REPEATS: usize = 7;

/// A hypercall: its number and five arguments.
pub type Call = [u64; 6];

// r12: a list of calls, six words each; r13: its end; rbx: rounds. The first executes each call in each round, the second leaves out
// the SYSCALL alone: the difference is what is between SYSCALL and the instruction behind it, and the SYSCALL.
macro_rules! rounds {
    ($name:literal, $syscall:literal) => {
        global_asm!(
            concat!(".pushsection .text.", $name, ", \"ax\""),
            concat!($name, ":"),
            "push rbx",
            "push r12",
            "push r13",
            "push r14",
            "mov r14, rdi",
            "mov r13, rsi",
            "mov rbx, rdx",
            "2:",
            "mov r12, r14",
            "3:",
            "mov rax, [r12]",
            "mov rdi, [r12 + 8]",
            "mov rsi, [r12 + 16]",
            "mov rdx, [r12 + 24]",
            "mov r10, [r12 + 32]",
            "mov r8, [r12 + 40]",
            $syscall,
            "add r12, 48",
            "cmp r12, r13",
            "jne 3b",
            "dec rbx",
            "jnz 2b",
            "pop r14",
            "pop r13",
            "pop r12",
            "pop rbx",
            "ret",
            ".popsection",
        );
    };
}

rounds!("__rounds", "syscall");
rounds!("__idle_rounds", "");

unsafe extern "C" {
    /// Makes the calls of a list, so many times.
    fn __rounds(first: *const Call, end: *const Call, rounds: u64);
    /// The same without the calls.
    fn __idle_rounds(first: *const Call, end: *const Call, rounds: u64);
}

/// The time-stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: every processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The median of several measurements.
fn median(mut measure: impl FnMut() -> u64) -> u64 {
    let mut all: Vec<u64> = (0..REPEATS).map(|_| measure()).collect();
    all.sort_unstable();
    all.get(REPEATS / 2).copied().unwrap_or(0)
}

fn time(work: impl FnOnce()) -> u64 {
    let start = ticks();
    work();
    ticks() - start
}

/// Prints a row: `ticks` for `count` operations, in hundredths of a tick each.
pub fn row(name: &str, ticks: u64, count: u64) {
    let hundredths = (ticks * 100 + count / 2) / count;
    println!("bench: {name} = {}.{:02}", hundredths / 100, hundredths % 100);
}

/// Measures hypercalls with constant arguments, made one after the other, `rounds` times; they are `operations` operations together.
///
/// # Errors
/// Says which was refused.
pub fn calls(name: &str, calls: &[Call], rounds: u64, operations: u64) -> Result<(), Stop> {
    for [number, arguments @ ..] in calls {
        // SAFETY: the caller of this function answers for its calls, which take nothing from Rust.
        let answer = unsafe { hypercall::raw(*number, *arguments) }.cast_signed();
        if answer < 0 && *number != NOBODYS {
            return Err(Stop::Fail(alloc::format!("{name}: hypercall {number} answers {answer}")));
        }
    }
    let ends = calls.as_ptr_range();
    // SAFETY: as above; the list lives through it.
    let with = median(|| time(|| unsafe { __rounds(ends.start, ends.end, rounds) }));
    // SAFETY: it reads the list.
    let without = median(|| time(|| unsafe { __idle_rounds(ends.start, ends.end, rounds) }));
    row(name, with.saturating_sub(without), rounds * operations);
    Ok(())
}

/// A number that no hypercall has.
pub const NOBODYS: u64 = 63;

/// Measures work that is no list of calls, done `rounds` times with `count` operations each. What the guest itself executes in it
/// counts.
///
/// # Errors
/// The work's.
pub fn work(
    name: &str,
    rounds: u64,
    count: u64,
    mut work: impl FnMut() -> Result<(), Stop>,
) -> Result<(), Stop> {
    let mut outcome = work();
    let ticks = median(|| {
        time(|| {
            for _ in 0..rounds {
                if outcome.is_ok() {
                    outcome = work();
                }
            }
        })
    });
    outcome?;
    row(name, ticks, rounds * count);
    Ok(())
}

/// Measures a loop of assembly, told how often to go round in rcx; `without` is the same loop without what is measured.
pub fn rounds(name: &str, count: u64, with: unsafe extern "C" fn(u64), without: unsafe extern "C" fn(u64)) {
    // SAFETY: the caller's loops, which keep the calling convention.
    let with = median(|| time(|| unsafe { with(count) }));
    // SAFETY: as above.
    let without = median(|| time(|| unsafe { without(count) }));
    row(name, with.saturating_sub(without), count);
}

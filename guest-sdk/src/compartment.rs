//! Work that may panic without ending the domain (design record 0066).
//!
//! Images abort on a panic: nothing unwinds. [`run`] does its work on a stack of its own. When it panics, the panic handler goes
//! back to the stack that [`run`] was called on, and the work never goes on: to the rest of the program it is a thread that stands
//! still for ever, with all that it owns. So nothing that it was in the middle of changing is seen by anybody:
//!
//! - The work is `'static`: it borrows nothing from its caller. What it is given to work on moves into it, and comes back with its
//!   result, or not at all.
//! - What it shares with others is behind locks, as always. A lock that it held would never be free again: the caller says by
//!   `intact` which locks those are, and when one of them is held, or one of this library's own, the panic ends the domain after all.
//! - Its stack is not used again, nor is anything that it owned: memory, mappings, ports. What has to come back is for who gave it
//!   to know ([`Lease`](crate::grants::Lease)).
//!
//! One compartment is at work at a time; what is run inside of it, or while another vCPU has one, is run as it is.

use alloc::string::{String, ToString};
use core::arch::naked_asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use spin::Mutex;

/// Bytes of a compartment's stack, without the page below it that is nobody's.
pub const STACK_BYTES: usize = 64 * 1024;
const PAGE: usize = 4096;

/// Why work did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    /// What it said, and where.
    pub message: String,
}

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What the panic handler needs of the compartment at work.
struct Current {
    /// The stack that [`run`] was called on.
    outer: UnsafeCell<u64>,
    /// Whether nothing shared is held.
    intact: UnsafeCell<fn() -> bool>,
    message: UnsafeCell<Option<String>>,
    /// Bounds of its stack; 0 while there is none at work.
    low: AtomicU64,
    high: AtomicU64,
}

// SAFETY: the cells belong to who has set BUSY, and to the panic handler that runs on the stack between the bounds: the same vCPU.
unsafe impl Sync for Current {}

static CURRENT: Current = Current {
    outer: UnsafeCell::new(0),
    intact: UnsafeCell::new(never),
    message: UnsafeCell::new(None),
    low: AtomicU64::new(0),
    high: AtomicU64::new(0),
};
static BUSY: AtomicBool = AtomicBool::new(false);
/// A stack that is used again and again, as long as nobody panics on it.
static STACK: Mutex<Option<Stack>> = Mutex::new(None);
static ABANDONED: AtomicU64 = AtomicU64::new(0);

fn never() -> bool {
    false
}

/// Work that panicked, since the domain started. Each keeps its stack and what else it had.
pub fn abandoned() -> u64 {
    ABANDONED.load(Ordering::Relaxed)
}

struct Stack {
    low: u64,
}

impl Stack {
    fn new() -> Option<Stack> {
        let bytes = STACK_BYTES + PAGE;
        let layout = core::alloc::Layout::from_size_align(bytes, PAGE).ok()?;
        // SAFETY: the layout has a size.
        let low = unsafe { alloc::alloc::alloc_zeroed(layout) } as u64;
        if low == 0 {
            return None;
        }
        #[cfg(xenolith_guest)]
        // SAFETY: our page, which nothing has a reference to and which is never freed: no memory is seen to change. A stack that grows
        // into it faults instead of reaching others' memory; if this fails, it does not.
        let _ = unsafe { crate::memory::set_leaf(low, 0) };
        Some(Stack { low: low + PAGE as u64 })
    }

    fn high(&self) -> u64 {
        self.low + STACK_BYTES as u64
    }
}

/// A piece of work and what came of it, for the trip between the stacks.
struct Trip<F, R> {
    work: Option<F>,
    result: Option<R>,
}

extern "C" fn carry_out<F: FnOnce() -> R, R>(trip: *mut Trip<F, R>) {
    // SAFETY: `run` waits on the other stack and touches the trip only when this has returned, or never will.
    let work = unsafe { (*trip).work.take() };
    if let Some(work) = work {
        let result = work();
        // SAFETY: as above.
        unsafe { (*trip).result = Some(result) };
    }
}

/// Runs work on a stack of its own. `intact` is asked, in the panic handler, whether the rest of the program can go on: it allocates
/// nothing and takes no lock.
///
/// # Errors
/// [`Panicked`] when the work panicked; what it owned is lost.
pub fn run<R: 'static>(intact: fn() -> bool, work: impl FnOnce() -> R + 'static) -> Result<R, Panicked> {
    if BUSY.swap(true, Ordering::AcqRel) {
        return Ok(work());
    }
    let stack = STACK.lock().take().or_else(Stack::new);
    let Some(stack) = stack else {
        // No memory for a stack: the work is done all the same, without the safety.
        BUSY.store(false, Ordering::Release);
        return Ok(work());
    };
    let mut trip = Trip { work: Some(work), result: None };
    // SAFETY: BUSY is ours.
    unsafe { *CURRENT.intact.get() = intact };
    CURRENT.low.store(stack.low, Ordering::Release);
    CURRENT.high.store(stack.high(), Ordering::Release);
    // SAFETY: nobody uses the stack; the function fits the trip, which outlives the call.
    unsafe { enter(stack.high(), entry_of(&trip), (&raw mut trip).cast(), CURRENT.outer.get()) };
    CURRENT.low.store(0, Ordering::Release);
    CURRENT.high.store(0, Ordering::Release);
    let Trip { work, result } = trip;
    debug_assert!(work.is_none());
    let outcome = match result {
        Some(result) => {
            *STACK.lock() = Some(stack);
            Ok(result)
        }
        None => {
            ABANDONED.fetch_add(1, Ordering::Relaxed);
            // SAFETY: BUSY is ours; the panic handler that wrote it is abandoned with its stack.
            let message = unsafe { (*CURRENT.message.get()).take() };
            Err(Panicked { message: message.unwrap_or_default() })
        }
    };
    BUSY.store(false, Ordering::Release);
    outcome
}

/// The function that carries out a trip of this type.
fn entry_of<F: FnOnce() -> R, R>(_: &Trip<F, R>) -> extern "C" fn(*mut u8) {
    let entry: extern "C" fn(*mut Trip<F, R>) = carry_out::<F, R>;
    // SAFETY: both take one pointer in a register; `enter` hands on the one to the trip.
    unsafe { core::mem::transmute(entry) }
}

/// Leaves the compartment at work, for good, if that is what panicked and the rest can go on. The panic handler calls it.
pub(crate) fn leave(info: &PanicInfo<'_>) {
    let here: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) here, options(nomem, nostack, preserves_flags)) };
    if !(CURRENT.low.load(Ordering::Acquire)..CURRENT.high.load(Ordering::Acquire)).contains(&here) {
        return;
    }
    // SAFETY: this runs inside of the compartment, so BUSY is that of the caller of `run`, who waits.
    let intact = unsafe { *CURRENT.intact.get() };
    if !crate::rt::is_intact() || !intact() {
        return;
    }
    let place = info.location().map_or(String::new(), |place| place.to_string());
    // SAFETY: as above.
    unsafe { *CURRENT.message.get() = Some(alloc::format!("{} at {place}", info.message())) };
    // SAFETY: `enter` stored it, and has not returned.
    unsafe { escape(*CURRENT.outer.get()) }
}

/// Calls `entry(data)` on the stack that ends at `stack`; notes its own stack pointer in `outer`.
///
/// # Safety
/// Nobody uses the stack; `entry` takes `data`; `outer` is not written by anybody else until this returns.
#[unsafe(naked)]
unsafe extern "C" fn enter(stack: u64, entry: extern "C" fn(*mut u8), data: *mut u8, outer: *mut u64) {
    // The registers that the C ABI wants back: rbx, rbp, r12 to r15. (MXCSR and the x87 control word never change here.)
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rcx], rsp",
        "mov rbx, rsp",
        "mov rsp, rdi",
        "mov rdi, rdx",
        // 16-byte aligned before the call, as the C ABI wants it.
        "call rsi",
        "mov rsp, rbx",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// Returns from the [`enter`] that noted `outer`, whatever runs on the other stack.
///
/// # Safety
/// That `enter` has not returned, and nothing on the stack that this runs on is ever used again.
#[unsafe(naked)]
unsafe extern "C" fn escape(outer: u64) -> ! {
    naked_asm!("mov rsp, rdi", "cld", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbx", "pop rbp", "ret",)
}

/// A fuse for tests: something in a compartment that panics when it is reached the n-th time.
#[derive(Debug, Default)]
pub struct Fuse(AtomicU64);

impl Fuse {
    /// One that never blows.
    #[must_use]
    pub const fn new() -> Fuse {
        Fuse(AtomicU64::new(0))
    }

    /// It blows when it is reached the `n`-th time from here on; 0 for never.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// What it is set to; 0 for never.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// # Panics
    /// When it blows.
    #[inline]
    pub fn reached(&self) {
        let left = self.0.load(Ordering::Relaxed);
        if left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            assert!(left > 1, "somebody wanted this panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::run;
    use alloc::boxed::Box;

    #[test]
    fn work_has_a_stack_of_its_own_and_gives_back_what_it_took() {
        let value = Box::new(41u64);
        let (value, there) = run(
            || true,
            move || {
                let mut value = value;
                *value += 1;
                let local = 0u8;
                (value, &raw const local as u64)
            },
        )
        .unwrap();
        let local = 0u8;
        let outside = &raw const local as u64;
        assert_eq!(*value, 42);
        assert!(there.abs_diff(outside) > 1 << 16, "{there:#x} {outside:#x}");
        // Inside of one, another is a call.
        let nested = run(|| true, || run(|| true, || 7).unwrap()).unwrap();
        assert_eq!(nested, 7);
        // The stack is deep enough for real work, and whole afterwards.
        fn deep(n: u64) -> u64 {
            let frame = [n; 16];
            if n == 0 { frame[3] } else { deep(n - 1) + core::hint::black_box(frame)[5] }
        }
        for _ in 0..100 {
            assert_eq!(run(|| true, || deep(100)).unwrap(), 5050);
        }
    }
}

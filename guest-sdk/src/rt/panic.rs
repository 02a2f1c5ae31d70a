//! Last words.

use crate::console;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

static PANICS: AtomicU32 = AtomicU32::new(0);

/// Leaves the compartment at work, if that panicked; else prints message, place and return addresses, and crashes the domain.
pub fn report(info: &PanicInfo<'_>) -> ! {
    if PANICS.load(Ordering::Relaxed) == 0 {
        crate::compartment::leave(info);
    }
    // A panic while reporting a panic says nothing more.
    if PANICS.fetch_add(1, Ordering::Relaxed) == 0 {
        let mut out = console::Emergency;
        let _ = writeln!(out, "\nguest panic: {}", info.message());
        if let Some(place) = info.location() {
            let _ = writeln!(out, "  at {place}");
        }
        let frame: usize;
        // SAFETY: reads a register.
        unsafe { core::arch::asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
        backtrace(&mut out, frame as u64);
        console::flush();
    }
    crate::shutdown::crash()
}

/// Prints the return addresses of the frame-pointer chain that starts at `frame`.
pub(crate) fn backtrace(out: &mut impl Write, mut frame: u64) {
    use crate::rt::trap::try_read;
    let _ = write!(out, "  backtrace:");
    for _ in 0..24 {
        if !frame.is_multiple_of(8) {
            break;
        }
        let (Ok(next), Ok(address)) = (try_read(frame), try_read(frame.wrapping_add(8))) else { break };
        if address == 0 {
            break;
        }
        let _ = write!(out, " {address:#x}");
        if next <= frame {
            break;
        }
        frame = next;
    }
    let _ = writeln!(out, "\n  (addr2line -e IMAGE ADDRESS... names them)");
}

/// What the unwinder's symbols lead to: nothing calls them, because panics abort.
pub fn unreachable_unwind() -> ! {
    crate::shutdown::crash()
}

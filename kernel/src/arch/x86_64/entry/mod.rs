//! Where the processor enters ring 0, and the thin Rust functions behind the assembly.

// First, for its macros.
mod vectors;

pub mod guest;

use super::epitaph;
use hv::domain::{GuestRegs, VcpuState};

/// What ring 0 was doing when an exception or interrupt came: the same words as a guest's, on a stack of ring 0.
pub type Frame = GuestRegs;

/// An instruction that may fault, and where to go on when it does. Made by the `FIXUP` lines of our assembly.
#[repr(C)]
struct Fixup {
    at: u64,
    then: u64,
}

unsafe extern "C" {
    static __fixups_start: Fixup;
    static __fixups_end: Fixup;
}

/// Where to go on after a fault at `rip`, if that is one of the listed instructions.
fn fixup(rip: u64) -> Option<u64> {
    let (start, end) = (&raw const __fixups_start, &raw const __fixups_end);
    // SAFETY: the linker script puts both symbols around an array of whole records.
    let records = unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    records.iter().find(|record| record.at == rip).map(|record| record.then)
}

/// An entry from a guest, its registers in `state`. Returns what to resume.
extern "C" fn guest_entry(state: &mut VcpuState) -> *mut VcpuState {
    panic!("{:?}", state.regs)
}

/// An exception or interrupt while ring 0 ran on a CPU's stack.
extern "C" fn ring0_entry(frame: &mut Frame) {
    match frame.vector {
        11..=14 if let Some(then) = fixup(frame.rip) => frame.rip = then,
        vector => epitaph::exception(vector, frame),
    }
}

/// A non-maskable interrupt. Nothing here may fault: IRET would let the next one in on the same stack.
extern "C" fn nmi_entry(_frame: &mut Frame) {
    super::serial::write_unlocked(b"(XL) non-maskable interrupt ignored\n");
}

/// A machine check: the contents of memory are in doubt.
extern "C" fn machine_check_entry(frame: &mut Frame) {
    epitaph::exception(18, frame)
}

extern "C" fn double_fault_entry(frame: &mut Frame) {
    epitaph::exception(8, frame)
}

/// A debug exception: a guest's breakpoint that ring 0 ran into for the guest (a copy, or `mov ss` before SYSCALL). It is
/// the guest's business, and lost; single steps end here, ring 0 is not stepped.
extern "C" fn ring0_debug(frame: &mut Frame) {
    frame.rflags &= !(1 << 8);
    x86_64::registers::debug::Dr6::read();
}

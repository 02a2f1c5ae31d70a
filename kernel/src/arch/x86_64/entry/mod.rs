//! Where the processor enters ring 0, and the thin Rust functions behind the assembly.

pub mod guest;
mod vectors;

use super::machine::Machine;
use super::{context, epitaph, interrupts, percpu};
use hv::domain::{
    Cpu, ENTRY_IRET_FAULT, ENTRY_IRET_FAULT_LAST, ENTRY_SYSCALL, ENTRY_SYSCALL32, ENTRY_SYSENTER, GuestRegs,
    VcpuState,
};
use hv::hypervisor::Hypervisor;
use hv::x86::exit;
use x86_64::registers::control::Cr2;

/// `int 0x80`, which guests may execute directly.
pub const SOFTWARE_SYSCALL: u64 = 0x80;

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
extern "C" fn guest_entry(_state: *mut VcpuState) -> *mut VcpuState {
    let (hv, cpu) = (crate::hypervisor(), policy());
    let vector = cpu.current.as_mut().map_or(u64::MAX, |current| {
        // It held for the resume before: an interrupt must not cost the guest its rcx and r11.
        current.state.sysret_ok = false;
        current.state.regs.vector
    });
    match vector {
        ENTRY_SYSCALL | ENTRY_SYSCALL32 | ENTRY_SYSENTER => hv.on_syscall(cpu),
        1 => hv.on_exception(cpu, context::take_debug_status()),
        // Vector 0x80 has a gate that guests may use, and no device.
        0..32 | SOFTWARE_SYSCALL | ENTRY_IRET_FAULT..=ENTRY_IRET_FAULT_LAST => {
            // Read before a copy to or from a guest faults and changes it.
            hv.on_exception(cpu, Cr2::read_raw())
        }
        _ => crate::on_interrupt(interrupts::acknowledge(vector as u8)),
    }
    resume(hv, cpu)
}

/// What policy keeps for this CPU.
fn policy() -> &'static mut Cpu {
    // SAFETY: this CPU's own data. Ring 0 is entered once at a time on a CPU: the entries that may nest (an interrupt in the
    // idle loop, a fault of a guest copy, NMI) do not come here.
    unsafe { (*percpu::here()).cpu.as_mut() }.expect("set before the first guest runs")
}

/// The way back: policy chooses, mechanism makes sure that nothing it chose resumes with more than ring 3.
#[inline(always)]
fn resume(hv: &Hypervisor<Machine>, cpu: &mut Cpu) -> *mut VcpuState {
    hv.prepare_resume(cpu);
    let state = &mut *cpu.current.as_mut().expect("prepare_resume returns with a vCPU").state;
    state.sysret_ok = exit::ready(&mut state.regs, state.sysret_ok);
    context::load_cr4(state);
    state
}

/// Runs guests on this CPU from here on.
pub fn run_guests(cpu: Cpu) -> ! {
    // SAFETY: this CPU's own data, of which no reference exists here.
    unsafe { (*percpu::this()).cpu = Some(cpu) };
    context::trap_tsc(super::clock::emulates_tsc());
    let state = resume(crate::hypervisor(), policy());
    // SAFETY: `resume_guest` takes a state that `enter_vcpu` prepared; it leaves this stack for good.
    unsafe { core::arch::asm!("jmp resume_guest", in("rax") state, options(noreturn)) }
}

/// An exception or interrupt while ring 0 ran on a CPU's stack.
extern "C" fn ring0_entry(frame: &mut Frame) {
    match frame.vector {
        11..=14 if let Some(then) = fixup(frame.rip) => frame.rip = then,
        // The idle loop's STI; HLT.
        vector @ 32..256 => crate::on_interrupt(interrupts::acknowledge(vector as u8)),
        vector => epitaph::exception(vector, frame),
    }
}

/// A non-maskable interrupt. Nothing here may fault: IRET would let the next one in on the same stack.
extern "C" fn nmi_entry(frame: &mut Frame) {
    epitaph::speak_if_asked(frame);
    if epitaph::is_stopping() {
        epitaph::stop();
    }
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

//! `iret`: back from a handler of the guest's kernel, to its user mode or to itself.

use hypercall_abi::vcpu::{IretContext, VcpuContextFlags};

use super::{Args, Exit, HcResult};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::trap::bounce::Flags;
use crate::trap::descriptor::guest_selector;

/// Replaces the registers by the frame at the guest's stack pointer.
///
/// The privilege bits of the frame's cs say where to go; they are 3 afterwards in any case. IF becomes the event mask. A
/// guest whose frame cannot be read, or that has no page tables for its user mode, is crashed.
pub fn iret<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, _: Args) -> HcResult {
    let Ok(frame) = hv.read_guest::<IretContext>(current.state.regs.rsp) else {
        return Err(Exit::Crash("its iret frame cannot be read"));
    };
    if frame.cs & 3 == 3 && !hv.enter_guest_user(current) {
        return Err(Exit::Crash("iret to user mode, for which it has no page tables"));
    }
    if hv.architectural_iopl(current) {
        current.state.iopl = (frame.rflags >> 12 & 3) as u8;
    }
    let state = &mut current.state;
    let in_syscall = frame.flags & VcpuContextFlags::IN_SYSCALL.bits() != 0;
    let regs = &mut state.regs;
    regs.rax = frame.rax;
    regs.rip = frame.rip;
    regs.cs = u64::from(guest_selector(frame.cs as u16));
    regs.rflags = (frame.rflags & 0xffff_ffff & !(Flags::IOPL | Flags::VM).bits()) | Flags::IF.bits();
    regs.rsp = frame.rsp;
    regs.ss = u64::from(guest_selector(frame.ss as u16));
    if !in_syscall {
        regs.r11 = frame.r11;
        regs.rcx = frame.rcx;
    }
    state.sysret_ok = in_syscall;
    state.nmi_masked = false;
    current.vcpu.set_upcall_mask(&hv.platform, frame.rflags & Flags::IF.bits() == 0);
    Err(Exit::RegistersReplaced)
}

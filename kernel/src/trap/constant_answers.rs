//! Test builds only: a hypervisor that does nothing for a domain and gives one answer to everything.
//!
//! A conformance case that passes on such a hypervisor shows nothing, so `cargo xtask conformance --vacuity` lets each run
//! between two calls of [`NUMBER`] and sees that it does not pass. Between them
//! - every hypercall but iret gives the answer and has no effect; a shutdown ends the domain, since it cannot go on;
//! - an instruction that traps is, with the answer [`ZERO`], carried out as if all it reads were 0 and all it writes were
//!   ignored; with any other answer it crashes the domain;
//! - all other exceptions crash the domain, for its handlers are not called;
//! - no upcall, NMI or failsafe callback is delivered, and a watchdog ends what hangs.
//!
//! What the processor does by itself, and the clock in shared_info, go on: they are no answers.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hypercall_abi::Hypercall;
use hypercall_abi::constant_answers::{NUMBER, ZERO};
use hypercall_abi::subops::SchedOp;

use super::decode::{self, Op};
use super::deliver::{Exception, vector};
use super::emulate::{Emulated, retire, set_gpr};
use crate::domain::{Current, VcpuRef};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// The switch of one domain.
#[derive(Default)]
pub struct Switch {
    on: AtomicBool,
    answer: AtomicU64,
}

impl Switch {
    /// The answer, between the marks.
    pub fn answer(&self) -> Option<u64> {
        self.on.load(Ordering::Acquire).then(|| self.answer.load(Ordering::Relaxed))
    }
}

/// Whether this was a hypercall of the switch, or one that gets the constant answer; then it is done.
pub(crate) fn hypercall<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) -> bool {
    let number = current.state.regs.rax;
    let [first, second, third, ..] = current.state.regs.args();
    let switch = &current.domain().constant;
    if number == NUMBER {
        switch.answer.store(second, Ordering::Relaxed);
        switch.on.store(first != 0, Ordering::Release);
        let deadline = if first == 0 || third == 0 { 0 } else { hv.platform.now_ns().saturating_add(third) };
        let domain = current.domain().clone();
        let [_, watchdog] = &domain.watchdogs;
        watchdog.store(deadline, Ordering::Release);
        if let Some(first) = domain.vcpus.first().and_then(|vcpu| VcpuRef::new(&domain, vcpu.id)) {
            hv.arm_timers(&first);
        }
        current.state.regs.rax = 0;
        return true;
    }
    let Some(answer) = switch.answer() else { return false };
    if number == Hypercall::Iret.number() {
        return false;
    }
    if number == Hypercall::SchedOp.number() && first == u64::from(SchedOp::Shutdown.number()) {
        hv.crash_current(current, "it shuts down while every answer is the same");
        return true;
    }
    current.state.regs.rax = answer;
    true
}

/// Whether this exception came under a constant answer; then it is dealt with.
pub(super) fn exception<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    exception: Exception,
) -> bool {
    let Some(answer) = current.domain().constant.answer() else { return false };
    let carried_out = answer == ZERO
        && match exception.vector {
            vector::GENERAL_PROTECTION if exception.error_code == 0 => read_as_zero(hv, current),
            vector::INVALID_OPCODE => forced_cpuid_as_zero(hv, current),
            vector::PAGE_FAULT => ignore_store(hv, current),
            _ => false,
        };
    if !carried_out {
        hv.crash_current(current, "an exception while every answer is the same");
    }
    true
}

/// Whether a system call of the guest's user mode came under a constant answer; then the domain is no more.
pub(super) fn system_call<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) -> bool {
    if current.domain().constant.answer().is_none() {
        return false;
    }
    hv.crash_current(current, "a system call while every answer is the same");
    true
}

/// Carries out a privileged instruction whose every result is 0.
fn read_as_zero<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) -> bool {
    let regs = &mut current.state.regs;
    let Some(insn) = hv.fetch(regs.rip, |bytes| decode::privileged(bytes, decode::Mode::Bits64)) else {
        return false;
    };
    match insn.op {
        Op::ReadCr { to, .. } | Op::ReadDr { to, .. } => set_gpr(regs, to, 0),
        Op::Rdmsr | Op::Rdtsc | Op::Rdtscp => (regs.rax, regs.rdx) = (0, 0),
        Op::Cpuid => (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (0, 0, 0, 0),
        Op::In { width, .. } => regs.rax &= !width.mask(),
        Op::WriteCr { .. }
        | Op::WriteDr { .. }
        | Op::Clts
        | Op::Cli
        | Op::Sti
        | Op::Wrmsr
        | Op::Xsetbv
        | Op::Wbinvd
        | Op::Out { .. }
        | Op::Ins(_)
        | Op::Outs(_) => {}
    }
    retire(regs, insn.len, 0) == Emulated::Done
}

/// The same for CPUID behind the forced-emulation prefix.
fn forced_cpuid_as_zero<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) -> bool {
    if hv.forced_emulation(current) != Emulated::Done {
        return false;
    }
    let regs = &mut current.state.regs;
    (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (0, 0, 0, 0);
    true
}

/// Goes on behind a store that faulted.
fn ignore_store<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) -> bool {
    let regs = &mut current.state.regs;
    let Some(insn) = hv.fetch(regs.rip, decode::store) else { return false };
    retire(regs, insn.len, 0) == Emulated::Done
}

//! From a hypercall number to its handler, and from its result to the guest's registers.

use hypercall_abi::{Errno, Hypercall, for_each_hypercall};

use super::administration::{arch_0, arch_1, hypfs_op, kexec_op, platform_op, sysctl, xenoprof_op};
use super::console_io::console_io;
use super::domctl::domctl;
use super::event_channel_op::{event_channel_op, event_channel_op_compat};
use super::grant_table_op::grant_table_op;
use super::hvm::{dm_op, hvm_op};
use super::iret::iret;
use super::memory_op::memory_op;
use super::mmu_update::mmu_update;
use super::mmuext_op::mmuext_op;
use super::multicall::multicall;
use super::physdev_op::{physdev_op, physdev_op_compat};
use super::registers::{fpu_taskswitch, get_debugreg, set_debugreg, vm_assist};
use super::sched_op::{sched_op, sched_op_compat};
use super::segments::{set_gdt, set_segment_base, update_descriptor};
use super::set_timer_op::set_timer_op;
use super::traps::{callback_op, nmi_op, set_callbacks, set_trap_table, stack_switch};
use super::update_va_mapping::{update_va_mapping, update_va_mapping_otherdomain};
use super::vcpu_op::vcpu_op;
use super::xen_version::xen_version;
use super::{Args, Exit, HcResult};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Bytes of the SYSCALL instruction that a preempted hypercall executes again.
const SYSCALL_LENGTH: u64 = 2;

/// Runs the hypercall that the saved registers ask for, and stores its result in them.
pub fn hypercall<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) {
    current.state.budget = hv.entry_budget();
    #[cfg(any(feature = "constant-answers", test))]
    if crate::trap::constant_answers::hypercall(hv, current) {
        current.state.sysret_ok = true;
        return;
    }
    let number = current.state.regs.rax;
    let args = current.state.regs.args();
    match dispatch(hv, current, number, args) {
        Ok(value) => finish(current, value),
        Err(Exit::Errno(errno)) => finish(current, errno.to_ret()),
        Err(Exit::RegistersReplaced) => current.state.counts.hypercalls.add(1),
        Err(Exit::Preempted(args)) => {
            // Its end counts.
            let regs = &mut current.state.regs;
            regs.rip = regs.rip.wrapping_sub(SYSCALL_LENGTH);
            regs.set_args(args);
        }
        Err(Exit::Crash(why)) => hv.crash_current(current, why),
    }
}

/// Stores a result. The guest expects SYSCALL to have changed rcx and r11, so SYSRET may do the same on the way back.
fn finish(current: &mut Current, result: u64) {
    current.state.counts.hypercalls.add(1);
    current.state.regs.rax = result;
    current.state.sysret_ok = true;
}

/// Makes the dispatcher of the ABI crate's table: a row that is `[Handled]` calls the function of its name, a row that is
/// refused answers from the table.
///
/// So each handler is imported here by its name: a row without one does not compile, a handler without such a row is an unused
/// import.
macro_rules! dispatcher {
    (
        $hv:ident, $current:ident, $call:ident, $args:ident;
        $(($number:literal, $variant:ident, $name:ident, $caller:ident, $arguments:tt, $answer:tt, $doc:literal, $facts:tt);)*
    ) => {
        match $call {
            $(Hypercall::$variant => dispatcher!(@ $answer $name($hv, $current, $args)),)*
        }
    };
    (@ [Handled] $name:ident($hv:ident, $current:ident, $args:ident)) => {
        $name($hv, $current, $args)
    };
    (@ [Refused $errno:ident] $($call:tt)*) => {
        Err(Errno::$errno.into())
    };
    (@ [LeftOut $errno:ident $why:literal] $($call:tt)*) => {
        Err(Errno::$errno.into())
    };
}

/// Calls the handler of hypercall `number`. Numbers that are in no row of the table are `ENOSYS`.
pub fn dispatch<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, number: u64, args: Args) -> HcResult {
    let call = Hypercall::from_number(number).ok_or(Errno::ENOSYS)?;
    for_each_hypercall!(dispatcher, hv, current, call, args;)
}

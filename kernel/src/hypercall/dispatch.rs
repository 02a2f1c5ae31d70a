//! From a hypercall number to its handler, and from its result to the guest's registers.

use hypercall_abi::Hypercall;

use super::{Args, Exit, HcResult};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Bytes of the SYSCALL instruction that a preempted hypercall executes again.
const SYSCALL_LENGTH: u64 = 2;

/// Runs the hypercall that the saved registers ask for, and stores its result in them.
pub fn hypercall<P: Platform>(hv: &Hypervisor<P>, current: &mut Current) {
    current.state.budget = hv.entry_budget();
    let number = current.state.regs.rax;
    let args = current.state.regs.args();
    match dispatch(hv, current, number, args) {
        Ok(value) => finish(current, value),
        Err(Exit::Errno(errno)) => finish(current, errno.to_ret()),
        Err(Exit::RegistersReplaced) => {}
        Err(Exit::Preempted(args)) => {
            let regs = &mut current.state.regs;
            regs.rip = regs.rip.wrapping_sub(SYSCALL_LENGTH);
            regs.set_args(args);
        }
        Err(Exit::Crash(why)) => hv.crash_current(current, why),
    }
}

/// Stores a result. The guest expects SYSCALL to have changed rcx and r11, so SYSRET may do the same on the way back.
fn finish(current: &mut Current, result: u64) {
    current.state.regs.rax = result;
    current.state.sysret_ok = true;
}

/// Calls the handler of hypercall `number`. Numbers that nobody implements are `ENOSYS`.
///
/// The match is over the ABI crate's table: a hypercall without an arm here does not exist for guests.
pub fn dispatch<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, number: u64, args: Args) -> HcResult {
    use super::*;
    match Hypercall::from_number(number) {
        Some(Hypercall::MmuUpdate) => mmu_update::mmu_update(hv, current, args),
        Some(Hypercall::MmuextOp) => mmuext_op::mmuext_op(hv, current, args),
        Some(Hypercall::UpdateVaMapping) => update_va_mapping::update_va_mapping(hv, current, args),
        Some(Hypercall::UpdateVaMappingOtherdomain) => {
            update_va_mapping::update_va_mapping_otherdomain(hv, current, args)
        }
        Some(Hypercall::MemoryOp) => memory_op::memory_op(hv, current, args),
        Some(Hypercall::EventChannelOp) => event_channel_op::event_channel_op(hv, current, args),
        Some(Hypercall::EventChannelOpCompat) => event_channel_op::event_channel_op_compat(hv, current, args),
        Some(Hypercall::GrantTableOp) => grant_table_op::grant_table_op(hv, current, args),
        Some(Hypercall::SetTrapTable) => traps::set_trap_table(hv, current, args),
        Some(Hypercall::SetCallbacks) => traps::set_callbacks(hv, current, args),
        Some(Hypercall::CallbackOp) => traps::callback_op(hv, current, args),
        Some(Hypercall::NmiOp) => traps::nmi_op(hv, current, args),
        Some(Hypercall::StackSwitch) => traps::stack_switch(hv, current, args),
        Some(Hypercall::Iret) => iret::iret(hv, current, args),
        Some(Hypercall::SetGdt) => segments::set_gdt(hv, current, args),
        Some(Hypercall::UpdateDescriptor) => segments::update_descriptor(hv, current, args),
        Some(Hypercall::SetSegmentBase) => segments::set_segment_base(hv, current, args),
        Some(Hypercall::XenVersion) => xen_version::xen_version(hv, current, args),
        Some(Hypercall::ConsoleIo) => console_io::console_io(hv, current, args),
        Some(Hypercall::PhysdevOp) => physdev_op::physdev_op(hv, current, args),
        Some(Hypercall::PhysdevOpCompat) => physdev_op::physdev_op_compat(hv, current, args),
        Some(Hypercall::SetDebugreg) => registers::set_debugreg(hv, current, args),
        Some(Hypercall::GetDebugreg) => registers::get_debugreg(hv, current, args),
        Some(Hypercall::FpuTaskswitch) => registers::fpu_taskswitch(hv, current, args),
        Some(Hypercall::VmAssist) => registers::vm_assist(hv, current, args),
        Some(Hypercall::Multicall) => multicall::multicall(hv, current, args),
        Some(Hypercall::SchedOp) => sched_op::sched_op(hv, current, args),
        Some(Hypercall::SchedOpCompat) => sched_op::sched_op_compat(hv, current, args),
        Some(Hypercall::SetTimerOp) => set_timer_op::set_timer_op(hv, current, args),
        Some(Hypercall::VcpuOp) => vcpu_op::vcpu_op(hv, current, args),
        Some(Hypercall::Domctl) => domctl::domctl(hv, current, args),
        _ => Err(Errno::ENOSYS.into()),
    }
}

//! `set_debugreg`, `get_debugreg`, `fpu_taskswitch`, `vm_assist`: small pieces of a vCPU's and a domain's state.

use core::sync::atomic::Ordering;

use hypercall_abi::Errno;
use hypercall_abi::subops::{VmAssist, VmAssistCmd};

use super::{Args, HcResult};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::trap::debug::Refused;

/// Sets a debug register. `ENODEV` for one that does not exist, `EINVAL` for reserved bits, `EPERM` for addresses of the
/// hypervisor's and controls that guests may not have.
pub fn set_debugreg<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [number, value, ..] = args;
    hv.write_debug(&mut current.state, u64::from(number as u32), value).map_err(|refused| match refused {
        Refused::NoRegister => Errno::ENODEV,
        Refused::Reserved => Errno::EINVAL,
        Refused::Denied => Errno::EPERM,
    })?;
    Ok(0)
}

/// Reads a debug register. `ENODEV` for one that does not exist.
pub fn get_debugreg<P: Platform>(_: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [number, ..] = args;
    let state = &current.state;
    let value = state.debug.read(u64::from(number as u32), state.debug_extensions());
    Ok(value.map_err(|_| Errno::ENODEV)?)
}

/// Sets or clears the guest's CR0.TS.
pub fn fpu_taskswitch<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [set, ..] = args;
    current.state.task_switched = set as u32 != 0;
    hv.platform.set_task_switched(current.state.task_switched);
    Ok(0)
}

/// Turns a deviation from the plain interface on or off. `EINVAL` for types that do not exist for 64-bit guests here,
/// `ENOSYS` for unknown commands.
pub fn vm_assist<P: Platform>(_: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, kind, ..] = args;
    let bit = match VmAssist::accept(kind)? {
        kind @ (VmAssist::FourGbSegments
        | VmAssist::FourGbSegmentsNotify
        | VmAssist::WritablePagetables
        | VmAssist::PaeExtendedCr3
        | VmAssist::ArchitecturalIopl
        | VmAssist::RunstateUpdateFlag) => 1 << kind.number(),
        refused => return Err(refused.refusal().into()),
    };
    let assists = &current.domain().vm_assist;
    match VmAssistCmd::accept(command)? {
        VmAssistCmd::Enable => assists.fetch_or(bit, Ordering::Relaxed),
        VmAssistCmd::Disable => assists.fetch_and(!bit, Ordering::Relaxed),
    };
    Ok(0)
}

//! `set_trap_table`, `set_callbacks`, `callback_op`, `nmi_op`, `stack_switch`: where control enters a guest's kernel.

use hypercall_abi::callback::{CALLBACKF_MASK_EVENTS, CallbackRegister, CallbackUnregister};
use hypercall_abi::nmi::NmiCallback;
use hypercall_abi::segment::FLAT_KERNEL_CS;
use hypercall_abi::subops::{CallbackOp, CallbackType, NmiOp};
use hypercall_abi::vcpu::TrapInfo;
use hypercall_abi::{Errno, VirtAddr};

use super::{Args, Exit, HcResult};
use crate::domain::{Callback, Current, TrapEntry, VcpuState};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::trap::descriptor::guest_selector;

/// Vector of non-maskable interrupts.
const NMI: usize = 2;

/// Enters handlers into the trap table, up to an entry with address 0; the others stay. A null list clears the table.
///
/// `EFAULT` for a list that cannot be read, `EINVAL` for an address that is not canonical; what came before it is entered.
pub fn set_trap_table<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [mut at, ..] = args;
    if at == 0 {
        current.state.traps = [TrapEntry::default(); 256];
        return Ok(0);
    }
    loop {
        let trap: TrapInfo = hv.read_guest(at)?;
        if trap.address == 0 {
            return Ok(0);
        }
        if !VirtAddr::new(trap.address).is_canonical() {
            return Err(Errno::EINVAL.into());
        }
        let entry = TrapEntry { address: trap.address, cs: guest_selector(trap.cs), flags: trap.flags };
        if let Some(slot) = current.state.traps.get_mut(usize::from(trap.vector)) {
            *slot = entry;
        }
        at = at.checked_add(size_of::<TrapInfo>() as u64).ok_or(Errno::EFAULT)?;
        if current.state.budget.step().is_err() {
            return Err(Exit::Preempted([at, 0, 0, 0, 0, 0]));
        }
    }
}

/// Sets the event, failsafe and syscall callbacks. Addresses that are not canonical leave theirs as it was.
pub fn set_callbacks<P: Platform>(_: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [event, failsafe, syscall, ..] = args;
    for (kind, address) in
        [(CallbackType::Event, event), (CallbackType::Failsafe, failsafe), (CallbackType::Syscall, syscall)]
    {
        // Old kernels pass 0 for what they do not have; Xen reports no error here either.
        let _ = register(&mut current.state, kind, address, false);
    }
    Ok(0)
}

/// Registers or unregisters a callback.
///
/// `EFAULT`; `EINVAL` for an address that is not canonical, and for unregistering anything but the NMI callback; `ENOSYS`
/// for unknown commands and types.
pub fn callback_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, arg, ..] = args;
    let kind = |number: u16| CallbackType::accept(u64::from(number));
    match CallbackOp::accept(command)? {
        CallbackOp::Register => {
            let request: CallbackRegister = hv.read_guest(arg)?;
            // Xen looks at the address first.
            if !request.address.is_canonical() {
                return Err(Errno::EINVAL.into());
            }
            let mask = request.flags & CALLBACKF_MASK_EVENTS != 0;
            register(&mut current.state, kind(request.kind)?, request.address.get(), mask)?;
        }
        CallbackOp::Unregister => {
            let request: CallbackUnregister = hv.read_guest(arg)?;
            match kind(request.kind)? {
                CallbackType::Nmi => unregister_nmi(&mut current.state),
                _ => return Err(Errno::EINVAL.into()),
            }
        }
    }
    Ok(0)
}

/// Registers or unregisters the handler of non-maskable interrupts. `EFAULT`, `EINVAL`, `ENOSYS` as for `callback_op`.
pub fn nmi_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, arg, ..] = args;
    match NmiOp::accept(command)? {
        NmiOp::RegisterCallback => {
            let request: NmiCallback = hv.read_guest(arg)?;
            register(&mut current.state, CallbackType::Nmi, request.handler_address, false)?;
        }
        NmiOp::UnregisterCallback => unregister_nmi(&mut current.state),
    }
    Ok(0)
}

fn register(state: &mut VcpuState, kind: CallbackType, address: u64, mask_events: bool) -> Result<(), Errno> {
    if !VirtAddr::new(address).is_canonical() {
        return Err(Errno::EINVAL);
    }
    let callback = Callback { address, mask_events };
    let callbacks = &mut state.callbacks;
    match kind {
        CallbackType::Event => callbacks.event = Callback { mask_events: true, ..callback },
        CallbackType::Failsafe => callbacks.failsafe = callback,
        CallbackType::Syscall => callbacks.syscall = callback,
        CallbackType::Syscall32 => callbacks.syscall32 = callback,
        CallbackType::Sysenter => callbacks.sysenter = callback,
        // It is an entry of the trap table by another name.
        CallbackType::Nmi => {
            state.traps[NMI] = TrapEntry { address, cs: FLAT_KERNEL_CS, flags: TrapInfo::MASK_EVENTS };
        }
        refused => return Err(refused.refusal()),
    }
    Ok(())
}

fn unregister_nmi(state: &mut VcpuState) {
    state.traps[NMI] = TrapEntry::default();
}

/// Sets the stack on which the guest's kernel is entered from its user mode.
pub fn stack_switch<P: Platform>(_: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [ss, sp, ..] = args;
    current.state.kernel_ss = guest_selector(ss as u16);
    current.state.kernel_sp = sp;
    Ok(0)
}

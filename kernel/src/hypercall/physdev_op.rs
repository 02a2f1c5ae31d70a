//! `physdev_op`: I/O privilege of a vCPU, and interrupt pins for domains that were given some.
//!
//! Numbers of physical interrupts (pirqs) are those of the pins. PCI devices, message interrupts and the I/O APIC are the
//! hypervisor's own business or nobody's yet: their commands are `EPERM` to domains without control, `ENOSYS` otherwise.

use hypercall_abi::physdev::{
    MAP_PIRQ_TYPE_GSI, PhysdevEoi, PhysdevIrqStatusQuery, PhysdevMapPirq, PhysdevSetIobitmap, PhysdevSetIopl,
    PhysdevUnmapPirq, XENIRQSTAT_NEEDS_EOI,
};
use hypercall_abi::subops::PhysdevOp;
use hypercall_abi::{DomId, Errno};

use super::{Args, HcResult};
use crate::access::Verbs;
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::x86::layout::is_guest_range;

/// Bytes of a whole port bitmap, as Xen counts them: one bit for each port.
const BITMAP_BYTES: u64 = 8192;
/// Number of ports.
const PORTS: u32 = 0x1_0000;
/// Where the argument of a command starts in the old form of the call.
const COMPAT_ARGUMENT: u64 = 8;

/// Carries out one command.
///
/// `EFAULT`; `EINVAL` for an I/O privilege above 3, more than 65536 ports, or a pin that does not exist or is not the
/// domain's; `EPERM` without the right; `ESRCH` for an unknown domain; `ENOSYS`.
pub fn physdev_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, arg, ..] = args;
    match PhysdevOp::accept(command)? {
        PhysdevOp::SetIopl => {
            let request: PhysdevSetIopl = hv.read_guest(arg)?;
            if request.iopl > 3 {
                return Err(Errno::EINVAL.into());
            }
            current.state.iopl = request.iopl as u8;
        }
        PhysdevOp::SetIobitmap => {
            let request: PhysdevSetIobitmap = hv.read_guest(arg)?;
            let bitmap = request.bitmap.addr();
            if !is_guest_range(bitmap, BITMAP_BYTES) || request.nr_ports > PORTS {
                return Err(Errno::EINVAL.into());
            }
            current.state.io_bitmap = (bitmap, request.nr_ports);
        }
        PhysdevOp::Eoi => {
            let request: PhysdevEoi = hv.read_guest(arg)?;
            hv.end_irq(current.domain(), request.irq).map_err(|_| Errno::EINVAL)?;
        }
        PhysdevOp::IrqStatusQuery => {
            let mut request: PhysdevIrqStatusQuery = hv.read_guest(arg)?;
            hv.irq_status(current.domain(), request.irq).map_err(|_| Errno::EINVAL)?;
            request.flags = XENIRQSTAT_NEEDS_EOI;
            hv.write_guest(arg, &request)?;
        }
        PhysdevOp::MapPirq => {
            let mut request: PhysdevMapPirq = hv.read_guest(arg)?;
            check_owner(hv, current, request.domid)?;
            if request.kind != MAP_PIRQ_TYPE_GSI {
                return Err(Errno::EINVAL.into());
            }
            let pin = check_pin(hv, current, request.index)?;
            if request.pirq >= 0 && request.pirq != pin {
                return Err(Errno::EINVAL.into());
            }
            request.pirq = pin;
            hv.write_guest(arg, &request)?;
        }
        PhysdevOp::UnmapPirq => {
            let request: PhysdevUnmapPirq = hv.read_guest(arg)?;
            check_owner(hv, current, request.domid)?;
            // Nothing was made by mapping; what is bound ends with its port.
            check_pin(hv, current, request.pirq)?;
        }
        PhysdevOp::PirqEoiGmfnV1
        | PhysdevOp::PirqEoiGmfnV2
        | PhysdevOp::IrqUnmaskNotify
        | PhysdevOp::GetFreePirq => {
            return Err(Errno::ENOSYS.into());
        }
        PhysdevOp::FreeIrqVector
        | PhysdevOp::ManagePciAdd
        | PhysdevOp::ManagePciRemove
        | PhysdevOp::RestoreMsi
        | PhysdevOp::ManagePciAddExt
        | PhysdevOp::SetupGsi
        | PhysdevOp::PciMmcfgReserved
        | PhysdevOp::PciDeviceAdd
        | PhysdevOp::PciDeviceRemove
        | PhysdevOp::RestoreMsiExt
        | PhysdevOp::DbgpOp
        | PhysdevOp::PrepareMsix
        | PhysdevOp::ReleaseMsix
        | PhysdevOp::ApicRead
        | PhysdevOp::ApicWrite
        | PhysdevOp::AllocIrqVector => {
            return Err(if has_control(current) { Errno::ENOSYS } else { Errno::EPERM }.into());
        }
    }
    Ok(0)
}

/// The old form of the call: number and argument in one structure.
pub fn physdev_op_compat<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [structure, ..] = args;
    let command: u32 = hv.read_guest(structure)?;
    match PhysdevOp::from_number(u64::from(command)) {
        Some(
            PhysdevOp::IrqStatusQuery
            | PhysdevOp::SetIopl
            | PhysdevOp::SetIobitmap
            | PhysdevOp::ApicRead
            | PhysdevOp::ApicWrite
            | PhysdevOp::AllocIrqVector,
        ) => {
            let argument = structure.checked_add(COMPAT_ARGUMENT).ok_or(Errno::EFAULT)?;
            physdev_op(hv, current, [u64::from(command), argument, 0, 0, 0, 0])
        }
        _ => Err(Errno::ENOSYS.into()),
    }
}

fn has_control(current: &Current) -> bool {
    current.domain().rights.lock().verbs.contains(Verbs::CONTROL)
}

/// Mapping is for domains with control, and here for their own pins only.
fn check_owner<P: Platform>(hv: &Hypervisor<P>, current: &Current, target: DomId) -> Result<(), Errno> {
    let own = current.domain().id;
    let target = hv.resolve_domid(own, target);
    if hv.domains.get(target).is_none() {
        return Err(Errno::ESRCH);
    }
    if !has_control(current) {
        return Err(Errno::EPERM);
    }
    if target == own { Ok(()) } else { Err(Errno::EINVAL) }
}

/// A pin that exists and that the domain has the right to.
fn check_pin<P: Platform>(hv: &Hypervisor<P>, current: &Current, pin: i32) -> Result<i32, Errno> {
    let number = u32::try_from(pin).map_err(|_| Errno::EINVAL)?;
    if number >= hv.irqs.pins() {
        return Err(Errno::EINVAL);
    }
    let has = current.domain().rights.lock().irqs.contains(u64::from(number), u64::from(number));
    if has { Ok(pin) } else { Err(Errno::EPERM) }
}

//! `physdev_op`: I/O privilege of a vCPU, and interrupt pins for domains that were given some.
//!
//! Numbers of physical interrupts (pirqs) are those of the pins, and behind them those of message interrupts. The hypervisor drives
//! the I/O APIC itself, and knows no PCI device: commands about these find nothing, or are for nobody. A message interrupt is had
//! by the control interface (docs/design/0051).

use hypercall_abi::physdev::{
    MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MULTI_MSI, PHYSDEV_OP_SIZE, PhysdevApic, PhysdevDbgpOp, PhysdevEoi,
    PhysdevGetFreePirq, PhysdevIrq, PhysdevIrqStatusQuery, PhysdevManagePci, PhysdevManagePciExt,
    PhysdevMapPirq, PhysdevPciDevice, PhysdevPciDeviceAdd, PhysdevPciMmcfgReserved, PhysdevPirqEoiGmfn,
    PhysdevSetIobitmap, PhysdevSetIopl, PhysdevSetupGsi, PhysdevUnmapPirq, XENIRQSTAT_NEEDS_EOI,
};
use hypercall_abi::subops::PhysdevOp;
use hypercall_abi::{DomId, Errno, Mfn};
use zerocopy::{FromBytes, IntoBytes};

use super::guest_memory::is_guest_list;
use super::{Args, HcResult};
use crate::access::{PIRQS, Verbs};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::page_ref::Writable;
use crate::platform::Platform;

/// Number of ports.
const PORTS: u32 = 0x1_0000;
/// First number of a global interrupt that is no ISA one.
const FIRST_GSI: u32 = 16;
/// Where the argument of a command starts in the old form of the call.
const COMPAT_ARGUMENT: u64 = 8;

/// Carries out one command.
///
/// `EFAULT`; `EINVAL` for an I/O privilege above 3, more than 65536 ports, or a pin that does not exist or is not the
/// domain's; `EPERM` without the right; `ESRCH` for an unknown domain; `ENODEV` for PCI devices, which are not known; `ENOSPC` no
/// free number; `ENOSYS`.
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
            // Where it ends shows when a port is looked up.
            if !is_guest_list(bitmap) || request.nr_ports > PORTS {
                return Err(Errno::EINVAL.into());
            }
            current.state.io_bitmap = (bitmap, request.nr_ports);
        }
        PhysdevOp::Eoi => {
            let request: PhysdevEoi = hv.read_guest(arg)?;
            hv.end_irq(current.domain(), request.irq).map_err(|_| Errno::EINVAL)?;
        }
        PhysdevOp::IrqUnmaskNotify => hv.end_unmasked_irqs(current.domain()),
        PhysdevOp::IrqStatusQuery => {
            let mut request: PhysdevIrqStatusQuery = hv.read_guest(arg)?;
            hv.irq_status(current.domain(), request.irq).map_err(|_| Errno::EINVAL)?;
            request.flags = XENIRQSTAT_NEEDS_EOI;
            hv.write_guest(arg, &request)?;
        }
        PhysdevOp::MapPirq => {
            let mut request: PhysdevMapPirq = hv.read_guest(arg)?;
            if request.kind == MAP_PIRQ_TYPE_MULTI_MSI && request.table_base != 0 {
                return Err(Errno::EINVAL.into());
            }
            let mapped = map_pirq(hv, current, &request);
            if let Ok(pirq) = mapped {
                request.pirq = pirq;
            }
            // Xen writes it back in any case, and that it could not counts more.
            hv.write_guest(arg, &request)?;
            mapped?;
        }
        PhysdevOp::UnmapPirq => {
            let request: PhysdevUnmapPirq = hv.read_guest(arg)?;
            check_owner(hv, current, request.domid)?;
            let pirq = u32::try_from(request.pirq).map_err(|_| Errno::EINVAL)?;
            // What is bound ends with its port.
            if !hv.release_pirq(current.domain(), pirq) {
                return Err(Errno::EINVAL.into());
            }
        }
        PhysdevOp::GetFreePirq => {
            let mut request: PhysdevGetFreePirq = hv.read_guest(arg)?;
            let pins = hv.irqs.pins();
            let mut rights = current.domain().rights.lock();
            let free = |pirq: &u32| !rights.pirqs.contains(*pirq);
            let gsi = (FIRST_GSI..pins).filter(|_| request.kind == MAP_PIRQ_TYPE_GSI).find(free);
            let pirq = gsi.or_else(|| (pins..PIRQS).rev().find(free)).ok_or(Errno::ENOSPC)?;
            rights.pirqs.insert(pirq);
            drop(rights);
            request.pirq = pirq;
            hv.write_guest(arg, &request)?;
        }
        PhysdevOp::AllocIrqVector => {
            let mut request: PhysdevIrq = hv.read_guest(arg)?;
            hv.require(current, Verbs::CONTROL)?;
            // Vectors are the hypervisor's business: callers only hand this number back.
            request.vector = request.irq;
            hv.write_guest(arg, &request)?;
        }
        PhysdevOp::ApicRead | PhysdevOp::ApicWrite => {
            let request: PhysdevApic = hv.read_guest(arg)?;
            hv.require(current, Verbs::CONTROL)?;
            if command == PhysdevOp::ApicRead.number().into() {
                // Xen writes it back in any case, and that it could not counts more.
                hv.write_guest(arg, &request)?;
            }
            return Err(Errno::EINVAL.into());
        }
        PhysdevOp::SetupGsi => {
            let request: PhysdevSetupGsi = hv.read_guest(arg)?;
            if u32::try_from(request.gsi).is_ok_and(|gsi| gsi < hv.irqs.pins()) {
                hv.require(current, Verbs::CONTROL)?;
                let (level, low) = (request.triggering != 0, request.polarity != 0);
                hv.setup_irq(current.domain(), request.gsi as u32, level, low)?;
                return Ok(0);
            }
            return Err(Errno::EINVAL.into());
        }
        command @ (PhysdevOp::PirqEoiGmfnV1 | PhysdevOp::PirqEoiGmfnV2) => {
            let request: PhysdevPirqEoiGmfn = hv.read_guest(arg)?;
            let domain = current.domain();
            let page = hv.mm.get_page(Mfn::new(request.gmfn.get()), domain.id).ok_or(Errno::EINVAL)?;
            let (page, debt) = page.typed::<Writable>().map_err(|_| Errno::EINVAL)?;
            hv.pager().pay(debt);
            let unmasks = command == PhysdevOp::PirqEoiGmfnV1;
            hv.set_eoi_map(domain, page, unmasks).map_err(|_| Errno::EBUSY)?;
        }
        PhysdevOp::ManagePciAdd => return add_device::<P, PhysdevManagePci>(hv, current, arg, |_| true),
        PhysdevOp::ManagePciAddExt => {
            return add_device(hv, current, arg, |d: &PhysdevManagePciExt| {
                d.is_extfn <= 1 && d.is_virtfn <= 1
            });
        }
        PhysdevOp::PciDeviceAdd => return add_device::<P, PhysdevPciDeviceAdd>(hv, current, arg, |_| true),
        PhysdevOp::ManagePciRemove => {
            let _: PhysdevManagePci = hv.read_guest(arg)?;
            hv.require(current, Verbs::CONTROL)?;
            return Err(Errno::ENODEV.into());
        }
        PhysdevOp::PciDeviceRemove | PhysdevOp::PrepareMsix | PhysdevOp::ReleaseMsix => {
            let _: PhysdevPciDevice = hv.read_guest(arg)?;
            hv.require(current, Verbs::CONTROL)?;
            return Err(Errno::ENODEV.into());
        }
        PhysdevOp::RestoreMsi => {
            let _: PhysdevManagePci = hv.read_guest(arg)?;
            return Err(Errno::ENODEV.into());
        }
        PhysdevOp::RestoreMsiExt => {
            let _: PhysdevPciDevice = hv.read_guest(arg)?;
            return Err(Errno::ENODEV.into());
        }
        PhysdevOp::PciMmcfgReserved => {
            hv.require(current, Verbs::CONTROL)?;
            let _: PhysdevPciMmcfgReserved = hv.read_guest(arg)?;
            return Err(Errno::ENODEV.into());
        }
        PhysdevOp::DbgpOp => {
            hv.require(current, Verbs::HARDWARE)?;
            // No debug port is in use that the caller could disturb.
            let _: PhysdevDbgpOp = hv.read_guest(arg)?;
        }
        refused => return Err(refused.refusal().into()),
    }
    Ok(0)
}

/// A device of a caller that may report some: `EFAULT`, `EINVAL` a device that cannot be, `EPERM`, `ENOSYS`.
fn add_device<P: Platform, T: FromBytes + IntoBytes>(
    hv: &Hypervisor<P>,
    current: &Current,
    arg: u64,
    valid: fn(&T) -> bool,
) -> HcResult {
    let request: T = hv.read_guest(arg)?;
    if !valid(&request) {
        return Err(Errno::EINVAL.into());
    }
    hv.require(current, Verbs::CONTROL)?;
    Err(Errno::ENOSYS.into())
}

/// Maps a pin of the caller's to its own number.
fn map_pirq<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    request: &PhysdevMapPirq,
) -> Result<i32, Errno> {
    check_owner(hv, current, request.domid)?;
    if request.kind != MAP_PIRQ_TYPE_GSI {
        return Err(Errno::EINVAL);
    }
    let pin = check_pin(hv, current, request.index)?;
    if request.pirq >= 0 && request.pirq != request.index {
        return Err(Errno::EINVAL);
    }
    current.domain().rights.lock().pirqs.insert(pin);
    Ok(request.index)
}

/// The old form of the call: number and argument in one structure.
pub fn physdev_op_compat<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [structure, ..] = args;
    let [command, ..]: [u32; PHYSDEV_OP_SIZE / 4] = hv.read_guest(structure)?;
    let argument = structure.checked_add(COMPAT_ARGUMENT).ok_or(Errno::EFAULT)?;
    physdev_op(hv, current, [u64::from(command), argument, 0, 0, 0, 0])
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
fn check_pin<P: Platform>(hv: &Hypervisor<P>, current: &Current, pin: i32) -> Result<u32, Errno> {
    let number = u32::try_from(pin).map_err(|_| Errno::EINVAL)?;
    if number >= hv.irqs.pins() {
        return Err(Errno::EINVAL);
    }
    let has = current.domain().rights.lock().irqs.contains(u64::from(number), u64::from(number));
    if has { Ok(number) } else { Err(Errno::EPERM) }
}

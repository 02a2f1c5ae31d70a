//! `vcpu_op`: bring vCPUs up and down, their areas and timers (public/vcpu.h).

use core::sync::atomic::Ordering;

use hypercall_abi::subops::VcpuOp;
use hypercall_abi::vcpu::{
    VcpuGetPhysid, VcpuGuestContext, VcpuRegisterRunstateMemoryArea, VcpuRegisterTimeMemoryArea,
    VcpuRegisterVcpuInfo, VcpuSetPeriodicTimer, VcpuSetSingleshotTimer,
};
use hypercall_abi::{Errno, Mfn, VcpuId, Virq};

use super::{Args, HcResult};
use crate::access::Verbs;
use crate::domain::{Current, VcpuRef, block};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Shortest period of a periodic timer.
const SHORTEST_PERIOD_NS: u64 = 1_000_000;
/// Longest period, Xen's `STIME_DELTA_MAX`: its end is within the range of a signed clock.
const LONGEST_PERIOD_NS: u64 = (1 << 62) - 1;

/// `vcpu_op(cmd, vcpu, arg)`.
///
/// `ENOENT` no such vCPU, `ENOSYS` unknown command, `EFAULT` unreadable argument; more with each command.
pub fn vcpu_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, id, arg, ..] = args;
    let vcpu = VcpuRef::new(current.domain(), VcpuId::new(id as u32)).ok_or(Errno::ENOENT)?;
    match VcpuOp::accept(cmd)? {
        VcpuOp::Initialise => {
            if vcpu.info_location().is_none() {
                return Err(Errno::EINVAL.into());
            }
            let context: VcpuGuestContext = hv.read_guest(arg)?;
            if vcpu.initialised.load(Ordering::Acquire) {
                return Err(Errno::EEXIST.into());
            }
            hv.set_vcpu_context(&vcpu, &context, args, &mut current.state.budget)?;
            Ok(0)
        }
        VcpuOp::Up => {
            if !vcpu.initialised.load(Ordering::Acquire) {
                return Err(Errno::EINVAL.into());
            }
            vcpu.blocked.fetch_and(!block::DOWN, Ordering::AcqRel);
            hv.wake(&vcpu);
            Ok(0)
        }
        VcpuOp::Down => {
            // Not the last one: a domain without a vCPU that is up has shut down without saying why.
            let others = current
                .domain()
                .vcpus
                .iter()
                .any(|v| v.id != vcpu.id && v.blocked.load(Ordering::Acquire) & block::DOWN == 0);
            if !others {
                let domain = current.domain().clone();
                hv.shut_down(&domain, crate::domain::reason::POWEROFF);
                return Ok(0);
            }
            vcpu.blocked.fetch_or(block::DOWN, Ordering::AcqRel);
            hv.interrupt_vcpu(&vcpu);
            Ok(0)
        }
        VcpuOp::IsUp => Ok(u64::from(vcpu.blocked.load(Ordering::Acquire) & block::DOWN == 0)),
        VcpuOp::GetRunstateInfo => {
            let info = hv.runstate_info(&vcpu);
            hv.write_guest(arg, &info)?;
            Ok(0)
        }
        VcpuOp::RegisterRunstateMemoryArea => {
            let request: VcpuRegisterRunstateMemoryArea = hv.read_guest(arg)?;
            if !hv.guest_address_ok(request.addr.addr()) {
                return Err(Errno::EFAULT.into());
            }
            vcpu.runstate_area.store(request.addr.addr(), Ordering::Relaxed);
            // Another vCPU's too, at this address of the caller. An area that is not mapped now is kept for later.
            if request.addr.addr() != 0 {
                let _ = hv.write_guest(request.addr.addr(), &hv.runstate_info(&vcpu));
            }
            Ok(0)
        }
        VcpuOp::SetPeriodicTimer => {
            let request: VcpuSetPeriodicTimer = hv.read_guest(arg)?;
            if !(SHORTEST_PERIOD_NS..=LONGEST_PERIOD_NS).contains(&request.period_ns) {
                return Err(Errno::EINVAL.into());
            }
            vcpu.timers.set_period(request.period_ns);
            // At once, if the latest tick is a period or more ago.
            hv.start_ticks(&vcpu, hv.platform.now_ns());
            Ok(0)
        }
        VcpuOp::StopPeriodicTimer => {
            vcpu.timers.set_period(0);
            hv.arm_timers(&vcpu);
            Ok(0)
        }
        VcpuOp::SetSingleshotTimer => {
            if !vcpu.same(&current.vcpu) {
                return Err(Errno::EINVAL.into());
            }
            let request: VcpuSetSingleshotTimer = hv.read_guest(arg)?;
            // A time in the past fires at once, whatever the flag says: Xen does not look at it any more. So does one that is
            // negative to a signed clock.
            let past = request.timeout_abs_ns < hv.platform.now_ns() || request.timeout_abs_ns >> 63 != 0;
            let deadline = if past { 0 } else { request.timeout_abs_ns };
            vcpu.timers.single_ns.store(deadline, Ordering::SeqCst);
            hv.deadline_is(&vcpu, deadline);
            if past {
                hv.raise_virq(&vcpu, Virq::TIMER);
            }
            Ok(0)
        }
        VcpuOp::StopSingleshotTimer => {
            if !vcpu.same(&current.vcpu) {
                return Err(Errno::EINVAL.into());
            }
            // Its entry in the timer queue stays: it will find nothing due.
            vcpu.timers.single_ns.store(0, Ordering::SeqCst);
            Ok(0)
        }
        VcpuOp::RegisterVcpuInfo => {
            let request: VcpuRegisterVcpuInfo = hv.read_guest(arg)?;
            // A vCPU that may be running elsewhere looks at the old place.
            if !vcpu.same(&current.vcpu) && vcpu.blocked.load(Ordering::Acquire) & block::DOWN == 0 {
                hv.vcpu_info_place_ok(&vcpu, request.offset)?;
                return Err(Errno::EINVAL.into());
            }
            hv.register_vcpu_info(&vcpu, Mfn::new(request.mfn), request.offset)?;
            Ok(0)
        }
        VcpuOp::SendNmi => {
            if arg != 0 {
                return Err(Errno::EINVAL.into());
            }
            hv.send_nmi(&vcpu);
            Ok(0)
        }
        VcpuOp::GetPhysid => {
            // As on Xen, for who drives the processors' power states, of vCPUs that stay on one CPU.
            let hard = vcpu.sched.affinity().hard.and(hv.online());
            let mut allowed = hard.iter();
            let (Some(cpu), None) = (allowed.next(), allowed.next()) else {
                return Err(Errno::EINVAL.into());
            };
            if !current.domain().rights.lock().verbs.contains(Verbs::HARDWARE) {
                return Err(Errno::EINVAL.into());
            }
            let (apic_id, acpi_id) = hv.platform.hardware_ids(cpu);
            let phys_id = u64::from(acpi_id) << 32 | u64::from(apic_id);
            hv.write_guest(arg, &VcpuGetPhysid { phys_id })?;
            Ok(0)
        }
        VcpuOp::RegisterVcpuTimeMemoryArea => {
            let request: VcpuRegisterTimeMemoryArea = hv.read_guest(arg)?;
            if !hv.guest_address_ok(request.addr.addr()) {
                return Err(Errno::EFAULT.into());
            }
            vcpu.time_area.store(request.addr.addr(), Ordering::Relaxed);
            if vcpu.same(&current.vcpu) {
                hv.publish_time_area(&vcpu);
            } else {
                vcpu.time_due.store(true, Ordering::Relaxed);
            }
            Ok(0)
        }
    }
}

//! `sched_op`: yield, block, poll, shut down, watchdogs (public/sched.h).

use core::sync::atomic::Ordering;

use hypercall_abi::sched::{SchedPinOverride, SchedPoll, SchedRemoteShutdown, SchedShutdown, SchedWatchdog};
use hypercall_abi::subops::SchedOp;
use hypercall_abi::{Errno, Port};
use zerocopy::IntoBytes;

use super::guest_memory::item_address;
use super::{Args, HcResult};
use crate::access::Verbs;
use crate::domain::{Current, Vcpu, block, is_upcall_due, unmask_upcalls};
use crate::hypervisor::Hypervisor;
use crate::platform::{CpuId, Platform};
use crate::sched::wakeup;

/// Most ports one poll may name.
const MAX_POLL_PORTS: u32 = 128;
/// Ports of it that are read and looked at together.
const POLL_AT_ONCE: usize = 16;

/// `sched_op(cmd, arg)`.
///
/// `ENOSYS` unknown command, `EFAULT` unreadable argument; more with each command.
pub fn sched_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, arg, ..] = args;
    match SchedOp::accept(cmd)? {
        SchedOp::Yield => {
            hv.yield_cpu(current);
            Ok(0)
        }
        SchedOp::Block => {
            block_vcpu(hv, current);
            Ok(0)
        }
        SchedOp::Shutdown => {
            let request: SchedShutdown = hv.read_guest(arg)?;
            let domain = current.domain().clone();
            hv.shut_down(&domain, request.reason & 0xff);
            Ok(0)
        }
        SchedOp::ShutdownCode => {
            let request: SchedShutdown = hv.read_guest(arg)?;
            current.domain().set_shutdown_code(request.reason & 0xff);
            Ok(0)
        }
        SchedOp::Poll => poll(hv, current, hv.read_guest(arg)?),
        SchedOp::RemoteShutdown => {
            let request: SchedRemoteShutdown = hv.read_guest(arg)?;
            let domain = hv.domains.get(request.domain_id).ok_or(Errno::ESRCH)?;
            hv.require(current, Verbs::CONTROL)?;
            hv.shut_down(&domain, request.reason & 0xff);
            Ok(0)
        }
        SchedOp::Watchdog => {
            let request: SchedWatchdog = hv.read_guest(arg)?;
            hv.set_watchdog(current, request.id, request.timeout)
        }
        SchedOp::PinOverride => pin_override(hv, current, arg),
    }
}

/// The form before interface 0x00030101 (hypercall 6): the argument is the shutdown reason itself.
pub fn sched_op_compat<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, arg, ..] = args;
    match SchedOp::from_number(cmd & 0xffff_ffff) {
        Some(SchedOp::Yield) => {
            hv.yield_cpu(current);
            Ok(0)
        }
        Some(SchedOp::Block) => {
            block_vcpu(hv, current);
            Ok(0)
        }
        Some(SchedOp::Shutdown) => {
            let domain = current.domain().clone();
            hv.shut_down(&domain, (arg & 0xff) as u32);
            Ok(0)
        }
        _ => Err(Errno::ENOSYS.into()),
    }
}

/// Enables events and waits for one. Pending events are looked at after the vCPU counts as blocked, so that one that comes
/// in between is not slept through.
fn block_vcpu<P: Platform>(hv: &Hypervisor<P>, current: &Current) {
    let vcpu: &Vcpu = &current.vcpu;
    let word = vcpu.info_word(&hv.platform, 0);
    if let Some(word) = word {
        unmask_upcalls(word);
    }
    let Ok(_) = wakeup::sleep(&vcpu.blocked, block::BLOCKED, || {
        Ok::<_, core::convert::Infallible>(word.is_some_and(is_upcall_due))
    });
}

/// Waits until one of some ports is pending, an event is due, or time is up. `EINVAL` too many ports, or one that is not open;
/// `EFAULT` the list.
fn poll<P: Platform>(hv: &Hypervisor<P>, current: &Current, request: SchedPoll) -> HcResult {
    if request.nr_ports > MAX_POLL_PORTS {
        return Err(Errno::EINVAL.into());
    }
    if !hv.guest_address_ok(request.ports.addr()) {
        return Err(Errno::EFAULT.into());
    }
    let vcpu = &current.vcpu;
    vcpu.polled_port.store(0, Ordering::SeqCst);
    let mut last = Port::new(0);
    let ready = wakeup::sleep(&vcpu.blocked, block::POLLING, || -> Result<bool, Errno> {
        if vcpu.upcall_due(&hv.platform) {
            return Ok(true);
        }
        let mut first = 0;
        while first < request.nr_ports {
            let at = item_address::<Port>(request.ports.addr(), u64::from(first))?;
            let mut ports = [Port::new(0); POLL_AT_ONCE];
            let count = (request.nr_ports - first).min(POLL_AT_ONCE as u32);
            let all = ports.get_mut(..count as usize).unwrap_or_default();
            let read = if hv.platform.copy_from_guest(all.as_mut_bytes(), at).is_ok() {
                all
            } else {
                // The list leaves what can be read. One before its end may be pending, and then the others are not looked at.
                ports[0] = hv.read_guest(at)?;
                &mut ports[..1]
            };
            if hv.any_pending(current.domain(), read).map_err(|_| Errno::EINVAL)? {
                return Ok(true);
            }
            first += read.len() as u32;
            last = read.last().copied().unwrap_or(last);
        }
        Ok(false)
    });
    if ready? {
        return Ok(0);
    }
    // Until here any port woke it; from here on another one does not.
    if request.nr_ports == 1 {
        vcpu.polled_port.store(last.get(), Ordering::SeqCst);
    }
    if request.timeout != 0 {
        // A time that is negative to a signed clock is in the past.
        let timeout = if request.timeout >> 63 == 0 { request.timeout } else { 1 };
        vcpu.timers.poll_ns.store(timeout, Ordering::SeqCst);
        // Woken already: then the timer was stopped before it was set, and would end another wait than this one.
        if vcpu.blocked.load(Ordering::SeqCst) & block::POLLING == 0 {
            vcpu.timers.poll_ns.store(0, Ordering::SeqCst);
        }
        hv.deadline_is(vcpu, timeout);
    }
    Ok(0)
}

/// Keeps the caller's vCPU on one CPU, or lets it go again (a negative number).
fn pin_override<P: Platform>(hv: &Hypervisor<P>, current: &Current, arg: u64) -> HcResult {
    hv.require(current, Verbs::HARDWARE)?;
    let request: SchedPinOverride = hv.read_guest(arg)?;
    hv.pin_override(&current.vcpu, u32::try_from(request.pcpu).ok().map(CpuId))?;
    Ok(0)
}

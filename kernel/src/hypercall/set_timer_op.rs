//! `set_timer_op`: the single-shot timer of the calling vCPU.

use core::sync::atomic::Ordering;

use super::{Args, HcResult};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Delays above this are taken for a wrapped clock.
const HUGE_DELAY_NS: u64 = 1 << 50;
/// What such a delay becomes.
const HUGE_DELAY_INSTEAD_NS: u64 = 100_000_000;

/// `set_timer_op(timeout)`: raises VIRQ_TIMER at an absolute time in nanoseconds since boot; 0 stops the timer.
///
/// Times with bit 63 set or more than 2^50 ns ahead fire after 100 ms, as on Xen: guests compute them from wrapped clocks.
pub fn set_timer_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let timeout = args[0];
    let now = hv.platform.now_ns();
    let huge = timeout >> 63 != 0 || timeout.saturating_sub(now) >= HUGE_DELAY_NS;
    let deadline = if huge { now.saturating_add(HUGE_DELAY_INSTEAD_NS) } else { timeout };
    current.vcpu.timers.single_ns.store(deadline, Ordering::SeqCst);
    hv.deadline_is(&current.vcpu, deadline);
    Ok(0)
}

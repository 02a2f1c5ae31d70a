//! Time: system time from the shared clock record, the wall clock, and sleeping.
//!
//! System time counts nanoseconds since the hypervisor started; it never goes back. Reading it costs a few dozen
//! instructions and no hypercall.

use crate::rt::start;
use core::sync::atomic::{Ordering, compiler_fence, fence};
use core::time::Duration;

pub(crate) fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: rdtsc reads a counter; lfence keeps it from running ahead of the loads before it.
    unsafe { core::arch::asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// System time in nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    let shared = start::shared_info();
    loop {
        // SAFETY: shared_info is mapped; the hypervisor writes the record, so it is read as volatile, and only a copy with
        // the same even version before and after counts.
        let record = unsafe { (&raw const (*shared).vcpu_info[0].time).read_volatile() };
        let tsc = tsc();
        fence(Ordering::Acquire);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as above.
        let version = unsafe { (&raw const (*shared).vcpu_info[0].time.version).read_volatile() };
        if version & 1 == 0 && version == record.version {
            return record.system_time_at(tsc);
        }
    }
}

/// System time.
#[must_use]
pub fn now() -> Duration {
    Duration::from_nanos(now_ns())
}

/// Time since the Unix epoch.
#[must_use]
pub fn wall_clock() -> Duration {
    let shared = start::shared_info();
    loop {
        // SAFETY: as in now_ns; the wall clock has a version of its own.
        let (before, seconds, nanoseconds, high, after) = unsafe {
            let before = (&raw const (*shared).wc_version).read_volatile();
            fence(Ordering::Acquire);
            let seconds = (&raw const (*shared).wc_sec).read_volatile();
            let nanoseconds = (&raw const (*shared).wc_nsec).read_volatile();
            let high = (&raw const (*shared).wc_sec_hi).read_volatile();
            fence(Ordering::Acquire);
            (before, seconds, nanoseconds, high, (&raw const (*shared).wc_version).read_volatile())
        };
        if before & 1 == 0 && before == after {
            let boot = Duration::from_secs(u64::from(high) << 32 | u64::from(seconds))
                + Duration::from_nanos(u64::from(nanoseconds));
            return boot + now();
        }
    }
}

/// System time `timeout` from now, at most the end of time.
pub(crate) fn deadline(timeout: Duration) -> u64 {
    now_ns().saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}

/// Sleeps; tasks of an executor do not run meanwhile.
pub fn sleep(time: Duration) {
    let deadline = deadline(time);
    while now_ns() < deadline {
        crate::events::sleep_until(Some(deadline));
    }
}

/// Waits, as a task.
pub fn after(time: Duration) -> impl Future<Output = ()> + Send {
    until_ns(deadline(time))
}

/// Waits, as a task, until system time reaches `deadline_ns`.
pub fn until_ns(deadline_ns: u64) -> impl Future<Output = ()> + Send {
    crate::executor::Sleep::new(deadline_ns, now_ns as fn() -> u64)
}

/// A beat: waits, as a task, for the next multiple of a period; late is not made up for.
#[derive(Debug)]
pub struct Ticker {
    next_ns: u64,
    period_ns: u64,
}

impl Ticker {
    /// Ticks every `period`, which is at least a nanosecond, from now on.
    #[must_use]
    pub fn every(period: Duration) -> Ticker {
        let period_ns = u64::try_from(period.as_nanos()).unwrap_or(u64::MAX).max(1);
        Ticker { next_ns: now_ns().saturating_add(period_ns), period_ns }
    }

    /// The next tick.
    pub async fn tick(&mut self) {
        until_ns(self.next_ns).await;
        self.next_ns =
            self.next_ns.max(now_ns().saturating_sub(self.period_ns)).saturating_add(self.period_ns);
    }
}

//! The PV clock: vcpu_time_info in vcpu_info and the wall clock in shared_info.

use core::sync::atomic::Ordering;

use crate::domain::{Domain, Vcpu};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// First word of vcpu_time_info in vcpu_info (byte 32).
pub(super) const TIME_WORD: usize = 4;
/// Byte offset of wc_version in shared_info: behind 32 vcpu_infos and two bitmaps of 512 bytes.
const WALLCLOCK_OFFSET: usize = 32 * 64 + 2 * 512;

impl<P: Platform> Hypervisor<P> {
    /// Writes into a vCPU's vcpu_info how it tells the time.
    ///
    /// All records name the same origin, so that every vCPU computes the same time from the same ticks, to the nanosecond and the same as
    /// the hypervisor's own: records made at different moments would be rounded differently, and time would step back by one
    /// nanosecond from one vCPU to another.
    /// The version is odd while the record changes: a reader that saw an odd
    /// or a changed version reads again.
    pub fn update_vcpu_time(&self, vcpu: &Vcpu) {
        let words: [_; 4] = core::array::from_fn(|i| vcpu.info_word(&self.platform, TIME_WORD + i));
        let [Some(version), Some(stamp), Some(system), Some(scale)] = words else { return };
        let old = version.load(Ordering::Relaxed) as u32;
        let even = old.wrapping_add(old & 1);
        let time_scale = self.platform.time_scale();
        version.store(u64::from(even.wrapping_add(1)), Ordering::Release);
        core::sync::atomic::fence(Ordering::SeqCst);
        let (now, tsc) = self.platform.clock_origin();
        stamp.store(tsc, Ordering::Relaxed);
        system.store(now, Ordering::Relaxed);
        scale.store(u64::from(time_scale.mul) | u64::from(time_scale.shift as u8) << 32, Ordering::Relaxed);
        version.store(u64::from(even.wrapping_add(2)), Ordering::Release);
    }

    /// Writes the wall-clock time at boot into a domain's shared_info: version, seconds, nanoseconds, seconds' upper half.
    pub fn update_wallclock(&self, domain: &Domain) {
        let boot = self.platform.boot_wallclock_ns();
        let (seconds, nanoseconds) = (boot / 1_000_000_000, boot % 1_000_000_000);
        let frame = self.platform.frame(domain.shared_info);
        let (first, second) = (&frame[WALLCLOCK_OFFSET / 8], &frame[WALLCLOCK_OFFSET / 8 + 1]);
        let old = first.load(Ordering::Relaxed) as u32;
        let odd = old | 1;
        first.store(u64::from(odd), Ordering::Release);
        core::sync::atomic::fence(Ordering::SeqCst);
        second.store(nanoseconds | seconds >> 32 << 32, Ordering::Relaxed);
        first.store(u64::from(odd.wrapping_add(1)) | (seconds & 0xffff_ffff) << 32, Ordering::Release);
    }
}

//! Time without a hypercall: from a TSC value to system time and back (public/xen.h `vcpu_time_info`).
//!
//! One implementation of the arithmetic for both sides, so that the hypervisor's timers and a guest's clock agree to the last
//! nanosecond.

use crate::vcpu::VcpuTimeInfo;

/// Nanoseconds in a second.
pub const NS_PER_SECOND: u64 = 1_000_000_000;

/// Turns TSC differences into nanoseconds: the multiplier and shift of a [`VcpuTimeInfo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    /// Nanoseconds per shifted tick, a fraction of 2^32.
    pub multiplier: u32,
    /// Shift before the multiplication, left when positive.
    pub shift: i8,
}

impl TscScale {
    /// The scale of a counter with `hz` ticks a second, the largest multiplier that fits; `None` for 0.
    #[must_use]
    pub const fn from_frequency(hz: u64) -> Option<Self> {
        if hz == 0 {
            return None;
        }
        // Shift until hz >> shift is in (10^9, 2 * 10^9], so that the multiplier is below 2^32 and at least 2^31.
        let mut shift = 0;
        let mut ticks = hz as u128;
        while ticks > 2 * NS_PER_SECOND as u128 {
            ticks /= 2;
            shift -= 1;
        }
        while ticks <= NS_PER_SECOND as u128 {
            ticks *= 2;
            shift += 1;
        }
        // Divide with the exact frequency: hz * 2^shift ticks make 10^9 ns.
        let numerator = (NS_PER_SECOND as u128) << 64;
        let exact = if shift >= 0 { (hz as u128) << shift } else { hz as u128 };
        let multiplier =
            if shift >= 0 { (numerator / exact) >> 32 } else { ((numerator / exact) << -shift) >> 32 };
        let multiplier = if multiplier > u32::MAX as u128 { u32::MAX } else { multiplier as u32 };
        Some(TscScale { multiplier, shift })
    }

    /// Nanoseconds of a TSC difference, wrapping after 2^64.
    #[must_use]
    pub const fn to_ns(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 {
            ticks.unbounded_shl(self.shift as u32)
        } else {
            ticks.unbounded_shr(self.shift.unsigned_abs() as u32)
        };
        ((shifted as u128 * self.multiplier as u128) >> 32) as u64
    }

    /// The TSC difference after which at least `ns` have passed; saturates.
    #[must_use]
    pub const fn to_ticks(self, ns: u64) -> u64 {
        if self.multiplier == 0 {
            return u64::MAX;
        }
        let shifted = ((ns as u128) << 32).div_ceil(self.multiplier as u128);
        let ticks = if self.shift >= 0 {
            match 1_u128.checked_shl(self.shift as u32) {
                Some(divisor) => shifted.div_ceil(divisor),
                None => 1,
            }
        } else {
            // At most 2^96 times 2^32 as long as the shift is sane; beyond, no difference is long enough.
            match 1_u128.checked_shl(self.shift.unsigned_abs() as u32) {
                Some(factor) => shifted.saturating_mul(factor),
                None => u128::MAX,
            }
        };
        if ticks > u64::MAX as u128 { u64::MAX } else { ticks as u64 }
    }
}

impl VcpuTimeInfo {
    /// The scale in this record.
    #[must_use]
    pub const fn scale(&self) -> TscScale {
        TscScale { multiplier: self.tsc_to_system_mul, shift: self.tsc_shift }
    }

    /// System time in ns at a TSC value; a value from before the record counts as the record's.
    ///
    /// The record must be a consistent copy: see [`VcpuTimeInfo`] for how to get one. TSC values are compared modulo 2^64:
    /// where Xen emulates a domain's TSC, it counts from the domain's creation, and a record of before has a negative value.
    #[must_use]
    pub const fn system_time_at(&self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.tsc_timestamp);
        let passed = if ticks.cast_signed() < 0 { 0 } else { ticks };
        self.system_time.wrapping_add(self.scale().to_ns(passed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_is_a_second_at_every_frequency() {
        for hz in [
            1,
            19,
            3_579_545,
            999_999_999,
            1_000_000_000,
            1_000_000_001,
            2_000_000_000,
            2_893_437_000,
            5_000_000_000,
        ] {
            let scale = TscScale::from_frequency(hz).unwrap();
            assert!(scale.multiplier >= 1 << 31, "{hz}: {scale:?}");
            let ns = scale.to_ns(hz);
            assert!(ns.abs_diff(NS_PER_SECOND) <= 2, "{hz}: {ns}");
            let hour = scale.to_ns(hz * 3600);
            assert!(hour.abs_diff(3600 * NS_PER_SECOND) <= 3600, "{hz}: {hour}");
        }
        assert_eq!(TscScale::from_frequency(0), None);
    }

    #[test]
    fn waiting_the_ticks_is_never_too_short() {
        for hz in [3_579_545, 1_000_000_000, 2_893_437_000, 5_000_000_000] {
            let scale = TscScale::from_frequency(hz).unwrap();
            for ns in [0, 1, 2, 3, 999, 1_000_000, 12_345_678_901, 1 << 50] {
                let ticks = scale.to_ticks(ns);
                assert!(scale.to_ns(ticks) >= ns, "{hz} {ns} {ticks}");
                if let Some(less) = ticks.checked_sub(1 << scale.shift.min(0).unsigned_abs()) {
                    assert!(scale.to_ns(less) < ns.max(1), "{hz} {ns}: {ticks} is longer than needed");
                }
            }
        }
    }

    #[test]
    fn hostile_scales_do_not_panic() {
        for shift in [i8::MIN, -64, -33, 33, 64, i8::MAX] {
            for multiplier in [0, 1, u32::MAX] {
                let scale = TscScale { multiplier, shift };
                let _ = scale.to_ns(u64::MAX);
                let _ = scale.to_ticks(u64::MAX);
            }
        }
    }

    #[test]
    fn time_does_not_run_before_the_record() {
        let scale = TscScale::from_frequency(1_000_000_000).unwrap();
        let info = VcpuTimeInfo {
            tsc_timestamp: 1000,
            system_time: 5000,
            tsc_to_system_mul: scale.multiplier,
            tsc_shift: scale.shift,
            ..VcpuTimeInfo::default()
        };
        assert_eq!(info.system_time_at(999), 5000);
        assert_eq!(info.system_time_at(1100), 5100);
    }

    #[test]
    fn time_runs_from_a_record_before_the_counter_began() {
        let scale = TscScale::from_frequency(1_000_000_000).unwrap();
        let info = VcpuTimeInfo {
            tsc_timestamp: 0u64.wrapping_sub(700),
            system_time: 5000,
            tsc_to_system_mul: scale.multiplier,
            tsc_shift: scale.shift,
            ..VcpuTimeInfo::default()
        };
        assert_eq!(info.system_time_at(300), 6000);
        assert_eq!(info.system_time_at(0u64.wrapping_sub(701)), 5000);
    }
}

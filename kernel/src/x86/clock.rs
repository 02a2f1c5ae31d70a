//! Arithmetic of time: counter ticks to nanoseconds and back, without 128-bit division on hot paths.

/// Ticks per second of the ACPI power-management timer.
pub const PM_TIMER_HZ: u64 = 3_579_545;
const NS_PER_S: u128 = 1_000_000_000;

/// How counter ticks become nanoseconds: `ns = ((ticks << shift) * mul) >> 32`, a negative shift being to the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Multiplier, 32-bit fixed point, its top bit set: all the precision there is.
    pub mul: u32,
    /// Power of two applied first.
    pub shift: i8,
}

impl Scale {
    /// The scale of a counter with `hz` ticks per second (at least 1).
    #[must_use]
    pub fn of_frequency(hz: u64) -> Scale {
        // mul * 2^(shift-32) = 10^9 / hz with 2^31 <= mul < 2^32. 10^9 << 63 fits 128 bits, and so does the quotient.
        let ratio = (NS_PER_S << 64) / u128::from(hz.max(1));
        let top = 127 - i32::try_from(ratio.leading_zeros()).unwrap_or(127);
        let mul = if top >= 31 { ratio >> (top - 31) } else { ratio << (31 - top) };
        let mul = u32::try_from(mul).unwrap_or(u32::MAX);
        // ratio = ns per tick * 2^64, mul = ratio * 2^(31 - top), so shift = top - 63.
        Scale { mul, shift: i8::try_from(top - 63).unwrap_or(i8::MIN) }
    }

    /// Nanoseconds in `ticks`, rounded down, modulo 2^64 as guests compute it.
    #[must_use]
    pub fn ns(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 {
            ticks.wrapping_shl(u32::from(self.shift.unsigned_abs()))
        } else {
            ticks.wrapping_shr(u32::from(self.shift.unsigned_abs()))
        };
        let wide = u128::from(shifted).wrapping_mul(u128::from(self.mul)) >> 32;
        (wide & u128::from(u64::MAX)) as u64
    }
}

/// Ticks of a counter with `hz` ticks per second in `ns`, rounded up: a timer set to it never fires early.
#[must_use]
pub fn ticks_in(ns: u64, hz: u64) -> u64 {
    let ticks = (u128::from(ns).saturating_mul(u128::from(hz))).div_ceil(NS_PER_S);
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// Frequency of a counter that advanced by `ticks` while the PM timer advanced by `pm_ticks` (at least 1).
#[must_use]
pub fn frequency(ticks: u64, pm_ticks: u32) -> u64 {
    let hz = u128::from(ticks).saturating_mul(u128::from(PM_TIMER_HZ)) / u128::from(pm_ticks.max(1));
    u64::try_from(hz).unwrap_or(u64::MAX)
}

/// Ticks between two readings of the PM timer, which counts 24 or 32 bits and wraps.
#[must_use]
pub fn pm_elapsed(from: u32, to: u32, is_32_bit: bool) -> u32 {
    to.wrapping_sub(from) & if is_32_bit { u32::MAX } else { 0xff_ffff }
}

/// A date and time as the CMOS clock keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmosTime {
    /// Year with century.
    pub year: u32,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

impl CmosTime {
    /// Decodes raw registers; `status_b` says whether they are BCD (bit 2 clear) and 12-hour (bit 1 clear).
    #[must_use]
    pub fn decode(raw: [u8; 6], century: Option<u8>, status_b: u8) -> CmosTime {
        let plain =
            |v: u8| if status_b & 4 != 0 { v } else { (v & 0xf).wrapping_add((v >> 4).wrapping_mul(10)) };
        let [second, minute, hour_raw, day, month, year] = raw;
        let mut hour = plain(hour_raw & 0x7f);
        if status_b & 2 == 0 {
            hour = (hour % 12).wrapping_add(if hour_raw & 0x80 != 0 { 12 } else { 0 });
        }
        let century = century.map(plain).filter(|c| (19..=29).contains(c)).unwrap_or(20);
        CmosTime {
            year: u32::from(century).wrapping_mul(100).wrapping_add(u32::from(plain(year))),
            month: plain(month),
            day: plain(day),
            hour,
            minute: plain(minute),
            second: plain(second),
        }
    }

    /// Seconds since 1970 in the proleptic Gregorian calendar; nonsense fields give nonsense, never a panic.
    #[must_use]
    pub fn seconds_since_1970(self) -> u64 {
        // Days from civil date, counting years from March so that the leap day comes last.
        let (y, m) = if self.month > 2 {
            (u64::from(self.year), u64::from(self.month) - 3)
        } else {
            (u64::from(self.year).saturating_sub(1), u64::from(self.month) + 9)
        };
        let days = y * 365 + y / 4 - y / 100 + y / 400 + (m * 153 + 2) / 5 + u64::from(self.day);
        let days = days.saturating_sub(719_469);
        days * 86_400 + u64::from(self.hour) * 3600 + u64::from(self.minute) * 60 + u64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_precise_over_all_frequencies() {
        for hz in
            [1_000_000, 999_999_999, 1_000_000_000, 1_000_000_001, 2_400_000_000, 3_999_999_999, 62_500_000]
        {
            let scale = Scale::of_frequency(hz);
            assert!(scale.mul >= 1 << 31, "{hz}");
            let ns = scale.ns(hz * 10);
            assert!((9_999_999_980..=10_000_000_000).contains(&ns), "{hz}: {ns}");
        }
        assert_eq!(Scale::of_frequency(1_000_000_000), Scale { mul: 1 << 31, shift: 1 });
    }

    #[test]
    fn timers_never_fire_early() {
        assert_eq!(ticks_in(1, 1_000_000_000), 1);
        assert_eq!(ticks_in(1, 62_500_000), 1);
        assert_eq!(ticks_in(1_000_000_001, 3), 4);
        assert_eq!(ticks_in(u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn the_pm_timer_wraps_at_its_width() {
        assert_eq!(pm_elapsed(0xff_fff0, 0x10, false), 0x20);
        assert_eq!(pm_elapsed(0xff_fff0, 0x10, true), 0xff00_0020);
        assert_eq!(frequency(1_000_000, 3580), 999_872_905);
    }

    #[test]
    fn cmos_dates() {
        let t = CmosTime::decode([0x59, 0x30, 0x23, 0x29, 0x02, 0x24], Some(0x20), 2);
        assert_eq!(t, CmosTime { year: 2024, month: 2, day: 29, hour: 23, minute: 30, second: 59 });
        assert_eq!(t.seconds_since_1970(), 1_709_249_459);
        assert_eq!(CmosTime::decode([0, 0, 0x92, 1, 1, 70], Some(19), 4).hour, 18);
        let epoch = CmosTime { year: 1970, month: 1, day: 1, hour: 0, minute: 0, second: 0 };
        assert_eq!(epoch.seconds_since_1970(), 0);
        let junk = CmosTime { year: 0, month: 0, day: 0, hour: 255, minute: 255, second: 255 };
        let _ = junk.seconds_since_1970();
    }
}

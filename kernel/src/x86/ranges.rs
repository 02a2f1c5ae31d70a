//! Free machine memory during boot: a short sorted list of ranges that only shrinks.

use arrayvec::ArrayVec;

/// Most separate ranges.
pub const MAX_RANGES: usize = 192;

/// Half-open ranges of machine addresses, sorted, apart from each other, whole pages.
#[derive(Clone, Debug, Default)]
pub struct FreeRanges {
    ranges: ArrayVec<(u64, u64), MAX_RANGES>,
}

/// There was no place in the list: boot memory is in more pieces than any real machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyRanges;

impl FreeRanges {
    /// Adds the whole pages of a range; what is there already may overlap.
    ///
    /// # Errors
    /// [`TooManyRanges`]: nothing was added.
    pub fn add(&mut self, start: u64, end: u64) -> Result<(), TooManyRanges> {
        let (mut start, mut end) = (start.checked_next_multiple_of(4096).unwrap_or(u64::MAX), end & !0xfff);
        if start >= end {
            return Ok(());
        }
        self.ranges.retain(|&mut (s, e)| {
            let touches = s <= end && start <= e;
            if touches {
                (start, end) = (start.min(s), end.max(e));
            }
            !touches
        });
        let at = self.ranges.iter().position(|&(s, _)| s > start).unwrap_or(self.ranges.len());
        self.ranges.try_insert(at, (start, end)).map_err(|_| TooManyRanges)
    }

    /// Takes out every page that a range touches.
    ///
    /// # Errors
    /// [`TooManyRanges`] when a hole would split a range and there is no place for the second half.
    pub fn remove(&mut self, start: u64, end: u64) -> Result<(), TooManyRanges> {
        let (start, end) = (start & !0xfff, end.checked_next_multiple_of(4096).unwrap_or(!0xfff));
        if start >= end {
            return Ok(());
        }
        let mut split = None;
        for range in &mut self.ranges {
            let (s, e) = *range;
            if s >= end || e <= start {
                continue;
            }
            *range = match (s < start, e > end) {
                (true, true) => {
                    split = Some((end, e));
                    (s, start)
                }
                (true, false) => (s, start),
                (false, true) => (end, e),
                (false, false) => (0, 0),
            };
        }
        self.ranges.retain(|&mut (s, e)| s < e);
        match split {
            Some((s, e)) => self.add(s, e),
            None => Ok(()),
        }
    }

    /// Takes `len` bytes (whole pages) at a multiple of `align`, as high as possible below `limit`.
    pub fn take(&mut self, len: u64, align: u64, limit: u64) -> Option<u64> {
        let len = len.checked_next_multiple_of(4096)?;
        let align = align.max(4096);
        let found = self.ranges.iter().rev().find_map(|&(s, e)| {
            let at = e.min(limit).checked_sub(len)?;
            let at = at.checked_sub(at.checked_rem(align)?)?;
            (at >= s).then_some(at)
        })?;
        self.remove(found, found.checked_add(len)?).ok()?;
        Some(found)
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().copied()
    }

    /// Bytes in all ranges.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.iter().fold(0, |sum, (s, e)| sum.wrapping_add(e.wrapping_sub(s)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn list(r: &FreeRanges) -> Vec<(u64, u64)> {
        r.iter().collect()
    }

    #[test]
    fn adding_keeps_whole_pages_and_merges() {
        let mut r = FreeRanges::default();
        r.add(0x10_0001, 0x20_0fff).unwrap();
        assert_eq!(list(&r), [(0x10_1000, 0x20_0000)]);
        r.add(0x30_0000, 0x40_0000).unwrap();
        r.add(0, 0x1000).unwrap();
        r.add(0x1f_f000, 0x30_0000).unwrap();
        assert_eq!(list(&r), [(0, 0x1000), (0x10_1000, 0x40_0000)]);
        r.add(0x500, 0x600).unwrap();
        assert_eq!(r.total(), 0x30_0000);
    }

    #[test]
    fn removing_takes_every_page_that_is_touched() {
        let mut r = FreeRanges::default();
        r.add(0, 0x1_0000).unwrap();
        r.remove(0x2fff, 0x3001).unwrap();
        assert_eq!(list(&r), [(0, 0x2000), (0x4000, 0x1_0000)]);
        r.remove(0, 0x1_0000).unwrap();
        assert_eq!(list(&r), vec![]);
    }

    #[test]
    fn taking_is_high_aligned_and_below_the_limit() {
        let mut r = FreeRanges::default();
        r.add(0x10_0000, 0x80_0000).unwrap();
        r.add(0x1_0000_0000, 0x2_0000_0000).unwrap();
        assert_eq!(r.take(0x1000, 0, 1 << 32), Some(0x7f_f000));
        assert_eq!(r.take(0x1001, 0x20_0000, 1 << 32), Some(0x60_0000));
        assert_eq!(r.take(0x1000, 0, u64::MAX), Some(0x1_ffff_f000));
        assert_eq!(r.take(0x100_0000, 0, 1 << 32), None);
        assert_eq!(
            list(&r),
            [(0x10_0000, 0x60_0000), (0x60_2000, 0x7f_f000), (0x1_0000_0000, 0x1_ffff_f000)]
        );
    }

    #[test]
    fn a_full_list_is_an_error() {
        let mut r = FreeRanges::default();
        for i in 0..MAX_RANGES as u64 {
            r.add(i * 0x1_0000, i * 0x1_0000 + 0x3000).unwrap();
        }
        assert_eq!(r.add(1 << 40, (1 << 40) + 0x1000), Err(TooManyRanges));
        assert_eq!(r.remove(0x1000, 0x2000), Err(TooManyRanges));
    }
}

//! RAM that nobody has had since power-on: firmware and boot loader have left things in it.
//!
//! It is kept apart from the free lists as a few ranges, so that it can be scrubbed from one end to the other by CPUs that have
//! nothing else to do, without taking blocks of the free lists to pieces. What is wanted before that is scrubbed when it is given out.

use core::ops::Range;

use arrayvec::ArrayVec;

/// Most separate ranges. A memory map has a handful of holes.
const MOST: usize = 32;

/// Ranges of frames that are on no list, in the order in which they were added.
#[derive(Default)]
pub(super) struct FirmwareRam {
    ranges: ArrayVec<Range<u64>, MOST>,
}

/// There was no place for another range.
#[derive(Debug)]
pub(super) struct Full;

impl FirmwareRam {
    /// Adds a range.
    pub(super) fn add(&mut self, frames: Range<u64>) -> Result<(), Full> {
        if frames.is_empty() {
            return Ok(());
        }
        self.ranges.try_push(frames).map_err(|_| Full)
    }

    /// Takes `size` frames, a power of two, aligned to it and below `limit`: the highest of the last range that has such a block. What
    /// lies around it stays.
    pub(super) fn take_block(&mut self, size: u64, limit: u64) -> Option<Range<u64>> {
        let block = |range: &Range<u64>| {
            let end = range.end.min(limit) & !(size - 1);
            end.checked_sub(size).filter(|start| *start >= range.start).map(|start| start..end)
        };
        let (at, block) =
            self.ranges.iter().enumerate().rev().find_map(|(at, range)| Some((at, block(range)?)))?;
        let is_full = self.ranges.is_full();
        let range = self.ranges.get_mut(at)?;
        let (below, above) = (range.start..block.start, block.end..range.end);
        if below.is_empty() {
            *range = above;
        } else if above.is_empty() {
            *range = below;
        } else if is_full {
            // No place for a hole.
            return None;
        } else {
            *range = below;
            self.ranges.push(above);
        }
        self.ranges.retain(|range| !range.is_empty());
        Some(block)
    }

    /// Takes at most `most` frames, a power of two, that lie between two of its multiples and of which the first is below `limit`.
    pub(super) fn take_some(&mut self, most: u64, limit: u64) -> Option<Range<u64>> {
        let at = self.ranges.iter().rposition(|range| range.start < limit)?;
        let range = self.ranges.get_mut(at)?;
        let taken = if range.end <= limit {
            let start = ((range.end - 1) & !(most - 1)).max(range.start);
            let taken = start..range.end;
            range.end = start;
            taken
        } else {
            let end = ((range.start + most) & !(most - 1)).min(range.end);
            let taken = range.start..end;
            range.start = end;
            taken
        };
        self.ranges.retain(|range| !range.is_empty());
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn each_frame_is_taken_once_in_aligned_portions() {
        for (most, limit) in
            [(1, u64::MAX), (16, u64::MAX), (1024, u64::MAX), (16, 700), (1024, 700), (1024, 2050)]
        {
            let mut ram = FirmwareRam::default();
            let ranges = [3..640, 641..642, 660..3000];
            for range in ranges.clone() {
                ram.add(range).expect("there is room");
            }
            let mut taken = Vec::new();
            let mut take = |limit| {
                while let Some(portion) = ram.take_some(most, limit) {
                    assert!(!portion.is_empty() && portion.start < limit);
                    assert_eq!(
                        portion.start / most,
                        (portion.end - 1) / most,
                        "{portion:?} crosses a multiple of {most}"
                    );
                    taken.extend(portion);
                }
                let mut sorted = taken.clone();
                sorted.sort_unstable();
                sorted
            };
            let below = take(limit);
            let all: Vec<u64> = ranges.into_iter().flatten().collect();
            assert!(all.iter().filter(|frame| **frame < limit).all(|frame| below.contains(frame)));
            assert!(below.iter().all(|frame| *frame < limit.saturating_add(most)));
            assert_eq!(take(u64::MAX), all);
        }
    }

    #[test]
    fn blocks_are_taken_whole_and_from_above() {
        let mut ram = FirmwareRam::default();
        ram.add(3..100).expect("there is room");
        ram.add(4000..8200).expect("there is room");
        assert_eq!(ram.take_block(1024, u64::MAX), Some(7168..8192));
        assert_eq!(ram.take_block(1024, u64::MAX), Some(6144..7168));
        assert_eq!(ram.take_block(1024, 5000), None, "4096..5120 is not below it");
        assert_eq!(ram.take_block(64, 5000), Some(4928..4992));
        assert_eq!(ram.take_block(32, 4000), Some(64..96));
        assert_eq!(ram.take_block(64, 4000), None, "3..64 and 96..100 are left");
        assert_eq!(ram.take_some(64, 4000), Some(96..100));
    }

    #[test]
    fn a_block_that_would_leave_too_many_holes_is_not_taken() {
        let mut ram = FirmwareRam::default();
        for n in 0..MOST as u64 {
            ram.add(100 * n + 1..100 * n + 99).expect("there is room");
        }
        assert_eq!(ram.take_block(16, u64::MAX), None);
        assert_eq!(ram.take_some(16, u64::MAX), Some(3184..3199));
        assert_eq!(ram.take_block(16, u64::MAX), Some(3168..3184));
    }

    #[test]
    fn more_holes_than_it_has_places_for_are_refused() {
        let mut ram = FirmwareRam::default();
        for n in 0..MOST as u64 {
            ram.add(2 * n..2 * n + 1).expect("there is room");
        }
        assert!(ram.add(1000..1001).is_err());
        assert!(ram.add(1000..1000).is_ok());
    }
}

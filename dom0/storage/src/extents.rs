//! A disk that is a part of another: a partition, or the places where a file lies.

use crate::SECTOR;
use crate::joint::Joint;
use alloc::vec::Vec;
use blkback::disk::{Action, Disk, DiskError, Done, GuestPage, Job, Properties};
use core::fmt;
use core::task::{Context, Poll};

/// Sectors that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The first of them in the part.
    first: u64,
    /// The same in the whole.
    at: u64,
    sectors: u64,
}

/// Where the sectors of a part are in the whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    /// In the order of the part; none is empty.
    runs: Vec<Run>,
    sectors: u64,
}

/// Places that are not in the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside;

impl fmt::Display for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is said to lie beyond the end of the device")
    }
}

impl Extents {
    /// One run.
    ///
    /// # Errors
    /// When it is not inside of `whole` sectors.
    pub fn one(at: u64, sectors: u64, whole: u64) -> Result<Self, Outside> {
        let mut extents = Self::default();
        extents.push(at, sectors, whole)?;
        Ok(extents)
    }

    /// Adds sectors at the end of the part.
    ///
    /// # Errors
    /// When they are not inside of `whole` sectors.
    pub fn push(&mut self, at: u64, sectors: u64, whole: u64) -> Result<(), Outside> {
        if at.checked_add(sectors).is_none_or(|end| end > whole) {
            return Err(Outside);
        }
        let first = self.sectors;
        match self.runs.last_mut() {
            _ if sectors == 0 => return Ok(()),
            Some(last) if last.at + last.sectors == at => last.sectors += sectors,
            _ => self.runs.push(Run { first, at, sectors }),
        }
        self.sectors += sectors;
        Ok(())
    }

    /// How many sectors the part has.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// In how many pieces it lies.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.runs.len()
    }

    /// Where it lies in the whole: first sector and number of each run.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        self.runs.iter().map(|run| (run.at, run.sectors))
    }

    /// The same places, said of what the whole is a part of.
    ///
    /// # Errors
    /// When they are not inside of `outer`.
    pub fn within(&self, outer: &Extents, whole: u64) -> Result<Self, Outside> {
        let mut extents = Self::default();
        for run in &self.runs {
            let mut found = 0;
            for (at, sectors) in outer.parts(run.at, run.sectors) {
                extents.push(at, sectors, whole)?;
                found += sectors;
            }
            if found != run.sectors {
                return Err(Outside);
            }
        }
        Ok(extents)
    }

    /// Whether a part begins with all of `other`, at the same places.
    #[must_use]
    pub fn begins_with(&self, other: &Extents) -> bool {
        self.parts(0, other.sectors).eq(other.runs())
    }

    /// Where sectors of the part are: first sector and number, in order.
    pub fn parts(&self, sector: u64, sectors: u64) -> impl Iterator<Item = (u64, u64)> {
        // The last run that begins at or before the sector.
        let begin = self.runs.partition_point(|run| run.first <= sector).saturating_sub(1);
        let end = sector.saturating_add(sectors);
        self.runs.iter().skip(begin).take_while(move |run| run.first < end).filter_map(move |run| {
            let from = sector.max(run.first);
            let to = end.min(run.first + run.sectors);
            (from < to).then(|| (run.at + (from - run.first), to - from))
        })
    }
}

/// A part of a disk as a disk.
pub struct Window<P, D> {
    below: D,
    extents: Extents,
    joint: Joint<P>,
}

impl<P, D> fmt::Debug for Window<P, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("extents", &self.extents).finish_non_exhaustive()
    }
}

impl<P: GuestPage, D: Disk<P>> Window<P, D> {
    /// The sectors of `below` that `extents` says.
    pub fn new(below: D, extents: Extents) -> Self {
        Self { below, extents, joint: Joint::default() }
    }

    /// Has it grow: `extents` are its sectors, and more behind them.
    ///
    /// # Errors
    /// [`Outside`] when those that it has are not where they were: it stays as it was.
    pub fn extend(&mut self, extents: Extents) -> Result<(), Outside> {
        if !extents.begins_with(&self.extents) {
            return Err(Outside);
        }
        self.extents = extents;
        Ok(())
    }
}

impl<P: GuestPage, D: Disk<P>> Disk<P> for Window<P, D> {
    fn properties(&self) -> Properties {
        let below = self.below.properties();
        // Discarding cuts at its granularity, which a file's places do not keep to.
        let discard_granularity = below.discard_granularity.filter(|_| self.extents.pieces() == 1);
        Properties { sectors: self.extents.sectors(), discard_granularity, ..below }
    }

    fn submit(&mut self, job: Job<P>) -> Option<Done<P>> {
        let sectors = match job.action {
            Action::Read | Action::Write => {
                job.pieces.iter().map(|piece| usize::from(piece.bytes)).sum::<usize>() / SECTOR
            }
            Action::Discard { sectors } => sectors as usize,
            Action::Flush => {
                let number = self.joint.begin(job);
                let whole = self.joint.whole(number, 0, 0);
                return self.run(number, whole);
            }
        } as u64;
        let sector = job.sector;
        let discard = matches!(job.action, Action::Discard { .. });
        let number = self.joint.begin(job);
        let mut parts = self.extents.parts(sector, sectors);
        let first = parts.next();
        match first {
            Some((at, all)) if all == sectors => {
                drop(parts);
                let whole = self.joint.whole(number, 0, at);
                self.run(number, whole)
            }
            // The size of a discard is not in its pieces.
            _ if discard => fail(&mut self.joint, number, DiskError::Unsupported),
            _ => {
                let mut skip = 0;
                for (at, sectors) in first.into_iter().chain(parts) {
                    if let Some(part) = self.joint.part(number, 0, at, skip, sectors)
                        && let Some(done) = self.below.submit(part)
                    {
                        // The last is the one that is finished below.
                        let _ = self.joint.land(done);
                    }
                    skip += sectors;
                }
                if skip == sectors {
                    self.joint.finish(number)
                } else {
                    fail(&mut self.joint, number, DiskError::Failed)
                }
            }
        }
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<P>> {
        while let Poll::Ready(done) = self.below.poll_done(context) {
            if let Some(done) = self.joint.land(done) {
                return Poll::Ready(done);
            }
        }
        Poll::Pending
    }
}

impl<P: GuestPage, D: Disk<P>> Window<P, D> {
    /// Hands a job on as a whole.
    fn run(&mut self, number: u32, whole: Option<Job<P>>) -> Option<Done<P>> {
        if let Some(done) = whole.and_then(|whole| self.below.submit(whole)) {
            let _ = self.joint.land(done);
        }
        self.joint.finish(number)
    }
}

/// Ends a job with an error once its parts are back.
pub(crate) fn fail<P: Clone>(joint: &mut Joint<P>, number: u32, error: DiskError) -> Option<Done<P>> {
    joint.spoil(number, error);
    joint.finish(number)
}

#[cfg(test)]
mod tests {
    use super::{Extents, Outside};
    use alloc::vec::Vec;

    #[test]
    fn sectors_are_found_in_their_runs() {
        let mut extents = Extents::default();
        for (at, sectors) in [(100, 8), (108, 2), (50, 4), (200, 0), (60, 4)] {
            assert_eq!(extents.push(at, sectors, 1000), Ok(()));
        }
        assert_eq!((extents.sectors(), extents.pieces()), (18, 3), "neighbours are one run");
        let of = |sector, sectors| extents.parts(sector, sectors).collect::<Vec<_>>();
        assert_eq!(of(0, 10), [(100, 10)]);
        assert_eq!(of(9, 2), [(109, 1), (50, 1)]);
        assert_eq!(of(9, 9), [(109, 1), (50, 4), (60, 4)]);
        assert_eq!(of(14, 1), [(60, 1)]);
        assert_eq!(of(17, 5), [(63, 1)]);
        assert_eq!(of(18, 1), []);
        assert_eq!(of(u64::MAX, 9), []);
        assert_eq!(Extents::default().parts(0, 1).count(), 0);
    }

    #[test]
    fn nothing_lies_beyond_the_whole() {
        assert_eq!(Extents::one(0, 10, 10).map(|extents| extents.sectors()), Ok(10));
        for (at, sectors) in [(0, 11), (10, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(Extents::one(at, sectors, 10), Err(Outside));
        }
    }

    #[test]
    fn places_in_a_partition_are_places_on_the_device() {
        let partition = Extents::one(1000, 100, 2000).unwrap();
        let mut file = Extents::default();
        file.push(90, 10, 100).unwrap();
        file.push(3, 2, 100).unwrap();
        let on_device = file.within(&partition, 2000).unwrap();
        assert_eq!(on_device.runs().collect::<Vec<_>>(), [(1090, 10), (1003, 2)]);
        let mut beyond = Extents::default();
        beyond.push(95, 6, 200).unwrap();
        assert_eq!(beyond.within(&partition, 2000), Err(Outside));
    }
}

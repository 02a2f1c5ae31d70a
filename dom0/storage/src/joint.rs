//! Jobs that are done in parts.

use crate::SECTOR;
use alloc::vec::Vec;
use blkback::disk::{DiskError, Done, Job, Piece};

/// A job, and what is known of its parts.
struct Flight<P> {
    job: Job<P>,
    /// Parts that are not done, and one for who still adds some.
    left: u32,
    result: Result<(), DiskError>,
    /// Its pieces went with its only part, and come back with it.
    lent: bool,
}

/// The jobs that a disk has cut into parts for others.
pub(crate) struct Joint<P> {
    flights: Vec<Option<Flight<P>>>,
    free: Vec<u32>,
    /// Kept for their memory.
    spare: Vec<Vec<Piece<P>>>,
}

impl<P> Default for Joint<P> {
    fn default() -> Self {
        Self { flights: Vec::new(), free: Vec::new(), spare: Vec::new() }
    }
}

impl<P: Clone> Joint<P> {
    /// Takes a job; it is done when it is [`finish`](Self::finish)ed and all its parts are.
    pub fn begin(&mut self, job: Job<P>) -> u32 {
        let flight = Flight { job, left: 1, result: Ok(()), lent: false };
        let number = self.free.pop().unwrap_or(self.flights.len() as u32);
        match self.flights.get_mut(number as usize) {
            Some(slot) => *slot = Some(flight),
            None => self.flights.push(Some(flight)),
        }
        number
    }

    /// The job as a whole, to be done at `sector` of another disk. Its parts have the owner `(tag, number)`.
    pub fn whole(&mut self, number: u32, tag: u32, sector: u64) -> Option<Job<P>> {
        let flight = self.flights.get_mut(number as usize)?.as_mut()?;
        flight.left += 1;
        flight.lent = true;
        let pieces = core::mem::take(&mut flight.job.pieces);
        Some(Job { owner: (tag, number), action: flight.job.action, sector, pieces })
    }

    /// So many of its sectors, from the `skip`th on, to be done at `sector` of another disk.
    pub fn part(&mut self, number: u32, tag: u32, sector: u64, skip: u64, sectors: u64) -> Option<Job<P>> {
        let mut pieces = self.spare.pop().unwrap_or_default();
        let flight = self.flights.get_mut(number as usize)?.as_mut()?;
        flight.left += 1;
        cut(&flight.job.pieces, skip, sectors, &mut pieces);
        Some(Job { owner: (tag, number), action: flight.job.action, sector, pieces })
    }

    /// The pages of such a part, for who fills them himself.
    pub fn pages(&mut self, number: u32, skip: u64, sectors: u64, work: impl FnOnce(&[Piece<P>])) {
        let mut pieces = self.spare.pop().unwrap_or_default();
        if let Some(Some(flight)) = self.flights.get(number as usize) {
            cut(&flight.job.pieces, skip, sectors, &mut pieces);
        }
        work(&pieces);
        self.keep(pieces);
    }

    /// A part is done; gives the job if it was the last.
    pub fn land(&mut self, done: Done<P>) -> Option<Done<P>> {
        let number = done.job.owner.1;
        if let Some(Some(flight)) = self.flights.get_mut(number as usize) {
            flight.result = flight.result.and(done.result);
            if core::mem::take(&mut flight.lent) {
                flight.job.pieces = done.job.pieces;
            } else {
                self.keep(done.job.pieces);
            }
        }
        self.finish(number)
    }

    /// It has failed, whatever its parts say.
    pub fn spoil(&mut self, number: u32, error: DiskError) {
        if let Some(Some(flight)) = self.flights.get_mut(number as usize) {
            flight.result = Err(error);
        }
    }

    /// No more parts will come; gives the job if all are done.
    pub fn finish(&mut self, number: u32) -> Option<Done<P>> {
        let slot = self.flights.get_mut(number as usize)?;
        let flight = slot.as_mut()?;
        flight.left -= 1;
        if flight.left > 0 {
            return None;
        }
        let flight = slot.take()?;
        self.free.push(number);
        Some(Done { job: flight.job, result: flight.result })
    }

    fn keep(&mut self, mut pieces: Vec<Piece<P>>) {
        pieces.clear();
        if pieces.capacity() > 0 && self.spare.len() < 64 {
            self.spare.push(pieces);
        }
    }
}

/// The pieces of some sectors.
fn cut<P: Clone>(all: &[Piece<P>], skip: u64, sectors: u64, to: &mut Vec<Piece<P>>) {
    let (mut skip, mut left) = (skip as usize * SECTOR, sectors as usize * SECTOR);
    for piece in all {
        let bytes = usize::from(piece.bytes);
        if skip >= bytes {
            skip -= bytes;
            continue;
        }
        if left == 0 {
            return;
        }
        let now = (bytes - skip).min(left);
        to.push(Piece { page: piece.page.clone(), offset: piece.offset + skip as u16, bytes: now as u16 });
        left -= now;
        skip = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::{Joint, cut};
    use alloc::vec::Vec;
    use blkback::disk::{Action, DiskError, Done, Job, Piece};

    fn piece(page: char, offset: u16, bytes: u16) -> Piece<char> {
        Piece { page, offset, bytes }
    }

    #[test]
    fn pieces_are_cut_at_sectors() {
        let all = [piece('a', 512, 1024), piece('b', 0, 4096), piece('c', 3584, 512)];
        let of = |skip, sectors| {
            let mut to = Vec::new();
            cut(&all, skip, sectors, &mut to);
            to.iter().map(|piece| (piece.page, piece.offset, piece.bytes)).collect::<Vec<_>>()
        };
        assert_eq!(of(0, 1), [('a', 512, 512)]);
        assert_eq!(of(1, 2), [('a', 1024, 512), ('b', 0, 512)]);
        assert_eq!(of(2, 9), [('b', 0, 4096), ('c', 3584, 512)]);
        assert_eq!(of(10, 1), [('c', 3584, 512)]);
        assert_eq!(of(11, 1), []);
    }

    #[test]
    fn a_job_is_done_when_all_parts_are_and_fails_with_any() {
        let job =
            |owner| Job { owner, action: Action::Read, sector: 9, pieces: [piece('a', 0, 4096)].into() };
        let mut joint = Joint::default();
        let number = joint.begin(job((7, 8)));
        let one = joint.part(number, 0, 100, 0, 3).expect("a part");
        let two = joint.part(number, 0, 300, 3, 5).expect("a part");
        assert_eq!((one.sector, one.pieces[0].bytes, two.pieces[0].offset), (100, 1536, 1536));
        assert!(joint.land(Done { job: two, result: Err(DiskError::Failed) }).is_none());
        assert!(joint.finish(number).is_none());
        let done = joint.land(Done { job: one, result: Ok(()) }).expect("the last");
        assert_eq!((done.job.owner, done.job.sector, done.result), ((7, 8), 9, Err(DiskError::Failed)));
        // The whole is not copied.
        let number = joint.begin(job((1, 2)));
        let whole = joint.whole(number, 0, 44).expect("a part");
        assert!(joint.finish(number).is_none());
        let done = joint.land(Done { job: whole, result: Ok(()) }).expect("the last");
        assert_eq!((done.job.sector, done.job.pieces.len()), (9, 1));
    }
}

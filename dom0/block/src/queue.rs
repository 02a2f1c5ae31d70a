//! One ring: from its requests to its responses.
//!
//! A turn takes what has come, maps all pages that are not mapped yet at once, hands the work to the disk, unmaps what is done with
//! at once, and publishes all responses at once. A front end that sees its request answered finds its pages unmapped, unless they
//! are kept. A transfer whose pages are all kept goes to the disk as soon as it is judged, in one pass over its segments.
//!
//! A flush waits until all that came before it in this ring is done, and what comes behind it waits for it; so does a write
//! barrier, which is a flush, the write, and another flush.

use crate::disk::{Action, Disk, DiskError, Done, GuestPage, Job, Piece, Properties};
use crate::grants::{Cache, Mapper, Wanted};
use crate::request::{self, Fault, Identity, Segments, Work};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use guest_sdk::ring::{Back, Corrupt, SharedPage};
use hypercall_abi::GrantRef;
use hypercall_abi::io::blkif::{
    BlkifRequest, BlkifResponse, BlkifSegment, MAX_INDIRECT_PAGES_PER_REQUEST, RSP_EOPNOTSUPP, RSP_ERROR,
    RSP_OKAY, SECTOR_SIZE, SEGMENTS_PER_INDIRECT_PAGE,
};
use zerocopy::IntoBytes;

/// Requests taken from one ring before others get their turn.
pub const REQUESTS_PER_TURN: u32 = 32;

/// The front end broke the ring: nothing that it says counts any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl From<Corrupt> for Closed {
    fn from(_: Corrupt) -> Self {
        Closed
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an index of its ring is out of range")
    }
}

impl core::error::Error for Closed {}

/// What was done, since the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests taken.
    pub requests: u64,
    /// Sectors read.
    pub sectors_read: u64,
    /// Sectors written.
    pub sectors_written: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// A transfer that was taken and not handed on yet.
struct Taken {
    id: u64,
    operation: u8,
    write: bool,
    ordered: bool,
    sector: u64,
    /// Its segments are so many of the turn's.
    segments: usize,
}

/// A request that the disk works on.
struct Flight<P> {
    id: u64,
    operation: u8,
    /// Pages that were mapped for it alone.
    own: Vec<P>,
    /// It is the one that all others wait for.
    ordered: bool,
}

/// A request that waits for all before it, while all behind it wait.
struct Ordered<P> {
    id: u64,
    operation: u8,
    /// What is still to be done, the next one last.
    jobs: Vec<Job<P>>,
    own: Vec<P>,
}

pub(crate) struct Queue<M, P> {
    number: u32,
    ring: Back<M, BlkifRequest, BlkifResponse>,
    identity: Identity,
    cache: Cache<P>,
    flights: Vec<Option<Flight<P>>>,
    free: Vec<u32>,
    open: usize,
    ordered: Option<Ordered<P>>,
    /// Responses that the front end has not been shown.
    unpublished: bool,
    /// The first thing that was wrong, until somebody asks.
    fault: Option<Fault>,
    faulty: bool,
    pub counters: Counters,
    // Kept for their memory.
    taken: Vec<Taken>,
    segments: Vec<BlkifSegment>,
    wanted: Vec<Wanted>,
    mapped: Vec<Option<P>>,
    fresh: VecDeque<(GrantRef, Option<P>)>,
    unused: Vec<P>,
    spare: Vec<Vec<Piece<P>>>,
}

impl<M: SharedPage, P: GuestPage> Queue<M, P> {
    pub fn new(number: u32, page: M, identity: Identity, most_kept: usize) -> Self {
        Self {
            number,
            ring: Back::new(page),
            identity,
            cache: Cache::new(most_kept),
            flights: Vec::new(),
            free: Vec::new(),
            open: 0,
            ordered: None,
            unpublished: false,
            fault: None,
            faulty: false,
            counters: Counters::default(),
            taken: Vec::new(),
            segments: Vec::new(),
            wanted: Vec::new(),
            mapped: Vec::new(),
            fresh: VecDeque::new(),
            unused: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Takes requests and hands their work to the disk; true when there may be more.
    pub fn take<G: Mapper<Page = P>>(
        &mut self,
        disk: &mut impl Disk<P>,
        mapper: &mut G,
    ) -> Result<bool, Closed> {
        if self.ordered.is_some() {
            return Ok(false);
        }
        let properties = disk.properties();
        self.cache.next_turn();
        // Whether the ring may hold more than was looked at.
        let mut more = true;
        for _ in 0..REQUESTS_PER_TURN {
            let Some(raw) = self.ring.pop()? else {
                more = false;
                break;
            };
            self.counters.requests += 1;
            match self.judge(&raw, &properties, mapper) {
                Ok(Some(job)) => self.submit(job, &raw, disk),
                Ok(None) => {}
                Err(fault) => self.refuse(raw.id, raw.operation, fault),
            }
            // What waits for all before it is the last that is taken.
            if self.ordered.is_some() || self.taken.last().is_some_and(|taken| taken.ordered) {
                break;
            }
        }
        if !self.taken.is_empty() {
            self.map_segments(mapper);
            self.hand_on(disk);
        }
        if self.open == 0
            && let Some(job) = self.next_ordered()
            && let Some(done) = disk.submit(job)
        {
            self.settle(done, disk);
        }
        // What is behind a request that waits has to wait, too: there is more once that is done.
        Ok(more && self.ordered.is_none())
    }

    /// Judges a request. A discard and a transfer whose pages are kept are jobs at once; another transfer is put down in `taken`, with
    /// its segments; a flush is `ordered`.
    fn judge<G: Mapper<Page = P>>(
        &mut self,
        raw: &BlkifRequest,
        properties: &Properties,
        mapper: &mut G,
    ) -> Result<Option<Job<P>>, Fault> {
        match request::decode(raw, self.identity, properties)? {
            Work::Transfer { write, ordered, sector, segments } => {
                let first = self.segments.len();
                match segments {
                    Segments::Direct(count) => {
                        self.segments.extend_from_slice(raw.seg.get(..count).unwrap_or(&[]));
                    }
                    Segments::Indirect { pages, count } => self.read_segments(&pages, count, mapper)?,
                }
                let action = if write { Action::Write } else { Action::Read };
                let mut job = self.job(action, sector);
                let found = self.find_pieces(first, &mut job.pieces);
                let checked = found.and_then(|(sectors, all)| {
                    request::check_range(sector, sectors, properties).map(|()| (sectors, all))
                });
                let all = match checked {
                    Ok((sectors, all)) => {
                        let counter = match write {
                            true => &mut self.counters.sectors_written,
                            false => &mut self.counters.sectors_read,
                        };
                        *counter += sectors;
                        all
                    }
                    Err(fault) => {
                        self.recycle(job);
                        self.segments.truncate(first);
                        return Err(fault);
                    }
                };
                if all && !ordered {
                    self.segments.truncate(first);
                    return Ok(Some(job));
                }
                self.recycle(job);
                self.taken.push(Taken {
                    id: raw.id,
                    operation: raw.operation,
                    write,
                    ordered,
                    sector,
                    segments: self.segments.len() - first,
                });
                Ok(None)
            }
            Work::Flush => {
                let jobs = Vec::from([self.job(Action::Flush, 0)]);
                self.ordered = Some(Ordered { id: raw.id, operation: raw.operation, jobs, own: Vec::new() });
                Ok(None)
            }
            Work::Discard { sector, sectors } => Ok(Some(self.job(Action::Discard { sectors }, sector))),
        }
    }

    /// Judges the segments from `first` on, and fills `pieces` with them. Tells how many sectors they are, and whether the pages of all are
    /// kept: otherwise only some of the pieces are there.
    fn find_pieces(&mut self, first: usize, pieces: &mut Vec<Piece<P>>) -> Result<(u64, bool), Fault> {
        let segments = self.segments.get(first..).unwrap_or(&[]);
        let (mut total, mut all) = (0, true);
        pieces.reserve(segments.len());
        for segment in segments {
            let sectors = segment.sectors().ok_or(Fault::Segments)?;
            total += u64::from(sectors);
            match self.cache.take(segment.gref) {
                Some(page) => pieces.push(piece(page, segment, sectors)),
                None => all = false,
            }
        }
        Ok((total, all))
    }

    fn job(&mut self, action: Action, sector: u64) -> Job<P> {
        Job { owner: (self.number, 0), action, sector, pieces: self.spare.pop().unwrap_or_default() }
    }

    /// Copies the segments of an indirect request out of their pages, once.
    fn read_segments<G: Mapper<Page = P>>(
        &mut self,
        pages: &[GrantRef; MAX_INDIRECT_PAGES_PER_REQUEST],
        count: usize,
        mapper: &mut G,
    ) -> Result<(), Fault> {
        let first = self.segments.len();
        self.segments.resize(first + count, BlkifSegment::default());
        let mut result = Ok(());
        for (number, &reference) in pages.iter().take(count.div_ceil(SEGMENTS_PER_INDIRECT_PAGE)).enumerate()
        {
            let known = if self.cache.touch(reference) { self.cache.get(reference) } else { None };
            let page = known.or_else(|| self.map_one(reference, mapper));
            let start = first + number * SEGMENTS_PER_INDIRECT_PAGE;
            let end = (start + SEGMENTS_PER_INDIRECT_PAGE).min(first + count);
            match (page, self.segments.get_mut(start..end)) {
                (Some(page), Some(segments)) => {
                    page.read_bytes(0, segments.as_mut_bytes());
                }
                _ => result = Err(Fault::Grant),
            }
        }
        if result.is_err() {
            self.segments.truncate(first);
        }
        result
    }

    /// Maps a page of segments; if it is not kept, it is unmapped when the turn ends.
    fn map_one<G: Mapper<Page = P>>(&mut self, reference: GrantRef, mapper: &mut G) -> Option<P> {
        let mut mapped = core::mem::take(&mut self.mapped);
        mapper.map(&[Wanted { reference, writable: self.cache.is_on() }], &mut mapped);
        let page = mapped.pop().flatten();
        self.mapped = mapped;
        let page = page?;
        if let Err(page) = self.cache.keep(reference, page.clone(), &mut self.unused) {
            self.unused.push(page);
        }
        Some(page)
    }

    /// Maps the pages of all segments that are not kept: those that are kept from here on are found in the cache, the others in
    /// `fresh`, in the order of the segments.
    fn map_segments<G: Mapper<Page = P>>(&mut self, mapper: &mut G) {
        let persistent = self.cache.is_on();
        let mut segments = self.segments.iter();
        for taken in &self.taken {
            for segment in segments.by_ref().take(taken.segments) {
                if !self.cache.touch(segment.gref) {
                    // What is kept may be written to by a later request.
                    let writable = persistent || !taken.write;
                    self.wanted.push(Wanted { reference: segment.gref, writable });
                }
            }
        }
        if self.wanted.is_empty() {
            return;
        }
        mapper.map(&self.wanted, &mut self.mapped);
        for (wanted, page) in self.wanted.drain(..).zip(self.mapped.drain(..)) {
            let reference = wanted.reference;
            if self.cache.touch(reference) {
                // Twice in this turn: it is kept since the first time.
                self.unused.extend(page);
                continue;
            }
            let left = page.map(|page| self.cache.keep(reference, page, &mut self.unused));
            match left {
                Some(Ok(())) => {}
                Some(Err(page)) => self.fresh.push_back((reference, Some(page))),
                None => self.fresh.push_back((reference, None)),
            }
        }
    }

    /// Hands the transfers that were taken to the disk, or refuses those whose pages are not there.
    fn hand_on(&mut self, disk: &mut impl Disk<P>) {
        let taken = core::mem::take(&mut self.taken);
        let segments = core::mem::take(&mut self.segments);
        let mut left = segments.as_slice();
        for taken in &taken {
            let (its, rest) = left.split_at(taken.segments.min(left.len()));
            left = rest;
            let action = if taken.write { Action::Write } else { Action::Read };
            let mut job = self.job(action, taken.sector);
            let mut own = Vec::new();
            let mut missing = false;
            for segment in its {
                let page = self.cache.get(segment.gref).or_else(|| {
                    let (reference, page) = self.fresh.pop_front()?;
                    own.extend(page.clone());
                    page.filter(|_| reference == segment.gref)
                });
                let Some((page, sectors)) = page.zip(segment.sectors()) else {
                    missing = true;
                    continue;
                };
                job.pieces.push(piece(page, segment, sectors));
            }
            if missing {
                self.recycle(job);
                self.unused.append(&mut own);
                self.refuse(taken.id, taken.operation, Fault::Grant);
            } else if taken.ordered {
                let jobs = Vec::from([self.job(Action::Flush, 0), job, self.job(Action::Flush, 0)]);
                self.ordered = Some(Ordered { id: taken.id, operation: taken.operation, jobs, own });
            } else {
                let flight = Flight { id: taken.id, operation: taken.operation, own, ordered: false };
                self.fly(job, flight, disk);
            }
        }
        (self.taken, self.segments) = (taken, segments);
        self.taken.clear();
        self.segments.clear();
        // Nothing is left here when each segment was found; what is left was refused.
        self.unused.extend(self.fresh.drain(..).filter_map(|(_, page)| page));
    }

    fn submit(&mut self, job: Job<P>, raw: &BlkifRequest, disk: &mut impl Disk<P>) {
        let flight = Flight { id: raw.id, operation: raw.operation, own: Vec::new(), ordered: false };
        self.fly(job, flight, disk);
    }

    fn fly(&mut self, mut job: Job<P>, flight: Flight<P>, disk: &mut impl Disk<P>) {
        self.register(&mut job, flight);
        if let Some(done) = disk.submit(job) {
            self.settle(done, disk);
        }
    }

    fn register(&mut self, job: &mut Job<P>, flight: Flight<P>) {
        let number = self.free.pop().unwrap_or(self.flights.len() as u32);
        match self.flights.get_mut(number as usize) {
            Some(slot) => *slot = Some(flight),
            None => self.flights.push(Some(flight)),
        }
        self.open += 1;
        job.owner = (self.number, number);
    }

    /// Takes a job that is done, and hands on what waited for it.
    pub fn settle(&mut self, mut done: Done<P>, disk: &mut impl Disk<P>) {
        loop {
            self.land(done);
            if self.open > 0 {
                return;
            }
            let Some(job) = self.next_ordered() else { return };
            match disk.submit(job) {
                Some(next) => done = next,
                None => return,
            }
        }
    }

    /// Whether the disk works on something.
    pub fn is_open(&self) -> bool {
        self.open > 0
    }

    /// Takes a job that is done; what waited for it goes on waiting.
    pub fn land(&mut self, done: Done<P>) {
        let number = done.job.owner.1;
        let Some(flight) = self.flights.get_mut(number as usize).and_then(Option::take) else { return };
        self.free.push(number);
        self.open -= 1;
        self.recycle(done.job);
        if !flight.ordered {
            let mut own = flight.own;
            self.unused.append(&mut own);
            return self.answer(flight.id, flight.operation, status(done.result));
        }
        let over = |ordered: &mut Ordered<P>| done.result.is_err() || ordered.jobs.is_empty();
        if self.ordered.as_mut().is_some_and(over)
            && let Some(mut ordered) = self.ordered.take()
        {
            ordered.jobs.drain(..).for_each(|job| self.recycle(job));
            self.unused.append(&mut ordered.own);
            self.answer(ordered.id, ordered.operation, status(done.result));
        }
    }

    /// The next job of the request that waits for all before it; nothing else is open.
    fn next_ordered(&mut self) -> Option<Job<P>> {
        let ordered = self.ordered.as_mut()?;
        let (id, operation) = (ordered.id, ordered.operation);
        let mut job = ordered.jobs.pop()?;
        self.register(&mut job, Flight { id, operation, own: Vec::new(), ordered: true });
        Some(job)
    }

    fn recycle(&mut self, job: Job<P>) {
        let mut pieces = job.pieces;
        pieces.clear();
        if pieces.capacity() > 0 {
            self.spare.push(pieces);
        }
    }

    fn refuse(&mut self, id: u64, operation: u8, fault: Fault) {
        if !core::mem::replace(&mut self.faulty, true) {
            self.fault = Some(fault);
        }
        self.answer(id, operation, fault.status());
    }

    fn answer(&mut self, id: u64, operation: u8, status: i16) {
        self.counters.errors += u64::from(status != RSP_OKAY);
        self.ring.push(BlkifResponse { id, operation, status, ..BlkifResponse::default() });
        self.unpublished = true;
    }

    /// Unmaps what is done with, then shows the responses; true when the front end wants to hear of it.
    pub fn publish(&mut self, mapper: &mut impl Mapper<Page = P>) -> bool {
        if !self.unused.is_empty() {
            mapper.unmap(&mut self.unused);
        }
        core::mem::take(&mut self.unpublished) && self.ring.publish()
    }

    /// Asks to be notified; true when there is something already.
    pub fn prepare_to_wait(&self) -> bool {
        // While all wait for one, it is the disk that is waited for.
        self.ordered.is_none() && self.ring.prepare_to_wait()
    }

    /// The first fault, once.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.fault.take()
    }

    /// Pages kept mapped.
    pub fn kept(&self) -> usize {
        self.cache.len()
    }

    /// Lets go of all pages but those that the disk works on.
    pub fn close(&mut self, mapper: &mut impl Mapper<Page = P>) {
        self.cache.clear(&mut self.unused);
        self.unused.extend(self.fresh.drain(..).filter_map(|(_, page)| page));
        if let Some(mut ordered) = self.ordered.take() {
            ordered.jobs.clear();
            self.unused.append(&mut ordered.own);
        }
        for flight in self.flights.iter_mut().flatten() {
            self.unused.append(&mut flight.own);
        }
        mapper.unmap(&mut self.unused);
    }
}

/// What a segment says of its page, so many sectors.
fn piece<P>(page: P, segment: &BlkifSegment, sectors: u32) -> Piece<P> {
    let sector = SECTOR_SIZE as u16;
    Piece { page, offset: u16::from(segment.first_sect) * sector, bytes: sectors as u16 * sector }
}

fn status(result: Result<(), DiskError>) -> i16 {
    match result {
        Ok(()) => RSP_OKAY,
        Err(DiskError::Unsupported) => RSP_EOPNOTSUPP,
        Err(DiskError::NoSpace | DiskError::Failed) => RSP_ERROR,
    }
}

//! A connected back end: its rings, the pages of its front end, and the disk below.

use crate::disk::{Action, Disk, Job, Properties};
use crate::grants::{MOST, Mapper};
use crate::queue::{Closed, Counters, Queue};
use crate::request::{Fault, Identity};
use alloc::vec::Vec;
use core::task::{Context, Poll};
use guest_sdk::ring::SharedPage;

/// Most rings of a device: a bit each in [`Turn::notify`].
pub const MOST_QUEUES: u32 = 8;
/// Most pages of a ring, as a power of two.
pub const MOST_RING_PAGE_ORDER: u32 = 3;

/// What a turn leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Rings whose front ends are to be notified, a bit each.
    pub notify: u32,
    /// More requests wait: let others have their turn, and come again.
    pub more: bool,
    /// What was wrong, the first time in each ring.
    pub fault: Option<Fault>,
}

/// A back end from connection to disconnection. It is to be [`close`](Self::close)d at its end.
pub struct Backend<M, G: Mapper, D> {
    queues: Vec<Queue<M, G::Page>>,
    mapper: G,
    disk: D,
    /// The last flush is under way.
    flushing: bool,
}

/// Owner of the last flush: no queue.
const LAST: (u32, u32) = (MOST_QUEUES, 0);

impl<M, G: Mapper, D> core::fmt::Debug for Backend<M, G, D> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Backend").field("queues", &self.queues.len()).finish_non_exhaustive()
    }
}

impl<M: SharedPage, G: Mapper, D: Disk<G::Page>> Backend<M, G, D> {
    /// Joins the rings that a front end has made, [`MOST_QUEUES`] at most. `persistent`: both sides want pages to be kept mapped.
    pub fn new(rings: Vec<M>, identity: Identity, persistent: bool, mapper: G, disk: D) -> Self {
        let most = if persistent { MOST / rings.len().clamp(1, MOST_QUEUES as usize) } else { 0 };
        let queues = (0..MOST_QUEUES).zip(rings);
        let queues = queues.map(|(number, page)| Queue::new(number, page, identity, most)).collect();
        Self { queues, mapper, disk, flushing: false }
    }

    /// Takes what the disk has done and what the front end wants. The waker of `context` is told when the disk has done more.
    ///
    /// # Errors
    /// [`Closed`] when a ring is broken: close it all.
    pub fn turn(&mut self, context: &mut Context<'_>) -> Result<Turn, Closed> {
        while let Poll::Ready(done) = self.disk.poll_done(context) {
            if let Some(queue) = self.queues.get_mut(done.job.owner.0 as usize) {
                queue.settle(done, &mut self.disk);
            }
        }
        let mut turn = Turn::default();
        for (number, queue) in self.queues.iter_mut().enumerate() {
            turn.more |= queue.take(&mut self.disk, &mut self.mapper)?;
            turn.notify |= u32::from(queue.publish(&mut self.mapper)) << number;
            turn.fault = turn.fault.or(queue.take_fault());
        }
        Ok(turn)
    }

    /// Ends: no more requests are taken, what the disk works on is waited for, and what was written is made durable. Only then may the
    /// disk be used for another connection: what it gives back would be taken for theirs.
    pub fn poll_finish(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            while let Poll::Ready(done) = self.disk.poll_done(context) {
                if done.job.owner == LAST {
                    // It fails when the disk does: nobody is left to hear of it.
                    return Poll::Ready(());
                }
                if let Some(queue) = self.queues.get_mut(done.job.owner.0 as usize) {
                    queue.land(done);
                }
            }
            if self.flushing || self.queues.iter().any(Queue::is_open) {
                return Poll::Pending;
            }
            let job = Job { owner: LAST, action: Action::Flush, sector: 0, pieces: Vec::new() };
            if self.disk.submit(job).is_some() {
                return Poll::Ready(());
            }
            self.flushing = true;
        }
    }

    /// Asks for notifications of the next requests; true when there are some already, so that sleeping would be wrong.
    pub fn prepare_to_wait(&self) -> bool {
        // All of them, whatever the first says.
        self.queues.iter().fold(false, |more, queue| queue.prepare_to_wait() | more)
    }

    /// What the disk is now.
    pub fn properties(&self) -> Properties {
        self.disk.properties()
    }

    /// What was done.
    pub fn counters(&self) -> Counters {
        let mut all = Counters::default();
        for queue in &self.queues {
            all.requests += queue.counters.requests;
            all.sectors_read += queue.counters.sectors_read;
            all.sectors_written += queue.counters.sectors_written;
            all.errors += queue.counters.errors;
        }
        all
    }

    /// Pages of the front end that are kept mapped.
    pub fn kept_pages(&self) -> usize {
        self.queues.iter().map(Queue::kept).sum()
    }

    /// The disk below.
    pub fn disk_mut(&mut self) -> &mut D {
        &mut self.disk
    }

    /// Lets go of rings and pages, without an answer to what is not answered yet, and gives the disk back. Pages that the disk works
    /// on stay mapped until it gives their jobs back.
    pub fn close(mut self) -> D {
        for queue in &mut self.queues {
            queue.close(&mut self.mapper);
        }
        self.queues.clear();
        self.disk
    }
}

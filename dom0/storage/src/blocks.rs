//! A disk for those who do one thing after the other: file systems, partition tables, and who wants a flush and nothing else.
//!
//! It implements the block device of hadris-storage. Bytes go through pages of our own, since memory of any address is no memory for a
//! device.

use crate::{NewPage, SECTOR};
use alloc::vec::Vec;
use blkback::disk::{Action, Disk, DiskError, Done, GuestPage, Job, Piece};
use core::future::poll_fn;
use core::task::{Context, Poll};
use hadris_io::{Error, ErrorKind, ErrorType};
use hadris_storage::async_::BlockDevice;
use hadris_storage::{BlockIndex, BlockSize};
use hypercall_abi::PAGE_SIZE;

/// Pages that a transfer goes through: more than that is several transfers.
const PAGES: usize = 16;

/// A disk, and pages for what goes to and from it.
pub struct Blocks<P, D> {
    disk: D,
    pages: Vec<P>,
    /// The number of the newest job: what comes back with another one is nobody's.
    newest: u32,
    /// The disk works on a job, so the pages are its.
    busy: bool,
}

impl<P, D> core::fmt::Debug for Blocks<P, D> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Blocks").field("busy", &self.busy).finish_non_exhaustive()
    }
}

/// How far an operation is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that are done.
    done: usize,
    /// Bytes of the job that the disk works on.
    now: Option<usize>,
}

impl<P: GuestPage, D: Disk<P>> Blocks<P, D> {
    /// For a disk.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] when there is no memory for its pages.
    pub fn new(disk: D, new_page: NewPage<P>) -> Result<Self, DiskError> {
        let mut pages = Vec::with_capacity(PAGES);
        for _ in 0..PAGES {
            pages.push(new_page().ok_or(DiskError::NoSpace)?);
        }
        Ok(Self { disk, pages, newest: 0, busy: false })
    }

    /// The disk, when nothing is under way.
    pub fn into_disk(self) -> D {
        self.disk
    }

    /// How many sectors the disk has.
    pub fn sectors(&self) -> u64 {
        self.disk.properties().sectors
    }

    /// Reads whole sectors.
    ///
    /// # Errors
    /// The disk's.
    pub async fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let mut progress = Progress::default();
        poll_fn(|context| self.poll_read(&mut progress, context, sector, bytes)).await
    }

    /// Writes whole sectors.
    ///
    /// # Errors
    /// The disk's.
    pub async fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut progress = Progress::default();
        poll_fn(|context| self.poll_write(&mut progress, context, sector, bytes)).await
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The disk's.
    pub async fn make_durable(&mut self) -> Result<(), DiskError> {
        let mut progress = Progress::default();
        poll_fn(|context| self.poll_job(&mut progress, context, Action::Flush, 0, 0)).await
    }

    /// Waits for one job of so many bytes, from or to the pages.
    fn poll_job(
        &mut self,
        progress: &mut Progress,
        context: &mut Context<'_>,
        action: Action,
        sector: u64,
        bytes: usize,
    ) -> Poll<Result<(), DiskError>> {
        loop {
            let done = if self.busy {
                // Also what somebody gave up has to come back first: its pages are these.
                let Poll::Ready(done) = self.disk.poll_done(context) else { return Poll::Pending };
                done
            } else if progress.now.is_some() {
                return Poll::Ready(Err(DiskError::Failed));
            } else {
                self.newest = self.newest.wrapping_add(1);
                progress.now = Some(bytes);
                let pieces = self.pieces(bytes);
                match self.disk.submit(Job { owner: (0, self.newest), action, sector, pieces }) {
                    Some(done) => done,
                    None => {
                        self.busy = true;
                        continue;
                    }
                }
            };
            self.busy = false;
            let Done { job, result } = done;
            if progress.now.is_some() && job.owner.1 == self.newest {
                return Poll::Ready(result);
            }
        }
    }

    fn pieces(&self, bytes: usize) -> Vec<Piece<P>> {
        let parts = (0..bytes).step_by(PAGE_SIZE).zip(&self.pages);
        parts
            .map(|(at, page)| Piece {
                page: page.clone(),
                offset: 0,
                bytes: (bytes - at).min(PAGE_SIZE) as u16,
            })
            .collect()
    }

    fn poll_read(
        &mut self,
        progress: &mut Progress,
        context: &mut Context<'_>,
        first: u64,
        bytes: &mut [u8],
    ) -> Poll<Result<(), DiskError>> {
        while progress.done < bytes.len() {
            let now = (bytes.len() - progress.done).min(PAGES * PAGE_SIZE);
            let sector = first + (progress.done / SECTOR) as u64;
            match self.poll_job(progress, context, Action::Read, sector, now) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
            let part = bytes.get_mut(progress.done..progress.done + now).unwrap_or_default();
            for (part, page) in part.chunks_mut(PAGE_SIZE).zip(&self.pages) {
                page.read_bytes(0, part);
            }
            *progress = Progress { done: progress.done + now, now: None };
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(
        &mut self,
        progress: &mut Progress,
        context: &mut Context<'_>,
        first: u64,
        bytes: &[u8],
    ) -> Poll<Result<(), DiskError>> {
        while progress.done < bytes.len() {
            let now = (bytes.len() - progress.done).min(PAGES * PAGE_SIZE);
            let sector = first + (progress.done / SECTOR) as u64;
            if progress.now.is_none() && !self.busy {
                let part = bytes.get(progress.done..progress.done + now).unwrap_or_default();
                for (part, page) in part.chunks(PAGE_SIZE).zip(&self.pages) {
                    page.write_bytes(0, part);
                }
            } else if progress.now.is_none() {
                // What was given up is still under way with these pages.
                let Poll::Ready(_) = self.disk.poll_done(context) else { return Poll::Pending };
                self.busy = false;
                continue;
            }
            match self.poll_job(progress, context, Action::Write, sector, now) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
            *progress = Progress { done: progress.done + now, now: None };
        }
        Poll::Ready(Ok(()))
    }
}

fn told(result: Poll<Result<(), DiskError>>) -> Poll<Result<(), Error<DiskError>>> {
    result.map(|result| {
        result.map_err(|error| match error {
            DiskError::Unsupported => Error::new(ErrorKind::ReadOnly, "the disk is only read"),
            error => Error::device(error, "the disk failed"),
        })
    })
}

impl<P, D> ErrorType for Blocks<P, D> {
    type Error = DiskError;
}

impl<P: GuestPage, D: Disk<P>> BlockDevice for Blocks<P, D> {
    type State = Progress;

    fn block_size(&self) -> BlockSize {
        const SIZE: BlockSize = match BlockSize::new(SECTOR as u32) {
            Some(size) => size,
            None => panic!("a sector has a size"),
        };
        SIZE
    }

    fn block_count(&self) -> u64 {
        self.sectors()
    }

    fn writable(&self) -> bool {
        !self.disk.properties().readonly
    }

    fn poll_read_blocks(
        &mut self,
        state: &mut Progress,
        context: &mut Context<'_>,
        first: BlockIndex,
        bytes: &mut [u8],
    ) -> Poll<Result<(), Error<DiskError>>> {
        told(self.poll_read(state, context, first.get(), bytes))
    }

    fn poll_write_blocks(
        &mut self,
        state: &mut Progress,
        context: &mut Context<'_>,
        first: BlockIndex,
        bytes: &[u8],
    ) -> Poll<Result<(), Error<DiskError>>> {
        told(self.poll_write(state, context, first.get(), bytes))
    }

    fn poll_flush(
        &mut self,
        state: &mut Progress,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Error<DiskError>>> {
        told(self.poll_job(state, context, Action::Flush, 0, 0))
    }

    fn cancel(&mut self, state: &mut Progress) {
        // Its job comes back and is nobody's.
        if state.now.take().is_some() {
            self.newest = self.newest.wrapping_add(1);
        }
    }
}

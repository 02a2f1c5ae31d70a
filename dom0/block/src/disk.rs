//! What a back end wants from a disk.
//!
//! A disk takes jobs and gives each back when it is done, in any order, several at a time. A job owns the mapped pages that its data
//! goes to or comes from: they stay mapped until the disk lets go of them, also when the front end is gone by then.

use alloc::vec::Vec;
use core::fmt;
use core::task::{Context, Poll};
use guest_sdk::ring::SharedPage;
use hypercall_abi::MachAddr;

/// A page of a front end, mapped. Clones are the same mapping, which ends with the last of them.
pub trait GuestPage: SharedPage + Clone {
    /// Where it is in the machine, for disks that are read and written by devices.
    fn machine_address(&self) -> MachAddr;
}

/// Bytes of a page; whole sectors.
#[derive(Clone, Debug)]
pub struct Piece<P> {
    /// The page.
    pub page: P,
    /// First byte in it.
    pub offset: u16,
    /// How many; with `offset` at most a page.
    pub bytes: u16,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// From disk to pages.
    Read,
    /// From pages to disk.
    Write,
    /// All writes that were done before this job came are durable when it is done.
    Flush,
    /// The content of so many sectors may be forgotten; reading them gives anything that was there before, or zeros.
    Discard {
        /// How many.
        sectors: u64,
    },
}

/// A piece of work for a disk.
#[derive(Clone, Debug)]
pub struct Job<P> {
    /// Whose it is: the queue, and a number there. For the back end, not for the disk.
    pub owner: (u32, u32),
    /// What.
    pub action: Action,
    /// The first sector (of 512 bytes), inside the disk with all that follow.
    pub sector: u64,
    /// Where the data is, in the order of the sectors.
    pub pieces: Vec<Piece<P>>,
}

/// A job that is done, or failed.
#[derive(Debug)]
pub struct Done<P> {
    /// The job, as it came.
    pub job: Job<P>,
    /// How it went.
    pub result: Result<(), DiskError>,
}

/// Why a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// The disk does not do such things.
    Unsupported,
    /// There is no room for what is to be written.
    NoSpace,
    /// The medium or what leads to it failed.
    Failed,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "the disk cannot do this",
            Self::NoSpace => "no room is left for what is written",
            Self::Failed => "the disk failed",
        })
    }
}

impl core::error::Error for DiskError {}

/// What a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Nothing is written to it.
    pub readonly: bool,
    /// Bytes that are forgotten at least together, a multiple of 512; `None` when [`Action::Discard`] is not for it.
    pub discard_granularity: Option<u32>,
    /// Bytes that are written at least together, a multiple of 512.
    pub physical_sector: u32,
}

/// A disk.
pub trait Disk<P> {
    /// What it is. `sectors` may grow or shrink while it is in use.
    fn properties(&self) -> Properties;

    /// Takes a job; gives it back if it is done at once.
    fn submit(&mut self, job: Job<P>) -> Option<Done<P>>;

    /// The next job that was done later. `Pending` also when there is none; then the waker is told when that changes.
    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<P>>;
}

impl<P, D: Disk<P> + ?Sized> Disk<P> for alloc::boxed::Box<D> {
    fn properties(&self) -> Properties {
        (**self).properties()
    }
    fn submit(&mut self, job: Job<P>) -> Option<Done<P>> {
        (**self).submit(job)
    }
    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<P>> {
        (**self).poll_done(context)
    }
}

//! Disks in memory: an empty one, one that shows a file, and one that keeps what was written over a file that others see, too.
//!
//! All three are one: a *base* that is only read, and chunks of memory over it, of which each has the newest content of its place.

use crate::disk::{Action, Disk, DiskError, Done, GuestPage, Job, Properties};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use core::task::{Context, Poll};
use hypercall_abi::io::blkif::SECTOR_SIZE;

/// Gives so many bytes of memory, of any content, or none when there is too little.
pub type Allocate = fn(usize) -> Option<Box<[u8]>>;

/// Bytes of a chunk over a base: what a guest writes once costs as much.
const OVERLAY_CHUNK: usize = 4096;
/// Bytes of a chunk of a disk that has all its memory from the start.
const RAM_CHUNK: usize = 64 * 1024;

/// Why there is no such disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadDisk {
    /// Without a sector.
    Empty,
    /// Its size in bytes is no multiple of a sector.
    Size(u64),
    /// Less than so many bytes of memory are free.
    Memory(u64),
    /// The base is larger than the disk: in bytes.
    Base(u64),
}

impl fmt::Display for BadDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("it is empty: a disk has at least one sector of 512 bytes"),
            Self::Size(bytes) => {
                write!(f, "its size, {bytes} bytes, is not a multiple of a sector of 512 bytes")
            }
            Self::Memory(bytes) => write!(f, "there is not enough memory for its {bytes} bytes"),
            Self::Base(bytes) => write!(f, "the file below it has {bytes} bytes, more than the disk"),
        }
    }
}

impl core::error::Error for BadDisk {}

/// A disk in memory, over a base `B`.
pub struct MemoryDisk<B> {
    base: B,
    bytes: usize,
    chunk: usize,
    /// Empty when it is only read.
    chunks: Vec<Option<Box<[u8]>>>,
    allocate: Allocate,
    readonly: bool,
    /// All memory is there from the start, and stays.
    whole: bool,
}

impl<B> fmt::Debug for MemoryDisk<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDisk").field("bytes", &self.bytes).field("readonly", &self.readonly).finish()
    }
}

fn check_size(bytes: u64) -> Result<usize, BadDisk> {
    if bytes == 0 {
        return Err(BadDisk::Empty);
    }
    if !bytes.is_multiple_of(SECTOR_SIZE as u64) {
        return Err(BadDisk::Size(bytes));
    }
    usize::try_from(bytes).map_err(|_| BadDisk::Memory(bytes))
}

fn empty_chunks(bytes: usize, chunk: usize) -> Result<Vec<Option<Box<[u8]>>>, BadDisk> {
    let mut chunks = Vec::new();
    let count = bytes.div_ceil(chunk);
    chunks.try_reserve_exact(count).map_err(|_| BadDisk::Memory(bytes as u64))?;
    chunks.resize_with(count, || None);
    Ok(chunks)
}

impl<B: AsRef<[u8]>> MemoryDisk<B> {
    /// A disk that shows `base` and is only read.
    ///
    /// # Errors
    /// When the base cannot be a disk.
    pub fn image(base: B) -> Result<Self, BadDisk> {
        let bytes = check_size(base.as_ref().len() as u64)?;
        let allocate = |_| None;
        let chunks = Vec::new();
        Ok(Self { base, bytes, chunk: OVERLAY_CHUNK, chunks, allocate, readonly: true, whole: false })
    }

    /// A disk of `bytes` that begins with what `base` holds, zeros behind it, and takes memory for what is written.
    ///
    /// # Errors
    /// When the size is none for a disk, or smaller than the base.
    pub fn overlay(base: B, bytes: u64, allocate: Allocate) -> Result<Self, BadDisk> {
        let size = check_size(bytes)?;
        if base.as_ref().len() > size {
            return Err(BadDisk::Base(base.as_ref().len() as u64));
        }
        let chunks = empty_chunks(size, OVERLAY_CHUNK)?;
        Ok(Self { base, bytes: size, chunk: OVERLAY_CHUNK, chunks, allocate, readonly: false, whole: false })
    }

    /// Makes an overlay larger; what is new is zero, and takes memory when it is written.
    ///
    /// # Errors
    /// When the size is none for a disk, is smaller than it was, or there is not enough memory: it stays as it was.
    pub fn widen(&mut self, bytes: u64) -> Result<(), BadDisk> {
        let size = check_size(bytes)?;
        if size < self.bytes || self.readonly {
            return Err(BadDisk::Base(self.bytes as u64));
        }
        let more = size.div_ceil(self.chunk).saturating_sub(self.chunks.len());
        self.chunks.try_reserve_exact(more).map_err(|_| BadDisk::Memory(bytes))?;
        self.chunks.resize_with(self.chunks.len() + more, || None);
        self.bytes = size;
        Ok(())
    }
}

impl MemoryDisk<[u8; 0]> {
    /// A disk of zeros that has all its memory from the start.
    ///
    /// # Errors
    /// When the size is none for a disk, or there is not enough memory.
    pub fn ram(bytes: u64, allocate: Allocate) -> Result<Self, BadDisk> {
        let size = check_size(bytes)?;
        let mut disk = Self {
            base: [],
            bytes: 0,
            chunk: RAM_CHUNK,
            chunks: Vec::new(),
            allocate,
            readonly: false,
            whole: true,
        };
        disk.grow(size)?;
        Ok(disk)
    }

    /// Makes it larger; what is new is zero.
    ///
    /// # Errors
    /// When the size is none for a disk, is smaller than it was, or there is not enough memory: it stays as it was.
    pub fn resize(&mut self, bytes: u64) -> Result<(), BadDisk> {
        let size = check_size(bytes)?;
        if size < self.bytes { Err(BadDisk::Base(self.bytes as u64)) } else { self.grow(size) }
    }

    fn grow(&mut self, size: usize) -> Result<(), BadDisk> {
        let short = BadDisk::Memory(size as u64);
        let count = size.div_ceil(self.chunk);
        let old = self.chunks.len();
        self.chunks.try_reserve_exact(count.saturating_sub(old)).map_err(|_| short)?;
        for _ in old..count {
            let Some(mut chunk) = (self.allocate)(self.chunk) else {
                self.chunks.truncate(old);
                return Err(short);
            };
            chunk.fill(0);
            self.chunks.push(Some(chunk));
        }
        self.bytes = size;
        Ok(())
    }
}

/// `range` of a chunk; what the chunk does not have is nothing.
fn part(chunk: &[u8], range: Range<usize>) -> &[u8] {
    chunk.get(range).unwrap_or(&[])
}

impl<B: AsRef<[u8]>> MemoryDisk<B> {
    fn chunk_of(&self, number: usize) -> Option<&[u8]> {
        self.chunks.get(number)?.as_deref()
    }

    /// Fills part of a page with the content from byte `at` on, which does not cross the end of a chunk.
    fn read<P: GuestPage>(&self, at: usize, page: &P, offset: usize, bytes: usize) {
        let from = at % self.chunk;
        if let Some(chunk) = self.chunk_of(at / self.chunk) {
            return page.write_bytes(offset, part(chunk, from..from + bytes));
        }
        let base = self.base.as_ref();
        let there = base.len().saturating_sub(at).min(bytes);
        page.write_bytes(offset, part(base, at..at + there));
        let (mut done, zeros) = (there, [0; SECTOR_SIZE]);
        while done < bytes {
            let now = (bytes - done).min(SECTOR_SIZE);
            page.write_bytes(offset + done, part(&zeros, 0..now));
            done += now;
        }
    }

    /// The chunk of a place, to be written; made when it is not there.
    fn chunk_for(&mut self, number: usize, whole: bool) -> Result<&mut [u8], DiskError> {
        let slot = self.chunks.get_mut(number).ok_or(DiskError::Unsupported)?;
        if slot.is_none() {
            let mut chunk = (self.allocate)(self.chunk).ok_or(DiskError::NoSpace)?;
            if !whole {
                let base = self.base.as_ref();
                let start = (number * self.chunk).min(base.len());
                let below = part(base, start..(start + self.chunk).min(base.len()));
                let (head, tail) = chunk.split_at_mut(below.len().min(self.chunk));
                head.copy_from_slice(below);
                tail.fill(0);
            }
            *slot = Some(chunk);
        }
        slot.as_deref_mut().ok_or(DiskError::NoSpace)
    }

    fn write<P: GuestPage>(
        &mut self,
        at: usize,
        page: &P,
        offset: usize,
        bytes: usize,
    ) -> Result<(), DiskError> {
        let from = at % self.chunk;
        let chunk = self.chunk_for(at / self.chunk, bytes == self.chunk)?;
        let place = chunk.get_mut(from..from + bytes).ok_or(DiskError::Failed)?;
        page.read_bytes(offset, place);
        Ok(())
    }

    /// Goes over the pieces of a job, cut where chunks end.
    fn transfer<P: GuestPage>(&mut self, job: &Job<P>) -> Result<(), DiskError> {
        // The back end has checked that the sectors are on the disk.
        let mut at = usize::try_from(job.sector).map_err(|_| DiskError::Failed)? * SECTOR_SIZE;
        for piece in &job.pieces {
            let (mut offset, mut left) = (usize::from(piece.offset), usize::from(piece.bytes));
            while left > 0 {
                let now = left.min(self.chunk - at % self.chunk);
                if job.action == Action::Read {
                    self.read(at, &piece.page, offset, now);
                } else {
                    self.write(at, &piece.page, offset, now)?;
                }
                (at, offset, left) = (at + now, offset + now, left - now);
            }
        }
        Ok(())
    }

    fn discard(&mut self, sector: u64, sectors: u64) {
        let bytes = |sectors: u64| usize::try_from(sectors).unwrap_or(usize::MAX).saturating_mul(SECTOR_SIZE);
        let (start, end) = (bytes(sector), bytes(sector.saturating_add(sectors)).min(self.bytes));
        let (chunk, whole) = (self.chunk, self.whole);
        for (number, slot) in self.chunks.iter_mut().enumerate() {
            let (first, last) = (number * chunk, (number + 1) * chunk);
            let (from, to) = (start.clamp(first, last) - first, end.clamp(first, last) - first);
            match slot {
                // A part of a chunk stays as it is: its content may be anything that was there.
                Some(_) if !whole && to - from == chunk => *slot = None,
                Some(bytes) if whole => {
                    if let Some(bytes) = bytes.get_mut(from..to) {
                        bytes.fill(0);
                    }
                }
                _ => {}
            }
        }
    }
}

impl<B: AsRef<[u8]>, P: GuestPage> Disk<P> for MemoryDisk<B> {
    fn properties(&self) -> Properties {
        Properties {
            sectors: (self.bytes / SECTOR_SIZE) as u64,
            readonly: self.readonly,
            discard_granularity: (!self.readonly).then_some(OVERLAY_CHUNK as u32),
            physical_sector: SECTOR_SIZE as u32,
        }
    }

    fn submit(&mut self, job: Job<P>) -> Option<Done<P>> {
        let result = match job.action {
            Action::Read => self.transfer(&job),
            Action::Write | Action::Discard { .. } if self.readonly => Err(DiskError::Unsupported),
            Action::Write => self.transfer(&job),
            Action::Discard { sectors } => {
                self.discard(job.sector, sectors);
                Ok(())
            }
            // Memory is as durable as it gets.
            Action::Flush => Ok(()),
        };
        Some(Done { job, result })
    }

    fn poll_done(&mut self, _: &mut Context<'_>) -> Poll<Done<P>> {
        // All is done when it is submitted.
        Poll::Pending
    }
}

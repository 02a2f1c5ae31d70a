//! The disks that there are, opened from what descriptions say.

use super::pages::Page;
use crate::disks::{DiskSpec, Kind};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::disk::{Disk, Done, Job, Properties};
use blkback::memory::{BadDisk, MemoryDisk};
use core::task::{Context, Poll};
use guest_sdk::memory;
use spin::Mutex;

/// What disks leave of dom0's memory for all else.
const RESERVE: u64 = 8 << 20;

/// Any disk.
pub enum AnyDisk {
    /// Memory.
    Ram(MemoryDisk<[u8; 0]>),
    /// A file of the boot archive, perhaps with memory over it.
    File(MemoryDisk<&'static [u8]>),
}

/// A disk of one guest, for the task that serves it and for those who change it.
#[derive(Clone)]
pub struct Handle {
    // One vCPU, and never held over an await: never waited for.
    disk: Arc<Mutex<AnyDisk>>,
    readonly: bool,
}

/// Memory for a disk, as long as enough is left.
fn allocate(bytes: usize) -> Option<Box<[u8]>> {
    let usage = memory::usage();
    let left = usage.unmapped.saturating_add(usage.heap_free);
    if left < RESERVE + bytes as u64 {
        return None;
    }
    let mut chunk = Vec::new();
    chunk.try_reserve_exact(bytes).ok()?;
    chunk.resize(bytes, 0);
    Some(chunk.into_boxed_slice())
}

/// What can be said without opening it.
///
/// # Errors
/// What is wrong.
pub fn check(spec: &DiskSpec) -> Result<(), String> {
    match &spec.kind {
        // Its memory may be there by then, or not any more.
        Kind::Ram(_) => Ok(()),
        Kind::Image(_) | Kind::Overlay(..) => open(spec).map(drop),
    }
}

/// Opens a disk.
///
/// # Errors
/// What is wrong.
pub fn open(spec: &DiskSpec) -> Result<Handle, String> {
    let say = |bad: BadDisk| match spec.file() {
        Some(file) => alloc::format!("{file}: {bad}"),
        None => bad.to_string(),
    };
    let disk = match &spec.kind {
        Kind::Ram(bytes) => AnyDisk::Ram(MemoryDisk::ram(*bytes, allocate).map_err(say)?),
        Kind::Image(file) => AnyDisk::File(MemoryDisk::image(super::file(file)?).map_err(say)?),
        Kind::Overlay(file, bytes) => {
            let base = super::file(file)?;
            let bytes = bytes.unwrap_or(base.len() as u64);
            AnyDisk::File(MemoryDisk::overlay(base, bytes, allocate).map_err(say)?)
        }
    };
    Ok(Handle { disk: Arc::new(Mutex::new(disk)), readonly: spec.readonly })
}

impl Handle {
    /// What it is.
    pub fn properties(&self) -> Properties {
        Disk::<Page>::properties(self)
    }

    /// Makes it larger.
    ///
    /// # Errors
    /// What to say.
    pub fn resize(&self, bytes: u64) -> Result<(), String> {
        match &mut *self.disk.lock() {
            AnyDisk::Ram(disk) => disk.resize(bytes).map_err(|bad| match bad {
                BadDisk::Base(_) => "it can only become larger".to_string(),
                bad => bad.to_string(),
            }),
            AnyDisk::File(_) => Err("only a disk of kind ram can become larger".into()),
        }
    }
}

impl Disk<Page> for Handle {
    fn properties(&self) -> Properties {
        let properties = match &*self.disk.lock() {
            AnyDisk::Ram(disk) => Disk::<Page>::properties(disk),
            AnyDisk::File(disk) => Disk::<Page>::properties(disk),
        };
        let readonly = properties.readonly || self.readonly;
        let discard_granularity = properties.discard_granularity.filter(|_| !readonly);
        Properties { readonly, discard_granularity, ..properties }
    }

    fn submit(&mut self, job: Job<Page>) -> Option<Done<Page>> {
        match &mut *self.disk.lock() {
            AnyDisk::Ram(disk) => disk.submit(job),
            AnyDisk::File(disk) => disk.submit(job),
        }
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<Page>> {
        match &mut *self.disk.lock() {
            AnyDisk::Ram(disk) => disk.poll_done(context),
            AnyDisk::File(disk) => disk.poll_done(context),
        }
    }
}

//! The disks that there are, opened from what descriptions say.

use super::drives::{self, Claim, Part, Place};
use super::held::Shared;
use super::pages::{Page, own_page};
use crate::disks::{DiskSpec, Kind, Path, Source};
use crate::room::{self, New};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::disk::{Disk, Done, Job, Properties};
use blkback::memory::{BadDisk, MemoryDisk};
use core::future::poll_fn;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::task::{Context, Poll};
use guest_sdk::sync::Lock;
use storage::blocks::Blocks;
use storage::overlay::{self, Header, Overlay};
use storage::{AnyDisk, SECTOR};

/// Any disk. Those in memory answer at once, and are named so that nothing is between.
enum Below {
    /// Memory.
    Ram(MemoryDisk<[u8; 0]>),
    /// A file of the boot archive, perhaps with memory over it.
    File(MemoryDisk<&'static [u8]>),
    /// A part of a device.
    Part(Part),
    /// What is written over a base, in a file.
    Over(Box<Overlay<Page, AnyDisk<Page>, Part>>),
    /// The same, in memory.
    OverRam(Box<Overlay<Page, AnyDisk<Page>, MemoryDisk<[u8; 0]>>>),
}

/// One disk at a time becomes larger.
static RESIZING: Lock<()> = Lock::new(());

/// A disk of one guest, for the task that serves it and for those who change it.
#[derive(Clone)]
pub struct Handle {
    // One vCPU, and never held over an await: never waited for.
    disk: Arc<Shared<Below>>,
    /// Jobs that it has not answered.
    at_work: Arc<AtomicUsize>,
    readonly: bool,
    /// What it uses of dom0's disks: what it writes to comes last.
    claims: Arc<Vec<Claim>>,
}

/// Memory for a disk, as long as enough is left.
fn allocate(bytes: usize) -> Option<Box<[u8]>> {
    if !room::is_for(New::Content(bytes as u64)) {
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
        // Memory, drives and their files may be there by then, or not any more.
        Kind::Ram(_) | Kind::Device(_) | Kind::File(..) => Ok(()),
        Kind::Image(Source::Archive(file)) => image(file).map(drop),
        Kind::Overlay { base: Source::Archive(file), changes: None, size } => {
            memory_overlay(file, *size).map(drop)
        }
        Kind::Overlay { base: Source::Archive(file), .. } => image(file).map(drop),
        Kind::Image(_) | Kind::Overlay { .. } => Ok(()),
    }
}

fn image(file: &str) -> Result<MemoryDisk<&'static [u8]>, String> {
    MemoryDisk::image(super::file(file)?).map_err(|bad| format!("{file}: {bad}"))
}

fn memory_overlay(file: &str, size: Option<u64>) -> Result<MemoryDisk<&'static [u8]>, String> {
    let base = super::file(file)?;
    let size = size.unwrap_or(base.len() as u64);
    MemoryDisk::overlay(base, size, allocate).map_err(|bad| format!("{file}: {bad}"))
}

fn ram(bytes: u64) -> Result<MemoryDisk<[u8; 0]>, String> {
    MemoryDisk::ram(bytes, allocate).map_err(|bad: BadDisk| bad.to_string())
}

/// Opens a disk for somebody, who is named to others that want the same.
///
/// # Errors
/// What is wrong.
pub async fn open(spec: &DiskSpec, by: &str) -> Result<Handle, String> {
    let mut claims = Vec::new();
    let disk = match &spec.kind {
        Kind::Ram(bytes) => Below::Ram(ram(*bytes)?),
        Kind::Image(Source::Archive(file)) => Below::File(image(file)?),
        Kind::Image(Source::Volume(path)) => {
            let (place, _) = drives::file(path, None).await?;
            Below::Part(claimed(&place, false, by, &path.to_string(), &mut claims)?)
        }
        Kind::Overlay { base: Source::Archive(file), changes: None, size } => {
            Below::File(memory_overlay(file, *size)?)
        }
        Kind::Overlay { base, changes, size } => {
            stored_overlay(base, changes.as_ref(), *size, by, &mut claims).await?
        }
        Kind::Device(name) => {
            let place = drives::find(name).await?;
            Below::Part(claimed(&place, !spec.readonly, by, name, &mut claims)?)
        }
        Kind::File(path, size) => {
            let (place, _) = drives::file(path, *size).await?;
            let there = place.sectors() * SECTOR as u64;
            // One that has more has been resized since.
            if let Some(size) = size.filter(|size| *size > there) {
                return Err(format!(
                    "{path}: it has {there} bytes, not {size}: leave its size out, and resize it"
                ));
            }
            Below::Part(claimed(&place, !spec.readonly, by, &path.to_string(), &mut claims)?)
        }
    };
    Ok(Handle {
        disk: Arc::new(Shared::new(disk)),
        at_work: Arc::default(),
        readonly: spec.readonly,
        claims: Arc::new(claims),
    })
}

fn claimed(
    place: &Place,
    write: bool,
    by: &str,
    name: &str,
    claims: &mut Vec<Claim>,
) -> Result<Part, String> {
    claims.push(place.claim(write, by).map_err(|why| format!("{name}: {why}"))?);
    Ok(place.disk())
}

/// A base, with what is written over it in a file of its own or, if there is none, in memory for all of it.
async fn stored_overlay(
    base: &Source,
    changes: Option<&Path>,
    size: Option<u64>,
    by: &str,
    claims: &mut Vec<Claim>,
) -> Result<Below, String> {
    let below: AnyDisk<Page> = match base {
        Source::Archive(file) => Box::new(image(file)?),
        Source::Volume(path) => {
            let (place, _) = drives::file(path, None).await?;
            Box::new(claimed(&place, false, by, &path.to_string(), claims)?)
        }
    };
    let base_sectors = below.properties().sectors;
    let sectors = size.map_or(base_sectors, |bytes| bytes / SECTOR as u64);
    let wanted = Header::new(sectors, base_sectors, overlay::name_number(&base.to_string()));
    wanted.check().map_err(|bad| bad.to_string())?;
    let bytes = wanted.file_sectors() * SECTOR as u64;
    let Some(path) = changes else {
        let table = alloc::vec![0; overlay::table_bytes(&wanted)];
        let made = Overlay::new(below, ram(bytes)?, wanted, &table, own_page);
        return Ok(Below::OverRam(Box::new(made.map_err(|error| error.to_string())?)));
    };
    let say = |what: &dyn core::fmt::Display| format!("{path}: {what}");
    let (place, _) = drives::file(path, Some(bytes)).await?;
    claims.push(place.claim(true, by).map_err(|why| say(&why))?);
    let mut file = Blocks::new(place.disk(), own_page).map_err(|error| say(&error))?;
    let mut first = [0; SECTOR];
    file.read(0, &mut first).await.map_err(|error| say(&error))?;
    let header = match Header::decode(&first, file.sectors()).map_err(|bad| say(&bad))? {
        Some(header) => header,
        // It was made just so, or its making was cut off before this. Only the header says that its table is one.
        None if file.sectors() == wanted.file_sectors() => {
            let zeros = [0; SECTOR];
            for sector in 0..wanted.table_sectors() {
                let at = overlay::TABLE_SECTOR + sector;
                file.write(at, &zeros).await.map_err(|error| say(&error))?;
            }
            file.make_durable().await.map_err(|error| say(&error))?;
            file.write(0, &wanted.encode()).await.map_err(|error| say(&error))?;
            file.make_durable().await.map_err(|error| say(&error))?;
            wanted
        }
        None => return Err(say(&"it is not as large as its disk needs it: remove it")),
    };
    if (header.base, header.base_sectors) != (wanted.base, wanted.base_sectors) {
        return Err(say(&overlay::BadOverlay::Base));
    }
    // One that has more has been resized since.
    if size.is_some() && header.sectors < wanted.sectors {
        let there = header.sectors * SECTOR as u64;
        return Err(say(&format!("its disk has {there} bytes: leave its size out, and resize it")));
    }
    let mut table = alloc::vec![0; overlay::table_bytes(&header)];
    file.read(overlay::TABLE_SECTOR, &mut table).await.map_err(|error| say(&error))?;
    let made = Overlay::new(below, file.into_disk(), header, &table, own_page);
    Ok(Below::Over(Box::new(made.map_err(|error| say(&error))?)))
}

impl Handle {
    /// What it is.
    pub fn properties(&self) -> Properties {
        Disk::<Page>::properties(self)
    }

    /// Jobs that it was given and has not answered.
    pub fn at_work(&self) -> usize {
        self.at_work.load(Ordering::Acquire)
    }

    /// Waits until all that it was given is done, for nobody: who gave it is gone.
    pub async fn settled(&self) {
        let mut disk = self.clone();
        poll_fn(|context| {
            while self.at_work.load(Ordering::Acquire) > 0 {
                match disk.poll_done(context) {
                    Poll::Ready(done) => drop(done),
                    Poll::Pending => return Poll::Pending,
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    /// Makes it larger; `kind` is what it was made from. What is new is zeros.
    ///
    /// # Errors
    /// What to say: it stays as it was.
    pub async fn resize(&self, kind: &Kind, bytes: u64) -> Result<(), String> {
        let _one = RESIZING.lock().await;
        let there = self.properties().sectors * SECTOR as u64;
        if bytes < there {
            return Err(format!(
                "it has {there} bytes and can only become larger: what is behind its new end would be lost"
            ));
        }
        if bytes == there {
            return Ok(());
        }
        match kind {
            Kind::Ram(_) | Kind::Overlay { changes: None, .. } => self.grow_memory(bytes),
            Kind::File(path, _) if !self.readonly => {
                let place = drives::grow(path, bytes).await?;
                self.claim(&place)?;
                match &mut *self.disk.lock() {
                    Below::Part(disk) => {
                        disk.extend(place.extents().clone()).map_err(|error| error.to_string())
                    }
                    _ => Err(UNLIKE.into()),
                }
            }
            Kind::Overlay { changes: Some(path), .. } if !self.readonly => {
                self.grow_overlay(path, bytes).await
            }
            Kind::File(..) | Kind::Overlay { .. } | Kind::Image(_) => Err("it is only read".into()),
            Kind::Device(_) => Err("a device is as large as it is".into()),
        }
    }

    /// A job was submitted: it is at work unless it was done at once.
    fn count_given(&self, done: Option<Done<Page>>) -> Option<Done<Page>> {
        self.at_work.fetch_add(usize::from(done.is_none()), Ordering::AcqRel);
        done
    }

    fn count_back(&self, done: Poll<Done<Page>>) -> Poll<Done<Page>> {
        self.at_work.fetch_sub(usize::from(done.is_ready()), Ordering::AcqRel);
        done
    }

    /// Its claim is for more of what it writes to.
    fn claim(&self, place: &Place) -> Result<(), String> {
        self.claims.last().map_or(Ok(()), |claim| claim.extend(place))
    }

    fn grow_memory(&self, bytes: u64) -> Result<(), String> {
        match &mut *self.disk.lock() {
            Below::Ram(disk) => disk.resize(bytes).map_err(|bad| bad.to_string()),
            Below::File(disk) => disk.widen(bytes).map_err(|bad| bad.to_string()),
            Below::OverRam(disk) => {
                let header = disk.header().grown(bytes / SECTOR as u64).map_err(|bad| bad.to_string())?;
                let all = header.file_sectors() * SECTOR as u64;
                disk.file_mut().resize(all).map_err(|bad| bad.to_string())?;
                disk.grow(header).map_err(|bad| bad.to_string())
            }
            Below::Part(_) | Below::Over(_) => Err(UNLIKE.into()),
        }
    }

    /// The file first, then what it says of itself, then who uses it: if the machine ends in between, the file is longer than it needs to
    /// be, and that is all.
    async fn grow_overlay(&self, path: &Path, bytes: u64) -> Result<(), String> {
        let say = |what: &dyn core::fmt::Display| format!("{path}: {what}");
        let header = match &*self.disk.lock() {
            Below::Over(disk) => disk.header().grown(bytes / SECTOR as u64).map_err(|bad| say(&bad))?,
            _ => return Err(UNLIKE.into()),
        };
        let place = drives::grow(path, header.file_sectors() * SECTOR as u64).await?;
        self.claim(&place)?;
        let mut file = Blocks::new(place.disk(), own_page).map_err(|error| say(&error))?;
        file.write(0, &header.encode()).await.map_err(|error| say(&error))?;
        file.make_durable().await.map_err(|error| say(&error))?;
        match &mut *self.disk.lock() {
            Below::Over(disk) => {
                disk.file_mut().extend(place.extents().clone()).map_err(|error| say(&error))?;
                disk.grow(header).map_err(|bad| say(&bad))
            }
            _ => Err(UNLIKE.into()),
        }
    }
}

/// What is said when a disk is not of the kind that its description says, which cannot be.
const UNLIKE: &str = "the disk is not what it was made from";

impl Disk<Page> for Handle {
    fn properties(&self) -> Properties {
        let properties = match &*self.disk.lock() {
            Below::Ram(disk) => Disk::<Page>::properties(disk),
            Below::File(disk) => Disk::<Page>::properties(disk),
            Below::Part(disk) => disk.properties(),
            Below::Over(disk) => disk.properties(),
            Below::OverRam(disk) => disk.properties(),
        };
        let readonly = properties.readonly || self.readonly;
        let discard_granularity = properties.discard_granularity.filter(|_| !readonly);
        Properties { readonly, discard_granularity, ..properties }
    }

    fn submit(&mut self, job: Job<Page>) -> Option<Done<Page>> {
        match &mut *self.disk.lock() {
            Below::Ram(disk) => disk.submit(job),
            Below::File(disk) => disk.submit(job),
            Below::Part(disk) => self.count_given(disk.submit(job)),
            Below::Over(disk) => self.count_given(disk.submit(job)),
            Below::OverRam(disk) => self.count_given(disk.submit(job)),
        }
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<Page>> {
        match &mut *self.disk.lock() {
            // All is done when it is submitted.
            Below::Ram(_) | Below::File(_) => Poll::Pending,
            Below::Part(disk) => self.count_back(disk.poll_done(context)),
            Below::Over(disk) => self.count_back(disk.poll_done(context)),
            Below::OverRam(disk) => self.count_back(disk.poll_done(context)),
        }
    }
}

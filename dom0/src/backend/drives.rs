//! dom0's own disks: devices, their partitions, and the files in their file systems.
//!
//! Guests' disks are made of parts of them. Who uses which sectors is written down ([`Claim`]): what one writes nobody else uses.

use super::pages::{Page, own_page};
use crate::devices::{self, Storage};
use crate::disks::{Path, device_name};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use blkback::disk::Disk as _;
use guest_sdk::sync::Lock;
use spin::Mutex;
use storage::SECTOR;
use storage::blocks::Blocks;
use storage::extents::{Extents, Window};
use storage::partitions;
use storage::volume::{self, BadFile, Volume};

/// A part of a disk of dom0's as a disk.
pub type Part = Window<Page, Storage>;

/// One at a time asks a file system, or changes it.
static FILES: Lock<()> = Lock::new(());

/// Sectors that somebody uses.
struct Used {
    id: u64,
    drive: String,
    extents: Extents,
    write: bool,
    by: String,
}

/// What is used, and the number of the next claim.
static USED: Mutex<(Vec<Used>, u64)> = Mutex::new((Vec::new(), 0));

/// The right to use some sectors, until it is dropped.
pub struct Claim(u64);

impl Claim {
    /// Has it be for `place`, a larger one.
    ///
    /// # Errors
    /// What to say: who uses some of it.
    pub fn extend(&self, place: &Place) -> Result<(), String> {
        let mut all = USED.lock();
        let own = all.0.iter().position(|used| used.id == self.0);
        let Some(mut used) = own.map(|own| all.0.swap_remove(own)) else { return Ok(()) };
        let clash = place.clash(&all.0, used.write);
        if clash.is_ok() {
            used.extents = place.extents.clone();
        }
        all.0.push(used);
        clash
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        USED.lock().0.retain(|used| used.id != self.0);
    }
}

/// Some sectors of a disk of dom0's.
#[derive(Clone)]
pub struct Place {
    drive: Storage,
    name: String,
    extents: Extents,
}

/// Finds a disk of dom0's, or a partition.
///
/// # Errors
/// What to say.
pub async fn find(name: &str) -> Result<Place, String> {
    let (disk, partition) = device_name(name).ok_or_else(|| format!("{name:?} is no disk of dom0's"))?;
    let drive = devices::storage(disk)?;
    let whole = drive.properties().sectors;
    let Some(wanted) = partition else {
        let extents = Extents::one(0, whole, whole).map_err(|error| format!("{name}: {error}"))?;
        return Ok(Place { drive, name: disk.to_string(), extents });
    };
    let mut blocks = Blocks::new(drive, own_page).map_err(|error| format!("{disk}: {error}"))?;
    let partitions = match partitions::read(&mut blocks).await {
        Ok(found) => found,
        Err(partitions::BadTable::None) => Vec::new(),
        Err(error) => return Err(format!("{disk}: {error}")),
    };
    let Some(found) = partitions.iter().find(|found| found.number == wanted) else {
        let names: Vec<String> = partitions.iter().map(|found| format!("{disk}{}", found.number)).collect();
        let there = if names.is_empty() { "none".to_string() } else { names.join(", ") };
        return Err(format!("{disk} has no partition {wanted}: there is {there}"));
    };
    Ok(Place { drive: blocks.into_disk(), name: disk.to_string(), extents: found.extents.clone() })
}

impl Place {
    /// How many sectors it has.
    pub fn sectors(&self) -> u64 {
        self.extents.sectors()
    }

    /// It as a disk.
    pub fn disk(&self) -> Part {
        Window::new(self.drive.clone(), self.extents.clone())
    }

    /// Uses it from here on.
    ///
    /// # Errors
    /// What to say: who uses it, when either of both writes.
    pub fn claim(&self, write: bool, by: &str) -> Result<Claim, String> {
        if write && self.drive.properties().readonly {
            return Err("the disk is only read: say readonly".into());
        }
        let mut all = USED.lock();
        self.clash(&all.0, write)?;
        all.1 += 1;
        let id = all.1;
        let (drive, extents, by) = (self.name.clone(), self.extents.clone(), by.to_string());
        all.0.push(Used { id, drive, extents, write, by });
        Ok(Claim(id))
    }
}

impl Place {
    /// Whether nobody uses any of it, or nobody writes to it.
    fn clash(&self, all: &[Used], write: bool) -> Result<(), String> {
        let overlap = |other: &Extents| {
            self.extents.runs().any(|(at, sectors)| {
                other.runs().any(|(first, count)| first < at + sectors && at < first + count)
            })
        };
        let clash = all
            .iter()
            .find(|used| used.drive == self.name && (write || used.write) && overlap(&used.extents));
        match clash {
            Some(used) => {
                let how = if used.write { "written" } else { "read" };
                Err(format!("it is {how} by {} already: two share only what both only read", used.by))
            }
            None => Ok(()),
        }
    }

    /// Where it lies.
    pub fn extents(&self) -> &Extents {
        &self.extents
    }
}

/// Has a file grow to so many bytes; where it is then.
///
/// # Errors
/// What to say; the file is as it was.
pub async fn grow(path: &Path, bytes: u64) -> Result<Place, String> {
    let say = |error: BadFile| format!("{path}: {error}");
    let volume = find(&path.device).await?;
    let _one = FILES.lock().await;
    volume.claim_free(&path.to_string())?;
    let mut files = Volume::mount(volume.disk(), own_page).await.map_err(say)?;
    let extents = files.grow(&path.file, bytes).await.map_err(say)?;
    let extents = extents.within(&volume.extents, volume.drive.properties().sectors);
    let extents = extents.map_err(|error| format!("{path}: {error}"))?;
    Ok(Place { extents, ..volume })
}

/// Where a file is; made with so many bytes, if it is not there and they are said. Tells whether it was made.
///
/// # Errors
/// What to say.
pub async fn file(path: &Path, make: Option<u64>) -> Result<(Place, bool), String> {
    let say = |error: BadFile| format!("{path}: {error}");
    let volume = find(&path.device).await?;
    let _one = FILES.lock().await;
    let mut files = Volume::mount(volume.disk(), own_page).await.map_err(say)?;
    let (extents, made) = match (files.find(&path.file).await, make) {
        (Err(missing @ (BadFile::NotFound(_) | BadFile::Empty)), Some(bytes)) => {
            volume.claim_free(&path.to_string())?;
            if missing == BadFile::Empty {
                // Its making was cut off.
                files.remove(&path.file).await.map_err(say)?;
            }
            (files.create(&path.file, bytes).await.map_err(say)?, true)
        }
        (found, _) => (found.map_err(say)?, false),
    };
    let extents = extents.within(&volume.extents, volume.drive.properties().sectors);
    let extents = extents.map_err(|error| format!("{path}: {error}"))?;
    Ok((Place { extents, ..volume }, made))
}

/// Makes a FAT file system on a disk or a partition; only if nothing is there, or by `force`.
///
/// # Errors
/// What to say.
pub async fn format(name: &str, force: bool) -> Result<(), String> {
    let say = |why: &dyn core::fmt::Display| format!("{name}: {why}");
    let place = find(name).await?;
    let _one = FILES.lock().await;
    let _claim = place.claim(true, "disk format").map_err(|why| say(&why))?;
    let mut blocks = Blocks::new(place.disk(), own_page).map_err(|error| say(&error))?;
    let mut first = [0; SECTOR];
    blocks.read(0, &mut first).await.map_err(|error| say(&error))?;
    if !force && first.iter().any(|&byte| byte != 0) {
        return Err(say(&"something is there: `force` overwrites it"));
    }
    volume::format(&mut blocks).await.map_err(|error| say(&error))
}

impl Place {
    /// Whether the file system here may be changed: nobody writes to all of it.
    fn claim_free(&self, by: &str) -> Result<(), String> {
        let all = USED.lock();
        let whole = |used: &&Used| {
            used.drive == self.name
                && used.extents.pieces() == 1
                && self.extents.pieces() == 1
                && used
                    .extents
                    .runs()
                    .zip(self.extents.runs())
                    .any(|((at, sectors), (first, count))| at <= first && first + count <= at + sectors)
        };
        match all.0.iter().find(whole) {
            Some(used) => Err(format!("{by}: the file system is used as a disk by {}", used.by)),
            None => Ok(()),
        }
    }
}

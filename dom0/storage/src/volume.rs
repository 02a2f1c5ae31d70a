//! Files in a FAT file system, the one that every system can make and fill. The crate hadris-fat does all of it.
//!
//! It is asked where a file lies, and to make files and to have them grow at their end; what is in a file keeps its place. So a guest's
//! requests never wait for it, and a failure of power between two of them finds it as it was.

use crate::blocks::Blocks;
use crate::extents::Extents;
use crate::{NewPage, SECTOR};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use blkback::disk::{Disk, DiskError, GuestPage};
use core::fmt;
use hadris_fat::FatOptions;
use hadris_fat::async_::FatFs;
use hadris_fs::{DirCursor, Extent, FileType, MountOptions, Name, Resolve, SetAttr};
use hadris_io::ErrorKind;

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadFile {
    /// There is no file system that is known.
    NoFileSystem,
    /// There is none of this name; what there is in its directory.
    NotFound(Vec<String>),
    /// It is a directory, or something on its path is none.
    NoFile,
    /// It is empty.
    Empty,
    /// Its size in bytes is no multiple of a sector.
    Size(u64),
    /// It is to be made, and so many bytes are not free.
    Full {
        /// What it needs.
        wanted: u64,
        /// What there is.
        free: u64,
    },
    /// The file system does not have files of so many bytes.
    Large(u64),
    /// It is to be made, and the file system is only read.
    ReadOnly,
    /// Anything else.
    Failed(String),
}

impl fmt::Display for BadFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFileSystem => f.write_str("there is no FAT file system"),
            Self::NotFound(there) if there.is_empty() => {
                f.write_str("there is no such file: its directory is empty")
            }
            Self::NotFound(there) => write!(f, "there is no such file: there is {}", there.join(", ")),
            Self::NoFile => f.write_str("it is a directory, or something on its path is none"),
            Self::Empty => f.write_str("it is empty: a disk has at least one sector of 512 bytes"),
            Self::Size(bytes) => {
                write!(f, "its size, {bytes} bytes, is not a multiple of a sector of 512 bytes")
            }
            Self::Full { wanted, free } => {
                write!(f, "the file system is too full: {wanted} bytes are needed, {free} are free")
            }
            Self::Large(bytes) => {
                write!(f, "it would have {bytes} bytes: a file in FAT has less than 4 GiB")
            }
            Self::ReadOnly => f.write_str("it cannot be made: the file system is only read"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

impl core::error::Error for BadFile {}

/// Names of a directory that a message lists.
const NAMES: usize = 8;

type Error = hadris_io::Error<DiskError>;

fn failed(error: &Error) -> BadFile {
    match error.kind() {
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::InvalidInput => BadFile::NoFile,
        ErrorKind::NotRecognized => BadFile::NoFileSystem,
        ErrorKind::ReadOnly => BadFile::ReadOnly,
        _ => BadFile::Failed(format!("the file system: {error}")),
    }
}

/// A file system.
pub struct Volume<P, D> {
    files: FatFs<Blocks<P, D>>,
    /// Sectors of its disk.
    sectors: u64,
}

impl<P, D> fmt::Debug for Volume<P, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("sectors", &self.sectors).finish_non_exhaustive()
    }
}

impl<P: GuestPage, D: Disk<P>> Volume<P, D> {
    /// The file system of a disk.
    ///
    /// # Errors
    /// [`BadFile::NoFileSystem`], or what its device says.
    pub async fn mount(disk: D, new_page: NewPage<P>) -> Result<Self, BadFile> {
        let blocks = Blocks::new(disk, new_page).map_err(|error| BadFile::Failed(error.to_string()))?;
        let sectors = blocks.sectors();
        match FatFs::mount(blocks, MountOptions::new()).await {
            Ok(files) => Ok(Self { files, sectors }),
            Err(error) => Err(failed(error.error())),
        }
    }

    /// Where a file lies on the disk of this file system.
    ///
    /// # Errors
    /// [`BadFile`].
    pub async fn find(&mut self, path: &str) -> Result<Extents, BadFile> {
        let node = match self.files.resolve(path.as_bytes(), Resolve::Lexical).await {
            Ok(node) => node,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(BadFile::NotFound(self.names(directory(path).0).await));
            }
            Err(error) => return Err(failed(&error)),
        };
        let found = self.extents(node).await;
        self.files.forget(node, 1);
        found
    }

    async fn extents(&mut self, node: hadris_fs::NodeId) -> Result<Extents, BadFile> {
        let about = self.files.stat(node).await.map_err(|error| failed(&error))?;
        if about.file_type() != FileType::File {
            return Err(BadFile::NoFile);
        }
        let bytes = about.len();
        if bytes == 0 {
            return Err(BadFile::Empty);
        }
        if !bytes.is_multiple_of(SECTOR as u64) {
            return Err(BadFile::Size(bytes));
        }
        let damaged = || BadFile::Failed("the file system: the places of its data are damaged".into());
        let (mut extents, mut at) = (Extents::default(), 0);
        let mut runs = [Extent::new(0, 0); 64];
        while at < bytes {
            let count = self.files.extents(node, at, &mut runs).await.map_err(|error| failed(&error))?;
            for run in runs.iter().take(count) {
                // A run begins where the one before it ended, and is whole sectors.
                let aligned = (run.offset() | run.len()).is_multiple_of(SECTOR as u64);
                if run.file_offset() != at || !aligned {
                    return Err(damaged());
                }
                let (first, sectors) = (run.offset() / SECTOR as u64, run.len() / SECTOR as u64);
                extents.push(first, sectors, self.sectors).map_err(|_| damaged())?;
                at += run.len();
            }
            if count == 0 {
                return Err(damaged());
            }
        }
        if extents.sectors() * SECTOR as u64 == bytes { Ok(extents) } else { Err(damaged()) }
    }

    /// Makes a file of so many bytes of zeros, whole sectors; nothing is left of it when that fails. It is on the disk afterwards.
    ///
    /// # Errors
    /// [`BadFile`].
    pub async fn create(&mut self, path: &str, bytes: u64) -> Result<Extents, BadFile> {
        let (parent, name) = directory(path);
        if u32::try_from(bytes).is_err() {
            return Err(BadFile::Large(bytes));
        }
        let room = self.files.statfs().await.map_err(|error| failed(&error))?;
        let free = room.free_bytes();
        if free < bytes {
            return Err(BadFile::Full { wanted: bytes, free });
        }
        let parent = self.files.resolve(parent.as_bytes(), Resolve::Lexical).await;
        let parent = parent.map_err(|error| match error.kind() {
            ErrorKind::NotFound => BadFile::Failed("there is no such directory".into()),
            _ => failed(&error),
        })?;
        let name = Name::new(name);
        let made = match self.files.create(parent, name, &SetAttr::new()).await {
            Ok(node) => {
                let grown = self.files.truncate(node, bytes).await;
                let made = match grown {
                    Ok(()) => self.files.fsync(node).await.map_err(|error| failed(&error)),
                    Err(error) if error.kind() == ErrorKind::NoSpace => {
                        Err(BadFile::Full { wanted: bytes, free })
                    }
                    Err(error) => Err(failed(&error)),
                };
                let made = match made {
                    Ok(()) => self.extents(node).await,
                    Err(error) => Err(error),
                };
                self.files.forget(node, 1);
                if made.is_err() {
                    // The first error is what is told.
                    let _ = self.files.unlink(parent, name).await;
                }
                made
            }
            Err(error) => Err(failed(&error)),
        };
        self.files.forget(parent, 1);
        let synced = self.files.sync().await;
        let extents = made?;
        synced.map_err(|error| failed(&error))?;
        Ok(extents)
    }

    /// Has a file grow to so many bytes, whole sectors; what is new is zeros, what was there stays where it is. One that has as many or more is
    /// left as it is. When that fails the file is as it was. It is on the disk afterwards.
    ///
    /// # Errors
    /// [`BadFile`].
    pub async fn grow(&mut self, path: &str, bytes: u64) -> Result<Extents, BadFile> {
        let old = self.find(path).await?;
        let there = old.sectors() * SECTOR as u64;
        if bytes <= there {
            return Ok(old);
        }
        if u32::try_from(bytes).is_err() {
            return Err(BadFile::Large(bytes));
        }
        let room = self.files.statfs().await.map_err(|error| failed(&error))?;
        let full = BadFile::Full { wanted: bytes - there, free: room.free_bytes() };
        let node = self.files.resolve(path.as_bytes(), Resolve::Lexical).await;
        let node = node.map_err(|error| failed(&error))?;
        let grown = match self.files.truncate(node, bytes).await {
            Ok(()) => self.files.fsync(node).await.map_err(|error| failed(&error)),
            // It has freed again what it had taken by then.
            Err(error) if error.kind() == ErrorKind::NoSpace => Err(full),
            Err(error) => Err(failed(&error)),
        };
        let extents = match grown {
            Ok(()) => self.extents(node).await,
            Err(error) => Err(error),
        };
        self.files.forget(node, 1);
        let synced = self.files.sync().await;
        let extents = extents?;
        synced.map_err(|error| failed(&error))?;
        Ok(extents)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// [`BadFile`].
    pub async fn remove(&mut self, path: &str) -> Result<(), BadFile> {
        let (parent, name) = directory(path);
        let resolved = self.files.resolve(parent.as_bytes(), Resolve::Lexical).await;
        let node = resolved.map_err(|error| failed(&error))?;
        let removed = self.files.unlink(node, Name::new(name)).await;
        self.files.forget(node, 1);
        removed.map_err(|error| failed(&error))?;
        self.files.sync().await.map_err(|error| failed(&error))
    }

    /// Names in a directory, the first few of them.
    async fn names(&mut self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        let Ok(node) = self.files.resolve(path.as_bytes(), Resolve::Lexical).await else { return names };
        let mut cursor = DirCursor::default();
        while names.len() < NAMES
            && let Ok(Some(entry)) = self.files.readdir(node, cursor).await
        {
            cursor = entry.next_cursor();
            names.push(String::from_utf8_lossy(entry.name().as_bytes()).into_owned());
        }
        self.files.forget(node, 1);
        names
    }
}

/// Makes a file system of the kind that fits the size. All that was there is lost.
///
/// # Errors
/// [`BadFile::Failed`].
pub async fn format<P: GuestPage, D: Disk<P>>(disk: &mut Blocks<P, D>) -> Result<(), BadFile> {
    hadris_fat::async_::format(disk, &FatOptions::new()).await.map_err(|error| failed(&error))?;
    disk.make_durable().await.map_err(|error| BadFile::Failed(error.to_string()))
}

/// The directory of a path, and the name in it.
fn directory(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
        None => ("/", path),
    }
}

//! Partitions of a device: MBR with logical ones, and GPT. The crate hadris-part reads them; what it says is checked once more.

use crate::blocks::Blocks;
use crate::extents::Extents;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use blkback::disk::{Disk, GuestPage};
use core::fmt;
use core::ops::ControlFlow;
use hadris_io::ErrorKind;

/// Most partitions of a device that are looked at.
const MOST: usize = 128;

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number as in `vda1`: from 1 on, logical ones from 5 on.
    pub number: u32,
    /// Where it lies.
    pub extents: Extents,
}

/// Why there are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadTable {
    /// There is no table.
    None,
    /// There is one, and it is wrong so.
    Bad(String),
    /// The device failed.
    Device(String),
}

impl fmt::Display for BadTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("it has no partition table"),
            Self::Bad(why) => write!(f, "its partition table is damaged: {why}"),
            Self::Device(why) => write!(f, "its partition table cannot be read: {why}"),
        }
    }
}

/// The partitions of a device: empty ones, and those that are not all on the device, are left out.
///
/// # Errors
/// [`BadTable`].
pub async fn read<P: GuestPage, D: Disk<P>>(device: &mut Blocks<P, D>) -> Result<Vec<Partition>, BadTable> {
    let sectors = device.sectors();
    let mut found = Vec::new();
    let scanned = hadris_part::async_::scan(device, |partition| {
        if let Ok(extents) = Extents::one(partition.start(), partition.len(), sectors)
            && extents.sectors() > 0
        {
            found.push(Partition { number: partition.slot() as u32 + 1, extents });
        }
        if found.len() < MOST { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    match scanned.await {
        Ok(_) => Ok(found),
        Err(error) => Err(match error.kind() {
            ErrorKind::NotRecognized => BadTable::None,
            ErrorKind::Io => BadTable::Device(error.to_string()),
            _ => BadTable::Bad(error.to_string()),
        }),
    }
}

//! Disks made of a device: what a description means by a partition, a file, or a copy-on-write file.
//!
//! All are [`blkback::disk::Disk`]s over another, so one that is tested over memory works over a device:
//!
//! | I want to… | go to |
//! |---|---|
//! | see a file or a partition as a disk | [`extents`] |
//! | keep what is written beside a base that others see, too | [`overlay`] |
//! | find, make and list files | [`volume`]: FAT, by the crate hadris-fat |
//! | find partitions | [`partitions`]: MBR and GPT, by the crate hadris-part |
//! | wait for one transfer after the other | [`blocks`] |
//!
//! A file's place on the device is looked up once, when its disk is opened. From then on requests of guests go to the device without the
//! file system, several at a time, from and to the pages that the guest granted. The file system writes when files are made, and
//! never afterwards: it has nothing to do with what a flush means.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod blocks;
pub mod extents;
pub mod overlay;
pub mod partitions;
pub mod volume;

mod joint;

use blkback::disk::{Disk, GuestPage};

/// Bytes of a sector.
pub const SECTOR: usize = hypercall_abi::io::blkif::SECTOR_SIZE;

/// Gives a page of our own, which a device may read and write; none when there is no memory.
pub type NewPage<P> = fn() -> Option<P>;

/// Any disk over pages `P`.
pub type AnyDisk<P> = alloc::boxed::Box<dyn Disk<P> + Send>;

/// Fills sectors of pages with zeros.
fn zero<P: GuestPage>(pieces: &[blkback::disk::Piece<P>]) {
    for piece in pieces {
        let (mut offset, mut left) = (usize::from(piece.offset), usize::from(piece.bytes));
        while left > 0 {
            let now = left.min(SECTOR);
            piece.page.write_bytes(offset, &[0; SECTOR][..now]);
            (offset, left) = (offset + now, left - now);
        }
    }
}

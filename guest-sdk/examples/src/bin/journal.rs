//! A guest that remembers: each time it starts it finds what it wrote before, on each of its disks, and adds to it.
//!
//! With `record` it goes on adding until somebody ends it, and says after each flush how far it has come. `acked-DISK=N` is how far it
//! was heard to have come: what is missing of that, or is not as it was written, is an error. (`cargo xtask kill` ends it in the worst
//! way and looks.) With `pause=SECONDS` it says what it has written, and waits so long before the flush.
//!
//! A disk is a ring of blocks of 4 KiB: entry N is in block N modulo their number, with a checksum. A batch is several blocks, and a flush.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use guest_sdk::block::{self, BlockError, Disk};
use guest_sdk::sync::Bell;
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, executor, println, time};

const BLOCK: usize = 4096;
const SECTORS: u64 = BLOCK as u64 / 512;
/// Entries of a disk at most: all are read at each start.
const MOST: u64 = 256;
/// Entries before a flush, of a recorder.
const BATCH: u64 = 5;
const MAGIC: u64 = u64::from_le_bytes(*b"Xjournal");
/// Magic, number, checksum, length.
const HEAD: usize = 32;

#[entry]
async fn main(mut domain: Domain) -> Result<(), BlockError> {
    let Some(store) = domain.xenstore().map(SharedStore::new) else {
        println!("the first domain has no xenstore, and no disks");
        return Ok(());
    };
    let record = domain.command_line.has("record");
    let pause = domain.command_line.number("pause").unwrap_or(0);
    let failed = Arc::new(AtomicU64::new(0));
    let left = Arc::new((AtomicU64::new(0), Bell::new()));
    for name in block::disks(&store).await? {
        let disk = Disk::open(&store, &name).await?;
        let acked = domain.command_line.number(&format!("acked-{name}")).unwrap_or(0);
        let (failed, left) = (Arc::clone(&failed), Arc::clone(&left));
        left.0.fetch_add(1, Ordering::AcqRel);
        executor::spawn(async move {
            if let Err(why) = keep(&disk, &name, acked, record, pause).await {
                println!("journal {name}: {why}");
                failed.fetch_add(1, Ordering::AcqRel);
            }
            left.0.fetch_sub(1, Ordering::AcqRel);
            left.1.ring();
        });
    }
    loop {
        let seen = left.1.rings();
        if left.0.load(Ordering::Acquire) == 0 {
            break;
        }
        left.1.after(seen).await;
    }
    if failed.load(Ordering::Acquire) == 0 { Ok(()) } else { Err(BlockError::Failed) }
}

/// Looks at the journal of a disk, and adds to it.
async fn keep(disk: &Disk, name: &str, acked: u64, record: bool, pause: u64) -> Result<(), String> {
    let say = |error: BlockError| format!("{error}");
    let blocks = (disk.info().sectors / SECTORS).min(MOST);
    if blocks < 4 * BATCH {
        return Err(format!("a disk of {} sectors is too small for a journal", disk.info().sectors));
    }
    let mut block = alloc::vec![0; BLOCK];
    let mut found = alloc::vec![0; blocks as usize];
    let mut newest: (u64, String) = (0, String::new());
    for at in 0..blocks {
        disk.read(at * SECTORS, &mut block).await.map_err(say)?;
        if let Some((number, text)) = read(&block).filter(|(number, _)| number % blocks == at) {
            found[at as usize] = number;
            if number > newest.0 {
                newest = (number, String::from_utf8_lossy(text).into_owned());
            }
        }
    }
    // What came behind the last flush that was heard of may be there or not, and was written over the oldest: half of them at most.
    let first = (acked + blocks / 2).saturating_sub(blocks) + 1;
    let lost: Vec<u64> =
        (first..=acked).filter(|number| found[(number % blocks) as usize] < *number).collect();
    if !lost.is_empty() {
        return Err(format!("{} of the flushed entries {first} to {acked} are lost: {lost:?}", lost.len()));
    }
    let boot = newest.1.split(' ').nth(1).and_then(|boot| boot.parse::<u64>().ok()).unwrap_or(0) + 1;
    println!("journal {name}: boot {boot}; entry {} was {:?}", newest.0, newest.1);
    let mut number = newest.0;
    loop {
        let batch = if record { BATCH } else { 1 };
        for _ in 0..batch {
            number += 1;
            write(&mut block, number, &format!("boot {boot} entry {number}"));
            disk.write(number % blocks * SECTORS, &block).await.map_err(say)?;
        }
        if pause > 0 {
            println!("journal {name}: wrote {number}");
            time::after(Duration::from_secs(pause)).await;
        }
        disk.flush().await.map_err(say)?;
        println!("journal {name}: flushed {number}");
        if !record {
            return Ok(());
        }
    }
}

/// Makes an entry: the text, and noise behind it so that no part of the block is as in another.
fn write(block: &mut [u8], number: u64, text: &str) {
    let (head, body) = block.split_at_mut(HEAD);
    for (at, word) in body.chunks_mut(8).enumerate() {
        let noise = (number << 16 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        word.copy_from_slice(&noise[..word.len()]);
    }
    body[..text.len()].copy_from_slice(text.as_bytes());
    for (word, value) in head.chunks_mut(8).zip([MAGIC, number, checksum(body), text.len() as u64]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The number and the text of an entry, if it is one.
fn read(block: &[u8]) -> Option<(u64, &[u8])> {
    let (head, body) = block.split_at(HEAD);
    let mut words = head.chunks(8).filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)));
    let (magic, number, sum, length) = (words.next()?, words.next()?, words.next()?, words.next()?);
    if magic != MAGIC || sum != checksum(body) {
        return None;
    }
    Some((number, body.get(..length as usize)?))
}

/// FNV-1a over words.
fn checksum(body: &[u8]) -> u64 {
    body.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| {
        let word = word.iter().rev().fold(0, |value: u64, &byte| value << 8 | u64::from(byte));
        (sum ^ word).wrapping_mul(0x0100_0000_01b3)
    })
}

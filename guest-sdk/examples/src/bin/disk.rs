//! Disks: several tasks write to each disk of this guest and read again what they wrote. `rounds=` says how often.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::block::{self, BlockError, Disk};
use guest_sdk::sync::Bell;
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, executor, println};

const TASKS: u64 = 4;
const SECTORS: usize = 16;

#[entry]
async fn main(mut domain: Domain) -> Result<(), BlockError> {
    let Some(store) = domain.xenstore().map(SharedStore::new) else {
        println!("the first domain has no xenstore, and no disks");
        return Ok(());
    };
    let rounds = domain.command_line.number("rounds").unwrap_or(4);
    let mut wrong = 0;
    for name in block::disks(&store).await? {
        let disk = Disk::open(&store, &name).await?;
        println!("disk {name}: {:?}", disk.info());
        wrong += if disk.info().readonly { show(&disk).await? } else { work(&disk, rounds).await? };
    }
    println!("{wrong} sectors were wrong");
    if wrong == 0 { Ok(()) } else { Err(BlockError::Failed) }
}

/// Shows the first line of a disk of text.
async fn show(disk: &Disk) -> Result<u64, BlockError> {
    let mut sector = [0; 512];
    disk.read(0, &mut sector).await?;
    let line = sector.split(|&byte| byte == b'\n').next().unwrap_or(&[]);
    println!("  it begins with {:?}", core::str::from_utf8(line).unwrap_or("no text"));
    println!("  writing to it: {:?}", disk.write(0, &sector).await);
    Ok(0)
}

/// Lets the tasks work on parts of the disk; gives the number of sectors that were not as they were written.
async fn work(disk: &Disk, rounds: u64) -> Result<u64, BlockError> {
    let wrong = Arc::new(AtomicU64::new(0));
    let done = Arc::new((AtomicU64::new(0), Bell::new()));
    let part = disk.info().sectors / TASKS;
    for task in 0..TASKS {
        let (disk, wrong, done) = (disk.clone(), Arc::clone(&wrong), Arc::clone(&done));
        executor::spawn(async move {
            match write_and_read(&disk, task * part, part, rounds).await {
                Ok(found) => wrong.fetch_add(found, Ordering::Relaxed),
                Err(error) => {
                    println!("  task {task}: {error}");
                    wrong.fetch_add(1, Ordering::Relaxed)
                }
            };
            done.0.fetch_add(1, Ordering::Release);
            done.1.ring();
        });
    }
    loop {
        let seen = done.1.rings();
        if done.0.load(Ordering::Acquire) == TASKS {
            break;
        }
        done.1.after(seen).await;
    }
    println!("  flush: {:?}, discard: {:?}", disk.flush().await, disk.discard(0, 8).await);
    println!("  beyond its end: {:?}", disk.read(disk.info().sectors, &mut [0; 512]).await);
    Ok(wrong.load(Ordering::Relaxed))
}

async fn write_and_read(disk: &Disk, first: u64, sectors: u64, rounds: u64) -> Result<u64, BlockError> {
    let mut wrong = 0;
    for round in 0..rounds {
        for sector in (first..first + sectors - sectors % SECTORS as u64).step_by(SECTORS) {
            disk.write(sector, &content(sector, round)).await?;
        }
        disk.flush().await?;
        for sector in (first..first + sectors - sectors % SECTORS as u64).step_by(SECTORS) {
            let mut bytes = [0; SECTORS * 512];
            disk.read(sector, &mut bytes).await?;
            wrong += u64::from(bytes[..] != content(sector, round)[..]);
        }
    }
    Ok(wrong)
}

/// What belongs into sectors: nothing that is elsewhere, or was there before.
fn content(sector: u64, round: u64) -> Vec<u8> {
    let words =
        (0..SECTORS as u64 * 64).map(|word| (sector * 64 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round);
    words.flat_map(u64::to_le_bytes).collect()
}

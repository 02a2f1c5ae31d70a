//! Disks: several tasks write to each disk of this guest and read again what they wrote. `rounds=` says how often.
//!
//! With `grow` it waits until each of its disks has become larger, and writes its name to the new last sector; with `last` it shows what is
//! there.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use guest_sdk::block::{self, BlockError, Disk};
use guest_sdk::sync::Bell;
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, executor, println, time};

const TASKS: u64 = 4;
const SECTORS: usize = 16;

#[entry]
async fn main(mut domain: Domain) -> Result<(), BlockError> {
    let Some(store) = domain.xenstore().map(SharedStore::new) else {
        println!("the first domain has no xenstore, and no disks");
        return Ok(());
    };
    let rounds = domain.command_line.number("rounds").unwrap_or(4);
    let (grow, last) = (domain.command_line.has("grow"), domain.command_line.has("last"));
    let (mut wrong, mut growing) = (0, Vec::new());
    for name in block::disks(&store).await? {
        let disk = Disk::open(&store, &name).await?;
        println!("disk {name}: {:?}", disk.info());
        if grow {
            let sectors = disk.info().sectors;
            growing.push((disk, name, sectors));
            continue;
        }
        if last {
            let mut sector = [0; 512];
            disk.read(disk.info().sectors - 1, &mut sector).await?;
            println!("  its last sector begins with {:?}", first_line(&sector));
            continue;
        }
        wrong += if disk.info().readonly { show(&disk).await? } else { work(&disk, rounds).await? };
    }
    for (disk, name, before) in &growing {
        use_what_is_new(disk, name, *before).await?;
    }
    println!("{wrong} sectors were wrong");
    if wrong == 0 { Ok(()) } else { Err(BlockError::Failed) }
}

/// Shows the first line of a disk of text.
async fn show(disk: &Disk) -> Result<u64, BlockError> {
    let mut sector = [0; 512];
    disk.read(0, &mut sector).await?;
    println!("  it begins with {:?}", first_line(&sector));
    println!("  writing to it: {:?}", disk.write(0, &sector).await);
    Ok(0)
}

fn first_line(sector: &[u8]) -> &str {
    let line = sector.split(|&byte| byte == b'\n').next().unwrap_or(&[]);
    core::str::from_utf8(line).unwrap_or("no text")
}

/// Waits until a disk is larger, and uses its new end.
async fn use_what_is_new(disk: &Disk, name: &str, before: u64) -> Result<(), BlockError> {
    let mut sector = [0; 512];
    while disk.info().sectors == before {
        time::after(Duration::from_millis(20)).await;
    }
    let sectors = disk.info().sectors;
    disk.read(sectors - 1, &mut sector).await?;
    let zeros = sector.iter().all(|&byte| byte == 0);
    println!("  it grew from {before} to {sectors} sectors, and the new end is zeros: {zeros}");
    let text = alloc::format!("the end of {name}\n");
    sector[..text.len()].copy_from_slice(text.as_bytes());
    disk.write(sectors - 1, &sector).await?;
    disk.flush().await
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

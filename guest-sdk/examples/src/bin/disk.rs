//! Disks: several tasks write to each disk of this guest and read again what they wrote. `rounds=` says how often; with `busy` they go
//! on until the guest is asked to power off (dom0's `shutdown`).
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
use guest_examples::asked::Asked;
use guest_sdk::block::{self, BlockError, Disk};
use guest_sdk::sync::Bell;
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, executor, println, time};

const TASKS: u64 = 4;
const SECTORS: usize = 16;

/// How long to work.
#[derive(Clone)]
enum Shift {
    Rounds(u64),
    UntilAsked(Asked),
}

impl Shift {
    /// Whether there is a round after so many; the first there always is.
    fn goes_on(&self, rounds: u64) -> bool {
        match self {
            Self::Rounds(most) => rounds < *most,
            Self::UntilAsked(asked) => rounds == 0 || !asked.to_end(),
        }
    }
}

#[entry]
async fn main(mut domain: Domain) -> Result<(), BlockError> {
    let Some(store) = domain.xenstore().map(SharedStore::new) else {
        println!("the first domain has no xenstore, and no disks");
        return Ok(());
    };
    let words = &domain.command_line;
    let shift = match words.has("busy") {
        true => Shift::UntilAsked(Asked::listen(&store)),
        false => Shift::Rounds(words.number("rounds").unwrap_or(4)),
    };
    let (grow, last) = (words.has("grow"), words.has("last"));
    let (mut wrong, mut growing, mut writable) = (0, Vec::new(), Vec::new());
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
        if disk.info().readonly {
            show(&disk).await?;
        } else {
            writable.push(disk);
        }
    }
    for (disk, name, before) in &growing {
        use_what_is_new(disk, name, *before).await?;
    }
    wrong += work(&writable, &shift).await;
    println!("{wrong} sectors were wrong");
    if wrong == 0 { Ok(()) } else { Err(BlockError::Failed) }
}

/// Shows the first line of a disk of text.
async fn show(disk: &Disk) -> Result<(), BlockError> {
    let mut sector = [0; 512];
    disk.read(0, &mut sector).await?;
    println!("  it begins with {:?}", first_line(&sector));
    println!("  writing to it: {:?}", disk.write(0, &sector).await);
    Ok(())
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

/// Lets the tasks work on parts of all the disks; gives the number of sectors that were not as they were written.
async fn work(disks: &[Disk], shift: &Shift) -> u64 {
    let wrong = Arc::new(AtomicU64::new(0));
    let done = Arc::new((AtomicU64::new(0), Bell::new()));
    for (disk, task) in disks.iter().flat_map(|disk| (0..TASKS).map(move |task| (disk, task))) {
        let part = disk.info().sectors / TASKS;
        let (disk, wrong, done, shift) = (disk.clone(), Arc::clone(&wrong), Arc::clone(&done), shift.clone());
        executor::spawn(async move {
            match write_and_read(&disk, task * part, part, &shift).await {
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
        if done.0.load(Ordering::Acquire) == TASKS * disks.len() as u64 {
            break;
        }
        done.1.after(seen).await;
    }
    for disk in disks {
        println!("  flush: {:?}, discard: {:?}", disk.flush().await, disk.discard(0, 8).await);
        println!("  beyond its end: {:?}", disk.read(disk.info().sectors, &mut [0; 512]).await);
    }
    wrong.load(Ordering::Relaxed)
}

async fn write_and_read(disk: &Disk, first: u64, sectors: u64, shift: &Shift) -> Result<u64, BlockError> {
    let (mut wrong, mut round) = (0, 0);
    while shift.goes_on(round) {
        for sector in (first..first + sectors - sectors % SECTORS as u64).step_by(SECTORS) {
            disk.write(sector, &content(sector, round)).await?;
        }
        disk.flush().await?;
        for sector in (first..first + sectors - sectors % SECTORS as u64).step_by(SECTORS) {
            let mut bytes = [0; SECTORS * 512];
            disk.read(sector, &mut bytes).await?;
            wrong += u64::from(bytes[..] != content(sector, round)[..]);
        }
        round += 1;
    }
    Ok(wrong)
}

/// What belongs into sectors: nothing that is elsewhere, or was there before.
fn content(sector: u64, round: u64) -> Vec<u8> {
    let words =
        (0..SECTORS as u64 * 64).map(|word| (sector * 64 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round);
    words.flat_map(u64::to_le_bytes).collect()
}

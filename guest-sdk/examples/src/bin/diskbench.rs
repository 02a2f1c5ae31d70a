//! What reading from a disk costs: time for each request at several depths. Under `--icount` a nanosecond is an instruction, and
//! they are those of guest, hypervisor and dom0 together. `rounds=`, with `bytes=` and `depth=`, measures reads of one kind alone.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::block::{BlockError, Disk};
use guest_sdk::sync::Bell;
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, executor, println, time};

#[entry]
async fn main(mut domain: Domain) -> Result<(), BlockError> {
    let Some(store) = domain.xenstore().map(SharedStore::new) else {
        println!("the first domain has no xenstore, and no disks");
        return Ok(());
    };
    let name = domain.command_line.value("disk").unwrap_or("xvda");
    let disk = Disk::open(&store, name).await?;
    println!("disk {name}: {:?}", disk.info());
    if let Some(rounds) = domain.command_line.number("rounds") {
        let bytes = domain.command_line.number("bytes").unwrap_or(4096);
        let depth = domain.command_line.number("depth").unwrap_or(1);
        let ns = measure(&disk, false, bytes, depth, rounds).await;
        println!("read {bytes} bytes at depth {depth}: {} ns each", ns / (rounds * depth).max(1));
        return Ok(());
    }
    for write in [false, true] {
        if write && disk.info().readonly {
            continue;
        }
        for (bytes, depth) in [(4096, 1), (4096, 8), (4096, 32), (16384, 8), (131_072, 1), (131_072, 8)] {
            if bytes > disk.info().max_request {
                continue;
            }
            // Once so that all pages are known, then measured.
            measure(&disk, write, bytes, depth, 4).await;
            let requests = 64 * depth;
            let ns = measure(&disk, write, bytes, depth, 64).await;
            let verb = if write { "write" } else { "read" };
            println!("{verb} {bytes} bytes at depth {depth}: {} ns each", ns / requests);
        }
    }
    Ok(())
}

/// Lets `depth` tasks do `rounds` requests each; gives the time that it took.
async fn measure(disk: &Disk, write: bool, bytes: usize, depth: u64, rounds: u64) -> u64 {
    let left = Arc::new((AtomicU64::new(depth), Bell::new()));
    let places = (disk.info().sectors / (bytes as u64 / 512)).max(1);
    let begun = time::now_ns();
    for task in 0..depth {
        let (disk, left) = (disk.clone(), Arc::clone(&left));
        executor::spawn(async move {
            if let Err(error) = requests(&disk, write, bytes, task, depth, rounds, places).await {
                println!("task {task}: {error}");
            }
            if left.0.fetch_sub(1, Ordering::AcqRel) == 1 {
                left.1.ring();
            }
        });
    }
    loop {
        let seen = left.1.rings();
        if left.0.load(Ordering::Acquire) == 0 {
            return time::now_ns() - begun;
        }
        left.1.after(seen).await;
    }
}

async fn requests(
    disk: &Disk,
    write: bool,
    bytes: usize,
    task: u64,
    depth: u64,
    rounds: u64,
    places: u64,
) -> Result<(), BlockError> {
    let mut buffer = disk.buffer(bytes)?;
    for round in 0..rounds {
        let sector = (round * depth + task) % places * (bytes as u64 / 512);
        buffer = if write {
            disk.write_buffer(sector, buffer).await?
        } else {
            disk.read_buffer(sector, buffer).await?
        };
    }
    Ok(())
}

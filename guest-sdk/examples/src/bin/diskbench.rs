//! What reading from a disk costs: time for each request at several depths. Under `--icount` a nanosecond is an instruction, and
//! they are those of guest, hypervisor and dom0 together.
//!
//! `count=N`, with `bytes=`, `depth=`, `write` and `random`, measures N requests of one kind alone, as dom0's `device measure` does.
//! `throughput` measures four kinds so, three times each: those that the book compares with dom0's own.
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
    let words = &domain.command_line;
    if let Some(count) = words.number("count") {
        let work = Work {
            write: words.has("write"),
            random: words.has("random"),
            bytes: words.number("bytes").unwrap_or(4096),
            depth: words.number("depth").unwrap_or(1),
        };
        return rate(&disk, work, count).await;
    }
    if words.has("throughput") {
        for _ in 0..3 {
            for write in [false, true] {
                let streams = Work { write, random: false, bytes: 131_072, depth: 8 };
                rate(&disk, streams, 512).await?;
                rate(&disk, Work { random: true, bytes: 4096, depth: 32, ..streams }, 4096).await?;
            }
        }
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
            let work = Work { write, random: false, bytes, depth };
            measure(&disk, work, 4 * depth).await?;
            let requests = 64 * depth;
            let ns = measure(&disk, work, requests).await?;
            println!("{} {bytes} bytes at depth {depth}: {} ns each", work.verb(), ns / requests);
        }
    }
    Ok(())
}

/// What is asked of the disk.
#[derive(Clone, Copy)]
struct Work {
    write: bool,
    /// Here and there instead of one after the other.
    random: bool,
    bytes: usize,
    /// Requests under way at a time.
    depth: u64,
}

impl Work {
    fn verb(self) -> &'static str {
        if self.write { "write" } else { "read" }
    }
}

/// Does `count` requests and says how fast they were.
async fn rate(disk: &Disk, work: Work, count: u64) -> Result<(), BlockError> {
    let ns = measure(disk, work, count).await?.max(1);
    let order = if work.random { "random" } else { "sequential" };
    let kib_s = (count * work.bytes as u64 / 1024).saturating_mul(1_000_000_000) / ns;
    println!(
        "{order} {} of {} bytes at depth {}: {kib_s} KiB/s, {} ns each",
        work.verb(),
        work.bytes,
        work.depth,
        ns / count.max(1)
    );
    Ok(())
}

/// Lets `depth` tasks do `count` requests together; gives the time that it took.
async fn measure(disk: &Disk, work: Work, count: u64) -> Result<u64, BlockError> {
    struct Shared {
        next: AtomicU64,
        left: AtomicU64,
        failed: AtomicU64,
        bell: Bell,
    }
    let shared = Arc::new(Shared {
        next: AtomicU64::new(0),
        left: AtomicU64::new(work.depth),
        failed: AtomicU64::new(0),
        bell: Bell::new(),
    });
    let begun = time::now_ns();
    for task in 0..work.depth {
        let (disk, shared) = (disk.clone(), Arc::clone(&shared));
        executor::spawn(async move {
            if let Err(error) = requests(&disk, work, &shared.next, count).await {
                println!("task {task}: {error}");
                shared.failed.fetch_add(1, Ordering::AcqRel);
            }
            if shared.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                shared.bell.ring();
            }
        });
    }
    loop {
        let seen = shared.bell.rings();
        if shared.left.load(Ordering::Acquire) == 0 {
            let ns = time::now_ns() - begun;
            return if shared.failed.load(Ordering::Acquire) == 0 { Ok(ns) } else { Err(BlockError::Failed) };
        }
        shared.bell.after(seen).await;
    }
}

/// Does requests until `count` of them are taken.
async fn requests(disk: &Disk, work: Work, next: &AtomicU64, count: u64) -> Result<(), BlockError> {
    let sectors = work.bytes as u64 / 512;
    let places = (disk.info().sectors / sectors.max(1)).max(1);
    let mut buffer = disk.buffer(work.bytes)?;
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= count {
            return Ok(());
        }
        // Places that are far apart, and each of them in the end.
        let place = if work.random { number.wrapping_mul(7919) % places } else { number % places };
        buffer = if work.write {
            disk.write_buffer(place * sectors, buffer).await?
        } else {
            disk.read_buffer(place * sectors, buffer).await?
        };
    }
}

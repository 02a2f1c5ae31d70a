//! Rewrites its own page tables in batches and looks that they say what was asked. Words: `slots=`, `batch=`, `seconds=`
//! (for ever when not said).
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use guest_sdk::abi::Errno;
use guest_sdk::memory::{Access, Page, Region};
use guest_sdk::{Domain, entry, println, time};

const POOL: usize = 16;

#[entry]
fn main(domain: Domain) -> Result<(), Errno> {
    let line = domain.command_line;
    let slots: usize = line.number("slots").unwrap_or(1024).clamp(1, 1 << 20);
    let batch: usize = line.number("batch").unwrap_or(128).clamp(1, slots);
    let mut seconds: Option<u64> = line.number("seconds");
    let mut pages = Vec::new();
    for tag in 0..POOL {
        let mut page = Page::new()?;
        page.bytes_mut()[..8].copy_from_slice(&(tag as u64).to_le_bytes());
        pages.push(page);
    }
    let mut region = Region::new(slots as u64, pages)?;
    println!("pagetables: {slots} slots over {POOL} pages, batches of {batch}");
    let (mut round, mut updates, mut wrong) = (0usize, 0u64, 0u64);
    let mut since = time::now_ns();
    loop {
        for first in (0..slots).step_by(batch) {
            let last = (first + batch).min(slots);
            for slot in first..last {
                match wanted(slot, round) {
                    Some((page, access)) => region.map(slot, page, access),
                    None => region.unmap(slot),
                }
            }
            updates += region.commit()? as u64;
            // One slot of each batch, another one each round.
            let slot = first + round % (last - first);
            wrong += u64::from(!holds(&region, slot, round));
        }
        round += 1;
        let took = time::now_ns() - since;
        if took >= 1_000_000_000 {
            println!(
                "pagetables: {} updates/s, {wrong} wrong",
                u128::from(updates) * 1_000_000_000 / u128::from(took)
            );
            (updates, since) = (0, time::now_ns());
            seconds = seconds.map(|left| left.saturating_sub(1));
            if seconds == Some(0) {
                return if wrong == 0 { Ok(()) } else { Err(Errno::EIO) };
            }
        }
    }
}

/// What a slot shows in a round: some page read-only, some page writable, or nothing.
fn wanted(slot: usize, round: usize) -> Option<(usize, Access)> {
    let page = (slot + round) % POOL;
    match (slot / POOL + round) % 3 {
        0 => Some((page, Access::Read)),
        1 => Some((page, Access::ReadWrite)),
        _ => None,
    }
}

fn holds(region: &Region, slot: usize, round: usize) -> bool {
    let write = region.write(slot, 8, round as u64);
    match wanted(slot, round) {
        None => region.read(slot, 0).is_err() && write.is_err(),
        Some((page, access)) => {
            region.read(slot, 0) == Ok(page as u64) && write.is_ok() == (access == Access::ReadWrite)
        }
    }
}

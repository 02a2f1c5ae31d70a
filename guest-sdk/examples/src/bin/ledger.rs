//! A ledger in xenstore: two accounts whose sum never changes, whatever becomes of the requests that change them.
//!
//! `rounds=` says how often something is booked. A store that fails in the middle of a request answers EIO, and nothing is changed then:
//! this looks whether that is so, and books again.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::string::{String, ToString};
use core::time::Duration;
use guest_sdk::abi::Errno;
use guest_sdk::xenstore::{StoreError, Xenstore};
use guest_sdk::{Domain, entry, println, time};

const SUM: u64 = 1000;
/// Between two bookings: however fast the machine is, `rounds=` says how long it takes at least.
const PAUSE: Duration = Duration::from_millis(5);

/// What was seen of the store's failures.
#[derive(Default)]
struct Seen {
    failures: u64,
    wrong: u64,
}

#[entry]
async fn main(mut domain: Domain) -> Result<(), StoreError> {
    let rounds: u64 = domain.command_line.number("rounds").unwrap_or(1000);
    let Some(mut store) = domain.xenstore() else { return Ok(()) };
    let mut seen = Seen::default();
    while write(&mut store, "left", SUM, &mut seen).await? || write(&mut store, "right", 0, &mut seen).await?
    {
    }
    while refused(store.watch("data/right", "right").await, &mut seen)? {}
    // A watch tells once that it is there.
    store.event().await?;
    for round in 1..=rounds {
        let before =
            (number(&mut store, "left", &mut seen).await?, number(&mut store, "right", &mut seen).await?);
        if before.0 + before.1 != SUM {
            println!("round {round}: {} and {} are not {SUM}", before.0, before.1);
            seen.wrong += 1;
        }
        let amount = round * 7919 % SUM;
        let after = ((before.0 + amount) % SUM, SUM - (before.0 + amount) % SUM);
        match book(&mut store, after).await {
            Ok(()) => {
                // Everybody who watches hears of it.
                let (path, _) = store.event().await?;
                let now = (
                    number(&mut store, "left", &mut seen).await?,
                    number(&mut store, "right", &mut seen).await?,
                );
                if path != "data/right" || now != after {
                    println!("round {round}: {path} {now:?} instead of {after:?}");
                    seen.wrong += 1;
                }
            }
            Err(StoreError::Refused(Errno::EIO)) => {
                seen.failures += 1;
                let now = (
                    number(&mut store, "left", &mut seen).await?,
                    number(&mut store, "right", &mut seen).await?,
                );
                if now != before {
                    println!("round {round}: {now:?} after a failure instead of {before:?}");
                    seen.wrong += 1;
                }
            }
            Err(error) => return Err(error),
        }
        time::after(PAUSE).await;
    }
    println!("{rounds} rounds, {} failures, {} wrong", seen.failures, seen.wrong);
    Ok(())
}

/// Both accounts in one go.
async fn book(store: &mut Xenstore, (left, right): (u64, u64)) -> Result<(), StoreError> {
    let mut booking = store.transaction().await?;
    booking.write("data/left", left.to_string().as_bytes()).await?;
    booking.write("data/right", right.to_string().as_bytes()).await?;
    booking.commit().await
}

/// Whether a request is to be made again, since the store failed.
fn refused(result: Result<(), StoreError>, seen: &mut Seen) -> Result<bool, StoreError> {
    match result {
        Err(StoreError::Refused(Errno::EIO)) => {
            seen.failures += 1;
            Ok(true)
        }
        result => result.map(|()| false),
    }
}

async fn write(store: &mut Xenstore, name: &str, value: u64, seen: &mut Seen) -> Result<bool, StoreError> {
    refused(store.write(&path(name), value.to_string().as_bytes()).await, seen)
}

/// Reads an account, again and again if need be.
async fn number(store: &mut Xenstore, name: &str, seen: &mut Seen) -> Result<u64, StoreError> {
    loop {
        match store.read(&path(name)).await {
            Err(StoreError::Refused(Errno::EIO)) => seen.failures += 1,
            value => {
                return Ok(core::str::from_utf8(&value?)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(u64::MAX / 4));
            }
        }
    }
}

fn path(name: &str) -> String {
    String::from("data/") + name
}

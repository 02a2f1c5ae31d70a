//! Frames, raw: `role=send` sends to everybody on its network, `role=take` looks whether they come as they were sent, until nothing
//! has come for two seconds. Both say what a frame took. Under `--icount` a nanosecond is an instruction, and they are those of both
//! guests, hypervisor and dom0 together.
//!
//! `frames=1000` of each length are sent, at most `batch=32` with one notification; `pause=` milliseconds between batches let a
//! receiver keep up.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::net::{Card, Mac, NetError};
use guest_sdk::sync::{First, first};
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, println, time};

const LENGTHS: [usize; 4] = [60, 1514, 9014, 65535];
/// The head of a frame, with a type that is free for experiments; then the number of its length, and its own.
const HEAD: usize = 14 + 8;

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = domain.xenstore().map(SharedStore::new) else {
        println!("the first domain has no xenstore, and no cards");
        return Ok(());
    };
    let words = domain.command_line;
    let card = Card::open(&store, words.number("card").unwrap_or(0)).await?;
    println!("card {}, {} bytes in a frame", card.mac(), card.max_frame());
    match words.value("role") {
        Some("send") => {
            let pause = Duration::from_millis(words.number("pause").unwrap_or(0));
            let (frames, batch) =
                (words.number("frames").unwrap_or(1000), words.number("batch").unwrap_or(32));
            send(&card, frames, batch, pause).await?;
        }
        Some("take") => take(&card).await?,
        _ => println!("role=send or role=take?"),
    }
    println!("{:?}", card.counters());
    Ok(())
}

fn fill(frame: &mut [u8], mac: Mac, length: u32, number: u32) {
    let head: Vec<u8> = [0xff; 6].into_iter().chain(mac.0).chain([0x88, 0xb5]).collect();
    let rest = length.to_le_bytes().into_iter().chain(number.to_le_bytes());
    for (to, byte) in frame.iter_mut().zip(head.into_iter().chain(rest)) {
        *to = byte;
    }
}

/// What is behind the head, the same in all frames of a length.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at ^ at >> 8 ^ bytes) as u8).collect()
}

async fn send(card: &Card, frames: u32, batch: u32, pause: Duration) -> Result<(), NetError> {
    // Receivers come up meanwhile.
    time::after(Duration::from_secs(1)).await;
    for (length, bytes) in LENGTHS.into_iter().enumerate().filter(|(_, bytes)| *bytes <= card.max_frame()) {
        let mut frame = content(bytes);
        let mut number = 0;
        let mut paused = Duration::ZERO;
        let begun = time::now();
        while number < frames {
            let last = frames.min(number + batch.max(1));
            while number < last {
                fill(&mut frame, card.mac(), length as u32, number);
                if card.queue(&frame)? {
                    number += 1;
                } else {
                    card.room(bytes).await?;
                }
            }
            card.flush()?;
            if !pause.is_zero() {
                let before = time::now();
                time::after(pause).await;
                paused += time::now() - before;
            }
        }
        let spent = (time::now() - begun - paused).as_nanos() as u64;
        println!("{bytes} bytes: {frames} frames sent, {} ns each", spent / u64::from(frames.max(1)));
        time::after(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// What came of a length.
#[derive(Clone, Copy, Default)]
struct Came {
    frames: u64,
    wrong: u64,
    /// The highest number that a frame had, and one.
    of: u64,
    first: Duration,
    last: Duration,
}

async fn take(card: &Card) -> Result<(), NetError> {
    let contents = LENGTHS.map(content);
    let mut came = [Came::default(); LENGTHS.len()];
    let mut frame = vec![0; card.max_frame()];
    loop {
        // As many as there are; then it waits.
        while let Some(received) = card.try_receive(&mut frame)? {
            let Some(frame) = frame.get(..received.bytes).filter(|frame| frame.len() >= HEAD) else {
                continue;
            };
            let number = |at: usize| {
                frame
                    .get(at..)
                    .and_then(|rest| rest.first_chunk())
                    .map_or(0, |word| u32::from_le_bytes(*word))
            };
            let length = number(14) as usize;
            let (Some(came), Some(content)) = (came.get_mut(length), contents.get(length)) else { continue };
            let now = time::now();
            if came.frames == 0 {
                came.first = now;
            }
            came.last = now;
            came.frames += 1;
            // They come in order, if they come.
            let ordered = u64::from(number(18)) >= came.of;
            came.of = u64::from(number(18)) + 1;
            came.wrong += u64::from(!ordered || frame.get(HEAD..) != content.get(HEAD..));
        }
        let begun = came.iter().any(|came| came.frames > 0);
        let quiet = Duration::from_secs(if begun { 2 } else { 3600 });
        match first(card.ready(), time::after(quiet)).await {
            First::One(result) => result?,
            First::Other(()) => break,
        }
    }
    for (bytes, Came { frames, wrong, of, first, last }) in LENGTHS.into_iter().zip(came) {
        let each = (last - first).as_nanos() as u64 / frames.max(2).saturating_sub(1);
        println!("{bytes} bytes: {frames} of {of} frames came, {wrong} were wrong, {each} ns each");
    }
    Ok(())
}

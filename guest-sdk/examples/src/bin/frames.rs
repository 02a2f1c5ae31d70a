//! Frames, raw: `role=send` sends to everybody on its network, `role=take` looks whether they come as they were sent, until nothing
//! has come for two seconds. Both say what a frame took. Under `--icount` a nanosecond is an instruction, and they are those of both
//! guests, hypervisor and dom0 together.
//!
//! `frames=1000` of each length are sent, at most `batch=32` with one notification; `pause=` milliseconds between batches let a
//! receiver keep up. Who takes with `check=0` looks at the head of each frame only, where it is.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::net::{Card, Mac, NetError};
use guest_sdk::sync::{First, first};
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, memory, println, time};

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
    // This domain has one vCPU.
    let _ = memory::use_wide_copies();
    let card = Card::open(&store, words.number("card").unwrap_or(0)).await?;
    println!("card {}, {} bytes in a frame", card.mac(), card.max_frame());
    match words.value("role") {
        Some("send") => {
            let pause = Duration::from_millis(words.number("pause").unwrap_or(0));
            let (frames, batch) =
                (words.number("frames").unwrap_or(1000), words.number("batch").unwrap_or(32));
            send(&card, frames, batch, pause).await?;
        }
        Some("take") => take(&card, words.number("check") != Some(0)).await?,
        _ => println!("role=send or role=take?"),
    }
    println!("{:?}", card.counters());
    Ok(())
}

/// Puts the head of a frame there.
fn fill(frame: &mut [u8], mac: Mac, length: u32) {
    let head = [0xff; 6].into_iter().chain(mac.0).chain([0x88, 0xb5]).chain(length.to_le_bytes());
    frame.iter_mut().zip(head).for_each(|(to, byte)| *to = byte);
}

/// Numbers a frame.
fn number(frame: &mut [u8], number: u32) {
    if let Some(place) = frame.get_mut(HEAD - 4..HEAD) {
        place.copy_from_slice(&number.to_le_bytes());
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
        fill(&mut frame, card.mac(), length as u32);
        let mut sent = 0;
        let mut paused = Duration::ZERO;
        let begun = time::now();
        while sent < frames {
            let last = frames.min(sent + batch.max(1));
            while sent < last {
                number(&mut frame, sent);
                if card.queue(&frame)? {
                    sent += 1;
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
    /// Those that `last` is the time of.
    timed: u64,
}

impl Came {
    /// Notes a frame with this number.
    fn note(&mut self, number: u64, right: bool) {
        if self.frames == 0 {
            self.first = time::now();
        }
        self.frames += 1;
        // They come in order, if they come.
        self.wrong += u64::from(number < self.of || !right);
        self.of = number + 1;
    }

    /// Says when the newest frames were taken: a clock for each would cost more than some of them.
    fn time(&mut self) {
        if core::mem::replace(&mut self.timed, self.frames) != self.frames {
            self.last = time::now();
        }
    }
}

/// The length and the number of a frame of ours.
fn read(frame: &[u8]) -> Option<(usize, u64)> {
    let number = |at: usize| frame.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word));
    Some((number(HEAD - 8)? as usize, number(HEAD - 4)?.into()))
}

async fn take(card: &Card, check: bool) -> Result<(), NetError> {
    let contents = LENGTHS.map(content);
    let mut came = [Came::default(); LENGTHS.len()];
    loop {
        let mut look = |frame: &[u8]| {
            let Some((length, number)) = read(frame) else { return };
            if let (Some(came), Some(content)) = (came.get_mut(length), contents.get(length)) {
                came.note(number, !check || frame.get(HEAD..) == content.get(HEAD..));
            }
        };
        // As many as there are; then it waits.
        while card.receive_with(|frame, _| look(frame))?.is_some() {}
        came.iter_mut().for_each(Came::time);
        let begun = card.counters().received > 0;
        let quiet = Duration::from_secs(if begun { 2 } else { 3600 });
        match first(card.ready(), time::after(quiet)).await {
            First::One(result) => result?,
            First::Other(()) => break,
        }
    }
    for (bytes, Came { frames, wrong, of, first, last, .. }) in LENGTHS.into_iter().zip(came) {
        let each = (last - first).as_nanos() as u64 / frames.max(2).saturating_sub(1);
        println!("{bytes} bytes: {frames} of {of} frames came, {wrong} were wrong, {each} ns each");
    }
    Ok(())
}

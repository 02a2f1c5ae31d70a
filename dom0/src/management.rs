//! The management channel at work: a stream of bytes, the requests that come over it, and who tells it of events.

use crate::archive::Archive;
use crate::channel::{Answer, Channel, Event, Request};
use crate::say;
use crate::shell::{Next, Shell};
use crate::terminal;
use crate::waiting::{Bell, First, first};
use alloc::sync::Arc;
use core::future::Future;
use core::time::Duration;
use guest_sdk::{executor, shutdown, time};
use spin::{Mutex, Once};

/// Bytes of output that one request may have.
const MOST_OUTPUT: usize = 128 * 1024;
/// How long the last answer has before the machine is switched off.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A stream of bytes to the outside and from there.
pub trait Stream: Send + 'static {
    /// Takes what has come, as much as fits; 0 when there is nothing.
    fn read(&mut self, to: &mut [u8]) -> usize;

    /// Gives bytes away; returns how many were taken, which may be none.
    fn write(&mut self, from: &[u8]) -> usize;

    /// Waits until there may be something to read, or room to write, as far as either is wanted.
    fn changed(&mut self, read: bool, write: bool) -> impl Future<Output = ()> + Send;
}

struct Shared {
    channel: Mutex<Channel>,
    bell: Bell,
    free_before: Arc<Mutex<Option<u64>>>,
}

static SHARED: Once<Arc<Shared>> = Once::new();

/// Tells who listens that something has happened.
pub fn publish(event: Event) {
    if let Some(shared) = SHARED.get() {
        shared.channel.lock().event(&event, time::now_ns());
        shared.bell.ring();
    }
}

/// Serves the channel over a stream, for ever. There is one.
pub async fn serve(mut stream: impl Stream, archive: Archive<'static>) {
    let shared = SHARED.call_once(|| {
        let free_before = Arc::new(Mutex::new(None));
        Arc::new(Shared { channel: Mutex::new(Channel::default()), bell: Bell::new(), free_before })
    });
    loop {
        let seen = shared.bell.rings();
        let mut moved = 0;
        let (wants, waits) = {
            let mut channel = shared.channel.lock();
            while !channel.output().is_empty() {
                let count = stream.write(channel.output());
                if count == 0 {
                    break;
                }
                channel.sent(count, time::now_ns());
                moved += count;
            }
            (channel.wants_input(), !channel.output().is_empty())
        };
        if wants {
            let mut bytes = [0; 256];
            let count = stream.read(&mut bytes);
            let requests = shared.channel.lock().feed(bytes.get(..count).unwrap_or(&[]));
            for request in requests {
                executor::spawn(carry_out(Arc::clone(shared), archive, request));
            }
            moved += count;
        }
        if moved > 0 {
            shared.bell.ring();
            // Guests come first.
            executor::yield_now().await;
        } else {
            first(stream.changed(wants, waits), shared.bell.after(seen)).await;
        }
    }
}

async fn carry_out(shared: Arc<Shared>, archive: Archive<'static>, request: Request) {
    let mut shell = Shell::for_requests(archive, Arc::clone(&shared.free_before));
    let (outcome, captured) = terminal::captured(MOST_OUTPUT, shell.run(&request.words)).await;
    let (error, next) = match outcome {
        Ok(next) => (None, next),
        Err(error) => (Some(error), Next::Go),
    };
    let structured = request.words.iter().any(|word| word == "--json");
    let answer = Answer { output: captured.text, truncated: captured.truncated, error, structured };
    shared.channel.lock().answer(&request.id, &answer);
    shared.bell.ring();
    if next == Next::PowerOff {
        say!("dom0: poweroff, over the management channel");
        let end = time::now_ns().saturating_add(LAST_WORDS.as_nanos() as u64);
        loop {
            let seen = shared.bell.rings();
            if shared.channel.lock().output().is_empty() {
                break;
            }
            if let First::Other(()) = first(shared.bell.after(seen), time::until_ns(end)).await {
                break;
            }
        }
        shutdown::poweroff();
    }
}

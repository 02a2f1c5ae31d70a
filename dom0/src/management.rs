//! The management channel at work: a stream of bytes, and the requests that come over it.

use crate::archive::Archive;
use crate::channel::{Answer, Request};
use crate::devices::{self, Port};
use crate::listeners::{self, Listener};
use crate::say;
use crate::shell::{Next, Shell};
use crate::terminal;
use crate::waiting::first;
use alloc::sync::Arc;
use core::future::Future;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use guest_sdk::{executor, shutdown, time};
use spin::Mutex;

/// Bytes of output that one request may have.
const MOST_OUTPUT: usize = 128 * 1024;
/// How long the last answer has before the machine is switched off.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Time between two looks whether it has gone.
const MOMENT: Duration = Duration::from_millis(2);

/// Names of the ports that lead to the host: a program each.
pub const PORTS: [&str; 4] =
    ["org.xenolith.control", "org.xenolith.control.1", "org.xenolith.control.2", "org.xenolith.control.3"];

/// A stream of bytes to the outside and from there.
pub trait Stream: Send + 'static {
    /// How often somebody has come to the other end: another number is somebody else.
    fn visits(&mut self) -> u64;

    /// Takes what has come, as much as fits; 0 when there is nothing.
    fn read(&mut self, to: &mut [u8]) -> usize;

    /// Gives bytes away; returns how many were taken, which may be none.
    fn write(&mut self, from: &[u8]) -> usize;

    /// Whether all that was written has reached the other end.
    fn has_sent(&self) -> bool;

    /// Waits until any of it may have changed since [`Stream::visits`] was asked.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

/// A port of the machine's console.
struct PortStream {
    port: Port,
    seen: u64,
}

impl Stream for PortStream {
    fn visits(&mut self) -> u64 {
        self.seen = self.port.changes();
        self.port.attend()
    }

    fn read(&mut self, to: &mut [u8]) -> usize {
        self.port.read(to)
    }

    fn write(&mut self, from: &[u8]) -> usize {
        self.port.write(from)
    }

    fn has_sent(&self) -> bool {
        self.port.has_sent()
    }

    async fn changed(&mut self) {
        self.port.changed(self.seen).await;
    }
}

struct Shared {
    listener: Arc<Listener>,
    /// Something is on its way to the other end.
    sending: AtomicBool,
    free_before: Arc<Mutex<Option<u64>>>,
}

/// Serves a channel over each port of the machine's console that is meant for it.
pub fn start(archive: Archive<'static>) {
    for port in PORTS.iter().filter_map(|name| devices::port(name)) {
        executor::spawn(serve(PortStream { port, seen: 0 }, archive));
    }
}

/// Serves a channel over a stream, for ever.
async fn serve(mut stream: impl Stream, archive: Archive<'static>) {
    let shared = Arc::new(Shared {
        listener: listeners::join(),
        sending: AtomicBool::new(false),
        free_before: Arc::new(Mutex::new(None)),
    });
    let Listener { channel, bell } = &*shared.listener;
    let mut visits = 0;
    loop {
        let seen = bell.rings();
        let now = stream.visits();
        if core::mem::replace(&mut visits, now) != now {
            channel.lock().begin_anew();
        }
        let mut moved = 0;
        let wants = {
            let mut channel = channel.lock();
            while !channel.output().is_empty() {
                let count = stream.write(channel.output());
                if count == 0 {
                    break;
                }
                channel.sent(count, time::now_ns());
                moved += count;
            }
            shared.sending.store(!channel.output().is_empty() || !stream.has_sent(), Ordering::Release);
            channel.wants_input()
        };
        if wants {
            let mut bytes = [0; 256];
            let count = stream.read(&mut bytes);
            let requests = channel.lock().feed(bytes.get(..count).unwrap_or(&[]));
            for request in requests {
                executor::spawn(carry_out(Arc::clone(&shared), archive, request));
            }
            moved += count;
        }
        if moved > 0 {
            // Guests come first.
            executor::yield_now().await;
        } else {
            first(stream.changed(), bell.after(seen)).await;
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
    shared.listener.channel.lock().answer(&request, &answer);
    shared.sending.store(true, Ordering::Release);
    shared.listener.bell.ring();
    if next == Next::PowerOff {
        say!("dom0: poweroff, over the management channel");
        let end = time::now_ns().saturating_add(LAST_WORDS.as_nanos() as u64);
        while shared.sending.load(Ordering::Acquire) && time::now_ns() < end {
            time::after(MOMENT).await;
        }
        shutdown::poweroff();
    }
}

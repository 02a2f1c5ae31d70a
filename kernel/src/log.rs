//! Messages: the `log` crate's back end, with a ring in memory for dom0's `dmesg`.
//!
//! Levels mean: `error` the host or a domain cannot go on; `warn` somebody did what should not be done; `info` once per boot
//! or per domain; `debug` and `trace` for the author. What a guest can cause at will, crash reports among it, goes through [`guest_log!`](crate::guest_log),
//! which prints at most [`GUEST_BURST`] lines at once and one each [`GUEST_INTERVAL_NS`] after that.
#![forbid(unsafe_code)]

use core::fmt::{self, Write};
use log::{Level, LevelFilter, Metadata, Record};

use crate::sync::{RankedMutex, rank};

/// Bytes of messages kept.
pub const RING_SIZE: usize = 32 * 1024;
/// Guest-caused lines that are printed without waiting: four crash reports.
pub const GUEST_BURST: u32 = 40;
/// Nanoseconds in which one more guest-caused line is allowed.
pub const GUEST_INTERVAL_NS: u64 = 250_000_000;

/// The last [`RING_SIZE`] bytes of messages.
pub struct Ring {
    bytes: [u8; RING_SIZE],
    /// Bytes ever written; the last `RING_SIZE` of them are kept.
    written: u64,
}

impl Ring {
    /// No messages yet.
    #[must_use]
    pub const fn new() -> Ring {
        Ring { bytes: [0; RING_SIZE], written: 0 }
    }

    /// Appends, forgetting the oldest.
    pub fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(slot) = self.bytes.get_mut((self.written % RING_SIZE as u64) as usize) {
                *slot = *byte;
            }
            self.written = self.written.wrapping_add(1);
        }
    }

    /// Copies what was written from position `from` on, or from the oldest byte kept. Returns the position of the first byte
    /// copied and how many there are.
    pub fn read(&self, from: u64, buf: &mut [u8]) -> (u64, usize) {
        let oldest = self.written.saturating_sub(RING_SIZE as u64);
        let from = from.clamp(oldest, self.written);
        let mut count = 0;
        for (slot, at) in buf.iter_mut().zip(from..self.written) {
            *slot = self.bytes.get((at % RING_SIZE as u64) as usize).copied().unwrap_or(0);
            count += 1;
        }
        (from, count)
    }
}

impl Default for Ring {
    fn default() -> Self {
        Ring::new()
    }
}

/// Lets a few lines through at once and then one now and again; counts what it kept back.
#[derive(Clone, Copy, Debug)]
pub struct RateLimit {
    tokens: u32,
    refilled_ns: u64,
    suppressed: u32,
}

impl RateLimit {
    /// Nothing printed yet.
    #[must_use]
    pub const fn new() -> RateLimit {
        RateLimit { tokens: GUEST_BURST, refilled_ns: 0, suppressed: 0 }
    }

    /// Whether a line may be printed at `now_ns`: how many were kept back since the last one, or None.
    pub fn allow(&mut self, now_ns: u64) -> Option<u32> {
        let earned = now_ns.saturating_sub(self.refilled_ns) / GUEST_INTERVAL_NS;
        if earned > 0 {
            self.tokens =
                self.tokens.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(GUEST_BURST);
            self.refilled_ns = now_ns;
        }
        if self.tokens == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.tokens -= 1;
        Some(core::mem::take(&mut self.suppressed))
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        RateLimit::new()
    }
}

static RING: RankedMutex<Ring, { rank::CONSOLE }> = RankedMutex::new(Ring::new());
static GUEST_LIMIT: RankedMutex<RateLimit, { rank::CONSOLE }> = RankedMutex::new(RateLimit::new());
static BACKEND: spin::Once<Backend> = spin::Once::new();

/// Where messages go beside the ring, and what time it is.
#[derive(Clone, Copy)]
pub struct Backend {
    /// Writes text to the console.
    pub write: fn(&[u8]),
    /// Nanoseconds since boot.
    pub now_ns: fn() -> u64,
}

struct Logger;

/// One line, assembled before anything of it is shown: lines of two CPUs never mix. Longer ones are cut.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.len() - 1 - self.len;
        let taken = text.len().min(room);
        if let (Some(to), Some(from)) =
            (self.bytes.get_mut(self.len..self.len + taken), text.as_bytes().get(..taken))
        {
            to.copy_from_slice(from);
            self.len += taken;
        }
        Ok(())
    }
}

fn tag(level: Level) -> &'static str {
    match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "",
        Level::Debug | Level::Trace => "debug: ",
    }
}

fn emit(level: Level, text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; 512], len: 0 };
    // A line never fails to take text, it cuts it.
    let _ = write!(line, "(XL) {}{text}", tag(level));
    if let Some(end) = line.bytes.get_mut(line.len) {
        *end = b'\n';
        line.len += 1;
    }
    let text = line.bytes.get(..line.len).unwrap_or(&[]);
    let mut ring = RING.lock();
    ring.push(text);
    // Under the ring's lock, so that console and ring have the same order.
    if let Some(backend) = BACKEND.get() {
        (backend.write)(text);
    }
}

impl log::Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }
    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            emit(record.level(), *record.args());
        }
    }
    fn flush(&self) {}
}

/// Starts logging: messages go to the ring and to `backend`. Later calls only set the level.
pub fn init(backend: Backend, level: LevelFilter) {
    BACKEND.call_once(|| backend);
    // Fails only when a logger was set before, which was this one.
    let _ = log::set_logger(&Logger);
    log::set_max_level(level);
}

/// Copies messages from position `from` on (see [`Ring::read`]).
pub fn read_ring(from: u64, buf: &mut [u8]) -> (u64, usize) {
    RING.lock().read(from, buf)
}

/// Prints a line that a guest caused, unless there were too many. Called by [`guest!`](crate::guest_log).
pub fn guest_line(level: Level, text: fmt::Arguments<'_>) {
    if level > log::max_level() {
        return;
    }
    let now = BACKEND.get().map_or(0, |backend| (backend.now_ns)());
    let Some(suppressed) = GUEST_LIMIT.lock().allow(now) else { return };
    if suppressed > 0 {
        emit(Level::Warn, format_args!("{suppressed} messages about guests suppressed"));
    }
    emit(level, text);
}

/// Prints a message that a guest can cause: `guest_log!(Warn, "d{} did {}", ...)`, rate-limited.
#[macro_export]
macro_rules! guest_log {
    ($level:ident, $($text:tt)+) => {
        $crate::log::guest_line(::log::Level::$level, ::core::format_args!($($text)+))
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn the_ring_keeps_the_last_bytes() {
        let mut ring = Ring::new();
        ring.push(b"one two");
        let mut buf = [0; 3];
        assert_eq!(ring.read(4, &mut buf), (4, 3));
        assert_eq!(&buf, b"two");
        assert_eq!(ring.read(99, &mut buf), (7, 0));
        ring.push(&vec![b'x'; RING_SIZE - 3]);
        assert_eq!(ring.read(0, &mut buf), (4, 3), "the four oldest bytes are gone");
        assert_eq!(&buf, b"two");
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = RateLimit::new();
        let printed = (0..1000).filter(|_| limit.allow(1).is_some()).count();
        assert_eq!(printed, GUEST_BURST as usize);
        assert_eq!(limit.allow(1 + GUEST_INTERVAL_NS), Some(1000 - GUEST_BURST));
        assert_eq!(limit.allow(1 + GUEST_INTERVAL_NS), None);
        assert_eq!(limit.allow(u64::MAX), Some(1));
    }

    #[test]
    fn a_long_line_is_cut_and_still_ends() {
        let mut line = Line { bytes: [0; 512], len: 0 };
        write!(line, "{:600}", 1).unwrap();
        assert_eq!(line.len, 511);
    }
}

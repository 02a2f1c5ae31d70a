//! What a guest's console showed lately: kept also after the guest is gone.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// The newest bytes of a stream, up to a limit.
#[derive(Clone, Debug)]
pub struct Scrollback {
    bytes: VecDeque<u8>,
    limit: usize,
    dropped: u64,
}

impl Scrollback {
    /// An empty one that keeps `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit, dropped: 0 }
    }

    /// Adds text; the oldest goes when there is too much.
    pub fn push(&mut self, text: &[u8]) {
        let text = match text.len().checked_sub(self.limit) {
            Some(too_many) => {
                self.dropped += (too_many + self.bytes.len()) as u64;
                self.bytes.clear();
                text.get(too_many..).unwrap_or(&[])
            }
            None => {
                let too_many = (self.bytes.len() + text.len()).saturating_sub(self.limit);
                self.bytes.drain(..too_many);
                self.dropped += too_many as u64;
                text
            }
        };
        self.bytes.extend(text);
    }

    /// Bytes that were there and are gone.
    #[must_use]
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether nothing was ever printed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All that is kept.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    /// The last `count` lines, made safe to print ([`printable`]).
    #[must_use]
    pub fn last_lines(&self, count: usize) -> String {
        let text = printable(&self.bytes());
        let body = text.strip_suffix('\n').unwrap_or(&text);
        let start = match count.checked_sub(1) {
            None => return String::new(),
            Some(before) => body.rmatch_indices('\n').nth(before).map_or(0, |(at, _)| at + 1),
        };
        body.get(start..).unwrap_or("").into()
    }
}

/// Text of a guest that may be printed anywhere: no control characters but line ends and tabs, so that a guest cannot play
/// tricks on the terminal of who reads its log.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            '\r' => {}
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Cuts a stream into whole lines for printing with a name before each.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Longest line that is waited for.
    const LONGEST: usize = 512;

    /// Adds text; gives the lines that are complete, safe to print.
    pub fn push(&mut self, text: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in text {
            if byte != b'\n' {
                self.partial.push(byte);
            }
            if byte == b'\n' || self.partial.len() >= Self::LONGEST {
                lines.push(printable(&core::mem::take(&mut self.partial)));
            }
        }
        lines
    }

    /// What is left of a stream that has ended, if it did not end with a line's end.
    pub fn rest(&mut self) -> Option<String> {
        let rest = core::mem::take(&mut self.partial);
        (!rest.is_empty()).then(|| printable(&rest))
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, Scrollback, printable};

    #[test]
    fn the_newest_is_kept() {
        let mut scrollback = Scrollback::new(10);
        assert!(scrollback.is_empty());
        scrollback.push(b"abcdef");
        scrollback.push(b"ghijkl");
        assert_eq!((scrollback.bytes().as_slice(), scrollback.dropped()), (&b"cdefghijkl"[..], 2));
        scrollback.push(&[b'x'; 25]);
        assert_eq!((scrollback.bytes().as_slice(), scrollback.dropped()), (&[b'x'; 10][..], 27));
    }

    #[test]
    fn the_last_lines() {
        let mut scrollback = Scrollback::new(100);
        scrollback.push(b"one\r\ntwo\r\nthree\r\n");
        assert_eq!(scrollback.last_lines(2), "two\nthree");
        assert_eq!(scrollback.last_lines(9), "one\ntwo\nthree");
        assert_eq!(scrollback.last_lines(0), "");
        scrollback.push(b"fo");
        assert_eq!(scrollback.last_lines(2), "three\nfo");
    }

    #[test]
    fn a_guest_cannot_send_escapes_to_the_reader() {
        assert_eq!(printable(b"a\x1b[2Jb\x07\r\n\tc\xff"), "a\u{fffd}[2Jb\u{fffd}\n\tc\u{fffd}");
        let mut lines = Lines::default();
        assert!(lines.push(b"he").is_empty());
        assert_eq!(lines.push(b"llo\r\n\nx"), ["hello", ""]);
        assert_eq!(lines.push(&[b'y'; 600]).len(), 1);
    }
}

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

/// Characters that are not seen, or change where others are seen: zero-width ones, separators of lines, directions of text.
fn is_deceptive(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Text of a guest that may be printed anywhere: no control characters but line ends and tabs, so that a guest cannot play
/// tricks on the terminal of who reads its log, nor on who reads it.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            '\r' => {}
            c if c.is_control() || is_deceptive(c) => out.push('\u{fffd}'),
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

/// Turns a stream of bytes into text, whose characters may come in pieces.
#[derive(Clone, Debug, Default)]
pub struct Text {
    /// The beginning of a character.
    cut: Vec<u8>,
}

impl Text {
    /// Adds bytes; gives the text that is complete. What is no UTF-8 is shown as U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = core::mem::take(&mut self.cut);
        all.extend_from_slice(bytes);
        // A character that has begun and not ended is all that is left of what is valid.
        let begun = (1..=all.len().min(3)).find(|back| {
            let tail = all.get(all.len() - back..).unwrap_or_default();
            core::str::from_utf8(tail)
                .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        });
        self.cut = all.split_off(all.len() - begun.unwrap_or(0));
        String::from_utf8_lossy(&all).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, Scrollback, Text, printable};
    use alloc::string::String;

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
        assert_eq!(
            printable("user\u{202e}toor \u{200b}\u{2066}".as_bytes()),
            "user\u{fffd}toor \u{fffd}\u{fffd}"
        );
        assert_eq!(printable("grüße, 世界 🦀".as_bytes()), "grüße, 世界 🦀");
        let mut lines = Lines::default();
        assert!(lines.push(b"he").is_empty());
        assert_eq!(lines.push(b"llo\r\n\nx"), ["hello", ""]);
        assert_eq!(lines.push(&[b'y'; 600]).len(), 1);
    }

    #[test]
    fn characters_may_come_in_pieces() {
        let whole = "aß世🦀\r\n";
        for cut in 1..whole.len() {
            let mut text = Text::default();
            let mut got = String::new();
            whole.as_bytes().chunks(cut).for_each(|part| got += &text.push(part));
            assert_eq!(got, whole, "{cut} at a time");
        }
        let mut text = Text::default();
        assert_eq!(text.push(b"\xf0\x9f"), "");
        assert_eq!(text.push(b"x\xff"), "\u{fffd}x\u{fffd}", "never completed");
        assert_eq!(text.push(b"\xe4"), "");
        assert_eq!(text.push(b""), "");
    }
}

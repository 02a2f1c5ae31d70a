//! The one terminal: what is printed, and what is typed.
//!
//! Tasks print whole lines through [`say!`](say). While somebody edits a line, that line steps aside and is drawn again below.

use crate::waiting::{First, first};
use alloc::string::String;
use core::fmt;
use core::future::pending;
use guest_sdk::console::Console;
use guest_sdk::{print, time};
use spin::Mutex;

/// The line being edited, as last drawn.
static EDITED: Mutex<Option<String>> = Mutex::new(None);

/// Prints lines; the text ends with a line end.
pub fn put(text: fmt::Arguments<'_>) {
    match &*EDITED.lock() {
        Some(line) => print!("\r\x1b[K{text}{line}"),
        None => print!("{text}"),
    }
}

/// Prints a line.
macro_rules! say {
    ($($part:tt)*) => { $crate::terminal::put(::core::format_args!("{}\n", ::core::format_args!($($part)*))) };
}
pub(crate) use say;

/// Draws the line being edited; `None` when nobody edits one.
pub fn show_edited(line: Option<String>) {
    if let Some(line) = &line {
        print!("{line}");
    }
    *EDITED.lock() = line;
}

/// Prints a character at the end of the edited line, whose drawing is `line` from now on.
pub fn extend_edited(c: char, line: String) {
    print!("{c}");
    *EDITED.lock() = Some(line);
}

/// Bytes of a guest, as they are, but for what is no UTF-8. Consoles end lines with both CR and LF; ours adds the CR itself.
pub fn raw(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    print!("{}", text.replace("\r\n", "\n"));
}

/// The keyboard.
pub struct Keys {
    console: Console,
    buffer: [u8; 64],
    next: usize,
    end: usize,
}

impl Keys {
    /// Takes the console's input.
    pub fn new(console: Console) -> Self {
        Self { console, buffer: [0; 64], next: 0, end: 0 }
    }

    /// The next byte typed.
    pub async fn key(&mut self) -> u8 {
        if self.next == self.end {
            match self.console.read_async(&mut self.buffer).await {
                Ok(count) => (self.next, self.end) = (0, count),
                // No input on this console, ever.
                Err(_) => pending().await,
            }
        }
        let byte = self.buffer.get(self.next).copied().unwrap_or(0);
        self.next += 1;
        byte
    }

    /// The next byte typed before system time reaches `deadline_ns`.
    pub async fn key_before(&mut self, deadline_ns: u64) -> Option<u8> {
        match first(self.key(), time::until_ns(deadline_ns)).await {
            First::One(key) => Some(key),
            First::Other(()) => None,
        }
    }
}

//! The one terminal: what is printed, and what is typed.
//!
//! Tasks print whole lines through [`say!`](say). While somebody edits a line, that line steps aside and is drawn again below.

use crate::waiting::{First, first};
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt::{self, Write as _};
use core::future::{Future, pending, poll_fn};
use core::pin::pin;
use guest_sdk::console::Console;
use guest_sdk::{print, time};
use spin::Mutex;

/// The line being edited, as last drawn.
static EDITED: Mutex<Option<String>> = Mutex::new(None);

/// Whose output is being collected, while it is polled.
static COLLECTING: Mutex<Option<Arc<Mutex<Captured>>>> = Mutex::new(None);

/// What a piece of work printed.
#[derive(Debug, Default)]
pub struct Captured {
    /// As much of it as was to be kept.
    pub text: String,
    /// There was more.
    pub truncated: bool,
    room: usize,
}

impl fmt::Write for Captured {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut end = text.len().min(self.room);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.truncated |= end < text.len();
        self.room = if end < text.len() { 0 } else { self.room - end };
        self.text.push_str(text.get(..end).unwrap_or(""));
        Ok(())
    }
}

/// Does work whose output, up to `most` bytes, is collected instead of printed. Tasks that it starts print as usual.
pub async fn captured<F: Future>(most: usize, work: F) -> (F::Output, Captured) {
    let collected = Arc::new(Mutex::new(Captured { room: most, ..Captured::default() }));
    let mut work = pin!(work);
    let result = poll_fn(|context| {
        let before = COLLECTING.lock().replace(Arc::clone(&collected));
        let polled = work.as_mut().poll(context);
        *COLLECTING.lock() = before;
        polled
    })
    .await;
    let captured = core::mem::take(&mut *collected.lock());
    (result, captured)
}

/// Nobody is in the middle of printing.
pub fn is_intact() -> bool {
    !EDITED.is_locked() && !COLLECTING.is_locked()
}

/// Keeps text of work whose output is collected; false when nobody collects.
fn collect(text: fmt::Arguments<'_>) -> bool {
    let Some(collecting) = COLLECTING.lock().clone() else { return false };
    // Its writer cannot fail.
    let _ = collecting.lock().write_fmt(text);
    true
}

/// Prints lines; the text ends with a line end.
pub fn put(text: fmt::Arguments<'_>) {
    if collect(text) {
        return;
    }
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

/// Text of a guest, as it is. Consoles end lines with both CR and LF; ours adds the CR itself.
pub fn raw(text: &str) {
    print!("{}", text.replace("\r\n", "\n"));
}

/// Takes back what a guest may have done to the terminal: colours, a hidden cursor, another character set.
pub fn restore() {
    print!("\x1b[0m\x1b[?25h\x1b(B");
}

/// The keyboard.
pub struct Keys {
    /// `None` where nobody types.
    console: Option<Console>,
    buffer: [u8; 64],
    next: usize,
    end: usize,
}

impl Keys {
    /// Takes the console's input.
    pub fn new(console: Console) -> Self {
        Self { console: Some(console), buffer: [0; 64], next: 0, end: 0 }
    }

    /// A keyboard that nobody types on.
    pub const fn none() -> Self {
        Self { console: None, buffer: [0; 64], next: 0, end: 0 }
    }

    /// The next byte typed.
    pub async fn key(&mut self) -> u8 {
        if self.next == self.end {
            let Some(console) = &mut self.console else { return pending().await };
            match console.read_async(&mut self.buffer).await {
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

#[cfg(test)]
mod tests {
    use super::{captured, collect};
    use core::future::Future;
    use core::pin::pin;
    use core::task::{Context, Poll, Waker};
    use guest_sdk::executor::yield_now;

    #[test]
    fn works_output_is_its_own_while_it_runs() {
        let (mut one, mut other) = (
            pin!(captured(100, async {
                collect(format_args!("one\n"));
                yield_now().await;
                collect(format_args!("more of one\n"));
                1
            })),
            pin!(captured(5, async {
                collect(format_args!("ü ü ü\n"));
                yield_now().await;
                collect(format_args!("x\n"));
            })),
        );
        let mut context = Context::from_waker(Waker::noop());
        assert!(one.as_mut().poll(&mut context).is_pending());
        assert!(other.as_mut().poll(&mut context).is_pending());
        let Poll::Ready((1, first)) = one.poll(&mut context) else { panic!("it is not done") };
        assert_eq!((first.text.as_str(), first.truncated), ("one\nmore of one\n", false));
        let Poll::Ready(((), second)) = other.poll(&mut context) else { panic!("it is not done") };
        assert_eq!((second.text.as_str(), second.truncated), ("ü ü", true));
    }
}

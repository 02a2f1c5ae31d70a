//! The line editor: bytes from a terminal in, finished lines and what to draw out.
//!
//! Keys as in other shells: arrows, home, end, delete, backspace, ctrl-a e b f k u w l c d, ctrl-p n and up and down for the
//! history, alt-b f and ctrl-arrows by words, tab to complete.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// Longest line, in characters; more is not taken.
const MAX_LINE: usize = 1000;
/// Lines kept.
const MAX_HISTORY: usize = 200;

/// What a byte led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing to draw.
    Nothing,
    /// Print this where the cursor is; the line needs no redrawing.
    Print(char),
    /// Draw the line anew ([`LineEditor::render`]).
    Redraw,
    /// Clear the screen, then draw the line.
    ClearScreen,
    /// The line is finished; the editor is empty again.
    Line(String),
    /// ctrl-c: the line was thrown away.
    Interrupt,
    /// ctrl-d on an empty line.
    EndOfInput,
    /// Show these candidates, then draw the line.
    Candidates(Vec<String>),
}

/// State between the bytes of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Plain,
    Escape,
    /// After `ESC [`, with the parameter bytes so far.
    Sequence(String),
    /// After `ESC O`.
    Single,
    /// Inside a character of more than one byte: so far, and how many are missing.
    Utf8([u8; 4], usize, usize),
}

/// Candidates for the word before the cursor, given the words before it.
pub type Completer<'a> = &'a dyn Fn(&[&str], &str) -> Vec<String>;

/// A line being edited, and those before it.
#[derive(Clone, Debug)]
pub struct LineEditor {
    prompt: &'static str,
    text: Vec<char>,
    cursor: usize,
    key: Key,
    history: VecDeque<String>,
    /// Which line of the history is shown; its length for the line that is being typed.
    place: usize,
    /// What was being typed when the history was entered.
    draft: String,
    after_return: bool,
}

impl LineEditor {
    /// An empty line.
    #[must_use]
    pub const fn new(prompt: &'static str) -> Self {
        Self {
            prompt,
            text: Vec::new(),
            cursor: 0,
            key: Key::Plain,
            history: VecDeque::new(),
            place: 0,
            draft: String::new(),
            after_return: false,
        }
    }

    /// Bytes that draw the whole line over whatever is on the terminal's line, with the cursor in its place.
    #[must_use]
    pub fn render(&self) -> String {
        use core::fmt::Write;
        let mut out = String::from("\r\x1b[K");
        out.push_str(self.prompt);
        out.extend(&self.text);
        let back = self.text.len() - self.cursor;
        if back > 0 {
            // Writing to a String does not fail.
            let _ = write!(out, "\x1b[{back}D");
        }
        out
    }

    /// The history, oldest line first.
    pub fn history(&self) -> impl Iterator<Item = &str> {
        self.history.iter().map(String::as_str)
    }

    /// Takes a byte.
    pub fn feed(&mut self, byte: u8, complete: Completer<'_>) -> Action {
        let after_return = core::mem::replace(&mut self.after_return, false);
        match core::mem::replace(&mut self.key, Key::Plain) {
            Key::Plain if byte == b'\n' && after_return => Action::Nothing,
            Key::Plain => self.plain(byte, complete),
            Key::Escape => match byte {
                b'[' => self.wait(Key::Sequence(String::new())),
                b'O' => self.wait(Key::Single),
                b'b' => self.move_to(self.word_start(false)),
                b'f' => self.move_to(self.word_end()),
                _ => Action::Nothing,
            },
            Key::Single => self.sequence("", byte),
            Key::Sequence(mut parameters) => match byte {
                0x20..=0x3f if parameters.len() < 16 => {
                    parameters.push(char::from(byte));
                    self.wait(Key::Sequence(parameters))
                }
                _ => self.sequence(&parameters, byte),
            },
            Key::Utf8(mut bytes, have, missing) => {
                if byte & 0xc0 != 0x80 {
                    return self.plain(byte, complete);
                }
                if let Some(slot) = bytes.get_mut(have) {
                    *slot = byte;
                }
                if missing > 1 {
                    return self.wait(Key::Utf8(bytes, have + 1, missing - 1));
                }
                let text = core::str::from_utf8(bytes.get(..=have).unwrap_or(&[])).unwrap_or("");
                text.chars().next().map_or(Action::Nothing, |c| self.insert(c))
            }
        }
    }

    fn wait(&mut self, key: Key) -> Action {
        self.key = key;
        Action::Nothing
    }

    fn plain(&mut self, byte: u8, complete: Completer<'_>) -> Action {
        match byte {
            b'\r' | b'\n' => {
                self.after_return = byte == b'\r';
                self.finish()
            }
            1 => self.move_to(0),
            2 => self.move_to(self.cursor.saturating_sub(1)),
            3 => {
                self.set("");
                self.place = self.history.len();
                Action::Interrupt
            }
            4 if self.text.is_empty() => Action::EndOfInput,
            4 => self.delete(self.cursor, self.cursor + 1),
            5 => self.move_to(self.text.len()),
            6 => self.move_to(self.cursor + 1),
            8 | 127 => self.delete(self.cursor.saturating_sub(1), self.cursor),
            b'\t' => self.complete(complete),
            11 => self.delete(self.cursor, self.text.len()),
            12 => Action::ClearScreen,
            14 => self.recall(self.place + 1),
            16 => self.place.checked_sub(1).map_or(Action::Nothing, |place| self.recall(place)),
            21 => self.delete(0, self.cursor),
            23 => self.delete(self.word_start(true), self.cursor),
            0x1b => self.wait(Key::Escape),
            0x20..=0x7e => self.insert(char::from(byte)),
            0xc2..=0xdf => self.wait(Key::Utf8([byte, 0, 0, 0], 1, 1)),
            0xe0..=0xef => self.wait(Key::Utf8([byte, 0, 0, 0], 1, 2)),
            0xf0..=0xf4 => self.wait(Key::Utf8([byte, 0, 0, 0], 1, 3)),
            _ => Action::Nothing,
        }
    }

    fn sequence(&mut self, parameters: &str, last: u8) -> Action {
        let with_control = parameters.ends_with(";5");
        match last {
            b'A' => self.place.checked_sub(1).map_or(Action::Nothing, |place| self.recall(place)),
            b'B' => self.recall(self.place + 1),
            b'C' if with_control => self.move_to(self.word_end()),
            b'D' if with_control => self.move_to(self.word_start(false)),
            b'C' => self.move_to(self.cursor + 1),
            b'D' => self.move_to(self.cursor.saturating_sub(1)),
            b'H' => self.move_to(0),
            b'F' => self.move_to(self.text.len()),
            b'~' => match parameters {
                "1" | "7" => self.move_to(0),
                "4" | "8" => self.move_to(self.text.len()),
                "3" => self.delete(self.cursor, self.cursor + 1),
                _ => Action::Nothing,
            },
            _ => Action::Nothing,
        }
    }

    fn set(&mut self, text: &str) {
        self.text = text.chars().take(MAX_LINE).collect();
        self.cursor = self.text.len();
    }

    fn finish(&mut self) -> Action {
        let line: String = self.text.iter().collect();
        self.set("");
        if !line.trim().is_empty() && self.history.back() != Some(&line) {
            if self.history.len() == MAX_HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(line.clone());
        }
        self.place = self.history.len();
        Action::Line(line)
    }

    fn insert(&mut self, c: char) -> Action {
        if self.text.len() >= MAX_LINE {
            return Action::Nothing;
        }
        let at_end = self.cursor == self.text.len();
        self.text.insert(self.cursor, c);
        self.cursor += 1;
        if at_end { Action::Print(c) } else { Action::Redraw }
    }

    fn move_to(&mut self, cursor: usize) -> Action {
        let cursor = cursor.min(self.text.len());
        if cursor == self.cursor {
            return Action::Nothing;
        }
        self.cursor = cursor;
        Action::Redraw
    }

    fn delete(&mut self, from: usize, to: usize) -> Action {
        let to = to.min(self.text.len());
        if from >= to {
            return Action::Nothing;
        }
        self.text.drain(from..to);
        self.cursor = from;
        Action::Redraw
    }

    /// Where the word at or before the cursor begins; words are parted by blanks only, or by anything but letters and digits.
    fn word_start(&self, blanks_only: bool) -> usize {
        let inside = |c: &char| if blanks_only { !c.is_whitespace() } else { c.is_alphanumeric() };
        let before = self.text.get(..self.cursor).unwrap_or(&[]);
        let end = before.iter().rposition(inside).map_or(0, |at| at + 1);
        before.get(..end).unwrap_or(&[]).iter().rposition(|c| !inside(c)).map_or(0, |at| at + 1)
    }

    fn word_end(&self) -> usize {
        let length = self.text.len();
        let start = (self.cursor..length).find(|&at| self.text.get(at).is_some_and(|c| c.is_alphanumeric()));
        let Some(start) = start else { return length };
        (start..length).find(|&at| self.text.get(at).is_some_and(|c| !c.is_alphanumeric())).unwrap_or(length)
    }

    fn recall(&mut self, place: usize) -> Action {
        if place > self.history.len() || place == self.place {
            return Action::Nothing;
        }
        if self.place == self.history.len() {
            self.draft = self.text.iter().collect();
        }
        self.place = place;
        let text = self.history.get(place).unwrap_or(&self.draft).clone();
        self.set(&text);
        Action::Redraw
    }

    fn complete(&mut self, complete: Completer<'_>) -> Action {
        let before: String = self.text.get(..self.cursor).unwrap_or(&[]).iter().collect();
        let command = before.rsplit(';').next().unwrap_or("");
        let prefix = command.rsplit(char::is_whitespace).next().unwrap_or("");
        let words: Vec<&str> =
            command.get(..command.len() - prefix.len()).unwrap_or("").split_whitespace().collect();
        let mut candidates = complete(&words, prefix);
        candidates.retain(|candidate| candidate.starts_with(prefix));
        candidates.sort();
        let Some(first) = candidates.first() else { return Action::Nothing };
        // What all of them begin with.
        let mut common = first.as_str();
        for other in &candidates {
            let same = common.char_indices().zip(other.chars()).find(|((_, a), b)| a != b);
            let end = same.map_or(common.len().min(other.len()), |((at, _), _)| at);
            common = common.get(..end).unwrap_or(common);
        }
        let mut rest: String = common.get(prefix.len()..).unwrap_or("").into();
        if candidates.len() == 1 {
            rest.push(' ');
        }
        if rest.is_empty() {
            return Action::Candidates(candidates);
        }
        for c in rest.chars() {
            self.insert(c);
        }
        Action::Redraw
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, LineEditor, MAX_HISTORY, MAX_LINE};
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;
    use alloc::{format, vec};

    fn names(words: &[&str], _: &str) -> Vec<String> {
        let list: &[&str] =
            if words.is_empty() { &["list", "logs", "create"] } else { &["demo", "demolition"] };
        list.iter().map(ToString::to_string).collect()
    }

    fn type_in(editor: &mut LineEditor, keys: &str) -> Vec<Action> {
        keys.bytes().map(|byte| editor.feed(byte, &names)).collect()
    }

    /// Types and returns the line that comes of it.
    fn line(editor: &mut LineEditor, keys: &str) -> String {
        match type_in(editor, &format!("{keys}\r")).pop() {
            Some(Action::Line(line)) => line,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_edit_the_line() {
        let mut editor = LineEditor::new("> ");
        for (keys, wanted) in [
            ("list", "list"),
            ("lst\x1b[D\x1b[Di", "list"),
            ("xlist\x01\x04", "list"),
            ("ist\x1b[Hl\x1b[F!", "list!"),
            ("lisst\x7f\x7ft", "list"),
            ("axb\x02\x02\x1b[3~", "ab"),
            ("one two\x17three", "one three"),
            ("one two  \x17\x17", ""),
            ("one two\x15x", "x"),
            ("one two\x01\x06\x06\x06\x0b", "one"),
            ("one two\x1bb\x1bbX\x1bfY", "XoneY two"),
            ("one two\x1b[1;5D_\x1b[1;5C.", "one _two."),
            ("gr\u{fc}\u{20ac}\u{1f980}\x7f", "gr\u{fc}\u{20ac}"),
            ("a\x1b[99X\x1bqb\x00\x1b[5~", "ab"),
        ] {
            assert_eq!(line(&mut editor, keys), wanted, "{keys:?}");
        }
    }

    #[test]
    fn drawing_shows_cursor_and_prompt() {
        let mut editor = LineEditor::new("> ");
        assert_eq!(type_in(&mut editor, "ab\x1b[D").last(), Some(&Action::Redraw));
        assert_eq!(editor.render(), "\r\x1b[K> ab\x1b[1D");
        assert_eq!(type_in(&mut editor, "\x05c"), [Action::Redraw, Action::Print('c')]);
        assert_eq!(editor.render(), "\r\x1b[K> abc");
        assert_eq!(type_in(&mut editor, "\x0c\x03"), [Action::ClearScreen, Action::Interrupt]);
        assert_eq!(type_in(&mut editor, "\x04\x7f"), [Action::EndOfInput, Action::Nothing]);
        // A terminal that sends both for one key ends one line.
        assert_eq!(
            type_in(&mut editor, "\r\n\n"),
            [Action::Line("".into()), Action::Nothing, Action::Line("".into())]
        );
    }

    #[test]
    fn history_goes_both_ways_and_keeps_the_draft() {
        let mut editor = LineEditor::new("> ");
        for text in ["one", "two", "two", "  "] {
            line(&mut editor, text);
        }
        assert_eq!(editor.history().collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(line(&mut editor, "dra\x1b[A\x1b[A\x1b[A\x1b[B\x1b[B\x1b[Bft"), "draft");
        assert_eq!(line(&mut editor, "\x1b[A\x1b[A"), "two");
        assert_eq!(line(&mut editor, "\x10!"), "two!");
        for number in 0..2 * MAX_HISTORY {
            line(&mut editor, &number.to_string());
        }
        assert_eq!(editor.history().count(), MAX_HISTORY);
    }

    #[test]
    fn tab_completes_what_is_sure() {
        let mut editor = LineEditor::new("> ");
        assert_eq!(line(&mut editor, "c\tx"), "create x");
        assert_eq!(
            type_in(&mut editor, "l\t").last(),
            Some(&Action::Candidates(vec!["list".into(), "logs".into()]))
        );
        assert_eq!(line(&mut editor, "i\t"), "list ");
        assert_eq!(line(&mut editor, "list; console d\tl\t"), "list; console demolition ");
        assert_eq!(line(&mut editor, "q\t"), "q");
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut editor = LineEditor::new("> ");
        let mut random = 1u32;
        for _ in 0..200_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            editor.feed((random >> 24) as u8, &names);
            assert!(editor.cursor <= editor.text.len() && editor.text.len() <= MAX_LINE);
        }
    }
}

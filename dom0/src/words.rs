//! The shell's grammar: commands separated by `;` or line ends, words separated by blanks, quotes around words with blanks.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyntaxError {
    /// A quote that nothing closes.
    OpenQuote(char),
    /// A backslash with nothing behind it.
    LoneBackslash,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OpenQuote(quote) => {
                write!(f, "a {quote} opens a quote that nothing closes: add another {quote}")
            }
            Self::LoneBackslash => {
                f.write_str("a \\ at the end quotes nothing: write \\\\ for the character itself")
            }
        }
    }
}

impl core::error::Error for SyntaxError {}

/// Splits a line into commands, each a list of at least one word. `#` at the start of a word begins a comment.
///
/// # Errors
/// [`SyntaxError`].
pub fn parse(line: &str) -> Result<Vec<Vec<String>>, SyntaxError> {
    let mut commands = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            ';' | '\n' => {
                words.extend(word.take());
                if !words.is_empty() {
                    commands.push(core::mem::take(&mut words));
                }
            }
            c if c.is_whitespace() => words.extend(word.take()),
            '#' if word.is_none() => {
                // Up to the end of the line, which ends the command as usual.
                let rest = chars.as_str();
                chars = rest.get(rest.find('\n').unwrap_or(rest.len())..).unwrap_or("").chars();
            }
            '"' | '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or(SyntaxError::OpenQuote(c))? {
                        end if end == c => break,
                        '\\' if c == '"' => word.push(chars.next().ok_or(SyntaxError::OpenQuote(c))?),
                        other => word.push(other),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next().ok_or(SyntaxError::LoneBackslash)?),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    if !words.is_empty() {
        commands.push(words);
    }
    Ok(commands)
}

/// A command as [`parse`] takes it: words in quotes where they need them.
#[must_use]
pub fn unparse(words: &[String]) -> String {
    let mut line = String::new();
    for word in words {
        if !line.is_empty() {
            line.push(' ');
        }
        let special = |c: char| c.is_whitespace() || matches!(c, ';' | '#' | '"' | '\'' | '\\');
        if !word.is_empty() && !word.contains(special) {
            line.push_str(word);
            continue;
        }
        line.push('"');
        for c in word.chars() {
            if matches!(c, '"' | '\\') {
                line.push('\\');
            }
            line.push(c);
        }
        line.push('"');
    }
    line
}

/// The name in `names` that somebody most likely meant: it begins like what was typed or differs by one or two letters.
#[must_use]
pub fn nearest<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| {
            (if !typed.is_empty() && name.starts_with(typed) { 1 } else { distance(typed, name) }, name)
        })
        .min_by_key(|&(distance, _)| distance)
        .filter(|&(distance, _)| distance <= 2 && distance * 2 <= typed.chars().count())
        .map(|(_, name)| name)
}

/// Letters to insert, delete or change to make one word of the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (slot, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let above = *slot;
            left = (diagonal + usize::from(x != y)).min(above + 1).min(left + 1);
            diagonal = core::mem::replace(slot, left);
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{SyntaxError, distance, nearest, parse, unparse};
    use alloc::vec::Vec;

    fn flat(line: &str) -> Vec<Vec<alloc::string::String>> {
        parse(line).unwrap()
    }

    #[test]
    fn words_quotes_and_commands() {
        assert_eq!(flat("list; create demo.toml;; ;"), [&["list"][..], &["create", "demo.toml"]]);
        assert_eq!(flat("echo 'a b' \"c \\\"d\\\\\" e\\ f ''"), [["echo", "a b", "c \"d\\", "e f", ""]]);
        assert_eq!(flat("a 'x;y' # not; this\nb#c"), [&["a", "x;y"][..], &["b#c"]]);
        assert_eq!(flat("a'b'\"c\""), [["abc"]]);
        assert!(flat("  \t ").is_empty());
    }

    #[test]
    fn what_is_shown_can_be_typed() {
        let words = ["a", "b c", "", "d\"e\\", "f;g", "#", "'"].map(alloc::string::String::from).to_vec();
        assert_eq!(flat(&unparse(&words)), [words]);
        assert_eq!(unparse(&flat("create x 'cmdline=a b'")[0]), "create x \"cmdline=a b\"");
    }

    #[test]
    fn open_quotes_are_named() {
        assert_eq!(parse("echo 'a"), Err(SyntaxError::OpenQuote('\'')));
        assert_eq!(parse("echo \"a\\"), Err(SyntaxError::OpenQuote('"')));
        assert_eq!(parse("echo \\"), Err(SyntaxError::LoneBackslash));
    }

    #[test]
    fn near_misses_are_guessed() {
        let names = ["list", "logs", "create", "destroy"];
        assert_eq!(nearest("lsit", names.into_iter()), Some("list"));
        assert_eq!(nearest("creat", names.into_iter()), Some("create"));
        assert_eq!(nearest("des", names.into_iter()), Some("destroy"));
        assert_eq!(nearest("x", names.into_iter()), None);
        assert_eq!(nearest("frobnicate", names.into_iter()), None);
        assert_eq!((distance("kitten", "sitting"), distance("", "ab"), distance("ab", "")), (3, 2, 2));
    }
}

//! Reading Rust source without a compiler: just enough to tell code from comments and strings, for counting and tidiness.

use crate::sh;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// A source file with its comments, and a copy without.
pub struct Source {
    /// The text.
    pub text: String,
    /// The text with every comment, string and character literal turned into blanks; lines stay lines.
    pub code: String,
    /// For each line, whether it belongs to a test.
    pub test: Vec<bool>,
}

/// What there is in some source.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines with code on them, tests left out.
    pub code: usize,
    /// Lines of tests.
    pub tests: usize,
    /// `unsafe` blocks, functions, impls, traits and extern blocks, tests left out.
    pub unsafe_items: usize,
    /// Lines of code inside of those.
    pub unsafe_lines: usize,
}

impl Source {
    /// Reads a file below the root.
    ///
    /// # Errors
    /// When it cannot be read or is not UTF-8.
    pub fn load(path: &Path) -> Result<Source> {
        let bytes = sh::read(&sh::root().join(path))?;
        let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))?;
        Ok(Source::new(path, text))
    }

    fn new(path: &Path, text: String) -> Source {
        let code = mask(&text);
        // `#[cfg(test)] mod tests;` in the file above, or a folder of integration tests in a package.
        let tests = path.file_stem().is_some_and(|stem| stem == "tests")
            || path
                .parent()
                .is_some_and(|dir| dir.components().skip(1).any(|part| part.as_os_str() == "tests"));
        let test = if tests { vec![true; code.lines().count()] } else { test_lines(&code) };
        Source { text, code, test }
    }

    /// Counts lines and unsafe.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        let no_comments = strip_comments(&self.text);
        let is_test = |line: usize| self.test.get(line).copied().unwrap_or(false);
        let has_code: Vec<bool> = no_comments.lines().map(|line| !line.trim().is_empty()).collect();
        for (line, _) in has_code.iter().enumerate().filter(|(_, has)| **has) {
            if is_test(line) {
                counts.tests += 1;
            } else {
                counts.code += 1;
            }
        }
        let mut lines = vec![false; has_code.len()];
        for at in words(&self.code, "unsafe") {
            let line = self.code[..at].matches('\n').count();
            // `unsafe(no_mangle)` is an attribute, `unsafe fn` without a body is a declaration or a type.
            let rest = &self.code[at + "unsafe".len()..];
            if rest.trim_start().starts_with('(') || is_test(line) {
                continue;
            }
            let Some(open) = rest.find(['{', ';', ',', '=', ')', '>']) else { continue };
            // A signature has `(`, `)` and `>` in it before its body.
            let open = if rest.trim_start().starts_with("fn") || rest.trim_start().starts_with("extern") {
                match rest.find(['{', ';']) {
                    Some(open) => open,
                    None => continue,
                }
            } else if rest.trim_start().starts_with("impl") {
                rest.find('{').unwrap_or(open)
            } else {
                open
            };
            counts.unsafe_items += 1;
            let start = at + "unsafe".len() + open;
            if self.code.as_bytes().get(start) == Some(&b'{') {
                let end = closing(&self.code, start);
                let last = self.code[..end].matches('\n').count();
                lines.iter_mut().take(last + 1).skip(line).for_each(|mark| *mark = true);
            } else if let Some(mark) = lines.get_mut(line) {
                *mark = true;
            }
        }
        counts.unsafe_lines = lines.iter().zip(&has_code).filter(|(a, b)| **a && **b).count();
        counts
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.code += other.code;
        self.tests += other.tests;
        self.unsafe_items += other.unsafe_items;
        self.unsafe_lines += other.unsafe_lines;
    }
}

/// Files that git knows or would add, below the root.
///
/// # Errors
/// When git fails.
pub fn files() -> Result<Vec<PathBuf>> {
    let mut git = std::process::Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(sh::root());
    let mut files: Vec<PathBuf> = sh::output(&mut git)?.lines().map(PathBuf::from).collect();
    files.retain(|path| sh::root().join(path).is_file());
    files.sort();
    files.dedup();
    Ok(files)
}

/// Places where a word stands by itself.
pub fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !code[..*at].ends_with(part_of_name) && !code[at + word.len()..].starts_with(part_of_name)
    })
}

/// Where the brace that opens at `start` closes, in masked code.
fn closing(code: &str, start: usize) -> usize {
    let mut depth = 0usize;
    for (at, c) in code[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth <= 1 => return start + at,
            '}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

fn test_lines(code: &str) -> Vec<bool> {
    let mut lines = vec![false; code.lines().count()];
    for marker in ["#[cfg(test)]", "#[cfg(all(test"] {
        for (at, _) in code.match_indices(marker) {
            let Some(open) = code[at..].find(['{', ';']) else { continue };
            let end = if code.as_bytes().get(at + open) == Some(&b'{') {
                closing(code, at + open)
            } else {
                at + open
            };
            let line = |place: usize| code[..place].matches('\n').count();
            lines.iter_mut().take(line(end) + 1).skip(line(at)).for_each(|mark| *mark = true);
        }
    }
    lines
}

/// Blanks comments, keeps strings.
fn strip_comments(text: &str) -> String {
    blank(text, false)
}

/// Blanks comments, strings and character literals.
fn mask(text: &str) -> String {
    blank(text, true)
}

fn blank(text: &str, strings: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut wipe = |range: std::ops::Range<usize>| {
        for byte in &mut out[range] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"//") {
            let end = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
            wipe(at..at + end);
            at += end;
        } else if rest.starts_with(b"/*") {
            let mut depth = 0;
            let mut end = 0;
            while end < rest.len() {
                if rest[end..].starts_with(b"/*") {
                    depth += 1;
                    end += 2;
                } else if rest[end..].starts_with(b"*/") {
                    depth -= 1;
                    end += 2;
                    if depth == 0 {
                        break;
                    }
                } else {
                    end += 1;
                }
            }
            let end = end.min(rest.len());
            wipe(at..at + end);
            at += end;
        } else if let Some(length) = literal(rest, at > 0 && is_name(bytes[at - 1])) {
            if strings {
                wipe(at..at + length);
            }
            at += length;
        } else {
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Length of the string or character literal that starts here.
fn literal(rest: &[u8], after_name: bool) -> Option<usize> {
    let prefix =
        if after_name { 0 } else { rest.iter().take_while(|b| matches!(b, b'b' | b'c' | b'r')).count() };
    let body = &rest[prefix..];
    let raw = prefix > 0 && rest[..prefix].contains(&b'r');
    if raw {
        let hashes = body.iter().take_while(|b| **b == b'#').count();
        if body.get(hashes) != Some(&b'"') {
            return None;
        }
        let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
        let inside = &body[hashes + 1..];
        let end =
            inside.windows(close.len()).position(|w| w == close).map_or(inside.len(), |e| e + close.len());
        return Some(prefix + hashes + 1 + end);
    }
    match body.first()? {
        b'"' => {
            let mut at = 1;
            while at < body.len() && body[at] != b'"' {
                at += if body[at] == b'\\' { 2 } else { 1 };
            }
            Some((prefix + at + 1).min(rest.len()))
        }
        // A character, not a lifetime: an escape, or one character and a quote.
        b'\'' if body.get(1) == Some(&b'\\') => {
            let end = body.iter().skip(3).position(|b| *b == b'\'')?;
            Some(prefix + end + 4)
        }
        b'\'' => {
            let text = std::str::from_utf8(&body[1..body.len().min(6)])
                .or_else(|e| std::str::from_utf8(&body[1..1 + e.valid_up_to()]));
            let first = text.ok()?.chars().next()?.len_utf8();
            (body.get(1 + first) == Some(&b'\'')).then_some(prefix + first + 2)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_are_no_code() {
        let masked =
            mask("a(\"un\\\"safe {\"); // unsafe\n/* x /* y */ z */ b('{', '\\'', r#\"\"q\"#, &'a str)");
        assert_eq!(masked.split_whitespace().collect::<Vec<_>>().join(" "), "a( ); b( , , , &'a str)");
    }

    #[test]
    fn counts_unsafe_and_leaves_tests_out() {
        let text = "//! doc\nfn a() {\n    // SAFETY: x\n    unsafe {\n        b();\n    }\n}\nunsafe impl Send for X {}\n\
                    unsafe fn c(x: Vec<u8>) {\n    d()\n}\n#[unsafe(no_mangle)]\nfn e() {}\n\
                    #[cfg(test)]\nmod tests {\n    fn f() { unsafe { g() } }\n}\n";
        let counts = Source::new(Path::new("x.rs"), text.into()).counts();
        assert_eq!(counts, Counts { code: 11, tests: 4, unsafe_items: 3, unsafe_lines: 7 });
    }
}

//! Paths of nodes.

use crate::Error;
use alloc::format;
use alloc::string::String;
use core::fmt;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{ABS_PATH_MAX, REL_PATH_MAX};

/// Most names in a path. Xen's stores only limit a path's length; code that walks a tree can recurse when its depth is
/// bounded, and nobody nests further than about a dozen.
pub const MAX_DEPTH: usize = 64;

/// The path of a node: absolute, and of the permitted form.
///
/// It begins with `/`, does not end with one unless it is the root, has no empty names, holds only letters, digits and
/// `-/_@`, and is at most 2048 bytes long, not counting `/local/domain/N/`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(String);

impl Path {
    /// The root.
    #[must_use]
    pub fn root() -> Path {
        Path(String::from("/"))
    }

    /// Where relative paths of a domain begin.
    #[must_use]
    pub fn home(domain: DomId) -> Path {
        Path(format!("/local/domain/{domain}"))
    }

    /// Checks an absolute path.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn absolute(text: &str) -> Result<Path, Error> {
        check(text)?;
        Ok(Path(String::from(text)))
    }

    /// Checks what a client at `home` wrote: an absolute path, or one relative to its home.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn resolve(text: &[u8], home: &Path) -> Result<Path, Error> {
        let text = core::str::from_utf8(text).map_err(|_| Error::Invalid)?;
        if text.starts_with('/') {
            return Path::absolute(text);
        }
        // `@introduceDomain` and the like are no nodes.
        if text.starts_with('@') {
            return Err(Error::Invalid);
        }
        let whole = format!("{home}/{text}");
        check(&whole)?;
        Ok(Path(whole))
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The names from the root down.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        // By hand: it is what every request does most.
        let mut rest = self.0.as_str();
        core::iter::from_fn(move || {
            loop {
                if rest.is_empty() {
                    return None;
                }
                let end = rest.bytes().position(|byte| byte == b'/').unwrap_or(rest.len());
                let name = rest.get(..end)?;
                rest = rest.get(end + 1..).unwrap_or("");
                if !name.is_empty() {
                    return Some(name);
                }
            }
        })
    }

    /// The path without its last name, and that name; `None` for the root.
    #[must_use]
    pub fn split_last(&self) -> Option<(Path, &str)> {
        let (parent, name) = self.0.rsplit_once('/')?;
        if name.is_empty() {
            return None;
        }
        let parent = if parent.is_empty() { Path::root() } else { Path(String::from(parent)) };
        Some((parent, name))
    }

    /// The path of the node that its first so many names lead to.
    pub(crate) fn first(&self, names: usize) -> Path {
        match self.0.match_indices('/').nth(names) {
            Some((0, _)) => Path::root(),
            Some((end, _)) => Path(String::from(self.0.get(..end).unwrap_or("/"))),
            None => self.clone(),
        }
    }

    /// Goes on to a child, as [`Path::child`] does; gives what [`Path::back`] takes to undo it.
    pub(crate) fn enter(&mut self, name: &str) -> usize {
        let before = self.0.len();
        if !self.0.ends_with('/') {
            self.0.push('/');
        }
        self.0.push_str(name);
        before
    }

    /// Goes back to where [`Path::enter`] was.
    pub(crate) fn back(&mut self, before: usize) {
        self.0.truncate(before);
    }

    /// The path of a child, or, with several names, of a node further below. They come from the tree or from ourselves, so they are of the
    /// right form.
    #[must_use]
    pub fn child(&self, name: &str) -> Path {
        let mut text = String::with_capacity(self.0.len() + 1 + name.len());
        text.push_str(&self.0);
        if !text.ends_with('/') {
            text.push('/');
        }
        text.push_str(name);
        Path(text)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check(text: &str) -> Result<(), Error> {
    let permitted = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    let shape = text.starts_with('/')
        && (text == "/" || !text.ends_with('/'))
        && !text.contains("//")
        && text.bytes().all(permitted)
        && text.bytes().filter(|&byte| byte == b'/').count() <= MAX_DEPTH;
    let fits = text.len() <= ABS_PATH_MAX && text.len() - local_part(text) <= REL_PATH_MAX;
    if shape && fits { Ok(()) } else { Err(Error::Invalid) }
}

/// Length of `/local/domain/N/` in front, 0 if it is not there.
fn local_part(text: &str) -> usize {
    let Some(rest) = text.strip_prefix("/local/domain/") else { return 0 };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let number = (1..=5).contains(&digits) && rest.as_bytes().get(digits) == Some(&b'/');
    if number { text.len() - rest.len() + digits + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::{MAX_DEPTH, Path};
    use alloc::format;
    use alloc::string::ToString;
    use alloc::vec::Vec;
    use hypercall_abi::DomId;

    #[test]
    fn forms() {
        for good in ["/", "/a", "/a/b", "/A-Z_0@9/x", "/local/domain/7/device/vbd/51712"] {
            assert_eq!(Path::absolute(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a",
            "//",
            "/a/",
            "/a//b",
            "//a",
            "/a b",
            "/a.b",
            "/a+b",
            "/\u{e9}",
            "@releaseDomain",
            "/a\0",
        ] {
            assert!(Path::absolute(bad).is_err(), "{bad:?}");
        }
        let home = Path::home(DomId::new(3));
        assert_eq!(Path::resolve(b"x/y", &home).unwrap().as_str(), "/local/domain/3/x/y");
        assert_eq!(Path::resolve(b"/x", &home).unwrap().as_str(), "/x");
        for bad in [&b""[..], b"x/", b"@introduceDomain", b"\xff", b"./x"] {
            assert!(Path::resolve(bad, &home).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lengths() {
        let long = "x".repeat(2047);
        assert!(Path::absolute(&format!("/{long}")).is_ok());
        assert!(Path::absolute(&format!("/{long}x")).is_err());
        // A domain's own part does not count.
        assert!(Path::absolute(&format!("/local/domain/12345/{long}x")).is_ok());
        assert!(Path::absolute(&format!("/local/domain/12345/{long}xx")).is_err());
        assert!(Path::absolute(&format!("/local/domain/123456/{long}")).is_err());
        assert!(Path::absolute(&format!("/local/domain//{long}")).is_err());
        assert!(Path::absolute(&"/a".repeat(MAX_DEPTH)).is_ok());
        assert!(Path::absolute(&"/a".repeat(MAX_DEPTH + 1)).is_err());
    }

    #[test]
    fn parts() {
        let path = Path::absolute("/a/bc/d").unwrap();
        assert_eq!(path.names().collect::<Vec<_>>(), ["a", "bc", "d"]);
        let (parent, name) = path.split_last().unwrap();
        assert_eq!((parent.as_str(), name), ("/a/bc", "d"));
        assert_eq!(Path::absolute("/a").unwrap().split_last().unwrap().0.to_string(), "/");
        assert_eq!(Path::root().split_last(), None);
        assert_eq!(Path::root().child("x").as_str(), "/x");
        assert_eq!(parent.child("x").as_str(), "/a/bc/x");
        let first: Vec<_> = (0..5).map(|names| path.first(names).to_string()).collect();
        assert_eq!(first, ["/", "/a", "/a/bc", "/a/bc/d", "/a/bc/d"]);
        assert_eq!(Path::root().first(1).as_str(), "/");
        let mut at = Path::root();
        let root = at.enter("x");
        let x = at.enter("y");
        assert_eq!(at.as_str(), "/x/y");
        at.back(x);
        assert_eq!(at.as_str(), "/x");
        at.back(root);
        assert_eq!(at.as_str(), "/");
    }
}

//! The boot archive: a plain tar file (POSIX ustar) in memory, read without copying.

use core::fmt;

const BLOCK: usize = 512;

/// Why a tar file cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveError {
    /// A header's sum does not match its bytes: no tar file, or a damaged one.
    BadHeader {
        /// Byte offset of the header.
        offset: usize,
    },
    /// The file ends inside an entry.
    Truncated {
        /// Byte offset of the entry's header.
        offset: usize,
    },
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadHeader { offset } => write!(
                f,
                "the boot archive is damaged: no tar header at byte {offset}. It must be a plain, uncompressed tar file"
            ),
            Self::Truncated { offset } => {
                write!(f, "the boot archive is cut off inside the entry at byte {offset}")
            }
        }
    }
}

impl core::error::Error for ArchiveError {}

/// A file in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File<'a> {
    /// Its path, without a leading `./`.
    pub name: &'a str,
    /// Its content.
    pub data: &'a [u8],
}

/// A tar file.
#[derive(Clone, Copy, Debug)]
pub struct Archive<'a> {
    bytes: &'a [u8],
}

impl<'a> Archive<'a> {
    /// Takes the bytes as they are; errors come while reading.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Its regular files in order. After an error comes nothing more.
    #[must_use]
    pub fn files(&self) -> Files<'a> {
        Files { bytes: self.bytes, offset: 0, checked: true }
    }

    /// Names of its files, as [`Archive::find`] takes them.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let files = Files { bytes: self.bytes, offset: 0, checked: false };
        files.filter_map(Result::ok).map(|file| file.name)
    }

    /// The file of this name. The sums of headers are not looked at: [`Archive::files`] does that.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&'a [u8]> {
        Files { bytes: self.bytes, offset: 0, checked: false }
            .filter_map(Result::ok)
            .find(|file| file.name == name)
            .map(|file| file.data)
    }
}

/// Iterator of [`Archive::files`].
#[derive(Clone, Debug)]
pub struct Files<'a> {
    bytes: &'a [u8],
    offset: usize,
    checked: bool,
}

impl<'a> Files<'a> {
    fn header(&mut self) -> Result<Option<(File<'a>, u8)>, ArchiveError> {
        let offset = self.offset;
        let rest = self.bytes.get(offset..).unwrap_or(&[]);
        // Two zero blocks end a tar file; so does, for us, its plain end.
        if rest.is_empty() || rest.iter().take(BLOCK).all(|&byte| byte == 0) {
            return Ok(None);
        }
        let bad = ArchiveError::BadHeader { offset };
        let header: &[u8; BLOCK] = rest.first_chunk().ok_or(ArchiveError::Truncated { offset })?;
        if self.checked && octal(&header[148..156]) != Some(sum(header)) {
            return Err(bad);
        }
        let size = octal(&header[124..136]).and_then(|size| usize::try_from(size).ok()).ok_or(bad)?;
        let start = offset.checked_add(BLOCK).ok_or(bad)?;
        let end = start.checked_add(size).ok_or(bad)?;
        let data = self.bytes.get(start..end).ok_or(ArchiveError::Truncated { offset })?;
        let name = text(&header[..100]).ok_or(bad)?;
        self.offset = end.next_multiple_of(BLOCK);
        Ok(Some((File { name: name.trim_start_matches("./"), data }, header[156])))
    }
}

/// The sum of a header's bytes, its own field taken for blanks.
fn sum(header: &[u8; BLOCK]) -> u64 {
    let counted = |(at, &byte)| u64::from(if (148..156).contains(&at) { b' ' } else { byte });
    header.iter().enumerate().map(counted).sum()
}

impl<'a> Iterator for Files<'a> {
    type Item = Result<File<'a>, ArchiveError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.header() {
                Ok(None) => return None,
                // '0' and 0 are regular files; folders, links and the like are of no use here.
                Ok(Some((file, b'0' | 0))) => return Some(Ok(file)),
                Ok(Some(_)) => {}
                Err(error) => {
                    self.offset = self.bytes.len();
                    return Some(Err(error));
                }
            }
        }
    }
}

/// A field of text: up to the first zero.
fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    core::str::from_utf8(field.get(..end)?).ok()
}

/// A number in octal digits, with blanks around it.
fn octal(field: &[u8]) -> Option<u64> {
    let digits = text(field)?.trim_matches(' ');
    u64::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::{Archive, ArchiveError, BLOCK};
    use alloc::format;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    fn entry(name: &str, kind: u8, data: &[u8]) -> Vec<u8> {
        let mut header = [0u8; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[156] = kind;
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut all = header.to_vec();
        all.extend(data);
        all.resize(all.len().next_multiple_of(BLOCK), 0);
        all
    }

    fn sample() -> Vec<u8> {
        let mut tar = entry("images/", b'5', b"");
        tar.extend(entry("./images/hello", b'0', &[7; 700]));
        tar.extend(entry("demo.toml", 0, b"name = 'demo'"));
        tar.extend([0; 2 * BLOCK]);
        tar
    }

    #[test]
    fn files_are_found_by_name() {
        let tar = sample();
        let archive = Archive::new(&tar);
        let names: Vec<&str> = archive.files().map(|file| file.unwrap().name).collect();
        assert_eq!(names, ["images/hello", "demo.toml"]);
        assert_eq!(archive.find("images/hello"), Some(&[7; 700][..]));
        assert_eq!(archive.find("demo.toml"), Some(&b"name = 'demo'"[..]));
        assert_eq!(archive.find("images/"), None);
        assert_eq!(Archive::new(b"").files().count(), 0);
    }

    #[test]
    fn damage_is_an_error_and_ends_the_list() {
        let mut tar = sample();
        tar[BLOCK + 3] ^= 1;
        let found: Vec<_> = Archive::new(&tar).files().collect();
        assert_eq!(found, [Err(ArchiveError::BadHeader { offset: BLOCK })]);
        let text = found[0].unwrap_err().to_string();
        assert!(text.contains("byte 512"), "{text}");
        let tar = sample();
        for length in [BLOCK + 1, 2 * BLOCK + 699] {
            let found: Vec<_> = Archive::new(&tar[..length]).files().collect();
            assert_eq!(found, [Err(ArchiveError::Truncated { offset: BLOCK })], "{length}");
        }
    }

    #[test]
    fn no_cut_and_no_flipped_bit_panics() {
        let tar = sample();
        for length in 0..tar.len() {
            Archive::new(&tar[..length]).files().for_each(drop);
        }
        for at in 0..tar.len() {
            let mut tar = tar.clone();
            tar[at] ^= 0x80;
            Archive::new(&tar).files().for_each(drop);
        }
    }
}

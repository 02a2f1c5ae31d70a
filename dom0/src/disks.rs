//! What a description says about disks.
//!
//! ```toml
//! [[disk]]
//! name = "xvda"       # xvda to xvdp, and beyond; a partition as in xvdb1
//! kind = "ram"        # memory of dom0's; "image": a file, only read; "overlay": a file, and memory for what is written over it
//! size = "8M"         # bytes, or with K, M, G; whole sectors of 512; an overlay may be larger than its file
//! file = "notes.img"  # in disks/ of the boot archive
//! readonly = true
//! ```
//! In the shell the same is one word: `xvda:ram:8M`, `xvdb:image:notes.img`, `xvdc:overlay:notes.img:16M`, `xvdd:ram:1M:readonly`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use guest_sdk::block::device_number;
use serde::Deserialize;
use toml::Spanned;

/// Most disks of a domain.
const MOST: usize = 32;
const SECTOR: u64 = hypercall_abi::io::blkif::SECTOR_SIZE as u64;
/// Keys of a `[[disk]]`.
pub const KEYS: &[&str] = &["name", "kind", "size", "file", "readonly"];

/// What is below a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// So many bytes of memory, zeros at first.
    Ram(u64),
    /// A file of the boot archive, only read.
    Image(String),
    /// The same, with what is written kept in memory; and how large it is, if larger than the file.
    Overlay(String, Option<u64>),
}

/// A disk of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// As its guest knows it.
    pub name: String,
    /// The number of the virtual device.
    pub device: u32,
    /// What is below it.
    pub kind: Kind,
    /// The guest may only read it.
    pub readonly: bool,
}

/// A `[[disk]]` as it is written.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    name: Option<String>,
    kind: Option<String>,
    size: Option<Spanned<toml::Value>>,
    file: Option<String>,
    readonly: Option<bool>,
}

impl DiskSpec {
    /// Judges what was written.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn new(raw: Raw) -> Result<Self, String> {
        let name = raw.name.ok_or("disk: the key `name` is missing, as in name = \"xvda\"")?;
        let kind = raw
            .kind
            .ok_or_else(|| format!("disk {name}: the key `kind` is missing: ram, image or overlay"))?;
        let size = match raw.size.map(Spanned::into_inner) {
            None => None,
            Some(toml::Value::String(text)) => Some(text),
            Some(toml::Value::Integer(bytes)) => Some(bytes.to_string()),
            Some(_) => return Err(format!("disk {name}: write its size as in \"8M\"")),
        };
        Self::from_parts(&name, &kind, size.as_deref(), raw.file.as_deref(), raw.readonly.unwrap_or(false))
    }

    /// Reads the form of one word.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn parse(word: &str) -> Result<Self, String> {
        let mut parts: Vec<&str> = word.split(':').collect();
        let readonly = parts.last() == Some(&"readonly");
        if readonly {
            parts.pop();
        }
        let (name, kind, size, file) = match parts.as_slice() {
            [name, "ram", size] => (name, "ram", Some(*size), None),
            [name, "image", file] => (name, "image", None, Some(*file)),
            [name, "overlay", file] => (name, "overlay", None, Some(*file)),
            [name, "overlay", file, size] => (name, "overlay", Some(*size), Some(*file)),
            _ => {
                return Err(format!(
                    "{word:?} is no disk: write NAME:ram:SIZE, NAME:image:FILE or NAME:overlay:FILE[:SIZE], and :readonly if it \
                     is only to be read"
                ));
            }
        };
        Self::from_parts(name, kind, size, file, readonly)
    }

    fn from_parts(
        name: &str,
        kind: &str,
        size: Option<&str>,
        file: Option<&str>,
        readonly: bool,
    ) -> Result<Self, String> {
        let device = device_number(name).ok_or_else(|| {
            format!("disk {name:?}: disks are called xvda, xvdb, …; partitions xvda1, xvda2, …")
        })?;
        let size =
            size.map(|size| parse_size(size).map_err(|why| format!("disk {name}: size {size:?}: {why}")));
        let size = size.transpose()?;
        let file = file.map(ToString::to_string);
        let kind = match (kind, size, file) {
            ("ram", Some(size), None) => Kind::Ram(size),
            ("ram", None, _) => return Err(format!("disk {name}: kind ram needs a size")),
            ("ram", _, Some(_)) => {
                return Err(format!("disk {name}: kind ram has no file: is it an overlay?"));
            }
            ("image", None, Some(file)) => Kind::Image(file),
            ("image", Some(_), _) => {
                return Err(format!("disk {name}: an image is as large as its file: leave the size out"));
            }
            ("overlay", size, Some(file)) => Kind::Overlay(file, size),
            ("image" | "overlay", _, None) => {
                return Err(format!(
                    "disk {name}: kind {kind} needs a file: one in disks/ of the boot archive"
                ));
            }
            _ => return Err(format!("disk {name}: kind {kind:?}: there are ram, image and overlay")),
        };
        let readonly = readonly || matches!(kind, Kind::Image(_));
        Ok(Self { name: name.to_string(), device, kind, readonly })
    }

    /// The file below it, if any.
    #[must_use]
    pub fn file(&self) -> Option<&str> {
        match &self.kind {
            Kind::Ram(_) => None,
            Kind::Image(file) | Kind::Overlay(file, _) => Some(file),
        }
    }
}

/// A size of a disk in bytes: a number, with K, M or G behind it, or in bytes.
///
/// # Errors
/// What is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (text.get(..text.len() - 1), 10),
        Some(b'M' | b'm') => (text.get(..text.len() - 1), 20),
        Some(b'G' | b'g') => (text.get(..text.len() - 1), 30),
        _ => (Some(text), 0),
    };
    let digits =
        digits.filter(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()));
    let number: u64 = digits
        .and_then(|digits| digits.parse().ok())
        .ok_or("write a whole number, with K, M or G behind it")?;
    let bytes = number.checked_mul(1 << shift).ok_or("no disk is so large")?;
    if bytes == 0 {
        return Err("a disk has at least one sector of 512 bytes".into());
    }
    if !bytes.is_multiple_of(SECTOR) {
        return Err("not a multiple of a sector of 512 bytes".into());
    }
    Ok(bytes)
}

/// Adds a disk to others of the same domain.
///
/// # Errors
/// When there is one of that name or number, or too many.
pub fn add(disks: &mut Vec<DiskSpec>, disk: DiskSpec) -> Result<(), String> {
    if let Some(other) = disks.iter().find(|other| other.device == disk.device) {
        return Err(if other.name == disk.name {
            format!("disk {}: there are two of this name", disk.name)
        } else {
            format!("disk {}: {} is another name of the same", disk.name, other.name)
        });
    }
    if disks.len() >= MOST {
        return Err(format!("disk {}: a domain has {MOST} at most", disk.name));
    }
    disks.push(disk);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{DiskSpec, Kind, add};
    use alloc::string::ToString;
    use alloc::vec::Vec;

    #[test]
    fn a_disk_is_one_word() {
        let of = |word| DiskSpec::parse(word).map(|disk| (disk.device, disk.kind, disk.readonly));
        assert_eq!(of("xvda:ram:8M"), Ok((51712, Kind::Ram(8 << 20), false)));
        assert_eq!(of("xvdb1:ram:1024:readonly"), Ok((51729, Kind::Ram(1024), true)));
        assert_eq!(of("xvda:image:a.img"), Ok((51712, Kind::Image("a.img".to_string()), true)));
        assert_eq!(of("xvda:overlay:a.img"), Ok((51712, Kind::Overlay("a.img".to_string(), None), false)));
        assert_eq!(
            of("xvda:overlay:a.img:1G"),
            Ok((51712, Kind::Overlay("a.img".to_string(), Some(1 << 30)), false))
        );
        for (word, message) in [
            ("xvda", "\"xvda\" is no disk: write NAME:ram:SIZE"),
            ("xvda:tape:8M", "\"xvda:tape:8M\" is no disk"),
            ("hda:ram:8M", "disk \"hda\": disks are called xvda"),
            ("xvda:ram:1000", "disk xvda: size \"1000\": not a multiple of a sector of 512 bytes"),
            ("xvda:ram:0M", "disk xvda: size \"0M\": a disk has at least one sector"),
            ("xvda:ram:x", "disk xvda: size \"x\": write a whole number"),
            ("xvda:ram:99999999999G", "disk xvda: size \"99999999999G\": no disk is so large"),
        ] {
            let error = of(word).unwrap_err();
            assert!(error.starts_with(message), "{word}: {error}");
        }
    }

    #[test]
    fn no_two_disks_are_one() {
        let mut disks = Vec::new();
        for (word, message) in [
            ("xvda:ram:8M", None),
            ("xvdb:ram:8M", None),
            ("xvda:ram:4M", Some("disk xvda: there are two of this name")),
            ("51728:ram:4M", Some("disk 51728: xvdb is another name of the same")),
        ] {
            let added = add(&mut disks, DiskSpec::parse(word).unwrap());
            assert_eq!(added.err().as_deref(), message);
        }
        assert_eq!(disks.len(), 2);
    }
}

//! What a description says about disks.
//!
//! ```toml
//! [[disk]]
//! name = "xvda"       # xvda to xvdp, and beyond; a partition as in xvdb1
//! kind = "ram"        # memory of dom0's; or one of those below
//! size = "8M"         # bytes, or with K, M, G; whole sectors of 512
//! readonly = true
//! ```
//!
//! | kind | what is below | keys |
//! |---|---|---|
//! | `ram` | memory of dom0's, zeros at first | `size` |
//! | `image` | a file, only read | `file` |
//! | `overlay` | a file that is only read, and what is written over it: in memory, or in a file of its own | `file`, `changes`, `size` |
//! | `device` | a disk of dom0's, or a partition of it | `device` |
//! | `file` | a file on a disk of dom0's | `file`, `size` when it may have to be made |
//!
//! A file is one in `disks/` of the boot archive; with a disk before it, as in `vda1/guests/a.img`, one in the FAT file system there.
//!
//! In the shell the same is one word: `xvda:ram:8M`, `xvdb:image:notes.img`, `xvdc:overlay:notes.img:16M`, `xvdd:device:vda1`,
//! `xvde:file:vda1/a.img:64M`, `xvdf:overlay:notes.img:vda1/own.cow`, each with `:readonly` behind it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use guest_sdk::block::device_number;
use serde::Deserialize;
use toml::Spanned;

/// Most disks of a domain.
const MOST: usize = 32;
const SECTOR: u64 = hypercall_abi::io::blkif::SECTOR_SIZE as u64;
/// Kinds of disks, as messages name them.
const KINDS: &str = "ram, image, overlay, device and file";
/// How the name of a file for what is written over another ends.
const CHANGES: &str = ".cow";
/// Keys of a `[[disk]]`.
pub const KEYS: &[&str] = &["name", "kind", "size", "file", "changes", "device", "readonly"];

/// A file that a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the boot archive, below `disks/`.
    Archive(String),
    /// In the file system of a device.
    Volume(Path),
}

/// A file in the file system of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The disk or the partition: `vda`, `vda1`.
    pub device: String,
    /// From its root directory on.
    pub file: String,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.device, self.file)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Archive(file) => f.write_str(file),
            Self::Volume(path) => path.fmt(f),
        }
    }
}

/// What is below a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// So many bytes of memory, zeros at first.
    Ram(u64),
    /// A file, only read.
    Image(Source),
    /// The same, with what is written kept elsewhere.
    Overlay {
        /// What is only read.
        base: Source,
        /// Where what is written is kept; `None` for memory.
        changes: Option<Path>,
        /// How large it is, if larger than the file.
        size: Option<u64>,
    },
    /// A disk of dom0's, or a partition.
    Device(String),
    /// A file, and how large it is to be made if it is not there.
    File(Path, Option<u64>),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram(_) => f.write_str("ram"),
            Self::Image(file) => write!(f, "image {file}"),
            Self::Overlay { base, changes: None, .. } => write!(f, "overlay {base}"),
            Self::Overlay { base, changes: Some(changes), .. } => write!(f, "overlay {base} in {changes}"),
            Self::Device(name) => write!(f, "device {name}"),
            Self::File(path, _) => write!(f, "file {path}"),
        }
    }
}

/// The parts of a name of a disk of dom0's: which disk, which partition. `vdb2` is partition 2 of `vdb`.
#[must_use]
pub fn device_name(name: &str) -> Option<(&str, Option<u32>)> {
    let (disk, digits) = name.split_at_checked(3)?;
    let letter = disk.strip_prefix("vd")?;
    if !letter.bytes().all(|letter| letter.is_ascii_lowercase()) || digits.starts_with(['0', '+']) {
        return None;
    }
    let partition = if digits.is_empty() { None } else { Some(digits.parse().ok()?) };
    Some((disk, partition))
}

fn path(text: &str) -> Result<Path, String> {
    let (device, file) = text.split_once('/').ok_or("write DISK/FILE, as in vda1/a.img")?;
    if device_name(device).is_none() {
        return Err(format!("{device:?} is no disk of dom0's: they are called vda, vda1, …"));
    }
    if file.is_empty() || file.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("write the names of directories and file, as in vda1/guests/a.img".into());
    }
    Ok(Path { device: device.to_string(), file: file.to_string() })
}

fn source(text: &str) -> Result<Source, String> {
    if text.contains('/') { path(text).map(Source::Volume) } else { Ok(Source::Archive(text.to_string())) }
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
    changes: Option<String>,
    device: Option<String>,
    readonly: Option<bool>,
}

/// What was said, before it is known whether it fits the kind.
#[derive(Default)]
struct Said<'a> {
    size: Option<&'a str>,
    file: Option<&'a str>,
    changes: Option<&'a str>,
    device: Option<&'a str>,
}

impl DiskSpec {
    /// Judges what was written.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn new(raw: Raw) -> Result<Self, String> {
        let name = raw.name.ok_or("disk: the key `name` is missing, as in name = \"xvda\"")?;
        let kind = raw.kind.ok_or_else(|| format!("disk {name}: the key `kind` is missing: {KINDS}"))?;
        let size = match raw.size.map(Spanned::into_inner) {
            None => None,
            Some(toml::Value::String(text)) => Some(text),
            Some(toml::Value::Integer(bytes)) => Some(bytes.to_string()),
            Some(_) => return Err(format!("disk {name}: write its size as in \"8M\"")),
        };
        let said = Said {
            size: size.as_deref(),
            file: raw.file.as_deref(),
            changes: raw.changes.as_deref(),
            device: raw.device.as_deref(),
        };
        Self::from_parts(&name, &kind, &said, raw.readonly.unwrap_or(false))
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
        let none = Said::default();
        let (name, kind, said) = match parts.as_slice() {
            [name, kind @ "ram", size] => (name, kind, Said { size: Some(size), ..none }),
            [name, kind @ ("image" | "overlay" | "file"), file] => {
                (name, kind, Said { file: Some(file), ..none })
            }
            [name, kind @ "overlay", file, changes] if changes.contains('/') => {
                (name, kind, Said { file: Some(file), changes: Some(changes), ..none })
            }
            [name, kind @ "overlay", file, changes, size] => {
                (name, kind, Said { file: Some(file), changes: Some(changes), size: Some(size), ..none })
            }
            [name, kind @ ("overlay" | "file"), file, size] => {
                (name, kind, Said { file: Some(file), size: Some(size), ..none })
            }
            [name, kind @ "device", device] => (name, kind, Said { device: Some(device), ..none }),
            _ => {
                return Err(format!(
                    "{word:?} is no disk: write NAME:ram:SIZE, NAME:image:FILE, NAME:overlay:FILE[:CHANGES][:SIZE], \
                     NAME:device:DISK or NAME:file:DISK/FILE[:SIZE], and :readonly if it is only to be read"
                ));
            }
        };
        Self::from_parts(name, kind, &said, readonly)
    }

    fn from_parts(name: &str, kind: &str, said: &Said<'_>, readonly: bool) -> Result<Self, String> {
        let device = device_number(name).ok_or_else(|| {
            format!("disk {name:?}: disks are called xvda, xvdb, …; partitions xvda1, xvda2, …")
        })?;
        let kind = Self::kind(kind, said).map_err(|why| format!("disk {name}: {why}"))?;
        let readonly = readonly || matches!(kind, Kind::Image(_));
        Ok(Self { name: name.to_string(), device, kind, readonly })
    }

    fn kind(kind: &str, said: &Said<'_>) -> Result<Kind, String> {
        let size = said.size.map(|size| parse_size(size).map_err(|why| format!("size {size:?}: {why}")));
        let size = size.transpose()?;
        let needs_file = || format!("kind {kind} needs a file");
        let not = |key: &str, there: bool| {
            if there { Err(format!("kind {kind} has no key `{key}`")) } else { Ok(()) }
        };
        let named = |text: &str, why: String| format!("{text}: {why}");
        not("changes", said.changes.is_some() && kind != "overlay")?;
        not("device", said.device.is_some() && kind != "device")?;
        Ok(match kind {
            "ram" => {
                if said.file.is_some() {
                    return Err("kind ram has no file: is it an overlay?".into());
                }
                Kind::Ram(size.ok_or("kind ram needs a size")?)
            }
            "image" => {
                if size.is_some() {
                    return Err("an image is as large as its file: leave the size out".into());
                }
                let file = said.file.ok_or_else(needs_file)?;
                Kind::Image(source(file).map_err(|why| named(file, why))?)
            }
            "overlay" => {
                let file = said.file.ok_or_else(needs_file)?;
                let changes = said.changes.map(|changes| {
                    let path = path(changes).map_err(|why| named(changes, why))?;
                    // What is no such file yet is made one: nobody's image shall be taken for it.
                    if path.file.ends_with(CHANGES) {
                        Ok(path)
                    } else {
                        Err(format!("{changes}: a file for changes is called NAME{CHANGES}"))
                    }
                });
                let base = source(file).map_err(|why| named(file, why))?;
                Kind::Overlay { base, changes: changes.transpose()?, size }
            }
            "device" => {
                not("size", size.is_some())?;
                not("file", said.file.is_some())?;
                let device = said.device.ok_or("kind device needs a device, as in vda or vda1")?;
                if device_name(device).is_none() {
                    return Err(format!("{device:?} is no disk of dom0's: they are called vda, vda1, …"));
                }
                Kind::Device(device.to_string())
            }
            "file" => {
                let file = said.file.ok_or_else(needs_file)?;
                Kind::File(path(file).map_err(|why| named(file, why))?, size)
            }
            _ => return Err(format!("kind {kind:?}: there are {KINDS}")),
        })
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
    use super::{DiskSpec, Kind, Path, Source, add, device_name};
    use alloc::string::ToString;
    use alloc::vec::Vec;

    #[test]
    fn a_disk_is_one_word() {
        let of = |word| DiskSpec::parse(word).map(|disk| (disk.device, disk.kind, disk.readonly));
        assert_eq!(of("xvda:ram:8M"), Ok((51712, Kind::Ram(8 << 20), false)));
        assert_eq!(of("xvdb1:ram:1024:readonly"), Ok((51729, Kind::Ram(1024), true)));
        let archive = |file: &str| Source::Archive(file.to_string());
        let path = |device: &str, file: &str| Path { device: device.to_string(), file: file.to_string() };
        let overlay = |base, changes, size| Kind::Overlay { base, changes, size };
        assert_eq!(of("xvda:image:a.img"), Ok((51712, Kind::Image(archive("a.img")), true)));
        assert_eq!(
            of("xvda:image:vda/a.img"),
            Ok((51712, Kind::Image(Source::Volume(path("vda", "a.img"))), true))
        );
        assert_eq!(of("xvda:overlay:a.img"), Ok((51712, overlay(archive("a.img"), None, None), false)));
        assert_eq!(
            of("xvda:overlay:a.img:1G"),
            Ok((51712, overlay(archive("a.img"), None, Some(1 << 30)), false))
        );
        assert_eq!(
            of("xvda:overlay:a.img:vdb2/d/e.cow"),
            Ok((51712, overlay(archive("a.img"), Some(path("vdb2", "d/e.cow")), None), false))
        );
        assert_eq!(
            of("xvda:overlay:a.img:vda/e.cow:1M"),
            Ok((51712, overlay(archive("a.img"), Some(path("vda", "e.cow")), Some(1 << 20)), false))
        );
        assert_eq!(of("xvda:device:vda1:readonly"), Ok((51712, Kind::Device("vda1".to_string()), true)));
        assert_eq!(of("xvda:file:vda/a:4K"), Ok((51712, Kind::File(path("vda", "a"), Some(4096)), false)));
        for (word, message) in [
            ("xvda", "\"xvda\" is no disk: write NAME:ram:SIZE"),
            ("xvda:tape:8M", "\"xvda:tape:8M\" is no disk"),
            ("hda:ram:8M", "disk \"hda\": disks are called xvda"),
            ("xvda:ram:1000", "disk xvda: size \"1000\": not a multiple of a sector of 512 bytes"),
            ("xvda:ram:0M", "disk xvda: size \"0M\": a disk has at least one sector"),
            ("xvda:device:sda", "disk xvda: \"sda\" is no disk of dom0's"),
            ("xvda:device:vda01", "disk xvda: \"vda01\" is no disk of dom0's"),
            ("xvda:file:a.img", "disk xvda: a.img: write DISK/FILE"),
            ("xvda:file:vda/", "disk xvda: vda/: write the names"),
            ("xvda:file:vda/../a", "disk xvda: vda/../a: write the names"),
            ("xvda:overlay:a.img:vda/b.img", "disk xvda: vda/b.img: a file for changes is called NAME.cow"),
            ("xvda:ram:x", "disk xvda: size \"x\": write a whole number"),
            ("xvda:ram:99999999999G", "disk xvda: size \"99999999999G\": no disk is so large"),
        ] {
            let error = of(word).unwrap_err();
            assert!(error.starts_with(message), "{word}: {error}");
        }
    }

    #[test]
    fn disks_of_dom0_have_names() {
        for (name, parts) in [
            ("vda", Some(("vda", None))),
            ("vdz128", Some(("vdz", Some(128)))),
            ("vd", None),
            ("vdA", None),
            ("vda0", None),
            ("vda+1", None),
            ("vda1x", None),
            ("vdab", None),
            ("xvda", None),
        ] {
            assert_eq!(device_name(name), parts, "{name}");
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

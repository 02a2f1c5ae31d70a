//! The one module that Xenolith is booted with: dom0's ELF, and behind it, from the next page boundary on, what ring 0
//! never reads: dom0's own module. For our dom0 that is a tar archive of guest images and domain descriptions.

use crate::build::{self, Built};
use crate::images::{Kind, Workspace};
use crate::sh;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Where domain descriptions are kept; each one is packed.
const DESCRIPTIONS: &str = "dom0/domains";

/// Name of the file in the archive that holds shell commands, one a line.
pub const EXEC: &str = "etc/exec";

/// Name of the file that holds commands to run before the shell is anybody's, and of the one that greets whoever comes.
const START: &str = "etc/start";
const GREETING: &str = "etc/motd";

/// What dom0's shell does without being asked.
#[derive(Debug, Default, Clone, Copy)]
pub struct Script<'a> {
    /// Commands to run instead of reading any.
    pub exec: &'a [String],
    /// Commands to run before reading any.
    pub start: &'a [String],
    /// What whoever comes to the keyboard is told.
    pub greeting: &'a str,
}

/// What describes the switches: there is one in the archive, an added file of this name or ours.
pub const NETWORK: &str = "network.toml";

/// Packs the boot archive: `images/NAME` for every guest image that was built, each `NAME.toml` and, as `disks/NAME`, each `NAME.img` of
/// the descriptions' folder, `etc/network.toml`, the files that are added (by their endings, anything else as an image), and what there is
/// of the script, as `etc/exec`, `etc/start` and `etc/motd`.
///
/// # Errors
/// When a file cannot be read.
pub fn pack(workspace: &Workspace, built: &Built, script: Script<'_>, added: &[PathBuf]) -> Result<Vec<u8>> {
    let Script { exec, start, greeting } = script;
    let mut tar = tar::Builder::new(Vec::new());
    for image in workspace.guests.iter().filter(|image| image.kind != Kind::Dom0) {
        // `run` builds no guests that only test.
        let Some(path) = built.guests.get(&image.name) else { continue };
        let bytes = sh::read(&build::stripped(workspace, path)?)?;
        append(&mut tar, &format!("images/{}", image.name), &bytes)?;
    }
    if exec.iter().any(|command| command.contains("image=broken-")) {
        let hello = built.guests.get("hello").context("`hello` was not built")?;
        for (name, bytes) in broken(&sh::read(&build::stripped(workspace, hello)?)?) {
            append(&mut tar, &format!("images/broken-{name}"), &bytes)?;
        }
    }
    let is_network = |path: &&PathBuf| path.file_name().is_some_and(|name| name == NETWORK);
    let network =
        added.iter().find(is_network).cloned().unwrap_or_else(|| sh::root().join("dom0/etc").join(NETWORK));
    append(&mut tar, &format!("etc/{NETWORK}"), &sh::read(&network)?)?;
    for path in descriptions()?.iter().chain(added.iter().filter(|path| !is_network(path))) {
        let name =
            path.file_name().with_context(|| format!("{} is no file", path.display()))?.to_string_lossy();
        let name = match path.extension().and_then(|ext| ext.to_str()) {
            Some("toml") => name.into_owned(),
            Some("img") => format!("disks/{name}"),
            _ => format!("images/{name}"),
        };
        append(&mut tar, &name, &sh::read(path)?)?;
    }
    let lines = |lines: &[String]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    for (name, text) in [(EXEC, lines(exec)), (START, lines(start)), (GREETING, greeting.to_owned())] {
        if !text.is_empty() {
            append(&mut tar, name, text.as_bytes())?;
        }
    }
    tar.into_inner().context("cannot finish the boot archive")
}

/// A boot archive of just these files.
///
/// # Errors
/// When a name is too long for the format.
pub fn of(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        append(&mut tar, name, bytes)?;
    }
    tar.into_inner().context("cannot finish the boot archive")
}

/// Spoiled copies of an image, packed when a command names one: what a toolstack must refuse.
fn broken(image: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = image.to_vec();
        change(&mut bytes);
        bytes
    };
    vec![
        ("truncated", changed(&|bytes| bytes.truncate(bytes.len() / 2))),
        ("text", b"This is no kernel.\n".repeat(10)),
        ("32bit", changed(&|bytes| bytes[4] = 1)),
        // The owner's name in every Xen note.
        (
            "not-pv",
            changed(&|bytes| {
                while let Some(at) = bytes.windows(4).position(|window| window == b"Xen\0") {
                    bytes[at] = b'N';
                }
            }),
        ),
        // The last loadable segment takes a terabyte: p_memsz is 40 bytes into its program header.
        (
            "oversized",
            changed(&|bytes| {
                let headers = (0..usize::from(bytes[56])).map(|index| 64 + index * 56);
                if let Some(at) = headers.rev().find(|&at| bytes[at..at + 4] == [1, 0, 0, 0]) {
                    bytes[at + 40..at + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
                }
            }),
        ),
    ]
}

fn descriptions() -> Result<Vec<PathBuf>> {
    let dir = sh::root().join(DESCRIPTIONS);
    let mut found = Vec::new();
    if dir.is_dir() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == "toml" || ext == "img") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn append(tar: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> Result<()> {
    // No owner, no date: the same input gives the same archive.
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, bytes).with_context(|| format!("cannot pack {name}"))
}

/// Writes a kernel and, page-aligned after it, its module; returns the file for QEMU's `-initrd`.
///
/// # Errors
/// When a file cannot be read or written.
pub fn join(kernel: &Path, module: Option<&[u8]>, out: &Path) -> Result<()> {
    let mut bytes = sh::read(kernel)?;
    if let Some(module) = module {
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        bytes.extend_from_slice(module);
    }
    sh::write(out, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Image;

    #[test]
    fn packs_what_was_built_and_what_is_added() -> Result<()> {
        let image = |name: &str| Image {
            name: name.into(),
            package: name.into(),
            kind: Kind::Conformance,
            scenario: None,
            conformance: Default::default(),
        };
        let workspace =
            Workspace { target_dir: PathBuf::new(), has_hypervisor: true, guests: vec![image("not-built")] };
        let built = Built { hypervisor: PathBuf::new(), debug: None, guests: Default::default(), dom0: None };
        let added = [sh::root().join("LICENSE"), sh::root().join("Cargo.toml")];
        let bytes = pack(&workspace, &built, Script { exec: &["list".into()], ..Script::default() }, &added)?;
        let mut names = Vec::new();
        for entry in tar::Archive::new(&*bytes).entries()? {
            names.push(entry?.path()?.display().to_string());
        }
        for name in ["images/LICENSE", "Cargo.toml", EXEC] {
            assert!(names.iter().any(|n| n == name), "{name} is not in {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("not-built")));
        Ok(())
    }
}

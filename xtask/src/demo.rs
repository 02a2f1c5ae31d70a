//! What `cargo xtask run` shows to somebody who says nothing else: a web server that this host's browser reaches, and a guest that
//! remembers across restarts of the machine, beside the guests that start with dom0.

use anyhow::{Context, Result};
use std::fs::{File, TryLockError};
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

/// The port of dom0's router that the description `www` forwards to its guest.
const WEB_PORT: u16 = 8080;
/// How many ports of this host's are tried, from the same number on.
const PORTS: u16 = 20;
/// Bytes of the disk. They take no room before they are written.
const DISK_BYTES: u64 = 64 << 20;
/// The guest's disk: a file on it.
const JOURNAL: &str = "disk=xvda:file:vda/journal.img:1M";

/// The commands for it, and what to tell.
pub struct Demo {
    /// Commands for dom0's shell.
    pub start: Vec<String>,
    /// What there is to see.
    pub greeting: String,
}

impl Demo {
    /// With this disk of the machine's for what is remembered, which is made if it is not there; and with a web server if a port of this
    /// host's leads to dom0's card.
    ///
    /// # Errors
    /// When the disk cannot be made.
    pub fn new(disk: Option<&Path>, port: Option<u16>) -> Result<Demo> {
        let (mut start, mut greeting) = (Vec::new(), String::new());
        if let Some(disk) = disk {
            if make(disk).with_context(|| format!("cannot make {}", disk.display()))? {
                start.push("disk format vda".to_owned());
            }
            start.push(format!("run journal {JOURNAL}"));
        }
        if let Some(port) = port {
            start.push("create www".to_owned());
            greeting +=
                &format!("www is a web server: http://127.0.0.1:{port}/ on the machine that runs QEMU.\n");
        }
        if disk.is_some() {
            greeting += &format!(
                "journal counts its boots on a disk that stays: `run journal {JOURNAL}` is one, so is the next run.\n"
            );
        }
        Ok(Demo { start, greeting })
    }
}

/// Where the disk of a run is.
pub fn disk(beside: &Path) -> PathBuf {
    beside.with_extension("demo.img")
}

/// Makes the disk if it is not there; true while there is no file system on it.
fn make(disk: &Path) -> std::io::Result<bool> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(disk)?;
    if file.metadata()?.len() == 0 {
        file.set_len(DISK_BYTES)?;
    }
    let mut first = [0; 512];
    file.read_exact(&mut first)?;
    Ok(first.iter().all(|byte| *byte == 0))
}

/// Has a file for this run alone; `None` when another run has it.
///
/// # Errors
/// When it cannot be opened.
pub fn lock(path: &Path) -> Result<Option<File>> {
    let file = File::options().create(true).write(true).truncate(false).open(path);
    let file = file.with_context(|| format!("cannot make {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

/// A port of this host's that nobody has, and QEMU's word for the card that it leads to.
pub fn web_port() -> Option<(u16, String)> {
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let port = (WEB_PORT..WEB_PORT + PORTS).find(is_free)?;
    Some((port, format!("user,tcp:{port}-{WEB_PORT}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_made_once_and_formatted_once() -> Result<()> {
        let path = std::env::temp_dir().join(format!("xtask-demo-{}.img", std::process::id()));
        for _ in 0..2 {
            // A run that ended before it was formatted does no harm.
            let demo = Demo::new(Some(&path), Some(8081))?;
            assert_eq!(demo.start.first().map(String::as_str), Some("disk format vda"));
            assert_eq!(demo.start.last().map(String::as_str), Some("create www"));
            assert!(demo.greeting.contains("http://127.0.0.1:8081/"));
        }
        assert_eq!(std::fs::metadata(&path)?.len(), DISK_BYTES);
        std::fs::write(&path, vec![1; 512])?;
        let demo = Demo::new(Some(&path), None)?;
        assert_eq!(demo.start, [format!("run journal {JOURNAL}")], "what is there is kept");
        Ok(std::fs::remove_file(path)?)
    }

    #[test]
    fn a_port_that_is_taken_is_not_offered() {
        let Some((port, _)) = web_port() else { return };
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        let next = web_port();
        assert!(taken.is_err() || next.is_none_or(|(other, net)| other != port && net.ends_with("-8080")));
    }
}

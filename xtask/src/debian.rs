//! Files out of Debian's packages: fetched with apt, unpacked below the target folder, never installed.

use crate::sh;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fetches and unpacks a package below `dir`.
///
/// # Errors
/// When apt does not have it, or it cannot be unpacked.
pub fn unpack(package: &str, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    sh::run(Command::new("apt-get").args(["download", package]).current_dir(dir))?;
    let fetched = find(dir, |name| name.starts_with(package) && name.ends_with(".deb"))?;
    sh::run(Command::new("dpkg").arg("-x").args([fetched.as_path(), dir]))
}

/// A file of a package, fetched if it is not there yet.
///
/// # Errors
/// As [`unpack`], and when the package has no such file.
pub fn file(target_dir: &Path, package: &str, path: &str) -> Result<PathBuf> {
    let dir = target_dir.join("debian").join(package);
    let file = dir.join(path);
    if !file.is_file() {
        unpack(package, &dir).with_context(|| format!("cannot get {path} of Debian's package {package}"))?;
    }
    if !file.is_file() {
        bail!("Debian's package {package} has no file {path}");
    }
    Ok(file)
}

/// The entry of a folder whose name is `wanted`.
///
/// # Errors
/// When there is none.
pub fn find(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted) {
            return Ok(path);
        }
    }
    bail!("the package did not bring what was expected into {}", dir.display())
}

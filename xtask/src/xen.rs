//! Debian's Xen 4.17 as the reference: fetched as a package, unpacked below the target folder, never installed.

use crate::{debian, sh};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "xen-hypervisor-4.17-amd64";

/// Where the unpacked hypervisor is kept.
pub fn place(target_dir: &Path) -> PathBuf {
    target_dir.join("xen/xen-4.17.elf")
}

/// The bootable Xen, fetched if it is not there yet. `XEN=FILE` in the environment overrides it.
///
/// # Errors
/// When the package cannot be fetched or unpacked.
pub fn image(target_dir: &Path) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("XEN") {
        return Ok(path.into());
    }
    let elf = place(target_dir);
    if !elf.is_file() {
        fetch(&elf).with_context(|| {
            format!(
                "cannot get Debian's Xen; fetch package {PACKAGE} by hand and say XEN=path/to/unpacked/xen"
            )
        })?;
    }
    Ok(elf)
}

fn fetch(elf: &Path) -> Result<()> {
    let dir = elf.parent().context("the target folder")?;
    debian::unpack(PACKAGE, dir)?;
    let packed =
        debian::find(&dir.join("boot"), |name| name.starts_with("xen-4.17") && name.ends_with(".gz"))?;
    let mut gunzip = Command::new("gunzip");
    gunzip.arg("--stdout").arg(packed);
    sh::echo(&gunzip);
    let out = gunzip.output().context("cannot start gunzip")?;
    if !out.status.success() {
        bail!("gunzip: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    sh::write(elf, &out.stdout)
}

//! `cargo xtask setup`: installs what is missing, or prints the exact lines.

use crate::doctor::{self, Finding};
use crate::images::Workspace;
use crate::{sh, xen};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
pub struct Args {
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// How much a tool matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing works without it.
    Required,
    /// Some tests are skipped without it.
    Testing,
    /// Only more comfortable.
    Nice,
}

const SOURCE_FILE: &str = "/etc/apt/sources.list.d/bookworm-backports.list";

pub fn main(args: Args) -> Result<ExitCode> {
    if missing().is_empty() {
        println!("Nothing to do: everything is there.");
        return Ok(ExitCode::SUCCESS);
    }
    if args.dry_run {
        missing().iter().for_each(tell);
        return Ok(ExitCode::SUCCESS);
    }
    Ok(if install()? { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn missing() -> Vec<Finding> {
    doctor::examine().into_iter().filter(|f| f.state.is_err() && f.need != Need::Nice).collect()
}

/// Whether root's package manager brings it.
fn by_root(finding: &Finding) -> bool {
    !matches!(finding.name, "xen" | "rustc" | "rustfmt" | "clippy")
}

fn tell(finding: &Finding) {
    println!("For {}{}:", finding.name, if by_root(finding) { " (as root)" } else { "" });
    finding.install.iter().for_each(|line| println!("    {line}"));
}

/// Installs what is missing and can be installed; prints the lines for the rest and returns whether there was any.
///
/// # Errors
/// When an installation fails.
pub fn install() -> Result<bool> {
    let mut left = false;
    for finding in missing() {
        match finding.name {
            // Fetching needs no root: the package is unpacked, never installed.
            "xen" => xen::image(&Workspace::load()?.target_dir).map(drop)?,
            _ if !sh::is_root() || !by_root(&finding) => {
                left = true;
                tell(&finding);
            }
            name => {
                println!("Installing {name} ({})", finding.purpose);
                match name {
                    "qemu" => install_qemu()?,
                    _ => finding.install.iter().try_for_each(|line| shell(line))?,
                }
            }
        }
    }
    Ok(left)
}

/// The line that installs a Debian package.
pub fn apt(package: &str) -> String {
    format!("apt-get install --yes --no-install-recommends {package}")
}

/// Lines that install a QEMU that is new enough, for this distribution.
pub fn qemu_lines() -> Vec<String> {
    let mut lines = Vec::new();
    if is_bookworm() {
        if !has_backports() {
            lines.push(format!("echo '{}' > {SOURCE_FILE}", source_line()));
        }
        lines.push("apt-get update".into());
        lines.push(format!("{} -t bookworm-backports", apt("qemu-system-x86")));
    } else {
        lines.push("apt-get update".into());
        lines.push(apt("qemu-system-x86"));
    }
    lines
}

/// Installs QEMU, as root.
///
/// # Errors
/// When apt fails.
pub fn install_qemu() -> Result<()> {
    if is_bookworm() && !has_backports() {
        println!("Debian 12 has QEMU 7.2; version 10 is in bookworm-backports.");
        let line = source_line();
        if line.contains(NO_MIRROR) {
            bail!(
                "no apt source of bookworm was found to take the mirror from; as {SOURCE_FILE}, write: {line}"
            );
        }
        println!("Adding this apt source as {SOURCE_FILE}: {line}");
    }
    qemu_lines().iter().try_for_each(|line| shell(line))
}

fn shell(line: &str) -> Result<()> {
    println!("+ {line}");
    let status = Command::new("sh")
        .args(["-c", line])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .context("cannot start sh")?;
    if !status.success() {
        bail!("`{line}` failed ({status})");
    }
    Ok(())
}

fn is_bookworm() -> bool {
    std::fs::read_to_string("/etc/os-release").is_ok_and(|text| text.contains("VERSION_CODENAME=bookworm"))
}

fn sources() -> Vec<String> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_path_buf()];
    if let Ok(dir) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect()
}

fn has_backports() -> bool {
    let active = |line: &&str| !line.trim_start().starts_with('#');
    sources().iter().any(|text| text.lines().filter(active).any(|line| line.contains("bookworm-backports")))
}

/// Stands for the mirror's address where no apt source names one.
const NO_MIRROR: &str = "YOUR-DEBIAN-MIRROR";

/// The apt source of the backports, on the mirror that the machine already uses.
fn source_line() -> String {
    let mirror = sources().iter().find_map(|text| mirror(text));
    format!("deb {} bookworm-backports main", mirror.as_deref().unwrap_or(NO_MIRROR))
}

/// Finds the mirror of the suite `bookworm` in the text of an apt source file, in either of its two formats.
fn mirror(text: &str) -> Option<String> {
    let one_line = text.lines().find_map(|line| {
        let mut words = line.split_whitespace().filter(|word| !word.starts_with('[') && !word.ends_with(']'));
        let (kind, address, suite) = (words.next()?, words.next()?, words.next()?);
        (kind == "deb" && suite == "bookworm").then(|| address.to_owned())
    });
    one_line.or_else(|| {
        text.split("\n\n").find_map(|stanza| {
            let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
            let suites = field("Suites:")?;
            suites.split_whitespace().any(|suite| suite == "bookworm").then_some(())?;
            field("URIs:")?.split_whitespace().next().map(str::to_owned)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::mirror;

    #[test]
    fn takes_the_mirror_that_the_machine_uses() {
        let old = "# a comment\ndeb [arch=amd64] http://mirror.example/debian bookworm main contrib\n";
        assert_eq!(mirror(old).as_deref(), Some("http://mirror.example/debian"));
        let new = "Types: deb\nURIs: http://security.example/d\nSuites: bookworm-security\n\n\
                   Types: deb\nURIs: https://mirror.example/d\nSuites: bookworm bookworm-updates\n";
        assert_eq!(mirror(new).as_deref(), Some("https://mirror.example/d"));
        assert_eq!(mirror("deb http://other.example stable main"), None);
    }
}

//! `cargo xtask doctor`: what is there, what is missing, and what to do about it.

use crate::images::Workspace;
use crate::setup::{self, Need};
use crate::{qemu, sh, xen};
use anyhow::Result;
use std::path::Path;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {}

/// One thing that work here needs or likes.
pub struct Finding {
    /// What it is called.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// What was found; `Err` says what is wrong.
    pub state: Result<String, String>,
    /// How much it matters.
    pub need: Need,
    /// Lines that install it.
    pub install: Vec<String>,
}

pub fn main(_: Args) -> Result<ExitCode> {
    let findings = examine();
    for finding in &findings {
        match &finding.state {
            Ok(found) => println!("ok       {:<16} {found}", finding.name),
            Err(wrong) => {
                let mark = if finding.need == Need::Required { "MISSING" } else { "lacking" };
                println!("{mark:<8} {:<16} {wrong}; it is for: {}", finding.name, finding.purpose);
                finding.install.iter().for_each(|line| println!("             {line}"));
            }
        }
    }
    let missing = findings.iter().filter(|f| f.need == Need::Required && f.state.is_err()).count();
    if missing == 0 {
        println!("Everything needed is there.");
        Ok(ExitCode::SUCCESS)
    } else {
        println!("{missing} missing: `cargo xtask setup` installs them as root.");
        Ok(ExitCode::FAILURE)
    }
}

/// Looks at the machine.
pub fn examine() -> Vec<Finding> {
    let found = |version: Option<String>| version.ok_or_else(|| "not found".to_owned());
    let qemu = match qemu::version() {
        Some((major, minor)) if major >= qemu::WANTED_MAJOR => Ok(format!("{major}.{minor}")),
        Some((major, minor)) => Err(format!("{major}.{minor} is older than {}", qemu::WANTED_MAJOR)),
        None => Err(format!("`{}` does not run", qemu::program().display())),
    };
    let xen = match Workspace::load() {
        Ok(workspace) => Some(xen::place(&workspace.target_dir)).filter(|path| path.is_file()),
        Err(_) => None,
    };
    let headers = Path::new("/usr/include/xen/xen.h");
    vec![
        Finding {
            name: "rustc",
            purpose: "building",
            state: found(sh::version("rustc", &["--version"])).and_then(new_enough),
            need: Need::Required,
            install: vec!["rustup toolchain install stable".into()],
        },
        Finding {
            name: "gcc",
            purpose: "linking, and the ABI's comparison with the public headers",
            state: found(sh::version("gcc", &["--version"])),
            need: Need::Required,
            install: vec![setup::apt("gcc")],
        },
        Finding {
            name: "objcopy",
            purpose: "taking debug information out of images for the boot archive",
            state: found(sh::version("objcopy", &["--version"])),
            need: Need::Required,
            install: vec![setup::apt("binutils")],
        },
        Finding {
            name: "qemu",
            purpose: "booting",
            // An old one boots, with a warning; some cases are skipped.
            need: if qemu::version().is_some() { Need::Testing } else { Need::Required },
            state: qemu,
            install: setup::qemu_lines(),
        },
        Finding {
            name: "rustfmt",
            purpose: "the format check of `cargo xtask test`",
            state: found(sh::version("cargo", &["fmt", "--version"])),
            need: Need::Testing,
            install: vec!["rustup component add rustfmt".into()],
        },
        Finding {
            name: "clippy",
            purpose: "the lints of `cargo xtask test`",
            state: found(sh::version("cargo", &["clippy", "--version"])),
            need: Need::Testing,
            install: vec!["rustup component add clippy".into()],
        },
        Finding {
            name: "libxen-dev",
            purpose: "comparing the ABI's layouts with the public headers",
            state: if headers.is_file() {
                Ok(headers.display().to_string())
            } else {
                Err("not found".into())
            },
            need: Need::Testing,
            install: vec![setup::apt("libxen-dev")],
        },
        Finding {
            name: "xen",
            purpose: "running the same guests on real Xen (`--on xen`)",
            state: xen.map(|path| path.display().to_string()).ok_or_else(|| "not fetched yet".into()),
            need: Need::Testing,
            install: vec!["cargo xtask setup    # fetches Debian's package into the target folder".into()],
        },
        Finding {
            name: "cargo-nextest",
            purpose: "running host tests faster (cargo test does, too)",
            state: found(sh::version("cargo", &["nextest", "--version"])),
            need: Need::Nice,
            install: vec!["cargo install --locked cargo-nextest".into()],
        },
    ]
}

fn new_enough(version: String) -> Result<String, String> {
    let wanted = env!("CARGO_PKG_RUST_VERSION");
    let number = |text: &str| -> Option<(u32, u32)> {
        let mut parts = text.split('.').map(|part| part.parse().ok());
        Some((parts.next()??, parts.next()??))
    };
    match version.split(' ').nth(1).and_then(number) {
        Some(found) if Some(found) >= number(wanted) => Ok(version),
        _ => Err(format!("`{version}` is older than {wanted}")),
    }
}

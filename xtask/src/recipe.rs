//! The one place that knows how images are compiled. Host builds (`cargo test`, `cargo clippy`) never see these flags:
//! they go to a target folder of their own, so that neither kind of build throws away the other's work.
//!
//! Moving to `x86_64-unknown-none` one day means changing [`TARGET`] and dropping the flags that it implies.

use crate::images::{Image, Kind, Workspace};
use crate::sh;
use anyhow::{Result, bail};
use std::path::PathBuf;

/// Images are built for the host's own target: nothing has to be added to a stock Rust installation. Named explicitly, so
/// that build scripts and procedural macros do not get the images' flags.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The profile in Cargo.toml: abort on panic, fat LTO, one codegen unit.
pub const PROFILE: &str = "image";

/// Flags for code that runs in ring 0.
const HYPERVISOR: &[&str] = &[
    // The link address is neither in the low nor in the top 2 GiB: only position-independent code reaches itself there.
    "-Crelocation-model=pic",
    // Faults and interrupts push on the current stack.
    "-Cno-redzone=yes",
    "-Cforce-frame-pointers=yes",
    // Guests' vector state is live while ring 0 runs. Fat LTO carries this into core and alloc; `xtask audit` checks it.
    "-Ctarget-feature=-sse,-sse2,+soft-float",
    "-Coverflow-checks=on",
    // Only for the warning that switching sse2 off here may become an error; lints run in clippy, without these flags.
    "-Awarnings",
];

/// Flags for guest images. SSE is theirs to use.
const GUEST: &[&str] = &[
    "-Crelocation-model=static",
    // Upcall frames are pushed at the guest's own stack pointer.
    "-Cno-redzone=yes",
    "-Cforce-frame-pointers=yes",
    "--cfg=xenolith_guest",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,max-page-size=4096",
    "-Clink-arg=-Wl,-z,noexecstack",
];

/// Which hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hypervisor {
    /// The one that is released.
    Release,
    /// One that checks itself: debug assertions, the order of locks among them.
    Debug,
    /// One that gives guests constant answers on request: for tests of tests.
    ConstantAnswers,
}

/// Builds the hypervisor and returns the linked ELF, as cargo left it.
///
/// # Errors
/// When the package is not there or does not build.
pub fn hypervisor(workspace: &Workspace, which: Hypervisor) -> Result<PathBuf> {
    if !workspace.has_hypervisor {
        bail!(
            "kernel/Cargo.toml: package `xenolith` has no binary `xenolith` yet, so there is nothing to boot"
        );
    }
    let mut flags: Vec<String> = HYPERVISOR.iter().map(|flag| flag.to_string()).collect();
    let mut cargo = sh::cargo();
    cargo.args(["build", "--quiet", "--package", "xenolith", "--bin", "xenolith"]);
    // A folder each, so that one build does not throw the other's away.
    let folder = match which {
        Hypervisor::Release => "image/hypervisor",
        Hypervisor::Debug => {
            flags.push("-Cdebug-assertions=on".into());
            "image/hypervisor-debug"
        }
        Hypervisor::ConstantAnswers => {
            cargo.args(["--features", "constant-answers"]);
            "image/hypervisor-constant-answers"
        }
    };
    let target_dir = workspace.target_dir.join(folder);
    build(cargo, &target_dir, flags)?;
    Ok(target_dir.join(TARGET).join(PROFILE).join("xenolith"))
}

/// Builds the given guest images in one go and returns where each one is.
///
/// # Errors
/// When one of them does not build.
pub fn guests(workspace: &Workspace, images: &[&Image]) -> Result<Vec<PathBuf>> {
    if images.is_empty() {
        return Ok(Vec::new());
    }
    let target_dir = workspace.target_dir.join("image/guest");
    let mut cargo = sh::cargo();
    cargo.args(["build", "--quiet"]);
    let mut packages: Vec<&str> = images.iter().map(|image| image.package.as_str()).collect();
    packages.dedup();
    for package in packages {
        cargo.args(["--package", package]);
    }
    for image in images {
        cargo.args([if image.kind == Kind::Example { "--example" } else { "--bin" }, &image.name]);
    }
    let mut flags: Vec<String> = GUEST.iter().map(|flag| flag.to_string()).collect();
    flags.push(format!("-Clink-arg=-Wl,-T,{}", sh::root().join("guest-sdk/guest.ld").display()));
    build(cargo, &target_dir, flags)?;
    let out = target_dir.join(TARGET).join(PROFILE);
    Ok(images
        .iter()
        .map(|image| match image.kind {
            Kind::Example => out.join("examples").join(&image.name),
            _ => out.join(&image.name),
        })
        .collect())
}

fn build(
    mut cargo: std::process::Command,
    target_dir: &std::path::Path,
    mut flags: Vec<String>,
) -> Result<()> {
    // The same image wherever the repository lies: panics name files from the root down.
    flags.push(format!("--remap-path-prefix={}=.", sh::root().display()));
    cargo.args(["--profile", PROFILE, "--target", TARGET, "--target-dir"]).arg(target_dir);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    sh::run(&mut cargo)
}

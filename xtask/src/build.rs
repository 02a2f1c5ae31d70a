//! `cargo xtask build`: the hypervisor, dom0 and all guest images.

use crate::images::{Image, Kind, Workspace};
use crate::recipe::Hypervisor;
use crate::scenario::Scenario;
use crate::{recipe, sh, symbols};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;

#[derive(clap::Args)]
pub struct Args {
    /// Build only the hypervisor
    #[arg(long)]
    hypervisor: bool,
    /// Build only these guest images (by name)
    names: Vec<String>,
}

/// What a build left behind, ready to boot.
pub struct Built {
    /// The hypervisor.
    pub hypervisor: PathBuf,
    /// The one that checks itself, if it was asked for.
    pub debug: Option<PathBuf>,
    /// Guest images by name, as linked.
    pub guests: BTreeMap<String, PathBuf>,
    /// Our dom0, which is one of them.
    pub dom0: Option<PathBuf>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    if args.names.is_empty() {
        show(&hypervisor(&workspace)?)?;
    }
    if !args.hypervisor {
        let images = if args.names.is_empty() {
            workspace.guests.iter().collect()
        } else {
            args.names.iter().map(|name| workspace.guest(name)).collect::<Result<Vec<&Image>>>()?
        };
        recipe::guests(&workspace, &images)?.iter().try_for_each(|path| show(path))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(path: &Path) -> Result<()> {
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot find {}", path.display()))?.len();
    let path = path.strip_prefix(sh::root()).unwrap_or(path);
    println!("{} ({} KiB with debug information)", path.display(), bytes.div_ceil(1024));
    Ok(())
}

/// Builds everything.
///
/// # Errors
/// When something does not build.
pub fn everything(workspace: &Workspace) -> Result<Built> {
    let built = some(workspace, |_| true)?;
    Ok(Built { debug: Some(debug(workspace)?), ..built })
}

/// Builds the hypervisor, dom0 and the example guests: all but the guests that only test.
///
/// # Errors
/// When something does not build.
pub fn for_run(workspace: &Workspace) -> Result<Built> {
    some(workspace, |image| !matches!(image.kind, Kind::Conformance | Kind::Helper | Kind::Scenario))
}

/// Builds what some scenarios boot: with our dom0 come the example guests, and whatever else its commands name.
///
/// # Errors
/// When something does not build.
pub fn for_scenarios<'a>(
    workspace: &Workspace,
    scenarios: impl Iterator<Item = &'a Scenario>,
) -> Result<Built> {
    let scenarios: Vec<&Scenario> = scenarios.collect();
    let wanted = |image: &Image| {
        scenarios.iter().any(|scenario| match &scenario.image {
            Some(name) => *name == image.name,
            None => {
                !matches!(image.kind, Kind::Conformance | Kind::Helper | Kind::Scenario)
                    || scenario.exec.iter().any(|command| command.contains(&image.name))
            }
        })
    };
    let built = some(workspace, wanted)?;
    let debug = scenarios.iter().any(|scenario| scenario.debug).then(|| debug(workspace)).transpose()?;
    Ok(Built { debug, ..built })
}

/// Builds what the conformance suite needs: the hypervisor, dom0, the images with cases and their helpers.
///
/// # Errors
/// When something does not build.
pub fn conformance(workspace: &Workspace) -> Result<Built> {
    some(workspace, |image| matches!(image.kind, Kind::Dom0 | Kind::Conformance | Kind::Helper))
}

fn some(workspace: &Workspace, wanted: impl Fn(&Image) -> bool) -> Result<Built> {
    let hypervisor = hypervisor(workspace)?;
    let images: Vec<&Image> = workspace.guests.iter().filter(|image| wanted(image)).collect();
    let paths = recipe::guests(workspace, &images)?;
    let guests: BTreeMap<String, PathBuf> =
        images.iter().map(|image| image.name.clone()).zip(paths).collect();
    let dom0 = images
        .iter()
        .find(|image| image.kind == Kind::Dom0)
        .and_then(|image| guests.get(&image.name).cloned());
    Ok(Built { hypervisor, debug: None, guests, dom0 })
}

/// Builds the hypervisor and puts its symbols in; returns the bootable ELF.
///
/// # Errors
/// When it does not build, or its linker script has no room for the symbols.
pub fn hypervisor(workspace: &Workspace) -> Result<PathBuf> {
    bootable(workspace, Hypervisor::Release, "image/boot/xenolith")
}

/// The same for the build that checks itself.
///
/// # Errors
/// As [`hypervisor`].
pub fn debug(workspace: &Workspace) -> Result<PathBuf> {
    bootable(workspace, Hypervisor::Debug, "image/boot/xenolith-debug")
}

/// The same for the build that gives guests constant answers.
///
/// # Errors
/// As [`hypervisor`].
pub fn constant_answers(workspace: &Workspace) -> Result<PathBuf> {
    bootable(workspace, Hypervisor::ConstantAnswers, "image/boot/xenolith-constant-answers")
}

fn bootable(workspace: &Workspace, which: Hypervisor, out: &str) -> Result<PathBuf> {
    let linked = recipe::hypervisor(workspace, which)?;
    let out = workspace.target_dir.join(out);
    if !is_newer(&out, &linked) {
        symbols::fill(&linked, &out)?;
    }
    Ok(out)
}

/// A copy of an image without debug information, for the boot archive; symbols stay.
///
/// # Errors
/// When objcopy (it comes with gcc) is missing or refuses the file.
pub fn stripped(workspace: &Workspace, image: &Path) -> Result<PathBuf> {
    // Scenarios run side by side: none may read what another is just writing.
    static WRITING: Mutex<()> = Mutex::new(());
    let _writing = WRITING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let name = image.file_name().context("an image has a file name")?;
    let out = workspace.target_dir.join("image/boot").join(name);
    let newer =
        |a: &Path, b: &Path| Some(a.metadata().ok()?.modified().ok()? > b.metadata().ok()?.modified().ok()?);
    if newer(&out, image) != Some(true) {
        std::fs::create_dir_all(workspace.target_dir.join("image/boot"))?;
        sh::run(Command::new("objcopy").arg("--strip-debug").args([image, out.as_path()]))?;
    }
    Ok(out)
}

/// Whether the first file exists and was written after the second.
fn is_newer(a: &Path, b: &Path) -> bool {
    let time = |path: &Path| path.metadata().and_then(|meta| meta.modified());
    matches!((time(a), time(b)), (Ok(a), Ok(b)) if a > b)
}

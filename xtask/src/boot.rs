//! `cargo xtask boot`: any 64-bit PV ELF kernel as dom0, of Xenolith or of real Xen.

use crate::images::Workspace;
use crate::qemu::{self, End, Host, Machine, Watch};
use crate::{archive, build, recipe, sh, xen};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Exit code: 0 power off, 3 reboot, 4 suspend, 5 crash, 6 watchdog, 7 hypervisor panic, 8 time is up, 9 reset without a
/// reason, 1 anything else.
#[derive(clap::Args)]
pub struct Args {
    /// A kernel's ELF file, or the name of a guest image of this repository
    image: String,
    /// The kernel's command line, handed over verbatim
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Who boots it
    #[arg(long, value_enum, default_value_t = Host::Xenolith, value_name = "HYPERVISOR")]
    on: Host,
    /// Words for the hypervisor's command line
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Memory of dom0
    #[arg(long, default_value = "128M", value_name = "SIZE")]
    dom0_mem: String,
    /// The kernel's module (an initial RAM disk, a boot archive)
    #[arg(long, value_name = "FILE")]
    module: Option<PathBuf>,
    /// Stop after this many seconds (0: never)
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    #[command(flatten)]
    machine: Machine,
}

pub fn main(args: Args) -> Result<ExitCode> {
    qemu::require()?;
    let workspace = Workspace::load()?;
    let kernel = kernel(&workspace, &args.image)?;
    let words = format!("dom0_mem={} {}", args.dom0_mem, args.append);
    let qemu = command(
        &workspace,
        &args.machine,
        &Boot {
            host: args.on,
            kernel: &kernel,
            module: args.module.as_deref(),
            words: words.trim(),
            cmdline: &args.cmdline,
            scratch: "boot",
        },
    )?;
    let timeout = (args.timeout > 0).then(|| Duration::from_secs(args.timeout));
    let end = qemu::watch(qemu, &Watch { host: args.on, timeout, quiet: false, steps: &[] })?.end;
    if end != End::Poweroff {
        eprintln!("xtask: {end}");
    }
    Ok(end.exit_code())
}

/// One boot.
pub struct Boot<'a> {
    /// Who boots.
    pub host: Host,
    /// dom0's ELF.
    pub kernel: &'a Path,
    /// dom0's module.
    pub module: Option<&'a Path>,
    /// The hypervisor's words.
    pub words: &'a str,
    /// dom0's words.
    pub cmdline: &'a str,
    /// Name for the file that is put together for QEMU; runs at the same time need different ones.
    pub scratch: &'a str,
}

/// QEMU's command line for a boot; builds or fetches the hypervisor.
///
/// # Errors
/// When the hypervisor does not build, or Xen cannot be fetched.
pub fn command(workspace: &Workspace, machine: &Machine, boot: &Boot) -> Result<std::process::Command> {
    match boot.host {
        Host::Xenolith => {
            let image = build::hypervisor(workspace)?;
            let module = match boot.module {
                None => boot.kernel.to_path_buf(),
                Some(module) => {
                    let joined =
                        workspace.target_dir.join("image/boot").join(format!("{}.module", boot.scratch));
                    archive::join(boot.kernel, Some(&sh::read(module)?), &joined)?;
                    joined
                }
            };
            Ok(machine.xenolith(&image, &module, boot.words, boot.cmdline))
        }
        Host::Xen => {
            let image = xen::image(&workspace.target_dir)?;
            Ok(machine.xen(&image, boot.kernel, boot.module, boot.words, boot.cmdline))
        }
    }
}

/// The file to boot: a path, or the name of one of our images, which is built.
fn kernel(workspace: &Workspace, name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    if name.contains('/') {
        bail!("{name}: no such file");
    }
    let image = workspace.guest(name)?;
    let path = recipe::guests(workspace, &[image])?.pop().context("one image in, one image out")?;
    build::stripped(workspace, &path)
}

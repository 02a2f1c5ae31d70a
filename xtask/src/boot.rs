//! `cargo xtask boot`: any 64-bit PV ELF kernel as dom0, of Xenolith or of real Xen.

use crate::images::Workspace;
use crate::qemu::{self, End, Host, Machine, Watch};
use crate::{archive, build, recipe, sh, xen};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Exit code: 0 power off, 3 reboot, 4 suspend, 5 crash, 6 watchdog, 7 hypervisor panic, 8 time is up, 9 reset without a
/// reason, 10 refused by the hypervisor, 1 anything else.
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
    let hypervisor = match args.on {
        Host::Xenolith => build::hypervisor(&workspace)?,
        Host::Xen => xen::image(&workspace.target_dir)?,
    };
    let boot = Boot {
        host: args.on,
        hypervisor: &hypervisor,
        kernel: &kernel,
        module: args.module.as_deref(),
        words: words.trim(),
        cmdline: &args.cmdline,
        joined: &workspace.target_dir.join("image/boot/joined"),
    };
    let qemu = command(&args.machine, &boot)?;
    let timeout = (args.timeout > 0).then(|| Duration::from_secs(args.timeout));
    let end =
        qemu::watch(qemu, &Watch { host: args.on, timeout, quiet: false, steps: &[], channel: None })?.end;
    if end != End::Poweroff {
        eprintln!("xtask: {end}");
    }
    Ok(end.exit_code())
}

/// One boot.
pub struct Boot<'a> {
    /// Who boots.
    pub host: Host,
    /// The hypervisor's image.
    pub hypervisor: &'a Path,
    /// dom0's ELF.
    pub kernel: &'a Path,
    /// dom0's module.
    pub module: Option<&'a Path>,
    /// The hypervisor's words.
    pub words: &'a str,
    /// dom0's words.
    pub cmdline: &'a str,
    /// File to put kernel and module together in; runs at the same time need different ones.
    pub joined: &'a Path,
}

/// Memory of our dom0 on Xen, which gives it all there is unless told otherwise.
const DOM0_MEM_ON_XEN: &str = "128M";

/// The hypervisor's words for our dom0, which leaves memory to other domains.
pub fn with_room_for_guests(host: Host, words: &str) -> String {
    let said = words.split_ascii_whitespace().any(|word| word.starts_with("dom0_mem="));
    match host {
        Host::Xen if !said => format!("dom0_mem={DOM0_MEM_ON_XEN} {words}").trim().to_owned(),
        _ => words.trim().to_owned(),
    }
}

/// QEMU's command line for a boot.
///
/// # Errors
/// When kernel and module cannot be put together.
pub fn command(machine: &Machine, boot: &Boot) -> Result<Command> {
    match (boot.host, boot.module) {
        (Host::Xenolith, None) => machine.xenolith(boot.hypervisor, boot.kernel, boot.words, boot.cmdline),
        (Host::Xenolith, Some(module)) => {
            archive::join(boot.kernel, Some(&sh::read(module)?), boot.joined)?;
            machine.xenolith(boot.hypervisor, boot.joined, boot.words, boot.cmdline)
        }
        (Host::Xen, module) => machine.xen(boot.hypervisor, boot.kernel, module, boot.words, boot.cmdline),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_xen_our_dom0_leaves_room_unless_told_otherwise() {
        assert_eq!(with_room_for_guests(Host::Xen, ""), "dom0_mem=128M");
        assert_eq!(with_room_for_guests(Host::Xen, "dom0_mem=64M loglvl=all"), "dom0_mem=64M loglvl=all");
        assert_eq!(with_room_for_guests(Host::Xenolith, " loglvl=all "), "loglvl=all");
    }
}

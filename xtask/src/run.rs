//! `cargo xtask run`: a hypervisor, our dom0 and the guests of the boot archive, from one command.

use crate::archive::Script;
use crate::boot::{self, Boot};
use crate::ctl::{self, Instance};
use crate::demo::{self, Demo};
use crate::images::Workspace;
use crate::qemu::{self, End, Host, Machine, Watch};
use crate::{archive, build, sh, xen};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The port of this host's that leads to the web server if nobody else has it.
const DEFAULT_PORT: u16 = 8080;

#[derive(clap::Args)]
pub struct Args {
    /// Run these shell commands (separated by `;`) without a terminal; exit with 0 only if all succeed
    #[arg(long, value_name = "COMMANDS")]
    exec: Option<String>,
    /// One more file for the boot archive: a description (*.toml), a disk (*.img) or a guest image (repeatable)
    #[arg(long, value_name = "FILE")]
    add: Vec<PathBuf>,
    /// Who runs below our dom0
    #[arg(long, value_enum, default_value_t = Host::Xenolith, value_name = "HYPERVISOR")]
    on: Host,
    /// Words for the hypervisor's command line; after ` --- `, words for dom0
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// What `cargo xtask ctl --instance` calls this run; its process number unless given
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Stop after this many seconds (0: never; with --exec, 300 unless given)
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    #[command(flatten)]
    machine: Machine,
}

pub fn main(args: Args) -> Result<ExitCode> {
    qemu::require()?;
    let workspace = Workspace::load()?;
    let built = build::for_run(&workspace)?;
    let dom0 = built.dom0.as_deref().context(
        "dom0/Cargo.toml: there is no dom0 image yet; `cargo xtask boot IMAGE` boots other kernels",
    )?;
    let commands = args.exec.as_deref().map(split).unwrap_or_default();
    let mut machine = args.machine.clone();
    let instance = Instance::new(&workspace.target_dir, args.name.as_deref())?;
    machine.channel = Some(instance.socket.clone());
    let shown =
        if args.exec.is_none() { show(&mut machine, &ctl::folder(&workspace.target_dir))? } else { None };
    let script = Script {
        exec: &commands,
        start: shown.as_ref().map_or(&[], |shown| &shown.demo.start),
        greeting: shown.as_ref().map_or("", |shown| &shown.demo.greeting),
    };
    let kernel = build::stripped(&workspace, dom0)?;
    let scratch = workspace.target_dir.join("image/boot");
    let module = scratch.join("archive.tar");
    sh::write(&module, &archive::pack(&workspace, &built, script, &args.add)?)?;
    let (words, cmdline) = args.append.split_once(" --- ").unwrap_or((&args.append, ""));
    let hypervisor = match args.on {
        Host::Xenolith => built.hypervisor.clone(),
        Host::Xen => xen::image(&workspace.target_dir)?,
    };
    let boot = Boot {
        host: args.on,
        hypervisor: &hypervisor,
        kernel: &kernel,
        module: Some(&module),
        words: &boot::with_room_for_guests(args.on, words),
        cmdline,
        joined: &scratch.join("module"),
    };
    let interactive = args.exec.is_none() && std::io::stdin().is_terminal();
    let qemu = boot::command(&machine, &boot)?;

    let end = if interactive {
        eprintln!("The terminal is dom0's console. To leave: `poweroff` in its shell, or ctrl-a x.");
        match args.on {
            Host::Xenolith => qemu::interact(qemu)?,
            // It does not end QEMU: somebody has to read its last line.
            Host::Xen => {
                qemu::watch(
                    qemu,
                    &Watch { host: args.on, timeout: None, quiet: false, steps: &[], channel: None },
                )?
                .end
            }
        }
    } else {
        let seconds = args.timeout.unwrap_or(if args.exec.is_some() { 300 } else { 0 });
        let timeout = (seconds > 0).then(|| Duration::from_secs(seconds));
        qemu::watch(qemu, &Watch { host: args.on, timeout, quiet: false, steps: &[], channel: None })?.end
    };
    if end != End::Poweroff {
        eprintln!("xtask: {end}");
    }
    Ok(end.exit_code())
}

/// What is shown to whoever says nothing else, and the lock of its disk.
struct Shown {
    demo: Demo,
    _lock: Option<File>,
}

/// Adds what it takes to the machine, unless its devices were chosen.
fn show(machine: &mut Machine, folder: &Path) -> Result<Option<Shown>> {
    if machine.net.is_some() || !machine.disks.is_empty() {
        return Ok(None);
    }
    let port = demo::web_port();
    match &port {
        Some((DEFAULT_PORT, _)) => {}
        Some((port, _)) => {
            eprintln!("Port {DEFAULT_PORT} is taken: the web server is at http://127.0.0.1:{port}/.")
        }
        None => {
            eprintln!("Ports {DEFAULT_PORT} and some more are taken: there is no web server in this run.")
        }
    }
    machine.net = Some(port.as_ref().map_or("user", |(_, net)| net).to_owned());
    let disk = folder.join("disk.img");
    let lock = demo::lock(&disk.with_extension("img.lock"))?;
    if lock.is_some() {
        machine.disks.push(disk.display().to_string());
    } else {
        eprintln!("{} is another run's: nothing is remembered in this one.", disk.display());
    }
    let demo = Demo::new(lock.is_some().then_some(&disk), port.map(|(port, _)| port))?;
    Ok(Some(Shown { demo, _lock: lock }))
}

/// Commands from the words after `--exec`.
fn split(text: &str) -> Vec<String> {
    text.split([';', '\n']).map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn commands_are_separated_by_semicolons() {
        assert_eq!(super::split("list; create a.toml;;\n top "), ["list", "create a.toml", "top"]);
    }
}

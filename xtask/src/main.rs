//! `cargo xtask`: the one tool of this repository.
//!
//! One file per command; what several commands share is in `sh` (child processes, echoed), `recipe` (the only place
//! that knows rustc flags), `images` (what can be booted), `archive` (what dom0 finds beside itself), `qemu` (the machine
//! and how its end is read) and `xen` (Debian's Xen as the reference).

#![forbid(unsafe_code)]

mod archive;
mod audit;
mod bench;
mod boot;
mod build;
mod conformance;
mod coverage;
mod ctl;
mod debian;
mod demo;
mod devices;
mod docs;
mod doctor;
mod images;
mod kill;
mod layers;
mod neighbour;
mod qemu;
mod ram;
mod recipe;
mod run;
mod scenario;
mod setup;
mod sh;
mod source;
mod structures;
mod symbols;
mod test;
mod tidy;
mod xen;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Builds, boots, tests and audits Xenolith.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say which tools are there, which are missing, and the line that installs each
    Doctor(doctor::Args),
    /// Install what is missing (as root), or print the exact lines
    Setup(setup::Args),
    /// Build the hypervisor, dom0 and all guest images
    Build(build::Args),
    /// Boot Xenolith with dom0 in QEMU: the terminal becomes dom0's shell
    Run(run::Args),
    /// Ask dom0 of a running `cargo xtask run` something, or follow what happens there
    Ctl(ctl::Args),
    /// Run every test: format, lints, tidiness, host tests, audit, and the scenarios in QEMU
    Test(test::Args),
    /// Check house rules that the compiler does not know
    Tidy(tidy::Args),
    /// Write the reference pages of the ABI from its tables
    Docs(docs::Args),
    /// Disassemble the images for what must not be in them; report sizes, lines and unsafe
    Audit(audit::Args),
    /// Run the conformance cases on Xenolith and on real Xen, as dom0 and as unprivileged domain
    Conformance(conformance::Args),
    /// Kill QEMU again and again while a guest writes to its disks, and look for what is lost
    Kill(kill::Args),
    /// Measure what operations cost on Xenolith and on real Xen, in instructions
    Bench(bench::Args),
    /// Measure what disk requests and packets cost from end to end, and who executes it: guests, hypervisor, dom0
    Layers(layers::Args),
    /// Boot any 64-bit PV ELF kernel as dom0 of Xenolith, or of Debian's Xen
    Boot(boot::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Doctor(args) => doctor::main(args),
        Command::Setup(args) => setup::main(args),
        Command::Build(args) => build::main(args),
        Command::Run(args) => run::main(args),
        Command::Ctl(args) => ctl::main(args),
        Command::Test(args) => test::main(args),
        Command::Tidy(args) => tidy::main(args),
        Command::Docs(args) => docs::main(args),
        Command::Audit(args) => audit::main(args),
        Command::Conformance(args) => conformance::main(args),
        Command::Kill(args) => kill::main(args),
        Command::Bench(args) => bench::main(args),
        Command::Layers(args) => layers::main(args),
        Command::Boot(args) => boot::main(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_reference_is_complete() -> anyhow::Result<()> {
        let page = String::from_utf8(sh::read(&sh::root().join("docs/book/src/commands.md"))?)?;
        let cli = Cli::command();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            let title = format!("\n## {}\n", command.get_name());
            assert!(page.contains(&title), "commands.md has no section {title:?}");
            for option in command.get_opts().filter_map(|option| option.get_long()) {
                assert!(page.contains(&format!("`--{option}")), "commands.md does not name --{option}");
            }
        }
        Ok(())
    }
}

//! From dom0's first task to the end of the machine.
//!
//! dom0's module is the boot archive: guest images, descriptions, and perhaps `etc/exec`, commands to run instead of waiting
//! for somebody at the keyboard; `etc/start`, commands to run before that, and `etc/motd`, what to tell who comes.

use crate::archive::Archive;
use crate::description::{self, Description};
use crate::guests::{Follow, Then};
use crate::shell::Shell;
use crate::terminal::Keys;
use crate::units::count;
use crate::{backend, devices, guests, management, say, shell};
use alloc::vec::Vec;
use guest_sdk::{CommandLine, Domain, executor, shutdown};

/// Commands to run, one a line.
const EXEC: &str = "etc/exec";
/// Commands to run before somebody may type any.
const START: &str = "etc/start";
/// A greeting.
const GREETING: &str = "etc/motd";

/// dom0, from its first task to the end of the machine.
pub async fn run(domain: Domain) {
    let archive = Archive::new(domain.module());
    // dom0 runs on one vCPU, and moves others' data.
    let _ = guest_sdk::memory::use_wide_copies();
    backend::init(archive);
    // Each guest takes some ports of ours. What has only the two-level form lets us have fewer guests.
    if let Err(errno) = domain.events.use_fifo() {
        say!("dom0: no FIFO events ({errno}): up to {} ports", guest_sdk::events::highest_port());
    }
    devices::start(&domain.events);
    backend::start_network(devices::cards());
    management::start(archive);
    executor::spawn(guests::watch(domain.events));
    let mut shell = Shell::new(Keys::new(domain.console), archive);
    let failed_starts = autostart(archive).await;
    if let Some(script) = text(archive, EXEC).or_else(|| exec_word(domain.command_line)) {
        let (total, failed) = shell.run_script(script).await;
        if failed > 0 {
            say!("exec: {failed} of {} failed", count(total, "command"));
            shutdown::crash();
        }
        if failed_starts > 0 {
            say!("exec: {} failed to start", count(failed_starts, "guest"));
            shutdown::crash();
        }
        shutdown::poweroff();
    }
    if let Some(script) = text(archive, START) {
        shell.run_script(script).await;
    }
    greet(archive);
    shell.run_interactively().await;
    shutdown::poweroff();
}

/// A file of the boot archive, if it is there.
fn text(archive: Archive<'static>, name: &str) -> Option<&'static str> {
    archive.find(name).map(|bytes| core::str::from_utf8(bytes).unwrap_or(""))
}

/// Commands from the command line: the rest of it behind `exec=`.
fn exec_word(line: CommandLine) -> Option<&'static str> {
    let text = line.text();
    let start = if text.starts_with("exec=") { 0 } else { text.find(" exec=")? + 1 };
    text.get(start + "exec=".len()..)
}

/// Starts the guests whose descriptions ask for it; returns how many could not be started.
async fn autostart(archive: Archive<'static>) -> usize {
    let mut wanted = Vec::new();
    for file in archive.files() {
        match file {
            // A description with mistakes is told of when somebody wants it.
            Ok(file) if file.name.ends_with(".toml") => {
                wanted.extend(Description::parse(file.data).ok().filter(|description| description.autostart));
            }
            Ok(_) => {}
            Err(error) => {
                say!("dom0: {error}");
                break;
            }
        }
    }
    let all = wanted.len();
    let (groups, wrong) = description::start_order(description::groups(wanted));
    let mut failed = all - groups.iter().map(Vec::len).sum::<usize>();
    for circle in wrong {
        say!("dom0: {circle}, so they are not started");
    }
    for group in groups {
        let count = group.len();
        if let Err(error) = shell::start(archive, group, Follow::Off, Then::Run).await {
            failed += count;
            say!("dom0: {error}");
        }
    }
    failed
}

/// Tells a newcomer what to type.
fn greet(archive: Archive<'static>) {
    let alive = guests::all().into_iter().filter(|view| guests::is_alive(&view.name));
    let running: Vec<_> = alive.map(|view| view.name).collect();
    let mut names = running.join(", ");
    if let Some(last) = names.rfind(", ") {
        names.replace_range(last..last + 2, " and ");
    }
    let descriptions =
        archive.files().filter_map(Result::ok).filter(|file| file.name.ends_with(".toml")).count();
    say!("");
    say!(
        "This is dom0 of Xenolith, with {} running and {} in the boot archive.",
        if running.is_empty() { "no guests" } else { &names },
        count(descriptions, "description")
    );
    match running.first() {
        Some(name) => say!(
            "Type `list` to see all domains, `console {name}` to watch one (ctrl-] leaves it), `help` for more."
        ),
        None => say!("Type `images` to see what there is, `create FILE` to start a guest, `help` for more."),
    }
    if let Some(greeting) = text(archive, GREETING) {
        say!("{}", greeting.trim_end());
    }
    say!("");
}

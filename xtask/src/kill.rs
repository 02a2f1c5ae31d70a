//! `cargo xtask kill`: QEMU is killed again and again while a guest writes to its disks, and nothing that a flush was answered for may be
//! missing afterwards.
//!
//! The guest `journal` has a whole disk, a file and a copy-on-write file. Of what it says on its console the last flush of each counts:
//! the next boot is told, and the guest looks. In every second round its back ends are restarted all the while, and some panic.

use crate::archive::Script;
use crate::boot::{self, Boot};
use crate::build::{self, Built};
use crate::images::Workspace;
use crate::qemu::{self, Host, Machine};
use crate::{archive, sh};
use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Args {
    /// How often QEMU is killed
    #[arg(long, default_value_t = 100, value_name = "N")]
    rounds: u32,
    /// Where the moments come from: the same number gives the same ones
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

pub fn main(args: Args) -> Result<ExitCode> {
    qemu::require()?;
    let workspace = Workspace::load()?;
    let built = build::for_run(&workspace)?;
    let summary = rounds(&workspace, &built, args.rounds, args.seed, true)?;
    println!("{summary}");
    Ok(ExitCode::SUCCESS)
}

/// Disks of the guest: a whole one, a file, and a copy-on-write file over what is in the boot archive.
const DISKS: [&str; 3] =
    ["xvda:device:vdb", "xvdb:file:vda/journal.img:1M", "xvdc:overlay:notes.img:vda/journal.cow:1M"];
/// Bytes of the machine's two disks.
const MACHINE_DISKS: [(&str, u64); 2] = [("kill-a.img", 24 << 20), ("kill-b.img", 1 << 20)];
/// Longest time from the first flush to the end.
const LONGEST: Duration = Duration::from_millis(2500);
/// Restarts of back ends in a round: more than there is time for.
const RESTARTS: usize = 400;
/// A boot that says nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a boot said.
struct Said {
    text: String,
    /// It was killed, as it should.
    killed: bool,
}

/// Kills `count` boots, and has the guest look after each.
///
/// # Errors
/// When something is lost, or a boot does not come to where it can be killed.
pub fn rounds(workspace: &Workspace, built: &Built, count: u32, seed: u64, loud: bool) -> Result<String> {
    let folder = workspace.target_dir.join("kill");
    let mut machine = Machine::default();
    for (name, bytes) in MACHINE_DISKS {
        let path = folder.join(name);
        sh::write(&path, &[])?;
        File::options().write(true).open(&path)?.set_len(bytes).context("cannot make a disk")?;
        machine.disks.push(path.display().to_string());
    }
    let bench = Bench { workspace, built, folder, machine };
    let said = bench.boot(&["disk format vda".into()], None)?;
    ensure!(said.text.contains("formatted"), "dom0 does not make a file system:\n{}", said.text);

    let (mut acked, mut random) = (BTreeMap::new(), fastrand::Rng::with_seed(seed));
    let mut flushes = 0;
    for round in 1..=count {
        let delay = LONGEST.mul_f64(random.f64());
        let restarts = round % 2 == 0;
        let said = bench.boot(&recording(&acked, restarts), Some(delay))?;
        let before: u64 = acked.values().sum();
        judge(&said, &mut acked).with_context(|| format!("round {round}, seed {seed}:\n{}", said.text))?;
        flushes += acked.values().sum::<u64>() - before;
        if loud {
            let meanwhile = if restarts { ", back ends restarted" } else { "" };
            println!(
                "round {round}: killed {} ms after the first flush{meanwhile}; {acked:?}",
                delay.as_millis()
            );
        }
    }
    let said = bench.boot(&[format!("run {} timeout=600", journal(&acked, false))], None)?;
    judge(&said, &mut acked).with_context(|| format!("after the last round, seed {seed}:\n{}", said.text))?;
    Ok(format!("killed {count} times, {flushes} entries flushed on {} disks, none lost", DISKS.len()))
}

/// The guest's description, for `run` and `create`.
fn journal(acked: &BTreeMap<u32, u64>, record: bool) -> String {
    let mut words = String::from(if record { "record" } else { "" });
    for (disk, number) in acked {
        words += &format!(" acked-{disk}={number}");
    }
    let disks: String = DISKS.iter().map(|disk| format!(" disk={disk}")).collect();
    format!("journal memory=4M \"cmdline={}\"{disks}", words.trim_start())
}

/// Commands for a guest that records until it is killed; with `restarts` its back ends fail again and again meanwhile.
fn recording(acked: &BTreeMap<u32, u64>, restarts: bool) -> Vec<String> {
    let guest = journal(acked, true);
    if !restarts {
        return vec![format!("run {guest} timeout=600")];
    }
    // All that it says is heard.
    let mut commands = vec![
        format!("create --paused {guest}"),
        "console -f journal".to_owned(),
        "unpause journal".to_owned(),
    ];
    for (number, disk) in ["xvda", "xvdb", "xvdc"].iter().cycle().take(RESTARTS).enumerate() {
        let how = if number % 5 == 4 { "panic" } else { "restart" };
        commands.push(format!("disk {how} journal {disk}"));
        commands.push("sleep 0.15".to_owned());
    }
    commands
}

/// Takes what was flushed from what a boot said.
fn judge(said: &Said, acked: &mut BTreeMap<u32, u64>) -> Result<()> {
    let bad = Regex::new(r"(?m)journal \d+: .*(lost|disk failed|too small).*$|Panic|exec: .*failed")?;
    if let Some(found) = bad.find(&said.text) {
        bail!("{}", found.as_str());
    }
    let begun = Regex::new(r"journal (\d+): boot \d+;")?;
    ensure!(begun.captures_iter(&said.text).count() == DISKS.len(), "not all disks were looked at");
    let flushed = Regex::new(r"journal (\d+): flushed (\d+)\r?\n")?;
    for found in flushed.captures_iter(&said.text) {
        let number = found[2].parse()?;
        let last = acked.entry(found[1].parse()?).or_insert(0);
        ensure!(*last < number, "entry {number} was there before");
        *last = number;
    }
    Ok(())
}

struct Bench<'a> {
    workspace: &'a Workspace,
    built: &'a Built,
    folder: PathBuf,
    machine: Machine,
}

impl Bench<'_> {
    /// Boots with these commands; kills it so long after all disks have had a flush.
    fn boot(&self, commands: &[String], kill: Option<Duration>) -> Result<Said> {
        let mut exec = vec!["destroy consumer".to_owned(), "destroy producer".to_owned()];
        exec.extend_from_slice(commands);
        let dom0 = self.built.dom0.as_deref().context("there is no dom0 image")?;
        let module: PathBuf = self.folder.join("archive.tar");
        sh::write(
            &module,
            &archive::pack(self.workspace, self.built, Script { exec: &exec, ..Script::default() }, &[])?,
        )?;
        let boot = Boot {
            host: Host::Xenolith,
            hypervisor: &self.built.hypervisor,
            kernel: &build::stripped(self.workspace, dom0)?,
            module: Some(&module),
            words: "",
            cmdline: "",
            joined: &self.folder.join("module"),
        };
        let said = watch(boot::command(&self.machine, &boot)?, kill)?;
        sh::write(&self.folder.join("log"), said.text.as_bytes())?;
        if kill.is_some() != said.killed {
            bail!("it ended by itself:\n{}", said.text);
        }
        Ok(said)
    }
}

/// Reads what QEMU says, and kills it so long after the first flush of each disk: at once, without a chance to write anything.
fn watch(mut qemu: Command, kill: Option<Duration>) -> Result<Said> {
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = qemu.spawn().context("cannot start QEMU (`cargo xtask setup` installs it)")?;
    let mut output = child.stdout.take().context("QEMU's output")?;
    let (sender, bytes) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let (mut seen, mut when): (Vec<u8>, Option<Instant>) = (Vec::new(), None);
    let mut killed = false;
    loop {
        let left = when.map_or(PATIENCE, |when| when.saturating_duration_since(Instant::now()));
        match bytes.recv_timeout(left) {
            Ok(chunk) => seen.extend_from_slice(&chunk),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if killed => break,
            Err(RecvTimeoutError::Timeout) => {
                // SIGKILL.
                child.kill().context("cannot kill QEMU")?;
                if when.is_none() {
                    let _ = child.wait();
                    bail!(
                        "it said nothing for {} s:\n{}",
                        PATIENCE.as_secs(),
                        String::from_utf8_lossy(&seen)
                    );
                }
                killed = true;
                // What it had said before.
                when = Some(Instant::now() + Duration::from_secs(5));
            }
        }
        if let (Some(delay), None) = (kill, when) {
            let text = String::from_utf8_lossy(&seen);
            let first = |disk: &str| text.contains(&format!("journal {disk}: flushed"));
            if ["51712", "51728", "51744"].into_iter().all(first) {
                when = Some(Instant::now() + delay);
            }
        }
    }
    child.wait().context("cannot wait for QEMU")?;
    let _ = reader.join();
    Ok(Said { text: String::from_utf8_lossy(&seen).into_owned(), killed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Said {
        Said { text: text.to_owned(), killed: true }
    }

    #[test]
    fn only_whole_lines_are_acknowledgements() -> Result<()> {
        let all =
            "journal 51712: boot 1; entry 0 was \"\"\njournal 51728: boot 1; x\njournal 51744: boot 1; x\n";
        let mut acked = BTreeMap::new();
        judge(&said(&format!("{all}journal 51712: flushed 5\r\njournal 51712: flushed 10")), &mut acked)?;
        assert_eq!(acked, BTreeMap::from([(51712, 5)]));
        assert!(
            judge(&said(&format!("{all}journal 51712: flushed 5\n")), &mut acked).is_err(),
            "it goes back"
        );
        assert!(judge(&said("journal 51712: boot 1; x\n"), &mut acked).is_err(), "two disks are missing");
        let lost = format!("{all}journal 51728: 2 of the flushed entries 1 to 9 are lost: [8, 9]\n");
        assert!(judge(&said(&lost), &mut acked).unwrap_err().to_string().contains("lost"));
        assert!(journal(&acked, true).contains("\"cmdline=record acked-51712=5\" disk=xvda:device:vdb "));
        assert!(recording(&acked, true).contains(&"disk panic journal xvdb".to_owned()));
        Ok(())
    }
}

//! Scenarios: what to boot in QEMU, and what must come of it.
//!
//! Each file `tests/scenarios/*.toml` is one; its keys are the fields of [`Scenario`]. A guest package below
//! tests/attacks needs no file: it is booted as dom0 and must say SUCCESS. Keys in its Cargo.toml, under
//! `[package.metadata.scenario]`, change that. The guests below tests/conformance are run by [`crate::conformance`].

use crate::archive::Script;
use crate::boot::{self, Boot};
use crate::build::{self, Built};
use crate::demo::{self, Demo};
use crate::images::{Kind, Workspace};
use crate::neighbour::Neighbour;
use crate::qemu::{self, End, Host, Machine, Step, Watch, Watched};
use crate::{archive, debian, ram, sh, xen};
use anyhow::{Context, Result, bail};
use regex::Regex;
use serde::Deserialize;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Folder of the scenario files.
const FOLDER: &str = "tests/scenarios";

/// One thing to boot, and what to expect.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// File name without `.toml`, or the name of the guest image.
    #[serde(skip)]
    pub name: String,
    /// One sentence: what this shows.
    pub about: String,
    /// Which hypervisors it runs on.
    pub on: Vec<Host>,
    /// Guest image to boot as dom0, by name; without it, our dom0 with its boot archive.
    pub image: Option<String>,
    /// What to do to the image's file before it is booted.
    pub damage: Option<Damage>,
    /// dom0's command line.
    pub cmdline: String,
    /// Words for the hypervisor.
    pub append: String,
    /// dom0's memory; empty leaves it to the hypervisor, on Xen to `cargo xtask run`'s default.
    pub dom0_mem: String,
    /// Memory of the machine.
    pub mem: String,
    /// CPUs of the machine, if it matters how many.
    pub smp: Option<u32>,
    /// Boot the hypervisor that checks itself (debug assertions, the order of locks).
    pub debug: bool,
    /// CPU model, where it is not the default one.
    pub cpu: Option<String>,
    /// How QEMU runs the CPUs, where it is not the usual way: `tcg,thread=single` is one after the other.
    pub accel: Option<String>,
    /// Whether the clock counts instructions.
    pub icount: bool,
    /// Disks of dom0's, made for this run.
    pub disks: Vec<DiskFile>,
    /// More options for each disk's device.
    pub disk_options: String,
    /// A network card of dom0's, as for `cargo xtask run --net`.
    pub net: Option<String>,
    /// What `etc/network.toml` says instead of ours.
    pub network: String,
    /// A page that this host serves to guests at 10.0.2.2; `{serve}` in `exec` stands for its port.
    pub serve: String,
    /// Paths of a guest's page that this host visits in this order, by the port that `{visit}` in `net` stands for. What came is behind the
    /// output, as `visit PATH: STATUS: BODY`.
    pub visit: Vec<String>,
    /// More words for QEMU.
    pub qemu_args: Vec<String>,
    /// Commands for dom0's shell.
    pub exec: Vec<String>,
    /// Whether it is what `cargo xtask run` shows to whoever says nothing else, with a disk made for this run.
    pub demo: bool,
    /// How often the machine is booted, with the disks as the boot before has left them.
    pub boots: u32,
    /// Kernels of Debian's, as guests in dom0's boot archive.
    pub kernels: Vec<PackagedKernel>,
    /// What to type, and when.
    pub keys: Vec<Keys>,
    /// Seconds until QEMU is stopped.
    pub timeout: u64,
    /// Left out by `--quick`.
    pub slow: bool,
    /// Oldest QEMU that can do it, and why.
    pub needs_qemu: Option<NeedsQemu>,
    /// How it must end.
    pub end: End,
    /// What the guest's last line must say; test guests say SUCCESS unless told otherwise.
    pub verdict: Option<Verdict>,
    /// Patterns that must be printed, in this order; those of an array within it in any.
    pub expect: Vec<Expected>,
    /// Patterns that must not be printed.
    pub never: Vec<String>,
    /// Patterns with one group each, which must match at least twice, with the same text in the group each time.
    pub same: Vec<String>,
    /// Numbers that may not grow.
    pub growth: Vec<Growth>,
}

impl Default for Scenario {
    fn default() -> Scenario {
        let machine = Machine::default();
        Scenario {
            name: String::new(),
            about: String::new(),
            on: vec![Host::Xenolith],
            image: None,
            damage: None,
            cmdline: String::new(),
            append: String::new(),
            dom0_mem: String::new(),
            mem: machine.mem,
            smp: None,
            debug: false,
            cpu: None,
            accel: None,
            icount: false,
            disks: Vec::new(),
            disk_options: String::new(),
            network: String::new(),
            net: None,
            serve: String::new(),
            visit: Vec::new(),
            qemu_args: Vec::new(),
            exec: Vec::new(),
            demo: false,
            boots: 1,
            kernels: Vec::new(),
            keys: Vec::new(),
            timeout: 60,
            slow: false,
            needs_qemu: None,
            end: End::Poweroff,
            verdict: None,
            expect: Vec::new(),
            never: Vec::new(),
            same: Vec::new(),
            growth: Vec::new(),
        }
    }
}

/// What must be printed at some place of the order.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Expected {
    /// A pattern.
    One(String),
    /// Patterns that things which run side by side print, each behind what was expected before all of them.
    AnyOrder(Vec<String>),
}

impl Expected {
    fn patterns(&self) -> &[String] {
        match self {
            Self::One(pattern) => core::slice::from_ref(pattern),
            Self::AnyOrder(patterns) => patterns,
        }
    }
}

/// A kernel out of a Debian package, with the description that dom0 makes a guest by.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackagedKernel {
    /// Name of the image and of the guest.
    pub name: String,
    /// The package.
    pub package: String,
    /// The file in it, without a slash in front.
    pub file: String,
    /// The guest's memory.
    pub memory: String,
}

impl PackagedKernel {
    /// The image and the description, as files below `dir`.
    fn files(&self, workspace: &Workspace, dir: &Path) -> Result<[PathBuf; 2]> {
        let packaged = debian::file(&workspace.target_dir, &self.package, &self.file)?;
        let Self { name, memory, .. } = self;
        let (image, description) = (dir.join(name), dir.join(format!("{name}.toml")));
        sh::write(&image, &sh::read(&packaged)?)?;
        let text = format!("name = {name:?}\nimage = {name:?}\nmemory = {memory:?}\n");
        sh::write(&description, text.as_bytes())?;
        Ok([image, description])
    }
}

/// A file that is a disk of dom0's: sector N begins with the line `sector N of NAME`, and the rest of it is the byte N.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// Its name.
    pub name: String,
    /// How many sectors of 512 bytes it has.
    pub sectors: u64,
    /// Whether dom0 may only read it.
    #[serde(default)]
    pub readonly: bool,
    /// Files of so many bytes: then the disk has a partition table of one FAT partition with these in it, all made as a user does, with
    /// `sfdisk`, `mkfs.vfat` and mtools (fetched from Debian). Sector N of a file begins with the line `sector N of PATH`.
    #[serde(default)]
    pub files: Vec<(String, usize)>,
    /// What sectors must begin with in the file once the run is over: their numbers, and text.
    #[serde(default)]
    pub after: Vec<(u64, String)>,
}

/// Where the partition of a disk with files begins: 1 MiB, as tools have it.
const PARTITION_SECTOR: u64 = 2048;

/// Bytes of a sector.
const SECTOR: usize = 512;

/// So many bytes by which each sector is known.
fn pattern(name: &str, bytes: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for sector in 0..bytes.div_ceil(SECTOR) {
        all.extend_from_slice(format!("sector {sector} of {name}\n").as_bytes());
        all.resize((sector + 1) * SECTOR, sector as u8);
    }
    all.truncate(bytes);
    all
}

impl DiskFile {
    fn path(&self, scratch: &Path) -> PathBuf {
        scratch.with_extension(format!("{}.img", self.name))
    }

    /// Writes it anew; gives its [word](DiskFile::word).
    fn make(&self, scratch: &Path, target_dir: &Path) -> Result<String> {
        let path = self.path(scratch);
        if self.files.is_empty() {
            sh::write(&path, &pattern(&self.name, usize::try_from(self.sectors)? * SECTOR))?;
        } else {
            self.make_file_system(&path, target_dir)?;
        }
        Ok(self.word(scratch))
    }

    /// How QEMU's machine gets it.
    fn word(&self, scratch: &Path) -> String {
        format!("{}{}", self.path(scratch).display(), if self.readonly { ":ro" } else { "" })
    }

    /// Makes a partition with a file system, and fills it.
    fn make_file_system(&self, path: &Path, target_dir: &Path) -> Result<()> {
        let tool = |package, file| debian::file(target_dir, package, file);
        let sectors = self.sectors.checked_sub(PARTITION_SECTOR).context("a disk with files is too small")?;
        sh::write(path, &[])?;
        let disk = File::options().write(true).open(path)?;
        disk.set_len(self.sectors * SECTOR as u64).context("cannot make a disk")?;
        let table = path.with_extension("table");
        sh::write(&table, format!("label: dos\nstart={PARTITION_SECTOR}, type=c\n").as_bytes())?;
        let mut sfdisk = Command::new(tool("fdisk", "sbin/sfdisk")?);
        sh::run(sfdisk.args(["--quiet", "--no-reread"]).arg(path).stdin(File::open(&table)?))?;
        let mut mkfs = Command::new(tool("dosfstools", "sbin/mkfs.fat")?);
        // In KiB; the name of the partition's file system is what people give it.
        mkfs.args(["-n", "GUESTS", "--offset", &PARTITION_SECTOR.to_string()]).arg(path);
        sh::run(mkfs.arg((sectors / 2).to_string()))?;
        let image = format!("{}@@{}", path.display(), PARTITION_SECTOR * SECTOR as u64);
        let mtools = |command: &str| -> Result<Command> {
            let mut program = Command::new(tool("mtools", "usr/bin/mtools")?);
            program.args(["-c", command, "-i", &image]).env("MTOOLS_SKIP_CHECK", "1");
            Ok(program)
        };
        let content = path.with_extension("content");
        let mut made: Vec<&str> = Vec::new();
        for (name, bytes) in &self.files {
            if let Some((directory, _)) = name.rsplit_once('/')
                && !made.contains(&directory)
            {
                sh::run(mtools("mmd")?.arg(format!("::{directory}")))?;
                made.push(directory);
            }
            sh::write(&content, &pattern(name, *bytes))?;
            sh::run(mtools("mcopy")?.arg(&content).arg(format!("::{name}")))?;
        }
        Ok(())
    }

    /// What is not in it that should be, and what is wrong with its file system.
    fn missing(&self, scratch: &Path, target_dir: &Path) -> Result<String> {
        let path = self.path(scratch);
        let bytes = sh::read(&path)?;
        let mut missing = String::new();
        if !self.files.is_empty() {
            let partition = path.with_extension("partition");
            let start = usize::try_from(PARTITION_SECTOR)? * SECTOR;
            sh::write(&partition, bytes.get(start..).unwrap_or_default())?;
            let mut fsck = Command::new(debian::file(target_dir, "dosfstools", "sbin/fsck.fat")?);
            let checked = fsck.arg("-n").arg(&partition).output().context("cannot run fsck.fat")?;
            if !checked.status.success() {
                let found = String::from_utf8_lossy(&checked.stdout);
                _ = writeln!(missing, "the file system of disk {} is damaged: {found}", self.name);
            }
        }
        for (sector, text) in &self.after {
            let start = usize::try_from(*sector)?.saturating_mul(SECTOR);
            let found = bytes.get(start..start.saturating_add(text.len())).unwrap_or_default();
            if found != text.as_bytes() {
                let found = String::from_utf8_lossy(found);
                _ = writeln!(
                    missing,
                    "sector {sector} of disk {} begins with {found:?}, not {text:?}",
                    self.name
                );
            }
        }
        Ok(missing)
    }
}

/// How to spoil an image's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub struct Damage {
    /// Keep only this many bytes.
    pub keep: Option<usize>,
    /// Bytes to change: offset in the file, new value.
    pub poke: Vec<(usize, u8)>,
    /// Replace each occurrence of the first text by the second, of the same length.
    pub replace: Option<(String, String)>,
}

/// Text to type once a pattern was printed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    /// Pattern to wait for, from where the one before it matched on.
    pub wait: String,
    /// What to type.
    pub send: String,
    /// Send it over dom0's management channel instead, whose own lines are printed behind `ctl: `.
    #[serde(default)]
    pub channel: bool,
}

/// A number that is printed many times and may not grow.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Growth {
    /// A pattern with one group, the number.
    pub pattern: String,
    /// How often it matches.
    pub count: usize,
    /// The most that the median of the last numbers is of the median of the first ones, which begin with the second.
    pub most: f64,
}

/// Numbers at either end of which there is a median.
const GROWTH_ENDS: usize = 7;

impl Growth {
    /// What is wrong with these numbers.
    fn judge(&self, numbers: &[f64]) -> Option<String> {
        let Self { pattern, count, most } = self;
        if numbers.len() != *count {
            return Some(format!("`{pattern}` was printed {} times, not {count}", numbers.len()));
        }
        // What the very first pays for is there for all others.
        let (first, last) = (numbers.get(1..=GROWTH_ENDS)?, numbers.get(count - GROWTH_ENDS..)?);
        let median = |numbers: &[f64]| {
            let mut numbers = numbers.to_vec();
            numbers.sort_by(f64::total_cmp);
            numbers[GROWTH_ENDS / 2]
        };
        let (first, last) = (median(first), median(last));
        (last > first * most).then(|| {
            let grown = last / first;
            format!("`{pattern}` grew from {first} to {last}: {grown:.2} times, and {most} are allowed")
        })
    }
}

/// A version of QEMU that a scenario needs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeedsQemu {
    /// Its major version.
    pub version: u32,
    /// The bug of older ones.
    pub because: String,
}

/// What a test guest says of itself on its last line, as XTF's guests do: `Test result: SUCCESS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All is as it should be.
    #[serde(alias = "SUCCESS")]
    Success,
    /// The guest cannot test this here.
    #[serde(alias = "SKIP")]
    Skip,
    /// The guest could not do its test.
    #[serde(alias = "ERROR")]
    Error,
    /// The tested thing is wrong.
    #[serde(alias = "FAILURE")]
    Failure,
}

/// What came of a run.
#[derive(Debug)]
pub enum Outcome {
    /// As expected.
    Passed,
    /// Not as expected: why.
    Failed(String),
    /// Not run, or the guest declined: why.
    Skipped(String),
}

/// A run, finished.
pub struct Report {
    /// The judgement.
    pub outcome: Outcome,
    /// Passed, failed and skipped cases inside of the guest, when it counted them.
    pub cases: Option<[usize; 3]>,
    /// What was printed.
    pub text: String,
    /// The line that repeats it.
    pub line: String,
    /// How long it took.
    pub took: Duration,
}

/// All scenarios, each once for every hypervisor that it runs on.
///
/// # Errors
/// When a file has a mistake; the message names it.
pub fn all(workspace: &Workspace) -> Result<Vec<(Host, Scenario)>> {
    let mut scenarios = Vec::new();
    let folder = sh::root().join(FOLDER);
    if folder.is_dir() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot list {FOLDER}"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == "toml") {
                scenarios.push(load(&path)?);
            }
        }
    }
    for image in &workspace.guests {
        let is_used = scenarios.iter().any(|scenario: &Scenario| scenario.uses(&image.name));
        if image.kind != Kind::Scenario || is_used {
            continue;
        }
        let mut scenario = match &image.scenario {
            Some(keys) => Scenario::deserialize(keys).with_context(|| {
                format!("Cargo.toml of package {}: [package.metadata.scenario]", image.package)
            })?,
            None => Scenario::default(),
        };
        scenario.name.clone_from(&image.name);
        scenario.image = Some(image.name.clone());
        scenario.verdict = scenario.verdict.or(Some(Verdict::Success));
        scenarios.push(scenario);
    }
    scenarios.sort_by(|a, b| a.name.cmp(&b.name));
    let runs = |scenario: Scenario| scenario.on.clone().into_iter().map(move |host| (host, scenario.clone()));
    let mut all: Vec<(Host, Scenario)> = scenarios.into_iter().flat_map(runs).collect();
    all.sort_by_key(|(host, _)| *host == Host::Xen);
    Ok(all)
}

fn load(path: &Path) -> Result<Scenario> {
    let name = path.file_stem().context("a scenario has a name")?.to_string_lossy().into_owned();
    let text =
        String::from_utf8(sh::read(path)?).with_context(|| format!("{FOLDER}/{name}.toml: not UTF-8"))?;
    let mut scenario: Scenario = toml::from_str(&text).with_context(|| format!("{FOLDER}/{name}.toml"))?;
    if scenario.about.is_empty() {
        bail!("{FOLDER}/{name}.toml: say in `about = \"…\"` what this scenario shows");
    }
    let patterns = scenario
        .expect
        .iter()
        .flat_map(Expected::patterns)
        .chain(&scenario.never)
        .chain(&scenario.same)
        .chain(scenario.growth.iter().map(|growth| &growth.pattern))
        .chain(scenario.keys.iter().map(|keys| &keys.wait));
    for pattern in patterns {
        regex(pattern).with_context(|| format!("{FOLDER}/{name}.toml"))?;
    }
    if let Some(growth) = scenario.growth.iter().find(|growth| growth.count <= GROWTH_ENDS) {
        bail!("{FOLDER}/{name}.toml: `{}`: {} numbers are too few", growth.pattern, growth.count);
    }
    scenario.name = name;
    Ok(scenario)
}

fn regex(pattern: &str) -> Result<Regex> {
    // A pattern may span no lines unless it says so.
    Regex::new(&format!("(?m){pattern}")).with_context(|| format!("pattern `{pattern}`"))
}

impl Scenario {
    /// Why it cannot be run with what is there, if so.
    pub fn skip(&self, built: &Built, qemu: Option<(u32, u32)>) -> Option<String> {
        if let (Some(need), Some((major, _))) = (&self.needs_qemu, qemu)
            && major < need.version
        {
            return Some(format!("QEMU {major} is too old: {}", need.because));
        }
        if self.image.is_none() && built.dom0.is_none() {
            return Some("there is no dom0 image yet".into());
        }
        None
    }

    /// Boots it and judges what came of it.
    ///
    /// # Errors
    /// When it cannot be run at all: an image is missing, QEMU does not start.
    pub fn run(&self, workspace: &Workspace, built: &Built, host: Host) -> Result<Report> {
        let scratch = workspace.target_dir.join("image/scenarios").join(format!("{host}-{}", self.name));
        let neighbour = Neighbour::start(&self.serve, &self.visit)?;
        let scenario = self.with_ports(neighbour.ports);
        if self.demo {
            // As where nobody has run it before.
            let _ = std::fs::remove_file(demo::disk(&scratch));
        }
        let steps: Vec<Step> = self
            .keys
            .iter()
            .map(|keys| Ok(Step { wait: regex(&keys.wait)?, send: keys.send.clone(), channel: keys.channel }))
            .collect::<Result<_>>()?;
        let timeout = Some(Duration::from_secs(self.timeout));
        let socket = scratch.with_extension("sock");
        let channel = self.listens().then_some(socket.as_path());
        let (mut line, mut watched) = (String::new(), None::<Watched>);
        for boot in 0..self.boots {
            let qemu = scenario.command(workspace, built, host, &scratch, boot == 0)?;
            line = sh::line(&qemu);
            let how = Watch { host, timeout, quiet: true, steps: &steps, channel };
            let mut next = qemu::watch(qemu, &how)?;
            if let Some(before) = watched {
                (next.text, next.took) = (before.text + &next.text, before.took + next.took);
            }
            let ended = next.end == self.end;
            watched = Some(next);
            if !ended {
                break;
            }
        }
        let mut watched = watched.with_context(|| format!("{FOLDER}/{}.toml: boots = 0", self.name))?;
        watched.text += &neighbour.leave();
        sh::write(&scratch.with_extension("log"), watched.text.as_bytes())?;
        let (mut outcome, cases) = self.judge(&watched.text, watched.end);
        for disk in &self.disks {
            let missing = disk.missing(&scratch, &workspace.target_dir)?;
            if !missing.is_empty() {
                let before = if let Outcome::Failed(why) = &outcome { why.as_str() } else { "" };
                outcome = Outcome::Failed(format!("{before}{missing}"));
            }
        }
        Ok(Report { outcome, cases, text: watched.text, line, took: watched.took })
    }

    /// The same, with the ports that this host has for it.
    fn with_ports(&self, (serve, visit): (u16, u16)) -> Scenario {
        let mut scenario = self.clone();
        for command in &mut scenario.exec {
            *command = command.replace("{serve}", &serve.to_string());
        }
        scenario.net = scenario.net.map(|net| net.replace("{visit}", &visit.to_string()));
        scenario
    }

    /// The port of this host that leads to the card of dom0's.
    fn web_port(&self) -> Option<u16> {
        let (_, ports) = self.net.as_ref()?.split_once("tcp:")?;
        ports.split_once('-')?.0.parse().ok()
    }

    /// Whether it boots an image, or has dom0 run it as a guest.
    fn uses(&self, image: &str) -> bool {
        let runs = |command: &String| command.split_whitespace().any(|word| word == image);
        self.image.as_deref() == Some(image) || self.exec.iter().any(runs)
    }

    /// Whether it uses dom0's management channel.
    fn listens(&self) -> bool {
        self.keys.iter().any(|keys| keys.channel)
    }

    fn command(
        &self,
        workspace: &Workspace,
        built: &Built,
        host: Host,
        scratch: &Path,
        first: bool,
    ) -> Result<std::process::Command> {
        let disk = |disk: &DiskFile| {
            if first { disk.make(scratch, &workspace.target_dir) } else { Ok(disk.word(scratch)) }
        };
        let mut machine = Machine {
            mem: self.mem.clone(),
            smp: self.smp,
            icount: self.icount,
            disks: self.disks.iter().map(disk).collect::<Result<_>>()?,
            disk_options: self.disk_options.clone(),
            net: self.net.clone(),
            ram: ram::garbage(&workspace.target_dir, &self.mem)?,
            channel: self.listens().then(|| scratch.with_extension("sock")),
            qemu_args: self.qemu_args.clone(),
            ..Machine::default()
        };
        if let Some(accel) = &self.accel {
            machine.accel.clone_from(accel);
        }
        if let Some(cpu) = &self.cpu {
            machine.cpu.clone_from(cpu);
        }
        let mut words = self.append.clone();
        let mut module = None;
        let kernel = match &self.image {
            Some(image) => {
                // Xen gives dom0 all memory unless told otherwise; the same guest gets the same on both.
                let mem = if self.dom0_mem.is_empty() { "128M" } else { &self.dom0_mem };
                words = format!("dom0_mem={mem} {words}");
                let path =
                    built.guests.get(image).with_context(|| format!("no guest image is called `{image}`"))?;
                build::stripped(workspace, path)?
            }
            None => {
                if !self.dom0_mem.is_empty() {
                    words = format!("dom0_mem={} {words}", self.dom0_mem);
                }
                words = boot::with_room_for_guests(host, &words);
                let path = scratch.with_extension("tar");
                let kernels = self.kernels.iter().map(|kernel| kernel.files(workspace, scratch));
                let mut added = kernels.collect::<Result<Vec<_>>>()?.concat();
                if !self.network.is_empty() {
                    // Its name says what it is.
                    std::fs::create_dir_all(scratch)
                        .with_context(|| format!("cannot make {}", scratch.display()))?;
                    let network = scratch.join(archive::NETWORK);
                    sh::write(&network, self.network.as_bytes())?;
                    added.push(network);
                }
                let disk = demo::disk(scratch);
                let demo = if self.demo { Some(Demo::new(Some(&disk), self.web_port())?) } else { None };
                let mut script = Script { exec: &self.exec, ..Script::default() };
                if let Some(demo) = &demo {
                    machine.disks.push(disk.display().to_string());
                    (script.start, script.greeting) = (&demo.start, &demo.greeting);
                }
                sh::write(&path, &archive::pack(workspace, built, script, &added)?)?;
                module = Some(path);
                build::stripped(workspace, built.dom0.as_deref().context("there is no dom0 image")?)?
            }
        };
        let kernel = match &self.damage {
            Some(damage) => damage.apply(&kernel, &scratch.with_extension("elf"))?,
            None => kernel,
        };
        let hypervisor = match host {
            Host::Xenolith if self.debug => {
                built.debug.clone().context("the debug build of the hypervisor was not made")?
            }
            Host::Xenolith => built.hypervisor.clone(),
            Host::Xen => xen::image(&workspace.target_dir)?,
        };
        boot::command(
            &machine,
            &Boot {
                host,
                hypervisor: &hypervisor,
                kernel: &kernel,
                module: module.as_deref(),
                words: words.trim(),
                cmdline: &self.cmdline,
                joined: &scratch.with_extension("module"),
            },
        )
    }

    fn judge(&self, text: &str, end: End) -> (Outcome, Option<[usize; 3]>) {
        let cases = counts(text);
        let found = verdict(text);
        let mut wrong = String::new();
        if let Some(wanted) = self.verdict {
            match found {
                Some(Verdict::Skip) if wanted == Verdict::Success && end == End::Poweroff => {
                    return (Outcome::Skipped("the guest says it cannot test this here".into()), cases);
                }
                Some(found) if found == wanted => {}
                Some(found) => _ = writeln!(wrong, "the guest's verdict is {found:?}, not {wanted:?}"),
                None => wrong
                    .push_str("the guest gave no verdict (no line `Test result: …`): it crashed or hung\n"),
            }
        }
        if end != self.end {
            _ = writeln!(wrong, "{end} (expected: {})", self.end);
        }
        let mut rest = text;
        'order: for expected in &self.expect {
            let mut behind = 0;
            for pattern in expected.patterns() {
                // Patterns were compiled once already, when the file was read.
                let Ok(regex) = regex(pattern) else { continue };
                let Some(found) = regex.find(rest) else {
                    let known =
                        if regex.is_match(text) { "; it is there, but not in this order" } else { "" };
                    _ = writeln!(wrong, "not printed: `{pattern}`{known}");
                    break 'order;
                };
                behind = behind.max(found.end());
            }
            rest = rest.get(behind..).unwrap_or_default();
        }
        for pattern in &self.never {
            if let Some(found) = regex(pattern).ok().and_then(|regex| regex.find(text)) {
                _ = writeln!(wrong, "printed, but must not be: `{}` (pattern `{pattern}`)", found.as_str());
            }
        }
        for pattern in &self.same {
            let Ok(regex) = regex(pattern) else { continue };
            let found: Vec<&str> =
                regex.captures_iter(text).filter_map(|found| Some(found.get(1)?.as_str())).collect();
            if found.len() < 2 || found.windows(2).any(|pair| pair.first() != pair.last()) {
                _ = writeln!(wrong, "should be the same each time: `{pattern}` found {found:?}");
            }
        }
        for growth in &self.growth {
            let Ok(regex) = regex(&growth.pattern) else { continue };
            let numbers: Vec<f64> =
                regex.captures_iter(text).filter_map(|found| found.get(1)?.as_str().parse().ok()).collect();
            if let Some(why) = growth.judge(&numbers) {
                _ = writeln!(wrong, "{why}");
            }
        }
        if wrong.is_empty() { (Outcome::Passed, cases) } else { (Outcome::Failed(wrong), cases) }
    }
}

impl Damage {
    fn apply(&self, image: &Path, out: &Path) -> Result<PathBuf> {
        let mut bytes = sh::read(image)?;
        if let Some(keep) = self.keep {
            bytes.truncate(keep);
        }
        for (place, value) in &self.poke {
            *bytes.get_mut(*place).with_context(|| format!("poke at {place}: the image is shorter"))? =
                *value;
        }
        if let Some((from, to)) = &self.replace {
            if from.len() != to.len() || from.is_empty() {
                bail!("replace: `{from}` and `{to}` must have the same length");
            }
            let mut found = 0;
            for place in 0..bytes.len().saturating_sub(from.len()) {
                if bytes.get(place..place + from.len()) == Some(from.as_bytes()) {
                    bytes.splice(place..place + from.len(), to.bytes());
                    found += 1;
                }
            }
            if found == 0 {
                bail!("replace: `{from}` is not in the image");
            }
        }
        sh::write(out, &bytes)?;
        Ok(out.to_path_buf())
    }
}

/// The last verdict in a guest's output.
fn verdict(text: &str) -> Option<Verdict> {
    let regex = Regex::new(r"(?m)^(?:\(\w+\) )?Test result: (SUCCESS|SKIP|ERROR|FAILURE)\s*$").ok()?;
    let last = regex.captures_iter(text).last()?;
    match last.get(1)?.as_str() {
        "SUCCESS" => Some(Verdict::Success),
        "SKIP" => Some(Verdict::Skip),
        "ERROR" => Some(Verdict::Error),
        _ => Some(Verdict::Failure),
    }
}

/// The last line in which a guest counts its cases: passed, failed, skipped.
pub fn counts(text: &str) -> Option<[usize; 3]> {
    let regex = Regex::new(r"(?m)^(\d+) passed, (\d+) failed, (\d+) skipped\s*$").ok()?;
    let last = regex.captures_iter(text).last()?;
    let number = |i| last.get(i)?.as_str().parse().ok();
    Some([number(1)?, number(2)?, number(3)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(scenario: &Scenario, text: &str, end: End) -> String {
        match scenario.judge(text, end).0 {
            Outcome::Passed => "passed".into(),
            Outcome::Skipped(_) => "skipped".into(),
            Outcome::Failed(why) => why,
        }
    }

    #[test]
    fn a_verdict_is_the_last_line_that_gives_one() {
        assert_eq!(verdict("Test result: FAILURE\nx\nTest result: SUCCESS\n"), Some(Verdict::Success));
        assert_eq!(verdict("no Test result: SUCCESS here\n"), None);
        assert_eq!(counts("3 passed, 1 failed, 2 skipped\n"), Some([3, 1, 2]));
    }

    #[test]
    fn crash_failure_error_and_skip_stay_apart() {
        let scenario = Scenario { verdict: Some(Verdict::Success), ..Scenario::default() };
        assert_eq!(judge(&scenario, "Test result: SUCCESS\n", End::Poweroff), "passed");
        assert_eq!(judge(&scenario, "Test result: SKIP\n", End::Poweroff), "skipped");
        assert!(judge(&scenario, "Test result: ERROR\n", End::Poweroff).contains("Error"));
        assert!(judge(&scenario, "Test result: FAILURE\n", End::Poweroff).contains("Failure"));
        let crash = judge(&scenario, "hello\n", End::Crash);
        assert!(crash.contains("no verdict") && crash.contains("dom0 crashed"), "{crash}");
        assert!(judge(&scenario, "Test result: SUCCESS\n", End::Crash).contains("dom0 crashed"));
    }

    #[test]
    fn patterns_hold_in_order_and_forbidden_ones_are_named() {
        let mut scenario: Scenario =
            toml::from_str("about = ''\nexpect = ['^a', 'b$', ['c', 'd'], 'e']").unwrap();
        assert_eq!(judge(&scenario, "a\nb\nc\nd\ne\n", End::Poweroff), "passed");
        assert_eq!(judge(&scenario, "a\nb\nd\nc\ne\n", End::Poweroff), "passed");
        assert!(judge(&scenario, "b\na\nc\nd\ne\n", End::Poweroff).contains("not in this order"));
        assert!(judge(&scenario, "a\nc\nb\nd\ne\n", End::Poweroff).contains("`c`; it is there"));
        assert!(judge(&scenario, "a\nb\nc\ne\nd\n", End::Poweroff).contains("`e`; it is there"));
        scenario.expect.truncate(2);
        scenario.never = vec!["lea+k".into()];
        assert!(judge(&scenario, "a\nb\nleaak\n", End::Poweroff).contains("`leaak`"));
    }

    #[test]
    fn what_may_not_grow_is_compared_at_its_ends() {
        let growth = Growth { pattern: "cost (\\d+)".into(), count: 20, most: 1.2 };
        let scenario = Scenario { growth: vec![growth], ..Scenario::default() };
        let text =
            |cost: fn(u32) -> u32| -> String { (0..20).map(|n| format!("cost {}\n", cost(n))).collect() };
        // The first is dear, and one in the middle.
        let flat = text(|n| if matches!(n, 0 | 11) { 900 } else { 100 + n % 3 });
        assert_eq!(judge(&scenario, &flat, End::Poweroff), "passed");
        assert!(judge(&scenario, &text(|n| 100 + 3 * n), End::Poweroff).contains("from 112 to 148"));
        assert!(judge(&scenario, "cost 1\n", End::Poweroff).contains("1 times, not 20"));
    }

    #[test]
    fn what_should_be_the_same_is_compared() {
        let scenario = Scenario { same: vec![r"free (\d+)".into()], ..Scenario::default() };
        assert_eq!(judge(&scenario, "free 5\nfree 5\n", End::Poweroff), "passed");
        assert!(judge(&scenario, "free 5\nfree 4\n", End::Poweroff).contains(r#"["5", "4"]"#));
        assert!(judge(&scenario, "free 5\n", End::Poweroff).contains("same"), "once is no comparison");
    }

    #[test]
    fn a_disk_is_looked_at_after_the_run() -> Result<()> {
        let scratch = std::env::temp_dir().join(format!("xtask-disk-{}", std::process::id()));
        let text = "name = 'a'\nsectors = 3\nreadonly = true\nafter = [[2, \"sector 2 of a\\n\x02\"]]";
        let mut disk: DiskFile = toml::from_str(&text.replace('\x02', "\\u0002"))?;
        assert!(disk.make(&scratch, Path::new(""))?.ends_with(".a.img:ro"));
        assert_eq!(sh::read(&disk.path(&scratch))?.len(), 3 * SECTOR);
        assert_eq!(disk.missing(&scratch, Path::new(""))?, "");
        disk.after = vec![(1, "sector 2".into()), (9, "x".into())];
        let missing = disk.missing(&scratch, Path::new(""))?;
        assert!(
            missing.contains("sector 1 of disk a begins with \"sector 1\"") && missing.contains("sector 9")
        );
        Ok(std::fs::remove_file(disk.path(&scratch))?)
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(toml::from_str::<Scenario>("abuot = 'x'").is_err());
        let good = "about = 'x'\non = ['xen']\nend = 'crash'\ndamage = { keep = 3, poke = [[4, 1]] }\n\
                    [[keys]]\nwait = 'a'\nsend = \"b\\n\"\n";
        assert!(toml::from_str::<Scenario>(good).is_ok());
    }
}

//! `cargo xtask conformance`: the cases of tests/conformance on Xenolith and on real Xen, as dom0 and as an unprivileged
//! domain, and what they have to say side by side.
//!
//! As dom0 each image is a boot of its own. As unprivileged domains all images run in one boot, one after another, made by
//! the shell of our dom0 from a list of commands ([`guests`]); what they print is read back from there ([`parse`]). A case that
//! ends its domain costs another boot for those behind it. [`differences`] compares the hypervisors, [`report`] prints, and
//! [`vacuity`] shows that no case passes on a hypervisor that does nothing.

mod differences;
mod guests;
mod parse;
mod report;
mod vacuity;

use crate::build::{self, Built};
use crate::images::{Image, Kind, Workspace};
use crate::qemu::{self, Host, Machine, Watch};
use crate::{boot, sh, xen};
use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Memory of an image that is dom0.
const DOM0_MEM: &str = "128M";
/// Seconds for one boot.
const TIMEOUT: u64 = 180;
/// Longest list of cases on a command line; Xen gives a guest 1023 bytes in all.
const LONGEST_LIST: usize = 900;

/// Exit code: 0 all as it should be, 1 a case or a difference is wrong, 2 wrong arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Only cases whose name, IMAGE::CASE, contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Who runs the cases; with `both`, differences that are not listed fail
    #[arg(long, value_enum, default_value_t = On::Xenolith, value_name = "HYPERVISOR")]
    on: On,
    /// What the images run as
    #[arg(long = "as", value_enum, default_value_t = As::Both, value_name = "ROLE")]
    role: As,
    /// Write the results as JSON; `-` is stdout, and the table goes to stderr then
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Instead, run each case on a build of Xenolith that answers 0, then -ENOSYS, to everything: none may pass
    #[arg(long)]
    vacuity: bool,
    /// Run them on the build of Xenolith that checks itself (debug assertions, the order of locks)
    #[arg(long, conflicts_with = "vacuity")]
    debug: bool,
    /// Only list the cases
    #[arg(long)]
    list: bool,
    /// CPUs of the machine; an image may want more
    #[arg(long, value_name = "N", default_value_t = qemu::TEST_SMP)]
    smp: u32,
    /// Boots at a time (default: one for each CPU)
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum On {
    /// This hypervisor
    Xenolith,
    /// Debian's Xen 4.17
    Xen,
    /// Both, compared
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum As {
    /// The privileged domain
    Dom0,
    /// A domain without rights
    Domu,
    /// Both
    Both,
}

/// What an image runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The privileged domain, alone.
    Dom0,
    /// A domain without rights, made by our dom0.
    Domu,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Dom0 => "dom0",
            Role::Domu => "domu",
        })
    }
}

/// Where a case ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The hypervisor.
    pub host: Host,
    /// The role.
    pub role: Role,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.role)
    }
}

impl Place {
    const ALL: [Place; 4] = [
        Place { host: Host::Xenolith, role: Role::Dom0 },
        Place { host: Host::Xenolith, role: Role::Domu },
        Place { host: Host::Xen, role: Role::Dom0 },
        Place { host: Host::Xen, role: Role::Domu },
    ];

    fn index(self) -> usize {
        Place::ALL.iter().position(|place| *place == self).unwrap_or(0)
    }
}

/// What a case had to say, or what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It cannot run there, for this reason.
    Skip {
        /// Why.
        reason: String,
    },
    /// What it tests is wrong.
    Fail {
        /// What was found.
        reason: String,
    },
    /// It could not do its work.
    Error {
        /// What was in the way.
        reason: String,
    },
    /// Its domain or the machine ended while it ran, or the time was up.
    Crash {
        /// How.
        reason: String,
    },
}

impl Verdict {
    /// Its word.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Skip { .. } => "skip",
            Verdict::Fail { .. } => "FAIL",
            Verdict::Error { .. } => "ERROR",
            Verdict::Crash { .. } => "CRASH",
        }
    }

    /// What it says beside.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Verdict::Pass => None,
            Verdict::Skip { reason }
            | Verdict::Fail { reason }
            | Verdict::Error { reason }
            | Verdict::Crash { reason } => Some(reason),
        }
    }

    /// Neither passed nor skipped.
    pub fn is_bad(&self) -> bool {
        !matches!(self, Verdict::Pass | Verdict::Skip { .. })
    }
}

/// A case and what it said, by place.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its image.
    pub image: String,
    /// Its own name.
    pub case: String,
    /// By index of the place.
    pub verdicts: [Option<Verdict>; 4],
}

impl Row {
    /// `image::case`.
    pub fn name(&self) -> String {
        format!("{}::{}", self.image, self.case)
    }

    /// What it said in a place.
    pub fn at(&self, place: Place) -> Option<&Verdict> {
        self.verdicts[place.index()].as_ref()
    }
}

/// Which cases, by image.
pub type Selection = BTreeMap<String, Vec<String>>;

/// Everything that runs need.
pub struct Bench<'a> {
    /// The workspace.
    pub workspace: &'a Workspace,
    /// What was built.
    pub built: &'a Built,
    /// CPUs of each machine at least: an image may want more.
    pub smp: u32,
    /// Boots at a time.
    pub jobs: usize,
}

pub fn main(args: Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    if args.vacuity && (args.on != On::Xenolith || args.role == As::Dom0) {
        eprintln!(
            "error: --vacuity runs a build of Xenolith, with the cases as unprivileged domains: leave --on and --as out"
        );
        return Ok(ExitCode::from(2));
    }
    let mut built = build::conformance(&workspace)?;
    if args.debug {
        built.hypervisor = build::debug(&workspace)?;
    }
    let all = cases(&workspace, &built)?;
    let selection = select(&all, |name| name.contains(&args.filter));
    if selection.is_empty() {
        eprintln!("error: no case has `{}` in its name; there are:", args.filter);
        names(&all).for_each(|name| eprintln!("  {name}"));
        return Ok(ExitCode::from(2));
    }
    if args.list {
        names(&selection).for_each(|name| println!("{name}"));
        return Ok(ExitCode::SUCCESS);
    }
    qemu::require()?;
    let bench = Bench { workspace: &workspace, built: &built, smp: args.smp, jobs: jobs(args.jobs) };
    let to_stdout = args.json.as_deref() == Some(Path::new("-"));
    let (text, json, good) = if args.vacuity {
        let findings = vacuity::run(&bench, &selection)?;
        (vacuity::table(&findings), vacuity::json(&findings), vacuity::is_good(&findings))
    } else {
        let places = Place::ALL.into_iter().filter(|place| wanted(&args, *place)).collect::<Vec<_>>();
        let rows = run(&bench, &selection, &places)?;
        let judgement = differences::judge(&rows, &places, &differences::load()?, &all);
        let good = judgement.is_good();
        (report::table(&rows, &places, &judgement), report::json(&rows, &places, &judgement), good)
    };
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&json)? + "\n";
        if to_stdout {
            print!("{json}");
        } else {
            sh::write(path, json.as_bytes())?;
        }
    }
    if to_stdout {
        eprint!("{text}");
    } else {
        print!("{text}");
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What a run of the suite comes to, for `cargo xtask test`.
pub struct Outcome {
    /// Passed, failed, skipped: cases in each place, and differences.
    pub counts: [usize; 3],
    /// Nothing is wrong.
    pub good: bool,
    /// What is wrong, a line each; the case's name first.
    pub failures: Vec<String>,
    /// Why cases were skipped, a line each.
    pub skips: Vec<String>,
}

/// Runs cases in all roles on these hypervisors.
///
/// # Errors
/// When something cannot be run at all.
pub fn suite(bench: &Bench, all: &Selection, selection: &Selection, hosts: &[Host]) -> Result<Outcome> {
    let places: Vec<Place> = Place::ALL.into_iter().filter(|place| hosts.contains(&place.host)).collect();
    let rows = run(bench, selection, &places)?;
    let judgement = differences::judge(&rows, &places, &differences::load()?, all);
    Ok(Outcome {
        counts: report::counts(&rows, &places, &judgement),
        good: judgement.is_good(),
        failures: report::failures(&rows, &judgement),
        skips: report::skips(&rows, &places),
    })
}

/// Whether each constant answer lets no case pass: a note, or what is wrong.
///
/// # Errors
/// When something cannot be run at all.
pub fn vacuity(bench: &Bench, all: &Selection) -> Result<Vec<(String, Result<String, String>)>> {
    let findings = vacuity::run(bench, all)?;
    Ok(vacuity::by_answer(&findings))
}

fn wanted(args: &Args, place: Place) -> bool {
    let on = match args.on {
        On::Xenolith => place.host == Host::Xenolith,
        On::Xen => place.host == Host::Xen,
        On::Both => true,
    };
    on && match args.role {
        As::Dom0 => place.role == Role::Dom0,
        As::Domu => place.role == Role::Domu,
        As::Both => true,
    }
}

/// How many boots at a time.
pub fn jobs(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1)
}

/// All cases, by image: the section that the testkit's macro fills says which there are.
///
/// # Errors
/// When an image cannot be read, or has no cases.
pub fn cases(workspace: &Workspace, built: &Built) -> Result<Selection> {
    let mut all = Selection::new();
    for image in workspace.guests.iter().filter(|image| image.kind == Kind::Conformance) {
        let path = built.guests.get(&image.name).with_context(|| format!("{} was not built", image.name))?;
        let bytes = sh::read(path)?;
        let file = object::File::parse(&*bytes).with_context(|| format!("{}: not an ELF", image.name))?;
        let section = file
            .section_by_name(".test_cases")
            .with_context(|| format!("{}: no section .test_cases: are there no cases?", image.name))?;
        let text = std::str::from_utf8(section.data()?).context("names of cases are text")?;
        let mut cases: Vec<String> = text
            .split(['\n', '\0'])
            .filter(|name| !name.is_empty())
            .map(|name| name.rsplit("::").next().unwrap_or(name).to_owned())
            .collect();
        cases.sort();
        if let Some(twice) = cases.windows(2).find(|pair| pair.first() == pair.last()) {
            bail!("{}: two cases are called {}", image.name, twice[0]);
        }
        all.insert(image.name.clone(), cases);
    }
    Ok(all)
}

/// Those whose name is wanted.
pub fn select(all: &Selection, wanted: impl Fn(&str) -> bool) -> Selection {
    let chosen = |image: &str, case: &str| wanted(&format!("{image}::{case}"));
    all.iter()
        .map(|(image, cases)| {
            (image.clone(), cases.iter().filter(|case| chosen(image, case)).cloned().collect::<Vec<_>>())
        })
        .filter(|(_, cases)| !cases.is_empty())
        .collect()
}

fn names(selection: &Selection) -> impl Iterator<Item = String> + '_ {
    selection.iter().flat_map(|(image, cases)| cases.iter().map(move |case| format!("{image}::{case}")))
}

/// Verdicts of some cases of one image.
type Verdicts = BTreeMap<String, Verdict>;

/// One thing to run: an image as dom0, or all images that are content with so many processors as unprivileged domains.
enum Unit<'a> {
    Dom0(Host, &'a Image, &'a [String]),
    Domu(Host, u32, &'a Selection),
}

/// The selected cases by the number of processors that their images' machines have.
fn by_processors(bench: &Bench, selection: &Selection) -> Result<BTreeMap<u32, Selection>> {
    let mut groups: BTreeMap<u32, Selection> = BTreeMap::new();
    for (image, cases) in selection {
        let smp = bench.workspace.guest(image)?.conformance.smp.max(bench.smp);
        groups.entry(smp).or_default().insert(image.clone(), cases.clone());
    }
    Ok(groups)
}

/// Runs the cases in all those places.
///
/// # Errors
/// When something cannot be run at all.
pub fn run(bench: &Bench, selection: &Selection, places: &[Place]) -> Result<Vec<Row>> {
    let groups = by_processors(bench, selection)?;
    let mut units = Vec::new();
    for place in places {
        match place.role {
            // Longest first.
            Role::Domu => units
                .splice(0..0, groups.iter().map(|(smp, selection)| Unit::Domu(place.host, *smp, selection)))
                .for_each(drop),
            Role::Dom0 => {
                for (image, cases) in selection {
                    units.push(Unit::Dom0(place.host, bench.workspace.guest(image)?, cases));
                }
            }
        }
    }
    if places.iter().any(|place| place.host == Host::Xen) {
        xen::image(&bench.workspace.target_dir)?;
    }
    let found: Mutex<BTreeMap<(String, usize), Verdicts>> = Mutex::default();
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            match unit {
                Unit::Dom0(host, image, cases) => {
                    let verdicts = as_dom0(bench, *host, image, cases)?;
                    let place = Place { host: *host, role: Role::Dom0 };
                    lock(&found).insert((image.name.clone(), place.index()), verdicts);
                }
                Unit::Domu(host, smp, selection) => {
                    let place = Place { host: *host, role: Role::Domu };
                    for (image, verdicts) in guests::as_domu(bench, *host, *smp, selection)? {
                        lock(&found).insert((image, place.index()), verdicts);
                    }
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..bench.jobs.min(units.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a worker of xtask panicked")))
        })
    })?;
    let found = found.into_inner().unwrap_or_else(|poison| poison.into_inner());
    let verdict = |image: &String, case: &String, place: usize| {
        found.get(&(image.clone(), place)).and_then(|verdicts| verdicts.get(case)).cloned()
    };
    Ok(selection
        .iter()
        .flat_map(|(image, cases)| cases.iter().map(move |case| (image, case)))
        .map(|(image, case)| Row {
            image: image.clone(),
            case: case.clone(),
            verdicts: std::array::from_fn(|place| verdict(image, case, place)),
        })
        .collect())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Takes over what a run said of the cases that had no verdict; tells whether that was anything. The case that was under way
/// at the end has crashed.
fn absorb(verdicts: &mut Verdicts, left: &[String], parsed: parse::Parsed) -> bool {
    let before = verdicts.len();
    let running = parsed.running.map(|case| (case, Verdict::Crash { reason: parsed.end }));
    let said = parsed.verdicts.into_iter().chain(running);
    verdicts.extend(said.filter(|(case, _)| left.contains(case)));
    verdicts.len() > before
}

/// The cases without a verdict.
fn without_verdict(cases: &[String], verdicts: &Verdicts) -> Vec<String> {
    cases.iter().filter(|case| !verdicts.contains_key(*case)).cloned().collect()
}

/// Says of cases that they did not run.
fn give_up(verdicts: &mut Verdicts, left: &[String], end: &str) {
    let reason = format!("it did not run: {end}");
    verdicts.extend(left.iter().map(|case| (case.clone(), Verdict::Error { reason: reason.clone() })));
}

/// The words of a command line that choose the cases that are left; none of them when both lists are too long, and then more
/// runs than is wanted.
fn choice(cases: &[String], left: &[String]) -> String {
    let list = |key: &str, cases: &mut dyn Iterator<Item = &String>| {
        let list: Vec<String> = cases.map(|case| format!("={case}")).collect();
        let words = format!("announce {key}={}", list.join("+"));
        (words.len() <= LONGEST_LIST).then_some(words)
    };
    list("only", &mut left.iter())
        .or_else(|| list("skip", &mut cases.iter().filter(|case| !left.contains(case))))
        .unwrap_or_else(|| "announce".into())
}

fn as_dom0(bench: &Bench, host: Host, image: &Image, cases: &[String]) -> Result<Verdicts> {
    let kernel = bench.built.guests.get(&image.name).context("it was built")?;
    let kernel = build::stripped(bench.workspace, kernel)?;
    let words = format!("dom0_mem={DOM0_MEM} dom0_max_vcpus={}", image.conformance.vcpus);
    let mut verdicts = Verdicts::new();
    for round in 1.. {
        let left = without_verdict(cases, &verdicts);
        if left.is_empty() {
            break;
        }
        let watched = bench.boot(&Boot {
            host,
            name: &format!("{host}-dom0-{}-{round}", image.name),
            hypervisor: None,
            kernel: &kernel,
            module: None,
            words: &words,
            cmdline: &choice(cases, &left),
            icount: image.conformance.icount,
            smp: image.conformance.smp.max(bench.smp),
            timeout: TIMEOUT,
        })?;
        let end = watched.end.to_string();
        if !absorb(&mut verdicts, &left, parse::output(&watched.text, end.clone())) {
            give_up(&mut verdicts, &left, &end);
        }
    }
    Ok(verdicts)
}

/// One boot of the suite.
struct Boot<'a> {
    host: Host,
    /// For files: unique.
    name: &'a str,
    /// Instead of the usual one.
    hypervisor: Option<&'a Path>,
    kernel: &'a Path,
    module: Option<&'a Path>,
    words: &'a str,
    cmdline: &'a str,
    icount: bool,
    smp: u32,
    timeout: u64,
}

impl Bench<'_> {
    /// Where a run keeps its files.
    fn scratch(&self, name: &str) -> PathBuf {
        self.workspace.target_dir.join("image/conformance").join(name)
    }

    fn boot(&self, what: &Boot) -> Result<qemu::Watched> {
        // Counted instructions mean something on one CPU only.
        let smp = if what.icount { 1 } else { what.smp };
        let machine = Machine { smp: Some(smp), icount: what.icount, ..Machine::default() };
        let hypervisor = match (what.hypervisor, what.host) {
            (Some(path), _) => path.to_path_buf(),
            (None, Host::Xenolith) => self.built.hypervisor.clone(),
            (None, Host::Xen) => xen::image(&self.workspace.target_dir)?,
        };
        let scratch = self.scratch(what.name);
        let qemu = boot::command(
            &machine,
            &boot::Boot {
                host: what.host,
                hypervisor: &hypervisor,
                kernel: what.kernel,
                module: what.module,
                words: what.words,
                cmdline: what.cmdline,
                joined: &scratch.with_extension("module"),
            },
        )?;
        sh::echo(&qemu);
        let timeout = Some(Duration::from_secs(what.timeout));
        let watched =
            qemu::watch(qemu, &Watch { host: what.host, timeout, quiet: true, steps: &[], channel: None })?;
        sh::write(&scratch.with_extension("log"), watched.text.as_bytes())?;
        Ok(watched)
    }
}

//! `cargo xtask test`: every test, from the format check to the last scenario in QEMU.

use crate::build::{self, Built};
use crate::conformance::{self, Bench};
use crate::images::{Kind, Workspace};
use crate::qemu::{self, Host};
use crate::scenario::{self, Outcome, Scenario};
use crate::setup::Need;
use crate::{audit, doctor, kill, setup, sh, tidy};
use anyhow::{Context, Result};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(clap::Args)]
pub struct Args {
    /// Only tests whose name contains this text (names are those in the output)
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Only scenarios on this hypervisor, and nothing else
    #[arg(long, value_enum, value_name = "HYPERVISOR")]
    on: Option<Host>,
    /// Leave out slow scenarios and those on real Xen
    #[arg(long)]
    quick: bool,
    /// Scenarios at a time (default: one for each CPU)
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// CPUs of the machine in scenarios that do not say how many, nor count instructions
    #[arg(long, value_name = "N", default_value_t = qemu::TEST_SMP)]
    smp: u32,
    /// Only scenarios, on CPUs that take 2^SHIFT ns for each instruction, however fast this host is: 0 is a fast machine, 5 a slow one
    #[arg(long, value_name = "SHIFT", value_parser = clap::value_parser!(u32).range(..=10))]
    pace: Option<u32>,
    /// Only list the scenarios
    #[arg(long)]
    list: bool,
}

/// Results so far.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    failures: Vec<String>,
    skips: Vec<String>,
}

impl Tally {
    fn passed(&mut self, name: &str, note: &str) {
        self.passed += 1;
        println!("PASS  {name}{note}");
    }

    fn failed(&mut self, name: &str, why: &str) {
        self.failed += 1;
        self.failures.push(name.to_owned());
        println!("FAIL  {name}\n{}", indent(why));
    }

    fn skipped(&mut self, name: &str, why: &str) {
        self.skipped += 1;
        self.skips.push(format!("{name}: {why}"));
        println!("SKIP  {name}: {why}");
    }

    fn step(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.passed(name, ""),
            Err(error) => self.failed(name, &format!("{error:#}")),
        }
    }
}

pub fn main(args: Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    let scenarios: Vec<(Host, Scenario)> = scenario::all(&workspace)?
        .into_iter()
        .filter(|(host, scenario)| {
            name(*host, scenario).contains(&args.filter)
                && args.on.is_none_or(|on| on == *host)
                && !(args.quick && (scenario.slow || *host == Host::Xen))
        })
        .map(|(host, mut scenario)| {
            if !scenario.icount {
                scenario.smp.get_or_insert(args.smp);
                // Disks and networks answer in real time, so an idle clock waits for it.
                scenario
                    .qemu_args
                    .extend(args.pace.into_iter().flat_map(|pace| qemu::virtual_clock(pace, "on")));
            }
            (host, scenario)
        })
        .collect();
    let scenarios_only = args.on.is_some() || args.pace.is_some();
    let suite = suite_filter(&workspace, &args.filter).filter(|_| args.pace.is_none());
    let kills = !scenarios_only && !args.quick && KILLS.contains(&args.filter);
    if args.list {
        for (host, scenario) in &scenarios {
            println!("{:<44} {}", name(*host, scenario), scenario.about);
        }
        if kills {
            println!(
                "{KILLS:<44} QEMU is killed {KILL_ROUNDS} times while a guest writes to its disks; no flush is lost."
            );
        }
        if suite.is_some() {
            let about = "The conformance suite: `cargo xtask conformance --list` names its cases.";
            println!("{SUITE:<44} {about}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    install_in_ci()?;
    let mut tally = Tally::default();
    if !scenarios_only {
        host_side(&workspace, &args.filter, &mut tally)?;
    }
    let audits = !scenarios_only && ("audit".contains(&args.filter) || args.filter.starts_with("audit"));
    if audits || kills || suite.is_some() || !scenarios.is_empty() {
        let built = if audits || kills || suite.is_some() {
            build::everything(&workspace)
        } else {
            build::for_scenarios(&workspace, scenarios.iter().map(|(_, scenario)| scenario))
        };
        match built {
            Ok(built) => {
                if audits {
                    audit_images(&workspace, &built, &mut tally)?;
                }
                if let Some(filter) = suite {
                    conformance_suite(&args, filter, &workspace, &built, &mut tally)?;
                }
                if kills {
                    kill_tests(&workspace, &built, &mut tally);
                }
                boot_all(&args, &workspace, &built, scenarios, &mut tally);
            }
            Err(error) => tally.failed("build of the images", &format!("{error:#}")),
        }
    }
    summary(&tally)
}

/// What the whole of the tests came to; the last line stands alone.
fn summary(tally: &Tally) -> Result<ExitCode> {
    println!();
    tally.skips.iter().for_each(|skip| println!("skipped: {skip}"));
    tally.failures.iter().for_each(|name| println!("failed: {name}   (cargo xtask test --filter '{name}')"));
    if tally.passed + tally.failed + tally.skipped == 0 {
        anyhow::bail!("no test has a name like that; `cargo xtask test --list` shows the scenarios");
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// With `CI=true`, what setup can install may not be a reason to skip.
fn install_in_ci() -> Result<()> {
    let missing = doctor::examine().into_iter().any(|f| f.state.is_err() && f.need != Need::Nice);
    if std::env::var("CI").is_ok_and(|ci| ci == "true") && missing {
        eprintln!("CI=true and tools are missing: running `cargo xtask setup` first");
        if setup::install()? {
            anyhow::bail!(
                "with CI=true nothing that can be installed is skipped: run `cargo xtask setup` as root"
            );
        }
    }
    Ok(())
}

fn host_side(workspace: &Workspace, filter: &str, tally: &mut Tally) -> Result<()> {
    let wanted = |name: &str| name.contains(filter);
    let there = |tool: &str| sh::version("cargo", &[tool, "--version"]).is_some();
    if wanted("format") {
        if there("fmt") {
            tally.step("format", sh::run(sh::cargo().args(["fmt", "--all", "--check"])));
        } else {
            tally.skipped("format", "rustfmt is missing: rustup component add rustfmt");
        }
    }
    if wanted("lints") {
        if there("clippy") {
            let mut clippy = sh::cargo();
            clippy.args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]);
            tally.step("lints", sh::run(&mut clippy));
        } else {
            tally.skipped("lints", "clippy is missing: rustup component add clippy");
        }
    }
    if wanted("tidy") {
        let findings = tidy::check()?;
        if findings.is_empty() {
            tally.passed("tidy", "");
        } else {
            tally.failed("tidy", &findings.join("\n"));
        }
    }
    if wanted("host tests") {
        host_tests(there("nextest"), tally)?;
    }
    if wanted("loom models") {
        // A folder of its own: these are other builds of the same packages.
        let folder = workspace.target_dir.join("loom");
        let mut cargo = sh::cargo();
        cargo.args(["test", "--quiet", "--package", "xenolith", "--lib", "--target-dir"]).arg(folder);
        cargo.args(["models::"]).env("RUSTFLAGS", "--cfg loom");
        tally.step("loom models", sh::run(&mut cargo));
    }
    Ok(())
}

fn host_tests(nextest: bool, tally: &mut Tally) -> Result<()> {
    let mut cargo = sh::cargo();
    if nextest {
        cargo.args([
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--status-level",
            "fail",
            "--cargo-quiet",
        ]);
        cargo.args(["--color", "never"]);
    } else {
        cargo.args(["test", "--quiet", "--workspace", "--no-fail-fast"]);
    }
    sh::echo(&cargo);
    let out = cargo.output().context("cannot start cargo")?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let [passed, failed, skipped] = host_counts(&text);
    tally.passed += passed;
    tally.skipped += skipped;
    if skipped > 0 {
        tally.skips.push(format!("host tests: {skipped} marked #[ignore]"));
    }
    if out.status.success() && passed > 0 {
        println!("PASS  host tests ({passed} passed, {skipped} ignored)");
    } else {
        tally.failed("host tests", &text);
        // Itself and at least one more, unless nothing could be compiled.
        tally.failed += failed.saturating_sub(1);
    }
    Ok(())
}

/// Passed, failed and ignored tests in the output of `cargo nextest` or `cargo test`.
fn host_counts(text: &str) -> [usize; 3] {
    let mut total = [0; 3];
    for line in text.lines().map(str::trim) {
        let summary = line.starts_with("Summary [") || line.starts_with("test result:");
        if !summary {
            continue;
        }
        let mut before = 0;
        for word in line.split([' ', ',', ';', ':', '(', ')']).filter(|word| !word.is_empty()) {
            match word {
                "passed" => total[0] += before,
                "failed" => total[1] += before,
                "skipped" | "ignored" => total[2] += before,
                _ => {}
            }
            before = word.parse().unwrap_or(0);
        }
    }
    total
}

/// The name of the test that kills QEMU.
const KILLS: &str = "kill";
/// How often it does so here; `cargo xtask kill` does it a hundred times.
const KILL_ROUNDS: u32 = 10;

fn kill_tests(workspace: &Workspace, built: &Built, tally: &mut Tally) {
    if let Err(why) = qemu::require() {
        return tally.skipped(KILLS, &format!("{why:#}"));
    }
    match kill::rounds(workspace, built, KILL_ROUNDS, 1, false) {
        Ok(summary) => tally.passed(KILLS, &format!(" ({summary})")),
        Err(error) => tally.failed(KILLS, &format!("{error:#}")),
    }
}

/// What the names of the conformance suite's cases begin with here.
const SUITE: &str = "conformance/";
/// What the names of its runs under constant answers begin with, behind that.
const VACUITY: &str = "vacuity/";

/// The filter for cases of the conformance suite, if this filter of tests means any. The images' names decide: the cases' are known
/// only when the images are built.
fn suite_filter<'a>(workspace: &Workspace, filter: &'a str) -> Option<&'a str> {
    if SUITE.starts_with(filter) {
        return Some("");
    }
    let behind = filter.strip_prefix(SUITE).unwrap_or(filter);
    let mut names = workspace
        .guests
        .iter()
        .filter(|image| image.kind == Kind::Conformance)
        .map(|image| image.name.as_str());
    let image = behind.split("::").next().unwrap_or(behind);
    (VACUITY.starts_with(behind) || behind.starts_with(VACUITY) || names.any(|name| name.contains(image)))
        .then_some(behind)
}

/// The conformance suite: each case counts in each place, and each constant answer counts as one test.
fn conformance_suite(
    args: &Args,
    filter: &str,
    workspace: &Workspace,
    built: &Built,
    tally: &mut Tally,
) -> Result<()> {
    if qemu::version().is_none() {
        let reason = format!("`{}` does not run: cargo xtask setup", qemu::program().display());
        tally.skipped("conformance", &reason);
        return Ok(());
    }
    let mut hosts = Vec::new();
    for host in [Host::Xenolith, Host::Xen] {
        if args.on.is_some_and(|on| on != host) || host == Host::Xen && args.quick {
            continue;
        }
        match if host == Host::Xen { crate::xen::image(&workspace.target_dir).map(drop) } else { Ok(()) } {
            Ok(()) => hosts.push(host),
            Err(error) => tally.skipped("conformance on xen", &format!("{error:#}")),
        }
    }
    let bench = Bench { workspace, built, smp: args.smp, jobs: conformance::jobs(args.jobs) };
    let all = conformance::cases(workspace, built)?;
    let selection = conformance::select(&all, |name| name.contains(filter));
    if !selection.is_empty() && !hosts.is_empty() {
        let outcome = conformance::suite(&bench, &all, &selection, &hosts)?;
        let [passed, failed, skipped] = outcome.counts;
        tally.passed += passed;
        tally.failed += failed;
        tally.skipped += skipped;
        let word = if outcome.good { "PASS" } else { "FAIL" };
        println!("{word}  conformance ({passed} passed, {failed} failed, {skipped} skipped)");
        tally.skips.extend(outcome.skips.into_iter().map(|skip| format!("conformance {skip}")));
        for line in &outcome.failures {
            println!("FAIL  {SUITE}{line}");
            let name = line.split_whitespace().next().unwrap_or_default();
            tally.failures.push(format!("{SUITE}{name}"));
        }
    }
    if hosts.contains(&Host::Xenolith) && (filter.is_empty() || filter.starts_with("vacuity")) {
        for (answer, result) in conformance::vacuity(&bench, &all)? {
            let name = format!("{SUITE}{VACUITY}{answer}");
            match result {
                Ok(note) => tally.passed(&name, &format!(" ({note})")),
                Err(why) => tally.failed(&name, &why),
            }
        }
    }
    Ok(())
}

fn audit_images(workspace: &Workspace, built: &Built, tally: &mut Tally) -> Result<()> {
    for (name, report) in audit::all(workspace, built)? {
        let name = format!("audit {name}");
        if report.errors.is_empty() {
            tally.passed(&name, &format!(" ({})", report.facts.join("; ")));
        } else {
            tally.failed(&name, &report.errors.join("\n"));
        }
    }
    Ok(())
}

fn name(host: Host, scenario: &Scenario) -> String {
    format!("{host}/{}", scenario.name)
}

fn boot_all(
    args: &Args,
    workspace: &Workspace,
    built: &Built,
    scenarios: Vec<(Host, Scenario)>,
    tally: &mut Tally,
) {
    if scenarios.is_empty() {
        return;
    }
    let qemu = qemu::version();
    let xen = if scenarios.iter().any(|(host, _)| *host == Host::Xen) {
        crate::xen::image(&workspace.target_dir).map(drop)
    } else {
        Ok(())
    };
    let mut runnable = Vec::new();
    for (host, scenario) in scenarios {
        let reason = match (&qemu, &xen) {
            (None, _) => Some(format!("`{}` does not run: cargo xtask setup", qemu::program().display())),
            (_, Err(error)) if host == Host::Xen => Some(format!("{error:#}")),
            _ => scenario.skip(built, qemu),
        };
        match reason {
            Some(reason) => tally.skipped(&name(host, &scenario), &reason),
            None => runnable.push((host, scenario)),
        }
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.unwrap_or(cpus).clamp(1, runnable.len().max(1));
    let next = AtomicUsize::new(0);
    let shared = Mutex::new(tally);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((host, scenario)) = runnable.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let report = scenario.run(workspace, built, *host);
                    let mut tally = shared.lock().unwrap_or_else(|poison| poison.into_inner());
                    judge(&name(*host, scenario), report, &mut tally);
                }
            });
        }
    });
}

fn judge(name: &str, report: Result<scenario::Report>, tally: &mut Tally) {
    let report = match report {
        Ok(report) => report,
        Err(error) => return tally.failed(name, &format!("{error:#}")),
    };
    let mut note = format!(" ({:.1} s)", report.took.as_secs_f32());
    // A guest's own cases count instead of the one that it is.
    let [passed, failed, skipped] = report.cases.unwrap_or_default();
    if report.cases.is_some() {
        note = format!(
            " ({passed} passed, {failed} failed, {skipped} skipped; {:.1} s)",
            report.took.as_secs_f32()
        );
    }
    match report.outcome {
        Outcome::Passed => {
            tally.passed(name, &note);
            tally.passed += passed.saturating_sub(1);
            if skipped > 0 {
                tally.skipped += skipped;
                tally.skips.push(format!("{skipped} cases in {name}: the guest's output says why"));
            }
        }
        Outcome::Skipped(why) => tally.skipped(name, &why),
        Outcome::Failed(why) => {
            let lines: Vec<&str> = report.text.lines().collect();
            let tail = lines[lines.len().saturating_sub(40)..].join("\n");
            tally.failed(
                name,
                &format!("{why}--- the last lines it printed:\n{tail}\n--- again:\n{}", report.line),
            );
            tally.passed += passed;
            tally.failed += failed.saturating_sub(1);
        }
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("      {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_tests_of_both_runners() {
        let nextest = "     Summary [   0.012s] 7 tests run: 5 passed (1 slow), 2 failed, 3 skipped\n";
        assert_eq!(host_counts(nextest), [5, 2, 3]);
        let cargo = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
                     test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(host_counts(cargo), [4, 1, 1]);
    }

    #[test]
    fn ci_runs_what_the_readme_says() -> Result<()> {
        let line = "cargo xtask test";
        for file in [".ci/run", "README.md"] {
            let text = String::from_utf8(sh::read(&sh::root().join(file))?)?;
            assert!(
                text.lines().any(|l| l.trim().trim_start_matches("$ ") == line),
                "{file} does not say `{line}`"
            );
        }
        Ok(())
    }
}

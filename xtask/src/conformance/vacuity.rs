//! No case may pass on a hypervisor that does nothing: each runs, in a domain of its own, on a test build that answers 0, and
//! on one that answers `-ENOSYS`, to everything between its begin and its end (`trap::constant_answers` in the kernel). Those
//! that only a privileged domain runs are told that theirs is one.

use super::guests::{self, Job};
use super::{Bench, Selection, Verdict, parse};
use crate::images::Image;
use crate::qemu::Host;
use crate::{audit, build, sh};
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::fmt;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Milliseconds after which the hypervisor ends a case that hangs.
const LIMIT_MS: u32 = 500;
/// Seconds that dom0 waits for one.
const PATIENCE: u32 = 10;
/// Domains in one boot.
const BATCH: usize = 250;

/// What the hypervisor answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// 0.
    Zero,
    /// `-ENOSYS`.
    Enosys,
}

/// All answers.
const ANSWERS: [Answer; 2] = [Answer::Zero, Answer::Enosys];

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Answer::Zero => "zero",
            Answer::Enosys => "enosys",
        })
    }
}

/// What became of a case under an answer.
#[derive(Debug)]
pub struct Finding {
    /// `image::case`.
    pub name: String,
    /// The answer.
    pub answer: Answer,
    /// Its verdict; [`Verdict::Pass`] is what must not be.
    pub verdict: Verdict,
}

impl Finding {
    /// The case shows nothing, or it is not known whether it does: it did not even begin.
    pub fn is_bad(&self) -> bool {
        matches!(self.verdict, Verdict::Pass)
            || matches!(&self.verdict, Verdict::Error { reason } if reason.starts_with(NOT_RUN))
    }
}

/// How the reason of a case begins that did not run at all.
const NOT_RUN: &str = "it did not begin";

/// Runs the selected cases under both answers.
///
/// # Errors
/// When a boot cannot be made.
pub fn run(bench: &Bench, selection: &Selection) -> Result<Vec<Finding>> {
    let hypervisor = build::constant_answers(bench.workspace)?;
    if !audit::is_test_build(&sh::read(&hypervisor)?) {
        bail!(
            "kernel/src/main.rs: the test build has lost the mark that `cargo xtask audit` looks for in releases"
        );
    }
    let mut cases = Vec::new();
    let mut as_privileged = Vec::new();
    for (image, names) in selection {
        let image = bench.workspace.guest(image)?;
        let list = names.iter().flat_map(|case| ANSWERS.map(|answer| (image, case.as_str(), answer)));
        if image.conformance.only_dom0.is_some() { as_privileged.extend(list) } else { cases.extend(list) }
    }
    let mut findings = run_as(bench, &hypervisor, &cases, Rights::None)?;
    // What such a domain skips is perhaps for a privileged one.
    let skipped = |found: &Finding| matches!(found.verdict, Verdict::Skip { .. });
    let names = |image: &Image, case: &str| format!("{}::{case}", image.name);
    as_privileged.extend(cases.iter().copied().filter(|(image, case, answer)| {
        let name = names(image, case);
        findings.iter().any(|found| skipped(found) && found.name == name && found.answer == *answer)
    }));
    findings.retain(|found| !skipped(found));
    findings.extend(run_as(bench, &hypervisor, &as_privileged, Rights::Pretended)?);
    findings.sort_by(|a, b| (&a.name, a.answer).cmp(&(&b.name, b.answer)));
    Ok(findings)
}

/// What a case believes of its domain. Rights make no difference to a hypervisor that always gives the same answer, so that a
/// domain without any will do, which many share a boot with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    None,
    Pretended,
}

/// A case, its image, and what is answered while it runs.
type Probe<'a> = (&'a Image, &'a str, Answer);

/// Runs each case in a domain of its own.
fn run_as(bench: &Bench, hypervisor: &Path, cases: &[Probe], rights: Rights) -> Result<Vec<Finding>> {
    let units: Vec<_> = cases.chunks(BATCH).enumerate().collect();
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    let (word, role) = match rights {
        Rights::None => ("", "domu"),
        Rights::Pretended => ("privileged ", "dom0"),
    };
    let work = || -> Result<()> {
        while let Some((number, batch)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            let jobs: Vec<Job> = batch
                .iter()
                .enumerate()
                .map(|(index, (image, case, answer))| Job {
                    name: format!("c{index}"),
                    image,
                    cmdline: format!("announce {word}answers={answer} limit={LIMIT_MS} only=={case}"),
                    patience: PATIENCE,
                })
                .collect();
            let name = format!("vacuity-{role}-{number}");
            let mut printed =
                guests::batch(bench, Host::Xenolith, Some(hypervisor), bench.smp, &name, &jobs)?;
            for (job, (image, case, answer)) in jobs.iter().zip(*batch) {
                let (text, end) = printed.remove(&job.name).unwrap_or_default();
                let verdict = verdict(case, &text, end);
                let name = format!("{}::{case}", image.name);
                super::lock(&found).push(Finding { name, answer: *answer, verdict });
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
    Ok(found.into_inner().unwrap_or_else(|poison| poison.into_inner()))
}

fn verdict(case: &str, text: &str, end: String) -> Verdict {
    let parsed = parse::output(text, end);
    let said = parsed.verdicts.into_iter().find(|(name, _)| name == case).map(|(_, verdict)| verdict);
    said.unwrap_or_else(|| match parsed.running {
        Some(_) => Verdict::Crash { reason: parsed.end },
        None => Verdict::Error { reason: format!("{NOT_RUN}: {}", parsed.end) },
    })
}

/// Nothing passed that must not.
pub fn is_good(findings: &[Finding]) -> bool {
    !findings.iter().any(Finding::is_bad)
}

/// Those that passed, failed (as they must) and skipped, for the count of tests.
pub fn counts(findings: &[Finding], answer: Answer) -> [usize; 3] {
    let mut counts = [0; 3];
    for finding in findings.iter().filter(|finding| finding.answer == answer) {
        let which = match finding.verdict {
            _ if finding.is_bad() => 0,
            Verdict::Skip { .. } => 2,
            _ => 1,
        };
        counts[which] += 1;
    }
    counts
}

/// For each answer, what came of it: a note, or the cases that are wrong.
pub fn by_answer(findings: &[Finding]) -> Vec<(String, Result<String, String>)> {
    let one = |answer: Answer| {
        let of = |bad: bool| findings.iter().filter(move |f| f.answer == answer && f.is_bad() == bad);
        let wrong: Vec<String> = of(true)
            .map(|f| format!("{} passes when everything is answered {answer}, or did not begin", f.name))
            .collect();
        let [_, fine, skipped] = counts(findings, answer);
        let result = if wrong.is_empty() {
            Ok(format!("{fine} cases do not pass, {skipped} skipped"))
        } else {
            Err(wrong.join("\n"))
        };
        (answer.to_string(), result)
    };
    ANSWERS.into_iter().map(one).collect()
}

/// The findings, the last line the verdict.
pub fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let reason = finding.verdict.reason().unwrap_or_default();
        let word = match &finding.verdict {
            Verdict::Pass => "VACUOUS",
            Verdict::Error { .. } if finding.is_bad() => "UNKNOWN",
            Verdict::Skip { .. } => "skipped",
            Verdict::Fail { .. } => "fails",
            Verdict::Error { .. } => "errs",
            Verdict::Crash { .. } => "crashes",
        };
        _ = writeln!(
            out,
            "{word:<8} {:<7} {}{}{reason}",
            finding.answer,
            finding.name,
            if reason.is_empty() { "" } else { ": " }
        );
    }
    let sum = ANSWERS.map(|answer| counts(findings, answer));
    let [bad, fine, skipped] =
        std::array::from_fn(|index| sum.iter().map(|counts| counts[index]).sum::<usize>());
    let word = if is_good(findings) { "SUCCESS" } else { "FAILURE" };
    out + &format!("Vacuity: {word}: {bad} pass or did not begin, {fine} do not pass, {skipped} skipped\n")
}

/// The same as JSON.
pub fn json(findings: &[Finding]) -> Value {
    let cases: Vec<Value> = findings
        .iter()
        .filter_map(|finding| {
            let mut value = serde_json::to_value(&finding.verdict).ok()?;
            let object = value.as_object_mut()?;
            object.insert("name".into(), finding.name.clone().into());
            object.insert("answer".into(), finding.answer.to_string().into());
            Some(value)
        })
        .collect();
    json!({ "schema": "xenolith-vacuity-1", "success": is_good(findings), "cases": cases })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(text: &str) -> Finding {
        let verdict = verdict("one", text, "the domain crashed".into());
        Finding { name: "i::one".into(), answer: Answer::Zero, verdict }
    }

    #[test]
    fn passing_is_bad_and_everything_else_must_have_begun() {
        assert!(finding("[RUN]   one\n[PASS]  one (1 us)\n").is_bad());
        assert!(finding("").is_bad(), "it did not begin");
        assert!(!finding("[RUN]   one\n").is_bad(), "it crashed");
        assert!(!finding("[RUN]   one\n[FAIL]  one: x\n").is_bad());
        let skipped = finding("[RUN]   one\n[SKIP]  one: no reason\n");
        assert!(!skipped.is_bad());
        assert_eq!(counts(&[skipped], Answer::Zero), [0, 0, 1]);
    }
}

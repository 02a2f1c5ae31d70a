//! No case may pass on a hypervisor that does nothing: each runs, in a domain of its own, on a test build that answers 0, and
//! on one that answers `-ENOSYS`, to everything between its begin and its end (`trap::constant_answers` in the kernel).

use super::guests::{self, Job};
use super::{Bench, Selection, Verdict, parse};
use crate::images::Image;
use crate::qemu::Host;
use crate::{audit, build, sh};
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::fmt;
use std::fmt::Write as _;
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
    let mut cases: Vec<(&Image, &String)> = Vec::new();
    let mut findings = Vec::new();
    for (image, names) in selection {
        let image = bench.workspace.guest(image)?;
        match &image.conformance.only_dom0 {
            Some(reason) => {
                for (case, answer) in
                    names.iter().flat_map(|case| [(case, Answer::Zero), (case, Answer::Enosys)])
                {
                    let verdict = Verdict::Skip { reason: reason.clone() };
                    findings.push(Finding { name: format!("{}::{case}", image.name), answer, verdict });
                }
            }
            None => cases.extend(names.iter().map(|case| (image, case))),
        }
    }
    let mut units = Vec::new();
    for answer in [Answer::Zero, Answer::Enosys] {
        for (number, batch) in cases.chunks(BATCH).enumerate() {
            units.push((answer, number, batch));
        }
    }
    let next = AtomicUsize::new(0);
    let found = Mutex::new(findings);
    let work = || -> Result<()> {
        while let Some((answer, number, batch)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            let jobs: Vec<Job> = batch
                .iter()
                .enumerate()
                .map(|(index, (image, case))| Job {
                    name: format!("c{index}"),
                    image,
                    cmdline: format!("announce answers={answer} limit={LIMIT_MS} only=={case}"),
                    patience: PATIENCE,
                })
                .collect();
            let name = format!("vacuity-{answer}-{number}");
            let mut printed = guests::batch(bench, Host::Xenolith, Some(&hypervisor), &name, &jobs)?;
            for (job, (image, case)) in jobs.iter().zip(*batch) {
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
    let mut findings = found.into_inner().unwrap_or_else(|poison| poison.into_inner());
    findings.sort_by(|a, b| (&a.name, a.answer).cmp(&(&b.name, b.answer)));
    Ok(findings)
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
    [Answer::Zero, Answer::Enosys].into_iter().map(one).collect()
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
    let sum = [Answer::Zero, Answer::Enosys].map(|answer| counts(findings, answer));
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

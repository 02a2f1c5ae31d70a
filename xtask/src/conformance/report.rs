//! The table of verdicts, and the same as JSON.

use super::differences::{Found, Judgement};
use super::{Place, Row, Verdict};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Passed, failed and skipped verdicts; failed are those that the judgement calls so.
pub fn counts(rows: &[Row], places: &[Place], judgement: &Judgement) -> [usize; 3] {
    let all = || rows.iter().flat_map(|row| places.iter().filter_map(|place| row.at(*place)));
    [
        all().filter(|verdict| **verdict == Verdict::Pass).count(),
        judgement.bad.len()
            + judgement.stale.len()
            + judgement.differences.iter().filter(|found| found.listed.is_none()).count(),
        all().filter(|verdict| matches!(verdict, Verdict::Skip { .. })).count(),
    ]
}

/// The table, what needs an explanation below it, and the verdict as the last line.
pub fn table(rows: &[Row], places: &[Place], judgement: &Judgement) -> String {
    let width = rows.iter().map(|row| row.name().len()).max().unwrap_or(0).max(4);
    let mut out = format!("{:<width$}", "case");
    for place in places {
        _ = write!(out, "  {:<13}", place.to_string());
    }
    out = out.trim_end().to_owned() + "\n";
    for row in rows {
        let mut line = format!("{:<width$}", row.name());
        for place in places {
            _ = write!(line, "  {:<13}", row.at(*place).map_or("-", Verdict::word));
        }
        out += line.trim_end();
        out.push('\n');
    }
    skips(rows, places).iter().for_each(|line| _ = writeln!(out, "skipped {line}"));
    for found in judgement.differences.iter().filter(|found| found.listed.is_some()) {
        let text = found.listed.as_ref().map_or("", |listed| &listed.text);
        _ = writeln!(out, "listed: {}: {text}", difference(found));
    }
    failures(rows, judgement).iter().for_each(|line| _ = writeln!(out, "{line}"));
    let [passed, failed, skipped] = counts(rows, places, judgement);
    let word = if judgement.is_good() { "SUCCESS" } else { "FAILURE" };
    out + &format!(
        "Conformance: {word}: {} cases; {passed} passed, {failed} failed, {skipped} skipped\n",
        rows.len()
    )
}

fn difference(found: &Found) -> String {
    let say = |verdict: &Verdict| {
        verdict.reason().map_or(verdict.word().to_owned(), |reason| format!("{} ({reason})", verdict.word()))
    };
    format!("{} as {}: xenolith {}, xen {}", found.case, found.role, say(&found.xenolith), say(&found.xen))
}

/// What is wrong, a line each; the case's name first.
pub fn failures(rows: &[Row], judgement: &Judgement) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, place) in &judgement.bad {
        let verdict = rows.iter().find(|row| row.name() == *name).and_then(|row| row.at(*place));
        let word = verdict.map_or("no verdict", Verdict::word);
        lines.push(format!(
            "{name} on {place}: {word}: {}",
            verdict.and_then(Verdict::reason).unwrap_or_default()
        ));
    }
    for found in judgement.differences.iter().filter(|found| found.listed.is_none()) {
        lines.push(format!("{}; NOT LISTED in tests/conformance/differences.toml", difference(found)));
    }
    for listed in &judgement.stale {
        lines.push(format!(
            "{} as {} is listed in tests/conformance/differences.toml and does NOT DIFFER",
            listed.case, listed.role
        ));
    }
    lines
}

/// Skipped cases by place and reason, a line each: who cannot run somewhere says why.
pub fn skips(rows: &[Row], places: &[Place]) -> Vec<String> {
    let mut reasons: BTreeMap<(usize, &str), Vec<String>> = BTreeMap::new();
    for row in rows {
        for (index, place) in places.iter().enumerate() {
            if let Some(Verdict::Skip { reason }) = row.at(*place) {
                reasons.entry((index, reason)).or_default().push(row.name());
            }
        }
    }
    let line = |((index, reason), names): ((usize, &str), Vec<String>)| {
        Some(format!("on {}: {reason}: {}", places.get(index)?, names.join(" ")))
    };
    reasons.into_iter().filter_map(line).collect()
}

/// The same facts; docs/book/src/conformance.md has the schema.
pub fn json(rows: &[Row], places: &[Place], judgement: &Judgement) -> Value {
    let cases: Vec<Value> = rows
        .iter()
        .map(|row| {
            let runs: Vec<Value> = places
                .iter()
                .filter_map(|place| {
                    let mut run = serde_json::to_value(row.at(*place)?).ok()?;
                    let object = run.as_object_mut()?;
                    object.insert("on".into(), place.host.to_string().into());
                    object.insert("as".into(), place.role.to_string().into());
                    Some(run)
                })
                .collect();
            json!({ "name": row.name(), "runs": runs })
        })
        .collect();
    let differences: Vec<Value> = judgement
        .differences
        .iter()
        .map(|found| {
            json!({
                "name": found.case,
                "as": found.role,
                "xenolith": found.xenolith.word().to_lowercase(),
                "xen": found.xen.word().to_lowercase(),
                "listed": found.listed.as_ref().map(|listed| json!({ "kind": listed.kind, "text": listed.text })),
            })
        })
        .collect();
    let stale: Vec<Value> =
        judgement.stale.iter().map(|listed| json!({ "name": listed.case, "as": listed.role })).collect();
    let [passed, failed, skipped] = counts(rows, places, judgement);
    json!({
        "schema": "xenolith-conformance-1",
        "success": judgement.is_good(),
        "counts": { "cases": rows.len(), "passed": passed, "failed": failed, "skipped": skipped },
        "cases": cases,
        "differences": differences,
        "listed-but-equal": stale,
    })
}

#[cfg(test)]
mod tests {
    use super::super::differences::judge;
    use super::super::{Role, Selection};
    use super::*;
    use crate::qemu::Host;

    #[test]
    fn table_and_json_say_the_same() {
        let places = [Host::Xenolith, Host::Xen].map(|host| Place { host, role: Role::Domu });
        let crash = Verdict::Crash { reason: "the domain crashed".into() };
        let row = Row {
            image: "i".into(),
            case: "c".into(),
            verdicts: [None, Some(Verdict::Pass), None, Some(crash)],
        };
        let rows = [row];
        let judgement = judge(&rows, &places, &[], &Selection::new());
        let text = table(&rows, &places, &judgement);
        assert!(text.contains("i::c  pass           CRASH\n"), "{text}");
        assert!(text.contains("i::c on xen/domu: CRASH: the domain crashed\n"), "{text}");
        assert!(text.ends_with("Conformance: FAILURE: 1 cases; 1 passed, 2 failed, 0 skipped\n"), "{text}");
        let json = json(&rows, &places, &judgement);
        assert_eq!(json["cases"][0]["runs"][1]["verdict"], "crash");
        assert_eq!(json["cases"][0]["runs"][1]["reason"], "the domain crashed");
        assert_eq!(json["differences"][0]["listed"], Value::Null);
        assert_eq!(json["success"], false);
    }
}

//! What shows that the ABI is there: `docs/abi/coverage.toml` against the ABI crate's tables, the handlers and the cases.
//!
//! In the data each hypercall is a table `[name]`, each of its operations a line with the case that shows its success, and with
//! cases that show its errors:
//!
//! ```toml
//! [event_channel_op]
//! bind_virq = { state = "implemented", test = "events::virq_is_bound_once", errors = { EEXIST = "events::virq_is_bound_once" } }
//! ```

use crate::sh;
use crate::source::{self, Source};
use anyhow::{Context, Result};
use hypercall_abi::subops::FAMILIES;
use hypercall_abi::table::{Answer, Facts, Family, Operation};
use hypercall_abi::{Errno, Hypercall};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The data.
pub const COVERAGE: &str = "docs/abi/coverage.toml";

/// What no case shows, one a line: a hypercall or an operation, or one of its errors, and behind a colon the reason why no guest
/// can bring it about.
const WITHOUT_CASE: &str = "docs/abi/without-case.txt";

/// Where the handlers are.
const HANDLERS: &str = "kernel/src/hypercall";

/// A line of the data.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// `implemented`, `enosys` (the operation answers ENOSYS) or `refused` (always another error).
    pub state: String,
    /// The case that shows it.
    pub test: String,
    /// Cases that show errors, by the error's name.
    #[serde(default)]
    pub errors: BTreeMap<String, String>,
}

/// All of it: hypercall, operation, line.
pub type Coverage = BTreeMap<String, BTreeMap<String, Entry>>;

/// Reads the data.
///
/// # Errors
/// When it cannot be read or is not of this form.
pub fn load() -> Result<Coverage> {
    let text = String::from_utf8(sh::read(&sh::root().join(COVERAGE))?)
        .with_context(|| format!("{COVERAGE} is not UTF-8"))?;
    toml::from_str(&text).with_context(|| COVERAGE.to_owned())
}

/// Compares names without case and underscores.
pub fn flat(name: &str) -> String {
    name.replace('_', "").to_lowercase()
}

/// The families of a hypercall.
pub fn families(call: Hypercall) -> impl Iterator<Item = &'static Family> {
    FAMILIES.iter().copied().filter(move |family| family.call == call)
}

/// The name of an operation without the prefix that its family shares.
pub fn short_name(family: &Family, operation: &Operation) -> &'static str {
    let first = family.operations.first().map_or("", |first| first.name);
    let shared = family.operations.iter().fold(first.len(), |shared, other| {
        first.bytes().zip(other.name.bytes()).take(shared).take_while(|(a, b)| a == b).count()
    });
    let at = first.get(..shared).and_then(|prefix| prefix.rfind('_')).map_or(0, |at| at + 1);
    // `VMASST_TYPE_4gb_segments` and its notice share more than the prefix.
    let prefix = if family.name == "VmAssist" { "VMASST_TYPE_".len() } else { at };
    operation.name.get(prefix..).unwrap_or(operation.name)
}

/// Whether a line of the data by this name is about the operation.
pub fn is_named(family: &Family, operation: &Operation, name: &str) -> bool {
    [flat(short_name(family, operation)), flat(operation.variant)].contains(&flat(name))
}

/// The line of an operation in the data.
pub fn entry<'a>(coverage: &'a Coverage, family: &Family, operation: &Operation) -> Option<&'a Entry> {
    lines(coverage, family.call)?
        .iter()
        .find(|(name, _)| is_named(family, operation, name))
        .map(|(_, entry)| entry)
}

/// Everything that does not agree.
///
/// # Errors
/// When the data cannot be read.
pub fn check(sources: &BTreeMap<PathBuf, Source>, findings: &mut Vec<String>) -> Result<()> {
    let coverage = load()?;
    for (name, operations) in &coverage {
        let Some(&call) = Hypercall::ALL.iter().find(|call| flat(call.name()) == flat(name)) else {
            findings.push(format!(
                "{COVERAGE}: [{name}] is no hypercall of the table in hypercall-abi/src/hypercalls.rs"
            ));
            continue;
        };
        for (operation, entry) in operations {
            line(call, operation, entry, findings);
        }
    }
    for call in Hypercall::ALL.iter().filter(|call| call.answer() == Answer::Handled) {
        if !coverage.keys().any(|name| flat(name) == flat(call.name())) {
            findings.push(format!("{COVERAGE}: no table for `{}`, which the dispatcher has", call.name()));
        }
    }
    handlers(sources, findings);
    without_case(&coverage, findings)
}

/// What the hypervisor handles and no case shows: hypercalls, operations and documented errors that are listed, and no others.
fn without_case(coverage: &Coverage, findings: &mut Vec<String>) -> Result<()> {
    let text = String::from_utf8(sh::read(&sh::root().join(WITHOUT_CASE))?)?;
    compare(coverage, &text, findings);
    Ok(())
}

/// Compares what the cases show with what the list admits.
fn compare(coverage: &Coverage, text: &str, findings: &mut Vec<String>) {
    let mut listed = listed(text, findings);
    for (what, shown) in to_show(coverage) {
        let is_listed = listed.remove(what.as_str());
        if !shown && !is_listed {
            findings.push(format!("{COVERAGE}: no case shows {what}, and {WITHOUT_CASE} has no line for it"));
        } else if shown && is_listed {
            findings.push(format!("{WITHOUT_CASE}: {what} has a case: take it off"));
        }
    }
    findings.extend(listed.into_iter().map(|what| {
        format!(
            "{WITHOUT_CASE}: {what} is no hypercall or operation that is handled, nor an error that its table lists"
        )
    }));
}

/// Everything that a case has to show, and whether one does: success and documented errors of each operation, errors that the
/// operations of a hypercall share, and success and errors of a hypercall without operations.
fn to_show(coverage: &Coverage) -> Vec<(String, bool)> {
    let mut list = Vec::new();
    for &call in Hypercall::ALL.iter().filter(|call| call.answer() == Answer::Handled) {
        let lines = lines(coverage, call);
        if families(call).next().is_none() {
            list.push((call.name().to_owned(), lines.is_some_and(|lines| lines.contains_key(CALL))));
        }
        let of_call: Vec<&Entry> = lines
            .into_iter()
            .flatten()
            .filter(|(name, _)| is_of_call(name))
            .map(|(_, entry)| entry)
            .collect();
        for errno in errors(call.facts()) {
            let shown = of_call.iter().any(|entry| entry.errors.contains_key(errno));
            list.push((format!("{} {errno}", call.name()), shown));
        }
        for family in families(call) {
            for operation in family.operations.iter().filter(|operation| operation.answer == Answer::Handled)
            {
                let entry = entry(coverage, family, operation);
                list.push((operation.name.to_owned(), entry.is_some()));
                for errno in errors(&operation.facts) {
                    let shown = entry.is_some_and(|entry| entry.errors.contains_key(errno));
                    list.push((format!("{} {errno}", operation.name), shown));
                }
            }
        }
    }
    list
}

/// The errors that a row documents, each once.
fn errors(facts: &Facts) -> BTreeSet<&'static str> {
    facts.errors.iter().map(|cause| cause.errno.name()).collect()
}

/// The line of a hypercall without operations.
const CALL: &str = "call";

/// Whether a line is about the hypercall as a whole.
fn is_of_call(name: &str) -> bool {
    [CALL, "errors"].contains(&name)
}

/// The lines of a hypercall.
fn lines(coverage: &Coverage, call: Hypercall) -> Option<&BTreeMap<String, Entry>> {
    coverage.iter().find(|(name, _)| flat(name) == flat(call.name())).map(|(_, lines)| lines)
}

/// What a list names, without comments. A line without a reason is a finding.
fn listed<'a>(text: &'a str, findings: &mut Vec<String>) -> BTreeSet<&'a str> {
    let mut listed = BTreeSet::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (what, reason) = line.split_once(':').unwrap_or((line, ""));
        if reason.trim().is_empty() {
            findings.push(format!(
                "{WITHOUT_CASE}: {what} has no reason: write a case, or behind a colon why no guest can bring it about"
            ));
        }
        listed.insert(what.trim());
    }
    listed
}

/// One line of the data.
fn line(call: Hypercall, name: &str, entry: &Entry, findings: &mut Vec<String>) {
    let here = format!("{COVERAGE}: {}.{name}", call.name());
    if !["implemented", "enosys", "refused"].contains(&entry.state.as_str()) {
        findings.push(format!("{here}: state is implemented, enosys or refused"));
    }
    for test in std::iter::once(&entry.test).chain(entry.errors.values()) {
        if !test_exists(test) {
            findings.push(format!("{here}: there is no test `{test}`"));
        }
    }
    let operation = families(call)
        .find_map(|family| family.operations.iter().find(|operation| is_named(family, operation, name)));
    if let Some(refusal) = operation.and_then(|operation| operation.answer.refusal()) {
        let state = if refusal == Errno::ENOSYS { "enosys" } else { "refused" };
        if entry.state != state {
            findings.push(format!("{here}: the table answers {}, so state is {state}", refusal.name()));
        }
    }
    let documented = |errno: &str| {
        let of =
            |errors: &[hypercall_abi::table::Cause]| errors.iter().any(|cause| cause.errno.name() == errno);
        of(call.facts().errors) || operation.is_some_and(|operation| of(operation.facts.errors))
    };
    for errno in entry.errors.keys().filter(|errno| !documented(errno)) {
        findings
            .push(format!("{here}: a case shows {errno}, which the table of hypercall-abi does not list"));
    }
}

/// The handlers name each operation that is theirs, and none that the table answers.
fn handlers(sources: &BTreeMap<PathBuf, Source>, findings: &mut Vec<String>) {
    let code: String = sources
        .iter()
        .filter(|(path, _)| path.starts_with(HANDLERS) && !is_test(path))
        .flat_map(|(_, source)| {
            let test = |line: usize| source.test.get(line).copied().unwrap_or(false);
            source.code.lines().enumerate().filter(move |(line, _)| !test(*line)).map(|(_, text)| text)
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    for family in FAMILIES.iter().filter(|family| family.call.answer() == Answer::Handled) {
        for operation in family.operations {
            let word = format!("{}::{}", family.name, operation.variant);
            let named = source::words(&code, &word).next().is_some();
            match operation.answer {
                Answer::Handled if !named => findings.push(format!(
                    "{HANDLERS}: the table says that `{word}` is handled, but no handler names it"
                )),
                Answer::Refused(_) | Answer::LeftOut(..) if named => findings.push(format!(
                    "{HANDLERS}: a handler names `{word}`, but the table refuses it before (hypercall-abi/src/subops)"
                )),
                _ => {}
            }
        }
    }
}

/// Files of the handlers' folder that are tests as a whole.
fn is_test(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem == "tests" || stem == "fuzz")
}

/// Whether a test of the data is there: `file::function` of the conformance guests, or `scenario:NAME`.
fn test_exists(test: &str) -> bool {
    if let Some(name) = test.strip_prefix("scenario:") {
        return sh::root().join(format!("tests/scenarios/{name}.toml")).is_file();
    }
    let Some((file, function)) = test.split_once("::") else { return false };
    let path = sh::root().join(format!("tests/conformance/src/bin/{file}.rs"));
    std::fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("\nfn {function}(")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercall_abi::subops::{EvtchnOp, MmuextCmd, VmAssist};

    fn short(family: &'static Family, number: usize) -> &'static str {
        short_name(family, &family.operations[number])
    }

    #[test]
    fn short_names_have_no_prefix() {
        assert_eq!(short(EvtchnOp::FAMILY, 0), "bind_interdomain");
        assert_eq!(short(MmuextCmd::FAMILY, 4), "UNPIN_TABLE");
        assert_eq!(short(VmAssist::FAMILY, 0), "4gb_segments");
    }

    #[test]
    fn a_line_with_the_wrong_state_or_case_is_found() {
        let mut findings = Vec::new();
        let mut entry = Entry {
            state: "implemented".to_owned(),
            test: "mmu::super_pages_are_gone".to_owned(),
            errors: BTreeMap::new(),
        };
        line(Hypercall::MmuextOp, "mark_super", &entry, &mut findings);
        assert_eq!(findings.len(), 1, "{findings:?}");
        entry.state = "refused".to_owned();
        line(Hypercall::MmuextOp, "mark_super", &entry, &mut findings);
        assert_eq!(findings.len(), 1, "{findings:?}");
        entry.test = "mmu::nobody_wrote_this".to_owned();
        line(Hypercall::MmuextOp, "mark_super", &entry, &mut findings);
        assert_eq!(findings.len(), 2, "{findings:?}");
    }

    #[test]
    fn what_no_case_shows_is_found() -> Result<()> {
        let full = load()?;
        let mut findings = Vec::new();
        without_case(&full, &mut findings)?;
        assert_eq!(findings, Vec::<String>::new());
        let text = String::from_utf8(sh::read(&sh::root().join(WITHOUT_CASE))?)?;
        // An operation's error, the error of a hypercall without operations, one that all operations share, a success.
        for (call, line, errno) in [
            ("event_channel_op", "bind_virq", Some("EEXIST")),
            ("set_gdt", "errors", Some("EFAULT")),
            ("sched_op", "errors", Some("EFAULT")),
            ("set_timer_op", "call", None),
        ] {
            let mut coverage = load()?;
            let lines = coverage.get_mut(call).context("the hypercall has its table")?;
            match errno {
                Some(errno) => drop(lines.get_mut(line).and_then(|entry| entry.errors.remove(errno))),
                None => drop(lines.remove(line)),
            }
            let mut findings = Vec::new();
            compare(&coverage, &text, &mut findings);
            assert_eq!(findings.len(), 1, "{call} {line}: {findings:?}");
        }
        Ok(())
    }

    #[test]
    fn what_has_a_case_is_not_listed() -> Result<()> {
        let mut findings = Vec::new();
        let text = String::from_utf8(sh::read(&sh::root().join(WITHOUT_CASE))?)?;
        let more = text + "set_gdt EFAULT: nobody tries\nset_gdt ENOENT: there is no such error\n";
        compare(&load()?, &more, &mut findings);
        assert_eq!(findings.len(), 2, "{findings:?}");
        Ok(())
    }

    #[test]
    fn a_list_has_comments_and_each_line_its_reason() {
        let text = "# none\nXENMEM_exchange ENOMEM: needs a host without memory\nSCHEDOP_shutdown\nset_gdt EINVAL: \n";
        let mut findings = Vec::new();
        let wanted = ["SCHEDOP_shutdown", "XENMEM_exchange ENOMEM", "set_gdt EINVAL"];
        assert_eq!(listed(text, &mut findings).into_iter().collect::<Vec<_>>(), wanted);
        assert_eq!(findings.len(), 2, "{findings:?}");
    }

    #[test]
    fn a_handler_that_forgets_an_operation_is_found() -> Result<()> {
        let mut sources = BTreeMap::new();
        for path in source::files()?.into_iter().filter(|path| path.starts_with(HANDLERS)) {
            sources.insert(path.clone(), Source::load(&path)?);
        }
        let mut findings = Vec::new();
        handlers(&sources, &mut findings);
        assert_eq!(findings, Vec::<String>::new());
        sources.remove(Path::new("kernel/src/hypercall/console_io.rs"));
        handlers(&sources, &mut findings);
        assert_eq!(findings.len(), 2, "{findings:?}");
        Ok(())
    }
}

//! `cargo xtask docs`: the reference pages of the ABI, from the tables of `hypercall-abi` and from `coverage.toml`.

use crate::coverage::{self, Coverage, Entry};
use crate::sh;
use crate::structures::{self, Structure};
use anyhow::Result;
use hypercall_abi::Hypercall;
use hypercall_abi::table::{Answer, Argument, Caller, Cause, Direction, Facts, Family, Operation};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::ExitCode;

/// Where the pages are.
const FOLDER: &str = "docs/book/src/abi";

/// What a page begins with.
const NOTICE: &str =
    "<!-- Written by `cargo xtask docs` from hypercall-abi and docs/abi/coverage.toml: change those. -->\n\n";

/// Name, title and introduction of the pages that hypercalls are sorted into.
const PAGES: &[(&str, &str, &str)] = &[
    (
        "page-tables",
        "Page tables",
        "A guest's page tables are frames that it cannot write; each change is checked first. [Memory](../memory-types.md) tells by which rules.",
    ),
    (
        "memory",
        "Memory",
        "Frames come and go in extents of 2^n frames. [Domains](../domains.md) tells what a domain may have.",
    ),
    (
        "grants",
        "Grants",
        "Memory shared with a named domain. [Grants](../grants.md) tells how an entry is used by both sides.",
    ),
    (
        "events",
        "Events",
        "Interrupts between domains, from devices and from the hypervisor. [Event channels](../event-channels.md) argues why none is lost.",
    ),
    (
        "processor",
        "Virtual processors",
        "What a vCPU is, where it is entered, when it runs. [Traps](../traps.md) tells how a guest is entered.",
    ),
    (
        "devices",
        "Interrupts, ports, console",
        "What touches the machine, for domains that were given a part of it.",
    ),
    ("hypervisor", "About the hypervisor", "Facts, assists, and lists of calls."),
    (
        "machine",
        "The machine, and other kinds of guests",
        "Calls that an unprivileged 64-bit PV guest is refused, on Xen too.",
    ),
];

/// The page of a hypercall.
fn page(call: Hypercall) -> &'static str {
    use Hypercall::*;
    match call {
        MmuUpdate | MmuextOp | UpdateVaMapping | UpdateVaMappingOtherdomain => "page-tables",
        MemoryOp => "memory",
        GrantTableOp => "grants",
        EventChannelOp | EventChannelOpCompat => "events",
        SetTrapTable | SetGdt | StackSwitch | SetCallbacks | FpuTaskswitch | SchedOpCompat | SetDebugreg
        | GetDebugreg | UpdateDescriptor | SetTimerOp | Iret | VcpuOp | SetSegmentBase | NmiOp | SchedOp
        | CallbackOp => "processor",
        PhysdevOp | PhysdevOpCompat | ConsoleIo => "devices",
        XenVersion | VmAssist | Multicall => "hypervisor",
        PlatformOp | XsmOp | XenoprofOp | HvmOp | Sysctl | Domctl | KexecOp | TmemOp | ArgoOp | XenpmuOp
        | DmOp | HypfsOp | Arch0 | Arch1 | Arch2 | Arch3 | Arch4 | Arch5 | Arch6 | Arch7 => "machine",
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Write nothing; fail when a page is not what it would be
    #[arg(long)]
    check: bool,
}

pub fn main(args: Args) -> Result<ExitCode> {
    let mut stale = 0;
    for (path, text) in pages()? {
        if sh::read(&sh::root().join(&path)).is_ok_and(|old| old == text.as_bytes()) {
            continue;
        }
        stale += 1;
        println!("{path}{}", if args.check { ": stale" } else { "" });
        if !args.check {
            sh::write(&sh::root().join(&path), text.as_bytes())?;
        }
    }
    println!("{}", uncovered(&coverage::load()?));
    Ok(if args.check && stale > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Pages that are not what the tables say.
///
/// # Errors
/// When sources or data cannot be read.
pub fn check(findings: &mut Vec<String>) -> Result<()> {
    for (path, text) in pages()? {
        if !sh::read(&sh::root().join(&path)).is_ok_and(|old| old == text.as_bytes()) {
            findings
                .push(format!("{path}: not what the tables of hypercall-abi say; run `cargo xtask docs`"));
        }
    }
    Ok(())
}

/// How many operations and documented errors no case shows.
fn uncovered(coverage: &Coverage) -> String {
    let (mut operations, mut errors, mut all_operations, mut all_errors) = (0, 0, 0, 0);
    for call in Hypercall::ALL.iter().filter(|call| call.answer() == Answer::Handled) {
        for family in coverage::families(*call) {
            for operation in family.operations {
                let entry = coverage::entry(coverage, family, operation);
                all_operations += 1;
                operations += usize::from(entry.is_none());
                let names: BTreeSet<&str> = operation.facts.errors.iter().map(|c| c.errno.name()).collect();
                all_errors += names.len();
                errors +=
                    names.iter().filter(|name| entry.is_none_or(|e| !e.errors.contains_key(**name))).count();
            }
        }
    }
    format!(
        "no case is named for {operations} of {all_operations} operations, {errors} of {all_errors} of their errors"
    )
}

/// Path below the root and text of each page.
fn pages() -> Result<Vec<(String, String)>> {
    let coverage = coverage::load()?;
    let structures = structures::all()?;
    let mut pages = vec![(format!("{FOLDER}/README.md"), index())];
    let mut shown = BTreeSet::new();
    for (name, title, about) in PAGES {
        let mut text = format!("{NOTICE}# {title}\n\n{about}\n");
        let mut used = Vec::new();
        for &call in Hypercall::ALL.iter().filter(|call| page(**call) == *name) {
            hypercall(&mut text, call, &coverage, &structures, &mut used);
        }
        used.retain(|rust| shown.insert(*rust));
        if !used.is_empty() {
            text.push_str("\n## Structures\n");
        }
        for rust in used {
            if let Some(structure) = structures.get(rust) {
                describe(&mut text, structure);
            }
        }
        pages.push((format!("{FOLDER}/{name}.md"), text));
    }
    let rest = |io: bool| {
        structures
            .values()
            .filter(|s| !shown.contains(s.rust) && s.rust.starts_with("io::") == io)
            .collect::<Vec<_>>()
    };
    let more = "Structures of Xen's public headers that are not an argument by themselves: shared pages, start of day, parts.";
    pages.push((format!("{FOLDER}/shared.md"), list("Shared structures", more, &rest(false))));
    let more = "Rings and messages between frontends and backends. The hypervisor knows none of them.";
    pages.push((format!("{FOLDER}/protocols.md"), list("Device protocols", more, &rest(true))));
    Ok(pages)
}

fn list(title: &str, about: &str, structures: &[&Structure]) -> String {
    let mut text = format!("{NOTICE}# {title}\n\n{about}\n");
    for structure in structures {
        describe(&mut text, structure);
    }
    text
}

fn index() -> String {
    let mut text = format!(
        "{NOTICE}# The ABI\n\nXen's 64-bit PV ABI, version 4.17, as Xenolith answers it. The number goes to rax, up to six arguments to rdi, \
         rsi, rdx, r10, r8 and r9; SYSCALL enters the hypervisor. The result is in rax, an error as the negative of its number. \
         rcx and r11 are lost, all other registers are kept. Pointers are virtual addresses of the caller.\n\n\
         Pages: "
    );
    let pages: Vec<String> = PAGES
        .iter()
        .map(|(name, title, _)| format!("[{title}]({name}.md)"))
        .chain(["[Shared structures](shared.md)".to_owned(), "[Device protocols](protocols.md)".to_owned()])
        .collect();
    let _ = writeln!(text, "{}.\n", pages.join(", "));
    text.push_str("Numbers that are not in this table are `ENOSYS`.\n\n| number | hypercall | arguments | answer |\n|---|---|---|---|\n");
    for &call in Hypercall::ALL {
        let _ = writeln!(
            text,
            "| {} | [{}]({}.md#{}) | {} | {} |",
            call.number(),
            call.name(),
            page(call),
            anchor(call),
            call.arguments().join(", "),
            answer_word(call.answer()),
        );
    }
    text.push_str(
        "\n## Left out on purpose\n\nWhat Xen carries out for such a guest, and Xenolith does not:\n\n",
    );
    let calls = Hypercall::ALL.iter().map(|call| (call.name(), call.answer()));
    let operations = hypercall_abi::subops::FAMILIES.iter().flat_map(|family| family.operations);
    let mut any = false;
    for (name, answer) in calls.chain(operations.map(|operation| (operation.name, operation.answer))) {
        if let Answer::LeftOut(errno, why) = answer {
            let _ = writeln!(text, "- `{name}`, `{}`: {why}.", errno.name());
            any = true;
        }
    }
    if !any {
        text.push_str("Nothing.\n");
    }
    text
}

/// The anchor that mdbook and GitHub make of a hypercall's title.
fn anchor(call: Hypercall) -> String {
    format!("{}-{}", call.name(), call.number())
}

fn answer_word(answer: Answer) -> String {
    match answer {
        Answer::Handled => "implemented".to_owned(),
        Answer::Refused(errno) => format!("`{}`, whatever the arguments", errno.name()),
        Answer::LeftOut(errno, _) => format!("`{}`, left out", errno.name()),
    }
}

fn hypercall(
    text: &mut String,
    call: Hypercall,
    coverage: &Coverage,
    structures: &BTreeMap<&'static str, Structure>,
    used: &mut Vec<&'static str>,
) {
    let _ = writeln!(text, "\n## {} ({})\n\n{}\n", call.name(), call.number(), call.description());
    let _ = writeln!(text, "- arguments: {}", names(call.arguments()));
    let _ = writeln!(text, "- caller: {}", call.caller().describe());
    let refused = call.answer() != Answer::Handled;
    let families: Vec<&Family> = coverage::families(call).collect();
    let lines = coverage.iter().find(|(name, _)| coverage::flat(name) == coverage::flat(call.name()));
    let whole = lines.and_then(|(_, lines)| lines.get("call"));
    let _ = writeln!(text, "- answer: {}", answer_line(call.answer()));
    if families.is_empty() {
        facts(text, call.facts(), structures, used, refused);
        shown_by(text, whole);
        errors(text, call.facts().errors, whole);
        rules(text, call.facts().rules);
        return;
    }
    if let Argument::Structure(..) | Argument::Value(_) = call.facts().takes {
        argument(text, call.facts().takes, structures, used);
    }
    shown_by(text, whole);
    errors(text, call.facts().errors, whole);
    statuses(text, call.facts().statuses);
    rules(text, call.facts().rules);
    for family in families {
        let _ = writeln!(
            text,
            "\n{} The low {} bits of the number are looked at; numbers of nobody are `{}`.",
            prose(family.description),
            family.bits,
            family.unknown.name()
        );
        if refused {
            let _ = writeln!(
                text,
                "\nAll are refused as the hypercall is:\n\n| number | name | what it does |\n|---|---|---|"
            );
            for operation in family.operations {
                let _ = writeln!(
                    text,
                    "| {} | `{}` | {} |",
                    operation.number,
                    operation.name,
                    prose(operation.description)
                );
            }
            continue;
        }
        for operation in family.operations {
            one_operation(text, family, operation, coverage, structures, used);
        }
    }
    let known = |name: &str| {
        coverage::families(call).any(|family| {
            family.operations.iter().any(|operation| coverage::is_named(family, operation, name))
        })
    };
    let more: Vec<String> = lines
        .into_iter()
        .flat_map(|(_, lines)| lines)
        .filter(|(name, _)| *name != "call" && !known(name))
        .map(|(name, entry)| format!("`{}` ({})", entry.test, name.replace('_', " ")))
        .collect();
    if !more.is_empty() {
        let _ = writeln!(text, "\nAlso shown by {}.", more.join(", "));
    }
}

fn names(arguments: &[&str]) -> String {
    if arguments.is_empty() {
        return "none".to_owned();
    }
    let registers = ["rdi", "rsi", "rdx", "r10", "r8"];
    let pairs: Vec<String> =
        arguments.iter().zip(registers).map(|(name, register)| format!("{name} ({register})")).collect();
    pairs.join(", ")
}

fn answer_line(answer: Answer) -> String {
    match answer {
        Answer::Handled => "implemented".to_owned(),
        Answer::Refused(errno) => {
            format!("refused with `{}` whatever the arguments are, as Xen does", errno.name())
        }
        Answer::LeftOut(errno, why) => format!("left out: `{}`; {why}", errno.name()),
    }
}

fn one_operation(
    text: &mut String,
    family: &Family,
    operation: &Operation,
    coverage: &Coverage,
    structures: &BTreeMap<&'static str, Structure>,
    used: &mut Vec<&'static str>,
) {
    let _ = writeln!(
        text,
        "\n### {} ({})\n\n{}\n",
        operation.name,
        operation.number,
        prose(operation.description)
    );
    if operation.caller != Caller::Guest {
        let _ = writeln!(text, "- caller: {}", operation.caller.describe());
    }
    let refused = operation.answer != Answer::Handled;
    if refused {
        let _ = writeln!(text, "- answer: {}", answer_line(operation.answer));
    }
    facts(text, &operation.facts, structures, used, refused);
    let entry = coverage::entry(coverage, family, operation);
    shown_by(text, entry);
    errors(text, operation.facts.errors, entry);
    statuses(text, operation.facts.statuses);
    rules(text, operation.facts.rules);
}

fn facts(
    text: &mut String,
    facts: &Facts,
    structures: &BTreeMap<&'static str, Structure>,
    used: &mut Vec<&'static str>,
    refused: bool,
) {
    argument(text, facts.takes, structures, used);
    if !refused {
        let _ = writeln!(text, "- returns: {}", facts.returns);
    }
}

fn argument(
    text: &mut String,
    takes: Argument,
    structures: &BTreeMap<&'static str, Structure>,
    used: &mut Vec<&'static str>,
) {
    match takes {
        Argument::None => {}
        Argument::Value(what) => {
            let _ = writeln!(text, "- argument: {what}");
        }
        Argument::Structure(direction, rust) => {
            let direction = match direction {
                Direction::In => "in",
                Direction::Out => "out",
                Direction::InOut => "in and out",
            };
            let c = structures.get(rust).map_or(rust, |structure| structure.c);
            let _ = writeln!(text, "- argument: {direction}, `{c}`");
            if !used.contains(&rust) {
                used.push(rust);
            }
        }
    }
}

fn shown_by(text: &mut String, entry: Option<&Entry>) {
    match entry {
        Some(entry) => {
            let _ = writeln!(text, "- shown by: `{}`", entry.test);
        }
        None => {
            let _ = writeln!(text, "- shown by: no case of its own");
        }
    }
}

fn errors(text: &mut String, causes: &[Cause], entry: Option<&Entry>) {
    if causes.is_empty() {
        return;
    }
    text.push_str("\n| error | cause | shown by |\n|---|---|---|\n");
    for cause in causes {
        let name = cause.errno.name();
        let test =
            entry.and_then(|entry| entry.errors.get(name)).map_or(String::new(), |test| format!("`{test}`"));
        let _ = writeln!(text, "| `{name}` | {} | {test} |", cause.why);
    }
}

fn statuses(text: &mut String, statuses: &[(&str, &str)]) {
    if statuses.is_empty() {
        return;
    }
    text.push_str("\n| status | meaning |\n|---|---|\n");
    for (name, meaning) in statuses {
        let _ = writeln!(text, "| `{name}` | {meaning} |");
    }
}

fn rules(text: &mut String, rules: &[&str]) {
    if !rules.is_empty() {
        text.push('\n');
    }
    for rule in rules {
        let _ = writeln!(text, "- {rule}");
    }
}

/// A structure: what it is for, then its fields.
fn describe(text: &mut String, structure: &Structure) {
    let _ = writeln!(
        text,
        "\n### {}\n\n{}\n\n{} bytes; `hypercall_abi::{}` in Rust.\n",
        structure.c,
        prose(&structure.description),
        structure.size,
        structure.rust
    );
    text.push_str("| offset | field | type | meaning |\n|---|---|---|---|\n");
    for field in &structure.fields {
        let _ = writeln!(
            text,
            "| {} | {} | `{}` | {} |",
            field.offset,
            field.c,
            field.kind,
            prose(&field.description)
        );
    }
}

/// Documentation as the pages want it: one line, links to Rust items as their names.
fn prose(text: &str) -> String {
    let mut out = String::new();
    let joined = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut rest = joined.as_str();
    while let Some(open) = rest.find("[`") {
        let (before, link) = rest.split_at(open);
        out.push_str(before);
        let Some(close) = link.find("`]") else { break };
        out.push_str(&link[1..=close]);
        rest = &link[close + 2..];
        if rest.starts_with('(')
            && let Some(end) = rest.find(')')
        {
            rest = &rest[end + 1..];
        }
    }
    out.push_str(rest);
    out.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_items_become_their_names() {
        assert_eq!(prose("in [`A::b`](crate::A::b), of\n [`C`]; [d](e.md)"), "in `A::b`, of `C`; [d](e.md)");
    }

    #[test]
    fn every_page_is_somebodys() {
        for call in Hypercall::ALL {
            assert!(PAGES.iter().any(|(name, ..)| *name == page(*call)), "{}", call.name());
        }
    }

    #[test]
    fn every_structure_that_is_an_argument_has_a_layout() -> Result<()> {
        let structures = structures::all()?;
        let operations = hypercall_abi::subops::FAMILIES.iter().flat_map(|family| family.operations);
        let all = Hypercall::ALL
            .iter()
            .map(|call| call.facts())
            .chain(operations.map(|operation| &operation.facts));
        for facts in all {
            if let Argument::Structure(_, rust) = facts.takes {
                assert!(structures.contains_key(rust), "{rust} is not in hypercall-abi/src/layout.rs");
            }
        }
        Ok(())
    }
}

//! `cargo xtask tidy`: house rules that the compiler does not know. Each finding names the file, the line and what to do.

use crate::sh;
use crate::source::{self, Source};
use crate::{coverage, docs};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {}

/// Parts of the hypervisor that may hold unsafe code. Everything else is policy and must have `forbid(unsafe_code)` in
/// effect. A folder stands for all inside. Adding to this list is a decision for a design record.
const CELLS: &[&str] = &[
    // Mechanism: assembly, registers, page tables.
    "kernel/src/arch",
    // The binary: what only an image has.
    "kernel/src/main.rs",
    "kernel/src/rt.rs",
    // The library's root declares the modules; it cannot forbid for the cells.
    "kernel/src/lib.rs",
    // The boot heap.
    "kernel/src/heap.rs",
    // Locks.
    "kernel/src/sync",
    "kernel/src/percpu.rs",
];

/// Where errno values may be named: the border to guests.
const ERRNO_BORDER: &str = "kernel/src/hypercall";

pub fn main(_: Args) -> Result<ExitCode> {
    let findings = check()?;
    findings.iter().for_each(|finding| println!("{finding}"));
    if !findings.is_empty() {
        bail!("{} findings, listed above", findings.len());
    }
    println!("tidy");
    Ok(ExitCode::SUCCESS)
}

/// Everything that is not as it should be; empty when all is.
///
/// # Errors
/// When a file cannot be read.
pub fn check() -> Result<Vec<String>> {
    let files = source::files()?;
    let mut findings = Vec::new();
    let mut sources = BTreeMap::new();
    for path in files.iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs")) {
        sources.insert(path.clone(), Source::load(path)?);
    }
    policy(&sources, &mut findings);
    errno(&sources, &mut findings);
    unfinished(&sources, &mut findings);
    machine_paths(&files, &mut findings)?;
    links(&files, &mut findings)?;
    coverage::check(&sources, &mut findings)?;
    docs::check(&mut findings)?;
    Ok(findings)
}

fn is_cell(path: &Path) -> bool {
    CELLS.iter().any(|cell| path.starts_with(cell))
}

/// Policy files forbid unsafe and do not know the machine.
fn policy(sources: &BTreeMap<PathBuf, Source>, findings: &mut Vec<String>) {
    for (path, source) in sources.iter().filter(|(path, _)| path.starts_with("kernel/src") && !is_cell(path))
    {
        if !forbids_unsafe(path, sources) {
            findings.push(format!(
                "{}: policy without `#![forbid(unsafe_code)]`, here or in a module above; if it must be a cell, list it \
                 in xtask/src/tidy.rs",
                path.display()
            ));
        }
        for at in source::words(&source.code, "arch") {
            let before = source.code[..at].trim_end();
            if before.ends_with("crate::") || before.ends_with("super::") {
                let line = source.code[..at].matches('\n').count() + 1;
                findings.push(format!(
                    "{}:{line}: policy names `arch`; go through the Platform trait (kernel/src/platform.rs)",
                    path.display()
                ));
            }
        }
    }
}

/// Whether a file or a module above it says `#![forbid(unsafe_code)]`.
fn forbids_unsafe(path: &Path, sources: &BTreeMap<PathBuf, Source>) -> bool {
    let says = |path: &Path| {
        sources.get(path).is_some_and(|source| {
            let code: String = source.code.split_whitespace().collect();
            code.contains("#![forbid(unsafe_code")
        })
    };
    if says(path) {
        return true;
    }
    path.ancestors()
        .skip(1)
        .take_while(|dir| dir.starts_with("kernel/src") && *dir != Path::new("kernel/src"))
        .any(|dir| says(&dir.join("mod.rs")) || says(&dir.with_extension("rs")))
}

/// Subsystems have errors of their own; errno is for guests.
fn errno(sources: &BTreeMap<PathBuf, Source>, findings: &mut Vec<String>) {
    for (path, source) in sources.iter().filter(|(path, _)| path.starts_with("kernel/src")) {
        if path.starts_with(ERRNO_BORDER) {
            continue;
        }
        if let Some(at) = source::words(&source.code, "Errno").next() {
            let line = source.code[..at].matches('\n').count();
            if source.test.get(line) == Some(&true) {
                continue;
            }
            findings.push(format!(
                "{}:{}: `Errno` outside {ERRNO_BORDER}; return the subsystem's error and translate it there",
                path.display(),
                line + 1
            ));
        }
    }
}

/// No stubs.
fn unfinished(sources: &BTreeMap<PathBuf, Source>, findings: &mut Vec<String>) {
    for (path, source) in sources {
        for word in ["todo", "unimplemented"] {
            for at in
                source::words(&source.code, word).filter(|at| source.code[at + word.len()..].starts_with('!'))
            {
                let line = source.code[..at].matches('\n').count() + 1;
                findings.push(format!("{}:{line}: `{word}!`: finish it or leave it out", path.display()));
            }
        }
    }
}

/// Nothing in the repository belongs to one machine: no home folder, and no path that this checkout lies below.
fn machine_paths(files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    let top = sh::root().components().nth(1).map(|part| part.as_os_str().to_string_lossy().into_owned());
    let shared = ["usr", "opt", "tmp", "var", "mnt", "srv"];
    let mut roots: Vec<String> = ["home", "root"].map(|name| format!("/{name}/")).into();
    roots.extend(top.filter(|top| !shared.contains(&top.as_str())).map(|top| format!("/{top}/")));
    for path in files {
        let bytes = sh::read(&sh::root().join(path))?;
        let Ok(text) = std::str::from_utf8(&bytes) else { continue };
        for (number, line) in text.lines().enumerate() {
            if let Some(found) = roots.iter().find(|root| line.contains(*root)) {
                findings.push(format!("{}:{}: `{found}` is of one machine only", path.display(), number + 1));
            }
        }
    }
    Ok(())
}

/// Links between pages lead somewhere, and the book's table of contents is complete.
fn links(files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    let summary = Path::new("docs/book/src/SUMMARY.md");
    let mut chapters: BTreeSet<PathBuf> = BTreeSet::new();
    for path in files.iter().filter(|path| path.extension().is_some_and(|ext| ext == "md")) {
        let text = String::from_utf8(sh::read(&sh::root().join(path))?)
            .with_context(|| format!("{} is not UTF-8", path.display()))?;
        let here = path.parent().unwrap_or(Path::new(""));
        for target in targets(&text) {
            let target = here.join(target);
            if !sh::root().join(&target).exists() {
                findings.push(format!("{}: the link to {} leads nowhere", path.display(), target.display()));
            }
            if path == summary {
                chapters.insert(target);
            }
        }
    }
    let in_book = |path: &&PathBuf| {
        path.starts_with("docs/book/src") && path.extension().is_some_and(|ext| ext == "md")
    };
    for path in files.iter().filter(in_book) {
        if path != summary && !chapters.contains(path) {
            findings.push(format!("{}: not listed in {}", path.display(), summary.display()));
        }
    }
    Ok(())
}

/// Files that a page links to.
fn targets(text: &str) -> Vec<&str> {
    let after = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let file = |target: &&str| {
        !target.contains("://") && !target.starts_with('#') && !target.contains(char::is_whitespace)
    };
    after
        .map(|target| target.split('#').next().unwrap_or(target))
        .filter(|t| !t.is_empty())
        .filter(file)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_files_that_a_page_links_to() {
        let text = "[a](b.md#c) ![d](e/f.png) [g](#h) [i](https://j.example/k) `l[m](n o)`";
        assert_eq!(targets(text), ["b.md", "e/f.png"]);
    }

    #[test]
    fn cells_are_whole_folders_or_single_files() {
        assert!(is_cell(Path::new("kernel/src/arch/x86_64/fpu.rs")));
        assert!(is_cell(Path::new("kernel/src/main.rs")));
        assert!(!is_cell(Path::new("kernel/src/mm/page_info.rs")));
        assert!(!is_cell(Path::new("kernel/src/archive.rs")));
    }
}

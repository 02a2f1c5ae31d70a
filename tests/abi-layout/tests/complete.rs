//! Nothing of the crate goes unchecked: each structure has a row in the layout table, each of its fields stands there, and each
//! constant is compared in `constants.rs`, or is listed here with the reason why no header can say it.
//!
//! Read from the crate's source as rustfmt writes it, so that what nobody listed is found.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Structures without a row.
const STRUCTURES: &[(&str, &str)] = &[
    ("memory::E820Entry", "the firmware's format: no Xen header has it"),
    ("platform::PlatformHeader", "the head of a union: constants.rs compares where the union begins"),
    ("xen_header::XenControlHeader", "likewise"),
    ("start_info::ConsoleStart", "a member without a name of its own in C: constants.rs compares its parts"),
    ("start_info::Dom0ConsoleStart", "likewise"),
];

/// Constants that are not compared.
const CONSTANTS: &[(&str, &str)] = &[
    ("OWNER", "text"),
    ("MAGIC", "text"),
    ("ABI", "text"),
    ("PAGE_SHIFT", "the processor's"),
    ("PAGE_SIZE", "the processor's"),
    ("PTE_FRAME_MASK", "the processor's"),
    ("PTES_PER_TABLE", "the processor's"),
    (
        "PRESENT WRITABLE USER WRITE_THROUGH CACHE_DISABLE ACCESSED DIRTY PAT_OR_LARGE GLOBAL NO_EXECUTE",
        "the processor's",
    ),
    ("AVAIL0 AVAIL1 AVAIL2 AVAIL_HIGH", "the processor's"),
    ("DPL_MASK", "a comment in the header, no constant"),
    ("MASK_EVENTS", "a comment in the header, no constant"),
    ("COMMAND_MASK", "a comment in the header, no constant"),
    ("SECTOR_SIZE", "a comment in the header, no constant"),
    ("HYPERCALL_PAGE_STUBS", "a comment in the header, no constant"),
    ("HYPERCALL_STUB_SIZE", "a comment in the header, no constant"),
    ("POLL_MAX_PORTS", "the hypervisor's own limit"),
    ("MEMOP_EXTENT_SHIFT", "between the hypervisor and itself, through the guest's registers"),
    ("MEMOP_CMD_MASK", "likewise"),
    ("MMU_UPDATE_PREEMPTED", "likewise"),
    ("EMULATE_PREFIX", "assembly in the header"),
    (
        "E820_RAM E820_RESERVED E820_ACPI E820_NVS E820_UNUSABLE E820_MAX",
        "the firmware's format: no Xen header has it",
    ),
    ("PERMIT_ACCESS ACCEPT_TRANSFER TRANSITIVE", "kinds, compared as the GTF_ constants that they are"),
    ("GRANT_MAP_IDENTITY", "the header has it in a comment, as a number not to be used again"),
    ("PAYLOAD_SIZE", "the size of a field, compared as such"),
    ("COMMAND", "a variant of an enum that is compared"),
    ("NS_PER_SECOND", "arithmetic"),
    ("DM_OP_MAX_BUFFERS XENTRACE_MAX_EVENT", "the hypervisor's own limits"),
    ("INITIAL ZERO NULL", "values, not facts"),
];

fn source_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .expect("the crate's source")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    entries.sort();
    for path in entries {
        // The control interface is the project's own.
        if path.is_dir() && !path.ends_with("control") {
            source_files(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Module and text of each file, tests left out.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../hypercall-abi/src");
    let mut files = Vec::new();
    source_files(&root, &mut files);
    files
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("UTF-8");
            let text = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
            let module = path.strip_prefix(&root).expect("below the root").with_extension("");
            let parts: Vec<_> = module.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            (parts.join("::"), text)
        })
        // The tables themselves, and what is the project's own.
        .filter(|(module, _)| !["layout", "table", "constant_answers"].contains(&module.as_str()))
        .collect()
}

fn identifier(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// Whether `text` has `word` as a whole word.
fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|other| other == word)
}

fn excused(list: &[(&str, &str)], name: &str) -> bool {
    list.iter().any(|(names, _)| names.split(' ').any(|other| other == name))
}

macro_rules! rows {
    ($($($module:ident)::+ = $c_type:literal, $size:literal {
        $($field:ident $(= $c_field:literal)? @ $offset:literal),* $(,)?
    };)*) => {
        vec![$((stringify!($($module)::+).replace(' ', ""), vec![$(stringify!($field)),*])),*]
    };
}

#[test]
fn every_structure_and_field_has_a_row() {
    let mut rows: Vec<(String, Vec<&str>)> = hypercall_abi::for_each_layout!(rows);
    rows.extend::<Vec<_>>(hypercall_abi::for_each_control_layout!(rows));
    let mut missing = Vec::new();
    let mut seen = 0;
    for (module, text) in sources() {
        let mut rest = text.as_str();
        while let Some(at) = rest.find("#[repr(C") {
            rest = &rest[at..];
            let Some(start) = rest.find("pub struct ") else { break };
            let end = rest[start..].find("\n}").map_or(rest.len(), |end| start + end);
            let (head, body) = rest[start + "pub struct ".len()..end].split_once('{').unwrap_or_default();
            let name = format!("{module}::{}", identifier(head));
            rest = &rest[end..];
            seen += 1;
            if head.starts_with('$') {
                // A macro's: commands without a payload.
                continue;
            }
            let Some((_, fields)) = rows.iter().find(|(row, _)| *row == name) else {
                if !excused(STRUCTURES, &name) {
                    missing.push(name);
                }
                continue;
            };
            for field in body.lines().filter_map(|line| line.trim().strip_prefix("pub ")).map(identifier) {
                // Padding that C leaves to the compiler: the size and the fields around it fix it.
                let padding =
                    field.strip_prefix("pad").is_some_and(|n| n.chars().all(|c| c.is_ascii_digit()));
                if !padding && !fields.contains(&field) {
                    missing.push(format!("{name}.{field}"));
                }
            }
        }
    }
    assert!(seen > 90, "only {seen} structures were found: the source is written differently");
    assert_eq!(missing, Vec::<String>::new(), "not in hypercall-abi/src/layout.rs");
}

#[test]
fn every_constant_is_compared() {
    let compared =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/constants.rs")).expect("UTF-8");
    let mut missing = BTreeSet::new();
    let mut seen = 0;
    for (module, text) in sources() {
        for line in text.lines().map(str::trim) {
            let Some(constant) = line.strip_prefix("pub const ").or_else(|| line.strip_prefix("const "))
            else {
                continue;
            };
            let name = identifier(constant);
            // Functions, tables of this crate, and names of nodes in xenstore, which are text.
            let text =
                constant.contains("&str =") || constant.starts_with("fn ") || name == "_" || name.is_empty();
            let table = ["ALL", "FAMILY", "FAMILIES", "FACTS", "ERRORS"].contains(&name);
            if text || table || constant.starts_with("unsafe ") {
                continue;
            }
            seen += 1;
            if !has_word(&compared, name) && !excused(CONSTANTS, name) {
                missing.insert(format!("{module}::{name}"));
            }
        }
        // Enums of commands, whose names are the names in C.
        for macro_name in ["command_enum! {", "operations! {"] {
            for (at, _) in text.match_indices(macro_name) {
                let body = text[at + macro_name.len()..].lines().map(str::trim);
                let name =
                    body.skip_while(|line| line.is_empty() || line.starts_with("///")).map(identifier).next();
                let name = name.unwrap_or_default();
                if name.starts_with(char::is_uppercase) {
                    seen += 1;
                    if !has_word(&compared, name) {
                        missing.insert(format!("{module}::{name}"));
                    }
                }
            }
        }
    }
    assert!(seen > 250, "only {seen} constants were found: the source is written differently");
    assert_eq!(missing, BTreeSet::new(), "not in tests/abi-layout/src/constants.rs");
}

#[test]
fn excuses_are_for_something() {
    let all: String = sources().into_iter().map(|(_, text)| text).collect();
    for (names, _) in CONSTANTS {
        for name in names.split(' ') {
            assert!(has_word(&all, name), "{name} is gone: take it off the list");
        }
    }
    for (name, _) in STRUCTURES {
        let (_, name) = name.rsplit_once("::").expect("a path");
        assert!(all.contains(&format!("pub struct {name} {{")), "{name} is gone: take it off the list");
    }
}

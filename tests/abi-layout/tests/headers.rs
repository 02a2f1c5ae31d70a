//! The comparison itself. Without a C compiler or the headers it says so and skips; `XEN_INCLUDE=dir` takes them from elsewhere,
//! `CC=compiler` another compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

fn compiler() -> Command {
    let mut command = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    if let Some(directory) = std::env::var_os("XEN_INCLUDE") {
        command.arg("-I").arg(directory);
    }
    command
}

fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn compile(source: &str, name: &str) -> Result<PathBuf, String> {
    let file = scratch().join(format!("{name}.c"));
    let binary = scratch().join(name);
    std::fs::write(&file, source).map_err(|error| error.to_string())?;
    let output = compiler()
        .args(["-std=gnu11", "-m64", "-w", "-o"])
        .arg(&binary)
        .arg(&file)
        .output()
        .map_err(|error| format!("cannot run the C compiler: {error}"))?;
    if output.status.success() {
        Ok(binary)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Why the comparison cannot be made here, with the line that installs what is missing. Tests run side by side, so each names
/// its own scratch files.
fn missing(test: &str) -> Option<String> {
    if let Err(error) = compile("int main(void) { return 0; }\n", &format!("{test}-compiler")) {
        return Some(format!("no C compiler ({}); install: apt-get install gcc", error.trim()));
    }
    let headers: String = abi_layout::HEADERS.iter().map(|header| format!("#include <{header}>\n")).collect();
    let probe = format!(
        "#include <stdint.h>\n#include <stddef.h>\n#include <errno.h>\n{headers}int main(void) {{ return 0; }}\n"
    );
    let error = compile(&probe, &format!("{test}-headers")).err()?;
    let not_found = error.contains("No such file") || error.contains("file not found");
    // Headers that are there but do not compile are a failure, not a skip: the comparison below will show it.
    not_found
        .then(|| "no public Xen headers; install: apt-get install libxen-dev (or set XEN_INCLUDE)".into())
}

fn run(binary: &Path) -> String {
    let output = Command::new(binary).output().expect("the program that was just compiled can be run");
    assert!(output.status.success(), "the generated program failed");
    String::from_utf8(output.stdout).expect("the program prints numbers")
}

#[test]
fn sizes_offsets_and_constants_are_those_of_the_headers() {
    if let Some(reason) = missing("facts") {
        println!("Test result: SKIP: {reason}");
        eprintln!("SKIP abi-layout: {reason}");
        return;
    }
    let facts = abi_layout::facts();
    let binary = match compile(&abi_layout::program(&facts), "facts") {
        Ok(binary) => binary,
        Err(error) => panic!("the headers lack something that hypercall-abi has:\n{error}"),
    };
    let differences = abi_layout::differences(&facts, &run(&binary));
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        facts.len(),
        differences.join("\n")
    );
    println!("{} facts agree with the headers", facts.len());
}

#[test]
fn a_wrong_offset_would_be_noticed() {
    if let Some(reason) = missing("wrong") {
        eprintln!("SKIP abi-layout: {reason}");
        return;
    }
    let mut facts = abi_layout::facts();
    let fact = facts
        .iter_mut()
        .find(|fact| fact.c.contains("vcpu_guest_context, gs_base_user"))
        .expect("the fact is listed");
    fact.ours += 8;
    let binary = compile(&abi_layout::program(&facts), "wrong").expect("compiles when the other test does");
    assert_eq!(abi_layout::differences(&facts, &run(&binary)).len(), 1);
}

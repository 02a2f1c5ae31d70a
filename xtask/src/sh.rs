//! Child processes: each is echoed before it runs, and a failure names the command.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Root of the repository: the folder above this package.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The cargo that started us, so that a `cargo +toolchain xtask` stays with its toolchain.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The command as a line that can be pasted into a shell.
pub fn line(command: &Command) -> String {
    let mut out = String::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            // Flags are handed over in cargo's encoded form; a shell wants the other one.
            let value = value.to_string_lossy().replace('\u{1f}', " ");
            let name = name.to_string_lossy().replace("CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS");
            out += &format!("{name}={} ", quote(value.as_ref()));
        }
    }
    let program = command.get_program();
    // The full path of cargo says nothing to the reader.
    let program = Path::new(program).file_name().filter(|name| *name == "cargo").unwrap_or(program);
    out += &quote(program);
    for word in command.get_args() {
        out.push(' ');
        out += &quote(word);
    }
    out
}

fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+=./:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Says on stderr what is about to run.
pub fn echo(command: &Command) {
    eprintln!("+ {}", line(command));
}

/// Runs a command whose output the user sees, all of it on stderr: stdout is for what was asked for.
///
/// # Errors
/// When it cannot be started or does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    echo(command);
    command.stdout(Stdio::from(std::io::stderr()));
    let status = command.status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Runs a command and returns what it wrote to stdout; its stderr goes to the user.
///
/// # Errors
/// When it cannot be started or does not succeed.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.stderr(Stdio::inherit()).output().with_context(|| cannot_start(command))?;
    if !out.status.success() {
        bail!("`{}` failed ({})", line(command), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The first line a tool prints about its version, or `None` when it is not there or fails.
pub fn version(program: impl AsRef<OsStr>, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).current_dir(root()).output().ok()?;
    if !out.status.success() {
        return None;
    }
    String::from_utf8_lossy(&out.stdout).lines().next().map(str::to_owned)
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}` (`cargo xtask doctor` says what is missing)", command.get_program().display())
}

/// Whether we are root, read from the owner of our own /proc entry.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Reads a file; the error names it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file and the folders above it; the error names it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

//! `cargo xtask ctl`: dom0's management channel (design record 0065), from the host.
//!
//! `cargo xtask run` puts a socket for it below the target folder, one for each run.

use crate::demo;
use crate::devices::{CHANNEL_PORTS, channel_socket};
use crate::images::Workspace;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Ending of the file that a run locks.
const LOCK: &str = "lock";

/// How long nobody may answer before it is asked again whether somebody is there.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// A command of dom0's shell, as in `ctl -- list --json`; `ctl help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
    /// Print what happens there, a line of JSON each, until this is stopped
    #[arg(long)]
    events: bool,
    /// Which run, when there are several (`cargo xtask run --name NAME`)
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Give up after so many seconds without an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

/// A run's sockets; they go when this is dropped.
pub struct Instance {
    /// Where the first one is.
    pub socket: PathBuf,
    /// Locked as long as the run lasts, however it ends.
    _lock: File,
}

impl Instance {
    /// A place for the socket of a new run.
    ///
    /// # Errors
    /// When there is no such place: the name is taken, or the path is too long for a socket.
    pub fn new(target: &Path, name: Option<&str>) -> Result<Instance> {
        let name = name.map_or_else(|| std::process::id().to_string(), str::to_owned);
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
            bail!("--name {name:?}: use letters, digits, - and _");
        }
        let folder = folder(target);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let socket = folder.join(format!("{name}.sock"));
        let Some(lock) = lock(&socket)? else {
            bail!("a run called {name} is there already: choose another --name");
        };
        Ok(Instance { socket, _lock: lock })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        remove(&self.socket);
    }
}

/// Removes what a run has left; QEMU may have done so.
fn remove(socket: &Path) {
    for number in 0..CHANNEL_PORTS {
        let _ = std::fs::remove_file(channel_socket(socket, number));
    }
    let _ = std::fs::remove_file(socket.with_extension(LOCK));
}

/// The lock beside a run's socket; `None` while the run has it.
fn lock(socket: &Path) -> Result<Option<File>> {
    demo::lock(&socket.with_extension(LOCK))
}

/// Connects to a socket; `None` when nobody takes the connection. QEMU takes one at a time, and lets the third wait here.
fn connect(socket: &Path) -> Result<Option<UnixStream>> {
    let (to, from) = mpsc::channel();
    let path = socket.to_path_buf();
    std::thread::spawn(move || to.send(UnixStream::connect(path)));
    match from.recv_timeout(AGAIN) {
        Ok(stream) => Ok(Some(stream.with_context(|| format!("{}", socket.display()))?)),
        Err(_) => Ok(None),
    }
}

/// Where runs have their sockets.
pub fn folder(target: &Path) -> PathBuf {
    target.join("image/run")
}

pub fn main(args: Args) -> Result<ExitCode> {
    if args.command.is_empty() && !args.events {
        bail!("say what to ask, as in `cargo xtask ctl -- list --json`, or --events");
    }
    let workspace = Workspace::load()?;
    let socket = find(&folder(&workspace.target_dir), args.instance.as_deref())?;
    // Who only listens stays long: elsewhere than those who ask and go.
    let first = if args.events { CHANNEL_PORTS - 1 } else { 0 };
    let mut client = Client::connect(&socket, first, Duration::from_secs(args.timeout))?;
    let mut code = ExitCode::SUCCESS;
    if !args.command.is_empty() {
        let answer = client.ask(json!({ "command": args.command }))?;
        if !show(&answer, &mut std::io::stdout().lock())? {
            code = ExitCode::FAILURE;
        }
    }
    if args.events {
        client.ask(json!({ "events": true }))?;
        client.follow(&mut std::io::stdout().lock())?;
    }
    Ok(code)
}

/// The socket of the run that is meant.
fn find(folder: &Path, wanted: Option<&str>) -> Result<PathBuf> {
    let mut running = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry?.path();
        let name =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".sock"));
        // Those with a dot are the other ports of one.
        let Some(name) = name.filter(|name| !name.contains('.')).map(str::to_owned) else { continue };
        match lock(&path)? {
            None => running.push((name, path)),
            // Left by a run that was killed.
            Some(_) => remove(&path),
        }
    }
    running.sort();
    let names: Vec<&str> = running.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(", ");
    match (wanted, running.as_slice()) {
        (_, []) => bail!("nothing runs: start it with `cargo xtask run`, in this checkout"),
        (None, [(_, path)]) => Ok(path.clone()),
        (None, _) => bail!("several run: choose one of {names} with --instance"),
        (Some(wanted), all) => match all.iter().find(|(name, _)| name == wanted) {
            Some((_, path)) => Ok(path.clone()),
            None => bail!("no run is called {wanted}: there is {names}"),
        },
    }
}

/// Prints an answer's output, and says on stderr why it failed; true when it did not.
fn show(answer: &Value, out: &mut impl Write) -> Result<bool> {
    if let Some(value) = answer.get("value") {
        writeln!(out, "{value}")?;
    }
    for line in answer.get("lines").and_then(Value::as_array).into_iter().flatten() {
        writeln!(out, "{}", line.as_str().unwrap_or_default())?;
    }
    if answer.get("truncated").is_some() {
        eprintln!("xtask: the output was longer and is cut here");
    }
    if let Some(message) = answer.pointer("/error/message").and_then(Value::as_str) {
        eprintln!("error: {message}");
    }
    Ok(answer.get("ok") == Some(&Value::Bool(true)))
}

/// The end of the channel that asks.
struct Client {
    to: UnixStream,
    from: BufReader<UnixStream>,
    /// A line that has not ended.
    partial: Vec<u8>,
    asked: u32,
    timeout: Duration,
}

impl Client {
    fn new(stream: UnixStream, timeout: Duration) -> Result<Client> {
        stream.set_read_timeout(Some(AGAIN))?;
        let from = BufReader::new(stream.try_clone()?);
        Ok(Client { to: stream, from, partial: Vec::new(), asked: 0, timeout })
    }

    /// The next line; `None` when none came for a while.
    fn line(&mut self) -> Result<Option<Value>> {
        loop {
            match self.from.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("the run has ended"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    // What another client left half-read is nobody's.
                    if let Ok(value) = serde_json::from_slice(&line) {
                        return Ok(Some(value));
                    }
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error).context("the run has ended"),
            }
        }
    }

    fn send(&mut self, mut request: Value) -> Result<Value> {
        self.asked += 1;
        let id = Value::from(format!("{}-{}", std::process::id(), self.asked));
        if let Some(fields) = request.as_object_mut() {
            fields.insert("id".into(), id.clone());
        }
        // Whoever was here before may have left half a line.
        writeln!(self.to, "\n{request}").context("the run has ended")?;
        Ok(id)
    }

    /// A port of a run on which somebody answers. Those that other programs have are silent; and dom0 may be starting still, and loses
    /// what comes before it listens.
    fn connect(socket: &Path, first: u32, timeout: Duration) -> Result<Client> {
        let end = Instant::now() + timeout;
        let mut number = first;
        while Instant::now() < end {
            if let Some(stream) = connect(&channel_socket(socket, number % CHANNEL_PORTS))? {
                let mut client = Client::new(stream, timeout)?;
                if client.greet()? {
                    return Ok(client);
                }
            }
            number += 1;
        }
        bail!("nobody answers: dom0 has not started, or {CHANNEL_PORTS} programs are connected already")
    }

    /// Whether somebody answers soon.
    fn greet(&mut self) -> Result<bool> {
        let id = self.send(json!({ "events": false }))?;
        while let Some(answer) = self.line()? {
            if answer.get("id") == Some(&id) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn ask(&mut self, request: Value) -> Result<Value> {
        let end = Instant::now() + self.timeout;
        let id = self.send(request)?;
        loop {
            let line = self.line()?;
            if let Some(answer) = line.filter(|answer| answer.get("id") == Some(&id)) {
                return Ok(answer);
            }
            if Instant::now() >= end {
                bail!("no answer within {} s: --timeout waits longer", self.timeout.as_secs());
            }
        }
    }

    /// Prints events until the run ends.
    fn follow(&mut self, out: &mut impl Write) -> Result<()> {
        loop {
            let Ok(line) = self.line() else { return Ok(()) };
            if let Some(event) = line.filter(|line| line.get("event").is_some()) {
                writeln!(out, "{event}").and_then(|()| out.flush())?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A dom0 that answers, with noise before and behind.
    fn pretend(stream: UnixStream) -> Result<()> {
        let mut to = stream.try_clone()?;
        let mut lines = BufReader::new(stream).lines();
        let mut next = || -> Result<Value> {
            loop {
                let line = lines.next().context("no more lines")??;
                if !line.is_empty() {
                    return Ok(serde_json::from_str(&line)?);
                }
            }
        };
        let greeting = next()?;
        writeln!(to, "ed\":1}}\n{}", json!({ "id": greeting["id"], "ok": true }))?;
        let asked = next()?;
        assert_eq!(asked["command"], json!(["list", "--json"]));
        writeln!(to, "{}", json!({ "event": "domain-created", "name": "x" }))?;
        writeln!(to, "{}", json!({ "id": "other", "ok": true, "lines": ["wrong"] }))?;
        let answer =
            json!({ "id": asked["id"], "ok": false, "lines": ["a", "b"], "error": { "message": "no" } });
        writeln!(to, "{answer}")?;
        let follow = next()?;
        writeln!(to, "{}", json!({ "id": follow["id"], "ok": true }))?;
        writeln!(to, "{}", json!({ "event": "dropped", "count": 3 }))?;
        Ok(())
    }

    #[test]
    fn an_answer_is_found_among_all_else() -> Result<()> {
        let (ours, theirs) = UnixStream::pair()?;
        let dom0 = std::thread::spawn(move || pretend(theirs));
        let mut client = Client::new(ours, Duration::from_secs(20))?;
        assert!(client.greet()?);
        let answer = client.ask(json!({ "command": ["list", "--json"] }))?;
        let mut out = Vec::new();
        assert!(!show(&answer, &mut out)?);
        assert_eq!(out, b"a\nb\n");
        client.ask(json!({ "events": true }))?;
        let mut events = Vec::new();
        client.follow(&mut events)?;
        assert_eq!(events, b"{\"count\":3,\"event\":\"dropped\"}\n");
        dom0.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    }

    #[test]
    fn the_run_that_is_meant_is_found() -> Result<()> {
        let target = std::env::temp_dir().join(format!("xtask-ctl-{}", std::process::id()));
        let folder = folder(&target);
        let error = |wanted| find(&folder, wanted).unwrap_err().to_string();
        assert!(error(None).starts_with("nothing runs"));
        let one = Instance::new(&target, Some("one"))?;
        let _listens: Vec<UnixListener> = (0..CHANNEL_PORTS)
            .map(|number| UnixListener::bind(channel_socket(&one.socket, number)))
            .collect::<Result<_, _>>()?;
        drop(UnixListener::bind(folder.join("killed.sock"))?);
        drop(UnixListener::bind(folder.join("killed.3.sock"))?);
        assert_eq!(find(&folder, None)?, one.socket);
        let left = |name: &str| folder.join(name).exists();
        assert!(!left("killed.sock") && !left("killed.3.sock"), "what a killed run left is removed");
        assert!(Instance::new(&target, Some("one")).is_err());
        assert!(Instance::new(&target, Some("../one")).is_err());
        let two = Instance::new(&target, Some("two"))?;
        drop(UnixListener::bind(&two.socket)?);
        assert_eq!(error(None), "several run: choose one of one, two with --instance");
        assert_eq!(find(&folder, Some("one"))?, one.socket);
        assert_eq!(error(Some("three")), "no run is called three: there is one, two");
        drop((one, two));
        assert_eq!(std::fs::read_dir(&folder)?.count(), 0, "nothing is left");
        std::fs::remove_dir_all(target)?;
        Ok(())
    }

    #[test]
    fn a_port_that_somebody_else_has_is_passed_over() -> Result<()> {
        let target = std::env::temp_dir().join(format!("xtask-busy-{}", std::process::id()));
        let one = Instance::new(&target, Some("one"))?;
        // As QEMU: the first listens and takes nobody, the second one answers.
        let _silent = UnixListener::bind(channel_socket(&one.socket, 0))?;
        let listens = UnixListener::bind(channel_socket(&one.socket, 1))?;
        let dom0 = std::thread::spawn(move || pretend(listens.accept()?.0));
        let mut client = Client::connect(&one.socket, 0, Duration::from_secs(20))?;
        client.ask(json!({ "command": ["list", "--json"] }))?;
        client.ask(json!({ "events": true }))?;
        // To its end: who leaves before that breaks the other's pipe.
        client.follow(&mut Vec::new())?;
        dom0.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
        drop(one);
        std::fs::remove_dir_all(target)?;
        Ok(())
    }
}

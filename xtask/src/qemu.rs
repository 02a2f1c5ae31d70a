//! The machine: QEMU's command line in one place, and how the end of a run is read.

use crate::{devices, sh};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// The default CPU model: it has NX, SMEP, SMAP, XSAVE, FSGSBASE and RDRAND under TCG. x2APIC is off because QEMU 10.0
/// aborts with `-icount` when it is used; the other features are ones that TCG lacks and would warn about.
pub const CPU: &str = "EPYC,-x2apic,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";

/// I/O port of QEMU's isa-debug-exit device, named to the hypervisor on its command line.
const EXIT_PORT: u16 = 0xf4;

/// Oldest QEMU whose figures and verdicts are ours; older ones have bugs that some cases touch.
pub const WANTED_MAJOR: u32 = 10;

/// CPUs of a machine that somebody boots without saying how many.
const SMP: u32 = 2;
/// CPUs of a machine of a test that does not say how many.
pub const TEST_SMP: u32 = 1;

/// Who is booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Host {
    /// This hypervisor.
    Xenolith,
    /// Debian's Xen 4.17, the reference.
    Xen,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Host::Xenolith => "xenolith",
            Host::Xen => "xen",
        })
    }
}

/// Options that every booting command has.
#[derive(Debug, Clone, clap::Args)]
pub struct Machine {
    /// Memory of the machine
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub mem: String,
    /// Number of CPUs (default: 2, with --icount 1)
    #[arg(long, value_name = "N")]
    pub smp: Option<u32>,
    /// How QEMU runs the CPU: tcg works everywhere, kvm needs /dev/kvm
    #[arg(long, default_value = "tcg", value_name = "ACCEL")]
    pub accel: String,
    /// CPU model (see `qemu-system-x86_64 -cpu help`)
    #[arg(long, default_value = CPU, value_name = "MODEL", hide_default_value = true)]
    pub cpu: String,
    /// A disk for dom0: a raw image, with `:ro` behind it only to be read (repeatable; vda, vdb, … in this order)
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    pub disks: Vec<String>,
    /// A network card for dom0 on QEMU's user network; TCP:PORT-PORT lets the host's first port lead to the second one at 10.0.2.15
    #[arg(long = "net", value_name = "user[,tcp:PORT-PORT]...")]
    pub net: Option<String>,
    /// What its RAM begins with; zeroes without it. It is not written to
    #[arg(skip)]
    pub ram: Option<PathBuf>,
    /// The first socket of dom0's management channel
    #[arg(skip)]
    pub channel: Option<PathBuf>,
    /// Let the clock advance with executed instructions: the same counts on every machine
    #[arg(long)]
    pub icount: bool,
    /// More options for each disk's device, as in `vectors=0`
    #[arg(skip)]
    pub disk_options: String,
    /// One more word for QEMU's command line (repeatable)
    #[arg(long = "qemu-arg", value_name = "WORD", allow_hyphen_values = true)]
    pub qemu_args: Vec<String>,
}

impl Default for Machine {
    fn default() -> Machine {
        Machine {
            mem: "512M".into(),
            smp: None,
            accel: "tcg".into(),
            cpu: CPU.into(),
            disks: Vec::new(),
            net: None,
            ram: None,
            channel: None,
            icount: false,
            disk_options: String::new(),
            qemu_args: Vec::new(),
        }
    }
}

impl Machine {
    /// How many CPUs it has. Where instructions are counted, all CPUs count into one clock: what one executes takes time of the
    /// others. That is for those who ask for it.
    pub fn cpus(&self) -> u32 {
        self.smp.unwrap_or(if self.icount { 1 } else { SMP })
    }

    /// QEMU with everything but what is booted; the serial line is on stdio, with QEMU's escape character ctrl-a.
    ///
    /// # Errors
    /// When a device's option cannot be read.
    pub fn command(&self) -> Result<Command> {
        let mut qemu = Command::new(program());
        qemu.args(["-machine", "q35", "-accel", &self.accel, "-cpu", &self.cpu]);
        qemu.args(["-m", &self.mem, "-smp", &self.cpus().to_string()]);
        if let Some(ram) = &self.ram {
            let file = ram.to_string_lossy().replace(',', ",,");
            let backend = format!("memory-backend-file,id=ram,size={},mem-path={file},share=off", self.mem);
            qemu.args(["-object", &backend, "-machine", "memory-backend=ram"]);
        }
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "mon:stdio",
        ]);
        qemu.args(["-device", &format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=0x04")]);
        // Firmware would bring up each disk to boot from it, with queues at the top of memory: with four of them it reserves memory that
        // QEMU has put the module in. Nothing is booted from a disk here.
        qemu.args(["-boot", "strict=on"]);
        for (number, disk) in self.disks.iter().enumerate() {
            qemu.args(devices::disk(number, disk, &self.disk_options));
        }
        if let Some(net) = &self.net {
            qemu.args(devices::net(net)?);
        }
        if let Some(socket) = &self.channel {
            qemu.args(devices::channel(socket)?);
        }
        if self.icount {
            // Disks take real time: an idle clock that jumps to the next timer would have them be late for everything.
            let sleep = if self.disks.is_empty() { "off" } else { "on" };
            qemu.args(virtual_clock(0, sleep));
        }
        qemu.args(&self.qemu_args);
        Ok(qemu)
    }

    /// Boots Xenolith: `module` is dom0's ELF (and what follows it), `words` are for the hypervisor, `cmdline` for dom0.
    ///
    /// # Errors
    /// As [`Machine::command`].
    pub fn xenolith(&self, image: &Path, module: &Path, words: &str, cmdline: &str) -> Result<Command> {
        let mut append = format!("debug-exit={EXIT_PORT:#x}");
        if !words.is_empty() {
            append = format!("{append} {words}");
        }
        if !cmdline.is_empty() {
            append = format!("{append} --- {cmdline}");
        }
        let mut qemu = self.command()?;
        qemu.arg("-kernel").arg(image).arg("-initrd").arg(module).arg("-append").arg(append);
        Ok(qemu)
    }

    /// Boots Debian's Xen with a kernel as dom0.
    ///
    /// # Errors
    /// As [`Machine::command`].
    pub fn xen(
        &self,
        image: &Path,
        kernel: &Path,
        module: Option<&Path>,
        words: &str,
        cmdline: &str,
    ) -> Result<Command> {
        let mut append = String::from("com1=115200,8n1 console=com1 loglvl=all guest_loglvl=all");
        if self.accel == "tcg" {
            // TCG does not raise #NM in XSAVE and XRSTOR: lazily switched vector state would get lost.
            append += " spec-ctrl=eager-fpu";
        }
        // Xen's mwait idle dies of #GP under TCG with an EPYC, the first time it idles.
        append += " max_cstate=0";
        if !words.is_empty() {
            append = format!("{append} {words}");
        }
        // QEMU's multiboot loader separates modules by commas; a doubled one stands for itself.
        let mut initrd = kernel.to_string_lossy().replace(',', ",,");
        if !cmdline.is_empty() {
            initrd = format!("{initrd} {}", cmdline.replace(',', ",,"));
        }
        if let Some(module) = module {
            initrd = format!("{initrd},{}", module.to_string_lossy().replace(',', ",,"));
        }
        let mut machine = self.clone();
        if machine.accel == "tcg" && machine.cpus() > 1 {
            // Without an invariant TSC, which TCG does not offer, Xen measures each processor's TSC against the platform's timer once
            // a second. A thread for each processor is now and then off the host's CPU in the middle of that: clocks of two
            // processors were tens of milliseconds apart, and vCPUs hung on timers.
            machine.accel.push_str(",thread=single");
        }
        let mut qemu = machine.command()?;
        qemu.arg("-kernel").arg(image).args(["-initrd", &initrd, "-append", &append]);
        Ok(qemu)
    }
}

/// Words that let the machine's clocks advance 2^`shift` ns with each instruction. While no CPU has anything to do they wait for real
/// time (`sleep` is `on`), or jump to the next timer (`off`).
pub fn virtual_clock(shift: u32, sleep: &str) -> [String; 4] {
    let clock = format!("shift={shift},sleep={sleep}");
    ["-icount".into(), clock, "-rtc".into(), "clock=vm,base=2024-01-01T00:00:00".into()]
}

/// QEMU's program: `QEMU` in the environment overrides it.
pub fn program() -> std::ffi::OsString {
    std::env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// Major and minor version of QEMU, or `None` when there is none.
pub fn version() -> Option<(u32, u32)> {
    let line = sh::version(program(), &["--version"])?;
    let words = line.split_once("version ")?.1;
    let mut numbers = words.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// dom0 asked for power off.
    Poweroff,
    /// dom0 asked for a reboot.
    Reboot,
    /// dom0 asked to be suspended.
    Suspend,
    /// dom0 crashed, or said so.
    Crash,
    /// dom0's watchdog ran out.
    Watchdog,
    /// The hypervisor itself panicked.
    Panic,
    /// The hypervisor would not boot what it was given, and said why.
    Refused,
    /// The machine reset or QEMU was quit: nobody gave a reason (a triple fault looks like this).
    Reset,
    /// The time was up and QEMU was stopped.
    Timeout,
    /// QEMU refused to run or died.
    Qemu,
}

impl End {
    /// From QEMU's exit status: isa-debug-exit turns a code into `code << 1 | 1`.
    pub fn from_status(status: ExitStatus) -> End {
        match status.code() {
            Some(0) => End::Reset,
            Some(0x21) => End::Poweroff,
            Some(0x23) => End::Reboot,
            Some(0x25) => End::Suspend,
            Some(0x27) => End::Crash,
            Some(0x29) => End::Watchdog,
            Some(0x41) => End::Panic,
            Some(0x43) => End::Refused,
            _ => End::Qemu,
        }
    }

    /// From what real Xen prints at its end; it then halts or waits without ending QEMU.
    pub fn from_xen_line(line: &str) -> Option<End> {
        if line.contains("Panic on CPU") {
            return Some(End::Panic);
        }
        let what = line.split_once("Hardware Dom0 ")?.1;
        match what {
            _ if what.starts_with("halted") => Some(End::Poweroff),
            _ if what.starts_with("crashed") => Some(End::Crash),
            _ if what.starts_with("shutdown: watchdog") => Some(End::Watchdog),
            _ if what.starts_with("shutdown: rebooting") => Some(End::Reboot),
            _ if what.starts_with("shutdown (unknown reason 2)") => Some(End::Suspend),
            _ => None,
        }
    }

    /// What a command that booted something exits with.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            End::Poweroff => 0,
            End::Qemu => 1,
            End::Reboot => 3,
            End::Suspend => 4,
            End::Crash => 5,
            End::Watchdog => 6,
            End::Panic => 7,
            End::Timeout => 8,
            End::Reset => 9,
            End::Refused => 10,
        })
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::Poweroff => "dom0 powered off",
            End::Reboot => "dom0 asked for a reboot",
            End::Suspend => "dom0 suspended",
            End::Crash => "dom0 crashed",
            End::Watchdog => "dom0's watchdog fired",
            End::Panic => "the hypervisor panicked",
            End::Refused => "the hypervisor refused to boot this; its last lines say why",
            End::Reset => "the machine was reset or QEMU was quit, without a shutdown reason",
            End::Timeout => "time is up",
            End::Qemu => "QEMU itself failed",
        })
    }
}

/// Text to type once a pattern has been printed.
pub struct Step {
    /// What to wait for, from where the last step matched on.
    pub wait: regex::Regex,
    /// What to type then.
    pub send: String,
    /// It is a line for the management channel, not for the console.
    pub channel: bool,
}

/// What a watched run gave.
pub struct Watched {
    /// Everything on the serial line (and QEMU's own complaints, when `quiet`).
    pub text: String,
    /// How it ended.
    pub end: End,
    /// How long it took.
    pub took: Duration,
}

/// How to watch a run.
pub struct Watch<'a> {
    /// Who runs, for reading the end.
    pub host: Host,
    /// Stop QEMU after this long.
    pub timeout: Option<Duration>,
    /// Keep the output to ourselves instead of showing it as it comes.
    pub quiet: bool,
    /// What to type, and when.
    pub steps: &'a [Step],
    /// The management channel's socket, if it is to be listened to: its lines are in the text, behind `ctl: `.
    pub channel: Option<&'a Path>,
}

/// Boots with the serial line on our terminal; nobody but the user reads it.
///
/// # Errors
/// When QEMU cannot be started.
pub fn interact(mut qemu: Command) -> Result<End> {
    sh::echo(&qemu);
    let status = qemu.status().context("cannot start QEMU (`cargo xtask setup` installs it)")?;
    Ok(End::from_status(status))
}

/// How long real Xen may print nothing behind its memory map. What comes next takes it less than a second; in QEMU, on a machine
/// with much to do, 2 boots of 40 stopped there for good.
const STALL: Duration = Duration::from_secs(45);

/// Boots and reads the serial line until the end. A boot of real Xen that comes to nothing right behind the memory map, before any
/// of what is tested runs, is made once more, and the output says so.
///
/// # Errors
/// When QEMU cannot be started.
pub fn watch(mut qemu: Command, how: &Watch) -> Result<Watched> {
    if !how.quiet {
        sh::echo(&qemu);
    }
    watch_twice(&mut qemu, how, STALL)
}

fn watch_twice(qemu: &mut Command, how: &Watch, stall: Duration) -> Result<Watched> {
    if let Some(watched) = watch_once(qemu, how, (how.host == Host::Xen).then_some(stall))? {
        return Ok(watched);
    }
    let note = format!(
        "xtask: Xen printed nothing for {} s behind its memory map; it is booted once more",
        stall.as_secs()
    );
    eprintln!("{note}");
    let again = watch_once(qemu, how, None)?.context("a second boot is not given up early")?;
    Ok(Watched { text: format!("{note}\n{}", again.text), ..again })
}

/// Whether this is the output of a Xen that got as far as its memory map.
fn ends_in_memory_map(seen: &[u8]) -> bool {
    let text = plain(&String::from_utf8_lossy(seen));
    let behind = text.split_once("Xen-e820 RAM map:\n").map(|(_, behind)| behind);
    behind.is_some_and(|behind| {
        behind.lines().all(|line| "(XEN)  [".starts_with(line) || line.starts_with("(XEN)  ["))
    })
}

/// One boot; `None` when Xen stalled behind its memory map.
fn watch_once(qemu: &mut Command, how: &Watch, stall: Option<Duration>) -> Result<Option<Watched>> {
    let start = Instant::now();
    let typing = !how.steps.is_empty();
    qemu.stdin(match () {
        () if typing => Stdio::piped(),
        () if !how.quiet && std::io::stdin().is_terminal() => Stdio::inherit(),
        () => Stdio::null(),
    });
    qemu.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = qemu.spawn().context("cannot start QEMU (`cargo xtask setup` installs it)")?;
    let mut stdin = child.stdin.take();
    let (sender, bytes) = mpsc::channel();
    match child.stderr.take() {
        Some(stderr) if how.quiet => forward(stderr, sender.clone()),
        Some(stderr) => complaints(stderr),
        None => {}
    }
    let mut channel = match how.channel {
        Some(path) => Some(listen(path, &mut child, sender.clone())?),
        None => None,
    };
    forward(child.stdout.take().context("QEMU's stdout")?, sender);

    let mut seen = Vec::new();
    let mut steps = how.steps.iter().peekable();
    let mut matched = 0;
    let mut end = None;
    // Where the line starts that we have not looked at yet.
    let mut fresh = 0;
    loop {
        let left = how.timeout.map_or(Duration::from_secs(3600), |t| t.saturating_sub(start.elapsed()));
        match bytes.recv_timeout(stall.map_or(left, |stall| stall.min(left))) {
            Ok(chunk) => {
                if !how.quiet {
                    let mut out = std::io::stdout().lock();
                    // Somebody who reads only the first lines may close the pipe; the run goes on to its verdict.
                    let _ = out.write_all(&chunk).and_then(|()| out.flush());
                }
                seen.extend_from_slice(&chunk);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                if stall.is_some_and(|stall| stall < left) {
                    if ends_in_memory_map(&seen) {
                        stop(&mut child);
                        return Ok(None);
                    }
                    continue;
                }
                if how.timeout.is_none() {
                    continue;
                }
                end = Some(End::Timeout);
                break;
            }
        }
        if let Some(step) = steps.peek() {
            let text = String::from_utf8_lossy(seen.get(matched..).unwrap_or_default()).into_owned();
            if let Some(found) = step.wait.find(&text) {
                matched += found.end();
                let to: Option<&mut dyn Write> = match step.channel {
                    true => channel.as_mut().map(|stream| stream as _),
                    false => stdin.as_mut().map(|stream| stream as _),
                };
                // QEMU may be gone already; its end says so better.
                let _ = to.map(|to| to.write_all(step.send.as_bytes()).and_then(|()| to.flush()));
                steps.next();
            }
        }
        if how.host == Host::Xen && end.is_none() {
            while let Some(length) = seen.get(fresh..).and_then(|rest| rest.iter().position(|b| *b == b'\n'))
            {
                let line = String::from_utf8_lossy(&seen[fresh..fresh + length]);
                end = end.or(End::from_xen_line(&line));
                fresh += length + 1;
            }
            if end.is_some() {
                break;
            }
        }
    }
    if let Some(end) = end {
        stop(&mut child);
        // What was still under way.
        while let Ok(chunk) = bytes.recv_timeout(Duration::from_millis(200)) {
            seen.extend_from_slice(&chunk);
        }
        return Ok(Some(done(seen, end, start)));
    }
    let status = child.wait().context("cannot wait for QEMU")?;
    Ok(Some(done(seen, End::from_status(status), start)))
}

fn done(seen: Vec<u8>, end: End, start: Instant) -> Watched {
    let text = plain(&String::from_utf8_lossy(&seen));
    Watched { text, end, took: start.elapsed() }
}

/// Text without carriage returns and without a terminal's control sequences (ESC, `[`, parameters, a letter).
fn plain(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out += part.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).get(1..).unwrap_or_default();
    }
    out.replace('\r', "")
}

/// Connects to the management channel, and forwards its lines, marked.
fn listen(socket: &Path, child: &mut Child, to: mpsc::Sender<Vec<u8>>) -> Result<UnixStream> {
    let start = Instant::now();
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) if start.elapsed() > Duration::from_secs(20) || child.try_wait()?.is_some() => {
                return Err(error).with_context(|| format!("the socket {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let from = BufReader::new(stream.try_clone()?);
    std::thread::spawn(move || {
        for line in from.lines().map_while(Result::ok) {
            if to.send(format!("\nctl: {line}\n").into_bytes()).is_err() {
                break;
            }
        }
    });
    Ok(stream)
}

fn forward(mut from: impl Read + Send + 'static, to: mpsc::Sender<Vec<u8>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
}

/// Shows what QEMU has to say, but not that we stopped it ourselves.
fn complaints(from: impl Read + Send + 'static) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if !line.contains("terminating on signal") {
                eprintln!("{line}");
            }
        }
    });
}

/// Stops QEMU kindly first: it has the terminal's settings to put back.
fn stop(child: &mut Child) {
    let _ = Command::new("kill").arg(child.id().to_string()).status();
    for _ in 0..20 {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Fails, with the next step, when QEMU is missing; warns when it is old.
///
/// # Errors
/// When there is no QEMU, and we cannot install it.
pub fn require() -> Result<()> {
    match version() {
        Some((major, _)) if major >= WANTED_MAJOR => Ok(()),
        Some((major, minor)) => {
            eprintln!(
                "warning: QEMU {major}.{minor} is older than {WANTED_MAJOR}: 64-bit `int n` gives wrong error codes in \
                 it, and test cases that this touches are skipped by name (`cargo xtask setup` installs a newer one)"
            );
            Ok(())
        }
        None if sh::is_root() && std::env::var_os("QEMU").is_none() => {
            eprintln!("QEMU is missing; installing it, as `cargo xtask setup` does");
            crate::setup::install_qemu()
        }
        None => {
            bail!(
                "`{}` does not run{}; as root, `cargo xtask setup` installs it:\n{}",
                program().display(),
                if std::env::var_os("QEMU").is_some() { " (QEMU= in the environment names it)" } else { "" },
                crate::setup::qemu_lines().join("\n")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn reads_the_last_words_of_xen() {
        let end = |line| End::from_xen_line(line);
        assert_eq!(end("(XEN) Hardware Dom0 halted: halting machine"), Some(End::Poweroff));
        assert_eq!(end("(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds."), Some(End::Crash));
        assert_eq!(end("(XEN) Hardware Dom0 shutdown: rebooting machine"), Some(End::Reboot));
        assert_eq!(end("(XEN) Hardware Dom0 shutdown: watchdog rebooting machine"), Some(End::Watchdog));
        assert_eq!(end("(XEN) Panic on CPU 0:"), Some(End::Panic));
        assert_eq!(end("(XEN) *** Building a PV Dom0 ***"), None);
    }

    /// Stalls when it is run first, and halts when it is run again; other output comes before.
    fn stalls_once(before: &str) -> Result<(Watched, PathBuf)> {
        let mark = std::env::temp_dir().join(format!("xtask-stall-{}-{}", std::process::id(), before.len()));
        let script = format!(
            "if [ -e '{0}' ]; then printf '(XEN) Hardware Dom0 halted: halting machine\\n'; \
             else touch '{0}'; printf '{before}'; fi; exec sleep 20",
            mark.display()
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]);
        let timeout = Some(Duration::from_secs(4));
        let how = Watch { host: Host::Xen, timeout, quiet: true, steps: &[], channel: None };
        Ok((watch_twice(&mut shell, &how, Duration::from_secs(1))?, mark))
    }

    #[test]
    fn xen_that_stalls_behind_its_memory_map_is_booted_once_more() -> Result<()> {
        let map = "(XEN) Xen-e820 RAM map:\\r\\n(XEN)  [0, 9fbff] (usable)\\r\\n(XEN)  [100000, 1ff";
        let (watched, mark) = stalls_once(map)?;
        std::fs::remove_file(mark)?;
        assert_eq!(watched.end, End::Poweroff, "{}", watched.text);
        assert!(watched.text.starts_with("xtask: Xen printed nothing"), "{}", watched.text);
        // What comes later is no boot that came to nothing.
        let (watched, mark) = stalls_once(&format!("{map}ff] (usable)\\n(XEN) System RAM: 511MB\\n"))?;
        std::fs::remove_file(mark)?;
        assert_eq!(watched.end, End::Timeout, "{}", watched.text);
        Ok(())
    }

    #[test]
    fn patterns_see_plain_text() {
        assert_eq!(plain("a\r\n\u{1b}[Kdom0> \u{1b}[1;31mred\u{1b}[0m\r\n"), "a\ndom0> red\n");
    }

    #[test]
    fn hands_the_command_lines_over_verbatim() {
        let machine = Machine::default();
        let line = sh::line(
            &machine.xenolith(Path::new("hv"), Path::new("dom0"), "loglvl=all", "a  --- b").unwrap(),
        );
        assert!(line.contains("'debug-exit=0xf4 loglvl=all --- a  --- b'"), "{line}");
        let line = sh::line(
            &machine.xen(Path::new("xen"), Path::new("k,1"), Some(Path::new("m")), "", "x=1,2").unwrap(),
        );
        assert!(line.contains("'k,,1 x=1,,2,m'"), "{line}");
    }
}

//! `cargo xtask layers`: what a request and a packet cost from end to end, and who executes it: guests, hypervisor or dom0.
//!
//! Under `-icount` QEMU's clock counts instructions, but not whose. So QEMU logs the blocks of instructions that it executes while dom0's shell
//! has something measured ([`log`]), from one reading of the clock to the other: it is stopped there ([`gdb`]), which the machine does not notice.
//! An address says who it was that executed: the hypervisor is in the upper half, and dom0 is linked at addresses of its own
//! (dom0/build.rs). Each thing is done so many times and then more often; what that costs more is divided by how much more often it was, and
//! beginnings and ends cancel out.

mod gdb;
mod log;

use crate::archive::Script;
use crate::boot::{self, Boot};
use crate::build::{self, Built};
use crate::images::Workspace;
use crate::qemu::{self, End, Host, Machine, Watch};
use crate::{archive, sh, symbols, xen};
use anyhow::{Context, Result, bail, ensure};
use gdb::Stub;
use log::{Counts, Reader};
use object::{Object, ObjectSegment};
use regex::Regex;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Exit code: 0 when everything was measured, and the clock agrees.
#[derive(clap::Args)]
pub struct Args {
    /// Whose costs; our dom0 and our guests run on both
    #[arg(long, value_enum, default_value_t = On::Xenolith, value_name = "HYPERVISOR")]
    on: On,
    /// Only rows whose name contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Name so many functions of each layer, those that execute most
    #[arg(long, value_name = "N", default_value_t = 0)]
    functions: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum On {
    /// This hypervisor
    Xenolith,
    /// Debian's Xen 4.17
    Xen,
    /// Both, side by side
    Both,
}

/// Seconds for one boot with all rows.
const TIMEOUT: u64 = 1800;
/// Most that the clock and the count may differ by, as a part of the count.
const TOLERANCE: f64 = 0.01;
/// What dom0's `measure` calls for each of its two readings of the clock (dom0/src/shell/meters.rs).
const READING: &str = "control_domain::shell::meters::Cost::now";

/// Something that is done again and again.
struct Row {
    name: &'static str,
    /// The guest's image.
    image: &'static str,
    /// A command before the others.
    before: &'static str,
    /// The command, with `{n}` for how many times.
    command: &'static str,
    /// And behind them.
    behind: &'static str,
    /// How many times, and how many more often.
    times: (u64, u64),
    /// What there is of the row's unit in one time.
    units: f64,
}

const DISK: Row =
    Row { name: "", image: "diskbench", before: "", command: "", behind: "", times: (200, 800), units: 1.0 };
const FRAMES: Row = Row { image: "frames", times: (500, 2500), ..DISK };

/// In this order in the book.
const ROWS: [Row; 10] = [
    Row {
        name: "4 KiB read, depth 1",
        command: "run diskbench memory=8M disk=xvda:ram:4M \"cmdline=count={n} bytes=4096 depth=1\"",
        ..DISK
    },
    Row {
        name: "4 KiB write, depth 1",
        command: "run diskbench memory=8M disk=xvda:ram:4M \"cmdline=count={n} bytes=4096 depth=1 write\"",
        ..DISK
    },
    Row {
        name: "4 KiB read, depth 32",
        command: "run diskbench memory=8M disk=xvda:ram:4M \"cmdline=count={n} bytes=4096 depth=32\"",
        times: (1024, 5120),
        ..DISK
    },
    Row {
        name: "4 KiB write, depth 32",
        command: "run diskbench memory=8M disk=xvda:ram:4M \"cmdline=count={n} bytes=4096 depth=32 write\"",
        times: (1024, 5120),
        ..DISK
    },
    Row {
        name: "128 KiB read, depth 8",
        command: "run diskbench memory=8M disk=xvda:ram:4M \"cmdline=count={n} bytes=131072 depth=8\"",
        times: (96, 384),
        ..DISK
    },
    Row {
        name: "128 KiB write, depth 8",
        command: "run diskbench memory=8M disk=xvda:ram:4M \"cmdline=count={n} bytes=131072 depth=8 write\"",
        times: (96, 384),
        ..DISK
    },
    Row {
        name: "frame of 60 bytes",
        command: "run frames name=taker memory=8M \"cmdline=role=take check=0\" card=wire + frames name=sender memory=8M \
                  \"cmdline=role=send bytes=60 frames={n}\" card=wire",
        ..FRAMES
    },
    Row {
        name: "frame of 1,514 bytes",
        command: "run frames name=taker memory=8M \"cmdline=role=take check=0\" card=wire + frames name=sender memory=8M \
                  \"cmdline=role=send bytes=1514 frames={n}\" card=wire",
        ..FRAMES
    },
    Row {
        name: "1,500 bytes of TCP",
        image: "stream",
        before: "",
        command: "run stream name=taker memory=8M \"cmdline=role=take ip=10.0.0.1/24\" card=wire + stream name=sender memory=8M \
                  \"cmdline=role=send ip=10.0.0.2/24 peer=10.0.0.1 megabytes={n}\" card=wire",
        behind: "",
        times: (2, 16),
        units: (1 << 20) as f64 / 1500.0,
    },
    Row {
        name: "ping of 64 bytes, there and back",
        image: "ping",
        before: "create ping name=echo memory=8M cmdline=ip=10.0.0.1/24 card=wire",
        command: "run ping name=asker memory=8M \"cmdline=ip=10.0.0.2/24 peer=10.0.0.1 bytes=64 count={n}\" card=wire",
        behind: "destroy echo",
        times: (100, 400),
        units: 1.0,
    },
];

/// What was counted between two readings of the clock, and by how much it went on.
struct Period {
    counts: Counts,
    busy_ns: f64,
}

/// A row that was measured.
struct Measured {
    row: &'static Row,
    /// Of all additional times.
    counts: Counts,
    busy_ns: f64,
}

/// Instructions of one time, by who executed them.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Split {
    guests: f64,
    hypervisor: f64,
    dom0: f64,
}

/// Who executes at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    Guests,
    Hypervisor,
    Dom0,
}

/// The lower end of what a hypervisor has, ours and Xen.
const UPPER_HALF: u64 = 0xffff_8000_0000_0000;

impl Layer {
    const ALL: [Layer; 3] = [Layer::Guests, Layer::Hypervisor, Layer::Dom0];

    fn of(address: u64, dom0: &Range<u64>) -> Layer {
        match address {
            UPPER_HALF.. => Layer::Hypervisor,
            _ if dom0.contains(&address) => Layer::Dom0,
            _ => Layer::Guests,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Layer::Guests => "guests",
            Layer::Hypervisor => "hypervisor",
            Layer::Dom0 => "dom0",
        }
    }
}

pub fn main(args: Args) -> Result<ExitCode> {
    qemu::require()?;
    let rows: Vec<&'static Row> = ROWS.iter().filter(|row| row.name.contains(&args.filter)).collect();
    if rows.is_empty() {
        bail!("no row has `{}` in its name; there are: {}", args.filter, ROWS.map(|row| row.name).join("; "));
    }
    let workspace = Workspace::load()?;
    let built = build::for_run(&workspace)?;
    let dom0_elf = built.dom0.as_deref().context("dom0/Cargo.toml: there is no dom0 image")?;
    let dom0 = loaded(dom0_elf)?;
    for row in &rows {
        let guest = loaded(image(&built, row.image)?)?;
        ensure!(guest.end <= dom0.start || dom0.end <= guest.start, "{} is linked where dom0 is", row.image);
    }
    let hosts = match args.on {
        On::Xenolith => vec![Host::Xenolith],
        On::Xen => vec![Host::Xen],
        On::Both => vec![Host::Xenolith, Host::Xen],
    };
    let mut found = Vec::new();
    for host in &hosts {
        let measured = measure(&workspace, &built, *host, &rows)?;
        for one in &measured {
            agrees(one, &dom0).with_context(|| format!("{} on {host}", one.row.name))?;
            if args.functions > 0 {
                let hypervisor = (*host == Host::Xenolith).then_some(built.hypervisor.as_path());
                let text = functions(one, &dom0, args.functions, |layer| match layer {
                    Layer::Guests => image(&built, one.row.image).ok(),
                    Layer::Hypervisor => hypervisor,
                    Layer::Dom0 => Some(dom0_elf),
                })?;
                println!("{} on {host}:\n{text}", one.row.name);
            }
        }
        found.push(measured.iter().map(|one| split(one, &dom0)).collect::<Vec<_>>());
    }
    let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
    print!("{}", table(&hosts, &names, &found));
    Ok(ExitCode::SUCCESS)
}

fn image<'a>(built: &'a Built, name: &str) -> Result<&'a Path> {
    built.guests.get(name).map(|path| path.as_path()).with_context(|| format!("`{name}` was not built"))
}

/// The addresses that an image is loaded at.
fn loaded(image: &Path) -> Result<Range<u64>> {
    let bytes = sh::read(image)?;
    let file = object::File::parse(&*bytes).with_context(|| format!("{} is not an ELF", image.display()))?;
    let start = file.segments().map(|segment| segment.address()).min();
    let end = file.segments().map(|segment| segment.address() + segment.size()).max();
    start.zip(end).map(|(start, end)| start..end).context("an image has segments")
}

/// Boots once, and measures all rows.
fn measure(workspace: &Workspace, built: &Built, host: Host, rows: &[&'static Row]) -> Result<Vec<Measured>> {
    let dom0 = built.dom0.as_deref().context("there is no dom0 image")?;
    let folder = workspace.target_dir.join("layers");
    sh::write(&folder.join("log"), &[])?;
    let (socket, fifo) = (folder.join("gdb.sock"), folder.join("qemu.fifo"));
    for old in [&socket, &fifo] {
        if old.exists() {
            std::fs::remove_file(old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    sh::run(Command::new("mkfifo").arg(&fifo))?;
    let words = ["-gdb", &format!("unix:{},server=on,wait=off", socket.display()), "-S"].map(str::to_owned);
    let machine = Machine { icount: true, smp: Some(1), qemu_args: words.into(), ..Machine::default() };
    let module = folder.join("archive.tar");
    let script = script(rows);
    sh::write(
        &module,
        &archive::pack(workspace, built, Script { exec: &script, ..Script::default() }, &[])?,
    )?;
    let hypervisor = match host {
        Host::Xenolith => built.hypervisor.clone(),
        Host::Xen => xen::image(&workspace.target_dir)?,
    };
    let boot = Boot {
        host,
        hypervisor: &hypervisor,
        kernel: &build::stripped(workspace, dom0)?,
        module: Some(&module),
        words: &boot::with_room_for_guests(host, ""),
        cmdline: "",
        joined: &folder.join("module"),
    };
    let qemu = boot::command(&machine, &boot)?;
    let reading = function(dom0, READING)?;
    let over = AtomicBool::new(false);
    let (watched, counts) = std::thread::scope(|scope| {
        let counter = scope.spawn(|| count(&socket, &fifo, reading, &over));
        let timeout = Some(Duration::from_secs(TIMEOUT));
        let watched = qemu::watch(qemu, &Watch { host, timeout, quiet: true, steps: &[], channel: None });
        over.store(true, Ordering::Release);
        // It may still wait for a log.
        drop(File::options().read(true).write(true).open(&fifo));
        (watched, counter.join())
    });
    let watched = watched?;
    sh::write(&folder.join("log"), watched.text.as_bytes())?;
    let counts = match counts {
        Ok(counts) => counts?,
        Err(_) => bail!("the counting thread panicked"),
    };
    let good = watched.end == End::Poweroff && !watched.text.contains("Panic");
    let periods = if good { pair(counts, &watched.text) } else { Err(anyhow::anyhow!("{}", watched.end)) };
    let periods = periods.with_context(|| {
        format!("this went wrong on {host}; {} has the output", folder.join("log").display())
    })?;
    rows.iter().zip(periods.chunks_exact(2)).map(|(row, pair)| difference(row, pair)).collect()
}

/// The shell's commands for these rows.
fn script(rows: &[&Row]) -> Vec<String> {
    // What nobody has had since power-on is scrubbed while CPUs are idle.
    let mut script: Vec<String> =
        ["destroy consumer", "destroy producer", "measure sleep 3"].map(str::to_owned).into();
    for row in rows {
        let times = |n: u64| row.command.replace("{n}", &n.to_string());
        let (few, more) = row.times;
        script.push(row.before.to_owned());
        // Once for what is only done the first time.
        script.push(times(few));
        script.extend([few, more].map(|n| format!("measure {}", times(n))));
        script.push(row.behind.to_owned());
    }
    script.retain(|command| !command.is_empty());
    script
}

/// Where a function begins.
fn function(image: &Path, name: &str) -> Result<u64> {
    let bytes = sh::read(image)?;
    let functions = symbols::functions(&object::File::parse(&*bytes)?)?;
    let found = functions.iter().find(|(_, _, other)| other == name);
    found.map(|found| found.0).with_context(|| format!("{} has no function {name}", image.display()))
}

/// Counts what is executed from each first call of the function at `reading` to the return of the second, until the machine ends or `over` is
/// set. The first two calls only show where that is. Between the readings themselves the machine does not stop: when it goes on, its clock
/// jumps to what it waits for next.
fn count(socket: &Path, fifo: &Path, reading: u64, over: &AtomicBool) -> Result<Vec<Counts>> {
    let mut periods = Vec::new();
    while !over.load(Ordering::Acquire) {
        // QEMU is not there yet, or, as Xen stalled, not any more.
        let Ok(mut stub) = Stub::connect(socket) else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        let mut reader = Reader::default();
        let Ok(Some(second)) = second_return(&mut stub, reading) else { continue };
        while stub.run_to(reading)?.is_some() {
            let counts = std::thread::scope(|scope| -> Result<Option<Counts>> {
                let counts = scope.spawn(|| {
                    let log = File::open(fifo).context("cannot open the log")?;
                    reader.count(BufReader::with_capacity(1 << 20, log))
                });
                stub.monitor(&format!("logfile {}", fifo.display()))?;
                stub.monitor("log exec,nochain,in_asm,int")?;
                let ended = stub.run_to(second)?;
                if ended.is_some() {
                    stub.monitor("log none")?;
                    // With a new file it closes the old one.
                    stub.monitor("logfile /dev/null")?;
                }
                let counts = counts.join().map_err(|_| anyhow::anyhow!("the log's reader panicked"))??;
                Ok(ended.map(|()| counts))
            })?;
            periods.extend(counts);
        }
        // It ended, by itself or because Xen, which does not end QEMU, has said its last words.
        break;
    }
    Ok(periods)
}

/// Where the function at an address returns to the second time that it is called; `None` when the machine ends before.
fn second_return(stub: &mut Stub, function: u64) -> Result<Option<u64>> {
    if stub.run_to(function)?.is_none() {
        return Ok(None);
    }
    let first = stub.return_address()?;
    if stub.run_to(first)?.is_none() || stub.run_to(function)?.is_none() {
        return Ok(None);
    }
    let second = stub.return_address()?;
    Ok(stub.run_to(second)?.map(|()| second))
}

/// What the clock says of each period, from dom0's output.
fn pair(counts: Vec<Counts>, text: &str) -> Result<Vec<Period>> {
    let measured = Regex::new(r"measured: (\d+) ns busy")?;
    let times: Vec<f64> = measured.captures_iter(text).filter_map(|found| found[1].parse().ok()).collect();
    // The first is not counted.
    ensure!(times.len() == counts.len() + 1, "{} were counted, and {} measured", counts.len(), times.len());
    Ok(counts
        .into_iter()
        .zip(times.into_iter().skip(1))
        .map(|(counts, busy_ns)| Period { counts, busy_ns })
        .collect())
}

/// What the additional times cost.
fn difference(row: &'static Row, pair: &[Period]) -> Result<Measured> {
    let [few, more] = pair else { bail!("two periods for a row") };
    let counts = more.counts.clone().beyond(&few.counts);
    ensure!(counts.unlisted == 0, "{}: {} blocks were never listed", row.name, counts.unlisted);
    Ok(Measured { row, counts, busy_ns: more.busy_ns - few.busy_ns })
}

impl Measured {
    /// What one time costs, of so much.
    fn each(&self, all: f64) -> f64 {
        all / ((self.row.times.1 - self.row.times.0) as f64 * self.row.units)
    }
}

/// Fails when the clock does not agree with what was counted.
fn agrees(one: &Measured, dom0: &Range<u64>) -> Result<()> {
    let (counted, clock) = (split(one, dom0).all(), one.each(one.busy_ns));
    eprintln!("{}: {counted:.1} instructions counted, {clock:.1} by the clock", one.row.name);
    ensure!(
        (counted - clock).abs() <= counted * TOLERANCE,
        "{counted:.1} were counted, the clock says {clock:.1}"
    );
    Ok(())
}

fn split(one: &Measured, dom0: &Range<u64>) -> Split {
    let of = |layer| one.each(one.counts.of(|address| Layer::of(address, dom0) == layer) as f64);
    Split { guests: of(Layer::Guests), hypervisor: of(Layer::Hypervisor), dom0: of(Layer::Dom0) }
}

impl Split {
    fn all(self) -> f64 {
        self.guests + self.hypervisor + self.dom0
    }
}

/// As Markdown; `found` has a list for each hypervisor.
fn table(hosts: &[Host], names: &[&str], found: &[Vec<Split>]) -> String {
    let mut text = String::from("| |");
    for host in hosts {
        for column in ["guests", "hypervisor", "dom0", "all"] {
            // The first column of each says whose it is.
            let whose = if column == "guests" { format!("{host}: ") } else { String::new() };
            _ = write!(text, " {whose}{column} |");
        }
    }
    text += "\n|---|";
    text += &"---:|".repeat(4 * hosts.len());
    for (row, name) in names.iter().enumerate() {
        _ = write!(text, "\n| {name} |");
        for split in found.iter().filter_map(|splits| splits.get(row)) {
            for number in [split.guests, split.hypervisor, split.dom0, split.all()] {
                _ = write!(text, " {} |", thousands(number.round() as i64));
            }
        }
    }
    text.push('\n');
    text
}

/// With commas, as in the book.
fn thousands(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::from(if number < 0 { "-" } else { "" });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Those functions of each layer that execute most, with how often each is begun.
fn functions<'a>(
    one: &Measured,
    dom0: &Range<u64>,
    most: usize,
    image: impl Fn(Layer) -> Option<&'a Path>,
) -> Result<String> {
    let mut text = String::new();
    for layer in Layer::ALL {
        let Some(image) = image(layer) else { continue };
        let bytes = sh::read(image)?;
        let names = symbols::functions(&object::File::parse(&*bytes)?)?;
        let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        for (pc, executed) in one.counts.blocks.iter().filter(|(pc, _)| Layer::of(**pc, dom0) == layer) {
            let at = names.partition_point(|(start, _, _)| start <= pc);
            let found = at.checked_sub(1).and_then(|at| names.get(at)).filter(|(_, end, _)| pc < end);
            let (name, begun) = found.map_or(("?", false), |(start, _, name)| (name, start == pc));
            let sum = sums.entry(name).or_default();
            sum.0 += one.each(executed.instructions as f64);
            sum.1 += if begun { one.each(executed.times as f64) } else { 0.0 };
        }
        let mut sums: Vec<_> = sums.into_iter().collect();
        sums.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
        _ = writeln!(text, "{}:", layer.name());
        for (name, (instructions, times)) in sums.into_iter().take(most) {
            _ = writeln!(text, "{instructions:10.1} {times:7.2}x {name}");
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::log::Executed;
    use super::*;

    const DOM0: Range<u64> = 0x4000_0000..0x4080_0000;

    fn counts(blocks: &[(u64, i64)]) -> Counts {
        let blocks = blocks.iter().map(|(pc, n)| (*pc, Executed { times: 1, instructions: *n })).collect();
        Counts { blocks, unlisted: 0 }
    }

    #[test]
    fn an_address_says_whose_it_is() {
        let of = |address| Layer::of(address, &DOM0);
        assert_eq!(of(0x40_1000), Layer::Guests);
        assert_eq!(
            [0x4000_0000, 0x407f_ffff, 0x4080_0000].map(of),
            [Layer::Dom0, Layer::Dom0, Layer::Guests]
        );
        assert_eq!(of(0xffff_82d0_4020_0000), Layer::Hypervisor);
    }

    #[test]
    fn what_is_done_more_often_is_divided_by_how_much_more() -> Result<()> {
        let few = counts(&[(0x40_1000, 5_000), (0x4000_1000, 20_000), (0xffff_82d0_4020_0000, 900)]);
        let more = counts(&[(0x40_1000, 11_000), (0x4000_1000, 80_000), (0xffff_82d0_4020_0000, 3_900)]);
        let text = "measured: 1 ns busy\ndom0> measure x\nmeasured: 25900 ns busy, 7 ns idle, 3 hypercalls\nmeasured: 95300 ns busy, 0 ns idle";
        let periods = pair(vec![few, more], text)?;
        assert!(pair(vec![Counts::default()], text).is_err(), "one is missing");
        let one = difference(&ROWS[0], &periods)?;
        assert_eq!(ROWS[0].times, (200, 800));
        assert_eq!(split(&one, &DOM0), Split { guests: 10.0, hypervisor: 5.0, dom0: 100.0 });
        // 115 counted, 115.67 by the clock.
        assert!(agrees(&one, &DOM0).is_ok());
        assert!(agrees(&Measured { busy_ns: 70_000.0, ..one }, &DOM0).is_err());
        Ok(())
    }

    #[test]
    fn the_table_is_markdown() {
        let split = Split { guests: 1234.6, hypervisor: 0.2, dom0: 1_000_000.0 };
        let text = table(&[Host::Xenolith, Host::Xen], &["a", "b"], &[vec![split; 2], vec![split; 2]]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].contains("| xenolith: guests | hypervisor | dom0 | all | xen: guests |"), "{text}");
        assert!(lines[3].starts_with("| b | 1,235 | 0 | 1,000,000 | 1,001,235 | 1,235 |"), "{text}");
        assert!(lines.iter().all(|line| line.matches('|').count() == 10), "{text}");
        assert_eq!([0, 999, 1000, -1234567].map(thousands), ["0", "999", "1,000", "-1,234,567"]);
    }

    #[test]
    fn each_row_is_done_once_before_it_is_measured_twice() {
        let script = script(&[&ROWS[9]]);
        let at = |text: &str| script.iter().position(|command| command.contains(text)).unwrap_or(usize::MAX);
        assert!(at("create ping") < at("run ping"), "{script:?}");
        assert!(script[at("run ping")].starts_with("run"), "{script:?}");
        let measured: Vec<&String> =
            script.iter().filter(|command| command.starts_with("measure run")).collect();
        assert!(measured[0].contains("count=100") && measured[1].contains("count=400"), "{measured:?}");
        assert_eq!(script.last().map(String::as_str), Some("destroy echo"));
        assert!(ROWS.iter().all(|row| row.command.contains("{n}") && row.times.0 < row.times.1));
    }

    #[test]
    fn functions_are_named_by_what_they_execute() -> Result<()> {
        let own = std::env::current_exe()?;
        let file = sh::read(&own)?;
        let names = symbols::functions(&object::File::parse(&*file)?)?;
        let (start, end, name) =
            names.iter().find(|(start, end, _)| end - start > 16).context("a function")?;
        let counts = counts(&[(*start, 1200), (start + 8, 600), (end + (1 << 40), 600)]);
        let one = Measured { row: &ROWS[0], counts, busy_ns: 0.0 };
        let text = functions(&one, &DOM0, 1, |layer| (layer == Layer::Guests).then_some(own.as_path()))?;
        assert!(text.starts_with("guests:\n") && text.contains(name.as_str()), "{text}");
        assert!(text.contains("3.0    0.00x"), "{text}");
        Ok(())
    }
}

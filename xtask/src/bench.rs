//! `cargo xtask bench`: what operations cost on Xenolith and on real Xen, counted in instructions by one and the same guest.

use crate::boot::{self, Boot};
use crate::build;
use crate::images::Workspace;
use crate::qemu::{self, End, Host, Machine, Watch};
use crate::{recipe, xen};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

/// The guest that measures.
const IMAGE: &str = "benchmarks";
/// Seconds for one boot.
const TIMEOUT: u64 = 300;

/// Exit code: 0 when everything was measured, and each run alike.
#[derive(clap::Args)]
pub struct Args {
    /// Who is measured
    #[arg(long, value_enum, default_value_t = On::Both, value_name = "HYPERVISOR")]
    on: On,
    /// CPUs of the machine; the guest runs on one
    #[arg(long, value_name = "N", default_value_t = 1)]
    smp: u32,
    /// Only rows whose name contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Measure so many times, and fail when two runs differ
    #[arg(long, value_name = "N", default_value_t = 1)]
    runs: u32,
    /// Words for the hypervisors' command lines
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum On {
    /// This hypervisor
    Xenolith,
    /// Debian's Xen 4.17
    Xen,
    /// Both, compared
    Both,
}

/// What an operation costs, in instructions; `None` where it was not measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    operation: String,
    xen: Option<f64>,
    xenolith: Option<f64>,
    /// Xenolith's part of Xen's.
    ratio: Option<f64>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    qemu::require()?;
    let workspace = Workspace::load()?;
    let mut found = [Vec::new(), Vec::new()];
    for (host, rows) in [Host::Xen, Host::Xenolith].into_iter().zip(&mut found) {
        let wanted = match args.on {
            On::Both => true,
            On::Xen => host == Host::Xen,
            On::Xenolith => host == Host::Xenolith,
        };
        if !wanted {
            continue;
        }
        *rows = measure(&workspace, host, &args)?;
        for run in 1..args.runs {
            same(rows, &measure(&workspace, host, &args)?)
                .with_context(|| format!("run {} on {host} is not like the first", run + 1))?;
        }
    }
    let [xen, xenolith] = found;
    let mut rows = join(&xen, &xenolith);
    rows.retain(|row| row.operation.contains(&args.filter));
    if rows.is_empty() {
        bail!("no row has `{}` in its name", args.filter);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", table(&rows));
    }
    Ok(ExitCode::SUCCESS)
}

/// One boot: names and instructions.
fn measure(workspace: &Workspace, host: Host, args: &Args) -> Result<Vec<(String, f64)>> {
    let hypervisor = match host {
        Host::Xenolith => build::hypervisor(workspace)?,
        Host::Xen => xen::image(&workspace.target_dir)?,
    };
    let image = workspace.guest(IMAGE)?;
    let kernel = recipe::guests(workspace, &[image])?.pop().context("one image in, one image out")?;
    let kernel = build::stripped(workspace, &kernel)?;
    let machine = Machine { smp: Some(args.smp), icount: true, ..Machine::default() };
    let words = format!("dom0_mem=128M dom0_max_vcpus=2 {}", args.append);
    let boot = Boot {
        host,
        hypervisor: &hypervisor,
        kernel: &kernel,
        module: None,
        words: words.trim(),
        cmdline: "",
        joined: &workspace.target_dir.join("image/boot/bench"),
    };
    let qemu = boot::command(&machine, &boot)?;
    let timeout = Some(Duration::from_secs(TIMEOUT));
    let watched = qemu::watch(qemu, &Watch { host, timeout, quiet: true, steps: &[], channel: None })?;
    let good = watched.end == End::Poweroff && watched.text.contains("Test result: SUCCESS");
    if !good {
        let lines: Vec<&str> = watched.text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
        bail!("the guest did not end well on {host} ({}); its last lines:\n{tail}", watched.end);
    }
    Ok(parse(&watched.text))
}

/// The rows that the guest printed: `bench: NAME = NUMBER`.
fn parse(text: &str) -> Vec<(String, f64)> {
    let row = |line: &str| {
        let (_, row) = line.split_once("bench: ")?;
        let (name, number) = row.rsplit_once(" = ")?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(row).collect()
}

fn same(first: &[(String, f64)], again: &[(String, f64)]) -> Result<()> {
    if first.len() != again.len() {
        bail!("{} rows, then {}", first.len(), again.len());
    }
    match first.iter().zip(again).find(|(first, again)| first != again) {
        Some(((name, first), (_, again))) => bail!("{name}: {first}, then {again}"),
        None => Ok(()),
    }
}

/// Both hypervisors' numbers by operation, in the order of the guest.
fn join(xen: &[(String, f64)], xenolith: &[(String, f64)]) -> Vec<Row> {
    let find =
        |rows: &[(String, f64)], name: &str| rows.iter().find(|(other, _)| other == name).map(|(_, n)| *n);
    let longer = if xenolith.len() >= xen.len() { xenolith } else { xen };
    longer
        .iter()
        .map(|(operation, _)| {
            let (xen, ours) = (find(xen, operation), find(xenolith, operation));
            let ratio = xen.zip(ours).filter(|(xen, _)| *xen > 0.0).map(|(xen, ours)| ours / xen);
            Row { operation: operation.clone(), xen, xenolith: ours, ratio }
        })
        .collect()
}

/// As Markdown.
fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.operation.chars().count()).max().unwrap_or(0).max(9);
    let number = |value: Option<f64>, digits| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let mut text =
        format!("| {:width$} | {:>10} | {:>10} | {:>5} |\n", "operation", "Xen", "Xenolith", "ratio");
    _ = writeln!(text, "|-{0:-<width$}-|-{0:->10}:|-{0:->10}:|-{0:->5}:|", "");
    for row in rows {
        _ = writeln!(
            text,
            "| {:width$} | {:>10} | {:>10} | {:>5} |",
            row.operation,
            number(row.xen, 1),
            number(row.xenolith, 1),
            number(row.ratio, 2)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Vec<(String, f64)> {
        parse(text)
    }

    #[test]
    fn rows_are_read_and_joined() {
        let xen = rows("(XEN) x\nbench: a = b = 200.00\r\nbench: c = 3.50\nbench: broken = x\n");
        assert_eq!(xen, [("a = b".into(), 200.0), ("c".into(), 3.5)]);
        let joined = join(&xen, &rows("bench: a = b = 50.00\nbench: new = 1.00\nbench: c = 7.00\n"));
        assert_eq!(joined.iter().map(|row| row.ratio).collect::<Vec<_>>(), [Some(0.25), None, Some(2.0)]);
        let text = table(&joined);
        assert!(text.contains("| a = b     |      200.0 |       50.0 |  0.25 |"), "{text}");
        assert!(text.contains("| new       |          - |        1.0 |     - |"), "{text}");
        let widths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{text}");
    }

    #[test]
    fn runs_that_differ_are_named() {
        let first = rows("bench: a = 1.00\nbench: b = 2.00\n");
        assert!(same(&first, &first).is_ok());
        let error = same(&first, &rows("bench: a = 1.00\nbench: b = 2.01\n")).unwrap_err();
        assert_eq!(error.to_string(), "b: 2, then 2.01");
        assert!(same(&first, &first[..1]).is_err());
    }
}

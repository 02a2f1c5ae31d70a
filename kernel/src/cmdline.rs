//! The command line: words before ` --- ` are the hypervisor's, what follows is dom0's, verbatim.
//!
//! | word | meaning |
//! |---|---|
//! | `loglvl=none\|error\|warning\|info\|debug\|all` | least severe messages that are printed (default `info`) |
//! | `dom0_mem=SIZE` | dom0's memory; SIZE with K, M or G, without one in KiB (default: half of what is free) |
//! | `dom0_max_vcpus=N` | dom0's virtual CPUs (default 1) |
//! | `dom0_guarantee=PERCENT` | CPU time that dom0 gets before all others, in percent of one processor, 0 to 100 (default 50) |
//! | `maxcpus=N` | processors to use at most (default all) |
//! | `sched=fair\|null` | share processors by weight (default), or leave each vCPU where it is |
//! | `clocksource=tsc\|hpet\|acpi` | the counter that tells the time (default: the TSC where it can be trusted, else the HPET, else the PM timer) |
//! | `calibrate=hpet\|acpi\|pit` | what the TSC is measured with (default: the first of these that is there) |
//! | `com1=BAUD[,8n1]` | speed of the serial console (default 115200) |
//! | `watchdog_timeout=N` | seconds until a processor that does not come out of ring 0 is reported and the host stopped (default 5; 0: never) |
//! | `wedge=N` | processor N stops in ring 0 three seconds after boot, for a test of the watchdog |
//! | `debug-exit=PORT` | port of QEMU's isa-debug-exit device, told how the host ended |
//! | `noreboot` | a stopped host stays stopped, its last words on the screen |
#![forbid(unsafe_code)]

use arrayvec::ArrayVec;
use log::LevelFilter;

use crate::sched::Sharing;
use crate::watchdog;
use crate::x86::clocksource::Source;

/// The separator between our words and dom0's command line.
const SEPARATOR: &str = "---";
/// Words that were not understood, kept for a warning.
const MAX_UNKNOWN: usize = 16;

/// The hypervisor's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options<'a> {
    /// Least severe messages that are printed.
    pub log_level: LevelFilter,
    /// dom0's memory in bytes, if given.
    pub dom0_mem: Option<u64>,
    /// dom0's virtual CPUs, at least 1.
    pub dom0_max_vcpus: u32,
    /// CPU time that dom0 gets before all others, in percent of one processor.
    pub dom0_guarantee: u32,
    /// Processors to use at most, at least 1.
    pub max_cpus: u32,
    /// How processors are shared.
    pub sharing: Sharing,
    /// Seconds until a stuck processor is reported; 0 for never.
    pub watchdog_seconds: u32,
    /// Processor that is to get stuck.
    pub wedge: Option<u32>,
    /// The counter that is to tell the time.
    pub clock: Option<Source>,
    /// The counter that the TSC is to be measured with.
    pub calibrate: Option<Source>,
    /// Speed of the serial line in baud.
    pub baud: u32,
    /// Port of the isa-debug-exit device.
    pub debug_exit: Option<u16>,
    /// Stay stopped instead of rebooting.
    pub noreboot: bool,
    /// All our words.
    pub words: &'a str,
    /// dom0's command line.
    pub dom0: &'a str,
    /// Words that name no option or whose value cannot be read.
    pub unknown: ArrayVec<&'a str, MAX_UNKNOWN>,
}

/// Reads a command line. Never fails: what is not understood is listed in `unknown`, the first 16 words of it.
#[must_use]
pub fn parse(line: &str) -> Options<'_> {
    let (ours, dom0) = split(line);
    let mut options = Options {
        log_level: LevelFilter::Info,
        dom0_mem: None,
        dom0_max_vcpus: 1,
        dom0_guarantee: 50,
        max_cpus: u32::MAX,
        sharing: Sharing::Fair,
        watchdog_seconds: watchdog::DEFAULT_LIMIT,
        wedge: None,
        clock: None,
        calibrate: None,
        baud: 115_200,
        debug_exit: None,
        noreboot: false,
        words: ours,
        dom0,
        unknown: ArrayVec::new(),
    };
    for word in ours.split_ascii_whitespace() {
        if apply(&mut options, word).is_none() {
            // Beyond the sixteenth nobody reads on.
            let _ = options.unknown.try_push(word);
        }
    }
    options
}

/// Our words, and dom0's: what follows one space behind the first word that is the separator.
fn split(line: &str) -> (&str, &str) {
    let mut from = 0;
    while let Some(at) = line.get(from..).and_then(|rest| rest.find(SEPARATOR)).map(|at| from + at) {
        let (before, after) = (line.get(..at).unwrap_or(""), line.get(at + SEPARATOR.len()..).unwrap_or(""));
        if (before.is_empty() || before.ends_with(' ')) && (after.is_empty() || after.starts_with(' ')) {
            return (before, after.strip_prefix(' ').unwrap_or(after));
        }
        from = at + 1;
    }
    (line, "")
}

fn apply(options: &mut Options<'_>, word: &str) -> Option<()> {
    let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
    match (name, value) {
        ("noreboot", None) => options.noreboot = true,
        ("loglvl", Some(value)) => {
            options.log_level = match value {
                "none" => LevelFilter::Off,
                "error" => LevelFilter::Error,
                "warning" => LevelFilter::Warn,
                "info" => LevelFilter::Info,
                "debug" => LevelFilter::Debug,
                "all" => LevelFilter::Trace,
                _ => return None,
            }
        }
        ("dom0_mem", Some(value)) => options.dom0_mem = Some(size(value)?),
        ("dom0_max_vcpus", Some(value)) => {
            options.dom0_max_vcpus = value.parse().ok().filter(|n| (1..=64).contains(n))?;
        }
        ("dom0_guarantee", Some(value)) => {
            options.dom0_guarantee = value.parse().ok().filter(|percent| *percent <= 100)?;
        }
        ("maxcpus", Some(value)) => options.max_cpus = value.parse().ok().filter(|n| *n >= 1)?,
        ("sched", Some("fair")) => options.sharing = Sharing::Fair,
        ("sched", Some("null")) => options.sharing = Sharing::Null,
        ("watchdog_timeout", Some(value)) => options.watchdog_seconds = value.parse().ok()?,
        ("wedge", Some(value)) => options.wedge = Some(value.parse().ok()?),
        ("clocksource", Some("tsc")) => options.clock = Some(Source::Tsc),
        ("clocksource", Some("hpet")) => options.clock = Some(Source::Hpet),
        ("clocksource", Some("acpi")) => options.clock = Some(Source::PmTimer),
        ("calibrate", Some("hpet")) => options.calibrate = Some(Source::Hpet),
        ("calibrate", Some("acpi")) => options.calibrate = Some(Source::PmTimer),
        ("calibrate", Some("pit")) => options.calibrate = Some(Source::Pit),
        ("com1", Some(value)) => {
            let (speed, format) = value.split_once(',').unwrap_or((value, "8n1"));
            let speed = speed.parse().ok().filter(|b| (50..=115_200).contains(b))?;
            options.baud = (format == "8n1").then_some(speed)?;
        }
        ("debug-exit", Some(value)) => {
            let port = match value.strip_prefix("0x") {
                Some(hex) => u16::from_str_radix(hex, 16).ok(),
                None => value.parse().ok(),
            };
            options.debug_exit = Some(port.filter(|p| *p != 0)?);
        }
        _ => return None,
    }
    Some(())
}

/// A size in bytes: a number with K, M or G (either case); without one it counts KiB, as on Xen.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (text.get(..text.len().checked_sub(1)?)?, 10),
        b'm' | b'M' => (text.get(..text.len().checked_sub(1)?)?, 20),
        b'g' | b'G' => (text.get(..text.len().checked_sub(1)?)?, 30),
        _ => (text, 10),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn every_option() {
        let line = "loglvl=all dom0_mem=128M com1=57600,8n1 dom0_max_vcpus=2 maxcpus=3 sched=null \
                    watchdog_timeout=9 wedge=1 clocksource=hpet calibrate=pit debug-exit=0xf4 noreboot \
                    dom0_guarantee=10 --- a  --- b ";
        let o = parse(line);
        assert_eq!(o.log_level, LevelFilter::Trace);
        assert_eq!(o.dom0_mem, Some(128 << 20));
        assert_eq!((o.baud, o.dom0_max_vcpus, o.debug_exit, o.noreboot), (57600, 2, Some(0xf4), true));
        assert_eq!(
            (o.dom0_guarantee, parse("").dom0_guarantee, parse("dom0_guarantee=0").dom0_guarantee),
            (10, 50, 0)
        );
        assert_eq!((o.max_cpus, o.sharing, o.watchdog_seconds, o.wedge), (3, Sharing::Null, 9, Some(1)));
        assert_eq!((o.clock, o.calibrate), (Some(Source::Hpet), Some(Source::Pit)));
        assert_eq!(parse("clocksource=acpi clocksource=tsc calibrate=acpi").clock, Some(Source::Tsc));
        assert_eq!(o.dom0, "a  --- b ", "dom0's part is verbatim, another separator included");
        assert!(o.unknown.is_empty());
    }

    #[test]
    fn the_separator_is_a_whole_word() {
        assert_eq!(parse("--- x").dom0, "x");
        assert_eq!(parse("noreboot ---").dom0, "");
        let o = parse("a---b ----  --- c");
        assert_eq!(o.dom0, "c");
        assert_eq!(o.unknown.as_slice(), ["a---b", "----"]);
        assert_eq!(parse("").dom0, "");
    }

    #[test]
    fn what_cannot_be_read_is_reported_and_changes_nothing() {
        let bad = [
            "loglvl=loud dom0_mem= dom0_mem=12Q dom0_mem=99999999999G com1=fast com1=9600,7e1 iommu=on é",
            "dom0_max_vcpus=0 dom0_guarantee=101 maxcpus=0 sched=rr watchdog_timeout=x wedge= clocksource=pit",
            "calibrate=tsc debug-exit=0x10000 noreboot=1",
        ];
        for bad in bad {
            let o = parse(bad);
            assert_eq!(o.unknown.as_slice(), bad.split_ascii_whitespace().collect::<Vec<_>>());
            assert_eq!(o.words, bad);
            assert_eq!(Options { unknown: ArrayVec::new(), words: "", ..o }, parse(""));
        }
        let many = "x ".repeat(40);
        assert_eq!(parse(&many).unknown.len(), MAX_UNKNOWN);
    }

    #[test]
    fn sizes() {
        for (text, want) in
            [("64", Some(64 << 10)), ("1g", Some(1 << 30)), ("8k", Some(8192)), ("K", None), ("", None)]
        {
            assert_eq!(size(text), want, "{text}");
        }
    }
}

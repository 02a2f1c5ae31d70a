//! Accounts of domains, vCPUs and CPUs: what `list --json` tells, and what `top` makes of two of them.
//!
//! Counts and times grow for as long as their domain exists. Numbers that a hypervisor does not tell are left out, and what back
//! ends move for a domain where dom0 runs none for it.

use crate::hypervisor::{DomainUsage, VcpuUsage};
use crate::table::{Align, Table};
use crate::units::{Bytes, count, seconds};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::AddAssign;
use hashbrown::HashMap;
use serde::Serialize;

/// Characters of a bar.
const BAR: u64 = 40;

/// What back ends moved for a domain through all disks and cards that it has or had; reads and receptions are the domain's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Requests to its disks.
    pub block_requests: u64,
    /// Bytes that it read from them.
    pub block_read_bytes: u64,
    /// Bytes that it wrote to them.
    pub block_written_bytes: u64,
    /// Requests that were answered with an error.
    pub block_errors: u64,
    /// Frames that it sent and that went anywhere.
    pub net_sent_frames: u64,
    /// Their bytes.
    pub net_sent_bytes: u64,
    /// Frames that went to it.
    pub net_received_frames: u64,
    /// Their bytes.
    pub net_received_bytes: u64,
}

impl Traffic {
    /// Each number, of this and another, made one.
    fn with(self, other: Traffic, make: impl Fn(u64, u64) -> u64) -> Traffic {
        Traffic {
            block_requests: make(self.block_requests, other.block_requests),
            block_read_bytes: make(self.block_read_bytes, other.block_read_bytes),
            block_written_bytes: make(self.block_written_bytes, other.block_written_bytes),
            block_errors: make(self.block_errors, other.block_errors),
            net_sent_frames: make(self.net_sent_frames, other.net_sent_frames),
            net_sent_bytes: make(self.net_sent_bytes, other.net_sent_bytes),
            net_received_frames: make(self.net_received_frames, other.net_received_frames),
            net_received_bytes: make(self.net_received_bytes, other.net_received_bytes),
        }
    }

    /// Bytes to and from disks.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.block_read_bytes.saturating_add(self.block_written_bytes)
    }

    /// Bytes to and from cards.
    #[must_use]
    pub fn net_bytes(&self) -> u64 {
        self.net_sent_bytes.saturating_add(self.net_received_bytes)
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        *self = self.with(other, u64::saturating_add);
    }
}

/// A domain's account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainAccount {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u16,
    /// What it does.
    pub state: String,
    /// Memory that it has.
    pub memory_bytes: u64,
    /// vCPUs that it may have.
    pub vcpus: u32,
    /// CPU time of all of them.
    pub cpu_time_ns: u64,
    /// What only some hypervisors tell.
    #[serde(flatten)]
    pub usage: Option<DomainUsage>,
    /// What back ends of this dom0 moved for it.
    #[serde(flatten)]
    pub traffic: Option<Traffic>,
    /// Each vCPU's, where wanted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vcpu: Vec<VcpuAccount>,
}

/// A vCPU's account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuAccount {
    /// Its number.
    pub id: u32,
    /// The CPU it is or was last on.
    pub cpu: u32,
    /// What it does.
    pub state: &'static str,
    /// Its CPU time (`RUNSTATE_running`).
    pub running_ns: u64,
    /// What only some hypervisors tell.
    #[serde(flatten)]
    pub usage: Option<VcpuUsage>,
}

/// All accounts at one time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Accounts {
    /// Time since the hypervisor started.
    pub system_time_ns: u64,
    /// Time that each CPU idled; empty when nobody tells.
    pub cpu_idle_ns: Vec<u64>,
    /// All domains, in the order of their numbers.
    pub domains: Vec<DomainAccount>,
}

/// What a domain did between two accounts. Rates are per second, shares in thousandths of one CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u16,
    /// What it does.
    pub state: String,
    /// Memory that it has.
    pub memory_bytes: u64,
    /// CPU time since it was made.
    pub cpu_time_ns: u64,
    /// CPU time of all its vCPUs.
    pub cpu_permille: u64,
    /// Time that they wanted to run and did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stolen_permille: Option<u64>,
    /// Hypercalls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypercalls: Option<u64>,
    /// Exceptions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faults: Option<u64>,
    /// Upcalls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upcalls: Option<u64>,
    /// What back ends moved for it.
    #[serde(flatten)]
    pub traffic: Option<Traffic>,
}

/// What the machine did between two accounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Time of the second, since the hypervisor started.
    pub system_time_ns: u64,
    /// Time between them.
    pub span_ns: u64,
    /// How busy each CPU was, in thousandths; empty when nobody tells.
    pub cpu_permille: Vec<u64>,
    /// All domains of the second.
    pub domains: Vec<Load>,
}

/// What a report is sorted by: numbers with the largest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// The name.
    Name,
    /// The number, the smallest first.
    Id,
    /// CPU time in the span.
    Cpu,
    /// Stolen time in the span.
    Stolen,
    /// CPU time since the domain was made.
    Time,
    /// Memory.
    Memory,
    /// Hypercalls in the span.
    Hypercalls,
    /// Exceptions in the span.
    Faults,
    /// Bytes to and from disks in the span.
    Disk,
    /// Bytes to and from network cards in the span.
    Net,
}

impl Key {
    /// All keys, with the words and the letters that choose them.
    pub const ALL: [(Key, &'static str, u8); 10] = [
        (Key::Cpu, "cpu", b'c'),
        (Key::Stolen, "stolen", b's'),
        (Key::Time, "time", b't'),
        (Key::Memory, "memory", b'm'),
        (Key::Hypercalls, "hypercalls", b'h'),
        (Key::Faults, "faults", b'f'),
        (Key::Disk, "disk", b'd'),
        (Key::Net, "net", b'e'),
        (Key::Name, "name", b'n'),
        (Key::Id, "id", b'i'),
    ];

    /// The key that a word names.
    ///
    /// # Errors
    /// What to say when it names none.
    pub fn parse(word: &str) -> Result<Key, String> {
        let found = Key::ALL.iter().find(|(_, name, _)| *name == word).map(|(key, ..)| *key);
        found.ok_or_else(|| {
            let names = Key::ALL.map(|(_, name, _)| name);
            format!("{word:?} is nothing to sort by: there are {}", names.join(", "))
        })
    }

    /// The key that a letter chooses.
    #[must_use]
    pub fn of_letter(letter: u8) -> Option<Key> {
        Key::ALL.iter().find(|(_, _, its)| *its == letter).map(|(key, ..)| *key)
    }

    fn word(self) -> &'static str {
        Key::ALL.iter().find(|(key, ..)| *key == self).map_or("", |(_, word, _)| word)
    }
}

/// `part` of `span` in thousandths.
fn permille(part: u64, span: u64) -> u64 {
    u64::try_from(u128::from(part) * 1000 / u128::from(span.max(1))).unwrap_or(u64::MAX)
}

/// `number` in `span_ns`, per second.
fn per_second(number: u64, span_ns: u64) -> u64 {
    u64::try_from(u128::from(number) * 1_000_000_000 / u128::from(span_ns.max(1))).unwrap_or(u64::MAX)
}

fn percent(permille: u64) -> String {
    format!("{}.{} %", permille / 10, permille % 10)
}

impl Report {
    /// What happened between two accounts.
    #[must_use]
    pub fn between(before: &Accounts, now: &Accounts) -> Report {
        let span_ns = now.system_time_ns.saturating_sub(before.system_time_ns).max(1);
        let busy =
            |(now, before): (&u64, &u64)| 1000 - permille(now.saturating_sub(*before), span_ns).min(1000);
        let earlier: HashMap<_, _> = before.domains.iter().map(|before| (before.id, before)).collect();
        let load = |now: &DomainAccount| {
            // One that has its number anew is another domain.
            let before = earlier
                .get(&now.id)
                .filter(|before| before.name == now.name && before.cpu_time_ns <= now.cpu_time_ns);
            let since = |value: fn(&DomainUsage) -> u64| {
                let usage = now.usage.as_ref()?;
                let earlier = before.and_then(|before| before.usage.as_ref()).map_or(0, value);
                Some(value(usage).saturating_sub(earlier))
            };
            let rate = |value| since(value).map(|more| per_second(more, span_ns));
            Load {
                name: now.name.clone(),
                id: now.id,
                state: now.state.clone(),
                memory_bytes: now.memory_bytes,
                cpu_time_ns: now.cpu_time_ns,
                cpu_permille: permille(
                    now.cpu_time_ns - before.map_or(0, |before| before.cpu_time_ns),
                    span_ns,
                ),
                stolen_permille: since(|usage| usage.stolen_ns).map(|stolen| permille(stolen, span_ns)),
                hypercalls: rate(|usage| usage.hypercalls),
                faults: rate(|usage| usage.faults),
                upcalls: rate(|usage| usage.upcalls),
                traffic: now.traffic.map(|traffic| {
                    let earlier = before.and_then(|before| before.traffic).unwrap_or_default();
                    traffic.with(earlier, |now, before| per_second(now.saturating_sub(before), span_ns))
                }),
            }
        };
        Report {
            system_time_ns: now.system_time_ns,
            span_ns,
            cpu_permille: now.cpu_idle_ns.iter().zip(&before.cpu_idle_ns).map(busy).collect(),
            domains: now.domains.iter().map(load).collect(),
        }
    }

    /// Sorts the domains.
    pub fn sort(&mut self, key: Key) {
        let largest = |value: fn(&Load) -> u64| move |load: &Load| core::cmp::Reverse(value(load));
        match key {
            Key::Name => self.domains.sort_by(|a, b| a.name.cmp(&b.name)),
            Key::Id => self.domains.sort_by_key(|load| load.id),
            Key::Cpu => self.domains.sort_by_key(largest(|load| load.cpu_permille)),
            Key::Stolen => self.domains.sort_by_key(largest(|load| load.stolen_permille.unwrap_or(0))),
            Key::Time => self.domains.sort_by_key(largest(|load| load.cpu_time_ns)),
            Key::Memory => self.domains.sort_by_key(largest(|load| load.memory_bytes)),
            Key::Hypercalls => self.domains.sort_by_key(largest(|load| load.hypercalls.unwrap_or(0))),
            Key::Faults => self.domains.sort_by_key(largest(|load| load.faults.unwrap_or(0))),
            Key::Disk => {
                self.domains.sort_by_key(largest(|load| load.traffic.map_or(0, |its| its.block_bytes())));
            }
            Key::Net => {
                self.domains.sort_by_key(largest(|load| load.traffic.map_or(0, |its| its.net_bytes())));
            }
        }
    }

    /// The report for people, sorted by `key`.
    #[must_use]
    pub fn show(&self, key: Key) -> String {
        let mut text = format!(
            "{}, {}, by {}\n",
            count(self.domains.len(), "domain"),
            seconds(self.system_time_ns),
            key.word()
        );
        for (cpu, busy) in self.cpu_permille.iter().enumerate() {
            let full = (busy * BAR).div_ceil(1000).min(BAR) as usize;
            let bar = "#".repeat(full) + &" ".repeat(BAR as usize - full);
            text += &format!("CPU {cpu:>2} [{bar}] {:>7}\n", percent(*busy));
        }
        let mut table = Table::new([
            ("NAME", Align::Left),
            ("ID", Align::Right),
            ("CPU", Align::Right),
            ("STOLEN", Align::Right),
            ("CPU TIME", Align::Right),
            ("MEMORY", Align::Right),
            ("CALLS/S", Align::Right),
            ("FAULTS/S", Align::Right),
            ("EVENTS/S", Align::Right),
            ("DISK/S", Align::Right),
            ("NET/S", Align::Right),
            ("STATE", Align::Left),
        ]);
        let number = |value: Option<u64>| value.map_or("-".into(), |value| value.to_string());
        let bytes = |load: &Load, value: fn(&Traffic) -> u64| {
            load.traffic.as_ref().map_or("-".into(), |its| Bytes::new(value(its)).to_string())
        };
        for load in &self.domains {
            table.row([
                load.name.clone(),
                load.id.to_string(),
                percent(load.cpu_permille),
                load.stolen_permille.map_or("-".into(), percent),
                seconds(load.cpu_time_ns),
                Bytes::of_pages(load.memory_bytes / crate::units::PAGE).to_string(),
                number(load.hypercalls),
                number(load.faults),
                number(load.upcalls),
                bytes(load, Traffic::block_bytes),
                bytes(load, Traffic::net_bytes),
                load.state.clone(),
            ]);
        }
        text + &table.to_string()
    }
}

/// As JSON, in one line.
pub fn json(value: &impl Serialize) -> String {
    // There is nothing in it that JSON has no form for.
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn domain(name: &str, id: u16, cpu_time_ns: u64, hypercalls: u64) -> DomainAccount {
        let usage = DomainUsage { hypercalls, stolen_ns: cpu_time_ns / 2, ..DomainUsage::default() };
        DomainAccount {
            name: name.into(),
            id,
            state: "running".into(),
            memory_bytes: 4096 * u64::from(id),
            vcpus: 1,
            cpu_time_ns,
            usage: Some(usage),
            traffic: None,
            vcpu: vec![],
        }
    }

    /// A domain that moved so many bytes to and from its disk, and its card.
    fn moving(name: &str, id: u16, block: u64, net: u64) -> DomainAccount {
        let traffic = Traffic {
            block_requests: block / 4096,
            block_read_bytes: block / 4,
            block_written_bytes: block - block / 4,
            net_sent_frames: net / 1000,
            net_sent_bytes: net / 8,
            net_received_bytes: net - net / 8,
            ..Traffic::default()
        };
        DomainAccount { traffic: Some(traffic), ..domain(name, id, 0, 0) }
    }

    #[test]
    fn what_back_ends_move_is_told_shown_and_sorted_by() {
        const S: u64 = 1_000_000_000;
        let at = |system_time_ns, domains| Accounts { system_time_ns, cpu_idle_ns: vec![], domains };
        let before =
            at(S, vec![moving("disk", 1, 1 << 20, 0), moving("net", 2, 0, 0), domain("dom0", 0, 0, 0)]);
        let now = at(
            3 * S,
            vec![moving("disk", 1, 9 << 20, 0), moving("net", 2, 4096, 64_000), domain("dom0", 0, 0, 0)],
        );
        let whole = json(&now);
        assert!(whole.contains(r#""block_requests":2304,"block_read_bytes":2359296,"#), "{whole}");
        assert!(whole.contains(r#""net_sent_frames":64,"net_sent_bytes":8000,"#), "{whole}");
        let mut report = Report::between(&before, &now);
        let rates: Vec<_> =
            report.domains.iter().map(|load| load.traffic.map(|its| its.block_bytes())).collect();
        assert_eq!(rates, [Some(4 << 20), Some(2048), None], "per second");
        assert_eq!(report.domains[1].traffic.map(|its| its.net_bytes()), Some(32_000));
        for (key, first) in [(Key::Net, "net"), (Key::Disk, "disk")] {
            report.sort(key);
            assert_eq!(report.domains[0].name, first);
        }
        let text = report.show(Key::Disk);
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for (name, end) in
            [("NAME", "DISK/S NET/S STATE"), ("disk", "4 MiB 0 KiB running"), ("dom0", "- - running")]
        {
            assert!(lines.iter().any(|line| line.starts_with(name) && line.ends_with(end)), "{name}: {text}");
        }
    }

    fn report() -> Report {
        const S: u64 = 1_000_000_000;
        let before = Accounts {
            system_time_ns: 10 * S,
            cpu_idle_ns: vec![S, 2 * S],
            domains: vec![domain("a", 1, S, 100), domain("b", 2, 2 * S, 5), domain("old", 3, 9 * S, 7)],
        };
        let now = Accounts {
            system_time_ns: 12 * S,
            cpu_idle_ns: vec![S, 4 * S],
            domains: vec![
                domain("a", 1, 2 * S, 1100),
                domain("b", 2, 3 * S + S / 2, 5),
                domain("new", 3, S, 9),
            ],
        };
        Report::between(&before, &now)
    }

    #[test]
    fn rates_are_per_second_and_new_domains_begin_at_nothing() {
        let report = report();
        assert_eq!(report.cpu_permille, [1000, 0]);
        let cpu: Vec<u64> = report.domains.iter().map(|load| load.cpu_permille).collect();
        assert_eq!(cpu, [500, 750, 500]);
        assert_eq!(report.domains[0].hypercalls, Some(500));
        assert_eq!((report.domains[0].stolen_permille, report.domains[2].hypercalls), (Some(250), Some(4)));
    }

    #[test]
    fn each_key_sorts() {
        for (key, order) in [
            (Key::Cpu, ["b", "a", "new"]),
            (Key::Time, ["b", "a", "new"]),
            (Key::Memory, ["new", "b", "a"]),
            (Key::Hypercalls, ["a", "new", "b"]),
            (Key::Name, ["a", "b", "new"]),
            (Key::Id, ["a", "b", "new"]),
            (Key::Stolen, ["b", "a", "new"]),
        ] {
            let mut report = report();
            report.sort(key);
            let names: Vec<&str> = report.domains.iter().map(|load| load.name.as_str()).collect();
            assert_eq!(names, order, "{key:?}");
        }
        for (key, word, letter) in Key::ALL {
            assert_eq!((Key::parse(word), Key::of_letter(letter)), (Ok(key), Some(key)));
        }
        assert!(Key::parse("x").is_err() && Key::of_letter(b'q').is_none());
    }

    #[test]
    fn a_bar_for_each_cpu_and_a_line_for_each_domain() {
        let text = report().show(Key::Cpu);
        assert!(text.starts_with("3 domains, 12.0s, by cpu\nCPU  0 [########"), "{text}");
        assert!(text.contains("\nCPU  1 [                                        ]   0.0 %\n"), "{text}");
        assert!(text.lines().any(|line| line.starts_with("a      1  50.0 %  25.0 %      2.0s")), "{text}");
    }

    #[test]
    fn json_has_what_is_told_and_leaves_out_what_is_not() {
        let mut domain = domain("a\"b", 1, 5, 6);
        assert!(json(&domain).starts_with(r#"{"name":"a\"b","id":1,"state":"running","memory_bytes":4096,"#));
        assert!(json(&domain).contains(r#""hypercalls":6"#));
        domain.usage = None;
        assert!(json(&domain).ends_with(r#""vcpus":1,"cpu_time_ns":5}"#), "{}", json(&domain));
    }
}

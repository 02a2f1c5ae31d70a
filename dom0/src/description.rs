//! Descriptions of domains, in TOML.
//!
//! ```toml
//! name = "demo"              # letters, digits, `-`, `_`, `.`
//! image = "hello"            # a file in images/ of the boot archive
//! memory = "4M"              # K, M or G; a multiple of 4K
//! vcpus = 1
//! cpu_weight = 256           # share of CPU time against others
//! cap = 0                    # most CPU time, in percent of one CPU; 0 for no cap
//! cpus = "all"               # CPUs that it may run on, as in "0,2-3"
//! cpus_soft = "all"          # CPUs that it should run on
//! max_event_channels = 1023  # the highest port it may have
//! max_grant_frames = 64      # frames of its grant table
//! max_maptrack_frames = 1024 # frames for grants of others that it has mapped, 256 in each
//! cmdline = "log=debug"
//! autostart = true           # start it when dom0 starts
//! after = ["db"]             # domains that run before this one starts
//! on_poweroff = "destroy"    # what to do when it has ended: destroy, restart or preserve
//! on_reboot = "restart"
//! on_crash = "destroy"
//! ```
//! Disks are `[[disk]]` tables behind all that, network cards `[[card]]` tables: see [`disks`](crate::disks) and
//! [`cards`](crate::cards).
//! `{domid:NAME}` in `cmdline` stands for the number of another domain, which exists or is made at the same time.
//! `name`, `image` and `memory` are needed; the values of the others here are those they have when left out, but `cmdline`,
//! which is empty, and `autostart`, which is off.

use crate::cards::{self, CardSpec};
use crate::disks::{self, DiskSpec};
use crate::policy::{Action, Policy};
use crate::schedule::{self, Schedule};
use crate::toolstack::Limits;
use crate::units::Bytes;
use crate::words;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use hypercall_abi::DomId;
use hypercall_abi::evtchn::EVTCHN_FIFO_NR_CHANNELS;
use serde::Deserialize;
use toml::Spanned;

/// Memory of a domain that has no description.
const DEFAULT_PAGES: u64 = (32 << 20) / 4096;
/// What stands before a name whose number is wanted.
const PEER: &str = "{domid:";
/// Longest name.
const MAX_NAME: usize = 31;
/// Keys of limits, with the names and units of Xen's tools (xl.cfg(5)).
const PORTS: &str = "max_event_channels";
const GRANT_FRAMES: &str = "max_grant_frames";
const MAPTRACK_FRAMES: &str = "max_maptrack_frames";
/// What a domain may use that says nothing else, as with Xen's tools.
const DEFAULT_LIMITS: Limits = Limits { max_port: 1023, grant_frames: None, maptrack_frames: None };
/// What both hypervisors allow unless they are told otherwise.
const MOST_GRANT_FRAMES: u32 = 64;
const MOST_MAPTRACK_FRAMES: u32 = 1024;
/// Ports 1 and 2 are made with the domain: its console's and its store's.
const LEAST_PORT: u32 = 2;
/// Name of the domain that this runs in.
pub const OWN_NAME: &str = "dom0";
const KEYS: &[&str] = &[
    "name",
    "image",
    "memory",
    "vcpus",
    schedule::WEIGHT,
    schedule::CAP,
    schedule::CPUS,
    schedule::CPUS_SOFT,
    "max_event_channels",
    "max_grant_frames",
    "max_maptrack_frames",
    "cmdline",
    "autostart",
    "after",
    "on_crash",
    "on_poweroff",
    "on_reboot",
    "disk",
    "card",
];

/// What a domain is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What the shell calls it.
    pub name: String,
    /// Its kernel: a file in `images/`.
    pub image: String,
    /// Its memory.
    pub memory: Bytes,
    /// Its vCPUs, from 1.
    pub vcpus: u32,
    /// How much of the CPUs it gets, and where.
    pub schedule: Schedule,
    /// How much of the hypervisor it may use.
    pub limits: Limits,
    /// Its kernel's command line.
    pub cmdline: String,
    /// Whether it starts with dom0.
    pub autostart: bool,
    /// Domains that run before it starts, and are asked to end after it has.
    pub after: Vec<String>,
    /// What happens when it ends.
    pub policy: Policy,
    /// Its disks.
    pub disks: Vec<DiskSpec>,
    /// Its network cards.
    pub cards: Vec<CardSpec>,
}

/// What is wrong with a description, and in which line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptionError {
    /// Counted from 1; `None` when it is about the whole file.
    pub line: Option<usize>,
    /// The cause, and what to do.
    pub message: String,
}

impl fmt::Display for DescriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl core::error::Error for DescriptionError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: Spanned<String>,
    image: Spanned<String>,
    memory: Spanned<String>,
    vcpus: Option<Spanned<i64>>,
    cpu_weight: Option<Spanned<i64>>,
    cap: Option<Spanned<i64>>,
    cpus: Option<Spanned<String>>,
    cpus_soft: Option<Spanned<String>>,
    max_event_channels: Option<Spanned<i64>>,
    max_grant_frames: Option<Spanned<i64>>,
    max_maptrack_frames: Option<Spanned<i64>>,
    cmdline: Option<Spanned<String>>,
    autostart: Option<bool>,
    after: Option<Spanned<Vec<String>>>,
    on_crash: Option<Action>,
    on_poweroff: Option<Action>,
    on_reboot: Option<Action>,
    #[serde(default)]
    disk: Vec<Spanned<disks::Raw>>,
    #[serde(default)]
    card: Vec<Spanned<cards::Raw>>,
}

impl Description {
    /// Reads a description.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptionError> {
        let text = core::str::from_utf8(bytes).map_err(|error| {
            let before = bytes.get(..error.valid_up_to()).unwrap_or(&[]);
            fail(Some(line_at(before, before.len())), "not UTF-8 text")
        })?;
        let raw: Raw = toml::from_str(text).map_err(|error| explain(&error, text))?;
        let line = |span: core::ops::Range<usize>| Some(line_at(bytes, span.start));

        let at = |span: core::ops::Range<usize>| move |message: String| fail(line(span), message);
        let name = check_name(raw.name.get_ref()).map_err(at(raw.name.span()))?;
        let image = check_image(raw.image.get_ref()).map_err(at(raw.image.span()))?;
        let memory = check_memory(raw.memory.get_ref()).map_err(at(raw.memory.span()))?;
        let vcpus = match &raw.vcpus {
            None => 1,
            Some(vcpus) => check_vcpus(*vcpus.get_ref()).map_err(at(vcpus.span()))?,
        };
        let mut schedule = Schedule::default();
        for (key, value) in [(schedule::WEIGHT, &raw.cpu_weight), (schedule::CAP, &raw.cap)] {
            let Some(value) = value else { continue };
            schedule.set_number(key, *value.get_ref()).map_err(at(value.span()))?;
        }
        for (key, value) in [(schedule::CPUS, &raw.cpus), (schedule::CPUS_SOFT, &raw.cpus_soft)] {
            let Some(value) = value else { continue };
            schedule.set(key, value.get_ref()).map_err(at(value.span()))?;
        }
        let mut limits = DEFAULT_LIMITS;
        for (key, value) in [
            (PORTS, &raw.max_event_channels),
            (GRANT_FRAMES, &raw.max_grant_frames),
            (MAPTRACK_FRAMES, &raw.max_maptrack_frames),
        ] {
            let Some(value) = value else { continue };
            set_limit(&mut limits, key, *value.get_ref()).map_err(at(value.span()))?;
        }
        if let Some(cmdline) = raw.cmdline.as_ref().filter(|cmdline| cmdline.get_ref().contains('\0')) {
            return Err(fail(line(cmdline.span()), "cmdline: a zero byte would end it early"));
        }
        let mut disks = Vec::new();
        for raw in raw.disk {
            let span = raw.span();
            DiskSpec::new(raw.into_inner())
                .and_then(|disk| disks::add(&mut disks, disk))
                .map_err(at(span))?;
        }
        let mut cards = Vec::new();
        for raw in raw.card {
            let span = raw.span();
            CardSpec::new(raw.into_inner())
                .and_then(|card| cards::add(&mut cards, card))
                .map_err(at(span))?;
        }
        let after = match raw.after {
            None => Vec::new(),
            Some(after) => {
                let span = after.span();
                check_after(&name, after.into_inner()).map_err(at(span))?
            }
        };
        let default = Policy::default();
        Ok(Self {
            name,
            after,
            disks,
            cards,
            image,
            memory,
            vcpus,
            schedule,
            limits,
            cmdline: raw.cmdline.map(Spanned::into_inner).unwrap_or_default(),
            autostart: raw.autostart.unwrap_or(false),
            policy: Policy {
                on_crash: raw.on_crash.unwrap_or(default.on_crash),
                on_poweroff: raw.on_poweroff.unwrap_or(default.on_poweroff),
                on_reboot: raw.on_reboot.unwrap_or(default.on_reboot),
            },
        })
    }
}

impl Description {
    /// A guest without a file: as much memory as any test or example takes, and what a file has when it does not say.
    ///
    /// # Errors
    /// What is wrong with the name.
    pub fn of_image(name: &str, image: &str) -> Result<Self, String> {
        Ok(Self {
            name: check_name(name)?,
            image: check_image(image)?,
            memory: Bytes::of_pages(DEFAULT_PAGES),
            vcpus: 1,
            schedule: Schedule::default(),
            limits: DEFAULT_LIMITS,
            cmdline: String::new(),
            autostart: false,
            after: Vec::new(),
            policy: Policy::default(),
            disks: Vec::new(),
            cards: Vec::new(),
        })
    }

    /// The command line, with the number of a domain in place of each `{domid:NAME}`.
    ///
    /// # Errors
    /// What to say when `number` knows none for a name, or a brace is open.
    pub fn command_line(&self, number: impl Fn(&str) -> Option<DomId>) -> Result<String, String> {
        let mut line = String::new();
        let mut rest = self.cmdline.as_str();
        while let Some((before, after)) = rest.split_once(PEER) {
            let (peer, after) = after
                .split_once('}')
                .ok_or_else(|| format!("cmdline: write {PEER}NAME}} with a brace at its end"))?;
            let number = number(peer).ok_or_else(|| {
                format!(
                    "its command line has the number of {peer}, which does not exist: make both at once, as in \
                     `create {} + {peer}`",
                    self.name
                )
            })?;
            line += &format!("{before}{number}");
            rest = after;
        }
        Ok(line + rest)
    }

    /// The names in its `{domid:NAME}`.
    fn peers(&self) -> impl Iterator<Item = &str> {
        self.cmdline.split(PEER).skip(1).filter_map(|rest| Some(rest.split_once('}')?.0))
    }

    /// Whether one has to be made together with the other.
    fn belongs_to(&self, other: &Self) -> bool {
        self.peers().any(|name| name == other.name) || other.peers().any(|name| name == self.name)
    }
}

/// Sorts descriptions into groups that have to be made at once, because they name each other.
#[must_use]
pub fn groups(all: Vec<Description>) -> Vec<Vec<Description>> {
    let mut groups: Vec<Vec<Description>> = Vec::new();
    for description in all {
        let is_its = |group: &Vec<Description>| group.iter().any(|other| description.belongs_to(other));
        let (its, mut others): (Vec<_>, Vec<_>) = groups.into_iter().partition(is_its);
        let mut group: Vec<Description> = its.into_iter().flatten().collect();
        group.push(description);
        others.push(group);
        groups = others;
    }
    groups
}

/// Things with names, of which some come after others: indexes in an order in which each is behind those that it comes after, and
/// otherwise as they stand. Names of nothing here do not count.
///
/// # Errors
/// Names that come after each other, the first of them again at the end.
pub fn in_order<'a>(all: &[(Vec<&'a str>, Vec<&'a str>)]) -> Result<Vec<usize>, Vec<&'a str>> {
    let waits_for = |index: usize, placed: &[usize]| {
        let (own, after) = all.get(index)?;
        after.iter().filter(|name| !own.contains(name)).find_map(|name| {
            let other = all.iter().position(|(names, _)| names.contains(name))?;
            (!placed.contains(&other)).then_some((other, *name))
        })
    };
    let mut order = Vec::new();
    while order.len() < all.len() {
        let left = || (0..all.len()).filter(|index| !order.contains(index));
        if let Some(next) = left().find(|index| waits_for(*index, &order).is_none()) {
            order.push(next);
            continue;
        }
        // Each that is left waits for another: following them leads in a circle.
        let mut trail: Vec<(usize, &str)> = Vec::new();
        let mut at = left().next().and_then(|index| waits_for(index, &order));
        while let Some((index, name)) = at {
            if let Some(start) = trail.iter().position(|(seen, _)| *seen == index) {
                let mut names: Vec<&str> = trail.split_off(start).into_iter().map(|(_, name)| name).collect();
                names.extend(names.first().copied());
                return Err(names);
            }
            trail.push((index, name));
            at = waits_for(index, &order);
        }
        return Err(Vec::new());
    }
    Ok(order)
}

/// Says that [`in_order`] found none.
#[must_use]
pub fn circle(names: &[&str]) -> String {
    format!("{}: no order is right", names.join(" comes after "))
}

/// Groups of [`groups`], in the order in which they are to be started. What is in a circle is left out.
///
/// # Errors
/// None; the second value says what is wrong.
#[must_use]
pub fn start_order(mut groups: Vec<Vec<Description>>) -> (Vec<Vec<Description>>, Vec<String>) {
    let mut wrong = Vec::new();
    loop {
        let named: Vec<_> = groups
            .iter()
            .map(|group| {
                let names = group.iter().map(|description| description.name.as_str()).collect();
                (names, group.iter().flat_map(|description| &description.after).map(String::as_str).collect())
            })
            .collect();
        match in_order(&named) {
            Ok(order) => {
                drop(named);
                let mut slots: Vec<_> = groups.into_iter().map(Some).collect();
                let ordered = order.iter().filter_map(|index| slots.get_mut(*index)?.take()).collect();
                return (ordered, wrong);
            }
            Err(names) => {
                wrong.push(circle(&names));
                let names: Vec<String> = names.into_iter().map(ToString::to_string).collect();
                drop(named);
                let before = groups.len();
                groups.retain(|group| !group.iter().any(|description| names.contains(&description.name)));
                if groups.len() == before {
                    return (groups, wrong);
                }
            }
        }
    }
}

impl Description {
    /// The same with one key changed, as in `memory=8M`.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn with(mut self, key: &str, value: &str) -> Result<Self, String> {
        let action = || {
            Action::parse(value)
                .ok_or_else(|| format!("{key}={value}: there are destroy, restart and preserve"))
        };
        match key {
            "name" => self.name = check_name(value)?,
            "image" => self.image = check_image(value)?,
            "memory" => self.memory = check_memory(value)?,
            "vcpus" => {
                let number = value.parse().map_err(|_| format!("vcpus={value}: not a whole number"))?;
                self.vcpus = check_vcpus(number)?;
            }
            schedule::WEIGHT | schedule::CAP | schedule::CPUS | schedule::CPUS_SOFT => {
                self.schedule.set(key, value)?;
            }
            PORTS | GRANT_FRAMES | MAPTRACK_FRAMES => {
                let number = value.parse().map_err(|_| format!("{key}={value}: not a whole number"))?;
                set_limit(&mut self.limits, key, number)?;
            }
            "cmdline" => self.cmdline = value.into(),
            "after" => {
                let names = value.split(',').filter(|name| !name.is_empty()).map(ToString::to_string);
                self.after = check_after(&self.name, names.collect())?;
            }
            "on_crash" => self.policy.on_crash = action()?,
            "on_poweroff" => self.policy.on_poweroff = action()?,
            "on_reboot" => self.policy.on_reboot = action()?,
            "disk" => disks::add(&mut self.disks, DiskSpec::parse(value)?)?,
            "card" => cards::add(&mut self.cards, CardSpec::parse(value)?)?,
            _ => return Err(unknown_key(key)),
        }
        Ok(self)
    }
}

fn check_name(name: &str) -> Result<String, String> {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(usable) {
        return Err(format!("name {name:?}: use 1 to {MAX_NAME} letters, digits, `-`, `_` or `.`"));
    }
    if name == OWN_NAME || name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!(
            "name {name:?}: dom0 and plain numbers already mean other domains; choose another name"
        ));
    }
    Ok(name.into())
}

fn check_after(name: &str, after: Vec<String>) -> Result<Vec<String>, String> {
    for other in &after {
        check_name(other).map_err(|error| format!("after: {error}"))?;
        if other == name {
            return Err("after: a domain cannot come after itself".into());
        }
    }
    Ok(after)
}

fn check_image(image: &str) -> Result<String, String> {
    if image.is_empty() {
        return Err("image: name a file in images/ (`images` lists them)".into());
    }
    Ok(image.into())
}

fn check_memory(memory: &str) -> Result<Bytes, String> {
    let bytes = Bytes::parse(memory).map_err(|error| format!("memory {memory:?}: {error}"))?;
    if bytes.pages() == 0 {
        return Err("memory: a domain needs some; small guests run in \"1M\"".into());
    }
    Ok(bytes)
}

fn check_vcpus(vcpus: i64) -> Result<u32, String> {
    let checked = u32::try_from(vcpus).ok().filter(|&vcpus| vcpus > 0);
    checked.ok_or_else(|| format!("vcpus = {vcpus}: a domain has 1 or more"))
}

/// Sets the limit that `key` is called.
fn set_limit(limits: &mut Limits, key: &str, value: i64) -> Result<(), String> {
    let (least, why, most) = match key {
        PORTS => (LEAST_PORT, ", for console and store,", EVTCHN_FIFO_NR_CHANNELS - 1),
        GRANT_FRAMES => (1, "", MOST_GRANT_FRAMES),
        _ => (1, "", MOST_MAPTRACK_FRAMES),
    };
    let checked = u32::try_from(value).ok().filter(|value| (least..=most).contains(value));
    let checked = checked.ok_or_else(|| format!("{key} = {value}: from {least}{why} to {most}"))?;
    match key {
        PORTS => limits.max_port = checked,
        GRANT_FRAMES => limits.grant_frames = Some(checked),
        _ => limits.maptrack_frames = Some(checked),
    }
    Ok(())
}

fn unknown_key(key: &str) -> String {
    let hint = match words::nearest(key, KEYS.iter().copied()) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("known are {}", KEYS.join(", ")),
    };
    format!("unknown key `{key}`: {hint}")
}

fn fail(line: Option<usize>, message: impl Into<String>) -> DescriptionError {
    DescriptionError { line, message: message.into() }
}

fn line_at(bytes: &[u8], offset: usize) -> usize {
    1 + bytes.iter().take(offset).filter(|&&byte| byte == b'\n').count()
}

/// Says what the parser found in words that help.
fn explain(error: &toml::de::Error, text: &str) -> DescriptionError {
    let mut message: String = error.message().lines().collect::<Vec<_>>().join(": ");
    let quoted = |prefix: &str| {
        error.message().strip_prefix(prefix).and_then(|rest| rest.split('`').next()).map(ToString::to_string)
    };
    if let Some(key) = quoted("unknown field `") {
        message = if error.message().contains("`kind`") {
            format!("disk: unknown key `{key}`: known are {}", disks::KEYS.join(", "))
        } else if error.message().contains("`isolated`") {
            format!("card: unknown key `{key}`: known are {}", cards::KEYS.join(", "))
        } else {
            unknown_key(&key)
        };
    }
    if let Some(key) = quoted("missing field `") {
        return fail(None, format!("the key `{key}` is missing: name, image and memory are needed"));
    }
    fail(error.span().map(|span| line_at(text.as_bytes(), span.start)), message)
}

#[cfg(test)]
mod tests {
    use super::{Description, Limits, Schedule, groups, start_order};
    use crate::policy::{Action, Policy};
    use alloc::string::{String, ToString};
    use alloc::vec;
    use alloc::vec::Vec;
    use hypercall_abi::DomId;

    const WHOLE: &str = "name = 'a-1'\nimage = 'hello'\nmemory = '4M'\nvcpus = 2\ncmdline = 'x y'\nautostart = true\n\
                         on_crash = 'restart'\non_poweroff = 'preserve'\non_reboot = 'destroy'\n";

    #[test]
    fn all_keys_are_taken() {
        let description = Description::parse(WHOLE.as_bytes()).unwrap();
        assert_eq!((description.name.as_str(), description.image.as_str()), ("a-1", "hello"));
        assert_eq!((description.memory.pages(), description.vcpus, description.autostart), (1024, 2, true));
        assert_eq!(description.cmdline, "x y");
        let policy =
            Policy { on_crash: Action::Restart, on_poweroff: Action::Preserve, on_reboot: Action::Destroy };
        assert_eq!(description.policy, policy);
        let least = Description::parse(b"name = 'a'\nimage = 'b'\nmemory = '512K'").unwrap();
        assert_eq!(least.limits, Limits { max_port: 1023, grant_frames: None, maptrack_frames: None });
        assert_eq!((least.vcpus, least.autostart, least.policy), (1, false, Policy::default()));
    }

    #[test]
    fn shares_and_places_are_checked() {
        let with = |more: &str| {
            Description::parse(alloc::format!("name = 'a'\nimage = 'b'\nmemory = '4M'\n{more}").as_bytes())
        };
        let description = with("cpu_weight = 512\ncap = 150\ncpus = '0,2-3'\ncpus_soft = '2'\n").unwrap();
        let wanted =
            Schedule { weight: Some(512), cap: Some(150), cpus: Some(0b1101), cpus_soft: Some(0b100) };
        assert_eq!(description.schedule, wanted);
        assert_eq!(with("").unwrap().schedule, Schedule::default());
        let changed = description.with("cap", "0").and_then(|d| d.with("cpus", "all")).unwrap();
        assert_eq!(changed.schedule, Schedule { cap: Some(0), cpus: Some(u64::MAX), ..wanted });
        for (text, message) in [
            ("cpu_weight = 0", "line 4: cpu_weight = 0: from 1 to 65535"),
            ("\ncap = -1", "line 5: cap = -1: from 0 to 6400 percent of a CPU, 0 for no cap"),
            ("cpus = '64'", "line 4: cpus \"64\": there are no more than 64 CPUs: 64 is too large"),
        ] {
            assert_eq!(with(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn disks_are_listed_and_their_mistakes_named() {
        let with = |disks: &str| Description::parse(alloc::format!("{WHOLE}{disks}").as_bytes());
        let two = "[[disk]]\nname = 'xvda'\nkind = 'ram'\nsize = '8M'\n[[disk]]\nname = 'xvdb'\nkind = 'image'\nfile = 'a.img'\n";
        let disks = with(two).unwrap().disks;
        assert_eq!((disks.len(), disks[0].device, disks[0].readonly), (2, 51712, false));
        assert_eq!(
            (disks[1].device, disks[1].readonly, disks[1].kind.to_string().as_str()),
            (51728, true, "image a.img")
        );
        for (old, new, message) in [
            ("xvdb", "xvda", "line 14: disk xvda: there are two of this name"),
            ("xvda", "sda", "line 10: disk \"sda\": disks are called xvda"),
            ("'8M'", "'700'", "line 10: disk xvda: size \"700\": not a multiple of a sector of 512 bytes"),
            ("'8M'", "700", "line 10: disk xvda: size \"700\": not a multiple of a sector of 512 bytes"),
            ("size = '8M'\n", "", "line 10: disk xvda: kind ram needs a size"),
            (
                "'image'",
                "'tape'",
                "line 14: disk xvdb: kind \"tape\": there are ram, image, overlay, device and file",
            ),
            ("file = 'a.img'\n", "", "line 14: disk xvdb: kind image needs a file"),
            (
                "file",
                "path",
                "line 17: disk: unknown key `path`: known are name, kind, size, file, changes, device, readonly",
            ),
        ] {
            let error = with(&two.replace(old, new)).unwrap_err().to_string();
            assert!(error.starts_with(message), "{new}: {error}");
        }
        let card = "[[card]]\nswitch = 'lan'\nrate = '1M'\n";
        assert_eq!(with(card).unwrap().cards[0].rate, Some(1 << 20));
        for (old, new, message) in [
            ("'lan'", "'my lan'", "line 10: card: \"my lan\" is no name of a switch"),
            (
                "rate",
                "speed",
                "line 12: card: unknown key `speed`: known are switch, mac, isolated, rate, ip, forward, rules",
            ),
        ] {
            let error = with(&card.replace(old, new)).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        assert_eq!(with("").unwrap().with("card", "lan").unwrap().cards.len(), 1);
        let description = with("").unwrap().with("disk", "xvda:ram:1M").unwrap();
        assert_eq!(description.disks.len(), 1);
        assert!(description.with("disk", "xvda:ram:1M").unwrap_err().contains("two of this name"));
    }

    #[test]
    fn keys_can_be_changed_by_hand() {
        let description = Description::parse(WHOLE.as_bytes()).unwrap();
        let changed = [
            ("name", "b"),
            ("image", "i"),
            ("memory", "8M"),
            ("vcpus", "3"),
            ("max_event_channels", "131071"),
            ("max_grant_frames", "64"),
            ("max_maptrack_frames", "1"),
            ("cmdline", "z"),
            ("on_crash", "preserve"),
        ]
        .into_iter()
        .fold(description.clone(), |description, (key, value)| description.with(key, value).unwrap());
        assert_eq!(
            (changed.name.as_str(), changed.image.as_str(), changed.cmdline.as_str()),
            ("b", "i", "z")
        );
        assert_eq!((changed.memory.pages(), changed.vcpus), (2048, 3));
        let limits = Limits { max_port: 131_071, grant_frames: Some(64), maptrack_frames: Some(1) };
        assert_eq!(changed.limits, limits);
        assert_eq!(changed.policy.on_crash, Action::Preserve);
        for (key, value, message) in [
            ("nam", "x", "unknown key `nam`: did you mean `name`?"),
            ("memory", "5K", "memory \"5K\": memory comes in pages: make it a multiple of 4K"),
            ("vcpus", "0", "vcpus = 0: a domain has 1 or more"),
            ("max_event_channels", "1", "max_event_channels = 1: from 2, for console and store, to 131071"),
            (
                "max_event_channels",
                "131072",
                "max_event_channels = 131072: from 2, for console and store, to 131071",
            ),
            ("max_grant_frames", "0", "max_grant_frames = 0: from 1 to 64"),
            ("max_grant_frames", "65", "max_grant_frames = 65: from 1 to 64"),
            ("max_maptrack_frames", "-1", "max_maptrack_frames = -1: from 1 to 1024"),
            ("max_maptrack_frames", "y", "max_maptrack_frames=y: not a whole number"),
            ("vcpus", "x", "vcpus=x: not a whole number"),
            ("on_reboot", "x", "on_reboot=x: there are destroy, restart and preserve"),
        ] {
            assert_eq!(description.clone().with(key, value), Err(message.into()));
        }
    }

    #[test]
    fn a_command_line_can_have_the_numbers_of_others() {
        let of = |cmdline: &str| Description::of_image("a", "i").unwrap().with("cmdline", cmdline).unwrap();
        let numbers = |name: &str| match name {
            "a" => Some(DomId::new(7)),
            "b" => Some(DomId::new(12)),
            _ => None,
        };
        for (text, line) in [
            ("", ""),
            ("x={y} {", "x={y} {"),
            ("peer={domid:b}", "peer=12"),
            ("{domid:a}{domid:b} z", "712 z"),
        ] {
            assert_eq!(of(text).command_line(numbers), Ok(line.to_string()));
        }
        let missing = of("peer={domid:c}").command_line(numbers).unwrap_err();
        assert!(
            missing.contains("the number of c, which does not exist") && missing.contains("`create a + c`")
        );
        assert!(of("{domid:b").command_line(numbers).unwrap_err().contains("{domid:NAME}"));
    }

    #[test]
    fn descriptions_that_name_each_other_are_one_group() {
        let of = |name: &str, cmdline: &str| {
            Description::of_image(name, "i").unwrap().with("cmdline", cmdline).unwrap()
        };
        let all =
            [of("a", "{domid:c}"), of("b", ""), of("c", ""), of("d", "{domid:e}"), of("e", "{domid:a}")];
        let names: Vec<Vec<&str>> = groups(all.to_vec())
            .iter()
            .map(|group| all.iter().filter(|d| group.contains(d)).map(|d| d.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["b"], vec!["a", "c", "d", "e"]]);
    }

    #[test]
    fn what_comes_after_others_is_started_after_them() {
        let of = |name: &str, after: &str, cmdline: &str| {
            let description = Description::of_image(name, "i").unwrap().with("after", after).unwrap();
            description.with("cmdline", cmdline).unwrap()
        };
        let names = |groups: &[Vec<Description>]| -> Vec<Vec<String>> {
            groups.iter().map(|group| group.iter().map(|d| d.name.to_string()).collect()).collect()
        };
        let all =
            vec![of("web", "db,cache", ""), of("x", "", ""), of("db", "disk", ""), of("cache", "gone", "")];
        let (order, wrong) = start_order(groups([all, vec![of("disk", "", "{domid:x}")]].concat()));
        assert_eq!(
            (names(&order), wrong),
            (
                vec![
                    vec!["cache".into()],
                    vec!["x".into(), "disk".into()],
                    vec!["db".into()],
                    vec!["web".into()]
                ],
                vec![]
            )
        );
        // A circle is named, also one that only making some at once closes; the others start.
        let all =
            vec![of("a", "b", ""), of("b", "c", ""), of("c", "a", ""), of("d", "a", ""), of("e", "", "")];
        let (order, wrong) = start_order(groups(all));
        assert_eq!(names(&order), [vec!["d"], vec!["e"]]);
        assert_eq!(wrong, ["b comes after c comes after a comes after b: no order is right"]);
        let all = vec![of("a", "", "{domid:b}"), of("b", "c", ""), of("c", "a", "")];
        let (order, wrong) = start_order(groups(all));
        assert_eq!((order.len(), wrong.len()), (0, 1));
        assert!(wrong[0].contains("c comes after a comes after c"), "{wrong:?}");
        let error = |after: &str| Description::of_image("a", "i").unwrap().with("after", after).unwrap_err();
        assert_eq!(error("a"), "after: a domain cannot come after itself");
        assert!(error("b c").starts_with("after: name \"b c\""));
        let parsed = |text: &str| Description::parse(alloc::format!("{WHOLE}{text}").as_bytes());
        assert_eq!(parsed("after = ['b', 'c']\n").unwrap().after, ["b", "c"]);
        assert_eq!(
            parsed("after = ['a-1']\n").unwrap_err().to_string(),
            "line 10: after: a domain cannot come after itself"
        );
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (old, new, message) in [
            ("vcpus", "vcpu", "line 4: unknown key `vcpu`: did you mean `vcpus`?"),
            (
                "vcpus",
                "colour",
                "line 4: unknown key `colour`: known are name, image, memory, vcpus, cpu_weight, cap, cpus, cpus_soft, \
                 max_event_channels, max_grant_frames, max_maptrack_frames, cmdline, autostart, after, on_crash, on_poweroff, \
                 on_reboot, disk, card",
            ),
            ("name = 'a-1'\n", "", "the key `name` is missing: name, image and memory are needed"),
            ("image = 'hello'\n", "", "the key `image` is missing: name, image and memory are needed"),
            (
                "'4M'",
                "'4'",
                "line 3: memory \"4\": write a whole number and a unit: \"512K\", \"16M\" or \"1G\"",
            ),
            ("'4M'", "'5K'", "line 3: memory \"5K\": memory comes in pages: make it a multiple of 4K"),
            ("'4M'", "'0M'", "line 3: memory: a domain needs some; small guests run in \"1M\""),
            ("'4M'", "4", "line 3: invalid type: integer `4`, expected a string"),
            ("= 2", "= 0", "line 4: vcpus = 0: a domain has 1 or more"),
            ("= 2", "= -1", "line 4: vcpus = -1: a domain has 1 or more"),
            ("vcpus = 2", "max_grant_frames = 65", "line 4: max_grant_frames = 65: from 1 to 64"),
            ("'a-1'", "'a b'", "line 1: name \"a b\": use 1 to 31 letters, digits, `-`, `_` or `.`"),
            (
                "'a-1'",
                "'7'",
                "line 1: name \"7\": dom0 and plain numbers already mean other domains; choose another name",
            ),
            (
                "'restart'",
                "'panic'",
                "line 7: unknown variant `panic`, expected one of `destroy`, `restart`, `preserve`",
            ),
            ("'x y'", "'x\\0'", "line 5"),
            ("'x y'", "\"x\\u0000\"", "line 5: cmdline: a zero byte would end it early"),
            ("true", "maybe", "line 6: "),
            ("memory = '4M'", "memory = '4M'\nmemory = '5M'", "line 4: duplicate key"),
        ] {
            let text = WHOLE.replace(old, new);
            match Description::parse(text.as_bytes()) {
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.starts_with(message), "{new}: {text}");
                }
                Ok(_) if new == "'x\\0'" => {} // A literal string has no escapes: fine as it is.
                Ok(description) => panic!("{new}: {description:?}"),
            }
        }
        let error = Description::parse(b"name = 'a'\n# \xff").unwrap_err().to_string();
        assert_eq!(error, "line 2: not UTF-8 text");
    }
}

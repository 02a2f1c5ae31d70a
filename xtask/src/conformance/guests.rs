//! Images as unprivileged domains: many in one boot, made by the shell of our dom0.

use super::{Bench, Boot, Selection, Verdict, Verdicts, absorb, choice, give_up, parse, without_verdict};
use crate::images::{Image, Kind};
use crate::qemu::Host;
use crate::{archive, build, sh};
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Memory of a domain that runs cases.
const MEMORY: &str = "64M";
/// Memory of a helper.
const HELPER_MEMORY: &str = "4M";
/// The highest port of a domain that runs cases: as many as there are.
const HIGHEST_PORT: u32 = 131_071;
/// The highest port of a helper, which conf-pairs knows.
const HELPER_HIGHEST_PORT: u32 = 63;
/// The last command of a list: a list that got there was carried out.
const LAST: &str = "free";

/// One domain to run, and its helpers before it.
pub struct Job<'a> {
    /// What the shell calls it: unique in the list.
    pub name: String,
    /// Its image.
    pub image: &'a Image,
    /// Its command line.
    pub cmdline: String,
    /// Seconds that it may take.
    pub patience: u32,
}

/// Runs a list of domains in one boot; gives what each printed and how it ended.
///
/// # Errors
/// When the boot cannot be made.
pub fn batch(
    bench: &Bench,
    host: Host,
    hypervisor: Option<&Path>,
    smp: u32,
    name: &str,
    jobs: &[Job],
) -> Result<BTreeMap<String, (String, String)>> {
    let helper = bench.workspace.guests.iter().find(|image| image.kind == Kind::Helper);
    let mut images: BTreeSet<&str> = jobs.iter().map(|job| job.image.name.as_str()).collect();
    images.extend(helper.map(|image| image.name.as_str()));
    let mut files = Vec::new();
    for image in images {
        let path = bench.built.guests.get(image).with_context(|| format!("{image} was not built"))?;
        files.push((format!("images/{image}"), sh::read(&build::stripped(bench.workspace, path)?)?));
        let is_helper = helper.is_some_and(|helper| helper.name == image);
        let vcpus = bench.workspace.guest(image)?.conformance.vcpus;
        let (memory, vcpus, ports) =
            if is_helper { (HELPER_MEMORY, 1, HELPER_HIGHEST_PORT) } else { (MEMORY, vcpus, HIGHEST_PORT) };
        let text = format!(
            "name = \"{image}\"\nimage = \"{image}\"\nmemory = \"{memory}\"\nvcpus = {vcpus}\n\
             max_event_channels = {ports}\non_reboot = \"destroy\"\n"
        );
        files.push((format!("{image}.toml"), text.into_bytes()));
    }
    let commands: Vec<String> = jobs.iter().flat_map(|job| commands(job, helper)).collect();
    files.push((archive::EXEC.into(), (commands.join("\n") + "\n" + LAST + "\n").into_bytes()));
    let module = bench.scratch(name).with_extension("tar");
    sh::write(&module, &archive::of(&files)?)?;
    let dom0 = bench.built.dom0.as_deref().context("there is no dom0 image")?;
    let timeout = 60 + jobs.iter().map(|job| u64::from(job.patience) / 4 + 1).sum::<u64>();
    let watched = bench.boot(&Boot {
        host,
        name,
        hypervisor,
        kernel: &build::stripped(bench.workspace, dom0)?,
        module: Some(&module),
        words: "dom0_mem=192M",
        cmdline: "",
        icount: false,
        smp,
        timeout,
    })?;
    let end = watched.end.to_string();
    Ok(jobs
        .iter()
        .map(|job| {
            let printed = section(&watched.text, &format!("logs {} 1000", job.name));
            let how = ending(&watched.text, &job.name);
            let how = match (&printed, how) {
                (_, Some(how)) => how,
                (Some(_), None) => format!("no end within {} seconds", job.patience),
                (None, None) => format!("dom0 did not get to it: {end}"),
            };
            (job.name.clone(), (printed.unwrap_or_default(), how))
        })
        .collect())
}

/// The shell's commands for one domain.
fn commands(job: &Job, helper: Option<&Image>) -> Vec<String> {
    let mut commands = Vec::new();
    let peers = if helper.is_some() { job.image.conformance.peers } else { 0 };
    let helper = helper.map_or("", |image| image.name.as_str());
    let peer = |distance: u32| format!("{}-peer{distance}", job.name);
    for distance in (1..=peers).rev() {
        commands.push(format!("create {helper} name={} cmdline=leader=+{distance}", peer(distance)));
    }
    let words = if peers > 0 { format!("{} peers={peers}", job.cmdline) } else { job.cmdline.clone() };
    commands.push(format!("create {} name={} cmdline='{words}'", job.image.name, job.name));
    commands.push(format!("wait {} {}", job.name, job.patience));
    commands.push(format!("logs {} 1000", job.name));
    // Most are gone by now, which the shell says.
    commands.push(format!("destroy {}", job.name));
    commands.extend((1..=peers).map(|distance| format!("destroy {}", peer(distance))));
    commands
}

/// What the shell printed between a command and the next.
fn section(text: &str, command: &str) -> Option<String> {
    let start = format!("dom0> {command}\n");
    let rest = &text[text.find(&start)? + start.len()..];
    Some(rest[..rest.find("\ndom0> ").map_or(rest.len(), |at| at + 1)].to_owned())
}

/// How a domain ended, as dom0 said it.
fn ending(text: &str, name: &str) -> Option<String> {
    let start = format!("{name} (domain ");
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(&start)?.split_once(") ")?.1;
        Some(format!("the domain {}", rest.split(" (`dmesg`").next().unwrap_or(rest)))
    })
}

/// Runs the selected cases of all images; a domain that ends early is made again, in another boot, for the cases behind.
///
/// # Errors
/// When a boot cannot be made.
pub fn as_domu(
    bench: &Bench,
    host: Host,
    smp: u32,
    selection: &Selection,
) -> Result<BTreeMap<String, Verdicts>> {
    let mut found: BTreeMap<String, Verdicts> = BTreeMap::new();
    for (image, cases) in selection {
        let reason = bench.workspace.guest(image)?.conformance.only_dom0.as_ref();
        let skip = |reason: &String| Verdict::Skip { reason: reason.clone() };
        let known = reason.map(|reason| cases.iter().map(|case| (case.clone(), skip(reason))).collect());
        found.insert(image.clone(), known.unwrap_or_default());
    }
    for round in 1.. {
        let mut jobs = Vec::new();
        let mut open = Vec::new();
        for (image, cases) in selection {
            let left = found.get(image).map(|known| without_verdict(cases, known)).unwrap_or_default();
            if left.is_empty() {
                continue;
            }
            let cmdline = choice(cases, &left);
            jobs.push(Job {
                name: image.clone(),
                image: bench.workspace.guest(image)?,
                cmdline,
                patience: 60,
            });
            open.push((image, left));
        }
        if jobs.is_empty() {
            break;
        }
        let name = format!("{host}-domu-{smp}-{round}");
        let mut printed = batch(bench, host, None, smp, &name, &jobs)?;
        for (image, left) in open {
            let (text, end) = printed.remove(image).unwrap_or_default();
            let verdicts = found.entry(image.clone()).or_default();
            if !absorb(verdicts, &left, parse::output(&text, end.clone())) {
                give_up(verdicts, &left, &end);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "dom0> create a\na runs as domain 3\ndom0> wait a 5\na (domain 3) crashed after 0.1s (`dmesg`: x)\n\
                        dom0> logs a 1000\n[RUN]   one\n[PASS]  one (1 us)\n[RUN]   two\ndom0> destroy a\n";

    #[test]
    fn reads_what_a_domain_printed_and_how_it_ended() {
        let printed = section(TEXT, "logs a 1000").unwrap();
        let parsed = parse::output(&printed, ending(TEXT, "a").unwrap());
        assert_eq!(parsed.verdicts, [("one".to_owned(), Verdict::Pass)]);
        assert_eq!(parsed.running.as_deref(), Some("two"));
        assert_eq!(parsed.end, "the domain crashed after 0.1s");
        assert_eq!(section(TEXT, "logs b 1000"), None);
        let cases = ["one".to_owned(), "two".to_owned(), "three".to_owned()];
        let mut verdicts = Verdicts::new();
        assert!(absorb(&mut verdicts, &cases, parsed));
        assert_eq!(verdicts["two"], Verdict::Crash { reason: "the domain crashed after 0.1s".into() });
        let left = without_verdict(&cases, &verdicts);
        assert_eq!(left, ["three"]);
        assert_eq!(choice(&cases, &left), "announce only==three");
        assert!(!absorb(&mut verdicts, &left, parse::Parsed::default()), "nothing more came");
    }
}

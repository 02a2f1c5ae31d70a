//! Commands for the devices of domains, and the machine's own.

use super::{Next, Outcome, Shell, number, print_block, usage};
use crate::backend;
use crate::cards::{CardSpec, parse_rules};
use crate::devices;
use crate::disks::DiskSpec;
use crate::guests::{self, State};
use crate::say;
use crate::table::{Align, Table};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

impl Shell {
    pub(super) async fn disk(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match words.as_slice() {
            [] | ["list"] => print_block(&disk_table()),
            ["attach", name, disk] => {
                guests::devices(&guests::resolve(name)?)?.attach(&DiskSpec::parse(disk)?).await?
            }
            ["detach", name, disk] => guests::devices(&guests::resolve(name)?)?.detach(disk, false).await?,
            ["detach", name, disk, "force"] => {
                guests::devices(&guests::resolve(name)?)?.detach(disk, true).await?
            }
            ["resize", name, disk, size] => {
                let bytes = crate::disks::parse_size(size).map_err(|why| format!("{size:?}: {why}"))?;
                guests::devices(&guests::resolve(name)?)?.disk(disk)?.resize(bytes).await?;
            }
            ["restart", name, disk] => guests::devices(&guests::resolve(name)?)?.disk(disk)?.restart(),
            ["format", disk] | ["format", disk, "force"] => {
                Box::pin(backend::format_drive(disk, words.len() == 3)).await?;
                say!("{disk}: formatted");
            }
            ["panic", name, disk] => guests::devices(&guests::resolve(name)?)?.disk(disk)?.kind.fuse.set(1),
            ["panic", name, disk, n] => {
                guests::devices(&guests::resolve(name)?)?.disk(disk)?.kind.fuse.set(number(n)?);
            }
            _ => return Err(usage("disk")),
        }
        Ok(Next::Go)
    }

    pub(super) async fn card(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let devices = |name: &str| guests::devices(&guests::resolve(name)?);
        match words.as_slice() {
            [] | ["list"] => print_block(&card_table()),
            ["attach", name, card] => {
                let number = devices(name)?.attach_card(&parse_card(card)?)?;
                say!("card {number}");
            }
            ["detach", name, number] => devices(name)?.detach_card(number, false).await?,
            ["detach", name, number, "force"] => devices(name)?.detach_card(number, true).await?,
            ["restart", name, number] => devices(name)?.card(number)?.restart(),
            ["panic", name, number] => devices(name)?.card(number)?.kind.fuse.set(1),
            ["panic", name, card, n] => devices(name)?.card(card)?.kind.fuse.set(number(n)?),
            ["rules", name, number, rules @ ..] => {
                let filter = parse_rules(rules)?;
                devices(name)?.card(number)?.kind.set_filter(filter);
            }
            _ => return Err(usage("card")),
        }
        Ok(Next::Go)
    }

    pub(super) async fn switch(&mut self, arguments: &[String]) -> Outcome {
        match arguments {
            [] => print_block(&backend::switch_table()),
            [name] => print_block(&backend::switch_details(name)?),
            _ => return Err(usage("switch")),
        }
        Ok(Next::Go)
    }

    pub(super) async fn devices(&mut self, arguments: &[String]) -> Outcome {
        if !arguments.is_empty() {
            return Err(usage("devices"));
        }
        print_block(&devices::shell::table());
        Ok(Next::Go)
    }

    pub(super) async fn device(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let done = devices::shell::run(&words).await;
        done.map(|()| Next::Go).map_err(|why| why.unwrap_or_else(|| usage("device")))
    }
}

/// A card as one word. Its mistakes begin with what the command is called already.
fn parse_card(word: &str) -> Result<CardSpec, String> {
    CardSpec::parse(word).map_err(|error| error.strip_prefix("card: ").unwrap_or(&error).into())
}

/// All network cards of all domains.
fn card_table() -> String {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("CARD", Align::Right),
        ("SWITCH", Align::Left),
        ("MAC", Align::Left),
        ("ADDRESS", Align::Left),
        ("STATE", Align::Left),
        ("SENT", Align::Right),
        ("BYTES", Align::Right),
        ("RECEIVED", Align::Right),
        ("BYTES", Align::Right),
        ("DROPPED", Align::Right),
        ("MISSED", Align::Right),
    ]);
    for view in guests::all() {
        let (State::Running(run) | State::Ended(run) | State::Kept(run, _)) = view.state else { continue };
        for vif in run.devices.cards() {
            let (counters, missed) = vif.kind.counters();
            table.row([
                view.name.clone(),
                vif.number().to_string(),
                vif.kind.switch().to_string(),
                vif.kind.mac(),
                vif.kind.ip().map_or("-".into(), |address| address.to_string()),
                vif.state().map_or("-".into(), |state| format!("{state:?}").to_lowercase()),
                counters.sent_frames.to_string(),
                counters.sent_bytes.to_string(),
                counters.received_frames.to_string(),
                counters.received_bytes.to_string(),
                counters.dropped.iter().sum::<u64>().to_string(),
                (counters.refused + missed.no_room + missed.too_long + missed.failed).to_string(),
            ]);
        }
    }
    table.to_string()
}

/// All disks of all domains.
fn disk_table() -> String {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("KIND", Align::Left),
        ("STATE", Align::Left),
        ("REQUESTS", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("ERRORS", Align::Right),
    ]);
    let kib = |sectors: u64| format!("{} KiB", sectors / 2);
    for view in guests::all() {
        let (State::Running(run) | State::Ended(run) | State::Kept(run, _)) = view.state else { continue };
        for vbd in run.devices.disks() {
            let (spec, status) = (&vbd.kind.spec, vbd.kind.status());
            let kind = spec.kind.to_string();
            table.row([
                view.name.clone(),
                spec.name.clone(),
                kib(vbd.kind.bytes() / 512),
                if spec.readonly { format!("{kind}, read only") } else { kind },
                vbd.state().map_or("-".into(), |state| format!("{state:?}").to_lowercase()),
                status.counters.requests.to_string(),
                kib(status.counters.sectors_read),
                kib(status.counters.sectors_written),
                status.counters.errors.to_string(),
            ]);
        }
    }
    table.to_string()
}

//! Commands about the machine, the hypervisor, and what came with them.

use super::{Next, Outcome, Shell, deadline, none, number, one, print_block, refused, usage};
use crate::description::Description;
use crate::hypervisor;
use crate::say;
use crate::scrollback::printable;
use crate::table::{Align, Table};
use crate::units::{Bytes, seconds};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;
use domain_builder::{Kernel, Role};
use guest_sdk::{memory, time};

/// How long `free` waits at most: Xen frees what describes a dead domain only once no CPU can be looking at it any more.
const SETTLING: Duration = Duration::from_secs(1);

impl Shell {
    pub(super) async fn images(&mut self, arguments: &[String]) -> Outcome {
        none("images", arguments)?;
        let mut images = Table::new([("IMAGE", Align::Left), ("SIZE", Align::Right), ("", Align::Left)]);
        let mut descriptions = Table::new([
            ("DESCRIPTION", Align::Left),
            ("NAME", Align::Left),
            ("IMAGE", Align::Left),
            ("MEMORY", Align::Right),
            ("", Align::Left),
        ]);
        for file in self.archive.files() {
            let file = file.map_err(|error| error.to_string())?;
            if let Some(name) = file.name.strip_prefix("images/") {
                let verdict = match Kernel::parse(file.data, Role::Guest) {
                    Ok(_) => String::new(),
                    Err(error) => format!("unusable: {error}"),
                };
                images.row([name.into(), format!("{} KiB", file.data.len().div_ceil(1024)), verdict]);
            } else if file.name.ends_with(".toml") {
                let file_name = file.name.to_string();
                descriptions.row(match Description::parse(file.data) {
                    Ok(d) => {
                        let auto = if d.autostart { "starts with dom0" } else { "" };
                        [file_name, d.name, d.image, d.memory.to_string(), auto.into()]
                    }
                    Err(error) => [file_name, "?".into(), "?".into(), "?".into(), error.to_string()],
                });
            }
        }
        print_block(&format!("{images}\n{descriptions}"));
        Ok(Next::Go)
    }

    pub(super) async fn info(&mut self, arguments: &[String]) -> Outcome {
        none("info", arguments)?;
        let info = hypervisor::get().host().map_err(refused("tell about the machine"))?;
        let memory = memory::usage();
        let mut table = Table::new([("", Align::Left), ("", Align::Left)]);
        let mut row = |name: &str, value: String| table.row([name.into(), value]);
        let up = info.own.map(|own| format!(", up {}", seconds(own.uptime_ns))).unwrap_or_default();
        row("hypervisor", hypervisor::get().about() + &up);
        row(
            "CPUs",
            format!("{} at {}.{:03} GHz", info.cpus, info.cpu_khz / 1_000_000, info.cpu_khz / 1000 % 1000),
        );
        row("memory", Bytes::of_pages(info.total_pages).to_string());
        row("free", format!("{} ({} frames)", Bytes::of_pages(info.free_pages), info.free_pages));
        match info.own {
            Some(own) => {
                row("hypervisor's own", Bytes::of_pages(own.pages).to_string());
                row(
                    "hypervisor's heap",
                    format!("{} of {} KiB in use", own.heap_used.div_ceil(1024), own.heap_size / 1024),
                );
            }
            None => row("hypervisor's own", "it does not say".into()),
        }
        row(
            "dom0's heap",
            format!("{} KiB in use of {} MiB memory", memory.heap_used.div_ceil(1024), memory.total >> 20),
        );
        row("panics of services", guest_sdk::compartment::abandoned().to_string());
        row("domains", info.domains.to_string());
        if let Some(own) = info.own {
            row("dropped interrupts", own.dropped_interrupts.to_string());
        }
        let (open, highest) = (guest_sdk::events::open_ports(), guest_sdk::events::highest_port());
        row("dom0's ports", format!("{open} in use, up to {highest}"));
        print_block(table.to_string().trim_start_matches('\n'));
        Ok(Next::Go)
    }

    pub(super) async fn free(&mut self, arguments: &[String]) -> Outcome {
        let must_be_same = match arguments {
            [] => false,
            [word] if word == "same" => true,
            _ => return Err(usage("free")),
        };
        let free = self.settled_free_pages(must_be_same).await?;
        let known = self.free_before.lock().replace(free);
        let before = known.unwrap_or(free);
        let change = match known {
            None => String::new(),
            Some(before) if free == before => ", as before".into(),
            Some(before) if free > before => format!(", {} more than before", free - before),
            Some(before) => format!(", {} fewer than before", before - free),
        };
        say!("{} free: {free} frames{change}", Bytes::of_pages(free));
        if must_be_same && free != before {
            return Err(format!("{before} frames were free before, now {free}: `list` shows who has them"));
        }
        Ok(Next::Go)
    }

    /// Free frames, once the number stands still; `wanted` waits longer for that of the last time.
    async fn settled_free_pages(&self, wanted: bool) -> Result<u64, String> {
        let ask = || match hypervisor::get().host() {
            Ok(host) => Ok(host.free_pages),
            Err(errno) => Err(refused("tell about its memory")(errno)),
        };
        let end = deadline(SETTLING);
        let mut free = ask()?;
        loop {
            time::after(SETTLING / 20).await;
            let before = core::mem::replace(&mut free, ask()?);
            let known = *self.free_before.lock();
            let done = free == before && (!wanted || known.is_none_or(|known| known == free));
            if done || time::now_ns() >= end {
                return Ok(free);
            }
        }
    }

    pub(super) async fn dmesg(&mut self, arguments: &[String]) -> Outcome {
        let lines = match arguments {
            [] => usize::MAX,
            [lines] => number(lines)?,
            _ => return Err(usage("dmesg")),
        };
        let (mut log, mut index, mut lost) = (Vec::new(), 0, 0);
        let mut chunk = [0; 512];
        loop {
            let part = hypervisor::get().read_log(index, &mut chunk).map_err(refused("show its log"))?;
            if part.bytes == 0 {
                break;
            }
            log.extend_from_slice(chunk.get(..part.bytes).unwrap_or(&[]));
            lost += part.lost;
            index = part.next;
        }
        if lost > 0 && lines == usize::MAX {
            say!("[{lost} bytes before this are gone: the log keeps the newest]");
        }
        let text = printable(&log);
        let all: Vec<&str> = text.lines().collect();
        let tail = all.get(all.len().saturating_sub(lines)..).unwrap_or(&[]);
        if !tail.is_empty() {
            print_block(&tail.join("\n"));
        }
        Ok(Next::Go)
    }

    pub(super) async fn log_level(&mut self, arguments: &[String]) -> Outcome {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let wanted = one("log-level", arguments)?;
        let level = LEVELS
            .iter()
            .position(|&level| level == wanted)
            .ok_or_else(|| format!("{wanted:?} is no level: there are {}", LEVELS.join(", ")))?;
        hypervisor::get().set_log_level(level as u32).map_err(|refusal| refusal.to_string())?;
        Ok(Next::Go)
    }
}

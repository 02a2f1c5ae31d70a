//! Commands about who is there, what they use of the CPUs, and how much of them they get.

use super::{CLEAR, CTRL_C, Next, Outcome, Shell, number, one, print_block, refused, usage};
use crate::accounts::{self, Accounts, DomainAccount, Key, Report, VcpuAccount};
use crate::description::OWN_NAME;
use crate::guests::{self, State};
use crate::hypervisor::{self, DomainInfo, VcpuInfo, VcpuUsage};
use crate::say;
use crate::schedule::{self, Schedule};
use crate::scrollback::printable;
use crate::table::{Align, Table};
use crate::units::{Bytes, PAGE, cpu_bits, cpu_list, seconds};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use guest_sdk::{print, time};
use hashbrown::HashMap;
use hypercall_abi::DomId;

impl Shell {
    pub(super) async fn list(&mut self, arguments: &[String]) -> Outcome {
        match arguments {
            [] => {}
            [word] if word == "--json" => {
                say!("{}", accounts::json(&accounts(true)?));
                return Ok(Next::Go);
            }
            _ => return Err(usage("list")),
        }
        let infos = hypervisor::get().domains().map_err(refused("list the domains"))?;
        let (gone, there): (Vec<_>, Vec<_>) = guests::all()
            .into_iter()
            .partition(|view| matches!(view.state, State::Gone(_) | State::Starting(_) | State::Waiting(..)));
        let known = Known::of(there);
        let mut table = Table::new([
            ("NAME", Align::Left),
            ("ID", Align::Right),
            ("MEMORY", Align::Right),
            ("VCPUS", Align::Right),
            ("STATE", Align::Left),
            ("CPU TIME", Align::Right),
        ]);
        for info in &infos {
            table.row([
                known.name_of(info),
                info.domain.get().to_string(),
                Bytes::of_pages(info.pages).to_string(),
                info.vcpus.to_string(),
                state_of(info),
                seconds(info.cpu_time_ns),
            ]);
        }
        let dash = || "-".to_string();
        for view in gone {
            let state = match view.state {
                State::Gone(Some(ending)) => format!("gone ({ending})"),
                State::Gone(None) => "gone (destroyed)".into(),
                State::Starting(_) => "being built".into(),
                State::Waiting(ending, _) => format!("to be started again ({ending})"),
                _ => continue,
            };
            table.row([view.name, dash(), dash(), dash(), state, dash()]);
        }
        print_block(&table.to_string());
        Ok(Next::Go)
    }

    pub(super) async fn vcpus(&mut self, arguments: &[String]) -> Outcome {
        let wanted = one("vcpus", arguments)?;
        let domain = any_domain(wanted)?;
        let info = hypervisor::get().domain(domain).map_err(refused("tell about it"))?;
        let mut table = Table::new([
            ("VCPU", Align::Right),
            ("CPU", Align::Right),
            ("STATE", Align::Left),
            ("CPU TIME", Align::Right),
            ("STOLEN", Align::Right),
            ("WAITING", Align::Right),
            ("OFF", Align::Right),
            ("CALLS", Align::Right),
            ("FAULTS", Align::Right),
            ("EVENTS", Align::Right),
            ("SWITCHES", Align::Right),
            ("MOVES", Align::Right),
        ]);
        for number in 0..info.vcpus {
            let vcpu = hypervisor::get().vcpu(domain, number).map_err(refused("tell about its vCPUs"))?;
            let told = |value: fn(&VcpuUsage) -> String| vcpu.usage.as_ref().map_or("-".into(), value);
            table.row([
                number.to_string(),
                vcpu.cpu.to_string(),
                vcpu_state(&vcpu).into(),
                seconds(vcpu.cpu_time_ns),
                told(|usage| seconds(usage.runnable_ns)),
                told(|usage| seconds(usage.blocked_ns)),
                told(|usage| seconds(usage.offline_ns)),
                told(|usage| usage.hypercalls.to_string()),
                told(|usage| usage.faults.to_string()),
                told(|usage| usage.upcalls.to_string()),
                told(|usage| usage.switches.to_string()),
                told(|usage| usage.moves.to_string()),
            ]);
        }
        print_block(&table.to_string());
        Ok(Next::Go)
    }

    pub(super) async fn pin(&mut self, arguments: &[String]) -> Outcome {
        let [wanted, which, cpus @ ..] = arguments else { return Err(usage("pin")) };
        let domain = any_domain(wanted)?;
        let (hard, soft) = match cpus {
            [] => (0, 0),
            [hard] => (schedule::cpus(hard)?, u64::MAX),
            [hard, soft] => (schedule::cpus(hard)?, schedule::cpus(soft)?),
            _ => return Err(usage("pin")),
        };
        let info = hypervisor::get().domain(domain).map_err(refused("tell about it"))?;
        let vcpus = match which.as_str() {
            "all" => 0..info.vcpus,
            number => {
                let vcpu: u32 =
                    number.parse().map_err(|_| format!("{number:?} is no vCPU: a number, or `all`"))?;
                vcpu..vcpu.saturating_add(1)
            }
        };
        let up = hypervisor::get().host().map_err(refused("tell about the machine"))?.cpus;
        for vcpu in vcpus {
            let (may, should) = hypervisor::get()
                .affinity(domain, vcpu, hard, soft)
                .map_err(|error| format!("vCPU {vcpu}: {error}"))?;
            let all = |set: u64| may & !set & cpu_bits(up) == 0;
            let rather =
                if all(should) { String::new() } else { format!(", rather {}", cpu_list(should, up)) };
            say!("vCPU {vcpu}: CPUs {}{rather}", cpu_list(may, up));
        }
        Ok(Next::Go)
    }

    pub(super) async fn weight(&mut self, arguments: &[String]) -> Outcome {
        self.share("weight", schedule::WEIGHT, arguments)
    }

    pub(super) async fn cap(&mut self, arguments: &[String]) -> Outcome {
        self.share("cap", schedule::CAP, arguments)
    }

    /// Shows a domain's share of the CPUs; changes what `key` names in it first, if a value is given.
    fn share(&self, command: &str, key: &str, arguments: &[String]) -> Outcome {
        let (wanted, value) = match arguments {
            [wanted] => (wanted, None),
            [wanted, value] => (wanted, Some(value)),
            _ => return Err(usage(command)),
        };
        let domain = any_domain(wanted)?;
        let mut share = hypervisor::get().share(domain).map_err(|refusal| refusal.to_string())?;
        if let Some(value) = value {
            let mut schedule = Schedule::default();
            schedule.set(key, value)?;
            share.weight = schedule.weight.unwrap_or(share.weight);
            share.cap_percent = schedule.cap.unwrap_or(share.cap_percent);
            hypervisor::get().set_share(domain, share).map_err(|refusal| refusal.to_string())?;
        }
        let cap = match share.cap_percent {
            0 => "no cap".into(),
            percent => format!("cap {percent} % of a CPU"),
        };
        say!("{wanted}: weight {}, {cap}", share.weight);
        Ok(Next::Go)
    }

    pub(super) async fn top(&mut self, arguments: &[String]) -> Outcome {
        let (mut left, mut key, mut as_json) = (None, Key::Cpu, false);
        for word in arguments {
            match word.strip_prefix("sort=") {
                Some(name) => key = Key::parse(name)?,
                None if word == "--json" => as_json = true,
                None => left = Some(number::<u64>(word)?),
            }
        }
        if as_json {
            left = Some(1);
        }
        let mut left = match left {
            None if self.scripted => {
                return Err("nobody can press q here: say how often, as in `top 3`".into());
            }
            left => left.unwrap_or(u64::MAX),
        };
        let mut before = accounts(false)?;
        let mut report: Option<Report> = None;
        while left > 0 {
            let letter = self.keys.key_before(before.system_time_ns + 1_000_000_000).await;
            match letter {
                Some(b'q' | b'Q' | CTRL_C) => break,
                Some(letter) => {
                    key = Key::of_letter(letter).unwrap_or(key);
                    // At once, of the numbers that are there.
                    let Some(report) = &mut report else { continue };
                    report.sort(key);
                    self.show_top(report, key);
                    continue;
                }
                None => {}
            }
            left -= 1;
            let now = accounts(false)?;
            let mut latest = Report::between(&before, &now);
            latest.sort(key);
            if as_json {
                say!("{}", accounts::json(&latest));
            } else {
                self.show_top(&latest, key);
            }
            (before, report) = (now, Some(latest));
        }
        Ok(Next::Go)
    }

    fn show_top(&self, report: &Report, key: Key) {
        let screen = report.show(key);
        if self.scripted {
            return print_block(&screen);
        }
        let letters: Vec<String> =
            Key::ALL.iter().map(|(_, word, letter)| format!("{} {word}", char::from(*letter))).collect();
        print!("{CLEAR}{screen}\nq ends this; sort by: {}\n", letters.join(", "));
    }
}

/// The guests that exist, by the number of their domain: looked up for each domain of a list.
struct Known(HashMap<DomId, (String, guests::Run)>);

impl Known {
    fn of(views: Vec<guests::View>) -> Self {
        let known = views.into_iter().filter_map(|view| match view.state {
            State::Running(run) | State::Ended(run) | State::Kept(run, _) => {
                Some((run.domain, (view.name, run)))
            }
            _ => None,
        });
        Self(known.collect())
    }

    /// What back ends moved for a domain, if dom0 has made it.
    fn traffic_of(&self, info: &DomainInfo) -> Option<accounts::Traffic> {
        self.0.get(&info.domain).map(|(_, run)| run.devices.traffic())
    }

    fn name_of(&self, info: &DomainInfo) -> String {
        if info.domain == guest_sdk::id() {
            return OWN_NAME.into();
        }
        match self.0.get(&info.domain) {
            Some((name, _)) => name.clone(),
            // Being built or torn down: it is known by what it was made with.
            None => {
                let end = info.handle.iter().position(|&byte| byte == 0).unwrap_or(info.handle.len());
                printable(info.handle.get(..end).unwrap_or(&[]))
            }
        }
    }
}

fn state_of(info: &DomainInfo) -> String {
    match info {
        info if info.dying => "being torn down".into(),
        DomainInfo { ending: Some(ending), .. } => ending.to_string(),
        info if info.paused => "paused".into(),
        info if info.running => "running".into(),
        info if info.blocked => "waiting".into(),
        _ => "ready".into(),
    }
}

/// All accounts as they are now; with those of each vCPU if `whole`.
fn accounts(whole: bool) -> Result<Accounts, String> {
    let known = Known::of(guests::all());
    let below = hypervisor::get();
    let infos = below.domains().map_err(refused("list the domains"))?;
    let vcpus = |info: &DomainInfo| {
        // One that goes meanwhile has none.
        let all = (0..info.vcpus).filter_map(|id| Some((id, below.vcpu(info.domain, id).ok()?)));
        all.map(|(id, vcpu)| VcpuAccount {
            id,
            cpu: vcpu.cpu,
            state: vcpu_state(&vcpu),
            running_ns: vcpu.cpu_time_ns,
            usage: vcpu.usage,
        })
        .collect()
    };
    let domain = |info: &DomainInfo| DomainAccount {
        name: known.name_of(info),
        id: info.domain.get(),
        state: state_of(info),
        memory_bytes: info.pages.saturating_mul(PAGE),
        vcpus: info.vcpus,
        cpu_time_ns: info.cpu_time_ns,
        usage: info.usage,
        traffic: known.traffic_of(info),
        vcpu: if whole { vcpus(info) } else { Vec::new() },
    };
    Ok(Accounts {
        cpu_idle_ns: below.idle_ns().map_err(refused("tell about its CPUs"))?,
        system_time_ns: time::now_ns(),
        domains: infos.iter().map(domain).collect(),
    })
}

fn vcpu_state(vcpu: &VcpuInfo) -> &'static str {
    match vcpu {
        VcpuInfo { online: false, .. } => "off",
        VcpuInfo { running: true, .. } => "running",
        VcpuInfo { blocked: true, .. } => "waiting",
        _ => "ready",
    }
}

/// The domain that somebody calls `text`, which may be dom0 itself.
fn any_domain(text: &str) -> Result<DomId, String> {
    if text == OWN_NAME || text == "0" {
        return Ok(guest_sdk::id());
    }
    guests::domain(&guests::resolve(text)?)
}

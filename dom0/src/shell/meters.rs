//! Commands that run others: again and again, or to see what they cost.

use super::{CTRL_C, Next, Outcome, Shell, deadline, duration, one, refused, usage};
use crate::hypervisor;
use crate::say;
use crate::units::millis;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use guest_sdk::{hypercall, time};

impl Shell {
    pub(super) async fn measure(&mut self, arguments: &[String]) -> Outcome {
        if arguments.is_empty() {
            return Err(usage("measure"));
        }
        let before = Cost::now()?;
        let outcome = self.run(arguments).await;
        let after = Cost::now()?;
        let total_ns = after.time_ns.saturating_sub(before.time_ns);
        let idle_ns = after.idle_ns.saturating_sub(before.idle_ns);
        // Each CPU was busy or idle all the time.
        let busy_ns = total_ns.saturating_mul(u64::from(after.cpus)).saturating_sub(idle_ns);
        let hypercalls = after.hypercalls.saturating_sub(before.hypercalls);
        say!("measured: {busy_ns} ns busy, {idle_ns} ns idle, {hypercalls} hypercalls of dom0");
        outcome
    }

    pub(super) async fn repeat(&mut self, arguments: &[String]) -> Outcome {
        let (count, command) = match arguments.split_first() {
            Some((count, command)) if !command.is_empty() => (count, command),
            _ => return Err(usage("repeat")),
        };
        let count: u32 = count.parse().map_err(|_| format!("{count:?} is no number"))?;
        for n in 1..=count {
            let words: Vec<String> = command.iter().map(|word| word.replace("{n}", &n.to_string())).collect();
            match Box::pin(self.run(&words)).await {
                Ok(Next::Go) => {}
                Ok(Next::PowerOff) => return Ok(Next::PowerOff),
                Err(error) => return Err(format!("number {n}: {error}")),
            }
        }
        Ok(Next::Go)
    }

    pub(super) async fn sleep(&mut self, arguments: &[String]) -> Outcome {
        let until = deadline(duration(one("sleep", arguments)?)?);
        self.idle_since = Effort::so_far();
        while let Some(key) = self.keys.key_before(until).await {
            if key == CTRL_C {
                return Err("interrupted".into());
            }
        }
        Ok(Next::Go)
    }

    pub(super) async fn time(&mut self, arguments: &[String]) -> Outcome {
        if arguments.is_empty() {
            return Err(usage("time"));
        }
        let (idle, start, start_ns) = (self.idle_since, Effort::so_far(), time::now_ns());
        let outcome = Box::pin(self.run(arguments)).await;
        let (end, took) = (Effort::so_far(), time::now_ns().saturating_sub(start_ns));
        // Since it woke dom0 has done nothing but run and wait for a CPU.
        let answer = start.total().saturating_sub(idle.total()).saturating_add(took);
        let waited = end.runnable_ns.saturating_sub(idle.runnable_ns);
        say!("answered in {}, of which dom0 waited {} for a CPU", millis(answer), millis(waited));
        outcome
    }
}

/// What `measure` takes the difference of.
struct Cost {
    cpus: u32,
    time_ns: u64,
    /// Of all CPUs.
    idle_ns: u64,
    hypercalls: u64,
}

impl Cost {
    /// What is measured lies between two returns from here: `cargo xtask layers` looks for them.
    #[inline(never)]
    fn now() -> Result<Self, String> {
        let below = hypervisor::get();
        let idle = below.idle_ns().map_err(refused("tell about its CPUs"))?;
        let own = below.domain(guest_sdk::id()).map_err(refused("tell about dom0"))?;
        let cpus = below.host().map_err(refused("tell about the machine"))?.cpus;
        Ok(Self {
            cpus,
            idle_ns: idle.iter().sum(),
            hypercalls: own.usage.map_or(0, |usage| usage.hypercalls),
            // Last before the command, so that little of this is counted.
            time_ns: time::now_ns(),
        })
    }
}

/// Time that dom0's vCPU has run, and wanted to.
#[derive(Clone, Copy, Default)]
pub(super) struct Effort {
    running_ns: u64,
    runnable_ns: u64,
}

impl Effort {
    pub(super) fn so_far() -> Self {
        // A vCPU may always ask about itself.
        let [running_ns, runnable_ns, ..] = hypercall::runstate(0).map_or([0; 4], |info| info.time);
        Self { running_ns, runnable_ns }
    }

    fn total(self) -> u64 {
        self.running_ns.saturating_add(self.runnable_ns)
    }
}

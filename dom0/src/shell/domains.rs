//! Commands for one domain: its life and its console.

use super::{
    DESTROY_PATIENCE, Next, Outcome, Shell, deadline, duration, number, one, print_block, refused, usage,
};
use crate::guests::{self, State};
use crate::hypervisor;
use crate::say;
use crate::waiting::{First, first};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use hypercall_abi::DomId;

/// ctrl-].
const DETACH: u8 = 0x1d;
/// How long `shutdown` waits for the domain.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);
/// How long `wait` does.
const WAIT_PATIENCE: Duration = Duration::from_secs(60);

impl Shell {
    pub(super) async fn destroy(&mut self, arguments: &[String]) -> Outcome {
        let (name, patience) = name_and_patience("destroy", arguments, DESTROY_PATIENCE)?;
        let name = guests::resolve(name)?;
        if guests::destroy(&name, deadline(patience)).await? {
            return Ok(Next::Go);
        }
        Err(format!(
            "{name} is dead, but not all of its memory is back: other domains still have pages of it mapped by grant, or a disk has \
             not answered what it asked for. It comes back when they let go or are destroyed"
        ))
    }

    pub(super) async fn pause(&mut self, arguments: &[String]) -> Outcome {
        let name = guests::resolve(one("pause", arguments)?)?;
        let domain = guests::domain(&name)?;
        if is_paused(domain) {
            return Err(format!("{name} is paused already: `unpause {name}` lets it go on"));
        }
        hypervisor::get().pause(domain).map_err(refused("pause it"))?;
        Ok(Next::Go)
    }

    pub(super) async fn unpause(&mut self, arguments: &[String]) -> Outcome {
        let name = guests::resolve(one("unpause", arguments)?)?;
        let domain = guests::domain(&name)?;
        if !is_paused(domain) {
            return Err(format!("{name} is not paused"));
        }
        hypervisor::get().unpause(domain).map_err(refused("unpause it"))?;
        Ok(Next::Go)
    }

    pub(super) async fn shutdown(&mut self, arguments: &[String]) -> Outcome {
        let (name, patience) = name_and_patience("shutdown", arguments, SHUTDOWN_PATIENCE)?;
        let names = match name {
            "--all" => guests::in_order_of_end(),
            name => Vec::from([guests::resolve(name)?]),
        };
        for name in names {
            if let Some(note) = guests::shut_down(&name, deadline(patience)).await? {
                say!("{note}");
            }
        }
        Ok(Next::Go)
    }

    pub(super) async fn console(&mut self, arguments: &[String]) -> Outcome {
        if let [flag, name] = arguments
            && flag == "-f"
        {
            let name = guests::resolve(name)?;
            let verb = if guests::toggle_follow(&name) {
                "is shown here from now on"
            } else {
                "is not shown any more"
            };
            say!("the output of {name} {verb}");
            return Ok(Next::Go);
        }
        if let [verb, name, n @ ..] = arguments
            && verb == "panic"
        {
            let n = match n {
                [] => 1,
                [n] => number(n)?,
                _ => return Err(usage("console")),
            };
            guests::panic_console(&guests::resolve(name)?, n)?;
            return Ok(Next::Go);
        }
        let name = guests::resolve(one("console", arguments)?)?;
        guests::domain(&name)?;
        if self.scripted {
            return Err(format!("nobody is at the keyboard: use `logs {name}`"));
        }
        say!("This is the console of {name}; ctrl-] leads back to dom0.");
        let shown = guests::last_lines(&name, 10);
        if !shown.is_empty() {
            print_block(&shown);
        }
        guests::attach(Some(&name));
        loop {
            let seen = guests::CHANGED.rings();
            if !guests::is_alive(&name) {
                break;
            }
            match first(self.keys.key(), guests::CHANGED.after(seen)).await {
                First::One(DETACH) => break,
                First::One(key) => {
                    guests::type_in(&name, &[key]);
                }
                First::Other(()) => {}
            }
        }
        guests::attach(None);
        say!("\nBack in dom0.");
        Ok(Next::Go)
    }

    pub(super) async fn logs(&mut self, arguments: &[String]) -> Outcome {
        let (name, lines) = match arguments {
            [name] => (name, 20),
            [name, lines] => (name, number::<usize>(lines)?),
            _ => return Err(usage("logs")),
        };
        let name = guests::resolve(name)?;
        let text = guests::last_lines(&name, lines);
        if text.is_empty() {
            say!("{name} has printed nothing");
        } else {
            print_block(&text);
        }
        Ok(Next::Go)
    }

    pub(super) async fn wait(&mut self, arguments: &[String]) -> Outcome {
        let (name, limit) = name_and_patience("wait", arguments, WAIT_PATIENCE)?;
        let name = guests::resolve(name)?;
        match guests::wait_for_end(&name, deadline(limit)).await {
            Some(State::Kept(..) | State::Gone(_)) | None => Ok(Next::Go),
            Some(_) => Err(format!("{name} still runs after {} s", limit.as_secs_f32())),
        }
    }
}

/// The words `NAME [SECONDS]` behind a command, which has so much patience unless told.
fn name_and_patience<'a>(
    command: &str,
    arguments: &'a [String],
    unless_told: Duration,
) -> Result<(&'a str, Duration), String> {
    match arguments {
        [name] => Ok((name, unless_told)),
        [name, patience] => Ok((name, duration(patience)?)),
        _ => Err(usage(command)),
    }
}

fn is_paused(domain: DomId) -> bool {
    hypervisor::get().domain(domain).is_ok_and(|info| info.paused)
}

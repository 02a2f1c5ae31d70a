//! The command that looks into xenstore, and changes it.

use super::{Next, Outcome, Shell, deadline, duration, number, print_block, usage};
use crate::guests;
use crate::say;
use crate::scrollback::printable;
use crate::store::{self, Part};
use crate::waiting::{First, first};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::time;

impl Shell {
    pub(super) async fn xenstore(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let path = words.get(1).copied().unwrap_or("/");
        let because = |error| format!("xenstore answers {error} to {path:?}");
        match words.as_slice() {
            ["ls"] | ["ls", _] => print_block(&store_tree(path).map_err(because)?),
            ["read", _] => say!("{}", printable(&store::read(path).map_err(because)?)),
            ["write", _, value] => store::write(path, value).map_err(because)?,
            ["rm", _] => store::remove(path).map_err(because)?,
            ["watch", _] => self.watch_store(path, None).await?,
            ["watch", _, limit] => self.watch_store(path, Some(duration(limit)?)).await?,
            ["panic", name] => guests::panic_store(&guests::resolve(name)?, Part::Request, 1)?,
            ["panic", name, "ring"] => guests::panic_store(&guests::resolve(name)?, Part::Ring, 1)?,
            ["panic", name, n] => {
                guests::panic_store(&guests::resolve(name)?, Part::Request, number(n)?)?;
            }
            ["trace"] => print_block(&store::take_trace().ok_or("nothing is traced: `xenstore trace NAME`")?),
            ["trace", "off"] => store::end_trace(),
            ["trace", name] => guests::trace_store(&guests::resolve(name)?)?,
            ["control", command, ..] => {
                let answer = store::control(words.get(1..).unwrap_or(&[]));
                let answer = answer.map_err(|error| format!("xenstore answers {error} to {command:?}"))?;
                print_block(answer.trim_end_matches('\0'));
            }
            _ => return Err(usage("xenstore")),
        }
        Ok(Next::Go)
    }

    async fn watch_store(&mut self, path: &str, limit: Option<Duration>) -> Result<(), String> {
        if self.scripted && limit.is_none() {
            return Err("nobody is at the keyboard to end it: say for how many seconds".into());
        }
        let watcher = store::Own::new();
        watcher.watch(path).map_err(|error| format!("xenstore answers {error} to {path:?}"))?;
        let until = limit.map_or(u64::MAX, deadline);
        loop {
            let event = first(watcher.event(), time::until_ns(until));
            let event = if self.scripted {
                event.await
            } else {
                match first(event, self.keys.key()).await {
                    First::One(event) => event,
                    First::Other(_) => return Ok(()),
                }
            };
            match event {
                First::One(changed) => say!("{changed}"),
                First::Other(()) => return Ok(()),
            }
        }
    }
}

/// A node and all below it, each in a line, indented by its depth.
fn store_tree(top: &str) -> Result<String, xenstore::Error> {
    let mut text = String::new();
    let mut left = alloc::vec![(top.trim_end_matches('/').to_string(), 0)];
    // Its root has no name of its own, and may not be there.
    store::children(top)?;
    while let Some((path, depth)) = left.pop() {
        let whole = if path.is_empty() { "/" } else { path.as_str() };
        // What goes away meanwhile is left out.
        let Ok(value) = store::read(whole) else { continue };
        let name = if depth == 0 { whole } else { path.rsplit('/').next().unwrap_or("") };
        text += &format!("{:depth$}{name} = \"{}\"\n", "", printable(&value));
        let children = store::children(whole).unwrap_or_default();
        left.extend(children.into_iter().rev().map(|child| (format!("{path}/{child}"), depth + 1)));
    }
    Ok(text)
}

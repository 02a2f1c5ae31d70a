//! `CONTROL`: what the control domain may ask of the store itself (Xen's docs/misc/xenstore.txt).
//!
//! Commands, their words and their replies are those of Xen 4.17's xenstored, as far as there is something here that they are about. What
//! it has beside them is `EINVAL`, as every unknown command: `log`, `logfile` and `memreport` (there are no files), `live-update`,
//! `quota-soft` (nobody is warned), and the quota `path-max` (a limit of the protocol).

use super::requests::number;
use super::{OK, Store};
use crate::permissions::domain;
use crate::wire::strings;
use crate::{Error, Quota, Usage};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use hypercall_abi::DomId;

/// The commands, and what they take.
const COMMANDS: [(&str, &str); 4] =
    [("check", ""), ("print", "<string>"), ("quota", "[set <name> <val>|<domid>]"), ("help", "")];

impl Store {
    /// Carries out a command.
    ///
    /// # Errors
    /// [`Error::Invalid`]: no such command, or not with these words; [`Error::NotFound`]: no such domain.
    pub(super) fn control_command(&mut self, payload: &[u8]) -> Result<Vec<u8>, Error> {
        let words: Vec<&str> = strings(payload)
            .map(core::str::from_utf8)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::Invalid)?;
        let text = match words.as_slice() {
            ["help"] => COMMANDS.iter().map(|(name, words)| format!("{name}\t{words}\n")).collect(),
            ["check"] => match self.check() {
                Some(wrong) => wrong.into(),
                None => return Ok(OK.into()),
            },
            // Whoever has the store may log it; there is no file here.
            ["print", _] => return Ok(OK.into()),
            ["quota"] => settings(&self.quota),
            ["quota", "set", name, value] => {
                self.set_limit(name, number(value.as_bytes())?)?;
                return Ok(OK.into());
            }
            ["quota", id] => {
                let domain = domain(id.as_bytes())?;
                taken(domain.get(), &self.usage(domain).ok_or(Error::NotFound)?)
            }
            _ => return Err(Error::Invalid),
        };
        Ok(format!("{text}\0").into_bytes())
    }

    /// Sets a limit of all domains, of those that are there, too.
    fn set_limit(&mut self, name: &str, value: u32) -> Result<(), Error> {
        if value == 0 {
            return Err(Error::Invalid);
        }
        *self.quota.by_name(name).ok_or(Error::Invalid)? = value;
        let domains: Vec<DomId> = self.domains.keys().copied().collect();
        for domain in domains {
            let limit = self.domains.get_mut(&domain).and_then(|known| known.quota.by_name(name));
            limit.into_iter().for_each(|limit| *limit = value);
        }
        Ok(())
    }
}

fn settings(quota: &Quota) -> String {
    let lines = quota.described().map(|(name, value, about)| format!("{name:<17}: {value:>8} {about}\n"));
    core::iter::once(String::from("Quota settings:\n")).chain(lines).collect()
}

fn taken(domain: u16, usage: &Usage) -> String {
    let lines = [
        ("nodes", usage.nodes),
        ("watches", usage.watches),
        ("transactions", usage.transactions),
        ("outstanding", usage.caused),
        ("memory", usage.memory),
    ]
    .map(|(name, value)| format!("{name:<16}: {value:>8}\n"));
    core::iter::once(format!("Domain {domain}:\n")).chain(lines).collect()
}

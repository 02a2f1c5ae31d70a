//! What a description and the shell say about a domain's CPU time, with the names and units of Xen's tools (xl.cfg(5)).

use crate::units::cpu_set;
use alloc::format;
use alloc::string::String;

/// Share against others: `cpu_weight`.
pub const WEIGHT: &str = "cpu_weight";
/// The most it gets, in percent of one CPU, 0 for no cap: `cap`.
pub const CAP: &str = "cap";
/// CPUs that it may run on: `cpus`.
pub const CPUS: &str = "cpus";
/// CPUs that it should run on: `cpus_soft`.
pub const CPUS_SOFT: &str = "cpus_soft";

/// Largest weight.
const MOST_WEIGHT: u32 = 65535;
/// Largest cap: all of 64 CPUs.
const MOST_CAP: u32 = 6400;

/// What is said about a domain's CPU time; `None` is what the hypervisor does by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// See [`WEIGHT`].
    pub weight: Option<u32>,
    /// See [`CAP`].
    pub cap: Option<u32>,
    /// See [`CPUS`], a bit each.
    pub cpus: Option<u64>,
    /// See [`CPUS_SOFT`].
    pub cpus_soft: Option<u64>,
}

impl Schedule {
    /// Sets what a key says as a word.
    ///
    /// # Errors
    /// What is wrong with the value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            CPUS | CPUS_SOFT => {
                let set = Some(cpus(value).map_err(|why| format!("{key} {value:?}: {why}"))?);
                *(if key == CPUS { &mut self.cpus } else { &mut self.cpus_soft }) = set;
                Ok(())
            }
            _ => {
                self.set_number(key, value.parse().map_err(|_| format!("{key}={value}: not a whole number"))?)
            }
        }
    }

    /// Sets [`WEIGHT`] or [`CAP`].
    ///
    /// # Errors
    /// What is wrong with the value.
    pub fn set_number(&mut self, key: &str, value: i64) -> Result<(), String> {
        let (least, most) = if key == WEIGHT { (1, MOST_WEIGHT) } else { (0, MOST_CAP) };
        let unit = if key == WEIGHT { "" } else { " percent of a CPU, 0 for no cap" };
        let checked = u32::try_from(value).ok().filter(|value| (least..=most).contains(value));
        let checked = checked.ok_or_else(|| format!("{key} = {value}: from {least} to {most}{unit}"))?;
        *(if key == WEIGHT { &mut self.weight } else { &mut self.cap }) = Some(checked);
        Ok(())
    }
}

/// A list of CPUs as in `0,2-3`, or `all`.
///
/// # Errors
/// What is wrong with it.
pub fn cpus(list: &str) -> Result<u64, String> {
    if list == "all" { Ok(u64::MAX) } else { cpu_set(list) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked() {
        let mut schedule = Schedule::default();
        for (key, value) in [(WEIGHT, "512"), (CAP, "150"), (CPUS, "0,2-3"), (CPUS_SOFT, "all")] {
            assert_eq!(schedule.set(key, value), Ok(()));
        }
        let wanted =
            Schedule { weight: Some(512), cap: Some(150), cpus: Some(0b1101), cpus_soft: Some(u64::MAX) };
        assert_eq!(schedule, wanted);
        for (key, value, why) in [
            (WEIGHT, "0", "cpu_weight = 0: from 1 to 65535"),
            (WEIGHT, "65536", "cpu_weight = 65536: from 1 to 65535"),
            (CAP, "6401", "cap = 6401: from 0 to 6400 percent of a CPU, 0 for no cap"),
            (CAP, "x", "cap=x: not a whole number"),
            (CPUS, "3-1", "cpus \"3-1\": 3-1: the smaller number comes first"),
        ] {
            assert_eq!(schedule.set(key, value), Err(why.into()));
        }
        assert_eq!(schedule, wanted, "nothing changed");
    }
}

//! CPUs that vCPUs hold for themselves, under the policy `null`.
//!
//! A vCPU holds one CPU from the making of its domain to the beginning of its end, so no two share one and none waits for another.
//! It gives it up for another only when its affinity excludes it.

use crate::platform::{CpuId, CpuSet};
use crate::sync::{RankedMutex, rank};

/// Which CPUs are held.
pub struct Claims {
    held: RankedMutex<CpuSet, { rank::CLAIMS }>,
}

impl Claims {
    /// All are free.
    pub const fn new() -> Claims {
        Claims { held: RankedMutex::new(CpuSet(0)) }
    }

    /// Takes `count` of the CPUs `among` that are free, or none.
    pub fn take(&self, count: u32, among: CpuSet) -> Option<CpuSet> {
        let mut held = self.held.lock();
        let mut taken = CpuSet::default();
        for cpu in among.iter().filter(|cpu| !held.contains(*cpu)).take(count as usize) {
            taken = taken.with(cpu);
        }
        if taken.iter().count() < count as usize {
            return None;
        }
        *held = CpuSet(held.0 | taken.0);
        Some(taken)
    }

    /// Gives CPUs back.
    pub fn give_back(&self, cpus: CpuSet) {
        let mut held = self.held.lock();
        *held = CpuSet(held.0 & !cpus.0);
    }

    /// Takes one of the CPUs `among` in place of `old`, which is free then.
    pub fn exchange(&self, old: CpuId, among: CpuSet) -> Option<CpuId> {
        let new = self.take(1, among)?.iter().next()?;
        self.give_back(CpuSet::one(old));
        Some(new)
    }
}

impl Default for Claims {
    fn default() -> Self {
        Claims::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cpu_is_held_twice() {
        let claims = Claims::new();
        let online = CpuSet::first(4);
        assert_eq!(claims.take(3, online), Some(CpuSet(0b0111)));
        assert_eq!(claims.take(2, online), None, "all or nothing");
        assert_eq!(claims.take(1, online), Some(CpuSet(0b1000)));
        claims.give_back(CpuSet(0b0010));
        assert_eq!(claims.exchange(CpuId(0), CpuSet(0b1101)), None, "the others are held");
        assert_eq!(claims.exchange(CpuId(0), CpuSet(0b0010)), Some(CpuId(1)));
        assert_eq!(claims.take(1, online), Some(CpuSet(0b0001)));
    }
}

//! How long a long operation may go on before it looks whether somebody waits.

/// Steps left. One step is at most about the work of validating 64 page-table entries or scrubbing one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    left: u32,
}

/// The budget is spent: stop between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preempted;

impl Budget {
    /// Steps a guest's hypercall gets at each entry.
    pub const PER_ENTRY: u32 = 7;

    /// A budget of `steps` steps.
    pub const fn new(steps: u32) -> Budget {
        Budget { left: steps }
    }

    /// No limit, for boot and tests.
    pub const fn unlimited() -> Budget {
        Budget { left: u32::MAX }
    }

    /// Pays for one step that was done. `Err` when it was the last: the operation stops here, having made progress.
    pub fn step(&mut self) -> Result<(), Preempted> {
        if self.left == u32::MAX {
            return Ok(());
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 { Err(Preempted) } else { Ok(()) }
    }

    /// Whether nothing is left.
    pub const fn is_spent(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_makes_progress() {
        let mut one = Budget::new(1);
        assert_eq!(one.step(), Err(Preempted));
        assert!(one.is_spent());
        let mut none = Budget::unlimited();
        assert!((0..10_000).all(|_| none.step().is_ok()));
    }
}

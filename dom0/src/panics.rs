//! How much panicking of a service is borne.

/// Panics in a row, with nothing done between them, after which something is not worth another try.
pub const MOST_FUTILE: u32 = 3;
/// A panic so long after the one before is the first of a row, ns. What was done between them does not count where a guest decides how much
/// that is: one that knows how to bring panics about is not to have them for a request.
pub const CALM_NS: u64 = 10_000_000_000;

/// Panics of one thing, as far as they belong together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Row {
    last_ns: u64,
    count: u32,
}

impl Row {
    /// One more; false when it is one too many.
    pub fn bears_another(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.last_ns) > CALM_NS {
            self.count = 0;
        }
        self.last_ns = now_ns;
        self.count = self.count.saturating_add(1);
        self.count < MOST_FUTILE
    }
}

#[cfg(test)]
mod tests {
    use super::{CALM_NS, Row};

    #[test]
    fn only_panics_that_come_fast_are_too_many() {
        let mut row = Row::default();
        let mut now = CALM_NS;
        for _ in 0..20 {
            now += CALM_NS + 1;
            assert!(row.bears_another(now));
        }
        assert!(row.bears_another(now + 1));
        assert!(!row.bears_another(now + CALM_NS + 1));
        assert!(!row.bears_another(now + CALM_NS + 2));
        assert!(row.bears_another(now + 3 * CALM_NS));
    }
}

//! How much may pass in a time.

/// A token bucket: `rate` bytes a second in the long run, at most `burst` at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    rate: u64,
    burst: u64,
    /// Billionths of a byte, so that nothing is lost however often it is asked.
    tokens: u128,
    filled_ns: u64,
}

/// Tokens of a byte.
const BYTE: u128 = 1_000_000_000;

impl Bucket {
    /// A full bucket. A rate of 0 lets `burst` bytes pass and never any more.
    #[must_use]
    pub const fn new(rate: u64, burst: u64, now_ns: u64) -> Self {
        Self { rate, burst, tokens: burst as u128 * BYTE, filled_ns: now_ns }
    }

    /// Takes `bytes` out, if they are there; a clock that goes back adds nothing.
    ///
    /// # Errors
    /// The time, ns, from which on they will be; `u64::MAX` for more than the bucket ever holds.
    pub fn take(&mut self, now_ns: u64, bytes: usize) -> Result<(), u64> {
        let since = now_ns.saturating_sub(self.filled_ns);
        self.filled_ns = self.filled_ns.max(now_ns);
        // At most 2^128: two numbers of 64 bits.
        let full = u128::from(self.burst) * BYTE;
        self.tokens = self.tokens.saturating_add(u128::from(since) * u128::from(self.rate)).min(full);
        let wanted = bytes as u128 * BYTE;
        if let Some(left) = self.tokens.checked_sub(wanted) {
            self.tokens = left;
            return Ok(());
        }
        if wanted > full || self.rate == 0 {
            return Err(u64::MAX);
        }
        let missing = (wanted - self.tokens).div_ceil(u128::from(self.rate));
        Err(self.filled_ns.saturating_add(u64::try_from(missing).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::Bucket;
    use proptest::prelude::*;

    #[test]
    fn waiting_for_the_time_told_is_enough_and_needed() {
        let mut bucket = Bucket::new(1_000_000, 3000, 5);
        assert_eq!(bucket.take(5, 3000), Ok(()));
        let Err(ready) = bucket.take(5, 1500) else { panic!("it was empty") };
        assert_eq!(ready, 5 + 1_500_000);
        assert!(bucket.take(ready - 1, 1500).is_err());
        assert_eq!(bucket.take(ready, 1500), Ok(()));
        assert_eq!(bucket.take(ready, 3001), Err(u64::MAX), "more than it ever holds");
        assert_eq!(Bucket::new(0, 10, 0).take(u64::MAX, 11), Err(u64::MAX));
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate(
            rate in 0..1u64 << 34,
            burst in 0..1u64 << 24,
            asks in prop::collection::vec((0..2_000_000u64, 0..9000usize), 1..200),
        ) {
            let mut bucket = Bucket::new(rate, burst, 0);
            let (mut now, mut passed) = (0, 0u128);
            for (step, bytes) in asks {
                now += step;
                match bucket.take(now, bytes) {
                    Ok(()) => passed += bytes as u128,
                    Err(ready) => prop_assert!(ready > now),
                }
                let most = u128::from(burst) * super::BYTE + u128::from(now) * u128::from(rate);
                prop_assert!(passed * super::BYTE <= most);
            }
        }
    }
}

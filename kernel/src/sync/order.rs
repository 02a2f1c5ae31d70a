//! The check of the lock order, in host tests: each thread stands for a CPU and notes the ranks it holds.
//!
//! In the image this costs nothing: interrupts are off in ring 0, so what the tests run is all there is to order.

#[cfg(all(debug_assertions, test))]
mod held {
    use std::cell::RefCell;
    use std::vec::Vec;

    std::thread_local! {
        static HELD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    /// Notes that a lock of `rank` is about to be taken.
    ///
    /// # Panics
    /// When a lock of this rank or a higher one is held: another CPU doing the opposite would wait for ever.
    pub fn take(rank: u8) {
        HELD.with_borrow_mut(|held| {
            if let Some(highest) = held.iter().max() {
                assert!(rank > *highest, "lock order: rank {rank} asked for while {highest} is held");
            }
            held.push(rank);
        });
    }

    /// Whether a lock of `rank` is held.
    pub fn holds(rank: u8) -> bool {
        HELD.with_borrow(|held| held.contains(&rank))
    }

    /// Notes that a lock of `rank` was given back.
    pub fn release(rank: u8) {
        HELD.with_borrow_mut(|held| {
            if let Some(at) = held.iter().rposition(|r| *r == rank) {
                held.remove(at);
            }
        });
    }
}

#[cfg(all(debug_assertions, test))]
pub use held::{holds, release, take};

/// Notes that a lock of this rank is about to be taken.
#[cfg(not(all(debug_assertions, test)))]
#[inline]
pub fn take(_rank: u8) {}

/// Notes that a lock of this rank was given back.
#[cfg(not(all(debug_assertions, test)))]
#[inline]
pub fn release(_rank: u8) {}

#[cfg(test)]
mod tests {
    use crate::sync::RankedMutex;

    #[test]
    fn locks_go_up_in_rank() {
        let (low, high) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 2>::new(2));
        {
            let _a = low.lock();
            let _b = high.lock();
        }
        let b = high.lock();
        drop(b);
        let _a = low.lock();
        let _b = high.lock();
    }

    #[test]
    #[should_panic(expected = "lock order")]
    fn a_lower_rank_is_refused_while_a_higher_is_held() {
        let (low, high) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 2>::new(2));
        let _b = high.lock();
        let _a = low.lock();
    }
}

//! The check of the lock order, in debug builds: which ranks each CPU holds.
//!
//! In host tests a thread stands for a CPU. In the image (`build::debug` in xtask) the CPU is known by a function that the boot code
//! sets; before, one CPU runs and nothing is checked. Released images have none of this: interrupts are off in ring 0, so what the
//! debug image runs is all there is to order.

/// Ranks as bits.
#[cfg(debug_assertions)]
mod held {
    #[cfg(not(test))]
    pub use per_cpu::{on_cpu, with};
    #[cfg(test)]
    pub use per_thread::{on_cpu, with};

    #[cfg(not(test))]
    mod per_cpu {
        use crate::x86::layout::MAX_CPUS;
        use core::sync::atomic::{AtomicU64, Ordering};

        static CPU: spin::Once<fn() -> usize> = spin::Once::new();
        /// Each CPU writes its own words only.
        static HELD: [[AtomicU64; 2]; MAX_CPUS] = [const { [const { AtomicU64::new(0) }; 2] }; MAX_CPUS];

        /// Says how a CPU learns its number.
        pub fn on_cpu(number: fn() -> usize) {
            CPU.call_once(|| number);
        }

        /// Lets `work` change the set of ranks that this CPU holds.
        pub fn with<T>(work: impl FnOnce(&mut u128) -> T) -> Option<T> {
            let [low, high] = HELD.get(CPU.get()?())?;
            let mut held =
                u128::from(high.load(Ordering::Relaxed)) << 64 | u128::from(low.load(Ordering::Relaxed));
            let result = work(&mut held);
            low.store(held as u64, Ordering::Relaxed);
            high.store((held >> 64) as u64, Ordering::Relaxed);
            Some(result)
        }
    }

    const fn bit(rank: u8) -> u128 {
        1 << (rank & 127)
    }

    /// Notes that a lock of `rank` is about to be taken.
    ///
    /// # Panics
    /// When a lock of this rank or a higher one is held: another CPU doing the opposite would wait for ever.
    pub fn take(rank: u8) {
        with(|held| {
            let highest = 127 - held.leading_zeros() as i32;
            assert!(i32::from(rank) > highest, "lock order: rank {rank} asked for while {highest} is held");
            *held |= bit(rank);
        });
    }

    /// Whether a lock of `rank` is held.
    #[cfg(test)]
    pub fn holds(rank: u8) -> bool {
        with(|held| *held & bit(rank) != 0).unwrap_or(false)
    }

    /// Notes that a lock of `rank` was given back.
    pub fn release(rank: u8) {
        with(|held| *held &= !bit(rank));
    }

    /// Notes that a CPU is about to leave ring 0, or to idle: with a lock, nobody else would ever get it.
    ///
    /// # Panics
    /// When it holds one.
    pub fn none_held() {
        with(|held| assert!(*held == 0, "lock order: ring 0 is left with locks held: ranks {held:#x}"));
    }

    #[cfg(test)]
    mod per_thread {
        use std::cell::Cell;

        std::thread_local! {
            static HELD: Cell<u128> = const { Cell::new(0) };
        }

        /// Threads know who they are.
        pub fn on_cpu(_number: fn() -> usize) {}

        /// Lets `work` change the set of ranks that this thread holds.
        pub fn with<T>(work: impl FnOnce(&mut u128) -> T) -> Option<T> {
            let mut held = HELD.get();
            let result = work(&mut held);
            HELD.set(held);
            Some(result)
        }
    }
}

#[cfg(all(debug_assertions, test))]
pub use held::holds;
#[cfg(debug_assertions)]
pub use held::{none_held, on_cpu, release, take};

/// Notes that a lock of this rank is about to be taken.
#[cfg(not(debug_assertions))]
#[inline]
pub fn take(_rank: u8) {}

/// Notes that a lock of this rank was given back.
#[cfg(not(debug_assertions))]
#[inline]
pub fn release(_rank: u8) {}

/// Notes that a CPU is about to leave ring 0.
#[cfg(not(debug_assertions))]
#[inline]
pub fn none_held() {}

/// Says how a CPU learns its number.
#[cfg(not(debug_assertions))]
pub fn on_cpu(_number: fn() -> usize) {}

#[cfg(test)]
mod tests {
    use super::none_held;
    use crate::sync::{RankedMutex, rank};

    #[test]
    fn locks_go_up_in_rank() {
        let (low, high) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 2>::new(2));
        {
            let _a = low.lock();
            let _b = high.lock();
        }
        none_held();
        let b = high.lock();
        drop(b);
        let _a = low.lock();
        let _b = high.lock();
    }

    #[test]
    #[should_panic(expected = "lock order: rank 1 asked for while 2 is held")]
    fn a_lower_rank_is_refused_while_a_higher_is_held() {
        let (low, high) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 2>::new(2));
        let _b = high.lock();
        let _a = low.lock();
    }

    #[test]
    #[should_panic(expected = "lock order: rank 20 asked for while 20 is held")]
    fn two_of_one_rank_are_refused() {
        let tables = [(); 2].map(|()| RankedMutex::<_, { rank::GRANTS }>::new(()));
        let _held = tables.each_ref().map(RankedMutex::lock);
    }

    #[test]
    #[should_panic(expected = "ring 0 is left with locks held")]
    fn nobody_leaves_with_a_lock() {
        let lock = RankedMutex::<_, 3>::new(());
        let _held = lock.lock();
        none_held();
    }
}

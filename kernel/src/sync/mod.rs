//! Locks with ranks: the one lock order of the hypervisor.
//!
//! A CPU may take a lock only if its rank is higher than that of every lock it holds (host tests check this, see `order`).
//! Interrupts are off while the hypervisor runs, so a lock holder is never interrupted on its own CPU.

mod order;
pub mod rank;

use core::ops::{Deref, DerefMut};

/// A spin lock of rank `RANK` (see [`rank`]).
pub struct RankedMutex<T, const RANK: u8> {
    inner: spin::Mutex<T>,
}

impl<T, const RANK: u8> RankedMutex<T, RANK> {
    /// An open lock around `value`.
    pub const fn new(value: T) -> Self {
        RankedMutex { inner: spin::Mutex::new(value) }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> RankedGuard<'_, T, RANK> {
        order::take(RANK);
        RankedGuard { inner: self.inner.lock() }
    }

    /// Waits for the lock as the second of a pair of rank `RANK`, counted as rank `SECOND`. The caller orders the pair.
    pub fn lock_second<const SECOND: u8>(&self) -> RankedGuard<'_, T, SECOND> {
        const { assert!(RANK < SECOND, "the second of a pair ranks above the first") };
        order::take(SECOND);
        RankedGuard { inner: self.inner.lock() }
    }
}

/// Gives the lock back when dropped.
pub struct RankedGuard<'a, T, const RANK: u8> {
    inner: spin::MutexGuard<'a, T>,
}

impl<T, const RANK: u8> Deref for RankedGuard<'_, T, RANK> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T, const RANK: u8> DerefMut for RankedGuard<'_, T, RANK> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T, const RANK: u8> Drop for RankedGuard<'_, T, RANK> {
    fn drop(&mut self) {
        order::release(RANK);
    }
}

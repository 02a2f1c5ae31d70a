//! Locks with ranks: the one lock order of the hypervisor.
//!
//! A CPU may take a lock only if its rank is higher than that of every lock it holds (debug builds check this, see `order`).
//! Interrupts are off while the hypervisor runs, so a lock holder is never interrupted on its own CPU.

pub mod atomic;
mod order;
pub mod rank;

#[cfg(all(debug_assertions, test))]
pub use order::holds;
pub use order::{none_held, on_cpu};

#[cfg(not(all(loom, test)))]
use core::hint;
use core::ops::{Deref, DerefMut};

static RELAX: spin::Once<fn()> = spin::Once::new();

/// Sets what a CPU does in each round of waiting for another one, beside pausing: answer requests to flush its TLB, for it takes no
/// interrupts (`mm::tlb_clock`), and look whether the other one lives (`watchdog`). Once, before a second CPU runs.
pub fn on_relax(round: fn()) {
    RELAX.call_once(|| round);
}

/// One round of waiting for another CPU. Every loop of ring 0 in which a CPU waits for what another does calls this.
#[cold]
pub fn relax() {
    if let Some(round) = RELAX.get() {
        round();
    }
    #[cfg(not(all(loom, test)))]
    hint::spin_loop();
    #[cfg(all(loom, test))]
    loom::thread::yield_now();
}

/// A lock without a rank, for mechanism: held for a few instructions, in which no other lock is taken.
pub type PlainMutex<T> = spin::mutex::Mutex<T, Relax>;

/// How a [`PlainMutex`] waits: by [`relax`].
pub struct Relax;

impl spin::RelaxStrategy for Relax {
    fn relax() {
        relax();
    }
}

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
        RankedGuard { inner: self.wait() }
    }

    /// Waits for the lock as the second of a pair of rank `RANK`, counted as rank `SECOND`. The caller orders the pair.
    pub fn lock_second<const SECOND: u8>(&self) -> RankedGuard<'_, T, SECOND> {
        const { assert!(RANK < SECOND, "the second of a pair ranks above the first") };
        order::take(SECOND);
        RankedGuard { inner: self.wait() }
    }

    fn wait(&self) -> spin::MutexGuard<'_, T> {
        loop {
            if let Some(guard) = self.inner.try_lock() {
                return guard;
            }
            while self.inner.is_locked() {
                relax();
            }
        }
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

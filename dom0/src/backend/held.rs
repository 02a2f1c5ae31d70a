//! Values that several back ends share, with a count of those that are in use.
//!
//! Work that panics in a compartment keeps what it has locked, for ever. So the count is asked first: with anything shared in the
//! middle of a change, dom0 ends as by any other panic.

use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, Ordering};
use spin::{Mutex, MutexGuard};

static HELD: AtomicU32 = AtomicU32::new(0);

/// Whether nobody is in the middle of using such a value.
pub fn none() -> bool {
    HELD.load(Ordering::Acquire) == 0
}

/// A value that several use. It is never locked over an await.
#[derive(Debug, Default)]
pub struct Shared<T>(Mutex<T>);

impl<T> Shared<T> {
    /// Nobody uses it.
    pub const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Uses it.
    pub fn lock(&self) -> Held<'_, T> {
        let value = self.0.lock();
        HELD.fetch_add(1, Ordering::AcqRel);
        Held(value)
    }
}

/// A value in use.
pub struct Held<'a, T>(MutexGuard<'a, T>);

impl<T> Deref for Held<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::AcqRel);
    }
}

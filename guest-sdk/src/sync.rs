//! What tasks need to wait for each other, beside channels and mutexes of other crates.

use alloc::sync::Arc;
use alloc::task::Wake;
use alloc::vec::Vec;
use core::future::{Future, poll_fn};
use core::ops::{Deref, DerefMut};
use core::pin::pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Poll, Waker};
use spin::Mutex;

/// Which of two futures came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First<A, B> {
    /// The one named first.
    One(A),
    /// The other.
    Other(B),
}

/// Waits for the first of two; the other is dropped.
pub async fn first<A: Future, B: Future>(one: A, other: B) -> First<A::Output, B::Output> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| {
        if let Poll::Ready(value) = one.as_mut().poll(context) {
            return Poll::Ready(First::One(value));
        }
        other.as_mut().poll(context).map(First::Other)
    })
    .await
}

/// Tells any number of tasks that something has changed; they look for themselves what.
#[derive(Debug, Default)]
pub struct Bell {
    rings: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl Bell {
    /// One that nobody waits for.
    #[must_use]
    pub const fn new() -> Self {
        Self { rings: AtomicU64::new(0), waiting: Mutex::new(Vec::new()) }
    }

    /// Wakes everybody.
    pub fn ring(&self) {
        self.rings.fetch_add(1, Ordering::AcqRel);
        let mut waiting = match &mut *self.waiting.lock() {
            nobody if nobody.is_empty() => return,
            waiting => core::mem::take(waiting),
        };
        // Outside the lock: a waker may do anything.
        waiting.drain(..).for_each(Waker::wake);
        // Its memory serves the next who wait.
        let mut place = self.waiting.lock();
        if place.capacity() == 0 {
            *place = waiting;
        }
    }

    /// How often it rang: taken before looking, so that what changes after the look is not missed.
    pub fn rings(&self) -> u64 {
        self.rings.load(Ordering::Acquire)
    }

    /// Waits until it has rung more than `seen` times.
    pub async fn after(&self, seen: u64) {
        poll_fn(|context| {
            // Looked at under the lock: who rings later takes the lock later, and finds who waits.
            let mut waiting = self.waiting.lock();
            if self.rings() != seen {
                return Poll::Ready(());
            }
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// Who is woken rings it.
impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

/// A value that one task at a time has for itself, also while it waits.
#[derive(Debug)]
pub struct Lock<T> {
    value: Mutex<Option<T>>,
    free: Bell,
}

impl<T> Lock<T> {
    /// Nobody has it.
    pub const fn new(value: T) -> Self {
        Self { value: Mutex::new(Some(value)), free: Bell::new() }
    }

    /// Waits until nobody else has it. Those who wait get it in no particular order.
    pub async fn lock(&self) -> Locked<'_, T> {
        loop {
            let seen = self.free.rings();
            if let Some(value) = self.value.lock().take() {
                return Locked { lock: self, value: Some(value) };
            }
            self.free.after(seen).await;
        }
    }

    /// Does something with the value if nobody has it.
    pub fn try_with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.value.lock().as_mut().map(work)
    }
}

/// A value that a task has for itself, until this is dropped.
#[derive(Debug)]
pub struct Locked<'a, T> {
    lock: &'a Lock<T>,
    /// There until the end.
    value: Option<T>,
}

impl<T> Deref for Locked<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        match &self.value {
            Some(value) => value,
            None => unreachable!("only dropping takes it"),
        }
    }
}

impl<T> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.value {
            Some(value) => value,
            None => unreachable!("only dropping takes it"),
        }
    }
}

impl<T> Drop for Locked<'_, T> {
    fn drop(&mut self) {
        *self.lock.value.lock() = self.value.take();
        self.lock.free.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::{Bell, Lock};
    use alloc::sync::Arc;
    use alloc::task::Wake;
    use core::future::Future;
    use core::pin::pin;
    use core::sync::atomic::{AtomicU64, Ordering};
    use core::task::{Context, Poll, Waker};

    #[test]
    fn a_bell_that_rang_before_is_heard() {
        let bell = Bell::new();
        let mut context = Context::from_waker(Waker::noop());
        let seen = bell.rings();
        let mut waits = pin!(bell.after(seen));
        assert!(waits.as_mut().poll(&mut context).is_pending());
        bell.ring();
        assert!(waits.as_mut().poll(&mut context).is_ready());
        assert!(pin!(bell.after(seen)).poll(&mut context).is_ready(), "it has rung since");
    }

    #[test]
    fn a_bell_is_rung_by_its_waker_and_wakes_each_once() {
        struct Count(AtomicU64);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let bell = Arc::new(Bell::new());
        let ringer = Waker::from(Arc::clone(&bell));
        let count = Arc::new(Count(AtomicU64::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        for round in 0..3 {
            let seen = bell.rings();
            let mut waits = pin!(bell.after(seen));
            assert!(waits.as_mut().poll(&mut context).is_pending());
            assert!(waits.as_mut().poll(&mut context).is_pending(), "looked at twice, it waits once");
            ringer.wake_by_ref();
            assert_eq!(count.0.load(Ordering::Relaxed), round + 1);
            ringer.wake_by_ref();
            assert_eq!(count.0.load(Ordering::Relaxed), round + 1, "nobody waits");
            assert!(waits.as_mut().poll(&mut context).is_ready());
            assert_eq!(bell.rings(), seen + 2);
        }
    }

    #[test]
    fn one_at_a_time_has_the_value() {
        let lock = Lock::new(1);
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(mut first) = pin!(lock.lock()).poll(&mut context) else { panic!("it is free") };
        *first += 1;
        let mut second = pin!(lock.lock());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(first);
        let Poll::Ready(value) = second.as_mut().poll(&mut context) else { panic!("it is free again") };
        assert_eq!(*value, 2);
    }
}

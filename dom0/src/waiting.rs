//! Waiting for more than one thing.

use alloc::vec::Vec;
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Poll, Waker};
use spin::Mutex;

/// Which of two futures came first.
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
pub struct Bell {
    rings: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl Bell {
    /// One that nobody waits for.
    pub const fn new() -> Self {
        Self { rings: AtomicU64::new(0), waiting: Mutex::new(Vec::new()) }
    }

    /// Wakes everybody.
    pub fn ring(&self) {
        self.rings.fetch_add(1, Ordering::AcqRel);
        let waiting = core::mem::take(&mut *self.waiting.lock());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// How often it rang: taken before looking, so that what changes after the look is not missed.
    pub fn rings(&self) -> u64 {
        self.rings.load(Ordering::Acquire)
    }

    /// Waits until it has rung more than `seen` times.
    pub async fn after(&self, seen: u64) {
        poll_fn(|context| {
            if self.rings() != seen {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.lock();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

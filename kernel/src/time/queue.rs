//! The timers of one CPU: an indexed heap with one entry per vCPU, so that re-arming is O(log n) and never allocates.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::domain::VcpuRef;
use crate::platform::CpuId;

/// What a queue needs of its items: a place to note where in the heap they are.
pub trait HeapItem {
    /// Where the heap keeps this item's position plus one; 0 means not in the heap.
    fn position(&self) -> &AtomicU32;
}

/// Timers of a vCPU. Times are nanoseconds since boot; 0 means not armed.
pub struct VcpuTimers {
    /// Single-shot timer.
    pub single_ns: AtomicU64,
    /// Next tick of the periodic timer.
    pub tick_ns: AtomicU64,
    /// Its period.
    pub period_ns: AtomicU64,
    /// End of a poll with timeout.
    pub poll_ns: AtomicU64,
    position: AtomicU32,
    /// The CPU in whose queue they are or will be; changed under the lock of the queue that it names.
    home: AtomicU32,
}

impl VcpuTimers {
    /// Nothing armed.
    pub const fn new() -> VcpuTimers {
        VcpuTimers {
            single_ns: AtomicU64::new(0),
            tick_ns: AtomicU64::new(0),
            period_ns: AtomicU64::new(0),
            poll_ns: AtomicU64::new(0),
            position: AtomicU32::new(0),
            home: AtomicU32::new(0),
        }
    }

    /// The CPU in whose queue they are.
    pub fn home(&self) -> CpuId {
        CpuId(self.home.load(Ordering::SeqCst))
    }

    /// They are in the queue of `cpu` from now on. The caller has taken them out of another, whose lock it still holds.
    pub fn set_home(&self, cpu: CpuId) {
        self.home.store(cpu.0, Ordering::SeqCst);
    }

    /// Disarms all.
    pub fn stop_all(&self) {
        for timer in [&self.single_ns, &self.tick_ns, &self.period_ns, &self.poll_ns] {
            timer.store(0, Ordering::Relaxed);
        }
    }

    /// The earliest time at which anything is due.
    pub fn earliest(&self) -> Option<u64> {
        [&self.single_ns, &self.tick_ns, &self.poll_ns]
            .into_iter()
            .map(|t| t.load(Ordering::Relaxed))
            .filter(|t| *t != 0)
            .min()
    }
}

impl Default for VcpuTimers {
    fn default() -> Self {
        VcpuTimers::new()
    }
}

impl HeapItem for VcpuRef {
    fn position(&self) -> &AtomicU32 {
        &self.timers.position
    }
}

/// Items by deadline, the earliest first; each at most once.
pub struct TimerQueue<T> {
    heap: Vec<(u64, T)>,
}

impl<T: HeapItem> TimerQueue<T> {
    /// No timers.
    pub const fn new() -> Self {
        TimerQueue { heap: Vec::new() }
    }

    /// Makes room for `total` items.
    pub fn reserve(&mut self, total: usize) {
        self.heap.reserve(total.saturating_sub(self.heap.len()));
    }

    /// The earliest deadline.
    pub fn first(&self) -> Option<u64> {
        self.heap.first().map(|(at, _)| *at)
    }

    /// Arms, moves or (`None`) disarms the timer of `item`.
    pub fn set(&mut self, item: T, deadline_ns: Option<u64>) {
        let position = item.position().load(Ordering::Relaxed) as usize;
        match (position.checked_sub(1).filter(|i| *i < self.heap.len()), deadline_ns) {
            (Some(i), Some(at)) => {
                self.heap[i].0 = at;
                self.settle(i);
            }
            (Some(i), None) => {
                self.take(i);
            }
            (None, Some(at)) => {
                self.heap.push((at, item));
                self.settle(self.heap.len() - 1);
            }
            (None, None) => {}
        }
    }

    /// Takes the first item if it is due at `now_ns`.
    pub fn pop_due(&mut self, now_ns: u64) -> Option<T> {
        if self.first()? > now_ns {
            return None;
        }
        Some(self.take(0))
    }

    fn take(&mut self, i: usize) -> T {
        let (_, item) = self.heap.swap_remove(i);
        item.position().store(0, Ordering::Relaxed);
        if i < self.heap.len() {
            self.settle(i);
        }
        item
    }

    /// Moves entry `i` to where it belongs and notes the positions of all that moved.
    fn settle(&mut self, mut i: usize) {
        while i > 0 && self.heap[i].0 < self.heap[(i - 1) / 2].0 {
            self.heap.swap(i, (i - 1) / 2);
            self.note(i);
            i = (i - 1) / 2;
        }
        loop {
            let mut least = i;
            for child in [2 * i + 1, 2 * i + 2] {
                if child < self.heap.len() && self.heap[child].0 < self.heap[least].0 {
                    least = child;
                }
            }
            if least == i {
                break;
            }
            self.heap.swap(i, least);
            self.note(i);
            i = least;
        }
        self.note(i);
    }

    fn note(&self, i: usize) {
        self.heap[i].1.position().store(i as u32 + 1, Ordering::Relaxed);
    }
}

impl<T: HeapItem> Default for TimerQueue<T> {
    fn default() -> Self {
        TimerQueue::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::rc::Rc;
    use proptest::prelude::*;

    struct Item {
        id: usize,
        position: AtomicU32,
    }
    impl HeapItem for Rc<Item> {
        fn position(&self) -> &AtomicU32 {
            &self.position
        }
    }

    proptest! {
        /// Against the naive model: a table of deadlines.
        #[test]
        fn behaves_as_a_table_of_deadlines(ops in prop::collection::vec((0usize..12, prop::option::of(1u64..100)), 1..300)) {
            let items: Vec<_> = (0..12).map(|id| Rc::new(Item { id, position: AtomicU32::new(0) })).collect();
            let mut queue = TimerQueue::new();
            let mut model = [None; 12];
            for (i, (who, at)) in ops.into_iter().enumerate() {
                queue.set(items[who].clone(), at);
                model[who] = at;
                prop_assert_eq!(queue.first(), model.iter().flatten().min().copied());
                if i % 7 == 0 {
                    while let Some(item) = queue.pop_due(40) {
                        prop_assert!(model[item.id].unwrap() <= 40);
                        prop_assert_eq!(model[item.id], model.iter().flatten().min().copied());
                        model[item.id] = None;
                    }
                    prop_assert!(model.iter().flatten().all(|at| *at > 40));
                }
            }
        }
    }
}

//! The fair queue: a priority queue of clocks that never allocates once reserved.

use alloc::collections::BinaryHeap;
use core::cmp::{Ordering, Reverse};

/// Waiting items, the one with the smallest virtual time first; first come, first served among equals.
pub struct FairQueue<T> {
    heap: BinaryHeap<Reverse<Waiting<T>>>,
    clock: u64,
    arrivals: u64,
}

struct Waiting<T> {
    virtual_ns: u64,
    arrival: u64,
    item: T,
}

impl<T> FairQueue<T> {
    /// An empty queue.
    pub const fn new() -> Self {
        FairQueue { heap: BinaryHeap::new(), clock: 0, arrivals: 0 }
    }

    /// Makes room for `total` items.
    pub fn reserve(&mut self, total: usize) {
        self.heap.reserve(total.saturating_sub(self.heap.len()));
    }

    /// Adds an item whose clock stands at `virtual_ns`.
    pub fn push(&mut self, virtual_ns: u64, item: T) {
        self.arrivals = self.arrivals.wrapping_add(1);
        self.heap.push(Reverse(Waiting { virtual_ns, arrival: self.arrivals, item }));
    }

    /// Takes the item that is furthest behind. The queue's clock moves up to it.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        let Reverse(first) = self.heap.pop()?;
        self.clock = self.clock.max(first.virtual_ns);
        Some((first.virtual_ns, first.item))
    }

    /// Takes the item furthest behind among those that `may` be taken. Costs a look at each item when the first may not.
    pub fn pop_where(&mut self, may: impl Fn(&T) -> bool) -> Option<(u64, T)> {
        if self.heap.peek().is_some_and(|Reverse(first)| may(&first.item)) {
            return self.pop();
        }
        // The heap's own memory is used again: nothing is allocated.
        let mut waiting = core::mem::take(&mut self.heap).into_vec();
        let best = (0..waiting.len())
            .filter(|index| waiting.get(*index).is_some_and(|Reverse(w)| may(&w.item)))
            .max_by(|a, b| waiting.get(*a).cmp(&waiting.get(*b)));
        let taken = best.map(|index| waiting.swap_remove(index));
        self.heap = BinaryHeap::from(waiting);
        taken.map(|Reverse(taken)| (taken.virtual_ns, taken.item))
    }

    /// The item that is next, and its virtual time.
    pub fn peek(&self) -> Option<(u64, &T)> {
        self.heap.peek().map(|Reverse(first)| (first.virtual_ns, &first.item))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }

    /// Virtual time of the item that is next.
    pub fn first(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse(w)| w.virtual_ns)
    }

    /// The queue's clock: the largest virtual time at which anybody was taken.
    pub fn clock(&self) -> u64 {
        self.clock
    }
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        FairQueue::new()
    }
}

impl<T> PartialEq for Waiting<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl<T> Eq for Waiting<T> {}
impl<T> PartialOrd for Waiting<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Waiting<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.virtual_ns, self.arrival).cmp(&(other.virtual_ns, other.arrival))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// Runs `weights.len()` spinners for `slices` slices and returns how long each ran.
    fn simulate(weights: &[u64], slices: u32) -> Vec<u64> {
        let mut queue = FairQueue::new();
        let mut ran = alloc::vec![0u64; weights.len()];
        for i in 0..weights.len() {
            queue.push(0, i);
        }
        for _ in 0..slices {
            let (at, who) = queue.pop().unwrap();
            ran[who] += 10;
            queue.push(at + 10_000_000 * 256 / weights[who], who);
        }
        ran
    }

    #[test]
    fn shares_follow_weights() {
        let weights = [1, 2, 3, 4, 5, 6, 7, 8].map(|w| w * 64);
        let ran = simulate(&weights, 36_000);
        let total: u64 = ran.iter().sum();
        for (w, r) in weights.iter().zip(&ran) {
            let due = total * w / weights.iter().sum::<u64>();
            assert!(r.abs_diff(due) * 50 <= due, "weight {w} ran {r}, due {due}");
        }
    }

    #[test]
    fn the_first_that_may_be_taken_is() {
        let mut queue = FairQueue::new();
        for (at, who) in [(5, 'e'), (1, 'a'), (3, 'c'), (2, 'b'), (3, 'd')] {
            queue.push(at, who);
        }
        assert_eq!(queue.pop_where(|who| *who > 'b'), Some((3, 'c')));
        assert_eq!(queue.pop_where(|who| *who > 'x'), None);
        assert_eq!(queue.pop_where(|_| true), Some((1, 'a')));
        assert_eq!(queue.peek(), Some((2, &'b')));
        assert_eq!(queue.len(), 3);
    }

    #[test]
    fn taking_never_gives_memory_back() {
        let mut queue = FairQueue::new();
        queue.reserve(64);
        let before = queue.heap.capacity();
        for i in 0..64 {
            queue.push(i, i);
        }
        queue.pop_where(|i| *i == 40);
        assert_eq!(queue.heap.capacity(), before);
    }

    #[test]
    fn equals_take_turns() {
        let ran = simulate(&[256; 4], 400);
        assert!(ran.iter().all(|r| *r == 1000));
    }
}

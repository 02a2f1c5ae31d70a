//! The timers of one CPU: an indexed heap with one entry per vCPU, so that re-arming is O(log n) and never allocates.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::entry;
use crate::domain::VcpuRef;
use crate::platform::CpuId;
use crate::sync::{RankedMutex, atomic as modelled, rank};

/// What a queue needs of its items: a place to note where in the heap they are.
pub trait HeapItem {
    /// Where the heap keeps this item's position plus one; 0 means not in the heap.
    fn position(&self) -> &AtomicU32;
    /// When the item is due in its queue; 0 while it is in none (see [`entry`]).
    fn due(&self) -> &modelled::AtomicU64;
}

/// Period of the ticks that a new vCPU gets until it says otherwise, as on Xen.
const FIRST_PERIOD_NS: u64 = 10_000_000;

/// The periodic timer of a vCPU. It ticks from when it is set, and stops when the vCPU leaves its CPU: one that sleeps is not woken
/// for it, unless another vCPU sets it meanwhile, as on Xen. When it runs again after a period or more, one tick stands for all
/// that were missed.
pub struct Periodic {
    /// 0 for off.
    period_ns: u64,
    /// When the latest tick was.
    last_ns: u64,
    /// It has been set, or the vCPU put on a CPU, since the vCPU left one.
    ticks: bool,
}

impl Periodic {
    /// As a vCPU is made.
    const fn new() -> Periodic {
        Periodic { period_ns: FIRST_PERIOD_NS, last_ns: 0, ticks: false }
    }

    /// Sets the period, 0 for no ticks. The next tick is due a period after the latest one, however long ago that was.
    pub fn set_period(&mut self, period_ns: u64) {
        self.period_ns = period_ns;
    }

    /// Lets it tick or not. Returns whether there are ticks to arm or disarm for that.
    pub fn set_ticking(&mut self, ticks: bool) -> bool {
        self.ticks = ticks;
        self.period_ns != 0
    }

    /// When the next tick is due.
    pub fn next_ns(&self) -> Option<u64> {
        (self.ticks && self.period_ns != 0).then(|| self.last_ns.saturating_add(self.period_ns))
    }

    /// Takes the tick that is due at `now_ns`; false when there is none.
    pub fn take(&mut self, now_ns: u64) -> bool {
        let due = self.next_ns().is_some_and(|next| next <= now_ns);
        if due {
            self.last_ns = now_ns;
        }
        due
    }
}

/// Timers of a vCPU. Times are nanoseconds since boot; 0 means not armed.
pub struct VcpuTimers {
    /// Single-shot timer.
    pub single_ns: AtomicU64,
    /// Periodic timer.
    pub periodic: RankedMutex<Periodic, { rank::PERIODIC }>,
    /// End of a poll with timeout.
    pub poll_ns: AtomicU64,
    /// Whether `periodic` has a period: written under its lock, for those who only ask whether there is something to do.
    has_period: AtomicBool,
    position: AtomicU32,
    due: modelled::AtomicU64,
    /// The CPU in whose queue they are or will be; changed under the lock of the queue that it names.
    home: AtomicU32,
}

impl VcpuTimers {
    /// Nothing armed.
    pub fn new() -> VcpuTimers {
        VcpuTimers {
            single_ns: AtomicU64::new(0),
            periodic: RankedMutex::new(Periodic::new()),
            poll_ns: AtomicU64::new(0),
            has_period: AtomicBool::new(true),
            position: AtomicU32::new(0),
            due: modelled::AtomicU64::new(0),
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

    /// Sets the period of the periodic timer, 0 for no ticks.
    pub fn set_period(&self, period_ns: u64) {
        let mut periodic = self.periodic.lock();
        periodic.set_period(period_ns);
        self.has_period.store(period_ns != 0, Ordering::SeqCst);
    }

    /// Whether the periodic timer has a period. One that is set meanwhile ticks from then on, whatever this says.
    pub fn has_period(&self) -> bool {
        self.has_period.load(Ordering::SeqCst)
    }

    /// Whether a deadline that has just been stored, 0 for none, is seen to in time without a change of the queue.
    pub fn sees_to(&self, deadline_ns: u64) -> bool {
        entry::suffices(&self.due, deadline_ns)
    }

    /// Disarms all.
    pub fn stop_all(&self) {
        for timer in [&self.single_ns, &self.poll_ns] {
            timer.store(0, Ordering::SeqCst);
        }
        self.set_period(0);
    }

    /// The earliest time at which anything is due.
    pub fn earliest(&self) -> Option<u64> {
        [&self.single_ns, &self.poll_ns]
            .into_iter()
            .map(|t| t.load(Ordering::SeqCst))
            .filter(|t| *t != 0)
            .chain(if self.has_period() { self.periodic.lock().next_ns() } else { None })
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
    fn due(&self) -> &modelled::AtomicU64 {
        &self.timers.due
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

    /// Arms, moves or disarms the timer of `item`, as `deadline_ns` says when it is asked.
    pub fn set(&mut self, item: &T, deadline_ns: impl FnOnce() -> Option<u64>)
    where
        T: Clone,
    {
        entry::lift(item.due());
        let deadline_ns = deadline_ns();
        entry::enter(item.due(), deadline_ns.unwrap_or(0));
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
                self.heap.push((at, item.clone()));
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
        entry::lift(item.due());
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

    #[test]
    fn ticks_come_while_it_runs_and_are_not_made_up_for() {
        let mut periodic = Periodic::new();
        assert_eq!(periodic.next_ns(), None, "a vCPU that never ran");
        assert!(periodic.set_ticking(true));
        assert!(periodic.take(25_000_000) && !periodic.take(25_000_000));
        assert_eq!(periodic.next_ns(), Some(35_000_000));
        periodic.set_ticking(false);
        assert!(!periodic.take(90_000_000));
        periodic.set_ticking(true);
        assert!(periodic.take(90_000_000) && !periodic.take(99_999_999) && periodic.take(100_000_000));
        periodic.set_period(50_000_000);
        assert_eq!(periodic.next_ns(), Some(150_000_000), "counted from the latest tick");
        periodic.set_period(0);
        assert!(!periodic.take(u64::MAX) && !periodic.set_ticking(false));
    }

    struct Item {
        id: usize,
        position: AtomicU32,
        due: modelled::AtomicU64,
    }
    impl HeapItem for Rc<Item> {
        fn position(&self) -> &AtomicU32 {
            &self.position
        }
        fn due(&self) -> &modelled::AtomicU64 {
            &self.due
        }
    }

    proptest! {
        /// Against the naive model: a table of deadlines.
        #[test]
        fn behaves_as_a_table_of_deadlines(ops in prop::collection::vec((0usize..12, prop::option::of(1u64..100)), 1..300)) {
            let items: Vec<_> = (0..12).map(|id| Rc::new(Item { id, position: AtomicU32::new(0), due: modelled::AtomicU64::new(0) })).collect();
            let mut queue = TimerQueue::new();
            let mut model = [None; 12];
            for (i, (who, at)) in ops.into_iter().enumerate() {
                queue.set(&items[who], || at);
                model[who] = at;
                let due = |item: &Rc<Item>| Some(item.due.load(Ordering::Relaxed)).filter(|at| *at != 0);
                prop_assert!(items.iter().map(due).eq(model));
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

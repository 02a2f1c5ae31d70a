//! The due time of a vCPU's entry in a timer queue, and when a new deadline may leave the entry as it is.
//!
//! An entry is due at the earliest deadline of its vCPU, or before: one that is due too early finds nothing to do and is entered anew. So
//! who sets or stops a timer has nothing to do in the queue, and takes no lock, unless the entry comes too late:
//!
//! | who sets a deadline | who takes the entry out or moves it, under the queue's lock |
//! |---|---|
//! | 1. store the deadline | 1. say that there is no entry ([`lift`]) |
//! | 2. is there an entry that is due by then ([`suffices`])? | 2. look at all deadlines |
//! | 3. if not: take the lock, and do as the other | 3. enter the earliest of them ([`enter`]) |
//!
//! Each stores first and looks then, so one of them sees the other: a deadline that was overlooked in 2 finds no entry, or one that
//! has been made since and says when it is due.

use crate::sync::atomic::{AtomicU64, Ordering};

/// Whether something due at `deadline_ns` (0: nothing) is seen to in time by the entry as it is.
pub fn suffices(entry: &AtomicU64, deadline_ns: u64) -> bool {
    if deadline_ns == 0 {
        return true;
    }
    let due = entry.load(Ordering::SeqCst);
    due != 0 && due <= deadline_ns
}

/// There is no entry from here on. Under the lock of the queue that it was in, before its vCPU's deadlines are looked at.
pub fn lift(entry: &AtomicU64) {
    entry.store(0, Ordering::SeqCst);
}

/// The entry is due at `at_ns`. Under the lock of its queue.
pub fn enter(entry: &AtomicU64, at_ns: u64) {
    entry.store(at_ns, Ordering::Release);
}

#[cfg(all(loom, test))]
mod models {
    use super::*;
    use crate::sync::atomic::model::needed;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    /// A vCPU's two deadlines, and its entry.
    struct World {
        deadlines: [AtomicU64; 2],
        entry: AtomicU64,
        /// What is in the queue. The lock is the queue's.
        queue: Mutex<u64>,
    }

    impl World {
        fn enter_anew(&self) {
            let mut queue = self.queue.lock().unwrap();
            lift(&self.entry);
            let due = self.deadlines.each_ref().map(|at| at.load(Ordering::SeqCst));
            *queue = due.into_iter().filter(|at| *at != 0).min().unwrap_or(0);
            enter(&self.entry, *queue);
        }
        fn set(&self, deadline: u64) {
            self.deadlines[0].store(deadline, Ordering::SeqCst);
            if !suffices(&self.entry, deadline) {
                self.enter_anew();
            }
        }
    }

    #[test]
    fn no_deadline_is_missed() {
        let needed = needed("entry.rs", include_str!("entry.rs"), || {
            let world = Arc::new(World {
                deadlines: [AtomicU64::new(0), AtomicU64::new(9)],
                entry: AtomicU64::new(2),
                queue: Mutex::new(2),
            });
            let other = {
                let world = world.clone();
                // The entry is due, or another of its deadlines has changed.
                thread::spawn(move || world.enter_anew())
            };
            world.set(4);
            other.join().unwrap();
            let queued = *world.queue.lock().unwrap();
            assert!(queued != 0 && queued <= 4, "due at {queued}");
        });
        // The second is what a hypercall that sets a timer does first.
        assert_eq!(
            needed,
            ["entry.store(0, Ordering::SeqCst);", "self.deadlines[0].store(deadline, Ordering::SeqCst);"]
        );
    }
}

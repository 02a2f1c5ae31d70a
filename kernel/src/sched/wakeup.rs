//! How a vCPU goes to sleep and is woken, without a wake-up lost.
//!
//! Three parties: the vCPU that waits for an event, the CPU that runs it, and a sender on another CPU. The steps that matter:
//!
//! | the vCPU, in its hypercall | its CPU, on the way back | the sender |
//! |---|---|---|
//! | 1. say that it waits ([`sleep`]) | 1. does it wait? else look for events and resume | 1. raise the event |
//! | 2. has the event come? then it does not | 2. put it off: *under the queue's lock* it runs no more; | 2. end its wait ([`end_sleep`]) |
//! | | does it wait still? else queue it ([`stop_running`]) | 3. if it waited: *under the lock*, if it does not run, queue it |
//! | | 3. take it from the queue, it runs ([`start_running`]) | 4. if it runs: interrupt its CPU ([`runs`]) |
//! | | 4. look for events, and resume | |
//!
//! - The vCPU's 1 and 2 against the sender's 1 and 2: each stores first and looks then, so one of them sees the other.
//! - Between the lock's holders it is clear who came first: a sender who finds it running leaves it to its CPU, which looks at `blocked`
//!   after that; one who finds that it does not run queues it.
//! - The CPU's 3 and 4 against the sender's 1 and 4: again stores and looks. An event that the CPU has not seen brings an interrupt, which it
//!   takes as soon as it has resumed the guest.
//!
//! `models` runs these functions under every order that the memory model allows, and says which accesses need theirs.

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Makes a vCPU wait, for the reasons in `why`, unless what it waits for `has_come`. That is looked at after the vCPU counts as
/// waiting, so whoever brings it later ends the wait. `Ok(false)`: it waits.
pub fn sleep<E>(
    blocked: &AtomicU32,
    why: u32,
    has_come: impl FnOnce() -> Result<bool, E>,
) -> Result<bool, E> {
    blocked.fetch_or(why, Ordering::SeqCst);
    let come = has_come();
    if !matches!(come, Ok(false)) {
        blocked.fetch_and(!why, Ordering::SeqCst);
    }
    come
}

/// Ends a vCPU's wait for the reasons in `why`, after what it waits for has come. For what it did wait, before.
pub fn end_sleep(blocked: &AtomicU32, why: u32) -> u32 {
    blocked.fetch_and(!why, Ordering::SeqCst)
}

/// A CPU has taken a vCPU from a queue and is going to run it. Under the queue's lock.
pub fn start_running(running: &AtomicBool) {
    running.store(true, Ordering::SeqCst);
}

/// A CPU has put a vCPU off. Under the lock of the queue in which it is to wait if it `may_run`, which is asked after whoever wakes it has
/// had the lock or finds that it does not run. Whether it may.
pub fn stop_running(running: &AtomicBool, may_run: impl FnOnce() -> bool) -> bool {
    running.store(false, Ordering::SeqCst);
    may_run()
}

/// Whether a CPU runs the vCPU, or is about to and may have looked for its events already. The caller has stored what it is to look at.
pub fn runs(running: &AtomicBool) -> bool {
    running.load(Ordering::SeqCst)
}

#[cfg(all(loom, test))]
mod models {
    use super::*;
    use crate::sync::atomic::model::needed;
    use alloc::string::String;
    use alloc::vec::Vec;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    const WAITS: u32 = 1;

    /// A vCPU, its CPU's queue, and one event for it.
    struct World {
        event: AtomicU32,
        blocked: AtomicU32,
        running: AtomicBool,
        /// It is in the queue. The lock is the queue's.
        queue: Mutex<bool>,
        /// The CPU has an interrupt to take.
        interrupt: AtomicBool,
    }

    impl World {
        fn new(blocked: u32, running: bool, queued: bool) -> Arc<World> {
            Arc::new(World {
                event: AtomicU32::new(0),
                blocked: AtomicU32::new(blocked),
                running: AtomicBool::new(running),
                queue: Mutex::new(queued),
                interrupt: AtomicBool::new(false),
            })
        }
        /// As `evtchn::ops::notify`, `unblock` and `wake`.
        fn send(&self) {
            self.event.fetch_or(1, Ordering::SeqCst);
            if end_sleep(&self.blocked, WAITS) != 0 {
                let mut queued = self.queue.lock().unwrap();
                if !self.running.load(Ordering::Relaxed) {
                    *queued = true;
                }
            }
            if runs(&self.running) {
                self.interrupt.store(true, Ordering::SeqCst);
            }
        }
        /// As `block_vcpu`.
        fn block(&self) {
            let _ = sleep(&self.blocked, WAITS, || Ok::<_, ()>(self.event.load(Ordering::SeqCst) != 0));
        }
        fn waits(&self) -> bool {
            self.blocked.load(Ordering::SeqCst) != 0
        }
        /// As `park`.
        fn put_off(&self) {
            let mut queued = self.queue.lock().unwrap();
            if stop_running(&self.running, || !self.waits()) {
                *queued = true;
            }
        }
        /// As `pop_and_mark`; whether there was somebody.
        fn put_on(&self) -> bool {
            let mut queued = self.queue.lock().unwrap();
            let there = core::mem::take(&mut *queued);
            if there {
                start_running(&self.running);
            }
            there
        }
        /// The last look before the guest resumes, as `deliver_pending`.
        fn delivers(&self) -> bool {
            self.event.load(Ordering::SeqCst) != 0
        }
    }

    /// One CPU sends, the other does `life`, which says whether the vCPU has seen the event. Whether it will.
    fn beside(world: fn() -> Arc<World>, life: fn(&World) -> bool) {
        let world = world();
        let sender = {
            let world = world.clone();
            thread::spawn(move || world.send())
        };
        let seen = life(&world);
        sender.join().unwrap();
        let runs = world.running.load(Ordering::SeqCst);
        let comes = *world.queue.lock().unwrap() || runs && world.interrupt.load(Ordering::SeqCst);
        assert!(seen || comes, "the vCPU sleeps, or runs, and nobody tells it");
        assert!(!(runs && *world.queue.lock().unwrap()), "it runs and waits in a queue");
    }

    fn needed_for(model: fn()) -> Vec<String> {
        needed("wakeup.rs", include_str!("wakeup.rs").split("mod models").next().unwrap(), model)
    }

    #[test]
    fn a_vcpu_that_falls_asleep_is_woken_or_does_not() {
        let needed = needed_for(|| {
            beside(
                || World::new(0, true, false),
                |world| {
                    world.block();
                    if !world.waits() {
                        return world.delivers();
                    }
                    world.put_off();
                    world.put_on() && world.delivers()
                },
            );
        });
        assert_eq!(needed, ["blocked.fetch_or(why, Ordering::SeqCst);"]);
    }

    #[test]
    fn a_vcpu_that_is_put_on_sees_the_event_or_is_interrupted() {
        let needed = needed_for(|| {
            beside(|| World::new(0, false, true), |world| world.put_on() && world.delivers());
        });
        assert_eq!(needed, ["running.store(true, Ordering::SeqCst);"]);
    }
}

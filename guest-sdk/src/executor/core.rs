//! The executor itself: a run queue, a timer queue, and tasks that are their own wakers. It knows nothing of hypercalls, so
//! it runs on the host in tests.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::task::Wake;
use core::cell::RefCell;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::task::{Context, Poll, Waker};
use spin::Mutex;

/// What the executor needs from the machine.
pub trait Platform {
    /// Nanoseconds of a clock that never goes back.
    fn now_ns(&self) -> u64;

    /// Takes what has happened (wakers are called), and if `until_ns` has not come and `ready` says that nothing became
    /// runnable, sleeps until something happens or the time has come; `None` means that there is no time to wait for.
    ///
    /// May return early. What happens between the look at `ready` and the sleep must end the sleep.
    fn idle(&self, until_ns: Option<u64>, ready: &dyn Fn() -> bool);

    /// Takes what has happened without sleeping.
    fn turn(&self);
}

type Body = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Task {
    // None once the body has run to its end. Only the executor locks it, so the lock is never contended.
    body: Mutex<Option<Body>>,
    queued: AtomicBool,
    queue: Arc<RunQueue>,
}

struct RunQueue {
    ready: Mutex<VecDeque<Arc<Task>>>,
    live: AtomicU64,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        // A task that is queued already will see whatever it was woken for when it runs.
        if !self.queued.swap(true, Ordering::AcqRel) {
            let queue = Arc::clone(&self.queue);
            queue.ready.lock().push_back(self);
        }
    }
}

/// Starts tasks on an executor from anywhere, also from inside a task.
#[derive(Clone)]
pub struct Spawner {
    queue: Arc<RunQueue>,
}

impl Spawner {
    /// Starts a task; it runs when the executor next turns.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.queue.live.fetch_add(1, Ordering::Relaxed);
        let task = Arc::new(Task {
            body: Mutex::new(Some(Box::pin(future))),
            queued: AtomicBool::new(false),
            queue: Arc::clone(&self.queue),
        });
        task.wake();
    }
}

/// Runs tasks on one vCPU.
pub struct Executor<P> {
    platform: P,
    queue: Arc<RunQueue>,
}

impl<P: Platform> Executor<P> {
    /// An executor without tasks.
    pub fn new(platform: P) -> Self {
        let queue = Arc::new(RunQueue { ready: Mutex::new(VecDeque::new()), live: AtomicU64::new(0) });
        Self { platform, queue }
    }

    /// The handle that starts tasks.
    #[must_use]
    pub fn spawner(&self) -> Spawner {
        Spawner { queue: Arc::clone(&self.queue) }
    }

    /// Nobody is in the middle of changing what is to run.
    pub(crate) fn is_intact(&self) -> bool {
        !self.queue.ready.is_locked() && timers::is_intact()
    }

    /// Starts a task; it runs when the executor next turns.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.spawner().spawn(future);
    }

    /// Runs until no task is left.
    pub fn run(&self) {
        self.drive(|| self.queue.live.load(Ordering::Relaxed) == 0);
    }

    /// Runs a future to its end, and the other tasks beside it.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let root = Arc::new(Root { woken: AtomicBool::new(true) });
        let waker = Waker::from(Arc::clone(&root));
        let mut context = Context::from_waker(&waker);
        let mut future = core::pin::pin!(future);
        let result = RefCell::new(None);
        let turn = || {
            if root.woken.swap(false, Ordering::AcqRel)
                && let Poll::Ready(value) = future.as_mut().poll(&mut context)
            {
                result.replace(Some(value));
            }
        };
        self.drive_with(turn, || root.woken.load(Ordering::Acquire), || result.borrow().is_some());
        match result.into_inner() {
            Some(value) => value,
            None => unreachable!("the loop ends only with a result"),
        }
    }

    fn drive(&self, done: impl Fn() -> bool) {
        self.drive_with(|| {}, || false, done);
    }

    fn drive_with(&self, mut extra: impl FnMut(), extra_ready: impl Fn() -> bool, done: impl Fn() -> bool) {
        loop {
            extra();
            // As many tasks as are ready now; those they wake wait for the next round, so that events get their turn.
            let ready = self.queue.ready.lock().len();
            for _ in 0..ready {
                let Some(task) = self.queue.ready.lock().pop_front() else { break };
                self.poll(&task);
            }
            if done() {
                return;
            }
            let pending = || extra_ready() || !self.queue.ready.lock().is_empty();
            // Nobody needs the time who waits for none.
            let until_ns = timers::next().and_then(|first| {
                let now_ns = self.platform.now_ns();
                if first > now_ns {
                    return Some(first);
                }
                timers::fire(now_ns);
                timers::next()
            });
            if pending() {
                self.platform.turn();
            } else {
                self.platform.idle(until_ns, &pending);
            }
        }
    }

    fn poll(&self, task: &Arc<Task>) {
        // Before the poll: a wake-up during the poll queues the task again.
        task.queued.store(false, Ordering::Release);
        let waker = Waker::from(Arc::clone(task));
        let mut body = task.body.lock();
        let Some(future) = body.as_mut() else { return };
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            *body = None;
            self.queue.live.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

struct Root {
    woken: AtomicBool,
}

impl Wake for Root {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
    }
}

/// Who waits for which time.
pub(crate) mod timers {
    use super::{AtomicU64, BTreeMap, Mutex, Ordering, Waker};

    static TIMERS: Mutex<BTreeMap<(u64, u64), Waker>> = Mutex::new(BTreeMap::new());
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);

    /// Nobody is in the middle of changing who waits.
    pub fn is_intact() -> bool {
        !TIMERS.is_locked()
    }

    /// Wakes `waker` at `deadline_ns`; the result takes the entry back.
    pub fn add(deadline_ns: u64, waker: Waker) -> (u64, u64) {
        let key = (deadline_ns, NEXT_ID.fetch_add(1, Ordering::Relaxed));
        TIMERS.lock().insert(key, waker);
        key
    }

    /// Whether an entry is there, and wakes `waker`.
    pub fn wakes(key: (u64, u64), waker: &Waker) -> bool {
        TIMERS.lock().get(&key).is_some_and(|there| there.will_wake(waker))
    }

    /// Forgets an entry.
    pub fn remove(key: (u64, u64)) {
        TIMERS.lock().remove(&key);
    }

    /// Wakes everybody whose time has come.
    pub fn fire(now_ns: u64) {
        loop {
            let first = {
                let mut timers = TIMERS.lock();
                match timers.first_key_value() {
                    Some((key, _)) if key.0 <= now_ns => timers.pop_first(),
                    _ => return,
                }
            };
            // Outside the lock: a waker may do anything.
            if let Some((_, waker)) = first {
                waker.wake();
            }
        }
    }

    /// The earliest time anybody waits for.
    pub fn next() -> Option<u64> {
        TIMERS.lock().first_key_value().map(|(key, _)| key.0)
    }
}

/// Ends when the clock has reached a deadline.
pub struct Sleep<C> {
    deadline_ns: u64,
    now_ns: C,
    entry: Option<(u64, u64)>,
}

impl<C: Fn() -> u64 + Unpin> Sleep<C> {
    /// Waits until `now_ns` gives `deadline_ns` or more.
    pub(crate) fn new(deadline_ns: u64, now_ns: C) -> Self {
        Self { deadline_ns, now_ns, entry: None }
    }
}

impl<C: Fn() -> u64 + Unpin> Future for Sleep<C> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // The end of time never comes.
        if self.deadline_ns == u64::MAX {
            return Poll::Pending;
        }
        if (self.now_ns)() >= self.deadline_ns {
            return Poll::Ready(());
        }
        if !self.entry.is_some_and(|entry| timers::wakes(entry, context.waker())) {
            let entry = timers::add(self.deadline_ns, context.waker().clone());
            if let Some(before) = self.entry.replace(entry) {
                timers::remove(before);
            }
        }
        Poll::Pending
    }
}

impl<C> Drop for Sleep<C> {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            timers::remove(entry);
        }
    }
}

/// Lets the other tasks run once.
pub async fn yield_now() {
    let mut yielded = false;
    core::future::poll_fn(|context| {
        if core::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::{Executor, Platform, Sleep, yield_now};
    use alloc::sync::Arc;
    use alloc::vec::Vec;
    use core::sync::atomic::{AtomicU64, Ordering};
    use core::task::Waker;
    use spin::Mutex;

    /// A clock that jumps to whatever is waited for; an event channel that fires when the executor goes idle.
    #[derive(Clone, Default)]
    struct Host {
        clock: Arc<AtomicU64>,
        on_idle: Arc<Mutex<Vec<Waker>>>,
        slept: Arc<AtomicU64>,
    }

    impl Platform for Host {
        fn now_ns(&self) -> u64 {
            self.clock.load(Ordering::Relaxed)
        }
        fn idle(&self, until_ns: Option<u64>, ready: &dyn Fn() -> bool) {
            self.turn();
            if ready() {
                return;
            }
            let until = until_ns.expect("asleep for ever: nothing runnable, no timer, no event");
            self.slept.fetch_add(1, Ordering::Relaxed);
            self.clock.fetch_max(until, Ordering::Relaxed);
        }
        fn turn(&self) {
            let woken = core::mem::take(&mut *self.on_idle.lock());
            woken.into_iter().for_each(Waker::wake);
        }
    }

    impl Host {
        fn sleep(&self, deadline: u64) -> impl Future<Output = ()> + Send + use<> {
            let clock = Arc::clone(&self.clock);
            Sleep::new(deadline, move || clock.load(Ordering::Relaxed))
        }
        fn event(&self) -> impl Future<Output = ()> + Send + use<> {
            let waiting = Arc::clone(&self.on_idle);
            let mut asked = false;
            core::future::poll_fn(move |context| {
                if core::mem::replace(&mut asked, true) {
                    return core::task::Poll::Ready(());
                }
                waiting.lock().push(context.waker().clone());
                core::task::Poll::Pending
            })
        }
    }

    // One test: the timer queue is one per program.
    #[test]
    fn tasks_sleep_wake_and_end() {
        let host = Host::default();
        let executor = Executor::new(host.clone());
        let log = Arc::new(Mutex::new(Vec::new()));
        for (name, deadline) in [("late", 300), ("early", 100), ("middle", 200)] {
            let (log, sleep) = (Arc::clone(&log), host.sleep(deadline));
            executor.spawn(async move {
                sleep.await;
                log.lock().push(name);
            });
        }
        let (waits, spawner) = (host.event(), executor.spawner());
        let inner = Arc::clone(&log);
        executor.spawn(async move {
            waits.await;
            inner.lock().push("event");
            let deeper = Arc::clone(&inner);
            spawner.spawn(async move { deeper.lock().push("spawned by a task") });
            yield_now().await;
            inner.lock().push("after the yield");
        });
        executor.run();
        assert_eq!(*log.lock(), ["event", "spawned by a task", "after the yield", "early", "middle", "late"]);
        assert_eq!((host.slept.load(Ordering::Relaxed), host.now_ns()), (3, 300));

        // block_on drives the others too, and a dropped sleep wakes nobody.
        let forgotten = host.sleep(10_000);
        let ticker = host.clone();
        let ticks = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&ticks);
        executor.spawn(async move {
            for _ in 0..5 {
                ticker.sleep(ticker.now_ns() + 10).await;
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let answer = executor.block_on(async {
            drop(forgotten);
            host.sleep(1_000).await;
            42
        });
        assert_eq!((answer, ticks.load(Ordering::Relaxed), host.now_ns()), (42, 5, 1_000));
        assert_eq!(super::timers::next(), None);
    }
}

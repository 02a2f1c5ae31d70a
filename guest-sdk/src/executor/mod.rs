//! Tasks on one vCPU: a small executor that sleeps in the block hypercall and is woken by event channels and timers.
//!
//! ```ignore
//! #[entry]
//! async fn main(_domain: Domain) {
//!     executor::spawn(async { loop { time::after(Duration::from_secs(1)).await; println!("tick"); } });
//!     time::after(Duration::from_secs(10)).await;
//! }
//! ```

mod core;

pub use self::core::{Executor, Platform, Sleep, Spawner, yield_now};

use spin::Once;

/// The machine as the executor sees it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pv;

impl Platform for Pv {
    fn now_ns(&self) -> u64 {
        crate::time::now_ns()
    }

    fn idle(&self, until_ns: Option<u64>, ready: &dyn Fn() -> bool) {
        crate::events::turn();
        // What comes after this look is pending when the block hypercall looks, and ends it at once.
        if !ready() {
            crate::events::idle_until(until_ns);
        }
    }

    fn turn(&self) {
        crate::events::turn();
    }
}

static EXECUTOR: Once<Executor<Pv>> = Once::new();

fn executor() -> &'static Executor<Pv> {
    EXECUTOR.call_once(|| Executor::new(Pv))
}

/// Nobody is in the middle of changing what is to run.
pub(crate) fn is_intact() -> bool {
    EXECUTOR.get().is_none_or(Executor::is_intact)
}

/// Starts a task on the domain's executor.
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    executor().spawn(future);
}

/// Runs a future to its end, and all spawned tasks beside it. `#[entry]` on an async function does this with `main`.
pub fn block_on<F: Future>(future: F) -> F::Output {
    executor().block_on(future)
}

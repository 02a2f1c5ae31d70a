//! Time as guests see it: clocks, timers, and where a vCPU's time went.
#![forbid(unsafe_code)]

mod areas;
mod entry;
mod pvclock;
mod queue;
mod runstate;

pub use queue::{Periodic, TimerQueue, VcpuTimers};
pub use runstate::{RunState, RunStateKind};

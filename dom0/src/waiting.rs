//! Waiting for more than one thing.

pub use guest_sdk::sync::{Bell, First, first};

//! Protocols between domains: rings in shared pages, and how the two ends find each other (public/io).
//!
//! Everything in a shared page may change at any time: read a field once, check the copy, use the copy. Only layouts and index
//! arithmetic are here; who holds the page does the loads and stores, with the ordering that each type states.

pub mod blkif;
pub mod console;
pub mod netif;
pub mod ring;
pub mod xenbus;
pub mod xenstore;

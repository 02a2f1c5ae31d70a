//! x86-64: boot, entry, page tables, processor state and the few devices ring 0 needs.

pub mod boot;
pub mod cpu;
pub mod entry;
pub mod epitaph;
pub mod paging;
pub mod percpu;
pub mod serial;
pub mod tables;

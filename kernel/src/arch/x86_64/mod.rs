//! x86-64: boot, entry, page tables, processor state and the few devices ring 0 needs.

pub mod apic;
pub mod boot;
pub mod clock;
pub mod context;
pub mod cpu;
pub mod entry;
pub mod epitaph;
pub mod fpu;
pub mod hpet;
pub mod interrupts;
pub mod ioapic;
pub mod machine;
pub mod msr;
pub mod paging;
pub mod percpu;
pub mod pit;
pub mod power;
pub mod serial;
pub mod tables;
pub mod usercopy;

//! Facts and pure decisions of the x86 machine: layouts, firmware tables, arithmetic. Nothing here touches the machine, so
//! all of it runs in host tests; `arch::x86_64` in the binary acts on what these functions decide.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod apic_timer;
pub mod clock;
pub mod clocksource;
pub mod exit;
pub mod layout;
pub mod phys;
pub mod ranges;
pub mod start_info;

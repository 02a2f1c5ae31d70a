//! What happens when a guest traps: its own exceptions are bounced to it, a few privileged instructions are carried out
//! for it.
#![forbid(unsafe_code)]

pub mod bounce;
#[cfg(any(feature = "constant-answers", test))]
pub(crate) mod constant_answers;
pub mod cpuid;
pub mod debug;
pub mod decode;
mod deliver;
pub mod descriptor;
mod emulate;
mod entry;
mod memory;
pub mod msr;
mod ports;

#[cfg(test)]
mod tests;

//! What happens when a guest traps: its own exceptions are bounced to it, a few privileged instructions are carried out
//! for it.
#![forbid(unsafe_code)]

pub mod decode;
mod entry;

//! What several examples share: both ends of the pipe.
#![no_std]

extern crate alloc;

pub mod pipe;

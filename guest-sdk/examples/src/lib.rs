//! What several examples share: both ends of the pipe, a host on a network, requests of a web server, the end of their work.
#![no_std]

extern crate alloc;

pub mod asked;
pub mod host;
pub mod http;
pub mod pipe;

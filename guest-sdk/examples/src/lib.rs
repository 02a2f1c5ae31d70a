//! What several examples share: both ends of the pipe, a host on a network, requests of a web server.
#![no_std]

extern crate alloc;

pub mod host;
pub mod http;
pub mod pipe;

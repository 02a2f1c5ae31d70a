//! Both ends of the pipe in one domain, for a machine with one guest. Words: `seconds=` (default 5), `buffers=`.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::sync::Arc;
use guest_examples::pipe;
use guest_sdk::grants::GrantError;
use guest_sdk::{Domain, entry, executor, println};

#[entry]
async fn main(domain: Domain) -> Result<(), GrantError> {
    let domain = Arc::new(domain);
    let other = Arc::clone(&domain);
    executor::spawn(async move {
        let ended = pipe::consume(&other.events, &other.grants, other.id()).await;
        println!("consumer: {ended:?}");
    });
    let line = domain.command_line;
    let seconds = line.number("seconds").unwrap_or(5);
    let buffers = line.number("buffers").unwrap_or(pipe::BUFFERS);
    pipe::produce(&domain.events, &domain.grants, domain.id(), buffers, Some(seconds)).await
}

//! Event channels: one task signals, another one waits.
#![no_std]
#![no_main]

use core::time::Duration;
use guest_sdk::abi::Errno;
use guest_sdk::{Domain, entry, executor, println, time};

#[entry]
async fn main(domain: Domain) -> Result<(), Errno> {
    let mut listener = domain.events.alloc_unbound(domain.id())?;
    let caller = domain.events.bind_interdomain(domain.id(), listener.port())?;
    println!("port {} leads to port {}", caller.port(), listener.port());
    executor::spawn(async move {
        for call in 1..=3 {
            time::after(Duration::from_millis(100)).await;
            println!("calling, {call}");
            if let Err(error) = caller.notify() {
                println!("nobody there: {error}");
            }
        }
        // Keeps the port open for what is on its way.
        time::after(Duration::from_secs(1)).await;
    });
    for heard in 1..=3 {
        listener.fired().await;
        println!("heard, {heard}");
    }
    Ok(())
}

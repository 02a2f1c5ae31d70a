//! The first guest: says hello and powers off.
#![no_std]
#![no_main]

use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    println!("Hello from domain {}", domain.id());
}

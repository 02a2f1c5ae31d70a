//! A domain that does what a leader asks: no test itself (`conformance::peer`).
#![no_std]
#![no_main]

use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    conformance::peer::serve(&domain)
}

//! dom0's image: [`control_domain`] on a machine.
//!
//! Built for anything else (`cargo check` of the whole workspace brings std along) it is a program that says what it is.
#![cfg_attr(xenolith_guest, no_std, no_main)]

#[cfg(xenolith_guest)]
#[guest_sdk::entry]
async fn main(domain: guest_sdk::Domain) {
    control_domain::session::run(domain).await;
}

#[cfg(not(xenolith_guest))]
fn main() {
    println!("dom0 is a guest image: `cargo xtask run` builds and boots it");
}

//! Grants: a page is lent, seen at another address, and taken back.
#![no_std]
#![no_main]

use guest_sdk::grants::GrantError;
use guest_sdk::memory::{Access, Page};
use guest_sdk::ring::SharedPage;
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) -> Result<(), GrantError> {
    let mut page = Page::new().map_err(guest_sdk::abi::Errno::from)?;
    page.bytes_mut()[..5].copy_from_slice(b"hello");
    let grant = domain.grants.grant(page, domain.id(), Access::ReadWrite)?;
    println!("page granted as {}", grant.reference());

    // The other side: usually another domain, here the same one.
    let mapping = domain.grants.map(domain.id(), &[grant.reference()], Access::ReadWrite)?;
    let mut text = [0; 5];
    mapping.read_bytes(0, &mut text);
    println!("mapped at {:#x}: {:?}", mapping.address(), core::str::from_utf8(&text));
    mapping.write_bytes(0, b"HELLO");

    // While it is mapped the page does not come back.
    let grant = match grant.end() {
        Ok(_) => unreachable!("still mapped"),
        Err(grant) => grant,
    };
    drop(mapping);
    match grant.end() {
        Ok(page) => println!("taken back: {:?}", core::str::from_utf8(&page.bytes()[..5])),
        Err(grant) => println!("grant {} is still in use", grant.reference()),
    }
    Ok(())
}

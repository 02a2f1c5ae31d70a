//! xenstore: a guest reads who it is, leaves a note, and powers off when it is asked to.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::string::String;
use guest_sdk::abi::Errno;
use guest_sdk::shutdown::{self, Request};
use guest_sdk::xenstore::{SharedStore, StoreError};
use guest_sdk::{Domain, entry, println};

#[entry]
async fn main(mut domain: Domain) -> Result<(), StoreError> {
    let Some(mut store) = domain.xenstore() else {
        println!("the first domain has no xenstore but its own");
        return Ok(());
    };
    let name = store.read("name").await?;
    println!("I am {}", String::from_utf8_lossy(&name));
    println!("below data: {:?}", store.directory("data").await);

    // What others may see of it is seen all at once.
    loop {
        let mut note = store.transaction().await?;
        note.write("data/note/title", b"hello").await?;
        note.write("data/note/text", b"written in one go").await?;
        match note.commit().await {
            Err(StoreError::Refused(Errno::EAGAIN)) => {}
            done => break done?,
        }
    }
    println!("a note is in data/note");

    let store = SharedStore::new(store);
    while shutdown::requested(&store).await? != Request::Poweroff {}
    println!("asked to power off: good night");
    Ok(())
}

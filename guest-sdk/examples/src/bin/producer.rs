//! Sends buffers to the consumer at full speed. Words: `peer=` (a domain's number; the next one when not said),
//! `buffers=`, `seconds=` (for ever when not said).
#![no_std]
#![no_main]

use guest_examples::pipe;
use guest_sdk::abi::DomId;
use guest_sdk::grants::GrantError;
use guest_sdk::{Domain, entry};

#[entry]
async fn main(domain: Domain) -> Result<(), GrantError> {
    let line = domain.command_line;
    let peer = DomId::new(line.number("peer").unwrap_or(domain.id().get() + 1));
    let buffers = line.number("buffers").unwrap_or(pipe::BUFFERS);
    pipe::produce(&domain.events, &domain.grants, peer, buffers, line.number("seconds")).await
}

//! Takes the producer's buffers and checks every byte. Words: `peer=` (a domain's number; the one before when not said).
#![no_std]
#![no_main]

use guest_examples::pipe;
use guest_sdk::abi::DomId;
use guest_sdk::grants::GrantError;
use guest_sdk::{Domain, entry};

#[entry]
async fn main(domain: Domain) -> Result<(), GrantError> {
    let before = domain.id().get().saturating_sub(1);
    let peer = DomId::new(domain.command_line.number("peer").unwrap_or(before));
    pipe::consume(&domain.events, &domain.grants, peer).await
}

//! Takes the producer's buffers and checks every byte. Words: `peer=` (a domain's number).
#![no_std]
#![no_main]

use guest_examples::pipe::{self, PipeError};
use guest_sdk::{Domain, entry};

#[entry]
async fn main(domain: Domain) -> Result<(), PipeError> {
    let peer = pipe::peer(domain.command_line)?;
    Ok(pipe::consume(&domain.events, &domain.grants, peer).await?)
}

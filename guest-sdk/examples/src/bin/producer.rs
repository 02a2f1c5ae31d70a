//! Sends buffers to the consumer at full speed. Words: `peer=` (a domain's number), `buffers=`, `seconds=` (for ever when not
//! said).
#![no_std]
#![no_main]

use guest_examples::pipe::{self, PipeError};
use guest_sdk::{Domain, entry};

#[entry]
async fn main(domain: Domain) -> Result<(), PipeError> {
    let line = domain.command_line;
    let peer = pipe::peer(line)?;
    let buffers = line.number("buffers").unwrap_or(pipe::BUFFERS);
    Ok(pipe::produce(&domain.events, &domain.grants, peer, buffers, line.number("seconds")).await?)
}

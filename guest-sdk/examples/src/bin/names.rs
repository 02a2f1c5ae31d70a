//! A name server for one name: `name=web.test` has the address `is=10.77.0.80`, and nobody knows any other.
//!
//! `ip=` is its own address, or it comes by DHCP; `questions=1` ends it after as many.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use guest_examples::host::{self, Host};
use guest_sdk::net::NetError;
use guest_sdk::{Domain, entry, println};
use smoltcp::socket::udp;
use smoltcp::wire::Ipv4Address;

/// Bytes of the head of a message (RFC 1035, 4.1.1).
const HEAD: usize = 12;

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = host::store(&mut domain) else { return Ok(()) };
    let words = domain.command_line;
    let (Some(name), Some(address)) = (words.value("name"), words.number::<Ipv4Address>("is")) else {
        println!("name=NAME is=ADDRESS?");
        return Ok(());
    };
    let mut host = Host::open(&store, words).await?;
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    if socket.bind(53).is_err() {
        unreachable!("a new socket is not bound");
    }
    let handle = host.sockets.add(socket);
    println!("listening on port 53");
    let mut left = words.number("questions").unwrap_or(u64::MAX);
    while left > 0 {
        host.poll();
        let socket = host.sockets.get_mut::<udp::Socket<'_>>(handle);
        let mut answered = false;
        while let Ok((question, from)) = socket.recv() {
            let Some((asked, message)) = answer(question, name, address) else { continue };
            println!("{} asks for {}", from.endpoint, core::str::from_utf8(&asked).unwrap_or("?"));
            // Who has sent so much that there is no room asks again.
            let _ = socket.send_slice(&message, from);
            left = left.saturating_sub(1);
            answered = true;
        }
        if answered {
            host.poll();
        } else {
            host.wait().await?;
        }
    }
    Ok(())
}

/// The name that a question is about, and what it is answered: the address of `name`, or that there is none. `None` for what is no question.
fn answer(question: &[u8], name: &str, address: Ipv4Address) -> Option<(Vec<u8>, Vec<u8>)> {
    let head = question.first_chunk::<HEAD>()?;
    let is_question = head.get(2)? & 0xf8 == 0 && head.get(4..6)? == [0, 1];
    let (mut asked, mut at) = (Vec::new(), HEAD);
    loop {
        let length = usize::from(*question.get(at)?);
        if length == 0 {
            break;
        }
        if !asked.is_empty() {
            asked.push(b'.');
        }
        // Longer ones are pointers, which no question has.
        asked.extend_from_slice(question.get(at + 1..at + 1 + length).filter(|_| length < 64)?);
        at += 1 + length;
    }
    // The name's end, an address (1) of the Internet (1).
    let end = at + 5;
    let known = asked.eq_ignore_ascii_case(name.as_bytes()) && question.get(at + 1..end)? == [0, 1, 0, 1];
    if !is_question {
        return None;
    }
    let mut message = question.get(..end)?.to_vec();
    // An answer from who knows; 3: there is no such name.
    let flags = [0x84 | head.get(2)? & 1, if known { 0 } else { 3 }];
    message.get_mut(2..4)?.copy_from_slice(&flags);
    message.get_mut(6..HEAD)?.copy_from_slice(&[0, u8::from(known), 0, 0, 0, 0]);
    if known {
        // The name is the question's; it holds for a minute.
        message.extend_from_slice(&[0xc0, HEAD as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        message.extend_from_slice(&address.octets());
    }
    Some((asked, message))
}

//! Fetches a page: `url=http://10.0.2.2:8080/path`, and says what came. A name instead of an address is asked for where DHCP says.
//!
//! `count=1` times; `show=1` prints the page, `ip=` is an address without DHCP, `patience=10` are the seconds that an answer may take.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use guest_examples::host::{self, Host};
use guest_sdk::net::NetError;
use guest_sdk::sync::{First, first};
use guest_sdk::{Domain, entry, println, time};
use smoltcp::socket::{dns, tcp};
use smoltcp::wire::{DnsQueryType, IpAddress, Ipv4Address};

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = host::store(&mut domain) else { return Ok(()) };
    let words = domain.command_line;
    let Some((name, port, path)) = words.value("url").and_then(parts) else {
        println!("url=http://HOST[:PORT][/PATH]?");
        return Ok(());
    };
    let patience_ns = words.number("patience").unwrap_or(10u64).saturating_mul(1_000_000_000);
    let mut host = Host::open(&store, words).await?;
    let address = match name.parse::<Ipv4Address>() {
        Ok(address) => address,
        Err(_) => match resolve(&mut host, name, patience_ns).await? {
            Some(address) => {
                println!("{name} is {address}");
                address
            }
            None => {
                println!("nobody knows {name}");
                return Ok(());
            }
        },
    };
    for _ in 0..words.number("count").unwrap_or(1u32) {
        let begun = time::now_ns();
        match fetch(&mut host, name, (address, port), path, patience_ns).await? {
            None => println!("{address} port {port} does not answer"),
            Some(page) => {
                let text = String::from_utf8_lossy(&page);
                let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
                let took = (time::now_ns() - begun) / 1_000_000;
                println!("{}: {} bytes in {took} ms", head.lines().next().unwrap_or(""), body.len());
                if words.number("show").is_some_and(|show: u8| show != 0) {
                    body.lines().for_each(|line| println!("{line}"));
                }
            }
        }
    }
    host.tell_queues();
    Ok(())
}

/// Host, port and path of an address.
fn parts(url: &'static str) -> Option<(&'static str, u16, &'static str)> {
    let rest = url.strip_prefix("http://")?;
    let at = rest.find('/').unwrap_or(rest.len());
    let (host, path) = rest.split_at(at);
    let (name, port) = host.split_once(':').unwrap_or((host, "80"));
    Some((name, port.parse().ok()?, if path.is_empty() { "/" } else { path }))
}

/// Lets the stack do what is to be done; false when that time has come. With `wait`, once there is something to be done.
async fn turn(host: &mut Host, wait: bool, until_ns: u64) -> Result<bool, NetError> {
    if wait {
        match first(host.wait(), time::until_ns(until_ns)).await {
            First::One(result) => result?,
            First::Other(()) => return Ok(false),
        }
    }
    host.poll();
    Ok(true)
}

async fn resolve(host: &mut Host, name: &str, patience_ns: u64) -> Result<Option<Ipv4Address>, NetError> {
    let servers: Vec<IpAddress> = host.dns.iter().map(|server| IpAddress::Ipv4(*server)).take(1).collect();
    let handle = host.sockets.add(dns::Socket::new(&servers, vec![None]));
    let until_ns = time::now_ns().saturating_add(patience_ns);
    let Host { interface, sockets, .. } = host;
    let socket = sockets.get_mut::<dns::Socket<'_>>(handle);
    let Ok(query) = socket.start_query(interface.context(), name, DnsQueryType::A) else { return Ok(None) };
    let (mut found, mut wait) = (None, false);
    while turn(host, core::mem::replace(&mut wait, true), until_ns).await? {
        match host.sockets.get_mut::<dns::Socket<'_>>(handle).get_query_result(query) {
            Ok(addresses) => {
                found = addresses.first().map(|IpAddress::Ipv4(address)| *address);
                break;
            }
            Err(dns::GetQueryResultError::Pending) => {}
            Err(dns::GetQueryResultError::Failed) => break,
        }
    }
    host.sockets.remove(handle);
    Ok(found)
}

/// What a server answers, until it ends the connection; `None` when it does not answer in time.
async fn fetch(
    host: &mut Host,
    name: &str,
    server: (Ipv4Address, u16),
    path: &str,
    patience_ns: u64,
) -> Result<Option<Vec<u8>>, NetError> {
    let buffer = || tcp::SocketBuffer::new(vec![0; 65536]);
    let handle = host.sockets.add(tcp::Socket::new(buffer(), buffer()));
    let until_ns = time::now_ns().saturating_add(patience_ns);
    let Host { interface, sockets, .. } = host;
    let port = 49152 | (time::now_ns() as u16 & 0x3fff);
    let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
    if socket.connect(interface.context(), server, port).is_err() {
        host.sockets.remove(handle);
        return Ok(None);
    }
    let request = format!("GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
    let (mut sent, mut page, mut ended, mut wait) = (0, Vec::new(), false, false);
    while turn(host, core::mem::replace(&mut wait, true), until_ns).await? {
        let socket = host.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.may_send() && sent < request.len() {
            let rest = request.as_bytes().get(sent..).unwrap_or_default();
            sent += socket.send_slice(rest).unwrap_or(0);
            // The stack has something to do at once.
            wait = false;
        }
        while let Ok(count @ 1..) = socket.recv(|bytes| {
            page.extend_from_slice(bytes);
            (bytes.len(), bytes.len())
        }) {
            let _ = count;
        }
        if sent > 0 && !socket.may_recv() || !socket.is_open() {
            ended = sent > 0;
            break;
        }
    }
    let socket = host.sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.close();
    host.poll();
    host.sockets.get_mut::<tcp::Socket<'_>>(handle).abort();
    host.poll();
    host.sockets.remove(handle);
    Ok(ended.then_some(page))
}

//! Ping: asks another host for echoes, and answers those who ask.
//!
//! `peer=10.0.0.1 count=10` asks ten times with 64 and ten times with 1500 bytes, or with those of `bytes=` only; without `peer=` it
//! only answers. `ip=10.0.0.2/24` is its address, else it asks for one by DHCP. `linger=5` goes on answering until nobody has asked for
//! five seconds; without it, who asks stops when it has its echoes, and who does not ask never stops. `interval=100` is the time from one
//! request to the next in milliseconds.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use guest_examples::host;
use guest_sdk::net::stack::{self, Device};
use guest_sdk::net::{Card, NetError};
use guest_sdk::sync::{First, first};
use guest_sdk::{Domain, entry, println, time};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp};
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};

/// Which echoes are ours.
const IDENT: u16 = 0x22b;
/// How long an echo may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a peer may take to be there.
const SEARCH: Duration = Duration::from_secs(4);
/// Bytes of the heads of IP and of an echo message (RFC 791, RFC 792).
const HEADS: usize = 20 + ECHO_HEAD;
const ECHO_HEAD: usize = 8;

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = host::store(&mut domain) else { return Ok(()) };
    let words = domain.command_line;
    let card = Card::open(&store, words.number("card").unwrap_or(0)).await?;
    println!("card {}, {} bytes in a packet, {} in a frame", card.mac(), card.mtu(), card.max_frame());
    let mut host = Host::new(Device::new(card));
    match words.number::<Ipv4Cidr>("ip") {
        Some(address) => host.set_address(address, None),
        None => host.ask_for_address().await?,
    }
    let linger = words.number("linger").map(Duration::from_secs);
    let Some(peer) = words.number::<Ipv4Address>("peer") else {
        return host.answer(linger).await;
    };
    let count = words.number("count").unwrap_or(10);
    let interval = Duration::from_millis(words.number("interval").unwrap_or(0));
    let (mut asked, mut came) = (0, 0);
    let sizes = match words.number("bytes") {
        Some(bytes) => vec![HEADS.max(bytes)],
        None => vec![64, 1500],
    };
    for bytes in sizes {
        came += host.ask(peer, bytes, count, interval).await?;
        asked += count;
    }
    println!("total: {came} of {asked} came back");
    if let Some(linger) = linger {
        host.answer(Some(linger)).await?;
    }
    println!("{:?}", host.device.card().counters());
    Ok(())
}

struct Host {
    device: Device,
    interface: Interface,
    sockets: SocketSet<'static>,
}

impl Host {
    fn new(mut device: Device) -> Self {
        let mut config = Config::new(device.hardware_address());
        // No secret: it keeps the numbers of hosts that start at the same time apart.
        let own = device.card().mac().0.iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        config.random_seed = own ^ time::now_ns();
        let interface = Interface::new(config, &mut device, stack::now());
        Self { device, interface, sockets: SocketSet::new(Vec::new()) }
    }

    fn set_address(&mut self, address: Ipv4Cidr, router: Option<Ipv4Address>) {
        println!("address {address}");
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // It is the only one.
            let _ = addresses.push(IpCidr::Ipv4(address));
        });
        if let Some(router) = router {
            let _ = self.interface.routes_mut().add_default_ipv4_route(router);
        }
    }

    fn poll(&mut self) {
        self.device.poll(&mut self.interface, &mut self.sockets);
    }

    async fn ask_for_address(&mut self) -> Result<(), NetError> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        loop {
            self.poll();
            let event = self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll();
            if let Some(dhcpv4::Event::Configured(config)) = event {
                let (address, router) = (config.address, config.router);
                self.set_address(address, router);
                return Ok(());
            }
            self.device.wait(&mut self.interface, &self.sockets).await?;
        }
    }

    /// Waits until the stack has something to do, at most until system time reaches `until_ns`, and has it done.
    async fn turn(&mut self, until_ns: u64) -> Result<(), NetError> {
        let wait = self.device.wait(&mut self.interface, &self.sockets);
        if let First::One(result) = first(wait, time::until_ns(until_ns)).await {
            result?;
        }
        self.poll();
        Ok(())
    }

    /// Lets the stack answer until nothing has come for a while, or for ever.
    async fn answer(&mut self, linger: Option<Duration>) -> Result<(), NetError> {
        let Some(linger) = linger else {
            loop {
                self.turn(u64::MAX).await?;
            }
        };
        let received = |host: &Self| host.device.card().counters().received;
        let mut seen = received(self);
        let mut until_ns = time::now_ns() + linger.as_nanos() as u64;
        loop {
            self.turn(until_ns).await?;
            let now_ns = time::now_ns();
            if core::mem::replace(&mut seen, received(self)) != seen {
                until_ns = now_ns + linger.as_nanos() as u64;
            } else if now_ns >= until_ns {
                return Ok(());
            }
        }
    }

    /// Asks for echoes of packets of `bytes` with their heads, one after the other; how many came back as they were sent. One that is not
    /// counted goes before them: a peer that has just been made may not be there yet, and is looked for once a second.
    async fn ask(
        &mut self,
        peer: Ipv4Address,
        bytes: usize,
        count: u16,
        interval: Duration,
    ) -> Result<u16, NetError> {
        let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 8192]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        if socket.bind(icmp::Endpoint::Ident(IDENT)).is_err() {
            unreachable!("a new socket is not bound");
        }
        let echoes = self.sockets.add(socket);
        let mut content: Vec<u8> = (0..bytes - HEADS).map(|at| at as u8).collect();
        self.echo(echoes, peer, count, &content, SEARCH).await?;
        let (mut came, mut spent) = (0, 0);
        for number in 0..count {
            // Each is another, not by its number alone.
            content.iter_mut().zip(number.to_be_bytes()).for_each(|(to, byte)| *to = byte);
            let begun = time::now_ns();
            if self.echo(echoes, peer, number, &content, PATIENCE).await? {
                came += 1;
                spent += time::now_ns() - begun;
            }
            // Others' requests are answered meanwhile.
            let next_ns = begun + interval.as_nanos() as u64;
            while !interval.is_zero() && time::now_ns() < next_ns {
                self.turn(next_ns).await?;
                while self.sockets.get_mut::<icmp::Socket<'_>>(echoes).recv().is_ok() {}
            }
        }
        self.sockets.remove(echoes);
        let each = spent / u64::from(came.max(1));
        println!("{bytes} bytes to {peer}: {came} of {count} came back, {each} ns each");
        Ok(came)
    }

    /// Asks for one echo; whether it came in time, as it was sent.
    async fn echo(
        &mut self,
        echoes: SocketHandle,
        peer: Ipv4Address,
        number: u16,
        content: &[u8],
        patience: Duration,
    ) -> Result<bool, NetError> {
        let until_ns = time::now_ns() + patience.as_nanos() as u64;
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(echoes);
        match socket.send(ECHO_HEAD + content.len(), IpAddress::Ipv4(peer)) {
            Ok(place) => write_request(place, number, content),
            Err(_) => println!("no room to ask for an echo"),
        }
        self.poll();
        while time::now_ns() < until_ns {
            self.turn(until_ns).await?;
            let socket = self.sockets.get_mut::<icmp::Socket<'_>>(echoes);
            while let Ok((message, from)) = socket.recv() {
                if from == IpAddress::Ipv4(peer) && is_answer(message, number, content) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Writes a request for an echo. The stack puts its checksum in when it sends it, and looks at that of the answer.
fn write_request(place: &mut [u8], number: u16, content: &[u8]) {
    let mut packet = Icmpv4Packet::new_unchecked(place);
    let request = Icmpv4Repr::EchoRequest { ident: IDENT, seq_no: number, data: content };
    request.emit(&mut packet, &ChecksumCapabilities::ignored());
}

/// Whether a message is the answer to a request.
fn is_answer(message: &[u8], number: u16, content: &[u8]) -> bool {
    let packet = Icmpv4Packet::new_checked(message);
    packet.is_ok_and(|packet| {
        packet.msg_type() == Icmpv4Message::EchoReply
            && (packet.echo_ident(), packet.echo_seq_no()) == (IDENT, number)
            && packet.data() == content
    })
}

//! Ping: asks another host for echoes, and answers those who ask.
//!
//! `peer=10.0.0.1 count=10` asks ten times with 64 and ten times with 1500 bytes; without `peer=` it only answers. `ip=10.0.0.2/24` is
//! its address, else it asks for one by DHCP. `linger=5` goes on answering until nobody has asked for five seconds; without it, who asks
//! stops when it has its echoes, and who does not ask never stops. `interval=100` is the time from one request to the next in milliseconds.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use guest_examples::host;
use guest_sdk::net::stack::{self, Device};
use guest_sdk::net::{Card, NetError};
use guest_sdk::{Domain, entry, println, time};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::{dhcpv4, icmp};
use smoltcp::wire::{IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};

/// Which echoes are ours.
const IDENT: u16 = 0x22b;
/// How long an echo may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of the heads of IP and of an echo.
const HEADS: usize = 20 + 8;

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
    for bytes in [64, 1500] {
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
    echoes: SocketHandle,
}

impl Host {
    fn new(mut device: Device) -> Self {
        let mut config = Config::new(device.hardware_address());
        // No secret: it keeps the numbers of hosts that start at the same time apart.
        let own = device.card().mac().0.iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        config.random_seed = own ^ time::now_ns();
        let interface = Interface::new(config, &mut device, stack::now());
        let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 8192]);
        let mut sockets = SocketSet::new(Vec::new());
        let mut socket = icmp::Socket::new(buffer(), buffer());
        if socket.bind(icmp::Endpoint::Ident(IDENT)).is_err() {
            unreachable!("a new socket is not bound");
        }
        let echoes = sockets.add(socket);
        Self { device, interface, sockets, echoes }
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

    async fn ask_for_address(&mut self) -> Result<(), NetError> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        loop {
            self.device.poll(&mut self.interface, &mut self.sockets);
            let event = self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll();
            if let Some(dhcpv4::Event::Configured(config)) = event {
                let (address, router) = (config.address, config.router);
                self.set_address(address, router);
                return Ok(());
            }
            self.device.wait(&mut self.interface, &self.sockets).await?;
        }
    }

    /// Lets the stack do its work, and waits until there is more; at most until system time reaches `until_ns`.
    async fn turn(&mut self, until_ns: u64) -> Result<(), NetError> {
        self.device.poll(&mut self.interface, &mut self.sockets);
        if self.sockets.get::<icmp::Socket<'_>>(self.echoes).can_recv() {
            return Ok(());
        }
        let wait = self.device.wait(&mut self.interface, &self.sockets);
        match guest_sdk::sync::first(wait, time::until_ns(until_ns)).await {
            guest_sdk::sync::First::One(result) => result,
            guest_sdk::sync::First::Other(()) => Ok(()),
        }
    }

    /// Answers until nothing has come for a while, or for ever.
    async fn answer(&mut self, linger: Option<Duration>) -> Result<(), NetError> {
        loop {
            let before = self.device.card().counters().received;
            let until_ns = linger.map_or(u64::MAX, |linger| time::now_ns() + linger.as_nanos() as u64);
            while time::now_ns() < until_ns && self.device.card().counters().received == before {
                self.turn(until_ns).await?;
                // Others' requests may come here as well as to the stack, which has answered them.
                while self.sockets.get_mut::<icmp::Socket<'_>>(self.echoes).recv().is_ok() {}
            }
            if time::now_ns() >= until_ns && self.device.card().counters().received == before {
                return Ok(());
            }
        }
    }

    /// Asks for echoes of packets of `bytes` with their heads, one after the other; how many came back as they were sent.
    async fn ask(
        &mut self,
        peer: Ipv4Address,
        bytes: usize,
        count: u16,
        interval: Duration,
    ) -> Result<u16, NetError> {
        let (mut came, mut spent) = (0, 0);
        for number in 0..count {
            let content: Vec<u8> =
                (0..bytes - HEADS).map(|at| (at as u16 ^ number.wrapping_mul(257)) as u8).collect();
            let request = echo(8, number, &content);
            let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.echoes);
            if socket.send_slice(&request, IpAddress::Ipv4(peer)).is_err() {
                println!("no room to ask for an echo");
            }
            let expected = echo(0, number, &content);
            let begun = time::now_ns();
            let until_ns = begun + PATIENCE.as_nanos() as u64;
            'waiting: while time::now_ns() < until_ns {
                self.turn(until_ns).await?;
                let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.echoes);
                while let Ok((answer, from)) = socket.recv() {
                    if from == IpAddress::Ipv4(peer) && answer == expected {
                        came += 1;
                        spent += time::now_ns() - begun;
                        break 'waiting;
                    }
                }
            }
            // Others' requests are answered meanwhile.
            let next_ns = begun + interval.as_nanos() as u64;
            while time::now_ns() < next_ns {
                self.turn(next_ns).await?;
                while self.sockets.get_mut::<icmp::Socket<'_>>(self.echoes).recv().is_ok() {}
            }
        }
        let each = spent / u64::from(came.max(1));
        println!("{bytes} bytes to {peer}: {came} of {count} came back, {each} ns each");
        Ok(came)
    }
}

/// An echo message (RFC 792): 8 asks, 0 answers.
fn echo(kind: u8, number: u16, content: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(IDENT.to_be_bytes());
    message.extend(number.to_be_bytes());
    message.extend(content);
    let sum = message.chunks(2).fold(0u32, |sum, pair| {
        let word = [pair.first(), pair.get(1)].map(|byte| byte.copied().unwrap_or(0));
        sum + u32::from(u16::from_be_bytes(word))
    });
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    if let Some(place) = message.get_mut(2..4) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
    message
}

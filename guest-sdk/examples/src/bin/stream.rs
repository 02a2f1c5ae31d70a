//! A TCP stream from one guest to another, and what it takes: `role=take` listens, `role=send peer=10.0.0.1` connects and sends
//! `megabytes=16`, or with `busy` until the guest is asked to power off. `ip=10.0.0.2/24` is the guest's address, or it comes by DHCP. Both say what 1500 bytes took. Under `--icount` a nanosecond is an
//! instruction, and they are those of both guests with their stacks, hypervisor and dom0 together.
//!
//! `offload=none` makes checksums and sends segments one by one, `offload=checksums` leaves only checksums out.
//! `buffer=256` is how many KiB may be on their way. `pattern=1` fills and compares all bytes, which is not measured otherwise.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use core::time::Duration;
use guest_examples::asked::Asked;
use guest_examples::host::{self, Host};
use guest_sdk::net::NetError;
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{CommandLine, Domain, entry, println, time};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::wire::Ipv4Address;

const PORT: u16 = 5001;
/// What is measured in: the payload of an Ethernet frame.
const UNIT: u64 = 1500;

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = host::store(&mut domain) else { return Ok(()) };
    let words = domain.command_line;
    let mut stream = Stream::open(&store, words).await?;
    match (words.value("role"), words.number::<Ipv4Address>("peer")) {
        (Some("take"), _) => stream.take(words.number("pattern").is_some_and(|on: u8| on != 0)).await?,
        (Some("send"), Some(peer)) => {
            let asked = words.has("busy").then(|| Asked::listen(&store));
            stream.send(peer, words, asked).await?;
        }
        _ => println!("role=take, or role=send peer=ADDRESS?"),
    }
    println!("{:?}", stream.host.device.card().counters());
    Ok(())
}

struct Stream {
    host: Host,
    socket: SocketHandle,
}

/// The byte at a place of the stream.
fn pattern(at: u64) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

impl Stream {
    async fn open(store: &SharedStore, words: CommandLine) -> Result<Self, NetError> {
        let mut host = Host::open(store, words).await?;
        let bytes = words.number("buffer").unwrap_or(256_usize) << 10;
        let buffer = || tcp::SocketBuffer::new(vec![0; bytes]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let socket = host.sockets.add(socket);
        Ok(Self { host, socket })
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.host.sockets.get_mut(self.socket)
    }

    fn poll(&mut self) {
        self.host.poll();
    }

    async fn wait(&mut self) -> Result<(), NetError> {
        self.host.wait().await
    }

    async fn take(&mut self, check: bool) -> Result<(), NetError> {
        if self.socket().listen(PORT).is_err() {
            unreachable!("a new socket is closed");
        }
        let (mut bytes, mut wrong) = (0u64, 0u64);
        let mut begun = Duration::ZERO;
        loop {
            self.poll();
            let socket = self.socket();
            while socket.can_recv() {
                if bytes == 0 {
                    begun = time::now();
                }
                // Shown where they are; whoever wants them elsewhere pays for that.
                let took = socket.recv(|part| {
                    if check {
                        let right = |(at, byte): (u64, &u8)| *byte == pattern(at);
                        wrong += u64::from(!(bytes..).zip(part.iter()).all(right));
                    }
                    (part.len(), part.len() as u64)
                });
                bytes += took.unwrap_or(0);
            }
            if bytes > 0 && !socket.may_recv() {
                break;
            }
            self.wait().await?;
        }
        let spent = (time::now() - begun).as_nanos() as u64;
        println!(
            "{bytes} bytes came, {wrong} parts were wrong, {} ns for {UNIT}",
            spent * UNIT / bytes.max(1)
        );
        self.finish().await
    }

    async fn send(
        &mut self,
        peer: Ipv4Address,
        words: CommandLine,
        asked: Option<Asked>,
    ) -> Result<(), NetError> {
        let mut total = match asked {
            Some(_) => u64::MAX,
            None => words.number("megabytes").unwrap_or(16u64) << 20,
        };
        let fill = words.number("pattern").is_some_and(|on: u8| on != 0);
        let port = 49152 | (time::now_ns() as u16 & 0x3fff);
        let Host { sockets, interface, .. } = &mut self.host;
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        if socket.connect(interface.context(), (peer, PORT), port).is_err() {
            unreachable!("a new socket is closed, and no end is unspecified");
        }
        while !self.socket().may_send() {
            self.poll();
            if self.socket().may_send() {
                break;
            }
            if !self.socket().is_open() {
                println!("{peer} does not listen");
                return Ok(());
            }
            self.wait().await?;
        }
        let begun = time::now();
        let mut bytes = 0;
        while bytes < total {
            let socket = self.socket();
            while bytes < total && socket.can_send() {
                let put = socket.send(|room| {
                    let count = (total - bytes).min(room.len() as u64) as usize;
                    if fill {
                        (bytes..).zip(room.iter_mut().take(count)).for_each(|(at, byte)| *byte = pattern(at));
                    }
                    (count, count as u64)
                });
                bytes += put.unwrap_or(0);
            }
            if !self.socket().may_send() {
                println!("the connection ended at {bytes} bytes");
                return Ok(());
            }
            if asked.as_ref().is_some_and(Asked::to_end) {
                total = bytes;
            }
            self.poll();
            if bytes < total && !self.socket().can_send() {
                self.wait().await?;
            }
        }
        loop {
            self.poll();
            if self.socket().send_queue() == 0 || !self.socket().may_send() {
                break;
            }
            self.wait().await?;
        }
        let spent = (time::now() - begun).as_nanos() as u64;
        println!("{bytes} bytes sent, {} ns for {UNIT}", spent * UNIT / bytes.max(1));
        self.finish().await
    }

    /// Closes the connection, and waits until the other side has, too.
    async fn finish(&mut self) -> Result<(), NetError> {
        self.socket().close();
        while self.socket().is_active() && self.socket().state() != tcp::State::TimeWait {
            self.poll();
            if self.socket().is_active() && self.socket().state() != tcp::State::TimeWait {
                self.wait().await?;
            }
        }
        Ok(())
    }
}

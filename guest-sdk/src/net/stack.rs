//! A card as a device of the TCP/IP stack `smoltcp`.
//!
//! ```ignore
//! let mut device = Device::new(card);
//! let mut config = Config::new(device.hardware_address());
//! config.random_seed = seed;
//! let mut interface = Interface::new(config, &mut device, stack::now());
//! loop {
//!     device.poll(&mut interface, &mut sockets);
//!     // Use the sockets.
//!     device.wait(&mut interface, &sockets).await?;
//! }
//! ```
//! A received frame is read where the back end has put it: its page's grant is withdrawn for as long as the stack looks at it. A frame to
//! send is written where it is sent from. Both take no copy for frames of one page, which those of an MTU up to 4082 are.
//!
//! The transport checksum of what is sent is left to whoever needs it: nobody between guests of one machine does. With a card that was
//! opened with [`Options::offloading`](super::Options::offloading) none is looked at either, unless the other end could not vouch for it;
//! and the stack sees a network that carries packets of 65521 bytes. A packet of TCP that is longer than the real one carries is cut by
//! the back end, or not at all if its receiver takes it so; another one is lost. The stack has no notion of segments: it sends long ones
//! to whoever says that it takes them, which hosts on other networks do not.

use super::{About, Card, Checksum, HEADER, NetError, Offload};
use crate::sync::{First, first};
use crate::{executor, time};
use smoltcp::iface::{Interface, PollResult, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpProtocol, Ipv4Packet, TcpPacket,
    UdpPacket,
};

/// System time for the stack.
#[must_use]
pub fn now() -> Instant {
    // Microseconds of system time: 2^63 of them are 290000 years.
    Instant::from_micros((time::now_ns() / 1000).cast_signed())
}

/// A card for the stack.
#[derive(Debug)]
pub struct Device {
    card: Card,
    /// Frames are shown to the back end together, later.
    together: bool,
    /// The stack wanted to send, and there was no room.
    starved: bool,
}

impl Device {
    /// A device for a card that nobody else receives from.
    #[must_use]
    pub fn new(card: Card) -> Self {
        Self { card, together: false, starved: false }
    }

    /// The card.
    #[must_use]
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The card's address.
    #[must_use]
    pub fn hardware_address(&self) -> HardwareAddress {
        HardwareAddress::Ethernet(EthernetAddress(self.card.mac().0))
    }

    /// Lets the stack do what is to be done; everything that it sends is shown to the back end at once, with one notification.
    /// (`Interface::poll` may be called with a device, too: then each frame is shown when it is sent.)
    pub fn poll(&mut self, interface: &mut Interface, sockets: &mut SocketSet<'_>) -> PollResult {
        self.together = true;
        self.starved = false;
        let result = interface.poll(now(), self, sockets);
        self.together = false;
        // Of a card that is gone, `wait` tells.
        let _ = self.card.flush();
        result
    }

    /// Waits until the stack has to be polled.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub async fn wait(&mut self, interface: &mut Interface, sockets: &SocketSet<'_>) -> Result<(), NetError> {
        let waited = if core::mem::take(&mut self.starved) {
            // Without room nothing can be done about a frame that is there or a time that has come.
            self.card.room(self.longest()).await.map(|()| false)
        } else {
            let arrival = self.card.arrival();
            match interface.poll_delay(now(), sockets) {
                Some(Duration::ZERO) => self.card.has_frame().map(|_| false),
                Some(delay) => match first(arrival, time::after(delay.into())).await {
                    First::One(result) => result,
                    First::Other(()) => Ok(false),
                },
                None => arrival.await,
            }
        };
        if waited == Ok(false) {
            // Others get their turn also when the stack wants the next one at once: among them who brings the card back.
            executor::yield_now().await;
        }
        waited.map(drop)
    }

    /// Bytes of the longest frame that the stack sends.
    fn longest(&self) -> usize {
        let About { mtu, max_frame, takes_segments, blank_checksums, .. } = self.card.about();
        if takes_segments && blank_checksums { max_frame } else { mtu + HEADER }
    }

    fn has_room(&mut self) -> bool {
        let room = self.card.has_room(self.longest()).unwrap_or(false);
        self.starved |= !room;
        room
    }
}

/// A frame that is there.
#[derive(Debug)]
pub struct RxToken<'a> {
    card: &'a Card,
}

/// Room for a frame.
#[derive(Debug)]
pub struct TxToken<'a> {
    card: &'a Card,
    together: bool,
}

impl phy::Device for Device {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        // The stack may answer what it gets.
        if !self.card.has_frame().unwrap_or(false) || !self.has_room() {
            return None;
        }
        Some((RxToken { card: &self.card }, TxToken { card: &self.card, together: self.together }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.has_room().then_some(TxToken { card: &self.card, together: self.together })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.longest();
        // Their fields get what belongs there when a frame is sent; what is received is looked at before the stack sees it.
        capabilities.checksum.tcp = phy::Checksum::None;
        capabilities.checksum.udp = phy::Checksum::None;
        capabilities
    }
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        let (mut work, mut result) = (Some(work), None);
        // An error says that the card is gone, since the token was made or since the frame was looked at.
        let _ = self.card.receive_with(|frame, checksum| {
            let right = checksum != Checksum::Unknown || has_right_checksum(frame);
            result = work.take().map(|work| work(if right { frame } else { &[] }));
        });
        match (result, work) {
            (Some(result), _) => result,
            // No stack takes an empty frame for anything.
            (None, Some(work)) => work(&[]),
            (None, None) => unreachable!("work that was done has a result"),
        }
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, work: F) -> R {
        let (mut work, mut result) = (Some(work), None);
        let mtu = self.card.mtu();
        let _ = self.card.queue_offload(bytes, |frame| {
            result = work.take().map(|work| work(frame));
            ((), offload(frame, mtu))
        });
        if !self.together {
            let _ = self.card.flush();
        }
        match (result, work) {
            (Some(result), _) => result,
            // Longer than what was said to be possible.
            (None, Some(work)) => work(&mut alloc::vec![0; bytes]),
            (None, None) => unreachable!("work that was done has a result"),
        }
    }
}

/// What a frame of IPv4 carries, if it is all there and no fragment.
fn packet(frame: &[u8]) -> Option<Ipv4Packet<&[u8]>> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    let packet = (ethernet.ethertype() == EthernetProtocol::Ipv4).then(|| ethernet.payload())?;
    Ipv4Packet::new_checked(packet).ok().filter(|packet| !packet.more_frags() && packet.frag_offset() == 0)
}

/// Whether the transport checksum is right, or there is none.
fn has_right_checksum(frame: &[u8]) -> bool {
    let Some(packet) = packet(frame) else { return true };
    let (from, to) = (packet.src_addr().into(), packet.dst_addr().into());
    match packet.next_header() {
        IpProtocol::Tcp => {
            TcpPacket::new_checked(packet.payload()).is_ok_and(|tcp| tcp.verify_checksum(&from, &to))
        }
        IpProtocol::Udp => {
            UdpPacket::new_checked(packet.payload()).is_ok_and(|udp| udp.verify_checksum(&from, &to))
        }
        _ => true,
    }
}

/// What is left to do to a frame of the stack's; its checksum field gets what whoever does it wants there. `None` for what is too long and
/// cannot be cut.
fn offload(frame: &mut [u8], mtu: usize) -> Option<Offload> {
    let long = frame.len() > mtu + HEADER;
    let Some(packet) = packet(frame) else { return (!long).then_some(Offload::NOTHING) };
    let (header, payload) = (usize::from(packet.header_len()), packet.payload().len());
    let protocol = packet.next_header();
    let (at, segment) = match protocol {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(packet.payload()).ok()?;
            let headers = header + usize::from(tcp.header_len());
            // At most the MTU, which is less than 65536.
            (16, long.then(|| mtu.saturating_sub(headers) as u16))
        }
        IpProtocol::Udp if !long => (6, None),
        _ => return (!long).then_some(Offload::NOTHING),
    };
    let (from, to) = (packet.src_addr(), packet.dst_addr());
    let halves = |address: u32| (address >> 16) + (address & 0xffff);
    // At most 65535 bytes: this does not overflow, and is folded in two steps.
    let sum = halves(from.to_bits()) + halves(to.to_bits()) + u32::from(u8::from(protocol)) + payload as u32;
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let field = frame.get_mut(HEADER + header + at..)?.first_chunk_mut::<2>()?;
    *field = (folded as u16).to_be_bytes();
    Some(Offload { checksum_blank: true, segment })
}

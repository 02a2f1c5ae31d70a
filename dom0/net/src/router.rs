//! A router between an internal switch and the outside: NAT, DHCP for the guests, DNS forwarded.
//!
//! It has an address on both sides and no packets of its own but answers. Guests are known before they send anything: each
//! card has the one address that its MAC was given, so nothing inside is learnt from packets, and nobody sends in another's name.

use crate::frame::{self, ETHERNET, complete, destination_port};
use crate::nat::{Connection, End, Forward, Nat, Refused, Transport};
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use hashbrown::HashMap;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress,
    EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, Icmpv4TimeExceeded,
    IpProtocol, Ipv4Address, Ipv4Cidr, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};

const DNS: u16 = 53;
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// How long a guest's lease is said to be, s. It really lasts as long as its card.
const LEASE_S: u32 = 3600;
/// Neighbours outside that are asked for or known.
const NEIGHBOURS: usize = 256;
/// Packets that wait for a neighbour's address.
const WAITING: usize = 16;
/// Time between two questions, and how long an answer is believed, ns.
const ASK_NS: u64 = 1_000_000_000;
const KNOWN_NS: u64 = 60_000_000_000;
/// Questions without answer until the packets that wait are dropped.
const ASKS: u32 = 3;
const EXPIRE_NS: u64 = 10_000_000_000;
/// Bytes that an ICMP error quotes of a packet's payload: with three headers, 576 in all (RFC 1812, 4.3.2.3).
const QUOTED: usize = 576 - 20 - 8 - 20;

/// A side of the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The guests'.
    Inside,
    /// The physical network's.
    Outside,
}

/// What is known of a frame's transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// It is there.
    Complete,
    /// Its sender leaves it to whoever sends the frame on.
    Blank,
}

/// Our place in the network outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside {
    /// Our address and its network.
    pub address: Ipv4Cidr,
    /// Who passes on what is for no neighbour.
    pub gateway: Option<Ipv4Address>,
    /// Who is asked for names.
    pub dns: Option<Ipv4Address>,
}

/// Why a card got no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseError {
    /// The card has one.
    Known,
    /// Another card has the address.
    Taken,
    /// The address is none that a card of this network can have.
    OutOfRange,
    /// All are given.
    Exhausted,
}

impl fmt::Display for LeaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Known => "a network card with this MAC address has an address already",
            Self::Taken => "another network card has this address",
            Self::OutOfRange => "the address is not one for a guest of this network",
            Self::Exhausted => "all addresses of this network are given",
        })
    }
}

impl core::error::Error for LeaseError {}

/// Why a port does not lead to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardError {
    /// It leads somewhere already.
    Taken(Forward),
    /// No card has that address.
    NoCard,
}

impl fmt::Display for ForwardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken(other) => {
                write!(
                    f,
                    "{} port {} leads to {}:{} already",
                    other.transport, other.outside, other.to, other.port
                )
            }
            Self::NoCard => f.write_str("no network card has the address that the port should lead to"),
        }
    }
}

impl core::error::Error for ForwardError {}

/// Packets that went no further, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// Headers that contradict themselves or the length.
    pub malformed: u64,
    /// In another's name, or from an address that was not given to its card.
    pub spoofed: u64,
    /// Parts of packets.
    pub fragments: u64,
    /// Protocols that cannot share an address.
    pub protocol: u64,
    /// From outside, and no answer to anything.
    pub unasked: u64,
    /// Too many connections.
    pub full: u64,
    /// No way to where they are for.
    pub unreachable: u64,
    /// For the router itself or its broadcast addresses, and nothing that it serves.
    pub unserved: u64,
}

#[derive(Debug)]
struct Neighbour {
    address: Option<EthernetAddress>,
    /// When what is known was heard, or when it was last asked.
    since_ns: u64,
    asks: u32,
    waiting: VecDeque<Vec<u8>>,
}

/// The router; see the [module](self).
#[derive(Debug)]
pub struct Router {
    inside: Ipv4Cidr,
    mac: EthernetAddress,
    outside_mac: EthernetAddress,
    outside: Option<Outside>,
    leases: HashMap<EthernetAddress, Ipv4Address>,
    cards: HashMap<Ipv4Address, EthernetAddress>,
    neighbours: HashMap<Ipv4Address, Neighbour>,
    nat: Nat,
    drops: Drops,
    polled_ns: u64,
}

type Out<'a> = &'a mut dyn FnMut(Side, &[u8]);

fn ethernet(to: EthernetAddress, from: EthernetAddress, kind: EthernetProtocol, payload: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + payload];
    let mut header = smoltcp::wire::EthernetFrame::new_unchecked(&mut frame[..]);
    header.set_dst_addr(to);
    header.set_src_addr(from);
    header.set_ethertype(kind);
    frame
}

fn arp(to: EthernetAddress, repr: &ArpRepr, from: EthernetAddress) -> Vec<u8> {
    let mut frame = ethernet(to, from, EthernetProtocol::Arp, repr.buffer_len());
    repr.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET..]));
    frame
}

/// A frame with an IPv4 header and room for its payload behind it, at [`PAYLOAD`].
fn ipv4(to: EthernetAddress, from: EthernetAddress, repr: &Ipv4Repr) -> Vec<u8> {
    let mut frame = ethernet(to, from, EthernetProtocol::Ipv4, repr.buffer_len() + repr.payload_len);
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut frame[ETHERNET..]), &ChecksumCapabilities::default());
    frame
}

const PAYLOAD: usize = ETHERNET + 20;

impl Router {
    /// A router with the address of `inside` in that network, and these MAC addresses; nothing leads outside yet.
    #[must_use]
    pub fn new(inside: Ipv4Cidr, mac: EthernetAddress, outside_mac: EthernetAddress) -> Self {
        Self {
            inside,
            mac,
            outside_mac,
            outside: None,
            leases: HashMap::new(),
            cards: HashMap::new(),
            neighbours: HashMap::new(),
            nat: Nat::default(),
            drops: Drops::default(),
            polled_ns: 0,
        }
    }

    /// Says where the router is outside, or that it is nowhere. When the address changes, connections end.
    pub fn set_outside(&mut self, outside: Option<Outside>) {
        if self.outside.map(|old| old.address.address()) != outside.map(|new| new.address.address()) {
            self.nat.end_flows();
        }
        self.neighbours.clear();
        self.outside = outside;
    }

    /// Gives a card an address: `wanted`, or any.
    ///
    /// # Errors
    /// [`LeaseError`].
    pub fn lease(
        &mut self,
        card: EthernetAddress,
        wanted: Option<Ipv4Address>,
    ) -> Result<Ipv4Address, LeaseError> {
        if self.leases.contains_key(&card) {
            return Err(LeaseError::Known);
        }
        let network = self.inside.network();
        let fits = |address: Ipv4Address| {
            let edge = address == network.address() || Some(address) == self.inside.broadcast();
            network.contains_addr(&address) && !edge && address != self.inside.address()
        };
        let address = match wanted {
            Some(address) if !fits(address) => return Err(LeaseError::OutOfRange),
            Some(address) if self.cards.contains_key(&address) => return Err(LeaseError::Taken),
            Some(address) => address,
            None => {
                let first = u32::from(network.address());
                // One more than are given is enough to find one that is not: the router's own is the extra.
                let candidates = (1..).take(self.cards.len() + 2).map(|offset| first.checked_add(offset));
                candidates
                    .map_while(|address| address.map(Ipv4Address::from))
                    .take_while(|address| network.contains_addr(address))
                    .find(|address| fits(*address) && !self.cards.contains_key(address))
                    .ok_or(LeaseError::Exhausted)?
            }
        };
        self.leases.insert(card, address);
        self.cards.insert(address, card);
        Ok(address)
    }

    /// Takes a card's address, connections and forwarded ports away.
    pub fn release(&mut self, card: EthernetAddress) {
        if let Some(address) = self.leases.remove(&card) {
            self.cards.remove(&address);
            self.nat.forget(address);
        }
    }

    /// Makes a port of the outside address lead to a guest.
    ///
    /// # Errors
    /// [`ForwardError`].
    pub fn forward(&mut self, forward: Forward) -> Result<(), ForwardError> {
        if !self.cards.contains_key(&forward.to) {
            return Err(ForwardError::NoCard);
        }
        self.nat.forward(forward).map_err(ForwardError::Taken)
    }

    /// Its own address inside, and the network there.
    #[must_use]
    pub const fn inside(&self) -> Ipv4Cidr {
        self.inside
    }

    /// Where it is outside.
    #[must_use]
    pub const fn outside(&self) -> Option<Outside> {
        self.outside
    }

    /// The cards that it knows, by address.
    #[must_use]
    pub fn leases(&self) -> Vec<(Ipv4Address, EthernetAddress)> {
        let mut leases: Vec<_> = self.cards.iter().map(|(address, card)| (*address, *card)).collect();
        leases.sort_unstable();
        leases
    }

    /// The ports that lead to guests.
    #[must_use]
    pub fn forwards(&self) -> &[Forward] {
        self.nat.forwards()
    }

    /// The connections that it knows, those of one guest together.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        self.nat.connections()
    }

    /// Packets that went no further.
    #[must_use]
    pub const fn drops(&self) -> Drops {
        self.drops
    }

    /// Connections, also those that are only remembered.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.nat.len()
    }

    /// Does what time brings. Asks for neighbours again, forgets what is over; call it once a second.
    pub fn poll(&mut self, now_ns: u64, out: Out<'_>) {
        if now_ns.saturating_sub(self.polled_ns) >= EXPIRE_NS {
            self.polled_ns = now_ns;
            self.nat.expire(now_ns);
        }
        let mut ask = Vec::new();
        let drops = &mut self.drops;
        self.neighbours.retain(|address, neighbour| {
            let age = now_ns.saturating_sub(neighbour.since_ns);
            if neighbour.address.is_some() {
                return age < KNOWN_NS;
            }
            if age >= ASK_NS {
                neighbour.asks += 1;
                neighbour.since_ns = now_ns;
                if neighbour.asks > ASKS {
                    drops.unreachable += neighbour.waiting.len() as u64;
                    return false;
                }
                ask.push(*address);
            }
            true
        });
        for address in ask {
            self.ask(address, out);
        }
    }

    fn ask(&self, address: Ipv4Address, out: Out<'_>) {
        let Some(outside) = self.outside else { return };
        let question = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: self.outside_mac,
            source_protocol_addr: outside.address.address(),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: address,
        };
        out(Side::Outside, &arp(EthernetAddress::BROADCAST, &question, self.outside_mac));
    }

    /// Takes a frame from one side, whole; `out` is called with each frame that follows from it.
    pub fn handle(&mut self, now_ns: u64, side: Side, frame: &mut [u8], checksum: Checksum, out: Out<'_>) {
        let Some((to, from, protocol)) = frame::ethernet(frame) else {
            self.drops.malformed += 1;
            return;
        };
        let own = if side == Side::Inside { self.mac } else { self.outside_mac };
        if to.is_unicast() && to != own || !from.is_unicast() || from == own {
            return;
        }
        match (protocol, side) {
            (EthernetProtocol::Arp, _) => self.arp(now_ns, side, frame, out),
            (EthernetProtocol::Ipv4, Side::Inside) => self.packet_inside(now_ns, from, frame, checksum, out),
            (EthernetProtocol::Ipv4, Side::Outside) => self.packet_outside(now_ns, frame, checksum, out),
            // IPv6 and others have no way through here.
            _ => {}
        }
    }

    fn arp(&mut self, now_ns: u64, side: Side, frame: &[u8], out: Out<'_>) {
        let packet = frame.get(ETHERNET..).and_then(|bytes| ArpPacket::new_checked(bytes).ok());
        let Some(Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: sender,
            source_protocol_addr: sender_ip,
            target_protocol_addr: target,
            ..
        })) = packet.map(|packet| ArpRepr::parse(&packet))
        else {
            self.drops.malformed += 1;
            return;
        };
        let (mac, own) = match (side, self.outside) {
            (Side::Inside, _) => (self.mac, self.inside.address()),
            (Side::Outside, Some(outside)) => (self.outside_mac, outside.address.address()),
            (Side::Outside, None) => return,
        };
        if side == Side::Inside
            && self.leases.get(&sender) != Some(&sender_ip)
            && sender_ip != Ipv4Address::UNSPECIFIED
        {
            self.drops.spoofed += 1;
            return;
        }
        if operation == ArpOperation::Request && target == own {
            let answer = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: mac,
                source_protocol_addr: own,
                target_hardware_addr: sender,
                target_protocol_addr: sender_ip,
            };
            out(side, &arp(sender, &answer, mac));
        }
        // Only who was asked for is believed.
        if side == Side::Outside
            && operation == ArpOperation::Reply
            && sender.is_unicast()
            && let Some(neighbour) = self.neighbours.get_mut(&sender_ip)
        {
            neighbour.address = Some(sender);
            neighbour.since_ns = now_ns;
            for mut frame in core::mem::take(&mut neighbour.waiting) {
                address_frame(&mut frame, sender, self.outside_mac);
                out(Side::Outside, &frame);
            }
        }
    }

    fn packet_inside(
        &mut self,
        now_ns: u64,
        card: EthernetAddress,
        frame: &mut [u8],
        checksum: Checksum,
        out: Out<'_>,
    ) {
        let bytes = frame.get_mut(ETHERNET..).unwrap_or_default();
        let Ok(ip) = Ipv4Packet::new_checked(&*bytes) else {
            self.drops.malformed += 1;
            return;
        };
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        if is_dhcp_request(&ip) {
            self.dhcp(card, &ip, out);
            return;
        }
        if self.leases.get(&card) != Some(&source) {
            self.drops.spoofed += 1;
            return;
        }
        let gateway = self.inside.address();
        let to_us = destination == gateway;
        if to_us && ip.next_header() == IpProtocol::Icmp {
            self.echo(Side::Inside, card, &ip, out);
            return;
        }
        let local = self.inside.contains_addr(&destination);
        let special = destination.is_broadcast() || destination.is_multicast() || destination.is_loopback();
        if local && !(to_us && asks_dns(&ip)) || special || destination.is_unspecified() {
            self.drops.unserved += 1;
            return;
        }
        let Some(outside) = self.outside else {
            self.drops.unreachable += 1;
            self.error(card, &ip, unreachable(), out);
            return;
        };
        if ip.hop_limit() <= 1 {
            self.error(card, &ip, expired(), out);
            return;
        }
        let dns = outside.dns;
        if to_us && dns.is_none() {
            self.drops.unserved += 1;
            return;
        }
        if checksum == Checksum::Blank {
            complete(bytes);
        }
        let real = |_: Transport, shown: End| match dns {
            Some(dns) if shown.0 == gateway => (dns, shown.1),
            _ => shown,
        };
        if let Err(refused) = self.nat.outwards(now_ns, bytes, outside.address.address(), real) {
            self.count(refused);
            return;
        }
        let mut ip = Ipv4Packet::new_unchecked(&mut *bytes);
        ip.set_hop_limit(ip.hop_limit() - 1);
        ip.fill_checksum();
        let destination = ip.dst_addr();
        let end = ETHERNET + usize::from(ip.total_len());
        let hop =
            if outside.address.contains_addr(&destination) { Some(destination) } else { outside.gateway };
        match (hop, frame.get_mut(..end)) {
            (Some(hop), Some(frame)) => self.send_to_neighbour(now_ns, hop, frame, out),
            _ => self.drops.unreachable += 1,
        }
    }

    fn send_to_neighbour(&mut self, now_ns: u64, hop: Ipv4Address, frame: &mut [u8], out: Out<'_>) {
        if let Some(neighbour) = self.neighbours.get_mut(&hop) {
            match neighbour.address {
                Some(address) => {
                    address_frame(frame, address, self.outside_mac);
                    out(Side::Outside, frame);
                }
                None => {
                    if neighbour.waiting.len() >= WAITING {
                        neighbour.waiting.pop_front();
                        self.drops.unreachable += 1;
                    }
                    neighbour.waiting.push_back(frame.to_vec());
                }
            }
            return;
        }
        // A guest that looks for neighbours that are not there does not cut off the others.
        if self.neighbours.len() >= NEIGHBOURS && self.outside.and_then(|o| o.gateway) != Some(hop) {
            self.drops.unreachable += 1;
            return;
        }
        let waiting = VecDeque::from([frame.to_vec()]);
        self.neighbours.insert(hop, Neighbour { address: None, since_ns: now_ns, asks: 1, waiting });
        self.ask(hop, out);
    }

    fn packet_outside(&mut self, now_ns: u64, frame: &mut [u8], checksum: Checksum, out: Out<'_>) {
        let Some(outside) = self.outside else { return };
        let own = outside.address.address();
        let Some((_, neighbour, _)) = frame::ethernet(frame) else { return };
        let bytes = frame.get_mut(ETHERNET..).unwrap_or_default();
        let Ok(ip) = Ipv4Packet::new_checked(&*bytes) else {
            self.drops.malformed += 1;
            return;
        };
        if ip.dst_addr() != own {
            self.drops.unserved += 1;
            return;
        }
        if ip.next_header() == IpProtocol::Icmp
            && Icmpv4Packet::new_checked(ip.payload())
                .is_ok_and(|icmp| icmp.msg_type() == Icmpv4Message::EchoRequest)
        {
            self.echo(Side::Outside, neighbour, &ip, out);
            return;
        }
        if ip.hop_limit() <= 1 || self.inside.contains_addr(&ip.src_addr()) {
            self.drops.unserved += 1;
            return;
        }
        if checksum == Checksum::Blank {
            complete(bytes);
        }
        let guest = match self.nat.inwards(now_ns, bytes, own) {
            Ok(guest) => guest,
            Err(refused) => {
                self.count(refused);
                return;
            }
        };
        let Some(card) = self.cards.get(&guest).copied() else {
            self.drops.unreachable += 1;
            return;
        };
        let mut ip = Ipv4Packet::new_unchecked(&mut *bytes);
        ip.set_hop_limit(ip.hop_limit() - 1);
        ip.fill_checksum();
        let end = ETHERNET + usize::from(ip.total_len());
        if let Some(frame) = frame.get_mut(..end) {
            address_frame(frame, card, self.mac);
            out(Side::Inside, frame);
        }
    }

    fn count(&mut self, refused: Refused) {
        let counter = match refused {
            Refused::Malformed => &mut self.drops.malformed,
            Refused::Fragment => &mut self.drops.fragments,
            Refused::Protocol => &mut self.drops.protocol,
            Refused::Unasked => &mut self.drops.unasked,
            Refused::Full => &mut self.drops.full,
        };
        *counter += 1;
    }

    /// Answers an echo request to the router itself.
    fn echo(&mut self, side: Side, to: EthernetAddress, ip: &Ipv4Packet<&[u8]>, out: Out<'_>) {
        let capabilities = ChecksumCapabilities::default();
        let asked = Icmpv4Packet::new_checked(ip.payload());
        let asked = asked.as_ref().ok().map(|packet| Icmpv4Repr::parse(packet, &capabilities));
        let fragment = ip.more_frags() || ip.frag_offset() != 0;
        let Some(Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data })) = asked.filter(|_| !fragment) else {
            self.drops.unserved += 1;
            return;
        };
        let answer = Icmpv4Repr::EchoReply { ident, seq_no, data };
        self.icmp(side, to, ip.dst_addr(), ip.src_addr(), &answer, out);
    }

    /// Tells a guest why its packet goes nowhere; never about an ICMP message but a request (RFC 1122 3.2.2).
    fn error(&self, to: EthernetAddress, ip: &Ipv4Packet<&[u8]>, make: ErrorMaker, out: Out<'_>) {
        let quiet = ip.next_header() == IpProtocol::Icmp
            && Icmpv4Packet::new_checked(ip.payload())
                .map_or(true, |icmp| icmp.msg_type() != Icmpv4Message::EchoRequest);
        if quiet || ip.frag_offset() != 0 {
            return;
        }
        let header = Ipv4Repr {
            src_addr: ip.src_addr(),
            dst_addr: ip.dst_addr(),
            next_header: ip.next_header(),
            payload_len: ip.payload().len(),
            hop_limit: ip.hop_limit(),
        };
        let quoted = ip.payload().get(..ip.payload().len().min(QUOTED)).unwrap_or_default();
        self.icmp(Side::Inside, to, self.inside.address(), ip.src_addr(), &make(header, quoted), out);
    }

    fn icmp(
        &self,
        side: Side,
        to: EthernetAddress,
        source: Ipv4Address,
        destination: Ipv4Address,
        message: &Icmpv4Repr<'_>,
        out: Out<'_>,
    ) {
        let header = Ipv4Repr {
            src_addr: source,
            dst_addr: destination,
            next_header: IpProtocol::Icmp,
            payload_len: message.buffer_len(),
            hop_limit: 64,
        };
        let own = if side == Side::Inside { self.mac } else { self.outside_mac };
        let mut frame = ipv4(to, own, &header);
        let mut payload = Icmpv4Packet::new_unchecked(&mut frame[PAYLOAD..]);
        message.emit(&mut payload, &ChecksumCapabilities::default());
        out(side, &frame);
    }

    /// Answers DHCP (RFC 2131): every card is offered the address that it was given.
    fn dhcp(&mut self, card: EthernetAddress, ip: &Ipv4Packet<&[u8]>, out: Out<'_>) {
        let udp = UdpPacket::new_checked(ip.payload());
        let request = udp.ok().and_then(|udp| DhcpPacket::new_checked(udp.payload()).ok());
        let Some(Ok(asked)) = request.as_ref().map(DhcpRepr::parse) else {
            self.drops.malformed += 1;
            return;
        };
        let address = self.leases.get(&card).copied().filter(|_| asked.client_hardware_address == card);
        let Some(address) = address else {
            self.drops.spoofed += 1;
            return;
        };
        let gateway = self.inside.address();
        let for_another = asked.server_identifier.is_some_and(|server| server != gateway);
        let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
        let kind = match asked.message_type {
            DhcpMessageType::Discover => DhcpMessageType::Offer,
            DhcpMessageType::Request if for_another => return,
            DhcpMessageType::Request if wanted == address => DhcpMessageType::Ack,
            DhcpMessageType::Request => DhcpMessageType::Nak,
            DhcpMessageType::Inform => DhcpMessageType::Ack,
            // A decline or release changes nothing: the address stays the card's.
            _ => return,
        };
        let refused = kind == DhcpMessageType::Nak;
        let informed = asked.message_type == DhcpMessageType::Inform;
        let answer = DhcpRepr {
            message_type: kind,
            transaction_id: asked.transaction_id,
            secs: 0,
            client_hardware_address: card,
            client_ip: if refused { Ipv4Address::UNSPECIFIED } else { asked.client_ip },
            your_ip: if refused || informed { Ipv4Address::UNSPECIFIED } else { address },
            server_ip: Ipv4Address::UNSPECIFIED,
            router: (!refused).then_some(gateway),
            subnet_mask: (!refused).then(|| self.inside.netmask()),
            relay_agent_ip: Ipv4Address::UNSPECIFIED,
            broadcast: asked.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(gateway),
            parameter_request_list: None,
            dns_servers: (!refused).then(|| [gateway].into_iter().collect()),
            max_size: None,
            lease_duration: (!refused && !informed).then_some(LEASE_S),
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        // To where a client without an address hears it (RFC 2131, 4.1).
        let renews = asked.client_ip == address && !refused;
        let (to, destination) = match (renews, refused || asked.broadcast) {
            (true, _) => (card, address),
            (false, true) => (EthernetAddress::BROADCAST, Ipv4Address::BROADCAST),
            (false, false) => (card, address),
        };
        let udp = UdpRepr { src_port: DHCP_SERVER, dst_port: DHCP_CLIENT };
        let length = answer.buffer_len();
        let header = Ipv4Repr {
            src_addr: gateway,
            dst_addr: destination,
            next_header: IpProtocol::Udp,
            payload_len: udp.header_len() + length,
            hop_limit: 64,
        };
        let mut frame = ipv4(to, self.mac, &header);
        let mut packet = UdpPacket::new_unchecked(&mut frame[PAYLOAD..]);
        let mut failed = false;
        udp.emit(
            &mut packet,
            &gateway.into(),
            &destination.into(),
            length,
            |payload| failed = answer.emit(&mut DhcpPacket::new_unchecked(payload)).is_err(),
            &ChecksumCapabilities::default(),
        );
        debug_assert!(!failed, "the buffer has the length that was asked for");
        if !failed {
            out(Side::Inside, &frame);
        }
    }
}

type ErrorMaker = for<'a> fn(Ipv4Repr, &'a [u8]) -> Icmpv4Repr<'a>;

fn unreachable() -> ErrorMaker {
    |header, data| Icmpv4Repr::DstUnreachable { reason: Icmpv4DstUnreachable::NetUnreachable, header, data }
}

fn expired() -> ErrorMaker {
    |header, data| Icmpv4Repr::TimeExceeded { reason: Icmpv4TimeExceeded::TtlExpired, header, data }
}

fn address_frame(frame: &mut [u8], to: EthernetAddress, from: EthernetAddress) {
    let mut header = smoltcp::wire::EthernetFrame::new_unchecked(frame);
    header.set_dst_addr(to);
    header.set_src_addr(from);
}

fn is_dhcp_request(ip: &Ipv4Packet<&[u8]>) -> bool {
    destination_port(ip, IpProtocol::Udp) == Some(DHCP_SERVER)
}

fn asks_dns(ip: &Ipv4Packet<&[u8]>) -> bool {
    [IpProtocol::Udp, IpProtocol::Tcp].iter().any(|protocol| destination_port(ip, *protocol) == Some(DNS))
}

#[cfg(test)]
mod tests;

//! Many inside addresses behind one outside (RFC 4787, 5382, 5508, as far as their requirements are marked below).
//!
//! A flow is one connection: its end inside, its end outside, and the port that it has on our outside address. Packets of a flow
//! are rewritten in place; checksums are adjusted, not computed anew (RFC 1624), so that one that was wrong stays wrong.
//! Fragments are dropped: nobody here puts packets together.

use alloc::vec::Vec;
use hashbrown::HashMap;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Address, Ipv4Packet, TcpPacket, UdpPacket};

/// Flows in all.
const FLOWS: usize = 8192;
/// Flows of one inside address, so that a guest cannot take them all.
const FLOWS_EACH: u32 = 1024;
/// Where ports are looked for when the guest's own is in use outside (RFC 6056's ephemeral range above the well-known).
const PORTS: core::ops::RangeInclusive<u16> = 1024..=u16::MAX;
/// Ports tried for a new flow.
const TRIES: u32 = 64;

/// Seconds that a flow is kept after its last packet: RFC 5382 REQ-5 (established, and not yet or no longer), RFC 4787
/// REQ-5, RFC 5508 REQ-2.
const TCP_ESTABLISHED: u64 = 7440;
const TCP_TRANSITORY: u64 = 240;
const UDP: u64 = 300;
const ICMP: u64 = 60;
const SECOND_NS: u64 = 1_000_000_000;

/// A protocol that has ports, or something like them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests and replies; the identifier counts as the inside's port, and the outside has none.
    Icmp,
}

/// A port of the outside address that leads to a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// TCP or UDP.
    pub transport: Transport,
    /// The port on the outside address.
    pub outside: u16,
    /// The guest.
    pub to: Ipv4Address,
    /// Its port.
    pub port: u16,
}

impl core::fmt::Display for Transport {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

/// A connection through the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Its protocol.
    pub transport: Transport,
    /// The guest's end.
    pub inside: (Ipv4Address, u16),
    /// The other end.
    pub remote: (Ipv4Address, u16),
    /// The port that it has on our outside address.
    pub outside: u16,
    /// The guest has begun it.
    pub from_inside: bool,
    /// When it is forgotten if nothing more goes through it, ns.
    pub expires_ns: u64,
}

/// Why a packet is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Its headers contradict themselves or its length.
    Malformed,
    /// It is a part of a packet.
    Fragment,
    /// A protocol that has nothing like ports.
    Protocol,
    /// From outside, and no answer to anything.
    Unasked,
    /// Too many flows, or no port is free for it.
    Full,
}

/// An address with a port.
pub(crate) type End = (Ipv4Address, u16);
type Key = (Transport, End, End);

#[derive(Clone, Copy, Debug)]
struct Flow {
    transport: Transport,
    inside: End,
    /// The other end as the inside sees it.
    shown: End,
    /// Where it really is.
    remote: End,
    outside: u16,
    expires_ns: u64,
    /// Who sent its first packet.
    from_inside: bool,
    /// TCP: the other side has sent something, too; it is being closed.
    answered: bool,
    closing: bool,
}

/// The flows.
#[derive(Debug, Default)]
pub(crate) struct Nat {
    flows: Vec<Option<Flow>>,
    free: Vec<usize>,
    by_inside: HashMap<Key, usize>,
    by_outside: HashMap<Key, usize>,
    each: HashMap<Ipv4Address, u32>,
    forwards: Vec<Forward>,
    expired_ns: u64,
}

/// A checksum after 16-bit words under it have changed (RFC 1624, equation 3).
fn adjusted(checksum: u16, changes: &[(u16, u16)]) -> u16 {
    let sum =
        changes.iter().fold(u32::from(!checksum), |sum, (old, new)| sum + u32::from(!old) + u32::from(*new));
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !(folded as u16)
}

fn words(address: Ipv4Address) -> [u16; 2] {
    let [a, b, c, d] = address.octets();
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
}

/// The words that change with an end.
fn changes(old: End, new: End) -> [(u16, u16); 3] {
    let ([old_high, old_low], [new_high, new_low]) = (words(old.0), words(new.0));
    [(old_high, new_high), (old_low, new_low), (old.1, new.1)]
}

/// Which end of a packet is rewritten.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Source,
    Destination,
}

/// Ends of a packet, and what of its transport matters here.
struct Seen {
    transport: Transport,
    source: End,
    destination: End,
    /// TCP: it closes the connection in its direction.
    closes: bool,
    resets: bool,
}

/// What a packet is to a translator.
enum Kind {
    Plain(Seen),
    /// An ICMP error about another packet.
    Error,
}

fn kind(packet: &[u8]) -> Result<Kind, Refused> {
    let ip = Ipv4Packet::new_checked(packet).map_err(|_| Refused::Malformed)?;
    if ip.version() != 4 || ip.header_len() < 20 {
        return Err(Refused::Malformed);
    }
    if ip.more_frags() || ip.frag_offset() != 0 {
        return Err(Refused::Fragment);
    }
    let (source, destination) = (ip.src_addr(), ip.dst_addr());
    let seen = |transport, from, to| Seen {
        transport,
        source: (source, from),
        destination: (destination, to),
        closes: false,
        resets: false,
    };
    match ip.next_header() {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(ip.payload()).map_err(|_| Refused::Malformed)?;
            let seen = seen(Transport::Tcp, tcp.src_port(), tcp.dst_port());
            Ok(Kind::Plain(Seen { closes: tcp.fin(), resets: tcp.rst(), ..seen }))
        }
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(ip.payload()).map_err(|_| Refused::Malformed)?;
            Ok(Kind::Plain(seen(Transport::Udp, udp.src_port(), udp.dst_port())))
        }
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(ip.payload()).map_err(|_| Refused::Malformed)?;
            match icmp.msg_type() {
                Icmpv4Message::EchoRequest => Ok(Kind::Plain(seen(Transport::Icmp, icmp.echo_ident(), 0))),
                Icmpv4Message::EchoReply => Ok(Kind::Plain(seen(Transport::Icmp, 0, icmp.echo_ident()))),
                Icmpv4Message::DstUnreachable | Icmpv4Message::TimeExceeded | Icmpv4Message::ParamProblem => {
                    Ok(Kind::Error)
                }
                _ => Err(Refused::Protocol),
            }
        }
        _ => Err(Refused::Protocol),
    }
}

/// Puts another end into a packet whose headers were checked.
fn rewrite(packet: &mut [u8], transport: Transport, which: Which, old: End, new: End) {
    let mut ip = Ipv4Packet::new_unchecked(packet);
    let changes = changes(old, new);
    let [high, low, port] = changes;
    ip.set_checksum(adjusted(ip.checksum(), &[high, low]));
    match which {
        Which::Source => ip.set_src_addr(new.0),
        Which::Destination => ip.set_dst_addr(new.0),
    }
    match transport {
        Transport::Tcp => {
            let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
            tcp.set_checksum(adjusted(tcp.checksum(), &changes));
            match which {
                Which::Source => tcp.set_src_port(new.1),
                Which::Destination => tcp.set_dst_port(new.1),
            }
        }
        Transport::Udp => {
            let mut udp = UdpPacket::new_unchecked(ip.payload_mut());
            // Zero says that there is none, and is never computed (RFC 768).
            if udp.checksum() != 0 {
                let checksum = adjusted(udp.checksum(), &changes);
                udp.set_checksum(if checksum == 0 { 0xffff } else { checksum });
            }
            match which {
                Which::Source => udp.set_src_port(new.1),
                Which::Destination => udp.set_dst_port(new.1),
            }
        }
        Transport::Icmp => {
            // Its checksum does not cover addresses. Only the inside's end has an identifier.
            let mut icmp = Icmpv4Packet::new_unchecked(ip.payload_mut());
            icmp.set_checksum(adjusted(icmp.checksum(), &[port]));
            icmp.set_echo_ident(new.1);
        }
    }
}

/// Bytes of an ICMP error before the packet that it is about.
const ERROR_HEADER: usize = 8;

/// The packet that an ICMP error is about: its ends, as far as its first bytes tell.
fn embedded(packet: &[u8]) -> Result<(Transport, End, End), Refused> {
    let ip = Ipv4Packet::new_checked(packet).map_err(|_| Refused::Malformed)?;
    let inner = ip.payload().get(ERROR_HEADER..).ok_or(Refused::Malformed)?;
    let first = *inner.first().ok_or(Refused::Malformed)?;
    let header = usize::from(first & 15) * 4;
    if first >> 4 != 4 || header < 20 || inner.len() < header + 8 {
        return Err(Refused::Malformed);
    }
    // Its total length is that of a packet that is not all here.
    let inner_ip = Ipv4Packet::new_unchecked(inner);
    if inner_ip.frag_offset() != 0 {
        return Err(Refused::Fragment);
    }
    let word = |at: usize| inner.get(header + at..)?.first_chunk().copied().map(u16::from_be_bytes);
    let (first, second) = word(0).zip(word(2)).ok_or(Refused::Malformed)?;
    let (transport, ports) = match inner_ip.next_header() {
        IpProtocol::Tcp => (Transport::Tcp, (first, second)),
        IpProtocol::Udp => (Transport::Udp, (first, second)),
        IpProtocol::Icmp => {
            let ident = word(4).ok_or(Refused::Malformed)?;
            match inner.get(header) {
                Some(8) => (Transport::Icmp, (ident, 0)),
                Some(0) => (Transport::Icmp, (0, ident)),
                _ => return Err(Refused::Protocol),
            }
        }
        _ => return Err(Refused::Protocol),
    };
    Ok((transport, (inner_ip.src_addr(), ports.0), (inner_ip.dst_addr(), ports.1)))
}

/// Puts another end into the packet that an ICMP error is about, and another address into the error.
fn rewrite_error(
    packet: &mut [u8],
    transport: Transport,
    inner_end: Which,
    old: End,
    new: End,
    outer: (Which, Ipv4Address),
) {
    let mut ip = Ipv4Packet::new_unchecked(packet);
    match outer {
        (Which::Source, address) => ip.set_src_addr(address),
        (Which::Destination, address) => ip.set_dst_addr(address),
    }
    ip.fill_checksum();
    let payload = ip.payload_mut();
    if let Some(inner) = payload.get_mut(ERROR_HEADER..) {
        let header = usize::from(inner.first().copied().unwrap_or(0) & 15) * 4;
        let [high, low, port] = changes(old, new);
        let mut inner_ip = Ipv4Packet::new_unchecked(&mut *inner);
        inner_ip.set_checksum(adjusted(inner_ip.checksum(), &[high, low]));
        match inner_end {
            Which::Source => inner_ip.set_src_addr(new.0),
            Which::Destination => inner_ip.set_dst_addr(new.0),
        }
        let mut put = |at: usize, value: u16| {
            if let Some(bytes) = inner.get_mut(header + at..).and_then(|rest| rest.first_chunk_mut()) {
                *bytes = value.to_be_bytes();
            }
        };
        match (transport, inner_end) {
            (Transport::Icmp, _) => put(4, new.1),
            (_, Which::Source) => put(0, new.1),
            (_, Which::Destination) => put(2, new.1),
        }
        // Of the transport's checksums only these two are in the first 8 bytes.
        let checksum_at = match transport {
            Transport::Tcp => None,
            Transport::Udp => Some((6, &[high, low, port][..])),
            Transport::Icmp => Some((2, &[port][..])),
        };
        if let Some((at, changes)) = checksum_at
            && let Some(bytes) = inner.get_mut(header + at..).and_then(|rest| rest.first_chunk_mut())
        {
            let checksum = u16::from_be_bytes(*bytes);
            if checksum != 0 || transport == Transport::Icmp {
                *bytes = adjusted(checksum, changes).to_be_bytes();
            }
        }
    }
    Icmpv4Packet::new_unchecked(payload).fill_checksum();
}

impl Flow {
    fn inside_key(&self) -> Key {
        (self.transport, self.inside, self.shown)
    }

    /// Our own address is not in it: there is one.
    fn outside_key(&self) -> Key {
        (self.transport, (Ipv4Address::UNSPECIFIED, self.outside), self.remote)
    }

    fn touch(&mut self, now_ns: u64, seen: &Seen, outwards: bool) {
        let seconds = match self.transport {
            Transport::Udp => UDP,
            Transport::Icmp => ICMP,
            Transport::Tcp => {
                self.answered |= outwards != self.from_inside;
                // A reset may be forged, so it only shortens the time.
                self.closing |= seen.closes || seen.resets;
                if self.answered && !self.closing { TCP_ESTABLISHED } else { TCP_TRANSITORY }
            }
        };
        self.expires_ns = now_ns.saturating_add(seconds * SECOND_NS);
    }
}

impl Nat {
    /// Adds a forwarded port.
    ///
    /// # Errors
    /// Where the port leads already.
    pub(crate) fn forward(&mut self, forward: Forward) -> Result<(), Forward> {
        let key = |forward: &Forward| (forward.transport, forward.outside);
        if let Some(other) = self.forwards.iter().find(|other| key(other) == key(&forward)) {
            return Err(*other);
        }
        self.forwards.push(forward);
        Ok(())
    }

    /// The forwarded ports.
    pub(crate) fn forwards(&self) -> &[Forward] {
        &self.forwards
    }

    /// The flows, in order.
    pub(crate) fn connections(&self) -> Vec<Connection> {
        let flows = self.flows.iter().flatten();
        let mut connections: Vec<_> = flows
            .map(|flow| Connection {
                transport: flow.transport,
                inside: flow.inside,
                remote: flow.remote,
                outside: flow.outside,
                from_inside: flow.from_inside,
                expires_ns: flow.expires_ns,
            })
            .collect();
        connections.sort_unstable_by_key(|connection| (connection.inside, connection.remote));
        connections
    }

    /// Forgets a guest: its flows, and the ports that lead to it.
    pub(crate) fn forget(&mut self, address: Ipv4Address) {
        self.forwards.retain(|forward| forward.to != address);
        for index in 0..self.flows.len() {
            if self.flows.get(index).is_some_and(|flow| flow.is_some_and(|flow| flow.inside.0 == address)) {
                self.remove(index);
            }
        }
    }

    /// Forgets all flows; forwarded ports stay.
    pub(crate) fn end_flows(&mut self) {
        *self = Self { forwards: core::mem::take(&mut self.forwards), ..Self::default() };
    }

    /// Flows.
    pub(crate) fn len(&self) -> usize {
        self.by_inside.len()
    }

    /// Forgets flows that are over.
    pub(crate) fn expire(&mut self, now_ns: u64) {
        self.expired_ns = now_ns;
        for index in 0..self.flows.len() {
            if self.flows.get(index).is_some_and(|flow| flow.is_some_and(|flow| flow.expires_ns <= now_ns)) {
                self.remove(index);
            }
        }
    }

    fn remove(&mut self, index: usize) {
        let Some(flow) = self.flows.get_mut(index).and_then(Option::take) else { return };
        self.by_inside.remove(&flow.inside_key());
        self.by_outside.remove(&flow.outside_key());
        self.free.push(index);
        if let Some(count) = self.each.get_mut(&flow.inside.0) {
            *count -= 1;
            if *count == 0 {
                self.each.remove(&flow.inside.0);
            }
        }
    }

    fn get(&mut self, index: usize) -> Option<&mut Flow> {
        self.flows.get_mut(index)?.as_mut()
    }

    fn add(&mut self, now_ns: u64, mut flow: Flow) -> Result<usize, Refused> {
        let full = |nat: &Self| {
            nat.len() >= FLOWS || nat.each.get(&flow.inside.0).is_some_and(|count| *count >= FLOWS_EACH)
        };
        // At most once a second: it looks at them all.
        if full(self) && now_ns.saturating_sub(self.expired_ns) >= SECOND_NS {
            self.expire(now_ns);
        }
        if full(self) {
            return Err(Refused::Full);
        }
        let taken = |nat: &Self, flow: &Flow| nat.by_outside.contains_key(&flow.outside_key());
        if taken(self, &flow) {
            return Err(Refused::Full);
        }
        flow.expires_ns = now_ns;
        let index = self.free.pop().unwrap_or_else(|| {
            self.flows.push(None);
            self.flows.len() - 1
        });
        self.by_inside.insert(flow.inside_key(), index);
        self.by_outside.insert(flow.outside_key(), index);
        *self.each.entry(flow.inside.0).or_default() += 1;
        if let Some(slot) = self.flows.get_mut(index) {
            *slot = Some(flow);
        }
        Ok(index)
    }

    /// A port on the outside address for a new flow: the guest's own, when it can be had (RFC 4787 REQ-3).
    fn outside_port(&self, transport: Transport, inside: u16, remote: End) -> Result<u16, Refused> {
        let taken = |port: &u16| {
            let forwarded = self.forwards.iter().any(|f| (f.transport, f.outside) == (transport, *port));
            forwarded || self.by_outside.contains_key(&(transport, (Ipv4Address::UNSPECIFIED, *port), remote))
        };
        let span = u32::from(*PORTS.end() - *PORTS.start()) + 1;
        let others = (0..TRIES).map(|step| {
            // Spread, so that two guests with the same run of ports do not meet again and again.
            let offset = (u32::from(inside) + step.wrapping_mul(7919)) % span;
            *PORTS.start() + offset as u16
        });
        // Nobody answers to port 0.
        core::iter::once(inside)
            .filter(|port| *port != 0)
            .chain(others)
            .find(|port| !taken(port))
            .ok_or(Refused::Full)
    }

    /// A packet from an inside address: it gets our outside address `own`. `real` tells where a destination that the inside is shown
    /// really is.
    pub(crate) fn outwards(
        &mut self,
        now_ns: u64,
        packet: &mut [u8],
        own: Ipv4Address,
        real: impl FnOnce(Transport, End) -> End,
    ) -> Result<(), Refused> {
        let Kind::Plain(seen) = kind(packet)? else { return self.error_outwards(packet, own) };
        let Seen { transport, source: inside, destination: shown, .. } = seen;
        let index = match self.by_inside.get(&(transport, inside, shown)) {
            Some(index) => *index,
            // An answer to nothing, and the end of a connection that we know nothing of.
            None if seen.resets || transport == Transport::Icmp && shown.1 != 0 => {
                return Err(Refused::Unasked);
            }
            None => {
                let remote = real(transport, shown);
                let outside = self.outside_port(transport, inside.1, remote)?;
                let flow = Flow {
                    transport,
                    inside,
                    shown,
                    remote,
                    outside,
                    expires_ns: 0,
                    from_inside: true,
                    answered: false,
                    closing: false,
                };
                self.add(now_ns, flow)?
            }
        };
        let flow = self.get(index).ok_or(Refused::Full)?;
        flow.touch(now_ns, &seen, true);
        let flow = *flow;
        rewrite(packet, transport, Which::Source, inside, (own, flow.outside));
        if flow.remote != shown {
            rewrite(packet, transport, Which::Destination, shown, flow.remote);
        }
        Ok(())
    }

    /// A packet to our outside address `own`: the inside address that it goes to now.
    pub(crate) fn inwards(
        &mut self,
        now_ns: u64,
        packet: &mut [u8],
        own: Ipv4Address,
    ) -> Result<Ipv4Address, Refused> {
        let Kind::Plain(seen) = kind(packet)? else { return self.error_inwards(packet, own) };
        let Seen { transport, source: remote, destination, .. } = seen;
        let key = (transport, (Ipv4Address::UNSPECIFIED, destination.1), remote);
        let index = match self.by_outside.get(&key) {
            Some(index) => *index,
            None => {
                let forward = self
                    .forwards
                    .iter()
                    .find(|forward| (forward.transport, forward.outside) == (transport, destination.1))
                    .copied();
                let forward = forward.filter(|_| !seen.resets).ok_or(Refused::Unasked)?;
                let flow = Flow {
                    transport,
                    inside: (forward.to, forward.port),
                    shown: remote,
                    remote,
                    outside: destination.1,
                    expires_ns: 0,
                    from_inside: false,
                    answered: false,
                    closing: false,
                };
                if self.by_inside.contains_key(&flow.inside_key()) {
                    // The guest talks to that very end already, by another port of ours.
                    return Err(Refused::Full);
                }
                self.add(now_ns, flow)?
            }
        };
        let flow = self.get(index).ok_or(Refused::Full)?;
        flow.touch(now_ns, &seen, false);
        let flow = *flow;
        rewrite(packet, transport, Which::Destination, destination, flow.inside);
        if flow.shown != remote {
            rewrite(packet, transport, Which::Source, remote, flow.shown);
        }
        Ok(flow.inside.0)
    }

    /// An error about a packet that came in (RFC 5508 REQ-5).
    fn error_outwards(&mut self, packet: &mut [u8], own: Ipv4Address) -> Result<(), Refused> {
        let (transport, shown, inside) = embedded(packet)?;
        let index = *self.by_inside.get(&(transport, inside, shown)).ok_or(Refused::Unasked)?;
        let flow = *self.get(index).ok_or(Refused::Unasked)?;
        rewrite_error(
            packet,
            transport,
            Which::Destination,
            inside,
            (own, flow.outside),
            (Which::Source, own),
        );
        Ok(())
    }

    /// An error about a packet that went out (RFC 5508 REQ-4).
    fn error_inwards(&mut self, packet: &mut [u8], own: Ipv4Address) -> Result<Ipv4Address, Refused> {
        let (transport, source, remote) = embedded(packet)?;
        if source.0 != own {
            return Err(Refused::Unasked);
        }
        let key = (transport, (Ipv4Address::UNSPECIFIED, source.1), remote);
        let index = *self.by_outside.get(&key).ok_or(Refused::Unasked)?;
        let flow = *self.get(index).ok_or(Refused::Unasked)?;
        let outer = (Which::Destination, flow.inside.0);
        rewrite_error(packet, transport, Which::Source, source, flow.inside, outer);
        Ok(flow.inside.0)
    }
}

#[cfg(test)]
mod tests;

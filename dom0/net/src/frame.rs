//! What the first bytes of a frame say. Nothing here believes a length.

use smoltcp::wire::{EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket};

/// Bytes of a frame that are enough for every decision of a switch: Ethernet, the longest IPv4 header, ports.
pub const HEAD: usize = 14 + 60 + 4;
/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

/// The Ethernet header; `None`: too short to have one.
pub(crate) fn ethernet(frame: &[u8]) -> Option<(EthernetAddress, EthernetAddress, EthernetProtocol)> {
    let (header, _) = frame.split_first_chunk::<ETHERNET>()?;
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, high, low] = *header;
    let to = EthernetAddress([d0, d1, d2, d3, d4, d5]);
    let from = EthernetAddress([s0, s1, s2, s3, s4, s5]);
    Some((to, from, EthernetProtocol::from(u16::from_be_bytes([high, low]))))
}

/// What a filter may ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) protocol: EthernetProtocol,
    /// Of an IPv4 packet, or an ARP message: source and destination.
    pub(crate) addresses: Option<([u8; 4], [u8; 4])>,
    pub(crate) transport: Option<IpProtocol>,
    /// Source and destination, when the packet has them and they are in this fragment.
    pub(crate) ports: Option<(u16, u16)>,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn address(bytes: &[u8], at: usize) -> Option<[u8; 4]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn ports(transport: IpProtocol, bytes: &[u8]) -> Option<(u16, u16)> {
    matches!(transport, IpProtocol::Tcp | IpProtocol::Udp)
        .then(|| word(bytes, 0).zip(word(bytes, 2)))
        .flatten()
}

impl Facts {
    /// Reads the head of a frame; `None`: it is malformed.
    pub(crate) fn of(frame: &[u8]) -> Option<Self> {
        let (_, _, protocol) = ethernet(frame)?;
        let bytes = frame.get(ETHERNET..)?;
        let none = Self { protocol, addresses: None, transport: None, ports: None };
        match protocol {
            EthernetProtocol::Ipv4 => {
                let first = *bytes.first()?;
                let header = usize::from(first & 15) * 4;
                if first >> 4 != 4 || header < 20 || bytes.len() < header {
                    return None;
                }
                let transport = IpProtocol::from(*bytes.get(9)?);
                let later_fragment = word(bytes, 6)? & 0x1fff != 0;
                let ports = if later_fragment { None } else { ports(transport, bytes.get(header..)?) };
                let addresses = address(bytes, 12).zip(address(bytes, 16));
                Some(Self { addresses, transport: Some(transport), ports, ..none })
            }
            EthernetProtocol::Ipv6 => {
                if bytes.len() < 40 || *bytes.first()? >> 4 != 6 {
                    return None;
                }
                let transport = IpProtocol::from(*bytes.get(6)?);
                Some(Self { transport: Some(transport), ports: ports(transport, bytes.get(40..)?), ..none })
            }
            EthernetProtocol::Arp => {
                // For Ethernet and IPv4 only.
                if bytes.get(..6)? != [0, 1, 8, 0, 6, 4] {
                    return None;
                }
                Some(Self { addresses: Some((address(bytes, 14)?, address(bytes, 24)?)), ..none })
            }
            _ => Some(none),
        }
    }
}

/// The destination port of a packet of `protocol`, TCP or UDP, that is whole or the first part.
pub(crate) fn destination_port(ip: &Ipv4Packet<&[u8]>, protocol: IpProtocol) -> Option<u16> {
    let first = ip.payload().get(2..)?.first_chunk().copied().map(u16::from_be_bytes);
    first.filter(|_| ip.next_header() == protocol && ip.frag_offset() == 0)
}

/// Fills in a transport checksum that its sender left blank.
pub(crate) fn complete(packet: &mut [u8]) {
    let Ok(mut ip) = Ipv4Packet::new_checked(packet) else { return };
    let (source, destination) = (ip.src_addr().into(), ip.dst_addr().into());
    match ip.next_header() {
        IpProtocol::Tcp => {
            if let Ok(mut tcp) = TcpPacket::new_checked(ip.payload_mut()) {
                tcp.fill_checksum(&source, &destination);
            }
        }
        IpProtocol::Udp => {
            if let Ok(mut udp) = UdpPacket::new_checked(ip.payload_mut()) {
                udp.fill_checksum(&source, &destination);
            }
        }
        _ => {}
    }
}

/// Where the transport checksum of a frame of IPv4 is: the first byte that it covers beside the pseudo header, and its place from there.
/// `None` for what is no TCP or UDP over IPv4, or not all there.
#[must_use]
pub fn checksum_place(frame: &[u8]) -> Option<(u16, u16)> {
    let facts = Facts::of(frame).filter(|facts| facts.protocol == EthernetProtocol::Ipv4)?;
    let offset = match facts.transport? {
        IpProtocol::Tcp => 16,
        IpProtocol::Udp => 6,
        _ => return None,
    };
    facts.ports?;
    let start = ETHERNET + usize::from(frame.get(ETHERNET)? & 15) * 4;
    // A header is at most 60 bytes.
    (start + offset + 2 <= frame.len()).then_some((start as u16, offset as u16))
}

/// Fills in the transport checksum of a frame that its sender left blank; does nothing to what is no TCP or UDP over IPv4.
pub fn complete_checksum(frame: &mut [u8]) {
    if ethernet(frame).is_some_and(|(.., protocol)| protocol == EthernetProtocol::Ipv4)
        && let Some(packet) = frame.get_mut(ETHERNET..)
    {
        complete(packet);
    }
}

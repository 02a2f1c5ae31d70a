//! Large packets of TCP over IPv4, to be cut into segments that their network carries.
//!
//! What a sender has put together is one header and much payload. Each segment has a copy of the header, with its own length, number
//! and place in the stream, as if the sender had sent it alone (RFC 9293, 3.1; RFC 6864 for the identification).

use crate::frame::{ETHERNET, Facts, ethernet};
use core::ops::Range;
use smoltcp::wire::{EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket};

/// Bytes of a frame that are enough to cut it: Ethernet, and the longest headers of IPv4 and TCP.
pub const SEGMENT_HEAD: usize = ETHERNET + 60 + 60;
/// Most segments of a packet: those of the longest one for the smallest host (RFC 9293, 3.7.1: 536 bytes).
pub const MOST_SEGMENTS: usize = 128;

/// How a packet is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Bytes of all headers.
    headers: usize,
    payload: usize,
    size: usize,
}

impl Segments {
    /// How a frame of `bytes` is cut into segments of at most `size` bytes of payload. `head` are its first bytes,
    /// [`SEGMENT_HEAD`] or all. `None`: it is no whole packet of TCP over IPv4, or it would be more than [`MOST_SEGMENTS`].
    #[must_use]
    pub fn of(head: &[u8], bytes: usize, size: u16) -> Option<Self> {
        let facts = Facts::of(head)?;
        if facts.protocol != EthernetProtocol::Ipv4 || facts.transport != Some(IpProtocol::Tcp) {
            return None;
        }
        let packet = head.get(ETHERNET..)?;
        let ip = Ipv4Packet::new_unchecked(packet);
        let length = bytes.checked_sub(ETHERNET)?;
        let header = usize::from(ip.header_len());
        if ip.more_frags() || ip.frag_offset() != 0 || usize::from(ip.total_len()) != length {
            return None;
        }
        let tcp = packet.get(header..)?.get(..20)?;
        let headers = header + usize::from(TcpPacket::new_unchecked(tcp).header_len());
        if headers < header + 20 || ETHERNET + headers > head.len() {
            return None;
        }
        let payload = length.checked_sub(headers)?;
        let segments = Self { headers: ETHERNET + headers, payload, size: size.into() };
        (size > 0 && payload > 0 && segments.count() <= MOST_SEGMENTS).then_some(segments)
    }

    /// How many there are: at least one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.payload.div_ceil(self.size)
    }

    /// Bytes of the headers of each, Ethernet's included.
    #[must_use]
    pub fn headers(&self) -> usize {
        self.headers
    }

    /// Which bytes of the large frame are the payload of a segment.
    #[must_use]
    pub fn payload(&self, index: usize) -> Range<usize> {
        let start = (index * self.size).min(self.payload);
        let end = (start + self.size).min(self.payload);
        self.headers + start..self.headers + end
    }

    /// Bytes of a segment with its headers.
    #[must_use]
    pub fn bytes(&self, index: usize) -> usize {
        self.headers + self.payload(index).len()
    }

    /// Writes the headers of a segment, from those of the large frame. The transport checksum is left blank.
    pub fn write_headers(&self, head: &[u8], index: usize, to: &mut [u8]) {
        let (Some(from), Some(to)) = (head.get(..self.headers), to.get_mut(..self.headers)) else { return };
        to.copy_from_slice(from);
        let place = self.payload(index);
        let Some(packet) = to.get_mut(ETHERNET..) else { return };
        let mut ip = Ipv4Packet::new_unchecked(packet);
        // Less than the whole packet's, which was in this field.
        ip.set_total_len((self.headers - ETHERNET + place.len()) as u16);
        ip.set_ident(ip.ident().wrapping_add(index as u16));
        ip.fill_checksum();
        let header = usize::from(ip.header_len());
        let Some(tcp) = to.get_mut(ETHERNET + header..) else { return };
        let mut tcp = TcpPacket::new_unchecked(tcp);
        tcp.set_seq_number(tcp.seq_number() + (place.start - self.headers));
        if index + 1 < self.count() {
            tcp.set_fin(false);
            tcp.set_psh(false);
        }
        if index > 0 {
            tcp.set_cwr(false);
        }
    }
}

/// A number for the flow that a frame belongs to: the same for all its frames in one direction.
#[must_use]
pub fn flow_hash(head: &[u8]) -> u32 {
    let Some(facts) = Facts::of(head) else { return 0 };
    let (source, destination) = match facts.addresses {
        Some((source, destination)) => (u32::from_be_bytes(source), u32::from_be_bytes(destination)),
        // Stations, of all that is not IPv4.
        None => ethernet(head).map_or((0, 0), |(to, from, _)| {
            let tail = |address: [u8; 6]| {
                let [.., a, b, c, d] = address;
                u32::from_be_bytes([a, b, c, d])
            };
            (tail(from.0), tail(to.0))
        }),
    };
    // A fragment has no ports, and the first one has: all without, so that they stay together.
    let fragment = facts.protocol == EthernetProtocol::Ipv4
        && head.get(ETHERNET..).is_some_and(|packet| Ipv4Packet::new_unchecked(packet).more_frags());
    let (from, to) = facts.ports.filter(|_| !fragment).unwrap_or_default();
    let word = u64::from(source) << 32 | u64::from(destination);
    let ports = u64::from(from) << 16 | u64::from(to);
    // Multiplication by an odd constant brings every bit upward; the upper half is taken.
    let mixed = (word ^ ports.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (mixed >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::{MOST_SEGMENTS, Segments, flow_hash};
    use crate::complete_checksum;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{
        IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    };

    const FROM: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
    const TO: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);

    /// A packet whose payload tells where a byte belongs.
    fn packet(payload: usize, fin: bool) -> Vec<u8> {
        let data: Vec<u8> = (0..payload).map(|at| (at ^ at >> 8) as u8).collect();
        let tcp = TcpRepr {
            src_port: 1000,
            dst_port: 80,
            control: if fin { TcpControl::Fin } else { TcpControl::Psh },
            seq_number: TcpSeqNumber(-5),
            ack_number: Some(TcpSeqNumber(77)),
            window_len: 4000,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &data,
        };
        let ip = Ipv4Repr {
            src_addr: FROM,
            dst_addr: TO,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        frame.resize(14 + 20 + tcp.buffer_len(), 0);
        let all = ChecksumCapabilities::default();
        let mut bytes = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.emit(&mut bytes, &all);
        tcp.emit(&mut TcpPacket::new_unchecked(bytes.payload_mut()), &FROM.into(), &TO.into(), &all);
        frame
    }

    fn cut(frame: &[u8], size: u16) -> Option<Vec<Vec<u8>>> {
        let head = &frame[..frame.len().min(super::SEGMENT_HEAD)];
        let segments = Segments::of(head, frame.len(), size)?;
        let one = |index| {
            let mut segment = vec![0xee; segments.bytes(index)];
            segments.write_headers(head, index, &mut segment);
            segment[segments.headers()..].copy_from_slice(&frame[segments.payload(index)]);
            complete_checksum(&mut segment);
            segment
        };
        Some((0..segments.count()).map(one).collect())
    }

    proptest! {
        #[test]
        fn segments_are_the_stream_in_order(payload in 1..65000usize, size in 512..20000u16, fin: bool) {
            let whole = packet(payload, fin);
            let segments = cut(&whole, size).unwrap();
            let count = segments.len();
            prop_assert_eq!(count, payload.div_ceil(size.into()));
            let mut stream = Vec::new();
            for (index, segment) in segments.iter().enumerate() {
                let ip = Ipv4Packet::new_checked(&segment[14..]).unwrap();
                prop_assert!(ip.verify_checksum() && usize::from(ip.total_len()) + 14 == segment.len());
                let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
                prop_assert!(tcp.verify_checksum(&FROM.into(), &TO.into()));
                prop_assert_eq!(tcp.seq_number(), TcpSeqNumber(-5) + stream.len());
                prop_assert_eq!(tcp.ack_number(), TcpSeqNumber(77));
                let last = index + 1 == count;
                prop_assert_eq!((tcp.fin(), tcp.psh()), (fin && last, !fin && last));
                prop_assert!(last || tcp.payload().len() == usize::from(size));
                stream.extend_from_slice(tcp.payload());
            }
            prop_assert_eq!(&stream[..], &whole[54..]);
        }

        #[test]
        fn nothing_panics(head in prop::collection::vec(any::<u8>(), 0..140), bytes in 0..70000usize, size: u16) {
            if let Some(segments) = Segments::of(&head, bytes, size) {
                prop_assert!((1..=MOST_SEGMENTS).contains(&segments.count()));
            }
            let _ = flow_hash(&head);
        }
    }

    #[test]
    fn what_is_no_such_packet_is_not_cut() {
        let whole = packet(3000, false);
        assert_eq!(cut(&whole, 1460).map(|segments| segments.len()), Some(3));
        assert_eq!(cut(&whole, 3000).map(|segments| segments.len()), Some(1));
        assert_eq!(cut(&whole, u16::MAX).map(|segments| segments.len()), Some(1), "larger than the packet");
        assert_eq!(cut(&whole, 0), None, "segments without bytes");
        assert_eq!(cut(&packet(65000, false), 100), None, "too many");
        let changed = |at: usize, value: u8| {
            let mut frame = whole.clone();
            frame[at] = value;
            cut(&frame, 1460)
        };
        assert_eq!(changed(12, 0x86), None, "another protocol than IPv4");
        assert_eq!(changed(23, 17), None, "UDP");
        assert_eq!(changed(17, 0), None, "a length that is not the frame's");
        assert_eq!(changed(20, 0x20), None, "a fragment with more behind it");
        assert_eq!(changed(21, 1), None, "a later fragment");
        assert_eq!(changed(14, 0x44), None, "a header of 16 bytes");
        assert_eq!(changed(14 + 20 + 12, 0x40), None, "a TCP header of 16 bytes");
        assert_eq!(cut(&packet(0, true), 1460), None, "nothing to cut");
    }

    #[test]
    fn flows_differ_and_stay_together() {
        let frame = packet(10, false);
        let hash = flow_hash(&frame);
        assert_eq!(hash, flow_hash(&packet(500, true)));
        let mut buckets = [0; 4];
        for port in 0..200u16 {
            let mut other = frame.clone();
            other[34..36].copy_from_slice(&port.to_be_bytes());
            buckets[flow_hash(&other) as usize % 4] += 1;
        }
        assert!(buckets.iter().all(|count| (20..=80).contains(count)), "{buckets:?}");
        let mut first = frame.clone();
        first[20] = 0x20;
        let mut later = first.clone();
        later[21] = 9;
        later[34] ^= 1;
        assert_eq!(flow_hash(&first), flow_hash(&later), "fragments of one packet");
    }
}

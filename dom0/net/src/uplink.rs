//! An address outside, by DHCP: smoltcp's client over frames.

use crate::frame::{self, ETHERNET, destination_port};
use crate::router::Outside;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::dhcpv4;
use smoltcp::time::Instant;
use smoltcp::wire::{ArpOperation, ArpPacket, EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet};

const CLIENT: u16 = 68;
/// The longest frame that is looked at.
const FRAME: usize = 1514;
/// Frames that wait to be looked at: more than the answers of all servers that anybody has.
const WAITING: usize = 8;

/// Frames on their way in and out.
#[derive(Debug, Default)]
struct Queues {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        work(&self.0)
    }
}

struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, work: F) -> R {
        let mut frame = vec![0; length];
        let result = work(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sent<'_>)> {
        self.received.pop_front().map(|frame| (Received(frame), Sent(&mut self.sent)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities
    }
}

/// A card's address outside, asked for and kept.
pub struct Uplink {
    interface: Interface,
    sockets: SocketSet<'static>,
    client: SocketHandle,
    queues: Queues,
    found: Option<Outside>,
}

impl fmt::Debug for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uplink").field("found", &self.found).finish_non_exhaustive()
    }
}

/// smoltcp counts microseconds in an `i64`: enough for 292,000 years.
fn instant(now_ns: u64) -> Instant {
    Instant::from_micros((now_ns / 1000) as i64)
}

impl Uplink {
    /// A client for a card; `None` when `card` is no card's address. `seed` should differ from boot to boot.
    #[must_use]
    pub fn new(card: EthernetAddress, seed: u64, now_ns: u64) -> Option<Self> {
        if !card.is_unicast() {
            return None;
        }
        let mut queues = Queues::default();
        let mut config = Config::new(card.into());
        config.random_seed = seed;
        let interface = Interface::new(config, &mut queues, instant(now_ns));
        let mut sockets = SocketSet::new(vec![]);
        let client = sockets.add(dhcpv4::Socket::new());
        Some(Self { interface, sockets, client, queues, found: None })
    }

    /// Gives the client the address that it has found: it asks its server by that.
    fn place(&mut self) {
        let found = self.found;
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // There is room for more than one.
            let _ = found.map(|found| addresses.push(found.address.into()));
        });
        match found.and_then(|found| found.gateway) {
            Some(gateway) => {
                let _ = self.interface.routes_mut().add_default_ipv4_route(gateway);
            }
            None => drop(self.interface.routes_mut().remove_default_ipv4_route()),
        }
    }

    /// Takes a frame from outside if it is for a DHCP client, and a copy of ARP's answers; false: it is for others, or for others too.
    pub fn take(&mut self, frame: &[u8]) -> bool {
        if frame::ethernet(frame).is_some_and(|(.., protocol)| protocol == EthernetProtocol::Arp) {
            let arp = frame.get(ETHERNET..).and_then(|bytes| ArpPacket::new_checked(bytes).ok());
            // Questions are the router's to answer.
            let answer = arp.is_some_and(|arp| arp.operation() == ArpOperation::Reply);
            if answer && self.queues.received.len() < WAITING {
                self.queues.received.push_back(frame.to_vec());
            }
            return false;
        }
        let packet = frame.get(ETHERNET..).and_then(|bytes| Ipv4Packet::new_checked(bytes).ok());
        let wanted = packet.is_some_and(|ip| destination_port(&ip, IpProtocol::Udp) == Some(CLIENT));
        if wanted && frame.len() <= FRAME && self.queues.received.len() < WAITING {
            self.queues.received.push_back(frame.to_vec());
        }
        wanted
    }

    /// Does what is to be done, sending frames with `out`. Returns where we are outside when that has changed (`Some(None)`:
    /// nowhere any more), and when to call again at the latest, ns; sooner after a frame was taken.
    pub fn poll(&mut self, now_ns: u64, out: &mut dyn FnMut(&[u8])) -> (Option<Option<Outside>>, u64) {
        let now = instant(now_ns);
        self.interface.poll(now, &mut self.queues, &mut self.sockets);
        let before = self.found;
        let client = self.sockets.get_mut::<dhcpv4::Socket<'_>>(self.client);
        match client.poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                let dns = config.dns_servers.first().copied();
                self.found = Some(Outside { address: config.address, gateway: config.router, dns });
            }
            Some(dhcpv4::Event::Deconfigured) => self.found = None,
            None => {}
        }
        if before != self.found {
            self.place();
        }
        for frame in self.queues.sent.drain(..) {
            out(&frame);
        }
        let delay = self.interface.poll_delay(now, &self.sockets);
        let next =
            delay.map_or(u64::MAX, |delay| now_ns.saturating_add(delay.total_micros().saturating_mul(1000)));
        ((before != self.found).then_some(self.found), next)
    }
}

#[cfg(test)]
mod tests {
    use super::Uplink;
    use crate::router::{Checksum, Outside, Router, Side};
    use alloc::vec::Vec;
    use smoltcp::wire::{EthernetAddress, Ipv4Address, Ipv4Cidr};

    const CARD: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 9]);
    const OURS: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    /// Lets both talk until neither has anything to say; returns what the client found.
    fn talk(uplink: &mut Uplink, router: &mut Router, now_ns: u64) -> (Vec<Option<Outside>>, u64) {
        let (mut found, mut next) = (Vec::new(), 0);
        for _ in 0..10 {
            let mut frames = Vec::new();
            let (change, at) = uplink.poll(now_ns, &mut |frame| frames.push(frame.to_vec()));
            found.extend(change);
            next = at;
            for frame in &mut frames {
                router.handle(now_ns, Side::Inside, frame, Checksum::Complete, &mut |_, answer| {
                    uplink.take(answer);
                });
            }
        }
        (found, next)
    }

    #[test]
    fn an_address_is_found_kept_and_lost() {
        let gateway = Ipv4Address::new(192, 168, 9, 1);
        let mut router = Router::new(Ipv4Cidr::new(gateway, 24), OURS, OURS);
        let address = router.lease(CARD, None).unwrap();
        let mut uplink = Uplink::new(CARD, 7, 0).unwrap();
        let ours =
            Outside { address: Ipv4Cidr::new(address, 24), gateway: Some(gateway), dns: Some(gateway) };
        let (found, mut next) = talk(&mut uplink, &mut router, 0);
        assert_eq!(found, [Some(ours)]);
        // Renewed whenever it asks for that.
        for _ in 0..5 {
            assert!(next > 0 && next < u64::MAX);
            let (found, later) = talk(&mut uplink, &mut router, next);
            assert_eq!(found, []);
            assert!(later > next);
            next = later;
        }
        // Until nobody answers.
        router.release(CARD);
        let lost = (0..4000).find_map(|_| {
            let (found, later) = talk(&mut uplink, &mut router, next);
            next = later;
            found.first().copied()
        });
        assert_eq!(lost, Some(None));
        router.lease(CARD, None).unwrap();
        let again = (0..20).find_map(|_| {
            let (found, later) = talk(&mut uplink, &mut router, next);
            next = later;
            found.first().copied()
        });
        assert_eq!(again, Some(Some(ours)));
    }

    #[test]
    fn other_frames_are_left_alone() {
        let mut uplink = Uplink::new(CARD, 7, 0).unwrap();
        assert!(Uplink::new(EthernetAddress::BROADCAST, 7, 0).is_none());
        let mut asked = Vec::new();
        uplink.poll(0, &mut |frame| asked = frame.to_vec());
        assert!(!asked.is_empty() && !uplink.take(&asked), "for a server");
        for length in 0..asked.len() {
            assert!(!uplink.take(asked.get(..length).unwrap()));
        }
    }
}

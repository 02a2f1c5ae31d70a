//! A router with its place outside: what is for the router's own DHCP client goes there, everything else through.

use crate::router::{Checksum, Outside, Router, Side};
use crate::uplink::Uplink;
use smoltcp::wire::{EthernetAddress, Ipv4Cidr};

/// Time between two looks at what the router waits for, ns.
const LOOK_NS: u64 = 1_000_000_000;

/// How a router gets its place outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It has none: nothing leads outside.
    Nowhere,
    /// It asks by DHCP. The number should differ from boot to boot.
    Dhcp(u64),
    /// It was told.
    Fixed(Outside),
}

/// A router, and how it comes to its address outside.
#[derive(Debug)]
pub struct Gateway {
    router: Router,
    uplink: Option<Uplink>,
    /// When the router looks again, and when the client does.
    due_ns: (u64, u64),
}

impl Gateway {
    /// A router with the address of `inside` in that network, and these MAC addresses.
    #[must_use]
    pub fn new(
        inside: Ipv4Cidr,
        mac: EthernetAddress,
        outside_mac: EthernetAddress,
        place: Place,
        now_ns: u64,
    ) -> Self {
        let mut router = Router::new(inside, mac, outside_mac);
        let uplink = match place {
            Place::Nowhere => None,
            Place::Dhcp(seed) => Uplink::new(outside_mac, seed, now_ns),
            Place::Fixed(outside) => {
                router.set_outside(Some(outside));
                None
            }
        };
        Self { router, uplink, due_ns: (now_ns, now_ns) }
    }

    /// The router: its leases, forwarded ports, connections.
    #[must_use]
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The router, to change leases and forwarded ports.
    pub fn router_mut(&mut self) -> &mut Router {
        &mut self.router
    }

    /// Takes a frame from one side, whole; `out` is called with each frame that follows from it.
    pub fn handle(
        &mut self,
        now_ns: u64,
        side: Side,
        frame: &mut [u8],
        checksum: Checksum,
        out: &mut dyn FnMut(Side, &[u8]),
    ) {
        if let (Side::Outside, Some(uplink)) = (side, &mut self.uplink) {
            if uplink.take(frame) {
                self.due_ns.1 = now_ns;
                self.poll(now_ns, out);
                return;
            }
            // An answer that the client may wait for, too.
            self.due_ns.1 = self.due_ns.1.min(now_ns.saturating_add(LOOK_NS));
        }
        self.router.handle(now_ns, side, frame, checksum, out);
    }

    /// Does what time brings; returns when to call again at the latest, ns.
    pub fn poll(&mut self, now_ns: u64, out: &mut dyn FnMut(Side, &[u8])) -> u64 {
        if now_ns >= self.due_ns.0 {
            self.router.poll(now_ns, out);
            self.due_ns.0 = now_ns.saturating_add(LOOK_NS);
        }
        if let Some(uplink) = &mut self.uplink
            && now_ns >= self.due_ns.1
        {
            let (found, next) = uplink.poll(now_ns, &mut |frame| out(Side::Outside, frame));
            if let Some(found) = found {
                self.router.set_outside(found);
            }
            self.due_ns.1 = next;
        }
        if self.uplink.is_some() { self.due_ns.0.min(self.due_ns.1) } else { self.due_ns.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{Gateway, Place};
    use crate::router::{Checksum, Outside, Router, Side};
    use alloc::vec::Vec;
    use smoltcp::wire::{EthernetAddress, Ipv4Address, Ipv4Cidr};

    const INSIDE: EthernetAddress = EthernetAddress([2, 0, 0, 0, 1, 1]);
    const OUTSIDE: EthernetAddress = EthernetAddress([2, 0, 0, 0, 1, 2]);
    const SERVER: EthernetAddress = EthernetAddress([2, 0, 0, 0, 2, 1]);
    const SECOND_NS: u64 = 1_000_000_000;

    /// The network outside is another router's inside.
    fn world() -> (Gateway, Router, Outside) {
        let above = Ipv4Address::new(192, 168, 9, 1);
        let mut server = Router::new(Ipv4Cidr::new(above, 24), SERVER, SERVER);
        let address = server.lease(OUTSIDE, None).unwrap();
        let inside = Ipv4Cidr::new(Ipv4Address::new(10, 77, 0, 1), 24);
        let gateway = Gateway::new(inside, INSIDE, OUTSIDE, Place::Dhcp(5), 0);
        (
            gateway,
            server,
            Outside { address: Ipv4Cidr::new(address, 24), gateway: Some(above), dns: Some(above) },
        )
    }

    /// Lets both talk until neither has anything to say; when the gateway wants to be called again.
    fn talk(gateway: &mut Gateway, server: &mut Router, now_ns: u64) -> u64 {
        loop {
            let mut sent = Vec::new();
            let next = gateway.poll(now_ns, &mut |side, frame| {
                assert_eq!(side, Side::Outside);
                sent.push(frame.to_vec());
            });
            let mut answers = Vec::new();
            for frame in &mut sent {
                let mut out = |_: Side, frame: &[u8]| answers.push(frame.to_vec());
                server.handle(now_ns, Side::Inside, frame, Checksum::Complete, &mut out);
            }
            for frame in &mut answers {
                let mut out = |_: Side, frame: &[u8]| sent.push(frame.to_vec());
                gateway.handle(now_ns, Side::Outside, frame, Checksum::Complete, &mut out);
                // What it says at once is for the server, too.
                for frame in &mut sent {
                    server.handle(now_ns, Side::Inside, frame, Checksum::Complete, &mut |_, _| {});
                }
            }
            if answers.is_empty() {
                return next;
            }
        }
    }

    #[test]
    fn a_router_finds_its_place_and_keeps_it() {
        let (mut gateway, mut server, outside) = world();
        assert_eq!(gateway.router().outside(), None);
        let mut now = 0;
        for _ in 0..20 {
            let next = talk(&mut gateway, &mut server, now);
            assert!(next > now && next <= now + SECOND_NS, "the router looks every second");
            now = next;
        }
        assert_eq!(gateway.router().outside(), Some(outside));
        // A day later, it has renewed its lease again and again.
        for _ in 0..(86_400 / 50) {
            now += 50 * SECOND_NS;
            talk(&mut gateway, &mut server, now);
        }
        assert_eq!(gateway.router().outside(), Some(outside));
    }

    #[test]
    fn a_router_may_be_told_its_place() {
        let (_, _, outside) = world();
        let inside = Ipv4Cidr::new(Ipv4Address::new(10, 77, 0, 1), 24);
        for (place, expected) in [(Place::Nowhere, None), (Place::Fixed(outside), Some(outside))] {
            let mut gateway = Gateway::new(inside, INSIDE, OUTSIDE, place, 0);
            let next = gateway.poll(0, &mut |_, _| panic!("there is nothing to say"));
            assert_eq!((gateway.router().outside(), next), (expected, SECOND_NS));
        }
    }
}

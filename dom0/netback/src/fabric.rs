//! Switches, routers between them, and the machine's own network cards.
//!
//! What dom0 itself does with a frame, done to the end: a router's answer goes back to the switch that its question came from, what it passes
//! on goes to the switch outside, and from there to the wire. Nothing waits in here, and nothing is called again from what it has called.

use crate::network::{Arrived, Beyond, Carried, Features, Network, Turn, Unfinished};
use alloc::vec::Vec;
use guest_sdk::copy::Copier;
use guest_sdk::ring::SharedPage;
use netswitch::{AttachError, EthernetAddress, Gateway, Port, PortId, Side};

/// A network card of the machine's, to send with. What comes in is brought to [`Fabric::arrived`].
pub trait Wire {
    /// Its address.
    fn address(&self) -> EthernetAddress;

    /// What it can do by itself: leave to it only that.
    fn takes(&self) -> Features;

    /// Sends a frame; one that it has no room for is lost, as on any network.
    fn send(&mut self, frame: &[u8], unfinished: Unfinished);

    /// Sends a frame out of memory of its own, which the frame is written to; false when it has none for that, or not all of the frame is at
    /// hand: then nothing was sent.
    fn carry(&mut self, _frame: &mut dyn Carried, _unfinished: Unfinished) -> bool {
        false
    }

    /// Tells it of all that was to be sent, once for many.
    fn flush(&mut self);
}

/// A switch of a [`Fabric`]. After it was removed, another one may have its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SwitchId(usize);

/// A card of the machine's in a [`Fabric`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WireId(usize);

/// A router in a [`Fabric`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayId(usize);

/// What is behind a port of dom0's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Gateway(usize, Side),
    Wire(usize),
}

struct Lane<M> {
    network: Network<M>,
    behind: Vec<(PortId, Behind)>,
}

struct Router {
    gateway: Gateway,
    /// Its switches and its ports there.
    inside: (usize, PortId),
    outside: Option<(usize, PortId)>,
}

struct Cable<W> {
    wire: W,
    /// The switch that it is a port of.
    at: Option<(usize, PortId)>,
    /// Something is to be flushed.
    used: bool,
}

/// What something has led to, on all switches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Queues whose guests want to be notified.
    pub notify: Vec<(SwitchId, PortId, usize)>,
    /// Cards whose guests broke a ring that frames went to: their next turn fails.
    pub broken: Vec<(SwitchId, PortId)>,
}

impl Outcome {
    /// Of a turn on one switch.
    #[must_use]
    pub fn of(switch: SwitchId, turn: Turn) -> Self {
        let mut outcome = Self::default();
        outcome.add(switch.0, &turn);
        outcome
    }

    fn add(&mut self, switch: usize, turn: &Turn) {
        let switch = SwitchId(switch);
        for &(port, queue) in &turn.notify {
            if !self.notify.contains(&(switch, port, queue)) {
                self.notify.push((switch, port, queue));
            }
        }
        self.broken.extend(turn.broken.iter().map(|port| (switch, *port)));
    }

    /// Nothing any more.
    pub fn clear(&mut self) {
        self.notify.clear();
        self.broken.clear();
    }
}

/// A frame of a router's on its way.
struct Onward {
    gateway: usize,
    side: Side,
    frame: Vec<u8>,
}

/// All switches, with what is between them and the outside.
pub struct Fabric<M, W> {
    lanes: Vec<Option<Lane<M>>>,
    routers: Vec<Router>,
    cables: Vec<Cable<W>>,
    // Kept for its memory.
    onward: Vec<Onward>,
}

impl<M: SharedPage, W: Wire> Default for Fabric<M, W> {
    fn default() -> Self {
        Self::new()
    }
}

/// Takes what comes to ports of dom0's own on one switch.
struct Taker<'a, W> {
    now_ns: u64,
    behind: &'a [(PortId, Behind)],
    routers: &'a mut [Router],
    cables: &'a mut [Cable<W>],
    onward: &'a mut Vec<Onward>,
}

impl<W> Taker<'_, W> {
    fn behind(&self, port: PortId) -> Option<Behind> {
        self.behind.iter().find(|(other, _)| *other == port).map(|(_, behind)| *behind)
    }
}

impl<W: Wire> Beyond for Taker<'_, W> {
    fn take(&mut self, to: PortId, frame: &mut [u8], unfinished: Unfinished) {
        match self.behind(to) {
            Some(Behind::Gateway(gateway, side)) => {
                let Some(router) = self.routers.get_mut(gateway) else { return };
                let onward = &mut *self.onward;
                router.gateway.handle(self.now_ns, side, frame, unfinished.checksum, &mut |side, frame| {
                    onward.push(Onward { gateway, side, frame: frame.to_vec() });
                });
            }
            Some(Behind::Wire(wire)) => {
                let Some(cable) = self.cables.get_mut(wire) else { return };
                cable.wire.send(frame, unfinished);
                cable.used = true;
            }
            // A guest's port without a guest.
            None => {}
        }
    }

    fn carry(&mut self, to: PortId, unfinished: Unfinished, frame: &mut dyn Carried) -> bool {
        let Some(Behind::Wire(wire)) = self.behind(to) else { return false };
        let Some(cable) = self.cables.get_mut(wire) else { return false };
        let carried = cable.wire.carry(frame, unfinished);
        cable.used |= carried;
        carried
    }
}

impl<M: SharedPage, W: Wire> Fabric<M, W> {
    /// One without switches.
    #[must_use]
    pub fn new() -> Self {
        Self { lanes: Vec::new(), routers: Vec::new(), cables: Vec::new(), onward: Vec::new() }
    }

    /// Adds a switch that leads nowhere.
    pub fn add_switch(&mut self) -> SwitchId {
        let lane = Lane { network: Network::new(), behind: Vec::new() };
        match self.lanes.iter_mut().position(|lane| lane.is_none()) {
            Some(free) => {
                if let Some(place) = self.lanes.get_mut(free) {
                    *place = Some(lane);
                }
                SwitchId(free)
            }
            None => {
                self.lanes.push(Some(lane));
                SwitchId(self.lanes.len() - 1)
            }
        }
    }

    /// Removes a switch that no router and no card of the machine's is on; its ports are gone.
    pub fn remove_switch(&mut self, switch: SwitchId) {
        if let Some(place) = self.lanes.get_mut(switch.0)
            && place.as_ref().is_some_and(|lane| lane.behind.is_empty())
        {
            *place = None;
        }
    }

    /// A switch's network, for its ports and counters.
    #[must_use]
    pub fn network(&self, switch: SwitchId) -> Option<&Network<M>> {
        self.lanes.get(switch.0)?.as_ref().map(|lane| &lane.network)
    }

    /// A switch's network, to attach and connect guests' cards.
    pub fn network_mut(&mut self, switch: SwitchId) -> Option<&mut Network<M>> {
        self.lanes.get_mut(switch.0)?.as_mut().map(|lane| &mut lane.network)
    }

    /// Adds a card of the machine's, which is on no switch yet.
    pub fn add_wire(&mut self, wire: W) -> WireId {
        self.cables.push(Cable { wire, at: None, used: false });
        WireId(self.cables.len() - 1)
    }

    /// Makes a card of the machine's a port of a switch: guests there are on the network outside.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn bridge(&mut self, switch: SwitchId, wire: WireId) -> Result<(), AttachError> {
        let Some(cable) = self.cables.get_mut(wire.0) else { return Ok(()) };
        let Some(Some(lane)) = self.lanes.get_mut(switch.0) else { return Ok(()) };
        let port = lane.network.attach(Port::trunk())?;
        lane.network.set_local(port, cable.wire.takes());
        lane.behind.push((port, Behind::Wire(wire.0)));
        cable.at = Some((switch.0, port));
        Ok(())
    }

    /// Puts a router between two switches, with these MAC addresses; without one outside it serves only inside.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn add_gateway(
        &mut self,
        gateway: Gateway,
        inside: (SwitchId, EthernetAddress),
        outside: Option<(SwitchId, EthernetAddress)>,
    ) -> Result<GatewayId, AttachError> {
        let number = self.routers.len();
        let inside = self.attach_gateway(number, Side::Inside, inside)?;
        let outside =
            outside.map(|outside| self.attach_gateway(number, Side::Outside, outside)).transpose()?;
        self.routers.push(Router { gateway, inside, outside });
        Ok(GatewayId(number))
    }

    fn attach_gateway(
        &mut self,
        number: usize,
        side: Side,
        (switch, address): (SwitchId, EthernetAddress),
    ) -> Result<(usize, PortId), AttachError> {
        let Some(Some(lane)) = self.lanes.get_mut(switch.0) else { return Err(AttachError::NotUnicast) };
        let port = lane.network.attach(Port::guest(address))?;
        // It makes checksums itself where it changes what they are about.
        lane.network.set_local(port, Features { blank_checksums: true, ..Features::default() });
        lane.behind.push((port, Behind::Gateway(number, side)));
        Ok((switch.0, port))
    }

    /// The router that serves a switch, if one does.
    #[must_use]
    pub fn gateway(&self, switch: SwitchId) -> Option<&Gateway> {
        self.routers.iter().find(|router| router.inside.0 == switch.0).map(|router| &router.gateway)
    }

    /// The router that serves a switch, to change leases and forwarded ports.
    pub fn gateway_mut(&mut self, switch: SwitchId) -> Option<&mut Gateway> {
        self.routers.iter_mut().find(|router| router.inside.0 == switch.0).map(|router| &mut router.gateway)
    }

    /// The machine's card that a switch has.
    #[must_use]
    pub fn wire(&self, switch: SwitchId) -> Option<&W> {
        let here = |cable: &&Cable<W>| cable.at.is_some_and(|(at, _)| at == switch.0);
        self.cables.iter().find(here).map(|cable| &cable.wire)
    }

    /// Takes what a queue of a guest's card has sent and brings it where it goes; whom the turn notifies is added to the outcome.
    pub fn turn(
        &mut self,
        now_ns: u64,
        switch: SwitchId,
        port: PortId,
        queue: usize,
        copier: &mut impl Copier,
        outcome: &mut Outcome,
    ) -> Turn {
        let Self { lanes, routers, cables, onward } = self;
        let Some(Some(lane)) = lanes.get_mut(switch.0) else { return Turn::default() };
        let turn = {
            let mut taker = Taker { now_ns, behind: &lane.behind, routers, cables, onward };
            lane.network.turn(now_ns, port, queue, copier, &mut taker)
        };
        let (more, closed, until_ns) = (turn.more, turn.closed, turn.until_ns);
        outcome.add(switch.0, &turn);
        lane.network.reuse(turn);
        self.finish(now_ns, copier, outcome);
        Turn { more, closed, until_ns, ..Turn::default() }
    }

    /// Brings what waits for a queue of a guest's card, and takes nothing of what it has sent.
    pub fn refill(
        &mut self,
        now_ns: u64,
        switch: SwitchId,
        port: PortId,
        queue: usize,
        copier: &mut impl Copier,
    ) -> Outcome {
        let network = self.network_mut(switch);
        let turn = network.map(|network| network.refill(now_ns, port, queue, copier));
        Outcome::of(switch, turn.unwrap_or_default())
    }

    /// Brings frames that came in from outside where they go; whom that notifies is added to the outcome.
    pub fn arrived<'a>(
        &mut self,
        now_ns: u64,
        wire: WireId,
        frames: impl IntoIterator<Item = Arrived<'a>>,
        copier: &mut impl Copier,
        outcome: &mut Outcome,
    ) {
        let Self { lanes, routers, cables, onward } = self;
        let Some((switch, port)) = cables.get(wire.0).and_then(|cable| cable.at) else { return };
        let Some(Some(lane)) = lanes.get_mut(switch) else { return };
        let turn = {
            let mut taker = Taker { now_ns, behind: &lane.behind, routers, cables, onward };
            lane.network.arrive(now_ns, port, frames, copier, &mut taker)
        };
        outcome.add(switch, &turn);
        lane.network.reuse(turn);
        self.finish(now_ns, copier, outcome);
    }

    /// Does what time brings to routers; also says when to call again at the latest, ns.
    pub fn poll(&mut self, now_ns: u64, copier: &mut impl Copier) -> (Outcome, u64) {
        let (mut outcome, mut next) = (Outcome::default(), u64::MAX);
        for (gateway, router) in self.routers.iter_mut().enumerate() {
            let onward = &mut self.onward;
            let again = router.gateway.poll(now_ns, &mut |side, frame| {
                onward.push(Onward { gateway, side, frame: frame.to_vec() });
            });
            next = next.min(again);
        }
        self.finish(now_ns, copier, &mut outcome);
        (outcome, next)
    }

    fn send<F: AsRef<[u8]>>(
        &mut self,
        now_ns: u64,
        (switch, port): (usize, PortId),
        frames: &[F],
        copier: &mut impl Copier,
        outcome: &mut Outcome,
    ) {
        let Self { lanes, routers, cables, onward } = self;
        let Some(Some(lane)) = lanes.get_mut(switch) else { return };
        let mut taker = Taker { now_ns, behind: &lane.behind, routers, cables, onward };
        let turn = lane.network.send(now_ns, port, frames, copier, &mut taker);
        outcome.add(switch, &turn);
        lane.network.reuse(turn);
    }

    /// Brings what routers have said where it goes, until nobody says any more, and tells the wires.
    fn finish(&mut self, now_ns: u64, copier: &mut impl Copier, outcome: &mut Outcome) {
        // A router answers what it gets with less, so this ends; two that talk to each other for ever are stopped.
        for _ in 0..64 {
            if self.onward.is_empty() {
                break;
            }
            let onward = core::mem::take(&mut self.onward);
            for run in onward.chunk_by(|one, two| (one.gateway, one.side) == (two.gateway, two.side)) {
                let Some(first) = run.first() else { continue };
                let place = self.routers.get(first.gateway).and_then(|router| match first.side {
                    Side::Inside => Some(router.inside),
                    Side::Outside => router.outside,
                });
                let frames: Vec<&[u8]> = run.iter().map(|onward| &onward.frame[..]).collect();
                if let Some(place) = place {
                    self.send(now_ns, place, &frames, copier, outcome);
                }
            }
        }
        self.onward.clear();
        for cable in &mut self.cables {
            if core::mem::take(&mut cable.used) {
                cable.wire.flush();
            }
        }
    }
}

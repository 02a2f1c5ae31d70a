//! Virtual network cards, and the switches that they are on.
//!
//! A task for each queue takes what its guest sends and brings it where it goes; the others are only notified. One more lets routers
//! do what time brings.

use super::carrier::{CardPages, Carrier, Keeping};
use super::device::{Device, Kind, Link, Nodes};
use crate::accounts::Traffic;
use crate::cards::{CardSpec, mac_text};
use crate::devices::NetDevice;
use crate::switches::{self, SwitchSpec};
use crate::table::{Align, Table};
use crate::waiting::{First, first};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};
use guest_sdk::events::{Channel, Notifier};
use guest_sdk::grants::Mapping;
use guest_sdk::{control, executor, time};
use hashbrown::HashMap;
use hypercall_abi::io::netif::keys;
use hypercall_abi::{GrantRef, PAGE_SIZE, Port as EventPort};
use netback::control::{Control, KEPT};
use netback::fabric::{Fabric, Outcome, SwitchId, Wire, WireId};
use netback::network::{Features, Missed, Network, QUEUES, STAGING_BYTES, Unfinished};
use netswitch::{
    AttachError, Bucket, Checksum, Connection, Counters, Drops, EthernetAddress, Filter, Forward, Gateway,
    Ipv4Address, Outside, Place, Port, PortId,
};
use spin::{Lazy, Mutex};
use virtio::net::{About, Checksum as CardChecksum};

/// A virtual network card.
pub type Vif = Device<Card>;

/// Bytes that a card with a limit may send at once: what one turn takes of the longest usual frames.
const BURST: u64 = 64 * 1514;

/// Frames of the machine's card that are taken at once.
const AT_ONCE: usize = 64;

/// A card of the machine's as a wire.
struct Cable(Arc<NetDevice>);

impl Wire for Cable {
    fn address(&self) -> EthernetAddress {
        EthernetAddress(self.0.mac())
    }

    fn takes(&self) -> Features {
        Features { blank_checksums: self.0.offloads().send_checksum, ..Features::default() }
    }

    fn send(&mut self, frame: &[u8], unfinished: Unfinished) {
        let mut about = About::default();
        if unfinished.checksum == Checksum::Blank {
            let Some((start, offset)) = netswitch::checksum_place(frame) else { return };
            about.checksum = CardChecksum::Blank { start, offset };
        }
        // What it has no room for is lost.
        let _ = self.0.send(about, frame);
    }

    fn flush(&mut self) {
        self.0.kick();
    }
}

/// Brings what comes in by a card of the machine's where it goes.
async fn hear(card: Arc<NetDevice>, wire: WireId) {
    let mut came = Vec::new();
    loop {
        card.frames(AT_ONCE, &mut came).await;
        let finish = |(mut frame, about): (Vec<u8>, About)| {
            if matches!(about.checksum, CardChecksum::Blank { .. }) {
                netswitch::complete_checksum(&mut frame);
            }
            frame
        };
        let frames: Vec<Vec<u8>> = came.drain(..).map(finish).collect();
        {
            let mut net = NET.lock();
            let Net { fabric, staging, links, .. } = &mut *net;
            let outcome = fabric.arrived(time::now_ns(), wire, &frames, staging);
            tell(links, &outcome);
        }
        // Others get their turn, however much comes in.
        executor::yield_now().await;
    }
}

/// A switch by its name.
struct Named {
    name: String,
    id: SwitchId,
    kind: &'static str,
    /// The machine's card that leads on from there.
    device: Option<String>,
    /// It stays when its last card goes.
    kept: bool,
    cards: usize,
}

struct Net {
    fabric: Fabric<Mapping, Cable>,
    staging: Carrier,
    links: Links,
    switches: Vec<Named>,
}

/// What tells the guest behind a port, for each queue, and the tasks that serve it.
type Links = HashMap<(SwitchId, PortId), (Vec<Notifier>, Arc<Link>)>;

// Locked for a turn of one queue, which has an end, and never over an await.
static NET: Lazy<Mutex<Net>> = Lazy::new(|| {
    Mutex::new(Net {
        fabric: Fabric::new(),
        staging: Carrier::new(STAGING_BYTES / PAGE_SIZE),
        links: HashMap::new(),
        switches: Vec::new(),
    })
});

/// Makes the switches that are described, with the machine's cards, and has their routers served.
///
/// # Errors
/// What to say of the first that cannot be; the others are there.
pub fn start(specs: &[SwitchSpec], cards: Vec<Arc<NetDevice>>) -> Result<(), String> {
    let mut net = NET.lock();
    let mut wires: Vec<(String, WireId, EthernetAddress)> = Vec::new();
    for card in cards {
        let (name, address) = (card.name().to_string(), EthernetAddress(card.mac()));
        let wire = net.fabric.add_wire(Cable(Arc::clone(&card)));
        wires.push((name, wire, address));
        executor::spawn(hear(card, wire));
    }
    let mut result = Ok(());
    // Bridges first: routers lead to them.
    let is_bridge = |spec: &&SwitchSpec| spec.kind == switches::Kind::Bridge;
    let ordered = specs.iter().filter(is_bridge).chain(specs.iter().filter(|spec| !is_bridge(spec)));
    for spec in ordered {
        if let Err(error) = net.add_described(spec, &wires) {
            result = result.and(Err(format!("switch {}: {error}", spec.name)));
        }
    }
    let routers = specs.iter().any(|spec| matches!(spec.kind, switches::Kind::Nat { .. }));
    drop(net);
    if routers {
        executor::spawn(attend());
    }
    result
}

/// Lets routers do what time brings.
async fn attend() {
    loop {
        let next = {
            let mut net = NET.lock();
            let Net { fabric, staging, links, .. } = &mut *net;
            let (outcome, next) = fabric.poll(time::now_ns(), staging);
            tell(links, &outcome);
            next
        };
        time::until_ns(next).await;
    }
}

/// An address of dom0's own for a name: no guest's is one, and it is the same in every run.
fn own_address(name: &str) -> EthernetAddress {
    let EthernetAddress([a, b, c, d, e, f]) = CardSpec::on_switch(name).address(name, u32::MAX);
    EthernetAddress([a, b, c, d | 0x80, e, f])
}

impl Net {
    fn find(&self, name: &str) -> Option<&Named> {
        self.switches.iter().find(|switch| switch.name == name)
    }

    fn add(&mut self, name: &str, kind: &'static str, device: Option<String>, kept: bool) -> SwitchId {
        let id = self.fabric.add_switch();
        self.switches.push(Named { name: name.to_string(), id, kind, device, kept, cards: 0 });
        id
    }

    fn add_described(
        &mut self,
        spec: &SwitchSpec,
        wires: &[(String, WireId, EthernetAddress)],
    ) -> Result<(), String> {
        let wire = match &spec.device {
            None => wires.first(),
            Some(name) => {
                let found = wires.iter().find(|(other, ..)| other == name);
                let names: Vec<&str> = wires.iter().map(|(name, ..)| name.as_str()).collect();
                let there = if names.is_empty() { "none".to_string() } else { names.join(", ") };
                // The switch is there all the same: guests may have been told to use it.
                if found.is_none() {
                    self.add_switch_of(spec, None)?;
                    return Err(format!("the machine has no network card {name}: it has {there}"));
                }
                found
            }
        };
        self.add_switch_of(spec, wire)
    }

    fn add_switch_of(
        &mut self,
        spec: &SwitchSpec,
        wire: Option<&(String, WireId, EthernetAddress)>,
    ) -> Result<(), String> {
        let because = |error: AttachError| error.to_string();
        let device = wire.map(|(name, ..)| name.clone());
        match spec.kind {
            switches::Kind::Internal => drop(self.add(&spec.name, "internal", None, true)),
            switches::Kind::Bridge => {
                let id = self.add(&spec.name, "bridge", device, true);
                if let Some((_, wire, _)) = wire {
                    self.fabric.bridge(id, *wire).map_err(because)?;
                }
            }
            switches::Kind::Nat { inside, outside } => {
                let own = own_address(&spec.name);
                let beyond = match wire {
                    None => None,
                    Some((name, wire, address)) => Some(self.beyond(name, *wire, *address, &spec.name)?),
                };
                let now = time::now_ns();
                let place = match (outside, beyond) {
                    (_, None) => Place::Nowhere,
                    (Some(outside), _) => Place::Fixed(outside),
                    (None, _) => Place::Dhcp(now ^ u64::from(inside.address().to_bits())),
                };
                let outer = beyond.map_or(own, |(_, address)| address);
                let gateway = Gateway::new(inside, own, outer, place, now);
                let id = self.add(&spec.name, "nat", device, true);
                self.fabric.add_gateway(gateway, (id, own), beyond).map_err(because)?;
            }
        }
        Ok(())
    }

    /// The switch that a card of the machine's is on, and an address for a router there: the card's own for the first one, so that the card
    /// need not hear what is for others.
    fn beyond(
        &mut self,
        name: &str,
        wire: WireId,
        address: EthernetAddress,
        router: &str,
    ) -> Result<(SwitchId, EthernetAddress), String> {
        let bridge = self
            .switches
            .iter()
            .find(|switch| switch.device.as_deref() == Some(name) && switch.kind != "nat");
        let id = match bridge {
            Some(bridge) => bridge.id,
            None => {
                let id = self.add(name, "wire", Some(name.to_string()), true);
                self.fabric.bridge(id, wire).map_err(|error| error.to_string())?;
                id
            }
        };
        let first =
            !self.switches.iter().any(|other| other.kind == "nat" && other.device.as_deref() == Some(name));
        Ok((id, if first { address } else { own_address(&format!("{router}/{name}")) }))
    }

    /// Takes a card's place away.
    fn leave(&mut self, switch: SwitchId, port: PortId, address: EthernetAddress) {
        if let Some(network) = self.fabric.network_mut(switch) {
            let outcome = Outcome::of(switch, network.detach(port));
            tell(&self.links, &outcome);
        }
        if let Some(gateway) = self.fabric.gateway_mut(switch) {
            gateway.router_mut().release(address);
        }
        let Some(named) = self.switches.iter_mut().find(|named| named.id == switch) else { return };
        named.cards -= 1;
        if named.cards == 0 && !named.kept {
            self.fabric.remove_switch(switch);
            self.switches.retain(|named| named.id != switch);
        }
    }
}

/// What makes a device a network card.
pub struct Card {
    number: u32,
    address: EthernetAddress,
    rate: Option<u64>,
    switch: SwitchId,
    bridge: String,
    port: PortId,
}

impl Drop for Card {
    fn drop(&mut self) {
        NET.lock().leave(self.switch, self.port, self.address);
    }
}

impl Card {
    /// The card of a guest with this number, on its switch.
    ///
    /// # Errors
    /// What to say when its address is taken there, or a port that it wants.
    pub fn new(spec: &CardSpec, guest: &str, number: u32) -> Result<Self, String> {
        let mut net = NET.lock();
        let switch = match net.find(&spec.switch) {
            Some(named) => named.id,
            None => net.add(&spec.switch, "internal", None, false),
        };
        let address = spec.address(guest, number);
        if let Some(named) = net.switches.iter_mut().find(|named| named.id == switch) {
            named.cards += 1;
        }
        let guest_port =
            Port { isolated: spec.isolated, filter: spec.filter.clone(), ..Port::guest(address) };
        let attached = net.fabric.network_mut(switch).map(|network| network.attach(guest_port));
        let port = match attached {
            Some(Ok(port)) => port,
            Some(Err(error)) => {
                if let Some(named) = net.switches.iter_mut().find(|named| named.id == switch) {
                    named.cards -= 1;
                }
                return Err(format!("{} on switch {}: {error}", mac_text(address), spec.switch));
            }
            None => return Err(format!("there is no switch {}", spec.switch)),
        };
        let bridge = spec.switch.clone();
        // From here on, dropping it takes back what was done.
        let card = Self { number, address, rate: spec.rate, switch, bridge, port };
        let routed = net.route(spec, switch, address);
        drop(net);
        routed.map(|()| card)
    }

    /// Its address, as guests and descriptions write it.
    pub fn mac(&self) -> String {
        let bytes: Vec<String> = self.address.0.iter().map(|byte| format!("{byte:02x}")).collect();
        bytes.join(":")
    }

    /// The switch that it is on.
    pub fn switch(&self) -> &str {
        &self.bridge
    }

    /// What it moved.
    pub fn traffic(&self) -> Traffic {
        let (counters, _) = self.counters();
        Traffic {
            net_sent_frames: counters.sent_frames,
            net_sent_bytes: counters.sent_bytes,
            net_received_frames: counters.received_frames,
            net_received_bytes: counters.received_bytes,
            ..Traffic::default()
        }
    }

    /// What went through it, and what its guest missed.
    pub fn counters(&self) -> (Counters, Missed) {
        let net = NET.lock();
        let Some(network) = net.fabric.network(self.switch) else { return Default::default() };
        (network.switch().counters(self.port).unwrap_or_default(), network.missed(self.port))
    }

    /// The address that its switch's router gives it.
    pub fn ip(&self) -> Option<Ipv4Address> {
        let net = NET.lock();
        let leases = net.fabric.gateway(self.switch)?.router().leases();
        leases.into_iter().find(|(_, card)| *card == self.address).map(|(address, _)| address)
    }

    /// Changes what its guest may send and get.
    pub fn set_filter(&self, filter: Filter) {
        if let Some(network) = NET.lock().fabric.network_mut(self.switch) {
            network.set_filter(self.port, filter);
        }
    }
}

impl Net {
    /// Gives a card its address, and the ports that lead to it.
    fn route(&mut self, spec: &CardSpec, switch: SwitchId, address: EthernetAddress) -> Result<(), String> {
        let Some(gateway) = self.fabric.gateway_mut(switch) else {
            return if spec.ip.is_none() && spec.forwards.is_empty() {
                Ok(())
            } else {
                Err(format!(
                    "switch {} has no router: it gives no addresses and forwards no ports",
                    spec.switch
                ))
            };
        };
        let router = gateway.router_mut();
        let ip = router.lease(address, spec.ip).map_err(|error| match spec.ip {
            Some(ip) => format!("{ip} on switch {}: {error}", spec.switch),
            None => format!("switch {}: {error}", spec.switch),
        })?;
        spec.forwards.iter().try_for_each(|forward| {
            let wanted = Forward {
                transport: forward.transport,
                outside: forward.outside,
                to: ip,
                port: forward.inside,
            };
            router.forward(wanted).map_err(|error| format!("switch {}: {error}", spec.switch))
        })
    }
}

/// All switches: name, kind, the machine's card, cards, router's address, address outside, connections, dropped packets.
pub fn switch_table() -> String {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("KIND", Align::Left),
        ("DEVICE", Align::Left),
        ("CARDS", Align::Right),
        ("ROUTER", Align::Left),
        ("OUTSIDE", Align::Left),
        ("CONNECTIONS", Align::Right),
        ("DROPPED", Align::Right),
    ]);
    let net = NET.lock();
    for named in &net.switches {
        let router = net.fabric.gateway(named.id).map(Gateway::router);
        let outside = router.and_then(|router| router.outside());
        table.row([
            named.name.clone(),
            named.kind.to_string(),
            named.device.clone().unwrap_or_else(|| "-".into()),
            named.cards.to_string(),
            router.map_or("-".into(), |router| router.inside().to_string()),
            outside.map_or("-".into(), |outside| outside.address.to_string()),
            router.map_or("-".into(), |router| router.flows().to_string()),
            router.map_or("-".into(), |router| total(&router.drops()).to_string()),
        ]);
    }
    table.to_string()
}

fn total(drops: &Drops) -> u64 {
    let Drops { malformed, spoofed, fragments, protocol, unasked, full, unreachable, unserved } = *drops;
    malformed + spoofed + fragments + protocol + unasked + full + unreachable + unserved
}

/// What a switch's router knows: leases, forwarded ports, connections, and what it dropped.
///
/// # Errors
/// What to say when there is no such switch.
pub fn switch_details(name: &str) -> Result<String, String> {
    let net = NET.lock();
    let named = net.find(name).ok_or_else(|| {
        let names: Vec<&str> = net.switches.iter().map(|switch| switch.name.as_str()).collect();
        let there = if names.is_empty() { "none".to_string() } else { names.join(", ") };
        format!("there is no switch {name}: there is {there}")
    })?;
    let Some(gateway) = net.fabric.gateway(named.id) else {
        return Ok(format!("{name} has no router"));
    };
    let router = gateway.router();
    let mut text = match router.outside() {
        None => format!("{name}: {}, nothing leads outside", router.inside()),
        Some(Outside { address, gateway, dns }) => {
            let shown =
                |address: Option<Ipv4Address>| address.map_or("none".into(), |address| address.to_string());
            format!(
                "{name}: {}, outside {address}, gateway {}, DNS {}",
                router.inside(),
                shown(gateway),
                shown(dns)
            )
        }
    };
    for (address, card) in router.leases() {
        text += &format!("\nlease {address} {}", card.to_string().replace('-', ":"));
    }
    for Forward { transport, outside, to, port } in router.forwards() {
        text += &format!("\nforward {transport}/{outside} -> {to}:{port}");
    }
    let now = time::now_ns();
    for Connection { transport, inside, remote, outside, from_inside, expires_ns } in router.connections() {
        let arrow = if from_inside { "->" } else { "<-" };
        let left = expires_ns.saturating_sub(now) / 1_000_000_000;
        text += &format!(
            "\n{transport} {}:{} {arrow} {}:{}, port {outside}, {left} s",
            inside.0, inside.1, remote.0, remote.1
        );
    }
    let Drops { malformed, spoofed, fragments, protocol, unasked, full, unreachable, unserved } =
        router.drops();
    text += &format!(
        "\ndropped: {malformed} malformed, {spoofed} spoofed, {fragments} fragments, {protocol} of other protocols, {unasked} unasked, \
         {full} for want of room, {unreachable} unreachable, {unserved} for the router itself"
    );
    Ok(text)
}

impl Kind for Card {
    const CLASS: &'static str = "vif";

    fn number(&self) -> u32 {
        self.number
    }

    fn name(&self) -> String {
        format!("card {}", self.number)
    }

    fn front_nodes(&self) -> Nodes {
        Vec::from([("handle", self.number.to_string()), ("mac", self.mac())])
    }

    fn back_nodes(&self) -> Nodes {
        let bridge = self.bridge.clone();
        Vec::from([
            ("handle", self.number.to_string()),
            ("mac", self.mac()),
            ("bridge", bridge),
            ("type", "vif".into()),
        ])
    }

    fn offers(&self) -> Nodes {
        Vec::from([
            ("feature-rx-copy", "1".into()),
            (keys::SG, "1".into()),
            (keys::GSO_TCPV4, "1".into()),
            (keys::GSO_TCPV6, "0".into()),
            (keys::SPLIT_EVENT_CHANNELS, "0".into()),
            (keys::CTRL_RING, "1".into()),
            (keys::MAX_QUEUES, QUEUES.to_string()),
        ])
    }

    fn connected(&self) -> Nodes {
        Vec::from([("hotplug-status", "connected".into())])
    }

    fn connect(vif: &Arc<Vif>) -> Result<Arc<Link>, String> {
        if vif.said::<u32>(keys::RX_COPY)? != Some(1) {
            return Err("it does not receive by copies: no other way was offered".into());
        }
        let wanted = vif.said::<usize>(keys::NUM_QUEUES)?.unwrap_or(1);
        if !(1..=QUEUES).contains(&wanted) {
            return Err(format!("it wants {wanted} queues: 1 to {QUEUES} were offered"));
        }
        let (mut rings, mut channels) = (Vec::new(), Vec::new());
        for queue in 0..wanted {
            // A single queue may be told of in either way.
            let own = wanted > 1 || vif.said::<u32>("queue-0/tx-ring-ref")?.is_some();
            let prefix = if own { format!("queue-{queue}/") } else { String::new() };
            let ring = |name: &str| {
                let gref = GrantRef::new(vif.needs(&format!("{prefix}{name}"))?);
                let mapped = control::map_granted_pages(vif.domain, &[gref]);
                mapped.map_err(|error| format!("its ring cannot be mapped: {error}"))
            };
            rings.push((ring("tx-ring-ref")?, ring("rx-ring-ref")?));
            let port = EventPort::new(vif.needs(&format!("{prefix}event-channel"))?);
            let channel = control::connect(vif.domain, port)
                .map_err(|errno| format!("its event channel {port} cannot be bound: {errno}"))?;
            channels.push(channel);
        }
        let control = match vif.said::<u32>(keys::CTRL_RING_REF)? {
            None => None,
            Some(gref) => {
                let ring = control::map_granted_pages(vif.domain, &[GrantRef::new(gref)])
                    .map_err(|error| format!("its control ring cannot be mapped: {error}"))?;
                let port = EventPort::new(vif.needs(keys::CTRL_CHANNEL)?);
                let channel = control::connect(vif.domain, port)
                    .map_err(|errno| format!("its event channel {port} cannot be bound: {errno}"))?;
                Some((Control::new(ring, wanted as u32), channel))
            }
        };
        let said = |name: &str| Ok::<_, String>(vif.said::<u32>(name)?.is_some_and(|value| value != 0));
        let features = Features {
            scatter_gather: said(keys::SG)?,
            blank_checksums: !said(keys::NO_CSUM_OFFLOAD)?,
            segments: said(keys::GSO_TCPV4)?,
        };
        let link = Link::new();
        let notifiers = channels.iter().map(Channel::notifier).collect();
        let mut net = NET.lock();
        let (switch, port) = (vif.kind.switch, vif.kind.port);
        if let Some(network) = net.fabric.network_mut(switch) {
            network.connect(port, vif.domain, rings, features);
        }
        net.links.insert((switch, port), (notifiers, Arc::clone(&link)));
        drop(net);
        let left = Arc::new(AtomicUsize::new(channels.len() + usize::from(control.is_some())));
        if let Some((control, channel)) = control {
            let pages = CardPages::new(vif.domain, wanted * KEPT as usize);
            executor::spawn(keep(
                Arc::clone(vif),
                control,
                pages,
                channel,
                Arc::clone(&link),
                Arc::clone(&left),
            ));
        }
        for (queue, channel) in channels.into_iter().enumerate() {
            executor::spawn(serve(Arc::clone(vif), queue, channel, Arc::clone(&link), Arc::clone(&left)));
        }
        Ok(link)
    }
}

/// A queue of a connection, from start to end. The last of `left` queues lets go of the rings.
async fn serve(vif: Arc<Vif>, queue: usize, mut channel: Channel, link: Arc<Link>, left: Arc<AtomicUsize>) {
    let (switch, port) = (vif.kind.switch, vif.kind.port);
    let mut bucket = vif.kind.rate.map(|rate| Bucket::new(rate, BURST, time::now_ns()));
    loop {
        let seen = link.bell.rings();
        if link.is_stopping() {
            break;
        }
        let mut net = NET.lock();
        let Net { fabric, staging, links, .. } = &mut *net;
        let sent_bytes = |fabric: &Fabric<_, _>| {
            let network: Option<&Network<Mapping>> = fabric.network(switch);
            network
                .and_then(|network| network.switch().counters(port))
                .map_or(0, |counters| counters.sent_bytes)
        };
        let before = sent_bytes(fabric);
        let (turn, outcome) = fabric.turn(time::now_ns(), switch, port, queue, staging);
        tell(links, &outcome);
        let sent = sent_bytes(fabric) - before;
        let network = fabric.network_mut(switch);
        let (fault, there) = network.map_or((None, false), |network| {
            (network.take_fault(port), network.prepare_to_wait(port, queue))
        });
        let waits = !turn.closed && !turn.more && !there;
        drop(net);
        if let Some(fault) = fault {
            vif.report(&format!("sent {fault}; it is not told again when that happens"));
        }
        if turn.closed {
            vif.broke(&link);
            // The other task has to hear of it first; it stops this one.
            link.bell.after(seen).await;
        } else if let Some(until_ns) = bucket.as_mut().and_then(|bucket| held_until(bucket, sent)) {
            // Its ring fills up, and it waits. It gets what others send all the same.
            let wait = async { first(time::until_ns(until_ns), link.bell.after(seen)).await };
            let mut wait = core::pin::pin!(wait);
            while let First::Other(()) = first(wait.as_mut(), channel.fired()).await {
                let mut net = NET.lock();
                let Net { fabric, staging, links, .. } = &mut *net;
                let outcome = fabric.refill(time::now_ns(), switch, port, queue, staging);
                tell(links, &outcome);
            }
        } else if waits {
            let told = first(channel.fired(), link.bell.after(seen));
            match turn.until_ns {
                // Some of what it has sent waits for others, which have so much time.
                Some(until_ns) => drop(first(told, time::until_ns(until_ns)).await),
                None => drop(told.await),
            }
        } else {
            executor::yield_now().await;
        }
    }
    drop(channel);
    leave(&vif, &link, &left);
}

/// One of the tasks of a connection ends; the last one lets go of the rings.
fn leave(vif: &Vif, link: &Link, left: &AtomicUsize) {
    if left.fetch_sub(1, Ordering::AcqRel) == 1 {
        let (switch, port) = (vif.kind.switch, vif.kind.port);
        let mut net = NET.lock();
        let turn = net.fabric.network_mut(switch).map(|network| network.disconnect(port));
        tell(&net.links, &Outcome::of(switch, turn.unwrap_or_default()));
        net.links.remove(&(switch, port));
        drop(net);
        link.end();
    }
}

/// Serves the control ring of a connection.
async fn keep(
    vif: Arc<Vif>,
    mut control: Control<Mapping>,
    mut pages: CardPages,
    mut channel: Channel,
    link: Arc<Link>,
    left: Arc<AtomicUsize>,
) {
    loop {
        let seen = link.bell.rings();
        if link.is_stopping() {
            break;
        }
        let turn = control.turn(&mut Keeping(&mut pages, &mut NET.lock().staging));
        match turn {
            Ok((notify, more)) => {
                if notify {
                    // As for the rings of frames.
                    let _ = channel.notifier().notify();
                }
                if more {
                    executor::yield_now().await;
                } else {
                    first(channel.fired(), link.bell.after(seen)).await;
                }
            }
            Err(_) => {
                vif.broke(&link);
                link.bell.after(seen).await;
            }
        }
    }
    pages.release(&mut NET.lock().staging);
    drop((control, channel));
    leave(&vif, &link, &left);
}

/// Tells guests of what they got, and the tasks of those that broke a ring that they have something to do.
fn tell(links: &Links, outcome: &Outcome) {
    for (switch, port, queue) in &outcome.notify {
        if let Some(notifier) = links.get(&(*switch, *port)).and_then(|(notifiers, _)| notifiers.get(*queue))
        {
            // It may be gone: then there is nobody to tell.
            let _ = notifier.notify();
        }
    }
    for place in &outcome.broken {
        if let Some((_, link)) = links.get(place) {
            link.bell.ring();
        }
    }
}

/// Pays for bytes that were sent; when the card may send again if that is not now.
fn held_until(bucket: &mut Bucket, sent: u64) -> Option<u64> {
    let mut left = sent;
    let mut until = None;
    while left > 0 {
        let part = left.min(BURST);
        let now = until.unwrap_or_else(time::now_ns);
        match bucket.take(now, part as usize) {
            Ok(()) => left -= part,
            Err(ready) => until = Some(ready),
        }
    }
    until
}

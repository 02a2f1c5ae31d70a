//! Virtual network cards, and the switches that they are on.
//!
//! A task for each queue takes what its guest sends and brings it where it goes; the others are only notified. One more lets routers
//! do what time brings.
//!
//! All switches with what is between them are one value, which belongs to the turn that uses it: a turn runs in a compartment (design
//! record 0066). One that panics takes the value along; it is made anew from what is described, and all cards are connected again.

use super::carrier::{CardPages, Carrier, Keeping};
use super::device::{Device, Kind, Link, Nodes};
use crate::accounts::Traffic;
use crate::cards::{CardSpec, mac_text};
use crate::devices::NetDevice;
use crate::panics::{CALM_NS, MOST_FUTILE};
use crate::say;
use crate::switches::{self, SwitchSpec};
use crate::table::{Align, Table};
use crate::waiting::{First, first};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use guest_sdk::compartment::{self, Fuse, Panicked};
use guest_sdk::events::{Channel, Notifier};
use guest_sdk::grants::{Lease, Mapping};
use guest_sdk::hardware::DmaPage;
use guest_sdk::{control, executor, time};
use hashbrown::HashMap;
use hypercall_abi::io::netif::keys;
use hypercall_abi::{GrantRef, PAGE_SIZE, Port as EventPort};
use netback::Fault;
use netback::control::{Control, KEPT};
use netback::fabric::{Fabric, Outcome, SwitchId, Wire, WireId};
use netback::network::{Arrived, Carried, Features, Missed, Network, QUEUES, STAGING_BYTES, Unfinished};
use netswitch::{
    AttachError, Bucket, Checksum, Connection, Counters, Drops, EthernetAddress, Filter, Forward, Gateway,
    Ipv4Address, Outside, Place, Port, PortId,
};
use spin::{Mutex, Once};
use virtio::net::{About, Checksum as CardChecksum, Frame as CardFrame, HEADER};

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
        if let Some(about) = about(frame, unfinished) {
            // What it has no room for is lost.
            let _ = self.0.send(about, frame);
        }
    }

    fn carry(&mut self, frame: &mut dyn Carried, unfinished: Unfinished) -> bool {
        // What cannot be finished and what there is no room for is lost.
        let Some(about) = about(frame.head(), unfinished) else { return true };
        if frame.bytes() > PAGE_SIZE {
            return false;
        }
        let Some(page) = self.0.page() else { return true };
        if !frame.write(&page) {
            self.0.keep(page);
            return false;
        }
        // At most a page.
        self.0.send_page(about, page, frame.bytes() as u16);
        true
    }

    fn flush(&mut self) {
        self.0.kick();
    }
}

/// What a card is told of a frame, by its head; `None` for one whose checksum is missing, and nobody knows where.
fn about(head: &[u8], unfinished: Unfinished) -> Option<About> {
    let mut about = About::default();
    if unfinished.checksum == Checksum::Blank {
        let (start, offset) = netswitch::checksum_place(head)?;
        about.checksum = CardChecksum::Blank { start, offset };
    }
    Some(about)
}

/// A frame that a card has received, for a switch.
fn arrived(frame: &CardFrame<DmaPage>) -> Arrived<'_> {
    Arrived {
        page: &frame.page,
        at: HEADER,
        bytes: frame.bytes,
        blank: matches!(frame.about.checksum, CardChecksum::Blank { .. }),
        validated: frame.about.checksum == CardChecksum::Right,
    }
}

/// Brings what comes in by a card of the machine's where it goes. `number` is its place among the wires.
async fn hear(card: Arc<NetDevice>, number: usize) {
    let mut came = Vec::new();
    let mut panics = 0;
    loop {
        card.frames(AT_ONCE, &mut came).await;
        let frames = core::mem::take(&mut came);
        let count = frames.len();
        let turn = move |net: &mut Net| {
            let Net { fabric, staging, wires, links, outcome, .. } = net;
            if let Some((_, wire, _)) = wires.get(number) {
                fabric.arrived(time::now_ns(), *wire, frames.iter().map(arrived), staging, outcome);
            }
            tell(links, outcome);
            outcome.clear();
            frames
        };
        match guarded(turn) {
            Ok(frames) => {
                panics = 0;
                came = frames;
                card.give_all_back(&mut came);
            }
            Err(panic) => {
                // Its pages are lost with it.
                card.replace(count);
                panics += 1;
                say!("network card {}: what takes its frames panicked: {panic}", card.name());
                if panics == MOST_FUTILE {
                    return say!("network card {}: nothing more is taken from it", card.name());
                }
            }
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

/// All switches, in one of their lives.
struct Net {
    /// Switches and ports are known by numbers, which mean something in one life only.
    life: u64,
    fabric: Fabric<Mapping, Cable>,
    staging: Carrier,
    links: Links,
    switches: Vec<Named>,
    /// Cards of the machine's: names and addresses.
    wires: Vec<(String, WireId, EthernetAddress)>,
    // Kept for its memory.
    outcome: Outcome,
}

/// What tells the guest behind a port, for each queue, and the tasks that serve it.
type Links = HashMap<(SwitchId, PortId), (Vec<Notifier>, Arc<Link>)>;

/// What switches are made from.
struct Described {
    specs: Vec<SwitchSpec>,
    cards: Vec<Arc<NetDevice>>,
}

/// What a connection leaves behind when it is lost.
struct Connected {
    vif: Weak<Vif>,
    link: Arc<Link>,
    leases: Vec<Lease>,
}

// Locked for a moment each; a turn, which has an end and never lasts over an await, takes the value away.
static NET: Mutex<Option<Box<Net>>> = Mutex::new(None);
static LIVES: AtomicU64 = AtomicU64::new(0);
static DESCRIBED: Once<Described> = Once::new();
/// All guests' cards: who has a place when the switches are made anew.
static SEATS: Mutex<Vec<Arc<Seat>>> = Mutex::new(Vec::new());
static CONNECTIONS: Mutex<Vec<Connected>> = Mutex::new(Vec::new());

/// Does something with the switches that no guest has a say in.
fn with<R>(work: impl FnOnce(&mut Net) -> R) -> R {
    work(NET.lock().get_or_insert_with(Net::new))
}

/// Does something with the switches that guests or the network outside have a say in.
///
/// # Errors
/// When it panicked: the switches are new ones then, and all cards are about to be connected again.
fn guarded<R: 'static>(work: impl FnOnce(&mut Net) -> R + 'static) -> Result<R, Panicked> {
    let mut net = NET.lock().take().unwrap_or_else(Net::new);
    let turn = move || {
        let result = work(&mut net);
        (net, result)
    };
    match compartment::run(super::is_intact, turn) {
        Ok((net, result)) => {
            *NET.lock() = Some(net);
            Ok(result)
        }
        Err(panic) => {
            begin_anew();
            Err(panic)
        }
    }
}

/// Makes the switches anew after those before were lost in a turn.
fn begin_anew() {
    let mut lost = core::mem::take(&mut *CONNECTIONS.lock());
    // First of all: nobody reads or writes guests' pages by what the lost turn had.
    lost.iter_mut().flat_map(|connection| connection.leases.drain(..)).for_each(Lease::end);
    let mut net = Net::new();
    for seat in SEATS.lock().iter() {
        seat.life_ends();
        // It had the same place among the same others.
        if let Err(error) = net.seat(seat) {
            say!("dom0: a network card has lost its place: {error}");
        }
    }
    *NET.lock() = Some(net);
    lost.iter().filter_map(|connection| connection.vif.upgrade()).for_each(|vif| vif.lost());
}

/// Makes the switches that are described, with the machine's cards, and has their routers served.
///
/// # Errors
/// What to say of the first that cannot be; the others are there.
pub fn start(specs: Vec<SwitchSpec>, cards: Vec<Arc<NetDevice>>) -> Result<(), String> {
    let Described { specs, cards } = DESCRIBED.call_once(|| Described { specs, cards });
    let (net, result) = Net::described();
    *NET.lock() = Some(net);
    for (number, card) in cards.iter().enumerate() {
        executor::spawn(hear(Arc::clone(card), number));
    }
    if specs.iter().any(|spec| matches!(spec.kind, switches::Kind::Nat { .. })) {
        executor::spawn(attend());
    }
    result
}

/// Lets routers do what time brings.
async fn attend() {
    let mut panics = 0;
    loop {
        let turn = |net: &mut Net| net.fabric.poll(time::now_ns(), &mut net.staging);
        match guarded(turn) {
            Ok((outcome, next)) => {
                panics = 0;
                with(|net| tell(&net.links, &outcome));
                time::until_ns(next).await;
            }
            Err(panic) => {
                panics += 1;
                say!("dom0: a router panicked: {panic}");
                if panics == MOST_FUTILE {
                    return say!("dom0: routers do nothing more by themselves");
                }
                executor::yield_now().await;
            }
        }
    }
}

/// An address of dom0's own for a name: no guest's is one, and it is the same in every run.
fn own_address(name: &str) -> EthernetAddress {
    let EthernetAddress([a, b, c, d, e, f]) = CardSpec::on_switch(name).address(name, u32::MAX);
    EthernetAddress([a, b, c, d | 0x80, e, f])
}

impl Net {
    /// The switches that are described, for another life.
    fn new() -> Box<Self> {
        Self::described().0
    }

    /// The same, and what is wrong with the first that cannot be.
    fn described() -> (Box<Self>, Result<(), String>) {
        let mut net = Box::new(Self {
            life: LIVES.fetch_add(1, Ordering::Relaxed),
            fabric: Fabric::new(),
            staging: Carrier::new(STAGING_BYTES / PAGE_SIZE),
            links: HashMap::new(),
            switches: Vec::new(),
            wires: Vec::new(),
            outcome: Outcome::default(),
        });
        let mut result = Ok(());
        let Some(Described { specs, cards }) = DESCRIBED.get() else { return (net, result) };
        for card in cards {
            let wire = net.fabric.add_wire(Cable(Arc::clone(card)));
            net.wires.push((card.name().to_string(), wire, EthernetAddress(card.mac())));
        }
        // Bridges first: routers lead to them.
        let is_bridge = |spec: &&SwitchSpec| spec.kind == switches::Kind::Bridge;
        let ordered = specs.iter().filter(is_bridge).chain(specs.iter().filter(|spec| !is_bridge(spec)));
        let wires = net.wires.clone();
        for spec in ordered {
            if let Err(error) = net.add_described(spec, &wires) {
                result = result.and(Err(format!("switch {}: {error}", spec.name)));
            }
        }
        (net, result)
    }

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

    /// Gives a card its place, on its switch and at the router there. The same address again, if it had one before.
    ///
    /// # Errors
    /// What to say when its address is taken there, or a port that it wants; it has no place then.
    fn seat(&mut self, seat: &Seat) -> Result<(), String> {
        let Seat { spec, address, .. } = seat;
        let switch = match self.find(&spec.switch) {
            Some(named) => named.id,
            None => self.add(&spec.switch, "internal", None, false),
        };
        let Some(network) = self.fabric.network_mut(switch) else {
            return Err(format!("there is no switch {}", spec.switch));
        };
        let mut state = seat.state.lock();
        let wanted = Port { isolated: spec.isolated, filter: state.filter.clone(), ..Port::guest(*address) };
        let attached = network.attach(wanted);
        let port = match attached {
            Ok(port) => port,
            Err(error) => {
                drop(state);
                self.remove_if_empty(switch);
                return Err(format!("{} on switch {}: {error}", mac_text(*address), spec.switch));
            }
        };
        if let Some(named) = self.switches.iter_mut().find(|named| named.id == switch) {
            named.cards += 1;
        }
        state.place = Some(Location { life: self.life, switch, port });
        let known = state.ip;
        drop(state);
        match self.route(spec, switch, *address, known) {
            Ok(ip) => {
                seat.state.lock().ip = ip;
                Ok(())
            }
            Err(error) => {
                self.unseat(seat);
                Err(error)
            }
        }
    }

    /// Takes a card's place away.
    fn unseat(&mut self, seat: &Seat) {
        let Some(Location { switch, port, .. }) = self.place(seat) else { return };
        seat.state.lock().place = None;
        if let Some(network) = self.fabric.network_mut(switch) {
            let outcome = Outcome::of(switch, network.detach(port));
            tell(&self.links, &outcome);
        }
        if let Some(gateway) = self.fabric.gateway_mut(switch) {
            gateway.router_mut().release(seat.address);
        }
        if let Some(named) = self.switches.iter_mut().find(|named| named.id == switch) {
            named.cards -= 1;
        }
        self.remove_if_empty(switch);
    }

    /// A switch that nobody has described is there as long as it has cards.
    fn remove_if_empty(&mut self, switch: SwitchId) {
        if self.switches.iter().any(|named| named.id == switch && named.cards == 0 && !named.kept) {
            self.fabric.remove_switch(switch);
            self.switches.retain(|named| named.id != switch);
        }
    }

    /// Where a card is in this life.
    fn place(&self, seat: &Seat) -> Option<Location> {
        seat.state.lock().place.filter(|place| place.life == self.life)
    }
}

/// A card's place, in one life of the switches.
#[derive(Clone, Copy)]
struct Location {
    life: u64,
    switch: SwitchId,
    port: PortId,
}

/// What a card has on the switches, and what of it outlives them.
struct Seat {
    /// Whose it is, for people.
    owner: String,
    spec: CardSpec,
    address: EthernetAddress,
    state: Mutex<SeatState>,
}

struct SeatState {
    place: Option<Location>,
    /// What its guest may send and get.
    filter: Filter,
    /// The address that its router gave it.
    ip: Option<Ipv4Address>,
    /// What went through it in lives that are over, and in this one when it was last looked at.
    past: Count,
    seen: Count,
}

type Count = (Counters, Missed);

fn sum((one, missed): Count, (other, more): Count) -> Count {
    let mut dropped = one.dropped;
    dropped.iter_mut().zip(other.dropped).for_each(|(sum, more)| *sum += more);
    let counters = Counters {
        sent_frames: one.sent_frames + other.sent_frames,
        sent_bytes: one.sent_bytes + other.sent_bytes,
        received_frames: one.received_frames + other.received_frames,
        received_bytes: one.received_bytes + other.received_bytes,
        dropped,
        refused: one.refused + other.refused,
    };
    let missed = Missed {
        no_room: missed.no_room + more.no_room,
        too_long: missed.too_long + more.too_long,
        failed: missed.failed + more.failed,
    };
    (counters, missed)
}

impl Seat {
    /// The switches are lost.
    fn life_ends(&self) {
        let state = &mut *self.state.lock();
        state.place = None;
        state.past = sum(state.past, core::mem::take(&mut state.seen));
    }
}

/// What makes a device a network card.
pub struct Card {
    number: u32,
    seat: Arc<Seat>,
    /// When a turn of it panicked last, ns; and how often one did after a time without.
    panics: Mutex<(u64, u64)>,
    /// For tests: a turn of it panics when it blows.
    pub fuse: Fuse,
}

/// How often it is noted what went through a card: of a life that ends by a panic, no more is missing than what came since, ns.
const COUNTED_EVERY_NS: u64 = 10_000_000;

/// Why a card cannot have its addresses: another card of its switch has one of them.
fn taken(spec: &CardSpec, address: EthernetAddress) -> Option<String> {
    let seats = SEATS.lock();
    let others = || seats.iter().filter(|seat| seat.spec.switch == spec.switch);
    if let Some(other) = others().find(|seat| seat.address == address) {
        let (mac, switch) = (mac_text(address), &spec.switch);
        return Some(format!("{mac} on switch {switch}: {} has this MAC address", other.owner));
    }
    let ip = spec.ip?;
    let other = others().find(|seat| seat.state.lock().ip == Some(ip))?;
    Some(format!("{ip} on switch {}: {} has this address", spec.switch, other.owner))
}

impl Drop for Card {
    fn drop(&mut self) {
        SEATS.lock().retain(|seat| !Arc::ptr_eq(seat, &self.seat));
        with(|net| net.unseat(&self.seat));
    }
}

impl Card {
    /// The card of a guest with this number, on its switch.
    ///
    /// # Errors
    /// What to say when its address is taken there, or a port that it wants.
    pub fn new(spec: &CardSpec, guest: &str, number: u32) -> Result<Self, String> {
        let state = SeatState {
            place: None,
            filter: spec.filter.clone(),
            ip: None,
            past: Count::default(),
            seen: Count::default(),
        };
        let address = spec.address(guest, number);
        if let Some(why) = taken(spec, address) {
            return Err(why);
        }
        let owner = format!("{guest}'s card {number}");
        let seat = Arc::new(Seat { owner, spec: spec.clone(), address, state: Mutex::new(state) });
        with(|net| net.seat(&seat))?;
        SEATS.lock().push(Arc::clone(&seat));
        Ok(Self { number, seat, panics: Mutex::new((0, 0)), fuse: Fuse::new() })
    }

    /// A turn of it panicked: the number of the row that this one is in.
    fn row(&self) -> u64 {
        let (last, row) = &mut *self.panics.lock();
        let now = time::now_ns();
        if *row == 0 || now.saturating_sub(*last) > CALM_NS {
            *row += 1;
        }
        *last = now;
        *row
    }

    /// Its address, as guests and descriptions write it.
    pub fn mac(&self) -> String {
        mac_text(self.seat.address)
    }

    /// The switch that it is on.
    pub fn switch(&self) -> &str {
        &self.seat.spec.switch
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
        let now = with(|net| {
            let Location { switch, port, .. } = net.place(&self.seat)?;
            let network = net.fabric.network(switch)?;
            Some((network.switch().counters(port)?, network.missed(port)))
        });
        let state = &mut *self.seat.state.lock();
        state.seen = now.unwrap_or(state.seen);
        sum(state.past, state.seen)
    }

    /// The address that its switch's router gives it.
    pub fn ip(&self) -> Option<Ipv4Address> {
        self.seat.state.lock().ip
    }

    /// Changes what its guest may send and get.
    pub fn set_filter(&self, filter: Filter) {
        self.seat.state.lock().filter = filter.clone();
        with(|net| {
            let Some(Location { switch, port, .. }) = net.place(&self.seat) else { return };
            if let Some(network) = net.fabric.network_mut(switch) {
                network.set_filter(port, filter);
            }
        });
    }
}

impl Net {
    /// Gives a card its address, and the ports that lead to it.
    fn route(
        &mut self,
        spec: &CardSpec,
        switch: SwitchId,
        address: EthernetAddress,
        known: Option<Ipv4Address>,
    ) -> Result<Option<Ipv4Address>, String> {
        let Some(gateway) = self.fabric.gateway_mut(switch) else {
            return if spec.ip.is_none() && spec.forwards.is_empty() {
                Ok(None)
            } else {
                Err(format!(
                    "switch {} has no router: it gives no addresses and forwards no ports",
                    spec.switch
                ))
            };
        };
        let router = gateway.router_mut();
        let ip = router.lease(address, known.or(spec.ip)).map_err(|error| match spec.ip {
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
        })?;
        Ok(Some(ip))
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
    with(|net| net.rows(|row| table.row(row)));
    table.to_string()
}

impl Net {
    fn rows(&self, mut row: impl FnMut([String; 8])) {
        let net = self;
        for named in &net.switches {
            let router = net.fabric.gateway(named.id).map(Gateway::router);
            let outside = router.and_then(|router| router.outside());
            row([
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
    }
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
    with(|net| net.details(name))
}

impl Net {
    fn details(&self, name: &str) -> Result<String, String> {
        let net = self;
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
                let shown = |address: Option<Ipv4Address>| {
                    address.map_or("none".into(), |address| address.to_string())
                };
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
        for Connection { transport, inside, remote, outside, from_inside, expires_ns } in router.connections()
        {
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
        let bridge = self.switch().to_string();
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
                Some((ring.lease(), Control::new(ring, wanted as u32), channel))
            }
        };
        let said = |name: &str| Ok::<_, String>(vif.said::<u32>(name)?.is_some_and(|value| value != 0));
        let features = Features {
            scatter_gather: said(keys::SG)?,
            blank_checksums: !said(keys::NO_CSUM_OFFLOAD)?,
            segments: said(keys::GSO_TCPV4)?,
        };
        let Some(place) = with(|net| net.place(&vif.kind.seat)) else {
            return Err(format!("it has no place on switch {}", vif.kind.switch()));
        };
        let link = Link::new();
        let mut leases: Vec<Lease> =
            rings.iter().flat_map(|(transmit, receive)| [transmit.lease(), receive.lease()]).collect();
        let tasks = channels.len() + usize::from(control.is_some());
        let served = Served { vif: Arc::clone(vif), place, link, left: Arc::new(AtomicUsize::new(tasks)) };
        if let Some((ring, control, channel)) = control {
            let pages = CardPages::new(vif.domain, wanted * KEPT as usize);
            leases.extend([ring, pages.lease()]);
            executor::spawn(served.clone().keep(Box::new((control, pages)), channel));
        }
        let notifiers = channels.iter().map(Channel::notifier).collect();
        with(|net| {
            let Location { switch, port, .. } = place;
            if let Some(network) = net.fabric.network_mut(switch) {
                network.connect(port, vif.domain, rings, features);
            }
            net.links.insert((switch, port), (notifiers, Arc::clone(&served.link)));
        });
        let link = Arc::clone(&served.link);
        let connection = Connected { vif: Arc::downgrade(vif), link: Arc::clone(&link), leases };
        CONNECTIONS.lock().push(connection);
        for (queue, channel) in channels.into_iter().enumerate() {
            executor::spawn(served.clone().serve(queue, channel));
        }
        Ok(link)
    }
}

/// What came of a turn of a queue.
struct Turned {
    closed: bool,
    /// There is nothing more to do before the guest says so.
    waits: bool,
    /// Some of what it has sent waits for others, which have so much time.
    until_ns: Option<u64>,
    /// Bytes.
    sent: u64,
    fault: Option<Fault>,
}

impl Net {
    /// A turn of a queue; `None` when it belongs to another life. Whoever got something is told. What it sent is counted if it is `metered`.
    fn turn(&mut self, place: Location, queue: usize, now_ns: u64, metered: bool) -> Option<Turned> {
        let Location { life, switch, port } = place;
        if life != self.life {
            return None;
        }
        let Self { fabric, staging, links, outcome, .. } = self;
        let sent = |fabric: &Fabric<_, _>| {
            let network: Option<&Network<Mapping>> = fabric.network(switch).filter(|_| metered);
            network.and_then(|network| network.switch().counters(port)).map_or(0, |count| count.sent_bytes)
        };
        staging.fuse.reached();
        let before = sent(fabric);
        let turn = fabric.turn(now_ns, switch, port, queue, staging, outcome);
        let sent = sent(fabric) - before;
        staging.fuse.reached();
        tell(links, outcome);
        outcome.clear();
        let (fault, there) = fabric.network_mut(switch).map_or((None, false), |network| {
            (network.take_fault(port), network.prepare_to_wait(port, queue))
        });
        let waits = !turn.closed && !turn.more && !there;
        Some(Turned { closed: turn.closed, waits, until_ns: turn.until_ns, sent, fault })
    }
}

impl Net {
    /// Gives a queue what waits for room in it; `None` when it belongs to another life.
    fn refill(&mut self, place: Location, queue: usize, now_ns: u64) -> Option<Outcome> {
        let Location { life, switch, port } = place;
        let Self { fabric, staging, .. } = self;
        (life == self.life).then(|| fabric.refill(now_ns, switch, port, queue, staging))
    }
}

/// A connection, as each of its tasks has it. The last of `left` tasks lets go of the rings.
#[derive(Clone)]
struct Served {
    vif: Arc<Vif>,
    place: Location,
    link: Arc<Link>,
    left: Arc<AtomicUsize>,
}

impl Served {
    /// Does a turn of it. `None` when there is nothing to be served any more: it panicked, or the switches were lost by another's. The other
    /// task has heard of it, and stops this one.
    fn turn<R: 'static>(&self, work: impl FnOnce(&mut Net) -> Option<R> + 'static) -> Option<R> {
        let fuse = self.vif.kind.fuse.left();
        let turn = move |net: &mut Net| {
            net.staging.fuse.set(fuse);
            let result = work(net);
            (result, net.staging.fuse.left())
        };
        match guarded(turn) {
            Ok((result, left)) => {
                self.vif.kind.fuse.set(left);
                result
            }
            Err(panic) => {
                self.vif.kind.fuse.set(0);
                self.vif.panicked(None, &panic, self.vif.kind.row());
                None
            }
        }
    }

    /// Serves a queue, from start to end.
    async fn serve(self, queue: usize, mut channel: Channel) {
        let Self { vif, place, link, .. } = &self;
        let place = *place;
        let mut bucket = vif.kind.seat.spec.rate.map(|rate| Bucket::new(rate, BURST, time::now_ns()));
        let mut counted_ns = 0;
        loop {
            let seen = link.bell.rings();
            if link.is_stopping() {
                break;
            }
            let now_ns = time::now_ns();
            let metered = bucket.is_some();
            let Some(turned) = self.turn(move |net| net.turn(place, queue, now_ns, metered)) else {
                link.bell.after(seen).await;
                continue;
            };
            let Turned { closed, waits, until_ns, sent, fault } = turned;
            if let Some(fault) = fault {
                vif.report(&format!("sent {fault}; it is not told again when that happens"));
            }
            if closed {
                vif.broke(link);
                // The other task has to hear of it first; it stops this one.
                link.bell.after(seen).await;
            } else if let Some(until_ns) = bucket.as_mut().and_then(|bucket| held_until(bucket, sent)) {
                // Its ring fills up, and it waits. It gets what others send all the same.
                let wait = async { first(time::until_ns(until_ns), link.bell.after(seen)).await };
                let mut wait = core::pin::pin!(wait);
                while let First::Other(()) = first(wait.as_mut(), channel.fired()).await {
                    let refilled = self.turn(move |net| net.refill(place, queue, time::now_ns()));
                    with(|net| tell(&net.links, &refilled.unwrap_or_default()));
                }
            } else if waits {
                if now_ns.saturating_sub(counted_ns) >= COUNTED_EVERY_NS {
                    // Kept for when the switches are lost.
                    let _ = vif.kind.counters();
                    counted_ns = now_ns;
                }
                let told = first(channel.fired(), link.bell.after(seen));
                match until_ns {
                    Some(until_ns) => drop(first(told, time::until_ns(until_ns)).await),
                    None => drop(told.await),
                }
            } else {
                executor::yield_now().await;
            }
        }
        drop(channel);
        self.leave();
    }

    /// Serves the control ring.
    async fn keep(self, kept: Box<(Control<Mapping>, CardPages)>, mut channel: Channel) {
        let Self { place, link, .. } = &self;
        let Location { life, .. } = *place;
        // It goes into each turn, and is lost with one that panics.
        let mut kept = Some(kept);
        loop {
            let seen = link.bell.rings();
            if link.is_stopping() {
                break;
            }
            let turn = kept.take().and_then(|mut kept| {
                self.turn(move |net| {
                    let (control, pages) = &mut *kept;
                    let turn =
                        (life == net.life).then(|| control.turn(&mut Keeping(pages, &mut net.staging)));
                    Some((kept, turn))
                })
            });
            let Some((back, Some(turn))) = turn else {
                link.bell.after(seen).await;
                continue;
            };
            kept = Some(back);
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
                    self.vif.broke(link);
                    link.bell.after(seen).await;
                }
            }
        }
        // What was kept in another life is unmapped by now.
        if let Some(mut kept) = kept {
            with(|net| {
                if life == net.life {
                    kept.1.release(&mut net.staging)
                }
            });
        }
        drop(channel);
        self.leave();
    }

    /// One of the tasks ends; the last one lets go of the rings.
    fn leave(self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let Location { life, switch, port } = self.place;
            with(|net| {
                if life == net.life {
                    let turn = net.fabric.network_mut(switch).map(|network| network.disconnect(port));
                    tell(&net.links, &Outcome::of(switch, turn.unwrap_or_default()));
                    net.links.remove(&(switch, port));
                }
            });
            CONNECTIONS.lock().retain(|other| !Arc::ptr_eq(&other.link, &self.link));
            self.link.end();
        }
    }
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

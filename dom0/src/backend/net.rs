//! Virtual network cards, and the switches that they are on.
//!
//! A task for each connection takes what its guest sends and brings it where it goes; the others are only notified. A switch is
//! locked for a turn of one card, which has an end, and never over an await.

use super::device::{Device, Kind, Link, Nodes};
use crate::accounts::Traffic;
use crate::cards::CardSpec;
use crate::waiting::First;
use crate::waiting::first;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use guest_sdk::copy::Staging;
use guest_sdk::events::{Channel, Notifier};
use guest_sdk::grants::Mapping;
use guest_sdk::{control, executor, time};
use hashbrown::HashMap;
use hypercall_abi::io::netif::keys;
use hypercall_abi::{GrantRef, PAGE_SIZE, Port as EventPort};
use netback::network::{Features, Missed, Network, STAGING_BYTES};
use netswitch::{Bucket, Counters, EthernetAddress, Port, PortId};
use spin::{Lazy, Mutex};

/// A virtual network card.
pub type Vif = Device<Card>;

/// Bytes that a card with a limit may send at once: what one turn takes of the longest usual frames.
const BURST: u64 = 64 * 1514;

/// A switch, as long as cards are on it.
struct Switch {
    name: String,
    state: Mutex<State>,
}

struct State {
    network: Network<Mapping>,
    staging: Staging,
    notifiers: HashMap<PortId, Notifier>,
}

/// The switches that there are.
static SWITCHES: Lazy<Mutex<HashMap<String, Weak<Switch>>>> = Lazy::new(|| Mutex::new(HashMap::new()));

fn switch(name: &str) -> Arc<Switch> {
    let mut switches = SWITCHES.lock();
    if let Some(switch) = switches.get(name).and_then(Weak::upgrade) {
        return switch;
    }
    switches.retain(|_, switch| switch.strong_count() > 0);
    let state = State {
        network: Network::new(),
        staging: Staging::new(STAGING_BYTES / PAGE_SIZE),
        notifiers: HashMap::new(),
    };
    let switch = Arc::new(Switch { name: name.to_string(), state: Mutex::new(state) });
    switches.insert(name.to_string(), Arc::downgrade(&switch));
    switch
}

/// What makes a device a network card.
pub struct Card {
    number: u32,
    address: EthernetAddress,
    rate: Option<u64>,
    switch: Arc<Switch>,
    port: PortId,
}

impl Drop for Card {
    fn drop(&mut self) {
        self.switch.state.lock().network.detach(self.port);
    }
}

impl Card {
    /// The card of a guest with this number, on its switch.
    ///
    /// # Errors
    /// What to say when its address is taken there.
    pub fn new(spec: &CardSpec, guest: &str, number: u32) -> Result<Self, String> {
        let switch = switch(&spec.switch);
        let address = spec.address(guest, number);
        let port = Port { isolated: spec.isolated, ..Port::guest(address) };
        let port = switch.state.lock().network.attach(port);
        let port = port.map_err(|error| format!("{address} on switch {}: {error}", switch.name))?;
        Ok(Self { number, address, rate: spec.rate, switch, port })
    }

    /// Its address, as guests and descriptions write it.
    pub fn mac(&self) -> String {
        let bytes: Vec<String> = self.address.0.iter().map(|byte| format!("{byte:02x}")).collect();
        bytes.join(":")
    }

    /// The switch that it is on.
    pub fn switch(&self) -> &str {
        &self.switch.name
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
        let state = self.switch.state.lock();
        let counters = state.network.switch().counters(self.port).unwrap_or_default();
        (counters, state.network.missed(self.port))
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
        let bridge = self.switch.name.clone();
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
            (keys::GSO_TCPV4, "0".into()),
            (keys::GSO_TCPV6, "0".into()),
            (keys::SPLIT_EVENT_CHANNELS, "0".into()),
            (keys::MAX_QUEUES, "1".into()),
        ])
    }

    fn connected(&self) -> Nodes {
        Vec::from([("hotplug-status", "connected".into())])
    }

    fn connect(vif: &Arc<Vif>) -> Result<Arc<Link>, String> {
        if vif.said::<u32>(keys::RX_COPY)? != Some(1) {
            return Err("it does not receive by copies: no other way was offered".into());
        }
        if let Some(queues) = vif.said::<u32>(keys::NUM_QUEUES)?.filter(|queues| *queues != 1) {
            return Err(format!("it wants {queues} queues: one was offered"));
        }
        // One queue may be told of in either way.
        let prefix = if vif.said::<u32>("queue-0/tx-ring-ref")?.is_some() { "queue-0/" } else { "" };
        let ring = |name: &str| {
            let gref = GrantRef::new(vif.needs(&format!("{prefix}{name}"))?);
            let mapped = control::map_granted_pages(vif.domain, &[gref]);
            mapped.map_err(|error| format!("its ring cannot be mapped: {error}"))
        };
        let (transmit, receive) = (ring("tx-ring-ref")?, ring("rx-ring-ref")?);
        let port = EventPort::new(vif.needs(&format!("{prefix}event-channel"))?);
        let channel = control::connect(vif.domain, port)
            .map_err(|errno| format!("its event channel {port} cannot be bound: {errno}"))?;
        let said = |name: &str| Ok::<_, String>(vif.said::<u32>(name)?.is_some_and(|value| value != 0));
        let features =
            Features { scatter_gather: said(keys::SG)?, blank_checksums: !said(keys::NO_CSUM_OFFLOAD)? };
        let mut state = vif.kind.switch.state.lock();
        state.network.connect(vif.kind.port, vif.domain, transmit, receive, features);
        state.notifiers.insert(vif.kind.port, channel.notifier());
        drop(state);
        let link = Link::new();
        executor::spawn(serve(Arc::clone(vif), channel, Arc::clone(&link)));
        Ok(link)
    }
}

/// A connection, from start to end.
async fn serve(vif: Arc<Vif>, mut channel: Channel, link: Arc<Link>) {
    let (switch, port) = (&vif.kind.switch, vif.kind.port);
    let mut bucket = vif.kind.rate.map(|rate| Bucket::new(rate, BURST, time::now_ns()));
    loop {
        let seen = link.bell.rings();
        if link.is_stopping() {
            break;
        }
        let mut state = switch.state.lock();
        let State { network, staging, notifiers } = &mut *state;
        let before = network.switch().counters(port).unwrap_or_default().sent_bytes;
        // Every port of these switches has a guest behind it, or nobody yet.
        let turn = network.turn(time::now_ns(), port, staging, &mut |_, _, _| {});
        let fault = network.take_fault(port);
        let sent = network.switch().counters(port).unwrap_or_default().sent_bytes - before;
        let more = match &turn {
            Ok(turn) => {
                for to in &turn.notify {
                    if let Some(notifier) = notifiers.get(to) {
                        // It may be gone: then there is nobody to tell.
                        let _ = notifier.notify();
                    }
                }
                turn.more
            }
            Err(_) => false,
        };
        let waits = turn.is_ok() && !more && !network.prepare_to_wait(port);
        drop(state);
        if let Some(fault) = fault {
            vif.report(&format!("sent {fault}; it is not told again when that happens"));
        }
        if turn.is_err() {
            vif.broke(&link);
            // The other task has to hear of it first; it stops this one.
            link.bell.after(seen).await;
        } else if let Some(until_ns) = bucket.as_mut().and_then(|bucket| held_until(bucket, sent)) {
            // Its ring fills up, and it waits.
            first(time::until_ns(until_ns), link.bell.after(seen)).await;
        } else if waits {
            if let First::Other(()) = first(channel.fired(), link.bell.after(seen)).await {
                continue;
            }
        } else {
            executor::yield_now().await;
        }
    }
    let mut state = switch.state.lock();
    state.network.disconnect(port);
    state.notifiers.remove(&port);
    drop(state);
    drop(channel);
    link.end();
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

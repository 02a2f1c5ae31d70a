//! Which ports a frame goes to.
//!
//! A guest's port has one address, which nobody else's frames may carry as their source and which does not move. A *trunk* (the
//! physical card) has any: addresses behind it are learnt. What is for an unknown address goes to trunks only, so a guest never
//! sees a frame that is for somebody else.

use crate::filter::{Direction, Filter};
use crate::frame;
use alloc::vec::Vec;
use core::fmt;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use smoltcp::wire::EthernetAddress;

/// Addresses behind trunks that are remembered.
const LEARNT: usize = 1024;
/// How long an address behind a trunk is remembered after its last frame, ns (IEEE 802.1D's default).
const AGEING_NS: u64 = 300_000_000_000;
/// Shortest time between two looks for those, ns.
const AGED_EVERY_NS: u64 = 1_000_000_000;

/// A port of a [`Switch`]. One that was detached is never meant by another's number again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId {
    index: u32,
    life: u32,
}

impl PortId {
    /// Its place in a list of all ports: small, and another's once this port was detached.
    #[must_use]
    pub const fn index(self) -> usize {
        self.index as usize
    }
}

/// What a port is to be.
#[derive(Clone, Debug)]
pub struct Port {
    /// The one address behind it; `None`: a trunk.
    pub address: Option<EthernetAddress>,
    /// What it may send and get.
    pub filter: Filter,
    /// Isolated ports do not reach each other, only those that are not.
    pub isolated: bool,
}

impl Port {
    /// A guest's port, which may send and get everything.
    #[must_use]
    pub fn guest(address: EthernetAddress) -> Self {
        Self { address: Some(address), filter: Filter::default(), isolated: false }
    }

    /// A port with any number of addresses behind it.
    #[must_use]
    pub fn trunk() -> Self {
        Self { address: None, filter: Filter::default(), isolated: false }
    }
}

/// Why a port was not attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachError {
    /// Another port has the address.
    Taken(PortId),
    /// No station has an address of this kind: it is for many, or zero.
    NotUnicast,
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Taken(_) => "another network card of this switch has the same MAC address",
            Self::NotUnicast => {
                "no network card has such a MAC address: its first byte must be even, and it must not be zero"
            }
        })
    }
}

impl core::error::Error for AttachError {}

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It has no whole header.
    Malformed,
    /// Its source is not an address that its port may have.
    Spoofed,
    /// The filter of the port it came from, or of the one it is for.
    Filtered,
    /// It is for nobody else: its own sender, a link-local protocol of bridges, an address that only a trunk could know.
    NoPort,
}

/// What went through a port, as its guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that it sent and that went to at least one port.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that went to it.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that it sent and that were dropped, by reason: malformed, spoofed, filtered, without a port.
    pub dropped: [u64; 4],
    /// Frames for it that its filter dropped.
    pub refused: u64,
}

#[derive(Debug)]
struct Slot {
    life: u32,
    attached: Option<(Port, Counters)>,
}

#[derive(Clone, Copy, Debug)]
enum Station {
    Port(u32),
    Learnt { trunk: u32, seen_ns: u64 },
}

/// A switch: ports, the addresses behind them, and who may send what to whom.
#[derive(Debug, Default)]
pub struct Switch {
    slots: Vec<Slot>,
    free: Vec<u32>,
    trunks: Vec<u32>,
    stations: HashMap<EthernetAddress, Station>,
    learnt: usize,
    aged_ns: u64,
}

/// Bridges keep these to themselves (IEEE 802.1Q, 8.6.3).
fn is_for_bridges(address: EthernetAddress) -> bool {
    let [a, b, c, d, e, last] = address.0;
    [a, b, c, d, e] == [1, 0x80, 0xc2, 0, 0] && last < 16
}

impl Switch {
    /// One without ports.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a port.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(&mut self, port: Port) -> Result<PortId, AttachError> {
        if let Some(address) = port.address {
            if !address.is_unicast() || address.0 == [0; 6] {
                return Err(AttachError::NotUnicast);
            }
            if let Some(&Station::Port(index)) = self.stations.get(&address) {
                return Err(AttachError::Taken(self.id(index)));
            }
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { life: 0, attached: None });
            // Of a `Vec` of slots of over four bytes.
            self.slots.len() as u32 - 1
        });
        match port.address {
            Some(address) => {
                if let Some(Station::Learnt { .. }) = self.stations.insert(address, Station::Port(index)) {
                    self.learnt -= 1;
                }
            }
            None => self.trunks.push(index),
        }
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.attached = Some((port, Counters::default()));
        }
        Ok(self.id(index))
    }

    /// Takes a port away. What went through it is returned; `None`: it was not there.
    pub fn detach(&mut self, id: PortId) -> Option<Counters> {
        let (port, counters) = self.get_mut(id)?.attached.take()?;
        if let Some(slot) = self.slots.get_mut(id.index as usize) {
            slot.life = slot.life.wrapping_add(1);
        }
        self.free.push(id.index);
        match port.address {
            Some(address) => {
                self.stations.remove(&address);
            }
            None => {
                self.trunks.retain(|trunk| *trunk != id.index);
                self.forget(|trunk, _| trunk == id.index);
            }
        }
        Some(counters)
    }

    /// Changes what a port may send and get; false when there is no such port.
    pub fn set_filter(&mut self, id: PortId, filter: Filter) -> bool {
        let port = self.get_mut(id).and_then(|slot| slot.attached.as_mut());
        port.map(|(port, _)| port.filter = filter).is_some()
    }

    /// What went through a port.
    #[must_use]
    pub fn counters(&self, id: PortId) -> Option<Counters> {
        let slot = self.slots.get(id.index as usize).filter(|slot| slot.life == id.life)?;
        slot.attached.as_ref().map(|(_, counters)| *counters)
    }

    fn id(&self, index: u32) -> PortId {
        PortId { index, life: self.slots.get(index as usize).map_or(0, |slot| slot.life) }
    }

    fn get_mut(&mut self, id: PortId) -> Option<&mut Slot> {
        self.slots.get_mut(id.index as usize).filter(|slot| slot.life == id.life)
    }

    fn forget(&mut self, which: impl Fn(u32, u64) -> bool) {
        self.stations.retain(|_, station| match *station {
            Station::Learnt { trunk, seen_ns } => !which(trunk, seen_ns),
            Station::Port(_) => true,
        });
        self.learnt = self.stations.values().filter(|s| matches!(s, Station::Learnt { .. })).count();
    }

    /// Where a frame goes that came from a port: `deliver` is called once for each port that gets it. `head` are its first bytes,
    /// [`HEAD`](crate::HEAD) or all; `bytes` is its length.
    ///
    /// # Errors
    /// Why nobody gets it. A port that is not attached sends nothing ([`Reason::NoPort`]).
    pub fn forward(
        &mut self,
        now_ns: u64,
        from: PortId,
        head: &[u8],
        bytes: usize,
        mut deliver: impl FnMut(PortId),
    ) -> Result<(), Reason> {
        let result = self.route(now_ns, from, head, bytes, &mut deliver);
        if let Some((_, counters)) = self.get_mut(from).and_then(|slot| slot.attached.as_mut()) {
            match result {
                Ok(()) => {
                    counters.sent_frames += 1;
                    counters.sent_bytes += bytes as u64;
                }
                Err(reason) => {
                    if let Some(count) = counters.dropped.get_mut(reason as usize) {
                        *count += 1;
                    }
                }
            }
        }
        result
    }

    fn route(
        &mut self,
        now_ns: u64,
        from: PortId,
        head: &[u8],
        bytes: usize,
        deliver: &mut impl FnMut(PortId),
    ) -> Result<(), Reason> {
        let (to, source, _) = frame::ethernet(head).ok_or(Reason::Malformed)?;
        let slot = self.get_mut(from).ok_or(Reason::NoPort)?;
        let (port, _) = slot.attached.as_ref().ok_or(Reason::NoPort)?;
        let trunk = port.address.is_none();
        if port.address.is_some_and(|own| own != source) || !source.is_unicast() {
            return Err(Reason::Spoofed);
        }
        if !port.filter.is_open() && !port.filter.passes(Direction::Out, head) {
            return Err(Reason::Filtered);
        }
        let isolated = port.isolated;
        if trunk {
            self.learn(now_ns, from.index, source)?;
        }
        if is_for_bridges(to) {
            return Err(Reason::NoPort);
        }
        if to.is_unicast() {
            return match self.stations.get(&to).copied() {
                Some(Station::Port(index) | Station::Learnt { trunk: index, .. }) => {
                    self.deliver(from.index, isolated, index, head, bytes, deliver)
                }
                None => self.flood_trunks(from.index, head, bytes, deliver),
            };
        }
        let mut result = Err(Reason::NoPort);
        for index in 0..self.slots.len() as u32 {
            result = result.or(self.deliver(from.index, isolated, index, head, bytes, deliver));
        }
        result
    }

    fn flood_trunks(
        &mut self,
        from: u32,
        head: &[u8],
        bytes: usize,
        deliver: &mut impl FnMut(PortId),
    ) -> Result<(), Reason> {
        let mut result = Err(Reason::NoPort);
        for at in 0..self.trunks.len() {
            if let Some(&index) = self.trunks.get(at) {
                result = result.or(self.deliver(from, false, index, head, bytes, deliver));
            }
        }
        result
    }

    /// Notes that an address is behind a trunk.
    fn learn(&mut self, now_ns: u64, trunk: u32, source: EthernetAddress) -> Result<(), Reason> {
        let full = self.learnt >= LEARNT;
        let station = Station::Learnt { trunk, seen_ns: now_ns };
        match self.stations.entry(source) {
            Entry::Occupied(mut entry) => match entry.get() {
                // A guest's address does not move to where anybody could be.
                Station::Port(_) => return Err(Reason::Spoofed),
                Station::Learnt { .. } => *entry.get_mut() = station,
            },
            Entry::Vacant(entry) if !full => {
                entry.insert(station);
                self.learnt += 1;
            }
            // It works without, at the price of copies to all trunks.
            Entry::Vacant(_) if now_ns.saturating_sub(self.aged_ns) >= AGED_EVERY_NS => {
                self.aged_ns = now_ns;
                self.forget(|_, seen_ns| now_ns.saturating_sub(seen_ns) > AGEING_NS);
            }
            Entry::Vacant(_) => {}
        }
        Ok(())
    }

    fn deliver(
        &mut self,
        from: u32,
        isolated: bool,
        to: u32,
        head: &[u8],
        bytes: usize,
        deliver: &mut impl FnMut(PortId),
    ) -> Result<(), Reason> {
        let id = self.id(to);
        let slot = self.slots.get_mut(to as usize).ok_or(Reason::NoPort)?;
        let (port, counters) = slot.attached.as_mut().ok_or(Reason::NoPort)?;
        if to == from || isolated && port.isolated {
            return Err(Reason::NoPort);
        }
        if !port.filter.is_open() && !port.filter.passes(Direction::In, head) {
            counters.refused += 1;
            return Err(Reason::Filtered);
        }
        counters.received_frames += 1;
        counters.received_bytes += bytes as u64;
        deliver(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests;

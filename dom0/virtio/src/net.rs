//! Network cards (5.1): frames out of anybody's memory, frames in into pages of ours.
//!
//! One queue for each direction. What is received is a page with the frame in it, which goes back to the card by [`Net::post`] when
//! it has been read; a card without pages drops what comes in.

use crate::queue::Queue;
use crate::transport::{Doorbell, Transport, Vectors, feature};
use crate::{Device, DmaPage, Error, Fault, Platform, Segment};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;
use guest_sdk::ring::SharedPage as _;

/// Features of network cards (5.1.3).
const CHECKSUM: u64 = 1 << 0;
const GUEST_CHECKSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const STATUS: u64 = 1 << 16;
const WANTED: u64 = MTU | MAC | STATUS | feature::EVENT_INDEX;

/// Queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// In the status register: somebody is at the other end.
const LINK_UP: u16 = 1;
/// Bytes before each frame in its memory (5.1.6).
pub const HEADER: usize = 12;
/// What a header has of its page: a power of two.
const HEADER_SLOT: usize = 16;
/// Flags of a header.
const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// Kinds of segmentation.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Bytes of a frame without its checksum and without a VLAN tag, beside the MTU.
const ETHERNET: u32 = 14;
/// Smallest and largest MTU that is believed; one page holds a frame.
const MTUS: core::ops::RangeInclusive<u16> = 68..=4000;
/// Segments of a frame to send at most.
pub const MOST_SEGMENTS: usize = 32;

/// What a card is asked to do for its user, as far as it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Sent frames may lack their TCP or UDP checksum ([`Checksum::Blank`]).
    pub send_checksum: bool,
    /// Received frames may lack it, or come with the word that it is right.
    pub receive_checksum: bool,
    /// Sent frames may be TCP segments larger than the MTU ([`Gso`]). Only with `send_checksum`.
    pub send_segments: bool,
}

/// About a frame's TCP or UDP checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// It is in the frame, as far as anybody knows.
    #[default]
    There,
    /// It is in the frame, and right.
    Right,
    /// It is to be made: over all from byte `start` of the frame on, and put `offset` bytes behind that, where the sum of the
    /// pseudo-header is.
    Blank {
        /// Where what it covers begins.
        start: u16,
        /// Where it goes, from there.
        offset: u16,
    },
}

/// A TCP segment that is to be cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// IPv6, not IPv4.
    pub ipv6: bool,
    /// Bytes of each piece's payload.
    pub payload: u16,
    /// Bytes of all headers.
    pub headers: u16,
}

/// What is known of a frame beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its checksum.
    pub checksum: Checksum,
    /// It is to be cut up.
    pub gso: Option<Gso>,
}

/// A frame that came in.
#[derive(Debug)]
pub struct Frame<P> {
    /// Where it is. It goes back by [`Net::post`].
    pub page: P,
    /// How many bytes it has; they begin at [`HEADER`].
    pub bytes: usize,
    /// What is known of it.
    pub about: About,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// No room: there is some after the next one has been sent.
    Full,
    /// Too long, of no bytes, of too many segments, or it asks for what was not agreed on.
    Shape,
    /// The card is broken for good.
    Broken,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "the card has no room",
            Self::Shape => "a frame that the card does not send",
            Self::Broken => "the card is broken",
        })
    }
}

impl core::error::Error for Rejected {}

/// What went through a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that came in and were none: too short.
    pub bad: u64,
}

/// A network card. `T` is what a sent frame is known by; it owns the frame's memory.
pub struct Net<P: Platform, T> {
    // Dropped first: it cuts the device off from the memory behind it.
    device: Device<P>,
    mac: [u8; 6],
    mtu: u16,
    link: bool,
    receive: Queue<P::Page>,
    receive_bell: Doorbell,
    transmit: Queue<P::Page>,
    transmit_bell: Doorbell,
    /// Headers of frames to send, one for each descriptor that can be a frame's first.
    headers: P::Page,
    free: Vec<u16>,
    /// Frames to send, by the number of their header; with their bytes.
    sending: Vec<Option<(T, u64)>>,
    /// The header of a chain.
    owners: Vec<u16>,
    /// Pages to receive into, by the number of their chain.
    pages: Vec<Option<P::Page>>,
    /// What a reset gave back.
    unsent: VecDeque<T>,
    read: Vec<Segment>,
    counters: Counters,
}

impl<P: Platform, T> fmt::Debug for Net<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).field("mtu", &self.mtu).finish_non_exhaustive()
    }
}

impl<P: Platform, T> Net<P, T> {
    /// Brings a card up, with `buffers` pages to receive into.
    ///
    /// # Errors
    /// When it cannot be used; it can reach no memory then.
    pub fn start(
        transport: Transport<P>,
        vectors: Vectors,
        offloads: Offloads,
        buffers: u16,
    ) -> Result<Self, Error> {
        let mut wanted = WANTED;
        if offloads.send_checksum {
            wanted |= CHECKSUM;
            if offloads.send_segments {
                wanted |= HOST_TSO4 | HOST_TSO6;
            }
        }
        if offloads.receive_checksum {
            wanted |= GUEST_CHECKSUM;
        }
        let device = Device::start(transport, vectors, wanted)?;
        let receive = device.make_queue(RECEIVE)?;
        let transmit = device.make_queue(TRANSMIT)?;
        let receive_bell = device.set_queue(RECEIVE, &receive)?;
        let transmit_bell = device.set_queue(TRANSMIT, &transmit)?;
        let headers = device.transport().page()?;
        let (mac, mtu) = device.transport().own(|own| {
            let mac = core::array::from_fn(|index| own.u8(index as u64));
            (mac, if device.has(MTU) { own.u16(10) } else { 1500 })
        });
        let slots = transmit.size();
        let mut net = Self {
            // A card without an address gets one of those that are nobody's, told apart by its place.
            mac: if device.has(MAC) { mac } else { local_address(device.transport().address()) },
            mtu: if MTUS.contains(&mtu) { mtu } else { 1500 },
            link: true,
            free: (0..slots).rev().collect(),
            sending: (0..slots).map(|_| None).collect(),
            owners: alloc::vec![0; usize::from(slots)],
            pages: (0..receive.size()).map(|_| None).collect(),
            device,
            receive,
            receive_bell,
            transmit,
            transmit_bell,
            headers,
            unsent: VecDeque::new(),
            read: Vec::new(),
            counters: Counters::default(),
        };
        net.link = net.read_link();
        for _ in 0..buffers.min(net.receive.size()) {
            let page = net.device.transport().page()?;
            let _ = net.enter(page);
        }
        net.device.transport().go();
        net.kick();
        Ok(net)
    }

    fn read_link(&self) -> bool {
        !self.device.has(STATUS) || self.device.transport().own(|own| own.u16(6)) & LINK_UP != 0
    }

    /// Its address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Bytes behind the Ethernet header of a frame at most.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Whether somebody is at the other end, as it was when it was last looked.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.link
    }

    /// What was agreed on.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        let has = |features: u64| self.device.has(features);
        Offloads {
            send_checksum: has(CHECKSUM),
            receive_checksum: has(GUEST_CHECKSUM),
            send_segments: has(HOST_TSO4 | HOST_TSO6),
        }
    }

    /// What it has as any device.
    #[must_use]
    pub fn device(&self) -> &Device<P> {
        &self.device
    }

    /// The same, to take its fault.
    pub fn device_mut(&mut self) -> &mut Device<P> {
        &mut self.device
    }

    /// What went through it.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes a frame to send; the card is told of it by [`Net::kick`]. Its memory is the card's until `tag` comes back from
    /// [`Net::sent`].
    ///
    /// # Errors
    /// Why not, and the tag.
    pub fn send(&mut self, about: About, segments: &[Segment], tag: T) -> Result<(), (Rejected, T)> {
        if self.device.is_broken() {
            return Err((Rejected::Broken, tag));
        }
        let bytes = segments.iter().map(|segment| u64::from(segment.bytes)).sum::<u64>();
        let Some(words) = self
            .header(about, bytes)
            .filter(|_| segments.len() <= MOST_SEGMENTS && segments.iter().all(|segment| segment.bytes > 0))
        else {
            return Err((Rejected::Shape, tag));
        };
        if usize::from(self.transmit.free()) <= segments.len() {
            return Err((Rejected::Full, tag));
        }
        let Some(slot) = self.free.pop() else { return Err((Rejected::Full, tag)) };
        let at = usize::from(slot) * HEADER_SLOT;
        for (word, at) in words.into_iter().zip((at..).step_by(4)) {
            self.headers.word(at).store(word, Ordering::Relaxed);
        }
        self.read.clear();
        self.read.push(Segment { address: self.headers.machine_address() + at as u64, bytes: HEADER as u32 });
        self.read.extend_from_slice(segments);
        let Some(head) = self.transmit.add(&self.read, &[]) else {
            self.free.push(slot);
            return Err((Rejected::Full, tag));
        };
        if let (Some(owner), Some(sending)) =
            (self.owners.get_mut(usize::from(head)), self.sending.get_mut(usize::from(slot)))
        {
            *owner = slot;
            *sending = Some((tag, bytes));
        }
        Ok(())
    }

    /// The header of a frame, as words; none for what was not agreed on, or makes no sense.
    fn header(&self, about: About, bytes: u64) -> Option<[u32; 3]> {
        let offloads = self.offloads();
        let most = if about.gso.is_some() { 0xffff } else { u64::from(self.mtu) };
        // Longer by a VLAN tag at most.
        if bytes < u64::from(ETHERNET) || bytes > most + u64::from(ETHERNET) + 4 {
            return None;
        }
        let (mut flags, mut start, mut offset) = (0, 0, 0);
        if let Checksum::Blank { start: from, offset: at } = about.checksum {
            if !offloads.send_checksum || u64::from(from) + u64::from(at) + 2 > bytes {
                return None;
            }
            (flags, start, offset) = (NEEDS_CHECKSUM, from, at);
        }
        let (mut kind, mut headers, mut payload) = (GSO_NONE, 0, 0);
        if let Some(gso) = about.gso {
            if !offloads.send_segments || flags == 0 || gso.payload == 0 || u64::from(gso.headers) >= bytes {
                return None;
            }
            kind = if gso.ipv6 { GSO_TCPV6 } else { GSO_TCPV4 };
            (headers, payload) = (gso.headers, gso.payload);
        }
        let first = u32::from(flags) | u32::from(kind) << 8 | u32::from(headers) << 16;
        let second = u32::from(payload) | u32::from(start) << 16;
        Some([first, second, u32::from(offset)])
    }

    /// Gives the card a page to receive into; it is told of it by [`Net::kick`].
    ///
    /// # Errors
    /// The page, when the card has as many as it can have, or is broken.
    pub fn post(&mut self, page: P::Page) -> Result<(), P::Page> {
        if self.device.is_broken() { Err(page) } else { self.enter(page) }
    }

    fn enter(&mut self, page: P::Page) -> Result<(), P::Page> {
        let segment = Segment { address: page.machine_address(), bytes: self.buffer_bytes() };
        let Some(head) = self.receive.add(&[], &[segment]) else { return Err(page) };
        if let Some(place) = self.pages.get_mut(usize::from(head)) {
            *place = Some(page);
        }
        Ok(())
    }

    fn buffer_bytes(&self) -> u32 {
        (HEADER as u32 + ETHERNET + 4 + u32::from(self.mtu)).min(4096)
    }

    /// Tells the card of all that was taken, if it has to be told.
    pub fn kick(&mut self) {
        if self.device.is_broken() {
            return;
        }
        if self.receive.show() {
            self.device.transport().ring(self.receive_bell);
        }
        if self.transmit.show() {
            self.device.transport().ring(self.transmit_bell);
        }
    }

    /// The next frame that has left, or was dropped because the card broke.
    pub fn sent(&mut self) -> Option<T> {
        loop {
            if let Some(tag) = self.unsent.pop_front() {
                return Some(tag);
            }
            if self.device.is_broken() {
                return None;
            }
            match self.transmit.take() {
                Ok(None) => return None,
                Ok(Some((head, _))) => {
                    let slot = self.owners.get(usize::from(head)).copied()?;
                    let Some((tag, bytes)) = self.sending.get_mut(usize::from(slot)).and_then(Option::take)
                    else {
                        continue;
                    };
                    self.free.push(slot);
                    self.counters.sent += 1;
                    self.counters.sent_bytes += bytes;
                    return Some(tag);
                }
                Err(fault) => self.fail(fault),
            }
        }
    }

    /// The next frame that came in.
    pub fn received(&mut self) -> Option<Frame<P::Page>> {
        while !self.device.is_broken() {
            match self.receive.take() {
                Ok(None) => return None,
                Ok(Some((head, bytes))) => {
                    let page = self.pages.get_mut(usize::from(head)).and_then(Option::take)?;
                    let bytes = (bytes as usize).saturating_sub(HEADER);
                    if bytes < ETHERNET as usize {
                        self.counters.bad += 1;
                        let _ = self.enter(page);
                        continue;
                    }
                    self.counters.received += 1;
                    self.counters.received_bytes += bytes as u64;
                    let about = self.about(&page, bytes);
                    return Some(Frame { page, bytes, about });
                }
                Err(fault) => self.fail(fault),
            }
        }
        None
    }

    /// What the card says of a frame, as far as it makes sense.
    fn about(&self, page: &P::Page, bytes: usize) -> About {
        let first = page.word(0).load(Ordering::Relaxed);
        let second = page.word(4).load(Ordering::Relaxed);
        let third = page.word(8).load(Ordering::Relaxed);
        let (start, offset) = ((second >> 16) as u16, third as u16);
        let agreed = self.device.has(GUEST_CHECKSUM);
        let fits = usize::from(start) + usize::from(offset) + 2 <= bytes;
        let checksum = match first as u8 {
            flags if agreed && flags & NEEDS_CHECKSUM != 0 && fits => Checksum::Blank { start, offset },
            flags if agreed && flags & DATA_VALID != 0 => Checksum::Right,
            _ => Checksum::There,
        };
        About { checksum, gso: None }
    }

    /// Asks for an interrupt at the next frame that comes in or, if `sent`, leaves; true when one is there already.
    #[must_use]
    pub fn listen(&mut self, sent: bool) -> bool {
        if !self.unsent.is_empty() {
            return true;
        }
        if self.device.is_broken() {
            return false;
        }
        let received = self.receive.listen();
        if sent {
            return self.transmit.listen() || received;
        }
        self.transmit.ignore();
        received
    }

    /// Looks at what an interrupt for changes of its configuration is about: whether the device is well, and its link. True when that
    /// has changed.
    pub fn changed(&mut self) -> bool {
        if self.device.is_broken() {
            return false;
        }
        if let Err(fault) = self.device.transport().check() {
            self.fail(fault);
            return false;
        }
        let link = self.read_link();
        core::mem::replace(&mut self.link, link) != link
    }

    /// Its device is taken out of the machine: it is broken for good, and what was not sent comes back.
    pub fn remove(&mut self) {
        if !self.device.is_broken() {
            self.fail(Fault::Removed);
        }
    }

    fn fail(&mut self, fault: Fault) {
        self.device.cut_off(fault);
        for (number, sending) in self.sending.iter_mut().enumerate() {
            if let Some((tag, _)) = sending.take() {
                self.unsent.push_back(tag);
                self.free.push(number as u16);
            }
        }
        if !self.device.is_broken() && self.revive().is_err() {
            self.device.give_up();
        }
        self.link &= !self.device.is_broken();
    }

    fn revive(&mut self) -> Result<(), Error> {
        self.device.start_again()?;
        self.receive_bell = self.device.renew_queue(RECEIVE, &mut self.receive)?;
        self.transmit_bell = self.device.renew_queue(TRANSMIT, &mut self.transmit)?;
        let pages: Vec<P::Page> = self.pages.iter_mut().filter_map(Option::take).collect();
        for page in pages {
            let _ = self.enter(page);
        }
        self.device.transport().go();
        self.kick();
        Ok(())
    }

    /// Ends the use of the card: it can reach no memory any more. What was not sent comes back.
    pub fn stop(mut self) -> Vec<T> {
        let _ = self.device.transport().reset();
        self.sending.iter_mut().filter_map(|sending| sending.take().map(|(tag, _)| tag)).collect()
    }
}

/// An address that no maker has given (locally administered), of a place on the bus.
fn local_address(at: pci::Address) -> [u8; 6] {
    let (bus, devfn) = at.numbers();
    [0x02, 0x76, 0x69, 0x72, bus, devfn]
}

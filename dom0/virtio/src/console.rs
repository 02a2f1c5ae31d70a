//! Consoles (5.3): ports that carry bytes to the host and from it.
//!
//! A device has one port, or several with names (`VIRTIO_CONSOLE_F_MULTIPORT`), of which the host may open and close each; what they are
//! called and whether somebody is there comes over a queue of messages. What a port receives stays in its page until it has been
//! read, and the page is lent to the device again then: a host that sends more than is read has to wait.

use crate::queue::Queue;
use crate::transport::{Doorbell, Transport, Vectors, feature};
use crate::{Device, DmaPage, Error, Fault, Platform, Segment};
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// Several ports (5.3.3).
const MULTIPORT: u64 = 1 << 1;
const WANTED: u64 = MULTIPORT | feature::EVENT_INDEX;

/// Ports that are used at most; a device may have more.
pub const MOST_PORTS: u32 = 8;
/// Pages of a port to receive into, and as many to send from.
const PAGES: usize = 4;
const PAGE: usize = 4096;

/// Queues of messages about ports.
const CONTROL_IN: u16 = 2;
const CONTROL_OUT: u16 = 3;
/// Bytes of a message, without the name behind it; room for one with a name.
const MESSAGE: usize = 8;
const MESSAGE_ROOM: usize = 128;
const MESSAGES: usize = PAGE / MESSAGE_ROOM;

/// What messages say (5.3.6.2).
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const DEVICE_REMOVE: u16 = 2;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The queues of a port: to receive from and to send with.
const fn queues_of(port: u32) -> (u16, u16) {
    let first = if port == 0 { 0 } else { 2 + 2 * port as u16 };
    (first, first + 1)
}

/// A page that is ours, or under way with a number.
struct Lent<D> {
    page: D,
    head: Option<u16>,
}

/// A port.
struct Port<D> {
    receive: Queue<D>,
    receive_bell: Doorbell,
    transmit: Queue<D>,
    transmit_bell: Doorbell,
    incoming: Vec<Lent<D>>,
    outgoing: Vec<Lent<D>>,
    /// Pages with what came in: which, from where on, to where.
    ready: VecDeque<(usize, usize, usize)>,
    there: bool,
    name: Option<String>,
    host_open: bool,
    opens: u64,
    open: bool,
}

/// What is known of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Its number.
    pub number: u32,
    /// Its name, if the host gave it one.
    pub name: Option<String>,
    /// Somebody is at the host's end. A device without messages does not say: it is as if there were.
    pub host_open: bool,
    /// How often somebody has come there.
    pub opens: u64,
}

/// The queues of messages.
struct Control<D> {
    receive: Queue<D>,
    receive_bell: Doorbell,
    transmit: Queue<D>,
    transmit_bell: Doorbell,
    incoming: D,
    outgoing: D,
    /// Which part of a page a chain is, by its number.
    receiving: Vec<usize>,
    sending: Vec<usize>,
    free: Vec<usize>,
    waiting: VecDeque<[u8; MESSAGE]>,
}

/// What the device says about a port.
struct Message {
    port: u32,
    event: u16,
    value: u16,
    /// What is behind it.
    name: Vec<u8>,
}

/// What went through a console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read from its ports.
    pub received_bytes: u64,
    /// Bytes written to them.
    pub sent_bytes: u64,
}

/// A console.
pub struct Console<P: Platform> {
    // Dropped first: it cuts the device off from the memory behind it.
    device: Device<P>,
    ports: Vec<Port<P::Page>>,
    control: Option<Control<P::Page>>,
    counters: Counters,
}

impl<P: Platform> fmt::Debug for Console<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("ports", &self.ports.len()).finish_non_exhaustive()
    }
}

impl<D: DmaPage> Port<D> {
    /// Forgets all that was under way. The device knows nothing of it any more.
    fn clear(&mut self, event_index: bool) {
        self.receive.clear(event_index);
        self.transmit.clear(event_index);
        self.incoming.iter_mut().chain(&mut self.outgoing).for_each(|lent| lent.head = None);
        self.ready.clear();
        (self.there, self.host_open) = (false, false);
    }

    /// Lends the device what pages of ours are empty.
    fn lend(&mut self) {
        for index in 0..self.incoming.len() {
            let used = self.ready.iter().any(|(ready, _, _)| *ready == index);
            let Some(lent) = self.incoming.get_mut(index).filter(|lent| !used && lent.head.is_none()) else {
                continue;
            };
            let segment = Segment { address: lent.page.machine_address(), bytes: PAGE as u32 };
            lent.head = self.receive.add(&[], &[segment]);
        }
    }

    fn turn(&mut self) -> Result<bool, Fault> {
        let mut news = false;
        while let Some((head, bytes)) = self.receive.take()? {
            news = true;
            let index = self.incoming.iter().position(|lent| lent.head == Some(head));
            let index = index.ok_or(Fault::Id(head.into()))?;
            if let Some(lent) = self.incoming.get_mut(index) {
                lent.head = None;
            }
            if bytes > 0 {
                self.ready.push_back((index, 0, bytes as usize));
            }
        }
        while let Some((head, _)) = self.transmit.take()? {
            news = true;
            if let Some(lent) = self.outgoing.iter_mut().find(|lent| lent.head == Some(head)) {
                lent.head = None;
            }
        }
        self.lend();
        Ok(news)
    }

    fn read(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some((index, at, end)) = self.ready.front_mut() {
            let now = (*end - *at).min(to.len() - done);
            if let (Some(lent), Some(part)) = (self.incoming.get(*index), to.get_mut(done..done + now)) {
                lent.page.read_bytes(*at, part);
            }
            (*at, done) = (*at + now, done + now);
            if at < end {
                break;
            }
            self.ready.pop_front();
        }
        self.lend();
        done
    }

    fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for lent in self.outgoing.iter_mut().filter(|lent| lent.head.is_none()) {
            let part = from.get(done..).unwrap_or_default();
            let part = part.get(..part.len().min(PAGE)).unwrap_or_default();
            if part.is_empty() {
                break;
            }
            lent.page.write_bytes(0, part);
            let segment = Segment { address: lent.page.machine_address(), bytes: part.len() as u32 };
            lent.head = self.transmit.add(&[segment], &[]);
            if lent.head.is_none() {
                break;
            }
            done += part.len();
        }
        done
    }
}

impl<D: DmaPage> Control<D> {
    fn clear(&mut self, event_index: bool) {
        self.receive.clear(event_index);
        self.transmit.clear(event_index);
        self.free = (0..MESSAGES).collect();
        self.waiting.clear();
        (0..MESSAGES).for_each(|part| self.lend(part));
    }

    fn part(page: &D, part: usize, bytes: usize) -> Segment {
        Segment { address: page.machine_address() + (part * MESSAGE_ROOM) as u64, bytes: bytes as u32 }
    }

    fn lend(&mut self, part: usize) {
        if let Some(head) = self.receive.add(&[], &[Self::part(&self.incoming, part, MESSAGE_ROOM)])
            && let Some(place) = self.receiving.get_mut(usize::from(head))
        {
            *place = part;
        }
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = [0; MESSAGE];
        message[..4].copy_from_slice(&port.to_le_bytes());
        message[4..6].copy_from_slice(&event.to_le_bytes());
        message[6..].copy_from_slice(&value.to_le_bytes());
        self.waiting.push_back(message);
        self.send();
    }

    fn send(&mut self) {
        while let (Some(part), Some(message)) = (self.free.last().copied(), self.waiting.front()) {
            self.outgoing.write_bytes(part * MESSAGE_ROOM, message);
            let Some(head) = self.transmit.add(&[Self::part(&self.outgoing, part, MESSAGE)], &[]) else {
                return;
            };
            self.free.pop();
            self.waiting.pop_front();
            if let Some(place) = self.sending.get_mut(usize::from(head)) {
                *place = part;
            }
        }
    }

    /// The next message, with a name if it has one.
    fn take(&mut self) -> Result<Option<Message>, Fault> {
        while let Some((head, _)) = self.transmit.take()? {
            self.free.extend(self.sending.get(usize::from(head)));
        }
        self.send();
        let Some((head, bytes)) = self.receive.take()? else { return Ok(None) };
        let part = self.receiving.get(usize::from(head)).copied().unwrap_or(0);
        let mut text = alloc::vec![0; (bytes as usize).min(MESSAGE_ROOM)];
        self.incoming.read_bytes(part * MESSAGE_ROOM, &mut text);
        self.lend(part);
        let name = if text.len() < MESSAGE { return Err(Fault::Message) } else { text.split_off(MESSAGE) };
        let word = |at: usize| text.get(at).copied().unwrap_or(0);
        Ok(Some(Message {
            port: u32::from_le_bytes([word(0), word(1), word(2), word(3)]),
            event: u16::from_le_bytes([word(4), word(5)]),
            value: u16::from_le_bytes([word(6), word(7)]),
            name,
        }))
    }
}

impl<P: Platform> Console<P> {
    /// Brings a console up.
    ///
    /// # Errors
    /// When it cannot be used; it can reach no memory then.
    pub fn start(transport: Transport<P>, vectors: Vectors) -> Result<Self, Error> {
        let device = Device::start(transport, vectors, WANTED)?;
        let several = device.has(MULTIPORT);
        let count = if several { device.transport().own(|own| own.u32(4)).clamp(1, MOST_PORTS) } else { 1 };
        let mut ports = Vec::new();
        for port in 0..count {
            ports.push(Self::port(&device, port)?);
        }
        let control = if several { Some(Self::control(&device)?) } else { None };
        let mut console = Self { device, ports, control, counters: Counters::default() };
        console.go();
        Ok(console)
    }

    fn port(device: &Device<P>, number: u32) -> Result<Port<P::Page>, Error> {
        let (receiving, sending) = queues_of(number);
        let receive = device.make_queue(receiving)?;
        let transmit = device.make_queue(sending)?;
        let page = |_| device.transport().page().map(|page| Lent { page, head: None });
        let pages = || (0..PAGES).map(page).collect::<Result<Vec<_>, Error>>();
        Ok(Port {
            receive_bell: device.set_queue(receiving, &receive)?,
            transmit_bell: device.set_queue(sending, &transmit)?,
            receive,
            transmit,
            incoming: pages()?,
            outgoing: pages()?,
            ready: VecDeque::new(),
            there: false,
            name: None,
            host_open: false,
            opens: 0,
            open: false,
        })
    }

    fn control(device: &Device<P>) -> Result<Control<P::Page>, Error> {
        let receive = device.make_queue(CONTROL_IN)?;
        let transmit = device.make_queue(CONTROL_OUT)?;
        let mut control = Control {
            receive_bell: device.set_queue(CONTROL_IN, &receive)?,
            transmit_bell: device.set_queue(CONTROL_OUT, &transmit)?,
            receiving: alloc::vec![0; usize::from(receive.size())],
            sending: alloc::vec![0; usize::from(transmit.size())],
            receive,
            transmit,
            incoming: device.transport().page()?,
            outgoing: device.transport().page()?,
            free: (0..MESSAGES).collect(),
            waiting: VecDeque::new(),
        };
        (0..MESSAGES).for_each(|part| control.lend(part));
        Ok(control)
    }

    /// Has it work, and says so.
    fn go(&mut self) {
        self.device.transport().go();
        self.ports.iter_mut().for_each(Port::lend);
        match &mut self.control {
            Some(control) => control.say(0, DEVICE_READY, 1),
            // Without messages its one port is there, and nobody says who is at the other end.
            None => self.ports.iter_mut().for_each(|port| (port.there, port.host_open) = (true, true)),
        }
        self.kick();
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

    /// The ports that there are.
    pub fn ports(&self) -> impl Iterator<Item = PortInfo> {
        let ports = (0..).zip(&self.ports).filter(|(_, port)| port.there);
        ports.map(|(number, port)| PortInfo {
            number,
            name: port.name.clone(),
            host_open: port.host_open,
            opens: port.opens,
        })
    }

    /// The port of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<u32> {
        self.ports().find(|port| port.name.as_deref() == Some(name)).map(|port| port.number)
    }

    /// Says that somebody is at this end of a port, or nobody any more. The host does not send before.
    pub fn set_open(&mut self, number: u32, open: bool) {
        if let Some(port) = self.ports.get_mut(number as usize).filter(|port| port.open != open) {
            port.open = open;
            if let Some(control) = self.control.as_mut().filter(|_| port.there) {
                control.say(number, PORT_OPEN, open.into());
            }
            self.kick();
        }
    }

    /// Takes what the device has done. True when something is new: bytes, room, a port, somebody at its other end.
    pub fn turn(&mut self) -> bool {
        if self.device.is_broken() {
            return false;
        }
        let news = self.take();
        match news {
            Ok(news) => {
                self.kick();
                news
            }
            Err(fault) => {
                self.fail(fault);
                true
            }
        }
    }

    fn take(&mut self) -> Result<bool, Fault> {
        let mut news = false;
        // Before the messages: of whose bytes are here, it has been said by now that they have come.
        for port in &mut self.ports {
            news |= port.turn()?;
        }
        if let Some(control) = &mut self.control {
            while let Some(Message { port: number, event, value, name }) = control.take()? {
                news = true;
                // Of a port beyond those that are used, nobody wants to know.
                let Some(port) = self.ports.get_mut(number as usize) else { continue };
                match event {
                    DEVICE_ADD => {
                        port.there = true;
                        control.say(number, PORT_READY, 1);
                        if port.open {
                            control.say(number, PORT_OPEN, 1);
                        }
                    }
                    DEVICE_REMOVE => (port.there, port.host_open, port.name) = (false, false, None),
                    PORT_OPEN => {
                        port.host_open = value != 0;
                        port.opens += u64::from(port.host_open);
                    }
                    PORT_NAME => {
                        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
                        let name = name.get(..end).unwrap_or_default();
                        port.name = Some(String::from_utf8_lossy(name).into_owned());
                    }
                    // Of screens and their sizes nothing is made here.
                    _ => {}
                }
            }
        }
        Ok(news)
    }

    /// Takes bytes that a port has received; gives how many.
    pub fn read(&mut self, number: u32, to: &mut [u8]) -> usize {
        let Some(port) = self.ports.get_mut(number as usize).filter(|_| !self.device.is_broken()) else {
            return 0;
        };
        let done = port.read(to);
        self.counters.received_bytes += done as u64;
        self.kick();
        done
    }

    /// Gives a port bytes to send; gives how many it took.
    pub fn write(&mut self, number: u32, from: &[u8]) -> usize {
        let port = self.ports.get_mut(number as usize).filter(|port| port.there && !self.device.is_broken());
        let Some(port) = port else { return 0 };
        let done = port.write(from);
        self.counters.sent_bytes += done as u64;
        self.kick();
        done
    }

    /// Whether the device has taken all that was written to a port.
    #[must_use]
    pub fn has_sent(&self, number: u32) -> bool {
        let port = self.ports.get(number as usize).filter(|_| !self.device.is_broken());
        port.is_none_or(|port| port.outgoing.iter().all(|lent| lent.head.is_none()))
    }

    /// Tells the device of all that is new.
    fn kick(&mut self) {
        let transport = self.device.transport();
        let tell = |queue: &mut Queue<P::Page>, bell: Doorbell| {
            if queue.show() {
                transport.ring(bell);
            }
        };
        for port in &mut self.ports {
            tell(&mut port.receive, port.receive_bell);
            tell(&mut port.transmit, port.transmit_bell);
        }
        if let Some(control) = &mut self.control {
            tell(&mut control.receive, control.receive_bell);
            tell(&mut control.transmit, control.transmit_bell);
        }
    }

    /// Asks for interrupts at whatever comes next; true when there is something already.
    #[must_use]
    pub fn listen(&mut self) -> bool {
        if self.device.is_broken() {
            return false;
        }
        let mut more = false;
        for port in &mut self.ports {
            more |= port.receive.listen();
            more |= port.transmit.listen();
        }
        if let Some(control) = &mut self.control {
            more |= control.receive.listen();
            more |= control.transmit.listen();
        }
        more
    }

    /// Looks whether the device is well, after an interrupt for changes of its configuration.
    pub fn changed(&mut self) {
        if !self.device.is_broken()
            && let Err(fault) = self.device.transport().check()
        {
            self.fail(fault);
        }
    }

    fn fail(&mut self, fault: Fault) {
        self.device.cut_off(fault);
        if !self.device.is_broken() && self.revive().is_err() {
            self.device.give_up();
        }
        if self.device.is_broken() {
            self.ports.iter_mut().for_each(|port| port.clear(false));
        }
    }

    /// Starts it again. What was under way in either direction is lost, as with a cable that was pulled.
    fn revive(&mut self) -> Result<(), Error> {
        self.device.start_again()?;
        let event_index = self.device.has(feature::EVENT_INDEX);
        for (number, port) in (0..).zip(&mut self.ports) {
            port.clear(event_index);
            let (receive, transmit) = queues_of(number);
            port.receive_bell = self.device.set_queue(receive, &port.receive)?;
            port.transmit_bell = self.device.set_queue(transmit, &port.transmit)?;
        }
        if let Some(control) = &mut self.control {
            control.clear(event_index);
            control.receive_bell = self.device.set_queue(CONTROL_IN, &control.receive)?;
            control.transmit_bell = self.device.set_queue(CONTROL_OUT, &control.transmit)?;
        }
        self.go();
        Ok(())
    }
}

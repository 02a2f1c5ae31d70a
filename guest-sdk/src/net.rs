//! Network cards: the front end of network devices (public/io/netif.h).
//!
//! ```ignore
//! let store = SharedStore::new(domain.xenstore()?);
//! let card = Card::open(&store, 0).await?;
//! card.send(&frame).await?;
//! let mut frame = [0; 1514];
//! let received = card.receive(&mut frame).await?;
//! ```
//! A card has two rings. In one the guest puts requests to send pages of its own; in the other it puts up pages to be filled. All
//! pages are granted when the card is opened and stay granted: nothing is allocated or granted for a frame. Frames of up to 65535
//! bytes go through several pages each, if the back end can do that (`feature-sg`).
//!
//! The other end is notified once for what is there, and not at all while it is at work: [`Card::send`] shows each frame at once,
//! [`Card::queue`] and [`Card::flush`] many together. Answers to what was sent are looked at when pages run short; whoever waits for
//! room is woken when half of what is on its way has been sent.
//!
//! A card may have several queues ([`Options::queues`]), each a pair of rings with its pages and its port. What is sent is spread over them
//! by the addresses and ports in it, so that a flow keeps its order; what comes is taken from all of them in turn.
//!
//! When the back end goes away and comes back, the card connects anew. Frames that were on their way then may be lost: networks lose
//! frames. Only when the device is taken away, or its back end breaks a ring, do calls fail with [`NetError::Gone`].
//!
//! [`Transmit`] and [`Receive`] are the rings alone, over any memory, so that they meet a back end in a host test. With the feature
//! `smoltcp` a card is a device of that stack: [`stack`].

mod control;
mod receive;
#[cfg(feature = "smoltcp")]
pub mod stack;
mod transmit;

pub use receive::Receive;
pub use transmit::Transmit;

use crate::events::{Channel, Events, Notifier};
use crate::executor;
use crate::grants::{GrantError, GrantedPages, Withdrawn};
use crate::memory::Access;
use crate::ring::{Corrupt, SharedPage};
use crate::sync::{Bell, First, first};
use crate::time;
use crate::xenbus::{Frontend, XenbusError, XenbusState};
use crate::xenstore::{SharedStore, StoreError};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use control::ControlRing;
use core::fmt;
use core::ops::Deref;
use core::str::FromStr;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::task::Waker;
use core::time::Duration;
use hypercall_abi::io::netif::{MAX_TX_SIZE, NR_SLOTS_MIN, keys};
use hypercall_abi::{DomId, Errno, GrantRef, PAGE_SIZE};
use spin::Mutex;

/// Bytes of the longest frame.
const MOST_BYTES: usize = MAX_TX_SIZE;
/// Bytes of a frame's head.
const HEADER: usize = 14;
/// Bytes behind the head when nobody says otherwise.
const MTU: usize = 1500;
/// What every host must take (RFC 791).
const LEAST_MTU: usize = 68;
/// How often a back end may close before it is there.
const TRIES: u32 = 4;
/// How long opening waits for the back end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetError {
    /// There is no such card, it was taken away, or its back end cannot be trusted any more.
    Gone,
    /// The back end did not come within ten seconds.
    Timeout,
    /// A frame without bytes, or longer than [`Card::max_frame`].
    Length,
    /// No memory, or no grants, for what is to be done.
    Memory(GrantError),
    /// What the back end says makes no sense.
    Backend(XenbusError),
}

impl From<XenbusError> for NetError {
    fn from(error: XenbusError) -> Self {
        match error {
            XenbusError::Gone => Self::Gone,
            error => Self::Backend(error),
        }
    }
}

impl From<StoreError> for NetError {
    fn from(error: StoreError) -> Self {
        Self::Backend(XenbusError::Store(error))
    }
}

impl From<GrantError> for NetError {
    fn from(error: GrantError) -> Self {
        Self::Memory(error)
    }
}

impl From<Errno> for NetError {
    fn from(errno: Errno) -> Self {
        Self::Memory(GrantError::Call(errno))
    }
}

impl From<Broken> for NetError {
    fn from(_: Broken) -> Self {
        Self::Gone
    }
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("there is no such card, or it was taken away"),
            Self::Timeout => f.write_str("the card's back end does not answer"),
            Self::Length => f.write_str("no frame of the card has this length"),
            Self::Memory(error) => write!(f, "no memory for the card: {error}"),
            Self::Backend(error) => write!(f, "the card's back end: {error}"),
        }
    }
}

impl core::error::Error for NetError {}

/// The back end has broken a ring: an index out of range, or an answer to what was not asked. Nothing that comes from there counts any
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the back end has broken its ring")
    }
}

impl core::error::Error for Broken {}

impl From<Corrupt> for Broken {
    fn from(_: Corrupt) -> Self {
        Self
    }
}

/// Pages that a back end may use, side by side.
pub trait Pages: SharedPage {
    /// Bytes of a page that is withdrawn for a while.
    type Own<'a>: Deref<Target = [u8]>
    where
        Self: 'a;

    /// The numbers that the back end needs, one for each page.
    fn references(&self) -> &[GrantRef];

    /// Keeps the back end from a page, so that its bytes can be read where they are; `None` when it is using the page.
    fn withdraw(&mut self, page: usize) -> Option<Self::Own<'_>>;

    /// The bytes of a page that the back end can only read; `None` when it may write.
    fn page_mut(&mut self, page: usize) -> Option<&mut [u8]>;
}

impl Pages for GrantedPages {
    type Own<'a> = Withdrawn<'a>;
    fn references(&self) -> &[GrantRef] {
        self.references()
    }
    fn withdraw(&mut self, page: usize) -> Option<Withdrawn<'_>> {
        self.withdraw(page)
    }
    fn page_mut(&mut self, page: usize) -> Option<&mut [u8]> {
        self.page_mut(page)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = NetError;

    /// Six numbers of two hexadecimal digits with colons between them.
    fn from_str(text: &str) -> Result<Self, NetError> {
        let bad = || NetError::Backend(XenbusError::Malformed("mac".to_string(), text.to_string()));
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

/// What is known of a frame's transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing.
    Unknown,
    /// It is right.
    Validated,
    /// It is not filled in; nobody else has seen the frame. Only with [`Options::blank_checksums`].
    Blank,
}

/// What is left to do to a frame that is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Its TCP or UDP checksum over IPv4: the field holds the sum over the pseudo header. Every back end takes that.
    pub checksum_blank: bool,
    /// It is a packet of TCP over IPv4 with a blank checksum, to be cut into segments of so many bytes of payload, not 0. Only when
    /// [`Card::takes_segments`].
    pub segment: Option<u16>,
}

impl Offload {
    /// The frame is sent as it is.
    pub const NOTHING: Self = Self { checksum_blank: false, segment: None };
}

/// What is known of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its bytes, also when they were more than there was room for.
    pub bytes: usize,
    /// Its checksum.
    pub checksum: Checksum,
    /// It is several segments of TCP of so many bytes of payload each, put together. Only with [`Options::segments`].
    pub segment: Option<u16>,
}

/// How a card is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Pages to receive into, 18 to 256: each holds a frame of up to 4096 bytes, or a part of one.
    pub receive_pages: usize,
    /// Pages to send from, 18 to 256.
    pub transmit_pages: usize,
    /// Frames may come without their transport checksums.
    pub blank_checksums: bool,
    /// Packets of TCP over IPv4 may come, and be sent, as several segments in one, without checksums: up to 65535 bytes.
    pub segments: bool,
    /// The back end may keep all pages mapped, if it does that: frames cost less then than their copies by the hypervisor, but what is
    /// received is not read where it is.
    pub keep: bool,
    /// Queues, at least 1 and at most as many as the back end offers; each has the pages that are said.
    pub queues: usize,
}

impl Options {
    /// What a stack that sends and receives much wants: 2 MiB of pages, and everything left out that can be.
    #[must_use]
    pub const fn offloading() -> Self {
        Self {
            receive_pages: 256,
            transmit_pages: 256,
            blank_checksums: true,
            segments: true,
            keep: true,
            queues: 1,
        }
    }
}

impl Default for Options {
    /// 768 KiB in all.
    fn default() -> Self {
        Self {
            receive_pages: 128,
            transmit_pages: 64,
            blank_checksums: false,
            segments: false,
            keep: true,
            queues: 1,
        }
    }
}

impl Options {
    /// Makes the pages of a queue to send from and to receive into, and grants them.
    fn grant(&self, to: DomId) -> Result<QueuePages, GrantError> {
        let pages = |wanted: usize| wanted.clamp(NR_SLOTS_MIN, 256);
        Ok((
            GrantedPages::new(pages(self.transmit_pages), to, Access::Read)?,
            GrantedPages::new(pages(self.receive_pages), to, Access::ReadWrite)?,
        ))
    }
}

/// Pages of a queue: to send from, and to receive into.
type QueuePages = (GrantedPages, GrantedPages);

/// What a card counts, from its opening on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames sent.
    pub sent: u64,
    /// Pages of which the back end said that they could not be sent.
    pub send_errors: u64,
    /// Frames received.
    pub received: u64,
    /// Pages that the back end could not fill.
    pub receive_errors: u64,
    /// What the back end brought, and was no frame.
    pub malformed: u64,
}

impl Counters {
    fn add_sent<M: SharedPage, P: Pages>(&mut self, transmit: &Transmit<M, P>) {
        let (sent, errors) = transmit.counts();
        self.sent += sent;
        self.send_errors += errors;
    }

    fn add_received<M: SharedPage, P: Pages>(&mut self, receive: &Receive<M, P>) {
        let (received, errors, malformed) = receive.counts();
        self.received += received;
        self.receive_errors += errors;
        self.malformed += malformed;
    }
}

/// One direction of a card.
#[derive(Debug)]
enum Link<T> {
    Up(T),
    /// The back end is away, and may come back.
    Down,
    Gone,
}

/// A direction with its notifier, and a place for frames that cannot be used where they are.
#[derive(Debug)]
struct Half<T> {
    link: Link<(T, Notifier)>,
    scratch: Vec<u8>,
}

impl<T> Half<T> {
    fn up(rings: T, notifier: Notifier) -> Mutex<Self> {
        Mutex::new(Self { link: Link::Up((rings, notifier)), scratch: Vec::new() })
    }
}

type Sending = Transmit<GrantedPages, GrantedPages>;
type Receiving = Receive<GrantedPages, GrantedPages>;

/// A queue of a card.
#[derive(Debug)]
struct Queue {
    // A frame may be sent while one is being looked at: the lock to receive is taken first.
    receive: Mutex<Half<Receiving>>,
    transmit: Mutex<Half<Sending>>,
    /// What the back end signals by rings the card's bell; closed while the back end is away.
    channel: Mutex<Option<Channel>>,
}

#[derive(Debug)]
struct Inner {
    /// At least one. After a back end that offers fewer has come, the last ones are down.
    queues: Vec<Queue>,
    /// How many are used.
    used: AtomicUsize,
    /// The queue whose turn it is to be taken from.
    turn: AtomicUsize,
    /// Counted over connections that are gone.
    counters: Mutex<Counters>,
    about: Mutex<About>,
    /// The back end has said something, or the link has changed.
    bell: Arc<Bell>,
    /// The number of the card.
    device: u32,
    /// Held for as long as the back end has it.
    control: Mutex<Option<ControlRing>>,
}

/// What the card is.
#[derive(Clone, Copy, Debug)]
struct About {
    mac: Mac,
    mtu: usize,
    max_frame: usize,
    /// The back end cuts packets into segments.
    takes_segments: bool,
    /// Frames may come without their checksums.
    blank_checksums: bool,
}

/// A network card. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Card {
    inner: Arc<Inner>,
}

impl Card {
    /// Opens a card by its number and waits until it can be used.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn open(store: &SharedStore, device: u32) -> Result<Self, NetError> {
        Self::open_with(store, device, Options::default()).await
    }

    /// As [`open`](Self::open).
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn open_with(store: &SharedStore, device: u32, options: Options) -> Result<Self, NetError> {
        let open = async {
            let mut front = Frontend::open(store, &format!("device/vif/{device}")).await?;
            let queues = options.queues.max(1);
            let mut tries = 1..TRIES;
            let connected = loop {
                let result = connect(&mut front, Vec::new(), options, queues).await;
                let closed = matches!(result, Err(NetError::Backend(XenbusError::Closed)));
                if !closed || tries.next().is_none() || front.is_leaving().await? {
                    break result?;
                }
                // It went away before it was there, and comes back.
                front.set_state(XenbusState::Initialising).await?;
                comes_back(&mut front).await?;
            };
            Ok::<_, NetError>((front, connected))
        };
        let (front, Connected { queues, channels, control, about }) =
            match first(open, time::after(PATIENCE)).await {
                First::One(result) => result?,
                First::Other(()) => return Err(NetError::Timeout),
            };
        log::debug!("card {device}: {about:?}");
        let bell = Arc::new(Bell::new());
        let up = |((transmit, receive), channel): ((Sending, Receiving), Channel)| {
            let notifier = channel.notifier();
            Queue {
                receive: Half::up(receive, notifier),
                transmit: Half::up(transmit, notifier),
                channel: Mutex::new(Some(heard(channel, &bell))),
            }
        };
        let inner = Arc::new(Inner {
            used: AtomicUsize::new(queues.len()),
            queues: queues.into_iter().zip(channels).map(up).collect(),
            turn: AtomicUsize::new(0),
            counters: Mutex::default(),
            about: Mutex::new(about),
            bell,
            device,
            control: Mutex::new(control),
        });
        executor::spawn(follow(Arc::clone(&inner), front, options));
        Ok(Self { inner })
    }

    fn about(&self) -> About {
        *self.inner.about.lock()
    }

    /// Its Ethernet address.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.about().mac
    }

    /// Most bytes behind the head of a frame that its network carries.
    #[must_use]
    pub fn mtu(&self) -> usize {
        self.about().mtu
    }

    /// Most bytes of a frame that the back end takes, head and all; more than its network may carry.
    #[must_use]
    pub fn max_frame(&self) -> usize {
        self.about().max_frame
    }

    /// Whether packets of TCP are sent that the back end is to cut: it does that, and [`Options::segments`] says so.
    #[must_use]
    pub fn takes_segments(&self) -> bool {
        self.about().takes_segments
    }

    /// Whether frames may come without their checksums.
    #[must_use]
    pub fn blank_checksums(&self) -> bool {
        self.about().blank_checksums
    }

    /// What it has counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut counters = *self.inner.counters.lock();
        for queue in &self.inner.queues {
            if let Link::Up((receive, _)) = &queue.receive.lock().link {
                counters.add_received(receive);
            }
            if let Link::Up((transmit, _)) = &queue.transmit.lock().link {
                counters.add_sent(transmit);
            }
        }
        counters
    }

    /// Its queues: as many as were asked for, or as its back end offers.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.inner.used.load(Ordering::Relaxed)
    }

    /// How many frames each queue has sent and received since the back end came last.
    #[must_use]
    pub fn queue_counts(&self) -> Vec<(u64, u64)> {
        let count = |queue: &Queue| {
            let received = match &queue.receive.lock().link {
                Link::Up((receive, _)) => receive.counts().0,
                _ => 0,
            };
            match &queue.transmit.lock().link {
                Link::Up((transmit, _)) => (transmit.counts().0, received),
                _ => (0, received),
            }
        };
        self.inner.used_queues().iter().map(count).collect()
    }

    /// Sends a frame, without its checksum (FCS); waits until there is room for it.
    ///
    /// # Errors
    /// [`NetError::Length`], [`NetError::Gone`].
    pub async fn send(&self, frame: &[u8]) -> Result<(), NetError> {
        while !self.queue(frame)? {
            self.room(frame.len()).await?;
        }
        self.flush()
    }

    /// Puts a frame in the ring, unseen until [`flush`](Self::flush); false when there is no room, or the back end is away.
    ///
    /// # Errors
    /// [`NetError::Length`], [`NetError::Gone`].
    pub fn queue(&self, frame: &[u8]) -> Result<bool, NetError> {
        if frame.is_empty() || frame.len() > self.max_frame() {
            return Err(NetError::Length);
        }
        let queue = self.inner.queue_for(frame);
        self.inner.with_transmit(queue, |transmit, _, _| transmit.push(frame)).map(|sent| sent == Some(true))
    }

    /// As [`queue`](Self::queue), for a frame of `bytes` that `work` writes, where it is sent from if it fits a page. The work is done
    /// in any case; false when the frame is not sent. `work` must not send with this card.
    ///
    /// # Errors
    /// [`NetError::Length`], before the work is done.
    pub fn queue_with<R>(
        &self,
        bytes: usize,
        work: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<(R, bool), NetError> {
        self.queue_offload(bytes, |frame| (work(frame), Some(Offload::NOTHING)))
    }

    /// As [`queue_with`](Self::queue_with), where `work` says what is left to do to the frame that it has written. With `None` it is not
    /// sent, as on a network that has lost it.
    ///
    /// # Errors
    /// [`NetError::Length`], before the work is done.
    pub fn queue_offload<R>(
        &self,
        bytes: usize,
        work: impl FnOnce(&mut [u8]) -> (R, Option<Offload>),
    ) -> Result<(R, bool), NetError> {
        if bytes == 0 || bytes > self.max_frame() {
            return Err(NetError::Length);
        }
        if self.queues() > 1 {
            // Where it goes is known when it is written.
            let mut frame = alloc::vec![0; bytes];
            let (result, offload) = work(&mut frame);
            let Some(offload) = offload else { return Ok((result, true)) };
            let queue = self.inner.queue_for(&frame);
            let sent = self.inner.with_transmit(queue, |transmit, _, _| transmit.push_with(&frame, offload));
            return Ok((result, sent == Ok(Some(true))));
        }
        let mut half = self.inner.first().transmit.lock();
        let Half { link, scratch } = &mut *half;
        let Link::Up((transmit, _)) = link else {
            scratch.clear();
            scratch.resize(bytes, 0);
            return Ok((work(scratch).0, false));
        };
        let (result, sent) = transmit.fill(bytes, scratch, work);
        drop(half);
        if sent.is_err() {
            self.inner.broken();
        }
        Ok((result, sent.unwrap_or(false)))
    }

    /// Shows the back end what was queued.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub fn flush(&self) -> Result<(), NetError> {
        let publish = |transmit: &mut Sending, _: &mut Vec<u8>, notifier: Notifier| {
            if transmit.publish() {
                // If nobody is connected, nobody is to be told: the back end looks when it comes.
                let _ = notifier.notify();
            }
            Ok(())
        };
        let mut used = self.inner.used_queues().iter();
        used.try_for_each(|queue| self.inner.with_transmit(queue, publish).map(drop))
    }

    /// Whether there is room to send a frame of `bytes`, by whichever queue it goes.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub fn has_room(&self, bytes: usize) -> Result<bool, NetError> {
        for queue in self.inner.used_queues() {
            if self.inner.with_transmit(queue, |transmit, _, _| transmit.room(bytes))? != Some(true) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits for room to send a frame of `bytes`. What was queued is flushed.
    ///
    /// # Errors
    /// [`NetError::Length`], [`NetError::Gone`].
    pub async fn room(&self, bytes: usize) -> Result<(), NetError> {
        loop {
            let seen = self.inner.bell.rings();
            if bytes > self.max_frame() {
                return Err(NetError::Length);
            }
            if self.has_room(bytes)? {
                return Ok(());
            }
            self.flush()?;
            // Those that have room are not waited for.
            let prepare = |transmit: &mut Sending, _: &mut Vec<u8>, _| {
                Ok(!transmit.room(bytes)? && transmit.prepare_to_wait(bytes))
            };
            let mut there = false;
            for queue in self.inner.used_queues() {
                there |= self.inner.with_transmit(queue, prepare)? == Some(true);
            }
            if !there {
                self.inner.bell.after(seen).await;
            }
        }
    }

    /// Waits for a frame and copies it; what `into` has no room for is lost.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub async fn receive(&self, into: &mut [u8]) -> Result<Received, NetError> {
        loop {
            if let Some(received) = self.try_receive(into)? {
                return Ok(received);
            }
            self.ready().await?;
        }
    }

    /// Takes a frame if one is there, as [`receive`](Self::receive).
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub fn try_receive(&self, into: &mut [u8]) -> Result<Option<Received>, NetError> {
        for queue in self.inner.in_turn() {
            if let Some(Some(received)) = self.inner.with_receive(queue, |receive, _| receive.copy(into))? {
                return Ok(Some(received));
            }
        }
        Ok(None)
    }

    /// Takes a frame if one is there and shows it to `work`, where it is if it is in one page. `work` may send with this card, but not
    /// receive.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub fn receive_with<R>(&self, work: impl FnOnce(&[u8], Checksum) -> R) -> Result<Option<R>, NetError> {
        let mut work = Some(work);
        for queue in self.inner.in_turn() {
            let shown = self.inner.with_receive(queue, |receive, scratch| match work.take() {
                Some(work) => receive.show(scratch, work),
                None => unreachable!("it is given back until it is done"),
            })?;
            match shown {
                Some(Ok(result)) => return Ok(Some(result)),
                Some(Err(again)) => work = Some(again),
                // It is down.
                None => {}
            }
        }
        Ok(None)
    }

    /// Whether a frame is there.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub fn has_frame(&self) -> Result<bool, NetError> {
        for queue in self.inner.used_queues() {
            if self.inner.with_receive(queue, |receive, _| receive.look())? == Some(true) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for a frame.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub async fn ready(&self) -> Result<(), NetError> {
        self.arrival().await.map(drop)
    }

    /// As [`ready`](Self::ready); whether it had to wait.
    async fn arrival(&self) -> Result<bool, NetError> {
        let mut waited = false;
        loop {
            let seen = self.inner.bell.rings();
            let mut again = false;
            for queue in self.inner.used_queues() {
                let look = |receive: &mut Receiving, _: &mut Vec<u8>| {
                    Ok((receive.look()?, receive.prepare_to_wait()))
                };
                match self.inner.with_receive(queue, look)? {
                    Some((true, _)) => return Ok(waited),
                    Some((false, came)) => again |= came,
                    None => {}
                }
            }
            if !again {
                self.inner.bell.after(seen).await;
                waited = true;
            }
        }
    }
}

impl Inner {
    fn used_queues(&self) -> &[Queue] {
        self.queues.get(..self.used.load(Ordering::Relaxed)).unwrap_or(&self.queues)
    }

    fn first(&self) -> &Queue {
        match self.queues.first() {
            Some(queue) => queue,
            None => unreachable!("a card has a queue"),
        }
    }

    /// The queue by which a frame goes: that of its flow.
    fn queue_for(&self, frame: &[u8]) -> &Queue {
        let used = self.used_queues();
        let number = if used.len() > 1 { flow(frame) as usize % used.len() } else { 0 };
        used.get(number).unwrap_or_else(|| self.first())
    }

    /// All queues, another one first each time.
    fn in_turn(&self) -> impl Iterator<Item = &Queue> {
        let used = self.used_queues();
        let first = if used.len() > 1 { self.turn.fetch_add(1, Ordering::Relaxed) % used.len() } else { 0 };
        let (last, begin) = used.split_at(first);
        begin.iter().chain(last)
    }

    /// Does something with what a queue sends; `None` while the back end is away.
    fn with_transmit<R>(
        &self,
        queue: &Queue,
        work: impl FnOnce(&mut Sending, &mut Vec<u8>, Notifier) -> Result<R, Broken>,
    ) -> Result<Option<R>, NetError> {
        let mut half = queue.transmit.lock();
        let Half { link, scratch } = &mut *half;
        let result = match link {
            Link::Up((transmit, notifier)) => work(transmit, scratch, *notifier),
            Link::Down => return Ok(None),
            Link::Gone => return Err(NetError::Gone),
        };
        drop(half);
        result.map(Some).map_err(|broken| {
            self.broken();
            broken.into()
        })
    }

    /// As [`with_transmit`](Self::with_transmit), with what is received. Pages that were put up again are shown when they are many, and
    /// when there is nothing else to do.
    fn with_receive<R>(
        &self,
        queue: &Queue,
        work: impl FnOnce(&mut Receiving, &mut Vec<u8>) -> Result<R, Broken>,
    ) -> Result<Option<R>, NetError> {
        let mut half = queue.receive.lock();
        let Half { link, scratch } = &mut *half;
        let result = match link {
            Link::Up((receive, notifier)) => {
                let result = work(receive, scratch);
                if receive.publish_if_due() {
                    // As for what is sent.
                    let _ = notifier.notify();
                }
                result
            }
            Link::Down => return Ok(None),
            Link::Gone => return Err(NetError::Gone),
        };
        drop(half);
        result.map(Some).map_err(|broken| {
            self.broken();
            broken.into()
        })
    }

    /// The back end has broken a ring: it would not be different the next time.
    fn broken(&self) {
        log::error!("the back end of card {} has broken its ring", self.device);
        self.give_up();
    }

    fn give_up(&self) {
        self.disconnect(true);
        self.bell.ring();
    }

    /// Takes the rings away from whoever uses the card.
    fn disconnect(&self, for_ever: bool) -> Vec<(Sending, Receiving)> {
        let mut all = Vec::new();
        let mut counters = self.counters.lock();
        for queue in &self.queues {
            drop(queue.channel.lock().take());
            // The lock to receive is taken first, as everywhere.
            let mut receive = queue.receive.lock();
            let mut transmit = queue.transmit.lock();
            let receive = receive.link.take(for_ever);
            let transmit = transmit.link.take(for_ever);
            receive.iter().for_each(|receive| counters.add_received(receive));
            transmit.iter().for_each(|transmit| counters.add_sent(transmit));
            all.extend(transmit.zip(receive));
        }
        all
    }
}

impl<T> Link<(T, Notifier)> {
    /// Takes it down.
    fn take(&mut self, for_ever: bool) -> Option<T> {
        let new = if for_ever { Self::Gone } else { Self::Down };
        match core::mem::replace(self, new) {
            Self::Up((rings, _)) => Some(rings),
            Self::Down | Self::Gone => None,
        }
    }
}

/// A number for the flow that a frame belongs to: the same for all its frames in one direction.
fn flow(frame: &[u8]) -> u32 {
    let byte = |at: usize| frame.get(at).copied().map_or(0, u32::from);
    let word = |at: usize| byte(at) << 24 | byte(at + 1) << 16 | byte(at + 2) << 8 | byte(at + 3);
    // IPv4; of anything else, the stations.
    if (byte(12), byte(13)) != (8, 0) {
        return (word(2) ^ word(8)).wrapping_mul(0x9e37_79b1) >> 24;
    }
    // More fragments, or not the first one.
    let fragment = word(HEADER + 6) >> 16 & 0x3fff != 0;
    let ports = matches!(byte(23), 6 | 17) && !fragment;
    let ports = if ports { word(HEADER + (byte(14) & 15) as usize * 4) } else { 0 };
    (word(26) ^ word(30).rotate_left(16) ^ ports).wrapping_mul(0x9e37_79b1) >> 24
}

/// What connecting gives.
struct Connected {
    queues: Vec<(Sending, Receiving)>,
    channels: Vec<Channel>,
    control: Option<ControlRing>,
    about: About,
}

/// Meets the back end, which waits for it, with at most so many queues; pages that are missing are made.
async fn connect(
    front: &mut Frontend,
    mut pages: Vec<QueuePages>,
    options: Options,
    most: usize,
) -> Result<Connected, NetError> {
    front.wait_for(|state| state == XenbusState::InitWait).await?;
    let backend_id = front.backend_id();
    let ring = || GrantedPages::new(1, backend_id, Access::ReadWrite);
    let offered = if most > 1 { front.read(keys::MAX_QUEUES).await?.unwrap_or(1) } else { 1 };
    let count = most.min(offered).max(1);
    pages.truncate(count);
    while pages.len() < count {
        pages.push(options.grant(backend_id)?);
    }
    let (mut queues, mut channels) = (Vec::new(), Vec::new());
    for (transmit, receive) in pages {
        let transmit = Transmit::new(ring()?, transmit);
        queues.push((transmit, Receive::new(ring()?, receive, options.segments)?));
        channels.push(Events::new().alloc_unbound(backend_id)?);
    }
    let scatter_gather = front.offers(keys::SG).await?;
    let longest = queues.iter().map(|(transmit, _)| transmit.longest()).min().unwrap_or(PAGE_SIZE);
    let max_frame = if scatter_gather { longest } else { PAGE_SIZE };
    let mtu = match front.read_own("mtu").await? {
        Some(mtu) => mtu,
        None => front.read("mtu").await?.unwrap_or(MTU),
    };
    let text = match front.read_own::<String>("mac").await? {
        Some(mac) => mac,
        None => front.need("mac").await?,
    };
    let mac = text.trim().parse()?;
    let about = About {
        mac,
        mtu: mtu.clamp(LEAST_MTU, max_frame - HEADER),
        max_frame,
        takes_segments: options.segments && scatter_gather && front.offers(keys::GSO_TCPV4).await?,
        blank_checksums: options.blank_checksums || options.segments,
    };
    let yes = || "1".to_string();
    let mut nodes = alloc::vec![
        (keys::RX_COPY.to_string(), yes()),
        (keys::RX_NOTIFY.to_string(), yes()),
        (keys::SG.to_string(), yes()),
        (keys::NO_CSUM_OFFLOAD.to_string(), u32::from(!about.blank_checksums).to_string()),
        (keys::GSO_TCPV4.to_string(), u32::from(options.segments).to_string()),
        (keys::IPV6_CSUM_OFFLOAD.to_string(), u32::from(about.blank_checksums).to_string()),
    ];
    if count > 1 {
        nodes.push((keys::NUM_QUEUES.to_string(), count.to_string()));
    }
    let reference =
        |pages: &GrantedPages| pages.references().first().map_or(0, |gref| gref.get()).to_string();
    for (number, ((transmit, receive), channel)) in queues.iter().zip(&channels).enumerate() {
        // A single queue has its nodes where cards without queues have them.
        let prefix = if count > 1 { format!("queue-{number}/") } else { String::new() };
        nodes.push((format!("{prefix}tx-ring-ref"), reference(transmit.ring())));
        nodes.push((format!("{prefix}rx-ring-ref"), reference(receive.ring())));
        nodes.push((format!("{prefix}event-channel"), channel.port().to_string()));
    }
    let mut control = match front.offers(keys::CTRL_RING).await? {
        true if options.keep => Some(ControlRing::new(backend_id)?),
        _ => None,
    };
    if let Some((gref, port)) = control.as_ref().map(ControlRing::nodes) {
        nodes.push((keys::CTRL_RING_REF.to_string(), gref.get().to_string()));
        nodes.push((keys::CTRL_CHANNEL.to_string(), port.to_string()));
    }
    let nodes: Vec<(&str, String)> =
        nodes.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    // Unlike those of disks, back ends of cards wait for this, not for `Initialised`.
    front.publish(&nodes, XenbusState::Connected).await?;
    front.wait_for(|state| state == XenbusState::Connected).await?;
    for (number, (transmit, receive)) in queues.iter_mut().enumerate() {
        let Some(control) = &mut control else { break };
        let number = number as u32;
        let sends = control.keep(number, transmit.pages(), true).await;
        let receives = control.keep(number, receive.pages(), false).await;
        if receives {
            receive.set_kept();
        }
        log::debug!("pages of queue {number} kept by the back end: to send {sends}, to receive {receives}");
    }
    // What was put up has been seen by nobody.
    for channel in &channels {
        let _ = channel.notify();
    }
    Ok(Connected { queues, channels, control, about })
}

/// A channel whose events ring a bell.
fn heard(mut channel: Channel, bell: &Arc<Bell>) -> Channel {
    channel.wake_always(Waker::from(Arc::clone(bell)));
    channel
}

/// Follows the back end's state: it may go, and come back.
async fn follow(inner: Arc<Inner>, mut front: Frontend, options: Options) {
    loop {
        let result = match front.changed().await {
            Ok(XenbusState::Closing | XenbusState::Closed | XenbusState::Unknown) => {
                reconnect(&inner, &mut front, options).await
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if result.is_err() {
            inner.give_up();
            return;
        }
    }
}

/// Lets go of the back end, and waits for it to come back.
async fn reconnect(inner: &Arc<Inner>, front: &mut Frontend, options: Options) -> Result<(), NetError> {
    let leaving = front.is_leaving().await?;
    let old = inner.disconnect(false);
    front.close().await?;
    // The back end has unmapped the rings by now, and what they are in can be freed.
    drop(inner.control.lock().take());
    if old.is_empty() {
        return Err(NetError::Gone);
    }
    let pages = |(transmit, receive): (Sending, Receiving)| (transmit.into_pages(), receive.into_pages());
    let mut pages: Vec<QueuePages> = old.into_iter().map(pages).collect();
    if leaving {
        return Err(NetError::Gone);
    }
    let Connected { queues, channels, control, about } = loop {
        front.set_state(XenbusState::Initialising).await?;
        comes_back(front).await?;
        match connect(front, core::mem::take(&mut pages), options, inner.queues.len()).await {
            // It went away again before it was there.
            Err(NetError::Backend(XenbusError::Closed)) => {}
            result => break result?,
        }
    };
    *inner.about.lock() = about;
    *inner.control.lock() = control;
    inner.used.store(queues.len(), Ordering::Relaxed);
    for ((place, (transmit, receive)), channel) in inner.queues.iter().zip(queues).zip(channels) {
        let notifier = channel.notifier();
        place.receive.lock().link = Link::Up((receive, notifier));
        place.transmit.lock().link = Link::Up((transmit, notifier));
        *place.channel.lock() = Some(heard(channel, &inner.bell));
    }
    // What came before is heard, too.
    inner.bell.ring();
    Ok(())
}

/// Waits for a back end that has closed to begin anew.
async fn comes_back(front: &mut Frontend) -> Result<(), NetError> {
    // It may not have got round to saying that it is back.
    while let Err(error) = front.wait_for(|state| state == XenbusState::InitWait).await {
        if error != XenbusError::Closed || front.is_leaving().await? {
            return Err(error.into());
        }
        front.changed().await?;
    }
    Ok(())
}

/// The numbers of the cards that this domain has.
///
/// # Errors
/// [`StoreError`].
pub async fn cards(store: &SharedStore) -> Result<Vec<u32>, StoreError> {
    let names = crate::xenbus::devices(store, "vif").await?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::{Mac, flow};
    use alloc::string::ToString;

    #[test]
    fn flows_are_told_apart_and_keep_together() {
        // A packet of TCP from this port.
        let frame = |port: u16, payload: u8| {
            let mut frame = [payload; 60];
            let head = [0x45, 0, 0, 46, 1, payload, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            frame.iter_mut().skip(12).zip([8, 0].into_iter().chain(head)).for_each(|(to, byte)| *to = byte);
            frame.iter_mut().skip(34).zip(port.to_be_bytes()).for_each(|(to, byte)| *to = byte);
            frame.iter_mut().skip(36).zip([0, 80]).for_each(|(to, byte)| *to = byte);
            frame
        };
        for queues in [2, 3, 4] {
            let mut flows = alloc::vec![0; queues];
            for port in 49152..49152 + 400 {
                let queue = flow(&frame(port, 0)) as usize % queues;
                assert_eq!(queue, flow(&frame(port, 7)) as usize % queues, "a flow has one queue");
                if let Some(count) = flows.get_mut(queue) {
                    *count += 1;
                }
            }
            assert!(flows.iter().all(|count| *count > 200 / queues), "{flows:?}");
        }
        // Fragments have no ports, and one number.
        let fragment = |port, place: u8| {
            let mut frame = frame(port, 0);
            frame.iter_mut().skip(20).zip([0x20, place]).for_each(|(to, byte)| *to = byte);
            flow(&frame)
        };
        assert_eq!(fragment(1, 0), fragment(2, 9));
        // Frames that end early have a flow, too.
        assert_eq!(flow(&[]), flow(&[0; 12]));
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let mac: Mac = "00:16:3E:0a:ff:01".parse().expect("an address");
        assert_eq!(mac, Mac([0, 0x16, 0x3e, 10, 255, 1]));
        assert_eq!(mac.to_string(), "00:16:3e:0a:ff:01");
        for text in [
            "",
            "00:16:3e:0a:ff",
            "00:16:3e:0a:ff:01:02",
            "0:16:3e:0a:ff:01",
            "00:16:3e:0a:ff:+1",
            "00-16-3e-0a-ff-01",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}

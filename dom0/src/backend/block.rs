//! One virtual block device: its nodes in xenstore, its handshake, and the task that serves its rings.
//!
//! Two tasks. One follows the front end's state and lives as long as the device. The other lives as long as a connection: it waits for
//! the rings' event channels and for the disk, and has nothing to do with xenstore.

use super::disk::Handle;
use super::pages::Pages;
use crate::disks::DiskSpec;
use crate::say;
use crate::store;
use crate::waiting::{Bell, First, first};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::backend::{Backend, MOST_QUEUES, MOST_RING_PAGE_ORDER};
use blkback::grants::MOST as MOST_KEPT;
use blkback::queue::{Counters, REQUESTS_PER_TURN};
use blkback::request::{Fault, Identity, MAX_INDIRECT_SEGMENTS};
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::str::FromStr;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Poll;
use guest_sdk::events::Channel;
use guest_sdk::grants::Mapping;
use guest_sdk::{control, executor, time};
use hypercall_abi::io::blkif::{ABI, SECTOR_SIZE, VDISK_READONLY, keys};
use hypercall_abi::io::xenbus::XenbusState;
use hypercall_abi::{DomId, GrantRef, Port};
use spin::Mutex;
use xenstore::Error;

/// A virtual block device.
pub struct Vbd {
    domain: DomId,
    guest: String,
    spec: DiskSpec,
    disk: Handle,
    /// Directories of both ends.
    front: String,
    back: String,
    /// It is to end.
    stop: AtomicBool,
    /// It has ended.
    stopped: AtomicBool,
    /// Connections are to be given up as if the back end had died, and it is to come back.
    restart: AtomicBool,
    /// Changes of the above and of `status`.
    bell: Bell,
    status: Mutex<Status>,
}

/// How a device is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status {
    /// The back end's state.
    pub state: Option<XenbusState>,
    /// What was done, in all its connections.
    pub counters: Counters,
    /// Pages of the guest that are kept mapped.
    pub kept_pages: usize,
    /// Something that the front end did was reported: the rest of it is not.
    reported: bool,
}

/// What the two tasks tell each other.
struct Link {
    stop: AtomicBool,
    stopped: AtomicBool,
    /// The front end broke a ring.
    broken: AtomicBool,
    bell: Bell,
}

/// What a front end says of its rings.
struct Rings {
    /// References of each ring's pages, and its event channel.
    rings: Vec<(Vec<GrantRef>, Port)>,
    persistent: bool,
}

fn number<T: FromStr>(path: &str) -> Result<Option<T>, String> {
    match store::read(path) {
        Ok(value) => {
            let text = core::str::from_utf8(&value).unwrap_or("").trim();
            let node = path.rsplit('/').next().unwrap_or("");
            text.parse().map(Some).map_err(|_| format!("its {node:?} is {text:?}"))
        }
        Err(Error::NotFound) => Ok(None),
        Err(error) => Err(format!("xenstore answers {error}")),
    }
}

fn needed<T: FromStr>(path: &str) -> Result<T, String> {
    let node = path.rsplit('/').next().unwrap_or("");
    number(path)?.ok_or_else(|| format!("it says nothing of its {node:?}"))
}

impl Vbd {
    /// Makes a device of a guest: its nodes, and the task that waits for its front end.
    ///
    /// # Errors
    /// The store's; nothing is left then.
    pub fn start(domain: DomId, guest: &str, spec: DiskSpec, disk: Handle) -> Result<Arc<Self>, Error> {
        let device = spec.device;
        let vbd = Arc::new(Self {
            domain,
            guest: guest.to_string(),
            spec,
            disk,
            front: format!("{}/device/vbd/{device}", store::home(domain)),
            back: format!("{}/backend/vbd/{domain}/{device}", store::home(guest_sdk::id())),
            stop: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            restart: AtomicBool::new(false),
            bell: Bell::new(),
            status: Mutex::new(Status::default()),
        });
        let watcher = store::Own::new();
        let made = vbd.publish().and_then(|()| watcher.watch(&format!("{}/state", vbd.front)));
        if let Err(error) = made {
            vbd.forget();
            return Err(error);
        }
        executor::spawn(follow(Arc::clone(&vbd), watcher));
        Ok(vbd)
    }

    /// What it was made from.
    pub fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// How it is.
    pub fn status(&self) -> Status {
        *self.status.lock()
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.disk.properties().sectors * SECTOR_SIZE as u64
    }

    /// Writes the nodes of both ends, as Xen's toolstack does.
    fn publish(&self) -> Result<(), Error> {
        let domain = self.domain;
        let own = guest_sdk::id();
        let device = self.spec.device.to_string();
        let properties = self.disk.properties();
        let mode = if properties.readonly { "r" } else { "w" };
        store::make(&self.back, &format!("n{own}\0r{domain}\0"))?;
        for (name, value) in [
            ("frontend", self.front.as_str()),
            ("frontend-id", &domain.to_string()),
            ("online", "1"),
            ("removable", "0"),
            ("bootable", "1"),
            ("dev", &self.spec.name),
            ("type", "phy"),
            ("mode", mode),
            ("device-type", "disk"),
            ("state", XenbusState::Initialising.text()),
        ] {
            store::write(&format!("{}/{name}", self.back), value)?;
        }
        store::make(&self.front, &format!("n{domain}\0r{own}\0"))?;
        for (name, value) in [
            ("backend", self.back.as_str()),
            ("backend-id", &own.to_string()),
            ("virtual-device", &device),
            ("device-type", "disk"),
            ("state", XenbusState::Initialising.text()),
        ] {
            store::write(&format!("{}/{name}", self.front), value)?;
        }
        Ok(())
    }

    /// Offers what there is, and waits for the front end.
    fn offer(&self) -> Result<(), Error> {
        let properties = self.disk.properties();
        let write = |name: &str, value: &str| store::write(&format!("{}/{name}", self.back), value);
        for (name, value) in [
            (keys::FLUSH_CACHE, "1"),
            (keys::BARRIER, "1"),
            (keys::PERSISTENT, "1"),
            (keys::MAX_INDIRECT_SEGMENTS, &MAX_INDIRECT_SEGMENTS.to_string()),
            (keys::MAX_RING_PAGE_ORDER, &MOST_RING_PAGE_ORDER.to_string()),
            (keys::MAX_QUEUES, &MOST_QUEUES.to_string()),
        ] {
            write(name, value)?;
        }
        if let Some(granularity) = properties.discard_granularity {
            write(keys::DISCARD, "1")?;
            write(keys::DISCARD_GRANULARITY, &granularity.to_string())?;
            write(keys::DISCARD_ALIGNMENT, "0")?;
            write(keys::DISCARD_SECURE, "0")?;
        }
        self.set_state(XenbusState::InitWait)
    }

    /// Says what the disk is, and that it is at work.
    fn connected(&self) -> Result<(), Error> {
        let properties = self.disk.properties();
        let write = |name: &str, value: &str| store::write(&format!("{}/{name}", self.back), value);
        write(keys::SECTORS, &properties.sectors.to_string())?;
        write(keys::SECTOR_SIZE, &SECTOR_SIZE.to_string())?;
        write(keys::PHYSICAL_SECTOR_SIZE, &properties.physical_sector.to_string())?;
        write(keys::INFO, &(if properties.readonly { VDISK_READONLY } else { 0 }).to_string())?;
        self.set_state(XenbusState::Connected)
    }

    fn set_state(&self, state: XenbusState) -> Result<(), Error> {
        self.status.lock().state = Some(state);
        let result = store::write(&format!("{}/state", self.back), state.text());
        self.bell.ring();
        result
    }

    fn front_state(&self) -> XenbusState {
        store::read(&format!("{}/state", self.front))
            .map_or(XenbusState::Unknown, |text| XenbusState::from_text(&text))
    }

    /// Says what a front end did wrong, once in the life of the device.
    fn report(&self, what: &str) {
        if !core::mem::replace(&mut self.status.lock().reported, true) {
            say!("{} (domain {}) disk {}: {what}", self.guest, self.domain, self.spec.name);
        }
    }

    fn forget(&self) {
        // Either may be gone by now.
        let _ = store::remove(&self.back);
        let _ = store::remove(&self.front);
    }

    /// Makes the disk larger, and says so to the guest.
    ///
    /// # Errors
    /// What to say.
    pub fn resize(&self, bytes: u64) -> Result<(), String> {
        self.disk.resize(bytes)?;
        if self.status().state == Some(XenbusState::Connected) {
            // Writing the state again, unchanged, makes the front end look.
            self.connected().map_err(|error| format!("xenstore answers {error}"))?;
        }
        Ok(())
    }

    /// Asks the front end to let go; false when it has not before `until_ns`.
    pub async fn leave(&self, until_ns: u64) -> bool {
        let asked = store::write(&format!("{}/online", self.back), "0")
            .and_then(|()| if self.closed() { Ok(()) } else { self.set_state(XenbusState::Closing) });
        if asked.is_err() {
            return false;
        }
        loop {
            let seen = self.bell.rings();
            if self.closed() {
                return true;
            }
            if let First::Other(()) = first(self.bell.after(seen), time::until_ns(until_ns)).await {
                // It stays, and may be used on.
                let _ = store::write(&format!("{}/online", self.back), "1");
                if self.status().state == Some(XenbusState::Closing) {
                    let _ = self.set_state(XenbusState::Connected);
                }
                return false;
            }
        }
    }

    /// Nobody uses it: it was closed, or never connected.
    fn closed(&self) -> bool {
        matches!(
            self.status().state,
            None | Some(XenbusState::Closed | XenbusState::InitWait | XenbusState::Initialising)
        )
    }

    /// Gives up its connection as if the back end had died, and comes back.
    pub fn restart(&self) {
        self.restart.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Ends it: nothing of the guest is mapped for it afterwards, and its nodes are gone.
    pub async fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.bell.ring();
        loop {
            let seen = self.bell.rings();
            if self.stopped.load(Ordering::Acquire) {
                break;
            }
            self.bell.after(seen).await;
        }
        self.forget();
    }

    /// Reads what the front end says of its rings.
    fn rings(&self) -> Result<Rings, String> {
        let node = |name: &str| format!("{}/{name}", self.front);
        match store::read(&node(keys::PROTOCOL)) {
            Ok(protocol) if protocol != ABI.as_bytes() => {
                return Err(format!("it speaks {:?}, not {ABI}", String::from_utf8_lossy(&protocol)));
            }
            // A front end that says nothing has the layout of its own kind, which is ours.
            _ => {}
        }
        let order: u32 = number(&node(keys::RING_PAGE_ORDER))?.unwrap_or(0);
        if order > MOST_RING_PAGE_ORDER {
            return Err(format!("its ring has 2^{order} pages: 2^{MOST_RING_PAGE_ORDER} were offered"));
        }
        let queues: Option<u32> = number(&node(keys::NUM_QUEUES))?;
        if queues.is_some_and(|queues| queues == 0 || queues > MOST_QUEUES) {
            return Err(format!("it wants {} rings: 1 to {MOST_QUEUES} were offered", queues.unwrap_or(0)));
        }
        let ring = |prefix: &str| -> Result<(Vec<GrantRef>, Port), String> {
            let reference = |name: &str| needed::<u32>(&node(&format!("{prefix}{name}"))).map(GrantRef::new);
            let pages = if order == 0 && number::<u32>(&node(&format!("{prefix}ring-ref0")))?.is_none() {
                Vec::from([reference("ring-ref")?])
            } else {
                (0..1 << order).map(|page| reference(&format!("ring-ref{page}"))).collect::<Result<_, _>>()?
            };
            Ok((pages, Port::new(needed(&node(&format!("{prefix}event-channel")))?)))
        };
        let rings = match queues {
            None | Some(1) if number::<u32>(&node("queue-0/event-channel"))?.is_none() => {
                Vec::from([ring("")?])
            }
            queues => (0..queues.unwrap_or(1))
                .map(|queue| ring(&format!("queue-{queue}/")))
                .collect::<Result<_, _>>()?,
        };
        let persistent = number::<u32>(&node(keys::PERSISTENT))?.is_some_and(|wanted| wanted != 0);
        Ok(Rings { rings, persistent })
    }

    /// Maps the rings and starts to serve them.
    fn connect(self: &Arc<Self>) -> Result<Arc<Link>, String> {
        let Rings { rings, persistent } = self.rings()?;
        let (mut pages, mut channels) = (Vec::new(), Vec::new());
        for (references, port) in &rings {
            let mapped = control::map_granted_pages(self.domain, references)
                .map_err(|error| format!("its ring cannot be mapped: {error}"))?;
            let channel = control::connect(self.domain, *port)
                .map_err(|errno| format!("its event channel {port} cannot be bound: {errno}"))?;
            pages.push(mapped);
            channels.push(channel);
        }
        let most = pages.len() * (MOST_KEPT + REQUESTS_PER_TURN as usize * MAX_INDIRECT_SEGMENTS);
        let mapper = Pages::new(self.domain, most);
        let identity = Identity { device: self.spec.device };
        let backend = Backend::new(pages, identity, persistent, mapper, self.disk.clone());
        let link = Arc::new(Link {
            stop: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            bell: Bell::new(),
        });
        executor::spawn(serve(Arc::clone(self), backend, channels, Arc::clone(&link)));
        Ok(link)
    }
}

/// Ends a connection; nothing of the guest is mapped afterwards.
async fn disconnect(link: &mut Option<Arc<Link>>) {
    let Some(link) = link.take() else { return };
    link.stop.store(true, Ordering::Release);
    loop {
        let seen = link.bell.rings();
        link.bell.ring();
        if link.stopped.load(Ordering::Acquire) {
            return;
        }
        link.bell.after(seen + 1).await;
    }
}

/// Follows the front end, as long as the device is there.
async fn follow(vbd: Arc<Vbd>, watcher: store::Own) {
    let mut link = None;
    let mut result = vbd.offer();
    loop {
        let seen = vbd.bell.rings();
        if let Err(error) = result {
            // dom0's own nodes: only the removal of its directories by hand leads here.
            vbd.report(&format!("xenstore answers {error}"));
        }
        if vbd.stop.load(Ordering::Acquire) {
            break;
        }
        result = step(&vbd, &mut link).await;
        // What was done above rings, too.
        if vbd.bell.rings() == seen {
            first(watcher.event(), vbd.bell.after(seen)).await;
        }
    }
    disconnect(&mut link).await;
    vbd.stopped.store(true, Ordering::Release);
    vbd.bell.ring();
}

/// What the states of both ends lead to.
async fn step(vbd: &Arc<Vbd>, link: &mut Option<Arc<Link>>) -> Result<(), Error> {
    use XenbusState as S;
    if vbd.restart.swap(false, Ordering::AcqRel) && link.is_some() {
        disconnect(link).await;
        return vbd.set_state(S::Closing);
    }
    if link.as_ref().is_some_and(|link| link.broken.load(Ordering::Acquire)) {
        disconnect(link).await;
        vbd.report("an index of its ring is out of range: it is disconnected");
        return vbd.set_state(S::Closing);
    }
    let own = vbd.status().state.unwrap_or(S::Unknown);
    match (vbd.front_state(), own) {
        (S::Initialised | S::Connected, S::InitWait) => match vbd.connect() {
            Ok(connected) => {
                *link = Some(connected);
                vbd.connected()
            }
            Err(error) => {
                vbd.report(&format!("it cannot be connected: {error}"));
                vbd.set_state(S::Closing)
            }
        },
        (S::Closing, S::InitWait | S::Initialised | S::Connected | S::Closing) => {
            disconnect(link).await;
            vbd.set_state(S::Closed)
        }
        (S::Closed | S::Unknown, S::Initialised | S::Connected | S::Closing) => {
            disconnect(link).await;
            vbd.set_state(S::Closed)
        }
        // It begins anew.
        (S::Initialising, S::Closed) => vbd.offer(),
        (S::Initialising, S::Connected) => {
            disconnect(link).await;
            vbd.offer()
        }
        _ => Ok(()),
    }
}

type Served = Backend<Mapping, Pages, Handle>;

/// A connection, from start to end.
async fn serve(vbd: Arc<Vbd>, mut backend: Served, mut channels: Vec<Channel>, link: Arc<Link>) {
    let before = vbd.status().counters;
    loop {
        let seen = link.bell.rings();
        if link.stop.load(Ordering::Acquire) {
            break;
        }
        let turn = poll_fn(|context| Poll::Ready(backend.turn(context))).await;
        let Ok(turn) = turn else {
            link.broken.store(true, Ordering::Release);
            vbd.bell.ring();
            // The other task has to hear of it first; it stops this one.
            link.bell.after(seen).await;
            continue;
        };
        for (number, channel) in channels.iter().enumerate() {
            if turn.notify & 1 << number != 0 {
                // It may be gone: then there is nobody to tell.
                let _ = channel.notify();
            }
        }
        if let Some(fault) = turn.fault {
            report(&vbd, fault);
        }
        if turn.more {
            note(&vbd, &backend, before);
            executor::yield_now().await;
        } else if !backend.prepare_to_wait() {
            note(&vbd, &backend, before);
            anything(&mut channels, &link.bell, seen).await;
        }
    }
    note(&vbd, &backend, before);
    vbd.status.lock().kept_pages = 0;
    drop(backend.close());
    drop(channels);
    link.stopped.store(true, Ordering::Release);
    link.bell.ring();
}

fn report(vbd: &Vbd, fault: Fault) {
    vbd.report(&format!("refused {fault}; it is not told again when that happens"));
}

/// Keeps what was done where others see it.
fn note(vbd: &Vbd, backend: &Served, before: Counters) {
    let (now, kept) = (backend.counters(), backend.kept_pages());
    let mut status = vbd.status.lock();
    status.kept_pages = kept;
    status.counters = Counters {
        requests: before.requests + now.requests,
        sectors_read: before.sectors_read + now.sectors_read,
        sectors_written: before.sectors_written + now.sectors_written,
        errors: before.errors + now.errors,
    };
}

/// Waits until a channel fires, the bell rings, or whatever else this task is woken by: the disk.
async fn anything(channels: &mut [Channel], bell: &Bell, seen: u64) {
    let mut woken = false;
    poll_fn(|context| {
        let mut ready = core::mem::replace(&mut woken, true);
        for channel in channels.iter_mut() {
            ready |= pin!(channel.fired()).poll(context).is_ready();
        }
        ready |= pin!(bell.after(seen)).poll(context).is_ready();
        if ready { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

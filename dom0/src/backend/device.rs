//! One virtual device, whatever its kind: its nodes in xenstore and its handshake (public/io/xenbus.h).
//!
//! A task follows the front end's state and lives as long as the device. What serves a connection is the kind's; the two tell
//! each other by a [`Link`].

use crate::channel::Event;
use crate::listeners::publish;
use crate::panics::MOST_FUTILE;
use crate::room::{self, New};
use crate::say;
use crate::store;
use crate::waiting::{Bell, First, first};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::str::FromStr;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_sdk::compartment::Panicked;
use guest_sdk::{executor, time};
use hypercall_abi::DomId;
use hypercall_abi::io::xenbus::XenbusState;
use spin::Mutex;
use xenstore::Error;

/// Nodes and their values.
pub type Nodes = Vec<(&'static str, String)>;

/// A kind of device.
pub trait Kind: Send + Sync + Sized + 'static {
    /// Its directories are called so.
    const CLASS: &'static str;

    /// Its number among the guest's devices of this kind.
    fn number(&self) -> u32;

    /// As people call it.
    fn name(&self) -> String;

    /// Nodes that the front end finds in its directory from the beginning.
    fn front_nodes(&self) -> Nodes;

    /// Nodes of the back end from the beginning, beside those of every kind.
    fn back_nodes(&self) -> Nodes;

    /// What is offered to a front end that comes.
    fn offers(&self) -> Nodes;

    /// Joins the rings of a front end that has named them, and starts to serve them.
    ///
    /// # Errors
    /// What to say.
    fn connect(device: &Arc<Device<Self>>) -> Result<Arc<Link>, String>;

    /// What a front end is told that is connected.
    fn connected(&self) -> Nodes;
}

/// What the two tasks of a device tell each other.
pub struct Link {
    stop: AtomicBool,
    stopped: AtomicBool,
    broken: AtomicBool,
    /// Rings when any of it changes.
    pub bell: Bell,
}

impl Link {
    /// A connection that is about to be served.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            bell: Bell::new(),
        })
    }

    /// Whether serving is to end.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Says that serving has ended: nothing of the guest is mapped or used for it.
    pub fn end(&self) {
        self.stopped.store(true, Ordering::Release);
        self.bell.ring();
    }

    async fn disconnect(&self) {
        self.stop.store(true, Ordering::Release);
        loop {
            let seen = self.bell.rings();
            self.bell.ring();
            if self.stopped.load(Ordering::Acquire) {
                return;
            }
            self.bell.after(seen + 1).await;
        }
    }
}

/// A virtual device of a guest.
pub struct Device<K> {
    /// The guest.
    pub domain: DomId,
    guest: String,
    /// What it is.
    pub kind: K,
    /// Directories of both ends.
    front: String,
    back: String,
    /// It is to end.
    stop: AtomicBool,
    /// It has ended.
    stopped: AtomicBool,
    /// Connections are to be given up as if the back end had died, and it is to come back.
    restart: AtomicBool,
    /// Its back end panicked.
    panicked: AtomicBool,
    /// What was done when it panicked the last time, and how often it panicked without getting further.
    futile: Mutex<(u64, u32)>,
    /// Changes of the above and of the state.
    bell: Bell,
    state: Mutex<Option<XenbusState>>,
    /// Something that the front end did was reported: the rest of it is not.
    reported: AtomicBool,
}

impl<K: Kind> Device<K> {
    /// Makes a device of a guest: its nodes, and the task that waits for its front end.
    ///
    /// # Errors
    /// The store's; nothing is left then.
    pub fn start(domain: DomId, guest: &str, kind: K) -> Result<Arc<Self>, Error> {
        let (class, number) = (K::CLASS, kind.number());
        let device = Arc::new(Self {
            domain,
            guest: guest.to_string(),
            kind,
            front: format!("{}/device/{class}/{number}", store::home(domain)),
            back: format!("{}/backend/{class}/{domain}/{number}", store::home(guest_sdk::id())),
            stop: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            restart: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            futile: Mutex::new((u64::MAX, 0)),
            bell: Bell::new(),
            state: Mutex::new(None),
            reported: AtomicBool::new(false),
        });
        let watcher = store::Own::new();
        let made = device.publish().and_then(|()| watcher.watch(&format!("{}/state", device.front)));
        if let Err(error) = made {
            device.forget();
            return Err(error);
        }
        executor::spawn(follow(Arc::clone(&device), watcher));
        Ok(device)
    }

    /// Its number among the guest's devices of this kind.
    pub fn number(&self) -> u32 {
        self.kind.number()
    }

    /// The back end's state.
    pub fn state(&self) -> Option<XenbusState> {
        *self.state.lock()
    }

    /// Writes the nodes of both ends, as Xen's toolstack does.
    fn publish(&self) -> Result<(), Error> {
        let (domain, own) = (self.domain, guest_sdk::id());
        store::make(&self.back, &format!("n{own}\0r{domain}\0"))?;
        self.write(&self.back, [("frontend", self.front.clone()), ("frontend-id", domain.to_string())])?;
        self.write(&self.back, [("online", "1".into())])?;
        self.write(&self.back, self.kind.back_nodes())?;
        self.write(&self.back, [("state", XenbusState::Initialising.text().into())])?;
        store::make(&self.front, &format!("n{domain}\0r{own}\0"))?;
        self.write(&self.front, [("backend", self.back.clone()), ("backend-id", own.to_string())])?;
        self.write(&self.front, self.kind.front_nodes())?;
        self.write(&self.front, [("state", XenbusState::Initialising.text().into())])
    }

    fn write(
        &self,
        directory: &str,
        nodes: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<(), Error> {
        nodes.into_iter().try_for_each(|(name, value)| store::write(&format!("{directory}/{name}"), &value))
    }

    /// Offers what there is, and waits for the front end.
    fn offer(&self) -> Result<(), Error> {
        self.write(&self.back, self.kind.offers())?;
        self.set_state(XenbusState::InitWait)
    }

    /// Says what the device is, and that it is at work; again, when what it is has changed: a state that is written again,
    /// unchanged, makes the front end look.
    fn connected(&self) -> Result<(), Error> {
        self.write(&self.back, self.kind.connected())?;
        self.set_state(XenbusState::Connected)
    }

    /// Tells the front end what has changed, if there is one.
    ///
    /// # Errors
    /// What to say.
    pub fn changed(&self) -> Result<(), String> {
        if self.state() != Some(XenbusState::Connected) {
            return Ok(());
        }
        self.connected().map_err(|error| format!("xenstore answers {error}"))
    }

    fn set_state(&self, state: XenbusState) -> Result<(), Error> {
        *self.state.lock() = Some(state);
        let result = store::write(&format!("{}/state", self.back), state.text());
        self.bell.ring();
        result
    }

    fn front_state(&self) -> XenbusState {
        store::read(&format!("{}/state", self.front))
            .map_or(XenbusState::Unknown, |text| XenbusState::from_text(&text))
    }

    /// Says what a front end did wrong, once in the life of the device.
    pub fn report(&self, what: &str) {
        if !self.reported.swap(true, Ordering::AcqRel) {
            say!("{} (domain {}) {}: {what}", self.guest, self.domain, self.kind.name());
        }
    }

    /// The back end panicked, and nothing of the guest is mapped for it any more. `link` is that of the connection whose task ends with
    /// it, if it does. `done` changes with what the device does: whether it got further than the last time it panicked.
    pub fn panicked(&self, link: Option<&Link>, panic: &Panicked, done: u64) {
        say!("{} (domain {}) {}: its back end panicked: {panic}", self.guest, self.domain, self.kind.name());
        let mut futile = self.futile.lock();
        *futile = (done, if futile.0 == done { futile.1 + 1 } else { 1 });
        drop(futile);
        if let Some(link) = link {
            link.end();
        }
        self.lost();
    }

    /// What serves it was lost through another's panic: it is connected anew.
    pub fn lost(&self) {
        self.panicked.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Whether it is not worth another try: it panics before it gets anywhere.
    fn is_given_up(&self) -> bool {
        self.futile.lock().1 >= MOST_FUTILE
    }

    /// The front end broke a ring: it is disconnected.
    pub fn broke(&self, link: &Link) {
        link.broken.store(true, Ordering::Release);
        self.bell.ring();
    }

    fn forget(&self) {
        // Either may be gone by now.
        let _ = store::remove(&self.back);
        let _ = store::remove(&self.front);
        // The directory of a guest's devices of this kind goes with the last of them.
        if let Some((of_guest, _)) = self.back.rsplit_once('/')
            && store::children(of_guest).is_ok_and(|left| left.is_empty())
        {
            let _ = store::remove(of_guest);
        }
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
                if self.state() == Some(XenbusState::Closing) {
                    let _ = self.set_state(XenbusState::Connected);
                }
                return false;
            }
        }
    }

    /// Nobody uses it: it was closed, or never connected.
    fn closed(&self) -> bool {
        matches!(
            self.state(),
            None | Some(XenbusState::Closed | XenbusState::InitWait | XenbusState::Initialising)
        )
    }

    /// Gives up its connection as if the back end had died, and comes back.
    pub fn restart(&self) {
        self.restart.store(true, Ordering::Release);
        self.bell.ring();
    }

    fn tell_restarted(&self, cause: &'static str) {
        publish(Event::BackendRestarted { name: self.guest.clone(), device: self.kind.name(), cause });
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

    /// What the front end says of itself, if it says it.
    ///
    /// # Errors
    /// What to say when it is no `T`.
    pub fn said<T: FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        match store::read(&format!("{}/{name}", self.front)) {
            Ok(value) => {
                let text = core::str::from_utf8(&value).unwrap_or("").trim();
                text.parse().map(Some).map_err(|_| format!("its {name:?} is {text:?}"))
            }
            Err(Error::NotFound) => Ok(None),
            Err(error) => Err(format!("xenstore answers {error}")),
        }
    }

    /// What the front end has to say.
    ///
    /// # Errors
    /// What to say when it does not, or when it is no `T`.
    pub fn needs<T: FromStr>(&self, name: &str) -> Result<T, String> {
        self.said(name)?.ok_or_else(|| format!("it says nothing of its {name:?}"))
    }
}

async fn disconnect(link: &mut Option<Arc<Link>>) {
    if let Some(link) = link.take() {
        link.disconnect().await;
    }
}

/// Follows the front end, as long as the device is there.
async fn follow<K: Kind>(device: Arc<Device<K>>, watcher: store::Own) {
    let mut link = None;
    let mut result = device.offer();
    loop {
        let seen = device.bell.rings();
        if let Err(error) = result {
            // dom0's own nodes: only the removal of its directories by hand leads here.
            device.report(&format!("xenstore answers {error}"));
        }
        if device.stop.load(Ordering::Acquire) {
            break;
        }
        result = step(&device, &mut link).await;
        // What was done above rings, too.
        if device.bell.rings() == seen {
            first(watcher.event(), device.bell.after(seen)).await;
        }
    }
    disconnect(&mut link).await;
    device.stopped.store(true, Ordering::Release);
    device.bell.ring();
}

/// What the states of both ends lead to.
async fn step<K: Kind>(device: &Arc<Device<K>>, link: &mut Option<Arc<Link>>) -> Result<(), Error> {
    use XenbusState as S;
    if device.restart.swap(false, Ordering::AcqRel) && link.is_some() {
        disconnect(link).await;
        device.tell_restarted("asked");
        return device.set_state(S::Closing);
    }
    if device.panicked.swap(false, Ordering::AcqRel) {
        disconnect(link).await;
        if device.is_given_up() {
            let (name, kind) = (&device.guest, device.kind.name());
            say!(
                "{name} (domain {}) {kind}: it panics again and again: it is not connected any more",
                device.domain
            );
            publish(Event::BackendGivenUp { name: name.clone(), device: kind });
        } else {
            device.tell_restarted("panic");
        }
        return device.set_state(S::Closing);
    }
    if link.as_ref().is_some_and(|link| link.broken.load(Ordering::Acquire)) {
        disconnect(link).await;
        device.report("an index of its ring is out of range: it is disconnected");
        return device.set_state(S::Closing);
    }
    let own = device.state().unwrap_or(S::Unknown);
    match (device.front_state(), own) {
        (S::Initialised | S::Connected, S::InitWait) => {
            match room::check(New::Connection).and_then(|()| K::connect(device)) {
                Ok(connected) => {
                    *link = Some(connected);
                    device.connected()
                }
                Err(error) => {
                    device.report(&format!("it cannot be connected: {error}"));
                    device.set_state(S::Closing)
                }
            }
        }
        (S::Closing, S::InitWait | S::Initialised | S::Connected | S::Closing) => {
            disconnect(link).await;
            device.set_state(S::Closed)
        }
        // With `Initialising` a front end that was about to connect begins anew: nothing of it is used.
        (S::Initialising, S::Closing)
        | (S::Closed | S::Unknown, S::Initialised | S::Connected | S::Closing) => {
            disconnect(link).await;
            device.set_state(S::Closed)
        }
        (S::Initialising, S::Closed) if device.is_given_up() => Ok(()),
        // It begins anew.
        (S::Initialising, S::Closed) => device.offer(),
        (S::Initialising, S::Connected) => {
            disconnect(link).await;
            device.offer()
        }
        _ => Ok(()),
    }
}

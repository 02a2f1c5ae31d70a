//! xenstore's service: one task for each guest's ring, and dom0's own access.
//!
//! What the store decides is in the package `xenstore`. Here bytes are moved, by means that any Xen offers: the ring is
//! mapped by its reserved grant and signalled through an event channel. The store is never locked over an await.
//!
//! All that works on a guest's bytes runs in compartments (design record 0066): its requests on a copy of the store, which becomes the store
//! when a request is done; what moves the bytes, with its end of the ring.

use crate::backend;
use crate::description::Description;
use crate::panics::Row;
use crate::room::{self, New};
use crate::say;
use crate::store_ring::{BadIndex, StoreBack};
use crate::toolstack::{Created, STORE_GRANT};
use crate::waiting::{Bell, first};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_sdk::compartment::{self, Fuse, Panicked};
use guest_sdk::events::Channel;
use guest_sdk::grants::Mapping;
use guest_sdk::{control, executor, time};
use hashbrown::HashMap;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{ERROR_COMM, ERROR_PROTO, ERROR_RINGIDX, MessageHeader, MessageType};
use spin::{Lazy, Mutex};
use xenstore::trace::Trace;
use xenstore::wire::{Decoder, TooLong};
use xenstore::{ClientId, Error, NewNode, Path, Permission, Store};

/// Requests of one guest that are served before others get their turn.
const REQUESTS_PER_TURN: usize = 16;
/// What every guest finds under `console/limit`, bytes; ours keeps less and is not asked.
const CONSOLE_LIMIT: &str = "1048576";

struct State {
    store: Store,
    /// dom0 itself.
    own: ClientId,
    bells: HashMap<ClientId, Arc<Bell>>,
    /// Of one guest at most, so that it is bounded. It outlives the guest.
    trace: Option<Trace>,
}

impl State {
    /// The trace that a client's messages are kept in.
    fn trace_of(&mut self, client: ClientId) -> Option<&mut Trace> {
        self.trace.as_mut().filter(|trace| trace.follows(client))
    }
}

static STATE: Lazy<Mutex<State>> = Lazy::new(|| {
    let mut store = Store::new();
    let own = store.connect();
    // What tools look for; a new store refuses nothing.
    for (path, value) in [("domid", "0"), ("name", "Domain-0")] {
        let _ = store.ask(own, header(MessageType::Write), format!("{path}\0{value}").as_bytes(), 0);
    }
    Mutex::new(State { store, own, bells: HashMap::new(), trace: None })
});
/// Whether a task waits to give up events that nobody takes.
static EXPIRING: AtomicBool = AtomicBool::new(false);

/// Does something with the store, and wakes those whom it concerns.
fn with<R>(work: impl FnOnce(&mut State) -> R) -> R {
    let mut state = STATE.lock();
    let result = work(&mut state);
    let woken = state.store.take_woken();
    let bells: Vec<_> = woken.iter().filter_map(|client| state.bells.get(client).cloned()).collect();
    let expiry = state.store.next_expiry();
    drop(state);
    bells.iter().for_each(|bell| bell.ring());
    if let Some(at) = expiry
        && !EXPIRING.swap(true, Ordering::AcqRel)
    {
        executor::spawn(expire(at));
    }
    result
}

/// Nobody is in the middle of a request.
pub fn is_intact() -> bool {
    !STATE.is_locked()
}

/// Gives up events that guests do not take, until none wait.
async fn expire(mut at_ns: u64) {
    loop {
        time::until_ns(at_ns).await;
        // Not by `with`, which would start this again.
        let mut state = STATE.lock();
        let next = state.store.expire(time::now_ns());
        if next.is_none() {
            EXPIRING.store(false, Ordering::Release);
        }
        drop(state);
        with(|_| {});
        match next {
            Some(next) => at_ns = next,
            None => return,
        }
    }
}

fn header(kind: MessageType) -> MessageHeader {
    MessageHeader { kind: kind.number(), ..MessageHeader::default() }
}

/// One of dom0's own clients.
pub struct Own {
    client: ClientId,
    bell: Arc<Bell>,
}

impl Own {
    /// A client with its own watches.
    pub fn new() -> Self {
        let bell = Arc::new(Bell::new());
        let client = with(|state| {
            let client = state.store.connect();
            state.bells.insert(client, Arc::clone(&bell));
            client
        });
        Self { client, bell }
    }

    /// Watches a path, or a special one.
    ///
    /// # Errors
    /// The store's.
    pub fn watch(&self, path: &str) -> Result<(), Error> {
        request(self.client, MessageType::Watch, format!("{path}\0watch\0").as_bytes()).map(drop)
    }

    /// Waits for the next event; gives the path that it is about.
    pub async fn event(&self) -> String {
        loop {
            let seen = self.bell.rings();
            let message = with(|state| state.store.next_output(self.client));
            let message = message.and_then(|bytes| Decoder::default().feed(&bytes).ok().flatten());
            match message {
                Some((_, payload)) => {
                    let path = payload.split(|&byte| byte == 0).next().unwrap_or(&[]);
                    return String::from_utf8_lossy(path).into_owned();
                }
                None => self.bell.after(seen).await,
            }
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        with(|state| {
            state.store.disconnect(self.client);
            state.bells.remove(&self.client);
        });
    }
}

/// A request of one of dom0's clients; events stay in its queue.
fn request(client: ClientId, kind: MessageType, payload: &[u8]) -> Result<Vec<u8>, Error> {
    with(|state| {
        let result = state.store.ask(client, header(kind), payload, time::now_ns());
        if let Some(trace) = &mut state.trace
            && result.is_ok()
        {
            trace.changed(kind, payload);
        }
        result
    })
}

/// A request of dom0's.
///
/// # Errors
/// The store's.
pub fn ask(kind: MessageType, payload: &[u8]) -> Result<Vec<u8>, Error> {
    let own = STATE.lock().own;
    request(own, kind, payload)
}

/// Reads a node.
///
/// # Errors
/// The store's.
pub fn read(path: &str) -> Result<Vec<u8>, Error> {
    ask(MessageType::Read, format!("{path}\0").as_bytes())
}

/// Writes a node.
///
/// # Errors
/// The store's.
pub fn write(path: &str, value: &str) -> Result<(), Error> {
    ask(MessageType::Write, format!("{path}\0{value}").as_bytes()).map(drop)
}

/// Makes a node with its permissions, as in `"n0\0r3\0"`.
///
/// # Errors
/// The store's.
pub fn make(path: &str, permissions: &str) -> Result<(), Error> {
    ask(MessageType::Mkdir, format!("{path}\0").as_bytes())?;
    ask(MessageType::SetPerms, format!("{path}\0{permissions}").as_bytes()).map(drop)
}

/// Removes a node and all below it.
///
/// # Errors
/// The store's.
pub fn remove(path: &str) -> Result<(), Error> {
    ask(MessageType::Rm, format!("{path}\0").as_bytes()).map(drop)
}

/// Names of a node's children.
///
/// # Errors
/// The store's.
pub fn children(path: &str) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    // In parts: dom0's own lists may be longer than a message.
    let mut offset = 0;
    loop {
        let part = ask(MessageType::DirectoryPart, format!("{path}\0{offset}\0").as_bytes())?;
        let mut strings = part.split(|&byte| byte == 0).skip(1).map(String::from_utf8_lossy);
        loop {
            match strings.next() {
                Some(name) if !name.is_empty() => {
                    offset += name.len() + 1;
                    names.push(name.into_owned());
                }
                // An empty name and what the cutting leaves behind it: these were the last.
                Some(_) if strings.next().is_some() => return Ok(names),
                _ => break,
            }
        }
    }
}

/// Asks the store about itself, or tells it something: a command and its words.
///
/// # Errors
/// The store's.
pub fn control(words: &[&str]) -> Result<String, Error> {
    let payload: String = words.iter().flat_map(|word| [*word, "\0"]).collect();
    ask(MessageType::Control, payload.as_bytes()).map(|answer| String::from_utf8_lossy(&answer).into_owned())
}

/// Where a domain's nodes are.
pub fn home(domain: DomId) -> String {
    format!("/local/domain/{domain}")
}

/// The connection to one guest.
pub struct Link {
    domain: DomId,
    guest: String,
    /// Its node below `/vm`.
    machine: Path,
    stop: AtomicBool,
    stopped: AtomicBool,
    bell: Arc<Bell>,
    /// For tests: of its requests, and of what moves their bytes.
    fuses: [Fuse; 2],
}

/// A part of what the store does for a guest, as tests let one panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The places where a request has changed something.
    Request,
    /// Turns of the ring.
    Ring,
}

impl Link {
    /// Lets the `n`-th step from here on of such a part panic.
    pub fn panic(&self, part: Part, n: u64) {
        self.fuse(part).set(n);
    }

    /// Keeps what crosses its ring from here on, in place of what was kept of another guest's or before.
    pub fn trace(&self) {
        with(|state| state.trace = Some(Trace::new(&state.store, self.domain, &self.machine)));
    }

    fn fuse(&self, part: Part) -> &Fuse {
        let [request, ring] = &self.fuses;
        match part {
            Part::Request => request,
            Part::Ring => ring,
        }
    }
}

/// Takes what was kept of a guest's messages; `None` when none are kept.
pub fn take_trace() -> Option<String> {
    STATE.lock().trace.as_mut().map(Trace::take)
}

/// Keeps no messages any more, nor those that were.
pub fn end_trace() {
    STATE.lock().trace = None;
}

/// Makes a new domain known: its nodes, and a task that serves its ring.
///
/// # Errors
/// What to say; nothing is left then.
pub fn connect(description: &Description, created: &Created) -> Result<Arc<Link>, String> {
    let domain = created.domain;
    let name = &description.name;
    let page = control::map_granted(domain, STORE_GRANT)
        .map_err(|error| format!("cannot map the xenstore ring of {name}: {error}"))?;
    let channel = control::connect(domain, created.store_port)
        .map_err(|errno| format!("cannot connect to the xenstore port of {name}: {errno}"))?;
    let machine = machine(description, domain)
        .map_err(|error| format!("cannot describe {name} in xenstore: {error}"))?;
    let link = Arc::new(Link {
        domain,
        guest: name.clone(),
        machine,
        fuses: [const { Fuse::new() }; 2],
        stop: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        bell: Arc::new(Bell::new()),
    });
    with(|state| state.store.add_domain(domain, time::now_ns()));
    let introduced = publish(description, created, &link.machine).and_then(|()| {
        with(|state| {
            state.store.introduced(domain, time::now_ns())?;
            state.bells.insert(ClientId::of(domain), Arc::clone(&link.bell));
            Ok(())
        })
    });
    if let Err(error) = introduced {
        forget(&link);
        return Err(format!("cannot describe {name} in xenstore: {error}"));
    }
    executor::spawn(serve(Arc::new(page), channel, Arc::clone(&link)));
    Ok(link)
}

/// Ends the connection, and all that the store knows of the domain.
pub async fn disconnect(link: &Link) {
    link.stop.store(true, Ordering::Release);
    loop {
        let seen = link.bell.rings();
        link.bell.ring();
        if link.stopped.load(Ordering::Acquire) {
            break;
        }
        link.bell.after(seen + 1).await;
    }
    forget(link);
}

fn forget(link: &Link) {
    let (domain, now_ns) = (link.domain, time::now_ns());
    with(|state| {
        // With them goes nearly all that is the domain's own.
        state.store.unset(link.machine.clone(), now_ns);
        state.store.unset(Path::home(domain), now_ns);
        state.store.remove_domain(domain, now_ns);
        state.bells.remove(&ClientId::of(domain));
        state.trace_of(ClientId::of(domain)).into_iter().for_each(Trace::end);
    });
}

/// Tells who watches for it that a domain has ended.
pub fn ended(domain: DomId) {
    with(|state| state.store.shut_down(domain, time::now_ns()));
}

/// Whether a domain watches anything at all.
pub fn listens(domain: DomId) -> bool {
    STATE.lock().store.usage(domain).is_some_and(|usage| usage.watches > 0)
}

/// A guest's node below `/vm`: the handle that the domain is made with, which is its name, too, and its number.
fn machine(description: &Description, domain: DomId) -> Result<Path, Error> {
    let mut path = String::from(MACHINES);
    for at in 0..16 {
        if matches!(at, 4 | 6 | 8 | 10) {
            path.push('-');
        }
        let byte = description.name.as_bytes().get(at).copied().unwrap_or(0);
        path.extend([byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0')));
    }
    path += &format!("-{domain}");
    Path::absolute(&path)
}

/// Where they are, and how long the handle behind it is.
const MACHINES: &str = "/vm/";
const UUID: usize = 36;

/// Writes what a guest expects to find, as Xen's toolstack does (Xen's docs/misc/xenstore-paths).
fn publish(description: &Description, created: &Created, machine: &Path) -> Result<(), Error> {
    let domain = created.domain;
    let home = Path::home(domain);
    let uuid = machine.as_str().get(MACHINES.len()..MACHINES.len() + UUID).unwrap_or_default();
    let readable = [permission("n0")?, permission(&format!("r{domain}"))?];
    let own = [permission(&format!("n{domain}"))?];
    let memory_kib = (description.memory.pages() * 4).to_string();
    let number = domain.to_string();
    let (console_frame, console_port) = (created.console.get().to_string(), created.console_port.to_string());
    let (store_frame, store_port) = (created.store.get().to_string(), created.store_port.to_string());
    let vcpus: Vec<String> = (0..description.vcpus).map(|vcpu| format!("cpu/{vcpu}/availability")).collect();
    let tops = [new("", "", Some(&readable)), new("device", "", Some(&readable))];
    let plain = [
        ("name", description.name.as_str()),
        ("domid", &number),
        ("vm", machine.as_str()),
        ("memory/target", &memory_kib),
        ("memory/static-max", &memory_kib),
        ("console/ring-ref", &console_frame),
        ("console/port", &console_port),
        ("console/limit", CONSOLE_LIMIT),
        ("console/type", "xenconsoled"),
        ("store/ring-ref", &store_frame),
        ("store/port", &store_port),
        ("control/platform-feature-multiprocessor-suspend", "1"),
        ("control/platform-feature-xs_reset_watches", "1"),
    ]
    .map(|(below, value)| new(below, value, None));
    let owned = [
        "control/shutdown",
        "control/feature-poweroff",
        "control/feature-reboot",
        "control/feature-suspend",
        "control/sysrq",
        "device/suspend/event-channel",
        "data",
        "drivers",
        "feature",
        "attr",
        "error",
    ]
    .map(|below| new(below, "", Some(&own)));
    let cpus = vcpus.iter().map(|below| new(below, "online", None));
    let home_nodes: Vec<NewNode<'_>> = tops.into_iter().chain(plain).chain(cpus).chain(owned).collect();
    let machine_nodes =
        [new("", "", Some(&readable)), new("uuid", uuid, None), new("name", &description.name, None)];
    let now_ns = time::now_ns();
    with(|state| {
        state.store.plant(&home, &home_nodes, now_ns)?;
        state.store.plant(machine, &machine_nodes, now_ns)
    })
}

/// A node below another, as [`Store::plant`] makes it.
fn new<'a>(below: &'a str, value: &'a str, permissions: Option<&'a [Permission]>) -> NewNode<'a> {
    NewNode { below, value: value.as_bytes(), permissions }
}

fn permission(text: &str) -> Result<Permission, Error> {
    Permission::parse(text.as_bytes())
}

/// Why a guest is not heard any more, as its ring says it.
struct Broken(u32);

impl From<BadIndex> for Broken {
    fn from(_: BadIndex) -> Self {
        Self(ERROR_RINGIDX)
    }
}

impl From<TooLong> for Broken {
    fn from(_: TooLong) -> Self {
        Self(ERROR_PROTO)
    }
}

/// A guest's ring, from start to end.
async fn serve(page: Arc<Mapping>, mut channel: Channel, link: Arc<Link>) {
    // A turn that panicked keeps its reference to the page for ever.
    let lease = page.lease();
    let mut stream = Stream::new(page, Arc::clone(&link));
    let mut broken = false;
    loop {
        let seen = link.bell.rings();
        if link.stop.load(Ordering::Acquire) {
            break;
        }
        if stream.is_borne && stream.wants_reconnection() {
            with(|state| state.store.reset(stream.client));
            stream.begin_anew().back.reconnect();
            broken = false;
            // It may have closed its end or be gone: then there is nobody to tell.
            let _ = channel.notify();
        }
        let mut turn = Turn::default();
        if !broken && let Err(Broken(error)) = stream.turn(&mut turn) {
            // It is told, and stays as it is until it begins anew or ends; nobody else notices.
            stream.begin_anew().back.fail(error);
            with(|state| state.store.reset(stream.client));
            (broken, turn.moved) = (true, true);
        }
        if turn.moved {
            let _ = channel.notify();
        }
        if turn.requests == REQUESTS_PER_TURN {
            executor::yield_now().await;
        } else {
            first(channel.fired(), link.bell.after(seen)).await;
        }
    }
    drop((stream, channel));
    lease.end();
    link.stopped.store(true, Ordering::Release);
    link.bell.ring();
}

/// What happened in a turn.
#[derive(Default)]
struct Turn {
    /// Bytes went one way or the other: the guest may be waiting for them, or for room.
    moved: bool,
    requests: usize,
}

struct Message {
    header: MessageHeader,
    payload: Vec<u8>,
    /// The lengths in which it came, for a trace.
    pieces: Vec<u16>,
}

/// One end of a ring, and what is half-way through it. It moves into each turn's compartment, and comes back unless that panics.
struct Wire {
    back: StoreBack<Arc<Mapping>>,
    decoder: Decoder,
    /// The rest of a message that is being sent.
    output: Vec<u8>,
    /// The lengths in which the message has come that is being read; when there is a trace.
    pieces: Option<Vec<u16>>,
}

impl Wire {
    fn new(page: &Arc<Mapping>) -> Self {
        let back = StoreBack::new(Arc::clone(page));
        Self { back, decoder: Decoder::default(), output: Vec::new(), pieces: None }
    }

    /// Sends as much as there is room for and, if it `hears`, reads as far as the end of a request. Says whether any bytes moved.
    fn turn(&mut self, hears: bool) -> Result<(bool, Option<Message>), Broken> {
        let count = self.back.write(&self.output)?;
        self.output.drain(..count);
        let mut moved = count > 0;
        if !hears {
            return Ok((moved, None));
        }
        loop {
            let bytes = self.back.read(self.decoder.wanted()?)?;
            if bytes.is_empty() {
                return Ok((moved, None));
            }
            moved = true;
            if let Some(pieces) = &mut self.pieces {
                pieces.push(bytes.len() as u16);
            }
            if let Some((header, payload)) = self.decoder.feed(&bytes)? {
                let pieces = self.pieces.take().unwrap_or_default();
                return Ok((moved, Some(Message { header, payload, pieces })));
            }
        }
    }
}

struct Stream {
    client: ClientId,
    link: Arc<Link>,
    page: Arc<Mapping>,
    /// Not there after a turn that panicked.
    wire: Option<Wire>,
    panics: Row,
    /// It has not panicked too often.
    is_borne: bool,
}

impl Stream {
    fn new(page: Arc<Mapping>, link: Arc<Link>) -> Self {
        let wire = Some(Wire::new(&page));
        Self { client: ClientId::of(link.domain), link, page, wire, panics: Row::default(), is_borne: true }
    }

    fn wants_reconnection(&self) -> bool {
        self.wire.as_ref().is_some_and(|wire| wire.back.wants_reconnection())
    }

    /// Forgets what is half-way through.
    fn begin_anew(&mut self) -> &mut Wire {
        self.wire.insert(Wire::new(&self.page))
    }

    /// Moves what can be moved, and serves what has come.
    fn turn(&mut self, turn: &mut Turn) -> Result<(), Broken> {
        loop {
            let (hears, waiting) = with(|state| {
                if let Some(wire) = self.wire.as_mut().filter(|wire| wire.output.is_empty()) {
                    wire.output = state.store.next_output(self.client).unwrap_or_default();
                    if let Some(trace) = state.trace_of(self.client) {
                        trace.goes(&wire.output);
                        if !wire.decoder.is_midway() {
                            wire.pieces.get_or_insert_default();
                        }
                    }
                }
                (state.store.may_request(self.client), state.store.has_output(self.client))
            });
            let (moved, message) = self.exchange(hears && turn.requests < REQUESTS_PER_TURN)?;
            turn.moved |= moved;
            if let Some(message) = message {
                turn.requests += 1;
                self.request(message)?;
            } else if !waiting || self.wire.as_ref().is_none_or(|wire| !wire.output.is_empty()) {
                return Ok(());
            }
        }
    }

    /// Counts a panic; what to say of it.
    fn panicked(&mut self, what: &str, panic: &Panicked) {
        self.is_borne = self.panics.bears_another(time::now_ns());
        let then = if self.is_borne { "" } else { ": again and again, so it is not heard any more" };
        say!("{} (domain {}): {what} panicked: {panic}{then}", self.link.guest, self.link.domain);
    }

    /// A turn of the ring.
    fn exchange(&mut self, hears: bool) -> Result<(bool, Option<Message>), Broken> {
        let Some(mut wire) = self.wire.take_if(|wire| !wire.output.is_empty() || !wire.back.is_quiet())
        else {
            return if self.wire.is_some() { Ok((false, None)) } else { Err(Broken(ERROR_COMM)) };
        };
        let link = Arc::clone(&self.link);
        let work = move || {
            link.fuse(Part::Ring).reached();
            let result = wire.turn(hears);
            (wire, result)
        };
        match compartment::run(backend::is_intact, work) {
            Ok((wire, result)) => {
                self.wire = Some(wire);
                result
            }
            Err(panic) => {
                self.panicked("its xenstore ring", &panic);
                Err(Broken(ERROR_COMM))
            }
        }
    }

    /// Makes a request on a copy of the store, which becomes the store when it is done. The copy is some references.
    fn request(&mut self, Message { header, payload, pieces }: Message) -> Result<(), Broken> {
        let (client, now_ns, link) = (self.client, time::now_ns(), Arc::clone(&self.link));
        let mut state = STATE.lock();
        if let Some(trace) = state.trace_of(client) {
            trace.came(header, &payload, pieces);
        }
        let mut store = state.store.clone();
        drop(state);
        let work = move || {
            let fuse = link.fuse(Part::Request);
            PROBED.set(fuse.left());
            store.set_probe((fuse.left() > 0).then_some(probe));
            // It stays so if this panics.
            fuse.set(0);
            store.set_full(!room::is_for(New::Node));
            let action = store.request(client, header, &payload, now_ns);
            // Only the control domain's requests have any.
            debug_assert!(action.is_none());
            store.set_probe(None);
            fuse.set(PROBED.left());
            store
        };
        match compartment::run(backend::is_intact, work) {
            Ok(store) => {
                with(|state| state.store = store);
                Ok(())
            }
            Err(panic) => {
                self.panicked("its request to xenstore", &panic);
                if !self.is_borne {
                    return Err(Broken(ERROR_COMM));
                }
                with(|state| state.store.answer(client, header, Err(Error::Failed)));
                Ok(())
            }
        }
    }
}

/// For tests: of the request that is being made.
static PROBED: Fuse = Fuse::new();

fn probe() {
    PROBED.reached();
}

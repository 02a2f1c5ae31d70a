//! A client of xenstore, the tree of small values through which a domain and its devices' other ends find each other.
//!
//! ```ignore
//! let mut store = domain.xenstore()?;
//! let name = store.read("name").await?;
//! store.watch("control/shutdown", "power").await?;
//! let (path, token) = store.event().await?;
//! ```
//! One request is on its way at a time; watch events that come before its reply are kept for [`Client::event`].

mod hub;

pub use hub::{HubSignal, SharedStore, Turn, Watch};

use crate::events::Channel;
use crate::memory::{self, Shared};
use crate::ring::SharedPage;
use crate::rt::start;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall_abi::Errno;
use hypercall_abi::io::xenstore::{
    MessageHeader, MessageType, PAYLOAD_MAX, RING_SIZE, XenstoreInterface, error_from_text, piece, waiting,
};
use zerocopy::{FromBytes, IntoBytes};

const REQ: usize = offset_of!(XenstoreInterface, req);
const RSP: usize = offset_of!(XenstoreInterface, rsp);
const REQ_CONS: usize = offset_of!(XenstoreInterface, req_cons);
const REQ_PROD: usize = offset_of!(XenstoreInterface, req_prod);
const RSP_CONS: usize = offset_of!(XenstoreInterface, rsp_cons);
const RSP_PROD: usize = offset_of!(XenstoreInterface, rsp_prod);
const HEADER: usize = size_of::<MessageHeader>();

/// Why a request got no good reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The store refused it: `EACCES`, `ENOENT`, `ENOSPC` for a quota, `EAGAIN` for a transaction to be begun anew, …
    Refused(Errno),
    /// The request is longer than a message may be, or has a zero byte where none may be.
    Malformed,
    /// The other end wrote what cannot be; the connection is of no use any more.
    Broken,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(errno) => write!(f, "xenstore answers {errno}"),
            Self::Malformed => f.write_str("the request does not fit into a message"),
            Self::Broken => f.write_str("the connection to xenstore is broken"),
        }
    }
}

impl core::error::Error for StoreError {}

/// The signal between the two ends.
pub trait Signal {
    /// Tells the other end that there is something, or room.
    fn notify(&self);
    /// Waits, as a task, until the other end has told.
    fn fired(&mut self) -> impl Future<Output = ()> + Send;
}

impl Signal for Channel {
    fn notify(&self) {
        // A port of our own that the builder has made: if nobody is connected, nobody is to be told.
        let _ = Channel::notify(self);
    }
    fn fired(&mut self) -> impl Future<Output = ()> + Send {
        Channel::fired(self)
    }
}

/// The domain's connection to xenstore.
pub type Xenstore = Client<Shared, Channel>;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The connection that the builder has made, the first time somebody asks; `None` in the first domain, which has none.
pub(crate) fn take() -> Option<Xenstore> {
    let info = start::start_info()?;
    if start::is_first_domain() {
        return None;
    }
    let address = memory::own_frame_address(info.store_mfn)?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return None;
    }
    // SAFETY: the builder's page, mapped from start to end; it is in no memory that Rust hands out.
    let page = unsafe { Shared::new(address, hypercall_abi::PAGE_SIZE) };
    Some(Client::new(page, Channel::adopt(info.store_evtchn).ok()?))
}

/// An event: the path that it is about, and the token of the watch.
pub type Event = (String, String);

/// A client at its end of a ring.
#[derive(Debug)]
pub struct Client<M, S> {
    page: M,
    signal: S,
    req_prod: u32,
    rsp_cons: u32,
    last_id: u32,
    input: Vec<u8>,
    events: VecDeque<Event>,
    /// Transactions that were dropped and are still to be ended.
    abandoned: Vec<u32>,
    /// Watches that were dropped and are still to be ended: path and token.
    abandoned_watches: Vec<Event>,
}

impl<M: SharedPage, S: Signal> Client<M, S> {
    /// Takes over a ring where its indexes are.
    pub fn new(page: M, signal: S) -> Self {
        let req_prod = page.word(REQ_PROD).load(Ordering::Relaxed);
        let rsp_cons = page.word(RSP_CONS).load(Ordering::Relaxed);
        Self {
            page,
            signal,
            req_prod,
            rsp_cons,
            last_id: 0,
            input: Vec::new(),
            events: VecDeque::new(),
            abandoned: Vec::new(),
            abandoned_watches: Vec::new(),
        }
    }

    /// The same client with another signal; `make` gets the old one and gives something back besides.
    fn exchange_signal<T, R>(self, make: impl FnOnce(S) -> (T, R)) -> (Client<M, T>, R) {
        let (signal, rest) = make(self.signal);
        let client = Client {
            page: self.page,
            signal,
            req_prod: self.req_prod,
            rsp_cons: self.rsp_cons,
            last_id: self.last_id,
            input: self.input,
            events: self.events,
            abandoned: self.abandoned,
            abandoned_watches: self.abandoned_watches,
        };
        (client, rest)
    }

    /// Reads a node's value.
    ///
    /// # Errors
    /// `EACCES`, `ENOENT`; [`StoreError`].
    pub async fn read(&mut self, path: &str) -> Result<Vec<u8>, StoreError> {
        self.request(MessageType::Read, 0, &[path], b"").await
    }

    /// Sets a node's value; what is missing on the way to it is made.
    ///
    /// # Errors
    /// `EACCES`, `ENOSPC`; [`StoreError`].
    pub async fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.request(MessageType::Write, 0, &[path], value).await.map(drop)
    }

    /// Removes a node and all below it.
    ///
    /// # Errors
    /// `EACCES`, `ENOENT` when not even its parent is there; [`StoreError`].
    pub async fn remove(&mut self, path: &str) -> Result<(), StoreError> {
        self.request(MessageType::Rm, 0, &[path], b"").await.map(drop)
    }

    /// Names of a node's children.
    ///
    /// # Errors
    /// `EACCES`, `ENOENT`, `E2BIG` when they do not fit into a message; [`StoreError`].
    pub async fn directory(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        self.request(MessageType::Directory, 0, &[path], b"").await.map(|reply| names(&reply))
    }

    /// Sets who may do what with a node, as in `["n3", "r0"]`: the owner and what all others may, then exceptions.
    ///
    /// # Errors
    /// `EACCES` for who does not own it, `EPERM` for giving it away; [`StoreError`].
    pub async fn set_permissions(&mut self, path: &str, list: &[&str]) -> Result<(), StoreError> {
        let parts: Vec<&str> = core::iter::once(path).chain(list.iter().copied()).collect();
        self.request(MessageType::SetPerms, 0, &parts, b"").await.map(drop)
    }

    /// Asks for events when something at `path` or below changes. The first one comes at once.
    ///
    /// # Errors
    /// `EEXIST` for a watch that exists, `E2BIG` when there are too many; [`StoreError`].
    pub async fn watch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.request(MessageType::Watch, 0, &[path, token], b"").await.map(drop)
    }

    /// Ends a watch. Events of it may still come.
    ///
    /// # Errors
    /// `ENOENT` when there is none; [`StoreError`].
    pub async fn unwatch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.request(MessageType::Unwatch, 0, &[path, token], b"").await.map(drop)
    }

    /// Waits for the next event of any watch.
    ///
    /// # Errors
    /// [`StoreError::Broken`].
    pub async fn event(&mut self) -> Result<Event, StoreError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            // A reply that nobody waits for is of a request that was given up. An event may have come with the reply before it.
            if self.receive()?.is_none() && self.events.is_empty() {
                self.signal.fired().await;
            }
        }
    }

    /// Takes in the events that have come, without waiting.
    fn take_events(&mut self) -> Result<(), StoreError> {
        // Replies that nobody waits for are of requests that were given up.
        while self.receive()?.is_some() {}
        Ok(())
    }

    /// Begins a transaction: what is done through it is seen by others all at once, at its end.
    ///
    /// # Errors
    /// `ENOSPC` when too many are open; [`StoreError`].
    pub async fn transaction(&mut self) -> Result<Transaction<'_, M, S>, StoreError> {
        let reply = self.request(MessageType::TransactionStart, 0, &[""], b"").await?;
        let text = reply.split(|&byte| byte == 0).next().and_then(|text| core::str::from_utf8(text).ok());
        let id = text.and_then(|text| text.parse().ok()).ok_or(StoreError::Broken)?;
        Ok(Transaction { client: self, id, open: true })
    }

    async fn request(
        &mut self,
        kind: MessageType,
        tx_id: u32,
        parts: &[&str],
        value: &[u8],
    ) -> Result<Vec<u8>, StoreError> {
        while let Some(id) = self.abandoned.pop() {
            // It is gone, whatever the answer.
            let _ = self.exchange(MessageType::TransactionEnd, id, b"F\0").await;
        }
        let mut payload = Vec::new();
        for part in parts {
            if part.contains('\0') {
                return Err(StoreError::Malformed);
            }
            payload.extend_from_slice(part.as_bytes());
            payload.push(0);
        }
        payload.extend_from_slice(value);
        self.exchange(kind, tx_id, &payload).await
    }

    async fn exchange(
        &mut self,
        kind: MessageType,
        tx_id: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, StoreError> {
        if payload.len() > PAYLOAD_MAX {
            return Err(StoreError::Malformed);
        }
        self.last_id = self.last_id.wrapping_add(1);
        let req_id = self.last_id;
        let header = MessageHeader { kind: kind.number(), req_id, tx_id, len: payload.len() as u32 };
        let message = [header.as_bytes(), payload].concat();
        let mut left = message.as_slice();
        loop {
            let sent = self.send(left)?;
            left = left.get(sent..).unwrap_or(&[]);
            if left.is_empty() {
                break;
            }
            // The store may want room for what it sends before it reads on.
            self.take_input()?;
            if sent == 0 {
                self.signal.fired().await;
            }
        }
        loop {
            match self.receive()? {
                Some((header, reply)) if header.req_id == req_id => {
                    if header.kind == MessageType::Error.number() {
                        let name = reply.split(|&byte| byte == 0).next().unwrap_or(&[]);
                        return Err(StoreError::Refused(error_from_text(name).unwrap_or(Errno::EIO)));
                    }
                    return if header.kind == kind.number() { Ok(reply) } else { Err(StoreError::Broken) };
                }
                // Of a request that was given up.
                Some(_) => {}
                None => self.signal.fired().await,
            }
        }
    }

    /// Puts as many bytes into the ring as there is room for.
    fn send(&mut self, bytes: &[u8]) -> Result<usize, StoreError> {
        let consumed = self.page.word(REQ_CONS).load(Ordering::Acquire);
        let used = waiting(self.req_prod, consumed, RING_SIZE).ok_or(StoreError::Broken)?;
        let count = bytes.len().min(RING_SIZE - used);
        let (start, first) = piece(self.req_prod, count, RING_SIZE);
        let (given, _) = bytes.split_at(count);
        let (head, tail) = given.split_at(first);
        self.page.write_bytes(REQ + start, head);
        self.page.write_bytes(REQ, tail);
        self.req_prod = self.req_prod.wrapping_add(count as u32);
        if count > 0 {
            self.page.word(REQ_PROD).store(self.req_prod, Ordering::Release);
            self.signal.notify();
        }
        Ok(count)
    }

    /// Takes what is in the ring.
    fn take_input(&mut self) -> Result<(), StoreError> {
        let produced = self.page.word(RSP_PROD).load(Ordering::Acquire);
        let count = waiting(produced, self.rsp_cons, RING_SIZE).ok_or(StoreError::Broken)?;
        if count == 0 {
            return Ok(());
        }
        let mut bytes = alloc::vec![0; count];
        let (start, first) = piece(self.rsp_cons, count, RING_SIZE);
        let (head, tail) = bytes.split_at_mut(first);
        self.page.read_bytes(RSP + start, head);
        self.page.read_bytes(RSP, tail);
        self.input.append(&mut bytes);
        self.rsp_cons = self.rsp_cons.wrapping_add(count as u32);
        self.page.word(RSP_CONS).store(self.rsp_cons, Ordering::Release);
        // It may have waited for room.
        self.signal.notify();
        Ok(())
    }

    /// The next reply that has come whole; events before it are kept.
    fn receive(&mut self) -> Result<Option<(MessageHeader, Vec<u8>)>, StoreError> {
        self.take_input()?;
        loop {
            let Some(Ok(header)) = self.input.get(..HEADER).map(MessageHeader::read_from_bytes) else {
                return Ok(None);
            };
            let len = header.len as usize;
            if len > PAYLOAD_MAX {
                return Err(StoreError::Broken);
            }
            let Some(payload) = self.input.get(HEADER..HEADER + len).map(<[u8]>::to_vec) else {
                return Ok(None);
            };
            self.input.drain(..HEADER + len);
            if header.kind != MessageType::WatchEvent.number() {
                return Ok(Some((header, payload)));
            }
            let mut texts =
                payload.split(|&byte| byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
            let event = texts.next().zip(texts.next()).ok_or(StoreError::Broken)?;
            self.events.push_back(event);
        }
    }
}

/// A transaction. Dropping it without [`commit`](Self::commit) takes everything back.
#[derive(Debug)]
pub struct Transaction<'a, M: SharedPage, S: Signal> {
    client: &'a mut Client<M, S>,
    id: u32,
    open: bool,
}

impl<M: SharedPage, S: Signal> Transaction<'_, M, S> {
    /// As [`Client::read`].
    ///
    /// # Errors
    /// Its.
    pub async fn read(&mut self, path: &str) -> Result<Vec<u8>, StoreError> {
        self.client.request(MessageType::Read, self.id, &[path], b"").await
    }

    /// As [`Client::write`].
    ///
    /// # Errors
    /// Its.
    pub async fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.client.request(MessageType::Write, self.id, &[path], value).await.map(drop)
    }

    /// As [`Client::remove`].
    ///
    /// # Errors
    /// Its.
    pub async fn remove(&mut self, path: &str) -> Result<(), StoreError> {
        self.client.request(MessageType::Rm, self.id, &[path], b"").await.map(drop)
    }

    /// As [`Client::directory`].
    ///
    /// # Errors
    /// Its.
    pub async fn directory(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        self.client.request(MessageType::Directory, self.id, &[path], b"").await.map(|reply| names(&reply))
    }

    /// Ends it; everything done through it happens now.
    ///
    /// # Errors
    /// `EAGAIN` when others have changed what it has seen: nothing has happened, begin anew. [`StoreError`].
    pub async fn commit(mut self) -> Result<(), StoreError> {
        // Whatever comes of it, it has ended, once the store has the request.
        let result = self.client.request(MessageType::TransactionEnd, self.id, &["T"], b"").await;
        self.open = false;
        result.map(drop)
    }
}

impl<M: SharedPage, S: Signal> Drop for Transaction<'_, M, S> {
    fn drop(&mut self) {
        if self.open {
            self.client.abandoned.push(self.id);
        }
    }
}

fn names(reply: &[u8]) -> Vec<String> {
    let names = reply.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8_lossy(name).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::{Client, REQ_CONS, REQ_PROD, RSP, RSP_CONS, RSP_PROD, SharedStore, Signal, StoreError};
    use crate::ring::SharedPage;
    use crate::ring::host::HostPages;
    use crate::shutdown::{self, Request};
    use crate::sync::Bell;
    use alloc::collections::BTreeMap;
    use alloc::string::{String, ToString};
    use alloc::sync::Arc;
    use alloc::vec::Vec;
    use core::future::{Future, ready};
    use core::pin::pin;
    use core::sync::atomic::Ordering;
    use core::task::{Context, Poll, Waker};
    use hypercall_abi::Errno;
    use hypercall_abi::io::xenstore::{MessageHeader, MessageType as M};
    use spin::Mutex;
    use zerocopy::{FromBytes, IntoBytes};

    /// A store with one flat map, which moves a few bytes each time it is told.
    #[derive(Default)]
    struct Server {
        input: Vec<u8>,
        output: Vec<u8>,
        nodes: BTreeMap<String, Vec<u8>>,
        copy: Option<BTreeMap<String, Vec<u8>>>,
        conflict: bool,
        ended: Vec<(u32, Vec<u8>)>,
        /// The token of the last watch: all events have it.
        token: Vec<u8>,
        /// How often it was waited for.
        waits: u32,
    }

    #[derive(Clone, Copy)]
    struct Host<'a> {
        page: &'a HostPages,
        server: &'a Mutex<Server>,
    }

    impl Host<'_> {
        fn step(&self) {
            let mut server = self.server.lock();
            let mut at = self.page.word(REQ_CONS).load(Ordering::Relaxed);
            for _ in 0..100 {
                if at == self.page.word(REQ_PROD).load(Ordering::Acquire) {
                    break;
                }
                let mut byte = [0];
                self.page.read_bytes((at % 1024) as usize, &mut byte);
                server.input.push(byte[0]);
                at = at.wrapping_add(1);
            }
            self.page.word(REQ_CONS).store(at, Ordering::Release);
            server.serve();
            let mut at = self.page.word(RSP_PROD).load(Ordering::Relaxed);
            let room = 1024 - at.wrapping_sub(self.page.word(RSP_CONS).load(Ordering::Acquire));
            let count = server.output.len().min(room.min(70) as usize);
            for byte in server.output.drain(..count) {
                self.page.write_bytes(RSP + (at % 1024) as usize, &[byte]);
                at = at.wrapping_add(1);
            }
            self.page.word(RSP_PROD).store(at, Ordering::Release);
        }
    }

    impl Signal for Host<'_> {
        fn notify(&self) {
            self.step();
        }
        fn fired(&mut self) -> impl Future<Output = ()> + Send {
            self.server.lock().waits += 1;
            self.step();
            ready(())
        }
    }

    impl Server {
        fn serve(&mut self) {
            while let Some(Ok(header)) = self.input.get(..16).map(MessageHeader::read_from_bytes) {
                let Some(payload) = self.input.get(16..16 + header.len as usize).map(<[u8]>::to_vec) else {
                    return;
                };
                self.input.drain(..16 + header.len as usize);
                let end = payload.iter().position(|&byte| byte == 0).unwrap();
                let path = String::from_utf8(payload[..end].to_vec()).unwrap();
                let value = payload[end + 1..].to_vec();
                let mut event = None;
                let mut nodes =
                    if header.tx_id == 0 { self.nodes.clone() } else { self.copy.clone().unwrap() };
                let reply = match M::from_number(header.kind.into()).unwrap() {
                    M::Read => nodes.get(&path).cloned().ok_or("ENOENT"),
                    M::Write => {
                        event = (header.tx_id == 0).then(|| path.clone());
                        nodes.insert(path, value);
                        Ok(b"OK\0".to_vec())
                    }
                    M::Directory => {
                        Ok(nodes.keys().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect())
                    }
                    M::Watch => {
                        event = Some(path);
                        self.token = value;
                        Ok(b"OK\0".to_vec())
                    }
                    M::TransactionStart => {
                        self.copy = Some(nodes.clone());
                        Ok(b"7\0".to_vec())
                    }
                    M::TransactionEnd => {
                        self.ended.push((header.tx_id, payload));
                        if self.conflict { Err("EAGAIN") } else { Ok(b"OK\0".to_vec()) }
                    }
                    _ => Err("ENOSYS"),
                };
                *(if header.tx_id == 0 { &mut self.nodes } else { self.copy.as_mut().unwrap() }) = nodes;
                // An event may come before the reply as well as after it.
                if let Some(path) = event {
                    self.tell(&path);
                }
                let (kind, reply) = match reply {
                    Ok(reply) => (header.kind, reply),
                    Err(name) => (16, [name.as_bytes(), b"\0"].concat()),
                };
                let header = MessageHeader { kind, len: reply.len() as u32, ..header };
                self.output.extend([header.as_bytes(), &reply].concat());
            }
        }
    }

    impl Server {
        /// Sends an event about a path.
        fn tell(&mut self, path: &str) {
            let text = [path.as_bytes(), b"\0", &self.token].concat();
            let header = MessageHeader { kind: 15, len: text.len() as u32, ..MessageHeader::default() };
            self.output.extend([header.as_bytes(), &text].concat());
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it waits for something that does not come"),
        }
    }

    fn with(start: u32, test: impl AsyncFnOnce(Client<&HostPages, Host<'_>>, &Mutex<Server>, &HostPages)) {
        let page = HostPages::new(1, 0xa5a5_a5a5);
        for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD] {
            page.word(index).store(start, Ordering::Relaxed);
        }
        let server = Mutex::new(Server::default());
        let host = Host { page: &page, server: &server };
        run(test(Client::new(&page, host), &server, &page));
    }

    #[test]
    fn values_longer_than_the_ring_go_through_in_pieces() {
        with(u32::MAX - 2000, async |mut store, _, _| {
            for size in [0, 1, 1000, 1024, 3000, 4000] {
                let value: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
                store.write("a/b", &value).await.unwrap();
                assert_eq!(store.read("a/b").await, Ok(value));
            }
            assert_eq!(store.directory("a").await, Ok(Vec::from(["a/b".to_string()])));
            assert_eq!(store.read("none").await, Err(StoreError::Refused(Errno::ENOENT)));
            assert_eq!(store.unwatch("x", "t").await, Err(StoreError::Refused(Errno::ENOSYS)));
            assert_eq!(store.write("a", &[0; 4095]).await, Err(StoreError::Malformed));
            assert_eq!(store.write("a\0b", b"").await, Err(StoreError::Malformed));
            assert_eq!(store.write("a", &[0; 4094]).await, Ok(()));
        });
    }

    #[test]
    fn events_are_kept_while_replies_are_waited_for() {
        with(0, async |mut store, _, _| {
            store.watch("a", "t").await.unwrap();
            store.write("b", b"x").await.unwrap();
            assert_eq!(store.read("b").await, Ok(b"x".to_vec()));
            for path in ["a", "b"] {
                assert_eq!(store.event().await, Ok((path.to_string(), "t".to_string())));
            }
        });
    }

    #[test]
    fn an_event_that_came_with_a_reply_is_not_waited_for() {
        with(0, async |mut store, server, _| {
            store.watch("a", "t").await.unwrap();
            let waits = server.lock().waits;
            assert_eq!(store.event().await, Ok(("a".to_string(), "t".to_string())));
            assert_eq!(server.lock().waits, waits, "nothing else may come for a long time");
        });
    }

    #[test]
    fn transactions_end_by_commit_or_by_being_dropped() {
        with(0, async |mut store, server, _| {
            let mut work = store.transaction().await.unwrap();
            work.write("a", b"1").await.unwrap();
            assert_eq!(work.read("a").await, Ok(b"1".to_vec()));
            assert_eq!(work.commit().await, Ok(()));
            assert_eq!(server.lock().ended, [(7, b"T\0".to_vec())]);
            server.lock().conflict = true;
            let work = store.transaction().await.unwrap();
            assert_eq!(work.commit().await, Err(StoreError::Refused(Errno::EAGAIN)));
            server.lock().ended.clear();
            drop(store.transaction().await.unwrap());
            assert_eq!(server.lock().ended, []);
            assert_eq!(store.read("a").await, Err(StoreError::Refused(Errno::ENOENT)));
            assert_eq!(server.lock().ended, [(7, b"F\0".to_vec())], "before the next request");
        });
    }

    #[test]
    fn a_request_to_end_is_heard_and_confirmed() {
        const NODE: &str = "control/shutdown";
        let (page, server) = (HostPages::new(1, 0), Mutex::new(Server::default()));
        let (bell, host) = (Arc::new(Bell::new()), Host { page: &page, server: &server });
        let store = SharedStore::over(Client::new(&page, host), Arc::clone(&bell));
        let mut context = Context::from_waker(Waker::noop());
        for (word, request) in [
            ("poweroff", Request::Poweroff),
            ("reboot", Request::Reboot),
            ("halt", Request::Halt),
            ("suspend", Request::Suspend),
            ("s3", Request::Other("s3".to_string())),
        ] {
            let mut asked = pin!(shutdown::requested(&store));
            assert_eq!(asked.as_mut().poll(&mut context), Poll::Pending, "nobody wants anything");
            server.lock().nodes.insert(NODE.to_string(), word.into());
            server.lock().tell(NODE);
            host.step();
            bell.ring();
            assert_eq!(asked.as_mut().poll(&mut context), Poll::Ready(Ok(request)));
            assert_eq!(server.lock().nodes[NODE], b"");
        }
        server.lock().nodes.insert(NODE.to_string(), b"poweroff".to_vec());
        assert_eq!(
            run(shutdown::requested(&store)),
            Ok(Request::Poweroff),
            "what was there before it listened"
        );
    }

    #[test]
    fn a_store_that_writes_nonsense_is_an_error() {
        with(0, async |mut store, _, page| {
            page.word(RSP_PROD).store(1025, Ordering::Relaxed);
            assert_eq!(store.event().await, Err(StoreError::Broken));
            page.word(RSP_PROD).store(0, Ordering::Relaxed);
            page.word(REQ_CONS).store(5, Ordering::Relaxed);
            assert_eq!(store.read("a").await, Err(StoreError::Broken));
        });
        with(0, async |mut store, server, _| {
            let header = MessageHeader { kind: 2, len: 4097, ..MessageHeader::default() };
            server.lock().output.extend(header.as_bytes());
            assert_eq!(store.read("a").await, Err(StoreError::Broken));
        });
    }
}

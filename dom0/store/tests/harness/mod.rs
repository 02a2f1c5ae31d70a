//! A store with clients that ask in bytes and read what comes back.
#![allow(dead_code, reason = "each test file uses its part")]

use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType};
use std::collections::BTreeMap;
use xenstore::wire::{Decoder, HEADER};
use xenstore::{ClientId, Store};

pub struct Harness {
    pub store: Store,
    pub now_ns: u64,
    /// One of the control domain's own parts.
    pub control: ClientId,
    /// Events that came, by client, as path and token.
    pub events: BTreeMap<ClientId, Vec<(String, String)>>,
    next_id: u32,
}

pub type Reply = Result<Vec<u8>, String>;

impl Harness {
    pub fn new() -> Self {
        let mut store = Store::new();
        let control = store.connect();
        Self { store, now_ns: 0, control, events: BTreeMap::new(), next_id: 1 }
    }

    /// A domain that exists, has a home and is connected.
    pub fn add(&mut self, number: u16) -> ClientId {
        let domain = DomId::new(number);
        self.store.add_domain(domain, self.now_ns);
        self.store.introduced(domain, self.now_ns).unwrap();
        let home = format!("/local/domain/{number}");
        let control = self.control;
        self.ask(control, MessageType::Mkdir, 0, format!("{home}\0").as_bytes()).unwrap();
        let list = format!("{home}\0n0\0r{number}\0");
        self.ask(control, MessageType::SetPerms, 0, list.as_bytes()).unwrap();
        let own = format!("{home}/data");
        self.ask(control, MessageType::Mkdir, 0, format!("{own}\0").as_bytes()).unwrap();
        self.ask(control, MessageType::SetPerms, 0, format!("{own}\0n{number}\0").as_bytes()).unwrap();
        ClientId::of(domain)
    }

    /// Takes what waits for a client: replies here, events to their list.
    pub fn drain(&mut self, client: ClientId) -> Vec<(MessageHeader, Vec<u8>)> {
        let mut replies = Vec::new();
        while let Some(bytes) = self.store.next_output(client) {
            assert!(bytes.len() <= HEADER + 4096);
            let (header, payload) = Decoder::default().feed(&bytes).unwrap().expect("a whole message");
            if header.kind == MessageType::WatchEvent.number() {
                assert_eq!((header.req_id, header.tx_id), (0, 0));
                let text = String::from_utf8(payload).unwrap();
                let mut parts = text.split('\0');
                let event = (parts.next().unwrap().to_string(), parts.next().unwrap().to_string());
                assert_eq!((parts.next(), parts.next()), (Some(""), None));
                self.events.entry(client).or_default().push(event);
            } else {
                replies.push((header, payload));
            }
        }
        replies
    }

    /// One request and its reply.
    pub fn ask(&mut self, client: ClientId, kind: MessageType, tx_id: u32, payload: &[u8]) -> Reply {
        self.ask_number(client, kind.number(), tx_id, payload)
    }

    pub fn ask_number(&mut self, client: ClientId, kind: u32, tx_id: u32, payload: &[u8]) -> Reply {
        self.next_id += 1;
        let header = MessageHeader { kind, req_id: self.next_id, tx_id, len: payload.len() as u32 };
        let action = self.store.request(client, header, payload, self.now_ns);
        assert_eq!(action, None);
        let mut replies = self.drain(client);
        let (reply, payload) = replies.pop().expect("a reply");
        assert!(replies.is_empty(), "one reply each");
        assert_eq!((reply.req_id, reply.tx_id), (header.req_id, header.tx_id));
        if reply.kind == MessageType::Error.number() {
            let mut name = String::from_utf8(payload).unwrap();
            assert_eq!(name.pop(), Some('\0'));
            return Err(name);
        }
        assert_eq!(reply.kind, kind);
        Ok(payload)
    }

    pub fn text(&mut self, client: ClientId, kind: MessageType, payload: &str) -> Result<String, String> {
        self.ask(client, kind, 0, payload.as_bytes())
            .map(|reply| String::from_utf8(reply).unwrap().trim_end_matches('\0').replace('\0', " "))
    }

    pub fn start(&mut self, client: ClientId) -> u32 {
        self.text(client, MessageType::TransactionStart, "\0").unwrap().parse().unwrap()
    }

    pub fn end(&mut self, client: ClientId, id: u32, keep: bool) -> Reply {
        self.ask(client, MessageType::TransactionEnd, id, if keep { b"T\0" } else { b"F\0" })
    }

    /// Events of a client that came since this was last asked.
    pub fn take_events(&mut self, client: ClientId) -> Vec<(String, String)> {
        let rest = self.drain(client);
        assert!(rest.is_empty());
        self.events.remove(&client).unwrap_or_default()
    }
}

//! Hostile clients: streams of bytes that are nearly requests, from domains that come and go. Whatever they send, nothing panics, each
//! request has one reply, accounts agree with the tree, quotas hold, and nobody is told of a node that is not his to read. Some requests
//! panic half-way, each made on a copy of the store: the store itself is as it was.
//!
//! `FUZZ_SEED=N` repeats one run, `FUZZ_RUNS=N` makes so many.
#![allow(clippy::octal_escapes, reason = "a zero byte and a digit are meant")]

use fastrand::Rng;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType, PAYLOAD_MAX};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use xenstore::wire::{Decoder, HEADER, encode};
use xenstore::{ClientId, Quota, Store};

const RUNS: u64 = 60;
const STEPS: usize = 1500;
/// Domains that there are at most.
const DOMAINS: u16 = 5;
/// In the value and the name of nodes that only the control domain may read.
const SECRET: &str = "not-for-you";
const TYPES: u64 = 24;

/// A run can be repeated from its seed.
struct Random(Rng);

impl Random {
    fn next(&mut self) -> u64 {
        self.0.u64(..)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }
    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.0.usize(..items.len())]
    }
}

/// A domain's end of its ring.
#[derive(Default)]
struct Stream {
    decoder: Decoder,
    /// Sent, not yet read by the store.
    bytes: Vec<u8>,
    /// Numbers of requests that were served and whose replies have not come, with the types that were asked for.
    open: BTreeMap<u32, u32>,
    next_id: u32,
    /// Paths that it wanted to watch.
    watched: Vec<String>,
}

struct World {
    random: Random,
    store: Store,
    control: ClientId,
    streams: BTreeMap<u16, Stream>,
    now_ns: u64,
    /// Requests that panicked.
    lost: u64,
}

thread_local! {
    /// Places that the request passes before it panics.
    static LEFT: Cell<u64> = const { Cell::new(0) };
}

/// Panics when it is called often enough, without a word.
fn probe() {
    match LEFT.get().checked_sub(1) {
        Some(left) => LEFT.set(left),
        None => resume_unwind(Box::new(())),
    }
}

impl World {
    fn new(seed: u64) -> World {
        let mut store = Store::new();
        let control = store.connect();
        let mut world = World {
            random: Random(Rng::with_seed(seed)),
            store,
            control,
            streams: BTreeMap::new(),
            now_ns: 0,
            lost: 0,
        };
        for path in ["/private", &format!("/private/{SECRET}"), "/open"] {
            world.rule(MessageType::Write, &format!("{path}\0{SECRET}"));
        }
        world.rule(MessageType::Write, "/open\0");
        world.rule(MessageType::SetPerms, "/open\0b0\0");
        world
    }

    /// A request of the control domain's own, which may be refused.
    fn rule(&mut self, kind: MessageType, payload: &str) {
        let header = MessageHeader { kind: kind.number(), ..MessageHeader::default() };
        let _ = self.store.ask(self.control, header, payload.as_bytes(), self.now_ns);
        while self.store.next_output(self.control).is_some() {}
    }

    fn come(&mut self, number: u16) {
        self.store.add_domain(DomId::new(number), self.now_ns);
        if self.random.below(8) > 0 {
            self.store.introduced(DomId::new(number), self.now_ns).unwrap();
        }
        let quota = Quota {
            nodes: self.random.of(&[3, 20, 1000]),
            watches: self.random.of(&[1, 128]),
            transactions: self.random.of(&[1, 10]),
            transaction_nodes: self.random.of(&[4, 1024]),
            memory: self.random.of(&[2000, 20_000, 2 << 20]),
            ..Quota::default()
        };
        self.store.set_quota(Some(DomId::new(number)), quota);
        let home = format!("/local/domain/{number}");
        self.rule(MessageType::Mkdir, &format!("{home}/data\0"));
        self.rule(MessageType::SetPerms, &format!("{home}\0n0\0r{number}\0"));
        self.rule(MessageType::SetPerms, &format!("{home}/data\0n{number}\0"));
        self.streams.insert(number, Stream::default());
    }

    fn path(&mut self) -> String {
        let number = self.random.below(u64::from(DOMAINS) + 1);
        let base = match self.random.below(12) {
            0..4 => "data".to_string(),
            4 => format!("/local/domain/{number}/data"),
            5 => format!("/local/domain/{number}"),
            6 => "/private".to_string(),
            7 => format!("/private/{SECRET}"),
            8 => "/".to_string(),
            9 => "@releaseDomain".to_string(),
            10 => "@introduceDomain/3".to_string(),
            _ => "/open".to_string(),
        };
        let mut path = base;
        for _ in 0..self.random.below(4) {
            path += "/";
            path += self.random.of(&["a", "b", "c", "", "-_@9", "x y"]);
        }
        if self.random.below(60) == 0 { path.repeat(300) } else { path }
    }

    fn payload(&mut self, kind: u32) -> Vec<u8> {
        let path = self.path();
        let number = self.random.below(u64::from(DOMAINS) + 2);
        let access = self.random.of(&['n', 'r', 'w', 'b', 'q']);
        let mut payload = match MessageType::from_number(kind.into()) {
            Some(MessageType::Write) => {
                let length = self.random.of(&[0, 1, 9, 100, 2048, 2049, 3000]);
                [path.as_bytes(), &[0], &vec![b'v'; length]].concat()
            }
            Some(MessageType::SetPerms) => {
                let more: String = (0..self.random.below(8)).map(|n| format!("r{n}\0")).collect();
                format!("{path}\0{access}{number}\0{more}").into_bytes()
            }
            Some(MessageType::Watch | MessageType::Unwatch) => {
                let token = self.random.below(4);
                let depth = self.random.of(&["", "", "1\0", "0\0", "x\0"]);
                format!("{path}\0{token}\0{depth}").into_bytes()
            }
            Some(MessageType::TransactionStart) => vec![0],
            Some(MessageType::TransactionEnd) => {
                self.random.of(&[&b"T\0"[..], b"F\0", b"T\0", b"X\0"]).to_vec()
            }
            Some(MessageType::DirectoryPart) => format!("{path}\0{}\0", self.random.below(40)).into_bytes(),
            Some(MessageType::GetDomainPath) => format!("{number}\0").into_bytes(),
            _ => format!("{path}\0").into_bytes(),
        };
        // Some of it is spoilt.
        if self.random.below(12) == 0 && !payload.is_empty() {
            let at = self.random.below(payload.len() as u64) as usize;
            match self.random.below(3) {
                0 => payload[at] = self.random.next() as u8,
                1 => payload.truncate(at),
                _ => payload.insert(at, 0),
            }
        }
        payload.truncate(PAYLOAD_MAX);
        payload
    }

    fn send(&mut self, number: u16) {
        let any = self.random.below(TYPES) as u32;
        let kind = self.random.of(&[
            MessageType::Write.number(),
            MessageType::Mkdir.number(),
            MessageType::Rm.number(),
            MessageType::Watch.number(),
            any,
        ]);
        let payload = self.payload(kind);
        let tx_id = if self.random.below(3) == 0 { self.random.below(4) as u32 } else { 0 };
        let stream = self.streams.get_mut(&number).unwrap();
        stream.next_id += 1;
        let header = MessageHeader { kind, req_id: stream.next_id, tx_id, len: 0 };
        if kind == MessageType::Watch.number() {
            let path = payload.split(|byte| *byte == 0).next().unwrap_or_default();
            stream.watched.push(String::from_utf8_lossy(path).into_owned());
        }
        stream.bytes.extend(encode(header, &payload));
        if self.random.below(200) == 0 {
            // A length that cannot be.
            let mut bytes = encode(MessageHeader { kind, ..MessageHeader::default() }, &[]);
            bytes.splice(12..16, (PAYLOAD_MAX as u32 + 1 + self.random.below(9) as u32).to_le_bytes());
            self.streams.get_mut(&number).unwrap().bytes.extend(bytes);
        }
    }

    /// Lets the store read a domain's ring, in pieces.
    fn serve(&mut self, number: u16) {
        let client = ClientId::of(DomId::new(number));
        while self.store.may_request(client) {
            let piece = 1 + self.random.below(300) as usize;
            let stream = self.streams.get_mut(&number).unwrap();
            let Ok(wanted) = stream.decoder.wanted() else { return self.reconnect(number) };
            let count = wanted.min(piece).min(stream.bytes.len());
            if count == 0 {
                return;
            }
            let bytes: Vec<u8> = stream.bytes.drain(..count).collect();
            let Ok(message) = stream.decoder.feed(&bytes) else { return self.reconnect(number) };
            if let Some((header, payload)) = message {
                if self.random.below(8) == 0 {
                    self.lose(client, header, &payload);
                }
                assert_eq!(self.store.request(client, header, &payload, self.now_ns), None);
                if self.store.has_output(client) {
                    let stream = self.streams.get_mut(&number).unwrap();
                    stream.open.insert(header.req_id, header.kind);
                }
            }
        }
    }

    /// A request on a copy of the store, that panics at one of the places where it has changed something, if it gets so far.
    fn lose(&mut self, client: ClientId, header: MessageHeader, payload: &[u8]) {
        let before = format!("{:?}", self.store);
        let mut copy = self.store.clone();
        LEFT.set(self.random.below(6));
        copy.set_probe(Some(probe));
        let now_ns = self.now_ns;
        let work = AssertUnwindSafe(move || copy.request(client, header, payload, now_ns));
        self.lost += u64::from(catch_unwind(work).is_err());
        assert_eq!(format!("{:?}", self.store), before);
    }

    fn reconnect(&mut self, number: u16) {
        self.store.reset(ClientId::of(DomId::new(number)));
        self.streams.insert(number, Stream::default());
    }

    /// Takes what was sent to a domain, or a part of it.
    fn take(&mut self, number: u16) {
        let client = ClientId::of(DomId::new(number));
        for _ in 0..self.random.of(&[0, 1, 3, 1000]) {
            let Some(bytes) = self.store.next_output(client) else { return };
            assert!(bytes.len() <= HEADER + PAYLOAD_MAX);
            let text = String::from_utf8_lossy(&bytes[HEADER..]);
            let (header, _) = Decoder::default().feed(&bytes).unwrap().expect("a whole message");
            if header.kind == MessageType::WatchEvent.number() {
                // A client's own watch on a path that it may not read fires once when it is made, and says what it said itself.
                // What follows the path is its token, any word of its own.
                let path = text.split('\0').next().unwrap_or_default();
                let own = self.streams[&number].watched.iter().any(|watched| watched == path);
                assert!(own || !path.contains(SECRET), "told of {text:?}");
                continue;
            }
            assert!(!text.contains(SECRET), "read {text:?}");
            let asked = self.streams.get_mut(&number).unwrap().open.remove(&header.req_id);
            let kind = asked.expect("a reply to nothing, or a second one");
            assert!(header.kind == kind || header.kind == MessageType::Error.number());
        }
    }

    fn step(&mut self) {
        self.now_ns += self.random.of(&[0, 1_000, 30_000_000_000]);
        let number = 1 + self.random.below(DOMAINS.into()) as u16;
        if !self.streams.contains_key(&number) {
            return self.come(number);
        }
        match self.random.below(40) {
            0 => {
                self.store.remove_domain(DomId::new(number), self.now_ns);
                self.streams.remove(&number);
            }
            1 => self.reconnect(number),
            2 => self.store.shut_down(DomId::new(number), self.now_ns),
            3 => drop(self.store.expire(self.now_ns)),
            4 => self.rule(MessageType::Rm, &format!("/local/domain/{number}/data\0")),
            5 => self.rule(MessageType::SetPerms, &format!("/open\0b{number}\0")),
            6 => {
                let full = self.random.below(4) == 0;
                self.store.set_full(full);
            }
            7..12 => self.take(number),
            12..18 => self.serve(number),
            _ => self.send(number),
        }
        drop(self.store.take_woken());
    }
}

fn run(seed: u64) -> u64 {
    let mut world = World::new(seed);
    for step in 0..STEPS {
        world.step();
        if step % 100 == 0 {
            assert_eq!(world.store.check(), None);
        }
    }
    for number in 1..=DOMAINS {
        world.store.remove_domain(DomId::new(number), world.now_ns);
    }
    assert_eq!(world.store.check(), None);
    // What the control domain ruled is there still.
    let header = MessageHeader { kind: MessageType::Read.number(), ..MessageHeader::default() };
    let kept = world.store.ask(world.control, header, format!("/private/{SECRET}\0").as_bytes(), 0);
    assert_eq!(kept, Ok(SECRET.into()));
    world.lost
}

/// Says how to repeat a run that panics.
struct Note(u64);

impl Drop for Note {
    fn drop(&mut self) {
        eprintln!("repeat with FUZZ_SEED={}", self.0);
    }
}

fn said(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn hostile_clients_break_nothing() {
    if let Some(seed) = said("FUZZ_SEED") {
        run(seed);
        return;
    }
    let mut lost = 0;
    for seed in 0..said("FUZZ_RUNS").unwrap_or(RUNS) {
        let repeat = Note(seed);
        lost += run(seed);
        core::mem::forget(repeat);
    }
    println!("{lost} requests panicked");
    assert!(lost > 100);
}

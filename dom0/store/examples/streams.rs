//! Makes the files of `tests/streams` anew: see the README there.
//!
//! `random SEED COUNT` prints requests; `record SOCKET [RINGS]` reads lines, has a running xenstored answer the requests among them, and
//! prints all of it.

use fastrand::Rng;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType as M, RING_SIZE, XenstoreInterface, piece};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use xenstore::trace::{Direction, Message};
use xenstore::wire::{Decoder, encode};

/// How long nothing must come after a reply until it counts as all.
const QUIET: Duration = Duration::from_millis(5);
/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["random", seed, count] => random(seed.parse()?, count.parse()?),
        ["record", socket] => record(socket, None)?,
        ["record", socket, rings] => record(socket, Some(rings.into()))?,
        _ => return Err("use it as `random SEED COUNT` or `record SOCKET [RINGS]`".into()),
    }
    Ok(())
}

/// How a client reaches xenstored.
enum Connection {
    /// As the control domain.
    Socket(UnixStream),
    /// A domain's ring, a file that xenstored has mapped.
    Ring(File),
}

impl Connection {
    fn ring(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(4096)?;
        Ok(Self::Ring(file))
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Socket(socket) => socket.write_all(bytes),
            Self::Ring(file) => {
                let base = offset_of!(XenstoreInterface, req);
                let (cons, prod) =
                    (offset_of!(XenstoreInterface, req_cons), offset_of!(XenstoreInterface, req_prod));
                let mut rest = bytes;
                while !rest.is_empty() {
                    let at = index(file, prod)?;
                    let room = RING_SIZE - at.wrapping_sub(index(file, cons)?) as usize;
                    let (now, later) = rest.split_at(room.min(rest.len()));
                    let (start, first) = piece(at, now.len(), RING_SIZE);
                    file.write_all_at(&now[..first], (base + start) as u64)?;
                    file.write_all_at(&now[first..], base as u64)?;
                    file.write_all_at(&at.wrapping_add(now.len() as u32).to_le_bytes(), prod as u64)?;
                    rest = later;
                }
                Ok(())
            }
        }
    }

    /// What has come.
    fn receive(&mut self) -> io::Result<Vec<u8>> {
        match self {
            Self::Socket(socket) => {
                let mut bytes = vec![0; 8192];
                match socket.read(&mut bytes) {
                    Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
                    Ok(count) => Ok(bytes[..count].to_vec()),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Vec::new()),
                    Err(error) => Err(error),
                }
            }
            Self::Ring(file) => {
                let base = offset_of!(XenstoreInterface, rsp);
                let (cons, prod) =
                    (offset_of!(XenstoreInterface, rsp_cons), offset_of!(XenstoreInterface, rsp_prod));
                let at = index(file, cons)?;
                let mut bytes = vec![0; index(file, prod)?.wrapping_sub(at) as usize];
                let (start, first) = piece(at, bytes.len(), RING_SIZE);
                let (head, tail) = bytes.split_at_mut(first);
                file.read_exact_at(head, (base + start) as u64)?;
                file.read_exact_at(tail, base as u64)?;
                file.write_all_at(&at.wrapping_add(bytes.len() as u32).to_le_bytes(), cons as u64)?;
                Ok(bytes)
            }
        }
    }
}

fn index(file: &File, offset: usize) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, offset as u64)?;
    Ok(u32::from_le_bytes(bytes))
}

struct Client {
    connection: Connection,
    decoder: Decoder,
}

impl Client {
    fn new(connection: Connection) -> Self {
        Self { connection, decoder: Decoder::default() }
    }

    /// Messages that have come whole.
    fn messages(&mut self, domain: DomId) -> Result<Vec<Message>, Box<dyn Error>> {
        let bytes = self.connection.receive()?;
        let (mut rest, mut messages) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.decoder.wanted()?.min(rest.len()));
            rest = later;
            if let Some((header, payload)) = self.decoder.feed(now)? {
                messages.push(Message {
                    domain,
                    direction: Direction::Out,
                    header,
                    payload,
                    pieces: Vec::new(),
                });
            }
        }
        Ok(messages)
    }
}

fn record(socket: &str, rings: Option<PathBuf>) -> Result<(), Box<dyn Error>> {
    let control = UnixStream::connect(socket)?;
    control.set_nonblocking(true)?;
    let mut clients = BTreeMap::from([(DomId::ZERO, Client::new(Connection::Socket(control)))]);
    for line in io::stdin().lines() {
        let line = line?;
        if line.is_empty() || line.starts_with('#') {
            println!("{line}");
            continue;
        }
        let message: Message = line.parse().map_err(|error| format!("{line}: {error}"))?;
        if message.direction == Direction::Out {
            continue;
        }
        println!("{line}");
        if message.header.kind == M::Introduce.number()
            && let Some(rings) = &rings
        {
            let number: u16 =
                String::from_utf8_lossy(&message.payload).split('\0').next().unwrap_or("").parse()?;
            clients
                .entry(DomId::new(number))
                .or_insert(Client::new(Connection::ring(rings.join(format!("ring-{number}")))?));
        }
        let client = clients
            .get_mut(&message.domain)
            .ok_or("a domain that is not introduced, or no folder for its ring")?;
        client.connection.send(&encode(message.header, &message.payload))?;
        let (asked, mut answered, mut last) = (Instant::now(), false, Instant::now());
        while !answered || last.elapsed() < QUIET {
            if asked.elapsed() > PATIENCE {
                return Err(format!("no reply to {line}").into());
            }
            for (&domain, client) in &mut clients {
                for sent in client.messages(domain)? {
                    last = Instant::now();
                    answered |= domain == message.domain && sent.header.kind != M::WatchEvent.number();
                    println!("{sent}");
                }
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}

/// Requests of the control domain and of two domains, good ones and bad ones, about few nodes so that they meet.
fn random(seed: u64, count: usize) {
    let mut rng = Rng::with_seed(seed);
    let domains = [DomId::ZERO, DomId::new(5), DomId::new(6)];
    let mut id = 0;
    let mut print = |domain: DomId, kind: u32, tx_id: u32, payload: &[u8]| {
        id += 1;
        let header = MessageHeader { kind, req_id: id, tx_id, len: payload.len() as u32 };
        let payload = payload.to_vec();
        println!("{}", Message { domain, direction: Direction::In, header, payload, pieces: Vec::new() });
    };
    for domain in &domains[1..] {
        let home = format!("/local/domain/{domain}");
        print(DomId::ZERO, M::Introduce.number(), 0, format!("{domain}\01\01\0").as_bytes());
        for (node, list) in
            [(home.clone(), format!("n0\0r{domain}\0")), (format!("{home}/data"), format!("n{domain}\0"))]
        {
            print(DomId::ZERO, M::Mkdir.number(), 0, format!("{node}\0").as_bytes());
            print(DomId::ZERO, M::SetPerms.number(), 0, format!("{node}\0{list}").as_bytes());
        }
    }
    // Who has a transaction open, and its number if it began; meanwhile nobody else does anything: whose transactions fail is another matter.
    let mut open = None;
    let mut begun = [0; 3];
    for _ in 0..count {
        let who = open.map_or_else(|| rng.usize(0..3), |(who, _)| who);
        let tops = [
            "data/a",
            "data/a/b",
            "data/b",
            "/local/domain/5/data/a",
            "/local/domain/5/data/a/b/c",
            "/local/domain/6/data/c",
            "/tool/x",
        ];
        let mut path = tops[rng.usize(0..tops.len())].to_string();
        if rng.u8(0..12) == 0 {
            path += ["/", "//x", "/\u{7f}", "/@"][rng.usize(0..4)];
        }
        let value = ["", "1", "two", "a\0b", "\u{ff}"][rng.usize(0..5)];
        let token = ["t", "u", ""][rng.usize(0..3)];
        let mut tx_id = open.map_or(0, |(_, id)| id);
        let (kind, payload) = match rng.u8(0..24) {
            0..=5 => (M::Write, format!("{path}\0{value}")),
            6..=8 => (M::Read, format!("{path}\0")),
            9 | 10 => (M::Directory, format!("{path}\0")),
            11 => (M::Mkdir, format!("{path}\0")),
            12 => (M::Rm, format!("{path}\0")),
            13 | 14 => (M::GetPerms, format!("{path}\0")),
            15 => {
                let lists = ["n5\0", "n6\0r5\0", "n5\0b6\0", "w5\0r6\0", "n6\0r5\0w0\0", "n0", "", "x5\0"];
                (M::SetPerms, format!("{path}\0{}", lists[rng.usize(0..lists.len())]))
            }
            16 | 17 => (M::Watch, format!("{path}\0{token}\0")),
            18 => (M::Unwatch, format!("{path}\0{token}\0")),
            19 if open.is_none() => {
                begun[who] += 1;
                open = Some((who, begun[who]));
                (M::TransactionStart, "\0".into())
            }
            19 | 20 => {
                open = None;
                (M::TransactionEnd, ["T\0", "T\0", "F\0"][rng.usize(0..3)].into())
            }
            21 if open.is_none() && rng.u8(0..10) == 0 => (M::ResetWatches, "\0".into()),
            22 if open.is_none() => {
                tx_id = 77;
                (M::Write, format!("{path}\0{value}"))
            }
            23 => (M::GetDomainPath, "5\0".into()),
            _ => (M::Directory, format!("{path}\0")),
        };
        print(domains[who], kind.number(), tx_id, payload.as_bytes());
    }
}

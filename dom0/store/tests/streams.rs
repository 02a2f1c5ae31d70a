//! Streams that were recorded, of front ends that are not ours and of a store that is not ours: see `streams/README.md`.
//!
//! Each is replayed in the pieces in which it came, byte by byte, and with as much at once as can be. Whoever was sent messages must be
//! sent the same, byte for byte and in the same order.

use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::MessageType;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use xenstore::trace::{Direction, Message};
use xenstore::wire::{Decoder, encode};
use xenstore::{Action, ClientId, Store};

/// How a domain's bytes arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// As they did.
    Recorded,
    /// One by one.
    Bytes,
    /// All at once, as far as nobody else did something between them.
    AtOnce,
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// This store, when the stream was recorded.
    Ours,
    /// Xen's xenstored.
    Xenstored,
}

/// A store with clients that send bytes, served as dom0 serves its rings.
struct Replay<'a> {
    path: &'a Path,
    source: Source,
    cut: Cut,
    store: Store,
    /// Domain 0: one of the control domain's parts.
    control: ClientId,
    decoders: BTreeMap<DomId, Decoder>,
    /// What each is yet to be sent before somebody else does something.
    expected: BTreeMap<DomId, VecDeque<Message>>,
    compared: usize,
    /// Events come from a transaction, whose nodes xenstored tells of in the order in which it first looked at them, we in that in which
    /// they were changed; or from a removal, whose nodes it has in the order in which they were made, we in that of their names.
    any_order: bool,
}

impl<'a> Replay<'a> {
    fn new(path: &'a Path, source: Source, cut: Cut) -> Self {
        let mut store = Store::new();
        let control = store.connect();
        let (decoders, expected) = Default::default();
        Self { path, source, cut, store, control, decoders, expected, compared: 0, any_order: false }
    }

    fn client(&self, domain: DomId) -> ClientId {
        if domain == DomId::ZERO { self.control } else { ClientId::of(domain) }
    }

    /// Bytes arrive from a domain, and are served as far as they go.
    fn arrive(&mut self, sender: DomId, mut bytes: &[u8]) {
        let client = self.client(sender);
        while !bytes.is_empty() {
            let decoder = self.decoders.entry(sender).or_default();
            let (now, later) = bytes.split_at(decoder.wanted().unwrap().min(bytes.len()));
            bytes = later;
            let Some((header, payload)) = decoder.feed(now).unwrap() else { continue };
            // What waits is sent before the next request is served.
            self.send(sender);
            if let Some(Action::Introduce { client, header, domain, .. }) =
                self.store.request(client, header, &payload, 0)
            {
                if self.store.usage(domain).is_none() {
                    self.store.add_domain(domain, 0);
                }
                self.store.introduced(domain, 0).unwrap();
                self.store.answer(client, header, Ok(b"OK\0".to_vec()));
            }
        }
    }

    /// Sends a domain what waits for it, as far as it was sent something by then.
    fn send(&mut self, domain: DomId) {
        let client = self.client(domain);
        while let Some(expected) = self.expected.get_mut(&domain).filter(|expected| !expected.is_empty()) {
            let Some(bytes) = self.store.next_output(client) else { return };
            let (header, payload) = Decoder::default().feed(&bytes).unwrap().expect("a whole message");
            let is = Message { header, payload, ..expected[0].clone() };
            let same = |was: &Message| match self.source {
                Source::Ours => is == *was,
                Source::Xenstored => comparable(&is) == comparable(was),
            };
            let events =
                expected.iter().take_while(|was| was.header.kind == MessageType::WatchEvent.number());
            let candidates = if self.any_order { events.count().max(1) } else { 1 };
            let Some(at) = expected.iter().take(candidates).position(same) else {
                let (path, cut, was) = (self.path.display(), self.cut, &expected[0]);
                panic!("{path}, {cut:?}, {} sent:\nis  {is}\nwas {was}", self.compared);
            };
            expected.remove(at);
            self.compared += 1;
        }
    }

    /// Requests of one domain, and all that was sent to anybody after them.
    fn segment(&mut self, segment: &[Message]) {
        let several = [MessageType::TransactionEnd, MessageType::Rm].map(MessageType::number);
        let has_several = segment.iter().any(|message| several.contains(&message.header.kind));
        self.any_order = self.source == Source::Xenstored && has_several;
        let (mut bytes, mut cuts) = (Vec::new(), Vec::new());
        for message in segment {
            if message.direction == Direction::Out {
                self.expected.entry(message.domain).or_default().push_back(message.clone());
                continue;
            }
            let mut at = bytes.len();
            bytes.extend(encode(message.header, &message.payload));
            for &piece in message.pieces.split_last().map_or(&[][..], |(_, pieces)| pieces) {
                at += usize::from(piece);
                cuts.push(at);
            }
            cuts.push(bytes.len());
        }
        match self.cut {
            Cut::Recorded => {}
            Cut::Bytes => cuts = (1..=bytes.len()).collect(),
            Cut::AtOnce => cuts = vec![bytes.len()],
        }
        let mut from = 0;
        for to in cuts {
            self.arrive(segment[0].domain, &bytes[from..to]);
            from = to;
        }
        for domain in self.expected.keys().copied().collect::<Vec<_>>() {
            self.send(domain);
            let (path, cut) = (self.path.display(), self.cut);
            if let Some(was) = self.expected[&domain].front() {
                panic!("{path}, {cut:?}, {} sent: not sent: {was}", self.compared);
            }
            // Of xenstored all was recorded; a front end may not have taken all by then.
            if self.source == Source::Xenstored {
                let more = self.store.next_output(self.client(domain));
                let more = more.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
                assert_eq!(more, None, "{path}, {cut:?}, {} sent: to domain {domain}", self.compared);
            }
        }
    }

    fn run(mut self, messages: &[Message]) -> usize {
        let mut rest = messages;
        while let Some(first) = rest.first() {
            let mut whole = self.cut != Cut::AtOnce;
            let end = rest.iter().skip(1).position(|message| {
                // When others were sent something in between, they took it in between, too.
                whole |= message.domain != first.domain;
                whole && message.direction == Direction::In
            });
            let (segment, later) = rest.split_at(end.map_or(rest.len(), |at| at + 1));
            self.segment(segment);
            rest = later;
        }
        assert_eq!(self.store.check(), None);
        self.compared
    }
}

/// A message without what may differ: xenstored lists children as they were made, we by their names; and the number with which a part of
/// such a list begins says only whether the list has changed since.
fn comparable(message: &Message) -> Message {
    let mut message = message.clone();
    let kind = MessageType::from_number(message.header.kind.into());
    if let Some(MessageType::Directory | MessageType::DirectoryPart) = kind {
        let mut names: Vec<&[u8]> = message.payload.split_inclusive(|&byte| byte == 0).collect();
        if kind == Some(MessageType::DirectoryPart) {
            names.remove(0);
        }
        names.sort_unstable();
        message.payload = names.concat();
        message.header.len = 0;
    }
    message
}

fn read(path: &Path) -> Vec<Message> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
    let parse = |(at, line): (usize, &str)| {
        line.parse().unwrap_or_else(|error| panic!("{}:{}: {error}", path.display(), at + 1))
    };
    lines.map(parse).collect()
}

/// Replays all files of a folder.
fn replay(folder: &str, source: Source) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    assert!(!paths.is_empty());
    for path in paths {
        let messages = read(&path);
        let sent = messages.iter().filter(|message| message.direction == Direction::Out).count();
        for cut in [Cut::Recorded, Cut::Bytes, Cut::AtOnce] {
            let compared = Replay::new(&path, source, cut).run(&messages);
            assert!(compared == sent && sent > 15, "{}: {compared} of {sent}", path.display());
        }
    }
}

#[test]
fn front_ends_that_are_not_ours_are_answered_as_when_they_ran() {
    replay("streams", Source::Ours);
}

#[test]
fn what_xenstored_answers_is_answered_here() {
    replay("streams/xenstored", Source::Xenstored);
}

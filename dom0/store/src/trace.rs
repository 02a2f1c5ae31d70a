//! Traces: what a domain asks the store and gets from it, as lines of text that say every byte.
//!
//! A line is `DOMAIN > TYPE REQUEST TRANSACTION "PAYLOAD" PIECES` for a request, and the same with `<` for a reply or an event:
//!
//! ```text
//! 3 > XS_READ 7 0 "domid\0" 16+6
//! 3 < XS_READ 7 0 "3"
//! 0 > XS_WRITE 0 0 "/local/domain/3/control/shutdown\0poweroff"
//! 3 < XS_WATCH_EVENT 0 0 "control/shutdown\0token\0"
//! ```
//!
//! TYPE is the name in Xen's public/io/xs_wire.h, or a number that it has no name for. The payload is as in C and Rust (`\0` is one zero
//! byte whatever follows). PIECES are the lengths in which a request came, when that is known: the store itself asks for a header, then
//! for the rest, so shorter pieces are the domain's. Domain 0 stands for all of the control domain's own parts.
//!
//! A connection that begins anew, or ends because of a message that cannot be, is not said.
//!
//! A [`Trace`] begins with requests that make the nodes that the domain finds, so it can be replayed against any store.

use crate::tree::Node;
use crate::wire::{Decoder, HEADER};
use crate::{ClientId, Path, Store};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{self, Display, Write};
use core::str::FromStr;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType};

/// Bytes that a trace keeps until they are taken; a line's text is up to four times as long.
const KEPT_MAX: usize = 256 << 10;
/// Where back ends have their nodes, by class and then by domain.
const BACK_ENDS: &str = "/local/domain/0/backend";

/// Which way a message went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the store: a request.
    In,
    /// From it: a reply or an event.
    Out,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whose it is.
    pub domain: DomId,
    /// Which way it went.
    pub direction: Direction,
    /// Its header; `len` is the payload's length.
    pub header: MessageHeader,
    /// What followed.
    pub payload: Vec<u8>,
    /// The lengths in which it came, header included; none when that is not known.
    pub pieces: Vec<u16>,
}

impl Message {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.payload.len() + size_of_val(self.pieces.as_slice())
    }
}

impl Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, direction, header, payload, pieces } = self;
        let way = if *direction == Direction::In { '>' } else { '<' };
        write!(f, "{domain} {way} ")?;
        match MessageType::from_number(header.kind.into()) {
            Some(kind) => f.write_str(kind.name())?,
            None => write!(f, "{}", header.kind)?,
        }
        write!(f, " {} {} \"", header.req_id, header.tx_id)?;
        for &byte in payload {
            match byte {
                0 => f.write_str("\\0")?,
                b'\'' => f.write_char('\'')?,
                _ => write!(f, "{}", byte.escape_ascii())?,
            }
        }
        f.write_char('"')?;
        pieces.iter().enumerate().try_for_each(|(at, piece)| {
            f.write_char(if at == 0 { ' ' } else { '+' })?;
            write!(f, "{piece}")
        })
    }
}

/// A line that is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAMessage;

impl Display for NotAMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not `DOMAIN >|< TYPE REQUEST TRANSACTION \"PAYLOAD\" [PIECES]`, or its pieces are not as long as it")
    }
}

impl core::error::Error for NotAMessage {}

impl FromStr for Message {
    type Err = NotAMessage;

    fn from_str(line: &str) -> Result<Self, NotAMessage> {
        fn number<T: FromStr>(text: &str) -> Result<T, NotAMessage> {
            text.parse().map_err(|_| NotAMessage)
        }
        let (head, rest) = line.split_once('"').ok_or(NotAMessage)?;
        let (payload, pieces) = unescape(rest).ok_or(NotAMessage)?;
        let words: Vec<&str> = head.split_whitespace().collect();
        let [domain, way, kind, req_id, tx_id] = words.as_slice() else { return Err(NotAMessage) };
        let named = MessageType::ALL.iter().find(|known| known.name() == *kind);
        let message = Self {
            domain: DomId::new(number(domain)?),
            direction: match *way {
                ">" => Direction::In,
                "<" => Direction::Out,
                _ => return Err(NotAMessage),
            },
            header: MessageHeader {
                kind: named.map_or_else(|| number(kind), |known| Ok(known.number()))?,
                req_id: number(req_id)?,
                tx_id: number(tx_id)?,
                len: u32::try_from(payload.len()).map_err(|_| NotAMessage)?,
            },
            payload,
            pieces: match pieces.trim() {
                "" => Vec::new(),
                pieces => pieces.split('+').map(number).collect::<Result<_, _>>()?,
            },
        };
        let length: usize = message.pieces.iter().map(|&piece| usize::from(piece)).sum();
        if message.pieces.is_empty() || length == HEADER + message.payload.len() {
            Ok(message)
        } else {
            Err(NotAMessage)
        }
    }
}

/// What stands before the next `"`, and what behind it.
fn unescape(text: &str) -> Option<(Vec<u8>, &str)> {
    let mut bytes = Vec::new();
    let mut rest = text.chars();
    loop {
        let next = match rest.next()? {
            '"' => return Some((bytes, rest.as_str())),
            '\\' => match rest.next()? {
                '0' => 0,
                't' => b'\t',
                'n' => b'\n',
                'r' => b'\r',
                'x' => (rest.next()?.to_digit(16)? << 4 | rest.next()?.to_digit(16)?) as u8,
                quoted @ ('\\' | '"') => quoted as u8,
                _ => return None,
            },
            plain => u8::try_from(plain).ok().filter(u8::is_ascii)?,
        };
        bytes.push(next);
    }
}

/// The messages of one domain, and what the control domain changes of its nodes, as far as there is room for them.
#[derive(Clone, Debug)]
pub struct Trace {
    domain: DomId,
    ended: bool,
    kept: Vec<Message>,
    bytes: usize,
    /// Messages for which there was no room. None is kept behind one that is not.
    left_out: u64,
}

impl Trace {
    /// A trace of a domain's messages. It begins with requests of the control domain's that make what is there for the domain: its
    /// home, its back ends' nodes, and `more` with what is below.
    #[must_use]
    pub fn new(store: &Store, domain: DomId, more: &Path) -> Self {
        let mut trace = Self { domain, ended: false, kept: Vec::new(), bytes: 0, left_out: 0 };
        // Which frame and port it is does not matter to a store.
        trace.done(MessageType::Introduce, format!("{domain}\x001\x001\0").into_bytes());
        let classes = Path::absolute(BACK_ENDS).ok();
        let classes = classes.iter().flat_map(|path| {
            let names = store.node(path).into_iter().flat_map(Node::names);
            names.map(|class| path.child(class).child(&format!("{domain}")))
        });
        for top in [Path::home(domain), more.clone()].into_iter().chain(classes) {
            if let Some(node) = store.node(&top) {
                trace.made(&top, node, None);
            }
        }
        trace
    }

    /// Keeps the requests that make a node and all below it. Paths are not deep, so this may recurse.
    fn made(&mut self, path: &Path, node: &Node, above: Option<&Node>) {
        let text = path.as_str();
        if node.value.is_empty() {
            self.done(MessageType::Mkdir, format!("{text}\0").into_bytes());
        } else {
            self.done(MessageType::Write, [text.as_bytes(), b"\0", &node.value].concat());
        }
        if above.is_none_or(|above| above.permissions != node.permissions) {
            let list = node.permissions.to_wire();
            self.done(MessageType::SetPerms, [text.as_bytes(), b"\0", &list].concat());
        }
        for (name, child) in node.children() {
            self.made(&path.child(name), child, Some(node));
        }
    }

    /// Whether it is this client's messages that are kept.
    #[must_use]
    pub fn follows(&self, client: ClientId) -> bool {
        !self.ended && client.domain() == Some(self.domain)
    }

    /// A request has come.
    pub fn came(&mut self, header: MessageHeader, payload: &[u8], pieces: Vec<u16>) {
        self.keep(self.domain, Direction::In, header, payload.to_vec(), pieces);
    }

    /// A message goes to the domain.
    pub fn goes(&mut self, bytes: &[u8]) {
        if let Ok(Some((header, payload))) = Decoder::default().feed(bytes) {
            self.keep(self.domain, Direction::Out, header, payload, Vec::new());
        }
    }

    /// The control domain has made a request, which is kept when it changes what this trace began with.
    pub fn changed(&mut self, kind: MessageType, payload: &[u8]) {
        use MessageType::{Mkdir, Rm, SetPerms, Write};
        let path = payload.split(|&byte| byte == 0).next().and_then(|path| core::str::from_utf8(path).ok());
        if matches!(kind, Mkdir | Rm | SetPerms | Write) && path.is_some_and(|path| self.concerns(path)) {
            self.done(kind, payload.to_vec());
        }
    }

    fn concerns(&self, path: &str) -> bool {
        let below =
            |top: &str| path.strip_prefix(top).filter(|rest| rest.is_empty() || rest.starts_with('/'));
        let of_back_end = || below(BACK_ENDS)?.split('/').nth(2)?.parse().ok();
        !self.ended
            && (below(Path::home(self.domain).as_str()).is_some() || of_back_end() == Some(self.domain.get()))
    }

    /// The domain is gone; the next one of its number is another.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Takes what was kept, as text; there is room again then.
    #[must_use]
    pub fn take(&mut self) -> String {
        self.bytes = 0;
        let mut text = String::new();
        for message in core::mem::take(&mut self.kept) {
            text += &format!("{message}\n");
        }
        match core::mem::take(&mut self.left_out) {
            0 => text,
            count => text + &format!("# {count} messages left out: there was no room for them\n"),
        }
    }

    fn done(&mut self, kind: MessageType, payload: Vec<u8>) {
        let header = MessageHeader { kind: kind.number(), ..MessageHeader::default() };
        self.keep(DomId::ZERO, Direction::In, header, payload, Vec::new());
    }

    fn keep(
        &mut self,
        domain: DomId,
        direction: Direction,
        header: MessageHeader,
        payload: Vec<u8>,
        pieces: Vec<u16>,
    ) {
        let header = MessageHeader { len: payload.len() as u32, ..header };
        let message = Message { domain, direction, header, payload, pieces };
        let bytes = message.bytes();
        if self.left_out > 0 || self.bytes + bytes > KEPT_MAX {
            self.left_out += 1;
        } else {
            self.bytes += bytes;
            self.kept.push(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Direction, KEPT_MAX, Message, NotAMessage, Trace};
    use crate::{ClientId, NewNode, Path, Permission, Store};
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;
    use alloc::{format, vec};
    use hypercall_abi::DomId;
    use hypercall_abi::io::xenstore::{MessageHeader, MessageType};
    use proptest::prelude::*;

    fn message(payload: &[u8], pieces: &[u16]) -> Message {
        let header = MessageHeader { kind: 2, req_id: 7, tx_id: 1, len: payload.len() as u32 };
        let (domain, direction) = (DomId::new(3), Direction::In);
        Message { domain, direction, header, payload: payload.into(), pieces: pieces.into() }
    }

    #[test]
    fn a_line_says_every_byte() {
        let whole = message(b"a\x001 \"\\'\n\xff\x7f\0", &[16, 3, 8]);
        let line = r#"3 > XS_READ 7 1 "a\01 \"\\'\n\xff\x7f\0" 16+3+8"#;
        assert_eq!(whole.to_string(), line);
        assert_eq!(line.parse(), Ok(whole));
        let unknown =
            Message { header: MessageHeader { kind: 77, ..message(b"", &[]).header }, ..message(b"", &[]) };
        assert_eq!(unknown.to_string(), r#"3 > 77 7 1 """#);
        for bad in [
            "",
            "# a remark",
            r#"3 > XS_READ 7 1 "a"#,
            r#"3 > XS_READ 7 "a""#,
            r#"3 = XS_READ 7 1 "a""#,
            r#"65536 > XS_READ 7 1 "a""#,
            r#"3 > XS_REED 7 1 "a""#,
            r#"3 > XS_READ 7 1 "a" 16"#,
            r#"3 > XS_READ 7 1 "a" 16+2"#,
            r#"3 > XS_READ 7 1 "\q""#,
            r#"3 > XS_READ 7 1 "\x4""#,
            r#"3 > XS_READ 7 1 "ä""#,
        ] {
            assert_eq!(bad.parse::<Message>(), Err(NotAMessage), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn lines_are_exact(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            (kind, req_id, tx_id) in (0u32..30, any::<u32>(), any::<u32>()),
            out in any::<bool>(),
            cut in 0u16..16,
        ) {
            let header = MessageHeader { kind, req_id, tx_id, len: payload.len() as u32 };
            let pieces = if cut == 0 { vec![] } else { vec![cut, 16 - cut + payload.len() as u16] };
            let direction = if out { Direction::Out } else { Direction::In };
            let message = Message { domain: DomId::new(kind as u16), direction, header, payload, pieces };
            let line = message.to_string();
            prop_assert!(line.bytes().all(|byte| matches!(byte, b' '..=b'~')));
            prop_assert_eq!(line.parse(), Ok(message));
        }
    }

    /// A domain with a home, a back end's node and a node elsewhere.
    fn store() -> (Store, Path) {
        let mut store = Store::new();
        store.add_domain(DomId::new(3), 0);
        let readable = ["n0", "r3"].map(|text| Permission::parse(text.as_bytes()).unwrap());
        let own = [Permission::parse(b"n3").unwrap()];
        let node = |below, value, permissions| NewNode { below, value, permissions };
        let home = [
            node("", &b""[..], Some(&readable[..])),
            node("name", b"three", None),
            node("data", b"", Some(&own)),
            node("data/deep", b"\xff", None),
        ];
        store.plant(&Path::home(DomId::new(3)), &home, 0).unwrap();
        let more = Path::absolute("/vm/three").unwrap();
        store.plant(&more, &[node("", b"", None)], 0).unwrap();
        for (path, value) in
            [("vbd/3/51712/online", &b"1"[..]), ("vbd/33/51712/online", b"2"), ("vif/4", b"")]
        {
            let path = Path::absolute(&format!("/local/domain/0/backend/{path}")).unwrap();
            store.set(path, value, None, 0).unwrap();
        }
        (store, more)
    }

    fn replay(text: &str) -> Store {
        let mut store = Store::new();
        let control = store.connect();
        for line in text.lines() {
            let message: Message = line.parse().unwrap();
            if message.header.kind == MessageType::Introduce.number() {
                store.add_domain(DomId::new(3), 0);
            } else {
                store.ask(control, message.header, &message.payload, 0).unwrap();
            }
        }
        store
    }

    #[test]
    fn it_begins_with_what_is_there() {
        let (store, more) = store();
        let text = Trace::new(&store, DomId::new(3), &more).take();
        let expected = r#"0 > XS_INTRODUCE 0 0 "3\01\01\0"
0 > XS_MKDIR 0 0 "/local/domain/3\0"
0 > XS_SET_PERMS 0 0 "/local/domain/3\0n0\0r3\0"
0 > XS_MKDIR 0 0 "/local/domain/3/data\0"
0 > XS_SET_PERMS 0 0 "/local/domain/3/data\0n3\0"
0 > XS_WRITE 0 0 "/local/domain/3/data/deep\0\xff"
0 > XS_WRITE 0 0 "/local/domain/3/name\0three"
0 > XS_MKDIR 0 0 "/vm/three\0"
0 > XS_SET_PERMS 0 0 "/vm/three\0n0\0"
0 > XS_MKDIR 0 0 "/local/domain/0/backend/vbd/3\0"
0 > XS_SET_PERMS 0 0 "/local/domain/0/backend/vbd/3\0n0\0"
0 > XS_MKDIR 0 0 "/local/domain/0/backend/vbd/3/51712\0"
0 > XS_WRITE 0 0 "/local/domain/0/backend/vbd/3/51712/online\01"
"#;
        assert_eq!(text, expected);
        assert_eq!(
            Trace::new(&replay(&text), DomId::new(3), &more).take(),
            text,
            "another store made from it"
        );
    }

    #[test]
    fn what_the_control_domain_changes_is_kept_where_it_concerns_the_domain() {
        let (store, more) = store();
        let mut trace = Trace::new(&store, DomId::new(3), &more);
        let _ = trace.take();
        let home = "/local/domain/3";
        for (kind, path, kept) in [
            (MessageType::Write, format!("{home}/control/shutdown"), true),
            (MessageType::Rm, home.into(), true),
            (MessageType::Read, format!("{home}/name"), false),
            (MessageType::Mkdir, format!("{home}3/x"), false),
            (MessageType::Mkdir, "/local/domain/0/backend/vif/3/0".into(), true),
            (MessageType::SetPerms, "/local/domain/0/backend/vif/33/0".into(), false),
            (MessageType::Mkdir, "/local/domain/0/backend".into(), false),
        ] {
            trace.changed(kind, format!("{path}\0").as_bytes());
            assert_eq!(!trace.take().is_empty(), kept, "{kind:?} {path}");
        }
        assert!(trace.follows(ClientId::of(DomId::new(3))) && !trace.follows(ClientId::of(DomId::new(4))));
        trace.end();
        trace.changed(MessageType::Write, format!("{home}/a\0").as_bytes());
        assert_eq!(trace.take(), "");
        assert!(!trace.follows(ClientId::of(DomId::new(3))));
    }

    #[test]
    fn it_keeps_what_there_is_room_for_and_says_what_not() {
        let (store, more) = store();
        let mut trace = Trace::new(&store, DomId::new(3), &more);
        let header = MessageHeader::default();
        for _ in 0..1000 {
            trace.came(header, &[0xff; 4000], vec![1; 16]);
            trace.came(header, b"", vec![]);
            assert!(trace.kept.iter().map(Message::bytes).sum::<usize>() <= KEPT_MAX);
        }
        let text = trace.take();
        let lines: Vec<&str> = text.lines().collect();
        let (last, kept) = lines.split_last().unwrap();
        let left_out: usize = last.strip_prefix("# ").unwrap().split_once(' ').unwrap().0.parse().unwrap();
        assert_eq!(left_out + kept.len(), 2000 + 13);
        // From the first that had no room, nothing: what is kept has no holes.
        assert!(kept.len() > 100 && kept.last().unwrap().ends_with(r#""""#), "{:?}", kept.last());
        trace.goes(&crate::wire::encode(header, b"OK\0"));
        assert_eq!(trace.take(), String::from("3 < XS_CONTROL 0 0 \"OK\\0\"\n"));
    }
}

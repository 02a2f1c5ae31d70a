//! The management channel: JSON lines over any stream of bytes, as a value without I/O (design record 0065).
//!
//! A line each way is one JSON object. Whoever is at the other end asks with
//!
//! ```json
//! {"id": 1, "command": "list --json"}
//! {"id": "b", "command": ["create", "demo", "memory=8M"]}
//! {"id": 3, "events": true}
//! ```
//! and is answered in whatever order the work ends:
//!
//! ```json
//! {"id":1,"ok":true,"value":{"system_time_ns":81246021,"domains":[]}}
//! {"id":"b","ok":false,"error":{"kind":"failed","message":"a guest called demo exists: …"},"lines":[]}
//! {"event":"domain-created","time_ns":91246021,"name":"demo","domain":3}
//! ```
//! Nothing that comes in is trusted, and nobody waits for a reader: lines are bounded, so are requests at work and what waits to
//! be read. Events that find no room are counted, and the count is told when there is room again.

use crate::words;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What speaks like this. Another number is another language.
pub const PROTOCOL: u32 = 1;
/// Longest line that is taken, bytes without its end.
pub const LONGEST_LINE: usize = 4096;
/// Longest id, bytes of its JSON.
const LONGEST_ID: usize = 64;
/// Requests at work at a time.
pub const MOST_REQUESTS: usize = 8;
/// Bytes that wait to be read, beyond which nothing more is taken in.
const PATIENCE: usize = 64 * 1024;
/// Bytes that wait to be read, beyond which events are dropped.
const ROOM_FOR_EVENTS: usize = 16 * 1024;

/// A request to carry out, and to answer with [`Channel::answer`].
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What its answer is known by.
    pub id: Id,
    /// Who asked: nobody else gets the answer.
    peer: u64,
    /// A command of the shell, by its words; at least one.
    pub words: Vec<String>,
}

/// What a request is told from others by: a number or a string, given back as it came.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Id(Value);

/// What a command came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// What it printed.
    pub output: String,
    /// The output was longer, and is cut.
    pub truncated: bool,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// The output is one value in JSON.
    pub structured: bool,
}

/// What happened, without being asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A domain was built; it runs unless it is kept paused.
    DomainCreated {
        /// Its name.
        name: String,
        /// Its number.
        domain: u16,
    },
    /// A domain ended by itself.
    DomainEnded {
        /// Its name.
        name: String,
        /// Its number.
        domain: u16,
        /// `poweroff`, `reboot`, `suspend`, `crash`, `watchdog` or `unknown`.
        reason: &'static str,
        /// What follows: `destroy`, `restart`, `preserve`, or `give-up` when restarts keep failing.
        action: &'static str,
    },
    /// Nothing of a domain is left.
    DomainGone {
        /// Its name.
        name: String,
        /// The number that it had.
        domain: u16,
    },
    /// A device was added to a domain.
    DeviceAttached {
        /// The domain's name.
        name: String,
        /// The device, as in `disk xvda`.
        device: String,
    },
    /// A device was taken from a domain.
    DeviceDetached {
        /// The domain's name.
        name: String,
        /// The device.
        device: String,
    },
    /// A back end gave up its connections and begins anew.
    BackendRestarted {
        /// The domain's name.
        name: String,
        /// The device.
        device: String,
        /// `asked` or `panic`.
        cause: &'static str,
    },
    /// A back end panicked too often and is not started again.
    BackendGivenUp {
        /// The domain's name.
        name: String,
        /// The device.
        device: String,
    },
    /// So many events before this one found no room.
    Dropped {
        /// How many.
        count: u64,
    },
}

#[derive(Serialize)]
struct Stamped<'a> {
    #[serde(flatten)]
    event: &'a Event,
    time_ns: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    id: Option<Value>,
    command: Option<Words>,
    events: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Line(String),
    List(Vec<String>),
}

#[derive(Serialize)]
struct Response<'a> {
    id: Option<&'a Id>,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lines: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "core::ops::Not::not")]
    truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure<'a>>,
}

#[derive(Serialize)]
struct Failure<'a> {
    kind: &'static str,
    message: &'a str,
}

/// One end of the channel.
#[derive(Debug, Default)]
pub struct Channel {
    /// A line that has not ended.
    line: Vec<u8>,
    /// That line is too long: it was answered, and the rest of it is not kept.
    skipping: bool,
    at_work: usize,
    events: bool,
    dropped: u64,
    output: VecDeque<u8>,
    /// How many were at the other end before.
    peer: u64,
}

impl Channel {
    /// Whether more input is to be fed: not while too much waits to be read.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.output.len() < PATIENCE
    }

    /// Somebody else is at the other end: nothing that the one before began or asked for is meant for them. What is at work goes on, and
    /// still counts.
    pub fn begin_anew(&mut self) {
        let (at_work, peer) = (self.at_work, self.peer + 1);
        *self = Self { at_work, peer, ..Self::default() };
    }

    /// Takes bytes, and gives the requests that are complete with them. What is wrong is answered at once.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Request> {
        let mut requests = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() < LONGEST_LINE {
                    self.line.push(byte);
                } else if !self.skipping {
                    self.skipping = true;
                    self.refuse(None, "too-long", &format!("a line has {LONGEST_LINE} bytes at most"));
                }
                continue;
            }
            let line = core::mem::take(&mut self.line);
            if !core::mem::take(&mut self.skipping) && !line.trim_ascii().is_empty() {
                requests.extend(self.line(&line));
            }
        }
        requests
    }

    fn line(&mut self, line: &[u8]) -> Option<Request> {
        let raw: Raw = match serde_json::from_slice(line) {
            Ok(raw) => raw,
            Err(error) => {
                self.refuse(None, "malformed", &error.to_string());
                return None;
            }
        };
        let id = match raw.id {
            Some(id @ (Value::Number(_) | Value::String(_))) if id.to_string().len() <= LONGEST_ID => Id(id),
            _ => {
                let message =
                    format!("a request has an `id`: a number, or a string of up to {LONGEST_ID} bytes");
                self.refuse(None, "malformed", &message);
                return None;
            }
        };
        let words = match (raw.command, raw.events) {
            (Some(Words::List(words)), None) => words,
            (Some(Words::Line(line)), None) => match words::parse(&line) {
                Ok(mut commands) if commands.len() < 2 => commands.pop().unwrap_or_default(),
                Ok(_) => {
                    self.refuse(Some(&id), "malformed", "one command each");
                    return None;
                }
                Err(error) => {
                    self.refuse(Some(&id), "malformed", &error.to_string());
                    return None;
                }
            },
            (None, Some(wanted)) => {
                self.events = wanted;
                self.respond(&Response::plain(Some(&id), true));
                return None;
            }
            _ => {
                self.refuse(Some(&id), "malformed", "a request has either `command` or `events`");
                return None;
            }
        };
        if words.is_empty() {
            self.refuse(Some(&id), "malformed", "the command is empty");
            return None;
        }
        if self.at_work >= MOST_REQUESTS {
            let message = format!("{MOST_REQUESTS} requests are at work: wait for an answer");
            self.refuse(Some(&id), "busy", &message);
            return None;
        }
        self.at_work += 1;
        Some(Request { id, peer: self.peer, words })
    }

    fn refuse(&mut self, id: Option<&Id>, kind: &'static str, message: &str) {
        let error = Some(Failure { kind, message });
        self.respond(&Response { error, ..Response::plain(id, false) });
    }

    /// Answers a request that [`Channel::feed`] gave.
    pub fn answer(&mut self, request: &Request, answer: &Answer) {
        self.at_work = self.at_work.saturating_sub(1);
        if request.peer != self.peer {
            return;
        }
        let value: Option<Value> =
            if answer.structured { serde_json::from_str(&answer.output).ok() } else { None };
        let lines = if value.is_none() { Some(answer.output.lines().collect()) } else { None };
        let error = answer.error.as_deref().map(|message| Failure { kind: "failed", message });
        let (ok, truncated) = (error.is_none(), answer.truncated);
        self.respond(&Response { id: Some(&request.id), ok, value, lines, truncated, error });
    }

    /// Tells of something, if events are wanted and there is room.
    pub fn event(&mut self, event: &Event, time_ns: u64) {
        if !self.events {
            return;
        }
        self.tell_dropped(time_ns);
        if self.output.len() >= ROOM_FOR_EVENTS || self.dropped > 0 {
            self.dropped += 1;
        } else {
            self.push(&Stamped { event, time_ns });
        }
    }

    /// Tells how many events were dropped, once there is room for more.
    fn tell_dropped(&mut self, time_ns: u64) {
        if self.dropped > 0 && self.output.len() < ROOM_FOR_EVENTS / 2 {
            let event = Event::Dropped { count: core::mem::take(&mut self.dropped) };
            self.push(&Stamped { event: &event, time_ns });
        }
    }

    fn respond(&mut self, response: &Response<'_>) {
        self.push(response);
    }

    fn push(&mut self, line: &impl Serialize) {
        // All of ours are plain structures with strings for keys: that cannot fail.
        if let Ok(line) = serde_json::to_vec(line) {
            self.output.extend(line);
            self.output.push_back(b'\n');
        }
    }

    /// Bytes to be sent next; empty when there are none.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        let (first, second) = self.output.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// `count` bytes of [`Channel::output`] were sent.
    pub fn sent(&mut self, count: usize, time_ns: u64) {
        self.output.drain(..count.min(self.output.len()));
        self.tell_dropped(time_ns);
    }
}

impl<'a> Response<'a> {
    fn plain(id: Option<&'a Id>, ok: bool) -> Self {
        Self { id, ok, value: None, lines: None, truncated: false, error: None }
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer, Channel, Event, LONGEST_LINE, MOST_REQUESTS, PATIENCE, ROOM_FOR_EVENTS};
    use alloc::format;
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// All that waits, as values: each line must be one.
    fn sent(channel: &mut Channel) -> Vec<Value> {
        let mut bytes = Vec::new();
        while !channel.output().is_empty() {
            bytes.extend_from_slice(channel.output());
            channel.sent(channel.output().len(), 0);
        }
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn created(name: &str) -> Event {
        Event::DomainCreated { name: name.into(), domain: 3 }
    }

    #[test]
    fn requests_are_answered_by_their_ids() {
        let mut channel = Channel::default();
        let mut requests = channel.feed(b"{\"id\":1,\"command\":\"list --json\"}\n\n{\"id\":\"b\",\"comm");
        assert_eq!(
            (requests.len(), requests[0].words.as_slice()),
            (1, &["list".into(), "--json".into()][..])
        );
        requests.extend(channel.feed(b"and\":[\"create\",\"a b\"]} \r\n"));
        assert_eq!(requests[1].words, ["create", "a b"]);
        assert_eq!(sent(&mut channel), [Value::Null; 0]);
        let failed = Answer { error: Some("no".into()), output: "x\ny\n".into(), ..Answer::default() };
        channel.answer(&requests[1], &failed);
        let structured =
            Answer { output: "{\"domains\":[]}\n".into(), structured: true, ..Answer::default() };
        channel.answer(&requests[0], &structured);
        assert_eq!(
            sent(&mut channel),
            [
                json!({"id": "b", "ok": false, "lines": ["x", "y"], "error": {"kind": "failed", "message": "no"}}),
                json!({"id": 1, "ok": true, "value": {"domains": []}}),
            ]
        );
    }

    #[test]
    fn what_is_no_request_is_answered_and_survived() {
        for (line, id, kind) in [
            ("{", json!(null), "malformed"),
            ("[1]", json!(null), "malformed"),
            ("\u{1}", json!(null), "malformed"),
            ("{\"command\":\"list\"}", json!(null), "malformed"),
            ("{\"id\":[1],\"command\":\"list\"}", json!(null), "malformed"),
            ("{\"id\":1}", json!(1), "malformed"),
            ("{\"id\":1,\"command\":\"\"}", json!(1), "malformed"),
            ("{\"id\":1,\"command\":[]}", json!(1), "malformed"),
            ("{\"id\":1,\"command\":\"a;b\"}", json!(1), "malformed"),
            ("{\"id\":1,\"command\":\"'a\"}", json!(1), "malformed"),
            ("{\"id\":1,\"command\":\"a\",\"events\":true}", json!(1), "malformed"),
            ("{\"id\":1,\"commnad\":\"a\"}", json!(null), "malformed"),
        ] {
            let mut channel = Channel::default();
            assert_eq!(channel.feed(format!("{line}\n").as_bytes()), [], "{line}");
            let answers = sent(&mut channel);
            assert_eq!(answers.len(), 1, "{line}");
            assert_eq!((&answers[0]["id"], &answers[0]["ok"]), (&id, &json!(false)), "{line}");
            assert_eq!(answers[0]["error"]["kind"], kind, "{line}");
            assert_eq!(channel.feed(b"{\"id\":7,\"command\":\"list\"}\n").len(), 1, "{line}");
        }
        let mut channel = Channel::default();
        assert_eq!(channel.feed(b"\xff\xfe\n"), []);
        assert_eq!(sent(&mut channel)[0]["error"]["kind"], "malformed");
    }

    #[test]
    fn a_line_may_be_as_long_as_it_may_be() {
        let line = |length: usize| {
            let frame = "{\"id\":1,\"command\":\"\"}".len();
            format!("{{\"id\":1,\"command\":\"{}\"}}\n", "x".repeat(length - frame))
        };
        let mut channel = Channel::default();
        assert_eq!(channel.feed(line(LONGEST_LINE).as_bytes()).len(), 1);
        assert_eq!(channel.feed(line(LONGEST_LINE + 1).as_bytes()).len(), 0);
        for _ in 0..1000 {
            assert_eq!(channel.feed(&[b'y'; 1000]), []);
        }
        assert_eq!(channel.line.len(), LONGEST_LINE);
        assert_eq!(channel.feed(b"\n{\"id\":2,\"command\":\"list\"}\n").len(), 1);
        let errors: Vec<Value> =
            sent(&mut channel).iter().map(|answer| answer["error"]["kind"].clone()).collect();
        assert_eq!(errors, ["too-long", "too-long"]);
    }

    #[test]
    fn too_many_requests_are_told_to_wait() {
        let mut channel = Channel::default();
        let many = "{\"id\":1,\"command\":\"wait x\"}\n".repeat(MOST_REQUESTS + 1);
        let requests = channel.feed(many.as_bytes());
        assert_eq!(requests.len(), MOST_REQUESTS);
        assert_eq!(sent(&mut channel)[0]["error"]["kind"], "busy");
        channel.answer(&requests[0], &Answer::default());
        assert_eq!(channel.feed(many.as_bytes()).len(), 1);
    }

    #[test]
    fn who_does_not_read_misses_events_and_is_told() {
        let mut channel = Channel::default();
        channel.event(&created("unasked"), 1);
        channel.feed(b"{\"id\":1,\"events\":true}\n");
        let told = 1000;
        for at in 0..told {
            channel.event(&created("demo"), at);
        }
        assert!(channel.output.len() < ROOM_FOR_EVENTS + 200 && channel.wants_input());
        let lines = sent(&mut channel);
        assert_eq!(lines[0], json!({"id": 1, "ok": true}));
        assert_eq!(lines[1], json!({"event": "domain-created", "name": "demo", "domain": 3, "time_ns": 0}));
        let last = lines.last().unwrap();
        assert_eq!(last["event"], "dropped");
        assert_eq!(lines.len() as u64 - 2 + last["count"].as_u64().unwrap(), told);
        channel.event(&created("again"), 9);
        channel.feed(b"{\"id\":1,\"events\":false}\n");
        channel.event(&created("unwanted"), 9);
        assert_eq!(sent(&mut channel).len(), 2);
    }

    #[test]
    fn who_does_not_read_is_not_heard() {
        let mut channel = Channel::default();
        let long = Answer { output: "x".repeat(PATIENCE), ..Answer::default() };
        let request = channel.feed(b"{\"id\":1,\"command\":\"a\"}\n").pop().unwrap();
        channel.answer(&request, &long);
        assert!(!channel.wants_input());
        sent(&mut channel);
        assert!(channel.wants_input());
    }

    #[test]
    fn who_comes_next_gets_nothing_that_was_for_another() {
        let mut channel = Channel::default();
        let first =
            channel.feed(b"{\"id\":1,\"events\":true}\n{\"id\":2,\"command\":\"a\"}\n{\"id\":3,\"comm");
        channel.begin_anew();
        assert!(channel.output().is_empty());
        channel.event(&created("demo"), 1);
        channel.answer(&first[0], &Answer::default());
        assert_eq!(sent(&mut channel), [Value::Null; 0]);
        let requests = channel.feed(b"{\"id\":4,\"command\":\"b\"}\n");
        channel.answer(&requests[0], &Answer::default());
        assert_eq!(sent(&mut channel), [json!({"id": 4, "ok": true, "lines": []})]);
        // Work of those who are gone is work all the same; so is the rest of a line that was too long.
        let many = "{\"id\":1,\"command\":\"wait x\"}\n".repeat(MOST_REQUESTS);
        assert_eq!(channel.feed(many.as_bytes()).len(), MOST_REQUESTS);
        channel.feed(&[b'x'; LONGEST_LINE + 1]);
        channel.begin_anew();
        assert_eq!(channel.feed(b"{\"id\":5,\"command\":\"c\"}\n"), []);
        assert_eq!(sent(&mut channel)[0]["error"]["kind"], "busy");
    }

    /// Lines that are requests, nearly requests, and neither.
    fn line() -> impl Strategy<Value = (Vec<u8>, Option<String>)> {
        prop_oneof![
            "[a-z]{1,8}".prop_map(|word| {
                (format!("{{\"id\":\"i\",\"command\":\"{word}\"}}").into_bytes(), Some(word))
            }),
            "[a-z]{1,8}"
                .prop_map(|word| (json!({"command": [&word], "id": 3}).to_string().into_bytes(), Some(word))),
            "\\{\"id\":[0-9]{1,3},\"command\":[\\[\\]\"a-z:{}]{0,9}"
                .prop_map(|text| (text.into_bytes(), None)),
            prop::collection::vec(any::<u8>().prop_filter("no line end", |byte| *byte != b'\n'), 0..200)
                .prop_map(|bytes| (bytes, None)),
            (LONGEST_LINE..2 * LONGEST_LINE + 2).prop_map(|length| (Vec::from(" ").repeat(length), None)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        /// Whatever stands between them, and however the stream is cut: all requests arrive, in order, and all that is answered is
        /// whole lines of JSON.
        #[test]
        fn requests_arrive_through_any_noise(
            lines in prop::collection::vec(line(), 0..12),
            cuts in prop::collection::vec(1..700usize, 1..20),
        ) {
            let (mut whole, mut cut) = (Channel::default(), Channel::default());
            let mut stream: Vec<u8> = Vec::new();
            for (line, _) in &lines {
                stream.extend(line);
                stream.push(b'\n');
            }
            let (mut first, mut second) = (Vec::new(), Vec::new());
            for request in whole.feed(&stream) {
                first.push(request.words.join(" "));
                whole.answer(&request, &Answer::default());
            }
            let mut rest = stream.as_slice();
            for length in cuts.iter().cycle() {
                let (part, left) = rest.split_at((*length).min(rest.len()));
                let requests = cut.feed(part);
                prop_assert!(requests.len() <= MOST_REQUESTS);
                for request in requests {
                    second.push(request.words.join(" "));
                    cut.answer(&request, &Answer::default());
                }
                rest = left;
                if rest.is_empty() {
                    break;
                }
            }
            let asked: Vec<&String> = lines.iter().filter_map(|(_, word)| word.as_ref()).collect();
            // Those of noise that happen to be requests, and those that are too many at once, are the only difference.
            prop_assert!(second.iter().filter(|word| asked.contains(word)).count() >= asked.len() || asked.len() > MOST_REQUESTS);
            prop_assert!(first.len() <= MOST_REQUESTS && second.starts_with(&first[..first.len().min(second.len())]));
            sent(&mut whole);
            sent(&mut cut);
        }
    }
}

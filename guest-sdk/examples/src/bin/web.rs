//! A web server: a page that counts its visitors, and the same numbers for programs at `/counters`.
//!
//! Its address comes by DHCP, or is `ip=`; `port=80` is where it listens. `requests=` ends it after as many, `until=/a,/b` once all these
//! paths were asked for. Eight connections are served at a
//! time; one that says nothing for ten seconds is ended.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use guest_examples::host::{self, Host};
use guest_examples::http::{self, MOST_HEAD, Request, Status};
use guest_sdk::net::NetError;
use guest_sdk::{Domain, entry, println, time};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

const CONNECTIONS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(10);

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = host::store(&mut domain) else { return Ok(()) };
    let words = domain.command_line;
    let mut host = Host::open(&store, words).await?;
    let port = words.number("port").unwrap_or(80);
    let most = words.number("requests").unwrap_or(u64::MAX);
    let mut connections: Vec<Connection> = (0..CONNECTIONS).map(|_| Connection::new(&mut host)).collect();
    println!("listening on port {port}");
    let until = words.value("until").map(|paths| paths.split(',').collect());
    let mut site = Site { until, ..Site::default() };
    while site.visits + site.refused < most && site.until.as_ref().is_none_or(|paths| !paths.is_empty())
        || connections.iter().any(|connection| connection.is_busy(&mut host))
    {
        host.poll();
        let mut again = false;
        for connection in &mut connections {
            again |= connection.turn(&mut host, port, &mut site);
        }
        if !again {
            host.wait().await?;
        }
    }
    host.tell_queues();
    Ok(())
}

/// What the pages tell.
#[derive(Default)]
struct Site {
    visits: u64,
    refused: u64,
    bytes: u64,
    /// Paths that are still to be asked for before it ends.
    until: Option<Vec<&'static str>>,
}

impl Site {
    fn page(&self, host: &Host) -> String {
        let seconds = time::now_ns() / 1_000_000_000;
        let counters = host.device.card().counters();
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>A guest of Xenolith</title>\n\
             <style>body{{font:16px/1.5 sans-serif;max-width:40em;margin:3em auto}}td{{padding:0 1em 0 0}}</style></head>\n\
             <body><h1>A guest of Xenolith</h1>\n\
             <p>This page comes from domain {}: a network card, a TCP/IP stack, and nothing below them but a hypervisor.</p>\n\
             <table>\n<tr><td>visits</td><td>{}</td></tr>\n<tr><td>requests refused</td><td>{}</td></tr>\n\
             <tr><td>bytes sent</td><td>{}</td></tr>\n<tr><td>frames received</td><td>{}</td></tr>\n\
             <tr><td>frames sent</td><td>{}</td></tr>\n<tr><td>seconds since the machine started</td><td>{seconds}</td></tr>\n\
             </table>\n</body></html>\n",
            guest_sdk::id(),
            self.visits,
            self.refused,
            self.bytes,
            counters.received,
            counters.sent,
        )
    }

    fn counters(&self) -> String {
        format!("{{\"visits\":{},\"refused\":{},\"bytes\":{}}}\n", self.visits, self.refused, self.bytes)
    }

    /// What a request gets; `None` while it is not all there.
    fn answer(&mut self, request: &[u8], host: &Host) -> Option<Vec<u8>> {
        let request = http::read(request);
        if let (Request::Page { path, .. }, Some(until)) = (request, &mut self.until) {
            until.retain(|left| *left != path);
        }
        let (status, kind, body, head_only) = match request {
            Request::Partial => return None,
            Request::Page { path: "/", head_only } => {
                self.visits += 1;
                (Status::Ok, "text/html; charset=utf-8", self.page(host), head_only)
            }
            Request::Page { path: "/counters", head_only } => {
                self.visits += 1;
                (Status::Ok, "application/json", self.counters(), head_only)
            }
            Request::Page { head_only, .. } => {
                self.refused += 1;
                (Status::NotFound, "text/plain", "There is no such page.\n".into(), head_only)
            }
            Request::Refused(status) => {
                self.refused += 1;
                (status, "text/plain", "This is no request that is served here.\n".into(), false)
            }
        };
        Some(http::answer(status, kind, &body, head_only))
    }
}

/// One connection after the other.
struct Connection {
    socket: SocketHandle,
    request: Vec<u8>,
    /// What is left to be sent, once there is an answer.
    answer: Option<(Vec<u8>, usize)>,
}

impl Connection {
    fn new(host: &mut Host) -> Self {
        let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
        let mut socket = tcp::Socket::new(buffer(MOST_HEAD), buffer(16384));
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(PATIENCE));
        Self { socket: host.sockets.add(socket), request: Vec::new(), answer: None }
    }

    fn is_busy(&self, host: &mut Host) -> bool {
        host.sockets.get_mut::<tcp::Socket<'_>>(self.socket).is_active()
    }

    /// Does what can be done; true when the stack has something to do then.
    fn turn(&mut self, host: &mut Host, port: u16, site: &mut Site) -> bool {
        let socket = host.sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        if !socket.is_open() {
            self.request.clear();
            self.answer = None;
            // The port is not 0, and the socket is closed.
            return socket.listen(port).is_ok();
        }
        while self.answer.is_none() && socket.can_recv() && self.request.len() < MOST_HEAD {
            let room = MOST_HEAD - self.request.len();
            let took = socket.recv(|bytes| {
                let part = bytes.get(..bytes.len().min(room)).unwrap_or_default();
                self.request.extend_from_slice(part);
                (part.len(), ())
            });
            if took.is_err() {
                break;
            }
        }
        if self.answer.is_none() {
            if !self.request.is_empty() {
                self.answer = site.answer(&self.request, host).map(|answer| (answer, 0));
            }
            let socket = host.sockets.get_mut::<tcp::Socket<'_>>(self.socket);
            if self.answer.is_none() && socket.state() == tcp::State::CloseWait {
                // It will never be all there.
                socket.close();
                return true;
            }
        }
        let socket = host.sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        let Some((answer, sent)) = &mut self.answer else { return false };
        let Some(rest) = answer.get(*sent..).filter(|rest| !rest.is_empty()) else { return false };
        let now = socket.send_slice(rest).unwrap_or(rest.len());
        *sent += now;
        site.bytes += now as u64;
        if *sent >= answer.len() {
            socket.close();
        }
        now > 0
    }
}

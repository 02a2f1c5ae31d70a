//! What this host does on the network while a scenario runs: it serves a page to guests, and visits one of theirs.

use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long one try may take: QEMU takes connections before there is anybody to have them.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two tries, and between two looks whether to go on.
const PAUSE: Duration = Duration::from_millis(200);

/// Both, until it is [left](Neighbour::leave).
pub struct Neighbour {
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
    visitor: Option<JoinHandle<String>>,
    /// Where the page is served, and the port whose visitors a guest gets; 0 for what is not wanted.
    pub ports: (u16, u16),
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

impl Neighbour {
    /// Serves `page` if it is not empty, and visits these paths of the guest's, each until it is answered.
    ///
    /// # Errors
    /// Without a port.
    pub fn start(page: &str, paths: &[String]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let listener = TcpListener::bind(local(0)).context("no port to serve a page on")?;
        let served = listener.local_addr()?.port();
        let mut server = None;
        if !page.is_empty() {
            listener.set_nonblocking(true)?;
            let (stop, page) = (Arc::clone(&stop), page.to_owned());
            server = Some(std::thread::spawn(move || serve(&listener, &page, &stop)));
        }
        let mut visited = 0;
        let mut visitor = None;
        if !paths.is_empty() {
            // Free a moment ago: QEMU takes it next.
            visited = TcpListener::bind(local(0)).context("no port to forward")?.local_addr()?.port();
            let (stop, paths) = (Arc::clone(&stop), paths.to_vec());
            visitor = Some(std::thread::spawn(move || visit(visited, &paths, &stop)));
        }
        Ok(Self { stop, ports: (if server.is_some() { served } else { 0 }, visited), server, visitor })
    }

    /// Ends both; what was seen of the guest's pages, a line each.
    pub fn leave(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server {
            let _ = server.join();
        }
        self.visitor.and_then(|visitor| visitor.join().ok()).unwrap_or_default()
    }
}

fn serve(listener: &TcpListener, page: &str, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            // One at a time: guests that do not read it have to be patient.
            Ok((stream, _)) => drop(answer(stream, page)),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn answer(mut stream: TcpStream, page: &str) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = Vec::new();
    let mut part = [0; 512];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < 8192 {
        let count = stream.read(&mut part)?;
        if count == 0 {
            return Ok(());
        }
        head.extend_from_slice(&part[..count]);
    }
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}", page.len())
}

fn visit(port: u16, paths: &[String], stop: &AtomicBool) -> String {
    let mut seen = String::new();
    for path in paths {
        while !stop.load(Ordering::Relaxed) {
            match fetch(port, path) {
                Ok(answer) if answer.starts_with("HTTP/1.1 ") => {
                    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
                    let status = head.lines().next().unwrap_or_default();
                    let line = body.lines().collect::<Vec<_>>().join(" ");
                    let _ = writeln!(seen, "visit {path}: {status}: {line}");
                    break;
                }
                // QEMU answers before the guest does, and hangs up.
                _ => std::thread::sleep(PAUSE),
            }
        }
    }
    seen
}

fn fetch(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&local(port), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::{Neighbour, fetch, visit};
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_page_is_served_and_visited() {
        let neighbour = Neighbour::start("two\nlines\n", &[]).unwrap();
        let (port, none) = neighbour.ports;
        assert_eq!(none, 0);
        assert!(fetch(port, "/").unwrap().ends_with("\r\n\r\ntwo\nlines\n"));
        let paths = ["/a".to_string(), "/b".to_string()];
        let seen = visit(port, &paths, &AtomicBool::new(false));
        assert_eq!(seen, "visit /a: HTTP/1.1 200 OK: two lines\nvisit /b: HTTP/1.1 200 OK: two lines\n");
        assert_eq!(visit(port, &paths, &AtomicBool::new(true)), "", "not when it is over");
        assert_eq!(neighbour.leave(), "");
        let idle = Neighbour::start("", &[]).unwrap();
        assert_eq!((idle.ports, idle.leave().as_str()), ((0, 0), ""));
    }
}

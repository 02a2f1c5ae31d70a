//! The part of HTTP/1.1 (RFC 9112) that a server of small pages needs: the head of a request, and an answer that ends the connection.

use alloc::format;
use alloc::vec::Vec;

/// Bytes of a head that is read.
pub const MOST_HEAD: usize = 4096;
/// Fields of a head that are read.
const FIELDS: usize = 32;

/// What is known of a request so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Its head is not all there.
    Partial,
    /// It wants a page, without its query; or only to know about it.
    Page {
        /// As it was sent, up to `?`.
        path: &'a str,
        /// Its answer has no body.
        head_only: bool,
    },
    /// It is refused with this status.
    Refused(Status),
}

/// Status of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 200
    Ok,
    /// 400
    BadRequest,
    /// 404
    NotFound,
    /// 405
    MethodNotAllowed,
    /// 431
    HeadTooLarge,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadTooLarge => "431 Request Header Fields Too Large",
        }
    }
}

/// Reads the head of a request.
#[must_use]
pub fn read(bytes: &[u8]) -> Request<'_> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() >= MOST_HEAD => Request::Refused(Status::HeadTooLarge),
        Ok(httparse::Status::Partial) => Request::Partial,
        Err(httparse::Error::TooManyHeaders) => Request::Refused(Status::HeadTooLarge),
        Err(_) => Request::Refused(Status::BadRequest),
        Ok(httparse::Status::Complete(_)) => match (request.method, request.path) {
            (Some(method @ ("GET" | "HEAD")), Some(target)) => {
                let path = target.split_once('?').map_or(target, |(path, _)| path);
                Request::Page { path, head_only: method == "HEAD" }
            }
            _ => Request::Refused(Status::MethodNotAllowed),
        },
    }
}

/// An answer, whole.
#[must_use]
pub fn answer(status: Status, kind: &str, body: &str, head_only: bool) -> Vec<u8> {
    let allow = if status == Status::MethodNotAllowed { "Allow: GET, HEAD\r\n" } else { "" };
    let mut bytes = format!(
        "HTTP/1.1 {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n{allow}Connection: close\r\n\r\n",
        status.line(),
        body.len()
    )
    .into_bytes();
    if !head_only {
        bytes.extend_from_slice(body.as_bytes());
    }
    bytes
}

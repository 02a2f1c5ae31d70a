//! The xenstore ring and its messages (public/io/xs_wire.h).
//!
//! Two byte rings in one page with free-running indices: the guest owns `req_prod` and `rsp_cons`, the store `req_cons` and
//! `rsp_prod`. A writer stores bytes, then the index (release), then notifies; a reader loads the index (acquire), copies bytes,
//! then stores its own index (release) and notifies, because the other side may wait for room.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Errno;

/// Bytes of each ring.
pub const RING_SIZE: usize = 1024;
/// Most bytes after a header; more breaks the connection.
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path.
pub const ABS_PATH_MAX: usize = 3072;
/// Longest path relative to a domain's own.
pub const REL_PATH_MAX: usize = 2048;

/// The page that a domain shares with the store.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct XenstoreInterface {
    /// Requests.
    pub req: [u8; RING_SIZE],
    /// Replies and watch events.
    pub rsp: [u8; RING_SIZE],
    /// Bytes of requests consumed; store.
    pub req_cons: u32,
    /// Bytes of requests produced; guest.
    pub req_prod: u32,
    /// Bytes of replies consumed; guest.
    pub rsp_cons: u32,
    /// Bytes of replies produced; store.
    pub rsp_prod: u32,
    /// [`SERVER_FEATURE_RECONNECTION`] and [`SERVER_FEATURE_ERROR`]; store.
    pub server_features: u32,
    /// [`CONNECTED`] or [`RECONNECT`]: the guest sets it and notifies, the store resets the indices and sets it back.
    pub connection: u32,
    /// `ERROR_*`; store.
    pub error: u32,
}

/// The store can start the connection anew.
pub const SERVER_FEATURE_RECONNECTION: u32 = 1;
/// The store fills in `error`.
pub const SERVER_FEATURE_ERROR: u32 = 2;
/// State of the connection: at work.
pub const CONNECTED: u32 = 0;
/// The guest wants it anew.
pub const RECONNECT: u32 = 1;
/// No error.
pub const ERROR_NONE: u32 = 0;
/// Communication failed.
pub const ERROR_COMM: u32 = 1;
/// An index that cannot be.
pub const ERROR_RINGIDX: u32 = 2;
/// A message that cannot be.
pub const ERROR_PROTO: u32 = 3;

/// The header of a message, both ways; `len` bytes follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MessageHeader {
    /// Number of a [`MessageType`].
    pub kind: u32,
    /// Chosen by the asker, given back in the reply; 0 in watch events.
    pub req_id: u32,
    /// The transaction, 0 for none.
    pub tx_id: u32,
    /// Bytes that follow.
    pub len: u32,
}

crate::subops::command_enum! {
    /// Types of messages.
    MessageType, "XS_" {
        /// Control of the store.
        Control = 0, "CONTROL";
        /// Children of a node.
        Directory = 1, "DIRECTORY";
        /// Value of a node.
        Read = 2, "READ";
        /// Permissions of a node.
        GetPerms = 3, "GET_PERMS";
        /// Wants to hear of changes under a path.
        Watch = 4, "WATCH";
        /// No longer.
        Unwatch = 5, "UNWATCH";
        /// Begins a transaction.
        TransactionStart = 6, "TRANSACTION_START";
        /// Ends it, "T" to keep it, "F" not to.
        TransactionEnd = 7, "TRANSACTION_END";
        /// Makes a domain known.
        Introduce = 8, "INTRODUCE";
        /// Forgets a domain.
        Release = 9, "RELEASE";
        /// Path of a domain.
        GetDomainPath = 10, "GET_DOMAIN_PATH";
        /// Sets a node's value.
        Write = 11, "WRITE";
        /// Makes an empty node.
        Mkdir = 12, "MKDIR";
        /// Removes a node and its children.
        Rm = 13, "RM";
        /// Sets permissions.
        SetPerms = 14, "SET_PERMS";
        /// Something changed under a watched path.
        WatchEvent = 15, "WATCH_EVENT";
        /// The reply to a request that failed: the error's name.
        Error = 16, "ERROR";
        /// Whether a domain is known.
        IsDomainIntroduced = 17, "IS_DOMAIN_INTRODUCED";
        /// A domain resumed.
        Resume = 18, "RESUME";
        /// Lets one domain act for another.
        SetTarget = 19, "SET_TARGET";
        /// Drops the asker's watches and transactions.
        ResetWatches = 21, "RESET_WATCHES";
        /// Children of a node, in parts.
        DirectoryPart = 22, "DIRECTORY_PART";
    }
}

/// What no message is.
pub const INVALID: u32 = 0xffff;
/// Part of a watch event's payload: the path that changed.
pub const WATCH_PATH: u32 = 0;
/// Part of a watch event's payload: the token that the watch was set with.
pub const WATCH_TOKEN: u32 = 1;

/// Errors that the store reports, as the text of an [`Error`](MessageType::Error) message without its zero.
pub const ERRORS: &[Errno] = &[
    Errno::EINVAL,
    Errno::EACCES,
    Errno::EEXIST,
    Errno::EISDIR,
    Errno::ENOENT,
    Errno::ENOMEM,
    Errno::ENOSPC,
    Errno::EIO,
    Errno::ENOTEMPTY,
    Errno::ENOSYS,
    Errno::EROFS,
    Errno::EBUSY,
    Errno::EAGAIN,
    Errno::EISCONN,
    Errno::E2BIG,
    Errno::EPERM,
];

/// The error of a text, with or without its zero; `None` for one that the protocol does not know.
#[must_use]
pub fn error_from_text(text: &[u8]) -> Option<Errno> {
    let text = text.strip_suffix(b"\0").unwrap_or(text);
    ERRORS.iter().copied().find(|error| error.name().as_bytes() == text)
}

/// Bytes that wait in a byte ring of `size`, or `None` when the indices cannot be: the peer lies.
#[must_use]
pub const fn waiting(producer: u32, consumer: u32, size: usize) -> Option<usize> {
    let bytes = producer.wrapping_sub(consumer) as usize;
    if bytes > size { None } else { Some(bytes) }
}

/// Bytes that can be handled in one piece from `index` on, of `bytes`; `size` must be a power of two.
#[must_use]
pub const fn piece(index: u32, bytes: usize, size: usize) -> (usize, usize) {
    let start = index as usize & size.wrapping_sub(1);
    let room = size - start;
    (start, if bytes < room { bytes } else { room })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_that_cannot_be() {
        assert_eq!(waiting(5, 2, RING_SIZE), Some(3));
        assert_eq!(waiting(2, u32::MAX - 1, RING_SIZE), Some(4));
        assert_eq!(waiting(2, 3, RING_SIZE), None);
        assert_eq!(waiting(1025, 0, RING_SIZE), None);
    }

    #[test]
    fn errors_are_names() {
        for &error in ERRORS {
            assert_eq!(error_from_text(error.name().as_bytes()), Some(error));
        }
        assert_eq!(error_from_text(b"EAGAIN\0"), Some(Errno::EAGAIN));
        for other in [&b""[..], b"EAGAIN\0\0", b"ESRCH", b"eagain"] {
            assert_eq!(error_from_text(other), None);
        }
    }

    #[test]
    fn pieces_end_at_the_end_of_the_ring() {
        assert_eq!(piece(1020, 10, RING_SIZE), (1020, 4));
        assert_eq!(piece(1024, 10, RING_SIZE), (0, 10));
        assert_eq!(piece(u32::MAX, 10, RING_SIZE), (1023, 1));
    }
}

//! The store's end of a xenstore ring (public io/xs_wire.h, Xen's docs/misc/xenstore-ring.txt).
//!
//! The guest owns the page and may write anything into it at any time, also over what is ours. Its two indexes are claims,
//! read once for each use; a claim that cannot be ends the connection. Our own two live here and are only published there.

use alloc::vec::Vec;
use core::mem::offset_of;
use core::sync::atomic::Ordering;
use guest_sdk::ring::SharedPage;
use hypercall_abi::io::xenstore::{
    CONNECTED, ERROR_NONE, RECONNECT, RING_SIZE, SERVER_FEATURE_ERROR, SERVER_FEATURE_RECONNECTION,
    XenstoreInterface, piece, waiting,
};

const REQ: usize = offset_of!(XenstoreInterface, req);
const RSP: usize = offset_of!(XenstoreInterface, rsp);
const REQ_CONS: usize = offset_of!(XenstoreInterface, req_cons);
const REQ_PROD: usize = offset_of!(XenstoreInterface, req_prod);
const RSP_CONS: usize = offset_of!(XenstoreInterface, rsp_cons);
const RSP_PROD: usize = offset_of!(XenstoreInterface, rsp_prod);
const FEATURES: usize = offset_of!(XenstoreInterface, server_features);
const CONNECTION: usize = offset_of!(XenstoreInterface, connection);
const ERROR: usize = offset_of!(XenstoreInterface, error);
/// A watch may say how deep it looks (docs/misc/xenstore-ring.txt; the header has no name for it).
const SERVER_FEATURE_WATCHDEPTH: u32 = 4;

/// The guest's index is further from ours than the ring is long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadIndex;

/// The ring of one guest.
#[derive(Debug)]
pub struct StoreBack<M> {
    page: M,
    req_cons: u32,
    rsp_prod: u32,
}

impl<M: SharedPage> StoreBack<M> {
    /// Takes over a ring where its indexes are, and says what this store can do.
    pub fn new(page: M) -> Self {
        let req_cons = page.word(REQ_CONS).load(Ordering::Relaxed);
        let rsp_prod = page.word(RSP_PROD).load(Ordering::Relaxed);
        let features = SERVER_FEATURE_RECONNECTION | SERVER_FEATURE_ERROR | SERVER_FEATURE_WATCHDEPTH;
        page.word(ERROR).store(ERROR_NONE, Ordering::Relaxed);
        page.word(FEATURES).store(features, Ordering::Release);
        Self { page, req_cons, rsp_prod }
    }

    /// Whether there is nothing to be read.
    pub fn is_quiet(&self) -> bool {
        self.page.word(REQ_PROD).load(Ordering::Acquire) == self.req_cons
    }

    /// Takes at most `most` bytes of requests.
    ///
    /// # Errors
    /// [`BadIndex`].
    pub fn read(&mut self, most: usize) -> Result<Vec<u8>, BadIndex> {
        let produced = self.page.word(REQ_PROD).load(Ordering::Acquire);
        let count = waiting(produced, self.req_cons, RING_SIZE).ok_or(BadIndex)?.min(most);
        let mut bytes = alloc::vec![0; count];
        let (start, first) = piece(self.req_cons, count, RING_SIZE);
        let (head, tail) = bytes.split_at_mut(first);
        self.page.read_bytes(REQ + start, head);
        self.page.read_bytes(REQ, tail);
        self.req_cons = self.req_cons.wrapping_add(count as u32);
        self.page.word(REQ_CONS).store(self.req_cons, Ordering::Release);
        Ok(bytes)
    }

    /// Gives as many bytes of replies as there is room for; returns how many.
    ///
    /// # Errors
    /// [`BadIndex`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<usize, BadIndex> {
        let consumed = self.page.word(RSP_CONS).load(Ordering::Acquire);
        let used = waiting(self.rsp_prod, consumed, RING_SIZE).ok_or(BadIndex)?;
        let count = bytes.len().min(RING_SIZE - used);
        let (start, first) = piece(self.rsp_prod, count, RING_SIZE);
        let (given, _) = bytes.split_at(count);
        let (head, tail) = given.split_at(first);
        self.page.write_bytes(RSP + start, head);
        self.page.write_bytes(RSP, tail);
        self.rsp_prod = self.rsp_prod.wrapping_add(count as u32);
        self.page.word(RSP_PROD).store(self.rsp_prod, Ordering::Release);
        Ok(count)
    }

    /// Whether the guest asks for the connection to begin anew.
    pub fn wants_reconnection(&self) -> bool {
        self.page.word(CONNECTION).load(Ordering::Acquire) == RECONNECT
    }

    /// Empties both rings; what was in them is lost.
    pub fn reconnect(&mut self) {
        (self.req_cons, self.rsp_prod) = (0, 0);
        for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, ERROR] {
            self.page.word(index).store(0, Ordering::Relaxed);
        }
        self.page.word(CONNECTION).store(CONNECTED, Ordering::Release);
    }

    /// Says why the guest is not heard any more: one of `ERROR_*`.
    pub fn fail(&self, error: u32) {
        self.page.word(ERROR).store(error, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        BadIndex, CONNECTION, ERROR, FEATURES, REQ_CONS, REQ_PROD, RSP, RSP_CONS, RSP_PROD, StoreBack,
    };

    use alloc::vec::Vec;
    use core::sync::atomic::Ordering;
    use guest_sdk::ring::SharedPage;
    use guest_sdk::ring::host::HostPages;

    fn page(start: u32) -> HostPages {
        let page = HostPages::new(1, 0);
        for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD] {
            page.word(index).store(start, Ordering::Relaxed);
        }
        page
    }

    #[test]
    fn bytes_go_both_ways_across_all_wraps() {
        let page = page(u32::MAX - 3000);
        let mut back = StoreBack::new(&page);
        assert_eq!(page.word(FEATURES).load(Ordering::Relaxed), 7);
        let (mut sent, mut got, mut back_sent, mut back_got): (Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>) =
            Default::default();
        for round in 0..200usize {
            let mut at = page.word(REQ_PROD).load(Ordering::Relaxed);
            let room = 1024 - at.wrapping_sub(page.word(REQ_CONS).load(Ordering::Relaxed)) as usize;
            for index in 0..(round * 37 % 1100).min(room) {
                let byte = (index ^ round) as u8;
                page.write_bytes((at % 1024) as usize, &[byte]);
                sent.push(byte);
                at = at.wrapping_add(1);
            }
            page.word(REQ_PROD).store(at, Ordering::Release);
            got.extend(back.read(round * 53 % 900).unwrap());
            let reply: Vec<u8> = (0..round * 29 % 1500).map(|index| (index + round) as u8).collect();
            let count = back.write(&reply).unwrap();
            back_sent.extend(&reply[..count]);
            let mut at = page.word(RSP_CONS).load(Ordering::Relaxed);
            for _ in 0..round * 31 % 800 {
                if at == page.word(RSP_PROD).load(Ordering::Acquire) {
                    break;
                }
                let mut byte = [0];
                page.read_bytes(RSP + (at % 1024) as usize, &mut byte);
                back_got.push(byte[0]);
                at = at.wrapping_add(1);
            }
            page.word(RSP_CONS).store(at, Ordering::Release);
        }
        got.extend(back.read(1024).unwrap());
        assert!(sent.len() > 20_000 && sent == got);
        assert!(back_got.len() > 20_000 && back_sent.starts_with(&back_got));
    }

    #[test]
    fn wild_indexes_end_the_connection_until_it_begins_anew() {
        let page = page(0);
        let mut back = StoreBack::new(&page);
        for wild in [1025, u32::MAX, 1 << 31] {
            page.word(REQ_PROD).store(wild, Ordering::Relaxed);
            assert_eq!(back.read(10), Err(BadIndex), "{wild}");
        }
        // One that has taken more than it was given.
        for wild in [1, u32::MAX - 1024, 1 << 31] {
            page.word(RSP_CONS).store(wild, Ordering::Relaxed);
            assert_eq!(back.write(b"x"), Err(BadIndex), "{wild}");
        }
        back.fail(2);
        // Ours are ours, whatever is written over them.
        page.word(REQ_CONS).store(77, Ordering::Relaxed);
        page.word(RSP_PROD).store(78, Ordering::Relaxed);
        page.word(REQ_PROD).store(3, Ordering::Relaxed);
        page.word(RSP_CONS).store(0, Ordering::Relaxed);
        page.write_bytes(0, b"abc");
        assert_eq!(back.read(10).unwrap(), b"abc");
        assert_eq!(back.write(b"xy"), Ok(2));
        assert_eq!(
            (page.word(REQ_CONS).load(Ordering::Relaxed), page.word(RSP_PROD).load(Ordering::Relaxed)),
            (3, 2)
        );
        assert!(!back.wants_reconnection());
        page.word(CONNECTION).store(1, Ordering::Relaxed);
        assert!(back.wants_reconnection());
        assert_eq!(page.word(ERROR).load(Ordering::Relaxed), 2);
        back.reconnect();
        assert!(!back.wants_reconnection() && back.read(10).unwrap().is_empty());
        assert_eq!(page.word(ERROR).load(Ordering::Relaxed), 0);
        assert_eq!(back.write(&[1; 2000]), Ok(1024));
        assert_eq!(back.write(b"x"), Ok(0), "full is no error");
    }
}

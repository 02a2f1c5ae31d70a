//! What a guest gets: pages that are put up, and put up again once what they were filled with is taken.

use super::{Broken, Checksum, Pages, Received};
use crate::ring::{Front, SharedPage};
use alloc::vec::Vec;
use hypercall_abi::io::netif::{
    Extra, GSO_TYPE_TCPV4, NR_SLOTS_MIN, NetifExtraInfo, NetifRxRequest, NetifRxResponse, RxFlags,
};
use hypercall_abi::{GrantRef, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

/// What a page has of a frame.
#[derive(Clone, Copy, Debug)]
struct Piece {
    page: u16,
    offset: u16,
    bytes: u16,
}

/// Where in a frame the next response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// At its beginning.
    First,
    /// In an extra slot; then the frame goes on, or not.
    Extra { more: bool },
    /// In another piece of it.
    Piece,
    /// The frame is there, and was not taken.
    Taken,
}

/// The ring of what is received, with its pages.
#[derive(Debug)]
pub struct Receive<M, P> {
    ring: Front<M, NetifRxRequest, NetifRxResponse>,
    pages: P,
    /// Whether the back end has a page, by its number.
    posted: Vec<bool>,
    /// Which page was put up in a slot: extra slots do not say.
    order: Vec<u16>,
    pushed: u32,
    popped: u32,
    /// Pages put up that the back end has not been shown.
    hidden: usize,
    /// The frame that is taken together.
    pieces: Vec<Piece>,
    bytes: usize,
    checksum: Checksum,
    segment: Option<u16>,
    /// When it was last looked, nothing had come.
    empty: bool,
    /// Frames of several segments were asked for.
    large: bool,
    /// The back end has all pages for good.
    kept: bool,
    /// It is not a frame that can be taken.
    bad: bool,
    next: Next,
    frames: u64,
    errors: u64,
    malformed: u64,
}

impl<M: SharedPage, P: Pages> Receive<M, P> {
    /// Makes a ring of `ring` and puts up `pages`; those that it has no slots for are not used. With `large`, packets of several segments
    /// may come.
    ///
    /// # Errors
    /// None that can happen.
    pub fn new(ring: M, pages: P, large: bool) -> Result<Self, Broken> {
        let ring = Front::new(ring);
        let slots = ring.capacity() as usize;
        let count = pages.references().len().min(slots).min(usize::from(u16::MAX));
        let mut receive = Self {
            ring,
            pages,
            posted: alloc::vec![false; count],
            order: alloc::vec![0; slots],
            pushed: 0,
            popped: 0,
            hidden: 0,
            pieces: Vec::with_capacity(NR_SLOTS_MIN),
            bytes: 0,
            checksum: Checksum::Unknown,
            segment: None,
            empty: true,
            large,
            kept: false,
            bad: false,
            next: Next::First,
            frames: 0,
            errors: 0,
            malformed: 0,
        };
        for page in 0..count as u16 {
            receive.put_up(page)?;
        }
        // Nobody is there yet to be notified.
        let _ = receive.publish();
        Ok(receive)
    }

    /// The ring's memory.
    pub fn ring(&self) -> &M {
        self.ring.page()
    }

    /// Frames received, pages that the back end could not fill, and frames that were none.
    #[must_use]
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.frames, self.errors, self.malformed)
    }

    /// The pages.
    pub fn pages(&self) -> &P {
        &self.pages
    }

    /// Says that the back end keeps all pages mapped: none can be withdrawn.
    pub fn set_kept(&mut self) {
        self.kept = true;
    }

    /// Ends it.
    #[must_use]
    pub fn into_pages(self) -> P {
        self.pages
    }

    /// Whether a frame is there to be taken.
    ///
    /// # Errors
    /// [`Broken`]: a wild index, or a page that was not put up.
    pub fn look(&mut self) -> Result<bool, Broken> {
        while self.next != Next::Taken {
            let response = self.ring.pop()?;
            self.empty = response.is_none();
            let Some(response) = response else { return Ok(false) };
            let slot = self.popped;
            self.popped = slot.wrapping_add(1);
            let goes_on = if let Next::Extra { more } = self.next {
                self.extra(slot, &response, more)?
            } else {
                self.piece(&response)?
            };
            match (goes_on, self.bad) {
                (true, _) => {}
                (false, false) => self.next = Next::Taken,
                (false, true) => self.put_back()?,
            }
        }
        Ok(true)
    }

    /// A piece of a frame; whether the frame goes on.
    fn piece(&mut self, response: &NetifRxResponse) -> Result<bool, Broken> {
        let page = response.id;
        self.take(page)?;
        let flags = RxFlags::from_bits_retain(response.flags);
        let (offset, filled) = (usize::from(response.offset), usize::try_from(response.status));
        let first = self.next == Next::First;
        if first {
            self.checksum = if flags.contains(RxFlags::CSUM_BLANK) {
                Checksum::Blank
            } else if flags.contains(RxFlags::DATA_VALIDATED) {
                Checksum::Validated
            } else {
                Checksum::Unknown
            };
        }
        match filled {
            Ok(bytes) if offset + bytes <= PAGE_SIZE && self.pieces.len() < NR_SLOTS_MIN => {
                self.pieces.push(Piece { page, offset: response.offset, bytes: bytes as u16 });
                self.bytes += bytes;
            }
            Ok(_) => {
                self.malformed += u64::from(!self.bad);
                self.bad = true;
                self.put_up(page)?;
            }
            Err(_) => {
                self.errors += 1;
                self.bad = true;
                self.put_up(page)?;
            }
        }
        let more = flags.contains(RxFlags::MORE_DATA);
        let extra = first && flags.contains(RxFlags::EXTRA_INFO);
        self.next = if extra { Next::Extra { more } } else { Next::Piece };
        let goes_on = extra || more;
        if !goes_on && !self.bad && !(1..=super::MOST_BYTES).contains(&self.bytes) {
            self.malformed += 1;
            self.bad = true;
        }
        Ok(goes_on)
    }

    /// An extra slot: a frame with one that says something else than what was asked for is not taken. Whether the frame goes on.
    fn extra(&mut self, slot: u32, response: &NetifRxResponse, more: bool) -> Result<bool, Broken> {
        let extra = NetifExtraInfo::read_from_bytes(response.as_bytes()).ok();
        match extra.and_then(|extra| extra.extra()) {
            Some(Extra::Gso { size, kind: GSO_TYPE_TCPV4 }) if self.large => self.segment = Some(size),
            _ => {
                self.malformed += u64::from(!self.bad);
                self.bad = true;
            }
        }
        let page = self.order.get(self.place(slot)).copied().ok_or(Broken)?;
        self.take(page)?;
        self.put_up(page)?;
        let again = extra.is_some_and(|extra| extra.more());
        if !again {
            self.next = Next::Piece;
        }
        Ok(again || more)
    }

    /// A page comes back from the back end.
    fn take(&mut self, page: u16) -> Result<(), Broken> {
        match self.posted.get_mut(usize::from(page)) {
            Some(posted) if *posted => *posted = false,
            _ => return Err(Broken),
        }
        Ok(())
    }

    fn place(&self, index: u32) -> usize {
        // A power of two.
        index as usize & (self.order.len() - 1)
    }

    fn put_up(&mut self, page: u16) -> Result<(), Broken> {
        let gref = self.pages.references().get(usize::from(page)).copied().unwrap_or(GrantRef::new(0));
        // There are no more pages than slots.
        self.ring.push(NetifRxRequest { id: page, pad: 0, gref }).map_err(|_| Broken)?;
        let place = self.place(self.pushed);
        self.pushed = self.pushed.wrapping_add(1);
        if let Some(order) = self.order.get_mut(place) {
            *order = page;
        }
        if let Some(posted) = self.posted.get_mut(usize::from(page)) {
            *posted = true;
        }
        self.hidden += 1;
        Ok(())
    }

    /// Puts up the pages of the frame again.
    fn put_back(&mut self) -> Result<(), Broken> {
        for index in 0..self.pieces.len() {
            if let Some(piece) = self.pieces.get(index) {
                self.put_up(piece.page)?;
            }
        }
        self.pieces.clear();
        (self.bytes, self.segment, self.bad, self.next) = (0, None, false, Next::First);
        Ok(())
    }

    fn done(&mut self) -> Result<Received, Broken> {
        let received = Received { bytes: self.bytes, checksum: self.checksum, segment: self.segment };
        self.frames += 1;
        self.put_back()?;
        Ok(received)
    }

    fn gather(&self, into: &mut [u8]) {
        let mut rest = into;
        for piece in &self.pieces {
            let here = rest.len().min(piece.bytes.into());
            let (to, left) = rest.split_at_mut(here);
            self.pages.read_bytes(usize::from(piece.page) * PAGE_SIZE + usize::from(piece.offset), to);
            rest = left;
        }
    }

    /// Takes a frame, copied; what `into` has no room for is lost. `None` when there is none.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn copy(&mut self, into: &mut [u8]) -> Result<Option<Received>, Broken> {
        if !self.look()? {
            return Ok(None);
        }
        self.gather(into);
        self.done().map(Some)
    }

    /// Takes a frame and shows it to `work`: where it is, or copied to `scratch` when it is in several pages, or the back end still has
    /// its page. The work is given back when there is no frame.
    ///
    /// # Errors
    /// As [`look`](Self::look), before the work is done.
    pub fn show<R, F: FnOnce(&[u8], Checksum) -> R>(
        &mut self,
        scratch: &mut Vec<u8>,
        work: F,
    ) -> Result<Result<R, F>, Broken> {
        if !self.look()? {
            return Ok(Err(work));
        }
        let checksum = self.checksum;
        let result = match *self.pieces.as_slice() {
            [Piece { page, offset, bytes }]
                if !self.kept
                    && let Some(own) = self.pages.withdraw(page.into()) =>
            {
                let frame = own.get(usize::from(offset)..usize::from(offset) + usize::from(bytes));
                work(frame.unwrap_or_default(), checksum)
            }
            _ => {
                // What was in it does not matter: it is filled.
                if scratch.len() < self.bytes {
                    scratch.resize(self.bytes, 0);
                }
                let frame = scratch.get_mut(..self.bytes).unwrap_or_default();
                self.gather(frame);
                work(frame, checksum)
            }
        };
        self.done()?;
        Ok(Ok(result))
    }

    /// Shows the back end the pages that were put up again, once they are many or there is nothing else to do; true when it wants to be
    /// notified.
    #[must_use = "the back end sleeps if it is not notified"]
    pub fn publish_if_due(&mut self) -> bool {
        self.hidden > 0 && (self.empty || self.hidden * 2 >= self.posted.len()) && self.publish()
    }

    /// Shows the back end the pages that were put up; true when it wants to be notified.
    #[must_use = "the back end sleeps if it is not notified"]
    pub fn publish(&mut self) -> bool {
        core::mem::take(&mut self.hidden) > 0 && self.ring.publish()
    }

    /// Asks to be notified of the next frame; true when something is there already.
    pub fn prepare_to_wait(&self) -> bool {
        self.next == Next::Taken || self.ring.prepare_to_wait()
    }
}

const _: () = assert!(size_of::<NetifRxResponse>() == size_of::<NetifExtraInfo>());

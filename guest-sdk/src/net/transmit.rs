//! What a guest sends: frames, cut into pages that stay granted.

use super::{Broken, Offload, Pages};
use crate::ring::{Front, SharedPage};
use alloc::vec::Vec;
use hypercall_abi::io::netif::{
    Extra, GSO_TYPE_TCPV4, NR_SLOTS_MIN, NetifExtraInfo, NetifTxRequest, NetifTxResponse, RSP_NULL, RSP_OKAY,
    TxFlags,
};
use hypercall_abi::{GrantRef, PAGE_SIZE};
use zerocopy::{FromZeros, IntoBytes};

const _: () = assert!(super::MOST_BYTES.div_ceil(PAGE_SIZE) <= NR_SLOTS_MIN);

/// The ring of what is sent, with the pages that frames are in until they are answered.
///
/// A page's number is the number of its request, so nothing is looked up, allocated or granted for a frame.
#[derive(Debug)]
pub struct Transmit<M, P> {
    ring: Front<M, NetifTxRequest, NetifTxResponse>,
    pages: P,
    /// Pages that hold no frame.
    free: Vec<u16>,
    /// Whether a page is on its way, by its number.
    away: Vec<bool>,
    /// Slots on their way that are no pages.
    extras: u32,
    frames: u64,
    errors: u64,
}

impl<M: SharedPage, P: Pages> Transmit<M, P> {
    /// Makes a ring of `ring`, for frames in `pages`; those that the ring has no slots for are not used.
    #[must_use]
    pub fn new(ring: M, pages: P) -> Self {
        let ring = Front::new(ring);
        let count = pages.references().len().min(ring.capacity() as usize).min(usize::from(u16::MAX));
        // Those that were used last are the next: they are in the caches.
        let free = (0..count as u16).rev().collect();
        Self { ring, pages, free, away: alloc::vec![false; count], extras: 0, frames: 0, errors: 0 }
    }

    /// The ring's memory.
    pub fn ring(&self) -> &M {
        self.ring.page()
    }

    /// Frames sent, and pages of which the back end said that they could not be.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.frames, self.errors)
    }

    /// The pages.
    pub fn pages(&self) -> &P {
        &self.pages
    }

    /// Ends it; frames on their way may have been sent or not.
    #[must_use]
    pub fn into_pages(self) -> P {
        self.pages
    }

    /// Most bytes of a frame, whatever else is on its way.
    #[must_use]
    pub fn longest(&self) -> usize {
        (self.away.len() * PAGE_SIZE).min(super::MOST_BYTES)
    }

    /// Whether there are pages for a frame of `bytes`; takes answers if they are needed.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn room(&mut self, bytes: usize) -> Result<bool, Broken> {
        let wanted = wanted(bytes);
        // A frame may take a slot beside those of its pages.
        let fits = |this: &Self| this.free.len() >= wanted && this.ring.free() as usize > wanted;
        if !fits(self) {
            self.reap()?;
        }
        Ok(fits(self))
    }

    /// Takes answers: their pages are free again, whatever they say.
    fn reap(&mut self) -> Result<(), Broken> {
        while let Some(response) = self.ring.pop()? {
            if response.status == RSP_NULL {
                self.extras = self.extras.checked_sub(1).ok_or(Broken)?;
                continue;
            }
            match self.away.get_mut(usize::from(response.id)) {
                Some(away) if *away => *away = false,
                // No page that is away: the back end has lost count, and what it says next means nothing.
                _ => return Err(Broken),
            }
            self.free.push(response.id);
            self.errors += u64::from(response.status != RSP_OKAY);
        }
        Ok(())
    }

    /// Puts a frame into the ring, unseen until [`publish`](Self::publish); false when there is no room for it.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn push(&mut self, frame: &[u8]) -> Result<bool, Broken> {
        self.push_with(frame, Offload::NOTHING)
    }

    /// As [`push`](Self::push), leaving something to do to the back end.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn push_with(&mut self, frame: &[u8], offload: Offload) -> Result<bool, Broken> {
        if frame.is_empty() || frame.len() > super::MOST_BYTES || !self.room(frame.len())? {
            return Ok(false);
        }
        let mut pieces = frame.chunks(PAGE_SIZE).peekable();
        // The first request has the length of the frame, the others have their own.
        let mut bytes = frame.len();
        while let Some(piece) = pieces.next() {
            let Some(page) = self.free.pop() else { return Err(Broken) };
            self.pages.write_bytes(usize::from(page) * PAGE_SIZE, piece);
            self.request(page, bytes, pieces.peek().is_some(), offload, bytes == frame.len())?;
            bytes = pieces.peek().map_or(0, |next| next.len());
        }
        self.frames += 1;
        Ok(true)
    }

    /// Lets `work` write a frame of `bytes` where it is sent from, or into `scratch` when it does not fit a page, and say what is left to
    /// do to it; the result, and whether there was room for the frame. It is not sent when `work` says nothing.
    ///
    /// # Errors
    /// [`Broken`], with the result of the work.
    pub fn fill<R>(
        &mut self,
        bytes: usize,
        scratch: &mut Vec<u8>,
        work: impl FnOnce(&mut [u8]) -> (R, Option<Offload>),
    ) -> (R, Result<bool, Broken>) {
        let whole = (1..=PAGE_SIZE).contains(&bytes) && matches!(self.room(bytes), Ok(true));
        if let (true, Some(&page)) = (whole, self.free.last())
            && let Some(memory) = self.pages.page_mut(page.into()).and_then(|page| page.get_mut(..bytes))
        {
            let (result, offload) = work(memory);
            let Some(offload) = offload else { return (result, Ok(true)) };
            self.free.pop();
            self.frames += 1;
            return (result, self.request(page, bytes, false, offload, true).map(|()| true));
        }
        // What was in it does not matter to whoever writes a frame.
        if scratch.len() < bytes {
            scratch.resize(bytes, 0);
        }
        let frame = scratch.get_mut(..bytes).unwrap_or_default();
        match work(frame) {
            (result, Some(offload)) => (result, self.push_with(frame, offload)),
            (result, None) => (result, Ok(true)),
        }
    }

    fn request(
        &mut self,
        page: u16,
        bytes: usize,
        more: bool,
        offload: Offload,
        first: bool,
    ) -> Result<(), Broken> {
        let gref = self.pages.references().get(usize::from(page)).copied().unwrap_or(GrantRef::new(0));
        let mut flags = if more { TxFlags::MORE_DATA } else { TxFlags::empty() };
        if first && offload.checksum_blank {
            flags |= TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED;
        }
        let segment = offload.segment.filter(|_| first);
        if segment.is_some() {
            flags |= TxFlags::EXTRA_INFO;
        }
        // At most 65535.
        let request = NetifTxRequest { gref, offset: 0, flags: flags.bits(), id: page, size: bytes as u16 };
        if let Some(away) = self.away.get_mut(usize::from(page)) {
            *away = true;
        }
        // There are no more pages than slots, and one more slot if it is needed, or there was no room.
        self.ring.push(request).map_err(|_| Broken)?;
        if let Some(size) = segment {
            let extra = NetifExtraInfo::new(Extra::Gso { size, kind: GSO_TYPE_TCPV4 }, false);
            let mut slot = NetifTxRequest::new_zeroed();
            slot.as_mut_bytes().iter_mut().zip(extra.as_bytes()).for_each(|(to, from)| *to = *from);
            self.ring.push(slot).map_err(|_| Broken)?;
            self.extras += 1;
        }
        Ok(())
    }

    /// Shows the back end what was pushed; true when it wants to be notified.
    #[must_use = "the back end sleeps if it is not notified"]
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Asks to be notified when there is room for a frame of `bytes`, and some more, so that not every answer disturbs; true when there
    /// may be already. What was pushed has been published.
    pub fn prepare_to_wait(&self, bytes: usize) -> bool {
        let away = self.away.len() - self.free.len();
        let missing = wanted(bytes).saturating_sub(self.free.len());
        let slots = self.ring.free() as usize > wanted(bytes);
        missing == 0 && slots || self.ring.prepare_to_wait_for(missing.max(away / 2).max(1) as u32)
    }
}

fn wanted(bytes: usize) -> usize {
    bytes.div_ceil(PAGE_SIZE).max(1)
}

//! Bytes of other domains, copied by the hypervisor: nothing is mapped, and one page's content may go straight into another's.
//!
//! A [`Staging`] area is memory of ours that such copies read and write.

use crate::hypercall::stub;
use crate::memory;
use crate::ring::SharedPage;
use alloc::vec;
use alloc::vec::Vec;
use hypercall_abi::grant::{GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTST_OKAY, GnttabCopy, GnttabCopyPtr};
use hypercall_abi::subops::GnttabOp;
use hypercall_abi::{DomId, GrantRef, Mfn, PAGE_SIZE};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a page that a domain has granted.
    Granted {
        /// The domain.
        domain: DomId,
        /// The page.
        gref: GrantRef,
        /// First byte in it.
        offset: u16,
    },
    /// In the staging area, from this byte on; within one page of it.
    Staging(usize),
}

/// A copy within one page on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// From here.
    pub from: Place,
    /// To here.
    pub to: Place,
    /// So many bytes.
    pub bytes: u16,
    /// OUT: it was done.
    pub done: bool,
}

/// Who copies.
pub trait Copier {
    /// Does all copies, in order and in one hypercall, and says which were done. One that fails may have copied a part.
    fn copy(&mut self, copies: &mut [Copy]);

    /// Does a copy if that takes no hypercall; false, and nothing is copied, when it would, or when it cannot be done.
    fn copy_at_hand(&mut self, _: &Copy) -> bool {
        false
    }

    /// Brings bytes of a page of ours, from byte `at` on, to a page that a domain has granted, as [`copy_at_hand`](Self::copy_at_hand).
    fn bring_at_hand(&mut self, _page: &dyn SharedPage, _at: usize, _to: Place, _bytes: usize) -> bool {
        false
    }

    /// Fetches bytes of a page that a domain has granted into a page of ours, from byte `at` on, as
    /// [`copy_at_hand`](Self::copy_at_hand).
    fn fetch_at_hand(&mut self, _from: Place, _page: &dyn SharedPage, _at: usize, _bytes: usize) -> bool {
        false
    }

    /// The staging area. Nobody looks at it or writes to it between two copies.
    fn staging(&mut self) -> &mut [u8];
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct PageBytes([u8; PAGE_SIZE]);

/// Pages of ours that the hypervisor copies from and to.
pub struct Staging {
    pages: Vec<PageBytes>,
    frames: Vec<Mfn>,
    // Kept for its memory.
    requests: Vec<GnttabCopy>,
}

impl Staging {
    /// An area of so many pages, all zeros.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        let pages = vec![PageBytes([0; PAGE_SIZE]); pages];
        // Ordinary memory is always mapped; a frame of nobody's would only be refused.
        let frame =
            |page: &PageBytes| memory::translate((&raw const *page) as u64).unwrap_or(Mfn::new(u64::MAX));
        let frames = pages.iter().map(frame).collect();
        Self { pages, frames, requests: Vec::new() }
    }

    /// One side of a copy; `None`: it is not within one page of the area.
    fn side(&self, place: Place, bytes: u16) -> Option<GnttabCopyPtr> {
        match place {
            Place::Granted { domain, gref, offset } => Some(GnttabCopyPtr::granted(gref, domain, offset)),
            Place::Staging(at) => {
                let offset = at % PAGE_SIZE;
                let frame =
                    self.frames.get(at / PAGE_SIZE).filter(|_| offset + usize::from(bytes) <= PAGE_SIZE)?;
                Some(GnttabCopyPtr::own(*frame, offset as u16))
            }
        }
    }
}

impl Copier for Staging {
    fn copy(&mut self, copies: &mut [Copy]) {
        self.requests.clear();
        for copy in &*copies {
            let flag = |place, flag| if matches!(place, Place::Granted { .. }) { flag } else { 0 };
            let request =
                self.side(copy.from, copy.bytes).zip(self.side(copy.to, copy.bytes)).map(|(source, dest)| {
                    GnttabCopy {
                        source,
                        dest,
                        len: copy.bytes,
                        flags: flag(copy.from, GNTCOPY_SOURCE_GREF) | flag(copy.to, GNTCOPY_DEST_GREF),
                        // Whatever it does not get to has failed.
                        status: -1,
                        ..GnttabCopy::default()
                    }
                });
            // One that would leave the area copies nothing, and its status is that of a failure.
            let nothing =
                GnttabCopy { flags: GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF, ..GnttabCopy::default() };
            self.requests.push(request.unwrap_or(nothing));
        }
        if !self.requests.is_empty() {
            let (at, count) = (self.requests.as_mut_ptr() as u64, self.requests.len() as u64);
            // SAFETY: as many requests as it says. What they write is granted pages, which are shared memory, and pages of this
            // area, which is borrowed mutably.
            let called = unsafe { stub::grant_table_op(u64::from(GnttabOp::Copy.number()), at, count) };
            if called.is_err() {
                self.requests.iter_mut().for_each(|request| request.status = -1);
            }
        }
        for (copy, request) in copies.iter_mut().zip(&self.requests) {
            copy.done = request.status == GNTST_OKAY && request.len == copy.bytes;
        }
    }

    fn staging(&mut self) -> &mut [u8] {
        self.pages.as_mut_bytes()
    }
}

//! `copy`: bytes between frames that the caller owns or was granted, without mapping anything.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use hypercall_abi::grant::{GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GnttabCopy, GnttabCopyPtr};
use hypercall_abi::{DomId, GrantRef, Mfn, PAGE_SIZE};

use super::Error;
use super::table::Pins;
use crate::domain::Domain;
use crate::hypervisor::Hypervisor;
use crate::page_ref::{PageRef, Writable};
use crate::platform::{FrameWords, Platform};

/// One side of a copy, held until it is released.
struct Side<'a> {
    frame: PageRef<'a>,
    pinned: Option<(Arc<Domain>, GrantRef, Pins)>,
}

impl<P: Platform> Hypervisor<P> {
    /// `copy`: one operation of the list, for the domain that calls. At most one page.
    pub fn grant_copy(&self, caller: &Arc<Domain>, op: &GnttabCopy) -> Result<(), Error> {
        let source_owner = self.side_domain(caller, &op.source, op.flags & GNTCOPY_SOURCE_GREF != 0)?;
        let dest_owner = self.side_domain(caller, &op.dest, op.flags & GNTCOPY_DEST_GREF != 0)?;
        let source = self.claim(
            caller,
            source_owner,
            &op.source,
            Pins::HOST_READ,
            op.flags & GNTCOPY_SOURCE_GREF != 0,
        )?;
        let result = self
            .claim(caller, dest_owner, &op.dest, Pins::HOST_WRITE, op.flags & GNTCOPY_DEST_GREF != 0)
            .and_then(|dest| {
                let pinned = dest.pinned;
                let result = self.copy_between(&source.frame, dest.frame, op);
                self.release(pinned);
                result
            });
        let Side { frame, pinned } = source;
        drop(frame);
        self.release(pinned);
        result
    }

    /// Whose frame a side is. Only frames of the caller itself, named as such, can be given by number.
    fn side_domain(
        &self,
        caller: &Arc<Domain>,
        side: &GnttabCopyPtr,
        granted: bool,
    ) -> Result<Arc<Domain>, Error> {
        if side.domid == DomId::SELF {
            return Ok(caller.clone());
        }
        if !granted {
            return Err(Error::NotPermitted);
        }
        self.domains.get(side.domid).ok_or(Error::BadDomain)
    }

    fn claim(
        &self,
        caller: &Domain,
        owner: Arc<Domain>,
        side: &GnttabCopyPtr,
        pins: Pins,
        granted: bool,
    ) -> Result<Side<'_>, Error> {
        if !granted {
            let frame = self.mm.get_page(side.mfn(), owner.id).ok_or(Error::BadPage)?;
            return Ok(Side { frame, pinned: None });
        }
        let mfn = {
            let mut table = owner.grants.lock();
            self.pin_grant(&mut table, &owner, side.gref(), caller.id, pins, false)?
        };
        let pinned = Some((owner.clone(), side.gref(), pins));
        match self.mm.get_page(mfn, owner.id) {
            Some(frame) => Ok(Side { frame, pinned }),
            None => {
                self.release(pinned);
                Err(Error::BadDomain)
            }
        }
    }

    fn release(&self, pinned: Option<(Arc<Domain>, GrantRef, Pins)>) {
        if let Some((owner, gref, pins)) = pinned {
            let mut table = owner.grants.lock();
            self.unpin_grant(&mut table, gref, pins);
        }
    }

    fn copy_between(&self, source: &PageRef<'_>, dest: PageRef<'_>, op: &GnttabCopy) -> Result<(), Error> {
        let (dest, debt) = dest.typed::<Writable>().map_err(|_| Error::Refused)?;
        self.mm.settle(debt, &self.platform);
        let (from, to, len) =
            (usize::from(op.source.offset), usize::from(op.dest.offset), usize::from(op.len));
        if from + len > PAGE_SIZE || to + len > PAGE_SIZE {
            return Err(Error::BadCopy);
        }
        if len == PAGE_SIZE {
            self.platform.copy_frame(source.mfn(), dest.mfn());
        } else {
            copy_bytes(self.words(source.mfn()), from, self.words(dest.mfn()), to, len);
        }
        Ok(())
    }

    fn words(&self, mfn: Mfn) -> &FrameWords {
        self.platform.frame(mfn)
    }
}

/// Copies `len` bytes between two frames, both of which guests may write meanwhile. The caller has checked the ends.
///
/// Words at the ends of the range are merged by compare-and-exchange: bytes beside it that a guest writes at the same moment
/// must not be lost.
fn copy_bytes(source: &FrameWords, from: usize, dest: &FrameWords, to: usize, len: usize) {
    let byte = |at: usize| -> u64 {
        source.get(at / 8).map_or(0, |w| w.load(Ordering::Relaxed) >> (at % 8 * 8) & 0xff)
    };
    let mut done = 0;
    while done < len {
        let (index, first) = ((to + done) / 8, (to + done) % 8);
        let count = (8 - first).min(len - done);
        let Some(word) = dest.get(index) else { return };
        if count == 8 {
            word.store(unaligned(source, from + done), Ordering::Relaxed);
        } else {
            let (mut value, mut mask) = (0u64, 0u64);
            for i in 0..count {
                value |= byte(from + done + i) << ((first + i) * 8);
                mask |= 0xff << ((first + i) * 8);
            }
            let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(old & !mask | value));
        }
        done += count;
    }
}

/// The 8 bytes at byte `at` of a frame, of which all lie in it.
fn unaligned(words: &FrameWords, at: usize) -> u64 {
    let load = |index: usize| words.get(index).map_or(0, |w| w.load(Ordering::Relaxed));
    let shift = at % 8 * 8;
    if shift == 0 { load(at / 8) } else { load(at / 8) >> shift | load(at / 8 + 1) << (64 - shift) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use core::sync::atomic::AtomicU64;
    use proptest::prelude::*;

    fn bytes(words: &FrameWords) -> Vec<u8> {
        words.iter().flat_map(|w| w.load(Ordering::SeqCst).to_le_bytes()).collect()
    }

    proptest! {
        #[test]
        fn bytes_go_where_they_should(from in 0usize..4096, to in 0usize..4096, len in 0usize..4096, seed: u64) {
            let len = len.min(4096 - from).min(4096 - to);
            let source: FrameWords = core::array::from_fn(|i| AtomicU64::new(seed.wrapping_mul(i as u64 * 2 + 1)));
            let dest: FrameWords = core::array::from_fn(|i| AtomicU64::new(!seed ^ i as u64));
            let mut expected = bytes(&dest);
            expected[to..to + len].copy_from_slice(&bytes(&source)[from..from + len]);
            copy_bytes(&source, from, &dest, to, len);
            prop_assert_eq!(bytes(&dest), expected);
        }
    }
}

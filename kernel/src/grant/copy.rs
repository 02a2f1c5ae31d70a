//! `copy`: bytes between frames that the caller owns or was granted, without mapping anything.

use alloc::sync::Arc;

use arrayvec::ArrayVec;
use hypercall_abi::grant::{GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GnttabCopy, GnttabCopyPtr};
use hypercall_abi::{DomId, GrantRef, PAGE_SIZE};

use super::Error;
use super::entry::Purpose;
use super::ops::Pinned;
use super::table::{Pins, Reach};
use crate::domain::Domain;
use crate::hypervisor::Hypervisor;
use crate::page_ref::{PageRef, TypedRef, Writable};
use crate::platform::Platform;

/// Entries in use for one side of a copy: the one that was named, and the one it stands for. Given back when dropped.
struct Held<'a, P: Platform> {
    hv: &'a Hypervisor<P>,
    entries: ArrayVec<(Arc<Domain>, GrantRef), 2>,
    pins: Pins,
}

impl<P: Platform> Drop for Held<'_, P> {
    fn drop(&mut self) {
        for (granter, gref) in &self.entries {
            self.hv.unpin_grant(&mut granter.grants.lock(), *gref, self.pins);
        }
    }
}

/// Bytes of a frame: the first, and the one after the last.
type Bytes = (usize, usize);

/// What names one side: frame or entry, whose, and which of the two it is.
type Name = (u64, DomId, bool);

/// A frame, what of it may be used, and what holds it.
type Claimed<'a, P> = (PageRef<'a>, Bytes, Held<'a, P>);

/// A frame that is read: dropped before what holds it.
struct Source<'a, P: Platform> {
    name: Name,
    frame: PageRef<'a>,
    range: Bytes,
    _held: Held<'a, P>,
}

/// A frame that is written.
struct Dest<'a, P: Platform> {
    name: Name,
    frame: TypedRef<'a, Writable>,
    range: Bytes,
    _held: Held<'a, P>,
}

/// Copies for one caller. Both sides of the last one stay claimed, so that a list that uses them again does it once, as on Xen;
/// dropping this ends that. No lock is held.
pub struct Copier<'a, P: Platform> {
    hv: &'a Hypervisor<P>,
    caller: &'a Arc<Domain>,
    source: Option<Source<'a, P>>,
    dest: Option<Dest<'a, P>>,
}

impl<'a, P: Platform> Copier<'a, P> {
    /// Nothing is claimed yet.
    pub fn new(hv: &'a Hypervisor<P>, caller: &'a Arc<Domain>) -> Copier<'a, P> {
        Copier { hv, caller, source: None, dest: None }
    }

    /// One operation of the list: at most one page.
    pub fn copy(&mut self, op: &GnttabCopy) -> Result<(), Error> {
        let result = self.try_copy(op);
        if result.is_err() {
            self.source = None;
            self.dest = None;
        }
        result
    }

    fn try_copy(&mut self, op: &GnttabCopy) -> Result<(), Error> {
        let from = name(&op.source, op.flags & GNTCOPY_SOURCE_GREF != 0);
        let to = name(&op.dest, op.flags & GNTCOPY_DEST_GREF != 0);
        if self.source.as_ref().is_none_or(|side| side.name != from) {
            self.source = None;
        }
        if self.dest.as_ref().is_none_or(|side| side.name != to) {
            self.dest = None;
        }
        if self.source.is_none() || self.dest.is_none() {
            // Both owners before either side.
            let owners = (self.owner(from)?, self.owner(to)?);
            if self.source.is_none() {
                let (frame, range, held) = self.claim(owners.0, from, Pins::HOST_READ)?;
                self.source = Some(Source { name: from, frame, range, _held: held });
            }
            if self.dest.is_none() {
                let (frame, range, held) = self.claim(owners.1, to, Pins::HOST_WRITE)?;
                let (frame, debt) = frame.typed::<Writable>().map_err(|_| Error::Refused)?;
                self.hv.mm.settle(debt, &self.hv.platform);
                self.dest = Some(Dest { name: to, frame, range, _held: held });
            }
        }
        let (Some(source), Some(dest)) = (&self.source, &self.dest) else { return Err(Error::Refused) };
        let (from, to, len) =
            (usize::from(op.source.offset), usize::from(op.dest.offset), usize::from(op.len));
        if from + len > PAGE_SIZE || to + len > PAGE_SIZE {
            return Err(Error::BadCopy);
        }
        let lies_in = |range: Bytes, first| range.0 <= first && first + len <= range.1;
        if !lies_in(source.range, from) || !lies_in(dest.range, to) {
            return Err(Error::Refused);
        }
        let (source, dest) = (source.frame.mfn(), dest.frame.mfn());
        if len == PAGE_SIZE {
            self.hv.platform.copy_frame(source, dest);
        } else {
            self.hv.platform.copy_bytes((source, from), (dest, to), len);
        }
        Ok(())
    }

    /// Whose frame a side is. Only frames of the caller itself, named as such, can be given by number.
    fn owner(&self, (_, domid, granted): Name) -> Result<Arc<Domain>, Error> {
        if domid == DomId::SELF {
            return Ok(self.caller.clone());
        }
        let owner = self.hv.domains.get(domid).ok_or(Error::BadDomain)?;
        if granted { Ok(owner) } else { Err(Error::NotPermitted) }
    }

    /// A side's frame, the bytes of it that may be used, and what holds it.
    fn claim(
        &self,
        owner: Arc<Domain>,
        (number, _, granted): Name,
        pins: Pins,
    ) -> Result<Claimed<'a, P>, Error> {
        let mut held = Held { hv: self.hv, entries: ArrayVec::new(), pins };
        if !granted {
            let frame = self.hv.mm.get_page(hypercall_abi::Mfn::new(number), owner.id);
            return Ok((frame.ok_or(Error::BadPage)?, (0, PAGE_SIZE), held));
        }
        let (mut granter, mut gref, mut user) = (owner, GrantRef::new(number as u32), self.caller.id);
        loop {
            let pinned = {
                let mut table = granter.grants.lock();
                self.hv.pin_grant(&mut table, &granter, gref, user, pins, Purpose::Copy)?
            };
            held.entries.push((granter.clone(), gref));
            match pinned {
                Pinned::Frame(mfn, reach) => {
                    let frame = self.hv.mm.get_page(mfn, granter.id).ok_or(Error::BadDomain)?;
                    let range = match reach {
                        Reach::Part { start, end } => (usize::from(start), usize::from(end)),
                        _ => (0, PAGE_SIZE),
                    };
                    return Ok((frame, range, held));
                }
                // An entry stands for another one, but not for one that stands for a third: no chains, so no loops.
                Pinned::Transitive(..) if held.entries.is_full() => return Err(Error::Refused),
                Pinned::Transitive(domain, entry) => {
                    user = granter.id;
                    granter = self.hv.domains.get(domain).ok_or(Error::Refused)?;
                    gref = entry;
                }
            }
        }
    }
}

fn name(side: &GnttabCopyPtr, granted: bool) -> Name {
    // The upper half of a reference is not looked at.
    let number = if granted { u64::from(side.gref().get()) } else { side.u };
    (number, side.domid, granted)
}

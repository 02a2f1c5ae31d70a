//! Bytes of guests, copied: by ourselves where their pages are mapped, by the hypervisor where they are not.

use alloc::vec::Vec;
use guest_sdk::compartment::Fuse;
use guest_sdk::copy::{Copier, Copy, Place, Staging};
use guest_sdk::grants::{Lease, MapPool, MappedPage};
use guest_sdk::memory::Access;
use guest_sdk::ring::{SharedPage, copy_between};
use hypercall_abi::io::netif::{CTRL_GREF_READONLY, ControlGref};
use hypercall_abi::{DomId, GrantRef, PAGE_SIZE};
use netback::control::Keeper;
use zerocopy::{FromBytes, IntoBytes};

/// Grants from this one on are not kept: tables reach to the highest that is. A guest has 512 of them for each frame of its grant table.
const MOST_GRANTS: usize = 64 * 512;

/// A page of a guest's that stays mapped.
struct Kept {
    page: MappedPage,
    writable: bool,
}

/// Pages that stay mapped: found by guest and grant in three steps of an index each, since each frame is looked up twice.
#[derive(Default)]
struct Pages {
    /// By guest, where in `guests`, from 1 on.
    places: Vec<u16>,
    guests: Vec<Grants>,
    free: Vec<u16>,
    pages: Vec<Option<Kept>>,
    free_pages: Vec<u32>,
}

/// A guest's pages.
#[derive(Default)]
struct Grants {
    /// By grant, where in the list of pages, from 1 on.
    places: Vec<u32>,
    count: usize,
}

impl Pages {
    fn is_empty(&self) -> bool {
        self.guests.len() == self.free.len()
    }

    fn guest(&self, domain: DomId) -> Option<usize> {
        usize::from(*self.places.get(usize::from(domain.get()))?).checked_sub(1)
    }

    fn get(&self, domain: DomId, gref: GrantRef) -> Option<&Kept> {
        let place = *self.guests.get(self.guest(domain)?)?.places.get(gref.get() as usize)?;
        self.pages.get((place as usize).checked_sub(1)?)?.as_ref()
    }

    /// Adds one that is not there; its grant is less than [`MOST_GRANTS`].
    fn insert(&mut self, domain: DomId, gref: GrantRef, kept: Kept) {
        let (domain, gref) = (usize::from(domain.get()), gref.get() as usize);
        if self.places.len() <= domain {
            self.places.resize(domain + 1, 0);
        }
        let Some(place) = self.places.get_mut(domain) else { return };
        if *place == 0 {
            *place = self.free.pop().unwrap_or_else(|| {
                self.guests.push(Grants::default());
                // There are fewer domains than 65535.
                self.guests.len() as u16
            });
        }
        let Some(grants) = self.guests.get_mut(usize::from(*place) - 1) else { return };
        let page = self.free_pages.pop().unwrap_or_else(|| {
            self.pages.push(None);
            self.pages.len() as u32
        });
        if let Some(place) = self.pages.get_mut(page as usize - 1) {
            *place = Some(kept);
        }
        if grants.places.len() <= gref {
            grants.places.resize(gref + 1, 0);
        }
        if let Some(place) = grants.places.get_mut(gref) {
            *place = page;
            grants.count += 1;
        }
    }

    fn remove(&mut self, domain: DomId, gref: GrantRef) -> Option<Kept> {
        let guest = self.guest(domain)?;
        let grants = self.guests.get_mut(guest)?;
        let place = core::mem::take(grants.places.get_mut(gref.get() as usize)?);
        let kept = self.pages.get_mut((place as usize).checked_sub(1)?)?.take();
        self.free_pages.push(place);
        grants.count -= 1;
        if grants.count == 0 {
            *grants = Grants::default();
            if let Some(place) = self.places.get_mut(usize::from(domain.get())) {
                self.free.push(core::mem::take(place));
            }
        }
        kept
    }
}

/// Who copies for network cards.
pub struct Carrier {
    staging: Staging,
    kept: Pages,
    // Kept for its memory: what the hypervisor is to do, and where each was in the list.
    rest: Vec<Copy>,
    places: Vec<usize>,
    /// For tests: of the card whose turn it is.
    pub fuse: Fuse,
}

impl Carrier {
    /// One with so many pages of a staging area.
    pub fn new(pages: usize) -> Self {
        Self {
            staging: Staging::new(pages),
            kept: Pages::default(),
            rest: Vec::new(),
            places: Vec::new(),
            fuse: Fuse::new(),
        }
    }

    /// A page to be read; `None` when it is not mapped.
    #[inline]
    fn mapped(&self, place: Place, bytes: usize, write: bool) -> Option<(&MappedPage, usize)> {
        let Place::Granted { domain, gref, offset } = place else { return None };
        let offset = usize::from(offset);
        let kept = self.kept.get(domain, gref)?;
        (offset + bytes <= PAGE_SIZE && (kept.writable || !write)).then_some((&kept.page, offset))
    }

    /// Does a copy if all that it takes is at hand.
    fn copy_here(&mut self, copy: &Copy) -> bool {
        let bytes = usize::from(copy.bytes);
        match (copy.from, copy.to) {
            (Place::Granted { domain, gref, offset }, Place::Staging(at)) => {
                let Self { staging, kept, .. } = self;
                let page = kept.get(domain, gref);
                let to = staging.staging().get_mut(at..at + bytes);
                match (page, to) {
                    (Some(kept), Some(to)) if usize::from(offset) + bytes <= PAGE_SIZE => {
                        kept.page.read_bytes(offset.into(), to);
                        true
                    }
                    _ => false,
                }
            }
            (Place::Staging(at), Place::Granted { domain, gref, offset }) => {
                let Self { staging, kept, .. } = self;
                let page = kept.get(domain, gref).filter(|kept| kept.writable);
                match (page, staging.staging().get(at..at + bytes)) {
                    (Some(kept), Some(from)) if usize::from(offset) + bytes <= PAGE_SIZE => {
                        kept.page.write_bytes(offset.into(), from);
                        true
                    }
                    _ => false,
                }
            }
            (from, to) => match self.mapped(from, bytes, false).zip(self.mapped(to, bytes, true)) {
                Some(((source, from), (dest, to))) => {
                    copy_between(source, from, dest, to, bytes);
                    true
                }
                None => false,
            },
        }
    }
}

impl Copier for Carrier {
    fn copy(&mut self, copies: &mut [Copy]) {
        self.fuse.reached();
        if self.kept.is_empty() {
            return self.staging.copy(copies);
        }
        let (mut rest, mut places) = (core::mem::take(&mut self.rest), core::mem::take(&mut self.places));
        for (index, copy) in copies.iter_mut().enumerate() {
            copy.done = self.copy_here(copy);
            if !copy.done {
                rest.push(*copy);
                places.push(index);
            }
        }
        if !rest.is_empty() {
            self.staging.copy(&mut rest);
            for (copy, index) in rest.drain(..).zip(places.drain(..)) {
                if let Some(place) = copies.get_mut(index) {
                    *place = copy;
                }
            }
        }
        (self.rest, self.places) = (rest, places);
    }

    fn copy_at_hand(&mut self, copy: &Copy) -> bool {
        self.fuse.reached();
        self.copy_here(copy)
    }

    fn bring_at_hand(&mut self, page: &dyn SharedPage, at: usize, to: Place, bytes: usize) -> bool {
        self.fuse.reached();
        let Some((dest, to)) = self.mapped(to, bytes, true) else { return false };
        copy_between(page, at, dest, to, bytes);
        true
    }

    fn fetch_at_hand(&mut self, from: Place, page: &dyn SharedPage, at: usize, bytes: usize) -> bool {
        self.fuse.reached();
        let Some((source, from)) = self.mapped(from, bytes, false) else { return false };
        copy_between(source, from, page, at, bytes);
        true
    }

    fn staging(&mut self) -> &mut [u8] {
        self.staging.staging()
    }
}

/// Maps pages of one card's guest.
pub struct CardPages {
    domain: DomId,
    pool: MapPool,
    grants: Vec<GrantRef>,
}

impl CardPages {
    /// Of this guest, so many at most.
    pub fn new(domain: DomId, most: usize) -> Self {
        Self { domain, pool: MapPool::new(domain, most), grants: Vec::new() }
    }

    /// The means to unmap them all without having them.
    pub fn lease(&self) -> Lease {
        self.pool.lease()
    }

    /// Unmaps all of them.
    pub fn release(&mut self, carrier: &mut Carrier) {
        let domain = self.domain;
        let kept = self.grants.drain(..).filter_map(|gref| carrier.kept.remove(domain, gref));
        self.pool.unmap(&mut kept.map(|kept| kept.page).collect());
    }
}

/// A card's pages, and where they are put.
pub struct Keeping<'a>(pub &'a mut CardPages, pub &'a mut Carrier);

impl Keeping<'_> {
    /// Moves a list between a page of the guest's and the staging area.
    fn list(&mut self, page: GrantRef, bytes: usize, write: bool) -> bool {
        let granted = Place::Granted { domain: self.0.domain, gref: page, offset: 0 };
        let (from, to) = if write { (Place::Staging(0), granted) } else { (granted, Place::Staging(0)) };
        let mut copies = [Copy { from, to, bytes: bytes as u16, done: false }];
        self.1.copy(&mut copies);
        copies.iter().all(|copy| copy.done)
    }
}

impl Keeper for Keeping<'_> {
    fn read(&mut self, page: GrantRef, list: &mut [ControlGref]) -> bool {
        let bytes = size_of_val(list);
        if !self.list(page, bytes, false) {
            return false;
        }
        let from = self.1.staging().get(..bytes).unwrap_or_default();
        for (entry, bytes) in list.iter_mut().zip(from.chunks(size_of::<ControlGref>())) {
            *entry = ControlGref::read_from_bytes(bytes).unwrap_or_default();
        }
        true
    }

    fn write(&mut self, page: GrantRef, list: &[ControlGref]) -> bool {
        let from = list.as_bytes();
        let Some(place) = self.1.staging().get_mut(..from.len()) else { return false };
        place.copy_from_slice(from);
        self.list(page, from.len(), true)
    }

    fn add(&mut self, list: &[ControlGref]) -> bool {
        let Self(pages, carrier) = self;
        let bad = |(index, entry): (usize, &ControlGref)| {
            entry.gref.get() as usize >= MOST_GRANTS
                || carrier.kept.get(pages.domain, entry.gref).is_some()
                || list.iter().take(index).any(|other| other.gref == entry.gref)
        };
        if list.iter().enumerate().any(bad) {
            return false;
        }
        let writable = |entry: &ControlGref| entry.flags & CTRL_GREF_READONLY == 0;
        let access = |entry: &ControlGref| if writable(entry) { Access::ReadWrite } else { Access::Read };
        let mut mapped = Vec::new();
        pages.pool.map(list.iter().map(|entry| (entry.gref, access(entry))), &mut mapped);
        if mapped.iter().any(Option::is_none) {
            pages.pool.unmap(&mut mapped.into_iter().flatten().collect());
            return false;
        }
        for (entry, page) in list.iter().zip(mapped.into_iter().flatten()) {
            carrier.kept.insert(pages.domain, entry.gref, Kept { page, writable: writable(entry) });
            pages.grants.push(entry.gref);
        }
        true
    }

    fn remove(&mut self, page: GrantRef) -> bool {
        let Self(pages, carrier) = self;
        if !pages.grants.contains(&page) {
            return false;
        }
        pages.grants.retain(|other| *other != page);
        let kept = carrier.kept.remove(pages.domain, page);
        pages.pool.unmap(&mut kept.map(|kept| kept.page).into_iter().collect());
        true
    }
}

//! A front end's pages, by grant reference: mapped for one request, or kept.
//!
//! With persistent grants the front end uses the same references again and again, so a mapped page is kept and found by its reference.
//! The table has a place for each reference, by its lowest bits: finding is one comparison. It grows until no two references in use share
//! a place, as far as it may; then the one that was used long ago makes room. A page that has no place is mapped for its request only.

use crate::disk::GuestPage;
use alloc::vec::Vec;
use hypercall_abi::GrantRef;

/// Most pages kept mapped for a device, shared evenly among its rings: 4 MiB, and as many of the hypervisor's handles, of which all back
/// ends of a domain have some 260,000.
pub const MOST: usize = 1024;
/// Places to begin with.
const FIRST: usize = 64;
/// After so many turns without use a page makes room for another of the same place.
const STALE_TURNS: u32 = 256;

/// A page that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// By which grant.
    pub reference: GrantRef,
    /// To write to it.
    pub writable: bool,
}

/// Maps pages of one front end.
pub trait Mapper {
    /// A mapped page.
    type Page: GuestPage;

    /// Maps pages, in one hypercall: pushes one to `mapped` for each that is wanted, in order; `None` for what is not granted so.
    fn map(&mut self, wanted: &[Wanted], mapped: &mut Vec<Option<Self::Page>>);

    /// Ends mappings, in one hypercall. A page with clones elsewhere stays mapped until the last of them is gone.
    fn unmap(&mut self, pages: &mut Vec<Self::Page>);
}

struct Kept<P> {
    reference: GrantRef,
    used: u32,
    page: P,
}

/// Pages that stay mapped.
pub(crate) struct Cache<P> {
    /// A power of two of places, or none at all.
    places: Vec<Option<Kept<P>>>,
    mask: u32,
    kept: usize,
    turn: u32,
    /// Most places, a power of two; 0 to keep none.
    most: usize,
}

impl<P: Clone> Cache<P> {
    /// An empty one for `most` pages, rounded down to a power of two; with 0 it stays empty.
    pub fn new(most: usize) -> Self {
        let most = most.checked_ilog2().map_or(0, |log| 1 << log);
        Self { places: Vec::new(), mask: 0, kept: 0, turn: 0, most }
    }

    /// Whether pages are kept.
    pub fn is_on(&self) -> bool {
        self.most > 0
    }

    /// A new turn begins: what is looked up from here on has been used in it.
    pub fn next_turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }

    /// Whether a page is kept; then it is used in this turn, and stays.
    pub fn touch(&mut self, reference: GrantRef) -> bool {
        let place = (reference.get() & self.mask) as usize;
        match self.places.get_mut(place) {
            Some(Some(kept)) if kept.reference == reference => {
                kept.used = self.turn;
                true
            }
            _ => false,
        }
    }

    /// A page that is kept, and used in this turn; it stays.
    pub fn take(&mut self, reference: GrantRef) -> Option<P> {
        let place = (reference.get() & self.mask) as usize;
        match self.places.get_mut(place) {
            Some(Some(kept)) if kept.reference == reference => {
                kept.used = self.turn;
                Some(kept.page.clone())
            }
            _ => None,
        }
    }

    /// A page that is kept.
    pub fn get(&self, reference: GrantRef) -> Option<P> {
        let place = (reference.get() & self.mask) as usize;
        match self.places.get(place) {
            Some(Some(kept)) if kept.reference == reference => Some(kept.page.clone()),
            _ => None,
        }
    }

    /// Keeps a page that is not kept yet. What had to make room for it goes to `unused`.
    ///
    /// # Errors
    /// The page, when there is no place for it.
    pub fn keep(&mut self, reference: GrantRef, page: P, unused: &mut Vec<P>) -> Result<(), P> {
        if !self.is_on() {
            return Err(page);
        }
        if self.places.is_empty() {
            self.resize(FIRST.min(self.most));
        }
        loop {
            let place = (reference.get() & self.mask) as usize;
            let count = self.places.len();
            let Some(there) = self.places.get_mut(place) else { return Err(page) };
            match there {
                Some(old) if self.turn.wrapping_sub(old.used) > STALE_TURNS => {
                    let old = there.replace(Kept { reference, used: self.turn, page });
                    unused.extend(old.map(|old| old.page));
                    return Ok(());
                }
                Some(_) if count < self.most => self.resize(count * 2),
                Some(_) => return Err(page),
                None => {
                    *there = Some(Kept { reference, used: self.turn, page });
                    self.kept += 1;
                    return Ok(());
                }
            }
        }
    }

    /// Two references that differ in the lower bits differ in more bits, too: nothing is lost.
    fn resize(&mut self, count: usize) {
        let old = core::mem::take(&mut self.places);
        self.places.resize_with(count, || None);
        self.mask = count as u32 - 1;
        for kept in old.into_iter().flatten() {
            let place = (kept.reference.get() & self.mask) as usize;
            if let Some(there) = self.places.get_mut(place) {
                *there = Some(kept);
            }
        }
    }

    /// Gives up all pages.
    pub fn clear(&mut self, unused: &mut Vec<P>) {
        self.kept = 0;
        let pages = core::mem::take(&mut self.places).into_iter().flatten().map(|kept| kept.page);
        unused.extend(pages);
    }

    /// Pages kept now.
    pub fn len(&self) -> usize {
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::{Cache, FIRST, MOST, STALE_TURNS};
    use alloc::vec::Vec;
    use hypercall_abi::GrantRef;

    fn keep(cache: &mut Cache<u32>, number: u32, unused: &mut Vec<u32>) -> bool {
        cache.keep(GrantRef::new(number), number, unused).is_ok()
    }

    #[test]
    fn kept_pages_are_found_and_bounded() {
        let (mut cache, mut unused) = (Cache::new(MOST), Vec::new());
        assert!(!cache.touch(GrantRef::new(8)));
        for number in 0..3 * MOST as u32 {
            assert_eq!(keep(&mut cache, number, &mut unused), number < MOST as u32, "{number}");
        }
        assert_eq!((cache.len(), unused.len()), (MOST, 0));
        for number in 0..MOST as u32 {
            assert_eq!(cache.get(GrantRef::new(number)), Some(number));
        }
        cache.clear(&mut unused);
        assert_eq!((cache.len(), unused.len()), (0, MOST));
        assert!(keep(&mut cache, 77, &mut unused), "it can begin anew");
    }

    #[test]
    fn it_grows_only_as_far_as_references_need() {
        let (mut cache, mut unused) = (Cache::new(MOST), Vec::new());
        for number in 100..100 + FIRST as u32 {
            assert!(keep(&mut cache, number, &mut unused));
        }
        assert_eq!(cache.places.len(), FIRST, "neighbours have places of their own");
        assert!(keep(&mut cache, 100 + 3 * FIRST as u32, &mut unused));
        assert_eq!(cache.places.len(), 2 * FIRST);
        assert_eq!(cache.len(), FIRST + 1);
    }

    #[test]
    fn what_was_used_long_ago_makes_room() {
        let (mut cache, mut unused) = (Cache::new(MOST), Vec::new());
        assert!(keep(&mut cache, 5, &mut unused));
        for _ in 0..STALE_TURNS {
            cache.next_turn();
        }
        assert!(cache.touch(GrantRef::new(5)));
        cache.next_turn();
        let wild = 5 + (MOST as u32) * 1000;
        assert!(!keep(&mut cache, wild, &mut unused), "in use a moment ago");
        for _ in 0..=STALE_TURNS {
            cache.next_turn();
        }
        assert!(keep(&mut cache, wild, &mut unused));
        assert_eq!(unused, [5]);
        assert!(cache.touch(GrantRef::new(wild)) && !cache.touch(GrantRef::new(5)));
    }

    #[test]
    fn without_persistent_grants_nothing_is_kept() {
        let (mut cache, mut unused) = (Cache::new(0), Vec::new());
        assert!(!keep(&mut cache, 5, &mut unused) && cache.len() == 0);
        let mut few = Cache::new(300);
        assert_eq!((0..1000).filter(|&number| keep(&mut few, number, &mut unused)).count(), 256);
    }
}

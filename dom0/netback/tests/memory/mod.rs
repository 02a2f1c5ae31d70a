//! Guests' pages with their grants, in memory of this process, and what the hypervisor does with them for dom0.

use guest_sdk::copy::{Copier, Copy, Place};
use guest_sdk::net::Pages;
use guest_sdk::ring::host::HostPages;
use guest_sdk::ring::{SharedPage, copy_between};
use hypercall_abi::{DomId, GrantRef, PAGE_SIZE};
use netback::network::STAGING_BYTES;
use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::AtomicU32;

/// What pages hold before anybody writes to them.
const FILL: u32 = 0xcccc_cccc;

/// Pages of a guest, which the back end reaches by their grants.
#[derive(Clone)]
pub struct Granted {
    pages: HostPages,
    pub references: Rc<[GrantRef]>,
    /// The other end holds on to them: none can be withdrawn.
    pub held: Rc<Cell<bool>>,
}

impl Granted {
    /// So many, with the grants from `first` on.
    pub fn new(first: u32, pages: u32) -> Self {
        Self {
            pages: HostPages::new(pages as usize, FILL),
            references: (first..first + pages).map(GrantRef::new).collect(),
            held: Rc::default(),
        }
    }
}

impl SharedPage for Granted {
    fn size(&self) -> usize {
        self.pages.size()
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.pages.read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.pages.write_bytes(offset, from);
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        self.pages.word(offset)
    }
}

impl Pages for Granted {
    type Own<'a> = Vec<u8>;
    fn references(&self) -> &[GrantRef] {
        &self.references
    }
    fn withdraw(&mut self, page: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.read_bytes(page * PAGE_SIZE, &mut bytes);
        (!self.held.get()).then_some(bytes)
    }
    fn page_mut(&mut self, _: usize) -> Option<&mut [u8]> {
        None
    }
}

/// What the hypervisor does for dom0.
pub struct Host {
    /// By guest and grant: the pages, which of them, and whether they may be written to.
    pub granted: HashMap<(u16, u32), (Granted, usize, bool)>,
    staging: Vec<u8>,
    /// How often it was asked for a copy of what is at hand.
    asked: usize,
}

impl Host {
    /// One that no guest has granted anything.
    pub fn new() -> Self {
        Self { granted: HashMap::new(), staging: vec![0; STAGING_BYTES], asked: 0 }
    }

    /// A guest grants pages.
    pub fn grant(&mut self, domain: u16, pages: &Granted, writable: bool) {
        for (page, gref) in pages.references.iter().enumerate() {
            self.granted.insert((domain, gref.get()), (pages.clone(), page, writable));
        }
    }

    fn page(&self, domain: DomId, gref: GrantRef) -> Option<&(Granted, usize, bool)> {
        self.granted.get(&(domain.get(), gref.get()))
    }
}

impl Copier for Host {
    fn copy(&mut self, copies: &mut [Copy]) {
        for copy in copies {
            let mut bytes = vec![0; copy.bytes.into()];
            match copy.from {
                Place::Granted { domain, gref, offset } => {
                    let Some((pages, page, _)) = self.page(domain, gref) else { continue };
                    assert!(usize::from(offset) + bytes.len() <= PAGE_SIZE);
                    pages.read_bytes(page * PAGE_SIZE + usize::from(offset), &mut bytes);
                }
                Place::Staging(at) => {
                    assert!(at % PAGE_SIZE + bytes.len() <= PAGE_SIZE);
                    bytes.copy_from_slice(&self.staging[at..][..usize::from(copy.bytes)]);
                }
            }
            match copy.to {
                Place::Granted { domain, gref, offset } => {
                    let Some((pages, page, true)) = self.page(domain, gref) else { continue };
                    assert!(usize::from(offset) + bytes.len() <= PAGE_SIZE);
                    pages.write_bytes(page * PAGE_SIZE + usize::from(offset), &bytes);
                }
                Place::Staging(at) => {
                    assert!(at % PAGE_SIZE + bytes.len() <= PAGE_SIZE);
                    self.staging[at..at + bytes.len()].copy_from_slice(&bytes);
                }
            }
            copy.done = true;
        }
    }

    /// Most pages are at hand: two of three, so that frames go both ways, in turns.
    fn copy_at_hand(&mut self, copy: &Copy) -> bool {
        self.asked += 1;
        let mut copies = [*copy];
        if !self.asked.is_multiple_of(3) {
            self.copy(&mut copies);
        }
        copies[0].done
    }

    fn bring_at_hand(&mut self, page: &dyn SharedPage, at: usize, to: Place, bytes: usize) -> bool {
        self.asked += 1;
        let Place::Granted { domain, gref, offset } = to else { return false };
        let Some((to, number, true)) = self.page(domain, gref) else { return false };
        if self.asked.is_multiple_of(3) {
            return false;
        }
        copy_between(page, at, to, number * PAGE_SIZE + usize::from(offset), bytes);
        true
    }

    fn fetch_at_hand(&mut self, from: Place, page: &dyn SharedPage, at: usize, bytes: usize) -> bool {
        self.asked += 1;
        let Place::Granted { domain, gref, offset } = from else { return false };
        let Some((from, number, _)) = self.page(domain, gref) else { return false };
        if self.asked.is_multiple_of(3) {
            return false;
        }
        copy_between(from, number * PAGE_SIZE + usize::from(offset), page, at, bytes);
        true
    }

    fn staging(&mut self) -> &mut [u8] {
        &mut self.staging
    }
}

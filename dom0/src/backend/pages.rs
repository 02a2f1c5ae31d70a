//! Pages of a guest's, mapped for a back end.

use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::disk::GuestPage;
use blkback::grants::{Mapper, Wanted};
use core::sync::atomic::AtomicU32;
use guest_sdk::compartment::Fuse;
use guest_sdk::grants::{Lease, MapPool, MappedPage};
use guest_sdk::hardware::DmaPage;
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;
use hypercall_abi::{DomId, MachAddr};

/// A page that disks read and write. One pointer: pages are cloned for each segment of a request.
#[derive(Clone)]
pub struct Page(Arc<Memory>);

enum Memory {
    /// A guest's.
    Guest(MappedPage),
    /// Our own.
    Own(DmaPage),
}

/// A page of our own; none when there is no memory.
pub fn own_page() -> Option<Page> {
    DmaPage::new().ok().map(|page| Page(Arc::new(Memory::Own(page))))
}

impl SharedPage for Page {
    fn size(&self) -> usize {
        match &*self.0 {
            Memory::Guest(page) => page.size(),
            Memory::Own(page) => page.size(),
        }
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        match &*self.0 {
            Memory::Guest(page) => page.read_bytes(offset, to),
            Memory::Own(page) => page.read_bytes(offset, to),
        }
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        match &*self.0 {
            Memory::Guest(page) => page.write_bytes(offset, from),
            Memory::Own(page) => page.write_bytes(offset, from),
        }
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        match &*self.0 {
            Memory::Guest(page) => page.word(offset),
            Memory::Own(page) => page.word(offset),
        }
    }
}

impl GuestPage for Page {
    fn machine_address(&self) -> MachAddr {
        match &*self.0 {
            Memory::Guest(page) => page.machine_address(),
            Memory::Own(page) => page.machine_address(),
        }
    }
}

/// A ring whose use may be made to panic, for tests.
pub struct Fused<M> {
    page: M,
    fuse: Arc<Fuse>,
}

impl<M> Fused<M> {
    /// The same ring, with a fuse.
    pub fn new(page: M, fuse: Arc<Fuse>) -> Self {
        Self { page, fuse }
    }
}

impl<M: SharedPage> SharedPage for Fused<M> {
    fn size(&self) -> usize {
        self.page.size()
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.fuse.reached();
        self.page.read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.fuse.reached();
        self.page.write_bytes(offset, from);
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        self.fuse.reached();
        self.page.word(offset)
    }
}

/// Maps them.
pub struct Pages {
    pool: MapPool,
    mapped: Vec<Option<MappedPage>>,
    unused: Vec<MappedPage>,
}

impl Pages {
    /// Pages of `guest`, `most` at a time.
    pub fn new(guest: DomId, most: usize) -> Self {
        Self { pool: MapPool::new(guest, most), mapped: Vec::new(), unused: Vec::new() }
    }

    /// The means to unmap them all.
    pub fn lease(&self) -> Lease {
        self.pool.lease()
    }
}

impl Mapper for Pages {
    type Page = Page;

    fn map(&mut self, wanted: &[Wanted], mapped: &mut Vec<Option<Page>>) {
        let access = |writable| if writable { Access::ReadWrite } else { Access::Read };
        let wanted = wanted.iter().map(|wanted| (wanted.reference, access(wanted.writable)));
        self.pool.map(wanted, &mut self.mapped);
        mapped.extend(self.mapped.drain(..).map(|page| page.map(|page| Page(Arc::new(Memory::Guest(page))))));
    }

    fn unmap(&mut self, pages: &mut Vec<Page>) {
        // One that somebody else has, too, ends with the last of them.
        self.unused.extend(pages.drain(..).filter_map(|page| match Arc::into_inner(page.0)? {
            Memory::Guest(page) => Some(page),
            Memory::Own(_) => None,
        }));
        self.pool.unmap(&mut self.unused);
    }
}

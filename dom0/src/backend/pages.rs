//! Pages of a guest's, mapped for a back end.

use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::disk::GuestPage;
use blkback::grants::{Mapper, Wanted};
use core::sync::atomic::AtomicU32;
use guest_sdk::grants::{MapPool, MappedPage};
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;
use hypercall_abi::{DomId, MachAddr};

/// A page of a guest's.
#[derive(Clone)]
pub struct Page(Arc<MappedPage>);

impl SharedPage for Page {
    fn size(&self) -> usize {
        self.0.size()
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.0.read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.0.write_bytes(offset, from);
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        self.0.word(offset)
    }
}

impl GuestPage for Page {
    fn machine_address(&self) -> MachAddr {
        self.0.machine_address()
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
}

impl Mapper for Pages {
    type Page = Page;

    fn map(&mut self, wanted: &[Wanted], mapped: &mut Vec<Option<Page>>) {
        let access = |writable| if writable { Access::ReadWrite } else { Access::Read };
        let wanted = wanted.iter().map(|wanted| (wanted.reference, access(wanted.writable)));
        self.pool.map(wanted, &mut self.mapped);
        mapped.extend(self.mapped.drain(..).map(|page| page.map(|page| Page(Arc::new(page)))));
    }

    fn unmap(&mut self, pages: &mut Vec<Page>) {
        // One that somebody else has, too, ends with the last of them.
        self.unused.extend(pages.drain(..).filter_map(|page| Arc::into_inner(page.0)));
        self.pool.unmap(&mut self.unused);
    }
}

//! Pages of a guest's, mapped for a back end.

use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::disk::GuestPage;
use blkback::grants::{Mapper, Wanted};
use core::sync::atomic::AtomicU32;
use guest_sdk::grants::{MapPool, MappedPage};
use guest_sdk::hardware::DmaPage;
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;
use hypercall_abi::{DomId, MachAddr};

/// A page that disks read and write.
#[derive(Clone)]
pub enum Page {
    /// A guest's.
    Guest(Arc<MappedPage>),
    /// Our own.
    Own(Arc<DmaPage>),
}

impl Page {
    fn shared(&self) -> &dyn SharedPage {
        match self {
            Self::Guest(page) => &**page,
            Self::Own(page) => &**page,
        }
    }
}

/// A page of our own; none when there is no memory.
pub fn own_page() -> Option<Page> {
    DmaPage::new().ok().map(|page| Page::Own(Arc::new(page)))
}

impl SharedPage for Page {
    fn size(&self) -> usize {
        self.shared().size()
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        match self {
            // Without a look at a table of functions: all that goes to a disk in memory comes through here.
            Self::Guest(page) => page.read_bytes(offset, to),
            Self::Own(page) => page.read_bytes(offset, to),
        }
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        match self {
            Self::Guest(page) => page.write_bytes(offset, from),
            Self::Own(page) => page.write_bytes(offset, from),
        }
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        self.shared().word(offset)
    }
}

impl GuestPage for Page {
    fn machine_address(&self) -> MachAddr {
        match self {
            Self::Guest(page) => page.machine_address(),
            Self::Own(page) => page.machine_address(),
        }
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
        mapped.extend(self.mapped.drain(..).map(|page| page.map(|page| Page::Guest(Arc::new(page)))));
    }

    fn unmap(&mut self, pages: &mut Vec<Page>) {
        // One that somebody else has, too, ends with the last of them.
        self.unused.extend(pages.drain(..).filter_map(|page| match page {
            Page::Guest(page) => Arc::into_inner(page),
            Page::Own(_) => None,
        }));
        self.pool.unmap(&mut self.unused);
    }
}

//! Where everything lies when a domain starts: pure arithmetic, done before any memory is touched.
//!
//! ```text
//! pfn 0 = VIRT_BASE                                                                            region end
//!   | gap | image | module | p2m list | start_info | store | console | page tables | stack | padding |
//!   behind it, not mapped from VIRT_BASE: module (MOD_START_PFN), p2m list and its tables (INIT_P2M)
//! ```
//! Xen's tools lay domains out in this order and guests rely on it. The region ends on a 4 MiB border with at least
//! 512 KiB of padding. Ours alone: where the domain has less memory than that, the region ends with the memory.

use crate::image::{Kernel, Role};
use crate::tables::{self, Area, Tables};
use crate::{PAGE_SIZE, page_down};
use core::fmt;
use hypercall_abi::{Pfn, VirtAddr};

/// Padding behind the boot stack that a kernel may count on, in pages.
const PADDING: u64 = 512 * 1024 / PAGE_SIZE;
/// The boot region ends at a multiple of this, in pages.
const REGION_ALIGN: u64 = 4 * 1024 * 1024 / PAGE_SIZE;
/// Frames that 52 bits of physical address can name.
const MAX_PAGES: u64 = 1 << 40;
/// Entries of the p2m list in a page.
pub(crate) const LIST_ENTRIES: u64 = PAGE_SIZE / 8;

/// Frames in a row, in the domain's own counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first frame.
    pub first: Pfn,
    /// Their number.
    pub pages: u64,
}

impl Extent {
    pub(crate) const fn new(first: u64, pages: u64) -> Self {
        Self { first: Pfn::new(first), pages }
    }

    /// Number of the frame behind the last.
    pub const fn end(self) -> u64 {
        // Extents are made by Layout::plan, within MAX_PAGES.
        self.first.get() + self.pages
    }

    /// Whether `pfn` is one of them.
    pub const fn contains(self, pfn: Pfn) -> bool {
        pfn.get() >= self.first.get() && pfn.get() - self.first.get() < self.pages
    }

    /// The frame at `index`, if there are that many.
    pub fn nth(self, index: u64) -> Option<Pfn> {
        (index < self.pages).then(|| Pfn::new(self.first.get() + index))
    }
}

/// Why a kernel does not fit a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayoutError {
    /// The domain has fewer pages than the kernel needs to start.
    NotEnoughMemory { needed: u64, available: u64 },
    /// More pages than machine addresses can name.
    TooMuchMemory { pages: u64, limit: u64 },
    /// Something would lie outside the canonical range or in the hypervisor's part of it.
    BadAddress { what: &'static str, start: VirtAddr, pages: u64 },
    /// The p2m list at INIT_P2M would reach into the boot region.
    ListOverlapsRegion { end: VirtAddr, virt_base: VirtAddr },
    /// The command line does not fit start_info.
    CommandLineTooLong { len: usize, limit: usize },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotEnoughMemory { needed, available } => {
                let kib = PAGE_SIZE / 1024;
                let (need_kib, have_kib) = (needed.saturating_mul(kib), available.saturating_mul(kib));
                write!(
                    f,
                    "not enough memory: the kernel needs {need_kib} KiB to start, the domain has {have_kib} KiB"
                )
            }
            Self::TooMuchMemory { pages, limit } => {
                write!(f, "{pages} pages of memory, the limit is {limit}")
            }
            Self::BadAddress { what, start, pages } => {
                write!(f, "{what} ({pages} pages at {start}) is outside the addresses a guest can use")
            }
            Self::ListOverlapsRegion { end, virt_base } => {
                write!(f, "the p2m list (note INIT_P2M) ends at {end}, above VIRT_BASE {virt_base}")
            }
            Self::CommandLineTooLong { len, limit } => {
                write!(f, "the command line has {len} bytes, the limit is {limit}")
            }
        }
    }
}

impl core::error::Error for LayoutError {}

/// Where the module lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModulePlace {
    /// Its frames.
    pub frames: Extent,
    /// Whether it is in the boot region; otherwise the kernel gets its pfn.
    pub mapped: bool,
}

/// The ring pages of a [`Role::Guest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPages {
    /// Shared with xenstore.
    pub store: Pfn,
    /// Shared with the console's backend.
    pub console: Pfn,
}

/// The placement of everything in a domain's first moment; see the module's drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    virt_base: VirtAddr,
    /// All memory of the domain, in pages.
    pub nr_pages: u64,
    /// Whole pages of the kernel image, gaps between its segments included.
    pub image: Extent,
    /// The module, if there is one.
    pub module: Option<ModulePlace>,
    /// Frames of the p2m list.
    pub p2m: Extent,
    /// Where the guest sees the p2m list.
    pub p2m_va: VirtAddr,
    /// The p2m list with the tables that map it, if it lies outside the boot region.
    pub p2m_outside: Option<Extent>,
    /// The start_info page.
    pub start_info: Pfn,
    /// Ring pages; the initial domain has none.
    pub rings: Option<RingPages>,
    /// Page tables of the boot region; the first is the root.
    pub page_tables: Extent,
    /// The boot stack.
    pub stack: Pfn,
    /// Everything mapped from VIRT_BASE on, from pfn 0.
    pub region: Extent,
    pub(crate) tables: Tables,
}

impl Layout {
    /// Places `kernel` and a module of `module_len` bytes (0: none) in a domain of `nr_pages` pages.
    ///
    /// # Errors
    /// [`LayoutError`], with the numbers.
    pub fn plan(kernel: &Kernel<'_>, nr_pages: u64, module_len: usize) -> Result<Self, LayoutError> {
        if nr_pages > MAX_PAGES {
            return Err(LayoutError::TooMuchMemory { pages: nr_pages, limit: MAX_PAGES });
        }
        let virt_base = kernel.virt_base();
        // Each summand is below 2^53 (bytes of 64 bits in pages, or MAX_PAGES), so none of the sums overflows.
        let image_start = kernel.start() / PAGE_SIZE;
        let image_end = kernel.end().div_ceil(PAGE_SIZE);
        let module_pages = (module_len as u64).div_ceil(PAGE_SIZE);
        let list_pages = nr_pages.div_ceil(LIST_ENTRIES);
        let module_mapped = !kernel.notes().mod_start_pfn;
        // As in Xen's tools, an INIT_P2M that is not below VIRT_BASE or not aligned is as good as none.
        let init_p2m = (kernel.notes().init_p2m).filter(|&va| va < virt_base.get() && page_down(va) == va);

        let mut next = image_end;
        let mut take = |pages: u64| {
            let first = next;
            next += pages;
            Extent::new(first, pages)
        };
        let module_inside = take(if module_mapped { module_pages } else { 0 });
        let list_inside = take(if init_p2m.is_none() { list_pages } else { 0 });
        let start_info = take(1).first;
        let rings = (kernel.role() == Role::Guest)
            .then(|| RingPages { store: take(1).first, console: take(1).first });
        let tables_first = next;

        // Behind the region: what the region's size has to leave room for.
        let module_outside = if module_mapped { 0 } else { module_pages };
        let list_area = init_p2m.map(|va| Area::new(VirtAddr::new(va), Extent::new(0, list_pages)));
        let base_area = Area::new(virt_base, Extent::new(0, 1));
        let list_tables = list_area.map_or(0, |list| tables::list_count(&base_area, &list));
        let list_outside = if init_p2m.is_some() { list_pages + list_tables } else { 0 };
        let outside = module_outside + list_outside;

        let region = region(virt_base, tables_first, nr_pages, outside)?;
        check_range("the boot region", virt_base, region.pages)?;
        let module_outside = Extent::new(region.end(), module_outside);
        let p2m =
            if init_p2m.is_some() { Extent::new(module_outside.end(), list_pages) } else { list_inside };
        let list = match init_p2m {
            Some(va) => {
                let va = VirtAddr::new(va);
                check_range("the p2m list (note INIT_P2M)", va, list_pages)?;
                let end = VirtAddr::new(va.get().saturating_add(list_pages * PAGE_SIZE));
                if end > virt_base {
                    return Err(LayoutError::ListOverlapsRegion { end, virt_base });
                }
                Some((Area::new(va, p2m), Pfn::new(p2m.end())))
            }
            None => None,
        };
        let tables = Tables::new(Area::new(virt_base, region), Pfn::new(tables_first), list);
        let page_tables = tables.boot_frames();
        let module = (module_pages != 0).then_some(ModulePlace {
            frames: if module_mapped { module_inside } else { module_outside },
            mapped: module_mapped,
        });
        let address = |pfn: u64| VirtAddr::new(virt_base.get().wrapping_add(pfn * PAGE_SIZE));
        Ok(Self {
            virt_base,
            nr_pages,
            image: Extent::new(image_start, image_end - image_start),
            module,
            p2m,
            p2m_va: init_p2m.map_or_else(|| address(p2m.first.get()), VirtAddr::new),
            p2m_outside: init_p2m.map(|_| Extent { first: p2m.first, pages: list_outside }),
            start_info,
            rings,
            page_tables,
            stack: Pfn::new(page_tables.end()),
            region,
            tables,
        })
    }

    /// Where the boot region maps `pfn`, which lies in it; `end of region` is allowed and may wrap to 0.
    pub fn address_of(&self, pfn: Pfn) -> VirtAddr {
        VirtAddr::new(self.virt_base.get().wrapping_add(pfn.get() * PAGE_SIZE))
    }

    /// Number of pages, from pfn 0, that something was placed in; the rest of the memory is free for the kernel.
    pub fn used_pages(&self) -> u64 {
        let module = self.module.map_or(0, |module| module.frames.end());
        let list = self.p2m_outside.map_or(0, Extent::end);
        self.region.end().max(module).max(list)
    }
}

/// The smallest boot region with its own page tables in it: they are mapped by it, so its size and their number follow
/// from each other. Both only grow in this search, and it ends at the first pair that fits.
fn region(
    virt_base: VirtAddr,
    tables_first: u64,
    nr_pages: u64,
    outside: u64,
) -> Result<Extent, LayoutError> {
    let misaligned = virt_base.get() / PAGE_SIZE % REGION_ALIGN;
    let mut count = 0;
    loop {
        let needed = tables_first + count + 1;
        let not_enough = LayoutError::NotEnoughMemory { needed: needed + outside, available: nr_pages };
        let room = nr_pages.checked_sub(outside).filter(|&room| room >= needed).ok_or(not_enough)?;
        let wanted = (misaligned + needed + PADDING).next_multiple_of(REGION_ALIGN) - misaligned;
        let region = Extent::new(0, wanted.min(room));
        check_range("the boot region", virt_base, needed)?;
        let tables = tables::boot_count(&Area::new(virt_base, region));
        if tables == count {
            return Ok(region);
        }
        count = tables;
    }
}

/// Checks that `pages` from `start` on lie in one canonical half and not where the hypervisor lives.
fn check_range(what: &'static str, start: VirtAddr, pages: u64) -> Result<(), LayoutError> {
    let bad = LayoutError::BadAddress { what, start, pages };
    let size = pages.checked_mul(PAGE_SIZE).ok_or(bad)?;
    let last = VirtAddr::new(start.get().checked_add(size.saturating_sub(1)).ok_or(bad)?);
    let same_half = start.get() >> 63 == last.get() >> 63;
    // The hypervisor's slots are the lowest of the upper half: what begins above them cannot reach them.
    if start.is_canonical() && last.is_canonical() && same_half && !start.is_hypervisor() {
        Ok(())
    } else {
        Err(bad)
    }
}

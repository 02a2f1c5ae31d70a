//! The geometry of the first page tables: how many, where, and what is in each; nothing is stored per table.
//!
//! Two virtual areas are mapped: the boot region from VIRT_BASE and, if the kernel wants its p2m list elsewhere, that
//! list. A table of level `l` (4 is the root) is named by its *prefix*, the virtual address without its low `12 + 9 l` bits;
//! the tables an area needs at a level are one interval of prefixes. Frames are dealt out by level from 4 down to 1
//! and by prefix, first those of the boot region, then those that only the list needs: the list lies below the region,
//! so of its interval only the top can be shared.

use crate::layout::Extent;
use core::ops::Range;
use hypercall_abi::mmu::{PTES_PER_TABLE, PteFlags, pte};
use hypercall_abi::{Mfn, Pfn, VirtAddr};

/// Flags of entries that map pages, as Xen's tools set them. Without USER on purpose: when the hypervisor validates the
/// table it makes this a page of the guest's kernel; with USER it would become one of its user space.
const LEAF: PteFlags = PteFlags::PRESENT.union(PteFlags::ACCESSED);
/// Flags of entries that point to tables.
const LINK: PteFlags = LEAF.union(PteFlags::WRITABLE).union(PteFlags::USER).union(PteFlags::DIRTY);

/// Pages of virtual memory that map as many frames in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    /// Number of the first virtual page: bits 47 to 12 of its address.
    first_page: u64,
    /// The frames behind it.
    pub frames: Extent,
}

impl Area {
    /// The area of `frames` at `va`; the caller has checked that it stays in one canonical half.
    pub fn new(va: VirtAddr, frames: Extent) -> Self {
        Self { first_page: va.get() << 16 >> 28, frames }
    }

    /// Prefixes of the tables of `level` that the area needs.
    fn tables(&self, level: u32) -> Range<u64> {
        let shift = 9 * level;
        let last_page = self.first_page + self.frames.pages.saturating_sub(1);
        self.first_page >> shift..(last_page >> shift) + 1
    }

    fn frame_of(&self, page: u64) -> Option<Pfn> {
        self.frames.nth(page.checked_sub(self.first_page)?)
    }
}

/// One table: level 1 to 4 and prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableName {
    level: u32,
    prefix: u64,
}

/// An area with the tables that it brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapped {
    area: Area,
    tables: Extent,
}

/// All tables of a domain at birth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tables {
    boot: Mapped,
    list: Option<Mapped>,
}

/// Number of tables for the boot region alone.
pub(crate) fn boot_count(boot: &Area) -> u64 {
    (1..=4).map(|level| len(&boot.tables(level))).sum()
}

/// Number of tables that mapping `list` adds to those of a boot region that begins where `boot` does.
pub(crate) fn list_count(boot: &Area, list: &Area) -> u64 {
    (1..=4).map(|level| len(&own(boot, list, level))).sum()
}

/// Prefixes of the tables of `level` that `list` needs and `boot` does not have.
fn own(boot: &Area, list: &Area, level: u32) -> Range<u64> {
    let all = list.tables(level);
    all.start..all.end.min(boot.tables(level).start)
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

impl Tables {
    /// Tables of `boot` in frames from `first` on; `list` with the first frame of its tables.
    pub fn new(boot: Area, first: Pfn, list: Option<(Area, Pfn)>) -> Self {
        let tables = Extent { first, pages: boot_count(&boot) };
        let list = list.map(|(area, first)| {
            let tables = Extent { first, pages: list_count(&boot, &area) };
            Mapped { area, tables }
        });
        Self { boot: Mapped { area: boot, tables }, list }
    }

    /// Frames of the boot region's tables; the first is the root.
    pub fn boot_frames(&self) -> Extent {
        self.boot.tables
    }

    /// Number of all tables.
    pub fn count(&self) -> u64 {
        self.boot.tables.pages + self.list.map_or(0, |list| list.tables.pages)
    }

    /// The `index`th table in the order of frames, with its frame.
    pub fn nth(&self, index: u64) -> Option<(TableName, Pfn)> {
        let boot = self.boot.tables.pages;
        if let Some(frame) = self.boot.tables.nth(index) {
            return Some((nth_of(index, |level| self.boot.area.tables(level))?, frame));
        }
        let list = self.list?;
        let index = index.checked_sub(boot)?;
        let name = nth_of(index, |level| own(&self.boot.area, &list.area, level))?;
        Some((name, list.tables.nth(index)?))
    }

    /// The frame of a table, `None` if there is none for these addresses.
    fn frame_of(&self, table: TableName) -> Option<Pfn> {
        if let Some(index) = index_of(table, |level| self.boot.area.tables(level)) {
            return self.boot.tables.nth(index);
        }
        let list = self.list?;
        list.tables.nth(index_of(table, |level| own(&self.boot.area, &list.area, level))?)
    }

    /// The frame that virtual page number `page` maps and whether the guest may write to it.
    fn leaf(&self, page: u64) -> Option<(Pfn, bool)> {
        // Asked for each page: no loop over two that are mostly one.
        let list = self.list.as_ref();
        let frame = match self.boot.area.frame_of(page) {
            Some(frame) => frame,
            None => list?.area.frame_of(page)?,
        };
        let is_table =
            self.boot.tables.contains(frame) || list.is_some_and(|list| list.tables.contains(frame));
        Some((frame, !is_table))
    }

    /// Indexes of the entries of `table` that can be anything but zero.
    pub fn used(&self, table: TableName) -> Range<u64> {
        let per_table = PTES_PER_TABLE as u64;
        let first = table.prefix * per_table;
        let used = [Some(self.boot), self.list].into_iter().flatten().map(|mapped| {
            // Level 0 are the pages themselves.
            let below = mapped.area.tables(table.level - 1);
            below.start.saturating_sub(first)..below.end.saturating_sub(first).min(per_table)
        });
        used.filter(|range| !range.is_empty())
            .reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
            .unwrap_or(0..0)
    }

    /// The value of entry `index` (below 512) of `table`.
    ///
    /// # Errors
    /// Those of `mfn_of`.
    pub fn entry<E>(
        &self,
        table: TableName,
        index: u64,
        mfn_of: impl FnOnce(Pfn) -> Result<Mfn, E>,
    ) -> Result<u64, E> {
        let below = table.prefix * PTES_PER_TABLE as u64 + index;
        let (frame, flags) = if table.level == 1 {
            let Some((frame, writable)) = self.leaf(below) else { return Ok(0) };
            (frame, if writable { LEAF.union(PteFlags::WRITABLE) } else { LEAF })
        } else {
            let child = TableName { level: table.level - 1, prefix: below };
            let Some(frame) = self.frame_of(child) else { return Ok(0) };
            (frame, LINK)
        };
        Ok(pte(mfn_of(frame)?, flags))
    }
}

/// The table that is `index`th when levels go from 4 down to 1.
fn nth_of(mut index: u64, tables: impl Fn(u32) -> Range<u64>) -> Option<TableName> {
    for level in (1..=4).rev() {
        let range = tables(level);
        if index < len(&range) {
            return Some(TableName { level, prefix: range.start + index });
        }
        index -= len(&range);
    }
    None
}

/// The inverse of [`nth_of`].
fn index_of(table: TableName, tables: impl Fn(u32) -> Range<u64>) -> Option<u64> {
    let range = tables(table.level);
    if !range.contains(&table.prefix) {
        return None;
    }
    let above: u64 = (table.level + 1..=4).map(|level| len(&tables(level))).sum();
    Some(above + table.prefix - range.start)
}

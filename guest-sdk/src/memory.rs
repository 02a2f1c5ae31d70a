//! The domain's memory: its own frames, its page tables, and a window of addresses for mappings.
//!
//! The domain runs on real page tables of machine frames. Page `n` of the domain (its pfn) is mapped at the image's base
//! plus `n` pages, as far as the builder has mapped it; `grow` maps more of it for the heap. Beside that lies the window:
//! addresses from [`WINDOW`] up, where frames of others (grants, shared pages) and extra mappings of own pages go.
//!
//! Page tables are read-only to their own domain: each change is a hypercall that checks it.

use crate::hypercall::{self, stub};
use crate::rt::{heap, start, trap};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use hypercall_abi::mmu::{MmuCommand, MmuUpdate};
use hypercall_abi::segment::MACH2PHYS_VIRT_START;
use hypercall_abi::{DomId, Errno, MachAddr, Mfn, PAGE_SIZE, Pfn};
use spin::{Mutex, Once};

/// First address of the window.
pub const WINDOW: u64 = 0x40_0000_0000;
/// First address behind it.
const WINDOW_END: u64 = 0x7f_0000_0000;

const PAGE: u64 = PAGE_SIZE as u64;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of an entry that leads to a lower table, and of a plain writable page.
const TABLE: u64 = 0x67;
const WRITABLE: u64 = 0x63;
const NO_EXECUTE: u64 = 1 << 63;

/// Out of memory: the domain has no free page left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

impl core::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("the domain has no free page left")
    }
}

impl core::error::Error for OutOfMemory {}

impl From<OutOfMemory> for Errno {
    fn from(_: OutOfMemory) -> Errno {
        Errno::ENOMEM
    }
}

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Reading and executing.
    ReadExecute,
}

impl Access {
    /// The bits of a page-table entry.
    #[must_use]
    pub const fn bits(self) -> u64 {
        match self {
            Access::Read => 0x61 | NO_EXECUTE,
            Access::ReadWrite => 0x63 | NO_EXECUTE,
            Access::ReadExecute => 0x61,
        }
    }
}

/// A page-table entry.
fn entry(frame: Mfn, bits: u64) -> u64 {
    frame.address().get() | bits
}

struct Place {
    base: u64,
    pages: u64,
    mfn_list: u64,
    root: u64,
}

static PLACE: Once<Place> = Once::new();
/// First address above the part of the domain that is mapped at its own place.
static MAPPED_END: AtomicU64 = AtomicU64::new(0);

fn place() -> &'static Place {
    match PLACE.get() {
        Some(place) => place,
        None => panic!("memory is used before the runtime has set it up"),
    }
}

/// Pages of the domain.
#[must_use]
pub fn pages() -> u64 {
    place().pages
}

/// The machine frame of one of the domain's own pages; `None` past the end, or when the page was given away.
#[must_use]
pub fn pfn_to_mfn(pfn: Pfn) -> Option<Mfn> {
    let place = place();
    if pfn.get() >= place.pages {
        return None;
    }
    // SAFETY: the list has `pages` entries of 8 bytes and lies in memory that nothing else uses.
    let mfn = unsafe { (place.mfn_list as *const u64).add(pfn.get() as usize).read_volatile() };
    if mfn >> 40 == 0 { Some(Mfn::new(mfn)) } else { None }
}

/// The own page that a machine frame is; `None` when it is somebody else's.
#[must_use]
pub fn mfn_to_pfn(mfn: Mfn) -> Option<Pfn> {
    let entry = mfn.get().checked_mul(8)?.checked_add(MACH2PHYS_VIRT_START)?;
    // The table ends somewhere: a read behind it faults.
    let pfn = Pfn::new(trap::try_read(entry).ok()?);
    // The table speaks of everybody's frames: only a round trip makes it ours.
    (pfn_to_mfn(pfn) == Some(mfn)).then_some(pfn)
}

/// Where an own page is mapped at its own place.
fn pfn_to_virt(pfn: Pfn) -> Option<u64> {
    let address = place().base + pfn.get() * PAGE;
    (address < MAPPED_END.load(Ordering::Relaxed)).then_some(address)
}

/// Where an own machine frame is mapped at its own place.
pub(crate) fn own_frame_address(frame: Mfn) -> Option<u64> {
    pfn_to_virt(mfn_to_pfn(frame)?)
}

/// Takes in what the builder has left. Returns the mapped memory that nothing uses: first address and bytes.
pub(crate) fn init(start_info: &start::StartPage, image: (u64, u64), boot_stack: u64) -> (u64, u64) {
    let info = start_info.get();
    PLACE.call_once(|| Place {
        base: image.0,
        pages: info.nr_pages,
        mfn_list: info.mfn_list,
        root: info.pt_base,
    });
    let rounded = |address: u64| address.wrapping_add(PAGE - 1) & !(PAGE - 1);
    let end_of_domain = image.0 + info.nr_pages * PAGE;
    // Whatever the order in which the builder laid things out: what is free comes after the last of them.
    let module_end = if info.flags & 8 == 0 { info.mod_start.wrapping_add(info.mod_len) } else { 0 };
    let used = [
        image.1,
        boot_stack,
        start_info.address() + PAGE,
        info.mfn_list + info.nr_pages * 8,
        info.pt_base + info.nr_pt_frames * PAGE,
        module_end,
    ];
    let first =
        used.into_iter().map(rounded).filter(|&end| end <= end_of_domain).fold(rounded(image.1), u64::max);
    // While the walk below runs, every table it meets has to count as mapped.
    MAPPED_END.store(end_of_domain, Ordering::Relaxed);
    let mut end = first;
    while end < end_of_domain && leaf(end).is_some_and(|entry| entry & 3 == 3) {
        end += PAGE;
    }
    MAPPED_END.store(end, Ordering::Relaxed);
    (first, end - first)
}

/// The entry of `level` (1 to 4) that translates an address, and the machine address of that entry; `None` when a table
/// above it is missing.
fn walk(address: u64, level: u32) -> Option<(u64, u64)> {
    let mut table = place().root;
    let mut at = 4;
    loop {
        let index = (address >> (12 + 9 * (at - 1))) & 511;
        // SAFETY: `table` is a page table of this domain, mapped read-only; aligned 8 bytes inside it.
        let entry = unsafe { ((table + index * 8) as *const u64).read_volatile() };
        if at == level {
            let frame = pfn_to_mfn(Pfn::new((table - place().base) / PAGE))?;
            return Some((entry, frame.get() * PAGE + index * 8));
        }
        if entry & 1 == 0 || entry & 0x80 != 0 {
            return None;
        }
        table = pfn_to_virt(mfn_to_pfn(Mfn::new((entry & ADDRESS) / PAGE))?)?;
        at -= 1;
    }
}

/// The lowest-level entry of an address, if the tables above it exist; its present bit may be clear.
#[must_use]
pub fn leaf(address: u64) -> Option<u64> {
    walk(address, 1).map(|(entry, _)| entry)
}

/// The frame of the kernel's own page-table root.
#[must_use]
pub fn root() -> Mfn {
    let place = place();
    pfn_to_mfn(Pfn::new((place.root - place.base) / PAGE)).expect("the root is a page of the domain")
}

/// Machine address of the lowest-level entry of an address, as `mmu_update` wants it.
#[must_use]
pub fn leaf_address(address: u64) -> Option<u64> {
    walk(address, 1).map(|(_, place)| place)
}

/// The machine frame that an address is mapped to.
#[must_use]
pub fn translate(address: u64) -> Option<Mfn> {
    leaf(address).filter(|entry| entry & 1 != 0).map(|entry| Mfn::new((entry & ADDRESS) / PAGE))
}

/// Changes the lowest-level entry of an address and flushes that address.
///
/// # Errors
/// `EINVAL` or `EFAULT` when there is no table for the address or the entry is refused.
///
/// # Safety
/// Rust's memory stays as Rust expects it: no live object loses its page, or becomes writable for somebody else.
pub unsafe fn set_leaf(address: u64, entry: u64) -> Result<(), Errno> {
    // UVMF_INVLPG | UVMF_LOCAL
    // SAFETY: the caller's.
    unsafe { stub::update_va_mapping(address, entry, 2) }.map(drop)
}

/// Tables that a new mapping may need, kept for when the heap itself wants to grow.
static RESERVE: Mutex<[u64; 3]> = Mutex::new([0; 3]);

fn take_reserve() -> Option<u64> {
    let mut reserve = RESERVE.lock();
    let slot = reserve.iter_mut().find(|slot| **slot != 0)?;
    Some(core::mem::replace(slot, 0))
}

/// Fills the reserve for as long as the domain can grow; `page` gives whole zeroed pages that nobody uses.
pub(crate) fn fill_reserve(mut page: impl FnMut() -> Option<u64>) {
    let place = place();
    if MAPPED_END.load(Ordering::Relaxed) >= place.base + place.pages * PAGE {
        return;
    }
    for slot in RESERVE.lock().iter_mut().filter(|slot| **slot == 0) {
        match page() {
            Some(address) => *slot = address,
            None => return,
        }
    }
}

/// Makes a page table of a page at `address` and enters it where `walk` found a hole.
///
/// # Safety
/// Nobody uses the page any more, and its content is a table that may be shown to the hypervisor.
unsafe fn enter_table(address: u64, entry_place: u64) -> Result<(), Errno> {
    let frame = translate(address).ok_or(Errno::EFAULT)?;
    // SAFETY: the page is nobody's; read-only it may become a table.
    unsafe { set_leaf(address, entry(frame, Access::Read.bits()))? };
    let request = [entry_place, entry(frame, TABLE)];
    // SAFETY: one request of two words; it fills a hole that nothing is mapped through.
    let done = unsafe { stub::mmu_update((&raw const request) as u64, 1, 0, u64::from(DomId::SELF.get())) };
    if let Err(error) = done {
        // SAFETY: back to an ordinary page.
        unsafe { set_leaf(address, entry(frame, WRITABLE | NO_EXECUTE))? };
        return Err(error);
    }
    Ok(())
}

/// Makes sure that the tables for `address` exist down to level 1; `page` gives zeroed pages.
fn ensure_tables(address: u64, mut page: impl FnMut() -> Option<u64>) -> Result<(), Errno> {
    for level in [4, 3, 2] {
        let (entry, place) = walk(address, level).ok_or(Errno::EFAULT)?;
        if entry & 1 == 0 {
            let table = page().ok_or(Errno::ENOMEM)?;
            // SAFETY: a page of ours that nobody uses, all zero.
            unsafe { enter_table(table, place)? };
        }
    }
    Ok(())
}

/// Maps more of the domain's own memory at its place, at least `bytes` of it if there is so much, a table's worth at a time.
/// Returns first address and bytes of what is new; the heap calls it with its lock held, so nothing here allocates.
pub(crate) fn grow(bytes: u64) -> Option<(u64, u64)> {
    let place = PLACE.get()?;
    let end_of_domain = place.base + place.pages * PAGE;
    let start = MAPPED_END.load(Ordering::Relaxed);
    let mut end = start;
    while end < end_of_domain && end - start < bytes.saturating_add(4 * PAGE) {
        let chunk_end = ((end | 0x1f_ffff) + 1).min(end_of_domain);
        if map_own(end, chunk_end).is_err() {
            break;
        }
        end = chunk_end;
        MAPPED_END.store(end, Ordering::Relaxed);
    }
    (end > start).then_some((start, end - start))
}

/// Maps the domain's own pages at `start..end`, which one level-1 table covers.
fn map_own(start: u64, end: u64) -> Result<(), Errno> {
    let base = place().base;
    let entry_of = |address: u64| {
        // A page that was given away stays a hole.
        pfn_to_mfn(Pfn::new((address - base) / PAGE)).map_or(0, |frame| entry(frame, WRITABLE | NO_EXECUTE))
    };
    for level in [4, 3] {
        let (entry, place) = walk(start, level).ok_or(Errno::EFAULT)?;
        if entry & 1 == 0 {
            let table = take_reserve().ok_or(Errno::ENOMEM)?;
            // SAFETY: a zeroed page from the reserve.
            unsafe { enter_table(table, place)? };
        }
    }
    let (entry, place) = walk(start, 2).ok_or(Errno::EFAULT)?;
    if entry & 1 != 0 {
        // The table is live (the builder mapped part of it): entry by entry.
        for address in (start..end).step_by(PAGE_SIZE) {
            // SAFETY: a hole gets an own page that nothing uses.
            unsafe { set_leaf(address, entry_of(address))? };
        }
        return Ok(());
    }
    // A new table is filled while it is an ordinary page, and checked at once when it becomes a table.
    let table = take_reserve().ok_or(Errno::ENOMEM)?;
    for address in (start..end).step_by(PAGE_SIZE) {
        let index = (address >> 12) & 511;
        // SAFETY: inside the reserve page, which is writable and nobody's.
        unsafe { ((table + index * 8) as *mut u64).write(entry_of(address)) };
    }
    // SAFETY: the page holds a table of own frames.
    unsafe { enter_table(table, place) }
}

/// Takes away what each part of the image does not need: text is not writable, only text is executable, and the page below
/// the stack is not there.
pub(crate) fn protect(
    text: (u64, u64),
    rodata: (u64, u64),
    data: (u64, u64),
    guard: u64,
) -> Result<(), Errno> {
    let mut requests: Vec<[u64; 2]> = Vec::with_capacity(64);
    let parts = [(text, 0x61), (rodata, 0x61 | NO_EXECUTE), (data, WRITABLE | NO_EXECUTE)];
    let flush = |requests: &mut Vec<[u64; 2]>| {
        if requests.is_empty() {
            return Ok(());
        }
        let (at, count) = (requests.as_ptr() as u64, requests.len() as u64);
        // SAFETY: `count` requests of two words; they only narrow what the image's own code never does to these pages.
        let result = unsafe { stub::mmu_update(at, count, 0, u64::from(DomId::SELF.get())) };
        requests.clear();
        result.map(drop)
    };
    for ((start, end), bits) in parts {
        for address in (start..end).step_by(PAGE_SIZE) {
            let (entry, place) = walk(address, 1).ok_or(Errno::EFAULT)?;
            // shared_info already lies over one page of the data part: its frame is not ours to describe.
            if mfn_to_pfn(Mfn::new((entry & ADDRESS) / PAGE)).is_none() {
                continue;
            }
            let entry = if address == guard { 0 } else { entry & ADDRESS | bits };
            requests.push([place, entry]);
            if requests.len() == requests.capacity() {
                flush(&mut requests)?;
            }
        }
    }
    flush(&mut requests)?;
    flush_tlb();
    Ok(())
}

/// Drops this vCPU's cached translations.
pub fn flush_tlb() {
    // mmuext_op: command TLB_FLUSH_LOCAL.
    let operation = [6u64, 0, 0];
    // SAFETY: one operation of 24 bytes; a flush changes nothing that Rust sees.
    let _ = unsafe { stub::mmuext_op((&raw const operation) as u64, 1, 0, u64::from(DomId::SELF.get())) };
}

#[derive(Debug)]
#[repr(C, align(4096))]
struct PageBytes([u8; PAGE_SIZE]);

/// One page of the domain's own memory, zeroed when made; freed when dropped.
#[derive(Debug)]
pub struct Page {
    bytes: Box<PageBytes>,
}

impl Page {
    /// A zeroed page.
    ///
    /// # Errors
    /// When the heap has none and cannot grow.
    pub fn new() -> Result<Page, OutOfMemory> {
        let layout = core::alloc::Layout::new::<PageBytes>();
        // SAFETY: the layout has a size.
        let bytes = unsafe { alloc::alloc::alloc_zeroed(layout) }.cast::<PageBytes>();
        if bytes.is_null() {
            return Err(OutOfMemory);
        }
        // SAFETY: just allocated with this layout, all bytes written.
        Ok(Page { bytes: unsafe { Box::from_raw(bytes) } })
    }

    /// Its machine frame.
    #[must_use]
    pub fn mfn(&self) -> Mfn {
        // The heap lies in mapped own memory.
        translate(self.address()).expect("the heap is mapped")
    }

    /// Where it is mapped.
    #[must_use]
    pub fn address(&self) -> u64 {
        (&raw const *self.bytes) as u64
    }

    /// Its content.
    #[must_use]
    pub fn bytes(&self) -> &[u8; PAGE_SIZE] {
        &self.bytes.0
    }

    /// Its content, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8; PAGE_SIZE] {
        &mut self.bytes.0
    }

    /// Changes what the page's own mapping allows.
    pub(crate) fn protect(&self, access: Access) -> Result<(), Errno> {
        // SAFETY: only pages that are tables are made read-only, and nobody writes those through Rust.
        unsafe { set_leaf(self.address(), entry(self.mfn(), access.bits())) }
    }

    /// Gives the page up for ever, for somebody who keeps it (a page table, a grant that does not end).
    pub fn leak(self) -> u64 {
        Box::leak(self.bytes) as *mut PageBytes as u64
    }

    /// Takes a leaked page back.
    ///
    /// # Safety
    /// `address` came from [`leak`](Self::leak), and nobody else uses the page any more.
    pub unsafe fn from_leaked(address: u64) -> Page {
        // SAFETY: the caller's.
        Page { bytes: unsafe { Box::from_raw(address as *mut PageBytes) } }
    }
}

/// Free ranges of the window: first address and pages.
static FREE: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(WINDOW);

/// Nobody is in the middle of changing what this module keeps.
pub(crate) fn is_intact() -> bool {
    !RESERVE.is_locked() && !FREE.is_locked()
}

/// Addresses of the window, without a mapping until one is made; given back when dropped.
#[derive(Debug)]
pub struct Range {
    start: u64,
    pages: u64,
    /// Whoever mapped something has ended it: its end need not look.
    empty: bool,
}

impl Range {
    /// Reserves addresses for `pages` pages, with the tables they need.
    ///
    /// # Errors
    /// `ENOMEM` without a page for a table, or when the window is full.
    pub fn new(pages: u64) -> Result<Range, Errno> {
        let start = Self::find(pages)?;
        let range = Range { start, pages, empty: false };
        let page = || Page::new().ok().map(Page::leak);
        let mut at = start & !0x1f_ffff;
        while at < start + pages * PAGE {
            ensure_tables(at, page)?;
            at += 0x20_0000;
        }
        Ok(range)
    }

    fn find(pages: u64) -> Result<u64, Errno> {
        let mut free = FREE.lock();
        if let Some(slot) = free.iter_mut().find(|(_, length)| *length >= pages) {
            let start = slot.0;
            slot.0 += pages * PAGE;
            slot.1 -= pages;
            free.retain(|(_, length)| *length > 0);
            return Ok(start);
        }
        let bytes = pages.checked_mul(PAGE).ok_or(Errno::ENOMEM)?;
        NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            next.checked_add(bytes).filter(|&end| end <= WINDOW_END)
        })
        .map_err(|_| Errno::ENOMEM)
    }

    /// Says that nothing is mapped any more.
    #[cfg(feature = "control")]
    pub(crate) fn set_empty(&mut self) {
        self.empty = true;
    }

    /// First address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// How many pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The address of page `index`.
    ///
    /// # Panics
    /// When `index` is not inside.
    #[must_use]
    pub fn address(&self, index: u64) -> u64 {
        assert!(index < self.pages, "page {index} of a range of {} pages", self.pages);
        self.start + index * PAGE
    }

    /// Maps a machine frame of any owner that allows it.
    ///
    /// # Errors
    /// As the hypervisor says; `EPERM` or `EINVAL` for a frame that is not to be mapped so.
    ///
    /// # Safety
    /// Rust sees the frame at another address too, or somebody else writes it: only volatile or atomic accesses are right.
    pub unsafe fn map(&self, index: u64, frame: Mfn, access: Access) -> Result<(), Errno> {
        // SAFETY: the window holds no Rust objects.
        unsafe { set_leaf(self.address(index), entry(frame, access.bits())) }
    }

    /// Ends a mapping.
    ///
    /// # Errors
    /// As the hypervisor says.
    pub fn unmap(&self, index: u64) -> Result<(), Errno> {
        // SAFETY: the window holds no Rust objects; whoever reads here after this reads by pointers of its own.
        unsafe { set_leaf(self.address(index), 0) }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        for index in 0..if self.empty { 0 } else { self.pages } {
            if leaf(self.address(index)).is_some_and(|entry| entry & 1 != 0) && self.unmap(index).is_err() {
                // Still mapped: the addresses are lost rather than reused.
                return;
            }
        }
        let mut free = FREE.lock();
        // Back to back with a free neighbour, so that short-lived ranges do not make the list grow.
        if let Some(slot) = free.iter_mut().find(|(start, pages)| start + pages * PAGE == self.start) {
            slot.1 += self.pages;
        } else if let Some(slot) = free.iter_mut().find(|(start, _)| *start == self.start + self.pages * PAGE)
        {
            slot.0 = self.start;
            slot.1 += self.pages;
        } else {
            free.push((self.start, self.pages));
        }
    }
}

/// A page that somebody else may write at any time, seen through volatile and atomic accesses only.
///
/// The base of grants, mappings and rings: whoever holds one keeps the page mapped.
#[derive(Debug)]
pub struct Shared {
    address: u64,
    bytes: usize,
}

impl Shared {
    /// Shared memory at an address.
    ///
    /// # Safety
    /// The memory stays mapped while this lives, readable and, if it is written to, writable; no Rust reference leads to it.
    #[must_use]
    pub unsafe fn new(address: u64, bytes: usize) -> Shared {
        Shared { address, bytes }
    }

    /// Where it is mapped.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    fn check(&self, offset: usize, length: usize) -> u64 {
        let end = offset.checked_add(length);
        assert!(end.is_some_and(|end| end <= self.bytes), "{length} bytes at {offset} of {}", self.bytes);
        self.address + offset as u64
    }

    /// Copies bytes into other memory of this kind.
    ///
    /// # Panics
    /// When `bytes` from either offset on are not inside.
    pub fn copy_to(&self, offset: usize, to: &Shared, to_offset: usize, bytes: usize) {
        let (from, to) = (self.check(offset, bytes), to.check(to_offset, bytes));
        let (source, target) = (from as *const u8, to as *mut u8);
        if from.abs_diff(to) < bytes as u64 {
            // SAFETY: both are checked; assembly, so the compiler assumes nothing about memory that others write.
            unsafe { crate::rt::bytes::copy_overlapping(target, source, bytes) };
        } else {
            // SAFETY: as above, and they do not overlap.
            unsafe { hypercall::copy_volatile(target, source, bytes) };
        }
    }
}

impl crate::ring::SharedPage for Shared {
    fn size(&self) -> usize {
        self.bytes
    }

    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        let from = self.check(offset, to.len());
        // SAFETY: checked; assembly, so the compiler assumes nothing about memory that others write.
        unsafe { hypercall::copy_volatile(to.as_mut_ptr(), from as *const u8, to.len()) };
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        let to = self.check(offset, from.len());
        // SAFETY: as above.
        unsafe { hypercall::copy_volatile(to as *mut u8, from.as_ptr(), from.len()) };
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "a word at {offset}");
        let address = self.check(offset, 4);
        // SAFETY: mapped while self lives, aligned, and only ever accessed as this says.
        unsafe { AtomicU32::from_ptr(address as *mut u32) }
    }

    fn memory(&self) -> Option<&Shared> {
        Some(self)
    }
}

/// Slots of the window over a pool of own pages: which slot shows which page, and what it allows, changes in batches.
///
/// The region owns its pages, and nobody sees them but through its slots, so safe code may map them as it likes.
#[derive(Debug)]
pub struct Region {
    // Dropped first: the slots are unmapped before the pages are freed.
    range: Range,
    /// Machine address of each slot's entry.
    places: Vec<u64>,
    pages: Vec<Page>,
    queued: Vec<MmuUpdate>,
}

impl Region {
    /// `slots` empty slots over a pool of pages.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(slots: u64, pages: Vec<Page>) -> Result<Region, Errno> {
        let range = Range::new(slots)?;
        let places = (0..slots).map(|slot| leaf_address(range.address(slot)).ok_or(Errno::EFAULT));
        let places = places.collect::<Result<Vec<u64>, Errno>>()?;
        Ok(Region { range, places, pages, queued: Vec::new() })
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.places.len()
    }

    /// How many changes wait for [`commit`](Self::commit).
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queued.len()
    }

    /// Queues: `slot` shows page `page` of the pool.
    ///
    /// # Panics
    /// When there is no such slot or page.
    pub fn map(&mut self, slot: usize, page: usize, access: Access) {
        self.queue(slot, entry(self.pages[page].mfn(), access.bits()));
    }

    /// Queues: `slot` shows nothing.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn unmap(&mut self, slot: usize) {
        self.queue(slot, 0);
    }

    fn queue(&mut self, slot: usize, entry: u64) {
        let place = MachAddr::new(self.places[slot]);
        self.queued.push(MmuUpdate::new(MmuCommand::NormalPtUpdate, place, entry));
    }

    /// Carries out what is queued in one hypercall, flushes, and gives the number of entries written.
    ///
    /// # Errors
    /// The first refusal; entries before it are written, the rest is dropped.
    pub fn commit(&mut self) -> Result<usize, Errno> {
        let count = self.queued.len();
        if count == 0 {
            return Ok(0);
        }
        let at = self.queued.as_ptr() as u64;
        // SAFETY: `count` requests; they map own pages of the pool, which no reference leads to, into the window.
        let result = unsafe { stub::mmu_update(at, count as u64, 0, u64::from(DomId::SELF.get())) };
        self.queued.clear();
        flush_tlb();
        result.map(|_| count)
    }

    /// Reads a word through a slot.
    ///
    /// # Errors
    /// The page fault, when the slot is empty.
    ///
    /// # Panics
    /// When the word is not inside.
    pub fn read(&self, slot: usize, offset: usize) -> Result<u64, trap::Exception> {
        trap::try_read(self.word(slot, offset))
    }

    /// Writes a word through a slot.
    ///
    /// # Errors
    /// The page fault, when the slot is empty or does not allow it.
    ///
    /// # Panics
    /// When the word is not inside.
    pub fn write(&self, slot: usize, offset: usize, value: u64) -> Result<(), trap::Exception> {
        // SAFETY: a page of the pool, which no reference leads to.
        unsafe { trap::try_write(self.word(slot, offset), value) }
    }

    fn word(&self, slot: usize, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset < PAGE_SIZE, "a word at {offset}");
        self.range.address(slot as u64) + offset as u64
    }
}

/// Lets copies of shared memory use vectors of 32 bytes, where the processor has them; whether they do.
///
/// They are turned on for the vCPU that calls this. A domain that runs SDK code on other vCPUs must not call it.
pub fn use_wide_copies() -> bool {
    crate::rt::bytes::enable_wide()
}

/// Figures about the domain's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// All the domain has.
    pub total: u64,
    /// In use on the heap.
    pub heap_used: u64,
    /// Free on the heap, before it grows.
    pub heap_free: u64,
    /// Not yet taken by the heap.
    pub unmapped: u64,
}

/// How memory stands.
#[must_use]
pub fn usage() -> Usage {
    let place = place();
    let (heap_used, heap_free) = heap::usage();
    let total = place.pages * PAGE;
    Usage {
        total,
        heap_used,
        heap_free,
        unmapped: (place.base + total).saturating_sub(MAPPED_END.load(Ordering::Relaxed)),
    }
}

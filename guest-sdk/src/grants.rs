//! Grants: own pages for others to map, and others' pages mapped here. Both end when dropped.
//!
//! Version 1 of the grant table. The table's frames belong to the hypervisor and are mapped in the window at first use; it
//! grows by a frame (512 grants) when it is full. References are given out upward from 8, lowest first until the first
//! one comes back.

use crate::hypercall::stub;
use crate::memory::{Access, Page, Range, Shared};
use crate::ring::SharedPage;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use hypercall_abi::grant::{
    GNTST_OKAY, GNTTAB_NR_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GnttabCopy, GnttabMapGrantRef,
    GnttabQuerySize, GnttabSetupTable, GnttabUnmapGrantRef, GrantEntryV1, GrantFlags, MapFlags,
};
use hypercall_abi::subops::GnttabOp;
use hypercall_abi::{DomId, Errno, GrantRef, GuestHandle, MachAddr, Mfn, PAGE_SIZE};
use spin::Mutex;

const PER_FRAME: u32 = (PAGE_SIZE / size_of::<GrantEntryV1>()) as u32;

/// Why a grant operation failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum GrantError {
    /// The hypercall itself failed.
    Call(Errno),
    /// The operation was refused: a `GNTST_*` of the public header.
    Status(i16),
    /// No reference is free and the table is as big as it may get.
    Full,
}

impl From<Errno> for GrantError {
    fn from(error: Errno) -> Self {
        GrantError::Call(error)
    }
}

impl fmt::Display for GrantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            GrantError::Call(error) => return write!(f, "the grant hypercall failed: {error}"),
            GrantError::Full => "the grant table is full",
            GrantError::Status(-2) => "there is no such domain, or none to map from",
            GrantError::Status(-3) => "the other domain has not granted this",
            GrantError::Status(-4) => "no such mapping",
            GrantError::Status(-5) => "the address to map at is wrong",
            GrantError::Status(-8) => "the grant does not allow this",
            GrantError::Status(-9) => "the page cannot be granted",
            GrantError::Status(-10) => "the copy crosses a page",
            GrantError::Status(-12) => "the page is not there just now; try again",
            GrantError::Status(-13) => "the hypervisor has no room for the mapping",
            GrantError::Status(status) => {
                return write!(f, "the grant operation failed with status {status}");
            }
        };
        f.write_str(text)
    }
}

impl fmt::Debug for GrantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} (")?;
        match self {
            GrantError::Call(error) => write!(f, "{error:?})"),
            GrantError::Status(status) => write!(f, "status {status})"),
            GrantError::Full => f.write_str("full)"),
        }
    }
}

impl core::error::Error for GrantError {}

fn check(status: i16) -> Result<(), GrantError> {
    if status == GNTST_OKAY { Ok(()) } else { Err(GrantError::Status(status)) }
}

/// Issues one grant operation.
///
/// # Safety
/// `argument` is the struct of the command; a mapping it makes or ends is in the window and used as shared memory only.
unsafe fn operation<T>(operation: GnttabOp, argument: &mut T) -> Result<(), Errno> {
    let at = (&raw mut *argument) as u64;
    // SAFETY: the caller's.
    unsafe { stub::grant_table_op(u64::from(operation.number()), at, 1) }.map(drop)
}

struct Table {
    /// One page of the window for each frame.
    frames: Vec<Range>,
    max_frames: u32,
    /// The lowest reference never given out.
    next: u32,
    free: Vec<GrantRef>,
}

static TABLE: Mutex<Table> = Mutex::new(Table {
    frames: Vec::new(),
    max_frames: 0,
    next: GNTTAB_NR_RESERVED_ENTRIES,
    free: Vec::new(),
});

impl Table {
    fn grow(&mut self) -> Result<(), GrantError> {
        if self.max_frames == 0 {
            let mut query = GnttabQuerySize { dom: DomId::SELF, ..GnttabQuerySize::default() };
            // SAFETY: the command's struct; maps nothing.
            unsafe { operation(GnttabOp::QuerySize, &mut query)? };
            check(query.status)?;
            self.max_frames = query.max_nr_frames;
        }
        let wanted = self.frames.len() as u32 + 1;
        if wanted > self.max_frames {
            return Err(GrantError::Full);
        }
        let mut list = Vec::new();
        list.resize(wanted as usize, Mfn::new(0));
        let mut setup = GnttabSetupTable {
            dom: DomId::SELF,
            nr_frames: wanted,
            frame_list: GuestHandle::new(list.as_mut_ptr() as u64),
            ..GnttabSetupTable::default()
        };
        // SAFETY: the command's struct, with a list as long as it says.
        unsafe { operation(GnttabOp::SetupTable, &mut setup)? };
        check(setup.status)?;
        let frame = list.last().copied().ok_or(GrantError::Full)?;
        let range = Range::new(1)?;
        // SAFETY: a frame of the grant table, accessed atomically only.
        unsafe { range.map(0, frame, Access::ReadWrite)? };
        self.frames.push(range);
        Ok(())
    }

    fn take(&mut self) -> Result<GrantRef, GrantError> {
        if let Some(reference) = self.free.pop() {
            return Ok(reference);
        }
        if self.next / PER_FRAME >= self.frames.len() as u32 {
            self.grow()?;
        }
        let reference = GrantRef::new(self.next);
        self.next += 1;
        Ok(reference)
    }

    /// Flags, and domain and frame, of an entry.
    fn entry(&self, reference: GrantRef) -> Option<(&AtomicU16, *mut GrantEntryV1)> {
        let range = self.frames.get((reference.get() / PER_FRAME) as usize)?;
        let entry = range.address(0) as *mut GrantEntryV1;
        // SAFETY: inside the mapped page, which stays mapped as long as the table.
        unsafe {
            let entry = entry.add((reference.get() % PER_FRAME) as usize);
            Some((AtomicU16::from_ptr(&raw mut (*entry).flags), entry))
        }
    }

    fn set(&self, reference: GrantRef, to: DomId, frame: Mfn, readonly: bool) {
        let Some((flags, entry)) = self.entry(reference) else { return };
        // SAFETY: the entry is ours to write while its flags are 0; the hypervisor looks at the rest only after them.
        unsafe {
            (&raw mut (*entry).domid).write_volatile(to);
            (&raw mut (*entry).frame).write_volatile(frame.get() as u32);
        }
        flags.store(Self::flags(readonly), Ordering::Release);
    }

    fn flags(readonly: bool) -> u16 {
        GTF_PERMIT_ACCESS | if readonly { GrantFlags::READONLY.bits() } else { 0 }
    }

    /// Grants again what was granted before, after [`end`](Self::end).
    fn resume(&self, reference: GrantRef, readonly: bool) {
        if let Some((flags, _)) = self.entry(reference) {
            flags.store(Self::flags(readonly), Ordering::Release);
        }
    }

    /// Ends a grant; false while it is in use.
    fn end(&self, reference: GrantRef) -> bool {
        let Some((flags, _)) = self.entry(reference) else { return true };
        let busy = (GrantFlags::READING | GrantFlags::WRITING).bits();
        flags
            .fetch_update(
                Ordering::SeqCst,
                Ordering::Relaxed,
                |now| if now & busy == 0 { Some(0) } else { None },
            )
            .is_ok()
    }

    fn in_use(&self, reference: GrantRef) -> bool {
        let busy = (GrantFlags::READING | GrantFlags::WRITING).bits();
        self.entry(reference).is_some_and(|(flags, _)| flags.load(Ordering::SeqCst) & busy != 0)
    }
}

/// The domain's grants.
#[derive(Debug)]
#[non_exhaustive]
pub struct Grants {}

impl Grants {
    pub(crate) fn new() -> Self {
        Grants {}
    }

    /// Lets `to` map or copy a page. The page stays this domain's; it is shared memory until the grant ends.
    ///
    /// # Errors
    /// [`GrantError::Full`] when the table cannot grow.
    pub fn grant(&self, page: Page, to: DomId, access: Access) -> Result<Grant, GrantError> {
        let frame = page.mfn();
        let mut table = TABLE.lock();
        let reference = table.take()?;
        table.set(reference, to, frame, access != Access::ReadWrite);
        let address = page.leak();
        // SAFETY: the page is leaked, so no reference leads to it, and it is mapped as heap.
        let shared = unsafe { Shared::new(address, PAGE_SIZE) };
        Ok(Grant { reference, shared, live: true })
    }

    /// A zeroed page, granted at once.
    ///
    /// # Errors
    /// As [`grant`](Self::grant), and `ENOMEM`.
    pub fn grant_new(&self, to: DomId, access: Access) -> Result<Grant, GrantError> {
        let page = Page::new().map_err(Errno::from)?;
        self.grant(page, to, access)
    }

    /// Maps pages that `from` has granted, side by side, in one hypercall.
    ///
    /// # Errors
    /// The first refusal; then nothing stays mapped.
    pub fn map(&self, from: DomId, references: &[GrantRef], access: Access) -> Result<Mapping, GrantError> {
        let range = Range::new(references.len() as u64)?;
        let mut flags = MapFlags::HOST_MAP;
        if access != Access::ReadWrite {
            flags |= MapFlags::READONLY;
        }
        let mut requests: Vec<GnttabMapGrantRef> = references
            .iter()
            .enumerate()
            .map(|(index, &gref)| GnttabMapGrantRef {
                host_addr: range.address(index as u64),
                flags: flags.bits(),
                gref,
                dom: from,
                // Refused unless the hypervisor says otherwise.
                status: -1,
                ..GnttabMapGrantRef::default()
            })
            .collect();
        let (at, count) = (requests.as_mut_ptr() as u64, requests.len() as u64);
        // SAFETY: as many requests as it says; they map into the fresh range, which is used as shared memory only.
        let called = unsafe { stub::grant_table_op(u64::from(GnttabOp::MapGrantRef.number()), at, count) };
        let handles =
            requests.iter().map(|request| (request.status == GNTST_OKAY).then_some(request.handle)).collect();
        let bytes = references.len() * PAGE_SIZE;
        // SAFETY: the range is mapped whole, or this value is dropped before anybody uses it.
        let shared = unsafe { Shared::new(range.start(), bytes) };
        // Made before the results are looked at: dropping it ends what was mapped.
        let mapping =
            Mapping { mapped: Arc::new(Mapped { range, handles, ended: AtomicBool::new(false) }), shared };
        called?;
        requests.iter().try_for_each(|request| check(request.status))?;
        Ok(mapping)
    }

    /// Lets the hypervisor copy bytes between pages that need not be mapped.
    ///
    /// # Errors
    /// The first refusal; what was copied before stays copied.
    pub fn copy(&self, copies: &mut [GnttabCopy]) -> Result<(), GrantError> {
        if copies.iter().any(|copy| copy.flags & 2 == 0) {
            // A destination in own memory by frame number: that could be any page of Rust's.
            return Err(GrantError::Call(Errno::EINVAL));
        }
        let (at, count) = (copies.as_mut_ptr() as u64, copies.len() as u64);
        // SAFETY: as many requests as it says; the destinations are granted pages, which are shared memory.
        unsafe { stub::grant_table_op(u64::from(GnttabOp::Copy.number()), at, count)? };
        copies.iter().try_for_each(|copy| check(copy.status))
    }
}

/// Nobody is in the middle of changing the table.
pub(crate) fn is_intact() -> bool {
    !TABLE.is_locked()
}

/// A page of ours that another domain may use. Dropping it ends the grant; if the other domain still uses the page then, the
/// page is given up instead of being reused under its eyes.
#[derive(Debug)]
pub struct Grant {
    reference: GrantRef,
    shared: Shared,
    live: bool,
}

impl Grant {
    /// The number that the other domain needs.
    #[must_use]
    pub fn reference(&self) -> GrantRef {
        self.reference
    }

    /// Whether the other domain has it mapped, or copies, now.
    #[must_use]
    pub fn in_use(&self) -> bool {
        TABLE.lock().in_use(self.reference)
    }

    /// Ends the grant and gives the page back.
    ///
    /// # Errors
    /// The grant again, while the other domain uses the page.
    pub fn end(mut self) -> Result<Page, Grant> {
        if !release(self.reference) {
            return Err(self);
        }
        self.live = false;
        // SAFETY: `grant` leaked the page, and nobody but us can reach it any more.
        Ok(unsafe { Page::from_leaked(self.shared.address()) })
    }
}

fn release(reference: GrantRef) -> bool {
    let mut table = TABLE.lock();
    let ended = table.end(reference);
    if ended {
        table.free.push(reference);
    }
    ended
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.live {
            return;
        }
        if release(self.reference) {
            // SAFETY: as in end.
            drop(unsafe { Page::from_leaked(self.shared.address()) });
        } else {
            log::warn!(
                "grant {} is dropped while the other domain uses it: its page is lost",
                self.reference
            );
        }
    }
}

crate::ring::shared_by_field!(Grant);

/// Pages of another domain, mapped here; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    mapped: Arc<Mapped>,
    shared: Shared,
}

/// What a [`Mapping`] and its [`Lease`]s know of it.
#[derive(Debug)]
struct Mapped {
    range: Range,
    handles: Vec<Option<u32>>,
    ended: AtomicBool,
}

impl Mapping {
    /// Where the first page is mapped.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.mapped.range.start()
    }

    /// The means to end it without having it.
    #[must_use]
    pub fn lease(&self) -> Lease {
        Lease(Leased::Mapping(Arc::clone(&self.mapped)))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.mapped.end();
    }
}

impl Mapped {
    fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        let pages = self.handles.iter().enumerate();
        let mut requests: Vec<GnttabUnmapGrantRef> = pages
            .filter_map(|(index, handle)| {
                handle.map(|handle| unmap_request(self.range.address(index as u64), handle))
            })
            .collect();
        if requests.is_empty() {
            return;
        }
        unmap_all(&mut requests);
        if let Some(failed) = requests.iter().find(|request| request.status != GNTST_OKAY) {
            log::warn!("a granted page cannot be unmapped: status {}", failed.status);
        }
    }
}

/// Ends mappings in place of who has them: for when that is a [compartment](crate::compartment) that panicked, and will never
/// drop them. Dropping this does nothing.
///
/// The addresses are not used for anything else as long as the owner has not dropped what it has, so whoever uses the pages
/// afterwards faults, and reads or writes nothing of others.
#[derive(Debug)]
pub struct Lease(Leased);

#[derive(Debug)]
enum Leased {
    Mapping(Arc<Mapped>),
    Pool(Arc<Mutex<Vec<Arc<Block>>>>),
}

impl Lease {
    /// Unmaps all that is mapped still. What a pool maps after this stays.
    pub fn end(self) {
        match self.0 {
            Leased::Mapping(mapped) => mapped.end(),
            Leased::Pool(blocks) => blocks.lock().iter().for_each(|block| block.end()),
        }
    }
}

crate::ring::shared_by_field!(Mapping);

/// Pages of ours side by side, each granted to one other domain: a ring of several pages, a buffer for a device.
///
/// Dropping it ends the grants; as with [`Grant`], what the other domain still uses then is given up.
#[derive(Debug)]
pub struct GrantedPages {
    references: Vec<GrantRef>,
    shared: Shared,
    /// The other domain may read only.
    readonly: bool,
}

/// A page that is ours alone, because its grant is withdrawn; granted again when this is dropped.
#[derive(Debug)]
pub struct Withdrawn<'a> {
    reference: GrantRef,
    readonly: bool,
    bytes: &'a [u8],
}

impl core::ops::Deref for Withdrawn<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

impl Drop for Withdrawn<'_> {
    fn drop(&mut self) {
        TABLE.lock().resume(self.reference, self.readonly);
    }
}

impl GrantedPages {
    fn layout(pages: usize) -> Result<core::alloc::Layout, GrantError> {
        let bytes = pages.checked_mul(PAGE_SIZE).filter(|&bytes| bytes > 0);
        let layout = bytes.and_then(|bytes| core::alloc::Layout::from_size_align(bytes, PAGE_SIZE).ok());
        layout.ok_or(GrantError::Call(Errno::EINVAL))
    }

    /// Makes zeroed pages and grants them to `to`.
    ///
    /// # Errors
    /// `EINVAL` for no page, `ENOMEM`; [`GrantError::Full`] when the table cannot grow.
    pub fn new(pages: usize, to: DomId, access: Access) -> Result<Self, GrantError> {
        let layout = Self::layout(pages)?;
        // SAFETY: the layout has a size.
        let address = unsafe { alloc::alloc::alloc_zeroed(layout) } as u64;
        if address == 0 {
            return Err(Errno::ENOMEM.into());
        }
        // SAFETY: heap memory that no reference leads to, mapped until it is freed, which only `drop` does.
        let shared = unsafe { Shared::new(address, layout.size()) };
        let readonly = access != Access::ReadWrite;
        let mut granted = Self { references: Vec::with_capacity(pages), shared, readonly };
        let mut table = TABLE.lock();
        for page in 0..pages as u64 {
            let frame = crate::memory::translate(address + page * PAGE_SIZE as u64);
            let frame = frame.ok_or(GrantError::Call(Errno::EFAULT));
            let (frame, reference) = match frame.and_then(|frame| Ok((frame, table.take()?))) {
                Ok(both) => both,
                Err(error) => {
                    // Dropping what there is takes the lock.
                    drop(table);
                    return Err(error);
                }
            };
            table.set(reference, to, frame, readonly);
            granted.references.push(reference);
        }
        Ok(granted)
    }

    /// The numbers that the other domain needs, one for each page.
    #[must_use]
    pub fn references(&self) -> &[GrantRef] {
        &self.references
    }

    fn page_address(&self, page: usize) -> Option<u64> {
        (page < self.references.len()).then(|| self.shared.address() + (page * PAGE_SIZE) as u64)
    }

    /// Withdraws a page's grant for a while, so that its bytes hold still and can be read without copying them. `None` when there is no
    /// such page, or the other domain uses it. This takes no hypercall.
    pub fn withdraw(&mut self, page: usize) -> Option<Withdrawn<'_>> {
        let (address, reference) = (self.page_address(page)?, *self.references.get(page)?);
        if !TABLE.lock().end(reference) {
            return None;
        }
        // SAFETY: inside the allocation. Nobody writes to it while the slice lives: the other domain has no grant, which ends after the
        // slice, and `self` is borrowed.
        let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, PAGE_SIZE) };
        Some(Withdrawn { reference, readonly: self.readonly, bytes })
    }

    /// The bytes of a page, to be written in place; `None` when there is no such page, or the other domain may write to it, too.
    pub fn page_mut(&mut self, page: usize) -> Option<&mut [u8]> {
        let address = self.page_address(page).filter(|_| self.readonly)?;
        // SAFETY: inside the allocation. The hypervisor lets the other domain only read it, so nobody else writes to it, and `self` is
        // borrowed; what the other domain reads meanwhile is its own affair.
        Some(unsafe { core::slice::from_raw_parts_mut(address as *mut u8, PAGE_SIZE) })
    }

    /// Whether the other domain uses any of them now.
    #[must_use]
    pub fn in_use(&self) -> bool {
        let table = TABLE.lock();
        self.references.iter().any(|&reference| table.in_use(reference))
    }
}

impl Drop for GrantedPages {
    fn drop(&mut self) {
        let pages = self.shared.size() / PAGE_SIZE;
        let kept = self.references.iter().filter(|&&reference| !release(reference)).count();
        if kept > 0 {
            log::warn!(
                "{kept} of {pages} granted pages are dropped while the other domain uses them: all are lost"
            );
        } else if let Ok(layout) = Self::layout(pages) {
            // SAFETY: allocated with this layout, and nobody can reach it any more.
            unsafe { alloc::alloc::dealloc(self.shared.address() as *mut u8, layout) };
        }
    }
}

crate::ring::shared_by_field!(GrantedPages);

/// Pages in a block of addresses of a [`MapPool`].
const BLOCK_PAGES: u32 = 64;

/// Addresses for pages of one other domain, which come and go one by one.
#[derive(Debug)]
struct Block {
    range: Range,
    /// A bit for each page that nothing is mapped to.
    free: AtomicU64,
    /// The handle of each page, with [`MAPPED`]; 0 for none.
    handles: [AtomicU64; BLOCK_PAGES as usize],
}

/// Set beside a handle.
const MAPPED: u64 = 1 << 32;

impl Block {
    fn handle(&self, slot: u32) -> Option<u32> {
        let word = self.handles.get(slot as usize)?.load(Ordering::Acquire);
        (word & MAPPED != 0).then_some(word as u32)
    }

    fn set_handle(&self, slot: u32, handle: Option<u32>) {
        if let Some(word) = self.handles.get(slot as usize) {
            word.store(handle.map_or(0, |handle| MAPPED | u64::from(handle)), Ordering::Release);
        }
    }

    /// Unmaps all, for a [`Lease`].
    fn end(&self) {
        let mut requests: Vec<GnttabUnmapGrantRef> = Vec::new();
        for slot in 0..BLOCK_PAGES {
            if let Some(handle) = self.handle(slot) {
                requests.push(unmap_request(self.range.address(u64::from(slot)), handle));
                self.set_handle(slot, None);
            }
        }
        if !requests.is_empty() {
            unmap_all(&mut requests);
        }
    }
}

/// A page of another domain, mapped by a [`MapPool`]; unmapped when dropped.
#[derive(Debug)]
pub struct MappedPage {
    block: Arc<Block>,
    slot: u32,
    machine: MachAddr,
    shared: Shared,
}

impl MappedPage {
    /// Where the page is in the machine.
    #[must_use]
    pub fn machine_address(&self) -> MachAddr {
        self.machine
    }

    fn unmap_request(&self) -> Option<GnttabUnmapGrantRef> {
        self.block.handle(self.slot).map(|handle| unmap_request(self.shared.address(), handle))
    }

    /// It was tried to unmap it.
    fn unmapped(&mut self, status: i16) {
        self.block.set_handle(self.slot, None);
        if status == GNTST_OKAY {
            self.block.free.fetch_or(1 << self.slot, Ordering::Release);
        } else {
            // Its address is not used again.
            log::warn!("a granted page cannot be unmapped: status {status}");
        }
    }
}

impl Drop for MappedPage {
    fn drop(&mut self) {
        if let Some(request) = self.unmap_request() {
            let mut requests = [request];
            unmap_all(&mut requests);
            self.unmapped(requests[0].status);
        }
    }
}

crate::ring::shared_by_field!(MappedPage);

fn unmap_request(host_addr: u64, handle: u32) -> GnttabUnmapGrantRef {
    GnttabUnmapGrantRef { host_addr, handle, status: -1, ..GnttabUnmapGrantRef::default() }
}

fn unmap_all(requests: &mut [GnttabUnmapGrantRef]) {
    let (at, count) = (requests.as_mut_ptr() as u64, requests.len() as u64);
    // SAFETY: as many requests as it says; whoever held the pages has given them up.
    let _ = unsafe { stub::grant_table_op(u64::from(GnttabOp::UnmapGrantRef.number()), at, count) };
}

/// Maps pages of another domain one by one and many at a time, as a back end needs them.
#[derive(Debug)]
pub struct MapPool {
    from: DomId,
    most: usize,
    blocks: Vec<Arc<Block>>,
    /// The same, for leases.
    all: Arc<Mutex<Vec<Arc<Block>>>>,
    map: Vec<GnttabMapGrantRef>,
    places: Vec<(Arc<Block>, u32)>,
    unmap: Vec<GnttabUnmapGrantRef>,
}

impl MapPool {
    /// For pages that `from` grants, `most` at a time, rounded up to 64.
    #[must_use]
    pub fn new(from: DomId, most: usize) -> Self {
        let (blocks, places, all) = (Vec::new(), Vec::new(), Arc::default());
        Self { from, most, blocks, all, map: Vec::new(), places, unmap: Vec::new() }
    }

    /// The means to unmap all its pages without having them.
    #[must_use]
    pub fn lease(&self) -> Lease {
        Lease(Leased::Pool(Arc::clone(&self.all)))
    }

    /// An address that nothing is mapped to.
    fn place(&mut self) -> Option<(Arc<Block>, u32)> {
        for block in &self.blocks {
            let free = block.free.load(Ordering::Acquire);
            if free != 0 {
                let slot = free.trailing_zeros();
                block.free.fetch_and(!(1 << slot), Ordering::AcqRel);
                return Some((Arc::clone(block), slot));
            }
        }
        if self.blocks.len() * BLOCK_PAGES as usize >= self.most {
            return None;
        }
        let range = Range::new(u64::from(BLOCK_PAGES)).ok()?;
        let handles = [const { AtomicU64::new(0) }; BLOCK_PAGES as usize];
        let block = Arc::new(Block { range, free: AtomicU64::new(!1), handles });
        self.all.lock().push(Arc::clone(&block));
        // The one that was used last comes first: it is the one that has room.
        self.blocks.insert(0, Arc::clone(&block));
        Some((block, 0))
    }

    /// Maps pages, in one hypercall; pushes one to `mapped` for each that is wanted, in order: `None` for what is not granted so, or
    /// has no room.
    pub fn map(
        &mut self,
        wanted: impl Iterator<Item = (GrantRef, Access)>,
        mapped: &mut Vec<Option<MappedPage>>,
    ) {
        self.map.clear();
        let first = mapped.len();
        for (gref, access) in wanted {
            mapped.push(None);
            let Some((block, slot)) = self.place() else { continue };
            let writable = if access == Access::ReadWrite { MapFlags::empty() } else { MapFlags::READONLY };
            self.map.push(GnttabMapGrantRef {
                host_addr: block.range.address(u64::from(slot)),
                flags: (MapFlags::HOST_MAP | writable).bits(),
                gref,
                dom: self.from,
                // Refused unless the hypervisor says otherwise.
                status: -1,
                ..GnttabMapGrantRef::default()
            });
            self.places.push((block, slot));
        }
        if self.map.is_empty() {
            return;
        }
        let (at, count) = (self.map.as_mut_ptr() as u64, self.map.len() as u64);
        // SAFETY: as many requests as it says; they map to addresses that nothing is mapped to, used as shared memory only.
        let _ = unsafe { stub::grant_table_op(u64::from(GnttabOp::MapGrantRef.number()), at, count) };
        // What has found no place comes last: the pool is full from there on.
        let results = mapped.get_mut(first..).into_iter().flatten();
        for ((request, (block, slot)), result) in self.map.iter().zip(self.places.drain(..)).zip(results) {
            if request.status != GNTST_OKAY {
                block.free.fetch_or(1 << slot, Ordering::Release);
                continue;
            }
            // SAFETY: mapped until the value is dropped; the range lives as long as it.
            let shared = unsafe { Shared::new(request.host_addr, PAGE_SIZE) };
            block.set_handle(slot, Some(request.handle));
            *result = Some(MappedPage { block, slot, machine: request.dev_bus_addr, shared });
        }
    }

    /// Unmaps pages, in one hypercall.
    pub fn unmap(&mut self, pages: &mut Vec<MappedPage>) {
        self.unmap.clear();
        self.unmap.extend(pages.iter().filter_map(MappedPage::unmap_request));
        if !self.unmap.is_empty() {
            unmap_all(&mut self.unmap);
        }
        let mapped = pages.iter_mut().filter(|page| page.block.handle(page.slot).is_some());
        for (page, request) in mapped.zip(&self.unmap) {
            page.unmapped(request.status);
        }
        pages.clear();
    }
}

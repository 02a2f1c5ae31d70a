//! Grants: own pages for others to map, and others' pages mapped here. Both end when dropped.
//!
//! Version 1 of the grant table. The table's frames belong to the hypervisor and are mapped in the window at first use; it
//! grows by a frame (512 grants) when it is full. References are given out upward from 8, lowest first until the first
//! one comes back.

use crate::hypercall::stub;
use crate::memory::{Access, Page, Range, Shared};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU16, Ordering};
use hypercall_abi::grant::{
    GNTST_OKAY, GNTTAB_NR_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GnttabCopy, GnttabMapGrantRef,
    GnttabQuerySize, GnttabSetupTable, GnttabUnmapGrantRef, GrantEntryV1, GrantFlags, MapFlags,
};
use hypercall_abi::subops::GnttabOp;
use hypercall_abi::{DomId, Errno, GrantRef, GuestHandle, Mfn, PAGE_SIZE};
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
        let readonly = if readonly { GrantFlags::READONLY.bits() } else { 0 };
        flags.store(GTF_PERMIT_ACCESS | readonly, Ordering::Release);
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
        let mapping = Mapping { range, handles, shared };
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
    range: Range,
    handles: Vec<Option<u32>>,
    shared: Shared,
}

impl Mapping {
    /// Where the first page is mapped.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.range.start()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut requests: Vec<GnttabUnmapGrantRef> = self
            .handles
            .iter()
            .enumerate()
            .filter_map(|(index, handle)| {
                let host_addr = self.range.address(index as u64);
                handle.map(|handle| GnttabUnmapGrantRef {
                    host_addr,
                    handle,
                    ..GnttabUnmapGrantRef::default()
                })
            })
            .collect();
        if requests.is_empty() {
            return;
        }
        let (at, count) = (requests.as_mut_ptr() as u64, requests.len() as u64);
        // SAFETY: as many requests as it says; nobody uses the pages any more, since the mapping is dropped.
        let _ = unsafe { stub::grant_table_op(u64::from(GnttabOp::UnmapGrantRef.number()), at, count) };
        if let Some(failed) = requests.iter().find(|request| request.status != GNTST_OKAY) {
            log::warn!("a granted page cannot be unmapped: status {}", failed.status);
        }
    }
}

crate::ring::shared_by_field!(Mapping);

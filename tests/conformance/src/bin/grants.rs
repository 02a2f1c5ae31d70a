//! Grant tables. A domain may use its own grants, so one domain shows nearly all of it; what takes two asks a peer.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::mem::size_of;
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use conformance::{NOWHERE, TablePage, at, call, grant, hypervisor_frame, memop, mmuext, peer, protect, pte};
use guest_sdk::abi::grant::*;
use guest_sdk::abi::memory::{MemoryDomain, MemoryReservation};
use guest_sdk::abi::subops::{GnttabOp, MemoryOp, MmuextCmd};
use guest_sdk::abi::{DomId, Errno, GrantRef, GuestHandle, Hypercall, MachAddr, Mfn};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, expect_vector, try_read, try_write};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    peer::connect(&domain);
    testkit::run(
        domain,
        &cases![
            // The table.
            size_is_told,
            size_of_nobody,
            table_grows,
            table_frames_stay,
            table_refuses,
            table_list_that_cannot_be_written,
            command_unknown,
            command_with_other_bits,
            count_too_large,
            list_that_cannot_be_read,
            list_of_the_hypervisor,
            list_that_runs_out_of_memory,
            answer_that_cannot_be_written,
            long_list,
            // Maps.
            map_own,
            map_tells_the_machine_address,
            map_read_only,
            map_refused,
            map_of_nobodys_domain,
            map_addresses_refused,
            map_frame_of_others,
            map_page_table_read_only,
            map_shared_info,
            map_twice,
            map_over_another_page,
            map_pins_the_frame,
            map_free_bits,
            map_into_an_entry,
            map_into_an_entry_refused,
            map_for_devices,
            map_for_both,
            map_count_is_limited,
            entry_changed_while_in_use,
            unmap_refused,
            unmap_of_nothing,
            unmap_after_the_entry_was_overwritten,
            unmap_the_other_kind_of_entry,
            // Replacing.
            replace_moves_an_entry,
            replace_by_nothing,
            replace_refused,
            replace_does_not_pass_a_writable_entry,
            // Copies.
            copy_between_entries,
            copy_between_frames,
            copy_from_entry_to_frame,
            copy_from_frame_to_entry,
            copy_whole_page,
            copy_nothing,
            copy_past_the_end,
            copy_refused,
            copy_frame_of_another,
            copy_bad_frames,
            copy_list_goes_on_after_an_error,
            // Exchanging entries.
            swap_entries,
            swap_refused,
            // Transfers.
            transfer_to_oneself,
            transfer_of_a_frame_in_use,
            transfer_to_nobody,
            transfer_nobody_waits_for,
            transfer_flags_are_exact,
            // Caches.
            cache_flush_own,
            cache_flush_refused,
            cache_flush_frame_of_nobody,
            cache_flush_nothing_to_go_on_with,
            // Versions.
            version_is_told,
            version_numbers,
            version_2_and_back,
            version_keeps_reserved_entries,
            version_empties_the_others,
            version_is_busy_while_an_entry_is_used,
            version_changes_under_a_reserved_mapping,
            version_1_must_express_what_stays,
            version_2_stays_while_its_frames_are_mapped,
            status_frames_of_version_1,
            status_frames_are_listed,
            status_frames_refused,
            v2_map_marks_the_status,
            v2_map_read_only,
            v2_frames_have_large_numbers,
            v2_table_has_half_the_entries,
            v2_part_of_a_page_is_copied,
            v2_part_of_a_page_is_not_mapped,
            v2_entry_for_another_entry,
            v2_swap,
            v2_transfer,
            // Two domains.
            pair_map_and_revoke,
            pair_copy_both_ways,
            pair_copy_through_us,
            pair_transfer,
            pair_nobody_elses_table,
        ],
    )
}

/// Entry that the cases use: of no use to the SDK before it has given out 90 others.
const GREF: GrantRef = GrantRef::new(100);
/// Another.
const OTHER: GrantRef = GrantRef::new(101);
/// One that stays when the version changes, and that nobody needs.
const RESERVED: GrantRef = GrantRef::new(7);
/// A domain that is not there.
const NOBODY: DomId = DomId::new(1234);
const READONLY: u16 = GrantFlags::READONLY.bits();
const SUB_PAGE: u16 = GrantFlags::SUB_PAGE.bits();
const READING: u16 = GrantFlags::READING.bits();
const WRITING: u16 = GrantFlags::WRITING.bits();
const BOTH: u16 = GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF;
/// An address in the hypervisor's part.
const HYPERVISOR: u64 = 0xffff_8300_0000_0000;

/// The first frame of the domain's own table, mapped.
struct Table {
    id: DomId,
    entries: Range,
    status: Option<Range>,
}

impl Table {
    fn new(domain: &Domain) -> Result<Table, Stop> {
        let mut frame = Mfn::new(0);
        let mut setup = GnttabSetupTable {
            dom: DomId::SELF,
            nr_frames: 1,
            status: 77,
            frame_list: GuestHandle::new(at(&mut frame)),
            ..Default::default()
        };
        check_eq!(grant(GnttabOp::SetupTable, &mut setup), Ok(0));
        check_eq!(setup.status, GNTST_OKAY);
        let entries = Range::new(1)?;
        // SAFETY: accessed as atomic words only.
        unsafe { entries.map(0, frame, Access::ReadWrite)? };
        Ok(Table { id: domain.id(), entries, status: None })
    }

    /// The half-words at an entry of version 1.
    fn half(&self, gref: GrantRef, index: u64) -> &AtomicU16 {
        let address = self.entries.start() + u64::from(gref.get()) * 8 + index * 2;
        assert!(gref.get() < 512);
        // SAFETY: inside the mapped frame.
        unsafe { AtomicU16::from_ptr(address as *mut u16) }
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        assert!(index < 512);
        // SAFETY: inside the mapped frame.
        unsafe { AtomicU64::from_ptr((self.entries.start() + index * 8) as *mut u64) }
    }

    /// An entry of version 1.
    fn get(&self, gref: GrantRef) -> GrantEntryV1 {
        let word = self.word(gref.get().into()).load(Ordering::SeqCst);
        GrantEntryV1 {
            flags: word as u16,
            domid: DomId::new((word >> 16) as u16),
            frame: (word >> 32) as u32,
        }
    }

    fn set(&self, gref: GrantRef, flags: u16, domid: DomId, frame: u64) {
        let word = frame << 32 | u64::from(domid.get()) << 16 | u64::from(flags);
        self.word(gref.get().into()).store(word, Ordering::SeqCst);
    }

    /// Grants a page to this domain.
    fn permit(&self, gref: GrantRef, page: &Page, flags: u16) {
        self.set(gref, GTF_PERMIT_ACCESS | flags, self.id, page.mfn().get());
    }

    fn flags(&self, gref: GrantRef) -> u16 {
        self.half(gref, 0).load(Ordering::SeqCst)
    }

    /// An entry of version 2: flags and domain, place and length or the domain stood for, and frame or entry.
    fn get2(&self, gref: GrantRef) -> (u64, u64) {
        let index = u64::from(gref.get()) * 2;
        (self.word(index).load(Ordering::SeqCst), self.word(index + 1).load(Ordering::SeqCst))
    }

    fn set2(&self, gref: GrantRef, flags: u16, domid: DomId, place: u32, frame: u64) {
        let index = u64::from(gref.get()) * 2;
        let header = u64::from(place) << 32 | u64::from(domid.get()) << 16 | u64::from(flags);
        self.word(index + 1).store(frame, Ordering::SeqCst);
        self.word(index).store(header, Ordering::SeqCst);
    }

    fn permit2(&self, gref: GrantRef, page: &Page, flags: u16) {
        self.set2(gref, GTF_PERMIT_ACCESS | flags, self.id, 0, page.mfn().get());
    }

    /// What the status frame says.
    fn status(&self, gref: GrantRef) -> u16 {
        let address = self.status.as_ref().expect("version 2").start() + u64::from(gref.get()) * 2;
        // SAFETY: inside the mapped frame: references of the first frame are below 256.
        unsafe { AtomicU16::from_ptr(address as *mut u16) }.load(Ordering::SeqCst)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.set(GREF, 0, DomId::ZERO, 0);
        self.set(OTHER, 0, DomId::ZERO, 0);
    }
}

fn set_version(version: u32) -> (Result<u64, Errno>, u32) {
    let mut set = GnttabSetVersion { version };
    let result = grant(GnttabOp::SetVersion, &mut set);
    (result, set.version)
}

fn status_frames<const N: usize>() -> Result<(i16, [Mfn; N]), Stop> {
    let mut frames = [Mfn::new(0); N];
    let mut get = GnttabGetStatusFrames {
        nr_frames: N as u32,
        dom: DomId::SELF,
        status: 77,
        frame_list: GuestHandle::new(at(&mut frames)),
    };
    check_eq!(grant(GnttabOp::GetStatusFrames, &mut get), Ok(0));
    Ok((get.status, frames))
}

/// Does `work` with version 2 in force, and puts version 1 back whatever it says.
fn with_version_2(domain: &Domain, work: impl FnOnce(&Table) -> Verdict) -> Verdict {
    check_eq!(set_version(2), (Ok(0), 2));
    let verdict = mapped_version_2(domain, work);
    check_eq!(set_version(1), (Ok(0), 1), "after {verdict:?}");
    verdict
}

fn mapped_version_2(domain: &Domain, work: impl FnOnce(&Table) -> Verdict) -> Verdict {
    let mut table = Table::new(domain)?;
    let (status, frames) = status_frames::<1>()?;
    check_eq!(status, GNTST_OKAY);
    let range = Range::new(1)?;
    // SAFETY: read as atomic words only.
    unsafe { range.map(0, frames[0], Access::Read)? };
    table.status = Some(range);
    let verdict = work(&table);
    table.set2(GREF, 0, DomId::ZERO, 0, 0);
    table.set2(OTHER, 0, DomId::ZERO, 0, 0);
    table.set2(RESERVED, 0, DomId::ZERO, 0, 0);
    verdict
}

fn map_op(dom: DomId, gref: GrantRef, address: u64, flags: MapFlags) -> GnttabMapGrantRef {
    GnttabMapGrantRef {
        host_addr: address,
        flags: flags.bits(),
        gref,
        dom,
        status: 77,
        handle: 0x5555,
        dev_bus_addr: MachAddr::new(0x7777),
    }
}

/// Maps, and says the status.
fn try_map(dom: DomId, gref: GrantRef, address: u64, flags: MapFlags) -> Result<i16, Stop> {
    let mut request = map_op(dom, gref, address, flags);
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check!(request.status != GNTST_OKAY || request.handle != 0x5555);
    Ok(request.status)
}

/// Maps what must be mapped: the handle.
fn map(dom: DomId, gref: GrantRef, address: u64, flags: MapFlags) -> Result<u32, Stop> {
    let mut request = map_op(dom, gref, address, flags);
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_OKAY);
    Ok(request.handle)
}

fn unmap_both(address: u64, bus: u64, handle: u32) -> Result<i16, Stop> {
    let mut request = GnttabUnmapGrantRef {
        host_addr: address,
        dev_bus_addr: MachAddr::new(bus),
        handle,
        status: 77,
        pad0: 0,
    };
    check_eq!(grant(GnttabOp::UnmapGrantRef, &mut request), Ok(0));
    Ok(request.status)
}

fn unmap(address: u64, handle: u32) -> Result<i16, Stop> {
    unmap_both(address, 0, handle)
}

fn replace(address: u64, new: u64, handle: u32) -> Result<i16, Stop> {
    let mut request =
        GnttabUnmapAndReplace { host_addr: address, new_addr: new, handle, status: 77, pad0: 0 };
    check_eq!(grant(GnttabOp::UnmapAndReplace, &mut request), Ok(0));
    Ok(request.status)
}

fn copy(source: GnttabCopyPtr, dest: GnttabCopyPtr, len: u16, flags: u16) -> Result<i16, Stop> {
    let mut request = GnttabCopy { source, dest, len, flags, status: 77, pad0: 0 };
    check_eq!(grant(GnttabOp::Copy, &mut request), Ok(0));
    Ok(request.status)
}

fn transfer(mfn: u64, domid: DomId, gref: GrantRef) -> Result<i16, Stop> {
    let mut request = GnttabTransfer { mfn: Mfn::new(mfn), domid, gref, status: 77, ..Default::default() };
    check_eq!(grant(GnttabOp::Transfer, &mut request), Ok(0));
    Ok(request.status)
}

/// A page whose first words are `values`.
fn page(values: &[u64]) -> Result<Page, Stop> {
    let mut page = Page::new()?;
    for (bytes, value) in page.bytes_mut().chunks_exact_mut(8).zip(values) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    Ok(page)
}

/// Word of a page that somebody else may have written.
fn word(page: &Page, index: u64) -> u64 {
    try_read(page.address() + index * 8).unwrap_or(u64::MAX)
}

// ── the table ──

fn query(dom: DomId) -> Result<GnttabQuerySize, Stop> {
    let mut size = GnttabQuerySize { dom, status: 77, ..Default::default() };
    check_eq!(grant(GnttabOp::QuerySize, &mut size), Ok(0));
    Ok(size)
}

fn size_is_told(domain: &mut Domain) -> Verdict {
    for dom in [DomId::SELF, domain.id()] {
        let size = query(dom)?;
        check_eq!(size.status, GNTST_OKAY);
        check!(size.nr_frames >= 1 && size.max_nr_frames >= size.nr_frames, "{size:?}");
    }
    let mut size = GnttabQuerySize { dom: DomId::SELF, ..Default::default() };
    for count in [0, 2] {
        check_eq!(call(Hypercall::GrantTableOp, [6, at(&mut size), count, 0, 0]), Err(Errno::EINVAL));
    }
    check_eq!(size.max_nr_frames, 0, "nothing is answered");
    Ok(())
}

fn size_of_nobody(_: &mut Domain) -> Verdict {
    for dom in [NOBODY, DomId::IO, DomId::XEN, DomId::INVALID] {
        check_eq!(query(dom)?.status, GNTST_BAD_DOMAIN, "{dom}");
    }
    check_eq!(query(DomId::SELF)?.status, GNTST_OKAY);
    Ok(())
}

fn setup<const N: usize>(dom: DomId, frames: &mut [u64; N]) -> Result<i16, Stop> {
    let mut setup = GnttabSetupTable {
        dom,
        nr_frames: N as u32,
        status: 77,
        frame_list: GuestHandle::new(at(frames)),
        ..Default::default()
    };
    check_eq!(grant(GnttabOp::SetupTable, &mut setup), Ok(0));
    Ok(setup.status)
}

fn table_grows(_: &mut Domain) -> Verdict {
    let mut frames = [u64::MAX; 3];
    check_eq!(setup(DomId::SELF, &mut frames)?, GNTST_OKAY);
    check!(frames[0] != frames[1] && frames[1] != frames[2] && !frames.contains(&u64::MAX), "{frames:x?}");
    check!(query(DomId::SELF)?.nr_frames >= 3);
    let range = Range::new(1)?;
    // SAFETY: a frame of nothing but entries that nobody has written.
    unsafe { range.map(0, Mfn::new(frames[2]), Access::ReadWrite)? };
    check_eq!(try_read(range.start() + 4088), Ok(0));
    Ok(())
}

fn table_frames_stay(domain: &mut Domain) -> Verdict {
    let (mut first, mut second) = ([0; 2], [0; 2]);
    check_eq!(setup(DomId::SELF, &mut first)?, GNTST_OKAY);
    check_eq!(setup(domain.id(), &mut second)?, GNTST_OKAY);
    check_eq!(first, second);
    check_eq!(setup(DomId::SELF, &mut [])?, GNTST_OKAY, "none at all");
    check!(query(DomId::SELF)?.nr_frames >= 2, "it does not shrink");
    Ok(())
}

fn table_refuses(_: &mut Domain) -> Verdict {
    let mut frames = [u64::MAX; 1];
    for dom in [NOBODY, DomId::IO, DomId::XEN] {
        check_eq!(setup(dom, &mut frames)?, GNTST_BAD_DOMAIN, "{dom}");
    }
    let size = query(DomId::SELF)?;
    let mut list = Vec::new();
    list.resize(size.max_nr_frames as usize + 1, u64::MAX);
    let mut request = GnttabSetupTable {
        dom: DomId::SELF,
        nr_frames: size.max_nr_frames + 1,
        status: 77,
        frame_list: GuestHandle::new(list.as_mut_ptr() as u64),
        ..Default::default()
    };
    check_eq!(grant(GnttabOp::SetupTable, &mut request), Ok(0));
    check_eq!(request.status, GNTST_GENERAL_ERROR, "more than it may have");
    for count in [0, 2] {
        check_eq!(call(Hypercall::GrantTableOp, [2, at(&mut request), count, 0, 0]), Err(Errno::EINVAL));
    }
    check_eq!(query(DomId::SELF)?.nr_frames, size.nr_frames, "it has not grown");
    check!(list.iter().chain(&frames).all(|frame| *frame == u64::MAX));
    check_eq!(setup(DomId::SELF, &mut frames)?, GNTST_OKAY);
    check!(frames[0] != u64::MAX);
    Ok(())
}

fn table_list_that_cannot_be_written(_: &mut Domain) -> Verdict {
    let mut request = GnttabSetupTable {
        dom: DomId::SELF,
        nr_frames: 1,
        status: 77,
        frame_list: GuestHandle::new(NOWHERE),
        ..Default::default()
    };
    check_eq!(grant(GnttabOp::SetupTable, &mut request), Ok(0));
    check_eq!(request.status, GNTST_BAD_VIRT_ADDR);
    for list in [HYPERVISOR, 0xffff_8000_0000_0000, 0x8000_0000_0000] {
        request.status = 77;
        request.frame_list = GuestHandle::new(list);
        check_eq!(grant(GnttabOp::SetupTable, &mut request), Err(Errno::EFAULT), "{list:#x}");
        check_eq!(request.status, 77);
    }
    check_eq!(setup(DomId::SELF, &mut [0])?, GNTST_OKAY);
    Ok(())
}

fn command_unknown(_: &mut Domain) -> Verdict {
    let mut size = GnttabQuerySize { dom: DomId::SELF, status: 77, ..Default::default() };
    for command in [3, 13, 100, 0xfff] {
        let result = call(Hypercall::GrantTableOp, [command, at(&mut size), 1, 0, 0]);
        check_eq!(result, Err(Errno::ENOSYS), "command {command}");
    }
    check_eq!(size.status, 77);
    check_eq!(grant(GnttabOp::QuerySize, &mut size), Ok(0));
    check_eq!(size.status, GNTST_OKAY);
    Ok(())
}

fn command_with_other_bits(_: &mut Domain) -> Verdict {
    let mut size = GnttabQuerySize { dom: DomId::SELF, status: 77, ..Default::default() };
    for bits in [1 << 12, 1 << 31] {
        for command in [0, 6, 99] {
            let result = call(Hypercall::GrantTableOp, [command | bits, at(&mut size), 1, 0, 0]);
            check_eq!(result, Err(Errno::EINVAL), "command {command} with {bits:#x}");
        }
    }
    check_eq!(size.status, 77);
    // The command is a number of 32 bits.
    check_eq!(call(Hypercall::GrantTableOp, [6 | 1 << 32, at(&mut size), 1, 0, 0]), Ok(0));
    check_eq!(size.status, GNTST_OKAY);
    Ok(())
}

fn count_too_large(_: &mut Domain) -> Verdict {
    let mut swap = GnttabSwapGrantRef { ref_a: GREF, ref_b: GREF, status: 77, pad0: 0 };
    for command in 0..14 {
        for count in [1 << 31, u64::from(u32::MAX)] {
            let result = call(Hypercall::GrantTableOp, [command, at(&mut swap), count, 0, 0]);
            check_eq!(result, Err(Errno::EINVAL), "command {command}, {count}");
        }
    }
    check_eq!(swap.status, 77);
    // The count is a number of 32 bits.
    check_eq!(call(Hypercall::GrantTableOp, [11, at(&mut swap), 1 | 1 << 32, 0, 0]), Ok(0));
    check_eq!(swap.status, GNTST_OKAY);
    Ok(())
}

/// Commands that take a list, and those that take one argument.
const LISTS: [GnttabOp; 7] = [
    GnttabOp::MapGrantRef,
    GnttabOp::UnmapGrantRef,
    GnttabOp::Transfer,
    GnttabOp::Copy,
    GnttabOp::UnmapAndReplace,
    GnttabOp::SwapGrantRef,
    GnttabOp::CacheFlush,
];
const SINGLE: [GnttabOp; 5] = [
    GnttabOp::SetupTable,
    GnttabOp::QuerySize,
    GnttabOp::SetVersion,
    GnttabOp::GetStatusFrames,
    GnttabOp::GetVersion,
];

fn list_that_cannot_be_read(_: &mut Domain) -> Verdict {
    for command in LISTS.into_iter().chain(SINGLE) {
        for address in [0, NOWHERE, HYPERVISOR, 0x8000_0000_0000, 0x7fff_ffff_fffe] {
            let result = call(Hypercall::GrantTableOp, [command.number().into(), address, 1, 0, 0]);
            check_eq!(result, Err(Errno::EFAULT), "{} at {address:#x}", command.name());
        }
    }
    check_eq!(query(DomId::SELF)?.status, GNTST_OKAY);
    Ok(())
}

fn list_of_the_hypervisor(_: &mut Domain) -> Verdict {
    for command in LISTS {
        let empty = |address| call(Hypercall::GrantTableOp, [command.number().into(), address, 0, 0, 0]);
        check_eq!(empty(0), Ok(0), "{}: nothing to read", command.name());
        check_eq!(empty(NOWHERE), Ok(0), "{}: nothing to read", command.name());
        check_eq!(empty(HYPERVISOR), Err(Errno::EFAULT), "{}", command.name());
        check_eq!(empty(0x8000_0000_0000), Err(Errno::EFAULT), "{}", command.name());
    }
    Ok(())
}

fn list_that_runs_out_of_memory(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let data = page(&[])?;
    table.permit(GREF, &data, 0);
    let (list, window) = (Range::new(2)?, Range::new(1)?);
    let first = Page::new()?;
    // SAFETY: both addresses of the page are used as memory that others change.
    unsafe { list.map(0, first.mfn(), Access::ReadWrite)? };
    let place = list.address(1) - size_of::<GnttabMapGrantRef>() as u64;
    // SAFETY: the end of the page, at an address that nobody else uses; the structure is aligned there.
    unsafe {
        (place as *mut GnttabMapGrantRef).write_volatile(map_op(
            table.id,
            GREF,
            window.start(),
            MapFlags::HOST_MAP,
        ));
    }
    check_eq!(call(Hypercall::GrantTableOp, [0, place, 2, 0, 0]), Err(Errno::EFAULT));
    // SAFETY: as above.
    let done = unsafe { (place as *const GnttabMapGrantRef).read_volatile() };
    check_eq!(done.status, GNTST_OKAY, "what comes before is done");
    check_eq!(table.flags(GREF) & READING, READING);
    check_eq!(unmap(window.start(), done.handle)?, GNTST_OKAY);
    Ok(())
}

fn answer_that_cannot_be_written(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let data = page(&[])?;
    table.permit(GREF, &data, 0);
    let mut list = Page::new()?;
    let request = GnttabSwapGrantRef { ref_a: GREF, ref_b: OTHER, status: 77, pad0: 0 };
    let bytes: [u8; size_of::<GnttabSwapGrantRef>()] = zerocopy_bytes(&request);
    list.bytes_mut()[..bytes.len()].copy_from_slice(&bytes);
    protect(&list, false)?;
    let result = call(Hypercall::GrantTableOp, [11, list.address(), 1, 0, 0]);
    protect(&list, true)?;
    check_eq!(result, Err(Errno::EFAULT));
    check_eq!((table.get(GREF).flags, table.get(OTHER).flags), (0, GTF_PERMIT_ACCESS), "done all the same");
    Ok(())
}

fn zerocopy_bytes(swap: &GnttabSwapGrantRef) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&swap.ref_a.get().to_le_bytes());
    bytes[4..8].copy_from_slice(&swap.ref_b.get().to_le_bytes());
    bytes[8..10].copy_from_slice(&swap.status.to_le_bytes());
    bytes
}

fn long_list(_: &mut Domain) -> Verdict {
    let (from, to) = (page(&[])?, page(&[])?);
    // Word n of the source is n; they are copied in reverse.
    for n in 0..512 {
        // SAFETY: the page is this case's.
        unsafe { try_write(from.address() + n * 8, n)? };
    }
    let mut list: Vec<_> = (0..512u16)
        .map(|n| GnttabCopy {
            source: GnttabCopyPtr::own(from.mfn(), n * 8),
            dest: GnttabCopyPtr::own(to.mfn(), 4088 - n * 8),
            len: 8,
            status: 77,
            ..Default::default()
        })
        .collect();
    check_eq!(call(Hypercall::GrantTableOp, [5, list.as_mut_ptr() as u64, 512, 0, 0]), Ok(0));
    check!(list.iter().all(|op| op.status == GNTST_OKAY));
    check!((0..512).all(|n| word(&to, n) == 511 - n));
    Ok(())
}

// ── maps ──

fn map_own(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[0x5aa5_1234])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING, "the entry says so");
    check_eq!(try_read(window.start()), Ok(0x5aa5_1234));
    // SAFETY: shared memory of this case.
    unsafe { try_write(window.start() + 8, 99)? };
    check_eq!(word(&data, 1), 99);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    expect_vector(try_read(window.start()), 14, 0)
}

fn map_tells_the_machine_address(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let mut request = map_op(table.id, GREF, window.start(), MapFlags::HOST_MAP);
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!((request.status, request.dev_bus_addr), (GNTST_OKAY, data.mfn().address()));
    check_eq!(unmap(window.start(), request.handle)?, GNTST_OKAY);
    // What is refused leaves the other fields as they were.
    let mut request = map_op(NOBODY, GREF, window.start(), MapFlags::HOST_MAP);
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_BAD_DOMAIN);
    check_eq!((request.handle, request.dev_bus_addr.get()), (0x5555, 0x7777));
    Ok(())
}

fn map_read_only(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, READONLY);
    check_eq!(try_map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?, GNTST_GENERAL_ERROR);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READONLY);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READONLY | READING);
    check_eq!(try_read(window.start()), Ok(0));
    // SAFETY: refused by the mapping.
    let refused = unsafe { try_write(window.start(), 1) };
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    expect_vector(refused, 14, 3)
}

fn map_refused(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    let mfn = data.mfn().get();
    for (flags, dom, expected) in [
        (GTF_INVALID, table.id, GNTST_GENERAL_ERROR),
        (GTF_ACCEPT_TRANSFER, table.id, GNTST_GENERAL_ERROR),
        (GTF_TRANSITIVE, table.id, GNTST_GENERAL_ERROR),
        (GTF_PERMIT_ACCESS | SUB_PAGE, table.id, GNTST_GENERAL_ERROR),
        (GTF_PERMIT_ACCESS, DomId::new(77), GNTST_GENERAL_ERROR),
        (GTF_PERMIT_ACCESS, DomId::SELF, GNTST_GENERAL_ERROR),
        (GTF_PERMIT_ACCESS, table.id, GNTST_OKAY),
    ] {
        table.set(GREF, flags, dom, mfn);
        let mut request = map_op(table.id, GREF, window.start(), MapFlags::HOST_MAP);
        check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
        check_eq!(request.status, expected, "flags {flags:#x} for {dom}");
        if expected == GNTST_OKAY {
            check_eq!(unmap(window.start(), request.handle)?, GNTST_OKAY);
        } else {
            check_eq!(memory::leaf(window.start()), Some(0));
        }
        check_eq!(table.flags(GREF), flags, "and no mark is left");
    }
    let status = |gref, flags| try_map(table.id, gref, window.start(), flags);
    check_eq!(status(GREF, MapFlags::empty())?, GNTST_BAD_GNTREF, "for nobody");
    check_eq!(status(GREF, MapFlags::READONLY)?, GNTST_BAD_GNTREF, "for nobody, reading");
    for gref in [1 << 20, u32::MAX] {
        check_eq!(status(GrantRef::new(gref), MapFlags::HOST_MAP)?, GNTST_BAD_GNTREF, "{gref:#x}");
    }
    Ok(())
}

fn map_of_nobodys_domain(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    for dom in [NOBODY, DomId::SELF, DomId::IO, DomId::XEN, DomId::INVALID] {
        let status = try_map(dom, GREF, window.start(), MapFlags::HOST_MAP)?;
        check_eq!(status, GNTST_BAD_DOMAIN, "{dom}");
    }
    check_eq!(memory::leaf(window.start()), Some(0));
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    Ok(())
}

fn map_addresses_refused(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[7])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    for address in [NOWHERE, HYPERVISOR, 0xffff_8000_0000_0000, 0x8000_0000_0000, u64::MAX << 48] {
        let status = try_map(table.id, GREF, address, MapFlags::HOST_MAP)?;
        check_eq!(status, GNTST_GENERAL_ERROR, "{address:#x}");
        check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    }
    // An address within a page means the page.
    let handle = map(table.id, GREF, window.start() + 0x123, MapFlags::HOST_MAP)?;
    check_eq!(try_read(window.start()), Ok(7));
    check_eq!(unmap(window.start() + 0xfff, handle)?, GNTST_OKAY);
    Ok(())
}

fn map_frame_of_others(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    for frame in [hypervisor_frame()?, 0xffff_ffff, 0xffff_fff0] {
        table.set(GREF, GTF_PERMIT_ACCESS, table.id, frame);
        for flags in [MapFlags::HOST_MAP, MapFlags::HOST_MAP | MapFlags::READONLY, MapFlags::DEVICE_MAP] {
            let status = try_map(table.id, GREF, window.start(), flags)?;
            check_eq!(status, GNTST_BAD_PAGE, "frame {frame:#x} {flags:?}");
        }
        check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    }
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    Ok(())
}

fn map_page_table_read_only(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let window = Range::new(1)?;
    let data = page(&[])?;
    let l1 = TablePage::new(&[(3, pte(data.mfn().get(), 0x61))])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, l1.mfn(), 0), Ok(0));
    table.set(GREF, GTF_PERMIT_ACCESS, table.id, l1.mfn());
    let writable = try_map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    let device = try_map(table.id, GREF, 0, MapFlags::DEVICE_MAP)?;
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    let seen = try_read(window.start() + 24);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(mmuext(MmuextCmd::UnpinTable, l1.mfn(), 0), Ok(0));
    check_eq!((writable, device), (GNTST_GENERAL_ERROR, GNTST_GENERAL_ERROR));
    check_eq!(seen.map(|entry| entry >> 12 & 0xff_ffff_ffff), Ok(data.mfn().get()));
    Ok(())
}

fn map_shared_info(domain: &mut Domain) -> Verdict {
    // A page that the hypervisor shares with a domain is the domain's to grant.
    let table = Table::new(domain)?;
    let window = Range::new(1)?;
    let own = memory::translate(conformance::shared() as u64).ok_or("shared_info is not mapped")?;
    table.set(GREF, GTF_PERMIT_ACCESS, table.id, own.get());
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    let (theirs, ours) = (try_read(window.start() + 0xc00), try_read(conformance::shared() as u64 + 0xc00));
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(theirs, ours);
    Ok(())
}

fn map_twice(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[1])?, Range::new(2)?);
    table.permit(GREF, &data, 0);
    let reading = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING);
    let writing = map(table.id, GREF, window.address(1), MapFlags::HOST_MAP)?;
    check!(reading != writing);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING);
    check_eq!(unmap(window.address(1), writing)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING);
    check_eq!(try_read(window.start()), Ok(1));
    check_eq!(unmap(window.start(), reading)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    Ok(())
}

/// Sees that a page is referred to by its own mapping only: it can become a page table.
fn can_be_a_table(page: &Page) -> Verdict {
    protect(page, false)?;
    let pinned = mmuext(MmuextCmd::PinL1Table, page.mfn().get(), 0);
    let unpinned = mmuext(MmuextCmd::UnpinTable, page.mfn().get(), 0);
    protect(page, true)?;
    check_eq!((pinned, unpinned), (Ok(0), Ok(0)));
    Ok(())
}

fn map_over_another_page(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, other, window) = (page(&[1])?, page(&[2])?, Range::new(1)?);
    // SAFETY: read only here.
    unsafe { window.map(0, other.mfn(), Access::ReadWrite)? };
    check_eq!(try_read(window.start()), Ok(2));
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    // The processor may know the old translation still: that is for the guest to end.
    memory::flush_tlb();
    let seen = try_read(window.start());
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!((seen, memory::leaf(window.start())), (Ok(1), Some(0)));
    // The page that was mapped there before has lost nothing and kept nothing.
    can_be_a_table(&other)
}

fn map_pins_the_frame(domain: &mut Domain) -> Verdict {
    // While a granted page is mapped writable it cannot become a page table, though its owner maps it read-only.
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    let frame = data.mfn().get();
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    protect(&data, false)?;
    let pinned = mmuext(MmuextCmd::PinL1Table, frame, 0);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    let later = mmuext(MmuextCmd::PinL1Table, frame, 0);
    check_eq!(mmuext(MmuextCmd::UnpinTable, frame, 0), Ok(0));
    protect(&data, true)?;
    check_eq!((pinned, later), (Err(Errno::EINVAL), Ok(0)));
    Ok(())
}

fn map_free_bits(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let flags = MapFlags::from_bits_retain(MapFlags::HOST_MAP.bits() | 5 << 16);
    let handle = map(table.id, GREF, window.start(), flags)?;
    let leaf = memory::leaf(window.start()).unwrap_or(0);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(leaf >> 12 & 0xff_ffff_ffff, data.mfn().get());
    check_eq!(leaf >> 9 & 7, 5, "bits 9 to 11 of the entry are the guest's");
    // Present, writable, accessed, dirty; not executable.
    check_eq!((leaf & 0x63, leaf >> 63), (0x63, 1));
    Ok(())
}

/// A pinned L1 table that nothing leads to.
fn spare_table() -> Result<TablePage, Stop> {
    let l1 = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, l1.mfn(), 0), Ok(0));
    Ok(l1)
}

fn unpin(l1: &TablePage) -> Verdict {
    check_eq!(mmuext(MmuextCmd::UnpinTable, l1.mfn(), 0), Ok(0));
    Ok(())
}

fn map_into_an_entry(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, l1) = (page(&[])?, spare_table()?);
    table.permit(GREF, &data, 0);
    let flags = MapFlags::HOST_MAP | MapFlags::CONTAINS_PTE;
    let handle = map(table.id, GREF, l1.place(9), flags)?;
    check_eq!(l1.word(9) >> 12 & 0xff_ffff_ffff, data.mfn().get());
    check_eq!((l1.word(9) & 3, l1.word(8), l1.word(10)), (3, 0, 0));
    check_eq!(unmap(l1.place(8), handle)?, GNTST_GENERAL_ERROR, "another entry");
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING);
    check_eq!(unmap(l1.place(9), handle)?, GNTST_OKAY);
    check_eq!((l1.word(9), table.flags(GREF)), (0, GTF_PERMIT_ACCESS));
    unpin(&l1)
}

fn map_into_an_entry_refused(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, other, l1) = (page(&[])?, page(&[])?, spare_table()?);
    table.permit(GREF, &data, 0);
    let flags = MapFlags::HOST_MAP | MapFlags::CONTAINS_PTE;
    for (address, what) in [
        (l1.place(9) + 4, "misaligned"),
        (other.mfn().address().get(), "data"),
        (hypervisor_frame()? << 12, "the hypervisor's"),
        (0xffff_ffff_f000, "no frame"),
        (u64::MAX - 7, "no address"),
    ] {
        check_eq!(try_map(table.id, GREF, address, flags)?, GNTST_GENERAL_ERROR, "{what}");
        check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    }
    check_eq!(word(&other, 0), 0);
    let handle = map(table.id, GREF, l1.place(9), flags)?;
    check_eq!(unmap(l1.place(9), handle)?, GNTST_OKAY);
    unpin(&l1)
}

fn map_for_devices(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let data = page(&[])?;
    table.permit(GREF, &data, 0);
    let mut request = map_op(table.id, GREF, 0, MapFlags::DEVICE_MAP);
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_OKAY);
    let bus = data.mfn().address();
    check_eq!(request.dev_bus_addr, bus);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING);
    // It counts as written: no page table can be made of it.
    protect(&data, false)?;
    let pinned = mmuext(MmuextCmd::PinL1Table, data.mfn().get(), 0);
    let wrong = unmap_both(0, bus.get() + 4096, request.handle)?;
    let right = unmap_both(0, bus.get(), request.handle)?;
    protect(&data, true)?;
    check_eq!((pinned, wrong, right), (Err(Errno::EINVAL), GNTST_BAD_DEV_ADDR, GNTST_OKAY));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    check_eq!(unmap_both(0, bus.get(), request.handle)?, GNTST_BAD_HANDLE);
    Ok(())
}

fn map_for_both(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[5])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::DEVICE_MAP)?;
    let bus = data.mfn().address().get();
    check_eq!(unmap_both(window.start(), 0, handle)?, GNTST_OKAY);
    check_eq!(memory::leaf(window.start()), Some(0));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING, "the device has it still");
    check_eq!(unmap_both(window.start(), 0, handle)?, GNTST_OKAY, "nothing is left for the CPU to do");
    check_eq!(unmap_both(0, bus, handle)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    // Both at once.
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::DEVICE_MAP)?;
    check_eq!(unmap_both(window.start(), bus + 1, handle)?, GNTST_BAD_DEV_ADDR, "and nothing is unmapped");
    check_eq!(try_read(window.start()), Ok(5));
    check_eq!(unmap_both(window.start(), bus, handle)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    Ok(())
}

fn map_count_is_limited(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let data = page(&[])?;
    table.permit(GREF, &data, READONLY);
    let flags = MapFlags::DEVICE_MAP | MapFlags::READONLY;
    let mut handles = Vec::new();
    for _ in 0..128 {
        handles.push(map(table.id, GREF, 0, flags)?);
    }
    check_eq!(try_map(table.id, GREF, 0, flags)?, GNTST_GENERAL_ERROR, "128 of a kind");
    let bus = data.mfn().address().get();
    for handle in handles {
        check_eq!(table.flags(GREF) & READING, READING);
        check_eq!(unmap_both(0, bus, handle)?, GNTST_OKAY);
    }
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READONLY);
    Ok(())
}

fn entry_changed_while_in_use(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, other, window) = (page(&[1])?, page(&[2])?, Range::new(2)?);
    table.permit(GREF, &data, 0);
    let first = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    // The granter goes back on its word.
    table.set(GREF, 0, DomId::new(77), other.mfn().get());
    let second = map(table.id, GREF, window.address(1), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    check_eq!(try_read(window.address(1)), Ok(1), "in use is what was granted then");
    check_eq!(unmap(window.start(), first)?, GNTST_OKAY);
    check_eq!(unmap(window.address(1), second)?, GNTST_OKAY);
    let flags = MapFlags::HOST_MAP | MapFlags::READONLY;
    check_eq!(try_map(table.id, GREF, window.start(), flags)?, GNTST_GENERAL_ERROR);
    Ok(())
}

fn unmap_refused(domain: &mut Domain) -> Verdict {
    for handle in [4000, 0x00ff_ffff, u32::MAX] {
        check_eq!(unmap(NOWHERE, handle)?, GNTST_BAD_HANDLE, "{handle:#x}");
    }
    let table = Table::new(domain)?;
    let (data, other, window) = (page(&[])?, page(&[])?, Range::new(2)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    // SAFETY: nothing is done with it.
    unsafe { window.map(1, other.mfn(), Access::ReadWrite)? };
    for address in [window.address(1), NOWHERE, HYPERVISOR, 0x8000_0000_0000] {
        check_eq!(unmap(address, handle)?, GNTST_GENERAL_ERROR, "{address:#x}");
        check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING);
    }
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(unmap(window.start(), handle)?, GNTST_BAD_HANDLE, "twice");
    Ok(())
}

fn unmap_of_nothing(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[3])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    check_eq!(unmap_both(0, 0, handle)?, GNTST_OKAY, "neither of them is to go");
    check_eq!(unmap_both(0, 0x1000, handle)?, GNTST_OKAY, "it is not mapped for devices");
    check_eq!(try_read(window.start()), Ok(3));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    Ok(())
}

fn unmap_after_the_entry_was_overwritten(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    window.unmap(0)?;
    check_eq!(unmap(window.start(), handle)?, GNTST_GENERAL_ERROR);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING, "nobody knows that it is not in use");
    // Mapped by other means, as it was, it is what the handle is about.
    // SAFETY: a page of this case.
    unsafe { window.map(0, data.mfn(), Access::ReadWrite)? };
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    Ok(())
}

fn unmap_the_other_kind_of_entry(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    // SAFETY: a page of this case.
    unsafe { window.map(0, data.mfn(), Access::ReadWrite)? };
    check_eq!(unmap(window.start(), handle)?, GNTST_GENERAL_ERROR, "it is writable now");
    // SAFETY: as above.
    unsafe { window.map(0, data.mfn(), Access::Read)? };
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    Ok(())
}

// ── replacing ──

fn replace_moves_an_entry(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, other, window) = (page(&[1])?, page(&[2])?, Range::new(2)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    // SAFETY: read only here.
    unsafe { window.map(1, other.mfn(), Access::ReadWrite)? };
    check_eq!(replace(window.start(), window.address(1), handle)?, GNTST_OKAY);
    check_eq!(try_read(window.start()), Ok(2));
    check_eq!(memory::leaf(window.address(1)), Some(0));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS);
    check_eq!(replace(window.start(), window.address(1), handle)?, GNTST_BAD_HANDLE);
    window.unmap(0)?;
    // All references are where they belong.
    can_be_a_table(&other)
}

fn replace_by_nothing(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[1])?, Range::new(2)?);
    table.permit(GREF, &data, 0);
    // A new address of 0 moves nothing, and an entry that is empty is moved as well.
    for new in [0, window.address(1)] {
        let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
        check_eq!(replace(0, new, handle)?, GNTST_OKAY, "an address of 0 leaves the mapping");
        check_eq!(try_read(window.start()), Ok(1));
        check_eq!(replace(window.start(), new, handle)?, GNTST_OKAY);
        check_eq!((memory::leaf(window.start()), table.flags(GREF)), (Some(0), GTF_PERMIT_ACCESS));
    }
    Ok(())
}

fn replace_refused(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, other, window, l1) = (page(&[1])?, page(&[2])?, Range::new(2)?, spare_table()?);
    // SAFETY: read only here.
    unsafe { window.map(1, other.mfn(), Access::ReadWrite)? };
    check_eq!(replace(window.start(), window.address(1), u32::MAX)?, GNTST_BAD_HANDLE);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    for new in [NOWHERE, HYPERVISOR, 0x8000_0000_0000] {
        check_eq!(replace(window.start(), new, handle)?, GNTST_GENERAL_ERROR, "{new:#x}");
        check_eq!(try_read(window.start()), Ok(1));
    }
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    let handle = map(table.id, GREF, l1.place(0), MapFlags::HOST_MAP | MapFlags::CONTAINS_PTE)?;
    check_eq!(replace(l1.place(0), window.address(1), handle)?, GNTST_GENERAL_ERROR, "by machine address");
    check_eq!(try_read(window.address(1)), Ok(2), "nothing has moved");
    check_eq!(replace(l1.place(0), 0, handle)?, GNTST_OKAY, "which ends it all the same");
    check_eq!((l1.word(0), table.flags(GREF)), (0, GTF_PERMIT_ACCESS));
    unpin(&l1)
}

fn replace_does_not_pass_a_writable_entry(domain: &mut Domain) -> Verdict {
    // XSA-234: a read-only mapping is not ended by a writable entry, which would leave a count behind.
    let table = Table::new(domain)?;
    let (data, other, window) = (page(&[1])?, page(&[2])?, Range::new(2)?);
    table.permit(GREF, &data, 0);
    table.permit(OTHER, &other, 0);
    let writable = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    let readable = map(table.id, OTHER, window.address(1), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    check_eq!(replace(window.address(1), window.start(), readable)?, GNTST_OKAY);
    check_eq!(try_read(window.address(1)), Ok(1), "the writable entry has moved");
    // SAFETY: a page of this case.
    unsafe { window.map(0, data.mfn(), Access::Read)? };
    check_eq!(unmap(window.start(), writable)?, GNTST_GENERAL_ERROR);
    protect(&data, false)?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, data.mfn().get(), 0), Err(Errno::EINVAL), "it is writable");
    protect(&data, true)?;
    check_eq!(unmap(window.address(1), writable)?, GNTST_OKAY, "where it is now");
    check_eq!((table.flags(GREF), table.flags(OTHER)), (GTF_PERMIT_ACCESS, GTF_PERMIT_ACCESS));
    Ok(())
}

// ── copies ──

fn entry_side(table: &Table, gref: GrantRef, offset: u16) -> GnttabCopyPtr {
    GnttabCopyPtr::granted(gref, table.id, offset)
}

fn copy_between_entries(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11, 22, 33])?, page(&[1, 1, 1])?);
    table.permit(GREF, &from, READONLY);
    table.permit(OTHER, &to, 0);
    check_eq!(copy(entry_side(&table, GREF, 8), entry_side(&table, OTHER, 4000), 16, BOTH)?, GNTST_OKAY);
    check_eq!((word(&to, 500), word(&to, 501), word(&to, 502), word(&to, 0)), (22, 33, 0, 1));
    // DOMID_SELF is the caller here.
    let own = |gref, offset| GnttabCopyPtr::granted(gref, DomId::SELF, offset);
    check_eq!(copy(own(GREF, 0), own(OTHER, 3), 2, BOTH)?, GNTST_OKAY);
    check_eq!(word(&to, 0), 1 | 11 << 24);
    check_eq!((table.flags(GREF), table.flags(OTHER)), (GTF_PERMIT_ACCESS | READONLY, GTF_PERMIT_ACCESS));
    Ok(())
}

fn copy_between_frames(_: &mut Domain) -> Verdict {
    let (from, to) = (page(&[11, 22])?, page(&[])?);
    let (source, dest) = (GnttabCopyPtr::own(from.mfn(), 8), GnttabCopyPtr::own(to.mfn(), 4088));
    check_eq!(copy(source, dest, 8, 0)?, GNTST_OKAY);
    check_eq!((word(&to, 511), word(&to, 0)), (22, 0));
    Ok(())
}

fn copy_from_entry_to_frame(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11, 22])?, page(&[])?);
    table.permit(GREF, &from, READONLY);
    let dest = GnttabCopyPtr::own(to.mfn(), 0);
    check_eq!(copy(entry_side(&table, GREF, 8), dest, 8, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
    check_eq!((word(&to, 0), word(&to, 1)), (22, 0));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READONLY);
    Ok(())
}

fn copy_from_frame_to_entry(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11, 22])?, page(&[])?);
    table.permit(GREF, &to, 0);
    let source = GnttabCopyPtr::own(from.mfn(), 8);
    check_eq!(copy(source, entry_side(&table, GREF, 16), 8, GNTCOPY_DEST_GREF)?, GNTST_OKAY);
    check_eq!((word(&to, 1), word(&to, 2), word(&to, 3)), (0, 22, 0));
    Ok(())
}

fn copy_whole_page(_: &mut Domain) -> Verdict {
    let (from, to) = (page(&[11, 22])?, page(&[5, 5, 5])?);
    // SAFETY: the page is this case's.
    unsafe { try_write(from.address() + 4088, 99)? };
    let (source, dest) = (GnttabCopyPtr::own(from.mfn(), 0), GnttabCopyPtr::own(to.mfn(), 0));
    check_eq!(copy(source, dest, 4096, 0)?, GNTST_OKAY);
    check_eq!((word(&to, 0), word(&to, 1), word(&to, 2), word(&to, 511)), (11, 22, 0, 99));
    Ok(())
}

fn copy_nothing(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11])?, page(&[5])?);
    let own = |page: &Page, offset| GnttabCopyPtr::own(page.mfn(), offset);
    for offset in [0, 4095, 4096] {
        check_eq!(copy(own(&from, offset), own(&to, 0), 0, 0)?, GNTST_OKAY, "at {offset}");
    }
    check_eq!(copy(own(&from, 4097), own(&to, 0), 0, 0)?, GNTST_BAD_COPY_ARG);
    // Without a byte to copy the entry is looked at all the same.
    table.set(GREF, 0, table.id, 0);
    let none = entry_side(&table, GREF, 0);
    check_eq!(copy(none, own(&to, 0), 0, GNTCOPY_SOURCE_GREF)?, GNTST_GENERAL_ERROR);
    check_eq!(word(&to, 0), 5);
    check_eq!(copy(own(&from, 0), own(&to, 0), 8, 0)?, GNTST_OKAY);
    check_eq!(word(&to, 0), 11);
    Ok(())
}

fn copy_past_the_end(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11])?, page(&[5])?);
    table.permit(GREF, &from, 0);
    table.permit(OTHER, &to, 0);
    let sides = |s, d| (entry_side(&table, GREF, s), entry_side(&table, OTHER, d));
    for (s, d, len) in
        [(4090, 0, 8), (0, 4090, 8), (1, 0, 4096), (0, 1, 4096), (0, 0, 4097), (65535, 65535, 65535)]
    {
        let (source, dest) = sides(s, d);
        check_eq!(copy(source, dest, len, BOTH)?, GNTST_BAD_COPY_ARG, "{len} bytes from {s} to {d}");
    }
    check_eq!(word(&to, 0), 5);
    let (source, dest) = sides(0, 4088);
    check_eq!(copy(source, dest, 8, BOTH)?, GNTST_OKAY, "up to the end");
    check_eq!(word(&to, 511), 11);
    Ok(())
}

fn copy_refused(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11])?, page(&[5])?);
    let l1 = spare_table()?;
    let own = GnttabCopyPtr::own(to.mfn(), 0);
    let mfn = from.mfn().get();
    for (flags, dom, expected) in [
        (GTF_INVALID, table.id, GNTST_GENERAL_ERROR),
        (GTF_ACCEPT_TRANSFER, table.id, GNTST_GENERAL_ERROR),
        (GTF_TRANSITIVE, table.id, GNTST_GENERAL_ERROR),
        (GTF_PERMIT_ACCESS, DomId::new(77), GNTST_GENERAL_ERROR),
        (GTF_PERMIT_ACCESS, table.id, GNTST_OKAY),
    ] {
        table.set(GREF, flags, dom, mfn);
        let status = copy(entry_side(&table, GREF, 0), own, 8, GNTCOPY_SOURCE_GREF)?;
        check_eq!(status, expected, "flags {flags:#x} for {dom}");
        check_eq!(table.flags(GREF), flags);
        check_eq!(word(&to, 0), if status == GNTST_OKAY { 11 } else { 5 });
    }
    for gref in [1 << 20, u32::MAX] {
        let source = entry_side(&table, GrantRef::new(gref), 0);
        check_eq!(copy(source, own, 8, GNTCOPY_SOURCE_GREF)?, GNTST_BAD_GNTREF, "{gref:#x}");
    }
    for dom in [NOBODY, DomId::IO, DomId::XEN] {
        let source = GnttabCopyPtr::granted(GREF, dom, 0);
        check_eq!(copy(source, own, 8, GNTCOPY_SOURCE_GREF)?, GNTST_BAD_DOMAIN, "{dom}");
    }
    table.permit(GREF, &from, READONLY);
    let dest = entry_side(&table, GREF, 0);
    check_eq!(copy(own, dest, 8, GNTCOPY_DEST_GREF)?, GNTST_GENERAL_ERROR, "into what may be read only");
    table.set(GREF, GTF_PERMIT_ACCESS, table.id, l1.mfn());
    check_eq!(copy(own, dest, 8, GNTCOPY_DEST_GREF)?, GNTST_GENERAL_ERROR, "into a page table, granted");
    let frame = GnttabCopyPtr::own(Mfn::new(l1.mfn()), 0);
    check_eq!(copy(own, frame, 8, 0)?, GNTST_GENERAL_ERROR, "into a page table, by number");
    check_eq!((l1.word(0), table.flags(GREF)), (0, GTF_PERMIT_ACCESS));
    unpin(&l1)
}

fn copy_frame_of_another(domain: &mut Domain) -> Verdict {
    let (from, to) = (page(&[11])?, page(&[5])?);
    let own = GnttabCopyPtr::own(to.mfn(), 0);
    // By number only of DOMID_SELF, not even of the same domain under its own number.
    for (dom, expected) in [
        (domain.id(), GNTST_PERMISSION_DENIED),
        (DomId::IO, GNTST_BAD_DOMAIN),
        (DomId::XEN, GNTST_BAD_DOMAIN),
        (NOBODY, GNTST_BAD_DOMAIN),
    ] {
        let side = GnttabCopyPtr { domid: dom, ..GnttabCopyPtr::own(from.mfn(), 0) };
        check_eq!(copy(side, own, 8, 0)?, expected, "from a frame of {dom}");
        check_eq!(copy(own, side, 8, 0)?, expected, "to a frame of {dom}");
    }
    check_eq!((word(&from, 0), word(&to, 0)), (11, 5));
    check_eq!(copy(GnttabCopyPtr::own(from.mfn(), 0), own, 8, 0)?, GNTST_OKAY);
    check_eq!(word(&to, 0), 11);
    Ok(())
}

fn copy_bad_frames(_: &mut Domain) -> Verdict {
    let data = page(&[11])?;
    let own = GnttabCopyPtr::own(data.mfn(), 0);
    for frame in [hypervisor_frame()?, 0xff_ffff_ffff, u64::MAX, u64::MAX >> 12] {
        let side = GnttabCopyPtr::own(Mfn::new(frame), 0);
        check_eq!(copy(side, own, 8, 0)?, GNTST_BAD_PAGE, "from {frame:#x}");
        check_eq!(copy(own, side, 8, 0)?, GNTST_BAD_PAGE, "to {frame:#x}");
    }
    check_eq!(word(&data, 0), 11);
    check_eq!(copy(own, GnttabCopyPtr::own(data.mfn(), 8), 8, 0)?, GNTST_OKAY);
    check_eq!(word(&data, 1), 11);
    Ok(())
}

fn copy_list_goes_on_after_an_error(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (from, to) = (page(&[11, 22, 33])?, page(&[])?);
    table.permit(GREF, &from, READONLY);
    let one = |offset: u16, to_offset: u16, domid| GnttabCopy {
        source: GnttabCopyPtr { domid, ..entry_side(&table, GREF, offset) },
        dest: GnttabCopyPtr::own(to.mfn(), to_offset),
        len: 8,
        flags: GNTCOPY_SOURCE_GREF,
        status: 77,
        pad0: 0,
    };
    let mut list = [
        one(0, 0, table.id),
        one(4090, 8, table.id),
        one(8, 8, NOBODY),
        one(8, 8, table.id),
        one(16, 16, table.id),
    ];
    check_eq!(call(Hypercall::GrantTableOp, [5, at(&mut list), 5, 0, 0]), Ok(0));
    check_eq!(
        list.map(|op| op.status),
        [GNTST_OKAY, GNTST_BAD_COPY_ARG, GNTST_BAD_DOMAIN, GNTST_OKAY, GNTST_OKAY]
    );
    check_eq!((word(&to, 0), word(&to, 1), word(&to, 2)), (11, 22, 33));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READONLY);
    Ok(())
}

// ── exchanging entries ──

fn swap(ref_a: GrantRef, ref_b: GrantRef) -> Result<i16, Stop> {
    let mut request = GnttabSwapGrantRef { ref_a, ref_b, status: 77, pad0: 0 };
    check_eq!(grant(GnttabOp::SwapGrantRef, &mut request), Ok(0));
    Ok(request.status)
}

fn swap_entries(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    table.set(GREF, GTF_PERMIT_ACCESS | READONLY, DomId::new(5), 0x123);
    table.set(OTHER, GTF_ACCEPT_TRANSFER, DomId::new(6), 0x456);
    let (a, b) = (table.get(GREF), table.get(OTHER));
    check_eq!(swap(GREF, OTHER)?, GNTST_OKAY);
    check_eq!((table.get(GREF), table.get(OTHER)), (b, a));
    check_eq!(swap(GREF, GREF)?, GNTST_OKAY, "with itself");
    check_eq!(table.get(GREF), b);
    Ok(())
}

fn swap_refused(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    let far = GrantRef::new(1 << 20);
    table.permit(GREF, &data, 0);
    check_eq!((swap(GREF, far)?, swap(far, GREF)?), (GNTST_BAD_GNTREF, GNTST_BAD_GNTREF));
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    check_eq!((swap(GREF, OTHER)?, swap(OTHER, GREF)?), (GNTST_EAGAIN, GNTST_EAGAIN));
    check_eq!(swap(GREF, GREF)?, GNTST_OKAY, "with itself even in use");
    check_eq!(table.get(OTHER).flags, 0);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(swap(GREF, OTHER)?, GNTST_OKAY);
    check_eq!((table.get(GREF).flags, table.get(OTHER).flags), (0, GTF_PERMIT_ACCESS));
    Ok(())
}

// ── transfers ──

fn reservation() -> Result<u64, Stop> {
    let mut domain = MemoryDomain { domid: DomId::SELF };
    Ok(memop(MemoryOp::CurrentReservation, &mut domain)?)
}

/// A frame of this domain's that nothing refers to, with a word in it.
fn loose_frame(value: u64) -> Result<u64, Stop> {
    let mut frame = [0u64];
    let mut request = MemoryReservation {
        extent_start: GuestHandle::new(at(&mut frame)),
        nr_extents: 1,
        domid: DomId::SELF,
        ..Default::default()
    };
    check_eq!(memop(MemoryOp::IncreaseReservation, &mut request), Ok(1));
    let window = Range::new(1)?;
    // SAFETY: a new frame.
    unsafe {
        window.map(0, Mfn::new(frame[0]), Access::ReadWrite)?;
        try_write(window.start(), value)?;
    }
    window.unmap(0)?;
    Ok(frame[0])
}

fn give_up(frame: u64) -> Verdict {
    let mut frame = [frame];
    let mut request = MemoryReservation {
        extent_start: GuestHandle::new(at(&mut frame)),
        nr_extents: 1,
        domid: DomId::SELF,
        ..Default::default()
    };
    check_eq!(memop(MemoryOp::DecreaseReservation, &mut request), Ok(1));
    Ok(())
}

/// Makes room in this domain's reservation for one frame.
fn with_room(work: impl FnOnce() -> Verdict) -> Verdict {
    let spare = Page::new()?;
    let (address, frame) = (spare.address(), spare.mfn());
    // SAFETY: the page is not used before it is back.
    unsafe { memory::set_leaf(address, 0)? };
    give_up(frame.get())?;
    let verdict = work();
    let new = loose_frame(0)?;
    // SAFETY: as above.
    unsafe { memory::set_leaf(address, pte(new, 0x63 | 1 << 63))? };
    // Its number is not what the SDK noted: it cannot go back to the heap.
    spare.leak();
    verdict
}

fn m2p(frame: u64) -> u64 {
    try_read(0xffff_8000_0000_0000 + frame * 8).unwrap_or(0)
}

fn transfer_to_oneself(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    with_room(|| {
        let frame = loose_frame(0x1_2345)?;
        let before = reservation()?;
        table.set(GREF, GTF_ACCEPT_TRANSFER, table.id, 0x7_7777);
        check_eq!(transfer(frame, table.id, GREF)?, GNTST_OKAY);
        let entry = table.get(GREF);
        check_eq!(entry.flags, GTF_ACCEPT_TRANSFER | GTF_TRANSFER_COMMITTED | GTF_TRANSFER_COMPLETED);
        check_eq!(u64::from(entry.frame), frame);
        check_eq!(m2p(frame), 0x7_7777, "known by the number that the entry held");
        check_eq!(reservation()?, before);
        let window = Range::new(1)?;
        // SAFETY: a frame of this domain's.
        unsafe { window.map(0, Mfn::new(frame), Access::Read)? };
        check_eq!(try_read(window.start()), Ok(0x1_2345), "with its content");
        window.unmap(0)?;
        give_up(frame)
    })
}

fn transfer_of_a_frame_in_use(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let data = page(&[9])?;
    let before = reservation()?;
    table.set(GREF, GTF_ACCEPT_TRANSFER, table.id, 1);
    for (frame, what) in [
        (data.mfn().get(), "mapped"),
        (hypervisor_frame()?, "the hypervisor's"),
        (0xff_ffff_ffff, "no frame"),
        (u64::MAX, "no frame at all"),
    ] {
        check_eq!(transfer(frame, table.id, GREF)?, GNTST_BAD_PAGE, "{what}");
    }
    check_eq!((word(&data, 0), reservation()?), (9, before));
    check_eq!(table.get(GREF).flags, GTF_ACCEPT_TRANSFER);
    with_room(|| {
        let frame = loose_frame(0)?;
        check_eq!(transfer(frame, table.id, GREF)?, GNTST_OKAY);
        give_up(frame)
    })
}

fn transfer_to_nobody(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    table.set(GREF, GTF_ACCEPT_TRANSFER, table.id, 1);
    for dom in [NOBODY, DomId::SELF, DomId::IO, DomId::XEN] {
        with_room(|| {
            let frame = loose_frame(0)?;
            let before = reservation()?;
            check_eq!(transfer(frame, dom, GREF)?, GNTST_BAD_DOMAIN, "{dom}");
            check_eq!(reservation()?, before - 1, "the frame is lost");
            Ok(())
        })?;
    }
    check_eq!(table.get(GREF).flags, GTF_ACCEPT_TRANSFER);
    Ok(())
}

fn transfer_nobody_waits_for(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    for (gref, flags, dom) in [
        (GREF, GTF_INVALID, table.id),
        (GREF, GTF_PERMIT_ACCESS, table.id),
        (GREF, GTF_ACCEPT_TRANSFER, DomId::new(77)),
        (GrantRef::new(1 << 20), GTF_ACCEPT_TRANSFER, table.id),
    ] {
        table.set(GREF, flags, dom, 0x33);
        with_room(|| {
            let frame = loose_frame(0)?;
            let before = reservation()?;
            check_eq!(transfer(frame, table.id, gref)?, GNTST_GENERAL_ERROR, "{flags:#x} for {dom}");
            check_eq!(reservation()?, before - 1, "the frame is lost");
            Ok(())
        })?;
        check_eq!((table.get(GREF).flags, table.get(GREF).frame), (flags, 0x33));
    }
    Ok(())
}

fn transfer_flags_are_exact(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    for flags in [READONLY, READING, GrantFlags::PCD.bits(), SUB_PAGE] {
        table.set(GREF, GTF_ACCEPT_TRANSFER | flags, table.id, 0x33);
        with_room(|| {
            check_eq!(transfer(loose_frame(0)?, table.id, GREF)?, GNTST_GENERAL_ERROR, "with {flags:#x}");
            Ok(())
        })?;
        check_eq!(table.get(GREF).flags, GTF_ACCEPT_TRANSFER | flags);
    }
    with_room(|| {
        table.set(GREF, GTF_ACCEPT_TRANSFER, table.id, 0x33);
        let frame = loose_frame(0)?;
        check_eq!(transfer(frame, table.id, GREF)?, GNTST_OKAY);
        give_up(frame)?;
        // The entry has done its service.
        check_eq!(transfer(loose_frame(0)?, table.id, GREF)?, GNTST_GENERAL_ERROR);
        check_eq!(u64::from(table.get(GREF).frame), frame);
        Ok(())
    })
}

// ── caches ──

fn flush(address: u64, offset: u16, length: u16, op: u32) -> Result<u64, Errno> {
    grant(GnttabOp::CacheFlush, &mut GnttabCacheFlush { a: address, offset, length, op })
}

const CLEAN: u32 = GNTTAB_CACHE_CLEAN;
const INVALIDATE: u32 = GNTTAB_CACHE_INVAL;

fn cache_flush_own(_: &mut Domain) -> Verdict {
    let data = page(&[1, 2, 3])?;
    let address = data.mfn().address().get();
    for (offset, length, op) in [
        (0, 4096, CLEAN),
        (0, 4096, CLEAN | INVALIDATE),
        (8, 1, CLEAN),
        (4095, 1, CLEAN),
        (0, 0, CLEAN),
        (5, 5, 0),
    ] {
        check_eq!(flush(address + 0x123, offset, length, op), Ok(0), "{length} bytes at {offset}, {op}");
    }
    check_eq!((word(&data, 0), word(&data, 1), word(&data, 2)), (1, 2, 3), "nothing is lost");
    check_eq!(flush(address, 0, 8, 4), Err(Errno::EINVAL));
    Ok(())
}

fn cache_flush_refused(_: &mut Domain) -> Verdict {
    let data = page(&[1])?;
    let address = data.mfn().address().get();
    for (offset, length, op) in [
        (4096, 0, CLEAN),
        (4096, 1, CLEAN),
        (1, 4096, CLEAN),
        (0, 4097, CLEAN),
        (65535, 65535, CLEAN),
        (0, 8, 4),
        (0, 8, CLEAN | 1 << 30),
        (0, 8, CLEAN | GNTTAB_CACHE_SOURCE_GREF),
        (0, 0, GNTTAB_CACHE_SOURCE_GREF),
    ] {
        check_eq!(flush(address, offset, length, op), Err(Errno::EINVAL), "{length} at {offset}, {op:#x}");
    }
    check_eq!(flush(address, 0, 8, INVALIDATE), Err(Errno::EOPNOTSUPP), "writing would be lost");
    check_eq!(flush(address, 0, 8, CLEAN), Ok(0));
    // The first error ends a list.
    let op = |op| GnttabCacheFlush { a: address, offset: 0, length: 8, op };
    let mut list = [op(CLEAN), op(4), op(CLEAN)];
    check_eq!(call(Hypercall::GrantTableOp, [12, at(&mut list), 3, 0, 0]), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::GrantTableOp, [12, at(&mut list), 1, 0, 0]), Ok(0));
    Ok(())
}

fn cache_flush_frame_of_nobody(_: &mut Domain) -> Verdict {
    check_eq!(flush(hypervisor_frame()? << 12, 0, 8, CLEAN), Err(Errno::EPERM), "the hypervisor's");
    check_eq!(flush(0xff_ffff_ffff << 12, 0, 8, CLEAN), Err(Errno::EINVAL), "no frame");
    check_eq!(flush(hypervisor_frame()? << 12, 0, 0, CLEAN), Ok(0), "without a byte nobody looks");
    check_eq!(flush(page(&[])?.mfn().address().get(), 0, 8, CLEAN), Ok(0));
    Ok(())
}

fn cache_flush_nothing_to_go_on_with(_: &mut Domain) -> Verdict {
    // The upper bits of the command say where a search that was interrupted goes on.
    let data = page(&[])?;
    let mut op = GnttabCacheFlush { a: data.mfn().address().get(), offset: 0, length: 0, op: CLEAN };
    let again = |op: &mut GnttabCacheFlush| call(Hypercall::GrantTableOp, [12 | 1 << 12, at(op), 1, 0, 0]);
    check_eq!(again(&mut op), Err(Errno::EILSEQ));
    op.length = 8;
    check_eq!(again(&mut op), Ok(0), "an own frame needs no search");
    Ok(())
}

// ── versions ──

fn get_version(dom: DomId) -> Result<u32, Errno> {
    let mut get = GnttabGetVersion { dom, pad: 0, version: 77 };
    grant(GnttabOp::GetVersion, &mut get).map(|_| get.version)
}

fn version_is_told(domain: &mut Domain) -> Verdict {
    check_eq!((get_version(DomId::SELF), get_version(domain.id())), (Ok(1), Ok(1)));
    for dom in [NOBODY, DomId::IO, DomId::XEN] {
        check_eq!(get_version(dom), Err(Errno::ESRCH), "{dom}");
    }
    Ok(())
}

fn version_numbers(_: &mut Domain) -> Verdict {
    check_eq!(set_version(1), (Ok(0), 1));
    for version in [0, 3, u32::MAX] {
        check_eq!(set_version(version), (Err(Errno::EINVAL), 1), "and the answer is the one in force");
    }
    check_eq!(set_version(2), (Ok(0), 2));
    let third = set_version(3);
    check_eq!(set_version(2), (Ok(0), 2), "twice");
    check_eq!((third, get_version(DomId::SELF)), ((Err(Errno::EINVAL), 2), Ok(2)));
    check_eq!(set_version(1), (Ok(0), 1));
    Ok(())
}

fn version_2_and_back(domain: &mut Domain) -> Verdict {
    with_version_2(domain, |table| {
        check_eq!(get_version(DomId::SELF), Ok(2));
        check_eq!(table.get2(GREF), (0, 0));
        check_eq!(table.status(GREF), 0);
        Ok(())
    })?;
    check_eq!(get_version(DomId::SELF), Ok(1));
    let table = Table::new(domain)?;
    check_eq!(table.flags(GREF), 0);
    Ok(())
}

fn version_keeps_reserved_entries(domain: &mut Domain) -> Verdict {
    let flags = GTF_PERMIT_ACCESS | READONLY;
    {
        let table = Table::new(domain)?;
        table.set(RESERVED, flags, DomId::new(77), 0x1234);
    }
    with_version_2(domain, |table| {
        check_eq!(table.get2(RESERVED), (77 << 16 | u64::from(flags), 0x1234));
        check_eq!(table.status(RESERVED), 0);
        // The status frame, which is mapped here, keeps version 2, and so the entry.
        check_eq!(set_version(1), (Err(Errno::EBUSY), 2));
        check_eq!(table.get2(RESERVED), (77 << 16 | u64::from(flags), 0x1234));
        Ok(())
    })?;
    // What comes back is the entry, without the place.
    check_eq!(set_version(2), (Ok(0), 2));
    let table = Table::new(domain)?;
    table.set2(RESERVED, GTF_PERMIT_ACCESS, DomId::new(78), 0x10_0008, 0x4321);
    check_eq!(set_version(1), (Ok(0), 1));
    let kept = table.get(RESERVED);
    check_eq!((kept.flags, kept.domid, kept.frame), (GTF_PERMIT_ACCESS, DomId::new(78), 0x4321));
    table.set(RESERVED, GTF_ACCEPT_TRANSFER, DomId::new(78), 5);
    check_eq!((set_version(2), set_version(1)), ((Ok(0), 2), (Ok(0), 1)));
    check_eq!(table.get(RESERVED), GrantEntryV1::default(), "what waits for a frame does not stay");
    Ok(())
}

fn version_empties_the_others(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    for gref in [8, 100, 300, 511] {
        table.set(GrantRef::new(gref), GTF_PERMIT_ACCESS, DomId::new(77), 0x1234);
    }
    check_eq!(set_version(2), (Ok(0), 2));
    let words: u64 = (16..512).map(|index| table.word(index).load(Ordering::SeqCst)).sum();
    check_eq!(set_version(1), (Ok(0), 1));
    check_eq!(words, 0);
    check!((8..512).all(|gref| table.get(GrantRef::new(gref)) == GrantEntryV1::default()));
    Ok(())
}

fn version_is_busy_while_an_entry_is_used(domain: &mut Domain) -> Verdict {
    let table = Table::new(domain)?;
    let (data, window) = (page(&[])?, Range::new(1)?);
    table.permit(GREF, &data, 0);
    let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
    check_eq!(set_version(2), (Err(Errno::EBUSY), 1));
    check_eq!(table.flags(GREF), GTF_PERMIT_ACCESS | READING | WRITING, "and all is as it was");
    check_eq!(set_version(1), (Ok(0), 1), "no change at all");
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!((set_version(2), set_version(1)), ((Ok(0), 2), (Ok(0), 1)));
    with_version_2(domain, |table| {
        table.permit2(GREF, &data, 0);
        let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
        check_eq!(set_version(1), (Err(Errno::EBUSY), 2));
        check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
        Ok(())
    })
}

fn version_changes_under_a_reserved_mapping(domain: &mut Domain) -> Verdict {
    let (data, window) = (page(&[6])?, Range::new(1)?);
    let handle = {
        let table = Table::new(domain)?;
        table.permit(RESERVED, &data, 0);
        map(table.id, RESERVED, window.start(), MapFlags::HOST_MAP)?
    };
    with_version_2(domain, |table| {
        check_eq!(table.status(RESERVED), READING | WRITING);
        check_eq!(table.get2(RESERVED).0 as u16, GTF_PERMIT_ACCESS, "the marks have moved");
        check_eq!(try_read(window.start()), Ok(6));
        check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
        check_eq!(table.status(RESERVED), 0);
        Ok(())
    })?;
    // And the other way round.
    check_eq!(set_version(2), (Ok(0), 2));
    let table = Table::new(domain)?;
    table.permit2(RESERVED, &data, 0);
    let handle = map(table.id, RESERVED, window.start(), MapFlags::HOST_MAP)?;
    check_eq!(set_version(1), (Ok(0), 1));
    check_eq!(table.flags(RESERVED), GTF_PERMIT_ACCESS | READING | WRITING);
    check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
    check_eq!(table.flags(RESERVED), GTF_PERMIT_ACCESS);
    table.set(RESERVED, 0, DomId::ZERO, 0);
    Ok(())
}

fn version_1_must_express_what_stays(domain: &mut Domain) -> Verdict {
    check_eq!(set_version(2), (Ok(0), 2));
    let table = Table::new(domain)?;
    let mut answers = Vec::new();
    for (flags, frame) in [(GTF_TRANSITIVE, 0), (GTF_PERMIT_ACCESS, 1 << 32), (GTF_PERMIT_ACCESS, 5)] {
        table.set2(RESERVED, flags, DomId::new(77), 0, frame);
        answers.push(set_version(1));
    }
    check_eq!(answers, [(Err(Errno::ERANGE), 2), (Err(Errno::ERANGE), 2), (Ok(0), 1)]);
    check_eq!(table.get(RESERVED).frame, 5);
    table.set(RESERVED, 0, DomId::ZERO, 0);
    Ok(())
}

fn version_2_stays_while_its_frames_are_mapped(_: &mut Domain) -> Verdict {
    // XSA-255: the frames go back to the hypervisor with version 2.
    check_eq!(set_version(2), (Ok(0), 2));
    let (status, frames) = status_frames::<1>()?;
    let window = Range::new(1)?;
    // SAFETY: nothing is read.
    unsafe { window.map(0, frames[0], Access::Read)? };
    let mapped = set_version(1);
    window.unmap(0)?;
    check_eq!((status, mapped, set_version(1)), (GNTST_OKAY, (Err(Errno::EBUSY), 2), (Ok(0), 1)));
    // The frame is not this domain's any more.
    // SAFETY: refused.
    check!(unsafe { window.map(0, frames[0], Access::Read) }.is_err());
    Ok(())
}

fn status_frames_of_version_1(_: &mut Domain) -> Verdict {
    check_eq!(status_frames::<1>()?.0, GNTST_GENERAL_ERROR);
    check_eq!(status_frames::<0>()?.0, GNTST_OKAY, "none are there");
    check_eq!(set_version(2), (Ok(0), 2));
    let there = status_frames::<1>()?;
    check_eq!(set_version(1), (Ok(0), 1));
    check_eq!(there.0, GNTST_OKAY);
    check!(there.1[0] != Mfn::new(0));
    Ok(())
}

fn status_frames_are_listed(domain: &mut Domain) -> Verdict {
    with_version_2(domain, |_| {
        // A status frame serves 8 frames of entries.
        let mut shared = [0u64; 9];
        check_eq!(setup(DomId::SELF, &mut shared)?, GNTST_OKAY);
        let (status, frames) = status_frames::<2>()?;
        check_eq!(status, GNTST_OKAY);
        check!(frames[0] != frames[1] && frames.iter().all(|f| !shared.contains(&f.get())));
        check_eq!(status_frames::<1>()?, (GNTST_OKAY, [frames[0]]));
        let window = Range::new(1)?;
        // SAFETY: read only.
        unsafe { window.map(0, frames[1], Access::Read)? };
        check_eq!(try_read(window.start()), Ok(0));
        Ok(())
    })
}

fn status_frames_refused(domain: &mut Domain) -> Verdict {
    with_version_2(domain, |_| {
        let mut frames = [0u64; 1];
        let mut get = GnttabGetStatusFrames {
            nr_frames: 1,
            dom: DomId::SELF,
            status: 77,
            frame_list: GuestHandle::new(at(&mut frames)),
        };
        for count in [0, 2] {
            check_eq!(call(Hypercall::GrantTableOp, [9, at(&mut get), count, 0, 0]), Err(Errno::EINVAL));
        }
        for dom in [NOBODY, DomId::IO, DomId::XEN] {
            get.dom = dom;
            check_eq!(grant(GnttabOp::GetStatusFrames, &mut get), Ok(0));
            check_eq!(get.status, GNTST_BAD_DOMAIN, "{dom}");
        }
        get.dom = DomId::SELF;
        get.frame_list = GuestHandle::new(NOWHERE);
        check_eq!(grant(GnttabOp::GetStatusFrames, &mut get), Ok(0));
        check_eq!(get.status, GNTST_BAD_VIRT_ADDR);
        get.frame_list = GuestHandle::new(HYPERVISOR);
        get.status = 77;
        check_eq!(grant(GnttabOp::GetStatusFrames, &mut get), Err(Errno::EFAULT));
        check_eq!(get.status, 77);
        get.frame_list = GuestHandle::new(NOWHERE);
        get.nr_frames = 1000;
        check_eq!(grant(GnttabOp::GetStatusFrames, &mut get), Ok(0));
        check_eq!(get.status, GNTST_GENERAL_ERROR, "more than there are");
        Ok(())
    })
}

// ── entries of version 2 ──

fn v2_map_marks_the_status(domain: &mut Domain) -> Verdict {
    let (data, window) = (page(&[4])?, Range::new(2)?);
    with_version_2(domain, |table| {
        table.permit2(GREF, &data, 0);
        let before = table.get2(GREF);
        let reading = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
        check_eq!(table.status(GREF), READING);
        let writing = map(table.id, GREF, window.address(1), MapFlags::HOST_MAP)?;
        check_eq!(table.status(GREF), READING | WRITING);
        check_eq!((table.get2(GREF), table.status(OTHER)), (before, 0), "nothing else is written");
        // SAFETY: a page of this case.
        unsafe { try_write(window.address(1), 44)? };
        check_eq!((try_read(window.start()), word(&data, 0)), (Ok(44), 44));
        check_eq!(unmap(window.address(1), writing)?, GNTST_OKAY);
        check_eq!(table.status(GREF), READING);
        check_eq!(unmap(window.start(), reading)?, GNTST_OKAY);
        check_eq!(table.status(GREF), 0);
        Ok(())
    })
}

fn v2_map_read_only(domain: &mut Domain) -> Verdict {
    let (data, window) = (page(&[])?, Range::new(1)?);
    with_version_2(domain, |table| {
        table.permit2(GREF, &data, READONLY);
        check_eq!(try_map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?, GNTST_GENERAL_ERROR);
        check_eq!(table.status(GREF), 0);
        let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
        check_eq!(table.status(GREF), READING);
        check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
        for (flags, dom) in
            [(0, table.id), (GTF_ACCEPT_TRANSFER, table.id), (GTF_PERMIT_ACCESS, DomId::new(77))]
        {
            table.set2(GREF, flags, dom, 0, data.mfn().get());
            check_eq!(try_map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?, GNTST_GENERAL_ERROR);
            check_eq!(table.status(GREF), 0, "{flags:#x} for {dom}");
        }
        Ok(())
    })
}

fn v2_frames_have_large_numbers(domain: &mut Domain) -> Verdict {
    let (data, window) = (page(&[8])?, Range::new(1)?);
    with_version_2(domain, |table| {
        for frame in [1 << 32 | data.mfn().get(), 1 << 52, u64::MAX, hypervisor_frame()?] {
            table.set2(GREF, GTF_PERMIT_ACCESS, table.id, 0, frame);
            let status = try_map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
            check_eq!((status, table.status(GREF)), (GNTST_BAD_PAGE, 0), "{frame:#x}");
        }
        table.permit2(GREF, &data, 0);
        let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP)?;
        check_eq!(try_read(window.start()), Ok(8));
        check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
        Ok(())
    })
}

fn v2_table_has_half_the_entries(domain: &mut Domain) -> Verdict {
    let window = Range::new(1)?;
    let frames = query(DomId::SELF)?.nr_frames;
    let at_end = |per_frame: u32, more: u32| {
        let gref = GrantRef::new(frames * per_frame - 1 + more);
        try_map(domain.id(), gref, window.start(), MapFlags::HOST_MAP)
    };
    check_eq!((at_end(512, 0)?, at_end(512, 1)?), (GNTST_GENERAL_ERROR, GNTST_BAD_GNTREF));
    with_version_2(domain, |_| {
        check_eq!((at_end(256, 0)?, at_end(256, 1)?), (GNTST_GENERAL_ERROR, GNTST_BAD_GNTREF));
        Ok(())
    })
}

fn v2_part_of_a_page_is_copied(domain: &mut Domain) -> Verdict {
    let (from, to) = (page(&[11, 22, 33, 44])?, page(&[])?);
    with_version_2(domain, |table| {
        // Bytes 8 to 24.
        let (flags, place) = (GTF_PERMIT_ACCESS | SUB_PAGE, 16 << 16 | 8);
        table.set2(GREF, flags, table.id, place, from.mfn().get());
        let dest = GnttabCopyPtr::own(to.mfn(), 0);
        let get = |offset, len| copy(entry_side(table, GREF, offset), dest, len, GNTCOPY_SOURCE_GREF);
        check_eq!(get(8, 16)?, GNTST_OKAY);
        check_eq!((word(&to, 0), word(&to, 1), word(&to, 2)), (22, 33, 0));
        for (offset, len) in [(0, 8), (7, 2), (8, 17), (23, 2), (24, 1), (0, 4096)] {
            check_eq!(get(offset, len)?, GNTST_GENERAL_ERROR, "{len} bytes at {offset}");
        }
        check_eq!(get(4090, 8)?, GNTST_BAD_COPY_ARG, "past the page");
        check_eq!((word(&to, 0), table.status(GREF)), (22, 0));
        // Into a part.
        let put = |offset| {
            copy(GnttabCopyPtr::own(to.mfn(), 0), entry_side(table, GREF, offset), 8, GNTCOPY_DEST_GREF)
        };
        check_eq!((put(0)?, put(17)?, put(16)?), (GNTST_GENERAL_ERROR, GNTST_GENERAL_ERROR, GNTST_OKAY));
        check_eq!((word(&from, 0), word(&from, 1), word(&from, 2), word(&from, 3)), (11, 22, 22, 44));
        Ok(())
    })
}

fn v2_part_of_a_page_is_not_mapped(domain: &mut Domain) -> Verdict {
    let (data, window) = (page(&[])?, Range::new(1)?);
    with_version_2(domain, |table| {
        let place = 4096 << 16;
        table.set2(GREF, GTF_PERMIT_ACCESS | SUB_PAGE, table.id, place, data.mfn().get());
        for flags in [MapFlags::HOST_MAP, MapFlags::HOST_MAP | MapFlags::READONLY, MapFlags::DEVICE_MAP] {
            let status = try_map(table.id, GREF, window.start(), flags)?;
            check_eq!((status, table.status(GREF)), (GNTST_GENERAL_ERROR, 0), "{flags:?}");
        }
        // The whole page as a part can be copied whole.
        let source = entry_side(table, GREF, 0);
        let to = page(&[1])?;
        check_eq!(copy(source, GnttabCopyPtr::own(to.mfn(), 0), 4096, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
        check_eq!(word(&to, 0), 0);
        Ok(())
    })
}

fn v2_entry_for_another_entry(domain: &mut Domain) -> Verdict {
    // What one domain alone can see of it: it stands for no entry of the same domain, nor of nobody, and is never mapped.
    let (data, to, window) = (page(&[1])?, page(&[5])?, Range::new(1)?);
    with_version_2(domain, |table| {
        table.permit2(OTHER, &data, 0);
        let dest = GnttabCopyPtr::own(to.mfn(), 0);
        for through in [table.id, NOBODY, DomId::SELF] {
            table.set2(GREF, GTF_TRANSITIVE, table.id, through.get().into(), OTHER.get().into());
            let status = copy(entry_side(table, GREF, 0), dest, 8, GNTCOPY_SOURCE_GREF)?;
            check_eq!(status, GNTST_GENERAL_ERROR, "through {through}");
            let status = try_map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
            check_eq!(status, GNTST_GENERAL_ERROR, "mapped through {through}");
            check_eq!((table.status(GREF), table.status(OTHER)), (0, 0));
        }
        check_eq!(copy(entry_side(table, OTHER, 0), dest, 8, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
        check_eq!(word(&to, 0), 1);
        Ok(())
    })
}

fn v2_swap(domain: &mut Domain) -> Verdict {
    let (data, window) = (page(&[])?, Range::new(1)?);
    with_version_2(domain, |table| {
        table.set2(GREF, GTF_PERMIT_ACCESS, DomId::new(5), 0x1234_5678, 1 << 40 | 9);
        table.permit2(OTHER, &data, READONLY);
        let (a, b) = (table.get2(GREF), table.get2(OTHER));
        check_eq!(swap(GREF, OTHER)?, GNTST_OKAY);
        check_eq!((table.get2(GREF), table.get2(OTHER)), (b, a));
        let handle = map(table.id, GREF, window.start(), MapFlags::HOST_MAP | MapFlags::READONLY)?;
        check_eq!(swap(GREF, OTHER)?, GNTST_EAGAIN);
        check_eq!((table.status(GREF), table.status(OTHER)), (READING, 0));
        check_eq!(unmap(window.start(), handle)?, GNTST_OKAY);
        let end = GrantRef::new(query(DomId::SELF)?.nr_frames * 256);
        check_eq!(swap(GREF, end)?, GNTST_BAD_GNTREF);
        Ok(())
    })
}

fn v2_transfer(domain: &mut Domain) -> Verdict {
    with_version_2(domain, |table| {
        with_room(|| {
            let frame = loose_frame(0x99)?;
            table.set2(GREF, GTF_ACCEPT_TRANSFER, table.id, 0, 0x5_4321);
            check_eq!(transfer(frame, table.id, GREF)?, GNTST_OKAY);
            let flags = GTF_ACCEPT_TRANSFER | GTF_TRANSFER_COMMITTED | GTF_TRANSFER_COMPLETED;
            let (header, got) = table.get2(GREF);
            check_eq!((header as u16, got), (flags, frame));
            check_eq!((m2p(frame), table.status(GREF)), (0x5_4321, 0));
            give_up(frame)
        })
    })
}

// ── two domains ──

fn pair_map_and_revoke(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let (granted, window) = (peer.grant(domain.id(), false)?, Range::new(2)?);
    let (gref, them) = (granted.reference, peer.domain());
    check!(peer.write(granted.page.address, 0x1111)?);
    let first = map(them, gref, window.start(), MapFlags::HOST_MAP)?;
    let second = map(them, gref, window.address(1), MapFlags::HOST_MAP | MapFlags::READONLY)?;
    check_eq!((try_read(window.start()), try_read(window.address(1))), (Ok(0x1111), Ok(0x1111)));
    // A frame of theirs is not ours to transfer, copy by number or flush unless it is mapped.
    let frame = granted.page.frame;
    check_eq!(transfer(frame, domain.id(), GREF)?, GNTST_BAD_PAGE);
    check_eq!(flush(frame << 12, 0, 8, CLEAN), Ok(0), "mapped by a grant");
    check_eq!(unmap(window.start(), first)?, GNTST_OKAY);
    check!(!peer.end_grant(gref)?, "still read");
    check_eq!(unmap(window.address(1), second)?, GNTST_OKAY);
    check!(peer.end_grant(gref)?);
    check_eq!(flush(frame << 12, 0, 8, CLEAN), Err(Errno::EINVAL), "not any more");
    peer.free(granted.page)
}

fn pair_copy_both_ways(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let granted = peer.grant(domain.id(), false)?;
    let own = page(&[0xaaaa])?;
    let theirs = |offset| GnttabCopyPtr::granted(granted.reference, peer.domain(), offset);
    let (mine, mine_next) = (GnttabCopyPtr::own(own.mfn(), 0), GnttabCopyPtr::own(own.mfn(), 8));
    check_eq!(copy(mine, theirs(16), 8, GNTCOPY_DEST_GREF)?, GNTST_OKAY);
    check_eq!(peer.read(granted.page.address + 16)?, 0xaaaa);
    check!(peer.write(granted.page.address + 24, 0xbbbb)?);
    check_eq!(copy(theirs(24), mine_next, 8, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
    check_eq!(word(&own, 1), 0xbbbb);
    check_eq!(copy(theirs(24), theirs(32), 8, BOTH)?, GNTST_OKAY);
    check_eq!(peer.read(granted.page.address + 32)?, 0xbbbb);
    let by_number =
        GnttabCopyPtr { domid: peer.domain(), ..GnttabCopyPtr::own(Mfn::new(granted.page.frame), 0) };
    check_eq!(copy(by_number, mine, 8, 0)?, GNTST_PERMISSION_DENIED);
    let as_own = GnttabCopyPtr::own(Mfn::new(granted.page.frame), 0);
    check_eq!(copy(as_own, mine, 8, 0)?, GNTST_BAD_PAGE, "not this domain's");
    check!(peer.end_grant(granted.reference)?);
    check_eq!(copy(theirs(24), mine, 8, GNTCOPY_SOURCE_GREF)?, GNTST_GENERAL_ERROR, "not any more");
    peer.free(granted.page)
}

fn pair_copy_through_us(domain: &mut Domain) -> Verdict {
    // The peer grants us a page; an entry of ours lets the peer copy through it.
    let peer = peer::any()?;
    let granted = peer.grant(domain.id(), false)?;
    let dest = peer.page()?;
    check!(peer.write(granted.page.address + 8, 0x77aa)?);
    let them = peer.domain();
    let verdict = with_version_2(domain, |table| {
        let ask = |offset| -> Result<i16, Stop> {
            let mut op = GnttabCopy {
                source: entry_side(table, GREF, offset),
                dest: GnttabCopyPtr::own(Mfn::new(dest.frame), 0),
                len: 8,
                flags: GNTCOPY_SOURCE_GREF,
                status: 77,
                pad0: 0,
            };
            let result = peer.with(
                Hypercall::GrantTableOp,
                [GnttabOp::Copy.number().into(), peer::BUFFER, 1, 0, 0],
                &mut op,
            )?;
            check_eq!(result, Ok(0));
            Ok(op.status)
        };
        table.set2(GREF, GTF_TRANSITIVE, them, them.get().into(), granted.reference.get().into());
        check_eq!(ask(8)?, GNTST_OKAY);
        check_eq!(peer.read(dest.address)?, 0x77aa);
        check_eq!((ask(4090)?, table.status(GREF)), (GNTST_BAD_COPY_ARG, 0));
        table.set2(GREF, GTF_TRANSITIVE | READONLY, them, them.get().into(), 0xff_ffff);
        check_eq!(ask(8)?, GNTST_BAD_GNTREF, "no such entry there");
        table.set2(GREF, GTF_TRANSITIVE, DomId::new(77), them.get().into(), granted.reference.get().into());
        check_eq!(ask(8)?, GNTST_GENERAL_ERROR, "for somebody else");
        check_eq!(table.status(GREF), 0);
        Ok(())
    });
    check!(peer.end_grant(granted.reference)?, "nothing is in use");
    peer.free(granted.page)?;
    peer.free(dest)?;
    verdict
}

fn pair_transfer(domain: &mut Domain) -> Verdict {
    // From the peer to us; the peer's page is still mapped there, so first it may not be given.
    let peer = peer::any()?;
    let table = Table::new(domain)?;
    let dest = peer.page()?;
    let ask = |mfn: u64| -> Result<i16, Stop> {
        let mut op = GnttabTransfer {
            mfn: Mfn::new(mfn),
            domid: domain.id(),
            gref: GREF,
            status: 77,
            ..Default::default()
        };
        let result = peer.with(
            Hypercall::GrantTableOp,
            [GnttabOp::Transfer.number().into(), peer::BUFFER, 1, 0, 0],
            &mut op,
        )?;
        check_eq!(result, Ok(0));
        Ok(op.status)
    };
    table.set(GREF, GTF_ACCEPT_TRANSFER, peer.domain(), 0x66);
    check_eq!(ask(dest.frame)?, GNTST_BAD_PAGE, "it is mapped");
    check_eq!(table.get(GREF).flags, GTF_ACCEPT_TRANSFER);
    check!(peer.write(dest.address, 0xabcd)?);
    let unmapped = peer.call(Hypercall::UpdateVaMapping, [dest.address, 0, 2, 0, 0], &mut [])?;
    check_eq!(unmapped, Ok(0));
    with_room(|| {
        check_eq!(ask(dest.frame)?, GNTST_OKAY);
        let entry = table.get(GREF);
        check_eq!(entry.flags, GTF_ACCEPT_TRANSFER | GTF_TRANSFER_COMMITTED | GTF_TRANSFER_COMPLETED);
        check_eq!(u64::from(entry.frame), dest.frame);
        let window = Range::new(1)?;
        // SAFETY: a frame of this domain's now.
        unsafe { window.map(0, Mfn::new(dest.frame), Access::ReadWrite)? };
        check_eq!(try_read(window.start()), Ok(0xabcd));
        window.unmap(0)?;
        check_eq!(ask(dest.frame)?, GNTST_BAD_PAGE, "the peer's no more");
        give_up(dest.frame)
    })
}

fn pair_nobody_elses_table(_: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let them = peer.domain();
    // Who controls domains may do all this; who does not may not.
    let privileged = conformance::is_privileged();
    let refused = if privileged { GNTST_OKAY } else { GNTST_PERMISSION_DENIED };
    check_eq!(query(them)?.status, refused);
    check_eq!(setup(them, &mut [0])?, refused);
    let mut get = GnttabGetStatusFrames { dom: them, status: 77, ..Default::default() };
    check_eq!(grant(GnttabOp::GetStatusFrames, &mut get), Ok(0));
    check_eq!(get.status, refused);
    check_eq!(get_version(them), if privileged { Ok(1) } else { Err(Errno::EPERM) });
    check_eq!((query(DomId::SELF)?.status, get_version(DomId::SELF)), (GNTST_OKAY, Ok(1)));
    Ok(())
}

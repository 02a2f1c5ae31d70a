//! Reservations, memory maps, the machine-to-physical window, and grant tables.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, TablePage, at, call, grant, is_xenolith, memop, mmuext, pte, update};
use guest_sdk::abi::grant::{
    GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTST_BAD_COPY_ARG, GNTST_BAD_DOMAIN, GNTST_BAD_GNTREF,
    GNTST_BAD_HANDLE, GNTST_GENERAL_ERROR, GNTST_OKAY, GnttabCopy, GnttabCopyPtr, GnttabGetVersion,
    GnttabMapGrantRef, GnttabQuerySize, GnttabSetVersion, GnttabSetupTable, GnttabSwapGrantRef,
    GnttabUnmapGrantRef, MapFlags,
};
use guest_sdk::abi::memory::{
    E820_RAM, E820Entry, MachphysMapping, MachphysMfnList, MemoryDomain, MemoryExchange, MemoryMap,
    MemoryReservation,
};
use guest_sdk::abi::mmu::MmuCommand;
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::{GnttabOp, MemoryOp, MmuextCmd};
use guest_sdk::abi::{DomId, Errno, GrantRef, GuestHandle, Hypercall};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::ring::SharedPage;
use guest_sdk::testkit::{
    self, Verdict, cases, check, check_eq, expect_errno, expect_vector, try_read, try_write,
};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            ram_page,
            reservation_queries,
            reservation_of_nobody,
            decrease_and_increase,
            decrease_refuses,
            grants_of_the_next_step,
            physmap_is_not_for_us,
            populate_physmap,
            increase_bad_arguments,
            exchange_swaps_frames,
            exchange_bad_arguments,
            machphys_mapping,
            machphys_list,
            memory_map_of_the_domain,
            memory_map_of_the_machine,
            memory_op_unknown,
            grant_query_size,
            grant_setup_table,
            grant_version,
            grant_map_own,
            grant_map_read_only,
            grant_map_refused,
            grant_unmap_refused,
            grant_map_pins_the_frame,
            grant_copy,
            grant_copy_refused,
            grant_swap,
            grant_unknown,
            grant_bad_list,
        ],
    )
}

fn ram_page(_: &mut Domain) -> Verdict {
    let last = call(Hypercall::MemoryOp, [2, 0, 0, 0, 0])?;
    let own = Page::new()?.mfn().get();
    check!(last >= own && last < 1 << 24, "last frame {last:#x}");
    Ok(())
}

fn query(command: MemoryOp, domid: DomId) -> Result<u64, Errno> {
    memop(command, &mut MemoryDomain { domid })
}

fn reservation_queries(_: &mut Domain) -> Verdict {
    let current = query(MemoryOp::CurrentReservation, DomId::SELF)?;
    let maximum = query(MemoryOp::MaximumReservation, DomId::SELF)?;
    check!(current >= memory::pages(), "{current} frames and {} pages", memory::pages());
    check!(maximum >= current, "{maximum} at most");
    // What the guest itself said in the shared page.
    // SAFETY: a field of the shared page that nothing else uses.
    unsafe { (&raw mut (*conformance::shared()).arch.max_pfn).write_volatile(0x1234) };
    check_eq!(query(MemoryOp::MaximumGpfn, DomId::SELF), Ok(0x1233));
    Ok(())
}

fn reservation_of_nobody(_: &mut Domain) -> Verdict {
    for command in [MemoryOp::CurrentReservation, MemoryOp::MaximumReservation, MemoryOp::MaximumGpfn] {
        check_eq!(query(command, DomId::new(1234)), Err(Errno::ESRCH), "{command:?}");
    }
    check_eq!(call(Hypercall::MemoryOp, [3, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn reservation(list: &mut [u64], domid: DomId) -> MemoryReservation {
    MemoryReservation {
        extent_start: GuestHandle::new(list.as_mut_ptr() as u64),
        nr_extents: list.len() as u64,
        domid,
        ..MemoryReservation::default()
    }
}

/// Where a page was: its address, without a mapping now, and its number.
struct Hole {
    address: u64,
    pfn: u64,
}

/// Takes a page out of the domain.
fn give_back(page: Page) -> Result<Hole, testkit::Stop> {
    let hole = unmapped(page)?;
    let mut list = [hole.1];
    check_eq!(memop(MemoryOp::DecreaseReservation, &mut reservation(&mut list, DomId::SELF)), Ok(1));
    Ok(hole.0)
}

/// Unmaps a page at its own place; its frame comes with it.
fn unmapped(page: Page) -> Result<(Hole, u64), testkit::Stop> {
    let frame = page.mfn();
    let pfn = memory::mfn_to_pfn(frame).ok_or("no pfn")?.get();
    let address = page.leak();
    // SAFETY: the page is leaked.
    unsafe { memory::set_leaf(address, 0)? };
    Ok((Hole { address, pfn }, frame.get()))
}

/// Puts a fresh frame where a page was given back.
fn take_again(hole: &Hole, frame: u64) -> Result<Page, testkit::Stop> {
    update(MmuCommand::MachphysUpdate, frame << 12, hole.pfn)?;
    let info = guest_sdk::rt::start::start_info().ok_or("no start info")?;
    // SAFETY: the entry of the page in the domain's own list; then nothing is mapped there, and the frame is new.
    unsafe {
        (info.mfn_list as *mut u64).add(hole.pfn as usize).write_volatile(frame);
        memory::set_leaf(hole.address, pte(frame, 0x63 | 1 << 63))?;
        Ok(Page::from_leaked(hole.address))
    }
}

fn decrease_and_increase(_: &mut Domain) -> Verdict {
    let before = query(MemoryOp::CurrentReservation, DomId::SELF)?;
    let hole = give_back(Page::new()?)?;
    check_eq!(query(MemoryOp::CurrentReservation, DomId::SELF), Ok(before - 1));
    expect_vector(try_read(hole.address), 14, 0)?;
    let mut list = [u64::MAX];
    check_eq!(memop(MemoryOp::IncreaseReservation, &mut reservation(&mut list, DomId::SELF)), Ok(1));
    check!(list[0] != u64::MAX);
    check_eq!(query(MemoryOp::CurrentReservation, DomId::SELF), Ok(before));
    let page = take_again(&hole, list[0])?;
    // Nobody's old content.
    for offset in (0..4096).step_by(8) {
        check_eq!(try_read(page.address() + offset), Ok(0), "word at {offset}");
    }
    Ok(())
}

fn decrease_refuses(_: &mut Domain) -> Verdict {
    // What is not ours cannot be given away.
    let before = query(MemoryOp::CurrentReservation, DomId::SELF)?;
    let frame = conformance::hypervisor_frame()?;
    for frame in [frame, 0xff_ffff_ffff, u64::MAX] {
        let mut list = [frame];
        check_eq!(
            memop(MemoryOp::DecreaseReservation, &mut reservation(&mut list, DomId::SELF)),
            Ok(0),
            "{frame:#x}"
        );
    }
    let mut bad = MemoryReservation {
        extent_start: GuestHandle::new(NOWHERE),
        nr_extents: 1,
        domid: DomId::SELF,
        ..Default::default()
    };
    check_eq!(memop(MemoryOp::DecreaseReservation, &mut bad), Ok(0), "a list that cannot be read: none done");
    check_eq!(query(MemoryOp::CurrentReservation, DomId::SELF), Ok(before));
    Ok(())
}

fn populate_physmap(_: &mut Domain) -> Verdict {
    let before = query(MemoryOp::CurrentReservation, DomId::SELF)?;
    let hole = give_back(Page::new()?)?;
    let mut list = [hole.pfn];
    check_eq!(memop(MemoryOp::PopulatePhysmap, &mut reservation(&mut list, DomId::SELF)), Ok(1));
    // The frame comes back in the list, and the table knows which page it is.
    check_eq!(try_read(MACH2PHYS_VIRT_START + list[0] * 8), Ok(hole.pfn));
    check_eq!(query(MemoryOp::CurrentReservation, DomId::SELF), Ok(before));
    let page = take_again(&hole, list[0])?;
    check_eq!(try_read(page.address()), Ok(0));
    Ok(())
}

fn increase_bad_arguments(_: &mut Domain) -> Verdict {
    let mut list = [0u64];
    // Not an error but none done, as for every reason why there is no more.
    for command in [MemoryOp::IncreaseReservation, MemoryOp::DecreaseReservation, MemoryOp::PopulatePhysmap] {
        let mut nobody = reservation(&mut list, DomId::new(1234));
        check_eq!(memop(command, &mut nobody), Ok(0), "{command:?}");
    }
    for command in [0, 1, 6] {
        check_eq!(call(Hypercall::MemoryOp, [command, NOWHERE, 0, 0, 0]), Ok(0), "command {command}");
    }
    // More than the address space holds.
    let mut huge = MemoryReservation { extent_order: 60, ..reservation(&mut list, DomId::SELF) };
    check_eq!(memop(MemoryOp::IncreaseReservation, &mut huge), Ok(0));
    Ok(())
}

fn exchange(input: &mut [u64], output: &mut [u64]) -> MemoryExchange {
    MemoryExchange {
        input: reservation(input, DomId::SELF),
        output: reservation(output, DomId::SELF),
        nr_exchanged: 0,
    }
}

fn exchange_swaps_frames(_: &mut Domain) -> Verdict {
    let before = query(MemoryOp::CurrentReservation, DomId::SELF)?;
    let (hole, old) = unmapped(Page::new()?)?;
    let (mut input, mut output) = ([old], [hole.pfn]);
    let mut request = exchange(&mut input, &mut output);
    check_eq!(memop(MemoryOp::Exchange, &mut request), Ok(0));
    check_eq!(request.nr_exchanged, 1);
    check_eq!(query(MemoryOp::CurrentReservation, DomId::SELF), Ok(before));
    check_eq!(try_read(MACH2PHYS_VIRT_START + output[0] * 8), Ok(hole.pfn));
    let page = take_again(&hole, output[0])?;
    check_eq!(try_read(page.address()), Ok(0));
    Ok(())
}

fn exchange_bad_arguments(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let (mut input, mut output) = ([page.mfn().get()], [0u64, 0]);
    let mut request = exchange(&mut input, &mut output);
    check_eq!(memop(MemoryOp::Exchange, &mut request), Err(Errno::EINVAL), "not as many");
    let mut output = [0u64];
    let mut request = exchange(&mut input, &mut output);
    request.output.domid = DomId::new(1234);
    check_eq!(memop(MemoryOp::Exchange, &mut request), Err(Errno::EINVAL), "two domains");
    let mut request = exchange(&mut input, &mut output);
    request.nr_exchanged = 2;
    check_eq!(memop(MemoryOp::Exchange, &mut request), Err(Errno::EINVAL), "more done than there is");
    check_eq!(call(Hypercall::MemoryOp, [11, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    check_eq!(try_read(page.address()), Ok(0));
    Ok(())
}

fn machphys_mapping(_: &mut Domain) -> Verdict {
    let mut mapping = MachphysMapping::default();
    check_eq!(memop(MemoryOp::MachphysMapping, &mut mapping), Ok(0));
    check_eq!(mapping.v_start, MACH2PHYS_VIRT_START);
    check!(mapping.v_end > mapping.v_start && mapping.max_mfn > 0);
    check!(mapping.max_mfn >= Page::new()?.mfn().get());
    expect_errno(call(Hypercall::MemoryOp, [12, NOWHERE, 0, 0, 0]), Errno::EFAULT)
}

fn machphys_list(_: &mut Domain) -> Verdict {
    if conformance::is_xenolith() {
        // In the list of docs/abi/enosys.md.
        let mut list = MachphysMfnList::default();
        return expect_errno(memop(MemoryOp::MachphysMfnList, &mut list), Errno::ENOSYS);
    }
    let mut frames = [u64::MAX; 4];
    let mut list = MachphysMfnList {
        max_extents: 4,
        extent_start: GuestHandle::new(at(&mut frames)),
        ..Default::default()
    };
    check_eq!(memop(MemoryOp::MachphysMfnList, &mut list), Ok(0));
    check!(list.nr_extents >= 1 && list.nr_extents <= 4);
    // The table's own frame can be read through a mapping, and says the same as the window.
    let range = Range::new(1)?;
    let entry = pte(frames[0], Access::Read.bits());
    let dom_xen = u64::from(DomId::XEN.get());
    check_eq!(call(Hypercall::UpdateVaMappingOtherdomain, [range.start(), entry, 2, dom_xen, 0]), Ok(0));
    check_eq!(try_read(range.start() + 8 * 300), try_read(MACH2PHYS_VIRT_START + 8 * 300));
    let mut bad =
        MachphysMfnList { max_extents: 4, extent_start: GuestHandle::new(NOWHERE), ..Default::default() };
    expect_errno(memop(MemoryOp::MachphysMfnList, &mut bad), Errno::EFAULT)
}

/// An empty list is enough to tell a command that is there from one that is not.
fn grants_of_the_next_step(_: &mut Domain) -> Verdict {
    let nothing = |command: GnttabOp| call(Hypercall::GrantTableOp, [command as u64, 0, 0, 0, 0]);
    let elsewhere = if is_xenolith() { Err(Errno::ENOSYS) } else { Ok(0) };
    for command in [GnttabOp::Transfer, GnttabOp::UnmapAndReplace, GnttabOp::CacheFlush] {
        check_eq!(nothing(command), elsewhere, "{command:?}");
    }
    check_eq!(nothing(GnttabOp::MapGrantRef), Ok(0));
    Ok(())
}

/// For guests whose memory the hypervisor translates, which PV guests' is not.
fn physmap_is_not_for_us(_: &mut Domain) -> Verdict {
    let mut request = [u64::from(DomId::SELF.get()), 0, 0, 0, 0, 0];
    for command in [MemoryOp::AddToPhysmap, MemoryOp::RemoveFromPhysmap] {
        check_eq!(memop(command, &mut request), Err(Errno::EACCES), "{command:?}");
    }
    Ok(())
}

fn memory_map_of_the_domain(_: &mut Domain) -> Verdict {
    let mut entries = [E820Entry::default(); 16];
    let mut map = MemoryMap { nr_entries: 16, pad0: 0, buffer: GuestHandle::new(at(&mut entries)) };
    // A first domain has no map of its own unless it was given one.
    expect_errno(memop(MemoryOp::MemoryMap, &mut map), Errno::ENOSYS)
}

fn memory_map_of_the_machine(_: &mut Domain) -> Verdict {
    let mut entries = [E820Entry::default(); 32];
    let mut map = MemoryMap { nr_entries: 32, pad0: 0, buffer: GuestHandle::new(at(&mut entries)) };
    check_eq!(memop(MemoryOp::MachineMemoryMap, &mut map), Ok(0));
    let count = map.nr_entries as usize;
    check!((2..=32).contains(&count), "{count} entries");
    let mut end = 0;
    let mut ram = 0;
    for entry in &entries[..count] {
        let (addr, size, kind) = (entry.addr, entry.size, entry.kind);
        check!(addr >= end && size > 0, "in order, without overlap: {addr:#x} after {end:#x}");
        end = addr + size;
        ram += if kind == E820_RAM { size } else { 0 };
    }
    check!(ram >> 12 >= memory::pages(), "{ram} bytes of memory");
    let mut small = MemoryMap { nr_entries: 1, ..map };
    check_eq!(memop(MemoryOp::MachineMemoryMap, &mut small), Err(Errno::EINVAL), "no room");
    Ok(())
}

fn memory_op_unknown(_: &mut Domain) -> Verdict {
    for command in [8, 29, 40, 63] {
        check_eq!(call(Hypercall::MemoryOp, [command, 0, 0, 0, 0]), Err(Errno::ENOSYS), "command {command}");
    }
    Ok(())
}

fn grant_query_size(_: &mut Domain) -> Verdict {
    let mut size = GnttabQuerySize { dom: DomId::SELF, status: 77, ..Default::default() };
    check_eq!(grant(GnttabOp::QuerySize, &mut size), Ok(0));
    check_eq!(size.status, GNTST_OKAY);
    check!(size.nr_frames >= 1 && size.max_nr_frames >= size.nr_frames, "{size:?}");
    let mut size = GnttabQuerySize { dom: DomId::new(1234), status: 77, ..Default::default() };
    check_eq!(grant(GnttabOp::QuerySize, &mut size), Ok(0));
    check_eq!(size.status, GNTST_BAD_DOMAIN);
    check_eq!(call(Hypercall::GrantTableOp, [6, at(&mut size), 2, 0, 0]), Err(Errno::EINVAL), "two at once");
    Ok(())
}

fn grant_setup_table(_: &mut Domain) -> Verdict {
    let mut frames = [u64::MAX; 2];
    let mut setup = GnttabSetupTable {
        dom: DomId::SELF,
        nr_frames: 2,
        status: 77,
        frame_list: GuestHandle::new(at(&mut frames)),
        ..Default::default()
    };
    check_eq!(grant(GnttabOp::SetupTable, &mut setup), Ok(0));
    check_eq!(setup.status, GNTST_OKAY);
    check!(frames[0] != frames[1] && frames[0] != u64::MAX && frames[1] != u64::MAX, "{frames:x?}");
    let mut size = GnttabQuerySize { dom: DomId::SELF, ..Default::default() };
    check_eq!(grant(GnttabOp::QuerySize, &mut size), Ok(0));
    check!(size.nr_frames >= 2, "it has grown");
    let mut setup = GnttabSetupTable { nr_frames: size.max_nr_frames + 1, ..setup };
    check_eq!(grant(GnttabOp::SetupTable, &mut setup), Ok(0));
    check_eq!(setup.status, GNTST_GENERAL_ERROR, "more than it may");
    let mut setup = GnttabSetupTable { dom: DomId::new(1234), nr_frames: 1, ..setup };
    check_eq!(grant(GnttabOp::SetupTable, &mut setup), Ok(0));
    check_eq!(setup.status, GNTST_BAD_DOMAIN);
    check_eq!(call(Hypercall::GrantTableOp, [2, at(&mut setup), 2, 0, 0]), Err(Errno::EINVAL), "two at once");
    Ok(())
}

fn grant_version(_: &mut Domain) -> Verdict {
    let mut version = GnttabGetVersion { dom: DomId::SELF, pad: 0, version: 77 };
    check_eq!(grant(GnttabOp::GetVersion, &mut version), Ok(0));
    check_eq!(version.version, 1);
    let mut nobody = GnttabGetVersion { dom: DomId::new(1234), pad: 0, version: 77 };
    check_eq!(grant(GnttabOp::GetVersion, &mut nobody), Err(Errno::ESRCH));
    let mut set = GnttabSetVersion { version: 1 };
    check_eq!(grant(GnttabOp::SetVersion, &mut set), Ok(0));
    check_eq!(set.version, 1);
    let mut set = GnttabSetVersion { version: 3 };
    expect_errno(grant(GnttabOp::SetVersion, &mut set), Errno::EINVAL)
}

fn map(gref: GrantRef, address: u64, flags: MapFlags) -> GnttabMapGrantRef {
    GnttabMapGrantRef {
        host_addr: address,
        flags: flags.bits(),
        gref,
        dom: DomId::SELF,
        status: 77,
        ..Default::default()
    }
}

fn unmap(address: u64, handle: u32) -> Result<i16, testkit::Stop> {
    let mut request = GnttabUnmapGrantRef { host_addr: address, handle, status: 77, ..Default::default() };
    check_eq!(grant(GnttabOp::UnmapGrantRef, &mut request), Ok(0));
    Ok(request.status)
}

fn grant_map_own(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    let granted = domain.grants.grant_new(id, Access::ReadWrite)?;
    granted.write_bytes(0, &0x5aa5_1234u32.to_le_bytes());
    let range = Range::new(1)?;
    check!(!granted.in_use());
    let mut request = map(granted.reference(), range.start(), MapFlags::HOST_MAP);
    request.dom = id;
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_OKAY);
    check!(granted.in_use(), "the entry says so");
    check_eq!(try_read(range.start()).map(|word| word as u32), Ok(0x5aa5_1234));
    // SAFETY: shared memory of this case.
    unsafe { try_write(range.start() + 8, 99)? };
    check_eq!(granted.word(8).load(core::sync::atomic::Ordering::Relaxed), 99);
    check_eq!(unmap(range.start(), request.handle)?, GNTST_OKAY);
    check!(!granted.in_use());
    expect_vector(try_read(range.start()), 14, 0)
}

fn grant_map_read_only(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    let granted = domain.grants.grant_new(id, Access::Read)?;
    let range = Range::new(1)?;
    let mut request = map(granted.reference(), range.start(), MapFlags::HOST_MAP);
    request.dom = id;
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_GENERAL_ERROR, "writable, though granted for reading");
    let mut request = map(granted.reference(), range.start(), MapFlags::HOST_MAP | MapFlags::READONLY);
    request.dom = id;
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_OKAY);
    check_eq!(try_read(range.start()), Ok(0));
    // SAFETY: refused by the mapping.
    let refused = unsafe { try_write(range.start(), 1) };
    check_eq!(unmap(range.start(), request.handle)?, GNTST_OKAY);
    expect_vector(refused, 14, 3)
}

fn grant_map_refused(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    let foreign = domain.grants.grant_new(DomId::new(77), Access::ReadWrite)?;
    let granted = domain.grants.grant_new(id, Access::ReadWrite)?;
    let range = Range::new(1)?;
    let status = |gref: GrantRef, dom: DomId, address: u64, flags: MapFlags| -> Result<i16, testkit::Stop> {
        let mut request = GnttabMapGrantRef { dom, ..map(gref, address, flags) };
        check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
        Ok(request.status)
    };
    check_eq!(
        status(foreign.reference(), id, range.start(), MapFlags::HOST_MAP)?,
        GNTST_GENERAL_ERROR,
        "somebody else's"
    );
    check_eq!(
        status(GrantRef::new(500), id, range.start(), MapFlags::HOST_MAP)?,
        GNTST_GENERAL_ERROR,
        "unused"
    );
    check_eq!(
        status(GrantRef::new(1 << 20), id, range.start(), MapFlags::HOST_MAP)?,
        GNTST_BAD_GNTREF,
        "behind the end"
    );
    check_eq!(
        status(granted.reference(), DomId::new(1234), range.start(), MapFlags::HOST_MAP)?,
        GNTST_BAD_DOMAIN
    );
    check_eq!(
        status(granted.reference(), id, range.start(), MapFlags::empty())?,
        GNTST_BAD_GNTREF,
        "mapped for nobody"
    );
    check_eq!(
        status(granted.reference(), id, NOWHERE, MapFlags::HOST_MAP)?,
        GNTST_GENERAL_ERROR,
        "no table for the address"
    );
    check!(!granted.in_use(), "what failed holds nothing");
    check_eq!(memory::leaf(range.start()), Some(0));
    Ok(())
}

fn grant_unmap_refused(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    check_eq!(unmap(NOWHERE, 4000)?, GNTST_BAD_HANDLE);
    check_eq!(unmap(NOWHERE, u32::MAX)?, GNTST_BAD_HANDLE);
    let granted = domain.grants.grant_new(id, Access::ReadWrite)?;
    let range = Range::new(2)?;
    let mut request =
        GnttabMapGrantRef { dom: id, ..map(granted.reference(), range.start(), MapFlags::HOST_MAP) };
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_OKAY);
    check!(unmap(range.address(1), request.handle)? != GNTST_OKAY, "another address");
    check!(granted.in_use());
    check_eq!(unmap(range.start(), request.handle)?, GNTST_OKAY);
    check_eq!(unmap(range.start(), request.handle)?, GNTST_BAD_HANDLE, "twice");
    Ok(())
}

fn grant_map_pins_the_frame(domain: &mut Domain) -> Verdict {
    // While a granted page is mapped writable it cannot become a page table, though its owner maps it read-only.
    let id = domain.id();
    let page = Page::new()?;
    let (frame, own) = (page.mfn().get(), page.address());
    let granted = domain.grants.grant(page, id, Access::ReadWrite)?;
    let range = Range::new(1)?;
    let mut request =
        GnttabMapGrantRef { dom: id, ..map(granted.reference(), range.start(), MapFlags::HOST_MAP) };
    check_eq!(grant(GnttabOp::MapGrantRef, &mut request), Ok(0));
    check_eq!(request.status, GNTST_OKAY);
    // SAFETY: nobody writes it through its own address meanwhile.
    unsafe { memory::set_leaf(own, pte(frame, 0x61 | 1 << 63))? };
    let pinned = mmuext(MmuextCmd::PinL1Table, frame, 0);
    check_eq!(unmap(range.start(), request.handle)?, GNTST_OKAY);
    let later = mmuext(MmuextCmd::PinL1Table, frame, 0);
    check_eq!(mmuext(MmuextCmd::UnpinTable, frame, 0), Ok(0));
    // SAFETY: an ordinary page again.
    unsafe { memory::set_leaf(own, pte(frame, 0x63 | 1 << 63))? };
    check_eq!((pinned, later), (Err(Errno::EINVAL), Ok(0)));
    Ok(())
}

fn copy(source: GnttabCopyPtr, dest: GnttabCopyPtr, len: u16, flags: u16) -> Result<i16, testkit::Stop> {
    let mut request = GnttabCopy { source, dest, len, flags, status: 77, pad0: 0 };
    check_eq!(grant(GnttabOp::Copy, &mut request), Ok(0));
    Ok(request.status)
}

fn grant_copy(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    let from = domain.grants.grant_new(id, Access::Read)?;
    let to = domain.grants.grant_new(id, Access::ReadWrite)?;
    from.write_bytes(100, b"copied by the hypervisor");
    let (source, dest) =
        (GnttabCopyPtr::granted(from.reference(), id, 100), GnttabCopyPtr::granted(to.reference(), id, 4000));
    check_eq!(copy(source, dest, 24, GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF)?, GNTST_OKAY);
    let mut seen = [0u8; 26];
    to.read_bytes(3999, &mut seen);
    check_eq!(&seen, b"\0copied by the hypervisor\0");
    // To an own frame by its number.
    let page = Page::new()?;
    check_eq!(copy(source, GnttabCopyPtr::own(page.mfn(), 0), 8, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
    check_eq!(try_read(page.address()), Ok(u64::from_le_bytes(*b"copied b")));
    check!(!from.in_use() && !to.in_use());
    Ok(())
}

fn grant_copy_refused(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    let from = domain.grants.grant_new(id, Access::Read)?;
    let to = domain.grants.grant_new(id, Access::ReadWrite)?;
    let page = Page::new()?;
    let (f, t) = (from.reference(), to.reference());
    let both = GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF;
    let g = |gref, offset| GnttabCopyPtr::granted(gref, id, offset);
    check_eq!(copy(g(f, 4090), g(t, 0), 10, both)?, GNTST_BAD_COPY_ARG, "past the end of the source");
    check_eq!(copy(g(f, 0), g(t, 4090), 10, both)?, GNTST_BAD_COPY_ARG, "past the end of the destination");
    check_eq!(copy(g(t, 0), g(f, 0), 10, both)?, GNTST_GENERAL_ERROR, "into what may be read only");
    check_eq!(copy(g(GrantRef::new(1 << 20), 0), g(t, 0), 10, both)?, GNTST_BAD_GNTREF);
    let nobody = GnttabCopyPtr::granted(f, DomId::new(1234), 0);
    check_eq!(copy(nobody, g(t, 0), 10, both)?, GNTST_BAD_DOMAIN);
    // Somebody else's frame by number.
    let foreign = GnttabCopyPtr { domid: DomId::new(0x7ff2), ..GnttabCopyPtr::own(page.mfn(), 0) };
    check!(copy(foreign, g(t, 0), 10, GNTCOPY_DEST_GREF)? != GNTST_OKAY);
    // A page table as the destination.
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    let refused =
        copy(g(f, 0), GnttabCopyPtr::own(guest_sdk::abi::Mfn::new(table.mfn()), 0), 8, GNTCOPY_SOURCE_GREF)?;
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    check!(refused != GNTST_OKAY, "a page table was written");
    check!(!from.in_use() && !to.in_use());
    Ok(())
}

fn grant_swap(domain: &mut Domain) -> Verdict {
    let id = domain.id();
    let a = domain.grants.grant_new(id, Access::ReadWrite)?;
    let b = domain.grants.grant_new(id, Access::ReadWrite)?;
    a.write_bytes(0, b"first...");
    let swap = |ref_a, ref_b| -> Result<i16, testkit::Stop> {
        let mut request = GnttabSwapGrantRef { ref_a, ref_b, status: 77, pad0: 0 };
        check_eq!(grant(GnttabOp::SwapGrantRef, &mut request), Ok(0));
        Ok(request.status)
    };
    check_eq!(swap(a.reference(), b.reference())?, GNTST_OKAY);
    // What the second reference leads to now is the first page.
    let page = Page::new()?;
    let source = GnttabCopyPtr::granted(b.reference(), id, 0);
    check_eq!(copy(source, GnttabCopyPtr::own(page.mfn(), 0), 8, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
    check_eq!(try_read(page.address()), Ok(u64::from_le_bytes(*b"first...")));
    check_eq!(swap(a.reference(), b.reference())?, GNTST_OKAY);
    check_eq!(swap(a.reference(), GrantRef::new(1 << 20))?, GNTST_BAD_GNTREF);
    Ok(())
}

fn grant_unknown(_: &mut Domain) -> Verdict {
    let mut room = [0u64; 8];
    for command in [13, 100, 0xfff] {
        check_eq!(
            call(Hypercall::GrantTableOp, [command, at(&mut room), 1, 0, 0]),
            Err(Errno::ENOSYS),
            "command {command}"
        );
    }
    Ok(())
}

fn grant_bad_list(_: &mut Domain) -> Verdict {
    for command in [0, 1, 5] {
        check_eq!(
            call(Hypercall::GrantTableOp, [command, NOWHERE, 1, 0, 0]),
            Err(Errno::EFAULT),
            "command {command}"
        );
    }
    check_eq!(call(Hypercall::GrantTableOp, [0, 0, 1 << 31, 0, 0]), Err(Errno::EINVAL), "too many");
    Ok(())
}

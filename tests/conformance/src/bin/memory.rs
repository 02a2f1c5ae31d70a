//! Reservations, memory maps, and the machine-to-physical window.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, at, call, is_privileged, memop, pte, update};
use guest_sdk::abi::memory::{
    E820_RAM, E820Entry, MachphysMapping, MachphysMfnList, MemoryDomain, MemoryExchange, MemoryMap,
    MemoryReservation,
};
use guest_sdk::abi::mmu::MmuCommand;
use guest_sdk::abi::mmu::MmuextOp;
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::{MemoryOp, MmuextCmd};
use guest_sdk::abi::{DomId, Errno, GuestHandle, Hypercall};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Verdict, cases, check, check_eq, expect_errno, expect_vector, try_read};
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
            physmap_is_not_for_us,
            populate_physmap,
            increase_bad_arguments,
            exchange_swaps_frames,
            exchange_bad_arguments,
            exchange_of_others_is_refused,
            machphys_mapping,
            machphys_list,
            memory_map_of_the_domain,
            memory_map_of_the_machine,
            memory_op_unknown,
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
    let before = query(MemoryOp::CurrentReservation, DomId::SELF)?;
    check!(before > 0);
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
    check_eq!(query(MemoryOp::CurrentReservation, DomId::SELF), Ok(before));
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

fn exchange_of_others_is_refused(_: &mut Domain) -> Verdict {
    let (hole, old) = unmapped(Page::new()?)?;
    let (mut input, mut output) = ([old], [hole.pfn]);
    let mut whose = alloc::vec![(DomId::new(1234), 0, Errno::ESRCH), (DomId::SELF, 30, Errno::EPERM)];
    if !is_privileged() {
        // An extent above 2 MiB, and frames of the first domain.
        whose.extend([(DomId::SELF, 10, Errno::EPERM), (DomId::ZERO, 0, Errno::EPERM)]);
    }
    for (domain, order, errno) in whose {
        let mut request = exchange(&mut input, &mut output);
        for side in [&mut request.input, &mut request.output] {
            (side.domid, side.extent_order) = (domain, order);
        }
        check_eq!(memop(MemoryOp::Exchange, &mut request), Err(errno), "{domain:?}, order {order}");
        check_eq!(request.nr_exchanged, 0);
    }
    check_eq!((input[0], output[0]), (old, hole.pfn));
    let mut request = exchange(&mut input, &mut output);
    check_eq!(memop(MemoryOp::Exchange, &mut request), Ok(0));
    check_eq!(try_read(MACH2PHYS_VIRT_START + output[0] * 8), Ok(hole.pfn));
    take_again(&hole, output[0])?;
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
    check!(query(MemoryOp::CurrentReservation, DomId::SELF)? > 0);
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
    let mapped = call(Hypercall::UpdateVaMappingOtherdomain, [range.start(), entry, 2, dom_xen, 0]);
    if !is_privileged() {
        return expect_errno(mapped, Errno::EPERM);
    }
    check_eq!(mapped, Ok(0));
    check_eq!(try_read(range.start() + 8 * 300), try_read(MACH2PHYS_VIRT_START + 8 * 300));
    // For reading only, and it cannot become a table.
    let entry = pte(frames[0], Access::ReadWrite.bits());
    check!(call(Hypercall::UpdateVaMappingOtherdomain, [range.start(), entry, 2, dom_xen, 0]).is_err());
    let mut pin = MmuextOp::new(MmuextCmd::PinL1Table, frames[0], 0);
    check!(call(Hypercall::MmuextOp, [at(&mut pin), 1, 0, dom_xen, 0]).is_err());
    let mut clear = MmuextOp::new(MmuextCmd::ClearPage, frames[0], 0);
    check!(call(Hypercall::MmuextOp, [at(&mut clear), 1, 0, dom_xen, 0]).is_err());
    check_eq!(try_read(range.start() + 8 * 300), try_read(MACH2PHYS_VIRT_START + 8 * 300), "untouched");
    let mut bad =
        MachphysMfnList { max_extents: 4, extent_start: GuestHandle::new(NOWHERE), ..Default::default() };
    expect_errno(memop(MemoryOp::MachphysMfnList, &mut bad), Errno::EFAULT)
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
    let mut entries = [E820Entry::default(); 32];
    let mut map = MemoryMap { nr_entries: 32, pad0: 0, buffer: GuestHandle::new(at(&mut entries)) };
    let answer = memop(MemoryOp::MemoryMap, &mut map);
    if is_privileged() {
        // A first domain has no map of its own unless it was given one; it asks for the machine's.
        check_eq!(answer, Err(Errno::ENOSYS));
        check_eq!((map.nr_entries, entries[0]), (32, E820Entry::default()));
        check_eq!(memop(MemoryOp::MachineMemoryMap, &mut map), Ok(0));
        check!((1..32).contains(&map.nr_entries) && entries[0].size > 0, "{} entries", map.nr_entries);
        return Ok(());
    }
    if answer == Err(Errno::ENOSYS) {
        return testkit::skip("the toolstack has given this domain no memory map");
    }
    check_eq!(answer, Ok(0));
    let count = map.nr_entries as usize;
    check!((1..=32).contains(&count), "{count} entries");
    let ram = entries[..count].iter().filter(|entry| entry.kind == E820_RAM).map(|entry| entry.size);
    check!(ram.sum::<u64>() >> 12 >= memory::pages());
    Ok(())
}

fn memory_map_of_the_machine(_: &mut Domain) -> Verdict {
    let mut entries = [E820Entry::default(); 32];
    let mut map = MemoryMap { nr_entries: 32, pad0: 0, buffer: GuestHandle::new(at(&mut entries)) };
    if !is_privileged() {
        return expect_errno(memop(MemoryOp::MachineMemoryMap, &mut map), Errno::EPERM);
    }
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
    check!(query(MemoryOp::CurrentReservation, DomId::SELF)? > 0);
    for command in [8, 29, 40, 63] {
        check_eq!(call(Hypercall::MemoryOp, [command, 0, 0, 0, 0]), Err(Errno::ENOSYS), "command {command}");
    }
    Ok(())
}

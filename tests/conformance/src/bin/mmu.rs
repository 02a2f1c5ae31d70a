//! Page tables: mmu_update, mmuext_op and update_va_mapping.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::{
    NOWHERE, SELF, TablePage, at, call, hypervisor_frame, mmuext, pages, protect, pte, update,
};
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::MmuextCmd;
use guest_sdk::abi::{Errno, Hypercall, MachAddr};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{
    self, Verdict, cases, check, check_eq, expect_errno, expect_vector, probe, try_read, try_write,
};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            update_maps_a_page,
            update_without_present_unmaps,
            update_of_a_plain_page_is_a_store,
            update_reserved_bits,
            update_hypervisor_frame,
            update_page_table_writable,
            update_preserves_accessed_and_dirty,
            update_no_translate,
            update_machphys,
            update_counts_what_is_done,
            update_bad_list,
            update_bad_domain,
            update_large_page,
            update_of_many,
            pin_and_unpin_l1,
            pin_twice,
            pin_writable_page,
            pin_of_each_level,
            pin_garbage,
            pin_bad_frame,
            pin_wrong_level,
            pinned_table_is_checked,
            pinned_l4_gets_hypervisor_slots,
            linear_table_is_read_only,
            hypervisor_slot_of_l4_is_refused,
            new_baseptr_switches,
            new_baseptr_bad_frame,
            new_user_baseptr,
            flush_local,
            flush_all,
            flush_multi,
            invlpg_local,
            invlpg_all,
            invlpg_multi,
            multi_bad_mask,
            flush_cache,
            clear_page,
            copy_page,
            super_pages_are_gone,
            mmuext_unknown,
            mmuext_counts_what_is_done,
            mmuext_bad_domain,
            mmuext_bad_list,
            va_mapping_maps,
            va_mapping_flushes,
            va_mapping_without_table,
            va_mapping_refuses,
            va_mapping_bad_mask,
            va_mapping_otherdomain,
            machphys_is_readable_only,
        ],
    )
}

/// Bits of a mapping.
const RO: u64 = 0x61 | 1 << 63;
const RW: u64 = 0x63 | 1 << 63;
/// Bits of an entry that leads to a table.
const TABLE: u64 = 0x67;

/// One slot of the window, its entry's machine address, and a page with a word to recognise.
fn slot() -> Result<(Range, u64, Page), testkit::Stop> {
    let range = Range::new(1)?;
    let place = memory::leaf_address(range.start()).ok_or("no entry")?;
    let mut page = Page::new()?;
    page.bytes_mut()[..8].copy_from_slice(&MARK.to_le_bytes());
    Ok((range, place, page))
}

const MARK: u64 = 0x1122_3344_5566_7788;

fn update_maps_a_page(_: &mut Domain) -> Verdict {
    let (range, place, page) = slot()?;
    check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(page.mfn().get(), RW)), Ok(0));
    check_eq!(try_read(range.start()), Ok(MARK));
    // SAFETY: a page of this case, read back by its other mapping as volatile.
    unsafe { try_write(range.start() + 8, 5)? };
    check_eq!(try_read(page.address() + 8), Ok(5));
    check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(page.mfn().get(), RO)), Ok(0));
    memory::flush_tlb();
    // SAFETY: as above.
    let refused = unsafe { try_write(range.start() + 8, 6) };
    expect_vector(refused, 14, 3)?;
    check_eq!(testkit::fault_address(), range.start() + 8);
    Ok(())
}

fn update_without_present_unmaps(_: &mut Domain) -> Verdict {
    let (range, place, page) = slot()?;
    check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(page.mfn().get(), RW)), Ok(0));
    check_eq!(try_read(range.start()), Ok(MARK));
    // An entry without the present bit may hold anything.
    let nothing = 0xffff_ffff_ffff_fffe;
    check_eq!(update(MmuCommand::NormalPtUpdate, place, nothing), Ok(0));
    memory::flush_tlb();
    expect_vector(try_read(range.start()), 14, 0)?;
    check_eq!(memory::leaf(range.start()), Some(nothing));
    check_eq!(update(MmuCommand::NormalPtUpdate, place, 0), Ok(0));
    Ok(())
}

fn update_of_a_plain_page_is_a_store(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let place = page.mfn().address().get() + 16;
    check_eq!(update(MmuCommand::NormalPtUpdate, place, u64::MAX), Ok(0));
    check_eq!(try_read(page.address() + 16), Ok(u64::MAX));
    Ok(())
}

fn update_reserved_bits(_: &mut Domain) -> Verdict {
    // In a level-2 entry: write-through, uncached, large, global.
    let l1 = TablePage::new(&[])?;
    let l2 = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL2Table, l2.mfn(), 0), Ok(0));
    for bit in [3, 4, 7, 8] {
        let refused = update(MmuCommand::NormalPtUpdate, l2.place(9), pte(l1.mfn(), TABLE) | 1 << bit);
        check_eq!(refused, Err(Errno::EINVAL), "bit {bit}");
        check_eq!(l2.word(9), 0, "the entry is as it was");
    }
    // Free bits are kept: here those that both leave to guests (Xenolith keeps 53 and 54 for itself).
    let free = 7 << 9 | 0x3f9 << 52;
    check_eq!(update(MmuCommand::NormalPtUpdate, l2.place(9), pte(l1.mfn(), TABLE) | free), Ok(0));
    check_eq!(l2.word(9) & free, free);
    check_eq!(mmuext(MmuextCmd::UnpinTable, l2.mfn(), 0), Ok(0));
    Ok(())
}

fn update_hypervisor_frame(_: &mut Domain) -> Verdict {
    let (range, place, _) = slot()?;
    let frame = hypervisor_frame()?;
    check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(frame, RW)), Err(Errno::EBUSY));
    // Nor is it a place for entries.
    check!(update(MmuCommand::NormalPtUpdate, frame << 12, 0).is_err());
    check_eq!(memory::leaf(range.start()), Some(0));
    Ok(())
}

fn update_page_table_writable(_: &mut Domain) -> Verdict {
    let (range, place, _) = slot()?;
    let table = place >> 12;
    check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(table, RW)), Err(Errno::EBUSY), "writable");
    // Reading it is everybody's right.
    check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(table, RO)), Ok(0));
    check_eq!(try_read(range.start() + place % 4096).map(|entry| entry >> 12 & 0xff_ffff_ffff), Ok(table));
    Ok(())
}

fn update_preserves_accessed_and_dirty(_: &mut Domain) -> Verdict {
    let (range, place, page) = slot()?;
    let clean = pte(page.mfn().get(), RW & !0x60);
    check_eq!(update(MmuCommand::NormalPtUpdate, place, clean), Ok(0));
    // SAFETY: a page of this case.
    unsafe { try_write(range.start() + 8, 1)? };
    check_eq!(memory::leaf(range.start()).map(|entry| entry & 0x60), Some(0x60), "set by the processor");
    check_eq!(update(MmuCommand::PtUpdatePreserveAd, place, clean & !2), Ok(0));
    check_eq!(memory::leaf(range.start()).map(|entry| entry & 0x62), Some(0x60), "kept, writable gone");
    check_eq!(update(MmuCommand::NormalPtUpdate, place, clean & !2), Ok(0));
    check_eq!(memory::leaf(range.start()).map(|entry| entry & 0x62), Some(0), "not kept");
    Ok(())
}

fn update_no_translate(_: &mut Domain) -> Verdict {
    let (range, place, page) = slot()?;
    check_eq!(update(MmuCommand::PtUpdateNoTranslate, place, pte(page.mfn().get(), RO)), Ok(0));
    check_eq!(try_read(range.start()), Ok(MARK));
    let refused = update(MmuCommand::PtUpdateNoTranslate, place, pte(hypervisor_frame()?, RW));
    expect_errno(refused, Errno::EBUSY)
}

fn update_machphys(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let frame = page.mfn();
    let slot = MACH2PHYS_VIRT_START + frame.get() * 8;
    let before = try_read(slot)?;
    check_eq!(update(MmuCommand::MachphysUpdate, frame.address().get(), 0x1234), Ok(0));
    check_eq!(try_read(slot), Ok(0x1234));
    check_eq!(update(MmuCommand::MachphysUpdate, frame.address().get(), before), Ok(0));
    check_eq!(try_read(slot), Ok(before));
    let foreign = hypervisor_frame()?;
    expect_errno(update(MmuCommand::MachphysUpdate, foreign << 12, 0), Errno::EINVAL)
}

fn requests(place: u64, values: &[u64]) -> Vec<MmuUpdate> {
    let request = |(index, &value): (usize, &u64)| {
        MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place + index as u64 * 8), value)
    };
    values.iter().enumerate().map(request).collect()
}

fn update_counts_what_is_done(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let place = page.mfn().address().get();
    let mut done = 77u32;
    let mut list = requests(place, &[1, 2, 3]);
    check_eq!(call(Hypercall::MmuUpdate, [list.as_mut_ptr() as u64, 3, at(&mut done), SELF, 0]), Ok(0));
    check_eq!(done, 3);
    check_eq!((try_read(page.address())?, try_read(page.address() + 16)?), (1, 3));
    let mut list = requests(place, &[4, 5, 6]);
    list[1].ptr = hypervisor_frame()? << 12;
    done = 77;
    let refused = call(Hypercall::MmuUpdate, [list.as_mut_ptr() as u64, 3, at(&mut done), SELF, 0]);
    check!(refused.is_err());
    check_eq!(done, 1, "stopped at the first error");
    check_eq!((try_read(page.address())?, try_read(page.address() + 16)?), (4, 3));
    // None is none.
    done = 77;
    check_eq!(call(Hypercall::MmuUpdate, [list.as_mut_ptr() as u64, 0, at(&mut done), SELF, 0]), Ok(0));
    check_eq!(done, 0);
    Ok(())
}

fn update_bad_list(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::MmuUpdate, [NOWHERE, 1, 0, SELF, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::MmuUpdate, [0xffff_8300_0000_0000, 1, 0, SELF, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn update_bad_domain(_: &mut Domain) -> Verdict {
    let mut list = requests(0, &[0]);
    let nobody = call(Hypercall::MmuUpdate, [list.as_mut_ptr() as u64, 1, 0, 1234, 0]);
    check_eq!(nobody, Err(Errno::ESRCH));
    // The upper half names the owner of the tables.
    let nobody = call(Hypercall::MmuUpdate, [list.as_mut_ptr() as u64, 1, 0, SELF | 1235 << 16, 0]);
    expect_errno(nobody, Errno::ESRCH)
}

fn update_large_page(_: &mut Domain) -> Verdict {
    // A level-2 entry that would map 2 MiB at once.
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL2Table, table.mfn(), 0), Ok(0));
    let refused = update(MmuCommand::NormalPtUpdate, table.place(0), pte(memory::root().get() & !511, 0xe3));
    check_eq!(refused, Err(Errno::EINVAL));
    check_eq!(table.word(0), 0);
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    Ok(())
}

fn update_of_many(_: &mut Domain) -> Verdict {
    // Enough to be preempted; every request must be done exactly once, in order.
    let page = Page::new()?;
    let place = page.mfn().address().get();
    let mut list: Vec<MmuUpdate> = (0..40_000u64)
        .map(|n| MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place + n % 512 * 8), n))
        .collect();
    let mut done = 0u32;
    check_eq!(call(Hypercall::MmuUpdate, [list.as_mut_ptr() as u64, 40_000, at(&mut done), SELF, 0]), Ok(0));
    check_eq!(done, 40_000);
    for index in 0..512 {
        let last = (39_999 - index) / 512 * 512 + index;
        check_eq!(try_read(page.address() + index * 8), Ok(last), "word {index}");
    }
    Ok(())
}

fn pin_and_unpin_l1(_: &mut Domain) -> Verdict {
    let shown = Page::new()?;
    let mut page = Page::new()?;
    page.bytes_mut()[..8].copy_from_slice(&pte(shown.mfn().get(), RW).to_le_bytes());
    protect(&page, false)?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, page.mfn().get(), 0), Ok(0));
    check_eq!(protect(&page, true), Err(Errno::EBUSY), "a pinned table is not writable");
    check_eq!(mmuext(MmuextCmd::UnpinTable, page.mfn().get(), 0), Ok(0));
    check_eq!(protect(&page, true), Ok(()));
    page.bytes_mut()[8] = 1;
    // While it was a table it held a reference; now the page it maps may be a table itself.
    protect(&shown, false)?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, shown.mfn().get(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, shown.mfn().get(), 0), Ok(0));
    protect(&shown, true)?;
    Ok(())
}

fn pin_twice(_: &mut Domain) -> Verdict {
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Err(Errno::EINVAL), "not pinned yet");
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Err(Errno::EINVAL), "twice");
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Err(Errno::EINVAL), "twice");
    Ok(())
}

fn pin_writable_page(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    for command in
        [MmuextCmd::PinL1Table, MmuextCmd::PinL2Table, MmuextCmd::PinL3Table, MmuextCmd::PinL4Table]
    {
        check_eq!(mmuext(command, page.mfn().get(), 0), Err(Errno::EINVAL), "{command:?}");
    }
    Ok(())
}

fn pin_of_each_level(_: &mut Domain) -> Verdict {
    let shown = Page::new()?;
    let l1 = TablePage::new(&[(3, pte(shown.mfn().get(), RW))])?;
    let l2 = TablePage::new(&[(3, pte(l1.mfn(), TABLE))])?;
    let l3 = TablePage::new(&[(3, pte(l2.mfn(), TABLE))])?;
    let l4 = TablePage::new(&[(3, pte(l3.mfn(), TABLE))])?;
    check_eq!(mmuext(MmuextCmd::PinL4Table, l4.mfn(), 0), Ok(0));
    // All below it became tables of their level, and each may be pinned by itself as that and nothing else.
    for (table, right, wrong) in [
        (&l3, MmuextCmd::PinL3Table, MmuextCmd::PinL4Table),
        (&l2, MmuextCmd::PinL2Table, MmuextCmd::PinL1Table),
        (&l1, MmuextCmd::PinL1Table, MmuextCmd::PinL3Table),
    ] {
        check_eq!(mmuext(wrong, table.mfn(), 0), Err(Errno::EINVAL), "{wrong:?}");
        check_eq!(mmuext(right, table.mfn(), 0), Ok(0), "{right:?}");
        check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    }
    check_eq!(mmuext(MmuextCmd::UnpinTable, l4.mfn(), 0), Ok(0));
    // And ordinary pages again.
    check_eq!(mmuext(MmuextCmd::PinL2Table, l1.mfn(), 0), Err(Errno::EINVAL), "its entry leads to no table");
    Ok(())
}

fn pin_garbage(_: &mut Domain) -> Verdict {
    let frame = hypervisor_frame()?;
    for words in [[(0, pte(frame, RW))], [(511, pte(frame, RW))]] {
        let table = TablePage::new(&words)?;
        check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Err(Errno::EBUSY));
        check_eq!(mmuext(MmuextCmd::PinL2Table, table.mfn(), 0), Err(Errno::EINVAL));
    }
    // A good entry before the bad one: what was taken for it is given back.
    let shown = Page::new()?;
    let table = TablePage::new(&[(0, pte(shown.mfn().get(), RW)), (1, pte(frame, RW))])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Err(Errno::EBUSY));
    protect(&shown, false)?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, shown.mfn().get(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, shown.mfn().get(), 0), Ok(0));
    protect(&shown, true)?;
    Ok(())
}

fn pin_bad_frame(_: &mut Domain) -> Verdict {
    for frame in [hypervisor_frame()?, 0xff_ffff_ffff, u64::MAX] {
        check_eq!(mmuext(MmuextCmd::PinL1Table, frame, 0), Err(Errno::EINVAL), "frame {frame:#x}");
        check_eq!(mmuext(MmuextCmd::UnpinTable, frame, 0), Err(Errno::EINVAL), "frame {frame:#x}");
    }
    Ok(())
}

fn pin_wrong_level(_: &mut Domain) -> Verdict {
    // The live root is a level-4 table.
    check_eq!(mmuext(MmuextCmd::PinL1Table, memory::root().get(), 0), Err(Errno::EINVAL));
    check_eq!(mmuext(MmuextCmd::PinL3Table, memory::root().get(), 0), Err(Errno::EINVAL));
    Ok(())
}

fn pinned_table_is_checked(_: &mut Domain) -> Verdict {
    let l1 = TablePage::new(&[])?;
    let l2 = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL2Table, l2.mfn(), 0), Ok(0));
    check_eq!(update(MmuCommand::NormalPtUpdate, l2.place(7), pte(l1.mfn(), TABLE)), Ok(0));
    check_eq!(l2.word(7) >> 12 & 0xff_ffff_ffff, l1.mfn());
    // Now it is a level-1 table: no level-2 entry may lead to it from another level.
    let l3 = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL3Table, l3.mfn(), 0), Ok(0));
    check_eq!(update(MmuCommand::NormalPtUpdate, l3.place(0), pte(l1.mfn(), TABLE)), Err(Errno::EINVAL));
    check_eq!(update(MmuCommand::NormalPtUpdate, l3.place(0), pte(l2.mfn(), TABLE)), Ok(0));
    // A table that is entered elsewhere stays one when it is no longer pinned.
    check_eq!(mmuext(MmuextCmd::UnpinTable, l2.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::PinL1Table, l2.mfn(), 0), Err(Errno::EINVAL));
    check_eq!(mmuext(MmuextCmd::UnpinTable, l3.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::PinL1Table, l1.mfn(), 0), Ok(0), "nothing refers to it any more");
    check_eq!(mmuext(MmuextCmd::UnpinTable, l1.mfn(), 0), Ok(0));
    Ok(())
}

fn pinned_l4_gets_hypervisor_slots(_: &mut Domain) -> Verdict {
    // What the guest had there does not count.
    let l4 = TablePage::new(&[(256, 0x1234_5667), (271, u64::MAX)])?;
    check_eq!(mmuext(MmuextCmd::PinL4Table, l4.mfn(), 0), Ok(0));
    check!(l4.word(256) != 0x1234_5667 && l4.word(271) != u64::MAX);
    check!((256..272).any(|slot| l4.word(slot) & 1 == 1), "nothing of the hypervisor is there");
    check!((0..256).chain(272..512).all(|slot| l4.word(slot) == 0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, l4.mfn(), 0), Ok(0));
    Ok(())
}

fn linear_table_is_read_only(_: &mut Domain) -> Verdict {
    let l4 = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL4Table, l4.mfn(), 0), Ok(0));
    check_eq!(update(MmuCommand::NormalPtUpdate, l4.place(5), pte(l4.mfn(), TABLE)), Err(Errno::EINVAL));
    check_eq!(update(MmuCommand::NormalPtUpdate, l4.place(5), pte(l4.mfn(), TABLE & !2)), Ok(0));
    check_eq!(l4.word(5) >> 12 & 0xff_ffff_ffff, l4.mfn());
    check_eq!(update(MmuCommand::NormalPtUpdate, l4.place(5), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, l4.mfn(), 0), Ok(0));
    Ok(())
}

fn hypervisor_slot_of_l4_is_refused(_: &mut Domain) -> Verdict {
    let l4 = TablePage::new(&[])?;
    let l3 = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL4Table, l4.mfn(), 0), Ok(0));
    for slot in [256, 258, 271] {
        let before = l4.word(slot);
        check_eq!(
            update(MmuCommand::NormalPtUpdate, l4.place(slot), pte(l3.mfn(), TABLE)),
            Err(Errno::EINVAL),
            "slot {slot}"
        );
        check_eq!(update(MmuCommand::NormalPtUpdate, l4.place(slot), 0), Err(Errno::EINVAL), "slot {slot}");
        check_eq!(l4.word(slot), before);
    }
    check_eq!(update(MmuCommand::NormalPtUpdate, l4.place(272), pte(l3.mfn(), TABLE)), Ok(0), "slot 272");
    check_eq!(mmuext(MmuextCmd::UnpinTable, l4.mfn(), 0), Ok(0));
    Ok(())
}

fn cr3() -> Result<u64, testkit::Stop> {
    let value: u64;
    probe!("mov rax, cr3", "mov {value}, rax"; value = out(reg) value)?;
    Ok(value)
}

fn new_baseptr_switches(_: &mut Domain) -> Verdict {
    let old = memory::root();
    check_eq!(cr3()?, old.address().get());
    let range = Range::new(1)?;
    // SAFETY: the root, for reading.
    unsafe { range.map(0, old, Access::Read)? };
    let words: Vec<(usize, u64)> = (0..512)
        .map(|slot| Ok((slot, try_read(range.start() + slot as u64 * 8)?)))
        .collect::<Result<_, testkit::Stop>>()?;
    let copy = TablePage::new(&words)?;
    let page = Page::new()?;
    check_eq!(mmuext(MmuextCmd::PinL4Table, copy.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::NewBaseptr, copy.mfn(), 0), Ok(0));
    let now = cr3()?;
    // In use, it stays a table without the pin, and a page under its mappings is seen through it.
    let unpinned = mmuext(MmuextCmd::UnpinTable, copy.mfn(), 0);
    let still = mmuext(MmuextCmd::PinL1Table, copy.mfn(), 0);
    let seen = try_read(page.address());
    let back = mmuext(MmuextCmd::NewBaseptr, old.get(), 0);
    check_eq!(back, Ok(0));
    check_eq!(now, copy.mfn() << 12, "cr3");
    check_eq!((unpinned, still, seen), (Ok(0), Err(Errno::EINVAL), Ok(0)));
    check_eq!(cr3()?, old.address().get());
    Ok(())
}

fn new_baseptr_bad_frame(_: &mut Domain) -> Verdict {
    let plain = Page::new()?;
    for frame in [plain.mfn().get(), hypervisor_frame()?, u64::MAX] {
        check_eq!(mmuext(MmuextCmd::NewBaseptr, frame, 0), Err(Errno::EINVAL), "frame {frame:#x}");
    }
    check_eq!(cr3()?, memory::root().address().get());
    Ok(())
}

fn new_user_baseptr(_: &mut Domain) -> Verdict {
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::NewUserBaseptr, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Err(Errno::EINVAL), "it is a level-4 table");
    check_eq!(mmuext(MmuextCmd::NewUserBaseptr, 0, 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::PinL4Table, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    let plain = Page::new()?;
    for frame in [plain.mfn().get(), hypervisor_frame()?, u64::MAX] {
        check_eq!(mmuext(MmuextCmd::NewUserBaseptr, frame, 0), Err(Errno::EINVAL), "frame {frame:#x}");
    }
    Ok(())
}

/// Maps one page, reads it so that the translation is cached, maps another, flushes, and must see that one.
fn flushing(flush: impl Fn(u64) -> Result<u64, Errno>) -> Verdict {
    let (range, place, first) = slot()?;
    let mut second = Page::new()?;
    second.bytes_mut()[..8].copy_from_slice(&99u64.to_le_bytes());
    for round in 0..3 {
        check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(first.mfn().get(), RO)), Ok(0));
        check_eq!(flush(range.start()), Ok(0), "round {round}");
        check_eq!(try_read(range.start()), Ok(MARK), "round {round}");
        check_eq!(update(MmuCommand::NormalPtUpdate, place, pte(second.mfn().get(), RO)), Ok(0));
        check_eq!(flush(range.start()), Ok(0), "round {round}");
        check_eq!(try_read(range.start()), Ok(99), "round {round}");
        check_eq!(update(MmuCommand::NormalPtUpdate, place, 0), Ok(0));
        check_eq!(flush(range.start()), Ok(0), "round {round}");
        expect_vector(try_read(range.start()), 14, 0)?;
    }
    Ok(())
}

fn flush_local(_: &mut Domain) -> Verdict {
    flushing(|_| mmuext(MmuextCmd::TlbFlushLocal, 0, 0))
}

fn flush_all(_: &mut Domain) -> Verdict {
    flushing(|_| mmuext(MmuextCmd::TlbFlushAll, 0, 0))
}

fn flush_multi(_: &mut Domain) -> Verdict {
    flushing(|_| {
        let mut mask = 1u64;
        mmuext(MmuextCmd::TlbFlushMulti, 0, at(&mut mask))
    })
}

fn invlpg_local(_: &mut Domain) -> Verdict {
    flushing(|address| mmuext(MmuextCmd::InvlpgLocal, address, 0))
}

fn invlpg_all(_: &mut Domain) -> Verdict {
    flushing(|address| mmuext(MmuextCmd::InvlpgAll, address, 0))
}

fn invlpg_multi(_: &mut Domain) -> Verdict {
    flushing(|address| {
        let mut mask = 1u64;
        mmuext(MmuextCmd::InvlpgMulti, address, at(&mut mask))
    })
}

fn multi_bad_mask(_: &mut Domain) -> Verdict {
    check_eq!(mmuext(MmuextCmd::TlbFlushMulti, 0, NOWHERE), Err(Errno::EINVAL));
    check_eq!(mmuext(MmuextCmd::InvlpgMulti, 0x1000, NOWHERE), Err(Errno::EINVAL));
    Ok(())
}

fn flush_cache(_: &mut Domain) -> Verdict {
    // Only for who has device memory: others' caches are coherent.
    let wanted = conformance::by_privilege(Ok(0), Err(Errno::EACCES));
    check_eq!(mmuext(MmuextCmd::FlushCache, 0, 0), wanted);
    let wanted = conformance::by_privilege(Ok(0), Err(Errno::EINVAL));
    check_eq!(mmuext(MmuextCmd::FlushCacheGlobal, 0, 0), wanted);
    Ok(())
}

fn clear_page(_: &mut Domain) -> Verdict {
    let mut page = Page::new()?;
    page.bytes_mut().fill(0xa5);
    check_eq!(mmuext(MmuextCmd::ClearPage, page.mfn().get(), 0), Ok(0));
    for offset in (0..4096).step_by(8) {
        check_eq!(try_read(page.address() + offset), Ok(0), "word at {offset}");
    }
    // A table is not to be cleared so.
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::ClearPage, table.mfn(), 0), Err(Errno::EINVAL));
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    expect_errno(mmuext(MmuextCmd::ClearPage, hypervisor_frame()?, 0), Errno::EINVAL)
}

fn copy_page(_: &mut Domain) -> Verdict {
    let mut list = pages(2)?;
    for (index, byte) in list[0].bytes_mut().iter_mut().enumerate() {
        *byte = (index % 251) as u8;
    }
    let [from, to] = [list[0].mfn().get(), list[1].mfn().get()];
    check_eq!(mmuext(MmuextCmd::CopyPage, to, from), Ok(0));
    for offset in (0..4096).step_by(8) {
        check_eq!(
            try_read(list[1].address() + offset),
            try_read(list[0].address() + offset),
            "word at {offset}"
        );
    }
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::CopyPage, table.mfn(), from), Err(Errno::EINVAL), "a table as destination");
    check_eq!(mmuext(MmuextCmd::CopyPage, to, table.mfn()), Ok(0), "a table as source");
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::CopyPage, to, hypervisor_frame()?), Err(Errno::EINVAL));
    expect_errno(mmuext(MmuextCmd::CopyPage, hypervisor_frame()?, from), Errno::EINVAL)
}

fn super_pages_are_gone(_: &mut Domain) -> Verdict {
    check_eq!(mmuext(MmuextCmd::MarkSuper, 0, 0), Err(Errno::EOPNOTSUPP));
    expect_errno(mmuext(MmuextCmd::UnmarkSuper, 0, 0), Errno::EOPNOTSUPP)
}

fn mmuext_unknown(_: &mut Domain) -> Verdict {
    check_eq!(mmuext(MmuextCmd::TlbFlushLocal, 0, 0), Ok(0));
    for command in [14, 21, 1000, u32::MAX] {
        let mut operation = MmuextOp { cmd: command, ..MmuextOp::default() };
        let answer = call(Hypercall::MmuextOp, [at(&mut operation), 1, 0, SELF, 0]);
        check_eq!(answer, Err(Errno::ENOSYS), "command {command}");
    }
    Ok(())
}

fn mmuext_counts_what_is_done(_: &mut Domain) -> Verdict {
    let mut done = 77u32;
    let flush = MmuextOp::new(MmuextCmd::TlbFlushLocal, 0, 0);
    let mut list = [flush, flush, MmuextOp::new(MmuextCmd::MarkSuper, 0, 0), flush];
    check_eq!(call(Hypercall::MmuextOp, [list.as_mut_ptr() as u64, 2, at(&mut done), SELF, 0]), Ok(0));
    check_eq!(done, 2);
    let stopped = call(Hypercall::MmuextOp, [list.as_mut_ptr() as u64, 4, at(&mut done), SELF, 0]);
    check_eq!(stopped, Err(Errno::EOPNOTSUPP));
    check_eq!(done, 2);
    Ok(())
}

fn mmuext_bad_domain(_: &mut Domain) -> Verdict {
    let mut flush = MmuextOp::new(MmuextCmd::TlbFlushLocal, 0, 0);
    expect_errno(call(Hypercall::MmuextOp, [at(&mut flush), 1, 0, 1234, 0]), Errno::ESRCH)
}

fn mmuext_bad_list(_: &mut Domain) -> Verdict {
    expect_errno(call(Hypercall::MmuextOp, [NOWHERE, 1, 0, SELF, 0]), Errno::EFAULT)
}

fn va_mapping(address: u64, entry: u64, flags: u64) -> Result<u64, Errno> {
    call(Hypercall::UpdateVaMapping, [address, entry, flags, 0, 0])
}

fn va_mapping_maps(_: &mut Domain) -> Verdict {
    let (range, _, page) = slot()?;
    check_eq!(va_mapping(range.start(), pte(page.mfn().get(), RO), 2), Ok(0));
    check_eq!(try_read(range.start()), Ok(MARK));
    check_eq!(va_mapping(range.start(), 0, 2), Ok(0));
    expect_vector(try_read(range.start()), 14, 0)
}

fn va_mapping_flushes(_: &mut Domain) -> Verdict {
    let (range, _, first) = slot()?;
    let second = Page::new()?;
    let mut mask = 1u64;
    // Flush everything or the one address; here, everywhere, or on the vCPUs of a mask.
    for flags in [1, 2, 1 | 4, 2 | 4, 1 | at(&mut mask), 2 | at(&mut mask)] {
        check_eq!(va_mapping(range.start(), pte(first.mfn().get(), RO), flags), Ok(0), "flags {flags:#x}");
        check_eq!(try_read(range.start()), Ok(MARK), "flags {flags:#x}");
        check_eq!(va_mapping(range.start(), pte(second.mfn().get(), RO), flags), Ok(0), "flags {flags:#x}");
        check_eq!(try_read(range.start()), Ok(0), "flags {flags:#x}");
    }
    check_eq!(mask, 1);
    Ok(())
}

fn va_mapping_without_table(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    for address in [NOWHERE, 0xffff_8000_0000_0000, 0xffff_8300_0000_0000, 1 << 47] {
        check_eq!(va_mapping(address, pte(page.mfn().get(), RO), 2), Err(Errno::EINVAL), "{address:#x}");
    }
    Ok(())
}

fn va_mapping_refuses(_: &mut Domain) -> Verdict {
    let (range, place, page) = slot()?;
    drop(page);
    for frame in [hypervisor_frame()?, place >> 12, memory::root().get()] {
        check_eq!(va_mapping(range.start(), pte(frame, RW), 2), Err(Errno::EBUSY), "frame {frame:#x}");
        check_eq!(memory::leaf(range.start()), Some(0));
    }
    Ok(())
}

fn va_mapping_bad_mask(_: &mut Domain) -> Verdict {
    let (range, _, page) = slot()?;
    let answer = va_mapping(range.start(), pte(page.mfn().get(), RO), 1 | NOWHERE);
    expect_errno(answer, Errno::EFAULT)
}

fn va_mapping_otherdomain(_: &mut Domain) -> Verdict {
    let (range, _, page) = slot()?;
    let other = |domain: u64, entry: u64| {
        call(Hypercall::UpdateVaMappingOtherdomain, [range.start(), entry, 2, domain, 0])
    };
    check_eq!(other(1234, pte(page.mfn().get(), RO)), Err(Errno::ESRCH));
    check_eq!(memory::leaf(range.start()), Some(0));
    check_eq!(other(SELF, pte(page.mfn().get(), RO)), Ok(0));
    check_eq!(try_read(range.start()), Ok(MARK));
    Ok(())
}

fn machphys_is_readable_only(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let slot = MACH2PHYS_VIRT_START + page.mfn().get() * 8;
    let pfn = memory::mfn_to_pfn(page.mfn()).ok_or("not in the table")?;
    check_eq!(try_read(slot), Ok(pfn.get()));
    // SAFETY: nothing can be written there.
    let refused = unsafe { try_write(slot, 0) };
    expect_vector(refused, 14, 3)?;
    check_eq!(try_read(slot), Ok(pfn.get()));
    // The hypervisor's own memory cannot even be read.
    for address in [0xffff_82d0_4000_0000u64, 0xffff_8300_0000_0000, 0xffff_87ff_ffff_f000] {
        let exception = testkit::expect_exception(try_read(address))?;
        check_eq!((exception.vector, exception.error & !1), (14, 0), "{address:#x}");
    }
    Ok(())
}

//! Counts of none, of more than there can be, and of so many that their size is no number; for every call that takes a count.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;

use conformance::counts::{Count, run};
use conformance::handles::Answer;
use conformance::state::{self, number, reservation};
use conformance::{
    NOWHERE, SELF, TablePage, at, call, evtchn, grant, is_privileged, memop, physdev, sched, take_pending,
};
use guest_sdk::abi::evtchn::{EvtchnBindIpi, EvtchnClose};
use guest_sdk::abi::grant::*;
use guest_sdk::abi::memory::*;
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp, MulticallEntry};
use guest_sdk::abi::physdev::PhysdevSetIobitmap;
use guest_sdk::abi::sched::SchedPoll;
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::{EvtchnOp, GnttabOp, MemoryOp, MmuextCmd, PhysdevOp, SchedOp};
use guest_sdk::abi::{DomId, Errno, GuestHandle, Hypercall, MachAddr, Port};
use guest_sdk::memory::{Access, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, probe, try_read};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};
use zerocopy::{FromZeros, IntoBytes};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            mmu_update_counts,
            mmuext_op_counts,
            multicall_counts,
            grant_table_op_counts,
            grant_frames_counts,
            memory_op_counts,
            exchange_counts,
            memory_lists_counts,
            console_io_counts,
            poll_counts,
            descriptor_counts,
            iobitmap_counts,
            dm_op_counts,
        ],
    )
}

/// Where the hypervisor begins.
const HYPERVISOR: u64 = 0xffff_8000_0000_0000;
/// All counts below have 32 bits: these are no bits of them.
const ABOVE: u64 = 1 << 32;
const FAULT: Answer = Err(Errno::EFAULT);
const INVALID: Answer = Err(Errno::EINVAL);

/// Bytes that end with their page, and nothing behind it.
struct AtTheEnd {
    page: Page,
    range: Range,
    length: u64,
}

impl AtTheEnd {
    fn new(content: &[u8]) -> Result<AtTheEnd, Stop> {
        let end = AtTheEnd { page: Page::new()?, range: Range::new(2)?, length: content.len() as u64 };
        // SAFETY: the page is accessed by raw pointers only.
        unsafe { end.range.map(0, end.page.mfn(), Access::ReadWrite)? };
        for (index, byte) in (0..).zip(content) {
            // SAFETY: inside the page.
            unsafe { ((end.address() + index) as *mut u8).write_volatile(*byte) };
        }
        Ok(end)
    }

    fn address(&self) -> u64 {
        self.range.start() + 4096 - self.length
    }

    fn word(&self, index: u64) -> u64 {
        try_read(self.address() + index * 8).expect("inside the page")
    }
}

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        self.range.unmap(0).expect("an own page can be unmapped");
    }
}

fn m2p(frame: u64) -> u64 {
    try_read(MACH2PHYS_VIRT_START + frame * 8).expect("an entry for a frame of this domain")
}

fn mmu_update_counts(_: &mut Domain) -> Verdict {
    const OTHER: u64 = 0x1234;
    let page = Page::new()?;
    let frame = page.mfn().get();
    let request = |value| MmuUpdate::new(MmuCommand::MachphysUpdate, MachAddr::new(frame << 12), value);
    let list = AtTheEnd::new(request(OTHER).as_bytes())?;
    let calls = |list: u64| move |count| call(Hypercall::MmuUpdate, [list, count, 0, SELF, 0]);
    let state = || vec![m2p(frame)];
    let undo = |before: &[u64]| {
        let mut request = request(before[0]);
        assert_eq!(call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0]), Ok(0));
    };
    list_counts(&calls(list.address()), &calls(NOWHERE), &calls(HYPERVISOR), &state, &undo)?;
    preempted_by_the_guest(Hypercall::MmuUpdate, list.address(), &state, &undo)
}

fn mmuext_op_counts(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    // SAFETY: the page's first word, by raw pointers only.
    let first = || unsafe { (page.address() as *const u64).read_volatile() };
    // SAFETY: as above.
    let fill = || unsafe { (page.address() as *mut u64).write_volatile(0x5a5a) };
    fill();
    let list = AtTheEnd::new(MmuextOp::new(MmuextCmd::ClearPage, page.mfn().get(), 0).as_bytes())?;
    let calls = |list: u64| move |count| call(Hypercall::MmuextOp, [list, count, 0, SELF, 0]);
    let (state, undo) = (|| vec![first()], |_: &[u64]| fill());
    list_counts(&calls(list.address()), &calls(NOWHERE), &calls(HYPERVISOR), &state, &undo)?;
    preempted_by_the_guest(Hypercall::MmuextOp, list.address(), &state, &undo)
}

/// Counts of a list with one element at the end of its page, of one nowhere, and of one in the hypervisor. Bit 31 is the
/// hypervisor's own sign that it goes on with a list; the rest of the count is what it is.
fn list_counts(
    list: &dyn Fn(u64) -> Answer,
    nowhere: &dyn Fn(u64) -> Answer,
    hypervisor: &dyn Fn(u64) -> Answer,
    state: &dyn Fn() -> Vec<u64>,
    undo: &dyn Fn(&[u64]),
) -> Verdict {
    run(&[
        Count::new("a list", list)
            .state(state, undo)
            .refused(&[0, 1 << 31, ABOVE, 1 << 63, ABOVE | 1 << 31], Ok(0))
            .works(&[1, ABOVE | 1, 1 << 31 | 1], Ok(0))
            // As far as it can be read.
            .works(&[2, 0x7fff_ffff, 0xffff_ffff, u64::MAX], FAULT),
        Count::new("a list nowhere", nowhere)
            .state(state, undo)
            .refused(&[0, 1 << 31, ABOVE], Ok(0))
            .refused(&[1, 2, 0x7fff_ffff, 0xffff_ffff, u64::MAX], FAULT),
        // Refused before anybody looks how long it is.
        Count::new("a list in the hypervisor", hypervisor)
            .state(state, undo)
            .refused(&[0, 1, 1 << 31, ABOVE, 0x7fff_ffff, 0xffff_ffff, u64::MAX], FAULT),
    ])
}

/// A guest that says what only the hypervisor says: that the list was worked on before.
fn preempted_by_the_guest(
    which: Hypercall,
    list: u64,
    state: &dyn Fn() -> Vec<u64>,
    undo: &dyn Fn(&[u64]),
) -> Verdict {
    const PREEMPTED: u64 = 1 << 31;
    let before = state();
    // No list, and the sign: the result of a call that is over, which is the last argument.
    for (domid, answer) in [
        (SELF, Ok(SELF)),
        (0, Ok(0)),
        (0x1234_5678, Ok(0x1234_5678)),
        (0xffff_ffea, INVALID),
        (0xffff_fff2, FAULT),
    ] {
        check_eq!(call(which, [0, PREEMPTED, 0, domid, 0]), answer, "{:#x}", domid);
    }
    check_eq!(state(), before);
    // What was done counts on from what the guest says.
    for (count, said, told) in
        [(1, 7, 1), (PREEMPTED | 1, 7, 8), (PREEMPTED | 1, u32::MAX, 0), (PREEMPTED, 7, 7)]
    {
        let mut done: u32 = said;
        check_eq!(call(which, [list, count, at(&mut done), SELF, 0]), Ok(0));
        check_eq!(done, told, "done of {:#x}", count);
        check_eq!(state() != before, count & 1 != 0, "{:#x}", count);
        undo(&before);
    }
    let mut done = 5_u32;
    check_eq!(call(which, [list, 2, at(&mut done), SELF, 0]), FAULT);
    check_eq!(done, 1, "up to the end of the page");
    undo(&before);
    Ok(())
}

fn ipi() -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

fn multicall_counts(_: &mut Domain) -> Verdict {
    let own = ipi()?;
    let mut port = own.get();
    let args = [EvtchnOp::Send.number().into(), at(&mut port), 0, 0, 0, 0];
    let entry = MulticallEntry { op: Hypercall::EventChannelOp.number(), result: u64::MAX, args };
    let list = AtTheEnd::new(entry.as_bytes())?;
    let calls = |list: u64| move |count| call(Hypercall::Multicall, [list, count, 0, 0, 0]);
    let state = || vec![u64::from(conformance::pending(own))];
    let undo = |_: &[u64]| {
        take_pending(own);
    };
    let verdict = run(&[
        Count::new("a list", calls(list.address()))
            .state(state, undo)
            .refused(&[0, ABOVE, 1 << 63], Ok(0))
            .works(&[1, ABOVE | 1], Ok(0))
            .works(&[2, 1 << 31, 0xffff_ffff, u64::MAX], FAULT),
        Count::new("a list nowhere", calls(NOWHERE))
            .refused(&[0, ABOVE], Ok(0))
            .refused(&[1, u64::MAX], FAULT),
        Count::new("a list in the hypervisor", calls(HYPERVISOR)).refused(&[0, 1, ABOVE, u64::MAX], FAULT),
    ]);
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port: own })?;
    verdict
}

// ---- Grants.

/// Elements that the command refuses in their status, or for which there is nothing to do, and the size of one.
const LISTS: [(&str, GnttabOp, u64); 6] = [
    ("map_grant_ref", GnttabOp::MapGrantRef, size_of::<GnttabMapGrantRef>() as u64),
    ("unmap_grant_ref", GnttabOp::UnmapGrantRef, size_of::<GnttabUnmapGrantRef>() as u64),
    ("unmap_and_replace", GnttabOp::UnmapAndReplace, size_of::<GnttabUnmapAndReplace>() as u64),
    ("transfer", GnttabOp::Transfer, size_of::<GnttabTransfer>() as u64),
    ("swap_grant_ref", GnttabOp::SwapGrantRef, size_of::<GnttabSwapGrantRef>() as u64),
    ("cache_flush", GnttabOp::CacheFlush, size_of::<GnttabCacheFlush>() as u64),
];

fn grant_table_op_counts(_: &mut Domain) -> Verdict {
    let grants = |command: GnttabOp, list: u64| {
        move |count| call(Hypercall::GrantTableOp, [command.number().into(), list, count, 0, 0])
    };
    let (from, to) = (Page::new()?, Page::new()?);
    // SAFETY: an own page, by raw pointers only.
    unsafe { (from.address() as *mut u64).write_volatile(0x77) };
    let copy = GnttabCopy {
        source: GnttabCopyPtr::own(from.mfn(), 0),
        dest: GnttabCopyPtr::own(to.mfn(), 0),
        len: 8,
        ..FromZeros::new_zeroed()
    };
    let list = AtTheEnd::new(copy.as_bytes())?;
    // SAFETY: an own page, by raw pointers only.
    let state = || vec![unsafe { (to.address() as *const u64).read_volatile() }];
    // SAFETY: as above.
    let undo = |_: &[u64]| unsafe { (to.address() as *mut u64).write_volatile(0) };
    let copies = |list| grants(GnttabOp::Copy, list);
    run(&[
        Count::new("copy", copies(list.address()))
            .state(state, undo)
            .refused(&[0, ABOVE, 1 << 63], Ok(0))
            .works(&[1, ABOVE | 1], Ok(0))
            .works(&[2, 0x7fff_ffff], FAULT)
            .refused(&[1 << 31, 0xffff_ffff, u64::MAX], INVALID),
        Count::new("copy nowhere", copies(NOWHERE))
            .refused(&[0, ABOVE], Ok(0))
            .refused(&[1, 0x7fff_ffff], FAULT)
            .refused(&[1 << 31, u64::MAX], INVALID),
        Count::new("copy in the hypervisor", copies(HYPERVISOR))
            .refused(&[0, 1, 0x7fff_ffff], FAULT)
            .refused(&[1 << 31], INVALID),
    ])?;
    for (what, command, size) in LISTS {
        // What the command finds in 0xff bytes is nothing of this domain.
        let list = AtTheEnd::new(&vec![0xff; size as usize])?;
        let one = if command == GnttabOp::CacheFlush { INVALID } else { Ok(0) };
        let two = if command == GnttabOp::CacheFlush { INVALID } else { FAULT };
        run(&[
            Count::new(what, grants(command, list.address()))
                .refused(&[0, ABOVE], Ok(0))
                .refused(&[1, ABOVE | 1], one)
                .refused(&[2, 0x7fff_ffff], two)
                .refused(&[1 << 31, 0xffff_ffff], INVALID),
            Count::new(what, grants(command, NOWHERE)).refused(&[0], Ok(0)).refused(&[1, 0x7fff_ffff], FAULT),
            Count::new(what, grants(command, HYPERVISOR)).refused(&[0, 1], FAULT),
        ])?;
    }
    // Operations that are no list.
    let mut size = GnttabQuerySize { dom: DomId::SELF, status: 77, ..FromZeros::new_zeroed() };
    let mut setup = GnttabSetupTable { dom: DomId::SELF, ..FromZeros::new_zeroed() };
    let mut status = GnttabGetStatusFrames { dom: DomId::SELF, ..FromZeros::new_zeroed() };
    let mut version = GnttabGetVersion { dom: DomId::SELF, ..FromZeros::new_zeroed() };
    let singles = [
        ("query_size", GnttabOp::QuerySize, at(&mut size)),
        ("setup_table", GnttabOp::SetupTable, at(&mut setup)),
        ("get_status_frames", GnttabOp::GetStatusFrames, at(&mut status)),
    ];
    for (what, command, address) in singles {
        run(&[
            Count::new(what, grants(command, address))
                .refused(&[1, ABOVE | 1], Ok(0))
                .refused(&[0, 2, ABOVE, 0x7fff_ffff, 1 << 31, u64::MAX], INVALID),
            Count::new(what, grants(command, HYPERVISOR)).refused(&[1], FAULT).refused(&[0, 2], INVALID),
        ])?;
    }
    run(&[
        Count::new("get_version", grants(GnttabOp::GetVersion, at(&mut version)))
            .refused(&[0, 1, 2, 0x7fff_ffff], Ok(0))
            .refused(&[1 << 31, 0xffff_ffff], INVALID),
        // The larger count is refused before the command is looked at.
        Count::new("no command", |count| call(Hypercall::GrantTableOp, [77, 0, count, 0, 0]))
            .refused(&[0, 1, 0x7fff_ffff], Err(Errno::ENOSYS))
            .refused(&[1 << 31], INVALID),
    ])
}

/// Numbers of frames inside an operation; what is wrong is said in its status.
fn grant_frames_counts(_: &mut Domain) -> Verdict {
    let list = AtTheEnd::new(&[0; 8])?;
    let setup = |nr_frames: u64| {
        let mut operation = GnttabSetupTable {
            dom: DomId::SELF,
            nr_frames: nr_frames as u32,
            status: 77,
            frame_list: GuestHandle::new(list.address()),
            ..FromZeros::new_zeroed()
        };
        grant(GnttabOp::SetupTable, &mut operation).map(|_| operation.status as u64)
    };
    let status = |nr_frames: u64| {
        let mut operation = GnttabGetStatusFrames {
            dom: DomId::SELF,
            nr_frames: nr_frames as u32,
            status: 77,
            frame_list: GuestHandle::new(list.address()),
        };
        grant(GnttabOp::GetStatusFrames, &mut operation).map(|_| operation.status as u64)
    };
    // SAFETY: the list's word, by raw pointers only.
    let clear = |_: &[u64]| unsafe { (list.address() as *mut u64).write_volatile(0) };
    run(&[
        Count::new("setup_table", setup)
            .state(|| vec![list.word(0)], clear)
            .refused(&[0], Ok(0))
            .works(&[1], Ok(0))
            .refused(&[0x7fff_ffff, 0x8000_0000, 0xffff_ffff], Ok(GNTST_GENERAL_ERROR as u64)),
        // In version 1 there are none.
        Count::new("get_status_frames", status)
            .state(|| vec![list.word(0)], clear)
            .refused(&[0], Ok(0))
            .refused(&[1, 0x7fff_ffff, 0xffff_ffff], Ok(GNTST_GENERAL_ERROR as u64)),
    ])
}

// ---- Memory.

fn extents(list: u64, nr_extents: u64, extent_order: u32) -> MemoryReservation {
    MemoryReservation {
        extent_start: GuestHandle::new(list),
        nr_extents,
        extent_order,
        domid: DomId::SELF,
        ..MemoryReservation::default()
    }
}

/// The largest number of extents that a continuation can count.
const MAX_EXTENTS: u64 = u32::MAX as u64 >> 6;
/// Numbers of which eight times as much is no number any more.
const OVERFLOWING: [u64; 4] = [1 << 61, u64::MAX / 8, u64::MAX / 8 + 1, u64::MAX];

fn memory_op_counts(_: &mut Domain) -> Verdict {
    // A frame that this domain can lose, at the end of the list; and one that no memory has.
    let page = Page::new()?;
    let spare = page.mfn().get();
    // SAFETY: nobody uses the address again.
    unsafe { guest_sdk::memory::set_leaf(page.leak(), 0)? };
    let list = AtTheEnd::new(&spare.to_le_bytes())?;
    let write = |frame: u64| {
        // SAFETY: the list's word, by raw pointers only.
        unsafe { (list.address() as *mut u64).write_volatile(frame) };
    };
    let decrease = |count| memop(MemoryOp::DecreaseReservation, &mut extents(list.address(), count, 0));
    let increase = |count| memop(MemoryOp::IncreaseReservation, &mut extents(list.address(), count, 0));
    let populate = |count| memop(MemoryOp::PopulatePhysmap, &mut extents(list.address(), count, 0));
    let pages = || vec![reservation()];
    // As many as before: the list has the frame that came.
    let take = |_: &[u64]| assert_eq!(increase(1), Ok(1));
    let give = |_: &[u64]| assert_eq!(decrease(1), Ok(1));
    let too_many = [&[MAX_EXTENTS + 1, 1 << 32, ABOVE | 1][..], &OVERFLOWING].concat();
    run(&[Count::new("decrease_reservation", decrease)
        .state(pages, take)
        .refused(&[0], Ok(0))
        .refused(&too_many, Ok(0))
        // The second cannot be read.
        .works(&[1, 2, MAX_EXTENTS], Ok(1))])?;
    // Room for one more.
    check_eq!(decrease(1), Ok(1));
    run(&[
        Count::new("increase_reservation", increase)
            .state(pages, give)
            .refused(&[0], Ok(0))
            .refused(&too_many, Ok(0))
            .works(&[1], Ok(1)),
        Count::new("populate_physmap", |count| {
            write(0x7654);
            populate(count)
        })
        .state(pages, give)
        .refused(&[0], Ok(0))
        .refused(&too_many, Ok(0))
        .works(&[1, 2, MAX_EXTENTS], Ok(1)),
        // Sizes of an extent that nobody has, and for which there is no number.
        Count::new("orders of increase_reservation", |order| {
            memop(MemoryOp::IncreaseReservation, &mut extents(list.address(), 1, order as u32))
        })
        .state(pages, give)
        .refused(&[19, 20, 31, 32, 63, 64, u32::MAX.into()], Ok(0)),
        Count::new("orders of decrease_reservation", |order| {
            write(spare);
            memop(MemoryOp::DecreaseReservation, &mut extents(list.address(), 1, order as u32))
        })
        .state(pages, take)
        .refused(&[19, 31, 63, 64, u32::MAX.into()], Ok(0)),
        // What a continuation would say: nothing is done beyond the list, and the answer is where it stands.
        Count::new("a first extent", |first| {
            write(spare);
            call(Hypercall::MemoryOp, [1 | first << 6, at(&mut extents(list.address(), 1, 0)), 0, 0, 0])
        })
        .state(pages, take)
        .refused(&[1], Ok(1))
        .refused(&[2], Ok(2))
        .refused(&[MAX_EXTENTS], Ok(MAX_EXTENTS)),
    ])?;
    check_eq!(increase(1), Ok(1));
    Ok(())
}

fn exchange_counts(_: &mut Domain) -> Verdict {
    const PFN: u64 = 0x7654;
    let page = Page::new()?;
    let frame = page.mfn().get();
    // SAFETY: nobody uses the address again.
    unsafe { guest_sdk::memory::set_leaf(page.leak(), 0)? };
    let input = AtTheEnd::new(&frame.to_le_bytes())?;
    let output = AtTheEnd::new(&PFN.to_le_bytes())?;
    let request = |ins: u64, in_order, outs, out_order, done| {
        let mut request = MemoryExchange {
            input: extents(input.address(), ins, in_order),
            output: extents(output.address(), outs, out_order),
            nr_exchanged: done,
        };
        memop(MemoryOp::Exchange, &mut request)
    };
    let state = || vec![output.word(0), reservation()];
    // The new frame is the next one to exchange.
    let again = |_: &[u64]| {
        let frame = output.word(0);
        // SAFETY: the lists' words, by raw pointers only.
        unsafe {
            (input.address() as *mut u64).write_volatile(frame);
            (output.address() as *mut u64).write_volatile(PFN);
        }
    };
    run(&[
        Count::new("both lists", |count| request(count, 0, count, 0, 0))
            .state(state, again)
            .refused(&[0], Ok(0))
            .works(&[1], Ok(0))
            .refused(&OVERFLOWING, FAULT),
        Count::new("the input", |count| request(count, 0, 1, 0, 0))
            .state(state, again)
            .works(&[1], Ok(0))
            .refused(&[0, 2, ABOVE | 1, u64::MAX], INVALID),
        Count::new("the output", |count| request(1, 0, count, 0, 0))
            .state(state, again)
            .works(&[1], Ok(0))
            .refused(&[0, 2, ABOVE | 1, u64::MAX], INVALID),
        Count::new("what was exchanged before", |done| request(1, 0, 1, 0, done))
            .state(state, again)
            .works(&[0], Ok(0))
            .refused(&[1], Ok(0))
            .refused(&[2, ABOVE, u64::MAX], INVALID),
        // The same number of frames, by an order with which it is no number.
        Count::new("orders", |order| request(1 << 60, order as u32, 1 << 60, order as u32, 0))
            .state(state, again)
            .refused(&[4, 9], INVALID)
            .refused(&[20, 63, 64, u32::MAX.into()], Err(Errno::EPERM)),
    ])
}

/// Room in a list that the hypervisor fills: none is no error, and more than there is neither.
fn memory_lists_counts(_: &mut Domain) -> Verdict {
    let list = AtTheEnd::new(&[0; 8])?;
    let frames = |max_extents: u64| {
        let mut request = MachphysMfnList {
            max_extents: max_extents as u32,
            extent_start: GuestHandle::new(list.address()),
            ..MachphysMfnList::default()
        };
        memop(MemoryOp::MachphysMfnList, &mut request).map(|_| request.nr_extents.into())
    };
    // SAFETY: the list's word, by raw pointers only.
    let clear = |_: &[u64]| unsafe { (list.address() as *mut u64).write_volatile(0) };
    let entry = E820Entry { addr: 0, size: 0x12_3000, kind: E820_RAM };
    let entries = AtTheEnd::new(entry.as_bytes())?;
    let told = || {
        let mut room = E820Entry::default();
        let mut map = MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(at(&mut room)) };
        vec![number(memop(MemoryOp::MemoryMap, &mut map)), map.nr_entries.into(), room.size]
    };
    let set = |nr_entries: u64| {
        let map =
            MemoryMap { nr_entries: nr_entries as u32, pad0: 0, buffer: GuestHandle::new(entries.address()) };
        memop(
            MemoryOp::SetMemoryMap,
            &mut ForeignMemoryMap { domid: DomId::SELF, map, ..FromZeros::new_zeroed() },
        )
    };
    check_eq!(set(1), Ok(0));
    let ask = |nr_entries: u64| {
        let buffer = GuestHandle::new(list.address() - 16);
        let mut map = MemoryMap { nr_entries: nr_entries as u32, pad0: 0, buffer };
        memop(MemoryOp::MemoryMap, &mut map).map(|_| map.nr_entries.into())
    };
    let devices = |buffer: u64| {
        move |nr_entries: u64| {
            let buffer = GuestHandle::new(buffer);
            let nr_entries = nr_entries as u32;
            let mut request = ReservedDeviceMemoryMap { nr_entries, buffer, ..FromZeros::new_zeroed() };
            memop(MemoryOp::ReservedDeviceMemoryMap, &mut request).map(|_| request.nr_entries.into())
        }
    };
    run(&[
        Count::new("machphys_mfn_list", frames)
            .state(|| vec![list.word(0)], clear)
            .refused(&[0], Ok(0))
            .works(&[1, 2, 0xffff_ffff], Ok(1)),
        Count::new("memory_map", ask)
            .state(|| vec![list.word(0)], clear)
            .refused(&[0], Ok(0))
            .works(&[1, 2, 0xffff_ffff], Ok(1)),
        // The map in force stays when the new one is too long, or cannot be read to its end.
        Count::new("set_memory_map", set)
            .state(told, |_| assert_eq!(set(1), Ok(0)))
            .refused(&[1], Ok(0))
            .refused(&[2, 128], FAULT)
            .refused(&[1025, 0x7fff_ffff, 0xffff_ffff], INVALID)
            .works(&[0], Ok(0)),
        // There are none, so any list that is not the hypervisor's has room for them.
        Count::new("reserved_device_memory_map", devices(NOWHERE)).refused(&[0, 1, 0xffff_ffff], Ok(0)),
        Count::new("reserved_device_memory_map at the end", devices(0x7fff_ffff_f000))
            .refused(&[0, 1, 0xffff_ffff], Ok(0)),
        Count::new("reserved_device_memory_map in the hypervisor", devices(HYPERVISOR))
            .refused(&[0, 1, 0xffff_ffff], FAULT),
    ])
}

// ---- Others.

fn console_io_counts(_: &mut Domain) -> Verdict {
    let line = AtTheEnd::new(b" \n")?;
    let write = |count| call(Hypercall::ConsoleIo, [0, count, line.address(), 0, 0]);
    let read = |count| call(Hypercall::ConsoleIo, [1, count, line.address(), 0, 0]);
    if !is_privileged() {
        let refused = Err(Errno::EPERM);
        return run(&[
            Count::new("write", write).refused(&[0, 2, ABOVE, u64::MAX], refused),
            Count::new("read", read).refused(&[0, 2, ABOVE, u64::MAX], refused),
        ]);
    }
    run(&[
        Count::new("write", write)
            .refused(&[0, 2, ABOVE, ABOVE | 2], Ok(0))
            .refused(&[3, 0x7fff_ffff, 0xffff_ffff, u64::MAX], FAULT),
        Count::new("read", read)
            .refused(&[0, 2, ABOVE, 0x7fff_ffff], Ok(0))
            .refused(&[0x8000_0000, 0xffff_ffff, u64::MAX], Err(Errno::E2BIG)),
    ])
}

fn poll_counts(_: &mut Domain) -> Verdict {
    let own = ipi()?;
    // Pending: the poll ends at once.
    let send = || evtchn(EvtchnOp::Send, &mut EvtchnClose { port: own });
    check_eq!(send(), Ok(0));
    let list = AtTheEnd::new(&own.get().to_le_bytes())?;
    let poll = |nr_ports: u64| {
        let ports = GuestHandle::new(list.address());
        let timeout = now_ns() + 1_000_000;
        sched(SchedOp::Poll, &mut SchedPoll { ports, nr_ports: nr_ports as u32, pad0: 0, timeout })
    };
    let verdict = run(&[Count::new("ports", poll)
        .state(|| vec![u64::from(conformance::pending(own))], |_| {})
        // The first is pending: nobody looks at the next.
        .refused(&[0, 1, 2, 128], Ok(0))
        .refused(&[129, 0x7fff_ffff, 0xffff_ffff], INVALID)]);
    take_pending(own);
    let missing = run(&[Count::new("ports of which the second is nowhere", poll)
        .refused(&[1], Ok(0))
        .refused(&[2, 128], FAULT)
        .refused(&[129], INVALID)]);
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port: own })?;
    verdict.and(missing)
}

/// A flat data segment for ring 3.
const FLAT_DATA: u64 = 0x00cf_f300_0000_ffff;

fn loads(selector: u32) -> u64 {
    let loaded = probe!("mov fs, {s:e}"; s = in(reg) selector).is_ok();
    let _ = probe!("mov fs, {s:e}"; s = in(reg) 0);
    loaded.into()
}

fn descriptor_counts(_: &mut Domain) -> Verdict {
    let page = TablePage::new(&[(3, FLAT_DATA)])?;
    let list = AtTheEnd::new(&page.mfn().to_le_bytes())?;
    let gdt = |entries| call(Hypercall::SetGdt, [list.address(), entries, 0, 0, 0]);
    let no_gdt = |_: &[u64]| assert_eq!(gdt(0), Ok(0));
    let ldt = |entries| conformance::mmuext(MmuextCmd::SetLdt, page.address(), entries);
    let no_ldt = |_: &[u64]| assert_eq!(conformance::mmuext(MmuextCmd::SetLdt, 0, 0), Ok(0));
    check_eq!((loads(0x1b), loads(0x1f)), (0, 0));
    run(&[
        Count::new("set_gdt", gdt)
            .state(|| vec![loads(0x1b)], no_gdt)
            .refused(&[0, ABOVE], Ok(0))
            .works(&[4, 512, ABOVE | 512], Ok(0))
            // The second frame cannot be read.
            .refused(&[513, 14 * 512], FAULT)
            .refused(&[14 * 512 + 1, 0x7fff_ffff, 0xffff_ffff, u64::MAX], INVALID),
        Count::new("set_ldt", ldt)
            .state(|| vec![loads(0x1f)], no_ldt)
            .refused(&[0, 3], Ok(0))
            .works(&[4, 512, 8192], Ok(0))
            .refused(&[8193, 0x7fff_ffff, 0xffff_ffff], INVALID),
    ])?;
    no_gdt(&[]);
    no_ldt(&[]);
    check_eq!((loads(0x1b), loads(0x1f)), (0, 0));
    Ok(())
}

fn iobitmap_counts(_: &mut Domain) -> Verdict {
    static OPEN: [u8; 32] = [0; 32];
    let set = |bitmap: u64| {
        move |nr_ports: u64| {
            let bitmap = GuestHandle::new(bitmap);
            let nr_ports = nr_ports as u32;
            physdev(PhysdevOp::SetIobitmap, &mut PhysdevSetIobitmap { bitmap, nr_ports, pad0: 0 })
        }
    };
    let opens = || vec![u64::from(probe!("in al, 0x71").is_ok())];
    let close = |_: &[u64]| assert_eq!(set(0)(0), Ok(0));
    close(&[]);
    check_eq!(opens(), [0]);
    run(&[
        Count::new("ports", set((&raw const OPEN) as u64))
            .state(opens, close)
            .refused(&[0, 0x71], Ok(0))
            .works(&[0x72, 256, 65536], Ok(0))
            .refused(&[65537, 0x7fff_ffff, 0xffff_ffff], INVALID),
        // Where it ends is not asked before a port is looked up.
        Count::new("ports of a bitmap at the end", set(0x7fff_ffff_f000))
            .state(opens, close)
            .refused(&[0, 256, 65536], Ok(0)),
    ])?;
    close(&[]);
    Ok(())
}

fn dm_op_counts(_: &mut Domain) -> Verdict {
    let mut buffers = [0u64; 6];
    let list = at(&mut buffers);
    check!(state::common().len() > 40);
    let of_nobody = |count| call(Hypercall::DmOp, [7777, count, list, 0, 0]);
    let itself = |count| call(Hypercall::DmOp, [SELF, count, list, 0, 0]);
    let nobody = Err(Errno::ESRCH);
    run(&[
        Count::new("buffers", of_nobody)
            .refused(&[0, ABOVE], Err(Errno::ENODATA))
            .refused(&[1, 2, ABOVE | 1], nobody)
            .refused(&[3, 0x7fff_ffff, 0xffff_ffff, u64::MAX], Err(Errno::E2BIG)),
        Count::new("buffers of itself", itself).refused(&[0], Err(Errno::ENODATA)).refused(&[1], nobody),
    ])
}

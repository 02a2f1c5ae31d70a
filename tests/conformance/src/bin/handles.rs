//! Arguments at addresses that are no good: null, in no domain's part, half there, read-only; and counts that no list has.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;

use conformance::handles::{BAD, ReadOnly, Row, run};
use conformance::{NOWHERE, SELF, at, call};
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate};
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::{Errno, Hypercall, MachAddr};
use guest_sdk::memory::Page;
use guest_sdk::testkit::{self, Verdict, cases, check, check_eq};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            event_channel_op_handles,
            xen_version_handles,
            memory_op_handles,
            mmu_update_handles,
            mmu_update_counts,
            mmuext_op_handles,
            grant_table_op_handles,
            multicall_handles,
            vcpu_op_handles,
        ],
    )
}

/// 32-bit words as the bytes of an argument.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Word `index` of an argument.
fn word(bytes: &[u8], index: usize) -> u32 {
    bytes
        .get(index * 4..index * 4 + 4)
        .map_or(0, |word| u32::from_le_bytes(word.try_into().expect("four bytes")))
}

fn nothing() -> Vec<u64> {
    Vec::new()
}

/// `event_channel_op` with an argument of 32-bit words.
fn event(command: u64, argument: &mut [u32]) -> Result<u64, Errno> {
    call(Hypercall::EventChannelOp, [command, argument.as_mut_ptr() as u64, 0, 0, 0])
}

const CLOSE: u64 = 3;
const STATUS: u64 = 5;
const ALLOC_UNBOUND: u64 = 6;
const BIND_VCPU: u64 = 8;

/// The first ports, each with what it is and the vCPU that it notifies.
fn ports() -> Vec<u64> {
    let state = |port| {
        let mut status = [SELF as u32, port, 0, 0, 0, 0];
        event(STATUS, &mut status).map_or(0, |_| u64::from(status[2]) << 32 | u64::from(status[3]))
    };
    (0..64).map(state).collect()
}

/// Closes the ports that are open but were not.
fn close_new(before: &[u64]) {
    for (port, (&was, is)) in before.iter().zip(ports()).enumerate() {
        if was == 0 && is != 0 {
            event(CLOSE, &mut [port as u32]).expect("an own port can be closed");
        }
    }
}

fn event_channel_op_handles(_: &mut Domain) -> Verdict {
    let operation = |command| move |address| call(Hypercall::EventChannelOp, [command, address, 0, 0, 0]);
    let open = |port: u32| port != 0 && ports().get(port as usize).is_some_and(|&state| state >> 32 != 0);
    let own = SELF as u32;
    let mut unbound = [own | own << 16, 0];
    event(ALLOC_UNBOUND, &mut unbound)?;
    let port = unbound[1];
    let row = |what, content: &[u32], call, seen, read_only| Row {
        what,
        content: words(content),
        call,
        seen,
        state: &ports,
        undo: &close_new,
        read_only,
    };
    let verdict = run(&[
        // A port that nobody is told of stays open: there is no way back from it in Xen either.
        row(
            "alloc_unbound",
            &[own | own << 16, 0],
            &operation(ALLOC_UNBOUND),
            &|_, after| open(word(after, 1)),
            ReadOnly::Done,
        ),
        row("bind_virq", &[1, 0, 0], &operation(1), &|_, after| open(word(after, 2)), ReadOnly::Done),
        row("bind_ipi", &[0, 0], &operation(7), &|_, after| open(word(after, 1)), ReadOnly::Done),
        row(
            "bind_interdomain",
            &[own, port, 0],
            &operation(0),
            &|_, after| open(word(after, 2)),
            ReadOnly::Done,
        ),
        row(
            "status",
            &[own, port, 9, 9, 9, 9],
            &operation(STATUS),
            &|_, after| word(after, 2) == 1 || word(after, 2) == 2,
            ReadOnly::Fails,
        ),
        Row {
            what: "bind_vcpu",
            content: words(&[port, 1]),
            call: &operation(BIND_VCPU),
            seen: &|_, _| ports().get(port as usize).is_some_and(|&state| state as u32 == 1),
            state: &ports,
            undo: &|_| {
                event(BIND_VCPU, &mut [port, 0]).expect("the first vCPU is there");
            },
            read_only: ReadOnly::Works,
        },
        Row {
            what: "close",
            content: words(&[port]),
            call: &operation(CLOSE),
            seen: &|_, _| !open(port),
            state: &ports,
            undo: &|_| {
                let mut again = [own | own << 16, 0];
                event(ALLOC_UNBOUND, &mut again).expect("a port was just closed");
                assert_eq!(again[1], port, "the lowest free port is the one just closed");
            },
            read_only: ReadOnly::Works,
        },
    ]);
    event(CLOSE, &mut [port])?;
    verdict
}

fn xen_version_handles(_: &mut Domain) -> Verdict {
    let operation = |command| move |address| call(Hypercall::XenVersion, [command, address, 0, 0, 0]);
    let row = |what, length, call, seen| Row {
        what,
        content: vec![0; length],
        call,
        seen,
        state: &nothing,
        undo: &|_| {},
        read_only: ReadOnly::Fails,
    };
    run(&[
        row("extraversion", 16, &operation(1), &|_, after| after[0] == b'.'),
        row("compile_info", 144, &operation(2), &|_, after| after[0] != 0),
        row("capabilities", 1024, &operation(3), &|_, after| after.starts_with(b"xen-3.0-x86_64")),
        row("platform_parameters", 8, &operation(5), &|_, after| after[7] == 0xff || after[7] == 0x80),
        row("get_features", 8, &operation(6), &|_, after| word(after, 1) != 0),
    ])
}

fn memory_op_handles(_: &mut Domain) -> Verdict {
    let operation = |command| move |address| call(Hypercall::MemoryOp, [command, address, 0, 0, 0]);
    let own = (SELF as u16).to_le_bytes().to_vec();
    let row = |what, content: Vec<u8>, call, seen, read_only| Row {
        what,
        content,
        call,
        seen,
        state: &nothing,
        undo: &|_| {},
        read_only,
    };
    let mut found = [0_u64];
    let mut list = words(&[1, 0]);
    list.extend(at(&mut found).to_le_bytes());
    list.extend([0; 8]);
    let nested = |address: u64| {
        let mut list = [1, address, 0];
        call(Hypercall::MemoryOp, [5, at(&mut list), 0, 0, 0])
    };
    run(&[
        row("machphys_mfn_list", list, &operation(5), &|_, after| word(after, 4) == 1, ReadOnly::Fails),
        row("machphys_mfn_list's extents", vec![0; 8], &nested, &|_, after| after != [0; 8], ReadOnly::Fails),
        row("current_reservation", own.clone(), &operation(3), &|pages, _| pages > 0, ReadOnly::Works),
        row("maximum_reservation", own, &operation(4), &|pages, _| pages > 0, ReadOnly::Works),
        row(
            "machphys_mapping",
            vec![0; 24],
            &operation(12),
            &|_, after| after[..8] == MACH2PHYS_VIRT_START.to_le_bytes(),
            ReadOnly::Fails,
        ),
    ])
}

/// What the machine-to-physical table has for a frame.
fn m2p(frame: u64) -> u64 {
    // SAFETY: an entry for a frame of this domain, readable for every guest.
    unsafe { ((MACH2PHYS_VIRT_START + frame * 8) as *const u64).read_volatile() }
}

/// The request that says a frame is this page.
fn m2p_update(frame: u64, value: u64) -> MmuUpdate {
    MmuUpdate::new(MmuCommand::MachphysUpdate, MachAddr::new(frame << 12), value)
}

fn mmu_update_handles(_: &mut Domain) -> Verdict {
    const OTHER: u64 = 0x1234;
    let page = Page::new()?;
    let frame = page.mfn().get();
    let mut content = (frame << 12 | 1).to_le_bytes().to_vec();
    content.extend(OTHER.to_le_bytes());
    let put_back = |before: &[u64]| {
        let mut request = m2p_update(frame, before[0]);
        call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0]).expect("an own frame's entry");
    };
    let state = || vec![m2p(frame)];
    let row = |what, content, call, seen, read_only| Row {
        what,
        content,
        call,
        seen,
        state: &state,
        undo: &put_back,
        read_only,
    };
    let list = |address| call(Hypercall::MmuUpdate, [address, 1, 0, SELF, 0]);
    let done = |address| {
        let mut request = m2p_update(frame, OTHER);
        call(Hypercall::MmuUpdate, [at(&mut request), 1, address, SELF, 0])
    };
    run(&[row("the list", content, &list, &|_, _| m2p(frame) == OTHER, ReadOnly::Works)])?;

    // The count of what was done: null is none, and no other address keeps the list from being worked on.
    let before = m2p(frame);
    let mut count = 0xffff_ffff_u32;
    check_eq!(done(at(&mut count)), Ok(0));
    check_eq!((count, m2p(frame)), (1, OTHER));
    put_back(&[before]);
    for (kind, address) in BAD {
        let answer = done(address);
        check!(answer.is_ok(), "the count at {kind}: {answer:x?}");
        check_eq!(m2p(frame), OTHER, "the count at {}", kind);
        put_back(&[before]);
    }
    Ok(())
}

fn mmu_update_counts(_: &mut Domain) -> Verdict {
    const OTHER: u64 = 0x1234;
    let page = Page::new()?;
    let frame = page.mfn().get();
    let before = m2p(frame);
    let mut request = m2p_update(frame, OTHER);
    let list = at(&mut request);
    check_eq!(call(Hypercall::MmuUpdate, [list, 0, 0, SELF, 0]), Ok(0), "none");
    // Bit 31 is the hypervisor's own sign that it goes on with a list; the rest of the count is 0.
    check_eq!(call(Hypercall::MmuUpdate, [list, 1 << 31, 0, SELF, 0]), Ok(0), "the sign alone");
    check_eq!(call(Hypercall::MmuUpdate, [list, 1 << 32, 0, SELF, 0]), Ok(0), "the count has 32 bits");
    check_eq!(call(Hypercall::MmuUpdate, [list, 1 << 63, 0, SELF, 0]), Ok(0), "the count has 32 bits");
    check_eq!(m2p(frame), before);
    for count in [1, 0x7fff_ffff, 0xffff_ffff] {
        let answer = call(Hypercall::MmuUpdate, [NOWHERE, count, 0, SELF, 0]);
        check_eq!(answer, Err(Errno::EFAULT), "{:#x} requests nowhere", count);
    }
    check_eq!(call(Hypercall::MmuUpdate, [list, 1 << 32 | 1, 0, SELF, 0]), Ok(0));
    check_eq!(m2p(frame), OTHER);
    let mut request = m2p_update(frame, before);
    call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0])?;
    Ok(())
}

fn mmuext_op_handles(_: &mut Domain) -> Verdict {
    const CLEAR_PAGE: u64 = 16;
    const FULL: u64 = 0x5a5a;
    let page = Page::new()?;
    // SAFETY: the page's first word; the hypervisor writes it too, so every access is volatile.
    let first = || unsafe { (page.address() as *const u64).read_volatile() };
    // SAFETY: as above.
    let fill = || unsafe { (page.address() as *mut u64).write_volatile(FULL) };
    fill();
    let mut request = [CLEAR_PAGE, page.mfn().get(), 0];
    let content = request.iter().flat_map(|word| word.to_le_bytes()).collect();
    run(&[Row {
        what: "the list",
        content,
        call: &|address| call(Hypercall::MmuextOp, [address, 1, 0, SELF, 0]),
        seen: &|_, _| first() == 0,
        state: &|| vec![first()],
        undo: &|_| fill(),
        read_only: ReadOnly::Works,
    }])?;

    // As for mmu_update, where the count goes does not keep the list from being worked on.
    let list = at(&mut request);
    for (kind, address) in BAD {
        let answer = call(Hypercall::MmuextOp, [list, 1, address, SELF, 0]);
        check!(answer.is_ok(), "the count at {kind}: {answer:x?}");
        check_eq!(first(), 0, "the count at {}", kind);
        fill();
    }
    for count in [0, 1 << 31, 1 << 32, 1 << 63] {
        check_eq!(call(Hypercall::MmuextOp, [list, count, 0, SELF, 0]), Ok(0), "{:#x} requests", count);
        check_eq!(first(), FULL, "{:#x} requests", count);
    }
    for count in [1, 0x7fff_ffff, 0xffff_ffff] {
        let answer = call(Hypercall::MmuextOp, [NOWHERE, count, 0, SELF, 0]);
        check_eq!(answer, Err(Errno::EFAULT), "{:#x} requests nowhere", count);
    }
    Ok(())
}

fn grant_table_op_handles(_: &mut Domain) -> Verdict {
    let operation = |command| move |address| call(Hypercall::GrantTableOp, [command, address, 1, 0, 0]);
    let own = SELF as u32;
    let row = |what, content: &[u32], call, seen| Row {
        what,
        content: words(content),
        call,
        seen,
        state: &nothing,
        undo: &|_| {},
        read_only: ReadOnly::Fails,
    };
    run(&[
        // Some frames at most, and status 0.
        row("query_size", &[own, 0, 0, 0xffff], &operation(6), &|_, after| {
            word(after, 2) > 0 && word(after, 3) & 0xffff == 0
        }),
        row("get_version", &[own, 0], &operation(10), &|_, after| matches!(word(after, 1), 1 | 2)),
    ])
}

fn multicall_handles(_: &mut Domain) -> Verdict {
    let list = |address| call(Hypercall::Multicall, [address, 1, 0, 0, 0]);
    // xen_version's number: the result is the second word.
    let mut content = vec![0; 64];
    content[0] = 17;
    content[8..16].fill(0xff);
    run(&[Row {
        what: "the list",
        content,
        call: &list,
        seen: &|_, after| after[8..16] == 0x4_0011_u64.to_le_bytes(),
        state: &nothing,
        undo: &|_| {},
        read_only: ReadOnly::Fails,
    }])
}

fn vcpu_op_handles(_: &mut Domain) -> Verdict {
    // get_runstate_info: state, time of the last change, and four times.
    let runstate = |address| call(Hypercall::VcpuOp, [4, 0, address, 0, 0]);
    run(&[Row {
        what: "get_runstate_info",
        content: vec![0xff; 48],
        call: &runstate,
        // It runs, and has run for some time.
        seen: &|_, after| word(after, 0) == 0 && after[16..24] != [0; 8] && after[16..24] != [0xff; 8],
        state: &nothing,
        undo: &|_| {},
        read_only: ReadOnly::Fails,
    }])
}

//! What operations of a hypervisor cost: a row for each, `bench: NAME = TICKS`, read by `cargo xtask bench`.
//!
//! It runs as dom0 of either hypervisor, on one vCPU but where two take turns, and asks nothing that only one of them has. Each row is measured behind a first
//! time, so that what is made once is there.
#![no_std]
#![no_main]

extern crate alloc;

mod stopwatch;
mod traps;

use alloc::format;
use alloc::vec::Vec;
use conformance::{SELF, TablePage, at, evtchn, grant, mask, memop, mmuext, pages, pte, take_pending};
use core::sync::atomic::{AtomicU32, Ordering};
use guest_sdk::abi::evtchn::{EvtchnAllocUnbound, EvtchnBindIpi, EvtchnSend};
use guest_sdk::abi::grant::{
    GNTCOPY_DEST_GREF, GNTST_OKAY, GnttabCopy, GnttabCopyPtr, GnttabMapGrantRef, GnttabUnmapGrantRef,
    MapFlags,
};
use guest_sdk::abi::memory::MemoryReservation;
use guest_sdk::abi::mmu::{
    MmuCommand, MmuUpdate, MmuextOp, MulticallEntry, UVMF_ALL, UVMF_INVLPG, UVMF_LOCAL, UVMF_TLB_FLUSH,
};
use guest_sdk::abi::subops::{EvtchnOp, GnttabOp, MemoryOp, MmuextCmd, SchedOp, VcpuOp};
use guest_sdk::abi::{DomId, GuestHandle, Hypercall, MachAddr, Mfn, Port};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, try_read};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry, hypercall, vcpu};
use stopwatch::{Call, calls, work};

/// Present, writable, user, accessed, dirty.
const RW: u64 = 0x67;
const ROUNDS: u64 = 500;

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            null_hypercalls,
            lists_of_calls,
            time_and_turns,
            processor_state,
            events,
            wake_ups_of_another_vcpu,
            page_table_entries,
            whole_page_tables,
            bases,
            grants,
            memory_of_the_hypervisor,
            // Last: guest-sdk's handlers are gone afterwards.
            system_calls_and_exceptions
        ],
    )
}

fn of(hypercall: Hypercall, arguments: &[u64]) -> Call {
    let mut call = [0; 6];
    call[0] = hypercall.number();
    call[1..=arguments.len()].copy_from_slice(arguments);
    call
}

fn null_hypercalls(_: &mut Domain) -> Verdict {
    calls("null hypercall (xen_version)", &[of(Hypercall::XenVersion, &[0, 0])], ROUNDS, 1)?;
    calls("hypercall that does not exist", &[[stopwatch::NOBODYS, 0, 0, 0, 0, 0]], ROUNDS, 1)
}

fn lists_of_calls(_: &mut Domain) -> Verdict {
    let entry = MulticallEntry { op: Hypercall::XenVersion.number(), result: 0, args: [0; 6] };
    let mut list = [entry; 32];
    let address = at(&mut list);
    calls("multicall of 1 xen_version", &[of(Hypercall::Multicall, &[address, 1])], ROUNDS, 1)?;
    calls("multicall of 32 xen_version, each", &[of(Hypercall::Multicall, &[address, 32])], ROUNDS, 32)?;
    check!(list.iter().all(|entry| entry.result == list[0].result && entry.result != 0), "they answer");
    Ok(())
}

fn time_and_turns(_: &mut Domain) -> Verdict {
    let is_up = of(Hypercall::VcpuOp, &[VcpuOp::IsUp.number().into(), 0, 0]);
    calls("vcpu_op(is_up)", &[is_up], ROUNDS, 1)?;
    calls("set_timer_op: stop", &[of(Hypercall::SetTimerOp, &[0])], ROUNDS, 1)?;
    let far = now_ns() + 3_600_000_000_000;
    calls("set_timer_op: in an hour", &[of(Hypercall::SetTimerOp, &[far])], ROUNDS, 1)?;
    calls("set_timer_op: stop again", &[of(Hypercall::SetTimerOp, &[0])], 1, 1)?;
    let turn = of(Hypercall::SchedOp, &[SchedOp::Yield.number().into(), 0]);
    calls("sched_op(yield), nobody waits", &[turn], ROUNDS, 1)
}

fn processor_state(_: &mut Domain) -> Verdict {
    calls("set_segment_base(FS)", &[of(Hypercall::SetSegmentBase, &[0, 0])], ROUNDS, 1)?;
    calls("fpu_taskswitch(clear)", &[of(Hypercall::FpuTaskswitch, &[0])], ROUNDS, 1)?;
    calls("get_debugreg(0)", &[of(Hypercall::GetDebugreg, &[0])], ROUNDS, 1)
}

fn events(domain: &mut Domain) -> Verdict {
    // Closed by the number that was found.
    let mut unbound =
        EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, ..EvtchnAllocUnbound::default() };
    let operation = |op: EvtchnOp, address| of(Hypercall::EventChannelOp, &[op.number().into(), address]);
    let address = at(&mut unbound);
    let pair = [operation(EvtchnOp::AllocUnbound, address), operation(EvtchnOp::Close, address + 4)];
    calls("alloc_unbound and close", &pair, ROUNDS, 1)?;
    let channel = domain.events.bind_ipi()?;
    let mut send = EvtchnSend { port: channel.port() };
    let send = operation(EvtchnOp::Send, at(&mut send));
    work("send to oneself, block, upcall, return", ROUNDS, 1, || {
        channel.notify()?;
        channel.wait();
        Ok(())
    })?;
    mask(channel.port());
    work("send to oneself, masked", ROUNDS, 1, || {
        channel.notify()?;
        check!(take_pending(channel.port()), "it was sent");
        Ok(())
    })?;
    calls("send to oneself, masked and pending", &[send], ROUNDS, 1)?;
    check!(take_pending(channel.port()), "it was sent");
    Ok(())
}

/// The port by which vCPU 1 is woken, and the one by which it wakes vCPU 0.
static PORTS: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];

/// Sends through `there`, and sleeps until something has come by `back`.
fn turn(there: Port, back: Port) -> Verdict {
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: there }), Ok(0));
    while !take_pending(back) {
        hypercall::poll(&[back], 0)?;
    }
    Ok(())
}

/// vCPU 1: answers each event. It has no console, so it stops where something is refused, and vCPU 0 waits in vain.
extern "C" fn answer(_id: u32) {
    let [own, other] = PORTS.each_ref().map(|port| Port::new(port.load(Ordering::SeqCst)));
    while !take_pending(own) {
        if hypercall::poll(&[own], 0).is_err() {
            return;
        }
    }
    while turn(other, own).is_ok() {}
}

fn wake_ups_of_another_vcpu(_: &mut Domain) -> Verdict {
    let mut ports = [Port::new(0); 2];
    for (port, vcpu) in ports.iter_mut().zip([1, 0]) {
        let mut bind = EvtchnBindIpi { vcpu, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindIpi, &mut bind), Ok(0));
        // Who polls a port is not to be told of it by an upcall too.
        mask(bind.port);
        *port = bind.port;
    }
    for (to, port) in PORTS.iter().zip(ports) {
        to.store(port.get(), Ordering::SeqCst);
    }
    // Nobody waits for the beat that a vCPU is born with.
    hypercall::stop_periodic_timer(1)?;
    // SAFETY: it uses atomics and hypercalls.
    unsafe { vcpu::start(1, answer)? };
    let [there, back] = ports;
    // Nobody sends vCPU 1 anything afterwards: it sleeps for ever.
    work("wake another vCPU by an event and sleep, each", ROUNDS, 2, || turn(there, back))
}

fn page_table_entries(_: &mut Domain) -> Verdict {
    let window = Range::new(128)?;
    let (first, second) = (Page::new()?, Page::new()?);
    let entry = |page: &Page, bits| pte(page.mfn().get(), bits);
    let (a, b) = (entry(&first, RW), entry(&second, RW));
    let set = |value, flags| of(Hypercall::UpdateVaMapping, &[window.start(), value, flags]);
    for (name, flags) in [
        ("no flush", 0),
        ("INVLPG here", UVMF_INVLPG | UVMF_LOCAL),
        ("INVLPG everywhere", UVMF_INVLPG | UVMF_ALL),
        ("TLB flush here", UVMF_TLB_FLUSH | UVMF_LOCAL),
    ] {
        let pair = [set(a, flags), set(b, flags)];
        calls(&format!("update_va_mapping, another page, {name}"), &pair, ROUNDS, 2)?;
    }
    let pair = [set(a, 0), set(0, 0)];
    calls("update_va_mapping, map and unmap", &pair, ROUNDS, 1)?;
    let pair = [set(entry(&first, RW & !2), 0), set(a, 0)];
    calls("update_va_mapping, read-only and writable", &pair, ROUNDS, 2)?;
    // A table that is not in force anywhere costs as much.
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    let list = |value| -> Vec<MmuUpdate> {
        let request =
            |index| MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(table.place(index)), value);
        (0..128).map(request).collect()
    };
    let (to_a, to_b) = (list(a), list(b));
    let update =
        |list: &[MmuUpdate], count| of(Hypercall::MmuUpdate, &[list.as_ptr() as u64, count, 0, SELF]);
    calls("mmu_update of 1 entry", &[update(&to_a, 1), update(&to_b, 1)], ROUNDS, 2)?;
    calls("mmu_update of 128 entries, each", &[update(&to_a, 128), update(&to_b, 128)], 50, 256)?;
    let multicall = |value| -> Vec<MulticallEntry> {
        let one = |index| {
            let args = [window.address(index), value, 0, 0, 0, 0];
            MulticallEntry { op: Hypercall::UpdateVaMapping.number(), result: 0, args }
        };
        (0..32).map(one).collect()
    };
    let (mut to_a, mut to_b) = (multicall(a), multicall(b));
    let pair = [&mut to_a, &mut to_b].map(|list| of(Hypercall::Multicall, &[list.as_mut_ptr() as u64, 32]));
    calls("multicall of 32 update_va_mapping, each", &pair, 50, 64)?;
    check!(to_a.iter().chain(&to_b).all(|entry| entry.result == 0), "they are done");
    work("store to a read-only page table", ROUNDS, 2, || {
        for value in [a, b] {
            // SAFETY: the entry of a table that nobody uses; the hypervisor makes the store.
            unsafe { (table.address() as *mut u64).write_volatile(value) };
        }
        Ok(())
    })?;
    // Xen adds GLOBAL.
    check_eq!(table.word(0) >> 12, b >> 12);
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    Ok(())
}

fn extended(operations: &mut [MmuextOp]) -> Call {
    of(Hypercall::MmuextOp, &[operations.as_mut_ptr() as u64, operations.len() as u64, 0, SELF])
}

fn whole_page_tables(_: &mut Domain) -> Verdict {
    let pin = |name: &str, kind, table: &TablePage, rounds| {
        let mut pin = [MmuextOp::new(kind, table.mfn(), 0)];
        let mut unpin = [MmuextOp::new(MmuextCmd::UnpinTable, table.mfn(), 0)];
        calls(name, &[extended(&mut pin), extended(&mut unpin)], rounds, 1)
    };
    let empty = TablePage::new(&[])?;
    pin("pin and unpin an empty L1 table", MmuextCmd::PinL1Table, &empty, 50)?;
    pin("pin and unpin an empty L4 table", MmuextCmd::PinL4Table, &empty, 50)?;
    let data = pages(512)?;
    let entries: Vec<_> = (0..).zip(&data).map(|(i, page)| (i, pte(page.mfn().get(), RW))).collect();
    let full = (0..8).map(|_| TablePage::new(&entries)).collect::<Result<Vec<_>, _>>()?;
    pin("pin and unpin an L1 table of 512 pages", MmuextCmd::PinL1Table, &full[0], 20)?;
    let linked: Vec<_> = (0..).zip(&full).map(|(i, table)| (i, pte(table.mfn(), RW))).collect();
    let l2 = TablePage::new(&linked)?;
    let l3 = TablePage::new(&[(0, pte(l2.mfn(), RW))])?;
    let l4 = TablePage::new(&[(0, pte(l3.mfn(), RW))])?;
    pin("pin and unpin an L4 tree over 4096 pages", MmuextCmd::PinL4Table, &l4, 5)?;
    for (name, command) in [
        ("mmuext_op: TLB flush here", MmuextCmd::TlbFlushLocal),
        ("mmuext_op: TLB flush everywhere", MmuextCmd::TlbFlushAll),
        ("mmuext_op: INVLPG here", MmuextCmd::InvlpgLocal),
    ] {
        let mut operation = [MmuextOp::new(command, data[0].address(), 0)];
        calls(name, &[extended(&mut operation)], ROUNDS, 1)?;
    }
    Ok(())
}

fn bases(_: &mut Domain) -> Verdict {
    let old = memory::root();
    let words = {
        let range = Range::new(1)?;
        // SAFETY: the root, for reading.
        unsafe { range.map(0, old, Access::Read)? };
        (0..512)
            .map(|slot| Ok((slot, try_read(range.start() + slot as u64 * 8)?)))
            .collect::<Result<Vec<_>, Stop>>()?
    };
    let copy = TablePage::new(&words)?;
    check_eq!(mmuext(MmuextCmd::PinL4Table, copy.mfn(), 0), Ok(0));
    for (name, command) in
        [("page-table base", MmuextCmd::NewBaseptr), ("user's page-table base", MmuextCmd::NewUserBaseptr)]
    {
        let mut to_copy = [MmuextOp::new(command, copy.mfn(), 0)];
        let mut back = [MmuextOp::new(command, old.get(), 0)];
        calls(&format!("mmuext_op: {name}"), &[extended(&mut to_copy), extended(&mut back)], ROUNDS, 2)?;
    }
    let both = |frame: u64| {
        [MmuextCmd::NewBaseptr, MmuextCmd::NewUserBaseptr].map(|command| MmuextOp::new(command, frame, 0))
    };
    let (mut to_copy, mut back) = (both(copy.mfn()), both(old.get()));
    let pair = [extended(&mut to_copy), extended(&mut back)];
    calls("mmuext_op: both bases in one call", &pair, ROUNDS, 2)?;
    check_eq!(mmuext(MmuextCmd::NewUserBaseptr, 0, 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, copy.mfn(), 0), Ok(0));
    Ok(())
}

fn grants(domain: &mut Domain) -> Verdict {
    const COUNT: usize = 32;
    let id = domain.id();
    let granted =
        (0..COUNT).map(|_| domain.grants.grant_new(id, Access::ReadWrite)).collect::<Result<Vec<_>, _>>()?;
    let window = Range::new(COUNT as u64)?;
    let mut maps: Vec<_> = (0..)
        .zip(&granted)
        .map(|(index, grant)| GnttabMapGrantRef {
            host_addr: window.address(index),
            flags: MapFlags::HOST_MAP.bits(),
            gref: grant.reference(),
            dom: id,
            ..Default::default()
        })
        .collect();
    let list = |command: GnttabOp, address: u64, count: usize| {
        conformance::call(Hypercall::GrantTableOp, [command.number().into(), address, count as u64, 0, 0])
    };
    for count in [1, COUNT] {
        let name = if count == 1 { "map and unmap a grant" } else { "map and unmap 32 grants, each" };
        work(name, 50, count as u64, || {
            let maps = &mut maps[..count];
            list(GnttabOp::MapGrantRef, maps.as_mut_ptr() as u64, count)?;
            let unmap = |map: &GnttabMapGrantRef| GnttabUnmapGrantRef {
                host_addr: map.host_addr,
                handle: map.handle,
                status: 77,
                ..Default::default()
            };
            let mut unmaps: [GnttabUnmapGrantRef; COUNT] = Default::default();
            unmaps.iter_mut().zip(&*maps).for_each(|(place, map)| *place = unmap(map));
            list(GnttabOp::UnmapGrantRef, unmaps.as_mut_ptr() as u64, count)?;
            check!(
                maps.iter().all(|map| map.status == GNTST_OKAY)
                    && unmaps[..count].iter().all(|unmap| unmap.status == GNTST_OKAY),
                "one of {count} was refused"
            );
            Ok(())
        })?;
    }
    let source = Page::new()?;
    for len in [8, 4096] {
        let mut copies: Vec<_> = granted
            .iter()
            .map(|grant| GnttabCopy {
                source: GnttabCopyPtr::own(source.mfn(), 0),
                dest: GnttabCopyPtr::granted(grant.reference(), id, 0),
                len,
                flags: GNTCOPY_DEST_GREF,
                status: 77,
                pad0: 0,
            })
            .collect();
        let copy = |count: u64| {
            of(Hypercall::GrantTableOp, &[GnttabOp::Copy.number().into(), copies.as_ptr() as u64, count])
        };
        let (one, all) = ([copy(1)], [copy(COUNT as u64)]);
        calls(&format!("copy {len} bytes to a grant"), &one, ROUNDS, 1)?;
        calls(&format!("copy {len} bytes to a grant, 32 in a call, each"), &all, 50, COUNT as u64)?;
        check!(copies.iter_mut().all(|copy| copy.status == GNTST_OKAY), "one was refused");
    }
    let mut query = guest_sdk::abi::grant::GnttabQuerySize { dom: DomId::SELF, ..Default::default() };
    check_eq!(grant(GnttabOp::QuerySize, &mut query), Ok(0));
    let query_size = of(Hypercall::GrantTableOp, &[GnttabOp::QuerySize.number().into(), at(&mut query), 1]);
    calls("grant_table_op(query_size)", &[query_size], ROUNDS, 1)
}

fn memory_of_the_hypervisor(_: &mut Domain) -> Verdict {
    const COUNT: u64 = 64;
    let mut frames: Vec<u64> = Vec::new();
    for _ in 0..COUNT {
        let page = Page::new()?;
        frames.push(page.mfn().get());
        let address = page.leak();
        // SAFETY: nobody uses the page any more; the heap does not get it back.
        unsafe { memory::set_leaf(address, 0)? };
    }
    let mut request = MemoryReservation {
        extent_start: GuestHandle::new(frames.as_mut_ptr() as u64),
        nr_extents: 0,
        extent_order: 0,
        mem_flags: 0,
        domid: DomId::SELF,
        pad0: [0; 3],
    };
    for count in [1, COUNT] {
        let name =
            if count == 1 { "give a frame back and get one" } else { "give back and get 64 frames, each" };
        work(name, 20, count, || {
            request.nr_extents = count;
            check_eq!(memop(MemoryOp::DecreaseReservation, &mut request), Ok(count));
            check_eq!(memop(MemoryOp::IncreaseReservation, &mut request), Ok(count));
            Ok(())
        })?;
    }
    check!(frames.iter().all(|frame| Mfn::new(*frame).get() != 0), "frames came");
    Ok(())
}

fn system_calls_and_exceptions(_: &mut Domain) -> Verdict {
    traps::system_calls()?;
    traps::exceptions()
}

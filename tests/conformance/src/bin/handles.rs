//! Arguments at addresses that are no good: null, in no domain's part, half there, read-only; for every call with an argument
//! in memory, and for every address inside such an argument.
//!
//! Three are not here. The frame that `iret` reads: a bad one ends the domain. The list of `acquire_resource`: it takes a right over
//! another domain, and on real Xen who has it is alone. The lists of `add_to_physmap_batch` and `get_vnumainfo`: both are refused
//! before anybody looks at them.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use conformance::handles::{Answer, BAD, Kind, Row, run};
use conformance::state::{self, masks, number, ports, reservation};
use conformance::{
    SELF, TablePage, at, by_privilege, call, evtchn, grant, is_privileged, memop, physdev, pte, sched,
    take_pending, vcpu,
};
use guest_sdk::abi::callback::{CallbackRegister, CallbackUnregister};
use guest_sdk::abi::evtchn::*;
use guest_sdk::abi::grant::*;
use guest_sdk::abi::memory::*;
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp, MulticallEntry};
use guest_sdk::abi::nmi::NmiCallback;
use guest_sdk::abi::physdev::*;
use guest_sdk::abi::sched::{SchedPinOverride, SchedPoll, SchedRemoteShutdown, SchedShutdown, SchedWatchdog};
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::{
    CallbackOp, CallbackType, EvtchnOp, GnttabOp, HvmOp, MemoryOp, MmuextCmd, NmiOp, PhysdevOp, SchedOp,
    VcpuOp, VersionOp,
};
use guest_sdk::abi::vcpu::{
    RunstateInfo, TrapInfo, VcpuGuestContext, VcpuRegisterRunstateMemoryArea, VcpuRegisterTimeMemoryArea,
    VcpuRegisterVcpuInfo, VcpuSetPeriodicTimer, VcpuSetSingleshotTimer,
};
use guest_sdk::abi::{DomId, Errno, Gfn, GrantRef, GuestHandle, Hypercall, MachAddr, Port, Virq};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, probe, try_read};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};
use zerocopy::{FromZeros, IntoBytes};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            event_channel_op_handles,
            event_channel_op_compat_handles,
            xen_version_handles,
            memory_op_handles,
            memory_op_lists,
            exchange_lists,
            memory_maps,
            memory_op_refused,
            mmu_update_handles,
            mmuext_op_handles,
            update_va_mapping_handles,
            grant_table_op_handles,
            grant_lists,
            multicall_handles,
            vcpu_op_handles,
            vcpu_areas,
            vcpu_initialise_handles,
            sched_op_handles,
            poll_lists,
            set_trap_table_handles,
            set_gdt_handles,
            callback_handles,
            console_io_handles,
            physdev_op_handles,
            physdev_op_refused,
            hvm_op_handles,
            tools_calls_handles,
            fifo_handles,
        ],
    )
}

/// 32-bit words as the bytes of an argument.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// 64-bit words as the bytes of an argument.
fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// 32-bit word `index` of an argument.
fn word(bytes: &[u8], index: usize) -> u32 {
    bytes
        .get(index * 4..index * 4 + 4)
        .map_or(0, |word| u32::from_le_bytes(word.try_into().expect("four bytes")))
}

/// 64-bit word `index` of an argument.
fn long(bytes: &[u8], index: usize) -> u64 {
    u64::from(word(bytes, index * 2)) | u64::from(word(bytes, index * 2 + 1)) << 32
}

// ---- Event channels.

/// Closes the ports that are open but were not.
fn close_new(before: &[u64]) {
    for (port, (&was, is)) in (0..).zip(before.iter().zip(ports())) {
        if was == 0 && is != 0 {
            evtchn(EvtchnOp::Close, &mut EvtchnClose { port: Port::new(port) }).expect("an own port");
        }
    }
}

fn unbound() -> Result<Port, Errno> {
    let mut argument = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, port: Port::new(0) };
    evtchn(EvtchnOp::AllocUnbound, &mut argument)?;
    Ok(argument.port)
}

/// A port that fires when it is sent to.
fn ipi() -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

fn close(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port })
}

fn event_channel_op_handles(_: &mut Domain) -> Verdict {
    let (waiting, own) = (unbound()?, ipi()?);
    let open = |port: u32| port != 0 && ports().get(port as usize).is_some_and(|&state| state != 0);
    let opens = |what, command: EvtchnOp, argument: &[u32], index| {
        let content = words(argument);
        let operation =
            move |address| call(Hypercall::EventChannelOp, [command.number().into(), address, 0, 0, 0]);
        // A port that nobody is told of stays open: there is no way back from it in Xen either.
        Row::new(what, move || content.clone(), operation)
            .answer()
            .effect(move |_, after| open(word(after, index)))
            .state(ports)
            .undo(close_new)
    };
    fn row<T: IntoBytes + zerocopy::Immutable>(what: &str, command: EvtchnOp, argument: T) -> Row<'_> {
        Row::operation(what, Hypercall::EventChannelOp, command.number(), &argument)
    }
    let itself = SELF as u32;
    let closed = Cell::new(waiting);
    let mask = |on| state::set_mask(own, on);
    mask(true);
    let verdict = run(&[
        opens("alloc_unbound", EvtchnOp::AllocUnbound, &[itself | itself << 16, 0], 1),
        opens("bind_virq", EvtchnOp::BindVirq, &[1, 0, 0], 2),
        opens("bind_ipi", EvtchnOp::BindIpi, &[0, 0], 1),
        opens("bind_interdomain", EvtchnOp::BindInterdomain, &[itself, waiting.get(), 0], 2),
        row("bind_pirq", EvtchnOp::BindPirq, EvtchnBindPirq { pirq: 100_000, flags: 0, port: waiting })
            .refused(Errno::EINVAL),
        row(
            "status",
            EvtchnOp::Status,
            EvtchnStatus { dom: DomId::SELF, port: own, ..FromZeros::new_zeroed() },
        )
        .output()
        .effect(|_, after| word(after, 2) == EVTCHNSTAT_IPI),
        row("bind_vcpu", EvtchnOp::BindVcpu, EvtchnBindVcpu { port: waiting, vcpu: 1 })
            .effect(|_, _| ports()[waiting.get() as usize] >> 48 & 0xff == 1)
            .undo(|_| {
                evtchn(EvtchnOp::BindVcpu, &mut EvtchnBindVcpu { port: waiting, vcpu: 0 }).expect("vCPU 0");
            }),
        row("send", EvtchnOp::Send, EvtchnSend { port: own })
            .effect(|_, _| conformance::pending(own))
            .state(|| vec![conformance::pending(own).into()])
            .undo(|_| take_pending(own)),
        row("unmask", EvtchnOp::Unmask, EvtchnUnmask { port: own })
            .effect(|_, _| masks() >> own.get() & 1 == 0)
            .undo(|_| mask(true)),
        row("close", EvtchnOp::Close, EvtchnClose { port: waiting })
            .effect(|_, _| !open(waiting.get()))
            .undo(|_| closed.set(unbound().expect("a port was just closed"))),
        row("reset", EvtchnOp::Reset, EvtchnReset { dom: DomId::new(7777) }).refused(Errno::ESRCH),
        row(
            "init_control",
            EvtchnOp::InitControl,
            EvtchnInitControl { offset: 4, ..FromZeros::new_zeroed() },
        )
        .refused(Errno::EINVAL),
        row("expand_array", EvtchnOp::ExpandArray, EvtchnExpandArray::new_zeroed())
            .refused(Errno::EOPNOTSUPP),
        row("set_priority", EvtchnOp::SetPriority, EvtchnSetPriority { port: own, priority: 3 })
            .refused(Errno::ENOSYS),
    ]);
    check_eq!(closed.get(), waiting, "the lowest free port is the one just closed");
    close(waiting)?;
    close(own)?;
    verdict
}

fn event_channel_op_compat_handles(_: &mut Domain) -> Verdict {
    let own = ipi()?;
    let content = words(&[EvtchnOp::Send.number(), own.get(), 0, 0, 0, 0, 0]);
    let verdict = run(&[Row::new(
        "send",
        || content.clone(),
        |address| call(Hypercall::EventChannelOpCompat, [address, 0, 0, 0, 0]),
    )
    .effect(|_, _| conformance::pending(own))
    .state(|| vec![conformance::pending(own).into()])
    .undo(|_| take_pending(own))]);
    close(own)?;
    verdict
}

// ---- Facts.

fn xen_version_handles(_: &mut Domain) -> Verdict {
    fn row(what: &str, command: VersionOp, length: usize) -> Row<'_> {
        let operation =
            move |address| call(Hypercall::XenVersion, [command.number().into(), address, 0, 0, 0]);
        Row::new(what, move || vec![0xee; length], operation).output()
    }
    let commandline = by_privilege(1024, 9);
    run(&[
        row("extraversion", VersionOp::Extraversion, 16).effect(|_, after| after[0] == b'.'),
        row("compile_info", VersionOp::CompileInfo, 144).effect(|_, after| after[0] != 0xee),
        row("capabilities", VersionOp::Capabilities, 1024)
            .effect(|_, after| after.starts_with(b"xen-3.0-x86_64")),
        row("changeset", VersionOp::Changeset, 64).effect(|_, after| after[0] != 0xee),
        row("platform_parameters", VersionOp::PlatformParameters, 8)
            .effect(|_, after| after[7] == 0xff || after[7] == 0x80),
        Row::new("get_features", || vec![0; 8], |address| call(Hypercall::XenVersion, [6, address, 0, 0, 0]))
            .output()
            .effect(|_, after| word(after, 1) != 0),
        row("guest_handle", VersionOp::GuestHandle, 16).effect(|_, after| after != [0xee; 16]),
        row("commandline", VersionOp::Commandline, commandline).effect(|_, after| after[0] != 0xee),
        // Nothing but null is an argument of this.
        row("pagesize", VersionOp::Pagesize, 8)
            .refused(Errno::EINVAL)
            .bad(Err(Errno::EINVAL))
            .except(Kind::ReadOnly, Err(Errno::EINVAL))
            .except(Kind::Null, Ok(4096)),
    ])
}

// ---- Memory.

/// Frames of this domain that nothing refers to, to give away and take again.
struct Stash(RefCell<Vec<u64>>);

impl Stash {
    fn new(count: usize) -> Result<Stash, Stop> {
        let mut frames = Vec::new();
        for _ in 0..count {
            let page = Page::new()?;
            frames.push(page.mfn().get());
            // SAFETY: the page is leaked: nobody uses its address again.
            unsafe { memory::set_leaf(page.leak(), 0)? };
        }
        Ok(Stash(RefCell::new(frames)))
    }

    /// One to use; it stays here.
    fn last(&self) -> u64 {
        *self.0.borrow().last().expect("the stash is large enough")
    }

    fn take(&self) -> u64 {
        self.0.borrow_mut().pop().expect("the stash is large enough")
    }

    fn put(&self, frame: u64) {
        self.0.borrow_mut().push(frame);
    }

    /// Whether it is ours still.
    fn owns(frame: u64) -> bool {
        conformance::update(MmuCommand::MachphysUpdate, frame << 12, 0x1234).is_ok()
    }

    /// Gives frames away, or takes some, until the domain has this many pages.
    fn balance(&self, pages: u64) {
        while reservation() > pages {
            self.give_away();
        }
        while reservation() < pages {
            let mut list = [0];
            check_done(memop(MemoryOp::IncreaseReservation, &mut extents(&mut list)));
            self.put(list[0]);
        }
    }

    fn give_away(&self) {
        let mut list = [self.take()];
        check_done(memop(MemoryOp::DecreaseReservation, &mut extents(&mut list)));
    }
}

fn check_done(answer: Answer) {
    assert_eq!(answer, Ok(1), "one extent is done");
}

fn extents(list: &mut [u64]) -> MemoryReservation {
    reservation_at(list.as_mut_ptr() as u64, list.len() as u64)
}

fn reservation_at(list: u64, nr_extents: u64) -> MemoryReservation {
    MemoryReservation {
        extent_start: GuestHandle::new(list),
        nr_extents,
        domid: DomId::SELF,
        ..MemoryReservation::default()
    }
}

fn memory_row<T: IntoBytes + zerocopy::Immutable>(what: &str, command: MemoryOp, argument: T) -> Row<'_> {
    Row::operation(what, Hypercall::MemoryOp, command.number(), &argument)
}

fn memory_op_handles(_: &mut Domain) -> Verdict {
    let own = MemoryDomain { domid: DomId::SELF };
    let mut found = [0_u64];
    let list = MachphysMfnList {
        max_extents: 1,
        extent_start: GuestHandle::new(at(&mut found)),
        ..MachphysMfnList::default()
    };
    run(&[
        memory_row("machphys_mfn_list", MemoryOp::MachphysMfnList, list)
            .output()
            .effect(|_, after| word(after, 4) == 1),
        Row::new(
            "machphys_mfn_list's extents",
            || vec![0; 8],
            |address| {
                let extent_start = GuestHandle::new(address);
                let mut list = MachphysMfnList { max_extents: 1, extent_start, ..Default::default() };
                memop(MemoryOp::MachphysMfnList, &mut list)
            },
        )
        .output()
        .effect(|_, after| after != [0; 8]),
        memory_row("current_reservation", MemoryOp::CurrentReservation, own).effect(|pages, _| pages > 0),
        memory_row("maximum_reservation", MemoryOp::MaximumReservation, own).effect(|pages, _| pages > 0),
        memory_row("maximum_gpfn", MemoryOp::MaximumGpfn, own),
        memory_row("machphys_mapping", MemoryOp::MachphysMapping, [0u64; 3])
            .output()
            .effect(|_, after| after[..8] == MACH2PHYS_VIRT_START.to_le_bytes()),
    ])
}

/// The commands that count what they did, whatever the reason why it is not more.
fn memory_op_lists(_: &mut Domain) -> Verdict {
    let stash = Stash::new(24)?;
    // Room for more.
    stash.give_away();
    let pages = || vec![reservation()];
    let balance = |before: &[u64]| stash.balance(before[0]);
    let nested = |command: MemoryOp| move |address| memop(command, &mut reservation_at(address, 1));
    let mut spare = [0u64];
    let list = at(&mut spare);
    let entry = |frame: u64| try_read(MACH2PHYS_VIRT_START + frame * 8);
    const PFN: u64 = 0x7654;
    run(&[
        Row::new(
            "decrease_reservation",
            || {
                // SAFETY: the list of this case; the hypervisor only reads it.
                unsafe { (list as *mut u64).write_volatile(stash.last()) };
                reservation_at(list, 1).as_bytes().to_vec()
            },
            |address| call(Hypercall::MemoryOp, [1, address, 0, 0, 0]),
        )
        .effect(|done, _| done == 1 && !Stash::owns(stash.take()))
        .state(pages)
        .undo(balance)
        .bad(Ok(0)),
        Row::new(
            "decrease_reservation's extents",
            || longs(&[stash.last()]),
            nested(MemoryOp::DecreaseReservation),
        )
        .effect(|done, _| done == 1 && !Stash::owns(stash.take()))
        .state(pages)
        .undo(balance)
        .bad(Ok(0)),
        memory_row("increase_reservation", MemoryOp::IncreaseReservation, reservation_at(list, 1))
            .effect(|done, _| {
                // SAFETY: the list of this case, after the call.
                stash.put(unsafe { (list as *const u64).read_volatile() });
                done == 1 && Stash::owns(stash.last())
            })
            .state(pages)
            .undo(balance)
            .bad(Ok(0)),
        // Without a list it works; with one that cannot be written, the frame is there and nobody knows which.
        Row::new("increase_reservation's extents", || vec![0; 8], nested(MemoryOp::IncreaseReservation))
            .output()
            .effect(|done, after| {
                stash.put(long(after, 0));
                done == 1 && Stash::owns(stash.last())
            })
            .state(pages)
            .undo(balance)
            .bad(Ok(0))
            .except(Kind::Null, Ok(1))
            .done_with(&[Kind::Null, Kind::Unmapped, Kind::LastWord, Kind::Partial, Kind::ReadOnly]),
        Row::new(
            "populate_physmap",
            || {
                // SAFETY: the list of this case.
                unsafe { (list as *mut u64).write_volatile(PFN) };
                reservation_at(list, 1).as_bytes().to_vec()
            },
            |address| call(Hypercall::MemoryOp, [6, address, 0, 0, 0]),
        )
        .effect(|done, _| {
            // SAFETY: the list of this case, after the call.
            stash.put(unsafe { (list as *const u64).read_volatile() });
            done == 1 && entry(stash.last()) == Ok(PFN)
        })
        .state(pages)
        .undo(balance)
        .bad(Ok(0)),
        Row::new("populate_physmap's extents", || longs(&[PFN]), nested(MemoryOp::PopulatePhysmap))
            .answer()
            .effect(|done, after| {
                stash.put(long(after, 0));
                done == 1 && entry(stash.last()) == Ok(PFN)
            })
            .state(pages)
            .undo(balance)
            .bad(Ok(0)),
    ])?;
    check!(reservation() > 0);
    Ok(())
}

fn exchange_lists(_: &mut Domain) -> Verdict {
    let stash = Stash::new(24)?;
    const PFN: u64 = 0x7654;
    let (input, output) = (Cell::new([0u64]), Cell::new([0u64]));
    let (from, to) = (input.as_ptr() as u64, output.as_ptr() as u64);
    let prepare = || {
        input.set([stash.last()]);
        output.set([PFN]);
    };
    let request = |from: u64, to: u64| MemoryExchange {
        input: reservation_at(from, 1),
        output: reservation_at(to, 1),
        nr_exchanged: 0,
    };
    // The old frame is not ours any more; the new one is, and goes to the stash.
    let exchanged = |new: u64| {
        let gone = !Stash::owns(stash.take());
        let known = try_read(MACH2PHYS_VIRT_START + new * 8) == Ok(PFN);
        stash.put(new);
        gone && known
    };
    let state = || vec![u64::from(Stash::owns(stash.last())), reservation()];
    // The frame is lost with the list that was to say which one came for it: one more page than we know.
    let forget = |before: &[u64]| {
        if !Stash::owns(stash.last()) {
            stash.take();
        }
        assert_eq!(before[1], reservation(), "as many pages as before");
    };
    run(&[
        Row::new(
            "exchange",
            || {
                prepare();
                request(from, to).as_bytes().to_vec()
            },
            |address| call(Hypercall::MemoryOp, [11, address, 0, 0, 0]),
        )
        .effect(|_, after| long(after, 8) == 1 && exchanged(output.get()[0]))
        .state(state)
        .undo(forget)
        .answer(),
        // Nothing to do: nothing is told either.
        Row::new(
            "exchange of nothing",
            || MemoryExchange::default().as_bytes().to_vec(),
            |address| call(Hypercall::MemoryOp, [11, address, 0, 0, 0]),
        ),
        Row::new(
            "exchange's input",
            || {
                prepare();
                longs(&[stash.last()])
            },
            |address| memop(MemoryOp::Exchange, &mut request(address, to)),
        )
        .effect(|_, _| exchanged(output.get()[0]))
        .state(state)
        .undo(forget),
        Row::new(
            "exchange's output",
            || {
                prepare();
                longs(&[PFN])
            },
            |address| memop(MemoryOp::Exchange, &mut request(from, address)),
        )
        .effect(|_, after| exchanged(long(after, 0)))
        .state(state)
        .undo(forget)
        .answer()
        .done_with(&[Kind::Null, Kind::Unmapped, Kind::LastWord, Kind::Partial]),
    ])
}

/// A domain's own memory map, which it may set, and the machine's.
fn memory_maps(_: &mut Domain) -> Verdict {
    let map = |first: u64| E820Entry { addr: 0, size: first, kind: E820_RAM };
    let told = || {
        let mut entry = E820Entry::default();
        let mut map = MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(at(&mut entry)) };
        let answer = memop(MemoryOp::MemoryMap, &mut map);
        vec![number(answer), u64::from(map.nr_entries), entry.size]
    };
    let set = |first: u64| {
        let mut entry = map(first);
        let mut request = ForeignMemoryMap {
            domid: DomId::SELF,
            map: MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(at(&mut entry)) },
            ..FromZeros::new_zeroed()
        };
        memop(MemoryOp::SetMemoryMap, &mut request)
    };
    const BEFORE: u64 = 0x100_0000;
    const AFTER: u64 = 0x200_0000;
    check_eq!(set(BEFORE), Ok(0));
    check_eq!(told(), [0, 1, BEFORE]);
    let mut entry = map(AFTER);
    let buffer = at(&mut entry);
    let mut room = [E820Entry::default(); 64];
    let own = MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(buffer) };
    let set_request = ForeignMemoryMap { domid: DomId::SELF, map: own, ..FromZeros::new_zeroed() };
    let put_back = |_: &[u64]| assert_eq!(set(BEFORE), Ok(0));
    let mut told_entry = E820Entry::default();
    let ask = MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(at(&mut told_entry)) };
    run(&[
        memory_row("set_memory_map", MemoryOp::SetMemoryMap, set_request)
            .effect(|_, _| told() == [0, 1, AFTER])
            .state(told)
            .undo(put_back),
        Row::new(
            "set_memory_map's entries",
            || map(AFTER).as_bytes().to_vec(),
            |address| {
                let map = MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(address) };
                let mut request = ForeignMemoryMap { domid: DomId::SELF, map, ..FromZeros::new_zeroed() };
                memop(MemoryOp::SetMemoryMap, &mut request)
            },
        )
        .effect(|_, _| told() == [0, 1, AFTER])
        .state(told)
        .undo(put_back),
        memory_row("memory_map", MemoryOp::MemoryMap, ask).output().effect(|_, after| word(after, 0) == 1),
        Row::new(
            "memory_map's entries",
            || vec![0; 20],
            |address| {
                let buffer = GuestHandle::new(address);
                memop(MemoryOp::MemoryMap, &mut MemoryMap { nr_entries: 1, pad0: 0, buffer })
            },
        )
        .output()
        .effect(|_, after| long(after, 1) == BEFORE),
    ])?;
    let whole = MemoryMap { nr_entries: 64, pad0: 0, buffer: GuestHandle::new(at(&mut room)) };
    let machine = memory_row("machine_memory_map", MemoryOp::MachineMemoryMap, whole);
    if !is_privileged() {
        let refused = Err(Errno::EPERM);
        return run(&[machine.refused(Errno::EPERM).bad(refused)]);
    }
    run(&[
        machine.output().effect(|_, after| word(after, 0) > 1 && word(after, 0) < 64),
        Row::new(
            "machine_memory_map's entries",
            || vec![0; 20 * 64],
            |address| {
                let buffer = GuestHandle::new(address);
                memop(MemoryOp::MachineMemoryMap, &mut MemoryMap { nr_entries: 64, pad0: 0, buffer })
            },
        )
        .output()
        .effect(|_, after| long(after, 1) != 0)
        // Asked for the number of entries only.
        .except(Kind::Null, Ok(0))
        // Only as much is written as there is: less than the room for it.
        .without(Kind::Partial),
    ])
}

/// Commands that say no for what the argument holds, once they have read it.
fn memory_op_refused(_: &mut Domain) -> Verdict {
    let itself = u64::from(DomId::SELF.get());
    let claim = MemoryReservation { domid: DomId::SELF, extent_order: 1, ..MemoryReservation::default() };
    run(&[
        memory_row("current_reservation", MemoryOp::CurrentReservation, MemoryDomain { domid: DomId::SELF })
            .effect(|pages, _| pages > 0),
        memory_row("add_to_physmap", MemoryOp::AddToPhysmap, [itself, 0, 0]).refused(Errno::EACCES),
        memory_row("add_to_physmap_batch", MemoryOp::AddToPhysmapBatch, [itself, 0, 0, 0])
            .refused(Errno::EACCES),
        memory_row("remove_from_physmap", MemoryOp::RemoveFromPhysmap, [itself, 0]).refused(Errno::EACCES),
        memory_row(
            "get_vnumainfo",
            MemoryOp::GetVnumainfo,
            VnumaTopologyInfo { domid: DomId::SELF, ..FromZeros::new_zeroed() },
        )
        .refused(Errno::EOPNOTSUPP),
        memory_row("claim_pages", MemoryOp::ClaimPages, claim).refused(Errno::EINVAL),
        memory_row(
            "acquire_resource",
            MemoryOp::AcquireResource,
            AcquireResource { domid: DomId::SELF, ..FromZeros::new_zeroed() },
        )
        .refused(Errno::ESRCH),
        // There are none: the answer is how many.
        memory_row("reserved_device_memory_map", MemoryOp::ReservedDeviceMemoryMap, [1u64 << 32, 0, 0])
            .output()
            .effect(|_, after| word(after, 1) == 0),
    ])
}

// ---- Page tables.

/// What the machine-to-physical table has for a frame.
fn m2p(frame: u64) -> u64 {
    try_read(MACH2PHYS_VIRT_START + frame * 8).expect("an entry for a frame of this domain")
}

/// The request that says a frame is this page.
fn m2p_update(frame: u64, value: u64) -> MmuUpdate {
    MmuUpdate::new(MmuCommand::MachphysUpdate, MachAddr::new(frame << 12), value)
}

fn mmu_update_handles(_: &mut Domain) -> Verdict {
    const OTHER: u64 = 0x1234;
    let page = Page::new()?;
    let frame = page.mfn().get();
    let put_back = |before: &[u64]| {
        let mut request = m2p_update(frame, before[0]);
        call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0]).expect("an own frame's entry");
    };
    let list = |address| call(Hypercall::MmuUpdate, [address, 1, 0, SELF, 0]);
    let count = |address| {
        let mut request = m2p_update(frame, OTHER);
        call(Hypercall::MmuUpdate, [at(&mut request), 1, address, SELF, 0])
    };
    run(&[
        Row::new("the list", || m2p_update(frame, OTHER).as_bytes().to_vec(), list)
            .effect(|_, _| m2p(frame) == OTHER)
            .state(|| vec![m2p(frame)])
            .undo(put_back),
        // Null is none, and no other address keeps the list from being worked on.
        Row::new("the count of what was done", || vec![0xff; 4], count)
            .output()
            .bad(Ok(0))
            .done_with(&EVERY_KIND)
            .effect(|_, after| word(after, 0) == 1 && m2p(frame) == OTHER)
            .state(|| vec![m2p(frame)])
            .undo(put_back),
    ])
}

const EVERY_KIND: [Kind; 7] = [
    Kind::Null,
    Kind::Unmapped,
    Kind::NonCanonical,
    Kind::Hypervisor,
    Kind::LastWord,
    Kind::Partial,
    Kind::ReadOnly,
];

/// A page of which the first word is looked at.
struct Marked(Page);

impl Marked {
    const MARK: u64 = 0x5a5a;

    fn new() -> Result<Marked, Stop> {
        let page = Marked(Page::new()?);
        page.set(Marked::MARK);
        Ok(page)
    }

    fn get(&self) -> u64 {
        // SAFETY: the page's first word; the hypervisor writes it too, so every access is volatile.
        unsafe { (self.0.address() as *const u64).read_volatile() }
    }

    fn set(&self, word: u64) {
        // SAFETY: as in get.
        unsafe { (self.0.address() as *mut u64).write_volatile(word) };
    }
}

fn mmuext_op_handles(_: &mut Domain) -> Verdict {
    let page = Marked::new()?;
    let clear = || MmuextOp::new(MmuextCmd::ClearPage, page.0.mfn().get(), 0);
    let state = || vec![page.get()];
    let undo = |_: &[u64]| page.set(Marked::MARK);
    let count = |address| call(Hypercall::MmuextOp, [at(&mut clear()), 1, address, SELF, 0]);
    // The vCPUs to flush: the first.
    let flush = |command: MmuextCmd| {
        move |address| {
            let mut operations =
                [MmuextOp::new(command, 0x1000, address), MmuextOp::new(command, 0x1000, address)];
            call(Hypercall::MmuextOp, [at(&mut operations), 1, 0, SELF, 0])
        }
    };
    let invalid = Err(Errno::EINVAL);
    run(&[
        Row::new(
            "the list",
            || clear().as_bytes().to_vec(),
            |address| call(Hypercall::MmuextOp, [address, 1, 0, SELF, 0]),
        )
        .effect(|_, _| page.get() == 0)
        .state(state)
        .undo(undo),
        // As for mmu_update.
        Row::new("the count of what was done", || vec![0xff; 4], count)
            .output()
            .bad(Ok(0))
            .done_with(&EVERY_KIND)
            .effect(|_, after| word(after, 0) == 1 && page.get() == 0)
            .state(state)
            .undo(undo),
        Row::new("vCPUs of tlb_flush_multi", || longs(&[1]), flush(MmuextCmd::TlbFlushMulti)).bad(invalid),
        Row::new("vCPUs of invlpg_multi", || longs(&[1]), flush(MmuextCmd::InvlpgMulti)).bad(invalid),
    ])
}

fn update_va_mapping_handles(_: &mut Domain) -> Verdict {
    const FLUSH: u64 = 1;
    let (range, page) = (Range::new(1)?, Marked::new()?);
    let entry = pte(page.0.mfn().get(), Access::Read.bits());
    let shown = || vec![number(try_read(range.start()).map_err(|_| Errno::EFAULT))];
    run(&[Row::new(
        "vCPUs",
        || longs(&[1]),
        |address| call(Hypercall::UpdateVaMapping, [range.start(), entry, address | FLUSH, 0, 0]),
    )
    // Two bits say what to flush; the entry is written before the list is read.
    .aligned(8)
    .effect(|_, _| shown() == [Marked::MARK])
    .state(shown)
    .undo(|_| range.unmap(0).expect("an own address"))
    .except(Kind::Null, Ok(0))
    .done_with(&EVERY_KIND)])
}

// ---- Grants.

fn grant_row<T: IntoBytes + zerocopy::Immutable>(what: &str, command: GnttabOp, argument: T) -> Row<'_> {
    Row::operation(what, Hypercall::GrantTableOp, command.number(), &argument)
}

/// What stands in a status that no operation has answered.
const UNANSWERED: i16 = 77;

fn grant_table_op_handles(domain: &mut Domain) -> Verdict {
    let dom = domain.id();
    let granted = domain.grants.grant_new(dom, Access::ReadWrite)?;
    let range = Range::new(1)?;
    let (from, to) = (Marked::new()?, Page::new()?);
    let to_word = || vec![number(try_read(to.address()).map_err(|_| Errno::EFAULT))];
    // Mapped or not, and whether the granter's entry says so.
    let mapping =
        || vec![memory::leaf(range.start()).map_or(0, |entry| entry & 1), u64::from(granted.in_use())];
    let map = |gref| GnttabMapGrantRef {
        host_addr: range.start(),
        flags: MapFlags::HOST_MAP.bits(),
        gref,
        dom,
        status: UNANSWERED,
        ..FromZeros::new_zeroed()
    };
    let unmap = |handle| GnttabUnmapGrantRef {
        host_addr: range.start(),
        handle,
        status: UNANSWERED,
        ..FromZeros::new_zeroed()
    };
    // Who lost the answer knows no handle: they are small numbers.
    let unmap_any = || {
        let mut tries = (0..64).map(|handle| {
            let mut operation = unmap(handle);
            grant(GnttabOp::UnmapGrantRef, &mut operation).is_ok() && operation.status == GNTST_OKAY
        });
        assert!(tries.any(|done| done), "one of the first handles");
    };
    let handle = Cell::new(0);
    let mapped = || {
        if memory::leaf(range.start()).is_none_or(|entry| entry & 1 == 0) {
            let mut operation = map(granted.reference());
            grant(GnttabOp::MapGrantRef, &mut operation).expect("an own grant");
            assert_eq!(operation.status, GNTST_OKAY);
            handle.set(operation.handle);
        }
        unmap(handle.get()).as_bytes().to_vec()
    };
    let status_at =
        |offset: usize| move |after: &[u8]| i16::from_le_bytes([after[offset], after[offset + 1]]);
    let copy = GnttabCopy {
        source: GnttabCopyPtr::own(from.0.mfn(), 0),
        dest: GnttabCopyPtr::own(to.mfn(), 0),
        len: 8,
        flags: 0,
        status: UNANSWERED,
        pad0: 0,
    };
    let verdict = run(&[
        grant_row(
            "query_size",
            GnttabOp::QuerySize,
            GnttabQuerySize { dom: DomId::SELF, status: UNANSWERED, ..FromZeros::new_zeroed() },
        )
        .output()
        .effect(|_, after| word(after, 2) > 0 && word(after, 3) & 0xffff == 0),
        grant_row(
            "get_version",
            GnttabOp::GetVersion,
            GnttabGetVersion { dom: DomId::SELF, ..FromZeros::new_zeroed() },
        )
        .output()
        .effect(|_, after| matches!(word(after, 1), 1 | 2)),
        grant_row("map_grant_ref", GnttabOp::MapGrantRef, map(granted.reference()))
            .answer()
            .effect(|_, _| mapping() == [1, 1])
            .state(mapping)
            .undo(|_| unmap_any()),
        Row::new("unmap_grant_ref", mapped, |address| call(Hypercall::GrantTableOp, [1, address, 1, 0, 0]))
            .answer()
            .effect(|_, _| mapping() == [0, 0])
            .state(mapping),
        grant_row("copy", GnttabOp::Copy, copy)
            .answer()
            .effect(|_, _| to_word() == [Marked::MARK])
            .state(to_word)
            .undo(|_| {
                // SAFETY: this case's page; every access is by raw pointers.
                unsafe { (to.address() as *mut u64).write_volatile(0) };
            }),
        // A page that is mapped, handles of nobody, a version of the table that is not in force: refused in the status.
        grant_row(
            "transfer",
            GnttabOp::Transfer,
            GnttabTransfer {
                mfn: from.0.mfn(),
                domid: DomId::new(7777),
                status: UNANSWERED,
                ..FromZeros::new_zeroed()
            },
        )
        .output()
        .effect(move |_, after| status_at(16)(after) == GNTST_BAD_PAGE),
        grant_row(
            "unmap_and_replace",
            GnttabOp::UnmapAndReplace,
            GnttabUnmapAndReplace {
                host_addr: range.start(),
                handle: 0xffff_fff0,
                status: UNANSWERED,
                ..FromZeros::new_zeroed()
            },
        )
        .output()
        .effect(move |_, after| status_at(20)(after) == GNTST_BAD_HANDLE),
        grant_row(
            "swap_grant_ref",
            GnttabOp::SwapGrantRef,
            GnttabSwapGrantRef {
                ref_a: GrantRef::new(0xffff_fff0),
                ref_b: GrantRef::new(9),
                status: UNANSWERED,
                ..FromZeros::new_zeroed()
            },
        )
        .output()
        .effect(move |_, after| status_at(8)(after) == GNTST_BAD_GNTREF),
        grant_row("set_version", GnttabOp::SetVersion, GnttabSetVersion { version: 3 })
            .output()
            .refused(Errno::EINVAL),
        grant_row(
            "cache_flush",
            GnttabOp::CacheFlush,
            GnttabCacheFlush { a: from.0.mfn().get() << 12, offset: 0, length: 64, op: 1 },
        ),
        grant_row(
            "setup_table",
            GnttabOp::SetupTable,
            GnttabSetupTable { dom: DomId::SELF, status: UNANSWERED, ..FromZeros::new_zeroed() },
        )
        .output()
        .effect(move |_, after| status_at(8)(after) == GNTST_OKAY),
        grant_row(
            "get_status_frames",
            GnttabOp::GetStatusFrames,
            GnttabGetStatusFrames { dom: DomId::SELF, status: UNANSWERED, ..FromZeros::new_zeroed() },
        )
        .output()
        .effect(move |_, after| status_at(6)(after) == GNTST_OKAY),
    ]);
    if mapping()[0] != 0 {
        unmap_any();
    }
    verdict
}

/// The lists of frames inside two operations: one that cannot be written is told in the status.
fn grant_lists(_: &mut Domain) -> Verdict {
    let bad_address = Ok(GNTST_BAD_VIRT_ADDR as u64);
    let setup = |address| {
        let mut operation = GnttabSetupTable {
            dom: DomId::SELF,
            nr_frames: 1,
            status: UNANSWERED,
            frame_list: GuestHandle::new(address),
            ..FromZeros::new_zeroed()
        };
        grant(GnttabOp::SetupTable, &mut operation).map(|_| operation.status as u64)
    };
    run(&[Row::new("setup_table's frames", || vec![0; 8], setup)
        .output()
        .effect(|status, after| status == 0 && long(after, 0) != 0)
        .bad(bad_address)
        .except(Kind::NonCanonical, Err(Errno::EFAULT))
        .except(Kind::Hypervisor, Err(Errno::EFAULT))])?;
    let mut version = GnttabSetVersion { version: 2 };
    check_eq!(grant(GnttabOp::SetVersion, &mut version), Ok(0));
    let status_frames = |address| {
        let mut operation = GnttabGetStatusFrames {
            dom: DomId::SELF,
            nr_frames: 1,
            status: UNANSWERED,
            frame_list: GuestHandle::new(address),
        };
        grant(GnttabOp::GetStatusFrames, &mut operation).map(|_| operation.status as u64)
    };
    let verdict = run(&[Row::new("get_status_frames' frames", || vec![0; 8], status_frames)
        .output()
        .effect(|status, after| status == 0 && long(after, 0) != 0)
        .bad(bad_address)
        .except(Kind::NonCanonical, Err(Errno::EFAULT))
        .except(Kind::Hypervisor, Err(Errno::EFAULT))]);
    let mut version = GnttabSetVersion { version: 1 };
    check_eq!(grant(GnttabOp::SetVersion, &mut version), Ok(0));
    verdict
}

// ---- Lists of calls.

fn multicall_handles(_: &mut Domain) -> Verdict {
    let list = |address| call(Hypercall::Multicall, [address, 1, 0, 0, 0]);
    let own = ipi()?;
    let mut port = own.get();
    let place = at(&mut port);
    let entry = |op: Hypercall, args| MulticallEntry { op: op.number(), result: u64::MAX, args };
    let version = entry(Hypercall::XenVersion, [0; 6]);
    let send = entry(Hypercall::EventChannelOp, [EvtchnOp::Send.number().into(), place, 0, 0, 0, 0]);
    let verdict = run(&[
        Row::new("a query", || version.as_bytes().to_vec(), list)
            .output()
            .effect(|_, after| long(after, 1) == 0x4_0011),
        // What cannot be answered is done.
        Row::new("a signal", || send.as_bytes().to_vec(), list)
            .answer()
            .effect(|_, after| long(after, 1) == 0 && conformance::pending(own))
            .state(|| vec![conformance::pending(own).into()])
            .undo(|_| take_pending(own)),
    ]);
    close(own)?;
    verdict
}

// ---- vCPUs.

fn vcpu_row<T: IntoBytes + zerocopy::Immutable>(
    what: &str,
    command: VcpuOp,
    id: u64,
    argument: T,
) -> Row<'_> {
    let content = argument.as_bytes().to_vec();
    let operation = move |address| call(Hypercall::VcpuOp, [command.number().into(), id, address, 0, 0]);
    Row::new(what, move || content.clone(), operation)
}

/// The port of the timer's interrupt; the beat that a vCPU is born with is stopped.
fn timer() -> Result<Port, Errno> {
    let mut argument = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindVirq, &mut argument)?;
    call(Hypercall::VcpuOp, [VcpuOp::StopPeriodicTimer.number().into(), 0, 0, 0, 0])?;
    take_pending(argument.port);
    Ok(argument.port)
}

fn vcpu_op_handles(_: &mut Domain) -> Verdict {
    let port = timer()?;
    let fired = || vec![u64::from(conformance::pending(port))];
    let physid = vcpu_row("get_physid", VcpuOp::GetPhysid, 0, [u64::MAX]);
    let verdict = run(&[
        vcpu_row("get_runstate_info", VcpuOp::GetRunstateInfo, 0, [0xff_u8; 48])
            .output()
            // It runs, and has run for some time.
            .effect(|_, after| word(after, 0) == 0 && long(after, 2) != 0 && long(after, 2) != u64::MAX),
        vcpu_row(
            "set_singleshot_timer",
            VcpuOp::SetSingleshotTimer,
            0,
            VcpuSetSingleshotTimer { timeout_abs_ns: 1, ..FromZeros::new_zeroed() },
        )
        // A time of the past: at once.
        .effect(|_, _| fired() == [1])
        .state(fired)
        .undo(|_| take_pending(port)),
        vcpu_row("set_periodic_timer", VcpuOp::SetPeriodicTimer, 0, VcpuSetPeriodicTimer { period_ns: 0 })
            .refused(Errno::EINVAL),
        vcpu_row(
            "register_vcpu_info",
            VcpuOp::RegisterVcpuInfo,
            0,
            VcpuRegisterVcpuInfo { offset: 4095, ..FromZeros::new_zeroed() },
        )
        .refused(Errno::ENXIO),
        if !is_privileged() {
            // For who drives the processors only: there is nothing to tell others, wherever it is to go.
            physid.refused(Errno::EINVAL).bad(Err(Errno::EINVAL))
        } else {
            physid.output().effect(|_, after| word(after, 0) == 0)
        },
        // It has no argument: any address but null is refused.
        vcpu_row("send_nmi", VcpuOp::SendNmi, 1, [0u64])
            .refused(Errno::EINVAL)
            .bad(Err(Errno::EINVAL))
            .without(Kind::Null),
    ]);
    close(port)?;
    verdict
}

/// The areas that the hypervisor writes whenever the vCPU is put on: one that nobody can write to is kept, and nothing comes of
/// it, but none is taken in the hypervisor's part.
fn vcpu_areas(_: &mut Domain) -> Verdict {
    static AREA: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
    let area = (&raw const AREA) as u64;
    let runstate = |address| {
        let addr = GuestHandle::new(address);
        vcpu(VcpuOp::RegisterRunstateMemoryArea, 0, &mut VcpuRegisterRunstateMemoryArea { addr })
    };
    let time = |address| {
        let addr = GuestHandle::new(address);
        vcpu(VcpuOp::RegisterVcpuTimeMemoryArea, 0, &mut VcpuRegisterTimeMemoryArea { addr })
    };
    // Whether it is written when the vCPU comes back from a sleep.
    let in_force = || {
        AREA.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        let slept = || {
            let mut info = RunstateInfo::default();
            vcpu(VcpuOp::GetRunstateInfo, 0, &mut info).expect("vCPU 0");
            info.time[2]
        };
        // A machine that stalls may let the time pass without sleep.
        let before = slept();
        for _ in 0..20 {
            let mut poll = SchedPoll { timeout: now_ns() + 200_000, ..SchedPoll::default() };
            sched(SchedOp::Poll, &mut poll).expect("a poll without ports");
            if slept() != before {
                break;
            }
        }
        vec![u64::from(AREA[1].load(Ordering::SeqCst) != 0)]
    };
    let kept = [Kind::Null, Kind::Unmapped, Kind::LastWord, Kind::Partial, Kind::ReadOnly];
    let others = |mut row: Row<'static>| {
        // Any address of the guest's takes the place of the area.
        for kind in kept {
            row = row.except(kind, Ok(0));
        }
        row.done_with(&kept)
    };
    check_eq!(runstate(0), Ok(0));
    let argument = VcpuRegisterRunstateMemoryArea { addr: GuestHandle::new(area) };
    run(&[vcpu_row("register_runstate_memory_area", VcpuOp::RegisterRunstateMemoryArea, 0, argument)
        .effect(|_, _| in_force() == [1])
        .state(in_force)
        .undo(move |_| runstate(0))])?;
    check_eq!(runstate(area), Ok(0));
    check_eq!(in_force(), [1]);
    run(&[others(
        Row::new("the runstate area", || vec![0xff; 48], runstate)
            .output()
            .effect(|_, after| word(after, 0) == 0 && long(after, 1) != u64::MAX)
            .state(in_force)
            .undo(move |_| runstate(area)),
    )])?;
    check_eq!(runstate(0), Ok(0));

    let argument = VcpuRegisterTimeMemoryArea { addr: GuestHandle::new(area) };
    run(&[vcpu_row("register_vcpu_time_memory_area", VcpuOp::RegisterVcpuTimeMemoryArea, 0, argument)
        .effect(|_, _| AREA[1].load(Ordering::SeqCst) != 0)
        .state(|| vec![u64::from(AREA[1].load(Ordering::SeqCst) != 0)])
        .undo(move |_| {
            let _ = time(0);
            AREA[1].store(0, Ordering::SeqCst);
        })])?;
    run(&[Row::new("the time area", || vec![0xff; 32], time)
        .output()
        .effect(|_, after| long(after, 1) != u64::MAX)
        .undo(move |_| time(0))
        .bad(Ok(0))
        .except(Kind::NonCanonical, Err(Errno::EFAULT))
        .except(Kind::Hypervisor, Err(Errno::EFAULT))])?;
    check_eq!(time(0), Ok(0));
    Ok(())
}

fn vcpu_initialise_handles(_: &mut Domain) -> Verdict {
    let context: Box<VcpuGuestContext> = Box::new(VcpuGuestContext::ZERO);
    let length = size_of::<VcpuGuestContext>();
    check!(length > 4096 && length < 8192);
    // More than a page: its end is what is mapped or not.
    let range = Range::new(4)?;
    let pages = conformance::pages(2)?;
    for (index, page) in (0..).zip(&pages) {
        // SAFETY: the pages are written by nobody but this case.
        unsafe { range.map(index, page.mfn(), Access::Read)? };
    }
    drop(context);
    let initialise = |id: u64, address: u64| call(Hypercall::VcpuOp, [0, id, address, 0, 0]);
    let end = range.address(2);
    for (name, address) in BAD
        .map(|(_, name, address)| (name, address))
        .into_iter()
        .chain([("one byte short", end - length as u64 + 1), ("a page short", end - length as u64 + 4096)])
    {
        for id in [0, 1] {
            let before = state::common();
            check_eq!(initialise(id, address), Err(Errno::EFAULT), "vCPU {} with a context {}", id, name);
            check_eq!(state::common(), before, "vCPU {} with a context {}", id, name);
        }
        let up = call(Hypercall::VcpuOp, [VcpuOp::Up.number().into(), 1, 0, 0, 0]);
        check_eq!(up, Err(Errno::EINVAL), "vCPU 1 is not initialised by a context {}", name);
    }
    for address in [range.start(), range.start() + 1, end - length as u64] {
        check_eq!(initialise(0, address), Err(Errno::EEXIST), "it can be read");
        check_eq!(initialise(1, address), Err(Errno::EINVAL), "zeros are no context");
    }
    drop(range);
    drop(pages);
    Ok(())
}

// ---- Scheduling.

fn sched_row<T: IntoBytes + zerocopy::Immutable>(what: &str, command: SchedOp, argument: T) -> Row<'_> {
    Row::operation(what, Hypercall::SchedOp, command.number(), &argument)
}

fn watchdog(id: u32, timeout: u32) -> Result<u64, Errno> {
    sched(SchedOp::Watchdog, &mut SchedWatchdog { id, timeout })
}

/// Whether watchdog 1 is armed: then, and only then, can it be poked.
fn armed() -> Vec<u64> {
    vec![u64::from(watchdog(1, 1000).is_ok())]
}

fn sched_op_handles(_: &mut Domain) -> Verdict {
    let own = ipi()?;
    let mut port = own.get();
    let ports = GuestHandle::new(at(&mut port));
    let soon = || SchedPoll { ports, nr_ports: 1, pad0: 0, timeout: now_ns() + 100_000 };
    let pin = sched_row("pin_override", SchedOp::PinOverride, SchedPinOverride { pcpu: -1 });
    let verdict = run(&[
        Row::new(
            "poll",
            || soon().as_bytes().to_vec(),
            |address| call(Hypercall::SchedOp, [SchedOp::Poll.number().into(), address, 0, 0, 0]),
        ),
        // The domain would be gone.
        sched_row("shutdown", SchedOp::Shutdown, SchedShutdown { reason: 0 }).never_good(),
        sched_row("shutdown_code", SchedOp::ShutdownCode, SchedShutdown { reason: 0 }),
        sched_row(
            "remote_shutdown",
            SchedOp::RemoteShutdown,
            SchedRemoteShutdown { domain_id: DomId::new(7777), ..FromZeros::new_zeroed() },
        )
        .refused(Errno::ESRCH),
        sched_row("watchdog", SchedOp::Watchdog, SchedWatchdog { id: 0, timeout: 1000 })
            .effect(|id, _| id == 1 && armed() == [1])
            .state(armed)
            .undo(|_| watchdog(1, 0)),
        if is_privileged() {
            pin.refused(Errno::EINVAL)
        } else {
            pin.refused(Errno::EPERM).bad(Err(Errno::EPERM))
        },
    ]);
    close(own)?;
    verdict
}

fn poll_lists(_: &mut Domain) -> Verdict {
    let own = ipi()?;
    check_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port: own }), Ok(0));
    check!(conformance::pending(own));
    // Pending, so that a list which is read ends the poll long before its time.
    let poll = |address| {
        let start = now_ns();
        let ports = GuestHandle::new(address);
        let timeout = start + 20_000_000_000;
        sched(SchedOp::Poll, &mut SchedPoll { ports, nr_ports: 1, pad0: 0, timeout })
            .map(|_| now_ns() - start)
    };
    let verdict = run(&[Row::new("the ports", || words(&[own.get()]), poll)
        .effect(|slept, _| slept < 10_000_000_000)
        .state(|| vec![conformance::pending(own).into()])]);
    take_pending(own);
    close(own)?;
    verdict
}

// ---- Traps and descriptors.

static OWN_TRAPS: AtomicU64 = AtomicU64::new(0);

conformance::counting_handler! {
    /// Counts, and goes on behind the instruction.
    own_trap: OWN_TRAPS
}

/// How often the own handler ran, after this.
fn traps_after(raise: impl FnOnce()) -> Vec<u64> {
    let before = OWN_TRAPS.load(Ordering::SeqCst);
    raise();
    vec![OWN_TRAPS.load(Ordering::SeqCst) - before]
}

fn set_trap_table_handles(_: &mut Domain) -> Verdict {
    const VECTOR: u8 = 0x45;
    let entry = |address| TrapInfo { vector: VECTOR, flags: 3, cs: 0xe033, pad0: 0, address };
    let taken = || traps_after(|| assert!(matches!(probe!("int 0x45"), Ok(()) | Err(_))));
    let set = |list: &mut [TrapInfo]| call(Hypercall::SetTrapTable, [list.as_mut_ptr() as u64, 0, 0, 0, 0]);
    let own = own_trap as *const () as u64;
    let undo = |_: &[u64]| {
        // An entry that no `int` of the kernel's reaches: for ring 0 only.
        let away = TrapInfo { flags: 0, ..entry(own) };
        assert_eq!(set(&mut [away, TrapInfo::default()]), Ok(0));
    };
    undo(&[]);
    check_eq!(taken(), [0]);
    let content = || [entry(own), TrapInfo::default()].as_bytes().to_vec();
    let list = |address| call(Hypercall::SetTrapTable, [address, 0, 0, 0, 0]);
    run(&[Row::new("the list", content, list)
        .effect(|_, _| taken() == [1])
        .state(taken)
        .undo(undo)
        // No list clears the table, which `conf-traps` shows; a list is entered as far as it can be read, as seen below.
        .without(Kind::Null)
        .without(Kind::Partial)])?;
    let (range, page) = (Range::new(2)?, Page::new()?);
    // SAFETY: the page is accessed by raw pointers only.
    unsafe { range.map(0, page.mfn(), Access::ReadWrite)? };
    for (inside, entered) in [(15, 0), (16, 1), (31, 1)] {
        for (index, byte) in (0..inside).zip(content()) {
            // SAFETY: inside the page.
            unsafe { ((page.address() + 4096 - inside + index) as *mut u8).write_volatile(byte) };
        }
        let answer = list(range.start() + 4096 - inside);
        check_eq!(answer, Err(Errno::EFAULT), "{} bytes of the list mapped", inside);
        check_eq!(taken(), [entered], "{} bytes of the list mapped", inside);
        undo(&[]);
    }
    Ok(())
}

/// A flat data segment for ring 3.
const FLAT_DATA: u64 = 0x00cf_f300_0000_ffff;

fn set_gdt_handles(_: &mut Domain) -> Verdict {
    let page = TablePage::new(&[(3, FLAT_DATA)])?;
    let loaded = || {
        let loads = probe!("mov fs, {s:e}"; s = in(reg) 0x1b).is_ok();
        let _ = probe!("mov fs, {s:e}"; s = in(reg) 0);
        vec![u64::from(loads)]
    };
    let mut nothing = [0u64];
    check_eq!(loaded(), [0]);
    run(&[Row::new(
        "the frames",
        || longs(&[page.mfn()]),
        |address| call(Hypercall::SetGdt, [address, 512, 0, 0, 0]),
    )
    .effect(|_, _| loaded() == [1])
    .state(loaded)
    .undo(|_| call(Hypercall::SetGdt, [at(&mut nothing.clone()), 0, 0, 0, 0]))])?;
    check_eq!(call(Hypercall::SetGdt, [at(&mut nothing), 0, 0, 0, 0]), Ok(0));
    Ok(())
}

fn callback_handles(_: &mut Domain) -> Verdict {
    let own = own_trap as *const () as u64;
    let nmi = CallbackType::Nmi.number() as u16;
    // Whether it is the own handler that an NMI comes to; the other is a second entry to the same stub that does not count.
    let taken = || {
        traps_after(|| {
            assert_eq!(call(Hypercall::VcpuOp, [VcpuOp::SendNmi.number().into(), 0, 0, 0, 0]), Ok(0));
        })
    };
    let register = |address: u64| {
        let mut request = NmiCallback { handler_address: address, pad: 0 };
        assert_eq!(call(Hypercall::NmiOp, [0, at(&mut request), 0, 0, 0]), Ok(0));
    };
    let silent = silent_trap as *const () as u64;
    register(silent);
    check_eq!(taken(), [0]);
    let callback = CallbackRegister {
        kind: nmi,
        address: guest_sdk::abi::VirtAddr::new(own),
        ..FromZeros::new_zeroed()
    };
    let undo = |_: &[u64]| register(silent);
    let event = CallbackUnregister { kind: 0, unused: 0 };
    let verdict = run(&[
        Row::operation(
            "callback_op register",
            Hypercall::CallbackOp,
            CallbackOp::Register.number(),
            &callback,
        )
        .effect(|_, _| taken() == [1])
        .state(taken)
        .undo(undo),
        Row::operation(
            "callback_op unregister",
            Hypercall::CallbackOp,
            CallbackOp::Unregister.number(),
            &event,
        )
        .refused(Errno::EINVAL),
        Row::operation(
            "nmi_op",
            Hypercall::NmiOp,
            NmiOp::RegisterCallback.number(),
            &NmiCallback { handler_address: own, pad: 0 },
        )
        .effect(|_, _| taken() == [1])
        .state(taken)
        .undo(undo),
    ]);
    check_eq!(call(Hypercall::NmiOp, [NmiOp::UnregisterCallback.number().into(), 0, 0, 0, 0]), Ok(0));
    verdict
}

/// Goes back at once.
#[unsafe(naked)]
unsafe extern "C" fn silent_trap() {
    core::arch::naked_asm!(
        "pop rcx",
        "pop r11",
        "push 0",
        "push rcx",
        "push r11",
        "push rax",
        "mov eax, 23",
        "syscall",
        "ud2",
    )
}

// ---- Devices.

fn console_io_handles(_: &mut Domain) -> Verdict {
    // Blanks, so that what is written does not get between the lines of the cases.
    let write = |address| call(Hypercall::ConsoleIo, [0, 2, address, 0, 0]);
    let read = |address| call(Hypercall::ConsoleIo, [1, 16, address, 0, 0]);
    let row = Row::new("write", || b" \n".to_vec(), write);
    let into = Row::new("read", || vec![0xee; 16], read);
    if !is_privileged() {
        // Xen hears unprivileged domains only when it was built for debugging.
        let refused = Err(Errno::EPERM);
        return run(&[row.refused(Errno::EPERM).bad(refused), into.refused(Errno::EPERM).bad(refused)]);
    }
    // Nobody types: there is nothing to store, wherever it is to go.
    run(&[row, into.bad(Ok(0)).effect(|count, after| count == 0 && after == [0xee; 16])])
}

fn physdev_row<T: IntoBytes + zerocopy::Immutable>(what: &str, command: PhysdevOp, argument: T) -> Row<'_> {
    Row::operation(what, Hypercall::PhysdevOp, command.number(), &argument)
}

fn iopl(level: u32) -> Result<u64, Errno> {
    physdev(PhysdevOp::SetIopl, &mut PhysdevSetIopl { iopl: level })
}

/// Whether the kernel may read a port.
fn port_opens() -> Vec<u64> {
    vec![u64::from(probe!("in al, 0x71").is_ok())]
}

fn physdev_op_handles(_: &mut Domain) -> Verdict {
    static OPEN: [u8; 32] = [0; 32];
    let bitmap = (&raw const OPEN) as u64;
    let set = |bitmap: u64| {
        let request = PhysdevSetIobitmap { bitmap: GuestHandle::new(bitmap), nr_ports: 256, pad0: 0 };
        physdev(PhysdevOp::SetIobitmap, &mut { request })
    };
    let take_back = |_: &[u64]| physdev(PhysdevOp::SetIobitmap, &mut PhysdevSetIobitmap::new_zeroed());
    let request = PhysdevSetIobitmap { bitmap: GuestHandle::new(bitmap), nr_ports: 256, pad0: 0 };
    check_eq!(iopl(0), Ok(0));
    check_eq!(port_opens(), [0]);
    run(&[
        physdev_row("set_iopl", PhysdevOp::SetIopl, PhysdevSetIopl { iopl: 1 })
            .effect(|_, _| port_opens() == [1])
            .state(port_opens)
            .undo(|_| iopl(0)),
        Row::new(
            "set_iopl in the old form",
            || words(&[PhysdevOp::SetIopl.number(), 0, 1, 0, 0, 0]),
            |address| call(Hypercall::PhysdevOpCompat, [address, 0, 0, 0, 0]),
        )
        .effect(|_, _| port_opens() == [1])
        .state(port_opens)
        .undo(|_| iopl(0)),
        physdev_row("set_iobitmap", PhysdevOp::SetIobitmap, request)
            .effect(|_, _| port_opens() == [1])
            .state(port_opens)
            .undo(take_back),
        // A bitmap that cannot be read opens nothing.
        Row::new("the bitmap", || vec![0; 32], set)
            .effect(|_, _| port_opens() == [1])
            .state(port_opens)
            .undo(take_back)
            .bad(Ok(0))
            .except(Kind::NonCanonical, Err(Errno::EINVAL))
            .except(Kind::Hypervisor, Err(Errno::EINVAL))
            // Part of a bitmap opens part of the ports.
            .without(Kind::Partial),
        physdev_row("irq_status_query", PhysdevOp::IrqStatusQuery, [0u32; 2]).output(),
        // Every call takes a number, told or not; there are more than these rows take.
        physdev_row("get_free_pirq", PhysdevOp::GetFreePirq, [1u32, 0])
            .output()
            .effect(|_, after| word(after, 1) != 0),
    ])
}

/// Commands that say no for what the argument holds, once they have read it.
fn physdev_op_refused(_: &mut Domain) -> Verdict {
    let no_right = |privileged| by_privilege(privileged, Errno::EPERM);
    let nobody = DomId::new(7777);
    // The right is asked for first.
    let later = |row: Row<'static>, privileged| {
        let row = row.refused(no_right(privileged));
        if is_privileged() { row } else { row.bad(Err(Errno::EPERM)) }
    };
    let far = PhysdevPciDevice { seg: 0, bus: 0x77, devfn: 0xff };
    let bus = PhysdevManagePci { bus: 0x77, devfn: 0xff };
    let debug_port = physdev_row("dbgp_op", PhysdevOp::DbgpOp, [1u8, 0, 0, 0, 0, 0]);
    run(&[
        physdev_row("set_iopl", PhysdevOp::SetIopl, PhysdevSetIopl { iopl: 4 }).refused(Errno::EINVAL),
        {
            let row = physdev_row("apic_read", PhysdevOp::ApicRead, [0x1000u64, 0])
                .refused(no_right(Errno::EINVAL));
            // With the right, what was read is written back all the same.
            if is_privileged() { row.output() } else { row }
        },
        physdev_row("apic_write", PhysdevOp::ApicWrite, [0x1000u64, 0]).refused(no_right(Errno::EINVAL)),
        physdev_row("eoi", PhysdevOp::Eoi, PhysdevEoi { irq: 4096 }).refused(Errno::EINVAL),
        physdev_row(
            "map_pirq",
            PhysdevOp::MapPirq,
            PhysdevMapPirq { domid: nobody, kind: 1, ..FromZeros::new_zeroed() },
        )
        .output()
        .refused(Errno::ESRCH),
        physdev_row(
            "unmap_pirq",
            PhysdevOp::UnmapPirq,
            PhysdevUnmapPirq { domid: nobody, ..FromZeros::new_zeroed() },
        )
        .refused(Errno::ESRCH),
        physdev_row("manage_pci_remove", PhysdevOp::ManagePciRemove, bus).refused(no_right(Errno::ENODEV)),
        physdev_row("pirq_eoi_gmfn_v1", PhysdevOp::PirqEoiGmfnV1, [1u64 << 32]).refused(Errno::EINVAL),
        physdev_row("pirq_eoi_gmfn_v2", PhysdevOp::PirqEoiGmfnV2, [1u64 << 32]).refused(Errno::EINVAL),
        physdev_row("restore_msi", PhysdevOp::RestoreMsi, bus).refused(Errno::ENODEV),
        physdev_row("restore_msi_ext", PhysdevOp::RestoreMsiExt, far).refused(Errno::ENODEV),
        physdev_row("setup_gsi", PhysdevOp::SetupGsi, [4096u32, 0]).refused(Errno::EINVAL),
        physdev_row("pci_device_remove", PhysdevOp::PciDeviceRemove, far).refused(no_right(Errno::ENODEV)),
        physdev_row("prepare_msix", PhysdevOp::PrepareMsix, far).refused(no_right(Errno::ENODEV)),
        physdev_row("release_msix", PhysdevOp::ReleaseMsix, far).refused(no_right(Errno::ENODEV)),
        if is_privileged() {
            // Told of a debug port that nobody uses.
            debug_port
        } else {
            debug_port.refused(Errno::EPERM).bad(Err(Errno::EPERM))
        },
        later(physdev_row("pci_mmcfg_reserved", PhysdevOp::PciMmcfgReserved, [0x1000u64, 0]), Errno::ENODEV),
    ])?;
    if is_privileged() {
        // With the right, these would tell Xen of a device, or take a number from it.
        return Ok(());
    }
    let add = Errno::EPERM;
    run(&[
        physdev_row("manage_pci_add", PhysdevOp::ManagePciAdd, bus).refused(add),
        physdev_row("manage_pci_add_ext", PhysdevOp::ManagePciAddExt, [0u32; 4]).refused(add),
        physdev_row("pci_device_add", PhysdevOp::PciDeviceAdd, [0u32; 3]).refused(add),
        physdev_row("alloc_irq_vector", PhysdevOp::AllocIrqVector, [5u32, 0]).refused(add),
    ])
}

// ---- Calls for others.

fn hvm_op_handles(_: &mut Domain) -> Verdict {
    fn row(what: &str, command: HvmOp, content: Vec<u8>) -> Row<'_> {
        let operation = move |address| call(Hypercall::HvmOp, [command.number().into(), address, 0, 0, 0]);
        Row::new(what, move || content.clone(), operation)
    }
    let itself = u64::from(DomId::SELF.get());
    run(&[
        row("get_time", HvmOp::GetTime, vec![0; 8]).output().effect(|_, after| long(after, 0) != 0),
        row("get_param", HvmOp::GetParam, longs(&[itself, 0])).refused(Errno::EINVAL),
        row("set_param", HvmOp::SetParam, longs(&[itself, 0])).refused(Errno::EINVAL),
        row("get_mem_type", HvmOp::GetMemType, longs(&[itself, 0])).refused(Errno::EINVAL),
        row("pagetable_dying", HvmOp::PagetableDying, longs(&[itself, 0])).refused(Errno::EINVAL),
    ])?;
    // The buffers of dm_op, for the caller itself, which is refused when they are read.
    let nobody = |address| call(Hypercall::DmOp, [7777, 1, address, 0, 0]);
    run(&[Row::new("dm_op's buffers", || longs(&[0, 0]), nobody).refused(Errno::ESRCH)])
}

/// Calls by which Xen's own tools administer the machine: the head of the argument is read before anything else.
fn tools_calls_handles(_: &mut Domain) -> Verdict {
    fn row(what: &str, which: Hypercall, length: usize) -> Row<'_> {
        // Another version of the interface than any.
        Row::new(what, move || vec![0xee; length], move |address| call(which, [address, 0, 0, 0, 0]))
            .refused(Errno::EACCES)
    }
    let before = ports();
    check!(before.iter().any(|port| *port != 0) || reservation() > 0);
    run(&[
        row("platform_op", Hypercall::PlatformOp, 136),
        row("sysctl", Hypercall::Sysctl, 136),
        row("domctl", Hypercall::Domctl, 144),
    ])
}

// ---- The FIFO form of event channels.

/// Behind everything else: going back from the form closes every port.
fn fifo_handles(_: &mut Domain) -> Verdict {
    const OFFSET: u32 = 64;
    const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;
    // The hypervisor writes both pages, also after this case: they are kept for ever.
    let (block, array) = (Page::new()?, Page::new()?);
    let (block_frame, array_frame) = (block.mfn().get(), array.mfn().get());
    let (block, array) = (block.leak() + u64::from(OFFSET), array.leak());
    fn half(address: u64) -> &'static AtomicU32 {
        // SAFETY: aligned, in a page that was leaked; everybody accesses it atomically.
        unsafe { AtomicU32::from_ptr(address as *mut u32) }
    }
    let reset = || {
        assert_eq!(evtchn(EvtchnOp::Reset, &mut EvtchnReset { dom: DomId::SELF }), Ok(0));
        for word in 0..1024 {
            half(array + word * 4).store(0, Ordering::SeqCst);
        }
        half(block).store(0, Ordering::SeqCst);
    };
    let control =
        EvtchnInitControl { control_gfn: Gfn::new(block_frame), offset: OFFSET, ..FromZeros::new_zeroed() };
    let page = EvtchnExpandArray { array_gfn: Gfn::new(array_frame) };
    // A page that cannot be: the answer tells the forms apart.
    let chosen = || {
        let nowhere = &mut EvtchnExpandArray { array_gfn: Gfn::new(1 << 40) };
        vec![u64::from(evtchn(EvtchnOp::ExpandArray, nowhere) == Err(Errno::EINVAL))]
    };
    let send = |port: Port| assert_eq!(evtchn(EvtchnOp::Send, &mut EvtchnSend { port }), Ok(0));
    // Whether an event gets to its word.
    let arrayed = || {
        let port = ipi().expect("a free port");
        send(port);
        let there = half(array + u64::from(port.get()) * 4).load(Ordering::SeqCst) & PENDING != 0;
        close(port).expect("an own port");
        vec![u64::from(there)]
    };
    let choose = || assert_eq!(evtchn(EvtchnOp::InitControl, &mut control.clone()), Ok(0));
    fn row<T: IntoBytes + zerocopy::Immutable>(what: &str, command: EvtchnOp, argument: T) -> Row<'_> {
        Row::operation(what, Hypercall::EventChannelOp, command.number(), &argument)
    }
    reset();
    run(&[row("init_control", EvtchnOp::InitControl, control)
        .answer()
        .effect(|_, after| chosen() == [1] && after[16] == EVTCHN_FIFO_LINK_BITS as u8)
        .state(chosen)
        .undo(|_| reset())])?;
    choose();
    check_eq!(arrayed(), [0]);
    run(&[row("expand_array", EvtchnOp::ExpandArray, page)
        .effect(|_, _| arrayed() == [1])
        .state(arrayed)
        .undo(|_| {
            reset();
            choose();
        })])?;
    check_eq!(evtchn(EvtchnOp::ExpandArray, &mut page.clone()), Ok(0));
    let own = ipi()?;
    // The queue that an event is in, as a bit of those that have one.
    let queue = || {
        send(own);
        half(array + u64::from(own.get()) * 4).store(0, Ordering::SeqCst);
        vec![half(block).swap(0, Ordering::SeqCst).into()]
    };
    check_eq!(queue(), [1 << EVTCHN_FIFO_PRIORITY_DEFAULT]);
    let verdict =
        run(&[row("set_priority", EvtchnOp::SetPriority, EvtchnSetPriority { port: own, priority: 3 })
            .effect(|_, _| queue() == [1 << 3])
            .state(queue)
            .undo(|_| {
                let priority = EVTCHN_FIFO_PRIORITY_DEFAULT;
                evtchn(EvtchnOp::SetPriority, &mut EvtchnSetPriority { port: own, priority })
            })]);
    reset();
    verdict
}

//! Whose: every kind of domain number for every call that takes one, and frames, ports and references that are others' or
//! nobody's.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use core::cell::Cell;

use conformance::owners::{Outcome, Refusal, Row, Who, domains, granted, run};
use conformance::peer::{self, wait_until};
use conformance::state::{number, set_mask};
use conformance::{
    NOWHERE, SELF, TablePage, at, call, evtchn, grant, is_privileged, memop, mmuext, physdev, pte, sched,
    vcpu,
};
use guest_sdk::abi::evtchn::*;
use guest_sdk::abi::grant::*;
use guest_sdk::abi::memory::*;
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use guest_sdk::abi::physdev::{PhysdevMapPirq, PhysdevUnmapPirq};
use guest_sdk::abi::sched::{SchedRemoteShutdown, ShutdownReason};
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::{EvtchnOp, GnttabOp, HvmOp, MemoryOp, MmuextCmd, PhysdevOp, SchedOp, VcpuOp};
use guest_sdk::abi::vcpu::VcpuRegisterVcpuInfo;
use guest_sdk::abi::{DomId, Errno, Gfn, GrantRef, GuestHandle, Hypercall, MachAddr, Port};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, try_read};
use guest_sdk::{Domain, entry};
use spin::Once;
use zerocopy::FromZeros;

#[entry]
fn main(domain: Domain) {
    peer::connect(&domain);
    testkit::run(
        domain,
        &cases![
            event_channel_domains,
            memory_domains,
            reservation_domains,
            page_table_domains,
            grant_domains,
            other_domains,
            frames_of_others,
            tables_of_others,
            ports_of_others,
            references_of_others,
            vcpus_of_nobody,
        ],
    )
}

const fn no<T>(errno: Errno) -> Result<T, Refusal> {
    Err(Refusal::Errno(errno))
}

const fn status<T>(status: i16) -> Result<T, Refusal> {
    Err(Refusal::Status(status))
}

fn done(answer: Result<u64, Errno>) -> Outcome {
    answer.map(drop).map_err(Refusal::from)
}

/// What a domain gets that has no right over others, and what dom0, which has it, gets.
fn by_right(privileged: Outcome, other: Outcome) -> Outcome {
    if is_privileged() { privileged } else { other }
}

/// Every kind of number; a peer is ended for it once.
fn everybody(domain: &Domain) -> Result<Vec<(Who, DomId)>, Stop> {
    if is_privileged() {
        return Ok(domains(domain.id(), &[], &[]));
    }
    static DEAD: Once<DomId> = Once::new();
    if DEAD.get().is_none() {
        let ended = peer::mortal()?.end(ShutdownReason::Poweroff)?;
        let mut query = EvtchnStatus { dom: ended, ..FromZeros::new_zeroed() };
        check!(wait_until(|| evtchn(EvtchnOp::Status, &mut query) == Err(Errno::ESRCH)), "it is gone");
        DEAD.call_once(|| ended);
    }
    let dead = DEAD.get().copied().into_iter().collect::<Vec<_>>();
    Ok(domains(domain.id(), &[DomId::ZERO, peer::any()?.domain()], &dead))
}

const CALLER: [Who; 2] = [Who::SelfName, Who::Own];

// ---- Domain numbers.

fn event_channel_domains(domain: &mut Domain) -> Verdict {
    let opened = Cell::new(0);
    let close = || evtchn(EvtchnOp::Close, &mut EvtchnClose { port: Port::new(opened.get()) });
    let alloc = |dom, remote_dom| {
        let mut argument = EvtchnAllocUnbound { dom, remote_dom, port: Port::new(0) };
        let answer = evtchn(EvtchnOp::AllocUnbound, &mut argument);
        opened.set(argument.port.get());
        done(answer)
    };
    let waiting = {
        alloc(DomId::SELF, DomId::SELF).map_err(|_| "no port")?;
        Port::new(opened.get())
    };
    let bind = |remote_dom| {
        let mut argument =
            EvtchnBindInterdomain { remote_dom, remote_port: waiting, ..FromZeros::new_zeroed() };
        let answer = evtchn(EvtchnOp::BindInterdomain, &mut argument);
        opened.set(argument.local_port.get());
        done(answer)
    };
    let query = |dom| {
        let mut argument = EvtchnStatus { dom, port: waiting, ..FromZeros::new_zeroed() };
        done(evtchn(EvtchnOp::Status, &mut argument))
    };
    let verdict = run(
        &everybody(domain)?,
        &[
            Row::new("alloc_unbound's dom", |dom| alloc(dom, DomId::SELF), no(Errno::ESRCH))
                .with(&CALLER, Ok(()))
                .with(&[Who::Other], no(Errno::EPERM))
                .undo(close),
            // Whoever it is for need not be there yet.
            Row::new("alloc_unbound's remote_dom", |remote| alloc(DomId::SELF, remote), Ok(())).undo(close),
            Row::new("bind_interdomain", bind, no(Errno::ESRCH))
                .with(&CALLER, Ok(()))
                .with(&[Who::Other], no(Errno::EINVAL))
                .undo(close),
            Row::new("status", query, no(Errno::ESRCH))
                .with(&CALLER, Ok(()))
                .with(&[Who::Other], no(Errno::EPERM)),
            Row::new(
                "reset",
                |dom| done(evtchn(EvtchnOp::Reset, &mut EvtchnReset { dom })),
                no(Errno::ESRCH),
            )
            // All ports of the caller would be closed.
            .without(&CALLER)
            .with(&[Who::Other], no(Errno::EPERM)),
        ],
    );
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port: waiting })?;
    verdict
}

fn memory_domains(domain: &mut Domain) -> Verdict {
    let query = |command: MemoryOp| move |domid| done(memop(command, &mut MemoryDomain { domid }));
    fn others<'a>(row: Row<'a, Who, DomId>) -> Row<'a, Who, DomId> {
        row.with(&CALLER, Ok(())).with(&[Who::Other], no(Errno::EPERM))
    }
    let set_map = |domid| {
        let mut entry = E820Entry { addr: 0, size: 1 << 24, kind: E820_RAM };
        let map = MemoryMap { nr_entries: 1, pad0: 0, buffer: GuestHandle::new(at(&mut entry)) };
        done(memop(MemoryOp::SetMemoryMap, &mut ForeignMemoryMap { domid, map, ..FromZeros::new_zeroed() }))
    };
    let vnuma = |domid| {
        done(memop(MemoryOp::GetVnumainfo, &mut VnumaTopologyInfo { domid, ..FromZeros::new_zeroed() }))
    };
    let claim = |domid| {
        done(memop(MemoryOp::ClaimPages, &mut MemoryReservation { domid, ..MemoryReservation::default() }))
    };
    let physmap = |command: MemoryOp| {
        move |domid: DomId| done(memop(command, &mut [u64::from(domid.get()), 0, 0, 0, 0, 0]))
    };
    let pod = |command: MemoryOp| {
        move |domid| done(memop(command, &mut PodTarget { domid, ..FromZeros::new_zeroed() }))
    };
    let access =
        |domid| done(memop(MemoryOp::AccessOp, &mut AccessOpArgument { domid, ..FromZeros::new_zeroed() }));
    let resource = |domid| {
        done(memop(
            MemoryOp::AcquireResource,
            &mut AcquireResource { domid, kind: 1, ..FromZeros::new_zeroed() },
        ))
    };
    let translated = |row: Row<'static, Who, DomId>| {
        row.with(&CALLER, no(Errno::EACCES)).with(&[Who::Other], no(Errno::EACCES))
    };
    run(
        &everybody(domain)?,
        &[
            others(Row::new("current_reservation", query(MemoryOp::CurrentReservation), no(Errno::ESRCH))),
            others(Row::new("maximum_reservation", query(MemoryOp::MaximumReservation), no(Errno::ESRCH))),
            others(Row::new("maximum_gpfn", query(MemoryOp::MaximumGpfn), no(Errno::ESRCH))),
            others(Row::new("set_memory_map", set_map, no(Errno::ESRCH))),
            Row::new("get_vnumainfo", vnuma, no(Errno::ESRCH))
                .with(&CALLER, no(Errno::EOPNOTSUPP))
                .with(&[Who::Other], no(Errno::EPERM)),
            Row::new("claim_pages", claim, no(Errno::EINVAL))
                .with(&[Who::Own], by_right(Ok(()), no(Errno::EPERM)))
                .with(&[Who::Other], no(Errno::EPERM)),
            translated(Row::new("add_to_physmap", physmap(MemoryOp::AddToPhysmap), no(Errno::ESRCH))),
            translated(Row::new(
                "remove_from_physmap",
                physmap(MemoryOp::RemoveFromPhysmap),
                no(Errno::ESRCH),
            )),
            Row::new("set_pod_target", pod(MemoryOp::SetPodTarget), no(Errno::ESRCH))
                .with(&CALLER, no(Errno::EINVAL))
                .with(&[Who::Other], no(Errno::EINVAL)),
            Row::new("get_pod_target", pod(MemoryOp::GetPodTarget), no(Errno::ESRCH))
                .with(&CALLER, no(Errno::EINVAL))
                .with(&[Who::Other], no(Errno::EINVAL)),
            Row::new("access_op", access, no(Errno::ESRCH))
                .with(&[Who::Own], no(Errno::EPERM))
                .with(&[Who::Other], no(Errno::EINVAL)),
            Row::new("acquire_resource", resource, no(Errno::ESRCH))
                .with(&[Who::Own, Who::Other], no(Errno::EPERM)),
        ],
    )
}

/// A frame of this domain to which nothing refers.
fn spare() -> Result<u64, Stop> {
    let page = Page::new()?;
    let frame = page.mfn().get();
    // SAFETY: nobody uses the address again.
    unsafe { memory::set_leaf(page.leak(), 0)? };
    Ok(frame)
}

/// The commands that only say how many extents they did.
fn reservation_domains(domain: &mut Domain) -> Verdict {
    let list = Cell::new([spare()?]);
    let adjust = |command: MemoryOp, domid| {
        let extent_start = GuestHandle::new(list.as_ptr() as u64);
        let mut request =
            MemoryReservation { extent_start, nr_extents: 1, domid, ..MemoryReservation::default() };
        match memop(command, &mut request)? {
            1 => Ok(()),
            _ => status(0),
        }
    };
    let decrease = |domid| adjust(MemoryOp::DecreaseReservation, domid);
    let increase = |domid| adjust(MemoryOp::IncreaseReservation, domid);
    let populate = |domid| adjust(MemoryOp::PopulatePhysmap, domid);
    let exchange = |domid| {
        let mut output = [0x7654u64];
        let reservation = |list: u64| MemoryReservation {
            extent_start: GuestHandle::new(list),
            nr_extents: 1,
            domid,
            ..MemoryReservation::default()
        };
        let mut request = MemoryExchange {
            input: reservation(list.as_ptr() as u64),
            output: reservation(at(&mut output)),
            nr_exchanged: 0,
        };
        memop(MemoryOp::Exchange, &mut request)?;
        list.set(output);
        Ok(())
    };
    let everybody = everybody(domain)?;
    run(
        &everybody,
        &[
            Row::new("decrease_reservation", decrease, status(0))
                .with(&CALLER, Ok(()))
                .undo(|| assert_eq!(increase(DomId::SELF), Ok(()))),
            Row::new("exchange", exchange, no(Errno::ESRCH))
                .with(&CALLER, Ok(()))
                .with(&[Who::Other], no(Errno::EPERM)),
        ],
    )?;
    // Room for one more.
    check_eq!(decrease(DomId::SELF), Ok(()));
    let verdict = run(
        &everybody,
        &[
            Row::new("increase_reservation", increase, status(0))
                .with(&CALLER, Ok(()))
                .undo(|| assert_eq!(decrease(DomId::SELF), Ok(()))),
            Row::new("populate_physmap", populate, status(0))
                .with(&CALLER, Ok(()))
                .undo(|| assert_eq!(decrease(DomId::SELF), Ok(()))),
        ],
    );
    check_eq!(increase(DomId::SELF), Ok(()));
    verdict
}

fn m2p(frame: u64) -> u64 {
    try_read(MACH2PHYS_VIRT_START + frame * 8).expect("an entry for a frame of this domain")
}

fn machphys(frame: u64, value: u64, whose: u64) -> Outcome {
    let mut request = MmuUpdate::new(MmuCommand::MachphysUpdate, MachAddr::new(frame << 12), value);
    done(call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, whose, 0]))
}

fn page_table_domains(domain: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let frame = page.mfn().get();
    let before = m2p(frame);
    let range = Range::new(1)?;
    // SAFETY: an own page's first word, by raw pointers only.
    let word = || unsafe { (page.address() as *const u64).read_volatile() };
    // SAFETY: as above.
    let fill = || unsafe { (page.address() as *mut u64).write_volatile(0x5a5a) };
    fill();
    let clear = |whose: DomId| {
        let mut operation = MmuextOp::new(MmuextCmd::ClearPage, frame, 0);
        done(call(Hypercall::MmuextOp, [at(&mut operation), 1, 0, whose.get().into(), 0]))
    };
    let flush = |whose: DomId| {
        let mut operation = MmuextOp::new(MmuextCmd::TlbFlushLocal, 0, 0);
        done(call(Hypercall::MmuextOp, [at(&mut operation), 1, 0, whose.get().into(), 0]))
    };
    let map = |whose: DomId| {
        let entry = pte(frame, Access::Read.bits());
        done(call(Hypercall::UpdateVaMappingOtherdomain, [range.start(), entry, 2, whose.get().into(), 0]))
    };
    let machphys_of = |whose: DomId| machphys(frame, 0x4321, whose.get().into());
    let tables_of = |whose: DomId| machphys(frame, 0x4321, (u64::from(whose.get()) + 1) << 16 | SELF);
    let shown = || vec![number(try_read(range.start()).map_err(|_| Errno::EFAULT))];
    let told = || vec![m2p(frame)];
    let put_back = || assert_eq!(machphys(frame, before, SELF), Ok(()));
    run(
        &everybody(domain)?,
        &[
            Row::new("mmu_update's frames", machphys_of, no(Errno::ESRCH))
                .with(&[Who::SelfName], Ok(()))
                .with(&[Who::Other], no(Errno::EPERM))
                .with(&[Who::Io], no(Errno::EINVAL))
                .with(&[Who::Xen], by_right(no(Errno::EINVAL), no(Errno::EPERM)))
                .state(told)
                .undo(put_back),
            Row::new("mmu_update's tables", tables_of, no(Errno::ESRCH))
                .with(&[Who::Own], Ok(()))
                .with(&[Who::Other], no(Errno::EPERM))
                .state(told)
                .undo(put_back),
            Row::new("mmuext_op's page", clear, no(Errno::ESRCH))
                .with(&[Who::SelfName], Ok(()))
                .with(&[Who::Other], no(Errno::EPERM))
                .with(&[Who::Io, Who::Xen], by_right(no(Errno::EINVAL), no(Errno::EPERM)))
                .state(|| vec![word()])
                .undo(fill),
            Row::new("mmuext_op's flush", flush, no(Errno::ESRCH))
                .with(&[Who::SelfName], Ok(()))
                .with(&[Who::Other, Who::Io, Who::Xen], no(Errno::EPERM)),
            Row::new("update_va_mapping_otherdomain", map, no(Errno::ESRCH))
                .with(&[Who::SelfName], Ok(()))
                .with(&[Who::Other], no(Errno::EPERM))
                .with(&[Who::Io], by_right(no(Errno::EBUSY), no(Errno::EPERM)))
                .with(&[Who::Xen], by_right(no(Errno::EBUSY), no(Errno::EPERM)))
                .state(shown)
                .undo(|| range.unmap(0)),
        ],
    )
}

fn grant_domains(domain: &mut Domain) -> Verdict {
    let own = domain.id();
    // A reference under which the peer has granted nothing: its first leads to the page by which we talk to it.
    let first = domain.grants.grant_new(own, Access::ReadWrite)?;
    let entry = domain.grants.grant_new(own, Access::ReadWrite)?;
    let (from, to) = (Page::new()?, Page::new()?);
    let range = Range::new(1)?;
    // SAFETY: own pages' first words, by raw pointers only.
    unsafe { (from.address() as *mut u64).write_volatile(0x77) };
    let copied = || vec![try_read(to.address()).expect("an own page")];
    // SAFETY: as above.
    let clear = || unsafe { (to.address() as *mut u64).write_volatile(0) };
    let copy = |source: GnttabCopyPtr, dest: GnttabCopyPtr| {
        let mut operation = GnttabCopy { source, dest, len: 8, ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::Copy, &mut operation);
        granted(answer, operation.status)
    };
    let (source, target) = (GnttabCopyPtr::own(from.mfn(), 0), GnttabCopyPtr::own(to.mfn(), 0));
    let handle = Cell::new(0);
    let map = |dom| {
        let mut operation = GnttabMapGrantRef {
            host_addr: range.start(),
            flags: MapFlags::HOST_MAP.bits(),
            gref: entry.reference(),
            dom,
            ..FromZeros::new_zeroed()
        };
        let answer = grant(GnttabOp::MapGrantRef, &mut operation);
        handle.set(operation.handle);
        granted(answer, operation.status)
    };
    let unmap = || {
        let mut operation =
            GnttabUnmapGrantRef { host_addr: range.start(), handle: handle.get(), ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::UnmapGrantRef, &mut operation);
        assert_eq!(granted(answer, operation.status), Ok(()));
    };
    let setup = |dom| {
        let mut operation = GnttabSetupTable { dom, status: 77, ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::SetupTable, &mut operation);
        granted(answer, operation.status)
    };
    let size = |dom| {
        let mut operation = GnttabQuerySize { dom, status: 77, ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::QuerySize, &mut operation);
        granted(answer, operation.status)
    };
    let frames = |dom| {
        let mut operation = GnttabGetStatusFrames { dom, status: 77, ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::GetStatusFrames, &mut operation);
        granted(answer, operation.status)
    };
    let version =
        |dom| done(grant(GnttabOp::GetVersion, &mut GnttabGetVersion { dom, ..FromZeros::new_zeroed() }));
    let bad = status(GNTST_BAD_DOMAIN);
    let denied = status(GNTST_PERMISSION_DENIED);
    fn table<'a>(row: Row<'a, Who, DomId>, denied: Outcome) -> Row<'a, Who, DomId> {
        row.with(&CALLER, Ok(())).with(&[Who::Other], denied)
    }
    let verdict = run(
        &everybody(domain)?,
        &[
            table(Row::new("setup_table", setup, bad), denied),
            table(Row::new("query_size", size, bad), denied),
            table(Row::new("get_status_frames", frames, bad), denied),
            table(Row::new("get_version", version, no(Errno::ESRCH)), no(Errno::EPERM)),
            // Another has not granted this.
            Row::new("map_grant_ref", map, bad)
                .with(&[Who::Own], Ok(()))
                .with(&[Who::Other], status(GNTST_GENERAL_ERROR))
                .state(|| vec![memory::leaf(range.start()).map_or(0, |entry| entry & 1)])
                .undo(unmap),
            Row::new("copy's source", |domid| copy(GnttabCopyPtr { domid, ..source }, target), bad)
                // By its name only.
                .with(&[Who::SelfName], Ok(()))
                .with(&[Who::Own, Who::Other], denied)
                .state(copied)
                .undo(clear),
            Row::new("copy's destination", |domid| copy(source, GnttabCopyPtr { domid, ..target }), bad)
                // By its name only.
                .with(&[Who::SelfName], Ok(()))
                .with(&[Who::Own, Who::Other], denied)
                .state(copied)
                .undo(clear),
        ],
    );
    drop(first);
    verdict
}

fn other_domains(domain: &mut Domain) -> Verdict {
    let shutdown = |domain_id| {
        done(sched(
            SchedOp::RemoteShutdown,
            &mut SchedRemoteShutdown { domain_id, ..FromZeros::new_zeroed() },
        ))
    };
    let map = |domid| {
        done(physdev(PhysdevOp::MapPirq, &mut PhysdevMapPirq { domid, kind: 77, ..FromZeros::new_zeroed() }))
    };
    let unmap =
        |domid| done(physdev(PhysdevOp::UnmapPirq, &mut PhysdevUnmapPirq { domid, pad0: 0, pirq: 4000 }));
    let param = |command: HvmOp| {
        move |domid: DomId| {
            let mut argument = [u64::from(domid.get()), 0];
            done(call(Hypercall::HvmOp, [command.number().into(), at(&mut argument), 0, 0, 0]))
        }
    };
    let device = |domid: DomId| {
        let mut buffer = [0u64; 2];
        done(call(Hypercall::DmOp, [domid.get().into(), 1, at(&mut buffer), 0, 0]))
    };
    let translated = |row: Row<'static, Who, DomId>| {
        row.with(&CALLER, no(Errno::EINVAL)).with(&[Who::Other], no(Errno::EINVAL))
    };
    let own = domain.id();
    check_eq!(evtchn(EvtchnOp::Status, &mut EvtchnStatus { dom: own, ..FromZeros::new_zeroed() }), Ok(0));
    run(
        &everybody(domain)?,
        &[
            Row::new("remote_shutdown", shutdown, no(Errno::ESRCH))
                // It would be the end.
                .without(&[Who::Own])
                .with(&[Who::Other], no(Errno::EPERM)),
            Row::new("map_pirq", map, no(Errno::ESRCH))
                .with(&CALLER, by_right(no(Errno::EINVAL), no(Errno::EPERM)))
                .with(&[Who::Other], no(Errno::EPERM)),
            Row::new("unmap_pirq", unmap, no(Errno::ESRCH))
                .with(&CALLER, by_right(no(Errno::EINVAL), no(Errno::EPERM)))
                .with(&[Who::Other], no(Errno::EPERM)),
            translated(Row::new("hvm_op get_param", param(HvmOp::GetParam), no(Errno::ESRCH))),
            translated(Row::new("hvm_op set_param", param(HvmOp::SetParam), no(Errno::ESRCH))),
            Row::new("dm_op", device, no(Errno::ESRCH))
                .with(&[Who::Own], no(Errno::EPERM))
                .with(&[Who::Other], no(Errno::EINVAL)),
        ],
    )
}

// ---- Frames.

/// Kinds of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Frame {
    /// An own page, mapped writable at its place.
    Own,
    /// An own page, mapped for reading only.
    OwnReadOnly,
    /// An own page table, pinned.
    Table,
    /// The page shared with the hypervisor.
    Shared,
    /// A page of a peer.
    Peer,
    /// A table of the hypervisor's.
    Hypervisor,
    /// A frame of the machine-to-physical table.
    MachineToPhysical,
    /// Memory of a device: that of the interrupt controller.
    Device,
    /// Behind the end of memory, where there is nothing.
    Hole,
    /// A number that stands for no frame.
    Beyond,
}

struct Frames {
    all: Vec<(Frame, u64)>,
    own: Page,
    read_only: TablePage,
    table: TablePage,
    theirs: Option<peer::PeerPage>,
}

impl Frames {
    fn new() -> Result<Frames, Stop> {
        let (own, read_only, table) = (Page::new()?, TablePage::new(&[])?, TablePage::new(&[])?);
        check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
        let mut all = vec![
            (Frame::Own, own.mfn().get()),
            (Frame::OwnReadOnly, read_only.mfn()),
            (Frame::Table, table.mfn()),
        ];
        let shared = memory::translate(conformance::shared() as u64).ok_or("the shared page is mapped")?;
        all.push((Frame::Shared, shared.get()));
        all.push((Frame::Hypervisor, conformance::hypervisor_frame()?));
        let mut first = [0u64];
        let extent_start = GuestHandle::new(at(&mut first));
        memop(
            MemoryOp::MachphysMfnList,
            &mut MachphysMfnList { max_extents: 1, extent_start, ..Default::default() },
        )?;
        all.push((Frame::MachineToPhysical, first[0]));
        all.push((Frame::Device, 0xfee00));
        let last = call(Hypercall::MemoryOp, [MemoryOp::MaximumRamPage.number().into(), 0, 0, 0, 0])?;
        all.extend([(Frame::Hole, last + 0x1000), (Frame::Beyond, 0x00ff_ffff_ffff)]);
        let theirs = if is_privileged() { None } else { Some(peer::any()?.page()?) };
        all.extend(theirs.map(|page| (Frame::Peer, page.frame)));
        Ok(Frames { all, own, read_only, table, theirs })
    }

    /// What each of them holds, and the peer's with it.
    fn content(&self) -> Vec<u64> {
        let mut words = vec![try_read(self.own.address()).expect("an own page")];
        words.extend([self.read_only.word(0), self.table.word(0)]);
        words.extend(
            self.theirs.map(|page| peer::any().and_then(|peer| peer.read(page.address)).expect("it answers")),
        );
        words
    }

    fn end(self) -> Verdict {
        check_eq!(mmuext(MmuextCmd::UnpinTable, self.table.mfn(), 0), Ok(0));
        if let Some(page) = self.theirs {
            peer::any()?.free(page)?;
        }
        Ok(())
    }
}

fn frames_of_others(_: &mut Domain) -> Verdict {
    let frames = Frames::new()?;
    let range = Range::new(1)?;
    let mapped = || vec![memory::leaf(range.start()).unwrap_or(0) >> 12];
    let map = |access: Access| {
        move |start: u64| {
            move |frame: u64| {
                done(call(Hypercall::UpdateVaMapping, [start, pte(frame, access.bits()), 2, 0, 0]))
            }
        }
    };
    let by_list = |frame| {
        let place = memory::leaf_address(range.start()).expect("a table is there");
        let mut request =
            MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place), pte(frame, Access::Read.bits()));
        done(call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0]))
    };
    let unmap = || range.unmap(0);
    let hidden = [Frame::Hypervisor, Frame::MachineToPhysical, Frame::Peer];
    // For dom0 that is memory of devices, as far as it is not kept from it.
    let hole = by_right(Ok(()), no(Errno::EPERM));
    let readable = [Frame::Own, Frame::OwnReadOnly, Frame::Table, Frame::Shared];
    let writable = [Frame::Own, Frame::OwnReadOnly, Frame::Shared];
    let content = || frames.content();
    let fill = |word: u64| {
        // SAFETY: own pages' first words, by raw pointers only.
        unsafe { (frames.own.address() as *mut u64).write_volatile(word) };
    };
    fill(0x5a5a);
    let clear = |frame| done(mmuext(MmuextCmd::ClearPage, frame, 0));
    let copy_to = |frame| done(mmuext(MmuextCmd::CopyPage, frame, frames.own.mfn().get()));
    let copy_from = |frame| done(mmuext(MmuextCmd::CopyPage, frames.own.mfn().get(), frame));
    let give = |frame: u64| {
        let mut list = [frame];
        let extent_start = GuestHandle::new(at(&mut list));
        let request =
            MemoryReservation { extent_start, nr_extents: 1, domid: DomId::SELF, ..Default::default() };
        match memop(MemoryOp::DecreaseReservation, &mut { request })? {
            1 => Ok(()),
            _ => status(0),
        }
    };
    let exchange = |frame: u64| {
        let (mut input, mut output) = ([frame], [0x7654u64]);
        let reservation = |list: u64| MemoryReservation {
            extent_start: GuestHandle::new(list),
            nr_extents: 1,
            domid: DomId::SELF,
            ..MemoryReservation::default()
        };
        let mut request = MemoryExchange {
            input: reservation(at(&mut input)),
            output: reservation(at(&mut output)),
            nr_exchanged: 0,
        };
        done(memop(MemoryOp::Exchange, &mut request))
    };
    let told = |frame: u64| machphys(frame, 0x1111, SELF);
    let verdict = run(
        &frames.all,
        &[
            Row::new("mapped for reading", map(Access::Read)(range.start()), no(Errno::EINVAL))
                .with(&readable, Ok(()))
                .with(&hidden, no(Errno::EBUSY))
                .with(&[Frame::Device], no(Errno::EPERM))
                .with(&[Frame::Hole], hole)
                .state(mapped)
                .undo(unmap),
            Row::new("mapped for writing", map(Access::ReadWrite)(range.start()), no(Errno::EINVAL))
                .with(&writable, Ok(()))
                .with(&[Frame::Table], no(Errno::EBUSY))
                .with(&hidden, no(Errno::EBUSY))
                .with(&[Frame::Device], no(Errno::EPERM))
                .with(&[Frame::Hole], hole)
                .state(mapped)
                .undo(unmap),
            Row::new("mapped by a list", by_list, no(Errno::EINVAL))
                .with(&readable, Ok(()))
                .with(&hidden, no(Errno::EBUSY))
                .with(&[Frame::Device], no(Errno::EPERM))
                .with(&[Frame::Hole], hole)
                .state(mapped)
                .undo(unmap),
            Row::new("machphys_update", told, no(Errno::EINVAL)).with(&readable, Ok(())),
            Row::new("clear_page", clear, no(Errno::EINVAL))
                .with(&[Frame::Own], Ok(()))
                .without(&[Frame::OwnReadOnly, Frame::Shared])
                .state(content)
                .undo(|| fill(0x5a5a)),
            Row::new("copy_page to", copy_to, no(Errno::EINVAL))
                .with(&[Frame::Own], Ok(()))
                .without(&[Frame::Own, Frame::OwnReadOnly, Frame::Shared])
                .state(content),
            Row::new("copy_page from", copy_from, no(Errno::EINVAL))
                .with(&readable, Ok(()))
                .without(&[Frame::Own, Frame::Shared])
                .state(|| vec![content()[0]])
                .undo(|| fill(0x5a5a)),
            Row::new("decrease_reservation", give, status(0)).without(&readable).state(content),
            Row::new("exchange", exchange, no(Errno::EINVAL)).state(content),
        ],
    );
    let ended = frames.end();
    verdict.and(ended)
}

/// Frames that are to become a table of any kind, or something else that the hypervisor reads.
fn tables_of_others(_: &mut Domain) -> Verdict {
    let frames = Frames::new()?;
    let content = || frames.content();
    let pin = |command: MmuextCmd| move |frame| done(mmuext(command, frame, 0));
    let unpin = |frame: u64| move || assert_eq!(mmuext(MmuextCmd::UnpinTable, frame, 0), Ok(0));
    let gdt = |frame: u64| {
        let mut list = [frame];
        done(call(Hypercall::SetGdt, [at(&mut list), 512, 0, 0, 0]))
    };
    let no_gdt = || assert_eq!(call(Hypercall::SetGdt, [0, 0, 0, 0, 0]), Ok(0));
    let descriptor = |frame: u64| done(call(Hypercall::UpdateDescriptor, [frame << 12, 0, 0, 0, 0]));
    let info = |frame: u64| {
        let mut argument = VcpuRegisterVcpuInfo { mfn: frame, offset: 0, rsvd: 0 };
        done(vcpu(VcpuOp::RegisterVcpuInfo, 1, &mut argument))
    };
    let control = |frame: u64| {
        let mut argument = EvtchnInitControl { control_gfn: Gfn::new(frame), ..FromZeros::new_zeroed() };
        done(evtchn(EvtchnOp::InitControl, &mut argument))
    };
    let entry = |frame: u64| {
        let mut request = MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(frame << 12), 0);
        done(call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0]))
    };
    let usable = [Frame::OwnReadOnly];
    let own = frames.read_only.mfn();
    let invalid = no(Errno::EINVAL);
    let verdict = run(
        &frames.all,
        &[
            Row::new("pin_l1_table", pin(MmuextCmd::PinL1Table), invalid)
                .with(&usable, Ok(()))
                .undo(unpin(own)),
            Row::new("pin_l2_table", pin(MmuextCmd::PinL2Table), invalid)
                .with(&usable, Ok(()))
                .undo(unpin(own)),
            Row::new("pin_l3_table", pin(MmuextCmd::PinL3Table), invalid)
                .with(&usable, Ok(()))
                .undo(unpin(own)),
            Row::new("pin_l4_table", pin(MmuextCmd::PinL4Table), invalid)
                .with(&usable, Ok(()))
                .undo(unpin(own)),
            Row::new("unpin_table", pin(MmuextCmd::UnpinTable), invalid).without(&[Frame::Table]),
            Row::new("new_baseptr", pin(MmuextCmd::NewBaseptr), invalid).without(&usable),
            Row::new("new_user_baseptr", pin(MmuextCmd::NewUserBaseptr), invalid).without(&usable),
            Row::new("set_gdt", gdt, invalid).with(&usable, Ok(())).undo(no_gdt),
            Row::new("update_descriptor", descriptor, invalid)
                .without(&[Frame::Own, Frame::OwnReadOnly, Frame::Shared])
                .state(content),
            Row::new("an entry of a table", entry, invalid)
                .without(&[Frame::Own, Frame::OwnReadOnly, Frame::Table, Frame::Shared])
                .state(content),
            Row::new("register_vcpu_info", info, invalid).without(&[
                Frame::Own,
                Frame::OwnReadOnly,
                Frame::Shared,
            ]),
            Row::new("init_control", control, invalid).without(&[
                Frame::Own,
                Frame::OwnReadOnly,
                Frame::Shared,
            ]),
        ],
    );
    let ended = frames.end();
    verdict.and(ended)
}

// ---- Ports.

/// Kinds of port numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Number {
    /// An own port.
    Own,
    /// A number of a peer's, under which nothing is open here.
    Peer,
    /// Nothing is open under it.
    Closed,
    /// The number that no port has.
    Zero,
    /// More than there can be in this form.
    Beyond,
}

fn ports_of_others(domain: &mut Domain) -> Verdict {
    let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    let own = argument.port;
    let mut all =
        vec![(Number::Own, own), (Number::Closed, Port::new(own.get() + 1)), (Number::Zero, Port::new(0))];
    all.extend([4096, 131_072, u32::MAX].map(|port| (Number::Beyond, Port::new(port))));
    let mut theirs = Vec::new();
    if !is_privileged() {
        // One that the peer has and this domain has not.
        let peer = peer::any()?;
        while theirs.last().is_none_or(|port: &Port| port.get() <= own.get()) {
            let mut argument =
                EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: domain.id(), port: Port::new(0) };
            peer.operation(Hypercall::EventChannelOp, EvtchnOp::AllocUnbound.number(), &mut argument)??;
            theirs.push(argument.port);
        }
        all.extend(theirs.last().map(|port| (Number::Peer, *port)));
    }
    let reopen = || {
        let mut again = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
        evtchn(EvtchnOp::BindIpi, &mut again).expect("one was just closed");
        assert_eq!(again.port, own, "the lowest free port is the one just closed");
    };
    let pending = || vec![u64::from(conformance::pending(own))];
    let query = |port| {
        done(evtchn(
            EvtchnOp::Status,
            &mut EvtchnStatus { dom: DomId::SELF, port, ..FromZeros::new_zeroed() },
        ))
    };
    let bind = |remote_port| {
        let mut argument =
            EvtchnBindInterdomain { remote_dom: DomId::SELF, remote_port, ..FromZeros::new_zeroed() };
        done(evtchn(EvtchnOp::BindInterdomain, &mut argument))
    };
    let mask = || all.iter().filter(|(_, port)| port.get() < 64).for_each(|(_, port)| set_mask(*port, true));
    mask();
    let invalid = no(Errno::EINVAL);
    let verdict = run(
        &all,
        &[
            Row::new("send", |port| done(evtchn(EvtchnOp::Send, &mut EvtchnSend { port })), invalid)
                .with(&[Number::Own], Ok(()))
                .state(pending)
                .undo(|| conformance::take_pending(own)),
            Row::new("unmask", |port| done(evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port })), invalid)
                .with(&[Number::Own, Number::Closed, Number::Peer, Number::Zero], Ok(()))
                .undo(mask),
            Row::new("status", query, invalid)
                .with(&[Number::Own, Number::Closed, Number::Peer, Number::Zero], Ok(())),
            Row::new(
                "bind_vcpu",
                |port| done(evtchn(EvtchnOp::BindVcpu, &mut EvtchnBindVcpu { port, vcpu: 0 })),
                invalid,
            ),
            // An IPI of its own is nothing to bind to.
            Row::new("bind_interdomain", bind, invalid),
            Row::new("close", |port| done(evtchn(EvtchnOp::Close, &mut EvtchnClose { port })), invalid)
                .with(&[Number::Own], Ok(()))
                .undo(reopen),
        ],
    );
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port: own })?;
    for mut port in theirs {
        let peer = peer::any()?;
        peer.operation(Hypercall::EventChannelOp, EvtchnOp::Close.number(), &mut port)??;
    }
    verdict
}

// ---- References.

/// Kinds of grant references.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reference {
    /// A page for this domain.
    Granted,
    /// Nothing is granted there.
    Unused,
    /// Behind the end of the table.
    Beyond,
}

fn references_of_others(domain: &mut Domain) -> Verdict {
    let own = domain.id();
    let entry = domain.grants.grant_new(own, Access::ReadWrite)?;
    let page = Page::new()?;
    let range = Range::new(1)?;
    let all = [
        (Reference::Granted, entry.reference()),
        (Reference::Unused, GrantRef::new(400)),
        (Reference::Beyond, GrantRef::new(1 << 20)),
        (Reference::Beyond, GrantRef::new(0x7fff_ffff)),
        (Reference::Beyond, GrantRef::new(u32::MAX)),
    ];
    let handle = Cell::new(0);
    let map = |gref| {
        let mut operation = GnttabMapGrantRef {
            host_addr: range.start(),
            flags: MapFlags::HOST_MAP.bits(),
            gref,
            dom: own,
            ..FromZeros::new_zeroed()
        };
        let answer = grant(GnttabOp::MapGrantRef, &mut operation);
        handle.set(operation.handle);
        granted(answer, operation.status)
    };
    let unmap = || {
        let mut operation =
            GnttabUnmapGrantRef { host_addr: range.start(), handle: handle.get(), ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::UnmapGrantRef, &mut operation);
        assert_eq!(granted(answer, operation.status), Ok(()));
    };
    // SAFETY: an own page's first word, by raw pointers only.
    let fill = || unsafe { (page.address() as *mut u64).write_volatile(0x77) };
    fill();
    let word = || vec![try_read(page.address()).expect("an own page")];
    let copy = |reference, into: bool| {
        let (other, here) = (GnttabCopyPtr::granted(reference, own, 0), GnttabCopyPtr::own(page.mfn(), 0));
        let (source, dest, flags) =
            if into { (here, other, GNTCOPY_DEST_GREF) } else { (other, here, GNTCOPY_SOURCE_GREF) };
        let mut operation = GnttabCopy { source, dest, len: 8, flags, ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::Copy, &mut operation);
        granted(answer, operation.status)
    };
    let swap = |reference| {
        let mut operation =
            GnttabSwapGrantRef { ref_a: reference, ref_b: entry.reference(), ..FromZeros::new_zeroed() };
        let answer = grant(GnttabOp::SwapGrantRef, &mut operation);
        granted(answer, operation.status)
    };
    let bad = status(GNTST_BAD_GNTREF);
    let refused = status(GNTST_GENERAL_ERROR);
    run(
        &all,
        &[
            Row::new("map_grant_ref", map, bad)
                .with(&[Reference::Granted], Ok(()))
                .with(&[Reference::Unused], refused)
                .state(|| vec![memory::leaf(range.start()).map_or(0, |entry| entry & 1)])
                .undo(unmap),
            Row::new("copy's source", |reference| copy(reference, false), bad)
                .with(&[Reference::Granted], Ok(()))
                .with(&[Reference::Unused], refused)
                .state(word)
                .undo(fill),
            Row::new("copy's destination", |reference| copy(reference, true), bad)
                .with(&[Reference::Granted], Ok(()))
                .with(&[Reference::Unused], refused),
            Row::new("swap_grant_ref", swap, bad)
                .with(&[Reference::Granted], Ok(()))
                .without(&[Reference::Unused]),
        ],
    )
}

// ---- vCPUs.

/// Kinds of vCPU numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Vcpu {
    /// One of the domain's.
    Own,
    /// More than it has.
    Beyond,
}

fn vcpus_of_nobody(_: &mut Domain) -> Verdict {
    let all = [
        (Vcpu::Own, 0),
        (Vcpu::Beyond, 2),
        (Vcpu::Beyond, 8192),
        (Vcpu::Beyond, 0x7fff_ffff),
        (Vcpu::Beyond, u32::MAX),
    ];
    let simple = |command: VcpuOp| {
        move |id: u32| done(call(Hypercall::VcpuOp, [command.number().into(), id.into(), NOWHERE, 0, 0]))
    };
    let opened = Cell::new(0);
    let ipi = |vcpu| {
        let mut argument = EvtchnBindIpi { vcpu, port: Port::new(0) };
        let answer = evtchn(EvtchnOp::BindIpi, &mut argument);
        opened.set(argument.port.get());
        done(answer)
    };
    let virq = |vcpu| {
        let mut argument = EvtchnBindVirq { virq: 1, vcpu, port: Port::new(0) };
        let answer = evtchn(EvtchnOp::BindVirq, &mut argument);
        opened.set(argument.port.get());
        done(answer)
    };
    let close = || evtchn(EvtchnOp::Close, &mut EvtchnClose { port: Port::new(opened.get()) });
    let control = |vcpu| {
        done(evtchn(
            EvtchnOp::InitControl,
            &mut EvtchnInitControl { vcpu, offset: 4, ..FromZeros::new_zeroed() },
        ))
    };
    let nobody = no(Errno::ENOENT);
    let read = no(Errno::EFAULT);
    run(
        &all,
        &[
            Row::new("is_up", simple(VcpuOp::IsUp), nobody).with(&[Vcpu::Own], Ok(())),
            Row::new("initialise", simple(VcpuOp::Initialise), nobody).with(&[Vcpu::Own], read),
            Row::new("get_runstate_info", simple(VcpuOp::GetRunstateInfo), nobody).with(&[Vcpu::Own], read),
            Row::new("set_periodic_timer", simple(VcpuOp::SetPeriodicTimer), nobody).with(&[Vcpu::Own], read),
            Row::new("register_vcpu_info", simple(VcpuOp::RegisterVcpuInfo), nobody).with(&[Vcpu::Own], read),
            Row::new("send_nmi", simple(VcpuOp::SendNmi), nobody).with(&[Vcpu::Own], no(Errno::EINVAL)),
            Row::new("no command", |id: u32| done(call(Hypercall::VcpuOp, [77, id.into(), 0, 0, 0])), nobody)
                .with(&[Vcpu::Own], no(Errno::ENOSYS)),
            Row::new("bind_ipi", ipi, nobody).with(&[Vcpu::Own], Ok(())).undo(close),
            Row::new("bind_virq", virq, nobody).with(&[Vcpu::Own], Ok(())).undo(close),
            Row::new("init_control", control, nobody).with(&[Vcpu::Own], no(Errno::EINVAL)),
        ],
    )
}

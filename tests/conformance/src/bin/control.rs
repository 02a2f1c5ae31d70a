//! The control interface: Xenolith's own, so that on Xen there is nothing to ask.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, at, call, evtchn, grant, memop, only_on, only_privileged, physdev};
use guest_sdk::abi::control::{ControlOp, CreateDomain, DomainState, ListDomains, Version};
use guest_sdk::abi::evtchn::{
    EVTCHNSTAT_CLOSED, EVTCHNSTAT_UNBOUND, EvtchnAllocUnbound, EvtchnBindInterdomain, EvtchnBindIpi,
    EvtchnBindPirq, EvtchnBindVirq, EvtchnClose, EvtchnInitControl, EvtchnReset, EvtchnStatus,
};
use guest_sdk::abi::grant::GnttabSetVersion;
use guest_sdk::abi::memory::{
    AcquireResource, MemoryExchange, MemoryReservation, XENMEM_RESOURCE_GRANT_TABLE,
    XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED, XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS,
    XENMEM_RESOURCE_IOREQ_SERVER, XENMEM_RESOURCE_VMTRACE_BUF,
};
use guest_sdk::abi::physdev::{MAP_PIRQ_TYPE_GSI, PhysdevMapPirq};
use guest_sdk::abi::sched::ShutdownReason;
use guest_sdk::abi::subops::{EvtchnOp, GnttabOp, MemoryOp, PhysdevOp};
use guest_sdk::abi::{DomId, Errno, Gfn, GuestHandle, Hypercall, Port, Virq};
use guest_sdk::memory::{self, Page};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq};
use guest_sdk::{Domain, entry};
use guest_sdk::{control, xen_control};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            other_interface_is_refused,
            nobody_is_refused,
            domain_comes_and_goes,
            domains_are_listed,
            creation_is_refused,
            domain_is_shut_down_from_outside,
            host_is_told,
            shares_are_set_and_told,
            accounts_grow,
            vcpu_runs_where_it_may,
            limits_of_grants_are_obeyed,
            commands_of_nobody_are_refused,
            ports_of_a_domain_that_runs_are_not_reset,
            resources_are_of_known_kinds,
            calls_that_take_memory_are_refused_without,
        ],
    )
}

const OURS: &str = "the control interface is Xenolith's own";
const OTHERS: &str = "the control interface is for who was given it";

fn other_interface_is_refused(_: &mut Domain) -> Verdict {
    // Both say the same to a caller of another version: Xen's is not ours.
    let mut op = [0x1234u32; 64];
    check_eq!(call(Hypercall::Domctl, [op.as_mut_ptr() as u64, 0, 0, 0, 0]), Err(Errno::EACCES));
    check_eq!(call(Hypercall::Domctl, [NOWHERE, 0, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn nobody_is_refused(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let nobody = DomId::new(1234);
    check_eq!(control::domain_info(nobody).err(), Some(Errno::ESRCH));
    check_eq!(control::pause(nobody), Err(Errno::ESRCH));
    check_eq!(control::unpause(nobody), Err(Errno::ESRCH));
    check_eq!(control::set_max_pages(nobody, 1), Err(Errno::ESRCH));
    check_eq!(control::destroy_step(nobody).err(), Some(Errno::ESRCH));
    check!(control::list_domains()?.iter().all(|info| info.domid != nobody));
    Ok(())
}

fn destroy(domain: DomId) -> Result<(), Errno> {
    while !control::destroy_step(domain)? {}
    Ok(())
}

/// Free frames, with those that only wait to be cleaned.
fn free_frames() -> Result<u64, Errno> {
    let info = control::phys_info()?;
    Ok(info.free_pages + info.scrub_pending_pages)
}

fn domain_comes_and_goes(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let request = CreateDomain { max_vcpus: 2, max_pages: 300, ..CreateDomain::default() };
    // The first one may make tables of the hypervisor grow.
    destroy(control::create_domain(DomId::INVALID, request)?.domid)?;
    let before = free_frames()?;
    let made = control::create_domain(DomId::INVALID, request)?;
    let info = control::domain_info(made.domid)?;
    check_eq!(info.domid, made.domid);
    check!(control::list_domains()?.iter().any(|info| info.domid == made.domid), "it is listed");
    let mut frames: [u64; 256] = core::array::from_fn(|pfn| pfn as u64);
    check_eq!(control::populate(made.domid, &mut frames), Ok(()));
    check!(before - free_frames()? >= 256, "its memory is its own");
    // It may have 300.
    let mut more: [u64; 100] = core::array::from_fn(|pfn| 256 + pfn as u64);
    check!(control::populate(made.domid, &mut more).is_err(), "beyond its limit");
    check_eq!(control::pause(made.domid), Ok(()));
    check_eq!(control::unpause(made.domid), Ok(()));
    check_eq!(destroy(made.domid), Ok(()));
    check_eq!(control::domain_info(made.domid).err(), Some(Errno::ESRCH));
    check_eq!(free_frames()?, before, "free frames");
    Ok(())
}

/// More of them than one call tells of, some with an end.
fn domains_are_listed(_: &mut Domain) -> Verdict {
    const MADE: usize = 20;
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let (all, ended) = (control::list_domains()?.len(), control::list_ended()?.len());
    let request = CreateDomain { max_vcpus: 1, max_pages: 16, ..CreateDomain::default() };
    let mut made = [DomId::INVALID; MADE];
    for domain in &mut made {
        *domain = control::create_domain(DomId::INVALID, request)?.domid;
    }
    let list = control::list_domains()?;
    check_eq!(list.len(), all + MADE);
    check!(list.windows(2).all(|pair| pair[0].domid < pair[1].domid), "in order, each once");
    check!(made.iter().all(|domain| list.iter().any(|info| info.domid == *domain)));
    check_eq!(control::list_ended()?.len(), ended, "none of them has ended");
    let (over, rest) = made.split_at(MADE / 2);
    for domain in over {
        control::remote_shutdown(*domain, ShutdownReason::Poweroff)?;
    }
    let list = control::list_ended()?;
    check_eq!(list.len(), ended + over.len());
    check!(over.iter().all(|domain| list.iter().any(|info| info.domid == *domain)));
    check!(rest.iter().all(|domain| list.iter().all(|info| info.domid != *domain)));
    let mut bad = ListDomains { only_ended: 2, ..ListDomains::default() };
    // SAFETY: no room in a list that is nowhere.
    check_eq!(unsafe { control::op(DomId::SELF, &mut bad) }.err(), Some(Errno::EINVAL));
    for domain in made {
        check_eq!(destroy(domain), Ok(()));
    }
    check_eq!((control::list_domains()?.len(), control::list_ended()?.len()), (all, ended));
    Ok(())
}

fn creation_is_refused(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let count = control::list_domains()?.len();
    for max_vcpus in [0, 100_000] {
        let request = CreateDomain { max_vcpus, max_pages: 16, ..CreateDomain::default() };
        check_eq!(
            control::create_domain(DomId::INVALID, request).err(),
            Some(Errno::EINVAL),
            "{max_vcpus} vCPUs"
        );
    }
    let request = CreateDomain { max_vcpus: 1, max_pages: 16, ..CreateDomain::default() };
    check_eq!(control::create_domain(DomId::ZERO, request).err(), Some(Errno::EEXIST), "our own number");
    check_eq!(control::list_domains()?.len(), count);
    Ok(())
}

fn domain_is_shut_down_from_outside(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let request = CreateDomain { max_vcpus: 1, max_pages: 16, ..CreateDomain::default() };
    let made = control::create_domain(DomId::INVALID, request)?.domid;
    let before = control::domain_info(made)?;
    check!(before.state & DomainState::SHUTDOWN.bits() == 0, "{before:?}");
    check_eq!(control::remote_shutdown(made, ShutdownReason::Reboot), Ok(()));
    let after = control::domain_info(made)?;
    check!(after.state & DomainState::SHUTDOWN.bits() != 0, "{after:?}");
    check_eq!(after.shutdown_reason, ShutdownReason::Reboot.number());
    check_eq!(destroy(made), Ok(()));
    check_eq!(control::remote_shutdown(made, ShutdownReason::Reboot), Err(Errno::ESRCH));
    Ok(())
}

fn host_is_told(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let info = control::phys_info()?;
    check!(info.total_pages > info.free_pages && info.free_pages > 0 && info.cpus >= 1, "{info:?}");
    check_eq!(info.domains as usize, control::list_domains()?.len());
    let mut text = [0u8; 512];
    let (length, _, _) = control::read_log(0, &mut text)?;
    check!(length > 0, "the log is empty");
    Ok(())
}

fn shares_are_set_and_told(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let request = CreateDomain { max_vcpus: 2, max_pages: 16, ..CreateDomain::default() };
    let made = control::create_domain(DomId::INVALID, request)?.domid;
    let told = || control::domain_info(made).map(|info| (info.weight, info.cap));
    check_eq!(told(), Ok((256, 0)));
    check_eq!(control::set_weight(made, 65535), Ok(()));
    check_eq!(control::set_cap(made, 6400), Ok(()));
    check_eq!(told(), Ok((65535, 6400)));
    for weight in [0, 65536, u32::MAX] {
        check_eq!(control::set_weight(made, weight), Err(Errno::EINVAL), "weight {weight}");
    }
    for percent in [6401, u32::MAX] {
        check_eq!(control::set_cap(made, percent), Err(Errno::EINVAL), "cap {percent}");
    }
    check_eq!(told(), Ok((65535, 6400)), "nothing changed");
    check_eq!(control::set_cap(made, 0), Ok(()));
    check_eq!(told(), Ok((65535, 0)));
    check_eq!(destroy(made), Ok(()));
    check_eq!(control::set_weight(made, 256), Err(Errno::ESRCH));
    check_eq!(control::set_cap(made, 50), Err(Errno::ESRCH));
    Ok(())
}

fn accounts_grow(domain: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let own = domain.id();
    let before = control::vcpu_info(own, 0)?;
    for _ in 0..100 {
        // The version, which nobody counts but the account.
        let _ = guest_sdk::hypercall::version();
    }
    let after = control::vcpu_info(own, 0)?;
    check_eq!(after.hypercalls - before.hypercalls, 101, "100 calls, and the one that told the count before");
    check!(after.cpu_time_ns > before.cpu_time_ns, "{before:?} {after:?}");
    guest_sdk::time::sleep(core::time::Duration::from_millis(20));
    let slept = control::vcpu_info(own, 0)?;
    check!(slept.blocked_ns - after.blocked_ns >= 15_000_000, "{after:?} {slept:?}");
    check!(slept.upcalls > after.upcalls || slept.hypercalls > after.hypercalls);
    check!(guest_sdk::testkit::try_read(0x10).is_err(), "nothing is mapped there");
    check_eq!(control::vcpu_info(own, 0)?.faults, slept.faults + 1);
    check_eq!(control::vcpu_info(own, 64).err(), Some(Errno::ENOENT));
    // Of its CPUs one is this guest's.
    let cpus = control::phys_info()?.cpus;
    let busy = (0..cpus).map(|cpu| Ok(control::cpu_info(cpu)?.busy_ns)).sum::<Result<u64, Errno>>()?;
    check!(busy >= slept.cpu_time_ns, "{busy} ns of all CPUs");
    check_eq!(control::cpu_info(cpus).err(), Some(Errno::ENOENT));
    Ok(())
}

fn vcpu_runs_where_it_may(domain: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let own = domain.id();
    let before = control::set_affinity(own, 0, 0, 0)?;
    check_eq!(control::set_affinity(own, 0, 1, u64::MAX), Ok((1, u64::MAX)));
    check_eq!(control::vcpu_info(own, 0)?.cpu, 0);
    // CPU 63 is not up on any machine that this runs on; nothing has changed.
    check_eq!(control::set_affinity(own, 0, 1 << 63, 1), Err(Errno::EINVAL));
    check_eq!(control::set_affinity(own, 64, 1, 1), Err(Errno::EINVAL));
    check_eq!(control::set_affinity(DomId::new(1234), 0, 1, 1), Err(Errno::ESRCH));
    check_eq!(control::set_affinity(own, 0, 0, 0), Ok((1, u64::MAX)));
    check_eq!(control::set_affinity(own, 0, before.0, before.1), Ok(before));
    Ok(())
}

/// A domain whose grant table may have `frames` frames, by the control interface of the hypervisor below.
fn with_frames(frames: u32) -> Result<DomId, Errno> {
    if conformance::is_xenolith() {
        let request =
            CreateDomain { max_vcpus: 1, max_pages: 16, max_grant_frames: frames, ..CreateDomain::default() };
        return control::create_domain(DomId::INVALID, request).map(|made| made.domid);
    }
    xen_control::create_domain(xen_control::abi::CreateDomain {
        max_vcpus: 1,
        max_evtchn_port: 1023,
        max_grant_frames: frames as i32,
        max_maptrack_frames: -1,
        grant_opts: xen_control::abi::GRANT_VERSION_2,
        ..Default::default()
    })
}

fn limits_of_grants_are_obeyed(_: &mut Domain) -> Verdict {
    only_privileged(OTHERS)?;
    check_eq!(with_frames(100_000).err(), Some(Errno::EINVAL));
    let made = with_frames(10)?;
    let mut list = [0u64; 16];
    let mut resource = |id: u32, frame: u64, nr_frames: u32| {
        let frame_list = if nr_frames == 0 { 0 } else { list.as_mut_ptr() as u64 };
        let mut request = AcquireResource {
            domid: made,
            kind: XENMEM_RESOURCE_GRANT_TABLE,
            id,
            nr_frames,
            frame,
            frame_list: GuestHandle::new(frame_list),
            ..AcquireResource::default()
        };
        memop(MemoryOp::AcquireResource, &mut request).map(|_| (request.nr_frames, list))
    };
    const SHARED: u32 = XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED;
    const STATUS: u32 = XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS;
    // A list of nothing asks how many there may be: a status frame serves eight others.
    check_eq!(resource(SHARED, 0, 0).map(|answer| answer.0), Ok(10));
    check_eq!(resource(STATUS, 0, 0).map(|answer| answer.0), Ok(2));
    check_eq!(resource(SHARED, 0, 11), Err(Errno::EINVAL));
    check_eq!(resource(SHARED, 10, 1), Err(Errno::EINVAL));
    let (_, frames) = resource(SHARED, 0, 10)?;
    check!(frames[..10].iter().all(|frame| *frame != 0) && frames[10..] == [0; 6], "{frames:x?}");
    let (_, again) = resource(SHARED, 9, 1)?;
    check_eq!(again[0], frames[9], "the last of them");
    // Its table is one of version 1 still.
    check_eq!(resource(STATUS, 0, 1), Err(Errno::EINVAL));
    check_eq!(resource(2, 0, 0), Err(Errno::EINVAL), "no such part of a grant table");
    end(made)?;
    if conformance::is_xenolith() {
        let request = CreateDomain { max_vcpus: 1, max_maptrack: 262_145, ..CreateDomain::default() };
        check_eq!(control::create_domain(DomId::INVALID, request).err(), Some(Errno::EINVAL));
    }
    Ok(())
}

fn commands_of_nobody_are_refused(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let mut good = ControlOp::new(DomId::SELF, &Version::default());
    check_eq!(call(Hypercall::Domctl, [at(&mut good), 0, 0, 0, 0]), Ok(0));
    for command in [9999, u32::MAX] {
        let mut bad = ControlOp::new(DomId::SELF, &Version::default());
        bad.cmd = command;
        check_eq!(call(Hypercall::Domctl, [at(&mut bad), 0, 0, 0, 0]), Err(Errno::ENOSYS), "{command}");
    }
    Ok(())
}

/// Starts or stops a domain, and destroys it, by the control interface of the hypervisor below.
fn pause(domain: DomId, on: bool) -> Result<(), Errno> {
    match (conformance::is_xenolith(), on) {
        (true, true) => control::pause(domain),
        (true, false) => control::unpause(domain),
        (false, true) => xen_control::pause(domain),
        (false, false) => xen_control::unpause(domain),
    }
}

fn end(domain: DomId) -> Result<(), Errno> {
    if conformance::is_xenolith() { destroy(domain) } else { xen_control::destroy(domain) }
}

fn ports_of_a_domain_that_runs_are_not_reset(domain: &mut Domain) -> Verdict {
    only_privileged(OTHERS)?;
    let made = with_frames(4)?;
    let reset = |command: EvtchnOp| evtchn(command, &mut EvtchnReset { dom: made });
    let status = |port: Port| {
        let mut argument = EvtchnStatus { dom: made, port, ..EvtchnStatus::default() };
        evtchn(EvtchnOp::Status, &mut argument).map(|_| argument.status)
    };
    let port = control::alloc_unbound_for(made, domain.id())?;
    // Nobody has a vCPU of it, but it is not held paused.
    check_eq!(pause(made, false), Ok(()));
    for command in [EvtchnOp::Reset, EvtchnOp::ResetCont] {
        check_eq!(reset(command), Err(Errno::EINVAL), "{command:?}");
        check_eq!(status(port), Ok(EVTCHNSTAT_UNBOUND), "{command:?}");
    }
    check_eq!(pause(made, true), Ok(()));
    check_eq!(reset(EvtchnOp::Reset), Ok(0));
    check_eq!(status(port), Ok(EVTCHNSTAT_CLOSED));
    check_eq!(end(made), Ok(()));
    check_eq!(reset(EvtchnOp::Reset), Err(Errno::ESRCH));
    Ok(())
}

fn resources_are_of_known_kinds(_: &mut Domain) -> Verdict {
    only_privileged(OTHERS)?;
    let made = with_frames(4)?;
    let mut frames = [0u64; 2];
    let list = at(&mut frames);
    let acquire = |kind: u16, id: u32| {
        let frame_list = GuestHandle::new(list);
        let mut request =
            AcquireResource { domid: made, kind, id, nr_frames: 1, frame_list, ..AcquireResource::default() };
        memop(MemoryOp::AcquireResource, &mut request)
    };
    for kind in [3, 99, u16::MAX] {
        check_eq!(acquire(kind, 0), Err(Errno::EOPNOTSUPP), "kind {kind}");
    }
    // Of these a PV domain has none.
    for kind in [XENMEM_RESOURCE_IOREQ_SERVER, XENMEM_RESOURCE_VMTRACE_BUF] {
        check_eq!(acquire(kind, 0), Err(Errno::EINVAL), "kind {kind}");
    }
    check_eq!(acquire(XENMEM_RESOURCE_GRANT_TABLE, 77), Err(Errno::EINVAL), "no such table");
    check_eq!(frames, [0; 2]);
    check_eq!(acquire(XENMEM_RESOURCE_GRANT_TABLE, XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED), Ok(0));
    check!(frames[0] != 0 && frames[1] == 0, "{frames:x?}");
    check_eq!(end(made), Ok(()));
    Ok(())
}

/// A domain that has all memory that is free; then nobody gets any.
fn hoarder() -> Result<DomId, Errno> {
    let request = CreateDomain { max_vcpus: 1, max_pages: 1 << 30, ..CreateDomain::default() };
    let made = control::create_domain(DomId::INVALID, request)?.domid;
    let mut pfn = 0;
    for chunk in [256, 1] {
        loop {
            let mut frames = [0u64; 256];
            for frame in &mut frames[..chunk] {
                *frame = pfn;
                pfn += 1;
            }
            if control::populate(made, &mut frames[..chunk]).is_err() {
                break;
            }
        }
    }
    Ok(made)
}

fn unbound() -> Result<Port, Errno> {
    let mut argument = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, port: Port::new(0) };
    evtchn(EvtchnOp::AllocUnbound, &mut argument)?;
    Ok(argument.port)
}

fn interdomain(remote_port: Port) -> Result<Port, Errno> {
    let mut argument =
        EvtchnBindInterdomain { remote_dom: DomId::SELF, pad0: 0, remote_port, local_port: Port::new(0) };
    evtchn(EvtchnOp::BindInterdomain, &mut argument)?;
    Ok(argument.local_port)
}

fn ipi() -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

fn virq() -> Result<Port, Errno> {
    let mut argument = EvtchnBindVirq { virq: Virq::DEBUG.get(), vcpu: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindVirq, &mut argument)?;
    Ok(argument.port)
}

/// The clock chip's interrupt.
fn pirq() -> Result<Port, Errno> {
    let mut argument = EvtchnBindPirq { pirq: 8, flags: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindPirq, &mut argument)?;
    Ok(argument.port)
}

fn close(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port })
}

fn set_version(version: u32) -> Result<u64, Errno> {
    grant(GnttabOp::SetVersion, &mut GnttabSetVersion { version })
}

/// Exchanges the frame of a page for another: the answer, and how many were exchanged. The page is at its place again after that.
fn exchange(page: &mut Option<Page>) -> Result<(Result<u64, Errno>, u64), Stop> {
    let whole = page.take().ok_or("no page")?;
    let frame = whole.mfn();
    let pfn = memory::mfn_to_pfn(frame).ok_or("no pfn")?.get();
    let address = whole.leak();
    // SAFETY: the page is leaked.
    unsafe { memory::set_leaf(address, 0)? };
    let (mut input, mut output) = ([frame.get()], [pfn]);
    let list = |list: &mut [u64; 1]| MemoryReservation {
        extent_start: GuestHandle::new(at(list)),
        nr_extents: 1,
        domid: DomId::SELF,
        ..MemoryReservation::default()
    };
    let mut request = MemoryExchange { input: list(&mut input), output: list(&mut output), nr_exchanged: 0 };
    let answer = memop(MemoryOp::Exchange, &mut request);
    let now = if answer.is_ok() { output[0] } else { frame.get() };
    let info = guest_sdk::rt::start::start_info().ok_or("no start info")?;
    // SAFETY: the entry of the page in the domain's own list; nothing is mapped at its place.
    unsafe {
        (info.mfn_list as *mut u64).add(pfn as usize).write_volatile(now);
        memory::set_leaf(address, now << 12 | 0x63 | 1 << 63)?;
        *page = Some(Page::from_leaked(address));
    }
    Ok((answer, request.nr_exchanged))
}

fn calls_that_take_memory_are_refused_without(_: &mut Domain) -> Verdict {
    only_on(true, "who takes all memory of a Xen takes what it needs itself")?;
    only_privileged(OTHERS)?;
    let mut pin = PhysdevMapPirq {
        domid: DomId::SELF,
        kind: MAP_PIRQ_TYPE_GSI,
        index: 8,
        pirq: 8,
        ..PhysdevMapPirq::default()
    };
    check_eq!(physdev(PhysdevOp::MapPirq, &mut pin), Ok(0));
    let mut page = Some(Page::new()?);
    let control = Page::new()?;
    let control_gfn = Gfn::new(control.mfn().get());
    let mut ports = alloc::vec::Vec::with_capacity(5000);
    // The first domain may make tables of the hypervisor grow.
    destroy(
        control::create_domain(DomId::INVALID, CreateDomain { max_vcpus: 1, ..CreateDomain::default() })?
            .domid,
    )?;
    let before = free_frames()?;

    // What is found is looked at when the memory is free again.
    let hoarder = hoarder()?;
    let end = loop {
        match unbound() {
            Ok(port) if ports.len() < 5000 => ports.push(port),
            answer => break answer,
        }
    };
    let waiting = ports.first().copied().unwrap_or(Port::new(0));
    let kinds = [interdomain(waiting), virq(), ipi(), pirq()];
    let versions = set_version(2);
    let mut form = EvtchnInitControl { control_gfn, ..EvtchnInitControl::default() };
    let fifo = evtchn(EvtchnOp::InitControl, &mut form);
    let exchanged = exchange(&mut page);
    let closed = ports.iter().all(|port| close(*port) == Ok(0));
    destroy(hoarder)?;

    check!(!ports.is_empty() && closed, "{} ports", ports.len());
    check_eq!(end, Err(Errno::ENOMEM), "an unbound port, after {}", ports.len());
    check_eq!(kinds, [Err(Errno::ENOMEM); 4], "bound to a port, a virtual interrupt, a vCPU, an interrupt");
    check_eq!(versions, Err(Errno::ENOMEM), "status frames");
    check_eq!(fifo, Err(Errno::ENOMEM), "the FIFO form");
    check_eq!(exchanged?, (Err(Errno::ENOMEM), 0));
    check_eq!(free_frames()?, before, "nothing was kept");

    // The same, now that there is memory; but for the FIFO form, from which there is no way back.
    let waiting = unbound()?;
    for (kind, bind) in [interdomain(waiting), virq(), ipi(), pirq()].into_iter().enumerate() {
        check_eq!(bind.map(close), Ok(Ok(0)), "kind {kind}");
    }
    check_eq!(close(waiting), Ok(0));
    check_eq!((set_version(2), set_version(1)), (Ok(0), Ok(0)));
    check_eq!(exchange(&mut page)?, (Ok(0), 1));
    Ok(())
}

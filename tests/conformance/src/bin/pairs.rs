//! What takes two domains: events between them, pages granted and copied, what one may not do to the other, and domains that
//! are no more.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::peer::{self, Peer, wait_until};
use conformance::{SELF, call, evtchn, grant, memop, pte, sched, take_pending};
use guest_sdk::abi::evtchn::{
    EVTCHN_FIFO_PENDING, EVTCHNSTAT_CLOSED, EVTCHNSTAT_INTERDOMAIN, EVTCHNSTAT_UNBOUND, EvtchnAllocUnbound,
    EvtchnBindInterdomain, EvtchnClose, EvtchnExpandArray, EvtchnInitControl, EvtchnSend, EvtchnStatus,
};
use guest_sdk::abi::grant::{
    GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTST_BAD_DOMAIN, GNTST_GENERAL_ERROR, GNTST_OKAY, GnttabCopy,
    GnttabCopyPtr, GnttabMapGrantRef, GnttabUnmapGrantRef, MapFlags,
};
use guest_sdk::abi::memory::MemoryDomain;
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use guest_sdk::abi::physdev::{MAP_PIRQ_TYPE_MSI, PhysdevGetFreePirq};
use guest_sdk::abi::sched::{SchedRemoteShutdown, SchedWatchdog, ShutdownReason};
use guest_sdk::abi::segment::MACH2PHYS_VIRT_START;
use guest_sdk::abi::subops::{EvtchnOp, GnttabOp, MemoryOp, MmuextCmd, PhysdevOp, SchedOp};
use guest_sdk::abi::{DomId, Errno, Gfn, GrantRef, Hypercall, Mfn, Port};
use guest_sdk::memory::{Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, expect_vector, try_read, try_write};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    peer::connect(&domain);
    testkit::run(
        domain,
        &cases![
            signals_cross_both_ways,
            port_is_for_the_named_domain,
            port_is_bound_once,
            closing_is_seen_by_the_other_end,
            ports_of_others_are_not_ours,
            port_is_for_the_named_domain_in_the_fifo_form,
            ports_of_a_domain_have_a_limit,
            peer_is_not_shut_down,
            watchdog_ends_its_domain,
            granted_page_is_one_memory,
            readonly_grant_is_not_written,
            grant_in_use_does_not_end,
            grant_for_another_domain,
            copy_in_both_directions,
            copy_refused,
            frames_of_others_are_not_mapped,
            memory_of_others_is_not_ours,
            tables_of_others_are_not_ours,
            numbers_of_interrupts_run_out,
            ended_domain_closes_its_ports,
            mapped_page_outlives_its_domain,
            dead_domain_is_nobody,
        ],
    )
}

/// In a port's word of the FIFO form.
const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;

/// A port of the peer that `remote` may bind.
fn port_of(peer: &Peer, remote: DomId) -> Result<Port, Stop> {
    let mut argument = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: remote, port: Port::new(0) };
    let command = EvtchnOp::AllocUnbound.number();
    peer.operation(Hypercall::EventChannelOp, command, &mut argument)??;
    Ok(argument.port)
}

fn bind(remote_dom: DomId, remote_port: Port) -> Result<Port, Errno> {
    let mut argument = EvtchnBindInterdomain { remote_dom, pad0: 0, remote_port, local_port: Port::new(0) };
    evtchn(EvtchnOp::BindInterdomain, &mut argument)?;
    Ok(argument.local_port)
}

fn send(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Send, &mut EvtchnSend { port })
}

fn close(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port })
}

fn peer_sends(peer: &Peer, port: Port) -> Result<Result<u64, Errno>, Stop> {
    peer.operation(Hypercall::EventChannelOp, EvtchnOp::Send.number(), &mut port.get())
}

fn peer_closes(peer: &Peer, port: Port) -> Result<Result<u64, Errno>, Stop> {
    peer.operation(Hypercall::EventChannelOp, EvtchnOp::Close.number(), &mut port.get())
}

fn status(dom: DomId, port: Port) -> Result<EvtchnStatus, Errno> {
    let mut argument = EvtchnStatus { dom, port, ..EvtchnStatus::default() };
    evtchn(EvtchnOp::Status, &mut argument)?;
    Ok(argument)
}

fn signals_cross_both_ways(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = port_of(peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    check!(take_pending(ours), "a port fires once when it is bound");
    let now = status(DomId::SELF, ours)?;
    check_eq!(now.status, EVTCHNSTAT_INTERDOMAIN);
    check_eq!((now.remote_domain(), now.remote_port()), (peer.domain(), theirs));
    peer.take_pending(theirs)?;

    check_eq!(send(ours), Ok(0));
    check!(peer.take_pending(theirs)?, "the peer has it");
    check!(!take_pending(ours), "who sends does not");
    check_eq!(peer_sends(peer, theirs)?, Ok(0));
    check!(take_pending(ours), "the answer came");
    check!(!peer.take_pending(theirs)?);

    check_eq!(close(ours), Ok(0));
    check_eq!(peer_closes(peer, theirs)?, Ok(0));
    Ok(())
}

fn port_is_for_the_named_domain(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let another = port_of(peer, peer.domain())?;
    check_eq!(bind(peer.domain(), another), Err(Errno::EINVAL), "its own");
    let theirs = port_of(peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    check_eq!(status(DomId::SELF, ours)?.remote_port(), theirs);
    check_eq!(close(ours), Ok(0));
    for port in [another, theirs] {
        check_eq!(peer_closes(peer, port)?, Ok(0));
    }
    Ok(())
}

fn port_is_bound_once(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = port_of(peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    check_eq!(bind(peer.domain(), theirs), Err(Errno::EINVAL));
    take_pending(ours);
    check_eq!(peer_sends(peer, theirs)?, Ok(0));
    check!(take_pending(ours), "the first binding is as it was");
    check_eq!(close(ours), Ok(0));
    check_eq!(peer_closes(peer, theirs)?, Ok(0));
    check_eq!(bind(peer.domain(), theirs), Err(Errno::EINVAL), "a closed port");
    Ok(())
}

fn closing_is_seen_by_the_other_end(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = port_of(peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    check_eq!(peer_closes(peer, theirs)?, Ok(0));
    let now = status(DomId::SELF, ours)?;
    check_eq!((now.status, now.remote_domain()), (EVTCHNSTAT_UNBOUND, peer.domain()));
    check_eq!(send(ours), Ok(0), "nobody is there to hear it");
    // The peer may come back to the port that waits for it.
    let mut again = EvtchnBindInterdomain {
        remote_dom: domain.id(),
        pad0: 0,
        remote_port: ours,
        local_port: Port::new(0),
    };
    let command = EvtchnOp::BindInterdomain.number();
    check_eq!(peer.operation(Hypercall::EventChannelOp, command, &mut again)?, Ok(0));
    check!(peer.take_pending(again.local_port)?, "its new port has fired");
    take_pending(ours);
    check_eq!(peer_sends(peer, again.local_port)?, Ok(0));
    check!(take_pending(ours));
    check_eq!(peer_closes(peer, again.local_port)?, Ok(0));
    check_eq!(close(ours), Ok(0));
    Ok(())
}

fn ports_of_others_are_not_ours(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = port_of(peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    for port in [theirs, Port::new(1)] {
        check_eq!(status(peer.domain(), port).err(), Some(Errno::EPERM), "port {port}");
    }
    check_eq!(status(peer.domain(), Port::new(200_000)).err(), Some(Errno::EINVAL), "no port of anybody");
    let mut argument = EvtchnAllocUnbound { dom: peer.domain(), remote_dom: domain.id(), port: Port::new(0) };
    check_eq!(evtchn(EvtchnOp::AllocUnbound, &mut argument), Err(Errno::EPERM));
    // A number of theirs says nothing here: the peer's highest port is none of ours, and nobody is told.
    let mut alone = port_of(peer, domain.id())?;
    let mut more = Vec::from([alone]);
    while status(DomId::SELF, alone).is_ok_and(|now| now.status != EVTCHNSTAT_CLOSED) {
        alone = port_of(peer, domain.id())?;
        more.push(alone);
    }
    check_eq!(send(alone), Err(Errno::EINVAL));
    check_eq!(close(alone), Err(Errno::EINVAL));
    check!(!peer.take_pending(alone)?);
    for port in more {
        check_eq!(peer_closes(peer, port)?, Ok(0));
    }
    // Its number is as good as any own number: closing our end leaves theirs.
    check_eq!(status(DomId::SELF, ours)?.status, EVTCHNSTAT_INTERDOMAIN);
    check_eq!(close(ours), Ok(0));
    check_eq!(peer_closes(peer, theirs)?, Ok(0));
    Ok(())
}

fn port_is_for_the_named_domain_in_the_fifo_form(domain: &mut Domain) -> Verdict {
    let peer = peer::mortal()?;
    let (control, array) = (peer.page()?, peer.page()?);
    let mut form = EvtchnInitControl { control_gfn: Gfn::new(control.frame), ..EvtchnInitControl::default() };
    let events = Hypercall::EventChannelOp;
    check_eq!(peer.operation(events, EvtchnOp::InitControl.number(), &mut form)?, Ok(0));
    let mut more = EvtchnExpandArray { array_gfn: Gfn::new(array.frame) };
    check_eq!(peer.operation(events, EvtchnOp::ExpandArray.number(), &mut more)?, Ok(0));
    let word = |port: Port| {
        let word = peer.read(array.address + u64::from(port.get() & !1) * 4)?;
        Ok::<_, Stop>((word >> (32 * (port.get() & 1))) as u32)
    };
    let another = port_of(&peer, peer.domain())?;
    check_eq!(bind(peer.domain(), another), Err(Errno::EINVAL), "its own");
    check_eq!(word(another)? & PENDING, 0, "who is refused tells nobody");
    check_eq!(status(peer.domain(), another).err(), Some(Errno::EPERM));
    let theirs = port_of(&peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    check_eq!(bind(peer.domain(), theirs), Err(Errno::EINVAL), "it is taken");
    check_eq!(send(ours), Ok(0));
    check!(word(theirs)? & PENDING != 0, "the peer has it in its array");
    check_eq!(word(another)? & PENDING, 0);
    take_pending(ours);
    check_eq!(peer_sends(&peer, theirs)?, Ok(0));
    check!(take_pending(ours), "from one form to the other");
    check_eq!(close(ours), Ok(0));
    peer.end(ShutdownReason::Poweroff).map(drop)
}

/// The highest port of a peer: `max_event_channels` in the description that the suite writes for it.
const HIGHEST_OF_PEER: u32 = 63;

fn ports_of_a_domain_have_a_limit(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let mut ports = Vec::new();
    let end = loop {
        let mut argument =
            EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: domain.id(), port: Port::new(0) };
        let command = EvtchnOp::AllocUnbound.number();
        match peer.operation(Hypercall::EventChannelOp, command, &mut argument)? {
            Ok(_) if ports.len() < 200 => ports.push(argument.port),
            answer => break answer,
        }
    };
    let highest = ports.iter().max().copied();
    // The last one is as good as any.
    let bound = highest.map(|port| bind(peer.domain(), port));
    let told = bound.and_then(Result::ok).map(send);
    let heard = highest.map(|port| peer.take_pending(port)).transpose()?;
    for port in &ports {
        check_eq!(peer_closes(peer, *port)?, Ok(0));
    }
    if let Some(Ok(ours)) = bound {
        check_eq!(close(ours), Ok(0));
    }
    check_eq!(end, Err(Errno::ENOSPC));
    check_eq!(highest, Some(Port::new(HIGHEST_OF_PEER)));
    check!(matches!(bound, Some(Ok(_))), "{bound:?}");
    check_eq!((told, heard), (Some(Ok(0)), Some(true)));
    // The limit is of ports that are open, not of ports that ever were.
    let again = port_of(peer, domain.id())?;
    check_eq!(peer_closes(peer, again)?, Ok(0));
    Ok(())
}

fn peer_is_not_shut_down(_: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let mut request =
        SchedRemoteShutdown { domain_id: peer.domain(), pad0: 0, reason: ShutdownReason::Poweroff.number() };
    check_eq!(sched(SchedOp::RemoteShutdown, &mut request), Err(Errno::EPERM));
    request.domain_id = DomId::new(0x7000);
    check_eq!(sched(SchedOp::RemoteShutdown, &mut request), Err(Errno::ESRCH), "nobody");
    let page = peer.page()?;
    check!(peer.write(page.address, 1)?, "the peer does what it is asked");
    peer.free(page)
}

fn watchdog_ends_its_domain(domain: &mut Domain) -> Verdict {
    let peer = peer::mortal()?;
    let theirs = port_of(&peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    let mut watchdog = SchedWatchdog { id: 0, timeout: 1 };
    check_eq!(peer.operation(Hypercall::SchedOp, SchedOp::Watchdog.number(), &mut watchdog)?, Ok(1));
    check_eq!(status(DomId::SELF, ours)?.status, EVTCHNSTAT_INTERDOMAIN, "it lives");
    let armed = now_ns();
    let gone = peer.let_go();
    let ended =
        wait_until(|| status(DomId::SELF, ours).is_ok_and(|now| now.status != EVTCHNSTAT_INTERDOMAIN));
    check!(ended, "the watchdog bit nobody");
    let after = now_ns() - armed;
    check!(after > 900_000_000, "after {after} ns");
    check!(wait_until(|| bind(gone, theirs) == Err(Errno::ESRCH)), "its number names nobody");
    check_eq!(close(ours), Ok(0));
    Ok(())
}

/// Maps a grant at `address`: the handle, or the status.
fn map(from: DomId, gref: GrantRef, address: u64, flags: MapFlags) -> Result<Result<u32, i16>, Stop> {
    let mut request = GnttabMapGrantRef {
        host_addr: address,
        flags: (MapFlags::HOST_MAP | flags).bits(),
        gref,
        dom: from,
        status: 99,
        ..GnttabMapGrantRef::default()
    };
    check_call(grant(GnttabOp::MapGrantRef, &mut request))?;
    Ok(if request.status == GNTST_OKAY { Ok(request.handle) } else { Err(request.status) })
}

fn unmap(address: u64, handle: u32) -> Result<i16, Stop> {
    let mut request =
        GnttabUnmapGrantRef { host_addr: address, handle, status: 99, ..GnttabUnmapGrantRef::default() };
    check_call(grant(GnttabOp::UnmapGrantRef, &mut request))?;
    Ok(request.status)
}

fn check_call(result: Result<u64, Errno>) -> Verdict {
    check_eq!(result, Ok(0));
    Ok(())
}

fn write(address: u64, word: u64) -> Result<(), guest_sdk::rt::trap::Exception> {
    // SAFETY: a page that Rust uses for nothing else.
    unsafe { try_write(address, word) }
}

fn granted_page_is_one_memory(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let granted = peer.grant(domain.id(), false)?;
    let range = Range::new(1)?;
    let at = range.start();
    let handle = map(peer.domain(), granted.reference, at, MapFlags::empty())?;
    let Ok(handle) = handle else { return testkit::fail(format_args!("mapping: status {handle:?}")) };
    write(at + 8, 0x1122_3344)?;
    check_eq!(peer.read(granted.page.address + 8)?, 0x1122_3344);
    check!(peer.write(granted.page.address + 16, 0x5566)?);
    check_eq!(try_read(at + 16)?, 0x5566);
    check_eq!(unmap(at, handle)?, GNTST_OKAY);
    expect_vector(try_read(at), 14, 0)?;
    check!(peer.end_grant(granted.reference)?);
    check_eq!(peer.read(granted.page.address + 8)?, 0x1122_3344, "the page is the peer's, as it was");
    peer.free(granted.page)
}

fn readonly_grant_is_not_written(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let granted = peer.grant(domain.id(), true)?;
    check!(peer.write(granted.page.address, 0x77)?);
    let range = Range::new(1)?;
    let at = range.start();
    check_eq!(
        map(peer.domain(), granted.reference, at, MapFlags::empty())?,
        Err(GNTST_GENERAL_ERROR),
        "writable"
    );
    expect_vector(try_read(at), 14, 0)?;
    let Ok(handle) = map(peer.domain(), granted.reference, at, MapFlags::READONLY)? else {
        return testkit::fail("it cannot be mapped read-only");
    };
    check_eq!(try_read(at)?, 0x77);
    // Present, and a write.
    expect_vector(write(at, 1), 14, 3)?;
    check_eq!(unmap(at, handle)?, GNTST_OKAY);
    check!(peer.end_grant(granted.reference)?);
    check_eq!(peer.read(granted.page.address)?, 0x77);
    peer.free(granted.page)
}

fn grant_in_use_does_not_end(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let granted = peer.grant(domain.id(), false)?;
    let range = Range::new(1)?;
    let at = range.start();
    let Ok(handle) = map(peer.domain(), granted.reference, at, MapFlags::empty())? else {
        return testkit::fail("it cannot be mapped");
    };
    check!(!peer.end_grant(granted.reference)?, "it is in use");
    check_eq!(unmap(at, handle)?, GNTST_OKAY);
    check!(peer.end_grant(granted.reference)?, "it is not in use");
    check_eq!(map(peer.domain(), granted.reference, at, MapFlags::empty())?, Err(GNTST_GENERAL_ERROR));
    peer.free(granted.page)
}

fn grant_for_another_domain(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = peer.grant(peer.domain(), false)?;
    let ours = peer.grant(domain.id(), false)?;
    let range = Range::new(1)?;
    let at = range.start();
    check_eq!(map(peer.domain(), theirs.reference, at, MapFlags::empty())?, Err(GNTST_GENERAL_ERROR));
    expect_vector(try_read(at), 14, 0)?;
    let Ok(handle) = map(peer.domain(), ours.reference, at, MapFlags::empty())? else {
        return testkit::fail("the one for this domain cannot be mapped");
    };
    check_eq!(try_read(at)?, 0);
    check_eq!(unmap(at, handle)?, GNTST_OKAY);
    for granted in [theirs, ours] {
        check!(peer.end_grant(granted.reference)?);
        peer.free(granted.page)?;
    }
    Ok(())
}

fn copy(source: GnttabCopyPtr, dest: GnttabCopyPtr, flags: u16) -> Result<i16, Stop> {
    let mut request = GnttabCopy { source, dest, len: 16, flags, status: 99, pad0: 0 };
    check_call(grant(GnttabOp::Copy, &mut request))?;
    Ok(request.status)
}

fn word(page: &Page, index: u64) -> u64 {
    // SAFETY: inside the page; the hypervisor may have written it.
    unsafe { ((page.address() + index * 8) as *const u64).read_volatile() }
}

fn copy_in_both_directions(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let granted = peer.grant(domain.id(), false)?;
    let mut page = Page::new()?;
    page.bytes_mut()[8..16].copy_from_slice(&0xabcdu64.to_le_bytes());
    let own = |offset| GnttabCopyPtr::own(page.mfn(), offset);
    let theirs = |offset| GnttabCopyPtr::granted(granted.reference, peer.domain(), offset);

    check_eq!(copy(own(8), theirs(32), GNTCOPY_DEST_GREF)?, GNTST_OKAY);
    check_eq!(peer.read(granted.page.address + 32)?, 0xabcd);
    check!(peer.write(granted.page.address + 64, 0xef01)?);
    check_eq!(copy(theirs(64), own(24), GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
    check_eq!(word(&page, 3), 0xef01);
    // From one place of the granted page to another of it.
    check_eq!(copy(theirs(64), theirs(128), GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF)?, GNTST_OKAY);
    check_eq!(peer.read(granted.page.address + 128)?, 0xef01);
    check!(peer.end_grant(granted.reference)?, "a copy leaves nothing in use");
    peer.free(granted.page)
}

fn copy_refused(domain: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let readonly = peer.grant(domain.id(), true)?;
    let another = peer.grant(peer.domain(), false)?;
    check!(peer.write(readonly.page.address, 0x42)? && peer.write(another.page.address, 0x43)?);
    let mut page = Page::new()?;
    page.bytes_mut()[..8].copy_from_slice(&0x99u64.to_le_bytes());
    let own = GnttabCopyPtr::own(page.mfn(), 0);
    let granted = |reference| GnttabCopyPtr::granted(reference, peer.domain(), 0);

    check_eq!(copy(own, granted(readonly.reference), GNTCOPY_DEST_GREF)?, GNTST_GENERAL_ERROR, "read-only");
    check_eq!(copy(own, granted(another.reference), GNTCOPY_DEST_GREF)?, GNTST_GENERAL_ERROR, "another's");
    check_eq!(copy(granted(another.reference), own, GNTCOPY_SOURCE_GREF)?, GNTST_GENERAL_ERROR);
    check_eq!((peer.read(readonly.page.address)?, peer.read(another.page.address)?), (0x42, 0x43));
    check_eq!(word(&page, 0), 0x99);
    check_eq!(copy(granted(readonly.reference), own, GNTCOPY_SOURCE_GREF)?, GNTST_OKAY);
    check_eq!(word(&page, 0), 0x42);
    for granted in [readonly, another] {
        check!(peer.end_grant(granted.reference)?);
        peer.free(granted.page)?;
    }
    Ok(())
}

/// Present, user, accessed; 2 is writable.
const READ: u64 = 0x25;

fn frames_of_others_are_not_mapped(_: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = peer.page()?;
    check!(peer.write(theirs.address, 0x5ec7e7)?);
    let range = Range::new(1)?;
    let at = range.start();
    for bits in [READ, READ | 2] {
        let result = call(Hypercall::UpdateVaMapping, [at, pte(theirs.frame, bits), 2, 0, 0]);
        check_eq!(result, Err(Errno::EBUSY), "bits {bits:#x}");
        expect_vector(try_read(at), 14, 0)?;
    }
    // Naming its owner helps only who has rights over it.
    let owner = u64::from(peer.domain().get());
    check_eq!(
        call(Hypercall::UpdateVaMappingOtherdomain, [at, pte(theirs.frame, READ), 2, owner, 0]),
        Err(Errno::EPERM)
    );
    let own = Page::new()?;
    check_eq!(call(Hypercall::UpdateVaMapping, [at, pte(own.mfn().get(), READ), 2, 0, 0]), Ok(0));
    check_eq!(try_read(at)?, 0);
    range.unmap(0)?;
    check_eq!(peer.read(theirs.address)?, 0x5ec7e7);
    peer.free(theirs)
}

fn memory_of_others_is_not_ours(_: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let theirs = peer.page()?;
    check!(peer.write(theirs.address, 7)?);
    for command in [MemoryOp::CurrentReservation, MemoryOp::MaximumReservation, MemoryOp::MaximumGpfn] {
        let mut whose = MemoryDomain { domid: peer.domain() };
        check_eq!(memop(command, &mut whose), Err(Errno::EPERM), "{command:?}");
    }
    check!(memop(MemoryOp::CurrentReservation, &mut MemoryDomain { domid: DomId::SELF })? > 0);
    // A write to its page, as to a table of ours and as to a table of its.
    let mut request = MmuUpdate { ptr: theirs.frame << 12, val: 1 };
    let list = &raw mut request as u64;
    let owner = u64::from(peer.domain().get());
    check_eq!(call(Hypercall::MmuUpdate, [list, 1, 0, SELF, 0]), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::MmuUpdate, [list, 1, 0, owner, 0]), Err(Errno::EPERM));
    check_eq!(call(Hypercall::MmuUpdate, [list, 1, 0, (owner + 1) << 16 | SELF, 0]), Err(Errno::EPERM));
    check_eq!(peer.read(theirs.address)?, 7);
    // The peer may not give our frames away either.
    let own = Page::new()?;
    let at = peer.range(1)?;
    let arguments = [at, pte(own.mfn().get(), READ), 2, 0, 0];
    check_eq!(peer.call(Hypercall::UpdateVaMapping, arguments, &mut [])?, Err(Errno::EBUSY));
    let arguments = [at, pte(theirs.frame, READ), 2, 0, 0];
    check_eq!(peer.call(Hypercall::UpdateVaMapping, arguments, &mut [])?, Ok(0));
    check_eq!(peer.read(at)?, 7);
    check_eq!(peer.call(Hypercall::UpdateVaMapping, [at, 0, 2, 0, 0], &mut [])?, Ok(0));
    peer.free(theirs)
}

fn tables_of_others_are_not_ours(_: &mut Domain) -> Verdict {
    let peer = peer::any()?;
    let (theirs, own) = (peer.page()?, Page::new()?);
    let owner = u64::from(peer.domain().get());
    let tables = (owner + 1) << 16 | SELF;
    let slot = MACH2PHYS_VIRT_START + own.mfn().get() * 8;
    let before = try_read(slot)?;
    let list = |command: MmuCommand, frame: u64, domains: u64| {
        let place = guest_sdk::abi::MachAddr::new(frame << 12);
        let mut request = MmuUpdate::new(command, place, 1);
        let mut done = 77u32;
        let arguments = [&raw mut request as u64, 1, &raw mut done as u64, domains, 0];
        (call(Hypercall::MmuUpdate, arguments), done)
    };
    let stores =
        [MmuCommand::NormalPtUpdate, MmuCommand::PtUpdatePreserveAd, MmuCommand::PtUpdateNoTranslate];
    for command in stores {
        check_eq!(list(command, theirs.frame, tables), (Err(Errno::EPERM), 0), "{command:?}");
        check_eq!(list(command, own.mfn().get(), owner), (Err(Errno::EPERM), 0), "{command:?}");
    }
    // The numbers of our own frames, as the peer; and the peer's.
    let machphys = MmuCommand::MachphysUpdate;
    check_eq!(list(machphys, own.mfn().get(), tables), (Err(Errno::EPERM), 0));
    check_eq!(list(machphys, theirs.frame, owner), (Err(Errno::EPERM), 0));
    check_eq!(list(machphys, theirs.frame, SELF), (Err(Errno::EINVAL), 0));
    check_eq!((try_read(slot)?, peer.read(theirs.address)?), (before, 0));
    // A list of nothing needs no right, but an operation of mmuext_op is refused whatever the list holds.
    check_eq!(call(Hypercall::MmuUpdate, [0, 0, 0, owner, 0]), Ok(0));
    check_eq!(call(Hypercall::MmuUpdate, [0, 0, 0, tables, 0]), Ok(0));
    check_eq!(call(Hypercall::MmuextOp, [0, 0, 0, owner, 0]), Err(Errno::EPERM));
    for command in [MmuextCmd::PinL1Table, MmuextCmd::ClearPage, MmuextCmd::TlbFlushAll, MmuextCmd::SetLdt] {
        let mut operation = MmuextOp::new(command, theirs.frame, 0);
        let arguments = [&raw mut operation as u64, 1, 0, owner, 0];
        check_eq!(call(Hypercall::MmuextOp, arguments), Err(Errno::EPERM), "{command:?}");
    }
    check!(peer.write(theirs.address, 3)?, "it is no table");
    check_eq!(list(MmuCommand::NormalPtUpdate, own.mfn().get(), SELF), (Ok(0), 1));
    check_eq!(try_read(own.address())?, 1);
    peer.free(theirs)
}

fn numbers_of_interrupts_run_out(_: &mut Domain) -> Verdict {
    // Who has taken one keeps it: a domain of this case's own.
    let peer = peer::mortal()?;
    let mut taken = Vec::new();
    let end = loop {
        let mut request = PhysdevGetFreePirq { kind: MAP_PIRQ_TYPE_MSI, ..PhysdevGetFreePirq::default() };
        let command = PhysdevOp::GetFreePirq.number();
        match peer.operation(Hypercall::PhysdevOp, command, &mut request)? {
            Ok(_) if taken.len() < 2000 => taken.push(request.pirq),
            answer => break answer,
        }
    };
    check_eq!(end, Err(Errno::ENOSPC), "after {} numbers", taken.len());
    check!(!taken.is_empty());
    check!(taken.windows(2).all(|pair| pair[0] > pair[1]), "from the highest down: {taken:?}");
    peer.end(ShutdownReason::Poweroff).map(drop)
}

fn ended_domain_closes_its_ports(domain: &mut Domain) -> Verdict {
    let peer = peer::mortal()?;
    let theirs = port_of(&peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    check_eq!(status(DomId::SELF, ours)?.status, EVTCHNSTAT_INTERDOMAIN);
    let gone = peer.end(ShutdownReason::Poweroff)?;
    let closed =
        wait_until(|| status(DomId::SELF, ours).is_ok_and(|now| now.status != EVTCHNSTAT_INTERDOMAIN));
    check!(closed, "the toolstack destroys a domain that has powered itself off");
    let now = status(DomId::SELF, ours)?;
    check_eq!((now.status, now.remote_domain()), (EVTCHNSTAT_UNBOUND, gone));
    check_eq!(send(ours), Ok(0));
    check_eq!(close(ours), Ok(0));
    Ok(())
}

fn mapped_page_outlives_its_domain(domain: &mut Domain) -> Verdict {
    let peer = peer::mortal()?;
    let granted = peer.grant(domain.id(), false)?;
    check!(peer.write(granted.page.address, 0x1e9acf)?);
    let theirs = port_of(&peer, domain.id())?;
    let ours = bind(peer.domain(), theirs)?;
    let range = Range::new(1)?;
    let at = range.start();
    let Ok(handle) = map(peer.domain(), granted.reference, at, MapFlags::empty())? else {
        return testkit::fail("it cannot be mapped");
    };
    let gone = peer.end(ShutdownReason::Crash)?;
    let dying =
        wait_until(|| status(DomId::SELF, ours).is_ok_and(|now| now.status != EVTCHNSTAT_INTERDOMAIN));
    check!(dying, "the toolstack destroys a domain that has crashed");
    check_eq!(try_read(at)?, 0x1e9acf);
    write(at, 0x1234)?;
    check_eq!(try_read(at)?, 0x1234);
    check_eq!(unmap(at, handle)?, GNTST_OKAY);
    expect_vector(try_read(at), 14, 0)?;
    // Nothing holds it any more. A domain that is being destroyed still grants, as long as it has the page: what is mapped by
    // asking too early is to be given back, or it would never end.
    let nobody = || match map(gone, granted.reference, at, MapFlags::empty()) {
        Ok(Ok(handle)) => {
            let _ = unmap(at, handle);
            false
        }
        answer => matches!(answer, Ok(Err(GNTST_BAD_DOMAIN))),
    };
    check!(wait_until(nobody), "its number names nobody");
    check_eq!(close(ours), Ok(0));
    Ok(())
}

fn dead_domain_is_nobody(domain: &mut Domain) -> Verdict {
    let peer = peer::mortal()?;
    let theirs = port_of(&peer, domain.id())?;
    let granted = peer.grant(domain.id(), false)?;
    let ours = bind(peer.domain(), theirs)?;
    check_eq!(close(ours), Ok(0));
    let gone = peer.end(ShutdownReason::Poweroff)?;
    let refusal = || bind(gone, theirs);
    check!(wait_until(|| refusal() == Err(Errno::ESRCH)), "binding: {:?}", refusal());
    check_eq!(status(gone, theirs).err(), Some(Errno::ESRCH));
    let mut argument = EvtchnAllocUnbound { dom: gone, remote_dom: DomId::SELF, port: Port::new(0) };
    check_eq!(evtchn(EvtchnOp::AllocUnbound, &mut argument), Err(Errno::ESRCH));
    check_eq!(memop(MemoryOp::CurrentReservation, &mut MemoryDomain { domid: gone }), Err(Errno::ESRCH));
    let range = Range::new(1)?;
    let at = range.start();
    check_eq!(map(gone, granted.reference, at, MapFlags::empty())?, Err(GNTST_BAD_DOMAIN));
    let page = Page::new()?;
    let (from, to) = (GnttabCopyPtr::granted(granted.reference, gone, 0), GnttabCopyPtr::own(page.mfn(), 0));
    check_eq!(copy(from, to, GNTCOPY_SOURCE_GREF)?, GNTST_BAD_DOMAIN);
    let owner = u64::from(gone.get());
    let mut request = MmuUpdate { ptr: granted.page.frame << 12, val: 1 };
    check_eq!(call(Hypercall::MmuUpdate, [&raw mut request as u64, 1, 0, owner, 0]), Err(Errno::ESRCH));
    let entry = pte(Mfn::new(granted.page.frame).get(), READ);
    check_eq!(call(Hypercall::UpdateVaMappingOtherdomain, [at, entry, 2, owner, 0]), Err(Errno::ESRCH));
    expect_vector(try_read(at), 14, 0)
}

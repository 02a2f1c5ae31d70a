//! Refusals that depend on who asks for what: frames and tables of other domains, kinds of entries, ports that ran out,
//! interrupts that somebody else handles. Each case also sees that nothing has changed, and that the same call works.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::{
    SELF, TablePage, at, by_privilege, call, evtchn, hypervisor_frame, mmuext, only_privileged, physdev, pte,
    update,
};
use guest_sdk::abi::evtchn::{
    EVTCHNSTAT_PIRQ, EvtchnAllocUnbound, EvtchnBindInterdomain, EvtchnBindIpi, EvtchnBindPirq,
    EvtchnBindVirq, EvtchnClose, EvtchnStatus,
};
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use guest_sdk::abi::physdev::{MAP_PIRQ_TYPE_GSI, PhysdevMapPirq};
use guest_sdk::abi::subops::{EvtchnOp, MmuextCmd, PhysdevOp};
use guest_sdk::abi::{DomId, Errno, Hypercall, MachAddr, Port, Virq};
use guest_sdk::memory::{self, Page, Range};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, try_read};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            operations_on_tables_are_for_oneself,
            entries_are_refused_in_every_form,
            tables_with_refused_entries_are_none,
            commands_of_nobody_write_nothing,
            no_port_is_left_for_any_kind,
            no_port_is_left_for_an_interrupt,
            an_interrupt_of_the_hypervisor_is_busy,
            debug_registers_have_32_bits,
        ],
    )
}

/// What `done` holds before a call.
const UNTOLD: u32 = 77;

/// `mmuext_op` with one operation on frames of `domain`: the result, and how many were done.
fn mmuext_of(domain: u64, command: MmuextCmd, arg1: u64, arg2: u64) -> (Result<u64, Errno>, u32) {
    let mut operation = MmuextOp::new(command, arg1, arg2);
    let mut done = UNTOLD;
    (call(Hypercall::MmuextOp, [at(&mut operation), 1, at(&mut done), domain, 0]), done)
}

fn operations_on_tables_are_for_oneself(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let mut mask = 1u64;
    let mask = at(&mut mask);
    let root = memory::root().get();
    let address = page.address();
    // Who has no control over the domain is told before the list is looked at, and so is not told how much of it was done.
    let untouched = by_privilege(0, UNTOLD);
    let cases = [
        (MmuextCmd::NewBaseptr, root, 0),
        (MmuextCmd::NewUserBaseptr, root, 0),
        (MmuextCmd::TlbFlushLocal, 0, 0),
        (MmuextCmd::InvlpgLocal, address, 0),
        (MmuextCmd::TlbFlushMulti, 0, mask),
        (MmuextCmd::InvlpgMulti, address, mask),
        (MmuextCmd::TlbFlushAll, 0, 0),
        (MmuextCmd::InvlpgAll, address, 0),
        (MmuextCmd::SetLdt, 0, 0),
    ];
    for (command, arg1, arg2) in cases {
        // Frames of DOMID_IO and DOMID_XEN exist; that the caller may use them or not makes no difference.
        for domain in [DomId::IO, DomId::XEN] {
            let refused = mmuext_of(domain.get().into(), command, arg1, arg2);
            check_eq!(refused, (Err(Errno::EPERM), untouched), "{command:?} for {domain:?}");
        }
        check_eq!(mmuext_of(SELF, command, arg1, arg2), (Ok(0), 1), "{command:?}");
    }
    for command in [MmuextCmd::FlushCache, MmuextCmd::FlushCacheGlobal] {
        check_eq!(
            mmuext_of(DomId::IO.get().into(), command, 0, 0),
            (Err(Errno::EPERM), untouched),
            "{command:?}"
        );
    }
    check_eq!(mmuext_of(SELF, MmuextCmd::NewUserBaseptr, 0, 0), (Ok(0), 1));
    for domain in [DomId::IO, DomId::XEN] {
        let wanted = by_privilege(Ok(0), Err(Errno::EPERM));
        check_eq!(call(Hypercall::MmuextOp, [0, 0, 0, domain.get().into(), 0]), wanted, "{domain:?}");
    }
    // A frame of the caller's is none of theirs.
    let wanted = by_privilege(Errno::EINVAL, Errno::EPERM);
    let frame = page.mfn().get();
    for command in [MmuextCmd::ClearPage, MmuextCmd::PinL1Table, MmuextCmd::UnpinTable] {
        check_eq!(
            mmuext_of(DomId::IO.get().into(), command, frame, 0),
            (Err(wanted), untouched),
            "{command:?}"
        );
    }
    check_eq!(mmuext_of(SELF, MmuextCmd::ClearPage, frame, 0), (Ok(0), 1));
    Ok(())
}

const RO: u64 = 0x61 | 1 << 63;
const RW: u64 = 0x63 | 1 << 63;
/// Present, accessed, not cached.
const UNCACHED: u64 = 0x31 | 1 << 63;
/// The frame number of all ones, which guests write for "none".
const NO_FRAME: u64 = 0xff_ffff_ffff;
/// The local interrupt controller, which the hypervisor gives to nobody.
const LOCAL_APIC: u64 = 0xfee00;

/// L1 entries that are refused, with the error.
fn refused_entries() -> Result<[(u64, Errno); 6], Stop> {
    let shared = guest_sdk::rt::start::start_info().ok_or("no start info")?.shared_info >> 12;
    Ok([
        (pte(NO_FRAME, RO), Errno::EINVAL),
        (pte(hypervisor_frame()?, RO), Errno::EBUSY),
        (pte(memory::root().get(), RW), Errno::EBUSY),
        // Who has no device may not choose a caching at all.
        (pte(shared, UNCACHED), by_privilege(Errno::EACCES, Errno::EINVAL)),
        (pte(LOCAL_APIC, RO), Errno::EPERM),
        (pte(LOCAL_APIC, RW), Errno::EPERM),
    ])
}

/// A way to store an entry.
type Store<'a> = dyn Fn(u64) -> Result<u64, Errno> + 'a;

fn entries_are_refused_in_every_form(_: &mut Domain) -> Verdict {
    let range = Range::new(1)?;
    let (address, place) = (range.start(), memory::leaf_address(range.start()).ok_or("no entry")?);
    let mut page = Page::new()?;
    page.bytes_mut()[..8].copy_from_slice(&0x5eedu64.to_le_bytes());
    let forms: [(&str, &Store); 5] = [
        ("normal", &|entry| update(MmuCommand::NormalPtUpdate, place, entry)),
        ("preserve_ad", &|entry| update(MmuCommand::PtUpdatePreserveAd, place, entry)),
        ("no_translate", &|entry| update(MmuCommand::PtUpdateNoTranslate, place, entry)),
        ("va_mapping", &|entry| call(Hypercall::UpdateVaMapping, [address, entry, 2, 0, 0])),
        ("otherdomain", &|entry| call(Hypercall::UpdateVaMappingOtherdomain, [address, entry, 2, SELF, 0])),
    ];
    for (form, store) in forms {
        for (entry, errno) in refused_entries()? {
            check_eq!(store(entry), Err(errno), "{form} of {entry:#x}");
            check_eq!(memory::leaf(address), Some(0), "{form} of {entry:#x}");
        }
        check_eq!(store(pte(page.mfn().get(), RO)), Ok(0), "{form}");
        check_eq!(try_read(address), Ok(0x5eed), "{form}");
        // Whatever the form, nothing is kept of it.
        check_eq!(update(MmuCommand::NormalPtUpdate, place, 0), Ok(0));
    }
    // Where no entry is, none can be stored: in a frame of the hypervisor, and where no table maps the address.
    let foreign = hypervisor_frame()? << 12;
    for command in
        [MmuCommand::NormalPtUpdate, MmuCommand::PtUpdatePreserveAd, MmuCommand::PtUpdateNoTranslate]
    {
        check_eq!(update(command, foreign, 0), Err(Errno::EINVAL), "{command:?}");
    }
    let unmapped = [conformance::NOWHERE, pte(page.mfn().get(), RO), 2, SELF, 0];
    check_eq!(call(Hypercall::UpdateVaMappingOtherdomain, unmapped), Err(Errno::EINVAL));
    // The entry is stored before the bitmap of vCPUs is read.
    let entry = pte(page.mfn().get(), RO);
    let bad_mask = [address, entry, 1 | conformance::NOWHERE, SELF, 0];
    check_eq!(call(Hypercall::UpdateVaMappingOtherdomain, bad_mask), Err(Errno::EFAULT));
    check_eq!(memory::leaf(address).map(|entry| entry >> 12 & NO_FRAME), Some(page.mfn().get()));
    check_eq!(update(MmuCommand::NormalPtUpdate, place, 0), Ok(0));
    Ok(())
}

fn tables_with_refused_entries_are_none(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let good = pte(page.mfn().get(), RO);
    for (entry, errno) in refused_entries()? {
        let table = TablePage::new(&[(1, good), (7, entry)])?;
        check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Err(errno), "entry {entry:#x}");
        check_eq!(table.word(7), entry, "it is as it was");
        // The error comes up through the tables above.
        let mut tables = alloc::vec![table];
        for command in [MmuextCmd::PinL2Table, MmuextCmd::PinL3Table, MmuextCmd::PinL4Table] {
            let below = tables.last().map_or(0, TablePage::mfn);
            let above = TablePage::new(&[(3, pte(below, 0x67))])?;
            let pinned = mmuext(command, above.mfn(), 0);
            tables.push(above);
            check_eq!(pinned, Err(errno), "{command:?} above entry {entry:#x}");
        }
        // From the top down, as they hold each other.
        while tables.pop().is_some() {}
    }
    let table = TablePage::new(&[(1, good)])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    Ok(())
}

fn commands_of_nobody_write_nothing(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let place = page.mfn().address().get();
    for command in 4..8 {
        let mut request = MmuUpdate { ptr: place | command, val: 1 };
        let mut done = 77u32;
        let arguments = [at(&mut request), 1, at(&mut done), SELF, 0];
        check_eq!(call(Hypercall::MmuUpdate, arguments), Err(Errno::ENOSYS), "command {command}");
        check_eq!((done, try_read(page.address())?), (0, 0), "command {command}");
    }
    // Whose frames they are is asked for what needs them, not for the list.
    let io = u64::from(DomId::IO.get());
    let mut request = MmuUpdate { ptr: place | 7, val: 1 };
    check_eq!(call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, io, 0]), Err(Errno::ENOSYS));
    check_eq!(call(Hypercall::MmuUpdate, [0, 0, 0, io, 0]), Ok(0));
    check_eq!(call(Hypercall::MmuUpdate, [0, 0, 0, DomId::XEN.get().into(), 0]), Ok(0));
    let mut request = MmuUpdate::new(MmuCommand::NormalPtUpdate, MachAddr::new(place), 1);
    check_eq!(call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0]), Ok(0));
    check_eq!(try_read(page.address()), Ok(1));
    Ok(())
}

fn unbound() -> Result<Port, Errno> {
    let mut argument = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, port: Port::new(0) };
    evtchn(EvtchnOp::AllocUnbound, &mut argument)?;
    Ok(argument.port)
}

fn close(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port })
}

fn status(port: Port) -> Result<EvtchnStatus, Errno> {
    let mut argument = EvtchnStatus { dom: DomId::SELF, port, ..EvtchnStatus::default() };
    evtchn(EvtchnOp::Status, &mut argument)?;
    Ok(argument)
}

/// All ports that are free, taken.
fn every_port() -> Result<Vec<Port>, Stop> {
    let mut ports = Vec::new();
    loop {
        match unbound() {
            Ok(port) if ports.len() < 5000 => ports.push(port),
            Err(Errno::ENOSPC) => return Ok(ports),
            other => return testkit::fail(format_args!("after {} ports: {other:?}", ports.len())),
        }
    }
}

/// Runs `work` while no port is free but those that it closes; the ports are its own.
fn without_ports(work: impl FnOnce(&mut Vec<Port>) -> Verdict) -> Verdict {
    let mut ports = every_port()?;
    let verdict = match ports.len() {
        0..100 => testkit::fail(format_args!("only {} ports", ports.len())),
        _ => work(&mut ports),
    };
    for port in ports {
        check_eq!(close(port), Ok(0));
    }
    verdict
}

/// A way to bind a new port.
type Bind<'a> = dyn Fn() -> Result<Port, Errno> + 'a;

fn no_port_is_left_for_any_kind(_: &mut Domain) -> Verdict {
    without_ports(|ports| {
        let waiting = ports[0];
        let kinds: [(&str, &Bind); 3] = [
            ("interdomain", &|| {
                let mut argument = EvtchnBindInterdomain {
                    remote_dom: DomId::SELF,
                    pad0: 0,
                    remote_port: waiting,
                    local_port: Port::new(0),
                };
                evtchn(EvtchnOp::BindInterdomain, &mut argument)?;
                Ok(argument.local_port)
            }),
            ("virtual interrupt", &|| {
                let mut argument = EvtchnBindVirq { virq: Virq::DEBUG.get(), vcpu: 0, port: Port::new(0) };
                evtchn(EvtchnOp::BindVirq, &mut argument)?;
                Ok(argument.port)
            }),
            ("vCPU", &|| {
                let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
                evtchn(EvtchnOp::BindIpi, &mut argument)?;
                Ok(argument.port)
            }),
        ];
        for (kind, bind) in kinds {
            check_eq!(bind(), Err(Errno::ENOSPC), "{kind}");
            let free = ports.pop().ok_or("no port")?;
            check_eq!(close(free), Ok(0));
            check_eq!(bind(), Ok(free), "{kind}");
            ports.push(free);
        }
        Ok(())
    })
}

/// The clock chip's pin.
const CLOCK: u32 = 8;
/// The first serial port's, at which the hypervisor's own console is.
const SERIAL: u32 = 4;

fn map_pirq(pin: u32) -> Result<u64, Errno> {
    let mut argument = PhysdevMapPirq {
        domid: DomId::SELF,
        kind: MAP_PIRQ_TYPE_GSI,
        index: pin as i32,
        pirq: pin as i32,
        ..PhysdevMapPirq::default()
    };
    physdev(PhysdevOp::MapPirq, &mut argument)
}

fn bind_pirq(pirq: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindPirq { pirq, flags: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindPirq, &mut argument)?;
    Ok(argument.port)
}

/// Sees that an interrupt can be bound, and that the port is the interrupt's.
fn is_bound_by(pirq: u32) -> Verdict {
    let port = bind_pirq(pirq)?;
    let now = status(port)?;
    check_eq!((now.status, now.u0), (EVTCHNSTAT_PIRQ, pirq));
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn no_port_is_left_for_an_interrupt(_: &mut Domain) -> Verdict {
    only_privileged("others have no interrupts")?;
    check_eq!(map_pirq(CLOCK), Ok(0));
    without_ports(|ports| {
        check_eq!(bind_pirq(CLOCK), Err(Errno::ENOSPC));
        check_eq!(close(ports.pop().ok_or("no port")?), Ok(0));
        is_bound_by(CLOCK)
    })
}

fn an_interrupt_of_the_hypervisor_is_busy(_: &mut Domain) -> Verdict {
    only_privileged("others have no interrupts")?;
    let next = unbound()?;
    check_eq!(close(next), Ok(0));
    check_eq!(map_pirq(SERIAL), Ok(0));
    for _ in 0..2 {
        check_eq!(bind_pirq(SERIAL), Err(Errno::EBUSY));
    }
    check_eq!(unbound(), Ok(next), "no port is taken");
    check_eq!(close(next), Ok(0));
    check_eq!(map_pirq(CLOCK), Ok(0));
    is_bound_by(CLOCK)
}

fn debug_registers_have_32_bits(_: &mut Domain) -> Verdict {
    let set = |register: u64, value: u64| call(Hypercall::SetDebugreg, [register, value, 0, 0, 0]);
    let get = |register: u64| call(Hypercall::GetDebugreg, [register, 0, 0, 0, 0]);
    check_eq!(set(7, 0x2_0400), Ok(0));
    for register in [6, 7] {
        let before = get(register)?;
        for value in [1 << 32, 1 << 63, u64::MAX] {
            check_eq!(set(register, value), Err(Errno::EINVAL), "dr{register} {value:#x}");
        }
        check_eq!(get(register), Ok(before), "dr{register}");
    }
    check!(get(7)? & 0x2_0000 != 0);
    // General detect is the hypervisor's.
    check_eq!(set(7, 0x2400), Err(Errno::EPERM));
    check_eq!(get(7).map(|value| value & 0x2_2000), Ok(0x2_0000));
    check_eq!(set(7, 0x400), Ok(0));
    Ok(())
}

//! Device interrupts by messages and by lines, and the CPU at which they arrive.
//!
//! The control interface that hands messages out is Xenolith's own. Devices are QEMU's `edu` (MSI and a line, raised at will) and
//! `e1000e` (MSI-X, raised by its register of causes); without them there is nothing to show. The scenario `device-interrupts` has
//! both, and four processors.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::{call, evtchn, is_privileged, only_on, pending, physdev, take_pending};
use guest_sdk::abi::evtchn::{EvtchnBindPirq, EvtchnBindVcpu, EvtchnClose};
use guest_sdk::abi::physdev::{MAP_PIRQ_TYPE_GSI, PhysdevEoi, PhysdevMapPirq, PhysdevUnmapPirq};
use guest_sdk::abi::subops::{EvtchnOp, PhysdevOp};
use guest_sdk::abi::{DomId, Errno, Hypercall, Port};
use guest_sdk::hardware::{ConfigPorts, Message, Registers, Store};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, fail, skip};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, control, entry};
use pci::{Bar, Command, Function, Msi, Msix};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            messages_are_refused,
            a_message_arrives_on_the_cpu_that_was_asked_for,
            a_line_arrives_on_the_cpu_of_its_vcpu,
            an_entry_of_a_table_is_a_message_too,
            a_vector_of_nobody_is_counted_and_dropped,
            a_limit_of_messages_is_obeyed,
        ],
    )
}

const OURS: &str = "messages are handed out by Xenolith's own control interface";
const MS: u64 = 1_000_000;

/// Registers of `edu` (QEMU's docs/specs/edu.rst): a store to the first raises the interrupt, one to the second takes it back.
const EDU: (u16, u16) = (0x1234, 0x11e8);
const EDU_RAISE: u64 = 0x60;
const EDU_ACKNOWLEDGE: u64 = 0x64;

/// Registers of the 82574 (its data sheet, 10.2.4): causes, a store that sets them, and what may interrupt.
const E1000E: (u16, u16) = (0x8086, 0x10d3);
const CAUSES: u64 = 0xc0;
const SET_CAUSES: u64 = 0xc8;
const MAY_INTERRUPT: u64 = 0xd0;
/// Which message each kind of cause uses.
const VECTORS: u64 = 0xe4;
const OTHER_CAUSE: u32 = 1 << 24;

fn yield_cpu() {
    let _ = call(Hypercall::SchedOp, [0, 0, 0, 0, 0]);
}

fn wait(what: &str, done: impl Fn() -> bool) -> Verdict {
    let start = now_ns();
    while !done() {
        if now_ns() - start > 5_000 * MS {
            return fail(format_args!("{what}: not within five seconds"));
        }
        yield_cpu();
    }
    Ok(())
}

fn pause() {
    let start = now_ns();
    while now_ns() - start < 20 * MS {
        yield_cpu();
    }
}

/// A function of the machine, its memory of base address 0 mapped.
fn device(config: &ConfigPorts, id: (u16, u16)) -> Result<(Function, Registers), Stop> {
    let Some(function) = pci::functions(config).into_iter().find(|function| function.id() == id) else {
        return skip("the machine has no such device");
    };
    let Some(Bar::Memory { address, .. }) = function.bar(config, 0) else {
        return fail("firmware gave it no memory");
    };
    function.allow(config, Command::MEMORY | Command::BUS_MASTER, Command::NO_LINE);
    Ok((function, Registers::map(address, 4096)?))
}

fn bind(pirq: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindPirq { pirq, flags: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindPirq, &mut argument)?;
    Ok(argument.port)
}

fn close(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port })
}

/// Has this vCPU run on one CPU only, and a port's interrupts follow it there.
fn move_to(cpu: u32, port: Port) -> Verdict {
    stay_on(1 << cpu)?;
    check_eq!(evtchn(EvtchnOp::BindVcpu, &mut EvtchnBindVcpu { port, vcpu: 0 }), Ok(0));
    Ok(())
}

fn stay_on(cpus: u64) -> Verdict {
    control::set_affinity(DomId::SELF, 0, cpus, u64::MAX)?;
    wait("this vCPU to move", || {
        control::vcpu_info(DomId::SELF, 0).is_ok_and(|info| cpus >> info.cpu & 1 != 0)
    })
}

/// There and back again.
fn round() -> Result<Vec<u32>, Errno> {
    let cpus = control::phys_info()?.cpus;
    Ok((0..cpus).chain((0..cpus).rev()).collect())
}

/// Raises an interrupt and sees where it arrives. Returns how often.
fn arrivals(pirq: u32, port: Port, on: u32, raise: impl Fn()) -> Result<u64, Stop> {
    let before = control::interrupt_info(pirq)?.arrived;
    take_pending(port);
    raise();
    wait("the interrupt", || pending(port))?;
    let info = control::interrupt_info(pirq)?;
    check_eq!(info.seen_on, on, "interrupt {pirq}");
    check!(take_pending(port));
    Ok(info.arrived - before)
}

/// Raises an interrupt and sees where it arrives, once.
fn arrives(pirq: u32, port: Port, on: u32, raise: impl Fn()) -> Verdict {
    check_eq!(arrivals(pirq, port, on, raise)?, 1, "interrupt {pirq}");
    Ok(())
}

fn a_message_arrives_on_the_cpu_that_was_asked_for(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    conformance::only_privileged("devices are the first domain's")?;
    let config = ConfigPorts::open()?;
    let (function, registers) = device(&config, EDU)?;
    let Some(msi) = Msi::find(&config, function) else { return fail("edu has MSI") };
    let message = Message::allocate()?;
    let pirq = message.pirq();
    let port = bind(pirq)?;
    let raise = || {
        registers.write(EDU_RAISE, 1);
        registers.write(EDU_ACKNOWLEDGE, 1);
    };
    let mut stores: Vec<Store> = Vec::new();
    for cpu in round()? {
        move_to(cpu, port)?;
        check_eq!(control::interrupt_info(pirq)?.cpu, cpu);
        let store = message.store()?;
        check!(msi.enable(&config, store));
        arrives(pirq, port, cpu, raise)?;
        stores.push(store);
    }
    for (index, store) in stores.iter().enumerate() {
        check_eq!(*store, stores[stores.len() - 1 - index], "the same CPU, the same store");
        check_eq!(store.data, stores[0].data, "a message keeps its vector");
    }
    let last = control::phys_info()?.cpus - 1;
    if last != 0 {
        check!(stores[0].address != stores[1].address);
        // The vCPU moves and nobody tells the device: it arrives all the same, where it did, and shows where it should.
        move_to(0, port)?;
        check!(msi.enable(&config, message.store()?));
        stay_on(1 << last)?;
        arrives(pirq, port, 0, raise)?;
        check_eq!(control::interrupt_info(pirq)?.cpu, last);
    }
    msi.disable(&config);
    check_eq!(close(port), Ok(0));
    stay_on(u64::MAX)
}

fn a_line_arrives_on_the_cpu_of_its_vcpu(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    conformance::only_privileged("devices are the first domain's")?;
    let config = ConfigPorts::open()?;
    let (_, registers) = device(&config, EDU)?;
    // Which pin it leads to is in tables that only an interpreter can read: all are tried.
    let mut pins = Vec::new();
    for gsi in 16..24 {
        let mut map = PhysdevMapPirq {
            domid: DomId::SELF,
            kind: MAP_PIRQ_TYPE_GSI,
            index: gsi,
            pirq: gsi,
            ..Default::default()
        };
        check_eq!(physdev(PhysdevOp::MapPirq, &mut map), Ok(0));
        let port = bind(gsi as u32)?;
        take_pending(port);
        pins.push((gsi as u32, port));
    }
    let raise = || registers.write(EDU_RAISE, 1);
    let acknowledge = || registers.write(EDU_ACKNOWLEDGE, 1);
    raise();
    wait("a pin", || pins.iter().any(|(_, port)| pending(*port)))?;
    let Some(&(gsi, port)) = pins.iter().find(|(_, port)| pending(*port)) else { return fail("it has gone") };
    for (_, other) in pins.iter().filter(|(other, _)| *other != gsi) {
        check_eq!(close(*other), Ok(0));
    }
    let end = || physdev(PhysdevOp::Eoi, &mut PhysdevEoi { irq: gsi });
    acknowledge();
    check_eq!(end(), Ok(0));
    for cpu in round()? {
        move_to(cpu, port)?;
        check_eq!(control::interrupt_info(gsi)?.cpu, cpu);
        arrives(gsi, port, cpu, raise)?;
        // The line is still raised, and no further interrupt comes before this one has ended.
        pause();
        check!(!pending(port));
        arrives(gsi, port, cpu, || {
            let _ = end();
        })?;
        // It moves while one has not ended.
        move_to(0, port)?;
        pause();
        check!(!pending(port));
        arrives(gsi, port, 0, || {
            let _ = end();
        })?;
        acknowledge();
        check_eq!(end(), Ok(0));
        pause();
        check!(!pending(port), "it was taken back");
    }
    check_eq!(close(port), Ok(0));
    stay_on(u64::MAX)
}

fn an_entry_of_a_table_is_a_message_too(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    conformance::only_privileged("devices are the first domain's")?;
    let config = ConfigPorts::open()?;
    let (function, registers) = device(&config, E1000E)?;
    let Some(msix) = Msix::find(&config, function) else { return fail("e1000e has MSI-X") };
    check!(msix.entries() >= 2, "{} messages", msix.entries());
    let Some((address, bytes)) = msix.place(&config) else { return fail("its table is nowhere") };
    let table = msix.table(Registers::map(address, bytes)?);
    let message = Message::allocate()?;
    let pirq = message.pirq();
    let port = bind(pirq)?;
    msix.enable(&config, true);
    // Other causes use message 1.
    registers.write(VECTORS, (8 | 1) << 16);
    registers.write(MAY_INTERRUPT, OTHER_CAUSE);
    let raise = || {
        registers.write(CAUSES, u32::MAX);
        registers.write(SET_CAUSES, OTHER_CAUSE);
    };
    for cpu in round()? {
        move_to(cpu, port)?;
        table.set(1, message.store()?);
        // This device may interrupt more than once for a cause.
        check!(arrivals(pirq, port, cpu, raise)? >= 1);
    }
    // A masked entry keeps it.
    table.mask(1, true);
    pause();
    take_pending(port);
    raise();
    pause();
    check!(!pending(port));
    check!(arrivals(pirq, port, 0, || table.mask(1, false))? >= 1);
    msix.enable(&config, false);
    check_eq!(close(port), Ok(0));
    stay_on(u64::MAX)
}

fn a_vector_of_nobody_is_counted_and_dropped(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    conformance::only_privileged("devices are the first domain's")?;
    let config = ConfigPorts::open()?;
    let (function, registers) = device(&config, EDU)?;
    let Some(msi) = Msi::find(&config, function) else { return fail("edu has MSI") };
    let message = Message::allocate()?;
    let store = message.store()?;
    let raise = || {
        registers.write(EDU_RAISE, 1);
        registers.write(EDU_ACKNOWLEDGE, 1);
    };
    let dropped = || control::phys_info().map_or(0, |info| info.dropped_interrupts);
    // A message that has no port; one that nobody has; a vector that is no device's at all.
    for data in [store.data, 0xee, 0x35] {
        check!(msi.enable(&config, Store { data, ..store }));
        for _ in 0..3 {
            let before = dropped();
            raise();
            wait("it to be dropped", || dropped() == before + 1)?;
        }
    }
    // The machine goes on, and so does the message once it has a port.
    let port = bind(message.pirq())?;
    check!(msi.enable(&config, message.store()?));
    let cpu = control::interrupt_info(message.pirq())?.cpu;
    arrives(message.pirq(), port, cpu, raise)?;
    msi.disable(&config);
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn unmap(pirq: u32) -> Result<u64, Errno> {
    physdev(PhysdevOp::UnmapPirq, &mut PhysdevUnmapPirq { domid: DomId::SELF, pad0: 0, pirq: pirq as i32 })
}

fn messages_are_refused(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    if !is_privileged() {
        check_eq!(control::allocate_message().err(), Some(Errno::EPERM));
        check_eq!(control::interrupt_info(8).err(), Some(Errno::EINVAL));
        return Ok(());
    }
    let message = Message::allocate()?;
    let pirq = message.pirq();
    check_eq!(control::interrupt_info(pirq)?.address, message.store()?.address);
    check_eq!(control::interrupt_info(8)?.address, 0, "a pin has no message");
    check_eq!(control::interrupt_info(100_000).err(), Some(Errno::EINVAL));
    // All that there are, and back.
    let mut all = Vec::new();
    let error = loop {
        match Message::allocate() {
            Ok(message) => all.push(message),
            Err(error) => break error,
        }
    };
    check_eq!(error, Errno::ENOSPC);
    check!(all.len() >= 64, "{} messages", all.len());
    check!(all.iter().all(|other| other.pirq() != pirq));
    drop(all);
    // What is bound is nobody else's before its port is closed.
    let port = bind(pirq)?;
    check_eq!(bind(pirq), Err(Errno::EEXIST));
    drop(message);
    check_eq!(unmap(pirq), Err(Errno::EINVAL), "given back");
    check_eq!(control::interrupt_info(pirq).err(), Some(Errno::EINVAL));
    let other = Message::allocate()?;
    check!(other.pirq() != pirq);
    check_eq!(close(port), Ok(0));
    check_eq!(bind(pirq), Err(Errno::EINVAL), "it has no owner");
    check_eq!(Message::allocate()?.pirq(), pirq, "the first that is free");
    Ok(())
}

fn a_limit_of_messages_is_obeyed(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    if !is_privileged() {
        check_eq!(control::set_message_limit(DomId::SELF, 0), Err(Errno::EPERM));
        return Ok(());
    }
    check_eq!(control::set_message_limit(DomId::new(1234), 1), Err(Errno::ESRCH));
    // Last: what is given away does not come back.
    check_eq!(control::set_message_limit(DomId::SELF, 1), Ok(()));
    let message = Message::allocate()?;
    check_eq!(Message::allocate().err(), Some(Errno::EPERM));
    check_eq!(control::set_message_limit(DomId::SELF, 2), Err(Errno::EPERM), "more than it may have itself");
    drop(message);
    check!(Message::allocate().is_ok());
    Ok(())
}

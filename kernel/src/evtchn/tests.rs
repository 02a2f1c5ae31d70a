//! Ports on the simulated machine: each operation and its errors, and random sequences against a small model.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::{DomId, Mfn, Port, VcpuId, Virq};
use proptest::prelude::*;

use super::{Entry, Error, PortState, PortTable, Progress, is_global};
use crate::access::Rights;
use crate::domain::{Domain, Life, NewDomain, VcpuRef, block};
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
use crate::mm::{FrameRecord, Memory};
use crate::platform::sim::SimMachine;
use crate::platform::{CpuId, Platform};

const PINS: u32 = 24;

/// A hypervisor with `frames` frames of RAM and no domains.
pub(crate) fn hypervisor(frames: usize) -> Hypervisor<SimMachine> {
    let records: &'static [FrameRecord] = Box::leak((0..frames).map(|_| FrameRecord::new()).collect());
    let m2p: &'static [AtomicU64] = Box::leak((0..frames).map(|_| AtomicU64::new(0)).collect());
    let memory = Memory::new(records, m2p);
    memory.declare_ram(Mfn::new(0), frames as u64);
    memory.add_free(Mfn::new(1), frames as u64 - 1);
    Hypervisor::new(SimMachine::new(frames), memory)
}

/// Adds a domain whose vCPUs keep their vcpu_info in shared_info.
pub(crate) fn add_domain(hv: &Hypervisor<SimMachine>, id: u16, vcpus: u32, rights: Rights) -> Arc<Domain> {
    let new = NewDomain { id: Some(DomId::new(id)), handle: [0; 16], vcpus, max_pages: 1024, rights };
    let domain = hv.create_domain(new).expect("the test has memory and the number is free");
    for vcpu in &domain.vcpus {
        vcpu.set_upcall_mask(&hv.platform, false);
    }
    domain
}

fn two_domains() -> (Hypervisor<SimMachine>, Arc<Domain>, Arc<Domain>) {
    let hv = hypervisor(64);
    let a = add_domain(&hv, 0, 2, Rights::all(PINS));
    let b = add_domain(&hv, 5, 2, Rights::none());
    (hv, a, b)
}

fn word(hv: &Hypervisor<SimMachine>, domain: &Domain, index: usize) -> u64 {
    hv.platform.frame(domain.shared_info)[index].load(Ordering::SeqCst)
}

fn set_word(hv: &Hypervisor<SimMachine>, domain: &Domain, index: usize, value: u64) {
    hv.platform.frame(domain.shared_info)[index].store(value, Ordering::SeqCst);
}

fn pending(hv: &Hypervisor<SimMachine>, domain: &Domain, port: Port) -> bool {
    word(hv, domain, 256 + port.get() as usize / 64) >> (port.get() % 64) & 1 != 0
}

/// What a guest does in its upcall handler, for all vCPUs; returns the ports it saw.
fn consume(hv: &Hypervisor<SimMachine>, domain: &Domain) -> BTreeSet<u32> {
    let mut seen = BTreeSet::new();
    for vcpu in 0..domain.vcpus.len() {
        let upcall = word(hv, domain, vcpu * 8);
        set_word(hv, domain, vcpu * 8, upcall & !0xff);
        let selector = word(hv, domain, vcpu * 8 + 1);
        set_word(hv, domain, vcpu * 8 + 1, 0);
        for index in (0..64).filter(|i| selector >> i & 1 != 0) {
            let mask = word(hv, domain, 320 + index);
            let bits = word(hv, domain, 256 + index) & !mask;
            set_word(hv, domain, 256 + index, word(hv, domain, 256 + index) & !bits);
            seen.extend((0..64).filter(|b| bits >> b & 1 != 0).map(|b| index as u32 * 64 + b));
        }
    }
    seen
}

fn connect(hv: &Hypervisor<SimMachine>, a: &Arc<Domain>, b: &Arc<Domain>) -> (Port, Port) {
    let waiting = hv.alloc_unbound(a, b.id, &mut Budget::unlimited()).unwrap();
    let port = hv.bind_interdomain(b, a, waiting, &mut Budget::unlimited()).unwrap();
    (waiting, port)
}

#[test]
fn a_signal_crosses() {
    let (hv, a, b) = two_domains();
    let (pa, pb) = connect(&hv, &a, &b);
    // The binder starts with an event, in case one was sent to the port before.
    assert_eq!(consume(&hv, &b), BTreeSet::from([pb.get()]));
    assert_eq!(hv.send(&b, pb), Ok(()));
    assert_eq!(hv.send(&b, pb), Ok(()));
    assert_eq!(consume(&hv, &a), BTreeSet::from([pa.get()]));
    assert_eq!(consume(&hv, &a), BTreeSet::new());
    assert_eq!(hv.send(&a, pa), Ok(()));
    assert_eq!(consume(&hv, &b), BTreeSet::from([pb.get()]));
}

#[test]
fn closing_one_end_leaves_the_other_waiting() {
    let (hv, a, b) = two_domains();
    let (pa, pb) = connect(&hv, &a, &b);
    hv.close(&b, pb).unwrap();
    assert_eq!(hv.port_status(&a, pa).unwrap().state, PortState::Unbound { remote: b.id });
    assert!(!pending(&hv, &b, pb), "the pending bit goes with the port");
    assert_eq!(hv.send(&a, pa), Ok(()), "a send to a closed peer is dropped");
    assert_eq!(hv.send(&b, pb), Err(Error::BadPort));
    assert_eq!(hv.close(&b, pb), Err(Error::BadPort));
    assert_eq!(hv.bind_interdomain(&b, &a, pa, &mut Budget::unlimited()), Ok(pb));
}

#[test]
fn only_the_named_domain_may_connect() {
    let (hv, a, b) = two_domains();
    let c = add_domain(&hv, 9, 1, Rights::none());
    let waiting = hv.alloc_unbound(&a, b.id, &mut Budget::unlimited()).unwrap();
    assert_eq!(hv.bind_interdomain(&c, &a, waiting, &mut Budget::unlimited()), Err(Error::BadPort));
    assert_eq!(
        hv.bind_interdomain(&b, &a, Port::new(waiting.get() + 1), &mut Budget::unlimited()),
        Err(Error::BadPort)
    );
    assert_eq!(
        hv.bind_interdomain(&b, &a, Port::new(100_000), &mut Budget::unlimited()),
        Err(Error::BadPort)
    );
    for domain in [&b, &c] {
        assert_eq!(domain.events.lock().active(), 0, "a refused bind takes no port");
    }
    assert!(hv.bind_interdomain(&b, &a, waiting, &mut Budget::unlimited()).is_ok());
    assert_eq!(hv.bind_interdomain(&b, &a, waiting, &mut Budget::unlimited()), Err(Error::BadPort));
}

#[test]
fn a_domain_may_connect_to_itself() {
    let (hv, a, _) = two_domains();
    let (p, q) = connect(&hv, &a, &a);
    assert_ne!(p, q);
    consume(&hv, &a);
    hv.send(&a, p).unwrap();
    assert_eq!(consume(&hv, &a), BTreeSet::from([q.get()]));
    hv.close(&a, q).unwrap();
    assert_eq!(hv.port_status(&a, p).unwrap().state, PortState::Unbound { remote: a.id });
}

#[test]
fn virtual_interrupts_bind_once_and_reach_their_vcpu() {
    let (hv, a, _) = two_domains();
    let port = hv.bind_virq(&a, Virq::TIMER, VcpuId::new(1), &mut Budget::unlimited()).unwrap();
    assert_eq!(
        hv.bind_virq(&a, Virq::TIMER, VcpuId::new(1), &mut Budget::unlimited()),
        Err(Error::AlreadyBound)
    );
    assert_eq!(hv.bind_virq(&a, Virq::TIMER, VcpuId::new(2), &mut Budget::unlimited()), Err(Error::NoVcpu));
    assert_eq!(
        hv.bind_virq(&a, Virq::CONSOLE, VcpuId::new(1), &mut Budget::unlimited()),
        Err(Error::BadSource)
    );
    assert_eq!(
        hv.bind_virq(&a, Virq::new(24), VcpuId::new(0), &mut Budget::unlimited()),
        Err(Error::BadSource)
    );
    assert_eq!(hv.bind_vcpu(&a, port, VcpuId::new(0)), Err(Error::BadPort));
    hv.raise_virq(&VcpuRef::new(&a, VcpuId::new(0)).unwrap(), Virq::TIMER);
    assert!(!pending(&hv, &a, port), "the timer of vCPU 0 is not bound");
    hv.raise_virq(&VcpuRef::new(&a, VcpuId::new(1)).unwrap(), Virq::TIMER);
    assert!(pending(&hv, &a, port));
    assert_eq!(word(&hv, &a, 8) & 0xff, 1, "vCPU 1 is told");
    assert_eq!(word(&hv, &a, 0) & 0xff, 0, "vCPU 0 is not");

    let console = hv.bind_virq(&a, Virq::CONSOLE, VcpuId::new(0), &mut Budget::unlimited()).unwrap();
    hv.bind_vcpu(&a, console, VcpuId::new(1)).unwrap();
    consume(&hv, &a);
    hv.raise_virq(&VcpuRef::new(&a, VcpuId::new(1)).unwrap(), Virq::CONSOLE);
    assert!(pending(&hv, &a, console));
    assert_eq!(word(&hv, &a, 8) & 0xff, 1);
    hv.close(&a, console).unwrap();
    assert!(
        hv.bind_virq(&a, Virq::CONSOLE, VcpuId::new(0), &mut Budget::unlimited()).is_ok(),
        "closing unbinds"
    );
}

#[test]
fn an_ipi_port_signals_its_vcpu() {
    let (hv, a, _) = two_domains();
    assert_eq!(hv.bind_ipi(&a, VcpuId::new(7), &mut Budget::unlimited()), Err(Error::NoVcpu));
    let port = hv.bind_ipi(&a, VcpuId::new(1), &mut Budget::unlimited()).unwrap();
    hv.send(&a, port).unwrap();
    assert_eq!((word(&hv, &a, 8) & 0xff, word(&hv, &a, 0) & 0xff), (1, 0));
    assert_eq!(hv.bind_vcpu(&a, port, VcpuId::new(0)), Err(Error::BadPort));
}

#[test]
fn a_blocked_vcpu_wakes_and_a_poller_wakes_even_when_masked() {
    let (hv, a, b) = two_domains();
    let (pa, pb) = connect(&hv, &a, &b);
    consume(&hv, &b);
    let vcpu = &a.vcpus[0];
    vcpu.blocked.store(block::BLOCKED, Ordering::SeqCst);
    hv.send(&b, pb).unwrap();
    assert_eq!(vcpu.blocked.load(Ordering::SeqCst), 0);
    consume(&hv, &a);

    set_word(&hv, &a, 320, 1 << pa.get());
    for (polled, wakes) in [(pa.get(), true), (0, true), (pa.get() + 1, false)] {
        vcpu.blocked.store(block::POLLING, Ordering::SeqCst);
        vcpu.polled_port.store(polled, Ordering::SeqCst);
        set_word(&hv, &a, 256, 0);
        hv.send(&b, pb).unwrap();
        assert_eq!(vcpu.blocked.load(Ordering::SeqCst) == 0, wakes, "polling {polled}");
        assert_eq!(hv.any_pending(&a, &[pa]), Ok(true));
    }
    assert_eq!(word(&hv, &a, 0) & 0xff, 0, "masked: no upcall");
    hv.unmask(&a, pa).unwrap();
    assert_eq!(word(&hv, &a, 0) & 0xff, 1);
    assert_eq!(hv.unmask(&a, Port::new(64)), Err(Error::BadPort));
}

#[test]
fn pins_need_the_right_and_have_one_listener() {
    let (hv, a, b) = two_domains();
    assert_eq!(hv.bind_pirq(&b, 4, &mut Budget::unlimited()), Err(Error::NotPermitted));
    assert_eq!(hv.bind_pirq(&a, PINS, &mut Budget::unlimited()), Err(Error::BadSource));
    let port = hv.bind_pirq(&a, 4, &mut Budget::unlimited()).unwrap();
    assert_eq!(hv.bind_pirq(&a, 4, &mut Budget::unlimited()), Err(Error::AlreadyBound));
    b.rights.lock().irqs.insert(4, 4);
    assert_eq!(hv.bind_pirq(&b, 4, &mut Budget::unlimited()), Err(Error::PinInUse));
    hv.irqs.keep(5);
    a.rights.lock().irqs.insert(5, 5);
    assert_eq!(hv.bind_pirq(&a, 5, &mut Budget::unlimited()), Err(Error::PinInUse), "the hypervisor's own");
    assert_eq!(b.events.lock().active(), 0);

    hv.on_irq(4);
    assert!(pending(&hv, &a, port));
    assert!(hv.irq_status(&a, 4).unwrap().in_service);
    assert_eq!(hv.end_irq(&b, 4), Err(Error::BadSource));
    hv.end_irq(&a, 4).unwrap();
    assert!(!hv.irq_status(&a, 4).unwrap().in_service);

    hv.close(&a, port).unwrap();
    assert_eq!(hv.irqs.listener(4), None);
    consume(&hv, &a);
    hv.on_irq(4);
    assert_eq!(consume(&hv, &a), BTreeSet::new(), "an interrupt nobody listens to goes nowhere");
    assert!(hv.bind_pirq(&b, 4, &mut Budget::unlimited()).is_ok());
}

/// A page of the domain's own.
fn page_of(hv: &Hypervisor<SimMachine>, domain: &Domain) -> Mfn {
    hv.give_frames(domain, 0, u64::MAX).unwrap()
}

#[test]
fn notified_of_unmasking_it_looks_at_the_masks_of_the_form_in_force() {
    let (hv, a, _) = two_domains();
    let mut budget = Budget::unlimited();
    let port = hv.bind_pirq(&a, 4, &mut budget).unwrap();
    let in_service = || hv.irq_status(&a, 4).unwrap().in_service;
    // Masked in the two-level form, which is not in force any more.
    set_word(&hv, &a, 320, 1 << port.get());
    hv.on_irq(4);
    hv.end_unmasked_irqs(&a);
    assert!(in_service());
    let (control, array) = (page_of(&hv, &a), page_of(&hv, &a));
    hv.init_control(&a, VcpuId::new(0), control, 0).unwrap();
    hv.end_unmasked_irqs(&a);
    assert!(in_service(), "a port that has no word is masked");
    hv.expand_array(&a, array).unwrap();
    let word = &hv.platform.frame(array)[port.get() as usize / 2];
    let masked = u64::from(super::fifo::MASKED) << (port.get() % 2 * 32);
    word.fetch_or(masked, Ordering::SeqCst);
    hv.end_unmasked_irqs(&a);
    assert!(in_service());
    word.fetch_and(!masked, Ordering::SeqCst);
    hv.end_unmasked_irqs(&a);
    assert!(!in_service());
}

#[test]
fn the_page_of_ends_is_held_until_the_domain_dies() {
    let (hv, a, _) = two_domains();
    let page = page_of(&hv, &a);
    let writable = || hv.pager().get_typed(page, a.id, &hv, &mut Budget::unlimited()).unwrap();
    hv.set_eoi_map(&a, writable(), false).unwrap();
    assert_eq!(hv.set_eoi_map(&a, writable(), false), Err(Error::AlreadyBound));
    let bits = &hv.platform.frame(page)[0];
    bits.store(1 << 4, Ordering::SeqCst);
    let port = hv.bind_pirq(&a, 20, &mut Budget::unlimited()).unwrap();
    hv.bind_pirq(&a, 4, &mut Budget::unlimited()).unwrap();
    assert_eq!(bits.load(Ordering::SeqCst), 1 << 20);
    // The second command leaves the port's mask alone.
    set_word(&hv, &a, 320, 1 << port.get());
    hv.end_irq(&a, 20).unwrap();
    assert_eq!(word(&hv, &a, 320), 1 << port.get());
    let count = hv.mm.type_word(page).unwrap().count();
    assert_eq!(count, 1);
    a.set_life(Life::Dying);
    assert_eq!(hv.tear_down_ports(&a, &mut Budget::unlimited()), Progress::Done);
    assert_eq!(hv.mm.type_word(page).unwrap().count(), 0);
    assert_eq!(hv.set_eoi_map(&a, writable(), false), Err(Error::Dying));
}

#[test]
fn how_a_pin_is_triggered_is_said_once_and_before_it_is_bound() {
    let (hv, a, b) = two_domains();
    assert_eq!(hv.setup_irq(&b, 20, true, true), Err(Error::NotPermitted));
    assert_eq!(hv.setup_irq(&a, PINS, true, true), Err(Error::BadSource));
    hv.setup_irq(&a, 20, true, true).unwrap();
    let port = hv.bind_pirq(&a, 20, &mut Budget::unlimited()).unwrap();
    hv.close(&a, port).unwrap();
    assert_eq!(hv.setup_irq(&a, 20, false, false), Err(Error::AlreadyBound));
    hv.bind_pirq(&a, 21, &mut Budget::unlimited()).unwrap();
    assert_eq!(hv.setup_irq(&a, 21, true, true), Err(Error::AlreadyBound));
}

#[test]
fn a_message_reaches_the_port_of_its_owner() {
    let (hv, a, b) = two_domains();
    let mut budget = Budget::unlimited();
    assert_eq!(hv.allocate_message(&b), Err(Error::NotPermitted));
    let message = hv.allocate_message(&a).unwrap();
    assert!(message >= PINS && a.rights.lock().pirqs.contains(message));
    assert_eq!(hv.bind_pirq(&b, message, &mut budget), Err(Error::BadSource), "another's");
    assert_eq!(hv.bind_pirq(&a, message + 1, &mut budget), Err(Error::BadSource), "nobody's");
    hv.on_irq(message);
    assert_eq!((hv.irqs.dropped(), consume(&hv, &a).len()), (1, 0), "nobody listens");
    let port = hv.bind_pirq(&a, message, &mut budget).unwrap();
    assert_eq!(hv.bind_pirq(&a, message, &mut budget), Err(Error::AlreadyBound));
    hv.on_irq(message);
    assert_eq!(consume(&hv, &a), BTreeSet::from([port.get()]));
    // It comes again without an end, and an end does no harm.
    hv.on_irq(message);
    hv.end_irq(&a, message).unwrap();
    assert_eq!(consume(&hv, &a), BTreeSet::from([port.get()]));
    let info = hv.irq_info(&a, message).unwrap();
    assert_eq!((info.arrived, info.message), (3, hv.platform.message(message - PINS, CpuId(0))));
    assert_eq!(hv.irq_info(&b, message), Err(Error::BadSource));
    // Given back while it is bound: nobody else gets it before its port closes.
    assert!(hv.release_pirq(&a, message) && !hv.release_pirq(&a, message));
    let other = hv.allocate_message(&a).unwrap();
    assert_ne!(other, message);
    hv.close(&a, port).unwrap();
    hv.on_irq(message);
    assert_eq!(hv.irqs.dropped(), 2);
    b.rights.lock().messages = 1;
    assert_eq!(hv.allocate_message(&b), Ok(message));
    assert_eq!(hv.allocate_message(&b), Err(Error::NotPermitted), "it may have one");
    b.set_life(Life::Dying);
    assert_eq!(hv.tear_down_ports(&b, &mut budget), Progress::Done);
    assert_eq!(hv.allocate_message(&b), Err(Error::Dying));
    assert_eq!(hv.allocate_message(&a), Ok(message), "the dead let go of theirs");
}

#[test]
fn messages_run_out_and_reserved_numbers_are_passed_over() {
    let (hv, a, _) = two_domains();
    a.rights.lock().pirqs.insert(PINS + 2);
    let taken: BTreeSet<u32> = (0..7).map(|_| hv.allocate_message(&a).unwrap()).collect();
    assert_eq!(taken.len(), 7);
    assert!(!taken.contains(&(PINS + 2)));
    assert_eq!(hv.allocate_message(&a), Err(Error::NoFreePort));
    assert!(hv.release_pirq(&a, PINS + 5));
    assert_eq!(hv.allocate_message(&a), Ok(PINS + 5));
}

#[test]
fn interrupts_go_where_their_vcpu_is() {
    let (hv, a, _) = two_domains();
    let mut budget = Budget::unlimited();
    let message = hv.allocate_message(&a).unwrap();
    for number in [4, message] {
        let cpu = || hv.irq_info(&a, number).unwrap().cpu.0;
        a.vcpus[0].cpu.store(1, Ordering::SeqCst);
        let port = hv.bind_pirq(&a, number, &mut budget).unwrap();
        assert_eq!(cpu(), 1, "source {number}");
        a.vcpus[1].cpu.store(2, Ordering::SeqCst);
        hv.bind_vcpu(&a, port, VcpuId::new(1)).unwrap();
        assert_eq!(cpu(), 2);
        // The vCPU moves on: the next interrupt comes in at the old place, and shows it.
        a.vcpus[1].cpu.store(5, Ordering::SeqCst);
        assert_eq!(cpu(), 2);
        hv.on_irq(number);
        assert_eq!(cpu(), 5);
        // To a CPU that no interrupt can name it is not sent.
        a.vcpus[1].cpu.store(3, Ordering::SeqCst);
        hv.on_irq(number);
        assert_eq!(cpu(), 5);
        hv.close(&a, port).unwrap();
        a.vcpus[1].cpu.store(0, Ordering::SeqCst);
    }
    assert_eq!(hv.irq_info(&a, message).unwrap().message, Some((0xfee0_5000, 0x81)));
}

#[test]
fn ports_run_out_and_frames_come_as_needed() {
    let (hv, a, b) = two_domains();
    let free = hv.mm.free_frames();
    assert_eq!(a.events.lock().frame_count(&hv.platform), 0);
    for expected in 1..4096 {
        assert_eq!(hv.alloc_unbound(&a, b.id, &mut Budget::unlimited()), Ok(Port::new(expected)));
    }
    assert_eq!(hv.alloc_unbound(&a, b.id, &mut Budget::unlimited()), Err(Error::NoFreePort));
    assert_eq!(a.events.lock().frame_count(&hv.platform), PortTable::SMALL_FRAMES);
    assert_eq!(hv.mm.free_frames(), free - PortTable::SMALL_FRAMES);
    hv.close(&a, Port::new(77)).unwrap();
    assert_eq!(hv.alloc_unbound(&a, b.id, &mut Budget::unlimited()), Ok(Port::new(77)));
    assert_eq!(hv.close(&a, Port::new(4096)), Err(Error::BadPort));
    assert_eq!(hv.port_status(&a, Port::new(0)).unwrap().state, PortState::Reserved);
    assert_eq!(hv.close(&a, Port::new(0)), Err(Error::BadPort));

    a.set_life(Life::Dying);
    let mut steps = 0;
    while hv.tear_down_ports(&a, &mut Budget::new(64)) == Progress::Preempted {
        steps += 1;
    }
    assert_eq!(steps, 4095 / 64, "one port a step");
    assert_eq!(hv.mm.free_frames(), free);
}

#[test]
fn without_memory_a_port_is_refused() {
    let hv = hypervisor(2);
    let a = add_domain(&hv, 0, 1, Rights::none());
    assert_eq!(hv.alloc_unbound(&a, DomId::new(1), &mut Budget::unlimited()), Err(Error::NoMemory));
    assert_eq!(a.events.lock().active(), 0);
}

#[test]
fn a_dying_domain_lets_go_of_its_peers() {
    let (hv, a, b) = two_domains();
    let pairs: Vec<_> = (0..10).map(|_| connect(&hv, &a, &b)).collect();
    hv.bind_virq(&b, Virq::TIMER, VcpuId::new(1), &mut Budget::unlimited()).unwrap();
    b.set_life(Life::Dying);
    assert_eq!(hv.alloc_unbound(&b, a.id, &mut Budget::unlimited()), Err(Error::Dying));
    let waiting = hv.alloc_unbound(&a, b.id, &mut Budget::unlimited()).unwrap();
    assert_eq!(hv.bind_interdomain(&b, &a, waiting, &mut Budget::unlimited()), Err(Error::Dying));
    while hv.tear_down_ports(&b, &mut Budget::new(1)) == Progress::Preempted {}
    assert_eq!(b.events.lock().active(), 0);
    assert_eq!(b.vcpus[1].virq_port[0].load(Ordering::SeqCst), 0);
    for (pa, pb) in pairs {
        assert_eq!(hv.port_status(&a, pa).unwrap().state, PortState::Unbound { remote: b.id });
        assert_eq!(hv.send(&a, pa), Ok(()));
        assert_eq!(hv.port_status(&b, pb).unwrap().state, PortState::Free);
    }
    hv.domains.remove(b.id);
    assert_eq!(hv.send(&a, waiting), Ok(()));
}

#[test]
fn reset_in_steps_ends_as_without_limit() {
    for budget in [1, 3, 1000] {
        let (hv, a, b) = two_domains();
        for _ in 0..20 {
            connect(&hv, &a, &b);
        }
        hv.bind_ipi(&a, VcpuId::new(0), &mut Budget::unlimited()).unwrap();
        assert_eq!(hv.reset_ports(&a, true, &mut Budget::new(5)), Err(Error::ResetUnderWay));
        let mut resuming = false;
        while hv.reset_ports(&a, resuming, &mut Budget::new(budget)) == Ok(Progress::Preempted) {
            resuming = true;
            assert_eq!(hv.reset_ports(&a, false, &mut Budget::new(5)), Err(Error::ResetUnderWay));
        }
        assert_eq!(a.events.lock().active(), 0);
        assert_eq!(b.events.lock().active(), 20);
        assert!(hv.alloc_unbound(&a, b.id, &mut Budget::unlimited()).is_ok());
    }
}

// ── random sequences against a model ──

#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Unbound(usize),
    Peer(usize, u32),
    Virq(u32),
    Ipi,
    Pirq(u32),
}

#[derive(Clone, Debug, Default)]
struct ModelDomain {
    ports: BTreeMap<u32, (Source, u32)>,
    highest: u32,
    pending: BTreeSet<u32>,
    masked: BTreeSet<u32>,
}

impl ModelDomain {
    fn next(&self) -> u32 {
        (1..).find(|p| !self.ports.contains_key(p)).unwrap()
    }
    fn valid(&self, port: u32) -> bool {
        port / 64 <= self.highest / 64
    }
    fn open(&mut self, source: Source, vcpu: u32) -> u32 {
        let port = self.next();
        self.ports.insert(port, (source, vcpu));
        self.highest = self.highest.max(port);
        port
    }
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize, usize),
    Bind(usize, usize, u32),
    Virq(usize, u32, u32),
    Ipi(usize, u32),
    Pirq(usize, u32),
    Close(usize, u32),
    Send(usize, u32),
    Move(usize, u32, u32),
    Mask(usize, u32),
    Unmask(usize, u32),
    Raise(usize, u32, u32),
    Irq(u32),
    Consume(usize),
    Reset(usize, u32),
}

const VCPUS: u32 = 2;
const DOMAINS: usize = 3;
/// Numbers out of order with the model's indexes, so that pairs are locked both ways.
const NUMBERS: [u16; DOMAINS] = [4, 0, 9];

fn op() -> impl Strategy<Value = Op> {
    let d = || 0..DOMAINS;
    let p = || 0u32..70;
    let v = || 0..VCPUS + 1;
    let q = || prop_oneof![Just(0u32), Just(2), Just(7), Just(16), Just(24)];
    prop_oneof![
        4 => (d(), d()).prop_map(|(a, b)| Op::Alloc(a, b)),
        6 => (d(), d(), 0u32..20).prop_map(|(a, b, p)| Op::Bind(a, b, p)),
        2 => (d(), q(), v()).prop_map(|(a, q, v)| Op::Virq(a, q, v)),
        2 => (d(), v()).prop_map(|(a, v)| Op::Ipi(a, v)),
        1 => (d(), 0u32..4).prop_map(|(a, i)| Op::Pirq(a, i)),
        3 => (d(), 0u32..20).prop_map(|(a, p)| Op::Close(a, p)),
        6 => (d(), p()).prop_map(|(a, p)| Op::Send(a, p)),
        2 => (d(), p(), v()).prop_map(|(a, p, v)| Op::Move(a, p, v)),
        2 => (d(), p()).prop_map(|(a, p)| Op::Mask(a, p)),
        2 => (d(), p()).prop_map(|(a, p)| Op::Unmask(a, p)),
        2 => (d(), 0..VCPUS, 0u32..24).prop_map(|(a, v, q)| Op::Raise(a, v, q)),
        1 => (0u32..5).prop_map(Op::Irq),
        2 => d().prop_map(Op::Consume),
        1 => (d(), 1u32..8).prop_map(|(a, b)| Op::Reset(a, b)),
    ]
}

struct World {
    hv: Hypervisor<SimMachine>,
    domains: Vec<Arc<Domain>>,
    model: Vec<ModelDomain>,
    free: usize,
}

impl World {
    fn new() -> World {
        let hv = hypervisor(40);
        let domains: Vec<_> = NUMBERS
            .iter()
            .map(|n| {
                let mut rights = Rights::none();
                rights.irqs.insert(0, if *n == 0 { 3 } else { 1 });
                add_domain(&hv, *n, VCPUS, rights)
            })
            .collect();
        let free = hv.mm.free_frames();
        World { hv, domains, model: vec![ModelDomain::default(); DOMAINS], free }
    }

    fn close_in_model(&mut self, d: usize, port: u32) -> bool {
        let Some((source, _)) = self.model[d].ports.remove(&port) else { return false };
        self.model[d].pending.remove(&port);
        if let Source::Peer(e, q) = source {
            self.model[e].ports.get_mut(&q).unwrap().0 = Source::Unbound(d);
        }
        true
    }

    fn raise_in_model(&mut self, d: usize, port: u32) {
        let vcpu = self.model[d].ports[&port].1 as usize;
        let new = self.model[d].pending.insert(port);
        if new && !self.model[d].masked.contains(&port) {
            assert_ne!(word(&self.hv, &self.domains[d], vcpu * 8) & 1, 0, "no upcall for port {port}");
            assert_ne!(
                word(&self.hv, &self.domains[d], vcpu * 8 + 1) >> (port / 64) & 1,
                0,
                "no selector bit"
            );
        }
    }

    fn find(&self, d: usize, source: Source, vcpu: Option<u32>) -> Option<u32> {
        let found = |(p, (s, v)): (&u32, &(Source, u32))| {
            (*s == source && vcpu.is_none_or(|w| w == *v)).then_some(*p)
        };
        self.model[d].ports.iter().find_map(found)
    }

    fn run(&mut self, op: &Op) {
        let hv = &self.hv;
        match *op {
            Op::Alloc(d, e) => {
                let got =
                    hv.alloc_unbound(&self.domains[d], DomId::new(NUMBERS[e]), &mut Budget::unlimited());
                assert_eq!(got, Ok(Port::new(self.model[d].open(Source::Unbound(e), 0))));
            }
            Op::Bind(d, e, p) => {
                let got = hv.bind_interdomain(
                    &self.domains[d],
                    &self.domains[e],
                    Port::new(p),
                    &mut Budget::unlimited(),
                );
                if self.model[e].ports.get(&p).is_some_and(|s| s.0 == Source::Unbound(d)) {
                    let port = self.model[d].open(Source::Peer(e, p), 0);
                    self.model[e].ports.get_mut(&p).unwrap().0 = Source::Peer(d, port);
                    assert_eq!(got, Ok(Port::new(port)));
                    self.raise_in_model(d, port);
                } else {
                    assert_eq!(got, Err(Error::BadPort));
                }
            }
            Op::Virq(d, q, v) => {
                let got =
                    hv.bind_virq(&self.domains[d], Virq::new(q), VcpuId::new(v), &mut Budget::unlimited());
                let global = is_global(Virq::new(q));
                let expected = if q >= 24 || global && v != 0 {
                    Err(Error::BadSource)
                } else if v >= VCPUS {
                    Err(Error::NoVcpu)
                } else if self.find(d, Source::Virq(q), (!global).then_some(v)).is_some() {
                    Err(Error::AlreadyBound)
                } else {
                    Ok(Port::new(self.model[d].open(Source::Virq(q), v)))
                };
                assert_eq!(got, expected);
            }
            Op::Ipi(d, v) => {
                let got = hv.bind_ipi(&self.domains[d], VcpuId::new(v), &mut Budget::unlimited());
                let expected = if v < VCPUS {
                    Ok(Port::new(self.model[d].open(Source::Ipi, v)))
                } else {
                    Err(Error::NoVcpu)
                };
                assert_eq!(got, expected);
            }
            Op::Pirq(d, pin) => {
                let got = hv.bind_pirq(&self.domains[d], pin, &mut Budget::unlimited());
                let allowed = pin < if NUMBERS[d] == 0 { 4 } else { 2 };
                let listener = (0..DOMAINS).find(|e| self.find(*e, Source::Pirq(pin), None).is_some());
                let expected = match listener {
                    _ if !allowed => Err(Error::NotPermitted),
                    Some(e) if e == d => Err(Error::AlreadyBound),
                    Some(_) => Err(Error::PinInUse),
                    None => Ok(Port::new(self.model[d].open(Source::Pirq(pin), 0))),
                };
                assert_eq!(got, expected);
            }
            Op::Close(d, p) => {
                let got = hv.close(&self.domains[d], Port::new(p));
                let expected = if self.close_in_model(d, p) { Ok(()) } else { Err(Error::BadPort) };
                assert_eq!(got, expected);
            }
            Op::Send(d, p) => {
                let got = hv.send(&self.domains[d], Port::new(p));
                match self.model[d].ports.get(&p).map(|s| s.0) {
                    Some(Source::Peer(e, q)) => self.raise_in_model(e, q),
                    Some(Source::Ipi) => self.raise_in_model(d, p),
                    Some(Source::Unbound(_)) => {}
                    _ => return assert_eq!(got, Err(Error::BadPort)),
                }
                assert_eq!(got, Ok(()));
            }
            Op::Move(d, p, v) => {
                let got = hv.bind_vcpu(&self.domains[d], Port::new(p), VcpuId::new(v));
                let expected = match self.model[d].ports.get_mut(&p) {
                    _ if v >= VCPUS => Err(Error::NoVcpu),
                    Some((Source::Virq(q), _)) if !is_global(Virq::new(*q)) => Err(Error::BadPort),
                    Some((Source::Ipi, _)) | None => Err(Error::BadPort),
                    Some((_, vcpu)) => {
                        *vcpu = v;
                        Ok(())
                    }
                };
                assert_eq!(got, expected);
            }
            Op::Mask(d, p) => {
                self.model[d].masked.insert(p);
                let at = 320 + p as usize / 64;
                set_word(hv, &self.domains[d], at, word(hv, &self.domains[d], at) | 1 << (p % 64));
            }
            Op::Unmask(d, p) => {
                let got = hv.unmask(&self.domains[d], Port::new(p));
                if !self.model[d].valid(p) {
                    return assert_eq!(got, Err(Error::BadPort));
                }
                assert_eq!(got, Ok(()));
                // The mask of a port that is not open stays.
                let Some((_, vcpu)) = self.model[d].ports.get(&p).copied() else { return };
                if self.model[d].masked.remove(&p) && self.model[d].pending.contains(&p) {
                    let vcpu = vcpu as usize;
                    assert_ne!(word(hv, &self.domains[d], vcpu * 8 + 1) >> (p / 64) & 1, 0);
                }
            }
            Op::Raise(d, v, q) => {
                hv.raise_virq(&VcpuRef::new(&self.domains[d], VcpuId::new(v)).unwrap(), Virq::new(q));
                let vcpu = (!is_global(Virq::new(q))).then_some(v);
                if let Some(port) = self.find(d, Source::Virq(q), vcpu) {
                    self.raise_in_model(d, port);
                }
            }
            Op::Irq(pin) => {
                hv.on_irq(pin);
                for d in 0..DOMAINS {
                    if let Some(port) = self.find(d, Source::Pirq(pin), None) {
                        self.raise_in_model(d, port);
                    }
                }
            }
            Op::Consume(d) => {
                let seen = consume(hv, &self.domains[d]);
                for port in &seen {
                    assert!(self.model[d].pending.remove(port), "port {port} was never raised");
                }
            }
            Op::Reset(d, budget) => {
                let mut resuming = false;
                while hv.reset_ports(&self.domains[d], resuming, &mut Budget::new(budget))
                    == Ok(Progress::Preempted)
                {
                    resuming = true;
                }
                let all: Vec<u32> = self.model[d].ports.keys().copied().collect();
                for port in all {
                    self.close_in_model(d, port);
                }
            }
        }
    }

    fn compare(&self) {
        for (d, domain) in self.domains.iter().enumerate() {
            let model = &self.model[d];
            assert_eq!(domain.events.lock().active() as usize, model.ports.len());
            for port in 1..80 {
                let got = self.hv.port_status(domain, Port::new(port));
                let expected = match model.ports.get(&port) {
                    None if !model.valid(port) => Err(Error::BadPort),
                    None => Ok(Entry::FREE),
                    Some((source, vcpu)) => {
                        let state = match *source {
                            Source::Unbound(e) => PortState::Unbound { remote: DomId::new(NUMBERS[e]) },
                            Source::Peer(e, q) => {
                                PortState::Interdomain { remote: DomId::new(NUMBERS[e]), port: Port::new(q) }
                            }
                            Source::Virq(q) => PortState::Virq { virq: Virq::new(q) },
                            Source::Ipi => PortState::Ipi,
                            Source::Pirq(number) => PortState::Pirq { number },
                        };
                        Ok(Entry::new(state, VcpuId::new(*vcpu)))
                    }
                };
                assert_eq!(got, expected, "domain {d} port {port}");
                assert_eq!(pending(&self.hv, domain, Port::new(port)), model.pending.contains(&port));
            }
            for (v, vcpu) in domain.vcpus.iter().enumerate() {
                for (q, slot) in vcpu.virq_port.iter().enumerate() {
                    let global = is_global(Virq::new(q as u32));
                    let bound = match (global, v) {
                        (true, 0) => self.find(d, Source::Virq(q as u32), None),
                        (true, _) => None,
                        (false, _) => self.find(d, Source::Virq(q as u32), Some(v as u32)),
                    };
                    assert_eq!(slot.load(Ordering::SeqCst), bound.unwrap_or(0));
                }
            }
        }
        for pin in 0..4 {
            let expected = (0..DOMAINS).find_map(|d| {
                Some((DomId::new(NUMBERS[d]), Port::new(self.find(d, Source::Pirq(pin), None)?)))
            });
            assert_eq!(self.hv.irqs.listener(pin), expected);
        }
    }

    /// Tears the domains down one after the other; nothing is left.
    fn end(mut self) {
        for d in 0..DOMAINS {
            let domain = self.domains[d].clone();
            domain.set_life(Life::Dying);
            while self.hv.tear_down_ports(&domain, &mut Budget::new(2)) == Progress::Preempted {}
            let all: Vec<u32> = self.model[d].ports.keys().copied().collect();
            for port in all {
                self.close_in_model(d, port);
            }
            self.compare();
        }
        assert_eq!(self.hv.mm.free_frames(), self.free, "all frames are back");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_sequences_agree_with_the_model(ops in prop::collection::vec(op(), 1..200)) {
        let mut world = World::new();
        for op in &ops {
            world.run(op);
            world.compare();
        }
        world.end();
    }
}

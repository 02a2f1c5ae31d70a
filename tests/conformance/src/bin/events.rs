//! Event channels.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::{NOWHERE, at, call, evtchn, is_privileged, pending, protect, shared, take_pending};
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::abi::evtchn::{
    EVTCHNSTAT_CLOSED, EVTCHNSTAT_INTERDOMAIN, EVTCHNSTAT_IPI, EVTCHNSTAT_UNBOUND, EVTCHNSTAT_VIRQ,
    EvtchnAllocUnbound, EvtchnBindInterdomain, EvtchnBindIpi, EvtchnBindPirq, EvtchnBindVcpu, EvtchnBindVirq,
    EvtchnClose, EvtchnReset, EvtchnSend, EvtchnStatus, EvtchnUnmask,
};
use guest_sdk::abi::subops::EvtchnOp;
use guest_sdk::abi::{DomId, Errno, Hypercall, Port, Virq};
use guest_sdk::memory::Page;
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, upcalls, window};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            upcalls_are_masked_at_start,
            unbound_port,
            unbound_refused,
            unbound_for_anybody,
            an_answer_that_cannot_be_written_leaves_the_port_open,
            interdomain_both_ways,
            interdomain_close_leaves_other_unbound,
            interdomain_refused,
            virq_is_bound_once,
            virq_refused,
            virqs_of_the_privileged_bind_and_stay_silent,
            virq_of_each_vcpu,
            pirq_refused,
            ipi_arrives,
            ipi_refused,
            send_refused,
            close_and_again,
            close_refused,
            status_refused,
            status_keeps_what_does_not_belong_to_it,
            port_zero_is_nobodys,
            masked_port_waits_for_unmask,
            unmask_refused,
            unmask_of_a_closed_port_does_nothing,
            close_takes_what_is_pending_with_it,
            close_takes_a_connected_ports_event_with_it,
            upcall_comes_once,
            masked_vcpu_gets_no_upcall,
            block_with_pending_event_returns,
            bind_vcpu_refused,
            bind_vcpu_moves_delivery,
            bind_vcpu_of_virtual_interrupts,
            a_port_that_is_opened_again_goes_to_vcpu_0,
            ports_run_out_and_come_back,
            bad_address,
            unknown_operation,
            reset_refused,
            reset_closes_everything,
        ],
    )
}

fn upcalls_are_masked_at_start(_: &mut Domain) -> Verdict {
    // Xen's own builder and Xen's tools mask all that the shared page has room for, whatever the number of vCPUs.
    check_eq!(guest_sdk::rt::start::upcalls_masked_at_start(), u32::MAX);
    // The byte is the one that counts: nothing is delivered while it is set.
    let port = ipi(0)?;
    let before = upcalls();
    check_eq!(unmask(port), Ok(0));
    check_eq!(send(port), Ok(0));
    check!(pending(port));
    check_eq!(upcalls(), before, "masked");
    check_eq!(window(), 1, "unmasked for a moment");
    guest_sdk::events::turn();
    mask(port);
    check_eq!(close(port), Ok(0));
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

fn send(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Send, &mut EvtchnSend { port })
}

fn unmask(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port })
}

fn status(port: Port) -> Result<EvtchnStatus, Errno> {
    let mut argument = EvtchnStatus { dom: DomId::SELF, port, ..EvtchnStatus::default() };
    evtchn(EvtchnOp::Status, &mut argument)?;
    Ok(argument)
}

fn interdomain(remote_dom: DomId, remote_port: Port) -> Result<Port, Errno> {
    let mut argument = EvtchnBindInterdomain { remote_dom, pad0: 0, remote_port, local_port: Port::new(0) };
    evtchn(EvtchnOp::BindInterdomain, &mut argument)?;
    Ok(argument.local_port)
}

fn ipi(vcpu: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

fn virq(virq: u32, vcpu: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindVirq { virq, vcpu, port: Port::new(0) };
    evtchn(EvtchnOp::BindVirq, &mut argument)?;
    Ok(argument.port)
}

/// Ports that nobody has.
const NOT_PORTS: [u32; 4] = [0, 3000, 4096, u32::MAX];

fn unbound_port(domain: &mut Domain) -> Verdict {
    let port = unbound()?;
    check!(port.get() > 0);
    let now = status(port)?;
    check_eq!((now.status, now.vcpu, now.remote_domain()), (EVTCHNSTAT_UNBOUND, 0, domain.id()));
    // Nobody is there to hear it.
    check_eq!(send(port), Ok(0));
    check!(!pending(port));
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn unbound_refused(_: &mut Domain) -> Verdict {
    let mut argument =
        EvtchnAllocUnbound { dom: DomId::new(1234), remote_dom: DomId::SELF, port: Port::new(0) };
    check_eq!(evtchn(EvtchnOp::AllocUnbound, &mut argument), Err(Errno::ESRCH));
    Ok(())
}

fn unbound_for(remote_dom: DomId) -> Result<Port, Errno> {
    let mut argument = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom, port: Port::new(0) };
    evtchn(EvtchnOp::AllocUnbound, &mut argument)?;
    Ok(argument.port)
}

fn unbound_for_anybody(_: &mut Domain) -> Verdict {
    // Nobody asks whether there is such a domain: it may come later.
    for remote in [DomId::new(1234), DomId::IO, DomId::XEN] {
        let port = unbound_for(remote)?;
        let now = status(port)?;
        check_eq!((now.status, now.remote_domain()), (EVTCHNSTAT_UNBOUND, remote));
        check_eq!(close(port), Ok(0));
    }
    // But who has the port must be there, and no name but the caller's stands for a domain.
    for dom in [DomId::IO, DomId::XEN, DomId::new(0x7fff)] {
        let mut argument = EvtchnAllocUnbound { dom, remote_dom: DomId::SELF, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::AllocUnbound, &mut argument), Err(Errno::ESRCH), "{dom:?}");
    }
    Ok(())
}

fn an_answer_that_cannot_be_written_leaves_the_port_open(_: &mut Domain) -> Verdict {
    let free = unbound()?;
    check_eq!(close(free), Ok(0));
    let mut page = Page::new()?;
    // DOMID_SELF for both domains.
    page.bytes_mut()[..4].copy_from_slice(&[0xf0, 0x7f, 0xf0, 0x7f]);
    protect(&page, false)?;
    let number = EvtchnOp::AllocUnbound.number().into();
    let answer = call(Hypercall::EventChannelOp, [number, page.address(), 0, 0, 0]);
    protect(&page, true)?;
    check_eq!(answer, Err(Errno::EFAULT));
    check_eq!(status(free)?.status, EVTCHNSTAT_UNBOUND, "it was opened all the same");
    check_eq!(close(free), Ok(0));
    Ok(())
}

fn interdomain_both_ways(domain: &mut Domain) -> Verdict {
    let one = unbound()?;
    let other = interdomain(DomId::SELF, one)?;
    // Binding signals both ends' owner once, so that nothing sent before is missed.
    check!(take_pending(other), "the new port has fired");
    take_pending(one);
    for (port, remote) in [(one, other), (other, one)] {
        let now = status(port)?;
        check_eq!(now.status, EVTCHNSTAT_INTERDOMAIN);
        check_eq!((now.remote_domain(), now.remote_port()), (domain.id(), remote));
        check_eq!(send(port), Ok(0));
        check!(take_pending(remote), "the other end has it");
        check!(!pending(port), "this end has not");
    }
    check_eq!(close(one), Ok(0));
    check_eq!(close(other), Ok(0));
    Ok(())
}

fn interdomain_close_leaves_other_unbound(_: &mut Domain) -> Verdict {
    let one = unbound()?;
    let other = interdomain(DomId::SELF, one)?;
    check_eq!(close(other), Ok(0));
    check_eq!(status(other)?.status, EVTCHNSTAT_CLOSED);
    check_eq!(status(one)?.status, EVTCHNSTAT_UNBOUND);
    // And can be connected to again.
    let again = interdomain(DomId::SELF, one)?;
    check_eq!(status(one)?.status, EVTCHNSTAT_INTERDOMAIN);
    check_eq!(close(one), Ok(0));
    check_eq!(close(again), Ok(0));
    Ok(())
}

fn interdomain_refused(_: &mut Domain) -> Verdict {
    for port in NOT_PORTS {
        check_eq!(interdomain(DomId::SELF, Port::new(port)), Err(Errno::EINVAL), "port {port}");
    }
    let bound = ipi(0)?;
    check_eq!(interdomain(DomId::SELF, bound), Err(Errno::EINVAL), "a port for something else");
    check_eq!(close(bound), Ok(0));
    check_eq!(interdomain(DomId::new(1234), Port::new(1)), Err(Errno::ESRCH));
    // One that waits for another domain.
    let mut argument =
        EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::new(77), port: Port::new(0) };
    check_eq!(evtchn(EvtchnOp::AllocUnbound, &mut argument), Ok(0));
    check_eq!(interdomain(DomId::SELF, argument.port), Err(Errno::EINVAL), "it waits for another");
    check_eq!(close(argument.port), Ok(0));
    Ok(())
}

fn virq_is_bound_once(_: &mut Domain) -> Verdict {
    let number = Virq::DEBUG.get();
    let port = virq(number, 0)?;
    let now = status(port)?;
    check_eq!((now.status, now.u0), (EVTCHNSTAT_VIRQ, number));
    check_eq!(virq(number, 0), Err(Errno::EEXIST));
    check_eq!(send(port), Err(Errno::EINVAL), "only the hypervisor raises it");
    check_eq!(close(port), Ok(0));
    let port = virq(number, 0)?;
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn virq_refused(_: &mut Domain) -> Verdict {
    check_eq!(virq(24, 0), Err(Errno::EINVAL), "no such interrupt");
    check_eq!(virq(u32::MAX, 0), Err(Errno::EINVAL), "no such interrupt");
    check_eq!(virq(Virq::TIMER.get(), 4000), Err(Errno::ENOENT), "no such vCPU");
    check_eq!(virq(Virq::CONSOLE.get(), 1), Err(Errno::EINVAL), "a global one is bound to vCPU 0");
    Ok(())
}

fn virqs_of_the_privileged_bind_and_stay_silent(_: &mut Domain) -> Verdict {
    // Whoever has no right to what they tell never hears of it.
    for number in [Virq::DOM_EXC.get(), 4, 8, 9, 12] {
        let port = virq(number, 0)?;
        check_eq!(status(port)?.u0, number);
        check_eq!(virq(number, 0), Err(Errno::EEXIST));
        check_eq!(virq(number, 1), Err(Errno::EINVAL), "a global one is bound to vCPU 0");
        check!(!pending(port), "interrupt {number}");
        check_eq!(close(port), Ok(0));
    }
    Ok(())
}

fn virq_of_each_vcpu(_: &mut Domain) -> Verdict {
    let number = Virq::DEBUG.get();
    let first = virq(number, 0)?;
    let second = match virq(number, 1) {
        Err(Errno::ENOENT) => {
            check_eq!(close(first), Ok(0));
            return testkit::skip("the domain has one vCPU");
        }
        result => result?,
    };
    check!(first != second);
    check_eq!((status(first)?.vcpu, status(second)?.vcpu), (0, 1));
    check_eq!(virq(number, 1), Err(Errno::EEXIST));
    check_eq!(close(second), Ok(0));
    check_eq!(virq(number, 0), Err(Errno::EEXIST), "closing one leaves the other");
    check_eq!(close(first), Ok(0));
    Ok(())
}

fn pirq_refused(_: &mut Domain) -> Verdict {
    let bind = |pirq: u32| {
        let mut argument = EvtchnBindPirq { pirq, flags: 0, port: Port::new(0) };
        evtchn(EvtchnOp::BindPirq, &mut argument)
    };
    let free = unbound()?;
    check_eq!(close(free), Ok(0));
    for pin in [1 << 20, u32::MAX] {
        check_eq!(bind(pin), Err(Errno::EINVAL), "pin {pin}");
    }
    if !is_privileged() {
        for pin in [1, 4, 8] {
            check_eq!(bind(pin), Err(Errno::EPERM), "pin {pin}");
        }
    }
    check_eq!(status(free)?.status, EVTCHNSTAT_CLOSED, "no port is taken");
    check_eq!(unbound()?, free);
    check_eq!(close(free), Ok(0));
    Ok(())
}

fn ipi_arrives(_: &mut Domain) -> Verdict {
    let port = ipi(0)?;
    let now = status(port)?;
    check_eq!((now.status, now.vcpu), (EVTCHNSTAT_IPI, 0));
    check_eq!(send(port), Ok(0));
    check!(take_pending(port));
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn ipi_refused(_: &mut Domain) -> Verdict {
    check_eq!(ipi(4000), Err(Errno::ENOENT));
    check_eq!(ipi(u32::MAX), Err(Errno::ENOENT));
    Ok(())
}

fn send_refused(_: &mut Domain) -> Verdict {
    for port in NOT_PORTS {
        check_eq!(send(Port::new(port)), Err(Errno::EINVAL), "port {port}");
    }
    Ok(())
}

fn close_and_again(_: &mut Domain) -> Verdict {
    let first = unbound()?;
    check_eq!(close(first), Ok(0));
    check_eq!(status(first)?.status, EVTCHNSTAT_CLOSED);
    check_eq!(close(first), Err(Errno::EINVAL), "twice");
    // The lowest free number is given out.
    let second = unbound()?;
    check_eq!(second, first);
    check_eq!(close(second), Ok(0));
    Ok(())
}

fn close_refused(_: &mut Domain) -> Verdict {
    for port in NOT_PORTS {
        check_eq!(close(Port::new(port)), Err(Errno::EINVAL), "port {port}");
    }
    Ok(())
}

fn status_refused(_: &mut Domain) -> Verdict {
    check_eq!(status(Port::new(1 << 20)).err(), Some(Errno::EINVAL));
    let mut argument = EvtchnStatus { dom: DomId::new(1234), port: Port::new(1), ..EvtchnStatus::default() };
    check_eq!(evtchn(EvtchnOp::Status, &mut argument), Err(Errno::ESRCH));
    Ok(())
}

fn status_keeps_what_does_not_belong_to_it(_: &mut Domain) -> Verdict {
    let port = ipi(0)?;
    let mut argument = EvtchnStatus { dom: DomId::SELF, port, ..EvtchnStatus::default() };
    (argument.u0, argument.u1, argument.vcpu, argument.status) = (0x1234, 0x5678, 9, 9);
    check_eq!(evtchn(EvtchnOp::Status, &mut argument), Ok(0));
    check_eq!((argument.status, argument.vcpu), (EVTCHNSTAT_IPI, 0));
    check_eq!((argument.u0, argument.u1), (0x1234, 0x5678));
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn port_zero_is_nobodys(_: &mut Domain) -> Verdict {
    let zero = Port::new(0);
    check_eq!(status(zero)?.status, EVTCHNSTAT_CLOSED);
    check_eq!(send(zero), Err(Errno::EINVAL));
    check_eq!(close(zero), Err(Errno::EINVAL));
    check_eq!(bind_vcpu(zero, 0), Err(Errno::EINVAL));
    check_eq!(unmask(zero), Ok(0));
    check!(!pending(zero));
    check!(unbound().map(close)?.is_ok(), "others are there");
    Ok(())
}

fn masked_port_waits_for_unmask(_: &mut Domain) -> Verdict {
    // The mask bit of a new port is as its last user left it.
    let port = ipi(0)?;
    mask(port);
    let before = upcalls();
    check_eq!(send(port), Ok(0));
    check!(pending(port));
    check_eq!(window(), 0, "masked: no upcall");
    check_eq!(unmask(port), Ok(0));
    check_eq!(window(), 1, "now it comes");
    check_eq!(upcalls(), before + 1);
    // The selector says where to look.
    // SAFETY: a word of the shared page.
    let selector = unsafe { (&raw const (*shared()).vcpu_info[0].evtchn_pending_sel).read_volatile() };
    check!(selector >> (port.get() / 64) & 1 == 1, "selector {selector:#x}");
    guest_sdk::events::turn();
    check!(!pending(port));
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn unmask_refused(_: &mut Domain) -> Verdict {
    for port in [4096, u32::MAX] {
        check_eq!(unmask(Port::new(port)), Err(Errno::EINVAL), "port {port}");
    }
    Ok(())
}

/// Whether a port's mask bit is set.
fn masked(port: Port) -> bool {
    // SAFETY: a word of the shared page.
    let word = unsafe {
        (&raw const (*shared()).evtchn_mask).cast::<u64>().add(port.get() as usize / 64).read_volatile()
    };
    word >> (port.get() % 64) & 1 != 0
}

fn unmask_of_a_closed_port_does_nothing(_: &mut Domain) -> Verdict {
    // Every port is masked until its owner unmasks it, here as in most kernels.
    let port = ipi(0)?;
    mask(port);
    check_eq!(close(port), Ok(0));
    check_eq!(unmask(port), Ok(0));
    check!(masked(port), "closed");
    let port = ipi(0)?;
    check_eq!(unmask(port), Ok(0));
    check!(!masked(port), "open");
    mask(port);
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn mask(port: Port) {
    // SAFETY: a word of the shared page, accessed atomically.
    let word = unsafe {
        AtomicU64::from_ptr((&raw mut (*shared()).evtchn_mask).cast::<u64>().add(port.get() as usize / 64))
    };
    word.fetch_or(1 << (port.get() % 64), Ordering::SeqCst);
}

fn close_takes_what_is_pending_with_it(_: &mut Domain) -> Verdict {
    let port = ipi(0)?;
    check_eq!(send(port), Ok(0));
    check!(pending(port));
    check_eq!(close(port), Ok(0));
    check!(!pending(port));
    let again = ipi(0)?;
    check_eq!(again, port);
    check!(!pending(again), "the event of the one before");
    check_eq!(close(again), Ok(0));
    Ok(())
}

fn close_takes_a_connected_ports_event_with_it(_: &mut Domain) -> Verdict {
    let one = unbound()?;
    let other = interdomain(DomId::SELF, one)?;
    take_pending(other);
    check_eq!(send(one), Ok(0));
    check_eq!(send(other), Ok(0));
    check!(pending(one) && pending(other));
    check_eq!(close(other), Ok(0));
    check!(!pending(other));
    check!(pending(one), "what the peer was sent stays");
    take_pending(one);
    check_eq!(close(one), Ok(0));
    Ok(())
}

fn upcall_comes_once(domain: &mut Domain) -> Verdict {
    let port = domain.events.bind_ipi()?;
    for _ in 0..5 {
        port.notify()?;
    }
    check_eq!(window(), 1, "five signals, one upcall");
    check!(port.poll());
    check_eq!(window(), 0);
    check!(!port.poll());
    Ok(())
}

fn masked_vcpu_gets_no_upcall(domain: &mut Domain) -> Verdict {
    let port = domain.events.bind_ipi()?;
    let before = upcalls();
    port.notify()?;
    for _ in 0..100 {
        let _ = call(Hypercall::XenVersion, [0; 5]);
    }
    check_eq!(upcalls(), before);
    check_eq!(window(), 1);
    check!(port.poll());
    Ok(())
}

fn block_with_pending_event_returns(domain: &mut Domain) -> Verdict {
    // Set between the last look and the sleep: the sleep ends at once, every time.
    let port = domain.events.bind_ipi()?;
    for round in 0..200 {
        port.notify()?;
        let start = guest_sdk::time::now_ns();
        port.wait();
        let took = guest_sdk::time::now_ns() - start;
        check!(took < 1_000_000_000, "round {round} took {took} ns");
    }
    Ok(())
}

fn bind_vcpu(port: Port, vcpu: u32) -> Result<u64, Errno> {
    evtchn(EvtchnOp::BindVcpu, &mut EvtchnBindVcpu { port, vcpu })
}

fn bind_vcpu_refused(_: &mut Domain) -> Verdict {
    let port = unbound()?;
    check_eq!(bind_vcpu(port, 4000), Err(Errno::ENOENT));
    check_eq!(close(port), Ok(0));
    let port = ipi(0)?;
    check_eq!(bind_vcpu(port, 0), Err(Errno::EINVAL), "the interrupt of one vCPU");
    check_eq!(close(port), Ok(0));
    check_eq!(bind_vcpu(Port::new(3000), 0), Err(Errno::EINVAL));
    Ok(())
}

fn bind_vcpu_moves_delivery(_: &mut Domain) -> Verdict {
    let one = unbound()?;
    let other = interdomain(DomId::SELF, one)?;
    guest_sdk::events::turn();
    take_pending(one);
    take_pending(other);
    match bind_vcpu(one, 1) {
        Err(Errno::ENOENT) => return testkit::skip("the domain has one vCPU"),
        result => check_eq!(result, Ok(0)),
    }
    check_eq!(status(one)?.vcpu, 1);
    check_eq!(unmask(one), Ok(0));
    check_eq!(send(other), Ok(0));
    // SAFETY: words of the shared page.
    let (first, second) = unsafe {
        let info = &raw mut (*shared()).vcpu_info;
        ((*info)[0].evtchn_pending_sel, (*info)[1].evtchn_pending_sel)
    };
    check!(pending(one));
    check!(second >> (one.get() / 64) & 1 == 1, "selector of vCPU 1 is {second:#x}");
    check!(first >> (one.get() / 64) & 1 == 0, "selector of vCPU 0 is {first:#x}");
    check_eq!(bind_vcpu(one, 0), Ok(0));
    check_eq!(close(one), Ok(0));
    check_eq!(close(other), Ok(0));
    take_pending(one);
    Ok(())
}

fn bind_vcpu_of_virtual_interrupts(_: &mut Domain) -> Verdict {
    let own = virq(Virq::DEBUG.get(), 0)?;
    check_eq!(bind_vcpu(own, 0), Err(Errno::EINVAL), "one of a vCPU");
    check_eq!(close(own), Ok(0));
    let global = virq(Virq::DOM_EXC.get(), 0)?;
    check_eq!(bind_vcpu(global, 0), Ok(0), "one of the domain");
    match bind_vcpu(global, 1) {
        Err(Errno::ENOENT) => {}
        result => {
            check_eq!(result, Ok(0));
            check_eq!(status(global)?.vcpu, 1);
            check_eq!(virq(Virq::DOM_EXC.get(), 0), Err(Errno::EEXIST));
        }
    }
    check_eq!(close(global), Ok(0));
    let global = virq(Virq::DOM_EXC.get(), 0)?;
    check_eq!(status(global)?.vcpu, 0);
    check_eq!(close(global), Ok(0));
    Ok(())
}

fn a_port_that_is_opened_again_goes_to_vcpu_0(_: &mut Domain) -> Verdict {
    let port = unbound()?;
    match bind_vcpu(port, 1) {
        Err(Errno::ENOENT) => return testkit::skip("the domain has one vCPU"),
        result => check_eq!(result, Ok(0)),
    }
    check_eq!(status(port)?.vcpu, 1);
    // Connecting and disconnecting leave it there.
    let other = interdomain(DomId::SELF, port)?;
    check_eq!((status(port)?.vcpu, status(other)?.vcpu), (1, 0));
    check_eq!(close(other), Ok(0));
    check_eq!((status(port)?.status, status(port)?.vcpu), (EVTCHNSTAT_UNBOUND, 1));
    check_eq!(close(port), Ok(0));
    let again = unbound()?;
    check_eq!((again, status(again)?.vcpu), (port, 0));
    check_eq!(close(again), Ok(0));
    Ok(())
}

fn ports_run_out_and_come_back(_: &mut Domain) -> Verdict {
    let mut ports: Vec<Port> = Vec::new();
    let end = loop {
        match unbound() {
            Ok(port) => ports.push(port),
            Err(error) => break error,
        }
        if ports.len() > 5000 {
            return Err(Stop::Fail("more ports than the layout has".into()));
        }
    };
    let count = ports.len();
    let in_order = ports.windows(2).all(|pair| pair[0] < pair[1]);
    for port in ports {
        check_eq!(close(port), Ok(0));
    }
    check_eq!(end, Errno::ENOSPC);
    check!((4000..4096).contains(&count), "{count} ports");
    check!(in_order, "lowest first");
    let port = unbound()?;
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn bad_address(_: &mut Domain) -> Verdict {
    for command in 0..=10 {
        check_eq!(
            call(Hypercall::EventChannelOp, [command, NOWHERE, 0, 0, 0]),
            Err(Errno::EFAULT),
            "command {command}"
        );
    }
    Ok(())
}

fn unknown_operation(_: &mut Domain) -> Verdict {
    check_eq!(close(unbound()?), Ok(0));
    let mut room = [0u64; 8];
    for command in [15, 100, 0x7fff_ffff] {
        check_eq!(
            call(Hypercall::EventChannelOp, [command, at(&mut room), 0, 0, 0]),
            Err(Errno::ENOSYS),
            "command {command}"
        );
    }
    Ok(())
}

fn reset_refused(_: &mut Domain) -> Verdict {
    let port = unbound()?;
    for dom in [DomId::new(1234), DomId::IO, DomId::XEN] {
        for command in [EvtchnOp::Reset, EvtchnOp::ResetCont] {
            check_eq!(evtchn(command, &mut EvtchnReset { dom }), Err(Errno::ESRCH), "{command:?} {dom:?}");
        }
    }
    check_eq!(evtchn(EvtchnOp::ResetCont, &mut EvtchnReset { dom: DomId::SELF }), Err(Errno::EBUSY));
    check_eq!(call(Hypercall::EventChannelOp, [10, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    if !is_privileged() {
        for command in [EvtchnOp::Reset, EvtchnOp::ResetCont] {
            let dom = DomId::ZERO;
            check_eq!(evtchn(command, &mut EvtchnReset { dom }), Err(Errno::EPERM), "{command:?} dom0");
        }
        let mut others = EvtchnStatus { dom: DomId::ZERO, port: Port::new(1), ..EvtchnStatus::default() };
        check_eq!(evtchn(EvtchnOp::Status, &mut others), Err(Errno::EPERM));
        others.port = Port::new(1 << 20);
        check_eq!(evtchn(EvtchnOp::Status, &mut others), Err(Errno::EINVAL), "told first");
    }
    check_eq!(status(port)?.status, EVTCHNSTAT_UNBOUND);
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn reset_closes_everything(_: &mut Domain) -> Verdict {
    let mut nobody = EvtchnReset { dom: DomId::new(1234) };
    check_eq!(evtchn(EvtchnOp::Reset, &mut nobody), Err(Errno::ESRCH));
    let ports = [unbound()?, ipi(0)?, virq(Virq::DEBUG.get(), 0)?];
    check_eq!(evtchn(EvtchnOp::Reset, &mut EvtchnReset { dom: DomId::SELF }), Ok(0));
    for port in ports {
        check_eq!(status(port)?.status, EVTCHNSTAT_CLOSED, "port {port}");
    }
    // The first port is free again.
    let port = unbound()?;
    check_eq!(port, Port::new(1));
    check_eq!(close(port), Ok(0));
    Ok(())
}

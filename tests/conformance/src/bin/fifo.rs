//! Event channels in the FIFO form.
//!
//! The first cases find the domain in the two-level form; the first that needs the other turns it over, and only the last ones
//! go back.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use conformance::{
    NOWHERE, TablePage, call, evtchn, mmuext, pending, protect, sched, shared, take_pending, vcpu,
};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use guest_sdk::abi::evtchn::{
    EVTCHN_FIFO_BUSY, EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_LINKED, EVTCHN_FIFO_MASKED, EVTCHN_FIFO_PENDING,
    EVTCHNSTAT_CLOSED, EVTCHNSTAT_IPI, EvtchnBindIpi, EvtchnBindVcpu, EvtchnBindVirq, EvtchnClose,
    EvtchnExpandArray, EvtchnInitControl, EvtchnReset, EvtchnSend, EvtchnSetPriority, EvtchnStatus,
    EvtchnUnmask,
};
use guest_sdk::abi::sched::SchedPoll;
use guest_sdk::abi::subops::{EvtchnOp, MmuextCmd, SchedOp, VcpuOp};
use guest_sdk::abi::{DomId, Errno, Gfn, GuestHandle, Hypercall, Mfn, Port, Virq};
use guest_sdk::memory::{self, Page};
use guest_sdk::testkit::{self, Stop, Verdict, cases, check, check_eq, skip, window};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};
use spin::Mutex;

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            two_levels_have_no_array_and_no_priorities,
            init_control_refused_changes_nothing,
            what_is_pending_moves_over,
            init_control_only_once,
            init_control_bad_address,
            expand_array_refused,
            an_event_is_linked_and_announced,
            five_signals_are_one_event,
            events_follow_in_the_order_of_their_raising,
            an_event_comes_again_when_it_was_taken,
            an_event_that_comes_while_linked_is_not_lost,
            a_queue_that_was_emptied_begins_anew,
            the_upcall_is_announced_once,
            a_masked_event_is_pending_but_not_linked,
            unmask_links_what_is_pending,
            unmask_of_a_linked_event_links_it_once,
            unmask_of_a_closed_port_does_nothing,
            the_default_priority_is_seven,
            every_priority_has_its_queue,
            set_priority_refused,
            a_new_priority_counts_from_the_next_event,
            a_port_that_is_opened_again_has_the_default_priority,
            close_clears_what_is_pending,
            a_linked_port_is_not_given_out_again,
            poll_sees_the_word,
            a_virtual_interrupt_takes_the_queue,
            shared_info_is_left_alone,
            a_vcpu_without_control_block_gets_no_events,
            a_second_vcpu_has_its_own_queues,
            an_event_beyond_the_array_is_held,
            a_held_event_goes_to_the_next_user_of_its_port,
            more_than_4096_ports,
            the_guests_pages_are_held,
            words_full_of_everything,
            the_array_has_128_pages,
            reset_goes_back_to_two_levels,
            after_reset_the_form_can_be_chosen_again,
        ],
    )
}

const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;
const MASKED: u32 = 1 << EVTCHN_FIFO_MASKED;
const LINKED: u32 = 1 << EVTCHN_FIFO_LINKED;
const BUSY: u32 = 1 << EVTCHN_FIFO_BUSY;
const LINK: u32 = EVTCHN_FIFO_LINK_MASK;
/// Event words in a page.
const WORDS: u32 = 1024;
/// Where in its page vCPU 0's control block is.
const OFFSET: u32 = 128;
const MS: u64 = 1_000_000;

/// What the domain gave for the FIFO form. The pages are kept for ever: the hypervisor writes them.
struct Given {
    control: u64,
    array: Vec<u64>,
    heads: [u32; 16],
}

static GIVEN: Mutex<Option<Given>> = Mutex::new(None);

fn half(address: u64) -> &'static AtomicU32 {
    // SAFETY: the address is aligned and lies in a page that was leaked; everybody accesses it atomically.
    unsafe { AtomicU32::from_ptr(address as *mut u32) }
}

fn init_control(vcpu: u32, page: Mfn, offset: u32) -> Result<EvtchnInitControl, Errno> {
    let mut argument = EvtchnInitControl {
        control_gfn: Gfn::new(page.get()),
        offset,
        vcpu,
        link_bits: 0,
        ..EvtchnInitControl::default()
    };
    evtchn(EvtchnOp::InitControl, &mut argument)?;
    Ok(argument)
}

fn expand(page: Mfn) -> Result<u64, Errno> {
    evtchn(EvtchnOp::ExpandArray, &mut EvtchnExpandArray { array_gfn: Gfn::new(page.get()) })
}

impl Given {
    fn new() -> Result<Given, Stop> {
        let page = Page::new()?;
        let answer = init_control(0, page.mfn(), OFFSET)?;
        check_link_bits(&answer)?;
        let mut given = Given { control: page.leak() + u64::from(OFFSET), array: Vec::new(), heads: [0; 16] };
        given.grow()?;
        Ok(given)
    }
    /// One more page of words, all masked.
    fn grow(&mut self) -> Result<(), Stop> {
        let mut page = Page::new()?;
        for word in page.bytes_mut().chunks_exact_mut(4) {
            word.copy_from_slice(&MASKED.to_le_bytes());
        }
        let (frame, address) = (page.mfn(), page.leak());
        self.array.push(address);
        expand(frame)?;
        Ok(())
    }
    fn word(&self, port: Port) -> &'static AtomicU32 {
        let page = self.array[(port.get() / WORDS) as usize];
        half(page + u64::from(port.get() % WORDS) * 4)
    }
    fn ready(&self) -> &'static AtomicU32 {
        half(self.control)
    }
    fn head(&self, priority: u32) -> u32 {
        half(self.control + 8 + u64::from(priority) * 4).load(Ordering::SeqCst)
    }
    /// Takes everything from the queues, the most urgent first: priority and port of each that was linked.
    fn take(&mut self) -> Vec<(u32, Port)> {
        let mut taken = Vec::new();
        // SAFETY: a byte of the shared page.
        unsafe { (&raw mut (*shared()).vcpu_info[0].evtchn_upcall_pending).write_volatile(0) };
        let mut ready = self.ready().swap(0, Ordering::SeqCst);
        while ready != 0 {
            let priority = ready.trailing_zeros();
            let mut port = self.heads[priority as usize];
            if port == 0 {
                port = self.head(priority);
            }
            let word = self.word(Port::new(port));
            let old = word.fetch_and(!(LINKED | LINK), Ordering::SeqCst);
            self.heads[priority as usize] = old & LINK;
            if old & LINK == 0 {
                ready &= !(1 << priority);
            }
            let now = word.load(Ordering::SeqCst);
            if now & PENDING != 0 && now & MASKED == 0 {
                word.fetch_and(!PENDING, Ordering::SeqCst);
                taken.push((priority, Port::new(port)));
            }
            ready |= self.ready().swap(0, Ordering::SeqCst);
        }
        taken
    }
}

fn check_link_bits(answer: &EvtchnInitControl) -> Verdict {
    check_eq!(answer.link_bits, 17);
    Ok(())
}

/// Runs `case` in the FIFO form, with nothing in the queues.
fn with_fifo<T>(case: impl FnOnce(&mut Given) -> Result<T, Stop>) -> Result<T, Stop> {
    let mut given = GIVEN.lock();
    if given.is_none() {
        *given = Some(Given::new()?);
    }
    let given = given.as_mut().expect("it was made above");
    given.take();
    let result = case(given);
    given.take();
    result
}

fn ipi_for(vcpu: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindIpi { vcpu, port: Port::new(0) };
    evtchn(EvtchnOp::BindIpi, &mut argument)?;
    Ok(argument.port)
}

/// A port that the domain signals to itself, not masked.
fn ipi(given: &Given) -> Result<Port, Stop> {
    let port = ipi_for(0)?;
    check_eq!(given.word(port).load(Ordering::SeqCst) & (LINKED | PENDING | LINK), 0, "a new port's word");
    given.word(port).fetch_and(!MASKED, Ordering::SeqCst);
    Ok(port)
}

fn send(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Send, &mut EvtchnSend { port })
}

fn close(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Close, &mut EvtchnClose { port })
}

fn unmask(port: Port) -> Result<u64, Errno> {
    evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port })
}

fn set_priority(port: Port, priority: u32) -> Result<u64, Errno> {
    evtchn(EvtchnOp::SetPriority, &mut EvtchnSetPriority { port, priority })
}

fn status(port: Port) -> Result<u32, Errno> {
    let mut argument = EvtchnStatus { dom: DomId::SELF, port, ..EvtchnStatus::default() };
    evtchn(EvtchnOp::Status, &mut argument)?;
    Ok(argument.status)
}

/// Closes ports whose events were taken, and masks their words for whoever gets the numbers next.
fn done(given: &Given, ports: &[Port]) -> Verdict {
    for &port in ports {
        check_eq!(close(port), Ok(0));
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
    }
    Ok(())
}

fn word(given: &Given, port: Port) -> u32 {
    given.word(port).load(Ordering::SeqCst)
}

fn two_levels_have_no_array_and_no_priorities(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    check_eq!(expand(page.mfn()), Err(Errno::EOPNOTSUPP));
    let port = ipi_for(0)?;
    check_eq!(set_priority(port, 3), Err(Errno::ENOSYS));
    check_eq!(set_priority(port, 99), Err(Errno::ENOSYS), "whatever the priority");
    check_eq!(set_priority(Port::new(1 << 20), 3), Err(Errno::EINVAL), "no such port");
    check_eq!(send(port), Ok(0));
    check!(pending(port), "two levels as before");
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn init_control_refused_changes_nothing(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let frame = page.mfn();
    for vcpu in [2, 4000, u32::MAX] {
        check_eq!(init_control(vcpu, frame, 0).err(), Some(Errno::ENOENT), "vCPU {vcpu}");
    }
    // 72 bytes, aligned to 8.
    for offset in [4025, 4028, 4032, 4096, u32::MAX, 4, 1] {
        check_eq!(init_control(0, frame, offset).err(), Some(Errno::EINVAL), "offset {offset}");
    }
    check_eq!(init_control(0, memory::root(), 0).err(), Some(Errno::EINVAL), "a page table");
    check_eq!(init_control(0, Mfn::new(0xff_ffff_ffff), 0).err(), Some(Errno::EINVAL), "no frame");
    check_eq!(init_control(0, Mfn::new(u64::MAX), 0).err(), Some(Errno::EINVAL), "no frame");
    check_eq!(init_control(0, Mfn::new(conformance::hypervisor_frame()?), 0).err(), Some(Errno::EINVAL));
    check_eq!(expand(frame), Err(Errno::EOPNOTSUPP), "still two levels");
    let port = ipi_for(0)?;
    check_eq!(send(port), Ok(0));
    check!(pending(port), "still two levels");
    check_eq!(close(port), Ok(0));
    Ok(())
}

fn what_is_pending_moves_over(_: &mut Domain) -> Verdict {
    if GIVEN.lock().is_some() {
        return skip("the domain has the FIFO form already");
    }
    // The console of an unprivileged domain fires, too, when somebody has read what was printed: that is over soon.
    let quiet = now_ns() + 20_000_000;
    while now_ns() < quiet {
        sched(SchedOp::Poll, &mut SchedPoll { timeout: quiet, ..SchedPoll::default() })?;
    }
    for port in 1..64 {
        take_pending(Port::new(port));
    }
    let (sent, silent, late) = (ipi_for(0)?, ipi_for(0)?, ipi_for(0)?);
    check_eq!(send(sent), Ok(0));
    check!(pending(sent) && !pending(silent));
    let page = Page::new()?;
    check_link_bits(&init_control(0, page.mfn(), OFFSET)?)?;
    let mut given = Given { control: page.leak() + u64::from(OFFSET), array: Vec::new(), heads: [0; 16] };
    // Between the two calls there is no word for it.
    check_eq!(send(late), Ok(0));
    check_eq!(given.ready().load(Ordering::SeqCst), 0);
    let words = Page::new()?;
    let (frame, address) = (words.mfn(), words.leak());
    given.array.push(address);
    check_eq!(expand(frame), Ok(0));
    check_eq!(word(&given, sent), PENDING | LINKED | late.get(), "in the order of their numbers");
    check_eq!(word(&given, silent), 0);
    check_eq!(word(&given, late), PENDING | LINKED);
    check_eq!(given.ready().load(Ordering::SeqCst), 1 << 7);
    check_eq!(given.head(7), sent.get());
    check_eq!(given.take(), [(7, sent), (7, late)]);
    for index in 0..u64::from(WORDS) {
        half(address + index * 4).fetch_or(MASKED, Ordering::SeqCst);
    }
    done(&given, &[sent, silent, late])?;
    *GIVEN.lock() = Some(given);
    Ok(())
}

fn init_control_only_once(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let page = Page::new()?;
        check_eq!(init_control(0, page.mfn(), 0).err(), Some(Errno::EINVAL));
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)], "the first block is the one in use");
        done(given, &[port])
    })
}

fn init_control_bad_address(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        for command in [EvtchnOp::InitControl, EvtchnOp::ExpandArray, EvtchnOp::SetPriority] {
            let answer = call(Hypercall::EventChannelOp, [command.number().into(), NOWHERE, 0, 0, 0]);
            check_eq!(answer, Err(Errno::EFAULT), "{command:?}");
        }
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

fn expand_array_refused(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        check_eq!(expand(memory::root()), Err(Errno::EINVAL), "a page table");
        check_eq!(expand(Mfn::new(0xff_ffff_ffff)), Err(Errno::EINVAL), "no frame");
        check_eq!(expand(Mfn::new(u64::MAX)), Err(Errno::EINVAL), "no frame");
        check_eq!(expand(Mfn::new(conformance::hypervisor_frame()?)), Err(Errno::EINVAL));
        // The next page is still the second.
        let before = given.array.len();
        given.grow()?;
        check_eq!(given.array.len(), before + 1);
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

fn an_event_is_linked_and_announced(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(word(given, port), PENDING | LINKED);
        check_eq!(given.ready().load(Ordering::SeqCst), 1 << 7);
        check_eq!(given.head(7), port.get());
        // SAFETY: a byte of the shared page.
        let upcall = unsafe { (&raw const (*shared()).vcpu_info[0].evtchn_upcall_pending).read_volatile() };
        check_eq!(upcall, 1);
        check_eq!(given.take(), [(7, port)]);
        check_eq!(given.take(), []);
        done(given, &[port])
    })
}

fn five_signals_are_one_event(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        for _ in 0..5 {
            check_eq!(send(port), Ok(0));
        }
        check_eq!(word(given, port), PENDING | LINKED, "not linked to itself");
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

fn events_follow_in_the_order_of_their_raising(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let ports = [ipi(given)?, ipi(given)?, ipi(given)?, ipi(given)?];
        let order = [ports[2], ports[0], ports[3], ports[1]];
        for port in order {
            check_eq!(send(port), Ok(0));
        }
        check_eq!(given.head(7), order[0].get());
        for pair in order.windows(2) {
            check_eq!(word(given, pair[0]), PENDING | LINKED | pair[1].get());
        }
        check_eq!(word(given, order[3]), PENDING | LINKED);
        check_eq!(given.take(), order.map(|port| (7, port)));
        done(given, &ports)
    })
}

fn an_event_comes_again_when_it_was_taken(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        // The port is the tail that the hypervisor remembers each time.
        let port = ipi(given)?;
        for round in 0..100 {
            check_eq!(send(port), Ok(0));
            check_eq!(given.take(), [(7, port)], "round {round}");
        }
        done(given, &[port])
    })
}

fn an_event_that_comes_while_linked_is_not_lost(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        // Taken from the queue by LINKED, not yet handled: another signal links it anew.
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        given.ready().store(0, Ordering::SeqCst);
        given.word(port).fetch_and(!LINKED, Ordering::SeqCst);
        check_eq!(send(port), Ok(0));
        check_eq!(word(given, port), PENDING | LINKED);
        check_eq!(given.ready().load(Ordering::SeqCst), 1 << 7);
        check_eq!(given.take(), [(7, port)]);
        // Handled while it is linked: it is passed over, and comes with the next signal.
        check_eq!(send(port), Ok(0));
        given.word(port).fetch_and(!PENDING, Ordering::SeqCst);
        check_eq!(given.take(), []);
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

fn a_queue_that_was_emptied_begins_anew(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let (first, second) = (ipi(given)?, ipi(given)?);
        check_eq!(send(first), Ok(0));
        check_eq!(given.take(), [(7, first)]);
        check_eq!(send(second), Ok(0));
        check_eq!(word(given, first), 0, "the old tail is not linked to");
        check_eq!((given.head(7), word(given, second)), (second.get(), PENDING | LINKED));
        check_eq!(given.take(), [(7, second)]);
        done(given, &[first, second])
    })
}

fn the_upcall_is_announced_once(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let (first, second) = (ipi(given)?, ipi(given)?);
        check_eq!(window(), 0);
        check_eq!(send(first), Ok(0));
        check_eq!(send(second), Ok(0));
        check_eq!(window(), 1, "two events, one upcall");
        check_eq!(given.take(), [(7, first), (7, second)]);
        check_eq!(window(), 0);
        check_eq!(send(second), Ok(0));
        check_eq!(window(), 1);
        check_eq!(given.take(), [(7, second)]);
        done(given, &[first, second])
    })
}

fn a_masked_event_is_pending_but_not_linked(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        check_eq!(send(port), Ok(0));
        check_eq!(word(given, port), PENDING | MASKED);
        check_eq!(given.ready().load(Ordering::SeqCst), 0);
        check_eq!(window(), 0);
        // Unmasked by the guest alone: only the next signal links it.
        given.word(port).fetch_and(!MASKED, Ordering::SeqCst);
        check_eq!(given.take(), []);
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

fn unmask_links_what_is_pending(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        check_eq!(unmask(port), Ok(0));
        check_eq!(word(given, port), 0, "nothing was pending");
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        check_eq!(send(port), Ok(0));
        check_eq!(unmask(port), Ok(0));
        check_eq!(word(given, port), PENDING | LINKED);
        check_eq!(window(), 1);
        check_eq!(given.take(), [(7, port)]);
        check_eq!(unmask(Port::new(1 << 20)), Err(Errno::EINVAL));
        done(given, &[port])
    })
}

fn unmask_of_a_linked_event_links_it_once(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let (port, other) = (ipi(given)?, ipi(given)?);
        check_eq!(send(port), Ok(0));
        check_eq!(send(other), Ok(0));
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        check_eq!(unmask(port), Ok(0));
        check_eq!(word(given, port), PENDING | LINKED | other.get());
        check_eq!(given.take(), [(7, port), (7, other)]);
        done(given, &[port, other])
    })
}

fn unmask_of_a_closed_port_does_nothing(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        done(given, &[port])?;
        check_eq!(status(port), Ok(EVTCHNSTAT_CLOSED));
        check_eq!(unmask(port), Ok(0));
        check_eq!(word(given, port), MASKED);
        let port = ipi(given)?;
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        check_eq!(unmask(port), Ok(0));
        check_eq!(word(given, port), 0, "one that is open");
        done(given, &[port])
    })
}

fn the_default_priority_is_seven(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let (usual, chosen) = (ipi(given)?, ipi(given)?);
        check_eq!(set_priority(chosen, 7), Ok(0));
        check_eq!(send(usual), Ok(0));
        check_eq!(send(chosen), Ok(0));
        check_eq!(given.take(), [(7, usual), (7, chosen)]);
        done(given, &[usual, chosen])
    })
}

fn every_priority_has_its_queue(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let mut ports = Vec::new();
        for priority in (0..16).rev() {
            let port = ipi(given)?;
            check_eq!(set_priority(port, priority), Ok(0));
            check_eq!(send(port), Ok(0));
            check_eq!(given.head(priority), port.get());
            check_eq!(word(given, port), PENDING | LINKED, "no link to another queue");
            ports.push(port);
        }
        check_eq!(given.ready().load(Ordering::SeqCst), 0xffff);
        let taken = given.take();
        let expected: Vec<_> = (0..16).map(|priority| (priority, ports[15 - priority as usize])).collect();
        check_eq!(taken, expected);
        done(given, &ports)
    })
}

fn set_priority_refused(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        check_eq!(set_priority(port, 2), Ok(0));
        for priority in [16, 17, 255, u32::MAX] {
            check_eq!(set_priority(port, priority), Err(Errno::EINVAL), "priority {priority}");
        }
        check_eq!(set_priority(Port::new(1 << 20), 2), Err(Errno::EINVAL), "no such port");
        check_eq!(set_priority(Port::new(0), 2), Err(Errno::EACCES), "nobody's port");
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(2, port)], "as it was set before");
        done(given, &[port])?;
        check_eq!(set_priority(port, 2), Err(Errno::EACCES), "a closed port");
        Ok(())
    })
}

fn a_new_priority_counts_from_the_next_event(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let (port, other) = (ipi(given)?, ipi(given)?);
        check_eq!(send(port), Ok(0));
        check_eq!(set_priority(port, 1), Ok(0));
        check_eq!(word(given, port), PENDING | LINKED, "where it was");
        check_eq!(given.take(), [(7, port)]);
        // It was the tail of its old queue, and is in the new one when the old one has its next event.
        check_eq!(send(port), Ok(0));
        check_eq!(send(other), Ok(0));
        check_eq!(word(given, port), PENDING | LINKED, "not linked from another queue");
        check_eq!(given.take(), [(1, port), (7, other)]);
        done(given, &[port, other])
    })
}

fn a_port_that_is_opened_again_has_the_default_priority(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        check_eq!(set_priority(port, 14), Ok(0));
        done(given, &[port])?;
        let again = ipi(given)?;
        check_eq!(again, port);
        check_eq!(send(again), Ok(0));
        check_eq!(given.take(), [(7, again)]);
        done(given, &[again])
    })
}

fn close_clears_what_is_pending(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let (port, other) = (ipi(given)?, ipi(given)?);
        check_eq!(send(port), Ok(0));
        check_eq!(send(other), Ok(0));
        check_eq!(close(port), Ok(0));
        check_eq!(word(given, port), LINKED | other.get(), "still in the queue");
        check_eq!(given.take(), [(7, other)], "passed over");
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        done(given, &[other])
    })
}

fn a_linked_port_is_not_given_out_again(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(close(port), Ok(0));
        let other = ipi_for(0)?;
        check!(other != port, "port {port} is in a queue");
        check_eq!(given.take(), []);
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        let again = ipi(given)?;
        check_eq!(again, port, "the lowest again");
        done(given, &[other, again])
    })
}

fn poll_of(port: Port, timeout: u64) -> Result<u64, Errno> {
    let mut list = [port];
    let ports = GuestHandle::new(list.as_mut_ptr() as u64);
    sched(SchedOp::Poll, &mut SchedPoll { ports, nr_ports: 1, pad0: 0, timeout })
}

fn poll_sees_the_word(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        given.word(port).fetch_or(MASKED, Ordering::SeqCst);
        let start = now_ns();
        check_eq!(poll_of(port, start + 10 * MS), Ok(0));
        check!(now_ns() - start > 9 * MS, "nothing was pending");
        // The two-level form's bit means nothing.
        // SAFETY: a word of the shared page, accessed atomically.
        let bits = unsafe { AtomicU64::from_ptr((&raw mut (*shared()).evtchn_pending).cast()) };
        bits.fetch_or(1 << port.get(), Ordering::SeqCst);
        let start = now_ns();
        check_eq!(poll_of(port, start + 10 * MS), Ok(0));
        check!(now_ns() - start > 9 * MS, "nothing was pending in the word");
        bits.fetch_and(!(1 << port.get()), Ordering::SeqCst);
        check_eq!(send(port), Ok(0));
        let start = now_ns();
        check_eq!(poll_of(port, start + 2000 * MS), Ok(0));
        check!(now_ns() - start < 1000 * MS, "it was pending, masked or not");
        given.word(port).fetch_and(!PENDING, Ordering::SeqCst);
        done(given, &[port])
    })
}

fn a_virtual_interrupt_takes_the_queue(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let mut argument = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: 0, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindVirq, &mut argument), Ok(0));
        let port = argument.port;
        check_eq!(call(Hypercall::VcpuOp, [VcpuOp::StopPeriodicTimer.number().into(), 0, 0, 0, 0]), Ok(0));
        given.word(port).fetch_and(!MASKED, Ordering::SeqCst);
        given.take();
        check_eq!(set_priority(port, 0), Ok(0));
        check_eq!(call(Hypercall::SetTimerOp, [now_ns() + 2 * MS, 0, 0, 0, 0]), Ok(0));
        let start = now_ns();
        while given.ready().load(Ordering::SeqCst) == 0 && now_ns() - start < 1000 * MS {}
        check_eq!(given.take(), [(0, port)]);
        done(given, &[port])
    })
}

fn shared_info_is_left_alone(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        // SAFETY: a word of the shared page.
        unsafe { (&raw mut (*shared()).vcpu_info[0].evtchn_pending_sel).write_volatile(0) };
        check_eq!(send(port), Ok(0));
        // SAFETY: as above.
        let selector = unsafe { (&raw const (*shared()).vcpu_info[0].evtchn_pending_sel).read_volatile() };
        check!(!pending(port) && selector == 0, "selector {selector:#x}");
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

/// Whether the domain has a second vCPU.
fn two_vcpus() -> bool {
    vcpu(VcpuOp::IsUp, 1, &mut 0u64).is_ok()
}

static SECOND: AtomicU64 = AtomicU64::new(0);

fn a_vcpu_without_control_block_gets_no_events(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        if !two_vcpus() || SECOND.load(Ordering::SeqCst) != 0 {
            return skip("needs a second vCPU that has no block yet");
        }
        let port = ipi_for(1)?;
        given.word(port).fetch_and(!MASKED, Ordering::SeqCst);
        check_eq!(send(port), Ok(0), "dropped");
        check_eq!(word(given, port), 0);
        check_eq!(status(port), Ok(EVTCHNSTAT_IPI));
        done(given, &[port])
    })
}

fn a_second_vcpu_has_its_own_queues(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        if !two_vcpus() {
            return skip("needs a second vCPU");
        }
        if SECOND.load(Ordering::SeqCst) == 0 {
            let page = Page::new()?;
            check_link_bits(&init_control(1, page.mfn(), 4024)?)?;
            check_eq!(init_control(1, page.mfn(), 0).err(), Some(Errno::EINVAL), "once only");
            SECOND.store(page.leak() + 4024, Ordering::SeqCst);
        }
        let block = SECOND.load(Ordering::SeqCst);
        let (own, other) = (ipi(given)?, ipi_for(1)?);
        given.word(other).fetch_and(!MASKED, Ordering::SeqCst);
        check_eq!(send(own), Ok(0));
        check_eq!(send(other), Ok(0));
        check_eq!(word(given, own), PENDING | LINKED, "not linked to another vCPU's");
        check_eq!(half(block).load(Ordering::SeqCst), 1 << 7, "ready of vCPU 1");
        check_eq!(half(block + 8 + 7 * 4).load(Ordering::SeqCst), other.get());
        check_eq!(given.take(), [(7, own)]);
        // Taken for it, and a port that moves to it follows behind.
        half(block).store(0, Ordering::SeqCst);
        check_eq!(given.word(other).fetch_and(!(LINKED | PENDING), Ordering::SeqCst), LINKED | PENDING);
        let mut virq = EvtchnBindVirq { virq: Virq::DOM_EXC.get(), vcpu: 0, port: Port::new(0) };
        check_eq!(evtchn(EvtchnOp::BindVirq, &mut virq), Ok(0));
        check_eq!(
            evtchn(EvtchnOp::BindVcpu, &mut EvtchnBindVcpu { port: virq.port, vcpu: 1 }),
            Ok(0),
            "a global one may move"
        );
        done(given, &[own, other, virq.port])
    })
}

fn an_event_beyond_the_array_is_held(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let end = given.array.len() as u32 * WORDS;
        let mut ports = Vec::new();
        loop {
            let Ok(port) = ipi_for(0) else { return skip("the domain may not have as many ports") };
            ports.push(port);
            if port.get() >= end {
                break;
            }
        }
        let last = ports[ports.len() - 1];
        check_eq!(last.get(), end, "ports beyond the array can be had");
        check_eq!(send(last), Ok(0));
        check_eq!(unmask(last), Ok(0), "there is nothing to unmask");
        let start = now_ns();
        check_eq!(poll_of(last, start + 5 * MS), Ok(0));
        check!(now_ns() - start > 4 * MS, "nor to see");
        check_eq!(given.take(), []);
        // The page comes, unmasked.
        let page = Page::new()?;
        let (frame, address) = (page.mfn(), page.leak());
        given.array.push(address);
        check_eq!(expand(frame), Ok(0));
        check_eq!(word(given, last), PENDING | LINKED);
        check_eq!(given.take(), [(7, last)]);
        for index in 0..u64::from(WORDS) {
            half(address + index * 4).fetch_or(MASKED, Ordering::SeqCst);
        }
        done(given, &ports)
    })
}

fn a_held_event_goes_to_the_next_user_of_its_port(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let end = given.array.len() as u32 * WORDS;
        let mut ports = Vec::new();
        while ports.last().is_none_or(|port: &Port| port.get() < end) {
            let Ok(port) = ipi_for(0) else {
                done(given, &ports)?;
                return skip("the domain may not have as many ports");
            };
            ports.push(port);
        }
        let last = ports[ports.len() - 1];
        check_eq!(send(last), Ok(0));
        check_eq!(close(last), Ok(0));
        check_eq!(ipi_for(0), Ok(last), "the lowest free port");
        let page = Page::new()?;
        let (frame, address) = (page.mfn(), page.leak());
        given.array.push(address);
        check_eq!(expand(frame), Ok(0));
        check_eq!(given.take(), [(7, last)], "it finds that it fired");
        for index in 0..u64::from(WORDS) {
            half(address + index * 4).fetch_or(MASKED, Ordering::SeqCst);
        }
        done(given, &ports)
    })
}

fn more_than_4096_ports(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        while given.array.len() < 6 {
            given.grow()?;
        }
        let mut ports = Vec::new();
        while ports.len() < 5000 {
            let Ok(port) = ipi_for(0) else { break };
            ports.push(port);
        }
        let (count, last) = (ports.len(), ports[ports.len() - 1]);
        if count == 5000 {
            given.word(last).fetch_and(!MASKED, Ordering::SeqCst);
            check_eq!(send(last), Ok(0));
            check_eq!(given.take(), [(7, last)], "port {last}");
        }
        done(given, &ports)?;
        if count < 5000 {
            return skip("the domain may not have as many ports");
        }
        check!(last.get() > 4999);
        Ok(())
    })
}

fn the_guests_pages_are_held(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        // A page that the hypervisor writes cannot become a page table.
        let mut page = Page::new()?;
        for word in page.bytes_mut().chunks_exact_mut(4) {
            word.copy_from_slice(&0u32.to_le_bytes());
        }
        let table = TablePage::new(&[])?;
        check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0), "any other page can");
        check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
        let frame = page.mfn();
        check_eq!(expand(frame), Ok(0));
        protect(&page, false)?;
        let answer = mmuext(MmuextCmd::PinL1Table, frame.get(), 0);
        protect(&page, true)?;
        given.array.push(page.leak());
        check!(matches!(answer, Err(Errno::EINVAL | Errno::EBUSY)), "{answer:?}");
        Ok(())
    })
}

fn words_full_of_everything(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let ports = [ipi(given)?, ipi(given)?, ipi(given)?];
        for value in [u32::MAX, !MASKED, LINKED | LINK, PENDING | LINKED | BUSY, LINK, BUSY | 5] {
            for port in ports {
                given.word(port).store(value, Ordering::SeqCst);
                check_eq!(send(port), Ok(0), "{value:#x}");
                check_eq!(unmask(port), Ok(0), "{value:#x}");
            }
            half(given.control + 8 + 7 * 4).store(value, Ordering::SeqCst);
            given.ready().store(value, Ordering::SeqCst);
            for port in ports {
                check_eq!(send(port), Ok(0), "{value:#x}");
            }
        }
        // Put right again by the guest, the form works as before.
        for port in ports {
            given.word(port).store(0, Ordering::SeqCst);
        }
        given.ready().store(0, Ordering::SeqCst);
        given.heads = [0; 16];
        check_eq!(send(ports[1]), Ok(0));
        check_eq!(send(ports[0]), Ok(0));
        check_eq!(given.take(), [(7, ports[1]), (7, ports[0])]);
        done(given, &ports)
    })
}

fn the_array_has_128_pages(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        while given.array.len() < 128 {
            given.grow()?;
        }
        let page = Page::new()?;
        check_eq!(expand(page.mfn()), Err(Errno::ENOSPC));
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })
}

fn reset_goes_back_to_two_levels(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        let port = ipi(given)?;
        check_eq!(set_priority(port, 3), Ok(0));
        check_eq!(evtchn(EvtchnOp::Reset, &mut EvtchnReset { dom: DomId::SELF }), Ok(0));
        check_eq!(status(port), Ok(EVTCHNSTAT_CLOSED));
        check_eq!(expand(memory::root()), Err(Errno::EOPNOTSUPP));
        let port = ipi_for(0)?;
        check_eq!(port, Port::new(1));
        check_eq!(set_priority(port, 3), Err(Errno::ENOSYS));
        check_eq!(send(port), Ok(0));
        check!(pending(port));
        check_eq!(word(given, port) & PENDING, 0, "the hypervisor lets go of the pages");
        check_eq!(close(port), Ok(0));
        Ok(())
    })?;
    *GIVEN.lock() = None;
    SECOND.store(0, Ordering::SeqCst);
    Ok(())
}

fn after_reset_the_form_can_be_chosen_again(_: &mut Domain) -> Verdict {
    with_fifo(|given| {
        // Xen raises once more what it held for earlier users of the ports, when it had no words for them.
        for port in (1..WORDS).map(Port::new) {
            given.word(port).store(MASKED, Ordering::SeqCst);
        }
        let port = ipi(given)?;
        check_eq!(send(port), Ok(0));
        check_eq!(given.take(), [(7, port)]);
        done(given, &[port])
    })?;
    check_eq!(evtchn(EvtchnOp::Reset, &mut EvtchnReset { dom: DomId::SELF }), Ok(0));
    *GIVEN.lock() = None;
    SECOND.store(0, Ordering::SeqCst);
    Ok(())
}

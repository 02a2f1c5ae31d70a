//! `event_channel_op`: event channels (public/event_channel.h), and its form older than interface 0x00030202.

use alloc::sync::Arc;

use hypercall_abi::evtchn::*;
use hypercall_abi::subops::EvtchnOp;
use hypercall_abi::{DomId, Errno, Mfn, VcpuId, Virq};

use super::{Args, Exit, HcResult};
use crate::access::Verbs;
use crate::domain::{Current, Domain};
use crate::evtchn::{Error, PortState, Progress};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

impl From<Error> for Errno {
    fn from(error: Error) -> Errno {
        match error {
            Error::NoDomain => Errno::ESRCH,
            Error::NoVcpu => Errno::ENOENT,
            Error::BadPort | Error::BadSource | Error::BadPage | Error::BadPriority | Error::Dying => {
                Errno::EINVAL
            }
            Error::AlreadyBound => Errno::EEXIST,
            Error::PinInUse | Error::ResetUnderWay => Errno::EBUSY,
            Error::NotPermitted => Errno::EPERM,
            Error::NoFreePort => Errno::ENOSPC,
            Error::NoMemory => Errno::ENOMEM,
            Error::NotAllClosed | Error::Unfinished => Errno::EAGAIN,
            Error::NotFifo => Errno::EOPNOTSUPP,
            Error::NoPriorities => Errno::ENOSYS,
            Error::NotOpen => Errno::EACCES,
        }
    }
}

impl From<Error> for Exit {
    fn from(error: Error) -> Exit {
        Exit::Errno(error.into())
    }
}

/// What a search that did not come to its end is to the caller's SYSCALL: executed again.
fn or_again(error: Error, args: Args) -> Exit {
    if error == Error::Unfinished { Exit::Preempted(args) } else { error.into() }
}

/// The domain that the caller names as the one to work on: itself, or with the control right any other.
fn target<P: Platform>(hv: &Hypervisor<P>, current: &Current, id: DomId) -> Result<Arc<Domain>, Error> {
    let caller = current.domain();
    if hv.resolve_domid(caller.id, id) == caller.id {
        return Ok(caller.clone());
    }
    let domain = hv.domains.get(id).ok_or(Error::NoDomain)?;
    if caller.rights.lock().verbs.contains(Verbs::CONTROL) { Ok(domain) } else { Err(Error::NotPermitted) }
}

/// `event_channel_op(cmd, arg)`.
///
/// `ENOSYS` unknown command, `EFAULT` unreadable or unwritable argument; more with each argument structure. When the answer of a command that opened a port cannot be written, the port stays open, as on Xen: the guest
/// finds it with `status`.
pub fn event_channel_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, arg, ..] = args;
    match EvtchnOp::accept(cmd)? {
        // Nearly all are this one, and it needs hardly anything of what the others do.
        EvtchnOp::Send => send(hv, current, arg),
        other => carry_out(hv, current, args, other),
    }
}

fn send<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, arg: u64) -> HcResult {
    hv.send(current.domain(), hv.read_guest::<EvtchnSend>(arg)?.port)?;
    current.state.counts.events_sent.add(1);
    Ok(0)
}

#[inline(never)]
fn carry_out<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
    command: EvtchnOp,
) -> HcResult {
    let [_, arg, ..] = args;
    let domain = current.domain().clone();
    let mut budget = current.state.budget;
    let again = |error| or_again(error, args);
    match command {
        EvtchnOp::AllocUnbound => {
            let mut op: EvtchnAllocUnbound = hv.read_guest(arg)?;
            let owner = target(hv, current, op.dom)?;
            let remote = hv.resolve_domid(domain.id, op.remote_dom);
            op.port = hv.alloc_unbound(&owner, remote, &mut budget).map_err(again)?;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::BindInterdomain => {
            let mut op: EvtchnBindInterdomain = hv.read_guest(arg)?;
            let remote = hv.domains.get(hv.resolve_domid(domain.id, op.remote_dom)).ok_or(Error::NoDomain)?;
            op.local_port =
                hv.bind_interdomain(&domain, &remote, op.remote_port, &mut budget).map_err(again)?;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::BindVirq => {
            let mut op: EvtchnBindVirq = hv.read_guest(arg)?;
            let (virq, vcpu) = (Virq::new(op.virq), VcpuId::new(op.vcpu));
            op.port = hv.bind_virq(&domain, virq, vcpu, &mut budget).map_err(again)?;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::BindIpi => {
            let mut op: EvtchnBindIpi = hv.read_guest(arg)?;
            op.port = hv.bind_ipi(&domain, VcpuId::new(op.vcpu), &mut budget).map_err(again)?;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::BindPirq => {
            // BIND_PIRQ_WILL_SHARE is a promise about other listeners; a source has one listener here.
            let mut op: EvtchnBindPirq = hv.read_guest(arg)?;
            op.port = hv.bind_pirq(&domain, op.pirq, &mut budget).map_err(again)?;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::Close => hv.close(&domain, hv.read_guest::<EvtchnClose>(arg)?.port)?,
        EvtchnOp::Send => return send(hv, current, arg),
        EvtchnOp::Status => {
            let mut op: EvtchnStatus = hv.read_guest(arg)?;
            status(hv, current, &mut op)?;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::BindVcpu => {
            let op: EvtchnBindVcpu = hv.read_guest(arg)?;
            hv.bind_vcpu(&domain, op.port, VcpuId::new(op.vcpu))?;
        }
        EvtchnOp::Unmask => hv.unmask(&domain, hv.read_guest::<EvtchnUnmask>(arg)?.port)?,
        EvtchnOp::Reset => return reset(hv, current, args, false),
        EvtchnOp::ResetCont => return reset(hv, current, args, true),
        EvtchnOp::InitControl => {
            let mut op: EvtchnInitControl = hv.read_guest(arg)?;
            let page = Mfn::new(op.control_gfn.get());
            hv.init_control(&domain, VcpuId::new(op.vcpu), page, op.offset)?;
            op.link_bits = EVTCHN_FIFO_LINK_BITS as u8;
            hv.write_guest(arg, &op)?;
        }
        EvtchnOp::ExpandArray => {
            let op: EvtchnExpandArray = hv.read_guest(arg)?;
            hv.expand_array(&domain, Mfn::new(op.array_gfn.get()))?;
        }
        EvtchnOp::SetPriority => {
            let op: EvtchnSetPriority = hv.read_guest(arg)?;
            hv.set_priority(&domain, op.port, op.priority)?;
        }
    }
    Ok(0)
}

/// Fields that do not belong to the state keep what the guest wrote there, as on Xen.
fn status<P: Platform>(hv: &Hypervisor<P>, current: &Current, op: &mut EvtchnStatus) -> Result<(), Error> {
    // A port that does not exist is told before the lack of a right, as on Xen.
    let domain = hv.domains.get(hv.resolve_domid(current.domain().id, op.dom)).ok_or(Error::NoDomain)?;
    let entry = hv.port_status(&domain, op.port)?;
    target(hv, current, op.dom)?;
    op.status = match entry.state {
        PortState::Free | PortState::Reserved => EVTCHNSTAT_CLOSED,
        PortState::Unbound { remote } => {
            op.u0 = u32::from(remote.get());
            EVTCHNSTAT_UNBOUND
        }
        PortState::Interdomain { remote, port } => {
            op.set_remote(remote, port);
            EVTCHNSTAT_INTERDOMAIN
        }
        PortState::Pirq { number } => {
            op.u0 = number;
            EVTCHNSTAT_PIRQ
        }
        PortState::Virq { virq } => {
            op.u0 = virq.get();
            EVTCHNSTAT_VIRQ
        }
        PortState::Ipi => EVTCHNSTAT_IPI,
    };
    op.vcpu = entry.vcpu().get();
    Ok(())
}

/// Closes all ports of a domain. Another domain's only while the control interface holds it paused.
fn reset<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args, resuming: bool) -> HcResult {
    let op: EvtchnReset = hv.read_guest(args[1])?;
    let domain = target(hv, current, op.dom)?;
    if domain.id != current.domain().id && domain.pauses.load(core::sync::atomic::Ordering::Acquire) == 0 {
        return Err(Errno::EINVAL.into());
    }
    match hv.reset_ports(&domain, resuming, &mut current.state.budget)? {
        Progress::Done => Ok(0),
        Progress::Preempted => {
            let mut again = args;
            again[0] = u64::from(EvtchnOp::ResetCont.number());
            Err(Exit::Preempted(again))
        }
    }
}

/// The form of hypercall 16: one structure that begins with the command, the arguments behind it.
pub fn event_channel_op_compat<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
) -> HcResult {
    /// Bytes of the structure: the command, and the largest of the arguments (`status`).
    const SIZE: usize = size_of::<u32>() + size_of::<EvtchnStatus>();
    let [at, ..] = args;
    // Xen copies all of it first: an argument that ends in unreadable memory is refused whatever the command.
    let whole: [u8; SIZE] = hv.read_guest(at)?;
    let (cmd, _) = whole.split_first_chunk::<4>().ok_or(Errno::EFAULT)?;
    let cmd = u64::from(u32::from_le_bytes(*cmd));
    match EvtchnOp::from_number(cmd).ok_or(Errno::ENOSYS)? {
        EvtchnOp::BindInterdomain
        | EvtchnOp::BindVirq
        | EvtchnOp::BindPirq
        | EvtchnOp::Close
        | EvtchnOp::Send
        | EvtchnOp::Status
        | EvtchnOp::AllocUnbound
        | EvtchnOp::BindIpi
        | EvtchnOp::BindVcpu
        | EvtchnOp::Unmask => {
            event_channel_op(hv, current, [cmd, at.wrapping_add(4), 0, 0, 0, 0]).map_err(|exit| match exit {
                Exit::Preempted(_) => Exit::Preempted(args),
                exit => exit,
            })
        }
        _ => Err(Errno::ENOSYS.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evtchn::tests::hypervisor;
    use crate::grant::tests::Guest;
    use crate::platform::sim::SimMachine;
    use alloc::vec::Vec;
    use core::sync::atomic::Ordering;
    use hypercall_abi::{Gfn, Port};
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    /// Where the argument lies: the guest's first data page.
    const AT: u64 = 0x100;

    fn call<T: IntoBytes + FromBytes + Immutable>(
        hv: &Hypervisor<SimMachine>,
        guest: &Guest,
        cmd: EvtchnOp,
        op: T,
    ) -> Result<T, Errno> {
        let mut current = guest.current(hv, 2);
        hv.write_guest(AT, &op)?;
        let mut args = [u64::from(cmd.number()), AT, 0, 0, 0, 0];
        loop {
            match event_channel_op(hv, &mut current, args) {
                Ok(0) => return hv.read_guest(AT),
                Ok(other) => panic!("answered {other}"),
                Err(Exit::Errno(errno)) => return Err(errno),
                Err(Exit::Preempted(again)) => {
                    args = again;
                    current.state.budget = crate::hypercall::Budget::new(2);
                }
                Err(exit) => panic!("{exit:?}"),
            }
        }
    }

    fn port_of(hv: &Hypervisor<SimMachine>, guest: &Guest, remote: DomId) -> Port {
        let op = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: remote, ..Default::default() };
        call(hv, guest, EvtchnOp::AllocUnbound, op).unwrap().port
    }

    fn status_of(hv: &Hypervisor<SimMachine>, guest: &Guest, port: Port) -> EvtchnStatus {
        let op = EvtchnStatus { dom: DomId::SELF, port, ..Default::default() };
        call(hv, guest, EvtchnOp::Status, op).unwrap()
    }

    #[test]
    fn a_channel_from_opening_to_reset() {
        let hv = hypervisor(128);
        let (a, b) = (Guest::new(&hv, 0), Guest::new(&hv, 4));
        let waiting = port_of(&hv, &a, b.domain.id);
        let bind =
            EvtchnBindInterdomain { remote_dom: a.domain.id, remote_port: waiting, ..Default::default() };
        let port = call(&hv, &b, EvtchnOp::BindInterdomain, bind).unwrap().local_port;
        let seen = status_of(&hv, &b, port);
        assert_eq!(
            (seen.status, seen.remote_domain(), seen.remote_port()),
            (EVTCHNSTAT_INTERDOMAIN, a.domain.id, waiting)
        );
        call(&hv, &b, EvtchnOp::Send, EvtchnSend { port }).unwrap();
        assert_eq!(hv.any_pending(&a.domain, &[waiting]), Ok(true));
        call(&hv, &b, EvtchnOp::Unmask, EvtchnUnmask { port }).unwrap();
        call(&hv, &b, EvtchnOp::BindVcpu, EvtchnBindVcpu { port, vcpu: 0 }).unwrap();
        call(&hv, &b, EvtchnOp::Close, EvtchnClose { port }).unwrap();
        assert_eq!(status_of(&hv, &a, waiting).status, EVTCHNSTAT_UNBOUND);

        let virq = EvtchnBindVirq { virq: Virq::TIMER.get(), vcpu: 0, ..Default::default() };
        let timer = call(&hv, &a, EvtchnOp::BindVirq, virq).unwrap().port;
        assert_eq!(status_of(&hv, &a, timer).status, EVTCHNSTAT_VIRQ);
        let ipi = call(&hv, &a, EvtchnOp::BindIpi, EvtchnBindIpi::default()).unwrap().port;
        assert_eq!(status_of(&hv, &a, ipi).status, EVTCHNSTAT_IPI);
        call(&hv, &a, EvtchnOp::Reset, EvtchnReset { dom: DomId::SELF }).unwrap();
        assert_eq!(a.domain.events.lock().active(), 0, "a reset that was preempted goes on");
    }

    #[test]
    fn errors_are_those_of_xen() {
        let hv = hypervisor(128);
        let (a, b) = (Guest::new(&hv, 0), Guest::new(&hv, 4));
        let waiting = port_of(&hv, &a, a.domain.id);
        let alloc = |dom| EvtchnAllocUnbound { dom, remote_dom: DomId::ZERO, ..Default::default() };
        assert_eq!(call(&hv, &a, EvtchnOp::AllocUnbound, alloc(b.domain.id)), Err(Errno::EPERM));
        assert_eq!(call(&hv, &a, EvtchnOp::AllocUnbound, alloc(DomId::new(77))), Err(Errno::ESRCH));
        let bind =
            |dom, remote_port| EvtchnBindInterdomain { remote_dom: dom, remote_port, ..Default::default() };
        assert_eq!(call(&hv, &b, EvtchnOp::BindInterdomain, bind(a.domain.id, waiting)), Err(Errno::EINVAL));
        assert_eq!(
            call(&hv, &b, EvtchnOp::BindInterdomain, bind(DomId::new(77), waiting)),
            Err(Errno::ESRCH)
        );
        let virq = |virq, vcpu| EvtchnBindVirq { virq, vcpu, ..Default::default() };
        call(&hv, &a, EvtchnOp::BindVirq, virq(0, 0)).unwrap();
        assert_eq!(call(&hv, &a, EvtchnOp::BindVirq, virq(0, 0)), Err(Errno::EEXIST));
        assert_eq!(call(&hv, &a, EvtchnOp::BindVirq, virq(0, 9)), Err(Errno::ENOENT));
        assert_eq!(call(&hv, &a, EvtchnOp::BindVirq, virq(24, 0)), Err(Errno::EINVAL));
        let ipi = EvtchnBindIpi { vcpu: 9, ..Default::default() };
        assert_eq!(call(&hv, &a, EvtchnOp::BindIpi, ipi), Err(Errno::ENOENT));
        let pirq = EvtchnBindPirq { pirq: 3, ..Default::default() };
        assert_eq!(call(&hv, &a, EvtchnOp::BindPirq, pirq), Err(Errno::EPERM));
        for port in [Port::new(0), Port::new(40), Port::new(u32::MAX)] {
            assert_eq!(call(&hv, &a, EvtchnOp::Close, EvtchnClose { port }), Err(Errno::EINVAL));
            assert_eq!(call(&hv, &a, EvtchnOp::Send, EvtchnSend { port }), Err(Errno::EINVAL));
        }
        assert_eq!(call(&hv, &a, EvtchnOp::Reset, EvtchnReset { dom: b.domain.id }), Err(Errno::EPERM));
        assert_eq!(call(&hv, &a, EvtchnOp::ResetCont, EvtchnReset { dom: DomId::SELF }), Err(Errno::EBUSY));
        assert_eq!(call(&hv, &a, EvtchnOp::SetPriority, EvtchnSetPriority::default()), Err(Errno::ENOSYS));
        let mut current = a.current(&hv, 2);
        for (args, errno) in
            [([99, AT, 0, 0, 0, 0], Errno::ENOSYS), ([4, 0xdead_0000, 0, 0, 0, 0], Errno::EFAULT)]
        {
            assert_eq!(event_channel_op(&hv, &mut current, args), Err(Exit::Errno(errno)));
        }
    }

    #[test]
    fn the_old_form_is_the_command_and_its_argument() {
        let hv = hypervisor(128);
        let a = Guest::new(&hv, 0);
        let mut current = a.current(&hv, 2);
        hv.write_guest(AT, &EvtchnOp::AllocUnbound.number()).unwrap();
        let op = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::new(3), ..Default::default() };
        hv.write_guest(AT + 4, &op).unwrap();
        assert_eq!(event_channel_op_compat(&hv, &mut current, [AT, 0, 0, 0, 0, 0]), Ok(0));
        let answer: EvtchnAllocUnbound = hv.read_guest(AT + 4).unwrap();
        assert_eq!(
            hv.port_status(&a.domain, answer.port).unwrap().state,
            PortState::Unbound { remote: DomId::new(3) }
        );
        hv.write_guest(AT, &EvtchnOp::Reset.number()).unwrap();
        assert_eq!(
            event_channel_op_compat(&hv, &mut current, [AT, 0, 0, 0, 0, 0]),
            Err(Exit::Errno(Errno::ENOSYS)),
            "commands that came later have no old form"
        );
    }

    // ── the FIFO form ──

    const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;
    const MASKED: u32 = 1 << EVTCHN_FIFO_MASKED;
    const LINKED: u32 = 1 << EVTCHN_FIFO_LINKED;

    /// A frame of the guest that it has not mapped.
    fn page(hv: &Hypervisor<SimMachine>, guest: &Guest) -> Mfn {
        hv.give_frames(&guest.domain, 0, u64::MAX).expect("the test has memory")
    }

    fn control(page: Mfn, offset: u32) -> EvtchnInitControl {
        EvtchnInitControl { control_gfn: Gfn::new(page.get()), offset, ..Default::default() }
    }

    fn array(page: Mfn) -> EvtchnExpandArray {
        EvtchnExpandArray { array_gfn: Gfn::new(page.get()) }
    }

    fn half(hv: &Hypervisor<SimMachine>, page: Mfn, index: u32) -> u32 {
        let word = hv.platform.frame(page)[index as usize / 2].load(Ordering::SeqCst);
        (word >> (index % 2 * 32)) as u32
    }

    fn set_half(hv: &Hypervisor<SimMachine>, page: Mfn, index: u32, value: u32) {
        let word = &hv.platform.frame(page)[index as usize / 2];
        let shift = index % 2 * 32;
        let rest = word.load(Ordering::SeqCst) & !(0xffff_ffff << shift);
        word.store(rest | u64::from(value) << shift, Ordering::SeqCst);
    }

    fn fifo(hv: &Hypervisor<SimMachine>, guest: &Guest) -> (Mfn, Mfn) {
        let (block, words) = (page(hv, guest), page(hv, guest));
        let answer = call(hv, guest, EvtchnOp::InitControl, control(block, 64)).unwrap();
        assert_eq!(answer.link_bits, 17);
        call(hv, guest, EvtchnOp::ExpandArray, array(words)).unwrap();
        (block, words)
    }

    /// Whether `frame` may become a page of descriptors: nobody holds it as a page that is written to.
    fn is_idle(hv: &Hypervisor<SimMachine>, guest: &Guest, frame: Mfn) -> bool {
        let budget = &mut crate::hypercall::Budget::unlimited();
        hv.pager().get_typed::<crate::page_ref::SegDesc>(frame, guest.domain.id, hv, budget).is_ok()
    }

    fn ipi(hv: &Hypervisor<SimMachine>, guest: &Guest) -> Port {
        call(hv, guest, EvtchnOp::BindIpi, EvtchnBindIpi::default()).unwrap().port
    }

    #[test]
    fn what_is_pending_moves_to_the_fifo_form() {
        let hv = hypervisor(128);
        let a = Guest::new(&hv, 0);
        let (sent, silent) = (ipi(&hv, &a), ipi(&hv, &a));
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port: sent }).unwrap();
        let (block, words) = (page(&hv, &a), page(&hv, &a));
        call(&hv, &a, EvtchnOp::InitControl, control(block, 64)).unwrap();
        assert_eq!(hv.any_pending(&a.domain, &[sent]), Ok(false), "it has no word yet");
        // One more while there is no word.
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port: sent }).unwrap();
        call(&hv, &a, EvtchnOp::ExpandArray, array(words)).unwrap();
        assert_eq!(half(&hv, words, sent.get()), PENDING | LINKED);
        assert_eq!(half(&hv, words, silent.get()), 0);
        assert_eq!(half(&hv, block, 16), 1 << 7, "ready");
        assert_eq!(half(&hv, block, 16 + 2 + 7), sent.get(), "head of the default queue");
        assert_eq!(hv.any_pending(&a.domain, &[sent]), Ok(true));
        // The next one is linked behind it.
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port: silent }).unwrap();
        assert_eq!(half(&hv, words, sent.get()), PENDING | LINKED | silent.get());
    }

    #[test]
    fn priorities_choose_the_queue() {
        let hv = hypervisor(128);
        let a = Guest::new(&hv, 0);
        let (block, words) = fifo(&hv, &a);
        let port = ipi(&hv, &a);
        for (priority, result) in [(0, Ok(())), (15, Ok(())), (16, Err(Errno::EINVAL))] {
            let op = EvtchnSetPriority { port, priority };
            assert_eq!(call(&hv, &a, EvtchnOp::SetPriority, op).map(drop), result);
        }
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port }).unwrap();
        assert_eq!((half(&hv, block, 16), half(&hv, block, 16 + 2 + 15)), (1 << 15, port.get()));
        // Moved while it is linked: from the next event on. The old queue forgets its tail.
        call(&hv, &a, EvtchnOp::SetPriority, EvtchnSetPriority { port, priority: 3 }).unwrap();
        set_half(&hv, words, port.get(), 0);
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port }).unwrap();
        assert_eq!((half(&hv, block, 16), half(&hv, block, 16 + 2 + 3)), (1 << 15 | 1 << 3, port.get()));
        let other = ipi(&hv, &a);
        call(&hv, &a, EvtchnOp::SetPriority, EvtchnSetPriority { port: other, priority: 15 }).unwrap();
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port: other }).unwrap();
        assert_eq!(half(&hv, block, 16 + 2 + 15), other.get(), "not linked behind a port of another queue");
        assert_eq!(half(&hv, words, port.get()), PENDING | LINKED);
        let closed = EvtchnSetPriority { port: Port::new(60), priority: 1 };
        assert_eq!(call(&hv, &a, EvtchnOp::SetPriority, closed), Err(Errno::EACCES));
        let nowhere = EvtchnSetPriority { port: Port::new(6000), priority: 1 };
        assert_eq!(call(&hv, &a, EvtchnOp::SetPriority, nowhere), Err(Errno::EINVAL));
    }

    #[test]
    fn masked_words_wait_and_polls_see_them() {
        let hv = hypervisor(128);
        let a = Guest::new(&hv, 0);
        let (block, words) = fifo(&hv, &a);
        let port = ipi(&hv, &a);
        set_half(&hv, words, port.get(), MASKED);
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port }).unwrap();
        assert_eq!((half(&hv, words, port.get()), half(&hv, block, 16)), (MASKED | PENDING, 0));
        assert_eq!(hv.any_pending(&a.domain, &[port]), Ok(true));
        call(&hv, &a, EvtchnOp::Unmask, EvtchnUnmask { port }).unwrap();
        assert_eq!((half(&hv, words, port.get()), half(&hv, block, 16)), (PENDING | LINKED, 1 << 7));
    }

    #[test]
    fn a_port_in_a_queue_is_not_given_out_again() {
        let hv = hypervisor(400);
        let a = Guest::new(&hv, 0);
        let (_, words) = fifo(&hv, &a);
        let ports: Vec<Port> = (0..2000).map(|_| ipi(&hv, &a)).collect();
        // The last are beyond the event array: nothing can be in a queue there.
        for port in &ports {
            call(&hv, &a, EvtchnOp::Send, EvtchnSend { port: *port }).unwrap();
            call(&hv, &a, EvtchnOp::Close, EvtchnClose { port: *port }).unwrap();
        }
        // `call` gives two steps: the search passes 15 groups without a port that can be had, and goes on.
        assert_eq!(ipi(&hv, &a), Port::new(1024));
        assert_eq!(half(&hv, words, 9) & (LINKED | PENDING), LINKED, "closing clears what is pending");
        set_half(&hv, words, 9, 0);
        assert_eq!(ipi(&hv, &a), Port::new(9));
        let end = PortState::Free;
        assert_eq!(hv.port_status(&a.domain, Port::new(8)).unwrap().state, end);
    }

    #[test]
    fn the_fifo_form_has_more_ports() {
        let hv = hypervisor(500);
        let a = Guest::new(&hv, 0);
        let (mut last, mut count) = (ipi(&hv, &a), 1);
        while let Ok(op) = call(&hv, &a, EvtchnOp::BindIpi, EvtchnBindIpi::default()) {
            (last, count) = (op.port, count + 1);
        }
        assert_eq!((last, count), (Port::new(4095), 4095));
        let (block, _) = fifo(&hv, &a);
        for expected in 4096..9000 {
            assert_eq!(ipi(&hv, &a), Port::new(expected));
        }
        for _ in 1..128 {
            call(&hv, &a, EvtchnOp::ExpandArray, array(page(&hv, &a))).unwrap();
        }
        assert_eq!(call(&hv, &a, EvtchnOp::ExpandArray, array(page(&hv, &a))), Err(Errno::ENOSPC));
        call(&hv, &a, EvtchnOp::Send, EvtchnSend { port: Port::new(8999) }).unwrap();
        assert_eq!(half(&hv, block, 16 + 2 + 7), 8999);
        call(&hv, &a, EvtchnOp::Reset, EvtchnReset { dom: DomId::SELF }).unwrap();
        assert_eq!(ipi(&hv, &a), Port::new(1));
        assert_eq!(status_of(&hv, &a, Port::new(8999)).status, EVTCHNSTAT_CLOSED);
        a.domain.events.lock().set_highest(9);
        for expected in 2..10 {
            assert_eq!(ipi(&hv, &a), Port::new(expected));
        }
        assert_eq!(call(&hv, &a, EvtchnOp::BindIpi, EvtchnBindIpi::default()), Err(Errno::ENOSPC));
    }

    #[test]
    fn fifo_errors_are_those_of_xen() {
        let hv = hypervisor(128);
        let (a, b) = (Guest::new(&hv, 0), Guest::new(&hv, 4));
        let own = page(&hv, &a);
        assert_eq!(call(&hv, &a, EvtchnOp::ExpandArray, array(own)), Err(Errno::EOPNOTSUPP));
        let free = hv.mm.free_frames();
        for (op, errno) in [
            (EvtchnInitControl { vcpu: 1, ..control(own, 0) }, Errno::ENOENT),
            (EvtchnInitControl { vcpu: u32::MAX, ..control(own, 0) }, Errno::ENOENT),
            (control(own, 4), Errno::EINVAL),
            (control(own, 4032), Errno::EINVAL),
            (control(own, u32::MAX), Errno::EINVAL),
            (control(page(&hv, &b), 0), Errno::EINVAL),
            (control(Mfn::new(1 << 40), 0), Errno::EINVAL),
        ] {
            assert_eq!(call(&hv, &a, EvtchnOp::InitControl, op), Err(errno), "{op:?}");
        }
        assert_eq!(hv.mm.free_frames(), free - 1, "refused: only the page of the other guest is gone");
        assert!(!a.domain.events.lock().is_fifo());
        call(&hv, &a, EvtchnOp::InitControl, control(own, 4024)).unwrap();
        assert_eq!(call(&hv, &a, EvtchnOp::InitControl, control(own, 0)), Err(Errno::EINVAL), "twice");
        for foreign in [page(&hv, &b), Mfn::new(u64::MAX >> 12)] {
            assert_eq!(call(&hv, &a, EvtchnOp::ExpandArray, array(foreign)), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn reset_and_the_end_let_go_of_the_guests_pages() {
        let hv = hypervisor(128);
        let a = Guest::new(&hv, 0);
        for _ in 0..2 {
            let (block, words) = fifo(&hv, &a);
            let port = ipi(&hv, &a);
            call(&hv, &a, EvtchnOp::Send, EvtchnSend { port }).unwrap();
            assert!(!is_idle(&hv, &a, block) && !is_idle(&hv, &a, words));
            call(&hv, &a, EvtchnOp::Reset, EvtchnReset { dom: DomId::SELF }).unwrap();
            for frame in [block, words] {
                hv.platform.zero_frame(frame);
                assert!(is_idle(&hv, &a, frame));
            }
            let port = ipi(&hv, &a);
            call(&hv, &a, EvtchnOp::Send, EvtchnSend { port }).unwrap();
            assert_eq!(half(&hv, words, port.get()), 0, "two levels again");
            call(&hv, &a, EvtchnOp::Close, EvtchnClose { port }).unwrap();
        }
        let (block, words) = fifo(&hv, &a);
        ipi(&hv, &a);
        a.domain.set_life(crate::domain::Life::Dying);
        while hv.tear_down_ports(&a.domain, &mut crate::hypercall::Budget::new(1)) == Progress::Preempted {}
        assert!(is_idle(&hv, &a, block) && is_idle(&hv, &a, words));
        assert_eq!(a.domain.events.lock().frame_count(&hv.platform), 0);
    }
}

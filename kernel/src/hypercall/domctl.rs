//! `domctl`: the control interface, for domains with the verb (`hypercall_abi::control`).

use core::sync::atomic::Ordering;

use hypercall_abi::control::{
    AllocateMessage, Capabilities, Command, ControlOp, CpuInfo, CreateDomain, CreateFlags, DomainInfo,
    DomainState, GetVcpuContext, GrantSeed, HypercallPage, INTERFACE_VERSION, InterruptInfo, IomemPermission,
    IoportPermission, IrqPermission, ListDomains, MessagePermission, PageKind, PageType, PageTypes, Pause,
    Payload, PhysInfo, ReadLog, SetAffinity, SetCap, SetLogLevel, SetMaxPages, SetVcpuContext, SetWeight,
    VcpuInfo, VcpuState, Version,
};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, Mfn, VcpuId};

use super::administration::foreign_domctl;
use super::{Args, Budget, Exit, HcResult, write_hypercall_page};
use crate::access::{RangeSet, Rights, Verbs};
use crate::domain::{Current, Domain, Life, MAX_VCPUS, NewDomain, VcpuRef, block};
use crate::evtchn;
use crate::grant;
use crate::hypervisor::Hypervisor;
use crate::mm::{Kind, Owner};
use crate::page_ref::{TypedRef, Writable};
use crate::platform::{CpuSet, Platform};
use crate::sched::policy::Affinity;
use alloc::sync::Arc;

/// Bytes of the log that one call copies at most.
const LOG_CHUNK: usize = 512;
/// Most frames of one query of types.
const PAGE_TYPES_MAX: u32 = 1024;
/// Largest weight.
const WEIGHT_MAX: u32 = 65535;
/// Largest cap: all of 64 CPUs.
const CAP_MAX: u32 = 6400;

/// `domctl(op)`.
///
/// Errors of all commands: `EFAULT` unreadable, `EPERM` no control verb, `EINVAL` padding that is not zero, `EACCES` another
/// interface version, `ENOSYS` unknown command, `ESRCH` no such domain; more with each command (`hypercall_abi::control`).
/// What is not in this interface's form is answered as Xen answers it, or `EACCES`.
pub fn domctl<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let first: u32 = hv.read_guest(args[0])?;
    if first >> 16 != INTERFACE_VERSION >> 16 {
        return foreign_domctl(hv, current, args[0]);
    }
    let mut op: ControlOp = hv.read_guest(args[0])?;
    if op.pad != [0; 3] {
        return Err(Errno::EINVAL.into());
    }
    let command = op.command();
    // In Xen's order: a caller of another interface is told so, whoever it is.
    if command != Some(Command::Version) && !op.version_matches() {
        return Err(Errno::EACCES.into());
    }
    if let Some(command @ (Command::AllocateMessage | Command::InterruptInfo)) = command {
        return own_interrupt(hv, current, args, &mut op, command);
    }
    hv.require(current, Verbs::CONTROL)?;
    if command == Some(Command::Version) {
        let capabilities = Capabilities::LOG
            | Capabilities::PAGE_TYPES
            | Capabilities::WEIGHTS
            | Capabilities::AFFINITY
            | Capabilities::ACCOUNTING
            | Capabilities::MESSAGES;
        let version = Version {
            interface_version: INTERFACE_VERSION,
            capabilities: capabilities.bits(),
            ..Version::default()
        };
        return answer(hv, args, &mut op, &version);
    }
    match command.ok_or(Errno::ENOSYS)? {
        Command::Version => Ok(0),
        Command::CreateDomain => create(hv, current, args, &mut op),
        Command::PhysInfo => answer(hv, args, &mut op, &phys_info(hv)),
        Command::CpuInfo => cpu_info(hv, args, &mut op),
        Command::ListDomains => list(hv, current, args, &mut op),
        Command::ReadLog => read_log(hv, args, &mut op),
        Command::SetLogLevel => set_log_level(hv, args, &mut op),
        command => {
            let domain =
                hv.domains.get(hv.resolve_domid(current.domain().id, op.domid)).ok_or(Errno::ESRCH)?;
            of_domain(hv, current, args, &mut op, command, &domain)
        }
    }
}

/// Commands about one domain.
fn of_domain<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
    op: &mut ControlOp,
    command: Command,
    domain: &Arc<Domain>,
) -> HcResult {
    match command {
        Command::Destroy => {
            refuse_self(current, domain)?;
            let mut budget = current.state.budget;
            let done = hv.destroy_domain(domain, &mut budget);
            current.state.budget = budget;
            match done {
                Ok(()) if hv.domains.get(domain.id).is_some() => Err(Errno::EAGAIN.into()),
                Ok(()) => Ok(0),
                Err(_) => Err(Exit::Preempted(args)),
            }
        }
        Command::Pause => {
            refuse_self(current, domain)?;
            pause(hv, args, op, domain)
        }
        Command::Unpause => {
            refuse_self(current, domain)?;
            hv.unpause_domain(domain)?;
            Ok(0)
        }
        Command::SetMaxPages => {
            let request: SetMaxPages = decode(op)?;
            domain.pages.lock().set_max_pages(request.max_pages);
            Ok(0)
        }
        Command::HypercallPage => {
            let request: HypercallPage = decode(op)?;
            let frame: TypedRef<'_, Writable> = hv
                .pager()
                .get_typed(request.mfn, domain.id, hv, &mut Budget::unlimited())
                .map_err(|_| Errno::EINVAL)?;
            write_hypercall_page(&hv.platform, frame.mfn());
            Ok(0)
        }
        Command::SetVcpuContext => {
            refuse_self(current, domain)?;
            let request: SetVcpuContext = decode(op)?;
            let vcpu = vcpu(domain, request.vcpu)?;
            if vcpu.running.load(Ordering::Acquire) || domain.life() != Life::Alive {
                return Err(Errno::EBUSY.into());
            }
            let context: VcpuGuestContext = hv.read_guest(request.context.addr())?;
            hv.set_vcpu_context(&vcpu, &context, args, &mut current.state.budget)?;
            Ok(0)
        }
        Command::GetVcpuContext => {
            refuse_self(current, domain)?;
            let request: GetVcpuContext = decode(op)?;
            let context = hv.vcpu_context(&*vcpu(domain, request.vcpu)?)?;
            hv.write_guest(request.context.addr(), &*context)?;
            Ok(0)
        }
        Command::DomainInfo => answer(hv, args, op, &domain_info(hv, domain)),
        Command::VcpuInfo => {
            let mut info: VcpuInfo = decode(op)?;
            let vcpu = vcpu(domain, info.vcpu).map_err(|_| Errno::ENOENT)?;
            let blocked = vcpu.blocked.load(Ordering::Acquire);
            let mut state = VcpuState::empty();
            state.set(VcpuState::ONLINE, blocked & block::DOWN == 0);
            state.set(VcpuState::RUNNING, vcpu.running.load(Ordering::Acquire));
            state.set(VcpuState::BLOCKED, blocked & (block::BLOCKED | block::POLLING) != 0);
            let pauses = vcpu.pauses.load(Ordering::Acquire) | domain.pauses.load(Ordering::Acquire);
            state.set(VcpuState::PAUSED, pauses != 0);
            info.state = state.bits();
            let times = vcpu.runstate.lock().times_at(hv.platform.now_ns());
            [info.cpu_time_ns, info.runnable_ns, info.blocked_ns, info.offline_ns] = times;
            let counts = &vcpu.counts;
            info.hypercalls = counts.hypercalls.get();
            info.faults = counts.faults.get();
            info.events_sent = counts.events_sent.get();
            info.upcalls = counts.upcalls.get();
            info.grant_operations = counts.grant_operations.get();
            info.switches = counts.switches.get();
            info.moves = counts.moves.get();
            info.cpu = vcpu.cpu.load(Ordering::Relaxed);
            answer(hv, args, op, &info)
        }
        Command::PageTypes => page_types(hv, current, op, domain, args),
        Command::GrantSeed => {
            let request: GrantSeed = decode(op)?;
            hv.grant_seed(domain, request.gref, request.mfn, request.peer, request.readonly != 0)?;
            Ok(0)
        }
        Command::SetWeight => {
            let request: SetWeight = decode(op)?;
            if request.weight == 0 || request.weight > WEIGHT_MAX {
                return Err(Errno::EINVAL.into());
            }
            hv.set_weight(domain, request.weight);
            Ok(0)
        }
        Command::SetCap => {
            let request: SetCap = decode(op)?;
            if request.percent > CAP_MAX || request.pad0 != 0 {
                return Err(Errno::EINVAL.into());
            }
            hv.set_cap(domain, request.percent);
            Ok(0)
        }
        Command::SetAffinity => {
            let mut request: SetAffinity = decode(op)?;
            let vcpu = vcpu(domain, request.vcpu)?;
            if request.hard != 0 {
                let affinity = Affinity { hard: CpuSet(request.hard), soft: CpuSet(request.soft) };
                if request.pad0 != 0 || affinity.hard.and(hv.online()).is_empty() {
                    return Err(Errno::EINVAL.into());
                }
                hv.set_affinity(&vcpu, affinity)?;
            }
            let Affinity { hard, soft } = vcpu.sched.affinity();
            (request.hard, request.soft) = (hard.0, soft.0);
            answer(hv, args, op, &request)
        }
        Command::IrqPermission => {
            let r: IrqPermission = decode(op)?;
            permit(current, domain, |rights| &mut rights.irqs, u64::from(r.irq), u64::from(r.irq), r.allow)
        }
        Command::IoportPermission => {
            let r: IoportPermission = decode(op)?;
            permit(
                current,
                domain,
                |rights| &mut rights.ports,
                u64::from(r.first),
                u64::from(r.last),
                r.allow,
            )
        }
        Command::IomemPermission => {
            let r: IomemPermission = decode(op)?;
            permit(current, domain, |rights| &mut rights.iomem, r.first.get(), r.last.get(), r.allow)
        }
        Command::MessagePermission => {
            let request: MessagePermission = decode(op)?;
            if request.pad0 != 0 {
                return Err(Errno::EINVAL.into());
            }
            if request.max > current.domain().rights.lock().messages {
                return Err(Errno::EPERM.into());
            }
            domain.rights.lock().messages = request.max;
            Ok(0)
        }
        Command::Version
        | Command::CreateDomain
        | Command::PhysInfo
        | Command::CpuInfo
        | Command::ListDomains
        | Command::ReadLog
        | Command::SetLogLevel
        | Command::AllocateMessage
        | Command::InterruptInfo => Err(Errno::ENOSYS.into()),
    }
}

/// Writes the payload back: the result of a command with OUT fields.
fn answer<P: Platform, T: Payload>(
    hv: &Hypervisor<P>,
    args: Args,
    op: &mut ControlOp,
    payload: &T,
) -> HcResult {
    op.encode(payload);
    hv.write_guest(args[0], op)?;
    Ok(0)
}

/// Commands about interrupts of the caller's own: its rights to them are all that they take.
fn own_interrupt<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    args: Args,
    op: &mut ControlOp,
    command: Command,
) -> HcResult {
    let domain = current.domain();
    if hv.resolve_domid(domain.id, op.domid) != domain.id {
        return Err(Errno::EINVAL.into());
    }
    if command == Command::AllocateMessage {
        let pirq = hv.allocate_message(domain).map_err(|error| match error {
            evtchn::Error::NotPermitted => Errno::EPERM,
            _ => Errno::ENOSPC,
        })?;
        let (address, data) = hv.irq_info(domain, pirq)?.message.unwrap_or_default();
        let told = answer(hv, args, op, &AllocateMessage { pirq, data, address });
        if told.is_err() {
            hv.release_pirq(domain, pirq);
        }
        return told;
    }
    let InterruptInfo { pirq, .. } = decode(op)?;
    let info = hv.irq_info(domain, pirq)?;
    let (address, data) = info.message.unwrap_or_default();
    let (cpu, seen_on) = (info.cpu.0, info.seen_on.0);
    answer(hv, args, op, &InterruptInfo { pirq, data, address, arrived: info.arrived, cpu, seen_on })
}

fn decode<T: Payload>(op: &ControlOp) -> Result<T, Errno> {
    op.decode().ok_or(Errno::EINVAL)
}

/// A domain cannot pause, destroy or reload itself: it would wait for itself.
fn refuse_self(current: &Current, domain: &Arc<Domain>) -> Result<(), Errno> {
    if Arc::ptr_eq(current.domain(), domain) { Err(Errno::EINVAL) } else { Ok(()) }
}

fn vcpu(domain: &Arc<Domain>, id: u32) -> Result<VcpuRef, Errno> {
    VcpuRef::new(domain, VcpuId::new(id)).ok_or(Errno::EINVAL)
}

fn create<P: Platform>(hv: &Hypervisor<P>, current: &Current, args: Args, op: &mut ControlOp) -> HcResult {
    let mut request: CreateDomain = decode(op)?;
    let flags = CreateFlags::from_bits(request.flags).ok_or(Errno::EINVAL)?;
    if request.pad0 != 0 || request.max_vcpus == 0 || request.max_vcpus > MAX_VCPUS {
        return Err(Errno::EINVAL.into());
    }
    let or_default = |wanted: u32, most: u32| match wanted {
        0 => Ok(most),
        _ if wanted <= most => Ok(wanted),
        _ => Err(Errno::EINVAL),
    };
    let frames = or_default(request.max_grant_frames, grant::MAX_FRAMES)?;
    let mappings = or_default(request.max_maptrack, grant::MAX_MAPPINGS)?;
    let mut rights = Rights::none();
    if flags.contains(CreateFlags::CONTROL) {
        hv.require(current, Verbs::CONTROL)?;
        rights.verbs |= Verbs::CONTROL;
    }
    let id = Some(op.domid).filter(|id| *id != DomId::INVALID);
    let domain = hv.create_domain(NewDomain {
        id,
        handle: request.handle,
        vcpus: request.max_vcpus,
        max_pages: request.max_pages,
        rights,
    })?;
    // It is paused, and has no port and no grant yet.
    if request.max_port != 0 {
        domain.events.lock().set_highest(request.max_port);
    }
    domain.grants.lock().set_limits(frames, mappings);
    request.domid = domain.id;
    request.shared_info = domain.shared_info;
    op.domid = domain.id;
    answer(hv, args, op, &request)
}

/// Pauses a domain and waits until its vCPUs are off their CPUs. While they are not, the call is executed again, so that the caller's
/// own vCPU can be stopped meanwhile: by a domain that pauses the caller's just now, for one.
fn pause<P: Platform>(hv: &Hypervisor<P>, args: Args, op: &mut ControlOp, domain: &Arc<Domain>) -> HcResult {
    let mut request: Pause = decode(op)?;
    match request.waits {
        0 => hv.pause_domain(domain)?,
        // A caller that says so itself waits for a domain that it did not pause: that ends as soon as it finds it running.
        1 => {}
        _ => return Err(Errno::EINVAL.into()),
    }
    if hv.wait_until_off(domain) {
        request.waits = 0;
        return answer(hv, args, op, &request);
    }
    request.waits = 1;
    op.encode(&request);
    if let Err(errno) = hv.write_guest(args[0], op) {
        // It cannot be told how far it is: nothing is done then.
        let _ = hv.unpause_domain(domain);
        return Err(errno.into());
    }
    Err(Exit::Preempted(args))
}

fn cpu_info<P: Platform>(hv: &Hypervisor<P>, args: Args, op: &mut ControlOp) -> HcResult {
    let mut info: CpuInfo = decode(op)?;
    let cpu = hv.cpus.get(info.cpu as usize).ok_or(Errno::ENOENT)?;
    let [busy, _, idle, _] = cpu.runstate.lock().times_at(hv.platform.now_ns());
    (info.busy_ns, info.idle_ns) = (busy, idle);
    info.waiting = cpu.run_queue.lock().len() as u32;
    info.switches = cpu.switches.get();
    info.timer_interrupts = cpu.timer_interrupts.get();
    answer(hv, args, op, &info)
}

fn domain_info<P: Platform>(hv: &Hypervisor<P>, domain: &Domain) -> DomainInfo {
    let now = hv.platform.now_ns();
    let (mut cpu_time_ns, mut runnable_ns) = (0, 0);
    let (mut hypercalls, mut faults, mut upcalls) = (0, 0, 0);
    let (mut online, mut running, mut waiting) = (0, false, true);
    for vcpu in &domain.vcpus {
        let times = vcpu.runstate.lock().times_at(now);
        (cpu_time_ns, runnable_ns) = (cpu_time_ns + times[0], runnable_ns + times[1]);
        hypercalls += vcpu.counts.hypercalls.get();
        faults += vcpu.counts.faults.get();
        upcalls += vcpu.counts.upcalls.get();
        let blocked = vcpu.blocked.load(Ordering::Acquire);
        online += u32::from(blocked & block::DOWN == 0);
        running |= vcpu.running.load(Ordering::Acquire);
        waiting &= blocked != 0;
    }
    let mut state = DomainState::empty();
    state.set(DomainState::DYING, domain.life() == Life::Dying);
    state.set(DomainState::DEAD, domain.life() == Life::Dead);
    state.set(DomainState::SHUTDOWN, domain.is_shut_down.load(Ordering::Acquire));
    state.set(DomainState::PAUSED, domain.pauses.load(Ordering::Acquire) != 0);
    state.set(DomainState::RUNNING, running);
    state.set(DomainState::BLOCKED, waiting);
    state.set(DomainState::CONTROL, domain.rights.lock().verbs.contains(Verbs::CONTROL));
    let (tot_pages, max_pages) = {
        let pages = domain.pages.lock();
        (pages.total(), pages.max_pages())
    };
    let grants = hv.grant_usage(domain);
    let (ports, event_frames) = {
        let events = domain.events.lock();
        (events.active(), events.frame_count(&hv.platform) as u32)
    };
    DomainInfo {
        domid: domain.id,
        state: state.bits(),
        shutdown_reason: domain.shutdown_reason.load(Ordering::Acquire),
        max_vcpus: domain.vcpus.len() as u32,
        online_vcpus: online,
        weight: domain.vcpus.first().map_or(0, |v| v.sched.weight.load(Ordering::Relaxed)),
        tot_pages,
        max_pages,
        cpu_time_ns,
        shared_info: domain.shared_info,
        handle: domain.handle,
        grant_frames: grants.table_frames,
        grant_mappings: grants.mappings,
        ports,
        // shared_info, and what grants and ports grew by.
        hypervisor_pages: 1 + grants.frames + event_frames,
        cap: domain.cap.percent(),
        runnable_ns,
        hypercalls,
        faults,
        upcalls,
        ..DomainInfo::default()
    }
}

/// One domain per step, in the order of numbers; the list goes on where it stopped.
fn list<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args, op: &mut ControlOp) -> HcResult {
    let mut request: ListDomains = decode(op)?;
    let only_ended = match request.only_ended {
        0 => false,
        1 => true,
        _ => return Err(Errno::EINVAL.into()),
    };
    let mut from = request.first;
    let mut count = 0;
    while count < request.max {
        let next = if only_ended { hv.domains.ended_at_or_after(from) } else { hv.domains.at_or_after(from) };
        let Some(domain) = next else { break };
        hv.write_guest_item(request.buffer.addr(), u64::from(count), &domain_info(hv, &domain))?;
        count += 1;
        from = DomId::new(domain.id.get().saturating_add(1));
        if current.state.budget.step().is_err() {
            break;
        }
    }
    request.count = count;
    answer(hv, args, op, &request)
}

fn page_types<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    op: &mut ControlOp,
    domain: &Domain,
    args: Args,
) -> HcResult {
    let mut request: PageTypes = decode(op)?;
    if request.count > PAGE_TYPES_MAX {
        return Err(Errno::E2BIG.into());
    }
    while request.count > 0 {
        let mfn: Mfn = hv.read_guest(request.frames.addr())?;
        let word = hv.mm.type_word(mfn).filter(|_| hv.mm.owner(mfn) == Owner::Domain(domain.id));
        let answer = match word {
            None => PageType::new(PageKind::Foreign, false),
            Some(word) => {
                let kind = match word.kind() {
                    Kind::L1 => PageKind::L1,
                    Kind::L2 => PageKind::L2,
                    Kind::L3 => PageKind::L3,
                    Kind::L4 => PageKind::L4,
                    Kind::SegDesc => PageKind::Descriptors,
                    _ => PageKind::Plain,
                };
                PageType::new(if word.count() == 0 { PageKind::Plain } else { kind }, word.is_pinned())
            }
        };
        hv.write_guest(request.frames.addr(), &answer.bits())?;
        request.count -= 1;
        request.frames = hypercall_abi::GuestHandle::new(request.frames.addr().wrapping_add(8));
        if request.count.is_multiple_of(16) && request.count > 0 && current.state.budget.step().is_err() {
            // What is done is done: the rest is another call's, told by the payload.
            op.encode(&request);
            hv.write_guest(args[0], op)?;
            return Err(Exit::Preempted(args));
        }
    }
    Ok(0)
}

fn phys_info<P: Platform>(hv: &Hypervisor<P>) -> PhysInfo {
    let (heap_used, heap_size) = hv.platform.heap_usage();
    let free = hv.mm.free_frames() as u64;
    let (mut longest_ticks, mut longest_what) = (0, 0);
    for cpu in &hv.cpus {
        let ticks = cpu.longest_ticks.swap(0, Ordering::Relaxed);
        if ticks > longest_ticks {
            longest_ticks = ticks;
            longest_what = cpu.longest_what.load(Ordering::Relaxed);
        }
    }
    PhysInfo {
        total_pages: hv.platform.ram_frames(),
        free_pages: free,
        scrub_pending_pages: hv.mm.quarantined() as u64,
        hypervisor_pages: hv.platform.own_frames(),
        heap_used,
        heap_size,
        uptime_ns: hv.platform.now_ns(),
        cpus: hv.platform.cpu_count(),
        cpu_khz: hv.platform.tsc_khz(),
        domains: hv.domains.len() as u32,
        longest_what,
        longest_ticks,
        dropped_interrupts: hv.irqs.dropped(),
    }
}

fn read_log<P: Platform>(hv: &Hypervisor<P>, args: Args, op: &mut ControlOp) -> HcResult {
    let mut request: ReadLog = decode(op)?;
    let mut chunk = [0; LOG_CHUNK];
    let room = (request.len as usize).min(LOG_CHUNK);
    let (from, copied) = crate::log::read_ring(request.index, chunk.get_mut(..room).ok_or(Errno::EINVAL)?);
    let text = chunk.get(..copied).ok_or(Errno::EINVAL)?;
    hv.platform.copy_to_guest(request.buffer.addr(), text).map_err(|_| Errno::EFAULT)?;
    request.skipped = from.saturating_sub(request.index);
    request.index = from + copied as u64;
    request.copied = copied as u32;
    answer(hv, args, op, &request)
}

fn set_log_level<P: Platform>(hv: &Hypervisor<P>, args: Args, op: &mut ControlOp) -> HcResult {
    use log::LevelFilter as L;
    let mut request: SetLogLevel = decode(op)?;
    let levels = [L::Off, L::Error, L::Warn, L::Info, L::Debug, L::Trace];
    let level = *levels.get(request.level as usize).ok_or(Errno::EINVAL)?;
    request.level = log::max_level() as u32;
    log::set_max_level(level);
    answer(hv, args, op, &request)
}

/// Gives a right to a domain, or takes it away. A domain can only give what it has: `EPERM`; `ENOSPC` too many ranges.
fn permit(
    current: &Current,
    domain: &Domain,
    set: impl Fn(&mut Rights) -> &mut RangeSet,
    first: u64,
    last: u64,
    allow: u32,
) -> HcResult {
    if first > last {
        return Err(Errno::EINVAL.into());
    }
    if !set(&mut current.domain().rights.lock()).contains(first, last) {
        return Err(Errno::EPERM.into());
    }
    let mut rights = domain.rights.lock();
    let done =
        if allow != 0 { set(&mut rights).insert(first, last) } else { set(&mut rights).remove(first, last) };
    if done { Ok(0) } else { Err(Errno::ENOSPC.into()) }
}

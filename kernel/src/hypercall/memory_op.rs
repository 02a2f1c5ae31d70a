//! `memory_op`: reservations, exchanges, memory maps (public/memory.h).

use hypercall_abi::memory::{
    AccessOpArgument, AddToPhysmap, AddToPhysmapBatch, E820_MAX, E820Entry, ForeignMemoryMap, MEMOP_CMD_MASK,
    MEMOP_EXTENT_SHIFT, MachphysMapping, MachphysMfnList, MemoryDomain, MemoryExchange, MemoryMap,
    MemoryReservation, PodTarget, RemoveFromPhysmap, ReservedDeviceMemoryMap, VnumaTopologyInfo,
    XENMAPSPACE_GMFN_FOREIGN, XENMAPSPACE_GMFN_RANGE, XENMEM_RDM_ALL, XENMEMF_ADDRESS_BITS_MASK,
    XENMEMF_EXACT_NODE_REQUEST, XENMEMF_POPULATE_ON_DEMAND,
};
use hypercall_abi::shared_info::SharedInfo;
use hypercall_abi::subops::MemoryOp;
use hypercall_abi::{DomId, Errno, Mfn};

use alloc::sync::Arc;

use super::guest_memory::{is_guest_list, is_guest_part};
use super::memory_resource::acquire_resource;
use super::{Args, Budget, Exit, HcResult};
use crate::access::Verbs;
use crate::domain::{Current, Domain, DomainMemoryMap};
use crate::hypervisor::Hypervisor;
use crate::mm::m2p::INVALID;
use crate::mm::{MAX_ORDER, TlbDebt};
use crate::platform::Platform;

/// Largest extent of a domain without the control right: 2 MiB, as on Xen.
const MAX_GUEST_ORDER: u32 = 9;
/// Extents that a continuation can count.
const MAX_EXTENTS: u64 = u32::MAX as u64 >> MEMOP_EXTENT_SHIFT;
/// Where guests read the machine-to-physical table: L4 slot 256, as far as 32-bit frame numbers go in Xen's layout.
const M2P_START: u64 = 0xffff_8000_0000_0000;
const M2P_END: u64 = 0xffff_8040_0000_0000;
/// Frames of the table that one entry of its list stands for: 2 MiB.
const M2P_EXTENT_FRAMES: u64 = 512;

/// `memory_op(cmd, arg)`.
///
/// The reservation commands return how many extents were done, whatever stopped them, as on Xen: errors show as a number too
/// small. Others: `EFAULT` the argument, `ESRCH` no such domain, `EPERM` no right over it; see each.
pub fn memory_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let mut budget = current.state.budget;
    let result = run(hv, current, args, &mut budget);
    current.state.budget = budget;
    result
}

fn run<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args, budget: &mut Budget) -> HcResult {
    let [command, arg, ..] = args;
    let start = command >> MEMOP_EXTENT_SHIFT;
    let op = MemoryOp::accept(command & MEMOP_CMD_MASK)?;
    match op {
        MemoryOp::IncreaseReservation | MemoryOp::DecreaseReservation | MemoryOp::PopulatePhysmap => {
            let (done, preempted) = reservation(hv, current, op, arg, start, budget);
            if preempted {
                let mut again = args;
                again[0] = u64::from(op.number()) | done << MEMOP_EXTENT_SHIFT;
                return Err(Exit::Preempted(again));
            }
            return Ok(done);
        }
        // A guest's own number may follow the command, and has to be one that its structure could hold.
        MemoryOp::AddToPhysmap | MemoryOp::AddToPhysmapBatch if start > u16::MAX.into() => {
            return Err(Errno::EDOM.into());
        }
        MemoryOp::AddToPhysmap
        | MemoryOp::AddToPhysmapBatch
        | MemoryOp::AccessOp
        | MemoryOp::AcquireResource => {}
        MemoryOp::Exchange
        | MemoryOp::MaximumRamPage
        | MemoryOp::CurrentReservation
        | MemoryOp::MaximumReservation
        | MemoryOp::MaximumGpfn
        | MemoryOp::RemoveFromPhysmap
        | MemoryOp::ClaimPages
        | MemoryOp::GetVnumainfo
        | MemoryOp::ReservedDeviceMemoryMap
            if start != 0 =>
        {
            return Err(Errno::EINVAL.into());
        }
        _ if start != 0 => return Err(Errno::ENOSYS.into()),
        _ => {}
    }
    match op {
        MemoryOp::Exchange => exchange(hv, current, args, budget),
        MemoryOp::MaximumRamPage => Ok(hv.mm.max_frame()),
        MemoryOp::CurrentReservation | MemoryOp::MaximumReservation | MemoryOp::MaximumGpfn => {
            let request: MemoryDomain = hv.read_guest(arg)?;
            let domain = target(hv, current, request.domid)?;
            let pages = domain.pages.lock();
            match op {
                MemoryOp::CurrentReservation => Ok(pages.total()),
                // 32 bits, as in Xen: no limit must not look like an error.
                MemoryOp::MaximumReservation => Ok(pages.max_pages().min(u32::MAX.into())),
                // A PV guest says itself how many frame numbers it uses.
                _ => {
                    const WORD: usize = core::mem::offset_of!(SharedInfo, arch.max_pfn) / 8;
                    let word = hv.platform.frame(domain.shared_info).get(WORD);
                    let max_pfn = word.map_or(0, |w| w.load(core::sync::atomic::Ordering::Relaxed));
                    Ok(max_pfn.max(1) - 1)
                }
            }
        }
        MemoryOp::MachphysMapping => {
            // As on Xen: guests learn how far the window reaches, whoever has rights over the machine how much is RAM.
            let privileged = current.domain().rights.lock().verbs.contains(Verbs::PLATFORM);
            let frames = if privileged { hv.mm.max_frame() } else { (M2P_END - M2P_START) / 8 };
            let mapping =
                MachphysMapping { v_start: M2P_START, v_end: M2P_END, max_mfn: frames.saturating_sub(1) };
            hv.write_guest(arg, &mapping)?;
            Ok(0)
        }
        MemoryOp::MemoryMap => {
            let request: MemoryMap = hv.read_guest(arg)?;
            let set = current.domain().memory_map.lock().clone();
            if !set.is_empty() {
                return store_map(hv, arg, request, set.into_iter());
            }
            // As on Xen, who manages the machine has no map of its own; others have RAM from 0 as far as they may have frames.
            if current.domain().rights.lock().verbs.contains(Verbs::PLATFORM) {
                return Err(Errno::ENOSYS.into());
            }
            let pages = current.domain().pages.lock().max_pages();
            let ram = E820Entry { addr: 0, size: pages << 12, kind: hypercall_abi::memory::E820_RAM };
            store_map(hv, arg, request, core::iter::once(ram))
        }
        MemoryOp::MachineMemoryMap => {
            if !current.domain().rights.lock().verbs.contains(Verbs::PLATFORM) {
                return Err(Errno::EPERM.into());
            }
            let request: MemoryMap = hv.read_guest(arg)?;
            let map = hv.mm.machine_map();
            if request.buffer.is_null() {
                // Asked for its length only.
                let length = MemoryMap { nr_entries: map.len() as u32, ..request };
                hv.write_guest(arg, &length)?;
                return Ok(0);
            }
            if (request.nr_entries as usize) < map.len() {
                return Err(Errno::EINVAL.into());
            }
            store_map(hv, arg, request, map.iter().copied())
        }
        MemoryOp::MachphysMfnList => {
            let mut request: MachphysMfnList = hv.read_guest(arg)?;
            let first = hv.mm.m2p_frame().ok_or(Errno::EOPNOTSUPP)?;
            let extents = (hv.mm.max_frame() * 8).div_ceil(M2P_EXTENT_FRAMES << 12) as u32;
            request.nr_extents = extents.min(request.max_extents);
            for n in 0..u64::from(request.nr_extents) {
                let mfn = Mfn::new(first.get() + n * M2P_EXTENT_FRAMES);
                hv.write_guest_item(request.extent_start.addr(), n, &mfn)?;
            }
            hv.write_guest(arg, &request)?;
            Ok(0)
        }
        // Physical maps are for translated guests, of which there are none.
        MemoryOp::AddToPhysmap => {
            let request: AddToPhysmap = hv.read_guest(arg)?;
            if request.space == XENMAPSPACE_GMFN_FOREIGN {
                return Err(Errno::ENOSYS.into());
            }
            existing(hv, current, request.domid)?;
            Err(Errno::EACCES.into())
        }
        MemoryOp::AddToPhysmapBatch => {
            let request: AddToPhysmapBatch = hv.read_guest(arg)?;
            if u32::from(request.space) == XENMAPSPACE_GMFN_RANGE {
                return Err(Errno::EOPNOTSUPP.into());
            }
            existing(hv, current, request.domid)?;
            Err(Errno::EACCES.into())
        }
        MemoryOp::RemoveFromPhysmap => {
            let request: RemoveFromPhysmap = hv.read_guest(arg)?;
            existing(hv, current, request.domid)?;
            Err(Errno::EACCES.into())
        }
        MemoryOp::SetPodTarget | MemoryOp::GetPodTarget => {
            let request: PodTarget = hv.read_guest(arg)?;
            existing(hv, current, request.domid)?;
            Err(Errno::EINVAL.into())
        }
        MemoryOp::AccessOp => {
            let request: AccessOpArgument = hv.read_guest(arg)?;
            remote(hv, current, request.domid)?;
            Err(Errno::EINVAL.into())
        }
        // No frame is shared between domains by content.
        MemoryOp::GetSharingFreedPages | MemoryOp::GetSharingSharedPages => Ok(0),
        MemoryOp::SetMemoryMap => set_memory_map(hv, current, arg),
        MemoryOp::ClaimPages => claim_pages(hv, current, arg),
        MemoryOp::GetVnumainfo => {
            let request: VnumaTopologyInfo = hv.read_guest(arg)?;
            if request.pad != 0 {
                return Err(Errno::EINVAL.into());
            }
            target(hv, current, request.domid)?;
            Err(Errno::EOPNOTSUPP.into())
        }
        MemoryOp::ReservedDeviceMemoryMap => {
            let mut request: ReservedDeviceMemoryMap = hv.read_guest(arg)?;
            if !is_guest_list(request.buffer.addr()) {
                return Err(Errno::EFAULT.into());
            }
            if request.flags & !XENMEM_RDM_ALL != 0 {
                return Err(Errno::EINVAL.into());
            }
            // Without an IOMMU no device has memory that it must find unmoved.
            request.nr_entries = 0;
            hv.write_guest(arg, &request)?;
            Ok(0)
        }
        MemoryOp::AcquireResource => acquire_resource(hv, current, args, start, budget),
        refused => Err(refused.refusal().into()),
    }
}

/// The domain a request names, whoever asks. `ESRCH` there is none.
fn existing<P: Platform>(hv: &Hypervisor<P>, current: &Current, domid: DomId) -> Result<Arc<Domain>, Errno> {
    hv.domains.get(hv.resolve_domid(current.domain().id, domid)).ok_or(Errno::ESRCH)
}

/// A domain other than the caller, by its number. `ESRCH` there is none, `EPERM` it is the caller.
pub(super) fn remote<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    domid: DomId,
) -> Result<Arc<Domain>, Errno> {
    let domain = hv.domains.get(domid).ok_or(Errno::ESRCH)?;
    if domain.id == current.domain().id { Err(Errno::EPERM) } else { Ok(domain) }
}

/// `EFAULT`; `EINVAL` more than [`E820_MAX`] entries; `ESRCH`, `EPERM` the domain; `ENOMEM` more entries than are kept.
fn set_memory_map<P: Platform>(hv: &Hypervisor<P>, current: &Current, arg: u64) -> HcResult {
    let request: ForeignMemoryMap = hv.read_guest(arg)?;
    if request.map.nr_entries as usize > E820_MAX {
        return Err(Errno::EINVAL.into());
    }
    let domain = target(hv, current, request.domid)?;
    let mut map = DomainMemoryMap::new();
    for index in 0..u64::from(request.map.nr_entries) {
        let entry: E820Entry = hv.read_guest_item(request.map.buffer.addr(), index)?;
        map.try_push(entry).map_err(|_| Errno::ENOMEM)?;
    }
    *domain.memory_map.lock() = map;
    Ok(0)
}

/// Claims are not kept: frames are taken when they are given. `EFAULT`; `EINVAL` a list, an order, flags, or no such domain;
/// `EPERM` no right over domains; `ENOSYS` a claim of more than nothing.
fn claim_pages<P: Platform>(hv: &Hypervisor<P>, current: &Current, arg: u64) -> HcResult {
    let request: MemoryReservation = hv.read_guest(arg)?;
    if !request.extent_start.is_null() || request.extent_order != 0 || request.mem_flags != 0 {
        return Err(Errno::EINVAL.into());
    }
    hv.domains.get(request.domid).ok_or(Errno::EINVAL)?;
    hv.require(current, Verbs::CONTROL)?;
    if request.nr_extents == 0 { Ok(0) } else { Err(Errno::ENOSYS.into()) }
}

/// The domain a request names: the caller, or another over which it has the control right.
fn target<P: Platform>(hv: &Hypervisor<P>, current: &Current, domid: DomId) -> Result<Arc<Domain>, Errno> {
    let caller = current.domain();
    if domid == DomId::SELF || domid == caller.id {
        return Ok(caller.clone());
    }
    let domain = hv.domains.get(domid).ok_or(Errno::ESRCH)?;
    if !caller.rights.lock().verbs.contains(Verbs::CONTROL) {
        return Err(Errno::EPERM);
    }
    Ok(domain)
}

fn max_order(current: &Current) -> u32 {
    if current.domain().rights.lock().verbs.contains(Verbs::CONTROL) { MAX_ORDER } else { MAX_GUEST_ORDER }
}

/// Frame numbers below which the request wants its frames.
fn frame_limit(flags: u32) -> u64 {
    match flags & XENMEMF_ADDRESS_BITS_MASK {
        bits @ 1..=63 => 1u64 << bits.saturating_sub(12),
        _ => u64::MAX,
    }
}

fn store_map<P: Platform>(
    hv: &Hypervisor<P>,
    arg: u64,
    mut request: MemoryMap,
    entries: impl Iterator<Item = E820Entry>,
) -> HcResult {
    let mut stored = 0;
    for entry in entries.take(request.nr_entries as usize) {
        hv.write_guest_item(request.buffer.addr(), u64::from(stored), &entry)?;
        stored += 1;
    }
    request.nr_entries = stored;
    hv.write_guest(arg, &request)?;
    Ok(0)
}

// ── increase, decrease, populate ──

/// Returns how many extents are done, and whether the budget stopped it there.
fn reservation<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    op: MemoryOp,
    arg: u64,
    start: u64,
    budget: &mut Budget,
) -> (u64, bool) {
    let Ok(request) = hv.read_guest::<MemoryReservation>(arg) else { return (start, false) };
    if request.nr_extents > MAX_EXTENTS || start >= request.nr_extents {
        return (start, false);
    }
    let Ok(domain) = target(hv, current, request.domid) else { return (start, false) };
    let privileged = current.domain().rights.lock().verbs.contains(Verbs::CONTROL);
    if request.extent_order > max_order(current)
        || request.mem_flags & XENMEMF_EXACT_NODE_REQUEST != 0 && !privileged
        || request.mem_flags & XENMEMF_POPULATE_ON_DEMAND != 0
        || request.extent_start.is_null() && op != MemoryOp::IncreaseReservation
        || !is_guest_part::<u64>(request.extent_start.addr(), start, request.nr_extents - 1)
    {
        return (start, false);
    }
    let mut done = start;
    loop {
        let extent = match op {
            MemoryOp::IncreaseReservation => increase(hv, &domain, &request, done, budget),
            MemoryOp::PopulatePhysmap => populate(hv, &domain, &request, done, budget),
            _ => decrease(hv, &domain, &request, done, budget),
        };
        let spent = match extent {
            Ok(spent) => spent,
            Err(_) => return (done, false),
        };
        done += 1;
        if done == request.nr_extents {
            return (done, false);
        }
        if spent || hv.platform.interrupt_pending() {
            return (done, true);
        }
    }
}

/// Pays for the frames of an extent; whether that was the last of the budget.
fn pay(budget: &mut Budget, order: u32) -> bool {
    (0..1u32 << order).fold(false, |spent, _| budget.step().is_err() || spent)
}

fn increase<P: Platform>(
    hv: &Hypervisor<P>,
    domain: &Domain,
    request: &MemoryReservation,
    index: u64,
    budget: &mut Budget,
) -> Result<bool, Errno> {
    let order = request.extent_order;
    let first = hv.give_frames(domain, order, frame_limit(request.mem_flags)).map_err(|_| Errno::ENOMEM)?;
    if !request.extent_start.is_null() {
        hv.write_guest_item(request.extent_start.addr(), index, &first.get())?;
    }
    Ok(pay(budget, order))
}

fn populate<P: Platform>(
    hv: &Hypervisor<P>,
    domain: &Domain,
    request: &MemoryReservation,
    index: u64,
    budget: &mut Budget,
) -> Result<bool, Errno> {
    let order = request.extent_order;
    let pfn: u64 = hv.read_guest_item(request.extent_start.addr(), index)?;
    let first = hv.give_frames(domain, order, frame_limit(request.mem_flags)).map_err(|_| Errno::ENOMEM)?;
    enter_m2p(hv, first, order, pfn);
    hv.write_guest_item(request.extent_start.addr(), index, &first.get())?;
    Ok(pay(budget, order))
}

fn enter_m2p<P: Platform>(hv: &Hypervisor<P>, first: Mfn, order: u32, pfn: u64) {
    for n in 0..1 << order {
        hv.mm.m2p().set(Mfn::new(first.get() + n), pfn.wrapping_add(n));
    }
}

fn decrease<P: Platform>(
    hv: &Hypervisor<P>,
    domain: &Domain,
    request: &MemoryReservation,
    index: u64,
    budget: &mut Budget,
) -> Result<bool, Errno> {
    let first: u64 = hv.read_guest_item(request.extent_start.addr(), index)?;
    for n in 0..1 << request.extent_order {
        let mfn = Mfn::new(first.checked_add(n).ok_or(Errno::EINVAL)?);
        let page = hv.mm.get_page(mfn, domain.id).ok_or(Errno::ENXIO)?;
        // The owner has no number for it any more, mapped or not.
        hv.mm.m2p().set(mfn, INVALID);
        hv.mm.release(&page);
    }
    // What became free is the domain's allowance again at once.
    hv.drain_quarantine();
    Ok(pay(budget, request.extent_order))
}

// ── exchange ──

/// Most frames of one chunk: the larger extent of the two sides.
const MAX_CHUNK: usize = 1 << MAX_ORDER;
/// Frame numbers of a chunk.
type Chunk = arrayvec::ArrayVec<u32, MAX_CHUNK>;

fn exchange<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
    budget: &mut Budget,
) -> HcResult {
    let arg = args[1];
    let mut request: MemoryExchange = hv.read_guest(arg)?;
    let before = request.nr_exchanged;
    let result = exchange_chunks(hv, current, &mut request, budget);
    if result == Ok(false) && request.nr_exchanged == before {
        // Nothing was left to do, nor is there anything to tell.
        return Ok(0);
    }
    let stored = hv.write_guest(
        arg.wrapping_add(core::mem::offset_of!(MemoryExchange, nr_exchanged) as u64),
        &request.nr_exchanged,
    );
    match result {
        Ok(true) => {
            stored?;
            Err(Exit::Preempted(args))
        }
        Ok(false) => {
            stored?;
            Ok(0)
        }
        Err(errno) => Err(if stored.is_err() { Errno::EFAULT } else { errno }.into()),
    }
}

/// Returns whether the budget stopped it. `nr_exchanged` says how far it came in any case.
fn exchange_chunks<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    request: &mut MemoryExchange,
    budget: &mut Budget,
) -> Result<bool, Errno> {
    let (input, output) = (request.input, request.output);
    if input.extent_order.max(output.extent_order) > max_order(current) {
        return Err(Errno::EPERM);
    }
    let frames = |r: &MemoryReservation| {
        (u64::MAX >> r.extent_order >= r.nr_extents).then(|| r.nr_extents << r.extent_order)
    };
    if request.nr_exchanged > input.nr_extents
        || input.domid != output.domid
        || frames(&input).is_none()
        || frames(&input) != frames(&output)
    {
        return Err(Errno::EINVAL);
    }
    if request.nr_exchanged == input.nr_extents {
        return Ok(false);
    }
    let last = |r: &MemoryReservation| r.nr_extents.wrapping_sub(1);
    let next_out = request.nr_exchanged << input.extent_order.saturating_sub(output.extent_order)
        >> output.extent_order.saturating_sub(input.extent_order);
    // Before anything is taken: a list that cannot be the guest's would lose frames.
    if !is_guest_part::<u64>(input.extent_start.addr(), request.nr_exchanged, last(&input))
        || !is_guest_part::<u64>(output.extent_start.addr(), next_out, last(&output))
    {
        return Err(Errno::EFAULT);
    }
    let domain = target(hv, current, input.domid)?;
    // A chunk is one extent of the larger side.
    let in_per_chunk = 1u64 << output.extent_order.saturating_sub(input.extent_order);
    let out_per_chunk = 1u64 << input.extent_order.saturating_sub(output.extent_order);
    while request.nr_exchanged < input.nr_extents {
        let first_in = request.nr_exchanged;
        let first_out = first_in / in_per_chunk * out_per_chunk;
        if first_in + in_per_chunk > input.nr_extents {
            return Err(Errno::EINVAL);
        }
        exchange_one(hv, &domain, &input, &output, first_in, in_per_chunk, first_out, out_per_chunk)?;
        request.nr_exchanged += in_per_chunk;
        let spent = pay(budget, input.extent_order.max(output.extent_order));
        if request.nr_exchanged < input.nr_extents && (spent || hv.platform.interrupt_pending()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Exchanges one chunk, or changes nothing.
#[expect(clippy::too_many_arguments, reason = "one internal function with one caller")]
fn exchange_one<P: Platform>(
    hv: &Hypervisor<P>,
    domain: &Domain,
    input: &MemoryReservation,
    output: &MemoryReservation,
    first_in: u64,
    ins: u64,
    first_out: u64,
    outs: u64,
) -> Result<(), Errno> {
    // Take new frames first: nothing is to be undone for the guest if there are none.
    let limit = frame_limit(output.mem_flags);
    let mut fresh = Chunk::new();
    let give_back = |fresh: &[u32]| {
        fresh.iter().for_each(|m| hv.mm.give_back(Mfn::new(u64::from(*m)), output.extent_order))
    };
    for _ in 0..outs {
        let taken = hv.allocate_frames(output.extent_order, limit);
        if taken.is_none_or(|mfn| fresh.try_push(mfn.get() as u32).is_err()) {
            give_back(&fresh);
            return Err(Errno::ENOMEM);
        }
    }
    let mut debt = TlbDebt::NONE;
    let stolen = steal_chunk(hv, domain, input, first_in, ins, &mut debt);
    // No translation to the old frames may be left when they are free.
    hv.pager().pay(debt);
    let stolen = match stolen {
        Ok(stolen) => stolen,
        Err(errno) => {
            give_back(&fresh);
            return Err(errno);
        }
    };
    for mfn in stolen.iter().map(|m| Mfn::new(u64::from(*m))) {
        hv.mm.m2p().set(mfn, INVALID);
        hv.mm.give_back(mfn, 0);
    }
    let mut result = Ok(());
    for (n, first) in (first_out..).zip(fresh.iter().map(|m| Mfn::new(u64::from(*m)))) {
        // Charged with the old frames, which were never discharged.
        hv.assign_frames(domain, first, output.extent_order);
        match hv.read_guest_item::<u64>(output.extent_start.addr(), n) {
            Ok(pfn) => enter_m2p(hv, first, output.extent_order, pfn),
            Err(errno) => result = Err(errno),
        }
        if let Err(errno) = hv.write_guest_item(output.extent_start.addr(), n, &first.get()) {
            result = Err(errno);
        }
    }
    result
}

/// Takes the input frames of a chunk away from their owner, all or none: nothing may refer to them.
fn steal_chunk<P: Platform>(
    hv: &Hypervisor<P>,
    domain: &Domain,
    input: &MemoryReservation,
    first_in: u64,
    ins: u64,
    debt: &mut TlbDebt,
) -> Result<Chunk, Errno> {
    let mut stolen = Chunk::new();
    let mut result = Ok(());
    'all: for extent in first_in..first_in + ins {
        let first: u64 = match hv.read_guest_item(input.extent_start.addr(), extent) {
            Ok(first) => first,
            Err(errno) => {
                result = Err(errno);
                break;
            }
        };
        for n in 0..1u64 << input.extent_order {
            let taken = first
                .checked_add(n)
                .and_then(|m| hv.mm.get_page(Mfn::new(m), domain.id))
                .and_then(|page| hv.mm.steal(page, &mut domain.pages.lock()));
            let Some((mfn, owed)) = taken else {
                result = Err(Errno::EINVAL);
                break 'all;
            };
            debt.merge(owed);
            // In range: a frame that has a record, and no more of them than a chunk has.
            stolen.push(mfn.get() as u32);
        }
    }
    if let Err(errno) = result {
        let mut pages = domain.pages.lock();
        for mfn in stolen {
            hv.mm.assign(Mfn::new(u64::from(mfn)), domain.id, &mut pages);
        }
        return Err(errno);
    }
    Ok(stolen)
}

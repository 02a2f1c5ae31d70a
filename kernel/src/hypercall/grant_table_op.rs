//! `grant_table_op`: grants (public/grant_table.h).
//!
//! Most commands work on a list, one step for each element, and answer in a status of each: the call itself succeeds. A list
//! that is preempted is called again with what is left of it.

use alloc::sync::Arc;
use core::mem::offset_of;

use arrayvec::ArrayVec;
use hypercall_abi::grant::*;
use hypercall_abi::subops::GnttabOp;
use hypercall_abi::{DomId, Errno, MachAddr};

use super::{Args, Exit, HcResult, Preempted};
use crate::access::Verbs;
use crate::domain::{Current, Domain};
use crate::grant::{
    Copier, Error, FLUSH_SEARCH_UNIT, FlushRefused, Frames, Unmapping, Version, VersionRefused,
};
use crate::hypervisor::Hypervisor;
use crate::mm::TlbDebt;
use crate::platform::Platform;

use super::guest_memory::{is_guest_list, item_address};

/// Unmappings between two TLB flushes, as on Xen.
const UNMAP_BATCH: usize = 32;
/// Bits of the command register for the command.
const CMD_BITS: u32 = 12;
/// Those above it, where a preempted cache_flush says where its search goes on. For others they must be clear.
const CMD_SPARE: u64 = !((1 << CMD_BITS) - 1) & 0xffff_ffff;

/// The `GNTST_*` of an error.
fn status(error: Error) -> i16 {
    match error {
        Error::BadReference => GNTST_BAD_GNTREF,
        Error::BadDomain => GNTST_BAD_DOMAIN,
        Error::BadHandle => GNTST_BAD_HANDLE,
        Error::Refused => GNTST_GENERAL_ERROR,
        Error::BadDeviceAddress => GNTST_BAD_DEV_ADDR,
        Error::NotPermitted => GNTST_PERMISSION_DENIED,
        Error::BadPage => GNTST_BAD_PAGE,
        Error::BadCopy => GNTST_BAD_COPY_ARG,
        Error::NoSpace => GNTST_NO_SPACE,
        Error::InUse => GNTST_EAGAIN,
    }
}

/// For callers that answer with an error number (the control interface).
impl From<Error> for Errno {
    fn from(error: Error) -> Errno {
        match error {
            Error::BadReference
            | Error::BadHandle
            | Error::BadDeviceAddress
            | Error::BadPage
            | Error::BadCopy => Errno::EINVAL,
            Error::BadDomain => Errno::ESRCH,
            Error::Refused => Errno::EINVAL,
            Error::NotPermitted => Errno::EPERM,
            Error::NoSpace => Errno::ENOMEM,
            Error::InUse => Errno::EBUSY,
        }
    }
}

impl From<Error> for Exit {
    fn from(error: Error) -> Exit {
        Exit::Errno(error.into())
    }
}

impl From<VersionRefused> for Errno {
    fn from(refused: VersionRefused) -> Errno {
        match refused {
            VersionRefused::InUse => Errno::EBUSY,
            VersionRefused::CopyUnderWay => Errno::EAGAIN,
            VersionRefused::NotRepresentable => Errno::ERANGE,
            VersionRefused::NoMemory => Errno::ENOMEM,
        }
    }
}

impl From<FlushRefused> for Errno {
    fn from(refused: FlushRefused) -> Errno {
        match refused {
            FlushRefused::Invalid => Errno::EINVAL,
            FlushRefused::NotOwned => Errno::EPERM,
            FlushRefused::Unsupported => Errno::EOPNOTSUPP,
            FlushRefused::NotBegun => Errno::EILSEQ,
        }
    }
}

/// `grant_table_op(cmd, operations, count)`.
///
/// `EINVAL` a count above 2^31 - 1, or not 1 where it must be, or bits above the command; `ENOSYS` unknown command, which
/// `dump_table` is too; `EFAULT` a list in the hypervisor's part, or an element that cannot be read or answered: those before it
/// are done.
pub fn grant_table_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, list, count, ..] = args;
    // As Xen's prototype has it, command and count are 32-bit values.
    let count = count & 0xffff_ffff;
    let command = GnttabOp::accept(cmd & ((1 << CMD_BITS) - 1));
    if count > i32::MAX as u64 || cmd & CMD_SPARE != 0 && command != Ok(GnttabOp::CacheFlush) {
        return Err(Errno::EINVAL.into());
    }
    let command = command?;
    let is_list = matches!(
        command,
        GnttabOp::MapGrantRef
            | GnttabOp::UnmapGrantRef
            | GnttabOp::UnmapAndReplace
            | GnttabOp::Transfer
            | GnttabOp::Copy
            | GnttabOp::SwapGrantRef
            | GnttabOp::CacheFlush
    );
    // Even one of no elements.
    if is_list && !is_guest_list(list) {
        return Err(Errno::EFAULT.into());
    }
    let result = match command {
        GnttabOp::MapGrantRef => for_each::<P, GnttabMapGrantRef>(hv, current, args, map),
        GnttabOp::UnmapGrantRef => unmap_all(hv, current, args, unmap, size_of::<GnttabUnmapGrantRef>()),
        GnttabOp::UnmapAndReplace => {
            unmap_all(hv, current, args, unmap_and_replace, size_of::<GnttabUnmapAndReplace>())
        }
        GnttabOp::SetupTable => setup_table(hv, current, args),
        GnttabOp::Transfer => for_each::<P, GnttabTransfer>(hv, current, args, transfer),
        GnttabOp::Copy => copy_all(hv, current, args),
        GnttabOp::QuerySize => query_size(hv, current, args),
        GnttabOp::SetVersion => set_version(hv, current, args),
        GnttabOp::GetStatusFrames => get_status_frames(hv, current, args),
        GnttabOp::GetVersion => get_version(hv, current, args),
        GnttabOp::SwapGrantRef => for_each::<P, GnttabSwapGrantRef>(hv, current, args, swap),
        GnttabOp::CacheFlush => cache_flush(hv, current, args),
        refused => Err(refused.refusal().into()),
    };
    let left = match &result {
        Ok(_) => 0,
        // What is left is counted when it is done.
        Err(Exit::Preempted([_, _, left, ..])) => *left,
        Err(_) => count,
    };
    current.vcpu.counts.grant_operations.add(count.saturating_sub(left));
    result
}

/// One element of a list: read, done, answered.
type Element<P> = fn(&Hypervisor<P>, &mut Current, u64) -> Result<(), Errno>;

/// Works through a list of `T`, one step for each element.
fn for_each<P: Platform, T>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
    each: Element<P>,
) -> HcResult {
    let [cmd, list, count, ..] = args;
    let count = count & 0xffff_ffff;
    for index in 0..count {
        each(hv, current, item_address::<T>(list, index)?)?;
        if current.state.budget.step() == Err(Preempted) && index + 1 < count {
            return Err(rest(cmd, list, count, index + 1, size_of::<T>()));
        }
    }
    Ok(0)
}

/// To be called again for the list without its first `done` elements of `size` bytes.
fn rest(cmd: u64, list: u64, count: u64, done: u64, size: usize) -> Exit {
    Exit::Preempted([cmd, list.wrapping_add(done * size as u64), count - done, 0, 0, 0])
}

fn map<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, at: u64) -> Result<(), Errno> {
    let mut op: GnttabMapGrantRef = hv.read_guest(at)?;
    let domain = current.domain().clone();
    match hv.grant_map(&domain, &op, current.state.current_root()) {
        Ok((handle, frame)) => {
            op.handle = handle;
            op.dev_bus_addr = MachAddr::new(frame.get() << 12);
            op.status = GNTST_OKAY;
        }
        Err(error) => op.status = status(error),
    }
    hv.write_guest(at, &op)
}

/// As [`for_each`], with what one element claimed kept for the next.
fn copy_all<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, list, count, ..] = args;
    let count = count & 0xffff_ffff;
    let domain = current.domain().clone();
    let mut copier = Copier::new(hv, &domain);
    for index in 0..count {
        let at = item_address::<GnttabCopy>(list, index)?;
        let op: GnttabCopy = hv.read_guest(at)?;
        let result = copier.copy(&op).map_or_else(status, |()| GNTST_OKAY);
        hv.write_guest(at.wrapping_add(offset_of!(GnttabCopy, status) as u64), &result)?;
        if current.state.budget.step() == Err(Preempted) && index + 1 < count {
            return Err(rest(cmd, list, count, index + 1, size_of::<GnttabCopy>()));
        }
    }
    Ok(0)
}

fn transfer<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, at: u64) -> Result<(), Errno> {
    let op: GnttabTransfer = hv.read_guest(at)?;
    let result = hv.grant_transfer(current.domain(), &op).map_or_else(status, |()| GNTST_OKAY);
    hv.write_guest(at.wrapping_add(offset_of!(GnttabTransfer, status) as u64), &result)
}

fn swap<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, at: u64) -> Result<(), Errno> {
    let op: GnttabSwapGrantRef = hv.read_guest(at)?;
    let result = hv.grant_swap(current.domain(), op.ref_a, op.ref_b).map_or_else(status, |()| GNTST_OKAY);
    hv.write_guest(at.wrapping_add(offset_of!(GnttabSwapGrantRef, status) as u64), &result)
}

/// One unmapping of a list at this address: read, done as far as page tables go, answered.
type UnmapElement<P> = fn(&Hypervisor<P>, &Current, u64) -> Result<Option<Unmapping>, Errno>;

/// Unmaps a list in batches: page-table entries first, then one flush for all of them, then the granters' entries. A granter
/// never sees an entry unused that a TLB still translates.
fn unmap_all<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    args: Args,
    each: UnmapElement<P>,
    size: usize,
) -> HcResult {
    let [cmd, list, count, ..] = args;
    let count = count & 0xffff_ffff;
    let mut done = 0;
    while done < count {
        let mut batch: ArrayVec<Unmapping, UNMAP_BATCH> = ArrayVec::new();
        let mut outcome = Ok(());
        let mut spent = false;
        while done < count && !batch.is_full() && !spent {
            let at = done.checked_mul(size as u64).and_then(|o| list.checked_add(o));
            match at.ok_or(Errno::EFAULT).and_then(|at| each(hv, current, at)) {
                Ok(unmapping) => batch.extend(unmapping),
                Err(errno) => {
                    outcome = Err(errno);
                    break;
                }
            }
            done += 1;
            spent = current.state.budget.step() == Err(Preempted);
        }
        // Also when nothing was unmapped: a replacement that failed has taken an entry out of its table.
        hv.mm.settle(TlbDebt::of_tables(current.domain().id, hv.mm.clock()), &hv.platform);
        for unmapping in batch {
            hv.grant_unmap_complete(unmapping);
        }
        outcome?;
        if spent && done < count {
            return Err(rest(cmd, list, count, done, size));
        }
    }
    Ok(0)
}

/// Answers an unmapping. One that cannot be answered is to be completed all the same.
fn answer_unmap<P: Platform>(
    hv: &Hypervisor<P>,
    domain: DomId,
    result: Result<Option<Unmapping>, Error>,
    at: u64,
) -> Result<Option<Unmapping>, Errno> {
    let (unmapping, status) = match result {
        Ok(unmapping) => (unmapping, GNTST_OKAY),
        Err(error) => (None, status(error)),
    };
    match hv.write_guest(at, &status) {
        Ok(()) => Ok(unmapping),
        Err(errno) => {
            if let Some(unmapping) = unmapping {
                hv.mm.settle(TlbDebt::of_tables(domain, hv.mm.clock()), &hv.platform);
                hv.grant_unmap_complete(unmapping);
            }
            Err(errno)
        }
    }
}

fn unmap<P: Platform>(hv: &Hypervisor<P>, current: &Current, at: u64) -> Result<Option<Unmapping>, Errno> {
    let op: GnttabUnmapGrantRef = hv.read_guest(at)?;
    let host = (op.host_addr != 0).then(|| (op.host_addr, current.state.current_root()));
    let device = (op.dev_bus_addr.get() != 0).then(|| op.dev_bus_addr.get());
    let result = hv.grant_unmap(current.domain(), op.handle, host, device, None);
    answer_unmap(
        hv,
        current.domain().id,
        result,
        at.wrapping_add(offset_of!(GnttabUnmapGrantRef, status) as u64),
    )
}

fn unmap_and_replace<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    at: u64,
) -> Result<Option<Unmapping>, Errno> {
    let op: GnttabUnmapAndReplace = hv.read_guest(at)?;
    let host = (op.host_addr != 0).then(|| (op.host_addr, current.state.current_root()));
    let replacement = (op.new_addr != 0).then_some(op.new_addr);
    let result = hv.grant_unmap(current.domain(), op.handle, host, None, replacement);
    answer_unmap(
        hv,
        current.domain().id,
        result,
        at.wrapping_add(offset_of!(GnttabUnmapAndReplace, status) as u64),
    )
}

/// The domain whose table is meant: the caller's own, or with the control right any other.
fn target<P: Platform>(hv: &Hypervisor<P>, current: &Current, id: DomId) -> Result<Arc<Domain>, Error> {
    let caller = current.domain();
    if hv.resolve_domid(caller.id, id) == caller.id {
        return Ok(caller.clone());
    }
    let domain = hv.domains.get(id).ok_or(Error::BadDomain)?;
    if caller.rights.lock().verbs.contains(Verbs::CONTROL) { Ok(domain) } else { Err(Error::NotPermitted) }
}

/// Grows the table and lists its frames. A frame list that cannot be written is `GNTST_bad_virt_addr`; one in the
/// hypervisor's part is `EFAULT`, as on Xen.
fn setup_table<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [_, at, count, ..] = args;
    if count & 0xffff_ffff != 1 {
        return Err(Errno::EINVAL.into());
    }
    let op: GnttabSetupTable = hv.read_guest(at)?;
    if !is_guest_list(op.frame_list.addr()) {
        return Err(Errno::EFAULT.into());
    }
    let result = match target(hv, current, op.dom) {
        Err(error) => status(error),
        Ok(domain) if op.nr_frames > domain.grants.lock().limit(Frames::Shared) => GNTST_GENERAL_ERROR,
        Ok(domain) => match hv.grow_grant_table(&domain, op.nr_frames, &mut current.state.budget) {
            None => GNTST_GENERAL_ERROR,
            // What was added stays: the same call goes on from there.
            Some(Err(Preempted)) => return Err(Exit::Preempted(args)),
            Some(Ok(())) => list_frames(hv, &domain, Frames::Shared, op.nr_frames, op.frame_list.addr()),
        },
    };
    hv.write_guest(at.wrapping_add(offset_of!(GnttabSetupTable, status) as u64), &result)?;
    Ok(0)
}

fn list_frames<P: Platform>(hv: &Hypervisor<P>, domain: &Domain, kind: Frames, count: u32, list: u64) -> i16 {
    let mut result = GNTST_OKAY;
    for index in 0..count {
        let Some(frame) = hv.grant_frame(domain, kind, index) else { return GNTST_GENERAL_ERROR };
        if hv.write_guest_item(list, u64::from(index), &frame).is_err() {
            result = GNTST_BAD_VIRT_ADDR;
        }
    }
    result
}

fn query_size<P: Platform>(hv: &Hypervisor<P>, current: &Current, args: Args) -> HcResult {
    let [_, at, count, ..] = args;
    if count & 0xffff_ffff != 1 {
        return Err(Errno::EINVAL.into());
    }
    let mut op: GnttabQuerySize = hv.read_guest(at)?;
    op.status = match target(hv, current, op.dom) {
        Err(error) => status(error),
        Ok(domain) => {
            // Xen's tables have one frame from the start; here it comes with its first use, and counts as there before.
            let table = domain.grants.lock();
            op.nr_frames = table.frames().max(1);
            op.max_nr_frames = table.limit(Frames::Shared);
            GNTST_OKAY
        }
    };
    hv.write_guest(at, &op)?;
    Ok(0)
}

/// Changes the layout of the caller's table; the answer holds the version in force either way.
///
/// `EINVAL` neither 1 nor 2; `EBUSY` an entry beyond the reserved ones is in use, or a status frame is mapped that would go;
/// `EAGAIN` a copy by a reserved entry is under way; `ERANGE` version 1 cannot express a reserved entry; `ENOMEM`.
fn set_version<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [_, at, ..] = args;
    let op: GnttabSetVersion = hv.read_guest(at)?;
    let domain = current.domain().clone();
    let result = match Version::from_number(op.version) {
        None => Err(Errno::EINVAL),
        Some(to) => match hv.set_grant_version(&domain, to, &mut current.state.budget) {
            Ok(Ok(())) => Ok(()),
            // What was decided stays: the same call goes on from there.
            Ok(Err(Preempted)) => return Err(Exit::Preempted(args)),
            Err(refused) => Err(refused.into()),
        },
    };
    let version = domain.grants.lock().version().number();
    hv.write_guest(at, &GnttabSetVersion { version })?;
    result?;
    Ok(0)
}

/// `ESRCH` no such domain, `EPERM` no right over it.
fn get_version<P: Platform>(hv: &Hypervisor<P>, current: &Current, args: Args) -> HcResult {
    let [_, at, ..] = args;
    let op: GnttabGetVersion = hv.read_guest(at)?;
    let version = target(hv, current, op.dom)?.grants.lock().version().number();
    hv.write_guest(at.wrapping_add(offset_of!(GnttabGetVersion, version) as u64), &version)?;
    Ok(0)
}

/// Lists status frames. In version 1 there are none: a request for some is refused, one for none succeeds.
fn get_status_frames<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [_, at, count, ..] = args;
    if count & 0xffff_ffff != 1 {
        return Err(Errno::EINVAL.into());
    }
    let op: GnttabGetStatusFrames = hv.read_guest(at)?;
    if !is_guest_list(op.frame_list.addr()) {
        return Err(Errno::EFAULT.into());
    }
    let result = match target(hv, current, op.dom) {
        Err(error) => status(error),
        Ok(domain) => {
            let there = domain.grants.lock().status_frames();
            if op.nr_frames > there {
                GNTST_GENERAL_ERROR
            } else {
                list_frames(hv, &domain, Frames::Status, op.nr_frames, op.frame_list.addr())
            }
        }
    };
    hv.write_guest(at.wrapping_add(offset_of!(GnttabGetStatusFrames, status) as u64), &result)?;
    Ok(0)
}

/// Works through a list that has no status: the first error ends it. A search that is preempted goes on where the command's
/// spare bits say.
fn cache_flush<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, list, count, ..] = args;
    let (command, count) = (cmd & ((1 << CMD_BITS) - 1), count & 0xffff_ffff);
    let mut from = ((cmd & CMD_SPARE) >> CMD_BITS) as u32 * FLUSH_SEARCH_UNIT;
    let domain = current.domain().clone();
    for index in 0..count {
        let op: GnttabCacheFlush = hv.read_guest_item(list, index)?;
        let budget = &mut current.state.budget;
        let spent = match hv.grant_cache_flush(&domain, &op, &mut from, budget).map_err(Errno::from)? {
            Err(Preempted) => {
                let again = command | u64::from(from / FLUSH_SEARCH_UNIT) << CMD_BITS;
                return Err(rest(again, list, count, index, size_of::<GnttabCacheFlush>()));
            }
            Ok(()) => budget.step() == Err(Preempted),
        };
        from = 0;
        if spent && index + 1 < count {
            return Err(rest(command, list, count, index + 1, size_of::<GnttabCacheFlush>()));
        }
    }
    Ok(0)
}

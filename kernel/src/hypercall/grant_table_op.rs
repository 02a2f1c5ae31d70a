//! `grant_table_op`: grants, version 1 (public/grant_table.h).
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
use crate::grant::{Error, MAX_FRAMES, Unmapping};
use crate::hypervisor::Hypervisor;
use crate::mm::TlbDebt;
use crate::platform::Platform;

/// Unmappings between two TLB flushes, as on Xen.
const UNMAP_BATCH: usize = 32;
/// Bits of the command register above the command, which must be clear.
const CMD_SPARE: u64 = !0xfff & 0xffff_ffff;

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

/// `grant_table_op(cmd, operations, count)`.
///
/// `ENOSYS` unknown command, or one that is not there yet (transfer, cache_flush); `EINVAL` a count above 2^31 - 1, or not 1 where
/// it must be; `EFAULT` an element that cannot be read or answered: those before it are done.
pub fn grant_table_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, _, count, ..] = args;
    // As Xen's prototype has it, command and count are 32-bit values.
    let count = count & 0xffff_ffff;
    if count > i32::MAX as u64 || cmd & CMD_SPARE != 0 {
        return Err(Errno::EINVAL.into());
    }
    match GnttabOp::accept(cmd & 0xfff)? {
        GnttabOp::MapGrantRef => for_each::<P, GnttabMapGrantRef>(hv, current, args, map),
        GnttabOp::UnmapGrantRef => unmap_all(hv, current, args),
        GnttabOp::SetupTable => setup_table(hv, current, args),
        GnttabOp::Copy => for_each::<P, GnttabCopy>(hv, current, args, copy),
        GnttabOp::QuerySize => query_size(hv, current, args),
        GnttabOp::SetVersion => set_version(hv, args),
        GnttabOp::GetStatusFrames => get_status_frames(hv, current, args),
        GnttabOp::GetVersion => get_version(hv, current, args),
        GnttabOp::SwapGrantRef => for_each::<P, GnttabSwapGrantRef>(hv, current, args, swap),
        GnttabOp::DumpTable | GnttabOp::Transfer | GnttabOp::UnmapAndReplace | GnttabOp::CacheFlush => {
            Err(Errno::ENOSYS.into())
        }
    }
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
        each(hv, current, super::guest_memory::item_address::<T>(list, index)?)?;
        if current.state.budget.step() == Err(Preempted) && index + 1 < count {
            return Err(rest::<T>(cmd, list, count, index + 1));
        }
    }
    Ok(0)
}

/// To be called again for the list without its first `done` elements.
fn rest<T>(cmd: u64, list: u64, count: u64, done: u64) -> Exit {
    Exit::Preempted([cmd, list.wrapping_add(done * size_of::<T>() as u64), count - done, 0, 0, 0])
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

fn copy<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, at: u64) -> Result<(), Errno> {
    let op: GnttabCopy = hv.read_guest(at)?;
    let domain = current.domain().clone();
    let result = hv.grant_copy(&domain, &op).map_or_else(status, |()| GNTST_OKAY);
    hv.write_guest(at.wrapping_add(offset_of!(GnttabCopy, status) as u64), &result)
}

fn swap<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, at: u64) -> Result<(), Errno> {
    let op: GnttabSwapGrantRef = hv.read_guest(at)?;
    let result = hv.grant_swap(current.domain(), op.ref_a, op.ref_b).map_or_else(status, |()| GNTST_OKAY);
    hv.write_guest(at.wrapping_add(offset_of!(GnttabSwapGrantRef, status) as u64), &result)
}

/// Unmaps a list in batches: page-table entries first, then one flush for all of them, then the granters' entries. A granter
/// never sees an entry unused that a TLB still translates.
fn unmap_all<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [cmd, list, count, ..] = args;
    let count = count & 0xffff_ffff;
    let mut done = 0;
    while done < count {
        let mut batch: ArrayVec<Unmapping, UNMAP_BATCH> = ArrayVec::new();
        let mut outcome = Ok(());
        let mut spent = false;
        while done < count && !batch.is_full() && !spent {
            outcome = unmap(hv, current, list, done, &mut batch);
            if outcome.is_err() {
                break;
            }
            done += 1;
            spent = current.state.budget.step() == Err(Preempted);
        }
        if !batch.is_empty() {
            hv.mm.settle(TlbDebt::everywhere(), &hv.platform);
        }
        for unmapping in batch {
            hv.grant_unmap_complete(unmapping);
        }
        outcome?;
        if spent && done < count {
            return Err(rest::<GnttabUnmapGrantRef>(cmd, list, count, done));
        }
    }
    Ok(0)
}

fn unmap<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    list: u64,
    index: u64,
    batch: &mut ArrayVec<Unmapping, UNMAP_BATCH>,
) -> Result<(), Errno> {
    let at = super::guest_memory::item_address::<GnttabUnmapGrantRef>(list, index)?;
    let op: GnttabUnmapGrantRef = hv.read_guest(at)?;
    let host = (op.host_addr != 0).then(|| (op.host_addr, current.state.current_root()));
    let device = (op.dev_bus_addr.get() != 0).then(|| op.dev_bus_addr.get());
    let result = match hv.grant_unmap(current.domain(), op.handle, host, device) {
        Ok(Some(unmapping)) => {
            batch.push(unmapping);
            GNTST_OKAY
        }
        Ok(None) => GNTST_OKAY,
        Err(error) => status(error),
    };
    hv.write_guest(at.wrapping_add(offset_of!(GnttabUnmapGrantRef, status) as u64), &result)
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

/// Grows the table and lists its frames. A frame list that cannot be written is `GNTST_bad_virt_addr`.
fn setup_table<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [_, at, count, ..] = args;
    if count & 0xffff_ffff != 1 {
        return Err(Errno::EINVAL.into());
    }
    let op: GnttabSetupTable = hv.read_guest(at)?;
    let result = match target(hv, current, op.dom) {
        Err(error) => status(error),
        Ok(_) if op.nr_frames > MAX_FRAMES => GNTST_GENERAL_ERROR,
        Ok(domain) => match hv.grow_grant_table(&domain, op.nr_frames, &mut current.state.budget) {
            None => GNTST_GENERAL_ERROR,
            // What was added stays: the same call goes on from there.
            Some(Err(Preempted)) => return Err(Exit::Preempted(args)),
            Some(Ok(())) => list_frames(hv, &domain, &op),
        },
    };
    hv.write_guest(at.wrapping_add(offset_of!(GnttabSetupTable, status) as u64), &result)?;
    Ok(0)
}

fn list_frames<P: Platform>(hv: &Hypervisor<P>, domain: &Domain, op: &GnttabSetupTable) -> i16 {
    let mut result = GNTST_OKAY;
    for index in 0..op.nr_frames {
        let frame = domain.grants.lock().shared_frame(&hv.platform, index);
        let Some(frame) = frame else { return GNTST_GENERAL_ERROR };
        if hv.write_guest_item(op.frame_list.addr(), u64::from(index), &frame).is_err() {
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
            op.nr_frames = domain.grants.lock().frames().max(1);
            op.max_nr_frames = MAX_FRAMES;
            GNTST_OKAY
        }
    };
    hv.write_guest(at, &op)?;
    Ok(0)
}

/// Version 1 is what there is. Version 2 is `ENOSYS`, as on a Xen that was told to offer version 1 only; other numbers are
/// `EINVAL`. The answer holds the version in force either way.
fn set_version<P: Platform>(hv: &Hypervisor<P>, args: Args) -> HcResult {
    let [_, at, ..] = args;
    let op: GnttabSetVersion = hv.read_guest(at)?;
    hv.write_guest(at, &GnttabSetVersion { version: 1 })?;
    match op.version {
        1 => Ok(0),
        2 => Err(Errno::ENOSYS.into()),
        _ => Err(Errno::EINVAL.into()),
    }
}

fn get_version<P: Platform>(hv: &Hypervisor<P>, current: &Current, args: Args) -> HcResult {
    let [_, at, ..] = args;
    let op: GnttabGetVersion = hv.read_guest(at)?;
    target(hv, current, op.dom)?;
    hv.write_guest(at.wrapping_add(offset_of!(GnttabGetVersion, version) as u64), &1u32)?;
    Ok(0)
}

/// There are no status frames in version 1: a request for some is refused, one for none succeeds.
fn get_status_frames<P: Platform>(hv: &Hypervisor<P>, current: &Current, args: Args) -> HcResult {
    let [_, at, count, ..] = args;
    if count & 0xffff_ffff != 1 {
        return Err(Errno::EINVAL.into());
    }
    let op: GnttabGetStatusFrames = hv.read_guest(at)?;
    let result = match target(hv, current, op.dom) {
        Err(error) => status(error),
        Ok(_) if op.nr_frames > 0 => GNTST_GENERAL_ERROR,
        Ok(_) => GNTST_OKAY,
    };
    hv.write_guest(at.wrapping_add(offset_of!(GnttabGetStatusFrames, status) as u64), &result)?;
    Ok(0)
}

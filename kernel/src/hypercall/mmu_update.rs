//! `mmu_update`: a list of page-table entries to write (public/xen.h).

use hypercall_abi::mmu::{MMU_UPDATE_PREEMPTED, MmuCommand, MmuUpdate};
use hypercall_abi::{DomId, Errno, MachAddr};

use super::guest_memory::is_guest_list;
use super::{Args, Budget, Exit, HcResult};
use crate::access::Verbs;
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::mm::update::NotUpdated;
use crate::mm::{Failure, Pte, Stop, Store, TlbDebt, Unfinished};
use crate::platform::Platform;

/// Requests that one step of the budget pays for.
const REQUESTS_PER_STEP: u64 = 8;

/// Bits of a request's pointer that are not the address of an entry.
const COMMAND_MASK: u64 = 7;

/// The errno of a refused page-table operation.
impl From<Failure> for Errno {
    fn from(failure: Failure) -> Errno {
        match failure {
            Failure::Invalid => Errno::EINVAL,
            Failure::Busy => Errno::EBUSY,
            Failure::Permission => Errno::EPERM,
            Failure::Access => Errno::EACCES,
        }
    }
}

/// How one operation of a list ends when it is not done.
pub(super) enum OpStop {
    /// The list ends with this error.
    Errno(Errno),
    /// The operation has to be executed again.
    Preempted,
}

impl<T: Into<Errno>> From<T> for OpStop {
    fn from(errno: T) -> OpStop {
        OpStop::Errno(errno.into())
    }
}

/// See [`OpStop`].
pub(super) fn stopped(stop: Stop) -> OpStop {
    match stop {
        Stop::Failed(failure) => OpStop::Errno(failure.into()),
        Stop::Preempted => OpStop::Preempted,
    }
}

/// The domain whose frames a call is about, when `domid` names it as somebody else's: `DOMID_SELF` is the caller, who may
/// not give its own number (as on Xen); `DOMID_IO` is memory that is not RAM. Whether the caller may use them is
/// [`require_right_over`]'s to say.
///
/// `ESRCH` no such domain.
pub(super) fn frame_owner<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    domid: DomId,
) -> Result<DomId, Errno> {
    let caller = current.domain();
    if domid == DomId::SELF {
        return Ok(caller.id);
    }
    if domid == caller.id || domid != DomId::IO && domid != DomId::XEN && hv.domains.get(domid).is_none() {
        return Err(Errno::ESRCH);
    }
    Ok(domid)
}

/// `EPERM` unless the frames and tables of `owner` are the caller's to use: its own, or anybody's with control verbs.
pub(super) fn require_right_over(current: &Current, owner: DomId) -> Result<(), Errno> {
    let caller = current.domain();
    let may = owner == caller.id || caller.rights.lock().verbs.contains(Verbs::CONTROL);
    if may { Ok(()) } else { Err(Errno::EPERM) }
}

/// Where a list of operations stands, for both hypercalls that take one.
pub(super) struct Progress {
    /// Address of the next operation.
    pub at: u64,
    /// Operations left.
    pub left: u64,
    /// Operations done in this entry.
    pub done: u64,
    done_address: u64,
    done_before: u32,
    domid_arg: u64,
}

/// What the arguments say.
pub(super) enum Start {
    /// Run the list.
    List(Progress),
    /// It was run; only a table's teardown was left to finish, and this is the result.
    Finished(HcResult),
}

impl Progress {
    /// Decodes `(list, count, done, domid)`, finishing first what an earlier call left.
    pub fn start<P: Platform>(
        hv: &Hypervisor<P>,
        current: &mut Current,
        args: Args,
        budget: &mut Budget,
    ) -> Result<Start, Exit> {
        let [list, count, done_address, domid_arg, ..] = args;
        let count = count & 0xffff_ffff;
        if hv.finish_pending(&mut current.state.unfinished, budget).is_err() {
            return Err(Exit::Preempted(args));
        }
        if count == MMU_UPDATE_PREEMPTED && list == 0 {
            // Made by `finish` below; a guest that makes it up gets its own number back.
            let result = i64::from(domid_arg as u32 as i32);
            return Ok(Start::Finished(Ok(result as u64)));
        }
        // Even one of no operations.
        if !is_guest_list(list) {
            return Err(Errno::EFAULT.into());
        }
        let mut done_before = 0;
        if count & MMU_UPDATE_PREEMPTED != 0 && done_address != 0 {
            done_before = hv.read_guest(done_address).unwrap_or(0);
        }
        let left = count & !MMU_UPDATE_PREEMPTED;
        Ok(Start::List(Progress { at: list, left, done: 0, done_address, done_before, domid_arg }))
    }

    /// The next operation, or `None` behind the last.
    pub fn next<P: Platform, T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        hv: &Hypervisor<P>,
    ) -> Result<Option<T>, Errno> {
        if self.left == 0 { Ok(None) } else { hv.read_guest(self.at).map(Some) }
    }

    /// One operation is done.
    pub fn advance<T>(&mut self) -> Result<(), Errno> {
        self.left -= 1;
        self.done += 1;
        self.at = self.at.checked_add(size_of::<T>() as u64).ok_or(Errno::EFAULT)?;
        Ok(())
    }

    /// Tells the guest how far the list came, and makes the result or the continuation.
    pub fn finish<P: Platform>(
        self,
        hv: &Hypervisor<P>,
        current: &mut Current,
        result: Result<(), OpStop>,
        budget: &mut Budget,
    ) -> HcResult {
        if self.done_address != 0 {
            let done = self.done_before.wrapping_add(self.done as u32);
            // As on Xen: a result that cannot be stored is the guest's loss.
            let _ = hv.write_guest(self.done_address, &done);
        }
        let outcome = match result {
            Err(OpStop::Preempted) => {
                let count = self.left | MMU_UPDATE_PREEMPTED;
                return Err(Exit::Preempted([self.at, count, self.done_address, self.domid_arg, 0, 0]));
            }
            Err(OpStop::Errno(errno)) => Err(Exit::Errno(errno)),
            Ok(()) => Ok(0),
        };
        if hv.finish_pending(&mut current.state.unfinished, budget).is_err() {
            let result = match outcome {
                Err(Exit::Errno(errno)) => errno.to_ret() as u32,
                _ => 0,
            };
            return Err(Exit::Preempted([0, MMU_UPDATE_PREEMPTED, 0, u64::from(result), 0, 0]));
        }
        outcome
    }
}

/// `mmu_update(requests, count, done, domid)`.
///
/// The upper half of `domid`, less one, names the domain that owns the page tables (0: the caller), the lower half the one
/// that owns the frames. Requests are carried out in order; the first that fails ends the list with its error, and `done`
/// says how many were. `ESRCH` the domains; of a request, `EPERM` the right over them or over device memory, `EFAULT` the list, `ENOSYS` the command, `EINVAL` no such entry, an
/// entry that may not be, or a frame that is no table and cannot be written, `EBUSY` a mapped frame that is not the owner's or
/// not to be had writable.
pub fn mmu_update<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let mut budget = current.state.budget;
    let result = run(hv, current, args, &mut budget);
    current.state.budget = budget;
    result
}

fn run<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args, budget: &mut Budget) -> HcResult {
    let mut progress = match Progress::start(hv, current, args, budget)? {
        Start::List(progress) => progress,
        Start::Finished(result) => return result,
    };
    let owners = Owners::decode(hv, current, args[3] as u32)?;
    let mut debt = TlbDebt::NONE;
    let result = loop {
        let request: MmuUpdate = match progress.next(hv) {
            Ok(Some(request)) => request,
            Ok(None) => break Ok(()),
            Err(errno) => break Err(errno.into()),
        };
        match one_request(hv, current, &owners, request, &mut debt, budget) {
            Ok(()) => {}
            Err(stop) => break Err(stop),
        }
        if let Err(errno) = progress.advance::<MmuUpdate>() {
            break Err(errno.into());
        }
        // Asking whether somebody waits is not free either: once a step.
        let at_step = progress.done.is_multiple_of(REQUESTS_PER_STEP);
        let spent = at_step && (budget.step().is_err() || hv.platform.interrupt_pending());
        if progress.left > 0 && (spent || current.state.unfinished.is_some()) {
            break Err(OpStop::Preempted);
        }
    };
    hv.pager().pay(debt);
    progress.finish(hv, current, result, budget)
}

/// Whose tables and whose frames.
struct Owners {
    tables: DomId,
    frames: DomId,
}

impl Owners {
    fn decode<P: Platform>(hv: &Hypervisor<P>, current: &Current, foreign: u32) -> Result<Owners, Errno> {
        let caller = current.domain();
        let tables = match (foreign >> 16) as u16 {
            0 => caller.id,
            number => DomId::new(number - 1),
        };
        if tables != caller.id && hv.domains.get(tables).is_none() {
            return Err(Errno::ESRCH);
        }
        let frames = frame_owner(hv, current, DomId::new(foreign as u16))?;
        Ok(Owners { tables, frames })
    }

    /// `EPERM` unless the caller may map these frames. Device memory is judged by the rights to it, entry by entry.
    fn require_frames(&self, current: &Current) -> Result<(), Errno> {
        if self.frames == DomId::IO { Ok(()) } else { require_right_over(current, self.frames) }
    }
}

fn one_request<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    owners: &Owners,
    request: MmuUpdate,
    debt: &mut TlbDebt,
    budget: &mut Budget,
) -> Result<(), OpStop> {
    let store = match MmuCommand::accept(request.ptr)? {
        MmuCommand::NormalPtUpdate | MmuCommand::PtUpdateNoTranslate => Store::Plain,
        MmuCommand::PtUpdatePreserveAd => Store::PreserveAccessedDirty,
        MmuCommand::MachphysUpdate => {
            if owners.tables != current.domain().id {
                return Err(Errno::EPERM.into());
            }
            owners.require_frames(current)?;
            let page =
                hv.mm.get_page(MachAddr::new(request.ptr).frame(), owners.frames).ok_or(Errno::EINVAL)?;
            hv.mm.m2p().set(page.mfn(), request.val);
            return Ok(());
        }
    };
    owners.require_frames(current)?;
    require_right_over(current, owners.tables)?;
    let address = MachAddr::new(request.ptr & !COMMAND_MASK);
    let table = hv.mm.get_page(address.frame(), owners.tables).ok_or(Errno::EINVAL)?;
    let new = Pte::from_bits(request.val);
    match hv.pager().update_entry(&table, address.offset() / 8, new, store, owners.frames, hv, budget) {
        Ok(updated) => {
            debt.merge(updated.debt);
            if let Some(Unfinished(mfn)) = updated.unfinished {
                current.state.unfinished = Some(mfn);
            }
            Ok(())
        }
        Err(NotUpdated::Stop(stop)) => Err(stopped(stop)),
        // Only a compare-and-exchange finds something else.
        Err(NotUpdated::Differs(_)) => Err(Errno::EINVAL.into()),
    }
}

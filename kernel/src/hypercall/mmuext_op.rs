//! `mmuext_op`: pins, roots, flushes, LDT, whole frames (public/xen.h).

use hypercall_abi::mmu::MmuextOp;
use hypercall_abi::subops::MmuextCmd;
use hypercall_abi::{DomId, Errno, Mfn, VirtAddr};

use super::mmu_update::{OpStop, Progress, Start, frame_owner, require_right_over, stopped};
use super::{Args, Budget, HcResult};
use crate::domain::{Current, Life};
use crate::hypervisor::Hypervisor;
use crate::mm::{Level, Unfinished};
use crate::page_ref::Writable;
use crate::platform::{CpuSet, Platform, TlbFlush};

/// Most entries of an LDT.
const LDT_ENTRIES: u32 = 8192;

/// `mmuext_op(operations, count, done, domid)`.
///
/// Operations are carried out in order on frames of `domid`; the first that fails ends the list with its error, and `done` says
/// how many were. `ESRCH`, `EPERM` the domain; `EFAULT` the list; `ENOSYS` the command; `EPERM` roots, flushes and the
/// LDT of others; `EINVAL` a frame that is not the domain's or cannot be what is asked, a table that is pinned or not pinned;
/// `EOPNOTSUPP` superpages; `EACCES`, `EINVAL` cache flushes without a device.
pub fn mmuext_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
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
    let owner = frame_owner(hv, current, DomId::new(args[3] as u16))?;
    require_right_over(current, owner)?;
    let result = loop {
        let op: MmuextOp = match progress.next(hv) {
            Ok(Some(op)) => op,
            Ok(None) => break Ok(()),
            Err(errno) => break Err(errno.into()),
        };
        if let Err(stop) = one_operation(hv, current, owner, &op, budget) {
            break Err(stop);
        }
        if let Err(errno) = progress.advance::<MmuextOp>() {
            break Err(errno.into());
        }
        let spent = budget.step().is_err();
        if progress.left > 0
            && (spent || current.state.unfinished.is_some() || hv.platform.interrupt_pending())
        {
            break Err(OpStop::Preempted);
        }
    };
    progress.finish(hv, current, result, budget)
}

fn one_operation<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    owner: DomId,
    op: &MmuextOp,
    budget: &mut Budget,
) -> Result<(), OpStop> {
    let own = owner == current.domain().id;
    let only_own = if own { Ok(()) } else { Err(Errno::EPERM) };
    let this_cpu = CpuSet::one(hv.platform.this_cpu());
    match MmuextCmd::accept(u64::from(op.cmd))? {
        MmuextCmd::PinL1Table => pin(hv, current, op.mfn(), Level::L1, owner, budget),
        MmuextCmd::PinL2Table => pin(hv, current, op.mfn(), Level::L2, owner, budget),
        MmuextCmd::PinL3Table => pin(hv, current, op.mfn(), Level::L3, owner, budget),
        MmuextCmd::PinL4Table => pin(hv, current, op.mfn(), Level::L4, owner, budget),
        MmuextCmd::UnpinTable => {
            let unfinished = hv.pager().unpin(op.mfn(), owner, budget)?;
            note(current, unfinished);
            Ok(())
        }
        MmuextCmd::NewBaseptr => {
            only_own?;
            hv.drop_ldt(current);
            let root = op.mfn();
            let mut slot = current.state.kernel_root;
            let load = || hv.load_guest_root(root);
            let result = hv.pager().replace_root(&mut slot, Some(root), owner, load, hv, budget);
            current.state.kernel_root = slot;
            note(current, result.map_err(stopped)?);
            Ok(())
        }
        MmuextCmd::NewUserBaseptr => {
            only_own?;
            let new = (op.arg1 != 0).then(|| op.mfn());
            let mut slot = current.state.user_root;
            // Hypercalls come from the guest's kernel: the user's root is not in force.
            let result = hv.pager().replace_root(&mut slot, new, owner, || (), hv, budget);
            current.state.user_root = slot;
            note(current, result.map_err(stopped)?);
            Ok(())
        }
        MmuextCmd::TlbFlushLocal => {
            only_own?;
            flush(hv, current, this_cpu, TlbFlush::All);
            Ok(())
        }
        MmuextCmd::InvlpgLocal => {
            only_own?;
            flush_page(hv, current, this_cpu, op.linear_addr());
            Ok(())
        }
        MmuextCmd::TlbFlushMulti => {
            only_own?;
            let cpus = hv.cpus_of_mask(current, op.vcpumask().addr()).map_err(|_| Errno::EINVAL)?;
            flush(hv, current, cpus, TlbFlush::All);
            Ok(())
        }
        MmuextCmd::InvlpgMulti => {
            only_own?;
            let cpus = hv.cpus_of_mask(current, op.vcpumask().addr()).map_err(|_| Errno::EINVAL)?;
            flush_page(hv, current, cpus, op.linear_addr());
            Ok(())
        }
        MmuextCmd::TlbFlushAll => {
            only_own?;
            flush(hv, current, CpuSet::ALL, TlbFlush::All);
            Ok(())
        }
        MmuextCmd::InvlpgAll => {
            only_own?;
            flush_page(hv, current, CpuSet::ALL, op.linear_addr());
            Ok(())
        }
        MmuextCmd::FlushCache => {
            only_own?;
            flush_cache(hv, current, Errno::EACCES)
        }
        MmuextCmd::FlushCacheGlobal => {
            only_own?;
            flush_cache(hv, current, Errno::EINVAL)
        }
        MmuextCmd::SetLdt => {
            only_own?;
            set_ldt(hv, current, op.linear_addr(), op.nr_ents())
        }
        MmuextCmd::ClearPage => {
            let page = hv.mm.get_page(op.mfn(), owner).ok_or(Errno::EINVAL)?;
            let (page, debt) = page.typed::<Writable>().map_err(|_| Errno::EINVAL)?;
            hv.pager().pay(debt);
            hv.platform.zero_frame(page.mfn());
            Ok(())
        }
        MmuextCmd::CopyPage => {
            let from = hv.mm.get_page(op.src_mfn(), owner).ok_or(Errno::EINVAL)?;
            let to = hv.mm.get_page(op.mfn(), owner).ok_or(Errno::EINVAL)?;
            let (to, debt) = to.typed::<Writable>().map_err(|_| Errno::EINVAL)?;
            hv.pager().pay(debt);
            hv.platform.copy_frame(from.mfn(), to.mfn());
            Ok(())
        }
        refused => Err(refused.refusal().into()),
    }
}

fn note(current: &mut Current, unfinished: Option<Unfinished>) {
    if let Some(Unfinished(mfn)) = unfinished {
        current.state.unfinished = Some(mfn);
    }
}

fn pin<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    mfn: Mfn,
    level: Level,
    owner: DomId,
    budget: &mut Budget,
) -> Result<(), OpStop> {
    hv.pager().pin(mfn, level, owner, hv, budget).map_err(stopped)?;
    // A domain that began to die meanwhile has perhaps seen this frame already, and nobody would take the pin away.
    if owner != current.domain().id && hv.domains.get(owner).is_none_or(|d| d.life() != Life::Alive) {
        // Refused means that its teardown was faster.
        if let Ok(unfinished) = hv.pager().unpin(mfn, owner, budget) {
            note(current, unfinished);
        }
    }
    Ok(())
}

fn flush<P: Platform>(hv: &Hypervisor<P>, current: &Current, cpus: CpuSet, what: TlbFlush) {
    hv.mm.clock().flush_guest(&hv.platform, current.domain().id, cpus, what);
}

fn flush_page<P: Platform>(hv: &Hypervisor<P>, current: &Current, cpus: CpuSet, va: u64) {
    let address = VirtAddr::new(va);
    if address.is_canonical() && !address.is_hypervisor() {
        flush(hv, current, cpus, TlbFlush::Page(va));
    }
}

/// Caches are coherent but for devices that do not snoop: only who has such a device may ask, and waits for it.
fn flush_cache<P: Platform>(hv: &Hypervisor<P>, current: &Current, refused: Errno) -> Result<(), OpStop> {
    use crate::mm::MapRights;
    if !hv.may_choose_caching(current.domain().id) {
        return Err(refused.into());
    }
    hv.platform.flush_caches();
    Ok(())
}

fn set_ldt<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    base: u64,
    entries: u32,
) -> Result<(), OpStop> {
    let address = VirtAddr::new(base);
    let bad_address = base & 0xfff != 0 || !address.is_canonical() || address.is_hypervisor();
    if entries > LDT_ENTRIES || entries != 0 && bad_address {
        return Err(Errno::EINVAL.into());
    }
    let base = if entries == 0 { 0 } else { base };
    if (current.state.ldt.base, current.state.ldt.entries) != (base, entries) {
        hv.drop_ldt(current);
        current.state.ldt.base = base;
        current.state.ldt.entries = entries;
        hv.platform.load_descriptor_tables(&current.state);
    }
    Ok(())
}

impl<P: Platform> Hypervisor<P> {
    /// Makes another root of the domain that runs here the table in force. That is a complete flush: no guest entry is GLOBAL.
    pub fn load_guest_root(&self, root: Mfn) {
        self.mm.clock().flush(self.platform.this_cpu(), || self.platform.load_root(root));
    }

    /// Empties the LDT window of the running vCPU: its pages are faulted in anew, under the tables then in force.
    pub(crate) fn drop_ldt(&self, current: &mut Current) {
        let shown = core::mem::take(&mut current.state.ldt.frames);
        if shown.iter().all(Option::is_none) {
            return;
        }
        // First out of the window, then given back: another processor may take the frame at once.
        self.platform.load_descriptor_tables(&current.state);
        for mfn in shown.into_iter().flatten() {
            self.release_descriptor_frame(mfn);
        }
    }
}

//! `hvm_op`, `dm_op`: calls about hardware-virtualized domains, of which there are none.
//!
//! A few of them answer any caller; the others say of every domain that it is not such a domain, if it exists at all.

use hypercall_abi::hvm::{
    DM_OP_MAX_BUFFERS, DmOpBuffer, GetMemType, HVM_NR_PARAMS, HvmParam, PagetableDying, XENTRACE_MAX_EVENT,
    XENTRACE_MAX_EXTRA, Xentrace,
};
use hypercall_abi::subops::HvmOp;
use hypercall_abi::{DomId, Errno};

use super::{Args, HcResult};
use crate::access::Verbs;
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// `hvm_op(command, argument)`.
///
/// `EFAULT`; `ESRCH` no such domain; `EPERM` no right over it; `EINVAL` it is no hardware-virtualized one; `EOPNOTSUPP`, `ENOSYS`.
pub fn hvm_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, arg, ..] = args;
    match HvmOp::accept(command)? {
        HvmOp::SetParam | HvmOp::GetParam => {
            let request: HvmParam = hv.read_guest(arg)?;
            if request.index >= HVM_NR_PARAMS {
                return Err(Errno::EINVAL.into());
            }
            existing(hv, current, request.domid)?;
            Err(Errno::EINVAL.into())
        }
        HvmOp::PagetableDying => {
            let request: PagetableDying = hv.read_guest(arg)?;
            let target = existing(hv, current, request.domid)?;
            let own = target == current.domain().id;
            Err(if own { Errno::EINVAL } else { Errno::EOPNOTSUPP }.into())
        }
        HvmOp::GetMemType => {
            let request: GetMemType = hv.read_guest(arg)?;
            let target = existing(hv, current, request.domid)?;
            if target != current.domain().id {
                hv.require(current, Verbs::CONTROL)?;
            }
            Err(Errno::EINVAL.into())
        }
        HvmOp::GetTime => {
            hv.write_guest(arg, &hv.platform.now_ns())?;
            Ok(0)
        }
        HvmOp::Xentrace => {
            let request: Xentrace = hv.read_guest(arg)?;
            // Nobody keeps a trace that the record could go to.
            let bad = request.extra_bytes > XENTRACE_MAX_EXTRA || request.event > XENTRACE_MAX_EVENT;
            if bad { Err(Errno::EINVAL.into()) } else { Ok(0) }
        }
        // Nobody monitors; an argument is refused.
        HvmOp::GuestRequestVmEvent if arg == 0 => Ok(0),
        HvmOp::GuestRequestVmEvent => Err(Errno::EINVAL.into()),
        refused => Err(refused.refusal().into()),
    }
}

/// `dm_op(domid, count, buffers)`: `ENODATA` no buffers, `E2BIG` too many, `EFAULT`, `ESRCH` no such domain, `EPERM` the caller
/// itself, `EINVAL` not a hardware-virtualized domain.
pub fn dm_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [domid, count, buffers, ..] = args;
    let count = count as u32;
    if count == 0 {
        return Err(Errno::ENODATA.into());
    }
    if count > DM_OP_MAX_BUFFERS {
        return Err(Errno::E2BIG.into());
    }
    for index in 0..u64::from(count) {
        let _: DmOpBuffer = hv.read_guest_item(buffers, index)?;
    }
    let domid = DomId::new(domid as u16);
    hv.domains.get(domid).ok_or(Errno::ESRCH)?;
    Err(if domid == current.domain().id { Errno::EPERM } else { Errno::EINVAL }.into())
}

/// The domain that is named, if it exists.
fn existing<P: Platform>(hv: &Hypervisor<P>, current: &Current, domid: DomId) -> Result<DomId, Errno> {
    let target = hv.resolve_domid(current.domain().id, domid);
    hv.domains.get(target).map(|domain| domain.id).ok_or(Errno::ESRCH)
}

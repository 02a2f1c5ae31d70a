//! `memory_op(acquire_resource)`: frames of another domain's grant table, which a privileged caller may then map as that
//! domain's.

use core::mem::offset_of;

use hypercall_abi::Errno;
use hypercall_abi::memory::{
    AcquireResource, MEMOP_EXTENT_SHIFT, XENMEM_RESOURCE_GRANT_TABLE, XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED,
    XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS, XENMEM_RESOURCE_IOREQ_SERVER, XENMEM_RESOURCE_VMTRACE_BUF,
};

use super::memory_op::remote;
use super::{Args, Budget, Exit, HcResult};
use crate::access::Verbs;
use crate::domain::Current;
use crate::grant::Frames;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Most frames of one call: what a continuation can count.
const MAX_LIST: u64 = u32::MAX as u64 >> MEMOP_EXTENT_SHIFT;

/// Lists the frames from extent `start` on; the table grows when it has to.
///
/// `EFAULT`; `EINVAL` padding, frames past 2^32 or past the end of the resource, a resource that the domain has none of, status
/// frames of a table of version 1; `ESRCH`, `EPERM` the domain; `EOPNOTSUPP` an unknown resource.
pub(super) fn acquire_resource<P: Platform>(
    hv: &Hypervisor<P>,
    current: &Current,
    args: Args,
    start: u64,
    budget: &mut Budget,
) -> HcResult {
    let arg = args[1];
    let request: AcquireResource = hv.read_guest(arg)?;
    let count = u64::from(request.nr_frames);
    let end = request.frame.checked_add(count).filter(|end| end >> 32 == 0);
    let Some(end) = end.filter(|_| request.pad == 0 && request.frame >> 32 == 0) else {
        return Err(Errno::EINVAL.into());
    };
    let domain = remote(hv, current, request.domid)?;
    hv.require(current, Verbs::CONTROL)?;
    let kind = match (request.kind, request.id) {
        (XENMEM_RESOURCE_GRANT_TABLE, XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED) => Frames::Shared,
        (XENMEM_RESOURCE_GRANT_TABLE, XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS) => Frames::Status,
        (XENMEM_RESOURCE_GRANT_TABLE | XENMEM_RESOURCE_IOREQ_SERVER | XENMEM_RESOURCE_VMTRACE_BUF, _) => {
            return Err(Errno::EINVAL.into());
        }
        _ => return Err(Errno::EOPNOTSUPP.into()),
    };
    let limit = domain.grants.lock().limit(kind);
    if request.frame_list.is_null() {
        if count != 0 || start != 0 {
            return Err(Errno::EINVAL.into());
        }
        hv.write_guest(arg.wrapping_add(offset_of!(AcquireResource, nr_frames) as u64), &limit)?;
        return Ok(0);
    }
    if start >= count || count > MAX_LIST || end > limit.into() {
        return Err(Errno::EINVAL.into());
    }
    match hv.grow_grant_frames(&domain, kind, end as u32, budget) {
        Err(_) => return Err(Errno::EINVAL.into()),
        // What was added stays: the same call goes on from there.
        Ok(Err(_)) => return Err(Exit::Preempted(args)),
        Ok(Ok(())) => {}
    }
    // At most 64: one step's work.
    for index in start..count {
        let frame = hv.grant_frame(&domain, kind, (request.frame + index) as u32);
        hv.write_guest_item(request.frame_list.addr(), index, &frame.ok_or(Errno::EINVAL)?)?;
    }
    Ok(0)
}

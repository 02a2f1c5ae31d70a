//! Calls by which Xen's own tools administer the machine: `platform_op`, `sysctl`, `kexec_op`, `hypfs_op`, `xenoprof_op`, `mca`.
//!
//! Our tools use the control interface (`domctl`, design record 0005), so nobody is served here. But callers are told apart as
//! on Xen: who may not is told so before anything else about the call, in the order in which Xen looks.

use hypercall_abi::platform::{
    MCA_OP_SIZE, PLATFORM_OP_SIZE, XEN_MCA_INTERFACE_VERSION, XENPF_INTERFACE_VERSION,
};
use hypercall_abi::subops::{HypfsOp, KexecOp, McaOp, PlatformOp, XenoprofOp};
use hypercall_abi::xen_header::{
    DOMCTL_CREATEDOMAIN, DOMCTL_GETDOMAININFO, DOMCTL_SHADOW_OP, DOMCTL_SIZE, SYSCTL_SIZE,
    XEN_DOMCTL_INTERFACE_VERSION, XEN_SYSCTL_INTERFACE_VERSION, XENOPROF_INIT_SIZE, XenControlHeader,
};
use hypercall_abi::{DomId, Errno};
use zerocopy::FromBytes;

use super::{Args, HcResult};
use crate::access::Verbs;
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// The head of an argument that Xen copies in whole: all of its `SIZE` bytes must be there.
fn header<P: Platform, const SIZE: usize>(
    hv: &Hypervisor<P>,
    address: u64,
) -> Result<XenControlHeader, Errno> {
    let whole: [u8; SIZE] = hv.read_guest(address)?;
    let (head, _) = XenControlHeader::read_from_prefix(&whole).map_err(|_| Errno::EFAULT)?;
    Ok(head)
}

/// `platform_op(op)`: `EFAULT`, `EACCES` another interface version, `EPERM`, `ENOSYS`.
pub fn platform_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let op = header::<P, PLATFORM_OP_SIZE>(hv, args[0])?;
    if op.interface_version != XENPF_INTERFACE_VERSION {
        return Err(Errno::EACCES.into());
    }
    hv.require(current, Verbs::CONTROL)?;
    Err(PlatformOp::from_number(op.cmd.into()).map_or(Errno::ENOSYS, PlatformOp::refusal).into())
}

/// `sysctl(op)`: `EFAULT`, `EACCES` another interface version, `EPERM`, `ENOSYS`.
pub fn sysctl<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let op = header::<P, SYSCTL_SIZE>(hv, args[0])?;
    if op.interface_version != XEN_SYSCTL_INTERFACE_VERSION {
        return Err(Errno::EACCES.into());
    }
    hv.require(current, Verbs::CONTROL)?;
    Err(Errno::ENOSYS.into())
}

/// `kexec_op(command, argument)`: `EPERM`, `ENOSYS`.
pub fn kexec_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    hv.require(current, Verbs::CONTROL)?;
    Err(KexecOp::from_number(args[0]).map_or(Errno::ENOSYS, KexecOp::refusal).into())
}

/// `hypfs_op(command, …)`: `EPERM`, `ENOSYS`.
pub fn hypfs_op<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    hv.require(current, Verbs::CONTROL)?;
    Err(HypfsOp::from_number(args[0] & 0xffff_ffff).map_or(Errno::ENOSYS, HypfsOp::refusal).into())
}

/// `mca(op)`: `EPERM`, `EFAULT`, `EACCES` another interface version, `EINVAL` an unknown command, `ENOSYS`.
pub fn arch_0<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    hv.require(current, Verbs::CONTROL)?;
    let op = header::<P, MCA_OP_SIZE>(hv, args[0])?;
    if op.interface_version != XEN_MCA_INTERFACE_VERSION {
        return Err(Errno::EACCES.into());
    }
    Err(McaOp::accept(op.cmd.into()).err().unwrap_or(Errno::EINVAL).into())
}

/// `xenoprof_op(command, argument)`: `EINVAL` an unknown command, `EPERM` all that only the leading domain may, which there is
/// none of, `EFAULT`, `ENODEV`: no processor has counters that it could sample by.
pub fn xenoprof_op<P: Platform>(hv: &Hypervisor<P>, _: &mut Current, args: Args) -> HcResult {
    let command = XenoprofOp::from_number(args[0] & 0xffff_ffff).ok_or(Errno::EINVAL)?;
    if command == XenoprofOp::Init {
        let _: [u8; XENOPROF_INIT_SIZE] = hv.read_guest(args[1])?;
        return Err(Errno::ENODEV.into());
    }
    Err(command.refusal().into())
}

/// `domctl` in Xen's form, told by its interface version: `ESRCH` no such domain, `EPERM`; `EACCES` for a caller with the right,
/// whose tools are those of another hypervisor.
///
/// Some of Xen's commands look at their own arguments before they look at the caller; these are not told apart here.
pub(super) fn foreign_domctl<P: Platform>(hv: &Hypervisor<P>, current: &Current, address: u64) -> HcResult {
    let op = header::<P, DOMCTL_SIZE>(hv, address)?;
    if op.interface_version != XEN_DOMCTL_INTERFACE_VERSION {
        return Err(Errno::EACCES.into());
    }
    let exists = hv.domains.get(op.domid).is_some();
    match op.cmd {
        DOMCTL_CREATEDOMAIN => {}
        // It asks for the next domain from this number on.
        DOMCTL_GETDOMAININFO if !exists && op.domid.get() >= DomId::FIRST_RESERVED.get() => {
            return Err(Errno::EINVAL.into());
        }
        DOMCTL_GETDOMAININFO if hv.domains.at_or_after(op.domid).is_some() => {}
        _ if exists => {}
        _ => return Err(Errno::ESRCH.into()),
    }
    hv.require(current, Verbs::CONTROL)?;
    Err(Errno::EACCES.into())
}

/// Number 49, where Xen continues a long `domctl`: `EFAULT`, `EOPNOTSUPP` anything else, `ESRCH`, `EPERM`.
pub fn arch_1<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let op = header::<P, DOMCTL_SIZE>(hv, args[0])?;
    if op.interface_version != XEN_DOMCTL_INTERFACE_VERSION || op.cmd != DOMCTL_SHADOW_OP {
        return Err(Errno::EOPNOTSUPP.into());
    }
    hv.domains.get(op.domid).ok_or(Errno::ESRCH)?;
    hv.require(current, Verbs::CONTROL)?;
    Err(Errno::EOPNOTSUPP.into())
}

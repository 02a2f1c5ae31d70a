//! `xen_version`: what the hypervisor says about itself.

use core::sync::atomic::Ordering;

use hypercall_abi::segment::HYPERVISOR_VIRT_START;
use hypercall_abi::subops::{VersionOp, VmAssist};
use hypercall_abi::version::{
    CAPABILITIES_LEN, CHANGESET_LEN, COMMANDLINE_LEN, CompileInfo, EXTRAVERSION_LEN, FeatureInfo, Features,
    PlatformParameters,
};
use hypercall_abi::{Errno, PAGE_SIZE};

use super::{Args, HcResult};
use crate::access::Verbs;
use crate::domain::{Current, Domain};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::trap::cpuid::INTERFACE_VERSION;

/// Follows the version of the interface: who we really are.
const EXTRAVERSION: &str = ".0-xenolith";
/// What a guest must be to run here.
const CAPABILITIES: &str = "xen-3.0-x86_64 ";
/// What others get instead of the command line.
const DENIED: &[u8; 9] = b"<denied>\0";
const CHANGESET: &str = concat!("xenolith ", env!("CARGO_PKG_VERSION"));

/// Answers the queries of public/version.h.
///
/// `EFAULT`; `EINVAL` for feature words beyond the first, for a page-size query with an argument and for a build identifier of no
/// length; `EPERM` and `ENODATA` for the build identifier, which there is none of; `ENOSYS` for unknown queries.
/// `xen_version(0, 0)` is also how Linux asks for pending events: they are delivered on the way back from any call.
pub fn xen_version<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, arg, ..] = args;
    let privileged = || current.domain().rights.lock().verbs.contains(Verbs::CONTROL);
    match VersionOp::accept(command)? {
        VersionOp::Version => return Ok(u64::from(INTERFACE_VERSION)),
        VersionOp::Extraversion => hv.write_guest(arg, &text::<EXTRAVERSION_LEN>(EXTRAVERSION))?,
        VersionOp::CompileInfo => {
            let info = CompileInfo {
                compiler: text("rustc"),
                compile_by: text(""),
                compile_domain: text(""),
                // Builds are reproducible: they know no date.
                compile_date: text(""),
            };
            hv.write_guest(arg, &info)?;
        }
        VersionOp::Capabilities => hv.write_guest(arg, &text::<CAPABILITIES_LEN>(CAPABILITIES))?,
        VersionOp::Changeset => hv.write_guest(arg, &text::<CHANGESET_LEN>(CHANGESET))?,
        VersionOp::PlatformParameters => {
            hv.write_guest(arg, &PlatformParameters { virt_start: HYPERVISOR_VIRT_START })?;
        }
        VersionOp::GetFeatures => {
            let mut info: FeatureInfo = hv.read_guest(arg)?;
            if info.submap_idx != 0 {
                return Err(Errno::EINVAL.into());
            }
            info.submap = features(current.domain()).bits();
            hv.write_guest(arg, &info)?;
        }
        VersionOp::Pagesize if arg == 0 => return Ok(PAGE_SIZE as u64),
        VersionOp::Pagesize => return Err(Errno::EINVAL.into()),
        VersionOp::GuestHandle => hv.write_guest(arg, &current.domain().handle)?,
        VersionOp::Commandline if !privileged() => hv.write_guest(arg, DENIED)?,
        VersionOp::Commandline => {
            let words = hv.command_line.get().copied().unwrap_or("");
            hv.write_guest(arg, &text::<COMMANDLINE_LEN>(words))?;
        }
        VersionOp::BuildId if !privileged() => return Err(Errno::EPERM.into()),
        VersionOp::BuildId => {
            // A null argument asks for the length.
            if arg != 0 && hv.read_guest::<u32>(arg)? == 0 {
                return Err(Errno::EINVAL.into());
            }
            return Err(Errno::ENODATA.into());
        }
    }
    Ok(0)
}

fn features(domain: &Domain) -> Features {
    let mut features = Features::MMU_PT_UPDATE_PRESERVE_AD
        | Features::HIGHMEM_ASSIST
        | Features::GNTTAB_MAP_AVAIL_BITS
        | Features::MEMORY_OP_VNODE_SUPPORTED
        | Features::DIRECT_MAPPED;
    let assists = domain.vm_assist.load(Ordering::Relaxed);
    features.set(Features::PAE_PGDIR_ABOVE_4GB, assists & 1 << VmAssist::PaeExtendedCr3.number() != 0);
    features.set(Features::DOM0, domain.rights.lock().verbs.contains(Verbs::HARDWARE));
    features
}

/// A text filled up with zeros; it is cut if it does not fit with one zero at its end.
fn text<const N: usize>(from: &str) -> [u8; N] {
    let mut out = [0; N];
    for (to, byte) in out.iter_mut().zip(from.bytes()).take(N.saturating_sub(1)) {
        *to = byte;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_end_with_zero() {
        assert_eq!(text::<4>("abcdef"), *b"abc\0");
        assert_eq!(text::<4>("a"), *b"a\0\0\0");
        assert_eq!(text::<EXTRAVERSION_LEN>(EXTRAVERSION)[..11], *EXTRAVERSION.as_bytes());
    }
}

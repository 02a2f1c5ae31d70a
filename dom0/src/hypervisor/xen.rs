//! Xen 4.17's control interface.

use super::{DomainInfo, HostInfo, Hypervisor, LogPart, Refusal, Share, VcpuInfo};
use crate::policy::Ending;
use crate::toolstack::Limits;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use guest_sdk::xen_control::{self as control, abi};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::xen_control::{
    CreateDomain, DomainFlags, GRANT_VERSION_2, INTERFACE_VERSION, INVALID_MAX_VCPU_ID,
};
use hypercall_abi::{DomId, Errno, GrantRef, Mfn};

/// What the hypervisor was configured with.
const DEFAULT: i32 = -1;

fn or_default(limit: Option<u32>) -> i32 {
    limit.map_or(DEFAULT, |limit| i32::try_from(limit).unwrap_or(i32::MAX))
}

/// Xen.
pub(super) struct Xen;

fn domain_info(info: &abi::GetDomainInfo) -> DomainInfo {
    let flags = DomainFlags::from_bits_retain(info.flags);
    DomainInfo {
        domain: info.domain,
        handle: info.handle,
        dying: flags.contains(DomainFlags::DYING),
        ending: flags.contains(DomainFlags::SHUTDOWN).then_some(Ending(info.shutdown_reason())),
        paused: flags.contains(DomainFlags::PAUSED),
        running: flags.contains(DomainFlags::RUNNING),
        blocked: flags.contains(DomainFlags::BLOCKED),
        vcpus: if info.max_vcpu_id == INVALID_MAX_VCPU_ID { 0 } else { info.max_vcpu_id + 1 },
        pages: info.tot_pages,
        cpu_time_ns: info.cpu_time,
        usage: None,
    }
}

fn unscheduled(errno: Errno) -> Refusal {
    match errno {
        Errno::EOPNOTSUPP => {
            Refusal::NotOffered("Xen was booted with a scheduler that has no weights: sched=credit2 has")
        }
        errno => Refusal::Errno(errno),
    }
}

impl Hypervisor for Xen {
    fn about(&self) -> String {
        let (major, minor) = guest_sdk::hypercall::version().unwrap_or_default();
        let extra = guest_sdk::hypercall::extra_version().unwrap_or_default();
        let end = extra.iter().position(|&byte| byte == 0).unwrap_or(extra.len());
        let extra = crate::scrollback::printable(extra.get(..end).unwrap_or(&[]));
        format!("Xen {major}.{minor}{extra}, control interface {INTERFACE_VERSION:#x}")
    }

    fn create_domain(
        &self,
        handle: [u8; 16],
        vcpus: u32,
        max_pages: u64,
        limits: Limits,
    ) -> Result<(DomId, Mfn), Errno> {
        let request = CreateDomain {
            handle,
            max_vcpus: vcpus,
            max_evtchn_port: limits.max_port,
            max_grant_frames: or_default(limits.grant_frames),
            max_maptrack_frames: or_default(limits.maptrack_frames),
            grant_opts: GRANT_VERSION_2,
            ..CreateDomain::default()
        };
        let domain = control::create_domain(request)?;
        let shared_info = || {
            control::set_max_pages(domain, max_pages)?;
            let frame = Mfn::new(control::domain_info(domain)?.shared_info_frame);
            control::mask_upcalls(domain, frame)?;
            Ok(frame)
        };
        shared_info().map(|frame| (domain, frame)).inspect_err(|_| {
            // It is ours and empty: this cannot fail.
            let _ = control::destroy(domain);
        })
    }

    fn gives_blank_pages(&self) -> bool {
        // It promises nothing: a build that does not scrub exists.
        false
    }

    fn hypercall_page(&self, domain: DomId, frame: Mfn) -> Result<(), Errno> {
        control::hypercall_page(domain, frame)
    }

    fn grant_seed(&self, domain: DomId, grant: GrantRef, peer: DomId, frame: Mfn) -> Result<(), Errno> {
        control::grant_seed(domain, grant, peer, frame)
    }

    fn set_vcpu(&self, domain: DomId, vcpu: u32, context: &VcpuGuestContext) -> Result<(), Errno> {
        control::set_vcpu_context(domain, vcpu, context)
    }

    fn destroy_step(&self, domain: DomId) -> Result<bool, Errno> {
        control::destroy(domain)?;
        // All is given back, but for pages that others have mapped: as long as there are such, it is listed.
        match control::domain_info(domain) {
            Ok(_) => Ok(false),
            Err(Errno::ESRCH) => Ok(true),
            Err(errno) => Err(errno),
        }
    }

    fn pause(&self, domain: DomId) -> Result<(), Errno> {
        control::pause(domain)
    }

    fn unpause(&self, domain: DomId) -> Result<(), Errno> {
        control::unpause(domain)
    }

    fn affinity(&self, _: DomId, _: u32, _: u64, _: u64) -> Result<(u64, u64), Refusal> {
        Err(Refusal::NotOffered("this shell pins vCPUs on Xenolith only"))
    }

    fn share(&self, domain: DomId) -> Result<Share, Refusal> {
        let (weight, cap) = control::scheduling(domain).map_err(unscheduled)?;
        Ok(Share { weight: weight.into(), cap_percent: cap.into() })
    }

    fn set_share(&self, domain: DomId, share: Share) -> Result<(), Refusal> {
        let word = |value: u32| u16::try_from(value).map_err(|_| Errno::EINVAL);
        control::set_scheduling(domain, word(share.weight)?, word(share.cap_percent)?).map_err(unscheduled)
    }

    fn idle_ns(&self) -> Result<Vec<u64>, Errno> {
        control::idle_ns()
    }

    fn domain(&self, domain: DomId) -> Result<DomainInfo, Errno> {
        control::domain_info(domain).map(|info| domain_info(&info))
    }

    fn domains(&self) -> Result<Vec<DomainInfo>, Errno> {
        Ok(control::list_domains()?.iter().map(domain_info).collect())
    }

    fn vcpu(&self, domain: DomId, vcpu: u32) -> Result<VcpuInfo, Errno> {
        let info = control::vcpu_info(domain, vcpu).map_err(|errno| match errno {
            Errno::EINVAL => Errno::ENOENT,
            errno => errno,
        })?;
        Ok(VcpuInfo {
            online: info.online != 0,
            running: info.running != 0,
            blocked: info.blocked != 0,
            cpu_time_ns: info.cpu_time,
            cpu: info.cpu,
            usage: None,
        })
    }

    fn host(&self) -> Result<HostInfo, Errno> {
        let info = control::phys_info()?;
        Ok(HostInfo {
            total_pages: info.total_pages,
            free_pages: info.free_pages,
            cpus: info.nr_cpus,
            cpu_khz: info.cpu_khz,
            domains: u32::try_from(control::list_domains()?.len()).unwrap_or(u32::MAX),
            own: None,
        })
    }

    fn read_log(&self, index: u64, buffer: &mut [u8]) -> Result<LogPart, Errno> {
        // Xen counts modulo 2³². One call goes no further than its ring is long, so the distance is certain.
        let (bytes, next) = control::read_log(index as u32, buffer)?;
        let passed = next.wrapping_sub(index as u32);
        Ok(LogPart {
            bytes,
            next: index + u64::from(passed),
            lost: u64::from(passed).saturating_sub(bytes as u64),
        })
    }

    fn set_log_level(&self, _: u32) -> Result<(), Refusal> {
        Err(Refusal::NotOffered(
            "Xen's log level cannot be changed while it runs: boot it with loglvl= and guest_loglvl=",
        ))
    }
}

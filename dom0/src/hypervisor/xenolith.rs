//! Our hypervisor's control interface.

use super::{
    DomainInfo, DomainUsage, HostInfo, Hypervisor, LogPart, OwnUse, Refusal, Share, VcpuInfo, VcpuUsage,
};
use crate::policy::Ending;
use crate::toolstack::{Limits, MAPPINGS_PER_FRAME};
use crate::units::PAGE;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use guest_sdk::control::{self, abi};
use hypercall_abi::control::{CreateDomain, CreateFlags, DomainState, INTERFACE_VERSION, VcpuState};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, GrantRef, Mfn};

/// As much as there can be.
const DEFAULT: u32 = 0;

/// Xenolith.
pub(super) struct Xenolith;

fn domain_info(info: &abi::DomainInfo) -> DomainInfo {
    let state = DomainState::from_bits_retain(info.state);
    DomainInfo {
        domain: info.domid,
        handle: info.handle,
        dying: state.intersects(DomainState::DYING | DomainState::DEAD),
        ending: state.contains(DomainState::SHUTDOWN).then_some(Ending(info.shutdown_reason)),
        paused: state.contains(DomainState::PAUSED),
        running: state.contains(DomainState::RUNNING),
        blocked: state.contains(DomainState::BLOCKED),
        vcpus: info.max_vcpus,
        pages: info.tot_pages,
        cpu_time_ns: info.cpu_time_ns,
        usage: Some(DomainUsage {
            weight: info.weight,
            cap_percent: info.cap,
            stolen_ns: info.runnable_ns,
            hypercalls: info.hypercalls,
            faults: info.faults,
            upcalls: info.upcalls,
            max_memory_bytes: info.max_pages.saturating_mul(PAGE),
            grant_frames: info.grant_frames,
            grant_mappings: info.grant_mappings,
            ports: info.ports,
            hypervisor_bytes: u64::from(info.hypervisor_pages) * PAGE,
        }),
    }
}

impl Hypervisor for Xenolith {
    fn about(&self) -> String {
        match control::version() {
            Ok(version) => format!("Xenolith, control interface {:#x}", version.interface_version),
            Err(errno) => format!("unknown: no control interface {INTERFACE_VERSION:#x} ({errno})"),
        }
    }

    fn create_domain(
        &self,
        handle: [u8; 16],
        vcpus: u32,
        max_pages: u64,
        limits: Limits,
    ) -> Result<(DomId, Mfn), Errno> {
        let request = CreateDomain {
            flags: CreateFlags::GRANT_V2.bits(),
            max_vcpus: vcpus,
            max_pages,
            handle,
            max_port: limits.max_port,
            max_grant_frames: limits.grant_frames.unwrap_or(DEFAULT),
            max_maptrack: limits
                .maptrack_frames
                .map_or(DEFAULT, |frames| frames.saturating_mul(MAPPINGS_PER_FRAME)),
            ..CreateDomain::default()
        };
        let made = control::create_domain(DomId::INVALID, request)?;
        Ok((made.domid, made.shared_info))
    }

    fn gives_blank_pages(&self) -> bool {
        // Frames are scrubbed before they are given out.
        true
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
        control::destroy_step(domain)
    }

    fn pause(&self, domain: DomId) -> Result<(), Errno> {
        control::pause(domain)
    }

    fn unpause(&self, domain: DomId) -> Result<(), Errno> {
        control::unpause(domain)
    }

    fn affinity(&self, domain: DomId, vcpu: u32, hard: u64, soft: u64) -> Result<(u64, u64), Refusal> {
        Ok(control::set_affinity(domain, vcpu, hard, soft)?)
    }

    fn share(&self, domain: DomId) -> Result<Share, Refusal> {
        let info = control::domain_info(domain)?;
        Ok(Share { weight: info.weight, cap_percent: info.cap })
    }

    fn set_share(&self, domain: DomId, share: Share) -> Result<(), Refusal> {
        control::set_weight(domain, share.weight)?;
        Ok(control::set_cap(domain, share.cap_percent)?)
    }

    fn idle_ns(&self) -> Result<Vec<u64>, Errno> {
        let cpus = control::phys_info()?.cpus;
        (0..cpus).map(|cpu| control::cpu_info(cpu).map(|info| info.idle_ns)).collect()
    }

    fn domain(&self, domain: DomId) -> Result<DomainInfo, Errno> {
        control::domain_info(domain).map(|info| domain_info(&info))
    }

    fn domains(&self) -> Result<Vec<DomainInfo>, Errno> {
        Ok(control::list_domains()?.iter().map(domain_info).collect())
    }

    fn ended(&self) -> Result<Vec<(DomId, Ending)>, Errno> {
        let infos = control::list_ended()?;
        Ok(infos.iter().map(|info| (info.domid, Ending(info.shutdown_reason))).collect())
    }

    fn vcpu(&self, domain: DomId, vcpu: u32) -> Result<VcpuInfo, Errno> {
        let info = control::vcpu_info(domain, vcpu)?;
        let state = VcpuState::from_bits_retain(info.state);
        Ok(VcpuInfo {
            online: state.contains(VcpuState::ONLINE),
            running: state.contains(VcpuState::RUNNING),
            blocked: state.contains(VcpuState::BLOCKED),
            cpu_time_ns: info.cpu_time_ns,
            cpu: info.cpu,
            usage: Some(VcpuUsage {
                runnable_ns: info.runnable_ns,
                blocked_ns: info.blocked_ns,
                offline_ns: info.offline_ns,
                hypercalls: info.hypercalls,
                faults: info.faults,
                events_sent: info.events_sent,
                upcalls: info.upcalls,
                grant_operations: info.grant_operations,
                switches: info.switches,
                moves: info.moves,
            }),
        })
    }

    fn host(&self) -> Result<HostInfo, Errno> {
        let info = control::phys_info()?;
        Ok(HostInfo {
            total_pages: info.total_pages,
            free_pages: info.free_pages + info.scrub_pending_pages,
            cpus: info.cpus,
            cpu_khz: info.cpu_khz,
            domains: info.domains,
            own: Some(OwnUse {
                pages: info.hypervisor_pages,
                heap_used: info.heap_used,
                heap_size: info.heap_size,
                uptime_ns: info.uptime_ns,
                dropped_interrupts: info.dropped_interrupts,
            }),
        })
    }

    fn read_log(&self, index: u64, buffer: &mut [u8]) -> Result<LogPart, Errno> {
        let (bytes, next, lost) = control::read_log(index, buffer)?;
        Ok(LogPart { bytes, next, lost })
    }

    fn set_log_level(&self, level: u32) -> Result<(), Refusal> {
        control::set_log_level(level)?;
        Ok(())
    }
}

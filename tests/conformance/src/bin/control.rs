//! The control interface: Xenolith's own, so that on Xen there is nothing to ask.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, call, only_on, only_privileged};
use guest_sdk::abi::control::{CreateDomain, DomainState};
use guest_sdk::abi::sched::ShutdownReason;
use guest_sdk::abi::{DomId, Errno, Hypercall};
use guest_sdk::control;
use guest_sdk::testkit::{self, Verdict, cases, check, check_eq};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            other_interface_is_refused,
            nobody_is_refused,
            domain_comes_and_goes,
            creation_is_refused,
            domain_is_shut_down_from_outside,
            host_is_told,
            vcpu_runs_where_it_may
        ],
    )
}

const OURS: &str = "the control interface is Xenolith's own";
const OTHERS: &str = "the control interface is for who was given it";

fn other_interface_is_refused(_: &mut Domain) -> Verdict {
    // Both say the same to a caller of another version: Xen's is not ours.
    let mut op = [0x1234u32; 64];
    check_eq!(call(Hypercall::Domctl, [op.as_mut_ptr() as u64, 0, 0, 0, 0]), Err(Errno::EACCES));
    check_eq!(call(Hypercall::Domctl, [NOWHERE, 0, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn nobody_is_refused(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let nobody = DomId::new(1234);
    check_eq!(control::domain_info(nobody).err(), Some(Errno::ESRCH));
    check_eq!(control::pause(nobody), Err(Errno::ESRCH));
    check_eq!(control::unpause(nobody), Err(Errno::ESRCH));
    check_eq!(control::set_max_pages(nobody, 1), Err(Errno::ESRCH));
    check_eq!(control::destroy_step(nobody).err(), Some(Errno::ESRCH));
    check!(control::list_domains()?.iter().all(|info| info.domid != nobody));
    Ok(())
}

fn destroy(domain: DomId) -> Result<(), Errno> {
    while !control::destroy_step(domain)? {}
    Ok(())
}

/// Free frames, with those that only wait to be cleaned.
fn free_frames() -> Result<u64, Errno> {
    let info = control::phys_info()?;
    Ok(info.free_pages + info.scrub_pending_pages)
}

fn domain_comes_and_goes(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let request = CreateDomain { max_vcpus: 2, max_pages: 300, ..CreateDomain::default() };
    // The first one may make tables of the hypervisor grow.
    destroy(control::create_domain(DomId::INVALID, request)?.domid)?;
    let before = free_frames()?;
    let made = control::create_domain(DomId::INVALID, request)?;
    let info = control::domain_info(made.domid)?;
    check_eq!(info.domid, made.domid);
    check!(control::list_domains()?.iter().any(|info| info.domid == made.domid), "it is listed");
    let mut frames: [u64; 256] = core::array::from_fn(|pfn| pfn as u64);
    check_eq!(control::populate(made.domid, &mut frames), Ok(()));
    check!(before - free_frames()? >= 256, "its memory is its own");
    // It may have 300.
    let mut more: [u64; 100] = core::array::from_fn(|pfn| 256 + pfn as u64);
    check!(control::populate(made.domid, &mut more).is_err(), "beyond its limit");
    check_eq!(control::pause(made.domid), Ok(()));
    check_eq!(control::unpause(made.domid), Ok(()));
    check_eq!(destroy(made.domid), Ok(()));
    check_eq!(control::domain_info(made.domid).err(), Some(Errno::ESRCH));
    check_eq!(free_frames()?, before, "free frames");
    Ok(())
}

fn creation_is_refused(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let count = control::list_domains()?.len();
    for max_vcpus in [0, 100_000] {
        let request = CreateDomain { max_vcpus, max_pages: 16, ..CreateDomain::default() };
        check_eq!(
            control::create_domain(DomId::INVALID, request).err(),
            Some(Errno::EINVAL),
            "{max_vcpus} vCPUs"
        );
    }
    let request = CreateDomain { max_vcpus: 1, max_pages: 16, ..CreateDomain::default() };
    check_eq!(control::create_domain(DomId::ZERO, request).err(), Some(Errno::EEXIST), "our own number");
    check_eq!(control::list_domains()?.len(), count);
    Ok(())
}

fn domain_is_shut_down_from_outside(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let request = CreateDomain { max_vcpus: 1, max_pages: 16, ..CreateDomain::default() };
    let made = control::create_domain(DomId::INVALID, request)?.domid;
    let before = control::domain_info(made)?;
    check!(before.state & DomainState::SHUTDOWN.bits() == 0, "{before:?}");
    check_eq!(control::remote_shutdown(made, ShutdownReason::Reboot), Ok(()));
    let after = control::domain_info(made)?;
    check!(after.state & DomainState::SHUTDOWN.bits() != 0, "{after:?}");
    check_eq!(after.shutdown_reason, ShutdownReason::Reboot.number());
    check_eq!(destroy(made), Ok(()));
    check_eq!(control::remote_shutdown(made, ShutdownReason::Reboot), Err(Errno::ESRCH));
    Ok(())
}

fn host_is_told(_: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let info = control::phys_info()?;
    check!(info.total_pages > info.free_pages && info.free_pages > 0 && info.cpus >= 1, "{info:?}");
    check_eq!(info.domains as usize, control::list_domains()?.len());
    let mut text = [0u8; 512];
    let (length, _, _) = control::read_log(0, &mut text)?;
    check!(length > 0, "the log is empty");
    Ok(())
}

fn vcpu_runs_where_it_may(domain: &mut Domain) -> Verdict {
    only_on(true, OURS)?;
    only_privileged(OTHERS)?;
    let own = domain.id();
    let before = control::set_affinity(own, 0, 0, 0)?;
    check_eq!(control::set_affinity(own, 0, 1, u64::MAX), Ok((1, u64::MAX)));
    check_eq!(control::vcpu_info(own, 0)?.cpu, 0);
    // CPU 63 is not up on any machine that this runs on; nothing has changed.
    check_eq!(control::set_affinity(own, 0, 1 << 63, 1), Err(Errno::EINVAL));
    check_eq!(control::set_affinity(own, 64, 1, 1), Err(Errno::EINVAL));
    check_eq!(control::set_affinity(DomId::new(1234), 0, 1, 1), Err(Errno::ESRCH));
    check_eq!(control::set_affinity(own, 0, 0, 0), Ok((1, u64::MAX)));
    check_eq!(control::set_affinity(own, 0, before.0, before.1), Ok(before));
    Ok(())
}

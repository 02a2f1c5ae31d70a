//! How long the hypervisor works for one entry without looking whether anybody waits.
//!
//! Each case makes one kind of call as long as it can be made, and asks the hypervisor for its longest entry since. The unit is a
//! tick of the time-stamp counter: under `-icount shift=0`, where the TSC runs at 1 GHz, exactly one instruction, and only there
//! is the bound checked.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;

use conformance::{TablePage, call, mmuext, only_on, pages, pte};
use guest_sdk::abi::control::{CreateDomain, LONGEST_IS_HYPERCALL};
use guest_sdk::abi::grant::{
    GNTCOPY_SOURCE_GREF, GNTST_OKAY, GnttabCopy, GnttabCopyPtr, GnttabMapGrantRef, GnttabSetVersion,
    GnttabSetupTable, GnttabUnmapGrantRef, MapFlags,
};
use guest_sdk::abi::mmu::{MmuUpdate, MulticallEntry};
use guest_sdk::abi::subops::{GnttabOp, MmuextCmd};
use guest_sdk::abi::{DomId, Errno, GuestHandle, Hypercall};
use guest_sdk::grants::Grant;
use guest_sdk::memory::{Access, Range};
use guest_sdk::testkit::{self, Verdict, cases, check, check_eq};
use guest_sdk::{Domain, control, entry, println};

/// Most instructions of one entry (docs/design/0004).
const BOUND: u64 = 150_000;
/// Most instructions where one step is long: scrubbing an extent of 512 frames, making a domain of 64 vCPUs.
const LONG_STEP: u64 = 350_000;
/// Frequency of the TSC under `-icount shift=0`, with what calibration may miss.
const ICOUNT_KHZ: core::ops::RangeInclusive<u32> = 999_000..=1_001_000;
const OURS: &str = "Xen does not tell";
/// Present, writable, user, accessed, dirty.
const RW: u64 = 0x67;

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            pinning_a_tree,
            a_list_of_updates,
            a_list_of_calls,
            lists_of_grants,
            changes_of_a_large_grant_table,
            small_extents,
            a_large_extent,
            a_domain_from_making_to_destroying,
            console_output
        ],
    )
}

/// Runs `work`, and prints and checks the longest entry during it.
fn longest(what: &str, bound: u64, work: impl FnOnce() -> Verdict) -> Verdict {
    only_on(true, OURS)?;
    control::phys_info()?;
    work()?;
    let info = control::phys_info()?;
    let which = info.longest_what & !LONGEST_IS_HYPERCALL;
    let kind = if info.longest_what & LONGEST_IS_HYPERCALL != 0 { "hypercall" } else { "exception" };
    println!("longest entry: {what}: {} ticks ({kind} {which})", info.longest_ticks);
    check!(info.longest_ticks > 0, "nothing was measured");
    if ICOUNT_KHZ.contains(&info.cpu_khz) {
        check!(
            info.longest_ticks <= bound,
            "{what}: {} instructions, the bound is {bound}",
            info.longest_ticks
        );
    }
    Ok(())
}

fn pinning_a_tree(_: &mut Domain) -> Verdict {
    longest("pin and unpin an L2 table over 8 full L1 tables", BOUND, || {
        let data = pages(1)?;
        let entry = pte(data[0].mfn().get(), RW);
        let full: Vec<_> = (0..512).map(|i| (i, entry)).collect();
        let tables = (0..8).map(|_| TablePage::new(&full)).collect::<Result<Vec<_>, Errno>>()?;
        let entries: Vec<_> = tables.iter().enumerate().map(|(i, t)| (i, pte(t.mfn(), RW))).collect();
        let l2 = TablePage::new(&entries)?;
        check_eq!(mmuext(MmuextCmd::PinL2Table, l2.mfn(), 0), Ok(0));
        check_eq!(mmuext(MmuextCmd::UnpinTable, l2.mfn(), 0), Ok(0));
        Ok(())
    })
}

fn a_list_of_updates(_: &mut Domain) -> Verdict {
    longest("one mmu_update of 512 entries", BOUND, || {
        let data = pages(1)?;
        let l1 = TablePage::new(&[])?;
        check_eq!(mmuext(MmuextCmd::PinL1Table, l1.mfn(), 0), Ok(0));
        let mut done = 0u32;
        for value in [pte(data[0].mfn().get(), RW), 0] {
            let list: Vec<_> = (0..512).map(|i| MmuUpdate { ptr: l1.place(i), val: value }).collect();
            let own = u64::from(DomId::SELF.get());
            let args = [list.as_ptr() as u64, 512, &raw mut done as u64, own, 0];
            check_eq!(call(Hypercall::MmuUpdate, args), Ok(0));
        }
        check_eq!(mmuext(MmuextCmd::UnpinTable, l1.mfn(), 0), Ok(0));
        Ok(())
    })
}

fn a_list_of_calls(_: &mut Domain) -> Verdict {
    longest("one multicall of 2,000 xen_version", BOUND, || {
        let one = MulticallEntry { op: Hypercall::XenVersion.number(), result: 0, args: [0; 6] };
        let mut list: Vec<_> = (0..2000).map(|_| one).collect();
        check_eq!(call(Hypercall::Multicall, [list.as_mut_ptr() as u64, 2000, 0, 0, 0]), Ok(0));
        check!(list.iter().all(|entry| entry.result == list[0].result && entry.result != 0));
        Ok(())
    })
}

/// Says how long a list of grant operations takes altogether.
fn list_of<T>(what: &str, command: GnttabOp, list: &mut [T]) -> Verdict {
    // SAFETY: a processor has the counter.
    let now = || unsafe { core::arch::x86_64::_rdtsc() };
    let (at, count, before) = (list.as_mut_ptr() as u64, list.len() as u64, now());
    check_eq!(call(Hypercall::GrantTableOp, [command.number().into(), at, count, 0, 0]), Ok(0));
    println!("{count} of {what}: {} ticks each", (now() - before) / count);
    Ok(())
}

fn lists_of_grants(domain: &mut Domain) -> Verdict {
    const COUNT: usize = 64;
    longest("64 maps, unmaps and copies", BOUND, || {
        let id = domain.id();
        let granted = (0..COUNT)
            .map(|_| domain.grants.grant_new(id, Access::ReadWrite))
            .collect::<Result<Vec<_>, _>>()?;
        let window = Range::new(COUNT as u64)?;
        let target = pages(1)?;
        for round in ["first", "second"] {
            let mut maps: Vec<_> = (0u64..)
                .zip(&granted)
                .map(|(i, grant)| GnttabMapGrantRef {
                    host_addr: window.address(i),
                    flags: MapFlags::HOST_MAP.bits(),
                    gref: grant.reference(),
                    dom: id,
                    status: 77,
                    ..Default::default()
                })
                .collect();
            list_of(&alloc::format!("map_grant_ref, {round} time"), GnttabOp::MapGrantRef, &mut maps)?;
            check!(maps.iter().all(|op| op.status == GNTST_OKAY));
            let mut unmaps: Vec<_> = maps
                .iter()
                .map(|op| GnttabUnmapGrantRef {
                    host_addr: op.host_addr,
                    handle: op.handle,
                    status: 77,
                    ..Default::default()
                })
                .collect();
            list_of("unmap_grant_ref", GnttabOp::UnmapGrantRef, &mut unmaps)?;
            check!(unmaps.iter().all(|op| op.status == GNTST_OKAY));
        }
        for len in [64, 1500, 4096] {
            let copy = |grant: &Grant| GnttabCopy {
                source: GnttabCopyPtr::granted(grant.reference(), id, 0),
                dest: GnttabCopyPtr::own(target[0].mfn(), 0),
                len,
                flags: GNTCOPY_SOURCE_GREF,
                status: 77,
                pad0: 0,
            };
            let mut copies: Vec<_> = granted.iter().map(copy).collect();
            list_of(&alloc::format!("copy, {len} bytes"), GnttabOp::Copy, &mut copies)?;
            check!(copies.iter().all(|op| op.status == GNTST_OKAY));
        }
        Ok(())
    })
}

fn changes_of_a_large_grant_table(_: &mut Domain) -> Verdict {
    longest("versions of a grant table of 64 frames", BOUND, || {
        let mut frames = [0u64; 64];
        let mut setup = GnttabSetupTable {
            dom: DomId::SELF,
            nr_frames: 64,
            frame_list: GuestHandle::new(frames.as_mut_ptr() as u64),
            ..Default::default()
        };
        check_eq!(conformance::grant(GnttabOp::SetupTable, &mut setup), Ok(0));
        check_eq!(setup.status, GNTST_OKAY);
        for version in [2, 1] {
            let mut set = GnttabSetVersion { version };
            check_eq!(conformance::grant(GnttabOp::SetVersion, &mut set), Ok(0));
            check_eq!(set.version, version);
        }
        Ok(())
    })
}

/// A domain to give memory to, destroyed at the end.
fn with_domain(pages: u64, work: impl FnOnce(DomId) -> Verdict) -> Verdict {
    let request = CreateDomain { max_vcpus: 1, max_pages: pages, ..CreateDomain::default() };
    let made = control::create_domain(DomId::INVALID, request)?.domid;
    let verdict = work(made);
    while !control::destroy_step(made)? {}
    verdict
}

fn small_extents(_: &mut Domain) -> Verdict {
    longest("populate 512 used frames one by one, and destroy", BOUND, || {
        // Twice: the second time they have to be scrubbed.
        for _ in 0..2 {
            with_domain(512, |domain| {
                let mut frames: [u64; 512] = core::array::from_fn(|pfn| pfn as u64);
                check_eq!(control::populate(domain, &mut frames), Ok(()));
                Ok(())
            })?;
        }
        Ok(())
    })
}

fn a_large_extent(_: &mut Domain) -> Verdict {
    longest("populate one extent of 512 frames", LONG_STEP, || {
        use guest_sdk::abi::memory::MemoryReservation;
        use guest_sdk::abi::subops::MemoryOp;
        for _ in 0..2 {
            with_domain(512, |domid| {
                let mut first = 0u64;
                let mut request = MemoryReservation {
                    extent_start: GuestHandle::new(&raw mut first as u64),
                    nr_extents: 1,
                    extent_order: 9,
                    domid,
                    ..Default::default()
                };
                check_eq!(conformance::memop(MemoryOp::PopulatePhysmap, &mut request), Ok(1));
                Ok(())
            })?;
        }
        Ok(())
    })
}

fn a_domain_from_making_to_destroying(_: &mut Domain) -> Verdict {
    longest("make and destroy a domain of 64 vCPUs", LONG_STEP, || {
        let request = CreateDomain { max_vcpus: 64, max_pages: 16, ..CreateDomain::default() };
        let made = control::create_domain(DomId::INVALID, request)?.domid;
        while !control::destroy_step(made)? {}
        Ok(())
    })
}

fn console_output(_: &mut Domain) -> Verdict {
    longest("console_io of 4,000 bytes", BOUND, || {
        let mut text = [b' '; 4000];
        text[3999] = b'\n';
        check_eq!(call(Hypercall::ConsoleIo, [0, 4000, text.as_ptr() as u64, 0, 0]), Ok(0));
        Ok(())
    })
}

//! What a refused call leaves alone: everything about this domain that it can ask for, as numbers to compare.
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use guest_sdk::abi::evtchn::EvtchnStatus;
use guest_sdk::abi::grant::{GnttabGetVersion, GnttabQuerySize};
use guest_sdk::abi::memory::MemoryDomain;
use guest_sdk::abi::subops::{EvtchnOp, GnttabOp, MemoryOp, VcpuOp};
use guest_sdk::abi::version::FeatureInfo;
use guest_sdk::abi::{DomId, Errno, Hypercall, Port};

use guest_sdk::testkit::{Verdict, fail};

use crate::{call, evtchn, grant, memop, shared};

/// Ports that are looked at; the cases open none beyond them.
const PORTS: u32 = 48;

/// An answer as one number: errors are negative, as in rax.
pub fn number(answer: Result<u64, Errno>) -> u64 {
    answer.unwrap_or_else(Errno::to_ret)
}

/// The first ports: what each is, the vCPU that it notifies, and what it leads to.
pub fn ports() -> Vec<u64> {
    let of = |port| {
        let mut now = EvtchnStatus { dom: DomId::SELF, port: Port::new(port), ..EvtchnStatus::default() };
        evtchn(EvtchnOp::Status, &mut now).map_or(0, |_| {
            u64::from(now.status) << 56
                | u64::from(now.vcpu) << 48
                | u64::from(now.u0) << 24
                | u64::from(now.u1)
        })
    };
    (0..PORTS).map(of).collect()
}

/// The mask bits of the first ports.
pub fn masks() -> u64 {
    // SAFETY: a word of the shared page, which both ends write.
    unsafe { (&raw const (*shared()).evtchn_mask).cast::<u64>().read_volatile() }
}

/// How many pages this domain has.
pub fn reservation() -> u64 {
    number(memop(MemoryOp::CurrentReservation, &mut MemoryDomain { domid: DomId::SELF }))
}

/// Ports, masks, grant table, pages, vCPUs, debug registers, assists.
pub fn common() -> Vec<u64> {
    let mut all = ports();
    all.push(masks());
    let mut size = GnttabQuerySize { dom: DomId::SELF, ..Default::default() };
    all.push(number(grant(GnttabOp::QuerySize, &mut size)));
    all.push(u64::from(size.nr_frames));
    let mut version = GnttabGetVersion { dom: DomId::SELF, ..Default::default() };
    all.push(number(grant(GnttabOp::GetVersion, &mut version)));
    all.push(u64::from(version.version));
    all.push(reservation());
    for id in 0..3 {
        all.push(number(call(Hypercall::VcpuOp, [VcpuOp::IsUp.number().into(), id, 0, 0, 0])));
    }
    for register in [0, 1, 2, 3, 6, 7] {
        all.push(number(call(Hypercall::GetDebugreg, [register, 0, 0, 0, 0])));
    }
    let mut features = FeatureInfo::default();
    all.push(number(crate::version(guest_sdk::abi::subops::VersionOp::GetFeatures, &mut features)));
    all.push(u64::from(features.submap));
    all
}

/// Masks one of the first ports, or clears its mask bit without a word to the hypervisor.
pub fn set_mask(port: Port, on: bool) {
    assert!(port.get() < 64);
    let bit = 1 << port.get();
    // SAFETY: a word of the shared page; the hypervisor changes mask bits only in this domain's own calls.
    unsafe {
        let word = (&raw mut (*shared()).evtchn_mask).cast::<u64>();
        word.write_volatile(if on { masks() | bit } else { masks() & !bit });
    }
}

/// What a table found wrong. One cause makes many: the first of them are told.
#[derive(Default)]
pub(crate) struct Findings {
    first: Vec<String>,
    more: usize,
}

impl Findings {
    const TOLD: usize = 8;

    /// One more.
    pub(crate) fn add(&mut self, what: core::fmt::Arguments<'_>) {
        if self.first.len() < Self::TOLD {
            self.first.push(what.to_string());
        } else {
            self.more += 1;
        }
    }

    /// Passed when there are none.
    pub(crate) fn verdict(&self) -> Verdict {
        match (self.first.join("; "), self.more) {
            (text, 0) if text.is_empty() => Ok(()),
            (text, 0) => fail(text),
            (text, more) => fail(format_args!("{text}; and {more} more")),
        }
    }
}

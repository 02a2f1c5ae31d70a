//! Random hypercalls with random arguments: `seed=` and `count=` choose them.
//!
//! Left out is only what would end or stop this guest by design: shutting down, sleeping without end, returning to a made-up
//! frame, and giving up the entry points, tables and pages that the guest itself runs on.
#![no_std]
#![no_main]

extern crate alloc;

use guest_sdk::abi::{Errno, Hypercall};
use guest_sdk::memory::{self, Page};
use guest_sdk::testkit::{self, Random, Verdict, cases, check, check_eq, try_read};
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    testkit::run(domain, &cases![random_hypercalls, still_whole])
}

/// Whether a call would end or stop this guest by design.
fn ends_this_guest(number: u64, arguments: &[u64; 5]) -> bool {
    match Hypercall::from_number(number) {
        Some(
            Hypercall::Iret
            | Hypercall::SetTrapTable
            | Hypercall::SetCallbacks
            | Hypercall::CallbackOp
            | Hypercall::NmiOp
            | Hypercall::StackSwitch
            | Hypercall::Multicall
            | Hypercall::UpdateVaMapping
            | Hypercall::UpdateVaMappingOtherdomain
            | Hypercall::KexecOp
            | Hypercall::PlatformOp
            | Hypercall::FpuTaskswitch
            | Hypercall::SetDebugreg
            | Hypercall::SetSegmentBase,
        ) => true,
        // Block, shutdown, poll, remote shutdown, watchdog.
        Some(Hypercall::SchedOp | Hypercall::SchedOpCompat) => arguments[0] != 0,
        // Down, an event area elsewhere, an NMI.
        Some(Hypercall::VcpuOp) => matches!(arguments[0] as u32, 1 | 2 | 5 | 10 | 11 | 13),
        // Closing all ports.
        Some(Hypercall::EventChannelOp) => matches!(arguments[0] as u32, 10 | 14),
        // Writing to the console is no attack but noise.
        Some(Hypercall::ConsoleIo) => true,
        _ => false,
    }
}

fn random_hypercalls(domain: &mut Domain) -> Verdict {
    let seed: u64 = domain.command_line.number("seed").unwrap_or(1);
    let count: u64 = domain.command_line.number("count").unwrap_or(200_000);
    println!("seed {seed}, {count} calls");
    let mut random = Random::with_seed(seed);
    // What arguments point to: pages of its own, filled anew before each call.
    let mut target = Page::new()?;
    let spare = Page::new()?;
    let (mut done, mut refused, mut unknown) = (0u64, 0u64, 0u64);
    for _ in 0..count {
        for word in target.bytes_mut().chunks_exact_mut(8).take(16) {
            let value = match random.u64(..6) {
                0 => random.u64(..8),
                1 => random.u64(..5000),
                2 => spare.mfn().get(),
                3 => spare.mfn().address().get() | random.u64(..4096),
                4 => 0x7ff0 + random.u64(..5),
                _ => random.u64(..),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        let mut argument = || match random.u64(..8) {
            0 => random.u64(..8),
            1 => random.u64(..64),
            2 => random.u64(..5000),
            3 | 4 => target.address() + random.u64(..8) * 8,
            5 => 0x7ff0,
            6 => 0xffff_8000_0000_0000 | random.u64(..) >> 17,
            _ => random.u64(..),
        };
        let arguments = [argument(), argument(), argument(), argument(), argument()];
        let number = random.u64(..64);
        if ends_this_guest(number, &arguments) {
            continue;
        }
        // SAFETY: the calls left can take only pages that nobody uses: `target` and `spare`.
        match Errno::check(unsafe { guest_sdk::hypercall::raw(number, arguments) }) {
            Ok(_) => done += 1,
            Err(Errno::ENOSYS) => unknown += 1,
            Err(_) => refused += 1,
        }
    }
    println!("{done} done, {refused} refused, {unknown} unknown");
    check!(refused > count / 50, "{refused} refused: the arguments are not bad enough");
    check!(done > count / 1000, "{done} done: the arguments are not good enough");
    // They may be tables of descriptors or of pages by now.
    target.leak();
    spare.leak();
    Ok(())
}

fn still_whole(_: &mut Domain) -> Verdict {
    // SAFETY: a query.
    check_eq!(Errno::check(unsafe { guest_sdk::hypercall::raw(17, [0; 5]) }), Ok(0x0004_0011));
    let page = Page::new()?;
    check_eq!(try_read(page.address()), Ok(0));
    check_eq!(memory::translate(page.address()), Some(page.mfn()));
    Ok(())
}

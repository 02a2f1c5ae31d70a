//! What every call answers that this domain may not make, or may make only of others: number, operation, arguments, answer.
//!
//! The tables are what Debian's Xen 4.17.7 answers, an unprivileged domain and its first domain. Xenolith must answer the same
//! but where a row says otherwise, with the reason; `print` on the command line prints what came instead of comparing, which is
//! how a table for another version is made. Each case ends with a call that works, so that no single answer to everything passes.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use conformance::{is_privileged, is_xenolith, raw};
use guest_sdk::abi::Errno;
use guest_sdk::abi::Errno as E;
use guest_sdk::memory::Page;
use guest_sdk::testkit::{self, Verdict, cases, check_eq, fail};
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            platform_op,
            sysctl,
            domctl,
            machine_check,
            kexec_op,
            xenoprof_op,
            hvm_op,
            dm_op,
            hypfs_op,
            xenpmu_op,
            what_is_gone_or_not_built,
            memory_of_others,
            memory_of_translated_guests,
            memory_queries,
            interrupts_and_devices,
            interrupts_in_the_old_form,
            version_queries,
            commands_are_32_bits,
        ],
    )
}

/// An argument that stands for the address of a page: zero, but for the words that the row gives.
const ROOM: u64 = 0x5eed_0000_0000_0001;
/// Nothing is mapped there.
const NOWHERE: u64 = conformance::NOWHERE;
/// A domain that does not exist.
const NOBODY: u32 = 7777;
/// This domain, by its number.
const OWN: u32 = 0x5eed_0001;
/// The domain `DOMID_SELF`.
const SELF: u32 = 0x7ff0;

/// What a call answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// This number.
    Is(u64),
    /// Any number that is no error.
    Works,
    /// This error.
    No(Errno),
    /// Not asked: it would change the machine.
    Unasked,
}
use Answer::{Is, No, Unasked, Works};

/// One call.
struct Row {
    what: &'static str,
    arguments: &'static [u64],
    /// 32-bit words of [`ROOM`]: index and value.
    words: &'static [(usize, u32)],
    /// The answer to an unprivileged domain.
    guest: Answer,
    /// The answer to the first domain.
    first: Answer,
    /// What Xenolith answers its first domain instead, and why.
    ours: Option<(Answer, &'static str)>,
}

/// The control interface is our own (design record 0005).
const OWN_CONTROL: &str = "our control interface is another";

const fn row(
    what: &'static str,
    arguments: &'static [u64],
    words: &'static [(usize, u32)],
    guest: Answer,
    first: Answer,
) -> Row {
    Row { what, arguments, words, guest, first, ours: None }
}

impl Row {
    const fn ours(mut self, answer: Answer, why: &'static str) -> Row {
        self.ours = Some((answer, why));
        self
    }
}

fn show(answer: &Result<u64, Errno>) -> String {
    match answer {
        Ok(value) => format!("Is({value:#x})"),
        Err(errno) => format!("No({errno})"),
    }
}

/// Makes the calls of a table, and one that works.
fn run(domain: &mut Domain, number: u64, table: &[Row]) -> Verdict {
    let print = domain.command_line.has("print");
    let privileged = is_privileged();
    let mut wrong = String::new();
    for row in table {
        let wanted = match (privileged, row.ours) {
            (true, Some((ours, _))) if is_xenolith() => ours,
            (true, _) => row.first,
            (false, _) => row.guest,
        };
        if wanted == Unasked {
            continue;
        }
        let mut page = Page::new()?;
        for &(index, word) in row.words {
            let word = if word == OWN { u32::from(domain.id().get()) } else { word };
            page.bytes_mut()[index * 4..index * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        let mut arguments = [0; 5];
        for (to, &from) in arguments.iter_mut().zip(row.arguments) {
            *to = match from {
                ROOM => page.address(),
                own if own == u64::from(OWN) => u64::from(domain.id().get()),
                other => other,
            };
        }
        let got = raw(number, arguments);
        let right = match wanted {
            Is(value) => got == Ok(value),
            Works => got.is_ok(),
            No(errno) => got == Err(errno),
            Unasked => true,
        };
        if print {
            println!("{number:2} {:50} {}", row.what, show(&got));
        } else if !right {
            wrong += &format!("\n    {number} {}: {}", row.what, show(&got));
        }
    }
    check_eq!(raw(17, [0; 5]), Ok(0x4_0011), "a call that works");
    if wrong.is_empty() { Ok(()) } else { fail(format_args!("other answers:{wrong}")) }
}

fn platform_op(domain: &mut Domain) -> Verdict {
    const VERSION: (usize, u32) = (1, 0x0300_0001);
    let table = [
        row("nowhere", &[NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("null", &[0], &[], No(E::EFAULT), No(E::EFAULT)),
        row("interface version 0", &[ROOM], &[], No(E::EACCES), No(E::EACCES)),
        row("settime64", &[ROOM], &[(0, 62), VERSION], No(E::EPERM), Unasked),
        row("an unknown command", &[ROOM], &[(0, 9999), VERSION], No(E::EPERM), No(E::ENOSYS)),
        row("get_cpu_version", &[ROOM], &[(0, 48), VERSION], No(E::EPERM), Is(0))
            .ours(No(E::ENOSYS), OWN_CONTROL),
    ];
    run(domain, 7, &table)
}

fn sysctl(domain: &mut Domain) -> Verdict {
    const VERSION: (usize, u32) = (1, 0x15);
    let table = [
        row("nowhere", &[NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("interface version 0", &[ROOM], &[], No(E::EACCES), No(E::EACCES)),
        row("an unknown command", &[ROOM], &[(0, 9999), VERSION], No(E::EPERM), No(E::ENOSYS)),
        row("physinfo", &[ROOM], &[(0, 3), VERSION], No(E::EPERM), Is(0)).ours(No(E::ENOSYS), OWN_CONTROL),
        row("getdomaininfolist", &[ROOM], &[(0, 6), VERSION], No(E::EPERM), Is(0))
            .ours(No(E::ENOSYS), OWN_CONTROL),
    ];
    run(domain, 35, &table)
}

fn domctl(domain: &mut Domain) -> Verdict {
    const VERSION: (usize, u32) = (1, 0x15);
    const FIRST: (usize, u32) = (2, 0);
    let table = [
        row("nowhere", &[NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("interface version 0", &[ROOM], &[], No(E::EACCES), No(E::EACCES)),
        row("createdomain", &[ROOM], &[(0, 1), VERSION], No(E::EPERM), Unasked),
        row("destroydomain of nobody", &[ROOM], &[(0, 2), VERSION, (2, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("pausedomain of DOMID_SELF", &[ROOM], &[(0, 3), VERSION, (2, SELF)], No(E::ESRCH), No(E::ESRCH)),
        row("pausedomain of itself", &[ROOM], &[(0, 3), VERSION, (2, OWN)], No(E::EPERM), Unasked),
        row("unpausedomain of the first", &[ROOM], &[(0, 4), VERSION, FIRST], No(E::EPERM), Unasked),
        row("getdomaininfo of the first", &[ROOM], &[(0, 5), VERSION, FIRST], No(E::EPERM), Is(0))
            .ours(No(E::EACCES), OWN_CONTROL),
        row(
            "getdomaininfo past the last",
            &[ROOM],
            &[(0, 5), VERSION, (2, NOBODY)],
            No(E::ESRCH),
            No(E::ESRCH),
        ),
        row(
            "getdomaininfo of DOMID_SELF",
            &[ROOM],
            &[(0, 5), VERSION, (2, SELF)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row("an unknown command", &[ROOM], &[(0, 9999), VERSION, FIRST], No(E::EPERM), No(E::ENOSYS))
            .ours(No(E::EACCES), OWN_CONTROL),
    ];
    run(domain, 36, &table)
}

fn machine_check(domain: &mut Domain) -> Verdict {
    const VERSION: (usize, u32) = (1, 0x01ec_c003);
    let table = [
        row("nowhere", &[NOWHERE], &[], No(E::EPERM), No(E::EFAULT)),
        row("interface version 0", &[ROOM], &[], No(E::EPERM), No(E::EACCES)),
        row("an unknown command", &[ROOM], &[(0, 99), VERSION], No(E::EPERM), No(E::EINVAL)),
        row("notifydomain", &[ROOM], &[(0, 2), VERSION], No(E::EPERM), No(E::EINVAL)),
        row("fetch without a kind", &[ROOM], &[(0, 1), VERSION], No(E::EPERM), No(E::EINVAL))
            .ours(No(E::ENOSYS), "machine checks are not recorded"),
    ];
    run(domain, 48, &table)
}

fn kexec_op(domain: &mut Domain) -> Verdict {
    const LEFT_OUT: &str = "there is no other kernel to start";
    let table = [
        row("get_range", &[3, NOWHERE], &[], No(E::EPERM), No(E::EFAULT)).ours(No(E::ENOSYS), LEFT_OUT),
        // Xen forgets that it meant to answer EINVAL.
        row("load", &[4, NOWHERE], &[], No(E::EPERM), No(E::EFAULT)).ours(No(E::ENOSYS), LEFT_OUT),
        row("unload", &[5, ROOM], &[], No(E::EPERM), Unasked),
        row("kexec", &[0, ROOM], &[], No(E::EPERM), Unasked),
        row("an unknown command", &[77, ROOM], &[], No(E::EPERM), Is(0)).ours(No(E::ENOSYS), LEFT_OUT),
    ];
    run(domain, 37, &table)
}

fn xenoprof_op(domain: &mut Domain) -> Verdict {
    let table = [
        row("init", &[0, ROOM], &[], No(E::ENODEV), No(E::ENODEV)),
        row("init nowhere", &[0, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("reset_active_list", &[1, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("reset_passive_list", &[2, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("set_active", &[3, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("set_passive", &[4, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("reserve_counters", &[5, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("counter", &[6, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("setup_events", &[7, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("enable_virq", &[8, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("start", &[9, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("stop", &[10, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("disable_virq", &[11, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("release_counters", &[12, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("shutdown", &[13, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("set_backtrace", &[15, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("get_ibs_caps", &[16, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("ibs_counter", &[17, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("an unknown command", &[18, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row("a command below 0", &[u64::MAX, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
    ];
    run(domain, 31, &table)
}

fn hvm_op(domain: &mut Domain) -> Verdict {
    let table = [
        row("set_param nowhere", &[0, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("set_param of itself", &[0, ROOM], &[(0, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("set_param of nobody", &[0, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("set_param past the last", &[0, ROOM], &[(0, NOBODY), (1, 39)], No(E::EINVAL), No(E::EINVAL)),
        row("get_param nowhere", &[1, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("get_param of itself", &[1, ROOM], &[(0, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("get_param of nobody", &[1, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("get_param past the last", &[1, ROOM], &[(0, NOBODY), (1, 39)], No(E::EINVAL), No(E::EINVAL)),
        row("set_pci_intx_level", &[2, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("set_isa_irq_level", &[3, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("set_pci_link_route", &[4, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("flush_tlbs", &[5, 0], &[], No(E::EINVAL), No(E::EINVAL)),
        row("flush_tlbs with an argument", &[5, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row("track_dirty_vram", &[6, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("modified_memory", &[7, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("set_mem_type", &[8, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("pagetable_dying nowhere", &[9, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("pagetable_dying of nobody", &[9, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("pagetable_dying of itself", &[9, ROOM], &[(0, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("pagetable_dying of the first", &[9, ROOM], &[(0, 0)], No(E::EOPNOTSUPP), No(E::EINVAL)),
        row("get_time", &[10, ROOM], &[], Is(0), Is(0)),
        row("get_time nowhere", &[10, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("xentrace", &[11, ROOM], &[], Is(0), Is(0)),
        row("xentrace of 29 bytes", &[11, ROOM], &[(0, 29 << 16)], No(E::EINVAL), No(E::EINVAL)),
        row("xentrace of a large event", &[11, ROOM], &[(0, 0x1000)], No(E::EINVAL), No(E::EINVAL)),
        row("xentrace nowhere", &[11, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("set_mem_access", &[12, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("get_mem_access", &[13, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("inject_trap", &[14, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("get_mem_type nowhere", &[15, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("get_mem_type of nobody", &[15, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("get_mem_type of itself", &[15, ROOM], &[(0, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("get_mem_type of the first", &[15, ROOM], &[(0, 0)], No(E::EPERM), No(E::EINVAL)),
        row("create_ioreq_server", &[17, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("set_evtchn_upcall_vector", &[23, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row("guest_request_vm_event", &[24, 0], &[], Is(0), Is(0)),
        row("guest_request_vm_event with an argument", &[24, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row("altp2m", &[25, ROOM], &[], No(E::EOPNOTSUPP), No(E::EOPNOTSUPP)),
        row("an unknown command", &[26, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
    ];
    run(domain, 34, &table)
}

fn dm_op(domain: &mut Domain) -> Verdict {
    const ONE: u64 = 1;
    let table = [
        row("no buffers", &[OWN as u64, 0, 0], &[], No(E::ENODATA), No(E::ENODATA)),
        row("three buffers", &[OWN as u64, 3, 0], &[], No(E::E2BIG), No(E::E2BIG)),
        row("a buffer nowhere", &[OWN as u64, ONE, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("itself", &[OWN as u64, ONE, ROOM], &[], No(E::EPERM), No(E::EPERM)),
        row("DOMID_SELF", &[SELF as u64, ONE, ROOM], &[], No(E::ESRCH), No(E::ESRCH)),
        row("nobody", &[NOBODY as u64, ONE, ROOM], &[], No(E::ESRCH), No(E::ESRCH)),
        row("a PV domain", &[0, ONE, ROOM], &[], No(E::EINVAL), Unasked),
    ];
    run(domain, 41, &table)
}

fn hypfs_op(domain: &mut Domain) -> Verdict {
    const LEFT_OUT: &str = "there is no tree of parameters";
    let table = [
        row("get_version", &[0], &[], No(E::EPERM), Is(1)).ours(No(E::ENOSYS), LEFT_OUT),
        row("get_version with arguments", &[0, 1], &[], No(E::EPERM), No(E::EINVAL))
            .ours(No(E::ENOSYS), LEFT_OUT),
        row("read", &[1, NOWHERE, 4, NOWHERE, 100], &[], No(E::EPERM), No(E::EFAULT))
            .ours(No(E::ENOSYS), LEFT_OUT),
        row("write_contents", &[2, NOWHERE, 4], &[], No(E::EPERM), Unasked),
        row("an unknown command", &[9], &[], No(E::EPERM), No(E::EINVAL)).ours(No(E::ENOSYS), LEFT_OUT),
    ];
    run(domain, 42, &table)
}

fn xenpmu_op(domain: &mut Domain) -> Verdict {
    // Xen has virtual counters only when it is told so at boot.
    let off = |what, arguments| row(what, arguments, &[], No(E::EOPNOTSUPP), No(E::EOPNOTSUPP));
    let table = [
        off("mode_get", &[0, ROOM]),
        off("mode_set", &[1, ROOM]),
        off("feature_get", &[2, ROOM]),
        off("feature_set", &[3, ROOM]),
        off("init", &[4, ROOM]),
        off("finish", &[5, ROOM]),
        off("lvtpc_set", &[6, ROOM]),
        off("flush", &[7, ROOM]),
        off("an unknown command", &[8, NOWHERE]),
    ];
    run(domain, 40, &table)
}

fn what_is_gone_or_not_built(domain: &mut Domain) -> Verdict {
    for number in
        [11, 27, 38, 39, 43, 44, 45, 46, 47, 50, 51, 52, 53, 54, 55, 56, 57, 63, 64, 1 << 32, u64::MAX]
    {
        let table = [
            row("0", &[0, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
            row("1", &[1, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
            row("ROOM", &[ROOM, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        ];
        run(domain, number, &table)?;
    }
    // Number 49 is for continuations of Xen's own.
    const VERSION: (usize, u32) = (1, 0x15);
    let table = [
        row("nowhere", &[NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("no domctl", &[ROOM], &[], No(E::EOPNOTSUPP), No(E::EOPNOTSUPP)),
        row("shadow_op of nobody", &[ROOM], &[(0, 10), VERSION, (2, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("shadow_op of the first", &[ROOM], &[(0, 10), VERSION, (2, 0)], No(E::EPERM), Unasked),
        row("another domctl", &[ROOM], &[(0, 3), VERSION, (2, 0)], No(E::EOPNOTSUPP), No(E::EOPNOTSUPP)),
    ];
    run(domain, 49, &table)
}

/// Word of `domid` in a reservation.
const RESERVATION_DOMID: usize = 6;

fn memory_of_others(domain: &mut Domain) -> Verdict {
    let table = [
        row("increase of nobody", &[0, ROOM], &[(2, 1), (RESERVATION_DOMID, NOBODY)], Is(0), Is(0)),
        row("increase of the first", &[0, ROOM], &[(2, 1), (RESERVATION_DOMID, 0)], Is(0), Unasked),
        row("increase nowhere", &[0, NOWHERE], &[], Is(0), Is(0)),
        row("increase from extent 5", &[5 << 6, NOWHERE], &[], Is(5), Is(5)),
        row("current_reservation of nobody", &[3, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("current_reservation of the first", &[3, ROOM], &[(0, 0)], No(E::EPERM), Works),
        row("current_reservation of DOMID_IO", &[3, ROOM], &[(0, 0x7ff1)], No(E::ESRCH), No(E::ESRCH)),
        row("current_reservation of DOMID_XEN", &[3, ROOM], &[(0, 0x7ff2)], No(E::ESRCH), No(E::ESRCH)),
        row("current_reservation nowhere", &[3, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row(
            "current_reservation from an extent",
            &[3 | 1 << 6, ROOM],
            &[(0, SELF)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row(
            "maximum_reservation from an extent",
            &[4 | 1 << 6, ROOM],
            &[(0, SELF)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row("maximum_gpfn from an extent", &[14 | 1 << 6, ROOM], &[(0, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("maximum_reservation of the first", &[4, ROOM], &[(0, 0)], No(E::EPERM), Works),
        row("maximum_gpfn of the first", &[14, ROOM], &[(0, 0)], No(E::EPERM), Works),
        row("maximum_gpfn of nobody", &[14, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("exchange nowhere", &[11, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("exchange from an extent", &[11 | 1 << 6, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row(
            "claim_pages for nobody",
            &[24, ROOM],
            &[(2, 1), (RESERVATION_DOMID, NOBODY)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row(
            "claim_pages for DOMID_SELF",
            &[24, ROOM],
            &[(2, 1), (RESERVATION_DOMID, SELF)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row("claim_pages for itself", &[24, ROOM], &[(2, 0), (RESERVATION_DOMID, OWN)], No(E::EPERM), Is(0)),
        // More than it has, and then nothing again.
        row(
            "claim_pages of 160 MiB",
            &[24, ROOM],
            &[(2, 40960), (RESERVATION_DOMID, OWN)],
            No(E::EPERM),
            Is(0),
        )
        .ours(No(E::ENOSYS), "frames are taken when they are given"),
        row("claim_pages of nothing", &[24, ROOM], &[(RESERVATION_DOMID, OWN)], No(E::EPERM), Is(0)),
        row(
            "claim_pages with a list",
            &[24, ROOM],
            &[(0, 1), (RESERVATION_DOMID, OWN)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row(
            "claim_pages of order 1",
            &[24, ROOM],
            &[(4, 1), (RESERVATION_DOMID, OWN)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row(
            "claim_pages with flags",
            &[24, ROOM],
            &[(5, 1), (RESERVATION_DOMID, OWN)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row("claim_pages nowhere", &[24, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("claim_pages from an extent", &[24 | 1 << 6, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row("set_memory_map nowhere", &[13, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("set_memory_map of nobody", &[13, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("set_memory_map of the first", &[13, ROOM], &[(0, 0)], No(E::EPERM), Unasked),
        row("set_memory_map too long", &[13, ROOM], &[(0, SELF), (2, 1025)], No(E::EINVAL), No(E::EINVAL)),
        row(
            "set_memory_map from nowhere",
            &[13, ROOM],
            &[(0, SELF), (2, 1), (4, 0x1000), (5, 0x7000)],
            No(E::EFAULT),
            No(E::EFAULT),
        ),
        row("get_vnumainfo of itself", &[26, ROOM], &[(0, SELF)], No(E::EOPNOTSUPP), No(E::EOPNOTSUPP)),
        row("get_vnumainfo of nobody", &[26, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("get_vnumainfo of the first", &[26, ROOM], &[(0, 0)], No(E::EPERM), No(E::EOPNOTSUPP)),
        row("get_vnumainfo with padding", &[26, ROOM], &[(0, SELF | 1 << 16)], No(E::EINVAL), No(E::EINVAL)),
        row("get_vnumainfo nowhere", &[26, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("acquire_resource nowhere", &[28, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("acquire_resource of nobody", &[28, ROOM], &[(0, NOBODY | 1 << 16)], No(E::ESRCH), No(E::ESRCH)),
        row(
            "acquire_resource of DOMID_SELF",
            &[28, ROOM],
            &[(0, SELF | 1 << 16)],
            No(E::ESRCH),
            No(E::ESRCH),
        ),
        row("acquire_resource of the first", &[28, ROOM], &[(0, 1 << 16)], No(E::EPERM), No(E::EPERM)),
        row(
            "acquire_resource with padding",
            &[28, ROOM],
            &[(0, NOBODY | 1 << 16), (3, 1)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row(
            "acquire_resource from a large frame",
            &[28, ROOM],
            &[(0, NOBODY | 1 << 16), (5, 1)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row(
            "acquire_resource past the last frame",
            &[28, ROOM],
            &[(0, NOBODY | 1 << 16), (2, 1), (4, u32::MAX)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
    ];
    run(domain, 12, &table)
}

fn memory_of_translated_guests(domain: &mut Domain) -> Verdict {
    let table = [
        row("add_to_physmap nowhere", &[7, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("add_to_physmap of itself", &[7, ROOM], &[(0, SELF)], No(E::EACCES), No(E::EACCES)),
        row("add_to_physmap of nobody", &[7, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row(
            "add_to_physmap of a foreign frame",
            &[7, ROOM],
            &[(0, NOBODY), (1, 4)],
            No(E::ENOSYS),
            No(E::ENOSYS),
        ),
        row(
            "add_to_physmap from a far extent",
            &[7 | 0x10000 << 6, ROOM],
            &[(0, SELF)],
            No(E::EDOM),
            No(E::EDOM),
        ),
        row("add_to_physmap_batch nowhere", &[23, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("add_to_physmap_batch of itself", &[23, ROOM], &[(0, SELF)], No(E::EACCES), No(E::EACCES)),
        row("add_to_physmap_batch of nobody", &[23, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row(
            "add_to_physmap_batch of a range",
            &[23, ROOM],
            &[(0, SELF | 3 << 16)],
            No(E::EOPNOTSUPP),
            No(E::EOPNOTSUPP),
        ),
        row(
            "add_to_physmap_batch from a far extent",
            &[23 | 0x10000 << 6, ROOM],
            &[(0, SELF)],
            No(E::EDOM),
            No(E::EDOM),
        ),
        row("remove_from_physmap nowhere", &[15, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("remove_from_physmap of itself", &[15, ROOM], &[(0, SELF)], No(E::EACCES), No(E::EACCES)),
        row("remove_from_physmap of nobody", &[15, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row(
            "remove_from_physmap from an extent",
            &[15 | 1 << 6, ROOM],
            &[(0, SELF)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row("set_pod_target nowhere", &[16, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("set_pod_target of itself", &[16, ROOM], &[(8, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("set_pod_target of nobody", &[16, ROOM], &[(8, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("get_pod_target of itself", &[17, ROOM], &[(8, SELF)], No(E::EINVAL), No(E::EINVAL)),
        row("get_pod_target of nobody", &[17, ROOM], &[(8, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("get_sharing_freed_pages", &[18, NOWHERE], &[], Is(0), Is(0)),
        row("get_sharing_shared_pages", &[19, NOWHERE], &[], Is(0), Is(0)),
        row("paging_op", &[20, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("sharing_op", &[22, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("access_op nowhere", &[21, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("access_op of itself", &[21, ROOM], &[(0, OWN << 16)], Unasked, Unasked),
        row("access_op of the first", &[21, ROOM], &[], No(E::EINVAL), No(E::EPERM)),
        row("access_op of nobody", &[21, ROOM], &[(0, NOBODY << 16)], No(E::ESRCH), No(E::ESRCH)),
        row("an unknown command", &[8, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("the first number not used", &[29, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("the last number", &[63, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
    ];
    run(domain, 12, &table)
}

fn memory_queries(domain: &mut Domain) -> Verdict {
    let table = [
        row("maximum_ram_page", &[2, NOWHERE], &[], Works, Works),
        row("maximum_ram_page from an extent", &[2 | 1 << 6], &[], No(E::EINVAL), No(E::EINVAL)),
        row("machphys_mfn_list nowhere", &[5, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("machphys_mfn_list of no extents", &[5, ROOM], &[], Is(0), Is(0)),
        row(
            "machphys_mfn_list to nowhere",
            &[5, ROOM],
            &[(0, 8), (2, 0), (3, 0x7000)],
            No(E::EFAULT),
            No(E::EFAULT),
        ),
        row("machphys_mfn_list from an extent", &[5 | 1 << 6, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("machphys_compat_mfn_list", &[25, ROOM], &[], No(E::EOPNOTSUPP), No(E::EOPNOTSUPP)),
        row("machphys_mapping nowhere", &[12, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("machphys_mapping", &[12, ROOM], &[], Is(0), Is(0)),
        row("memory_map nowhere", &[9, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("machine_memory_map nowhere", &[10, NOWHERE], &[], No(E::EPERM), No(E::EFAULT)),
        row(
            "machine_memory_map with one entry",
            &[10, ROOM],
            &[(0, 1), (2, 0), (3, 0x7000)],
            No(E::EPERM),
            No(E::EINVAL),
        ),
        row(
            "machine_memory_map to nowhere",
            &[10, ROOM],
            &[(0, 200), (2, 0), (3, 0x7000)],
            No(E::EPERM),
            No(E::EFAULT),
        ),
        row("machine_memory_map without a buffer", &[10, ROOM], &[], No(E::EPERM), Is(0)),
        row("reserved_device_memory_map nowhere", &[27, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("reserved_device_memory_map", &[27, ROOM], &[(0, 1)], Is(0), Is(0)),
        row("reserved_device_memory_map with flags", &[27, ROOM], &[(0, 2)], No(E::EINVAL), No(E::EINVAL)),
        row(
            "reserved_device_memory_map from an extent",
            &[27 | 1 << 6, ROOM],
            &[],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
    ];
    run(domain, 12, &table)
}

/// What `physdev_op` answers on a machine where this domain has been given no device.
fn devices() -> Vec<Row> {
    const NO_DEVICES: &str = "Xenolith knows no PCI devices";
    vec![
        row("0", &[0, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("3", &[3, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("IRQ_UNMASK_NOTIFY", &[4, NOWHERE], &[], Is(0), Is(0)),
        row("irq_status_query nowhere", &[5, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("irq_status_query 0", &[5, ROOM], &[(0, 0)], Is(0), Is(0)),
        row("irq_status_query 4096", &[5, ROOM], &[(0, 4096)], No(E::EINVAL), No(E::EINVAL)),
        row("set_iopl nowhere", &[6, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("set_iopl 4", &[6, ROOM], &[(0, 4)], No(E::EINVAL), No(E::EINVAL)),
        row("set_iopl 0", &[6, ROOM], &[(0, 0)], Is(0), Is(0)),
        row("set_iobitmap nowhere", &[7, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("set_iobitmap of 65537 ports", &[7, ROOM], &[(2, 65537)], No(E::EINVAL), No(E::EINVAL)),
        row("apic_read nowhere", &[8, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("apic_read of no controller", &[8, ROOM], &[(0, 0x1000)], No(E::EPERM), No(E::EINVAL)),
        row("apic_write nowhere", &[9, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("apic_write of no controller", &[9, ROOM], &[(0, 0x1000)], No(E::EPERM), No(E::EINVAL)),
        row("alloc_irq_vector nowhere", &[10, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("alloc_irq_vector", &[10, ROOM], &[(0, 5)], No(E::EPERM), Is(0)),
        row("free_irq_vector", &[11, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("eoi nowhere", &[12, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("eoi 4096", &[12, ROOM], &[(0, 4096)], No(E::EINVAL), No(E::EINVAL)),
        row("map_pirq nowhere", &[13, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("map_pirq of nobody", &[13, ROOM], &[(0, NOBODY), (1, 1), (2, 9)], No(E::ESRCH), No(E::ESRCH)),
        row("map_pirq of itself", &[13, ROOM], &[(0, SELF), (1, 1), (2, 9), (3, 9)], No(E::EPERM), Unasked),
        row("map_pirq of no kind", &[13, ROOM], &[(0, SELF), (1, 77)], No(E::EPERM), No(E::EINVAL)),
        row(
            "map_pirq of several with a table",
            &[13, ROOM],
            &[(0, SELF), (1, 4), (8, 0x1000)],
            No(E::EINVAL),
            No(E::EINVAL),
        ),
        row("unmap_pirq nowhere", &[14, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("unmap_pirq of nobody", &[14, ROOM], &[(0, NOBODY)], No(E::ESRCH), No(E::ESRCH)),
        row("unmap_pirq of itself", &[14, ROOM], &[(0, SELF), (1, 4000)], No(E::EPERM), No(E::EINVAL)),
        row("manage_pci_add nowhere", &[15, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("manage_pci_add", &[15, ROOM], &[], No(E::EPERM), Unasked).ours(No(E::ENOSYS), NO_DEVICES),
        row("manage_pci_remove nowhere", &[16, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("manage_pci_remove", &[16, ROOM], &[(0, 0xff77)], No(E::EPERM), No(E::ENODEV)),
        row("pirq_eoi_gmfn_v1 nowhere", &[17, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("pirq_eoi_gmfn_v1 of no frame", &[17, ROOM], &[(1, 1)], No(E::EINVAL), No(E::EINVAL)),
        row("18", &[18, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("restore_msi nowhere", &[19, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("restore_msi", &[19, ROOM], &[(0, 0xff77)], No(E::ENODEV), No(E::ENODEV)),
        row("manage_pci_add_ext nowhere", &[20, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("manage_pci_add_ext", &[20, ROOM], &[], No(E::EPERM), Unasked).ours(No(E::ENOSYS), NO_DEVICES),
        row("manage_pci_add_ext of no kind", &[20, ROOM], &[(1, 2)], No(E::EINVAL), No(E::EINVAL)),
        row("setup_gsi nowhere", &[21, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("setup_gsi -1", &[21, ROOM], &[(0, u32::MAX)], No(E::EINVAL), No(E::EINVAL)),
        row("setup_gsi 4096", &[21, ROOM], &[(0, 4096)], No(E::EINVAL), No(E::EINVAL)),
        row("setup_gsi 5", &[21, ROOM], &[(0, 5)], No(E::EPERM), Unasked),
        row("22", &[22, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("get_free_pirq nowhere", &[23, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("get_free_pirq", &[23, ROOM], &[(0, 1)], Is(0), Is(0)),
        row("pci_mmcfg_reserved nowhere", &[24, NOWHERE], &[], No(E::EPERM), No(E::EFAULT)),
        row("pci_mmcfg_reserved", &[24, ROOM], &[(0, 0x1000)], No(E::EPERM), No(E::ENODEV)),
        row("pci_device_add nowhere", &[25, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("pci_device_add", &[25, ROOM], &[], No(E::EPERM), Unasked).ours(No(E::ENOSYS), NO_DEVICES),
        row("pci_device_remove nowhere", &[26, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("pci_device_remove", &[26, ROOM], &[(0, 0xff77_0000)], No(E::EPERM), No(E::ENODEV)),
        row("restore_msi_ext", &[27, ROOM], &[(0, 0xff77_0000)], No(E::ENODEV), No(E::ENODEV)),
        row("pirq_eoi_gmfn_v2 of no frame", &[28, ROOM], &[(1, 1)], No(E::EINVAL), No(E::EINVAL)),
        row("dbgp_op nowhere", &[29, NOWHERE], &[], No(E::EPERM), No(E::EFAULT)),
        row("prepare_msix nowhere", &[30, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("prepare_msix", &[30, ROOM], &[(0, 0xff77_0000)], No(E::EPERM), No(E::ENODEV)),
        row("release_msix", &[31, ROOM], &[(0, 0xff77_0000)], No(E::EPERM), No(E::ENODEV)),
        row("32", &[32, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
    ]
}

fn interrupts_and_devices(domain: &mut Domain) -> Verdict {
    run(domain, 33, &devices())
}

fn interrupts_in_the_old_form(domain: &mut Domain) -> Verdict {
    // The command is the first word, the argument begins at byte 8.
    let table = [
        row("nowhere", &[NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("0", &[ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
        row("IRQ_UNMASK_NOTIFY", &[ROOM], &[(0, 4)], Is(0), Is(0)),
        row("irq_status_query 4096", &[ROOM], &[(0, 5), (2, 4096)], No(E::EINVAL), No(E::EINVAL)),
        row("set_iopl 4", &[ROOM], &[(0, 6), (2, 4)], No(E::EINVAL), No(E::EINVAL)),
        row("set_iopl 0", &[ROOM], &[(0, 6)], Is(0), Is(0)),
        row("apic_read of no controller", &[ROOM], &[(0, 8), (2, 0x1000)], No(E::EPERM), No(E::EINVAL)),
        row("alloc_irq_vector", &[ROOM], &[(0, 10), (2, 5)], No(E::EPERM), Is(0)),
        row("eoi 4096", &[ROOM], &[(0, 12), (2, 4096)], No(E::EINVAL), No(E::EINVAL)),
        row("setup_gsi 4096", &[ROOM], &[(0, 21), (2, 4096)], No(E::EINVAL), No(E::EINVAL)),
        row("an unknown command", &[ROOM], &[(0, 1000)], No(E::ENOSYS), No(E::ENOSYS)),
    ];
    run(domain, 19, &table)
}

fn version_queries(domain: &mut Domain) -> Verdict {
    const NO_BUILD_ID: &str = "there is none: it would differ between builds that are otherwise the same";
    let table = [
        row("version", &[0, NOWHERE], &[], Is(0x4_0011), Is(0x4_0011)),
        row("extraversion nowhere", &[1, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("get_features 1", &[6, ROOM], &[(0, 1)], No(E::EINVAL), No(E::EINVAL)),
        row("pagesize", &[7, 0], &[], Is(4096), Is(4096)),
        row("pagesize with an argument", &[7, ROOM], &[], No(E::EINVAL), No(E::EINVAL)),
        row("commandline", &[9, ROOM], &[], Is(0), Is(0)),
        row("commandline nowhere", &[9, NOWHERE], &[], No(E::EFAULT), No(E::EFAULT)),
        row("build_id", &[10, 0], &[], No(E::EPERM), Is(20)).ours(No(E::ENODATA), NO_BUILD_ID),
        row("build_id nowhere", &[10, NOWHERE], &[], No(E::EPERM), No(E::EFAULT)),
        row("build_id into nothing", &[10, ROOM], &[], No(E::EPERM), No(E::EINVAL)),
        row("build_id into too little", &[10, ROOM], &[(0, 1)], No(E::EPERM), No(E::ENOBUFS))
            .ours(No(E::ENODATA), NO_BUILD_ID),
        row("an unknown query", &[11, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS)),
    ];
    run(domain, 17, &table)
}

fn commands_are_32_bits(domain: &mut Domain) -> Verdict {
    // Xen takes commands as an int: whatever a compiler left in the upper half is not looked at.
    const HIGH: u64 = 0xdead_beef << 32;
    run(domain, 17, &[row("version", &[HIGH, 0], &[], Is(0x4_0011), Is(0x4_0011))])?;
    run(domain, 33, &[row("set_iopl", &[HIGH | 6, ROOM], &[], Is(0), Is(0))])?;
    run(
        domain,
        21,
        &[
            row("vm_assist", &[HIGH, HIGH | 4], &[], Is(0), Is(0)),
            row("off", &[HIGH | 1, HIGH | 4], &[], Is(0), Is(0)),
        ],
    )?;
    run(domain, 24, &[row("is_up", &[HIGH | 3, HIGH], &[], Is(1), Is(1))])?;
    run(domain, 29, &[row("yield", &[HIGH], &[], Is(0), Is(0))])?;
    run(domain, 9, &[row("get_debugreg", &[HIGH], &[], Works, Works)])?;
    // These take a long.
    run(domain, 34, &[row("get_time", &[HIGH | 10, ROOM], &[], No(E::ENOSYS), No(E::ENOSYS))])?;
    run(domain, 12, &[row("maximum_ram_page", &[HIGH | 2], &[], No(E::EINVAL), No(E::EINVAL))])
}

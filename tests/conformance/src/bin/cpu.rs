//! CPUID and model-specific registers, row by row: what the hypervisor answers, compared by rule with what the processor has.
//!
//! CPUID is asked by the forced-emulation prefix, and of the processor itself, which answers guests wherever it cannot make CPUID
//! fault (as QEMU's). The case `dump` prints everything, for a comparison of two hypervisors line by line:
//! `cargo xtask boot conf-cpu --cmdline only=dump`, and again with `--on xen`.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{by_privilege, is_privileged, is_xenolith, sched};
use core::ops::RangeInclusive;
use guest_sdk::abi::subops::SchedOp;
use guest_sdk::memory::{Access, Page};
use guest_sdk::rt::trap::Exception;
use guest_sdk::testkit::{self, Verdict, cases, check, check_eq, expect_vector, probe, skip, user};
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            cpuid_leaves_0_and_80000000,
            cpuid_leaf_1,
            cpuid_leaf_7,
            cpuid_leaf_80000001,
            cpuid_leaves_of_the_processor,
            cpuid_leaves_that_are_hidden,
            cpuid_leaves_of_the_hypervisor,
            cpuid_of_user_mode,
            xcr0_is_the_guests,
            msr_of_each_row,
            msr_others_do_not_exist,
            msr_values_are_kept,
            tsc_aux_is_the_guests,
            dump,
        ],
    )
}

/// CPUID as the hypervisor answers it.
fn forced(leaf: u32, sub: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: the prefix asks the hypervisor to emulate the instruction; rbx is LLVM's.
    unsafe {
        core::arch::asm!(
            "push rbx", ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e", "cpuid", "mov {b}, rbx", "pop rbx",
            b = out(reg) b, inlateout("eax") leaf => a, inlateout("ecx") sub => c, lateout("edx") d,
        );
    }
    [a, b as u32, c, d]
}

/// CPUID as the processor answers it.
fn native(leaf: u32, sub: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

fn read_msr(number: u32) -> Result<u64, Exception> {
    let (low, high): (u64, u64);
    probe!("rdmsr", "mov {low}, rax", "mov {high}, rdx"; low = out(reg) low, high = out(reg) high, in("ecx") number, out("rdx") _)?;
    Ok(low | high << 32)
}

fn write_msr(number: u32, value: u64) -> Result<(), Exception> {
    probe!(rax = value & 0xffff_ffff, "wrmsr"; in("ecx") number, in("edx") (value >> 32) as u32)
}

/// The rules of this file are those for AMD's processors, which QEMU's is.
fn only_amd() -> Verdict {
    if native(0, 0)[1] == u32::from_le_bytes(*b"Auth") { Ok(()) } else { skip("not a processor of AMD's") }
}

/// A mask with these bits.
const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < N {
        mask |= 1 << numbers[i];
        i += 1;
    }
    mask
}

/// Leaf 1 ecx: SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AESNI XSAVE AVX F16C RDRAND.
const FEATURES_1C: u32 = bits([0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// Leaf 1 edx: FPU DE TSC MSR PAE MCE CX8 APIC MCA CMOV PAT CLFLUSH ACPI MMX FXSR SSE SSE2 SS.
const FEATURES_1D: u32 = bits([0, 2, 4, 5, 6, 7, 8, 9, 14, 15, 16, 19, 22, 23, 24, 25, 26, 27]);
/// Leaf 7 ebx: FSGSBASE BMI1 AVX2 FDP_EXCP_ONLY BMI2 ERMS NO_FPU_SEL RDSEED ADX CLFLUSHOPT CLWB SHA.
const FEATURES_7B: u32 = bits([0, 3, 5, 6, 8, 9, 13, 18, 19, 23, 24, 29]);
/// Leaf 7 ecx: GFNI VAES VPCLMULQDQ RDPID CLDEMOTE.
const FEATURES_7C: u32 = bits([8, 9, 10, 22, 25]);
/// Leaf 0x80000001 ecx: LAHF ABM SSE4A MISALIGNSSE 3DNOWPREFETCH XOP FMA4 TBM.
const FEATURES_E1C: u32 = bits([0, 5, 6, 7, 8, 11, 16, 21]);
/// Leaf 0x80000001 edx: SYSCALL NX MMXEXT FFXSR RDTSCP LM 3DNOWEXT 3DNOW.
const FEATURES_E1D: u32 = bits([11, 20, 22, 25, 27, 29, 30, 31]);
/// What leaf 0x80000001 edx repeats of leaf 1 edx.
const COMMON: u32 = 0x0183_f3ff;
const MTRR: u32 = 1 << 12;
const SPEEDSTEP: u32 = 1 << 7;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
const RDTSCP: u32 = 1 << 27;

fn cpuid_leaves_0_and_80000000(_: &mut Domain) -> Verdict {
    only_amd()?;
    for leaf in [0, 0x8000_0000] {
        let ([max, b, c, d], [most, ..]) = (forced(leaf, 0), native(leaf, 0));
        check_eq!([b, c, d], [0x6874_7541, 0x444d_4163, 0x6974_6e65], "AuthenticAMD");
        check!(max <= most && max & 0xffff > 0, "{leaf:#x}: {max:#x} of {most:#x}");
    }
    check!(forced(0, 0)[0] <= 0xd);
    Ok(())
}

fn cpuid_leaf_1(_: &mut Domain) -> Verdict {
    only_amd()?;
    let ([a, b, c, d], [na, nb, nc, nd]) = (forced(1, 0), native(1, 0));
    check_eq!(a, na & 0x0fff_0fff, "model");
    // No APIC number, no count of threads; the size of a cache line.
    check_eq!(b, nb & 0xffff);
    // Kernels rely on seeing the hypervisor's OSXSAVE here. The first domain's kernel sees two more.
    let osxsave = if nc & 1 << 26 != 0 { OSXSAVE } else { 0 };
    check_eq!(c, nc & FEATURES_1C | HYPERVISOR | osxsave | nc & by_privilege(SPEEDSTEP, 0), "ecx");
    check_eq!(d, nd & FEATURES_1D | nd & by_privilege(MTRR, 0), "edx");
    check!(d & 1 << 25 != 0, "SSE");
    Ok(())
}

fn cpuid_leaf_7(_: &mut Domain) -> Verdict {
    only_amd()?;
    if forced(0, 0)[0] < 7 {
        return skip("this processor has no leaf 7");
    }
    let ([a, b, c, _], [_, nb, nc, _]) = (forced(7, 0), native(7, 0));
    check_eq!((a, b, c), (0, nb & FEATURES_7B, nc & FEATURES_7C));
    check!(b != 0, "nothing at all");
    for sub in [1, 2, 3, u32::MAX] {
        check_eq!(forced(7, sub), [0; 4], "subleaf {sub}");
    }
    Ok(())
}

fn cpuid_leaf_80000001(_: &mut Domain) -> Verdict {
    only_amd()?;
    let ([a, b, c, d], [_, nb, nc, nd]) = (forced(0x8000_0001, 0), native(0x8000_0001, 0));
    check_eq!((a, b), (forced(1, 0)[0], nb & 0xff00_ffff));
    check_eq!(c, nc & FEATURES_E1C, "ecx");
    let common = forced(1, 0)[3] & COMMON;
    check_eq!(d, nd & FEATURES_E1D | common, "edx");
    check_eq!(d & MTRR != 0, nd & MTRR != 0 && is_privileged(), "MTRR");
    check!(d & 1 << 29 != 0, "long mode");
    Ok(())
}

fn cpuid_leaves_of_the_processor(_: &mut Domain) -> Verdict {
    only_amd()?;
    // Its name, its caches, its address widths.
    for leaf in 0x8000_0002..=0x8000_0006 {
        check_eq!(forced(leaf, 0), native(leaf, 0), "{leaf:#x}");
    }
    let ([a, ..], [na, ..]) = (forced(0x8000_0008, 0), native(0x8000_0008, 0));
    check_eq!(a, na & 0xffff);
    check!(a & 0xff >= 36, "{a:#x}");
    Ok(())
}

fn cpuid_leaves_that_are_hidden(_: &mut Domain) -> Verdict {
    only_amd()?;
    let max = forced(0, 0)[0];
    let extended = forced(0x8000_0000, 0)[0];
    check!(max >= 1 && extended >= 0x8000_0008, "{max:#x} {extended:#x}");
    // Serial number, caches (Intel's), MONITOR, temperature, DCA, counters, topology, resource control; behind the maxima.
    let basic = (2..=6).chain(8..=0xc).chain(max + 1..0x40);
    // Virtualization, what leaves 0xb to 0x18 and 0x1b to 0x20 are about, behind the maxima.
    let more = (0x8000_0009..=0x8000_0018).chain(0x8000_001b..=0x8000_0020).chain(extended + 1..0x8000_0040);
    for leaf in basic.chain(more).chain([0x4000_0100, 0x4000_01ff, 0x8000_0100, 0xc000_0000, u32::MAX]) {
        check_eq!(forced(leaf, 0), [0; 4], "{leaf:#x}");
    }
    Ok(())
}

fn cpuid_leaves_of_the_hypervisor(_: &mut Domain) -> Verdict {
    check_eq!(forced(0x4000_0000, 0), [0x4000_0005, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566e], "XenVMMXenVMM");
    check_eq!(forced(0x4000_0001, 0), [0x0004_0011, 0, 0, 0], "version");
    // One page of hypercalls by the register 0x40000000, and updates that preserve accessed and dirty.
    check_eq!(forced(0x4000_0002, 0), [1, 0x4000_0000, 1, 0]);
    let [flags, mode, khz, incarnation] = forced(0x4000_0003, 0);
    let machine_khz = forced(0x4000_0003, 2)[0];
    let rdtscp = native(0x8000_0001, 0)[3] & RDTSCP != 0;
    check_eq!(flags & 4 != 0, rdtscp, "RDTSCP");
    let [_, _, scale, shift] = forced(0x4000_0003, 1);
    if is_privileged() {
        check_eq!((flags & 1, mode, khz, incarnation, scale, shift), (0, 0, 0, 0, 0, 0), "the first domain");
    } else {
        // Xen's default is to emulate a counter that is not reliable; Xenolith never does.
        check_eq!((flags & 1, mode), if is_xenolith() { (0, 2) } else { (flags & 1, 0) });
        check_eq!((khz, incarnation), (machine_khz, 1));
        check!(scale != 0, "no scale");
    }
    check!(machine_khz > 100_000, "{machine_khz} kHz");
    check_eq!(forced(0x4000_0003, 2)[1..], [0; 3]);
    check_eq!(forced(0x4000_0003, 3), [0; 4]);
    check_eq!(forced(0x4000_0004, 0), [0; 4], "for guests of another kind");
    let [a, width, c, d] = forced(0x4000_0005, 0);
    check_eq!([a, c, d], [0; 3]);
    check!((28..=52).contains(&width), "machine addresses of {width} bits");
    check_eq!(forced(0x4000_0006, 0), [0; 4]);
    Ok(())
}

const TEXT: u64 = 0x1000_0000;
const DATA: u64 = 0x1100_0000;

fn cpuid_of_user_mode(_: &mut Domain) -> Verdict {
    only_amd()?;
    let mut space = user::Space::new()?;
    let mut text = Page::new()?;
    // ud2; "xen"; cpuid; syscall
    let code = [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2, 0x0f, 0x05];
    text.bytes_mut()[..code.len()].copy_from_slice(&code);
    space.map(TEXT, text, Access::ReadExecute)?;
    space.map(DATA, Page::new()?, Access::ReadWrite)?;
    let mut frame = user::registers(TEXT, DATA + 0x800);
    (frame.rax, frame.rcx) = (1, 0);
    let mut back = user::run(&space, &frame)?;
    while user::exit_of(&back) == user::Exit::Upcall {
        guest_sdk::events::turn();
        back = user::run(&space, &back)?;
    }
    check_eq!(user::exit_of(&back), user::Exit::SystemCall);
    // What only the kernel sees is not there.
    let [a, b, c, d] = forced(1, 0);
    let seen = (back.rax as u32, back.rbx as u32, back.rdx as u32);
    check_eq!(seen, (a, b, d & !MTRR));
    // rcx is the system call's; rbx shows that the instruction was carried out.
    check!(c & HYPERVISOR != 0 && back.rip == TEXT + 9);
    Ok(())
}

fn xgetbv() -> Result<u64, Exception> {
    let (low, high): (u64, u64);
    probe!("xgetbv", "mov {low}, rax", "mov {high}, rdx";
        low = out(reg) low, high = out(reg) high, in("ecx") 0, out("rdx") _)?;
    Ok(low | high << 32)
}

fn xsetbv(number: u32, value: u64) -> Result<(), Exception> {
    probe!(rax = value & 0xffff_ffff, "xsetbv"; in("ecx") number, in("edx") (value >> 32) as u32)
}

fn write_cr4(value: u64) -> Result<(), Exception> {
    probe!(rax = value, "mov cr4, rax")
}

fn xcr0_is_the_guests(_: &mut Domain) -> Verdict {
    const CR4_OSXSAVE: u64 = 1 << 18;
    let [offered, _, largest, _] = forced(0xd, 0);
    if offered == 0 {
        return skip("this processor has no XSAVE");
    }
    check_eq!(forced(0xd, 2), if offered & 4 != 0 { native(0xd, 2) } else { [0; 4] });
    check_eq!(forced(0xd, 3), [0; 4]);
    let cr4: u64;
    probe!("mov rax, cr4", "mov {v}, rax"; v = out(reg) cr4)?;
    // Not before the guest has turned it on.
    write_cr4(cr4 & !CR4_OSXSAVE)?;
    expect_vector(xsetbv(0, 3), 6, 0)?;
    write_cr4(cr4 | CR4_OSXSAVE)?;
    // x87 and SSE are on.
    check_eq!((xgetbv(), forced(0xd, 0)[1]), (Ok(3), 576));
    // Each that may be on, with the size of what is on; the processor's own answer is the same.
    for (value, size) in [(1, 576), (3, 576), (u64::from(offered), largest), (1, 576)] {
        check_eq!(xsetbv(0, value), Ok(()), "{value:#x}");
        check_eq!((xgetbv(), forced(0xd, 0)[1], native(0xd, 0)[1]), (Ok(value), size, size));
        // It stays while others run.
        sched(SchedOp::Yield, &mut 0u64)?;
        check_eq!(xgetbv(), Ok(value));
    }
    // Without x87, AVX without SSE, what is not offered, another register.
    let unknown = !u64::from(offered) & !(1 << 63);
    for (number, value) in [(0, 0), (0, 2), (0, 5), (0, 1 | unknown), (0, 3 | 1 << 62), (1, 3), (u32::MAX, 3)]
    {
        expect_vector(xsetbv(number, value), 13, 0)?;
        check_eq!(xgetbv(), Ok(1), "{number}: {value:#x}");
    }
    xsetbv(0, 3)?;
    write_cr4(cr4)?;
    Ok(())
}

/// What a read of a register gives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Read {
    /// A fault.
    Fault,
    /// This value.
    Value(u64),
    /// What the machine has there.
    Any,
}

/// What a write does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Write {
    /// It faults.
    Fault,
    /// Nothing, whatever the value.
    Dropped,
    /// Nothing if it is the value that is there; it faults otherwise.
    Same,
    /// It is told by a case of its own.
    Own,
}

/// The page attribute table.
const PAT: u64 = 0x0000_0501_0007_0406;

/// The registers that are there, on a processor of AMD's.
const REGISTERS: &[(RangeInclusive<u32>, Read, Write)] = &[
    (0..=1, Read::Value(0), Write::Fault),
    (0x10..=0x10, Read::Any, Write::Fault),
    (0x1b..=0x1b, Read::Value(0xfee0_0900), Write::Fault),
    (0x8b..=0x8b, Read::Any, Write::Fault),
    (0xce..=0xce, Read::Value(0), Write::Fault),
    (0xe7..=0xe8, Read::Fault, Write::Dropped),
    (0x140..=0x140, Read::Value(0), Write::Same),
    (0x179..=0x179, Read::Value(2), Write::Dropped),
    (0x17a..=0x17a, Read::Any, Write::Own),
    (0x17b..=0x17b, Read::Value(0), Write::Dropped),
    (0x1a0..=0x1a0, Read::Any, Write::Dropped),
    (0x277..=0x277, Read::Value(PAT), Write::Fault),
    (0x280..=0x29f, Read::Value(0), Write::Dropped),
    (0x345..=0x345, Read::Value(0), Write::Fault),
    (0x400..=0x400, Read::Value(u64::MAX), Write::Dropped),
    (0x401..=0x403, Read::Value(0), Write::Same),
    (0x404..=0x404, Read::Value(u64::MAX), Write::Dropped),
    (0x405..=0x407, Read::Value(0), Write::Same),
    (0x408..=0x47f, Read::Value(0), Write::Dropped),
    (0x4000_0000..=0x4000_0000, Read::Value(0), Write::Own),
    (0xc000_0080..=0xc000_0080, Read::Value(0xd01), Write::Same),
    (0xc000_0100..=0xc000_0103, Read::Any, Write::Own),
    (0xc001_0000..=0xc001_0007, Read::Value(0), Write::Dropped),
    (0xc001_0015..=0xc001_0015, Read::Value(0), Write::Dropped),
    (0xc001_001f..=0xc001_001f, Read::Value(0), Write::Dropped),
    (0xc001_0041..=0xc001_0042, Read::Value(0), Write::Dropped),
    (0xc001_0061..=0xc001_006b, Read::Value(0), Write::Dropped),
    (0xc001_0200..=0xc001_020b, Read::Value(0), Write::Dropped),
    (0xc001_1029..=0xc001_1029, Read::Value(2), Write::Dropped),
];

/// What the first domain sees besides: where memory is.
const OF_THE_MACHINE: &[(RangeInclusive<u32>, Read, Write)] = &[
    (0xc001_0010..=0xc001_0010, Read::Any, Write::Fault),
    (0xc001_0016..=0xc001_001a, Read::Any, Write::Fault),
    (0xc001_001d..=0xc001_001d, Read::Any, Write::Fault),
    (0xc001_0112..=0xc001_0113, Read::Any, Write::Fault),
];

/// The registers that are there for this domain.
fn registers() -> impl Iterator<Item = &'static (RangeInclusive<u32>, Read, Write)> {
    REGISTERS.iter().chain(by_privilege(OF_THE_MACHINE, &[]))
}

fn msr_of_each_row(_: &mut Domain) -> Verdict {
    only_amd()?;
    for (numbers, read, write) in registers() {
        for number in numbers.clone() {
            let before = read_msr(number);
            match *read {
                Read::Fault => check!(before.is_err(), "{number:#x} reads as {before:x?}"),
                Read::Value(value) => check_eq!(before, Ok(value), "{number:#x}"),
                Read::Any => check!(before.is_ok(), "{number:#x} faults"),
            }
            if *write == Write::Own {
                continue;
            }
            let same = before.unwrap_or(0);
            for value in [same, 0, 1, u64::MAX] {
                let taken = match *write {
                    Write::Dropped => true,
                    Write::Same => value == same,
                    _ => false,
                };
                let written = write_msr(number, value);
                check_eq!(written.is_ok(), taken, "{number:#x}: a write of {value:#x}");
                if number != 0x10 {
                    check_eq!(read_msr(number), before, "{number:#x} after a write of {value:#x}");
                }
            }
        }
    }
    // Of the features in 0x1a0 those that guests cannot have are off.
    let features = read_msr(0x1a0)?;
    check_eq!(features & (1 << 7 | 1 << 11 | 1 << 12 | 1 << 18 | 1 << 23), 1 << 11 | 1 << 12 | 1 << 23);
    Ok(())
}

fn msr_others_do_not_exist(_: &mut Domain) -> Verdict {
    only_amd()?;
    check_eq!(read_msr(0x277), Ok(PAT), "one that is there");
    let mut missing = 0;
    for number in numbers() {
        if registers().any(|(numbers, ..)| numbers.contains(&number)) {
            continue;
        }
        expect_vector(read_msr(number), 13, 0)?;
        for value in [0, u64::MAX] {
            let refused = write_msr(number, value);
            check!(refused.is_err(), "{number:#x}: {value:#x} is taken");
        }
        missing += 1;
    }
    check!(missing > 1000, "{missing}");
    Ok(())
}

fn msr_values_are_kept(_: &mut Domain) -> Verdict {
    // Machine-check status.
    check_eq!(read_msr(0x17a), Ok(0));
    check_eq!(write_msr(0x17a, 0x1234_5678_9abc_def0), Ok(()));
    check_eq!(read_msr(0x17a), Ok(0x1234_5678_9abc_def0));
    check_eq!(write_msr(0x17a, 0), Ok(()));
    // Segment bases: each for itself, canonical.
    for number in [0xc000_0100, 0xc000_0101, 0xc000_0102] {
        let before = read_msr(number)?;
        let others = [0xc000_0100, 0xc000_0101, 0xc000_0102].map(|other| read_msr(other).ok());
        check_eq!(write_msr(number, 0xffff_8000_1234_5000), Ok(()));
        check_eq!(read_msr(number), Ok(0xffff_8000_1234_5000));
        expect_vector(write_msr(number, 1 << 47), 13, 0)?;
        check_eq!(read_msr(number), Ok(0xffff_8000_1234_5000));
        check_eq!(write_msr(number, before), Ok(()));
        check_eq!([0xc000_0100, 0xc000_0101, 0xc000_0102].map(|other| read_msr(other).ok()), others);
    }
    Ok(())
}

fn tsc_aux_is_the_guests(_: &mut Domain) -> Verdict {
    const TSC_AUX: u32 = 0xc000_0103;
    if forced(0x8000_0001, 0)[3] & RDTSCP == 0 {
        return skip("this processor has no RDTSCP");
    }
    let rdtscp = || {
        let aux: u64;
        probe!("rdtscp"; out("rcx") aux, out("rdx") _).map(|()| aux)
    };
    for value in [0x1234_5678, 0xffff_ffff, 7] {
        check_eq!(write_msr(TSC_AUX, value), Ok(()));
        check_eq!((read_msr(TSC_AUX), rdtscp()), (Ok(value), Ok(value)));
        sched(SchedOp::Yield, &mut 0u64)?;
        check_eq!(rdtscp(), Ok(value));
    }
    expect_vector(write_msr(TSC_AUX, 1 << 32), 13, 0)?;
    check_eq!((read_msr(TSC_AUX), rdtscp()), (Ok(7), Ok(7)));
    check_eq!(write_msr(TSC_AUX, 0), Ok(()));
    check_eq!(rdtscp(), Ok(0));
    Ok(())
}

/// The registers that are tried one by one: those that processors have in the regions where there are any.
fn numbers() -> impl Iterator<Item = u32> {
    [
        0..=0x4ff,
        0x560..=0x580,
        0x6a0..=0x6e4,
        0x7a0..=0x7a8,
        0x800..=0x83f,
        0xc80..=0xc90,
        0xd90..=0xda1,
        0x1200..=0x1203,
        0x4000_0000..=0x4000_0003,
        0x4000_0200..=0x4000_0201,
        0xc000_0080..=0xc000_0105,
        0xc000_0200..=0xc000_0201,
        0xc001_0000..=0xc001_0140,
        0xc001_0200..=0xc001_0240,
        0xc001_1000..=0xc001_1040,
    ]
    .into_iter()
    .flatten()
}

/// Prints everything, when the command line asks for it.
fn dump(domain: &mut Domain) -> Verdict {
    check_eq!(forced(0x4000_0000, 0)[1], 0x566e_6558);
    let asked = domain.command_line.value("only").is_some_and(|names| names.contains("dump"));
    if !asked {
        return skip("prints everything with only=dump");
    }
    let row = |leaf: u32, sub: u32| {
        let (guest, machine) = (forced(leaf, sub), native(leaf, sub));
        println!("cpuid {leaf:08x}:{sub:x} {guest:08x?} processor {machine:08x?}");
    };
    for leaf in (0..0x18).chain(0x4000_0000..0x4000_0007).chain(0x8000_0000..0x8000_0024) {
        let subs = if matches!(leaf, 4 | 7 | 0xb | 0xd | 0x4000_0003) { 4 } else { 1 };
        (0..subs).for_each(|sub| row(leaf, sub));
    }
    for number in numbers() {
        let value = read_msr(number);
        let taken = |value| {
            if matches!(number, 0x4000_0000 | 0xc000_0100..=0xc000_0102) {
                None
            } else {
                Some(write_msr(number, value).is_ok())
            }
        };
        let (same, zero, ones) = (taken(value.unwrap_or(0)), taken(0), taken(u64::MAX));
        if value.is_ok() || [same, zero, ones].contains(&Some(true)) {
            println!("msr {number:08x} {value:x?}, takes the same {same:?}, zero {zero:?}, ones {ones:?}");
        }
    }
    Ok(())
}

//! CPUID and model-specific registers, row by row.
#![no_std]
#![no_main]

extern crate alloc;

use guest_sdk::rt::trap::Exception;
use guest_sdk::testkit::{self, Verdict, cases, probe};
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    testkit::run(domain, &cases![dump])
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

fn dump(_: &mut Domain) -> Verdict {
    let row = |leaf: u32, sub: u32| {
        let (f, n) = (forced(leaf, sub), native(leaf, sub));
        println!(
            "cpuid {leaf:08x}:{sub:x} {:08x} {:08x} {:08x} {:08x}  native {:08x} {:08x} {:08x} {:08x}",
            f[0], f[1], f[2], f[3], n[0], n[1], n[2], n[3]
        );
    };
    for leaf in 0..0x18 {
        for sub in 0..if matches!(leaf, 4 | 7 | 0xb | 0xd) { 4 } else { 1 } {
            row(leaf, sub);
        }
    }
    for leaf in 0x4000_0000..0x4000_0007 {
        for sub in 0..if leaf == 0x4000_0003 { 3 } else { 1 } {
            row(leaf, sub);
        }
    }
    for leaf in 0x8000_0000..0x8000_0024 {
        row(leaf, 0);
    }
    for leaf in [0x4000_0100, 0x8000_0100, 0xc000_0000, u32::MAX] {
        row(leaf, 0);
    }
    let ranges = [
        0..=0x3ff,
        0x400..=0x4ff,
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
    ];
    for number in ranges.into_iter().flatten() {
        let value = read_msr(number);
        let back = value.ok().map(|v| write_msr(number, v));
        let zero = if number == 0x4000_0000 || number >> 1 == 0xc000_0100 >> 1 || number == 0xc000_0102 {
            Ok(())
        } else {
            write_msr(number, 0)
        };
        let ones = write_msr(number, u64::MAX);
        if value.is_ok() || zero.is_ok() || ones.is_ok() {
            println!("msr {number:08x} {value:x?} back {back:?} zero {} ones {}", zero.is_ok(), ones.is_ok());
        }
    }
    Ok(())
}

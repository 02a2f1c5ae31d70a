//! The memory functions that compiled code calls by name.
//!
//! String instructions, not loops: the compiler would turn a loop back into a call of the function it is in. `rep movsq`
//! moves eight bytes a step, which is what counts under emulation, and modern CPUs move whole cache lines.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicBool, Ordering};

/// As C's memcpy.
///
/// # Safety
/// `from` readable and `to` writable for `bytes`; no overlap.
#[inline(always)]
pub unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear as the C ABI demands.
    unsafe {
        asm!(
            "mov rcx, {bytes}",
            "shr rcx, 3",
            "rep movsq",
            "mov rcx, {bytes}",
            "and ecx, 7",
            "rep movsb",
            bytes = in(reg) bytes,
            out("rcx") _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack),
        );
    }
    to
}

/// From so many bytes on, [`copy_wide`] takes fewer instructions than [`copy`].
pub const WIDE_FROM: usize = 512;
/// Bytes that [`copy_wide`] moves in one round.
const WIDE: usize = 256;

static WIDE_ON: AtomicBool = AtomicBool::new(false);

/// Whether [`copy_wide`] may be used: [`enable_wide`] has said so.
pub fn has_wide() -> bool {
    WIDE_ON.load(Ordering::Relaxed)
}

fn xcr0() -> u32 {
    let low: u32;
    // SAFETY: the callers know from OSXSAVE that XGETBV is there; it reads a register.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack)) };
    low
}

/// CPUID as this domain is meant to see it.
#[cfg(xenolith_guest)]
fn domain_cpuid(leaf: u32) -> (u32, u32) {
    let (a, c);
    // SAFETY: the prefix that makes a hypervisor carry out the instruction; it reads. rbx is the compiler's own.
    unsafe {
        asm!("mov {b}, rbx", "ud2", ".byte 0x78, 0x65, 0x6e", "cpuid", "mov rbx, {b}",
            b = out(reg) _, inout("eax") leaf => a, inout("ecx") 0 => c, out("edx") _, options(nostack));
    }
    (a, c)
}

/// Turns vectors of 32 bytes on for this vCPU, where it can be done, and lets copies use them; whether they do.
///
/// XCR0 is each vCPU's own: only for a domain whose code runs on one.
pub fn enable_wide() -> bool {
    const X87_SSE_AVX: u32 = 7;
    // The processor's own word: OSXSAVE (27) and AVX (28).
    let mut usable = __cpuid(1).ecx >> 27 & 3 == 3;
    #[cfg(xenolith_guest)]
    if usable && xcr0() & X87_SSE_AVX != X87_SSE_AVX {
        // XSAVE (26) and AVX, and which components there may be: then the next instruction is not refused.
        usable = domain_cpuid(1).1 >> 26 & 5 == 5 && domain_cpuid(0xd).0 & X87_SSE_AVX == X87_SSE_AVX;
        if usable {
            // SAFETY: privileged, so they are carried out for us: OSXSAVE in this domain's own CR4 first, without which there is no
            // XSETBV. More state is switched with this vCPU from here on.
            unsafe {
                asm!("mov rax, cr4", "or rax, 0x40000", "mov cr4, rax", "mov eax, {mask:e}", "xsetbv",
                    mask = in(reg) xcr0() | X87_SSE_AVX, in("ecx") 0, in("edx") 0, out("rax") _, options(nostack));
            }
        }
    }
    usable = usable && xcr0() & X87_SSE_AVX == X87_SSE_AVX;
    WIDE_ON.store(usable, Ordering::Relaxed);
    usable
}

/// As [`copy`], with vectors of 32 bytes.
///
/// # Safety
/// `from` readable and `to` writable for `bytes`; no overlap; [`has_wide`].
pub unsafe fn copy_wide(to: *mut u8, from: *const u8, bytes: usize) {
    let rounds = bytes / WIDE;
    let (mut to, mut from) = (to, from);
    if rounds > 0 {
        // SAFETY: the caller vouches for both ranges. Of the registers, what baseline code knows is named; the upper halves are
        // nobody's, and are zero again afterwards, as code without these instructions wants them.
        unsafe {
            asm!(
                "2:",
                "vmovdqu ymm0, [rsi]",
                "vmovdqu ymm1, [rsi + 32]",
                "vmovdqu ymm2, [rsi + 64]",
                "vmovdqu ymm3, [rsi + 96]",
                "vmovdqu ymm4, [rsi + 128]",
                "vmovdqu ymm5, [rsi + 160]",
                "vmovdqu ymm6, [rsi + 192]",
                "vmovdqu ymm7, [rsi + 224]",
                "vmovdqu [rdi], ymm0",
                "vmovdqu [rdi + 32], ymm1",
                "vmovdqu [rdi + 64], ymm2",
                "vmovdqu [rdi + 96], ymm3",
                "vmovdqu [rdi + 128], ymm4",
                "vmovdqu [rdi + 160], ymm5",
                "vmovdqu [rdi + 192], ymm6",
                "vmovdqu [rdi + 224], ymm7",
                "add rsi, 256",
                "add rdi, 256",
                "dec {rounds}",
                "jnz 2b",
                "vzeroupper",
                rounds = inout(reg) rounds => _,
                inout("rsi") from,
                inout("rdi") to,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                options(nostack),
            );
        }
    }
    // SAFETY: the rest of both ranges.
    unsafe { copy(to, from, bytes % WIDE) };
}

/// As C's memmove.
///
/// # Safety
/// `from` readable and `to` writable for `bytes`.
#[inline(always)]
pub unsafe fn copy_overlapping(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: `to` does not lie inside the source, so going upward reads each byte before it is written.
        return unsafe { copy(to, from, bytes) };
    }
    // SAFETY: the caller vouches for both ranges. Downward from the last byte (first the odd tail, then words), and the
    // direction flag is clear again at the end.
    unsafe {
        asm!(
            "std",
            "mov rcx, {bytes}",
            "and ecx, 7",
            "rep movsb",
            "sub rsi, 7",
            "sub rdi, 7",
            "mov rcx, {bytes}",
            "shr rcx, 3",
            "rep movsq",
            "cld",
            bytes = in(reg) bytes,
            out("rcx") _,
            inout("rdi") to.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(bytes).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    to
}

/// As C's memset.
///
/// # Safety
/// `to` writable for `bytes`.
#[inline(always)]
pub unsafe fn fill(to: *mut u8, value: u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!(
            "mov rcx, {bytes}",
            "shr rcx, 3",
            "rep stosq",
            "mov rcx, {bytes}",
            "and ecx, 7",
            "rep stosb",
            bytes = in(reg) bytes,
            out("rcx") _,
            inout("rdi") to => _,
            in("rax") u64::from(value).wrapping_mul(0x0101_0101_0101_0101),
            options(nostack),
        );
    }
    to
}

/// As C's memcmp.
///
/// # Safety
/// Both readable for `bytes`.
#[inline(always)]
pub unsafe fn compare(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    let mut at = 0;
    while at + 8 <= bytes {
        // SAFETY: at + 8 is inside both ranges.
        let (x, y) =
            unsafe { (a.add(at).cast::<u64>().read_unaligned(), b.add(at).cast::<u64>().read_unaligned()) };
        if x != y {
            return if x.swap_bytes() < y.swap_bytes() { -1 } else { 1 };
        }
        at += 8;
    }
    while at < bytes {
        // SAFETY: at is inside both ranges.
        let (x, y) = unsafe { (a.add(at).read(), b.add(at).read()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        at += 1;
    }
    0
}

/// As C's strlen.
///
/// # Safety
/// `text` ends with a zero byte.
#[inline(always)]
pub unsafe fn length(text: *const u8) -> usize {
    let mut at = 0;
    // SAFETY: the zero byte is at or after `at`. Volatile, so that the loop is not recognised as strlen.
    while unsafe { text.add(at).read_volatile() } != 0 {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::{compare, copy, copy_overlapping, copy_wide, enable_wide, fill, length};
    use std::{vec, vec::Vec};

    #[test]
    fn moves_as_std_does() {
        for len in 0..40 {
            for from in 0..24 {
                for to in 0..24 {
                    let original: Vec<u8> = (0..80).collect();
                    let mut expected = original.clone();
                    expected.copy_within(from..from + len, to);
                    let mut got = original.clone();
                    let base = got.as_mut_ptr();
                    // SAFETY: both ranges lie inside the 80 bytes.
                    unsafe { copy_overlapping(base.add(to), base.add(from), len) };
                    assert_eq!(got, expected, "{len} bytes from {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn wide_copies_are_copies() {
        if !enable_wide() {
            return;
        }
        let source: Vec<u8> = (0..5000u32).map(|at| (at * 7 + (at >> 8)) as u8).collect();
        for len in [0, 1, 255, 256, 257, 511, 512, 1000, 4096, 4100] {
            for (from, to) in [(0, 0), (1, 3), (32, 31), (700, 5)] {
                let mut target = vec![0xa5; 5000];
                // SAFETY: inside both vectors; asked for.
                unsafe { copy_wide(target.as_mut_ptr().add(to), source.as_ptr().add(from), len) };
                assert_eq!(target[to..to + len], source[from..from + len], "{len} bytes from {from} to {to}");
                assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xa5));
            }
        }
    }

    #[test]
    fn copies_fills_and_compares() {
        for len in 0..64 {
            let source: Vec<u8> = (0..64).map(|i| i * 3 + 1).collect();
            let mut target = vec![0u8; 64];
            // SAFETY: inside both vectors.
            unsafe { copy(target.as_mut_ptr(), source.as_ptr(), len) };
            assert_eq!(target[..len], source[..len]);
            assert!(target[len..].iter().all(|&byte| byte == 0));
            // SAFETY: inside both vectors.
            assert_eq!(unsafe { compare(target.as_ptr(), source.as_ptr(), len) }, 0);
            if len > 0 {
                target[len - 1] = target[len - 1].wrapping_add(1);
                let expected = target[..len].cmp(&source[..len]) as i32;
                // SAFETY: inside both vectors.
                assert_eq!(unsafe { compare(target.as_ptr(), source.as_ptr(), len) }.signum(), expected);
            }
            // SAFETY: inside the vector.
            unsafe { fill(target.as_mut_ptr(), 0xa5, len) };
            assert!(target[..len].iter().all(|&byte| byte == 0xa5));
        }
        // SAFETY: ends with zero.
        assert_eq!(unsafe { length(c"guest".as_ptr().cast()) }, 5);
    }
}

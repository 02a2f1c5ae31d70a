//! The memory functions that compiled code calls by name.
//!
//! String instructions, not loops: the compiler would turn a loop back into a call of the function it is in. `rep movsq`
//! moves eight bytes a step, which is what counts under emulation, and modern CPUs move whole cache lines.

use core::arch::asm;

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
    use super::{compare, copy, copy_overlapping, fill, length};
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

//! What the compiler expects of a C runtime. Only in the binary: in the library these would shadow libc in host tests.
//!
//! The string instructions are fast for the sizes that matter here (records, frames) and need no vector registers.

use core::arch::{asm, naked_asm};

/// C's `memcpy`.
///
/// # Safety
/// As in C: both ranges valid for `n` bytes and not overlapping.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memcpy(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep movsq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep movsb",
        "ret"
    )
}

/// C's `memmove`.
///
/// # Safety
/// As in C: both ranges valid for `n` bytes.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memmove(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f", // destination starts inside the source: copy downwards
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}

/// C's `memset`.
///
/// # Safety
/// As in C: the range valid for `n` bytes.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memset(dst: *mut u8, byte: i32, n: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "movzx eax, sil",
        "movabs rcx, 0x0101010101010101",
        "imul rax, rcx",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep stosq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep stosb",
        "mov rax, r8",
        "ret",
    )
}

/// C's `memcmp`.
///
/// # Safety
/// As in C: both ranges valid for `n` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let (mut x, mut y): (u8, u8);
    let mut done = 0;
    while done < n {
        // SAFETY: done < n, so both bytes lie in the caller's ranges. Volatile by way of asm, because the compiler would
        // turn a plain loop into a call of this very function.
        unsafe {
            asm!("mov {x}, [{a}]", "mov {y}, [{b}]", x = out(reg_byte) x, y = out(reg_byte) y,
                 a = in(reg) a.add(done), b = in(reg) b.add(done), options(nostack, readonly, preserves_flags));
        }
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        done += 1;
    }
    0
}

/// C's `bcmp`.
///
/// # Safety
/// As in C: both ranges valid for `n` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: same contract.
    unsafe { memcmp(a, b, n) }
}

/// Named by precompiled `core`; panics abort, so nothing calls it.
#[unsafe(no_mangle)]
pub extern "C" fn _Unwind_Resume() -> ! {
    panic!("unwinding in a build without it")
}

/// Named by precompiled `core`; panics abort, so nothing calls it.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

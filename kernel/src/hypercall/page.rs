//! The hypercall page: a stub of 32 bytes per hypercall that guests call.

use core::sync::atomic::Ordering;

use hypercall_abi::{HYPERCALL_PAGE_STUBS, HYPERCALL_STUB_SIZE, Hypercall, Mfn};

use crate::platform::Platform;

/// Fills the gaps between stubs: a jump into one traps.
const INT3: u8 = 0xcc;

/// One stub: push rcx; push r11; mov eax, number; syscall; pop r11; pop rcx; ret.
///
/// iret does not return: push rcx; push r11; push rax; mov eax, 23; syscall (public/arch-x86/xen-x86_64.h).
fn stub(number: u32) -> [u8; HYPERCALL_STUB_SIZE] {
    let n = number.to_le_bytes();
    let mut out = [INT3; HYPERCALL_STUB_SIZE];
    if number == Hypercall::Iret.number() as u32 {
        out[..11].copy_from_slice(&[0x51, 0x41, 0x53, 0x50, 0xb8, n[0], n[1], n[2], n[3], 0x0f, 0x05]);
    } else {
        let code = [0x51, 0x41, 0x53, 0xb8, n[0], n[1], n[2], n[3], 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3];
        out[..code.len()].copy_from_slice(&code);
    }
    out
}

/// Writes the stubs into a frame. The caller holds a writable reference to it.
pub fn write_hypercall_page<P: Platform>(platform: &P, mfn: Mfn) {
    let words = platform.frame(mfn).chunks_exact(HYPERCALL_STUB_SIZE / 8);
    for (number, words) in (0..HYPERCALL_PAGE_STUBS as u32).zip(words) {
        for (word, bytes) in words.iter().zip(stub(number).as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stub_is_syscall_with_its_number() {
        let stub = stub(17);
        assert_eq!(stub[3], 0xb8);
        assert_eq!(u32::from_le_bytes([stub[4], stub[5], stub[6], stub[7]]), 17);
        assert_eq!(stub[8..10], [0x0f, 0x05]);
        assert_eq!(stub[13], 0xc3);
        assert!(stub[14..].iter().all(|b| *b == INT3));
    }
}

//! Copies between ring 0 and guest memory, through the guest's own mappings: they may fault at any byte.
//!
//! Ring 0 could read everything the address names, also its own memory: so the range is checked first, here, whoever asks.
//! A page of the hypervisor's that a guest may not see is never user-accessible; but ring 0 has the right to it, and SMAP
//! lets supervisor pages pass.

use core::arch::global_asm;
use hv::platform::Fault;
use hv::x86::layout::is_guest_range;

global_asm!(
    include_str!("macros.s"),
    r#"
    .pushsection .text.guest_copy, "ax", @progbits
    .balign 16
    .globl guest_copy
guest_copy:                             /* (to, from, len) -> 0, or 1 after a fault */
    ALLOW_GUEST_PAGES
    mov rcx, rdx
    shr rcx, 3
guest_copy_words:
    rep movsq
    mov ecx, edx
    and ecx, 7
guest_copy_bytes:
    rep movsb
    xor eax, eax
    CLEAR_AC
    ret
guest_copy_fault:
    mov eax, 1
    CLEAR_AC
    ret
    FIXUP guest_copy_words, guest_copy_fault
    FIXUP guest_copy_bytes, guest_copy_fault
    .popsection
    "#
);

unsafe extern "C" {
    fn guest_copy(to: *mut u8, from: *const u8, len: usize) -> u64;
}

/// Copies from guest memory at `va`. On a fault part of `dst` may have been written.
pub fn from_guest(dst: &mut [u8], va: u64) -> Result<(), Fault> {
    if !is_guest_range(va, dst.len() as u64) {
        return Err(Fault);
    }
    // SAFETY: writes only `dst`; reads only addresses outside the hypervisor's range, by instructions that may fault. What
    // they name can change at any time: it is copied once, as bytes, and no reference to it exists.
    if unsafe { guest_copy(dst.as_mut_ptr(), va as *const u8, dst.len()) } == 0 { Ok(()) } else { Err(Fault) }
}

/// Copies to guest memory at `va`. On a fault part of it may have been written.
pub fn to_guest(va: u64, src: &[u8]) -> Result<(), Fault> {
    if !is_guest_range(va, src.len() as u64) {
        return Err(Fault);
    }
    // SAFETY: reads only `src`; writes only addresses outside the hypervisor's range. Guest mappings never show memory of
    // the hypervisor writable (page types), and CR0.WP makes read-only pages fault for ring 0 too.
    if unsafe { guest_copy(va as *mut u8, src.as_ptr(), src.len()) } == 0 { Ok(()) } else { Err(Fault) }
}

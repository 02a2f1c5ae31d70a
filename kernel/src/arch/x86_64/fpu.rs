//! Vector state of guests: saved and loaded eagerly at each vCPU switch. Ring 0 itself never uses a vector register; the
//! functions `vector_save` and `vector_load` are the only code of the image that names one, by XSAVE and FXSAVE.
//!
//! CR0.TS carries the guest's virtual TS, so CLTS comes first. Lazy switching would leak state on processors that speculate
//! past #NM, and TCG's XSAVE ignores TS.

use super::cpu;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Components that may be on in XCR0: exactly those that guests are told of, because a guest that saves all that is on must
/// know how much that is.
const COMPONENTS: u64 = hv::trap::cpuid::XCR0_OFFERED;
/// Bytes of the FXSAVE area.
const FXSAVE_SIZE: usize = 512;
/// Initial x87 control word.
const FCW: u16 = 0x37f;
/// Initial SSE control word.
const MXCSR: u32 = 0x1f80;

static XCR0: AtomicU64 = AtomicU64::new(0);
static SIZE: AtomicUsize = AtomicUsize::new(FXSAVE_SIZE);

/// Turns on the components that this processor and we know. Called once on each CPU, CR4.OSXSAVE being set.
pub fn init() {
    if !cpu::has_xsave() {
        return;
    }
    let supported = cpu::cpuid(0xd, 0);
    let mask = (u64::from(supported.edx) << 32 | u64::from(supported.eax)) & COMPONENTS | 3;
    // SAFETY: only components that CPUID lists, x87 and SSE among them, in a legal combination.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") mask as u32, in("edx") (mask >> 32) as u32, options(nostack))
    };
    XCR0.store(mask, Ordering::Relaxed);
    // ebx: size of the area for what is enabled now.
    SIZE.store((cpu::cpuid(0xd, 0).ebx as usize).max(FXSAVE_SIZE + 64), Ordering::Relaxed);
}

/// Puts `wanted` into XCR0 as far as this processor and we know its components, and in a combination that it accepts. What the
/// register holds is remembered in `live`.
pub fn set_xcr0(live: &mut u64, wanted: u64) {
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    // It has been through this.
    if *live == wanted {
        return;
    }
    let all = xcr0();
    if all == 0 {
        return;
    }
    // x87 is always on, and AVX is an extension of SSE.
    let mut value = wanted & all | 1;
    if value & AVX != 0 {
        value |= SSE;
    }
    if *live != value {
        *live = value;
        // SAFETY: components that `init` found, in a legal combination; ring 0 uses none of them.
        unsafe {
            asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
        };
    }
}

/// Bytes of the save area.
pub fn size() -> usize {
    SIZE.load(Ordering::Relaxed)
}

/// XCR0 with all that guests may have, as it is on a CPU on which none runs; 0 without XSAVE.
pub fn xcr0() -> u64 {
    XCR0.load(Ordering::Relaxed)
}

/// Puts the initial state into `area`.
pub fn initial(area: &mut [u8]) {
    area.fill(0);
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(to) = area.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    put(0, &FCW.to_le_bytes());
    put(24, &MXCSR.to_le_bytes());
    if cpu::has_xsave() {
        // XSTATE_BV: x87 and SSE come from the area, the rest is in its initial state.
        put(512, &3u64.to_le_bytes());
    }
}

/// Saves the registers into `area`. All components must be on in XCR0, so that those that the guest has turned off are kept too.
///
/// # Panics
/// When `area` is too small or not aligned to 64 bytes.
pub fn save(area: &mut [u8]) {
    assert!(area.len() >= size() && (area.as_ptr() as usize).is_multiple_of(64));
    // SAFETY: the area is large enough and aligned, as asserted.
    unsafe { vector_save(area.as_mut_ptr()) };
}

/// Loads the registers from `area`. All components must be on in XCR0.
///
/// # Panics
/// When `area` is too small or not aligned to 64 bytes.
pub fn load(area: &[u8]) {
    assert!(area.len() >= size() && (area.as_ptr() as usize).is_multiple_of(64));
    // SAFETY: the area is large enough and aligned; its contents were made by `initial` or `save` alone, which the
    // processor accepts.
    unsafe { vector_load(area.as_ptr()) };
}

#[inline(never)]
unsafe fn vector_save(area: *mut u8) {
    let mask = xcr0();
    let (low, high) = (mask as u32, (mask >> 32) as u32);
    // SAFETY: the caller's contract: a save area of the right size and alignment. CLTS is undone by the caller.
    unsafe {
        if mask == 0 {
            asm!("clts", "fxsave64 [{0}]", in(reg) area, options(nostack));
        } else if cpu::has_xsaveopt() {
            asm!("clts", "xsaveopt64 [{0}]", in(reg) area, in("eax") low, in("edx") high, options(nostack));
        } else {
            asm!("clts", "xsave64 [{0}]", in(reg) area, in("eax") low, in("edx") high, options(nostack));
        }
    }
}

#[inline(never)]
unsafe fn vector_load(area: *const u8) {
    let mask = xcr0();
    let (low, high) = (mask as u32, (mask >> 32) as u32);
    // SAFETY: the caller's contract: a save area of the right size and alignment, whose contents the processor accepts.
    unsafe {
        if mask == 0 {
            asm!("clts", "fxrstor64 [{0}]", in(reg) area, options(nostack));
        } else {
            asm!("clts", "xrstor64 [{0}]", in(reg) area, in("eax") low, in("edx") high, options(nostack));
        }
    }
}

//! What the processor can do, and the control registers that follow from it.

use core::arch::x86_64::{__cpuid_count, CpuidResult};
use core::sync::atomic::{AtomicU32, Ordering};
use hv::x86::layout::DIRECT_MAP;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::{Efer, EferFlags, Msr};

/// Page attribute table: WB WT UC- UC WC WP UC UC, the one Xen's PV guests expect to find in force.
pub const PAT: u64 = 0x0501_0007_0406;
const MSR_PAT: u32 = 0x277;

/// Features that change how ring 0 works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Features {
    pub smep: bool,
    pub smap: bool,
    pub fsgsbase: bool,
    pub xsave: bool,
    pub xsaveopt: bool,
    pub x2apic: bool,
    pub tsc_deadline: bool,
    pub invariant_tsc: bool,
    pub nx: bool,
    pub gigabyte_pages: bool,
    pub global_pages: bool,
    pub machine_check: bool,
}

/// Runs CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// The answer to `leaf`, zeros beyond the processor's last.
fn leaf(number: u32) -> CpuidResult {
    if number <= cpuid(number & 0x8000_0000, 0).eax {
        cpuid(number, 0)
    } else {
        CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 }
    }
}

impl Features {
    /// Asks the processor.
    pub fn detect() -> Features {
        let (basic, structured, extended, power) = (leaf(1), leaf(7), leaf(0x8000_0001), leaf(0x8000_0007));
        let bit = |word: u32, bit: u32| word & (1 << bit) != 0;
        let xsave = bit(basic.ecx, 26);
        Features {
            smep: bit(structured.ebx, 7),
            smap: bit(structured.ebx, 20),
            fsgsbase: bit(structured.ebx, 0),
            xsave,
            xsaveopt: xsave && bit(cpuid(0xd, 1).eax, 0),
            x2apic: bit(basic.ecx, 21),
            tsc_deadline: bit(basic.ecx, 24),
            invariant_tsc: bit(power.edx, 8),
            nx: bit(extended.edx, 20),
            gigabyte_pages: bit(extended.edx, 26),
            global_pages: bit(basic.edx, 13),
            machine_check: bit(basic.edx, 7),
        }
    }

    /// A bit set of them, for [`publish`].
    const SMAP: u32 = 1;
    const FSGSBASE: u32 = 2;
    const XSAVE: u32 = 4;
    const XSAVEOPT: u32 = 8;
    const NX: u32 = 16;
}

static PUBLISHED: AtomicU32 = AtomicU32::new(0);

/// Notes the features that hot paths ask for.
pub fn publish(features: &Features) {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    let bits = bit(features.smap, Features::SMAP)
        | bit(features.fsgsbase, Features::FSGSBASE)
        | bit(features.xsave, Features::XSAVE)
        | bit(features.xsaveopt, Features::XSAVEOPT)
        | bit(features.nx, Features::NX);
    PUBLISHED.store(bits, Ordering::Relaxed);
}

/// Whether guests may turn CR4.FSGSBASE on.
pub fn has_fsgsbase() -> bool {
    PUBLISHED.load(Ordering::Relaxed) & Features::FSGSBASE != 0
}

/// Whether SYSENTER works in long mode: on Intel's and Centaur's processors; AMD's raise #UD.
pub fn has_long_mode_sysenter() -> bool {
    let vendor = cpuid(0, 0);
    // "GenuineIntel", "CentaurHauls" by their first four letters.
    leaf(1).edx & 1 << 11 != 0 && matches!(&vendor.ebx.to_le_bytes(), b"Genu" | b"Cent")
}

/// Bits of a physical address, at most 52: an entry of a page table that has higher ones set faults when it is used.
pub fn physical_address_bits() -> u32 {
    // Where there is no such leaf, 36.
    (leaf(0x8000_0008).eax & 0xff).clamp(36, 52)
}

/// Whether there is a hypervisor below us.
pub fn is_virtual_machine() -> bool {
    leaf(1).ecx & 1 << 31 != 0
}

/// Whether there is TSC_AUX: for RDTSCP, or for RDPID.
pub fn has_tsc_aux() -> bool {
    let rdtscp = cpuid(0x8000_0000, 0).eax > 0x8000_0000 && cpuid(0x8000_0001, 0).edx & 1 << 27 != 0;
    rdtscp || cpuid(0, 0).eax >= 7 && cpuid(7, 0).ecx & 1 << 22 != 0
}

/// Whether pages can be made not executable.
pub fn has_nx() -> bool {
    PUBLISHED.load(Ordering::Relaxed) & Features::NX != 0
}

/// Whether XSAVE is there, and on.
pub fn has_xsave() -> bool {
    PUBLISHED.load(Ordering::Relaxed) & Features::XSAVE != 0
}

/// Whether XSAVEOPT is there.
pub fn has_xsaveopt() -> bool {
    PUBLISHED.load(Ordering::Relaxed) & Features::XSAVEOPT != 0
}

/// The CR4 that every vCPU runs with, apart from the bits that are the guest's to choose (`context`).
pub fn base_cr4(features: &Features) -> Cr4Flags {
    let mut cr4 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION | Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE;
    // UMIP stays off: PV guests may run SGDT, SIDT and SMSW, and some test that they can.
    // Without it a machine check resets the machine instead of being reported.
    cr4.set(Cr4Flags::MACHINE_CHECK_EXCEPTION, features.machine_check);
    cr4.set(Cr4Flags::PAGE_GLOBAL, features.global_pages);
    cr4.set(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION, features.smep);
    cr4.set(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION, features.smap);
    cr4.set(Cr4Flags::OSXSAVE, features.xsave);
    cr4
}

/// Sets the control registers of this CPU for good.
pub fn set_control_registers(features: &Features) {
    let cr0 = Cr0Flags::PROTECTED_MODE_ENABLE
        | Cr0Flags::MONITOR_COPROCESSOR
        | Cr0Flags::EXTENSION_TYPE
        | Cr0Flags::NUMERIC_ERROR
        | Cr0Flags::WRITE_PROTECT
        | Cr0Flags::ALIGNMENT_MASK
        | Cr0Flags::PAGING;
    // SAFETY: paging, caches and mode stay as they are; ring 0 does not depend on the other bits being clear.
    unsafe { Cr0::write(cr0) };
    // SAFETY: only bits the processor has. SMEP and SMAP hold from here on: nothing of ring 0 lies in user pages.
    unsafe { Cr4::write(base_cr4(features)) };
    let mut efer =
        EferFlags::SYSTEM_CALL_EXTENSIONS | EferFlags::LONG_MODE_ENABLE | EferFlags::LONG_MODE_ACTIVE;
    efer.set(EferFlags::NO_EXECUTE_ENABLE, features.nx);
    // SAFETY: long mode stays on, and the LSTAR family is written before the first guest runs.
    unsafe { Efer::write(efer) };
    // SAFETY: entries 0 to 3 stay as at reset, which is all that mappings made so far use.
    unsafe { Msr::new(MSR_PAT).write(PAT) };
}

unsafe extern "C" {
    static __smap_sites_start: u8;
    static __smap_sites_end: u8;
}

/// Turns every STAC and CLAC into a NOP, on a processor without SMAP, where they would be undefined.
///
/// # Safety
/// Only while text is still writable through the direct map, before any of it was used on another CPU.
pub unsafe fn patch_out_smap(image_machine: u64, image_start: u64) {
    let start = &raw const __smap_sites_start as usize;
    let end = &raw const __smap_sites_end as usize;
    for site in (start..end).step_by(8) {
        // SAFETY: the section holds one 8-byte address for each site, made by the macro that emits the instruction.
        let target = unsafe { *(site as *const u64) };
        let at = (DIRECT_MAP + image_machine + (target - image_start)) as *mut [u8; 3];
        // SAFETY: the three bytes of a STAC or CLAC, writable by this function's contract.
        unsafe { at.write([0x0f, 0x1f, 0x00]) };
    }
}

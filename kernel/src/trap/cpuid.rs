//! CPUID as a guest sees it: what the processor says, cut down to what a paravirtualized guest can use.
//!
//! Features are passed on by an explicit list; everything unknown is hidden. The lists are those that Xen's public
//! cpufeatureset.h marks as usable by all guests, less what needs state that the hypervisor does not switch.

use crate::platform::TimeScale;

/// The four result registers: eax, ebx, ecx, edx.
pub type Leaf = [u32; 4];

/// Who made the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Vendor {
    Intel,
    Amd,
    Hygon,
    Other,
}

impl Vendor {
    /// From leaf 0.
    pub fn from_leaf0(leaf: Leaf) -> Vendor {
        let [_, ebx, ecx, edx] = leaf.map(u32::to_le_bytes);
        match (&ebx, &edx, &ecx) {
            (b"Genu", b"ineI", b"ntel") => Vendor::Intel,
            (b"Auth", b"enti", b"cAMD") => Vendor::Amd,
            (b"Hygo", b"nGen", b"uine") => Vendor::Hygon,
            _ => Vendor::Other,
        }
    }
}

/// Features whose use needs state or control registers of the hypervisor's: offered only when the machine layer says it
/// keeps them per vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// XSAVE with a per-vCPU XCR0, and the vector extensions that need it.
    pub xsave: bool,
    /// RDFSBASE and its sisters, which a guest turns on by CR4.FSGSBASE.
    pub fsgsbase: bool,
}

impl Offer {
    /// From the processor's own CPUID, asked in ring 0: the machine layer switches XSAVE state if it turned OSXSAVE on, and
    /// sets CR4.FSGSBASE for the guests that do.
    pub fn from_host(host: impl Fn(u32, u32) -> Leaf) -> Offer {
        let structured = if host(0, 0)[0] >= 7 { host(7, 0)[1] } else { 0 };
        Offer { xsave: host(1, 0)[2] & OSXSAVE != 0, fsgsbase: structured & FSGSBASE != 0 }
    }
}

/// What is known about the vCPU that asks.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// What the machine layer keeps for guests.
    pub offer: Offer,
    /// CR4.OSXSAVE as the guest set it.
    pub osxsave: bool,
    /// Whether the guest's kernel asks by the forced-emulation prefix: it is then shown the hypervisor's own OSXSAVE,
    /// on which Linux relies.
    pub forced: bool,
    /// Whether it is the first domain, to which Xen shows some of what it needs to drive the machine.
    pub hardware: bool,
    /// Whether it is the kernel of that domain.
    pub hardware_kernel: bool,
    /// Frequency of the time-stamp counter, in kHz.
    pub tsc_khz: u32,
    /// How its ticks become nanoseconds.
    pub tsc_scale: TimeScale,
    /// Whether reading the counter traps.
    pub tsc_emulated: bool,
    /// Width in bits of the machine addresses that guests can meet.
    pub machine_address_bits: u32,
}

/// First of the leaves that describe the hypervisor.
pub const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// How many of them follow.
const HYPERVISOR_LEAVES: u32 = 5;
/// Version of the Xen interface that guests are told, 4.17.
pub const INTERFACE_VERSION: u32 = 4 << 16 | 17;

const BASIC_MAX: u32 = 0xd;
const EXTENDED_MAX_INTEL: u32 = 0x8000_0008;
const EXTENDED_MAX_AMD: u32 = 0x8000_0021;

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

/// Leaf 1 edx: FPU DE TSC MSR PAE MCE CX8 APIC SEP MCA CMOV PAT CLFLUSH ACPI MMX FXSR SSE SSE2 SS.
const FEATURES_1D: u32 = bits([0, 2, 4, 5, 6, 7, 8, 9, 11, 14, 15, 16, 19, 22, 23, 24, 25, 26, 27]);
/// Leaf 1 ecx: SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AESNI RDRAND.
const FEATURES_1C: u32 = bits([0, 1, 9, 13, 19, 20, 22, 23, 25, 30]);
/// Leaf 1 ecx with XSAVE: FMA XSAVE AVX F16C.
const FEATURES_1C_XSAVE: u32 = bits([12, 26, 28, 29]);
const SYSENTER: u32 = 1 << 11;
/// Leaf 0xd subleaf 1 eax: the compacted form.
const XSAVEC: u32 = 1 << 1;
const HYPERVISOR: u32 = 1 << 31;
const OSXSAVE: u32 = 1 << 27;
/// Leaf 7 ebx: BMI1 FDP_EXCP_ONLY BMI2 ERMS NO_FPU_SEL RDSEED ADX CLFLUSHOPT CLWB SHA.
const FEATURES_7B: u32 = bits([3, 6, 8, 9, 13, 18, 19, 23, 24, 29]);
const FEATURES_7B_XSAVE: u32 = bits([5]);
const FSGSBASE: u32 = 1 << 0;
/// Leaf 7 ecx: GFNI RDPID CLDEMOTE.
const FEATURES_7C: u32 = bits([8, 22, 25]);
/// With XSAVE: VAES VPCLMULQDQ.
const FEATURES_7C_XSAVE: u32 = bits([9, 10]);
/// Leaf 7 edx: FSRM MD_CLEAR SERIALIZE.
const FEATURES_7D: u32 = bits([4, 10, 14]);
/// Leaf 0x80000001 edx: SYSCALL NX MMXEXT FFXSR RDTSCP LM 3DNOWEXT 3DNOW.
const FEATURES_E1D: u32 = bits([11, 20, 22, 25, 27, 29, 30, 31]);
/// Leaf 0x80000001 ecx: LAHF ABM SSE4A MISALIGNSSE 3DNOWPREFETCH.
const FEATURES_E1C: u32 = bits([0, 5, 6, 7, 8]);
/// With XSAVE: XOP FMA4 TBM.
const FEATURES_E1C_XSAVE: u32 = bits([11, 16, 21]);
/// Bits of leaf 1 edx that AMD repeats in leaf 0x80000001 edx.
const COMMON_1D: u32 = 0x0183_f3ff;
/// Leaf 0x80000008 ebx: CLZERO RSTR_FP_ERR_PTRS, and what hardware is not vulnerable to (SSB_NO, BTC_NO).
const FEATURES_E8B: u32 = bits([0, 2, 26, 29]);
/// State components guests may use: x87, SSE, AVX.
pub const XCR0_OFFERED: u64 = 7;
/// State components that are on before a guest chooses: x87, SSE.
pub const XCR0_INITIAL: u64 = 3;

/// Whether a guest may put this into XCR0: x87 always, AVX only with SSE.
pub const fn is_xcr0(value: u64, offered: u64) -> bool {
    value & !offered == 0 && value & 1 != 0 && (value & 4 == 0 || value & 2 != 0)
}

/// Whether guests have TSC_AUX: with RDTSCP or RDPID.
pub fn has_tsc_aux(host: impl Fn(u32, u32) -> Leaf) -> bool {
    host(0x8000_0001, 0)[3] & RDTSCP != 0 || host(0, 0)[0] >= 7 && host(7, 0)[2] & RDPID != 0
}

const MTRR: u32 = 1 << 12;
const SPEEDSTEP: u32 = 1 << 7;
const RDTSCP: u32 = 1 << 27;
const RDPID: u32 = 1 << 22;
/// Leaf 0x80000007 edx: the time-stamp counter runs at the same speed always.
const INVARIANT_TSC: u32 = 1 << 8;

/// What the guest gets for `leaf` and `subleaf`; `host` is the processor's own CPUID.
pub fn guest(leaf: u32, subleaf: u32, c: Context, host: impl Fn(u32, u32) -> Leaf) -> Leaf {
    match leaf {
        0..=BASIC_MAX => {
            let leaf0 = host(0, 0);
            let max = leaf0[0].min(BASIC_MAX);
            if leaf > max {
                return [0; 4];
            }
            let [_, b, cx, d] = leaf0;
            if leaf == 0 { [max, b, cx, d] } else { basic(leaf, subleaf, Vendor::from_leaf0(leaf0), c, host) }
        }
        HYPERVISOR_BASE..=0x4000_01ff => hypervisor(leaf - HYPERVISOR_BASE, subleaf, c, host),
        0x8000_0000..=EXTENDED_MAX_AMD => {
            let vendor = Vendor::from_leaf0(host(0, 0));
            let limit = match vendor {
                Vendor::Amd | Vendor::Hygon => EXTENDED_MAX_AMD,
                _ => EXTENDED_MAX_INTEL,
            };
            let max = host(0x8000_0000, 0)[0].min(limit);
            if leaf > max { [0; 4] } else { extended(leaf, max, vendor, c, host) }
        }
        _ => [0; 4],
    }
}

fn xsave_only(c: Context, mask: u32) -> u32 {
    if c.offer.xsave { mask } else { 0 }
}

fn basic(leaf: u32, subleaf: u32, vendor: Vendor, c: Context, host: impl Fn(u32, u32) -> Leaf) -> Leaf {
    match leaf {
        1 => {
            let [a, b, cx, d] = host(1, 0);
            let mut ecx = cx & (FEATURES_1C | xsave_only(c, FEATURES_1C_XSAVE)) | HYPERVISOR;
            if c.offer.xsave && (c.osxsave || c.forced) {
                ecx |= OSXSAVE;
            }
            // What Xen has always let its first domain's kernel see: the MTRRs are the sign of the calls about memory types, and
            // SpeedStep that of those about processor states.
            let leaked = if c.hardware_kernel { (cx & SPEEDSTEP, d & MTRR) } else { (0, 0) };
            // AMD's processors have no SYSENTER in long mode.
            let without = if matches!(vendor, Vendor::Amd | Vendor::Hygon) { SYSENTER } else { 0 };
            // No processor type, no APIC number, one thread.
            [a & 0x0fff_0fff, b & 0x0000_ffff, ecx | leaked.0, d & FEATURES_1D & !without | leaked.1]
        }
        // Caches and translation buffers.
        2 if vendor == Vendor::Intel => {
            let [a, b, cx, d] = host(2, 0);
            [a & !0xff | 1, b, cx, d]
        }
        4 if vendor == Vendor::Intel => {
            let [a, b, cx, d] = host(4, subleaf);
            // Threads that share a cache say something about other guests' processors.
            if matches!(a & 31, 1..=3) { [a & 0x3fff & !0x3c00, b, cx, d & 7] } else { [0; 4] }
        }
        7 if subleaf == 0 => {
            let [_, b, cx, d] = host(7, 0);
            let fsgsbase = if c.offer.fsgsbase { FSGSBASE } else { 0 };
            [
                0,
                b & (FEATURES_7B | fsgsbase | xsave_only(c, FEATURES_7B_XSAVE)),
                cx & (FEATURES_7C | xsave_only(c, FEATURES_7C_XSAVE)),
                d & FEATURES_7D,
            ]
        }
        0xd if c.offer.xsave => xstate(subleaf, host),
        _ => [0; 4],
    }
}

/// Leaf 0xd: x87, SSE and AVX state only.
fn xstate(subleaf: u32, host: impl Fn(u32, u32) -> Leaf) -> Leaf {
    let [a, b, _, _] = host(0xd, subleaf);
    let offered = XCR0_OFFERED as u32 & host(0xd, 0)[0];
    match subleaf {
        // ebx: size for the features in force, which are the guest's own, ecx: for all that can be enabled. AVX lies behind the 576 bytes of the
        // legacy area and the header.
        0 => {
            let size = if offered & 4 != 0 {
                let [size, offset, _, _] = host(0xd, 2);
                size.saturating_add(offset)
            } else {
                576
            };
            [offered, b, size, 0]
        }
        // XSAVEOPT XSAVEC XGETBV1.
        1 => [a & 7, if a & XSAVEC != 0 { b } else { 0 }, 0, 0],
        2 if offered & 4 != 0 => [a, b, 0, 0],
        _ => [0; 4],
    }
}

fn extended(leaf: u32, max: u32, vendor: Vendor, c: Context, host: impl Fn(u32, u32) -> Leaf) -> Leaf {
    let amd = matches!(vendor, Vendor::Amd | Vendor::Hygon);
    let raw = host(leaf, 0);
    let [a, b, cx, d] = raw;
    match leaf & 0xffff {
        0 if amd => [max, b, cx, d],
        0 => [max, 0, 0, 0],
        1 => {
            let mut edx = d & FEATURES_E1D;
            if amd {
                edx |= host(1, 0)[3] & FEATURES_1D & COMMON_1D;
            }
            if c.hardware_kernel {
                edx |= host(1, 0)[3] & MTRR;
            }
            let ecx = cx & (FEATURES_E1C | xsave_only(c, FEATURES_E1C_XSAVE));
            if amd { [host(1, 0)[0] & 0x0fff_0fff, b & 0xff00_ffff, ecx, edx] } else { [0, 0, ecx, edx] }
        }
        // Name of the processor.
        2..=4 => raw,
        5 if amd => raw,
        6 if amd => raw,
        6 => [0, 0, cx, 0],
        // Address widths and a few features.
        8 => [a & 0xffff, b & FEATURES_E8B, 0, 0],
        // Translation buffers of large pages, which guests cannot have, performance hints.
        0x1a if amd => raw,
        // LFENCE serialises; null selectors clear the base.
        0x21 if amd => [a & bits([2, 6]), 0, 0, 0],
        _ => [0; 4],
    }
}

/// Leaves from 0x40000000 on (public/arch-x86/cpuid.h).
fn hypervisor(index: u32, subleaf: u32, c: Context, host: impl Fn(u32, u32) -> Leaf) -> Leaf {
    match (index, subleaf) {
        (0, _) => {
            let word = |text: [u8; 4]| u32::from_le_bytes(text);
            [HYPERVISOR_BASE + HYPERVISOR_LEAVES, word(*b"XenV"), word(*b"MMXe"), word(*b"nVMM")]
        }
        (1, _) => [INTERFACE_VERSION, 0, 0, 0],
        // One hypercall page by a register, and MMU_PT_UPDATE_PRESERVE_AD.
        (2, _) => [1, super::msr::HYPERCALL_PAGE, 1, 0],
        // The time-stamp counter: whether it is emulated, reliable, and there is RDTSCP; mode; frequency; incarnation.
        (3, 0) => {
            let extended = host(0x8000_0000, 0)[0];
            let has = |leaf, bit| extended >= leaf && host(leaf, 0)[3] & bit != 0;
            let reliable = u32::from(has(0x8000_0007, INVARIANT_TSC)) << 1;
            let flags = reliable | u32::from(has(0x8000_0001, RDTSCP)) << 2;
            let flags = flags | u32::from(c.tsc_emulated);
            // Mode 2 is never to emulate it, 0 if need be. The first domain is told none of this: its time is the machine's.
            let mode = if c.tsc_emulated { 0 } else { 2 };
            if c.hardware { [flags, 0, 0, 0] } else { [flags, mode, c.tsc_khz, 1] }
        }
        // No offset; how ticks become nanoseconds.
        (3, 1) if !c.hardware => [0, 0, c.tsc_scale.mul, c.tsc_scale.shift as i32 as u32],
        (3, 2) => [c.tsc_khz, 0, 0, 0],
        (5, 0) => [0, c.machine_address_bits & 0xff, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    const CONTEXT: Context = Context {
        offer: Offer { xsave: false, fsgsbase: false },
        osxsave: false,
        forced: false,
        hardware: false,
        hardware_kernel: false,
        tsc_scale: TimeScale { mul: 1 << 31, shift: 1 },
        tsc_khz: 1_000_000,
        tsc_emulated: false,
        machine_address_bits: 40,
    };

    /// A processor with every bit set that a feature could have.
    fn everything(vendor: &'static [u8; 12]) -> impl Fn(u32, u32) -> Leaf {
        move |leaf, _| {
            let word = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
            match leaf {
                0 => [0x1f, word(0), word(8), word(4)],
                0x8000_0000 => [0x8000_0021, word(0), word(8), word(4)],
                _ => [u32::MAX; 4],
            }
        }
    }

    const AMD: &[u8; 12] = b"AuthenticAMD";
    const INTEL: &[u8; 12] = b"GenuineIntel";

    #[test]
    fn what_a_pv_guest_cannot_use_is_hidden() {
        for vendor in [AMD, INTEL] {
            let [_, b, c, d] = guest(1, 0, CONTEXT, everything(vendor));
            // VME PSE MTRR PGE PSE36 HTT, MONITOR VMX SMX PCID x2APIC TSC-deadline, XSAVE OSXSAVE AVX.
            assert_eq!(d & bits([1, 3, 12, 13, 17, 28]), 0);
            assert_eq!(c & bits([3, 5, 6, 17, 21, 24, 26, 27, 28]), 0);
            assert_eq!(b >> 16, 0);
            let [_, b, c, d] = guest(7, 0, CONTEXT, everything(vendor));
            // FSGSBASE SMEP INVPCID MPX AVX512F SMAP; UMIP PKU CET-SS LA57; IBRS STIBP ARCH_CAPS CET-IBT.
            assert_eq!(b & bits([0, 7, 10, 14, 16, 20]), 0);
            assert_eq!(c & bits([2, 3, 4, 7, 16]), 0);
            assert_eq!(d & bits([20, 26, 27, 29]), 0);
            let [_, _, c, d] = guest(0x8000_0001, 0, CONTEXT, everything(vendor));
            // SVM, 1-GiB pages.
            assert_eq!(c & bits([2]), 0);
            assert_eq!(d & bits([26]), 0);
        }
    }

    #[test]
    fn what_a_64_bit_kernel_needs_is_shown() {
        let [_, _, c, d] = guest(1, 0, CONTEXT, everything(INTEL));
        // FPU TSC MSR PAE CX8 CMOV FXSR SSE2, CX16, HYPERVISOR.
        let needed = bits([0, 4, 5, 6, 8, 15, 24, 26]);
        assert_eq!(d & needed, needed);
        assert_eq!(c & bits([13, 31]), bits([13, 31]));
        let needed = bits([11, 20, 29]);
        assert_eq!(guest(0x8000_0001, 0, CONTEXT, everything(INTEL))[3] & needed, needed);
    }

    #[test]
    fn xsave_shows_with_everything_that_depends_on_it_or_not_at_all() {
        let offered = Context { offer: Offer { xsave: true, fsgsbase: true }, ..CONTEXT };
        let c = guest(1, 0, offered, everything(INTEL))[2];
        assert_eq!(c & bits([26, 27, 28]), bits([26, 28]), "OSXSAVE follows CR4");
        assert_ne!(guest(1, 0, Context { osxsave: true, ..offered }, everything(INTEL))[2] & OSXSAVE, 0);
        assert_ne!(guest(1, 0, Context { forced: true, ..offered }, everything(INTEL))[2] & OSXSAVE, 0);
        assert_eq!(
            guest(1, 0, Context { osxsave: true, forced: true, ..CONTEXT }, everything(INTEL))[2] & OSXSAVE,
            0
        );
        assert_ne!(guest(7, 0, offered, everything(INTEL))[1] & bits([0, 5]), 0);
        assert_eq!(guest(0xd, 0, CONTEXT, everything(INTEL)), [0; 4]);
        assert_eq!(guest(0xd, 0, offered, everything(INTEL))[0], 7);
    }

    #[test]
    fn the_hypervisor_leaves_are_xens() {
        let host = everything(AMD);
        assert_eq!(
            guest(0x4000_0000, 0, CONTEXT, &host),
            [0x4000_0005, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566e]
        );
        assert_eq!(guest(0x4000_0001, 0, CONTEXT, &host), [0x0004_0011, 0, 0, 0]);
        assert_eq!(guest(0x4000_0002, 0, CONTEXT, &host), [1, 0x4000_0000, 1, 0]);
        assert_eq!(guest(0x4000_0005, 0, CONTEXT, &host)[1], 40);
        assert_eq!(guest(0x4000_0006, 0, CONTEXT, &host), [0; 4]);
        assert_eq!(guest(0x4000_0100, 0, CONTEXT, &host), [0; 4]);
    }

    #[test]
    fn the_first_domains_kernel_sees_signs_of_the_machine() {
        let shown = Context { hardware: true, hardware_kernel: true, ..CONTEXT };
        for vendor in [AMD, INTEL] {
            for leaf in [1, 0x8000_0001] {
                let [a, b, c, d] = guest(leaf, 0, CONTEXT, everything(vendor));
                let eist = if leaf == 1 { SPEEDSTEP } else { 0 };
                assert_eq!(guest(leaf, 0, shown, everything(vendor)), [a, b, c | eist, d | MTRR]);
            }
        }
        assert_eq!(guest(0x4000_0003, 0, shown, everything(AMD)), [6, 0, 0, 0]);
        assert_eq!(guest(0x4000_0003, 1, shown, everything(AMD)), [0; 4]);
        assert_eq!(guest(0x4000_0003, 0, CONTEXT, everything(AMD)), [6, 2, 1_000_000, 1]);
        assert_eq!(guest(0x4000_0003, 1, CONTEXT, everything(AMD)), [0, 0, 1 << 31, 1]);
        let plain = |leaf, _| if leaf == 0x8000_0000 { [0x8000_0001, 0, 0, 0] } else { [0; 4] };
        assert_eq!(guest(0x4000_0003, 0, CONTEXT, plain)[0], 0);
    }

    #[test]
    fn xcr0_is_x87_with_what_depends_on_nothing_that_is_off() {
        let good: Vec<u64> = (0..16).filter(|v| is_xcr0(*v, XCR0_OFFERED)).collect();
        assert_eq!(good, [1, 3, 7]);
        assert!(!is_xcr0(7, 3) && !is_xcr0(1 << 63 | 7, XCR0_OFFERED));
        assert!(is_xcr0(XCR0_INITIAL, 3));
    }

    #[test]
    fn leaves_beyond_the_maxima_are_empty() {
        let host = everything(INTEL);
        assert_eq!(guest(0, 0, CONTEXT, &host)[0], 0xd);
        assert_eq!(guest(0xe, 0, CONTEXT, &host), [0; 4]);
        assert_eq!(guest(0x8000_0000, 0, CONTEXT, &host)[0], 0x8000_0008);
        assert_eq!(guest(0x8000_0009, 0, CONTEXT, &host), [0; 4]);
        assert_eq!(guest(0x8000_0000, 0, CONTEXT, everything(AMD))[0], 0x8000_0021);
        assert_eq!(guest(0x8000_0022, 0, CONTEXT, everything(AMD)), [0; 4]);
        assert_eq!(guest(0xffff_ffff, 0, CONTEXT, &host), [0; 4]);
        let small = |leaf, _| if leaf == 0 { [1, 0, 0, 0] } else { [u32::MAX; 4] };
        assert_eq!(guest(0, 0, CONTEXT, small)[0], 1);
        assert_eq!(guest(7, 0, CONTEXT, small), [0; 4]);
    }

    #[test]
    fn sysenter_is_offered_where_it_works() {
        assert_ne!(guest(1, 0, CONTEXT, everything(INTEL))[3] & SYSENTER, 0);
        assert_eq!(guest(1, 0, CONTEXT, everything(AMD))[3] & SYSENTER, 0);
    }

    #[test]
    fn vendors_are_recognised() {
        assert_eq!(Vendor::from_leaf0(everything(AMD)(0, 0)), Vendor::Amd);
        assert_eq!(Vendor::from_leaf0(everything(INTEL)(0, 0)), Vendor::Intel);
        assert_eq!(Vendor::from_leaf0([0; 4]), Vendor::Other);
    }
}

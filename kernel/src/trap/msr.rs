//! Model-specific registers as a guest's kernel sees them.
//!
//! Nothing here writes the processor's own registers, and of those only the few that tell of the machine are read: each register
//! has a fixed meaning below, is one of the segment bases and counters that the vCPU has anyway, or does not exist and faults. The set follows what Xen 4.17 gives
//! a paravirtualized kernel without performance counters.

use super::cpuid::Vendor;

/// The page attribute table in force, which guests derive their cache types from.
pub const PAT: u64 = 0x0000_0501_0007_0406;

/// Register that fills a page with hypercall stubs, announced in CPUID.
pub const HYPERCALL_PAGE: u32 = 0x4000_0000;

/// EFER: SYSCALL, long mode enabled and active.
const EFER_BASE: u64 = 1 | 1 << 8 | 1 << 10;
const EFER_NX: u64 = 1 << 11;

/// What is known about the vCPU that asks.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Who made the processor.
    pub vendor: Vendor,
    /// Whether it is the domain's first vCPU.
    pub boot_vcpu: bool,
    /// Whether the processor has no-execute pages.
    pub nx: bool,
    /// Whether guests have TSC_AUX.
    pub tsc_aux: bool,
    /// Whether the domain is the first, which drives the machine.
    pub hardware: bool,
}

impl Context {
    /// EFER as the guest reads it.
    pub const fn efer(self) -> u64 {
        if self.nx { EFER_BASE | EFER_NX } else { EFER_BASE }
    }
    const fn amd(self) -> bool {
        matches!(self.vendor, Vendor::Amd | Vendor::Hygon)
    }
    const fn intel(self) -> bool {
        matches!(self.vendor, Vendor::Intel)
    }
}

/// The meaning of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Msr {
    /// Base of FS.
    FsBase,
    /// Base of GS in force.
    GsBase,
    /// Base of GS of the guest's user mode.
    UserGsBase,
    /// Time-stamp counter; read-only.
    Tsc,
    /// What RDTSCP and RDPID give beside the time stamp.
    TscAux,
    /// Machine-check status, which is kept and means nothing.
    McgStatus,
    /// Address of a page for the hypercall stubs; reads as 0.
    HypercallPage,
    /// The machine's own register, if it has it.
    Machine(Machine),
    /// Reads as this value; writes are dropped.
    Fixed(u64),
    /// Reads as this value, and may be written with it only.
    Constant(u64),
    /// Reads as this value; writes fault.
    ReadOnly(u64),
    /// Writes are dropped; reads fault.
    WriteIgnored,
    /// Does not exist.
    Missing,
}

/// How a register of the machine is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Bits that are shown.
    keep: u64,
    /// Bits that are set then.
    set: u64,
    /// What becomes of writes.
    pub writes: Writes,
}

impl Machine {
    /// What the guest reads when the machine's register holds `value`.
    pub const fn shown(self, value: u64) -> u64 {
        value & self.keep | self.set
    }
}

/// What becomes of a write to a register of the machine; it never reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// It faults.
    Fault,
    /// It is dropped, where there is such a register.
    Dropped,
    /// It is dropped if it is 0, and faults otherwise.
    Zero,
}

const fn machine(writes: Writes) -> Msr {
    Msr::Machine(Machine { keep: u64::MAX, set: 0, writes })
}

/// What register `number` is to this vCPU.
pub fn lookup(number: u32, c: Context) -> Msr {
    match number {
        // Machine-check address and type of old.
        0 | 1 => Msr::ReadOnly(0),
        0x10 => Msr::Tsc,
        // PLATFORM_ID.
        0x17 if c.intel() => machine(Writes::Fault),
        // APIC_BASE: enabled at its usual place, which no guest can map.
        0x1b => Msr::ReadOnly(0xfee0_0800 | if c.boot_vcpu { 0x100 } else { 0 }),
        // FEATURE_CONTROL: locked, nothing on.
        0x3a if c.intel() => Msr::ReadOnly(1),
        // Microcode revision. Intel asks for 0 to be written before it is read.
        0x8b if c.intel() => machine(Writes::Zero),
        0x8b if matches!(c.vendor, Vendor::Amd) => machine(Writes::Fault),
        // Performance counters, which are off.
        0xc1..=0xc8 | 0x186..=0x189 | 0x309..=0x30b | 0x38d..=0x390 if c.intel() => Msr::Fixed(0),
        0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b if c.amd() => Msr::Fixed(0),
        // PLATFORM_INFO, MISC_FEATURES_ENABLES: no CPUID faulting is offered.
        0xce => Msr::ReadOnly(0),
        0x140 => Msr::Constant(0),
        // MPERF, APERF.
        0xe7 | 0xe8 if c.intel() || c.amd() => Msr::WriteIgnored,
        // Machine check: two banks in which all is on and nothing ever happens, with software recovery on Intel's; status;
        // control. The registers of more banks are there, and nothing.
        0x179 => Msr::Fixed(if c.intel() { MCG_CAP_INTEL } else { MC_BANKS }),
        0x17a => Msr::McgStatus,
        0x400 | 0x404 => Msr::Fixed(u64::MAX),
        0x401..=0x403 | 0x405..=0x407 => Msr::Constant(0),
        0x17b | 0x280..=0x29f | 0x408..=0x47f => Msr::Fixed(0),
        // PERF_STATUS, PERF_CTL, THERM_STATUS.
        0x198 | 0x19c if c.intel() => Msr::ReadOnly(0),
        0x199 if c.intel() => Msr::Fixed(0),
        // THERM_CONTROL, ENERGY_PERF_BIAS.
        0x19a | 0x1b0 if c.intel() => Msr::WriteIgnored,
        // MISC_ENABLE: no performance counters, no branch trace store, no precise sampling, no MONITOR, no xTPR messages.
        0x1a0 => Msr::Machine(Machine {
            keep: !(1 << 7 | 1 << 18),
            set: 1 << 11 | 1 << 12 | 1 << 23,
            writes: Writes::Dropped,
        }),
        0x277 => Msr::ReadOnly(PAT),
        // PERF_CAPABILITIES.
        0x345 => Msr::ReadOnly(0),
        HYPERCALL_PAGE => Msr::HypercallPage,
        // Linux writes back what it read.
        0xc000_0080 => Msr::Constant(c.efer()),
        0xc000_0100 => Msr::FsBase,
        0xc000_0101 => Msr::GsBase,
        0xc000_0102 => Msr::UserGsBase,
        0xc000_0103 if c.tsc_aux => Msr::TscAux,
        // SYSCFG: where DRAM is, by the MTRRs and above 4 GiB. Then the ranges themselves.
        0xc001_0010 if c.amd() && c.hardware => Msr::Machine(Machine {
            keep: 1 << 18 | 1 << 20 | 1 << 21 | 1 << 22,
            set: 0,
            writes: Writes::Fault,
        }),
        0xc001_0016..=0xc001_001a | 0xc001_001d | 0xc001_0112 | 0xc001_0113 if c.amd() && c.hardware => {
            machine(Writes::Fault)
        }
        // NB_CFG.
        0xc001_001f => Msr::Fixed(0),
        // HWCR, voltage and P-state control.
        0xc001_0015 | 0xc001_0041 | 0xc001_0042 | 0xc001_0061..=0xc001_006b if c.amd() => Msr::Fixed(0),
        // DE_CFG: LFENCE serialises.
        0xc001_1029 if c.amd() => Msr::Fixed(2),
        _ => Msr::Missing,
    }
}

/// Machine-check banks that guests see.
const MC_BANKS: u64 = 2;
/// On Intel's: with software recovery, threshold-based status, and interrupts for corrected errors.
const MCG_CAP_INTEL: u64 = MCG_SER_P | MCG_TES_P | MCG_CMCI_P | MC_BANKS;
const MCG_CMCI_P: u64 = 1 << 10;
const MCG_TES_P: u64 = 1 << 11;
const MCG_SER_P: u64 = 1 << 24;

/// The privileged instruction faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// The value that a read of a register without state gives. For the others the caller has the value.
pub fn read_fixed(msr: Msr) -> Result<u64, Fault> {
    match msr {
        Msr::Fixed(v) | Msr::Constant(v) | Msr::ReadOnly(v) => Ok(v),
        Msr::HypercallPage => Ok(0),
        _ => Err(Fault),
    }
}

/// Whether a write to a register without state is accepted; it never has an effect.
pub fn write_fixed(msr: Msr, value: u64) -> Result<(), Fault> {
    match msr {
        Msr::Fixed(_) | Msr::WriteIgnored => Ok(()),
        Msr::Constant(v) if v == value => Ok(()),
        _ => Err(Fault),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(vendor: Vendor) -> Context {
        Context { vendor, boot_vcpu: true, nx: true, tsc_aux: false, hardware: false }
    }

    #[test]
    fn what_linux_needs_is_there() {
        let c = context(Vendor::Amd);
        assert_eq!(read_fixed(lookup(0x1b, c)), Ok(0xfee0_0900));
        assert_eq!(read_fixed(lookup(0x1b, Context { boot_vcpu: false, ..c })), Ok(0xfee0_0800));
        assert_eq!(read_fixed(lookup(0x277, c)), Ok(0x0000_0501_0007_0406));
        assert_eq!(read_fixed(lookup(0xc000_0080, c)), Ok(0xd01));
        assert_eq!(write_fixed(lookup(0xc000_0080, c), 0xd01), Ok(()));
        assert_eq!(write_fixed(lookup(0xc000_0080, c), 0xd00), Err(Fault));
        assert_eq!(lookup(0xc000_0100, c), Msr::FsBase);
        assert_eq!(lookup(0xc000_0101, c), Msr::GsBase);
        assert_eq!(lookup(0xc000_0102, c), Msr::UserGsBase);
        assert_eq!(read_fixed(lookup(0x179, c)), Ok(2));
        assert_eq!(read_fixed(lookup(0x404, c)), Ok(u64::MAX));
        assert_eq!(write_fixed(lookup(0x404, c), 0), Ok(()));
        assert_eq!(
            (write_fixed(lookup(0x405, c), 0), write_fixed(lookup(0x405, c), 1)),
            (Ok(()), Err(Fault))
        );
        assert_eq!(write_fixed(lookup(0x408, c), 1), Ok(()));
        assert_eq!(read_fixed(lookup(0xc001_1029, c)), Ok(2));
    }

    #[test]
    fn nothing_of_the_machine_can_be_reached() {
        // SYSCALL and SYSENTER entry points, MTRRs, branch records, APIC, debug control, TSC_AUX, speculation control.
        for vendor in [Vendor::Intel, Vendor::Amd, Vendor::Hygon, Vendor::Other] {
            let c = context(vendor);
            for number in [
                0xc000_0081,
                0xc000_0082,
                0xc000_0083,
                0xc000_0084,
                0xc000_0103,
                0x174,
                0x175,
                0x176,
                0x1d9,
                0x1db,
                0x200,
                0x2ff,
                0x48,
                0x49,
                0x10a,
                0x800,
                0x8ff,
                0x6e0,
                0xda0,
                0xc001_0114,
                0xc001_0117,
                0x4000_0001,
            ] {
                assert_eq!(lookup(number, c), Msr::Missing, "{number:#x}");
            }
        }
    }

    #[test]
    fn vendors_differ() {
        assert_eq!(lookup(0xc001_0015, context(Vendor::Intel)), Msr::Missing);
        assert_eq!(read_fixed(lookup(0x179, context(Vendor::Intel))), Ok(0x100_0c02));
        let machine = |number, vendor| match lookup(number, context(vendor)) {
            Msr::Machine(m) => m,
            other => panic!("{other:?}"),
        };
        assert_eq!(machine(0x8b, Vendor::Intel).writes, Writes::Zero);
        assert_eq!(machine(0x8b, Vendor::Amd).writes, Writes::Fault);
        assert_eq!(lookup(0x8b, context(Vendor::Hygon)), Msr::Missing);
    }

    #[test]
    fn registers_of_the_machine_are_shown_cut_down() {
        let of = |number, hardware| match lookup(number, Context { hardware, ..context(Vendor::Amd) }) {
            Msr::Machine(m) => Some((m.shown(0), m.shown(u64::MAX))),
            _ => None,
        };
        assert_eq!(of(0x1a0, false), Some((0x80_1800, !0x4_0080)));
        assert_eq!(of(0xc001_0010, true), Some((0, 0x74_0000)));
        assert_eq!(of(0xc001_001a, true), Some((0, u64::MAX)));
        for number in [0xc001_0010, 0xc001_0016, 0xc001_001a, 0xc001_001d, 0xc001_0112, 0xc001_0113] {
            assert_eq!(of(number, false), None, "{number:#x}");
        }
        assert_eq!(lookup(0xc000_0103, context(Vendor::Amd)), Msr::Missing);
        let with = Context { tsc_aux: true, ..context(Vendor::Amd) };
        assert_eq!(lookup(0xc000_0103, with), Msr::TscAux);
    }
}

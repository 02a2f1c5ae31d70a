//! Commands of `platform_op` (public/platform.h), and the one struct that sets the wall clock.
//!
//! The argument is a [`PlatformHeader`] with the command's struct behind it, in 136 bytes together.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version in [`PlatformHeader`]; another one gets `-EACCES`.
pub const XENPF_INTERFACE_VERSION: u32 = 0x0300_0001;
/// Bytes of the whole argument.
pub const PLATFORM_OP_SIZE: usize = 136;

crate::subops::command_enum! {
    /// Commands of `platform_op`.
    PlatformOp, "XENPF_" {
        /// Sets the wall clock, 32 bits of seconds.
        Settime32 = 17, "settime32";
        /// Sets a memory-type range.
        AddMemtype = 31, "add_memtype";
        /// Frees it.
        DelMemtype = 32, "del_memtype";
        /// Reads it.
        ReadMemtype = 33, "read_memtype";
        /// Loads microcode.
        MicrocodeUpdate = 35, "microcode_update";
        /// Notes a quirk of the machine.
        PlatformQuirk = 39, "platform_quirk";
        /// A CPU's family, model and stepping.
        GetCpuVersion = 48, "get_cpu_version";
        /// A call of the firmware.
        EfiRuntimeCall = 49, "efi_runtime_call";
        /// Facts that the firmware left.
        FirmwareInfo = 50, "firmware_info";
        /// Sends the machine to sleep.
        EnterAcpiSleep = 51, "enter_acpi_sleep";
        /// Notes a CPU's new frequency.
        ChangeFreq = 52, "change_freq";
        /// Idle times.
        Getidletime = 53, "getidletime";
        /// Tells a CPU's power states.
        SetProcessorPminfo = 54, "set_processor_pminfo";
        /// Facts about a CPU.
        GetCpuinfo = 55, "get_cpuinfo";
        /// Brings a CPU up.
        CpuOnline = 56, "cpu_online";
        /// Takes a CPU down.
        CpuOffline = 57, "cpu_offline";
        /// A CPU was added.
        CpuHotadd = 58, "cpu_hotadd";
        /// Memory was added.
        MemHotadd = 59, "mem_hotadd";
        /// Parks cores.
        CoreParking = 60, "core_parking";
        /// Reads and writes model registers.
        ResourceOp = 61, "resource_op";
        /// Sets the wall clock.
        Settime64 = 62, "settime64";
        /// A symbol of the hypervisor.
        GetSymbol = 63, "get_symbol";
    }
}

/// The head of the argument (IN).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PlatformHeader {
    /// Number of a [`PlatformOp`].
    pub cmd: u32,
    /// [`XENPF_INTERFACE_VERSION`].
    pub interface_version: u32,
}

/// IN of `settime64`: it was this time at that system time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Settime64 {
    /// Unix time, seconds.
    pub secs: u64,
    /// Nanoseconds, below 10^9.
    pub nsecs: u32,
    /// Zero.
    pub mbz: u32,
    /// System time, ns.
    pub system_time: u64,
}

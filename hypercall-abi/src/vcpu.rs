//! What a vCPU is made of: shared records, registers, and the arguments of `vcpu_op` (public/vcpu.h, arch-x86/xen.h).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{GuestHandle, Mfn};

/// A vCPU's copy of the clock: how to turn a TSC value into system time, 32 bytes.
///
/// Written by the hypervisor only, read by the guest, also from user mode. Protocol (a sequence lock with one writer): the
/// writer makes `version` odd, stores the fields, makes it even again, with a store barrier between the three. A reader loads
/// `version` (acquire), the fields, an acquire fence, and `version` again; it starts over when the two differ or are odd.
///
/// System time in ns is `system_time + ((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32` (a negative shift
/// shifts right), with a 96-bit product.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuTimeInfo {
    /// Odd while the record is being written.
    pub version: u32,
    /// Padding.
    pub pad0: u32,
    /// TSC when the record was written.
    pub tsc_timestamp: u64,
    /// System time at that moment, ns since the hypervisor started.
    pub system_time: u64,
    /// Nanoseconds per shifted TSC tick, a fraction of 2^32.
    pub tsc_to_system_mul: u32,
    /// Shift of the TSC difference before the multiplication, left when positive.
    pub tsc_shift: i8,
    /// [`PvclockFlags`].
    pub flags: u8,
    /// Padding.
    pub pad1: [u8; 2],
}

bitflags! {
    /// Bits of [`VcpuTimeInfo::flags`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PvclockFlags: u8 {
        /// The records of all vCPUs agree, so time never goes back between them.
        const TSC_STABLE = 1 << 0;
        /// The guest was stopped; cleared by the guest.
        const GUEST_STOPPED = 1 << 1;
    }
}

/// The part of [`VcpuInfo`] that is x86's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ArchVcpuInfo {
    /// Address of the last page fault, written before the fault is delivered; the guest reads it in place of CR2.
    pub cr2: u64,
    /// Padding up to 64 bytes.
    pub pad: u64,
}

/// What hypervisor and guest share about one vCPU, 64 bytes; in the shared page until registered elsewhere.
///
/// Raising an event: set the port's pending bit; if it was clear and its mask bit is clear, set its word's bit in
/// `evtchn_pending_sel`; if that was clear, store `evtchn_upcall_pending = 1` (all atomic, in this order) and kick the CPU.
/// The guest's upcall clears `evtchn_upcall_pending` *first*, then exchanges the selector with 0 and looks at the words, so
/// that a set in between is seen again. `evtchn_upcall_mask` is written by the guest on its own CPU, and by the hypervisor
/// when it delivers an upcall (1) or blocks (0); nobody else reads it, so plain stores do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuInfo {
    /// Not zero when there is something to look for.
    pub evtchn_upcall_pending: u8,
    /// Not zero when no upcall may be delivered: the virtual interrupt flag, inverted.
    pub evtchn_upcall_mask: u8,
    /// Padding.
    pub pad0: [u8; 6],
    /// One bit for each word of the pending array that may hold something.
    pub evtchn_pending_sel: u64,
    /// x86's own part.
    pub arch: ArchVcpuInfo,
    /// The clock.
    pub time: VcpuTimeInfo,
}

/// A vCPU's state in [`RunstateInfo`]: on a CPU.
pub const RUNSTATE_RUNNING: i32 = 0;
/// It could run, but others do.
pub const RUNSTATE_RUNNABLE: i32 = 1;
/// It waits for an event.
pub const RUNSTATE_BLOCKED: i32 = 2;
/// It is down or paused.
pub const RUNSTATE_OFFLINE: i32 = 3;

/// Bit of [`RunstateInfo::state_entry_time`] that is set while the record is being written, with the assist
/// [`RunstateUpdateFlag`](crate::subops::VmAssist::RunstateUpdateFlag).
pub const RUNSTATE_UPDATE: u64 = 1 << 63;

/// Where a vCPU's time went (OUT of `get_runstate_info`, and the registered area).
///
/// The hypervisor writes the registered area when the vCPU's state changes. With the assist: set the update bit, store
/// barrier, fields, store barrier, clear the bit; a reader retries while the bit is set or `state_entry_time` changed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RunstateInfo {
    /// `RUNSTATE_*`.
    pub state: i32,
    /// Padding.
    pub pad0: u32,
    /// System time at which the state began, ns.
    pub state_entry_time: u64,
    /// Nanoseconds spent in each state, indexed by `RUNSTATE_*`.
    pub time: [u64; 4],
}

/// A vCPU's general registers, in the order the hypervisor and Xen's tools use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CpuUserRegs {
    /// General register.
    pub r15: u64,
    /// General register.
    pub r14: u64,
    /// General register.
    pub r13: u64,
    /// General register.
    pub r12: u64,
    /// General register.
    pub rbp: u64,
    /// General register.
    pub rbx: u64,
    /// General register.
    pub r11: u64,
    /// General register.
    pub r10: u64,
    /// General register.
    pub r9: u64,
    /// General register.
    pub r8: u64,
    /// General register.
    pub rax: u64,
    /// General register.
    pub rcx: u64,
    /// General register.
    pub rdx: u64,
    /// General register; a new guest finds its start-info page here.
    pub rsi: u64,
    /// General register.
    pub rdi: u64,
    /// Error code of the last trap; the hypervisor's own.
    pub error_code: u32,
    /// Vector of the last trap; the hypervisor's own.
    pub entry_vector: u32,
    /// Instruction pointer.
    pub rip: u64,
    /// Code selector.
    pub cs: u16,
    /// Padding.
    pub pad0: u16,
    /// The upcall mask at the time of the trap; in trap frames only.
    pub saved_upcall_mask: u8,
    /// Padding.
    pub pad1: [u8; 3],
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack selector.
    pub ss: u16,
    /// Padding.
    pub pad2: [u16; 3],
    /// Data selector.
    pub es: u16,
    /// Padding.
    pub pad3: [u16; 3],
    /// Data selector.
    pub ds: u16,
    /// Padding.
    pub pad4: [u16; 3],
    /// Data selector.
    pub fs: u16,
    /// Padding.
    pub pad5: [u16; 3],
    /// Data selector.
    pub gs: u16,
    /// Padding.
    pub pad6: [u16; 3],
}

/// One entry of the virtual trap table (IN of `set_trap_table`; the list ends at an entry with address 0).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrapInfo {
    /// Exception or software interrupt number.
    pub vector: u8,
    /// Bits 0 and 1: who may raise it by `int n` (0 to 3). Bit 2: mask upcalls on delivery.
    pub flags: u8,
    /// Code selector of the handler.
    pub cs: u16,
    /// Padding.
    pub pad0: u32,
    /// Address of the handler.
    pub address: u64,
}

impl TrapInfo {
    /// Mask of [`flags`](Self::flags) for the privilege level.
    pub const DPL_MASK: u8 = 3;
    /// Bit of [`flags`](Self::flags): mask upcalls on delivery.
    pub const MASK_EVENTS: u8 = 1 << 2;

    /// Least privileged level that may raise it by `int n`.
    #[must_use]
    pub const fn dpl(&self) -> u8 {
        self.flags & Self::DPL_MASK
    }

    /// Whether its delivery masks upcalls, as an interrupt gate does.
    #[must_use]
    pub const fn masks_events(&self) -> bool {
        self.flags & Self::MASK_EVENTS != 0
    }
}

bitflags! {
    /// Flags of [`VcpuGuestContext`], and of the frame that `iret` takes (`IN_SYSCALL`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VcpuContextFlags: u64 {
        /// `fpu_ctxt` holds state to load.
        const I387_VALID = 1 << 0;
        /// The vCPU is in guest kernel mode.
        const IN_KERNEL = 1 << 2;
        /// The failsafe callback masks upcalls.
        const FAILSAFE_DISABLES_EVENTS = 1 << 3;
        /// The syscall callback masks upcalls.
        const SYSCALL_DISABLES_EVENTS = 1 << 4;
        /// The vCPU is up.
        const ONLINE = 1 << 5;
        /// It entered by SYSCALL: rcx and r11 need not survive the return.
        const IN_SYSCALL = 1 << 8;
    }
}

/// The whole state of a vCPU as a guest or a builder sees it, 5168 bytes (IN of `initialise` and of the control interface).
///
/// Frames in `gdt_frames`, `ctrlreg[1]` and `ctrlreg[3]` are machine frames; the two roots are in CR3 form (`mfn << 12`). The
/// selectors FS and GS are in `user_regs`, their bases at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuGuestContext {
    /// FXSAVE image.
    pub fpu_ctxt: [u8; 512],
    /// [`VcpuContextFlags`].
    pub flags: u64,
    /// General registers.
    pub user_regs: CpuUserRegs,
    /// The virtual trap table, by vector.
    pub trap_ctxt: [TrapInfo; 256],
    /// Virtual address of the local descriptor table.
    pub ldt_base: u64,
    /// Entries in it.
    pub ldt_ents: u64,
    /// Machine frames of the descriptor table; 14 at most are used.
    pub gdt_frames: [Mfn; 16],
    /// Entries in it.
    pub gdt_ents: u64,
    /// Stack selector for traps from guest user mode.
    pub kernel_ss: u64,
    /// Stack pointer for traps from guest user mode.
    pub kernel_sp: u64,
    /// CR0 to CR7; in place of CR1, the root of guest user mode's page tables.
    pub ctrlreg: [u64; 8],
    /// DR0 to DR7.
    pub debugreg: [u64; 8],
    /// Entry point of event upcalls.
    pub event_callback_eip: u64,
    /// Entry point when the state cannot be restored.
    pub failsafe_callback_eip: u64,
    /// Entry point of SYSCALL from 64-bit user mode.
    pub syscall_callback_eip: u64,
    /// Bits by number of [`VmAssist`](crate::subops::VmAssist).
    pub vm_assist: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base of the guest kernel.
    pub gs_base_kernel: u64,
    /// GS base of guest user mode.
    pub gs_base_user: u64,
}

impl VcpuGuestContext {
    /// All zero: a base to fill in.
    pub const ZERO: Self = zerocopy::transmute!([0_u8; size_of::<Self>()]);
}

impl Default for VcpuGuestContext {
    fn default() -> Self {
        Self::ZERO
    }
}

/// The frame on the guest kernel's stack that `iret` takes, from the stack pointer up; `rax` is on top.
///
/// Written by the guest; the hypervisor reads it once. `rcx` and `r11` are restored from here unless the frame says
/// [`VcpuContextFlags::IN_SYSCALL`] in `flags`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IretContext {
    /// Restored.
    pub rax: u64,
    /// Restored, but for a return by SYSRET.
    pub r11: u64,
    /// Restored, but for a return by SYSRET.
    pub rcx: u64,
    /// [`VcpuContextFlags::IN_SYSCALL`] or 0.
    pub flags: u64,
    /// Where to go on.
    pub rip: u64,
    /// Code selector; its privilege bits are forced to 3.
    pub cs: u64,
    /// Flags; IF becomes the upcall mask, inverted.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack selector; its privilege bits are forced to 3.
    pub ss: u64,
}

/// IN of `set_periodic_timer`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuSetPeriodicTimer {
    /// Time between two [`Virq::TIMER`](crate::Virq::TIMER), ns; at least 1 ms or `-EINVAL`.
    pub period_ns: u64,
}

/// IN of `set_singleshot_timer`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuSetSingleshotTimer {
    /// When, in system time, ns.
    pub timeout_abs_ns: u64,
    /// [`VCPU_SSHOTTMR_FUTURE`] or 0.
    pub flags: u32,
    /// Padding.
    pub pad0: u32,
}

/// Flag of [`VcpuSetSingleshotTimer`]: the time must not have passed. Xen does not look at it any more: the event comes at once.
pub const VCPU_SSHOTTMR_FUTURE: u32 = 1 << 0;

/// IN of `register_vcpu_info`; once for each vCPU, `-EINVAL` after that.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuRegisterVcpuInfo {
    /// Machine frame of the new place, writable by the guest.
    pub mfn: u64,
    /// Offset in it; the record must not cross its end.
    pub offset: u32,
    /// Unused.
    pub rsvd: u32,
}

/// IN of `register_runstate_memory_area`: the virtual address, in the guest kernel's page tables.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuRegisterRunstateMemoryArea {
    /// Where; null unregisters.
    pub addr: GuestHandle<RunstateInfo>,
}

/// IN of `register_vcpu_time_memory_area`: the virtual address, mapped in kernel and user page tables.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuRegisterTimeMemoryArea {
    /// Where; null unregisters.
    pub addr: GuestHandle<VcpuTimeInfo>,
}

/// OUT of `get_physid`; only for a vCPU pinned to a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VcpuGetPhysid {
    /// Local APIC number in the low half, ACPI number in the high.
    pub phys_id: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trap_flags_split() {
        let trap = TrapInfo { flags: 7, ..Default::default() };
        assert_eq!((trap.dpl(), trap.masks_events()), (3, true));
        let trap = TrapInfo { flags: 0xfb & 3, ..Default::default() };
        assert_eq!((trap.dpl(), trap.masks_events()), (3, false));
    }
}

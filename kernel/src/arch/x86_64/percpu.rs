//! Per-CPU data: at the top of the CPU's block, found by masking the stack pointer (drawing in `hv::x86::layout`).
//!
//! GS cannot lead here: a PV guest owns it and loads any base it likes.

use hv::domain::{Cpu, VcpuState};
use hv::x86::layout::{CPU_BLOCK_SIZE, CPU_BLOCKS};
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::tss::TaskStateSegment;

/// What a CPU keeps for itself. The assembly of `entry` takes its offsets from here.
#[repr(C, align(64))]
pub struct CpuInfo {
    /// Registers and state of the vCPU that runs here; null when none does. Read by the #DB entry.
    pub current: *mut VcpuState,
    /// Number of the CPU, from 0.
    pub number: usize,
    /// Machine address of the L1 table of its descriptor windows.
    pub window_l1: u64,
    /// Machine address of its page of descriptors.
    pub gdt_page: u64,
    /// Hardware id of its local APIC.
    pub apic_id: u32,
    /// Number of entries in the LDT that is loaded.
    pub ldt_entries: u32,
    /// How many of the first pages of its window may show a page of a GDT.
    pub gdt_pages: usize,
    /// Whether its window may show pages of an LDT.
    pub ldt_shown: bool,
    /// Whether guest breakpoints are loaded and on.
    pub breakpoints_on: bool,
    /// CR4 as it is, and as it is without the guest's own bits.
    pub cr4: Cr4Flags,
    /// See `cr4`.
    pub base_cr4: Cr4Flags,
    /// The guest's wish that `cr4` was made for; `None` when it is to be made anew.
    pub wanted_cr4: Option<u64>,
    /// The bases of FS and of GS in force and the other base of GS, as they are while no vCPU runs here; `None` when that is not known.
    pub bases: Option<[u64; 3]>,
    /// XCR0 as it is; 0 when it was not written yet, or without XSAVE.
    pub xcr0: u64,
    /// TSC_AUX as it is, on a processor that has it.
    pub tsc_aux: u32,
    /// See `tsc_aux`.
    pub has_tsc_aux: bool,
    /// What its time-stamp counter is ahead of the boot processor's, modulo 2^64.
    pub tsc_offset: u64,
    /// Policy's part: the vCPU that runs here, owned. None until policy starts on this CPU.
    pub cpu: Option<Cpu>,
    /// Task state: interrupt stacks, and the stack on which ring 3 enters.
    pub tss: TaskStateSegment,
}

impl CpuInfo {
    /// First address of the block this lies in.
    pub fn block(&self) -> u64 {
        (self as *const CpuInfo as u64) & !(CPU_BLOCK_SIZE - 1)
    }
}

/// Offset of [`CpuInfo`] in its block; the CPU's stack begins below it.
pub const INFO_OFFSET: u64 = CPU_BLOCK_SIZE - size_of::<CpuInfo>() as u64;

/// Address of the block of a CPU.
pub fn block(cpu: usize) -> u64 {
    CPU_BLOCKS + cpu as u64 * CPU_BLOCK_SIZE
}

fn stack_pointer() -> u64 {
    let rsp: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
    rsp
}

/// The data of the CPU this runs on; null while booting on the first stack.
pub fn this() -> *mut CpuInfo {
    if stack_pointer() >> 32 != CPU_BLOCKS >> 32 {
        return core::ptr::null_mut();
    }
    here()
}

/// As [`this`], for what never runs on the first stack of boot: there it names no data.
#[inline(always)]
pub fn here() -> *mut CpuInfo {
    ((stack_pointer() & !(CPU_BLOCK_SIZE - 1)) + INFO_OFFSET) as *mut CpuInfo
}

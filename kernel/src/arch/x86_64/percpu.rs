//! Per-CPU data: at the top of the CPU's block, found by masking the stack pointer (drawing in `hv::x86::layout`).
//!
//! GS cannot lead here: a PV guest owns it and loads any base it likes.

use hv::domain::VcpuState;
use hv::x86::layout::{CPU_BLOCK_SIZE, CPU_BLOCKS};
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

/// The data of the CPU this runs on; null while booting on the first stack.
pub fn this() -> *mut CpuInfo {
    let rsp: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
    if rsp >> 32 != CPU_BLOCKS >> 32 {
        return core::ptr::null_mut();
    }
    ((rsp & !(CPU_BLOCK_SIZE - 1)) + INFO_OFFSET) as *mut CpuInfo
}

//! Descriptor tables: the hypervisor's page of each CPU's GDT, the one IDT, the TSS.
//!
//! Selectors are Xen's (public header `arch-x86/xen-x86_64.h` and the reserved page 14 of each GDT): guests name
//! 0xe023, 0xe02b and 0xe033 themselves. The first 14 pages of the window belong to the guest that runs.

use super::paging;
use super::percpu::CpuInfo;
use core::sync::atomic::Ordering;
use hv::x86::layout::{self, PAGE_SIZE, cpu_block};
use x86_64::instructions::tables::{lgdt, lidt, load_tss};
use x86_64::registers::segmentation::{CS, Segment};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::SegmentSelector;
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

/// First selector of the hypervisor's page.
const OWN_PAGE: u16 = (layout::OWN_GDT_PAGE * PAGE_SIZE) as u16;
/// Ring 0 code.
pub const RING0_CODE: u16 = OWN_PAGE + 0x08;
/// 32-bit guest user code; SYSRET's base in STAR.
pub const GUEST_CODE32: u16 = OWN_PAGE + 0x23;
/// Flat guest data and stack.
pub const GUEST_DATA: u16 = OWN_PAGE + 0x2b;
/// Flat 64-bit guest code.
pub const GUEST_CODE: u16 = OWN_PAGE + 0x33;
/// Task state segment.
const TASK: u16 = OWN_PAGE + 0x40;
/// The guest's local descriptor table.
pub const LOCAL_TABLE: u16 = OWN_PAGE + 0x50;

/// Words of the hypervisor's GDT page that are the same on every CPU, at their index.
const DESCRIPTORS: [(usize, u64); 6] = [
    (1, 0x00af_9b00_0000_ffff), // ring 0 code, 64-bit
    (2, 0x00cf_9300_0000_ffff), // ring 0 data
    (3, 0x00cf_bb00_0000_ffff), // ring 1 code, 32-bit: as on Xen, not usable by a 64-bit guest
    (4, 0x00cf_fb00_0000_ffff), // ring 3 code, 32-bit
    (5, 0x00cf_f300_0000_ffff), // ring 3 data
    (6, 0x00af_fb00_0000_ffff), // ring 3 code, 64-bit
];

/// A system descriptor of 16 bytes: TSS (type 9) or LDT (type 2).
fn system_descriptor(base: u64, limit: u64, kind: u64) -> [u64; 2] {
    let low = (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (0x80 | kind) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

/// Interrupt stack numbers in the TSS (1 to 7 in a gate).
const IST_NMI: u8 = 1;
const IST_MACHINE_CHECK: u8 = 2;
const IST_DEBUG: u8 = 3;
const IST_DOUBLE_FAULT: u8 = 4;

static IDT: spin::Once<[[u64; 2]; 256]> = spin::Once::new();

unsafe extern "C" {
    /// 256 entry stubs, [`STUB_SIZE`] bytes apart.
    static vector_stubs: u8;
}
/// Bytes between two entry stubs.
pub const STUB_SIZE: u64 = 16;

fn gate(vector: usize) -> [u64; 2] {
    let target = (&raw const vector_stubs as u64) + vector as u64 * STUB_SIZE;
    // Guests may raise #BP, #OF and the old system call by their instructions; every other INT n faults, and policy looks
    // at the trap table.
    let privilege = if matches!(vector, 3 | 4 | 0x80) { 3u64 } else { 0 };
    let ist = match vector {
        1 => IST_DEBUG,
        2 => IST_NMI,
        8 => IST_DOUBLE_FAULT,
        18 => IST_MACHINE_CHECK,
        _ => 0,
    };
    let low = (target & 0xffff)
        | u64::from(RING0_CODE) << 16
        | u64::from(ist) << 32
        | (0x8e | privilege << 5) << 40
        | (target >> 16 & 0xffff) << 48;
    [low, target >> 32]
}

/// Fills this CPU's GDT page and TSS, and loads all tables.
///
/// `page` is the machine address of the frame that is mapped as page 14 of the window.
///
/// # Safety
/// 1. `info` is the per-CPU data of the CPU this runs on, and its block is mapped for good.
/// 2. The window of the CPU shows `page`.
pub unsafe fn load(info: &'static mut CpuInfo, page: u64) {
    let block = info.block();
    let mut tss = TaskStateSegment::new();
    for (ist, top) in [
        (IST_NMI, cpu_block::NMI_TOP),
        (IST_MACHINE_CHECK, cpu_block::MACHINE_CHECK_TOP),
        (IST_DEBUG, cpu_block::DEBUG_TOP),
        (IST_DOUBLE_FAULT, cpu_block::DOUBLE_FAULT_TOP),
    ] {
        tss.interrupt_stack_table[usize::from(ist) - 1] = VirtAddr::new(block + top);
    }
    info.tss = tss;
    let words = paging::table(page);
    for (index, value) in DESCRIPTORS {
        words[index].store(value, Ordering::Relaxed);
    }
    // Limit 103: no I/O permission bitmap, every port access of ring 3 faults.
    let task = system_descriptor(&raw const info.tss as u64, 103, 9);
    words[0x40 / 8].store(task[0], Ordering::Relaxed);
    words[0x48 / 8].store(task[1], Ordering::Relaxed);

    let window = paging::window(info.number);
    let gdt = DescriptorTablePointer { base: VirtAddr::new(window), limit: OWN_PAGE + 0xfff };
    // SAFETY: the window's page 14 is mapped and holds valid descriptors; selectors below it are not used by ring 0.
    unsafe { lgdt(&gdt) };
    let selector = |value: u16| SegmentSelector::new(value >> 3, PrivilegeLevel::Ring0);
    // SAFETY: a 64-bit ring 0 code descriptor, just written.
    unsafe { CS::set_reg(selector(RING0_CODE)) };
    // The processor comes up with an LDT at address 0, not with none.
    // SAFETY: a null selector means no table.
    unsafe { core::arch::asm!("lldt {0:x}", in(reg) 0u32, options(nostack, preserves_flags)) };
    // SAFETY: an available TSS of this CPU alone, just written.
    unsafe { load_tss(selector(TASK)) };
    let idt = IDT.call_once(|| core::array::from_fn(gate));
    let pointer = DescriptorTablePointer { base: VirtAddr::from_ptr(idt), limit: 4095 };
    // SAFETY: every gate names an entry stub; interrupt stacks are in the TSS.
    unsafe { lidt(&pointer) };
}

/// Changes the LDT descriptor of this CPU and loads it; no entries means no table.
///
/// # Safety
/// As for [`load`], for the CPU this runs on.
pub unsafe fn load_local_table(page: u64, cpu: usize, entries: u32) {
    if entries == 0 {
        // SAFETY: a null selector means no table.
        unsafe { core::arch::asm!("lldt {0:x}", in(reg) 0u32, options(nostack, preserves_flags)) };
        return;
    }
    let base = paging::window(cpu) + layout::LDT_PAGE * PAGE_SIZE;
    let words = paging::table(page);
    let descriptor = system_descriptor(base, u64::from(entries.min(8192)) * 8 - 1, 2);
    words[0x50 / 8].store(descriptor[0], Ordering::Relaxed);
    words[0x58 / 8].store(descriptor[1], Ordering::Relaxed);
    // SAFETY: the descriptor was just written; the table it names lies in the window, which only shows typed frames.
    unsafe {
        core::arch::asm!("lldt {0:x}", in(reg) u32::from(LOCAL_TABLE), options(nostack, preserves_flags))
    };
}

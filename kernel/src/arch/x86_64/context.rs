//! The registers that ring 0 leaves alone while a guest's code is interrupted, moved at vCPU switches: segments and their
//! bases, descriptor windows, debug registers, CR4, vector state.

use super::percpu::CpuInfo;
use super::{cpu, entry, fpu, msr, paging, percpu, tables};
use core::arch::{asm, global_asm};
use hv::domain::{DataSelectors, GDT_FRAMES, VcpuState};
use hv::platform::Fault;
use hv::x86::layout::{self, PAGE_SIZE, is_canonical};
use hypercall_abi::Mfn;
use hypercall_abi::subops::SegmentBase;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};

global_asm!(
    include_str!("macros.s"),
    r#"
    .pushsection .text.load_segments, "ax", @progbits
    .macro LOAD_SEGMENT name, register
    .balign 16
    .globl load_\name
load_\name:                             /* (selector) -> 0; or 1, and the null selector, after a fault */
load_\name\()_at:
    mov \register, edi
    xor eax, eax
    ret
load_\name\()_fault:
    xor eax, eax
    mov \register, eax
    inc eax
    ret
    FIXUP load_\name\()_at, load_\name\()_fault
    .endm
    LOAD_SEGMENT ds, ds
    LOAD_SEGMENT es, es
    LOAD_SEGMENT fs, fs
    LOAD_SEGMENT gs, gs
    .popsection
    "#
);

unsafe extern "C" {
    fn load_ds(selector: u32) -> u32;
    fn load_es(selector: u32) -> u32;
    fn load_fs(selector: u32) -> u32;
    fn load_gs(selector: u32) -> u32;
}

/// CR4 bits a guest chooses itself: time-stamp disable, debugging extensions, its instructions for FS and GS bases.
const GUEST_CR4: Cr4Flags =
    Cr4Flags::TIMESTAMP_DISABLE.union(Cr4Flags::DEBUGGING_EXTENSIONS).union(Cr4Flags::FSGSBASE);
/// DR7 with every breakpoint off.
const DR7_OFF: u64 = 0x400;
/// The enable bits of DR7.
const DR7_ENABLES: u64 = 0xff;

/// A selector as ring 0 may load it for a guest: with the guest's privilege, so that a descriptor of ring 0 faults.
fn guest_selector(selector: u16) -> u32 {
    u32::from(if selector & !3 == 0 { selector } else { selector | 3 })
}

/// An address as a base register takes it; a non-canonical one, which policy should have refused, becomes 0.
fn base(address: u64) -> u64 {
    if is_canonical(address) { address } else { 0 }
}

fn info() -> &'static mut CpuInfo {
    // SAFETY: this CPU's own data; ring 0 is not preempted, and every use ends before the next begins.
    unsafe { &mut *percpu::here() }
}

fn live_selectors() -> DataSelectors {
    let (ds, es, fs, gs): (u16, u16, u16, u16);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {0:x}, ds", "mov {1:x}, es", "mov {2:x}, fs", "mov {3:x}, gs",
            out(reg) ds, out(reg) es, out(reg) fs, out(reg) gs, options(nomem, nostack, preserves_flags));
    }
    DataSelectors { es, ds, fs, gs }
}

/// Whether a selector names the same descriptor for every guest: none, or the hypervisor's flat data.
fn is_everybodys(selector: u16) -> bool {
    selector & !3 == 0 || selector == tables::GUEST_DATA
}

/// Reads the live selectors and bases into `state`, which runs on this CPU.
pub fn read_segments(state: &mut VcpuState) {
    state.selectors = live_selectors();
    let fast = info().cr4.contains(Cr4Flags::FSGSBASE);
    state.fs_base = msr::fs_base(fast);
    // The base that is not in force changes only by our own writes, which go to `state` first.
    if state.kernel_mode {
        state.gs_base_kernel = msr::gs_base(fast);
    } else {
        state.gs_base_user = msr::gs_base(fast);
    }
}

/// The bases of FS, of GS and the other one of GS as the processor holds them for `state`.
fn bases(state: &VcpuState) -> [u64; 3] {
    let (live, other) = match state.kernel_mode {
        true => (state.gs_base_kernel, state.gs_base_user),
        false => (state.gs_base_user, state.gs_base_kernel),
    };
    [state.fs_base, live, other].map(base)
}

/// Loads selectors and bases of `state`, which is to run on this CPU, unless they are there already. Selectors that fault become
/// null.
fn write_segments(state: &mut VcpuState) -> Result<(), Fault> {
    let wanted = bases(state);
    let registers = [msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE];
    let write = |register, value| {
        // SAFETY: canonical, and ring 0 never uses FS or GS.
        unsafe { msr::write(register, value) };
    };
    let known = info().bases.take();
    let DataSelectors { es, ds, fs, gs } = state.selectors;
    if let Some(live) = known
        && live_selectors() == state.selectors
        && [es, ds, fs, gs].into_iter().all(is_everybodys)
    {
        for ((register, live), wanted) in registers.into_iter().zip(live).zip(wanted) {
            if live != wanted {
                write(register, wanted);
            }
        }
        return Ok(());
    }
    let s = &mut state.selectors;
    let mut faulted = false;
    let mut load = |selector: &mut u16, function: unsafe extern "C" fn(u32) -> u32| {
        // SAFETY: the load may fault, which the fix-up mends. Ring 0 uses none of these segments in 64-bit mode.
        if unsafe { function(guest_selector(*selector)) } != 0 {
            *selector = 0;
            faulted = true;
        }
    };
    load(&mut s.ds, load_ds);
    load(&mut s.es, load_es);
    // These two also change the base, so bases come after.
    load(&mut s.fs, load_fs);
    load(&mut s.gs, load_gs);
    for (register, value) in registers.into_iter().zip(wanted) {
        write(register, value);
    }
    if faulted { Err(Fault) } else { Ok(()) }
}

/// Loads one base of `state`, which runs on this CPU in its kernel mode, or the selector and base of its user mode's GS.
pub fn load_segment(state: &VcpuState, which: SegmentBase) {
    let write = |register, value| {
        // SAFETY: canonical, and ring 0 never uses FS or GS.
        unsafe { msr::write(register, base(value)) };
    };
    match which {
        SegmentBase::Fs => write(msr::FS_BASE, state.fs_base),
        SegmentBase::GsKernel => write(msr::GS_BASE, state.gs_base_kernel),
        SegmentBase::GsUser => write(msr::KERNEL_GS_BASE, state.gs_base_user),
        SegmentBase::GsUserSel => {
            // A load changes the base in force, which is the kernel's.
            let kernel = msr::gs_base(info().cr4.contains(Cr4Flags::FSGSBASE));
            // SAFETY: the load may fault, which the fix-up mends. Ring 0 does not use GS.
            let _null_after_a_fault = unsafe { load_gs(guest_selector(state.selectors.gs)) };
            write(msr::GS_BASE, kernel);
            write(msr::KERNEL_GS_BASE, state.gs_base_user);
        }
    }
}

/// Loads the registers of `state` that guests read without a trap: XCR0 and TSC_AUX.
pub fn load_readable(state: &VcpuState) {
    let info = info();
    fpu::set_xcr0(&mut info.xcr0, state.xcr0);
    if info.has_tsc_aux && info.tsc_aux != state.tsc_aux {
        info.tsc_aux = state.tsc_aux;
        // SAFETY: a 32-bit value that only RDTSCP and RDPID see; ring 0 executes neither.
        unsafe { msr::write(msr::TSC_AUX, u64::from(state.tsc_aux)) };
    }
}

/// Exchanges the GS bases: the guest has just changed to the mode that `kernel_mode` says.
pub fn swap_gs(state: &mut VcpuState) {
    // With FSGSBASE, or by loading a selector, the guest may have changed the base it leaves behind.
    let left = msr::gs_base(info().cr4.contains(Cr4Flags::FSGSBASE));
    if state.kernel_mode {
        state.gs_base_user = left;
    } else {
        state.gs_base_kernel = left;
    }
    // SAFETY: ring 0 never uses GS.
    unsafe { asm!("swapgs", options(nomem, nostack, preserves_flags)) };
}

fn machine(mfn: Mfn) -> u64 {
    mfn.get() * PAGE_SIZE
}

/// Shows this CPU the GDT and LDT of `state`.
pub fn load_descriptor_tables(state: &VcpuState) {
    let info = info();
    // Most guests have a GDT of one page and no LDT: what shows nothing and is to show nothing is not looked at.
    let wanted = state.gdt.frames.iter().take_while(|frame| frame.is_some()).count();
    let shown = core::mem::replace(&mut info.gdt_pages, wanted);
    for (page, frame) in (0..wanted.max(shown) as u64).zip(&state.gdt.frames) {
        // SAFETY: 1. this CPU's window. 2. one of the first 14 pages. 3. `GuestGdt` holds a descriptor-page type reference
        // for each frame it names.
        unsafe { paging::set_window(info.window_l1, info.number, page, frame.map(machine)) };
    }
    let entries = state.ldt.entries;
    if core::mem::replace(&mut info.ldt_shown, entries != 0) || entries != 0 {
        for (page, frame) in (layout::LDT_PAGE..).zip(&state.ldt.frames) {
            let frame = if entries == 0 { &None } else { frame };
            // SAFETY: as above, for `GuestLdt` and the pages from `LDT_PAGE` on.
            unsafe { paging::set_window(info.window_l1, info.number, page, frame.map(machine)) };
        }
    }
    if info.ldt_entries != entries {
        info.ldt_entries = entries;
        // SAFETY: this CPU's descriptor page.
        unsafe { tables::load_local_table(info.gdt_page, info.number, entries) };
    }
}

/// Shows this CPU no tables of a guest: none runs here.
pub fn hide_descriptor_tables() {
    let info = info();
    if info.ldt_entries != 0 {
        info.ldt_entries = 0;
        // SAFETY: this CPU's descriptor page.
        unsafe { tables::load_local_table(info.gdt_page, info.number, 0) };
    }
    (info.gdt_pages, info.ldt_shown) = (0, false);
    for page in (0..GDT_FRAMES as u64).chain(layout::LDT_PAGE..layout::LDT_PAGE + 16) {
        // SAFETY: this CPU's window, a page of the guest's, and nothing is shown.
        unsafe { paging::set_window(info.window_l1, info.number, page, None) };
    }
}

/// Shows page `page` of the running vCPU's LDT.
pub fn map_ldt_page(page: usize, mfn: Mfn) {
    assert!(page < 16, "an LDT has 16 pages");
    let info = info();
    info.ldt_shown = true;
    // SAFETY: 1. this CPU's window. 2. a page of the LDT. 3. the caller holds a descriptor-page reference for as long as the
    // frame is in `GuestLdt`.
    unsafe {
        paging::set_window(info.window_l1, info.number, layout::LDT_PAGE + page as u64, Some(machine(mfn)))
    };
}

/// Loads the debug registers of `state`, or turns breakpoints off when it has none.
pub fn load_debug_registers(state: &VcpuState) {
    let info = info();
    let wanted = state.debug.dr7 & DR7_ENABLES != 0;
    // A breakpoint inside the hypervisor would hit in places that cannot take a #DB: policy refuses them, and so do we.
    let outside = |address: u64| layout::is_guest_range(address, 8) && is_canonical(address);
    let on = wanted && state.debug.address.iter().all(|address| outside(*address) || *address == 0);
    if on {
        let [dr0, dr1, dr2, dr3] = state.debug.address;
        // Reserved bits: 10 is one, 11, 12, 14 and 15 zero; 13 (general detect) would trap ring 0's own accesses.
        let dr7 = state.debug.dr7 & 0xffff_03ff | DR7_OFF;
        // SAFETY: breakpoints on guest addresses only; ring 0 survives hitting one (`ring0_debug`).
        unsafe {
            asm!("mov dr0, {0}", "mov dr1, {1}", "mov dr2, {2}", "mov dr3, {3}", "mov dr7, {4}",
                in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, in(reg) dr7, options(nomem, nostack, preserves_flags));
        }
    } else if info.breakpoints_on {
        debug_off();
    }
    info.breakpoints_on = on;
}

fn debug_off() {
    // SAFETY: turns breakpoints off.
    unsafe { asm!("mov dr7, {0}", in(reg) DR7_OFF, options(nomem, nostack, preserves_flags)) };
}

/// DR6, which is then cleared for the next debug exception.
pub fn take_debug_status() -> u64 {
    let status: u64;
    // SAFETY: DR6 only reports; the value written is its state after reset.
    unsafe {
        asm!("mov {0}, dr6", "mov dr6, {1}", out(reg) status, in(reg) 0xffff_0ff0_u64,
            options(nomem, nostack, preserves_flags));
    }
    status
}

/// Sets or clears CR0.TS.
pub fn set_task_switched(on: bool) {
    let mut cr0 = Cr0::read();
    if cr0.contains(Cr0Flags::TASK_SWITCHED) != on {
        cr0.set(Cr0Flags::TASK_SWITCHED, on);
        // SAFETY: ring 0 uses no vector register, so TS concerns only the guest.
        unsafe { Cr0::write(cr0) };
    }
}

/// Makes CR4 what `state` wants, if it is not already.
#[inline(always)]
pub fn load_cr4(state: &VcpuState) {
    if info().wanted_cr4 != Some(state.cr4) {
        change_cr4(state);
    }
}

#[cold]
fn change_cr4(state: &VcpuState) {
    let info = info();
    info.wanted_cr4 = Some(state.cr4);
    let mut chosen = Cr4Flags::from_bits_truncate(state.cr4) & GUEST_CR4;
    if !cpu::has_fsgsbase() {
        chosen.remove(Cr4Flags::FSGSBASE);
    }
    let cr4 = info.base_cr4 | chosen;
    if info.cr4 != cr4 {
        info.cr4 = cr4;
        // SAFETY: the base set plus bits that do not concern ring 0, which looks at `cr4` before it uses RDFSBASE.
        unsafe { Cr4::write(cr4) };
    }
}

/// Lets RDTSC of guests trap on this CPU, whatever they want, or leaves it to them.
pub fn trap_tsc(on: bool) {
    let info = info();
    info.base_cr4.set(Cr4Flags::TIMESTAMP_DISABLE, on);
    // CR4 itself follows at the next resume.
    info.wanted_cr4 = None;
}

/// Saves what this CPU still holds of `state`. Nothing of the vCPU is left in the registers that matter.
pub fn leave(state: &mut VcpuState) {
    read_segments(state);
    let info = info();
    info.bases = Some(bases(state));
    fpu::set_xcr0(&mut info.xcr0, fpu::xcr0());
    fpu::save(state.vectors.bytes_mut());
    if info.breakpoints_on {
        debug_off();
        info.breakpoints_on = false;
    }
    info.current = core::ptr::null_mut();
}

/// Loads what ring 0 does not use itself, and points the entry code at `state`.
pub fn enter(state: &mut VcpuState) -> Result<(), Fault> {
    load_cr4(state);
    load_descriptor_tables(state);
    // A selector that cannot be loaded any more has become null: policy tells the guest.
    let selectors = write_segments(state);
    load_debug_registers(state);
    fpu::set_xcr0(&mut info().xcr0, fpu::xcr0());
    fpu::load(state.vectors.bytes_mut());
    set_task_switched(state.task_switched);
    load_readable(state);

    let info = info();
    state.cpu_stack = info.block() + percpu::INFO_OFFSET;
    let at: *mut VcpuState = state;
    info.current = at;
    let end = at as u64 + size_of::<hv::domain::GuestRegs>() as u64;
    info.tss.privilege_stack_table[0] = x86_64::VirtAddr::new(end);
    // SAFETY: this CPU's slot; its stub does not run while ring 0 does.
    unsafe {
        (*(&raw mut entry::guest::stub_slots).cast::<entry::guest::StubSlot>().add(info.number)).regs_end =
            end
    };
    selectors
}

/// Writes the MSRs that lead SYSCALL to this CPU's stub. Once on each CPU.
pub fn init_syscall() {
    let info = info();
    info.cr4 = Cr4::read();
    info.base_cr4 = info.cr4;
    info.wanted_cr4 = None;
    info.bases = None;
    let stub = &raw const entry::guest::syscall_stubs as u64 + info.number as u64 * entry::guest::STUB_STRIDE;
    let star = u64::from(tables::RING0_CODE) << 32 | u64::from(tables::GUEST_CODE32) << 48;
    // IF, DF, TF, AC and NT off at the first instruction.
    let mask = 1 << 9 | 1 << 10 | 1 << 8 | 1 << 18 | 1 << 14;
    for (register, value) in [
        (msr::STAR, star),
        (msr::LSTAR, stub),
        (msr::CSTAR, stub + entry::guest::STUB_32),
        (msr::SFMASK, mask),
    ] {
        // SAFETY: the stubs of this CPU, flat selectors of the hypervisor's GDT page.
        unsafe { msr::write(register, value) };
    }
    if !cpu::has_long_mode_sysenter() {
        return;
    }
    // The stub loads its own stack pointer.
    for (register, value) in [
        (msr::SYSENTER_CS, u64::from(tables::RING0_CODE)),
        (msr::SYSENTER_ESP, 0),
        (msr::SYSENTER_EIP, stub + entry::guest::STUB_SYSENTER),
    ] {
        // SAFETY: as above.
        unsafe { msr::write(register, value) };
    }
}

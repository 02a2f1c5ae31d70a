//! The x86 machine as policy sees it.

use super::boot::{is_main_ram, machine, smp};
use super::{
    apic, clock, context, cpu, epitaph, fpu, interrupts, ioapic, msr, paging, percpu, power, serial, usercopy,
};
use core::sync::atomic::Ordering;
use hv::domain::VcpuState;
use hv::platform::{CpuId, CpuSet, Fault, FrameWords, HaltReason, Platform, TimeScale, TlbFlush};
use hv::watchdog::Stuck;
use hv::x86::layout::{self, PAGE_SIZE};
use hypercall_abi::Mfn;
use hypercall_abi::subops::SegmentBase;
use x86_64::instructions::port::Port;
use x86_64::registers::control::{Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::structures::paging::PhysFrame;
use x86_64::{PhysAddr, VirtAddr};

/// The one machine. All its state is per CPU, in hardware, or in the statics of its modules.
pub struct Machine;

#[inline(always)]
fn frame_pointer(mfn: Mfn) -> *mut u64 {
    if !is_main_ram(mfn.get()) {
        check_ram(mfn);
    }
    // RAM ends far below the end of the direct map: nothing wraps.
    layout::DIRECT_MAP.wrapping_add(mfn.get().wrapping_mul(PAGE_SIZE)) as *mut u64
}

/// Panics unless a frame is RAM.
#[cold]
#[inline(never)]
fn check_ram(mfn: Mfn) {
    assert!(machine().is_ram(mfn.get()), "frame {:#x} is not RAM", mfn.get());
}

fn write_root(machine_address: u64) {
    let frame = PhysFrame::containing_address(PhysAddr::new(machine_address));
    // SAFETY: the table holds the hypervisor's slots (checked by the callers), so ring 0 goes on where it is.
    unsafe { Cr3::write(frame, Cr3Flags::empty()) };
}

/// Drops all translations of this CPU, global ones too.
fn flush_all() {
    let cr4 = Cr4::read();
    if cr4.contains(Cr4Flags::PAGE_GLOBAL) {
        // SAFETY: turning global pages off and on again changes nothing but the TLB.
        unsafe { Cr4::write(cr4 - Cr4Flags::PAGE_GLOBAL) };
        // SAFETY: as above.
        unsafe { Cr4::write(cr4) };
    } else {
        x86_64::instructions::tlb::flush_all();
    }
}

fn send(cpu: CpuId, vector: u8) {
    if let Some(apic_id) = smp::apic_id(cpu) {
        apic::send(apic_id, vector);
    }
}

impl Platform for Machine {
    fn frame(&self, mfn: Mfn) -> &FrameWords {
        // SAFETY: the direct map shows every frame of RAM for ever, and frames are only ever accessed as atomics (or by
        // whole-frame copies of bytes nobody relies on).
        unsafe { &*frame_pointer(mfn).cast::<FrameWords>() }
    }

    fn zero_frame(&self, mfn: Mfn) {
        let at = frame_pointer(mfn);
        // SAFETY: one frame of the direct map; policy zeroes only frames that no guest and no reference uses.
        unsafe {
            core::arch::asm!("rep stosq", inout("rdi") at => _, inout("rcx") 512u64 => _, in("rax") 0u64,
                options(nostack, preserves_flags));
        }
    }

    fn copy_frame(&self, from: Mfn, to: Mfn) {
        let (from, to) = (frame_pointer(from), frame_pointer(to));
        // SAFETY: two frames of the direct map; a guest that writes the source meanwhile gets a mixture, which is its own
        // affair.
        unsafe {
            core::arch::asm!("rep movsq", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") 512u64 => _,
                options(nostack, preserves_flags));
        }
    }

    fn copy_bytes(&self, (from, first): (Mfn, usize), (to, at): (Mfn, usize), len: usize) {
        let room = |at: usize| (PAGE_SIZE as usize).saturating_sub(at);
        assert!(len <= room(first) && len <= room(at), "a copy that leaves its frame");
        let place = |mfn, at: usize| frame_pointer(mfn).cast::<u8>().wrapping_add(at);
        let (from, to) = (place(from, first), place(to, at));
        // SAFETY: parts of two frames of the direct map, as just checked. Nobody's bytes beside them are touched; a guest that writes
        // meanwhile, or names overlapping parts of one frame, gets a mixture, which is its own affair.
        unsafe {
            core::arch::asm!("rep movsq", "mov ecx, {rest:e}", "rep movsb", rest = in(reg) len % 8,
                inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len / 8 => _,
                options(nostack, preserves_flags));
        }
    }

    fn copy_from_guest(&self, dst: &mut [u8], va: u64) -> Result<(), Fault> {
        usercopy::from_guest(dst, va)
    }

    fn copy_to_guest(&self, va: u64, src: &[u8]) -> Result<(), Fault> {
        usercopy::to_guest(va, src)
    }

    fn load_root(&self, root: Mfn) {
        // The slot of the image stands for all: without it the next instruction would be the last.
        let slot = ((layout::IMAGE >> 39) & 511) as usize;
        let ours = paging::table(machine().root)[slot].load(Ordering::Relaxed);
        assert_eq!(
            self.frame(root)[slot].load(Ordering::Relaxed) | 0x60,
            ours | 0x60,
            "a root without our slots"
        );
        write_root(root.get() * PAGE_SIZE);
    }

    fn load_idle_root(&self) {
        context::hide_descriptor_tables();
        write_root(machine().root);
    }

    fn fill_hypervisor_slots(&self, l4: Mfn) {
        let (to, from) = (self.frame(l4), paging::table(machine().root));
        for slot in layout::FIRST_SLOT..layout::END_SLOT {
            to[slot].store(from[slot].load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn request_flush(&self, cpus: CpuSet) {
        for cpu in cpus.iter() {
            send(cpu, apic::VECTOR_FLUSH);
        }
    }

    fn flush_tlb(&self, what: TlbFlush) {
        match what {
            TlbFlush::All => flush_all(),
            TlbFlush::Page(va) => {
                if layout::is_canonical(va) {
                    x86_64::instructions::tlb::flush(VirtAddr::new(va));
                }
            }
        }
    }

    fn flush_caches(&self) {
        // SAFETY: writes caches back; memory as programs see it does not change.
        unsafe { core::arch::asm!("wbinvd", options(nostack, preserves_flags)) };
    }

    fn flush_cache_lines(&self, mfn: Mfn, offset: usize, len: usize) {
        // CPUID leaf 1: EBX bits 8-15 are the size of a line in units of 8 bytes.
        let line = ((self.cpuid(1, 0)[1] >> 8 & 0xff) as usize * 8).max(16);
        let first = frame_pointer(mfn) as usize + offset;
        let mut at = first & !(line - 1);
        while at < first + len {
            // SAFETY: an address in the direct map; writes the line back, memory as programs see it does not change.
            unsafe { core::arch::asm!("clflush [{}]", in(reg) at, options(nostack, preserves_flags)) };
            at += line;
        }
        // SAFETY: orders the flushes before whatever tells a device to look.
        unsafe { core::arch::asm!("mfence", options(nostack, preserves_flags)) };
    }

    fn now_ns(&self) -> u64 {
        clock::now_ns()
    }

    fn tsc(&self) -> u64 {
        clock::tsc()
    }

    fn emulates_tsc(&self) -> bool {
        clock::emulates_tsc()
    }

    fn guest_tsc(&self) -> u64 {
        clock::guest_tsc()
    }

    fn clock_origin(&self) -> (u64, u64) {
        (0, clock::epoch())
    }

    fn time_scale(&self) -> TimeScale {
        clock::scale()
    }

    fn boot_wallclock_ns(&self) -> u64 {
        clock::boot_wallclock_ns()
    }

    fn set_timer(&self, deadline_ns: Option<u64>) {
        // The first CPU keeps a counter that wraps from doing so unseen.
        let look = if self.this_cpu() == CpuId(0) { clock::look_before_ns() } else { None };
        let deadline_ns = deadline_ns.into_iter().chain(look).min();
        apic::set_timer(deadline_ns.map(|at| at.saturating_sub(clock::now_ns())));
    }

    fn cpu_count(&self) -> u32 {
        smp::online()
    }

    fn this_cpu(&self) -> CpuId {
        // SAFETY: this CPU's data, set up before any code of policy runs.
        CpuId(unsafe { (*percpu::here()).number } as u32)
    }

    fn kick(&self, cpu: CpuId) {
        if cpu == self.this_cpu() {
            return;
        }
        send(cpu, apic::VECTOR_KICK);
    }

    fn wait_for_interrupt(&self) {
        // SAFETY: the one place where ring 0 takes interrupts. STI takes effect after HLT has begun, so none that came since
        // policy looked is slept through; the handlers use this stack below the present frame, without the red zone.
        unsafe { core::arch::asm!("sti", "hlt", "cli") };
    }

    fn interrupt_pending(&self) -> bool {
        apic::is_pending()
    }

    fn leave_vcpu(&self, state: &mut VcpuState) {
        context::leave(state);
    }

    fn enter_vcpu(&self, state: &mut VcpuState) -> Result<(), Fault> {
        context::enter(state)
    }

    fn read_live_segments(&self, state: &mut VcpuState) {
        context::read_segments(state);
    }

    fn load_segment(&self, state: &VcpuState, which: SegmentBase) {
        context::load_segment(state, which);
    }

    fn load_readable(&self, state: &VcpuState) {
        context::load_readable(state);
    }

    fn read_msr(&self, number: u32) -> Option<u64> {
        msr::try_read(number)
    }

    fn swap_guest_gs(&self, state: &mut VcpuState) {
        context::swap_gs(state);
    }

    fn load_descriptor_tables(&self, state: &VcpuState) {
        context::load_descriptor_tables(state);
    }

    fn map_ldt_page(&self, page: usize, mfn: Mfn) {
        assert!(machine().is_ram(mfn.get()));
        context::map_ldt_page(page, mfn);
    }

    fn load_debug_registers(&self, state: &VcpuState) {
        context::load_debug_registers(state);
    }

    fn set_task_switched(&self, ts: bool) {
        context::set_task_switched(ts);
    }

    fn vector_state_size(&self) -> usize {
        fpu::size()
    }

    fn init_vector_state(&self, area: &mut [u8]) {
        fpu::initial(area);
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let r = cpu::cpuid(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    }

    fn port_in(&self, port: u16, size: u8) -> u32 {
        // SAFETY: policy asks only for ports that a domain has the right to; the hypervisor's own devices are taken out of
        // that right. What a device does by DMA is SECURITY.md's business.
        unsafe {
            match size {
                1 => u32::from(Port::<u8>::new(port).read()),
                2 => u32::from(Port::<u16>::new(port).read()),
                _ => Port::<u32>::new(port).read(),
            }
        }
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        // SAFETY: as for `port_in`.
        unsafe {
            match size {
                1 => Port::<u8>::new(port).write(value as u8),
                2 => Port::<u16>::new(port).write(value as u16),
                _ => Port::<u32>::new(port).write(value),
            }
        }
    }

    fn irq_pins(&self) -> u32 {
        ioapic::pins()
    }

    fn mask_irq(&self, pin: u32, masked: bool) {
        ioapic::mask(pin, masked);
    }

    fn eoi_irq(&self, pin: u32) {
        ioapic::end(pin);
    }

    fn configure_irq(&self, pin: u32, level: bool, active_low: bool) {
        ioapic::configure(pin, level, active_low);
    }

    fn route_irq(&self, pin: u32, cpu: CpuId) -> bool {
        let target = smp::apic_id(cpu).and_then(apic::device_destination);
        target.is_some_and(|target| {
            ioapic::route(pin, target);
            true
        })
    }

    fn message_count(&self) -> u32 {
        interrupts::MESSAGES
    }

    fn message(&self, index: u32, cpu: CpuId) -> Option<(u64, u32)> {
        interrupts::message(index, smp::apic_id(cpu)?)
    }

    fn is_level_irq(&self, pin: u32) -> bool {
        ioapic::is_level(pin)
    }

    fn hardware_ids(&self, cpu: CpuId) -> (u32, u32) {
        let apic_id = smp::apic_id(cpu).unwrap_or(u32::MAX);
        (apic_id, smp::acpi_id(apic_id).unwrap_or(u32::MAX))
    }

    fn has_no_execute(&self) -> bool {
        super::cpu::has_nx()
    }

    fn ram_frames(&self) -> u64 {
        super::boot::machine().ram.iter().map(|(start, end)| (end - start) >> 12).sum()
    }

    fn own_frames(&self) -> u64 {
        let free: u64 = super::boot::machine().free.iter().map(|(start, end)| (end - start) >> 12).sum();
        self.ram_frames() - free
    }

    fn heap_usage(&self) -> (u64, u64) {
        let (used, size) = crate::heap::usage();
        (used as u64, size as u64)
    }

    fn tsc_khz(&self) -> u32 {
        (super::clock::hz() / 1000) as u32
    }

    fn console_write(&self, text: &[u8]) {
        serial::write_bytes(text);
    }

    fn console_read(&self, buf: &mut [u8]) -> usize {
        serial::take_input(buf)
    }

    fn report_stuck(&self, stuck: Stuck) -> ! {
        epitaph::stuck(stuck)
    }

    fn halt(&self, why: HaltReason) -> ! {
        epitaph::stop_others();
        let code = match why {
            HaltReason::PowerOff => 0x10,
            HaltReason::Reboot => 0x11,
            HaltReason::Suspend => 0x12,
            HaltReason::Crash => 0x13,
            HaltReason::Watchdog => 0x14,
        };
        epitaph::debug_exit(code);
        match why {
            HaltReason::PowerOff | HaltReason::Suspend => power::off(&machine().acpi.power),
            HaltReason::Reboot | HaltReason::Crash | HaltReason::Watchdog => {
                power::reset(&machine().acpi.power)
            }
        }
    }
}

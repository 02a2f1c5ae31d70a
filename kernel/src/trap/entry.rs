//! Entries into ring 0 as the architecture reports them, and what waits to be delivered on the way back.

use core::sync::atomic::Ordering;

use super::bounce::Delivery;
use super::debug::DR6_DEFAULT;
use super::deliver::{Exception, vector};
use super::emulate::Emulated;
use crate::domain::{
    Callback, Cpu, Current, DataSelectors, ENTRY_IRET_FAULT, ENTRY_IRET_FAULT_LAST, ENTRY_SYSCALL,
    ENTRY_SYSCALL32, ENTRY_SYSENTER, Vcpu,
};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use hypercall_abi::control::LONGEST_IS_HYPERCALL;

/// Bytes of SYSCALL and of `int n`.
const TWO_BYTES: u64 = 2;

/// The gate of Linux' old system call, which guests may use directly.
const SOFTWARE_SYSCALL: u8 = 0x80;

/// Error code of a fault: it came while an external event was delivered.
const EXTERNAL: u64 = 1;
/// Error code of a fault: it names an entry of the interrupt table.
const IDT: u64 = 2;

impl<P: Platform> Hypervisor<P> {
    /// SYSCALL or SYSENTER (`regs.vector` says which): a hypercall of the guest's kernel, or a system call to bounce.
    pub fn on_syscall(&self, cpu: &mut Cpu) {
        let Some(current) = cpu.current.as_mut() else { return };
        cpu.entry = Some(LONGEST_IS_HYPERCALL | current.state.regs.rax as u32 & 0xff);
        self.note_entry(cpu.id);
        let entry = current.state.regs.vector;
        if entry == ENTRY_SYSCALL && current.state.kernel_mode {
            return crate::hypercall::hypercall(self, current);
        }
        #[cfg(any(feature = "constant-answers", test))]
        if super::constant_answers::system_call(self, current) {
            return;
        }
        let callbacks = &current.state.callbacks;
        let callback = match entry {
            // As on Xen, whether events are masked is said once for both forms of SYSCALL, with the 64-bit one.
            ENTRY_SYSCALL32 => Callback { mask_events: callbacks.syscall.mask_events, ..callbacks.syscall32 },
            ENTRY_SYSENTER => callbacks.sysenter,
            _ => callbacks.syscall,
        };
        if callback.address != 0 {
            // SYSCALL clears the direction flag for 64-bit kernels; SYSENTER leaves it.
            let clear_df = entry != ENTRY_SYSENTER;
            let delivery = Delivery { clear_df, ..Delivery::to(callback.address, callback.mask_events) };
            return self.bounce(current, delivery);
        }
        if entry == ENTRY_SYSENTER {
            // As on a processor whose SYSENTER has not been set up.
            self.inject(current, Exception::GP);
        } else {
            current.state.regs.rip = current.state.regs.rip.wrapping_sub(TWO_BYTES);
            self.inject(current, Exception::UD);
        }
    }

    /// An exception in the guest: `regs.vector`, `regs.error_code`, and in `detail` the faulting address of a page fault or
    /// DR6 of a debug exception. Also a return to the guest that faulted.
    ///
    /// All gates but 3, 4 and 0x80 are closed to software interrupts: those arrive as general protection faults whose error code
    /// names the vector. (QEMU 7.2 names twice the vector; QEMU 10 has it right.)
    pub fn on_exception(&self, cpu: &mut Cpu, detail: u64) {
        let Some(current) = cpu.current.as_mut() else { return };
        cpu.entry = Some(current.state.regs.vector as u32 & 0xff);
        self.note_entry(cpu.id);
        current.state.counts.faults.add(1);
        let error_code = current.state.regs.error_code;
        // A fault in the instruction that returns to the guest is not one of the guest's own instructions.
        let in_guest = !(ENTRY_IRET_FAULT..=ENTRY_IRET_FAULT_LAST).contains(&current.state.regs.vector);
        let number = current.state.regs.vector;
        let Ok(number) = u8::try_from(if in_guest { number } else { number.wrapping_sub(ENTRY_IRET_FAULT) })
        else {
            return self.crash_current(current, "an entry that no guest can cause");
        };
        let exception = Exception { vector: number, error_code: error_code as u32, address: detail };
        #[cfg(any(feature = "constant-answers", test))]
        if super::constant_answers::exception(self, current, exception) {
            return;
        }
        match number {
            vector::INVALID_OPCODE => match self.forced_emulation(current) {
                Emulated::No => self.inject(current, exception),
                other => self.finish(current, other),
            },
            vector::NO_DEVICE => self.no_device(current),
            vector::DEBUG => {
                current.state.debug.record(detail);
                self.inject(current, exception);
            }
            vector::GENERAL_PROTECTION if in_guest => self.general_protection(current, error_code),
            vector::PAGE_FAULT => self.page_fault(current, exception),
            SOFTWARE_SYSCALL => {
                if !self.try_software_interrupt(current, number) {
                    current.state.regs.rip = current.state.regs.rip.wrapping_sub(TWO_BYTES);
                    let error_code = u32::from(number) << 3 | IDT as u32;
                    self.inject(current, Exception { error_code, ..Exception::GP });
                }
            }
            0..32 => self.inject(current, exception),
            _ => self.crash_current(current, "an interrupt vector that no guest can reach"),
        }
    }

    /// Whether there may be something for [`Hypervisor::deliver_pending`] to deliver.
    #[inline(always)]
    pub fn has_pending(&self, current: &Current) -> bool {
        let vcpu: &Vcpu = &current.vcpu;
        current.state.failsafe_due.is_some()
            || vcpu.nmi_pending.load(Ordering::Acquire)
            || vcpu.upcall_due(&self.platform)
    }

    /// Delivers the failsafe callback, a pending NMI or an event upcall to the vCPU that is about to resume. Tells whether there was any:
    /// then the domain may have been crashed.
    pub fn deliver_pending(&self, current: &mut Current) -> bool {
        #[cfg(any(feature = "constant-answers", test))]
        if current.domain().constant.answer().is_some() {
            return false;
        }
        if !self.has_pending(current) {
            return false;
        }
        let mut delivered = false;
        if let Some(DataSelectors { ds, es, fs, gs }) = current.state.failsafe_due.take() {
            let callback = current.state.callbacks.failsafe;
            let delivery = Delivery::to(callback.address, callback.mask_events);
            self.bounce(current, Delivery { selectors: Some([ds, es, fs, gs]), ..delivery });
            delivered = true;
        }
        let pending = &current.vcpu.nmi_pending;
        if pending.load(Ordering::Acquire) && !current.state.nmi_masked {
            pending.store(false, Ordering::Release);
            let handler = current.state.traps[usize::from(vector::NMI)];
            // Without a handler it is lost.
            if handler.address != 0 {
                current.state.nmi_masked = true;
                self.bounce(current, Delivery::to(handler.address, handler.masks_events()));
                delivered = true;
            }
        }
        if current.vcpu.upcall_due(&self.platform) {
            current.state.counts.upcalls.add(1);
            let handler = current.state.callbacks.event.address;
            self.bounce(current, Delivery::to(handler, true));
            delivered = true;
        }
        delivered
    }

    /// The first vector instruction after the guest set CR0.TS: its handler is told, and TS is cleared for it.
    fn no_device(&self, current: &mut Current) {
        let told = core::mem::take(&mut current.state.task_switched);
        self.platform.set_task_switched(false);
        if told {
            self.inject(current, Exception::plain(vector::NO_DEVICE));
        }
    }

    fn general_protection(&self, current: &mut Current, error_code: u64) {
        if error_code & (EXTERNAL | IDT) == IDT {
            // A software interrupt through a gate that is closed to guests in the real table.
            current.state.regs.rip = current.state.regs.rip.wrapping_add(TWO_BYTES);
            if self.try_software_interrupt(current, (error_code >> 3) as u8) {
                return;
            }
            current.state.regs.rip = current.state.regs.rip.wrapping_sub(TWO_BYTES);
        }
        if error_code == 0 {
            match self.emulate_privileged(current) {
                Emulated::No => {}
                other => return self.finish(current, other),
            }
        }
        self.inject(current, Exception { error_code: error_code as u32, ..Exception::GP });
    }

    /// Delivers `int vector` if the guest's own table lets its present mode raise it. rip is behind the instruction.
    fn try_software_interrupt(&self, current: &mut Current, vector: u8) -> bool {
        let Some(entry) = current.state.traps.get(usize::from(vector)) else { return false };
        // The guest's kernel counts as ring 1 here: privilege 0 is the hypervisor's alone.
        let least = if current.state.kernel_mode { 1 } else { 3 };
        if entry.dpl() < least {
            return false;
        }
        self.software_interrupt(current, vector);
        true
    }

    fn page_fault(&self, current: &mut Current, exception: Exception) {
        match self.fix_page_fault(current, exception) {
            Emulated::No => self.inject(current, exception),
            other => self.finish(current, other),
        }
    }

    /// What follows from an attempt to carry out an instruction for the guest.
    fn finish(&self, current: &mut Current, emulated: Emulated) {
        match emulated {
            Emulated::Done | Emulated::Again | Emulated::No => {}
            Emulated::Raise(exception) => self.inject(current, exception),
            Emulated::Crash(why) => self.crash_current(current, why),
            Emulated::Trapped(hits) => {
                current.state.debug.record(hits | DR6_DEFAULT);
                self.inject(current, Exception::plain(vector::DEBUG));
            }
        }
    }
}

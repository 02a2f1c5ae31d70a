//! Carrying a bounce out: the address space, the frame on the guest's stack, the new registers.

use zerocopy::IntoBytes;

use super::bounce::{Delivery, Interrupted, KERNEL_CS, KERNEL_SS, MAX_WORDS, frame};
use crate::domain::{Current, Vcpu, VcpuState, mask_upcalls};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Exception vectors that policy names.
#[allow(missing_docs)]
pub mod vector {
    pub const DEBUG: u8 = 1;
    pub const NMI: u8 = 2;
    pub const INVALID_OPCODE: u8 = 6;
    pub const NO_DEVICE: u8 = 7;
    pub const GENERAL_PROTECTION: u8 = 13;
    pub const PAGE_FAULT: u8 = 14;
}

/// Vectors below 32 that push an error code: #DF #TS #NP #SS #GP #PF #AC #CP.
const WITH_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21;

/// Page-fault error code: the access was made in user mode.
pub const PF_USER: u64 = 1 << 2;
/// Page-fault error code: the access was a write.
pub const PF_WRITE: u64 = 1 << 1;

/// Bit of `vm_assist` that shows guests their own I/O privilege in pushed flags, and lets iret set it.
const ASSIST_ARCHITECTURAL_IOPL: u32 = 1 << 4;

/// Word of vcpu_info that holds the address of the last page fault.
const INFO_CR2: usize = 2;

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Below 32.
    pub vector: u8,
    /// Dropped for vectors that have none.
    pub error_code: u32,
    /// The address of a page fault.
    pub address: u64,
}

impl Exception {
    /// An exception without error code, or with error code 0.
    pub const fn plain(vector: u8) -> Exception {
        Exception { vector, error_code: 0, address: 0 }
    }
    /// A general protection fault with error code 0: the usual answer to what a guest may not do.
    pub const GP: Exception = Exception::plain(vector::GENERAL_PROTECTION);
    /// An undefined instruction.
    pub const UD: Exception = Exception::plain(vector::INVALID_OPCODE);
    /// A page fault that the hypervisor ran into on the guest's behalf at a page that was not there.
    pub const fn page_fault(address: u64, write: bool) -> Exception {
        Exception { vector: vector::PAGE_FAULT, error_code: if write { PF_WRITE as u32 } else { 0 }, address }
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Whether the domain shows its vCPUs their own I/O privilege level.
    pub(crate) fn architectural_iopl(&self, current: &Current) -> bool {
        let assists = current.domain().vm_assist.load(core::sync::atomic::Ordering::Relaxed);
        assists & ASSIST_ARCHITECTURAL_IOPL != 0
    }

    /// Takes the guest from its user mode into its kernel: page tables and GS base. Harmless in its kernel.
    pub(crate) fn enter_guest_kernel(&self, current: &mut Current) {
        self.set_guest_mode(current, true);
    }

    /// Takes the guest from its kernel into its user mode. Returns false, changing nothing, when it has no page tables for
    /// that.
    #[must_use]
    pub(crate) fn enter_guest_user(&self, current: &mut Current) -> bool {
        if current.state.user_root.is_none() {
            return false;
        }
        self.set_guest_mode(current, false);
        true
    }

    fn set_guest_mode(&self, current: &mut Current, kernel: bool) {
        let state = &mut current.state;
        if state.kernel_mode == kernel {
            return;
        }
        state.kernel_mode = kernel;
        self.platform.swap_guest_gs(state);
        // A vCPU that runs has a kernel root; the other direction was checked by the caller.
        if let Some(root) = state.current_root() {
            self.load_guest_root(root);
        }
        if kernel && state.areas_due {
            self.publish_areas(current.vcpu.domain(), &current.vcpu, &mut current.state);
        }
    }

    /// Pushes a frame on the guest's kernel stack and continues at its handler. A guest without handler, or with a stack
    /// that cannot be written, has no way on and is crashed.
    pub(crate) fn bounce(&self, current: &mut Current, mut delivery: Delivery) {
        if self.architectural_iopl(current) {
            delivery.shown_iopl = current.state.iopl;
        }
        let vcpu: &Vcpu = &current.vcpu;
        let mask = vcpu.info_word(&self.platform, 0);
        let upcall_mask = mask.map_or(1, |w| (w.load(core::sync::atomic::Ordering::Acquire) >> 8) as u8);
        let from = interrupted(&current.state, upcall_mask);
        let mut room = [0; MAX_WORDS];
        let frame = match frame(&mut room, &from, current.state.kernel_sp, &delivery) {
            Ok(frame) => frame,
            Err(no_frame) => return self.crash_current(current, no_frame.reason()),
        };
        self.enter_guest_kernel(current);
        if self.platform.copy_to_guest(frame.rsp, frame.words.as_bytes()).is_err() {
            return self.crash_current(current, "its kernel stack cannot be written");
        }
        if let Some(word) = mask
            && delivery.mask_events
            && upcall_mask & 1 == 0
        {
            mask_upcalls(word);
        }
        let state = &mut current.state;
        state.regs.rip = frame.rip;
        state.regs.cs = u64::from(KERNEL_CS);
        state.regs.rflags = frame.rflags;
        state.regs.rsp = frame.rsp;
        state.regs.ss = u64::from(KERNEL_SS);
        // rcx and r11 are in the frame: the handler does not mind losing them.
        state.sysret_ok = true;
    }

    /// Delivers an exception to the guest's handler for it. A page fault's address goes to vcpu_info, and its error code
    /// tells the guest's user mode from its kernel, not ring 3.
    pub(crate) fn inject(&self, current: &mut Current, exception: Exception) {
        let Some(entry) = current.state.traps.get(usize::from(exception.vector)).copied() else { return };
        let mut error_code = exception.error_code;
        if exception.vector == vector::PAGE_FAULT {
            if let Some(cr2) = current.vcpu.info_word(&self.platform, INFO_CR2) {
                cr2.store(exception.address, core::sync::atomic::Ordering::Release);
            }
            error_code &= !(PF_USER as u32);
            if !current.state.kernel_mode {
                error_code |= PF_USER as u32;
            }
        }
        let has_code = exception.vector < 32 && WITH_ERROR_CODE & 1 << exception.vector != 0;
        let delivery = Delivery {
            error_code: has_code.then_some(error_code),
            ..Delivery::to(entry.address, entry.masks_events())
        };
        if entry.address == 0 {
            log::warn!(
                "d{}v{}: no handler for exception {} error code {error_code:#x} address {:#x}",
                current.domain().id.get(),
                current.vcpu.id.get(),
                exception.vector,
                exception.address
            );
        }
        self.bounce(current, delivery);
    }

    /// Delivers a software interrupt (no error code, whatever its number).
    pub(crate) fn software_interrupt(&self, current: &mut Current, vector: u8) {
        let Some(entry) = current.state.traps.get(usize::from(vector)).copied() else { return };
        self.bounce(current, Delivery::to(entry.address, entry.masks_events()));
    }

    /// The address of the last page fault, as the guest reads CR2.
    pub(crate) fn guest_cr2(&self, current: &Current) -> u64 {
        let word = current.vcpu.info_word(&self.platform, INFO_CR2);
        word.map_or(0, |w| w.load(core::sync::atomic::Ordering::Acquire))
    }

    /// Sets what the guest reads as CR2.
    pub(crate) fn set_guest_cr2(&self, current: &Current, address: u64) {
        if let Some(word) = current.vcpu.info_word(&self.platform, INFO_CR2) {
            word.store(address, core::sync::atomic::Ordering::Release);
        }
    }
}

fn interrupted(state: &VcpuState, upcall_mask: u8) -> Interrupted {
    let regs = &state.regs;
    Interrupted {
        rcx: regs.rcx,
        r11: regs.r11,
        rip: regs.rip,
        cs: regs.cs as u16,
        rflags: regs.rflags,
        rsp: regs.rsp,
        ss: regs.ss as u16,
        kernel_mode: state.kernel_mode,
        upcall_mask,
    }
}

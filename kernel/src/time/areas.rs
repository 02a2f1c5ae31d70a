//! Records that guests registered: run state and time, kept up to date while their address space is in force.

use core::mem::offset_of;
use core::sync::atomic::{Ordering, fence};

use hypercall_abi::vcpu::{RUNSTATE_UPDATE, RunstateInfo, VcpuTimeInfo};
use zerocopy::IntoBytes;

use crate::domain::{Domain, Vcpu, VcpuState};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Bit of `vm_assist`: marks run-state records that are being written.
const ASSIST_RUNSTATE_UPDATE: u32 = 1 << 5;

impl<P: Platform> Hypervisor<P> {
    /// Where the time of a vCPU went up to now.
    pub fn runstate_info(&self, vcpu: &Vcpu) -> RunstateInfo {
        let runstate = vcpu.runstate.lock();
        RunstateInfo {
            state: runstate.state as i32,
            state_entry_time: runstate.entered_ns,
            time: runstate.times_at(self.platform.now_ns()),
            ..RunstateInfo::default()
        }
    }

    /// Writes the records of a vCPU whose address space is in force, the copy of the time record only if that has changed. An area that is
    /// not mapped now is left alone: the guest loses the record, nothing else. Areas are addresses of its kernel: while it is in its user
    /// mode they wait.
    #[inline(always)]
    pub fn publish_areas(&self, domain: &Domain, vcpu: &Vcpu, state: &mut VcpuState) {
        state.areas_due = !state.kernel_mode;
        if !state.kernel_mode {
            return;
        }
        let area = vcpu.runstate_area.load(Ordering::Relaxed);
        if area != 0 {
            self.publish_runstate(domain, vcpu, area);
        }
        if vcpu.time_due.load(Ordering::Relaxed) && vcpu.time_due.swap(false, Ordering::Relaxed) {
            self.publish_time_area(vcpu);
        }
    }

    /// Writes the run-state record to the area registered for it, in the address space that is in force.
    ///
    /// With `vm_assist(runstate_update_flag)` a reader on another vCPU can tell that it read while this wrote: the top bit of
    /// `state_entry_time` is set before the first word changes and cleared after the last did.
    fn publish_runstate(&self, domain: &Domain, vcpu: &Vcpu, area: u64) {
        let mut info = self.runstate_info(vcpu);
        if domain.vm_assist.load(Ordering::Relaxed) & ASSIST_RUNSTATE_UPDATE == 0 {
            let _ = self.platform.copy_to_guest(area, info.as_bytes());
            return;
        }
        let flag_at = area.wrapping_add((offset_of!(RunstateInfo, state_entry_time) + 7) as u64);
        let flag = |time: u64| [(time >> 56) as u8];
        info.state_entry_time |= RUNSTATE_UPDATE;
        let _ = self.platform.copy_to_guest(flag_at, &flag(info.state_entry_time));
        fence(Ordering::SeqCst);
        let _ = self.platform.copy_to_guest(area, info.as_bytes());
        fence(Ordering::SeqCst);
        let _ = self.platform.copy_to_guest(flag_at, &flag(info.state_entry_time & !RUNSTATE_UPDATE));
    }

    /// Copies the time record of vcpu_info to the area registered for it, if any.
    pub fn publish_time_area(&self, vcpu: &Vcpu) {
        let area = vcpu.time_area.load(Ordering::Relaxed);
        if area == 0 {
            return;
        }
        let mut words = [0u64; 4];
        for (i, word) in words.iter_mut().enumerate() {
            let Some(source) = vcpu.info_word(&self.platform, super::pvclock::TIME_WORD + i) else { return };
            *word = source.load(Ordering::Relaxed);
        }
        // The version goes last, so that a reader on another vCPU sees a change.
        let _ = self.platform.copy_to_guest(area.wrapping_add(8), words[1..].as_bytes());
        let _ = self.platform.copy_to_guest(area, words[..1].as_bytes());
        const _: () = assert!(size_of::<VcpuTimeInfo>() == 32);
    }
}

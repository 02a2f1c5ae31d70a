//! Records that guests registered: run state and time, kept up to date while their address space is in force.

use core::sync::atomic::Ordering;

use hypercall_abi::vcpu::{RunstateInfo, VcpuTimeInfo};
use zerocopy::IntoBytes;

use crate::domain::{Vcpu, VcpuState};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

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

    /// Writes both records of a vCPU whose address space is in force. An area that is not mapped now is left alone: the guest
    /// loses the record, nothing else.
    pub fn publish_areas(&self, vcpu: &Vcpu, state: &VcpuState) {
        if !state.kernel_mode {
            return;
        }
        let area = vcpu.runstate.lock().area;
        if area != 0 {
            let info = self.runstate_info(vcpu);
            let _ = self.platform.copy_to_guest(area, info.as_bytes());
        }
        if vcpu.time_area.load(Ordering::Relaxed) != 0 {
            self.publish_time_area(vcpu);
        }
    }

    /// Copies the time record of vcpu_info to the area registered for it.
    pub fn publish_time_area(&self, vcpu: &Vcpu) {
        let area = vcpu.time_area.load(Ordering::Relaxed);
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

//! The seam between policy and machine: all that policy may ask of the hardware.
//!
//! Everything above this trait is safe code and runs unchanged on the host over `sim`; everything below it is
//! `arch::x86_64`. Mechanism re-checks what policy hands it: a wrong policy may be slow or stop the host, it is never
//! unsound.

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::Mfn;
use hypercall_abi::subops::SegmentBase;

use crate::domain::VcpuState;

#[cfg(any(test, feature = "sim"))]
pub mod sim;

/// The 512 words of one frame of RAM.
///
/// Frames are shared with guests that write them at any moment, so policy sees only atomics: no reference to plain memory
/// that a guest can change ever exists.
pub type FrameWords = [AtomicU64; 512];

/// A guest address range that could not be read or written under the page tables in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// A processor of the host, 0 for the one that booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(pub u32);

/// A set of processors, at most 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(pub u64);

impl CpuSet {
    /// Every processor the set can name.
    pub const ALL: CpuSet = CpuSet(u64::MAX);
    /// The set of this one processor.
    pub const fn one(cpu: CpuId) -> CpuSet {
        CpuSet(1 << (cpu.0 & 63))
    }
    /// The CPUs numbered below `count`, which is at most 64.
    pub const fn first(count: u32) -> CpuSet {
        CpuSet(if count >= 64 { u64::MAX } else { (1 << count) - 1 })
    }
    /// The set with `cpu`.
    #[must_use]
    pub const fn with(self, cpu: CpuId) -> CpuSet {
        CpuSet(self.0 | CpuSet::one(cpu).0)
    }
    /// The set without `cpu`.
    #[must_use]
    pub const fn without(self, cpu: CpuId) -> CpuSet {
        CpuSet(self.0 & !CpuSet::one(cpu).0)
    }
    /// What is in both.
    #[must_use]
    pub const fn and(self, other: CpuSet) -> CpuSet {
        CpuSet(self.0 & other.0)
    }
    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// Its CPUs, the lowest number first.
    pub fn iter(self) -> impl Iterator<Item = CpuId> {
        let mut left = self.0;
        core::iter::from_fn(move || {
            let next = (left != 0).then(|| CpuId(left.trailing_zeros()))?;
            left &= left - 1;
            Some(next)
        })
    }
    /// Whether `cpu` is in the set.
    pub const fn contains(self, cpu: CpuId) -> bool {
        self.0 & (1 << (cpu.0 & 63)) != 0
    }
}

/// Which translations to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbFlush {
    /// All translations, global ones included.
    All,
    /// The one that maps this virtual address, in the current address space.
    Page(u64),
}

/// How TSC ticks become nanoseconds, in the form of the PV clock: `ns = ((tsc << shift) * mul) >> 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeScale {
    /// Multiplier, 32-bit fixed point.
    pub mul: u32,
    /// Power of two applied to the tick count first (negative: to the right).
    pub shift: i8,
}

/// Why the machine is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HaltReason {
    /// dom0 shut down cleanly.
    PowerOff,
    /// dom0 asked for a reboot.
    Reboot,
    /// dom0 suspended itself, which nobody can resume.
    Suspend,
    /// dom0 crashed.
    Crash,
    /// dom0's watchdog fired.
    Watchdog,
}

/// The machine below the policy.
///
/// All methods are called with interrupts off. Methods taking an [`Mfn`] panic when it is no frame of RAM: policy only holds
/// frame numbers that the frame table has vouched for.
pub trait Platform: Sync + 'static {
    /// The words of a frame of RAM.
    fn frame(&self, mfn: Mfn) -> &FrameWords;
    /// Fills a frame with zeros.
    fn zero_frame(&self, mfn: Mfn);
    /// Copies a whole frame.
    fn copy_frame(&self, from: Mfn, to: Mfn);
    /// Copies `len` bytes between two frames, each from a byte on. They fit in both; guests may write either meanwhile.
    fn copy_bytes(&self, from: (Mfn, usize), to: (Mfn, usize), len: usize) {
        copy_words(self.frame(from.0), from.1, self.frame(to.0), to.1, len);
    }

    /// Copies `bytes` into a frame from byte `offset` on. They fit in it.
    fn write_frame(&self, mfn: Mfn, offset: usize, bytes: &[u8]) {
        let words = self.frame(mfn);
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (index, shift) = (at / 8, at % 8);
            let (now, later) = rest.split_at(rest.len().min(8 - shift));
            let mut value = [0u8; 8];
            value[shift..shift + now.len()].copy_from_slice(now);
            let value = u64::from_le_bytes(value);
            if now.len() == 8 {
                words[index].store(value, Ordering::Relaxed);
            } else {
                // The other bytes of the word may be a guest's that writes them now.
                let mask = (u64::MAX >> (64 - 8 * now.len())) << (8 * shift);
                words[index].fetch_and(!mask, Ordering::Relaxed);
                words[index].fetch_or(value, Ordering::Relaxed);
            }
            at += now.len();
            rest = later;
        }
    }
    /// Copies from a frame from byte `offset` on. What is asked for lies in it.
    fn read_frame(&self, mfn: Mfn, offset: usize, out: &mut [u8]) {
        let words = self.frame(mfn);
        for (i, byte) in out.iter_mut().enumerate() {
            let at = offset + i;
            *byte = words[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
        }
    }

    /// Copies from guest memory at `va` of the vCPU that runs here, as its kernel could read it.
    fn copy_from_guest(&self, dst: &mut [u8], va: u64) -> Result<(), Fault>;
    /// Copies to guest memory at `va` of the vCPU that runs here, as its kernel could write it.
    fn copy_to_guest(&self, va: u64, src: &[u8]) -> Result<(), Fault>;

    /// Makes `root` the page-table root of this CPU. Drops all non-global translations.
    fn load_root(&self, root: Mfn);
    /// Makes the hypervisor's own table the root of this CPU: no guest table is in use here afterwards.
    fn load_idle_root(&self);
    /// Fills the hypervisor's slots (256 to 271) of a guest's L4 table.
    fn fill_hypervisor_slots(&self, l4: Mfn);
    /// Drops translations of this CPU.
    fn flush_tlb(&self, what: TlbFlush);
    /// Interrupts these CPUs, other than this one: they are to look what is wanted of their TLBs (`Hypervisor::answer_flushes`).
    fn request_flush(&self, cpus: CpuSet);
    /// Writes back and drops the caches of all CPUs (WBINVD): slow, for domains with devices that do not snoop.
    fn flush_caches(&self);

    /// Writes back and drops what any cache holds of `len` bytes of a frame from byte `offset` on (CLFLUSH). They lie in it.
    fn flush_cache_lines(&self, mfn: Mfn, offset: usize, len: usize);

    /// Nanoseconds since boot; never steps back.
    fn now_ns(&self) -> u64;
    /// The time-stamp counter of this CPU.
    fn tsc(&self) -> u64;
    /// Whether RDTSC of guests traps, because the clock is another counter. Then they are shown [`Platform::guest_tsc`].
    fn emulates_tsc(&self) -> bool {
        false
    }
    /// The time-stamp counter as a guest on this CPU is shown it.
    fn guest_tsc(&self) -> u64 {
        self.tsc()
    }
    /// The instant from which time is counted, in nanoseconds and in ticks of a guest's TSC on this CPU: [`Platform::now_ns`] is the first
    /// and the scaled ticks since the second. For one CPU it never changes.
    fn clock_origin(&self) -> (u64, u64);
    /// How guests turn ticks of their TSC into nanoseconds.
    fn time_scale(&self) -> TimeScale;
    /// Wall-clock time at boot in nanoseconds since 1970.
    fn boot_wallclock_ns(&self) -> u64;
    /// Arms this CPU's one-shot timer for an absolute time of [`Platform::now_ns`], or stops it.
    fn set_timer(&self, deadline_ns: Option<u64>);

    /// How many CPUs are up, numbered from 0.
    fn cpu_count(&self) -> u32;
    /// The CPU this runs on.
    fn this_cpu(&self) -> CpuId;
    /// Hardware ids of a CPU that is up: its local APIC's, and that in ACPI's tables.
    fn hardware_ids(&self, cpu: CpuId) -> (u32, u32);
    /// Makes another CPU leave its guest or idle loop and look at its pending work.
    fn kick(&self, cpu: CpuId);
    /// Waits in ring 0 for an interrupt, handles it, and returns.
    fn wait_for_interrupt(&self);
    /// Whether an interrupt waits to be taken on this CPU: long operations stop at the next step.
    fn interrupt_pending(&self) -> bool;

    /// Saves what the registers of this CPU still hold of `state`: vector registers, segments, bases, debug registers.
    fn leave_vcpu(&self, state: &mut VcpuState);
    /// Loads what ring 0 does not use itself: vector registers, segments, bases, descriptor tables, debug registers, and
    /// points the entry code at `state`. The page-table root is loaded by the caller.
    /// `Err` when a data selector could not be loaded and is null now: the guest's failsafe callback is due.
    fn enter_vcpu(&self, state: &mut VcpuState) -> Result<(), Fault>;
    /// Re-reads the live segment bases and selectors into `state`, for reports and context queries.
    fn read_live_segments(&self, state: &mut VcpuState);
    /// Loads one segment base of `state`, or the selector and base of its user mode's GS, into the CPU that runs it, in its
    /// kernel mode. All other bases and selectors stay.
    fn load_segment(&self, state: &VcpuState, which: SegmentBase);
    /// Loads the registers of `state` that guests read without a trap: XCR0 and TSC_AUX.
    fn load_readable(&self, state: &VcpuState);
    /// A model-specific register of the machine, `None` if it has no such one. For registers that tell of the machine and whose
    /// reading has no effect.
    fn read_msr(&self, number: u32) -> Option<u64>;
    /// Exchanges the two GS bases, as the guest moves between its kernel and user mode.
    fn swap_guest_gs(&self, state: &mut VcpuState);
    /// Shows the running vCPU the GDT and LDT that `state` describes.
    fn load_descriptor_tables(&self, state: &VcpuState);
    /// Maps the frame that holds page `page` of the running vCPU's LDT into the window (lazy LDT).
    fn map_ldt_page(&self, page: usize, mfn: Mfn);
    /// Loads the debug registers of `state`.
    fn load_debug_registers(&self, state: &VcpuState);
    /// Sets or clears CR0.TS of the running vCPU.
    fn set_task_switched(&self, ts: bool);
    /// Bytes of vector state per vCPU.
    fn vector_state_size(&self) -> usize;
    /// Puts the initial vector state into `area`, which has `vector_state_size` bytes.
    fn init_vector_state(&self, area: &mut [u8]);

    /// CPUID as the processor answers it.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Reads a port; `size` is 1, 2 or 4.
    fn port_in(&self, port: u16, size: u8) -> u32;
    /// Writes a port; `size` is 1, 2 or 4.
    fn port_out(&self, port: u16, size: u8, value: u32);
    /// How many interrupt pins (global system interrupts) there are.
    fn irq_pins(&self) -> u32;
    /// Opens or shuts an interrupt pin.
    fn mask_irq(&self, pin: u32, masked: bool);
    /// Tells the interrupt controller that the domain has handled a level-triggered pin.
    fn eoi_irq(&self, pin: u32);
    /// Sets how a pin that is shut is triggered: by level or edge, active low or high.
    fn configure_irq(&self, pin: u32, level: bool, active_low: bool);
    /// Sends the interrupts of a pin to this CPU from now on. False, and nothing changes, when no interrupt can name it.
    fn route_irq(&self, pin: u32, cpu: CpuId) -> bool;
    /// How many message interrupts there are.
    fn message_count(&self) -> u32;
    /// The store by which a device raises message interrupt `index` on this CPU: address and 32-bit value. `None` when there is none.
    fn message(&self, index: u32, cpu: CpuId) -> Option<(u64, u32)>;
    /// Whether a pin is level-triggered: it raises nothing further until [`Platform::eoi_irq`].
    fn is_level_irq(&self, pin: u32) -> bool;

    /// Whether page-table entries may forbid execution. Without, the bit is reserved and must not be set.
    fn has_no_execute(&self) -> bool {
        true
    }
    /// Frames of RAM in the machine.
    fn ram_frames(&self) -> u64;
    /// Frames that the hypervisor itself uses: image, tables, heap.
    fn own_frames(&self) -> u64;
    /// Bytes in use and bytes in all of the heap that serves boot and domain creation.
    fn heap_usage(&self) -> (u64, u64);
    /// Ticks of the time-stamp counter per millisecond.
    fn tsc_khz(&self) -> u32;

    /// Writes to the hypervisor's console.
    fn console_write(&self, text: &[u8]);
    /// Takes up to `buf.len()` bytes that were typed at the console; returns how many.
    fn console_read(&self, buf: &mut [u8]) -> usize;
    /// Reports processors that are stuck, as far as they can be made to speak, and stops the machine.
    fn report_stuck(&self, stuck: crate::watchdog::Stuck) -> !;
    /// Stops the machine.
    fn halt(&self, why: HaltReason) -> !;
}

/// Copies `len` bytes between two frames, both of which guests may write meanwhile. The caller has checked the ends.
///
/// Words at the ends of the range are merged by compare-and-exchange: bytes beside it that a guest writes at the same moment
/// must not be lost.
fn copy_words(source: &FrameWords, from: usize, dest: &FrameWords, to: usize, len: usize) {
    let byte = |at: usize| -> u64 {
        source.get(at / 8).map_or(0, |w| w.load(Ordering::Relaxed) >> (at % 8 * 8) & 0xff)
    };
    let mut done = 0;
    while done < len {
        let (index, first) = ((to + done) / 8, (to + done) % 8);
        let count = (8 - first).min(len - done);
        let Some(word) = dest.get(index) else { return };
        if count == 8 {
            word.store(unaligned(source, from + done), Ordering::Relaxed);
        } else {
            let (mut value, mut mask) = (0u64, 0u64);
            for i in 0..count {
                value |= byte(from + done + i) << ((first + i) * 8);
                mask |= 0xff << ((first + i) * 8);
            }
            let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(old & !mask | value));
        }
        done += count;
    }
}

/// The 8 bytes at byte `at` of a frame, of which all lie in it.
fn unaligned(words: &FrameWords, at: usize) -> u64 {
    let load = |index: usize| words.get(index).map_or(0, |w| w.load(Ordering::Relaxed));
    let shift = at % 8 * 8;
    if shift == 0 { load(at / 8) } else { load(at / 8) >> shift | load(at / 8 + 1) << (64 - shift) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use core::sync::atomic::AtomicU64;
    use proptest::prelude::*;

    fn bytes(words: &FrameWords) -> Vec<u8> {
        words.iter().flat_map(|w| w.load(Ordering::SeqCst).to_le_bytes()).collect()
    }

    proptest! {
        #[test]
        fn bytes_go_where_they_should(from in 0usize..4096, to in 0usize..4096, len in 0usize..4096, seed: u64) {
            let len = len.min(4096 - from).min(4096 - to);
            let source: FrameWords = core::array::from_fn(|i| AtomicU64::new(seed.wrapping_mul(i as u64 * 2 + 1)));
            let dest: FrameWords = core::array::from_fn(|i| AtomicU64::new(!seed ^ i as u64));
            let mut expected = bytes(&dest);
            expected[to..to + len].copy_from_slice(&bytes(&source)[from..from + len]);
            copy_words(&source, from, &dest, to, len);
            prop_assert_eq!(bytes(&dest), expected);
        }
    }
}

//! A simulated machine for host tests: memory as words, page tables walked as data, time that tests turn.

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use hypercall_abi::Mfn;
use hypercall_abi::subops::SegmentBase;
use spin::Mutex;

use super::{CpuId, CpuSet, Fault, FrameWords, HaltReason, Platform, TimeScale, TlbFlush};
use crate::domain::VcpuState;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Each word of RAM at power-on. As a table's entry it is present, as a count it is large.
pub const LEFT_BY_FIRMWARE: u64 = 0x5a5a_5a5a_5a5a_5a5b;

/// Called at each TLB flush.
pub type FlushHook = Box<dyn Fn(TlbFlush) + Send + Sync>;

/// The machine: `frames` frames of RAM from frame 0.
pub struct SimMachine {
    memory: Box<[FrameWords]>,
    root: AtomicU64,
    now: AtomicU64,
    timer: AtomicU64,
    /// The clock is not the TSC: guests are shown 1000 more than its time.
    pub tsc_emulated: AtomicBool,
    /// A data selector that cannot be loaded; 0 for none.
    pub bad_selector: AtomicU8,
    /// Everything written to the console.
    pub console: Mutex<Vec<u8>>,
    /// TLB flushes asked for, in order.
    pub flushes: Mutex<Vec<TlbFlush>>,
    /// Cache lines flushed: frame, first byte, bytes.
    pub cache_flushes: Mutex<Vec<(Mfn, usize, usize)>>,
    flush_hook: spin::Once<FlushHook>,
    /// What the heap is said to hold.
    pub heap_used: AtomicU64,
}

impl SimMachine {
    /// A machine with `frames` frames of RAM in which the firmware has left things.
    pub fn new(frames: usize) -> SimMachine {
        SimMachine {
            memory: (0..frames).map(|_| [const { AtomicU64::new(LEFT_BY_FIRMWARE) }; 512]).collect(),
            root: AtomicU64::new(u64::MAX),
            now: AtomicU64::new(1),
            timer: AtomicU64::new(u64::MAX),
            tsc_emulated: AtomicBool::new(false),
            bad_selector: AtomicU8::new(0),
            console: Mutex::new(Vec::new()),
            flushes: Mutex::new(Vec::new()),
            cache_flushes: Mutex::new(Vec::new()),
            flush_hook: spin::Once::new(),
            heap_used: AtomicU64::new(0),
        }
    }

    /// From now on calls `hook` at each TLB flush instead of noting it in `flushes`: for models of a TLB. The first call counts.
    pub fn on_flush(&self, hook: FlushHook) {
        self.flush_hook.call_once(|| hook);
    }

    /// How many frames there are.
    pub fn frames(&self) -> usize {
        self.memory.len()
    }

    /// Moves the clock on.
    pub fn advance(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::SeqCst);
    }

    /// When the one-shot timer is due, if it is armed.
    pub fn timer(&self) -> Option<u64> {
        Some(self.timer.load(Ordering::SeqCst)).filter(|t| *t != u64::MAX)
    }

    /// Root of the address space in force.
    pub fn root(&self) -> Option<Mfn> {
        Some(self.root.load(Ordering::SeqCst)).filter(|r| *r != u64::MAX).map(Mfn::new)
    }

    /// Translates a virtual address by the tables in force: the frame and the offset in it.
    pub fn translate(&self, va: u64, write: bool) -> Result<(Mfn, usize), Fault> {
        let mut table = self.root().ok_or(Fault)?;
        for level in (1..=4).rev() {
            let index = (va >> (12 + 9 * (level - 1)) & 511) as usize;
            let entry = self.memory.get(table.get() as usize).ok_or(Fault)?[index].load(Ordering::SeqCst);
            if entry & PRESENT == 0 || write && entry & WRITE == 0 {
                return Err(Fault);
            }
            table = Mfn::new((entry & ADDRESS) >> 12);
        }
        if table.get() as usize >= self.memory.len() {
            return Err(Fault);
        }
        Ok((table, (va & 0xfff) as usize))
    }

    fn copy(
        &self,
        va: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(&AtomicU64, usize, usize),
    ) -> Result<(), Fault> {
        for i in 0..len {
            let at = va.checked_add(i as u64).ok_or(Fault)?;
            if (0xffff_8000_0000_0000..0xffff_8800_0000_0000).contains(&at)
                || (at << 16) as i64 >> 16 != at as i64
            {
                return Err(Fault);
            }
            let (frame, offset) = self.translate(at, write)?;
            each(&self.frame(frame)[offset / 8], offset % 8, i);
        }
        Ok(())
    }
}

impl Platform for SimMachine {
    fn frame(&self, mfn: Mfn) -> &FrameWords {
        &self.memory[mfn.get() as usize]
    }
    fn zero_frame(&self, mfn: Mfn) {
        for word in self.frame(mfn) {
            word.store(0, Ordering::SeqCst);
        }
    }
    fn copy_frame(&self, from: Mfn, to: Mfn) {
        for (f, t) in self.frame(from).iter().zip(self.frame(to)) {
            t.store(f.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }
    fn copy_from_guest(&self, dst: &mut [u8], va: u64) -> Result<(), Fault> {
        let len = dst.len();
        self.copy(va, len, false, |word, byte, i| dst[i] = word.load(Ordering::SeqCst).to_le_bytes()[byte])
    }
    fn copy_to_guest(&self, va: u64, src: &[u8]) -> Result<(), Fault> {
        self.copy(va, src.len(), true, |word, byte, i| {
            let mut bytes = word.load(Ordering::SeqCst).to_le_bytes();
            bytes[byte] = src[i];
            word.store(u64::from_le_bytes(bytes), Ordering::SeqCst);
        })
    }
    fn load_root(&self, root: Mfn) {
        self.root.store(root.get(), Ordering::SeqCst);
    }
    fn load_idle_root(&self) {
        self.root.store(u64::MAX, Ordering::SeqCst);
    }
    fn fill_hypervisor_slots(&self, _l4: Mfn) {}
    fn request_flush(&self, _cpus: CpuSet) {}
    fn flush_tlb(&self, what: TlbFlush) {
        #[cfg(all(test, debug_assertions))]
        assert!(
            !crate::sync::holds(crate::sync::rank::GRANTS),
            "a flush is waited for with a grant table locked"
        );
        match self.flush_hook.get() {
            Some(hook) => hook(what),
            None => self.flushes.lock().push(what),
        }
    }
    fn flush_caches(&self) {}
    fn flush_cache_lines(&self, mfn: Mfn, offset: usize, len: usize) {
        self.cache_flushes.lock().push((mfn, offset, len));
    }
    fn now_ns(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }
    fn tsc(&self) -> u64 {
        self.now_ns()
    }
    fn emulates_tsc(&self) -> bool {
        self.tsc_emulated.load(Ordering::Relaxed)
    }
    fn guest_tsc(&self) -> u64 {
        self.tsc() + if self.emulates_tsc() { 1000 } else { 0 }
    }
    fn clock_origin(&self) -> (u64, u64) {
        (0, 0)
    }
    fn time_scale(&self) -> TimeScale {
        TimeScale { mul: 1 << 31, shift: 1 }
    }
    fn boot_wallclock_ns(&self) -> u64 {
        1_700_000_000_000_000_000
    }
    fn set_timer(&self, deadline_ns: Option<u64>) {
        self.timer.store(deadline_ns.unwrap_or(u64::MAX), Ordering::SeqCst);
    }
    fn cpu_count(&self) -> u32 {
        1
    }
    fn this_cpu(&self) -> CpuId {
        CpuId(0)
    }
    fn kick(&self, _cpu: CpuId) {}
    fn wait_for_interrupt(&self) {
        if let Some(at) = self.timer() {
            self.now.fetch_max(at, Ordering::SeqCst);
        }
    }
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn leave_vcpu(&self, _state: &mut VcpuState) {}
    fn enter_vcpu(&self, state: &mut VcpuState) -> Result<(), Fault> {
        let bad = u16::from(self.bad_selector.load(Ordering::SeqCst));
        if bad != 0 && state.selectors.ds == bad {
            state.selectors.ds = 0;
            return Err(Fault);
        }
        Ok(())
    }
    fn read_live_segments(&self, _state: &mut VcpuState) {}
    fn load_segment(&self, _state: &VcpuState, _which: SegmentBase) {}
    fn load_readable(&self, _state: &VcpuState) {}
    fn read_msr(&self, _number: u32) -> Option<u64> {
        None
    }
    fn swap_guest_gs(&self, _state: &mut VcpuState) {}
    fn load_descriptor_tables(&self, _state: &VcpuState) {}
    fn map_ldt_page(&self, _page: usize, _mfn: Mfn) {}
    fn load_debug_registers(&self, _state: &VcpuState) {}
    fn set_task_switched(&self, _ts: bool) {}
    fn vector_state_size(&self) -> usize {
        512
    }
    fn init_vector_state(&self, area: &mut [u8]) {
        area.fill(0);
    }
    fn cpuid(&self, _leaf: u32, _subleaf: u32) -> [u32; 4] {
        [0; 4]
    }
    fn port_in(&self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_out(&self, _port: u16, _size: u8, _value: u32) {}
    fn irq_pins(&self) -> u32 {
        24
    }
    fn mask_irq(&self, _pin: u32, _masked: bool) {}
    fn eoi_irq(&self, _pin: u32) {}
    fn configure_irq(&self, _pin: u32, _level: bool, _active_low: bool) {}
    /// As on a PC: pins from 16 on are PCI's.
    fn is_level_irq(&self, pin: u32) -> bool {
        pin >= 16
    }
    /// CPU 3 cannot be named.
    fn route_irq(&self, _pin: u32, cpu: CpuId) -> bool {
        cpu.0 != 3
    }
    fn message_count(&self) -> u32 {
        8
    }
    fn message(&self, index: u32, cpu: CpuId) -> Option<(u64, u32)> {
        (index < 8 && cpu.0 != 3).then(|| (0xfee0_0000 | u64::from(cpu.0) << 12, 0x81 + index))
    }
    fn hardware_ids(&self, cpu: CpuId) -> (u32, u32) {
        (cpu.0 * 2, cpu.0 + 100)
    }
    fn ram_frames(&self) -> u64 {
        self.memory.len() as u64
    }
    fn own_frames(&self) -> u64 {
        0
    }
    fn heap_usage(&self) -> (u64, u64) {
        (self.heap_used.load(Ordering::Relaxed), 1 << 40)
    }
    fn tsc_khz(&self) -> u32 {
        1_000_000
    }
    fn console_write(&self, text: &[u8]) {
        self.console.lock().extend_from_slice(text);
    }
    fn console_read(&self, _buf: &mut [u8]) -> usize {
        0
    }
    fn report_stuck(&self, stuck: crate::watchdog::Stuck) -> ! {
        panic!("stuck: {stuck:?}")
    }
    fn halt(&self, why: HaltReason) -> ! {
        panic!("the simulated machine halts: {why:?}")
    }
}

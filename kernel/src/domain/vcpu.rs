//! A virtual CPU: what its owner alone may touch, and what everybody may.
//!
//! The CPU that runs a vCPU *owns* its [`VcpuState`], boxed: no lock guards it, and nobody else can reach it. While the
//! vCPU is off, the state is parked in its [`Vcpu`]. What others touch while it runs (events, wake-ups, accounting) is in
//! `Vcpu`, as atomics or under small locks.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hypercall_abi::{Mfn, VcpuId};

use super::{Domain, GuestRegs};
use crate::platform::{CpuId, Platform};
use crate::sync::{RankedMutex, atomic as modelled, rank};
use crate::trap::debug::DebugRegs;

/// What the guest asked for, per trap vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrapEntry {
    /// Handler address, 0 for none.
    pub address: u64,
    /// Code selector of the handler.
    pub cs: u16,
    /// Bits 0-1: least privilege that may raise it by software; bit 2: mask events on delivery.
    pub flags: u8,
}

impl TrapEntry {
    /// The least privileged ring that may raise it by software.
    pub const fn dpl(self) -> u8 {
        self.flags & 3
    }
    /// Whether events are masked on delivery.
    pub const fn masks_events(self) -> bool {
        self.flags & 4 != 0
    }
}

/// A callback that the guest registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Callback {
    /// Handler address, 0 for none.
    pub address: u64,
    /// Whether events are masked on delivery.
    pub mask_events: bool,
}

/// The callbacks of a vCPU.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Callbacks {
    pub event: Callback,
    pub failsafe: Callback,
    pub syscall: Callback,
    pub syscall32: Callback,
    pub sysenter: Callback,
    pub nmi: Callback,
}

/// Data selectors, loaded and saved at vCPU switches only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DataSelectors {
    pub es: u16,
    pub ds: u16,
    pub fs: u16,
    pub gs: u16,
}

/// Most frames a guest's GDT may have: the hypervisor's own descriptors follow them.
pub const GDT_FRAMES: usize = 14;

/// The guest's GDT: frames typed as descriptor pages, one type reference each.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestGdt {
    /// The frames, in order; `None` behind the last.
    pub frames: [Option<Mfn>; GDT_FRAMES],
    /// Number of entries.
    pub entries: u32,
}

/// The guest's LDT, faulted in page by page.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestLdt {
    /// Linear address of the table.
    pub base: u64,
    /// Number of entries.
    pub entries: u32,
    /// Frames that are in the window; each holds a descriptor-page type reference.
    pub frames: [Option<Mfn>; 16],
}

/// Byte offset of MXCSR in an FXSAVE image (Intel SDM 1, 10.5.1).
const MXCSR_OFFSET: usize = 24;
/// Bits of MXCSR that exist on every processor.
const MXCSR_ALWAYS_VALID: u32 = 0xffbf;

/// Vector registers of a vCPU, 64-byte aligned for XSAVE.
pub struct VectorState(Box<[VectorLine]>);

#[repr(C, align(64))]
#[derive(Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
struct VectorLine([u8; 64]);

impl VectorState {
    /// The initial state on this machine.
    pub fn new<P: Platform>(platform: &P) -> VectorState {
        let lines = platform.vector_state_size().div_ceil(64);
        let mut state = VectorState(alloc::vec![VectorLine([0; 64]); lines].into_boxed_slice());
        platform.init_vector_state(state.bytes_mut());
        state
    }
    /// Replaces the x87 and SSE registers by a guest's FXSAVE image. Bits of MXCSR that would fault on loading are dropped.
    pub fn load_legacy(&mut self, image: &[u8; 512]) {
        let area = self.bytes_mut();
        let Some((legacy, extended)) = area.split_at_mut_checked(image.len()) else { return };
        legacy.copy_from_slice(image);
        if let Some(mxcsr) = legacy.get_mut(MXCSR_OFFSET..MXCSR_OFFSET + 4) {
            for (byte, mask) in mxcsr.iter_mut().zip(MXCSR_ALWAYS_VALID.to_le_bytes()) {
                *byte &= mask;
            }
        }
        // XSTATE_BV: both components are present. The rest of the header stays as the initial state has it.
        if let Some(components) = extended.first_mut() {
            *components |= 3;
        }
    }
    /// The whole area, for XSAVE and XRSTOR.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        zerocopy::IntoBytes::as_mut_bytes(&mut *self.0)
    }
}

/// The state of a vCPU that only the CPU running it (or the holder of its parked box) may touch.
#[repr(C, align(64))]
pub struct VcpuState {
    /// Saved by the entry code. First, because TSS.RSP0 and the SYSCALL stub point at its end.
    pub regs: GuestRegs,
    /// Stack pointer the entry code continues on: the stack of the CPU that runs this vCPU.
    pub cpu_stack: u64,
    /// Whether the guest is in its kernel (true) or in its user mode.
    pub kernel_mode: bool,
    /// Whether the next resume may use SYSRET, leaving rcx and r11 as SYSRET does.
    pub sysret_ok: bool,
    /// Privilege the guest gave itself for I/O, 0 to 3.
    pub iopl: u8,
    /// Whether the guest set CR0.TS: the next vector instruction raises #NM.
    pub task_switched: bool,
    /// Whether the guest is inside its NMI handler.
    pub nmi_masked: bool,
    /// Whether the records in its kernel's address space are to be written when it comes back there.
    pub areas_due: bool,
    /// Data selectors that could not be loaded when it was put on its CPU: the failsafe callback is due.
    pub failsafe_due: Option<DataSelectors>,
    /// Data selectors (valid while not running, or after `read_live_segments`).
    pub selectors: DataSelectors,
    /// FS base.
    pub fs_base: u64,
    /// GS base of the guest's kernel.
    pub gs_base_kernel: u64,
    /// GS base of the guest's user mode.
    pub gs_base_user: u64,
    /// Stack of the guest's kernel on entry from its user mode: selector and pointer.
    pub kernel_ss: u16,
    /// See `kernel_ss`.
    pub kernel_sp: u64,
    /// Root of the kernel address space; holds one L4 type reference.
    pub kernel_root: Option<Mfn>,
    /// Root of the user address space; holds one L4 type reference.
    pub user_root: Option<Mfn>,
    /// A page table whose teardown a hypercall of this vCPU began and did not finish: a hint, it holds no reference.
    pub unfinished: Option<Mfn>,
    /// CR4 as the guest set it.
    pub cr4: u64,
    /// Vector state components that the guest has turned on (XCR0).
    pub xcr0: u64,
    /// What RDTSCP and RDPID give beside the time stamp.
    pub tsc_aux: u32,
    /// The machine-check status register, which means nothing but is kept.
    pub mcg_status: u64,
    /// Debug registers.
    pub debug: DebugRegs,
    /// Descriptor tables.
    pub gdt: GuestGdt,
    /// See [`GuestLdt`].
    pub ldt: GuestLdt,
    /// Callbacks.
    pub callbacks: Callbacks,
    /// Port permission bitmap the guest registered: linear address and number of ports.
    pub io_bitmap: (u64, u32),
    /// Trap table.
    pub traps: [TrapEntry; 256],
    /// Vector registers while not running.
    pub vectors: VectorState,
    /// What the vCPU did ([`Vcpu::counts`]), near for the fast paths.
    pub counts: Arc<super::Counts>,
    /// Steps left before a long operation must look for waiting work; refilled at each entry.
    pub budget: crate::hypercall::Budget,
}

impl VcpuState {
    /// A state with nothing in it, of a vCPU that was never given a context.
    pub fn new<P: Platform>(platform: &P) -> VcpuState {
        VcpuState {
            regs: GuestRegs::default(),
            cpu_stack: 0,
            kernel_mode: true,
            sysret_ok: false,
            iopl: 0,
            task_switched: false,
            nmi_masked: false,
            areas_due: false,
            failsafe_due: None,
            selectors: DataSelectors::default(),
            fs_base: 0,
            gs_base_kernel: 0,
            gs_base_user: 0,
            kernel_ss: 0,
            kernel_sp: 0,
            kernel_root: None,
            user_root: None,
            unfinished: None,
            cr4: 0,
            xcr0: crate::trap::cpuid::XCR0_INITIAL,
            tsc_aux: 0,
            mcg_status: 0,
            debug: DebugRegs::default(),
            gdt: GuestGdt::default(),
            ldt: GuestLdt::default(),
            callbacks: Callbacks::default(),
            io_bitmap: (0, 0),
            traps: [TrapEntry::default(); 256],
            vectors: VectorState::new(platform),
            counts: Arc::new(super::Counts::new()),
            budget: crate::hypercall::Budget::new(0),
        }
    }

    /// The root in force: the kernel's or the user's.
    pub fn current_root(&self) -> Option<Mfn> {
        if self.kernel_mode { self.kernel_root } else { self.user_root }
    }
}

/// Why a vCPU is not runnable.
pub mod block {
    /// Not brought up yet, or taken down.
    pub const DOWN: u32 = 1 << 0;
    /// Waits for an event.
    pub const BLOCKED: u32 = 1 << 1;
    /// Waits for a polled event channel.
    pub const POLLING: u32 = 1 << 2;
}

/// The part of a vCPU that everybody may touch.
pub struct Vcpu {
    /// Its number in its domain.
    pub id: VcpuId,
    /// The state while nobody runs it; `None` while it runs.
    pub parked: RankedMutex<Option<Box<VcpuState>>, { rank::VCPU_PARKED }>,
    /// Whether it was ever given a context.
    pub initialised: AtomicBool,
    /// Reasons not to run (`block::*`).
    pub blocked: modelled::AtomicU32,
    /// Times it was paused by the control interface or by itself shutting down.
    pub pauses: AtomicU32,
    /// Machine address of its vcpu_info structure.
    info: AtomicU64,
    /// Whether the guest registered a place of its own for vcpu_info, which it can do once.
    pub info_registered: AtomicBool,
    /// The CPU that runs it, or in whose queue it waits or will wait. It changes under the lock of the queue that it names.
    pub cpu: AtomicU32,
    /// Whether a CPU runs it now. Changed under the lock of that CPU's queue.
    pub running: modelled::AtomicBool,
    /// The one port it polls, 0 for several: any port wakes it then.
    pub polled_port: AtomicU32,
    /// Scheduling entity, accounting and timers.
    pub sched: crate::sched::Entity,
    /// What it did.
    pub counts: Arc<super::Counts>,
    /// Run-state accounting.
    pub runstate: RankedMutex<crate::time::RunState, { rank::RUNSTATE }>,
    /// Guest virtual address of the registered copy of its run-state record, 0 for none.
    pub runstate_area: AtomicU64,
    /// Guest virtual address of the registered copy of its time record, 0 for none.
    pub time_area: AtomicU64,
    /// That copy is to be written when the vCPU is in its kernel's address space next.
    pub time_due: AtomicBool,
    /// A non-maskable interrupt was sent to it and waits.
    pub nmi_pending: AtomicBool,
    /// Timers of the guest.
    pub timers: crate::time::VcpuTimers,
    /// Port bound to each virtual interrupt, 0 for none.
    pub virq_port: [AtomicU32; 24],
}

impl Vcpu {
    /// A vCPU that is down and has no context yet.
    pub fn new<P: Platform>(id: VcpuId, platform: &P) -> Vcpu {
        let state = Box::new(VcpuState::new(platform));
        Vcpu {
            id,
            counts: state.counts.clone(),
            parked: RankedMutex::new(Some(state)),
            initialised: AtomicBool::new(false),
            blocked: modelled::AtomicU32::new(block::DOWN),
            pauses: AtomicU32::new(0),
            info: AtomicU64::new(0),
            info_registered: AtomicBool::new(false),
            cpu: AtomicU32::new(0),
            running: modelled::AtomicBool::new(false),
            polled_port: AtomicU32::new(0),
            sched: crate::sched::Entity::new(),
            runstate: RankedMutex::new(crate::time::RunState::new()),
            runstate_area: AtomicU64::new(0),
            time_area: AtomicU64::new(0),
            time_due: AtomicBool::new(false),
            nmi_pending: AtomicBool::new(false),
            timers: crate::time::VcpuTimers::new(),
            virq_port: [const { AtomicU32::new(0) }; 24],
        }
    }

    /// Whether it wants to run, apart from its domain's pauses.
    pub fn runnable(&self) -> bool {
        self.blocked.load(Ordering::SeqCst) == 0 && self.pauses.load(Ordering::SeqCst) == 0
    }

    /// Frame and byte offset of its vcpu_info, once it has one.
    pub fn info_location(&self) -> Option<(Mfn, usize)> {
        let at = self.info.load(Ordering::Acquire);
        (at != 0).then(|| (Mfn::new(at >> 12), (at & 0xfff) as usize))
    }

    /// Moves vcpu_info; the caller holds a writable reference to the frame for as long as it stays there. `offset` is a
    /// multiple of 8 and leaves room for the structure in the page.
    pub fn set_info_location(&self, mfn: Mfn, offset: usize) {
        self.info.store(mfn.get() << 12 | offset as u64 & 0xff8, Ordering::Release);
    }

    /// The words of its vcpu_info, once it has one.
    #[inline(always)]
    pub fn info<'p, P: Platform>(&self, platform: &'p P) -> Option<&'p [AtomicU64; 8]> {
        let (mfn, offset) = self.info_location()?;
        platform.frame(mfn).get(offset / 8..)?.first_chunk()
    }

    /// Word `index` (0 to 7) of its vcpu_info.
    pub fn info_word<'p, P: Platform>(&self, platform: &'p P, index: usize) -> Option<&'p AtomicU64> {
        self.info(platform)?.get(index)
    }

    /// Sets or clears the event mask byte; returns whether it was set.
    pub fn set_upcall_mask<P: Platform>(&self, platform: &P, masked: bool) -> bool {
        let Some(word) = self.info_word(platform, 0) else { return true };
        let old = if masked { mask_upcalls(word) } else { unmask_upcalls(word) };
        old >> 8 & 0xff != 0
    }

    /// Whether an upcall is due: pending and not masked.
    pub fn upcall_due<P: Platform>(&self, platform: &P) -> bool {
        self.info_word(platform, 0).is_some_and(is_upcall_due)
    }
}

/// Sets the event mask byte in the first word of a vcpu_info; returns the word before.
#[inline(always)]
pub fn mask_upcalls(word: &AtomicU64) -> u64 {
    word.fetch_or(0x100, Ordering::AcqRel)
}

/// Clears the event mask byte in the first word of a vcpu_info; returns the word before.
#[inline(always)]
pub fn unmask_upcalls(word: &AtomicU64) -> u64 {
    word.fetch_and(!0xff00, Ordering::AcqRel)
}

/// Whether the first word of a vcpu_info says that an upcall is pending and not masked.
#[inline(always)]
pub fn is_upcall_due(word: &AtomicU64) -> bool {
    let word = word.load(Ordering::Acquire);
    word & 0xff != 0 && word >> 8 & 0xff == 0
}

/// A vCPU together with the domain that keeps it alive.
#[derive(Clone)]
pub struct VcpuRef {
    domain: Arc<Domain>,
    index: usize,
}

impl VcpuRef {
    /// The vCPU numbered `id` of `domain`, if there is one.
    pub fn new(domain: &Arc<Domain>, id: VcpuId) -> Option<VcpuRef> {
        let index = id.get() as usize;
        domain.vcpus.get(index)?;
        Some(VcpuRef { domain: domain.clone(), index })
    }
    /// Its domain.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }
    /// Whether both name the same vCPU.
    pub fn same(&self, other: &VcpuRef) -> bool {
        self.index == other.index && Arc::ptr_eq(&self.domain, &other.domain)
    }
}

impl core::ops::Deref for VcpuRef {
    type Target = Vcpu;
    fn deref(&self) -> &Vcpu {
        // In range: checked by `new`, and the slice of a domain never changes its length.
        &self.domain.vcpus[self.index]
    }
}

/// The vCPU that a CPU runs, with its state owned.
pub struct Current {
    /// Who.
    pub vcpu: VcpuRef,
    /// Its state.
    pub state: Box<VcpuState>,
}

impl Current {
    /// The domain of the vCPU that runs.
    pub fn domain(&self) -> &Arc<Domain> {
        self.vcpu.domain()
    }
    /// Whether nothing keeps it from running.
    pub fn may_run(&self) -> bool {
        let vcpu: &Vcpu = &self.vcpu;
        vcpu.runnable() && self.domain().may_run()
    }
}

/// What a CPU keeps for itself: the policy's part of its per-CPU block.
pub struct Cpu {
    /// Its number.
    pub id: CpuId,
    /// The vCPU it runs; `None` when idle.
    pub current: Option<Current>,
    /// What the entry from a guest is whose work has not ended, for [`CpuShared::longest_what`].
    ///
    /// [`CpuShared::longest_what`]: crate::hypervisor::CpuShared::longest_what
    pub entry: Option<u32>,
}

impl Cpu {
    /// A CPU that idles.
    pub const fn new(id: CpuId) -> Cpu {
        Cpu { id, current: None, entry: None }
    }
}

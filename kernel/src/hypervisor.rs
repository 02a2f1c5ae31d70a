//! The hypervisor as one value: all state, generic over the machine.
//!
//! On the target there is one, a static over `arch::x86_64::Machine`; on the host, tests make as many as they like over
//! `platform::sim`.
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hypercall_abi::{DomId, VcpuId, Virq};

use crate::access::Verbs;
use crate::domain::{Count, Registry, VcpuRef};
use crate::hypercall::Budget;
use crate::platform::{CpuId, Platform};
use crate::sched::RunQueue;
use crate::sync::{RankedMutex, rank};
use crate::time::{RunState, TimerQueue};

/// What CPUs may touch of each other.
pub struct CpuShared {
    /// vCPUs waiting to run here.
    pub run_queue: RankedMutex<RunQueue, { rank::RUN_QUEUE }>,
    /// Timers of vCPUs that live here.
    pub timers: RankedMutex<TimerQueue<VcpuRef>, { rank::TIMERS }>,
    /// When the first of `timers` is due, in nanoseconds since boot; 0 for none. Written under their lock.
    pub first_timer_ns: AtomicU64,
    /// The vCPU that runs should be chosen anew before the next return to a guest.
    pub reschedule: AtomicBool,
    /// A timer is due.
    pub timer_due: AtomicBool,
    /// TSC at which this CPU entered ring 0, never 0; 0 while it is in a guest or sleeps. It alone writes it.
    pub entered: AtomicU64,
    /// The longest entry from a guest so far, in TSC ticks from the entry to the end of its work.
    pub longest_ticks: AtomicU64,
    /// What it was: a hypercall number with bit 16 set, or an exception vector.
    pub longest_what: AtomicU32,
    /// What it shows of itself to CPUs that place vCPUs or look for work.
    pub view: crate::sched::Published,
    /// Since when and for how long it idled (`Blocked`) and ran guests (`Running`).
    pub runstate: RankedMutex<RunState, { rank::RUNSTATE }>,
    /// Times that it put a vCPU on. Written by this CPU only, as the next.
    pub switches: Count,
    /// Timer interrupts that it took.
    pub timer_interrupts: Count,
    /// When the present slice ends, in nanoseconds since boot; 0 when nobody waits.
    pub slice_end_ns: AtomicU64,
    /// When it would end if somebody waited; 0 when it would not. Written by this CPU only, as the next.
    pub contended_end_ns: AtomicU64,
    /// When the hardware timer fires at the latest, `u64::MAX` for never; 0 when it has fired and is to be set anew.
    pub armed_ns: AtomicU64,
}

impl CpuShared {
    /// Notes when the first of its timers is due, after they changed; `timers` are this CPU's, and locked.
    pub fn note_first_timer(&self, timers: &TimerQueue<VcpuRef>) {
        self.first_timer_ns.store(timers.first().unwrap_or(0), Ordering::Release);
    }
}

/// All of the hypervisor.
pub struct Hypervisor<P: Platform> {
    /// The machine.
    pub platform: P,
    /// Frames, their owners and types, and the free ones.
    pub mm: crate::mm::Memory,
    /// All domains.
    pub domains: Registry,
    /// Sources of device interrupts and who listens to them.
    pub irqs: crate::evtchn::IrqTable,
    /// Per CPU, by number.
    pub cpus: Box<[CpuShared]>,
    /// How CPUs are shared.
    pub policy: crate::sched::Sharing,
    /// Who looks whether CPUs are alive.
    pub watchdog: crate::watchdog::Watchdog,
    /// CPUs that vCPUs hold for themselves.
    pub claims: crate::sched::Claims,
    /// Held from the write of an index port to the access to its data port.
    pub indexed_ports: RankedMutex<(), { rank::INDEXED_PORTS }>,
    /// The words of its command line, once boot has told them.
    pub command_line: spin::Once<&'static str>,
    /// Steps of a long operation per entry: [`Budget::PER_ENTRY`], or what a test wants.
    pub steps_per_entry: AtomicU32,
}

impl<P: Platform> Hypervisor<P> {
    /// A hypervisor without domains.
    pub fn new(platform: P, mm: crate::mm::Memory) -> Self {
        let cpu_count = platform.cpu_count();
        let cpus = (0..cpu_count)
            .map(|_| CpuShared {
                run_queue: RankedMutex::new(RunQueue::new()),
                timers: RankedMutex::new(TimerQueue::new()),
                first_timer_ns: AtomicU64::new(0),
                reschedule: AtomicBool::new(false),
                timer_due: AtomicBool::new(false),
                entered: AtomicU64::new(0),
                longest_ticks: AtomicU64::new(0),
                longest_what: AtomicU32::new(0),
                slice_end_ns: AtomicU64::new(0),
                contended_end_ns: AtomicU64::new(0),
                armed_ns: AtomicU64::new(0),
                runstate: RankedMutex::new(RunState::new()),
                switches: Count::new(),
                timer_interrupts: Count::new(),
                view: crate::sched::Published::new(),
            })
            .collect();
        mm.clock().set_cpus(cpu_count);
        let irqs = crate::evtchn::IrqTable::new(platform.irq_pins(), platform.message_count());
        Hypervisor {
            platform,
            mm,
            domains: Registry::new(),
            irqs,
            indexed_ports: RankedMutex::new(()),
            cpus,
            policy: crate::sched::Sharing::default(),
            watchdog: crate::watchdog::Watchdog::new(cpu_count),
            claims: crate::sched::Claims::new(),
            command_line: spin::Once::new(),
            steps_per_entry: AtomicU32::new(Budget::PER_ENTRY),
        }
    }

    /// The shared part of a CPU. Numbers come from the platform or from a vCPU that was placed: they are in range.
    pub fn cpu(&self, id: CpuId) -> &CpuShared {
        &self.cpus[id.0 as usize]
    }

    /// This CPU has entered ring 0, from a guest or from its sleep.
    #[inline]
    pub fn note_entry(&self, this: CpuId) {
        self.cpu(this).entered.store(self.platform.tsc() | 1, Ordering::Relaxed);
    }

    /// Drops what other CPUs have asked this one to drop from its TLB. Called at their interrupt, and in every loop in which a
    /// CPU waits for another.
    pub fn answer_flushes(&self) {
        self.mm.clock().answer(&self.platform, self.platform.this_cpu());
    }

    /// Asks a CPU to choose anew whom it runs.
    pub fn request_reschedule(&self, id: CpuId) {
        self.cpu(id).reschedule.store(true, Ordering::Release);
        if id != self.platform.this_cpu() {
            self.kick(id);
        }
    }

    /// The domain that `id` names when `caller` says it: `DOMID_SELF` is the caller.
    pub fn resolve_domid(&self, caller: DomId, id: DomId) -> DomId {
        if id == DomId::SELF { caller } else { id }
    }

    /// Tells whoever manages domains that one of them shut down.
    pub fn notify_toolstack(&self) {
        self.raise_for(Verbs::CONTROL, Virq::DOM_EXC);
    }

    /// Something was typed at the console: tells whoever may read it.
    pub fn on_console_input(&self) {
        self.raise_for(Verbs::CONSOLE, Virq::CONSOLE);
    }

    /// Raises a virtual interrupt in every domain that has the right `verb`.
    fn raise_for(&self, verb: Verbs, virq: Virq) {
        let mut from = DomId::ZERO;
        while let Some(domain) = self.domains.with_verbs_at_or_after(from) {
            if domain.rights.lock().verbs.contains(verb)
                && let Some(vcpu) = VcpuRef::new(&domain, VcpuId::new(0))
            {
                self.raise_virq(&vcpu, virq);
            }
            from = DomId::new(domain.id.get() + 1);
        }
    }

    /// The budget of an entry from a guest.
    pub fn entry_budget(&self) -> Budget {
        Budget::new(self.steps_per_entry.load(Ordering::Relaxed))
    }
}

//! From one vCPU to the next, and the way back to a guest.

use core::sync::atomic::Ordering;

use hypercall_abi::Virq;

use super::SLICE_NS;
use crate::domain::{Cpu, Current, Domain, VcpuRef, block, reason};
use crate::hypervisor::Hypervisor;
use crate::platform::{CpuId, Platform};
use crate::time::RunStateKind;

impl<P: Platform> Hypervisor<P> {
    /// Makes a vCPU wait for a CPU if it may run and does not yet. Harmless when called too often.
    pub fn wake(&self, vcpu: &VcpuRef) {
        if !vcpu.runnable() || !vcpu.domain().may_run() {
            return;
        }
        let home = CpuId(vcpu.cpu.load(Ordering::Relaxed));
        let mut queue = self.cpu(home).run_queue.lock();
        if vcpu.running.load(Ordering::Relaxed) {
            return;
        }
        if !vcpu.sched.queued.load(Ordering::Relaxed) {
            vcpu.runstate.lock().change(RunStateKind::Runnable, self.platform.now_ns());
        }
        queue.push(vcpu.clone(), true);
        drop(queue);
        self.request_reschedule(home);
    }

    /// Wakes every vCPU of a domain that may run, after a pause ended.
    pub fn wake_domain(&self, domain: &alloc::sync::Arc<Domain>) {
        for vcpu in &domain.vcpus {
            if let Some(vcpu) = VcpuRef::new(domain, vcpu.id) {
                self.wake(&vcpu);
            }
        }
    }

    /// Makes the vCPUs of a domain that may not run any more leave their CPUs at their next chance.
    pub fn stop_domain(&self, domain: &Domain) {
        for vcpu in &domain.vcpus {
            if vcpu.running.load(Ordering::Acquire) {
                self.request_reschedule(CpuId(vcpu.cpu.load(Ordering::Relaxed)));
            }
        }
    }

    /// Ends the wait of a blocked or polling vCPU and queues it.
    pub fn unblock(&self, vcpu: &VcpuRef) {
        let was = vcpu.blocked.fetch_and(!(block::BLOCKED | block::POLLING), Ordering::AcqRel);
        if was & block::POLLING != 0 {
            vcpu.timers.poll_ns.store(0, Ordering::Relaxed);
            self.arm_timers(vcpu);
        }
        if was != 0 {
            self.wake(vcpu);
        }
    }

    /// Brings a vCPU's place in its CPU's timer queue up to date after its timers changed.
    pub fn arm_timers(&self, vcpu: &VcpuRef) {
        let home = CpuId(vcpu.cpu.load(Ordering::Relaxed));
        let mut timers = self.cpu(home).timers.lock();
        let before = timers.first();
        timers.set(vcpu.clone(), vcpu.earliest_deadline(vcpu.domain()));
        let changed = timers.first() != before;
        drop(timers);
        if changed {
            self.program_timer(home);
        }
    }

    /// Sets the hardware timer to the nearest of the guests' timers and the end of the slice.
    fn program_timer(&self, cpu: CpuId) {
        if cpu != self.platform.this_cpu() {
            self.cpu(cpu).timer_due.store(true, Ordering::Release);
            self.platform.kick(cpu);
            return;
        }
        let shared = self.cpu(cpu);
        let slice_end = match shared.slice_end_ns.load(Ordering::Relaxed) {
            0 => None,
            at => Some(at),
        };
        let first = shared.timers.lock().first();
        self.platform.set_timer(first.into_iter().chain(slice_end).min());
    }

    /// The timer interrupt of this CPU.
    pub fn on_timer(&self) {
        self.cpu(self.platform.this_cpu()).timer_due.store(true, Ordering::Release);
    }

    /// Fires what is due, and sets the hardware timer to what comes next.
    fn run_timers(&self, cpu: CpuId) {
        let shared = self.cpu(cpu);
        let now = self.platform.now_ns();
        while let Some(vcpu) = { shared.timers.lock().pop_due(now) } {
            self.fire_timers(&vcpu, now);
            shared.timers.lock().set(vcpu.clone(), vcpu.earliest_deadline(vcpu.domain()));
        }
        let slice_end = shared.slice_end_ns.load(Ordering::Relaxed);
        if slice_end != 0 && slice_end <= now {
            shared.reschedule.store(true, Ordering::Release);
        }
        self.program_timer(cpu);
    }

    fn fire_timers(&self, vcpu: &VcpuRef, now: u64) {
        let timers = &vcpu.timers;
        let due = |at: u64| at != 0 && at <= now;
        let mut tick = false;
        if due(timers.single_ns.load(Ordering::Relaxed)) {
            timers.single_ns.store(0, Ordering::Relaxed);
            tick = true;
        }
        let next = timers.tick_ns.load(Ordering::Relaxed);
        if due(next) {
            // Ticks that were missed while the vCPU was off are not made up for.
            let period = timers.period_ns.load(Ordering::Relaxed).max(1);
            let missed = (now - next) / period;
            timers.tick_ns.store(next + (missed + 1) * period, Ordering::Relaxed);
            tick = true;
        }
        if tick {
            self.raise_virq(vcpu, Virq::TIMER);
        }
        if vcpu.id.get() == 0 && vcpu.domain().watchdogs.iter().any(|w| due(w.load(Ordering::Acquire))) {
            log::warn!("domain {}: watchdog fired", vcpu.domain().id);
            self.shut_down(vcpu.domain(), reason::WATCHDOG);
            for watchdog in &vcpu.domain().watchdogs {
                watchdog.store(0, Ordering::Release);
            }
        }
        if due(timers.poll_ns.load(Ordering::Relaxed)) {
            timers.poll_ns.store(0, Ordering::Relaxed);
            self.unblock(vcpu);
        }
    }

    /// Everything between the end of an entry's work and the return to a guest: timers, quarantined frames, the choice of
    /// whom to run (idling when there is nobody), and events to deliver. Afterwards `cpu.current` is what to resume.
    pub fn prepare_resume(&self, cpu: &mut Cpu) {
        let shared = self.cpu(cpu.id);
        if let Some((since, what)) = cpu.entered.take() {
            let ticks = self.platform.tsc().wrapping_sub(since);
            if ticks > shared.longest_ticks.load(Ordering::Relaxed) {
                shared.longest_ticks.store(ticks, Ordering::Relaxed);
                shared.longest_what.store(what, Ordering::Relaxed);
            }
        }
        loop {
            if shared.timer_due.swap(false, Ordering::AcqRel) {
                self.run_timers(cpu.id);
            }
            self.drain_quarantine();
            let gone = cpu.current.as_ref().is_none_or(|c| !c.vcpu.runnable() || !c.domain().may_run());
            if shared.reschedule.swap(false, Ordering::AcqRel) || gone {
                self.switch(cpu);
            }
            let Some(current) = cpu.current.as_mut() else {
                if !shared.reschedule.load(Ordering::Acquire) && !shared.timer_due.load(Ordering::Acquire) {
                    self.platform.wait_for_interrupt();
                }
                continue;
            };
            // Delivery writes to the guest's stack and may find that the domain must be crashed: then choose again.
            self.deliver_pending(current);
            if current.vcpu.runnable()
                && current.domain().may_run()
                && !shared.reschedule.load(Ordering::Acquire)
                && !shared.timer_due.load(Ordering::Acquire)
            {
                return;
            }
        }
    }

    /// Gives the CPU to the vCPU that is furthest behind; keeps the present one if that is it.
    fn switch(&self, cpu: &mut Cpu) {
        let now = self.platform.now_ns();
        let shared = self.cpu(cpu.id);
        if let Some(current) = &cpu.current {
            let sched = &current.vcpu.sched;
            sched.charge(now.saturating_sub(sched.since_ns.swap(now, Ordering::Relaxed)));
            let stays = current.vcpu.runnable() && current.domain().may_run();
            let ahead = shared.run_queue.lock().preempts(sched.virtual_ns.load(Ordering::Relaxed));
            if stays && !ahead {
                self.start_slice(cpu.id, now);
                return;
            }
        }
        if let Some(current) = cpu.current.take() {
            self.put_off(cpu.id, current, now);
        }
        let next = shared.run_queue.lock().pop_and_mark();
        match next {
            Some(vcpu) => self.put_on(cpu, vcpu, now),
            None => {
                shared.slice_end_ns.store(0, Ordering::Relaxed);
                self.program_timer(cpu.id);
                self.platform.load_idle_root();
            }
        }
    }

    /// Ends a slice: saves what the CPU holds, parks the state, and queues the vCPU again if it may run.
    fn put_off(&self, cpu: CpuId, current: Current, now: u64) {
        let Current { vcpu, mut state } = current;
        self.platform.leave_vcpu(&mut state);
        let stays = vcpu.runnable() && vcpu.domain().may_run();
        let kind = match (stays, vcpu.blocked.load(Ordering::Acquire)) {
            (true, _) => RunStateKind::Runnable,
            (false, b) if b & (block::BLOCKED | block::POLLING) != 0 && vcpu.domain().may_run() => {
                RunStateKind::Blocked
            }
            _ => RunStateKind::Offline,
        };
        vcpu.runstate.lock().change(kind, now);
        self.publish_areas(&vcpu, &state);
        *vcpu.parked.lock() = Some(state);
        let mut queue = self.cpu(cpu).run_queue.lock();
        vcpu.running.store(false, Ordering::Release);
        // Asked again under the lock: a wake-up that came while it still counted as running did nothing.
        if vcpu.runnable() && vcpu.domain().may_run() {
            queue.push(vcpu.clone(), !stays);
        }
    }

    fn put_on(&self, cpu: &mut Cpu, vcpu: VcpuRef, now: u64) {
        let Some(mut state) = vcpu.parked.lock().take() else {
            // A vCPU without a context cannot be runnable; be safe and leave it off.
            vcpu.blocked.fetch_or(block::DOWN, Ordering::AcqRel);
            vcpu.running.store(false, Ordering::Release);
            return;
        };
        let Some(root) = state.current_root() else {
            vcpu.running.store(false, Ordering::Release);
            *vcpu.parked.lock() = Some(state);
            self.crash_domain(vcpu.domain(), "no page tables for the mode it runs in");
            return;
        };
        vcpu.cpu.store(cpu.id.0, Ordering::Relaxed);
        vcpu.sched.since_ns.store(now, Ordering::Relaxed);
        vcpu.runstate.lock().change(RunStateKind::Running, now);
        self.platform.load_root(root);
        let wanted = state.selectors;
        if self.platform.enter_vcpu(&mut state).is_err() {
            state.failsafe_due = Some(wanted);
        }
        self.update_vcpu_time(&vcpu);
        self.publish_areas(&vcpu, &state);
        cpu.current = Some(Current { vcpu, state });
        self.start_slice(cpu.id, now);
    }

    /// A slice ends only if somebody waits: a vCPU alone is not disturbed.
    fn start_slice(&self, cpu: CpuId, now: u64) {
        let shared = self.cpu(cpu);
        let end = if shared.run_queue.lock().is_empty() { 0 } else { now + SLICE_NS };
        shared.slice_end_ns.store(end, Ordering::Relaxed);
        self.program_timer(cpu);
    }

    /// Makes room in run queues and timer queues for `total` vCPUs, so that no guest call allocates there.
    pub fn reserve_vcpus(&self, total: usize) {
        for cpu in &self.cpus {
            cpu.run_queue.lock().reserve(total);
            cpu.timers.lock().reserve(total);
        }
    }

    /// Gives the rest of the slice to whoever waits: the caller's clock moves up to the first that waits.
    pub fn yield_cpu(&self, current: &Current) {
        let home = CpuId(current.vcpu.cpu.load(Ordering::Relaxed));
        let first = self.cpu(home).run_queue.lock().first();
        if let Some(first) = first {
            current.vcpu.sched.virtual_ns.fetch_max(first + 1, Ordering::Relaxed);
            self.request_reschedule(home);
        }
    }
}

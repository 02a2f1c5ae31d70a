//! From one vCPU to the next, and the way back to a guest.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use alloc::sync::Arc;

use hypercall_abi::{VcpuId, Virq};

use super::policy::{Affinity, Arrival, Policy, Preempt, View};
use super::{NO_CPU, RunQueue, wakeup};
use crate::domain::{Cpu, Current, Domain, DomainError, Vcpu, VcpuRef, block, reason};
use crate::hypervisor::{CpuShared, Hypervisor};
use crate::platform::{CpuId, CpuSet, Platform};
use crate::sync;
use crate::time::RunStateKind;

/// Later than anything is due.
const NEVER: u64 = u64::MAX;

/// The vCPU that runs and may go on.
#[derive(Clone, Copy)]
struct Running {
    standing: u64,
    /// For how long it has run.
    ran: u64,
    /// It would rather not.
    yields: bool,
}

/// Whom a CPU runs next.
enum Choice {
    /// The one that runs now, with a slice of this length or the policy's.
    Stay(Option<u64>),
    /// This one, or nobody.
    Other(Option<VcpuRef>),
}

/// Stops a timer that is due. In one step: its vCPU may be setting it anew on another CPU, and that must not be undone.
fn take_due(timer: &AtomicU64, now: u64) -> bool {
    let due = |at: u64| (at != 0 && at <= now).then_some(0);
    timer.fetch_update(Ordering::AcqRel, Ordering::Acquire, due).is_ok()
}

/// Whether a flag of this CPU was set; it is not afterwards. Looked at first, for it is set rarely and an exchange is dear. Whoever
/// sets it from another CPU sends an interrupt then, so none is overlooked.
fn take_flag(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::AcqRel)
}

/// Whether a vCPU may go on running on `cpu`.
fn may_stay(cpu: CpuId, domain: &Domain, vcpu: &Vcpu) -> bool {
    vcpu.runnable() && domain.may_run() && vcpu.sched.affinity().allows(cpu)
}

impl<P: Platform> Hypervisor<P> {
    /// Makes a vCPU wait for a CPU if it may run and does not yet. Harmless when called too often.
    ///
    /// It waits where it ran last, unless a CPU that it may and would rather use is idle.
    pub fn wake(&self, vcpu: &VcpuRef) {
        let (reference, vcpu): (_, &Vcpu) = (vcpu, vcpu);
        let domain = reference.domain();
        if !vcpu.runnable() || !domain.is_on() {
            return;
        }
        let mut placed = false;
        let home = loop {
            let home = CpuId(vcpu.cpu.load(Ordering::SeqCst));
            let shared = self.cpu(home);
            let mut queue = shared.run_queue.lock();
            if vcpu.cpu.load(Ordering::SeqCst) != home.0 {
                // It moved between the two.
                continue;
            }
            if vcpu.running.load(Ordering::Relaxed) {
                return;
            }
            if vcpu.sched.queued.load(Ordering::Relaxed) {
                break home;
            }
            let now = self.platform.now_ns();
            if domain.cap.waits() {
                // Whoever ends the wait wakes it.
                return vcpu.runstate.lock().change(RunStateKind::Runnable, now);
            }
            let virtual_ns = vcpu.sched.virtual_ns.load(Ordering::Relaxed);
            if self.cpus.len() > 1 && !placed {
                placed = true;
                let to = vcpu.sched.claimed().unwrap_or_else(|| {
                    self.policy.place(self.views(now), virtual_ns, home, vcpu.sched.affinity())
                });
                if to != home {
                    // Whoever wakes it now finds the new place.
                    vcpu.cpu.store(to.0, Ordering::SeqCst);
                    continue;
                }
            }
            vcpu.runstate.lock().change(RunStateKind::Runnable, now);
            let standing = self.join(shared, &mut queue, reference.clone(), now);
            drop(queue);
            if home != self.platform.this_cpu() {
                break home;
            }
            if !self.goes_on(home, shared, standing, now) {
                shared.reschedule.store(true, Ordering::Release);
            }
            return;
        };
        self.request_reschedule(home);
    }

    /// Changes where a vCPU may run. Where it may not be any more, it leaves at the next chance.
    ///
    /// `EBUSY` under the policy `null`: no CPU that it may run on is free, or it asked to be kept where it is.
    pub fn set_affinity(&self, vcpu: &VcpuRef, affinity: Affinity) -> Result<(), DomainError> {
        if let Some(old) = vcpu.sched.claimed()
            && !affinity.allows(old)
        {
            if vcpu.sched.pinned.load(Ordering::SeqCst) != 0 {
                return Err(DomainError::Busy);
            }
            let new = self.claims.exchange(old, affinity.hard.and(self.online())).ok_or(DomainError::Busy)?;
            if vcpu.sched.set_claimed(Some(new)) != Some(old) {
                // Its domain ends, or another call was faster: what that one gave back stays so.
                vcpu.sched.set_claimed(None);
                self.claims.give_back(CpuSet::one(new));
                return Err(DomainError::Busy);
            }
        }
        vcpu.sched.hard.store(affinity.hard.0, Ordering::SeqCst);
        vcpu.sched.soft.store(affinity.soft.0, Ordering::SeqCst);
        self.interrupt_vcpu(vcpu);
        let home = CpuId(vcpu.cpu.load(Ordering::SeqCst));
        if affinity.allows(home) {
            return Ok(());
        }
        {
            // If it has moved meanwhile, it was placed by the new affinity, or is put off by it where it runs.
            let mut queue = self.cpu(home).run_queue.lock();
            if vcpu.cpu.load(Ordering::SeqCst) != home.0 || !vcpu.sched.queued.load(Ordering::Relaxed) {
                return Ok(());
            }
            queue.remove(vcpu);
            self.cpu(home).view.waits(&queue);
        }
        self.wake(vcpu);
        Ok(())
    }

    /// Sets the share of a domain against others. What its vCPUs have run so far counts as before.
    pub fn set_weight(&self, domain: &Domain, weight: u32) {
        for vcpu in &domain.vcpus {
            vcpu.sched.weight.store(weight, Ordering::Relaxed);
        }
        // Those that run take it at their CPUs' next choice, the others when they are put on.
        self.stop_domain(domain);
    }

    /// Sets what a domain may use at most, in percent of one CPU; 0 lifts its cap.
    pub fn set_cap(&self, domain: &Arc<Domain>, percent: u32) {
        domain.cap.set(percent, self.platform.now_ns());
        if let Some(keeper) = VcpuRef::new(domain, VcpuId::new(0)) {
            self.arm_timers(&keeper);
        }
        // Those that run get an end of their slice, those that waited for the cap before run.
        self.stop_domain(domain);
        self.wake_domain(domain);
    }

    /// Charges running time to the cap of a vCPU's domain. One that has used it up waits: its first vCPU's timer ends that.
    fn charge_cap(&self, vcpu: &VcpuRef, ran_ns: u64, now: u64) {
        let domain = vcpu.domain();
        if domain.cap.charge(ran_ns, now)
            && let Some(keeper) = VcpuRef::new(domain, VcpuId::new(0))
        {
            self.arm_timers(&keeper);
        }
    }

    /// Lets a domain go on whose wait for its cap is over at `now`.
    pub fn end_cap_wait(&self, domain: &Arc<Domain>, now: u64) {
        if domain.cap.end_wait(now) {
            self.wake_domain(domain);
        }
    }

    /// Every CPU that is up.
    pub fn online(&self) -> CpuSet {
        CpuSet::first(self.cpus.len() as u32)
    }

    /// Whether the vCPU that runs on this CPU goes on although one at the standing `waiting` has come: then its slice has an end from now
    /// on. Otherwise the CPU has to choose anew.
    fn goes_on(&self, me: CpuId, shared: &CpuShared, waiting: u64, now: u64) -> bool {
        let Some((running, ran)) = shared.view.competitor(now) else { return false };
        let end = match self.policy.preempts(waiting, running, ran) {
            Preempt::Now => return false,
            Preempt::In(ns) => now.saturating_add(ns),
            Preempt::No => shared.contended_end_ns.load(Ordering::Relaxed),
        };
        let before = shared.slice_end_ns.load(Ordering::Relaxed);
        if end != 0 && (before == 0 || end < before) {
            self.end_slice_at(me, shared, end);
        }
        true
    }

    /// Queues a vCPU that slept; returns its standing there.
    fn join(&self, shared: &CpuShared, queue: &mut RunQueue, vcpu: VcpuRef, now: u64) -> u64 {
        let it: &Vcpu = &vcpu;
        let clock = &it.sched.virtual_ns;
        let queue_now = self.contest(shared, now);
        let at = self.policy.join(clock.load(Ordering::Relaxed), queue_now, Arrival::Woken);
        clock.store(at, Ordering::Relaxed);
        let standing = self.standing(vcpu.domain(), it, 0, now);
        queue.push(standing, vcpu);
        shared.view.waits(queue);
        standing
    }

    /// What a vCPU of `domain` that has run for `ran` now, or waits, is compared by.
    fn standing(&self, domain: &Domain, vcpu: &Vcpu, ran: u64, now: u64) -> u64 {
        let at = vcpu.sched.virtual_ns.load(Ordering::Relaxed);
        self.policy.standing(at, domain.guarantee.holds(now), ran)
    }

    /// A domain has guaranteed time again: the first of its vCPUs that wait by their weight goes before others.
    fn end_guarantee_wait(&self, domain: &Arc<Domain>, now: u64) {
        if !domain.guarantee.take_due(now) {
            return;
        }
        for vcpu in &domain.vcpus {
            let Some(vcpu) = VcpuRef::new(domain, vcpu.id) else { continue };
            let home = CpuId(vcpu.cpu.load(Ordering::SeqCst));
            let mut queue = self.cpu(home).run_queue.lock();
            // One that moves meanwhile will be queued by what it has then.
            if vcpu.cpu.load(Ordering::SeqCst) == home.0 && queue.remove(&vcpu) {
                queue.push(self.standing(domain, &vcpu, 0, now), vcpu);
                self.cpu(home).view.waits(&queue);
                drop(queue);
                return self.request_reschedule(home);
            }
        }
    }

    /// What somebody who comes to a CPU competes with.
    fn contest(&self, shared: &CpuShared, now: u64) -> View {
        let here = shared.view.view(now);
        // Alone, it is all there are.
        if self.cpus.len() == 1 { here } else { here.among(self.views(now).map(|(_, view)| view)) }
    }

    /// What all CPUs show of themselves.
    fn views(&self, now: u64) -> impl Iterator<Item = (CpuId, View)> {
        (0..).map(CpuId).zip(self.cpus.iter().map(move |cpu| cpu.view.view(now)))
    }

    /// Wakes every vCPU of a domain that may run, after a pause ended.
    pub fn wake_domain(&self, domain: &Arc<Domain>) {
        for vcpu in &domain.vcpus {
            if let Some(vcpu) = VcpuRef::new(domain, vcpu.id) {
                self.wake(&vcpu);
            }
        }
    }

    /// Makes the vCPUs of a domain that may not run any more leave their CPUs at their next chance.
    pub fn stop_domain(&self, domain: &Domain) {
        for vcpu in &domain.vcpus {
            self.interrupt_vcpu(vcpu);
        }
    }

    /// Makes the CPU that runs a vCPU, if one does, look at it anew.
    ///
    /// The caller has changed something first that the CPU looks at; it is sequentially consistent, as `running` is: either the flag is
    /// seen here, or the CPU sees the change before it resumes the guest.
    pub fn interrupt_vcpu(&self, vcpu: &Vcpu) {
        if wakeup::runs(&vcpu.running) {
            self.request_reschedule(CpuId(vcpu.cpu.load(Ordering::SeqCst)));
        }
    }

    /// Ends the wait of a blocked or polling vCPU and queues it.
    pub fn unblock(&self, vcpu: &VcpuRef) {
        let it: &Vcpu = vcpu;
        let was = wakeup::end_sleep(&it.blocked, block::BLOCKED | block::POLLING);
        if was & block::POLLING != 0 {
            // Its entry in the timer queue stays: it will find nothing due.
            it.timers.poll_ns.store(0, Ordering::SeqCst);
        }
        if was != 0 {
            self.wake(vcpu);
        }
    }

    /// A deadline of a vCPU, just stored in its timers, is `at_ns` from now on; 0: there is none.
    pub fn deadline_is(&self, vcpu: &VcpuRef, at_ns: u64) {
        if !vcpu.timers.sees_to(at_ns) {
            self.arm_timers(vcpu);
        }
    }

    /// Brings a vCPU's place in a timer queue up to date after its timers changed.
    pub fn arm_timers(&self, vcpu: &VcpuRef) {
        let (home, changed) = self.queue_timers(vcpu);
        if changed {
            self.program_timer(home);
        }
    }

    /// Enters the earliest deadline of a vCPU in the queue of the CPU that it last ran on. Returns that CPU, and whether
    /// its first deadline changed.
    fn queue_timers(&self, vcpu: &VcpuRef) -> (CpuId, bool) {
        let to = CpuId(vcpu.cpu.load(Ordering::Relaxed));
        loop {
            let home = vcpu.timers.home();
            let mut timers = self.cpu(home).timers.lock();
            if vcpu.timers.home() != home {
                continue;
            }
            if home != to {
                // Under the lock of the queue that it leaves.
                timers.set(vcpu, || None);
                self.cpu(home).note_first_timer(&timers);
                vcpu.timers.set_home(to);
                continue;
            }
            let before = timers.first();
            timers.set(vcpu, || vcpu.earliest_deadline(vcpu.domain()));
            self.cpu(home).note_first_timer(&timers);
            return (home, timers.first() != before);
        }
    }

    /// Sets the hardware timer to the nearest of the guests' timers and the end of the slice.
    ///
    /// One that fires earlier than it has to is left as it is: most of what it is set for is over before that (slices that end by
    /// themselves), and when it fires it is set to what is due next.
    fn program_timer(&self, cpu: CpuId) {
        if cpu != self.platform.this_cpu() {
            self.cpu(cpu).timer_due.store(true, Ordering::Release);
            self.kick(cpu);
            return;
        }
        self.program_own_timer(cpu, self.cpu(cpu));
    }

    /// The slice of what runs here ends at `end_ns`; 0: it does not. All else that the hardware timer is for has set it already, but for the
    /// watchdog of several CPUs ([`Hypervisor::look_around`]).
    fn end_slice_at(&self, me: CpuId, shared: &CpuShared, end_ns: u64) {
        shared.slice_end_ns.store(end_ns, Ordering::Relaxed);
        let armed = shared.armed_ns.load(Ordering::Relaxed);
        if armed == 0 || end_ns != 0 && end_ns < armed || self.cpus.len() > 1 {
            self.program_own_timer(me, shared);
        }
    }

    fn program_own_timer(&self, cpu: CpuId, shared: &CpuShared) {
        let at = |ns: &AtomicU64| match ns.load(Ordering::Acquire) {
            0 => NEVER,
            at => at,
        };
        let due = at(&shared.first_timer_ns).min(at(&shared.slice_end_ns));
        let due = due.min(self.watchdog.wake_ns(cpu).unwrap_or(NEVER));
        let armed = shared.armed_ns.load(Ordering::Relaxed);
        if armed == 0 || due < armed {
            shared.armed_ns.store(due, Ordering::Relaxed);
            self.platform.set_timer(Some(due).filter(|due| *due != NEVER));
        }
    }

    /// The timer interrupt of this CPU.
    pub fn on_timer(&self) {
        let shared = self.cpu(self.platform.this_cpu());
        shared.timer_interrupts.add(1);
        shared.armed_ns.store(0, Ordering::Relaxed);
        shared.timer_due.store(true, Ordering::Release);
    }

    /// Fires what is due, and sets the hardware timer to what comes next.
    fn run_timers(&self, cpu: CpuId) {
        let shared = self.cpu(cpu);
        let now = self.platform.now_ns();
        self.look_around(cpu, now);
        let pop_due = || {
            let mut timers = shared.timers.lock();
            let vcpu = timers.pop_due(now);
            shared.note_first_timer(&timers);
            vcpu
        };
        while let Some(vcpu) = pop_due() {
            self.fire_timers(&vcpu, now);
            let (home, changed) = self.queue_timers(&vcpu);
            if changed && home != cpu {
                self.program_timer(home);
            }
        }
        let slice_end = shared.slice_end_ns.load(Ordering::Relaxed);
        if slice_end != 0 && slice_end <= now {
            shared.reschedule.store(true, Ordering::Release);
            self.call_for_help(cpu, now);
        }
        self.program_timer(cpu);
    }

    fn fire_timers(&self, vcpu: &VcpuRef, now: u64) {
        let timers = &vcpu.timers;
        let due = |at: u64| at != 0 && at <= now;
        let mut tick = take_due(&timers.single_ns, now);
        tick |= timers.has_period() && timers.periodic.lock().take(now);
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
        if vcpu.id.get() == 0 {
            self.end_cap_wait(vcpu.domain(), now);
            self.end_guarantee_wait(vcpu.domain(), now);
        }
        if take_due(&timers.poll_ns, now) {
            self.unblock(vcpu);
        }
    }

    /// Everything between the end of an entry's work and the return to a guest: timers, quarantined frames, the choice of
    /// whom to run (idling when there is nobody), and events to deliver. Afterwards `cpu.current` is what to resume.
    #[inline(always)]
    pub fn prepare_resume(&self, cpu: &mut Cpu) {
        let shared = self.cpu(cpu.id);
        if let Some(what) = cpu.entry.take() {
            let ticks = self.platform.tsc().wrapping_sub(shared.entered.load(Ordering::Relaxed));
            if ticks > shared.longest_ticks.load(Ordering::Relaxed) {
                shared.longest_ticks.store(ticks, Ordering::Relaxed);
                shared.longest_what.store(what, Ordering::Relaxed);
            }
        }
        // Most entries leave nothing to do. What others ask of this CPU from here on brings an interrupt.
        let asked = shared.timer_due.load(Ordering::Acquire) || shared.reschedule.load(Ordering::Acquire);
        let goes_on = |current: &Current| current.may_run() && !self.has_pending(current);
        if asked || self.mm.has_quarantined() || !cpu.current.as_ref().is_some_and(goes_on) {
            return self.work_before_resume(cpu);
        }
        sync::none_held();
        shared.entered.store(0, Ordering::Relaxed);
    }

    #[inline(never)]
    fn work_before_resume(&self, cpu: &mut Cpu) {
        let shared = self.cpu(cpu.id);
        loop {
            if take_flag(&shared.timer_due) {
                self.run_timers(cpu.id);
            }
            self.drain_quarantine();
            let gone = cpu.current.as_ref().is_none_or(|current| !current.may_run());
            if take_flag(&shared.reschedule) || gone {
                self.switch(cpu);
            }
            let Some(current) = cpu.current.as_mut() else {
                if !shared.reschedule.load(Ordering::Acquire) && !shared.timer_due.load(Ordering::Acquire) {
                    sync::none_held();
                    // Whatever wakes it notes that it has entered ring 0 again.
                    shared.entered.store(0, Ordering::Relaxed);
                    if !self.mm.scrub_idly(&self.platform) || self.platform.interrupt_pending() {
                        self.platform.wait_for_interrupt();
                    }
                }
                continue;
            };
            // Delivery writes to the guest's stack and may find that the domain must be crashed: then choose again. What others do to the vCPU
            // meanwhile brings an interrupt.
            let may_run = !self.deliver_pending(current) || current.may_run();
            if may_run
                && !shared.reschedule.load(Ordering::Acquire)
                && !shared.timer_due.load(Ordering::Acquire)
            {
                sync::none_held();
                shared.entered.store(0, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Gives the CPU to the vCPU that the policy wants; keeps the present one if that is it.
    ///
    /// The order matters to other CPUs: the old vCPU's registers are saved, then another root is loaded, and only then is its
    /// state parked where others find it. So nobody can give back the tables of a vCPU that a CPU still has in force.
    fn switch(&self, cpu: &mut Cpu) {
        let now = self.platform.now_ns();
        let me = cpu.id;
        let shared = self.cpu(me);
        self.look_around(me, now);
        let mut stays = None;
        if let Some(current) = &cpu.current {
            let (domain, it): (&Domain, &Vcpu) = (current.domain(), &current.vcpu);
            let sched = &it.sched;
            // Nobody else writes it: a plain store does.
            let ran = now.saturating_sub(sched.since_ns.load(Ordering::Relaxed));
            sched.since_ns.store(now, Ordering::Relaxed);
            sched.charge(domain.guarantee.draw(ran, now));
            self.charge_cap(&current.vcpu, ran, now);
            if may_stay(me, domain, it) {
                let ran = now.saturating_sub(sched.put_on_ns.load(Ordering::Relaxed));
                let yields = sched.yields.swap(false, Ordering::Relaxed);
                stays = Some(Running { standing: self.standing(domain, it, ran, now), ran, yields });
            }
        }
        if stays.is_none() {
            // Whoever comes does not compete with the one that leaves.
            shared.view.runs(None, now);
        }
        let mut next = match self.choose(me, shared, stays, now) {
            Choice::Stay(slice_ns) => {
                if let Some(current) = &cpu.current {
                    let it: &Vcpu = &current.vcpu;
                    let standing = self.standing(current.domain(), it, 0, now);
                    shared.view.runs(Some((&it.sched, standing)), now);
                }
                return self.start_slice(cpu, shared, slice_ns, now);
            }
            Choice::Other(next) => next,
        };
        let old = cpu.current.take().map(|current| self.leave(current, now));
        let mut idles = old.is_none();
        loop {
            let Some(vcpu) = next else {
                self.go_idle(me, now);
                idles = true;
                // Whoever placed a vCPU before that has not seen that this CPU has time.
                next = self.policy.help(self.views(now), me, None).and_then(|c| self.fetch_vcpu(me, c, now));
                if next.is_none() {
                    break;
                }
                continue;
            };
            if self.put_on(cpu, shared, vcpu, idles, now) {
                break;
            }
            next = match self.choose(me, shared, None, now) {
                Choice::Other(next) => next,
                Choice::Stay(_) => None,
            };
        }
        if let Some(old) = old {
            self.park(me, shared, old, stays.is_some(), now);
        }
        if cpu.current.is_some() {
            self.start_slice(cpu, shared, None, now);
        }
    }

    /// Whom this CPU runs next: the one that runs now (`stays`, if it may), the first of its queue, or one that waits for
    /// another CPU. What is taken from a queue is marked as running here.
    fn choose(&self, me: CpuId, shared: &CpuShared, stays: Option<Running>, now: u64) -> Choice {
        let mut queue = shared.run_queue.lock();
        if self.cpus.len() > 1 {
            let own = queue.first_runnable();
            let nearest = own.into_iter().chain(stays.map(|running| running.standing)).min();
            if let Some(other) = self.policy.help(self.views(now), me, nearest) {
                shared.view.waits(&queue);
                drop(queue);
                if let Some(vcpu) = self.fetch_vcpu(me, other, now) {
                    return Choice::Other(Some(vcpu));
                }
                queue = shared.run_queue.lock();
            }
        }
        let preempt = match stays {
            None => Preempt::Now,
            Some(running) => match queue.first_runnable() {
                None => Preempt::No,
                Some(_) if running.yields => Preempt::Now,
                Some(first) => self.policy.preempts(first, running.standing, running.ran),
            },
        };
        let choice = match preempt {
            Preempt::No => Choice::Stay(None),
            Preempt::In(ns) => Choice::Stay(Some(ns)),
            Preempt::Now => match queue.pop_and_mark() {
                // Whoever waited may not run any more.
                None if stays.is_some() => Choice::Stay(None),
                next => Choice::Other(next),
            },
        };
        shared.view.waits(&queue);
        choice
    }

    /// Takes a vCPU from another CPU's queue.
    fn fetch_vcpu(&self, me: CpuId, from: CpuId, now: u64) -> Option<VcpuRef> {
        let mut queue = self.cpu(from).run_queue.lock();
        let vcpu = queue.hand_over(me);
        self.cpu(from).view.waits(&queue);
        drop(queue);
        if let Some(vcpu) = &vcpu {
            let at = vcpu.sched.virtual_ns.load(Ordering::Relaxed);
            let at = self.policy.join(at, self.contest(self.cpu(me), now), Arrival::Moved);
            vcpu.sched.virtual_ns.store(at, Ordering::Relaxed);
        }
        vcpu
    }

    /// Tells a CPU that has less urgent work, if there is one, that somebody waits here.
    fn call_for_help(&self, me: CpuId, now: u64) {
        if self.cpus.len() == 1 {
            return;
        }
        let (first, affinity) = {
            let queue = self.cpu(me).run_queue.lock();
            let (Some(first), Some(affinity)) = (queue.first(), queue.first_affinity()) else { return };
            (first, affinity)
        };
        if let Some(cpu) = self.policy.call_for_help(self.views(now), me, first, affinity) {
            self.request_reschedule(cpu);
        }
    }

    /// Nobody may run here: no guest's tables are in force afterwards, and no timer ends a slice.
    fn go_idle(&self, me: CpuId, now: u64) {
        let shared = self.cpu(me);
        shared.slice_end_ns.store(0, Ordering::Relaxed);
        self.watchdog.idles(me, now);
        self.program_own_timer(me, shared);
        self.mm.clock().enter(me, None, || self.platform.load_idle_root());
        shared.view.runs(None, now);
        shared.runstate.lock().change(RunStateKind::Blocked, now);
    }

    /// Saves what the CPU holds of a vCPU, whose tables stay in force for the moment.
    fn leave(&self, current: Current, now: u64) -> Current {
        let Current { vcpu, mut state } = current;
        self.platform.leave_vcpu(&mut state);
        let it: &Vcpu = &vcpu;
        let domain: &Domain = vcpu.domain();
        let kind = match it.blocked.load(Ordering::Acquire) {
            0 if it.runnable() && domain.is_on() => RunStateKind::Runnable,
            b if b & (block::BLOCKED | block::POLLING) != 0 && domain.is_on() => RunStateKind::Blocked,
            _ => RunStateKind::Offline,
        };
        it.runstate.lock().change(kind, now);
        if it.timers.has_period() && it.timers.periodic.lock().set_ticking(false) {
            self.arm_timers(&vcpu);
        }
        self.publish_areas(domain, it, &mut state);
        Current { vcpu, state }
    }

    /// Parks a vCPU whose tables are not in force here any more, and queues it again if it may run.
    fn park(&self, me: CpuId, shared: &CpuShared, old: Current, stays: bool, now: u64) {
        let Current { vcpu, state } = old;
        let it: &Vcpu = &vcpu;
        *it.parked.lock() = Some(state);
        let mut queue = shared.run_queue.lock();
        // Asked again under the lock: a wake-up that came while it still counted as running did nothing.
        if !wakeup::stop_running(&it.running, || it.runnable() && vcpu.domain().may_run()) {
            return;
        }
        if !it.sched.affinity().allows(me) {
            drop(queue);
            return self.wake(&vcpu);
        }
        if stays {
            let by_weight = !vcpu.domain().guarantee.holds(now);
            let domain = vcpu.domain().clone();
            queue.push(self.standing(&domain, it, 0, now), vcpu);
            shared.view.waits(&queue);
            drop(queue);
            if by_weight
                && domain.guarantee.waits(now)
                && let Some(keeper) = VcpuRef::new(&domain, VcpuId::new(0))
            {
                self.arm_timers(&keeper);
            }
            return self.call_for_help(me, now);
        }
        // It woke after the choice was made.
        self.join(shared, &mut queue, vcpu, now);
        shared.reschedule.store(true, Ordering::Release);
    }

    /// Puts a vCPU, marked as running here, on this CPU, which ran another before or `idles`. False if it cannot run after all.
    fn put_on(&self, cpu: &mut Cpu, shared: &CpuShared, vcpu: VcpuRef, idles: bool, now: u64) -> bool {
        let (domain, it): (&Domain, &Vcpu) = (vcpu.domain(), &vcpu);
        let parked = it.parked.lock().take();
        let Some(mut state) = parked else {
            // A vCPU without a context cannot be runnable; be safe and leave it off.
            it.blocked.fetch_or(block::DOWN, Ordering::AcqRel);
            it.running.store(false, Ordering::SeqCst);
            return false;
        };
        let Some(root) = state.current_root() else {
            *it.parked.lock() = Some(state);
            it.running.store(false, Ordering::SeqCst);
            self.crash_domain(vcpu.domain(), "no page tables for the mode it runs in");
            return false;
        };
        self.watchdog.works(cpu.id);
        it.sched.since_ns.store(now, Ordering::Relaxed);
        it.sched.put_on_ns.store(now, Ordering::Relaxed);
        it.sched.take_weight();
        it.counts.switches.add(1);
        shared.switches.add(1);
        if idles {
            shared.runstate.lock().change(RunStateKind::Running, now);
        }
        shared.view.runs(Some((&it.sched, self.standing(domain, it, 0, now))), now);
        it.runstate.lock().change(RunStateKind::Running, now);
        self.mm.clock().enter(cpu.id, Some(domain.id), || self.platform.load_root(root));
        let wanted = state.selectors;
        if self.platform.enter_vcpu(&mut state).is_err() {
            state.failsafe_due = Some(wanted);
        }
        let last = it.sched.last_cpu.swap(cpu.id.0, Ordering::Relaxed);
        if last != cpu.id.0 {
            it.counts.moves.add(u64::from(last != NO_CPU));
            // This CPU's counter may be ahead of the other one's.
            self.update_vcpu_time(it);
            it.time_due.store(true, Ordering::Relaxed);
        }
        self.publish_areas(domain, it, &mut state);
        if it.timers.has_period() {
            self.start_ticks(&vcpu, now);
        }
        cpu.current = Some(Current { vcpu, state });
        true
    }

    /// Lets the periodic timer of a vCPU tick, now that it runs or has another period.
    pub fn start_ticks(&self, vcpu: &VcpuRef, now: u64) {
        let (ticks, due) = {
            let mut periodic = vcpu.timers.periodic.lock();
            (periodic.set_ticking(true), periodic.take(now))
        };
        if due {
            self.raise_virq(vcpu, Virq::TIMER);
        }
        if ticks {
            self.arm_timers(vcpu);
        }
    }

    /// A slice ends only if somebody waits or the domain has a cap: a vCPU alone is not disturbed. `slice_ns` is how long this one
    /// may be, if not as long as the policy's.
    fn start_slice(&self, cpu: &Cpu, shared: &CpuShared, slice_ns: Option<u64>, now: u64) {
        let share = cpu.current.as_ref().and_then(|current| {
            let running =
                || current.domain().vcpus.iter().filter(|v| v.running.load(Ordering::Relaxed)).count();
            let cap = &current.domain().cap;
            if cap.percent() == 0 { None } else { cap.share(running(), now) }
        });
        let guaranteed = cpu.current.as_ref().and_then(|current| current.domain().guarantee.left(now));
        let slice = slice_ns.or(self.policy.slice_ns());
        let slice = slice.map(|slice| guaranteed.map_or(slice, |left| slice.min(left)));
        let end = |ns: Option<u64>| ns.map_or(0, |ns| now.saturating_add(ns));
        let end_by_slice = slice.filter(|_| shared.view.has_waiting());
        shared.contended_end_ns.store(end(slice), Ordering::Relaxed);
        self.end_slice_at(cpu.id, shared, end(end_by_slice.into_iter().chain(share).min()));
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
        let home = self.platform.this_cpu();
        let first = self.cpu(home).run_queue.lock().first();
        if let Some(first) = first {
            current.vcpu.sched.virtual_ns.fetch_max(first + 1, Ordering::Relaxed);
            current.vcpu.sched.yields.store(true, Ordering::Relaxed);
            self.request_reschedule(home);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::{SHORTEST_RUN_NS, SLICE_NS};
    use super::*;
    use crate::access::Rights;
    use crate::evtchn::tests::add_domain;
    use crate::hypercall::tests::World;
    use crate::platform::sim::SimMachine;

    const MS: u64 = 1_000_000;

    fn dom0_vcpu(hv: &Hypervisor<SimMachine>) -> VcpuRef {
        VcpuRef::new(&hv.domains.get(hypercall_abi::DomId::ZERO).unwrap(), VcpuId::new(0)).unwrap()
    }

    fn dom0(world: &World) -> Arc<Domain> {
        world.hv.domains.get(hypercall_abi::DomId::ZERO).unwrap()
    }

    fn kind(domain: &Domain) -> RunStateKind {
        domain.vcpus[0].runstate.lock().state
    }

    /// Lets time pass until the CPU's timer, for `most_ns` at most, and lets the CPU look at its work; returns how long dom0 ran.
    fn step(world: &mut World, most_ns: u64) -> u64 {
        let World { hv, cpu, .. } = world;
        let (now, runs) = (hv.platform.now_ns(), cpu.current.is_some());
        let due = hv.platform.timer().filter(|at| *at <= now + most_ns);
        let passes = due.map_or(most_ns, |at| at.saturating_sub(now));
        hv.platform.advance(passes);
        if due.is_some() {
            hv.on_timer();
            hv.run_timers(CpuId(0));
        }
        hv.switch(cpu);
        if runs { passes } else { 0 }
    }

    #[test]
    fn a_capped_vcpu_is_put_off_and_comes_back() {
        for percent in [5, 20, 75] {
            let mut world = World::new(u32::MAX);
            let domain = dom0(&world);
            world.hv.set_cap(&domain, percent);
            let (start, mut ran, mut waits) = (world.hv.platform.now_ns(), 0, 0);
            while world.hv.platform.now_ns() < start + 5_000 * MS {
                ran += step(&mut world, MS);
                let runs = world.cpu.current.is_some();
                assert_eq!(domain.cap.waits(), !runs, "it runs unless it waits");
                waits += u32::from(!runs);
                // The time is stolen: it wants to run.
                assert_eq!(kind(&domain) == RunStateKind::Running, runs);
                assert!(runs || kind(&domain) == RunStateKind::Runnable);
                assert!(runs || world.hv.platform.timer().is_some(), "nobody ends the wait");
            }
            let due = (world.hv.platform.now_ns() - start) * u64::from(percent) / 100;
            assert!(waits > 10 && ran.abs_diff(due) * 50 <= due, "{percent} %: {ran} of {due} ns");
        }
    }

    /// Lets dom0 run until it waits for its cap.
    fn until_it_waits(world: &mut World) -> Arc<Domain> {
        let domain = dom0(world);
        world.hv.set_cap(&domain, 10);
        while world.cpu.current.is_some() {
            step(world, MS);
        }
        domain
    }

    #[test]
    fn who_waits_for_a_cap_that_is_lifted_runs_at_once() {
        let mut world = World::new(u32::MAX);
        let domain = until_it_waits(&mut world);
        world.hv.set_cap(&domain, 0);
        step(&mut world, 0);
        assert!(world.cpu.current.is_some() && !domain.cap.waits());
    }

    #[test]
    fn the_end_of_a_wait_wakes_nobody_who_sleeps_or_is_paused() {
        for paused in [false, true] {
            let mut world = World::new(u32::MAX);
            let domain = until_it_waits(&mut world);
            let vcpu = VcpuRef::new(&domain, VcpuId::new(0)).unwrap();
            if paused {
                world.hv.pause_domain(&domain).unwrap();
            } else {
                vcpu.blocked.fetch_or(block::BLOCKED, Ordering::SeqCst);
            }
            for _ in 0..1_000 {
                step(&mut world, MS);
            }
            assert!(!domain.cap.waits() && world.cpu.current.is_none(), "paused: {paused}");
            if paused {
                world.hv.unpause_domain(&domain).unwrap();
            } else {
                world.hv.unblock(&vcpu);
            }
            step(&mut world, 0);
            assert!(world.cpu.current.is_some(), "paused: {paused}");
        }
    }

    #[test]
    fn who_wakes_while_its_domain_waits_for_the_cap_waits_too() {
        let mut world = World::new(u32::MAX);
        let domain = until_it_waits(&mut world);
        let vcpu = VcpuRef::new(&domain, VcpuId::new(0)).unwrap();
        vcpu.blocked.fetch_or(block::BLOCKED, Ordering::SeqCst);
        world.hv.unblock(&vcpu);
        step(&mut world, 0);
        assert!(world.cpu.current.is_none() && kind(&domain) == RunStateKind::Runnable);
        let until = domain.cap.waits_until_ns().unwrap();
        while world.hv.platform.now_ns() < until {
            assert!(world.cpu.current.is_none(), "before its time");
            step(&mut world, until);
        }
        assert!(world.cpu.current.is_some() && world.hv.platform.now_ns() == until);
    }

    /// A vCPU of another domain, asleep.
    fn sleeper(world: &World) -> VcpuRef {
        let domain = add_domain(&world.hv, 5, 1, Rights::none());
        domain.pauses.store(0, Ordering::SeqCst);
        domain.vcpus[0].blocked.store(block::BLOCKED, Ordering::SeqCst);
        VcpuRef::new(&domain, VcpuId::new(0)).unwrap()
    }

    #[test]
    fn who_wakes_and_does_not_preempt_only_ends_the_slice() {
        let mut world = World::new(u32::MAX);
        let sleeper = sleeper(&world);
        // As far ahead as what runs, and further than a woken one is moved back.
        step(&mut world, SHORTEST_RUN_NS);
        sleeper.sched.virtual_ns.store(50 * MS, Ordering::Relaxed);
        let World { hv, cpu, .. } = &mut world;
        hv.switch(cpu);
        let (shared, now) = (hv.cpu(CpuId(0)), hv.platform.now_ns());
        assert_eq!(shared.slice_end_ns.load(Ordering::Relaxed), 0, "nobody waits");
        hv.unblock(&sleeper);
        assert!(!shared.reschedule.load(Ordering::Relaxed) && shared.view.has_waiting());
        let end = shared.slice_end_ns.load(Ordering::Relaxed);
        assert_eq!(end, now + SLICE_NS);
        assert!(hv.platform.timer().is_some_and(|at| at <= end), "somebody ends it");
        while hv.platform.now_ns() < end {
            assert!(!shared.reschedule.load(Ordering::Relaxed), "before its time");
            let due = hv.platform.timer().unwrap();
            hv.platform.advance(due - hv.platform.now_ns());
            hv.on_timer();
            hv.run_timers(CpuId(0));
        }
        assert!(shared.reschedule.load(Ordering::Relaxed));
    }

    #[test]
    fn who_wakes_and_preempts_waits_for_the_shortest_run() {
        let mut world = World::new(u32::MAX);
        let sleeper = sleeper(&world);
        step(&mut world, 100 * MS);
        let World { hv, cpu, .. } = &mut world;
        // Put on again a moment ago.
        dom0_vcpu(hv).sched.put_on_ns.store(hv.platform.now_ns(), Ordering::Relaxed);
        hv.switch(cpu);
        hv.platform.advance(SHORTEST_RUN_NS / 4);
        let shared = hv.cpu(CpuId(0));
        hv.unblock(&sleeper);
        assert!(!shared.reschedule.load(Ordering::Relaxed));
        let left = shared.slice_end_ns.load(Ordering::Relaxed) - hv.platform.now_ns();
        assert_eq!(left, SHORTEST_RUN_NS - SHORTEST_RUN_NS / 4);
    }

    #[test]
    fn what_ran_for_long_is_charged_before_anybody_is_compared_with_it() {
        let mut world = World::new(u32::MAX);
        let sleeper = sleeper(&world);
        let World { hv, cpu, .. } = &mut world;
        hv.switch(cpu);
        hv.platform.advance(SHORTEST_RUN_NS);
        hv.unblock(&sleeper);
        assert!(hv.cpu(CpuId(0)).reschedule.load(Ordering::Relaxed));
    }

    #[test]
    fn a_timer_that_fires_early_enough_is_left_and_then_set_to_what_is_due() {
        let world = World::new(u32::MAX);
        let (hv, vcpu) = (&world.hv, dom0_vcpu(&world.hv));
        let set = |ns: u64| {
            vcpu.timers.single_ns.store(ns, Ordering::Relaxed);
            hv.arm_timers(&vcpu);
        };
        // The ticks that a vCPU is born with end, and with them the timer.
        vcpu.timers.periodic.lock().set_period(0);
        hv.on_timer();
        set(0);
        let begin = hv.platform.now_ns();
        set(begin + 10 * MS);
        assert_eq!(hv.platform.timer(), Some(begin + 10 * MS));
        set(begin + 30 * MS);
        assert_eq!(hv.platform.timer(), Some(begin + 10 * MS), "it is left as it is");
        set(begin + 5 * MS);
        assert_eq!(hv.platform.timer(), Some(begin + 5 * MS), "what is due before is not");
        set(begin + 20 * MS);
        hv.platform.advance(5 * MS);
        hv.on_timer();
        hv.run_timers(CpuId(0));
        assert_eq!(hv.platform.timer(), Some(begin + 20 * MS), "it has fired for nothing");
        assert!(vcpu.timers.single_ns.load(Ordering::Relaxed) != 0);
        hv.platform.advance(15 * MS);
        hv.on_timer();
        hv.run_timers(CpuId(0));
        assert_eq!(vcpu.timers.single_ns.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_time_record_is_written_where_the_vcpu_comes_to_another_cpu() {
        let mut world = World::new(u32::MAX);
        let World { hv, cpu, .. } = &mut world;
        let vcpu = dom0_vcpu(hv);
        let version = |vcpu: &Vcpu| vcpu.info_word(&hv.platform, 4).unwrap().load(Ordering::Relaxed) as u32;
        let mut back = |hv: &crate::hypervisor::Hypervisor<_>| {
            vcpu.blocked.store(block::BLOCKED, Ordering::SeqCst);
            hv.switch(cpu);
            assert!(cpu.current.is_none());
            hv.unblock(&vcpu);
            hv.switch(cpu);
            assert!(cpu.current.is_some());
        };
        let first = version(&vcpu);
        assert!(first != 0 && first.is_multiple_of(2), "written when it was put on first");
        back(hv);
        assert_eq!(version(&vcpu), first);
        // As after another CPU, and as after a new place for it that was chosen from another CPU.
        for last in [1, NO_CPU] {
            let before = version(&vcpu);
            vcpu.sched.last_cpu.store(last, Ordering::Relaxed);
            back(hv);
            assert_eq!(version(&vcpu), before + 2);
        }
        assert_eq!(vcpu.counts.moves.get(), 1, "the first place is no move");
    }
}

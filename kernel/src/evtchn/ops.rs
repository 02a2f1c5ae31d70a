//! The operations on ports, and delivery.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::{DomId, Port, VcpuId, Virq};

use super::two_level::{self, PortWords, Raised, VcpuWords};
use super::{Entry, Error, PortState, PortTable, is_global};
use crate::domain::{Domain, Life, VcpuRef, block};
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::{CpuId, Platform};
use crate::sync::{RankedGuard, rank};

/// First word of the pending bitmap in shared_info: behind 32 vcpu_info structures of 64 bytes (public/xen.h).
const PENDING_WORD: usize = 32 * 64 / 8;
/// First word of the mask bitmap: behind 64 words of pending bits.
const MASK_WORD: usize = PENDING_WORD + 64;
/// Word of vcpu_info that begins with `evtchn_upcall_pending`.
const UPCALL_WORD: usize = 0;
/// Word of vcpu_info that is `evtchn_pending_sel`.
const SELECTOR_WORD: usize = 1;

/// How far a preemptible operation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// To its end.
    Done,
    /// To where its budget ended: call again.
    Preempted,
}

/// Two port tables locked together, in the order of the domains' numbers.
enum Pair<'a> {
    InOrder(
        RankedGuard<'a, PortTable, { rank::EVENTS }>,
        RankedGuard<'a, PortTable, { rank::EVENTS_SECOND }>,
    ),
    Swapped(
        RankedGuard<'a, PortTable, { rank::EVENTS }>,
        RankedGuard<'a, PortTable, { rank::EVENTS_SECOND }>,
    ),
    Same(RankedGuard<'a, PortTable, { rank::EVENTS }>),
}

impl<'a> Pair<'a> {
    fn lock(local: &'a Domain, remote: &'a Domain) -> Pair<'a> {
        match local.id.cmp(&remote.id) {
            core::cmp::Ordering::Less => {
                let first = local.events.lock();
                Pair::InOrder(first, remote.events.lock_second())
            }
            core::cmp::Ordering::Greater => {
                let first = remote.events.lock();
                Pair::Swapped(first, local.events.lock_second())
            }
            core::cmp::Ordering::Equal => Pair::Same(local.events.lock()),
        }
    }

    fn local(&mut self) -> &mut PortTable {
        match self {
            Pair::InOrder(table, _) | Pair::Same(table) => table,
            Pair::Swapped(_, table) => table,
        }
    }

    fn remote(&mut self) -> &mut PortTable {
        match self {
            Pair::InOrder(_, table) => table,
            Pair::Swapped(table, _) | Pair::Same(table) => table,
        }
    }
}

impl<P: Platform> Hypervisor<P> {
    // ── delivery ──

    fn port_words(&self, domain: &Domain, port: Port) -> Option<PortWords<'_, AtomicU64>> {
        let words = self.platform.frame(domain.shared_info);
        let index = (port.get() / 64) as usize;
        if index >= 64 {
            return None;
        }
        Some(PortWords {
            pending: words.get(PENDING_WORD + index)?,
            mask: words.get(MASK_WORD + index)?,
            bit: 1 << (port.get() % 64),
            selector_bit: 1 << index,
        })
    }

    fn vcpu_words(&self, vcpu: &VcpuRef) -> Option<VcpuWords<'_, AtomicU64>> {
        Some(VcpuWords {
            selector: vcpu.info_word(&self.platform, SELECTOR_WORD)?,
            upcall: vcpu.info_word(&self.platform, UPCALL_WORD)?,
        })
    }

    /// Makes a port pending and tells the vCPU, and whoever polls it. The caller holds the lock of the domain's port table.
    pub(super) fn deliver(&self, domain: &Arc<Domain>, port: Port, vcpu: VcpuId) {
        let (Some(words), Some(vcpu)) = (self.port_words(domain, port), VcpuRef::new(domain, vcpu)) else {
            return;
        };
        match two_level::raise(words, self.vcpu_words(&vcpu)) {
            Raised::WasPending => return,
            Raised::Quiet => {}
            Raised::Notify => self.notify(&vcpu),
        }
        self.wake_pollers(domain, port);
    }

    /// Wakes a vCPU that has an upcall to take, or makes the CPU that runs it look.
    fn notify(&self, vcpu: &VcpuRef) {
        self.unblock(vcpu);
        let cpu = CpuId(vcpu.cpu.load(Ordering::Relaxed));
        if vcpu.running.load(Ordering::SeqCst) && cpu != self.platform.this_cpu() {
            self.platform.kick(cpu);
        }
    }

    /// Wakes the vCPUs that poll `port`, or several ports. A poller sets its flag before it reads the pending bits, and this
    /// reads the flag after the bit was set (`two_level`).
    fn wake_pollers(&self, domain: &Arc<Domain>, port: Port) {
        for vcpu in &domain.vcpus {
            if vcpu.blocked.load(Ordering::SeqCst) & block::POLLING == 0 {
                continue;
            }
            let polled = vcpu.polled_port.load(Ordering::SeqCst);
            if (polled == 0 || polled == port.get())
                && let Some(vcpu) = VcpuRef::new(domain, vcpu.id)
            {
                self.unblock(&vcpu);
            }
        }
    }

    /// Raises a virtual interrupt at the port bound to it, if there is one. A global one goes to the domain's port, whichever
    /// vCPU is named. The caller holds no lock of rank `EVENTS` or above.
    pub fn raise_virq(&self, vcpu: &VcpuRef, virq: Virq) {
        let domain = vcpu.domain();
        let bound = if is_global(virq) { domain.vcpus.first() } else { Some(&**vcpu) };
        let Some(slot) = bound.and_then(|v| v.virq_port.get(virq.get() as usize)) else { return };
        if slot.load(Ordering::Acquire) == 0 {
            return;
        }
        let table = domain.events.lock();
        let port = Port::new(slot.load(Ordering::Acquire));
        if let Ok(entry) = table.get(&self.platform, port)
            && entry.state == (PortState::Virq { virq })
        {
            self.deliver(domain, port, entry.vcpu);
        }
    }

    /// Sends an event through a port: to the peer, or to the vCPU that the port signals. A port whose peer is gone takes it
    /// silently. [`Error::BadPort`] when the port is free or not one to send through.
    pub fn send(&self, domain: &Arc<Domain>, port: Port) -> Result<(), Error> {
        let (remote, remote_port) = {
            let table = domain.events.lock();
            let entry = table.get(&self.platform, port)?;
            match entry.state {
                PortState::Interdomain { remote, port } => (remote, port),
                PortState::Ipi => {
                    self.deliver(domain, port, entry.vcpu);
                    return Ok(());
                }
                PortState::Unbound { .. } => return Ok(()),
                _ => return Err(Error::BadPort),
            }
        };
        let Some(peer) = self.domains.get(remote) else { return Ok(()) };
        let table = peer.events.lock();
        if let Ok(entry) = table.get(&self.platform, remote_port)
            && entry.state == (PortState::Interdomain { remote: domain.id, port })
        {
            self.deliver(&peer, remote_port, entry.vcpu);
        }
        Ok(())
    }

    /// Whether a port is pending, for `SCHEDOP_poll`. [`Error::BadPort`] when it does not exist.
    pub fn port_pending(&self, domain: &Domain, port: Port) -> Result<bool, Error> {
        domain.events.lock().get(&self.platform, port)?;
        let words = self.port_words(domain, port).ok_or(Error::BadPort)?;
        Ok(two_level::Word::read(words.pending) & words.bit != 0)
    }

    /// Clears the mask of a port and delivers what it held back.
    pub fn unmask(&self, domain: &Arc<Domain>, port: Port) -> Result<(), Error> {
        let table = domain.events.lock();
        let entry = table.get(&self.platform, port)?;
        let (Some(words), Some(vcpu)) = (self.port_words(domain, port), VcpuRef::new(domain, entry.vcpu))
        else {
            return Err(Error::BadPort);
        };
        if two_level::unmask(words, self.vcpu_words(&vcpu)) == Raised::Notify {
            self.notify(&vcpu);
        }
        Ok(())
    }

    // ── binding ──

    /// The lowest free port, its frame there. Taken only when the caller sets it, under the same lock.
    pub(super) fn free_port(&self, domain: &Domain, table: &mut PortTable) -> Result<Port, Error> {
        // Asked under the lock: teardown says "dying" before it takes the lock to close what is open.
        if domain.life() != Life::Alive {
            return Err(Error::Dying);
        }
        let port = table.lowest_free()?;
        if table.lacks_frame(port) {
            table.add_frame(port, self.allocate_frames(0, u64::MAX).ok_or(Error::NoMemory)?);
        }
        Ok(port)
    }

    fn bind_local(&self, domain: &Domain, state: PortState, vcpu: VcpuId) -> Result<Port, Error> {
        let mut table = domain.events.lock();
        let port = self.free_port(domain, &mut table)?;
        table.set(&self.platform, port, Entry::new(state, vcpu));
        Ok(port)
    }

    /// Opens a port that `remote` may connect to. Whether `remote` exists is not asked, as on Xen.
    pub fn alloc_unbound(&self, domain: &Domain, remote: DomId) -> Result<Port, Error> {
        self.bind_local(domain, PortState::Unbound { remote }, VcpuId::new(0))
    }

    /// Connects a new port of `local` to a port of `remote` that waits for it. The new port starts pending: the other side may
    /// have sent before anybody listened.
    pub fn bind_interdomain(
        &self,
        local: &Arc<Domain>,
        remote: &Domain,
        remote_port: Port,
    ) -> Result<Port, Error> {
        let mut pair = Pair::lock(local, remote);
        let port = self.free_port(local, pair.local())?;
        let there = pair.remote().get(&self.platform, remote_port)?;
        if there.state != (PortState::Unbound { remote: local.id }) {
            return Err(Error::BadPort);
        }
        let here = PortState::Interdomain { remote: remote.id, port: remote_port };
        pair.local().set(&self.platform, port, Entry::new(here, VcpuId::new(0)));
        let back = PortState::Interdomain { remote: local.id, port };
        pair.remote().set(&self.platform, remote_port, Entry::new(back, there.vcpu));
        self.deliver(local, port, VcpuId::new(0));
        Ok(port)
    }

    /// Binds a virtual interrupt of a vCPU to a new port.
    pub fn bind_virq(&self, domain: &Domain, virq: Virq, vcpu: VcpuId) -> Result<Port, Error> {
        if virq.get() >= Virq::COUNT || is_global(virq) && vcpu.get() != 0 {
            return Err(Error::BadSource);
        }
        let target = domain.vcpus.get(vcpu.get() as usize).ok_or(Error::NoVcpu)?;
        let slot = target.virq_port.get(virq.get() as usize).ok_or(Error::BadSource)?;
        let mut table = domain.events.lock();
        if slot.load(Ordering::Acquire) != 0 {
            return Err(Error::AlreadyBound);
        }
        let port = self.free_port(domain, &mut table)?;
        table.set(&self.platform, port, Entry::new(PortState::Virq { virq }, vcpu));
        slot.store(port.get(), Ordering::Release);
        Ok(port)
    }

    /// Opens a port by which the domain's vCPUs signal one of them.
    pub fn bind_ipi(&self, domain: &Domain, vcpu: VcpuId) -> Result<Port, Error> {
        domain.vcpus.get(vcpu.get() as usize).ok_or(Error::NoVcpu)?;
        self.bind_local(domain, PortState::Ipi, vcpu)
    }

    /// Sends the events of a port to another vCPU from now on. Not for ports that belong to one vCPU.
    pub fn bind_vcpu(&self, domain: &Domain, port: Port, vcpu: VcpuId) -> Result<(), Error> {
        domain.vcpus.get(vcpu.get() as usize).ok_or(Error::NoVcpu)?;
        let mut table = domain.events.lock();
        let entry = table.get(&self.platform, port)?;
        let movable = match entry.state {
            PortState::Virq { virq } => is_global(virq),
            PortState::Unbound { .. } | PortState::Interdomain { .. } | PortState::Pirq { .. } => true,
            PortState::Free | PortState::Reserved | PortState::Ipi => false,
        };
        if !movable {
            return Err(Error::BadPort);
        }
        table.set(&self.platform, port, Entry { vcpu, ..entry });
        Ok(())
    }

    /// What a port is bound to.
    pub fn port_status(&self, domain: &Domain, port: Port) -> Result<Entry, Error> {
        domain.events.lock().get(&self.platform, port)
    }

    // ── closing ──

    /// Closes a port; its peer, if it has one, waits to be connected again. [`Error::BadPort`] when it is not open.
    pub fn close(&self, domain: &Domain, port: Port) -> Result<(), Error> {
        let (remote, remote_port) = {
            let mut table = domain.events.lock();
            let entry = table.get(&self.platform, port)?;
            match entry.state {
                PortState::Free | PortState::Reserved => return Err(Error::BadPort),
                PortState::Interdomain { remote, port } => (remote, port),
                PortState::Pirq { pin } => {
                    self.unbind_pirq(pin);
                    self.free(domain, &mut table, port);
                    return Ok(());
                }
                PortState::Virq { virq } => {
                    let owner = if is_global(virq) { 0 } else { entry.vcpu.get() };
                    let vcpu = domain.vcpus.get(owner as usize);
                    if let Some(slot) = vcpu.and_then(|v| v.virq_port.get(virq.get() as usize)) {
                        slot.store(0, Ordering::Release);
                    }
                    self.free(domain, &mut table, port);
                    return Ok(());
                }
                PortState::Unbound { .. } | PortState::Ipi => {
                    self.free(domain, &mut table, port);
                    return Ok(());
                }
            }
        };
        self.close_pair(domain, port, remote, remote_port)
    }

    /// Closes a connected port, whose peer was read before both tables were locked: it may have changed, and then the port was
    /// closed by somebody else meanwhile.
    fn close_pair(&self, domain: &Domain, port: Port, remote: DomId, remote_port: Port) -> Result<(), Error> {
        // A domain stays in the registry until all its ports are closed, and closing them disconnects their peers.
        let peer = self.domains.get(remote).ok_or(Error::BadPort)?;
        let mut pair = Pair::lock(domain, &peer);
        let here = pair.local().get(&self.platform, port)?;
        if here.state != (PortState::Interdomain { remote, port: remote_port }) {
            return Err(Error::BadPort);
        }
        let there = pair.remote().get(&self.platform, remote_port)?;
        let waits = PortState::Unbound { remote: domain.id };
        self.free(domain, pair.local(), port);
        pair.remote().set(&self.platform, remote_port, Entry::new(waits, there.vcpu));
        Ok(())
    }

    /// Frees a port. A pending bit that was left would be taken for an event of the next binding.
    fn free(&self, domain: &Domain, table: &mut PortTable, port: Port) {
        if let Some(words) = self.port_words(domain, port) {
            two_level::Word::clear_bits(words.pending, words.bit);
        }
        table.set(&self.platform, port, Entry::FREE);
    }

    /// Closes all ports of a domain, in steps. `resuming` goes on where an earlier call was preempted.
    ///
    /// [`Error::ResetUnderWay`] when one is under way (not resuming) or none is (resuming); [`Error::NotAllClosed`] when
    /// others opened ports meanwhile.
    pub fn reset_ports(
        &self,
        domain: &Domain,
        resuming: bool,
        budget: &mut Budget,
    ) -> Result<Progress, Error> {
        {
            let mut table = domain.events.lock();
            if resuming == (table.reset_from == 0) {
                return Err(Error::ResetUnderWay);
            }
            table.reset_from = table.reset_from.max(1);
        }
        loop {
            let next = {
                let mut table = domain.events.lock();
                let next = table.first_taken(table.reset_from);
                match next {
                    Some(port) => table.reset_from = port.get(),
                    None => table.reset_from = 0,
                }
                next
            };
            let Some(port) = next else { break };
            // A port that another vCPU closed first is closed all the same.
            let _ = self.close(domain, port);
            if budget.step() == Err(Preempted) {
                return Ok(Progress::Preempted);
            }
        }
        if domain.events.lock().active() == 0 { Ok(Progress::Done) } else { Err(Error::NotAllClosed) }
    }

    /// Teardown of a dying domain's event channels: closes every port and gives the frames back, one port a step.
    pub fn tear_down_ports(&self, domain: &Domain, budget: &mut Budget) -> Progress {
        debug_assert!(domain.life() != Life::Alive);
        loop {
            let next = domain.events.lock().first_taken(1);
            let Some(port) = next else { break };
            // Only teardown closes ports now, or a vCPU that is about to stop: either way it is closed.
            let _ = self.close(domain, port);
            if budget.step() == Err(Preempted) {
                return Progress::Preempted;
            }
        }
        let mut table = domain.events.lock();
        while let Some(frame) = table.take_frame() {
            self.mm.give_back(frame, 0);
        }
        Progress::Done
    }
}

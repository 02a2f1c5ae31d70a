//! The operations on ports, and delivery.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::evtchn::{EVTCHN_FIFO_PRIORITY_MIN, EvtchnFifoControlBlock};
use hypercall_abi::{DomId, Mfn, Port, VcpuId, Virq};

use super::fifo;
use super::table::Offer;
use super::two_level::{self, PortWords, Raised, VcpuWords};
use super::{Entry, Error, PortState, PortTable, Queue, is_global};
use crate::domain::{Domain, Life, Vcpu, VcpuRef, block};
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::page_ref::{TypedRef, Writable};
use crate::platform::{CpuId, Platform};
use crate::sched::wakeup;
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
        let info = vcpu.info(&self.platform)?;
        Some(VcpuWords { selector: &info[SELECTOR_WORD], upcall: &info[UPCALL_WORD] })
    }

    /// Makes a port pending and tells its vCPU, and whoever polls it. `table` is the domain's, and locked.
    pub(super) fn deliver(&self, domain: &Arc<Domain>, table: &PortTable, port: Port, entry: Entry) {
        let Some(vcpu) = VcpuRef::new(domain, entry.vcpu()) else { return };
        if table.is_fifo() {
            return self.deliver_fifo(&vcpu, table, port, entry);
        }
        let Some(words) = self.port_words(domain, port) else { return };
        match two_level::raise(words, self.vcpu_words(&vcpu)) {
            Raised::WasPending => return,
            Raised::Quiet => {}
            Raised::Notify => self.notify(&vcpu),
        }
        self.wake_pollers(domain, port);
    }

    /// An event that has no word yet is held until the guest's event array reaches to it. One for a vCPU without a control
    /// block is dropped: guests have to give the block first.
    fn deliver_fifo(&self, vcpu: &VcpuRef, table: &PortTable, port: Port, entry: Entry) {
        let Some(word) = table.event_word(&self.platform, port) else {
            return table.hold(&self.platform, port, true);
        };
        if table.control(&self.platform, entry.vcpu()).is_none() {
            return;
        }
        let raised = fifo::raise(word);
        if raised.queue {
            self.enqueue(vcpu, table, port, entry.queue);
        }
        if raised.new {
            self.wake_pollers(vcpu.domain(), port);
        }
    }

    /// Puts a port whose word is claimed in its queue.
    fn enqueue(&self, vcpu: &VcpuRef, table: &PortTable, port: Port, queue: Queue) {
        let (Some(control), Some(upcall)) =
            (table.control(&self.platform, queue.vcpu), vcpu.info_word(&self.platform, UPCALL_WORD))
        else {
            return;
        };
        let tail = table.move_to_tail(&self.platform, port, queue);
        let tail = tail.and_then(|tail| table.event_word(&self.platform, tail));
        if fifo::enqueue(port, queue.priority, tail, control, upcall) {
            self.notify(vcpu);
        }
    }

    /// Wakes a vCPU that has an upcall or an interrupt to take, or makes the CPU that runs it look.
    pub(crate) fn notify(&self, vcpu: &VcpuRef) {
        self.unblock(vcpu);
        let it: &Vcpu = vcpu;
        if wakeup::runs(&it.running) {
            // Read after `running`, which is set after it.
            let cpu = CpuId(it.cpu.load(Ordering::SeqCst));
            if cpu != self.platform.this_cpu() {
                self.kick(cpu);
            }
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
            self.deliver(domain, &table, port, entry);
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
                    self.deliver(domain, &table, port, entry);
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
            self.deliver(&peer, &table, remote_port, entry);
        }
        Ok(())
    }

    /// Whether one of some ports is pending, for `SCHEDOP_poll`. [`Error::BadPort`] when one before it is not open.
    pub fn any_pending(&self, domain: &Domain, ports: &[Port]) -> Result<bool, Error> {
        let table = domain.events.lock();
        for &port in ports {
            if !table.get(&self.platform, port)?.is_open() {
                return Err(Error::BadPort);
            }
            let pending = if table.is_fifo() {
                table.event_word(&self.platform, port).is_some_and(|word| word.read() & fifo::PENDING != 0)
            } else {
                let words = self.port_words(domain, port).ok_or(Error::BadPort)?;
                two_level::Word::read(words.pending) & words.bit != 0
            };
            if pending {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the domain masks a port; a port without words is. `table` is the domain's, and locked.
    pub(super) fn port_masked(&self, domain: &Domain, table: &PortTable, port: Port) -> bool {
        if table.is_fifo() {
            return table.event_word(&self.platform, port).is_none_or(|word| word.read() & fifo::MASKED != 0);
        }
        self.port_words(domain, port).is_none_or(|words| two_level::Word::read(words.mask) & words.bit != 0)
    }

    /// Clears the mask of a port and delivers what it held back. Does nothing to a port that is not open.
    pub fn unmask(&self, domain: &Arc<Domain>, port: Port) -> Result<(), Error> {
        let table = domain.events.lock();
        let entry = table.get(&self.platform, port)?;
        let Some(vcpu) = VcpuRef::new(domain, entry.vcpu()).filter(|_| entry.is_open()) else {
            return Ok(());
        };
        if table.is_fifo() {
            if let Some(word) = table.event_word(&self.platform, port)
                && table.control(&self.platform, entry.vcpu()).is_some()
                && fifo::unmask(word).queue
            {
                self.enqueue(&vcpu, &table, port, entry.queue);
            }
        } else if let Some(words) = self.port_words(domain, port)
            && two_level::unmask(words, self.vcpu_words(&vcpu)) == Raised::Notify
        {
            self.notify(&vcpu);
        }
        Ok(())
    }

    // ── binding ──

    /// The lowest port that can be had, its frame there. Taken only when the caller sets it, under the same lock.
    ///
    /// Ports that were closed while an event of theirs is in a queue are passed over. A guest can have many of those: the
    /// search asks the budget for each group of ports that has no others, and goes on from there when it is asked again.
    pub(super) fn free_port(
        &self,
        domain: &Domain,
        table: &mut PortTable,
        budget: &mut Budget,
    ) -> Result<Port, Error> {
        // Asked under the lock: teardown says "dying" before it takes the lock to close what is open.
        if domain.life() != Life::Alive {
            return Err(Error::Dying);
        }
        let mut from = core::mem::take(&mut table.search_from);
        let port = loop {
            match table.offer(&self.platform, from)? {
                Offer::Port(port) => break port,
                Offer::Busy(next) => from = next,
            }
            if budget.step() == Err(Preempted) {
                table.search_from = from;
                return Err(Error::Unfinished);
            }
        };
        if table.lacks_frame(&self.platform, port) {
            let frame = self.allocate_frames(0, u64::MAX).ok_or(Error::NoMemory)?;
            table.add_frame(&self.platform, port, frame);
        }
        Ok(port)
    }

    fn bind_local(
        &self,
        domain: &Domain,
        state: PortState,
        vcpu: VcpuId,
        budget: &mut Budget,
    ) -> Result<Port, Error> {
        let mut table = domain.events.lock();
        let port = self.free_port(domain, &mut table, budget)?;
        table.set(&self.platform, port, Entry::new(state, vcpu));
        Ok(port)
    }

    /// Opens a port that `remote` may connect to. Whether `remote` exists is not asked, as on Xen.
    pub fn alloc_unbound(&self, domain: &Domain, remote: DomId, budget: &mut Budget) -> Result<Port, Error> {
        self.bind_local(domain, PortState::Unbound { remote }, VcpuId::new(0), budget)
    }

    /// Connects a new port of `local` to a port of `remote` that waits for it. The new port starts pending: the other side may
    /// have sent before anybody listened.
    pub fn bind_interdomain(
        &self,
        local: &Arc<Domain>,
        remote: &Domain,
        remote_port: Port,
        budget: &mut Budget,
    ) -> Result<Port, Error> {
        let mut pair = Pair::lock(local, remote);
        let port = self.free_port(local, pair.local(), budget)?;
        let there = pair.remote().get(&self.platform, remote_port)?;
        if there.state != (PortState::Unbound { remote: local.id }) {
            return Err(Error::BadPort);
        }
        let here = PortState::Interdomain { remote: remote.id, port: remote_port };
        let here = Entry::new(here, VcpuId::new(0));
        pair.local().set(&self.platform, port, here);
        let back = PortState::Interdomain { remote: local.id, port };
        pair.remote().set(&self.platform, remote_port, Entry { state: back, ..there });
        self.deliver(local, pair.local(), port, here);
        Ok(port)
    }

    /// Binds a virtual interrupt of a vCPU to a new port.
    pub fn bind_virq(
        &self,
        domain: &Domain,
        virq: Virq,
        vcpu: VcpuId,
        budget: &mut Budget,
    ) -> Result<Port, Error> {
        if virq.get() >= Virq::COUNT || is_global(virq) && vcpu.get() != 0 {
            return Err(Error::BadSource);
        }
        let target = domain.vcpus.get(vcpu.get() as usize).ok_or(Error::NoVcpu)?;
        let slot = target.virq_port.get(virq.get() as usize).ok_or(Error::BadSource)?;
        let mut table = domain.events.lock();
        if slot.load(Ordering::Acquire) != 0 {
            return Err(Error::AlreadyBound);
        }
        let port = self.free_port(domain, &mut table, budget)?;
        table.set(&self.platform, port, Entry::new(PortState::Virq { virq }, vcpu));
        slot.store(port.get(), Ordering::Release);
        Ok(port)
    }

    /// Opens a port by which the domain's vCPUs signal one of them.
    pub fn bind_ipi(&self, domain: &Domain, vcpu: VcpuId, budget: &mut Budget) -> Result<Port, Error> {
        domain.vcpus.get(vcpu.get() as usize).ok_or(Error::NoVcpu)?;
        self.bind_local(domain, PortState::Ipi, vcpu, budget)
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
        table.set(&self.platform, port, Entry { queue: Queue { vcpu, ..entry.queue }, ..entry });
        if let PortState::Pirq { number } = entry.state
            && let Some(vcpu) = domain.vcpus.get(vcpu.get() as usize)
        {
            self.route(number, vcpu);
        }
        Ok(())
    }

    /// What a port is bound to.
    pub fn port_status(&self, domain: &Domain, port: Port) -> Result<Entry, Error> {
        domain.events.lock().get(&self.platform, port)
    }

    // ── the FIFO form ──

    /// The guest's page `frame`, which it must own and may write, for as long as the hypervisor writes there.
    fn guest_page(&self, domain: &Domain, frame: Mfn) -> Result<TypedRef<'_, Writable>, Error> {
        self.pager().get_typed(frame, domain.id, self, &mut Budget::unlimited()).map_err(|_| Error::BadPage)
    }

    /// Gives a vCPU its control block, at byte `offset` of a page of the domain. The first one turns the domain to the FIFO
    /// form: what is pending moves over and is announced as the event array comes to reach it, and every port has the default
    /// priority.
    ///
    /// [`Error::BadPage`] no such page, or misplaced in it, or the vCPU has a block.
    pub fn init_control(&self, domain: &Domain, vcpu: VcpuId, frame: Mfn, offset: u32) -> Result<(), Error> {
        domain.vcpus.get(vcpu.get() as usize).ok_or(Error::NoVcpu)?;
        let offset = offset as usize;
        if offset > 4096 - size_of::<EvtchnFifoControlBlock>() || !offset.is_multiple_of(8) {
            return Err(Error::BadPage);
        }
        let page = self.guest_page(domain, frame)?;
        let mut table = domain.events.lock();
        if domain.life() != Life::Alive {
            return Err(Error::Dying);
        }
        if !table.is_fifo() {
            let frame = || self.allocate_frames(0, u64::MAX).ok_or(Error::NoMemory);
            let tails = frame()?;
            let index = if table.has_index() { None } else { Some(frame()) };
            let index = index.transpose().inspect_err(|_| self.mm.give_back(tails, 0))?;
            self.hold_pending(domain, &table);
            table.begin_fifo(index, tails);
        }
        if table.control(&self.platform, vcpu).is_some() {
            return Err(Error::BadPage);
        }
        table.set_control(&self.platform, vcpu, page.into_pte(), offset);
        Ok(())
    }

    /// Notes the two-level form's pending bits of open ports at the ports.
    fn hold_pending(&self, domain: &Domain, table: &PortTable) {
        let mut from = 1;
        while let Some(port) = table.first_taken(&self.platform, from) {
            if let Some(words) = self.port_words(domain, port)
                && two_level::Word::read(words.pending) & words.bit != 0
            {
                table.hold(&self.platform, port, true);
            }
            from = port.get() + 1;
        }
    }

    /// Adds a page to the event array, and raises the events that waited for it.
    ///
    /// [`Error::NotFifo`] in the two-level form, [`Error::NoFreePort`] when the array reaches to the last port,
    /// [`Error::BadPage`] no such page.
    pub fn expand_array(&self, domain: &Arc<Domain>, frame: Mfn) -> Result<(), Error> {
        // Before the page: which of two errors is told does not depend on the page then.
        {
            let table = domain.events.lock();
            if !table.is_fifo() {
                return Err(Error::NotFifo);
            }
            if table.array_is_complete() {
                return Err(Error::NoFreePort);
            }
        }
        let page = self.guest_page(domain, frame)?;
        let mut table = domain.events.lock();
        if domain.life() != Life::Alive {
            return Err(Error::Dying);
        }
        if !table.is_fifo() {
            return Err(Error::NotFifo);
        }
        if table.array_is_complete() {
            return Err(Error::NoFreePort);
        }
        for port in table.add_array_page(&self.platform, page.into_pte()).map(Port::new) {
            let Ok(entry) = table.get(&self.platform, port) else { continue };
            // Of a port that was closed since, too, as on Xen: its next user finds that it fired.
            if entry.held {
                table.hold(&self.platform, port, false);
                self.deliver(domain, &table, port, entry);
            }
        }
        Ok(())
    }

    /// Sets how urgent the events of a port are from the next one on: 0 first, 15 last.
    ///
    /// [`Error::NoPriorities`] in the two-level form, [`Error::NotOpen`] port not open, [`Error::BadPriority`].
    pub fn set_priority(&self, domain: &Domain, port: Port, priority: u32) -> Result<(), Error> {
        let mut table = domain.events.lock();
        let entry = table.get(&self.platform, port)?;
        if !table.is_fifo() {
            return Err(Error::NoPriorities);
        }
        if !entry.is_open() {
            return Err(Error::NotOpen);
        }
        if priority > EVTCHN_FIFO_PRIORITY_MIN {
            return Err(Error::BadPriority);
        }
        let queue = Queue { priority: priority as u8, ..entry.queue };
        table.set(&self.platform, port, Entry { queue, ..entry });
        Ok(())
    }

    /// Turns a table without open ports back to the two-level form and lets go of the guest's pages.
    fn leave_fifo(&self, table: &mut PortTable) {
        let release = |page| drop(TypedRef::<Writable>::from_pte(&self.mm, page));
        if let Some(tails) = table.end_fifo(&self.platform, release) {
            self.mm.give_back(tails, 0);
        }
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
                PortState::Pirq { number } => {
                    self.unbind_pirq(number);
                    self.free(domain, &mut table, port);
                    return Ok(());
                }
                PortState::Virq { virq } => {
                    let owner = if is_global(virq) { 0 } else { entry.vcpu().get() };
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
        pair.remote().set(&self.platform, remote_port, Entry { state: waits, ..there });
        Ok(())
    }

    /// Frees a port. A pending bit that was left would be taken for an event of the next binding.
    fn free(&self, domain: &Domain, table: &mut PortTable, port: Port) {
        if table.is_fifo() {
            if let Some(word) = table.event_word(&self.platform, port) {
                word.clear(fifo::PENDING);
            }
        } else if let Some(words) = self.port_words(domain, port) {
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
                let next = table.first_taken(&self.platform, table.reset_from);
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
        let mut table = domain.events.lock();
        if table.active() != 0 {
            return Err(Error::NotAllClosed);
        }
        self.leave_fifo(&mut table);
        Ok(Progress::Done)
    }

    /// Teardown of a dying domain's event channels: closes every port and gives the frames back, one port a step.
    pub fn tear_down_ports(&self, domain: &Domain, budget: &mut Budget) -> Progress {
        debug_assert!(domain.life() != Life::Alive);
        loop {
            let next = domain.events.lock().first_taken(&self.platform, 1);
            let Some(port) = next else { break };
            // Only teardown closes ports now, or a vCPU that is about to stop: either way it is closed.
            let _ = self.close(domain, port);
            if budget.step() == Err(Preempted) {
                return Progress::Preempted;
            }
        }
        let mut table = domain.events.lock();
        self.forget_eoi_map(domain);
        self.irqs.give_messages_back(domain.id);
        self.leave_fifo(&mut table);
        while let Some(frame) = table.take_frame(&self.platform) {
            self.mm.give_back(frame, 0);
        }
        Progress::Done
    }
}

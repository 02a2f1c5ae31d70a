//! Device interrupts and the ports that listen to them.
//!
//! A source of interrupts has a number (*pirq*). Those of *pins* are the numbers of the pins. A pin is shut until a domain with the
//! right to it binds it to a port, and shut again when the port closes. While a domain handles an interrupt the pin is *in
//! service* until the domain says so (`PHYSDEVOP_eoi`); a level-triggered pin raises no further interrupt meanwhile (the mechanism
//! masks it), an edge-triggered one may.
//!
//! The numbers behind the pins are *messages* (MSI): each stands for one vector of the host. A domain that may have some takes one,
//! is told which store raises it, and writes that into its device itself: the hypervisor knows no device. It cannot shut one either.
//! What arrives and has no listener is counted and dropped.
//!
//! An interrupt is sent to the CPU where the vCPU of its port runs or ran last: from the binding on, when the port is moved to another
//! vCPU, and when one arrives and the vCPU is elsewhere by now. A vector means the same on every CPU, so one under way while the
//! destination changes is as good as any other (docs/design/0051).

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hypercall_abi::{DomId, Mfn, Port, VcpuId};

use super::{Entry, Error, PortState};
use crate::access::PIRQS;
use crate::domain::{Domain, Life, Vcpu};
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
use crate::page_ref::{TypedRef, Writable};
use crate::platform::{CpuId, Platform};
use crate::sync::{RankedMutex, rank};

/// Sources of interrupts and who listens. Their number is fixed at boot.
pub struct IrqTable {
    /// Pins, then messages.
    sources: RankedMutex<Box<[Source]>, { rank::IRQS }>,
    pins: u32,
    /// Interrupts that nobody listens to.
    dropped: AtomicU64,
    /// The log has been told of a vector that means nothing.
    told: AtomicBool,
}

#[derive(Clone, Copy)]
struct Source {
    listener: Option<(DomId, Port)>,
    in_service: bool,
    /// Of a pin: a domain has said how it is triggered, which is said once.
    configured: bool,
    /// The hypervisor handles its interrupts itself: nobody else may listen.
    own: bool,
    /// Of a message: whose it is.
    owner: Option<DomId>,
    /// Where it is sent.
    cpu: CpuId,
    /// Where the latest one came in, and how many have.
    seen_on: CpuId,
    arrived: u64,
}

/// A source as it is told to its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Where its interrupts are sent.
    pub cpu: CpuId,
    /// Where the latest one came in; meaningless before the first.
    pub seen_on: CpuId,
    /// How many have come in since it was taken, or of a pin since the start.
    pub arrived: u64,
    /// Of a message: the address to be written, and the 32-bit value.
    pub message: Option<(u64, u32)>,
}

/// The page in which a domain wants to see which of its interrupts need an end, a bit for each number
/// (`PHYSDEVOP_pirq_eoi_gmfn`). The hypervisor changes a bit when the interrupt is bound.
///
/// One word: machine address of the page, whose *writable* reference is held, and two flags. It is set once, under the lock of the
/// domain's event channels.
#[derive(Default)]
pub struct PirqEoiMap(AtomicU64);

impl PirqEoiMap {
    const PRESENT: u64 = 1;
    /// Ending an interrupt unmasks its port.
    const UNMASKS: u64 = 2;

    fn page(&self) -> Option<Mfn> {
        let word = self.0.load(Ordering::Acquire);
        (word & PirqEoiMap::PRESENT != 0).then(|| Mfn::new(word >> 12))
    }

    fn unmasks(&self) -> bool {
        self.0.load(Ordering::Acquire) & PirqEoiMap::UNMASKS != 0
    }
}

/// What a domain may know about a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqStatus {
    /// It is bound to a port of the domain.
    pub bound: bool,
    /// An interrupt was delivered and its end is waited for.
    pub in_service: bool,
}

impl IrqTable {
    /// `pins` pins and as many messages as there are numbers for; nobody listening.
    pub fn new(pins: u32, messages: u32) -> IrqTable {
        let none = Source {
            listener: None,
            in_service: false,
            configured: false,
            own: false,
            owner: None,
            cpu: CpuId(0),
            seen_on: CpuId(0),
            arrived: 0,
        };
        let count = pins.saturating_add(messages).min(PIRQS);
        IrqTable {
            sources: RankedMutex::new((0..count).map(|_| none).collect()),
            pins: pins.min(PIRQS),
            dropped: AtomicU64::new(0),
            told: AtomicBool::new(false),
        }
    }

    /// Number of pins.
    pub fn pins(&self) -> u32 {
        self.pins
    }

    /// Keeps `pin` for the hypervisor itself, which binds nobody to it and has said how it is triggered.
    pub fn keep(&self, pin: u32) {
        if let Some(source) = self.sources.lock().get_mut(pin as usize) {
            source.own = true;
            source.configured = true;
        }
    }

    /// Interrupts so far that nobody listened to.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn is_pin(&self, number: u32) -> bool {
        number < self.pins
    }

    /// Who listens to `number`.
    pub fn listener(&self, number: u32) -> Option<(DomId, Port)> {
        self.sources.lock().get(number as usize)?.listener
    }

    fn bind(&self, number: u32, domain: DomId, port: Port) -> Result<(), Error> {
        let mut sources = self.sources.lock();
        let is_pin = self.is_pin(number);
        let source = sources.get_mut(number as usize).ok_or(Error::BadSource)?;
        // Asked here: another vCPU may be giving it back.
        if !is_pin && source.owner != Some(domain) {
            return Err(Error::BadSource);
        }
        match source.listener {
            Some((other, _)) if other == domain => return Err(Error::AlreadyBound),
            Some(_) => return Err(Error::PinInUse),
            None if source.own => return Err(Error::PinInUse),
            None => *source = Source { listener: Some((domain, port)), in_service: false, ..*source },
        }
        Ok(())
    }

    /// Returns whether the source was in service.
    fn unbind(&self, number: u32) -> bool {
        let mut sources = self.sources.lock();
        let Some(source) = sources.get_mut(number as usize) else { return false };
        source.listener = None;
        core::mem::take(&mut source.in_service)
    }

    /// Notes an interrupt on CPU `here`. Returns who listens, and where it is sent.
    fn begin_service(&self, number: u32, here: CpuId) -> Option<((DomId, Port), CpuId)> {
        let mut sources = self.sources.lock();
        let source = sources.get_mut(number as usize)?;
        source.in_service = source.listener.is_some();
        source.seen_on = here;
        source.arrived += 1;
        Some((source.listener?, source.cpu))
    }

    fn end_service(&self, number: u32, domain: DomId) -> Result<bool, Error> {
        let mut sources = self.sources.lock();
        let source = sources.get_mut(number as usize).ok_or(Error::BadSource)?;
        if source.listener.is_none_or(|(listener, _)| listener != domain) {
            return Err(Error::BadSource);
        }
        Ok(core::mem::take(&mut source.in_service))
    }

    fn status(&self, number: u32, domain: DomId) -> Result<IrqStatus, Error> {
        let sources = self.sources.lock();
        let source = sources.get(number as usize).ok_or(Error::BadSource)?;
        let bound = source.listener.is_some_and(|(listener, _)| listener == domain);
        Ok(IrqStatus { bound, in_service: bound && source.in_service })
    }

    /// Takes a message that nobody has or listens to and whose number is not `taken`, unless `domain` has `most`.
    fn take_message(
        &self,
        domain: DomId,
        most: u32,
        cpu: CpuId,
        taken: impl Fn(u32) -> bool,
    ) -> Result<u32, Error> {
        let mut sources = self.sources.lock();
        let messages = sources.get_mut(self.pins as usize..).unwrap_or_default();
        if messages.iter().filter(|source| source.owner == Some(domain)).count() >= most as usize {
            return Err(Error::NotPermitted);
        }
        let free = (self.pins..)
            .zip(messages.iter_mut())
            .find(|(number, source)| source.owner.is_none() && source.listener.is_none() && !taken(*number));
        let (number, source) = free.ok_or(Error::NoFreePort)?;
        *source = Source { owner: Some(domain), in_service: false, cpu, arrived: 0, ..*source };
        Ok(number)
    }

    /// Gives a message of `domain` back, if it is one. What listens goes on until its port closes.
    fn give_message_back(&self, domain: DomId, number: u32) {
        if let Some(source) = self.sources.lock().get_mut(number as usize) {
            source.owner = source.owner.filter(|owner| *owner != domain);
        }
    }

    /// Gives all messages of `domain` back.
    pub fn give_messages_back(&self, domain: DomId) {
        for source in self.sources.lock().iter_mut() {
            source.owner = source.owner.filter(|owner| *owner != domain);
        }
    }
}

impl<P: Platform> Hypervisor<P> {
    /// An interrupt came in from source `number`. Called by the interrupt entry, with no lock held.
    ///
    /// A pin that nobody listens to (any more) is shut.
    pub fn on_irq(&self, number: u32) {
        let here = self.platform.this_cpu();
        if let Some(((domain, port), target)) = self.irqs.begin_service(number, here)
            && let Some(domain) = self.domains.get(domain)
        {
            let table = domain.events.lock();
            if let Ok(entry) = table.get(&self.platform, port)
                && entry.state == (PortState::Pirq { number })
            {
                // First, so that whoever sees the event is told the new place.
                if let Some(vcpu) = domain.vcpus.get(entry.vcpu().get() as usize)
                    && vcpu.cpu.load(Ordering::Relaxed) != target.0
                {
                    self.route(number, vcpu);
                }
                self.deliver(&domain, &table, port, entry);
                return;
            }
        }
        self.irqs.dropped.fetch_add(1, Ordering::Relaxed);
        if self.irqs.is_pin(number) {
            self.platform.eoi_irq(number);
            self.platform.mask_irq(number, true);
        }
    }

    /// An interrupt came in at a vector that means nothing.
    pub fn on_unknown_vector(&self, vector: u8) {
        self.irqs.dropped.fetch_add(1, Ordering::Relaxed);
        if !self.irqs.told.swap(true, Ordering::Relaxed) {
            log::warn!("interrupt at vector {vector:#x}, which nobody was given; others are only counted");
        }
    }

    /// Sends the interrupts of a source to the CPU of a vCPU from now on. A CPU that no interrupt can name is passed over.
    pub(super) fn route(&self, number: u32, vcpu: &Vcpu) {
        let cpu = CpuId(vcpu.cpu.load(Ordering::SeqCst));
        let mut sources = self.irqs.sources.lock();
        let Some(source) = sources.get_mut(number as usize) else { return };
        let reached = match number.checked_sub(self.irqs.pins) {
            None => self.platform.route_irq(number, cpu),
            // The owner writes it into its device.
            Some(index) => self.platform.message(index, cpu).is_some(),
        };
        if reached {
            source.cpu = cpu;
        }
    }

    /// Binds a new port of `domain` to a source of interrupts and opens it.
    ///
    /// [`Error::BadSource`] no such pin, no message of its own, [`Error::NotPermitted`] no right to it, [`Error::AlreadyBound`]
    /// bound by this domain, [`Error::PinInUse`] by another or by the hypervisor itself.
    pub fn bind_pirq(&self, domain: &Domain, number: u32, budget: &mut Budget) -> Result<Port, Error> {
        let is_pin = self.irqs.is_pin(number);
        if is_pin && !domain.rights.lock().irqs.contains(u64::from(number), u64::from(number)) {
            return Err(Error::NotPermitted);
        }
        let mut table = domain.events.lock();
        if self.irqs.listener(number).is_some_and(|(listener, _)| listener == domain.id) {
            return Err(Error::AlreadyBound);
        }
        let port = self.free_port(domain, &mut table, budget)?;
        self.irqs.bind(number, domain.id, port)?;
        self.note_eoi(domain, number, is_pin && self.platform.is_level_irq(number));
        table.set(&self.platform, port, Entry::new(PortState::Pirq { number }, VcpuId::new(0)));
        if let Some(vcpu) = domain.vcpus.first() {
            self.route(number, vcpu);
        }
        if is_pin {
            self.platform.mask_irq(number, false);
        }
        Ok(port)
    }

    /// Gives `domain` a message, sent to the CPU of its first vCPU. [`Error::NotPermitted`] it has as many as it may,
    /// [`Error::NoFreePort`] none is left.
    pub fn allocate_message(&self, domain: &Domain) -> Result<u32, Error> {
        let (most, taken) = {
            let rights = domain.rights.lock();
            (rights.messages, rights.pirqs.clone())
        };
        let number = {
            // Teardown says "dying" before it takes the lock; later it takes messages back.
            let _table = domain.events.lock();
            if domain.life() != Life::Alive {
                return Err(Error::Dying);
            }
            self.irqs.take_message(domain.id, most, CpuId(0), |number| taken.contains(number))?
        };
        domain.rights.lock().pirqs.insert(number);
        if let Some(vcpu) = domain.vcpus.first() {
            self.route(number, vcpu);
        }
        Ok(number)
    }

    /// Lets go of a number that `domain` has mapped or reserved, and of the message behind it. False when it has not.
    pub fn release_pirq(&self, domain: &Domain, number: u32) -> bool {
        let had = domain.rights.lock().pirqs.remove(number);
        if had {
            self.irqs.give_message_back(domain.id, number);
        }
        had
    }

    /// What `domain` may know about a pin that it has the right to, or a message of its own. [`Error::BadSource`] others.
    pub fn irq_info(&self, domain: &Domain, number: u32) -> Result<IrqInfo, Error> {
        let right = domain.rights.lock().irqs.contains(u64::from(number), u64::from(number));
        let sources = self.irqs.sources.lock();
        let source = sources.get(number as usize).ok_or(Error::BadSource)?;
        let index = number.checked_sub(self.irqs.pins);
        if if index.is_none() { !right } else { source.owner != Some(domain.id) } {
            return Err(Error::BadSource);
        }
        let message = index.and_then(|index| self.platform.message(index, source.cpu));
        Ok(IrqInfo { cpu: source.cpu, seen_on: source.seen_on, arrived: source.arrived, message })
    }

    /// Shuts a pin whose port closes. The interrupt controller must not wait for an end that nobody will tell it.
    pub(super) fn unbind_pirq(&self, number: u32) {
        let in_service = self.irqs.unbind(number);
        if !self.irqs.is_pin(number) {
            return;
        }
        if in_service {
            self.platform.eoi_irq(number);
        }
        self.platform.mask_irq(number, true);
    }

    /// Sets how a pin is triggered, before anybody binds it. [`Error::BadSource`] no such pin, [`Error::NotPermitted`] no right
    /// to it, [`Error::AlreadyBound`] somebody listens to it, or has said it before.
    pub fn setup_irq(&self, domain: &Domain, pin: u32, level: bool, active_low: bool) -> Result<(), Error> {
        if pin >= self.irqs.pins() {
            return Err(Error::BadSource);
        }
        if !domain.rights.lock().irqs.contains(u64::from(pin), u64::from(pin)) {
            return Err(Error::NotPermitted);
        }
        let mut sources = self.irqs.sources.lock();
        let entry = sources.get_mut(pin as usize).ok_or(Error::BadSource)?;
        if entry.configured || entry.listener.is_some() {
            return Err(Error::AlreadyBound);
        }
        entry.configured = true;
        self.platform.configure_irq(pin, level, active_low);
        Ok(())
    }

    /// Gives a domain its page of interrupts that need an end; with `unmasks`, ending one also unmasks its port.
    /// [`Error::AlreadyBound`] when it has one.
    pub fn set_eoi_map(
        &self,
        domain: &Domain,
        page: TypedRef<'_, Writable>,
        unmasks: bool,
    ) -> Result<(), Error> {
        // Teardown says "dying" before it takes the lock to let go of the page.
        let _table = domain.events.lock();
        if domain.life() != Life::Alive {
            return Err(Error::Dying);
        }
        if domain.pirq_eoi.page().is_some() {
            return Err(Error::AlreadyBound);
        }
        let flags = PirqEoiMap::PRESENT | if unmasks { PirqEoiMap::UNMASKS } else { 0 };
        domain.pirq_eoi.0.store(page.into_pte().get() << 12 | flags, Ordering::Release);
        Ok(())
    }

    /// Lets go of that page. The lock of the domain's event channels is held.
    pub(super) fn forget_eoi_map(&self, domain: &Domain) {
        if let Some(page) = domain.pirq_eoi.page() {
            domain.pirq_eoi.0.store(0, Ordering::Release);
            drop(TypedRef::<Writable>::from_pte(&self.mm, page));
        }
    }

    fn note_eoi(&self, domain: &Domain, pirq: u32, needed: bool) {
        let Some(page) = domain.pirq_eoi.page() else { return };
        let Some(word) = self.platform.frame(page).get(pirq as usize / 64) else { return };
        let bit = 1 << (pirq % 64);
        if needed {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// `PHYSDEVOP_eoi`: the domain has handled the interrupt of source `number`. Telling it twice does nothing. [`Error::BadSource`]
    /// when it is not bound by this domain.
    pub fn end_irq(&self, domain: &Arc<Domain>, number: u32) -> Result<(), Error> {
        if domain.pirq_eoi.unmasks()
            && let Some((listener, port)) = self.irqs.listener(number)
            && listener == domain.id
        {
            self.unmask(domain, port)?;
        }
        if self.irqs.end_service(number, domain.id)? && self.irqs.is_pin(number) {
            self.platform.eoi_irq(number);
        }
        Ok(())
    }

    /// `PHYSDEVOP_IRQ_UNMASK_NOTIFY`: the domain has handled all interrupts whose ports it does not mask.
    pub fn end_unmasked_irqs(&self, domain: &Arc<Domain>) {
        for pin in 0..self.irqs.pins() {
            let listener = self.irqs.listener(pin).filter(|(listener, _)| *listener == domain.id);
            let masked = |port| self.port_masked(domain, &domain.events.lock(), port);
            if listener.is_some_and(|(_, port)| !masked(port)) {
                // Bound by the domain; if not any more, there is nothing to end.
                let _ = self.end_irq(domain, pin);
            }
        }
    }

    /// What `domain` may know about `pin`. [`Error::BadSource`] no such pin.
    pub fn irq_status(&self, domain: &Domain, pin: u32) -> Result<IrqStatus, Error> {
        self.irqs.status(pin, domain.id)
    }
}

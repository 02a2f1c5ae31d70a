//! Interrupt pins and the ports that listen to them.
//!
//! A pin is shut until a domain with the right to it binds it to a port, and shut again when the port closes. While a domain
//! handles an interrupt the pin is *in service* until the domain says so (`PHYSDEVOP_eoi`); a level-triggered pin raises no
//! further interrupt meanwhile (the mechanism masks or defers it), an edge-triggered one may.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::{DomId, Mfn, Port, VcpuId};

use super::{Entry, Error, PortState};
use crate::domain::{Domain, Life};
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
use crate::page_ref::{TypedRef, Writable};
use crate::platform::Platform;
use crate::sync::{RankedMutex, rank};

/// Interrupt pins and who listens. The number of pins is fixed at boot.
pub struct IrqTable {
    pins: RankedMutex<Box<[Pin]>, { rank::IRQS }>,
}

#[derive(Clone, Copy, Default)]
struct Pin {
    listener: Option<(DomId, Port)>,
    in_service: bool,
    /// A domain has said how it is triggered, which is said once.
    configured: bool,
    /// The hypervisor handles its interrupts itself: nobody else may listen.
    own: bool,
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
    /// `pins` pins, nobody listening.
    pub fn new(pins: u32) -> IrqTable {
        IrqTable { pins: RankedMutex::new((0..pins).map(|_| Pin::default()).collect()) }
    }

    /// Number of pins.
    pub fn pins(&self) -> u32 {
        self.pins.lock().len() as u32
    }

    /// Keeps `pin` for the hypervisor itself, which binds nobody to it and has said how it is triggered.
    pub fn keep(&self, pin: u32) {
        if let Some(pin) = self.pins.lock().get_mut(pin as usize) {
            *pin = Pin { own: true, configured: true, ..Pin::default() };
        }
    }

    /// Who listens to `pin`.
    pub fn listener(&self, pin: u32) -> Option<(DomId, Port)> {
        self.pins.lock().get(pin as usize)?.listener
    }

    fn bind(&self, pin: u32, domain: DomId, port: Port) -> Result<(), Error> {
        let mut pins = self.pins.lock();
        let pin = pins.get_mut(pin as usize).ok_or(Error::BadSource)?;
        match pin.listener {
            Some((other, _)) if other == domain => return Err(Error::AlreadyBound),
            Some(_) => return Err(Error::PinInUse),
            None if pin.own => return Err(Error::PinInUse),
            None => *pin = Pin { listener: Some((domain, port)), in_service: false, ..*pin },
        }
        Ok(())
    }

    /// Returns whether the pin was in service.
    fn unbind(&self, pin: u32) -> bool {
        let mut pins = self.pins.lock();
        let Some(pin) = pins.get_mut(pin as usize) else { return false };
        pin.listener = None;
        core::mem::take(&mut pin.in_service)
    }

    fn begin_service(&self, pin: u32) -> Option<(DomId, Port)> {
        let mut pins = self.pins.lock();
        let pin = pins.get_mut(pin as usize)?;
        pin.in_service = pin.listener.is_some();
        pin.listener
    }

    fn end_service(&self, pin: u32, domain: DomId) -> Result<bool, Error> {
        let mut pins = self.pins.lock();
        let pin = pins.get_mut(pin as usize).ok_or(Error::BadSource)?;
        if pin.listener.is_none_or(|(listener, _)| listener != domain) {
            return Err(Error::BadSource);
        }
        Ok(core::mem::take(&mut pin.in_service))
    }

    fn status(&self, pin: u32, domain: DomId) -> Result<IrqStatus, Error> {
        let pins = self.pins.lock();
        let pin = pins.get(pin as usize).ok_or(Error::BadSource)?;
        let bound = pin.listener.is_some_and(|(listener, _)| listener == domain);
        Ok(IrqStatus { bound, in_service: bound && pin.in_service })
    }
}

impl<P: Platform> Hypervisor<P> {
    /// An interrupt came in at `pin`. Called by the interrupt entry, with no lock held.
    ///
    /// A pin that nobody listens to (any more) is shut.
    pub fn on_irq(&self, pin: u32) {
        if let Some((domain, port)) = self.irqs.begin_service(pin)
            && let Some(domain) = self.domains.get(domain)
        {
            let table = domain.events.lock();
            if let Ok(entry) = table.get(&self.platform, port)
                && entry.state == (PortState::Pirq { pin })
            {
                self.deliver(&domain, &table, port, entry);
                return;
            }
        }
        self.platform.eoi_irq(pin);
        self.platform.mask_irq(pin, true);
    }

    /// Binds a new port of `domain` to an interrupt pin and opens the pin.
    ///
    /// [`Error::BadSource`] no such pin, [`Error::NotPermitted`] no right to it, [`Error::AlreadyBound`] bound by this domain,
    /// [`Error::PinInUse`] by another or by the hypervisor itself.
    pub fn bind_pirq(&self, domain: &Domain, pin: u32, budget: &mut Budget) -> Result<Port, Error> {
        if pin >= self.irqs.pins() {
            return Err(Error::BadSource);
        }
        if !domain.rights.lock().irqs.contains(u64::from(pin), u64::from(pin)) {
            return Err(Error::NotPermitted);
        }
        let mut table = domain.events.lock();
        if self.irqs.listener(pin).is_some_and(|(listener, _)| listener == domain.id) {
            return Err(Error::AlreadyBound);
        }
        let port = self.free_port(domain, &mut table, budget)?;
        self.irqs.bind(pin, domain.id, port)?;
        self.note_eoi(domain, pin, self.platform.is_level_irq(pin));
        table.set(&self.platform, port, Entry::new(PortState::Pirq { pin }, VcpuId::new(0)));
        self.platform.mask_irq(pin, false);
        Ok(port)
    }

    /// Shuts a pin whose port closes. The interrupt controller must not wait for an end that nobody will tell it.
    pub(super) fn unbind_pirq(&self, pin: u32) {
        let in_service = self.irqs.unbind(pin);
        if in_service {
            self.platform.eoi_irq(pin);
        }
        self.platform.mask_irq(pin, true);
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
        let mut pins = self.irqs.pins.lock();
        let entry = pins.get_mut(pin as usize).ok_or(Error::BadSource)?;
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

    /// `PHYSDEVOP_eoi`: the domain has handled the interrupt of `pin`. Telling it twice does nothing. [`Error::BadSource`]
    /// when the pin is not bound by this domain.
    pub fn end_irq(&self, domain: &Arc<Domain>, pin: u32) -> Result<(), Error> {
        if domain.pirq_eoi.unmasks()
            && let Some((listener, port)) = self.irqs.listener(pin)
            && listener == domain.id
        {
            self.unmask(domain, port)?;
        }
        if self.irqs.end_service(pin, domain.id)? {
            self.platform.eoi_irq(pin);
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

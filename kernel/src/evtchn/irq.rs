//! Interrupt pins and the ports that listen to them.
//!
//! A pin is shut until a domain with the right to it binds it to a port, and shut again when the port closes. While a domain
//! handles an interrupt the pin is *in service* until the domain says so (`PHYSDEVOP_eoi`); a level-triggered pin raises no
//! further interrupt meanwhile (the mechanism masks or defers it), an edge-triggered one may.

use alloc::boxed::Box;

use hypercall_abi::{DomId, Port, VcpuId};

use super::{Entry, Error, PortState};
use crate::domain::Domain;
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
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
            None => *pin = Pin { listener: Some((domain, port)), in_service: false },
        }
        Ok(())
    }

    /// Returns whether the pin was in service.
    fn unbind(&self, pin: u32) -> bool {
        let mut pins = self.pins.lock();
        pins.get_mut(pin as usize).is_some_and(|pin| core::mem::take(pin).in_service)
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
    /// [`Error::PinInUse`] by another.
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

    /// `PHYSDEVOP_eoi`: the domain has handled the interrupt of `pin`. Telling it twice does nothing. [`Error::BadSource`]
    /// when the pin is not bound by this domain.
    pub fn end_irq(&self, domain: &Domain, pin: u32) -> Result<(), Error> {
        if self.irqs.end_service(pin, domain.id)? {
            self.platform.eoi_irq(pin);
        }
        Ok(())
    }

    /// `PHYSDEVOP_IRQ_UNMASK_NOTIFY`: the domain has handled all interrupts whose ports it does not mask.
    pub fn end_unmasked_irqs(&self, domain: &Domain) {
        for pin in 0..self.irqs.pins() {
            let listener = self.irqs.listener(pin).filter(|(listener, _)| *listener == domain.id);
            if listener.is_some_and(|(_, port)| !self.port_masked(domain, port)) {
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

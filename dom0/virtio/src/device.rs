//! What all kinds of devices have: their registers, what was agreed on, and whether they still work.

use crate::queue::Queue;
use crate::transport::{Doorbell, Transport, Vectors, feature};
use crate::{Error, Fault, Platform};
use core::fmt;

/// How often a device is started again after it broke.
const MOST_REVIVALS: u32 = 8;

/// A device below its driver. One that does what it may not is cut off from memory and started again, a few times; then it is broken for
/// good. So is one that was taken out of the machine.
pub struct Device<P: Platform> {
    transport: Transport<P>,
    vectors: Vectors,
    wanted: u64,
    agreed: u64,
    fault: Option<Fault>,
    broken: bool,
    revivals: u32,
}

impl<P: Platform> fmt::Debug for Device<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("transport", &self.transport).finish_non_exhaustive()
    }
}

impl<P: Platform> Device<P> {
    /// Begins to bring a device up: agrees on those features of `wanted` that it offers.
    ///
    /// # Errors
    /// [`Error::Features`], [`Error::Messages`].
    pub(crate) fn start(transport: Transport<P>, vectors: Vectors, wanted: u64) -> Result<Self, Error> {
        let agreed = transport.agree(vectors, wanted)?;
        Ok(Self { transport, vectors, wanted, agreed, fault: None, broken: false, revivals: 0 })
    }

    /// Its registers: its place, its messages.
    #[must_use]
    pub fn transport(&self) -> &Transport<P> {
        &self.transport
    }

    /// Whether it is broken for good.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// How often it was started again.
    #[must_use]
    pub fn revivals(&self) -> u32 {
        self.revivals
    }

    /// What it did wrong, told once.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.fault.take()
    }

    /// Whether all of these were agreed on.
    pub(crate) fn has(&self, features: u64) -> bool {
        self.agreed & features == features
    }

    /// Makes a queue of its, in memory of the queue's own.
    ///
    /// # Errors
    /// As [`Transport::make_queue`].
    pub(crate) fn make_queue(&self, number: u16) -> Result<Queue<P::Page>, Error> {
        self.transport.make_queue(number, self.agreed)
    }

    /// Tells it where a queue is, and returns where it is told of the queue.
    ///
    /// # Errors
    /// As [`Transport::set_queue`].
    pub(crate) fn set_queue(&self, number: u16, queue: &Queue<P::Page>) -> Result<Doorbell, Error> {
        self.transport.set_queue(number, queue, self.vectors)
    }

    /// Makes a queue as it was when it was new, and tells the device of it.
    ///
    /// # Errors
    /// As [`Transport::set_queue`].
    pub(crate) fn renew_queue(&self, number: u16, queue: &mut Queue<P::Page>) -> Result<Doorbell, Error> {
        queue.clear(self.has(feature::EVENT_INDEX));
        self.set_queue(number, queue)
    }

    /// Ends its use after a fault. Whatever becomes of it, it reaches no memory from here on: what was lent to it is free.
    pub(crate) fn cut_off(&mut self, fault: Fault) {
        self.fault = Some(fault);
        let reset = self.transport.reset();
        self.broken = reset.is_err() || self.revivals >= MOST_REVIVALS || fault == Fault::Removed;
    }

    /// Brings it up once more, as far as [`Device::start`] does.
    ///
    /// # Errors
    /// [`Error::Features`] also when it is not the device that it was: what was said of it would not hold.
    pub(crate) fn start_again(&mut self) -> Result<(), Error> {
        self.revivals += 1;
        let agreed = self.transport.agree(self.vectors, self.wanted)?;
        if agreed == self.agreed { Ok(()) } else { Err(Error::Features) }
    }

    /// It does not come up again.
    pub(crate) fn give_up(&mut self) {
        self.broken = true;
        let _ = self.transport.reset();
    }
}

//! A card as a device of the TCP/IP stack `smoltcp`.
//!
//! ```ignore
//! let mut device = Device::new(card);
//! let mut config = Config::new(device.hardware_address());
//! config.random_seed = seed;
//! let mut interface = Interface::new(config, &mut device, stack::now());
//! loop {
//!     device.poll(&mut interface, &mut sockets);
//!     // Use the sockets.
//!     device.wait(&mut interface, &sockets).await?;
//! }
//! ```
//! A received frame is read where the back end has put it: its page's grant is withdrawn for as long as the stack looks at it. A frame to
//! send is written where it is sent from. Both take no copy for frames of one page, which those of an MTU up to 4082 are.

use super::{Card, HEADER, NetError};
use crate::sync::{First, first};
use crate::{executor, time};
use smoltcp::iface::{Interface, PollResult, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress};

/// System time for the stack.
#[must_use]
pub fn now() -> Instant {
    // Microseconds of system time: 2^63 of them are 290000 years.
    Instant::from_micros((time::now_ns() / 1000).cast_signed())
}

/// A card for the stack.
#[derive(Debug)]
pub struct Device {
    card: Card,
    /// Frames are shown to the back end together, later.
    together: bool,
    /// The stack wanted to send, and there was no room.
    starved: bool,
}

impl Device {
    /// A device for a card that nobody else receives from.
    #[must_use]
    pub fn new(card: Card) -> Self {
        Self { card, together: false, starved: false }
    }

    /// The card.
    #[must_use]
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The card's address.
    #[must_use]
    pub fn hardware_address(&self) -> HardwareAddress {
        HardwareAddress::Ethernet(EthernetAddress(self.card.mac().0))
    }

    /// Lets the stack do what is to be done; everything that it sends is shown to the back end at once, with one notification.
    /// (`Interface::poll` may be called with a device, too: then each frame is shown when it is sent.)
    pub fn poll(&mut self, interface: &mut Interface, sockets: &mut SocketSet<'_>) -> PollResult {
        self.together = true;
        self.starved = false;
        let result = interface.poll(now(), self, sockets);
        self.together = false;
        // Of a card that is gone, `wait` tells.
        let _ = self.card.flush();
        result
    }

    /// Waits until the stack has to be polled.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub async fn wait(&mut self, interface: &mut Interface, sockets: &SocketSet<'_>) -> Result<(), NetError> {
        // Others get their turn also when the stack wants the next one at once: among them who brings the card back.
        executor::yield_now().await;
        if core::mem::take(&mut self.starved) {
            // Without room nothing can be done about a frame that is there or a time that has come.
            return self.card.room(self.longest()).await;
        }
        let ready = self.card.ready();
        match interface.poll_delay(now(), sockets) {
            Some(delay) => match first(ready, time::after(delay.into())).await {
                First::One(result) => result,
                First::Other(()) => Ok(()),
            },
            None => ready.await,
        }
    }

    /// Bytes of the longest frame that the stack sends.
    fn longest(&self) -> usize {
        self.card.mtu() + HEADER
    }

    fn has_room(&mut self) -> bool {
        let room = self.card.has_room(self.longest()).unwrap_or(false);
        self.starved |= !room;
        room
    }
}

/// A frame that is there.
#[derive(Debug)]
pub struct RxToken<'a> {
    card: &'a Card,
}

/// Room for a frame.
#[derive(Debug)]
pub struct TxToken<'a> {
    card: &'a Card,
    together: bool,
}

impl phy::Device for Device {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        // The stack may answer what it gets.
        if !self.card.has_frame().unwrap_or(false) || !self.has_room() {
            return None;
        }
        Some((RxToken { card: &self.card }, TxToken { card: &self.card, together: self.together }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.has_room().then_some(TxToken { card: &self.card, together: self.together })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.longest();
        capabilities
    }
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        let (mut work, mut result) = (Some(work), None);
        // An error says that the card is gone, since the token was made or since the frame was looked at.
        let _ = self.card.receive_with(|frame, _| result = work.take().map(|work| work(frame)));
        match (result, work) {
            (Some(result), _) => result,
            // No stack takes an empty frame for anything.
            (None, Some(work)) => work(&[]),
            (None, None) => unreachable!("work that was done has a result"),
        }
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, work: F) -> R {
        let (mut work, mut result) = (Some(work), None);
        let _ = self.card.queue_with(bytes, |frame| result = work.take().map(|work| work(frame)));
        if !self.together {
            let _ = self.card.flush();
        }
        match (result, work) {
            (Some(result), _) => result,
            // Longer than what was said to be possible.
            (None, Some(work)) => work(&mut alloc::vec![0; bytes]),
            (None, None) => unreachable!("work that was done has a result"),
        }
    }
}

//! Frames of dom0's own ports: of routers, and what comes in by cards of the machine's.

use super::short::{Source, first};
use super::{FRAMES, Local, Network, Parcel, Turn, WHOLE, give, unfinished};
use guest_sdk::copy::{Copier, Place};
use guest_sdk::ring::SharedPage;
use netswitch::{PortId, flow_hash};

/// A frame that came in from outside, where a card of the machine's has put it.
#[derive(Clone, Copy)]
pub struct Arrived<'a> {
    /// The page that it is in.
    pub page: &'a dyn SharedPage,
    /// Its first byte there.
    pub at: usize,
    /// Its bytes, all of them in the page.
    pub bytes: usize,
    /// Its checksum is left to us.
    pub blank: bool,
    /// Its checksum is right.
    pub validated: bool,
}

impl<M: SharedPage> Network<M> {
    /// Frames of dom0's own, from one of its ports. Those that are longer than [`WHOLE`] are not sent.
    pub fn send<F: AsRef<[u8]>>(
        &mut self,
        now_ns: u64,
        port: PortId,
        frames: &[F],
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> Turn {
        for frames in frames.chunks(FRAMES) {
            for (index, frame) in frames.iter().enumerate() {
                let (frame, at) = (frame.as_ref(), index * WHOLE);
                let place = copier.staging().get_mut(at..at + frame.len());
                let Some(place) = place.filter(|place| place.len() <= WHOLE) else { continue };
                place.copy_from_slice(frame);
                self.route(now_ns, port, frame, frame.len());
                // At most 2048.
                let parcel = Parcel::complete(at, frame.len() as u16);
                self.put_out(index, parcel, copier, &mut *local);
            }
            self.bring(&mut [], copier);
        }
        let mut turn = Turn::default();
        self.publish(&mut turn);
        turn
    }

    /// Frames that came in from outside by the card of the machine's that is behind a port. Those that are longer than [`WHOLE`] go
    /// nowhere.
    pub fn arrive<'a>(
        &mut self,
        now_ns: u64,
        port: PortId,
        frames: impl IntoIterator<Item = Arrived<'a>>,
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> Turn {
        let mut index = 0;
        for frame in frames {
            if index == FRAMES {
                self.bring(&mut [], copier);
                index = 0;
            }
            // One that has gone the short way needs its place no more.
            index += usize::from(self.arrive_one(now_ns, port, index, &frame, copier, &mut *local));
        }
        self.bring(&mut [], copier);
        let mut turn = Turn::default();
        self.publish(&mut turn);
        turn
    }

    /// Brings a frame where it goes; true when its place in the staging area is still needed.
    fn arrive_one(
        &mut self,
        now_ns: u64,
        port: PortId,
        index: usize,
        frame: &Arrived<'_>,
        copier: &mut impl Copier,
        local: Local<'_>,
    ) -> bool {
        let (bytes, at) = (frame.bytes, index * WHOLE);
        let source = Source::Own { page: frame.page, at: frame.at };
        if bytes > WHOLE || !source.bring(0..first(bytes), Place::Staging(at), copier) {
            return false;
        }
        let staged = first(bytes);
        let head = copier.staging().get(at..at + staged).unwrap_or_default();
        self.route(now_ns, port, head, bytes);
        let mut parcel = Parcel {
            staged,
            blank: frame.blank,
            validated: frame.validated,
            // At most 2048.
            ..Parcel::complete(at, bytes as u16)
        };
        // What came before it takes its pages first.
        if let ([to], true) = (&*self.ports, self.deliveries.is_empty())
            && let to = *to
            && self.hand_over(&parcel, to, &source, copier, &mut *local)
        {
            return false;
        }
        if !source.read_rest(&parcel, copier) {
            return false;
        }
        parcel.staged = bytes;
        self.put_out(index, parcel, copier, local);
        true
    }

    /// Brings a frame that is in the staging area to the ports to which it goes.
    fn put_out(&mut self, index: usize, mut parcel: Parcel, copier: &mut impl Copier, local: Local<'_>) {
        let ports = core::mem::take(&mut self.ports);
        let whole = parcel.at..parcel.at + parcel.staged;
        if self.several && ports.iter().any(|to| self.card(*to).is_some_and(|card| card.queues.len() > 1)) {
            parcel.hash = flow_hash(copier.staging().get(whole.clone()).unwrap_or_default());
        }
        if parcel.blank
            && ports.iter().any(|to| !self.takes(*to).blank_checksums)
            && let Some(frame) = copier.staging().get_mut(whole.clone())
        {
            netswitch::complete_checksum(frame);
            (parcel.blank, parcel.validated) = (false, true);
        }
        let alone = ports.len() == 1;
        for to in &ports {
            if self.card(*to).is_some() {
                self.reserve_or_miss(index, &parcel, *to, None, None);
            } else if let Some(frame) = copier.staging().get_mut(whole.clone()) {
                give(&mut *local, *to, frame, unfinished(&parcel), alone);
            }
        }
        self.ports = ports;
    }
}

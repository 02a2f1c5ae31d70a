//! The machine's network cards.
//!
//! One task of dom0's is a card's user: it takes what comes in by [`NetDevice::frame`] and gives the pages back. Anybody may send; what
//! a card has no room for is dropped, as on a wire.

use super::machine::{Interrupts, Machine};
use crate::backend::held::Shared;
use crate::say;
use crate::waiting::Bell;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::events::Events;
use guest_sdk::executor;
use guest_sdk::hardware::DmaPage;
use guest_sdk::ring::SharedPage as _;
use virtio::net::{About, Counters, Frame, HEADER, Offloads};
use virtio::{Error, Net, Segment, Transport};

/// Pages that a card receives into.
const BUFFERS: u16 = 128;
/// Pages kept for frames to send that are copied.
const POOL: usize = 128;

struct Driver {
    net: Net<&'static Machine, DmaPage>,
    /// Pages that frames to send are copied to.
    pool: Vec<DmaPage>,
    /// How many there are, in the pool and with the card.
    made: usize,
}

/// A network card of the machine's.
pub struct NetDevice {
    name: String,
    driver: Shared<Driver>,
    /// Rung when frames may have come in, and when the link has changed.
    bell: Bell,
    interrupts: Arc<AtomicU64>,
    about: &'static str,
    /// Users beside the one that has it for good.
    lent: AtomicU64,
}

/// A card that is used for a while by somebody else than whose it is.
pub struct Lent<'a>(&'a NetDevice);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.lent.fetch_sub(1, Ordering::AcqRel);
        self.0.bell.ring();
    }
}

impl Driver {
    /// Takes back what has left.
    fn reap(&mut self) {
        while let Some(page) = self.net.sent() {
            self.pool.push(page);
        }
    }

    /// A page to send from, which does not count while it is neither sent nor kept.
    fn page(&mut self) -> Option<DmaPage> {
        if self.pool.is_empty() {
            self.reap();
        }
        if let Some(page) = self.pool.pop() {
            self.made -= 1;
            return Some(page);
        }
        if self.made >= POOL { None } else { DmaPage::new().ok() }
    }

    fn keep(&mut self, page: DmaPage) {
        self.made += 1;
        self.pool.push(page);
    }

    fn send(&mut self, about: About, page: DmaPage, bytes: u16) -> bool {
        let segment = Segment::of(&page, 0, bytes);
        match self.net.send(about, &[segment], page) {
            Ok(()) => self.made += 1,
            Err((_, page)) => {
                self.keep(page);
                return false;
            }
        }
        true
    }
}

impl NetDevice {
    /// Brings a card up, and starts its task.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn start(
        name: &str,
        mut transport: Transport<&'static Machine>,
        events: &Events,
    ) -> Result<Arc<NetDevice>, Error> {
        // One for changes of its configuration, one for each queue.
        let (interrupts, vectors) = Interrupts::take(events, &mut transport, 3);
        let offloads = Offloads { send_checksum: true, receive_checksum: true, send_segments: false };
        let net = Net::start(transport, vectors, offloads, BUFFERS)?;
        let device = Arc::new(NetDevice {
            name: name.to_string(),
            driver: Shared::new(Driver { net, pool: Vec::new(), made: 0 }),
            bell: Bell::new(),
            interrupts: interrupts.counted(),
            about: interrupts.about(),
            lent: AtomicU64::new(0),
        });
        let asked = Arc::clone(&device);
        interrupts.listen(events, move || asked.driver.lock().net.device().transport().cause() != 0);
        executor::spawn(serve(Arc::clone(&device), interrupts));
        Ok(device)
    }

    /// As the shell knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        self.driver.lock().net.mac()
    }

    /// Bytes behind the Ethernet header of a frame at most.
    pub fn mtu(&self) -> u16 {
        self.driver.lock().net.mtu()
    }

    /// What it does for its user.
    pub fn offloads(&self) -> Offloads {
        self.driver.lock().net.offloads()
    }

    /// Whether somebody is at the other end.
    pub fn link_up(&self) -> bool {
        self.driver.lock().net.link_up()
    }

    /// What went through it.
    pub fn counters(&self) -> Counters {
        *self.driver.lock().net.counters()
    }

    /// How it interrupts, and how often it has.
    pub fn interrupts(&self) -> (&'static str, u64) {
        (self.about, self.interrupts.load(Ordering::Relaxed))
    }

    /// Where it is.
    pub fn place(&self) -> pci::Address {
        self.driver.lock().net.device().transport().address()
    }

    /// Whether it is broken for good.
    pub fn is_broken(&self) -> bool {
        self.driver.lock().net.device().is_broken()
    }

    /// In one line, for people.
    pub fn about(&self) -> String {
        let (mac, offloads) = (self.mac(), self.offloads());
        let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let link = if self.link_up() { "" } else { ", no link" };
        let checksums = match (offloads.send_checksum, offloads.receive_checksum) {
            (true, true) => ", checksums",
            (true, false) => ", checksums of what is sent",
            (false, true) => ", checksums of what comes in",
            (false, false) => "",
        };
        format!("{}, MTU {}{checksums}{link}, {}", mac.join(":"), self.mtu(), self.about)
    }

    /// It is taken out of the machine: nothing comes in and nothing is sent any more.
    pub fn remove(&self) {
        let mut driver = self.driver.lock();
        driver.net.remove();
        driver.reap();
        let fault = driver.net.device_mut().take_fault();
        drop(driver);
        self.bell.ring();
        if let Some(fault) = fault {
            say!("network card {}: {fault}; it is given up", self.name);
        }
    }

    /// Sends a frame of up to a page, copied; false when there is no room for it.
    pub fn send(&self, about: About, frame: &[u8]) -> bool {
        let mut driver = self.driver.lock();
        let Ok(bytes) = u16::try_from(frame.len()) else { return false };
        if usize::from(bytes) > 4096 {
            return false;
        }
        let Some(page) = driver.page() else { return false };
        page.write_bytes(0, frame);
        driver.send(about, page, bytes)
    }

    /// A page to write a frame to, for [`send_page`](Self::send_page); none when there is no room for another frame. It is the caller's
    /// until then: one that is lost is made anew.
    pub fn page(&self) -> Option<DmaPage> {
        self.driver.lock().page()
    }

    /// Takes back a page that nothing is sent from.
    pub fn keep(&self, page: DmaPage) {
        self.driver.lock().keep(page);
    }

    /// Sends the first bytes of a page; what there is no room for is dropped.
    pub fn send_page(&self, about: About, page: DmaPage, bytes: u16) {
        self.driver.lock().send(about, page, bytes);
    }

    /// Tells the card of all that was to be sent, and of pages that were given back.
    pub fn kick(&self) {
        self.driver.lock().net.kick();
    }

    /// Gives a page of a frame back to receive into.
    pub fn give_back(&self, page: DmaPage) {
        // A card that is broken wants none: it is freed.
        let _ = self.driver.lock().net.post(page);
    }

    /// Gives pages of frames back to receive into, and tells the card.
    pub fn give_all_back(&self, frames: &mut Vec<Frame<DmaPage>>) {
        let mut driver = self.driver.lock();
        for frame in frames.drain(..) {
            // A card that is broken wants none: it is freed.
            let _ = driver.net.post(frame.page);
        }
        driver.net.kick();
    }

    /// Gives the card new pages to receive into for so many that were lost.
    pub fn replace(&self, pages: usize) {
        let mut driver = self.driver.lock();
        for page in (0..pages).map_while(|_| DmaPage::new().ok()) {
            let _ = driver.net.post(page);
        }
        driver.net.kick();
    }

    /// Keeps frames from whoever takes them by [`NetDevice::frames`], as long as the value lives.
    pub fn lend(&self) -> Lent<'_> {
        self.lent.fetch_add(1, Ordering::AcqRel);
        Lent(self)
    }

    /// Waits for frames, and takes as many as there are, up to `most`: for the one whose card it is. Their bytes begin at [`HEADER`] of their
    /// pages, which go back by [`NetDevice::give_all_back`].
    pub async fn frames(&self, most: usize, frames: &mut Vec<Frame<DmaPage>>) {
        loop {
            let rings = self.bell.rings();
            if self.lent.load(Ordering::Acquire) == 0 {
                let mut driver = self.driver.lock();
                while frames.len() < most {
                    let Some(frame) = driver.net.received() else { break };
                    frames.push(frame);
                }
                if !frames.is_empty() {
                    return;
                }
                // Of pages that who had it lent gave back.
                driver.net.kick();
                if driver.net.listen(false) {
                    continue;
                }
            }
            self.bell.after(rings).await;
        }
    }

    /// Waits for the next frame. Its bytes begin at [`HEADER`] of its page, which goes back by [`NetDevice::give_back`].
    pub async fn frame(&self) -> Frame<DmaPage> {
        loop {
            let rings = self.bell.rings();
            {
                let mut driver = self.driver.lock();
                driver.net.kick();
                if let Some(frame) = driver.net.received() {
                    return frame;
                }
                if driver.net.listen(false) {
                    continue;
                }
            }
            self.bell.after(rings).await;
        }
    }

    /// Waits for the next frame, and copies as much of it as `to` holds; gives how much, and what is known of it.
    pub async fn receive(&self, to: &mut [u8]) -> (usize, About) {
        let frame = self.frame().await;
        let count = frame.bytes.min(to.len());
        frame.page.read_bytes(HEADER, to.get_mut(..count).unwrap_or_default());
        self.give_back(frame.page);
        (count, frame.about)
    }
}

/// A card's task: it wakes who waits for frames, and says what the card did wrong.
async fn serve(device: Arc<NetDevice>, mut interrupts: Interrupts) {
    loop {
        let config = interrupts.any(core::future::pending()).await;
        let (fault, link) = {
            let mut driver = device.driver.lock();
            let link = config && driver.net.changed();
            driver.reap();
            (driver.net.device_mut().take_fault(), link)
        };
        device.bell.ring();
        if let Some(fault) = fault {
            let then = if device.is_broken() { "it is given up" } else { "it was reset" };
            say!("network card {}: {fault}; {then}", device.name);
        }
        if link {
            say!("network card {}: link {}", device.name, if device.link_up() { "up" } else { "down" });
        }
        if interrupts.is_due() {
            interrupts.retarget(device.driver.lock().net.device().transport());
        }
    }
}

//! The machine's disks, shared by all who use them.
//!
//! A [`Storage`] is one user's. It takes any number of jobs of any length: what the device has no room for waits, what is longer
//! than a request goes in parts. The device is told of new requests by its own task, once that runs: as many as there are by then,
//! at one go.

use super::machine::{Interrupts, Machine};
use crate::backend::Page;
use crate::say;
use crate::units::Bytes;
use crate::waiting::Bell;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use blkback::disk::{Action as JobAction, Disk, DiskError, Done, GuestPage as _, Job, Properties};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::task::{Context, Poll, Waker};
use core::time::Duration;
use guest_sdk::events::Events;
use guest_sdk::hardware::DmaPage;
use guest_sdk::ring::SharedPage as _;
use guest_sdk::{executor, time};
use spin::Mutex;
use virtio::block::{Counters, Geometry, Rejected, SECTOR, Unflushed};
use virtio::{Action, Block, Error, IoError, Request, Segment, Transport};

/// Bytes that [`Storage::read`] and [`Storage::write`] move at once.
const AT_ONCE: usize = 128 * 1024;
const PAGE: usize = 4096;
/// How often it is looked whether a device still answers, and how many looks a request may take.
const BEAT: Duration = Duration::from_secs(5);
const PATIENCE: u32 = 6;

/// A disk of the machine's.
pub struct Device {
    name: String,
    driver: Mutex<Driver>,
    /// Something was submitted that the device has not been told of.
    untold: AtomicBool,
    removed: AtomicBool,
    bell: Bell,
    interrupts: Arc<AtomicU64>,
    about: &'static str,
}

struct Driver {
    block: Block<&'static Machine, Ticket>,
    /// What the device had no room for, in order.
    waiting: VecDeque<Ticket>,
    segments: Vec<Segment>,
}

/// A piece of work, and how far it has come.
struct Ticket {
    user: Arc<Mailbox>,
    work: Work,
    /// Of a flush: what it is to make durable.
    covered: Unflushed,
    action: Action,
    /// The next sector, and how many there are from it on; pieces that are done with.
    sector: u64,
    left: u64,
    pieces: usize,
    /// Sectors and pieces of the request that is under way.
    now: (u64, usize),
}

/// What the work is for, with the memory that it owns.
enum Work {
    Job(Job<Page>),
    Bytes(Arc<Shot>, Vec<DmaPage>, usize),
}

/// Where jobs of one user come back, and what else is known of that user.
#[derive(Default)]
struct Mailbox {
    done: Mutex<VecDeque<Done<Page>>>,
    waker: Mutex<Option<Waker>>,
    unflushed: Mutex<Unflushed>,
}

/// Pages that were lent, and how it went.
type Back = (Vec<DmaPage>, Result<(), DiskError>);

/// Where one piece of work comes back.
#[derive(Default)]
struct Shot {
    result: Mutex<Option<Back>>,
    bell: Bell,
}

/// A disk, for one user. A clone is another user: what one has submitted never comes back to the other.
pub struct Storage {
    device: Arc<Device>,
    mailbox: Arc<Mailbox>,
}

impl Ticket {
    /// Fills `segments` with those of the next request; `most` at most.
    fn next(&mut self, segments: &mut Vec<Segment>, geometry: &Geometry) {
        segments.clear();
        let (mut bytes, first, mut pieces) = (0u64, self.pieces, 0);
        match &self.work {
            Work::Job(job) => {
                for piece in job.pieces.get(first..).unwrap_or_default() {
                    let address = piece.page.machine_address().get() + u64::from(piece.offset);
                    let length = u32::from(piece.bytes);
                    // Pages side by side in the machine are one segment: the device has fewer to map.
                    if let Some(last) = segments.last_mut()
                        && last.address + u64::from(last.bytes) == address
                        && last.bytes + length <= geometry.segment_bytes
                    {
                        last.bytes += length;
                    } else if segments.len() < geometry.segments {
                        segments.push(Segment { address, bytes: length });
                    } else {
                        break;
                    }
                    bytes += u64::from(length);
                    pieces += 1;
                }
            }
            Work::Bytes(_, pages, all) => {
                let all =
                    pages.iter().zip((0..*all).step_by(PAGE)).map(|(page, at)| (page, (all - at).min(PAGE)));
                for (page, length) in all.skip(first).take(geometry.segments) {
                    segments.push(Segment::of(page, 0, length as u16));
                    bytes += length as u64;
                    pieces += 1;
                }
            }
        }
        let sectors = match self.action {
            Action::Read | Action::Write => bytes / SECTOR,
            Action::Flush => 0,
            Action::Discard { .. } => {
                let most = geometry.discard.map_or(1, |trim| u64::from(trim.sectors));
                let sectors = self.left.min(most);
                self.action = Action::Discard { sectors: sectors as u32 };
                sectors
            }
            Action::WriteZeroes { unmap, .. } => {
                let sectors = self.left.min(geometry.write_zeroes.map_or(1, u64::from));
                self.action = Action::WriteZeroes { sectors: sectors as u32, unmap };
                sectors
            }
        };
        self.now = (sectors, pieces);
    }

    /// Tells whoever wants to know.
    fn finish(self, result: Result<(), DiskError>) {
        match self.work {
            Work::Job(job) => {
                self.user.done.lock().push_back(Done { job, result });
                let waker = self.user.waker.lock().take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Work::Bytes(shot, pages, _) => {
                *shot.result.lock() = Some((pages, result));
                shot.bell.ring();
            }
        }
    }
}

fn error_of(error: IoError) -> DiskError {
    match error {
        IoError::Unsupported => DiskError::Unsupported,
        IoError::Failed | IoError::Reset => DiskError::Failed,
    }
}

impl Driver {
    /// Hands a piece of work to the device. What it has no room for comes back.
    fn start(&mut self, mut ticket: Ticket) -> Option<Ticket> {
        let Driver { block, segments, .. } = self;
        if ticket.action == Action::Flush && !block.geometry().flush {
            // Without a cache, what is done is durable.
            ticket.finish(Ok(()));
            return None;
        }
        if ticket.action == Action::Flush {
            ticket.user.unflushed.lock().begin(&mut ticket.covered);
        }
        ticket.next(segments, block.geometry());
        let request = Request { action: ticket.action, sector: ticket.sector, segments };
        match block.submit(&request, ticket) {
            Ok(()) => None,
            Err((Rejected::Full, ticket)) => Some(ticket),
            Err((Rejected::Unsupported, ticket)) => {
                ticket.finish(Err(DiskError::Unsupported));
                None
            }
            Err((_, ticket)) => {
                ticket.finish(Err(DiskError::Failed));
                None
            }
        }
    }

    /// Takes a new piece of work.
    fn take(&mut self, ticket: Ticket) {
        if !self.waiting.is_empty() {
            return self.waiting.push_back(ticket);
        }
        if let Some(ticket) = self.start(ticket) {
            self.waiting.push_back(ticket);
        }
    }

    /// Gives back what is done, and goes on with what waits. True when there is something to tell the device.
    fn turn(&mut self) -> bool {
        let mut more = false;
        while let Some((mut ticket, result)) = self.block.completion() {
            let (sectors, pieces) = ticket.now;
            ticket.sector += sectors;
            ticket.left = ticket.left.saturating_sub(sectors);
            ticket.pieces += pieces;
            let revivals = self.block.device().revivals();
            match (ticket.action, result) {
                (_, Err(_)) | (Action::Read, Ok(())) => {}
                (Action::Flush, Ok(())) if !ticket.covered.is_durable(revivals) => {
                    ticket.finish(Err(DiskError::Failed));
                    continue;
                }
                (Action::Flush, Ok(())) => {}
                (_, Ok(())) => ticket.user.unflushed.lock().wrote(revivals),
            }
            match result {
                Ok(()) if ticket.left > 0 => {
                    more = true;
                    // It has been under way: it goes before what has not.
                    if let Some(ticket) = self.start(ticket) {
                        self.waiting.push_front(ticket);
                    }
                }
                result => ticket.finish(result.map_err(error_of)),
            }
        }
        while let Some(ticket) = self.waiting.pop_front() {
            more = true;
            if let Some(ticket) = self.start(ticket) {
                self.waiting.push_front(ticket);
                break;
            }
        }
        more
    }
}

impl Device {
    /// Brings a disk up, and starts its task.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn start(
        name: &str,
        mut transport: Transport<&'static Machine>,
        events: &Events,
    ) -> Result<Arc<Device>, Error> {
        // One for changes of its configuration, one for its queue.
        let (interrupts, vectors) = Interrupts::take(events, &mut transport, 2);
        let block = Block::start(transport, vectors)?;
        let device = Arc::new(Device {
            name: name.to_string(),
            driver: Mutex::new(Driver { block, waiting: VecDeque::new(), segments: Vec::new() }),
            untold: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            bell: Bell::new(),
            interrupts: interrupts.counted(),
            about: interrupts.about(),
        });
        let asked = Arc::clone(&device);
        interrupts.listen(events, move || asked.driver.lock().block.device().transport().cause() != 0);
        executor::spawn(serve(Arc::clone(&device), interrupts));
        executor::spawn(watch(Arc::downgrade(&device)));
        Ok(device)
    }

    /// As the shell knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn geometry(&self) -> Geometry {
        *self.driver.lock().block.geometry()
    }

    /// What went over it.
    pub fn counters(&self) -> Counters {
        *self.driver.lock().block.counters()
    }

    /// How it interrupts, and how often it has.
    pub fn interrupts(&self) -> (&'static str, u64) {
        (self.about, self.interrupts.load(Ordering::Relaxed))
    }

    /// Where it is.
    pub fn place(&self) -> pci::Address {
        self.driver.lock().block.device().transport().address()
    }

    /// Whether it is broken for good.
    pub fn is_broken(&self) -> bool {
        self.driver.lock().block.device().is_broken()
    }

    /// In one line, for people.
    pub fn about(&self) -> String {
        let geometry = self.geometry();
        let mut text = format!("{}", Bytes::new(geometry.sectors.saturating_mul(SECTOR)));
        if geometry.readonly {
            text += ", read only";
        }
        for (is, what) in [
            (geometry.flush, "flush"),
            (geometry.discard.is_some(), "discard"),
            (geometry.write_zeroes.is_some(), "zeros"),
        ] {
            if is {
                text += ", ";
                text += what;
            }
        }
        text + ", " + self.about
    }

    /// Resets it and starts it again: what is under way fails.
    pub fn restart(&self) {
        self.driver.lock().block.restart();
        self.bell.ring();
    }

    /// It is taken out of the machine: what is under way fails, and all that comes.
    pub fn remove(&self) {
        self.driver.lock().block.remove();
        self.removed.store(true, Ordering::Release);
        self.bell.ring();
    }

    fn take(&self, ticket: Ticket) {
        self.driver.lock().take(ticket);
        if !self.untold.swap(true, Ordering::AcqRel) {
            self.bell.ring();
        }
    }

    /// Gives back what is done, and tells the device what is new.
    fn turn(&self) {
        let mut driver = self.driver.lock();
        let more = driver.turn();
        if self.untold.swap(false, Ordering::AcqRel) || more {
            driver.block.kick();
        }
    }
}

/// A disk's task: it wakes those whose work is done, and tells the device what is to be done.
async fn serve(device: Arc<Device>, mut interrupts: Interrupts) {
    loop {
        let rings = device.bell.rings();
        device.turn();
        let (fault, more) = {
            let mut driver = device.driver.lock();
            (driver.block.device_mut().take_fault(), driver.block.listen())
        };
        if let Some(fault) = fault {
            let then = if device.is_broken() { "it is given up" } else { "it was reset" };
            say!("disk {}: {fault}; {then}", device.name);
        }
        if device.removed.load(Ordering::Acquire) {
            // All that was under way is given back, and what comes is refused at once.
            return;
        }
        if more {
            // Nobody will come to tell of this.
            executor::yield_now().await;
            continue;
        }
        if interrupts.any(device.bell.after(rings)).await {
            let mut driver = device.driver.lock();
            if driver.block.changed() {
                let sectors = driver.block.geometry().sectors;
                say!("disk {}: it has {} now", device.name, Bytes::new(sectors.saturating_mul(SECTOR)));
            }
        }
        if interrupts.is_due() {
            interrupts.retarget(device.driver.lock().block.device().transport());
        }
    }
}

/// Has a disk reset that does not answer.
async fn watch(device: Weak<Device>) {
    let mut beat = time::Ticker::every(BEAT);
    loop {
        beat.tick().await;
        let Some(device) = device.upgrade().filter(|device| !device.is_broken()) else { return };
        let mut driver = device.driver.lock();
        let before = driver.block.device().revivals();
        driver.block.tick(PATIENCE);
        let reset = driver.block.device().is_broken() || driver.block.device().revivals() != before;
        drop(driver);
        if reset {
            device.bell.ring();
        }
    }
}

impl Clone for Storage {
    fn clone(&self) -> Self {
        Storage::new(&self.device)
    }
}

impl Storage {
    /// A user of `device`.
    pub fn new(device: &Arc<Device>) -> Storage {
        Storage { device: Arc::clone(device), mailbox: Arc::default() }
    }

    /// The disk.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it is. Its size may change while it is in use.
    pub fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn take(&self, work: Work, action: Action, sector: u64, left: u64) {
        let (user, covered) = (Arc::clone(&self.mailbox), Unflushed::default());
        self.device.take(Ticket { user, work, covered, action, sector, left, pieces: 0, now: (0, 0) });
    }

    /// Takes a job; it comes back from [`Storage::poll_done`], in any order.
    pub fn submit(&self, job: Job<Page>) {
        let bytes = job.pieces.iter().map(|piece| u64::from(piece.bytes)).sum::<u64>();
        let (action, left) = match job.action {
            JobAction::Read => (Action::Read, bytes / SECTOR),
            JobAction::Write => (Action::Write, bytes / SECTOR),
            JobAction::Flush => (Action::Flush, 0),
            JobAction::Discard { sectors } => (Action::Discard { sectors: 0 }, sectors),
        };
        let sector = job.sector;
        self.take(Work::Job(job), action, sector, left);
    }

    /// The next job that is done.
    pub fn poll_done(&self, context: &mut Context<'_>) -> Poll<Done<Page>> {
        let next = || self.mailbox.done.lock().pop_front();
        if let Some(done) = next() {
            return Poll::Ready(done);
        }
        // Nobody has to wait for an interrupt of what is done already.
        self.device.turn();
        if let Some(done) = next() {
            return Poll::Ready(done);
        }
        *self.mailbox.waker.lock() = Some(context.waker().clone());
        // It may have come in between.
        next().map_or(Poll::Pending, Poll::Ready)
    }

    /// Has the device do something with pages of ours.
    async fn run(
        &self,
        action: Action,
        sector: u64,
        left: u64,
        pages: Vec<DmaPage>,
        bytes: usize,
    ) -> Result<Vec<DmaPage>, DiskError> {
        let shot = Arc::new(Shot::default());
        self.take(Work::Bytes(Arc::clone(&shot), pages, bytes), action, sector, left);
        loop {
            let rings = shot.bell.rings();
            if let Some((pages, result)) = shot.result.lock().take() {
                return result.map(|()| pages);
            }
            shot.bell.after(rings).await;
        }
    }

    /// Pages for so many bytes.
    fn pages(bytes: usize) -> Result<Vec<DmaPage>, DiskError> {
        (0..bytes.div_ceil(PAGE)).map(|_| DmaPage::new().map_err(|_| DiskError::NoSpace)).collect()
    }

    fn sectors_of(bytes: usize) -> Result<u64, DiskError> {
        let bytes = bytes as u64;
        if bytes.is_multiple_of(SECTOR) { Ok(bytes / SECTOR) } else { Err(DiskError::Unsupported) }
    }

    /// Fills pages with sectors, without a copy, and gives them back.
    ///
    /// # Errors
    /// As [`Storage::read`]; the pages are freed then.
    pub async fn read_pages(&self, sector: u64, pages: Vec<DmaPage>) -> Result<Vec<DmaPage>, DiskError> {
        let bytes = pages.len() * PAGE;
        self.run(Action::Read, sector, bytes as u64 / SECTOR, pages, bytes).await
    }

    /// Writes pages to sectors, without a copy, and gives them back.
    ///
    /// # Errors
    /// As [`Storage::write`]; the pages are freed then.
    pub async fn write_pages(&self, sector: u64, pages: Vec<DmaPage>) -> Result<Vec<DmaPage>, DiskError> {
        let bytes = pages.len() * PAGE;
        self.run(Action::Write, sector, bytes as u64 / SECTOR, pages, bytes).await
    }

    /// Reads whole sectors.
    ///
    /// # Errors
    /// `Unsupported` when `to` is not of whole sectors, `Failed` also when they are not on the disk, `NoSpace` without memory.
    pub async fn read(&self, sector: u64, to: &mut [u8]) -> Result<(), DiskError> {
        Self::sectors_of(to.len())?;
        let mut sector = sector;
        for part in to.chunks_mut(AT_ONCE) {
            let sectors = Self::sectors_of(part.len())?;
            let pages = Self::pages(part.len())?;
            let pages = self.run(Action::Read, sector, sectors, pages, part.len()).await?;
            for (page, part) in pages.iter().zip(part.chunks_mut(PAGE)) {
                page.read_bytes(0, part);
            }
            sector += sectors;
        }
        Ok(())
    }

    /// Writes whole sectors. They are durable after [`Storage::flush`].
    ///
    /// # Errors
    /// As [`Storage::read`]; `Failed` for a disk that is only to be read, too.
    pub async fn write(&self, sector: u64, from: &[u8]) -> Result<(), DiskError> {
        Self::sectors_of(from.len())?;
        let mut sector = sector;
        for part in from.chunks(AT_ONCE) {
            let sectors = Self::sectors_of(part.len())?;
            let pages = Self::pages(part.len())?;
            for (page, part) in pages.iter().zip(part.chunks(PAGE)) {
                page.write_bytes(0, part);
            }
            self.run(Action::Write, sector, sectors, pages, part.len()).await?;
            sector += sectors;
        }
        Ok(())
    }

    /// Makes durable all writes that were done before.
    ///
    /// # Errors
    /// `Failed`.
    pub async fn flush(&self) -> Result<(), DiskError> {
        self.run(Action::Flush, 0, 0, Vec::new(), 0).await.map(drop)
    }

    /// Lets the disk forget sectors.
    ///
    /// # Errors
    /// `Unsupported` when it does not do that, `Failed`.
    pub async fn discard(&self, sector: u64, sectors: u64) -> Result<(), DiskError> {
        self.run(Action::Discard { sectors: 0 }, sector, sectors, Vec::new(), 0).await.map(drop)
    }

    /// Makes sectors zeros, without sending them where the disk can do that.
    ///
    /// # Errors
    /// As [`Storage::write`].
    pub async fn write_zeroes(&self, sector: u64, sectors: u64) -> Result<(), DiskError> {
        let action = Action::WriteZeroes { sectors: 0, unmap: true };
        match self.run(action, sector, sectors, Vec::new(), 0).await {
            Err(DiskError::Unsupported) => {
                let zeros = alloc::vec![0; AT_ONCE.min((sectors * SECTOR) as usize)];
                let (mut sector, end) = (sector, sector + sectors);
                while sector < end {
                    let now = (end - sector).min(zeros.len() as u64 / SECTOR);
                    self.write(sector, zeros.get(..(now * SECTOR) as usize).unwrap_or(&[])).await?;
                    sector += now;
                }
                Ok(())
            }
            result => result.map(drop),
        }
    }
}

impl Disk<Page> for Storage {
    fn properties(&self) -> Properties {
        let geometry = self.geometry();
        let trim = geometry.discard.map(|trim| trim.alignment.saturating_mul(SECTOR as u32));
        Properties {
            sectors: geometry.sectors,
            readonly: geometry.readonly,
            discard_granularity: trim.filter(|_| !geometry.readonly),
            physical_sector: geometry.physical_sector,
        }
    }

    fn submit(&mut self, job: Job<Page>) -> Option<Done<Page>> {
        Storage::submit(self, job);
        None
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<Page>> {
        Storage::poll_done(self, context)
    }
}

//! Disks: the front end of block devices (public/io/blkif.h).
//!
//! ```ignore
//! let store = SharedStore::new(domain.xenstore()?);
//! let disk = Disk::open(&store, "xvda").await?;
//! let mut sector = [0; 512];
//! disk.read(0, &mut sector).await?;
//! disk.write(8, &sector).await?;
//! disk.flush().await?;
//! ```
//! Any number of tasks may use a disk at once; their requests are on their way together, as many as the ring has room for.
//!
//! The back end sees what is in a [`Buffer`] and nothing else. [`Disk::read`] and [`Disk::write`] copy between it and any memory;
//! [`Disk::read_buffer`] and [`Disk::write_buffer`] do without a copy. A buffer's pages stay granted as long as the disk is open, so a
//! back end that keeps pages mapped does nothing for them from the second time on.
//!
//! When the back end goes away and comes back, the disk connects anew, and what was not answered is asked again. Reading or writing
//! sectors twice does no harm. Only when the device is taken away do requests fail with [`BlockError::Gone`].

use crate::events::{Channel, Events, Notifier};
use crate::executor;
use crate::grants::{GrantError, GrantedPages};
use crate::memory::Access;
use crate::ring::{Front, SharedPage};
use crate::sync::{Bell, First, first};
use crate::time;
use crate::xenbus::{Frontend, XenbusError, XenbusState};
use crate::xenstore::{SharedStore, StoreError};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::task::{Poll, Waker};
use core::time::Duration;
use hypercall_abi::io::blkif::{
    ABI, BlkifOp, BlkifRequest, BlkifRequestDiscard, BlkifRequestIndirect, BlkifResponse, BlkifSegment,
    MAX_INDIRECT_PAGES_PER_REQUEST, MAX_SEGMENTS_PER_REQUEST, RSP_EOPNOTSUPP, RSP_OKAY, SECTOR_SIZE,
    SEGMENTS_PER_INDIRECT_PAGE, VDISK_READONLY, keys,
};
use hypercall_abi::{DomId, Errno, GrantRef, PAGE_SIZE};
use spin::Mutex;
use zerocopy::{Immutable, IntoBytes};

/// Most segments of a request of ours, whatever the back end offers: 256 KiB.
const MOST_SEGMENTS: usize = 64;
const SECTORS_PER_PAGE: u64 = (PAGE_SIZE / SECTOR_SIZE) as u64;
/// How long opening waits for the back end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// There is no such disk, or it was taken away.
    Gone,
    /// The back end did not come within ten seconds.
    Timeout,
    /// The disk does not do this: writing to one that is only read, discarding, flushing.
    Unsupported,
    /// Sectors beyond its end, no whole sectors, or none.
    Range,
    /// It was tried, and failed.
    Failed,
    /// No memory, or no grants, for what is to be done.
    Memory(GrantError),
    /// What the back end says makes no sense.
    Backend(XenbusError),
}

impl From<XenbusError> for BlockError {
    fn from(error: XenbusError) -> Self {
        match error {
            XenbusError::Gone => Self::Gone,
            error => Self::Backend(error),
        }
    }
}

impl From<StoreError> for BlockError {
    fn from(error: StoreError) -> Self {
        Self::Backend(XenbusError::Store(error))
    }
}

impl From<GrantError> for BlockError {
    fn from(error: GrantError) -> Self {
        Self::Memory(error)
    }
}

impl From<Errno> for BlockError {
    fn from(errno: Errno) -> Self {
        Self::Memory(GrantError::Call(errno))
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("there is no such disk, or it was taken away"),
            Self::Timeout => f.write_str("the disk's back end does not answer"),
            Self::Unsupported => f.write_str("the disk cannot do this"),
            Self::Range => f.write_str("these are no sectors of the disk"),
            Self::Failed => f.write_str("the disk failed"),
            Self::Memory(error) => write!(f, "no memory for the disk: {error}"),
            Self::Backend(error) => write!(f, "the disk's back end: {error}"),
        }
    }
}

impl core::error::Error for BlockError {}

/// What a disk is, as its back end says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// It is only read.
    pub readonly: bool,
    /// [`Disk::flush`] is there.
    pub flush: bool,
    /// [`Disk::discard`] is there.
    pub discard: bool,
    /// Bytes of one request at most.
    pub max_request: usize,
    /// Requests on their way at once.
    pub depth: u32,
    /// The back end keeps pages mapped.
    pub persistent: bool,
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Pages of the ring, as a power of two; less when the back end has less. A page holds 32 requests.
    pub ring_page_order: u32,
}

/// Pages of a buffer, and the list of them that indirect requests name.
#[derive(Debug)]
struct Pages {
    data: GrantedPages,
    /// It says the segments of a request of so many bytes. It stays with its pages: nothing is to be written for the next request.
    list: Option<(GrantedPages, usize)>,
}

impl Pages {
    /// The segments of a request of so many bytes.
    fn segments(&self, bytes: usize) -> impl Iterator<Item = BlkifSegment> {
        let sectors = bytes / SECTOR_SIZE;
        self.data.references().iter().enumerate().map_while(move |(page, &gref)| {
            let left = sectors.checked_sub(page * SECTORS_PER_PAGE as usize).filter(|&left| left > 0)?;
            let last_sect = left.min(SECTORS_PER_PAGE as usize) as u8 - 1;
            Some(BlkifSegment { gref, first_sect: 0, last_sect, pad0: 0 })
        })
    }

    /// The page with the list of a request's segments.
    fn list(&mut self, bytes: usize, backend_id: DomId) -> Result<GrantRef, BlockError> {
        const { assert!(MOST_SEGMENTS <= SEGMENTS_PER_INDIRECT_PAGE) };
        let (page, said) = match self.list.take() {
            Some(list) => list,
            None => (GrantedPages::new(1, backend_id, Access::ReadWrite)?, 0),
        };
        if said != bytes {
            let mut segments = [BlkifSegment::default(); MOST_SEGMENTS];
            for (to, segment) in segments.iter_mut().zip(self.segments(bytes)) {
                *to = segment;
            }
            page.write_bytes(0, segments.as_bytes());
        }
        let (page, _) = self.list.insert((page, bytes));
        page.references().first().copied().ok_or(BlockError::Failed)
    }
}

/// Memory that the disk's back end may read and write: shared memory, as long as the disk is open.
#[derive(Debug)]
pub struct Buffer {
    pages: Option<Pages>,
    bytes: usize,
    /// Where the pages go back to.
    pool: Arc<Mutex<Vec<Pages>>>,
}

impl Buffer {
    /// Bytes in it: whole sectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never: it has a sector at least.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// When they are not all inside.
    pub fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.pages().read_bytes(offset, to);
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// When they are not all inside.
    pub fn write_bytes(&mut self, offset: usize, from: &[u8]) {
        self.pages().write_bytes(offset, from);
    }

    fn pages(&self) -> &GrantedPages {
        match &self.pages {
            Some(pages) => &pages.data,
            None => unreachable!("only dropping takes them"),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // The back end may have it mapped for ever: it is used again, not freed.
        self.pool.lock().extend(self.pages.take());
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Read,
    Write,
    Flush,
    Discard { sectors: u64 },
}

/// A request, from being asked to its answer being taken.
#[derive(Debug)]
struct Slot {
    wish: Wish,
    sector: u64,
    buffer: Option<Buffer>,
    /// It is in the ring.
    sent: bool,
    answer: Option<Result<(), BlockError>>,
    waker: Option<Waker>,
    /// Nobody waits for the answer.
    forgotten: bool,
}

#[derive(Debug)]
struct Connection {
    ring: Front<GrantedPages, BlkifRequest, BlkifResponse>,
    notifier: Notifier,
    /// Most segments of an indirect request; 0 when there are none.
    indirect: usize,
    backend_id: DomId,
}

#[derive(Debug)]
enum Link {
    Up(Connection),
    /// The back end is away, and may come back.
    Down,
    Gone,
}

#[derive(Debug)]
struct State {
    link: Link,
    info: Info,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Several were woken by answers: what they ask next is shown to the back end together, by who has woken them.
    gathering: bool,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Slots became free, or the link has changed.
    bell: Bell,
    /// Buffers that nobody has, by their pages.
    buffers: Mutex<Vec<Arc<Mutex<Vec<Pages>>>>>,
    /// The number of the virtual device.
    device: u32,
    backend_id: DomId,
    /// The task that answers is to stop: it has lost its connection, or the disk is closed.
    stop: Bell,
}

/// A disk. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Disk {
    inner: Arc<Inner>,
}

/// The number of a virtual device by its name, as in `xvda` and `xvdb2` (Xen's docs/man/xen-vbd-interface); any number is its own.
#[must_use]
pub fn device_number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let rest = name.strip_prefix("xvd")?;
    let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
    let (disk, partition) = rest.split_at_checked(letters)?;
    // As numbers without a zero: a, …, z, aa, ab, …
    let disk = disk
        .bytes()
        .try_fold(0u32, |number, letter| number.checked_mul(26)?.checked_add(u32::from(letter - b'a') + 1))?;
    let disk = disk.checked_sub(1)?;
    let partition: u32 = if partition.is_empty() { 0 } else { partition.parse().ok()? };
    match (disk, partition) {
        (0..16, 0..16) => Some(202 << 8 | disk << 4 | partition),
        (0..0x10_0000, 0..256) => Some(1 << 28 | disk << 8 | partition),
        _ => None,
    }
}

impl Disk {
    /// Opens a disk by its name, `xvda` or a number, and waits until it can be used.
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn open(store: &SharedStore, name: &str) -> Result<Self, BlockError> {
        Self::open_with(store, name, Options::default()).await
    }

    /// As [`open`](Self::open).
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn open_with(store: &SharedStore, name: &str, options: Options) -> Result<Self, BlockError> {
        let device = device_number(name).ok_or(BlockError::Gone)?;
        let open = async {
            let mut front = Frontend::open(store, &format!("device/vbd/{device}")).await?;
            let connected = connect(&mut front, device, options).await?;
            Ok::<_, BlockError>((front, connected))
        };
        let (front, (connection, channel, info)) = match first(open, time::after(PATIENCE)).await {
            First::One(result) => result?,
            First::Other(()) => return Err(BlockError::Timeout),
        };
        let inner = Arc::new(Inner {
            state: Mutex::new(State {
                link: Link::Up(connection),
                info,
                slots: Vec::new(),
                free: Vec::new(),
                gathering: false,
            }),
            bell: Bell::new(),
            buffers: Mutex::new(Vec::new()),
            device,
            backend_id: front.backend_id(),
            stop: Bell::new(),
        });
        executor::spawn(answers(Arc::clone(&inner), channel));
        executor::spawn(follow(Arc::clone(&inner), front, options));
        Ok(Self { inner })
    }

    /// What it is now; its size may change.
    #[must_use]
    pub fn info(&self) -> Info {
        self.inner.state.lock().info
    }

    /// Memory for requests of `bytes`, which are whole sectors; its content is anything.
    ///
    /// # Errors
    /// [`BlockError::Range`] for no whole sectors or more than [`Info::max_request`], [`BlockError::Memory`].
    pub fn buffer(&self, bytes: usize) -> Result<Buffer, BlockError> {
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_SIZE) || bytes > self.info().max_request {
            return Err(BlockError::Range);
        }
        let pages = bytes.div_ceil(PAGE_SIZE);
        let pool = {
            let mut buffers = self.inner.buffers.lock();
            if buffers.len() <= pages {
                buffers.resize_with(pages + 1, Arc::default);
            }
            buffers.get(pages).cloned().unwrap_or_default()
        };
        let known = pool.lock().pop();
        let pages = match known {
            Some(pages) => pages,
            None => Pages {
                data: GrantedPages::new(pages, self.inner.backend_id, Access::ReadWrite)?,
                list: None,
            },
        };
        Ok(Buffer { pages: Some(pages), bytes, pool })
    }

    /// Fills a buffer with the sectors from `sector` on.
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn read_buffer(&self, sector: u64, buffer: Buffer) -> Result<Buffer, BlockError> {
        let buffer = self.ask(Wish::Read, sector, Some(buffer)).await?;
        buffer.ok_or(BlockError::Failed)
    }

    /// Writes a buffer to the sectors from `sector` on. It is durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn write_buffer(&self, sector: u64, buffer: Buffer) -> Result<Buffer, BlockError> {
        let buffer = self.ask(Wish::Write, sector, Some(buffer)).await?;
        buffer.ok_or(BlockError::Failed)
    }

    /// Reads whole sectors from `sector` on.
    ///
    /// # Errors
    /// [`BlockError`]; what was read before is there.
    pub async fn read(&self, sector: u64, bytes: &mut [u8]) -> Result<(), BlockError> {
        let most = self.check(bytes.len())?;
        for (sector, part) in parts(sector, bytes.chunks_mut(most), most) {
            let buffer = self.read_buffer(sector, self.buffer(part.len())?).await?;
            buffer.read_bytes(0, part);
        }
        Ok(())
    }

    /// Writes whole sectors from `sector` on.
    ///
    /// # Errors
    /// [`BlockError`]; what was written before is there.
    pub async fn write(&self, sector: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let most = self.check(bytes.len())?;
        for (sector, part) in parts(sector, bytes.chunks(most), most) {
            let mut buffer = self.buffer(part.len())?;
            buffer.write_bytes(0, part);
            self.write_buffer(sector, buffer).await?;
        }
        Ok(())
    }

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] when the back end has no such operation.
    pub async fn flush(&self) -> Result<(), BlockError> {
        self.ask(Wish::Flush, 0, None).await.map(drop)
    }

    /// Lets the disk forget sectors.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] when the back end has no such operation.
    pub async fn discard(&self, sector: u64, sectors: u64) -> Result<(), BlockError> {
        self.ask(Wish::Discard { sectors }, sector, None).await.map(drop)
    }

    /// Bytes of one request at most, for so many bytes in whole sectors.
    fn check(&self, bytes: usize) -> Result<usize, BlockError> {
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_SIZE) {
            return Err(BlockError::Range);
        }
        Ok(self.info().max_request.max(SECTOR_SIZE))
    }

    async fn ask(
        &self,
        wish: Wish,
        sector: u64,
        buffer: Option<Buffer>,
    ) -> Result<Option<Buffer>, BlockError> {
        let mut wanted = Some((wish, sector, buffer));
        let slot = loop {
            let seen = self.inner.bell.rings();
            if let Some(slot) = self.inner.state.lock().begin(self.inner.device, &mut wanted)? {
                break slot;
            }
            self.inner.bell.after(seen).await;
        };
        Waiting { inner: &self.inner, slot: Some(slot) }.await
    }
}

/// Pieces of a transfer with the sectors where they begin.
fn parts<T>(sector: u64, chunks: impl Iterator<Item = T>, most: usize) -> impl Iterator<Item = (u64, T)> {
    chunks
        .enumerate()
        .map(move |(number, part)| (sector.saturating_add((number * most / SECTOR_SIZE) as u64), part))
}

/// Waits for the answer to a request.
struct Waiting<'a> {
    inner: &'a Inner,
    slot: Option<usize>,
}

impl Future for Waiting<'_> {
    type Output = Result<Option<Buffer>, BlockError>;

    fn poll(
        mut self: core::pin::Pin<&mut Self>,
        context: &mut core::task::Context<'_>,
    ) -> Poll<Self::Output> {
        let Some(number) = self.slot else { return Poll::Ready(Err(BlockError::Failed)) };
        let mut state = self.inner.state.lock();
        let Some(Some(slot)) = state.slots.get_mut(number) else {
            return Poll::Ready(Err(BlockError::Failed));
        };
        let Some(answer) = slot.answer.take() else {
            match &slot.waker {
                Some(waker) if waker.will_wake(context.waker()) => {}
                _ => slot.waker = Some(context.waker().clone()),
            }
            return Poll::Pending;
        };
        let buffer = slot.buffer.take();
        let waited_for = state.release(number);
        drop(state);
        if waited_for {
            self.inner.bell.ring();
        }
        self.slot = None;
        Poll::Ready(answer.map(|()| buffer))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(number) = self.slot else { return };
        let mut state = self.inner.state.lock();
        let Some(Some(slot)) = state.slots.get_mut(number) else { return };
        // The back end may still write to its buffer: it stays until there is an answer.
        slot.forgotten = true;
        slot.waker = None;
        let free = slot.answer.is_some() && state.release(number);
        drop(state);
        if free {
            self.inner.bell.ring();
        }
    }
}

impl State {
    /// Takes a slot for a request and sends it, if there is a slot.
    fn begin(
        &mut self,
        device: u32,
        wanted: &mut Option<(Wish, u64, Option<Buffer>)>,
    ) -> Result<Option<usize>, BlockError> {
        if matches!(self.link, Link::Gone) {
            return Err(BlockError::Gone);
        }
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.slots.len() < self.info.depth as usize => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return Ok(None),
        };
        let Some((wish, sector, buffer)) = wanted.take() else { return Err(BlockError::Failed) };
        let slot = Slot { wish, sector, buffer, sent: false, answer: None, waker: None, forgotten: false };
        if let Some(place) = self.slots.get_mut(number) {
            *place = Some(slot);
        }
        if let Link::Up(connection) = &mut self.link
            && let Some(Some(slot)) = self.slots.get_mut(number)
        {
            connection.send(number, device, slot);
            if !self.gathering {
                connection.publish();
            }
        }
        Ok(Some(number))
    }

    /// Gives a slot up; true when somebody may wait for one.
    fn release(&mut self, number: usize) -> bool {
        if let Some(slot) = self.slots.get_mut(number) {
            *slot = None;
        }
        self.free.push(number);
        self.free.len() == 1
    }

    /// Takes the answers that have come and wakes who waits for them; true when there may be room for others. An error when the ring is broken.
    fn take_answers(&mut self) -> Result<bool, crate::ring::Corrupt> {
        let (mut freed, mut woken) = (false, 0);
        loop {
            let Link::Up(connection) = &mut self.link else { return Ok(freed) };
            let Some(response) = connection.ring.pop()? else {
                if connection.ring.prepare_to_wait() {
                    continue;
                }
                self.gathering = woken > 1;
                return Ok(freed);
            };
            let number = response.id as usize;
            // An answer to what was not asked is nobody's.
            let Some(Some(slot)) =
                self.slots.get_mut(number).filter(|slot| slot.as_ref().is_some_and(|slot| slot.sent))
            else {
                continue;
            };
            slot.sent = false;
            slot.answer = Some(match response.status {
                RSP_OKAY => Ok(()),
                RSP_EOPNOTSUPP => Err(BlockError::Unsupported),
                _ => Err(BlockError::Failed),
            });
            if let Some(waker) = slot.waker.take() {
                waker.wake();
                woken += 1;
            }
            if slot.forgotten {
                freed |= self.release(number);
            }
        }
    }

    /// Shows the back end what those have asked that were woken together.
    fn show_gathered(&mut self) {
        self.gathering = false;
        if let Link::Up(connection) = &mut self.link {
            connection.publish();
        }
    }

    /// Ends all that waits with an error.
    fn fail_all(&mut self, error: &BlockError) {
        self.link = Link::Gone;
        for number in 0..self.slots.len() {
            let Some(Some(slot)) = self.slots.get_mut(number) else { continue };
            slot.sent = false;
            slot.answer.get_or_insert_with(|| Err(error.clone()));
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
            if slot.forgotten {
                self.release(number);
            }
        }
    }
}

/// One form of request in the bytes of any.
fn widen(form: &(impl IntoBytes + Immutable)) -> BlkifRequest {
    let mut request = BlkifRequest::default();
    let (bytes, from) = (request.as_mut_bytes(), form.as_bytes());
    if let Some(bytes) = bytes.get_mut(..from.len()) {
        bytes.copy_from_slice(from);
    }
    request
}

impl Connection {
    /// Puts a request into the ring, unseen. There is room: slots are no more than the ring has.
    fn send(&mut self, number: usize, device: u32, slot: &mut Slot) {
        let (id, sector_number, handle) = (number as u64, slot.sector, device as u16);
        let request = match (slot.wish, &mut slot.buffer) {
            (Wish::Flush, _) => Ok(BlkifRequest {
                operation: BlkifOp::FlushDiskcache.number() as u8,
                handle,
                id,
                ..Default::default()
            }),
            (Wish::Discard { sectors }, _) => Ok(widen(&BlkifRequestDiscard {
                operation: BlkifOp::Discard.number() as u8,
                handle,
                id,
                sector_number,
                nr_sectors: sectors,
                ..Default::default()
            })),
            (wish, Some(buffer)) => {
                let operation = if wish == Wish::Read { BlkifOp::Read } else { BlkifOp::Write };
                self.transfer(operation.number() as u8, id, sector_number, handle, buffer)
            }
            (_, None) => Err(BlockError::Failed),
        };
        match request.map(|request| self.ring.push(request)) {
            Ok(Ok(())) => slot.sent = true,
            Ok(Err(_)) => slot.answer = Some(Err(BlockError::Failed)),
            Err(error) => slot.answer = Some(Err(error)),
        }
    }

    fn transfer(
        &self,
        operation: u8,
        id: u64,
        sector_number: u64,
        handle: u16,
        buffer: &mut Buffer,
    ) -> Result<BlkifRequest, BlockError> {
        let bytes = buffer.bytes;
        let buffer = buffer.pages.as_mut().ok_or(BlockError::Failed)?;
        let pages = buffer.data.references().len();
        if pages <= MAX_SEGMENTS_PER_REQUEST {
            let nr_segments = pages as u8;
            let mut request =
                BlkifRequest { operation, nr_segments, handle, id, sector_number, ..Default::default() };
            for (to, segment) in request.seg.iter_mut().zip(buffer.segments(bytes)) {
                *to = segment;
            }
            return Ok(request);
        }
        if pages > self.indirect {
            // A back end that came back offers less than the one before.
            return Err(BlockError::Failed);
        }
        let mut indirect_grefs = [GrantRef::new(0); MAX_INDIRECT_PAGES_PER_REQUEST];
        if let Some(first) = indirect_grefs.first_mut() {
            *first = buffer.list(bytes, self.backend_id)?;
        }
        Ok(widen(&BlkifRequestIndirect {
            operation: BlkifOp::Indirect.number() as u8,
            indirect_op: operation,
            nr_segments: pages as u16,
            id,
            sector_number,
            handle,
            indirect_grefs,
            ..Default::default()
        }))
    }

    /// Shows the other end what was sent.
    fn publish(&mut self) {
        if self.ring.publish() {
            // If nobody is connected, nobody is to be told: the back end looks when it comes.
            let _ = self.notifier.notify();
        }
    }
}

/// Meets the back end, however often that goes and comes back meanwhile. [`BlockError::Gone`] when it means to stay away.
async fn connect(
    front: &mut Frontend,
    device: u32,
    options: Options,
) -> Result<(Connection, Channel, Info), BlockError> {
    loop {
        match try_connect(front, device, options).await {
            Err(BlockError::Backend(XenbusError::Closed)) => {
                if front.is_leaving().await? {
                    return Err(BlockError::Gone);
                }
                if front.backend_state().await? == XenbusState::Closing {
                    // It waits until this end lets go of what it has just offered.
                    front.close().await?;
                    front.set_state(XenbusState::Initialising).await?;
                } else {
                    // It has not got round to saying that it is back.
                    front.changed().await?;
                }
            }
            result => return result,
        }
    }
}

/// Meets the back end, which waits for it.
async fn try_connect(
    front: &mut Frontend,
    device: u32,
    options: Options,
) -> Result<(Connection, Channel, Info), BlockError> {
    let waits = |state| matches!(state, XenbusState::InitWait | XenbusState::Initialised);
    front.wait_for(waits).await?;
    let order =
        front.read::<u32>(keys::MAX_RING_PAGE_ORDER).await?.unwrap_or(0).min(options.ring_page_order).min(4);
    let persistent = front.offers(keys::PERSISTENT).await?;
    let indirect = front.read::<usize>(keys::MAX_INDIRECT_SEGMENTS).await?.unwrap_or(0).min(MOST_SEGMENTS);
    let backend_id = front.backend_id();
    let ring = Front::new(GrantedPages::new(1 << order, backend_id, Access::ReadWrite)?);
    let depth = ring.capacity();
    let channel = Events::new().alloc_unbound(backend_id)?;
    let page = ring.page();
    let mut nodes = alloc::vec![
        ("event-channel".to_string(), channel.port().to_string()),
        (keys::PROTOCOL.to_string(), ABI.to_string()),
        (keys::PERSISTENT.to_string(), "1".to_string()),
    ];
    match page.references() {
        [only] => nodes.push(("ring-ref".to_string(), only.to_string())),
        several => {
            nodes.push((keys::RING_PAGE_ORDER.to_string(), order.to_string()));
            let each = several.iter().enumerate();
            nodes.extend(each.map(|(number, gref)| (format!("ring-ref{number}"), gref.to_string())));
        }
    }
    let nodes: Vec<(&str, String)> =
        nodes.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    front.publish(&nodes, XenbusState::Initialised).await?;
    front.wait_for(|state| state == XenbusState::Connected).await?;
    let segments = indirect.max(MAX_SEGMENTS_PER_REQUEST);
    let info = Info {
        sectors: front.need(keys::SECTORS).await?,
        readonly: front.read::<u32>(keys::INFO).await?.unwrap_or(0) & VDISK_READONLY != 0,
        flush: front.offers(keys::FLUSH_CACHE).await?,
        discard: front.offers(keys::DISCARD).await?,
        max_request: segments * PAGE_SIZE,
        depth,
        persistent,
    };
    front.set_state(XenbusState::Connected).await?;
    log::debug!("disk {device}: {info:?}");
    let notifier = channel.notifier();
    Ok((Connection { ring, notifier, indirect, backend_id }, channel, info))
}

/// Takes answers as they come, until the connection is given up.
async fn answers(inner: Arc<Inner>, mut channel: Channel) {
    let begun = inner.stop.rings();
    loop {
        let (result, gathering) = {
            let mut state = inner.state.lock();
            (state.take_answers(), state.gathering)
        };
        match result {
            Ok(freed) => {
                if freed {
                    inner.bell.ring();
                }
                if gathering {
                    // They run before this does again.
                    executor::yield_now().await;
                    inner.state.lock().show_gathered();
                }
            }
            Err(_) => {
                // Nothing that comes from there counts any more, and it would not be different the next time.
                log::error!("the back end of disk {} has broken its ring", inner.device);
                inner.state.lock().fail_all(&BlockError::Gone);
                inner.bell.ring();
                return;
            }
        }
        if let First::Other(()) = first(channel.fired(), inner.stop.after(begun)).await {
            return;
        }
    }
}

/// Follows the back end's state: it may go, come back, or change the disk's size.
async fn follow(inner: Arc<Inner>, mut front: Frontend, options: Options) {
    loop {
        let result = match front.changed().await {
            Ok(XenbusState::Connected) => resized(&inner, &front).await,
            Ok(XenbusState::Closing | XenbusState::Closed | XenbusState::Unknown) => {
                reconnect(&inner, &mut front, options).await
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = result {
            inner.stop.ring();
            inner.state.lock().fail_all(&if error == BlockError::Gone { error } else { BlockError::Gone });
            inner.bell.ring();
            return;
        }
    }
}

async fn resized(inner: &Inner, front: &Frontend) -> Result<(), BlockError> {
    let sectors = front.need(keys::SECTORS).await?;
    inner.state.lock().info.sectors = sectors;
    Ok(())
}

/// Lets go of the back end, and waits for it to come back; what was not answered is asked again.
async fn reconnect(inner: &Arc<Inner>, front: &mut Frontend, options: Options) -> Result<(), BlockError> {
    let leaving = front.is_leaving().await?;
    inner.stop.ring();
    let old = core::mem::replace(&mut inner.state.lock().link, Link::Down);
    // The tasks that answer let go of the channel.
    executor::yield_now().await;
    front.close().await?;
    // The back end has unmapped the ring by now.
    drop(old);
    if leaving {
        return Err(BlockError::Gone);
    }
    front.set_state(XenbusState::Initialising).await?;
    let (mut connection, channel, info) = connect(front, inner.device, options).await?;
    let mut state = inner.state.lock();
    state.info = Info { depth: info.depth.min(state.info.depth), ..info };
    for (number, slot) in state.slots.iter_mut().enumerate() {
        if let Some(slot) = slot
            && slot.answer.is_none()
        {
            connection.send(number, inner.device, slot);
        }
    }
    connection.publish();
    state.link = Link::Up(connection);
    drop(state);
    executor::spawn(answers(Arc::clone(inner), channel));
    inner.bell.ring();
    Ok(())
}

/// The names of the disks that this domain has, as numbers of virtual devices.
///
/// # Errors
/// [`StoreError`].
pub async fn disks(store: &SharedStore) -> Result<Vec<String>, StoreError> {
    crate::xenbus::devices(store, "vbd").await
}

#[cfg(test)]
mod tests {
    use super::{device_number, parts};
    use alloc::vec::Vec;

    #[test]
    fn devices_have_numbers() {
        for (name, number) in [
            ("xvda", Some(51712)),
            ("xvdb", Some(51728)),
            ("xvdb2", Some(51730)),
            ("xvdp15", Some(51967)),
            ("xvdq", Some(268_439_552)),
            ("xvdaa", Some(268_442_112)),
            ("51712", Some(51712)),
            ("xvda16", Some(268_435_472)),
            ("xvda256", None),
            ("xvd", None),
            ("xvd1", None),
            ("sda", None),
            ("xvdA", None),
            ("xvdzzzzzzzzzzzzz", None),
        ] {
            assert_eq!(device_number(name), number, "{name}");
        }
    }

    #[test]
    fn transfers_are_cut_where_requests_end() {
        let bytes = [0u8; 2048 + 512];
        let cut: Vec<(u64, usize)> =
            parts(7, bytes.chunks(1024), 1024).map(|(at, part)| (at, part.len())).collect();
        assert_eq!(cut, [(7, 1024), (9, 1024), (11, 512)]);
    }
}

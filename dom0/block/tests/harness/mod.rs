//! A front end whose pages are host memory, and a disk that is as slow as a test wants.
#![allow(dead_code, reason = "each test uses a part of it")]

use blkback::backend::{Backend, Turn};
use blkback::disk::{Action, Disk, DiskError, Done, GuestPage, Job, Properties};
use blkback::grants::{Mapper, Wanted};
use blkback::queue::Closed;
use blkback::request::Identity;
use guest_sdk::ring::host::HostPages;
use guest_sdk::ring::{Front, SharedPage};
use hypercall_abi::io::blkif::{
    BlkifOp, BlkifRequest, BlkifRequestDiscard, BlkifRequestIndirect, BlkifResponse, BlkifSegment,
};
use hypercall_abi::{GrantRef, MachAddr};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const SECTOR: usize = 512;
/// Wider than the handle of a request.
pub const DEVICE: u32 = 0x1000_ca10;

pub fn allocate(bytes: usize) -> Option<Box<[u8]>> {
    Some(vec![0xee; bytes].into())
}

/// What pages hold before anybody writes to them.
const FILL: u32 = 0xdead_beef;

/// A mapping: counted as long as there are clones of it.
#[derive(Clone)]
pub struct Mapped {
    page: HostPages,
    writable: bool,
    _alive: Rc<Alive>,
}

/// A page that no front end has granted.
pub fn own_page() -> Option<Mapped> {
    let alive = Rc::new(Alive(Arc::new(AtomicUsize::new(1))));
    Some(Mapped { page: HostPages::new(1, FILL), writable: true, _alive: alive })
}

struct Alive(Arc<AtomicUsize>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl SharedPage for Mapped {
    fn size(&self) -> usize {
        4096
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        assert!(offset + to.len() <= 4096);
        self.page.read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= 4096);
        assert!(self.writable, "a page fault in dom0");
        self.page.write_bytes(offset, from);
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        self.page.word(offset)
    }
}

impl GuestPage for Mapped {
    fn machine_address(&self) -> MachAddr {
        MachAddr::new(0)
    }
}

#[derive(Default)]
struct Table {
    entries: BTreeMap<u32, (HostPages, bool)>,
    live: Arc<AtomicUsize>,
    hypercalls: Cell<usize>,
    /// Called at each unmapping.
    unmapped: Cell<usize>,
}

pub struct Grants(Rc<std::cell::RefCell<Table>>);

impl Mapper for Grants {
    type Page = Mapped;

    fn map(&mut self, wanted: &[Wanted], mapped: &mut Vec<Option<Mapped>>) {
        let table = self.0.borrow();
        table.hypercalls.set(table.hypercalls.get() + 1);
        for wanted in wanted {
            let entry = table.entries.get(&wanted.reference.get());
            let granted = entry.filter(|(_, writable)| *writable || !wanted.writable);
            mapped.push(granted.map(|(page, _)| {
                table.live.fetch_add(1, Ordering::Relaxed);
                let alive = Rc::new(Alive(Arc::clone(&table.live)));
                Mapped { page: page.clone(), writable: wanted.writable, _alive: alive }
            }));
        }
    }

    fn unmap(&mut self, pages: &mut Vec<Mapped>) {
        let table = self.0.borrow();
        table.hypercalls.set(table.hypercalls.get() + 1);
        pages.clear();
        table.unmapped.set(table.unmapped.get() + 1);
    }
}

/// Both ends of a connection.
pub struct Host<D: Disk<Mapped>> {
    front: Front<HostPages, BlkifRequest, BlkifResponse>,
    ring: HostPages,
    back: Backend<HostPages, Grants, D>,
    table: Rc<std::cell::RefCell<Table>>,
    next: u32,
    must_be_unmapped: bool,
}

impl<D: Disk<Mapped>> Host<D> {
    pub fn new(pages: usize, persistent: bool, disk: D) -> Self {
        let ring = HostPages::new(pages, FILL);
        let front = Front::new(ring.clone());
        let table = Rc::new(std::cell::RefCell::new(Table::default()));
        let mapper = Grants(Rc::clone(&table));
        let identity = Identity { device: DEVICE };
        let back = Backend::new(vec![ring.clone()], identity, persistent, mapper, disk);
        assert!(!back.prepare_to_wait());
        Self { front, ring, back, table, next: 8, must_be_unmapped: false }
    }

    /// A new page that the back end may map.
    pub fn grant(&mut self, writable: bool) -> u32 {
        self.next += 1;
        self.table.borrow_mut().entries.insert(self.next, (HostPages::new(1, FILL), writable));
        self.next
    }

    pub fn revoke(&mut self, grant: u32) {
        self.table.borrow_mut().entries.remove(&grant);
    }

    fn page(&self, grant: u32) -> Option<HostPages> {
        self.table.borrow().entries.get(&grant).map(|(page, _)| page.clone())
    }

    pub fn fill(&self, grant: u32, with: u8) {
        if let Some(page) = self.page(grant) {
            page.write_bytes(0, &pattern(with));
        }
    }

    /// Fills the beginning of a page.
    pub fn put(&self, grant: u32, bytes: &[u8]) {
        self.page(grant).expect("granted").write_bytes(0, bytes);
    }

    pub fn bytes(&self, grant: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        self.page(grant).expect("granted").read_bytes(0, &mut bytes);
        bytes
    }

    pub fn put_segments(&self, grant: u32, segments: &[BlkifSegment]) {
        self.page(grant).expect("granted").write_bytes(0, segments.as_bytes());
    }

    pub fn try_push(&mut self, request: &BlkifRequest) -> bool {
        let pushed = self.front.push(*request).is_ok();
        let _ = self.front.publish();
        pushed
    }

    pub fn push(&mut self, request: &BlkifRequest) {
        assert!(self.try_push(request), "the ring is full");
    }

    pub fn turn(&mut self) -> Result<Turn, Closed> {
        let turn = self.back.turn(&mut Context::from_waker(Waker::noop()));
        if self.must_be_unmapped {
            assert_eq!(self.mapped(), 0);
        }
        turn
    }

    /// Ends the connection; true when nothing is under way any more.
    pub fn finish(&mut self) -> bool {
        self.back.poll_finish(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    pub fn check_unmapped_at_publish(&mut self) {
        self.must_be_unmapped = true;
    }

    pub fn answers(&mut self) -> Vec<(u64, i16)> {
        let mut answers = Vec::new();
        while let Ok(Some(response)) = self.front.pop() {
            answers.push((response.id, response.status));
        }
        answers
    }

    /// One request, one answer.
    pub fn ask(&mut self, request: &BlkifRequest) -> (u64, i16) {
        self.push(request);
        self.turn().expect("an honest front");
        let answers = self.answers();
        assert_eq!(answers.len(), 1);
        answers[0]
    }

    pub fn prepare_to_wait(&self) -> bool {
        self.back.prepare_to_wait()
    }

    /// The producer index jumps.
    pub fn jump(&self, by: u32) {
        let word = self.ring.word(0);
        word.store(word.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }

    pub fn overwrite_slots(&self, with: u8) {
        self.ring.write_bytes(64, &vec![with; self.ring.size() - 64]);
    }

    pub fn disk(&mut self) -> &mut D {
        self.back.disk_mut()
    }

    pub fn mapped(&self) -> usize {
        self.table.borrow().live.load(Ordering::Relaxed)
    }

    pub fn hypercalls(&self) -> usize {
        self.table.borrow().hypercalls.get()
    }

    pub fn close(self) {
        let (_, live) = self.close_while_busy();
        assert_eq!(live(), 0);
    }

    /// The disk, and how many pages are mapped at any later time.
    pub fn close_while_busy(self) -> (D, impl Fn() -> usize) {
        let live = Arc::clone(&self.table.borrow().live);
        (self.back.close(), move || live.load(Ordering::Relaxed))
    }
}

/// A page's content.
pub fn pattern(with: u8) -> Vec<u8> {
    (0..4096u32).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ with).collect()
}

pub fn segment(grant: u32, first_sect: u8, last_sect: u8) -> BlkifSegment {
    BlkifSegment { gref: GrantRef::new(grant), first_sect, last_sect, pad0: 0 }
}

pub fn rw(operation: u8, id: u64, sector: u64, segments: &[BlkifSegment]) -> BlkifRequest {
    let mut request = BlkifRequest {
        operation,
        nr_segments: segments.len() as u8,
        handle: DEVICE as u16,
        id,
        sector_number: sector,
        ..BlkifRequest::default()
    };
    for (slot, segment) in request.seg.iter_mut().zip(segments) {
        *slot = *segment;
    }
    request
}

fn widen(form: &(impl IntoBytes + Immutable)) -> BlkifRequest {
    raw_bytes(form.as_bytes())
}

fn raw_bytes(bytes: &[u8]) -> BlkifRequest {
    let mut wide = [0; size_of::<BlkifRequest>()];
    wide[..bytes.len()].copy_from_slice(bytes);
    BlkifRequest::read_from_bytes(&wide).expect("as long as a request")
}

/// Any bytes, with an identity.
pub fn raw(id: u64, bytes: &[u8]) -> BlkifRequest {
    BlkifRequest { id, ..raw_bytes(bytes) }
}

pub fn indirect(kind: u8, id: u64, sector_number: u64, list: u32, nr_segments: u16) -> BlkifRequest {
    let mut form = BlkifRequestIndirect {
        operation: BlkifOp::Indirect.number() as u8,
        indirect_op: kind,
        nr_segments,
        id,
        sector_number,
        handle: DEVICE as u16,
        ..BlkifRequestIndirect::default()
    };
    form.indirect_grefs[0] = GrantRef::new(list);
    widen(&form)
}

pub fn discard(id: u64, sector_number: u64, nr_sectors: u64) -> BlkifRequest {
    let operation = BlkifOp::Discard.number() as u8;
    widen(&BlkifRequestDiscard { operation, id, sector_number, nr_sectors, ..BlkifRequestDiscard::default() })
}

/// A disk that does its work when it is told.
pub struct Late<D> {
    inner: D,
    waiting: Vec<Job<Mapped>>,
    done: Vec<Done<Mapped>>,
}

impl<D: Disk<Mapped>> Late<D> {
    pub fn new(inner: D) -> Self {
        Self { inner, waiting: Vec::new(), done: Vec::new() }
    }

    pub fn actions(&self) -> Vec<Action> {
        self.waiting.iter().map(|job| job.action).collect()
    }

    pub fn jobs(&self) -> &[Job<Mapped>] {
        &self.waiting
    }

    /// Ends a job, if there are so many.
    pub fn finish(&mut self, number: usize, result: Result<(), DiskError>) {
        if number >= self.waiting.len() {
            return;
        }
        let job = self.waiting.remove(number);
        self.done.push(match result {
            Ok(()) => self.inner.submit(job).expect("memory is fast"),
            Err(_) => Done { job, result },
        });
    }
}

impl<D: Disk<Mapped>> Disk<Mapped> for Late<D> {
    fn properties(&self) -> Properties {
        self.inner.properties()
    }
    fn submit(&mut self, job: Job<Mapped>) -> Option<Done<Mapped>> {
        self.waiting.push(job);
        None
    }
    fn poll_done(&mut self, _: &mut Context<'_>) -> Poll<Done<Mapped>> {
        self.done.pop().map_or(Poll::Pending, Poll::Ready)
    }
}

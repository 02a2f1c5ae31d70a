//! A disk that does what disks may do: it finishes jobs in any order, some time, and when its power fails it has lost any part of what no
//! flush has made durable.
#![allow(dead_code, reason = "each test uses a part of it")]

use crate::harness::{Mapped, SECTOR};
use blkback::disk::{Action, Disk, DiskError, Done, Job, Properties};
use fastrand::Rng;
use guest_sdk::ring::SharedPage;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

mod shared;
use shared::{Port, Shared};

pub type Sector = [u8; SECTOR];

/// A version of a sector, and when it was finished.
struct Version {
    finished: u64,
    content: Sector,
}

struct Flying {
    job: Job<Mapped>,
    /// Of a flush: what was finished before this is made durable.
    began: u64,
}

struct State {
    durable: Vec<Sector>,
    /// What no flush has made durable, oldest first.
    volatile: BTreeMap<u64, Vec<Version>>,
    flying: Vec<Flying>,
    clock: u64,
    random: Rng,
    /// So many writes more, then all fail.
    writes_left: Option<u32>,
    flushes: u32,
}

/// Such a disk. Clones are the same.
#[derive(Clone)]
pub struct Lossy(Rc<RefCell<State>>);

/// One for many, as dom0 shares its devices.
#[derive(Clone)]
pub struct Device {
    pub disk: Lossy,
    shared: Shared<Mapped, Lossy>,
}

impl Device {
    pub fn new(content: Vec<Sector>, seed: u64) -> Self {
        let disk = Lossy::new(content, seed);
        Self { shared: Shared::new(disk.clone()), disk }
    }

    pub fn port(&self) -> Pumped {
        Pumped { port: self.shared.port(), shared: self.shared.clone() }
    }
}

/// A disk on it, which looks after the device itself: in dom0 a task does.
pub struct Pumped {
    port: Port<Mapped, Lossy>,
    shared: Shared<Mapped, Lossy>,
}

impl Disk<Mapped> for Pumped {
    fn properties(&self) -> Properties {
        self.port.properties()
    }
    fn submit(&mut self, job: Job<Mapped>) -> Option<Done<Mapped>> {
        self.port.submit(job)
    }
    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<Mapped>> {
        self.shared.poll(context);
        self.port.poll_done(context)
    }
}

impl Lossy {
    pub fn new(content: Vec<Sector>, seed: u64) -> Self {
        Self(Rc::new(RefCell::new(State {
            durable: content,
            volatile: BTreeMap::new(),
            flying: Vec::new(),
            clock: 1,
            random: Rng::with_seed(seed),
            writes_left: None,
            flushes: 0,
        })))
    }

    /// Power fails: what is on the medium. Of each sector that was written since it was last flushed any version may be, and of writes
    /// that were not finished any part.
    pub fn power_failure(&self) -> Vec<Sector> {
        let mut state = self.0.borrow_mut();
        let state = &mut *state;
        for flying in &state.flying {
            if flying.job.action == Action::Write {
                for (sector, content) in contents(&flying.job) {
                    let versions = state.volatile.entry(sector).or_default();
                    versions.push(Version { finished: u64::MAX, content });
                }
            }
        }
        state.flying.clear();
        for (sector, versions) in core::mem::take(&mut state.volatile) {
            let choice = state.random.usize(..=versions.len());
            if let Some(version) = versions.get(choice) {
                state.durable[sector as usize] = version.content;
            }
        }
        state.durable.clone()
    }

    pub fn fail_after(&self, writes: Option<u32>) {
        self.0.borrow_mut().writes_left = writes;
    }

    pub fn flushes(&self) -> u32 {
        self.0.borrow().flushes
    }
}

fn contents(job: &Job<Mapped>) -> Vec<(u64, Sector)> {
    let mut all = Vec::new();
    for piece in &job.pieces {
        for offset in (0..usize::from(piece.bytes)).step_by(SECTOR) {
            let mut content = [0; SECTOR];
            piece.page.read_bytes(usize::from(piece.offset) + offset, &mut content);
            all.push((job.sector + all.len() as u64, content));
        }
    }
    all
}

impl State {
    fn finish(&mut self, flying: &Flying) -> Result<(), DiskError> {
        let job = &flying.job;
        self.clock += 1;
        match job.action {
            Action::Read => {
                let mut sector = job.sector;
                for piece in &job.pieces {
                    for offset in (0..usize::from(piece.bytes)).step_by(SECTOR) {
                        let newest = self.volatile.get(&sector).and_then(|versions| versions.last());
                        let content =
                            newest.map_or(&self.durable[sector as usize], |version| &version.content);
                        piece.page.write_bytes(usize::from(piece.offset) + offset, content);
                        sector += 1;
                    }
                }
            }
            Action::Write => {
                if let Some(left) = &mut self.writes_left {
                    if *left == 0 {
                        return Err(DiskError::Failed);
                    }
                    *left -= 1;
                }
                for (sector, content) in contents(job) {
                    assert!((sector as usize) < self.durable.len(), "a write beyond the device");
                    let versions = self.volatile.entry(sector).or_default();
                    versions.push(Version { finished: self.clock, content });
                }
            }
            Action::Flush => {
                self.flushes += 1;
                let durable = &mut self.durable;
                self.volatile.retain(|&sector, versions| {
                    let count = versions.iter().filter(|version| version.finished <= flying.began).count();
                    if let Some(newest) = versions.drain(..count).next_back() {
                        durable[sector as usize] = newest.content;
                    }
                    !versions.is_empty()
                });
            }
            Action::Discard { .. } => return Err(DiskError::Unsupported),
        }
        Ok(())
    }
}

impl Disk<Mapped> for Lossy {
    fn properties(&self) -> Properties {
        let sectors = self.0.borrow().durable.len() as u64;
        Properties { sectors, readonly: false, discard_granularity: None, physical_sector: SECTOR as u32 }
    }

    fn submit(&mut self, job: Job<Mapped>) -> Option<Done<Mapped>> {
        let mut state = self.0.borrow_mut();
        let began = state.clock;
        state.flying.push(Flying { job, began });
        None
    }

    fn poll_done(&mut self, _: &mut Context<'_>) -> Poll<Done<Mapped>> {
        let mut state = self.0.borrow_mut();
        let count = state.flying.len();
        // It takes its time.
        if count == 0 || state.random.bool() {
            return Poll::Pending;
        }
        let which = state.random.usize(..count);
        let flying = state.flying.swap_remove(which);
        let result = state.finish(&flying);
        Poll::Ready(Done { job: flying.job, result })
    }
}

/// Runs a future whose disks do something whenever they are asked.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    for _ in 0..10_000_000 {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
    panic!("it never ends");
}

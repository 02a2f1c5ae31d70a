//! All vCPUs at once map, unmap, retype, grant, give back and take memory, at random, and go down and come up meanwhile: what an
//! allocator, a swapper and a driver do in one.
//!
//! `operations=N` ends it after that many (default 20000), `seed=N` varies it, `neighbours=N` says how many domain numbers to grant
//! to and map from (default 16), `end=crash|fault|spin` is another end than powering off. `deed=storm` is something else:
//! hypercalls of all vCPUs without an end.
//!
//! All pages are every vCPU's, without any lock: that most calls are refused is as it should be. What the hypervisor must keep is its
//! counts; dom0's `free same` afterwards tells.
#![no_std]
#![no_main]

extern crate alloc;

use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::abi::grant::{GnttabCopy, GnttabCopyPtr, GnttabMapGrantRef, GnttabUnmapGrantRef, MapFlags};
use guest_sdk::abi::memory::MemoryReservation;
use guest_sdk::abi::mmu::{MmuextOp, UVMF_ALL, UVMF_INVLPG, UVMF_LOCAL, UVMF_TLB_FLUSH};
use guest_sdk::abi::subops::{GnttabOp, MemoryOp, MmuextCmd, VcpuOp};
use guest_sdk::abi::{DomId, Errno, GrantRef, GuestHandle, Hypercall, Mfn};
use guest_sdk::grants::Grant;
use guest_sdk::memory::{Access, Page, Range};
use guest_sdk::testkit::{Random, try_read, try_write};
use guest_sdk::{Domain, entry, hypercall, println, shutdown, vcpu};

/// Pages that are mapped, retyped, and given away.
const PAGES: usize = 32;
/// Addresses to map them at.
const SLOTS: usize = 64;
/// Grants.
const GRANTS: usize = 32;
/// Calls that a vCPU in a storm makes before it counts them.
const GUST: u64 = 64;

/// Frames of the pages; 0 while one has given its frame back.
static FRAMES: [AtomicU64; PAGES] = [const { AtomicU64::new(0) }; PAGES];
/// Where they are mapped at their own place.
static HOMES: [AtomicU64; PAGES] = [const { AtomicU64::new(0) }; PAGES];
/// First address of the slots.
static WINDOW: AtomicU64 = AtomicU64::new(0);
/// Handles of grants that are mapped, plus one, by slot.
static HANDLES: [AtomicU64; SLOTS] = [const { AtomicU64::new(0) }; SLOTS];
/// Operations so far, those of them that were done and not refused, and where it ends.
static COUNT: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicU64 = AtomicU64::new(0);
static LIMIT: AtomicU64 = AtomicU64::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);
static NEIGHBOURS: AtomicU64 = AtomicU64::new(0);
/// vCPUs beside the first.
static OTHERS: AtomicU64 = AtomicU64::new(0);
/// vCPUs that have come to their end.
static FINISHED: AtomicU64 = AtomicU64::new(0);

#[entry]
fn main(domain: Domain) -> Result<(), Errno> {
    let line = domain.command_line;
    SEED.store(line.number("seed").unwrap_or(1), Ordering::Relaxed);
    NEIGHBOURS.store(line.number("neighbours").unwrap_or(16), Ordering::Relaxed);
    LIMIT.store(line.number("operations").unwrap_or(20_000), Ordering::Relaxed);
    if line.value("deed") == Some("storm") {
        let others = start_others(storm)?;
        println!("storm of {} vCPUs", others + 1);
        storm(0);
        return Ok(());
    }
    let window = Range::new(SLOTS as u64)?;
    WINDOW.store(window.start(), Ordering::Relaxed);
    let mut grants = alloc::vec::Vec::new();
    for at in 0..PAGES {
        let page = Page::new()?;
        FRAMES[at].store(page.mfn().get(), Ordering::Relaxed);
        HOMES[at].store(page.leak(), Ordering::Relaxed);
    }
    for at in 0..GRANTS {
        let to = DomId::new((at as u64 % NEIGHBOURS.load(Ordering::Relaxed)) as u16);
        grants.push(domain.grants.grant_new(to, Access::ReadWrite).map_err(|_| Errno::ENOSPC)?);
    }
    for at in 0..SLOTS as u64 {
        // The tables above the slots exist from here on.
        // SAFETY: a page of this window, which nobody uses as memory of Rust's.
        unsafe { window.map(at, Mfn::new(FRAMES[0].load(Ordering::Relaxed)), Access::Read)? };
        window.unmap(at)?;
    }
    let others = start_others(life)?;
    OTHERS.store(others, Ordering::Relaxed);
    println!("churn: {} vCPUs", others + 1);
    life(0);
    while FINISHED.load(Ordering::SeqCst) != others {
        hypercall::yield_now();
    }
    println!(
        "churn: {} operations, {} not refused",
        COUNT.load(Ordering::Relaxed),
        DONE.load(Ordering::Relaxed)
    );
    // Nothing is tidied up: that is the hypervisor's part.
    grants.into_iter().for_each(core::mem::forget::<Grant>);
    core::mem::forget(window);
    match line.value("end") {
        Some("crash") => shutdown::crash(),
        // SAFETY: none: this is the point.
        Some("fault") => unsafe { (core::hint::black_box(16u64) as *mut u64).write_volatile(1) },
        Some("spin") => loop {
            core::hint::spin_loop();
        },
        _ => {}
    }
    Ok(())
}

/// Starts all vCPUs but this one; how many those are.
fn start_others(run: extern "C" fn(u32)) -> Result<u64, Errno> {
    for id in 1..vcpu::MAX {
        // SAFETY: `life` and `storm` live by atomics and hypercalls.
        match unsafe { vcpu::start(id, run) } {
            Ok(()) => {}
            Err(Errno::ENOENT) => return Ok(u64::from(id) - 1),
            Err(error) => return Err(error),
        }
    }
    Ok(u64::from(vcpu::MAX) - 1)
}

/// A source of numbers for one vCPU.
struct Dice(Random);

impl Dice {
    fn new(id: u32) -> Dice {
        Dice(Random::with_seed(SEED.load(Ordering::Relaxed) << 8 | u64::from(id)))
    }
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }
    fn slot(&mut self) -> (usize, u64) {
        let slot = self.below(SLOTS as u64) as usize;
        (slot, WINDOW.load(Ordering::Relaxed) + slot as u64 * 4096)
    }
    fn page(&mut self) -> usize {
        self.below(PAGES as u64) as usize
    }
    fn flush(&mut self) -> u64 {
        [0, UVMF_INVLPG | UVMF_LOCAL, UVMF_INVLPG | UVMF_ALL, UVMF_TLB_FLUSH | UVMF_ALL]
            [self.below(4) as usize]
    }
    /// A grant of somebody's: references begin at 8.
    fn grant(&mut self) -> (DomId, GrantRef) {
        let neighbours = NEIGHBOURS.load(Ordering::Relaxed);
        (DomId::new(self.below(neighbours) as u16), GrantRef::new(8 + self.below(GRANTS as u64) as u32))
    }
}

/// Operations at random until all have made their number of them.
extern "C" fn life(id: u32) {
    let mut dice = Dice::new(id);
    while COUNT.fetch_add(1, Ordering::Relaxed) < LIMIT.load(Ordering::Relaxed) {
        let done = match dice.below(16) {
            // Only the first: two that take each other down would stay so.
            _ if id == 0 && dice.below(64) == 0 => replug(&mut dice),
            0..4 => map(&mut dice),
            4..7 => unmap(&mut dice),
            7 => touch(&mut dice),
            8 | 9 => retype(&mut dice),
            10 => exchange(&mut dice),
            11 | 12 => map_grant(&mut dice),
            13 => unmap_grant(&mut dice),
            14 => copy(&mut dice),
            _ => {
                hypercall::yield_now();
                true
            }
        };
        if done {
            DONE.fetch_add(1, Ordering::Relaxed);
        }
    }
    if id != 0 {
        FINISHED.fetch_add(1, Ordering::SeqCst);
    }
}

/// Takes another vCPU down, wherever it is, and lets it come up again.
fn replug(dice: &mut Dice) -> bool {
    let other = 1 + dice.below(OTHERS.load(Ordering::Relaxed).max(1));
    let operation = |operation: VcpuOp| call(Hypercall::VcpuOp, [operation.number().into(), other, 0, 0, 0]);
    let down = operation(VcpuOp::Down).is_ok();
    for _ in 0..dice.below(4) {
        hypercall::yield_now();
    }
    down && operation(VcpuOp::Up).is_ok()
}

fn call(call: Hypercall, arguments: [u64; 5]) -> Result<u64, Errno> {
    // SAFETY: no call of this file changes what Rust uses as memory: pages are leaked, and are reached by `try_read` and `try_write`.
    Errno::check(unsafe { hypercall::raw(call.number(), arguments) })
}

fn at<T>(value: &mut T) -> u64 {
    (&raw mut *value) as u64
}

fn entry_of(page: usize, access: Access) -> u64 {
    FRAMES[page].load(Ordering::Relaxed) << 12 | access.bits()
}

fn set(address: u64, entry: u64, flush: u64) -> bool {
    call(Hypercall::UpdateVaMapping, [address, entry, flush, 0, 0]).is_ok()
}

fn map(dice: &mut Dice) -> bool {
    let access = if dice.below(2) == 0 { Access::Read } else { Access::ReadWrite };
    let entry = entry_of(dice.page(), access);
    set(dice.slot().1, entry, dice.flush())
}

fn unmap(dice: &mut Dice) -> bool {
    let (_, address) = dice.slot();
    set(address, 0, dice.flush())
}

/// Reads or writes whatever is there. Zeros only: a page may be a table next.
fn touch(dice: &mut Dice) -> bool {
    let (_, address) = dice.slot();
    // SAFETY: nothing of Rust's lies in the slots.
    if dice.below(2) == 0 { try_read(address).is_ok() } else { unsafe { try_write(address, 0) }.is_ok() }
}

/// Makes a page a table and ordinary again, as far as others leave it alone.
fn retype(dice: &mut Dice) -> bool {
    const KINDS: [MmuextCmd; 4] =
        [MmuextCmd::PinL1Table, MmuextCmd::PinL2Table, MmuextCmd::PinL3Table, MmuextCmd::PinL4Table];
    let page = dice.page();
    let (home, frame) = (HOMES[page].load(Ordering::Relaxed), FRAMES[page].load(Ordering::Relaxed));
    set(home, entry_of(page, Access::Read), dice.flush());
    let mut calls = [
        MmuextOp::new(KINDS[dice.below(4) as usize], frame, 0),
        MmuextOp::new(MmuextCmd::UnpinTable, frame, 0),
    ];
    let done = call(Hypercall::MmuextOp, [at(&mut calls), 2, 0, DomId::SELF.get().into(), 0]).is_ok();
    set(home, entry_of(page, Access::ReadWrite), dice.flush());
    done
}

/// Gives a frame back to the hypervisor, and takes another in its place.
fn exchange(dice: &mut Dice) -> bool {
    let page = dice.page();
    let mut frame = FRAMES[page].swap(0, Ordering::SeqCst);
    if frame == 0 {
        return false;
    }
    set(HOMES[page].load(Ordering::Relaxed), 0, dice.flush());
    let reservation = |operation: MemoryOp, frame: &mut u64| {
        let mut request = MemoryReservation {
            extent_start: GuestHandle::new(at(frame)),
            nr_extents: 1,
            extent_order: 0,
            mem_flags: 0,
            domid: DomId::SELF,
            pad0: [0; 3],
        };
        call(Hypercall::MemoryOp, [operation.number().into(), at(&mut request), 0, 0, 0]) == Ok(1)
    };
    let gone = reservation(MemoryOp::DecreaseReservation, &mut frame);
    let mut new = 0;
    // While others still have the old frame mapped, the domain may have as many as it is allowed: then the page stays away.
    if gone && !reservation(MemoryOp::IncreaseReservation, &mut new) {
        return true;
    }
    FRAMES[page].store(if gone { new } else { frame }, Ordering::SeqCst);
    set(HOMES[page].load(Ordering::Relaxed), entry_of(page, Access::ReadWrite), 0);
    gone
}

fn map_grant(dice: &mut Dice) -> bool {
    let (slot, host_addr) = dice.slot();
    let (dom, gref) = dice.grant();
    let readonly = if dice.below(2) == 0 { MapFlags::READONLY } else { MapFlags::empty() };
    let flags = (MapFlags::HOST_MAP | readonly).bits();
    let mut request = GnttabMapGrantRef { host_addr, flags, gref, dom, status: -1, ..Default::default() };
    let called =
        call(Hypercall::GrantTableOp, [GnttabOp::MapGrantRef.number().into(), at(&mut request), 1, 0, 0]);
    let done = called.is_ok() && request.status == 0;
    if done {
        // What was there before is forgotten: its reference stays until the domain ends.
        HANDLES[slot].store(u64::from(request.handle) + 1, Ordering::SeqCst);
    }
    done
}

fn unmap_grant(dice: &mut Dice) -> bool {
    let (slot, host_addr) = dice.slot();
    let handle = HANDLES[slot].swap(0, Ordering::SeqCst);
    let mut request = GnttabUnmapGrantRef {
        host_addr,
        handle: (handle as u32).wrapping_sub(1),
        status: -1,
        ..Default::default()
    };
    let called =
        call(Hypercall::GrantTableOp, [GnttabOp::UnmapGrantRef.number().into(), at(&mut request), 1, 0, 0]);
    called.is_ok() && request.status == 0
}

/// Copies between two grants of two domains.
fn copy(dice: &mut Dice) -> bool {
    let mut pointer = || {
        let (domid, gref) = dice.grant();
        GnttabCopyPtr::granted(gref, domid, 0)
    };
    let (source, dest) = (pointer(), pointer());
    // Both ends are grants.
    let mut request = GnttabCopy { source, dest, len: 64, flags: 3, status: -1, pad0: 0 };
    let called = call(Hypercall::GrantTableOp, [GnttabOp::Copy.number().into(), at(&mut request), 1, 0, 0]);
    called.is_ok() && request.status == 0
}

/// Hypercalls without an end: cheap ones, dear ones, wrong ones.
extern "C" fn storm(id: u32) {
    let mut dice = Dice::new(id);
    let mut words = [0u64; 64];
    loop {
        for _ in 0..GUST {
            let buffer = at(&mut words);
            let _ = match dice.below(8) {
                0 => call(Hypercall::XenVersion, [0, 0, 0, 0, 0]),
                1 => call(Hypercall::SchedOp, [0, 0, 0, 0, 0]),
                2 => call(Hypercall::MmuextOp, [buffer, 4, 0, DomId::SELF.get().into(), 0]),
                3 => call(Hypercall::EventChannelOp, [dice.below(10), buffer, 0, 0, 0]),
                4 => call(Hypercall::VcpuOp, [7, dice.below(64), 0, 0, 0]),
                // TLB flushes on all vCPUs: each interrupts the others.
                5 => {
                    let mut flush = MmuextOp::new(MmuextCmd::TlbFlushAll, 0, 0);
                    call(Hypercall::MmuextOp, [at(&mut flush), 1, 0, DomId::SELF.get().into(), 0])
                }
                6 => call(Hypercall::MemoryOp, [dice.below(32), buffer, 0, 0, 0]),
                _ => call(Hypercall::GrantTableOp, [dice.below(13), buffer, dice.below(4), 0, 0]),
            };
        }
        COUNT.fetch_add(GUST, Ordering::Relaxed);
    }
}

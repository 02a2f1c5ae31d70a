//! The hypervisor's own page tables: image, direct map, machine-to-physical table, frame table, CPU blocks, devices.
//!
//! All memory is shown by `Space::map`, by boot code on one CPU. Afterwards the only entries that change are those of the
//! descriptor windows ([`set_window`]), each by the CPU whose window it is.

use core::sync::atomic::{AtomicU64, Ordering};
use hv::x86::layout::{self, PAGE_SIZE};
use hv::x86::ranges::FreeRanges;
use x86_64::structures::paging::PageTableFlags as Flags;

/// Read-only data of ring 0.
pub const READ: Flags =
    Flags::PRESENT.union(Flags::ACCESSED).union(Flags::DIRTY).union(Flags::GLOBAL).union(Flags::NO_EXECUTE);
/// Data of ring 0.
pub const WRITE: Flags = READ.union(Flags::WRITABLE);
/// Code of ring 0.
pub const EXECUTE: Flags = Flags::PRESENT.union(Flags::ACCESSED).union(Flags::DIRTY).union(Flags::GLOBAL);
/// Device registers: entry 3 of the PAT, uncached (see `cpu::PAT`).
pub const DEVICE: Flags = WRITE.union(Flags::WRITE_THROUGH).union(Flags::NO_CACHE);
/// What guests may read.
pub const GUEST_READ: Flags = READ.union(Flags::USER_ACCESSIBLE);

/// Machine address bits of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The flags as this processor takes them: without NX, that bit is reserved and would fault.
fn loadable(flags: Flags) -> Flags {
    if super::cpu::has_nx() { flags } else { flags - Flags::NO_EXECUTE }
}

/// The words of a table frame of ours.
///
/// # Panics
/// When the address is beyond the direct map.
pub fn table(machine: u64) -> &'static [AtomicU64; 512] {
    assert!(machine < layout::DIRECT_MAP_SIZE && machine.is_multiple_of(PAGE_SIZE));
    // SAFETY: the direct map (the early one, or ours) shows all RAM, and only frames taken from RAM are passed here. Words
    // of a table are only ever accessed as atomics.
    unsafe { &*((layout::DIRECT_MAP + machine) as *const [AtomicU64; 512]) }
}

/// Page tables under construction.
pub struct Space<'a> {
    /// Machine address of the L4 table.
    pub root: u64,
    free: &'a mut FreeRanges,
    gigabyte_pages: bool,
}

impl<'a> Space<'a> {
    /// An empty space.
    pub fn new(free: &'a mut FreeRanges, gigabyte_pages: bool) -> Space<'a> {
        let root = zeroed_frames(free, 1);
        let space = Space { root, free, gigabyte_pages };
        // All L3 tables now: guests' L4 tables copy these entries once and must never miss a later one.
        for slot in layout::FIRST_SLOT..layout::END_SLOT {
            let l3 = zeroed_frames(space.free, 1);
            let user = if slot == layout::FIRST_SLOT { Flags::USER_ACCESSIBLE } else { Flags::WRITABLE };
            let flags = Flags::PRESENT | Flags::ACCESSED | Flags::DIRTY | user;
            let flags = if slot == layout::FIRST_SLOT { loadable(flags | Flags::NO_EXECUTE) } else { flags };
            table(root)[slot].store(l3 | flags.bits(), Ordering::Relaxed);
        }
        space
    }

    /// A zeroed frame for the caller to keep.
    pub fn frames(&mut self, count: u64) -> u64 {
        zeroed_frames(self.free, count)
    }

    /// Like [`Space::frames`], placed so that large pages can map them.
    pub fn large_frames(&mut self, count: u64) -> u64 {
        if count < 512 {
            return self.frames(count);
        }
        let at = self.free.take(count * PAGE_SIZE, 1 << 21, 1 << 32).expect("out of memory while booting");
        zero(at, count);
        at
    }

    /// Maps whole pages in the largest pieces that alignment and length allow.
    ///
    /// # Panics
    /// When something is mapped there already, or out of memory: boot cannot go on.
    pub fn map(&mut self, va: u64, machine: u64, len: u64, flags: Flags) {
        let flags = loadable(flags);
        assert!((va | machine | len).is_multiple_of(PAGE_SIZE));
        let mut done = 0;
        while done < len {
            let (va, machine, left) = (va + done, machine + done, len - done);
            let fits = |size: u64| (va | machine).is_multiple_of(size) && left >= size;
            let (level, size) = match () {
                () if self.gigabyte_pages && fits(1 << 30) => (3, 1 << 30),
                () if fits(1 << 21) => (2, 1 << 21),
                () => (1, PAGE_SIZE),
            };
            let large = if level > 1 { Flags::HUGE_PAGE } else { Flags::empty() };
            let entry = self.entry(va, level);
            assert_eq!(entry.load(Ordering::Relaxed), 0, "{va:#x} is mapped twice");
            entry.store(machine | (flags | large).bits(), Ordering::Relaxed);
            done += size;
        }
    }

    /// The entry of `va` at `level`, tables above it made as needed.
    fn entry(&mut self, va: u64, level: u32) -> &'static AtomicU64 {
        let mut at = self.root;
        let mut here = 4;
        loop {
            let entry = &table(at)[((va >> (12 + 9 * (here - 1))) & 511) as usize];
            if here == level {
                return entry;
            }
            let value = entry.load(Ordering::Relaxed);
            at = if value == 0 {
                let frame = zeroed_frames(self.free, 1);
                let user =
                    if va < layout::M2P + layout::M2P_SIZE { Flags::USER_ACCESSIBLE } else { Flags::empty() };
                let flags = Flags::PRESENT | Flags::WRITABLE | Flags::ACCESSED | Flags::DIRTY | user;
                entry.store(frame | flags.bits(), Ordering::Relaxed);
                frame
            } else {
                assert!(value & Flags::HUGE_PAGE.bits() == 0, "{va:#x} lies in a large page");
                value & ADDRESS
            };
            here -= 1;
        }
    }

    /// Makes the tables of the windows of CPU `cpu` exist, and returns the machine address of the L1 table they are in.
    pub fn prepare_window(&mut self, cpu: usize) -> u64 {
        let va = window(cpu);
        let entry: *const AtomicU64 = self.entry(va, 1);
        (entry as u64 - layout::DIRECT_MAP) & !(PAGE_SIZE - 1)
    }
}

/// First address of a CPU's descriptor windows.
pub fn window(cpu: usize) -> u64 {
    layout::DESCRIPTOR_WINDOWS + cpu as u64 * layout::DESCRIPTOR_WINDOW_SIZE
}

/// Zeroed frames below 4 GiB, which the early tables show.
fn zeroed_frames(free: &mut FreeRanges, count: u64) -> u64 {
    let at = free.take(count * PAGE_SIZE, 0, 1 << 32).expect("out of memory while booting");
    zero(at, count);
    at
}

fn zero(at: u64, count: u64) {
    // SAFETY: frames just taken from free RAM below 4 GiB, shown by the early direct map; nobody else knows them.
    unsafe { core::ptr::write_bytes((layout::DIRECT_MAP + at) as *mut u8, 0, (count * PAGE_SIZE) as usize) };
}

/// Shows `machine` (None: nothing) at page `page` of the descriptor windows whose L1 table is at `l1`, and drops the old
/// translation of this CPU.
///
/// # Safety
/// 1. `l1` and `cpu` belong to the CPU this runs on.
/// 2. The page is one of the guest's, not the hypervisor's own descriptors.
/// 3. The frame is typed as a descriptor page and stays so while it is shown.
pub unsafe fn set_window(l1: u64, cpu: usize, page: u64, machine: Option<u64>) {
    let va = window(cpu) + page * PAGE_SIZE;
    let entry = &table(l1)[((va >> 12) & 511) as usize];
    // The processor sets accessed bits in descriptors, by writes to this mapping; descriptor frames are never read back
    // by guests as anything else. Writable, because a supervisor store to a read-only page would fault (CR0.WP).
    let value = machine.map_or(0, |m| m | loadable(WRITE & !Flags::GLOBAL).bits());
    // Only this CPU writes the entry; the processor sets accessed and dirty bits, which are set already.
    if entry.load(Ordering::Relaxed) != value {
        entry.store(value, Ordering::Relaxed);
        x86_64::instructions::tlb::flush(x86_64::VirtAddr::new(va));
    }
}

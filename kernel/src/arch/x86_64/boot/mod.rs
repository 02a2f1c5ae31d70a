//! From reset to the first domain: what the loader said, final page tables, processor state, clocks.

mod pvh;
pub mod smp;

use super::cpu::{self, Features};
use super::paging::{self, Space};
use super::percpu::{self, CpuInfo, INFO_OFFSET};
use super::{apic, clock, context, fpu, hpet, interrupts, ioapic, serial, tables};
use arrayvec::ArrayVec;
use core::cell::UnsafeCell;
use core::cmp::Reverse;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use hv::mm::FrameRecord;
use hv::x86::acpi::{self, AcpiInfo};
use hv::x86::layout::{self, PAGE_SIZE};
use hv::x86::phys::PhysMemory;
use hv::x86::ranges::{FreeRanges, MAX_RANGES};
use hv::x86::start_info::{self, MAX_COMMAND_LINE, Module, Region, RegionKind};
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::PhysFrame;

/// What boot found out, for the rest of the hypervisor's life.
pub struct Machine {
    /// The firmware's memory map.
    pub regions: ArrayVec<Region, { start_info::MAX_REGIONS }>,
    /// All RAM, whole pages.
    pub ram: FreeRanges,
    /// Memory that boot left over.
    pub free: FreeRanges,
    /// One more than the highest frame of RAM: length of the frame table and of the machine-to-physical table.
    pub frames: u64,
    /// Frames that hold the machine-to-physical table.
    pub m2p: Range<u64>,
    /// dom0's image.
    pub module: Option<Module>,
    /// ACPI's facts.
    pub acpi: AcpiInfo,
    /// The processor's features.
    pub features: Features,
    /// Root of the hypervisor's own page tables.
    pub root: u64,
    /// Memory of each processor that may be started, the boot processor's first.
    cpus: ArrayVec<CpuMemory, { layout::MAX_CPUS }>,
}

impl Machine {
    /// Whether a frame is RAM, and so in the direct map.
    pub fn is_ram(&self, frame: u64) -> bool {
        is_large_ram(1, frame)
            || self.ram.iter().any(|(start, end)| (start >> 12..end >> 12).contains(&frame))
    }
}

/// The bytes of the boot module, through the direct map. To be read before its memory is given away.
///
/// # Panics
/// When the loader put it outside RAM.
pub fn module_bytes() -> &'static [u8] {
    let Some(module) = machine().module.filter(|module| module.len > 0) else { return &[] };
    let frames = module.start / PAGE_SIZE..(module.start + module.len).div_ceil(PAGE_SIZE);
    assert!(frames.clone().all(|frame| machine().is_ram(frame)), "the boot module is not in RAM");
    // SAFETY: RAM that `start` took out of the free ranges, so nothing writes it; the direct map shows it.
    unsafe {
        core::slice::from_raw_parts((layout::DIRECT_MAP + module.start) as *const u8, module.len as usize)
    }
}

/// Written by [`start`] before anything else runs, read by everybody after.
struct BootCell<T>(UnsafeCell<T>);
// SAFETY: written only by `start`, on the one CPU that runs then, before the first shared reference is made.
unsafe impl<T> Sync for BootCell<T> {}

static COMMAND_LINE: BootCell<([u8; MAX_COMMAND_LINE], usize)> =
    BootCell(UnsafeCell::new(([0; MAX_COMMAND_LINE], 0)));
static MACHINE: spin::Once<Machine> = spin::Once::new();
/// The two largest ranges of RAM, which are those below and above 4 GiB: the first frame of each, and how many there are.
static LARGE_RAM: [(AtomicU64, AtomicU64); 2] = [const { (AtomicU64::new(0), AtomicU64::new(0)) }; 2];

/// Whether a frame is of the `n`-th largest range of RAM. No frame is before boot has found them.
#[inline(always)]
fn is_large_ram(n: usize, frame: u64) -> bool {
    let [first, count] = [&LARGE_RAM[n].0, &LARGE_RAM[n].1].map(|word| word.load(Ordering::Relaxed));
    frame.wrapping_sub(first) < count
}

/// Whether a frame is of the largest range of RAM: what nearly every question is about.
#[inline(always)]
pub fn is_main_ram(frame: u64) -> bool {
    is_large_ram(0, frame)
}

/// The command line as the loader gave it.
pub fn command_line() -> &'static [u8] {
    // SAFETY: written once before any call, see `BootCell`.
    let (bytes, len) = unsafe { &*COMMAND_LINE.0.get() };
    bytes.get(..*len).unwrap_or(&[])
}

/// What boot found out.
pub fn machine() -> &'static Machine {
    MACHINE.get().expect("boot has filled this")
}

/// Physical memory through the early tables: the first 4 GiB.
struct EarlyMemory;
impl PhysMemory for EarlyMemory {
    fn bytes(&self, addr: u64, len: usize) -> Option<&[u8]> {
        let end = addr.checked_add(len as u64)?;
        if end > 1 << 32 {
            return None;
        }
        // SAFETY: the early tables show this range, and nothing writes firmware's and the loader's structures while boot
        // reads them. Reading where no memory answers gives ones.
        Some(unsafe { core::slice::from_raw_parts((layout::DIRECT_MAP + addr) as *const u8, len) })
    }
}

unsafe extern "C" {
    static __image_start: u8;
    static __text_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __image_end: u8;
}

/// Share of RAM that becomes the heap: domains are made of it, and there are more of them on larger machines.
const HEAP_SHARE: u64 = 192;
const HEAP_MIN: u64 = 2 << 20;
const HEAP_MAX: u64 = 128 << 20;

/// Machine address of the image (hypervisor.ld).
const IMAGE_MACHINE: u64 = 0x20_0000;

fn in_image(symbol: *const u8) -> u64 {
    symbol as u64 - layout::IMAGE + IMAGE_MACHINE
}

/// Called by the assembly on the boot stack, with early page tables and no descriptor tables.
extern "C" fn start(info: u32) -> ! {
    serial::init(115_200);
    let info = match start_info::parse(&EarlyMemory, u64::from(info)) {
        Ok(info) => info,
        Err(error) => panic!("{error}"),
    };
    // SAFETY: nothing else runs, and no reference to the cell was made yet (see `BootCell`).
    let (bytes, len) = unsafe { &mut *COMMAND_LINE.0.get() };
    bytes[..info.command_line.len()].copy_from_slice(info.command_line);
    *len = info.command_line.len();

    let acpi = match acpi::parse(&EarlyMemory, info.rsdp) {
        Ok(acpi) => acpi,
        Err(error) => panic!("{error}"),
    };
    let features = Features::detect();
    cpu::publish(&features);
    if !features.smap {
        // SAFETY: the early tables show text writable, and no other CPU runs.
        unsafe { cpu::patch_out_smap(IMAGE_MACHINE, layout::IMAGE) };
    }

    let image_end = in_image(&raw const __image_end);
    let mut free = FreeRanges::default();
    let fits = |result: Result<(), _>| result.expect("the memory map is in more pieces than boot can hold");
    for region in info.regions.iter().filter(|region| region.kind == RegionKind::Ram) {
        fits(free.add(region.start, region.end.min(layout::DIRECT_MAP_SIZE)));
    }
    let ram = free.clone();
    for region in info.regions.iter().filter(|region| region.kind != RegionKind::Ram) {
        fits(free.remove(region.start, region.end));
    }
    // The first MiB belongs to firmware's habits and, later, to the start of other processors.
    fits(free.remove(0, 0x10_0000));
    fits(free.remove(IMAGE_MACHINE, image_end));
    if let Some(module) = info.module {
        fits(free.remove(module.start, module.start + module.len));
    }

    let mut space = Space::new(&mut free, features.gigabyte_pages);
    map_image(&mut space);
    map_ram(&mut space, &ram);
    let cpus = (0..acpi.cpus.len().clamp(1, layout::MAX_CPUS)).map(|n| make_cpu(&mut space, n)).collect();
    let heap_len = (ram.total() / HEAP_SHARE).clamp(HEAP_MIN, HEAP_MAX) & !(PAGE_SIZE - 1);
    let heap = space.frames(heap_len / PAGE_SIZE);
    let mut by_size = ram.iter().collect::<ArrayVec<_, MAX_RANGES>>();
    by_size.sort_unstable_by_key(|(start, end)| Reverse(end - start));
    let frames = ram.iter().map(|(_, end)| end / PAGE_SIZE).max().unwrap_or(0);
    let m2p = map_frame_tables(&mut space, frames);
    apic::map(&mut space, acpi.local_apic);
    ioapic::map(&mut space, &acpi);
    if let Some(address) = acpi.hpet {
        hpet::map(&mut space, address);
    }
    let root = space.root;
    MACHINE.call_once(|| Machine {
        regions: info.regions,
        ram,
        free,
        frames,
        m2p,
        module: info.module,
        acpi,
        features,
        root,
        cpus,
    });

    for ((first, count), (start, end)) in LARGE_RAM.iter().zip(by_size) {
        first.store(start >> 12, Ordering::Relaxed);
        count.store((end >> 12) - (start >> 12), Ordering::Relaxed);
    }

    let frame = PhysFrame::containing_address(PhysAddr::new(root));
    // SAFETY: the new tables show the image where it runs, this stack (part of the image's data), and the direct map.
    unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    cpu::set_control_registers(&features);
    // SAFETY: whole frames, just taken, shown by the direct map.
    unsafe { crate::heap::init((layout::DIRECT_MAP + heap) as *mut u8, heap_len as usize) };
    // SAFETY: the block was mapped by `make_cpu`; `continue_boot` never returns to this stack.
    unsafe {
        core::arch::asm!("mov rsp, {stack}", "xor ebp, ebp", "call {next}", "ud2",
            stack = in(reg) percpu::block(0) + INFO_OFFSET, next = sym on_cpu_stack, options(noreturn))
    }
}

/// The image by sections: text RX, read-only data R, data RW.
fn map_image(space: &mut Space<'_>) {
    let text = &raw const __text_start as u64;
    let rodata = &raw const __text_end as u64;
    let data = &raw const __rodata_end as u64;
    let end = &raw const __image_end as u64;
    for (start, end, flags) in
        [(text, rodata, paging::EXECUTE), (rodata, data, paging::READ), (data, end, paging::WRITE)]
    {
        space.map(start, start - layout::IMAGE + IMAGE_MACHINE, end - start, flags);
    }
}

/// All RAM at the direct map. The image's text and read-only data are read-only there too.
fn map_ram(space: &mut Space<'_>, ram: &FreeRanges) {
    let sealed = (IMAGE_MACHINE, in_image(&raw const __rodata_end));
    let mut map = |start: u64, end: u64, flags| {
        if start < end {
            space.map(layout::DIRECT_MAP + start, start, end - start, flags);
        }
    };
    for (start, end) in ram.iter() {
        map(start, end.min(sealed.0), paging::WRITE);
        map(start.max(sealed.0), end.min(sealed.1), paging::READ);
        map(start.max(sealed.1), end, paging::WRITE);
    }
}

/// The machine-to-physical table (for guests to read, and its alias for us to write) and the frame table. Returns the frames of
/// the former.
fn map_frame_tables(space: &mut Space<'_>, frames: u64) -> Range<u64> {
    let m2p_pages = (frames * 8).div_ceil(PAGE_SIZE);
    assert!(m2p_pages * PAGE_SIZE <= layout::M2P_SIZE);
    let m2p = space.large_frames(m2p_pages);
    space.map(layout::M2P, m2p, m2p_pages * PAGE_SIZE, paging::GUEST_READ);
    space.map(layout::M2P_ALIAS, m2p, m2p_pages * PAGE_SIZE, paging::WRITE);
    let pages = (frames * size_of::<FrameRecord>() as u64).div_ceil(PAGE_SIZE);
    assert!(pages * PAGE_SIZE <= layout::FRAME_TABLE_SIZE);
    let table = space.large_frames(pages);
    space.map(layout::FRAME_TABLE, table, pages * PAGE_SIZE, paging::WRITE);
    m2p / PAGE_SIZE..m2p / PAGE_SIZE + m2p_pages
}

/// The frame table and the machine-to-physical table, for the one `Memory` that is made of them.
pub fn frame_tables() -> (&'static [FrameRecord], &'static [AtomicU64]) {
    let frames = machine().frames as usize;
    let records = layout::FRAME_TABLE as *mut FrameRecord;
    for index in 0..frames {
        // SAFETY: `map_frame_tables` made room for this many records, and nobody refers to them yet.
        unsafe { records.add(index).write(FrameRecord::new()) };
    }
    // SAFETY: initialised above, mapped for good, and all their fields are atomics.
    let records = unsafe { core::slice::from_raw_parts(records, frames) };
    // SAFETY: zeroed words, mapped for good; guests only read their own mapping of them.
    let m2p = unsafe { core::slice::from_raw_parts(layout::M2P_ALIAS as *const AtomicU64, frames) };
    (records, m2p)
}

/// Frames and mappings of one CPU: its block of stacks and its descriptor windows.
struct CpuMemory {
    number: usize,
    window_l1: u64,
    gdt_page: u64,
}

fn make_cpu(space: &mut Space<'_>, number: usize) -> CpuMemory {
    for (start, end) in layout::cpu_block::STACKS {
        let frames = space.frames((end - start) / PAGE_SIZE);
        space.map(percpu::block(number) + start, frames, end - start, paging::WRITE);
    }
    let gdt_page = space.frames(1);
    space.map(paging::window(number) + layout::OWN_GDT_PAGE * PAGE_SIZE, gdt_page, PAGE_SIZE, paging::WRITE);
    CpuMemory { number, window_l1: space.prepare_window(number), gdt_page }
}

/// Fills the per-CPU data of the CPU this runs on, and loads its descriptor tables.
///
/// # Safety
/// Called once on each CPU, on the stack of the block that `memory` is about.
unsafe fn prepare_info(memory: &CpuMemory) {
    // SAFETY: the block is mapped, zeroed (valid for every field), and this CPU's alone.
    let info = unsafe { &mut *percpu::this() };
    info.number = memory.number;
    info.window_l1 = memory.window_l1;
    info.gdt_page = memory.gdt_page;
    info.has_tsc_aux = super::cpu::has_tsc_aux();
    if info.has_tsc_aux {
        // SAFETY: its value after reset, and what `tsc_aux` says.
        unsafe { super::msr::write(super::msr::TSC_AUX, 0) };
    }
    let info: &'static mut CpuInfo = info;
    // SAFETY: this CPU's data and page, mapped by `make_cpu`.
    unsafe { tables::load(info, memory.gdt_page) };
}

/// The rest of boot, on the first CPU's own stack.
extern "C" fn on_cpu_stack() -> ! {
    // SAFETY: on the first block's stack, for the first time.
    unsafe { prepare_info(&machine().cpus[0]) };
    interrupts::silence_pics();
    apic::init();
    let calibration = clock::start_calibration(&machine().acpi);
    context::init_syscall();
    fpu::init();
    // SAFETY: this CPU's data; the reference given to `tables::load` is gone.
    unsafe { (*percpu::this()).apic_id = apic::id() };
    ioapic::init(&machine().acpi, apic::device_destination(apic::id()).unwrap_or_default());
    crate::start(calibration)
}

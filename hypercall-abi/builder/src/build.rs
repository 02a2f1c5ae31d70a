//! Filling a domain's memory, one page per step.

use crate::image::{Kernel, Role, Segment};
use crate::layout::{Extent, LIST_ENTRIES, Layout, LayoutError};
use hypercall_abi::mmu::frame_to_cr3;
use hypercall_abi::segment::{FLAT_KERNEL_CS, FLAT_KERNEL_DS, FLAT_KERNEL_SS};
use hypercall_abi::start_info::{ConsoleStart, MAX_GUEST_CMDLINE, StartFlags, StartInfo};
use hypercall_abi::vcpu::{CpuUserRegs, VcpuContextFlags, VcpuGuestContext};
use hypercall_abi::{MachAddr, Mfn, PAGE_SIZE, Pfn, Port, VirtAddr};
use zerocopy::IntoBytes;

/// RFLAGS.IF: a new vCPU has it set; what masks its events is the upcall mask.
const RFLAGS_IF: u64 = 1 << 9;
/// DR6 and DR7 after a reset (Intel SDM volume 3, processor states following reset).
const DR6_RESET: u64 = 0xffff_0ff0;
const DR7_RESET: u64 = 0x400;

/// The domain's memory as its builder reaches it.
///
/// The domain does not run yet and has all its frames. Pfns given to these methods are below its number of pages.
pub trait BuildTarget {
    /// Why the memory cannot be reached.
    type Error;

    /// The machine frame behind `pfn`.
    fn mfn_of(&mut self, pfn: Pfn) -> Result<Mfn, Self::Error>;
    /// Copies `bytes` into page `pfn` from byte `offset` on; they do not cross its end.
    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), Self::Error>;
    /// Fills page `pfn` with zeroes.
    fn zero(&mut self, pfn: Pfn) -> Result<(), Self::Error>;
    /// Whether all pages are zeroes before anything is written: those that stay so are not zeroed again then.
    fn starts_blank(&self) -> bool {
        false
    }
    /// Fills page `pfn` with the hypercall stubs.
    fn hypercall_page(&mut self, pfn: Pfn) -> Result<(), Self::Error>;
}

/// What a domain gets beside its kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parameters<'a> {
    /// The module (initrd, boot archive); empty for none.
    pub module: &'a [u8],
    /// Command line, at most 1023 bytes, without a final zero.
    pub command_line: &'a [u8],
    /// Machine address of the domain's shared_info page.
    pub shared_info: MachAddr,
    /// Event channel of the xenstore ring; without meaning for [`Role::Initial`].
    pub store_port: Port,
    /// Event channel of the console ring; without meaning for [`Role::Initial`].
    pub console_port: Port,
}

/// What is written, in this order; each has a number of pages.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Image,
    HypercallPage,
    Module,
    List,
    StartInfo,
    /// Rings and boot stack.
    Blank,
    Tables,
}

impl Stage {
    const ALL: [Self; 7] = [
        Self::Image,
        Self::HypercallPage,
        Self::Module,
        Self::List,
        Self::StartInfo,
        Self::Blank,
        Self::Tables,
    ];
}

/// A domain being built: call [`step`](Self::step) until it is done, in pieces as small as the caller needs.
///
/// Each page is written once, whole, with its final contents. A step that failed has changed nothing but its own page and may
/// be tried again.
#[derive(Debug, Clone)]
pub struct Builder<'a> {
    kernel: Kernel<'a>,
    layout: Layout,
    parameters: Parameters<'a>,
    next: u64,
    page: [u8; PAGE_SIZE],
}

impl<'a> Builder<'a> {
    /// Plans the domain of `nr_pages` pages; nothing is written yet.
    ///
    /// # Errors
    /// [`LayoutError`] if it does not fit.
    pub fn new(kernel: Kernel<'a>, nr_pages: u64, parameters: Parameters<'a>) -> Result<Self, LayoutError> {
        let (len, limit) = (parameters.command_line.len(), MAX_GUEST_CMDLINE - 1);
        if len > limit {
            return Err(LayoutError::CommandLineTooLong { len, limit });
        }
        let layout = Layout::plan(&kernel, nr_pages, parameters.module.len())?;
        Ok(Self { kernel, layout, parameters, next: 0, page: [0; PAGE_SIZE] })
    }

    /// The plan it follows.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Writes the next page; `Some` when all is done.
    ///
    /// # Errors
    /// Those of the target.
    pub fn step<T: BuildTarget>(&mut self, target: &mut T) -> Result<Option<Built>, T::Error> {
        match self.job() {
            Some((stage, index)) => {
                self.run_job(stage, index, target)?;
                self.next += 1;
                Ok(None)
            }
            None => self.built(target).map(Some),
        }
    }

    /// Takes all steps that are left.
    ///
    /// # Errors
    /// Those of the target.
    pub fn run<T: BuildTarget>(&mut self, target: &mut T) -> Result<Built, T::Error> {
        loop {
            if let Some(built) = self.step(target)? {
                return Ok(built);
            }
        }
    }

    /// The stage and the page of it that is next.
    fn job(&self) -> Option<(Stage, u64)> {
        let mut index = self.next;
        for stage in Stage::ALL {
            let count = self.count(stage);
            if index < count {
                return Some((stage, index));
            }
            index -= count;
        }
        None
    }

    /// Number of pages that `stage` writes.
    fn count(&self, stage: Stage) -> u64 {
        match stage {
            Stage::Image => self.layout.image.pages,
            Stage::HypercallPage => u64::from(self.kernel.hypercall_page_index().is_some()),
            Stage::Module => self.layout.module.map_or(0, |module| module.frames.pages),
            Stage::List => self.layout.p2m.pages,
            Stage::StartInfo => 1,
            Stage::Blank => self.blank_pages().count() as u64,
            Stage::Tables => self.layout.tables.count(),
        }
    }

    /// Pages that begin as zeroes.
    fn blank_pages(&self) -> impl Iterator<Item = Pfn> + use<> {
        let rings = self.layout.rings.map(|rings| [rings.store, rings.console]);
        rings.into_iter().flatten().chain([self.layout.stack])
    }

    fn run_job<T: BuildTarget>(&mut self, stage: Stage, index: u64, target: &mut T) -> Result<(), T::Error> {
        match stage {
            Stage::Image => self.write_image_page(index, target),
            Stage::HypercallPage => match self.kernel.hypercall_page_index() {
                Some(page) => target.hypercall_page(Pfn::new(page)),
                None => Ok(()),
            },
            Stage::Module => self.write_module_page(index, target),
            Stage::List => self.write_list_page(index, target),
            Stage::StartInfo => self.write_start_info(target),
            Stage::Blank => match self.blank_pages().nth(index as usize) {
                Some(page) => blank(page, target),
                None => Ok(()),
            },
            Stage::Tables => self.write_table(index, target),
        }
    }

    /// Composes a page from all segments that have bytes in it: two may share one.
    fn write_image_page<T: BuildTarget>(&mut self, index: u64, target: &mut T) -> Result<(), T::Error> {
        let Some(pfn) = self.layout.image.nth(index) else { return Ok(()) };
        let mut any = false;
        for segment in self.kernel.segments() {
            let Some((offset, bytes)) = part_in_page(segment, pfn) else { continue };
            if bytes.len() == PAGE_SIZE {
                return target.write(pfn, 0, bytes);
            }
            if !core::mem::replace(&mut any, true) {
                self.page = [0; PAGE_SIZE];
            }
            copy_to(&mut self.page, offset, bytes);
        }
        if any { target.write(pfn, 0, &self.page) } else { blank(pfn, target) }
    }

    fn write_module_page<T: BuildTarget>(&mut self, index: u64, target: &mut T) -> Result<(), T::Error> {
        let place = self.layout.module.and_then(|module| module.frames.nth(index));
        let bytes = self.parameters.module.chunks(PAGE_SIZE).nth(index as usize);
        let Some((pfn, bytes)) = place.zip(bytes) else { return Ok(()) };
        if bytes.len() == PAGE_SIZE {
            return target.write(pfn, 0, bytes);
        }
        self.page = [0; PAGE_SIZE];
        copy_to(&mut self.page, 0, bytes);
        target.write(pfn, 0, &self.page)
    }

    fn write_list_page<T: BuildTarget>(&mut self, index: u64, target: &mut T) -> Result<(), T::Error> {
        let Some(pfn) = self.layout.p2m.nth(index) else { return Ok(()) };
        let first = index * LIST_ENTRIES;
        for (word, entry) in self.page.as_chunks_mut::<8>().0.iter_mut().zip(first..) {
            let value = if entry < self.layout.nr_pages { target.mfn_of(Pfn::new(entry))?.get() } else { 0 };
            *word = value.to_le_bytes();
        }
        target.write(pfn, 0, &self.page)
    }

    fn write_table<T: BuildTarget>(&mut self, index: u64, target: &mut T) -> Result<(), T::Error> {
        let Some((table, pfn)) = self.layout.tables.nth(index) else { return Ok(()) };
        self.page = [0; PAGE_SIZE];
        let used = self.layout.tables.used(table);
        let words = self.page.as_chunks_mut::<8>().0.get_mut(used.start as usize..used.end as usize);
        for (word, entry) in words.into_iter().flatten().zip(used) {
            let value = self.layout.tables.entry(table, entry, |pfn| target.mfn_of(pfn))?;
            *word = value.to_le_bytes();
        }
        target.write(pfn, 0, &self.page)
    }

    fn write_start_info<T: BuildTarget>(&mut self, target: &mut T) -> Result<(), T::Error> {
        let (layout, parameters) = (&self.layout, &self.parameters);
        let mut info = StartInfo::new();
        let mut flags = StartFlags::empty();
        info.nr_pages = layout.nr_pages;
        info.shared_info = parameters.shared_info.get();
        if self.kernel.role() == Role::Initial {
            // Its console is a hypercall and there is no video console to describe: the union stays zero.
            flags |= StartFlags::PRIVILEGED | StartFlags::INITDOMAIN;
        }
        if let Some(rings) = layout.rings {
            info.store_mfn = target.mfn_of(rings.store)?;
            info.store_evtchn = parameters.store_port;
            let mfn = target.mfn_of(rings.console)?;
            info.console = ConsoleStart { mfn, evtchn: parameters.console_port, ..ConsoleStart::default() };
        }
        info.pt_base = layout.address_of(layout.page_tables.first).get();
        info.nr_pt_frames = layout.page_tables.pages;
        info.mfn_list = layout.p2m_va.get();
        if let Some(list) = layout.p2m_outside {
            (info.first_p2m_pfn, info.nr_p2m_frames) = (list.first.get(), list.pages);
        }
        if let Some(module) = layout.module {
            let first = module.frames.first;
            if !module.mapped {
                flags |= StartFlags::MOD_START_PFN;
            }
            info.mod_start = if module.mapped { layout.address_of(first).get() } else { first.get() };
            info.mod_len = parameters.module.len() as u64;
        }
        info.flags = flags.bits();
        // It fits: Builder::new has looked.
        info.set_command_line(parameters.command_line);
        self.page = [0; PAGE_SIZE];
        copy_to(&mut self.page, 0, info.as_bytes());
        target.write(self.layout.start_info, 0, &self.page)
    }

    fn built<T: BuildTarget>(&self, target: &mut T) -> Result<Built, T::Error> {
        let layout = &self.layout;
        Ok(Built {
            entry: self.kernel.entry(),
            stack_top: layout.address_of(Pfn::new(layout.stack.get() + 1)),
            start_info: layout.address_of(layout.start_info),
            root: target.mfn_of(layout.page_tables.first)?,
            page_tables: layout.page_tables,
            used_pages: layout.used_pages(),
        })
    }
}

fn blank<T: BuildTarget>(pfn: Pfn, target: &mut T) -> Result<(), T::Error> {
    if target.starts_blank() { Ok(()) } else { target.zero(pfn) }
}

/// The file's bytes of `segment` that belong into page `pfn`, with their offset in it.
fn part_in_page<'a>(segment: &Segment<'a>, pfn: Pfn) -> Option<(usize, &'a [u8])> {
    let page = PAGE_SIZE as u64;
    let page_start = pfn.get().checked_mul(page)?;
    let data_end = segment.start.checked_add(segment.data.len() as u64)?;
    let from = segment.start.max(page_start);
    let to = data_end.min(page_start.checked_add(page)?);
    let part = from.checked_sub(segment.start)? as usize..to.checked_sub(segment.start)? as usize;
    let bytes = segment.data.get(part).filter(|bytes| !bytes.is_empty())?;
    Some((from.checked_sub(page_start)? as usize, bytes))
}

/// Copies `bytes` into `page` at `offset`; callers have computed both to fit.
fn copy_to(page: &mut [u8; PAGE_SIZE], offset: usize, bytes: &[u8]) {
    if let Some(to) = page.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len())) {
        to.copy_from_slice(bytes);
    }
}

/// A built domain: what its first vCPU needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Built {
    /// The first instruction.
    pub entry: VirtAddr,
    /// Where the boot stack begins, growing down.
    pub stack_top: VirtAddr,
    /// The start_info page.
    pub start_info: VirtAddr,
    /// The root page table, to be pinned as an L4.
    pub root: Mfn,
    /// Page tables of the boot region, the root first.
    pub page_tables: Extent,
    /// Pages from pfn 0 on that hold something or are mapped.
    pub used_pages: u64,
}

impl Built {
    /// The state that the first vCPU starts in: in kernel mode, start_info in rsi, no callbacks, upcalls masked by shared_info.
    #[must_use]
    pub fn vcpu_context(&self) -> VcpuGuestContext {
        let mut context = VcpuGuestContext::ZERO;
        context.flags = (VcpuContextFlags::IN_KERNEL | VcpuContextFlags::ONLINE).bits();
        context.user_regs = CpuUserRegs {
            rip: self.entry.get(),
            rsp: self.stack_top.get(),
            rsi: self.start_info.get(),
            rflags: RFLAGS_IF,
            cs: FLAT_KERNEL_CS,
            ss: FLAT_KERNEL_SS,
            ds: FLAT_KERNEL_DS,
            es: FLAT_KERNEL_DS,
            fs: FLAT_KERNEL_DS,
            gs: FLAT_KERNEL_DS,
            ..CpuUserRegs::default()
        };
        context.kernel_ss = u64::from(FLAT_KERNEL_SS);
        context.kernel_sp = self.stack_top.get();
        let [.., cr3, _, _, _, _] = &mut context.ctrlreg;
        *cr3 = frame_to_cr3(self.root);
        let [.., dr6, dr7] = &mut context.debugreg;
        (*dr6, *dr7) = (DR6_RESET, DR7_RESET);
        context
    }
}

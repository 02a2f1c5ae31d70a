//! Builds domains in memory and walks their page tables as the processor would.

mod common;

use common::*;
use domain_builder::{BuildTarget, Builder, Built, Kernel, Layout, LayoutError, Parameters, Role};
use hypercall_abi::start_info::{StartFlags, StartInfo};
use hypercall_abi::{MachAddr, Mfn, Pfn, Port, VirtAddr};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use zerocopy::FromBytes;

/// What a page holds before the builder comes: nothing may rely on it.
const DIRT: u8 = 0xcc;
const MODULE: &[u8] = b"boot archive";

/// Machine memory of one domain; frames are scattered so that pfn and mfn cannot be mixed up.
struct Memory {
    nr_pages: u64,
    frames: HashMap<u64, Vec<u8>>,
    writes: HashMap<u64, u32>,
    stubs: Option<u64>,
    /// Fail every write until this many were tried.
    failures: u32,
}

fn mfn(pfn: u64) -> u64 {
    0x10_0000 + (pfn ^ 0x155)
}

impl Memory {
    fn new(nr_pages: u64) -> Self {
        Self { nr_pages, frames: HashMap::new(), writes: HashMap::new(), stubs: None, failures: 0 }
    }

    fn frame(&self, mfn: u64) -> Vec<u8> {
        self.frames.get(&mfn).cloned().unwrap_or(vec![DIRT; 4096])
    }

    fn word(&self, mfn: u64, index: u64) -> u64 {
        let frame = self.frame(mfn);
        u64::from_le_bytes(frame[index as usize * 8..][..8].try_into().unwrap())
    }

    /// All present leaves: page number (bits 47 to 12 of the address), frame, writable.
    fn leaves(&self, root: u64) -> Vec<(u64, u64, bool)> {
        let mut tables = vec![(root, 0)];
        for _level in [4, 3, 2] {
            let mut below = Vec::new();
            for (table, prefix) in tables {
                let entries = (0..512).map(|i| (prefix * 512 + i, self.word(table, i)));
                below.extend(entries.filter(|e| e.1 != 0).map(|(prefix, entry)| {
                    assert_eq!(entry & 0xfff, 0x67, "links as Xen's builder makes them");
                    (entry >> 12, prefix)
                }));
            }
            tables = below;
        }
        let entries = tables
            .iter()
            .flat_map(|&(table, prefix)| (0..512).map(move |i| (prefix * 512 + i, self.word(table, i))));
        entries
            .filter(|e| e.1 != 0)
            .map(|(page, entry)| {
                assert_eq!(entry & 0xffd, 0x21, "present, accessed, perhaps writable");
                (page, entry >> 12, entry & 2 != 0)
            })
            .collect()
    }
}

impl BuildTarget for Memory {
    type Error = &'static str;

    fn mfn_of(&mut self, pfn: Pfn) -> Result<Mfn, Self::Error> {
        assert!(pfn.get() < self.nr_pages, "{pfn} of {}", self.nr_pages);
        Ok(Mfn::new(mfn(pfn.get())))
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), Self::Error> {
        assert!(pfn.get() < self.nr_pages && offset + bytes.len() <= 4096);
        if self.failures > 0 {
            self.failures -= 1;
            return Err("not now");
        }
        *self.writes.entry(pfn.get()).or_default() += 1;
        let frame = self.frames.entry(mfn(pfn.get())).or_insert(vec![DIRT; 4096]);
        frame[offset..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, pfn: Pfn) -> Result<(), Self::Error> {
        self.write(pfn, 0, &[0; 4096])
    }

    fn hypercall_page(&mut self, pfn: Pfn) -> Result<(), Self::Error> {
        assert_eq!(self.stubs.replace(pfn.get()), None);
        Ok(())
    }
}

fn parameters(module: &[u8]) -> Parameters<'_> {
    Parameters {
        module,
        command_line: b"console=hvc0 quiet",
        shared_info: MachAddr::new(0x7_7000),
        store_port: Port::new(1),
        console_port: Port::new(2),
    }
}

/// Builds and checks everything that holds for every domain.
fn check(elf: &Elf, role: Role, nr_pages: u64, module: &[u8]) -> (Memory, Layout, Built) {
    let bytes = elf.bytes();
    let kernel = Kernel::parse(&bytes, role).unwrap();
    let mut memory = Memory::new(nr_pages);
    let mut builder = Builder::new(kernel.clone(), nr_pages, parameters(module)).unwrap();
    let layout = *builder.layout();
    let built = builder.run(&mut memory).unwrap();
    assert_eq!(builder.step(&mut memory), Ok(Some(built)), "done stays done");
    assert!(memory.writes.values().all(|&count| count == 1), "each page once: {:?}", memory.writes);

    check_places(&layout);
    check_mappings(&memory, &layout, &built, kernel.virt_base());
    check_image(&memory, &kernel);
    check_start_info(&memory, &layout, &built, role, module);

    // The list, read through the page tables, names every frame.
    let leaves: HashMap<u64, u64> =
        memory.leaves(built.root.get()).into_iter().map(|(page, frame, _)| (page, frame)).collect();
    for pfn in 0..nr_pages {
        let page = (layout.p2m_va.get() << 16 >> 28) + pfn / 512;
        assert_eq!(memory.word(leaves[&page], pfn % 512), mfn(pfn));
    }
    (memory, layout, built)
}

/// Nothing overlaps, all is inside the domain, padding and border as promised.
fn check_places(layout: &Layout) {
    let mut taken = HashSet::new();
    let mut take = |first: u64, pages: u64| {
        for pfn in first..first + pages {
            assert!(pfn < layout.nr_pages && taken.insert(pfn), "{pfn} twice: {layout:?}");
        }
    };
    take(layout.image.first.get(), layout.image.pages);
    if let Some(module) = layout.module {
        take(module.frames.first.get(), module.frames.pages);
        assert_eq!(module.mapped, module.frames.first.get() < layout.region.pages);
    }
    match layout.p2m_outside {
        Some(list) => take(list.first.get(), list.pages),
        None => take(layout.p2m.first.get(), layout.p2m.pages),
    }
    take(layout.start_info.get(), 1);
    if let Some(rings) = layout.rings {
        assert_eq!(rings.store.get(), layout.start_info.get() + 1);
        take(rings.store.get(), 1);
        take(rings.console.get(), 1);
    }
    take(layout.page_tables.first.get(), layout.page_tables.pages);
    take(layout.stack.get(), 1);
    let outside = layout.used_pages() - layout.region.pages;
    let padding = layout.region.pages - layout.stack.get() - 1;
    assert!(padding >= 128 || layout.region.pages + outside == layout.nr_pages, "{layout:?}");
    assert!(layout.used_pages() <= layout.nr_pages);
}

/// The region is mapped exactly, each page once, all writable but page tables; no table is missing or idle.
fn check_mappings(memory: &Memory, layout: &Layout, built: &Built, virt_base: VirtAddr) {
    let leaves = memory.leaves(built.root.get());
    let outside = layout.p2m_outside.map_or(0, |_| layout.p2m.pages);
    assert_eq!(leaves.len() as u64, layout.region.pages + outside);
    let mut seen = HashSet::new();
    let base = virt_base.get() << 16 >> 28;
    for (page, frame, writable) in leaves {
        let pfn = (frame - 0x10_0000) ^ 0x155;
        assert!(seen.insert(pfn), "{pfn} mapped twice");
        assert_eq!(writable, !layout.page_tables.contains(Pfn::new(pfn)));
        let list = layout.p2m_va.get() << 16 >> 28;
        let expected = if layout.p2m_outside.is_some() && layout.p2m.contains(Pfn::new(pfn)) {
            list + pfn - layout.p2m.first.get()
        } else {
            base + pfn
        };
        assert_eq!(page, expected);
    }
    // Tables by breadth-first search are those of the layout, in order L4, L3..., L2..., L1....
    let mut found = vec![built.root.get()];
    let mut level = vec![built.root.get()];
    for _ in 0..3 {
        level = level
            .iter()
            .flat_map(|&table| (0..512).map(move |i| memory.word(table, i)))
            .filter(|&entry| entry != 0)
            .map(|entry| entry >> 12)
            .collect();
        found.extend(&level);
    }
    let mut expected: Vec<u64> =
        (0..layout.page_tables.pages).map(|i| mfn(layout.page_tables.first.get() + i)).collect();
    assert_eq!(built.root.get(), expected[0]);
    if let Some(list) = layout.p2m_outside {
        expected.extend((layout.p2m.end()..list.end()).map(mfn));
        found.sort_unstable();
        expected.sort_unstable();
    }
    assert_eq!(found, expected);
}

fn check_image(memory: &Memory, kernel: &Kernel<'_>) {
    for segment in kernel.segments() {
        for offset in (0..segment.size).step_by(61).chain([segment.size - 1]) {
            let at = segment.start + offset;
            let expected = segment.data.get(offset as usize).copied().unwrap_or(0);
            assert_eq!(memory.frame(mfn(at / 4096))[at as usize % 4096], expected, "byte {at:#x}");
        }
    }
    assert_eq!(memory.stubs, kernel.hypercall_page_index());
}

fn check_start_info(memory: &Memory, layout: &Layout, built: &Built, role: Role, module: &[u8]) {
    let page = memory.frame(mfn(layout.start_info.get()));
    let (info, rest) = StartInfo::read_from_prefix(&page).unwrap();
    assert!(rest.iter().all(|&byte| byte == 0));
    assert!(info.magic.starts_with(b"xen-3.0-x86_64\0"));
    assert_eq!((info.nr_pages, info.shared_info), (layout.nr_pages, 0x7_7000));
    assert_eq!(info.command_line(), b"console=hvc0 quiet");
    let address = |pfn: u64| {
        built.start_info.get().wrapping_add((pfn.wrapping_sub(layout.start_info.get())).wrapping_mul(4096))
    };
    assert_eq!(info.pt_base, address(layout.page_tables.first.get()));
    assert_eq!(info.nr_pt_frames, layout.page_tables.pages);
    assert_eq!(built.stack_top.get(), address(layout.stack.get() + 1));
    let mut flags = StartFlags::empty();
    match role {
        Role::Initial => {
            flags |= StartFlags::PRIVILEGED | StartFlags::INITDOMAIN;
            assert_eq!((info.store_mfn.get(), info.console.mfn.get()), (0, 0));
        }
        Role::Guest => {
            let rings = layout.rings.unwrap();
            assert_eq!((info.store_mfn.get(), info.store_evtchn), (mfn(rings.store.get()), Port::new(1)));
            assert_eq!(
                (info.console.mfn.get(), info.console.evtchn),
                (mfn(rings.console.get()), Port::new(2))
            );
            assert_eq!(memory.frame(mfn(rings.store.get())), [0; 4096]);
            assert_eq!(memory.frame(mfn(rings.console.get())), [0; 4096]);
        }
    }
    let list = layout.p2m_outside.map_or((0, 0), |list| (list.first.get(), list.pages));
    assert_eq!((info.mfn_list, (info.first_p2m_pfn, info.nr_p2m_frames)), (layout.p2m_va.get(), list));
    assert_eq!(layout.module.is_some(), !module.is_empty());
    if let Some(place) = layout.module {
        let first = place.frames.first.get();
        if !place.mapped {
            flags |= StartFlags::MOD_START_PFN;
        }
        assert_eq!(info.mod_start, if place.mapped { address(first) } else { first });
        for (pfn, bytes) in (first..).zip(module.chunks(4096)) {
            assert!(memory.frame(mfn(pfn)).starts_with(bytes));
        }
    }
    assert_eq!((info.mod_len, info.flags()), (module.len() as u64, flags));
}

#[test]
fn kernels_like_xtf() {
    let (_, layout, built) = check(&Elf::xtf(), Role::Guest, 8192, &[]);
    // p2m 16 pages at 0x114, start_info, two rings, then L4, L3, L2 and the L1s of 4 MiB.
    assert_eq!(layout.start_info, Pfn::new(0x124));
    assert_eq!((layout.page_tables.first, layout.page_tables.pages), (Pfn::new(0x127), 5));
    assert_eq!((layout.region.pages, built.used_pages), (1024, 1024));
    assert_eq!(built.stack_top, VirtAddr::new(0x12d_000));
    check(&Elf::xtf(), Role::Initial, 32768, MODULE);
}

#[test]
fn kernels_like_linux() {
    let (_, layout, built) = check(&Elf::linux(), Role::Guest, 65536, &[7; 10_000]);
    assert_eq!(layout.p2m_va, VirtAddr::new(0x80_0000_0000));
    assert_eq!(layout.start_info, Pfn::new(0x1028));
    assert_eq!(layout.region.pages, 5 * 1024);
    assert_eq!(layout.module.unwrap().frames.first, Pfn::new(5 * 1024));
    // 128 pages of list and its L3, L2, L1.
    assert_eq!(layout.p2m_outside.unwrap().pages, 128 + 3);
    assert_eq!(built.entry, VirtAddr::new(0xffff_ffff_8100_0040));
    check(&Elf::linux(), Role::Initial, 65536, &[]);
}

#[test]
fn a_list_close_below_the_image_shares_its_tables() {
    for init_p2m in [0x3f_0000u64, 0x20_0000, 0x1000_0000 - 0x40_0000] {
        let elf = Elf::minimal(0, 3).number(VIRT_BASE, 0x1000_0000).number(INIT_P2M, init_p2m);
        check(&elf.number(ENTRY, 0x1000_0000), Role::Guest, 4096, MODULE);
    }
    // Straddling table borders below an image whose base is not aligned.
    let elf = Elf::minimal(0, 3).number(VIRT_BASE, 0x4000_1000).number(INIT_P2M, 0x3fff_e000);
    let elf = elf.number(ENTRY, 0x4000_1000);
    check(&elf, Role::Guest, 1024, MODULE);
    let bytes = elf.bytes();
    let error = Layout::plan(&Kernel::parse(&bytes, Role::Guest).unwrap(), 4096, 0);
    assert!(matches!(error, Err(LayoutError::ListOverlapsRegion { .. })), "{error:?}");
    // Above VIRT_BASE it is as good as none.
    let elf = Elf::minimal(0, 3).number(VIRT_BASE, 0x1000_0000).number(INIT_P2M, 0x2000_0000);
    let (_, layout, _) = check(&elf.number(ENTRY, 0x1000_0000), Role::Guest, 4096, MODULE);
    assert_eq!(layout.p2m_outside, None);
}

#[test]
fn small_domains_end_the_region_with_their_memory() {
    let elf = Elf::minimal(0, 20).number(HYPERCALL_PAGE, 0x1000);
    let (_, layout, _) = check(&elf, Role::Guest, 128, MODULE);
    assert_eq!(layout.region.pages, 128);
    // The least: image 20, module 1, list 1, start_info, rings, L4 L3 L2 L1, stack.
    check(&elf, Role::Guest, 30, MODULE);
    let bytes = elf.bytes();
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    let error = Layout::plan(&kernel, 29, MODULE.len()).unwrap_err();
    assert_eq!(error, LayoutError::NotEnoughMemory { needed: 30, available: 29 });
    assert_eq!(
        error.to_string(),
        "not enough memory: the kernel needs 120 KiB to start, the domain has 116 KiB"
    );
    assert!(Layout::plan(&kernel, 0, 0).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    let plan = |elf: Elf, pages: u64, module: usize| {
        let bytes = elf.bytes();
        Layout::plan(&Kernel::parse(&bytes, Role::Guest).unwrap(), pages, module).unwrap_err().to_string()
    };
    let at = |base: u64| Elf::minimal(0, 3).number(VIRT_BASE, base).number(ENTRY, base);
    assert!(plan(at(0xffff_8300_0000_0000), 1024, 0).contains("boot region"));
    assert!(plan(at(0x7fff_ffff_f000), 1024, 0).contains("boot region"));
    assert!(plan(at(0x0000_8000_0000_0000), 1024, 0).contains("boot region"));
    assert!(plan(at(0xffff_ffff_ffff_0000), 1024, 0).contains("boot region"));
    assert!(plan(at(0xffff_ffff_8000_0000).number(INIT_P2M, 0x9000_0000_0000), 1024, 0).contains("INIT_P2M"));
    assert!(
        plan(at(0xffff_ffff_8000_0000).number(INIT_P2M, 0xffff_8000_0000_0000), 1024, 0).contains("INIT_P2M")
    );
    assert!(plan(at(0), u64::MAX, 0).contains("pages of memory"));
    assert!(plan(at(0), 1024, usize::MAX).contains("not enough memory"));
    let top = check(&at(0xffff_ffff_ffc0_0000), Role::Guest, 4096, &[]);
    assert_eq!(top.1.region.pages, 1024);

    let bytes = at(0).bytes();
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    let text = [b'x'; 1024];
    let new = |len: usize| {
        Builder::new(kernel.clone(), 1024, Parameters { command_line: &text[..len], ..parameters(&[]) })
    };
    assert!(new(1023).is_ok());
    assert_eq!(new(1024).unwrap_err(), LayoutError::CommandLineTooLong { len: 1024, limit: 1023 });
}

#[test]
fn a_failed_step_can_be_repeated() {
    let bytes = Elf::linux().bytes();
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    let mut plain = Memory::new(8192);
    Builder::new(kernel.clone(), 8192, parameters(MODULE)).unwrap().run(&mut plain).unwrap();

    let mut bumpy = Memory::new(8192);
    let mut builder = Builder::new(kernel, 8192, parameters(MODULE)).unwrap();
    let mut steps = 0;
    let built = loop {
        bumpy.failures = u32::from(steps % 3 == 0);
        steps += 1;
        if let Ok(Some(built)) = builder.step(&mut bumpy) {
            break built;
        }
    };
    assert_eq!(plain.frames, bumpy.frames);
    assert_eq!(built.vcpu_context().ctrlreg[3], mfn(builder.layout().page_tables.first.get()) << 12);
}

#[test]
fn the_first_vcpu() {
    let (_, _, built) = check(&Elf::xtf(), Role::Guest, 8192, &[]);
    let context = built.vcpu_context();
    let regs = context.user_regs;
    assert_eq!((regs.rip, regs.rsp, regs.rsi), (0x10_0000, built.stack_top.get(), built.start_info.get()));
    assert_eq!((regs.cs, regs.ss, regs.rflags), (0xe033, 0xe02b, 0x200));
    assert_eq!((regs.ds, regs.es, regs.fs, regs.gs), (0, 0, 0, 0));
    assert_eq!((context.flags, context.ctrlreg[3]), (1 << 2 | 1 << 5, built.root.get() << 12));
    assert_eq!((context.kernel_ss, context.kernel_sp), (0xe02b, built.stack_top.get()));
    assert_eq!((context.debugreg[6], context.debugreg[7]), (0xffff_0ff0, 0x400));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Any base, image, module and memory: either a sound domain or the exact number of pages that is missing.
    #[test]
    fn any_domain(
        base in prop::sample::select(vec![0u64, 0x1000, 0x3f_f000, 0x3fff_f000, 0x7f_ffff_f000, 0xffff_ffff_8000_0000]),
        start in 0u64..700,
        pages in 1u64..60,
        bss in 0u64..9000,
        init_p2m in prop::option::of(prop::sample::select(vec![0x1000u64, 0x10_0000, 0x80_0000_0000])),
        by_pfn in any::<bool>(),
        module in 0usize..20_000,
        memory in 20u64..3000,
        initial in any::<bool>(),
    ) {
        let mut elf = Elf::minimal(start * 4096, pages).number(VIRT_BASE, base).number(ENTRY, base + start * 4096);
        elf.loads.push(Load { paddr: (start + pages) * 4096 + 100, data: vec![0x5a; 33], memsz: 33 + bss });
        if let Some(va) = init_p2m {
            elf = elf.number(INIT_P2M, va);
        }
        if by_pfn {
            elf = elf.number(MOD_START_PFN, 1);
        }
        let role = if initial { Role::Initial } else { Role::Guest };
        let module = vec![0x77; module];
        let bytes = elf.bytes();
        let kernel = Kernel::parse(&bytes, role).unwrap();
        match Layout::plan(&kernel, memory, module.len()) {
            Ok(_) => {
                check(&elf, role, memory, &module);
            }
            Err(LayoutError::NotEnoughMemory { needed, available }) => {
                prop_assert!(available == memory && needed > memory);
                prop_assert!(Layout::plan(&kernel, needed - 1, module.len()).is_err());
            }
            Err(LayoutError::ListOverlapsRegion { .. }) => prop_assert!(init_p2m.is_some()),
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}

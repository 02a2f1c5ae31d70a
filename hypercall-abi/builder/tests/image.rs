//! Which images are taken, and why the others are not.

mod common;

use common::*;
use domain_builder::{ImageError, Kernel, Role, elf_end};
use proptest::prelude::*;

fn refused(elf: &Elf) -> ImageError {
    Kernel::parse(&elf.bytes(), Role::Guest).expect_err("refused")
}

#[test]
fn defaults_without_notes() {
    let bytes = Elf::xtf().bytes();
    let kernel = Kernel::parse(&bytes, Role::Initial).unwrap();
    assert_eq!((kernel.virt_base().get(), kernel.entry().get()), (0, 0x10_0000));
    assert_eq!((kernel.start(), kernel.end()), (0x10_0000, 0x11_4000));
    assert_eq!(kernel.hypercall_page_index(), Some(0x102));
    let [segment] = kernel.segments() else { panic!("{:?}", kernel.segments()) };
    assert_eq!((segment.size, segment.data.len()), (20 * 4096, 20 * 4096 - 96));
}

#[test]
fn base_and_offset_move_the_image() {
    let bytes = Elf::linux().bytes();
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    assert_eq!((kernel.start(), kernel.entry().get()), (0x100_0000, 0xffff_ffff_8100_0040));
    assert_eq!(kernel.notes().init_p2m, Some(0x80_0000_0000));
    assert!(kernel.notes().mod_start_pfn);

    // Old kernels put virtual addresses into p_paddr and say so.
    let old = Elf::minimal(0xc000_0000_0010_0000, 2);
    let old = old.number(VIRT_BASE, 0xffff_ffff_8000_0000).number(PADDR_OFFSET, 0xc000_0000_0000_0000);
    let bytes = old.number(ENTRY, 0xffff_ffff_8010_0000).bytes();
    assert_eq!(Kernel::parse(&bytes, Role::Guest).unwrap().start(), 0x10_0000);
}

#[test]
fn notes_of_a_section_and_short_numbers() {
    let mut elf = Elf::minimal(0x40_0000, 2);
    elf.notes_in_section = true;
    elf.notes.push((VIRT_BASE, 0x10_0000u32.to_le_bytes().to_vec()));
    elf.notes.push((PADDR_OFFSET, 0x10_0000u32.to_le_bytes().to_vec()));
    elf.notes.push((L1_MFN_VALID, [1u64.to_le_bytes(), 3u64.to_le_bytes()].concat()));
    let bytes = elf.bytes();
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    assert_eq!(kernel.notes().l1_mfn_valid, Some((1, 3)));
    assert_eq!((kernel.virt_base().get(), kernel.start()), (0x10_0000, 0x30_0000));
}

#[test]
fn a_section_of_before_notes_is_understood() {
    let mut elf = Elf::minimal(0x10_0000, 4);
    (elf.notes, elf.entry) = (vec![], 0x10_0000);
    let with = |said| Elf { extra_section: Some(("__xen_guest", said)), ..elf.clone() }.bytes();
    // As Mini-OS of Xen 4.5 says it.
    let bytes = with(
        "GUEST_OS=Mini-OS,XEN_VER=xen-3.0,VIRT_BASE=0x0,ELF_PADDR_OFFSET=0x0,HYPERCALL_PAGE=0x102,LOADER=generic\0?",
    );
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    assert_eq!((kernel.start(), kernel.hypercall_page_index()), (0x10_0000, Some(0x102)));
    assert_eq!(kernel.notes().guest_os, Some("Mini-OS"));
    // Without an offset, physical addresses are virtual ones.
    let bytes =
        with("LOADER=generic,XEN_VER=xen-3.0,VIRT_BASE=0x100000,HYPERCALL_PAGE=2,VIRT_ENTRY=1048592,NEW");
    let kernel = Kernel::parse(&bytes, Role::Guest).unwrap();
    assert_eq!((kernel.start(), kernel.entry().get()), (0, 0x10_0010));
    assert_eq!((kernel.virt_base().get(), kernel.hypercall_page_index()), (0x10_0000, Some(2)));
    // Notes count before it.
    let notes =
        Elf { extra_section: Some(("__xen_guest", "LOADER=other")), ..Elf::minimal(0x10_0000, 4) }.bytes();
    assert!(Kernel::parse(&notes, Role::Guest).is_ok());
}

#[test]
fn refusals_name_the_cause() {
    let base = || Elf::minimal(0x40_0000, 2);
    let cases = [
        (Elf { notes: vec![], ..base() }, "no Xen ELF notes: not a PV kernel"),
        (
            Elf {
                notes: vec![],
                extra_section: Some(("__xen_guest", "LOADER=generic,VIRT_BASE=low")),
                ..base()
            },
            "section __xen_guest says \"VIRT_BASE=low\", which has no meaning",
        ),
        (
            Elf {
                notes: vec![],
                extra_section: Some(("__xen_guest", "GUEST_OS=x,XEN_VER=xen-3.0")),
                ..base()
            },
            "neither LOADER",
        ),
        (
            Elf {
                notes: vec![],
                extra_section: Some((
                    "__xen_guest",
                    "LOADER=generic,XEN_VER=xen-3.0,VIRT_BASE=0xfffffffffffff000,HYPERCALL_PAGE=1",
                )),
                ..base()
            },
            "HYPERCALL_PAGE 0x1 leaves the address space",
        ),
        (base().without(LOADER), "neither LOADER \"generic\" nor GUEST_OS \"linux\""),
        (base().without(LOADER).text(GUEST_OS, "plan9"), "GUEST_OS \"plan9\""),
        (base().without(XEN_VERSION).text(XEN_VERSION, "xen-4.0"), "\"xen-4.0\", not \"xen-3.0\""),
        (base().number(PHYS32_ENTRY, 0x40_0000), "PHYS32_ENTRY note: a PVH kernel"),
        (base().text(FEATURES, "!writable_page_tables|!supervisor_mode_kernel"), "supervisor_mode_kernel"),
        (base().text(FEATURES, "!telepathy"), "telepathy"),
        (base().text(FEATURES, "!dom0"), "feature dom0"),
        (base().number(PADDR_OFFSET, 0), "PADDR_OFFSET without note VIRT_BASE"),
        (base().number(VIRT_BASE, 0x12), "VIRT_BASE 0x12 is not page-aligned"),
        (base().number(VIRT_BASE, 0).number(PADDR_OFFSET, 0x50_0000), "lies below PADDR_OFFSET 0x500000"),
        (base().number(ENTRY, 0x40_2000), "entry point 0x402000 is outside the image 0x400000..0x402000"),
        (base().number(ENTRY, 0x3f_ffff), "outside the image"),
        (base().number(HYPERCALL_PAGE, 0x40_0010), "HYPERCALL_PAGE 0x400010"),
        (base().number(HYPERCALL_PAGE, 0x40_2000), "HYPERCALL_PAGE 0x402000"),
        (base().text(VIRT_BASE, "12"), "note XEN_ELFNOTE_VIRT_BASE has unusable content of 3 bytes"),
        (base().number(VIRT_BASE, 0xffff_ffff_ffff_f000), "leaves the address space"),
        (Elf { loads: vec![], ..base() }, "no loadable segment"),
    ];
    for (elf, expected) in cases {
        let message = refused(&elf).to_string();
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    assert!(Kernel::parse(&base().text(FEATURES, "!dom0").bytes(), Role::Initial).is_ok());
    let not_dom0 = base().number(SUPPORTED_FEATURES, 1).bytes();
    assert!(Kernel::parse(&not_dom0, Role::Guest).is_ok());
    assert_eq!(Kernel::parse(&not_dom0, Role::Initial), Err(ImageError::NotDom0Capable));
}

#[test]
fn broken_segments() {
    let mut elf = Elf::minimal(0x40_0000, 2);
    elf.loads.push(Load { paddr: 0x40_1fff, data: vec![], memsz: 1 });
    assert_eq!(refused(&elf), ImageError::SegmentsOverlap { first: 0x40_0000, second: 0x40_1fff });
    elf.loads[1].paddr = 0x40_2000;
    assert!(Kernel::parse(&elf.bytes(), Role::Guest).is_ok());
    elf.loads[1] = Load { paddr: u64::MAX - 1, data: vec![], memsz: 4 };
    assert!(matches!(refused(&elf), ImageError::AddressOverflow { .. }));
    elf.loads[1] = Load { paddr: 0, data: vec![1, 2], memsz: 1 };
    assert_eq!(refused(&elf), ImageError::SegmentSize { file: 2, memory: 1 });
    elf.loads = (0..33).map(|i| Load { paddr: 0x40_0000 + i * 4096, data: vec![], memsz: 1 }).collect();
    assert_eq!(refused(&elf), ImageError::TooManySegments { limit: 32 });
}

#[test]
fn broken_headers() {
    let parse = |bytes: &[u8]| Kernel::parse(bytes, Role::Guest).expect_err("refused").to_string();
    let good = Elf::xtf().bytes();
    assert_eq!(parse(&[]), "truncated: the ELF header ends at byte 64, the file at byte 0");
    assert!(parse(&good[..good.len() - 1]).starts_with("truncated"));
    assert!(parse(&good[..4096]).starts_with("truncated"));
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    assert_eq!(parse(&with(0, b"\x1f\x8b\x08\x00")), "not an ELF file (starts with 1f 8b 08 00)");
    let mut bz_image = with(0x202, b"HdrS");
    bz_image[0] = b'M';
    assert!(parse(&bz_image).contains("bzImage"));
    assert!(parse(&with(4, &[1])).contains("32-bit"));
    assert!(parse(&with(5, &[2])).contains("big-endian"));
    assert!(parse(&with(18, &[3])).contains("machine 3"));
    assert!(parse(&with(16, &[1])).contains("type 1"));
    assert!(parse(&with(54, &[55])).contains("header table entry"));
    // A note segment beyond the file: p_offset of the first program header.
    assert!(parse(&with(64 + 8, &[0xff; 4])).starts_with("truncated: a note segment"));
}

#[test]
fn the_end_of_the_file_is_found_with_data_behind_it() {
    for elf in [Elf::xtf(), Elf::linux(), Elf { loads: vec![], ..Elf::xtf() }] {
        let bytes = elf.bytes();
        let blob = [bytes.as_slice(), &[0xaa; 5000]].concat();
        assert_eq!(elf_end(&blob), Ok(bytes.len()));
        assert!(elf_end(&bytes[..bytes.len() - 1]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Bytes changed in headers and notes are refused or taken, never a panic, and what is taken keeps the invariants.
    #[test]
    fn corrupted_images(
        linux in any::<bool>(),
        changes in prop::collection::vec((0usize..600, any::<u8>()), 1..12),
        cut in 0usize..100_000,
    ) {
        let mut bytes = if linux { Elf::linux() } else { Elf::xtf() }.bytes();
        bytes.truncate(cut.max(700));
        for (at, value) in changes {
            bytes[at] = value;
        }
        let _ = elf_end(&bytes);
        if let Ok(kernel) = Kernel::parse(&bytes, Role::Guest) {
            let offset = kernel.entry().get() - kernel.virt_base().get();
            prop_assert!((kernel.start()..kernel.end()).contains(&offset));
            for segment in kernel.segments() {
                prop_assert!(segment.data.len() as u64 <= segment.size && segment.end() <= kernel.end());
            }
        }
    }

    #[test]
    fn random_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..400), elf in any::<bool>()) {
        if elf && bytes.len() > 20 {
            bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            bytes[16..20].copy_from_slice(&[2, 0, 62, 0]);
        }
        prop_assert!(Kernel::parse(&bytes, Role::Initial).is_err());
        let _ = elf_end(&bytes);
    }
}

//! A kernel image: an ELF file whose notes and segments have been checked.

use crate::error::ImageError;
use crate::notes::{Notes, OFFERED_FEATURES};
use crate::{PAGE_SIZE, page_down, page_up};
use arrayvec::ArrayVec;
use elf::ElfBytes;
use elf::abi;
use elf::endian::LittleEndian;
use elf::parse::ParseError;
use elf::segment::ProgramHeader;
use hypercall_abi::VirtAddr;
use hypercall_abi::version::Features;

/// More than any linker makes without being asked; comparing all pairs stays cheap.
const MAX_SEGMENTS: usize = 32;

/// For whom a kernel is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The first domain of the machine: privileged, console by hypercall, no xenstore of its own at birth.
    Initial,
    /// Any other domain: it gets a console ring and a xenstore ring.
    Guest,
}

impl Role {
    /// The features that a kernel in this role may insist on.
    pub const fn offered_features(self) -> Features {
        match self {
            Self::Initial => OFFERED_FEATURES.union(Features::DOM0),
            Self::Guest => OFFERED_FEATURES,
        }
    }
}

/// One loadable segment: `data`, then zeroes up to `size` bytes, from byte `start` of the domain's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Byte offset from pfn 0.
    pub start: u64,
    /// Bytes in memory, not zero.
    pub size: u64,
    /// What the file holds of it, at most `size` bytes.
    pub data: &'a [u8],
}

impl Segment<'_> {
    /// Byte offset from pfn 0 of the first byte behind the segment.
    pub fn end(&self) -> u64 {
        // Kernel::parse has shown that this does not overflow.
        self.start.saturating_add(self.size)
    }
}

/// A PV kernel that can be loaded: what [`Kernel::parse`] let pass.
///
/// Invariants: `virt_base` is page-aligned; segments do not overlap and lie in `start..end`; `entry` is in the image, the
/// hypercall page a page of it; `virt_base + end` is at most the top of the address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel<'a> {
    role: Role,
    notes: Notes<'a>,
    virt_base: u64,
    entry: u64,
    start: u64,
    end: u64,
    segments: ArrayVec<Segment<'a>, MAX_SEGMENTS>,
}

impl<'a> Kernel<'a> {
    /// Checks `image` as a kernel for `role`.
    ///
    /// # Errors
    /// [`ImageError`] names the first thing found wrong.
    pub fn parse(image: &'a [u8], role: Role) -> Result<Self, ImageError> {
        let file = open(image)?;
        let notes = find_notes(&file, image)?;
        notes.check_interface()?;
        notes.check_features(role.offered_features())?;
        if role == Role::Initial
            && notes.supported_features.is_some_and(|features| !features.contains(Features::DOM0))
        {
            return Err(ImageError::NotDom0Capable);
        }
        let virt_base = notes.virt_base.unwrap_or(0);
        let paddr_base = match (notes.paddr_offset, notes.virt_base) {
            (Some(_), None) => return Err(ImageError::OffsetWithoutBase),
            (offset, _) => offset.unwrap_or(0),
        };
        for (name, value) in [("VIRT_BASE", virt_base), ("PADDR_OFFSET", paddr_base)] {
            if page_down(value) != value {
                return Err(ImageError::Unaligned { name, value });
            }
        }
        let segments = find_segments(&file, image, paddr_base)?;
        let start = segments.iter().map(|segment| segment.start).min().ok_or(ImageError::NoSegments)?;
        let end = segments.iter().map(Segment::end).max().ok_or(ImageError::NoSegments)?;
        let overflow = ImageError::AddressOverflow { what: "the image's end", address: end };
        page_up(end).and_then(|end| virt_base.checked_add(end.saturating_sub(1))).ok_or(overflow)?;

        let kernel = Self {
            role,
            notes,
            virt_base,
            entry: notes.entry.unwrap_or(file.ehdr.e_entry),
            start,
            end,
            segments,
        };
        kernel.check_addresses()?;
        Ok(kernel)
    }

    fn check_addresses(&self) -> Result<(), ImageError> {
        let (start, end) = (self.virt_base.wrapping_add(self.start), self.virt_base.wrapping_add(self.end));
        let offset_of = |address: u64| address.checked_sub(self.virt_base);
        if !offset_of(self.entry).is_some_and(|offset| (self.start..self.end).contains(&offset)) {
            return Err(ImageError::EntryOutside { entry: self.entry, start, end });
        }
        if let Some(page) = self.notes.hypercall_page {
            let inside = page_down(page) == page && offset_of(page).is_some_and(|offset| offset < self.end);
            if !inside {
                return Err(ImageError::HypercallPageOutside { page, start: self.virt_base, end });
            }
        }
        Ok(())
    }

    /// The role it was checked for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// What its notes say.
    pub fn notes(&self) -> &Notes<'a> {
        &self.notes
    }

    /// Virtual address of pfn 0.
    pub fn virt_base(&self) -> VirtAddr {
        VirtAddr::new(self.virt_base)
    }

    /// Virtual address of the first instruction.
    pub fn entry(&self) -> VirtAddr {
        VirtAddr::new(self.entry)
    }

    /// Byte offset from pfn 0 where the image begins.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Byte offset from pfn 0 of the first byte behind the image.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The loadable segments, in file order.
    pub fn segments(&self) -> &[Segment<'a>] {
        &self.segments
    }

    /// Index of the page that gets the hypercall stubs, counted from pfn 0.
    pub fn hypercall_page_index(&self) -> Option<u64> {
        let address = self.notes.hypercall_page?;
        Some(address.checked_sub(self.virt_base)? / PAGE_SIZE)
    }
}

/// Number of bytes of `image` that belong to the ELF file: the largest end of its headers, segments and sections.
///
/// What follows, from the next page border on, is the initial domain's own module.
///
/// # Errors
/// [`ImageError`] if it is no 64-bit ELF file or ends behind `image`.
pub fn elf_end(image: &[u8]) -> Result<usize, ImageError> {
    let file = open(image)?;
    let header = &file.ehdr;
    let table = |offset: u64, entry: u16, count: usize| {
        (count != 0).then(|| (offset, u64::from(entry).saturating_mul(count as u64)))
    };
    let phdrs = file.segments();
    let shdrs = file.section_headers();
    let tables = [
        Some((0, u64::from(header.e_ehsize))),
        table(header.e_phoff, header.e_phentsize, phdrs.map_or(0, |table| table.len())),
        table(header.e_shoff, header.e_shentsize, shdrs.map_or(0, |table| table.len())),
    ];
    let segments =
        phdrs.iter().flat_map(|table| table.iter()).map(|segment| (segment.p_offset, segment.p_filesz));
    let sections = (shdrs.iter().flat_map(|table| table.iter()))
        .filter(|section| !matches!(section.sh_type, abi::SHT_NOBITS | abi::SHT_NULL))
        .map(|section| (section.sh_offset, section.sh_size));
    let mut end = 0;
    for (offset, size) in tables.into_iter().flatten().chain(segments).chain(sections) {
        end = end.max(slice(image, "a segment or section", offset, size)?.1);
    }
    Ok(end)
}

/// The bytes `offset..offset + size` of the file, and their end.
fn slice<'a>(
    image: &'a [u8],
    what: &'static str,
    offset: u64,
    size: u64,
) -> Result<(&'a [u8], usize), ImageError> {
    let end = offset.checked_add(size).ok_or(ImageError::AddressOverflow { what, address: offset })?;
    let truncated = ImageError::Truncated { what, end, size: image.len() as u64 };
    let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
    let (offset, end) = range.ok_or(truncated)?;
    Ok((image.get(offset..end).ok_or(truncated)?, end))
}

fn open(image: &[u8]) -> Result<ElfBytes<'_, LittleEndian>, ImageError> {
    let (head, _) = slice(image, "the ELF header", 0, 64)?;
    if !head.starts_with(&abi::ELFMAGIC) {
        // A boot sector header whose signature is at a fixed place (Linux, Documentation/arch/x86/boot.rst).
        if image.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
            return Err(ImageError::BzImage);
        }
        let magic = *head.first_chunk().unwrap_or(&[0; 4]);
        return Err(ImageError::NotElf { magic });
    }
    if head.get(abi::EI_CLASS) != Some(&abi::ELFCLASS64) || head.get(abi::EI_DATA) != Some(&abi::ELFDATA2LSB)
    {
        return Err(ImageError::Not64Bit);
    }
    let file = ElfBytes::minimal_parse(image).map_err(|error| header_error(&error, image))?;
    if file.ehdr.e_machine != abi::EM_X86_64 {
        return Err(ImageError::NotX86_64 { machine: file.ehdr.e_machine });
    }
    if !matches!(file.ehdr.e_type, abi::ET_EXEC | abi::ET_DYN) {
        return Err(ImageError::NotExecutable { kind: file.ehdr.e_type });
    }
    Ok(file)
}

fn header_error(error: &ParseError, image: &[u8]) -> ImageError {
    match *error {
        ParseError::SliceReadError((_, end)) => {
            let (what, size) = ("the program or section header table", image.len() as u64);
            ImageError::Truncated { what, end: end as u64, size }
        }
        ParseError::BadEntsize(_) => {
            ImageError::BadHeader { what: "unexpected size of a header table entry" }
        }
        ParseError::UnsupportedVersion(_) => ImageError::BadHeader { what: "unknown ELF version" },
        _ => ImageError::BadHeader { what: "unusable header" },
    }
}

/// Notes from the note segments or, if these hold no Xen note, from the note sections; or else what `__xen_guest` says.
fn find_notes<'a>(file: &ElfBytes<'a, LittleEndian>, image: &'a [u8]) -> Result<Notes<'a>, ImageError> {
    let mut notes = Notes::default();
    let mut seen = 0;
    for segment in file.segments().iter().flat_map(|table| table.iter()) {
        // Offset 0 is the ELF header: old linkers left it in note segments that they did not place.
        if segment.p_type == abi::PT_NOTE && segment.p_offset != 0 {
            notes.add(slice(image, "a note segment", segment.p_offset, segment.p_filesz)?.0, &mut seen)?;
        }
    }
    if notes.count == 0 {
        for section in file.section_headers().iter().flat_map(|table| table.iter()) {
            if section.sh_type == abi::SHT_NOTE {
                notes
                    .add(slice(image, "a note section", section.sh_offset, section.sh_size)?.0, &mut seen)?;
            }
        }
    }
    if notes.count == 0 {
        let Ok(Some(section)) = file.section_header_by_name("__xen_guest") else {
            return Err(ImageError::NoXenNotes);
        };
        notes.add_legacy(slice(image, "a section", section.sh_offset, section.sh_size)?.0)?;
    }
    if notes.pvh_only() {
        return Err(ImageError::PvhOnly);
    }
    Ok(notes)
}

fn find_segments<'a>(
    file: &ElfBytes<'a, LittleEndian>,
    image: &'a [u8],
    paddr_base: u64,
) -> Result<ArrayVec<Segment<'a>, MAX_SEGMENTS>, ImageError> {
    let mut segments = ArrayVec::new();
    for header in file.segments().iter().flat_map(|table| table.iter()) {
        // As in Xen, a segment without any access right is not loaded.
        let accessible = header.p_flags & (abi::PF_R | abi::PF_W | abi::PF_X) != 0;
        if header.p_type != abi::PT_LOAD || !accessible || header.p_memsz == 0 {
            continue;
        }
        let segment = segment(&header, image, paddr_base)?;
        for other in &segments {
            let other: &Segment<'_> = other;
            if segment.start < other.end() && other.start < segment.end() {
                return Err(ImageError::SegmentsOverlap { first: other.start, second: segment.start });
            }
        }
        segments.try_push(segment).map_err(|_| ImageError::TooManySegments { limit: MAX_SEGMENTS })?;
    }
    Ok(segments)
}

fn segment<'a>(header: &ProgramHeader, image: &'a [u8], paddr_base: u64) -> Result<Segment<'a>, ImageError> {
    if header.p_filesz > header.p_memsz {
        return Err(ImageError::SegmentSize { file: header.p_filesz, memory: header.p_memsz });
    }
    let (data, _) = slice(image, "a segment", header.p_offset, header.p_filesz)?;
    let below = ImageError::SegmentBelowBase { paddr: header.p_paddr, base: paddr_base };
    let start = header.p_paddr.checked_sub(paddr_base).ok_or(below)?;
    let overflow = ImageError::AddressOverflow { what: "a segment's end", address: header.p_paddr };
    start.checked_add(header.p_memsz).ok_or(overflow)?;
    Ok(Segment { start, size: header.p_memsz, data })
}

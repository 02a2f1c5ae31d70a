//! Why an image cannot be a PV kernel here, in words for the person who named the file.

use arrayvec::ArrayString;
use core::fmt;
use hypercall_abi::elfnote::ElfNote;

/// A piece of text from the image, cut to fit: what an error quotes must not borrow the image.
pub type Quote = ArrayString<32>;

/// Cuts `text` to what a [`Quote`] holds, at a character border.
pub(crate) fn quote(text: &str) -> Quote {
    let mut quote = Quote::new();
    for c in text.chars() {
        if quote.try_push(c).is_err() {
            break;
        }
    }
    quote
}

/// Why an image was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageError {
    /// The file ends before `what` does.
    Truncated { what: &'static str, end: u64, size: u64 },
    /// The first four bytes are not those of an ELF file.
    NotElf { magic: [u8; 4] },
    /// A compressed Linux image, whose payload must be unpacked first.
    BzImage,
    /// An ELF file of another class or byte order.
    Not64Bit,
    /// An ELF file for another machine.
    NotX86_64 { machine: u16 },
    /// Not an executable: a relocatable object or a core dump.
    NotExecutable { kind: u16 },
    /// The headers contradict themselves.
    BadHeader { what: &'static str },
    /// No Xen note in it: an ordinary program, not a PV kernel.
    NoXenNotes,
    /// A word of a `__xen_guest` section (the form of before 2006) whose value is no number, or that is no text.
    BadLegacyWord { word: Quote },
    /// A PVH kernel: it can be entered in 32-bit mode only.
    PvhOnly,
    /// More notes than a kernel can need.
    TooManyNotes { limit: usize },
    /// A note whose content has a size or form that its type does not allow.
    BadNote { note: ElfNote, size: usize },
    /// Neither written for the generic loader nor a Linux.
    BadLoader { loader: Quote, guest_os: Quote },
    /// Written for an interface other than "xen-3.0".
    BadInterface { version: Quote },
    /// A PADDR_OFFSET note without VIRT_BASE has no meaning.
    OffsetWithoutBase,
    /// VIRT_BASE or PADDR_OFFSET is not a multiple of the page size.
    Unaligned { name: &'static str, value: u64 },
    /// The kernel insists on a feature that is not offered to it.
    RequiredFeature { name: Quote },
    /// The kernel says that it cannot run as the initial domain.
    NotDom0Capable,
    /// Nothing to load.
    NoSegments,
    /// More loadable segments than supported.
    TooManySegments { limit: usize },
    /// A segment is larger in the file than in memory.
    SegmentSize { file: u64, memory: u64 },
    /// A segment lies below the physical address that PADDR_OFFSET makes pfn 0.
    SegmentBelowBase { paddr: u64, base: u64 },
    /// Two segments claim the same memory.
    SegmentsOverlap { first: u64, second: u64 },
    /// An address computation left 64 bits or the canonical range.
    AddressOverflow { what: &'static str, address: u64 },
    /// The entry point is not in the image.
    EntryOutside { entry: u64, start: u64, end: u64 },
    /// The hypercall page is not one whole page of the image.
    HypercallPageOutside { page: u64, start: u64, end: u64 },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Truncated { what, end, size } => {
                write!(f, "truncated: {what} ends at byte {end}, the file at byte {size}")
            }
            Self::NotElf { magic: [a, b, c, d] } => {
                write!(f, "not an ELF file (starts with {a:02x} {b:02x} {c:02x} {d:02x})")
            }
            Self::BzImage => f.write_str("a compressed Linux bzImage: unpack its vmlinux first"),
            Self::Not64Bit => {
                f.write_str("a 32-bit or big-endian ELF file: only x86-64 guests are supported")
            }
            Self::NotX86_64 { machine } => write!(f, "ELF for machine {machine}, not for x86-64 (62)"),
            Self::NotExecutable { kind } => write!(f, "ELF of type {kind}, not an executable (2 or 3)"),
            Self::BadHeader { what } => write!(f, "damaged ELF file: {what}"),
            Self::NoXenNotes => f.write_str("no Xen ELF notes: not a PV kernel"),
            Self::BadLegacyWord { word } => {
                write!(f, "section __xen_guest says {word:?}, which has no meaning")
            }
            Self::PvhOnly => {
                f.write_str("only a PHYS32_ENTRY note: a PVH kernel, which cannot run as a PV domain")
            }
            Self::TooManyNotes { limit } => write!(f, "more than {limit} ELF notes"),
            Self::BadNote { note, size } => {
                write!(f, "note {} has unusable content of {size} bytes", note.name())
            }
            Self::BadLoader { loader, guest_os } => write!(
                f,
                "neither LOADER \"generic\" nor GUEST_OS \"linux\" (LOADER \"{loader}\", GUEST_OS \"{guest_os}\")"
            ),
            Self::BadInterface { version } => {
                write!(f, "written for interface \"{version}\", not \"xen-3.0\" (note XEN_VERSION)")
            }
            Self::OffsetWithoutBase => f.write_str("note PADDR_OFFSET without note VIRT_BASE"),
            Self::Unaligned { name, value } => write!(f, "note {name} {value:#x} is not page-aligned"),
            Self::RequiredFeature { name } => write!(f, "requires the feature {name}, which is not offered"),
            Self::NotDom0Capable => {
                f.write_str("SUPPORTED_FEATURES lacks dom0: the kernel cannot run as the initial domain")
            }
            Self::NoSegments => f.write_str("no loadable segment"),
            Self::TooManySegments { limit } => write!(f, "more than {limit} loadable segments"),
            Self::SegmentSize { file, memory } => {
                write!(f, "a segment has {file} bytes in the file but only {memory} in memory")
            }
            Self::SegmentBelowBase { paddr, base } => {
                write!(f, "a segment at physical {paddr:#x} lies below PADDR_OFFSET {base:#x}")
            }
            Self::SegmentsOverlap { first, second } => {
                write!(f, "the segments at {first:#x} and {second:#x} overlap")
            }
            Self::AddressOverflow { what, address } => {
                write!(f, "{what} {address:#x} leaves the address space")
            }
            Self::EntryOutside { entry, start, end } => {
                write!(f, "the entry point {entry:#x} is outside the image {start:#x}..{end:#x}")
            }
            Self::HypercallPageOutside { page, start, end } => {
                write!(f, "HYPERCALL_PAGE {page:#x} is not a page of the image {start:#x}..{end:#x}")
            }
        }
    }
}

impl core::error::Error for ImageError {}

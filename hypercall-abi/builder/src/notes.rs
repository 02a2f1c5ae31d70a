//! The Xen ELF notes of a kernel, as public/elfnote.h describes them.

use crate::error::{ImageError, quote};
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::note::{Note, NoteIterator};
use hypercall_abi::elfnote::{self, ElfNote};
use hypercall_abi::version::Features;

/// What a kernel may insist on and gets: page tables that it writes itself (by the writable-page-tables assist) and
/// page directories anywhere in machine memory. An initial domain gets [`Features::DOM0`] as well.
pub const OFFERED_FEATURES: Features = Features::WRITABLE_PAGE_TABLES.union(Features::PAE_PGDIR_ABOVE_4GB);

/// A kernel has under twenty notes; a limit bounds the time that a made-up file can take.
const MAX_NOTES: usize = 4096;

/// What the Xen notes of an image say; absent ones are `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Notes<'a> {
    /// Virtual address of the first instruction.
    pub entry: Option<u64>,
    /// Virtual address of the page to be filled with hypercall stubs.
    pub hypercall_page: Option<u64>,
    /// Virtual address of pfn 0.
    pub virt_base: Option<u64>,
    /// Value of `p_paddr` that means pfn 0.
    pub paddr_offset: Option<u64>,
    /// The interface that the kernel was written for: "xen-3.0".
    pub xen_version: Option<&'a str>,
    /// Name of the operating system.
    pub guest_os: Option<&'a str>,
    /// Its version.
    pub guest_version: Option<&'a str>,
    /// The boot loader that it was written for: "generic".
    pub loader: Option<&'a str>,
    /// Of meaning for 32-bit kernels only.
    pub pae_mode: Option<&'a str>,
    /// Features by name, `!` before the required ones.
    pub features: Option<&'a str>,
    /// Lowest address that the kernel lets the hypervisor have (32-bit kernels).
    pub hv_start_low: Option<u64>,
    /// Mask and value that tell a valid machine frame in a non-present L1 entry.
    pub l1_mfn_valid: Option<(u64, u64)>,
    /// The kernel can go on after a cancelled suspend.
    pub suspend_cancel: bool,
    /// Virtual address that the p2m list shall be mapped at.
    pub init_p2m: Option<u64>,
    /// The kernel takes its module unmapped, by pfn.
    pub mod_start_pfn: bool,
    /// Feature bits that the kernel can use.
    pub supported_features: Option<Features>,
    /// Physical address of the PVH entry point.
    pub phys32_entry: Option<u64>,
    /// Number of Xen notes seen.
    pub count: usize,
}

impl<'a> Notes<'a> {
    /// Adds the Xen notes in `data`, the content of one note segment or section; a later note replaces an earlier one of
    /// its type. `seen` counts the notes of all owners over the file.
    pub(crate) fn add(&mut self, data: &'a [u8], seen: &mut usize) -> Result<(), ImageError> {
        // 4 whatever the header says, as in Xen: some linkers put 0 or 8 there for notes laid out by 4.
        for note in NoteIterator::new(LittleEndian, Class::ELF64, 4, data) {
            *seen = seen.saturating_add(1);
            if *seen > MAX_NOTES {
                return Err(ImageError::TooManyNotes { limit: MAX_NOTES });
            }
            let Note::Unknown(note) = note else { continue };
            if note.name.strip_suffix(b"\0") == Some(elfnote::OWNER) {
                self.count = self.count.saturating_add(1);
                self.set(note.n_type, note.desc)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, kind: u64, desc: &'a [u8]) -> Result<(), ImageError> {
        let Some(note) = ElfNote::from_number(kind) else { return Ok(()) };
        match note {
            ElfNote::Entry => self.entry = Some(numeric(note, desc)?),
            ElfNote::HypercallPage => self.hypercall_page = Some(numeric(note, desc)?),
            ElfNote::VirtBase => self.virt_base = Some(numeric(note, desc)?),
            ElfNote::PaddrOffset => self.paddr_offset = Some(numeric(note, desc)?),
            ElfNote::XenVersion => self.xen_version = Some(text(note, desc)?),
            ElfNote::GuestOs => self.guest_os = Some(text(note, desc)?),
            ElfNote::GuestVersion => self.guest_version = Some(text(note, desc)?),
            ElfNote::Loader => self.loader = Some(text(note, desc)?),
            ElfNote::PaeMode => self.pae_mode = Some(text(note, desc)?),
            ElfNote::Features => self.features = Some(text(note, desc)?),
            ElfNote::HvStartLow => self.hv_start_low = Some(numeric(note, desc)?),
            ElfNote::L1MfnValid => self.l1_mfn_valid = mask_and_value(desc),
            ElfNote::SuspendCancel => self.suspend_cancel = numeric(note, desc)? != 0,
            ElfNote::InitP2m => self.init_p2m = Some(numeric(note, desc)?),
            ElfNote::ModStartPfn => self.mod_start_pfn = numeric(note, desc)? != 0,
            ElfNote::SupportedFeatures => {
                // Features beyond the first 32 belong to further words, which no version has.
                self.supported_features = Some(Features::from_bits_retain(numeric(note, desc)? as u32));
            }
            ElfNote::Phys32Entry => self.phys32_entry = Some(numeric(note, desc)?),
            ElfNote::Info | ElfNote::BsdSymtab => {}
        }
        Ok(())
    }

    /// Takes what a `__xen_guest` section says, the form of before ELF notes that old kernels still come with: words
    /// `NAME=VALUE` with commas between them, up to a zero byte. Unknown words mean nothing, as for Xen.
    pub(crate) fn add_legacy(&mut self, data: &'a [u8]) -> Result<(), ImageError> {
        let bytes = data.split(|byte| *byte == 0).next().unwrap_or(data);
        let words = core::str::from_utf8(bytes).map_err(|_| ImageError::BadLegacyWord { word: quote("") })?;
        let mut page = None;
        for word in words.split(',') {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || c_number(value).ok_or(ImageError::BadLegacyWord { word: quote(word) });
            match name {
                "LOADER" => self.loader = Some(value),
                "GUEST_OS" => self.guest_os = Some(value),
                "GUEST_VER" => self.guest_version = Some(value),
                "XEN_VER" => self.xen_version = Some(value),
                "PAE" => self.pae_mode = Some(value),
                "FEATURES" => self.features = Some(value),
                "VIRT_BASE" => self.virt_base = Some(number()?),
                "VIRT_ENTRY" => self.entry = Some(number()?),
                "ELF_PADDR_OFFSET" => self.paddr_offset = Some(number()?),
                "HYPERCALL_PAGE" => page = Some(number()?),
                _ => {}
            }
        }
        // Here it is a page's number in the image.
        self.hypercall_page = match page.map(|page| page.checked_mul(crate::PAGE_SIZE)) {
            Some(offset) => {
                let address = offset.and_then(|offset| offset.checked_add(self.virt_base.unwrap_or(0)));
                let overflow =
                    ImageError::AddressOverflow { what: "HYPERCALL_PAGE", address: page.unwrap_or(0) };
                Some(address.ok_or(overflow)?)
            }
            None => None,
        };
        // What is left out means that p_paddr is a virtual address.
        self.paddr_offset = self.paddr_offset.or(self.virt_base);
        Ok(())
    }

    /// Whether the image can be entered as PVH only.
    pub(crate) fn pvh_only(&self) -> bool {
        self.phys32_entry.is_some()
            && self.entry.is_none()
            && self.virt_base.is_none()
            && self.hypercall_page.is_none()
    }

    /// Checks what the kernel says of itself against the interface we are.
    pub(crate) fn check_interface(&self) -> Result<(), ImageError> {
        let loader = self.loader.unwrap_or("");
        let guest_os = self.guest_os.unwrap_or("");
        if !loader.starts_with("generic") && !guest_os.starts_with("linux") {
            return Err(ImageError::BadLoader { loader: quote(loader), guest_os: quote(guest_os) });
        }
        let version = self.xen_version.unwrap_or("");
        if !version.starts_with("xen-3.0") {
            return Err(ImageError::BadInterface { version: quote(version) });
        }
        Ok(())
    }

    /// Checks that each required feature is in `offered`; required ones that nobody knows are refused too.
    pub(crate) fn check_features(&self, offered: Features) -> Result<(), ImageError> {
        for word in self.features.unwrap_or("").split('|') {
            let Some(name) = word.strip_prefix('!') else { continue };
            let known = Features::from_note_name(name.as_bytes());
            if !known.is_some_and(|feature| offered.contains(feature)) {
                return Err(ImageError::RequiredFeature { name: quote(name) });
            }
        }
        Ok(())
    }
}

/// A little-endian number of 1, 2, 4 or 8 bytes.
fn numeric(note: ElfNote, desc: &[u8]) -> Result<u64, ImageError> {
    match *desc {
        [a] => Ok(u64::from(a)),
        [a, b] => Ok(u64::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => Ok(u64::from(u32::from_le_bytes([a, b, c, d]))),
        [a, b, c, d, e, f, g, h] => Ok(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => Err(ImageError::BadNote { note, size: desc.len() }),
    }
}

/// A number as C writes it: decimal, or hexadecimal behind `0x`.
fn c_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Text up to the first NUL or the note's end.
fn text(note: ElfNote, desc: &[u8]) -> Result<&str, ImageError> {
    let bytes = desc.split(|byte| *byte == 0).next().unwrap_or(desc);
    core::str::from_utf8(bytes).map_err(|_| ImageError::BadNote { note, size: desc.len() })
}

/// The first of the note's pairs of 8-byte numbers; `None` for other forms: nothing here depends on it.
fn mask_and_value(desc: &[u8]) -> Option<(u64, u64)> {
    let (mask, rest) = desc.split_first_chunk::<8>()?;
    let (value, _) = rest.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*mask), u64::from_le_bytes(*value)))
}

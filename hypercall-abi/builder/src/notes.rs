//! The Xen ELF notes of a kernel, as public/elfnote.h describes them.

use crate::error::{ImageError, quote};
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::note::{Note, NoteIterator};

/// Note types of public/elfnote.h that the builder knows.
mod number {
    pub const ENTRY: u64 = 1;
    pub const HYPERCALL_PAGE: u64 = 2;
    pub const VIRT_BASE: u64 = 3;
    pub const PADDR_OFFSET: u64 = 4;
    pub const XEN_VERSION: u64 = 5;
    pub const GUEST_OS: u64 = 6;
    pub const GUEST_VERSION: u64 = 7;
    pub const LOADER: u64 = 8;
    pub const PAE_MODE: u64 = 9;
    pub const FEATURES: u64 = 10;
    pub const HV_START_LOW: u64 = 12;
    pub const L1_MFN_VALID: u64 = 13;
    pub const SUSPEND_CANCEL: u64 = 14;
    pub const INIT_P2M: u64 = 15;
    pub const MOD_START_PFN: u64 = 16;
    pub const SUPPORTED_FEATURES: u64 = 17;
    pub const PHYS32_ENTRY: u64 = 18;
}

/// Bit `n` is `XENFEAT` number `n` of public/features.h.
pub type FeatureMask = u32;

/// The features that a FEATURES note can name, by bit number.
const FEATURE_NAMES: [(&str, u32); 7] = [
    ("writable_page_tables", 0),
    ("writable_descriptor_tables", 1),
    ("auto_translated_physmap", 2),
    ("supervisor_mode_kernel", 3),
    ("pae_pgdir_above_4gb", 4),
    ("hvm_callback_vector", 8),
    ("dom0", 11),
];

/// `XENFEAT_dom0`: the kernel can be the initial domain.
pub const FEATURE_DOM0: FeatureMask = 1 << 11;

/// What a kernel may insist on and gets: page tables that it writes itself (by the writable-page-tables assist) and
/// page directories anywhere in machine memory. An initial domain gets [`FEATURE_DOM0`] as well.
pub const OFFERED_FEATURES: FeatureMask = 1 << 0 | 1 << 4;

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
    pub supported_features: Option<FeatureMask>,
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
            if note.name.strip_suffix(b"\0") == Some(b"Xen".as_slice()) {
                self.count = self.count.saturating_add(1);
                self.set(note.n_type, note.desc)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, kind: u64, desc: &'a [u8]) -> Result<(), ImageError> {
        match kind {
            number::ENTRY => self.entry = Some(numeric("ENTRY", desc)?),
            number::HYPERCALL_PAGE => self.hypercall_page = Some(numeric("HYPERCALL_PAGE", desc)?),
            number::VIRT_BASE => self.virt_base = Some(numeric("VIRT_BASE", desc)?),
            number::PADDR_OFFSET => self.paddr_offset = Some(numeric("PADDR_OFFSET", desc)?),
            number::XEN_VERSION => self.xen_version = Some(text("XEN_VERSION", desc)?),
            number::GUEST_OS => self.guest_os = Some(text("GUEST_OS", desc)?),
            number::GUEST_VERSION => self.guest_version = Some(text("GUEST_VERSION", desc)?),
            number::LOADER => self.loader = Some(text("LOADER", desc)?),
            number::PAE_MODE => self.pae_mode = Some(text("PAE_MODE", desc)?),
            number::FEATURES => self.features = Some(text("FEATURES", desc)?),
            number::HV_START_LOW => self.hv_start_low = Some(numeric("HV_START_LOW", desc)?),
            number::L1_MFN_VALID => self.l1_mfn_valid = Some(mask_and_value(desc)?),
            number::SUSPEND_CANCEL => self.suspend_cancel = numeric("SUSPEND_CANCEL", desc)? != 0,
            number::INIT_P2M => self.init_p2m = Some(numeric("INIT_P2M", desc)?),
            number::MOD_START_PFN => self.mod_start_pfn = numeric("MOD_START_PFN", desc)? != 0,
            number::SUPPORTED_FEATURES => {
                // Features beyond the first 32 belong to further words, which no version has.
                self.supported_features = Some(numeric("SUPPORTED_FEATURES", desc)? as FeatureMask);
            }
            number::PHYS32_ENTRY => self.phys32_entry = Some(numeric("PHYS32_ENTRY", desc)?),
            _ => {}
        }
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
    pub(crate) fn check_features(&self, offered: FeatureMask) -> Result<(), ImageError> {
        for word in self.features.unwrap_or("").split('|') {
            let Some(name) = word.strip_prefix('!') else { continue };
            let known = FEATURE_NAMES.iter().find(|(known, _)| *known == name);
            if known.is_none_or(|(_, bit)| offered & (1 << bit) == 0) {
                return Err(ImageError::RequiredFeature { name: quote(name) });
            }
        }
        Ok(())
    }
}

/// A little-endian number of 1, 2, 4 or 8 bytes.
fn numeric(name: &'static str, desc: &[u8]) -> Result<u64, ImageError> {
    match *desc {
        [a] => Ok(u64::from(a)),
        [a, b] => Ok(u64::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => Ok(u64::from(u32::from_le_bytes([a, b, c, d]))),
        [a, b, c, d, e, f, g, h] => Ok(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => Err(ImageError::BadNote { name, size: desc.len() }),
    }
}

/// Text up to the first NUL or the note's end.
fn text<'a>(name: &'static str, desc: &'a [u8]) -> Result<&'a str, ImageError> {
    let bytes = desc.split(|byte| *byte == 0).next().unwrap_or(desc);
    core::str::from_utf8(bytes).map_err(|_| ImageError::BadNote { name, size: desc.len() })
}

/// The first of the note's pairs of 8-byte numbers.
fn mask_and_value(desc: &[u8]) -> Result<(u64, u64), ImageError> {
    let bad = ImageError::BadNote { name: "L1_MFN_VALID", size: desc.len() };
    let (mask, rest) = desc.split_first_chunk::<8>().ok_or(bad)?;
    let (value, _) = rest.split_first_chunk::<8>().ok_or(bad)?;
    Ok((u64::from_le_bytes(*mask), u64::from_le_bytes(*value)))
}

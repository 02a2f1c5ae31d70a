//! A small ELF writer: images with chosen segments and notes, whole or broken.

#![allow(dead_code, reason = "each test binary uses a part")]

pub const ENTRY: u32 = 1;
pub const HYPERCALL_PAGE: u32 = 2;
pub const VIRT_BASE: u32 = 3;
pub const PADDR_OFFSET: u32 = 4;
pub const XEN_VERSION: u32 = 5;
pub const GUEST_OS: u32 = 6;
pub const LOADER: u32 = 8;
pub const FEATURES: u32 = 10;
pub const L1_MFN_VALID: u32 = 13;
pub const INIT_P2M: u32 = 15;
pub const MOD_START_PFN: u32 = 16;
pub const SUPPORTED_FEATURES: u32 = 17;
pub const PHYS32_ENTRY: u32 = 18;

/// One PT_LOAD segment.
#[derive(Clone, Debug)]
pub struct Load {
    pub paddr: u64,
    pub data: Vec<u8>,
    pub memsz: u64,
}

/// An image to be written by [`Elf::bytes`].
#[derive(Clone, Debug)]
pub struct Elf {
    pub entry: u64,
    pub loads: Vec<Load>,
    pub notes: Vec<(u32, Vec<u8>)>,
    /// Notes in a section instead of a segment.
    pub notes_in_section: bool,
    /// Name of one more, empty section.
    pub extra_section: Option<(&'static str, &'static str)>,
}

impl Elf {
    /// The least that is accepted: notes LOADER and XEN_VERSION, one segment of `pages` pages at `paddr`, entered there.
    pub fn minimal(paddr: u64, pages: u64) -> Self {
        let data = (0..pages * 4096 - 96).map(|i| (i * 7 + 1) as u8).collect();
        Self {
            entry: paddr,
            loads: vec![Load { paddr, data, memsz: pages * 4096 }],
            notes: vec![(LOADER, b"generic\0".to_vec()), (XEN_VERSION, b"xen-3.0\0".to_vec())],
            notes_in_section: false,
            extra_section: None,
        }
    }

    /// As XTF's 64-bit kernels: at 1 MiB, hypercall page in the image, no VIRT_BASE.
    pub fn xtf() -> Self {
        Self::minimal(0x10_0000, 20)
            .number(HYPERCALL_PAGE, 0x10_2000)
            .text(FEATURES, "!writable_page_tables|pae_pgdir_above_4gb")
    }

    /// As Linux: in the top 2 GiB, p2m list in the user half, module by pfn.
    pub fn linux() -> Self {
        Self::minimal(0x100_0000, 40)
            .number(VIRT_BASE, 0xffff_ffff_8000_0000)
            .number(ENTRY, 0xffff_ffff_8100_0040)
            .number(PADDR_OFFSET, 0)
            .number(INIT_P2M, 0x80_0000_0000)
            .number(MOD_START_PFN, 1)
    }

    pub fn number(mut self, kind: u32, value: u64) -> Self {
        self.notes.push((kind, value.to_le_bytes().to_vec()));
        self
    }

    pub fn text(mut self, kind: u32, value: &str) -> Self {
        self.notes.push((kind, [value.as_bytes(), b"\0"].concat()));
        self
    }

    pub fn without(mut self, kind: u32) -> Self {
        self.notes.retain(|note| note.0 != kind);
        self
    }

    fn note_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, desc) in &self.notes {
            for word in [4, desc.len() as u32, *kind] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(b"Xen\0");
            bytes.extend(desc);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    /// Header, program headers, notes, segment data, section names, section headers.
    pub fn bytes(&self) -> Vec<u8> {
        let notes = self.note_bytes();
        let phnum = self.loads.len() + 1;
        let notes_at = 64 + 56 * phnum;
        let mut body = notes.clone();
        let mut headers = Vec::new();
        let kind = if self.notes_in_section { 0x6000_0000 } else { 4 };
        program_header(&mut headers, kind, notes_at, 0, notes.len(), notes.len() as u64);
        for load in &self.loads {
            program_header(&mut headers, 1, notes_at + body.len(), load.paddr, load.data.len(), load.memsz);
            body.extend(&load.data);
        }
        let mut names = vec![0];
        let extra_name = names.len();
        let (extra, said) = self.extra_section.unwrap_or(("", ""));
        names.extend(extra.as_bytes());
        names.push(0);
        let names_at = notes_at + body.len();
        body.extend(&names);
        let said_at = notes_at + body.len();
        body.extend(said.as_bytes());
        body.resize(body.len().next_multiple_of(8), 0);
        let sections_at = notes_at + body.len();
        let mut sections = vec![0; 64];
        section_header(&mut sections, 0, 3, names_at, names.len());
        section_header(&mut sections, 0, if self.notes_in_section { 7 } else { 1 }, notes_at, notes.len());
        section_header(&mut sections, extra_name, 1, said_at, said.len());

        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [self.entry, 64, sections_at as u64] {
            file.extend(word.to_le_bytes());
        }
        file.extend([0; 4]);
        for half in [64, 56, phnum as u16, 64, (sections.len() / 64) as u16, 1] {
            file.extend(half.to_le_bytes());
        }
        [file, headers, body, sections].concat()
    }
}

fn program_header(out: &mut Vec<u8>, kind: u32, offset: usize, paddr: u64, filesz: usize, memsz: u64) {
    out.extend(kind.to_le_bytes());
    out.extend(7u32.to_le_bytes());
    for word in [offset as u64, paddr, paddr, filesz as u64, memsz, 4096] {
        out.extend(word.to_le_bytes());
    }
}

fn section_header(out: &mut Vec<u8>, name: usize, kind: u32, offset: usize, size: usize) {
    out.extend((name as u32).to_le_bytes());
    out.extend(kind.to_le_bytes());
    for word in [0, 0, offset as u64, size as u64, 0, 1, 0] {
        out.extend(word.to_le_bytes());
    }
}

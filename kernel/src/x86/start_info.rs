//! PVH's `hvm_start_info` (public header `arch-x86/hvm/start_info.h`): memory map, command line, modules, RSDP.
//!
//! The structure comes from the boot loader, which we trust with the machine but not with arithmetic: every address and
//! count is checked before it is used, and what does not fit is an error with a name.

use super::phys::{PhysMemory, u32_at, u64_at};
use arrayvec::ArrayVec;

/// First word of the structure.
pub const MAGIC: u32 = 0x336e_c578;
/// Memory-map entries we keep; firmware maps have a few dozen.
pub const MAX_REGIONS: usize = 128;
/// Longest command line we take.
pub const MAX_COMMAND_LINE: usize = 4096;

/// What a range of the machine's address space is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Ours to use.
    Ram,
    /// ACPI tables: RAM once they have been read, which we never assume.
    Acpi,
    /// Everything else that firmware names.
    Reserved,
}

/// One entry of the firmware memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First machine address.
    pub start: u64,
    /// One past the last machine address.
    pub end: u64,
    /// The entry's type as firmware gave it (E820 numbers).
    pub e820_type: u32,
    /// Our reading of the type.
    pub kind: RegionKind,
}

/// A machine address range handed over by the loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// First machine address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Everything the loader told us, checked.
#[derive(Debug)]
pub struct StartInfo<'a> {
    /// The memory map in firmware's order.
    pub regions: ArrayVec<Region, MAX_REGIONS>,
    /// The command line without its terminating zero.
    pub command_line: &'a [u8],
    /// The first module: dom0's image.
    pub module: Option<Module>,
    /// How many modules there were.
    pub modules: u32,
    /// Machine address of ACPI's root pointer, 0 when the loader names none.
    pub rsdp: u64,
}

/// Why a start info was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartInfoError {
    /// The structure or something it points to lies outside readable memory.
    Unreadable(&'static str),
    /// The first word is not the magic number.
    Magic(u32),
    /// Version 0 has no memory map, and there is no BIOS to ask for one.
    NoMemoryMap,
    /// More entries than we keep.
    TooManyRegions(u32),
    /// An entry's end passes the end of the address space.
    RegionWraps(u64),
}

impl core::fmt::Display for StartInfoError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Unreadable(what) => write!(f, "PVH start info: the {what} cannot be read"),
            Self::Magic(found) => write!(f, "PVH start info: magic {found:#x} instead of {MAGIC:#x}"),
            Self::NoMemoryMap => {
                write!(f, "PVH start info: no memory map; a loader of version 1 or later is needed")
            }
            Self::TooManyRegions(n) => {
                write!(f, "PVH start info: {n} memory regions, at most {MAX_REGIONS} are taken")
            }
            Self::RegionWraps(at) => write!(f, "PVH start info: the memory region at {at:#x} wraps around"),
        }
    }
}

/// Reads the start info at machine address `at`.
///
/// # Errors
/// A [`StartInfoError`] that says which part is wrong.
pub fn parse<M: PhysMemory>(memory: &M, at: u64) -> Result<StartInfo<'_>, StartInfoError> {
    use StartInfoError::Unreadable;
    let head = memory.bytes(at, 40).ok_or(Unreadable("structure"))?;
    let field32 = |bytes, offset| u32_at(bytes, offset).ok_or(Unreadable("structure"));
    let field64 = |bytes, offset| u64_at(bytes, offset).ok_or(Unreadable("structure"));
    let magic = field32(head, 0)?;
    if magic != MAGIC {
        return Err(StartInfoError::Magic(magic));
    }
    if field32(head, 4)? == 0 {
        return Err(StartInfoError::NoMemoryMap);
    }
    let modules = field32(head, 12)?;
    let module = if modules == 0 {
        None
    } else {
        let entry = memory.bytes(field64(head, 16)?, 32).ok_or(Unreadable("module list"))?;
        let (start, len) = (field64(entry, 0)?, field64(entry, 8)?);
        start.checked_add(len).ok_or(Unreadable("first module"))?;
        Some(Module { start, len })
    };
    let command_line = match field64(head, 24)? {
        0 => &[][..],
        from => command_line(memory, from).ok_or(Unreadable("command line"))?,
    };
    let rsdp = field64(head, 32)?;

    let tail = memory
        .bytes(at.checked_add(40).ok_or(Unreadable("structure"))?, 12)
        .ok_or(Unreadable("structure"))?;
    let (map, count) = (field64(tail, 0)?, field32(tail, 8)?);
    if map == 0 || count == 0 {
        return Err(StartInfoError::NoMemoryMap);
    }
    let mut regions = ArrayVec::new();
    for index in 0..u64::from(count) {
        let entry = index.checked_mul(24).and_then(|offset| map.checked_add(offset));
        let entry = entry.and_then(|address| memory.bytes(address, 24)).ok_or(Unreadable("memory map"))?;
        let (start, size, e820_type) = (field64(entry, 0)?, field64(entry, 8)?, field32(entry, 16)?);
        if size == 0 {
            continue;
        }
        let end = start.checked_add(size).ok_or(StartInfoError::RegionWraps(start))?;
        let kind = match e820_type {
            1 => RegionKind::Ram,
            3 | 4 => RegionKind::Acpi,
            _ => RegionKind::Reserved,
        };
        regions
            .try_push(Region { start, end, e820_type, kind })
            .map_err(|_| StartInfoError::TooManyRegions(count))?;
    }
    Ok(StartInfo { regions, command_line, module, modules, rsdp })
}

/// The bytes up to the terminating zero, which must come within [`MAX_COMMAND_LINE`].
fn command_line<M: PhysMemory>(memory: &M, from: u64) -> Option<&[u8]> {
    // The string may end just before unreadable memory: find its end byte by byte, then take it as one slice.
    let len = (0..MAX_COMMAND_LINE).find(|&i| {
        from.checked_add(i as u64).and_then(|at| memory.bytes(at, 1)).is_none_or(|byte| byte == [0])
    })?;
    memory.bytes(from, len)
}

#[cfg(test)]
mod tests {
    use super::super::phys::Blocks;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn info(version: u32, modules: u32, map: u64, count: u32) -> Vec<u8> {
        let mut b = Vec::new();
        for word in [MAGIC, version, 0, modules] {
            b.extend(word.to_le_bytes());
        }
        for long in [0x2000u64, 0x3000, 0xf_0000, map] {
            b.extend(long.to_le_bytes());
        }
        b.extend(count.to_le_bytes());
        b.extend(0u32.to_le_bytes());
        b
    }

    fn region(start: u64, size: u64, kind: u32) -> Vec<u8> {
        [start.to_le_bytes(), size.to_le_bytes(), u64::from(kind).to_le_bytes()].concat()
    }

    fn module(start: u64, len: u64) -> Vec<u8> {
        [start, len, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn reads_what_qemu_hands_over() {
        let map =
            [region(0, 0x9fc00, 1), region(0x9fc00, 0x400, 2), region(0x10_0000, 0x1fe_0000, 1)].concat();
        let memory = Blocks(vec![
            (0x1000, info(1, 1, 0x4000, 3)),
            (0x2000, module(0x80_0000, 0x1234)),
            (0x3000, b"loglvl=all --- hello\0rest".to_vec()),
            (0x4000, map),
        ]);
        let parsed = parse(&memory, 0x1000).unwrap();
        assert_eq!(parsed.command_line, b"loglvl=all --- hello");
        assert_eq!(parsed.module, Some(Module { start: 0x80_0000, len: 0x1234 }));
        assert_eq!(parsed.rsdp, 0xf_0000);
        assert_eq!(parsed.regions.len(), 3);
        assert_eq!(parsed.regions[1].kind, RegionKind::Reserved);
        assert_eq!(parsed.regions[2].end, 0x20e_0000);
    }

    #[test]
    fn refuses_what_does_not_hold_together() {
        let with = |head: Vec<u8>, map: Vec<u8>| {
            let memory =
                Blocks(vec![(0x1000, head), (0x2000, module(u64::MAX, 2)), (0x3000, vec![0]), (0x4000, map)]);
            parse(&memory, 0x1000).map(|_| ()).unwrap_err()
        };
        let one = || region(0, 0x1000, 1);
        assert_eq!(with(vec![0; 56], one()), StartInfoError::Magic(0));
        assert_eq!(with(vec![0; 8], one()), StartInfoError::Unreadable("structure"));
        assert_eq!(with(info(0, 0, 0x4000, 1), one()), StartInfoError::NoMemoryMap);
        assert_eq!(with(info(1, 0, 0x4000, 2), one()), StartInfoError::Unreadable("memory map"));
        assert_eq!(with(info(1, 1, 0x4000, 1), one()), StartInfoError::Unreadable("first module"));
        assert_eq!(
            with(info(1, 0, 0x4000, 1), region(1 << 63, 1 << 63, 1)),
            StartInfoError::RegionWraps(1 << 63)
        );
        let many: Vec<u8> = (0..129).flat_map(|_| one()).collect();
        assert_eq!(with(info(1, 0, 0x4000, 129), many), StartInfoError::TooManyRegions(129));
    }

    #[test]
    fn a_command_line_without_an_end_is_refused() {
        let memory = Blocks(vec![
            (0x1000, info(1, 0, 0x4000, 1)),
            (0x3000, vec![b'a'; MAX_COMMAND_LINE + 1]),
            (0x4000, region(0, 0x1000, 1)),
        ]);
        assert_eq!(parse(&memory, 0x1000).map(|_| ()), Err(StartInfoError::Unreadable("command line")));
    }
}

//! Puts the names of the hypervisor's functions into its own image, so that a panic report can say where it was.
//!
//! The format is told in `kernel/src/symbols.rs`, the reader. The linker script reserves the room, and this writes into the
//! linked file: no second link, and no address that moves.

use crate::sh;
use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind};
use std::collections::BTreeMap;
use std::path::Path;

/// Longest names that are tried, in bytes, until the table fits.
const LENGTHS: [usize; 5] = [96, 64, 48, 32, 20];

/// Writes a copy of a linked hypervisor whose symbol block is filled in.
///
/// # Errors
/// When the image has no room reserved, or too little.
pub fn fill(linked: &Path, out: &Path) -> Result<()> {
    let mut bytes = sh::read(linked)?;
    let (place, room, table) = {
        let file =
            object::File::parse(&*bytes).with_context(|| format!("{} is not an ELF", linked.display()))?;
        let base = file.symbols().find(|symbol| symbol.name() == Ok("__image_start"));
        let base = base.context("kernel/hypervisor.ld: no symbol `__image_start`")?.address();
        let block =
            file.section_by_name(".symbols").context("kernel/hypervisor.ld: no section `.symbols`")?;
        let (start, end) = (block.address(), block.address() + block.size());
        let segment = file
            .segments()
            .find(|segment| {
                let first = segment.address();
                first <= start && end <= first.saturating_add(segment.file_range().1)
            })
            .context("hypervisor.ld: the symbol block must have bytes of its own in the file")?;
        let place = usize::try_from(segment.file_range().0 + (start - segment.address()))?;
        let room = usize::try_from(end - start)?;
        let functions = functions(&file)?;
        let table = LENGTHS
            .iter()
            .map(|length| encode(&functions, base, *length))
            .find(|table| table.as_ref().map_or(true, |table| table.len() <= room));
        (place, room, table)
    };
    let Some(table) = table else {
        bail!("kernel/hypervisor.ld: the symbol table does not fit {room} bytes; reserve more for .symbols");
    };
    let table = table?;
    bytes
        .get_mut(place..place + table.len())
        .context("the symbol block lies outside the file")?
        .copy_from_slice(&table);
    sh::write(out, &bytes)
}

/// Start address, end address and demangled name of each function, in order; of several names for one place, the first by
/// the alphabet.
///
/// # Errors
/// When a symbol's name is not text.
pub fn functions(file: &object::File) -> Result<Vec<(u64, u64, String)>> {
    let mut found = BTreeMap::new();
    for symbol in file.symbols() {
        let name = symbol.name().context("the symbol table is broken")?;
        // Assembly labels have no type; linker script marks have no section of code.
        let code = symbol
            .section_index()
            .and_then(|i| Some(file.section_by_index(i).ok()?.kind() == object::SectionKind::Text));
        let wanted = matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Unknown | SymbolKind::Label);
        if !wanted || code != Some(true) || name.is_empty() || name.starts_with(".L") {
            continue;
        }
        let marks = ["__text_", "__image_", "__entry_start", "__entry_end"];
        if marks.iter().any(|mark| name.starts_with(mark)) {
            continue;
        }
        let name = format!("{:#}", rustc_demangle::demangle(name));
        let end = symbol.address() + symbol.size();
        let best = found.entry(symbol.address()).or_insert((end, name.clone()));
        if (std::cmp::Reverse(end), &name) < (std::cmp::Reverse(best.0), &best.1) {
            *best = (end, name);
        }
    }
    let mut list: Vec<(u64, u64, String)> =
        found.into_iter().map(|(start, (end, name))| (start, end, name)).collect();
    // A label of assembly has no size: it reaches to the next one.
    for i in 0..list.len() {
        let next = list.get(i + 1).map(|next| next.0);
        if list[i].1 == list[i].0 {
            list[i].1 = next.unwrap_or(list[i].0 + 16);
        }
    }
    Ok(list)
}

fn encode(functions: &[(u64, u64, String)], base: u64, longest: usize) -> Result<Vec<u8>> {
    let offset = |address: u64| -> Result<u32> {
        let offset = address.checked_sub(base).context("a function lies below the image")?;
        u32::try_from(offset).context("a function lies 4 GiB above the image")
    };
    let mut table = b"XENSYMS1".to_vec();
    table.extend_from_slice(&u32::try_from(functions.len())?.to_le_bytes());
    let end = functions.iter().map(|function| function.1).max().unwrap_or(base);
    table.extend_from_slice(&offset(end)?.to_le_bytes());
    let mut names = Vec::new();
    let first_name = 16 + 8 * functions.len();
    for (start, _, name) in functions {
        table.extend_from_slice(&offset(*start)?.to_le_bytes());
        table.extend_from_slice(&u32::try_from(first_name + names.len())?.to_le_bytes());
        let name = shorten(name, longest);
        names.push(u8::try_from(name.len())?);
        names.extend_from_slice(name.as_bytes());
    }
    table.extend_from_slice(&names);
    Ok(table)
}

/// Leaves the ends of a name that is too long: the crate it is from, and what it does.
fn shorten(name: &str, longest: usize) -> String {
    if name.len() <= longest {
        return name.to_owned();
    }
    let head = longest / 3;
    let tail = longest - head - 2;
    let head = (0..=head).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    let tail = (name.len() - tail..=name.len()).find(|at| name.is_char_boundary(*at)).unwrap_or(name.len());
    format!("{}..{}", &name[..head], &name[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(shorten("short", 20), "short");
        let name = "<hv::mm::frames::Frames<P> as core::ops::drop::Drop>::drop";
        let short = shorten(name, 32);
        assert!(
            short.len() <= 32 && short.starts_with("<hv::mm") && short.ends_with("Drop>::drop"),
            "{short}"
        );
        assert!(shorten(&"é".repeat(50), 21).len() <= 21);
    }

    #[test]
    fn records_are_sorted_and_point_at_their_names() -> Result<()> {
        let functions = [(0x1010, 0x1020, "a".to_owned()), (0x1020, 0x1033, "bc".to_owned())];
        let table = encode(&functions, 0x1000, 64)?;
        let want = [
            &b"XENSYMS1"[..],
            &[2, 0, 0, 0, 0x33, 0, 0, 0],
            &[0x10, 0, 0, 0, 32, 0, 0, 0, 0x20, 0, 0, 0, 34, 0, 0, 0],
            b"\x01a\x02bc",
        ];
        assert_eq!(table, want.concat());
        Ok(())
    }
}

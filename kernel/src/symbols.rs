//! Names for addresses of our own code, for the panic report.
//!
//! The linker script reserves a block at the end of the read-only data (`__symbols_start` to `__symbols_end`), zeroed.
//! After linking, `xtask` writes the table of the very image it is in into those bytes, so no address moves
//! (docs/design/0020-symbols-in-the-image.md). All numbers are little endian:
//!
//! | at | what |
//! |---|---|
//! | 0 | magic `XENSYMS1` |
//! | 8 | u32 `count` |
//! | 12 | u32 end of the last function, as an offset from the image's base |
//! | 16 | `count` records, sorted: u32 start of the function as an offset from the image's base, u32 place of its name |
//! | … | names: one length byte, then that many bytes of UTF-8; places count from the start of the block |
//!
//! The reader trusts nothing: whatever the block holds, it returns a name or `None`. It runs when all else has failed.

#![forbid(unsafe_code)]

/// First bytes of a block that has been filled in.
pub const MAGIC: [u8; 8] = *b"XENSYMS1";

/// Finds the function that `address` is in: its name, and how far into it in bytes.
///
/// `base` is the address that the image was linked at. `None` when the block is empty, or the address is not in a function
/// of the image.
pub fn resolve(blob: &[u8], base: u64, address: u64) -> Option<(&str, u32)> {
    if blob.get(..8)? != MAGIC {
        return None;
    }
    let count = usize::try_from(word(blob, 8)?).ok()?;
    let offset = u32::try_from(address.checked_sub(base)?).ok()?;
    if offset >= word(blob, 12)? {
        return None;
    }
    // The first record that starts behind the address; the one before it is ours.
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        if start(blob, middle)? <= offset {
            low = middle.checked_add(1)?;
        } else {
            high = middle;
        }
    }
    let record = low.checked_sub(1)?;
    let place = usize::try_from(word(blob, at(record)?.checked_add(4)?)?).ok()?;
    let length = usize::from(*blob.get(place)?);
    let first = place.checked_add(1)?;
    let name = blob.get(first..first.checked_add(length)?)?;
    Some((core::str::from_utf8(name).ok()?, offset.checked_sub(start(blob, record)?)?))
}

fn at(record: usize) -> Option<usize> {
    record.checked_mul(8)?.checked_add(16)
}

fn start(blob: &[u8], record: usize) -> Option<u32> {
    word(blob, at(record)?)
}

fn word(blob: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*blob.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    const BASE: u64 = 0xffff_82d0_4000_0000;

    fn blob(functions: &[(u32, &str)], end: u32) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let words = |out: &mut Vec<u8>, word: u32| out.extend_from_slice(&word.to_le_bytes());
        words(&mut out, functions.len() as u32);
        words(&mut out, end);
        let mut place = 16 + 8 * functions.len() as u32;
        for (start, name) in functions {
            words(&mut out, *start);
            words(&mut out, place);
            place += 1 + name.len() as u32;
        }
        for (_, name) in functions {
            out.push(name.len() as u8);
            out.extend_from_slice(name.as_bytes());
        }
        out.resize(out.len() + 100, 0);
        out
    }

    #[test]
    fn finds_the_function_around_an_address() {
        let blob = blob(&[(0x10, "entry"), (0x40, "hv::start"), (0x90, "idle")], 0xa0);
        let name = |offset: u64| resolve(&blob, BASE, BASE + offset);
        assert_eq!(name(0xf), None);
        assert_eq!(name(0x10), Some(("entry", 0)));
        assert_eq!(name(0x3f), Some(("entry", 0x2f)));
        assert_eq!(name(0x40), Some(("hv::start", 0)));
        assert_eq!(name(0x9f), Some(("idle", 0xf)));
        assert_eq!(name(0xa0), None);
        assert_eq!(resolve(&blob, BASE, BASE - 1), None);
        assert_eq!(resolve(&blob, BASE, u64::MAX), None);
    }

    #[test]
    fn an_empty_block_has_no_names() {
        assert_eq!(resolve(&[0; 64], BASE, BASE), None);
        assert_eq!(resolve(&[], BASE, BASE), None);
        assert_eq!(resolve(&blob(&[], 0x100), BASE, BASE + 1), None);
    }

    #[test]
    fn survives_any_damage_to_the_block() {
        let whole = blob(&[(0x10, "entry"), (0x40, "hv::start"), (0x90, "idle")], 0xa0);
        for cut in 0..whole.len() {
            let _ = resolve(&whole[..cut], BASE, BASE + 0x50);
        }
        for place in 8..whole.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut broken = whole.clone();
                broken[place] = value;
                let _ = resolve(&broken, BASE, BASE + 0x50);
            }
        }
    }
}

//! Reading firmware's structures: bounds-checked little-endian fields out of physical memory.

/// Physical memory as the boot code sees it.
pub trait PhysMemory {
    /// The `len` bytes at machine address `addr`, or None where they cannot be read.
    fn bytes(&self, addr: u64, len: usize) -> Option<&[u8]>;
}

/// The little-endian 16-bit word at `offset`.
#[must_use]
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(offset..offset.checked_add(2)?)?.try_into().ok()?))
}

/// The little-endian 32-bit word at `offset`.
#[must_use]
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

/// The little-endian 64-bit word at `offset`.
#[must_use]
pub fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
}

/// A machine of a few byte blocks, for tests of the parsers.
#[cfg(test)]
pub(crate) struct Blocks(pub std::vec::Vec<(u64, std::vec::Vec<u8>)>);

#[cfg(test)]
impl PhysMemory for Blocks {
    fn bytes(&self, addr: u64, len: usize) -> Option<&[u8]> {
        self.0.iter().find_map(|(base, data)| {
            let from = usize::try_from(addr.checked_sub(*base)?).ok()?;
            data.get(from..from.checked_add(len)?)
        })
    }
}

//! A set of domain numbers: as large as it will ever be, so that no guest's call takes from the heap.

use hypercall_abi::DomId;

const WORDS: usize = (DomId::FIRST_RESERVED.get() as usize).div_ceil(64);
const SUMMARY: usize = WORDS.div_ceil(64);

/// Numbers below [`DomId::FIRST_RESERVED`], a bit each.
pub struct IdSet {
    words: [u64; WORDS],
    /// A bit for each word that is not 0.
    summary: [u64; SUMMARY],
}

/// The first bit of `words` from `from` on.
fn first(words: &[u64], from: usize) -> Option<usize> {
    let (start, offset) = (from / 64, from % 64);
    let mask = |index: usize| if index == start { u64::MAX << offset } else { u64::MAX };
    let words = words.iter().enumerate().skip(start);
    let (index, bits) =
        words.map(|(index, word)| (index, word & mask(index))).find(|(_, bits)| *bits != 0)?;
    Some(index * 64 + bits.trailing_zeros() as usize)
}

impl IdSet {
    /// None.
    pub const fn new() -> IdSet {
        IdSet { words: [0; WORDS], summary: [0; SUMMARY] }
    }

    /// Adds a number. One that no domain can have is none.
    pub fn insert(&mut self, id: u16) {
        let word = usize::from(id / 64);
        if let Some((bits, summary)) = self.words.get_mut(word).zip(self.summary.get_mut(word / 64)) {
            *bits |= 1 << (id % 64);
            *summary |= 1 << (word % 64);
        }
    }

    /// Takes a number out, if it is in.
    pub fn remove(&mut self, id: u16) {
        let word = usize::from(id / 64);
        if let Some((bits, summary)) = self.words.get_mut(word).zip(self.summary.get_mut(word / 64)) {
            *bits &= !(1 << (id % 64));
            if *bits == 0 {
                *summary &= !(1 << (word % 64));
            }
        }
    }

    /// The smallest number in it that is at least `id`.
    pub fn at_or_after(&self, id: u16) -> Option<u16> {
        let word = usize::from(id / 64);
        let here = self.words.get(word)? & u64::MAX << (id % 64);
        if here != 0 {
            return Some(id / 64 * 64 + here.trailing_zeros() as u16);
        }
        let word = first(&self.summary, word + 1)?;
        Some((word * 64) as u16 + self.words.get(word)?.trailing_zeros() as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set(
            steps in proptest::collection::vec((any::<bool>(), 0u16..32752), 1..200),
            asked in proptest::collection::vec(any::<u16>(), 50),
        ) {
            let (mut set, mut model) = (IdSet::new(), BTreeSet::new());
            for (put, id) in &steps {
                // Near each other, too.
                let id = if id % 3 == 0 { id % 130 } else { *id };
                if *put {
                    set.insert(id);
                    model.insert(id);
                } else {
                    let id = model.range(id..).next().copied().unwrap_or(id);
                    set.remove(id);
                    model.remove(&id);
                }
            }
            for id in asked.into_iter().chain(model.iter().flat_map(|id| [*id, id + 1])) {
                prop_assert_eq!(set.at_or_after(id), model.range(id..).next().copied(), "{}", id);
            }
        }
    }
}

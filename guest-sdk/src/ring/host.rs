//! Shared pages in host memory, for tests: both ends of a ring meet in one process.

use super::SharedPage;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::PAGE_SIZE;

/// Pages side by side. Clones are the same pages.
#[derive(Clone, Debug)]
pub struct HostPages(Arc<[AtomicU32]>);

impl HostPages {
    /// So many pages, with `word` all over them.
    #[must_use]
    pub fn new(pages: usize, word: u32) -> Self {
        Self((0..pages * PAGE_SIZE / 4).map(|_| AtomicU32::new(word)).collect())
    }
}

impl SharedPage for HostPages {
    fn size(&self) -> usize {
        self.0.len() * 4
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        for (at, byte) in (offset..).zip(to) {
            *byte = self.0[at / 4].load(Ordering::Relaxed).to_le_bytes()[at % 4];
        }
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let mut word = self.0[at / 4].load(Ordering::Relaxed).to_le_bytes();
            word[at % 4] = *byte;
            self.0[at / 4].store(u32::from_le_bytes(word), Ordering::Relaxed);
        }
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert_eq!(offset % 4, 0);
        &self.0[offset / 4]
    }
}

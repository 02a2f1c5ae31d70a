//! The heap: linked_list_allocator over the memory that the builder has mapped, growing over the rest of the domain.

use crate::memory;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{NonNull, null_mut};
use linked_list_allocator::Heap;
use spin::Mutex;

/// The allocator of large blocks, and small blocks that were given back.
///
/// A search for the first hole that fits takes longer, the more holes there are; what a program mostly asks for is small. So small
/// blocks come from lists, one for each of some sizes, and go back there: constant work, whatever else the heap holds.
struct Blocks {
    heap: Heap,
    /// The first free block of each size; its first word leads to the next. 0 ends the list.
    free: [usize; CLASSES],
    /// Bytes in all these lists.
    listed: usize,
}

static HEAP: Mutex<Blocks> = Mutex::new(Blocks { heap: Heap::empty(), free: [0; CLASSES], listed: 0 });

/// Sizes of small blocks: steps of 16 up to 128, of 64 up to 512, of 256 up to 2048.
const CLASSES: usize = 20;
/// Alignment of small blocks.
const SMALL_ALIGN: usize = 16;
/// Bytes that are taken from the heap for small blocks at a time, if they are so small.
const PORTION: usize = 1024;

/// The class of a small block and the bytes of its blocks; `None` for what is large, or aligned more than small blocks are.
const fn class_of(layout: Layout) -> Option<(usize, usize)> {
    let size = layout.size();
    if layout.align() > SMALL_ALIGN || size == 0 {
        return None;
    }
    match size {
        1..=128 => Some(((size - 1) / 16, size.next_multiple_of(16))),
        129..=512 => Some((8 + (size - 129) / 64, size.next_multiple_of(64))),
        513..=2048 => Some((14 + (size - 513) / 256, size.next_multiple_of(256))),
        _ => None,
    }
}

impl Blocks {
    fn take(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        let Some((class, bytes)) = class_of(layout) else {
            return self.heap.allocate_first_fit(layout).ok();
        };
        let first = self.free.get_mut(class)?;
        if *first == 0 {
            let count = (PORTION / bytes).max(1);
            let portion = |count| Layout::from_size_align(bytes * count, SMALL_ALIGN).ok();
            let many = portion(count).and_then(|layout| self.heap.allocate_first_fit(layout).ok());
            let (chunk, count) = match many {
                Some(chunk) => (chunk, count),
                None => (self.heap.allocate_first_fit(portion(1)?).ok()?, 1),
            };
            for index in (0..count).rev() {
                let block = chunk.as_ptr() as usize + index * bytes;
                // SAFETY: inside the chunk, which is ours, and aligned for a word.
                unsafe { (block as *mut usize).write(*first) };
                *first = block;
            }
            self.listed += bytes * count;
        }
        let block = *first as *mut u8;
        // SAFETY: a free block of the list begins with the address of the next.
        *first = unsafe { block.cast::<usize>().read() };
        self.listed -= bytes;
        NonNull::new(block)
    }

    /// # Safety
    /// `block` was taken with this layout, and nobody uses it any more.
    unsafe fn give(&mut self, block: NonNull<u8>, layout: Layout) {
        match class_of(layout) {
            Some((class, bytes)) if class < CLASSES => {
                // SAFETY: the caller's; blocks of this class are at least a word, and aligned for one.
                unsafe { block.cast::<usize>().write(self.free[class]) };
                self.free[class] = block.as_ptr() as usize;
                self.listed += bytes;
            }
            // SAFETY: the caller's: it came from there.
            _ => unsafe { self.heap.deallocate(block, layout) },
        }
    }
}

/// The heap of a guest image.
pub struct GuestHeap;

/// Gives the heap its first memory.
///
/// # Safety
/// `bytes` bytes at `start` are mapped and nobody's; called once.
pub(crate) unsafe fn init(start: u64, bytes: u64) {
    let heap = &mut HEAP.lock().heap;
    // SAFETY: the caller's.
    unsafe { heap.init(start as *mut u8, bytes as usize) };
    keep_reserve(heap);
}

/// Sets pages aside for the tables that growing needs.
fn keep_reserve(heap: &mut Heap) {
    memory::fill_reserve(|| {
        let layout = Layout::from_size_align(4096, 4096).ok()?;
        let page = heap.allocate_first_fit(layout).ok()?;
        // SAFETY: just allocated, 4096 bytes.
        unsafe { page.as_ptr().write_bytes(0, 4096) };
        Some(page.as_ptr() as u64)
    });
}

/// Makes the heap bigger by at least `bytes`, if there is memory.
fn grow(heap: &mut Heap, bytes: u64) -> bool {
    let Some((start, bytes)) = memory::grow(bytes) else { return false };
    // The heap began where the mapped part's free memory began, so what is mapped next continues it.
    assert!(start == heap.top() as u64, "the heap ends at {:p}, new memory begins at {start:#x}", heap.top());
    // SAFETY: just mapped, contiguous, nobody's.
    unsafe { heap.extend(bytes as usize) };
    keep_reserve(heap);
    true
}

/// Nobody is in the middle of changing the heap.
pub(crate) fn is_intact() -> bool {
    !HEAP.is_locked()
}

/// Bytes in use and bytes free.
pub(crate) fn usage() -> (u64, u64) {
    // The panic path may come here with the lock taken.
    HEAP.try_lock().map_or((0, 0), |blocks| {
        let (heap, listed) = (&blocks.heap, blocks.listed);
        ((heap.used() - listed) as u64, (heap.free() + listed) as u64)
    })
}

// SAFETY: linked_list_allocator hands out disjoint blocks of the memory it was given, with the layout asked for.
unsafe impl GlobalAlloc for GuestHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut blocks = HEAP.lock();
        loop {
            if let Some(block) = blocks.take(layout) {
                return block.as_ptr();
            }
            // What is new joins a free block at the heap's end, but there need not be one.
            let wanted = (layout.size() as u64).saturating_add(layout.align() as u64);
            if !grow(&mut blocks.heap, wanted) {
                return null_mut();
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the block came from alloc with this layout.
            unsafe { HEAP.lock().give(block, layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Blocks, CLASSES, class_of};
    use core::alloc::Layout;
    use core::ptr::NonNull;
    use linked_list_allocator::Heap;
    use std::vec::Vec;

    #[test]
    fn classes_fit_what_they_are_for() {
        let mut seen = [0; CLASSES];
        for size in 1..=2048 {
            let (class, bytes) = class_of(Layout::from_size_align(size, 8).unwrap()).unwrap();
            assert!(bytes >= size && bytes.is_multiple_of(16) && bytes < size + 256, "{size}");
            assert!(seen[class] == 0 || seen[class] == bytes, "{size}: class {class} has blocks of one size");
            seen[class] = bytes;
        }
        assert!(seen.is_sorted() && seen[0] == 16 && seen[CLASSES - 1] == 2048);
        assert_eq!(class_of(Layout::from_size_align(2049, 1).unwrap()), None);
        assert_eq!(class_of(Layout::from_size_align(64, 32).unwrap()), None);
    }

    #[test]
    fn blocks_are_apart_and_come_back() {
        let mut memory = std::vec![0u128; 1 << 14];
        let mut blocks = Blocks { heap: Heap::empty(), free: [0; CLASSES], listed: 0 };
        // SAFETY: the vector outlives the heap, and nobody else uses it.
        unsafe { blocks.heap.init(memory.as_mut_ptr().cast(), memory.len() * 16) };
        let mut live: Vec<(NonNull<u8>, Layout, u8)> = Vec::new();
        let (mut random, mut most) = (1u64, 0);
        for round in 0..20_000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (random >> 33) as usize;
            if value.is_multiple_of(2) && live.len() < 200 {
                let align = 1 << (value / 2 % 7);
                let layout = Layout::from_size_align(1 + value / 16 % 3000, align).unwrap();
                let Some(block) = blocks.take(layout) else { continue };
                assert!((block.as_ptr() as usize).is_multiple_of(align));
                // SAFETY: taken with this size.
                unsafe { block.as_ptr().write_bytes(round as u8, layout.size()) };
                live.push((block, layout, round as u8));
            } else if !live.is_empty() {
                let (block, layout, mark) = live.swap_remove(value / 2 % live.len());
                // SAFETY: it was filled when it was taken.
                let bytes = unsafe { core::slice::from_raw_parts(block.as_ptr(), layout.size()) };
                assert!(bytes.iter().all(|byte| *byte == mark), "somebody else wrote to it");
                // SAFETY: taken with this layout, used no more.
                unsafe { blocks.give(block, layout) };
            }
            most = most.max(live.len());
        }
        assert!(most > 100);
        for (block, layout, _) in live {
            // SAFETY: as above.
            unsafe { blocks.give(block, layout) };
        }
        assert_eq!(blocks.heap.used(), blocks.listed, "all that is used is in the lists");
    }
}

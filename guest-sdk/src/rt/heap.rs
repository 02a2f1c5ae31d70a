//! The heap: linked_list_allocator over the memory that the builder has mapped, growing over the rest of the domain.

use crate::memory;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{NonNull, null_mut};
use linked_list_allocator::Heap;
use spin::Mutex;

/// The unit of what is taken from the list of holes, bytes.
///
/// All blocks there are whole grains, and begin on one. So are all holes between them, and each is good for something again: for a
/// portion of small blocks at least. With blocks of any size, what is left between long-lived ones is too small for whatever comes,
/// and every search walks over it.
const GRAIN: usize = 1024;

/// Large blocks, and small blocks that were given back.
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

static HEAP: Mutex<Blocks> = Mutex::new(Blocks::empty());

/// Sizes of small blocks: steps of 16 up to 128, of 64 up to 512, of 256 up to 2048.
const CLASSES: usize = 20;
/// Small blocks are aligned as their size allows, at most so.
const SMALL_ALIGN: usize = 512;

/// The class of a small block and the bytes of its blocks; `None` for what is large, or aligned more than small blocks are.
const fn class_of(layout: Layout) -> Option<(usize, usize)> {
    let (mut size, align) = (layout.size(), layout.align());
    if size == 0 || size > 2048 || align > SMALL_ALIGN {
        return None;
    }
    if align > 16 {
        // Blocks lie one after the other in whole grains: they are aligned to the power of two that their size is a multiple of.
        size = size.next_multiple_of(align);
    }
    let (class, bytes) = match size {
        ..=128 => ((size - 1) / 16, size.next_multiple_of(16)),
        129..=512 => (8 + (size - 129) / 64, size.next_multiple_of(64)),
        _ => (14 + (size - 513) / 256, size.next_multiple_of(256)),
    };
    if align > 16 && !bytes.is_multiple_of(align) {
        return None;
    }
    Some((class, bytes))
}

/// The grains that are taken for small blocks of so many bytes at a time: the fewest of which at most an eighth is left over.
const fn portion_of(bytes: usize) -> usize {
    let mut grains = bytes.div_ceil(GRAIN);
    while grains * GRAIN % bytes * 8 > grains * GRAIN {
        grains += 1;
    }
    grains
}

/// What is taken from the list of holes for a large block; `None` when that is more than there can be.
fn whole_grains(layout: Layout) -> Option<Layout> {
    let bytes = layout.size().checked_next_multiple_of(GRAIN)?;
    Layout::from_size_align(bytes, layout.align().max(GRAIN)).ok()
}

impl Blocks {
    const fn empty() -> Blocks {
        Blocks { heap: Heap::empty(), free: [0; CLASSES], listed: 0 }
    }

    /// Gives the heap its first memory: the whole grains of it.
    ///
    /// # Safety
    /// `bytes` bytes at `start` are mapped and nobody's; called once.
    unsafe fn init(&mut self, start: usize, bytes: usize) {
        let first = start.next_multiple_of(GRAIN);
        let bytes = bytes.saturating_sub(first - start);
        // SAFETY: the caller's.
        unsafe { self.heap.init(first as *mut u8, bytes) };
    }

    fn take_grains(&mut self, grains: usize) -> Option<NonNull<u8>> {
        self.heap.allocate_first_fit(Layout::from_size_align(grains * GRAIN, GRAIN).ok()?).ok()
    }

    /// Takes a portion of small blocks for a list. A heap that is nearly full gives a smaller one.
    fn refill(&mut self, class: usize, bytes: usize) -> Option<()> {
        let grains = (bytes.div_ceil(GRAIN)..=portion_of(bytes)).rev();
        let (portion, grains) =
            grains.into_iter().find_map(|grains| Some((self.take_grains(grains)?, grains)))?;
        let first = self.free.get_mut(class)?;
        let count = grains * GRAIN / bytes;
        for index in (0..count).rev() {
            let block = portion.as_ptr() as usize + index * bytes;
            // SAFETY: inside the portion, which is ours, and aligned for a word.
            unsafe { (block as *mut usize).write(*first) };
            *first = block;
        }
        self.listed += bytes * count;
        Some(())
    }

    fn take(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        let Some((class, bytes)) = class_of(layout) else {
            return self.heap.allocate_first_fit(whole_grains(layout)?).ok();
        };
        if *self.free.get(class)? == 0 {
            self.refill(class, bytes)?;
        }
        let first = self.free.get_mut(class)?;
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
            _ => {
                if let Some(layout) = whole_grains(layout) {
                    // SAFETY: the caller's: it came from there, with this layout.
                    unsafe { self.heap.deallocate(block, layout) };
                }
            }
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
    let mut blocks = HEAP.lock();
    // SAFETY: the caller's.
    unsafe { blocks.init(start as usize, bytes as usize) };
    keep_reserve(&mut blocks.heap);
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
mod tests;

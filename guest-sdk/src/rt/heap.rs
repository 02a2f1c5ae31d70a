//! The heap: linked_list_allocator over the memory that the builder has mapped, growing over the rest of the domain.

use crate::memory;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{NonNull, null_mut};
use linked_list_allocator::Heap;
use spin::Mutex;

static HEAP: Mutex<Heap> = Mutex::new(Heap::empty());

/// The heap of a guest image.
pub struct GuestHeap;

/// Gives the heap its first memory.
///
/// # Safety
/// `bytes` bytes at `start` are mapped and nobody's; called once.
pub(crate) unsafe fn init(start: u64, bytes: u64) {
    let mut heap = HEAP.lock();
    // SAFETY: the caller's.
    unsafe { heap.init(start as *mut u8, bytes as usize) };
    keep_reserve(&mut heap);
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

/// Bytes in use and bytes free.
pub(crate) fn usage() -> (u64, u64) {
    // The panic path may come here with the lock taken.
    HEAP.try_lock().map_or((0, 0), |heap| (heap.used() as u64, heap.free() as u64))
}

// SAFETY: linked_list_allocator hands out disjoint blocks of the memory it was given, with the layout asked for.
unsafe impl GlobalAlloc for GuestHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut heap = HEAP.lock();
        loop {
            if let Ok(block) = heap.allocate_first_fit(layout) {
                return block.as_ptr();
            }
            // What is new joins a free block at the heap's end, but there need not be one.
            let wanted = (layout.size() as u64).saturating_add(layout.align() as u64);
            if !grow(&mut heap, wanted) {
                return null_mut();
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the block came from alloc with this layout.
            unsafe { HEAP.lock().deallocate(block, layout) };
        }
    }
}

//! The heap.
use core::alloc::{GlobalAlloc, Layout};
use linked_list_allocator::Heap;
use spin::Mutex;

static HEAP: Mutex<Heap> = Mutex::new(Heap::empty());

/// The heap of a guest image.
pub struct GuestHeap;

// SAFETY: linked_list_allocator hands out disjoint blocks of memory that init gave it.
unsafe impl GlobalAlloc for GuestHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.lock().allocate_first_fit(layout).map_or(core::ptr::null_mut(), |block| block.as_ptr())
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = core::ptr::NonNull::new(block) {
            // SAFETY: the block came from alloc with this layout.
            unsafe { HEAP.lock().deallocate(block, layout) }
        }
    }
}

//! The hypervisor's heap: for boot and the creation of domains. What a guest's call allocates comes from frames charged to
//! that domain instead, so no guest can make ring 0 walk this list.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use hv::sync::PlainMutex;
use linked_list_allocator::Heap;

struct LockedHeap(PlainMutex<Heap>);

#[global_allocator]
static HEAP: LockedHeap = LockedHeap(PlainMutex::new(Heap::empty()));

// SAFETY: `Heap` hands out disjoint, aligned blocks of the one region it was given, and the lock serialises it. Interrupts are
// off in ring 0, so no holder of the lock is interrupted on its own CPU; NMI and #MC paths do not allocate.
unsafe impl GlobalAlloc for LockedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().allocate_first_fit(layout).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if let Some(at) = NonNull::new(at) {
            // SAFETY: the caller's contract: allocated here with this layout.
            unsafe { self.0.lock().deallocate(at, layout) }
        }
    }
}

/// Gives the heap its memory.
///
/// # Safety
/// `len` bytes at `start` are mapped writable, used by nobody else, and stay so for ever. Called once.
pub unsafe fn init(start: *mut u8, len: usize) {
    // SAFETY: the caller's contract.
    unsafe { HEAP.0.lock().init(start, len) }
}

/// Bytes in use and bytes in all.
pub fn usage() -> (usize, usize) {
    let heap = HEAP.0.lock();
    (heap.used(), heap.size())
}

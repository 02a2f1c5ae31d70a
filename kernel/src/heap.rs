//! The hypervisor's heap: for boot and the creation of domains. What a guest's call allocates comes from frames charged to
//! that domain instead, so no guest can make ring 0 walk this list.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use hv::sync::PlainMutex;
use linked_list_allocator::Heap;

/// Blocks begin and end at multiples of this, the largest alignment that is asked for often (the vector state's). So no aligned block
/// leaves a gap before it: gaps too small for anything stay, one or more for each domain, and every search walks over all of them.
const GRAIN: usize = 64;

/// What is taken from the list for a request.
fn grained(layout: Layout) -> Option<Layout> {
    let size = layout.size().checked_next_multiple_of(GRAIN)?;
    Layout::from_size_align(size, layout.align().max(GRAIN)).ok()
}

struct LockedHeap(PlainMutex<Heap>);

#[global_allocator]
static HEAP: LockedHeap = LockedHeap(PlainMutex::new(Heap::empty()));

// SAFETY: `Heap` hands out disjoint, aligned blocks of the one region it was given, and the lock serialises it. Interrupts are
// off in ring 0, so no holder of the lock is interrupted on its own CPU; NMI and #MC paths do not allocate.
unsafe impl GlobalAlloc for LockedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(layout) = grained(layout) else { return core::ptr::null_mut() };
        self.0.lock().allocate_first_fit(layout).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if let Some((at, layout)) = NonNull::new(at).zip(grained(layout)) {
            // SAFETY: the caller's contract: allocated here with this layout, which was enlarged alike.
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

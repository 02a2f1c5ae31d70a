use super::{Blocks, CLASSES, GRAIN, SMALL_ALIGN, class_of, portion_of, whole_grains};
use core::alloc::Layout;
use core::ptr::NonNull;
use proptest::prelude::*;
use std::vec::Vec;

/// A heap over memory of the test's.
struct Arena {
    blocks: Blocks,
    /// Bytes that the heap began with.
    bytes: usize,
    _memory: Vec<Grain>,
}

#[derive(Clone)]
#[repr(align(1024))]
struct Grain {
    _bytes: [u8; GRAIN],
}

/// A block that was taken, and what all its bytes are.
struct Taken {
    block: NonNull<u8>,
    layout: Layout,
    mark: u8,
}

impl Arena {
    fn new(bytes: usize) -> Arena {
        let mut memory = std::vec![Grain { _bytes: [0xa5; GRAIN] }; bytes / GRAIN];
        let mut blocks = Blocks::empty();
        // The first grain is not whole.
        // SAFETY: the vector stays where it is as long as the heap, and nobody else uses it.
        unsafe { blocks.init(memory.as_mut_ptr() as usize + 8, bytes - 8) };
        assert_eq!(blocks.heap.free(), bytes - GRAIN);
        Arena { bytes: blocks.heap.free(), blocks, _memory: memory }
    }

    fn take(&mut self, size: usize, align: usize, mark: u8) -> Option<Taken> {
        let layout = Layout::from_size_align(size, align).unwrap();
        let block = self.blocks.take(layout)?;
        assert!((block.as_ptr() as usize).is_multiple_of(align), "{layout:?} at {block:?}");
        // SAFETY: taken with this size.
        unsafe { block.as_ptr().write_bytes(mark, size) };
        Some(Taken { block, layout, mark })
    }

    fn give(&mut self, taken: Taken) {
        // SAFETY: it was filled when it was taken.
        let bytes = unsafe { core::slice::from_raw_parts(taken.block.as_ptr(), taken.layout.size()) };
        assert!(bytes.iter().all(|byte| *byte == taken.mark), "somebody else wrote to {:?}", taken.layout);
        // SAFETY: taken with this layout, used no more.
        unsafe { self.blocks.give(taken.block, taken.layout) };
    }

    /// Bytes of each hole, from the lowest address on; all that is free is in one.
    fn holes(&mut self) -> Vec<usize> {
        let (free, mut taken) = (self.blocks.heap.free(), Vec::new());
        while let Some(grain) = self.blocks.take_grains(1) {
            taken.push(grain);
        }
        assert_eq!(taken.len() * GRAIN, free, "every byte that is free can be had");
        let mut holes: Vec<usize> = Vec::new();
        let mut end = 0;
        for grain in taken {
            let start = grain.as_ptr() as usize;
            match holes.last_mut() {
                Some(hole) if start == end => *hole += GRAIN,
                _ => holes.push(GRAIN),
            }
            end = start + GRAIN;
            // SAFETY: just taken with this layout.
            unsafe {
                self.blocks.heap.deallocate(grain, Layout::from_size_align(GRAIN, GRAIN).unwrap());
            }
        }
        holes
    }

    /// The largest hole is there for whoever wants it all.
    fn check_largest(&mut self) {
        let Some(largest) = self.holes().into_iter().max() else { return };
        let taken = self.take(largest, 16, 0).expect("the largest hole is usable to its last byte");
        self.give(taken);
    }
}

/// Numbers that look random, the same on each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

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
    assert_eq!(class_of(Layout::from_size_align(64, 2 * SMALL_ALIGN).unwrap()), None);
    assert_eq!(class_of(Layout::from_size_align(40, 64).unwrap()), Some((3, 64)));
    assert_eq!(class_of(Layout::from_size_align(2040, 64).unwrap()), Some((19, 2048)));
    for bytes in seen {
        let portion = portion_of(bytes) * GRAIN;
        assert!(portion % bytes * 8 <= portion, "{bytes}: {portion} bytes leave too much over");
        assert!(portion <= 4 * GRAIN, "{bytes}: {portion} bytes are much for a small domain");
    }
}

#[test]
fn large_blocks_are_whole_grains() {
    for (size, align, bytes) in [(2049, 8, 3072), (3072, 16, 3072), (4096, 4096, 4096), (5000, 1, 5120)] {
        let layout = whole_grains(Layout::from_size_align(size, align).unwrap()).unwrap();
        assert_eq!((layout.size(), layout.align()), (bytes, align.max(GRAIN)));
    }
    assert_eq!(whole_grains(Layout::from_size_align(isize::MAX as usize, 1).unwrap()), None);
}

#[test]
fn blocks_are_apart_and_come_back() {
    let mut arena = Arena::new(1 << 18);
    let (mut random, mut most) = (Random(1), 0);
    let mut live: Vec<Taken> = Vec::new();
    for round in 0..20_000u64 {
        if random.below(2) == 0 && live.len() < 200 {
            let align = 1 << random.below(13);
            live.extend(arena.take(1 + random.below(3000), align, round as u8));
        } else if !live.is_empty() {
            let taken = live.swap_remove(random.below(live.len()));
            arena.give(taken);
        }
        most = most.max(live.len());
    }
    assert!(most > 100);
    for taken in live {
        arena.give(taken);
    }
    let used = arena.blocks.heap.used();
    assert!(used - arena.blocks.listed <= used / 8, "what is used is in the lists, but for ends of portions");
    arena.check_largest();
}

#[test]
fn a_full_heap_gives_its_last_grain() {
    let mut arena = Arena::new(1 << 16);
    let mut live: Vec<Taken> = Vec::new();
    while let Some(taken) = arena.take(4096, 1, 1) {
        live.push(taken);
    }
    while let Some(taken) = arena.take(GRAIN, 1, 2) {
        live.push(taken);
    }
    assert_eq!(arena.blocks.heap.free(), 0);
    // Apart from each other, one grain each: less than a portion of blocks of 768 bytes.
    assert!(portion_of(768) > 1);
    let grain = live.pop().unwrap();
    arena.give(grain);
    let page = live.swap_remove(3);
    arena.give(page);
    let blocks: Vec<Taken> = core::iter::from_fn(|| arena.take(700, 8, 3)).collect();
    assert!(blocks.len() >= 4, "{} blocks of 700 bytes in 4096", blocks.len());
}

/// What `guests` leave in the heap that come one after the other and stay, each with blocks that it keeps and blocks that it needs while
/// it is made: the number of holes.
fn holes_after(guests: usize, seed: u64) -> usize {
    let mut arena = Arena::new(64 << 20);
    let mut random = Random(seed);
    let (mut kept, mut short): (Vec<Taken>, Vec<Taken>) = (Vec::new(), Vec::new());
    for guest in 0..guests {
        for step in 0..100 {
            let size = match random.below(20) {
                0 => 2049 + random.below(40_000),
                1..4 => 513 + random.below(4000),
                _ => 1 + random.below(300),
            };
            let align = if random.below(30) == 0 { 4096 } else { 8 };
            let taken = arena.take(size, align, (guest + step) as u8).expect("the arena is large");
            // Few large blocks stay, as of a domain.
            if size < 4000 && random.below(2) == 0 {
                kept.push(taken)
            } else {
                short.push(taken)
            }
            if random.below(2) == 0 && !short.is_empty() {
                let taken = short.swap_remove(random.below(short.len()));
                arena.give(taken);
            }
        }
        // Blocks of the one before end when this one has its own.
        while short.len() > 10 {
            let taken = short.swap_remove(random.below(short.len()));
            arena.give(taken);
        }
        // Some end long after they came.
        if guest % 7 == 0 && kept.len() > 100 {
            let taken = kept.swap_remove(random.below(kept.len()));
            arena.give(taken);
        }
    }
    arena.check_largest();
    arena.holes().len()
}

#[test]
fn searches_do_not_become_longer() {
    for seed in 1..4 {
        let (few, many) = (holes_after(70, seed), holes_after(900, seed));
        assert!(many <= 2 * few + 10, "seed {seed}: {few} holes after 70 guests, {many} after 900");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes and goes, all that is free can be had, the largest hole as a whole, and at the end all that is not in lists.
    #[test]
    fn what_is_free_is_usable(
        steps in prop::collection::vec((1usize..30_000, 0u32..8, 0u32..14, 0u32..12), 1..400),
    ) {
        let mut arena = Arena::new(1 << 20);
        // Each block ends at a step, soon or late: at most 2^11 steps from where it came.
        let mut live: Vec<(usize, Taken)> = Vec::new();
        for (now, (size, shift, align, life)) in steps.into_iter().enumerate() {
            let (dead, alive): (Vec<_>, Vec<_>) = live.into_iter().partition(|(end, _)| *end <= now);
            live = alive;
            for (_, taken) in dead {
                arena.give(taken);
            }
            let taken = arena.take((size >> shift).max(1), 1 << align, now as u8);
            live.extend(taken.map(|taken| (now + (1 << life), taken)));
            if now % 16 == 0 {
                arena.check_largest();
            }
        }
        for (_, taken) in live {
            arena.give(taken);
        }
        let free: usize = arena.holes().iter().sum();
        prop_assert_eq!(free + arena.blocks.heap.used(), arena.bytes);
        prop_assert!(arena.blocks.heap.used() <= arena.blocks.listed + arena.blocks.heap.used() / 8);
    }
}

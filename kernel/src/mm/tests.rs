//! The page-table hypercalls as a guest calls them, over the simulated machine: each command's success and its errors, each
//! with a budget of one step and without limit.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::memory::{
    AddToPhysmap, MachphysMapping, MemoryDomain, MemoryExchange, MemoryMap, MemoryReservation,
};
use hypercall_abi::mmu::{MMU_UPDATE_PREEMPTED, MmuUpdate, MmuextOp, UVMF_ALL, UVMF_INVLPG, UVMF_TLB_FLUSH};
use hypercall_abi::subops::{MemoryOp, MmuextCmd};
use hypercall_abi::{DomId, Errno, GuestHandle, Hypercall, Mfn, VcpuId};
use zerocopy::{FromBytes, IntoBytes};

use super::{FrameRecord, Kind, Memory};
use crate::access::{Rights, Verbs};
use crate::domain::{Current, Domain, DomainConfig, VcpuRef, VcpuState};
use crate::hypercall::{Budget, Exit, dispatch};
use crate::hypervisor::Hypervisor;
use crate::page_ref::{L3, L4};
use crate::platform::Platform;
use crate::platform::sim::SimMachine;

const FRAMES: usize = 256;
/// Pages mapped read-write, page `n` at address `n << 12`; page 0 is not mapped.
const PAGES: usize = 32;
/// Where arguments go.
const ARGS: u64 = 0x1000;
const LIST: u64 = 0x2000;
const DONE: u64 = 0x3000;
/// Where the L1 table is mapped, read-only.
const L1_PAGE: usize = 40;
/// A page with nothing mapped.
const HOLE: u64 = 50 << 12;
const RW: u64 = 7;
const RO: u64 = 5;

struct Guest {
    hv: Hypervisor<SimMachine>,
    current: Current,
    /// Frame of each mapped page.
    frames: Vec<Mfn>,
    /// Frames that nothing maps.
    spare: Vec<Mfn>,
    /// L1 to L4.
    tables: [Mfn; 4],
    /// Steps of each entry.
    steps: u32,
    /// How often a hypercall was preempted.
    stops: u32,
}

fn domain(hv: &Hypervisor<SimMachine>, number: u16, rights: Rights) -> Arc<Domain> {
    let id = DomId::new(number);
    let shared_info = hv.allocate_hypervisor_page(id).expect("the test has memory");
    let config = DomainConfig { id, handle: [0; 16], vcpus: 2, max_pages: 64, rights, shared_info };
    let domain = Arc::new(Domain::new(config, &hv.platform));
    assert!(hv.domains.insert(domain.clone()));
    domain
}

impl Guest {
    fn new(steps: u32, verbs: Verbs) -> Guest {
        let records: &'static [FrameRecord] = Box::leak((0..FRAMES).map(|_| FrameRecord::new()).collect());
        let m2p: &'static [AtomicU64] = Box::leak((0..FRAMES).map(|_| AtomicU64::new(0)).collect());
        let memory = Memory::new(records, m2p);
        // The last 8 frame numbers are a device.
        memory.declare_ram(Mfn::new(0), FRAMES as u64 - 8);
        memory.add_free(Mfn::new(1), FRAMES as u64 - 9);
        let hv = Hypervisor::new(SimMachine::new(FRAMES), memory);
        let owner = domain(&hv, 1, Rights { verbs, ..Rights::none() });
        let give = || hv.give_frames(&owner, 0, u64::MAX).expect("the test has memory");
        let frames: Vec<Mfn> = (0..PAGES).map(|_| give()).collect();
        let spare: Vec<Mfn> = (0..12).map(|_| give()).collect();
        let tables = [give(), give(), give(), give()];
        let set = |table: Mfn, index: usize, target: Mfn, bits: u64| {
            hv.platform.frame(table)[index].store(target.get() << 12 | bits, Ordering::SeqCst);
        };
        for (page, frame) in frames.iter().enumerate().skip(1) {
            set(tables[0], page, *frame, RW);
        }
        set(tables[0], L1_PAGE, tables[0], RO);
        for level in 1..4 {
            set(tables[level], 0, tables[level - 1], RW);
        }
        let mut state = Box::new(VcpuState::new(&hv.platform));
        let root = hv.pager().get_typed::<L4>(tables[3], owner.id, &hv, &mut Budget::unlimited());
        state.kernel_root = Some(root.expect("good tables").into_pte());
        state.kernel_mode = true;
        hv.platform.load_root(tables[3]);
        let vcpu = VcpuRef::new(&owner, VcpuId::new(0)).expect("the first vCPU");
        Guest { hv, current: Current { vcpu, state }, frames, spare, tables, steps, stops: 0 }
    }

    fn put<T: IntoBytes + zerocopy::Immutable>(&self, va: u64, value: &T) {
        self.hv.write_guest(va, value).expect("the page is mapped");
    }

    fn get<T: FromBytes + IntoBytes>(&self, va: u64) -> T {
        self.hv.read_guest(va).expect("the page is mapped")
    }

    /// Calls as a guest does: a preempted call is executed again with the arguments it left.
    fn call(&mut self, call: Hypercall, args: &[u64]) -> Result<u64, Errno> {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        for _ in 0..10_000 {
            self.current.state.budget =
                if self.steps == u32::MAX { Budget::unlimited() } else { Budget::new(self.steps) };
            match dispatch(&self.hv, &mut self.current, call.number(), all) {
                // Everybody returns 64 bits; a small negative number is an errno.
                Ok(value) => return Errno::check(value),
                Err(Exit::Errno(errno)) => return Err(errno),
                Err(Exit::Preempted(again)) => {
                    self.stops += 1;
                    all = again;
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        panic!("the hypercall never ends");
    }

    fn mmu_update(&mut self, requests: &[(u64, u64)], foreign: u64) -> Result<u64, Errno> {
        for (n, (ptr, val)) in (0..).zip(requests) {
            self.put(LIST + n * 16, &MmuUpdate { ptr: *ptr, val: *val });
        }
        self.put(DONE, &0u32);
        self.call(Hypercall::MmuUpdate, &[LIST, requests.len() as u64, DONE, foreign])
    }

    fn mmuext(&mut self, ops: &[MmuextOp]) -> Result<u64, Errno> {
        for (n, op) in (0..).zip(ops) {
            self.put(LIST + n * 24, op);
        }
        self.put(DONE, &0u32);
        self.call(Hypercall::MmuextOp, &[LIST, ops.len() as u64, DONE, SELF])
    }

    fn ext(&mut self, cmd: MmuextCmd, arg1: u64, arg2: u64) -> Result<u64, Errno> {
        self.mmuext(&[MmuextOp::new(cmd, arg1, arg2)])
    }

    fn memory_op<T: IntoBytes + zerocopy::Immutable>(&mut self, op: MemoryOp, arg: &T) -> Result<u64, Errno> {
        self.put(ARGS, arg);
        self.call(Hypercall::MemoryOp, &[u64::from(op.number()), ARGS])
    }

    fn done(&self) -> u32 {
        self.get(DONE)
    }

    /// Machine address of an entry of a table.
    fn entry(&self, table: Mfn, index: u64) -> u64 {
        (table.get() << 12) + index * 8
    }

    fn word(&self, table: Mfn, index: usize) -> u64 {
        self.hv.platform.frame(table)[index].load(Ordering::SeqCst)
    }

    fn kind(&self, mfn: Mfn) -> Option<Kind> {
        self.hv.mm.type_word(mfn).filter(|w| w.count() > 0).map(|w| w.kind())
    }

    /// A frame of RAM that nobody has.
    fn unowned(&self) -> Mfn {
        let nobodys = |mfn: &Mfn| self.hv.mm.owner(*mfn) == super::Owner::Nobody;
        (0..FRAMES as u64).map(Mfn::new).find(nobodys).expect("not all are given out")
    }

    fn references(&self, mfn: Mfn) -> (u32, u32) {
        let word = self.hv.mm.type_word(mfn).expect("a frame");
        (self.hv.mm.general_count(mfn), if word.is_idle() { 0 } else { word.count() })
    }
}

const SELF: u64 = DomId::SELF.get() as u64;

/// Runs a test with every hypercall preempted after each step, and with none.
fn both(test: impl Fn(&mut Guest)) {
    for steps in [1, u32::MAX] {
        test(&mut Guest::new(steps, Verbs::empty()));
    }
}

fn at(mfn: Mfn, bits: u64) -> u64 {
    mfn.get() << 12 | bits
}

// ── mmu_update ──

#[test]
fn mmu_update_maps_and_unmaps_in_order() {
    both(|g| {
        let (l1, a, b) = (g.tables[0], g.spare[0], g.spare[1]);
        let list: Vec<(u64, u64)> =
            (0..100).map(|n| (g.entry(l1, 60 + n), at(if n % 2 == 0 { a } else { b }, RW))).collect();
        assert_eq!(g.mmu_update(&list, SELF), Ok(0));
        assert_eq!(g.done(), 100);
        assert_eq!((g.references(a), g.references(b)), ((51, 50), (51, 50)));
        let list: Vec<(u64, u64)> = (0..100).map(|n| (g.entry(l1, 60 + n), 0)).collect();
        assert_eq!(g.mmu_update(&list, SELF), Ok(0));
        assert_eq!((g.references(a), g.references(b)), ((1, 0), (1, 0)));
        assert_eq!(g.steps == 1, g.stops > 10);
    });
}

#[test]
fn mmu_update_stops_at_the_first_error() {
    both(|g| {
        let (l1, l2, l4, a) = (g.tables[0], g.tables[1], g.tables[3], g.spare[0]);
        let good = (g.entry(l1, 60), at(a, RO));
        let free = g.unowned();
        for (bad, errno) in [
            ((g.entry(l1, 61), at(a, RW | 0x10)), Errno::EINVAL),
            ((g.entry(l1, 61), at(l1, RW)), Errno::EBUSY),
            ((g.entry(l1, 61), at(free, RO)), Errno::EBUSY),
            ((g.entry(l1, 61), at(Mfn::new(FRAMES as u64 - 1), RO)), Errno::EPERM),
            ((g.entry(l1, 61), 0x000f_ffff_ffff_f005), Errno::EINVAL),
            ((g.entry(l2, 61), at(a, RW | 0x80)), Errno::EINVAL),
            ((g.entry(l2, 61), at(l4, RO)), Errno::EINVAL),
            ((g.entry(l4, 256), at(g.tables[2], RO)), Errno::EINVAL),
            ((g.entry(l4, 271), 0), Errno::EINVAL),
            ((g.entry(free, 0), 0), Errno::EINVAL),
            ((g.entry(l1, 61) + 4, at(a, RO)), Errno::ENOSYS),
        ] {
            assert_eq!(g.mmu_update(&[good, bad, good], SELF), Err(errno), "{bad:x?}");
            assert_eq!(g.done(), 1);
            assert_eq!(g.references(a), (2, 0), "{bad:x?}");
        }
        assert_eq!(g.call(Hypercall::MmuUpdate, &[HOLE, 1, 0, SELF]), Err(Errno::EFAULT));
    });
}

#[test]
fn mmu_update_writes_data_pages_plainly() {
    both(|g| {
        let (page, unused) = (g.frames[5], g.spare[0]);
        assert_eq!(g.mmu_update(&[(g.entry(page, 3), 0x1234), (g.entry(unused, 4), 0x81)], SELF), Ok(0));
        assert_eq!((g.word(page, 3), g.word(unused, 4)), (0x1234, 0x81));
        assert_eq!(g.references(unused), (1, 0));
    });
}

#[test]
fn mmu_update_keeps_accessed_and_dirty_when_asked() {
    both(|g| {
        let (l1, a) = (g.tables[0], g.spare[0]);
        assert_eq!(g.mmu_update(&[(g.entry(l1, 60), at(a, RW | 0x60))], SELF), Ok(0));
        assert_eq!(g.mmu_update(&[(g.entry(l1, 60) | 2, at(a, RO))], SELF), Ok(0));
        assert_eq!(g.word(l1, 60), at(a, RO | 0x60));
        assert_eq!(g.mmu_update(&[(g.entry(l1, 60), at(a, RO))], SELF), Ok(0));
        assert_eq!(g.word(l1, 60), at(a, RO));
    });
}

#[test]
fn mmu_update_notes_physical_numbers() {
    both(|g| {
        let a = g.spare[0];
        assert_eq!(g.mmu_update(&[(a.get() << 12 | 1, 77)], SELF), Ok(0));
        assert_eq!(g.hv.mm.m2p().get(a), 77);
        assert_eq!(g.mmu_update(&[(g.unowned().get() << 12 | 1, 77)], SELF), Err(Errno::EINVAL));
    });
}

#[test]
fn mmu_update_of_others_needs_the_right() {
    let mut g = Guest::new(u32::MAX, Verbs::empty());
    let other = domain(&g.hv, 2, Rights::none());
    let theirs = g.hv.give_frames(&other, 0, u64::MAX).expect("memory");
    let map = [(g.entry(g.tables[0], 60), at(theirs, RW))];
    assert_eq!(g.mmu_update(&map, SELF), Err(Errno::EBUSY));
    assert_eq!(g.mmu_update(&map, 2), Err(Errno::EPERM));
    assert_eq!(g.mmu_update(&map, 9), Err(Errno::ESRCH));
    assert_eq!(g.mmu_update(&map, 1), Err(Errno::ESRCH), "one's own number is no foreign domain");
    g.current.domain().rights.lock().verbs = Verbs::CONTROL;
    assert_eq!(g.mmu_update(&map, 2), Ok(0));
    assert_eq!(g.references(theirs), (2, 1));
    // Their tables, our list: the page is data still.
    assert_eq!(g.mmu_update(&[(g.entry(theirs, 0), 5)], 3 << 16 | 2), Ok(0));
    assert_eq!(g.word(theirs, 0), 5);
    assert_eq!(g.mmu_update(&[(theirs.get() << 12 | 1, 5)], 3 << 16 | 2), Err(Errno::EPERM));
    assert_eq!(g.mmu_update(&[(g.entry(g.tables[0], 60), 0)], SELF), Ok(0));
    assert_eq!(g.references(theirs), (1, 0));
}

#[test]
fn a_change_above_l1_flushes_once_for_the_batch() {
    let mut g = Guest::new(u32::MAX, Verbs::empty());
    let l2 = g.tables[1];
    let before = g.hv.platform.flushes.lock().len();
    let table = g.spare[0];
    let list: Vec<(u64, u64)> = (1..9).map(|n| (g.entry(l2, n), at(table, RW))).collect();
    assert_eq!(g.mmu_update(&list, SELF), Ok(0));
    assert_eq!(g.hv.platform.flushes.lock().len(), before + 1);
    assert_eq!(g.references(table), (9, 8));
}

// ── mmuext_op ──

/// Makes spare frames 0 to 3 a tree whose L1 table maps 200 pages, and returns its tables from L1 to L4.
fn tree(g: &mut Guest) -> [Mfn; 4] {
    let t = [g.spare[0], g.spare[1], g.spare[2], g.spare[3]];
    let data = g.spare[4];
    let mut list: Vec<(u64, u64)> = (0..200).map(|n| (g.entry(t[0], n), at(data, RW))).collect();
    list.extend((1..4).map(|level| (g.entry(t[level], 7), at(t[level - 1], RW))));
    assert_eq!(g.mmu_update(&list, SELF), Ok(0));
    t
}

#[test]
fn pins_hold_a_tree_and_unpins_give_it_back() {
    both(|g| {
        let t = tree(g);
        let data = g.spare[4];
        assert_eq!(g.ext(MmuextCmd::PinL4Table, t[3].get(), 0), Ok(0));
        assert_eq!(t.map(|m| g.kind(m)), [Some(Kind::L1), Some(Kind::L2), Some(Kind::L3), Some(Kind::L4)]);
        assert_eq!(g.references(data), (201, 200));
        assert_eq!(g.ext(MmuextCmd::PinL4Table, t[3].get(), 0), Err(Errno::EINVAL));
        assert_eq!(g.ext(MmuextCmd::PinL1Table, t[3].get(), 0), Err(Errno::EINVAL));
        assert_eq!(g.ext(MmuextCmd::PinL3Table, t[2].get(), 0), Ok(0));
        assert_eq!(
            g.mmuext(&[
                MmuextOp::new(MmuextCmd::UnpinTable, t[3].get(), 0),
                MmuextOp::new(MmuextCmd::UnpinTable, t[2].get(), 0),
                MmuextOp::new(MmuextCmd::UnpinTable, t[2].get(), 0),
            ]),
            Err(Errno::EINVAL)
        );
        assert_eq!(g.done(), 2);
        assert_eq!(t.map(|m| g.references(m)), [(1, 0); 4]);
        assert_eq!(g.references(data), (1, 0));
        assert_eq!(g.steps == 1, g.stops > 5);
    });
}

#[test]
fn roots_change_and_the_old_tree_goes() {
    both(|g| {
        let t = tree(g);
        // The new root has to map the caller too.
        let share = [(g.entry(t[3], 0), at(g.tables[2], RW))];
        assert_eq!(g.mmu_update(&share, SELF), Ok(0));
        assert_eq!(g.ext(MmuextCmd::NewBaseptr, t[3].get(), 0), Ok(0));
        assert_eq!(g.hv.platform.root(), Some(t[3]));
        assert_eq!(g.references(g.tables[3]), (1, 0), "nobody uses the old root");
        assert_eq!(g.ext(MmuextCmd::NewBaseptr, 0, 0), Err(Errno::EINVAL));
        assert_eq!(g.ext(MmuextCmd::NewBaseptr, t[2].get(), 0), Err(Errno::EINVAL));
        assert_eq!(g.ext(MmuextCmd::NewUserBaseptr, t[3].get(), 0), Ok(0));
        assert_eq!(g.references(t[3]), (3, 2));
        assert_eq!(g.ext(MmuextCmd::NewUserBaseptr, 0, 0), Ok(0));
        assert_eq!(g.current.state.user_root, None);
        assert_eq!(g.ext(MmuextCmd::NewBaseptr, g.tables[3].get(), 0), Ok(0));
        assert_eq!(t.map(|m| g.references(m)), [(1, 0); 4]);
    });
}

#[test]
fn flushes_and_other_commands() {
    both(|g| {
        for (cmd, arg1, arg2, result) in [
            (MmuextCmd::TlbFlushLocal, 0, 0, Ok(0)),
            (MmuextCmd::InvlpgLocal, 0x1000, 0, Ok(0)),
            (MmuextCmd::TlbFlushAll, 0, 0, Ok(0)),
            (MmuextCmd::InvlpgAll, 0x1000, 0, Ok(0)),
            (MmuextCmd::TlbFlushMulti, 0, ARGS, Ok(0)),
            (MmuextCmd::InvlpgMulti, 0x1000, ARGS, Ok(0)),
            (MmuextCmd::TlbFlushMulti, 0, HOLE, Err(Errno::EINVAL)),
            (MmuextCmd::FlushCache, 0, 0, Err(Errno::EACCES)),
            (MmuextCmd::FlushCacheGlobal, 0, 0, Err(Errno::EINVAL)),
            (MmuextCmd::SetLdt, 0x4000, 512, Ok(0)),
            (MmuextCmd::SetLdt, 0x4001, 512, Err(Errno::EINVAL)),
            (MmuextCmd::SetLdt, 0xffff_8000_0000_0000, 512, Err(Errno::EINVAL)),
            (MmuextCmd::SetLdt, 0x4000, 8193, Err(Errno::EINVAL)),
            (MmuextCmd::SetLdt, 0, 0, Ok(0)),
            (MmuextCmd::MarkSuper, 0, 0, Err(Errno::EOPNOTSUPP)),
            (MmuextCmd::UnmarkSuper, 0, 0, Err(Errno::EOPNOTSUPP)),
        ] {
            assert_eq!(g.ext(cmd, arg1, arg2), result, "{cmd:?}");
        }
        let unknown = MmuextOp { cmd: 14, ..MmuextOp::default() };
        assert_eq!(g.mmuext(&[unknown]), Err(Errno::ENOSYS));
    });
}

#[test]
fn pages_are_cleared_and_copied_unless_they_are_tables() {
    both(|g| {
        let (a, b, l1) = (g.spare[0], g.spare[1], g.tables[0]);
        g.hv.platform.frame(a)[9].store(99, Ordering::SeqCst);
        assert_eq!(g.ext(MmuextCmd::CopyPage, b.get(), a.get()), Ok(0));
        assert_eq!(g.word(b, 9), 99);
        assert_eq!(g.ext(MmuextCmd::ClearPage, a.get(), 0), Ok(0));
        assert_eq!(g.word(a, 9), 0);
        assert_eq!(g.ext(MmuextCmd::ClearPage, l1.get(), 0), Err(Errno::EINVAL));
        assert_eq!(g.ext(MmuextCmd::CopyPage, l1.get(), a.get()), Err(Errno::EINVAL));
        assert_eq!(g.ext(MmuextCmd::CopyPage, a.get(), FRAMES as u64), Err(Errno::EINVAL));
        assert_eq!((g.references(a), g.references(b)), ((1, 0), (1, 0)));
    });
}

#[test]
fn a_made_up_continuation_only_returns_its_own_number() {
    both(|g| {
        assert_eq!(g.call(Hypercall::MmuUpdate, &[0, MMU_UPDATE_PREEMPTED, 0, 7]), Ok(7));
        assert_eq!(
            g.call(Hypercall::MmuextOp, &[0, MMU_UPDATE_PREEMPTED, 0, 0xffff_ffea]),
            Err(Errno::EINVAL)
        );
    });
}

/// A table whose undoing is preempted names its child. The child can be finished, made another kind of table and left
/// half undone in turn: such a chain is as long as the guest likes, and must not be followed to its end.
#[test]
fn a_chain_of_unfinished_tables_is_not_followed() {
    let g = Guest::new(u32::MAX, Verbs::empty());
    let (hv, owner) = (&g.hv, g.current.domain().id);
    let (chain, leaves) = g.spare.split_at(4);
    let set = |table: Mfn, index: usize, entry: u64| {
        hv.platform.frame(table)[index].store(entry, Ordering::SeqCst);
    };
    let word = |mfn: Mfn| hv.mm.type_word(mfn).unwrap();
    let (mut unlimited, leaf) = (Budget::unlimited(), &leaves[..3]);
    for pair in chain.windows(2) {
        let (root, child) = (pair[0], pair[1]);
        for (index, l2) in leaf.iter().enumerate() {
            set(child, index, at(*l2, RW));
        }
        set(root, 0, at(child, RW));
        // A large page: refused.
        (1..3).for_each(|index| set(root, index, at(leaves[3], RW | 0x80)));
        let stopped = (1..50).any(|steps| {
            let _refused = hv.pager().get_typed::<L4>(root, owner, hv, &mut Budget::new(steps));
            let half_undone = word(root).is_parked() && word(root).has_child() && word(child).is_parked();
            if !half_undone {
                assert!(hv.pager().get_typed::<L4>(root, owner, hv, &mut unlimited).is_err());
            }
            half_undone
        });
        assert!(stopped, "undoing {root:?} can be stopped in its child");
        let done = hv.pager().get_typed::<L3>(child, owner, hv, &mut unlimited).expect("finished, and good");
        assert_eq!(hv.pager().release(done, &mut unlimited), Ok(()));
        // It is data again, and what the parent has to do is give back what it still holds.
        assert!(word(child).is_idle());
        (0..3).for_each(|index| set(child, index, 0));
    }
    // The last of the chain is idle; those before it wait, each naming the next.
    for root in &chain[..3] {
        assert!(word(*root).is_parked() && word(*root).has_child());
    }
    assert_eq!(hv.pager().help(chain[0], &mut unlimited), Ok(()));
    assert!(word(chain[0]).is_idle());
    assert!(word(chain[1]).is_idle(), "it could be a linear table");
    assert!(word(chain[2]).is_parked(), "linear tables have no linear tables");
    assert_eq!(hv.pager().help(chain[2], &mut unlimited), Ok(()));
    assert!(word(chain[2]).is_idle());
    assert!(g.spare.iter().all(|mfn| hv.mm.general_count(*mfn) == 1));
}

// ── update_va_mapping ──

#[test]
fn update_va_mapping_changes_one_entry() {
    both(|g| {
        let (a, l1) = (g.spare[0], g.tables[0]);
        for flags in [0, UVMF_INVLPG, UVMF_TLB_FLUSH | UVMF_ALL, UVMF_INVLPG | ARGS] {
            assert_eq!(g.call(Hypercall::UpdateVaMapping, &[HOLE, at(a, RW), flags]), Ok(0));
            assert_eq!(g.word(l1, 50), at(a, RW));
        }
        assert_eq!(g.references(a), (2, 1));
        let update = |g: &mut Guest, va, entry| g.call(Hypercall::UpdateVaMapping, &[va, entry, 0]);
        assert_eq!(update(g, HOLE, at(l1, RW)), Err(Errno::EBUSY));
        assert_eq!(update(g, 1 << 40, 0), Err(Errno::EINVAL), "no table there");
        assert_eq!(update(g, 0xffff_8000_0000_0000, 0), Err(Errno::EINVAL), "the hypervisor's");
        assert_eq!(update(g, 1 << 50, 0), Err(Errno::EINVAL), "not canonical");
        assert_eq!(update(g, HOLE, 0), Ok(0));
        assert_eq!(g.references(a), (1, 0));
        let other = g.call(Hypercall::UpdateVaMappingOtherdomain, &[HOLE, at(a, RW), 0, 9]);
        assert_eq!(other, Err(Errno::ESRCH));
        let own = g.call(Hypercall::UpdateVaMappingOtherdomain, &[HOLE, at(a, RW), 0, SELF]);
        assert_eq!(own, Ok(0));
    });
}

// ── memory_op ──

fn reservation(list: u64, extents: u64, order: u32) -> MemoryReservation {
    MemoryReservation {
        extent_start: GuestHandle::new(list),
        nr_extents: extents,
        extent_order: order,
        mem_flags: 0,
        domid: DomId::SELF,
        pad0: [0; 3],
    }
}

#[test]
fn memory_comes_and_goes() {
    both(|g| {
        let free = g.hv.free_frames();
        let query = MemoryDomain { domid: DomId::SELF };
        let before = g.memory_op(MemoryOp::CurrentReservation, &query).expect("a count");
        assert_eq!(g.memory_op(MemoryOp::MaximumReservation, &query), Ok(64));
        for n in 0..6 {
            g.put(LIST + n * 8, &(1000 + n));
        }
        assert_eq!(g.memory_op(MemoryOp::PopulatePhysmap, &reservation(LIST, 6, 0)), Ok(6));
        assert_eq!(g.memory_op(MemoryOp::CurrentReservation, &query), Ok(before + 6));
        let first: u64 = g.get(LIST);
        assert_eq!(g.hv.mm.m2p().get(Mfn::new(first)), 1000);
        assert!((0..512).all(|w| g.word(Mfn::new(first), w) == 0));
        assert_eq!(g.memory_op(MemoryOp::DecreaseReservation, &reservation(LIST, 6, 0)), Ok(6));
        assert_eq!(g.hv.mm.m2p().get(Mfn::new(first)), u64::MAX);
        assert_eq!(
            g.memory_op(MemoryOp::DecreaseReservation, &reservation(LIST, 6, 0)),
            Ok(0),
            "not its own"
        );
        assert_eq!(g.memory_op(MemoryOp::IncreaseReservation, &reservation(LIST, 2, 1)), Ok(2));
        assert_eq!(g.get::<u64>(LIST) % 2, 0);
        assert_eq!(g.memory_op(MemoryOp::DecreaseReservation, &reservation(LIST, 2, 1)), Ok(2));
        assert_eq!(g.hv.free_frames(), free);
        assert_eq!(g.memory_op(MemoryOp::IncreaseReservation, &reservation(0, 100, 0)), Ok(64 - before));
        assert_eq!(g.memory_op(MemoryOp::IncreaseReservation, &reservation(0, 1, 10)), Ok(0), "too large");
        assert_eq!(g.steps == 1, g.stops > 10);
    });
}

#[test]
fn memory_given_back_while_mapped_stays_charged() {
    both(|g| {
        let query = MemoryDomain { domid: DomId::SELF };
        let before = g.memory_op(MemoryOp::CurrentReservation, &query).expect("a count");
        let mapped = g.frames[6];
        g.put(LIST, &mapped.get());
        assert_eq!(g.memory_op(MemoryOp::DecreaseReservation, &reservation(LIST, 1, 0)), Ok(1));
        assert_eq!(g.memory_op(MemoryOp::CurrentReservation, &query), Ok(before));
        assert_eq!(g.call(Hypercall::UpdateVaMapping, &[6 << 12, 0, 0]), Ok(0));
        g.hv.drain_quarantine();
        assert_eq!(g.memory_op(MemoryOp::CurrentReservation, &query), Ok(before - 1));
    });
}

#[test]
fn frames_are_exchanged_or_kept() {
    both(|g| {
        let query = MemoryDomain { domid: DomId::SELF };
        let before = g.memory_op(MemoryOp::CurrentReservation, &query).expect("a count");
        for n in 0..4 {
            g.put(LIST + n * 8, &g.spare[n as usize].get());
            g.put(LIST + 0x100 + n * 8, &(500 + n));
        }
        let input = reservation(LIST, 4, 0);
        let output = reservation(LIST + 0x100, 1, 2);
        assert_eq!(
            g.memory_op(MemoryOp::Exchange, &MemoryExchange { input, output, nr_exchanged: 0 }),
            Ok(0)
        );
        let first: u64 = g.get(LIST + 0x100);
        assert_eq!((first % 4, g.hv.mm.m2p().get(Mfn::new(first + 3))), (0, 503));
        assert_eq!(g.memory_op(MemoryOp::CurrentReservation, &query), Ok(before));
        // A frame that is mapped cannot go: nothing changes.
        g.put(LIST, &g.spare[5].get());
        g.put(LIST + 8, &g.frames[3].get());
        let (input, output) = (reservation(LIST, 2, 0), reservation(LIST + 0x100, 2, 0));
        let free = g.hv.free_frames();
        let refused = g.memory_op(MemoryOp::Exchange, &MemoryExchange { input, output, nr_exchanged: 0 });
        assert_eq!(refused, Err(Errno::EINVAL));
        let after: MemoryExchange = g.get(ARGS);
        assert_eq!(after.nr_exchanged, 1, "the first was exchanged");
        assert_eq!(g.hv.free_frames(), free);
        for (input, output, errno) in [
            (reservation(LIST, 2, 0), reservation(LIST, 2, 1), Errno::EINVAL),
            (reservation(LIST, 1, 10), reservation(LIST, 1, 10), Errno::EPERM),
        ] {
            let request = MemoryExchange { input, output, nr_exchanged: 0 };
            assert_eq!(g.memory_op(MemoryOp::Exchange, &request), Err(errno));
        }
    });
}

#[test]
fn maps_and_limits() {
    both(|g| {
        assert_eq!(g.call(Hypercall::MemoryOp, &[2]), Ok(FRAMES as u64));
        assert_eq!(g.call(Hypercall::MemoryOp, &[2 | 1 << 6]), Err(Errno::EINVAL));
        assert_eq!(g.call(Hypercall::MemoryOp, &[63, ARGS]), Err(Errno::ENOSYS));
        assert_eq!(g.call(Hypercall::MemoryOp, &[12, ARGS]), Ok(0));
        let window: MachphysMapping = g.get(ARGS);
        assert_eq!((window.v_start, window.v_end), (0xffff_8000_0000_0000, 0xffff_8040_0000_0000));
        assert_eq!(g.call(Hypercall::MemoryOp, &[12, HOLE]), Err(Errno::EFAULT));
        let map = MemoryMap { nr_entries: 4, pad0: 0, buffer: GuestHandle::new(LIST) };
        assert_eq!(g.memory_op(MemoryOp::MemoryMap, &map), Ok(0));
        assert_eq!((g.get::<MemoryMap>(ARGS).nr_entries, g.get::<u64>(LIST + 8)), (1, 64 << 12));
        assert_eq!(g.memory_op(MemoryOp::MachineMemoryMap, &map), Err(Errno::EPERM));
        let own = AddToPhysmap { domid: DomId::SELF, ..AddToPhysmap::default() };
        assert_eq!(g.memory_op(MemoryOp::AddToPhysmap, &own), Err(Errno::EACCES));
        let nobody = AddToPhysmap { domid: DomId::new(9), ..AddToPhysmap::default() };
        assert_eq!(g.memory_op(MemoryOp::AddToPhysmap, &nobody), Err(Errno::ESRCH));
        let other = MemoryDomain { domid: DomId::new(9) };
        assert_eq!(g.memory_op(MemoryOp::CurrentReservation, &other), Err(Errno::ESRCH));
        domain(&g.hv, 9, Rights::none());
        assert_eq!(g.memory_op(MemoryOp::CurrentReservation, &other), Err(Errno::EPERM));
    });
}

#[test]
fn frames_are_scrubbed_before_somebody_gets_them() {
    let g = Guest::new(u32::MAX, Verbs::empty());
    let owner = g.current.domain().clone();
    let used = g.spare[0];
    g.hv.platform.frame(used)[1].store(7, Ordering::SeqCst);
    let page = g.hv.mm.get_page(used, owner.id).expect("its frame");
    assert!(g.hv.mm.release(&page));
    drop(page);
    assert!(g.hv.drain_quarantine());
    let again = g.hv.give_frames(&owner, 0, u64::MAX).expect("memory");
    assert_eq!((again, g.word(again, 1)), (used, 0));
    // What nobody has had since power-on as well: the simulated firmware writes to all of it.
    owner.pages.lock().set_max_pages(FRAMES as u64);
    while let Ok(mfn) = g.hv.give_frames(&owner, 0, u64::MAX) {
        assert!((0..512).all(|word| g.word(mfn, word) == 0), "frame {mfn:?}");
    }
    assert_eq!(g.hv.free_frames(), 0, "it had all of it");
}

#[test]
fn idle_processors_scrub_what_nobody_has_had() {
    let g = Guest::new(u32::MAX, Verbs::empty());
    let free = g.hv.free_frames();
    assert!(g.hv.mm.scrub_idly(&g.hv.platform));
    assert_eq!(g.hv.free_frames(), free);
    let clean = || {
        let frames = (0..FRAMES as u64).map(Mfn::new).filter(|m| g.hv.mm.owner(*m) == super::Owner::Nobody);
        frames.filter(|m| (0..512).all(|word| g.word(*m, word) == 0)).count()
    };
    let portion = clean();
    assert!((1..=16).contains(&portion), "up to the next multiple of 16");
    while g.hv.mm.scrub_idly(&g.hv.platform) {}
    assert_eq!(g.hv.free_frames(), free);
    assert!(clean() > free - 64, "all but what came to the free lists before");
    assert!(!g.hv.mm.scrub_idly(&g.hv.platform));
    let block = g.hv.allocate_frames(6, u64::MAX).expect("they have come together as blocks");
    assert_eq!(block.get() % 64, 0);
}

#[test]
fn blocks_merge_again_when_all_comes_back() {
    let g = Guest::new(u32::MAX, Verbs::empty());
    let mut taken = Vec::new();
    while let Some(mfn) = g.hv.allocate_frames(0, u64::MAX) {
        taken.push(mfn);
    }
    assert_eq!(g.hv.free_frames(), 0);
    assert_eq!(g.hv.allocate_frames(0, u64::MAX), None);
    let total = taken.len();
    for mfn in taken.into_iter().rev() {
        g.hv.mm.give_back(mfn, 0);
    }
    assert_eq!(g.hv.free_frames(), total);
    let block = g.hv.allocate_frames(6, u64::MAX).expect("64 frames in a row");
    assert_eq!(block.get() % 64, 0);
    let below = g.hv.allocate_frames(0, block.get() + 64).expect("a frame below");
    assert!(below.get() < block.get() + 64);
}

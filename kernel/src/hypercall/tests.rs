//! Long hypercalls, stopped after every step and not at all, end in the same state.
//!
//! A whole dom0 is built on the simulated machine, and the hypercalls go in at the door that SYSCALL opens.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::control::{ControlOp, CreateDomain, Destroy};
use hypercall_abi::evtchn::{EvtchnAllocUnbound, EvtchnReset};
use hypercall_abi::grant::{GnttabMapGrantRef, GnttabSetupTable, GnttabUnmapGrantRef, GrantEntryV1};
use hypercall_abi::memory::MemoryReservation;
use hypercall_abi::mmu::{MmuUpdate, MmuextOp, MulticallEntry};
use hypercall_abi::subops::{EvtchnOp, GnttabOp, MemoryOp, MmuextCmd};
use hypercall_abi::{DomId, GrantRef, GuestHandle, Hypercall, MachAddr, Mfn};
use zerocopy::IntoBytes;

use crate::access::Rights;
use crate::build_dom::Dom0;
use crate::domain::{Cpu, ENTRY_SYSCALL};
use crate::hypervisor::Hypervisor;
use crate::mm::{FrameRecord, Memory};
use crate::platform::sim::SimMachine;
use crate::platform::{CpuId, Platform};

const FRAMES: usize = 3072;
const DOM0_PAGES: u64 = 1024;
/// A frame of RAM that no domain owns.
const NOBODYS: u64 = 0;
/// Guest virtual page n is its pfn n; the builder maps all of the region. Free pages of the guest begin here.
const FREE_PAGE: u64 = 900;
const ARGS: u64 = 880 << 12;
const LIST: u64 = 881 << 12;
/// Present, writable, user, accessed, dirty.
const RW: u64 = 0x67;
const RO: u64 = 0x65;

/// A PV kernel of one page at address 0x1000 with the notes that make it one.
fn kernel() -> Vec<u8> {
    fn note(out: &mut Vec<u8>, kind: u32, text: &[u8]) {
        for word in [4, text.len() as u32, kind] {
            out.extend(word.to_le_bytes());
        }
        out.extend(b"Xen\0");
        out.extend(text);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    let mut notes = Vec::new();
    note(&mut notes, 5, b"xen-3.0\0");
    note(&mut notes, 8, b"generic\0");
    let headers = 64 + 2 * 56;
    let mut elf = Vec::from([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([2u16, 62].iter().flat_map(|v| v.to_le_bytes()));
    elf.extend(1u32.to_le_bytes());
    elf.extend([0x1000u64, 64, 0].iter().flat_map(|v| v.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|v| v.to_le_bytes()));
    for (kind, offset, address, size) in
        [(1u32, 0u64, 0x1000u64, 4096u64), (4, headers, 0, notes.len() as u64)]
    {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        elf.extend([offset, address, address, size, size, 4096].iter().flat_map(|v| v.to_le_bytes()));
    }
    elf.extend(&notes);
    elf.resize(4096, 0);
    elf
}

/// A machine on whose one CPU dom0 runs.
pub(crate) struct World {
    /// The hypervisor.
    pub(crate) hv: Hypervisor<SimMachine>,
    /// The CPU.
    pub(crate) cpu: Cpu,
    /// Times a hypercall was stopped and executed again.
    preempted: u32,
}

impl World {
    /// With `steps` in the budget of an entry.
    pub(crate) fn new(steps: u32) -> World {
        let records: &'static [FrameRecord] = Box::leak((0..FRAMES).map(|_| FrameRecord::new()).collect());
        let m2p: &'static [AtomicU64] = Box::leak((0..FRAMES).map(|_| AtomicU64::new(0)).collect());
        let memory = Memory::new(records, m2p);
        memory.declare_ram(Mfn::new(0), FRAMES as u64);
        memory.add_free(Mfn::new(1), FRAMES as u64 - 1);
        let hv = Hypervisor::new(SimMachine::new(FRAMES), memory);
        let (kernel, rights) = (kernel(), Rights::all(24));
        let dom0 =
            Dom0 { kernel: &kernel, module: &[], command_line: "", pages: DOM0_PAGES, vcpus: 1, rights };
        hv.build_dom0(&dom0).unwrap();
        hv.steps_per_entry.store(steps, Ordering::Relaxed);
        let mut cpu = Cpu::new(CpuId(0));
        hv.prepare_resume(&mut cpu);
        World { hv, cpu, preempted: 0 }
    }

    fn put<T: IntoBytes + zerocopy::Immutable + ?Sized>(&self, va: u64, value: &T) {
        self.hv.platform.copy_to_guest(va, value.as_bytes()).unwrap();
    }

    fn get(&self, va: u64) -> u64 {
        let mut bytes = [0; 8];
        self.hv.platform.copy_from_guest(&mut bytes, va).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// The frame behind a page of the boot region.
    fn mfn(&self, page: u64) -> u64 {
        self.hv.platform.translate(page << 12, false).unwrap().0.get()
    }

    /// Machine address of the L1 entry that maps a page of the first 2 MiB.
    fn l1_entry(&self, page: u64) -> u64 {
        let root = self.hv.platform.root().unwrap();
        let (table, index) = self.hv.pager().find_l1(root, page << 12).unwrap();
        table.get() * 4096 + index as u64 * 8
    }

    /// Executes SYSCALL until the guest goes on behind it; returns rax.
    fn call(&mut self, which: Hypercall, args: &[u64]) -> i64 {
        let regs = &mut self.cpu.current.as_mut().unwrap().state.regs;
        let rip = regs.rip + 2;
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        regs.set_args(all);
        for _ in 0..100_000 {
            let regs = &mut self.cpu.current.as_mut().unwrap().state.regs;
            (regs.rax, regs.rip, regs.vector) = (which.number(), rip, ENTRY_SYSCALL);
            self.hv.on_syscall(&mut self.cpu);
            self.hv.prepare_resume(&mut self.cpu);
            let regs = &self.cpu.current.as_ref().unwrap().state.regs;
            if regs.rip == rip {
                return regs.rax as i64;
            }
            assert_eq!(regs.rip, rip - 2);
            self.preempted += 1;
        }
        panic!("{which:?} makes no progress");
    }

    /// Everything that can be told of the memory and what it is used for.
    fn state(&self) -> Vec<u64> {
        let mut state = Vec::from([self.hv.mm.free_frames() as u64]);
        for mfn in (0..FRAMES as u64).map(Mfn::new) {
            // Flush stamps differ with the number of flushes, and the kind of a frame that nobody uses is history.
            let word = self.hv.mm.type_word(mfn).unwrap();
            let allocated = u64::from(self.hv.mm.is_allocated(mfn));
            let kind = if word.count() == 0 { 0 } else { 1 + word.kind() as u64 };
            state.extend([u64::from(word.count()), kind, u64::from(word.is_pinned())]);
            state.extend([u64::from(self.hv.mm.general_count(mfn)), allocated]);
        }
        let dom0 = self.hv.domains.get(DomId::ZERO).unwrap();
        state.push(dom0.pages.lock().total());
        state.push(u64::from(dom0.events.lock().active()));
        state.push(u64::from(self.hv.grant_usage(&dom0).mappings));
        state
    }
}

/// Runs `what` without limit and with few steps; the results and the end must be the same. Returns how often the one with a
/// single step was stopped.
fn same_end(what: impl Fn(&mut World) -> Vec<i64>) -> u32 {
    let mut free = World::new(u32::MAX);
    let results = what(&mut free);
    assert_eq!(free.preempted, 0);
    let state = free.state();
    let mut stops = 0;
    for steps in [1, 2, 3, 7] {
        let mut world = World::new(steps);
        assert_eq!(what(&mut world), results, "results with {steps} steps");
        assert!(world.state() == state, "state with {steps} steps");
        if steps == 1 {
            stops = world.preempted;
        }
    }
    stops
}

/// Writes `count` entries to the table at page `table` that map pages from FREE_PAGE up, and hides the table's own page.
fn fill_table(world: &mut World, table: u64, entries: impl Iterator<Item = u64>) {
    for (i, entry) in entries.enumerate() {
        world.put((table << 12) + 8 * i as u64, &entry);
    }
    let read_only = world.mfn(table) << 12 | RO;
    assert_eq!(world.call(Hypercall::UpdateVaMapping, &[table << 12, read_only, 0]), 0);
}

fn mmuext(world: &mut World, command: MmuextCmd, page: u64) -> i64 {
    let op = MmuextOp::new(command, world.mfn(page), 0);
    world.put(ARGS, &op);
    world.call(Hypercall::MmuextOp, &[ARGS, 1, 0, u64::from(DomId::SELF.get())])
}

#[test]
fn pinning_and_unpinning_a_tree() {
    let stops = same_end(|world| {
        let data = world.mfn(FREE_PAGE) << 12 | RW;
        fill_table(world, 890, (0..512).map(|_| data));
        let l1 = world.mfn(890) << 12 | RW;
        fill_table(world, 891, (0..8).map(|_| l1));
        let l2 = world.mfn(891) << 12 | RW;
        fill_table(world, 892, (0..4).map(|_| l2));
        let l3 = world.mfn(892) << 12 | RW;
        fill_table(world, 893, (0..2).map(|_| l3));
        let pinned = mmuext(world, MmuextCmd::PinL4Table, 893);
        let unpinned = mmuext(world, MmuextCmd::UnpinTable, 893);
        let again = mmuext(world, MmuextCmd::PinL4Table, 893);
        Vec::from([pinned, unpinned, again])
    });
    assert!(stops > 10, "stopped {stops} times");
}

#[test]
fn a_tree_with_a_bad_last_entry_is_refused_and_leaves_nothing() {
    let stops = same_end(|world| {
        let data = world.mfn(FREE_PAGE) << 12 | RW;
        fill_table(world, 890, (0..511).map(|_| data).chain([NOBODYS << 12 | RW]));
        let before = world.state();
        let refused = mmuext(world, MmuextCmd::PinL1Table, 890);
        assert_ne!(refused, 0);
        assert!(world.state() == before);
        Vec::from([refused])
    });
    assert!(stops > 2, "stopped {stops} times");
}

#[test]
fn many_updates_of_page_tables() {
    let stops = same_end(|world| {
        let unmap: Vec<_> =
            (0..60).map(|i| MmuUpdate { ptr: world.l1_entry(FREE_PAGE + i), val: 0 }).collect();
        let frames: Vec<_> = (0..60).map(|i| world.mfn(FREE_PAGE + i)).collect();
        let map: Vec<_> =
            unmap.iter().zip(&frames).map(|(u, mfn)| MmuUpdate { ptr: u.ptr, val: mfn << 12 | RO }).collect();
        let mut results = Vec::new();
        for list in [unmap, map] {
            world.put(LIST, list.as_slice());
            results.push(world.call(Hypercall::MmuUpdate, &[LIST, 60, ARGS, u64::from(DomId::SELF.get())]));
            results.push(world.get(ARGS) as u32 as i64);
        }
        results
    });
    assert!(stops > 1, "stopped {stops} times");
}

#[test]
fn giving_memory_back_and_taking_it_again() {
    let stops = same_end(|world| {
        let entries: Vec<_> =
            (0..40).map(|i| MmuUpdate { ptr: world.l1_entry(FREE_PAGE + i), val: 0 }).collect();
        let frames: Vec<_> = (0..40).map(|i| world.mfn(FREE_PAGE + i)).collect();
        world.put(LIST, entries.as_slice());
        let unmapped = world.call(Hypercall::MmuUpdate, &[LIST, 40, 0, u64::from(DomId::SELF.get())]);
        let reservation = |handle| MemoryReservation {
            extent_start: GuestHandle::new(handle),
            nr_extents: 40,
            domid: DomId::SELF,
            ..Default::default()
        };
        world.put(LIST, frames.as_slice());
        world.put(ARGS, &reservation(LIST));
        let given = world.call(Hypercall::MemoryOp, &[MemoryOp::DecreaseReservation as u64, ARGS]);
        world.put(LIST, (0..40).map(|i| FREE_PAGE + i).collect::<Vec<u64>>().as_slice());
        world.put(ARGS, &reservation(LIST));
        let taken = world.call(Hypercall::MemoryOp, &[MemoryOp::PopulatePhysmap as u64, ARGS]);
        Vec::from([unmapped, given, taken])
    });
    assert!(stops > 2, "stopped {stops} times");
}

#[test]
fn a_list_of_hypercalls() {
    let stops = same_end(|world| {
        let mut list = Vec::new();
        for i in 0..50 {
            let read_only = world.mfn(FREE_PAGE + i) << 12 | RO;
            let args = [(FREE_PAGE + i) << 12, read_only, 0, 0, 0, 0];
            list.push(MulticallEntry { op: Hypercall::UpdateVaMapping.number(), result: 77, args });
        }
        world.put(LIST, list.as_slice());
        let whole = world.call(Hypercall::Multicall, &[LIST, 50]);
        let results = (0..50).map(|i| world.get(LIST + i * 64 + 8) as i64);
        core::iter::once(whole).chain(results).collect()
    });
    assert!(stops >= 49, "stopped {stops} times");
}

#[test]
fn a_preempted_call_inside_a_list_goes_on_where_it_stopped() {
    let stops = same_end(|world| {
        let data = world.mfn(FREE_PAGE) << 12 | RW;
        fill_table(world, 890, (0..512).map(|_| data));
        world.put(ARGS, &MmuextOp::new(MmuextCmd::PinL1Table, world.mfn(890), 0));
        let args = [ARGS, 1, 0, u64::from(DomId::SELF.get()), 0, 0];
        let pin = MulticallEntry { op: Hypercall::MmuextOp.number(), result: 77, args };
        let version = MulticallEntry { op: Hypercall::XenVersion.number(), result: 77, args: [0; 6] };
        world.put(LIST, [pin, version].as_slice());
        let whole = world.call(Hypercall::Multicall, &[LIST, 2]);
        Vec::from([whole, world.get(LIST + 8) as i64, world.get(LIST + 64 + 8) as i64])
    });
    assert!(stops > 6, "stopped {stops} times");
}

#[test]
fn closing_all_ports() {
    let stops = same_end(|world| {
        world.put(
            ARGS,
            &EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, ..Default::default() },
        );
        for _ in 0..30 {
            assert_eq!(world.call(Hypercall::EventChannelOp, &[EvtchnOp::AllocUnbound as u64, ARGS]), 0);
        }
        world.put(ARGS, &EvtchnReset { dom: DomId::SELF });
        Vec::from([world.call(Hypercall::EventChannelOp, &[EvtchnOp::Reset as u64, ARGS])])
    });
    assert!(stops > 5, "stopped {stops} times");
}

#[test]
fn mapping_and_unmapping_many_grants() {
    let stops = same_end(|world| {
        let setup = GnttabSetupTable {
            dom: DomId::SELF,
            nr_frames: 1,
            frame_list: GuestHandle::new(LIST),
            ..Default::default()
        };
        world.put(ARGS, &setup);
        assert_eq!(world.call(Hypercall::GrantTableOp, &[GnttabOp::SetupTable as u64, ARGS, 1]), 0);
        let table = world.get(LIST);
        let window = 895u64 << 12;
        assert_eq!(world.call(Hypercall::UpdateVaMapping, &[window, table << 12 | RW, 0]), 0);
        // Addresses to map at: pages that are not mapped now.
        for i in 0..20 {
            let frame = world.mfn(FREE_PAGE + i);
            let entry = GrantEntryV1 { flags: 1, domid: DomId::ZERO, frame: frame as u32 };
            world.put(window + (8 + i) * 8, &entry);
            assert_eq!(world.call(Hypercall::UpdateVaMapping, &[(FREE_PAGE + 60 + i) << 12, 0, 0]), 0);
        }
        let at = |i: u64| (FREE_PAGE + 60 + i) << 12;
        let maps: Vec<_> = (0..20)
            .map(|i| GnttabMapGrantRef {
                host_addr: at(i),
                flags: 2,
                gref: GrantRef::new(8 + i as u32),
                dom: DomId::ZERO,
                status: 77,
                handle: 0,
                dev_bus_addr: MachAddr::new(0),
            })
            .collect();
        world.put(LIST, maps.as_slice());
        let mapped = world.call(Hypercall::GrantTableOp, &[GnttabOp::MapGrantRef as u64, LIST, 20]);
        let mut results = Vec::from([mapped]);
        let mut unmaps = Vec::new();
        for i in 0..20 {
            // dom, status and handle.
            let word = world.get(LIST + i * 32 + 16);
            results.push(i64::from((word >> 16) as i16));
            let handle = (word >> 32) as u32;
            unmaps.push(GnttabUnmapGrantRef { host_addr: at(i), handle, ..Default::default() });
        }
        world.put(LIST, unmaps.as_slice());
        results.push(world.call(Hypercall::GrantTableOp, &[GnttabOp::UnmapGrantRef as u64, LIST, 20]));
        results
    });
    assert!(stops > 5, "stopped {stops} times");
}

#[test]
fn making_and_destroying_a_domain() {
    let stops = same_end(|world| {
        let before = world.state();
        let create = CreateDomain { max_vcpus: 2, max_pages: 100, ..CreateDomain::default() };
        world.put(ARGS, &ControlOp::new(DomId::new(5), &create));
        let created = world.call(Hypercall::Domctl, &[ARGS]);
        let reservation = MemoryReservation {
            extent_start: GuestHandle::new(LIST),
            nr_extents: 64,
            domid: DomId::new(5),
            ..Default::default()
        };
        world.put(LIST, (0..64).collect::<Vec<u64>>().as_slice());
        world.put(ARGS, &reservation);
        let populated = world.call(Hypercall::MemoryOp, &[MemoryOp::PopulatePhysmap as u64, ARGS]);
        world.put(ARGS, &ControlOp::new(DomId::new(5), &Destroy::default()));
        let destroyed = world.call(Hypercall::Domctl, &[ARGS]);
        assert!(world.state() == before, "every frame is back");
        Vec::from([created, populated, destroyed])
    });
    assert!(stops > 20, "stopped {stops} times");
}

/// Under a constant answer nothing happens, and a shutdown, whatever its reason, is a crash: of dom0, so the machine halts.
#[test]
#[should_panic(expected = "the simulated machine halts: Crash")]
fn a_constant_answer_is_all_there_is() {
    use hypercall_abi::constant_answers::{ENOSYS, NUMBER, ZERO};
    use hypercall_abi::sched::ShutdownReason;

    fn raw(world: &mut World, number: u64, args: &[u64]) -> u64 {
        let regs = &mut world.cpu.current.as_mut().unwrap().state.regs;
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        regs.set_args(all);
        (regs.rax, regs.vector) = (number, ENTRY_SYSCALL);
        world.hv.on_syscall(&mut world.cpu);
        world.cpu.current.as_ref().unwrap().state.regs.rax
    }
    let mut world = World::new(1000);
    let port = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, port: Default::default() };
    world.put(ARGS, &port);
    let alloc = [u64::from(EvtchnOp::AllocUnbound.number()), ARGS];
    let before = world.state();
    for answer in [ZERO, ENOSYS] {
        assert_eq!(raw(&mut world, NUMBER, &[1, answer, 0]), 0);
        for number in 0..64 {
            if number != Hypercall::Iret.number() && number != Hypercall::SchedOp.number() {
                assert_eq!(raw(&mut world, number, &alloc), answer, "hypercall {number}");
            }
        }
        assert_eq!(raw(&mut world, NUMBER, &[0, 0, 0]), 0);
        assert_eq!(world.state(), before);
    }
    assert_eq!(raw(&mut world, Hypercall::EventChannelOp.number(), &alloc), 0);
    assert_ne!(world.state(), before, "it does its work again");

    raw(&mut world, NUMBER, &[1, ZERO, 0]);
    let reason = ShutdownReason::Poweroff as u32;
    world.put(ARGS, &reason);
    raw(&mut world, Hypercall::SchedOp.number(), &[2, ARGS]);
}

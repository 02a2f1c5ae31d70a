//! Grants on the simulated machine: guests with real page tables, each operation and its errors, random sequences against a
//! model.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use hypercall_abi::grant::*;
use hypercall_abi::subops::GnttabOp;
use hypercall_abi::{DomId, Errno, GrantRef, GuestHandle, Mfn, VcpuId};
use proptest::prelude::*;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::entry::{self, Entry};
use super::table::{Pins, Version};
use super::{Copier, Error, Frames, VersionRefused};
use crate::access::Rights;
use crate::domain::{Current, Domain, Life, VcpuRef, VcpuState};
use crate::evtchn::tests::{add_domain, hypervisor};
use crate::hypercall::grant_table_op::grant_table_op;
use crate::hypercall::{Budget, Exit};
use crate::hypervisor::Hypervisor;
use crate::mm::{Level, Owner, TlbDebt};
use crate::platform::Platform;
use crate::platform::sim::SimMachine;

type Hv = Hypervisor<SimMachine>;

pub(crate) const DATA: usize = 6;
/// Index of the first entry of a guest's L1 table that maps nothing.
const FREE_SLOT: usize = 256;

/// A domain with a page-table tree: data page `i` is mapped writable at virtual page `i`.
pub(crate) struct Guest {
    pub(crate) domain: Arc<Domain>,
    root: Mfn,
    l1: Mfn,
    data: Vec<Mfn>,
}

impl Guest {
    pub(crate) fn new(hv: &Hv, id: u16) -> Guest {
        let domain = add_domain(hv, id, 1, Rights::none());
        let mut frames: Vec<Mfn> = (0..4 + DATA)
            .map(|_| hv.give_frames(&domain, 0, u64::MAX).expect("the test has memory"))
            .collect();
        let data = frames.split_off(4);
        let put = |table: Mfn, index: usize, to: Mfn| {
            hv.platform.frame(table)[index].store(to.get() << 12 | 7, Ordering::SeqCst);
        };
        for pair in frames.windows(2) {
            put(pair[0], 0, pair[1]);
        }
        for (i, mfn) in data.iter().enumerate() {
            put(frames[3], i, *mfn);
        }
        hv.pager().pin(frames[0], Level::L4, domain.id, hv, &mut Budget::unlimited()).unwrap();
        assert!(hv.grow_grant_table(&domain, 1, &mut Budget::unlimited()) == Some(Ok(())));
        Guest { domain, root: frames[0], l1: frames[3], data }
    }

    fn id(&self) -> DomId {
        self.domain.id
    }

    pub(crate) fn current(&self, hv: &Hv, budget: u32) -> Current {
        hv.platform.load_root(self.root);
        let mut state = Box::new(VcpuState::new(&hv.platform));
        state.kernel_root = Some(self.root);
        state.budget = Budget::new(budget);
        Current { vcpu: VcpuRef::new(&self.domain, VcpuId::new(0)).unwrap(), state }
    }

    /// What the guest sees and writes in its shared table: flags and domain, and the frame.
    fn entry(&self, hv: &Hv, gref: u32) -> (u64, u64) {
        self.domain.grants.lock().shared(&hv.platform, GrantRef::new(gref)).unwrap().load()
    }
    fn set_entry(&self, hv: &Hv, gref: u32, header: u64, frame: u64) {
        let table = self.domain.grants.lock();
        table.shared(&hv.platform, GrantRef::new(gref)).unwrap().store(header, frame);
    }
    fn permit(&self, hv: &Hv, gref: u32, frame: Mfn, peer: DomId, readonly: bool) {
        let (header, frame) = entry::permit(frame, peer, readonly).unwrap();
        self.set_entry(hv, gref, header, frame);
    }
    fn marks(&self, hv: &Hv, gref: u32) -> GrantFlags {
        let table = self.domain.grants.lock();
        let flags = match table.shared(&hv.platform, GrantRef::new(gref)).unwrap() {
            entry @ Entry::V1(_) => GrantFlags::from_bits_retain(entry.load().0 as u16),
            Entry::V2 { status, .. } => status.get(),
        };
        flags & (GrantFlags::READING | GrantFlags::WRITING)
    }
    fn set_version(&self, hv: &Hv, version: Version) {
        let result = hv.set_grant_version(&self.domain, version, &mut Budget::unlimited());
        assert_eq!(result, Ok(Ok(())));
    }
    fn copy(&self, hv: &Hv, op: &GnttabCopy) -> Result<(), Error> {
        Copier::new(hv, &self.domain).copy(op)
    }
    fn pte(&self, hv: &Hv, slot: usize) -> u64 {
        hv.platform.frame(self.l1)[slot].load(Ordering::SeqCst)
    }
    fn word(&self, hv: &Hv, page: usize, index: usize) -> u64 {
        hv.platform.frame(self.data[page])[index].load(Ordering::SeqCst)
    }
    fn set_word(&self, hv: &Hv, page: usize, index: usize, value: u64) {
        hv.platform.frame(self.data[page])[index].store(value, Ordering::SeqCst);
    }

    /// A hypercall on a list in the guest's last data page, restarted as often as it is preempted.
    fn call<T: IntoBytes + FromBytes + Immutable>(
        &self,
        hv: &Hv,
        cmd: GnttabOp,
        list: &mut [T],
        budget: u32,
    ) -> Result<u64, Errno> {
        let at = (DATA as u64 - 1) << 12;
        let mut current = self.current(hv, budget);
        for (i, item) in list.iter().enumerate() {
            hv.write_guest_item(at, i as u64, item).unwrap();
        }
        let mut args = [u64::from(cmd.number()), at, list.len() as u64, 0, 0, 0];
        let result = loop {
            match grant_table_op(hv, &mut current, args) {
                Ok(value) => break Ok(value),
                Err(Exit::Preempted(again)) => {
                    let counts_on =
                        !matches!(cmd, GnttabOp::SetupTable | GnttabOp::SetVersion | GnttabOp::CacheFlush);
                    assert!(!counts_on || again[2] < args[2], "no progress");
                    args = again;
                    current.state.budget = Budget::new(budget);
                }
                Err(Exit::Errno(errno)) => break Err(errno),
                Err(exit) => panic!("{exit:?}"),
            }
        };
        for (i, item) in list.iter_mut().enumerate() {
            *item = hv.read_guest_item(at, i as u64).unwrap();
        }
        result
    }

    fn map_op(&self, granter: &Guest, gref: u32, flags: MapFlags, slot: usize) -> GnttabMapGrantRef {
        let host_addr = if flags.contains(MapFlags::CONTAINS_PTE) {
            self.l1.get() << 12 | (slot as u64) << 3
        } else {
            (slot as u64) << 12
        };
        GnttabMapGrantRef {
            host_addr,
            flags: flags.bits(),
            gref: GrantRef::new(gref),
            dom: granter.id(),
            ..Default::default()
        }
    }

    fn map(&self, hv: &Hv, granter: &Guest, gref: u32, flags: MapFlags, slot: usize) -> Result<u32, Error> {
        let op = self.map_op(granter, gref, flags, slot);
        hv.grant_map(&self.domain, &op, Some(self.root)).map(|(handle, _)| handle)
    }

    fn unmap(&self, hv: &Hv, handle: u32, host: Option<u64>, device: Option<u64>) -> Result<bool, Error> {
        let host = host.map(|address| (address, Some(self.root)));
        match hv.grant_unmap(&self.domain, handle, host, device, None)? {
            Some(unmapping) => {
                hv.mm.settle(TlbDebt::everywhere(), &hv.platform);
                hv.grant_unmap_complete(unmapping);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// `unmap_and_replace`.
    fn replace(&self, hv: &Hv, handle: u32, host: u64, from: u64) -> Result<bool, Error> {
        let result = hv.grant_unmap(&self.domain, handle, Some((host, Some(self.root))), None, Some(from));
        hv.mm.settle(TlbDebt::everywhere(), &hv.platform);
        Ok(result?.map(|unmapping| hv.grant_unmap_complete(unmapping)).is_some())
    }

    /// What a mapping at free slot `slot` is called.
    fn host_address(&self, slot: usize, pte: bool) -> u64 {
        let slot = (FREE_SLOT + slot) as u64;
        if pte { self.l1.get() << 12 | slot << 3 } else { slot << 12 }
    }

    /// Takes the domain down as the lifecycle does, as far as memory is concerned.
    fn destroy(&self, hv: &Hv, budget: u32) {
        self.domain.set_life(Life::Dying);
        while hv.tear_down_grants(&self.domain, &mut Budget::new(budget)).is_err() {}
        while hv.teardown_memory(&self.domain, &mut Budget::new(budget)).is_err() {}
        hv.mm.release_hypervisor_page(self.domain.shared_info);
        while hv.drain_quarantine() {}
    }
}

fn two_guests() -> (Hv, Guest, Guest) {
    let hv = hypervisor(128);
    let granter = Guest::new(&hv, 3);
    let user = Guest::new(&hv, 1);
    (hv, granter, user)
}

const RW: MapFlags = MapFlags::HOST_MAP;
const RO: MapFlags = MapFlags::HOST_MAP.union(MapFlags::READONLY);

#[test]
fn a_frame_is_mapped_used_and_given_back() {
    let (hv, granter, user) = two_guests();
    let frame = granter.data[0];
    let before = (hv.mm.general_count(frame), hv.mm.type_word(frame).unwrap().count());
    granter.permit(&hv, 9, frame, user.id(), false);
    let mut list = [user.map_op(&granter, 9, RW, FREE_SLOT)];
    assert_eq!(user.call(&hv, GnttabOp::MapGrantRef, &mut list, 64), Ok(0));
    assert_eq!((list[0].status, list[0].dev_bus_addr.get()), (GNTST_OKAY, frame.get() << 12));
    assert_eq!(user.pte(&hv, FREE_SLOT) >> 12 & 0xff_ffff_ffff, frame.get());
    assert_eq!(user.pte(&hv, FREE_SLOT) & 3, 3);
    assert_eq!(granter.marks(&hv, 9), GrantFlags::READING | GrantFlags::WRITING);
    // One reference of the page-table entry, one of the active entry.
    assert_eq!(hv.mm.general_count(frame), before.0 + 2);
    assert_eq!(hv.mm.type_word(frame).unwrap().count(), before.1 + 1);
    hv.write_guest((FREE_SLOT as u64) << 12, &0xabcd_u64).unwrap();
    assert_eq!(granter.word(&hv, 0, 0), 0xabcd);

    hv.platform.flushes.lock().clear();
    let handle = list[0].handle;
    let address = (FREE_SLOT as u64) << 12;
    let mut list = [GnttabUnmapGrantRef { host_addr: address, handle, ..Default::default() }];
    assert_eq!(user.call(&hv, GnttabOp::UnmapGrantRef, &mut list, 64), Ok(0));
    assert_eq!(list[0].status, GNTST_OKAY);
    assert_eq!(user.pte(&hv, FREE_SLOT), 0);
    assert!(!hv.platform.flushes.lock().is_empty(), "an unmapping flushes");
    assert_eq!(granter.marks(&hv, 9), GrantFlags::empty());
    assert_eq!((hv.mm.general_count(frame), hv.mm.type_word(frame).unwrap().count()), before);
    assert_eq!(user.call(&hv, GnttabOp::UnmapGrantRef, &mut list, 64), Ok(0));
    assert_eq!(list[0].status, GNTST_BAD_HANDLE);
}

#[test]
fn the_granter_sees_an_entry_in_use_until_the_flush() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 1, granter.data[0], user.id(), false);
    let handle = user.map(&hv, &granter, 1, RW, FREE_SLOT).unwrap();
    let host = Some(((FREE_SLOT as u64) << 12, Some(user.root)));
    let unmapping = hv.grant_unmap(&user.domain, handle, host, None, None).unwrap().unwrap();
    assert_eq!(user.pte(&hv, FREE_SLOT), 0);
    assert_eq!(granter.marks(&hv, 1), GrantFlags::READING | GrantFlags::WRITING);
    assert_eq!(user.map(&hv, &granter, 2, RW, FREE_SLOT), Err(Error::Refused));
    hv.grant_unmap_complete(unmapping);
    assert_eq!(granter.marks(&hv, 1), GrantFlags::empty());
}

#[test]
fn what_is_not_granted_is_not_mapped() {
    let (hv, granter, user) = two_guests();
    let data = granter.data[0];
    let stranger = Guest::new(&hv, 7);
    granter.permit(&hv, 0, data, user.id(), false);
    granter.permit(&hv, 1, data, user.id(), true);
    granter.permit(&hv, 2, data, stranger.id(), false);
    granter.permit(&hv, 3, user.data[0], user.id(), false);
    granter.permit(&hv, 4, Mfn::new(0xffff_ffff), user.id(), false);
    granter.permit(&hv, 5, granter.l1, user.id(), false);
    let free = hv.mm.free_frames();
    for (gref, flags, expected) in [
        (0, MapFlags::READONLY, Error::BadReference),
        (512, RW, Error::BadReference),
        (u32::MAX, RW, Error::BadReference),
        (1, RW, Error::Refused),
        (2, RW, Error::Refused),
        (3, RW, Error::BadPage),
        (4, RW, Error::BadPage),
        (5, RW, Error::Refused),
        (5, MapFlags::DEVICE_MAP, Error::Refused),
        (6, RO, Error::Refused),
    ] {
        assert_eq!(user.map(&hv, &granter, gref, flags, FREE_SLOT), Err(expected), "entry {gref} {flags:?}");
        assert_eq!(user.pte(&hv, FREE_SLOT), 0);
        if gref < 512 {
            assert_eq!(granter.marks(&hv, gref), GrantFlags::empty(), "entry {gref}");
        }
    }
    // The page tables of a granter can be looked at, but not written.
    assert!(user.map(&hv, &granter, 5, RO, FREE_SLOT).is_ok());
    assert_eq!(granter.domain.grants.lock().used(), 1);
    assert!(hv.mm.free_frames() >= free - 2, "only the table of handles was added");

    let mut op = user.map_op(&granter, 0, RW, FREE_SLOT + 1);
    for dom in [DomId::SELF, DomId::new(99), DomId::IO] {
        op.dom = dom;
        assert_eq!(hv.grant_map(&user.domain, &op, Some(user.root)).map(|_| ()), Err(Error::BadDomain));
    }
    op.dom = granter.id();
    for address in [0xffff_8300_0000_0000, 0x8000_0000_0000, 1 << 30] {
        op.host_addr = address;
        assert_eq!(hv.grant_map(&user.domain, &op, Some(user.root)).map(|_| ()), Err(Error::Refused));
    }
    op.flags = (RW | MapFlags::CONTAINS_PTE).bits();
    for address in [user.l1.get() << 12 | 4, user.data[0].get() << 12, granter.l1.get() << 12, u64::MAX - 7] {
        op.host_addr = address;
        assert_eq!(
            hv.grant_map(&user.domain, &op, Some(user.root)).map(|_| ()),
            Err(Error::Refused),
            "{address:#x}"
        );
    }
    assert_eq!(granter.marks(&hv, 0), GrantFlags::empty());
    op.host_addr = user.l1.get() << 12 | (FREE_SLOT as u64 + 1) << 3;
    assert!(hv.grant_map(&user.domain, &op, None).is_ok());
}

#[test]
fn an_entry_in_use_is_what_it_was_when_mapped() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 0, granter.data[0], user.id(), false);
    let first = user.map(&hv, &granter, 0, RO, FREE_SLOT).unwrap();
    // The guest changes frame and domain behind our back.
    granter.permit(&hv, 0, granter.data[1], DomId::new(77), false);
    let second = user.map(&hv, &granter, 0, RO, FREE_SLOT + 1).unwrap();
    assert_eq!(user.pte(&hv, FREE_SLOT + 1) >> 12 & 0xff_ffff, granter.data[0].get());
    assert_eq!(granter.map(&hv, &granter, 0, RO, FREE_SLOT), Err(Error::Refused), "in use by another");
    for (handle, slot) in [(first, FREE_SLOT), (second, FREE_SLOT + 1)] {
        assert_eq!(user.unmap(&hv, handle, Some((slot as u64) << 12), None), Ok(true));
    }
    assert_eq!(user.map(&hv, &granter, 0, RO, FREE_SLOT), Err(Error::Refused), "the new entry is another's");
}

#[test]
fn device_and_host_mappings_end_one_by_one() {
    let (hv, granter, user) = two_guests();
    let frame = granter.data[2];
    let before = (hv.mm.general_count(frame), hv.mm.type_word(frame).unwrap().count());
    granter.permit(&hv, 0, frame, user.id(), false);
    let handle = user.map(&hv, &granter, 0, RW | MapFlags::DEVICE_MAP, FREE_SLOT).unwrap();
    assert_eq!(hv.mm.type_word(frame).unwrap().count(), before.1 + 2);
    let bus = frame.get() << 12;
    assert_eq!(user.unmap(&hv, handle, None, Some(bus + 4096)), Err(Error::BadDeviceAddress));
    assert_eq!(user.unmap(&hv, handle, None, None), Ok(false));
    assert_eq!(user.unmap(&hv, handle, Some(0x1000), None), Err(Error::Refused), "another page");
    assert_eq!(user.unmap(&hv, handle, None, Some(bus)), Ok(true));
    assert_eq!(granter.marks(&hv, 0), GrantFlags::READING | GrantFlags::WRITING);
    assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), Some(bus)), Ok(true));
    assert_eq!(granter.marks(&hv, 0), GrantFlags::empty());
    assert_eq!((hv.mm.general_count(frame), hv.mm.type_word(frame).unwrap().count()), before);
    assert_eq!(user.unmap(&hv, handle, None, Some(bus)), Err(Error::BadHandle));
}

#[test]
fn an_entry_overwritten_by_other_means_keeps_the_grant_in_use() {
    let (hv, granter, user) = two_guests();
    let frame = granter.data[0];
    granter.permit(&hv, 0, frame, user.id(), false);
    let handle = user.map(&hv, &granter, 0, RW, FREE_SLOT).unwrap();
    let table = hv.mm.get_page(user.l1, user.id()).unwrap();
    hv.pager()
        .update_l1(&table, FREE_SLOT, crate::mm::Pte::EMPTY, crate::mm::Store::Plain, user.id(), &hv)
        .unwrap();
    drop(table);
    assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), None), Err(Error::Refused));
    assert_eq!(granter.marks(&hv, 0), GrantFlags::READING | GrantFlags::WRITING);
    assert_eq!(hv.mm.general_count(frame), 3, "allocation, the granter's own mapping, the active entry");
    user.destroy(&hv, 5);
    assert_eq!(granter.marks(&hv, 0), GrantFlags::empty());
    assert_eq!(hv.mm.general_count(frame), 2);
}

fn copy_op(source: GnttabCopyPtr, dest: GnttabCopyPtr, len: u16, flags: u16) -> GnttabCopy {
    GnttabCopy { source, dest, len, flags, ..Default::default() }
}

#[test]
fn copies_go_between_all_sorts_of_sides() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 0, granter.data[0], user.id(), true);
    granter.permit(&hv, 1, granter.data[1], user.id(), false);
    granter.set_word(&hv, 0, 2, 0x1111_2222_3333_4444);
    let granted = |gref, offset| GnttabCopyPtr::granted(GrantRef::new(gref), granter.id(), offset);
    let own = |page: usize, offset| GnttabCopyPtr::own(user.data[page], offset);
    let (from, to) = (GNTCOPY_SOURCE_GREF, GNTCOPY_DEST_GREF);
    let mut list = [
        copy_op(granted(0, 16), own(0, 3), 8, from),
        copy_op(own(0, 3), own(1, 0), 4, 0),
        copy_op(own(1, 0), granted(1, 8), 4, to),
        copy_op(granted(0, 16), granted(1, 16), 8, from | to),
        copy_op(granted(0, 0), own(2, 0), 4096, from),
    ];
    assert_eq!(user.call(&hv, GnttabOp::Copy, &mut list, 1), Ok(0));
    assert!(list.iter().all(|op| op.status == GNTST_OKAY), "{list:?}");
    assert_eq!(user.word(&hv, 0, 0), 0x1111_2222_3333_4444 << 24);
    assert_eq!(user.word(&hv, 1, 0), 0x3333_4444);
    assert_eq!(granter.word(&hv, 1, 1), 0x3333_4444);
    assert_eq!(granter.word(&hv, 1, 2), 0x1111_2222_3333_4444);
    assert_eq!(user.word(&hv, 2, 2), 0x1111_2222_3333_4444);
    assert_eq!(granter.marks(&hv, 0) | granter.marks(&hv, 1), GrantFlags::empty());
    assert_eq!(granter.domain.grants.lock().used(), 0);
}

#[test]
fn copies_that_may_not_be_are_refused() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 0, granter.data[0], user.id(), true);
    granter.permit(&hv, 1, granter.l1, user.id(), false);
    let granted = |gref, offset| GnttabCopyPtr::granted(GrantRef::new(gref), granter.id(), offset);
    let own = |offset| GnttabCopyPtr::own(user.data[0], offset);
    let (from, to) = (GNTCOPY_SOURCE_GREF, GNTCOPY_DEST_GREF);
    let foreign = GnttabCopyPtr { domid: granter.id(), ..GnttabCopyPtr::own(granter.data[0], 0) };
    let nobody = GnttabCopyPtr { domid: DomId::new(50), ..granted(0, 0) };
    let before = granter.word(&hv, 0, 0);
    for (op, expected) in [
        (copy_op(granted(0, 0), own(4090), 8, from), GNTST_BAD_COPY_ARG),
        (copy_op(granted(0, 4095), own(0), 2, from), GNTST_BAD_COPY_ARG),
        (copy_op(granted(0, 65535), own(0), 65535, from), GNTST_BAD_COPY_ARG),
        (copy_op(own(0), granted(0, 0), 8, to), GNTST_GENERAL_ERROR),
        (copy_op(own(0), granted(1, 0), 8, to), GNTST_GENERAL_ERROR),
        (copy_op(own(0), granted(600, 0), 8, to), GNTST_BAD_GNTREF),
        (copy_op(foreign, own(0), 8, 0), GNTST_PERMISSION_DENIED),
        (copy_op(own(0), foreign, 8, 0), GNTST_PERMISSION_DENIED),
        (copy_op(nobody, own(0), 8, from), GNTST_BAD_DOMAIN),
        (copy_op(GnttabCopyPtr::own(granter.data[0], 0), own(0), 8, 0), GNTST_BAD_PAGE),
        (copy_op(own(0), GnttabCopyPtr::own(user.l1, 0), 8, 0), GNTST_GENERAL_ERROR),
    ] {
        let mut list = [op];
        assert_eq!(user.call(&hv, GnttabOp::Copy, &mut list, 64), Ok(0));
        assert_eq!(list[0].status, expected, "{op:?}");
        assert_eq!(granter.domain.grants.lock().used(), 0);
        assert_eq!(granter.word(&hv, 0, 0), before);
    }
}

#[test]
fn tables_grow_are_listed_and_limited() {
    let (hv, granter, user) = two_guests();
    let mut size = [GnttabQuerySize { dom: DomId::SELF, ..Default::default() }];
    assert_eq!(user.call(&hv, GnttabOp::QuerySize, &mut size, 64), Ok(0));
    assert_eq!((size[0].nr_frames, size[0].max_nr_frames, size[0].status), (1, 64, GNTST_OKAY));
    let mut setup = [GnttabSetupTable {
        dom: DomId::SELF,
        nr_frames: 3,
        frame_list: GuestHandle::new(0x2000),
        ..Default::default()
    }];
    assert_eq!(user.call(&hv, GnttabOp::SetupTable, &mut setup, 1), Ok(0));
    assert_eq!(setup[0].status, GNTST_OKAY);
    for i in 0..3 {
        let listed = Mfn::new(user.word(&hv, 2, i));
        assert_eq!(user.domain.grants.lock().shared_frame(&hv.platform, i as u32), Some(listed));
        assert!(hv.mm.get_page(listed, user.id()).is_some(), "the guest may map it");
    }
    for (nr_frames, dom, list, expected) in [
        (65, DomId::SELF, 0x2000, GNTST_GENERAL_ERROR),
        (1, granter.id(), 0x2000, GNTST_PERMISSION_DENIED),
        (1, DomId::new(40), 0x2000, GNTST_BAD_DOMAIN),
        (1, DomId::SELF, 0xdead_0000, GNTST_BAD_VIRT_ADDR),
    ] {
        setup[0] =
            GnttabSetupTable { dom, nr_frames, frame_list: GuestHandle::new(list), ..Default::default() };
        assert_eq!(user.call(&hv, GnttabOp::SetupTable, &mut setup, 64), Ok(0));
        assert_eq!(setup[0].status, expected);
    }
    let mut version = [GnttabSetVersion { version: 3 }];
    assert_eq!(user.call(&hv, GnttabOp::SetVersion, &mut version, 64), Err(Errno::EINVAL));
    assert_eq!(version[0].version, 1);
    assert_eq!(user.call(&hv, GnttabOp::SetVersion, &mut version, 64), Ok(0));
    let mut get = [GnttabGetVersion { dom: granter.id(), ..Default::default() }];
    assert_eq!(user.call(&hv, GnttabOp::GetVersion, &mut get, 64), Err(Errno::EPERM));
    get[0].dom = DomId::SELF;
    assert_eq!(user.call(&hv, GnttabOp::GetVersion, &mut get, 64), Ok(0));
    assert_eq!(get[0].version, 1);
    let mut current = user.current(&hv, 64);
    for (args, errno) in [
        ([0, 0x5000, 1 << 31, 0, 0, 0], Errno::EINVAL),
        ([1 << 12, 0x5000, 0, 0, 0, 0], Errno::EINVAL),
        ([99, 0x5000, 0, 0, 0, 0], Errno::ENOSYS),
        ([0, 0xdead_0000, 1, 0, 0, 0], Errno::EFAULT),
        ([5, u64::MAX - 3, 1, 0, 0, 0], Errno::EFAULT),
        ([2, 0x5000, 2, 0, 0, 0], Errno::EINVAL),
    ] {
        assert_eq!(grant_table_op(&hv, &mut current, args), Err(Exit::Errno(errno)), "{args:x?}");
    }
    assert_eq!(grant_table_op(&hv, &mut current, [0, 0xdead_0000, 0, 0, 0, 0]), Ok(0), "an empty list");
}

#[test]
fn unused_entries_swap() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 20, granter.data[0], user.id(), false);
    let entry = granter.entry(&hv, 20);
    let swap = |a, b| {
        [GnttabSwapGrantRef { ref_a: GrantRef::new(a), ref_b: GrantRef::new(b), ..Default::default() }]
    };
    let mut list = swap(20, 21);
    assert_eq!(granter.call(&hv, GnttabOp::SwapGrantRef, &mut list, 64), Ok(0));
    assert_eq!((list[0].status, granter.entry(&hv, 20), granter.entry(&hv, 21)), (GNTST_OKAY, (0, 0), entry));
    user.map(&hv, &granter, 21, RO, FREE_SLOT).unwrap();
    for (mut list, expected) in
        [(swap(20, 21), GNTST_EAGAIN), (swap(20, 512), GNTST_BAD_GNTREF), (swap(21, 21), GNTST_OKAY)]
    {
        granter.call(&hv, GnttabOp::SwapGrantRef, &mut list, 64).unwrap();
        assert_eq!(list[0].status, expected);
    }
}

#[test]
fn seeds_are_for_reserved_entries_not_in_use() {
    let (hv, granter, user) = two_guests();
    let data = granter.data[0];
    hv.grant_seed(&granter.domain, GrantRef::new(1), data, user.id(), false).unwrap();
    assert_eq!(
        hv.grant_seed(&granter.domain, GrantRef::new(8), data, user.id(), false),
        Err(Error::BadReference)
    );
    user.map(&hv, &granter, 1, RW, FREE_SLOT).unwrap();
    assert_eq!(hv.grant_seed(&granter.domain, GrantRef::new(1), data, user.id(), false), Err(Error::InUse));
}

#[test]
fn lists_in_steps_end_as_without_limit() {
    for budget in [1, 2, 7, 1000] {
        let (hv, granter, user) = two_guests();
        let mut maps: Vec<_> = (0..40)
            .map(|i| {
                granter.permit(&hv, i, granter.data[i as usize % 3], user.id(), false);
                user.map_op(&granter, i, RW, FREE_SLOT + i as usize)
            })
            .collect();
        assert_eq!(user.call(&hv, GnttabOp::MapGrantRef, &mut maps, budget), Ok(0));
        assert!(maps.iter().all(|op| op.status == GNTST_OKAY));
        assert_eq!(user.domain.grants.lock().mappings(), 40);
        let mut unmaps: Vec<_> = maps
            .iter()
            .map(|op| GnttabUnmapGrantRef {
                host_addr: op.host_addr,
                handle: op.handle,
                ..Default::default()
            })
            .collect();
        assert_eq!(user.call(&hv, GnttabOp::UnmapGrantRef, &mut unmaps, budget), Ok(0));
        assert!(unmaps.iter().all(|op| op.status == GNTST_OKAY));
        assert_eq!(user.domain.grants.lock().mappings(), 0);
        assert_eq!(granter.domain.grants.lock().used(), 0);
    }
}

#[test]
fn either_side_may_die_first() {
    for granter_first in [true, false] {
        let hv = hypervisor(128);
        let free = hv.mm.free_frames();
        let (granter, user) = (Guest::new(&hv, 3), Guest::new(&hv, 1));
        granter.permit(&hv, 0, granter.data[0], user.id(), false);
        granter.permit(&hv, 1, granter.data[1], user.id(), false);
        let handle = user.map(&hv, &granter, 0, RW | MapFlags::DEVICE_MAP, FREE_SLOT).unwrap();
        user.map(&hv, &granter, 1, RO, FREE_SLOT + 1).unwrap();
        if granter_first {
            granter.destroy(&hv, 2);
            assert_ne!(granter.domain.pages.lock().total(), 0, "what is mapped is not free yet");
            assert_eq!(user.map(&hv, &granter, 0, RO, FREE_SLOT + 2), Err(Error::BadDomain));
            assert_eq!(
                user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), Some(granter.data[0].get() << 12)),
                Ok(true)
            );
            user.destroy(&hv, 2);
        } else {
            user.destroy(&hv, 2);
            assert_eq!(granter.marks(&hv, 0) | granter.marks(&hv, 1), GrantFlags::empty());
            assert_eq!(granter.domain.grants.lock().used(), 0);
            granter.destroy(&hv, 2);
        }
        for guest in [granter, user] {
            assert_eq!(guest.domain.pages.lock().total(), 0);
        }
        assert_eq!(hv.mm.free_frames(), free, "granter first: {granter_first}");
    }
}

/// A domain's shared_info is not counted as its memory, and it can be granted all the same.
#[test]
fn a_domain_is_there_while_anything_it_granted_is_in_use() {
    for unmapped in [true, false] {
        let hv = hypervisor(128);
        let free = hv.mm.free_frames();
        let (granter, user) = (Guest::new(&hv, 3), Guest::new(&hv, 1));
        granter.permit(&hv, 0, granter.domain.shared_info, user.id(), false);
        let handle = user.map(&hv, &granter, 0, RW, FREE_SLOT).unwrap();
        let mut unlimited = Budget::unlimited();
        assert_eq!(hv.destroy_domain(&granter.domain, &mut unlimited), Ok(()));
        assert!(hv.domains.get(granter.id()).is_some(), "its number is still taken");
        if unmapped {
            assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), None), Ok(true));
        }
        let steps = (0..1000).take_while(|_| hv.destroy_domain(&user.domain, &mut Budget::new(2)).is_err());
        assert!(steps.count() < 1000, "teardown comes to an end");
        assert_eq!(hv.destroy_domain(&granter.domain, &mut unlimited), Ok(()));
        assert!(hv.domains.is_empty());
        assert_eq!(hv.mm.free_frames(), free, "unmapped first: {unmapped}");
    }
}

#[test]
fn a_vcpu_info_in_a_frame_of_the_hypervisor_goes_with_the_domain() {
    let hv = hypervisor(128);
    let free = hv.mm.free_frames();
    let guest = Guest::new(&hv, 3);
    let frame = guest.domain.grants.lock().shared_frame(&hv.platform, 0).unwrap();
    let vcpu = VcpuRef::new(&guest.domain, VcpuId::new(0)).unwrap();
    hv.register_vcpu_info(&vcpu, frame, 1024).unwrap();
    assert_eq!(hv.destroy_domain(&guest.domain, &mut Budget::unlimited()), Ok(()));
    assert!(hv.domains.is_empty());
    assert_eq!(hv.mm.free_frames(), free);
}

#[test]
fn counts_stop_before_they_overflow() {
    let mut pins = Pins::default();
    for _ in 0..128 {
        pins = pins.plus(Pins::HOST_READ).unwrap();
    }
    assert_eq!(pins.plus(Pins::HOST_READ), None);
    assert!(!pins.writes());
    assert!(pins.plus(Pins::DEVICE_WRITE).unwrap().writes());
    assert_eq!(pins.total(), 128);
}

// ── version 2, transfers, caches ──

fn get_version(hv: &Hv, guest: &Guest) -> u32 {
    let mut get = [GnttabGetVersion { dom: DomId::SELF, ..Default::default() }];
    assert_eq!(guest.call(hv, GnttabOp::GetVersion, &mut get, 64), Ok(0));
    get[0].version
}

#[test]
fn versions_change_in_steps_and_keep_the_reserved_entries() {
    for budget in [1, 3, 1000] {
        let (hv, granter, user) = two_guests();
        assert_eq!(hv.grow_grant_table(&granter.domain, 10, &mut Budget::unlimited()), Some(Ok(())));
        let free = hv.mm.free_frames();
        granter.permit(&hv, 1, granter.data[0], user.id(), false);
        granter.permit(&hv, 3000, granter.data[1], user.id(), false);
        let handle = user.map(&hv, &granter, 1, RW, FREE_SLOT).unwrap();
        let mut set = [GnttabSetVersion { version: 2 }];
        assert_eq!(granter.call(&hv, GnttabOp::SetVersion, &mut set, budget), Ok(0));
        assert_eq!((set[0].version, get_version(&hv, &granter)), (2, 2));
        assert_eq!(granter.domain.grants.lock().status_frames(), 2, "10 frames of 256 entries");
        assert_eq!(granter.entry(&hv, 1), (u64::from(user.id().get()) << 16 | 1, granter.data[0].get()));
        assert_eq!(granter.marks(&hv, 1), GrantFlags::READING | GrantFlags::WRITING);
        assert_eq!(granter.entry(&hv, 2559), (0, 0));
        assert_eq!(user.map(&hv, &granter, 2560, RW, FREE_SLOT + 1), Err(Error::BadReference));
        assert_eq!(user.map(&hv, &granter, 2559, RW, FREE_SLOT + 1), Err(Error::Refused));
        assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), None), Ok(true));
        assert_eq!(granter.marks(&hv, 1), GrantFlags::empty());
        set[0].version = 1;
        assert_eq!(granter.call(&hv, GnttabOp::SetVersion, &mut set, budget), Ok(0));
        assert_eq!(granter.entry(&hv, 1).1, granter.data[0].get());
        assert_eq!(granter.entry(&hv, 3000), (0, 0));
        assert!(user.map(&hv, &granter, 1, RW, FREE_SLOT).is_ok());
        assert!(hv.mm.free_frames() >= free - 2, "the status frames are back");
        granter.destroy(&hv, 5);
        user.destroy(&hv, 5);
    }
}

#[test]
fn status_frames_that_somebody_maps_keep_version_2() {
    let (hv, granter, user) = two_guests();
    granter.set_version(&hv, Version::V2);
    let status = granter.domain.grants.lock().status_frame(&hv.platform, 0).unwrap();
    let own = hv.mm.get_page(status, granter.id()).expect("the guest can map it");
    let refused = |guest: &Guest| {
        let mut set = [GnttabSetVersion { version: 1 }];
        assert_eq!(guest.call(&hv, GnttabOp::SetVersion, &mut set, 64), Err(Errno::EBUSY));
        assert_eq!(set[0].version, 2);
    };
    refused(&granter);
    // It may also grant it, as any frame of its own.
    granter.permit(&hv, 5, status, user.id(), true);
    let handle = user.map(&hv, &granter, 5, RO, FREE_SLOT).unwrap();
    drop(own);
    refused(&granter);
    assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), None), Ok(true));
    hv.platform.flushes.lock().clear();
    granter.set_version(&hv, Version::V1);
    assert!(hv.mm.get_page(status, granter.id()).is_none(), "nobody gets to it any more");
    assert!(hv.platform.flushes.lock().is_empty());
    while hv.drain_quarantine() {}
    assert!(!hv.platform.flushes.lock().is_empty(), "no translation is left when it is free");
    assert_eq!(hv.mm.owner(status), Owner::Nobody);
}

#[test]
fn a_change_that_was_decided_is_finished_by_whatever_comes_next() {
    let (hv, granter, user) = two_guests();
    assert_eq!(hv.grow_grant_table(&granter.domain, 4, &mut Budget::unlimited()), Some(Ok(())));
    granter.permit(&hv, 2, granter.data[0], user.id(), true);
    granter.permit(&hv, 100, granter.data[0], user.id(), true);
    // Stopped before the first frame, which would change the version.
    let mut stops = 0;
    while granter.domain.grants.lock().change.is_none_or(|change| change.clean_from > 1) {
        let stopped = hv.set_grant_version(&granter.domain, Version::V2, &mut Budget::new(1));
        assert_eq!(stopped, Ok(Err(crate::hypercall::Preempted)));
        stops += 1;
    }
    assert!(stops >= 3, "{stops}");
    assert_eq!(granter.domain.grants.lock().version(), Version::V1);
    assert_eq!(user.map(&hv, &granter, 100, RO, FREE_SLOT), Err(Error::Refused), "as good as gone");
    let handle = user.map(&hv, &granter, 2, RO, FREE_SLOT).unwrap();
    // The guest has changed its mind, and it had better not.
    granter.set_version(&hv, Version::V1);
    assert_eq!(granter.domain.grants.lock().version(), Version::V1);
    assert_eq!(granter.entry(&hv, 100), (0, 0));
    assert_eq!(granter.marks(&hv, 2), GrantFlags::READING);
    assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), None), Ok(true));
}

#[test]
fn a_domain_may_die_in_the_middle_of_a_change() {
    for (to, steps) in [(Version::V2, 1), (Version::V2, 3), (Version::V1, 1), (Version::V1, 2)] {
        let hv = hypervisor(128);
        let free = hv.mm.free_frames();
        let granter = Guest::new(&hv, 3);
        assert_eq!(hv.grow_grant_table(&granter.domain, 4, &mut Budget::unlimited()), Some(Ok(())));
        if to == Version::V1 {
            granter.set_version(&hv, Version::V2);
        }
        for _ in 0..steps {
            let stopped = hv.set_grant_version(&granter.domain, to, &mut Budget::new(1));
            assert_eq!(stopped, Ok(Err(crate::hypercall::Preempted)));
        }
        granter.destroy(&hv, 5);
        assert_eq!(hv.mm.free_frames(), free);
    }
}

#[test]
fn version_1_must_be_able_to_express_what_stays() {
    let (hv, granter, user) = two_guests();
    granter.set_version(&hv, Version::V2);
    let peer = u64::from(user.id().get()) << 16;
    let refused = |errno| {
        let mut set = [GnttabSetVersion { version: 1 }];
        assert_eq!(granter.call(&hv, GnttabOp::SetVersion, &mut set, 64), Err(errno));
        assert_eq!(set[0].version, 2);
    };
    granter.set_entry(&hv, 3, peer | 3, 0);
    refused(Errno::ERANGE);
    granter.set_entry(&hv, 3, peer | 1, 1 << 32);
    refused(Errno::ERANGE);
    granter.permit(&hv, 3, granter.data[0], user.id(), true);
    granter.permit(&hv, 8, granter.data[0], user.id(), true);
    let handle = user.map(&hv, &granter, 8, RO, FREE_SLOT).unwrap();
    refused(Errno::EBUSY);
    assert_eq!(user.unmap(&hv, handle, Some((FREE_SLOT as u64) << 12), None), Ok(true));
    // What waits for a transfer does not stay.
    granter.set_entry(&hv, 4, peer | 2, 7);
    granter.set_version(&hv, Version::V1);
    assert_eq!(granter.entry(&hv, 4), (0, 0));
    assert_eq!(granter.entry(&hv, 3).1, granter.data[0].get());
}

#[test]
fn copies_go_through_another_domains_entry_but_not_through_two() {
    let (hv, owner, user) = two_guests();
    let between = Guest::new(&hv, 8);
    owner.set_version(&hv, Version::V2);
    between.set_version(&hv, Version::V2);
    let header = |user: &Guest, kind: u64, place: u64| place << 32 | u64::from(user.id().get()) << 16 | kind;
    let through = |of: &Guest| u64::from(of.id().get());
    owner.set_word(&hv, 0, 1, 0x1234_5678);
    // Bytes 8 to 16 of the owner's page, for the one between, who lets the user have them.
    owner.set_entry(&hv, 10, header(&between, 0x101, 8 | 8 << 16), owner.data[0].get());
    between.set_entry(&hv, 20, header(&user, 3, through(&owner)), 10);
    let op = |gref, offset, len| {
        let source = GnttabCopyPtr::granted(GrantRef::new(gref), between.id(), offset);
        copy_op(source, GnttabCopyPtr::own(user.data[0], 0), len, GNTCOPY_SOURCE_GREF)
    };
    assert_eq!(user.copy(&hv, &op(20, 8, 8)), Ok(()));
    assert_eq!(user.word(&hv, 0, 0), 0x1234_5678);
    for (offset, len) in [(8, 9), (7, 8), (0, 1), (16, 1)] {
        assert_eq!(user.copy(&hv, &op(20, offset, len)), Err(Error::Refused), "{offset} {len}");
    }
    // Both entries are in use while the copier keeps its sides.
    let mut copier = Copier::new(&hv, &user.domain);
    assert_eq!(copier.copy(&op(20, 8, 8)), Ok(()));
    assert_eq!((owner.marks(&hv, 10), between.marks(&hv, 20)), (GrantFlags::READING, GrantFlags::READING));
    assert_eq!(
        hv.set_grant_version(&between.domain, Version::V1, &mut Budget::unlimited()),
        Err(VersionRefused::InUse)
    );
    assert_eq!(user.map(&hv, &between, 20, RO, FREE_SLOT), Err(Error::Refused), "never mapped");
    drop(copier);
    assert_eq!((owner.marks(&hv, 10), between.marks(&hv, 20)), (GrantFlags::empty(), GrantFlags::empty()));
    // A reserved one that is copied by keeps version 2 in another way.
    between.set_entry(&hv, 2, header(&user, 3, through(&owner)), 10);
    let mut copier = Copier::new(&hv, &user.domain);
    assert_eq!(copier.copy(&op(2, 8, 8)), Ok(()));
    assert_eq!(
        hv.set_grant_version(&between.domain, Version::V1, &mut Budget::unlimited()),
        Err(VersionRefused::CopyUnderWay)
    );
    drop(copier);
    // Two in a row, in a circle, or to oneself: no.
    owner.set_entry(&hv, 11, header(&between, 3, through(&between)), 20);
    between.set_entry(&hv, 21, header(&user, 3, through(&owner)), 11);
    between.set_entry(&hv, 22, header(&user, 3, through(&between)), 20);
    between.set_entry(&hv, 23, header(&user, 3, 777), 10);
    between.set_entry(&hv, 24, header(&user, 3, through(&owner)), 600);
    for (gref, expected) in
        [(21, Error::Refused), (22, Error::Refused), (23, Error::Refused), (24, Error::BadReference)]
    {
        assert_eq!(user.copy(&hv, &op(gref, 8, 8)), Err(expected), "entry {gref}");
    }
    assert_eq!(owner.domain.grants.lock().used(), 0);
    assert_eq!(between.domain.grants.lock().used(), 0);
}

#[test]
fn a_transferred_frame_is_in_no_tlb_before_it_is_the_receivers() {
    let (hv, receiver, giver) = two_guests();
    let frame = hv.give_frames(&giver.domain, 0, u64::MAX).unwrap();
    let totals = || [&giver, &receiver].map(|guest| guest.domain.pages.lock().total());
    let before = totals();
    hv.platform.frame(frame)[0].store(99, Ordering::SeqCst);
    let header = u64::from(giver.id().get()) << 16 | 2;
    receiver.set_entry(&hv, 9, header, 0x55);
    let op = |mfn, domid, gref| {
        [GnttabTransfer { mfn, domid, gref: GrantRef::new(gref), status: 77, ..Default::default() }]
    };
    hv.platform.flushes.lock().clear();
    let mut list = op(frame, receiver.id(), 9);
    assert_eq!(giver.call(&hv, GnttabOp::Transfer, &mut list, 64), Ok(0));
    assert_eq!(list[0].status, GNTST_OKAY);
    assert_eq!(hv.platform.flushes.lock().len(), 1);
    assert_eq!(receiver.entry(&hv, 9), (header | 0xc, frame.get()));
    assert_eq!((hv.mm.owner(frame), hv.mm.m2p().get(frame)), (Owner::Domain(receiver.id()), 0x55));
    assert_eq!(hv.platform.frame(frame)[0].load(Ordering::SeqCst), 99);
    let after = totals();
    assert_eq!(after, [before[0] - 1, before[1] + 1]);
    // What is mapped, a page of the hypervisor's, or another's stays where it is.
    for mfn in [giver.data[0], giver.domain.shared_info, frame, giver.l1, Mfn::new(1 << 40)] {
        let mut list = op(mfn, receiver.id(), 9);
        assert_eq!(giver.call(&hv, GnttabOp::Transfer, &mut list, 64), Ok(0));
        assert_eq!(list[0].status, GNTST_BAD_PAGE, "{mfn:?}");
    }
    // Any other failure loses the frame: nobody has it.
    receiver.domain.pages.lock().set_max_pages(after[1]);
    receiver.set_entry(&hv, 10, header, 0x56);
    for (domid, gref, expected) in [
        (DomId::new(700), 9, GNTST_BAD_DOMAIN),
        (DomId::SELF, 9, GNTST_BAD_DOMAIN),
        (receiver.id(), 9, GNTST_GENERAL_ERROR),
        (receiver.id(), 5000, GNTST_GENERAL_ERROR),
        (receiver.id(), 10, GNTST_GENERAL_ERROR),
    ] {
        let frame = hv.give_frames(&giver.domain, 0, u64::MAX).unwrap();
        let total = giver.domain.pages.lock().total();
        let mut list = op(frame, domid, gref);
        assert_eq!(giver.call(&hv, GnttabOp::Transfer, &mut list, 64), Ok(0));
        assert_eq!((list[0].status, hv.mm.owner(frame)), (expected, Owner::Nobody), "{domid:?} {gref}");
        assert_eq!(giver.domain.pages.lock().total(), total - 1);
        assert_eq!(receiver.domain.pages.lock().total(), after[1]);
    }
    assert_eq!(receiver.entry(&hv, 10), (header, 0x56), "not even committed");
}

#[test]
fn another_entry_moves_into_the_place_of_a_mapping() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 0, granter.data[0], user.id(), false);
    let address = |slot: usize| (slot as u64) << 12;
    let handle = user.map(&hv, &granter, 0, RW, FREE_SLOT).unwrap();
    let before = (hv.mm.general_count(user.data[1]), user.pte(&hv, 1));
    let mut list = [GnttabUnmapAndReplace {
        host_addr: address(FREE_SLOT),
        new_addr: address(1),
        handle,
        ..Default::default()
    }];
    assert_eq!(user.call(&hv, GnttabOp::UnmapAndReplace, &mut list, 64), Ok(0));
    assert_eq!(list[0].status, GNTST_OKAY);
    assert_eq!((user.pte(&hv, 1), user.pte(&hv, FREE_SLOT)), (0, before.1));
    assert_eq!(hv.mm.general_count(user.data[1]), before.0, "moved with its references");
    assert_eq!(granter.marks(&hv, 0), GrantFlags::empty());
    // XSA-234: a writable entry moved there does not pass as the mapping that was to be read only.
    granter.permit(&hv, 1, granter.data[1], user.id(), true);
    let handle = user.map(&hv, &granter, 1, RO, FREE_SLOT + 1).unwrap();
    user.map(&hv, &granter, 0, RW, FREE_SLOT + 1).unwrap();
    assert_eq!(user.unmap(&hv, handle, Some(address(FREE_SLOT + 1)), None), Err(Error::Refused));
    assert_eq!(granter.marks(&hv, 1), GrantFlags::READING);
}

#[test]
fn caches_are_flushed_for_frames_that_are_used() {
    let (hv, granter, user) = two_guests();
    granter.permit(&hv, 300, granter.data[0], user.id(), true);
    user.map(&hv, &granter, 300, RO, FREE_SLOT).unwrap();
    let op =
        |frame: Mfn, offset, length, op| GnttabCacheFlush { a: frame.get() << 12 | 8, offset, length, op };
    let flushed = || core::mem::take(&mut *hv.platform.cache_flushes.lock());
    let (own, granted, both) = (user.data[0], granter.data[0], GNTTAB_CACHE_CLEAN | GNTTAB_CACHE_INVAL);
    for budget in [1, 64] {
        let mut list = [
            op(own, 0, 4096, GNTTAB_CACHE_CLEAN),
            op(granted, 16, 32, both),
            op(own, 0, 0, both),
            op(own, 0, 8, 0),
        ];
        assert_eq!(user.call(&hv, GnttabOp::CacheFlush, &mut list, budget), Ok(0));
        assert_eq!(flushed(), [(own, 0, 4096), (granted, 16, 32)]);
    }
    let all = hv.mm.max_frame();
    for (op, errno) in [
        (op(own, 4096, 0, both), Errno::EINVAL),
        (op(own, 1, 4096, both), Errno::EINVAL),
        (op(own, 0, 8, 4), Errno::EINVAL),
        (op(own, 0, 8, both | GNTTAB_CACHE_SOURCE_GREF), Errno::EINVAL),
        (op(own, 0, 8, GNTTAB_CACHE_INVAL), Errno::EOPNOTSUPP),
        (op(Mfn::new(all), 0, 8, both), Errno::EINVAL),
        (op(granter.data[1], 0, 8, both), Errno::EINVAL),
        (op(Mfn::new(all - 1), 0, 8, both), Errno::EPERM),
    ] {
        assert_eq!(user.call(&hv, GnttabOp::CacheFlush, &mut [op], 64), Err(errno), "{op:?}");
    }
    let mut current = user.current(&hv, 64);
    let going_on = [12 | 1 << 12, (DATA as u64 - 1) << 12, 1, 0, 0, 0];
    hv.write_guest((DATA as u64 - 1) << 12, &op(own, 0, 0, 0)).unwrap();
    assert_eq!(grant_table_op(&hv, &mut current, going_on), Err(Exit::Errno(Errno::EILSEQ)));
    assert!(flushed().is_empty());
}

// ── random sequences against a model ──

const GUESTS: usize = 3;
const IDS: [u16; GUESTS] = [6, 2, 11];
/// Reserved entries, others, and one that version 2 does not have in a table of one frame.
const GREFS: [u32; 6] = [0, 1, 5, 8, 9, 300];
const SLOTS: usize = 5;
/// Frames of each guest at the start that nothing refers to.
const LOOSE: usize = 2;

#[derive(Clone, Debug)]
enum Op {
    /// The granter writes an entry.
    Write {
        granter: usize,
        gref: u32,
        frame: usize,
        of: usize,
        peer: usize,
        flags: u16,
        place: u32,
    },
    /// The granter writes an entry that stands for another.
    WriteThrough {
        granter: usize,
        gref: u32,
        peer: usize,
        to: usize,
        target: u32,
    },
    SetVersion {
        guest: usize,
        to: Version,
    },
    Map {
        user: usize,
        granter: usize,
        gref: u32,
        flags: MapFlags,
        slot: usize,
    },
    Unmap {
        user: usize,
        nth: usize,
        host: bool,
        device: bool,
    },
    Replace {
        user: usize,
        nth: usize,
        slot: usize,
    },
    Copy {
        user: usize,
        granter: usize,
        gref: u32,
        to_grant: bool,
    },
    Transfer {
        giver: usize,
        frame: usize,
        receiver: usize,
        gref: u32,
    },
    Die {
        guest: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let g = || 0..GUESTS;
    let gref = || prop::sample::select(&GREFS[..]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(host, device, readonly, pte)| {
            let mut flags = MapFlags::empty();
            flags.set(MapFlags::HOST_MAP, host);
            flags.set(MapFlags::DEVICE_MAP, device);
            flags.set(MapFlags::READONLY, readonly);
            flags.set(MapFlags::CONTAINS_PTE, pte);
            flags
        },
    );
    let entry_flags = prop_oneof![10 => Just(1u16), 4 => Just(5), 1 => Just(0), 6 => Just(2), 3 => Just(0x101), 2 => Just(0x19)];
    let place = prop_oneof![Just(0u32), Just(0x1000_0000), Just(0x0008_0008), Just(0x0008_0009)];
    prop_oneof![
        6 => (g(), gref(), 0..5usize, prop_oneof![5 => Just(0usize), 1 => Just(1)], g(), entry_flags, place).prop_map(
            |(granter, gref, frame, of, peer, flags, place)|
                Op::Write { granter, gref, frame, of: (granter + of) % GUESTS, peer, flags, place }
        ),
        3 => (g(), gref(), g(), g(), gref()).prop_map(
            |(granter, gref, peer, to, target)| Op::WriteThrough { granter, gref, peer, to, target }
        ),
        2 => (g(), prop_oneof![1 => Just(Version::V1), 2 => Just(Version::V2)])
            .prop_map(|(guest, to)| Op::SetVersion { guest, to }),
        8 => (g(), g(), gref(), flags, 0..SLOTS)
            .prop_map(|(user, granter, gref, flags, slot)| Op::Map { user, granter, gref, flags, slot }),
        5 => (g(), 0..8usize, any::<bool>(), any::<bool>())
            .prop_map(|(user, nth, host, device)| Op::Unmap { user, nth, host, device }),
        2 => (g(), 0..8usize, 0..SLOTS).prop_map(|(user, nth, slot)| Op::Replace { user, nth, slot }),
        4 => (g(), g(), gref(), any::<bool>())
            .prop_map(|(user, granter, gref, to_grant)| Op::Copy { user, granter, gref, to_grant }),
        3 => (g(), 0..GUESTS * LOOSE, g(), gref())
            .prop_map(|(giver, frame, receiver, gref)| Op::Transfer { giver, frame, receiver, gref }),
        1 => g().prop_map(|guest| Op::Die { guest }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct ModelMapping {
    handle: u32,
    granter: usize,
    gref: u32,
    host: Option<usize>,
    device: bool,
    readonly: bool,
    pte: bool,
}

struct World {
    hv: Hv,
    guests: Vec<Guest>,
    dead: [bool; GUESTS],
    versions: [Version; GUESTS],
    mappings: Vec<Vec<ModelMapping>>,
    /// Frame and user of entries in use.
    active: BTreeMap<(usize, u32), (Mfn, usize)>,
    /// Entries that their granter has not touched since they fell into use: their marks are known.
    untouched: BTreeSet<(usize, u32)>,
    /// What each slot of each guest's L1 table maps.
    slots: BTreeMap<(usize, usize), (Mfn, bool)>,
    /// References to frames that keep their owner while it lives or while they are granted, not counting grants.
    base: BTreeMap<Mfn, (usize, u32, u32)>,
    /// Frames that change hands, and whose they are; nobody's when a transfer failed.
    loose: Vec<(Mfn, Option<usize>)>,
    free: usize,
}

impl World {
    fn new() -> World {
        let hv = hypervisor(200);
        let free = hv.mm.free_frames();
        let guests: Vec<Guest> = IDS.iter().map(|id| Guest::new(&hv, *id)).collect();
        let mut base = BTreeMap::new();
        let mut loose = Vec::new();
        for (g, guest) in guests.iter().enumerate() {
            for mfn in guest.data.iter().chain([&guest.l1]) {
                let counts = (hv.mm.general_count(*mfn), hv.mm.type_word(*mfn).unwrap().count());
                base.insert(*mfn, (g, counts.0, counts.1));
            }
            for _ in 0..LOOSE {
                loose.push((hv.give_frames(&guest.domain, 0, u64::MAX).unwrap(), Some(g)));
            }
        }
        World {
            hv,
            guests,
            dead: [false; GUESTS],
            versions: [Version::V1; GUESTS],
            mappings: vec![Vec::new(); GUESTS],
            active: BTreeMap::new(),
            untouched: BTreeSet::new(),
            slots: BTreeMap::new(),
            base,
            loose,
            free,
        }
    }

    /// Frame 2 of a guest is its L1 table; 3 and 4 are those that were its loose ones. `None`: it is nobody's.
    fn frame(&self, guest: usize, index: usize) -> Option<Mfn> {
        let mfn = match index {
            0 | 1 => self.guests[guest].data[index],
            2 => self.guests[guest].l1,
            _ => self.loose[guest * LOOSE + index - 3].0,
        };
        (0..GUESTS).any(|guest| self.owns(guest, mfn)).then_some(mfn)
    }

    /// A frame went back to the allocator and may become anything, a status frame too: no unused entry names it any longer.
    fn lost(&mut self, frame: Mfn) {
        for (granter, guest) in self.guests.iter().enumerate().filter(|(granter, _)| !self.dead[*granter]) {
            for gref in GREFS {
                let in_table = self.versions[granter] == Version::V1 || gref < 256;
                let named = in_table && guest.entry(&self.hv, gref).1 == frame.get();
                if named && !self.active.contains_key(&(granter, gref)) {
                    guest.set_entry(&self.hv, gref, 0, 0);
                }
            }
        }
    }

    fn owns(&self, guest: usize, frame: Mfn) -> bool {
        self.base.get(&frame).is_some_and(|(owner, ..)| *owner == guest)
            || self.loose.contains(&(frame, Some(guest)))
    }

    fn uses(&self, granter: usize, gref: u32) -> impl Iterator<Item = &ModelMapping> {
        self.mappings.iter().flatten().filter(move |m| (m.granter, m.gref) == (granter, gref))
    }

    /// Whether the entry allows this use: the frame and the bytes of it, or why not. `hops` is how many entries a copy has come
    /// through, `None` for a mapping.
    fn allows(
        &self,
        user: usize,
        granter: usize,
        gref: u32,
        readonly: bool,
        hops: Option<u32>,
    ) -> Result<(Mfn, core::ops::Range<u64>), Error> {
        if self.dead[granter] {
            return Err(Error::BadDomain);
        }
        let v2 = self.versions[granter] == Version::V2;
        if v2 && gref >= 256 {
            return Err(Error::BadReference);
        }
        let (header, frame) = self.guests[granter].entry(&self.hv, gref);
        let flags = header as u16;
        let written = self.uses(granter, gref).any(|m| !m.readonly);
        match self.active.get(&(granter, gref)) {
            Some((_, other)) if *other != user => return Err(Error::Refused),
            Some((frame, _)) if readonly || written || flags & 4 == 0 => return Ok((*frame, 0..4096)),
            Some(_) => return Err(Error::Refused),
            None => {}
        }
        if (header >> 16) as u16 != IDS[user] || !readonly && flags & 4 != 0 {
            return Err(Error::Refused);
        }
        if v2 && flags & 3 == 3 {
            let to = IDS.iter().position(|id| *id == (header >> 32) as u16);
            return match to {
                Some(to) if hops == Some(0) && to != granter => {
                    self.allows(granter, to, frame as u32, readonly, Some(1))
                }
                _ => Err(Error::Refused),
            };
        }
        if flags & 3 != 1 || hops.is_none() && flags & 0x100 != 0 {
            return Err(Error::Refused);
        }
        let frame = Mfn::new(frame);
        if !self.owns(granter, frame) {
            return Err(Error::BadPage);
        }
        if v2 && flags & 0x100 != 0 {
            let start = header >> 32 & 0xffff;
            return Ok((frame, start..(start + (header >> 48)).min(4096)));
        }
        Ok((frame, 0..4096))
    }

    fn is_table(&self, frame: Mfn) -> bool {
        self.guests.iter().any(|g| g.l1 == frame)
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write { granter, gref, frame, of, peer, flags, place } => {
                let header = u64::from(place) << 32 | u64::from(IDS[peer]) << 16 | u64::from(flags);
                if let Some(frame) = self.frame(of, frame) {
                    self.write(granter, gref, header, frame.get());
                }
            }
            Op::WriteThrough { granter, gref, peer, to, target } => {
                let header = u64::from(IDS[to]) << 32 | u64::from(IDS[peer]) << 16 | 3;
                self.write(granter, gref, header, target.into());
            }
            Op::SetVersion { guest, to } => self.change_version(guest, to),
            Op::Map { user, granter, gref, flags, slot } => {
                if self.dead[user] {
                    return;
                }
                let readonly = flags.contains(MapFlags::READONLY);
                let expected = if !flags.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
                    Err(Error::BadReference)
                } else {
                    self.allows(user, granter, gref, readonly, None).and_then(|(frame, _)| {
                        if !readonly && self.is_table(frame) { Err(Error::Refused) } else { Ok(frame) }
                    })
                };
                let got =
                    self.guests[user].map(&self.hv, &self.guests[granter], gref, flags, FREE_SLOT + slot);
                assert_eq!(got.map(|_| ()), expected.map(|_| ()));
                let (Ok(frame), Ok(handle)) = (expected, got) else { return };
                if self.active.insert((granter, gref), (frame, user)).is_none() {
                    self.untouched.insert((granter, gref));
                }
                let host = flags.contains(MapFlags::HOST_MAP).then_some(slot);
                if host.is_some() {
                    self.slots.insert((user, slot), (frame, !readonly));
                }
                assert!(self.mappings[user].iter().all(|m| m.handle != handle), "a handle given twice");
                self.mappings[user].push(ModelMapping {
                    handle,
                    granter,
                    gref,
                    host,
                    device: flags.contains(MapFlags::DEVICE_MAP),
                    readonly,
                    pte: flags.contains(MapFlags::CONTAINS_PTE),
                });
            }
            Op::Unmap { user, nth, host, device } => {
                if self.dead[user] {
                    return;
                }
                let guest = &self.guests[user];
                let Some(mapping) = self.mappings[user].get(nth).copied() else {
                    assert_eq!(guest.unmap(&self.hv, 100_000, Some(4096), None), Err(Error::BadHandle));
                    return;
                };
                let (frame, _) = self.active[&(mapping.granter, mapping.gref)];
                let slot = mapping.host.unwrap_or(0);
                let got = guest.unmap(
                    &self.hv,
                    mapping.handle,
                    host.then_some(guest.host_address(slot, mapping.pte)),
                    device.then_some(frame.get() << 12),
                );
                let host = host && mapping.host.is_some();
                let device = device && mapping.device;
                if host && self.slots.get(&(user, slot)) != Some(&(frame, !mapping.readonly)) {
                    assert_eq!(got, Err(Error::Refused), "another mapping took the slot");
                    return;
                }
                assert_eq!(got, Ok(host || device));
                if host {
                    self.slots.remove(&(user, slot));
                }
                self.unmapped(user, nth, host, device);
            }
            Op::Replace { user, nth, slot } => {
                let Some(mapping) = self.mappings[user].get(nth).copied() else { return };
                let guest = &self.guests[user];
                let (frame, _) = self.active[&(mapping.granter, mapping.gref)];
                let from = guest.host_address(slot, false);
                let host = mapping.host.unwrap_or(0);
                let got =
                    guest.replace(&self.hv, mapping.handle, guest.host_address(host, mapping.pte), from);
                if mapping.host.is_none() {
                    assert_eq!(got, Ok(false));
                    return;
                }
                if mapping.pte {
                    assert_eq!(got, Err(Error::Refused), "not for entries named by machine address");
                    return;
                }
                let taken = self.slots.remove(&(user, slot));
                if self.slots.get(&(user, host)) != Some(&(frame, !mapping.readonly)) {
                    assert_eq!(got, Err(Error::Refused));
                    return;
                }
                assert_eq!(got, Ok(true));
                match taken {
                    Some(entry) => self.slots.insert((user, host), entry),
                    None => self.slots.remove(&(user, host)),
                };
                self.unmapped(user, nth, true, false);
            }
            Op::Copy { user, granter, gref, to_grant } => {
                if self.dead[user] {
                    return;
                }
                let allowed = self.allows(user, granter, gref, !to_grant, Some(0));
                let granted = GnttabCopyPtr::granted(GrantRef::new(gref), DomId::new(IDS[granter]), 8);
                let own = GnttabCopyPtr::own(self.guests[user].data[3], 16);
                let op = if to_grant {
                    copy_op(own, granted, 8, GNTCOPY_DEST_GREF)
                } else {
                    copy_op(granted, own, 8, GNTCOPY_SOURCE_GREF)
                };
                let expected = allowed.and_then(|(frame, range)| {
                    let fits = range.start <= 8 && 16 <= range.end;
                    let refused = to_grant && self.is_table(frame) || !fits;
                    if refused { Err(Error::Refused) } else { Ok(()) }
                });
                assert_eq!(self.guests[user].copy(&self.hv, &op), expected);
            }
            Op::Transfer { giver, frame, receiver, gref } => {
                if self.dead[giver] {
                    return;
                }
                self.transfer(giver, frame, receiver, gref);
            }
            Op::Die { guest } => {
                if self.dead[guest] {
                    return;
                }
                self.guests[guest].destroy(&self.hv, 3);
                self.dead[guest] = true;
                self.mappings[guest].clear();
                self.slots.retain(|(user, _), _| *user != guest);
                self.settle_active();
            }
        }
    }

    fn write(&mut self, granter: usize, gref: u32, header: u64, frame: u64) {
        let v2 = self.versions[granter] == Version::V2;
        if !(self.dead[granter] || v2 && gref >= 256) {
            self.untouched.remove(&(granter, gref));
            self.guests[granter].set_entry(&self.hv, gref, header, frame);
        }
    }

    fn change_version(&mut self, guest: usize, to: Version) {
        if self.dead[guest] {
            return;
        }
        let entries: Vec<_> = (0..8).map(|gref| self.guests[guest].entry(&self.hv, gref)).collect();
        let expected = if self.versions[guest] == to {
            Ok(())
        } else if self.active.keys().any(|(g, gref)| *g == guest && *gref >= 8) {
            Err(VersionRefused::InUse)
        } else if to == Version::V1 && entries.iter().any(|(header, _)| header & 3 == 3) {
            Err(VersionRefused::NotRepresentable)
        } else {
            Ok(())
        };
        let mut budget = Budget::new(1);
        let got = loop {
            match self.hv.set_grant_version(&self.guests[guest].domain, to, &mut budget) {
                Ok(Ok(())) => break Ok(()),
                Ok(Err(_)) => budget = Budget::new(1),
                Err(refused) => break Err(refused),
            }
        };
        assert_eq!(got, expected);
        if got.is_err() || self.versions[guest] == to {
            return;
        }
        self.versions[guest] = to;
        for (gref, (header, frame)) in (0..).zip(entries) {
            let kept = header & 3 == 1 || to == Version::V2;
            let marks = u64::from(self.guests[guest].marks(&self.hv, gref).bits());
            let header = if kept { header & 0xffff_ffe7 } else { 0 };
            let in_header = if to == Version::V1 { marks } else { 0 };
            let expected = (header | in_header, if kept { frame } else { 0 });
            assert_eq!(self.guests[guest].entry(&self.hv, gref), expected, "entry {gref}");
            if self.active.contains_key(&(guest, gref)) {
                self.untouched.insert((guest, gref));
            }
        }
        for gref in GREFS.into_iter().filter(|gref| (8..256).contains(gref)) {
            assert_eq!(self.guests[guest].entry(&self.hv, gref), (0, 0), "entry {gref} is empty");
            assert_eq!(self.guests[guest].marks(&self.hv, gref), GrantFlags::empty());
        }
    }

    fn transfer(&mut self, giver: usize, frame: usize, receiver: usize, gref: u32) {
        let (mfn, owner) = self.loose[frame];
        if owner.is_none() {
            return;
        }
        let op = GnttabTransfer {
            mfn,
            domid: DomId::new(IDS[receiver]),
            gref: GrantRef::new(gref),
            ..Default::default()
        };
        let in_use =
            self.active.values().any(|(f, _)| *f == mfn) || self.slots.values().any(|(f, _)| *f == mfn);
        let header = u64::from(IDS[giver]) << 16 | 2;
        let in_table = self.versions[receiver] == Version::V1 || gref < 256;
        let expected = if owner != Some(giver) || in_use {
            Err(Error::BadPage)
        } else if self.dead[receiver]
            || !in_table
            || self.guests[receiver].entry(&self.hv, gref).0 & 0xffff_ffff != header
        {
            Err(Error::Refused)
        } else {
            Ok(())
        };
        let pfn = if expected.is_ok() { self.guests[receiver].entry(&self.hv, gref).1 } else { 0 };
        self.hv.platform.frame(mfn)[7].store(0x7777, Ordering::SeqCst);
        assert_eq!(self.hv.grant_transfer(&self.guests[giver].domain, &op), expected);
        match expected {
            Ok(()) => {
                self.loose[frame].1 = Some(receiver);
                self.untouched.remove(&(receiver, gref));
                let done = u64::from(IDS[giver]) << 16 | 0xe;
                assert_eq!(self.guests[receiver].entry(&self.hv, gref), (done, mfn.get()));
                assert_eq!(self.hv.mm.m2p().get(mfn), pfn);
                assert_eq!(self.hv.platform.frame(mfn)[7].load(Ordering::SeqCst), 0x7777, "with its content");
            }
            Err(Error::BadPage) => {}
            // As the interface says.
            Err(_) => {
                self.loose[frame].1 = None;
                self.lost(mfn);
            }
        }
    }

    fn unmapped(&mut self, user: usize, nth: usize, host: bool, device: bool) {
        let mapping = &mut self.mappings[user][nth];
        if host {
            mapping.host = None;
        }
        if device {
            mapping.device = false;
        }
        if mapping.host.is_none() && !mapping.device {
            self.mappings[user].swap_remove(nth);
        }
        self.settle_active();
    }

    fn settle_active(&mut self) {
        let used: Vec<(usize, u32)> = self.mappings.iter().flatten().map(|m| (m.granter, m.gref)).collect();
        self.active.retain(|key, _| used.contains(key));
        // What the dead leave goes with its last user.
        let (active, dead) = (&self.active, &self.dead);
        let gone = |mfn: Mfn, owner: usize| dead[owner] && active.values().all(|(frame, _)| *frame != mfn);
        let mut lost: Vec<Mfn> =
            self.base.extract_if(.., |mfn, (owner, ..)| gone(*mfn, *owner)).map(|(mfn, _)| mfn).collect();
        for (mfn, owner) in &mut self.loose {
            if owner.take_if(|owner| gone(*mfn, *owner)).is_some() {
                lost.push(*mfn);
            }
        }
        for frame in lost {
            self.lost(frame);
        }
    }

    fn compare(&self) {
        for (g, guest) in self.guests.iter().enumerate() {
            let used = self.active.keys().filter(|(granter, _)| *granter == g).count();
            {
                let table = guest.domain.grants.lock();
                assert_eq!(table.used() as usize, used);
                assert_eq!(table.mappings() as usize, self.mappings[g].len());
                assert!(table.closed || table.version() == self.versions[g]);
            }
            for gref in GREFS {
                let active = guest.domain.grants.lock().active(&self.hv.platform, GrantRef::new(gref));
                let Ok(active) = active else { continue };
                let pins: u32 =
                    self.uses(g, gref).map(|m| u32::from(m.host.is_some()) + u32::from(m.device)).sum();
                assert_eq!(active.pins.total(), pins, "guest {g} entry {gref}");
                assert_eq!(active.pins.writes(), self.uses(g, gref).any(|m| !m.readonly));
                if self.active.contains_key(&(g, gref))
                    && self.untouched.contains(&(g, gref))
                    && !self.dead[g]
                {
                    let marks = guest.marks(&self.hv, gref);
                    assert!(marks.contains(GrantFlags::READING), "guest {g} entry {gref} looks unused");
                    assert!(
                        !active.pins.writes() || marks.contains(GrantFlags::WRITING),
                        "guest {g} entry {gref}"
                    );
                }
                if let Some((frame, user)) = self.active.get(&(g, gref)) {
                    assert_eq!((active.frame, active.user), (*frame, DomId::new(IDS[*user])));
                }
            }
        }
        let loose = self.loose.iter().filter_map(|(mfn, owner)| Some((*mfn, ((*owner)?, 1, 0))));
        for (mfn, (owner, general, typed)) in self.base.iter().map(|(m, b)| (*m, *b)).chain(loose) {
            let ptes = self.slots.values().filter(|(frame, _)| *frame == mfn);
            let writable_ptes = ptes.clone().filter(|(_, writable)| *writable).count() as u32;
            let devices = self
                .mappings
                .iter()
                .flatten()
                .filter(|m| m.device && self.active[&(m.granter, m.gref)].0 == mfn)
                .map(|m| u32::from(!m.readonly));
            let held = self.active.values().filter(|(frame, _)| *frame == mfn).count() as u32;
            let writable = writable_ptes + devices.clone().sum::<u32>();
            let own = if self.dead[owner] { (0, 0) } else { (general, typed) };
            let expected = own.0 + ptes.count() as u32 + devices.count() as u32 + held;
            assert_eq!(self.hv.mm.owner(mfn), Owner::Domain(DomId::new(IDS[owner])), "{mfn:?}");
            assert_eq!(self.hv.mm.general_count(mfn), expected, "references of {mfn:?}");
            assert_eq!(self.hv.mm.type_word(mfn).unwrap().count(), own.1 + writable, "writers of {mfn:?}");
        }
    }

    fn end(mut self) {
        for guest in 0..GUESTS {
            self.run(&Op::Die { guest });
            self.compare();
        }
        while self.hv.drain_quarantine() {}
        for guest in &self.guests {
            assert_eq!(guest.domain.pages.lock().total(), 0);
        }
        assert_eq!(self.hv.mm.free_frames(), self.free, "all frames are back");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_sequences_agree_with_the_model(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        for op in &ops {
            world.run(op);
            world.compare();
        }
        world.end();
    }
}

#[test]
fn a_table_grows_to_its_limit() {
    let hv = hypervisor(256);
    let domain = add_domain(&hv, 3, 1, Rights::none());
    domain.grants.lock().set_limits(10, u32::MAX);
    let mut budget = Budget::unlimited();
    let mut grow =
        |kind, count| hv.grow_grant_frames(&domain, kind, count, &mut budget).map(|done| done.is_ok());
    assert_eq!(grow(Frames::Status, 1), Err(Error::BadReference), "version 1 has none");
    assert_eq!(grow(Frames::Shared, 11), Err(Error::BadReference));
    assert_eq!(hv.set_grant_version(&domain, Version::V2, &mut Budget::unlimited()), Ok(Ok(())));
    assert_eq!(grow(Frames::Status, 1), Ok(true));
    assert_eq!(grow(Frames::Status, 3), Err(Error::BadReference));
    // As many shared frames as two status frames serve would be 16.
    assert_eq!(grow(Frames::Status, 2), Ok(true));
    assert_eq!(domain.grants.lock().frames(), 10);
    assert!(hv.grant_frame(&domain, Frames::Status, 1).is_some());
    assert_eq!(hv.grant_frame(&domain, Frames::Status, 2), None);
    assert_eq!(grow(Frames::Shared, 10), Ok(true));
    assert_eq!(hv.grant_frame(&domain, Frames::Shared, 10), None);
}

#[test]
fn as_many_mappings_as_the_limit_and_one_more() {
    for limit in [3, 513] {
        let hv = hypervisor(256);
        let (granter, user) = (Guest::new(&hv, 3), Guest::new(&hv, 1));
        user.domain.grants.lock().set_limits(1, limit);
        // 128 uses of one entry is the most.
        for gref in 8..16 {
            granter.permit(&hv, gref, granter.data[0], user.id(), true);
        }
        let flags = MapFlags::DEVICE_MAP | MapFlags::READONLY;
        let map = |i: u32| user.map(&hv, &granter, 8 + i / 128, flags, 0);
        let handles: Vec<_> = (0..limit).map(|i| map(i).unwrap()).collect();
        assert!(handles.iter().all(|handle| *handle < limit));
        assert_eq!(map(limit), Err(Error::NoSpace));
        let frame = granter.data[0].get() << 12;
        assert_eq!(user.unmap(&hv, handles[1], None, Some(frame)), Ok(true));
        assert_eq!(map(limit), Ok(handles[1]), "the one that is free again");
        user.destroy(&hv, u32::MAX);
        granter.destroy(&hv, u32::MAX);
    }
}

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

use super::Error;
use super::entry::Entry;
use super::table::Pins;
use crate::access::Rights;
use crate::domain::{Current, Domain, Life, VcpuRef, VcpuState};
use crate::evtchn::tests::{add_domain, hypervisor};
use crate::hypercall::grant_table_op::grant_table_op;
use crate::hypercall::{Budget, Exit};
use crate::hypervisor::Hypervisor;
use crate::mm::{Level, TlbDebt};
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

    /// What the guest sees and writes in its shared table.
    fn entry(&self, hv: &Hv, gref: u32) -> u64 {
        let table = self.domain.grants.lock();
        table.shared(&hv.platform, GrantRef::new(gref)).unwrap().load(Ordering::SeqCst)
    }
    fn set_entry(&self, hv: &Hv, gref: u32, word: u64) {
        let table = self.domain.grants.lock();
        table.shared(&hv.platform, GrantRef::new(gref)).unwrap().store(word, Ordering::SeqCst);
    }
    fn permit(&self, hv: &Hv, gref: u32, frame: Mfn, peer: DomId, readonly: bool) {
        self.set_entry(hv, gref, Entry::permit(frame, peer, readonly).unwrap().word());
    }
    fn marks(&self, hv: &Hv, gref: u32) -> GrantFlags {
        Entry::from_word(self.entry(hv, gref)).flags() & (GrantFlags::READING | GrantFlags::WRITING)
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
                    assert!(cmd == GnttabOp::SetupTable || again[2] < args[2], "no progress");
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
        match hv.grant_unmap(&self.domain, handle, host, device)? {
            Some(unmapping) => {
                hv.mm.settle(TlbDebt::everywhere(), &hv.platform);
                hv.grant_unmap_complete(unmapping);
                Ok(true)
            }
            None => Ok(false),
        }
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
    let unmapping = hv.grant_unmap(&user.domain, handle, host, None).unwrap().unwrap();
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
    let mut version = [GnttabSetVersion { version: 2 }];
    assert_eq!(user.call(&hv, GnttabOp::SetVersion, &mut version, 64), Err(Errno::ENOSYS));
    assert_eq!(version[0].version, 1);
    version[0].version = 3;
    assert_eq!(user.call(&hv, GnttabOp::SetVersion, &mut version, 64), Err(Errno::EINVAL));
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
    let word = granter.entry(&hv, 20);
    let swap = |a, b| {
        [GnttabSwapGrantRef { ref_a: GrantRef::new(a), ref_b: GrantRef::new(b), ..Default::default() }]
    };
    let mut list = swap(20, 21);
    assert_eq!(granter.call(&hv, GnttabOp::SwapGrantRef, &mut list, 64), Ok(0));
    assert_eq!((list[0].status, granter.entry(&hv, 20), granter.entry(&hv, 21)), (GNTST_OKAY, 0, word));
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

// ── random sequences against a model ──

const GUESTS: usize = 3;
const IDS: [u16; GUESTS] = [6, 2, 11];
const GREFS: u32 = 6;
const SLOTS: usize = 5;

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
    Copy {
        user: usize,
        granter: usize,
        gref: u32,
        to_grant: bool,
    },
    Die {
        guest: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let g = || 0..GUESTS;
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
    let entry_flags = prop_oneof![5 => Just(1u16), 2 => Just(5), 1 => Just(0), 1 => Just(2), 1 => Just(0x101), 1 => Just(0x19)];
    prop_oneof![
        6 => (g(), 0..GREFS, 0..3usize, prop_oneof![5 => Just(0usize), 1 => Just(1)], g(), entry_flags).prop_map(
            |(granter, gref, frame, of, peer, flags)| Op::Write { granter, gref, frame, of: (granter + of) % GUESTS, peer, flags }
        ),
        8 => (g(), g(), 0..GREFS, flags, 0..SLOTS)
            .prop_map(|(user, granter, gref, flags, slot)| Op::Map { user, granter, gref, flags, slot }),
        5 => (g(), 0..8usize, any::<bool>(), any::<bool>())
            .prop_map(|(user, nth, host, device)| Op::Unmap { user, nth, host, device }),
        3 => (g(), g(), 0..GREFS, any::<bool>())
            .prop_map(|(user, granter, gref, to_grant)| Op::Copy { user, granter, gref, to_grant }),
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
    mappings: Vec<Vec<ModelMapping>>,
    /// Frame and user of entries in use.
    active: BTreeMap<(usize, u32), (Mfn, usize)>,
    /// Entries that their granter has not touched since they fell into use: their marks are known.
    untouched: BTreeSet<(usize, u32)>,
    /// What each slot of each guest's L1 table maps.
    slots: BTreeMap<(usize, usize), (Mfn, bool)>,
    base: BTreeMap<Mfn, (u32, u32)>,
    free: usize,
}

impl World {
    fn new() -> World {
        let hv = hypervisor(160);
        let free = hv.mm.free_frames();
        let guests: Vec<Guest> = IDS.iter().map(|id| Guest::new(&hv, *id)).collect();
        let mut base = BTreeMap::new();
        for guest in &guests {
            for mfn in guest.data.iter().chain([&guest.l1]) {
                base.insert(*mfn, (hv.mm.general_count(*mfn), hv.mm.type_word(*mfn).unwrap().count()));
            }
        }
        World {
            hv,
            guests,
            dead: [false; GUESTS],
            mappings: vec![Vec::new(); GUESTS],
            active: BTreeMap::new(),
            untouched: BTreeSet::new(),
            slots: BTreeMap::new(),
            base,
            free,
        }
    }

    /// Frame 2 of a guest is its L1 table.
    fn frame(&self, guest: usize, index: usize) -> Mfn {
        if index == 2 { self.guests[guest].l1 } else { self.guests[guest].data[index] }
    }

    fn uses(&self, granter: usize, gref: u32) -> impl Iterator<Item = &ModelMapping> {
        self.mappings.iter().flatten().filter(move |m| (m.granter, m.gref) == (granter, gref))
    }

    /// Whether the entry allows this use: the frame, or why not.
    fn allows(
        &self,
        user: usize,
        granter: usize,
        gref: u32,
        readonly: bool,
        mapping: bool,
    ) -> Result<Mfn, Error> {
        if self.dead[granter] {
            return Err(Error::BadDomain);
        }
        let entry = self.guests[granter].entry(&self.hv, gref);
        let flags = entry as u16;
        let written = self.uses(granter, gref).any(|m| !m.readonly);
        match self.active.get(&(granter, gref)) {
            Some((_, other)) if *other != user => Err(Error::Refused),
            Some((frame, _)) if readonly || written => Ok(*frame),
            Some((frame, _)) => {
                if flags & 4 != 0 {
                    Err(Error::Refused)
                } else {
                    Ok(*frame)
                }
            }
            None => {
                if flags & 3 != 1 || mapping && flags & 0x100 != 0 || (entry >> 16) as u16 != IDS[user] {
                    return Err(Error::Refused);
                }
                if !readonly && flags & 4 != 0 {
                    return Err(Error::Refused);
                }
                let frame = Mfn::new(entry >> 32);
                let own = (0..3).any(|i| self.frame(granter, i) == frame);
                if own { Ok(frame) } else { Err(Error::BadPage) }
            }
        }
    }

    fn is_table(&self, frame: Mfn) -> bool {
        self.guests.iter().any(|g| g.l1 == frame)
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write { granter, gref, frame, of, peer, flags } => {
                if !self.dead[granter] {
                    self.untouched.remove(&(granter, gref));
                    let word =
                        self.frame(of, frame).get() << 32 | u64::from(IDS[peer]) << 16 | u64::from(flags);
                    self.guests[granter].set_entry(&self.hv, gref, word);
                }
            }
            Op::Map { user, granter, gref, flags, slot } => {
                if self.dead[user] {
                    return;
                }
                let readonly = flags.contains(MapFlags::READONLY);
                let expected = if !flags.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
                    Err(Error::BadReference)
                } else {
                    self.allows(user, granter, gref, readonly, true).and_then(|frame| {
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
                let address = if mapping.pte {
                    guest.l1.get() << 12 | (FREE_SLOT as u64 + slot as u64) << 3
                } else {
                    (FREE_SLOT as u64 + slot as u64) << 12
                };
                let got = guest.unmap(
                    &self.hv,
                    mapping.handle,
                    host.then_some(address),
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
                    self.mappings[user][nth].host = None;
                }
                if device {
                    self.mappings[user][nth].device = false;
                }
                if self.mappings[user][nth].host.is_none() && !self.mappings[user][nth].device {
                    self.mappings[user].swap_remove(nth);
                }
                self.settle_active();
            }
            Op::Copy { user, granter, gref, to_grant } => {
                if self.dead[user] {
                    return;
                }
                let allowed = self.allows(user, granter, gref, !to_grant, false);
                let granted = GnttabCopyPtr::granted(GrantRef::new(gref), DomId::new(IDS[granter]), 8);
                let own = GnttabCopyPtr::own(self.guests[user].data[3], 16);
                let op = if to_grant {
                    copy_op(own, granted, 8, GNTCOPY_DEST_GREF)
                } else {
                    copy_op(granted, own, 8, GNTCOPY_SOURCE_GREF)
                };
                let expected = match allowed {
                    Ok(frame) if to_grant && self.is_table(frame) => Err(Error::Refused),
                    other => other.map(|_| ()),
                };
                assert_eq!(self.hv.grant_copy(&self.guests[user].domain, &op), expected);
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

    fn settle_active(&mut self) {
        let used: Vec<(usize, u32)> = self.mappings.iter().flatten().map(|m| (m.granter, m.gref)).collect();
        self.active.retain(|key, _| used.contains(key));
    }

    fn compare(&self) {
        for (g, guest) in self.guests.iter().enumerate() {
            let used = self.active.keys().filter(|(granter, _)| *granter == g).count();
            let table = guest.domain.grants.lock();
            assert_eq!(table.used() as usize, used);
            assert_eq!(table.mappings() as usize, self.mappings[g].len());
            for gref in 0..GREFS {
                let Ok(active) = table.active(&self.hv.platform, GrantRef::new(gref)) else { continue };
                let pins: u32 =
                    self.uses(g, gref).map(|m| u32::from(m.host.is_some()) + u32::from(m.device)).sum();
                assert_eq!(active.pins.total(), pins, "guest {g} entry {gref}");
                assert_eq!(active.pins.writes(), self.uses(g, gref).any(|m| !m.readonly));
                if self.active.contains_key(&(g, gref))
                    && self.untouched.contains(&(g, gref))
                    && !self.dead[g]
                {
                    let entry = table.shared(&self.hv.platform, GrantRef::new(gref)).unwrap();
                    let flags = Entry::from_word(entry.load(Ordering::SeqCst)).flags();
                    assert!(flags.contains(GrantFlags::READING), "guest {g} entry {gref} looks unused");
                    assert!(
                        !active.pins.writes() || flags.contains(GrantFlags::WRITING),
                        "guest {g} entry {gref}"
                    );
                }
                if let Some((frame, user)) = self.active.get(&(g, gref)) {
                    assert_eq!((active.frame, active.user), (*frame, DomId::new(IDS[*user])));
                }
            }
        }
        for (mfn, (general, typed)) in &self.base {
            let owner = self.guests.iter().position(|g| g.l1 == *mfn || g.data.contains(mfn)).unwrap();
            let ptes = self.slots.values().filter(|(frame, _)| frame == mfn);
            let writable_ptes = ptes.clone().filter(|(_, writable)| *writable).count() as u32;
            let devices = self
                .mappings
                .iter()
                .flatten()
                .filter(|m| m.device && self.active[&(m.granter, m.gref)].0 == *mfn)
                .map(|m| u32::from(!m.readonly));
            let held = self.active.values().filter(|(frame, _)| frame == mfn).count() as u32;
            let writable = writable_ptes + devices.clone().sum::<u32>();
            let own = if self.dead[owner] { (0, 0) } else { (*general, *typed) };
            let expected = own.0 + ptes.count() as u32 + devices.count() as u32 + held;
            if !self.dead[owner] || held > 0 {
                assert_eq!(self.hv.mm.general_count(*mfn), expected, "references of {mfn:?}");
                assert_eq!(
                    self.hv.mm.type_word(*mfn).unwrap().count(),
                    own.1 + writable,
                    "writers of {mfn:?}"
                );
            }
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

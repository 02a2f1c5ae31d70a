//! Counting uses, mapping and unmapping, and teardown.
//!
//! Nothing here waits for a TLB flush, or allocates, while it holds a lock: what a map or an unmap does to page tables it does
//! with no table locked, holding its handle *busy* and the entry *pinned*.

use alloc::sync::Arc;

use hypercall_abi::grant::{GnttabMapGrantRef, GrantFlags, MapFlags};
use hypercall_abi::{DomId, GrantRef, Mfn};

use super::entry::{Granted, Purpose, marks_of};
use super::table::{Active, Mapping, Pins, Reach, StatusFrames};
use super::{Error, GrantTable};
use crate::domain::{Domain, Life};
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::mm::{Pte, PteFlags, Store, TakenEntry};
use crate::page_ref::{PageRef, TypedRef, Writable};
use crate::platform::Platform;

/// Handles looked at in one step of a teardown.
const HANDLES_PER_STEP: u32 = 512;

/// The page-table entry that a mapping is in, as the guest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPte {
    /// Machine address of the entry.
    Machine(u64),
    /// The entry that translates this virtual address under that root.
    Virtual(Option<Mfn>, u64),
}

impl HostPte {
    /// From the address and flags of a mapping; `root` is the root in force.
    pub fn new(address: u64, flags: MapFlags, root: Option<Mfn>) -> HostPte {
        if flags.contains(MapFlags::CONTAINS_PTE) {
            HostPte::Machine(address)
        } else {
            HostPte::Virtual(root, address)
        }
    }
}

/// An unmapping whose page-table entries are gone, but not yet from the TLBs: it must be completed after a flush.
#[must_use = "the granter's entry stays in use until the unmapping is completed"]
pub struct Unmapping {
    granter: Arc<Domain>,
    gref: GrantRef,
    gone: MapFlags,
    frame: Mfn,
}

/// An entry that is in use by the caller now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pinned {
    /// A frame of the granter's, or a part of it.
    Frame(Mfn, Reach),
    /// It stands for this entry of another domain, which is to be pinned for the granter.
    Transitive(DomId, GrantRef),
}

impl<P: Platform> Hypervisor<P> {
    // ── counts ──

    /// Adds `pins` to an entry of `granter` for `user`, marking the shared entry where needed.
    pub(super) fn pin_grant(
        &self,
        table: &mut GrantTable,
        granter: &Domain,
        gref: GrantRef,
        user: DomId,
        pins: Pins,
        purpose: Purpose,
    ) -> Result<Pinned, Error> {
        if table.closed || granter.life() != Life::Alive {
            return Err(Error::BadDomain);
        }
        if gref.get() >= table.entries() {
            return Err(Error::BadReference);
        }
        if table.is_vanishing(gref) {
            return Err(Error::Refused);
        }
        // A table without frames is one of empty entries.
        let entry = table.shared(&self.platform, gref).ok_or(Error::Refused)?;
        let active = table.active(&self.platform, gref)?;
        let first = active.pins.is_none();
        if !first && (active.user != user || purpose == Purpose::Map && active.reach != Reach::Page) {
            return Err(Error::Refused);
        }
        let after = active.pins.plus(pins).ok_or(Error::Refused)?;
        let readonly = !pins.writes();
        let through = !first && active.reach == Reach::Through;
        if !first && !through && (readonly || active.pins.writes()) {
            table.set_active(&self.platform, gref, Active { pins: after, ..active });
            return Ok(Pinned::Frame(active.frame, active.reach));
        }
        let granted = entry.mark(active.pins, user, readonly, purpose)?;
        let undo = || entry.unmark(marks_gone(active.pins, readonly));
        let (pinned, frame, reach) = match granted {
            Granted::Transitive(domain, gref) if first || through => {
                if domain == granter.id {
                    undo();
                    return Err(Error::Refused);
                }
                (Pinned::Transitive(domain, gref), Mfn::new(0), Reach::Through)
            }
            _ if through => {
                // It has become something else while it is in use.
                undo();
                return Err(Error::Refused);
            }
            Granted::Frame(frame, reach) if first => {
                let Some(page) = self.mm.get_page(frame, granter.id) else {
                    undo();
                    return Err(Error::BadPage);
                };
                // Held by the active entry until its last count goes.
                (Pinned::Frame(frame, reach), page.into_pte(), reach)
            }
            _ => (Pinned::Frame(active.frame, active.reach), active.frame, active.reach),
        };
        table.set_active(&self.platform, gref, Active { pins: after, user, frame, reach });
        Ok(pinned)
    }

    /// Takes `pins` of an entry back. The frames of a dead domain's table go with its last count.
    pub(super) fn unpin_grant(&self, table: &mut GrantTable, gref: GrantRef, pins: Pins) {
        let Ok(active) = table.active(&self.platform, gref) else {
            debug_assert!(false, "{gref:?} is in use without an active entry");
            return;
        };
        let after = active.pins.minus(pins);
        table.set_active(&self.platform, gref, Active { pins: after, ..active });
        if after.is_none() && active.reach != Reach::Through {
            drop(PageRef::from_pte(&self.mm, active.frame));
        }
        if let Some(entry) = table.shared(&self.platform, gref) {
            entry.unmark(marks_gone(after, !pins.writes()));
        }
        if table.closed && table.used() == 0 {
            self.free_table(table);
        }
    }

    fn free_table(&self, table: &mut GrantTable) {
        while let Some(mfn) = table.take_status_frame(&self.platform) {
            match table.status {
                StatusFrames::Prepared => self.mm.give_back(mfn, 0),
                StatusFrames::Shared => self.mm.release_hypervisor_page(mfn),
                StatusFrames::Withdrawn => self.mm.retire_hypervisor_page(mfn),
            }
        }
        while let Some((shared, active)) = table.take_frame(&self.platform) {
            self.mm.release_hypervisor_page(shared);
            for mfn in active {
                self.mm.give_back(mfn, 0);
            }
        }
        if let Some(directory) = table.take_directory() {
            self.mm.give_back(directory, 0);
        }
    }

    // ── mapping ──

    /// `map_grant_ref`: maps a granted frame for `user`, into the page-table entry that `host` names and for devices as the
    /// flags say. Returns the handle and the frame.
    pub fn grant_map(
        &self,
        user: &Domain,
        op: &GnttabMapGrantRef,
        root: Option<Mfn>,
    ) -> Result<(u32, Mfn), Error> {
        let flags = MapFlags::from_bits_retain(op.flags);
        let pins = Pins::of(flags);
        if pins.is_none() {
            return Err(Error::BadReference);
        }
        let granter = self.domains.get(op.dom).ok_or(Error::BadDomain)?;
        let kept =
            flags & (MapFlags::HOST_MAP | MapFlags::DEVICE_MAP | MapFlags::READONLY | MapFlags::CONTAINS_PTE);
        let mapping = Mapping { granter: op.dom, gref: op.gref, flags: kept };
        let handle = self.take_handle(user, mapping)?;
        let result = self.map_pinned(user, &granter, op, pins, root);
        let left = if result.is_ok() { kept } else { MapFlags::empty() };
        user.grants.lock().set_mapping(&self.platform, handle, Mapping { flags: left, ..mapping });
        result.map(|frame| (handle, frame))
    }

    /// A handle for `mapping`, busy. What memory it needs is found with no lock held: that may wait for a flush.
    fn take_handle(&self, user: &Domain, mapping: Mapping) -> Result<u32, Error> {
        let mut spare = None;
        let result = loop {
            let mut table = user.grants.lock();
            if table.closed || user.life() != Life::Alive {
                break Err(Error::Refused);
            }
            if let Some(handle) = table.take_handle(&self.platform, mapping) {
                break Ok(handle);
            }
            if table.is_out_of_handles() {
                break Err(Error::NoSpace);
            }
            if let Some(mfn) = spare.take() {
                table.add_maptrack_frame(&self.platform, mfn);
                continue;
            }
            drop(table);
            spare = self.allocate_frames(0, u64::MAX);
            if spare.is_none() {
                break Err(Error::NoSpace);
            }
        };
        if let Some(mfn) = spare {
            self.mm.give_back(mfn, 0);
        }
        result
    }

    /// Pins the entry and makes the mappings that the flags ask for, all or none.
    fn map_pinned(
        &self,
        user: &Domain,
        granter: &Domain,
        op: &GnttabMapGrantRef,
        pins: Pins,
        root: Option<Mfn>,
    ) -> Result<Mfn, Error> {
        let flags = MapFlags::from_bits_retain(op.flags);
        let pinned = {
            let mut table = granter.grants.lock();
            self.pin_grant(&mut table, granter, op.gref, user.id, pins, Purpose::Map)?
        };
        let result = match pinned {
            Pinned::Frame(frame, _) => self.map_frame(user, granter, op.host_addr, frame, flags, root),
            Pinned::Transitive(..) => Err(Error::Refused),
        };
        if result.is_err() {
            self.unpin_grant(&mut granter.grants.lock(), op.gref, pins);
        }
        result
    }

    fn map_frame(
        &self,
        user: &Domain,
        granter: &Domain,
        address: u64,
        frame: Mfn,
        flags: MapFlags,
        root: Option<Mfn>,
    ) -> Result<Mfn, Error> {
        let page = self.mm.get_page(frame, granter.id).ok_or(Error::Refused)?;
        let host = HostPte::new(address, flags, root);
        if flags.contains(MapFlags::READONLY) {
            if flags.contains(MapFlags::HOST_MAP) {
                self.map_for_host(user, granter, host, frame, flags)?;
            }
            if flags.contains(MapFlags::DEVICE_MAP) {
                page.into_pte();
            }
            return Ok(frame);
        }
        // What is owed for what the frame was before is paid here, with nothing locked: the page table is locked only when the
        // frame is writable already.
        let (page, debt) = page.typed::<Writable>().map_err(|_| Error::Refused)?;
        self.mm.settle(debt, &self.platform);
        if flags.contains(MapFlags::HOST_MAP) {
            self.map_for_host(user, granter, host, frame, flags)?;
        }
        if flags.contains(MapFlags::DEVICE_MAP) {
            page.into_pte();
        }
        Ok(frame)
    }

    fn unmap_for_device(&self, frame: Mfn, readonly: bool) {
        if readonly {
            drop(PageRef::from_pte(&self.mm, frame));
        } else {
            drop(TypedRef::<Writable>::from_pte(&self.mm, frame));
        }
    }

    /// Table and index of a page-table entry of `user` that a guest named.
    fn find_host_pte(&self, user: &Domain, host: HostPte) -> Result<(PageRef<'_>, usize), Error> {
        let (table, index) = match host {
            HostPte::Machine(address) if address % 8 == 0 => {
                (Mfn::new(address >> 12), (address >> 3 & 511) as usize)
            }
            HostPte::Machine(_) => return Err(Error::Refused),
            HostPte::Virtual(root, va) if is_guest_address(va) => {
                self.pager().find_l1(root.ok_or(Error::Refused)?, va).ok_or(Error::Refused)?
            }
            HostPte::Virtual(..) => return Err(Error::Refused),
        };
        Ok((self.mm.get_page(table, user.id).ok_or(Error::Refused)?, index))
    }

    fn map_for_host(
        &self,
        user: &Domain,
        granter: &Domain,
        host: HostPte,
        frame: Mfn,
        flags: MapFlags,
    ) -> Result<(), Error> {
        let (table, index) = self.find_host_pte(user, host)?;
        let pte = Pte::new(frame, pte_flags(flags));
        self.pager().update_l1(&table, index, pte, Store::Plain, granter.id, self).map_err(|_| Error::Refused)
    }

    /// Replaces the page-table entry of a mapping, which must be one of `frame`, by an empty one, or by the one that translates
    /// `replacement`, which becomes empty, also if this fails.
    fn unmap_for_host(
        &self,
        user: &Domain,
        host: HostPte,
        frame: Mfn,
        readonly: bool,
        replacement: Option<u64>,
    ) -> Result<(), Error> {
        let taken = match (replacement, host) {
            (None, _) => TakenEntry::EMPTY,
            (Some(_), HostPte::Machine(_)) => return Err(Error::Refused),
            (Some(address), HostPte::Virtual(root, _)) => {
                let (table, index) = self.find_host_pte(user, HostPte::Virtual(root, address))?;
                self.pager().take_l1(&table, index).map_err(|_| Error::Refused)?
            }
        };
        let (table, index) = self.find_host_pte(user, host)?;
        let is_mapping = |old: Pte| old.is_present() && old.mfn() == frame && old.is_writable() != readonly;
        self.pager().replace_l1(&table, index, taken, is_mapping).map_err(|_| Error::Refused)
    }

    /// `unmap_grant_ref` and `unmap_and_replace`: takes a mapping's page-table entry (`host`: its address and the root in force,
    /// if it is to go) and its mapping for devices (`device`, its machine address, if it is to go) away. The entry that
    /// translates `replacement` moves to the place of the page-table entry. The result must be completed after a TLB flush.
    ///
    /// `Ok(None)` when nothing was asked for that the mapping has.
    pub fn grant_unmap(
        &self,
        user: &Domain,
        handle: u32,
        host: Option<(u64, Option<Mfn>)>,
        device: Option<u64>,
        replacement: Option<u64>,
    ) -> Result<Option<Unmapping>, Error> {
        let mapping = user.grants.lock().claim_mapping(&self.platform, handle)?;
        let result = self.unmap_claimed(user, mapping, host, device, replacement);
        let gone = match &result {
            Ok(Some(unmapping)) => unmapping.gone & (MapFlags::HOST_MAP | MapFlags::DEVICE_MAP),
            _ => MapFlags::empty(),
        };
        let left = Mapping { flags: mapping.flags - gone, ..mapping };
        user.grants.lock().set_mapping(&self.platform, handle, left);
        result
    }

    fn unmap_claimed(
        &self,
        user: &Domain,
        mapping: Mapping,
        host: Option<(u64, Option<Mfn>)>,
        device: Option<u64>,
        replacement: Option<u64>,
    ) -> Result<Option<Unmapping>, Error> {
        // A domain stays registered while frames of it are in use.
        let granter = self.domains.get(mapping.granter).ok_or(Error::Refused)?;
        // The mapping counts, so the active entry stays what it is.
        let frame = granter.grants.lock().active(&self.platform, mapping.gref)?.frame;
        let readonly = mapping.flags.contains(MapFlags::READONLY);
        let device = device.filter(|_| mapping.flags.contains(MapFlags::DEVICE_MAP));
        if device.is_some_and(|address| address != frame.get() << 12) {
            return Err(Error::BadDeviceAddress);
        }
        let mut gone = MapFlags::empty();
        if let Some((address, root)) = host.filter(|_| mapping.flags.contains(MapFlags::HOST_MAP)) {
            let host = HostPte::new(address, mapping.flags, root);
            self.unmap_for_host(user, host, frame, readonly, replacement)?;
            gone |= MapFlags::HOST_MAP;
        }
        if device.is_some() {
            gone |= MapFlags::DEVICE_MAP;
        }
        if gone.is_empty() {
            return Ok(None);
        }
        let gone = gone | mapping.flags & MapFlags::READONLY;
        Ok(Some(Unmapping { granter, gref: mapping.gref, gone, frame }))
    }

    /// Gives the granter's entry back. The caller has flushed TLBs since the unmapping.
    pub fn grant_unmap_complete(&self, unmapping: Unmapping) {
        let Unmapping { granter, gref, gone, frame } = unmapping;
        let mut table = granter.grants.lock();
        if gone.contains(MapFlags::DEVICE_MAP) {
            self.unmap_for_device(frame, gone.contains(MapFlags::READONLY));
        }
        self.unpin_grant(&mut table, gref, Pins::of(gone));
    }

    // ── teardown ──

    /// Ends all grants of a dying domain, whose vCPUs are all off: its mappings of others' frames, the table of its handles,
    /// and its own table as soon as nobody uses an entry of it.
    ///
    /// The page-table entries of its mappings hold their own references and go with its page tables.
    pub fn tear_down_grants(&self, domain: &Domain, budget: &mut Budget) -> Result<(), Preempted> {
        debug_assert!(domain.life() != Life::Alive);
        loop {
            let next = self.next_mapping(domain);
            match next {
                NextMapping::None => break,
                NextMapping::Later => {}
                NextMapping::Found(handle, mapping) => self.end_mapping(domain, handle, mapping),
            }
            budget.step()?;
        }
        loop {
            let Some(mfn) = domain.grants.lock().take_maptrack_frame(&self.platform) else { break };
            self.mm.give_back(mfn, 0);
            budget.step()?;
        }
        let mut table = domain.grants.lock();
        table.closed = true;
        if table.used() == 0 {
            self.free_table(&mut table);
        }
        Ok(())
    }

    fn next_mapping(&self, domain: &Domain) -> NextMapping {
        let mut table = domain.grants.lock();
        if table.mappings() == 0 {
            return NextMapping::None;
        }
        let end = table.handles().min(table.teardown_at + HANDLES_PER_STEP);
        while table.teardown_at < end {
            let handle = table.teardown_at;
            if let Ok(mapping) = table.mapping(&self.platform, handle) {
                return NextMapping::Found(handle, mapping);
            }
            table.teardown_at += 1;
        }
        if table.teardown_at >= table.handles() { NextMapping::None } else { NextMapping::Later }
    }

    fn end_mapping(&self, domain: &Domain, handle: u32, mapping: Mapping) {
        let Some(granter) = self.domains.get(mapping.granter) else { return };
        {
            let mut table = domain.grants.lock();
            if table.mapping(&self.platform, handle) != Ok(mapping) {
                return;
            }
            table.set_mapping(&self.platform, handle, Mapping { flags: MapFlags::empty(), ..mapping });
        }
        let mut table = granter.grants.lock();
        if let Ok(active) = table.active(&self.platform, mapping.gref)
            && mapping.flags.contains(MapFlags::DEVICE_MAP)
        {
            self.unmap_for_device(active.frame, mapping.flags.contains(MapFlags::READONLY));
        }
        self.unpin_grant(&mut table, mapping.gref, Pins::of(mapping.flags));
    }
}

enum NextMapping {
    None,
    Later,
    Found(u32, Mapping),
}

/// Marks of the shared entry that nothing needs any more when `after` is left and a use that was `readonly` went.
fn marks_gone(after: Pins, readonly: bool) -> GrantFlags {
    let used = if readonly { GrantFlags::READING } else { GrantFlags::READING | GrantFlags::WRITING };
    used - marks_of(after)
}

/// The page-table entry of a mapping, as Xen 4.17 makes it.
fn pte_flags(flags: MapFlags) -> PteFlags {
    let mut pte = PteFlags::PRESENT | PteFlags::ACCESSED | PteFlags::DIRTY | PteFlags::NO_EXECUTE;
    if flags.contains(MapFlags::APPLICATION_MAP) {
        pte |= PteFlags::USER;
    }
    if !flags.contains(MapFlags::READONLY) {
        pte |= PteFlags::WRITABLE;
    }
    pte | PteFlags::from_bits_retain(u64::from(flags.bits() >> 16 & 7) << 9)
}

/// Canonical, and not in the hypervisor's slots.
fn is_guest_address(va: u64) -> bool {
    ((va << 16) as i64 >> 16) as u64 == va && !(0xffff_8000_0000_0000..0xffff_8800_0000_0000).contains(&va)
}

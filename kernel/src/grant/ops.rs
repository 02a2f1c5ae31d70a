//! Mapping, unmapping, the table itself, and teardown.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use hypercall_abi::grant::{GNTTAB_NR_RESERVED_ENTRIES, GnttabMapGrantRef, GrantFlags, MapFlags};
use hypercall_abi::{DomId, GrantRef, Mfn};

use super::entry::{self, Entry};
use super::table::{Active, Mapping, Pins};
use super::{Error, GrantTable, MAX_FRAMES, Usage};
use crate::domain::{Domain, Life};
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::mm::{Pte, PteFlags, Store};
use crate::page_ref::{PageRef, TypedRef, Writable};
use crate::platform::Platform;
use crate::sync::{RankedGuard, rank};

/// Handles looked at in one step of a teardown.
const HANDLES_PER_STEP: u32 = 512;
/// How often an exchange of a page-table entry is tried against the processor's accessed and dirty bits.
const PTE_ATTEMPTS: u32 = 4;

/// Two grant tables locked together, in the order of the domains' numbers.
enum Pair<'a> {
    InOrder(
        RankedGuard<'a, GrantTable, { rank::GRANTS }>,
        RankedGuard<'a, GrantTable, { rank::GRANTS_SECOND }>,
    ),
    Swapped(
        RankedGuard<'a, GrantTable, { rank::GRANTS }>,
        RankedGuard<'a, GrantTable, { rank::GRANTS_SECOND }>,
    ),
    Same(RankedGuard<'a, GrantTable, { rank::GRANTS }>),
}

impl<'a> Pair<'a> {
    fn lock(user: &'a Domain, granter: &'a Domain) -> Pair<'a> {
        match user.id.cmp(&granter.id) {
            core::cmp::Ordering::Less => {
                let first = user.grants.lock();
                Pair::InOrder(first, granter.grants.lock_second())
            }
            core::cmp::Ordering::Greater => {
                let first = granter.grants.lock();
                Pair::Swapped(first, user.grants.lock_second())
            }
            core::cmp::Ordering::Equal => Pair::Same(user.grants.lock()),
        }
    }

    fn user(&mut self) -> &mut GrantTable {
        match self {
            Pair::InOrder(table, _) | Pair::Same(table) => table,
            Pair::Swapped(_, table) => table,
        }
    }

    fn granter(&mut self) -> &mut GrantTable {
        match self {
            Pair::InOrder(_, table) => table,
            Pair::Swapped(table, _) | Pair::Same(table) => table,
        }
    }
}

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

impl<P: Platform> Hypervisor<P> {
    // ── the table ──

    /// Makes the table of a domain at least `frames` frames large, one step for each; what was added before memory or the
    /// budget ran out stays. `None` when there is no memory, or the domain is dying.
    pub fn grow_grant_table(
        &self,
        domain: &Domain,
        frames: u32,
        budget: &mut Budget,
    ) -> Option<Result<(), Preempted>> {
        loop {
            let mut table = domain.grants.lock();
            if table.frames() >= frames.min(MAX_FRAMES) {
                return Some(Ok(()));
            }
            if table.closed || domain.life() != Life::Alive {
                return None;
            }
            if table.needs_directory() {
                table.set_directory(self.allocate_frames(0, u64::MAX)?);
            }
            let active = [self.allocate_frames(0, u64::MAX), self.allocate_frames(0, u64::MAX)];
            let shared = match active {
                [Some(_), Some(_)] => self.allocate_hypervisor_page(domain.id),
                _ => None,
            };
            let (Some(shared), [Some(first), Some(second)]) = (shared, active) else {
                for mfn in active.into_iter().flatten() {
                    self.mm.give_back(mfn, 0);
                }
                return None;
            };
            table.add_frame(&self.platform, shared, [first, second]);
            if budget.step() == Err(Preempted) {
                return Some(Err(Preempted));
            }
        }
    }

    /// What a domain's grants use.
    pub fn grant_usage(&self, domain: &Domain) -> Usage {
        let table = domain.grants.lock();
        Usage { table_frames: table.frames(), mappings: table.mappings(), frames: table.frame_count() }
    }

    /// Fills a reserved entry of a new domain's table: `peer` may use `frame`. For the control interface, which grants the
    /// console and the xenstore page before the domain runs. [`Error::InUse`] when somebody uses the entry.
    pub fn grant_seed(
        &self,
        domain: &Domain,
        gref: GrantRef,
        frame: Mfn,
        peer: DomId,
        readonly: bool,
    ) -> Result<(), Error> {
        if gref.get() >= GNTTAB_NR_RESERVED_ENTRIES {
            return Err(Error::BadReference);
        }
        let entry = Entry::permit(frame, peer, readonly).ok_or(Error::BadPage)?;
        match self.grow_grant_table(domain, 1, &mut Budget::unlimited()) {
            Some(Ok(())) => {}
            _ => return Err(Error::NoSpace),
        }
        let table = domain.grants.lock();
        if !table.active(&self.platform, gref)?.pins.is_none() {
            return Err(Error::InUse);
        }
        let word = table.shared(&self.platform, gref).ok_or(Error::BadReference)?;
        word.store(entry.word(), Ordering::Release);
        Ok(())
    }

    /// Exchanges two entries that nobody uses.
    pub fn grant_swap(&self, domain: &Domain, a: GrantRef, b: GrantRef) -> Result<(), Error> {
        let table = domain.grants.lock();
        if a.get() >= table.entries() || b.get() >= table.entries() {
            return Err(Error::BadReference);
        }
        if a == b || table.frames() == 0 {
            return Ok(());
        }
        for gref in [a, b] {
            if !table.active(&self.platform, gref)?.pins.is_none() {
                return Err(Error::InUse);
            }
        }
        let first = table.shared(&self.platform, a).ok_or(Error::BadReference)?;
        let second = table.shared(&self.platform, b).ok_or(Error::BadReference)?;
        let moved = first.load(Ordering::Acquire);
        first.store(second.swap(moved, Ordering::AcqRel), Ordering::Release);
        Ok(())
    }

    // ── counts ──

    /// Adds `pins` to an entry of `granter` for `user`, marking the shared entry where needed. Returns the frame.
    pub(super) fn pin_grant(
        &self,
        table: &mut GrantTable,
        granter: &Domain,
        gref: GrantRef,
        user: DomId,
        pins: Pins,
        mapping: bool,
    ) -> Result<Mfn, Error> {
        if table.closed || granter.life() != Life::Alive {
            return Err(Error::BadDomain);
        }
        if gref.get() >= table.entries() {
            return Err(Error::BadReference);
        }
        // A table without frames is one of empty entries.
        let word = table.shared(&self.platform, gref).ok_or(Error::Refused)?;
        let active = table.active(&self.platform, gref)?;
        let first = active.pins.is_none();
        if !first && active.user != user {
            return Err(Error::Refused);
        }
        let after = active.pins.plus(pins).ok_or(Error::Refused)?;
        let readonly = !pins.writes();
        let mut frame = active.frame;
        if first || !readonly && !active.pins.writes() {
            let entry = entry::mark(word, first, user, readonly, mapping)?;
            if first {
                let Some(page) = self.mm.get_page(entry.frame(), granter.id) else {
                    entry::unmark(word, marks_gone(active.pins, readonly));
                    return Err(Error::BadPage);
                };
                // Held by the active entry until its last count goes.
                frame = page.into_pte();
            }
        }
        table.set_active(&self.platform, gref, Active { pins: after, user, frame });
        Ok(frame)
    }

    /// Takes `pins` of an entry back. The frames of a dead domain's table go with its last count.
    pub(super) fn unpin_grant(&self, table: &mut GrantTable, gref: GrantRef, pins: Pins) {
        let Ok(active) = table.active(&self.platform, gref) else {
            debug_assert!(false, "{gref:?} is in use without an active entry");
            return;
        };
        let after = active.pins.minus(pins);
        table.set_active(&self.platform, gref, Active { pins: after, ..active });
        if after.is_none() {
            drop(PageRef::from_pte(&self.mm, active.frame));
        }
        if let Some(word) = table.shared(&self.platform, gref) {
            entry::unmark(word, marks_gone(after, !pins.writes()));
        }
        if table.closed && table.used() == 0 {
            self.free_table(table);
        }
    }

    fn free_table(&self, table: &mut GrantTable) {
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
        let mut pair = Pair::lock(user, &granter);
        if pair.user().closed || user.life() != Life::Alive {
            return Err(Error::Refused);
        }
        self.ensure_handle(pair.user())?;
        let frame = self.pin_grant(pair.granter(), &granter, op.gref, user.id, pins, true)?;
        let readonly = flags.contains(MapFlags::READONLY);
        let mapped = self.map_for_device(&granter, frame, flags).and_then(|()| {
            if !flags.contains(MapFlags::HOST_MAP) {
                return Ok(());
            }
            let host = HostPte::new(op.host_addr, flags, root);
            self.map_for_host(user, &granter, host, frame, flags).inspect_err(|_| {
                if flags.contains(MapFlags::DEVICE_MAP) {
                    self.unmap_for_device(frame, readonly);
                }
            })
        });
        if let Err(error) = mapped {
            self.unpin_grant(pair.granter(), op.gref, pins);
            return Err(error);
        }
        let kept =
            flags & (MapFlags::HOST_MAP | MapFlags::DEVICE_MAP | MapFlags::READONLY | MapFlags::CONTAINS_PTE);
        let mapping = Mapping { granter: op.dom, gref: op.gref, flags: kept };
        let handle = pair.user().take_handle(&self.platform, mapping)?;
        Ok((handle, frame))
    }

    /// Sees to it that the table has a free handle.
    fn ensure_handle(&self, table: &mut GrantTable) -> Result<(), Error> {
        let (frame, directory) = table.maptrack_needs()?;
        if directory {
            table.set_maptrack_directory(self.allocate_frames(0, u64::MAX).ok_or(Error::NoSpace)?);
        }
        if frame {
            let mfn = self.allocate_frames(0, u64::MAX).ok_or(Error::NoSpace)?;
            table.add_maptrack_frame(&self.platform, mfn);
        }
        Ok(())
    }

    /// References for a mapping by devices, which no page-table entry holds.
    fn map_for_device(&self, granter: &Domain, frame: Mfn, flags: MapFlags) -> Result<(), Error> {
        if !flags.contains(MapFlags::DEVICE_MAP) {
            return Ok(());
        }
        let page = self.mm.get_page(frame, granter.id).ok_or(Error::Refused)?;
        if flags.contains(MapFlags::READONLY) {
            page.into_pte();
        } else {
            let (page, debt) = page.typed::<Writable>().map_err(|_| Error::Refused)?;
            self.mm.settle(debt, &self.platform);
            page.into_pte();
        }
        Ok(())
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

    /// Replaces the page-table entry of a mapping, which must be one of `frame`, by an empty one.
    fn unmap_for_host(&self, user: &Domain, host: HostPte, frame: Mfn, readonly: bool) -> Result<(), Error> {
        let (table, index) = self.find_host_pte(user, host)?;
        let word = self.platform.frame(table.mfn()).get(index).ok_or(Error::Refused)?;
        for _ in 0..PTE_ATTEMPTS {
            let old = Pte::from_bits(word.load(Ordering::Acquire));
            if !old.is_present() || old.mfn() != frame || old.is_writable() == readonly {
                return Err(Error::Refused);
            }
            let store = Store::IfEqual(old);
            if self.pager().update_l1(&table, index, Pte::EMPTY, store, user.id, self).is_ok() {
                return Ok(());
            }
        }
        Err(Error::Refused)
    }

    /// `unmap_grant_ref`: takes a mapping's page-table entry (`host`, if it is to go) and its mapping for devices
    /// (`device`, its machine address, if it is to go) away. The result must be completed after a TLB flush.
    ///
    /// `Ok(None)` when nothing was asked for that the mapping has.
    pub fn grant_unmap(
        &self,
        user: &Domain,
        handle: u32,
        host: Option<(u64, Option<Mfn>)>,
        device: Option<u64>,
    ) -> Result<Option<Unmapping>, Error> {
        let seen = user.grants.lock().mapping(&self.platform, handle)?;
        // A domain stays registered while frames of it are in use.
        let granter = self.domains.get(seen.granter).ok_or(Error::Refused)?;
        let mut pair = Pair::lock(user, &granter);
        let mapping = pair.user().mapping(&self.platform, handle)?;
        if (mapping.granter, mapping.gref) != (seen.granter, seen.gref) {
            return Err(Error::BadHandle);
        }
        let frame = pair.granter().active(&self.platform, mapping.gref)?.frame;
        let readonly = mapping.flags.contains(MapFlags::READONLY);
        let device = device.filter(|_| mapping.flags.contains(MapFlags::DEVICE_MAP));
        if device.is_some_and(|address| address != frame.get() << 12) {
            return Err(Error::BadDeviceAddress);
        }
        let mut gone = MapFlags::empty();
        if let Some((address, root)) = host.filter(|_| mapping.flags.contains(MapFlags::HOST_MAP)) {
            self.unmap_for_host(user, HostPte::new(address, mapping.flags, root), frame, readonly)?;
            gone |= MapFlags::HOST_MAP;
        }
        if device.is_some() {
            gone |= MapFlags::DEVICE_MAP;
        }
        if gone.is_empty() {
            return Ok(None);
        }
        pair.user().set_mapping(&self.platform, handle, Mapping { flags: mapping.flags - gone, ..mapping });
        drop(pair);
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
        let mut pair = Pair::lock(domain, &granter);
        if pair.user().mapping(&self.platform, handle) != Ok(mapping) {
            return;
        }
        if let Ok(active) = pair.granter().active(&self.platform, mapping.gref)
            && mapping.flags.contains(MapFlags::DEVICE_MAP)
        {
            self.unmap_for_device(active.frame, mapping.flags.contains(MapFlags::READONLY));
        }
        pair.user().set_mapping(&self.platform, handle, Mapping { flags: MapFlags::empty(), ..mapping });
        self.unpin_grant(pair.granter(), mapping.gref, Pins::of(mapping.flags));
    }
}

enum NextMapping {
    None,
    Later,
    Found(u32, Mapping),
}

/// Marks of the shared entry that nothing needs any more when `after` is left and a use that was `readonly` went.
fn marks_gone(after: Pins, readonly: bool) -> GrantFlags {
    let mut marks = GrantFlags::empty();
    if after.is_none() {
        marks |= GrantFlags::READING;
    }
    if !readonly && !after.writes() {
        marks |= GrantFlags::WRITING;
    }
    marks
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

//! `set_version`: from 8-byte entries to 16-byte ones with status frames, and back.
//!
//! A change is *decided* under the table's lock: nobody uses an entry beyond the reserved ones, and when version 2 ends nobody
//! can reach its status frames any more. From then on it cannot fail. What is left is to wipe the shared frames, which goes
//! in steps; meanwhile entries beyond the reserved ones cannot be used by anybody (they are as good as gone), and the reserved
//! ones are used as before. With the first frame, which holds those, the version changes, at one go under the lock.
//!
//! A guest need not call again to have its change finished: then the table stays as it is, decided. Whatever would make it
//! larger, or change it again, finishes it first.

use hypercall_abi::GrantRef;
use hypercall_abi::grant::{GNTTAB_NR_RESERVED_ENTRIES, GTF_PERMIT_ACCESS, GTF_TRANSITIVE, GrantFlags};

use super::entry::{Entry, marks_of};
use super::table::{Change, Missing, Reach, StatusFrames};
use super::{GrantTable, Version};
use crate::domain::Domain;
use crate::hypercall::{Budget, Preempted};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Why the version of a table stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionRefused {
    /// An entry beyond the reserved ones is in use, or somebody maps a status frame.
    InUse,
    /// A reserved entry is being copied from or to in a way that version 1 does not know.
    CopyUnderWay,
    /// Version 1 cannot express a reserved entry: a large frame number, or an entry of another domain.
    NotRepresentable,
    /// No memory for status frames.
    NoMemory,
}

const RESERVED: core::ops::Range<u32> = 0..GNTTAB_NR_RESERVED_ENTRIES;

impl<P: Platform> Hypervisor<P> {
    /// Gives the table of a domain the layout `to`: the reserved entries stay, the others are empty then.
    pub fn set_grant_version(
        &self,
        domain: &Domain,
        to: Version,
        budget: &mut Budget,
    ) -> Result<Result<(), Preempted>, VersionRefused> {
        loop {
            if self.finish_version_change(domain, budget).is_err() {
                return Ok(Err(Preempted));
            }
            if domain.grants.lock().version() == to {
                return Ok(Ok(()));
            }
            match self.grow_grant_table(domain, 1, budget) {
                None => return Err(VersionRefused::NoMemory),
                Some(Err(Preempted)) => return Ok(Err(Preempted)),
                Some(Ok(())) => {}
            }
            if to == Version::V2 {
                let lacks = |table: &GrantTable| {
                    table.version() == Version::V1
                        && table.change.is_none()
                        && table.needs_status_frame(table.frames())
                };
                if lacks(&domain.grants.lock()) {
                    if !self.supply(domain, Missing::StatusFrame, lacks) {
                        return Err(VersionRefused::NoMemory);
                    }
                    if budget.step() == Err(Preempted) {
                        return Ok(Err(Preempted));
                    }
                    continue;
                }
            }
            self.decide(&mut domain.grants.lock(), to)?;
        }
    }

    /// Checks whether the version may change, and if so makes sure that it can.
    fn decide(&self, table: &mut GrantTable, to: Version) -> Result<(), VersionRefused> {
        if table.change.is_some() || table.version() == to {
            // Another vCPU was faster.
            return Ok(());
        }
        if table.uses_beyond_reserved(&self.platform) {
            return Err(VersionRefused::InUse);
        }
        match to {
            // Another vCPU has made the table larger: once more.
            Version::V2 if table.needs_status_frame(table.frames()) => return Ok(()),
            Version::V2 => {}
            Version::V1 => {
                for gref in RESERVED.map(GrantRef::new) {
                    let active = table.active(&self.platform, gref);
                    if active.is_ok_and(|a| !a.pins.is_none() && a.reach != Reach::Page) {
                        return Err(VersionRefused::CopyUnderWay);
                    }
                }
                for gref in RESERVED.map(GrantRef::new) {
                    let Some(entry) = table.shared(&self.platform, gref) else { continue };
                    let (header, frame) = entry.load();
                    match GrantFlags::from_bits_retain(header as u16).kind() {
                        GTF_PERMIT_ACCESS if frame >> 32 == 0 => {}
                        GTF_PERMIT_ACCESS | GTF_TRANSITIVE => return Err(VersionRefused::NotRepresentable),
                        _ => {}
                    }
                }
                if !self.withdraw_status_frames(table) {
                    return Err(VersionRefused::InUse);
                }
                table.status = StatusFrames::Withdrawn;
            }
        }
        table.change = Some(Change { to, clean_from: table.frames() });
        Ok(())
    }

    /// All or none.
    fn withdraw_status_frames(&self, table: &GrantTable) -> bool {
        let frames = || (0..table.status_frames()).map_while(|i| table.status_frame_at(&self.platform, i));
        let withdrawn = frames().take_while(|mfn| self.mm.withdraw_hypervisor_page(*mfn)).count();
        if withdrawn == table.status_frames() as usize {
            return true;
        }
        for mfn in frames().take(withdrawn) {
            self.mm.restore_hypervisor_page(mfn);
        }
        false
    }

    /// Carries out what was decided, a frame at each step.
    pub(super) fn finish_version_change(
        &self,
        domain: &Domain,
        budget: &mut Budget,
    ) -> Result<(), Preempted> {
        loop {
            let mut table = domain.grants.lock();
            let Some(change) = table.change else { return Ok(()) };
            if change.clean_from > 1 {
                let index = change.clean_from - 1;
                if let Some(mfn) = table.shared_frame(&self.platform, index) {
                    self.platform.zero_frame(mfn);
                }
                table.change = Some(Change { clean_from: index, ..change });
            } else {
                self.change_version(&mut table, domain, change.to);
                table.change = None;
            }
            drop(table);
            budget.step()?;
        }
    }

    /// The first frame, the status frames, and the version itself.
    fn change_version(&self, table: &mut GrantTable, domain: &Domain, to: Version) {
        let mut kept = [(0, 0); GNTTAB_NR_RESERVED_ENTRIES as usize];
        for (gref, slot) in RESERVED.map(GrantRef::new).zip(&mut kept) {
            let Some(entry) = table.shared(&self.platform, gref) else { continue };
            let (header, frame) = entry.load();
            let representable = frame >> 32 == 0;
            *slot = match GrantFlags::from_bits_retain(header as u16).kind() {
                GTF_PERMIT_ACCESS if to == Version::V2 || representable => (header & 0xffff_ffff, frame),
                _ if to == Version::V2 => (header & 0xffff_ffff, frame),
                _ => (0, 0),
            };
        }
        if let Some(first) = table.shared_frame(&self.platform, 0) {
            self.platform.zero_frame(first);
        }
        for (gref, (header, frame)) in RESERVED.map(GrantRef::new).zip(kept) {
            // What says how an entry is used is not what the guest may have written, but the active entry.
            let held = table.active(&self.platform, gref).map_or(GrantFlags::empty(), |a| marks_of(a.pins));
            let all = u64::from((GrantFlags::READING | GrantFlags::WRITING).bits());
            match table.entry_as(&self.platform, gref, to) {
                Some(entry @ Entry::V1(_)) => {
                    entry.store(header & !all | u64::from(held.bits()), frame);
                }
                Some(entry @ Entry::V2 { status, .. }) => {
                    status.set(held);
                    entry.store(header & !all, frame);
                }
                None => {}
            }
        }
        match to {
            Version::V1 => {
                while let Some(mfn) = table.take_status_frame(&self.platform) {
                    self.mm.retire_hypervisor_page(mfn);
                }
                table.status = StatusFrames::Prepared;
            }
            Version::V2 => {
                let mut index = 0;
                while let Some(mfn) = table.status_frame_at(&self.platform, index) {
                    self.mm.assign_hypervisor_page(mfn, domain.id);
                    index += 1;
                }
                table.status = StatusFrames::Shared;
            }
        }
        table.set_version(to);
    }
}

//! `transfer`: a frame changes hands.
//!
//! The frame leaves its owner first: nobody but the owner may refer to it, and what TLBs still know of it is flushed, with no
//! lock held. Only then is it given to the domain that has an entry waiting for one. If that fails the frame is free: as
//! public/grant_table.h says, the giver has lost it unless the answer is that the frame is bad.

use hypercall_abi::Mfn;
use hypercall_abi::grant::GnttabTransfer;

use super::Error;
use crate::domain::{Domain, Life};
use crate::hypervisor::Hypervisor;
use crate::mm::m2p::INVALID;
use crate::platform::Platform;

impl<P: Platform> Hypervisor<P> {
    /// `transfer`: one frame of `giver`. [`Error::BadPage`]: it is not the giver's alone, and nothing has changed. Otherwise the
    /// frame is the giver's no more.
    pub fn grant_transfer(&self, giver: &Domain, op: &GnttabTransfer) -> Result<(), Error> {
        let page = self.mm.get_page(op.mfn, giver.id).ok_or(Error::BadPage)?;
        let (mfn, debt) = {
            let mut pages = giver.pages.lock();
            let stolen = self.mm.steal(page, &mut pages).ok_or(Error::BadPage)?;
            pages.discharge(1);
            stolen
        };
        self.mm.m2p().set(mfn, INVALID);
        self.mm.settle(debt, &self.platform);
        self.receive(giver, op, mfn).inspect_err(|_| self.mm.give_back(mfn, 0))
    }

    fn receive(&self, giver: &Domain, op: &GnttabTransfer, mfn: Mfn) -> Result<(), Error> {
        let receiver = self.domains.get(op.domid).ok_or(Error::BadDomain)?;
        let table = receiver.grants.lock();
        if table.closed || receiver.life() != Life::Alive {
            return Err(Error::Refused);
        }
        if op.gref.get() >= table.entries() || table.is_vanishing(op.gref) {
            return Err(Error::Refused);
        }
        let entry = table.shared(&self.platform, op.gref).ok_or(Error::Refused)?;
        let mut pages = receiver.pages.lock();
        pages.charge(1).map_err(|_| Error::Refused)?;
        let pfn = match entry.commit_transfer(giver.id) {
            Ok(pfn) => pfn,
            Err(error) => {
                pages.discharge(1);
                return Err(error);
            }
        };
        self.mm.assign(mfn, receiver.id, &mut pages);
        drop(pages);
        self.mm.m2p().set(mfn, pfn);
        entry.complete_transfer(giver.id, mfn);
        Ok(())
    }
}

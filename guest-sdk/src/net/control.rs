//! The control ring: has the back end keep pages mapped.

use super::NetError;
use crate::events::{Channel, Events};
use crate::grants::GrantedPages;
use crate::memory::Access;
use crate::ring::{Front, SharedPage};
use crate::sync::{First, first};
use crate::time;
use alloc::vec::Vec;
use core::time::Duration;
use hypercall_abi::io::netif::{
    CTRL_GREF_READONLY, CTRL_STATUS_SUCCESS, ControlGref, ControlRequest, ControlResponse, ControlType,
};
use hypercall_abi::{DomId, GrantRef, PAGE_SIZE};
use zerocopy::IntoBytes;

/// How long an answer may take. Without one, pages are copied as ever.
const PATIENCE: Duration = Duration::from_secs(2);

/// The ring.
#[derive(Debug)]
pub(super) struct ControlRing {
    ring: Front<GrantedPages, ControlRequest, ControlResponse>,
    list: GrantedPages,
    channel: Channel,
    asked: u16,
}

impl ControlRing {
    /// Makes one.
    pub(super) fn new(backend: DomId) -> Result<Self, NetError> {
        let page = || GrantedPages::new(1, backend, Access::ReadWrite);
        let (ring, list) = (Front::new(page()?), page()?);
        Ok(Self { ring, list, channel: Events::new().alloc_unbound(backend)?, asked: 0 })
    }

    /// What the back end has to know: the ring's page, and its port.
    pub(super) fn nodes(&self) -> (GrantRef, u32) {
        let gref = self.ring.page().references().first().copied().unwrap_or(GrantRef::new(0));
        (gref, self.channel.port().get())
    }

    /// Has all pages of a queue kept by the back end; false when it does not do that.
    pub(super) async fn keep(&mut self, queue: u32, pages: &GrantedPages, readonly: bool) -> bool {
        let most = PAGE_SIZE / size_of::<ControlGref>();
        let flags = if readonly { CTRL_GREF_READONLY } else { 0 };
        let entry = |gref: &GrantRef| ControlGref { gref: *gref, flags, status: 0 };
        let list: Vec<ControlGref> = pages.references().iter().map(entry).collect();
        if list.len() > most {
            return false;
        }
        self.list.write_bytes(0, list.as_bytes());
        let page = self.list.references().first().map_or(0, |gref| gref.get());
        self.asked = self.asked.wrapping_add(1);
        let request = ControlRequest {
            id: self.asked,
            // At most 10.
            kind: ControlType::AddGrefMapping.number() as u16,
            data: [queue, page, list.len() as u32],
        };
        if self.ring.push(request).is_err() {
            return false;
        }
        if self.ring.publish() {
            let _ = self.channel.notify();
        }
        let mut patience = core::pin::pin!(time::after(PATIENCE));
        loop {
            match self.ring.pop() {
                Ok(Some(response)) => {
                    return response.id == self.asked && response.status == CTRL_STATUS_SUCCESS;
                }
                Ok(None) => {}
                Err(_) => return false,
            }
            if !self.ring.prepare_to_wait()
                && let First::Other(()) = first(self.channel.fired(), patience.as_mut()).await
            {
                return false;
            }
        }
    }
}

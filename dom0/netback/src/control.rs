//! The control ring: pages that a front end wants kept mapped.
//!
//! A page that is used again and again is cheaper to read and write where it is mapped than to have copied each time. Whoever copies looks
//! there first; frames and rings know nothing of it.

use crate::Closed;
use alloc::vec;
use alloc::vec::Vec;
use guest_sdk::ring::{Back, SharedPage};
use hypercall_abi::GrantRef;
use hypercall_abi::PAGE_SIZE;
use hypercall_abi::io::netif::{
    CTRL_STATUS_INVALID_PARAMETER, CTRL_STATUS_NOT_SUPPORTED, CTRL_STATUS_SUCCESS, ControlGref,
    ControlRequest, ControlResponse, ControlType,
};

/// Pages kept for a queue: as many as a ring each has slots.
pub const KEPT: u32 = 512;
/// Requests of a turn.
const REQUESTS: usize = 8;

const _: () = assert!(KEPT as usize * size_of::<ControlGref>() <= PAGE_SIZE);

/// Who maps a guest's pages.
pub trait Keeper {
    /// Reads a list from the start of a page that the guest has granted; false when it cannot be read.
    fn read(&mut self, page: GrantRef, list: &mut [ControlGref]) -> bool;

    /// Writes it back.
    fn write(&mut self, page: GrantRef, list: &[ControlGref]) -> bool;

    /// Maps all of them, or none; false when one is not granted so, or kept already.
    fn add(&mut self, list: &[ControlGref]) -> bool;

    /// Unmaps one; false when it is not kept.
    fn remove(&mut self, page: GrantRef) -> bool;
}

/// The control ring of a card.
pub struct Control<M> {
    ring: Back<M, ControlRequest, ControlResponse>,
    queues: u32,
    kept: u32,
}

impl<M: SharedPage> Control<M> {
    /// Takes over the ring of a card with so many queues.
    pub fn new(page: M, queues: u32) -> Self {
        Self { ring: Back::new(page), queues, kept: 0 }
    }

    /// Answers what is asked. Whether the front end wants to be notified, and whether there may be more.
    ///
    /// # Errors
    /// [`Closed`]: an index is out of range.
    pub fn turn(&mut self, keeper: &mut impl Keeper) -> Result<(bool, bool), Closed> {
        let mut answered = 0;
        while answered < REQUESTS {
            let Some(request) = self.ring.pop()? else { break };
            let (status, data) = self.answer(&request, keeper);
            self.ring.push(ControlResponse { id: request.id, kind: request.kind, status, data });
            answered += 1;
        }
        let notify = answered > 0 && self.ring.publish();
        Ok((notify, answered == REQUESTS || self.ring.prepare_to_wait()))
    }

    fn answer(&mut self, request: &ControlRequest, keeper: &mut impl Keeper) -> (u32, u32) {
        let [queue, page, count] = request.data;
        let kind = ControlType::from_number(request.kind.into());
        let invalid = (CTRL_STATUS_INVALID_PARAMETER, 0);
        let size = kind == Some(ControlType::GetGrefMappingSize);
        match kind {
            _ if !size
                && !matches!(kind, Some(ControlType::AddGrefMapping | ControlType::DelGrefMapping)) =>
            {
                (CTRL_STATUS_NOT_SUPPORTED, 0)
            }
            _ if queue >= self.queues => invalid,
            _ if size => (CTRL_STATUS_SUCCESS, KEPT),
            _ if !(1..=KEPT).contains(&count) => invalid,
            kind => {
                let page = GrantRef::new(page);
                let mut list = vec![ControlGref::default(); count as usize];
                if !keeper.read(page, &mut list) {
                    return invalid;
                }
                if kind == Some(ControlType::AddGrefMapping) {
                    self.add(&list, keeper)
                } else {
                    self.remove(page, list, keeper)
                }
            }
        }
    }

    fn add(&mut self, list: &[ControlGref], keeper: &mut impl Keeper) -> (u32, u32) {
        // At most 512 more than there are.
        let after = self.kept + list.len() as u32;
        if after > KEPT * self.queues || !keeper.add(list) {
            return (CTRL_STATUS_INVALID_PARAMETER, 0);
        }
        self.kept = after;
        (CTRL_STATUS_SUCCESS, 0)
    }

    fn remove(&mut self, page: GrantRef, mut list: Vec<ControlGref>, keeper: &mut impl Keeper) -> (u32, u32) {
        let mut removed = 0;
        for entry in &mut list {
            let found = keeper.remove(entry.gref);
            removed += u32::from(found);
            // Both are small numbers.
            entry.status = if found { CTRL_STATUS_SUCCESS } else { CTRL_STATUS_INVALID_PARAMETER } as u16;
        }
        self.kept = self.kept.saturating_sub(removed);
        if !keeper.write(page, &list) {
            return (CTRL_STATUS_INVALID_PARAMETER, removed);
        }
        (CTRL_STATUS_SUCCESS, removed)
    }
}

#[cfg(test)]
mod tests {
    use super::{Control, KEPT, Keeper};
    use crate::Closed;
    use alloc::vec::Vec;
    use core::sync::atomic::Ordering;
    use guest_sdk::ring::host::HostPages;
    use guest_sdk::ring::{Front, SharedPage};
    use hashbrown::HashMap;
    use hypercall_abi::GrantRef;
    use hypercall_abi::io::netif::{
        CTRL_STATUS_INVALID_PARAMETER as INVALID, CTRL_STATUS_NOT_SUPPORTED as NOT_SUPPORTED,
        CTRL_STATUS_SUCCESS as SUCCESS, ControlGref, ControlRequest, ControlResponse,
    };

    /// Lists of a guest's by their page, and what is kept; pages from 1000 on are not granted.
    #[derive(Default)]
    struct Host {
        lists: HashMap<u32, Vec<ControlGref>>,
        kept: Vec<u32>,
    }

    impl Keeper for Host {
        fn read(&mut self, page: GrantRef, list: &mut [ControlGref]) -> bool {
            let Some(from) = self.lists.get(&page.get()) else { return false };
            list.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            true
        }
        fn write(&mut self, page: GrantRef, list: &[ControlGref]) -> bool {
            self.lists.insert(page.get(), list.to_vec()).is_some()
        }
        fn add(&mut self, list: &[ControlGref]) -> bool {
            let bad = |entry: &ControlGref| entry.gref.get() >= 1000 || self.kept.contains(&entry.gref.get());
            if list.iter().any(bad) {
                return false;
            }
            self.kept.extend(list.iter().map(|entry| entry.gref.get()));
            true
        }
        fn remove(&mut self, page: GrantRef) -> bool {
            let before = self.kept.len();
            self.kept.retain(|kept| *kept != page.get());
            self.kept.len() < before
        }
    }

    fn list(grefs: impl IntoIterator<Item = u32>) -> Vec<ControlGref> {
        grefs.into_iter().map(|gref| ControlGref { gref: GrantRef::new(gref), flags: 0, status: 9 }).collect()
    }

    #[test]
    fn pages_are_kept_until_they_are_given_back() {
        let page = HostPages::new(1, 0);
        let mut front: Front<_, ControlRequest, ControlResponse> = Front::new(page.clone());
        let mut control = Control::new(page, 1);
        let mut host = Host::default();
        host.lists.insert(1, list(100..164));
        host.lists.insert(2, list([100, 7, 101]));
        host.lists.insert(3, list([500, 1000]));
        host.lists.insert(4, list(164..164 + KEPT));
        let mut ask = |host: &mut Host, kind: u16, data| {
            front.push(ControlRequest { id: 77, kind, data }).unwrap();
            let _ = front.publish();
            assert_eq!(control.turn(host).map(|(_, more)| more), Ok(false));
            let response = front.pop().unwrap().unwrap();
            assert_eq!((response.id, response.kind), (77, kind));
            (response.status, response.data)
        };
        assert_eq!(ask(&mut host, 8, [0, 0, 0]), (SUCCESS, KEPT));
        assert_eq!(ask(&mut host, 8, [1, 0, 0]), (INVALID, 0), "there is one queue");
        for kind in [0, 1, 7, 11, u16::MAX] {
            assert_eq!(ask(&mut host, kind, [0, 1, 3]), (NOT_SUPPORTED, 0), "{kind}");
        }
        for data in [[1, 1, 64], [0, 99, 64], [0, 1, 0], [0, 1, KEPT + 1], [0, 1, u32::MAX], [0, 3, 2]] {
            assert_eq!(ask(&mut host, 9, data), (INVALID, 0), "{data:?}");
            assert!(host.kept.is_empty());
        }
        assert_eq!(ask(&mut host, 9, [0, 1, 64]), (SUCCESS, 0));
        assert_eq!(host.kept.len(), 64);
        assert_eq!(ask(&mut host, 9, [0, 1, 64]), (INVALID, 0), "they are kept already");
        assert_eq!(ask(&mut host, 9, [0, 4, KEPT]), (INVALID, 0), "more than are kept");
        assert_eq!(host.kept.len(), 64);
        assert_eq!(ask(&mut host, 10, [0, 2, 3]), (SUCCESS, 2));
        let statuses: Vec<u16> = host.lists[&2].iter().map(|entry| entry.status).collect();
        assert_eq!(statuses, [SUCCESS as u16, INVALID as u16, SUCCESS as u16]);
        assert_eq!(host.kept.len(), 62);
    }

    #[test]
    fn a_wild_index_ends_it() {
        let page = HostPages::new(1, 0);
        page.word(0).store(1000, Ordering::Relaxed);
        assert_eq!(Control::new(page, 1).turn(&mut Host::default()), Err(Closed));
    }
}

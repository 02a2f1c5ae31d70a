//! What is on its way to clients: replies and watch events.

use super::{Client, ClientId, Domain, INTRODUCE, Output, Store};
use crate::permissions::Permissions;
use crate::tree::Event;
use crate::wire;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType, PAYLOAD_MAX};
use rpds::{QueueSync, RedBlackTreeSetSync};

/// How long an event waits for a domain that takes nothing from its ring.
const PATIENCE_NS: u64 = 20_000_000_000;
/// Expired events are looked for no more often than this.
const EXPIRY_STEP_NS: u64 = 1_000_000_000;

impl Store {
    /// The next message for a client, taken out, as bytes.
    pub fn next_output(&mut self, client: ClientId) -> Option<Vec<u8>> {
        let sender = self.clients.get_mut(&client)?;
        let output = sender.queue.peek()?.clone();
        sender.queue.dequeue_mut();
        let bytes = wire::encode(output.header, &output.payload);
        sender.left(&output);
        match output.event {
            Some((_, cause)) => self.uncause(cause),
            None => {
                let outstanding = self.outstanding_of(client);
                if let Some(sender) = self.clients.get_mut(&client)
                    && sender.replies + 1 == outstanding
                {
                    self.woken.push(client);
                }
            }
        }
        Some(bytes)
    }

    /// When to look for events that have waited too long; `None` when none wait.
    #[must_use]
    pub fn next_expiry(&self) -> Option<u64> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// Whether something waits to be sent to a client.
    #[must_use]
    pub fn has_output(&self, client: ClientId) -> bool {
        self.clients.get(&client).is_some_and(|client| !client.queue.is_empty())
    }

    /// Clients that have something to be sent, or may send again, since this was last asked.
    pub fn take_woken(&mut self) -> Vec<ClientId> {
        core::mem::take(&mut self.woken)
    }

    /// Whether a client may send requests: it may not while too much of what it caused has not been taken.
    #[must_use]
    pub fn may_request(&self, client: ClientId) -> bool {
        let Some(known) = client.domain().and_then(|domain| self.domains.get(&domain)) else { return true };
        let replies = self.clients.get(&client).map_or(0, |client| client.replies);
        known.usage.caused < known.quota.outstanding && replies < known.quota.outstanding
    }

    /// Gives up events that domains have not taken for 20 s. Gives the time at which to look again, if any wait.
    pub fn expire(&mut self, now_ns: u64) -> Option<u64> {
        while let Some(&(at, client)) = self.expiries.first() {
            if at > now_ns {
                return Some(at.max(now_ns + EXPIRY_STEP_NS));
            }
            self.expiries.remove_mut(&(at, client));
            let Some(slow) = self.clients.get_mut(&client) else { continue };
            slow.expiry_ns = None;
            let due = |output: &Output| output.event.is_some_and(|(deadline, _)| deadline <= now_ns);
            let (gone, kept): (Vec<_>, Vec<_>) = slow.queue.iter().cloned().partition(due);
            slow.queue = kept.into_iter().collect();
            gone.iter().for_each(|output| slow.left(output));
            if let Some(next) = slow.queue.iter().filter_map(|output| output.event).map(|(at, _)| at).min() {
                // Not once for each event: those that end within a second end together.
                slow.expiry_ns = Some(next.max(now_ns + EXPIRY_STEP_NS));
                slow.expiry_ns.into_iter().for_each(|at| self.expiries.insert_mut((at, client)));
            }
            gone.iter().filter_map(|output| output.event).for_each(|(_, cause)| self.uncause(cause));
        }
        None
    }

    /// Puts a reply on its way.
    pub(super) fn reply(&mut self, client: ClientId, header: MessageHeader, payload: &[u8]) {
        let Some(to) = self.clients.get_mut(&client) else { return };
        to.replies += 1;
        to.queue.enqueue_mut(Output { header, payload: Arc::from(payload), event: None });
        self.woken.push(client);
    }

    /// Tells everybody who watches for what has happened and may know.
    pub(super) fn tell(&mut self, event: &Event, cause: Option<DomId>, now_ns: u64) {
        let mut messages = Vec::new();
        self.watches.on_the_way(&event.path, |names, client, token, watch| {
            let below = event.path.names().count() - names;
            let near = watch.depth.is_none_or(|depth| below <= depth as usize);
            if near && (below == 0 || !event.exact) && self.may_hear(client, &event.readable) {
                let told = event.path.as_str().get(watch.hidden..).unwrap_or("");
                messages.push((watch.order, client, payload(told, token)));
            }
        });
        self.send_events(messages, cause, now_ns);
    }

    fn may_hear(&self, client: ClientId, readable: &[Permissions]) -> bool {
        let asker = self.asker(client);
        asker.privileged || readable.iter().any(|list| list.access(&asker).read)
    }

    /// Tells those who watch for domains that come or go, and may.
    pub(super) fn tell_special(&mut self, name: &'static str, domain: DomId, now_ns: u64) {
        let list = [if name == INTRODUCE { self.introduce.clone() } else { self.release.clone() }];
        let of_domain = format!("{name}/{domain}");
        let mut messages = Vec::new();
        for (path, one) in [(name, false), (of_domain.as_str(), true)] {
            for (client, token, watch) in self.watches.at(path) {
                if self.may_hear(client, &list) {
                    // Depth 1 asks for the domain's number.
                    let told = if one || watch.depth == Some(1) { &of_domain } else { name };
                    messages.push((watch.order, client, payload(told, token)));
                }
            }
        }
        self.send_events(messages, None, now_ns);
    }

    /// Puts the events of one change on their way, in the order in which their watches were made, as Xen's xenstored does.
    fn send_events(
        &mut self,
        mut messages: Vec<(u64, ClientId, Arc<[u8]>)>,
        cause: Option<DomId>,
        now_ns: u64,
    ) {
        messages.sort_unstable_by_key(|(order, ..)| *order);
        for (_, client, message) in messages {
            self.send_event(client, message, cause, now_ns);
        }
    }

    /// Puts an event on its way, unless it would say what another one in the queue says already, or the client takes too
    /// little of what it is sent.
    pub(super) fn send_event(
        &mut self,
        client: ClientId,
        payload: Arc<[u8]>,
        cause: Option<DomId>,
        now_ns: u64,
    ) {
        let known = client.domain().and_then(|domain| self.domains.get(&domain));
        let room = known.map_or(usize::MAX, |known: &Domain| known.quota.memory as usize);
        let Some(to) = self.clients.get_mut(&client) else { return };
        let bytes = payload.len() + size_of::<Output>();
        // Special events say that one more domain came or went: each counts.
        let special = payload.first() == Some(&b'@');
        if payload.len() > PAYLOAD_MAX
            || to.queued + bytes > room
            || (!special && to.waiting.contains(&payload))
        {
            return;
        }
        if !special {
            to.waiting.insert_mut(Arc::clone(&payload));
        }
        to.queued += bytes;
        let deadline = now_ns.saturating_add(PATIENCE_NS);
        // The control domain's own parts are not given up on.
        let cause = cause.filter(|_| client.domain().is_some());
        if client.domain().is_some() && to.expiry_ns.is_none() {
            to.expiry_ns = Some(deadline);
            self.expiries.insert_mut((deadline, client));
        }
        let deadline = if client.domain().is_some() { deadline } else { u64::MAX };
        let header = MessageHeader { kind: MessageType::WatchEvent.number(), ..MessageHeader::default() };
        to.queue.enqueue_mut(Output { header, payload, event: Some((deadline, cause)) });
        if let Some(causing) = cause.and_then(|cause| self.domains.get_mut(&cause)) {
            causing.usage.caused += 1;
        }
        self.woken.push(client);
    }

    /// An event that a domain caused is not on its way any more.
    fn uncause(&mut self, cause: Option<DomId>) {
        let Some(cause) = cause else { return };
        let Some(known) = self.domains.get_mut(&cause) else { return };
        known.usage.caused = known.usage.caused.saturating_sub(1);
        if known.usage.caused + 1 == known.quota.outstanding {
            self.woken.push(ClientId::of(cause));
        }
    }

    fn outstanding_of(&self, client: ClientId) -> u32 {
        let known = client.domain().and_then(|domain| self.domains.get(&domain));
        known.map_or(u32::MAX, |known| known.quota.outstanding)
    }

    /// Drops what is on its way to a client.
    pub(super) fn drop_output(&mut self, client: ClientId) {
        let Some(gone) = self.clients.get_mut(&client) else { return };
        if let Some(at) = gone.expiry_ns.take() {
            self.expiries.remove_mut(&(at, client));
        }
        gone.waiting = RedBlackTreeSetSync::new_sync();
        (gone.queued, gone.replies) = (0, 0);
        let queue = core::mem::replace(&mut gone.queue, QueueSync::new_sync());
        queue.iter().filter_map(|output| output.event).for_each(|(_, cause)| self.uncause(cause));
    }
}

impl Client {
    /// Keeps the counts when a message has left the queue.
    fn left(&mut self, output: &Output) {
        if output.event.is_some() {
            self.waiting.remove_mut(&output.payload);
            self.queued = self.queued.saturating_sub(output.payload.len() + size_of::<Output>());
        } else {
            self.replies = self.replies.saturating_sub(1);
        }
    }
}

/// An event as the wire has it.
pub(super) fn payload(path: &str, token: &[u8]) -> Arc<[u8]> {
    [path.as_bytes(), b"\0", token, b"\0"].concat().into()
}

//! The store: domains, clients, and what is on its way to them.
//!
//! All that it knows is in persistent maps, so a clone of the whole store is some references: a request can be made on a clone, which
//! then takes the place of the store, or never does.

mod control;
mod events;
mod requests;

use crate::permissions::{Access, Asker, Life, Permission, Permissions};
use crate::transaction::{Change, Transaction};
use crate::tree::{Effects, Found, Node, Plant, Tree};
use crate::watches::Watches;
use crate::{Error, Path, Quota, Usage};
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::hash::{BuildHasherDefault, Hasher};
use hashbrown::HashMap;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::MessageHeader;
use rpds::{HashTrieMapSync, QueueSync, RedBlackTreeMapSync, RedBlackTreeSetSync};

/// How much of what was replaced open transactions may keep alive, in bytes, for the whole store.
const PINNED_MAX: u64 = 8 << 20;
/// What a change may leave behind for a snapshot: nodes and map entries on its way from the root.
const PATH_BYTES: u64 = 4096;
/// Bytes that a watch is charged with beside its path and token.
const WATCH_BYTES: usize = 192;
/// Special paths.
const INTRODUCE: &str = "@introduceDomain";
const RELEASE: &str = "@releaseDomain";
/// The reply to what has nothing else to say.
const OK: &[u8] = b"OK\0";

/// Somebody who sends requests: a domain through its ring, or one of the control domain's own parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(u32);

impl ClientId {
    /// The client that a domain is.
    #[must_use]
    pub const fn of(domain: DomId) -> ClientId {
        ClientId(domain.get() as u32)
    }

    /// The domain that the client is; `None` for a part of the control domain.
    #[must_use]
    pub const fn domain(self) -> Option<DomId> {
        if self.0 <= u16::MAX as u32 { Some(DomId::new(self.0 as u16)) } else { None }
    }
}

/// What the one who has the rings must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect to a domain, then call [`Store::introduced`] and [`Store::answer`].
    Introduce {
        /// Who asked, to be answered.
        client: ClientId,
        /// The request's header.
        header: MessageHeader,
        /// The domain.
        domain: DomId,
        /// Its port, unbound, for the domain that the store is in.
        port: u32,
    },
    /// Close the connection to a domain; the store has forgotten it.
    Release {
        /// The domain.
        domain: DomId,
    },
}

/// A node of [`Store::plant`].
#[derive(Clone, Copy, Debug)]
pub struct NewNode<'a> {
    /// Its path below the top, of the form that paths have; empty for the top itself.
    pub below: &'a str,
    /// Its value; empty, and it keeps the one that it has.
    pub value: &'a [u8],
    /// Its permissions, if they are to be other than those above it.
    pub permissions: Option<&'a [Permission]>,
}

#[derive(Clone, Debug)]
struct Domain {
    life: Life,
    introduced: bool,
    /// Its end was told, and is not told again.
    shut_down: bool,
    /// On whose behalf it may act, too: that domain, not the next of its number.
    target: Option<Life>,
    usage: Usage,
    quota: Quota,
    /// Hardly ever changed by a guest, so copied whole then.
    tops: Arc<BTreeSet<Path>>,
}

#[derive(Clone, Debug)]
struct Client {
    home: Arc<Path>,
    watches: RedBlackTreeSetSync<(Arc<str>, Arc<[u8]>)>,
    transactions: RedBlackTreeMapSync<u32, Transaction>,
    next_transaction: u32,
    queue: QueueSync<Output>,
    /// Watch events in the queue: one that waits says all that a second could.
    waiting: RedBlackTreeSetSync<Arc<[u8]>>,
    /// Bytes of watch events in the queue.
    queued: usize,
    replies: u32,
    /// When the oldest event in the queue is given up; as entered in `Store::expiries`.
    expiry_ns: Option<u64>,
}

#[derive(Clone, Debug)]
struct Output {
    header: MessageHeader,
    payload: Arc<[u8]>,
    /// For events: when it is given up, and whose request caused it.
    event: Option<(u64, Option<DomId>)>,
}

/// A persistent map by small numbers: as deep for a thousand as for ten.
type ByNumber<K, V> = HashTrieMapSync<K, V, BuildHasherDefault<Number>>;

/// The number itself is its hash: nobody chooses numbers that collide, and those of one time lie side by side.
#[derive(Clone, Copy, Debug, Default)]
struct Number(u64);

impl Hasher for Number {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0 << 8 | u64::from(*byte));
    }
    fn write_u16(&mut self, number: u16) {
        self.0 = number.into();
    }
    fn write_u32(&mut self, number: u32) {
        self.0 = number.into();
    }
}

/// The whole store.
#[derive(Clone, Debug)]
pub struct Store {
    tree: Tree,
    stamp: u64,
    watches: Watches,
    introduce: Permissions,
    release: Permissions,
    domains: ByNumber<DomId, Domain>,
    /// What the control domain has taken: beside its entry among the domains, since most nodes are its own.
    own: Usage,
    clients: ByNumber<ClientId, Client>,
    next_client: u32,
    lives: u32,
    quota: Quota,
    /// Open transactions, from the oldest.
    open: RedBlackTreeMapSync<u64, (ClientId, u32)>,
    /// Counts transactions and watches.
    orders: u64,
    /// Bytes that changes have replaced while transactions were open.
    replaced: u64,
    expiries: RedBlackTreeSetSync<(u64, ClientId)>,
    woken: Vec<ClientId>,
    /// Nothing more is kept for domains.
    full: bool,
    probe: Option<fn()>,
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// A store with `/tool/xenstored`, whose control domain is domain 0.
    #[must_use]
    pub fn new() -> Self {
        let control = Life { domain: DomId::ZERO, number: 1 };
        let nobody = Permissions::new((control, Access::NONE), core::iter::empty());
        let mut store = Self {
            tree: Tree::new(control, 1),
            stamp: 1,
            watches: Watches::default(),
            introduce: nobody.clone(),
            release: nobody,
            domains: ByNumber::default(),
            own: Usage { nodes: 1, ..Usage::default() },
            clients: ByNumber::default(),
            next_client: u32::from(u16::MAX) + 1,
            lives: 1,
            quota: Quota::default(),
            open: RedBlackTreeMapSync::new_sync(),
            orders: 0,
            replaced: 0,
            expiries: RedBlackTreeSetSync::new_sync(),
            woken: Vec::new(),
            full: false,
            probe: None,
        };
        store.domains.insert_mut(DomId::ZERO, Domain { introduced: true, ..store.domain(control) });
        let asker = store.control();
        if let Ok(path) = Path::absolute("/tool/xenstored") {
            let _ = store.apply(Change::Make(path), &asker, None, 0);
        }
        store
    }

    fn domain(&self, life: Life) -> Domain {
        Domain {
            life,
            introduced: false,
            shut_down: false,
            target: None,
            usage: Usage::default(),
            quota: self.quota,
            tops: Arc::default(),
        }
    }

    fn control(&self) -> Asker {
        Asker { life: Life { domain: DomId::ZERO, number: 1 }, privileged: true, target: None }
    }

    /// A domain exists from here on: permissions can name it.
    ///
    /// One of the same number that was there before is gone.
    pub fn add_domain(&mut self, domain: DomId, now_ns: u64) {
        self.remove_domain(domain, now_ns);
        self.lives = self.lives.wrapping_add(1).max(2);
        let made = self.domain(Life { domain, number: self.lives });
        self.domains.insert_mut(domain, made);
    }

    /// A domain that exists is connected: it may send requests as [`ClientId::of`] it.
    ///
    /// What it had before, as a client, is dropped.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a domain that does not exist, [`Error::Invalid`] for the control domain.
    pub fn introduced(&mut self, domain: DomId, now_ns: u64) -> Result<(), Error> {
        if domain == DomId::ZERO {
            return Err(Error::Invalid);
        }
        let known = self.domains.get_mut(&domain).ok_or(Error::NotFound)?;
        let first = !core::mem::replace(&mut known.introduced, true);
        self.disconnect(ClientId::of(domain));
        self.clients.insert_mut(ClientId::of(domain), Client::new(Arc::new(Path::home(domain))));
        if first {
            self.tell_special(INTRODUCE, domain, now_ns);
        }
        Ok(())
    }

    /// A domain has ended, but exists still: those who watch for that are told, once.
    pub fn shut_down(&mut self, domain: DomId, now_ns: u64) {
        let Some(known) = self.domains.get_mut(&domain) else { return };
        if known.introduced && !core::mem::replace(&mut known.shut_down, true) {
            self.tell_special(RELEASE, domain, now_ns);
        }
    }

    /// A domain does not exist any more: its nodes go, with all below them.
    pub fn remove_domain(&mut self, domain: DomId, now_ns: u64) {
        if domain == DomId::ZERO || !self.domains.contains_key(&domain) {
            return;
        }
        self.disconnect(ClientId::of(domain));
        let control = self.control();
        let tops = self.domains.get_mut(&domain).map(|known| core::mem::take(Arc::make_mut(&mut known.tops)));
        for path in tops.into_iter().flatten() {
            // One that was below another is gone already.
            let _ = self.apply(Change::Remove(path), &control, None, now_ns);
        }
        let introduced = self.is_introduced(domain);
        self.domains.remove_mut(&domain);
        if introduced {
            self.tell_special(RELEASE, domain, now_ns);
        }
    }

    /// A part of the control domain as a client, with all rights and relative paths below `/local/domain/0`.
    pub fn connect(&mut self) -> ClientId {
        let client = ClientId(self.next_client);
        self.next_client = self.next_client.checked_add(1).unwrap_or(u32::from(u16::MAX) + 1);
        self.clients.insert_mut(client, Client::new(Arc::new(Path::home(DomId::ZERO))));
        client
    }

    /// A client begins anew: no watches, no transactions, nothing on its way.
    pub fn reset(&mut self, client: ClientId) {
        let Some(old) = self.clients.get(&client) else { return };
        let home = Arc::clone(&old.home);
        self.disconnect(client);
        self.clients.insert_mut(client, Client::new(home));
    }

    /// A client is gone.
    pub fn disconnect(&mut self, client: ClientId) {
        self.drop_watches(client);
        self.drop_transactions(client);
        self.drop_output(client);
        self.clients.remove_mut(&client);
    }

    fn drop_watches(&mut self, client: ClientId) {
        let Some(gone) = self.clients.get_mut(&client) else { return };
        let mut bytes = 0;
        let watches = core::mem::replace(&mut gone.watches, RedBlackTreeSetSync::new_sync());
        for (path, token) in watches.iter() {
            self.watches.remove(path, client, token);
            bytes += watch_bytes(path, token);
        }
        if let Some(usage) = self.usage_of(client) {
            usage.watches = 0;
            usage.memory = usage.memory.saturating_sub(bytes);
        }
    }

    fn drop_transactions(&mut self, client: ClientId) {
        let Some(gone) = self.clients.get_mut(&client) else { return };
        let transactions = core::mem::replace(&mut gone.transactions, RedBlackTreeMapSync::new_sync());
        for transaction in transactions.values() {
            self.forget_transaction(client, transaction);
        }
    }

    /// Takes a transaction out of the accounts.
    fn forget_transaction(&mut self, client: ClientId, transaction: &Transaction) {
        self.open.remove_mut(&transaction.order);
        if let Some(usage) = self.usage_of(client) {
            usage.transactions = usage.transactions.saturating_sub(1);
            usage.memory = usage.memory.saturating_sub(transaction.bytes as u32);
        }
    }

    fn usage_of(&mut self, client: ClientId) -> Option<&mut Usage> {
        match client.domain()? {
            DomId::ZERO => Some(&mut self.own),
            domain => Some(&mut self.domains.get_mut(&domain)?.usage),
        }
    }

    /// What a domain has taken.
    #[must_use]
    pub fn usage(&self, domain: DomId) -> Option<Usage> {
        let known = self.domains.get(&domain)?;
        Some(if domain == DomId::ZERO { self.own } else { known.usage })
    }

    /// Whether a domain has been introduced.
    #[must_use]
    pub fn is_introduced(&self, domain: DomId) -> bool {
        self.domains.get(&domain).is_some_and(|known| known.introduced)
    }

    /// Sets the limits of one domain, or those with which domains begin.
    pub fn set_quota(&mut self, domain: Option<DomId>, quota: Quota) {
        match domain {
            Some(domain) => {
                if let Some(known) = self.domains.get_mut(&domain) {
                    known.quota = quota;
                }
            }
            None => self.quota = quota,
        }
    }

    /// Makes a node as the control domain does, without a message: with this value, or empty, and with these permissions, if they are to
    /// be other than those above it.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the owner that they name does not exist, [`Error::Invalid`] when they name none.
    pub fn set(
        &mut self,
        path: Path,
        value: &[u8],
        permissions: Option<&[Permission]>,
        now_ns: u64,
    ) -> Result<(), Error> {
        let control = self.control();
        let list = permissions.map(|entries| self.list(entries)).transpose()?;
        let change = if value.is_empty() {
            Change::Make(path.clone())
        } else {
            Change::Write(path.clone(), Arc::from(value))
        };
        self.apply(change, &control, None, now_ns)?;
        match list {
            Some(list) => self.apply(Change::Permit(path, list), &control, None, now_ns),
            None => Ok(()),
        }
    }

    /// Makes many nodes at `top` and below it as [`Store::set`] makes one, in the order in which they stand.
    ///
    /// # Errors
    /// As there; nothing is changed then.
    pub fn plant(&mut self, top: &Path, nodes: &[NewNode<'_>], now_ns: u64) -> Result<(), Error> {
        let mut lists: Vec<(&[Permission], Permissions)> = Vec::new();
        for entries in nodes.iter().filter_map(|node| node.permissions) {
            if lists.iter().all(|(known, _)| *known != entries) {
                lists.push((entries, self.list(entries)?));
            }
        }
        if !self.open.is_empty() || self.watches.concern(top) {
            return nodes.iter().try_for_each(|node| {
                let path = if node.below.is_empty() { top.clone() } else { top.child(node.below) };
                self.set(path, node.value, node.permissions, now_ns)
            });
        }
        // Nobody is to be told of any of it.
        let list = |entries: &[Permission]| {
            lists.iter().find(|(known, _)| *known == entries).map(|(_, list)| list.clone())
        };
        let plants: Vec<Plant<'_>> = nodes
            .iter()
            .map(|node| Plant {
                below: node.below,
                value: node.value,
                permissions: node.permissions.and_then(list),
            })
            .collect();
        let control = self.control();
        self.stamp += 1;
        let mut effects = Effects { silent: true, ..Effects::default() };
        self.tree.plant(top, &plants, &control, self.stamp, &mut effects);
        self.settle(effects, &control, 0, now_ns);
        Ok(())
    }

    /// Removes a node and all below it, as the control domain does, without a message; it need not be there.
    pub fn unset(&mut self, path: Path, now_ns: u64) {
        let control = self.control();
        let _ = self.apply(Change::Remove(path), &control, None, now_ns);
    }

    /// Says whether there is no memory for more than is kept now. While it is so, what would have something kept for a domain is
    /// [`Error::Memory`]; its quotas count beside.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
    }

    /// For tests of what becomes of a store whose request fails in its middle: `probe` is called at the places where a request has
    /// changed a part of what it changes.
    pub fn set_probe(&mut self, probe: Option<fn()>) {
        self.probe = probe;
    }

    fn probe(&self) {
        if let Some(probe) = self.probe {
            probe();
        }
    }

    fn asker(&self, client: ClientId) -> Asker {
        let Some(domain) = client.domain().filter(|domain| *domain != DomId::ZERO) else {
            return self.control();
        };
        let known = self.domains.get(&domain);
        let target = known.and_then(|known| known.target);
        Asker {
            // One that does not exist owns nothing and is named nowhere.
            life: self.life(domain),
            privileged: false,
            target: target.filter(|target| self.life(target.domain) == *target),
        }
    }

    /// The limits of who asks; `None` when there are none.
    fn limits(&self, asker: &Asker) -> Option<(Quota, Usage)> {
        if asker.privileged {
            return None;
        }
        let known = self.domains.get(&asker.life.domain);
        Some(known.map_or_else(Default::default, |known| (known.quota, known.usage)))
    }

    fn life(&self, domain: DomId) -> Life {
        self.domains.get(&domain).map_or(Life { domain, number: 0 }, |known| known.life)
    }

    fn list(&self, entries: &[Permission]) -> Result<Permissions, Error> {
        let life = |entry: &Permission| (self.life(entry.domain), entry.access);
        let (owner, others) = entries.split_first().ok_or(Error::Invalid)?;
        let owner = life(owner);
        if owner.0.number == 0 {
            return Err(Error::NotFound);
        }
        Ok(Permissions::new(owner, others.iter().map(life)))
    }

    /// Makes a change, in a transaction of `client`'s or at once.
    fn apply(
        &mut self,
        change: Change,
        asker: &Asker,
        transaction: Option<(ClientId, u32)>,
        now_ns: u64,
    ) -> Result<(), Error> {
        if let Some((quota, usage)) = self.limits(asker) {
            self.check_quota(&change, asker, transaction, &quota, &usage)?;
        }
        self.stamp += 1;
        let stamp = self.stamp;
        if let Some((client, id)) = transaction {
            let Some(open) =
                self.clients.get_mut(&client).and_then(|client| client.transactions.get_mut(&id))
            else {
                return Err(Error::NotFound);
            };
            let before = open.bytes;
            let result = open.change(change, asker, stamp);
            let more = (open.bytes - before) as u32;
            if let Some(usage) = self.usage_of(client) {
                usage.memory = usage.memory.saturating_add(more);
            }
            return result;
        }
        // An open transaction's account counts the events.
        let silent = self.open.is_empty() && !self.watches.concern(change.path());
        let mut effects = Effects { silent, ..Effects::default() };
        let bytes = change.bytes();
        change.apply(&mut self.tree, asker, stamp, &mut effects)?;
        self.probe();
        self.settle(effects, asker, bytes, now_ns);
        Ok(())
    }

    fn check_quota(
        &self,
        change: &Change,
        asker: &Asker,
        transaction: Option<(ClientId, u32)>,
        quota: &Quota,
        usage: &Usage,
    ) -> Result<(), Error> {
        let open = transaction.and_then(|(client, id)| self.clients.get(&client)?.transactions.get(&id));
        let tree = open.map_or(&self.tree, Transaction::tree);
        if let Change::Write(_, value) = change
            && value.len() > quota.value as usize
        {
            return Err(Error::Space);
        }
        if let Change::Write(path, _) | Change::Make(path) = change {
            // That it may not at all comes first.
            let allowed = tree.open(path, asker, Access::WRITE);
            if let (Err(Error::NotFound), Found::Missing(_, missing)) = (allowed, tree.find(path)) {
                let owned = i64::from(usage.nodes) + open.map_or(0, |open| open.nodes);
                if owned + missing as i64 > i64::from(quota.nodes) {
                    return Err(Error::Space);
                }
            }
        }
        if let Some(open) = open
            && open.seen().max(open.changes()) >= quota.transaction_nodes as usize
        {
            return Err(Error::Space);
        }
        if usage.memory as usize + change.bytes() > quota.memory as usize {
            return Err(Error::Memory);
        }
        Ok(())
    }

    /// Does what follows from a change of the tree.
    fn settle(&mut self, effects: Effects, asker: &Asker, bytes: usize, now_ns: u64) {
        let add = |usage: &mut Usage, nodes: i64, bytes: i64| {
            let add =
                |to: &mut u32, more: i64| *to = (i64::from(*to) + more).clamp(0, i64::from(u32::MAX)) as u32;
            add(&mut usage.nodes, nodes);
            add(&mut usage.memory, bytes);
        };
        for (life, nodes, bytes) in effects.accounts {
            // There is but one life of the control domain.
            if life.domain == DomId::ZERO {
                add(&mut self.own, nodes, bytes);
            } else if let Some(known) = self.domains.get_mut(&life.domain).filter(|known| known.life == life)
            {
                add(&mut known.usage, nodes, bytes);
            }
        }
        for (life, path, added) in effects.tops {
            if let Some(known) = self.domains.get_mut(&life.domain).filter(|known| known.life == life) {
                if added {
                    Arc::make_mut(&mut known.tops).insert(path);
                } else {
                    Arc::make_mut(&mut known.tops).remove(&path);
                }
            }
        }
        self.count_replaced(effects.events.len() as u64 * PATH_BYTES + bytes as u64);
        let cause = (!asker.privileged).then_some(asker.life.domain);
        for event in &effects.events {
            self.probe();
            self.tell(event, cause, now_ns);
        }
    }

    /// Counts what snapshots may keep alive, and has the oldest given up when it is too much. All that all snapshots keep
    /// was replaced since the oldest was taken, so this bounds it for the whole store, and whoever keeps transactions open
    /// is the one who pays.
    fn count_replaced(&mut self, bytes: u64) {
        if self.open.is_empty() {
            return;
        }
        self.replaced += bytes;
        while let Some((&order, &(client, id))) = self.open.first() {
            let Some(oldest) =
                self.clients.get_mut(&client).and_then(|client| client.transactions.get_mut(&id))
            else {
                self.open.remove_mut(&order);
                continue;
            };
            if self.replaced - oldest.replaced_before <= PINNED_MAX {
                return;
            }
            self.orders += 1;
            let charged = oldest.bytes as u32;
            oldest.doom(&self.tree, self.orders, self.replaced);
            self.open.remove_mut(&order);
            self.open.insert_mut(self.orders, (client, id));
            if let Some(usage) = self.usage_of(client) {
                usage.memory = usage.memory.saturating_sub(charged);
            }
        }
    }

    /// A node as it is.
    pub(crate) fn node(&self, path: &Path) -> Option<&Node> {
        self.tree.get(path)
    }

    /// Compares the accounts and indexes with the tree; what is wrong, if anything. It takes as long as there are nodes.
    #[must_use]
    pub fn check(&self) -> Option<&'static str> {
        let mut nodes: HashMap<Life, u32> = HashMap::new();
        let mut tops = 0;
        let mut left = alloc::vec![(Path::root(), self.tree.root(), None)];
        while let Some((path, node, above)) = left.pop() {
            let owner = node.permissions.owner();
            *nodes.entry(owner).or_default() += 1;
            let Some(known) = self.domains.get(&owner.domain).filter(|known| known.life == owner) else {
                return Some("a node belongs to a domain that does not exist");
            };
            if above.is_some_and(|above| above != owner) && owner.domain != DomId::ZERO {
                tops += 1;
                if !known.tops.contains(&path) {
                    return Some("a node would outlive its domain");
                }
            }
            left.extend(node.children().map(|(name, child)| (path.child(name), child, Some(owner))));
        }
        if self.domains.values().any(|known| {
            Some(nodes.get(&known.life).copied().unwrap_or(0))
                != self.usage(known.life.domain).map(|usage| usage.nodes)
        }) {
            return Some("a domain's nodes are miscounted");
        }
        if self.domains.values().map(|known| known.tops.len()).sum::<usize>() != tops {
            return Some("a domain's index names nodes that are not its own");
        }
        None
    }
}

impl Client {
    fn new(home: Arc<Path>) -> Self {
        Self {
            home,
            watches: RedBlackTreeSetSync::new_sync(),
            transactions: RedBlackTreeMapSync::new_sync(),
            next_transaction: 1,
            queue: QueueSync::new_sync(),
            waiting: RedBlackTreeSetSync::new_sync(),
            queued: 0,
            replies: 0,
            expiry_ns: None,
        }
    }
}

fn watch_bytes(path: &str, token: &[u8]) -> u32 {
    (path.len() + token.len() + WATCH_BYTES) as u32
}

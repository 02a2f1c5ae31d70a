//! Transactions: a snapshot to work on, what was seen of it, and what was changed.
//!
//! At its end a transaction's changes are made again, on the tree as it is then, if everything that the transaction has seen
//! is still as it was: the same node, with the same value, permissions or children, whichever it asked for. So two
//! transactions that make children of one node do not disturb each other, and what is committed is what would have come of
//! doing it all at once at the end.

use crate::permissions::{Access, Asker, Life, Permissions};
use crate::tree::{Effects, Found, Node, Tree};
use crate::{Error, Path};
use alloc::sync::Arc;
use alloc::vec::Vec;
use hashbrown::HashMap;
use hypercall_abi::DomId;
use rpds::{QueueSync, RedBlackTreeMapSync};

/// Bytes that each entry of a transaction's records is charged with, beside what it holds.
const RECORD_BYTES: usize = 256;

/// A change of the tree.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write(Path, Arc<[u8]>),
    Make(Path),
    Remove(Path),
    Permit(Path, Permissions),
}

impl Change {
    pub fn path(&self) -> &Path {
        match self {
            Self::Write(path, _) | Self::Make(path) | Self::Remove(path) | Self::Permit(path, _) => path,
        }
    }

    /// Bytes that it may add to the tree.
    pub fn bytes(&self) -> usize {
        let value = if let Self::Write(_, value) = self { value.len() } else { 0 };
        self.path().as_str().len() + value
    }

    pub fn apply(
        &self,
        tree: &mut Tree,
        asker: &Asker,
        stamp: u64,
        effects: &mut Effects,
    ) -> Result<(), Error> {
        match self {
            Self::Write(path, value) => tree.write(path, Some(value), asker, stamp, effects),
            Self::Make(path) => tree.write(path, None, asker, stamp, effects),
            Self::Remove(path) => tree.remove(path, asker, stamp, effects),
            Self::Permit(path, list) => tree.set_permissions(path, list.clone(), asker, stamp, effects),
        }
    }
}

/// What of a node was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aspect {
    /// That it is there or not, its value, its permissions.
    Itself,
    /// The names of its children.
    Children,
    /// Everything in it and below.
    Subtree,
}

impl Aspect {
    fn stamp(self, node: &Node) -> u64 {
        match self {
            Self::Itself => node.changed,
            Self::Children => node.listed,
            Self::Subtree => node.newest,
        }
    }
}

/// Which aspects of one node were seen.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    itself: bool,
    children: bool,
    subtree: bool,
}

impl Seen {
    fn add(&mut self, aspect: Aspect) {
        match aspect {
            Aspect::Itself => self.itself = true,
            Aspect::Children => self.children = true,
            Aspect::Subtree => self.subtree = true,
        }
    }

    fn aspects(self) -> impl Iterator<Item = Aspect> {
        let all = [
            (self.itself, Aspect::Itself),
            (self.children, Aspect::Children),
            (self.subtree, Aspect::Subtree),
        ];
        all.into_iter().filter_map(|(seen, aspect)| seen.then_some(aspect))
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    base: Tree,
    tree: Tree,
    seen: RedBlackTreeMapSync<Path, Seen>,
    log: QueueSync<Change>,
    /// Nodes that its owner would own more at the end.
    pub nodes: i64,
    /// What its records are charged with.
    pub bytes: usize,
    /// Its place among all open transactions, from the oldest.
    pub order: u64,
    /// How much had been replaced in the store when the snapshot was taken.
    pub replaced_before: u64,
    /// Its snapshot was given up; it can only end in a conflict.
    doomed: bool,
}

impl Transaction {
    pub fn new(tree: &Tree, order: u64, replaced_before: u64) -> Self {
        Self {
            base: tree.clone(),
            tree: tree.clone(),
            seen: RedBlackTreeMapSync::new_sync(),
            log: QueueSync::new_sync(),
            nodes: 0,
            bytes: 0,
            order,
            replaced_before,
            doomed: false,
        }
    }

    /// The tree as it sees it.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Gives its snapshot up for a newer one, because keeping it takes too much memory.
    pub fn doom(&mut self, tree: &Tree, order: u64, replaced_before: u64) {
        *self = Self { doomed: true, ..Self::new(tree, order, replaced_before) };
    }

    /// Nodes that it has looked at.
    pub fn seen(&self) -> usize {
        self.seen.size()
    }

    /// Changes that it has made.
    pub fn changes(&self) -> usize {
        self.log.len()
    }

    /// Notes that something was looked at.
    pub fn saw(&mut self, path: &Path, aspect: Aspect) {
        if let Some(seen) = self.seen.get_mut(path) {
            return seen.add(aspect);
        }
        let mut seen = Seen::default();
        seen.add(aspect);
        self.seen.insert_mut(path.clone(), seen);
        self.bytes += path.as_str().len() + RECORD_BYTES;
    }

    /// Notes that a node was asked for. If it is missing, the answer depends on the nearest one above that is there, and on
    /// there being none in between.
    fn saw_way(&mut self, path: &Path, aspect: Aspect) {
        self.saw(path, aspect);
        if let Found::Missing(_, missing) = self.tree.find(path) {
            let there = path.names().count() - missing;
            let mut at = Path::root();
            for (depth, name) in path.names().take(there + 1).enumerate() {
                if depth == there {
                    self.saw(&at, Aspect::Itself);
                }
                at = at.child(name);
            }
            self.saw(&at, Aspect::Itself);
        }
    }

    /// Makes a change in the snapshot.
    pub fn change(&mut self, change: Change, asker: &Asker, stamp: u64) -> Result<(), Error> {
        // What it was decided by counts, even if the answer was no.
        let aspect = if matches!(change, Change::Remove(_)) { Aspect::Subtree } else { Aspect::Itself };
        self.saw_way(&change.path().clone(), aspect);
        let mut effects = Effects::default();
        change.apply(&mut self.tree, asker, stamp, &mut effects)?;
        let own = effects.accounts.iter().filter(|(life, ..)| *life == asker.life);
        self.nodes += own.map(|(_, nodes, _)| nodes).sum::<i64>();
        self.bytes += change.bytes() + RECORD_BYTES;
        self.log.enqueue_mut(change);
        Ok(())
    }

    /// The tree as it will be, and what that means.
    ///
    /// # Errors
    /// [`Error::Conflict`] when something it has seen has changed, also when a domain that it gave rights to has gone.
    pub fn finish(
        &self,
        tree: &Tree,
        lives: impl Fn(DomId) -> Life,
        asker: &Asker,
        stamp: u64,
    ) -> Result<(Tree, Effects), Error> {
        let still = |path: &Path, aspect: Aspect| {
            let stamp = |tree: &Tree| tree.get(path).map(|node| aspect.stamp(node));
            stamp(&self.base) == stamp(tree)
        };
        let unchanged = self.seen.iter().all(|(path, seen)| seen.aspects().all(|aspect| still(path, aspect)));
        let named = self.log.iter().filter_map(|change| match change {
            Change::Permit(_, list) => Some(list),
            _ => None,
        });
        let same = named.flat_map(Permissions::lives).all(|life| lives(life.domain) == life);
        if self.doomed || !unchanged || !same {
            return Err(Error::Conflict);
        }
        let (mut tree, mut effects) = (tree.clone(), Effects::default());
        for change in self.log.iter() {
            // It was possible in the snapshot, and all that decided it is the same.
            change.apply(&mut tree, asker, stamp, &mut effects).map_err(|_| Error::Conflict)?;
        }
        merge_events(&mut effects, &self.base, &tree);
        Ok((tree, effects))
    }

    /// Whether the node at `path` may be read, and the node.
    pub fn open(&mut self, path: &Path, asker: &Asker, aspect: Aspect) -> Result<&Node, Error> {
        self.saw_way(path, Aspect::Itself);
        self.saw(path, aspect);
        self.tree.open(path, asker, Access::READ)
    }
}

/// One event for each path, at its first place. As with Xen's xenstored it is for those who might read the node before, or may now, or may
/// read the one above it if it is there still; what was meanwhile does not count, nor what was there only meanwhile.
fn merge_events(effects: &mut Effects, before: &Tree, after: &Tree) {
    let mut places: HashMap<Path, usize> = HashMap::new();
    let mut merged: Vec<crate::tree::Event> = Vec::new();
    for event in effects.events.drain(..) {
        let place = *places.entry(event.path.clone()).or_insert(merged.len());
        match merged.get_mut(place) {
            Some(first) => first.exact &= event.exact,
            None => merged.push(event),
        }
    }
    for event in &mut merged {
        let node = after.get(&event.path);
        let above = node.and_then(|_| after.get(&event.path.split_last()?.0));
        let readers = [before.get(&event.path), node, above].into_iter().flatten();
        event.readable = readers.map(|node| node.permissions.clone()).collect();
    }
    merged.retain(|event| !event.readable.is_empty());
    effects.events = merged;
}

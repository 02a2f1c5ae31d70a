//! The nodes.
//!
//! A node's children are a persistent map, and so all of a tree is: a clone is one reference, and a change copies no more
//! than the way from the root to it, if somebody else still refers to the tree as it was, and nothing otherwise.
//!
//! Each node carries three stamps of a counter that each change moves: when its value or permissions changed or it was made
//! (`changed`), when a child came or went (`listed`), and when anything in it or below did (`newest`). A transaction compares
//! them to see whether what it has seen is still so.
//!
//! Functions here check and change; what a change means for others (accounts, indexes, watches) is told in [`Effects`].

use crate::permissions::{Access, Asker, Life, Permissions};
use crate::{Error, Path};
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall_abi::DomId;
use rpds::RedBlackTreeMapSync;

/// Bytes that a node is charged with beside its name and value.
const NODE_BYTES: usize = 192;

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Arc<[u8]>,
    pub permissions: Permissions,
    children: RedBlackTreeMapSync<Arc<str>, Node>,
    pub changed: u64,
    pub listed: u64,
    pub newest: u64,
}

impl Node {
    fn new(permissions: Permissions, stamp: u64) -> Self {
        Self {
            value: Arc::from(&[][..]),
            permissions,
            children: RedBlackTreeMapSync::new_sync(),
            changed: stamp,
            listed: stamp,
            newest: stamp,
        }
    }

    /// Names of its children, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.children.keys().map(|name| &**name)
    }

    pub fn children(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.children.iter().map(|(name, node)| (&**name, node))
    }

    fn bytes(&self, name: &str) -> i64 {
        (NODE_BYTES + name.len() + self.value.len()) as i64
    }
}

/// A node of [`Tree::plant`].
pub(crate) struct Plant<'a> {
    /// Its path below the top, of the right form; empty for the top itself.
    pub below: &'a str,
    /// Its value; empty, and it keeps the one that it has.
    pub value: &'a [u8],
    /// Its permissions, if they are to be other than those that it has or inherits.
    pub permissions: Option<Permissions>,
}

/// Something that watches may be about.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub path: Path,
    /// Only watches on this very path: a node that went with one above it.
    pub exact: bool,
    /// Whoever may read by one of these hears of it: the node's own list, the one before, its parent's.
    pub readable: Vec<Permissions>,
}

/// What a change means for others.
#[derive(Clone, Debug, Default)]
pub(crate) struct Effects {
    /// Nobody watches anything that the change is about: its events need not be told.
    pub silent: bool,
    pub events: Vec<Event>,
    /// Nodes and bytes that a domain has more or less now.
    pub accounts: Vec<(Life, i64, i64)>,
    /// Nodes whose owner is not their parent's owner: the tops of what ends with a domain. True for new ones.
    pub tops: Vec<(Life, Path, bool)>,
}

impl Effects {
    fn account(&mut self, owner: Life, nodes: i64, bytes: i64) {
        match self.accounts.last_mut() {
            Some(last) if last.0 == owner => (last.1, last.2) = (last.1 + nodes, last.2 + bytes),
            _ => self.accounts.push((owner, nodes, bytes)),
        }
    }

    fn top(&mut self, owner: Life, path: &Path, added: bool) {
        // Nothing ends with the control domain.
        if owner.domain != DomId::ZERO {
            self.tops.push((owner, path.clone(), added));
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: Node,
}

/// Where a path leads.
pub(crate) enum Found<'t> {
    Node(&'t Node),
    /// Nothing is there; the nearest node above that exists, and how many names are missing below it.
    Missing(&'t Node, usize),
}

impl Tree {
    pub fn new(owner: Life, stamp: u64) -> Self {
        Self { root: Node::new(Permissions::new((owner, Access::NONE), core::iter::empty()), stamp) }
    }

    pub fn root(&self) -> &Node {
        &self.root
    }

    pub fn find(&self, path: &Path) -> Found<'_> {
        let mut node = &self.root;
        let mut names = path.names();
        while let Some(name) = names.next() {
            match node.children.get(name) {
                Some(child) => node = child,
                None => return Found::Missing(node, 1 + names.count()),
            }
        }
        Found::Node(node)
    }

    pub fn get(&self, path: &Path) -> Option<&Node> {
        match self.find(path) {
            Found::Node(node) => Some(node),
            Found::Missing(..) => None,
        }
    }

    /// The node at `path`, if `asker` may do what is `wanted`. What does not exist is `NotFound` only to those who may do
    /// the same with what is above it.
    pub fn open(&self, path: &Path, asker: &Asker, wanted: Access) -> Result<&Node, Error> {
        match self.find(path) {
            Found::Node(node) if node.permissions.access(asker).allows(wanted) => Ok(node),
            Found::Node(_) => Err(Error::Access),
            Found::Missing(above, _) if above.permissions.access(asker).allows(wanted) => {
                Err(Error::NotFound)
            }
            Found::Missing(..) => Err(Error::Access),
        }
    }

    /// The node at `path`, which exists, to be changed; all nodes on the way are marked as changed below.
    fn edit(&mut self, path: &Path, stamp: u64) -> Option<&mut Node> {
        let mut node = &mut self.root;
        node.newest = stamp;
        for name in path.names() {
            node = node.children.get_mut(name)?;
            node.newest = stamp;
        }
        Some(node)
    }

    /// Sets a node's value; makes it, and those above it, if it is missing. Gives the number of nodes made.
    pub fn write(
        &mut self,
        path: &Path,
        value: Option<&[u8]>,
        asker: &Asker,
        stamp: u64,
        effects: &mut Effects,
    ) -> Result<(), Error> {
        let node = match self.open(path, asker, Access::WRITE) {
            // Making a node that exists changes nothing.
            Ok(_) if value.is_none() => return Ok(()),
            Ok(_) => self.edit(path, stamp),
            Err(Error::NotFound) => self.create(path, asker, stamp, effects),
            Err(error) => return Err(error),
        };
        let Some(node) = node else { return Err(Error::NotFound) };
        if let Some(value) = value {
            effects.account(node.permissions.owner(), 0, value.len() as i64 - node.value.len() as i64);
            node.value = Arc::from(value);
        }
        node.changed = stamp;
        let permissions = node.permissions.clone();
        self.tell(path, false, permissions, None, effects);
        Ok(())
    }

    /// Makes what is missing on the way to `path`, and gives the last of it; all nodes on the way are marked as changed below.
    fn create(&mut self, path: &Path, asker: &Asker, stamp: u64, effects: &mut Effects) -> Option<&mut Node> {
        let mut node = &mut self.root;
        for (above, name) in path.names().enumerate() {
            node = grow(node, name, || path.first(above + 1), asker, stamp, effects)?;
        }
        node.newest = stamp;
        Some(node)
    }

    /// Makes a node and nodes below it, or changes them: what as many writes and changes of permissions by the control domain would do, but
    /// the way to `top` is gone only once. Nobody is told: it is for places that nobody watches.
    pub fn plant(
        &mut self,
        top: &Path,
        plants: &[Plant<'_>],
        asker: &Asker,
        stamp: u64,
        effects: &mut Effects,
    ) {
        let above = top
            .split_last()
            .and_then(|(parent, _)| Some(self.create(&parent, asker, stamp, effects)?.permissions.owner()));
        let Some(node) = self.create(top, asker, stamp, effects) else { return };
        for plant in plants {
            place(node, top, above, plant, asker, stamp, effects);
        }
    }

    /// Removes a node and all below it.
    pub fn remove(
        &mut self,
        path: &Path,
        asker: &Asker,
        stamp: u64,
        effects: &mut Effects,
    ) -> Result<(), Error> {
        match self.open(path, asker, Access::WRITE) {
            Ok(_) => {}
            // It is gone already, if its parent is there.
            Err(Error::NotFound) if matches!(self.find(path), Found::Missing(_, 1)) => return Ok(()),
            Err(error) => return Err(error),
        }
        let Some((above, name)) = path.split_last() else { return Err(Error::Invalid) };
        let Some(parent) = self.edit(&above, stamp) else { return Err(Error::NotFound) };
        let owner = parent.permissions.owner();
        let readable = parent.permissions.clone();
        let Some(node) = parent.children.get(name).cloned() else { return Err(Error::NotFound) };
        parent.children.remove_mut(name);
        parent.listed = stamp;
        forget(&node, &mut path.clone(), name, owner, &readable, true, effects);
        Ok(())
    }

    /// Sets a node's permissions; only its owner may, and only the control domain may change the owner.
    pub fn set_permissions(
        &mut self,
        path: &Path,
        permissions: Permissions,
        asker: &Asker,
        stamp: u64,
        effects: &mut Effects,
    ) -> Result<(), Error> {
        let node = self.open(path, asker, Access::WRITE)?;
        if !node.permissions.owned_by(asker) {
            return Err(Error::Access);
        }
        let (before, after) = (node.permissions.owner(), permissions.owner());
        if before != after && !asker.privileged {
            return Err(Error::NotOwner);
        }
        let (above, name) = match path.split_last() {
            Some((parent, name)) => (self.get(&parent).map(|node| node.permissions.owner()), name),
            // The root would end with its owner.
            None if before != after => return Err(Error::Invalid),
            None => (None, ""),
        };
        let Some(node) = self.edit(path, stamp) else { return Err(Error::NotFound) };
        let old = permit(node, name, || path.clone(), above, permissions.clone(), stamp, effects);
        self.tell(path, false, permissions, Some(old), effects);
        Ok(())
    }

    /// The node above `path`, if both are nodes' paths and it exists.
    fn above(&self, path: &Path) -> Option<&Node> {
        let mut node = &self.root;
        let mut names = path.names();
        let mut last = names.next()?;
        for name in names {
            node = node.children.get(last)?;
            last = name;
        }
        Some(node)
    }

    fn tell(
        &self,
        path: &Path,
        exact: bool,
        permissions: Permissions,
        before: Option<Permissions>,
        effects: &mut Effects,
    ) {
        if effects.silent {
            return;
        }
        let parent = self.above(path).map(|parent| parent.permissions.clone());
        let readable = [Some(permissions), before, parent].into_iter().flatten().collect();
        effects.events.push(Event { path: path.clone(), exact, readable });
    }
}

/// The child of this name, made if it is missing; `path` is its path.
fn grow<'n>(
    node: &'n mut Node,
    name: &str,
    path: impl FnOnce() -> Path,
    asker: &Asker,
    stamp: u64,
    effects: &mut Effects,
) -> Option<&'n mut Node> {
    node.newest = stamp;
    if !node.children.contains_key(name) {
        let made = Node::new(node.permissions.inherited(asker), stamp);
        let owner = made.permissions.owner();
        effects.account(owner, 1, made.bytes(name));
        if owner != node.permissions.owner() {
            effects.top(owner, &path(), true);
        }
        node.children.insert_mut(Arc::from(name), made);
        node.listed = stamp;
    }
    node.children.get_mut(name)
}

/// Gives a node another list of permissions; returns the old one. `above` is the owner of the node above it, and `path` its path.
fn permit(
    node: &mut Node,
    name: &str,
    path: impl FnOnce() -> Path,
    above: Option<Life>,
    permissions: Permissions,
    stamp: u64,
    effects: &mut Effects,
) -> Permissions {
    let after = permissions.owner();
    let old = core::mem::replace(&mut node.permissions, permissions);
    let before = old.owner();
    node.changed = stamp;
    if before != after {
        let (path, bytes) = (path(), node.bytes(name));
        effects.account(before, -1, -bytes);
        effects.account(after, 1, bytes);
        if above != Some(before) {
            effects.top(before, &path, false);
        }
        if above != Some(after) {
            effects.top(after, &path, true);
        }
        for (name, child) in node.children() {
            let owner = child.permissions.owner();
            if owner == before {
                effects.top(owner, &path.child(name), true);
            } else if owner == after {
                effects.top(owner, &path.child(name), false);
            }
        }
    }
    old
}

/// Makes or changes one of the nodes of [`Tree::plant`]. `above` is the owner of the node above `top`.
fn place(
    top_node: &mut Node,
    top: &Path,
    mut above: Option<Life>,
    plant: &Plant<'_>,
    asker: &Asker,
    stamp: u64,
    effects: &mut Effects,
) {
    let mut node = top_node;
    let mut name = top.names().last().unwrap_or("");
    let mut end = 0;
    for next in plant.below.split('/').filter(|name| !name.is_empty()) {
        end += next.len() + usize::from(end > 0);
        above = Some(node.permissions.owner());
        name = next;
        let path = || top.child(plant.below.get(..end).unwrap_or(""));
        let Some(child) = grow(node, next, path, asker, stamp, effects) else { return };
        node = child;
    }
    node.newest = stamp;
    if !plant.value.is_empty() {
        let more = plant.value.len() as i64 - node.value.len() as i64;
        effects.account(node.permissions.owner(), 0, more);
        node.value = Arc::from(plant.value);
        node.changed = stamp;
    }
    if let Some(permissions) = &plant.permissions {
        let path = || if plant.below.is_empty() { top.clone() } else { top.child(plant.below) };
        permit(node, name, path, above, permissions.clone(), stamp, effects);
    }
}

/// Notes that `node`, at `path`, and all below it are gone, those below first. The depth of trees is bounded.
fn forget(
    node: &Node,
    path: &mut Path,
    name: &str,
    above: Life,
    readable: &Permissions,
    top: bool,
    effects: &mut Effects,
) {
    let owner = node.permissions.owner();
    for (name, child) in node.children() {
        let before = path.enter(name);
        forget(child, path, name, owner, &node.permissions, false, effects);
        path.back(before);
    }
    effects.account(owner, -1, -node.bytes(name));
    if owner != above {
        effects.top(owner, path, false);
    }
    if !effects.silent {
        let readable = [node.permissions.clone(), readable.clone()].into();
        effects.events.push(Event { path: path.clone(), exact: !top, readable });
    }
}

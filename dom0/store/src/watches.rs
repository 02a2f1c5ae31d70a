//! Who wants to hear of which paths.
//!
//! Watches are in a tree of names as nodes are. What changed is followed down there, as far as anybody watches anything: a change costs
//! as many steps as its path has names, at most, and one for each watch that is told.

use crate::Path;
use crate::store::ClientId;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use hashbrown::HashMap;

/// One watch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    /// Bytes of the path that the client does not see, because its own path was relative.
    pub hidden: usize,
    /// How many names below the path count.
    pub depth: Option<u32>,
}

/// The watches on one path, by client and token.
type Here = BTreeMap<(ClientId, Arc<[u8]>), Watch>;

/// The watches on a path, and below it.
#[derive(Debug, Default)]
struct Level {
    here: Here,
    below: BTreeMap<Arc<str>, Level>,
}

#[derive(Debug, Default)]
pub(crate) struct Watches {
    root: Level,
    /// Those on special paths, which are no nodes'.
    special: HashMap<Arc<str>, Here>,
}

/// The names of a path.
fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !name.is_empty())
}

impl Watches {
    /// Adds a watch; false if the client has it already.
    pub fn add(&mut self, path: &Arc<str>, client: ClientId, token: &Arc<[u8]>, watch: Watch) -> bool {
        let here = if path.starts_with('/') {
            let mut level = &mut self.root;
            for name in names(path) {
                level = level.below.entry(Arc::from(name)).or_default();
            }
            &mut level.here
        } else {
            self.special.entry(Arc::clone(path)).or_default()
        };
        match here.entry((client, Arc::clone(token))) {
            alloc::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(watch);
                true
            }
            alloc::collections::btree_map::Entry::Occupied(_) => false,
        }
    }

    /// Takes a watch away; false if there is none.
    pub fn remove(&mut self, path: &str, client: ClientId, token: &Arc<[u8]>) -> bool {
        let key = (client, Arc::clone(token));
        if path.starts_with('/') {
            return self.root.remove(&mut names(path), &key);
        }
        let Some(here) = self.special.get_mut(path) else { return false };
        let removed = here.remove(&key).is_some();
        if here.is_empty() {
            self.special.remove(path);
        }
        removed
    }

    /// The watches on exactly this special path.
    pub fn at(&self, path: &str) -> impl Iterator<Item = (ClientId, &Arc<[u8]>, Watch)> {
        let here = self.special.get(path);
        here.into_iter().flatten().map(|((client, token), watch)| (*client, token, *watch))
    }

    /// Whether there are any watches on a node's path, above it or below it.
    pub fn concern(&self, path: &Path) -> bool {
        let mut level = &self.root;
        let mut names = path.names();
        loop {
            if !level.here.is_empty() {
                return true;
            }
            let Some(name) = names.next() else { return !level.below.is_empty() };
            match level.below.get(name) {
                Some(next) => level = next,
                None => return false,
            }
        }
    }

    /// Calls `each` for the watches on a node's path and on those above it, from the root down, with the number of names on the way.
    pub fn on_the_way(&self, path: &Path, mut each: impl FnMut(usize, ClientId, &Arc<[u8]>, Watch)) {
        let mut level = &self.root;
        let mut names = path.names();
        for depth in 0.. {
            level.here.iter().for_each(|((client, token), watch)| each(depth, *client, token, *watch));
            if level.below.is_empty() {
                return;
            }
            match names.next().and_then(|name| level.below.get(name)) {
                Some(next) => level = next,
                None => return,
            }
        }
    }
}

impl Level {
    /// Takes a watch away that is as far below as there are names. Paths have a bounded number of them.
    fn remove<'n>(&mut self, names: &mut impl Iterator<Item = &'n str>, key: &(ClientId, Arc<[u8]>)) -> bool {
        let Some(name) = names.next() else { return self.here.remove(key).is_some() };
        let Some(next) = self.below.get_mut(name) else { return false };
        let removed = next.remove(names, key);
        if next.here.is_empty() && next.below.is_empty() {
            self.below.remove(name);
        }
        removed
    }
}

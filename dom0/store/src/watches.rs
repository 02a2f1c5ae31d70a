//! Who wants to hear of which paths.
//!
//! Watches are in a tree of names as nodes are. What changed is followed down there, as far as anybody watches anything: a change costs
//! as many steps as its path has names, at most, and one for each watch that is told.

use crate::Path;
use crate::store::ClientId;
use alloc::sync::Arc;
use rpds::RedBlackTreeMapSync;

/// One watch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    /// Bytes of the path that the client does not see, because its own path was relative.
    pub hidden: usize,
    /// How many names below the path count.
    pub depth: Option<u32>,
    /// Greater than that of all that were there before.
    pub order: u64,
}

/// The watches on one path, by client and token.
type Here = RedBlackTreeMapSync<(ClientId, Arc<[u8]>), Watch>;

/// The watches on a path, and below it.
#[derive(Clone, Debug)]
struct Level {
    here: Here,
    below: RedBlackTreeMapSync<Arc<str>, Level>,
}

impl Default for Level {
    fn default() -> Self {
        Self { here: Here::new_sync(), below: RedBlackTreeMapSync::new_sync() }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Watches {
    root: Level,
    /// Those on special paths, which are no nodes'.
    special: RedBlackTreeMapSync<Arc<str>, Here>,
}

impl Default for Watches {
    fn default() -> Self {
        Self { root: Level::default(), special: RedBlackTreeMapSync::new_sync() }
    }
}

/// The names of a path.
fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !name.is_empty())
}

impl Watches {
    /// Adds a watch; false if the client has it already.
    pub fn add(&mut self, path: &Arc<str>, client: ClientId, token: &Arc<[u8]>, watch: Watch) -> bool {
        let key = (client, Arc::clone(token));
        if path.starts_with('/') {
            return self.root.add(&mut names(path), key, watch);
        }
        if !self.special.contains_key(&**path) {
            self.special.insert_mut(Arc::clone(path), Here::new_sync());
        }
        self.special.get_mut(&**path).is_some_and(|here| insert(here, key, watch))
    }

    /// Takes a watch away; false if there is none.
    pub fn remove(&mut self, path: &str, client: ClientId, token: &Arc<[u8]>) -> bool {
        let key = (client, Arc::clone(token));
        if path.starts_with('/') {
            return self.root.remove(&mut names(path), &key);
        }
        let Some(here) = self.special.get_mut(path) else { return false };
        let removed = here.remove_mut(&key);
        if here.is_empty() {
            self.special.remove_mut(path);
        }
        removed
    }

    /// The watches on exactly this special path.
    pub fn at(&self, path: &str) -> impl Iterator<Item = (ClientId, &Arc<[u8]>, Watch)> {
        let here = self.special.get(path);
        here.into_iter().flat_map(|here| here.iter()).map(|((client, token), watch)| (*client, token, *watch))
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

/// Adds a watch to those on a path; false if it is there.
fn insert(here: &mut Here, key: (ClientId, Arc<[u8]>), watch: Watch) -> bool {
    let new = !here.contains_key(&key);
    if new {
        here.insert_mut(key, watch);
    }
    new
}

impl Level {
    /// Adds a watch as far below as there are names; false if it is there. Paths have a bounded number of them.
    fn add<'n>(
        &mut self,
        names: &mut impl Iterator<Item = &'n str>,
        key: (ClientId, Arc<[u8]>),
        watch: Watch,
    ) -> bool {
        let Some(name) = names.next() else { return insert(&mut self.here, key, watch) };
        if !self.below.contains_key(name) {
            self.below.insert_mut(Arc::from(name), Level::default());
        }
        self.below.get_mut(name).is_some_and(|next| next.add(names, key, watch))
    }

    /// Takes a watch away that is as far below as there are names. Paths have a bounded number of them.
    fn remove<'n>(&mut self, names: &mut impl Iterator<Item = &'n str>, key: &(ClientId, Arc<[u8]>)) -> bool {
        let Some(name) = names.next() else { return self.here.remove_mut(key) };
        let Some(next) = self.below.get_mut(name) else { return false };
        let removed = next.remove(names, key);
        if next.here.is_empty() && next.below.is_empty() {
            self.below.remove_mut(name);
        }
        removed
    }
}

//! Who wants to hear of which paths.
//!
//! Watches are indexed by their path. What changed is looked up under its own path and each path above it, so a change
//! costs as many steps as its path has names, and one for each watch that is told.

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

#[derive(Debug, Default)]
pub(crate) struct Watches {
    by_path: HashMap<Arc<str>, Here>,
}

impl Watches {
    /// Adds a watch; false if the client has it already.
    pub fn add(&mut self, path: &Arc<str>, client: ClientId, token: &Arc<[u8]>, watch: Watch) -> bool {
        let here = self.by_path.entry(Arc::clone(path)).or_default();
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
        let Some(here) = self.by_path.get_mut(path) else { return false };
        let removed = here.remove(&(client, Arc::clone(token))).is_some();
        if here.is_empty() {
            self.by_path.remove(path);
        }
        removed
    }

    /// The watches on exactly this path.
    pub fn at(&self, path: &str) -> impl Iterator<Item = (ClientId, &Arc<[u8]>, Watch)> {
        let here = self.by_path.get(path);
        here.into_iter().flatten().map(|((client, token), watch)| (*client, token, *watch))
    }
}

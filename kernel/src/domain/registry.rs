//! The table of all domains: the one place that turns a domain number into a domain.

use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use core::hash::{BuildHasherDefault, Hasher};

use hashbrown::HashMap;
use hypercall_abi::DomId;

use super::Domain;
use super::id_set::IdSet;
use crate::access::Verbs;
use crate::sync::{RankedMutex, rank};

/// All domains by number. It grows at domain creation only.
pub struct Registry {
    table: RankedMutex<Table, { rank::REGISTRY }>,
}

/// Spreads domain numbers, which are given out in order or chosen by who may make domains: nobody else can choose some that collide. Each
/// event sent looks for one, so it is cheap.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u16(u16::from(*byte));
        }
    }
    fn write_u16(&mut self, number: u16) {
        // 2^64 by the golden ratio: the table uses the lowest bits and the highest.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

struct Table {
    domains: HashMap<u16, Arc<Domain>, BuildHasherDefault<NumberHasher>>,
    /// The same numbers in order, for walks.
    order: BTreeSet<u16>,
    /// Those that have a verb, which is given at creation or never: they are told what happens to others.
    with_verbs: IdSet,
    /// Those that have shut down and are not being destroyed.
    ended: IdSet,
    next: u16,
    /// vCPUs of all domains together.
    vcpus: usize,
}

impl Registry {
    /// A table without domains.
    pub fn new() -> Registry {
        Registry {
            table: RankedMutex::new(Table {
                domains: HashMap::default(),
                order: BTreeSet::new(),
                with_verbs: IdSet::new(),
                ended: IdSet::new(),
                next: 0,
                vcpus: 0,
            }),
        }
    }

    /// The domain numbered `id`, dying or not.
    pub fn get(&self, id: DomId) -> Option<Arc<Domain>> {
        self.table.lock().domains.get(&id.get()).cloned()
    }

    /// A number that no domain has, the one after the last given out first: numbers are reused as late as possible.
    pub fn free_id(&self) -> Option<DomId> {
        let mut table = self.table.lock();
        let limit = DomId::FIRST_RESERVED.get();
        let start = table.next;
        let mut id = start;
        loop {
            let next = if id + 1 >= limit { 1 } else { id + 1 };
            if !table.domains.contains_key(&id) {
                table.next = next;
                return Some(DomId::new(id));
            }
            id = next;
            if id == start {
                return None;
            }
        }
    }

    /// Enters a domain. Returns false when its number is taken.
    pub fn insert(&self, domain: Arc<Domain>) -> bool {
        let verbs = domain.rights.lock().verbs;
        let mut table = self.table.lock();
        let id = domain.id.get();
        if !table.order.insert(id) {
            return false;
        }
        table.vcpus += domain.vcpus.len();
        if verbs != Verbs::empty() {
            table.with_verbs.insert(id);
        }
        table.domains.insert(id, domain);
        true
    }

    /// Forgets a domain; it goes when the last reference does.
    pub fn remove(&self, id: DomId) -> Option<Arc<Domain>> {
        let mut table = self.table.lock();
        table.order.remove(&id.get());
        table.with_verbs.remove(id.get());
        table.ended.remove(id.get());
        let domain = table.domains.remove(&id.get())?;
        table.vcpus -= domain.vcpus.len();
        Some(domain)
    }

    /// How many vCPUs all domains have together.
    pub fn vcpu_total(&self) -> usize {
        self.table.lock().vcpus
    }

    /// How many domains there are.
    pub fn len(&self) -> usize {
        self.table.lock().domains.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The domain with the smallest number that is at least `id`: for walking the table in order.
    pub fn at_or_after(&self, id: DomId) -> Option<Arc<Domain>> {
        let table = self.table.lock();
        let number = *table.order.range(id.get()..).next()?;
        table.domains.get(&number).cloned()
    }

    /// As [`Registry::at_or_after`], of those that were created with a verb.
    pub fn with_verbs_at_or_after(&self, id: DomId) -> Option<Arc<Domain>> {
        let table = self.table.lock();
        table.domains.get(&table.with_verbs.at_or_after(id.get())?).cloned()
    }

    /// Notes that a domain has shut down.
    pub fn note_end(&self, id: DomId) {
        let mut table = self.table.lock();
        if table.domains.contains_key(&id.get()) {
            table.ended.insert(id.get());
        }
    }

    /// Its destroyer knows.
    pub fn forget_end(&self, id: DomId) {
        self.table.lock().ended.remove(id.get());
    }

    /// As [`Registry::at_or_after`], of those that have shut down and are not being destroyed.
    pub fn ended_at_or_after(&self, id: DomId) -> Option<Arc<Domain>> {
        let table = self.table.lock();
        table.domains.get(&table.ended.at_or_after(id.get())?).cloned()
    }
}

impl Default for Registry {
    fn default() -> Self {
        Registry::new()
    }
}

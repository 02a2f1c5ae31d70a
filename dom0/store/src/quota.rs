//! How much of the store one domain may take.

/// Limits of one domain. The defaults are those of Xen 4.17's xenstored. The control domain has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Nodes that it owns; one more is `ENOSPC`.
    pub nodes: u32,
    /// Bytes of one node's value; more is `ENOSPC`. (Xen's limit counts the list of children and permissions, too.)
    pub value: u32,
    /// Entries of a list of permissions; more is `ENOSPC`.
    pub permissions: u32,
    /// Watches; one more is granted, as by Xen, which compares before it counts; the next is `E2BIG`.
    pub watches: u32,
    /// Open transactions; one more is granted, as by Xen; the next is `ENOSPC`.
    pub transactions: u32,
    /// Nodes that one transaction looks at, and changes that it makes; one more is `ENOSPC`.
    pub transaction_nodes: u32,
    /// Requests whose replies, or whose watch events at others, have not been taken; beyond it, it is not heard.
    pub outstanding: u32,
    /// Bytes kept for it altogether: nodes, watches, open transactions; `ENOMEM`. Watch events that do not fit are dropped.
    pub memory: u32,
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            nodes: 1000,
            value: 2048,
            permissions: 5,
            watches: 128,
            transactions: 10,
            transaction_nodes: 1024,
            outstanding: 20,
            memory: 2560 << 10,
        }
    }
}

impl Quota {
    /// All limits: the names that `CONTROL quota` has for them, their values, and what they are about.
    pub(crate) fn described(&self) -> impl Iterator<Item = (&'static str, u32, &'static str)> {
        [
            ("nodes", self.nodes, "Nodes per domain"),
            ("watches", self.watches, "Watches per domain"),
            ("transactions", self.transactions, "Transactions per domain"),
            ("outstanding", self.outstanding, "Outstanding requests per domain"),
            ("transaction-nodes", self.transaction_nodes, "Nodes looked at in a transaction"),
            ("memory", self.memory, "Bytes kept per domain"),
            ("node-size", self.value, "Bytes of a node's value"),
            ("permissions", self.permissions, "Permissions per node"),
        ]
        .into_iter()
    }

    pub(crate) fn by_name(&mut self, name: &str) -> Option<&mut u32> {
        match name {
            "nodes" => Some(&mut self.nodes),
            "watches" => Some(&mut self.watches),
            "transactions" => Some(&mut self.transactions),
            "outstanding" => Some(&mut self.outstanding),
            "transaction-nodes" => Some(&mut self.transaction_nodes),
            "memory" => Some(&mut self.memory),
            "node-size" => Some(&mut self.value),
            "permissions" => Some(&mut self.permissions),
            _ => None,
        }
    }
}

/// What a domain has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Nodes that it owns.
    pub nodes: u32,
    /// Bytes kept for it, of nodes, watches and open transactions.
    pub memory: u32,
    /// Its watches.
    pub watches: u32,
    /// Its open transactions.
    pub transactions: u32,
    /// Watch events that its requests caused and others have not taken.
    pub caused: u32,
}

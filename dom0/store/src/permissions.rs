//! Who may do what with a node.
//!
//! A node has a list of permissions. The first names its owner, who may do everything, and says what those may do whom no
//! other entry names; each further entry is about one domain, and the first that names it counts.

use crate::Error;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use hypercall_abi::DomId;

/// What may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// See the value, the children and the permissions.
    pub read: bool,
    /// Change the value, create children, remove.
    pub write: bool,
}

impl Access {
    /// Nothing, `n`.
    pub const NONE: Access = Access { read: false, write: false };
    /// `r`.
    pub const READ: Access = Access { read: true, write: false };
    /// `w`.
    pub const WRITE: Access = Access { read: false, write: true };
    /// `b`.
    pub const BOTH: Access = Access { read: true, write: true };

    /// Whether all that is `wanted` is allowed.
    #[must_use]
    pub const fn allows(self, wanted: Access) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
}

/// One entry of a node's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permission {
    /// Whom it is about.
    pub domain: DomId,
    /// What they may do.
    pub access: Access,
}

impl Permission {
    /// An entry.
    #[must_use]
    pub const fn new(domain: DomId, access: Access) -> Permission {
        Permission { domain, access }
    }

    /// Reads a letter and a number, as in `r3`.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn parse(text: &[u8]) -> Result<Permission, Error> {
        let (letter, number) = text.split_first().ok_or(Error::Invalid)?;
        let access = match letter {
            b'n' => Access::NONE,
            b'r' => Access::READ,
            b'w' => Access::WRITE,
            b'b' => Access::BOTH,
            _ => return Err(Error::Invalid),
        };
        Ok(Permission { domain: domain(number)?, access })
    }
}

/// Reads a domain's number.
pub(crate) fn domain(text: &[u8]) -> Result<DomId, Error> {
    let digits = core::str::from_utf8(text).map_err(|_| Error::Invalid)?;
    // `parse` would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Error::Invalid);
    }
    digits.parse().map(DomId::new).map_err(|_| Error::Invalid)
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match (self.access.read, self.access.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        };
        write!(f, "{letter}{}", self.domain)
    }
}

/// A life of a domain: its number, and which domain of that number it is. Numbers are used again; what was said about the
/// domain before must not count for the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Life {
    pub domain: DomId,
    /// 0 for a domain that did not exist when it was named.
    pub number: u32,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker {
    pub life: Life,
    /// May do everything, and has no quota.
    pub privileged: bool,
    /// On whose behalf it may act, too.
    pub target: Option<Life>,
}

impl Asker {
    fn is(&self, life: Life) -> bool {
        life.number != 0 && (life == self.life || Some(life) == self.target)
    }
}

/// A node's list, shared by all nodes that inherited it. It is never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Permissions(Arc<[(Life, Access)]>);

impl Permissions {
    pub fn new(owner: (Life, Access), others: impl Iterator<Item = (Life, Access)>) -> Self {
        Self(core::iter::once(owner).chain(others).collect())
    }

    pub fn owner(&self) -> Life {
        self.first().0
    }

    fn first(&self) -> (Life, Access) {
        match self.0.first() {
            Some(&first) => first,
            None => (Life { domain: DomId::ZERO, number: 0 }, Access::NONE),
        }
    }

    /// The same list for a node that `asker` creates below: those who are no control domain own what they create.
    pub fn inherited(&self, asker: &Asker) -> Self {
        if asker.privileged || self.owner() == asker.life {
            return self.clone();
        }
        Self::new((asker.life, self.first().1), self.0.iter().skip(1).copied())
    }

    pub fn owned_by(&self, asker: &Asker) -> bool {
        asker.privileged || asker.is(self.owner())
    }

    pub fn access(&self, asker: &Asker) -> Access {
        if self.owned_by(asker) {
            return Access::BOTH;
        }
        let named = self.0.iter().skip(1).find(|(life, _)| asker.is(*life));
        named.map_or(self.first().1, |(_, access)| *access)
    }

    /// All that are named.
    pub fn lives(&self) -> impl Iterator<Item = Life> {
        self.0.iter().map(|(life, _)| *life)
    }

    pub fn entries(&self) -> impl Iterator<Item = Permission> {
        self.0.iter().map(|&(life, access)| Permission { domain: life.domain, access })
    }

    /// As `GET_PERMS` answers.
    pub fn to_wire(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in self.entries() {
            bytes.extend_from_slice(entry.to_string().as_bytes());
            bytes.push(0);
        }
        bytes
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.entries().map(|entry| entry.to_string()).collect();
        f.write_str(&texts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::{Access, Asker, Life, Permission, Permissions};
    use alloc::string::ToString;
    use hypercall_abi::DomId;

    fn life(domain: u16, number: u32) -> Life {
        Life { domain: DomId::new(domain), number }
    }

    fn asker(domain: u16, number: u32) -> Asker {
        Asker { life: life(domain, number), privileged: false, target: None }
    }

    #[test]
    fn texts() {
        for text in ["n0", "r7", "w65535", "b12"] {
            assert_eq!(Permission::parse(text.as_bytes()).unwrap().to_string(), text);
        }
        for bad in ["", "r", "x1", "r-1", "r+1", "r65536", "r1x", "1", "R1", "r 1"] {
            assert!(Permission::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_entry_is_the_owners_and_everybody_elses() {
        let list = Permissions::new(
            (life(1, 1), Access::READ),
            [(life(2, 2), Access::WRITE), (life(2, 2), Access::BOTH), (life(3, 0), Access::BOTH)].into_iter(),
        );
        assert_eq!(list.access(&asker(1, 1)), Access::BOTH);
        assert_eq!(list.access(&asker(2, 2)), Access::WRITE);
        assert_eq!(list.access(&asker(9, 9)), Access::READ);
        // A later domain of the same number, and one that was named before it existed, are strangers.
        assert_eq!(list.access(&asker(1, 5)), Access::READ);
        assert_eq!(list.access(&asker(2, 5)), Access::READ);
        assert_eq!(list.access(&asker(3, 3)), Access::READ);
        let helper = Asker { target: Some(life(1, 1)), ..asker(7, 7) };
        assert!(list.owned_by(&helper) && list.access(&helper) == Access::BOTH);
        let child = list.inherited(&asker(2, 2));
        assert_eq!(child.to_string(), "r2,w2,b2,b3");
    }
}

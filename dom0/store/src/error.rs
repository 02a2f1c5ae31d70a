//! Errors, as the wire names them.

/// Why a request failed. On the wire it is its name (`xsd_errors` of public/io/xs_wire.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Error {
    /// `EINVAL`: a malformed request, or a path that cannot be.
    Invalid,
    /// `EACCES`: no permission; also for nodes that do not exist, when the asker may not know.
    Access,
    /// `EEXIST`: this watch exists.
    Exists,
    /// `ENOENT`: no such node, watch, transaction or domain.
    NotFound,
    /// `ENOMEM`: the asker's memory quota is used up, or there is no memory.
    Memory,
    /// `ENOSPC`: another quota of the asker's is used up.
    Space,
    /// `ENOSYS`: no such type of message.
    Unknown,
    /// `EBUSY`: a transaction within a transaction.
    Busy,
    /// `EAGAIN`: the transaction met a conflicting change; begin it anew.
    Conflict,
    /// `E2BIG`: too many watches, or a reply that does not fit into a message.
    TooBig,
    /// `EPERM`: only the control domain gives nodes away.
    NotOwner,
    /// `EIO`: the store failed in the middle of the request, and all is as it was before.
    Failed,
}

impl Error {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "EINVAL",
            Self::Access => "EACCES",
            Self::Exists => "EEXIST",
            Self::NotFound => "ENOENT",
            Self::Memory => "ENOMEM",
            Self::Space => "ENOSPC",
            Self::Unknown => "ENOSYS",
            Self::Busy => "EBUSY",
            Self::Conflict => "EAGAIN",
            Self::TooBig => "E2BIG",
            Self::NotOwner => "EPERM",
            Self::Failed => "EIO",
        }
    }
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for Error {}

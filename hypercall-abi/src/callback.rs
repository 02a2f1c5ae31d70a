//! Guest entry points: the arguments of `callback_op` (public/callback.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::VirtAddr;

/// Flag of [`CallbackRegister`]: delivery masks upcalls. Event and NMI callbacks always do.
pub const CALLBACKF_MASK_EVENTS: u16 = 1 << 0;

/// IN of `CALLBACKOP_register`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CallbackRegister {
    /// Number of a [`CallbackType`](crate::subops::CallbackType).
    pub kind: u16,
    /// [`CALLBACKF_MASK_EVENTS`] or 0.
    pub flags: u16,
    /// Padding.
    pub pad0: u32,
    /// The entry point.
    pub address: VirtAddr,
}

/// IN of `CALLBACKOP_unregister`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CallbackUnregister {
    /// Number of a [`CallbackType`](crate::subops::CallbackType).
    pub kind: u16,
    /// Unused.
    pub unused: u16,
}

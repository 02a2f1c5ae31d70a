//! Guest pointers that nobody on the far side can dereference.

use core::marker::PhantomData;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A virtual address in the guest's memory where a `T`, or an array of `T`, is or goes (`XEN_GUEST_HANDLE`).
///
/// To the hypervisor it is a number: contents are reached only by the checked copies.
#[repr(transparent)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GuestHandle<T> {
    address: u64,
    of: PhantomData<T>,
}

impl<T> GuestHandle<T> {
    /// No address.
    pub const NULL: Self = Self::new(0);

    /// A handle to `address`.
    pub const fn new(address: u64) -> Self {
        GuestHandle { address, of: PhantomData }
    }
    /// The address.
    pub const fn addr(self) -> u64 {
        self.address
    }
    /// Whether it is the null handle.
    pub const fn is_null(self) -> bool {
        self.address == 0
    }
}

impl<T> Clone for GuestHandle<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for GuestHandle<T> {}
impl<T> Default for GuestHandle<T> {
    fn default() -> Self {
        Self::NULL
    }
}
impl<T> core::fmt::Debug for GuestHandle<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "GuestHandle({:#x})", self.address)
    }
}
